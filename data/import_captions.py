"""Convert a known image-text data set to this project's JSONL: one line a row, one row an image.

    python -m data.import_captions laclip cc3m_original.csv cc3m.jsonl --rewrites bard=cc3m_bard.txt
    python -m data.import_captions tsv cc12m.tsv cc12m.jsonl
    python -m data.import_captions img2dataset /data/cc12m cc12m.jsonl --image-root /data
    python -m data.import_captions coco dataset_coco.json coco_test.jsonl --split test
    python -m data.import_captions vecap wit_300m-0?-of-10.json vecap.jsonl
    python -m data.import_captions folder photos photos.jsonl

Each reader yields rows; the comment above it links the documentation of its format. Nothing is
dropped silently: a row that lacks something says so in `error`, or is left out with --drop-errors,
and the summary counts it. A cell that holds a JSON list is a list of captions. COCO's JSON and the
names in a folder are held in memory; all else is streamed (img2dataset: the texts of one shard are
held). The texts stay as they are; data/filter_captions.py cleans them. This tool needs no torch.
"""
import contextlib
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter, defaultdict

from data.common import check_output, die, in_one_line, new_parser, progress
from data.import_files import (CAPTION_COLUMNS, ENDINGS, MAX_TEXT, csv_records, examples,
                               invalid_utf8, name_of, open_text, other_keys, passed_over,
                               remember)
from data.import_folder import folder
from data.import_shards import img2dataset
from data.rows import new_file, to_line

IMAGE_COLUMNS = ["filepath", "image", "image_path", "url"]  # a path before a URL, if both are there
is_url = re.compile(r"https?://", re.IGNORECASE).match


# laclip: github.com/LijieFan/LaCLIP, README "Pre-computed Augmented Texts" and data.py.
# *_original.csv has no header. Its columns are image path and caption, and in cc3m's also a URL.
# Line k of each .txt belongs to row k, so the counts must be equal. A comma-separated CSV of your
# own with a header is read as well; its other columns are kept.

def find_columns(first, args):
    """-> image column, caption column, URL column or None, names of the others by column"""
    names = [name.strip().lower() for name in first]

    def find(known):
        return next((names.index(name) for name in known if name in names), None)

    image = find([args.image_column.lower()] if args.image_column else IMAGE_COLUMNS)
    caption = find([args.caption_column.lower()] if args.caption_column else CAPTION_COLUMNS)
    if image is not None and caption is not None:
        url = find(["url"])
        others = {i: name.strip() for i, name in enumerate(first) if i not in (image, caption, url)}
        return image, caption, url, other_keys(others)
    headless = len(first) > 1 and (is_url(first[0]) or names[0].endswith(ENDINGS))
    if headless and not args.image_column and not args.caption_column:
        return 0, 1, 2 if len(first) > 2 and is_url(first[2]) else None, None
    images = args.image_column or "/".join(IMAGE_COLUMNS)
    captions = args.caption_column or "/".join(CAPTION_COLUMNS)
    die(f"{args.input}: expected columns {images} and {captions} (see --image-column, "
        f"--caption-column); its first line is: {','.join(first)[:200]}")


def read_csv(args):
    """Yield one row for each CSV record."""
    records = csv_records(args.input)
    first = next(records, [])
    image, caption, url, others = find_columns(first, args)
    if others is None:  # no header
        records, others = itertools.chain([first], records), {}
    for record in records:
        if len(record) <= max(image, caption):
            yield {"line": ",".join(record), "error": {"line": "too few columns"}}
            continue
        # `image` is a path below the image root, so a URL goes to `url`
        row = {"url" if is_url(record[image]) else "image": record[image], "alt": record[caption]}
        if url is not None and len(record) > url:
            row["url"] = record[url]
        yield row | {name: record[i] for i, name in others.items() if i < len(record)}


