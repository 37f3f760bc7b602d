"""Convert a known image-text data set to this project's JSONL: one line a row, one row an image.

    python -m data.import_captions laclip cc3m_original.csv cc3m.jsonl --rewrites chatgpt=cc3m_chatgpt.txt
    python -m data.import_captions tsv cc12m.tsv cc12m.jsonl
    python -m data.import_captions img2dataset /data/cc12m cc12m.jsonl --image-root /data
    python -m data.import_captions coco dataset_coco.json coco_test.jsonl --split test
    python -m data.import_captions vecap wit_300m-0?-of-10.json vecap.jsonl
    python -m data.import_captions folder photos photos.jsonl

Each reader below yields rows; the comment above it links the documentation of its format. Nothing is dropped
silently: a row that lacks something says so in `error`, or is left out with --drop-errors, and the summary
counts it. Everything but COCO's JSON is streamed, so memory does not grow with the rows (img2dataset: the
texts of one shard are held). The texts stay as they are; data/filter_captions.py cleans them. This tool needs
no torch.
"""
import codecs
import contextlib
import csv
import io
import itertools
import json
import os
import re
import signal
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

from data.common import check_output, die, in_one_line, new_file, new_parser, progress, to_line

# The formats that train_clip.py and caption_llava.py open; a test compares them
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
ENDINGS = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)
IMAGE_COLUMNS = ["filepath", "image", "image_path", "url"]  # a path before a URL, where a CSV has both
CAPTION_COLUMNS = ["caption", "title", "text"]
MAX_TEXT = 1 << 24  # characters in a field: an unclosed quote must not take the rest of the file into memory
is_url = re.compile(r"https?://", re.IGNORECASE).match
invalid_utf8 = Counter()  # filled by the codec error handler below, printed in the summary
passed_over = Counter()  # other files and tar members, printed in the summary


def count_and_replace(error):
    """Codec error handler: bytes that are not UTF-8 become U+FFFD, and are counted."""
    invalid_utf8["replaced"] += 1
    return codecs.replace_errors(error)


def open_text(path, newline="\n"):
    """Open UTF-8 with or without a byte order mark. A line ends at \\n only: captions may hold \\r, \\x85 or
    U+2028."""
    f = open(path, "rb")
    if f.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        die(f"{path} is UTF-16; expected UTF-8")
    return io.TextIOWrapper(f, encoding="utf-8-sig", errors="count_and_replace", newline=newline)


def is_hidden(path):
    """.ipynb_checkpoints, __MACOSX, ._x.png and the like, which systems and editors leave behind"""
    return any(part.startswith(".") and part != "." or part == "__MACOSX" for part in path.split("/"))


def walk(root):
    """Yield (folder, names of its files), sorted. Links are followed; hidden files and folders are passed
    over."""
    def fail(error):
        raise error  # os.walk would pass over an unreadable folder

    for place, folders, names in os.walk(root, onerror=fail, followlinks=True):
        parents = (place, *Path(os.path.abspath(place)).parents)
        above = {os.path.realpath(path) for path in parents}  # a link to one of these would never end
        folders[:] = sorted(name for name in folders if not is_hidden(name)
                            and os.path.realpath(os.path.join(place, name)) not in above)
        passed_over["hidden"] += sum(map(is_hidden, names))
        yield place, sorted(name for name in names if not is_hidden(name))


def image_files(root):
    """The images below a folder, as paths relative to it, sorted. Files that are passed over are counted."""
    images, captions = [], set()
    for place, names in walk(root):
        for name in names:
            stem, ending = os.path.splitext(Path(os.path.relpath(os.path.join(place, name), root)).as_posix())
            if ending.lower() in ENDINGS:
                images.append(stem + ending)
            elif ending.lower() == ".txt":
                captions.add(stem)
            else:
                passed_over[ending.lower() or "no ending"] += 1
    passed_over[".txt without an image"] += len(captions - {os.path.splitext(path)[0] for path in images})
    return sorted(images)


