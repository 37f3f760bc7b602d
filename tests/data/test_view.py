"""data/view.py: every caption, name and path is shown as text, and nothing else is opened."""
import base64
import html.parser
import io
import json
import os
import re
import zlib

import pytest
from PIL import Image

from data import view

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='alert(1)", "</style>", "</title>", "<!--",
    "--><svg onload=alert(1)>", "]]>", "javascript:alert(1)", "https://evil.example/x.png", "&amp;", "&lt;b&gt;",
    "&#x3c;b>", "a\u2028b", "\u202etxt.exe", "\u2069\u202eout of its isolate", "nul\0nul", "\x1b[31mred\x1b[0m",
    "\x85\x9b", "lone \ud800 surrogate", "\udfff", "{style}{0}", "%s", "😀", "x" * 500]


def render(tmp_path, page, rows, *arguments) -> str:
    """The page of rows (objects, or lines as bytes), made in this process: importing torch takes seconds."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (tmp_path / "root").mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    paths = tmp_path / "rows.jsonl", tmp_path / "out.html", "--image-root", tmp_path / "root"
    view.main([page, *map(str, (*paths, *arguments))])
    return (tmp_path / "out.html").read_bytes().decode("utf-8")  # strict: the page is valid UTF-8


def hits_of(tmp_path, names) -> str:
    """The page of a query that found these images"""
    return render(tmp_path, "hits", [{"query": "q", "hits": [{"image": name} for name in names]}])


class Parser(html.parser.HTMLParser):
    """Collects what a browser would see, and refuses what fetches or runs something."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.attributes, self.images = [], "", [], []
        self.shape, self.texts = [], []  # of the whole page: (element, its attributes' names); (element, text)
        self.feed(page)
        self.close()
        assert self.open == [], "not closed"

    def handle_starttag(self, name, attributes):
        assert name not in ("script", "link", "iframe", "object", "embed", "base")
        for key, value in attributes:
            assert not key.startswith("on") and key not in ("style", "srcdoc", "action", "href", "xlink:href")
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

def shown(text) -> str:
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def make_image(path, size=(200, 100), **options):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, (200, 30, 30)).save(path, **options)


