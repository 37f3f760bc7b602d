"""data/clip_scores.py: the scores are cosines, serve the filter, and go on after a kill."""
import json
import os

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
    wrongs = [next(other["alt"] for other in rows if other["label"] != row["label"])
              for row in rows]
    for row, wrong in zip(rows, wrongs):
        row |= {"alt": [wrong, row["alt"], None, "\ud800 \u2028"], "user": {"kept": 1}}
    rows += [{"image": "gone.png", "alt": "red square", "rewrite_a": "a red square"},
             {"no": "image", "vec": [["a list in a list"]]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "no row\n\n"
    (tmp_path / "rows.jsonl").write_text(lines)
    arguments = ["--checkpoint", trained / "checkpoint.pt", "--captions", tmp_path / "rows.jsonl",
                 "--image-root", shapes / "images", "--workers", 0, "--precision", "fp32",
                 "--output", tmp_path / "scored.jsonl"]
    done = run_tool("clip_scores", *arguments, fresh=True)
    assert done.returncode == 0, done.stderr
    *lines, broken, blank = (tmp_path / "scored.jsonl").read_text().split("\n")[:-1]
    scored = [json.loads(line) for line in lines]
    assert (broken, blank) == ("no row", "")
    assert [{k: v for k, v in row.items() if k != "clip_score"} for row in scored] == rows
    model, tokenizer, transform = T.load_checkpoint(str(trained / "checkpoint.pt"))
    with torch.inference_mode():
        image = T.to_rgb(T.open_image(str(shapes / "images"), rows[0]["image"]))
        image = model.encode_image(transform(image)[None])
        scores = scored[0]["clip_score"]
        for text, score in ((rows[0]["alt"][1], scores["alt"][1]),
                            (rows[0]["rewrite_a"], scores["rewrite_a"])):
            expected = F.cosine_similarity(image, model.encode_text(tokenizer([text])))
            assert score == pytest.approx(expected.item(), abs=2e-5)
    assert scores["alt"][2] is None and isinstance(scores["alt"][3], float)
    assert scored[-2]["clip_score"] == {"alt": None, "rewrite_a": None}
    assert scored[-1]["clip_score"] == {"vec": [None]}
    alts = [row["clip_score"]["alt"] for row in scored[:16]]
    assert sum(right > wrong for wrong, right, *_ in alts) >= 14
    assert "is finished" in run_tool("clip_scores", *arguments).stdout
    done = run_tool("clip_scores", *arguments, "--best-field", "alt_best")
    assert_mistake(done, "made with best_field = None")
    serve_the_filter(scored, shapes, tmp_path)


def serve_the_filter(scored, shapes, tmp_path):
    least = sorted(row["clip_score"]["rewrite_a"] for row in scored[:16])[8]
    for row in scored[:16]:  # one text a row
        row["alt"], row["clip_score"]["alt"] = row["alt"][1], row["clip_score"]["alt"][1]
    single = tmp_path / "single.jsonl"
    single.write_text("".join(json.dumps(row) + "\n" for row in scored))
    done = run_tool("filter_captions", single, tmp_path / "best.jsonl", "--min-score", least,
                    fresh=True)
    assert done.returncode == 0, done.stderr
    for row in read_jsonl(tmp_path / "best.jsonl")[:16]:
        assert (row["rewrite_a"] is not None) == (row["clip_score"]["rewrite_a"] >= least)
        assert row["rewrite_a"] or row["error"]["rewrite_a"] == "score"
    assert read_jsonl(tmp_path / "best.jsonl")[16]["error"] == {"rewrite_a": "unscored"}
    run_tool("filter_captions", single, tmp_path / "gain.jsonl", "--min-gain", "0")
    for row in read_jsonl(tmp_path / "gain.jsonl")[:16]:
        scores = row["clip_score"]
        assert (row["rewrite_a"] is not None) == (scores["rewrite_a"] >= scores["alt"])
    assert_mistake(run_tool("filter_captions", shapes / "captions.jsonl", tmp_path / "x.jsonl",
                            "--min-gain", 0), "clip_score")


def test_scoring_goes_on_where_it_was_killed(shapes, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_scores, "CHUNK", 4)
    args = ["--checkpoint", str(trained / "checkpoint.pt"), "--captions",
            str(shapes / "captions.jsonl"), "--image-root", str(shapes / "images"),
            "--workers", "0", "--output"]
    clip_scores.main([*args, str(tmp_path / "whole.jsonl")])
    whole, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl.part"
    stop, encode_texts = iter(range(3)), eval_zeroshot.Encoder.encode_texts

    def killed(*arguments):  # in the third chunk of four rows
        if next(stop) == 2:
            raise KeyboardInterrupt
        return encode_texts(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(eval_zeroshot.Encoder, "encode_texts", killed)
        with pytest.raises(KeyboardInterrupt):
            clip_scores.main([*args, str(tmp_path / "out.jsonl")])
    assert out.read_bytes() == b"".join(whole.splitlines(True)[:8])
    out.write_bytes(out.read_bytes() + whole.splitlines(True)[8] + b'{"torn')
    clip_scores.main([*args, str(tmp_path / "out.jsonl")])
    assert (tmp_path / "out.jsonl").read_bytes() == whole and not out.exists()
    out.write_bytes(b"")
    (tmp_path / "out.jsonl.settings.json").write_text("{}")
    os.remove(tmp_path / "out.jsonl")
    with pytest.raises(SystemExit):
        clip_scores.main([*args, str(tmp_path / "out.jsonl")])