# laclip: github.com/LijieFan/LaCLIP, README "Pre-computed Augmented Texts" and data.py. *_original.csv has no
# header. Its columns are image path and caption, and in cc3m's also a URL. Line k of each .txt belongs to row
# k, so the counts must be equal. A comma-separated CSV of your own with a header is read as well.

def find_columns(first, args):
    """-> image column, caption column, URL column or None, is `first` a header?"""
    names = [name.strip().lower() for name in first]
    find = lambda known: next((names.index(name) for name in known if name in names), None)
    image = find([args.image_column.lower()] if args.image_column else IMAGE_COLUMNS)
    caption = find([args.caption_column.lower()] if args.caption_column else CAPTION_COLUMNS)
    if image is not None and caption is not None:
        return image, caption, find(["url"]), True
    headless = len(first) > 1 and (is_url(first[0]) or names[0].endswith(ENDINGS))
    if headless and not args.image_column and not args.caption_column:
        return 0, 1, 2 if len(first) > 2 and is_url(first[2]) else None, False
    die(f"{args.input}: expected columns {args.image_column or '/'.join(IMAGE_COLUMNS)} and "
        f"{args.caption_column or '/'.join(CAPTION_COLUMNS)} (see --image-column, --caption-column); "
        f"its first line is: {','.join(first)[:200]}")


def read_csv(args):
    """Yield one row for each CSV record. A record may span lines: a quoted caption may hold newlines."""
    csv.field_size_limit(MAX_TEXT)
    with open_text(args.input, newline="") as f:
        records = csv.reader(f, strict=True)  # else an unclosed quote makes the rest of the file a caption
        try:
            first = next(records, [])
            image, caption, url, is_header = find_columns(first, args)
            for record in itertools.chain([] if is_header else [first], records):
                if not record:
                    continue  # a blank line
                if len(record) <= max(image, caption):
                    yield {"line": ",".join(record), "error": {"line": "too few columns"}}
                    continue
                # `image` is a path below the image root, so a URL goes to `url`
                row = {"url" if is_url(record[image]) else "image": record[image], "alt": record[caption]}
                yield row | ({"url": record[url]} if url is not None and len(record) > url else {})
        except csv.Error as e:
            die(f"{args.input}, line {records.line_num}: {e}")


def laclip(args):
    sources, counts = {}, Counter()
    for item in args.rewrites:
        source, _, path = item.partition("=")
        if not path or not re.fullmatch(r"[A-Za-z0-9_-]+", source) or source in sources:
            die(f"--rewrites {item}: expected SOURCE=FILE.txt, each source once, as in bard=cc3m_bard.txt")
        sources[source] = path
    with contextlib.ExitStack() as stack:
        texts = [stack.enter_context(open_text(path)) for path in sources.values()]
        for row, *lines in itertools.zip_longest(read_csv(args), *texts):
            counts.update(k for k, entry in enumerate((row, *lines)) if entry is not None)
            if row is not None and None not in lines:  # else go on counting, for the message
                yield row | {f"rewrite_{s}": line.rstrip("\r\n") for s, line in zip(sources, lines)}
    for k, path in enumerate(sources.values(), start=1):
        if counts[k] != counts[0]:
            die(f"{args.input} has {counts[0]} rows but {path} {counts[k]} lines; line k must be of row k")


# tsv: CC3M is "caption TAB url" (ai.google.com/research/ConceptualCaptions/download), CC12M "url TAB caption"
# (github.com/google-research-datasets/conceptual-12m, README "Format"). Neither has a header, but
# img2dataset's recipes for both tell the user to add one.

