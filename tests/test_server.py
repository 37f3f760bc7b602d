"""--server: the three captioning stages with a stub that fails in every way that servers fail, and with a real server,
`transformers serve`. The stages run in processes of their own, but wait only a 200th of the time between two tries."""
import base64
import io
import itertools
import json
import operator
import os
import re
import signal
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

import rewrite_llama
from caption_llava import PROMPT
from conftest import DEVICE, ROOT, assert_mistake, read_jsonl, run
from test_stages import STAGES, assert_rows_kept, make_llama, make_llava, outputs, write_jsonl

FIELDS = {"rewrite": ["rewrite_chatgpt", "rewrite_coco"], "caption": ["vec"], "fuse": ["vecap"]}
ROW_0 = {"rewrite": "red bike number 0", "caption": "grey 1", "fuse": "1. red bike number 0 2. 0 cats"}  # its subject


# --- the stub ---------------------------------------------------------------------------------------------------------

def subject(body):
    """What a request is about: a row's texts, or the grey level of its image."""
    if "messages" not in body:
        return re.sub(" (=>|ASSISTANT:)$", "", re.split(r'\n|"The image"\. ', body["prompt"])[-1])
    head, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == "data:image/jpeg;base64" and image.format == "JPEG"
    return f"grey {np.asarray(image).mean() / 10:.0f}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        stub, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = SimpleNamespace(path=self.path, body=body, key=self.headers["Authorization"], subject=subject(body))
        with stub.lock:
            number = len(stub.requests)
            stub.requests.append(request)
        reply = stub.behave(request.subject, number)
        if isinstance(reply, bytes):
            self.wfile.write(reply)
        else:
            self.send(*(reply if isinstance(reply, tuple) else (200, stub.answer(request, **(reply or {})))))

    def do_GET(self):
        self.send(200, b'{"version": "0.1-stub"}')

    def send(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Stub(ThreadingHTTPServer):
    """A server whose answers say what was asked, so that they are the same in any order. behave(subject, number of the
    request) returns None for such an answer, or {"text": ..., "finish_reason": ...}: another one, or (status, bytes): a
    response that is none, or bytes: all that is sent before the connection is closed."""
    request_queue_size = 256

    def __init__(self, behave=lambda text, number: None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.behave, self.requests, self.lock = behave, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def answer(self, request, text=None, finish_reason="stop"):
        text = f" {request.subject}, seed {request.body['seed']}" if text is None else text
        if "boat" in text:  # as of a server that leaves the stop in the text
            text, finish_reason = text + "\nmore => of it", "length"
        choice = {"message": {"content": text}} if "messages" in request.body else {"text": text}
        return json.dumps({"choices": [{**choice, "finish_reason": finish_reason}]}).encode()

    def vanish(self):
        self.shutdown()
        self.server_close()

    def subjects(self):
        """Of all requests but the first, the trial"""
        return [request.subject for request in self.requests[1:]]


# --- running a stage --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """rows.jsonl (24 rows, 3 units) and images/."""
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
    return folder


def command(folder, out, stage, servers, *more):
    own = {"rewrite": ["--sources", "chatgpt", "coco"], "caption": ["--image-root", folder / "images"],
           "fuse": ["--vec-field", "seen"]}
    return [STAGES[stage], "--input", folder / "rows.jsonl", "--output", out / "out.jsonl", "--model", "some/name", *own[stage],
            *["--server"][:len(servers)], *(getattr(server, "url", server) for server in servers), *more]


def launch(folder, out, *arguments, **env):
    """The stage, with out/out.jsonl as --output. Later arguments win. -> CompletedProcess"""
    return run(*command(folder, out, *arguments), env={"no_proxy": "127.0.0.1", **env}, first=["short_waits"])


def launch_well(folder, out, *arguments, **env):
    """-> the bytes of out.jsonl"""
    done = launch(folder, out, *arguments, **env)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return (out / "out.jsonl").read_bytes()


def assert_ended(done, *words):
    """Exit status 2 and one clear line, beside a progress bar."""
    assert_mistake(SimpleNamespace(returncode=done.returncode, stderr=re.sub(r"[^\r\n]*%\|[^\r\n]*", "", done.stderr)), *words)


def texts_of(rows):
    """All texts that the stage made, without the stub's ", seed N": what it was asked for. None for null."""
    return [text and text.split(", seed")[0] for row in rows for value in outputs(row).values()
            for text in (value if isinstance(value, list) else [value])]


@pytest.fixture(scope="module")
def happy(folder, tmp_path_factory):
    """What a server without faults makes. -> {stage: (the stub, the bytes, the rows, OUT.settings.json)}"""
    def make(stage):
        stub, out = Stub(), tmp_path_factory.mktemp(stage)
        data = launch_well(folder, out, stage, [stub], OPENAI_API_KEY="a key")
        return stub, data, read_jsonl(out / "out.jsonl"), json.loads((out / "out.jsonl.settings.json").read_text())
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(STAGES, pool.map(make, STAGES)))


# --- what is asked, and what comes of it ------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_every_row_gets_its_answer(stage, happy, folder):
    """The right answer in the right place, one line of it, of a text without markers of special tokens."""
    stub, _, rows, settings = happy[stage]
    assert_rows_kept(read_jsonl(folder / "rows.jsonl"), rows)
    for i, row in enumerate(rows):
        alts, vec = ["a kite"] if i == 2 else row["alt"] if i % 6 == 1 else [row["alt"]], "a red kite" if i == 2 else row["seen"]
        expected = {"rewrite": [alt or None for alt in alts], "caption": [f"grey {i + 1}" if i != 3 else None],
                    "fuse": [f"1. {alt} 2. {vec}" if alt else f"1. {vec}" for alt in alts]}[stage]
        assert texts_of([row]) == expected * len(FIELDS[stage])
    assert sorted(stub.subjects()) == sorted(filter(None, texts_of(rows)))  # each asked once
    assert settings["model"] == "some/name" and settings["servers"] == [{"version": "0.1-stub"}] and "a key" not in str(settings)


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_has_what_every_server_understands(stage, happy):
    requests = happy[stage][0].requests
    for path, key, body in ((request.path, request.key, request.body) for request in requests):
        assert key == "Bearer a key" and body["model"] == "some/name" and body["max_tokens"] == (40 if stage == "caption" else 77)
        if stage == "caption":
            assert path == "/v1/chat/completions" and set(body) == {"model", "messages", "max_tokens", "temperature", "seed"}
            message, = body["messages"]
            assert message["role"] == "user" and message["content"][1] == {"type": "text", "text": PROMPT}
            assert body["temperature"] == 0
        else:
            assert path == "/v1/completions" and body["stop"] == ["\n"]
            assert set(body) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop"}
            assert (body["temperature"], body["top_p"]) == ((0.9, 0.95) if stage == "rewrite" else (0, 1))
            assert body["prompt"].count(" => ") == 3 if stage == "rewrite" else " USER: Rephrase the following " in body["prompt"]
    if stage == "rewrite":  # every row and source its own
        assert len({request.body["seed"] for request in requests}) == len(requests)


def test_as_many_requests_at_once_as_it_says(folder, tmp_path):
    """The stub answers four at a time, and drops a fifth."""
    four, room = threading.Barrier(4), threading.Semaphore(4)

    def behave(text, number):
        if number:
            assert room.acquire(blocking=False)
            four.wait(20)
            time.sleep(0.05)  # in which a fifth would come
            room.release()
    stub = Stub(behave)
    launch_well(folder, tmp_path, "rewrite", [stub], "--concurrency", 4, "--limit", 11)
    assert len(stub.requests) == 1 + 2 * 12


# --- faults that pass -------------------------------------------------------------------------------------------------

FAULTS = {"busy": [(429, b'{"error": {"message": "Rate limit"}}'), (503, b"<html><body>Service Unavailable</body></html>"),
                   (500, b"")],
          "dropped": [b"", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{",
                      b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n"],
          "no answer": [(200, body) for body in (
              b"<p>", b"", b'{"choices": [{"te', b"\xff\xfe\0", b"null", b"[]", b"{}", b'{"choices": []}', b'{"choices": [null]}',
              b'{"choices": [{}]}', b'{"choices": [{"text": 5}]}', b'{"choices": [{"message": {"content": [7]}}]}')]}
WHEN = [*range(6), *range(8, 17)]  # the trial six times, then requests of the first unit


@pytest.mark.parametrize("stage, faults", [*(("rewrite", name) for name in FAULTS), ("caption", "all"), ("fuse", "all")])
def test_a_fault_that_passes_changes_nothing(stage, faults, happy, folder, tmp_path):
    replies, when = (FAULTS[faults], WHEN) if faults in FAULTS else (sum(FAULTS.values(), []), range(0, 40, 2))
    stub = Stub(lambda text, number: replies[when.index(number) % len(replies)] if number in when else None)
    assert launch_well(folder, tmp_path, stage, [stub]) == happy[stage][1]
    assert len(stub.requests) == len(happy[stage][0].requests) + len(when)


def test_slow_answers_are_waited_for(happy, folder, tmp_path):
    stub = Stub(lambda text, number: time.sleep(0.4 * (number in WHEN)))
    assert launch_well(folder, tmp_path, "rewrite", [stub]) == happy["rewrite"][1]
    assert len(stub.requests) == len(happy["rewrite"][0].requests)


# --- faults of one row ------------------------------------------------------------------------------------------------

def assert_only(i, stage, happy, out, *words):
    """All rows are as they should be but the first text of row i, null for a reason with these words."""
    rows, good = read_jsonl(out / "out.jsonl"), happy[stage][2]
    assert rows[:i] + rows[i + 1:] == good[:i] + good[i + 1:]
    for field in FIELDS[stage]:
        texts, reasons, expected = (value if isinstance(value, list) else [value]
                                    for value in (rows[i][field], rows[i]["error"][field], good[i][field]))
        assert texts == [None, *expected[1:]] and all(word in reasons[0] for word in words), reasons


@pytest.mark.parametrize("stage, code", [("rewrite", 400), ("caption", 413), ("fuse", 422)])
def test_a_refused_row(stage, code, happy, folder, tmp_path):
    row_7 = {"rewrite": "blue boat number 7", "caption": "grey 8", "fuse": "1. blue boat number 7 2. 7 cats"}[stage]
    stub = Stub(lambda text, _: (code, b'{"error": "too  long\\n"}') if text == row_7 else None)
    launch_well(folder, tmp_path, stage, [stub])
    assert_only(7, stage, happy, tmp_path, "refused by the server", str(code), "too long")
    assert stub.subjects().count(row_7) == len(FIELDS[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_without_text(stage, happy, folder, tmp_path):
    """Nothing but broken characters. A rewrite is drawn again, with another seed; its first answer does not end."""
    asked = Counter()

    def behave(text, _):
        asked[text] += 1
        if text == ROW_0[stage]:
            endless = stage == "rewrite" and asked[text] % 2
            return {"text": "and so on", "finish_reason": "length"} if endless else {"text": "\ufffd \ufffd"}
    stub = Stub(behave)
    launch_well(folder, tmp_path, stage, [stub])
    assert_only(0, stage, happy, tmp_path, "empty")
    seeds = [request.body["seed"] for request in stub.requests if request.subject == ROW_0[stage]]
    assert len(seeds) == len(set(seeds)) == (4 if stage == "rewrite" else 1)


@pytest.mark.parametrize("concurrency, late", [(2, False), (2, True), (1, False)])
def test_a_row_that_breaks_the_server(concurrency, late, happy, folder, tmp_path):
    """Row 0 always gets a 500. Others pass; or late, when it has had four; or none, since there is one request at a time."""
    four = threading.Event()

    def behave(text, number):
        if text == ROW_0["fuse"]:
            if stub.subjects().count(text) == 4:
                four.set()
            return 500, b"CUDA error"
        if late and "dog" not in text:  # a dog's is the trial
            four.wait(1)
            four.set()
    stub = Stub(behave)
    launch_well(folder, tmp_path, "fuse", [stub], "--concurrency", concurrency)
    assert_only(0, "fuse", happy, tmp_path, "500 CUDA error")
    assert 3 <= stub.subjects().count(ROW_0["fuse"]) <= 7


# --- faults that end the launch ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, first, code", [
    ("rewrite", 0, 401), ("caption", 0, 404), ("fuse", 0, 400), ("rewrite", 20, 403), ("fuse", 1, 400)])
def test_all_refused(stage, first, code, folder, tmp_path):
    """From request number `first` on: one line, and no more requests than the unit's source had left."""
    stub = Stub(lambda text, number: (code, b'{"error": {"message": "no such model"}}') if number >= first else None)
    done = launch(folder, tmp_path, stage, [stub], "--concurrency", 2)
    assert_ended(done, "--server", stub.url, str(code), "no such model")
    assert len(stub.requests) <= (25 if first else 1) and not (tmp_path / "out.jsonl").exists()


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
    made = [*filter(None, texts_of(row for part in (tmp_path / "out.jsonl.parts").glob("*/*") for row in read_jsonl(part)))]
    assert made and not (tmp_path / "out.jsonl").exists()
    stub = Stub(port=stub.server_port)
    assert launch_well(folder, tmp_path, stage, [stub]) == data
    assert sorted(stub.subjects() + made) == sorted(good.subjects())


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="its disk error is /proc's")
def test_a_disk_that_fails_under_an_image(folder, tmp_path):
    rows = write_jsonl(tmp_path / "in", [{"image": "mem@0+100"}])
    done = launch(folder, tmp_path, "caption", [Stub()], "--input", rows, "--image-root", "/proc/self")
    assert_ended(done, "Input/output error")


def test_ctrl_c(folder, tmp_path):
    """Requests that have not begun are not sent any more."""
    def behave(text, number):
        if number == 3:
            process.send_signal(signal.SIGINT)
        time.sleep(0.4 * (number >= 3))
    stub = Stub(behave)
    script, *arguments = command(folder, tmp_path, "rewrite", [stub], "--concurrency", 2)
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, arguments)], stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.wait(60) and len(stub.requests) < 8  # of 13 until the unit's first source is done


