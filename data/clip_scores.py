"""Add `clip_score` to every row: how well each of its texts fits its image, by a CLIP checkpoint.

    python -m data.clip_scores --checkpoint clip.pt --captions rows.jsonl --image-root DIR --output OUT.jsonl
    torchrun --nproc_per_node 8 -m data.clip_scores --checkpoint clip.pt --captions rows.jsonl ...

train_clip.py --alt-choice best and data/filter_captions.py --min-score, --min-gain read it. After a kill or a
full disk the same command continues after the last complete chunk of OUTPUT.partial.
"""
import json
import os
from functools import partial
from itertools import islice

import torch
from tqdm import tqdm

from eval_retrieval import parse_args, rows_parser
from eval_zeroshot import load_encoder
from data.common import die, in_one_line, lock, open_rows, parse_row
from train_clip import all_reduce, open_image, rank

CHUNK = 8192  # rows that are written together


def caption_fields(row):
    return [key for key in row if key in ("alt", "vec", "vecap") or key.startswith("rewrite_")]


def add_scores(rows, images, encode_texts):
    """Add `clip_score` to the rows; images [n, d]: the features of their images.

    For every caption field it has the cosine of image and text (Hessel et al. 2021, without the factor 2.5):
    a list for a list, null where the text or the image is missing."""
    texts = [(i, text) for i, row in enumerate(rows) for field in caption_fields(row)
             for text in (row[field] if isinstance(row[field], list) else [row[field]])]
    usable = [k for k, (i, text) in enumerate(texts)
              if isinstance(text, str) and text.strip() and images[i].any()]
    scores = [None] * len(texts)
    if usable:
        owners, captions = zip(*(texts[k] for k in usable))
        for k, score in zip(usable, (encode_texts(captions) * images[list(owners)]).sum(1).tolist()):
            scores[k] = round(score, 5)
    scores = iter(scores)
    for row in rows:
        row["clip_score"] = {}
        for field in caption_fields(row):
            score = [next(scores) for _ in row[field]] if isinstance(row[field], list) else next(scores)
            row["clip_score"][field] = score


def begin(args, partial_output):
    """Lock OUTPUT and cut OUTPUT.partial after its last complete chunk. -> (how many rows it has, the lock)

    OUTPUT.partial.json says which rows and weights it was made from."""
    inputs = {path: [os.path.getsize(path), os.path.getmtime(path)]
              for path in (args.captions, args.checkpoint)}
    inputs["image_root"] = args.image_root
    if os.path.exists(args.output):
        die(f"--output {args.output} exists")
    held = lock(args.output + ".lock", "--output " + args.output)
    header = partial_output + ".json"
    if os.path.exists(header):
        with open(header) as f:
            if json.load(f) != inputs:
                die(f"{partial_output} is of other rows or weights: remove it, or choose another name")
    with open(header + ".tmp", "w") as f:
        json.dump(inputs, f)
    os.replace(header + ".tmp", header)
    with open(partial_output, "a+b") as f:
        f.seek(0)
        done = sum(line.endswith(b"\n") for line in f) // CHUNK * CHUNK
        f.seek(0)
        f.truncate(sum(map(len, islice(f, done))))
    return done, held


def write_scores(args, encoder):
    """A line for a line; a line that is no row goes through as it is."""
    partial_output, done, held = args.output + ".partial", 0, None
    if rank() == 0:  # the other ranks may have other disks
        done, held = begin(args, partial_output)
    done = int(all_reduce(torch.tensor(done)))
    read = partial(open_image, args.image_root)
    progress = tqdm(desc="rows", unit="row", initial=done, disable=rank() > 0)
    with open_rows(args.captions) as f, progress:
        lines = islice(f, done, None)
        while chunk := list(islice(lines, CHUNK)):
            parsed = [parse_row(line) for line in chunk]
            rows = [row for row, why in parsed if why is None]
            images = encoder.encode_images([row.get("image") for row in rows], read, all_may_fail=True)
            add_scores(rows, images, encoder.encode_texts)
            if rank() == 0:
                with open(partial_output, "ab") as out:
                    for line, (row, why) in zip(chunk, parsed):
                        out.write((line.rstrip(b"\n") if why else json.dumps(row).encode()) + b"\n")
                    out.flush()
                    os.fsync(out.fileno())
            progress.update(len(chunk))
    if rank() == 0:
        os.replace(partial_output, args.output)
        os.remove(partial_output + ".json")
        os.remove(held.name)


@in_one_line
def main(argv=None):
    parser = rows_parser(__doc__)
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="must not exist yet")
    args = parse_args(parser, argv, "output")
    encoder = load_encoder(args)
    try:
        write_scores(args, encoder)
    except OSError as e:  # a full disk
        die(f"--output {args.output}: {e}; the same command continues {args.output}.partial")


if __name__ == "__main__":
    main()
