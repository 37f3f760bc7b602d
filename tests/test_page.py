"""data/page.py: whatever a caption, a name or a path says is shown as text, and nothing else is opened."""
import base64
import html.parser
import io
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

PAGE = Path(__file__).parents[1] / "data" / "page.py"
TAGS = set("""html head meta title style body header main nav aside section div span p h1 h2 h3 ul ol li dl dt
    dd a table thead tbody tr th td figure figcaption img code del bdi svg desc path line circle text""".split())
HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='alert(1)", "</style>",
    "</title>", "<!--", "--><svg onload=alert(1)>", "]]>", "javascript:alert(1)", "https://evil.example/x.png",
    "&amp;", "&lt;b&gt;", "&#x3c;b>", "a\u2028b", "\u202etxt.exe", "\u2069\u202eout of its isolate", "nul\0nul",
    "\x1b[31mred\x1b[0m", "\x85\x9b", "lone \ud800 surrogate", "\udfff", "{style}{0}", "%s", "😀",
    "z\u0351\u0352", "x" * 500]


def run(*arguments):
    return subprocess.run([sys.executable, PAGE, *map(str, arguments)], capture_output=True, text=True)


def render(tmp_path, results) -> str:
    (tmp_path / "root").mkdir(exist_ok=True)
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")  # \ud800 stays an escape
    done = run("report", tmp_path / "results.json", tmp_path / "out.html", "--image-root", tmp_path / "root")
    assert (done.returncode, done.stderr) == (0, "")
    return (tmp_path / "out.html").read_bytes().decode("utf-8")  # strict: the page is valid UTF-8


