"""Every command of the documentation is accepted by its script's own parser, and the shape of the repository holds."""
import argparse
import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess

import pytest

from conftest import ROOT, read_jsonl, run
from data.__main__ import tools
from data.demo import replication

SCRIPTS = ["rewrite_llama.py", "caption_llava.py", "fuse_vicuna.py", "train_clip.py", "eval_zeroshot.py", "eval_retrieval.py"]


class Parsed(Exception):
    pass


def commands():
    for page in ("README.md", "data/README.md", "data/demo/README.md"):
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in ("python", "torchrun") and place_of_script(words):
                    yield pytest.param(words, id=f"{page}: {' '.join(words)[:70]}")


def place_of_script(words):
    """The place of SCRIPT.py or, after -m, of data.NAME in a command; None if there is neither"""
    for i, word in enumerate(words):
        if word.endswith(".py") or words[i - 1] == "-m" and word.startswith("data."):
            return i


def load(script):
    """SCRIPT.py or data.NAME -> its module"""
    if script.startswith("data."):
        return importlib.import_module(script)
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words", list(commands()))
def test_a_documented_command_parses(words, monkeypatch):
    at = place_of_script(words)
    module, parse = load(words[at]), argparse.ArgumentParser.parse_args

    def parsed(self, *arguments):
        parse(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):
        module.main(words[at + 1:])


def test_there_are_commands_to_check():
    assert len(list(commands())) > 15
    assert place_of_script(shlex.split("python -m data.view rows a b")) == 2
    assert place_of_script(shlex.split("torchrun --nproc_per_node 8 -m data.search --query a")) == 4
    assert place_of_script(shlex.split("python train_clip.py --out a.py")) == 1
    assert place_of_script(shlex.split("python -m pip install data.x")) is None


def test_tools_run_in_one_way():
    """Every page, docstring and shell script says `python -m data.NAME`: by its path a tool does not find the scripts."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *(ROOT / "data").rglob("*.md"), *(ROOT / "data").rglob("*.py"),
             *(ROOT / "data").rglob("*.sh")]
    by_path = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in texts for line in path.read_text().splitlines()
               if re.search(r"\bpython data/\w+\.py", line)]
    assert by_path == []


def test_no_script_and_no_tool_edits_sys_path():
    """They are run from the root, where `data` and the scripts are found as they are."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")]
    assert [path.name for path in sources if "sys.path" in path.read_text()] == []


@pytest.mark.parametrize("tool", [name for name, _ in tools()])
def test_a_tool_is_documented(tool):
    """In the table of data/README.md, and with its command in its docstring."""
    assert f"| `{tool}` |" in (ROOT / "data/README.md").read_text()
    assert f"python -m data.{tool}" in (load(f"data.{tool}").__doc__)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script):
    done = run(script, "--help", fresh=True)
    assert done.returncode == 0 and f"python {script}" in done.stdout and done.stderr == ""


def test_the_top_level_is_the_design():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert {name.split("/")[0] for name in listed} <= {
        *SCRIPTS, "README.md", "requirements.txt", "data", "tests", ".ci", ".gitignore"}


FROM_TRAIN_CLIP = set("""CLIP Config PRESETS Tokenizer load_checkpoint read_checkpoint save_checkpoint clip_loss multitext_loss
    open_image to_rgb augment_crop resolve_precision""".split())


@pytest.mark.parametrize("path", [*ROOT.glob("eval_*.py"), *ROOT.glob("data/**/*.py")], ids=lambda path: path.stem)
def test_what_is_imported_from_the_scripts(path):
    """Of train_clip.py the model, losses, images, tokenizer, checkpoints; of the stages nothing. No function over 60 lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "train_clip" or {name.name for name in node.names} <= FROM_TRAIN_CLIP
            assert node.module not in {"rewrite_llama", "caption_llava", "fuse_vicuna"}
        assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 60, node.name


def test_seven_packages():
    names = re.findall(r"^[a-z]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert sorted(names) == ["accelerate", "numpy", "pillow", "torch", "torchvision", "tqdm", "transformers"]


def test_the_gpu_check_runs(tmp_path):
    """On a CPU, with small models: it must not rot before somebody has a GPU. Without "peer", which starts two whole trainers."""
    checks = ["train", "text", "step", "sync", "rewrite", "loader", "caption", "fuse"]
    done = run("tests/bench/gpu.py", "--device", "cpu", "--tiny", "--json", tmp_path / "gpu.json", "--checks", *checks)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    differences = {name: value for name, value in found["train"].items() if "difference" in name}
    assert len(differences) == 7 and all(value < (0.1 if "bf16," in name else 1e-4) for name, value in differences.items())
    assert all(value == 0 for name, value in differences.items() if "again" in name or "killed" in name)
    assert set(checks) <= set(found)


def test_both_equations_stand_where_readme_says():
    path, count, names = re.search(r"`(\w+\.py)`, the first (\d+) lines: (.*?) \|", (ROOT / "README.md").read_text()).groups()
    places = {node.name: node.end_lineno for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    names = re.findall(r"`(\w+)`", names)
    assert len(names) == 3 and all(places[name] <= int(count) for name in names), [(name, places[name]) for name in names]


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180 and max(map(len, text.splitlines())) <= 120 and len(text.split()) <= 2000


def test_the_row_that_readme_follows_is_real_output():
    text = (ROOT / "README.md").read_text().replace("\n" + " " * 9, " ")  # a line that goes on
    shown = [json.loads(line) for line in re.findall(r"^(?:in|rewrite|caption|fuse) +(\{.*\})$", text, re.M)]
    row = next(row for row in read_jsonl(ROOT / "data/demo/example.jsonl") if row["image"] == shown[0]["image"])
    assert [list(part) for part in shown] == [["image", "alt", "truth", "noise"], ["rewrite_sentence"], ["vec"], ["vecap"]]
    assert {key: value for part in shown for key, value in part.items()} == row


def test_readmes_table_is_made_of_the_results():
    text = (ROOT / "README.md").read_text()
    for line in replication.table(replication.read_results()[0], replication.README_ROWS):
        assert line in text, f"README.md needs this line of data.demo.replication.table: {line}"
    cells = set(re.findall(r"[+-]?\d+\.\d ± \d+\.\d", "\n".join(replication.table(replication.read_results()[0]))))
    for page in ("README.md", "data/README.md"):
        found = re.findall(r"[+-]?\d+\.\d ± \d+\.\d", (ROOT / page).read_text())
        assert len(found) > 30 and set(found) <= cells, set(found) - cells
