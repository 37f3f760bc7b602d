"""Print the images that fit a text best, by a CLIP checkpoint.

    python -m data.search --checkpoint clip.pt --captions rows.jsonl --image-root DIR --query "a red bike"

The images are those of the rows; the rows' texts are not read. --hits is for `python -m data.view hits`.
"""
from functools import partial

from data.classification_sets import read_rows
from eval_retrieval import best_images, parse_args, rows_parser, write_hits
from eval_zeroshot import load_encoder
from train_clip import in_one_line, open_image, rank


@in_one_line()
def main(argv=None):
    parser = rows_parser(__doc__)
    parser.add_argument("--query", nargs="+", required=True, metavar="TEXT", help="one or more texts")
    parser.add_argument("--hits", metavar="OUT.jsonl", help="write each query with its ten best images")
    args = parse_args(parser, argv, "hits")
    encoder = load_encoder(args)
    names = list(dict.fromkeys(str(row["image"]) for row in read_rows(args.captions)))
    images = encoder.encode_images(names, partial(open_image, args.image_root))
    queries = encoder.encode_texts(args.query)
    if rank() > 0:
        return
    for query, (scores, indices) in zip(args.query, best_images(queries, images, k=5)):
        print(query, *(f"  {score:7.4f}  {names[i]}" for score, i in zip(scores, indices)), sep="\n")
    if args.hits:
        write_hits(args.hits, ({"query": query} for query in args.query), best_images(queries, images), names)


if __name__ == "__main__":
    main()
