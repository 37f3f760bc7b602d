"""What the tools share: the reader of rows, whole files, restarts, mistakes; and how long they may be."""
import gzip
import json
import subprocess
import sys

import pytest

from conftest import ROOT, assert_mistake
from data import __main__ as listing
from data import common, rows, texts
from tools import run_tool

ROW = {"image": "a.png", "alt": "a red bike", "rewrite_a": "one red bike"}
OTHER_FORMATS = {  # content -> what is told
    "array": (json.dumps([ROW, ROW]), "JSON array"), "long": (b"[" + json.dumps(ROW).encode() * 3000, "JSON array"),
    "a line each": ("[\n" + json.dumps(ROW) + ",\n" + json.dumps(ROW) + "\n]", "JSON array"),
    "one object": (json.dumps(ROW, indent=1), "begins with"), "lists": ("[1, 2]\n" * 3, "begins with '[1, 2]'"),
    "csv": ("image,alt\na.png,a red bike\n", "begins with 'image,alt'"),
    "page": ("<!DOCTYPE html>\n<title>404</title>\n", "page of HTML"), "utf-16": (json.dumps(ROW).encode("utf-16"), "UTF-16"),
    "no mark": (json.dumps(ROW).encode("utf-16-le"), "UTF-16"), "gzip": (gzip.compress(json.dumps(ROW).encode()), "gzip"),
    "parquet": (b"PAR1\x15\x04", "parquet"), "binary": (b"ustar" + bytes(70_000), "begins with 'ustar")}
READERS = ["filter_captions rows out", "make_tokenizer rows out", "view rows rows out --image-root .",
           "view hits rows out --image-root .", "make_pairs human --captions rows --output out",
           "make_pairs human --filled rows --output out", "baselines eda rows out --wordnet .",
           "clip_scores --captions rows --output out --checkpoint rows --image-root ."]


def run_words(command, folder):
    """A tool of data/ and its arguments, in which a file of the folder is its name."""
    tool, *words = command.split()
    files = ["out", "no/out", "absent", *(path.name for path in folder.iterdir())]
    at = {"view": 1}.get(tool, 0)  # the command `view rows` is no file
    return run_tool(tool, *words[:at], *(folder / word if word in files else word for word in words[at:]))


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_a_file_that_is_no_jsonl_is_told_as_that(kind, tmp_path):
    content, told = OTHER_FORMATS[kind]
    (tmp_path / "rows").write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in READERS:
        assert_mistake(run_words(command, tmp_path), "rows is no JSONL", told)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("command, told", [
    ("filter_captions absent out", "absent"), ("filter_captions rows out --fields nothing", "nothing"),
    ("filter_captions rows", "output"), ("filter_captions rows rows", "is read"),
    ("filter_captions rows out --max-words 0", "--max-words"), ("filter_captions rows out --min-gain 0", "clip_score"),
    ("make_tokenizer rows out --text nothing", "nothing"), ("make_tokenizer rows out --vocab-size 258", "--vocab-size"),
    ("baselines eda rows out", "--wordnet"), ("baselines eda rows rows --wordnet .", "is read"),
    ("baselines eda rows out --wordnet .", "wordnet-base"), ("baselines eda rows no/out --wordnet .", "no such folder"),
    ("baselines eda rows out --wordnet . --alpha 1", "--alpha"), ("make_pairs", "COMMAND"),
    ("baselines eda rows out --wordnet . --field vecap", "vecap, only alt"),
    ("make_pairs coco two", "--output"), ("make_pairs human --output out", "--captions"),
    ("make_pairs human --captions rows --output rows", "exists"), ("make_pairs coco list --output out", "neither"),
    ("make_pairs human --captions rows --output no/out", "folder"), ("make_pairs human --captions rows --field title --output out", "'title'"),
    ("make_pairs coco two --number 2 --output out", "1 images"), ("view", "COMMAND"),
    ("make_pairs coco broken --output out", "neither"), ("make_pairs coco absent --output out", "No such file"),
    ("make_pairs chatbot --captions rows --model absent --output out", "--model"),
    ("plan --rows 0", "--rows"), ("plan --rate sleep=3", "rewrite, caption, fuse, train"),
    ("plan --rate train=3t", "rows a second"), ("plan --rate fuse=-1", "fuse=-1"), ("plan --rate fuse=nan", "fuse=nan"),
    ("plan --model RN50", "ViT-B/16"), ("plan --image-size 225", "multiple"), ("plan --json no/out", "no such folder"),
    ("view rows rows out", "--image-root"), ("view rows rows no/out --image-root .", "no such folder"),
    ("view rows rows rows --image-root .", "is read"), ("view rows rows out --image-root absent", "not a folder"),
    ("search --captions empty --checkpoint rows --image-root . --query a", "no rows"),
    ("view rows /dev/null out --image-root .", "no rows"), ("view rows rows out --image-root . --limit -1", "--limit")])
