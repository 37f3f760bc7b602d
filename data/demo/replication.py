"""The results of data/replicate.sh: one line of data/replication.jsonl a run, and the table and page that are made of them.

    python -m data.demo.replication                       # the table, in Markdown, and out/replicate/report.html
    python -m data.demo.replication readme                # README's part of it
    python -m data.demo.replication finished RUN          # replicate.sh asks: a run that was told to stop leaves with status 0
    python -m data.demo.replication add ROW RUN --llm M   # after its evaluation

All rows take the same steps of the same batch (but those that say 2 x). Zero-shot accuracy in %, images of three teams that nothing
was trained on; a class's prompt is its name. The metrics were named before any run: *never named*, classes whose name no
training set has, and *aliases*, classes that are asked for by another human name, both at 1, 5 and 10; beside them, all classes.
Mean over seeds and its standard error; a difference is paired, seed by seed.
"""
import argparse
import html
import json
import math
import os
import platform
import statistics
import sys

RESULTS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "replication.jsonl")
SETS = {"heldout_never": "never named", "heldout_alias": "aliases", "heldout": "all classes"}
COLUMNS = [("heldout_never", "top1"), ("heldout_never", "top5"), ("heldout_never", "top10"),
           ("heldout_alias", "top1"), ("heldout_alias", "top5"), ("heldout_alias", "top10"), ("heldout", "top1"), ("heldout", "top10")]
# A group's first row is what the others are compared with. row -> (name, what the paper found; ImageNet zero-shot top-1 where it says so)
GROUPS = {
    "LaCLIP: AltText = the name": {
        "clip": ("CLIP", "40.2 (CC12M)"), "laclip": ("LaCLIP", "48.4"), "laclip-mt": ("LaCLIP-MT", "49.0"),
        "laclip-unfiltered": ("LaCLIP, rewrites unfiltered", "as the paper"), "laclip-1": ("one rewrite", "more rewrites, more accuracy"),
        "laclip-scene": ("the other source alone", ""), "laclip-shots-0": ("no pair in the prompt", ""), "laclip-shots-1": ("one pair", ""),
        "laclip-shots-3": ("three pairs (the others: eight)", "3"), "laclip-small-llm": ("rewrites by SmolLM2-135M", ""), "oracle": ("oracle: human aliases as rewrites", ""),
        "oracle-alone": ("oracle alone", ""), "eda": ("EDA", "little gain"), "slip": ("SLIP", ""), "laslip": ("LaSLIP", "gains as LaCLIP does"),
        "clip-2x": ("CLIP, 2 x steps", ""), "laclip-2x": ("LaCLIP, 2 x steps", "")},
    "LaCLIP: a larger model": {"clip-wide": ("CLIP, ViT-S/16", ""), "laclip-wide": ("LaCLIP, ViT-S/16", "gains at every size")},
    "VeCLIP: half of the AltTexts useless": {
        "clip-noisy": ("CLIP, AltText", "31.60 (12 M)"), "vec-only": ("VeC alone", "below the mix"), "vecap-only": ("VeCap alone", "below the mix"),
        "veclip": ("VeCLIP, AltText and VeCap", "38.11"), "veclip-vec": ("AltText and VeC, not fused", ""),
        "veclip-25-75": ("25 % AltText, 75 % VeCap", ""), "veclip-75-25": ("75 % AltText, 25 % VeCap", ""),
        "veclip-cut": ("VeCLIP, texts cut to 6 tokens", ""), "laclip-noisy": ("LaCLIP", ""), "veclip-join": ("and a clean set joined", "VeCap + DFN gains")},
    "VeCLIP: three AltTexts an image": {"alt-random": ("one at random", "best"), "alt-first": ("the first", ""),
                                        "alt-best": ("the one of the highest CLIP score", "below random")},
    "VeCLIP: a quarter of them": {"clip-quarter": ("CLIP, AltText", ""), "veclip-quarter": ("VeCLIP", "")},
    "half of the images": {"clip-half": ("CLIP", ""), "laclip-half": ("LaCLIP", "gains at every size")},
    "an eighth of the images": {"clip-eighth": ("CLIP", ""), "laclip-eighth": ("LaCLIP", "gains at every size")},
}
CANNOT_RUN = {  # rows of the papers that need what a laptop has not: the command is the result
    "back-translation": "python -m data.baselines back-translation clean.jsonl bt.jsonl --there Helsinki-NLP/opus-mt-en-de --back Helsinki-NLP/opus-mt-de-en",
    "pre-trained text tower": "python train_clip.py --text-model sentence-transformers/all-MiniLM-L6-v2 --text alt ... (and --freeze-text)",
    "LLaMA-7B's rewrites": "bash data/replicate.sh --model huggyllama/llama-7b laclip laclip-unfiltered",
    "ViT-B/16 on CC3M": "README, section 3",
}
# What README shows
README_ROWS = ("clip", "laclip", "clip-noisy", "laclip-noisy", "veclip", "veclip-vec")
README_COLUMNS = [("heldout_never", "top1"), ("heldout_never", "top10"), ("heldout_alias", "top10"), ("heldout", "top1"), ("heldout", "top10")]


