"""Small real inputs for the tests: pictures, captions, a tokenizer and a trained run."""
import contextlib
import importlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
               "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# cuda: the same on a GPU, but for ranks and what must be equal to the bit
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220),
           "yellow": (230, 210, 40)}
SHAPES = ["square", "bar", "cross", "frame"]


def run(script, *arguments, env=None, ranks=None, fresh=False, first=()):
    """A script of the top level, or data/NAME.py as `python -m data.NAME`. -> CompletedProcess

    In this process, since importing torch and transformers again takes seconds; or as a user starts
    it, with `fresh` (variables that Python reads at its start need it) or on some `ranks`. `first`:
    modules that are imported before it."""
    module = str(script)[:-3].replace("/", ".") if str(script).startswith("data/") else None
    arguments = [*map(str, arguments)]
    if not fresh and not ranks:
        return run_here(module, script, arguments, env or {}, first)
    launch = [sys.executable]
    if ranks:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    launch += ["-m", module] if module else [str(ROOT / script)]
    return subprocess.run([*launch, *arguments], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})


def run_here(module, script, arguments, env, first):
    assert not any(name.startswith(("PYTHON", "OMP_")) for name in env), "these need fresh=True"
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}
    argv = [str(script), *arguments]
    with mock.patch.dict(os.environ, env), mock.patch.object(sys, "argv", argv), \
            contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), \
            contextlib.chdir(ROOT):
        for name in first:
            importlib.import_module(name)
        try:
            if module:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return subprocess.CompletedProcess([script, *arguments], status, out, err)


def assert_mistake(done, *words):
    """Exit status 2 and one clear line on stderr."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and "error:" in lines[0], done.stderr
    for word in words:
        assert word in lines[0]


def worker_of(pid, others=()):
    """A loader's worker of the process `pid`, not one of `others`, or None; torch names them."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in others:
            continue
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
    """A folder with images/, captions.jsonl (16 coloured shapes with rewrites), tokenizer.json."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "images").mkdir()
    rows = []
    for colour, value in COLOURS.items():
        for shape in SHAPES:
            name = f"{colour}-{shape}.png"
            draw(shape, value).save(folder / "images" / name)
            rows.append({"image": name, "alt": f"{colour} {shape}",
                         "rewrite_a": f"a {shape} that is {colour} all over",
                         "rewrite_b": None if shape == "bar" else f"one {colour} coloured {shape}",
                         "label": colour})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("data/make_tokenizer.py", folder / "captions.jsonl", folder / "tokenizer.json",
               "--text", "alt", "rewrite_a", "rewrite_b", "--vocab-size", 400, fresh=True)
    assert done.returncode == 0, done.stderr
    return folder


def train_arguments(shapes, out, *arguments):
    """train_clip.py's command line for the 16 pictures; later arguments win."""
    return [str(a) for a in (
        "--captions", shapes / "captions.jsonl", "--image-root", shapes / "images", "--text", "alt",
        "rewrite_a", "rewrite_b", "--model", "nano", "--image-size", 32, "--tokenizer",
        shapes / "tokenizer.json", "--batch-size", 8, "--steps", 6, "--warmup", 2, "--workers", 0,
        "--log-every", 1, "--precision", "fp32", "--device", DEVICE, "--out", out, *arguments)]


def train(shapes, out, *arguments, **more):
    return run("train_clip.py", *train_arguments(shapes, out, *arguments), **more)


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """A run long enough to tell the shapes apart."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    done = train(shapes, out, "--batch-size", 16, "--seed", 3, "--steps", 300, "--lr", "2e-3",
                 "--warmup", 10, "--wd", "0.1", fresh=True)
    assert done.returncode == 0, done.stderr
    return out


def losses(out):
    return [row["loss"] for row in read_jsonl(out / "metrics.jsonl")]


def without(command, *flags):
    """A command line without these flags and their values."""
    for flag in flags:
        at = command.index(flag)
        command = command[:at] + command[at + 2:]
    return command


def random_texts(n, longest=20, vocabulary=499):
    """n texts as ids; the last id of the vocabulary is the end token."""
    import torch
    lengths = torch.randint(3, longest, (n,)).tolist()
    return [torch.cat([torch.randint(1, vocabulary, (length,)), torch.tensor([vocabulary])])
            for length in lengths]


SEVERAL_RUNS = f"""
import functools, json, sys
sys.path.insert(0, {str(ROOT)!r})
import train_clip as T
from data import slip
slip.projection_head = functools.partial(slip.projection_head, hidden=64, out=16)
T.start_ranks = functools.cache(T.start_ranks)  # one process group for all of them
leave, T.dist.destroy_process_group = T.dist.destroy_process_group, lambda: None
for arguments in json.loads(sys.argv[1]):
    T.main(arguments)
if T.dist.is_initialized():
    leave()
"""


def run_cases(shapes, folder, ranks, cases):
    """Trains with each case's arguments, into folder/case, in `ranks` processes that start once."""
    commands = [train_arguments(shapes, folder / name, "--batch-size", 12, "--eps", "1e-2",
                                "--steps", 4, "--device", "cpu", *arguments)
                for name, arguments in cases.items()]
    commands = [without(command, "--tokenizer") if "--text-model" in command else command
                for command in commands]
    (folder / "several.py").write_text(SEVERAL_RUNS)
    done = run(folder / "several.py", json.dumps(commands), ranks=ranks, fresh=True)
    assert done.returncode == 0, done.stderr


def assert_same_runs(folder, cases, one):
    """folder/case has the losses and the weights of one/METHOD, whose -micro or -again it is."""
    import torch
    for case in cases:
        whole, out = one / case.removesuffix("-micro").removesuffix("-again"), folder / case
        np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-5, err_msg=case)
        a, b = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (whole, out))
        for part, name in ((part, name) for part in ("model", "head") for name in a[part]):
            torch.testing.assert_close(b[part][name], a[part][name], atol=2e-5, rtol=1e-4,
                                       msg=f"{case}: {name}")


class Places:
    """An image whose red is a pixel's column, whose green its row: a crop shows where it was."""

    size = 240, 180  # width, height

    def __init__(self):
        x, y = np.meshgrid(np.arange(self.size[0]), np.arange(self.size[1]))
        self.image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))

    def box_of(self, crop):
        """[S, S] crop -> left, top, width, height in pixels; a width below zero is a flip"""
        pixels = np.asarray(crop, float)
        S = len(pixels)
        w = (pixels[:, -2, 0] - pixels[:, 1, 0]).mean() * S / (S - 3)
        h = (pixels[-2, :, 1] - pixels[1, :, 1]).mean() * S / (S - 3)
        return pixels[:, :, 0].mean() - w / 2, pixels[:, :, 1].mean() - h / 2, w, h

    def features(self, boxes):
        left, top, w, h = np.array(boxes).T
        return {"area": w * h / self.size[0] / self.size[1], "ratio": np.log(w / h),
                "x": left + w / 2, "y": top + h / 2}


@pytest.fixture(scope="session")
def places():
    return Places()
