"""Writes the project's HTML: one self-contained page that opens anywhere, offline, and makes no request.

    python data/page.py rows out/demo/filtered.jsonl out/demo/rows.html --image-root out/demo/images --sample 100
    python data/page.py hits hits.jsonl gallery.html --image-root coco
    python data/page.py report out/demo/results.json out/demo/report.html --image-root out/demo/images

`rows` shows pictures beside their AltText and what the stages made of it, or why nothing; `hits` the queries of
eval_retrieval.py --hits with what they found; `report` shows results.
Captions come from the web, so all text is hostile here. Three rules keep the page safe. Markup is made only
by tag(), which escapes whatever is not markup already. A picture is opened only inside --image-root and is
encoded anew. Should these two ever fail, the page's Content-Security-Policy forbids it scripts and requests.
"""
import argparse
import base64
import functools
import html
import io
import json
import math
import os
import random
import re
import sys
import warnings
from collections import Counter
from itertools import zip_longest

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
THUMBNAIL = 96                    # px, the longer side
LONG = 1000                       # characters; of a longer text the beginning is shown, and how long it is
MANY = 20                         # entries of a list, likewise
KINDS = 100                       # of field names and of reasons the commonest are counted one by one
FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")  # not all of Pillow's: EPS runs Ghostscript
# All that is not a printable character, tab or line break: C0 and C1 controls, lone surrogates.
UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")
DASHES = ("none", "9 4", "2 4", "12 4 2 4", "5 5", "16 5")  # one a series, for grey print

