"""data/import_captions.py, run as a user runs it, on a tiny real input of every format, and on broken ones.

Expected rows are written out in full: an importer that loses, moves or invents a text spoils every later
stage without any of them noticing.
"""
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "data.import_captions"]
COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


def run(*args):
    return subprocess.run([*COMMAND, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def rows_of(*args, out):
    """Run a command that must succeed. -> (rows, {summary line: count})"""
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not list(out.parent.glob("*.tmp"))
    summary = {line[:40].strip(): int(line[40:53].replace(",", "")) for line in done.stdout.splitlines()}
    lines = out.read_bytes().split(b"\n")
    assert lines.pop() == b""
    rows = [json.loads(line.decode("utf-8")) for line in lines]
    assert summary["rows"] == len(rows)
    errors = sum("error" in row for row in rows)
    assert errors == (0 if "--drop-errors" in args else summary["rows with error"])
    return rows, summary


def fails(*args, out, says):
    """Run a command that must fail: status 2, one line that names the problem, no file made or changed."""
    files = lambda: {path: path.read_bytes() for path in out.parent.glob("*") if path.is_file()}
    before = files()
    done = run(*args)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("import_captions.py: error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in says:
        assert word in done.stderr
    assert files() == before


def encoded(color, format="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8), COLORS[color]).save(buffer, format)
    return buffer.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def test_laclip_release_without_header(tmp_path, out):
    """As released: no header, image, caption, URL. Rewrites join by line number; \\r ends no line."""
    csv = tmp_path / "cc3m_original.csv"
    csv.write_bytes(b'a/0.jpg,a bus station,http://x.org/0\n' b'a/1.jpg,"two\nlines, ""quoted""",http://x.org/1\n' b'a/2.jpg,,http://x.org/2\n'
                    b'a/3.jpg\n')
    (tmp_path / "chatgpt.txt").write_bytes(b"A stop for buses.\r\nline\x85one\rstill one\n  \nno newline")
    (tmp_path / "bard.txt").write_bytes(b"b0\nb1\nb2\nb3\n")
    rows, summary = rows_of("laclip", csv, out, "--rewrites", f"chatgpt={tmp_path}/chatgpt.txt", f"bard={tmp_path}/bard.txt", out=out)
    assert rows == [{"image": "a/0.jpg", "alt": "a bus station", "url": "http://x.org/0",
        "rewrite_chatgpt": "A stop for buses.", "rewrite_bard": "b0"},
        {"image": "a/1.jpg", "alt": 'two\nlines, "quoted"', "url": "http://x.org/1",
        "rewrite_chatgpt": "line\ufffdone\rstill one", "rewrite_bard": "b1"}, {"image": "a/2.jpg", "alt": None, "url": "http://x.org/2",
        "rewrite_chatgpt": None, "rewrite_bard": "b2", "error": {"alt": "no text", "rewrite_chatgpt": "no text"}},
        {"line": "a/3.jpg", "rewrite_chatgpt": "no newline", "rewrite_bard": "b3", "error": {"line": "too few columns"}}]
    assert summary == {"rows": 4, "rows with error": 2, "alt: no text": 1, "rewrite_chatgpt: no text": 1,
                       "line: too few columns": 1, "invalid UTF-8 replaced": 1}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("header, options, other", [
    ("url,title,filepath,caption", [], "title"),   # a path goes before a URL, a caption before a title
    ("\ufeffURL,Title,FilePath,Caption", [], "Title"),  # as spreadsheets save it
    ("url,junk,where,what", ["--image-column", "where", "--caption-column", "what"], "junk")])
def test_laclip_header(tmp_path, out, header, options, other, end):
    lines = [header, "http://x.org/0,t0,0.jpg,c0", "", 'http://x.org/1,t1,1.jpg,"c\r\n1"', ""]
    (tmp_path / "a.csv").write_bytes(end.join(lines).encode())
    rows, _ = rows_of("laclip", tmp_path / "a.csv", out, *options, out=out)
    assert rows == [{"image": "0.jpg", "alt": "c0", "url": "http://x.org/0", other: "t0"},
                    {"image": "1.jpg", "alt": "c\r\n1", "url": "http://x.org/1", other: "t1"}]


@pytest.mark.parametrize("lines", [2, 4])
def test_laclip_count_mismatch(tmp_path, out, lines):
    (tmp_path / "a.csv").write_text('image,caption\n0.jpg,"a\nb"\n1.jpg,c\n2.jpg,d\n')
    (tmp_path / "good.txt").write_text("x\n" * 3)
    (tmp_path / "bad.txt").write_text("x\n" * lines)
    fails("laclip", tmp_path / "a.csv", out, "--rewrites", f"bard={tmp_path}/good.txt", f"human={tmp_path}/bad.txt",
          out=out, says=["a.csv has 3 rows", f"bad.txt {lines} lines"])


@pytest.mark.parametrize("text, options, says", [
    ("image,label\n0.jpg,x\n", [], ["expected columns", "caption/title/text", "image,label"]),
    ("image,caption\n0.jpg,x\n", ["--caption-column", "nope"], ["nope", "image,caption"]),
    ("image,caption\n0.jpg,x\n", ["--rewrites", "chatgpt"], ["--rewrites chatgpt", "SOURCE=FILE"]),
    ("image,caption\n0.jpg,x\n", ["--rewrites", "bard=no/such.txt"], ["no/such.txt", "No such file"]),
    ('image,caption\n0.jpg,"never closed\n' + "x" * (1 << 24), [], ["a.csv, line", "field limit"]),
    ('image,caption\n0.jpg,"a dog\n1.jpg,a cat\n', [], ["a.csv, line"]),  # the rest of the file is no caption
    ("image,caption\n", [], ["no rows"]),
    ("", [], ["first line"])])
def test_laclip_mistakes(tmp_path, out, text, options, says):
    (tmp_path / "a.csv").write_text(text)
    fails("laclip", tmp_path / "a.csv", out, *options, out=out, says=says)


@pytest.mark.parametrize("header", ["", "caption\turl\n", "url\tcaption\n"])
def test_tsv_both_orders(tmp_path, out, header):
    """CC3M's and CC12M's order, told apart row by row; a caption that is a URL goes by the row before."""
    (tmp_path / "a.tsv").write_bytes(header.encode() + "\n".join(["a bus station\thttp://x.org/0", "http://caption.org\thttps://x.org/1",
        "HTTPS://x.org/2\ta \"quote\" and \u00fc", "http://x.org/3\thttp://caption.org", "no url\tat all", "http://x.org/5\tthree\tcolumns",
        "http://x.org/6\t \r", ""]).encode())
    rows, summary = rows_of("tsv", tmp_path / "a.tsv", out, out=out)
    assert rows == [{"url": "http://x.org/0", "alt": "a bus station"}, {"url": "https://x.org/1", "alt": "http://caption.org"},
        {"url": "HTTPS://x.org/2", "alt": "a \"quote\" and \u00fc"}, {"url": "http://x.org/3", "alt": "http://caption.org"},
        {"line": "no url\tat all", "error": {"line": "not one URL and one caption"}},
        {"line": "http://x.org/5\tthree\tcolumns", "error": {"line": "not one URL and one caption"}},
        {"url": "http://x.org/6", "alt": None, "error": {"alt": "no text"}}]
    assert summary["rows with error"] == 3 and summary["line: not one URL and one caption"] == 2


def test_tsv_images(tmp_path, out):
    """The number in the name counts data rows from 0: not the header, but rows that are broken."""
    (tmp_path / "a.tsv").write_text("url\tcaption\nhttp://x/0\tzero\nbroken\nhttp://x/2\ttwo\n")
    (tmp_path / "00000002.jpg").write_bytes(encoded("red"))
    rows, summary = rows_of("tsv", tmp_path / "a.tsv", out, "--images", tmp_path, "--image-pattern", "{index:08d}.jpg", out=out)
    assert rows == [{"url": "http://x/0", "alt": "zero", "error": {"image": "missing file"}},
                    {"line": "broken", "error": {"line": "not one URL and one caption"}},
                    {"image": "00000002.jpg", "url": "http://x/2", "alt": "two"}]
    assert summary["image: missing file"] == 1 and summary["rows with error"] == 2
    rows, summary = rows_of("tsv", tmp_path / "a.tsv", out, "--images", tmp_path, "--image-pattern", "{index:08d}.jpg",
                            "--overwrite", "--drop-errors", out=out)
    assert [row["image"] for row in rows] == ["00000002.jpg"]
    assert (summary["rows"], summary["rows left out"], summary["image: missing file"]) == (1, 2, 1)
    fails("tsv", tmp_path / "a.tsv", out, "--images", tmp_path, "--overwrite", "--drop-errors", out=out, says=["all 3 rows"])
    (tmp_path / "000000000.jpg").write_bytes(encoded("red"))
    rows, _ = rows_of("tsv", tmp_path / "a.tsv", out, "--images", tmp_path, "--overwrite", out=out)
    assert rows[0] == {"image": "000000000.jpg", "url": "http://x/0", "alt": "zero"}
    for pattern in ("{i}.jpg", "x.jpg", "{index[0]}.jpg"):
        fails("tsv", tmp_path / "a.tsv", out, "--overwrite", "--image-pattern", pattern, out=out, says=[pattern])


def meta(**keys):
    return json.dumps({"key": "000000000", "status": "success", **keys}, indent=4).encode()


def test_img2dataset(tmp_path, out):
    """Rows point at bytes inside the tars, and those bytes are the right images."""
    shards = tmp_path / "set" / "shards"
    shards.mkdir(parents=True)
    write_tar(shards / "00001.tar", [("000010000.png", encoded("blue", "PNG")), ("000010000.txt", "bl\u00fce".encode()),
        ("000010000.json", b"{broken")])
    write_tar(shards / "00000.tar", [
        ("000000000.jpg", encoded("red")), ("000000000.txt", b" red \n"),
        ("000000000.json", meta(url="http://x.org/0", caption="not this one", width=16, height=8, exif="{}", original_width=9,
                                sha256="0", rewrite_bard="crimson", score=float("nan"))),
        ("000000001.webp", encoded("lime", "WEBP")), ("000000001.txt", b""),
        ("000000001.json", meta(caption="lime")),
        ("a" * 150 + ".jpg", encoded("blue")),             # a name that needs a header block of its own
        ("000000003.txt", b"text alone"),
        ("000000000.seg.png", encoded("blue", "PNG")),     # webdataset: another part of 000000000
        ("000000004.cls", b"7"), ("._000000001.webp", b"of a Mac")])
    (shards / "00000.parquet").write_bytes(b"not a tar")
    (shards / "00000_stats.json").write_text("{}")
    rows, summary = rows_of("img2dataset", tmp_path / "set", out, "--image-root", tmp_path / "set", out=out)

    seen = []
    for row in rows:
        if "image" in row:
            shard, place = row.pop("image").split("@")
            offset, size = map(int, place.split("+"))
            with open(tmp_path / "set" / shard, "rb") as f:
                data = os.pread(f.fileno(), size, offset)
            image = Image.open(io.BytesIO(data))
            image.load()
            pixel = image.convert("RGB").getpixel((8, 4))
            nearest = min(COLORS, key=lambda c: sum(abs(a - b) for a, b in zip(COLORS[c], pixel)))
            seen.append((shard, image.format, nearest, data == encoded(nearest, image.format)))
    assert seen == [("shards/00000.tar", "JPEG", "red", True), ("shards/00000.tar", "WEBP", "lime", True),
                    ("shards/00000.tar", "JPEG", "blue", True), ("shards/00001.tar", "PNG", "blue", True)]
    place = {"shard": "shards/00000.tar", "key": "000000003"}
    assert rows == [{"alt": "red", "url": "http://x.org/0", "width": 16, "height": 8, "rewrite_bard": "crimson", "score": None}, {"alt": "lime"},
        {"alt": None, "error": {"alt": "no text"}}, {"alt": "text alone", **place, "error": {"image": "no image in shard"}},
        {"alt": "bl\u00fce", "shard": "shards/00001.tar", "key": "000010000", "error": {"json": "not a JSON object"}}]
    assert "NaN" not in out.read_text()
    assert summary["image: no image in shard"] == 1 and summary["alt: no text"] == 1
    assert [summary[f"passed over: {what}"] for what in (".seg.png", ".cls", "hidden")] == [1, 1, 1]


def bytes_of(root, row):
    shard, place = row["image"].split("@")
    offset, size = map(int, place.split("+"))
    return (root / shard).read_bytes()[offset:offset + size]


def test_img2dataset_odd_tars(tmp_path, out):
    """Tars joined by cat, keys with dots, members in any order: the right pair. A key that comes twice in one tar: none."""
    red, lime, blue = map(encoded, COLORS)
    parts = [write_tar(tmp_path / f"{n}.part", [("0.jpg", data), ("0.txt", n.encode())]) for n, data in (("a", red), ("b", lime))]
    (tmp_path / "joined.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    write_tar(tmp_path / "odd.tar", [("./v1.5.txt", b"v5"), ("x/0.jpg", red), ("v1.6.jpg", lime), ("v1.6.txt", b"v6"), ("0.txt", b"top"),
                                     ("./v1.5.jpg", blue), ("x/0.txt", b"below"), ("0.jpg", lime)])
    write_tar(tmp_path / "twice.tar", [("7.jpg", red), ("7.txt", b"first"), ("8.jpg", blue), ("8.txt", b"once"),
                                       ("7.jpg", lime), ("7.txt", b"second")])
    rows, summary = rows_of("img2dataset", tmp_path, out, "--image-root", tmp_path, out=out)
    found = [(row["alt"], bytes_of(tmp_path, row)) for row in rows if "image" in row]
    assert found[:2] == [("a", red), ("b", lime)] and found[-1] == ("once", blue)
    assert sorted(found[2:-1]) == sorted([("v5", blue), ("v6", lime), ("top", lime), ("below", red)])
    assert [row for row in rows if "image" not in row] == [
        {"alt": None, "shard": "twice.tar", "key": "7", "error": {"image": "comes twice in shard", "alt": "no text"}}]


def test_img2dataset_files_and_links(tmp_path, out):
    """Its output `files`, in a folder that is a link to another disk, as a model hub's cache has them."""
    (tmp_path / "disk" / "00000").mkdir(parents=True)
    (tmp_path / "disk" / "00000" / "000000000.jpg").write_bytes(encoded("red"))
    (tmp_path / "disk" / "00000" / "000000000.json").write_bytes(meta(caption=["red", "crimson"], url="u"))
    root = tmp_path / "root"
    root.mkdir()
    (root / "set").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "00000.parquet").write_bytes(b"PAR1")  # img2dataset writes it beside the files
    (tmp_path / "disk" / "00000_stats.json").write_text("{}")
    rows, _ = rows_of("img2dataset", root / "set", out, "--image-root", root, out=out)
    assert rows == [{"image": "set/00000/000000000.jpg", "alt": ["red", "crimson"], "url": "u"}]
    (root / "p").mkdir()
    (root / "p" / "0.parquet").write_bytes(b"PAR1")
    fails("img2dataset", root / "p", out, "--overwrite", "--image-root", root, out=out, says=["parquet", "--output_format"])


@pytest.mark.parametrize("mode, name", [("w:gz", "0.tar.gz"), ("w:xz", "0.tar"), ("w:bz2", "0.tar.bz2")])
@pytest.mark.parametrize("by_folder", [False, True])
def test_img2dataset_compressed(tmp_path, out, mode, name, by_folder):
    (tmp_path / "in").mkdir()
    path = write_tar(tmp_path / "in" / name, [("0.jpg", encoded("red")), ("0.txt", b"red")], mode)
    fails("img2dataset", path.parent if by_folder else path, out, "--image-root", tmp_path, out=out, says=[name, "not an uncompressed tar"])


@pytest.mark.parametrize("damage, last", [("in the second image", "0.txt"), ("in a header", "0.txt"), ("between two members", "0.txt"),
    ("in the padding of the text", "0.txt"), ("before the end mark", "1.txt"), ("a broken header", "0.txt"), ("in the first image", "none")])
def test_img2dataset_damaged(tmp_path, out, damage, last):
    """Wherever a download broke off, a row says so, the others are read. tarfile alone takes some of these for a whole tar."""
    path = write_tar(tmp_path / "0.tar", [("0.jpg", encoded("red")), ("0.txt", b"red"), ("1.jpg", encoded("blue")), ("1.txt", b"blue")])
    write_tar(tmp_path / "1.tar", [("2.jpg", encoded("lime")), ("2.txt", b"lime")])
    with tarfile.open(path) as tar:
        at = {member.name: member for member in tar}
    data = bytearray(path.read_bytes())
    if damage == "a broken header":
        data[at["1.jpg"].offset + 10] ^= 0xFF
    else:
        del data[{"in the second image": at["1.jpg"].offset_data + 40, "in a header": at["1.jpg"].offset + 100,
                  "between two members": at["1.jpg"].offset, "in the padding of the text": at["0.txt"].offset_data + 9,
                  "before the end mark": at["1.txt"].offset_data + 512, "in the first image": at["0.jpg"].offset_data + 1}[damage]:]
    path.write_bytes(data)
    rows, _ = rows_of("img2dataset", path, tmp_path / "1.tar", out, "--image-root", tmp_path, out=out)
    *rows, error, good = rows
    assert good["alt"] == "lime"
    assert error == {"shard": "0.tar", "last_good_member": last, "error": {"shard": "truncated, damaged or no tar"}}
    assert [row["alt"] for row in rows] == {"none": [], "0.txt": ["red"], "1.txt": ["red", "blue"]}[last]


def test_img2dataset_places(tmp_path, out):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = write_tar(tmp_path / "0.tar", [("0.jpg", encoded("red")), ("0.txt", b"red")])
    fails("img2dataset", path, out, "--image-root", inside, out=out, says=["0.tar", "not below --image-root"])
    fails("img2dataset", inside, out, "--image-root", tmp_path, out=out, says=["inside", "no .tar"])
    fails("img2dataset", path, tmp_path / "1.tar", out, "--image-root", tmp_path, out=out, says=["1.tar"])
    fails("img2dataset", path, out, out=out, says=["--image-root"])
    (tmp_path / "empty.tar").write_bytes(b"")
    fails("img2dataset", tmp_path / "empty.tar", out, "--image-root", tmp_path, out=out, says=["empty.tar"])


def test_forgotten_output_does_not_eat_a_shard(tmp_path, out):
    a, b = (write_tar(tmp_path / f"{n}.tar", [("0.jpg", encoded("red")), ("0.txt", b"red")]) for n in "ab")
    fails("img2dataset", a, b, "--image-root", tmp_path, "--overwrite", out=out, says=["b.tar", ".jsonl"])


def test_coco_official(tmp_path, out):
    (tmp_path / "captions.json").write_text(json.dumps({"info": {}, "licenses": [],
        "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 640, "height": 480},
        {"id": 4, "file_name": "COCO_train2014_000000000004.jpg"}, {"id": 5, "file_name": "COCO_train2014_000000000005.jpg"}],
        "annotations": [{"image_id": 4, "id": 1, "caption": "a dog"}, {"image_id": 9, "id": 2, "caption": "A cat.\n"},
        {"image_id": 9, "id": 3, "caption": "one cat"}, {"image_id": 7, "id": 4, "caption": "lost"}]}))
    expected = [{"image": "COCO_train2014_000000000009.jpg", "alt": ["A cat.\n", "one cat"]},
                {"image": "COCO_train2014_000000000004.jpg", "alt": ["a dog"]},
                {"image": "COCO_train2014_000000000005.jpg", "alt": None, "error": {"alt": "no text"}},
                {"alt": ["lost"], "error": {"image": "not in images"}}]
    captions = tmp_path / "captions.json"
    rows, summary = rows_of("coco", captions, out, out=out)
    assert rows == expected and summary["rows with error"] == 2
    rows, _ = rows_of("coco", captions, out, "--images-dir", "train2014/", "--overwrite", out=out)
    assert [row["image"] for row in rows[:3]] == ["train2014/" + row["image"] for row in expected[:3]]
    assert rows[3] == expected[3]
    fails("coco", captions, out, "--overwrite", "--split", "test", out=out, says=["--split"])


@pytest.fixture
def karpathy(tmp_path):
    def image(name, split, *texts, **more):
        return {"filename": name, "split": split, "imgid": 0, "sentids": [0], **more,
                "sentences": [{"raw": text, "tokens": text.split(), "sentid": 0} for text in texts]}
    coco = [image("0.jpg", "test", "t0", "t1", filepath="val2014", cocoid=1), image("1.jpg", "restval", "r0", filepath="val2014", cocoid=2),
            image("2.jpg", "train", "n0", filepath="train2014", cocoid=3)]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": coco, "dataset": "coco"}))
    flickr = [image("10.jpg", "val", "v0"), image("11.jpg", "test", "f0", "f1")]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": flickr, "dataset": "flickr30k"}))
    return tmp_path


def test_coco_karpathy(karpathy, out):
    test = {"image": "val2014/0.jpg", "alt": ["t0", "t1"]}
    train = [{"image": "val2014/1.jpg", "alt": ["r0"]}, {"image": "train2014/2.jpg", "alt": ["n0"]}]
    coco = karpathy / "dataset_coco.json"
    assert rows_of("coco", coco, out, out=out)[0] == [test, *train]
    assert rows_of("coco", coco, out, "--overwrite", "--split", "test", out=out)[0] == [test]
    assert rows_of("coco", coco, out, "--overwrite", "--split", "train", "restval", out=out)[0] == train
    flickr = karpathy / "dataset_flickr30k.json"
    rows, _ = rows_of("coco", flickr, out, "--overwrite", "--split", "test", "--images-dir", "f30k", out=out)
    assert rows == [{"image": "f30k/11.jpg", "alt": ["f0", "f1"]}]
    fails("coco", flickr, out, "--overwrite", "--split", "restval", out=out, says=["restval", "test, val"])


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", "[" * 100_000, '{"images": [{"id": 1, "file_name": "0.jpg"}]}',
    '{"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}', '{"images": []}'])
