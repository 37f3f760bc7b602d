"""img2dataset's output (github.com/rom1504/img2dataset, writer.py) for data/import_captions.py.

Its output `webdataset`: a shard 00000.tar holds KEY.jpg (or .png, .webp: --encode_format), KEY.txt
and KEY.json of every image that could be downloaded. The tar stays as it is: a row points at the
image's bytes in it. Its output `files`: the same in folders. Its output `parquet` holds the images'
bytes in a compressed table, where no row can point at them.
"""
import json
import os
import re
import tarfile
from collections import defaultdict
from pathlib import Path

from data.common import die
from data.import_files import ENDINGS, is_hidden, pass_over, walk

TAR_NAME = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$")
# img2dataset's own keys in KEY.json. Every other key goes into the row: LaCLIP's rewrites, a url
OWN_KEYS = frozenset("""alt image error caption key status error_message original_width
    original_height exif sha256 md5 sha512 shard_id""".split())


def img2dataset(args):
    """Yield the rows of all shards and folders that are given."""
    shards, folders = [], []
    for path in args.input:
        found_shards, found_folders = find_inputs(path, args.image_root)
        shards += found_shards
        folders += found_folders
    shards = list(dict.fromkeys(shards))
    for path in shards:
        if (kind := TAR_NAME.search(path)) and kind[1] != "tar":
            die(f"{path}: not an uncompressed tar; rows point at byte offsets, so decompress it")
    for path in shards:
        yield from read_shard(path, relative(path, args.image_root), alone=len(shards) == 1)
    for path in folders:
        yield from read_folder(path, relative(path, args.image_root))


def relative(path, root):
    return Path(os.path.relpath(os.path.abspath(path), os.path.abspath(root))).as_posix()


def find_inputs(path, image_root):
    """A shard, or a folder of shards or images -> (paths of shards, folders of images)"""
    os.stat(path)  # a missing file is told now, not hours later
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(image_root)):
        die(f"{path} is not below --image-root {image_root}")
    if os.path.isfile(path):
        return [path], []
    files = [os.path.join(place, name) for place, names in walk(path) for name in names]
    images = [file for file in files if file.lower().endswith(ENDINGS)]
    shards = sorted(file for file in files if TAR_NAME.search(file))
    if shards:
        for image in images:
            pass_over("images beside shards", image)
        return shards, []
    if any(file.endswith(".parquet") for file in files) and not images:
        die(f"{path}: img2dataset's parquet holds the images in compressed tables, where no row "
            "can point at them: download with --output_format webdataset or files")
    if not images:
        die(f"{path}: no .tar and no image below this folder")
    return [], sorted({os.path.dirname(file) for file in images})


# === a tar ==================================================================================

def read_shard(path, shard, alone):
    """The rows of a tar. One that is damaged gives the rows before the damage, and one that says
    so; if it is `alone` and has none, that is a mistake in the command."""
    parts, last_good = defaultdict(list), None
    try:
        for part, name, offset, size, content in read_members(path):
            parts[part].append((name, f"{shard}@{offset}+{size}", content))
    except tarfile.ReadError as e:
        last_good = str(e)
        if alone and not parts:
            die(f"{path}: truncated, damaged or not an uncompressed tar; the last good member is "
                f"{last_good}")
    for members in parts.values():
        yield from samples_of(shard, members)
    if last_good is not None:
        yield {"shard": shard, "last_good_member": last_good,
               "error": {"shard": "truncated, damaged or no tar"}}


def read_members(path):
    """Yield (part, name, offset of the bytes, size, the content if it is text) for every file of a
    tar. Another tar that was joined to it (cat a.tar b.tar) is another part.

    Raises tarfile.ReadError(the last good member) at the first damage."""
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
                        pass_over("no plain file", member.name)
                    last = member.name
                # tarfile silently takes a bad header, or a file cut between members, for the end
                # of the archive. Zeros mark the true end; another tar may follow them.
                f.seek(tar.offset)
                if f.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end")
            except (tarfile.TarError, ValueError, ArithmeticError, MemoryError) as e:
                raise tarfile.ReadError(last) from e
            while (block := f.read(tarfile.BLOCKSIZE)) and not any(block):
                pass
            f.seek(-len(block), os.SEEK_CUR)
            part += 1


def read_folder(path, place):
    """The rows of one folder of img2dataset's output `files`"""
    names = [entry.name for entry in os.scandir(path) if entry.is_file()]
    members = []
    for name in sorted(name for name in names if not is_hidden(name)):
        is_text = name.lower().endswith((".txt", ".json"))
        content = Path(path, name).read_bytes() if is_text else None
        members.append((name, Path(place, name).as_posix(), content))
    return samples_of(place, members)


# === samples: the files of one name =========================================================

def samples_of(shard, members):
    """Yield the rows of one tar or folder. members: [(name, image, the content if it is text)], in
    any order; the files of one sample have the same name with different endings."""
    images, texts, metas = defaultdict(list), defaultdict(list), defaultdict(list)
    for name, image, content in members:
        key, ending = os.path.splitext(name)
        ending = ending.lower()
        if is_hidden(name):
            pass_over("hidden", name)
        elif ending in ENDINGS:
            images[key].append((ending, image))
        elif ending in (".txt", ".json"):
            text = content.decode("utf-8-sig", "count_and_replace")
            (texts if ending == ".txt" else metas)[key].append(text)
        else:
            pass_over(ending or "no ending", name)
    for key in {**images, **texts, **metas}:
        whole = re.match(r"(?:.*/)?[^.]*", key)[0]
        if whole != key and images[key] and images[whole] and not texts[key] and not metas[key]:
            part = key[len(whole):] + images[key][0][0]  # webdataset: 7.seg.png is a part of 7.png
            pass_over(part, whole + part)
        else:
            yield from sample(shard, key, images[key], texts[key], metas[key])


def sample(shard, key, images, texts, metas):
    """The rows of the files of one name, one an image. images: [(ending, image)]"""
    row, errors = {"alt": "".join(texts[:1]).strip()}, {}
    endings = [ending for ending, _ in images]
    if len(set(endings)) < len(endings) or len(texts) > 1 or len(metas) > 1:
        # Which text belongs to which image is unknown
        row, errors, images, metas = {"alt": ""}, {"image": "comes twice in shard"}, [], []
    try:
        for text in metas:
            meta = json.loads(text, parse_constant=lambda _: None)  # NaN is no JSON
            row["alt"] = row["alt"] or meta.get("caption") or meta.get("alt")
            row |= {name: value for name, value in meta.items() if name not in OWN_KEYS}
    except (ValueError, AttributeError, RecursionError):
        errors["json"] = "not a JSON object"
    if isinstance(row["alt"], str):
        row["alt"] = row["alt"].strip()
    if not images:
        errors = {"image": "no image in shard"} | errors
    if errors:
        row |= {"shard": shard, "key": key}
    for _, image in images or [(None, None)]:
        yield ({"image": image} if image else {}) | row | {"error": dict(errors)}