STYLE = """
:root { color-scheme: light dark; --back: #fafaf8; --card: #fff; --ink: #1c1d1f; --soft: #5b6067;
  --line: #e2e2dd; --link: #1f5fbf; --good: #14734a; --note: #fbf4e2; --edge: #b98516; --warn: #a3401a;
  --s0: #1f5fbf; --s1: #c2410c; --s2: #14734a; --s3: #8b2fa8; --s4: #86660a; --s5: #4b5563 }
@media (prefers-color-scheme: dark) { :root { --back: #131416; --card: #1b1d20; --ink: #e7e7e4;
  --soft: #a2a7ae; --line: #303338; --link: #84b1f5; --good: #5fca96; --note: #29241a; --edge: #d0a144; --warn: #f0a07a;
  --s0: #84b1f5; --s1: #f5955f; --s2: #5fca96; --s3: #d294ea; --s4: #dcbc58; --s5: #b8bec8 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
header, main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 0 } main { padding: 0 1.25rem 4rem }
h1 { font-size: clamp(1.6rem, 5vw, 2.25rem); line-height: 1.2; text-wrap: balance; margin: 0 0 1rem }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3.25rem 0 .75rem } h3 { font-size: 1rem; margin: 0 }
p { margin: 0 0 .75rem; max-width: 68ch; text-wrap: pretty }
ul, ol, dl, dd, figure { margin: 0; padding: 0; list-style: none }
a { color: var(--link); text-underline-offset: .2em }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
bdi { display: inline-block; max-width: 100% } /* a stray bidi control cannot leave an inline-block */
code { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.soft { color: var(--soft); font-size: .9rem }

nav ul, .machine, .legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; font-size: .93rem }
nav { margin-top: 1.5rem }
.notes { background: var(--note); border-left: 3px solid var(--edge); border-radius: 4px;
  padding: .9rem 1.1rem; margin: 1.5rem 0; max-width: 72ch }
.notes h2 { font-size: 1rem; margin: 0 0 .3rem } .notes ul { list-style: disc; padding-left: 1.1rem }
.machine div { display: flex; gap: .45rem } dt { color: var(--soft) }
.block + .block { margin-top: 2rem } .block h3 { margin-bottom: .3rem }

.scroll { overflow-x: auto; margin: .75rem 0 }
table { border-spacing: 0; font-variant-numeric: tabular-nums; min-width: min(100%, 30rem) }
th, td { padding: .5rem .9rem; line-height: 1.5; text-align: right; border-bottom: 1px solid var(--line);
  overflow-wrap: normal } td { white-space: nowrap }
th:first-child { position: sticky; left: 0; background: var(--back); text-align: left; padding-left: 0;
  min-width: 9.5rem; max-width: 45vw; overflow-wrap: anywhere; font-weight: 500 }
thead th { border-color: var(--soft); color: var(--soft); font-size: .875rem; font-weight: 500;
  vertical-align: bottom }

.chart > svg { display: block; width: 100%; height: auto } .chart text { font-size: 12px; fill: var(--soft) }
.grid { stroke: var(--line) } .chance { stroke: var(--soft); stroke-dasharray: 5 5; stroke-width: 1.5 }
.curve { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round }
.curve { stroke: var(--hue) } .dot { fill: var(--hue) }
.s0 { --hue: var(--s0) } .s1 { --hue: var(--s1) } .s2 { --hue: var(--s2) }
.s3 { --hue: var(--s3) } .s4 { --hue: var(--s4) } .s5 { --hue: var(--s5) }
.legend li { display: flex; align-items: center; gap: .5rem } .legend svg { flex: none }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1rem }
.card { display: flex; gap: 1rem; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px } .card > div { flex: 1; min-width: 0 } .card h3 { margin-bottom: .5rem }
.card dl > div { display: grid; grid-template-columns: 6rem 1fr; gap: 0 .75rem; padding: .3rem 0;
  font-size: .93rem }
.card { contain: paint } /* piled-up accents stay inside */
.card p { margin: 0 } .card p + p { font-size: .9em } .card .picture { object-position: top }
.picture { display: block; width: 6rem; height: 6rem; flex: none; border-radius: 4px; object-fit: contain }
.failed { color: var(--warn) } .card ol { list-style: decimal; padding-left: 1.4rem }
.rows { align-items: start; margin-top: 2rem } .rows dl > div { grid-template-columns: 4.5rem 1fr }
.rows h3, .rows summary { color: var(--soft); font-size: .85rem; font-weight: 400 } summary { cursor: pointer }
.none { border: 1px dashed var(--soft); color: var(--soft); padding: .3rem; overflow: hidden;
  font-size: .72rem; line-height: 1.3 }

.model { display: grid; grid-template-columns: 9rem 1fr; gap: .3rem 1rem; padding: .35rem 0;
  align-items: center }
.hits { display: grid; grid-template-columns: repeat(5, minmax(0, 6.75rem)); gap: .5rem }
.hits figure { border: 2px solid transparent; border-radius: 8px; padding: .25rem }
.hits .picture { width: 100%; height: auto; aspect-ratio: 1 }
figcaption { text-align: center; white-space: nowrap; overflow: hidden; font-size: .8rem; color: var(--soft) }
.hits .correct { border-color: var(--good) } .correct figcaption { color: var(--good); font-weight: 600 }
.hits .wanted { border: 2px dashed var(--edge) }
.filter { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: .6rem 0;
  border: 0; margin: 0; background: var(--back); border-bottom: 1px solid var(--line) }
.filter + .query { margin-top: 1.25rem } .filter label { padding: .35rem 0; cursor: pointer } .query > .picture { margin: .5rem 0 }
main:has(#show-hits:checked) .miss, main:has(#show-misses:checked) .hit { display: none }

.steps li { border-top: 1px solid var(--line); padding: .65rem 0 }
.steps code, details code { color: var(--soft); white-space: pre-wrap }
.steps h3 { display: flex; justify-content: space-between; gap: 1rem; font-weight: 500 }
.time, .legend, figcaption { font-variant-numeric: tabular-nums } .time { white-space: nowrap }

@media (max-width: 40rem) { header { padding-top: 1.75rem } .chart text { font-size: 22px }
  .model, .card dl > div { grid-template-columns: 1fr }
  .card .picture { width: 4.5rem; height: 4.5rem } .card .none { height: auto; align-self: start }
  .hits { gap: .25rem } .hits figure { padding: .1rem } figcaption { font-size: .72rem } }
@media print { :root { --back: #fff } nav { display: none } body { font-size: 10pt }
  h2, h3, p.soft { break-after: avoid }
  .card, .model, .chart, tr, .steps li { break-inside: avoid } .scroll { overflow: visible } }
"""

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


