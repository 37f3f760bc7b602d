"""The captioning stages against the loops that people have, and their memory, on this machine's CPU.

    bash data/demo.sh                                                     # once: makes the model and the captions
    python tests/bench/captioning.py                                      # all cases, about an hour on two cores
    python tests/bench/captioning.py --cases rewrite-bf16                 # one of them, 10 minutes
    python tests/bench/captioning.py --rows 8 --pairs 1 --batch-sizes 8   # does it all run? the ratios mean nothing

    rewrite   rewrite_llama.py, rewrites/s, against two loops around transformers' `generate`, in plain order, three
              examples drawn for every prompt: (a) LaCLIP's released loop, always 77 new tokens, cut at the newline
              afterwards; (b) the same, but `generate` ends a row at any token that has a newline in it
    titles    the same on texts as long and uneven as the web's titles, made up here: answers are longer, lengths differ more
    fuse      fuse_vicuna.py --format pairs (for a small model), half of the rows: --batch-size 32 against 1
    caption   caption_llava.py --batch-size 16 against 1, a LLaVA of small random weights: the model is nearly free
    memory    rewrite_llama.py, ever longer files of empty texts, for which no row asks the model: peak resident memory.
              In bf16 torch's cache of compiled matrix products, one a prefix length, adds to it until it is full

A stage runs as a command; its rate is the one it prints: all its work but loading the model, second tries and fsync
included. The loops' clock covers tokenising, `generate` and decoding. All sides have the same model, dtype, threads,
captions, prompt, sampling and limit of 77 tokens, each its own best batch size, from a trial that also warms the loops
up; a stage starts cold every time. Sides take turns, every other round backwards. The stage rewrites a caption from
four sources, the slow loops from one, in turn. An answer's length includes its end; without one, it counts nowhere.
Much of the loops' time on a CPU is `generate` sorting the vocabulary for top-p; --temperature 0 shows it without.
"""
import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import timeit
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # for all sides
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SOURCES = ["chatgpt", "bard", "coco", "human"]
TASK = "Rewrite each image caption in other words, keeping its meaning.\n\n"  # of rewrite_llama.py's prompt
NEW, TOP_P, SHOTS = 77, 0.95, 3  # LaCLIP's release
OURS, LACLIP, NEWLINE = "rewrite_llama.py", "LaCLIP's loop", "newline stop"
AIMS = {LACLIP: 8, NEWLINE: 3.5}  # the smallest median ratio to be content with
RATIO = "{:.2f} x ({:.2f} to {:.2f})"
# Runs a script, then says how large its process has ever been. Not by getrusage: that starts at the parent's size.
WITH_PEAK = """import re, runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name="__main__")
print("VmHWM", re.search("VmHWM:(.*) kB", open("/proc/self/status").read())[1])"""


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def run_stage(script, folder, args, *flags):
    """-> the output's path, rows/s as printed, peak resident MiB"""
    output = Path(tempfile.mkdtemp(dir=folder), "out.jsonl")
    command = [sys.executable, "-c", WITH_PEAK, ROOT / script, "--output", output, "--device", "cpu", *flags]
    start = time.perf_counter()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": str(args.threads), "TMPDIR": str(folder)})
    life = time.perf_counter() - start
    rows, rate = re.search(r"^(\d+) rows", done.stdout, re.M), re.search(r"([\d.]+) rows a second", done.stdout)
    if done.returncode or not rows or not rate or int(rows[1]) > life * float(rate[1]):  # faster than it lived?
        sys.exit(f"{script}: status {done.returncode} after {life:.1f} s\n{done.stdout}{done.stderr[-3000:]}")
    return output, float(rate[1]), int(done.stdout.split("VmHWM")[1]) / 1024


def take_turns(sides, pairs):
    """[{side: what its function returns for the round's number: (.., rate, ..)}], every other round backwards"""
    results = [{} for _ in range(pairs)]
    for n, result in enumerate(results):
        for side in list(sides)[::-1 if n % 2 else 1]:
            result[side] = sides[side](n)
            print(f"  round {n + 1} of {pairs}, {side}: {result[side][1]:.2f} a second", flush=True)
    return results


