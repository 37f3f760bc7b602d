"""The end of data/demo.sh: evaluate its four models, print a table and write OUT/report.html.

    python -m data.demo.report out/demo
"""
import json
import os
import random
import sys

import torch
import torch.nn.functional as F

from data import page
from data.common import print_table
from data.demo.replication import CHANCE, COLUMNS, TEAMS, cell, measure, read_results, scores_of
from train_clip import load_checkpoint, open_image

MODELS = {  # folder, which is also the row of data/replication.jsonl: name
    "clip": "CLIP, clean captions", "laclip": "LaCLIP, and three rewrites",
    "clip-noisy": "CLIP, noisy AltText", "veclip": "VeCLIP, and VeCap"}
STYLE = """.model { display: grid; grid-template-columns: 11rem 1fr; gap: .3rem 1rem; align-items: center;
  padding: .35rem 0 } .image { image-rendering: pixelated; min-width: 96px; min-height: 96px }
.steps code { color: var(--soft); white-space: pre-wrap } .steps li { padding: .5rem 0 }"""


def read_jsonl(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def scores_table(out):
    """-> the rows of the table: each model's scores in %, and those of data/replicate.sh"""
    replicated, rows = read_results()[0], []
    for model, name in MODELS.items():
        folder = os.path.join(out, model)
        measure(folder, out)
        with open(os.path.join(folder, "measured.json")) as f:
            scores = scores_of(json.load(f))
        rows.append([name, *(f"{scores[column]:.1f}" for column in COLUMNS)])
        if runs := replicated.get(model):
            rows.append([f"   {len(runs)} seeds",
                         *(cell([run[column] for run in runs.values()]) for column in COLUMNS)])
    return [["chance", *CHANCE.values()], *rows]


def captioner_share(rows):
    """How often VeC names an object of the scene, and how often another scene's VeC does"""
    captions = [(row["vec"] or "").split() for row in rows]
    shuffled = random.Random(0).sample(captions, len(captions))
    return [sum(thing in caption for row, caption in zip(rows, texts) for thing in row["scene"][::2])
            / (2 * len(rows)) for texts in (captions, shuffled)]


@torch.no_grad()
def queries(out, root):
    """-> one block a query: the five nearest of phosphor's images for each model, best first"""
    rows = read_jsonl(out, f"{TEAMS[0]}.jsonl")
    asked = [(row, text) for row, kind in zip(random.Random(0).sample(rows, 8), (0, 1, 2, 3, 4, 5, 6, 6))
             for text in [[*row["other_forms"], row["synonyms"]][kind]]]
    found = {}
    for model in MODELS:
        clip, tokenizer, transform = load_checkpoint(os.path.join(out, model, "checkpoint.pt"))
        images = torch.stack([transform(open_image(root, row["image"])) for row in rows])
        images = F.normalize(clip.encode_image(images), dim=-1)
        texts = F.normalize(clip.encode_text(tokenizer([text for _, text in asked])), dim=-1)
        found[model] = (texts @ images.T).topk(5)
    blocks = []
    for i, (row, text) in enumerate(asked):
        lines = []
        for model, name in MODELS.items():
            hits = [{"image": rows[j]["image"], "score": score, "correct": rows[j] is row, "alt": rows[j]["alt"]}
                    for score, j in zip(found[model].values[i].tolist(), found[model].indices[i].tolist())]
            figures = page.tag("div", *(page.hit_figure(root, hit) for hit in hits), class_="hits")
            lines.append(page.tag("div", page.words("div", name), figures, class_="model"))
        blocks.append(page.block({"title": text}, *lines))
    return blocks


def examples(rows, fields, root):
    """-> cards: an image and the texts of its row"""
    return page.tag("ul", *(page.card(page.image_element(root, row["image"], ""), "", [
        (name, page.words("dd", row[field])) for field, name in fields.items()])
        for row in random.Random(1).sample(rows, 12)), class_="cards")


def steps(out):
    """-> what demo.sh ran, in order: a file per step holds its seconds, then its command"""
    entries = [entry for entry in os.scandir(os.path.join(out, "steps")) if "." not in entry.name]
    lines = []
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
        with open(entry.path, encoding="utf-8") as f:
            seconds, command = f.read().rstrip("\n").split("\n", 1)
        lines.append(page.tag("li", page.tag("h3", f"{entry.name}, {seconds} s"), page.words("code", command)))
    return page.tag("ol", *lines, class_="steps")


def main(out):
    root = os.path.realpath(os.path.join(out, "images"))
    rewritten, fused = read_jsonl(out, "rewritten.jsonl"), read_jsonl(out, "fused.jsonl")
    right, shuffled = captioner_share(fused)
    rows, columns = scores_table(out), ["%", *COLUMNS.values()]
    about = (f"Scenes of two icons, {len(rewritten)} with clean captions, half of them also with AltText as "
             "noisy as the web's. Scores on scenes by two teams that nothing was trained on, of pairs of "
             "objects that no training scene has: recall@1, and zero-shot top-1 in the last column. One "
             f"seed. The small LLaVA names {100 * right:.0f} % of the objects ({100 * shuffled:.0f} % when "
             "its captions are shuffled).")
    sections = {
        "Results": [page.table({"columns": columns, "rows": rows})],
        "What each model finds for a query in other words": queries(out, root),
        "LaCLIP: scenes and their rewrites": [examples(rewritten, {
            "alt": "caption", **{f"rewrite_{name}": name for name in ("sentence", "reverse", "detail")}},
            root)],
        "VeCLIP: scenes, AltText, VeC and VeCap": [examples(fused, {
            "truth": "truth (no stage reads it)", "alt": "AltText", "vec": "VeC", "vecap": "VeCap"}, root)],
        "What ran": [steps(out)]}
    page.write(os.path.join(out, "report.html"), page.document(
        "Caption rewriting for CLIP: the demo",
        page.tag("header", page.tag("h1", "Caption rewriting for CLIP: the demo"), page.tag("p", about)),
        page.tag("main", *(page.tag("section", page.tag("h2", name), *content)
                           for name, content in sections.items())), style=STYLE))
    print_table(columns, rows)
    print(about)


if __name__ == "__main__":
    main(sys.argv[1])