def tsv(args):
    try:
        distinct = args.image_pattern.format(index=0) != args.image_pattern.format(index=1)
    except (LookupError, ValueError, AttributeError, TypeError):
        distinct = False
    if not distinct:
        die(f"--image-pattern {args.image_pattern}: expected a name with {{index}}, as in {{index:08d}}.jpg")
    orders, index = [["url", "caption"], ["caption", "url"]], 0
    with open_text(args.input) as lines:
        for number, line in enumerate(lines):
            cells = line.rstrip("\r\n").split("\t")
            if number == 0 and cells in orders:
                continue
            # The order of the row before comes first: it decides when both cells are URLs
            order = next((o for o in orders if len(cells) == 2 and is_url(cells[o.index("url")])), None)
            if args.columns and len(cells) == 2:
                order = args.columns.split(",")
            if order:
                orders.sort(key=lambda o: o != order)
                cell = dict(zip(order, cells))
                row = {"url": cell["url"], "alt": cell["caption"]}
            else:
                row = {"line": line.rstrip("\r\n"), "error": {"line": "not one URL and one caption"}}
            if order and args.images:
                name = args.image_pattern.format(index=index)
                found = os.path.isfile(os.path.join(args.images, name))
                row |= {"image": name} if found else {"error": {"image": "missing file"}}
            index += 1
            yield row


# img2dataset: github.com/rom1504/img2dataset, writer.py. Its output `webdataset`: a shard 00000.tar holds
# KEY.jpg (or .png, .webp: --encode_format), KEY.txt and KEY.json of every image that could be downloaded. The
# tar stays as it is: a row points at the image's bytes in it. Its output `files`: the same in folders. Its
# output `parquet` holds the images' bytes in a compressed table, where no row can point at them.

TAR_NAME = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$")
# img2dataset's own keys in KEY.json. Every other key goes into the row: LaCLIP's rewrites, a recaption, a url
OWN_KEYS = frozenset("""alt image error caption key status error_message original_width original_height exif
    sha256 md5 sha512 shard_id""".split())


def read_members(path):
    """Yield (part, name, offset of the bytes, size, the content if it is text) for every file of a tar.
    Another tar that was joined to it (cat a.tar b.tar) is another part. Raises tarfile.ReadError(the last
    good member) at the first damage."""
    size, last, part, block = os.path.getsize(path), "none", 0, b"first"
    with open(path, "rb") as f:
        while block:
            try:
                tar = tarfile.open(fileobj=f, mode="r:")  # "r:" takes no compression
                while (member := tar.next()) is not None:
                    tar.members.clear()  # tarfile keeps every member
                    if not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError("cut")
                    if member.isreg() and member.sparse is None:
                        text = member.name.lower().endswith((".txt", ".json"))
                        content = tar.extractfile(member).read() if text else None
                        yield part, member.name, member.offset_data, member.size, content
                    elif not member.isdir():
                        passed_over["no plain file"] += 1
                    last = member.name
                # tarfile silently takes a bad header, or a file cut between members, for the end of the
                # archive. Zeros mark the true end; another tar may follow them.
                f.seek(tar.offset)
                if f.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end")
            except (tarfile.TarError, ValueError, ArithmeticError, MemoryError) as e:
                raise tarfile.ReadError(last) from e
            while (block := f.read(tarfile.BLOCKSIZE)) and not any(block):
                pass
            f.seek(-len(block), os.SEEK_CUR)
            part += 1


