"""Write one self-contained HTML page of rows or of hits. It opens anywhere, offline.

    python -m data.view rows filtered.jsonl rows.html --image-root DIR --sample 100
    python -m data.view hits hits.jsonl gallery.html --image-root DIR

`rows` shows each image beside its AltText and what the stages made of it, or why they made nothing.
`hits` shows the queries of eval_retrieval.py --hits with the images that they found.
"""
import os
import random
from collections import Counter
from itertools import zip_longest

from data.common import die, in_one_line, new_parser, number, progress
from data.page import (Html, add_page_options, because, card, document, get, hit_figure,
                       image_element, image_root, is_number, table, tag, text_of, words, write)
from data.rows import open_rows, parse_row

MANY = 20  # entries of a list; of a longer list the page shows the beginning and the length
KINDS = 100  # field names and reasons that are counted one by one, the commonest first


# === rows: what the stages made of a data set =====================================================

def as_list(value) -> list:
    return value if isinstance(value, list) and value else [value]


def errors_of(row) -> dict:
    """{field: reason or list of reasons}. A user's own `error` that is no object is another key."""
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
    """For each field how many rows have it, have a null in it, and failed, by reason."""
    totals = Counter()
    for (_, kind), number in reasons.items():
        totals[kind] += number
    kinds = [kind for kind, _ in totals.most_common()]
    names = dict.fromkeys([*fields, *(field for field, _ in reasons)])
    names.pop("error", None)
    body = [[name, *(f"{number:,}" if number else None for number in (
        fields[name], nulls[name], *(reasons[name, kind] for kind in kinds)))] for name in names]
    return table({"columns": ["field", "rows", "null", *kinds], "rows": body})


def read_rows(path, limit, sample, seed):
    """One pass over all rows. -> [(line number, row)] of the first `limit` or `sample` drawn rows,
    the number of all rows, and Counters of the rows that have a field, a null in it, a reason for a
    failure."""
    shown, line_number, counters = [], 0, (Counter(), Counter(), Counter())
    size, random_below = limit if sample is None else sample, random.Random(seed).randrange
    with open_rows(path) as file:
        for line_number, line in enumerate(progress(file), 1):
            row, _ = parse_row(line)
            count_row(row, *counters)
            if len(shown) < size:
                shown.append((line_number, row))
            elif sample:  # a reservoir: equal chances
                place = random_below(line_number)
                if place < size:
                    shown[place] = line_number, row
    if not line_number:
        die(f"{path} has no rows")
    return sorted(shown), line_number, counters


def entry(text, reason) -> Html:
    """A caption, or a line that there is none and why"""
    if text is None:
        return tag("p", "null", class_="failed") if reason is None else because("failed", reason)
    said = words("p", text)
    return said if reason is None else tag("div", said, because("failed", reason))


def row_card(root, line_number, row) -> Html:
    """A row. Its caption fields and failures are in sight, the user's other keys folded."""
    errors = errors_of(row)
    rewrites = [key for key in row if key.startswith("rewrite_")]
    names = dict.fromkeys(["alt", *rewrites, "vec", "vecap", "label", *errors])
    names = [name for name in names if name in row or name in errors]
    pairs = []
    for name in names:
        both = zip_longest(as_list(row.get(name)), as_list(errors.get(name)))
        entries = [entry(text, reason) for text, reason in both]
        if len(entries) > MANY:
            entries[MANY:] = [tag("p", f"… {len(entries):,} entries", class_="soft")]
        said = entries[0]
        if len(entries) > 1:
            said = tag("ol", *(tag("li", each) for each in entries))
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
    about = f"{len(shown):,} of {total:,} rows, {which}. How many rows have which field:"
    counted = tag("summary", about)
    title = f"Rows of {os.path.basename(path)}"
    return document(title, tag("header", words("h1", title)), tag(
        "main", tag("details", counted, count_table(*counters), open=""),
        tag("ul", *(row_card(root, *numbered) for numbered in shown), class_="cards rows")))


# === hits: what eval_retrieval.py found ===========================================================

def kind_of(row) -> str:
    """hit: the first image is right; miss: it is not; other: no image is known to be right"""
    alone = row.get("average_precision", 0) is None  # the only image of its label
    if "truth" not in row or alone:
        return "other"
    return "hit" if any(hit.get("correct") for hit in get(row, "hits", list, dict)[:1]) else "miss"


def hit_block(root, line_number, row) -> Html:
    """A query (a text or an image) with its best images. After a miss the right image follows."""
    best, kind = get(row, "hits", list, dict), kind_of(row)
    place, precision = row.get("rank"), row.get("average_precision")
    about = [f"query {line_number:,}"]
    if "rank" in row:
        unread = "the right image could not be read"
        about += [f"right at place {place:,}" if is_number(place) else unread]
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
    for key, name, count in (("all", "all", len(shown)),
                             ("hits", "first image right", kinds["hit"]),
                             ("misses", "first image wrong", kinds["miss"])):
        checked = {"checked": ""} if key == "all" else {}  # the CSS hides what is not chosen
        button = tag("input", type="radio", name="show", id=f"show-{key}", **checked)
        choices.append(tag("label", button, f" {name}: {count:,}"))
    choices = tag("fieldset", *choices, class_="filter", aria_label="show")
    title = f"Hits of {os.path.basename(path)}"
    about = (f"{len(shown):,} of {total:,} queries, {which}. The nearest images, best first, with "
             "scores. ✓ and a frame: correct.")
    return document(title, tag("header", words("h1", title), tag("p", about, class_="soft")),
                    tag("main", choices, *blocks))


# === the command ==================================================================================


@in_one_line
def main(argv=None):
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for page, about, metavar, source in (
            (rows, "images beside their captions, and why one is missing", "ROWS.jsonl",
             "any stage's rows"),
            (hits, "queries with the images that they found", "HITS.jsonl", "the file of --hits")):
        command = commands.add_parser(page.__name__, help=about)
        command.add_argument("input", metavar=metavar, help=f"{source}; all are read, few are held")
        which = command.add_mutually_exclusive_group()
        which.add_argument("--limit", type=number(int, 0), default=200, metavar="N",
                           help="show the first N (default: %(default)s)")
        which.add_argument("--sample", type=number(int, 0), metavar="N",
                           help="show N drawn ones instead (default: off)")
        command.add_argument("--seed", type=number(int, 0), default=0,
                             help="of the draw (default: 0)")
        command.set_defaults(page=page)
        add_page_options(command)
    args = parser.parse_args(argv)
    write(args.output, args.page(args.input, image_root(args), args.limit, args.sample, args.seed))


if __name__ == "__main__":
    main()
