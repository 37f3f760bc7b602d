"""Retrieval with a CLIP checkpoint: recall both ways, image to image, search, and CLIP scores.

    python eval_retrieval.py --checkpoint runs/laclip/checkpoint.pt --captions coco_test.jsonl --image-root coco
    torchrun --nproc_per_node 8 eval_retrieval.py --checkpoint runs/laclip/checkpoint.pt --captions coco_test.jsonl ...
    python eval_retrieval.py ... --captions gpr1200.jsonl --image-to-image              # mAP on the rows' label
    python eval_retrieval.py ... --query "a red bike"                                   # the best images
    python eval_retrieval.py ... --score scored.jsonl                                   # adds clip_score to every row

A row has any number of texts (COCO and Flickr30k: five). Image to text is right if any of the image's own texts is among
the first k, text to image if its image is (VeCLIP, section 4.1). Beside the recall stands what a random order would give.
An image that cannot be read is named and counts as not found. The similarity matrix is never whole in memory, and any
number of ranks gives the same figures. --hits writes what `data/page.py hits` shows as a gallery.
"""
import json
import math
import os
import sys
from functools import partial

import torch

from data.clip_scores import write_scores
from data.features import blocks, encode_images, encode_texts, label_of, read_rows, tell_left_out
from train_clip import (all_reduce, check_output, die, in_one_line, load_checkpoint, new_parser, number, open_image,
                        pick_device, start_ranks, texts_of)

KS = (1, 5, 10)
NEVER = 2 ** 62  # the rank of what is not found
SIMILARITIES = 2 ** 25  # in memory at a time
SHOWN = 10  # images a query in --hits


def read_captions(path, field):
    """-> (image paths [N], texts [T], the image that each text belongs to [T]); rows of the same image are one."""
    place, texts, owner, without = {}, [], [], []
    for row in read_rows(path):
        if found := texts_of(row.get(field)):
            owner += [place.setdefault(str(row["image"]), len(place))] * len(found)
            texts += found
        else:
            without.append((row["image"], row.get(field)))
    if not texts:
        die(f"--captions {path}: no row has a text in {field!r}")
    tell_left_out(without, field)
    return list(place), texts, torch.tensor(owner)


# === figures ==========================================================================================================

def similarity(queries, keys):
    """[Q, d], [K, d] -> [Q, K]; an image that could not be read, a key of zeros, comes behind all others."""
    return (queries @ keys.T).masked_fill_((keys == 0).all(1), -2.0)


