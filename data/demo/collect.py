"""Write the demo's results to OUT/results.json for the report and print their table. data/demo.sh
runs this.

    python -m data.demo.collect out/demo
    python -m data.demo.collect share vec.jsonl     # for data/replicate.sh: how many captions are right
"""
import json
import math
import os
import platform
import random
import sys

import torch

from data.common import print_table
from data.demo.replication import SETS, cell, read_json, read_metrics, read_results
from data.filter_captions import content_words, plain_words

MODELS = {"clip": "CLIP, noisy AltText", "laclip": "LaCLIP: and rewrites", "veclip": "VeCLIP: and VeCap"}
# The row of data/replication.jsonl that trains on the same kind of texts, with more images and
# steps
REPLICATED = {"clip": "clip-noisy", "laclip": "laclip-noisy", "veclip": "veclip"}
NOISE = "about half of the AltTexts say nothing true: meaningless file names, names of other icons"


def read_jsonl(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def percent(share, n):
    """A share of n images in %, and its standard error"""
    return f"{100 * share:.1f} \N{PLUS-MINUS SIGN} {100 * math.sqrt(share * (1 - share) / n):.1f}"


def zero_shot_table(out):
    metrics = {model: read_metrics(os.path.join(out, "eval", f"{model}.json")) for model in MODELS}
    results, rows, sizes = read_results(), [], []
    for name, title in SETS.items():
        images, classes = metrics["clip"][name]["images"], metrics["clip"][name]["classes"]
        sizes.append(f"{images} images of {classes} classes ({title})")
        for k in (1, 5, 10):
            scores = [percent(metrics[model][name][f"top{k}"], images) for model in MODELS]
            replicated = [[run[name, f"top{k}"] for run in results.get(row, {}).values()]
                          for row in REPLICATED.values()]
            rows.append([f"{title}, top-{k}", f"{100 * k / classes:.1f}", *scores,
                         *(cell(values) if values else "" for values in replicated)])
    short_names = [name.split(",")[0].split(":")[0] for name in MODELS.values()]
    return {"title": "Zero-shot classification of images by three teams that nothing was trained on",
            "rows": rows,
            "columns": ["accuracy in %", "chance", *MODELS.values(),
                        *(f"{name}, replicated" for name in short_names)],
            "note": f"This run: {', '.join(sizes)}; one seed, standard error over images. Replicated: "
                    "data/replicate.sh, 2.5 times the images, twice the steps, mean and standard error over "
                    "seeds."}


def captioner_share(rows):
    """The share of captions that have a content word of the right name, and that share for shuffled
    captions.

    A missing caption counts as wrong.
    """
    names, captions = ([content_words(plain_words(row.get(field) or "")) for row in rows]
                       for field in ("name", "vec"))
    shuffled = random.Random(0).sample(captions, len(captions))
    return tuple(sum(bool(name & caption) for name, caption in zip(names, texts)) / len(rows)
                 for texts in (captions, shuffled))


def read_steps(out):
    """The steps that demo.sh ran, in their order: a file per step holds its seconds, then its
    command"""
    steps = []
    for entry in sorted(os.scandir(os.path.join(out, "steps")), key=lambda entry: entry.stat().st_mtime):
        if "." not in entry.name:  # not a log
            with open(entry.path, encoding="utf-8") as f:
                seconds, command = f.read().rstrip("\n").split("\n", 1)
            steps.append({"name": entry.name, "command": " ".join(command.split()), "seconds": int(seconds)})
    return steps


def summary(rows, settings, right, shuffled):
    return (f"{len(rows)} icons by six teams, with AltText as noisy as the web's: {NOISE}. SmolLM2-135M "
            "rewrote every AltText. A small LLaVA, which learned to speak from four other teams' icons, "
            f"captioned every image: {100 * right:.1f} % of its captions share a content word with the "
            f"icon's true name, {100 * shuffled:.1f} % with another's. SmolLM2-135M fused caption and "
            f"AltText. Three CLIPs were trained for {settings['steps']} steps of {settings['batch_size']}, "
            f"seed {settings['seed']}, which differ in the text alone.")


def main(out):
    rewritten, fused = (read_jsonl(out, f"{name}.jsonl") for name in ("filtered", "fused"))
    rows = [{**rewritten_row, **fused_row} for rewritten_row, fused_row in zip(rewritten, fused)]
    complete = [row for row in rows if row["vec"] and row["rewrite_wording"] and row["vecap"]]
    examples = random.Random(0).sample(complete, 24)
    fields = {"name (unseen)": "name", "AltText": "alt", "rewrite": "rewrite_wording", "VeC": "vec",
              "VeCap": "vecap"}
    right, shuffled = captioner_share(fused)
    settings, table, steps = read_json(out, "clip", "settings.json"), zero_shot_table(out), read_steps(out)
    results = {
        "title": "Caption rewriting for CLIP: the demo",
        "summary": [summary(rows, settings, right, shuffled)],
        "notes": ["Fusing and rewriting ask SmolLM2 by in-context pairs written for such texts, a deviation "
                  "from the papers' chat prompts that suits a 135 M model.",
                  "Icons: Fluent, Material Icons, RPG Awesome, Weather Icons, Codicons, Elusive, Material "
                  "Design Icons, Bootstrap, Remix, Font Awesome, Phosphor, Lucide, Typicons; licences in "
                  "data/demo/README.md."],
        "machine": {
            "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
            "CPUs": os.cpu_count(),
            "seconds of all steps, two tracks side by side": sum(
                step["seconds"] for step in steps if step["name"] != "install")},
        "captioner": {"right": right, "shuffled": shuffled},
        "steps": steps,
        "tables": [table],
        "curves": {"title": "Training loss", "chance": math.log(settings["batch_size"]), "series": [
            {"name": name, "points": [[line["step"], line["loss"]]
                                      for line in read_jsonl(out, model, "metrics.jsonl")]}
            for model, name in MODELS.items()]},
        "samples": [{
            "title": "Rows, from stage to stage",
            "note": "Drawn at random. `name` is what the icon's team calls it; no stage reads it.",
            "items": [{"image": row["image"], "fields": {name: row[field] for name, field in fields.items()}}
                      for row in examples]}]}
    with open(os.path.join(out, "results.json"), "w", encoding="utf-8") as f:
        json.dump(results, f, indent=1)
    # Committed as data/demo/example.jsonl; README follows one of these rows
    with open(os.path.join(out, "example.jsonl"), "w", encoding="utf-8") as f:
        for row in examples:
            f.write(json.dumps({field: row[field] for field in ("image", *fields.values())}) + "\n")
    print(f"\n{table['title']}. {table['note']}")
    print_table(table["columns"], table["rows"])
    print("\n" + results["summary"][0])


if __name__ == "__main__":
    if sys.argv[1] == "share":
        print("captions that share a content word with the true name: {:.1%}; shuffled: {:.1%}".format(
            *captioner_share(read_jsonl(sys.argv[2]))))
    else:
        main(sys.argv[1])