def samples_of(shard, members):
    """Yield the rows of one tar or folder. members: [(name, image, the content if it is text)], in any order;
    the files of one sample have the same name with different endings."""
    images, texts, metas = defaultdict(list), defaultdict(list), defaultdict(list)
    for name, image, content in members:
        key, ending = os.path.splitext(name)
        if is_hidden(name):
            passed_over["hidden"] += 1
        elif ending.lower() in ENDINGS:
            images[key].append((ending.lower(), image))
        elif ending.lower() in (".txt", ".json"):
            text = content.decode("utf-8-sig", "count_and_replace")
            (texts if ending.lower() == ".txt" else metas)[key].append(text)
        else:
            passed_over[ending.lower() or "no ending"] += 1
    for key in {**images, **texts, **metas}:
        whole = re.match(r"(?:.*/)?[^.]*", key)[0]
        if whole != key and images[key] and images[whole] and not texts[key] and not metas[key]:
            passed_over[key[len(whole):] + images[key][0][0]] += 1  # webdataset: 7.seg.png is a part of 7.png
            continue
        row, errors = {"alt": "".join(texts[key][:1]).strip()}, {}
        endings = [ending for ending, _ in images[key]]
        if len(set(endings)) < len(endings) or len(texts[key]) > 1 or len(metas[key]) > 1:
            # Which text belongs to which image is unknown
            row, errors, images[key], metas[key] = {"alt": ""}, {"image": "comes twice in shard"}, [], []
        try:
            for meta in metas[key]:
                meta = json.loads(meta, parse_constant=lambda _: None)  # NaN is no JSON
                caption = meta.get("caption") or meta.get("alt")
                row["alt"] = row["alt"] or (caption.strip() if isinstance(caption, str) else caption)
                row |= {name: value for name, value in meta.items() if name not in OWN_KEYS}
        except (ValueError, AttributeError, RecursionError):
            errors["json"] = "not a JSON object"
        if not images[key]:
            errors = {"image": "no image in shard"} | errors
        if errors:
            row |= {"shard": shard, "key": key}
        for _, image in images[key] or [(None, None)]:  # one row an image
            yield ({"image": image} if image else {}) | row | {"error": dict(errors)}


