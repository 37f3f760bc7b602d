"""Zero-shot classification with a CLIP checkpoint: top-1, top-5, top-10 and the mean of the classes' accuracies.

    python eval_zeroshot.py --checkpoint runs/laclip/checkpoint.pt --dataset imagefolder:imagenet/val --classes names.json
    python eval_zeroshot.py --checkpoint runs/laclip/checkpoint.pt --dataset jsonl:test.jsonl --image-root DIR --json out.json

A class is the mean of its prompts' embeddings: normalise, average, normalise (Radford et al. 2021, section 3.1.4; both
papers). An image that cannot be read counts as wrong, is counted and named. Beside the accuracy stand what guessing and
what always answering the largest class would score.
"""
import argparse
import json
import os
import sys
from collections import Counter

import torch
import torch.nn.functional as F

from train_clip import die, encode_images, encode_texts, load_checkpoint, pick_device, read_rows, texts_of

TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prompts", "templates.txt")


def read_templates(path):
    """One template a line, with {} where the class name goes."""
    if not os.path.isfile(path):
        die(f"--templates {path}: no such file")
    with open(path, encoding="utf-8") as f:
        templates = [line.rstrip("\n") for line in f if line.strip()]
    for template in templates:
        if "{}" not in template:
            die(f"--templates {path}: no {{}} in {template!r}")
    return templates or die(f"--templates {path} is empty")


def read_dataset(spec, image_root, label_field):
    """imagefolder:DIR or jsonl:FILE -> (image root, paths, labels, one a path). A label is a class's key."""
    kind, _, path = spec.partition(":")
    names, labels = [], []
    if kind == "imagefolder":
        if not os.path.isdir(path):
            die(f"--dataset {spec}: no such folder")
        for label in sorted(entry.name for entry in os.scandir(path) if entry.is_dir()):
            files = sorted(entry.name for entry in os.scandir(os.path.join(path, label)) if entry.is_file())
            names += [os.path.join(label, file) for file in files]
            labels += [label] * len(files)
        image_root = path
    elif kind == "jsonl":
        if not image_root or not os.path.isdir(image_root):
            die(f"--dataset {spec} needs --image-root, the folder that its image paths start from; got {image_root}")
        for row in read_rows(path):
            if found := texts_of(row.get(label_field)):
                names.append(row.get("image"))
                labels.append(found[0])
        if not labels:
            die(f"--dataset {spec}: no row has the field {label_field!r}")
    else:
        die(f"--dataset {spec}: expected imagefolder:DIR or jsonl:FILE")
    if not names:
        die(f"--dataset {spec}: it is empty")
    return image_root, names, labels


def class_names(classes, path):
    """The words for each class: from a JSON object of key -> name (or list of names), else the key itself."""
    if path is None:
        return [[key.replace("_", " ")] for key in classes]
    try:
        with open(path, encoding="utf-8") as f:
            names = json.load(f)
    except (OSError, ValueError) as e:
        die(f"--classes {path}: {e}")
    if missing := [key for key in classes if not texts_of(names.get(key))]:
        die(f"--classes {path} has no name for {len(missing)} classes, {missing[0]!r} the first")
    return [texts_of(names[key]) for key in classes]


def classifier(model, tokenizer, names, templates):
    """[C, d]: for each class the normalised mean of the normalised embeddings of its prompts."""
    prompts = [[template.replace("{}", name) for name in synonyms for template in templates] for synonyms in names]
    features = encode_texts(model, tokenizer, [prompt for some in prompts for prompt in some])
    return F.normalize(torch.stack([part.mean(0) for part in features.split([len(some) for some in prompts])]), dim=-1)


def accuracies(features, weights, targets, block=4096):
    """features [N, d], weights [C, d], targets [N] -> {"top1": ..., ...}. Among equal scores the earlier class wins."""
    ranks = []
    for image, target in zip(features.split(block), targets.split(block)):
        scores = image @ weights.T  # [block, C]
        own = scores.gather(1, target[:, None])
        earlier = torch.arange(scores.shape[1]) < target[:, None]
        ranks.append(((scores > own) | (scores == own) & earlier).sum(1))
    rank = torch.cat(ranks)
    rank[features.abs().sum(1) == 0] = 2 ** 62  # an image that could not be read
    right = torch.zeros(len(weights)).index_add_(0, targets, (rank == 0).float())
    count = torch.bincount(targets, minlength=len(weights))
    figures = {f"top{k}": (rank < k).double().mean().item() for k in (1, 5, 10)}
    return {**figures, "mean_per_class": (right / count).mean().item(), "chance": 1 / len(weights),
            "largest_class": count.max().item() / len(targets), "images": len(targets), "classes": len(weights)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt of train_clip.py")
    parser.add_argument("--dataset", nargs="+", required=True, metavar="imagefolder:DIR|jsonl:FILE",
                        help="a folder of one folder a class, or rows with image and label")
    parser.add_argument("--image-root", help="the folder that the image paths of jsonl: start from")
    parser.add_argument("--label", default="label", metavar="FIELD", help="the class's field of jsonl: (default: label)")
    parser.add_argument("--classes", help="JSON object, folder or label -> class name or names (default: themselves)")
    parser.add_argument("--templates", default=TEMPLATES, help="a file, one a line (default: data/prompts/templates.txt)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--seed", type=int, default=0, help="nothing is drawn; kept for symmetry with the other scripts")
    parser.add_argument("--json", help="write the figures there too, as fractions of 1")
    args = parser.parse_args(argv)

    templates = read_templates(args.templates)
    datasets = {spec: read_dataset(spec, args.image_root, args.label) for spec in args.dataset}
    model, tokenizer, transform = load_checkpoint(args.checkpoint, pick_device(args.device))
    results = {}
    for spec, (root, names, labels) in datasets.items():
        classes = sorted(set(labels))
        weights = classifier(model, tokenizer, class_names(classes, args.classes), templates)
        features, unreadable = encode_images(model, transform, root, names, args.batch_size, args.workers)
        for i, reason in unreadable.items():
            print(f"unreadable, counted as wrong: {names[i]}: {reason}", file=sys.stderr)
        number = {key: i for i, key in enumerate(classes)}
        results[spec] = accuracies(features, weights, torch.tensor([number[label] for label in labels]))
        results[spec]["unreadable"] = len(unreadable)

    width = max(map(len, results))
    columns = ["top1", "top5", "top10", "mean_per_class", "chance", "largest_class"]
    print(f"{'%':{width}}" + "".join(f"{column:>16}" for column in columns) + f"{'images':>9}{'classes':>9}")
    for spec, figures in results.items():
        print(f"{spec:{width}}" + "".join(f"{100 * figures[column]:16.2f}" for column in columns) +
              f"{figures['images']:9d}{figures['classes']:9d}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
