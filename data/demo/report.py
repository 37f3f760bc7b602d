"""Write the demo's report: one self-contained HTML page of the tables, curves and examples of a
results file.

    python -m data.demo.report out/demo/results.json out/demo/report.html --image-root out/demo/images

`report` describes the results file. data/view.py makes the markup and keeps it safe.
"""
import json
import math

from data.common import die, new_parser
from data.page import (add_page_options, because, block, card, document, get, hit_figure,
                       image_element, image_root, is_number, table, tag, words, write)

DASHES = ("none", "9 4", "2 4", "12 4 2 4", "5 5", "16 5")  # one per series, for print without colour

REPORT_STYLE = """
:root { --s0: #1f5fbf; --s1: #c2410c; --s2: #14734a; --s3: #8b2fa8; --s4: #86660a; --s5: #4b5563 }
@media (prefers-color-scheme: dark) {
  :root { --s0: #84b1f5; --s1: #f5955f; --s2: #5fca96; --s3: #d294ea; --s4: #dcbc58; --s5: #b8bec8 } }
nav { margin-top: 1.5rem }
nav ul, .machine, .legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; font-size: .93rem }
.notes { background: var(--note); border-left: 3px solid var(--edge); border-radius: 4px;
  padding: .9rem 1.1rem; margin: 1.5rem 0; max-width: 72ch }
.notes h2 { font-size: 1rem; margin: 0 0 .3rem } .notes ul { list-style: disc; padding-left: 1.1rem }
.machine div { display: flex; gap: .45rem } dt { color: var(--soft) }

.chart > svg { display: block; width: 100%; height: auto } .chart text { font-size: 12px; fill: var(--soft) }
.grid { stroke: var(--line) } .chance { stroke: var(--soft); stroke-dasharray: 5 5; stroke-width: 1.5 }
.curve { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round }
.curve { stroke: var(--hue) } .dot { fill: var(--hue) }
.s0 { --hue: var(--s0) } .s1 { --hue: var(--s1) } .s2 { --hue: var(--s2) }
.s3 { --hue: var(--s3) } .s4 { --hue: var(--s4) } .s5 { --hue: var(--s5) }
.legend li { display: flex; align-items: center; gap: .5rem } .legend svg { flex: none }

.model { display: grid; grid-template-columns: 9rem 1fr; gap: .3rem 1rem; padding: .35rem 0;
  align-items: center }

.steps li { border-top: 1px solid var(--line); padding: .65rem 0 }
.steps code { color: var(--soft); white-space: pre-wrap }
.steps h3 { display: flex; justify-content: space-between; gap: 1rem; font-weight: 500 }
.time, .legend { font-variant-numeric: tabular-nums } .time { white-space: nowrap }

@media (max-width: 40rem) { .chart text { font-size: 22px } .model { grid-template-columns: 1fr } }
@media print { nav { display: none } .model, .chart, .steps li { break-inside: avoid } }
"""


def ticks(low, high, count=6) -> list:
    """-> round numbers that enclose low..high. Their step is 1, 2, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= (high - low) * 0.999)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def span(values) -> tuple:
    """-> (minimum, maximum) of the values, widened if the values are nearly the same."""
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high), 1) else (low, low + max(abs(low), 1))


def curves(results) -> list:
    """The losses as an SVG line chart. A dashed line marks the loss of a model that guesses."""
    node = get(results, "curves", dict)
    series = []
    for line in get(node, "series", list, dict):
        points = [point[:2] for point in get(line, "points", list, list) if len(point) > 1]
        points = [point for point in points if all(map(is_number, point))]  # drops a loss of null or NaN
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


def rewrites(results, root) -> list:
    cards = []
    for node in get(results, "rewrites", list, dict):
        pairs = []
        for text in get(node, "texts", list, dict):
            element = words("dd", text.get("text"))
            if text.get("text") is None or not text.get("kept", True):
                dropped = "no text" if text.get("text") is None else words("del", text["text"])
                element = tag("dd", tag("p", dropped), because("dropped", text.get("reason")), class_="soft")
            pairs.append((text.get("source"), element))
        cards.append(card(image_element(root, node.get("image"), node.get("alt")), node.get("alt"), pairs))
    about = "The original caption in bold; below it what each source made of it."
    return [tag("p", about, class_="soft"), tag("ul", *cards, class_="cards")] if cards else []


def queries(results, root) -> list:
    blocks = []
    for node in get(results, "queries", list, dict):
        models = []
        for row in get(node, "rows", list, dict):
            figures = [hit_figure(root, hit) for hit in get(row, "hits", list, dict)[:5]]
            hits = tag("div", *figures, class_="hits")
            models.append(tag("div", words("div", row.get("model")), hits, class_="model"))
        blocks.append(block({"title": node.get("query")}, *models))
    about = "The five nearest images of each model, best first, with scores. ✓ and a frame: correct."
    return [tag("p", about, class_="soft"), *blocks] if blocks else []


def samples(results, root) -> list:
    blocks = []
    for node in get(results, "samples", list, dict):
        cards = []
        for item in get(node, "items", list, dict):
            pairs = [(name, words("dd", text)) for name, text in get(item, "fields", dict).items()]
            image = item.get("image")
            cards.append(card("" if image is None else image_element(root, image, ""), "", pairs))
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
    if not rows:
        return []
    rows.append(tag("li", tag("h3", "Total", tag("span", duration(total), class_="time"))))
    return [tag("ol", *rows, class_="steps")]


def report(results, root) -> str:
    """The page of a results file. The file holds an object with these keys; only "title" is
    required.

    title: text            summary, notes: [text]            machine: {name: text}
    tables: [{title, note, columns: [text], rows: [[text or number]]}]      short rows are padded
    curves: {title, chance: ln(batch), series: [{name, points: [[step, loss]]}]}
    rewrites: [{image, alt, texts: [{source, text, kept: bool, reason}]}]
    queries: [{query, rows: [{model, hits: [{image, alt, score, correct: bool}]}]}]
    samples: [{title, note, items: [{image, fields: {name: text}}]}]
    steps: [{name, command, seconds, skipped: bool}]
    """
    title = results.get("title")
    if not isinstance(title, str) or not title.strip():
        die('the results need a "title"')
    tables = [table(node) for node in get(results, "tables", list, dict)]
    parts = [("results", "Results", tables), ("curves", "Training", curves(results)),
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
    ), tag("main", *(tag("section", tag("h2", name), *content, id=key) for key, name, content in parts)),
        style=REPORT_STYLE)


def read_json(path) -> dict:
    try:
        with open(path, encoding="utf-8-sig") as file:
            results = json.load(file)
    except OSError as error:
        die(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        die(f"{path} is not a JSON file: {error}")
    if not isinstance(results, dict):
        die(f"{path} has to hold one JSON object")
    return results


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("input", metavar="RESULTS.json", help="what to show")
    add_page_options(parser)
    args = parser.parse_args(argv)
    write(args.output, report(read_json(args.input), image_root(args)))


if __name__ == "__main__":
    main()