def die(message):
    """A user's mistake: one line on stderr, exit status 2."""
    print("page.py: error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


# ---- markup: text becomes HTML here and nowhere else

class Html(str):
    """Text that is markup already. JSON cannot hold one, so nothing read from a file passes for markup."""


def escape(value) -> Html:
    """Any value as text that is safe in an element and in a quoted attribute."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(UNPRINTABLE.sub("\ufffd", str(value)), quote=True))


def tag(name, /, *children, **attributes) -> Html:
    """<name attribute="...">children</name>; `class_` stands for class, `aria_label` for aria-label."""
    start = name
    for key, value in attributes.items():
        start += f' {key.strip("_").replace("_", "-")}="{escape(value)}"'
    return Html(f"<{start}>" if name in ("img", "input") else f"<{start}>{''.join(map(escape, children))}</{name}>")


def text_of(value) -> str:
    """A text as it is, anything else as JSON."""
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
    except RecursionError:
        return "nested too deeply to show"


def words(name, value, **attributes) -> Html:
    """An element for text from outside. dir="auto" isolates it: a right-to-left override ends with it."""
    text = "–" if value is None else text_of(value)
    shown = [text]
    if len(text) > LONG and not isinstance(text, Html):
        shown = [tag("bdi", text[:LONG]), tag("span", f" … cut, {len(text):,} characters", class_="soft")]
    return tag(name, *shown, dir="auto", **attributes)


def get(node, key, kind, each=object):
    """The list or object node[key], empty if absent or null; another type, of it or an entry, is an error."""
    found = node.get(key)
    if found is None:
        return kind()
    if not isinstance(found, kind) or not all(isinstance(entry, each) for entry in found):
        die(f'"{key}" has to be a {kind.__name__}' + ("" if each is object else f" of {each.__name__}s"))
    return found


def is_number(value) -> bool:
    """Finite and no bool (JSON's true is an int in Python); the comparison is false for NaN and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


# ---- pictures

@functools.lru_cache(maxsize=1024)  # the same picture answers several queries
def thumbnail(root, name) -> str:
    """The picture `name` inside `root` as a data URI; ValueError says why there is none."""
    from train_clip import open_image, to_rgb  # torch takes seconds, and a page without pictures needs none
    try:
        if not os.path.isfile(os.path.realpath(os.path.join(root, re.sub(r"@\d+\+\d+$", "", name)))):
            raise ValueError("no such file")  # or a pipe or a device, on which open() would wait
        image = open_image(root, name)
        if image.format not in FORMATS:
            raise ValueError(f"{image.format} is not read")
        image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))  # a JPEG: decode near the needed size
        small = to_rgb(image)  # as the models see it
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.info.clear()  # no colour profile or comment from the file goes into the page
        small.save(png := io.BytesIO(), "PNG", optimize=True)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything, and one must not cost the page
        reason = getattr(error, "strerror", None) or re.sub(" <_io.*", "", str(error))  # no memory address
        raise ValueError(reason or type(error).__name__) from None
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def picture(root, name, alt) -> Html:
    """<img>, or a visible placeholder with the reason."""
    alt = text_of(alt or "")[:LONG]
    try:
        if not name or not isinstance(name, str):
            raise ValueError("none is named")
        return tag("img", src=thumbnail(root, name), alt=alt, title=alt, class_="picture")
    except ValueError as reason:
        return words("span", f"no picture: {reason}", class_="picture none", title=text_of(name or "")[:LONG])


