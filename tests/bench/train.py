"""The trainer against what a user would pick instead, on this machine's CPU: whole samples/s, from file to AdamW step.

    python tests/bench/train.py                                        # all cases, about 80 minutes on two cores
    python tests/bench/train.py --cases b32-bf16 --pairs 1             # one of them, 3 minutes
    python tests/bench/train.py --model nano --batch-size 8 --pairs 1  # do all run? 4 minutes; the ratios mean nothing

    b32, b16    train_clip.py | open_clip's own trainer on its CSV data set | transformers' CLIPModel in a plain loop
    multitext   train_clip.py --loss multitext, five texts an image | open_clip's model in a plain loop, the same loss
    mixed       train_clip.py, 1 % of the captions fill 77 tokens | the same, none does. The peers pad all to 77 anyway,
                so this ratio is also ratio(mixed) / ratio(short): the share of the gain that is kept
    compile     train_clip.py with --compile | without
    gpu         train_clip.py | open_clip's own trainer, ViT-B/16, with --device cuda; not in the default
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
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # for all sides
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torchvision.datasets.folder import default_loader  # noqa: E402

from inputs import FIELDS, T, make_data, photograph, seen_lengths  # noqa: E402
from peers import open_clip_name, torchvision_transform  # noqa: E402

HERE = Path(__file__).resolve().parent
MODELS = {"gpu": "ViT-B/16", "b32": "ViT-B/32", "b16": "ViT-B/16", "multitext": "ViT-B/32", "mixed": "ViT-B/32", "compile": "ViT-B/32"}
CASES = [f"{kind}-{precision}" for kind in MODELS if kind != "gpu" for precision in ("fp32", "bf16")] + ["decode"]
AIMS = {("b32-fp32", "open_clip"): 1.6, ("b32-bf16", "open_clip"): 1.7, ("b16-fp32", "open_clip"): 1.1,
        ("b16-bf16", "open_clip"): 1.2, ("multitext-fp32", "open_clip, loop"): 2.2, ("multitext-bf16", "open_clip, loop"): 2.5,
        ("mixed-fp32", "ours, short"): 0.9, ("mixed-bf16", "ours, short"): 0.9,
        ("decode 640 x 480", "torchvision"): 1.1, ("decode 2000 x 1500", "torchvision"): 2.0}  # least median ratios


# === runs =============================================================================================================

def commands(kind, folder, model, precision, args):
    """{side: command}, ours first"""
    common = ["--batch-size", args.batch_size, "--workers", args.workers]
    ours = [HERE.parents[1] / "train_clip.py", "--image-root", folder / "images", "--model", model,
            "--tokenizer", folder / "tokenizer.json", "--precision", precision, "--epochs", 1, "--log-every", 1,
            "--device", args.device, "--out", "out", *common, "--captions"]
    loop = [folder, "--model", model, "--precision", precision, *common]
    open_clip = ["-m", "open_clip_train.main", "--dataset-type", "csv", "--train-data", folder / "short.tsv",
                 "--model", open_clip_name(model, folder), "--precision", "amp_bf16" if precision == "bf16" else "fp32",
                 "--aug-cfg", "scale=(0.5, 1.0)", "--epochs", 1, "--log-every-n-steps", 1, "--device", args.device,
                 "--logs", "none", *common]
    short, mixed = [*ours, folder / "short.jsonl"], [*ours, folder / "mixed.jsonl"]
    if kind == "multitext":
        return {"ours": [*short, "--loss", "multitext", "--text", *FIELDS],
                "open_clip, loop": [HERE / "peers.py", "open_clip-multitext", *loop]}
    if kind == "mixed":
        return {"ours, mixed": mixed, "ours, short": short}
    if kind == "compile":
        return {"ours, --compile": [*short, "--compile"], "ours": short}
    if kind == "gpu":
        return {"ours": short, "open_clip": open_clip}
    return {"ours": short, "open_clip": open_clip, "transformers": [HERE / "peers.py", "transformers", *loop]}


def run(command, folder, args):
    """-> seconds of the measured steps together; of these, for ours, those in which it waited for data"""
    with tempfile.TemporaryDirectory(dir=folder) as there:
        log, metrics = Path(there, "log"), Path(there, "out", "metrics.jsonl")
        steps = metrics if "--captions" in command else log  # where a step leaves a line
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TMPDIR": str(folder)}
        with open(log, "w") as f:
            process = subprocess.Popen([sys.executable, *map(str, command)], stdout=f, stderr=f, cwd=there,
                                       env=environment, start_new_session=True)
        stamps, heard = [], time.perf_counter()
        try:
            while len(stamps) < args.warmup + args.steps:
                time.sleep(0.02)
                ended, now = process.poll() is not None, time.perf_counter()
                text = steps.read_text() if steps.exists() else ""
                new = text.count('{"step"') + text.count("Batch (t)") - len(stamps)
                stamps, heard = stamps + [now] * new, now if new else heard
                if not new and (ended or now - heard > 1800):
                    raise RuntimeError(f"a run ended early or hangs: {process.args}\n{log.read_text()[-8000:]}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
        measured = slice(args.warmup, args.warmup + args.steps)
        waits = [json.loads(line)["data_wait_s"] for line in text.splitlines()[measured]] if steps == metrics else []
    return stamps[measured][-1] - stamps[args.warmup - 1], sum(waits)


def compare(case, folder, args, peaks):
    """-> a row of the table for each peer"""
    kind, precision = case.split("-")
    model = args.model or MODELS[kind]
    sides = commands(kind, folder, model, precision, args)
    ours, *peers = sides
    rounds, order, best = [], [peers[0], ours, *peers[1:]], []
    for number in range(args.pairs):
        before = peak(precision, args.device)
        rounds.append({side: run(sides[side], folder, args) for side in order[::-1 if number % 2 else 1]})
        best.append((before + peak(precision, args.device)) / 2)
        print(f"{case}, round {number + 1} of {args.pairs}, seconds a step: " + ", ".join(
            f"{side} {seconds / args.steps:.3f}" for side, (seconds, _) in rounds[-1].items()), file=sys.stderr)

    size = (args.batch_size, args.warmup, args.steps)
    fields, samples = FIELDS if kind == "multitext" else FIELDS[:1], args.batch_size * args.steps
    short = seen_lengths(folder, "short", fields, *size)
    seen = seen_lengths(folder, "mixed", fields, *size) if kind == "mixed" else short
    flops = forward_flops(model, samples, seen)
    seconds = statistics.median(results[ours][0] for results in rounds)
    peaks[case] = statistics.median(best)
    used = statistics.median(3 * flops / results[ours][0] / 1e9 / there for results, there in zip(rounds, best))
    waits = statistics.median(results[ours][1] / results[ours][0] for results in rounds)
    for peer in peers:
        theirs = forward_flops(model, samples, short if peer.startswith("ours") else [77] * len(short))
        speeds = ([samples / results[side][0] for results in rounds] for side in (ours, peer))
        yield table_row(case, ours, peer, *speeds) | {
            "FLOPs": theirs / flops, "waits %": 100 * waits, "GFLOP/s": 3 * flops / seconds / 1e9, "MFU %": 100 * used}


def table_row(case, side, peer, speeds, peer_speeds):
    ratios = [a / b for a, b in zip(speeds, peer_speeds)]
    return {"case": case, "side": side, "per s": statistics.median(speeds), "against": peer,
            "its per s": statistics.median(peer_speeds), "ratio": statistics.median(ratios), "smallest": min(ratios),
            "largest": max(ratios), "aim": AIMS.get((case, peer)), "FLOPs": None, "waits %": None, "GFLOP/s": None,
            "MFU %": None, "runs per s": speeds, "its runs per s": peer_speeds}


# === what the machine could do ========================================================================================

def forward_flops(model, images, lengths):
    """Matrix products of a forward pass, two operations a multiply-add. In a layer of width W a token meets 12 W^2
    weights (queries, keys and values 3, output 1, MLP 8) and, as one of L, 2 L W for scores and weighted values."""
    def tower(width, layers, lengths):
        return sum(2 * layers * L * (12 * width ** 2 + 2 * L * width) for L in lengths)
    c = T.Config(**T.PRESETS[model])
    patches = 2 * 3 * c.image_size ** 2 * c.vision_width
    image = patches + tower(c.vision_width, c.vision_layers, [(c.image_size // c.patch_size) ** 2 + 1])
    projections = 2 * c.embed_dim * (images * c.vision_width + len(lengths) * c.text_width)
    return images * image + tower(c.text_width, c.text_layers, lengths) + projections


def peak(precision, device, n=2048):
    """GFLOP/s of the best of ten products of n x n matrices"""
    a, seconds = torch.randn(n, n, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision], device=device), []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(seconds) / 1e9


# === decoding =========================================================================================================

def decode(folder, pairs, images=24):
    """Images/s of one thread: from file over crop to normalised batch"""
    rng, transform, threads = np.random.default_rng(0), torchvision_transform(224), torch.get_num_threads()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (T.Config.mean, T.Config.std))

    def ours(names):
        views = [T.augment_crop(T.open_image(str(folder), name), 224) for name in names]
        views = torch.stack([T.v2.functional.pil_to_tensor(view) for view in views])
        return (views.float() / 255 - mean) / std

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
        kept = (speed[1:] for speed in speeds.values())  # the first pair warms up
        yield table_row(f"decode {width} x {height}", "ours", "torchvision", *kept)
    torch.set_num_threads(threads)


# === the whole ========================================================================================================

def print_table(rows):
    """Dicts as aligned columns; lists are for --json only."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    cells = [names] + [["-" if row[name] is None else f"{row[name]:.2f}" if isinstance(row[name], float) else
                        str(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", choices=[*CASES, "gpu-fp32", "gpu-bf16"], default=CASES, metavar="CASE", help=f"of {' '.join(CASES)} (default: all)")
    add("--pairs", type=int, default=3, help="rounds of runs a case (default: %(default)s)")
    add("--steps", type=int, default=4, help="measured steps a run (default: %(default)s)")
    add("--warmup", type=int, default=2, help="steps before them (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--model", choices=T.PRESETS, help="in all cases, to try the script (default: as the case is named)")
    add("--workers", type=int, default=2, help="processes that read data, one thread each (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="of the process that trains (default: all, %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of cases gpu-fp32 and gpu-bf16 (default: %(default)s)")
    add("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    if min(args.pairs, args.steps, args.warmup, args.batch_size) < 1:
        parser.error("--pairs, --steps, --warmup and --batch-size are 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run that is going on ends too
    torch.set_num_threads(args.threads)
    about = {name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "transformers", "pillow")}
    about |= {name: getattr(args, name) for name in ("batch_size", "warmup", "steps", "pairs", "threads", "workers")}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rows, peaks, failed = [], {}, []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        folder = Path(folder)
        if args.cases != ["decode"]:
            make_data(folder, args.batch_size, args.warmup, args.steps)
        for case in args.cases:
            try:
                rows += decode(folder, args.pairs) if case == "decode" else compare(case, folder, args, peaks)
            except RuntimeError as e:
                failed.append(case)
                print(e, file=sys.stderr)
            if args.json:
                results = {**about, "peak GFLOP/s": peaks, "rows": rows, "failed": failed}
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    if rows:
        print_table(rows)
    print("per s: samples or images, median; ratio: median, smallest and largest of the rounds\n"
          "FLOPs: the other side's matrix products over this one's, what cutting texts alone gives; waits: for data\n"
          "GFLOP/s: 3 x the forward pass's matrix products / time; MFU: that over the best of ten products of 2048 x 2048\n"
          "matrices right before and after the round: " + ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in peaks.items()))
    if failed:
        sys.exit(f"failed: {' '.join(failed)}")


if __name__ == "__main__":
    main()