def read_results(path=RESULTS):
    """-> {row: {seed: {(set, metric): percent}}}; of several runs of a row with one seed the last counts"""
    results = {}
    with open(path, encoding="utf-8") as f:
        for run in map(json.loads, f):
            results.setdefault(run["row"], {})[run["seed"]] = {
                (name, metric): 100 * x for name, metrics in run["metrics"].items() for metric, x in metrics.items()}
    return results


def mean_and_error(values):
    """Mean and its standard error; of one value there is no error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def cell(values, sign=""):
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.1f}" + (f" ± {error:.1f}" if error is not None else "")


def table(results, names=None, columns=COLUMNS):
    """Markdown lines: per group a row's metrics, and, below a group's first row, what the others gain over it"""
    lines = ["| | seeds | " + " | ".join(f"{SETS[name]}, top-{metric[3:]}" for name, metric in columns) + " | the paper |",
             "|---|--:|" + "--:|" * len(columns) + "---|"]
    for group, rows in GROUPS.items():
        rows = {row: text for row, text in rows.items() if names is None or row in names}
        base = results.get(next(iter(rows), None))
        if rows:
            lines.append(f"| **{group}** |" + " |" * (len(columns) + 2))
        for row, (name, paper) in rows.items():
            runs = results.get(row)
            if not runs:
                lines.append(f"| {name} | not run |" + " |" * len(columns) + f" {paper} |")
                continue
            lines.append(f"| {name} | {len(runs)} | " + " | ".join(cell([run[c] for run in runs.values()]) for c in columns) + f" | {paper} |")
            if base and runs is not base and (pairs := [seed for seed in runs if seed in base]):
                gains = " | ".join(cell([runs[seed][c] - base[seed][c] for seed in pairs], "+") for c in columns)
                lines.append(f"| *gain over {next(iter(rows.values()))[0]}* | {len(pairs)} | {gains} | |")
    return lines


def page(lines):
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    clean = lambda text: html.escape(text.replace("**", "").replace("*", ""))  # noqa: E731
    body = "".join("<tr>" + "".join(f"<{tag}>{clean(text)}</{tag}>" for text in row) + "</tr>"
                   for i, row in enumerate(rows) if i != 1 for tag in ["td" if i else "th"])
    others = "".join(f"<li>{html.escape(name)}: <code>{html.escape(command)}</code></li>" for name, command in CANNOT_RUN.items())
    return f"""<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Replication</title>
<style>body{{font:15px/1.5 system-ui;margin:2em}}div{{overflow-x:auto}}td,th{{padding:.2em .7em;text-align:right;white-space:nowrap}}
td:first-child{{text-align:left}}tr:nth-child(odd){{background:#f4f4f4}}</style><h1>Both papers in miniature</h1>
<p>{html.escape(" ".join(__doc__.split("All rows")[1].split()).join(["All rows ", ""]))}</p><div><table>{body}</table></div>
<h2>Not run here</h2><ul>{others}</ul>"""


def add(row, run, llm):
    import numpy
    import torch
    import transformers
    with open(os.path.join(run, "settings.json"), encoding="utf-8") as f:
        settings = json.load(f)
    with open(os.path.join(run, "eval.json"), encoding="utf-8") as f:
        metrics = json.load(f)
    metrics = {os.path.splitext(os.path.basename(name))[0]: {k: round(found[k], 5) for k in ("top1", "top5", "top10")} for name, found in metrics.items()}
    keep = ("rows", "text", "loss", "ssl", "steps", "batch_size", "lr", "wd", "warmup", "augment", "model", "precision")
    with open(RESULTS, "a", encoding="utf-8") as f:
        f.write(json.dumps({"row": row, "seed": settings["seed"], "llm": llm, "settings": {k: settings[k] for k in keep}, "metrics": metrics,
                            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                         "transformers": transformers.__version__, "numpy": numpy.__version__}}) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add")
    adding.add_argument("row")
    adding.add_argument("run")
    adding.add_argument("--llm", required=True)
    commands.add_parser("readme")
    commands.add_parser("finished").add_argument("run")
    args = parser.parse_args(argv)
    if args.command == "finished":
        with open(os.path.join(args.run, "settings.json"), encoding="utf-8") as f, open(os.path.join(args.run, "metrics.jsonl"), "rb") as log:
            steps, done = json.load(f)["steps"], json.loads(log.readlines()[-1])["step"]
        return None if done == steps else sys.exit(f"{args.run} stopped at step {done} of {steps}: the same command goes on")
    if args.command == "readme":
        return print("\n".join(table(read_results(), README_ROWS, README_COLUMNS)))
    if args.command == "add":
        return add(args.row, args.run, args.llm)
    lines = table(read_results())
    print("\n".join(lines))
    print("\nNot run here:\n" + "\n".join(f"  {name}: {command}" for name, command in CANNOT_RUN.items()))
    os.makedirs("out/replicate", exist_ok=True)
    with open("out/replicate/report.html", "w", encoding="utf-8") as f:
        f.write(page(lines))
    print("\nout/replicate/report.html", file=sys.stderr)


if __name__ == "__main__":
    main()
