"""Retrieval with a CLIP checkpoint: recall@1, 5, 10 from image to text and from text to image, and search.

    python eval_retrieval.py --checkpoint runs/laclip/checkpoint.pt --captions coco_test.jsonl --image-root coco
    python eval_retrieval.py --checkpoint runs/laclip/checkpoint.pt --captions a.jsonl --image-root DIR --query "a red bike"

A row has any number of texts (COCO and Flickr30k: five). Image to text is right if any of the image's own texts is among
the first k, text to image if its image is. The similarity matrix is never whole in memory. An image that cannot be read
counts as not found. Beside the recall stands what a random order would give.
"""
import argparse
import json
import os
import sys

import torch

from train_clip import die, encode_images, encode_texts, load_checkpoint, pick_device, read_rows, texts_of

KS = (1, 5, 10)
NEVER = 2 ** 62  # the rank of what is not found


def read_captions(path, field):
    """-> (image paths [N], texts [T], the image that each text belongs to [T])"""
    names, texts, owner = [], [], []
    for row in read_rows(path):
        if found := texts_of(row.get(field)):
            owner += [len(names)] * len(found)
            texts += found
            names.append(row.get("image"))
    if not texts:
        die(f"--captions {path}: no row has a text in {field!r}")
    return names, texts, torch.tensor(owner)


def rank_of_own(queries, keys, own, block=1024):
    """How many keys come before the best of a query's own. queries [Q, d], keys [K, d] -> [Q]

    own(start, end) gives bool [end - start, K]. Among equal similarities the earlier key comes first."""
    ranks = []
    for start in range(0, len(queries), block):
        similarity = queries[start:start + block] @ keys.T  # [block, K]
        mine = own(start, start + len(similarity))
        best, where = similarity.masked_fill(~mine, -torch.inf).max(1, keepdim=True)
        earlier = torch.arange(len(keys)) < where
        ranks.append(((similarity > best) | (similarity == best) & earlier).sum(1))
    return torch.cat(ranks)


def recalls(images, texts, owner):
    """images [N, d], texts [T, d], owner [T] -> {"i2t_r1": ..., "t2i_r1": ...} and the same with "_chance"."""
    i2t = rank_of_own(images, texts, lambda start, end: owner == torch.arange(start, end)[:, None])
    t2i = rank_of_own(texts, images, lambda start, end: owner[start:end, None] == torch.arange(len(images)))
    i2t[images.abs().sum(1) == 0] = NEVER  # an image that could not be read finds nothing
    t2i[images.abs().sum(1)[owner] == 0] = NEVER  # and is not found
    count = torch.bincount(owner, minlength=len(images)).double()  # texts an image
    figures = {}
    for k in KS:
        figures[f"i2t_r{k}"] = (i2t < k).double().mean().item()
        figures[f"t2i_r{k}"] = (t2i < k).double().mean().item()
        missed = torch.ones(len(images), dtype=torch.double)  # P(none of its texts among k drawn ones)
        for i in range(min(k, len(texts))):
            missed *= ((len(texts) - count - i) / (len(texts) - i)).clamp(min=0)
        figures[f"i2t_r{k}_chance"] = (1 - missed).mean().item()
        figures[f"t2i_r{k}_chance"] = min(1.0, k / len(images))
    return figures


def best_images(queries, images, names, k=5, block=1024):
    """For every query [Q, d] the k most similar images: [[{"image": ..., "score": ...}]]"""
    found = []
    for part in queries.split(block):
        scores, indices = (part @ images.T).topk(min(k, len(images)))
        found += [[{"image": names[i], "score": round(s, 4)} for s, i in zip(*pair)]
                  for pair in zip(scores.tolist(), indices.tolist())]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt of train_clip.py")
    parser.add_argument("--captions", required=True, help="JSONL with image and texts")
    parser.add_argument("--image-root", required=True, help="the folder that the rows' image paths start from")
    parser.add_argument("--field", default="alt", help="the texts, one or a list a row (default: %(default)s)")
    parser.add_argument("--query", nargs="+", metavar="TEXT", help="print the best images for these texts instead")
    parser.add_argument("--hits", metavar="OUT.jsonl", help="write every query's five best images, scores and truth")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--seed", type=int, default=0, help="nothing is drawn; kept for symmetry with the other scripts")
    parser.add_argument("--json", help="write the figures there too, as fractions of 1")
    args = parser.parse_args(argv)

    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    names, texts, owner = read_captions(args.captions, args.field)
    model, tokenizer, transform = load_checkpoint(args.checkpoint, pick_device(args.device))
    images, unreadable = encode_images(model, transform, args.image_root, names, args.batch_size, args.workers)
    for i, reason in unreadable.items():
        print(f"unreadable, counted as not found: {names[i]}: {reason}", file=sys.stderr)
    queries = args.query or texts
    features = encode_texts(model, tokenizer, queries)

    if args.hits:
        with open(args.hits, "w", encoding="utf-8") as f:
            for i, (query, hits) in enumerate(zip(queries, best_images(features, images, names))):
                truth = {} if args.query else {"truth": names[owner[i]]}
                f.write(json.dumps({"query": query, **truth, "hits": hits}) + "\n")
    if args.query:
        for query, hits in zip(queries, best_images(features, images, names)):
            print(query)
            for hit in hits:
                print(f"  {hit['score']:7.4f}  {hit['image']}")
        return

    figures = recalls(images, features, owner)
    print(f"{len(names)} images, {len(texts)} texts of {args.field}, {len(unreadable)} unreadable")
    print(f"{'%':16}" + "".join(f"{f'R@{k}':>8}{'chance':>8}" for k in KS))
    for way, name in (("i2t", "image to text"), ("t2i", "text to image")):
        print(f"{name:16}" + "".join(f"{100 * figures[f'{way}_r{k}']:8.2f}{100 * figures[f'{way}_r{k}_chance']:8.2f}"
                                     for k in KS))
    if args.json:
        with open(args.json, "w") as f:
            json.dump({**figures, "images": len(names), "texts": len(texts), "unreadable": len(unreadable)}, f, indent=1)


if __name__ == "__main__":
    main()
