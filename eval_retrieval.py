"""Retrieval with a CLIP checkpoint: recall@1, 5 and 10 both ways, and mAP of images with one label.

    python eval_retrieval.py --checkpoint clip.pt --captions coco_test.jsonl --image-root DIR
    torchrun --nproc_per_node 8 eval_retrieval.py --checkpoint clip.pt --captions coco_test.jsonl \\
        --image-root DIR --json out.json --hits hits.jsonl
    python eval_retrieval.py --checkpoint clip.pt --captions gpr1200.jsonl --image-root DIR \\
        --image-to-image

A row has any number of texts (COCO and Flickr30k: five). Image to text is right if one of the
image's own texts is among the first k, text to image if the text's image is (VeCLIP, section 4.1).
The table also shows the recall of a random order (chance). An unreadable image is named on stderr
and counts as not found. The similarity matrix is never whole in memory. The metrics do not depend
on the number of ranks. eval_zeroshot.py has how images and texts become features.
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
from data.texts import texts_of
from eval_zeroshot import load_encoder
from train_clip import open_image

KS = (1, 5, 10)
NEVER = 2 ** 62  # the rank of an image that is not found
SIMILARITIES = 2 ** 25  # in memory at a time


# === metrics ======================================================================================

def similarity(queries, keys):
    """[Q, d], [K, d] -> [Q, K]. An unreadable image, a key of zeros, comes after all others."""
    return (queries @ keys.T).masked_fill_((keys == 0).all(1), -2.0)


def ranks_of_best(queries, keys, is_right):
    """How many keys come before the best of a query's right ones. [Q, d], keys [K, d] -> [Q]

    is_right(start, end) -> bool [end - start, K]. Of equal similarities the earlier key wins."""
    ranks = torch.zeros(len(queries), dtype=torch.long)
    for start, end in blocks(len(queries), max(1, SIMILARITIES // len(keys))):
        similarities = similarity(queries[start:end], keys)
        right = similarities.masked_fill(~is_right(start, end), -torch.inf)
        best, place = right.max(1, keepdim=True)
        earlier = torch.arange(len(keys)) < place
        ranks[start:end] = ((similarities > best) | (similarities == best) & earlier).sum(1)
    return all_reduce(ranks)


def ranks_both_ways(images, texts, owner):
    """images [N, d], texts [T, d]; owner [T]: the image of each text. -> ranks from 0: image to
    text [N], text to image [T]"""
    def text_is_right(start, end):
        return owner == torch.arange(start, end)[:, None]

    def image_is_right(start, end):
        return owner[start:end, None] == torch.arange(len(images))

    i2t = ranks_of_best(images, texts, text_is_right)
    t2i = ranks_of_best(texts, images, image_is_right)
    unreadable = (images == 0).all(1)
    return i2t.masked_fill(unreadable, NEVER), t2i.masked_fill(unreadable[owner], NEVER)


def recalls(i2t, t2i, owner):
    """Ranks both ways, owner [T] -> {"i2t_r1": ...}, and with "_chance" of a random order"""
    N, T = len(i2t), len(t2i)
    own_texts = torch.bincount(owner, minlength=N).double()
    metrics = {}
    for k in KS:
        metrics[f"i2t_r{k}"] = (i2t < k).double().mean().item()
        metrics[f"t2i_r{k}"] = (t2i < k).double().mean().item()
        missed = torch.ones(N, dtype=torch.double)  # P(none of its texts is among k drawn ones)
        for i in range(min(k, T)):
            missed *= ((T - own_texts - i) / (T - i)).clamp(min=0)
        metrics[f"i2t_r{k}_chance"] = (1 - missed).mean().item()
        metrics[f"t2i_r{k}_chance"] = min(1.0, k / N)
    return metrics


def average_precisions(images, labels):
    """GPR1200's rule (VeCLIP, section 4.1): every image is a query; its label's others are right.

    images [N, d], labels [N] -> [N], the mean of the precisions at the places of the right images.
    An unreadable image scores 0 and is found last. An image that is alone with its label is no
    query: nan."""
    precisions = torch.zeros(len(images), dtype=torch.double)
    for start, end in blocks(len(images), max(1, SIMILARITIES // len(images))):
        order = similarity(images[start:end], images)
        order[torch.arange(end - start), torch.arange(start, end)] = -torch.inf  # the query: last
        order = order.sort(descending=True, stable=True).indices[:, :-1]  # of equals the earlier
        right = (labels[order] == labels[start:end, None]).double()
        precision = right.cumsum(1) / torch.arange(1, len(images))
        precisions[start:end] = (precision * right).sum(1) / right.sum(1)
    return all_reduce(precisions).where((images != 0).any(1) | precisions.isnan(), 0.0)


# === the command ==================================================================================

def read_captions(path, field):
    """-> (image paths [N], texts [T], the image of each text [T]). Rows of one image are joined."""
    number_of, texts, owner, without = {}, [], [], []
    for row in image_rows(path):
        if row_texts := texts_of(row.get(field)):
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
    i2t, t2i = ranks_both_ways(images, text_features, owner)
    metrics, unreadable = recalls(i2t, t2i, owner), int((images == 0).all(1).sum())
    if rank() == 0:
        print(f"{len(names)} images, {len(texts)} texts of {args.field}, {unreadable} unreadable; "
              f"precision: {encoder.precision}")
        columns = [f"r{k}{chance}" for k in KS for chance in ("", "_chance")]
        print_table(["%", *(heading for k in KS for heading in (f"R@{k}", "chance"))],
                    [[title, *(f"{100 * metrics[f'{way}_{column}']:.2f}" for column in columns)]
                     for way, title in (("i2t", "image to text"), ("t2i", "text to image"))])
    if rank() == 0 and args.hits:
        truths = [names[i] for i in owner]
        queries = ({"query": text, "truth": name, "rank": place + 1 if place < NEVER else None}
                   for text, name, place in zip(texts, truths, t2i.tolist()))
        write_hits(args.hits, queries, best_images(text_features, images), names, names)
    return {**metrics, "images": len(names), "texts": len(texts), "unreadable": unreadable}


def read_labels(path):
    """-> image paths, labels and domains (or None) of the rows that have a label"""
    rows = list(image_rows(path))
    labelled = [row for row in rows if label_of(row.get("label"))]
    if not labelled:
        die(f"--captions {path}: no row has a label")
    tell_left_out([(row["image"], row.get("label")) for row in rows
                   if not label_of(row.get("label"))], "label")
    tell_spellings(path, [row["label"] for row in labelled])
    labels = [label_of(row["label"]) for row in labelled]
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