# ---- the report's parts: each returns its elements, none if its key is absent

def block(node, *children) -> Html:
    """A part of a section, under its title and note if it has them."""
    return tag("div", words("h3", node["title"]) if node.get("title") else "",
               words("p", node["note"], class_="soft") if node.get("note") else "", *children, class_="block")


def tables(results) -> list:
    blocks = []
    for node in get(results, "tables", list, dict):
        columns, rows = get(node, "columns", list), get(node, "rows", list, list)
        width = max(map(len, [columns, *rows]))
        head = [words("th", name, scope="col") for name in columns + [""] * (width - len(columns))]
        body = []
        for row in rows:
            cells = row + [None] * (width - len(row))
            body.append(tag("tr", *(words("th", cell, scope="row") for cell in cells[:1]),
                            *(words("td", cell) for cell in cells[1:])))
        grid = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))
        # In the tab order, so that a keyboard can scroll it too.
        blocks.append(block(node, tag("div", grid, class_="scroll", tabindex=0, role="region",
                                      aria_label=node.get("title") or "table")))
    return blocks


def ticks(low, high, count=6) -> list:
    """Round numbers that enclose low..high, a step of 1, 2, 5 or 10 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= (high - low) * 0.999)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def span(values) -> tuple:
    """(least, greatest) of the values, widened if they are (nearly) all the same."""
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high), 1) else (low, low + max(abs(low), 1))


def curves(results) -> list:
    """The losses as an SVG line chart, with a dashed line where a model that guesses would be."""
    node = get(results, "curves", dict)
    series = []
    for line in get(node, "series", list, dict):
        points = [point[:2] for point in get(line, "points", list, list) if len(point) > 1]
        points = [point for point in points if all(map(is_number, point))]  # not a loss of null or NaN
        if points:
            series.append((line.get("name", "–"), points))
    if not series:
        return []
    chance = [node["chance"]] if is_number(node.get("chance")) else []
    left, right = span([x for _, points in series for x, _ in points])
    rows = ticks(*span([y for _, points in series for _, y in points] + chance))

    def across(x):  # step -> x in a box of 720 x 372
        return round(70 + 610 * (x - left) / (right - left), 1)

    def down(y):  # loss -> y
        return round(315 - 280 * (y - rows[0]) / (rows[-1] - rows[0]), 1)

    def text(value, x, y, anchor="end"):
        return tag("text", value, x=x, y=y, text_anchor=anchor)

    def level(y, kind):
        return tag("line", x1=70, x2=690, y1=down(y), y2=down(y), class_=kind)

    marks = [text("loss", 58, 16), text("step", 690, 366)]
    marks += [mark for y in rows for mark in (level(y, "grid"), text(f"{y:g}", 58, down(y) + 5))]
    marks += [text(f"{x:g}", across(x), 340, "middle") for x in ticks(left, right) if left <= x <= right]
    marks += [mark for y in chance for mark in (level(y, "chance"), text("ln(batch)", 688, down(y) - 7))]
    legend = []
    for i, (name, points) in enumerate(series):
        hue, dash = f"s{i % len(DASHES)}", DASHES[i % len(DASHES)]
        path = "M" + " L".join(f"{across(x)},{down(y)}" for x, y in points)
        step, loss = points[-1]
        marks += [tag("path", d=path, class_=f"curve {hue}", stroke_dasharray=dash),
                  tag("circle", cx=across(step), cy=down(loss), r=4, class_=f"dot {hue}")]
        swatch = tag("path", d="M2,5 H44", class_=f"curve {hue}", stroke_dasharray=dash)
        legend.append(tag("li", tag("svg", swatch, width=46, height=10, aria_hidden="true"), tag("bdi", name),
                          tag("span", f"{loss:.3f} at step {step:g}", class_="soft")))
    title = node.get("title") or "Training loss"
    about = "Loss by step; at the end: " + "; ".join(f"{name} {points[-1][1]:g}" for name, points in series)
    drawing = tag("svg", tag("title", title, id="chart-title"), tag("desc", about, id="chart-about"), *marks,
                  viewBox="0 0 720 372", role="img", aria_labelledby="chart-title chart-about")
    return [tag("figure", words("h3", title), drawing, tag("ul", *legend, class_="legend"), class_="chart")]


def card(shown, heading, pairs, *more) -> Html:
    """A picture beside a heading, (name, element) pairs and what else there is; picture and heading may be ""."""
    listed = tag("dl", *(tag("div", words("dt", name), value) for name, value in pairs))
    return tag("li", shown, tag("div", words("h3", heading) if heading else "", listed, *more), class_="card")


def because(what, reason) -> Html:
    return words("p", f"{what}: {text_of(reason or 'no reason given')}", class_="failed")


def rewrites(results, root) -> list:
    cards = []
    for node in get(results, "rewrites", list, dict):
        pairs = []
        for text in get(node, "texts", list, dict):
            said = words("dd", text.get("text"))
            if text.get("text") is None or not text.get("kept", True):
                said = "no text" if text.get("text") is None else words("del", text["text"])
                said = tag("dd", tag("p", said), because("dropped", text.get("reason")), class_="soft")
            pairs.append((text.get("source"), said))
        cards.append(card(picture(root, node.get("image"), node.get("alt")), node.get("alt"), pairs))
    about = "The original caption in bold, under it what each source made of it."
    return cards and [tag("p", about, class_="soft"), tag("ul", *cards, class_="cards")]


def hit_figure(root, hit, kind="") -> Html:
    """A picture that a query found, with its score; ✓ and a frame: correct."""
    score = f"{hit['score']:.3f}" if is_number(hit.get("score")) else hit.get("score", "")
    caption = tag("figcaption", "✓ " if hit.get("correct") else "", tag("bdi", score))
    return tag("figure", picture(root, hit.get("image"), hit.get("alt", hit.get("image"))), caption,
               class_=kind or ("correct" if hit.get("correct") else "other"))


def queries(results, root) -> list:
    blocks = []
    for node in get(results, "queries", list, dict):
        models = []
        for row in get(node, "rows", list, dict):
            hits = tag("div", *(hit_figure(root, hit) for hit in get(row, "hits", list, dict)[:5]), class_="hits")
            models.append(tag("div", words("div", row.get("model")), hits, class_="model"))
        blocks.append(block({"title": node.get("query")}, *models))
    about = "The five nearest pictures of each model, best first, with scores. ✓ and a frame: correct."
    return blocks and [tag("p", about, class_="soft"), *blocks]


def samples(results, root) -> list:
    blocks = []
    for node in get(results, "samples", list, dict):
        cards = []
        for item in get(node, "items", list, dict):
            pairs = [(name, words("dd", text)) for name, text in get(item, "fields", dict).items()]
            image = item.get("image")
            cards.append(card("" if image is None else picture(root, image, ""), "", pairs))
        blocks.append(block(node, tag("ul", *cards, class_="cards")))
    return blocks


def duration(seconds) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def steps(results) -> list:
    rows, total = [], 0
    for step in get(results, "steps", list, dict):
        seconds = step.get("seconds") if is_number(step.get("seconds")) else None
        total += 0 if step.get("skipped") else seconds or 0
        time = "skipped" if step.get("skipped") else "–" if seconds is None else duration(seconds)
        rows.append(tag("li", tag("h3", tag("bdi", step.get("name", "")), tag("span", time, class_="time")),
                        words("code", step.get("command", ""))))
    rows += rows and [tag("li", tag("h3", "Total", tag("span", duration(total), class_="time")))]
    return rows and [tag("ol", *rows, class_="steps")]


def report(results, root) -> str:
    """The page of a results file: an object with these keys, of which only "title" has to be there.

    title: text            summary, notes: [text]            machine: {name: text}
    tables: [{title, note, columns: [text], rows: [[text or number]]}]      short rows are filled up
    curves: {title, chance: ln(batch), series: [{name, points: [[step, loss]]}]}
    rewrites: [{image, alt, texts: [{source, text, kept: bool, reason}]}]
    queries: [{query, rows: [{model, hits: [{image, alt, score, correct: bool}]}]}]
    samples: [{title, note, items: [{image, fields: {name: text}}]}]
    steps: [{name, command, seconds, skipped: bool}]
    """
    title = results.get("title")
    if not isinstance(title, str) or not title.strip():
        die('the results need a "title"')
    parts = [("results", "Results", tables(results)), ("curves", "Training", curves(results)),
             ("rewrites", "Rewrites", rewrites(results, root)),
             ("queries", "Queries", queries(results, root)), ("samples", "Samples", samples(results, root)),
             ("steps", "What ran", steps(results))]
    parts = [part for part in parts if part[2]]
    notes = [words("li", note) for note in get(results, "notes", list)]
    machine = get(results, "machine", dict).items()
    machine = [tag("div", words("dt", name), words("dd", value)) for name, value in machine]
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in parts]
    return document(title, tag(
        "header", words("h1", title), *(words("p", text) for text in get(results, "summary", list)),
        tag("aside", tag("h2", "Please note"), tag("ul", *notes), class_="notes") if notes else "",
        tag("dl", *machine, class_="machine") if machine else "",
        tag("nav", tag("ul", *links), aria_label="Sections") if links else "",
    ), tag("main", *(tag("section", tag("h2", name), *content, id=key) for key, name, content in parts)))


# ---- rows: what the stages made of a data set

def parse_row(line) -> dict:
    """The line's object; of a line that is none, what the stages write for it (data/README.md)."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        reason = "not a JSON object"
    except (ValueError, RecursionError) as error:
        row, reason = None, f"not JSON: {error}"
    text = line.rstrip(b"\n").decode("utf-8", "backslashreplace")
    return row if isinstance(row, dict) else {"error": {"line": reason}, "line": text}


