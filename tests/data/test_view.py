"""data/view.py: every caption, name and path is shown as text, and nothing else is opened."""
import base64
import html.parser
import io
import json
import os
import re
import subprocess
import zlib

import pytest
from PIL import Image

from conftest import assert_mistake
from data import view
from tools import run_tool

TAGS = set("""html head meta title style body header main nav aside section div span p h1 h2 h3 ul ol li dl dt dd a
    table thead tbody tr th td figure figcaption img code del bdi details summary svg desc path line circle
    text article fieldset label input""".split())
HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='alert(1)", "</style>",
    "</title>", "<!--", "--><svg onload=alert(1)>", "]]>", "javascript:alert(1)", "https://evil.example/x.png",
    "&amp;", "&lt;b&gt;", "&#x3c;b>", "a\u2028b", "\u202etxt.exe", "\u2069\u202eout of its isolate", "nul\0nul",
    "\x1b[31mred\x1b[0m", "\x85\x9b", "lone \ud800 surrogate", "\udfff", "{style}{0}", "%s", "😀",
    "z\u0351\u0352", "x" * 500]


def write_page(tmp_path, main, *arguments) -> str:
    """In this process: importing torch takes seconds."""
    main([str(a) for a in (*arguments, tmp_path / "out.html", "--image-root", tmp_path / "root")])
    return (tmp_path / "out.html").read_bytes().decode("utf-8")  # strict: the page is valid UTF-8


class Parser(html.parser.HTMLParser):
    """Collects what a browser would see, and refuses what a page of ours never holds."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.attributes, self.images = [], "", [], []
        self.shape, self.texts = [], []  # of the whole page: (element, its attributes' names); (element, text)
        self.feed(page)
        self.close()
        assert self.open == [], "not closed"

    def handle_starttag(self, name, attributes):
        assert name in TAGS
        for key, value in attributes:
            assert not key.startswith("on") and key not in ("style", "srcdoc", "action", "xlink:href")
            if key == "href":
                assert name == "a" and re.fullmatch(r"#[a-z]+", value)
            if key == "src":
                assert name == "img" and value.startswith("data:image/png;base64,")
                png = base64.b64decode(value.split(",")[1], validate=True)
                self.images.append(Image.open(io.BytesIO(png)))
            self.attributes.append(value)
        self.shape.append((name, [key for key, _ in attributes]))
        if name not in ("img", "input", "meta"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name, "not balanced"

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            assert "url(" not in data and "@import" not in data and "<" not in data
        else:
            self.text += data
            self.texts.append((self.open[-1] if self.open else None, data))

    def handle_comment(self, data):
        raise AssertionError("a comment")

    handle_pi = unknown_decl = handle_comment


def shown(text) -> str:
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def make_image(path, size=(200, 100), **options):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, (200, 30, 30)).save(path, **options)


@pytest.mark.parametrize("name", ["../out.png", "sub/../../out.png", "ABSOLUTE", "link.png", "", ".", "sub", "pipe",
    "text.png", "cut.png", "bomb.png", "page.eps", "missing.png", None, 3, ["good.png"], {"a": 1}, "good.png/", "n" * 5000])
def test_only_images_inside_the_root(tmp_path, name):
    root = tmp_path / "root"
    make_image(root / "sub" / "inside.png")
    make_image(tmp_path / "out.png", (61, 67))
    (root / "folder").symlink_to(tmp_path)
    (root / "text.png").write_text("no image")
    (root / "cut.png").write_bytes((root / "sub" / "inside.png").read_bytes()[:60])
    (root / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    subprocess.run(["mkfifo", root / "pipe"], check=True)
    bomb = bytearray((root / "sub" / "inside.png").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # the size in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (root / "bomb.png").write_bytes(bomb)
    name = str(tmp_path / "out.png") if name == "ABSOLUTE" else name
    text = render_hits(tmp_path, [{"query": "q", "hits": [{"image": name}]}])
    page = Parser(text)
    assert page.images == [] and "no image: " in page.text
    assert base64.b64encode((tmp_path / "out.png").read_bytes()).decode() not in text


def test_images_are_small_clean_pngs(tmp_path):
    root = tmp_path / "root"
    make_image(root / "a.jpg", (800, 400), comment=b"secret comment", icc_profile=b"secret profile")
    Image.new("P", (50, 60)).save(root / "b.gif")
    Image.new("RGBA", (10, 300)).save(root / "sub.png")
    (root / "inner.png").symlink_to(root / "sub.png")  # a link that stays inside is fine
    hits = [{"image": name} for name in ("a.jpg", "b.gif", "sub.png", "inner.png", "./a.jpg")]
    page = render_hits(tmp_path, [{"query": "q", "hits": hits}])
    images = Parser(page).images
    assert [image.size for image in images] == [(96, 48), (50, 60), (3, 96), (3, 96), (96, 48)]
    assert all(image.format == "PNG" and image.mode == "RGB" and not image.info for image in images)
    assert abs(images[0].getpixel((50, 20))[0] - 200) < 6


def check_mistake(capfd, main, *arguments, told):
    """The command in this process ends with exit status 2 and one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    printed = capfd.readouterr()
    assert printed.out == ""
    assert_mistake(subprocess.CompletedProcess([], stop.value.code, stderr=printed.err), told)


