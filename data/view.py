"""Write one self-contained HTML page of rows or of hits. It opens anywhere, offline, and makes no request.

    python -m data.view rows filtered.jsonl rows.html --image-root DIR --sample 100
    python -m data.view hits hits.jsonl gallery.html --image-root DIR

`rows` shows each image beside its AltText and what the stages made of it, or why they made nothing. `hits`
shows the queries of eval_retrieval.py --hits with the images that they found.

Captions come from the web, so all text is hostile here. Three rules keep the page safe. Markup is made only
by tag(), which escapes whatever is not markup already. An image is opened only inside --image-root and is
encoded anew. Should these two ever fail, the page's Content-Security-Policy forbids scripts and requests.
"""
import base64
import functools
import html
import io
import json
import os
import random
import re
import warnings
from collections import Counter
from itertools import zip_longest

from PIL import Image
from data.common import die, new_parser, number, open_rows, parse_row, progress
from train_clip import open_image, to_rgb

THUMBNAIL = 96  # px, the longer side
LONG = 1000  # characters; of a longer text the page shows the beginning and the length
MANY = 20  # entries of a list; of a longer list the page shows the beginning and the length
KINDS = 100  # field names and reasons that are counted one by one, the commonest first
FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")  # not all of Pillow's: EPS runs Ghostscript
# Every character that is not printable, a tab or a line break: C0 and C1 controls, lone surrogates
UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")

