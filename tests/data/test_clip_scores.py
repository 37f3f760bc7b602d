"""data/clip_scores.py: the scores are cosines, and go on after a kill."""
import json

import pytest
import torch
import torch.nn.functional as F

import train_clip as T
from conftest import assert_mistake, read_jsonl
from data import clip_scores
from tools import run_tool, works


def test_scores_are_cosines(shapes, trained, tmp_path):
    rows = read_jsonl(shapes / "captions.jsonl")
    wrongs = [next(other["alt"] for other in rows if other["label"] != row["label"]) for row in rows]
    for row, wrong in zip(rows, wrongs):
        row |= {"alt": [wrong, row["alt"], None, "\ud800 \u2028"], "user": {"kept": 1}}
    rows += [{"image": "gone.png", "alt": "red square", "rewrite_a": "a red square"},
             {"no": "image", "vec": [["a list in a list"]]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n\n")
    arguments = ["--checkpoint", trained / "checkpoint.pt", "--captions", tmp_path / "rows.jsonl", "--image-root",
                 shapes / "images", "--workers", 0, "--precision", "fp32", "--output", tmp_path / "scored.jsonl",
                 "--best-field", "best"]
    works("clip_scores", *arguments, fresh=True)
    *lines, broken, blank = (tmp_path / "scored.jsonl").read_text().split("\n")[:-1]
    scored = [json.loads(line) for line in lines]
    assert (broken, blank) == ("no row", "")
    best = [row.pop("best") for row in scored]
    assert [{k: v for k, v in row.items() if k != "clip_score"} for row in scored] == rows
    model, tokenizer, transform = T.load_checkpoint(str(trained / "checkpoint.pt"))
    scores = scored[0]["clip_score"]
    with torch.inference_mode():
        image = T.to_rgb(T.open_image(str(shapes / "images"), rows[0]["image"]))
        image = model.encode_image(transform(image)[None])
        for text, score in ((rows[0]["alt"][1], scores["alt"][1]), (rows[0]["rewrite_a"], scores["rewrite_a"])):
            expected = F.cosine_similarity(image, model.encode_text(tokenizer([text])))
            assert score == pytest.approx(expected.item(), abs=2e-5)
    assert scores["alt"][2] is None and isinstance(scores["alt"][3], float)
    assert scored[-2]["clip_score"] == {"alt": None, "rewrite_a": None}
    assert scored[-1]["clip_score"] == {"vec": [None]}
    alts = [row["clip_score"]["alt"] for row in scored[:16]]
    assert sum(right > wrong for wrong, right, *_ in alts) >= 14
    assert best[16:] == ["red square", None]
    assert all(of[row["alt"].index(text)] == max(filter(None, of)) for row, text, of in zip(rows, best, alts))
    assert "is finished" in run_tool("clip_scores", *arguments).stdout
    assert_mistake(run_tool("clip_scores", *arguments, "--best-field", "other"), "made with best_field = 'best'")


def test_scoring_goes_on_where_it_was_killed(shapes, trained, tmp_path, monkeypatch):
    """In the third chunk of four rows: the two whole ones stay as they are. What a kill leaves: test_common."""
    monkeypatch.setattr(clip_scores, "CHUNK", 4)
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    args = ["--checkpoint", str(trained / "checkpoint.pt"), "--captions", str(shapes / "captions.jsonl"),
            "--image-root", str(shapes / "images"), "--workers", "0", "--output", str(out)]
    clip_scores.main(args)
    lines = out.read_bytes().splitlines(True)
    lines[7] = b'{"made": "before"}\n'
    part.write_bytes(b"".join(lines[:9]) + b'{"torn')
    out.unlink()
    clip_scores.main(args)
    assert out.read_bytes() == b"".join(lines) and not part.exists()
