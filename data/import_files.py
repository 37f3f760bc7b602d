"""What the importers share: they read folders and texts, and count what they pass over."""
import codecs
import csv
import io
import os
from collections import Counter
from pathlib import Path

from PIL import Image

from data.common import die

# The formats that train_clip.py and caption_llava.py open; a test compares them
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
ENDINGS = tuple(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)
CAPTION_COLUMNS = ["caption", "title", "text", "alt"]
OWN_KEYS = {"image", "alt", "error", "line"}  # a table's column of such a name is passed over
MAX_TEXT = 1 << 24  # characters in a field: an unclosed quote must not take the rest of the file

# For the summary. pass_over and count_and_replace fill these.
passed_over = Counter()  # kind -> how many files, tar members or columns
examples = {}  # kind -> the names of the first three
invalid_utf8 = Counter()


def pass_over(kind, name):
    """Count what is not read, and remember a few names of its kind."""
    passed_over[kind] += 1
    remember(kind, name)


def remember(kind, name):
    """Keep the first three names of a kind."""
    if len(examples.setdefault(kind, [])) < 3:
        examples[kind].append(name)


def name_of(row):
    """What a row is called in the summary"""
    names = (row.get(key) for key in ("image", "file_name", "url", "key", "line", "shard"))
    return next((str(name)[:40] for name in names if name), "no name")


def count_and_replace(error):
    """Codec error handler: bytes that are not UTF-8 become U+FFFD, and are counted."""
    invalid_utf8["replaced"] += 1
    return codecs.replace_errors(error)


codecs.register_error("count_and_replace", count_and_replace)


def open_text(path, newline="\n"):
    """Open UTF-8 with or without a byte order mark. A line ends at \\n only: captions may hold
    \\r, \\x85 or U+2028."""
    f = open(path, "rb")
    if f.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        die(f"{path} is UTF-16; expected UTF-8")
    return io.TextIOWrapper(f, encoding="utf-8-sig", errors="count_and_replace", newline=newline)


def is_hidden(path):
    """.ipynb_checkpoints, __MACOSX, ._x.png and the like, which systems and editors leave behind"""
    return any(part.startswith(".") and part != "." or part == "__MACOSX"
               for part in path.split("/"))


def walk(root):
    """Yield (folder, names of its files), sorted. Links are followed; hidden files and folders are
    passed over."""
    def fail(error):
        raise error  # os.walk would pass over an unreadable folder

    for place, folders, names in os.walk(root, onerror=fail, followlinks=True):
        parents = (place, *Path(os.path.abspath(place)).parents)
        above = {os.path.realpath(path) for path in parents}  # a link to one would never end
        folders[:] = sorted(name for name in folders if not is_hidden(name)
                            and os.path.realpath(os.path.join(place, name)) not in above)
        for name in filter(is_hidden, names):
            pass_over("hidden", name)
        yield place, sorted(name for name in names if not is_hidden(name))


def files_below(root):
    """-> paths relative to root, sorted: (images, captions [.txt], other files)"""
    images, captions, others = [], [], []
    for place, names in walk(root):
        for name in names:
            path = Path(os.path.relpath(os.path.join(place, name), root)).as_posix()
            ending = os.path.splitext(path)[1].lower()
            kind = images if ending in ENDINGS else captions if ending == ".txt" else others
            kind.append(path)
    return sorted(images), sorted(captions), sorted(others)


def pass_over_files(images, captions, others):
    """Count what stands beside the images and is not read with them."""
    stems = {os.path.splitext(path)[0] for path in images}
    for path in captions:
        if os.path.splitext(path)[0] not in stems:
            pass_over(".txt without an image", path)
    for path in others:
        pass_over(os.path.splitext(path)[1].lower() or "no ending", path)


def image_files(root):
    """The images below a folder, as paths relative to it, sorted"""
    images, captions, others = files_below(root)
    pass_over_files(images, captions, others)
    return images


def csv_records(path):
    """Yield a CSV's records. A record may span lines: a quoted caption may hold newlines."""
    csv.field_size_limit(MAX_TEXT)
    with open_text(path, newline="") as f:
        records = csv.reader(f, strict=True)  # else an unclosed quote makes the rest a caption
        try:
            yield from filter(None, records)  # a blank line is no record
        except csv.Error as e:
            die(f"{path}, line {records.line_num}: {e}")


def other_keys(columns):
    """A table's columns {place: name} -> those that become keys of the rows."""
    for name in columns.values():
        if name in OWN_KEYS:
            pass_over("column", name)
    return {place: name for place, name in columns.items() if name and name not in OWN_KEYS}
