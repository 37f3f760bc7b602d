"""Pages of HTML that stay safe: what data/view.py and the demo's report share.

Captions come from the web, so all text is hostile here. Three rules keep a page safe. Markup is
made only by tag(), which escapes whatever is not markup already. An image is opened only inside
--image-root and is encoded anew. Should these two ever fail, the page's Content-Security-Policy
forbids scripts and requests.
"""
import base64
import functools
import html
import io
import json
import os
import re
import warnings

from PIL import Image

from data.common import check_output, die
from data.rows import new_file
from train_clip import open_image, to_rgb

THUMBNAIL = 96  # px, the longer side
LONG = 1000  # characters; of a longer text the page shows the beginning and the length
# Not all of Pillow's formats: EPS runs Ghostscript
FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
# Every character that is not printable, a tab or a line break: C0 and C1 controls, lone surrogates
UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.css")) as css:
    STYLE = css.read()

DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{title}
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


# === markup: text becomes HTML here and nowhere else ==============================================

class Html(str):
    """Text that is markup already. Nothing that is read from a file has this type."""


def escape(value) -> Html:
    """Any value as text that is safe in an element and in a quoted attribute."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(UNPRINTABLE.sub("\ufffd", str(value)), quote=True))


def tag(name, /, *children, **attributes) -> Html:
    """<name attribute="...">children</name>; `class_` is class, `aria_label` aria-label."""
    start = name
    for key, value in attributes.items():
        start += f' {key.strip("_").replace("_", "-")}="{escape(value)}"'
    if name in ("img", "input"):
        return Html(f"<{start}>")
    return Html(f"<{start}>{''.join(map(escape, children))}</{name}>")


def text_of(value) -> str:
    """A text as it is, anything else as JSON."""
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
    except RecursionError:
        return "nested too deeply to show"


def words(name, value, **attributes) -> Html:
    """An element for text from outside. dir="auto" isolates it: a right-to-left override ends
    with it."""
    text = "–" if value is None else text_of(value)
    shown = [text]
    if len(text) > LONG and not isinstance(text, Html):
        length = tag("span", f" … cut, {len(text):,} characters", class_="soft")
        shown = [tag("bdi", text[:LONG]), length]
    return tag(name, *shown, dir="auto", **attributes)


def get(node, key, kind, each=object):
    """The list or object node[key], empty if absent or null. Another type, also of an entry, is a
    user's mistake."""
    value = node.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind) or not all(isinstance(entry, each) for entry in value):
        of = "" if each is object else f" of {each.__name__}s"
        die(f'"{key}" has to be a {kind.__name__}{of}')
    return value


def is_number(value) -> bool:
    """Finite and no bool: JSON's true is an int in Python. The comparison is false for NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


# === images and the parts of a page ===============================================================

@functools.lru_cache(maxsize=1024)  # the same image answers several queries
def thumbnail(root, name) -> str:
    """The image `name` inside `root` as a data URI. Raises ValueError(why there is none)."""
    try:
        file = os.path.join(root, re.sub(r"@\d+\+\d+$", "", name))
        if not os.path.isfile(os.path.realpath(file)):
            raise ValueError("no such file")  # or a pipe or a device, on which open() would wait
        image = open_image(root, name)
        if image.format not in FORMATS:
            raise ValueError(f"{image.format} is not read")
        image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))  # a JPEG: decode near the needed size
        small = to_rgb(image)  # as the models see it
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.info.clear()  # no colour profile or comment from the file goes into the page
        small.save(png := io.BytesIO(), "PNG", optimize=True)
    except Exception as error:  # Pillow raises nearly everything; one file must not cost the page
        without_address = re.sub(" <_io.*", "", str(error))
        reason = getattr(error, "strerror", None) or without_address
        raise ValueError(reason or type(error).__name__) from None
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def image_element(root, name, alt) -> Html:
    """<img>, or a visible placeholder with the reason."""
    alt = text_of(alt or "")[:LONG]
    try:
        if not name or not isinstance(name, str):
            raise ValueError("none is named")
        return tag("img", src=thumbnail(root, name), alt=alt, title=alt, class_="image")
    except ValueError as reason:
        title = text_of(name or "")[:LONG]
        return words("span", f"no image: {reason}", class_="image none", title=title)


def block(node, *children) -> Html:
    """A part of a section, under its title and note if it has them."""
    title = words("h3", node["title"]) if node.get("title") else ""
    note = words("p", node["note"], class_="soft") if node.get("note") else ""
    return tag("div", title, note, *children, class_="block")


def table(node) -> Html:
    """node: {title, note, columns: [text], rows: [[text or number]]}; short rows are filled up"""
    columns, rows = get(node, "columns", list), get(node, "rows", list, list)
    width = max(map(len, [columns, *rows]))
    head = [words("th", name, scope="col") for name in columns + [""] * (width - len(columns))]
    body = []
    for row in rows:
        cells = row + [None] * (width - len(row))
        body.append(tag("tr", *(words("th", cell, scope="row") for cell in cells[:1]),
                        *(words("td", cell) for cell in cells[1:])))
    grid = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))
    # In the tab order, so that a keyboard can scroll it too
    return block(node, tag("div", grid, class_="scroll", tabindex=0, role="region",
                           aria_label=node.get("title") or "table"))


def card(shown, heading, pairs, *more) -> Html:
    """An image beside a heading, (name, element) pairs and more. Image and heading may be ""."""
    listed = tag("dl", *(tag("div", words("dt", name), value) for name, value in pairs))
    heading = words("h3", heading) if heading else ""
    return tag("li", shown, tag("div", heading, listed, *more), class_="card")


def because(failure, reason) -> Html:
    return words("p", f"{failure}: {text_of(reason or 'no reason given')}", class_="failed")


def hit_figure(root, hit, kind="") -> Html:
    """An image that a query found, with its score. ✓ and a frame: correct."""
    score = f"{hit['score']:.3f}" if is_number(hit.get("score")) else hit.get("score", "")
    caption = tag("figcaption", "✓ " if hit.get("correct") else "", tag("bdi", score))
    shown = image_element(root, hit.get("image"), hit.get("alt", hit.get("image")))
    kind = kind or ("correct" if hit.get("correct") else "other")
    return tag("figure", shown, caption, class_=kind)


# === files ========================================================================================

def document(title, *body, style="") -> str:
    """The page; `style` is added to STYLE"""
    return DOCUMENT.format(title=tag("title", title), style=STYLE + style, body="\n".join(body))


def write(path, page):
    """All of the page or nothing"""
    with new_file(path) as file:
        file.write(page.encode("utf-8", "replace"))


def add_page_options(parser):
    parser.add_argument("output", metavar="OUT.html",
                        help="the page to write; replaced if it exists")
    parser.add_argument("--image-root", required=True, metavar="DIR",
                        help="the folder of the images; nothing outside it is opened")
    parser.error = die


def image_root(args):
    """--image-root with its links resolved. Also the checks that every page needs"""
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root} is not a folder")
    check_output(args.output, args.input)
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # over 89 Mpx are not decoded
    return os.path.realpath(args.image_root)