def laclip(args):
    sources, counts = {}, Counter()
    for item in args.rewrites:
        source, _, path = item.partition("=")
        if not path or not re.fullmatch(r"[A-Za-z0-9_-]+", source) or source in sources:
            die(f"--rewrites {item}: expected SOURCE=FILE.txt, each source once, as in "
                "bard=cc3m_bard.txt")
        sources[source] = path
    with contextlib.ExitStack() as stack:
        texts = [stack.enter_context(open_text(path)) for path in sources.values()]
        for row, *lines in itertools.zip_longest(read_csv(args), *texts):
            counts.update(k for k, entry in enumerate((row, *lines)) if entry is not None)
            if row is not None and None not in lines:  # else go on counting, for the message
                rewrites = zip(sources, lines)
                yield row | {f"rewrite_{source}": line.rstrip("\r\n") for source, line in rewrites}
    for k, path in enumerate(sources.values(), start=1):
        if counts[k] != counts[0]:
            die(f"{args.input} has {counts[0]} rows but {path} {counts[k]} lines; line k must be "
                "of row k")


# tsv: CC3M is "caption TAB url" (ai.google.com/research/ConceptualCaptions/download), CC12M "url
# TAB caption" (github.com/google-research-datasets/conceptual-12m, README "Format"). Neither has a
# header, but img2dataset's recipes for both tell the user to add one.

def tsv(args):
    try:
        distinct = args.image_pattern.format(index=0) != args.image_pattern.format(index=1)
    except (LookupError, ValueError, AttributeError, TypeError):
        distinct = False
    if not distinct:
        die(f"--image-pattern {args.image_pattern}: expected a name with {{index}}, as in "
            "{index:08d}.jpg")
    orders, index = [["url", "caption"], ["caption", "url"]], 0
    with open_text(args.input) as lines:
        for number, line in enumerate(lines):
            cells = line.rstrip("\r\n").split("\t")
            if number == 0 and cells in orders:
                continue
            order = None
            if len(cells) == 2 and args.columns:
                order = args.columns.split(",")
            elif len(cells) == 2:
                # The order of the row before comes first: it decides when both cells are URLs
                order = next((o for o in orders if is_url(cells[o.index("url")])), None)
            if order:
                orders.sort(key=lambda o: o != order)
                cell = dict(zip(order, cells))
                row = {"url": cell["url"], "alt": cell["caption"]}
            else:
                row = {"line": line.rstrip("\r\n"),
                       "error": {"line": "not one URL and one caption"}}
            if order and args.images:
                name = args.image_pattern.format(index=index)
                found = os.path.isfile(os.path.join(args.images, name))
                row |= {"image": name} if found else {"error": {"image": "missing file"}}
            index += 1
            yield row


# coco: captions_train2014.json and the like, cocodataset.org/#format-data ("images" with id and
# file_name, "annotations" with image_id and caption); and Karpathy's splits, on which COCO and
# Flickr30k retrieval is reported, cs.stanford.edu/people/karpathy/deepimagesent
# /caption_datasets.zip ("images" with filename, split, sentences[].raw, and filepath for COCO).
# Each is below 200 MB, so it is loaded whole.

def coco(args):
    with open_text(args.input) as f:
        try:
            data = json.load(f)
        except (ValueError, RecursionError) as e:
            die(f"{args.input}: not valid JSON ({e})")

    def place(*parts):
        return "/".join(part.rstrip("/") for part in (args.images_dir, *parts) if part)

    try:
        if "annotations" not in data:  # Karpathy's
            splits = sorted({image["split"] for image in data["images"]})
            if not set(args.split) <= set(splits):
                die(f"--split {' '.join(args.split)}: {args.input} has {', '.join(splits)}")
            rows = [{"image": place(image.get("filepath"), image["filename"]),
                     "alt": [sentence["raw"] for sentence in image["sentences"]]}
                    for image in data["images"] if image["split"] in (args.split or splits)]
        else:
            if args.split:
                die(f"--split: {args.input} is COCO's own JSON, which has one split in each file")
            captions = defaultdict(list)
            for annotation in data["annotations"]:
                captions[annotation["image_id"]].append(annotation["caption"])
            rows = [{"image": place(image["file_name"]), "alt": captions.pop(image["id"], [])}
                    for image in data["images"]]
            rows += [{"alt": texts, "error": {"image": "not in images"}}
                     for texts in captions.values()]
    except (KeyError, TypeError, AttributeError):
        die(f"{args.input}: neither COCO captions (images, annotations with a caption) nor "
            "Karpathy's splits (images with filename, split, sentences)")
    yield from rows