def test_coco_mistakes(tmp_path, out, text):
    (tmp_path / "a.json").write_text(text)
    says = "no rows" if text == '{"images": []}' else "a.json"
    fails("coco", tmp_path / "a.json", out, out=out, says=[says])


def test_vecap(tmp_path, out):
    """Two files, one of several chunks: escapes, braces, commas, half an emoji, and what is no text."""
    odd = {"http://x.org/{,}": 'a "b": {c}, \\', "http://x.org/\u00fc": "\u00fc\n\ud83d", "u2": "", "u3": None, "u4": 5}
    many = {f"http://x.org/{k}": f"caption {k} " + "\U0001f600x" * (k % 97) for k in range(20_000)}
    (tmp_path / "0.json").write_text(json.dumps(odd, indent=1))
    (tmp_path / "1.json").write_text(json.dumps(many, ensure_ascii=False), encoding="utf-8")
    assert (tmp_path / "1.json").stat().st_size > 4 << 20
    rows, summary = rows_of("vecap", tmp_path / "0.json", tmp_path / "1.json", out, out=out)
    assert rows[:5] == [{"url": "http://x.org/{,}", "vecap": 'a "b": {c}, \\'}, {"url": "http://x.org/\u00fc", "vecap": "\u00fc\n\ud83d"},
        {"url": "u2", "vecap": None, "error": {"vecap": "no text"}}, {"url": "u3", "vecap": None, "error": {"vecap": "no text"}},
        {"url": "u4", "vecap": None, "error": {"vecap": "a number, not a text"}}]
    assert rows[5:] == [{"url": url, "vecap": text} for url, text in many.items()]
    assert summary["rows with error"] == 3


