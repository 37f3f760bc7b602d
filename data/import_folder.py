"""A folder of images for data/import_captions.py.

An image has a .txt of the same name beside it, anywhere below the folder; several lines are several
texts. Or Hugging Face's imagefolder (huggingface.co/docs/datasets/image_dataset): metadata.jsonl or
metadata.csv names the files of its own folder in file_name, and has a caption and other columns.
"""
import os

from data.common import die
from data.import_files import (CAPTION_COLUMNS, csv_records, files_below, open_text, other_keys,
                               pass_over, pass_over_files)
from data.rows import open_rows, parse_row

METADATA = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}


def read_metadata(path):
    """Yield {column: value} for each line of metadata.jsonl or record of metadata.csv."""
    if path.endswith(".parquet"):
        die(f"{path}: parquet is not read; metadata.jsonl or metadata.csv is")
    if path.endswith(".jsonl"):
        with open_rows(path) as f:
            yield from (parse_row(line)[0] for line in f)
        return
    records = csv_records(path)
    names = next(records, [])
    for record in records:
        if len(record) == len(names):
            yield dict(zip(names, record))
        else:
            yield {"line": ",".join(record), "error": {"line": f"not {len(names)} columns"}}


def metadata_row(entry, images, place, caption_column):
    """A row of an entry whose file_name is relative to the folder `place`"""
    name = entry.pop("file_name")
    path = os.path.normpath(os.path.join(place, name)) if isinstance(name, str) else None
    known = [caption_column] if caption_column else CAPTION_COLUMNS
    column = next((column for column in known if column in entry), None)
    row = {"image": path, "alt": entry.pop(column) if column else None}
    row |= {key: entry[key] for key in other_keys({key: key for key in entry})}
    if path not in images:
        row |= {"file_name": name, "error": {"image": "missing file"}}
        del row["image"]
    if not column:
        row["error"] = row.get("error", {}) | {
            "alt": f"no caption column: expected {'/'.join(known)}, or --caption-column"}
    return row


def folder(args):
    images, captions, others = files_below(args.input)
    known_images, described = set(images), set()
    beside = {os.path.splitext(path)[0]: path for path in captions}
    for path in [path for path in others if os.path.basename(path) in METADATA]:
        others.remove(path)
        for entry in read_metadata(os.path.join(args.input, path)):
            if "file_name" not in entry and "line" not in entry:
                die(f"{path} has no file_name, only {', '.join(entry)}")
            if "file_name" in entry:
                place = os.path.dirname(path)
                entry = metadata_row(entry, known_images, place, args.caption_column)
                described.add(entry.get("image"))
            yield entry
    pass_over_files(images, captions, others)
    for image in images:
        text = beside.get(os.path.splitext(image)[0])
        if image in described:
            if text:
                pass_over(".txt beside metadata", text)
            continue
        lines = []
        if text:
            with open_text(os.path.join(args.input, text)) as f:
                lines = [line.strip() for line in f if line.strip()]
        yield {"image": image, "alt": lines if len(lines) > 1 else "".join(lines)}
