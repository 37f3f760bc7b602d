"""Store the results of data/replicate.sh in data/replication.jsonl, a line per run, and show them
as a table.

    python -m data.demo.replication                       # print the table, write out/replicate/report.html
    python -m data.demo.replication readme                # print the part of the table that README shows
    python -m data.demo.replication finished RUN          # exit with status 1 if RUN stopped early
    python -m data.demo.replication add ROW RUN --llm M   # append the settings and metrics of RUN

replicate.sh asks `finished` before it evaluates a run: train_clip.py exits with 0 after SIGTERM,
too. """
import argparse
import json
import math
import os
import platform
import statistics
import sys

ABOUT = """Every row trains for the same number of steps with the same batch size; "2 x steps" trains for
twice as many, "4 x steps" for four times as many. The scores are zero-shot accuracy in % on images by three
teams that no row trains on. The prompt is the name of the class. The metrics were fixed before the first
run: top-1, top-5 and top-10 on the classes "never named" (no training set has their name) and on the
"aliases" (the prompt is another human name of the class). The columns "all classes" stand beside them. A
cell is the mean over the seeds ± its standard error. A gain is the mean difference between runs with the
same seed."""

RESULTS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "replication.jsonl")
SETS = {"heldout_never": "never named", "heldout_alias": "aliases", "heldout": "all classes"}
CLASSES = {"heldout_never": 1376, "heldout_alias": 369, "heldout": 2379}  # data/demo/icons.py draws them
COLUMNS = [(name, f"top{k}") for name in SETS for k in (1, 5, 10) if (name, k) != ("heldout", 5)]
# row -> (name, the paper's finding; a decimal is ImageNet top-1). A group's first row is its
# baseline.
GROUPS = {
    "LaCLIP: AltText = the name": {
        "clip": ("CLIP", "40.2 (CC12M)"), "laclip": ("LaCLIP", "48.4"), "laclip-mt": ("LaCLIP-MT", "49.0"),
        "laclip-unfiltered": ("LaCLIP, rewrites unfiltered", "as the paper"),
        "laclip-1": ("one rewrite", "more rewrites, more accuracy"),
        "laclip-scene": ("the other source alone", ""), "laclip-shots-0": ("no pair in the prompt", ""),
        "laclip-shots-1": ("one pair", ""), "laclip-shots-3": ("three pairs (the others: eight)", "three"),
        "laclip-small-llm": ("rewrites by SmolLM2-135M", ""),
        "oracle": ("oracle: human aliases as rewrites", ""), "oracle-alone": ("oracle alone", ""),
        "eda": ("EDA", "little gain"), "slip": ("SLIP", ""), "laslip": ("LaSLIP", "gains as LaCLIP does")},
    "LaCLIP: 2 x steps": {"clip-2x": ("CLIP", ""), "laclip-2x": ("LaCLIP", "")},
    "LaCLIP: 4 x steps": {"clip-4x": ("CLIP", ""), "laclip-4x": ("LaCLIP", "")},
    "LaCLIP: a larger model": {
        "clip-wide": ("CLIP, ViT-S/16", ""), "laclip-wide": ("LaCLIP, ViT-S/16", "gains at every size")},
    "VeCLIP: half of the AltTexts useless": {
        "clip-noisy": ("CLIP, AltText", "31.60 (12 M)"), "vec-only": ("VeC alone", "below the mix"),
        "vecap-only": ("VeCap alone", "below the mix"), "veclip": ("VeCLIP, AltText and VeCap", "38.11"),
        "veclip-vec": ("AltText and VeC, not fused", ""), "veclip-25-75": ("25 % AltText, 75 % VeCap", ""),
        "veclip-75-25": ("75 % AltText, 25 % VeCap", ""), "veclip-cut": ("VeCLIP, texts cut to 6 tokens", ""),
        "laclip-noisy": ("LaCLIP", ""), "veclip-join": ("and a clean set joined", "VeCap + DFN gains")},
    "VeCLIP: three AltTexts an image": {
        "alt-random": ("one at random", "best"), "alt-first": ("the first", ""),
        "alt-best": ("the one of the highest CLIP score", "below random")},
    "VeCLIP: a quarter of them": {"clip-quarter": ("CLIP, AltText", ""), "veclip-quarter": ("VeCLIP", "")},
    "half of the images": {"clip-half": ("CLIP", ""), "laclip-half": ("LaCLIP", "gains at every size")},
    "an eighth of the images": {
        "clip-eighth": ("CLIP", ""), "laclip-eighth": ("LaCLIP", "gains at every size")},
}
CANNOT_RUN = {  # rows of the papers that need more than a laptop, with their commands
    "back-translation": "python -m data.baselines back-translation clean.jsonl bt.jsonl "
                        "--there Helsinki-NLP/opus-mt-en-de --back Helsinki-NLP/opus-mt-de-en",
    "pre-trained text tower": "python train_clip.py --text-model sentence-transformers/all-MiniLM-L6-v2 "
                              "--text alt ... (and --freeze-text)",
    "LLaMA-7B's rewrites": "bash data/replicate.sh --model huggyllama/llama-7b laclip laclip-unfiltered",
    "ViT-B/16 on CC3M": "README, the papers' commands",
}
README_ROWS = ("clip", "laclip", "laclip-mt", "clip-noisy", "veclip")
README_COLUMNS = [("heldout_never", "top1"), ("heldout_never", "top10"),
                  ("heldout", "top1"), ("heldout", "top10")]
