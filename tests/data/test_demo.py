"""The demo's own parts: what its icons and noise are, that its LLaVA learns, what its tables count, and what replicate.sh does."""
import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import DEVICE, ROOT, read_jsonl, run
from PIL import ImageFont
from tools import run_tool

sys.path.insert(0, str(ROOT))
from data.demo import icons, replication  # noqa: E402


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The demo's data, made of wheels whose fonts are Pillow's own and whose names are ours."""
    out = tmp_path_factory.mktemp("icons")
    (out / "packages").mkdir()
    font = ImageFont.load_default(40).path.getvalue()
    wheels = {"home_assistant_frontend": {"hass_frontend/static/mdi/iconList.json": json.dumps(
        [{"name": "thing-0", "keywords": ["red berry"]}, {"name": "thing-1", "keywords": ["things of old"]},
         {"name": "only-phosphor-2", "keywords": ["glow worm"]}])},
        "fontawesomefree": {"fontawesomefree/static/fontawesomefree/metadata/icons.json": json.dumps(
            {"thing-1": {"search": {"terms": ["red berry", "blue berry"]}}})}}
    for team, (package, fonts, prefix, suffixes, _) in icons.TEAMS.items():
        names = [f"thing-{i}" if i < 10 else f"only-{team}-{chr(97 + i - 10)}rest" for i in range(20)]
        style = "-24-regular" if team == "fluent" else ""
        for file, charmap in fonts.items():
            wheels.setdefault(package, {})[f"{package}/{file}"] = font
            wheels[package][f"{package}/{charmap}"] = json.dumps({prefix + name + style: f"{97 + i:x}" for i, name in enumerate(names)})
    for package, members in wheels.items():
        with zipfile.ZipFile(out / "packages" / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
            for name, data in members.items():
                wheel.writestr(name, data)
    done = run_tool("demo.icons", "draw", out, fresh=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_small_llava_learns_to_name_icons(drawn, tmp_path):
    """Tower, projector and LLM from scratch, then caption_llava.py on the folder: it says the names it was taught."""
    captions = drawn / "few.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in read_jsonl(drawn / "clean.jsonl")[:4]))
    assert run_tool("make_tokenizer", captions, tmp_path / "t.json", "--vocab-size", 300).returncode == 0
    done = run("train_clip.py", "--captions", captions, "--image-root", drawn / "images", "--tokenizer", tmp_path / "t.json", "--text", "alt",
                  "--model", "nano", "--batch-size", 4, "--steps", 2, "--workers", 0, "--device", DEVICE, "--out", tmp_path / "tower")
    assert done.returncode == 0, done.stderr
    make = ["demo.make_llava", tmp_path / "tower/checkpoint.pt", captions, tmp_path / "llava", "--image-root", drawn / "images",
            "--steps", 100, "--batch-size", 8, "--device", DEVICE]
    done = run_tool(*make, fresh=True)
    assert done.returncode == 0, done.stderr
    done = run("caption_llava.py", "--input", captions, "--output", tmp_path / "out.jsonl", "--image-root", drawn / "images",
                  "--model", tmp_path / "llava", "--max-new-tokens", 12, "--workers", 0, "--device", DEVICE)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert sum(row["vec"] == row["alt"] for row in rows) >= 3, rows
    done = run_tool(*make)
    assert done.returncode == 2 and "exists" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def replicate(*words):
    return subprocess.run(["bash", "data/replicate.sh", *words], cwd=ROOT, capture_output=True, text=True)


def test_every_row_of_the_table_can_be_run_and_none_else():
    script = (ROOT / "data/replicate.sh").read_text()
    rows = set(re.search(r'^rows="(.*?)"', script, re.M | re.S)[1].split())
    assert rows == {row for group in replication.GROUPS.values() for row in group}
    if os.access(ROOT / ".venv/bin/python", os.X_OK):
        done = replicate("clip", "no-such-row")
        assert done.returncode == 2 and done.stderr == "replicate.sh: error: no-such-row: no such row; --list lists them\n"
    done = replicate("--no-such-flag")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_results_are_whole_and_name_what_made_them():
    with open(replication.RESULTS) as f:
        runs = [json.loads(line) for line in f]
    assert len({(run["row"], run["seed"], run["llm"]) for run in runs}) == len(runs)
    for run in runs:
        assert {"row", "seed", "llm", "settings", "metrics", "versions"} <= set(run)
        assert set(replication.SETS) <= set(run["metrics"])