# --- several servers, and fusing --------------------------------------------------------------------------------------

def test_servers_share_the_work(happy, folder, tmp_path):
    stubs = [Stub(), Stub()]
    assert launch_well(folder, tmp_path, "rewrite", [stubs[0].url + "/", stubs[1].url + "/v1/"]) == happy["rewrite"][1]
    assert sorted(stubs[0].subjects() + stubs[1].subjects()) == sorted(happy["rewrite"][0].subjects())
    assert all(len(stub.requests) > 20 for stub in stubs)  # of 27 each and a trial


def test_one_takes_over_from_another(happy, folder, tmp_path):
    def behave(text, number):
        if number >= 6:
            stubs[0].vanish()
            return b""
    stubs = [Stub(behave), Stub()]
    assert launch_well(folder, tmp_path, "rewrite", stubs) == happy["rewrite"][1]
    assert len(stubs[1].requests) == len(happy["rewrite"][0].requests) - 5  # the other one answered five behind its trial


def test_seven_neighbours_that_vanish_do_not_end_the_launch(happy, folder, tmp_path):
    def behave(text, number):
        if number >= 3:
            for stub in stubs[:7]:
                stub.vanish()
            return b""
    stubs = [Stub(behave), *(Stub() for _ in range(8))]
    assert launch_well(folder, tmp_path, "rewrite", stubs) == happy["rewrite"][1]


