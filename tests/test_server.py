"""--server: the three captioning stages with a stub that fails in the ways in which servers fail, and with a real server,
`transformers serve`. The official client does the retries; here it makes one."""
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from PIL import Image

import caption_llava
import data.server
from conftest import DEVICE
from test_stages import STAGES, assert_one_line, assert_rows_kept, outputs, write_jsonl
from stub_server import Stub, image_of
from tiny_models import make_llama, make_llava, read_jsonl

FIELDS = {"rewrite": ["rewrite_chatgpt", "rewrite_coco"], "caption": ["vec"], "fuse": ["vecap"]}
SUBJECTS = {"rewrite": "red bike number {}", "caption": "grey {}", "fuse": "1. red bike number {} 2. {} cats"}  # of a row


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


@pytest.fixture
def launch(folder, tmp_path, monkeypatch):
    """launch(stage, stubs, flags...) -> the rows of OUT. Threads end with it, as with a process."""
    class Pool(ThreadPool):
        def __init__(self, *args):
            super().__init__(*args)
            pools.append(self)

    def launch(stage, stubs, *more):
        own = {"rewrite": ["--sources", "chatgpt", "coco"], "caption": ["--image-root", folder / "images"], "fuse": ["--vec-field", "seen"]}
        server = ["--server", *(getattr(stub, "url", stub) for stub in stubs)] if stubs else []
        try:
            STAGES[stage].main(list(map(str, [
                "--input", folder / "rows.jsonl", "--output", tmp_path / "out", "--model", "some/name", "--batch-size", 4, *own[stage],
                *server, *more])))
        finally:
            for pool in pools:
                pool.terminate()
                pool.join()
        return read_jsonl(tmp_path / "out")
    pools = []
    monkeypatch.setattr(data.server, "ThreadPool", Pool)
    monkeypatch.setattr(data.server, "RETRIES", 1)
    return launch