def img2dataset(args):
    root, shards, folders = os.path.abspath(args.image_root), [], []
    for path in args.input:
        os.stat(path)  # a missing file is told now, not hours later
        if not Path(os.path.abspath(path)).is_relative_to(root):
            die(f"{path} is not below --image-root {args.image_root}")
        files, tars = [], [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            files = [os.path.join(place, name) for place, names in walk(path) for name in names]
            tars = sorted(file for file in files if TAR_NAME.search(file))
        shards += tars
        images = [file for file in files if file.lower().endswith(ENDINGS)]
        if tars:
            passed_over["images beside shards"] += len(images)
        elif any(file.endswith(".parquet") for file in files) and not images:
            die(f"{path}: img2dataset's parquet holds the images in compressed tables, where no row can "
                "point at them: download with --output_format webdataset or files")
        elif images:
            folders += sorted({os.path.dirname(file) for file in images})
        else:
            die(f"{path}: no .tar and no image below this folder")
    shards = list(dict.fromkeys(shards))
    for path in shards:
        if (kind := TAR_NAME.search(path)) and kind[1] != "tar":
            die(f"{path}: not an uncompressed tar; rows point at byte offsets, so decompress it first")
    for path in shards:
        shard = Path(os.path.relpath(os.path.abspath(path), root)).as_posix()
        parts, last = defaultdict(list), None
        try:
            for part, name, offset, size, content in read_members(path):
                parts[part].append((name, f"{shard}@{offset}+{size}", content))
        except tarfile.ReadError as e:
            last = str(e)
            if len(shards) == 1 and not parts:
                die(f"{path}: truncated, damaged or not an uncompressed tar; the last good member is {last}")
        for members in parts.values():
            yield from samples_of(shard, members)
        if last is not None:
            yield {"shard": shard, "last_good_member": last,
                   "error": {"shard": "truncated, damaged or no tar"}}
    for path in folders:
        place = Path(os.path.relpath(os.path.abspath(path), root)).as_posix()
        files = [entry.name for entry in os.scandir(path) if entry.is_file() and not is_hidden(entry.name)]
        members = []
        for name in sorted(files):
            is_text = name.lower().endswith((".txt", ".json"))
            content = Path(path, name).read_bytes() if is_text else None
            members.append((name, Path(place, name).as_posix(), content))
        yield from samples_of(place, members)


# coco: captions_train2014.json and the like, cocodataset.org/#format-data ("images" with id and file_name,
# "annotations" with image_id and caption); and Karpathy's splits, on which COCO and Flickr30k retrieval is
# reported, cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip ("images" with filename, split,
# sentences[].raw, and filepath for COCO). Each is below 200 MB, so it is loaded whole.

def coco(args):
    with open_text(args.input) as f:
        try:
            data = json.load(f)
        except (ValueError, RecursionError) as e:
            die(f"{args.input}: not valid JSON ({e})")
    place = lambda *parts: "/".join(part.rstrip("/") for part in (args.images_dir, *parts) if part)
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
            rows += [{"alt": texts, "error": {"image": "not in images"}} for texts in captions.values()]
    except (KeyError, TypeError, AttributeError):
        die(f"{args.input}: neither COCO captions (images, annotations with a caption) nor Karpathy's splits "
            "(images with filename, split, sentences)")
    yield from rows


# vecap: github.com/apple/ml-veclip, README "VeCap-300M Download": ten JSON files, "for each image, we save
# the web link and our caption". Its upload_dataset.py shows the layout: {url: caption}, without the AltText.
# An object of 30 million pairs is too large for json.load, so it is read in chunks.

PAIR_HEAD = re.compile(r'\s*[{,]\s*("[^"\\]*+(?:\\.[^"\\]*+)*+")\s*:\s*', re.DOTALL)


def read_pairs(path):
    """Yield the (key, value) pairs of one JSON object of any size. About 1 MiB of it is in memory at a
    time."""
    decode = json.JSONDecoder(strict=False).raw_decode
    buffer, at, pairs = "", 0, 0
    with open_text(path) as f:
        while True:
            try:
                head = PAIR_HEAD.match(buffer, at)
                key, value_at = decode(head[1])[0], head.end()
                value, at = decode(buffer, value_at)
            except (TypeError, ValueError, RecursionError):  # the pair ends beyond the buffer, or it is none
                more = f.read(1 << 20)
                buffer, at = buffer[at:] + more, 0
                if not more or len(buffer) > MAX_TEXT:
                    break
                continue
            pairs += 1
            yield key, value
    if buffer.strip() != "}":
        die(f'{path}: cut off after {pairs} pairs, or not one JSON object of "url": "caption" pairs')


def vecap(args):
    for path in args.input:
        for url, text in read_pairs(path):
            yield {"url": url, "vecap": text} if isinstance(text, str) else {
                "url": url, "vecap": None, "error": {"vecap": "not a string"}}


# folder: an image and a .txt of the same name beside it, anywhere below DIR. Several lines are several texts.

def folder(args):
    for name in image_files(args.input):
        path, texts = os.path.join(args.input, name), []
        with contextlib.suppress(FileNotFoundError), open_text(os.path.splitext(path)[0] + ".txt") as f:
            texts = [line.strip() for line in f if line.strip()]
        yield {"image": name, "alt": texts if len(texts) > 1 else "".join(texts)}


# Writing is the same for all. An empty text becomes null with a reason; the file is complete or absent.

def finish(row):
    """Replace empty captions by null with a reason. `error` comes last, if there is one."""
    errors = row.pop("error", {})
    if row.get("image", "?") in ("", None):
        errors = {"image": "no image"} | errors
    for field in row:
        if field in ("alt", "vecap") or field.startswith("rewrite_"):
            texts = row[field] if isinstance(row[field], list) else [row[field]]
            if not any(isinstance(text, str) and text.strip() for text in texts):
                row[field], errors = None, {field: "no text"} | errors
    return row | {"error": errors} if errors else row


def write_jsonl(rows, output, overwrite, drop_errors, inputs):
    """Write under a temporary name, sync, rename. -> the summary: {what: how many rows}"""
    if not output.endswith(".jsonl"):  # this also saves the last shard of a list if OUT was forgotten
        die(f"{output}: the output comes last and its name ends in .jsonl")
    check_output(output, *inputs)
    if os.path.exists(output) and not overwrite:
        die(f"{output} exists; give another name or --overwrite")
    count, failed, reasons = 0, 0, Counter()
    with new_file(output) as f:
        for row in map(finish, progress(rows)):
            reasons.update(f"  {field}: {reason}" for field, reason in row.get("error", {}).items())
            failed += "error" in row
            if not (drop_errors and "error" in row):
                f.write(to_line(row))
                count += 1
        if not count:
            fault = f"all {failed} rows have an error" if failed else "no rows in the input"
            die(f"{fault}; nothing written")
    failures = "rows left out" if drop_errors else "rows with error"
    return {"rows": count, failures: failed, **dict(reasons.most_common())}


@in_one_line
def main(argv=None):
    codecs.register_error("count_and_replace", count_and_replace)
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(read, help, metavar, **kwargs):
        sub = commands.add_parser(read.__name__, help=help, description=help)
        sub.set_defaults(read=read)
        sub.add_argument("input", metavar=metavar, **kwargs)
        sub.add_argument("output", metavar="OUT.jsonl")
        sub.add_argument("--overwrite", action="store_true", help="replace OUT if it exists (default: stop)")
        sub.add_argument("--drop-errors", action="store_true",
                         help="leave out and count rows that lack something (default: keep them, with the "
                         "reason)")
        return sub

    sub = command(laclip, "LaCLIP's release: a CSV of captions, and a .txt of rewrites a source", "CSV")
    sub.add_argument("--rewrites", nargs="+", default=[], metavar="SOURCE=FILE.txt",
                     help="line k is the rewrite of row k and becomes its rewrite_SOURCE (default: none)")
    sub.add_argument("--image-column", metavar="NAME", help="default: filepath, image, image_path or url; "
                     "without a header, as released, the first column is the image, the second the caption")
    sub.add_argument("--caption-column", metavar="NAME", help="default: caption, title or text")
    sub = command(tsv, "CC3M's (caption, url) or CC12M's (url, caption) TSV", "FILE.tsv")
    sub.add_argument("--columns", choices=["caption,url", "url,caption"], metavar="ORDER",
                     help="caption,url or url,caption (default: by where the URL is)")
    sub.add_argument("--images", metavar="DIR", help="the images; later the --image-root (default: none yet)")
    sub.add_argument("--image-pattern", default="{index:09d}.jpg", metavar="NAME",
                     help="an image's name below --images, by its row counted from 0 (default: %(default)s)")
    sub = command(img2dataset, "img2dataset's webdataset shards, read in place", "DIR_OR_TAR", nargs="+")
    sub.add_argument("--image-root", required=True, metavar="DIR", help="shards are named relative to it")
    sub = command(coco, "COCO's captions_*.json, or Karpathy's dataset_{coco,flickr30k}.json", "JSON")
    sub.add_argument("--images-dir", metavar="NAME", help="a folder before every file name (default: none)")
    sub.add_argument("--split", nargs="+", default=[], metavar="NAME",
                     help="Karpathy's train, restval, val, test (default: all); COCO trains on train restval")
    command(vecap, "VeCap's JSON files: one object of \"url\": \"caption\" pairs each", "JSON", nargs="+")
    command(folder, "images, each with a .txt of the same name beside it", "DIR")
    for each in (parser, *commands.choices.values()):
        each.error = die

    args = parser.parse_args(argv)
    inputs = args.input if isinstance(args.input, list) else [args.input]
    inputs += [item.partition("=")[2] for item in getattr(args, "rewrites", [])]
    summary = write_jsonl(args.read(args), args.output, args.overwrite, args.drop_errors, inputs)
    over = {f"passed over: {ending}": count for ending, count in passed_over.items() if count}
    for name, count in {**summary, **over, "invalid UTF-8 replaced": invalid_utf8["replaced"]}.items():
        print(f"{name:<40} {count:>12,}")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # leave by write_jsonl's clean-up, without a traceback
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    main()