def bare_server(monkeypatch, reply):
    """-> a Server without its __init__, whose post is reply(url, number of the request, wait); the URLs asked; the clock, which
    only waiting moves"""
    server, now, asked = object.__new__(rewrite_llama.Server), [0], []
    vars(server).update(urls=["http://a", "http://b", "http://c"], down={}, turns=itertools.count(), answered=0, refused=0, harmless={})
    wait = lambda seconds: now.__setitem__(0, now[0] + seconds)
    monkeypatch.setattr(rewrite_llama, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=wait))

    def post(url, request):
        asked.append(url)
        assert len(asked) < 2000
        return reply(url, len(asked), wait)
    server.post = post
    return server, asked, now


def test_servers_that_never_answer_end_the_launch(monkeypatch):
    """Each hangs until the time-out, when the others are no longer said to be down: a request does not go round for ever."""
    server, asked, _ = bare_server(monkeypatch, lambda url, number, wait: wait(300) or (0, "timed out"))
    with pytest.raises(ConnectionError, match="timed out"):
        server.ask(prompt="a")
    assert set(asked) == set(server.urls) and len(asked) < 50


@pytest.mark.parametrize("status", [0, 429, 503])
def test_nobody_answers_for_half_a_minute(status, monkeypatch):
    server, asked, now = bare_server(monkeypatch, lambda url, number, wait: (status, "no answer"))
    with pytest.raises(ConnectionError, match="no answer"):
        server.ask(prompt="a")
    assert set(asked) == set(server.urls) and 25 < now[0] < 40


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_as_long_as_others_are_answered(status, monkeypatch):
    """They are while this request waits, not in the moment in which the server says that it is busy."""
    def reply(url, number, wait):
        server.answered = int(now[0])  # one a second
        return (status, "busy") if now[0] < 300 else (200, "text")
    server, _, now = bare_server(monkeypatch, reply)
    assert server.ask(prompt="a") == "text" and now[0] >= 300


