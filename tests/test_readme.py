"""README's "Each stage by hand" on a miniature of what the demo leaves: every command runs, and what README shows of its
output is there, but for the numbers."""
import json
import re
import shlex
import subprocess

import pytest

from conftest import ROOT, read_jsonl, run
from tiny_models import make_llama, make_llava


def commands():
    """-> [(command, what README shows of its output)], from the first bash block of the section"""
    section = (ROOT / "README.md").read_text().split("## Each stage by hand")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.S)[1]
    block = block.replace("\\\n", " ").replace("\n# ", "  # ").replace("\n#  ", "  # ")  # the output on its own line
    pairs = [line.partition("#") for line in block.splitlines()]
    return [(command.strip(), re.sub(r", \d+ s$", "", shown.strip())) for command, _, shown in pairs]


@pytest.fixture(scope="module")
def world(shapes, trained, tmp_path_factory):
    """A folder with out/demo, and the files in it that the commands read"""
    demo = tmp_path_factory.mktemp("readme") / "out" / "demo"
    demo.mkdir(parents=True)
    (demo / "images").symlink_to(shapes / "images")
    (demo / "laclip").symlink_to(trained)
    (demo / "tokenizer.json").symlink_to(shapes / "tokenizer.json")
    make_llama(demo / "smollm2")
    make_llava(demo / "llava")
    rows = [{"image": row["image"], "alt": row["alt"], "truth": row["alt"], "label": row["label"],
             "other_forms": [row["rewrite_a"], f"there is a {row['alt']}"]} for row in read_jsonl(shapes / "captions.jsonl")]
    fused = [{**row, "vecap": row["other_forms"][0]} for row in rows * 8]
    for name, rows in {"noisy": rows, "fused": fused, "phosphor": rows, "phosphor_objects": rows}.items():
        (demo / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return demo.parents[1]


def masked(text):
    return re.sub(r"\s+", " ", re.sub(r"[\d.]+\*?", "#", text))


def test_every_stage_runs_as_readme_says(world):
    scripts = []
    for command, shown in commands():
        if command.startswith("python "):
            script, *words = shlex.split(command.replace("out/", f"{world}/out/"))[1:]
            done = run(script, *words)
            assert done.returncode == 0, (command, done.stderr)
            assert shown and all(masked(part) in masked(done.stdout + done.stderr) for part in shown.split(", ")), \
                (command, shown, done.stdout, done.stderr[-500:])
            scripts.append(script)
        else:
            subprocess.run(["bash", "-c", command], cwd=world, check=True)  # it has a redirection
    assert scripts == ["rewrite_llama.py", "caption_llava.py", "fuse_vicuna.py", "train_clip.py", "eval_retrieval.py",
                       "eval_zeroshot.py"]
