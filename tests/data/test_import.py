"""data/import_captions.py, run as a user runs it, on a tiny real input of every format, and on broken ones.

Expected rows stand in full: an importer that loses, moves or invents a text spoils every later stage unnoticed."""
import csv
import io
import json
import re
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from conftest import ROOT, assert_mistake
from tools import fill, run_tool

COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
NUMBER, NO_LIST = "a number, not a text", "looks like a list, but is no JSON"
NO_TEXT, NO_PAIR = {"alt": "no text"}, {"line": "not one URL and one caption"}


def rows_of(*args):
    """Run a command that must succeed. -> (rows, {summary line: count})"""
    done = run_tool("import_captions", *args, fresh=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    summary = {line[:40].strip(): int(line[40:53].replace(",", "")) for line in done.stdout.splitlines()}
    out = next(arg for arg in args if str(arg).endswith(".jsonl"))
    assert not list(out.parent.glob("*.tmp"))
    *lines, end = out.read_bytes().split(b"\n")
    assert end == b"" and summary["rows"] == len(lines)
    rows = [json.loads(line.decode("utf-8")) for line in lines]
    errors = sum("error" in row for row in rows)
    assert errors == (0 if "--drop-errors" in args else summary["rows with error"])
    return rows, summary


@pytest.fixture
def fails(tmp_path):
    """Run a command that must fail: status 2, one line that names the problem, no file made or changed."""
    def fails(*args, says):
        before = {path: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()}
        assert_mistake(run_tool("import_captions", *args, fresh=True), "import_captions.py: error: ", *says)
        assert before == {path: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()}
    return fails


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
    fill(tmp_path, {"a.csv": 'a/0.jpg,a bus station,http://x.org/0\na/1.jpg,"two\nlines, ""quoted""",http://x.org/1\n'
                             'a/2.jpg,,http://x.org/2\na/3.jpg\n', "bard.txt": "b0\nb1\nb2\nb3\n",
                    "chatgpt.txt": b"A stop for buses.\r\nline\x85one\rstill one\n  \nno newline"})
    sources = f"chatgpt={tmp_path}/chatgpt.txt", f"bard={tmp_path}/bard.txt"
    rows, summary = rows_of("laclip", tmp_path / "a.csv", out, "--rewrites", *sources)
    assert rows == [
        {"image": "a/0.jpg", "alt": "a bus station", "url": "http://x.org/0",
         "rewrite_chatgpt": "A stop for buses.", "rewrite_bard": "b0"},
        {"image": "a/1.jpg", "alt": 'two\nlines, "quoted"', "url": "http://x.org/1",
         "rewrite_chatgpt": "line\ufffdone\rstill one", "rewrite_bard": "b1"},
        {"image": "a/2.jpg", "alt": None, "url": "http://x.org/2", "rewrite_chatgpt": None, "rewrite_bard": "b2",
         "error": {"alt": "no text", "rewrite_chatgpt": "no text"}},
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
    rows, _ = rows_of("laclip", tmp_path / "a.csv", out, *options)
    assert rows == [{"image": "0.jpg", "alt": "c0", "url": "http://x.org/0", other: "t0"},
                    {"image": "1.jpg", "alt": "c\r\n1", "url": "http://x.org/1", other: "t1"}]


CSV, TSV = 'image,caption\n0.jpg,"a\nb"\n1.jpg,c\n2.jpg,d\n', "http://x/0\ta\n"
BOX = '{"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}'


@pytest.mark.parametrize("command, text, options, says", [
    ("laclip", "image,label\n0.jpg,x\n", [], ["expected columns", "caption/title/text", "image,label"]),
    ("laclip", CSV, ["--caption-column", "nope"], ["nope", "image,caption"]),
    ("laclip", CSV, ["--rewrites", "chatgpt"], ["--rewrites chatgpt", "SOURCE=FILE"]),
    ("laclip", CSV, ["--rewrites", "bard=no/such.txt"], ["no/such.txt", "No such file"]),
    ("laclip", CSV, ["--rewrites", "bard=3.txt", "human=2.txt"], ["a.file has 3 rows", "2.txt 2 lines"]),
    ("laclip", CSV, ["--rewrites", "bard=3.txt", "human=4.txt"], ["a.file has 3 rows", "4.txt 4 lines"]),
    ("laclip", 'image,caption\n0.jpg,"never closed\n' + "x" * (1 << 24), [], ["a.file, line", "field limit"]),
    ("laclip", 'image,caption\n0.jpg,"a dog\n1.jpg,a cat\n', [], ["a.file, line"]),  # the rest of the file is no caption
    ("laclip", "image,caption\n", [], ["no rows"]), ("laclip", "", [], ["first line"]),
    *(("tsv", TSV, ["--image-pattern", name], [name]) for name in ("{i}.jpg", "x.jpg", "{index[0]}.jpg")),
    ("tsv", TSV.encode("utf-16"), [], ["UTF-16"]),
    *(("coco", text, [], ["a.file"]) for text in ("{", "[1]", "3", "[" * 100_000, BOX, '{"images": [{"file_name": "0.jpg"}]}')),
    ("vecap", '{"u0": "a", "u1": "b', [], ["a.file", "after 1 pairs"]), ("vecap", "", [], ["a.file", "after 0 pairs"]),
    ("vecap", '{"u0": "a", "u1": "b"', [], ["a.file", "after 2 pairs"]),
    ("vecap", '[{"url": "u0", "caption": "a"}]', [], ["a.file", "after 0 pairs"]),
    ("vecap", '{"u0": ' + "[" * 2_000_000, [], ["a.file", "after 0 pairs"])], ids=lambda value: str(value)[:30])
def test_mistakes_and_damaged_files(tmp_path, out, fails, command, text, options, says):
    fill(tmp_path, {"a.file": text, **{f"{lines}.txt": "x\n" * lines for lines in (2, 3, 4)}})
    options = [re.sub(r"=(\d)", rf"={tmp_path}/\1", option) for option in options]
    fails(command, tmp_path / "a.file", out, *options, says=says)


@pytest.mark.parametrize("header", ["", "caption\turl\n", "url\tcaption\n", "\ufeff"])
def test_tsv_both_orders(tmp_path, out, header):
    """CC3M's and CC12M's order, told apart row by row; a caption that is a URL goes by the row before."""
    lines = ["a bus station\thttp://x.org/0", "http://caption.org\thttps://x.org/1", "HTTPS://x.org/2\ta \"quote\" and \u00fc",
             "http://x.org/3\thttp://caption.org", "no url\tat all", "http://x.org/5\tthree\tcolumns", "http://x.org/6\t \r", ""]
    (tmp_path / "a.tsv").write_bytes((header + "\n".join(lines)).encode())
    rows, summary = rows_of("tsv", tmp_path / "a.tsv", out)
    assert rows == [{"url": "http://x.org/0", "alt": "a bus station"}, {"url": "https://x.org/1", "alt": "http://caption.org"},
                    {"url": "HTTPS://x.org/2", "alt": "a \"quote\" and \u00fc"},
                    {"url": "http://x.org/3", "alt": "http://caption.org"}, {"line": "no url\tat all", "error": NO_PAIR},
                    {"line": "http://x.org/5\tthree\tcolumns", "error": NO_PAIR},
                    {"url": "http://x.org/6", "alt": None, "error": NO_TEXT}]
    assert summary["rows with error"] == 3 and summary["line: not one URL and one caption"] == 2


def test_tsv_images(tmp_path, out, fails):
    """The number in the name counts data rows from 0: not the header, but rows that are broken."""
    (tmp_path / "a.tsv").write_text("url\tcaption\nhttp://x/0\tzero\nbroken\nhttp://x/2\ttwo\n")
    (tmp_path / "00000002.jpg").write_bytes(encoded("red"))
    command = "tsv", tmp_path / "a.tsv", out, "--overwrite", "--images", tmp_path
    rows, summary = rows_of(*command, "--image-pattern", "{index:08d}.jpg")
    assert rows == [{"url": "http://x/0", "alt": "zero", "error": {"image": "missing file"}},
                    {"line": "broken", "error": NO_PAIR}, {"image": "00000002.jpg", "url": "http://x/2", "alt": "two"}]
    assert summary["image: missing file"] == 1 and summary["rows with error"] == 2
    rows, summary = rows_of(*command, "--image-pattern", "{index:08d}.jpg", "--drop-errors")
    assert [row["image"] for row in rows] == ["00000002.jpg"]
    assert (summary["rows"], summary["rows left out"], summary["image: missing file"]) == (1, 2, 1)
    fails(*command, "--drop-errors", says=["all 3 rows"])
    fails("tsv", tmp_path / "a.tsv", out, says=["out.jsonl exists", "--overwrite"])
    (tmp_path / "000000000.jpg").write_bytes(encoded("red"))
    assert rows_of(*command)[0][0] == {"image": "000000000.jpg", "url": "http://x/0", "alt": "zero"}


def meta(**keys):
    return json.dumps({"key": "000000000", "status": "success", **keys}, indent=4).encode()


def bytes_of(root, row):
    """What a row's image points at in a tar; the place is taken out of the row."""
    shard, offset, size = re.fullmatch(r"(.*)@(\d+)\+(\d+)", row.pop("image")).groups()
    return (root / shard).read_bytes()[int(offset):int(offset) + int(size)]


def test_img2dataset(tmp_path, out):
    """Rows point at bytes inside the tars: those of the right images. Tars may be joined, members in any order."""
    red, lime, blue = map(encoded, COLORS)
    shards = fill(tmp_path / "set" / "shards", {"00000.parquet": b"not a tar", "00000_stats.json": "{}"})
    write_tar(shards / "00001.tar", [("000010000.png", encoded("blue", "PNG")), ("000010000.txt", "bl\u00fce".encode()),
                                     ("000010000.json", b"{broken")])
    joined = write_tar(tmp_path / "joined", [  # the same key in two folders; a key with dots; one that comes twice
        ("7.txt", b"v7"), ("x/7.txt", b"below"), ("./v1.5.txt", b"v5"), ("x/7.jpg", red), ("7.jpg", lime),
        ("./v1.5.jpg", blue), ("8.jpg", red), ("8.txt", b"first"), ("8.jpg", lime), ("8.txt", b"second")])
    with open(shards / "00001.tar", "ab") as shard:
        shard.write(joined.read_bytes())
    write_tar(shards / "00000.tar", [
        ("000000000.jpg", red), ("000000000.txt", b" red \n"),
        ("000000000.json", meta(url="http://x.org/0", caption="not this one", width=16, height=8, exif="{}", original_width=9,
                                sha256="0", rewrite_bard="crimson", score=float("nan"))),
        ("000000001.webp", encoded("lime", "WEBP")), ("000000001.txt", b""), ("000000001.json", meta(caption="lime")),
        ("a" * 150 + ".jpg", blue),  # a name that needs a header block of its own
        ("000000003.txt", b"text alone"), ("000000004.cls", b"7"), ("._000000001.webp", b"of a Mac"),
        ("000000000.seg.png", encoded("blue", "PNG"))])  # webdataset: another part of 000000000
    rows, summary = rows_of("img2dataset", tmp_path / "set", out, "--image-root", tmp_path / "set")
    assert [bytes_of(tmp_path / "set", row) for row in rows if "image" in row] == [
        red, encoded("lime", "WEBP"), blue, encoded("blue", "PNG"), red, lime, blue]
    assert rows == [
        {"alt": "red", "url": "http://x.org/0", "width": 16, "height": 8, "rewrite_bard": "crimson", "score": None},
        {"alt": "lime"}, {"alt": None, "error": NO_TEXT},
        {"alt": "text alone", "shard": "shards/00000.tar", "key": "000000003", "error": {"image": "no image in shard"}},
        {"alt": "bl\u00fce", "shard": "shards/00001.tar", "key": "000010000", "error": {"json": "not a JSON object"}},
        {"alt": "below"}, {"alt": "v7"}, {"alt": "v5"},
        {"alt": None, "shard": "shards/00001.tar", "key": "8", "error": NO_TEXT | {"image": "comes twice in shard"}}]
    assert "NaN" not in out.read_text()
    assert summary["image: no image in shard"] == 1 and summary["alt: no text"] == 2
    assert [summary[f"passed over: {what}"] for what in (".seg.png", ".cls", "hidden")] == [1, 1, 1]


def test_img2dataset_files_and_links(tmp_path, out, fails):
    """Its output `files`, in a folder that is a link to another disk, as a model hub's cache has them."""
    disk, root = tmp_path / "disk", tmp_path / "root"
    fill(disk, {"00000/0.jpg": encoded("red"), "00000/0.json": meta(caption=["red", "crimson"], url="u"),
                "00000.parquet": b"PAR1", "00000_stats.json": "{}"})  # img2dataset writes these beside the files
    fill(root, {"p/0.parquet": b"PAR1"})
    (root / "set").symlink_to(disk)
    (disk / "loop").symlink_to(disk)
    rows, _ = rows_of("img2dataset", root / "set", out, "--image-root", root)
    assert rows == [{"image": "set/00000/0.jpg", "alt": ["red", "crimson"], "url": "u"}]
    fails("img2dataset", root / "p", out, "--overwrite", "--image-root", root, says=["parquet", "--output_format"])


@pytest.mark.parametrize("member, place, distance, last", [  # where it is cut
    ("0.jpg", "offset_data", 1, "none"), ("0.txt", "offset_data", 9, "0.txt"), ("1.jpg", "offset", 0, "0.txt"),
    ("1.jpg", "offset", 100, "0.txt"), ("1.jpg", "offset_data", 40, "0.txt"), ("1.txt", "offset_data", 512, "1.txt")])
def test_img2dataset_damaged(tmp_path, out, member, place, distance, last):
    """Wherever a download broke off, a row says so, the others are read. tarfile alone takes some of these for a whole tar."""
    pairs = [[(f"{i}.jpg", encoded(color)), (f"{i}.txt", color.encode())] for i, color in enumerate(COLORS)]
    path, other = write_tar(tmp_path / "0.tar", pairs[0] + pairs[1]), write_tar(tmp_path / "1.tar", pairs[2])
    with tarfile.open(path) as tar:
        end = getattr(tar.getmember(member), place) + distance
    path.write_bytes(path.read_bytes()[:end])
    *rows, error, good = rows_of("img2dataset", path, other, out, "--image-root", tmp_path)[0]
    assert good["alt"] == "blue"
    assert error == {"shard": "0.tar", "last_good_member": last, "error": {"shard": "truncated, damaged or no tar"}}
    assert [row["alt"] for row in rows] == {"none": [], "0.txt": ["red"], "1.txt": ["red", "lime"]}[last]


def test_img2dataset_mistakes(tmp_path, out, fails):
    a, b = (write_tar(tmp_path / f"{n}.tar", [("0.jpg", encoded("red")), ("0.txt", b"red")]) for n in "ab")
    inside, root = fill(tmp_path, {"empty.tar": b"", "inside/_": b""}) / "inside", ("--image-root", tmp_path)
    fails("img2dataset", a, out, "--image-root", inside, says=["a.tar", "not below --image-root"])
    fails("img2dataset", inside, out, *root, says=["inside", "no .tar"])
    fails("img2dataset", a, tmp_path / "1.tar", out, *root, says=["1.tar"])
    fails("img2dataset", tmp_path / "empty.tar", out, *root, says=["empty.tar"])
    fails("img2dataset", a, b, *root, "--overwrite", says=["b.tar", ".jsonl"])  # OUT was forgotten: no shard is overwritten
    for mode, name in (("gz", "gz/0.tar.gz"), ("xz", "xz/0.tar"), ("bz2", "bz2/0.tar.bz2")):
        fill(tmp_path, {name: b""})
        path = write_tar(tmp_path / name, [("0.jpg", encoded("red"))], f"w:{mode}")
        for place in (path, path.parent):
            fails("img2dataset", place, out, *root, says=[name, "not an uncompressed tar"])


def test_coco_official(tmp_path, out, fails):
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 640} for number in (9, 4, 5)]
    texts = [(4, "a dog"), (9, "A cat.\n"), (9, "one cat"), (7, "lost")]
    annotations = [{"image_id": number, "id": i, "caption": text} for i, (number, text) in enumerate(texts)]
    (tmp_path / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    rows, summary = rows_of("coco", tmp_path / "captions.json", out, "--images-dir", "train2014/")
    assert rows == [{"image": "train2014/9.jpg", "alt": ["A cat.\n", "one cat"]},
                    {"image": "train2014/4.jpg", "alt": ["a dog"]},
                    {"image": "train2014/5.jpg", "alt": None, "error": NO_TEXT},
                    {"alt": ["lost"], "error": {"image": "not in images"}}]
    assert summary["rows with error"] == 2
    fails("coco", tmp_path / "captions.json", out, "--overwrite", "--split", "test", says=["--split"])


def test_coco_karpathy(tmp_path, out, fails):
    def write(name, *images):
        images = [{"filename": file, "split": split, "sentences": [{"raw": text, "tokens": []} for text in texts], **folder}
                  for file, split, texts, folder in images]
        fill(tmp_path, {name: json.dumps({"images": images, "dataset": "one of them"})})
        return "coco", tmp_path / name, out, "--overwrite"
    coco = write("coco.json", ("0.jpg", "test", ["t0", "t1"], {"filepath": "val2014"}),
                 ("1.jpg", "restval", ["r0"], {"filepath": "val2014"}), ("2.jpg", "train", ["n0"], {"filepath": "train2014"}))
    flickr = write("f.json", ("0.jpg", "val", ["v0"], {}), ("1.jpg", "test", ["f0", "f1"], {}), ("2.jpg", "test", [" ", ""], {}))
    test = {"image": "val2014/0.jpg", "alt": ["t0", "t1"]}
    train = [{"image": "val2014/1.jpg", "alt": ["r0"]}, {"image": "train2014/2.jpg", "alt": ["n0"]}]
    assert rows_of(*coco)[0] == [test, *train]
    assert rows_of(*coco, "--split", "test")[0] == [test]
    assert rows_of(*coco, "--split", "train", "restval")[0] == train
    assert rows_of(*flickr, "--split", "test", "--images-dir", "f30k")[0] == [
        {"image": "f30k/1.jpg", "alt": ["f0", "f1"]}, {"image": "f30k/2.jpg", "alt": None, "error": NO_TEXT}]
    fails(*flickr, "--split", "restval", says=["restval", "test, val"])


def test_vecap(tmp_path, out):
    """Two files, one of several chunks: escapes, braces, commas, half an emoji, and what is no text."""
    odd = {"http://x.org/{,}": 'a "b": {c}, \\', "http://x.org/\u00fc": "\u00fc\n\ud83d"}
    many = {f"http://x.org/{k}": f"caption {k} " + "\U0001f600x" * (k % 97) for k in range(20_000)}
    fill(tmp_path, {"0.json": json.dumps(odd | {"u2": "", "u3": None}, indent=1), "1.json": json.dumps(many, ensure_ascii=False)})
    assert (tmp_path / "1.json").stat().st_size > 4 << 20
    rows, _ = rows_of("vecap", tmp_path / "0.json", tmp_path / "1.json", out)
    assert rows[2:4] == [{"url": url, "vecap": None, "error": {"vecap": "no text"}} for url in ("u2", "u3")]
    assert rows[:2] + rows[4:] == [{"url": url, "vecap": text} for url, text in (odd | many).items()]


def test_folder(tmp_path, out):
    """Images of the formats that the stages read, also behind links, each with its .txt; the rest is counted and named."""
    photos, red = tmp_path / "photos", encoded("red")
    fill(photos, {"b/2.PNG": red, "b/2.txt": "  two \n", "b/1.jpg": red, "b/1.txt": "one\n\n uno \r\n", "a/z.jpeg": red,
                  "a/z.txt": "", "c.jpg": red, "B.jpg": red, "B.txt": "caf\u00e9", "README.txt": "no image beside it",
                  "__MACOSX/x.png": red, ".ipynb_checkpoints/x.png": red, "._f.jpg": red})
    fill(photos, dict.fromkeys("d.tif e.avif f.jfif g.jp2 h.ppm g.heic h.eps 0.pdf 1.pdf 2.pdf 3.pdf".split(), b"?"))
    elsewhere = fill(tmp_path / "elsewhere", {"x.png": red})
    (photos / "linked").symlink_to(elsewhere)
    (photos / "round").symlink_to(photos)
    rows, summary = rows_of("folder", photos, out)
    assert rows == [{"image": "B.jpg", "alt": "caf\u00e9"}, {"image": "a/z.jpeg", "alt": None, "error": NO_TEXT},
                    {"image": "b/1.jpg", "alt": ["one", "uno"]}, {"image": "b/2.PNG", "alt": "two"},
                    *({"image": name, "alt": None, "error": NO_TEXT}
                      for name in ("c.jpg", "d.tif", "e.avif", "f.jfif", "g.jp2", "h.ppm", "linked/x.png"))]
    passed_over = {line: count for line, count in summary.items() if "passed over" in line}
    assert passed_over == {"passed over: .txt without an image": 1, "passed over: hidden": 1, "passed over: .heic": 1,
                           "passed over: .eps": 1, "passed over: .pdf": 4}
    told = run_tool("import_captions", "folder", photos, out, "--overwrite", fresh=True).stdout
    assert re.search(r"passed over: \.pdf +4  0\.pdf, 1\.pdf, 2\.pdf$", told, re.M), told


def test_folder_with_metadata(tmp_path, out, fails):
    """Hugging Face's imagefolder: files are named from metadata's own folder; its columns stay; nothing vanishes."""
    photos, table = tmp_path / "photos", tmp_path / "photos" / "in" / "metadata.csv"
    entries = [{"file_name": "b.jpg", "text": "bee", "boxes": [[1, 2]], "error": "x"}, {"file_name": "gone.jpg", "text": "lost"},
               {"file_name": "a.jpg", "text": ["one", "two"]}, {"file_name": "b.jpg", "text": 7}]
    fill(photos, dict.fromkeys(["a.jpg", "b.jpg", "in/c.jpg", "d.jpg"], encoded("red")) | {
        "metadata.jsonl": "".join(json.dumps(entry) + "\n" for entry in entries) + "no json\n", "b.txt": "of a text file",
        "in/metadata.csv": 'file_name,text,rating\nc.jpg,"[""sea"", ""see""]",5\nx,y\n', "d.txt": "dee"})
    command = "folder", photos, out, "--overwrite"
    rows, summary = rows_of(*command)
    assert rows == [
        {"image": "in/c.jpg", "alt": ["sea", "see"], "rating": "5"}, {"line": "x,y", "error": {"line": "not 3 columns"}},
        {"image": "b.jpg", "alt": "bee", "boxes": [[1, 2]]},
        {"alt": "lost", "file_name": "gone.jpg", "error": {"image": "missing file"}},
        {"image": "a.jpg", "alt": ["one", "two"]}, {"image": "b.jpg", "alt": None, "error": {"alt": NUMBER}},
        {"error": {"line": "not JSON: Expecting value: line 1 column 1 (char 0)"}, "line": "no json"},
        {"image": "d.jpg", "alt": "dee"}]
    assert summary["passed over: column"] == summary["passed over: .txt beside metadata"] == 1
    table.write_text("name,words\nc.jpg,sea\n")
    fails(*command, says=["in/metadata.csv has no file_name, only name, words"])
    table.write_text("file_name,words\nc.jpg,sea\n")
    assert rows_of(*command)[0][0]["error"]["alt"].startswith("no caption column: expected caption/title/text")
    assert rows_of(*command, "--caption-column", "words")[0][0] == {"image": "in/c.jpg", "alt": "sea"}
    table.rename(table.with_suffix(".parquet"))
    fails(*command, says=["parquet is not read"])


CELLS = {  # what a cell or a JSON value holds -> alt, error
    '["a", "b \\"q\\""]': (["a", 'b "q"'], None), ' ["a"] ': (["a"], None),
    '["a", null, 3]': (["a", None, None], [None, None, NUMBER]),
    **{text: (text, None) for text in ("[photo] of a dog", "[photo]", "{sale}", "2012", '"a"')},
    "[1, 2]": (None, NUMBER), "['a', 'b']": (None, NO_LIST), "[" * 5000 + "]": (None, NO_LIST), "[]": (None, "no text"),
    '{"en": "a"}': (None, "an object, not a text"), '[["a"]]': (None, "a list, not a text")}


def test_a_cell_with_a_list_is_a_list_of_captions(tmp_path, out):
    """As Flickr30k's CSV on the hub has them; JSON's own values. None becomes a text with brackets."""
    expected = [{"alt": alt, **({"error": {"alt": why}} if why else {})} for alt, why in CELLS.values()]
    with open(tmp_path / "a.csv", "w", newline="") as f:
        csv.writer(f).writerows([["filename", "raw", "split"], *([f"{i}.jpg", cell, "test"] for i, cell in enumerate(CELLS))])
    rows, summary = rows_of("laclip", tmp_path / "a.csv", out, "--image-column", "filename", "--caption-column", "raw")
    assert rows == [{"image": f"{i}.jpg", **row, "split": "test"} for i, row in enumerate(expected)]
    assert summary["alt: a number, not a text"] == 2
    values = {cell: json.loads(cell) for cell in CELLS if cell[:2] in ('["', '{"', "[1")}
    (tmp_path / "a.json").write_text(json.dumps(values | {"n": 3, "t": True}))
    rows, _ = rows_of("vecap", tmp_path / "a.json", out, "--overwrite")
    assert [(row["vecap"], row.get("error", {}).get("vecap")) for row in rows] == [
        *(CELLS[cell] for cell in values), (None, NUMBER), (None, "a boolean, not a text")]


def test_it_needs_no_torch_and_no_script():
    """So it runs on a machine that only fetches data."""
    code = "import sys; sys.modules |= {'torch': None, 'train_clip': None}; from data.import_captions import main; main(['-h'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m data.import_captions" in done.stdout, done.stderr