@pytest.mark.parametrize("text, says", [('{"u0": "a", "u1": "b', "after 1 pairs"), ('{"u0": "a", "u1": "b"', "after 2 pairs"),
    ('{"u0": "a"} trailing', "after 1 pairs"), ('[{"url": "u0", "caption": "a"}]', "after 0 pairs"),
    ("", "after 0 pairs"), ('{"u0": ' + "[" * 2_000_000, "after 0 pairs")])
def test_vecap_mistakes(tmp_path, out, text, says):
    (tmp_path / "a.json").write_text(text)
    fails("vecap", tmp_path / "a.json", out, out=out, says=["a.json", says])


def test_folder(tmp_path, out):
    photos = tmp_path / "photos"
    for name, text in {"b/2.PNG": "  two \n", "b/1.jpg": "one\n\n uno \r\n", "a/z.jpeg": "", "c.jpg": None, "B.jpg": "caf\u00e9"}.items():
        path = photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("red"))
        if text is not None:
            path.with_suffix(".txt").write_bytes(text.encode())
    (photos / "README.txt").write_text("no image beside it")
    rows, summary = rows_of("folder", photos, out, out=out)
    assert rows == [{"image": "B.jpg", "alt": "caf\u00e9"}, {"image": "a/z.jpeg", "alt": None, "error": {"alt": "no text"}},
                    {"image": "b/1.jpg", "alt": ["one", "uno"]}, {"image": "b/2.PNG", "alt": "two"},
                    {"image": "c.jpg", "alt": None, "error": {"alt": "no text"}}]
    assert summary["alt: no text"] == 2 and summary["passed over: .txt without an image"] == 1


