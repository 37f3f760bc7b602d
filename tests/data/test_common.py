"""What the tools share: the reader of rows, whole files, restarts; and what they may be and import."""
import ast
import gzip
import json
import subprocess
import sys

import pytest

from conftest import ROOT, assert_mistake
from data import __main__ as listing
from data import baselines, clip_scores, common, filter_captions, make_pairs, make_tokenizer, rows, texts, view

ROW = {"image": "a.png", "alt": "a red bike", "rewrite_a": "one red bike"}
OTHER_FORMATS = {  # content -> what is told
    "array": (json.dumps([ROW, ROW]), "JSON array"), "indented": (json.dumps([ROW, ROW], indent=1), "JSON array"),
    "a line each": ("[\n" + json.dumps(ROW) + ",\n" + json.dumps(ROW) + "\n]", "JSON array"),
    "one object": (json.dumps(ROW, indent=1), "begins with"), "csv": ("image,alt\na.png,a red bike\n", "begins with 'image,alt'"),
    "page": ("<!DOCTYPE html>\n<title>404</title>\n", "page of HTML"), "utf-16": (json.dumps(ROW).encode("utf-16"), "UTF-16"),
    "no mark": (json.dumps(ROW).encode("utf-16-le"), "UTF-16"), "gzip": (gzip.compress(json.dumps(ROW).encode()), "gzip"),
    "parquet": (b"PAR1\x15\x04", "parquet"), "zip": (b"PK\x03\x04" + bytes(9), "zip"), "binary": (b"ustar" + bytes(70_000), "begins with 'ustar"), "long": (b"[" + json.dumps(ROW).encode() * 3000, "JSON array")}


def readers(path, out):
    """Every tool that reads rows, as its main and its arguments"""
    yield filter_captions, [path, out]
    yield make_tokenizer, [path, out]
    yield view, ["rows", path, out, "--image-root", out.parent]
    yield view, ["hits", path, out, "--image-root", out.parent]
    yield make_pairs, ["human", "--captions", path, "--output", out]
    yield make_pairs, ["human", "--filled", path, "--output", out]
    yield baselines, ["eda", path, out, "--wordnet", out.parent]
    yield clip_scores, ["--captions", path, "--output", out, "--checkpoint", path, "--image-root", out.parent]


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_a_file_that_is_no_jsonl_is_told_as_that(kind, tmp_path, capfd):
    content, told = OTHER_FORMATS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for tool, arguments in readers(path, tmp_path / "out"):
        with pytest.raises(SystemExit) as stop:
            tool.main([str(argument) for argument in arguments])
        done = subprocess.CompletedProcess([], stop.value.code, stderr=capfd.readouterr().err)
        assert_mistake(done, "rows.jsonl is no JSONL", told)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("first", [b"\xef\xbb\xbf", b"[1, 2]\n", b"no JSON\n\n", b"<b>\n"[4:], b'{"alt": [' + b"1, " * 99999 + b"1]}\n"])
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
    with rows.continued(out, settings, 2) as writer:
        assert writer.finished


@pytest.mark.parametrize("text, words", [("a red bike", 3), ("bike - !", 1), ("一辆红色的自行车", 4), ("赤いバイク", 2), ("มีเด็กวาง", 3), ("", 0)])
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


SOURCES = sorted((ROOT / "data").glob("*.py"))
FROM_TRAIN_CLIP = set("""CLIP Config PRESETS Tokenizer VisionTransformer load_checkpoint read_checkpoint save_checkpoint info_nce
    clip_loss multitext_loss draw_texts open_image to_rgb resolve_precision FORMATS gather""".split())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_tool_is_short_and_takes_little(path):
    """350 lines of 100 columns, functions of 60; of train_clip.py the model, losses, images, tokenizer, checkpoints."""
    lines, tree = path.read_text().splitlines(), ast.parse(path.read_text())
    assert len(lines) <= 350 and [line for line in lines if len(line) > 100] == []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 60] == []
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.name for node in imports if node.module == "train_clip" for name in node.names} <= FROM_TRAIN_CLIP
    assert not {node.module for node in imports} & {"rewrite_llama", "caption_llava", "fuse_vicuna"}


def test_python_m_data_lists_the_tools():
    done = subprocess.run([sys.executable, "-m", "data"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(dict(listing.tools())) == len(done.stdout.splitlines()) - 2 >= 11
    assert all(about.endswith(".") and f"{name:22}{about}" in done.stdout for name, about in listing.tools())