def compare(rates, others):
    """-> median, smallest and largest ratio of the rounds"""
    ratios = [a / b for a, b in zip(rates, others)]
    return median(ratios), min(ratios), max(ratios)


def draw_prompts(captions, seed):
    """A prompt for every caption, the sources in turn, three examples drawn for each; of a group of captions, two."""
    rng, examples, prompts = random.Random(seed), read_rows(ROOT / "data/prompts/meta_pairs.jsonl"), []
    for caption, source in zip(captions, SOURCES * len(captions)):
        drawn = rng.sample([example for example in examples if example["source"] == source], SHOTS)
        pairs = [rng.sample(e["captions"], 2) if "captions" in e else (e["input"], e["output"]) for e in drawn]
        prompts.append(TASK + "".join(f"{a} => {b}\n" for a, b in pairs) + f"{caption} =>")
    return prompts


def loop(model, tokenizer, prompts, batch_size, temperature, ends, stop, seed):
    """transformers' generate over the prompts, ended by `ends` or not (LaCLIP's). -> answers (endless: None), rate"""
    how = {"do_sample": True, "temperature": temperature, "top_p": TOP_P, "top_k": 0} if temperature else {}
    how["eos_token_id"] = ends if stop else model.config.vocab_size  # an id that no token has
    torch.manual_seed(seed)
    answers, start = [], time.perf_counter()
    for at in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[at:at + batch_size], padding=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW, pad_token_id=tokenizer.pad_token_id, **how)
        for row in ids[:, inputs["input_ids"].shape[1]:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in ends), None)
            answers.append(end and tokenizer.decode(row[:end], skip_special_tokens=True).split("\n")[0].strip())
    return answers, len(prompts) / (time.perf_counter() - start)


def rewrite(args, rows, folder, dtype):
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[dtype]).eval()
    ends = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])] + [tokenizer.eos_token_id]
    captions, peaks = [" ".join(row["alt"].split()) for row in rows], []
    flags = ["--input", write_rows(folder / "rows.jsonl", rows), "--model", args.model, "--dtype", dtype,
             "--shots", SHOTS, "--temperature", args.temperature, "--top-p", TOP_P, "--max-new-tokens", NEW,
             "--sources", *SOURCES]

    def ours(size, seed, trial=False):
        peaks.append(peak(dtype))
        output, rate, _ = run_stage(OURS, folder, args, *flags, "--batch-size", size, "--seed", seed)
        return [row[f"rewrite_{source}"] for row in read_rows(output) for source in SOURCES], rate * len(SOURCES)

    def peer(stop, size, seed, trial=False):  # in a trial 64 texts, or one batch
        prompts = draw_prompts(captions, seed)[:max(size, 64) if trial else None]
        return loop(model, tokenizer, prompts, size, args.temperature, ends, stop, seed)

    sides, sizes = {LACLIP: partial(peer, False), OURS: ours, NEWLINE: partial(peer, True)}, {}
    for side, run in sides.items():
        rates = {size: run(size, 0, True)[1] for size in args.batch_sizes}
        sizes[side] = max(rates, key=rates.get)
        print(f"  trial, {side}: {', '.join(f'{rates[n]:.2f} texts/s in batches of {n}' for n in rates)}", flush=True)
    results = take_turns({side: partial(run, sizes[side]) for side, run in sides.items()}, args.pairs)
    found = {side: describe(side, size, results, tokenizer) for side, size in sizes.items()}
    for side, aim in AIMS.items():
        ratio = found[side]["ratio"] = compare(found[OURS]["runs"], found[side]["runs"])
        longer = found[OURS]["tokens"] / max(found[side]["tokens"], 1e-9) - 1
        print(f"rewrite-{dtype}: {RATIO.format(*ratio)} {side}, aim {aim}: {'' if ratio[0] >= aim else 'NOT '}reached, "
              f"our answers longer by {100 * longer:+.1f} %: {'' if abs(longer) <= 0.1 else 'NOT '}within 10 %")
    # 2 FLOPs a parameter and token. Not counted: the prefixes that rows share, answers thrown away, attention. Counted
    # though not computed: the output layer for all but the last token of a prompt
    new = found[OURS]["texts/s"] * found[OURS]["tokens"] * found[OURS]["answered"]
    both = new + found[OURS]["texts/s"] * mean(len(tokenizer(f"{caption} =>").input_ids) for caption in captions)
    share = 2 * sum(p.numel() for p in model.parameters()) * both / max(peaks)
    print(f"ours: {new:.0f} new tokens/s, {both:.0f} with captions, {share:.1%} of {max(peaks) / 1e9:.0f} GFLOP/s")
    return {**found, "new tokens/s": new, "tokens/s": both, "peak FLOP/s": max(peaks), "share": share}


