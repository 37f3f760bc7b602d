"""data/make_pairs.py: each command on tiny data."""
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from conftest import DEVICE, assert_mistake, read_jsonl
from data import make_pairs
from tiny_models import make_llama
from tools import run_tool

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{{ '<|im_start|>' if add_generation_prompt }}{{ '<think>' if enable_thinking is undefined }}")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A random LLaMA with a chat template"""
    folder = tmp_path_factory.mktemp("chat")
    make_llama(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def rows(tmp_path):
    texts = [[f"red bike {i}", f"blue boat {i}"] if i % 2 else f"old house {i}" for i in range(200)]
    texts += [None, 3, [], {}, "one", "w " * 40, "a <|im_end|> b", "old house 0"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["no JSON", "[1]", '{"vec": "no alt"}', *(json.dumps({"alt": text}) for text in texts)]))
    return path


def draw(rows, number, seed=0):
    return make_pairs.draw_captions(SimpleNamespace(captions=rows, field="alt", seed=seed), number)


def make(tmp_path, *arguments):
    """-> the pairs as written"""
    path = tmp_path / f"pairs{len(list(tmp_path.glob('pairs*')))}.jsonl"
    make_pairs.main([*map(str, arguments), "--output", str(path)])
    return read_jsonl(path)


def test_chatbot(chat_folder, rows, tmp_path):
    command = ["chatbot", "--captions", rows, "--model", chat_folder, "--device", DEVICE, "--number", 6, "--source", "bard"]
    pairs = make(tmp_path, *command)
    assert len(pairs) == len({pair["input"] for pair in pairs}) == 6 and {pair["source"] for pair in pairs} == {"bard"}
    assert all(1 <= len(pair["output"].split()) <= 30 and "</s>" not in pair["output"] for pair in pairs)
    assert make(tmp_path, *command) == pairs != make(tmp_path, *command, "--seed", 1)
    make_llama(tmp_path / "bare")
    done = run_tool("make_pairs", *command, "--model", tmp_path / "bare", "--output", tmp_path / "out")
    assert done.returncode == 2 and "chat template" in done.stderr.splitlines()[-1], done.stderr


class Script:
    """Stands for a model: says the answers of a list one after another and keeps what it was asked."""
    device = "cpu"

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.asked = tokenizer, answers, []

    def generate(self, input_ids, **settings):
        self.asked.append(self.tokenizer.decode(input_ids[0]))
        answer = self.tokenizer(self.answers.pop(0), add_special_tokens=False, return_tensors="pt").input_ids
        return torch.cat([input_ids, answer.long()], 1)


def test_unusable_answers_are_drawn_again_once(chat_folder, rows, tmp_path, monkeypatch):
    captions, tokenizer = draw(rows, 24), AutoTokenizer.from_pretrained(chat_folder)
    thought = "<think>hm</think> Sure, here it is:\n\n\u201cTwo =>\tcups\u201d\nAnother<|im_end|>"
    script = Script(tokenizer, ["", "fine",  # 1: empty, then good
                                captions[1].upper() + ".", "w " * 31,  # 2: twice unusable
                                "Z" * make_pairs.MAX_NEW_TOKENS, thought,  # 3: cut at the limit, then good
                                "w " * 30])  # 4: thirty words are allowed
    monkeypatch.setattr(make_pairs, "load_chat_model", lambda args: (script, tokenizer))
    monkeypatch.setattr(make_pairs, "draw_captions", lambda *_: ["a <|im_end|> b", *captions])  # the first is not asked
    pairs = make(tmp_path, "chatbot", "--captions", rows, "--model", "any", "--number", 3)
    assert [(pair["input"], pair["output"]) for pair in pairs] == [
        (captions[0], "fine"), (captions[2], "Two cups"), (captions[3], ("w " * 30).strip())]
    sentence = "Rewrite this caption of an image vividly, and keep it less than thirty words: "
    assert list(dict.fromkeys(script.asked)) == [
        f"<|im_start|>user\n{sentence}{text}<|im_end|>\n<|im_start|>" for text in captions[:4]]