def as_list(value) -> list:
    return value if isinstance(value, list) and value else [value]


def errors_of(row) -> dict:
    """{field: reason or list of reasons}; a user's own `error` that is no object is one of the other keys."""
    return row["error"] if isinstance(row.get("error"), dict) else {}


def count_row(row, fields, nulls, reasons):
    fields.update(row.keys())
    nulls.update([field for field, value in row.items() if None in as_list(value)])
    for field, reason in errors_of(row).items():  # what follows a reason's colon is of this row: a path, a position
        reasons.update(sorted({(field, text_of(kind).split(":")[0]) for kind in as_list(reason) if kind is not None}))
    for counter, others in (fields, "all others"), (nulls, "all others"), (reasons, ("all others", "other reasons")):
        if len(counter) > 2 * KINDS:  # memory must not grow with the rows, whatever they hold
            for key, number in counter.most_common()[KINDS:]:
                del counter[key]
                counter[others] += number


def count_table(fields, nulls, reasons) -> Html:
    """A line a field: the rows that have it, that have a null in it, and that failed, by reason."""
    totals = Counter()
    for (_, kind), number in reasons.items():
        totals[kind] += number
    kinds = [kind for kind, _ in totals.most_common()]
    names = [name for name in dict.fromkeys([*fields, *(field for field, _ in reasons)]) if name != "error"]
    body = [[name, *(f"{number:,}" if number else None for number in (
        fields[name], nulls[name], *(reasons[name, kind] for kind in kinds)))] for name in names]
    return tables({"tables": [{"columns": ["field", "rows", "null", *kinds], "rows": body}]})[0]