@pytest.fixture
def ends(launch, tmp_path, capfd):
    """ends(words..., stage, stubs, flags...): the launch ends with one line that has these words."""
    def ends(words, *arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            launch(*arguments)
        assert_one_line(end.value.code, capfd.readouterr().err, "--server", *words)
        assert not (tmp_path / "out").exists()
    return ends


def expected(stage, i):
    """The texts that the stub's answers give row i, in each field"""
    alts, vec = [f"blue boat number {i}", None, f"old lamp number {i}"] if i % 6 == 1 else [f"red bike number {i}"], f"{i} cats"
    alts, vec = {2: (["a kite"], "a red kite"), 3: ([None], vec)}.get(i, (alts, vec))
    return {"rewrite": alts, "caption": [f"grey {i}" if i != 3 else None],
            "fuse": [f"1. {alt} 2. {vec}" if alt else f"1. {vec}" for alt in alts]}[stage]


def assert_texts(stage, rows, but=None, *words):
    """All rows have their texts but row `but`, whose fields are null for a reason with these words."""
    for i, row in enumerate(rows):
        for field in FIELDS[stage]:
            texts = row[field] if isinstance(row[field], list) else [row[field]]
            assert texts == ([None] if i == but else [text and re.sub(r" \W*$", "", text) for text in expected(stage, i)]), (i, field)
            assert i != but or all(word in row["error"][field] for word in words), row["error"]
            assert i in (but, 3) or i % 6 == 1 or "error" not in row


# --- what is asked, and what comes of it ------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_every_row_gets_its_answer(stage, folder, launch, tmp_path, monkeypatch):
    """From two servers, in the right place; asked once, by what every server understands, without special tokens, and without the
    proxy that the environment names."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    stubs = [Stub(), Stub()]
    rows = launch(stage, [stubs[0].url + "/", stubs[1].url + "/v1/"], "--batch-size", 3)
    assert_rows_kept(read_jsonl(folder / "rows.jsonl"), rows)
    assert_texts(stage, rows)
    asked = [text for i in range(24) for text in expected(stage, i) if text] * len(FIELDS[stage])
    words = lambda texts: sorted(re.findall(r"\w+", text) for text in texts)
    assert words(request.subject for stub in stubs for request in stub.requests) == words(asked)
    assert abs(len(stubs[0].requests) - len(stubs[1].requests)) <= 1
    seeds = set()
    for request in stubs[0].requests + stubs[1].requests:
        body = request.body
        assert request.key == "Bearer a key" and body.pop("model") == "some/name" and body.pop("max_tokens") == (40 if stage == "caption" else 77)
        if stage == "caption":
            (message,) = body.pop("messages")
            assert message["role"] == "user" and message["content"][1] == {"type": "text", "text": caption_llava.PROMPT}
        else:
            prompt = body.pop("prompt")
            assert prompt.count(" => ") == 3 if stage == "rewrite" else " USER: Rephrase the following " in prompt
        assert request.path == ("/v1/chat/completions" if stage == "caption" else "/v1/completions")
        seeds.add(body.pop("seed", None))
        assert body == ({"temperature": 0.9, "top_p": 0.95, "stop": ["\n", "=>"]} if stage == "rewrite" else
                        {"temperature": 0, "chat_template_kwargs": {"enable_thinking": False}} if stage == "caption" else {"temperature": 0})
    assert len(seeds) == (len(asked) if stage == "rewrite" else 1)  # every text and source its own
    assert "a key" not in (tmp_path / "out.settings.json").read_text()


def test_as_many_requests_at_once_as_it_says(launch):
    """The stub answers four at a time, and never has a fifth."""
    four, room = threading.Barrier(4), threading.Semaphore(4)

    def behave(text, number):
        assert room.acquire(blocking=False)
        four.wait(20)
        room.release()
    assert_texts("caption", launch("caption", [Stub(lambda text, number: behave(text, number) if number < 8 else None)]), None)


@pytest.mark.parametrize("stage", ["caption", "fuse"])
def test_answers_of_every_kind(stage, launch, capfd):
    """Parts, null, a thought and an introduction; only "length" says that a text was cut."""
    parts = lambda text: [{"type": "text", "text": text}, {"type": "image"}] if stage == "caption" else text
    kinds = {5: ({"text": parts("old boat"), "finish_reason": "eos_token"}, "old boat"), 8: ({"text": None, "finish_reason": "end"}, None),
             9: ({"text": "<think>red</think>Sure:\n'old boat'", "finish_reason": None}, "old boat"), 10: ({"finish_reason": "length"}, ...),
             11: ({"text": "<think>red", "finish_reason": "length"}, None), 12: ({"finish_reason": "content_filter"}, None)}
    replies = {SUBJECTS[stage].format(i, i): reply for i, (reply, _) in kinds.items()}
    rows = launch(stage, [Stub(lambda text, number: replies.get(text))])
    assert [rows[i][FIELDS[stage][0]] for i, (_, text) in kinds.items() if text is not ...] == [text for _, text in kinds.values() if text is not ...]
    assert [rows[i]["error"][FIELDS[stage][0]].split()[-1] for i in (8, 11, 12)] == ["empty", "end", "filter"]
    assert re.search(r"\b2  cut at --max-new-tokens", capfd.readouterr().out)


def test_large_images_are_scaled(launch, tmp_path):
    """And stay upright"""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "large.jpg", exif=exif)
    rows = write_jsonl(tmp_path / "in", [{"image": "large.jpg"}])
    launch("caption", [stub := Stub()], "--input", rows, "--image-root", tmp_path)
    assert image_of(stub.requests[0].body).size == (512, 1024)


# --- faults -----------------------------------------------------------------------------------------------------------

FAULTS = [(429, {"error": {"message": "Rate limit"}}), (503, b"<html><body>Service Unavailable</body></html>"), (500, b""), b"",
          b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{", b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_that_passes_changes_nothing(stage, launch):
    stub = Stub(lambda text, number: FAULTS[number // 3] if number % 3 == 0 and number < 18 else None)
    assert_texts(stage, launch(stage, [stub], "--batch-size", 1))
    assert len(stub.requests) == len(FAULTS) + len(FIELDS[stage]) * sum(bool(text) for i in range(24) for text in expected(stage, i))


def test_a_server_that_asks_to_come_back_later(launch):
    stub = Stub(lambda text, number: (429, {"error": "busy"}, {"Retry-After": "2"}) if number == 0 else None)
    assert_texts("fuse", launch("fuse", [stub], "--batch-size", 1))
    assert stub.requests[1].time - stub.requests[0].time >= 1.9


@pytest.mark.parametrize("stage, code", [("rewrite", 400), ("caption", 413), ("fuse", 422)])
def test_a_refused_row(stage, code, launch):
    subject = SUBJECTS[stage].format(8, 8)
    stub = Stub(lambda text, _: (code, {"error": {"message": "too long"}}) if text == subject else None)
    assert_texts(stage, launch(stage, [stub]), 8, "refused by the server", str(code), "too long")
    assert [request.subject for request in stub.requests].count(subject) == len(FIELDS[stage])


def test_a_unit_of_refused_rows(launch):
    """A harmless request is answered, so the rows are at fault, not the server."""
    rows = launch("rewrite", [Stub(lambda text, _: None if text == "a photo of a dog" else (400, {"error": {"message": "too long"}}))])
    assert len(rows) == 24 and "too long" in str(rows[8]["error"]) and not any(isinstance(row[FIELDS["rewrite"][0]], str) for row in rows)


@pytest.mark.parametrize("stage, reply, words", [
    ("rewrite", (401, {"error": {"message": "no key"}}), ["401", "no key"]), ("fuse", (403, {"detail": "not you"}), ["403", "not you"]),
    ("caption", (404, {"message": "no such model"}), ["404", "no such model"]), ("fuse", (500, b"CUDA error"), ["500", "CUDA error"]),
    ("fuse", (400, {"error": {"message": "too old"}}), ["all", "too old"]), ("rewrite", (422, {"detail": "field"}), ["all", "field"]),
    ("fuse", (200, {"error": {"message": "out of memory"}}), ["out of memory"]), ("caption", (200, {"choices": []}), ["no choices"]),
    ("rewrite", (200, b"<html>"), []), ("fuse", (200, b"[]"), ["no choices"]), ("rewrite", b"", ["onnection"])])
@pytest.mark.parametrize("units", [0, 1])
def test_what_ends_the_launch(stage, reply, words, units, ends, launch):
    """One line, at once or after the first unit; and the same command goes on, with what is missing."""
    asked, first = (len(FIELDS[stage]) * sum(bool(text) for i in range(n) for text in expected(stage, i)) for n in (24, 11 * units))
    stub = Stub(lambda text, number: reply if number >= first else None)
    ends([stub.url, *words], stage, [stub])
    stub.requests.clear()
    stub.behave = lambda text, number: None
    assert_texts(stage, launch(stage, [stub]))
    assert len(stub.requests) == asked - first


def test_a_server_that_is_not_there(ends):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    ends([url, "onnection"], "rewrite", [url])
    ends(["localhost:8000", "http://"], "fuse", ["localhost:8000"])


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
        make_llava(folder / "llava", thinks=False)
        for _ in range(900):
            try:
                urllib.request.urlopen(url + "/health", timeout=5).close()
                break
            except OSError:
                with pytest.raises(subprocess.TimeoutExpired):  # it still runs
                    server.wait(0.1)
        yield url, folder
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("stage", STAGES)
def test_a_real_server_gives_what_the_stage_gives_without_it(stage, real, folder, launch, tmp_path):
    """Greedy. A server parses special tokens that it is sent, so the row with some may differ. The images are grey, which JPEG keeps."""
    url, models = real
    common = ["--model", models / ("llava" if stage == "caption" else "llama"), "--max-new-tokens", 12]
    common += ["--temperature", 0] * (stage == "rewrite") + ["--format", "pairs"] * (stage == "fuse")
    rows = launch(stage, [url], *common)
    expected = launch(stage, [], "--dtype", "fp32", "--device", DEVICE, "--output", tmp_path / "here", *common) and read_jsonl(tmp_path / "here")
    assert_rows_kept(read_jsonl(folder / "rows.jsonl"), rows)
    assert len({str(outputs(row)) for row in rows}) > 4
    assert sum(row == other for row, other in zip(rows, expected)) >= 22, (models / "log").read_text()[-5000:]
