"""The demo's own parts: what its scenes, queries and noise are, that its LLaVA learns, what its tables count, what replicate.sh does."""
import json
import re
import subprocess
import zipfile

import pytest
from PIL import Image, ImageFont

from conftest import DEVICE, ROOT, assert_mistake, read_jsonl, run
from data.demo import queries, replication, scenes
from data.filter_captions import plain_words
from tools import run_tool, works


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The demo's data, made of wheels whose fonts are Pillow's own: a letter for every object."""
    out = tmp_path_factory.mktemp("scenes")
    (out / "packages").mkdir()
    font, wheels = ImageFont.load_default(40).path.getvalue(), {}
    for team, package, file, names, pattern in scenes.STYLES:
        members = wheels.setdefault(package, {})
        members[f"{package}/{file}"] = font
        codes = {pattern.format(thing): f"{0x41 + i:x}" for i, thing in enumerate(queries.OBJECTS)
                 if (thing, team) != ("wrench", "remix")}  # one that a team lacks
        members.setdefault(f"{package}/{names}", {}).update(codes)
    for package, members in wheels.items():
        with zipfile.ZipFile(out / "packages" / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
            for name, data in members.items():
                wheel.writestr(name, data if isinstance(data, bytes) else json.dumps(data))
    works("demo.scenes", "draw", out, fresh=True)
    return out


def test_no_pair_of_objects_of_a_test_scene_is_in_training(drawn):
    def pairs(name):
        return {frozenset(row["scene"][::2]) for row in read_jsonl(drawn / f"{name}.jsonl")}
    assert not (pairs("clean") | pairs("captioner")) & (pairs("phosphor") | pairs("lucide") | pairs("validation"))
    assert set().union(*pairs("clean")) == set(queries.OBJECTS)
    clean, noisy = read_jsonl(drawn / "clean.jsonl"), read_jsonl(drawn / "noisy.jsonl")
    assert [row["truth"] for row in noisy] == [row["alt"] for row in clean[:len(noisy)]]
    assert 0.42 < sum(row["noise"] in ("meaningless", "other") for row in noisy) / len(noisy) < 0.48
    assert all(row["truth"].replace(" ", "_") in row["alt"].replace(" ", "_") for row in noisy
               if row["noise"] in ("file", "boilerplate", "clean"))
    assert Image.open(drawn / "images" / clean[0]["image"]).size == (32, 32)


def test_a_relation_is_what_the_picture_shows(drawn):
    """The first object's ink lies on the side that the caption names."""
    icons = scenes.draw_icons(str(drawn))
    for relation, ahead in {"left of": True, "right of": False, "above": True, "below": False}.items():
        one = scenes.draw(("house", relation, "key"), {**icons, ("key", "phosphor"): [Image.new("L", (9, 9))]}, ["phosphor"],
                          scenes.random.Random(1))
        axis = 0 if relation.endswith(" of") else 1
        box = Image.eval(one.convert("L"), lambda v: 255 * (v < 128)).getbbox()
        assert (box[axis] + box[axis + 2] < 32) == ahead


def test_prompts_tell_nothing_of_the_queries():
    """No pair names an object or a synonym, and no output has the form of a query."""
    texts = [text for name in ("rewrite_pairs", "fuse_pairs") for row in read_jsonl(ROOT / f"data/demo/{name}.jsonl")
             for key, text in row.items() if key != "source"]
    secret = {*queries.OBJECTS, *queries.SYNONYMS.values(), "image", "picture", "photo"}
    forms = [re.sub("(a )?[XY]", lambda name: ("an? " if name[1] else "") + r"\S+", form)
             for relation in queries.OPPOSITE for form in queries.other_forms(("X", relation, "Y"))]
    for text in texts:
        assert not secret & set(plain_words(text)), text
        assert not any(re.fullmatch(form, text.lower().strip(".?")) for form in forms), text


def test_queries_say_what_the_scene_is():
    scene = ("cup", "left of", "envelope")
    assert queries.caption(scene) == "cup left of envelope" and queries.in_synonyms(scene) == "mug left of letter"
    assert queries.other_forms(scene) == [
        "an envelope to the right of a cup", "on the left a cup, on the right an envelope",
        "there is a cup to the left of an envelope", "the envelope is right of the cup",
        "an image with a cup and an envelope", "which picture has the cup to the left of the envelope?"]
    assert queries.other_forms(("key", "below", "bell"))[1] == "at the top a bell, at the bottom a key"
    assert len({*queries.OBJECTS, *queries.SYNONYMS.values()}) == 24 + len(queries.SYNONYMS)


def test_the_small_llava_learns_to_name_scenes(drawn, tmp_path):
    """Tower, projector and LLM from scratch, then caption_llava.py on the folder: it says the captions it was taught."""
    captions = drawn / "few.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in read_jsonl(drawn / "clean.jsonl")[:4]))
    make = ["demo.make_llava", captions, tmp_path / "llava", "--image-root", drawn / "images",
            "--steps", 120, "--batch-size", 8]
    works(*make, fresh=True)
    done = run("caption_llava.py", "--input", captions, "--output", tmp_path / "out.jsonl", "--image-root", drawn / "images",
               "--model", tmp_path / "llava", "--max-new-tokens", 12, "--workers", 0, "--device", DEVICE)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert sum(row["vec"] == row["alt"] for row in rows) >= 3, rows
    assert_mistake(run_tool(*make), "exists")


def test_measure(drawn, tmp_path):
    """A trained run measured by the two evaluations: every column. README's table: tests/test_docs.py."""
    works("make_tokenizer", drawn / "clean.jsonl", drawn / "tokenizer.json", "--vocab-size", 400)
    done = run("train_clip.py", "--captions", drawn / "clean.jsonl", "--image-root", drawn / "images", "--tokenizer",
               drawn / "tokenizer.json", "--model", "nano-conv", "--augment", "drawing", "--batch-size", 16, "--steps", 2,
               "--warmup", 1, "--workers", 0, "--device", DEVICE, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    works("demo.replication", "--out", drawn, "--measure", tmp_path / "run", fresh=True)
    metrics = json.loads((tmp_path / "run/measured.json").read_text())
    assert set(metrics) == {"validation", *replication.TEAMS}
    assert set(replication.scores_of(metrics)) == set(replication.COLUMNS)


def test_a_run_that_was_stopped_has_no_result(tmp_path):
    (tmp_path / "settings.json").write_text('{"steps": 20}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 15}\n')
    with pytest.raises(SystemExit, match="step 15 of 20"):
        replication.check_finished(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    replication.check_finished(tmp_path)


def test_the_list_has_every_row_with_its_results():
    told = works("demo.replication", "--list").stdout
    for row, (title, files, flags, _) in replication.ROWS.items():
        assert f"| {title} |" in told and f"{row}: {files}, {flags}" in told
    assert set(replication.README_ROWS) <= set(replication.ROWS)
    done = subprocess.run(["bash", "data/replicate.sh", "no-such-row"], cwd=ROOT, capture_output=True, text=True)
    assert_mistake(done, "no-such-row" if (ROOT / ".venv/bin/python").exists() else "run data/demo.sh first")
