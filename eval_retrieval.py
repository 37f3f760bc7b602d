"""Retrieval with a CLIP checkpoint: recall@1, 5 and 10 both ways, and mAP of images by label.

    python eval_retrieval.py --checkpoint clip.pt --captions coco_test.jsonl --image-root DIR
    torchrun --nproc_per_node 8 eval_retrieval.py --checkpoint clip.pt --captions coco_test.jsonl \\
        --image-root DIR --json out.json --hits hits.jsonl
    python eval_retrieval.py --checkpoint clip.pt --captions gpr1200.jsonl --image-root DIR \\
        --image-to-image

A row has any number of texts (COCO and Flickr30k: five). Image to text is right if one of the
image's own texts is among the first k, text to image if the text's image is (VeCLIP, section 4.1).
The table also shows the recall of a random order (chance). An unreadable image is named on stderr
and counts as not found. The similarity matrix is never whole in memory. The metrics do not depend
on the number of ranks. eval_zeroshot.Encoder makes features of images and texts.
"""
import json
import math
from functools import partial

import torch

from data.class_names import tell_same_names
from data.common import die, in_one_line, print_table
from data.evaluation import (all_reduce, blocks, first_few, image_rows, label_of, parse_args, rank,
                             rows_parser, tell, tell_left_out, tell_spellings)
from data.search import best_images, write_hits
from data.texts import texts_of as usable_texts
from eval_zeroshot import load_encoder
from train_clip import open_image

KS = (1, 5, 10)
NEVER = 2 ** 62  # the place of an image that is not found
SIMILARITIES = 2 ** 25  # in memory at a time

# === metrics ======================================================================================
def similarity(queries, keys):
    """[Q, d], [K, d] -> [Q, K]. An unreadable image is a key of zeros and comes last."""
    return (queries @ keys.T).masked_fill_((keys == 0).all(1), -2.0)