def test_folder_takes_what_the_stages_read_and_counts_the_rest(tmp_path, out):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (photos / "__MACOSX", photos / ".ipynb_checkpoints", elsewhere):
        path.mkdir(parents=True)
        (path / "x.png").write_bytes(encoded("red", "PNG"))
    for name in ("a.tif", "b.avif", "c.jfif", "d.jp2", "e.ppm", "._f.jpg", "g.heic", "h.eps"):
        (photos / name).write_bytes(b"?")
    (photos / "linked").symlink_to(elsewhere)
    (photos / "round").symlink_to(photos)
    rows, summary = rows_of("folder", photos, out, out=out)
    assert [row["image"] for row in rows] == ["a.tif", "b.avif", "c.jfif", "d.jp2", "e.ppm", "linked/x.png"]
    assert [summary[f"passed over: {what}"] for what in ("hidden", ".heic", ".eps")] == [1, 1, 1]


def test_folder_with_metadata(tmp_path, out):
    """Hugging Face's imagefolder: files are named from metadata's own folder; its columns stay; nothing vanishes."""
    photos = tmp_path / "photos"
    for name in ("a.jpg", "b.jpg", "in/c.jpg", "d.jpg"):
        (photos / name).parent.mkdir(exist_ok=True, parents=True)
        (photos / name).write_bytes(encoded("red"))
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"file_name": "b.jpg", "text": "bee", "boxes": [[1, 2]], "error": "mine"}, {"file_name": "a.jpg", "text": ["one", "two"]},
        {"file_name": "gone.jpg", "text": "lost"}, {"file_name": "b.jpg", "text": 7})) + "no json\n")
    (photos / "in" / "metadata.csv").write_text('file_name,text,rating\nc.jpg,"[""sea"", ""see""]",5\nx,y\n')
    (photos / "b.txt").write_text("of a text file")
    (photos / "d.txt").write_text("dee")
    rows, summary = rows_of("folder", photos, out, out=out)
    assert rows == [{"image": "in/c.jpg", "alt": ["sea", "see"], "rating": "5"}, {"line": "x,y", "error": {"line": "not 3 columns"}},
        {"image": "b.jpg", "alt": "bee", "boxes": [[1, 2]]}, {"image": "a.jpg", "alt": ["one", "two"]},
        {"alt": "lost", "file_name": "gone.jpg", "error": {"image": "missing file"}},
        {"image": "b.jpg", "alt": None, "error": {"alt": "a number, not a text"}},
        {"error": {"line": "not JSON: Expecting value: line 1 column 1 (char 0)"}, "line": "no json"}, {"image": "d.jpg", "alt": "dee"}]
    assert summary["passed over: column"] == summary["passed over: .txt beside metadata"] == 1
    (photos / "in" / "metadata.csv").write_text("name,words\nc.jpg,sea\n")
    fails("folder", photos, out, "--overwrite", out=out, says=["in/metadata.csv has no file_name, only name, words"])
    (photos / "in" / "metadata.csv").write_text("file_name,words\nc.jpg,sea\n")
    assert rows_of("folder", photos, out, "--overwrite", out=out)[0][0]["error"]["alt"].startswith("no caption column: expected caption/title/text")
    assert rows_of("folder", photos, out, "--overwrite", "--caption-column", "words", out=out)[0][0] == {"image": "in/c.jpg", "alt": "sea"}
    (photos / "in" / "metadata.csv").rename(photos / "in" / "metadata.parquet")
    fails("folder", photos, out, "--overwrite", out=out, says=["parquet is not read"])