@pytest.mark.parametrize("status", [0, 500, 502])
def test_a_request_that_no_server_survives_ends_the_launch(status, monkeypatch):
    """Though others are answered all the time. Every server has it; the harmless request fares as badly."""
    def reply(url, number, wait):
        server.answered += 1
        return status, "gone"
    server, asked, now = bare_server(monkeypatch, reply)
    with pytest.raises(ConnectionError, match="gone"):
        server.ask(prompt="a")
    assert set(asked) == set(server.urls) and now[0] < 80


def test_one_thread_at_a_time_tries_a_server_that_was_down(monkeypatch):
    def reply(url, number, wait):
        if url == "http://a":
            until.append(server.down.get(url, 0) - now[0])
        return (0, "timed out") if url == "http://a" else (200, "text")
    (server, asked, now), until = bare_server(monkeypatch, reply), []
    for _ in range(3):
        assert server.ask(prompt="a") == "text"
        now[0] += 20.5
    assert server.ask(prompt="a") == "text" and until == [0, 300]  # meanwhile the others see it as down


def test_a_server_without_an_answer_is_the_last_to_be_asked_for_a_minute(monkeypatch):
    server, asked, now = bare_server(monkeypatch, lambda url, number, wait: (0, "gone") if url == "http://a" else (200, "text"))
    for _ in range(30):
        assert server.ask(prompt="a") == "text"
    assert asked.count("http://a") == 1 and min(asked.count("http://b"), asked.count("http://c")) > 8
    now[0] += 61
    for _ in range(3):
        server.ask(prompt="a")
    assert asked.count("http://a") == 2