def test_a_mistake_as_a_user_makes_it(tmp_path):
    assert_mistake(run_tool("view", "rows", tmp_path / "no.jsonl", "o.html", "--image-root", tmp_path), "view.py: error", "no.jsonl")


def test_mistakes_in_the_command(tmp_path, capfd):
    results = tmp_path / "r.json"
    results.write_text('{"title": "t"}')
    output = tmp_path / "o.html"
    (tmp_path / "folder").mkdir()
    (tmp_path / "wide.jsonl").write_bytes('{"alt": "a"}\n'.encode("utf-16"))
    root = ["--image-root", tmp_path]
    for main, arguments, told in [(view.main, [], "COMMAND"), (view.main, ["rwos"], "rows"), (view.main, ["rows", results, output], "--image-root"),
            (view.main, ["rows", results, output, "--image-root", tmp_path / "missing\nfolder"], "not a folder"),
            (view.main, ["rows", results, tmp_path / "no" / "o.html", *root], "no such folder"),
            (view.main, ["rows", results, tmp_path / "folder", *root], "can be written"), (view.main, ["rows", results, results, *root], "is read"),
            (view.main, ["rows", results, output, *root, "--nonsense"], "--nonsense"), (view.main, ["rows", results, results, *root], "is read"),
            (view.main, ["rows", results, output, *root, "--nonsense"], "--nonsense"),
            (view.main, ["rows", results, output, *root, "--limit", "-1"], "--limit"),
            (view.main, ["rows", results, output, *root, "--limit", "1", "--sample", "1"], "--sample"),
            (view.main, ["rows", tmp_path / "no.jsonl", output, *root], "No such file"),
            (view.main, ["rows", tmp_path / "folder", output, *root], "Is a directory"),
            (view.main, ["rows", os.devnull, output, *root], "no rows"),
            (view.main, ["rows", tmp_path / "wide.jsonl", output, *root], "UTF-16")]:
        check_mistake(capfd, main, *arguments, told=told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "r.json", "wide.jsonl"]  # no partial page is left


def render_rows(tmp_path, rows, *arguments) -> str:
    """rows: objects, or lines as bytes"""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (tmp_path / "root").mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return write_page(tmp_path, view.main, "rows", *arguments, tmp_path / "rows.jsonl")