class Parser(html.parser.HTMLParser):
    """Collects what a browser would see, and refuses what a page of ours never holds."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.attributes, self.images = [], "", [], []
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
        if name not in ("img", "meta"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name, "not balanced"

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            assert "url(" not in data and "@import" not in data and "<" not in data
        else:
            self.text += data

    def handle_comment(self, data):
        raise AssertionError("a comment")

    handle_pi = unknown_decl = handle_comment


def everywhere(sources=()) -> dict:
    """A results file that uses every key; `sources` are its picture paths."""
    good, bad = sources or ("good.png", "good.png")
    hits = [{"image": good, "alt": "alt", "score": 0.5, "correct": True},
            {"image": bad, "alt": "alt", "score": "score"}]
    return {
        "title": "title", "summary": ["summary"], "notes": ["note"], "machine": {"key": "value", "cores": 4},
        "steps": [{"name": "name", "command": "command", "seconds": 90.4, "skipped": False},
                  {"name": "name", "command": "command", "seconds": None, "skipped": True}],
        "tables": [{"title": "title", "note": "note", "columns": ["column", "column"],
                    "rows": [["cell", "cell", "beyond the columns"], ["short"], [None, 0.25, 3], []]}],
        "curves": {"title": "title", "chance": 4.158883,
                   "series": [{"name": "name", "points": [[0, 4.2], [10, 3], [20, None], [30, float("nan")]]},
                              {"name": "name", "points": [[5, 1]]}, {"name": "empty", "points": []}]},
        "rewrites": [{"image": good, "alt": "alt", "texts": [
            {"source": "source", "text": "text", "kept": True, "reason": None},
            {"source": "source", "text": "text", "kept": False, "reason": "reason"},
            {"source": "source", "text": None, "kept": False, "reason": "reason"}]}],
        "queries": [{"query": "query", "rows": [{"model": "model", "hits": hits}]}],
        "samples": [{"title": "title", "note": "note", "items": [
            {"image": None, "fields": {"field": "text"}}, {"image": bad, "fields": {"field": None}}]}]}


def poison(node, seen, key=None):
    """The results with hostile text in every position of a string, names of fields too; all go into `seen`."""
    def text(value):
        seen.append(f"{value} {len(seen)} {' '.join(HOSTILE)} .")
        return seen[-1]
    if isinstance(node, dict):
        names = text if key in ("machine", "fields") else str
        return {names(name): poison(value, seen, name) for name, value in node.items()}
    if isinstance(node, list):
        return [poison(value, seen, key) for value in node]
    return text(node) if isinstance(node, str) and key != "image" else node


def shown(text) -> str:
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def make_image(path, size=(200, 100), **options):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, (200, 30, 30)).save(path, **options)


def test_hostile_text_is_shown_as_text(tmp_path):
    make_image(tmp_path / "root" / "good.png")
    seen = []
    page = Parser(render(tmp_path, poison(everywhere(), seen)))
    for text in seen:
        if not text.startswith("empty "):  # a series without points is left out
            place = " ".join(page.attributes) if text.startswith("alt ") else page.text
            assert shown(text) in place, text[:20]
    assert len(seen) == 40 and len(page.images) == 4


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_paths_are_placeholders(tmp_path, name):
    make_image(tmp_path / "root" / "good.png")
    page = Parser(render(tmp_path, everywhere(["good.png", name])))
    assert len(page.images) == 2 and page.text.count("no picture: ") == 2


def test_page_isolates_and_forbids(tmp_path):
    page = render(tmp_path, everywhere())
    assert "content=\"default-src 'none'; img-src data:;" in page
    parsed = Parser(page)
    assert "viewport" in " ".join(parsed.attributes) and "http" not in page.replace("http-equiv", "")
    assert re.search(r'<h1 dir="auto">', page) and re.search(r'<td dir="auto">', page)
    assert "ln(batch)" in parsed.text and "1 min 30 s" in parsed.text and "skipped" in parsed.text
    assert "0.25" in parsed.text and "✓" in parsed.text and parsed.text.count("dropped: ") == 2
    assert re.search(r"<del>text</del>", page)


@pytest.mark.parametrize("name", [
    "../out.png", "sub/../../out.png", "ABSOLUTE", "link.png", "folder/out.png", "", ".", "sub", "pipe",
    "text.png", "cut.png", "bomb.png", "page.eps", "missing.png", None, 3, ["good.png"], {"a": 1},
    "good.png/", "n" * 5000])
def test_only_pictures_inside_the_root(tmp_path, name):
    root = tmp_path / "root"
    make_image(root / "sub" / "inside.png")
    make_image(tmp_path / "out.png", (61, 67))
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "text.png").write_text("no picture")
    (root / "cut.png").write_bytes((root / "sub" / "inside.png").read_bytes()[:60])
    (root / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    subprocess.run(["mkfifo", root / "pipe"], check=True)
    bomb = bytearray((root / "sub" / "inside.png").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # the size in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (root / "bomb.png").write_bytes(bomb)
    name = str(tmp_path / "out.png") if name == "ABSOLUTE" else name
    text = render(tmp_path, {"title": "t", "queries": [{"rows": [{"hits": [{"image": name}]}]}]})
    page = Parser(text)
    assert page.images == [] and "no picture: " in page.text
    assert base64.b64encode((tmp_path / "out.png").read_bytes()).decode() not in text


def test_pictures_are_small_clean_pngs(tmp_path):
    root = tmp_path / "root"
    make_image(root / "a.jpg", (800, 400), comment=b"secret comment", icc_profile=b"secret profile")
    Image.new("P", (50, 60)).save(root / "b.gif")
    Image.new("RGBA", (10, 300)).save(root / "sub.png")
    (root / "inner.png").symlink_to(root / "sub.png")  # a link that stays inside is fine
    hits = [{"image": name} for name in ("a.jpg", "b.gif", "sub.png", "inner.png", "x/../a.jpg")]
    page = render(tmp_path, {"title": "t", "queries": [{"query": "q", "rows": [{"hits": hits}]}]})
    images = Parser(page).images
    assert [image.size for image in images] == [(96, 48), (50, 60), (3, 96), (3, 96), (96, 48)]
    assert all(image.format == "PNG" and image.mode == "RGB" and not image.info for image in images)
    assert abs(images[0].getpixel((50, 20))[0] - 200) < 6


def test_every_key_but_the_title_may_be_missing(tmp_path):
    assert "only a title" in Parser(render(tmp_path, {"title": "only a title"})).text
    full = everywhere()
    Parser(render(tmp_path, {key: None for key in full} | {"title": "null is absent"}))

    def drop(node):  # every smaller results file that lacks one key
        for key, value in (list(node.items()) if isinstance(node, dict) else enumerate(node)):
            if isinstance(node, dict) and node is not full["machine"] and key != "title":
                del node[key]
                yield key
                node[key] = value
            if isinstance(value, dict | list):
                yield from drop(value)
    sys.path.insert(0, str(PAGE.parent))
    import page
    count = sum(bool(Parser(page.report(full, str(tmp_path)))) for _ in drop(full))
    assert count > 40


@pytest.mark.parametrize("points", [
    [[0, 1]], [[3, 2], [3, 2]], [[0, 1e-12], [1e9, 3e-12]], [[0, 1e299], [1, -1e299]], [[-5, -1], [5, 1]],
    [[0, 10**400], [1, float("inf")]], [["a", "b"], [1], []], [[True, False]]])
def test_curves_of_any_numbers(tmp_path, points):
    page = render(tmp_path, {"title": "t", "curves": {"series": [{"name": "CLIP", "points": points}]}})
    Parser(page)
    assert not re.search(r"\b(nan|inf)", page.split("<body>")[1])


@pytest.mark.parametrize("content, told", [
    (None, "cannot read"), (b"{", "not a JSON file"), (b"\xff\xfe", "not a JSON file"),
    (b"[]", "JSON object"),
    (b"[" * 100_000, "not a JSON file"), (b"{}", '"title"'), (b'{"title": " "}', '"title"'),
    (b'{"title": 3}', '"title"'), (b'{"title": "t", "tables": "text"}', '"tables"'),
    (b'{"title": "t", "steps": ["text"]}', '"steps"'),
    (b'{"title": "t", "machine": []}', '"machine"'),
    (b'{"title": "t", "tables": [{"rows": [3]}]}', '"rows"')])
def test_mistakes_in_the_results(tmp_path, content, told):
    if content is not None:
        (tmp_path / "r.json").write_bytes(content)
    check_mistake(run("report", tmp_path / "r.json", tmp_path / "o.html", "--image-root", tmp_path), told)
    assert list(tmp_path.glob("o.html*")) == []


def test_mistakes_in_the_command(tmp_path):
    results = tmp_path / "r.json"
    results.write_text('{"title": "t"}')
    output = tmp_path / "o.html"
    (tmp_path / "folder").mkdir()
    for arguments, told in [
            ([], "COMMAND"), (["rport"], "report"), (["report", results, output], "--image-root"),
            (["report", results, output, "--image-root", tmp_path / "missing\nfolder"], "not a folder"),
            (["report", results, tmp_path / "no" / "o.html", "--image-root", tmp_path], "cannot write"),
            (["report", results, tmp_path / "folder", "--image-root", tmp_path], "cannot write"),
            (["report", results, output, "--image-root", tmp_path, "--nonsense"], "--nonsense")]:
        check_mistake(run(*arguments), told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "r.json"]  # no partial page is left


def check_mistake(done, told):
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"page\.py: error: .*\n", done.stderr) and told in done.stderr


def test_an_old_page_is_replaced_only_by_a_whole_one(tmp_path):
    (tmp_path / "out.html").write_text("old")
    (tmp_path / "bad.json").write_text("{}")
    run("report", tmp_path / "bad.json", tmp_path / "out.html", "--image-root", tmp_path)
    assert (tmp_path / "out.html").read_text() == "old"
    assert "new" in render(tmp_path, {"title": "new"})
