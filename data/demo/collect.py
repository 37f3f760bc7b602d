"""Gather the demo's figures into OUT/results.json, which data/page.py shows, and print its tables; data/demo.sh runs it."""
import json
import math
import os
import platform
import random
import statistics
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from filter_captions import content_words, words_of  # noqa: E402

MODELS = {"clip": "CLIP", "laclip": "LaCLIP"}
STEPS = ["install", "fetch", "pictures", "llm", "llava", "rewrite", "filter", "caption", "fuse", "fuse-wordings", "tokenizer"]
LLAVA = ["noise", "train-clip-noisy", "tiny-llava", "caption-half_b", "caption-noisy", "fuse-noisy", "train-veclip"]  # --llava
CELLS = [(drawings, wording) for drawings in ("seen", "unseen") for wording in ("alt", "wording")]
NAMES = {"seen": "seen", "unseen": "unseen", "alt": "trained on", "wording": "never trained on"}


def read_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return json.load(f)


def read_jsonl(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def percent(x):
    return f"{100 * x:.1f}"


def paired_difference(out, cell, models=("clip", "laclip"), k=5):
    """Second model - first in text-to-image recall@5, query by query. -> (mean, standard error), fractions of 1"""
    hit = {}
    for model in models:
        rows = read_jsonl(out, "eval", f"{model}-{cell[0]}-{cell[1]}.hits.jsonl")
        hit[model] = [row["truth"] in [h["image"] for h in row["hits"][:k]] for row in rows]
    differences = [b - a for a, b in zip(*hit.values())]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def retrieval_tables(out, figures):
    tables = []
    for way, title in (("t2i", "Text to image"), ("i2t", "Image to text")):
        rows = []
        for cell in CELLS:
            values = {model: figures[model]["-".join(cell)] for model in MODELS}
            row = [f"{NAMES[cell[0]]} drawings, wording {NAMES[cell[1]]}"]
            for k in (1, 5, 10):
                row += [percent(values["clip"][f"{way}_r{k}_chance"])] + [percent(v[f"{way}_r{k}"]) for v in values.values()]
            if way == "t2i":
                mean, error = figures["difference_t2i_r5"]["-".join(cell)]
                row.append(f"{100 * mean:+.1f} \N{PLUS-MINUS SIGN} {100 * error:.1f}")
            rows.append(row)
        columns = ["recall in %"] + [c for k in (1, 5, 10) for c in (f"R@{k} chance", "CLIP", "LaCLIP")]
        tables.append({
            "title": title, "rows": rows, "columns": columns + (["LaCLIP - CLIP, R@5"] if way == "t2i" else []),
            "note": f"{values['clip']['images']} pictures and as many texts in every cell, the same concepts."
                    + (" The last column is the mean difference over the queries and its standard error." if way == "t2i" else "")})
    return tables


def classification_table(figures):
    rows = []
    for label, name in (("label", "Unicode group"), ("subgroup", "Unicode subgroup")):
        values = [figures[model][label] for model in MODELS]
        for k in ("top1", "top5"):
            rows.append([f"{name} of {values[0]['classes']}, {k.replace('top', 'top-')}",
                         percent(min(1, values[0]["chance"] * int(k[3:]))),
                         percent(values[0]["largest_class"]) if k == "top1" else ""] + [percent(v[k]) for v in values])
    return {"title": "Zero-shot classification of unseen drawings", "rows": rows,
            "columns": ["accuracy in %", "chance", "largest class", *MODELS.values()],
            "note": f"{values[0]['images']} pictures. A class's text is its Unicode name; no picture was trained with it."}


def captioner_share(out, file, field):
    """Captions: the share that has a content word of the right name, and of another picture's name (the captions shifted by
    one). No caption is a wrong one."""
    rows = read_jsonl(out, file)
    names, captions = ([content_words(words_of(row[key] or "")) for row in rows] for key in (field, "vec"))
    shared = lambda captions: sum(bool(name & caption) for name, caption in zip(names, captions)) / len(rows)
    return shared(captions), shared(captions[1:] + captions[:1])


def veclip_table(out):
    """Trained on AltText as noisy as the web's, alone and mixed with what was captioned and fused."""
    rows, models = [], ("clip-noisy", "veclip")
    for cell in CELLS:
        found = [read_json(out, "eval", f"{model}-{'-'.join(cell)}.json") for model in models]
        mean, error = paired_difference(out, cell, models)
        rows.append([f"{NAMES[cell[0]]} drawings, wording {NAMES[cell[1]]}", percent(found[0]["t2i_r5_chance"]),
                     *(percent(figures["t2i_r5"]) for figures in found), f"{100 * mean:+.1f} \N{PLUS-MINUS SIGN} {100 * error:.1f}"])
    right, shuffled = captioner_share(out, "half_b_captioned.jsonl", "alt")
    own, others = captioner_share(out, "noisy_captioned.jsonl", "name")
    return {"title": "VeCLIP: noisy AltText, alone and mixed with VeCap", "rows": rows,
            "columns": ["text to image, recall@5 in %", "chance", "CLIP, noisy", "VeCLIP", "VeCLIP - CLIP"],
            "note": "Trained on Twemoji. The captioner is data/make_tiny_llava.py's: its eyes are the CLIP of the noisy AltText, its "
                    f"words come from OpenMoji's half A. Of its captions of OpenMoji's half B, {percent(right)} % share a content word "
                    f"with the right name and {percent(shuffled)} % with another's; of Twemoji, {percent(own)} % and {percent(others)} %."}


def sample_rewrites(out, number=12):
    """Rows drawn at random, each source's rewrite beside the reason for which it was dropped, if it was."""
    rows = list(zip(read_jsonl(out, "rewritten.jsonl"), read_jsonl(out, "filtered.jsonl")))
    cards = []
    for before, after in random.Random(0).sample(rows, number):
        texts = [{"source": field.removeprefix("rewrite_"), "text": before[field], "kept": after[field] is not None,
                  "reason": (after.get("error") or {}).get(field)} for field in before if field.startswith("rewrite_")]
        cards.append({"image": before["image"], "alt": before["alt"], "texts": texts})
    return cards


def sample_queries(out, number=12):
    """Queries drawn at random, half with the wording trained on and half with the other; only unseen drawings."""
    names = {row["image"]: row["alt"] for row in read_jsonl(out, "unseen.jsonl")}
    cards = []
    for wording in ("alt", "wording"):
        found = {model: read_jsonl(out, "eval", f"{model}-unseen-{wording}.hits.jsonl") for model in MODELS}
        for i in random.Random(wording).sample(range(len(names)), number // 2):
            query = found["clip"][i]
            suffix = "" if wording == "alt" else f" (a wording never trained on, for \N{LEFT DOUBLE QUOTATION MARK}{names[query['truth']]}\N{RIGHT DOUBLE QUOTATION MARK})"
            rows = [{"model": name, "hits": [{**hit, "alt": names[hit["image"]], "correct": hit["image"] == query["truth"]}
                                             for hit in found[model][i]["hits"]]} for model, name in MODELS.items()]
            cards.append({"query": query["query"] + suffix, "rows": rows})
    return cards


def sample_fields(out, file, fields, title, note, number=6):
    rows = random.Random(0).sample(read_jsonl(out, file), number)
    return {"title": title, "note": note, "items": [
        {"image": row["image"], "fields": {name: str(row[field]) for name, field in fields.items()}} for row in rows]}


def read_steps(out):
    steps = []
    there = os.listdir(os.path.join(out, "steps"))
    names = STEPS + [f"train-{model}" for model in MODELS] + [name for name in LLAVA if name in there]
    names += sorted(name for name in there if name.startswith("eval-"))
    for name in names:
        with open(os.path.join(out, "steps", name), encoding="utf-8") as f:
            seconds, command = f.read().rstrip("\n").split("\n", 1)
        steps.append({"name": name, "command": " ".join(command.split()), "seconds": int(seconds)})
    return steps


def summarise(figures, out):
    """What the run showed, in sentences; whichever way it came out."""
    lines = []
    for cell in CELLS:
        mean, error = figures["difference_t2i_r5"]["-".join(cell)]
        verdict = "no difference that this run can show" if abs(mean) < 2 * error else "a gain" if mean > 0 else "a cost"
        a, b = (percent(figures[model]["-".join(cell)]["t2i_r5"]) for model in MODELS)
        lines.append(f"{NAMES[cell[0]].capitalize()} drawings, wording {NAMES[cell[1]]}: text-to-image recall@5 {a} with CLIP, "
                     f"{b} with LaCLIP: {verdict} ({100 * mean:+.1f} \N{PLUS-MINUS SIGN} {100 * error:.1f}).")
    return lines


def print_table(table):
    rows = [table["columns"], *table["rows"]]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(table["columns"]))]
    print(f"\n{table['title']}. {table['note']}")
    for row in rows:
        print("  ".join(str(cell).ljust(w) if i == 0 else str(cell).rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def main(out):
    figures = {model: {} for model in MODELS}
    for model in MODELS:
        for cell in map("-".join, CELLS):
            figures[model][cell] = read_json(out, "eval", f"{model}-{cell}.json")
        for label in ("label", "subgroup"):
            figures[model][label] = next(iter(read_json(out, "eval", f"{model}-{label}.json").values()))
    figures["difference_t2i_r5"] = {"-".join(cell): paired_difference(out, cell) for cell in CELLS}
    metrics = {model: read_jsonl(out, model, "metrics.jsonl") for model in MODELS}
    settings = read_json(out, "clip", "settings.json")
    steps = read_steps(out)
    kept = [row for row in read_jsonl(out, "filtered.jsonl")]
    texts = [row[field] for row in kept for field in row if field.startswith("rewrite_")]
    results = {
        "title": "Caption rewriting for CLIP: the demo",
        "summary": [
            f"{len(kept)} pictures of emoji with their names as AltText. SmolLM2-135M rewrote every name in four sources; "
            f"{sum(text is not None for text in texts)} of {len(texts)} rewrites passed the filter. Two small CLIPs were trained "
            f"for {settings['steps']} steps of {settings['batch_size']}, seed {settings['seed']}: one on the names alone, one on names and rewrites. "
            "Held out: OpenMoji's drawings of half the concepts, and wordings (shortcodes unlike the name).",
            *summarise(figures, out)],
        "notes": [
            "One run with one seed on a few thousand pictures: it shows the method at work, not the papers' figures.",
            "The LLaVA of the steps caption and fuse has small random weights: its captions mean nothing. They show that the stage works; "
            "no model was trained on them nor on what was fused from them.",
            "Fusing uses in-context pairs (--format pairs), a deviation from the paper that suits a 135 M model.",
            "Pictures: Twemoji (CC-BY 4.0), OpenMoji (CC BY-SA 4.0). Rewrites: SmolLM2-135M-Instruct (Apache-2.0)."],
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
                    "threads": torch.get_num_threads(), "seconds after install": sum(s["seconds"] for s in steps if s["name"] != "install")},
        "steps": steps, "figures": figures,
        "tables": [*retrieval_tables(out, figures), classification_table(figures)],
        "curves": {"title": "Training loss", "chance": math.log(settings["batch_size"]), "series": [
            {"name": name, "points": [[m["step"], m["loss"]] for m in metrics[model]]} for model, name in MODELS.items()]},
        "rewrites": sample_rewrites(out), "queries": sample_queries(out),
        "samples": [
            sample_fields(out, "fused_wordings.jsonl", {"AltText": "wording", "VeC": "alt", "fused": "vecap"},
                          "Fusing two real texts", "A shortcode stands for the AltText, the name for what the picture shows; "
                          "six drawn at random. Nothing is trained on them."),
            sample_fields(out, "fused.jsonl", {"AltText": "alt", "VeC (random weights)": "vec", "fused": "vecap"},
                          "The VeC stage's plumbing", "The captioner has random weights, so its words mean nothing.")]}
    if os.path.exists(os.path.join(out, "eval", "veclip-unseen-wording.json")):  # demo.sh --llava
        results["tables"].append(veclip_table(out))
        results["samples"].append(sample_fields(
            out, "half_b_captioned.jsonl", {"name": "alt", "caption": "vec"}, "What the small LLaVA sees",
            "Forty drawn at random from the drawings that nothing was trained on, good and bad.", number=40))
    with open(os.path.join(out, "results.json"), "w", encoding="utf-8") as f:
        json.dump(results, f, indent=1)
    for table in results["tables"]:
        print_table(table)
    print("\n" + "\n".join(results["summary"]))


if __name__ == "__main__":
    main(sys.argv[1])
