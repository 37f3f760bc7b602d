"""Drop unusable rewrites by plain rules: JSONL in, JSONL out, one row for every row.

    python -m data.filter_captions rewritten.jsonl f.jsonl --field alt
    python -m data.clip_scores --checkpoint clip.pt --captions f.jsonl --image-root DIR \\
        --output s.jsonl
    python -m data.filter_captions s.jsonl best.jsonl --min-score 0.2       # also by the CLIP score

A rewrite that breaks a rule becomes null, and the rule's name goes to the row's "error". Rewrites
are all rewrite_* fields, or those of --fields. The texts that stay are not changed. The paper uses
LLaMA-7B's rewrites unfiltered; a small model's rewrites need a filter. To see whether it helps,
train on both files. The rules, in this order:

  identical    the same words as the original
  copied       it holds "=>", or is one of the texts of --pairs: the model goes on with its prompt
  short        fewer than --min-words words
  long         more than --max-words words
  repeats      two adjacent words occur twice in the same order ("a red cap on a red cap")
  unrelated    it shares no content word with the original (three letters or more, not a stop word)
  score        its clip_score is under --min-score, or less than --min-gain above the original's
  unscored     --min-score or --min-gain needs a clip_score that is missing
"""
import re
from collections import Counter
from functools import partial
from pathlib import Path

from data.common import check_output, die, in_one_line, new_parser, number, print_table, progress
from data.rows import new_file, open_rows, parse_row, read_rows, to_line
from data.texts import NO_BLANKS, texts_of, words_of

PAIRS = Path(__file__).parent / "prompts" / "meta_pairs.jsonl"
STOP_WORDS = frozenset("""
a about above after all also am an and any are as at be been before being below between both but by
can did do does doing down during each few for from further had has have having he her here hers him
his how i if in into is it its itself just me more most my no nor not now of off on once only or
other our out over own same she should so some such than that the their them then there these they
this those through to too under until up very was we were what when where which while who whom why
will with you your
""".split())


def plain_words(text):
    """The text's words, in lower case and without the punctuation around them"""
    return [re.sub(r"^\W+|\W+$", "", word) for word in words_of(text.lower())]


def content_words(words):
    """The words that carry meaning, without a plural s.

    A text in a script without blanks has none, because the words' boundaries are unknown."""
    return {word.rstrip("s") if len(word) > 3 else word for word in words
            if len(word) > 2 and word not in STOP_WORDS and not NO_BLANKS.search(word)}


def broken_rule(original, rewrite, before, after, args):
    """-> the name of the first rule that a rewrite breaks, or None.

    before, after: the clip_score of original and rewrite. A missing original or score is None."""
    old, new = plain_words(original or ""), plain_words(rewrite)
    if old == new:
        return "identical"
    if "=>" in rewrite or " ".join(new) in args.prompt_texts:
        return "copied"
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
    if args.min_score is None and args.min_gain is None:
        return None
    if after is None or args.min_gain is not None and before is None:
        return "unscored"
    high_enough = args.min_score is None or after >= args.min_score  # of NaN it is false
    better = args.min_gain is None or after >= before + args.min_gain
    return None if high_enough and better else "score"


def texts_of_pairs(path):
    """All texts that a prompt of rewrite_llama.py may show: inputs, outputs, groups of captions"""
    texts = []
    for _, pair in read_rows(path):
        texts += pair.get("captions") or [pair.get("input"), pair.get("output")]
    return [text for text in texts if isinstance(text, str)]


def entries(value, n):
    """-> n entries: a list of n as it is, any other value n times.

    For a list of another length, n times None: which entry belongs to which rewrite is unknown."""
    if not isinstance(value, list):
        return [value] * n
    return value if len(value) == n else [None] * n


def filter_row(row, field, fields, rule):
    """Apply rule(original, rewrite, original's score, rewrite's score) to every rewrite of a row,
    in place.

    A missing score is None. -> Counter of (field, rule's name or "kept")"""
    counts, scores = Counter(), row.get("clip_score")
    scores = scores if isinstance(scores, dict) else {}
    for name in fields or [key for key in row if key.startswith("rewrite_")]:
        value = row.get(name)
        texts = value if isinstance(value, list) else [value]
        columns = (row.get(field), texts, scores.get(field), scores.get(name))
        reasons = []
        for original, text, *pair in zip(*(entries(column, len(texts)) for column in columns)):
            original = original if isinstance(original, str) else None
            pair = [score if isinstance(score, (int, float)) else None for score in pair]
            reasons.append(rule(original, text, *pair) if isinstance(text, str) else None)
        counts.update((name, reason or "kept") for reason, text in zip(reasons, texts)
                      if text is not None)
        if any(reasons):
            texts = [None if reason else text for reason, text in zip(reasons, texts)]
            row[name] = texts if isinstance(value, list) else texts[0]
            earlier = row.get("error") or {}
            if not isinstance(earlier, dict):
                earlier = {"row": earlier}  # the user's own
            row["error"] = {**earlier, name: reasons if isinstance(value, list) else reasons[0]}
    return counts


@in_one_line
def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--field", default="alt", help="the original (default: %(default)s)")
    parser.add_argument("--fields", nargs="+", help="the rewrites (default: every rewrite_* field)")
    parser.add_argument("--pairs", default=PAIRS,
                        help="rewrite_llama.py's pairs (default: data/prompts/meta_pairs.jsonl)")
    parser.add_argument("--min-words", type=number(int, 0), default=2, help="default: %(default)s")
    parser.add_argument("--max-words", type=number(int, 1), default=30, help="default: %(default)s")
    parser.add_argument("--min-score", type=number(float, -1),
                        help="drop rewrites with a lower clip_score, -1 to 1 (default: off)")
    parser.add_argument("--min-gain", type=number(float, -2), metavar="X",
                        help="drop rewrites with a lower clip_score than the original's + X; 0: "
                        "keep those not worse (default: off)")
    args = parser.parse_args(argv)
    check_output(args.output, args.input)
    args.prompt_texts = {" ".join(plain_words(text)) for text in texts_of_pairs(args.pairs)}

    counts, rows, filtered_rows, originals = Counter(), 0, 0, 0
    by_score = args.min_score is not None or args.min_gain is not None
    rule_of = partial(broken_rule, args=args)
    with open_rows(args.input) as f, new_file(args.output) as out:
        for line in progress(f):
            rows += 1
            row, why = parse_row(line)
            if why is None:
                row_counts = filter_row(row, args.field, args.fields, rule_of)
                originals += bool(texts_of(row.get(args.field)))
                counts += row_counts
                if any(rule != "kept" for _, rule in row_counts):
                    line = to_line(row)
                    filtered_rows += 1
            out.write(line.removesuffix(b"\n") + b"\n")
        for name in args.fields or []:
            if not any(field == name for field, _ in counts):
                die(f"{args.input} has no text in {name}")
        if not counts:
            die(f"{args.input} has no rewrite in rewrite_*")
        if not originals:
            die(f"{args.input} has no original in {args.field}: --field names another one")
        results = {rule for _, rule in counts}
        if "unscored" in results and not results & {"kept", "score"}:
            die(f"{args.input} has no clip_score: python -m data.clip_scores adds it")
    rules = ["kept", "identical", "copied", "short", "long", "repeats", "unrelated"]
    rules += by_score * ["score", "unscored"]
    names = sorted({name for name, _ in counts})
    print(f"{rows} rows, {filtered_rows} with something dropped")
    print_table(["", *rules], [[name, *(counts[name, rule] for rule in rules)] for name in names])


if __name__ == "__main__":
    main()