def titles(args, rows, folder, dtype):
    """rewrite on as many web titles: a thing, up to three adjectives, up to three phrases that shops and stock photos add"""
    rng = random.Random(0)
    adjectives = "vintage handmade blue wooden modern antique large soft rustic premium outdoor leather ceramic floral organic".split()
    things = ["coffee table", "wedding dress", "running shoes", "garden chair", "bedroom with white walls", "mountain lake at sunset",
              "chocolate cake recipe", "golden retriever puppy", "wrist watch", "red sports car", "city skyline", "birthday card"]
    phrases = ["for sale in Denver, CO", "with free shipping", "stock photo", "ideas for small spaces", "by John Miller",
               "- royalty free vector illustration", "2019 model, 2 owners", "how to make it in 5 easy steps", "| Etsy",
               "and accessories for women, men & kids", "from the 1960s, signed by the artist", "wallpaper HD 1920x1080"]
    words = (rng.sample(adjectives, rng.choice([0, 1, 1, 2, 3])) + [rng.choice(things)] + rng.sample(phrases, rng.choice([0, 1, 1, 2, 3]))
             for _ in rows)
    return rewrite(args, [{"alt": " ".join(text).capitalize()} for text in words], folder, dtype)


def describe(side, size, results, tokenizer):
    """A side's median rate and its answers' mean length over all rounds"""
    runs = [result[side][1] for result in results]
    answers = [answer for result in results for answer in result[side][0]]
    lengths = [len(tokenizer(" " + answer, add_special_tokens=False).input_ids) + 1 for answer in answers if answer]
    tokens, answered = mean(lengths or [0]), len(lengths) / len(answers)
    print(f"{side:16}  batch {size:3}  {median(runs):7.2f} texts/s, {answered:.1%} answered, in {tokens:.2f} tokens")
    return {"batch size": size, "texts/s": median(runs), "runs": runs, "tokens": tokens, "answered": answered}


def peak(dtype, n=2048):
    """FLOP/s of the best of ten products of n x n matrices"""
    a = torch.randn(n, n).to(DTYPES[dtype])
    return 2 * n ** 3 / min(timeit.repeat(lambda: torch.mm(a, a), number=1, repeat=10))


def batched(script, size, field, folder, args, *flags):
    """--batch-size `size` against 1: rows/s, and in how many rows both wrote the same"""
    sides = {n: lambda _, n=n: run_stage(script, folder, args, *flags, "--batch-size", n) for n in (size, 1)}
    results = take_turns(sides, args.pairs)
    runs = {n: [result[n][1] for result in results] for n in sides}
    texts, singles = ([row[field] for row in read_rows(results[0][n][0])] for n in runs)
    ratio, same = compare(*runs.values()), mean(a == b for a, b in zip(texts, singles))
    print(f"{script}: {RATIO.format(*ratio)}, {' against '.join(f'{median(runs[n]):.2f} rows/s' for n in runs)}; "
          f"the same text in {same:.1%} of {len(texts)} rows")
    return {"rows/s": runs, "ratio": ratio, "same": same}


def fuse(args, rows, folder, dtype):
    rows = [{"alt": row["alt"], "vec": row["alt"]} for row in rows[::2]]
    return batched("fuse_vicuna.py", 32, "vecap", folder, args, "--input", write_rows(folder / "rows.jsonl", rows),
                   "--model", args.model, "--format", "pairs", "--dtype", dtype)


