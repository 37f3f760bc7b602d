"""Retrieval with a CLIP checkpoint: recall@1, 5 and 10 both ways, and mAP of images with the same label.

    python eval_retrieval.py --checkpoint clip.pt --captions coco_test.jsonl --image-root DIR
    torchrun --nproc_per_node 8 eval_retrieval.py --checkpoint clip.pt --captions coco_test.jsonl ...
    python eval_retrieval.py --checkpoint clip.pt --captions gpr1200.jsonl --image-root DIR --image-to-image
    python eval_retrieval.py --checkpoint clip.pt --captions test.jsonl --image-root DIR --device cpu

A row has any number of texts (COCO and Flickr30k: five). Image to text is right if one of the image's own
texts is among the first k, text to image if the text's image is (VeCLIP, section 4.1). The table also shows
the recall of a random order (chance). An unreadable image is named on stderr and counts as not found. The
similarity matrix is never whole in memory. The metrics do not depend on the number of ranks.
"""
import json
import math
import os
from functools import partial

import torch

from data.classification_sets import label_of, read_rows, tell_left_out
from eval_zeroshot import blocks, evaluation_parser, load_encoder
from train_clip import all_reduce, check_output, die, in_one_line, open_image, rank, texts_of

KS = (1, 5, 10)
NEVER = 2 ** 62  # the rank of an image that is not found
SIMILARITIES = 2 ** 25  # in memory at a time
SHOWN = 10  # images for each query in --hits


# === metrics ================================================================================================

def similarity(queries, keys):
    """[Q, d], [K, d] -> [Q, K]. An unreadable image, a key of zeros, comes after all others."""
    return (queries @ keys.T).masked_fill_((keys == 0).all(1), -2.0)