def rank_of_own(queries, keys, own):
    """How many keys come before the best of a query's own. queries [Q, d], keys [K, d] -> [Q]

    own(start, end) gives bool [end - start, K]. Among equal similarities the earlier key comes first."""
    ranks = torch.zeros(len(queries), dtype=torch.long)
    for start, end in blocks(len(queries), max(1, SIMILARITIES // len(keys))):
        found = similarity(queries[start:end], keys)
        best, where = found.masked_fill(~own(start, end), -torch.inf).max(1, keepdim=True)
        earlier = torch.arange(len(keys)) < where
        ranks[start:end] = ((found > best) | (found == best) & earlier).sum(1)
    return all_reduce(ranks)


def ranks_both_ways(images, texts, owner):
    """images [N, d], texts [T, d], owner [T], the image of each text -> (image to text [N], text to image [T]), from 0"""
    i2t = rank_of_own(images, texts, lambda start, end: owner == torch.arange(start, end)[:, None])
    t2i = rank_of_own(texts, images, lambda start, end: owner[start:end, None] == torch.arange(len(images)))
    unreadable = (images == 0).all(1)
    return i2t.masked_fill(unreadable, NEVER), t2i.masked_fill(unreadable[owner], NEVER)


def recalls(i2t, t2i, owner):
    """The ranks of both ways, owner [T] -> {"i2t_r1": ..., "t2i_r1": ...} and the same with "_chance"."""
    count = torch.bincount(owner, minlength=len(i2t)).double()  # texts an image
    figures = {}
    for k in KS:
        figures[f"i2t_r{k}"] = (i2t < k).double().mean().item()
        figures[f"t2i_r{k}"] = (t2i < k).double().mean().item()
        missed = torch.ones(len(i2t), dtype=torch.double)  # P(none of its texts among k drawn ones)
        for i in range(min(k, len(t2i))):
            missed *= ((len(t2i) - count - i) / (len(t2i) - i)).clamp(min=0)
        figures[f"i2t_r{k}_chance"] = (1 - missed).mean().item()
        figures[f"t2i_r{k}_chance"] = min(1.0, k / len(i2t))
    return figures


def average_precisions(images, labels):
    """GPR1200's rule (VeCLIP, section 4.1): every image is a query, all others are ranked, those of its label are right.

    images [N, d], labels [N] -> [N], the mean over its right images of the precision at their places. An image that
    could not be read scores 0 and is found last; one without another of its label is no query: nan."""
    found = torch.zeros(len(images), dtype=torch.double)
    for start, end in blocks(len(images), max(1, SIMILARITIES // len(images))):
        order = similarity(images[start:end], images)
        order[torch.arange(end - start), torch.arange(start, end)] = -torch.inf  # itself: the last
        order = order.sort(descending=True, stable=True).indices[:, :-1]  # of equal ones the earlier first
        right = (labels[order] == labels[start:end, None]).double()
        precision = right.cumsum(1) / torch.arange(1, len(images))
        found[start:end] = (precision * right).sum(1) / right.sum(1)
    return all_reduce(found).where((images != 0).any(1) | found.isnan(), 0.0)


def best_images(queries, images, k=SHOWN, leave_out=False):
    """The k most similar images of every query [Q, d], best first -> [(scores, indices)]; `leave_out`: query i is image i,
    which is not its own match. An image that could not be read is none."""
    k = min(k, int((images != 0).any(1).sum()) - leave_out)
    for start in range(0, len(queries), size := max(1, SIMILARITIES // len(images))):
        found = similarity(queries[start:start + size], images)
        if leave_out:
            found[torch.arange(len(found)), torch.arange(start, start + len(found))] = -torch.inf
        indices = found.topk(max(k, 0)).indices.sort(1).values  # of equal ones the earlier first, as in the ranks
        scores, order = found.gather(1, indices).sort(descending=True, stable=True)
        yield from zip(scores.tolist(), indices.gather(1, order).tolist())


# === the command ======================================================================================================

def search(args, encode_names, encode, rank):
    """Prints the five best images of --captions for every --query."""
    names = list(dict.fromkeys(str(row["image"]) for row in read_rows(args.captions)))
    images, queries = encode_names(names), encode(args.query)
    if rank > 0:
        return
    for query, (scores, indices) in zip(args.query, best_images(queries, images, k=5)):
        print(query, *(f"  {score:7.4f}  {names[i]}" for score, i in zip(scores, indices)), sep="\n")
    if args.hits:
        write_hits(args.hits, ({"query": query} for query in args.query), best_images(queries, images), names)


def text_retrieval(args, encode_names, encode, rank):
    """-> the figures of --captions, fractions of 1"""
    names, texts, owner = read_captions(args.captions, args.field)
    images, texts_features = encode_names(names), encode(texts)
    i2t, t2i = ranks_both_ways(images, texts_features, owner)
    figures = recalls(i2t, t2i, owner)
    if rank > 0:
        return
    print(f"{len(names)} images, {len(texts)} texts of {args.field}, {int((images == 0).all(1).sum())} unreadable")
    print(f"{'%':16}" + "".join(f"{f'R@{k}':>8}{'chance':>8}" for k in KS))
    for way, name in (("i2t", "image to text"), ("t2i", "text to image")):
        print(f"{name:16}" + "".join(f"{100 * figures[f'{way}_r{k}']:8.2f}{100 * figures[f'{way}_r{k}_chance']:8.2f}"
                                     for k in KS))
    if args.hits:
        own = [names[i] for i in owner]
        write_hits(args.hits, ({"query": text, "truth": name, "rank": place + 1 if place < NEVER else None} for
                               text, name, place in zip(texts, own, t2i.tolist())),
                   best_images(texts_features, images), names, names, own)
    return {**figures, "images": len(names), "texts": len(texts), "unreadable": int((images == 0).all(1).sum())}


def image_retrieval(args, encode_names, rank):
    """-> {"map": ..., and of every domain}"""
    every = list(read_rows(args.captions))
    rows = [row for row in every if label_of(row.get("label"))]
    if not rows:
        die(f"--captions {args.captions}: no row has a label")
    tell_left_out([(row["image"], row.get("label")) for row in every if not label_of(row.get("label"))], "label")
    names, keys = [row["image"] for row in rows], [label_of(row["label"]) for row in rows]
    number_of = {key: i for i, key in enumerate(sorted(set(keys)))}
    images = encode_names(names)
    found = average_precisions(images, torch.tensor([number_of[key] for key in keys]))
    if found.isnan().all():
        die(f"--captions {args.captions}: no two images have the same label")
    groups = {"map": found}
    for domain in sorted({row["domain"] for row in rows if isinstance(row.get("domain"), str)}):
        groups[f"map_{domain}"] = found[[row.get("domain") == domain for row in rows]]
    figures = {name: values.nanmean().item() for name, values in groups.items() if not values.isnan().all()}
    if rank > 0:
        return
    print(f"{len(names)} images of {len(number_of)} labels, {int(found.isnan().sum())} the only one of its label, no query")
    for name, value in figures.items():
        print(f"{name:24}{100 * value:8.2f} %")
    if args.hits:
        write_hits(args.hits, ({"image": name, "truth": key, "average_precision": None if math.isnan(ap) else ap} for
                               name, key, ap in zip(names, keys, found.tolist())),
                   best_images(images, images, leave_out=True), names, keys, keys)
    return {**figures, "images": len(names), "labels": len(number_of), "alone": int(found.isnan().sum())}


def write_hits(path, queries, found, names, keys=None, own=None):
    """One line a query with its best images; image i is correct if keys[i] is the query's own key, if there are keys."""
    with open(path, "w") as f:
        for number, (query, (scores, indices)) in enumerate(zip(queries, found)):
            hits = [{"image": names[i], "score": round(score, 4)} for score, i in zip(scores, indices)]
            if keys:
                for hit, i in zip(hits, indices):
                    hit["correct"] = keys[i] == own[number]
            f.write(json.dumps({**query, "hits": hits}) + "\n")


@in_one_line()
def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint.pt of train_clip.py, or of data/convert_checkpoint.py")
    add("--captions", required=True, help="JSONL with image and texts")
    add("--image-root", required=True, help="the folder that the rows' image paths start from")
    add("--field", default="alt", help="the texts, one or a list a row (default: %(default)s)")
    what = parser.add_mutually_exclusive_group().add_argument
    what("--image-to-image", action="store_true", help="mAP of images with the same label, also per `domain` if rows have it")
    what("--query", nargs="+", metavar="TEXT", help="print the best images for these texts")
    what("--score", metavar="OUT.jsonl", help="write the rows with clip_score, for --alt-choice best and filter_captions.py")
    add("--hits", metavar="OUT.jsonl", help="write every query with its best images, for `data/page.py hits`")
    add("--batch-size", type=number(int, 1), default=64)
    add("--workers", type=number(int, 0), default=2, help="processes that read images (default: %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--seed", type=number(int, 0), default=0, help="nothing is drawn")
    add("--json", help="write the figures there too, as fractions of 1")
    args = parser.parse_args(argv)
    for path in filter(None, (args.json, args.hits, args.score)):
        check_output(path, args.captions, args.checkpoint)
    if args.hits and args.hits == args.json:
        die(f"--hits and --json: two files, not both {args.hits}")
    if args.score and (args.hits or args.json) or args.query and args.json:
        die("--score writes neither --hits nor --json, --query no --json")
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    if not os.path.isfile(args.captions):
        die(f"--captions {args.captions}: no such file")

    device = pick_device(args.device)
    rank, _ = start_ranks(device)
    model, tokenizer, transform = load_checkpoint(args.checkpoint, device)
    encode = partial(encode_texts, model, tokenizer)
    encode_names = partial(encode_images, model, transform, read=partial(open_image, args.image_root),
                           batch_size=args.batch_size, workers=args.workers)
    if args.score:
        try:
            return write_scores(args, encode_names, encode, rank)
        except OSError as e:  # a full disk
            die(f"--score {args.score}: {e}; the same command goes on with {args.score}.partial")
    if args.query:
        return search(args, encode_names, encode, rank)
    figures = image_retrieval(args, encode_names, rank) if args.image_to_image else \
        text_retrieval(args, encode_names, encode, rank)
    if args.json and rank == 0:
        with open(args.json, "w") as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    main()
