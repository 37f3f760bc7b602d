"""The demo's own figures: what its noise does, what its tables count."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT, read_jsonl

sys.path.insert(0, str(ROOT / "data" / "demo"))
import collect  # noqa: E402
import prepare  # noqa: E402


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_noise_is_of_twemoji_alone_and_as_documented(tmp_path):
    names = [f"thing {i}" for i in range(3000)]
    write_jsonl(tmp_path / "train.jsonl", [{"image": f"{style}/{i}.png", "alt": name}
                                           for i, name in enumerate(names) for style in ("twemoji", "openmoji")])
    prepare.make_noise(str(tmp_path))
    rows = read_jsonl(tmp_path / "noisy.jsonl")
    assert [row["image"] for row in rows] == [f"twemoji/{i}.png" for i in range(3000)]  # the captioner's pictures stay out
    assert [row["name"] for row in rows] == names
    clean = sum(row["alt"] == row["name"] for row in rows) / 3000
    others = sum(row["alt"] != row["name"] and row["alt"] in set(names) for row in rows) / 3000
    boilerplate = sum(row["alt"] != row["name"] and row["name"] + " " in row["alt"] + " " for row in rows) / 3000
    assert (clean, others, boilerplate) == pytest.approx((0.3, 0.2, 0.2), abs=0.025)
    before = (tmp_path / "noisy.jsonl").read_bytes()
    subprocess.run([sys.executable, ROOT / "data/demo/prepare.py", "noise", tmp_path], check=True)  # another process
    assert (tmp_path / "noisy.jsonl").read_bytes() == before


def test_captioner_share_counts_content_words(tmp_path):
    names = ["red apple", "the cat", "a dog", "green apple"]
    captions = ["an apple in red", "the dog", "the dog", None]  # "the" is no content word; no caption: a row that counts as wrong
    write_jsonl(tmp_path / "half_b_captioned.jsonl", [{"alt": a, "vec": b} for a, b in zip(names, captions)])
    right, shuffled = collect.captioner_share(str(tmp_path), "half_b_captioned.jsonl", "alt")
    assert right == 2 / 4
    assert shuffled == 1 / 4  # green apple, beside what was said of the red one


def test_paired_difference_is_per_query(tmp_path):
    (tmp_path / "eval").mkdir()
    found = {"clip": [1, 1, 0, 0], "laclip": [1, 0, 1, 1]}  # whether the right picture is among the first five
    for model, hits in found.items():
        write_jsonl(tmp_path / "eval" / f"{model}-seen-alt.hits.jsonl",
                    [{"truth": "a", "hits": [{"image": "b"}] * 4 + [{"image": "a" if hit else "b"}, {"image": "a"}]} for hit in hits])
    mean, error = collect.paired_difference(str(tmp_path), ("seen", "alt"))
    assert mean == 0.25 and error == pytest.approx(0.4787, abs=1e-4)  # 0, -1, 1, 1: stdev 0.957 / 2
