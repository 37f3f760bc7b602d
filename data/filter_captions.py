"""Drop unusable rewrites by plain rules: JSONL in, JSONL out, one row for every row.

    python data/filter_captions.py rewritten.jsonl filtered.jsonl --field alt
    python eval_retrieval.py --checkpoint clip.pt --captions filtered.jsonl --image-root DIR --score scored.jsonl
    python data/filter_captions.py scored.jsonl best.jsonl --min-score 0.2         # by how well they fit the image, too

A rewrite (every rewrite_* field, or those of --fields) that breaks a rule becomes null and the rule's name goes to the
row's "error"; the texts themselves are never changed. LLaMA-7B's rewrites were used unfiltered in the paper; those of a
small model need it, and whether it helps is an experiment: train on either file. The rules, in this order:

  identical    the same words as the original
  short        under --min-words words
  long         over --max-words words
  repeats      two words occur twice, side by side and in the same order ("a red cap on a red cap")
  unrelated    no content word of the original is left (words of three letters or more that are no stop word)
  score        its clip_score is under --min-score, or less than --min-gain above its original's; "unscored" has none
"""
import json
import os
import re
import sys
from collections import Counter
from functools import partial

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from train_clip import (NO_BLANKS, BadRow, check_output, die, new_parser, number, open_rows, parse_row,  # noqa: E402
                        texts_of, words_of)

STOP_WORDS = frozenset("""a about above after all also am an and any are as at be been before being below between both but by
can did do does doing down during each few for from further had has have having he her here hers him his how i if in into
is it its itself just me more most my no nor not now of off on once only or other our out over own same she should so some
such than that the their them then there these they this those through to too under until up very was we were what when
where which while who whom why will with you your""".split())


def plain_words(text):
    """The text's words, in lower case and without the punctuation around them"""
    return [re.sub(r"^\W+|\W+$", "", word) for word in words_of(text.lower())]


def content_words(words):
    """Words that carry meaning, a plural s aside; of scripts without blanks none, since where words begin there is unknown."""
    return {word.rstrip("s") if len(word) > 3 else word for word in words
            if len(word) > 2 and word not in STOP_WORDS and not NO_BLANKS.search(word)}


def broken_rule(original, rewrite, before, after, args):
    """The name of the first rule that a rewrite breaks, or None. original: None if it has none; before, after: the clip_score
    of either, None if it has none."""
    old, new = plain_words(original or ""), plain_words(rewrite)
    if old == new:
        return "identical"
    if len(new) < args.min_words:
        return "short"
    if len(new) > args.max_words:
        return "long"
    pairs = Counter(zip(new, new[1:]))
    if pairs and max(pairs.values()) > 1:
        return "repeats"
    kept = content_words(old)
    if kept and not kept & content_words(new):
        return "unrelated"
    bounds = [(low, base) for low, base in ((args.min_score, 0), (args.min_gain, before)) if low is not None]
    if bounds and None in (after, *(base for _, base in bounds)):
        return "unscored"
    if any(not after >= base + low for low, base in bounds):  # nor is NaN
        return "score"
    return None


def as_list(value, n):
    """n entries: a list of that length as it is, one value n times; a list of another length has no entries that fit."""
    if not isinstance(value, list):
        return [value] * n
    return value if len(value) == n else [None] * n


def filter_row(row, field, fields, rule):
    """Apply rule(original, rewrite, original's score, rewrite's score) to every rewrite of a row, in place; a score is
    None where there is none. -> Counter of (field, rule's name or "kept")"""
    counts, scores = Counter(), row.get("clip_score")
    scores = scores if isinstance(scores, dict) else {}
    for name in fields or [key for key in row if key.startswith("rewrite_")]:
        value = row.get(name)
        texts = value if isinstance(value, list) else [value]
        entries = zip(*(as_list(v, len(texts)) for v in (row.get(field), texts, scores.get(field), scores.get(name))))
        reasons = [rule(a if isinstance(a, str) else None, b, *(x if isinstance(x, (int, float)) else None for x in scored))
                   if isinstance(b, str) else None for a, b, *scored in entries]
        counts.update((name, reason or "kept") for reason, text in zip(reasons, texts) if text is not None)
        if any(reasons):
            texts = [None if reason else text for reason, text in zip(reasons, texts)]
            row[name] = texts if isinstance(value, list) else texts[0]
            earlier = row.get("error") or {}
            earlier = earlier if isinstance(earlier, dict) else {"row": earlier}  # the user's own: kept
            row["error"] = {**earlier, name: reasons if isinstance(value, list) else reasons[0]}
    return counts


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--field", default="alt", help="the original (default: %(default)s)")
    parser.add_argument("--fields", nargs="+", help="the rewrites (default: every rewrite_* field)")
    parser.add_argument("--min-words", type=number(int, 0), default=2, help="default: %(default)s")
    parser.add_argument("--max-words", type=number(int, 1), default=30, help="default: %(default)s")
    parser.add_argument("--min-score", type=number(float, -1), help="drop what has a lower clip_score (-1 to 1; default: off)")
    parser.add_argument("--min-gain", type=number(float, -2), metavar="X", help="drop what scores less than its original's clip_score + X; "
                        "0: as good or better (default: off)")
    args = parser.parse_args(argv)
    check_output(args.output, args.input)

    counts, rows, touched, originals = Counter(), 0, 0, 0
    temporary = f"{args.output}.{os.getpid()}.tmp"
    by_score = args.min_score is not None or args.min_gain is not None
    try:
        with open_rows(args.input) as f, open(temporary, "wb") as out:
            for line in f:
                rows += 1
                try:
                    row = parse_row(line)
                    found = filter_row(row, args.field, args.fields, partial(broken_rule, args=args))
                    originals += bool(texts_of(row.get(args.field)))
                    counts += found
                    if any(rule != "kept" for _, rule in found):
                        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
                        touched += 1
                except BadRow:  # goes through as it is
                    pass
                out.write(line.removesuffix(b"\n") + b"\n")
            for name in args.fields or []:
                if not any(field == name for field, _ in counts):
                    die(f"{args.input} has no text in {name}")
            if not counts:
                die(f"{args.input} has no rewrite in rewrite_*")
            if not originals:
                die(f"{args.input} has no original in {args.field}: --field names another one")
            if any(rule == "unscored" for _, rule in counts) and not any(rule in ("kept", "score") for _, rule in counts):
                die(f"{args.input} has no clip_score: eval_retrieval.py --score writes it")
        os.replace(temporary, args.output)
    except OSError as e:
        die(f"{e.filename or args.output}: {e.strerror}")
    finally:  # Ctrl-C, too
        if os.path.exists(temporary):
            os.remove(temporary)
    rules = ["kept", "identical", "short", "long", "repeats", "unrelated"] + by_score * ["score", "unscored"]

    names = sorted({name for name, _ in counts})
    print(f"{rows} rows, {touched} with something dropped")
    print(f"{'':24}" + "".join(f"{rule:>11}" for rule in rules))
    for name in names:
        print(f"{name:24}" + "".join(f"{counts[name, rule]:11d}" for rule in rules))


if __name__ == "__main__":
    main()