def read_rows(path, limit, sample, seed):
    """One pass. -> [(line number, row)] of the first `limit` or of `sample` drawn ones, the number of rows, and
    Counters of the rows that have a field, a null in it, a reason why."""
    shown, number, counters = [], 0, (Counter(), Counter(), Counter())
    size, random_below = limit if sample is None else sample, random.Random(seed).randrange
    try:
        with open(path, "rb") as file:
            if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                die(f"{path} is UTF-16; expected UTF-8")
            for number, line in enumerate(tqdm(file, unit=" rows", unit_scale=True, disable=None, delay=2), 1):
                row = parse_row(line)
                count_row(row, *counters)
                if len(shown) < size:
                    shown.append((number, row))
                elif sample and (place := random_below(number)) < size:  # a reservoir: all rows alike
                    shown[place] = number, row
    except OSError as error:
        die(f"cannot read {path}: {error.strerror}")
    return sorted(shown), number or die(f"{path} has no rows"), counters


def entry(text, reason) -> Html:
    """A caption, or that there is none and why."""
    if text is None:
        return because("failed", reason) if reason is not None else tag("p", "null", class_="failed")
    said = words("p", text)
    return said if reason is None else tag("div", said, because("failed", reason))


def row_card(root, number, row) -> Html:
    """A row: its caption fields and what failed in sight, the user's keys folded."""
    errors = errors_of(row)
    names = ["alt", *(key for key in row if key.startswith("rewrite_")), "vec", "vecap", "label", *errors]
    names = [name for name in dict.fromkeys(names) if name in row or name in errors]
    pairs = []
    for name in names:
        entries = [entry(*both) for both in zip_longest(as_list(row.get(name)), as_list(errors.get(name)))]
        if len(entries) > MANY:
            entries[MANY:] = [tag("p", f"… {len(entries):,} entries", class_="soft")]
        said = entries[0] if len(entries) == 1 else tag("ol", *(tag("li", each) for each in entries))
        pairs.append((name.removeprefix("rewrite_"), tag("dd", said)))
    others = {key: row[key] for key in row if key not in names and not (key == "error" and errors)}
    image = others.pop("image", None)
    shown = "" if "line" in errors else picture(root, image, as_list(row.get("alt"))[0])
    folded = tag("details", tag("summary", f"other keys ({len(others)})"), words("code", others))
    return card(shown, f"line {number:,}" + (f" · {text_of(image)}" if image else ""), pairs, folded if others else "")