def test_only_images_inside_the_root(tmp_path):
    """What open_image refuses stands in tests/test_images.py; a pipe, a bomb and EPS are refused here."""
    root = tmp_path / "root"
    make_image(root / "sub" / "inside.png")
    make_image(tmp_path / "out.png", (61, 67))
    (root / "cut.png").write_bytes((root / "sub" / "inside.png").read_bytes()[:60])
    (root / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    os.mkfifo(root / "pipe")
    bomb = bytearray((root / "sub" / "inside.png").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # the size in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (root / "bomb.png").write_bytes(bomb)
    names = ["../out.png", "sub/../../out.png", str(tmp_path / "out.png"), "", ".", "sub", "pipe", "cut.png",
             "bomb.png", "page.eps", "missing.png", None, 3, ["sub/inside.png"], {"a": 1}, "n" * 5000]
    text = hits_of(tmp_path, names)
    page = Parser(text)
    assert page.images == [] and page.text.count("no image: ") == len(names)
    assert base64.b64encode((tmp_path / "out.png").read_bytes()).decode() not in text


def test_images_are_small_clean_pngs(tmp_path):
    root = tmp_path / "root"
    make_image(root / "a.jpg", (800, 400), comment=b"secret comment", icc_profile=b"secret profile")
    Image.new("P", (50, 60)).save(root / "b.gif")
    Image.new("RGBA", (10, 300)).save(root / "c.png")
    data = (root / "b.gif").read_bytes()
    (root / "s.tar").write_bytes(bytes(512) + data + bytes(512))
    images = Parser(hits_of(tmp_path, ["a.jpg", "b.gif", "c.png", f"s.tar@512+{len(data)}"])).images
    assert [image.size for image in images] == [(96, 48), (50, 60), (3, 96), (50, 60)]
    assert all(image.format == "PNG" and image.mode == "RGB" and not image.info for image in images)
    assert abs(images[0].getpixel((50, 20))[0] - 200) < 6


def cells(page) -> list:
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_a_row_with_everything(tmp_path):
    make_image(tmp_path / "root" / "a.jpg")
    row = {"image": "a.jpg", "alt": ["first alt", "second alt"], "rewrite_chatgpt": ["a rewrite", None],
           "rewrite_bard": None, "vec": "the vec", "vecap": ["a vecap", None], "label": ["cat", "tomcat"], "mine": {"url": "x"}, "yours": 7,
           "error": {"rewrite_chatgpt": [None, "repeats itself"], "rewrite_bard": "empty", "vecap": [None, "refused"]}}
    text = render(tmp_path, "rows", [row, {"alt": "no image", "vec": None, "error": "the user's own"}])
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


def hostile_rows(text):
    return [{"image": text, "alt": text, "rewrite_" + text: text, "vec": [text, None], "vecap": None, "label": text,
             text: {text: text}, "error": {"vec": [None, text], "vecap": text, "not " + text: text}},
            {"alt": text, "error": text}, {"error": {"line": text}, "line": text}, json.dumps([text]).encode()]


def hostile_hits(text):
    hit = {"image": text, "score": text, "correct": text}
    return [{"query": text, "truth": text, "rank": text, "hits": [hit]}, {"image": text, "truth": text, "hits": [hit]},
            {"query": [text], "truth": {text: text}, "rank": None, "hits": [{"image": [text]}]}, {}]


@pytest.mark.parametrize("page, rows, times", [("rows", hostile_rows, 11), ("hits", hostile_hits, 1)])
def test_every_text_may_be_hostile(tmp_path, page, rows, times):
    calm = Parser(render(tmp_path, page, rows("calm")))
    for text in (text[:50] for text in HOSTILE):  # nothing is cut here
        found = Parser(render(tmp_path, page, rows(text)))  # no element, no attribute, no comment comes from a text
        assert found.shape == calm.shape and found.images == [] and found.text.count(shown(text)) >= times, text


def test_lines_that_are_no_rows(tmp_path):
    text = render(tmp_path, "rows", [{"error": {"line": "not JSON: Expecting value"}, "line": "kept <b> by a stage"},
                                  b"{broken", b"", b"[1, 2]", b"\xff\xfe", b"[" * 100_000])
    page = Parser(text)
    assert "kept <b> by a stage" in page.text and "{broken" in page.text and "\\xff\\xfe" in page.text
    assert page.text.count("failed: not JSON: ") == 5 and "failed: not a JSON object" in page.text
    assert page.text.count("no image") == 0
    assert cells(text)[1:] == [["line", "6", "–", "5", "1"]]


def test_long_texts_and_lists_are_cut_and_their_length_said(tmp_path):
    row = {"alt": "y" * 100_000, "vec": [f"v{i}" for i in range(1000)], "label": [], "n": "z" * 5000}
    text = render(tmp_path, "rows", [row])
    page = Parser(text)
    assert len(text) < 40_000 and text.count("y" * 1000) == 1 and "y" * 1001 not in text
    assert "cut, 100,000 characters" in page.text and "1,000 entries" in page.text and "v19" in page.text
    assert "v20" not in page.text and "z" * 1001 not in text and "[]" in page.text


def lines_shown(text) -> list:
    return [int(number) for number in re.findall(r">line (\d+)<", text)]


def test_limit_and_sample(tmp_path):
    rows = [{"alt": f"row {i}"} for i in range(500)]
    text = render(tmp_path, "rows", rows)
    assert lines_shown(text) == [*range(1, 201)] and "200 of 500 rows, from the top" in text
    assert lines_shown(render(tmp_path, "rows", rows, "--limit", 3)) == [1, 2, 3]
    text = render(tmp_path, "rows", rows, "--sample", 20)
    drawn = lines_shown(text)
    assert len(set(drawn)) == 20 and drawn == sorted(drawn) and drawn[-1] > 250 and "20 of 500 rows, drawn" in text
    assert drawn != lines_shown(render(tmp_path, "rows", rows, "--sample", 20, "--seed", 1))
    assert lines_shown(render(tmp_path, "rows", rows[:5], "--sample", 20)) == [1, 2, 3, 4, 5]


def test_counts_are_of_all_rows(tmp_path):
    rows = [{"alt": "a", "vec": None, "error": {"vec": "OSError: this file"}}, {"alt": None, "vec": "v"},
            {"alt": ["a", None], "vec": None, "error": {"vec": "OSError: that file", "image": "missing file"}},
            {"vecap": ["a", None, None], "error": {"vecap": [None, "refused", "refused"]}}]
    assert cells(render(tmp_path, "rows", rows, "--limit", 1)) == [
        ["field", "rows", "null", "OSError", "missing file", "refused"], ["alt", "3", "2", "–", "–", "–"],
        ["vec", "3", "2", "2", "–", "–"], ["vecap", "1", "1", "–", "–", "1"], ["image", "–", "–", "–", "1", "–"]]


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
    text = render(tmp_path, "hits", rows)
    page = Parser(text)
    assert text.count('class="block query hit"') == 2 and text.count('class="block query miss"') == 3
    assert text.count('class="block query other"') == 1 and text.count('class="wanted"') == 2
    for words in ("right at place 1,234", "right at place 2", "could not be read", "label: cats", "average precision 0.500",
                  "all: 6", "first image right: 2", "first image wrong: 3", "no image: no such file", "6 of 6 queries, from the top"):
        assert words in page.text, words
    assert len(page.images) == 11 and text.count('type="radio"') == 3 and text.count('tabindex="0"') == 6
