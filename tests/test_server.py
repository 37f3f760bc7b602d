"""--server: the three captioning stages with a stub that fails in every way that servers fail, and with a real server,
`transformers serve`. The stages run as a user runs them."""
import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from conftest import assert_mistake, read_jsonl, run
from test_stages import STAGES, assert_rows_kept, make_llama, make_llava, outputs, write_jsonl

OK = {"id": "1", "object": "text_completion"}
TRIAL = 1  # requests before the first row, to every server


# --- the stub ---------------------------------------------------------------------------------------------------------

def subject(body):
    """What a request is about: a row's texts, or the grey level of its image."""
    if "messages" not in body:
        return re.sub(" (=>|ASSISTANT:)$", "", re.split(r'\n|"The image"\. ', body["prompt"])[-1])
    head, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == "data:image/jpeg;base64" and image.format == "JPEG"
    return f"grey {np.asarray(image).mean() / 10:.0f}"


class Stub:
    """A server whose answers say what was asked. behave(subject, number of the request) returns None for such an answer, or

    {"text": ..., "finish_reason": ...}, another one; (status, bytes), a response that is none; bytes, all that is sent
    before the connection is closed."""

    def __init__(self, behave=lambda text, number: None, port=0):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    number = len(stub.requests)
                    stub.requests.append(SimpleNamespace(path=self.path, body=body, subject=subject(body), key=self.headers["Authorization"]))
                reply = behave(subject(body), number)
                if isinstance(reply, bytes):
                    self.wfile.write(reply)
                else:
                    self.send(*(reply if isinstance(reply, tuple) else (200, stub.answer(body, **(reply or {})))))

            def do_GET(self):
                self.send(200, b'{"version": "0.1-stub"}')

            def send(self, status, body):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        stub, self.requests, self.lock = self, [], threading.Lock()
        self.server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 256})(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def answer(self, body, text=None, finish_reason="stop"):
        text = f" {subject(body)}, seed {body['seed']}" if text is None else text
        if "messages" in body:
            return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}).encode()
        if "boat" in text:  # as of a server that goes on behind the newline
            text, finish_reason = text + "\nmore => of it", "length"
        return json.dumps({"choices": [{"text": text, "finish_reason": finish_reason}]}).encode()

    def vanish(self):
        self.server.shutdown()
        self.server.server_close()

    def subjects(self):
        return [request.subject for request in self.requests]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """rows.jsonl: 24 rows, 3 units. images/. sitecustomize.py, with which the scripts wait a 200th of the time."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "images").mkdir()
    rows = []
    for i in range(24):
        alt = [f"blue boat number {i}", None, f"old lamp number {i}"] if i % 6 == 1 else f"red bike number {i}"
        rows.append({"image": f"{i}.png", "alt": alt, "seen": f"{i} cats", "note": "x" * 6000})
        Image.new("L", (40, 30), 10 * i + 10).save(folder / "images" / f"{i}.png")
    rows[2] |= {"alt": "a </s><|im_end|> kite [INST]", "seen": "a <|im_start|> red </s> kite"}
    rows[3] |= {"alt": "", "image": "absent.png"}
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "sitecustomize.py").write_text("import threading\nwait = threading.Event.wait\n"
                                             "threading.Event.wait = lambda self, timeout=None: wait(self, timeout and timeout / 200)\n")
    return folder


def launch(folder, out, stage, servers, *more, **env):
    """A stage with rows.jsonl (later arguments win) -> CompletedProcess; --output is out/out.jsonl"""
    own = {"rewrite": ["--sources", "chatgpt", "coco"], "caption": ["--image-root", folder / "images"], "fuse": ["--vec-field", "seen"]}
    return run(STAGES[stage], "--input", folder / "rows.jsonl", "--output", out / "out.jsonl", "--model", "some/name", *own[stage],
               "--server", *(server if isinstance(server, str) else server.url for server in servers), *more,
               env={"PYTHONPATH": str(folder), "no_proxy": "127.0.0.1", **env})


def launch_well(folder, out, *arguments, **env):
    """-> the bytes of out.jsonl"""
    done = launch(folder, out, *arguments, **env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return (out / "out.jsonl").read_bytes()


@pytest.fixture(scope="module")
def happy(folder, tmp_path_factory):
    """What a server without faults makes. -> {stage: (its stub, the bytes, the rows, OUT.settings.json)}"""
    def make(stage):
        stub, out = Stub(), tmp_path_factory.mktemp(stage)
        data = launch_well(folder, out, stage, [stub], OPENAI_API_KEY="a key")
        return stub, data, read_jsonl(out / "out.jsonl"), json.loads((out / "out.jsonl.settings.json").read_text())
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(STAGES, pool.map(make, STAGES)))


# --- what is asked, and what comes of it ------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_every_row_gets_its_answer(stage, happy, folder):
    stub, _, rows, settings = happy[stage]
    assert_rows_kept(read_jsonl(folder / "rows.jsonl"), rows)
    assert settings["model"] == "some/name" and settings["servers"] == [{"version": "0.1-stub"}] and "a key" not in str(settings)
    assert {request.key for request in stub.requests} == {"Bearer a key"} and {request.body["model"] for request in stub.requests} == {"some/name"}
    if stage == "caption":
        assert [row["vec"] for row in rows] == [None if i == 3 else f"grey {i + 1}, seed 0" for i in range(24)]
        assert "FileNotFoundError" in rows[3]["error"]["vec"]
        return
    for i, row in enumerate(rows):
        expected = row["alt"] if isinstance(row["alt"], list) else "a kite" if i == 2 else row["alt"]
        if stage == "fuse":
            texts = {None: f"1. {i} cats"}
