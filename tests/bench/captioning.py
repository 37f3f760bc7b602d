"""rewrite_llama.py's decoding loop against the loops that people have: texts a second on this machine's CPU, fp32.

    bash data/demo.sh                                      # once: makes the model, SmolLM2-135M
    python tests/bench/captioning.py                       # captions and web titles, two rounds: an hour on two cores
    python tests/bench/captioning.py --texts 8 --slots 8   # does it all run? The ratios mean nothing

    slots      rewrite_llama.py's Completer with 64 slots; one prompt serves all texts, as in a unit
    LaCLIP     the released loop: batches of 64 whole prompts, always 77 new tokens, cut at the newline afterwards
    newline    the same, but `generate` ends a text at any token with a newline in it

All sides have the same model, texts, sampling (temperature 0.9, top-p 0.95), limit of 77 tokens and threads. The loops' prompts
have pairs of their own, as in the release. The clock covers tokenising, generating and decoding, not loading. Sides take turns,
every other round backwards, and every round has other random numbers. An answer's length counts its end.
"""
import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # for all sides
import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import rewrite_llama  # noqa: E402
from inputs import captions, titles  # noqa: E402

LACLIP, NEWLINE, SLOTS = "LaCLIP", "newline", "slots"
AIMS = {LACLIP: 4, NEWLINE: 2.5}  # the smallest median ratio to be content with
EXAMPLES = [json.loads(line) for line in open(ROOT / "data/prompts/meta_pairs.jsonl", encoding="utf-8")]


def draw_prompt(source, rng):
    return rewrite_llama.draw_prompt([entry for entry in EXAMPLES if entry["source"] == source], 3, rng)


def by_slots(completer, texts, seed):
    """-> answers"""
    rng = np.random.default_rng(seed)
    prompt = draw_prompt(rewrite_llama.SOURCES[seed % 4], rng)
    return [text for text, _ in completer.complete(prompt, texts, rng.random((len(texts), 77), "f4"))]


def by_generate(completer, texts, seed, stop):
    """transformers' generate over whole prompts in batches, ended by `stop` or not at all -> answers"""
    model, tokenizer, args = completer.model, completer.tokenizer, completer.args
    rng, answers = np.random.default_rng(seed), []
    prompts = [f"{draw_prompt(rewrite_llama.SOURCES[seed % 4], rng)}{text} =>" for text in texts]
    how = dict(do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=0, max_new_tokens=args.max_new_tokens,
               pad_token_id=tokenizer.pad_token_id)
    how["eos_token_id"] = [*completer.stops] if stop else model.config.vocab_size  # an id that no token has
    torch.manual_seed(seed)
    for at in range(0, len(prompts), args.batch_size):
        inputs = tokenizer(prompts[at:at + args.batch_size], padding=True, return_tensors="pt")
        ids = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1]:].tolist()
        for row in ids:
            end = next((i + 1 for i, token in enumerate(row) if token in completer.stops), len(row))
            answers.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return answers


def compare(name, texts, completer, rounds):
    """Print and return each side's texts a second, and the rounds' ratios."""
    sides = {LACLIP: lambda n: by_generate(completer, texts, n, False), SLOTS: lambda n: by_slots(completer, texts, n),
             NEWLINE: lambda n: by_generate(completer, texts, n, True)}
    rates, answers = {side: [] for side in sides}, {side: [] for side in sides}
    for n in range(rounds):
        for side in list(sides)[::-1 if n % 2 else 1]:
            start = time.perf_counter()
            answers[side] += sides[side](n)
            rates[side].append(len(texts) / (time.perf_counter() - start))
            print(f"  round {n + 1} of {rounds}, {side}: {rates[side][-1]:.2f} texts/s", flush=True)
    lengths = {side: mean(len(completer.tokenizer(text).input_ids) for text in answers[side]) for side in sides}
    for side, aim in AIMS.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[SLOTS], rates[side])]
        print(f"{name}: {median(rates[SLOTS]):.2f} texts/s, {median(ratios):.2f} x {side} ({min(ratios):.2f} to {max(ratios):.2f}), "
              f"aim {aim}: {'' if median(ratios) >= aim else 'NOT '}reached; answers have {lengths[SLOTS]:.1f} and {lengths[side]:.1f} tokens")
    return {"texts/s": rates, "tokens": lengths}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/smollm2", help="LLaMA-like folder (default: %(default)s, made by data/demo.sh)")
    parser.add_argument("--texts", type=int, default=256, help="of each kind (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--slots", type=int, default=64, help="and the loops' batch size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    args = rewrite_llama.parse_arguments([
        "--input", __file__, "--output", os.devnull, "--model", options.model, "--dtype", "fp32", "--device", "cpu",
        "--batch-size", str(options.slots)])
    completer = rewrite_llama.Completer(args, Counter())
    completer.tokenizer.padding_side = "left"  # for the loops
    completer.tokenizer.pad_token = completer.tokenizer.pad_token or completer.tokenizer.eos_token
    about = {name: version(name) for name in ("torch", "transformers")} | vars(options)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rng = random.Random(0)
    with torch.inference_mode():
        by_slots(completer, captions(rng, 8), 0)  # warm
        results = {kind.__name__: compare(kind.__name__, kind(rng, options.texts), completer, options.rounds) for kind in (captions, titles)}
    if options.json:
        Path(options.json).write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