def rows(path, root, limit, sample, seed) -> str:
    shown, total, counters = read_rows(path, limit, sample, seed)
    how = "from the top" if sample is None else f"drawn with seed {seed}"
    counted = tag("summary", f"{len(shown):,} of {total:,} rows, {how}. How many rows have what:")
    return document(title := f"Rows of {os.path.basename(path)}", tag("header", words("h1", title)), tag(
        "main", tag("details", counted, count_table(*counters), open=""),
        tag("ul", *(row_card(root, *numbered) for numbered in shown), class_="cards rows")))


# ---- hits: what eval_retrieval.py found

def kind_of(row) -> str:
    """hit: the first picture is right; miss: it is not; other: nobody knows what is."""
    if "truth" not in row or row.get("average_precision", 0) is None:  # null: the only picture of its label
        return "other"
    return "hit" if any(hit.get("correct") for hit in get(row, "hits", list, dict)[:1]) else "miss"


def hit_block(root, number, row) -> Html:
    """A query, a text or a picture, with what it found; of a miss also the right picture and its place."""
    hits, kind = get(row, "hits", list, dict), kind_of(row)
    place, precision = row.get("rank"), row.get("average_precision")
    about = [f"query {number:,}"]
    if "rank" in row:
        about += [f"right at place {place:,}" if is_number(place) else "the right picture could not be read"]
    elif "truth" in row:
        about += ["label: " + text_of(row["truth"])]
    if is_number(precision):
        about += [f"average precision {precision:.3f}"]
    figures = [hit_figure(root, hit) for hit in hits]
    if kind == "miss" and "rank" in row and not any(hit.get("correct") for hit in hits):
        figures.append(hit_figure(root, {"image": row["truth"], "score": "right"}, "wanted"))
    query = words("h3", row["query"]) if "query" in row else picture(root, row.get("image"), row.get("truth"))
    return tag("article", query, words("p", " · ".join(about), class_="soft"), tag("div", *figures, class_="hits"),
               class_=f"block query {kind}", tabindex=0)