# vecap: github.com/apple/ml-veclip, README "VeCap-300M Download": ten JSON files, "for each image,
# we save the web link and our caption". Its upload_dataset.py shows the layout: {url: caption},
# without the AltText. 30 million pairs are too many for json.load: they are read in chunks.

PAIR_HEAD = re.compile(r'\s*[{,]\s*("[^"\\]*+(?:\\.[^"\\]*+)*+")\s*:\s*', re.DOTALL)


def read_pairs(path):
    """Yield the (key, value) pairs of one JSON object of any size; about 1 MiB is in memory."""
    decode = json.JSONDecoder(strict=False).raw_decode
    buffer, at, pairs = "", 0, 0
    with open_text(path) as f:
        while True:
            try:
                head = PAIR_HEAD.match(buffer, at)
                key, value_at = decode(head[1])[0], head.end()
                value, at = decode(buffer, value_at)
            except (TypeError, ValueError, RecursionError):  # it ends beyond the buffer, or is none
                more = f.read(1 << 20)
                buffer, at = buffer[at:] + more, 0
                if not more or len(buffer) > MAX_TEXT:
                    break
                continue
            pairs += 1
            yield key, value
    if buffer.strip() != "}":
        die(f'{path}: cut off after {pairs} pairs, or not one JSON object of "url": "caption" '
            "pairs")


def vecap(args):
    for path in args.input:
        for url, text in read_pairs(path):
            yield {"url": url, "vecap": text}


# Writing is the same for all. What is no text becomes null with a reason; the file is complete or
# absent.

KINDS = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a boolean"}


def captions_of(value, nested=False):
    """What a caption field holds, perhaps as JSON in a cell. -> (a text, a list of texts and nulls,
    or None; why something is null: a reason, a list of reasons and nulls, or None)"""
    if isinstance(value, str):
        text = value.strip()
        if text[:1] + text[-1:] in ("[]", "{}"):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):  # brackets may be a part of a text: [photo]
                if re.match(r"[\[{]\s*[\[{'\"]", text):
                    return None, "looks like a list, but is no JSON"
    if isinstance(value, list) and not nested:
        texts, reasons = zip(*(captions_of(entry, nested=True) for entry in value or [None]))
        if any(text and text.strip() for text in texts):
            return list(texts), list(reasons) if any(reasons) else None
        return None, next(filter(None, reasons), "no text")
    if nested and (value is None or isinstance(value, str)):
        return value, None
    if value is None or isinstance(value, str) and not value.strip():
        return None, "no text"
    return (value, None) if isinstance(value, str) else (None, f"{KINDS[type(value)]}, not a text")


def finish(row):
    """Replace what is no caption by null with a reason. `error` comes last, if there is one."""
    errors = row.pop("error", {})
    if row.get("image", "?") in ("", None):
        errors = {"image": "no image"} | errors
    for field in row:
        if field in ("alt", "vec", "vecap") or field.startswith("rewrite_"):
            row[field], why = captions_of(row[field])
            errors = ({field: why} if why else {}) | errors
    return row | {"error": errors} if errors else row


