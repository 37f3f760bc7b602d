"""data/filter_captions.py: each rule, lists, what stays byte for byte."""
import json

from tools import works

BROKEN = [b"{not json", b'["a", "list"]', b'"text"', b"7", b"null", b"", b'{"alt": "\xff\xfe"}', b"\xed\xa0\x80", b"\0\0",
          b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"alt": "cut', b'{"a": 1} {"b": 2}', b'{"n": ' + b"9" * 5000 + b"}"]


def filtered(tmp_path, lines, *arguments):
    """-> (lines out, {field: {rule: count}}, what is printed) of rows, or of lines as bytes; the last line has no newline"""
    (tmp_path / "in").write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in lines))
    stdout = works("filter_captions", tmp_path / "in", tmp_path / "out", *arguments).stdout
    names, *table = [line.split() for line in stdout.splitlines()[1:]]
    counts = {field: {name: int(number) for name, number in zip(names, numbers) if number != "0"} for field, *numbers in table}
    return (tmp_path / "out").read_bytes().split(b"\n")[:-1], counts, stdout


RULES = [("A red bike, by the wall!", "a red bike by the wall", "identical"),
         ("red bike", "red bike => a bike that is red", "copied"),
         ("mossy steps", "Mossy stone steps!", "copied"),  # a text of data/prompts/meta_pairs.jsonl
         ("red bike", "bike", "short"),
         ("red bike", "bike " + " ".join(f"w{i}" for i in range(30)), "long"),
         ("red cap", "A red cap on a red cap", "repeats"),
         ("red bike", "something else entirely", "unrelated"),
         ("the old bikes", "the thing with the bike", None),
         ("red bike", "bike " + " ".join(f"w{i}" for i in range(29)), None),
         ("it is on", "nothing of it remains", None),  # no content word to keep
         ("\u7ea2\u8272\u7684\u676f\u5b50", "\u684c\u5b50\u4e0a\u653e\u7740\u4e00\u4e2a\u7ea2\u676f", None),  # without blanks
         ("\u7ea2\u8272\u7684\u676f\u5b50", "\u732b", "short"),
         ("\u8d64\u3044\u30d0\u30a4\u30af", "\u8d64\u3044\u30d0\u30a4\u30af\u3002", "identical"),
         ("\u0932\u093e\u0932", "\u0932\u093e\u0932 \u0938\u093e\u0907\u0915\u093f\u0932", None),
         ("red bike", "Red, then, is a color; red too: bike", None)]


def test_filter_has_each_rule_once(tmp_path):
    rows = [{"alt": alt, "rewrite_x": rewrite, "id": i} for i, (alt, rewrite, _) in enumerate(RULES)]
    lines, counts, _ = filtered(tmp_path, rows)
    for i, (line, (alt, rewrite, rule)) in enumerate(zip(lines, RULES, strict=True)):
        expected = {"alt": alt, "rewrite_x": None if rule else rewrite, "id": i}
        assert json.loads(line) == (expected | {"error": {"rewrite_x": rule}} if rule else expected)
    rules = {"kept": 6, "identical": 2, "copied": 2, "short": 2, "long": 1, "repeats": 1, "unrelated": 1}
    assert counts == {"rewrite_x": rules}


def test_filter_goes_through_lists_entry_by_entry(tmp_path):
    rows = [{"alt": ["red bike", "old boat"], "rewrite_x": ["one red bike", "a red bike"], "rewrite_y": None},
            {"alt": "red bike", "rewrite_x": ["one red bike", "boat", None], "error": {"rewrite_y": "empty"}},
            {"alt": ["red bike"], "rewrite_x": ["one red bike"], "rewrite_y": [None], "error": "user's"}]
    lines, counts, stdout = filtered(tmp_path, rows)
    assert [json.loads(line) for line in lines] == [
        {**rows[0], "rewrite_x": ["one red bike", None], "error": {"rewrite_x": [None, "unrelated"]}},
        {**rows[1], "rewrite_x": ["one red bike", None, None],
         "error": {"rewrite_y": "empty", "rewrite_x": [None, "short", None]}},
        rows[2]]
    assert counts == {"rewrite_x": {"kept": 3, "short": 1, "unrelated": 1}}
    assert stdout.startswith("3 rows, 2 with something dropped\n")


def test_filter_leaves_other_lines_as_they_are(tmp_path):
    """Broken lines and rows without a fault pass byte for byte."""
    good = b'{"rewrite_x" :  "a r\\u0065d bike",   "alt": "\xd0\xba red", "n": 1.50}'
    lines = [good, *BROKEN, good, b'{"alt": "\\ud800", "rewrite_x": "\\ud800 gone far"}',
             b'{"alt": "red bike", "rewrite_x": "\\ud800"}']
    out, counts, _ = filtered(tmp_path, lines)
    assert out[:-1] == lines[:-1]
    assert json.loads(out[-1]) == {"alt": "red bike", "rewrite_x": None, "error": {"rewrite_x": "short"}}
    assert counts["rewrite_x"]["kept"] == 3


def test_filter_by_the_clip_score(tmp_path):
    """At least --min-score, at least the original's score + --min-gain; a missing score is counted apart."""
    scores = [(0.2, 0.2), (0.19, 0.2), (0.3, 0.31), (0.1, 0.5), (float("nan"), 0.2), (None, 0.2), (0.3, None)]
    rows = [{"alt": "red bike", "rewrite_x": "a red bike", "clip_score": {"rewrite_x": x, "alt": y}} for x, y in scores]
    for arguments, rules in [(["--min-score", 0.2], [None, "score", None, "score", "score", "unscored", None]),
                             (["--min-gain", 0], [None, "score", "score", "score", "score", "unscored", "unscored"]),
                             (["--min-gain", -0.02], [None, None, None, "score", "score", "unscored", "unscored"])]:
        lines, counts, _ = filtered(tmp_path, [*rows, {"alt": "red bike", "rewrite_x": "a red bike"}], *arguments)
        found = [json.loads(line).get("error", {}).get("rewrite_x") for line in lines]
        assert found == [*rules, "unscored"] and counts["rewrite_x"]["unscored"] == found.count("unscored")


def test_filter_options(tmp_path):
    rows = [{"alt": "red bike", "text": "one red old bike", "rewrite_x": "bike", "name": "one red bike"}]
    lines, counts, _ = filtered(tmp_path, rows, "--fields", "text", "--field", "name", "--max-words", 3)
    assert json.loads(lines[0]) == {**rows[0], "text": None, "error": {"text": "long"}}
    assert list(counts) == ["text"]