def places_of_best(queries, keys, query_image, key_image):
    """How many keys come before the best of a query's right ones. [Q, d], keys [K, d] -> [Q]

    A key is right if its image's number, key_image [K], is the query's, query_image [Q]. Of equal
    similarities the earlier key wins."""
    places = torch.zeros(len(queries), dtype=torch.long)  # a rank fills its blocks; others add 0
    for start, end in blocks(len(queries), max(1, SIMILARITIES // len(keys))):  # this rank's
        similarities = similarity(queries[start:end], keys)
        wrong = query_image[start:end, None] != key_image  # [block, K]
        best, index = similarities.masked_fill(wrong, -torch.inf).max(1, keepdim=True)
        earlier = torch.arange(len(keys)) < index
        places[start:end] = ((similarities > best) | (similarities == best) & earlier).sum(1)
    return all_reduce(places)

def places_both_ways(images, texts, owner):
    """images [N, d], texts [T, d]; owner [T]: the image of each text. -> places from 0: image to
    text [N], text to image [T]"""
    numbers = torch.arange(len(images))
    i2t = places_of_best(images, texts, numbers, owner)
    t2i = places_of_best(texts, images, owner, numbers)
    unreadable = (images == 0).all(1)
    return i2t.masked_fill(unreadable, NEVER), t2i.masked_fill(unreadable[owner], NEVER)

def recalls(i2t, t2i, owner):
    """Places both ways, owner [T] -> {"i2t_r1": ...}, and with "_chance" of a random order"""
    N, T, metrics = len(i2t), len(t2i), {}
    texts_of_images = torch.bincount(owner, minlength=N).tolist()
    for k in KS:
        metrics[f"i2t_r{k}"] = (i2t < k).double().mean().item()
        metrics[f"t2i_r{k}"] = (t2i < k).double().mean().item()
        first = min(k, T)  # P(none of an image's n texts is among the first k of a random order)
        missed = [math.comb(T - n, first) / math.comb(T, first) for n in texts_of_images]
        metrics[f"i2t_r{k}_chance"] = 1 - sum(missed) / N
        metrics[f"t2i_r{k}_chance"] = min(1.0, k / N)
    return metrics

def average_precisions(images, labels):
    """GPR1200's rule (VeCLIP, section 4.1): every image is a query; its label's others are right.

    images [N, d], labels [N] -> [N], the mean of the precisions at the places of the right images.
    An unreadable image scores 0 and comes last. The only image of a label is no query: nan."""
    precisions = torch.zeros(len(images), dtype=torch.double)
    for start, end in blocks(len(images), max(1, SIMILARITIES // len(images))):
        similarities = similarity(images[start:end], images)
        similarities.diagonal(start).fill_(-torch.inf)  # the query itself: last
        order = similarities.argsort(descending=True, stable=True)[:, :-1]  # without the query
        right = (labels[order] == labels[start:end, None]).double()
        precision = right.cumsum(1) / torch.arange(1, len(images))
        precisions[start:end] = (precision * right).sum(1) / right.sum(1)
    precisions = all_reduce(precisions)
    return precisions.where((images != 0).any(1) | precisions.isnan(), 0.0)  # unreadable: 0

# === the command ==================================================================================
def read_captions(path, field):
    """-> (image paths [N], texts [T], the image of each text [T]). Rows of one image are joined."""
    number_of, texts, owner, without = {}, [], [], []
    for row in image_rows(path):
        if row_texts := usable_texts(row.get(field)):
            owner += [number_of.setdefault(row["image"], len(number_of))] * len(row_texts)
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
    i2t, t2i = places_both_ways(images, text_features, owner)
    metrics, unreadable = recalls(i2t, t2i, owner), int((images == 0).all(1).sum())
    if rank() == 0:
        print(f"{len(names)} images, {len(texts)} texts of {args.field}, {unreadable} unreadable; "
              f"precision: {encoder.precision}")
        table = []
        for way, title in (("i2t", "image to text"), ("t2i", "text to image")):
            values = [metrics[f"{way}_r{k}{chance}"] for k in KS for chance in ("", "_chance")]
            table.append([title, *(f"{100 * value:.2f}" for value in values)])
        print_table(["%", "R@1", "chance", "R@5", "chance", "R@10", "chance"], table)
    if rank() == 0 and args.hits:
        truths = [names[i] for i in owner]
        queries = ({"query": text, "truth": name, "rank": place + 1 if place < NEVER else None}
                   for text, name, place in zip(texts, truths, t2i.tolist()))
        write_hits(args.hits, queries, best_images(text_features, images), names, names)
    return {**metrics, "images": len(names), "texts": len(texts), "unreadable": unreadable}

def read_labels(path):
    """-> image paths, labels and domains (or None) of the rows that have a label"""
    rows = [(row, label_of(row.get("label"))) for row in image_rows(path)]
    labelled = [row for row, label in rows if label]
    if not labelled:
        die(f"--captions {path}: no row has a label")
    tell_left_out([(row["image"], row.get("label")) for row, label in rows if not label], "label")
    tell_spellings(path, [row["label"] for row in labelled])
    labels = [label for _, label in rows if label]
    classes = sorted(set(labels))
    tell_same_names(path, classes, [[label] for label in classes])
    return ([row["image"] for row in labelled], labels,
            [label_of(row.get("domain")) for row in labelled])

def image_retrieval(args, encoder):
    """-> {"map": ..., and of every domain "map_DOMAIN": ...}, fractions of 1"""
    names, labels, domains = read_labels(args.captions)
    number_of = {label: i for i, label in enumerate(sorted(set(labels)))}
    images = encoder.encode_images(names, partial(open_image, args.image_root))
    precisions = average_precisions(images, torch.tensor([number_of[label] for label in labels]))
    alone = [label for label, value in zip(labels, precisions.tolist()) if math.isnan(value)]
    if len(alone) == len(labels):
        die(f"--captions {args.captions}: no two images have the same label")
    if alone:
        tell(f"{len(alone)} images are alone with their label and no queries: {first_few(alone)}")
    groups = {"map": precisions}
    for domain in sorted({domain for domain in domains if domain}):
        groups[f"map_{domain}"] = precisions[[of_image == domain for of_image in domains]]
    metrics = {name: group.nanmean().item() for name, group in groups.items()
               if not group.isnan().all()}
    if rank() == 0:
        print(f"{len(names)} images of {len(number_of)} labels, {len(alone)} alone with theirs; "
              f"precision: {encoder.precision}")
        print_table(["%", "mAP"], [[name, f"{100 * value:.2f}"] for name, value in metrics.items()])
    if rank() == 0 and args.hits:
        queries = ({"image": name, "truth": label,
                    "average_precision": None if math.isnan(value) else value}
                   for name, label, value in zip(names, labels, precisions.tolist()))
        write_hits(args.hits, queries, best_images(images, images, leave_out=True), names, labels)
    return {**metrics, "images": len(names), "labels": len(number_of), "alone": len(alone)}

@in_one_line
def main(argv=None):
    parser = rows_parser(__doc__)
    add = parser.add_argument
    add("--field", default="alt", help="the texts, one or a list a row (default: %(default)s)")
    add("--image-to-image", action="store_true", help="mAP of images with the same label; also for "
        "each `domain`, if rows have one")
    add("--hits", metavar="OUT.jsonl",
        help="write each query with its best images, for data/view.py hits")
    add("--json", help="write the metrics there too, as fractions of 1")
    args = parse_args(parser, argv, "json", "hits")
    if args.hits and args.hits == args.json:
        die(f"--hits and --json: two files, not both {args.hits}")
    encoder = load_encoder(args)
    retrieve = image_retrieval if args.image_to_image else text_retrieval
    metrics = retrieve(args, encoder)
    if args.json and rank() == 0:
        with open(args.json, "w") as f:
            json.dump(metrics, f, indent=1)

if __name__ == "__main__":
    main()
