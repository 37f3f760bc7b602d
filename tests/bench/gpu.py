"""What only a GPU can tell: one command, at most 25 minutes on one, a table and JSON. Nothing is
downloaded. Every check is a process of its own, so that it stands alone and frees its memory.

    python tests/bench/gpu.py --json gpu.json                   # all checks, in this order
    python tests/bench/gpu.py --checks text step                # some of them
    python tests/bench/gpu.py --device cpu --tiny               # do they run? numbers mean nothing

train     train_clip.py on 512 pictures made here: losses of CLIP, LaCLIP-MT and SLIP against the
          CPU's, in fp32 and bf16, in micro-batches, by torchrun; two runs compared, and one that is
          killed and goes on
tests     the tests that failed on the last GPU: fp32 in micro-batches, counts of unusable rows, and
          runs that go on
caption   caption_llava.py's Captioner with a LLaVA-1.5-7B of random weights: images/s, ms of the
          prefill and of a decoding step
fuse      fuse_vicuna.py's Fuser with a Vicuna-13B of random weights: the same
peer      open_clip's own trainer beside train_clip.py, from file to AdamW step (train.py, gpu-bf16)
rewrite   rewrite_llama.py's slots with a LLaMA-7B of random weights, and two loops around generate:
          rows/s, bf16
step      whole training steps of B/16 and B/16-laclip, images already on the host: images/s, share
          of --peak FLOP/s, peak memory; eager, compiled, compiled with --grad-checkpointing
sync      what waits for the GPU inside a step (torch.cuda.set_sync_debug_mode): must be nothing
text      text tower forward + backward on batches of 1,024 captions: one attention call for all
          lengths, or padded to 77; ms a batch, the first time and after, and kernels launched
loader    images/s of one loader worker, 640 x 480 JPEGs to crops of 224
"""
import argparse
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
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(e.count for e in profile.key_averages() if e.device_type == on_gpu)


def write_set(folder, n, size=(640, 480)):
    """n JPEGs, rows and a tokenizer"""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for i in range(n):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        picture.resize(size, Image.BICUBIC).save(folder / "images" / f"{i}.jpg", quality=90)
        words = ["red", "old", "bike", "tree", "near", "a", "river", "house"]
        text = " ".join(rng.choice(words, rng.integers(3, 20)))
        rows.append({"image": f"{i}.jpg", "alt": text, "rewrite_a": f"a photo of {text}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_tokenizer.main([str(folder / "rows.jsonl"), str(folder / "tokenizer.json"),
                         "--vocab-size", "400"])


def command_of(folder, *flags):
    return ["--captions", folder / "rows.jsonl", "--image-root", folder / "images", "--text", "alt",
            "rewrite_a", "--model", "nano", "--tokenizer", folder / "tokenizer.json", *flags]


# === train_clip.py ================================================================================

def check_train(args, folder):
    """Short runs, all at once: each way to train on the device against the CPU in fp32, and the
    device against itself"""
    write_set(folder, 64 if args.tiny else 512)
    steps = 6 if args.tiny else 30

    def start(name, *flags, device=args.device, launch=()):
        command = [sys.executable, *launch, ROOT / "train_clip.py", *command_of(
            folder, "--batch-size", "32", "--steps", str(steps), "--warmup", "2", "--save-every",
            "2", "--log-every", "1", "--workers", "1", "--device", device, "--out", folder / name,
            *flags)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                stderr=open(folder / f"{name}.log", "a"),
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    def losses(name):
        path = folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return np.array([json.loads(line)["loss"] for line in lines])

    bf16, fp32 = ("--precision", "bf16"), ("--precision", "fp32", "--no-compile")
    methods = {"clip": [], "multitext": ["--loss", "multitext"], "ssl": ["--ssl"]}
    extras = {"fp32": [], "micro-batch": ["--micro-batch", "8"],
              "grad-checkpointing": ["--grad-checkpointing"]}
    runs = {}
    for method, flags in [*methods.items()][:1 if args.tiny else None]:
        runs[f"{method} cpu"] = start(f"{method} cpu", *flags, *fp32, device="cpu")
        runs[f"{method} bf16"] = start(f"{method} bf16", *flags, *bf16)
        for name, more in extras.items():
            runs[f"{method} {name}"] = start(f"{method} {name}", *flags, *more, *fp32)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    runs["clip torchrun"] = start("clip torchrun", *fp32, launch=torchrun)
    runs["clip again"] = start("clip again", *bf16)
    killed = start("killed", *bf16)
    while killed.poll() is None and len(losses("killed")) <= steps // 3:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    runs["clip killed"] = start("killed", *bf16)
    return compare_runs(runs, losses, steps, folder)


def compare_runs(runs, losses, steps, folder):
    """-> {run: largest difference of a loss from its reference, or the end of its log}"""
    found = {"steps": steps}
    for name, process in runs.items():
        method, way = name.split()
        own = "killed" if way == "killed" else name
        reference = f"{method} bf16" if way in ("killed", "again") else f"{method} cpu"
        runs[reference].wait()
        if process.wait() or len(losses(own)) < steps:
            found[name] = (folder / f"{own}.log").read_text()[-1500:]
        elif name != reference:
            difference = abs(losses(own) - losses(reference)).max()
            found[f"{name}, largest difference of a loss from {reference}"] = difference
        else:
            found[f"{name}, first and last loss"] = losses(own)[[0, -1]].tolist()
    return found


def check_tests(args, folder):
    chosen = ("test_unusable_rows or (test_ranks_and_micro_batches and None) or goes_on or "
              "test_text_encoders_on_ranks and None or test_bf16")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", chosen, ROOT / "tests/test_train.py",
         ROOT / "tests/test_recipe.py", ROOT / "tests/data/test_train_flags.py"],
        capture_output=True, text=True, env={**os.environ, "TEST_DEVICE": args.device})
    return done.stdout.splitlines()[-12:]