@pytest.mark.parametrize("answer, line, why", [
    ("a red bike", "a red bike", None), ("\n\n'A red bike.'\n", "A red bike.", None), ("hm</think>\n\nA bike", "A bike", None),
    ("<think>\nThe user wants ...\n</think>\n\nA red bike", "A red bike", None), ('"a" and "b"', '"a" and "b"', None),
    ("Here is the caption:\n**A red bike**", "**A red bike**", None), ("**Rewritten:**\n\n---\nA bike", "A bike", None),
    ("<think>\nThe user", None, "a thought without end"), ("五月的花", "五月的花", None),
    *((answer, None, "empty") for answer in ("Sure:", "...", ""))])
def test_how_an_answer_is_read(answer, line, why):
    assert make_pairs.answer_line(answer) == (line, why)


def test_drawn_captions_are_usable_and_every_row_has_its_chance(rows):
    drawn = draw(rows, 1000)
    assert len(set(drawn)) == len(drawn) == 201  # one a row; "old house 0" is there twice
    assert all(2 <= len(text.split()) <= 30 for text in drawn)
    first = [draw(rows, 1, seed)[0].split()[-1] for seed in range(600)]
    assert 220 < sum(text in map(str, range(100)) for text in first) < 380  # the first half of the rows: half the draws


@pytest.mark.parametrize("karpathy", [False, True])
def test_coco(karpathy, tmp_path):
    captions = [["only one", "only  one"], [], *([f"caption {j} of {i}\n" for j in range(5)] for i in range(2, 20))]
    data = {"annotations": [{"image_id": i, "caption": text} for i, texts in enumerate(captions) for text in texts]}
    if karpathy:
        splits = ["train", "restval", "val", "test"] * 5
        data = {"images": [{"filename": "x", "split": split, "sentences": [{"raw": text} for text in texts]}
                           for split, texts in zip(splits, captions)]}
    (tmp_path / "coco.json").write_text(json.dumps(data))
    command = "coco", tmp_path / "coco.json", "--number", 8
    groups = make(tmp_path, *command)
    drawn = [int(group["captions"][0].split()[-1]) for group in groups]
    assert len(set(drawn)) == 8 and not {0, 1} & set(drawn)
    assert groups == [{"source": "coco", "captions": [f"caption {j} of {i}" for j in range(5)]} for i in drawn]
    assert not karpathy or all(i % 4 < 2 for i in drawn)  # never an image on which retrieval is tested
    assert make(tmp_path, *command) == groups != make(tmp_path, *command, "--seed", 1)


def test_human(rows, tmp_path):
    empty = make(tmp_path, "human", "--captions", rows, "--number", 3)
    assert [pair["output"] for pair in empty] == [""] * 3 and {pair["source"] for pair in empty} == {"human"}
    command = "human", "--filled", tmp_path / "filled.jsonl"

    def fill(*outputs):
        lines = [json.dumps(pair | {"output": text}) + "\n" for pair, text in zip(empty, outputs)]
        command[2].write_text("".join(lines))

    fill("A red  bike, \u201cparked\u201d.", "two", "three")
    pairs = make(tmp_path, *command)
    assert [pair["output"] for pair in pairs] == ["A red bike, \u201cparked\u201d.", "two", "three"]
    assert [pair["input"] for pair in pairs] == [pair["input"] for pair in empty]
    for outputs, told in [(("one", " ", "three"), "line 2: the output is empty"), ((), "no pair"),
                          (("w " * 31,), "line 1: the output is too long"), ((3,), "line 1: expected an object"),
                          (("one", empty[1]["input"].upper()), "line 2: the output is identical")]:
        fill(*outputs)
        assert_mistake(run_tool("make_pairs", *command, "--output", tmp_path / "out"), told)
