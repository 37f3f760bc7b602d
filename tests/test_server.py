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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from caption_llava import PROMPT
from conftest import assert_mistake, read_jsonl, run
from test_stages import STAGES, assert_rows_kept, make_llama, make_llava, outputs, write_jsonl

FIELDS = {"rewrite": ["rewrite_chatgpt", "rewrite_coco"], "caption": ["vec"], "fuse": ["vecap"]}


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


def assert_ended(done, *words):
    """Exit status 2 and one clear line, beside a progress bar."""
    assert_mistake(SimpleNamespace(returncode=done.returncode, stderr=re.sub(r"[^\r\n]*%\|[^\r\n]*", "", done.stderr)), *words)


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

def texts_of(rows):
    """All texts that the stage made, without the stub's ", seed N": what it was asked for."""
    return [text.split(", seed")[0] for row in rows for value in outputs(row).values()
            for text in (value if isinstance(value, list) else [value]) if text]


def expected(stage, row, i, alt):
    alt, vec = ("a kite", "a red kite") if i == 2 else (alt, row["seen"])
    return (alt or None) if stage == "rewrite" else f"1. {alt} 2. {vec}" if alt else f"1. {vec}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_row_gets_its_answer(stage, happy, folder):
    """The right answer in the right place, one line of it, of a text without a special token's marker."""
    stub, _, rows, settings = happy[stage]
    assert_rows_kept(read_jsonl(folder / "rows.jsonl"), rows)
    for i, row in enumerate(rows):
        texts = [texts_of([{field: row[field]}]) for field in FIELDS[stage]]
        if stage == "caption":
            assert texts == [[f"grey {i + 1}"] if i != 3 else []]
        else:
            alts = row["alt"] if isinstance(row["alt"], list) else [row["alt"]]
            assert texts == [[text for alt in alts if (text := expected(stage, row, i, alt))]] * len(texts)
    assert sorted(stub.subjects()[1:]) == sorted(texts_of(rows))  # each asked once, behind one trial
    assert settings["model"] == "some/name" and settings["servers"] == [{"version": "0.1-stub"}] and "a key" not in str(settings)


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_is_what_every_server_understands(stage, happy):
    requests = happy[stage][0].requests
    assert {request.key for request in requests} == {"Bearer a key"}
    for path, body in ((request.path, request.body) for request in requests):
        assert body["model"] == "some/name" and body["max_tokens"] == (40 if stage == "caption" else 77)
        if stage == "caption":
            assert path == "/v1/chat/completions" and set(body) == {"model", "messages", "max_tokens", "temperature", "seed"}
            message, = body["messages"]
            assert message["role"] == "user" and message["content"][1] == {"type": "text", "text": PROMPT} and body["temperature"] == 0
        else:
            assert path == "/v1/completions" and body["stop"] == ["\n"]
            assert set(body) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop"}
            assert (body["temperature"], body["top_p"]) == ((0.9, 0.95) if stage == "rewrite" else (0, 1))
            assert not re.search(r"</?s>|<\||\[/?INST", body["prompt"])
            assert body["prompt"].count(" => ") == 3 if stage == "rewrite" else " USER: Rephrase the following " in body["prompt"]
    if stage == "rewrite":  # every row and source its own
        assert len({request.body["seed"] for request in requests}) == len(requests)


def test_as_many_requests_at_once_as_it_says(folder, tmp_path):
    """The stub answers only four at a time."""
    barrier, lock, now, peak = threading.Barrier(4), threading.Lock(), [0], [0]

    def behave(text, number):
        if number:
            with lock:
                now[0] += 1
                peak[0] = max(now[0], peak[0])
            barrier.wait(20)
            with lock:
                now[0] -= 1
    launch_well(folder, tmp_path, "rewrite", [Stub(behave)], "--concurrency", 4, "--limit", 11)  # 12 texts, two sources
    assert peak == [4]


# --- faults that pass -------------------------------------------------------------------------------------------------