def hits(path, root, limit, sample, seed) -> str:
    shown, total, _ = read_rows(path, limit, sample, seed)
    how = "from the top" if sample is None else f"drawn with seed {seed}"
    blocks = [hit_block(root, *numbered) for numbered in shown]
    kinds, choices = Counter(kind_of(row) for _, row in shown), []
    for key, name, number in (("all", "all", len(shown)), ("hits", "right at once", kinds["hit"]), ("misses", "not", kinds["miss"])):
        checked = {"checked": ""} if key == "all" else {}  # radio buttons: arrow keys and thumbs move them, CSS does the rest
        choices.append(tag("label", tag("input", type="radio", name="show", id=f"show-{key}", **checked), f" {name}: {number:,}"))
    return document(title := f"Hits of {os.path.basename(path)}", tag(
        "header", words("h1", title), tag("p", f"{len(shown):,} of {total:,} queries, {how}: the nearest pictures, best "
                                          "first, with scores. ✓ and a frame: correct.", class_="soft")),
        tag("main", tag("fieldset", *choices, class_="filter", aria_label="show"), *blocks))


# ---- files

def document(title, *body) -> str:
    return DOCUMENT.format(title=tag("title", title), style=STYLE, body="\n".join(body))


def read_json(path) -> dict:
    try:
        with open(path, encoding="utf-8-sig") as file:
            results = json.load(file)
    except OSError as error:
        die(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        die(f"{path} is not a JSON file: {error}")
    return results if isinstance(results, dict) else die(f"{path} has to hold one JSON object")


def write(path, page):
    """All of the page or nothing: to a temporary name beside it, then renamed."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(page)
        os.replace(partial, path)
    except OSError as error:
        if os.path.exists(partial):
            os.remove(partial)
        die(f"cannot write {path}: {error.strerror}")


def count(text) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser("report", help="the tables, curves and examples of a results file")
    command.add_argument("input", metavar="RESULTS.json", help="what to show")
    command.set_defaults(render=lambda args, root: report(read_json(args.input), root))
    for page, about, metavar, what in (
            (rows, "pictures beside their captions, and why one has none", "ROWS.jsonl", "any stage's rows"),
            (hits, "queries with the pictures that they found", "HITS.jsonl", "what eval_retrieval.py --hits wrote")):
        command = commands.add_parser(page.__name__, help=about)
        command.add_argument("input", metavar=metavar, help=f"{what}; all are read, few are held")
        which = command.add_mutually_exclusive_group()
        which.add_argument("--limit", type=count, default=200, metavar="N", help="show the first N (default: %(default)s)")
        which.add_argument("--sample", type=count, metavar="N", help="show N drawn ones instead (default: off)")
        command.add_argument("--seed", type=count, default=0, help="of the draw (default: %(default)s)")
        command.set_defaults(render=lambda args, root, page=page: page(args.input, root, args.limit, args.sample, args.seed))
    for command in commands.choices.values():
        command.add_argument("output", metavar="OUT.html", help="the page to write; replaced if it exists")
        command.add_argument("--image-root", required=True, metavar="DIR",
                             help="the folder of the pictures; nothing outside it is opened")
        command.error = die
    parser.error = die
    args = parser.parse_args(argv)

    root = os.path.realpath(args.image_root)
    if not os.path.isdir(root):
        die(f"--image-root {args.image_root} is not a folder")
    if os.path.exists(args.output) and os.path.realpath(args.output) == os.path.realpath(args.input):
        die(f"{args.output} is the input")
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # a picture over 89 Mpx is not decoded
    write(args.output, args.render(args, root))


if __name__ == "__main__":
    main()