def cells(page) -> list:
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_a_row_with_everything(tmp_path):
    make_image(tmp_path / "root" / "a.jpg")
    row = {"image": "a.jpg", "alt": ["first alt", "second alt"], "rewrite_chatgpt": ["a rewrite", None],
           "rewrite_bard": None, "vec": "the vec", "vecap": ["a vecap", None], "label": ["cat", "tomcat"], "mine": {"url": "x"}, "yours": 7,
           "error": {"rewrite_chatgpt": [None, "repeats itself"], "rewrite_bard": "empty", "vecap": [None, "refused"]}}
    text = render_rows(tmp_path, [row, {"alt": "no image", "vec": None, "error": "the user's own"}])
    page = Parser(text)
    assert [image.size for image in page.images] == [(96, 48)] and "first alt" in page.attributes
    names = [data for element, data in page.texts if element == "dt"]
    assert names == ["alt", "chatgpt", "bard", "vec", "vecap", "label", "alt", "vec"]
    said = [data for element, data in page.texts if element == "p"]
    assert said == ["first alt", "second alt", "a rewrite", "failed: repeats itself", "failed: empty", "the vec",
                    "a vecap", "failed: refused", "cat", "tomcat", "no image", "null"]
    assert [data for element, data in page.texts if element == "summary"][1:] == ["other keys (2)", "other keys (1)"]
    folded = [json.loads(data) for element, data in page.texts if element == "code"]
    assert folded == [{"mine": {"url": "x"}, "yours": 7}, {"error": "the user's own"}]
    assert "2 of 2 rows" in page.text and "no image: none is named" in page.text
    assert text.count('<p dir="auto"') == len(said) - 1  # all but our own "null"


def test_a_row_in_which_every_text_is_hostile(tmp_path):
    def rows(text):
        return [{"image": text, "alt": text, "rewrite_" + text: text, "vec": [text, None], "vecap": None, "label": text,
                 text: {text: text}, "error": {"vec": [None, text], "vecap": text, "not " + text: text}},
                {"alt": text, "error": text}, {"error": {"line": text}, "line": text}, json.dumps([text]).encode()]

    calm = Parser(render_rows(tmp_path, rows("calm")))
    for text in (text[:50] for text in HOSTILE):  # nothing is cut here
        page = Parser(render_rows(tmp_path, rows(text)))  # which refuses whatever is not the page's own
        assert page.shape == calm.shape and page.images == [], text
        assert page.text.count(shown(text)) >= 11


def test_lines_that_are_no_rows(tmp_path):
    text = render_rows(tmp_path, [{"error": {"line": "not JSON: Expecting value"}, "line": "kept <b> by a stage"},
                                  b"{broken", b"", b"[1, 2]", b"\xff\xfe", b"[" * 100_000])
    page = Parser(text)
    assert "kept <b> by a stage" in page.text and "{broken" in page.text and "\\xff\\xfe" in page.text
    assert page.text.count("failed: not JSON: ") == 5 and "failed: not a JSON object" in page.text
    assert page.text.count("no image") == 0
    assert cells(text)[1:] == [["line", "6", "–", "5", "1"]]


def test_long_texts_and_lists_are_cut_and_their_length_said(tmp_path):
    text = render_rows(tmp_path, [{"alt": "y" * 100_000, "vec": [f"v{i}" for i in range(1000)], "label": [], "n": "z" * 5000}])
    page = Parser(text)
    assert len(text) < 40_000 and text.count("y" * 1000) == 1 and "y" * 1001 not in text
    assert "cut, 100,000 characters" in page.text and "1,000 entries" in page.text and "v19" in page.text
    assert "v20" not in page.text and "z" * 1001 not in text and "[]" in page.text


def test_an_image_in_a_tar(tmp_path):
    make_image(tmp_path / "root" / "a.jpg", (80, 60))
    data = (tmp_path / "root" / "a.jpg").read_bytes()
    (tmp_path / "root" / "s.tar").write_bytes(bytes(512) + data + bytes(512))
    page = Parser(render_rows(tmp_path, [{"image": f"s.tar@512+{len(data)}", "alt": "a"}]))
    assert [image.size for image in page.images] == [(80, 60)]


def lines_shown(text) -> list:
    return [int(number) for number in re.findall(r">line (\d+)<", text)]


def test_limit_and_sample(tmp_path):
    rows = [{"alt": f"row {i}"} for i in range(500)]
    text = render_rows(tmp_path, rows)
    assert lines_shown(text) == [*range(1, 201)] and "200 of 500 rows, from the top" in text
    assert lines_shown(render_rows(tmp_path, rows, "--limit", 3)) == [1, 2, 3]
    text = render_rows(tmp_path, rows, "--sample", 20)
    drawn = lines_shown(text)
    assert text == render_rows(tmp_path, rows, "--sample", 20, "--seed", 0)
    assert len(set(drawn)) == 20 and drawn == sorted(drawn) and "20 of 500 rows, drawn with seed 0" in text
    assert drawn != lines_shown(render_rows(tmp_path, rows, "--sample", 20, "--seed", 1))
    assert lines_shown(render_rows(tmp_path, rows[:5], "--sample", 20)) == [1, 2, 3, 4, 5]
    hits = [view.read_rows(tmp_path / "rows.jsonl", 200, 1, seed)[0][0][0] for seed in range(2000)]
    assert all(330 < sum(i == hit for hit in hits) < 470 for i in range(1, 6))  # a fifth each, 4 standard deviations