def training_step(args, name, n, mode="eager"):
    """-> a function that does a step, images already on the host; the model"""
    config = T.Config(**T.PRESETS[name])
    model = T.CLIP(config).to(args.device)
    T.Transformer.rerun = "checkpointing" in mode
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    if "compiled" in mode:
        model.visual.compile()
    texts = [*torch.randint(1, 400, (n, 16))]
    images = torch.randint(0, 256, (n, 1, 3, config.image_size, config.image_size),
                           dtype=torch.uint8)
    if args.device == "cuda":
        images = images.pin_memory()

    def step():
        optimizer.zero_grad(set_to_none=True)
        packed = T.pack(texts).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            scale, x, y = model(images.to(args.device, non_blocking=True), packed)
        loss = T.clip_loss(x, y[:, 0], scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6)
        return loss
    return step, model


def check_step(args, folder):
    sizes = {"nano": [8]} if args.tiny else {"ViT-B/16": [256, 1024], "ViT-B/16-laclip": [1024]}
    modes = ("eager", "compiled", "compiled, checkpointing")[:1 if args.tiny else None]
    found = {}
    for name, n, mode in ((name, n, mode) for name in sizes for n in sizes[name] for mode in modes):
        key = f"{name}, {n} images, {mode}"
        try:
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step, model = training_step(args, name, n, mode)
            time_of, c = seconds(step, args.device), model.config
            tokens = (c.image_size // c.patch_size) ** 2 + 1
            weights = sum(p.numel() for p in model.visual.parameters())
            attention = 4 * c.vision_layers * tokens * c.vision_width  # FLOPs a token: scores, sums
            flops = 3 * tokens * (2 * weights + attention)  # of the image tower, nearly all
            found[key] = {"images/s": n / time_of, "share of peak": flops * n / time_of / args.peak}
            if args.device == "cuda":
                found[key]["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
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
    return [f"{os.path.basename(w.filename)}:{w.lineno}: {str(w.message).splitlines()[0]}"
            for w in seen] or "none"


def check_text(args, folder):
    width = dict(text_width=64, text_layers=2, text_heads=2) if args.tiny else {}
    model = T.CLIP(T.Config(embed_dim=64, image_size=32, patch_size=16, vision_width=64,
                            vision_layers=1, vision_heads=1, vocab_size=1000, **width))
    model, rng, batches = model.to(args.device), np.random.default_rng(0), {"packed": [],
                                                                            "padded": []}
    for _ in range(2 if args.tiny else 8):
        lengths = (rng.normal(20, 8, 32 if args.tiny else 1024)).clip(4, 76).astype(int)
        texts = [torch.randint(1, 999, (int(length),)) for length in lengths]
        padded = [torch.nn.functional.pad(text, (0, 77 - len(text))) for text in texts]
        batches["packed"].append(T.pack(texts).to(args.device))
        batches["padded"].append(T.pack(padded).to(args.device))

    def run(some):
        for texts in some:
            with torch.autocast(args.device, torch.bfloat16):
                model.encode_text(texts).float().sum().backward()
        model.zero_grad()

    found = {}
    for name, some in batches.items():
        start = time.perf_counter()
        run(some)
        if args.device == "cuda":
            torch.cuda.synchronize()
        first, after = time.perf_counter() - start, seconds(lambda: run(some), args.device, 3)
        found[name] = {"ms a batch": 1000 * after / len(some),
                       "ms the first time": 1000 * first / len(some),
                       "launches": launches(lambda: run(some[:1]), args.device)}
        print(f"  {name}: {found[name]}", flush=True)
    with torch.no_grad():
        reference = model.encode_text(batches["packed"][0])
        with torch.autocast(args.device, torch.bfloat16):
            got = model.encode_text(batches["packed"][0]).float()
    return found | {"largest difference from fp32": (got - reference).abs().max().item()}


def check_loader(args, folder):
    write_set(folder, 64 if args.tiny else 1024)
    flags = "--batch-size", "1", "--image-size", "224", "--out", "none"
    options = T.parse_args([str(word) for word in command_of(folder, *flags)])
    rows, tokenizer = T.Rows(options.captions), T.Tokenizer.load(options.tokenizer)
    samples = T.Samples(options, rows, tokenizer, 224)
    torch.set_num_threads(1)
    start = time.perf_counter()
    for i in range(len(rows)):
        samples[0, i, i]
    return {"images/s a worker": len(rows) / (time.perf_counter() - start)}


def check_peer(args, folder):
    if not importlib.util.find_spec("open_clip_train"):
        return "needs open_clip_torch"
    size = ["--model", "nano", "--batch-size", "8", "--warmup", "1", "--steps", "1"] if args.tiny \
        else ["--batch-size", "256", "--warmup", "4", "--steps", "8", "--workers", "8"]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/bench/train.py", "--cases", "gpu-bf16", "--pairs", "1",
         "--device", args.device, *size, "--json", folder / "peer.json"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return done.stderr[-1500:]
    return json.loads((folder / "peer.json").read_text())["rows"]


# === the captioning stages ========================================================================

LLAMA = {"tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                      num_attention_heads=4),
         "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                    num_attention_heads=32),
         "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                     num_attention_heads=40)}


def random_model(args, make):
    """make() on the device, in bf16 (--tiny: fp32)"""
    with torch.device(args.device):
        torch.set_default_dtype(torch.float32 if args.tiny else torch.bfloat16)
        try:
            return make().eval()
        finally:
            torch.set_default_dtype(torch.float32)


def stage_of(kind, **attributes):
    """A stage's model class without its __init__, which reads a checkpoint"""
    stage = kind.__new__(kind)
    stage.__dict__.update(counts=Counter(), **attributes)
    return stage


def generation(args, model, run, sizes):
    """run(n) answers n rows with model.generate. -> for each n, rows/s and ms of the prefill and of
    a decoding step: the time of one new token, and what each further one adds"""
    from transformers import GenerationConfig
    found, new = {}, 4 if args.tiny else 32
    for n in sizes:
        times = []
        for count in (1, new):
            model.generation_config = GenerationConfig(
                max_new_tokens=count, min_new_tokens=count, eos_token_id=[2], pad_token_id=0)
            times.append(seconds(lambda: run(n), args.device, 3))
        found[f"batch {n}"] = {"rows/s": n / times[1], "ms prefill": 1000 * times[0],
                               "ms a step": 1000 * (times[1] - times[0]) / (new - 1)}
        print(f"  batch {n}: {found[f'batch {n}']}", flush=True)
    return found


def check_caption(args, folder):
    from transformers import BatchFeature, LlavaConfig, LlavaForConditionalGeneration
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                  num_attention_heads=16, image_size=336)  # CLIP L/14
    if args.tiny:
        vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                      num_attention_heads=2, image_size=28)
    vision |= {"model_type": "clip_vision_model", "patch_size": 14}
    text = LLAMA["tiny" if args.tiny else "7B"] | {"model_type": "llama", "vocab_size": 32064}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
    model = random_model(args, lambda: LlavaForConditionalGeneration(config))
    tokenizer, S = SimpleNamespace(decode=lambda ids, **_: "x"), vision["image_size"]
    stage = stage_of(C.Captioner, model=model, tokenizer=tokenizer, prompt="", ends={2})

    def run(n):
        ids = torch.randint(5, 32000, (n, 25))
        image = torch.full((n, (S // 14) ** 2), 32000)  # the image's tokens in the prompt
        ids = torch.cat([ids[:, :5], image, ids[:, 5:]], 1)
        with torch.inference_mode():
            stage.answer(BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids),
                                       "pixel_values": torch.rand(n, 3, S, S)}))
    return generation(args, model, run, [2] if args.tiny else [16, 64])


class Ids:
    """A tokenizer whose texts are ids already"""

    def __call__(self, prompts):
        return SimpleNamespace(input_ids=prompts)

    def pad(self, inputs, return_tensors):
        from transformers import BatchFeature
        ids = torch.tensor(inputs["input_ids"])
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids, **_):
        return "x"


