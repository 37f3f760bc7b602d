"""What only a GPU can tell: one command, at most 25 minutes on one, a table and JSON. Nothing is downloaded.

    python tests/bench/gpu.py --json gpu.json                   # all checks
    python tests/bench/gpu.py --checks text step                # some of them
    python tests/bench/gpu.py --device cpu --tiny               # do they run? the numbers mean nothing

train     train_clip.py on 512 pictures made here: losses of CLIP, LaCLIP-MT and SLIP against the CPU's, in fp32 and bf16, in
          micro-batches, by torchrun; two runs compared, and one that is killed and goes on
text      text tower forward + backward over random batches of 1,024 captions: one attention call (varlen), one a length (groups),
          padded to 77; ms a batch, the first time and after, and kernels launched
step      whole training steps of B/16 and B/16-laclip, images already on the host: images/s, share of --peak FLOP/s, peak memory; in
          eager mode, compiled, and compiled with --grad-checkpointing
sync      what waits for the GPU inside a step (torch.cuda.set_sync_debug_mode): must be nothing
rewrite   rewrite_llama.py's decoding with a LLaMA-7B of random weights, and two loops around generate: rows/s, bf16
loader    images/s of one loader worker, 640 x 480 JPEGs to crops of 224
caption   caption_llava.py's `caption` with a LLaVA-1.5-7B of random weights: images/s, ms of the prefill and of a decoding step
fuse      fuse_vicuna.py's `answer` with a Vicuna-13B of random weights: the same
peer      open_clip's own trainer beside train_clip.py, from file to AdamW step (tests/bench/train.py, case gpu-bf16)
"""
import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import caption_llava as C  # noqa: E402
import fuse_vicuna as V  # noqa: E402
import rewrite_llama as R  # noqa: E402
import train_clip as T  # noqa: E402
from data import make_tokenizer  # noqa: E402


def seconds(function, device, repeat=5):
    """Median time of a call, after one that warms up"""
    function()
    times = []
    for _ in range(repeat):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeat // 2]