def ranks_of_best(queries, keys, is_right):
    """How many keys come before the best of a query's right ones. queries [Q, d], keys [K, d] -> [Q]

    is_right(start, end) -> bool [end - start, K]. Of equal similarities the earlier key comes first."""
    ranks = torch.zeros(len(queries), dtype=torch.long)
    for start, end in blocks(len(queries), max(1, SIMILARITIES // len(keys))):
        similarities = similarity(queries[start:end], keys)
        best, place = similarities.masked_fill(~is_right(start, end), -torch.inf).max(1, keepdim=True)
        earlier = torch.arange(len(keys)) < place
        ranks[start:end] = ((similarities > best) | (similarities == best) & earlier).sum(1)
    return all_reduce(ranks)


def ranks_both_ways(images, texts, owner):
    """images [N, d], texts [T, d]; owner [T]: the image of each text. -> ranks from 0: image to text [N],
    text to image [T]"""
    i2t = ranks_of_best(images, texts, lambda start, end: owner == torch.arange(start, end)[:, None])
    t2i = ranks_of_best(texts, images, lambda start, end: owner[start:end, None] == torch.arange(len(images)))
    unreadable = (images == 0).all(1)
    return i2t.masked_fill(unreadable, NEVER), t2i.masked_fill(unreadable[owner], NEVER)


def recalls(i2t, t2i, owner):
    """Ranks both ways, owner [T] -> {"i2t_r1": ..., "t2i_r1": ...}, and with "_chance" of a random order"""
    count = torch.bincount(owner, minlength=len(i2t)).double()  # texts of an image
    metrics = {}
    for k in KS:
        metrics[f"i2t_r{k}"] = (i2t < k).double().mean().item()
        metrics[f"t2i_r{k}"] = (t2i < k).double().mean().item()
        missed = torch.ones(len(i2t), dtype=torch.double)  # P(none of its texts among k drawn ones)
        for i in range(min(k, len(t2i))):
            missed *= ((len(t2i) - count - i) / (len(t2i) - i)).clamp(min=0)
        metrics[f"i2t_r{k}_chance"] = (1 - missed).mean().item()
        metrics[f"t2i_r{k}_chance"] = min(1.0, k / len(i2t))
    return metrics


def average_precisions(images, labels):
    """GPR1200's rule (VeCLIP, section 4.1): every image is a query; the other images of its label are right.

    images [N, d], labels [N] -> [N], the mean of the precisions at the places of the right images. An
    unreadable image scores 0 and is found last. An image that is alone with its label is no query: nan."""
    precisions = torch.zeros(len(images), dtype=torch.double)
    for start, end in blocks(len(images), max(1, SIMILARITIES // len(images))):
        order = similarity(images[start:end], images)
        order[torch.arange(end - start), torch.arange(start, end)] = -torch.inf  # the query itself comes last
        order = order.sort(descending=True, stable=True).indices[:, :-1]  # of equal ones the earlier first
        right = (labels[order] == labels[start:end, None]).double()
        precision = right.cumsum(1) / torch.arange(1, len(images))
        precisions[start:end] = (precision * right).sum(1) / right.sum(1)
    return all_reduce(precisions).where((images != 0).any(1) | precisions.isnan(), 0.0)


def best_images(queries, images, k=SHOWN, leave_out=False):
    """For every query [Q, d] the k most similar images, best first -> [(scores, indices)]. `leave_out`: query
    i is image i, which is not its own match. An unreadable image is never among them."""
    k = min(k, int((images != 0).any(1).sum()) - leave_out)
    for start in range(0, len(queries), size := max(1, SIMILARITIES // len(images))):
        similarities = similarity(queries[start:start + size], images)
        if leave_out:
            rows = torch.arange(len(similarities))
            similarities[rows, start + rows] = -torch.inf
        indices = similarities.topk(max(k, 0)).indices.sort(1).values  # of equal ones the earlier first
        scores, order = similarities.gather(1, indices).sort(descending=True, stable=True)
        yield from zip(scores.tolist(), indices.gather(1, order).tolist())


# === the command ============================================================================================

def read_captions(path, field):
    """-> (image paths [N], texts [T], the image of each text [T]). Rows of the same image are one image."""
    number_of, texts, owner, without = {}, [], [], []
    for row in read_rows(path):
        if row_texts := texts_of(row.get(field)):
            owner += [number_of.setdefault(str(row["image"]), len(number_of))] * len(row_texts)
            texts += row_texts
        else:
            without.append((row["image"], row.get(field)))
    if not texts:
        die(f"--captions {path}: no row has a text in {field!r}")
    tell_left_out(without, field)
    return list(number_of), texts, torch.tensor(owner)


def text_retrieval(args, encoder):
    """-> the metrics of --captions, fractions of 1"""
    names, texts, owner = read_captions(args.captions, args.field)
    images = encoder.encode_images(names, partial(open_image, args.image_root))
    text_features = encoder.encode_texts(texts)
    i2t, t2i = ranks_both_ways(images, text_features, owner)
    metrics, unreadable = recalls(i2t, t2i, owner), int((images == 0).all(1).sum())
    if rank() == 0:
        print(f"{len(names)} images, {len(texts)} texts of {args.field}, {unreadable} unreadable")
        print(f"{'%':16}" + "".join(f"{f'R@{k}':>8}{'chance':>8}" for k in KS))
        for way, title in (("i2t", "image to text"), ("t2i", "text to image")):
            values = [metrics[f"{way}_r{k}{chance}"] for k in KS for chance in ("", "_chance")]
            print(f"{title:16}" + "".join(f"{100 * value:8.2f}" for value in values))
    if rank() == 0 and args.hits:
        truths = [names[i] for i in owner]
        queries = ({"query": text, "truth": name, "rank": place + 1 if place < NEVER else None}
                   for text, name, place in zip(texts, truths, t2i.tolist()))
        write_hits(args.hits, queries, best_images(text_features, images), names, names, truths)
    return {**metrics, "images": len(names), "texts": len(texts), "unreadable": unreadable}


def image_retrieval(args, encoder):
    """-> {"map": ..., and of every domain "map_DOMAIN": ...}, fractions of 1"""
    every = list(read_rows(args.captions))
    rows = [row for row in every if label_of(row.get("label"))]
    if not rows:
        die(f"--captions {args.captions}: no row has a label")
    without = [(row["image"], row.get("label")) for row in every if not label_of(row.get("label"))]
    tell_left_out(without, "label")
    names, labels = [row["image"] for row in rows], [label_of(row["label"]) for row in rows]
    number_of = {label: i for i, label in enumerate(sorted(set(labels)))}
    images = encoder.encode_images(names, partial(open_image, args.image_root))
    precisions = average_precisions(images, torch.tensor([number_of[label] for label in labels]))
    if precisions.isnan().all():
        die(f"--captions {args.captions}: no two images have the same label")
    groups = {"map": precisions}
    for domain in sorted({row["domain"] for row in rows if isinstance(row.get("domain"), str)}):
        groups[f"map_{domain}"] = precisions[[row.get("domain") == domain for row in rows]]
    metrics = {name: group.nanmean().item() for name, group in groups.items() if not group.isnan().all()}
    alone = int(precisions.isnan().sum())
    if rank() == 0:
        print(f"{len(names)} images of {len(number_of)} labels; {alone} alone with their label: no queries")
        for name, value in metrics.items():
            print(f"{name:24}{100 * value:8.2f} %")
    if rank() == 0 and args.hits:
        queries = ({"image": name, "truth": label, "average_precision": None if math.isnan(value) else value}
                   for name, label, value in zip(names, labels, precisions.tolist()))
        write_hits(args.hits, queries, best_images(images, images, leave_out=True), names, labels, labels)
    return {**metrics, "images": len(names), "labels": len(number_of), "alone": alone}


def write_hits(path, queries, best, names, keys=None, truths=None):
    """A line for each query with its best images, for data/view.py. With keys, image i is correct if keys[i]
    is the query's truth."""
    with open(path, "w") as f:
        for number, (query, (scores, indices)) in enumerate(zip(queries, best)):
            hits = [{"image": names[i], "score": round(score, 4)} for score, i in zip(scores, indices)]
            for hit, i in zip(hits, indices):
                if keys:
                    hit["correct"] = keys[i] == truths[number]
            f.write(json.dumps({**query, "hits": hits}) + "\n")


def rows_parser(description):
    """The options of this script, data/clip_scores.py and data/search.py"""
    parser = evaluation_parser(description)
    parser.add_argument("--captions", required=True, help="JSONL with image and texts")
    parser.add_argument("--image-root", required=True, help="the folder that the image paths start from")
    return parser


def parse_args(parser, argv, *outputs):
    """One line now, not after hours, if an input is missing or one of the `outputs` cannot be written."""
    args = parser.parse_args(argv)
    for path in filter(None, (getattr(args, output) for output in outputs)):
        check_output(path, args.captions, args.checkpoint)
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    if not os.path.isfile(args.captions):
        die(f"--captions {args.captions}: no such file")
    return args


@in_one_line()
def main(argv=None):
    parser = rows_parser(__doc__)
    add = parser.add_argument
    add("--field", default="alt", help="the texts, one or a list in each row (default: %(default)s)")
    add("--image-to-image", action="store_true", help="mAP of images with the same label; also for each "
        "`domain`, if rows have one")
    add("--hits", metavar="OUT.jsonl", help="write each query with its best images, for data/view.py hits")
    add("--json", help="write the metrics there too, as fractions of 1")
    args = parse_args(parser, argv, "json", "hits")
    if args.hits and args.hits == args.json:
        die(f"--hits and --json: two files, not both {args.hits}")
    encoder = load_encoder(args)
    metrics = image_retrieval(args, encoder) if args.image_to_image else text_retrieval(args, encoder)
    if args.json and rank() == 0:
        with open(args.json, "w") as f:
            json.dump(metrics, f, indent=1)


if __name__ == "__main__":
    main()