def test_a_refusal_is_asked_again_with_the_vec_alone(folder, tmp_path):
    stub = Stub(lambda text, _: {"text": "I am sorry, I cannot do that."} if "number 0 2." in text or "4 cats" in text else None)
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
    """`transformers serve`, which loads the models that it is asked for. -> (its URL, the folder of llama/, llava/ and log)"""
    folder = tmp_path_factory.mktemp("real")
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with open(folder / "log", "w") as log:
        program, address = Path(sys.executable).with_name("transformers"), ["--host", "127.0.0.1", "--port", url[17:]]
        server = subprocess.Popen([program, "serve", "--device", "cpu", *address], stdout=log, stderr=log,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        make_llama(folder / "llama")
        make_llava(folder / "llava")
        for _ in range(600):
            try:
                urllib.request.urlopen(url + "/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield url, folder
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("stage", STAGES)
def test_a_real_server_gives_what_the_stage_gives_without_it(stage, real, folder, tmp_path):
    """Greedy, so nearly all rows are equal: the stage here has the tokenizer's own markers, and a server may say of an answer
    that ends with the last token that it was cut off. The images are grey, which JPEG keeps."""
    url, models = real
    common = ["--model", models / ("llava" if stage == "caption" else "llama"), "--max-new-tokens", 12]
    common += ["--temperature", 0] * (stage == "rewrite") + ["--format", "pairs"] * (stage == "fuse")
    (tmp_path / "here").mkdir()
    with ThreadPoolExecutor(2) as pool:
        here = pool.submit(launch_well, folder, tmp_path / "here", stage, [], "--dtype", "fp32", "--device", DEVICE, *common)
        launch_well(folder, tmp_path, stage, [url], *common)
        here.result()
    rows, expected = (read_jsonl(out / "out.jsonl") for out in (tmp_path, tmp_path / "here"))
    assert_rows_kept(read_jsonl(folder / "rows.jsonl"), rows)
    assert len(set(texts_of(rows))) > 4 and sum(map(operator.eq, rows, expected)) >= 20, (models / "log").read_text()[-5000:]


def test_every_row_refused(folder, tmp_path):
    """The harmless request passes, but no row does: after a hundred of them the launch ends."""
    stub = Stub(lambda text, _: None if "dog" in text else (400, b"too long"))
    rows = [{"alt": f"red bike {i}", "seen": "a wall"} for i in range(150)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(folder, tmp_path, "fuse", [stub], "--input", path)
    assert_ended(done, "refuses every row", "too long")


def test_a_url_without_a_scheme(folder, tmp_path):
    done = run("fuse_vicuna.py", "--input", folder / "rows.jsonl", "--output", tmp_path / "o", "--vec-field", "seen", "--server", "localhost:8000")
    assert_mistake(done, "--server localhost:8000", "http://")
