"""What `eval_retrieval.py --score` writes: every row with `clip_score`, how well each of its texts fits its image.

    python eval_retrieval.py --checkpoint clip.pt --captions rows.jsonl --image-root DIR --score scored.jsonl

train_clip.py --alt-choice best and data/filter_captions.py --min-score, --min-gain read it.
"""
import json
import os
import sys
from itertools import islice

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from train_clip import BadRow, all_reduce, die, lock, open_rows, parse_row  # noqa: E402


def caption_fields(row):
    return [key for key in row if key in ("alt", "vec", "vecap") or key.startswith("rewrite_")]


def add_scores(rows, images, encode):
    """Adds `clip_score` to the rows, given the features [n, d] of their images: for every caption field the cosine of
    image and text (Hessel et al. 2021, without its factor 2.5), a list for a list, null without a text or an image."""
    texts = [(i, text) for i, row in enumerate(rows) for field in caption_fields(row)
             for text in (row[field] if isinstance(row[field], list) else [row[field]])]
    usable = [k for k, (i, text) in enumerate(texts) if isinstance(text, str) and text.strip() and images[i].any()]
    scores = [None] * len(texts)
    if usable:
        owners, captions = zip(*(texts[k] for k in usable))
        for k, score in zip(usable, (encode(captions) * images[list(owners)]).sum(1).tolist()):
            scores[k] = round(score, 5)
    scores = iter(scores)
    for row in rows:
        row["clip_score"] = {field: [next(scores) for _ in row[field]] if isinstance(row[field], list) else next(scores)
                             for field in caption_fields(row)}


def row_or_none(line):
    try:
        return parse_row(line)
    except BadRow:
        return None


def write_scores(args, encode_names, encode, rank, chunk=8192):
    """--captions with scores to --score, a line for a line; one that is no row goes through as it is. After a kill or a full
    disk the same command goes on behind the last complete chunk of OUT.partial; OUT.partial.json says of what it is."""
    partial = args.score + ".partial"
    about = {path: [os.path.getsize(path), os.path.getmtime(path)] for path in (args.captions, args.checkpoint)}
    about["image_root"], done = args.image_root, 0
    if rank == 0:  # the others' disks may be others
        if os.path.exists(args.score):
            die(f"--score {args.score} exists")
        held = lock(args.score + ".lock", "--score " + args.score)
        if os.path.exists(partial + ".json"):
            with open(partial + ".json") as header:
                if json.load(header) != about:
                    die(f"{partial} was begun with other rows or weights: remove it, or choose another name")
        with open(partial + ".json.tmp", "w") as header:
            json.dump(about, header)
        os.replace(partial + ".json.tmp", partial + ".json")
        with open(partial, "a+b") as rows:
            rows.seek(0)
            done = sum(line.endswith(b"\n") for line in rows) // chunk * chunk
            rows.seek(0)
            rows.truncate(sum(map(len, islice(rows, done))))
    done = int(all_reduce(torch.tensor(done)))
    with open_rows(args.captions) as f:
        lines, progress = islice(f, done, None), tqdm(desc="rows", unit="row", initial=done, disable=rank > 0)
        while some := list(islice(lines, chunk)):
            rows = [row_or_none(line) for line in some]
            found = [row for row in rows if row is not None]
            add_scores(found, encode_names([row.get("image") for row in found], all_may_fail=True), encode)
            if rank == 0:
                with open(partial, "ab") as out:
                    out.writelines(line.rstrip(b"\n") + b"\n" if row is None else json.dumps(row).encode() + b"\n"
                                   for line, row in zip(some, rows))
                    out.flush()
                    os.fsync(out.fileno())
            progress.update(len(some))
    progress.close()
    if rank == 0:
        os.replace(partial, args.score)
        os.remove(partial + ".json")
        os.remove(held.name)