FAULTS = {"429": [(429, b'{"error": {"message": "Rate limit"}}')],
          "503 with HTML": [(503, b"<html><body>Service Unavailable</body></html>")],
          "dropped": [b""],
          "torn": [b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"choices": [', b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\n",
                   b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n"],
          "no JSON": [(200, b"<html>"), (200, b""), (200, b'{"choices": [{"te'), (200, b"\xff\xfe\0")],
          "other JSON": [(200, body) for body in (b"null", b"[]", b"7", b"{}", b'{"choices": []}', b'{"choices": [null]}', b'{"choices": [{}]}',
                                                  b'{"choices": [{"text": 5}]}', b'{"choices": [{"message": {"content": [{"text": "a"}]}}]}')]}
WHEN = [0, 1, 2, 3, 4, 5, 8, 9, 10]  # the first request, the trial, six times; then some of the first unit


@pytest.mark.parametrize("stage, faults", [*(("rewrite", name) for name in FAULTS), ("caption", "all"), ("fuse", "all")])
def test_a_fault_that_passes_changes_nothing(stage, faults, happy, folder, tmp_path):
    replies = sum(FAULTS.values(), []) if faults == "all" else FAULTS[faults]
    when = WHEN if faults != "all" else range(0, 2 * len(replies), 2)
    stub = Stub(lambda text, number: replies[when.index(number) % len(replies)] if number in when else None)
    assert launch_well(folder, tmp_path, stage, [stub]) == happy[stage][1]
    assert len(stub.requests) == len(happy[stage][0].requests) + len(when)


def test_slow_answers_are_waited_for(happy, folder, tmp_path):
    stub = Stub(lambda text, number: time.sleep(0.7 * (number in WHEN)))
    assert launch_well(folder, tmp_path, "rewrite", [stub]) == happy["rewrite"][1]
    assert len(stub.requests) == len(happy["rewrite"][0].requests)


# --- faults of one row ------------------------------------------------------------------------------------------------

def assert_only(i, stage, happy, out, *words):
    """All rows are as they should be but the first text of row i, null for a reason with these words."""
    rows, good = read_jsonl(out / "out.jsonl"), happy[stage][2]
    assert rows[:i] + rows[i + 1:] == good[:i] + good[i + 1:]
    for field in FIELDS[stage]:
        texts, reasons, kept = ([value] if not isinstance(value, list) else value for value in (rows[i][field], rows[i]["error"][field], good[i][field]))
        assert texts == [None, *kept[1:]] and all(word in reasons[0] for word in words), reasons


@pytest.mark.parametrize("stage, code", [("rewrite", 400), ("caption", 413), ("fuse", 422)])
def test_a_refused_row(stage, code, happy, folder, tmp_path):
    stub = Stub(lambda text, _: (code, b'{"error": "too  long\\n"}') if "boat number 7" in text or text == "grey 8" else None)
    launch_well(folder, tmp_path, stage, [stub])
    assert_only(7, stage, happy, tmp_path, "refused by the server", str(code), "too long")
    assert len(stub.requests) == len(happy[stage][0].requests)


@pytest.mark.parametrize("stage, reply, reason, times", [
    ("rewrite", {"text": "\ufffd \ufffd"}, "empty", 4), ("caption", {"text": "\ufffd \ufffd"}, "empty", 1), ("fuse", {"text": "\ufffd"}, "empty", 1),
    ("rewrite", {"text": "and so on and", "finish_reason": "length"}, "no end of line", 4)])
def test_an_answer_that_is_none(stage, reply, reason, times, happy, folder, tmp_path):
    """A rewrite is drawn again, with another seed."""
    about = {"rewrite": "red bike number 0", "caption": "grey 1", "fuse": "1. red bike number 0 2. 0 cats"}[stage]
    stub = Stub(lambda text, _: reply if text == about else None)
    launch_well(folder, tmp_path, stage, [stub])
    assert_only(0, stage, happy, tmp_path, reason)
    assert len({request.body["seed"] for request in stub.requests if request.subject == about}) == stub.subjects().count(about) == times


@pytest.mark.parametrize("concurrency, others", [(2, "pass"), (2, "pass late"), (1, "pass before and after")])
def test_a_row_that_breaks_the_server(concurrency, others, happy, folder, tmp_path):
    """Row 0 always gets a 500. The third one waits until others have passed; or they wait until it has had four."""
    asked, enough, passed = Counter(), threading.Event(), threading.Event()

    def behave(text, number):
        asked[poison := text.startswith("1. red bike number 0 ")] += 1
        if asked[True] == 4:
            enough.set()
        if asked[False] == 5:  # two at once: when the fifth is there, at least two behind the trial are answered
            passed.set()
        if poison and asked[True] == 3 and others == "pass":
            assert passed.wait(20)
        if not poison and number and others == "pass late":
            enough.wait(20)
        return (500, b"CUDA error") if poison else None
    launch_well(folder, tmp_path, "fuse", [Stub(behave)], "--concurrency", concurrency)
    assert_only(0, "fuse", happy, tmp_path, "500 CUDA error")
    assert others != "pass" or asked[True] == 3


# --- faults that end the launch ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, first, code", [("rewrite", 0, 401), ("caption", 0, 404), ("fuse", 0, 400), ("rewrite", 20, 403), ("fuse", 1, 400)])
def test_all_refused(stage, first, code, folder, tmp_path):
    """From the first request on, or later: one line, and no more requests than that unit and source had left."""
    stub = Stub(lambda text, number: (code, b'{"error": {"message": "no such model"}}') if number >= first else None)
    done = launch(folder, tmp_path, stage, [stub], "--concurrency", 2)
    assert_ended(done, "--server", stub.url, str(code), "no such model")
    assert len(stub.requests) <= (1 if first == 0 else 25) and not (tmp_path / "out.jsonl").exists()


def test_a_server_that_is_not_there(folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert_ended(launch(folder, tmp_path, "rewrite", [Stub(), url]), url, "refused")


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_disappears(stage, happy, folder, tmp_path):
    """Nothing is lost: the same command asks for what is missing, and its result is the same."""
    good, data, *_ = happy[stage]

    def behave(text, number):
        if number > 0.6 * len(good.requests):
            stub.vanish()
            return b""
    stub = Stub(behave)
    assert_ended(launch(folder, tmp_path, stage, [stub]), stub.url, "Nothing is lost")
    made = texts_of(row for part in (tmp_path / "out.jsonl.parts").iterdir() for row in read_jsonl(part))
    assert made and not (tmp_path / "out.jsonl").exists()
    stub = Stub(port=stub.server.server_port)
    assert launch_well(folder, tmp_path, stage, [stub]) == data
    assert sorted(stub.subjects()[1:] + made) == sorted(good.subjects()[1:])


# --- several servers --------------------------------------------------------------------------------------------------

def test_servers_share_the_work(happy, folder, tmp_path):
    stubs = [Stub(), Stub()]
    assert launch_well(folder, tmp_path, "rewrite", [stubs[0].url + "/", stubs[1].url + "/v1/"]) == happy["rewrite"][1]
    assert sorted(stubs[0].subjects()[1:] + stubs[1].subjects()[1:]) == sorted(happy["rewrite"][0].subjects()[1:])
    assert all(len(stub.requests) > 20 for stub in stubs)  # of 27 each and a trial


@pytest.mark.parametrize("dead", [0, 1])
def test_one_takes_over_from_another(dead, happy, folder, tmp_path):
    def behave(text, number):
        if number >= 6:
            stubs[dead].vanish()
            return b""
    stubs = [Stub(), Stub()]
    stubs[dead] = Stub(behave)
    assert launch_well(folder, tmp_path, "rewrite", stubs) == happy["rewrite"][1]
    assert len(stubs[1 - dead].requests) == len(happy["rewrite"][0].requests) - 5  # the dead one answered five behind its trial


# --- fusing -----------------------------------------------------------------------------------------------------------

def test_a_refusal_is_asked_again_with_the_vec_alone(happy, folder, tmp_path):
    def behave(text, _):
        if "bike number 0 2." in text or "4 cats" in text:
            return {"text": "I am sorry, I cannot do that."}
    stub = Stub(behave)
    launch_well(folder, tmp_path, "fuse", [stub], "--prompt", "Merge these:", "--limit", 6)
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert rows[0]["vecap"] == "1. 0 cats, seed 0" and "error" not in rows[0]
    assert rows[4]["vecap"] is None and rows[4]["error"] == {"vecap": "refused"}
    prompts = [request.body["prompt"] for request in stub.requests]
    assert sum(" USER: Merge these: 1. red bike number 0 2. 0 cats ASSISTANT:" in prompt for prompt in prompts) == 1
    assert sum(prompt.endswith(" 1. 0 cats ASSISTANT:") for prompt in prompts) == 1
    assert not any("Rephrase the following two" in prompt for prompt in prompts)


# --- a real server ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """`transformers serve`, with small models. -> (its URL, the folder of llama/ and llava/, a file with its log)"""
    folder = tmp_path_factory.mktemp("real")
    make_llama(folder / "llama")
    make_llava(folder / "llava")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", str(port),
                                   "--device", "cpu"], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            time.sleep(0.1)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}", folder, folder / "log"
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("stage", STAGES)
def test_a_real_server_gives_what_the_stage_gives_without_it(stage, real, folder, tmp_path):
    """Greedy, so the same texts; the images are grey, so a JPEG is the same image."""
    url, models, log = real
    common = ["--model", models / ("llava" if stage == "caption" else "llama"), "--max-new-tokens", 12]
    common += ["--temperature", 0] * (stage == "rewrite") + ["--format", "pairs"] * (stage == "fuse")
    (tmp_path / "here").mkdir()
    launch_well(folder, tmp_path, stage, [url], *common)
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert_rows_kept(read_jsonl(folder / "rows.jsonl"), rows)
    assert len(set(texts_of(rows))) > 3, log.read_text()[-5000:]
