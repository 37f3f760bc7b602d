"""The demo's results: OUT/results.json for the report page, and its table on the terminal; data/demo.sh runs it."""
import json
import math
import os
import platform
import random
import sys

import torch

from data.demo.replication import SETS, cell, read_results
from data.filter_captions import content_words, plain_words

MODELS = {"clip": "CLIP, noisy AltText", "laclip": "LaCLIP: and rewrites", "veclip": "VeCLIP: and VeCap"}
SEEDS = {"clip": "clip-noisy", "laclip": "laclip-noisy", "veclip": "veclip"}  # the same of data/replication.jsonl, more images and steps
NOISE = "about half of the AltTexts say nothing true: meaningless file names, names of other icons"


def read_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return json.load(f)


def read_jsonl(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def percent(x, n):
    """A share of n images, and its standard error"""
    return f"{100 * x:.1f} \N{PLUS-MINUS SIGN} {100 * math.sqrt(x * (1 - x) / n):.1f}"


def zero_shot_table(out):
    found = {model: {os.path.splitext(os.path.basename(name))[0]: metrics for name, metrics in read_json(out, "eval", f"{model}.json").items()}
             for model in MODELS}
    results, rows = read_results(), []
    sizes = ", ".join(f"{found['clip'][name]['images']} images of {found['clip'][name]['classes']} classes ({SETS[name]})" for name in SETS)
    for name, title in SETS.items():
        for k in (1, 5, 10):
            metrics = [found[model][name] for model in MODELS]
            seeds = [cell([run[name, f"top{k}"] for run in results[row].values()]) if row in results else "" for row in SEEDS.values()]
            rows.append([f"{title}, top-{k}", f"{100 * k / metrics[0]['classes']:.1f}",
                         *(percent(metric[f"top{k}"], metric["images"]) for metric in metrics), *seeds])
    return {"title": "Zero-shot classification of images by three teams that nothing was trained on", "rows": rows,
            "columns": ["accuracy in %", "chance", *MODELS.values(), *(f"{name.split(',')[0].split(':')[0]}, replicated" for name in MODELS.values())],
            "note": f"This run: {sizes}; "
                    "one seed, standard error over images. Replicated: data/replicate.sh, 2.5 times the images, twice the steps, mean and "
                    "standard error over seeds."}


def captioner_share(rows, field="name"):
    """Captions: the share that has a content word of the right name, and the same with the captions shuffled. No caption is a
    wrong one."""
    names, captions = ([content_words(plain_words(row.get(key) or "")) for row in rows] for key in (field, "vec"))
    shared = lambda captions: sum(bool(name & caption) for name, caption in zip(names, captions)) / len(rows)  # noqa: E731
    return shared(captions), shared(random.Random(0).sample(captions, len(captions)))


def read_steps(out):
    steps = []
    for entry in sorted(os.scandir(os.path.join(out, "steps")), key=lambda entry: entry.stat().st_mtime):
        if "." not in entry.name:
            with open(entry.path, encoding="utf-8") as f:
                seconds, command = f.read().rstrip("\n").split("\n", 1)
            steps.append({"name": entry.name, "command": " ".join(command.split()), "seconds": int(seconds)})
    return steps


def print_table(table):
    rows = [table["columns"], *table["rows"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table["columns"]))]
    print(f"\n{table['title']}. {table['note']}")
    for row in rows:
        print("  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths))))


def main(out):
    rewritten, fused = (read_jsonl(out, f"{name}.jsonl") for name in ("rewritten", "fused"))
    right, shuffled = captioner_share(fused)
    settings = read_json(out, "clip", "settings.json")
    table, steps = zero_shot_table(out), read_steps(out)
    rows = [{**row, **again} for row, again in zip(rewritten, fused)]
    shown = random.Random(0).sample([row for row in rows if row["vec"] and row["rewrite_wording"] and row["vecap"]], 24)
    results = {
        "title": "Caption rewriting for CLIP: the demo",
        "summary": [
            f"{len(rows)} icons by six teams, with AltText as noisy as the web's: {NOISE}. SmolLM2-135M rewrote every AltText. "
            f"A small LLaVA, which learned to speak from four other teams' icons, "
            f"captioned every image: {100 * right:.1f} % of its captions share a content word with the icon's true name, {100 * shuffled:.1f} % "
            f"with another's. SmolLM2-135M fused caption and AltText. Three CLIPs were trained for {settings['steps']} steps of "
            f"{settings['batch_size']}, seed {settings['seed']}, which differ in the text alone."],
        "notes": ["Fusing and rewriting ask SmolLM2 by in-context pairs written for such texts, a deviation from the papers' "
                  "chat prompts that suits a 135 M model.",
                  "Icons: Fluent, Material Icons, RPG Awesome, Weather Icons, Codicons, Elusive, Material Design Icons, Bootstrap, Remix, Font "
                  "Awesome, Phosphor, Lucide, Typicons; licences in data/demo/README.md."],
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
                    "CPUs": os.cpu_count(), "seconds after install": sum(s["seconds"] for s in steps if s["name"] != "install")},
        "captioner": {"right": right, "shuffled": shuffled}, "steps": steps, "tables": [table],
        "curves": {"title": "Training loss", "chance": math.log(settings["batch_size"]), "series": [
            {"name": name, "points": [[m["step"], m["loss"]] for m in read_jsonl(out, model, "metrics.jsonl")]}
            for model, name in MODELS.items()]},
        "samples": [{"title": "Rows, from stage to stage", "note": "Drawn at random. `name` is what the icon's team calls it; no stage reads it.",
                     "items": [{"image": row["image"], "fields": {
                         "name (unseen)": row["name"], "AltText": row["alt"], "rewrite": row["rewrite_wording"], "VeC": row["vec"],
                         "VeCap": row["vecap"]}} for row in shown]}]}
    with open(os.path.join(out, "results.json"), "w", encoding="utf-8") as f:
        json.dump(results, f, indent=1)
    with open(os.path.join(out, "example.jsonl"), "w", encoding="utf-8") as f:  # data/demo/example.jsonl, one of which README follows
        for row in shown:
            f.write(json.dumps({key: row[key] for key in ("image", "name", "alt", "rewrite_wording", "vec", "vecap")}) + "\n")
    print_table(table)
    print("\n" + results["summary"][0])


if __name__ == "__main__":
    if sys.argv[1] == "share":  # of data/replicate.sh's captions
        print("captions that share a content word with the true name: {:.1%}; shuffled: {:.1%}".format(*captioner_share(read_jsonl(sys.argv[2]))))
    else:
        main(sys.argv[1])
