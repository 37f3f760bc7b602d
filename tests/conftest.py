"""Small real inputs for the tests: pictures, captions, a tokenizer and a trained run."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import forks

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # cuda: the same on a GPU, but for ranks and what must be equal to the bit
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
SHAPES = ["square", "bar", "cross", "frame"]


def run(script, *arguments, env=None, ranks=None, fresh=False, first=()):
    """A script of the top level, or data/NAME.py as `python -m data.NAME`, alone or on some ranks. -> CompletedProcess

    In forks (see forks.py), or with `fresh` as a user starts it, which variables for Python's start need."""
    module = str(script)[:-3].replace("/", ".") if str(script).startswith("data/") else None
    if not fresh:
        return run_forks(module or script, arguments, env or {}, ranks, first)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks \
        else [sys.executable]
    script = ["-m", module] if module else [str(ROOT / script)]
    return subprocess.run([*launch, *script, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, cwd=ROOT)


def run_forks(script, arguments, env, ranks, first):
    assert not any(name.startswith(("PYTHON", "OMP_")) for name in env), "read when Python starts: fresh=True"
    with tempfile.TemporaryDirectory() as folder:
        folder, store = Path(folder), None
        if ranks:
            processes, store = forks.start_ranks(ranks, script, arguments, folder, env)
        else:
            processes = [forks.start(script, arguments, [folder / "0.stdout", folder / "0.stderr"], env, first)]
        try:
            status = forks.wait_for_all(processes)
        finally:  # of an interrupted test, or of the ranks beside one that failed, nothing stays
            for process in processes:
                if process.is_alive():
                    process.kill()  # its workers see that
        return subprocess.CompletedProcess([script, *arguments], status, *(
            "".join(path.read_text() for path in sorted(folder.glob(f"*.{name}"))) for name in ("stdout", "stderr")))


def assert_mistake(done, *words):
    """Exit status 2 and one clear line on stderr."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and "error:" in lines[0], done.stderr
    for word in words:
        assert word in lines[0]


def worker_of(pid, others=()):
    """A loader's worker of the process `pid`, not one of `others`, or None. torch gives them their name."""
    for name in (name for name in os.listdir("/proc") if name.isdigit() and int(name) not in others):
        try:
            command, rest = Path(f"/proc/{name}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        if command == "pt_data_worker" and rest.split()[1] == str(pid):
            return int(name)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def draw(shape, colour, size=40):
    picture = np.full((size, size, 3), 255, np.uint8)
    a, b = size // 4, 3 * size // 4
    if shape == "square":
        picture[a:b, a:b] = colour
    elif shape == "bar":
        picture[a:b, size // 2 - 3:size // 2 + 3] = colour
    elif shape == "cross":
        picture[a:b, size // 2 - 3:size // 2 + 3] = colour
        picture[size // 2 - 3:size // 2 + 3, a:b] = colour
    else:
        picture[a:b, a:b] = colour
        picture[a + 4:b - 4, a + 4:b - 4] = 255
    return Image.fromarray(picture)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with images/, captions.jsonl (16 coloured shapes with rewrites) and tokenizer.json."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "images").mkdir()
    rows = []
    for colour, value in COLOURS.items():
        for shape in SHAPES:
            name = f"{colour}-{shape}.png"
            draw(shape, value).save(folder / "images" / name)
            rows.append({"image": name, "alt": f"{colour} {shape}", "rewrite_a": f"a {shape} that is {colour} all over",
                         "rewrite_b": None if shape == "bar" else f"one {colour} coloured {shape}", "label": colour})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("data/make_tokenizer.py", folder / "captions.jsonl", folder / "tokenizer.json", "--text", "alt",
               "rewrite_a", "rewrite_b", "--vocab-size", 400, fresh=True)
    assert done.returncode == 0, done.stderr
    return folder


def train_arguments(shapes, out, *arguments):
    """train_clip.py's command line for the shapes, with defaults that suit 16 pictures; later arguments win."""
    return [str(a) for a in (
        "--captions", shapes / "captions.jsonl", "--image-root", shapes / "images", "--text", "alt", "rewrite_a", "rewrite_b",
        "--model", "nano", "--image-size", 32, "--tokenizer", shapes / "tokenizer.json", "--batch-size", 8, "--steps", 6,
        "--warmup", 2, "--workers", 0, "--log-every", 1, "--precision", "fp32", "--device", DEVICE, "--out", out, *arguments)]


def train(shapes, out, *arguments, **more):
    return run("train_clip.py", *train_arguments(shapes, out, *arguments), **more)


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """A run long enough to tell the shapes apart."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    done = train(shapes, out, "--batch-size", 16, "--seed", 2, "--steps", 300, "--lr", "2e-3", "--warmup", 10, "--wd", "0.1",
                 fresh=True)
    assert done.returncode == 0, done.stderr
    return out