def random_llava(llm, folder):
    """A LlavaForConditionalGeneration with its processor, small and untrained; the tokenizer is the language model's."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                           image_size=56, patch_size=14, projection_dim=32)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=4, bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-2, image_seq_length=16,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"))).save_pretrained(folder)
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
                      "{{ '<image>\\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
                      "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}").save_pretrained(folder)


def caption(args, rows, folder):
    random_llava(args.model, folder / "random-llava")
    for i in range(len(rows)):
        Image.effect_noise((640, 480), 20 + i % 60).convert("RGB").save(folder / f"{i}.jpg")
    file = write_rows(folder / "rows.jsonl", [{"image": f"{i}.jpg"} for i in range(len(rows))])
    return batched("caption_llava.py", 16, "vec", folder, args, "--input", file, "--image-root", folder, "--model",
                   folder / "random-llava", "--workers", args.threads, "--dtype", "fp32")


def memory(args, rows, folder, dtype):
    tokenizer, found = AutoTokenizer.from_pretrained(args.model), {}
    tokenizer.save_pretrained(folder / "tiny")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2)).save_pretrained(folder / "tiny")
    for n in args.memory_rows:
        file = write_rows(folder / f"{n}.jsonl", ({"image": f"{i:07}.jpg", "alt": ""} for i in range(n)))
        found[n] = run_stage(OURS, folder, args, "--input", file, "--model", folder / "tiny", "--dtype", dtype)[1:]
        print("{:9,} rows: {:,.0f} rows/s, peak {:.1f} MiB".format(n, *found[n]), flush=True)
    peaks = sorted(mib for _, mib in found.values())
    more = peaks[-1] - peaks[0]  # 34 bytes kept of each of a million rows would be 32 MiB
    print(f"memory-{dtype}: the peaks differ by {more:.1f} MiB, {'' if more <= 10 else 'NOT '}within 10")
    return {"rows: (rows/s, peak MiB)": found}


CASES = {f"{case.__name__}-{dtype}": partial(case, dtype=dtype) for dtype in DTYPES
         for case in (rewrite, titles, fuse, memory)} | {"caption": caption}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"captioning.py: error: {message}\n")  # one line
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=[*CASES], metavar="CASE", help=f"of {' '.join(CASES)} (all)")
    add("--model", default="out/demo/smollm2", help="LLaMA-like folder (default: %(default)s, made by data/demo.sh)")
    add("--input", default="out/demo/names.jsonl", help="JSONL with captions in alt (default: %(default)s)")
    add("--rows", type=int, default=256, help="captions, taken evenly from the file (default: %(default)s)")
    add("--pairs", type=int, default=3, help="rounds a case (default: %(default)s)")
    add("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 256], help="for rewrite to try (%(default)s)")
    add("--temperature", type=float, default=0.9, help="of all sides of rewrite, 0 is greedy (default: %(default)s)")
    add("--memory-rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="default: %(default)s")
    add("--threads", type=int, default=os.cpu_count(), help="default: all, %(default)s")
    add("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    if min(args.rows, args.pairs, args.threads, *args.batch_sizes, *args.memory_rows) < 1 or args.temperature < 0:
        parser.error("expected numbers of 1 or more, and --temperature of 0 or more")
    for path in (Path(args.model, "config.json"), Path(args.input)):
        if not path.exists():
            parser.error(f"no {path}: bash data/demo.sh makes the defaults, the model in its step llm")
    rows = [row for row in read_rows(args.input) if isinstance(row.get("alt"), str) and row["alt"].strip()]
    rows = rows[::max(1, len(rows) // args.rows)][:args.rows]
    rows or parser.error(f"--input {args.input}: no row has a text in alt")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run that is going on ends too
    torch.set_num_threads(args.threads)
    about, results = {name: version(name) for name in ("torch", "transformers")} | vars(args), {}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    for case in args.cases:
        print(f"=== {case}", flush=True)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            results[case] = CASES[case](args, rows, Path(folder))
        if args.json:
            Path(args.json).write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