CELLS = {  # what a cell or a JSON value holds -> alt, error
    '["a", "b \\"q\\""]': (["a", 'b "q"'], None), ' ["a"] ': (["a"], None), '["a", null, 3]': (["a", None, None], [None, None, "a number, not a text"]),
    "[photo] of a dog": ("[photo] of a dog", None), "[photo]": ("[photo]", None), "{sale}": ("{sale}", None), "[1, 2]": (None, "a number, not a text"),
    "['a', 'b']": (None, "looks like a list, but is no JSON"), '{"en": "a"}': (None, "an object, not a text"), "[]": (None, "no text"),
    '[["a"]]': (None, "a list, not a text"), "2012": ("2012", None), '"a"': ('"a"', None), "[" * 5000 + "]": (None, "looks like a list, but is no JSON")}


def test_a_cell_with_a_list_is_a_list_of_captions(tmp_path, out):
    """As Flickr30k's CSV on the hub has them. A list, a number or an object never becomes a text with brackets."""
    expected = [{"alt": alt, **({"error": {"alt": why}} if why else {})} for alt, why in CELLS.values()]
    with open(tmp_path / "a.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerows([["filename", "raw", "split"], *([f"{i}.jpg", cell, "test"] for i, cell in enumerate(CELLS))])
    rows, summary = rows_of("laclip", tmp_path / "a.csv", out, "--image-column", "filename", "--caption-column", "raw", out=out)
    assert rows == [{"image": f"{i}.jpg", **row, "split": "test"} for i, row in enumerate(expected)] and summary["alt: a number, not a text"] == 2
    (tmp_path / "a.tsv").write_text("".join(f"http://x/{i}\t{cell}\n" for i, cell in enumerate(CELLS)))
    assert [{key: row[key] for key in row if key != "url"} for row in rows_of("tsv", tmp_path / "a.tsv", out, "--overwrite", out=out)[0]] == expected
    (tmp_path / "a.json").write_text(json.dumps({cell: json.loads(cell) for cell in CELLS if cell[:2] in ('["', '{"', "[1")} | {"n": 3, "t": True}))
    rows, _ = rows_of("vecap", tmp_path / "a.json", out, "--overwrite", out=out)
    assert [(row["vecap"], row.get("error", {}).get("vecap")) for row in rows] == [CELLS[row["url"]] for row in rows[:-2]] + [
        (None, "a number, not a text"), (None, "a boolean, not a text")]


def test_what_is_passed_over_is_named(tmp_path, out):
    for name in ("a.jpg", "b.pdf", "c.pdf", "d.pdf", "e.pdf"):
        (tmp_path / name).write_bytes(encoded("red"))
    done = run("folder", tmp_path, out)
    assert re.search(r"passed over: \.pdf +4  b\.pdf, c\.pdf, d\.pdf$", done.stdout, re.M), done.stdout
    assert re.search(r"  alt: no text +1  a\.jpg$", done.stdout, re.M), done.stdout


def test_texts_that_begin_with_a_mark(tmp_path, out):
    (tmp_path / "a.tsv").write_bytes("\ufeffhttp://x/0\ta\n".encode())
    assert rows_of("tsv", tmp_path / "a.tsv", out, out=out)[0] == [{"url": "http://x/0", "alt": "a"}]
    (tmp_path / "a.tsv").write_bytes("http://x/0\ta\n".encode("utf-16"))
    fails("tsv", tmp_path / "a.tsv", out, "--overwrite", out=out, says=["UTF-16"])
    (tmp_path / "a.json").write_text('{"images": [{"filename": "0.jpg", "split": "test", "sentences": [{"raw": " "}, {"raw": ""}]}]}')
    rows, _ = rows_of("coco", tmp_path / "a.json", out, "--overwrite", out=out)
    assert rows == [{"image": "0.jpg", "alt": None, "error": {"alt": "no text"}}]  # nothing but blanks is no text


def test_existing_output(tmp_path, out):
    (tmp_path / "a.tsv").write_text("http://x/0\tnew\n")
    out.write_text("precious\n")
    fails("tsv", tmp_path / "a.tsv", out, out=out, says=["out.jsonl exists", "--overwrite"])
    rows, _ = rows_of("tsv", tmp_path / "a.tsv", out, "--overwrite", out=out)
    assert rows == [{"url": "http://x/0", "alt": "new"}]


@pytest.mark.parametrize("number, leftovers", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 1)])
def test_killed_halfway(tmp_path, out, number, leftovers):
    """OUT never exists half made: the input is a pipe that stops midway, then the process is killed."""
    os.mkfifo(tmp_path / "pipe")
    process = subprocess.Popen([*COMMAND, "tsv", tmp_path / "pipe", out], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with open(tmp_path / "pipe", "w") as pipe:
        pipe.write("http://x.org/0\tcaption\n" * 20_000)
        pipe.flush()
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size for path in tmp_path.glob("*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not out.exists()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert stderr == b""
    assert not out.exists() and len(list(tmp_path.glob("*.tmp"))) == leftovers


def test_it_needs_no_torch_and_no_script():
    """So it runs on a machine that only fetches data."""
    code = "import sys; sys.modules |= dict.fromkeys(('torch', 'train_clip')); from data.import_captions import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m data.import_captions" in done.stdout, done.stderr