STYLE = """
:root { color-scheme: light dark; --back: #fafaf8; --card: #fff; --ink: #1c1d1f; --soft: #5b6067;
  --line: #e2e2dd; --link: #1f5fbf; --good: #14734a; --note: #fbf4e2; --edge: #b98516; --warn: #a3401a }
@media (prefers-color-scheme: dark) { :root { --back: #131416; --card: #1b1d20; --ink: #e7e7e4;
  --soft: #a2a7ae; --line: #303338; --link: #84b1f5; --good: #5fca96; --note: #29241a; --edge: #d0a144;
  --warn: #f0a07a } }
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

.block + .block { margin-top: 2rem } .block h3 { margin-bottom: .3rem }

.scroll { overflow-x: auto; margin: .75rem 0 }
table { border-spacing: 0; font-variant-numeric: tabular-nums; min-width: min(100%, 30rem) }
th, td { padding: .5rem .9rem; line-height: 1.5; text-align: right; border-bottom: 1px solid var(--line);
  overflow-wrap: normal } td { white-space: nowrap }
th:first-child { position: sticky; left: 0; background: var(--back); text-align: left; padding-left: 0;
  min-width: 9.5rem; max-width: 45vw; overflow-wrap: anywhere; font-weight: 500 }
thead th { border-color: var(--soft); color: var(--soft); font-size: .875rem; font-weight: 500;
  vertical-align: bottom }

dt { color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1rem }
.card { display: flex; gap: 1rem; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px } .card > div { flex: 1; min-width: 0 } .card h3 { margin-bottom: .5rem }
.card dl > div { display: grid; grid-template-columns: 6rem 1fr; gap: 0 .75rem; padding: .3rem 0;
  font-size: .93rem }
.card { contain: paint } /* piled-up accents stay inside */
.card p { margin: 0 } .card p + p { font-size: .9em } .card .image { object-position: top }
.image { display: block; width: 6rem; height: 6rem; flex: none; border-radius: 4px; object-fit: contain }
.failed { color: var(--warn) } .card ol { list-style: decimal; padding-left: 1.4rem }
.rows { align-items: start; margin-top: 2rem } .rows dl > div { grid-template-columns: 4.5rem 1fr }
.rows h3, .rows summary { color: var(--soft); font-size: .85rem; font-weight: 400 }
summary { cursor: pointer }
.none { border: 1px dashed var(--soft); color: var(--soft); padding: .3rem; overflow: hidden;
  font-size: .72rem; line-height: 1.3 }

.hits { display: grid; grid-template-columns: repeat(5, minmax(0, 6.75rem)); gap: .5rem }
.hits figure { border: 2px solid transparent; border-radius: 8px; padding: .25rem }
.hits .image { width: 100%; height: auto; aspect-ratio: 1 }
figcaption { text-align: center; white-space: nowrap; overflow: hidden; font-size: .8rem; color: var(--soft) }
.hits .correct { border-color: var(--good) } .correct figcaption { color: var(--good); font-weight: 600 }
.hits .wanted { border: 2px dashed var(--edge) }
.filter { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem;
  padding: .6rem 0; border: 0; margin: 0; background: var(--back); border-bottom: 1px solid var(--line) }
.filter + .query { margin-top: 1.25rem } .filter label { padding: .35rem 0; cursor: pointer }
.query > .image { margin: .5rem 0 }
main:has(#show-hits:checked) .miss, main:has(#show-misses:checked) .hit { display: none }

details code { color: var(--soft); white-space: pre-wrap } figcaption { font-variant-numeric: tabular-nums }

@media (max-width: 40rem) { header { padding-top: 1.75rem }
  .card dl > div { grid-template-columns: 1fr }
  .card .image { width: 4.5rem; height: 4.5rem } .card .none { height: auto; align-self: start }
  .hits { gap: .25rem } .hits figure { padding: .1rem } figcaption { font-size: .72rem } }
@media print { :root { --back: #fff } body { font-size: 10pt }
  h2, h3, p.soft { break-after: avoid }
  .card, tr { break-inside: avoid } .scroll { overflow: visible } }
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


# === markup: text becomes HTML here and nowhere else ========================================================

class Html(str):
    """Text that is markup already. Nothing that is read from a file has this type."""


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
    """An element for text from outside. dir="auto" isolates it: a right-to-left override ends with it."""
    text = "–" if value is None else text_of(value)
    shown = [text]
    if len(text) > LONG and not isinstance(text, Html):
        shown = [tag("bdi", text[:LONG]), tag("span", f" … cut, {len(text):,} characters", class_="soft")]
    return tag(name, *shown, dir="auto", **attributes)


def get(node, key, kind, each=object):
    """The list or object node[key], empty if absent or null. If it or an entry has another type: a user's
    mistake."""
    value = node.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind) or not all(isinstance(entry, each) for entry in value):
        die(f'"{key}" has to be a {kind.__name__}' + ("" if each is object else f" of {each.__name__}s"))
    return value


def is_number(value) -> bool:
    """Finite and no bool (JSON's true is an int in Python); the comparison is false for NaN and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


# === images and the parts of a page =========================================================================

@functools.lru_cache(maxsize=1024)  # the same image answers several queries
def thumbnail(root, name) -> str:
    """The image `name` inside `root` as a data URI. Raises ValueError with the reason if there is none."""
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
    except Exception as error:  # Pillow raises nearly everything; one damaged file must not cost the page
        reason = getattr(error, "strerror", None) or re.sub(" <_io.*", "", str(error))  # no memory address
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
        return words("span", f"no image: {reason}", class_="image none", title=text_of(name or "")[:LONG])


def block(node, *children) -> Html:
    """A part of a section, under its title and note if it has them."""
    return tag("div", words("h3", node["title"]) if node.get("title") else "",
               words("p", node["note"], class_="soft") if node.get("note") else "", *children, class_="block")


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
    """An image beside a heading, (name, element) pairs and further elements. Image and heading may be ""."""
    listed = tag("dl", *(tag("div", words("dt", name), value) for name, value in pairs))
    return tag("li", shown, tag("div", words("h3", heading) if heading else "", listed, *more), class_="card")


def because(failure, reason) -> Html:
    return words("p", f"{failure}: {text_of(reason or 'no reason given')}", class_="failed")


def hit_figure(root, hit, kind="") -> Html:
    """An image that a query found, with its score. ✓ and a frame: correct."""
    score = f"{hit['score']:.3f}" if is_number(hit.get("score")) else hit.get("score", "")
    caption = tag("figcaption", "✓ " if hit.get("correct") else "", tag("bdi", score))
    return tag("figure", image_element(root, hit.get("image"), hit.get("alt", hit.get("image"))), caption,
               class_=kind or ("correct" if hit.get("correct") else "other"))


# === rows: what the stages made of a data set ===============================================================

def as_list(value) -> list:
    return value if isinstance(value, list) and value else [value]


def errors_of(row) -> dict:
    """{field: reason or list of reasons}. A user's own `error` that is no object counts as any other key."""
    return row["error"] if isinstance(row.get("error"), dict) else {}


def count_row(row, fields, nulls, reasons):
    fields.update(row.keys())
    nulls.update([field for field, value in row.items() if None in as_list(value)])
    for field, reason in errors_of(row).items():
        texts = [text_of(entry) for entry in as_list(reason) if entry is not None]
        # What follows the colon belongs to this row: a path, a position
        reasons.update(sorted({(field, text.split(":")[0]) for text in texts}))
    rest = "all others"
    for counter, others in (fields, rest), (nulls, rest), (reasons, (rest, "other reasons")):
        if len(counter) > 2 * KINDS:  # memory must not grow with the rows, whatever they hold
            for key, number in counter.most_common()[KINDS:]:
                del counter[key]
                counter[others] += number


def count_table(fields, nulls, reasons) -> Html:
    """For each field the number of rows that have it, that have a null in it, and that failed, by reason."""
    totals = Counter()
    for (_, kind), number in reasons.items():
        totals[kind] += number
    kinds = [kind for kind, _ in totals.most_common()]
    names = [name for name in dict.fromkeys([*fields, *(field for field, _ in reasons)]) if name != "error"]
    body = [[name, *(f"{number:,}" if number else None for number in (
        fields[name], nulls[name], *(reasons[name, kind] for kind in kinds)))] for name in names]
    return table({"columns": ["field", "rows", "null", *kinds], "rows": body})


def read_rows(path, limit, sample, seed):
    """One pass over all rows. -> [(line number, row)] of the first `limit` or of `sample` drawn rows, the
    number of all rows, and Counters of the rows that have a field, a null in it, a reason for a failure."""
    shown, line_number, counters = [], 0, (Counter(), Counter(), Counter())
    size, random_below = limit if sample is None else sample, random.Random(seed).randrange
    with open_rows(path) as file:
        for line_number, line in enumerate(progress(file), 1):
            row, _ = parse_row(line)
            count_row(row, *counters)
            if len(shown) < size:
                shown.append((line_number, row))
            elif sample and (place := random_below(line_number)) < size:  # a reservoir: equal chances
                shown[place] = line_number, row
    if not line_number:
        die(f"{path} has no rows")
    return sorted(shown), line_number, counters


def entry(text, reason) -> Html:
    """A caption, or a line that there is none and why"""
    if text is None:
        return because("failed", reason) if reason is not None else tag("p", "null", class_="failed")
    said = words("p", text)
    return said if reason is None else tag("div", said, because("failed", reason))


def row_card(root, line_number, row) -> Html:
    """A row. Its caption fields and failures are in sight, the user's other keys folded."""
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
    shown = "" if "line" in errors else image_element(root, image, as_list(row.get("alt"))[0])
    folded = tag("details", tag("summary", f"other keys ({len(others)})"), words("code", others))
    heading = f"line {line_number:,}" + (f" · {text_of(image)}" if image else "")
    return card(shown, heading, pairs, folded if others else "")


def rows(path, root, limit, sample, seed) -> str:
    shown, total, counters = read_rows(path, limit, sample, seed)
    which = "from the top" if sample is None else f"drawn with seed {seed}"
    counted = tag("summary", f"{len(shown):,} of {total:,} rows, {which}. How many rows have which field:")
    title = f"Rows of {os.path.basename(path)}"
    return document(title, tag("header", words("h1", title)), tag(
        "main", tag("details", counted, count_table(*counters), open=""),
        tag("ul", *(row_card(root, *numbered) for numbered in shown), class_="cards rows")))


# === hits: what eval_retrieval.py found =====================================================================

def kind_of(row) -> str:
    """hit: the first image is right; miss: it is not; other: no image is known to be right"""
    if "truth" not in row or row.get("average_precision", 0) is None:  # null: the only image of its label
        return "other"
    return "hit" if any(hit.get("correct") for hit in get(row, "hits", list, dict)[:1]) else "miss"


def hit_block(root, line_number, row) -> Html:
    """A query (a text or an image) with its best images. After a miss the right image follows."""
    best, kind = get(row, "hits", list, dict), kind_of(row)
    place, precision = row.get("rank"), row.get("average_precision")
    about = [f"query {line_number:,}"]
    if "rank" in row:
        about += [f"right at place {place:,}" if is_number(place) else "the right image could not be read"]
    elif "truth" in row:
        about += ["label: " + text_of(row["truth"])]
    if is_number(precision):
        about += [f"average precision {precision:.3f}"]
    figures = [hit_figure(root, hit) for hit in best]
    if kind == "miss" and "rank" in row and not any(hit.get("correct") for hit in best):
        figures.append(hit_figure(root, {"image": row["truth"], "score": "right"}, "wanted"))
    if "query" in row:
        query = words("h3", row["query"])
    else:
        query = image_element(root, row.get("image"), row.get("truth"))
    return tag("article", query, words("p", " · ".join(about), class_="soft"),
               tag("div", *figures, class_="hits"), class_=f"block query {kind}", tabindex=0)


def hits(path, root, limit, sample, seed) -> str:
    shown, total, _ = read_rows(path, limit, sample, seed)
    which = "from the top" if sample is None else f"drawn with seed {seed}"
    blocks = [hit_block(root, *numbered) for numbered in shown]
    kinds, choices = Counter(kind_of(row) for _, row in shown), []
    for key, name, count in (("all", "all", len(shown)), ("hits", "first image right", kinds["hit"]),
                             ("misses", "first image wrong", kinds["miss"])):
        checked = {"checked": ""} if key == "all" else {}  # radio buttons; the CSS hides what is not chosen
        button = tag("input", type="radio", name="show", id=f"show-{key}", **checked)
        choices.append(tag("label", button, f" {name}: {count:,}"))
    title = f"Hits of {os.path.basename(path)}"
    about = (f"{len(shown):,} of {total:,} queries, {which}. The nearest images, best first, with scores. "
             "✓ and a frame: correct.")
    return document(title, tag("header", words("h1", title), tag("p", about, class_="soft")),
                    tag("main", tag("fieldset", *choices, class_="filter", aria_label="show"), *blocks))


# === files ==================================================================================================

def document(title, *body, style="") -> str:
    """The page; `style` is added to STYLE"""
    return DOCUMENT.format(title=tag("title", title), style=STYLE + style, body="\n".join(body))


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


def add_page_options(parser):
    parser.add_argument("output", metavar="OUT.html", help="the page to write; replaced if it exists")
    parser.add_argument("--image-root", required=True, metavar="DIR",
                        help="the folder of the images; nothing outside it is opened")
    parser.error = die


def image_root(args):
    """--image-root with its links resolved. Also the checks that every page needs"""
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root} is not a folder")
    if os.path.exists(args.output) and os.path.realpath(args.output) == os.path.realpath(args.input):
        die(f"{args.output} is the input")
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # an image of over 89 Mpx is not decoded
    return os.path.realpath(args.image_root)


def main(argv=None):
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for page, about, metavar, source in (
            (rows, "images beside their captions, and why one is missing", "ROWS.jsonl", "any stage's rows"),
            (hits, "queries with the images that they found", "HITS.jsonl", "the file of --hits")):
        command = commands.add_parser(page.__name__, help=about)
        command.add_argument("input", metavar=metavar, help=f"{source}; all are read, few are held")
        which = command.add_mutually_exclusive_group()
        which.add_argument("--limit", type=number(int, 0), default=200, metavar="N",
                           help="show the first N (default: %(default)s)")
        which.add_argument("--sample", type=number(int, 0), metavar="N",
                           help="show N drawn ones instead (default: off)")
        command.add_argument("--seed", type=number(int, 0), default=0, help="of the draw (default: 0)")
        command.set_defaults(page=page)
        add_page_options(command)
    args = parser.parse_args(argv)
    write(args.output, args.page(args.input, image_root(args), args.limit, args.sample, args.seed))


if __name__ == "__main__":
    main()
