"""data/clip_scores.py: the scores are cosines, serve the filter, and go on after a kill."""
import json

import pytest
import torch
import torch.nn.functional as F

import eval_zeroshot
import train_clip as T
from conftest import assert_mistake, read_jsonl
from data import clip_scores
from tools import run_tool


def test_scores_are_cosines_and_serve_the_filter(shapes, trained, tmp_path):
    rows = read_jsonl(shapes / "captions.jsonl")
    wrongs = [next(other["alt"] for other in rows if other["label"] != row["label"]) for row in rows]
    for row, wrong in zip(rows, wrongs):
        row |= {"alt": [wrong, row["alt"], None, "\ud800 \u2028"], "user": {"kept": 1}}
    rows += [{"image": "gone.png", "alt": "red square", "rewrite_a": "a red square"},
             {"no": "image", "vec": [["a list in a list"]]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n\n")
    arguments = ["--checkpoint", trained / "checkpoint.pt", "--captions", tmp_path / "rows.jsonl", "--image-root",
                 shapes / "images", "--workers", 0, "--precision", "fp32", "--output", tmp_path / "scored.jsonl"]
    done = run_tool("clip_scores", *arguments, fresh=True)
    assert done.returncode == 0, done.stderr
    *lines, broken, blank = (tmp_path / "scored.jsonl").read_text().split("\n")[:-1]
    scored = [json.loads(line) for line in lines]
    assert (broken, blank) == ("no row", "")
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
    assert "is finished" in run_tool("clip_scores", *arguments).stdout
    assert_mistake(run_tool("clip_scores", *arguments, "--best-field", "alt_best"), "made with best_field = None")
    for row in scored[:16]:  # one text a row
        row["alt"], row["clip_score"]["alt"] = row["alt"][1], row["clip_score"]["alt"][1]
    serve_the_filter(scored, tmp_path)


def serve_the_filter(scored, tmp_path):
    def filtered(*arguments):
        done = run_tool("filter_captions", tmp_path / "single.jsonl", tmp_path / "out.jsonl", *arguments)
        assert done.returncode == 0, done.stderr
        return read_jsonl(tmp_path / "out.jsonl")

    least = sorted(row["clip_score"]["rewrite_a"] for row in scored[:16])[8]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    rows = filtered("--min-score", least)
    for row in rows[:16]:
        assert (row["rewrite_a"] is not None) == (row["clip_score"]["rewrite_a"] >= least)
        assert row["rewrite_a"] or row["error"]["rewrite_a"] == "score"
    assert rows[16]["error"] == {"rewrite_a": "unscored"}
    for row in filtered("--min-gain", "0")[:16]:
        scores = row["clip_score"]
        assert (row["rewrite_a"] is not None) == (scores["rewrite_a"] >= scores["alt"])


def test_scoring_goes_on_where_it_was_killed(shapes, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_scores, "CHUNK", 4)
    args = ["--checkpoint", str(trained / "checkpoint.pt"), "--captions", str(shapes / "captions.jsonl"),
            "--image-root", str(shapes / "images"), "--workers", "0", "--output"]
    clip_scores.main([*args, str(tmp_path / "whole.jsonl")])
    whole, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    part, lines = tmp_path / "out.jsonl.part", whole.splitlines(True)
    stop, encode_texts = iter(range(3)), eval_zeroshot.Encoder.encode_texts

    def killed(*arguments):  # in the third chunk of four rows
        if next(stop) == 2:
            raise KeyboardInterrupt
        return encode_texts(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eval_zeroshot.Encoder, "encode_texts", killed)
        clip_scores.main([*args, str(out)])
    assert part.read_bytes() == b"".join(lines[:8])
    part.write_bytes(b"".join(lines[:9]) + b'{"torn')
    clip_scores.main([*args, str(out)])
    assert out.read_bytes() == whole and not part.exists()
