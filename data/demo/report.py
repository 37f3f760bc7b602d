"""The end of data/demo.sh: evaluate its four models, print a table and write OUT/report.html.

    python -m data.demo.report out/demo
"""
import json
import os
import random
import sys

import torch
import torch.nn.functional as F

from data.common import print_table
from data.demo.replication import CHANCE, COLUMNS, TEAMS, measure, scores_of
from data.page import (block, card, document, hit_figure, image_element, table, tag, words, write)
from train_clip import load_checkpoint, open_image

MODELS = {"clip": "CLIP, clean captions", "laclip": "LaCLIP, and two rewrites",
          "clip-noisy": "CLIP, noisy AltText", "veclip": "VeCLIP, and VeCap"}
REWRITES = {"alt": "caption", "rewrite_sentence": "sentence", "rewrite_reverse": "reverse"}
CAPTIONS = {"truth": "truth (no stage reads it)", "alt": "AltText", "vec": "VeC", "vecap": "VeCap"}
STYLE = """.model { display: grid; grid-template-columns: 11rem 1fr; gap: .3rem 1rem;
  align-items: center; padding: .35rem 0 }
.image { image-rendering: pixelated; min-width: 96px; min-height: 96px }"""


def read_jsonl(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def scores(out):
    """-> the rows of the table, each model's scores in %"""
    rows = [["chance", *CHANCE.values()]]
    for model, name in MODELS.items():
        measure(os.path.join(out, model), out)
        with open(os.path.join(out, model, "measured.json")) as f:
            found = scores_of(json.load(f))
        rows.append([name, *(f"{found[column]:.1f}" for column in COLUMNS)])
    return rows


def objects_named(rows):
    """The share of objects that VeC names, and the share that another scene's VeC names, in %"""
    captions = [(row["vec"] or "").split() for row in rows]
    shuffled = random.Random(0).sample(captions, len(captions))
    truths = [row["truth"].split() for row in rows]
    return [50 * sum((truth[0] in said) + (truth[-1] in said) for truth, said in zip(truths, texts))
            / len(rows) for texts in (captions, shuffled)]


@torch.no_grad()
def queries(out, root):
    """-> one block a query: the five nearest of phosphor's images for each model, best first"""
    rows, found = read_jsonl(out, f"{TEAMS[0]}.jsonl"), {}
    chosen = random.Random(0).sample(rows, 7)
    texts = [[*row["other_forms"], row["synonyms"]][i] for i, row in enumerate(chosen)]
    for model in MODELS:
        clip, tokenizer, transform = load_checkpoint(os.path.join(out, model, "checkpoint.pt"))
        images = torch.stack([transform(open_image(root, row["image"])) for row in rows])
        images = F.normalize(clip.encode_image(images), dim=-1)
        found[model] = (F.normalize(clip.encode_text(tokenizer(texts)), dim=-1) @ images.T).topk(5)
    blocks = []
    for i, text in enumerate(texts):
        lines = []
        for model, name in MODELS.items():
            hits = [{"image": rows[j]["image"], "score": score, "correct": text in
                     [*rows[j]["other_forms"], rows[j]["synonyms"]]}
                    for score, j in zip(*(column[i].tolist() for column in found[model]))]
            figures = tag("div", *(hit_figure(root, hit) for hit in hits), class_="hits")
            lines.append(tag("div", words("div", name), figures, class_="model"))
        blocks.append(block({"title": text}, *lines))
    return blocks


def examples(rows, fields, root):
    """-> twelve rows, drawn at random, as cards: the image and the texts of `fields`"""
    cards = []
    for row in random.Random(1).sample(rows, 12):
        texts = [(name, words("dd", row[field])) for field, name in fields.items()]
        cards.append(card(image_element(root, row["image"], ""), "", texts))
    return tag("ul", *cards, class_="cards")


def main(out):
    root = os.path.realpath(os.path.join(out, "images"))
    rewritten, fused = read_jsonl(out, "rewritten.jsonl"), read_jsonl(out, "fused.jsonl")
    right, shuffled = objects_named(fused)
    rows, columns = scores(out), ["%", *COLUMNS.values()]
    title = "Caption rewriting for CLIP: the demo"
    about = ("Recall@1, and zero-shot top-1 in the last column, on scenes by two teams that "
             "nothing was trained on, of pairs of objects that no training scene has. One seed. "
             f"The small LLaVA names {right:.0f} % of the objects ({shuffled:.0f} % in shuffled "
             "captions).")
    sections = {
        "Results": [table({"columns": columns, "rows": rows})],
        "What each model finds for a query in other words": queries(out, root),
        "LaCLIP: scenes and their rewrites": [examples(rewritten, REWRITES, root)],
        "VeCLIP: scenes, AltText, VeC and VeCap": [examples(fused, CAPTIONS, root)]}
    parts = [tag("section", tag("h2", name), *content) for name, content in sections.items()]
    header = tag("header", tag("h1", title), tag("p", about))
    page = document(title, header, tag("main", *parts), style=STYLE)
    write(os.path.join(out, "report.html"), page)
    print_table(columns, rows)
    print(about)


if __name__ == "__main__":
    main(sys.argv[1])