def check_fuse(args, folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=32000, eos_token_id=2, **LLAMA["tiny" if args.tiny else "13B"])
    model = random_model(args, lambda: LlamaForCausalLM(config))
    stage = stage_of(V.Fuser, model=model, tokenizer=Ids(), ends={2})

    def run(n):  # the instruction, then two texts
        stage.args = SimpleNamespace(batch_size=n, format="chat")
        stage.answer([[*range(5, 105), *torch.randint(5, 32000, (40,)).tolist()]
                      for _ in range(n)])
    return generation(args, model, run, [2] if args.tiny else [64, 256])


def check_rewrite(args, folder):
    """Against `generate`, both with 132 tokens of prompt a row, of which rewrite_llama.py's slots
    share 120. A share of the vocabulary ends a line, so that lines have about 16 tokens, 77 at
    most; LaCLIP's released loop always makes 77. Four texts a slot."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    size = LLAMA["tiny" if args.tiny else "7B"]
    config = LlamaConfig(vocab_size=32000, eos_token_id=2, pad_token_id=0, **size)
    model = random_model(args, lambda: LlamaForCausalLM(config))
    model.lm_head.weight.data.mul_(4)  # a trained model's nucleus has few tokens
    new, ends = 8 if args.tiny else 77, [2, *range(16, 32000, 16)]
    prompt, found, forward = torch.randint(5, 32000, (120,)).tolist(), {}, model
    if args.device == "cuda":
        forward = torch.compile(model, mode="reduce-overhead", dynamic=False)

    def theirs(texts, ends):
        ids = torch.tensor([prompt + text for text in texts], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids),
                             generation_config=GenerationConfig(
                                 do_sample=True, temperature=0.9, top_p=0.95, top_k=0,
                                 max_new_tokens=new, eos_token_id=ends, pad_token_id=0))
        return (out[:, ids.shape[1]:] != 0).sum().item() / len(texts)

    for n in ([2] if args.tiny else [64, 256, 512, 1024]):
        options = SimpleNamespace(max_new_tokens=new, temperature=0.9, top_p=0.95, batch_size=n)
        stage = stage_of(R.Completer, args=options, model=model, forward=forward, shape=None,
                         ends={2}, stops={*ends})
        texts = [torch.randint(5, 32000, (12,)).tolist() for _ in range(4 * n)]

        def ours():
            uniform = np.random.default_rng(0).random((len(texts), new), "f4")
            return sum(map(len, stage.by_slots(prompt, texts, uniform))) / len(texts)

        for side, run, rows in (("rewrite_llama.py", ours, 4 * n),
                                ("newline stop", lambda: theirs(texts[:n], ends), n),
                                ("LaCLIP's loop", lambda: theirs(texts[:n], [32000]), n)):
            with torch.inference_mode():
                tokens = run()
                time_of = seconds(run, args.device, 1 if "loop" in side else 3)
            found[f"batch {n}, {side}"] = {"rows/s": rows / time_of, "tokens a row": tokens}
            print(f"  batch {n}, {side}: {found[f'batch {n}, {side}']}", flush=True)
    return found


# === the whole ====================================================================================

CHECKS = dict(train=check_train, tests=check_tests, caption=check_caption, fuse=check_fuse,
              peer=check_peer, rewrite=check_rewrite, step=check_step, sync=check_sync,
              text=check_text, loader=check_loader)


def run_alone(name, args):
    """One check in a process of its own, at most --limit seconds -> its result"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--checks", name, "--device", args.device, "--peak",
                   str(args.peak), "--json", f"{folder}/result.json", *["--tiny"] * args.tiny]
        try:
            subprocess.run(command, timeout=args.limit)
            return json.loads(Path(folder, "result.json").read_text())[name]
        except (subprocess.TimeoutExpired, OSError, KeyError) as e:
            return f"{type(e).__name__}: {e}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checks", nargs="+", choices=CHECKS, default=[*CHECKS])
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--tiny", action="store_true", help="small models, a few minutes in all")
    add("--peak", type=float, default=989e12,
        help="FLOP/s of the GPU in dense bf16 (default: H100 SXM's, %(default)g)")
    add("--limit", type=float, default=300, help="seconds a check (default: %(default)g)")
    add("--json", help="write the results there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU: --device cpu --tiny tries the checks")
    gpu = args.device == "cuda"
    results = {"torch": torch.__version__,
               "device": torch.cuda.get_device_name() if gpu else "cpu"}
    for name in args.checks:
        start = time.perf_counter()
        if len(args.checks) > 1:
            results[name] = run_alone(name, args)
        else:
            T.start_ranks(args.device)  # with its settings of the GPU
            with tempfile.TemporaryDirectory() as folder:
                results[name] = CHECKS[name](args, Path(folder))
            print(f"=== {name}, {time.perf_counter() - start:.0f} s\n"
                  f"{json.dumps(results[name], indent=1, default=float)}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1, default=float) + "\n")
    return results


if __name__ == "__main__":
    main()