def test_counts_are_of_all_rows(tmp_path):
    rows = [{"alt": "a", "vec": None, "error": {"vec": "OSError: this file"}}, {"alt": None, "vec": "v"},
            {"alt": ["a", None], "vec": None, "error": {"vec": "OSError: that file", "image": "missing file"}},
            {"vecap": ["a", None, None], "error": {"vecap": [None, "refused", "refused"]}}]
    text = render_rows(tmp_path, rows + [{"error": {"alt": list("abcdefgh")}}], "--limit", 1)
    for seed in "123":  # the same page every time, whatever the order of Python's sets
        run_tool("view", "rows", tmp_path / "rows.jsonl", tmp_path / "again.html", "--limit", "0", "--image-root",
                 tmp_path, fresh=True, env={"PYTHONHASHSEED": seed})
        assert cells((tmp_path / "again.html").read_text()) == cells(text)
    text = render_rows(tmp_path, rows, "--limit", 1)
    assert cells(text) == [["field", "rows", "null", "OSError", "missing file", "refused"], ["alt", "3", "2", "–", "–", "–"],
        ["vec", "3", "2", "2", "–", "–"], ["vecap", "1", "1", "–", "–", "1"], ["image", "–", "–", "–", "1", "–"]]


def render_hits(tmp_path, rows, *arguments) -> str:
    (tmp_path / "root").mkdir(exist_ok=True)
    (tmp_path / "hits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_page(tmp_path, view.main, "hits", tmp_path / "hits.jsonl", *arguments)


def test_hits_and_misses(tmp_path):
    for name in "abc":
        make_image(tmp_path / "root" / f"{name}.png")
    found = [{"image": "a.png", "score": 0.31, "correct": True}, {"image": "b.png", "score": 0.2, "correct": False}]
    rows = [{"query": "right at once", "truth": "a.png", "rank": 1, "hits": found},
            {"query": "far behind", "truth": "c.png", "rank": 1234, "hits": [{**hit, "correct": False} for hit in found]},
            {"query": "second", "truth": "a.png", "rank": 2, "hits": found[::-1]},
            {"query": "never", "truth": "gone.png", "rank": None, "hits": []},
            {"image": "c.png", "truth": "cats", "average_precision": 0.5, "hits": found},
            {"query": "free", "hits": [{"image": "b.png", "score": 0.1}]}]
    text = render_hits(tmp_path, rows)
    page = Parser(text)
    assert text.count('class="block query hit"') == 2 and text.count('class="block query miss"') == 3
    assert text.count('class="block query other"') == 1 and text.count('class="wanted"') == 2
    for words in ("right at place 1,234", "right at place 2", "could not be read", "label: cats", "average precision 0.500",
                  "all: 6", "first image right: 2", "first image wrong: 3", "no image: no such file", "6 of 6 queries, from the top"):
        assert words in page.text, words
    assert len(page.images) == 11 and text.count('type="radio"') == 3 and text.count('tabindex="0"') == 6
    assert "3 of 6 queries, drawn with seed 0" in render_hits(tmp_path, rows, "--sample", 3)


def test_hits_in_which_every_text_is_hostile(tmp_path):
    def rows(text):
        hit = {"image": text, "score": text, "correct": text}
        return [{"query": text, "truth": text, "rank": text, "hits": [hit]}, {"image": text, "truth": text, "hits": [hit]},
                {"query": [text], "truth": {text: text}, "rank": None, "hits": [{"image": [text]}]}, json.loads("{}")]

    calm = Parser(render_hits(tmp_path, rows("calm")))
    for text in (text[:50] for text in HOSTILE):
        page = Parser(render_hits(tmp_path, rows(text)))
        assert page.shape == calm.shape and page.images == [] and shown(text) in page.text, text