def launches(function, device):
    """Kernels that a call launches"""
    if device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def write_set(folder, n, size=(640, 480)):
    """n JPEGs, rows and a tokenizer"""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(size, Image.BICUBIC).save(folder / "images" / f"{i}.jpg", quality=90)
        words = " ".join(rng.choice(["red", "old", "bike", "tree", "near", "a", "river", "house"], rng.integers(3, 20)))
        rows.append({"image": f"{i}.jpg", "alt": words, "rewrite_a": f"a photo of {words}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_tokenizer.main([str(folder / "rows.jsonl"), str(folder / "tokenizer.json"), "--vocab-size", "400"])


def check_train(args, folder):
    """Losses of short runs, all at once: each way to train on the device against the CPU in fp32, and the device against itself"""
    write_set(folder, 64 if args.tiny else 512)
    steps, torchrun = 6 if args.tiny else 30, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]

    def start(name, *flags, device=args.device, launch=()):
        return subprocess.Popen([
            sys.executable, *launch, ROOT / "train_clip.py", "--captions", folder / "rows.jsonl", "--image-root", folder / "images",
            "--text", "alt", "rewrite_a", "--model", "nano", "--tokenizer", folder / "tokenizer.json", "--batch-size", "32", "--steps",
            str(steps), "--warmup", "2", "--save-every", "2", "--log-every", "1", "--device", device, "--out", folder / name, "--resume",
            "auto", "--workers", "1", *flags], stdout=subprocess.DEVNULL, stderr=open(folder / f"{name}.log", "a"),
            env={**os.environ, "OMP_NUM_THREADS": "1"})

    def losses(name):
        path = folder / name / "metrics.jsonl"
        return np.array([json.loads(line)["loss"] for line in open(path)]) if path.exists() else np.array([])

    methods = {"clip": [], "multitext": ["--loss", "multitext"], "ssl": ["--ssl"]}
    extras = {"fp32": [], "micro-batch": ["--micro-batch", "8"], "grad-checkpointing": ["--grad-checkpointing"]}
    runs = {}
    for method, flags in [*methods.items()][:1 if args.tiny else None]:
        runs[f"{method} cpu"] = start(f"{method} cpu", *flags, "--precision", "fp32", device="cpu")
        runs[f"{method} bf16"] = start(f"{method} bf16", *flags)
        for name, more in extras.items():
            runs[f"{method} {name}"] = start(f"{method} {name}", *flags, *more, "--precision", "fp32", "--compile", "off")
    runs["clip torchrun"] = start("clip torchrun", "--precision", "fp32", "--compile", "off", launch=torchrun)
    runs["clip again"] = start("clip again")
    killed = start("killed")
    while killed.poll() is None and len(losses("killed")) <= steps // 3:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    runs["clip killed"] = start("killed")
    found = {"steps": steps}
    for name, process in runs.items():
        method, way = name.split()
        own = "killed" if way == "killed" else name
        reference = f"{method} bf16" if way in ("killed", "again") else f"{method} cpu"
        runs[reference].wait()
        if process.wait() or len(losses(own)) < steps:
            found[name] = (folder / f"{own}.log").read_text()[-1500:]
        elif name != reference:
            found[f"{name}, largest difference of a loss from {reference}"] = abs(losses(own) - losses(reference)).max()
        else:
            found[f"{name}, first and last loss"] = losses(own)[[0, -1]].tolist()
    return found


def check_text(args, folder):
    width = dict(text_width=64, text_layers=2, text_heads=2) if args.tiny else {}
    config = T.Config(embed_dim=64, image_size=32, patch_size=16, vision_width=64, vision_layers=1, vision_heads=1, vocab_size=1000, eot_id=999, **width)
    model = T.CLIP(config).to(args.device)
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(2 if args.tiny else 8):
        lengths = (torch.randn(32 if args.tiny else 1024, 1, generator=generator) * 8 + 20).clamp(4, 76).long()
        tokens = torch.randint(1, 999, (len(lengths), 77), generator=generator)
        batches.append(tokens.masked_fill(torch.arange(77) == lengths, 999))
    packed = [T.pack(tokens, 999, args.device) for tokens in batches]
    padded = [texts._replace(ids=tokens.flatten().to(args.device), positions=torch.arange(77).repeat(len(tokens)).to(args.device),
                             ends=(torch.arange(len(tokens)) * 77 + (tokens == 999).int().argmax(1)).to(args.device), groups=[(len(tokens), 77)])
              for texts, tokens in zip(packed, batches)]

    def run(batches):
        for texts in batches:
            with torch.autocast(args.device, torch.bfloat16):
                model.encode_packed(texts).float().sum().backward()
        model.zero_grad()

    found, varlen = {}, T.varlen_attn
    for name, inputs, attention in (("varlen", packed, varlen), ("groups", packed, None), ("padded", padded, None)):
        if name == "varlen" and (args.device == "cpu" or varlen is None):
            continue
        T.varlen_attn = attention
        start = time.perf_counter()
        run(inputs)
        if args.device == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        found[name] = {"ms a batch": 1000 * seconds(lambda: run(inputs), args.device, 3) / len(inputs), "ms the first time": 1000 * first / len(inputs),
                       "launches": launches(lambda: run(inputs[:1]), args.device)}
        print(f"  {name}: {found[name]}", flush=True)
    T.varlen_attn = varlen
    with torch.no_grad():
        reference = model.float().encode_packed(packed[0])
        found["varlen's largest difference from fp32"] = None
        if "varlen" in found:
            with torch.autocast(args.device, torch.bfloat16):
                found["varlen's largest difference from fp32"] = (model.encode_packed(packed[0]).float() - reference).abs().max().item()
    return found


def training_step(args, name, n, mode="eager"):
    """-> a function that does a step, images already on the host; the model"""
    config = T.Config(**T.PRESETS[name])
    model = T.CLIP(config).to(args.device)
    for tower in (model.visual.transformer, model.transformer):
        tower.grad_checkpointing = "checkpointing" in mode
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    if "compiled" in mode:
        model.visual.compile()
    tokens = torch.randint(1, 400, (n, 1, 16)).index_fill(2, torch.tensor([15]), config.eot_id)
    piece = {"images": torch.randint(0, 256, (n, 1, 3, config.image_size, config.image_size), dtype=torch.uint8), "tokens": tokens,
             "drawn": torch.zeros(n, dtype=torch.long), "counts": {}, "bad": []}
    if args.device == "cuda":
        piece["images"] = piece["images"].pin_memory()

    def step():
        batch = T.join([piece], args.device, n, config.eot_id)
        optimizer.zero_grad(set_to_none=True)
        loss = T.backward(model, model, lambda drawn, scale, images, texts: T.clip_loss(images, texts[:, 0], scale), batch,
                          lambda: torch.autocast(args.device, torch.bfloat16))
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6)
        return loss
    return step, model


