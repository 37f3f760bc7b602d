"""The trainer against what a user would pick instead, on this machine's CPU: whole samples/s, from file to AdamW step.

    python tests/bench/train.py                                        # all cases, about 80 minutes on two cores
    python tests/bench/train.py --cases b32-bf16 --pairs 1             # one of them, 3 minutes
    python tests/bench/train.py --model nano --batch-size 8 --pairs 1  # do all run? 5 minutes; the ratios mean nothing

    b32, b16    train_clip.py | open_clip's own trainer on its CSV data set | transformers' CLIPModel in a plain loop
    multitext   train_clip.py --loss multitext, five texts an image | open_clip's model in a plain loop, the same loss
    mixed       train_clip.py, 1 % of the captions fill 77 tokens | the same, none does. The peers pad all to 77 anyway,
                so this ratio is also ratio(mixed) / ratio(short): the share of the gain that is kept
    compile     train_clip.py with --compile | without
    decode      one thread: our reading and cropping of JPEGs | torchvision's

Every run is a process of its own that decodes, augments, tokenises and trains (the plain loops are in peers.py). A step
lasts from the line that the step before it prints to its own, by this script's clock for every side. A run is stopped
after its last measured step, while its workers still read ahead. Sides take turns: of three, ours is in the middle, and
every other round goes backwards.

The same for all sides: pictures, captions, vocabulary, architecture (GELU), batch, workers, threads, precision (bf16 is
autocast), AdamW, RandomResizedCrop (scale 0.5-1, bicubic; open_clip's by --aug-cfg). Different, as it is what is
compared: ours cuts texts to their length, may decode a JPEG at a smaller scale and fuses AdamW; the peers pad to 77
tokens and have torch's default AdamW.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # for all sides
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.datasets.folder import default_loader  # noqa: E402

from peers import FIELDS, T, open_clip_name, torchvision_transform  # noqa: E402

HERE = Path(__file__).resolve().parent
MODELS = {"b32": "ViT-B/32", "b16": "ViT-B/16", "multitext": "ViT-B/32", "mixed": "ViT-B/32", "compile": "ViT-B/32"}
CASES = [f"{kind}-{precision}" for kind in MODELS for precision in ("fp32", "bf16")] + ["decode"]
AIMS = {"mixed-fp32": 0.9, "mixed-bf16": 0.9}  # the smallest median ratio to be content with
AHEAD = 6  # batches of data behind the last measured one


# === data =============================================================================================================

def photograph(rng, width, height):
    """To a decoder like a photograph: smooth colours, a finer texture, a sensor's noise."""
    pixels = 128 + rng.normal(0, 9, (height, width, 1))
    for cells, strength in ((5, 60), (width // 16, 12)):
        field = (128 + rng.normal(0, strength, (cells, cells, 3))).clip(0, 255).astype(np.uint8)
        pixels = pixels + np.asarray(Image.fromarray(field).resize((width, height), Image.BICUBIC), np.float32) - 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def openai_tokenizer():
    """OpenAI CLIP's tokenizer.json, from the vocabulary and merges inside the open_clip package."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer
    theirs = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): i for token, i in theirs.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(theirs.bpe_ranks)).backend_tokenizer.to_str()


def caption(rng, tokenizer, names):
    """Of 8 to 16 tokens, start and end included, each length as likely as the others."""
    length, forms = rng.integers(8, 17), ["a {} and a {}", "{}, {} and {}", "an old {} next to a {}", "the {} of a {} in a {}"]
    while len(tokenizer.encode(text := rng.choice(forms).format(*rng.choice(names, 3)))) != length:
        pass
    return text


def make_data(folder, args):
    """images/, tokenizer.json, short.jsonl and mixed.jsonl for one pass of a run, short.tsv for open_clip."""
    from open_clip import IMAGENET_CLASSNAMES, tokenize
    rng, B = np.random.default_rng(0), args.batch_size
    n, measured = B * (args.warmup + args.steps + AHEAD), B * args.steps
    (folder / "tokenizer.json").write_text(openai_tokenizer())
    tokenizer = T.Tokenizer.load(str(folder / "tokenizer.json"))
    (folder / "images").mkdir()
    rows = []
    for i in range(n):
        photograph(rng, 640, 480).save(folder / "images" / f"{i}.jpg", quality=88)
        rows.append({"image": f"{i}.jpg"} | {field: caption(rng, tokenizer, IMAGENET_CLASSNAMES) for field in FIELDS})
    every = measured // -(-measured // 100)  # at least 1 % of the measured texts, at even distances in a run's order
    long = {T.shuffled(p, n, 0) for p in range((args.warmup * B + every // 2) % every, n, every)}
    mixed = [{**row, "alt": " and ".join([row["alt"]] * 20)} if i in long else row for i, row in enumerate(rows)]
    for name, some in (("short", rows), ("mixed", mixed)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    lines = [f"{folder / 'images' / row['image']}\t{row['alt']}\n" for row in rows]
    (folder / "short.tsv").write_text("filepath\ttitle\n" + "".join(lines))

    texts = [row[field] for row in rows + mixed for field in FIELDS]
    ids = [tokenizer.encode(text) for text in texts]
    assert [ours + [0] * (77 - len(ours)) for ours in ids] == tokenize(texts).tolist()
    size = statistics.mean(path.stat().st_size for path in (folder / "images").iterdir())
    filled = seen_lengths(folder, "mixed", ["alt"], args).count(77)
    print(f"{n} JPEGs of 640 x 480, {size / 1000:.0f} kB on average\nour tokenizer gives open_clip's ids on all {len(ids)} "
          f"texts\nshort captions, {{tokens: texts}}: {dict(sorted(Counter(map(len, ids[:n * len(FIELDS)])).items()))}\n"
          f"mixed captions: {filled} of the {measured} measured ones fill 77 tokens, {100 * filled / measured:.1f} %\n")


def seen_lengths(folder, name, fields, args):
    """Tokens of each text in our trainer's measured steps."""
    rows = list(T.read_rows(str(folder / f"{name}.jsonl")))
    tokenizer = T.Tokenizer.load(str(folder / "tokenizer.json"))
    seen = range(args.warmup * args.batch_size, (args.warmup + args.steps) * args.batch_size)
    return [len(tokenizer.encode(rows[T.shuffled(p, len(rows), 0)][field])) for p in seen for field in fields]


# === runs =============================================================================================================

def commands(kind, folder, model, precision, args):
    """{side: command}, ours first"""
    common = ["--batch-size", args.batch_size, "--workers", args.workers]
    ours = [HERE.parents[1] / "train_clip.py", "--image-root", folder / "images", "--tokenizer", folder / "tokenizer.json",
            "--model", model, "--precision", precision, "--epochs", 1, "--log-every", 1, "--device", "cpu", "--out", "out",
            *common, "--captions"]
    loop = [folder, "--model", model, "--precision", precision, *common]
    open_clip = ["-m", "open_clip_train.main", "--dataset-type", "csv", "--train-data", folder / "short.tsv", "--epochs", 1,
                 "--model", open_clip_name(model, folder), "--precision", {"bf16": "amp_bf16"}.get(precision, precision),
                 "--aug-cfg", "scale=(0.5, 1.0)", "--log-every-n-steps", 1, "--logs", "none", "--device", "cpu", *common]
    short, mixed = [*ours, folder / "short.jsonl"], [*ours, folder / "mixed.jsonl"]
    if kind == "multitext":
        return {"ours": [*short, "--loss", "multitext", "--text", *FIELDS],
                "open_clip, loop": [HERE / "peers.py", "open_clip-multitext", *loop]}
    if kind == "mixed":
        return {"ours, mixed": mixed, "ours, short": short}
    if kind == "compile":
        return {"ours, --compile": [*short, "--compile"], "ours": short}
    return {"ours": short, "open_clip": open_clip, "transformers": [HERE / "peers.py", "transformers", *loop]}


def run(command, folder, args):
    """-> seconds of the measured steps together; for ours also those in which it waited for data"""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        lines = metrics = Path(out, "out", "metrics.jsonl")
        log = Path(out, "log")
        if "--captions" not in command:
            lines = log
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TMPDIR": str(folder)}
        with open(log, "w") as f:
            process = subprocess.Popen([sys.executable, *map(str, command)], stdout=f, stderr=f, cwd=out, env=env,
                                       start_new_session=True)
        stamps, heard = [], time.perf_counter()
        try:
            while len(stamps) < args.warmup + args.steps:
                time.sleep(0.01)
                ended, text = process.poll() is not None, lines.read_text() if lines.exists() else ""
                new, now = text.count('{"step"') + text.count("Batch (t)") - len(stamps), time.perf_counter()
                stamps, heard = stamps + [now] * new, now if new else heard
                if not new and (ended or now - heard > 1800):
                    raise SystemExit(f"a run ended early or hangs: {process.args}\n{log.read_text()[-3000:]}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
        measured = slice(args.warmup, args.warmup + args.steps)
        waited = [json.loads(line)["data_wait_s"] for line in metrics.read_text().splitlines()[measured]] \
            if lines is metrics else [0]
    return stamps[measured][-1] - stamps[args.warmup - 1], sum(waited)


def forward_flops(c, images, lengths):
    """Matrix products of a forward pass, two operations a multiply-add. Of a layer of width W a token needs the 12 W^2
    weights (queries, keys and values 3, their output 1, MLP 8) and, as one of L, 2 L W for scores and weighted values."""
    def tower(width, layers, lengths):
        return sum(2 * layers * L * (12 * width ** 2 + 2 * L * width) for L in lengths)
    patches, pixels = (c.image_size // c.patch_size) ** 2, 3 * c.image_size ** 2
    image = 2 * pixels * c.vision_width + tower(c.vision_width, c.vision_layers, [patches + 1])
    projections = 2 * c.embed_dim * (images * c.vision_width + len(lengths) * c.text_width)
    return images * image + tower(c.text_width, c.text_layers, lengths) + projections


def peak(precision, n=2048):
    """FLOP/s of the best of ten products of two n x n matrices"""
    a, seconds = torch.randn(n, n, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision]), []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(seconds)


def compare(case, folder, args, peaks):
    """-> a row of the table for each peer"""
    kind, precision = case.split("-")
    model = args.model or MODELS[kind]
    sides = commands(kind, folder, model, precision, args)
    ours, *peers = sides
    rounds, order = [], [peers[0], ours, *peers[1:]]
    for number in range(args.pairs):
        peaks[precision] = max(peaks.get(precision, 0), peak(precision))
        rounds.append({side: run(sides[side], folder, args) for side in order[::-1 if number % 2 else 1]})
        print(f"{case}, round {number + 1} of {args.pairs}: seconds a step: " + ", ".join(
            f"{side} {seconds / args.steps:.3f}" for side, (seconds, _) in rounds[-1].items()), file=sys.stderr)
    peaks[precision] = max(peaks[precision], peak(precision))
    fields, images = FIELDS if kind == "multitext" else FIELDS[:1], args.batch_size * args.steps
    lengths, short = (seen_lengths(folder, name, fields, args) for name in ("mixed" if kind == "mixed" else "short", "short"))
    flops = forward_flops(c := T.Config(**T.PRESETS[model]), images, lengths)
    seconds = statistics.median(results[ours][0] for results in rounds)
    for peer in peers:
        theirs = forward_flops(c, images, short if peer.startswith("ours") else [77] * len(lengths))
        yield row(case, ours, peer, *([images / results[side][0] for results in rounds] for side in (ours, peer))) | {
            "FLOPs": theirs / flops, "waits %": 100 * statistics.median(results[ours][1] / results[ours][0] for results in rounds),
            "MFU %": 100 * 3 * flops / seconds / peaks[precision]}


def row(case, ours, peer, our_speeds, peer_speeds):
    """Of the table; lists are for --json only"""
    ratios = [a / b for a, b in zip(our_speeds, peer_speeds)]
    return {"case": case, "side": ours, "per s": statistics.median(our_speeds), "against": peer,
            "its per s": statistics.median(peer_speeds), "ratio": statistics.median(ratios), "smallest": min(ratios),
            "largest": max(ratios), "aim": AIMS.get(case), "FLOPs": None, "waits %": None, "MFU %": None,
            "all per s": our_speeds, "its all per s": peer_speeds}


def decode(folder, pairs, images=24):
    """Images/s of one thread: file -> crop -> normalised batch"""
    rng, transform, threads = np.random.default_rng(0), torchvision_transform(224), torch.get_num_threads()

    def ours(names):
        views = [T.augment_crop(T.open_image(str(folder), name), 224, rng) for name in names]
        return T.normalise(torch.stack([T.to_uint8(view) for view in views]), T.Config.mean, T.Config.std)

    def torchvision(names):
        return torch.stack([transform(default_loader(folder / name)) for name in names])

    torch.set_num_threads(1)
    for width, height in ((640, 480), (2000, 1500)):
        names, speeds = [f"{width}-{i}.jpg" for i in range(images)], {ours: [], torchvision: []}
        for name in names:
            photograph(rng, width, height).save(folder / name, quality=88)
        for number in range(max(5, pairs) + 1):
            for side in (ours, torchvision)[::-1 if number % 2 else 1]:
                start = time.perf_counter()
                side(names)
                speeds[side].append(images / (time.perf_counter() - start))
        yield row(f"decode {width} x {height}", "ours", "torchvision", *(speed[1:] for speed in speeds.values()))  # [0] warms up
    torch.set_num_threads(threads)


def table(rows):
    """Prints dicts as aligned columns; lists are left out."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    cells = [names] + [["-" if row[name] is None else f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name])
                        for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=f"default: all of {' '.join(CASES)}")
    add("--pairs", type=int, default=3, help="rounds of runs a case (default: %(default)s)")
    add("--steps", type=int, default=4, help="measured steps a run (default: %(default)s)")
    add("--warmup", type=int, default=2, help="steps before them (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--model", choices=T.PRESETS, help="in all cases, to try the script")
    add("--workers", type=int, default=2, help="processes a run that read data, one thread each (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="of the process that trains (default: all cores, %(default)s)")
    add("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    if min(args.pairs, args.steps, args.warmup, args.batch_size) < 1:
        parser.error("--pairs, --steps, --warmup and --batch-size are 1 or more")
    torch.set_num_threads(args.threads)
    versions = {name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "transformers", "pillow")}
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    print(", ".join(f"{name} {getattr(args, name)}" for name in ("batch_size", "warmup", "steps", "pairs", "threads", "workers")))
    rows, peaks = [], {}
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        folder = Path(folder)
        if args.cases != ["decode"]:
            make_data(folder, args)
        for case in args.cases:
            rows += decode(folder, args.pairs) if case == "decode" else compare(case, folder, args, peaks)
            table(rows)
            if args.json:
                Path(args.json).write_text(json.dumps({"settings": vars(args), "versions": versions, "peak FLOP/s": peaks,
                                                       "rows": rows}, indent=1) + "\n")
    print("\nsamples/s: medians of all rounds; ratio: median, smallest and largest of the rounds'. FLOPs: the other side's matrix\n"
          "products over ours. waits: of our time, for data. MFU: 3 forward passes / time / the best 2048^3 product, " +
          ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in peaks.items()))


if __name__ == "__main__":
    main()