RECIPE = ("rows", "text", "loss", "ssl", "steps", "batch_size", "lr", "wd", "warmup", "augment", "model",
          "precision")  # the settings that a result keeps


def read_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return json.load(f)


def read_metrics(path):
    """The file of eval_zeroshot.py --json -> {name of the set: its metrics}"""
    return {os.path.splitext(os.path.basename(name))[0]: metrics for name, metrics in read_json(path).items()}


def read_results(path=RESULTS):
    """-> {row: {seed: {(set, metric): percent}}}; the last run of a row and a seed counts"""
    results = {}
    with open(path, encoding="utf-8") as f:
        for run in map(json.loads, f):
            results.setdefault(run["row"], {})[run["seed"]] = {
                (name, metric): 100 * share
                for name, metrics in run["metrics"].items() for metric, share in metrics.items()}
    return results


def cell(values, sign=""):
    """"mean ± standard error"; one value has no error. sign="+" shows the sign of the mean."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def table(results, names=None, columns=COLUMNS):
    """-> Markdown lines: every row, or those in `names`, with its metrics and its gain over the
    baseline"""
    headings = " | ".join(f"{SETS[name]}, top-{metric[3:]}" for name, metric in columns)
    empty_cells = " |" * len(columns)
    lines = [f"| | seeds | {headings} | the paper |", "|---|--:|" + "--:|" * len(columns) + "---|"]
    chance = " | ".join(f"{100 * int(metric[3:]) / CLASSES[name]:.1f}" for name, metric in columns)
    lines.append(f"| chance | | {chance} | |")
    for group, rows in GROUPS.items():
        rows = {row: texts for row, texts in rows.items() if names is None or row in names}
        if not rows:
            continue
        baseline, (baseline_name, _) = next(iter(rows.items()))
        baseline_runs = results.get(baseline, {})
        lines.append(f"| **{group}** | |{empty_cells} |")
        for row, (name, paper) in rows.items():
            runs = results.get(row)
            if not runs:
                lines.append(f"| {name} | not run |{empty_cells} {paper} |")
                continue
            metrics = " | ".join(cell([run[c] for run in runs.values()]) for c in columns)
            lines.append(f"| {name} | {len(runs)} | {metrics} | {paper} |")
            pairs = [(runs[seed], baseline_runs[seed]) for seed in runs if seed in baseline_runs]
            if row != baseline and pairs:
                gains = " | ".join(cell([run[c] - base[c] for run, base in pairs], "+") for c in columns)
                lines.append(f"| *gain over {baseline_name}* | {len(pairs)} | {gains} | |")
    return lines


def write_page(path, lines):
    """Write the HTML page: the table of the Markdown lines, what it means, and the rows that are
    not run."""
    from data import page  # here, because it imports torch: slow, and the other commands do not need it
    columns, _, *rows = ([text.strip(" *") for text in line[1:-1].split("|")] for line in lines)
    not_run = [page.tag("li", f"{name}: ", page.tag("code", call)) for name, call in CANNOT_RUN.items()]
    page.write(path, page.document(
        "Replication", page.tag("header", page.tag("h1", "Both papers in miniature"), page.tag("p", ABOUT)),
        page.tag("main", page.table({"columns": columns, "rows": rows}),
                 page.tag("h2", "Not run here"), page.tag("ul", *not_run))))


def add(row, run, llm):
    """Append one line to RESULTS: the run's settings, its metrics, and the versions that made
    them."""
    import numpy
    import torch
    import transformers
    settings = read_json(run, "settings.json")
    metrics = {name: {k: round(scores[k], 5) for k in ("top1", "top5", "top10")}
               for name, scores in read_metrics(os.path.join(run, "eval.json")).items()}
    settings["text"] = dict(settings["text"])  # field: weight
    written = {"rewrite_wording", "rewrite_scene", "vecap"} & set(settings["text"])  # by the LLM
    result = {"row": row, "seed": settings["seed"], "llm": llm if written else "none",
              "settings": {name: settings[name] for name in RECIPE}, "metrics": metrics,
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "transformers": transformers.__version__, "numpy": numpy.__version__}}
    with open(RESULTS, "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")


def check_finished(run):
    """Exit with status 1 if the run's last logged step is not its last step."""
    steps = read_json(run, "settings.json")["steps"]
    with open(os.path.join(run, "metrics.jsonl"), "rb") as f:
        step = json.loads(f.readlines()[-1])["step"]
    if step != steps:
        sys.exit(f"{run} stopped at step {step} of {steps}: run the same command again to continue")


def main(argv=None):
    parser = argparse.ArgumentParser(description=f"{__doc__}\n{ABOUT}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add")
    adding.add_argument("row")
    adding.add_argument("run")
    adding.add_argument("--llm", required=True)
    commands.add_parser("readme")
    commands.add_parser("finished").add_argument("run")
    args = parser.parse_args(argv)
    if args.command == "finished":
        return check_finished(args.run)
    if args.command == "add":
        return add(args.row, args.run, args.llm)
    if args.command == "readme":
        return print("\n".join(table(read_results(), README_ROWS, README_COLUMNS)))
    lines = table(read_results())
    print("\n".join(lines))
    print("\nNot run here:\n" + "\n".join(f"  {name}: {command}" for name, command in CANNOT_RUN.items()))
    os.makedirs("out/replicate", exist_ok=True)
    write_page("out/replicate/report.html", lines)
    print("\nout/replicate/report.html", file=sys.stderr)


if __name__ == "__main__":
    main()