def write_jsonl(rows, output, overwrite, drop_errors, inputs):
    """Write all rows or no file. -> the summary: {what: how many rows}"""
    if not output.endswith(".jsonl"):  # saves the last shard of a list if OUT was forgotten
        die(f"{output}: the output comes last and its name ends in .jsonl")
    check_output(output, *inputs)
    if os.path.exists(output) and not overwrite:
        die(f"{output} exists; give another name or --overwrite")
    count, failed, reasons = 0, 0, Counter()
    with new_file(output) as f:
        for row in map(finish, progress(rows)):
            for field, why in row.get("error", {}).items():
                for reason in set(why) - {None} if isinstance(why, list) else {why}:
                    kind = f"  {field}: {reason.split(':')[0]}"  # what follows is this row's
                    reasons[kind] += 1
                    remember(kind, name_of(row))
            failed += "error" in row
            if not (drop_errors and "error" in row):
                f.write(to_line(row))
                count += 1
        if not count:
            fault = f"all {failed} rows have an error" if failed else "no rows in the input"
            die(f"{fault}; nothing written")
    failures = "rows left out" if drop_errors else "rows with error"
    return {"rows": count, failures: failed, **dict(reasons.most_common())}


def add_commands(parser):
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(read, about, metavar, **more):
        sub = commands.add_parser(read.__name__, help=about, description=about)
        sub.error = die
        sub.set_defaults(read=read)
        add = sub.add_argument
        add("input", metavar=metavar, **more)
        add("output", metavar="OUT.jsonl")
        add("--overwrite", action="store_true", help="replace OUT if it exists (default: stop)")
        add("--drop-errors", action="store_true", help="leave out and count rows that lack "
            "something (default: keep them, with the reason)")
        return add

    add = command(laclip, "LaCLIP's release: a CSV of captions, and a .txt of rewrites a source",
                  "CSV")
    add("--rewrites", nargs="+", default=[], metavar="SOURCE=FILE.txt",
        help="line k is the rewrite of row k and becomes its rewrite_SOURCE (default: none)")
    add("--image-column", metavar="NAME", help="default: filepath, image, image_path or url; "
        "without a header, as released, the first column is the image, the second the caption")
    add("--caption-column", metavar="NAME", help="default: caption, title, text or alt")
    add = command(tsv, "CC3M's (caption, url) or CC12M's (url, caption) TSV", "FILE.tsv")
    add("--columns", choices=["caption,url", "url,caption"], metavar="ORDER",
        help="caption,url or url,caption (default: by where the URL is)")
    add("--images", metavar="DIR", help="the images; later the --image-root (default: none yet)")
    add("--image-pattern", default="{index:09d}.jpg", metavar="NAME", help="an image's name below "
        "--images, by its row counted from 0 (default: %(default)s)")
    add = command(img2dataset, "img2dataset's webdataset shards, read in place", "DIR_OR_TAR",
                  nargs="+")
    add("--image-root", required=True, metavar="DIR", help="shards are named relative to it")
    add = command(coco, "COCO's captions_*.json, or Karpathy's dataset_{coco,flickr30k}.json",
                  "JSON")
    add("--images-dir", metavar="NAME", help="a folder before every file name (default: none)")
    add("--split", nargs="+", default=[], metavar="NAME", help="Karpathy's train, restval, val, "
        "test (default: all); COCO trains on train restval")
    command(vecap, "VeCap's JSON files: one object of \"url\": \"caption\" pairs each", "JSON",
            nargs="+")
    add = command(folder, "images, each with a .txt of the same name, or metadata.jsonl or .csv",
                  "DIR")
    add("--caption-column", metavar="NAME",
        help="in metadata (default: caption, title, text or alt)")


@in_one_line
def main(argv=None):
    parser = new_parser(__doc__)
    add_commands(parser)
    args = parser.parse_args(argv)
    inputs = args.input if isinstance(args.input, list) else [args.input]
    inputs += [item.partition("=")[2] for item in getattr(args, "rewrites", [])]
    summary = write_jsonl(args.read(args), args.output, args.overwrite, args.drop_errors, inputs)
    summary |= {f"passed over: {kind}": count for kind, count in passed_over.items()}
    for name, count in {**summary, "invalid UTF-8 replaced": invalid_utf8["replaced"]}.items():
        first_names = ", ".join(examples.get(name.removeprefix("passed over: "), []))
        print(f"{name:<40} {count:>12,}  {first_names}".rstrip())


if __name__ == "__main__":
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # leave by new_file's clean-up
        signal.signal(signal_number, lambda number, frame: sys.exit(128 + number))
    main()
