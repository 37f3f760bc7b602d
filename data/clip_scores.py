"""Add `clip_score` to every row: how well each of its texts fits its image, by a CLIP checkpoint.

    python -m data.clip_scores --checkpoint clip.pt --captions rows.jsonl --image-root DIR \\
        --output OUT.jsonl
    torchrun --nproc_per_node 8 -m data.clip_scores --checkpoint clip.pt --captions rows.jsonl ...

data/filter_captions.py --min-score, --min-gain read it. With --best-field alt_best a row of several
AltTexts gets the one of the highest score as a field of its own, for train_clip.py --text alt_best.
After a kill or a full disk the same command continues after the last complete chunk.
"""
import math
import os
from contextlib import ExitStack
from functools import partial
from itertools import islice

import torch

from data.common import die, in_one_line, progress
from data.evaluation import check_readable, all_reduce, parse_args, rank, rows_parser
from data.rows import continued, open_rows, parse_row, to_line
from eval_zeroshot import load_encoder
from train_clip import open_image

CHUNK = 8192  # rows that are written together


def caption_fields(row):
    return [key for key in row if key in ("alt", "vec", "vecap") or key.startswith("rewrite_")]


def add_scores(rows, images, encode_texts):
    """Add `clip_score` to the rows; images [n, d]: the features of their images.

    For every caption field it has the cosine of image and text (Hessel et al. 2021, without the
    factor 2.5): a list for a list, null where the text or the image is missing."""
    texts = [(i, text) for i, row in enumerate(rows) for field in caption_fields(row)
             for text in (row[field] if isinstance(row[field], list) else [row[field]])]
    usable = [k for k, (i, text) in enumerate(texts)
              if isinstance(text, str) and text.strip() and images[i].any()]
    scores = [None] * len(texts)
    if usable:
        owners, captions = zip(*(texts[k] for k in usable))
        cosines = (encode_texts(captions) * images[list(owners)]).sum(1)
        for k, score in zip(usable, cosines.tolist()):
            scores[k] = round(score, 5)
    scores = iter(scores)
    for row in rows:
        row["clip_score"] = {}
        for field in caption_fields(row):
            if isinstance(row[field], list):
                row["clip_score"][field] = [next(scores) for _ in row[field]]
            else:
                row["clip_score"][field] = next(scores)


def add_best(row, field):
    """Add the AltText of the highest score; of several without a score it is the first."""
    if field in row:
        die(f"a row of --captions has {field} already: --best-field takes another name")
    texts, scores = row.get("alt"), row["clip_score"].get("alt")
    if not isinstance(texts, list):
        texts, scores = [texts], [scores]
    usable = [(-math.inf if score is None else score, text) for text, score in zip(texts, scores)
              if isinstance(text, str) and text.strip()]
    row[field] = max(usable, key=lambda pair: pair[0])[1] if usable else None


def settings_of(args, encoder):
    """What every byte of the output depends on"""
    files = {path: [os.path.getsize(path), os.path.getmtime(path)]
             for path in (args.captions, args.checkpoint)}
    return {**files, "image_root": args.image_root, "best_field": args.best_field,
            "precision": encoder.precision}


def write_scores(args, encoder):
    """A line for a line; a line that is no row goes through as it is."""
    with ExitStack() as stack:
        out, done = None, 0
        if rank() == 0:  # the other ranks may have other disks
            out = stack.enter_context(continued(args.output, settings_of(args, encoder), CHUNK))
            done = -1 if out.finished else out.done
        done = int(all_reduce(torch.tensor(done)))
        if done < 0:
            return print(f"{args.output} is finished") if out else None
        lines = islice(stack.enter_context(open_rows(args.captions)), done, None)
        bar = stack.enter_context(progress(initial=done, disable=None if out else True))
        while chunk := list(islice(lines, CHUNK)):
            parsed = [parse_row(line) for line in chunk]
            rows = [row for row, why in parsed if why is None]
            read = partial(open_image, args.image_root)
            names = [row.get("image") for row in rows]
            if not done:  # the first of all rows: is --image-root right?
                check_readable(names, read)
            done += len(chunk)
            add_scores(rows, encoder.encode_images(names, read, all_may_fail=True),
                       encoder.encode_texts)
            if args.best_field:
                for row in rows:
                    add_best(row, args.best_field)
            if out:
                out.append(line.rstrip(b"\n") + b"\n" if why else to_line(row)
                           for line, (row, why) in zip(chunk, parsed))
            bar.update(len(chunk))
        if out:
            out.finish()


@in_one_line
def main(argv=None):
    parser = rows_parser(__doc__)
    parser.add_argument("--output", required=True, metavar="OUT.jsonl")
    parser.add_argument("--best-field", metavar="NAME",
                        help="also write the AltText of the highest score there (default: off)")
    args = parse_args(parser, argv, "output")
    open_rows(args.captions).close()  # what is no JSONL is told before the model is loaded
    write_scores(args, load_encoder(args))


if __name__ == "__main__":
    main()