def check_step(args, folder):
    found = {}
    sizes = {"nano": [8]} if args.tiny else {"ViT-B/16": [256, 1024], "ViT-B/16-laclip": [1024]}
    for name, n, mode in ((name, n, mode) for name in sizes for n in sizes[name]
                          for mode in ("eager", "compiled", "compiled, checkpointing")[:1 if args.tiny else None]):
        key = f"{name}, {n} images, {mode}"
        try:
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step, model = training_step(args, name, n, mode)
            time_of = seconds(step, args.device)
            c = model.config
            tokens = (c.image_size // c.patch_size) ** 2 + 1
            weights = sum(p.numel() for p in model.visual.parameters())
            attention = 4 * c.vision_layers * tokens * c.vision_width  # FLOPs a token: scores and their product with the values
            flops = 3 * tokens * (2 * weights + attention)  # the image tower's, which are nearly all
            found[key] = {"images/s": n / time_of, "share of peak": flops * n / time_of / args.peak,
                          "peak GB": torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else None}
        except torch.OutOfMemoryError:
            found[key] = "out of memory"
        step = model = None
        if args.device == "cuda":
            torch.cuda.empty_cache()
        print(f"  {key}: {found[key]}", flush=True)
    return found


def check_sync(args, folder):
    step, _ = training_step(args, "nano", 8 if args.tiny else 256)
    step()
    if args.device != "cuda":
        return "needs a GPU"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{os.path.basename(w.filename)}:{w.lineno}: {str(w.message).splitlines()[0]}" for w in seen] or "none"


def random_model(args, make):
    """make() on the device, in bf16 (--tiny: fp32)"""
    with torch.device(args.device):
        torch.set_default_dtype(torch.float32 if args.tiny else torch.bfloat16)
        try:
            return make().eval()
        finally:
            torch.set_default_dtype(torch.float32)


LLAMA = {"tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4),
         "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
         "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)}


def check_rewrite(args, folder):
    """Against `generate`, both with 132 tokens of prompt a row, of which rewrite_llama.py's rows share 120. A share of the
    vocabulary ends a line, so that lines have about 16 tokens, 77 at most; LaCLIP's released loop always makes 77"""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=32000, eos_token_id=2, pad_token_id=0, **LLAMA["tiny" if args.tiny else "7B"])
    model = random_model(args, lambda: LlamaForCausalLM(config))
    model.lm_head.weight.data.mul_(4)  # a trained model's nucleus has few tokens
    new, ends = 8 if args.tiny else 77, [2, *range(16, 32000, 16)]
    tokenizer = SimpleNamespace(eos_token_id=2, batch_decode=lambda rows, **_: ["\n" if row[0] in ends else "x" for row in rows])
    prompt, found = torch.randint(5, 32000, (1, 120), device=model.device), {}

    def ours(texts):
        completer.set_prefix(prompt)
        return sum(map(len, completer.decode(texts, torch.rand(len(texts), new))))

    def theirs(texts, ends):
        ids = torch.cat([prompt.repeat(len(texts), 1), torch.tensor(texts, device=model.device)], 1)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(
            do_sample=True, temperature=0.9, top_p=0.95, top_k=0, max_new_tokens=new, eos_token_id=ends, pad_token_id=0))
        return (out[:, ids.shape[1]:] != 0).sum().item()

    for n in ([4] if args.tiny else [64, 256]):
        completer = R.Completer(model, tokenizer, SimpleNamespace(max_new_tokens=new, temperature=0.9, top_p=0.95, model="random", batch_size=n))
        implementation = model.config._attn_implementation
        texts = [torch.randint(5, 32000, (12,)).tolist() for _ in range(n)]
        for side, run in (("rewrite_llama.py", lambda: ours(texts)), ("newline stop", lambda: theirs(texts, ends)),
                          ("LaCLIP's loop", lambda: theirs(texts, [32000]))):
            model.set_attn_implementation(implementation if side == "rewrite_llama.py" else "sdpa")
            count = [0, 0]
            with torch.inference_mode():
                time_of = seconds(lambda: count.append(run()), args.device, 1 if "loop" in side else 3)
            found[f"batch {n}, {side}"] = {"rows/s": n / time_of, "tokens a row": count[-1] / n}
            print(f"  batch {n}, {side}: {found[f'batch {n}, {side}']}", flush=True)
    return found | {"shares the prompt": completer.shares}


