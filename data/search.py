"""Print the images that fit a text best, by a CLIP checkpoint.

    python -m data.search --checkpoint clip.pt --captions rows.jsonl --image-root DIR \\
        --query "a red bike"

The images are those of the rows; the rows' texts are not read. --hits is for `python -m data.view
hits`.
"""
import json
from functools import partial

from data.common import die, in_one_line
from data.evaluation import image_rows, parse_args, rank, rows_parser
from eval_zeroshot import load_encoder
from train_clip import open_image

SIMILARITIES = 2 ** 25  # in memory at a time
SHOWN = 10  # images for each query in --hits


def best_images(queries, images, k=SHOWN, leave_out=False):
    """For every query [Q, d] the k most similar images, best first -> [(scores, indices)], without
    unreadable ones. `leave_out`: query i is image i, which is not its own match."""
    unreadable = (images == 0).all(1)
    k = max(0, min(k, int((~unreadable).sum()) - leave_out))
    size = max(1, SIMILARITIES // len(images))
    for start in range(0, len(queries), size):
        similarities = (queries[start:start + size] @ images.T).masked_fill_(unreadable, -2.0)
        if leave_out:
            similarities.diagonal(start).fill_(-float("inf"))
        indices = similarities.topk(k).indices.sort(1).values  # of equals the earlier first
        scores, order = similarities.gather(1, indices).sort(descending=True, stable=True)
        yield from zip(scores.tolist(), indices.gather(1, order).tolist())


def write_hits(path, queries, best, names, keys=None):
    """A line for each query with its best images, for data/view.py. With keys, image i is correct
    if keys[i] is the query's truth."""
    with open(path, "w") as f:
        for query, (scores, indices) in zip(queries, best):
            hits = [{"image": names[i], "score": round(score, 4)}
                    for score, i in zip(scores, indices)]
            for hit, i in zip(hits, indices):
                if keys:
                    hit["correct"] = keys[i] == query["truth"]
            f.write(json.dumps({**query, "hits": hits}) + "\n")


@in_one_line
def main(argv=None):
    parser = rows_parser(__doc__)
    parser.add_argument("--query", nargs="+", required=True, metavar="TEXT",
                        help="one or more texts")
    parser.add_argument("--hits", metavar="OUT.jsonl",
                        help="write each query with its ten best images")
    args = parse_args(parser, argv, "hits")
    names = list(dict.fromkeys(row["image"] for row in image_rows(args.captions)))
    if not names:
        die(f"--captions {args.captions}: no rows")
    encoder = load_encoder(args)
    images = encoder.encode_images(names, partial(open_image, args.image_root))
    queries = encoder.encode_texts(args.query)
    if rank() > 0:
        return
    for query, (scores, indices) in zip(args.query, best_images(queries, images, k=5)):
        print(query, *(f"  {score:7.4f}  {names[i]}" for score, i in zip(scores, indices)),
              sep="\n")
    if args.hits:
        write_hits(args.hits, ({"query": query} for query in args.query),
                   best_images(queries, images), names)


if __name__ == "__main__":
    main()