def test_mistakes_are_one_line_and_write_nothing(command, told, tmp_path):
    annotations = [{"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": "two"}]
    files = {"rows": json.dumps(ROW), "two": json.dumps({"annotations": annotations}), "list": "[1]", "broken": "{", "empty": ""}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert_mistake(run_words(command, tmp_path), told)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("first", [b"\xef\xbb\xbf", b"[1, 2]\n", b"no JSON\n\n", b"", b'{"alt": [' + b"1, " * 99999 + b"1]}\n"])
def test_rows_with_bad_lines_are_rows(first, tmp_path, capfd):
    """A byte order mark is skipped, bad lines are passed over and named; a first line of any length."""
    (tmp_path / "rows.jsonl").write_bytes(first + b'{"alt": "x"}\n{"alt": \n')
    assert {"alt": "x"} in [row for _, row in rows.read_rows(tmp_path / "rows.jsonl")]
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "lines are no JSON objects, passed over: line " in told
    assert rows.parse_row(b"[1]\r\n") == ({"error": {"line": "not a JSON object"}, "line": "[1]"}, "not a JSON object")


def test_a_file_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), rows.new_file(str(tmp_path / "a")) as f:
        f.write(b"half")
        assert not (tmp_path / "a").exists()
        raise KeyboardInterrupt
    with pytest.raises(SystemExit), rows.new_file("/dev/full/a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_blocks_survive_a_kill(tmp_path, capfd):
    """Two of three blocks written, then killed in the third; other settings and another launch are refused."""
    out, settings = str(tmp_path / "out"), {"seed": 1}

    def write(blocks, settings=settings):
        with rows.continued(out, settings, block=2) as writer:
            done = writer.done
            for k in range(done // 2, blocks):
                writer.append([b"%d\n" % k] * 2)
            if blocks < 3:
                writer.append([b"1 of 2\n", b"to"])
                raise KeyboardInterrupt
            writer.finish()
        return done

    with pytest.raises(KeyboardInterrupt):
        write(2)
    held = rows.lock(out + ".lock", "test")
    code = f"from data import rows; rows.continued({out!r}, {{}}, 2).__enter__()"
    assert_mistake(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True), "another launch")
    held.close()
    with pytest.raises(SystemExit):
        write(3, {"seed": 2})
    assert "made with seed = 1, now it is 2" in capfd.readouterr().err
    assert write(3) == 4 and (tmp_path / "out").read_text() == "0\n0\n1\n1\n2\n2\n"


@pytest.mark.parametrize("text, words", [
    ("a red bike", 3), ("bike - !", 1), ("一辆红色的自行车", 4), ("赤いバイク", 2), ("มีเด็กวาง", 3), ("", 0)])
def test_words_of_any_script(text, words):
    assert len(texts.words_of(text)) == words
    assert texts.texts_of([text, None, 3, " "]) == ([text] if text else [])


def test_numbers_and_tables(capsys):
    assert common.number(int, 1)("3") == 3
    for text, kind in (("0", int), ("nan", float), ("9", int)):
        with pytest.raises(Exception, match="expected at least 1 and at most 8"):
            common.number(kind, 1, 8)(text)
    common.print_table(["", "rows"], [["a", 1000], ["long name", None]])
    assert capsys.readouterr().out == "           rows\na          1000\nlong name\n"


def test_a_tool_is_short():
    """350 lines of 100 columns"""
    for path in (ROOT / "data").glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 350 and max(map(len, lines)) <= 100, path


def test_python_m_data_lists_the_tools():
    done = subprocess.run([sys.executable, "-m", "data"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(dict(listing.tools())) == len(done.stdout.splitlines()) - 2 >= 11
    assert all(about.endswith(".") and f"{name:22}{about}" in done.stdout for name, about in listing.tools())