def generation(args, model, run, sizes):
    """run(n) answers n rows with model.generate. -> for each n, rows/s and ms of the prefill and of a decoding step: the
    time of one new token, and what each further one adds"""
    from transformers import GenerationConfig
    found, new = {}, 4 if args.tiny else 32
    for n in sizes:
        times = []
        for count in (1, new):
            model.generation_config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, eos_token_id=[2], pad_token_id=0)
            times.append(seconds(lambda: run(n), args.device, 3))
        found[f"batch {n}"] = {"rows/s": n / times[1], "ms prefill": 1000 * times[0], "ms a step": 1000 * (times[1] - times[0]) / (new - 1)}
        print(f"  batch {n}: {found[f'batch {n}']}", flush=True)
    return found


def check_caption(args, folder):
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28) if args.tiny else dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336)  # CLIP L/14
    vision, text = vision | {"model_type": "clip_vision_model", "patch_size": 14}, LLAMA["tiny" if args.tiny else "7B"] | {"model_type": "llama"}
    config = LlavaConfig(vision_config=vision, text_config=text | {"vocab_size": 32064}, image_token_index=32000)
    model, S = random_model(args, lambda: LlavaForConditionalGeneration(config)), vision["image_size"]
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: ["x"] * len(rows))

    def run(n):
        ids = torch.randint(5, 32000, (n, 25))
        ids = torch.cat([ids[:, :5], torch.full((n, (S // 14) ** 2), 32000), ids[:, 5:]], 1)  # the image's tokens in the prompt
        with torch.inference_mode():
            C.caption(model, tokenizer, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(n, 3, S, S)}, Counter())
    return generation(args, model, run, [2] if args.tiny else [16, 64])


def check_fuse(args, folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=32000, eos_token_id=2, **LLAMA["tiny" if args.tiny else "13B"])
    model = random_model(args, lambda: LlamaForCausalLM(config))

    def tokenizer(ids):
        return SimpleNamespace(input_ids=ids)
    tokenizer.batch_decode = lambda rows, **_: ["x"] * len(rows)
    model.generation_config.eos_token_id = [2]

    def run(n):
        prompts = [[*range(5, 105), *torch.randint(5, 32000, (40,)).tolist()] for _ in range(n)]  # the instruction, then two texts
        V.answer(model, tokenizer, prompts, n, Counter())
    return generation(args, model, run, [2] if args.tiny else [64, 256])


def check_peer(args, folder):
    if not importlib.util.find_spec("open_clip_train"):
        return "needs open_clip_torch"
    size = ["--model", "nano", "--batch-size", "8", "--warmup", "1", "--steps", "1"] if args.tiny else [
        "--batch-size", "256", "--warmup", "4", "--steps", "8", "--workers", "8"]
    subprocess.run([sys.executable, ROOT / "tests/bench/train.py", "--cases", "gpu-bf16", "--pairs", "1", "--device", args.device, *size,
                    "--json", folder / "peer.json"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return json.loads((folder / "peer.json").read_text())["rows"]


def check_loader(args, folder):
    write_set(folder, 64 if args.tiny else 1024)
    T.index_rows(str(folder / "rows.jsonl"))
    rows, tokenizer = T.Rows([str(folder / "rows.jsonl")]), T.Tokenizer.load(str(folder / "tokenizer.json"))
    samples = T.Samples(rows, str(folder / "images"), {"alt": 1}, "random", T.augment_crop, 224, tokenizer, 0, len(rows), False, False)
    torch.set_num_threads(1)
    start = time.perf_counter()
    for i in range(len(rows)):
        samples[i]
    return {"images/s a worker": len(rows) / (time.perf_counter() - start)}


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=[*CHECKS])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, a minute in all")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of the GPU in dense bf16 (default: H100 SXM's, %(default)g)")
    parser.add_argument("--json", help="write the results there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU: --device cpu --tiny tries the checks")
    T.start_ranks(T.pick_device(args.device))  # with its settings of the GPU
    results = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    print(results)
    for name in args.checks:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[name] = CHECKS[name](args, Path(folder))
            except Exception as e:  # the other checks go on
                if args.tiny:
                    raise
                results[name] = f"{type(e).__name__}: {e}"
        print(f"=== {name}, {time.perf_counter() - start:.0f} s\n{json.dumps(results[name], indent=1, default=float)}", flush=True)
        if args.json:
            with contextlib.suppress(OSError):
                Path(args.json).write_text(json.dumps(results, indent=1, default=float) + "\n")
    return results


if __name__ == "__main__":
    main()
