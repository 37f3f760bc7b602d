"""data/make_pairs.py: each command on tiny data."""
import json
from types import SimpleNamespace

import pytest
import torch

from conftest import DEVICE, read_jsonl
from data import make_pairs

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A random LLaMA whose tokens are words, with a chat template. Its answers are random words that end some day."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat")
    words = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(60)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<|im_end|>",
                                        additional_special_tokens=["<|im_start|>"], chat_template=TEMPLATE)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False))
    with torch.no_grad():  # one coordinate is constant, so the head's weight there makes ends likelier
        model.model.embed_tokens.weight[:, 0] = 4
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[2, 0] = 0.7
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
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
    """In this process. -> the pairs as written, and what rewrite_llama.py takes of each"""
    path = tmp_path / f"pairs{len(list(tmp_path.glob('pairs*')))}.jsonl"
    make_pairs.main([*map(str, arguments), "--output", str(path)])
    pairs = read_jsonl(path)
    return pairs, [pair.get("captions") or (pair["input"], pair["output"]) for pair in pairs]


def test_chatbot(chat_folder, rows, tmp_path, capsys):
    command = ["chatbot", "--captions", rows, "--model", chat_folder, "--device", DEVICE, "--number", 6]
    pairs, read = make(tmp_path, *command, "--source", "bard")
    assert len(pairs) == 6 and {pair["source"] for pair in pairs} == {"bard"}
    assert read == [(pair["input"], pair["output"]) for pair in pairs] and len({pair["input"] for pair in pairs}) == 6
    assert all(1 <= len(pair["output"].split()) <= 30 and "im_" not in pair["output"] for pair in pairs)
    printed = capsys.readouterr().out
    assert all(f"{pair['input']} => {pair['output']}\n" in printed for pair in pairs) and "Read them" in printed
    assert make(tmp_path, *command, "--source", "bard")[0] == pairs
    assert make(tmp_path, *command, "--source", "bard", "--seed", 1)[0] != pairs


class Script:
    """Stands for model and tokenizer: says the answers of a list one after another and keeps what it was asked."""
    chat_template, eos_token_id, device = TEMPLATE, 0, "cpu"

    def __init__(self, answers):
        self.answers, self.asked, self.settings = answers, [], []

    all_special_tokens = ["<|im_end|>", "<think>"]

    def get_added_vocab(self):
        return {"<|im_end|>": 0}

    def apply_chat_template(self, messages, enable_thinking, **settings):
        assert enable_thinking is False  # Qwen3's and others' templates know it; others ignore it
        self.asked.append(messages)
        return type("Ids", (dict,), {"to": lambda self, device: self})(input_ids=torch.zeros(1, 3, dtype=torch.long))

    def generate(self, input_ids, **settings):
        self.settings.append(settings)
        self.answer, length = self.answers.pop(0) if self.answers else ("good answer", 5)
        return torch.zeros(1, 3 + length, dtype=torch.long)

    def decode(self, ids, **settings):
        return self.answer


def test_unusable_answers_are_drawn_again_once(rows, tmp_path, monkeypatch, capsys):
    captions = draw(rows, 24)
    script = Script([("", 1), ("fine", 5),  # 1: empty, then good
                     (captions[1].upper() + ".", 5), ("w " * 31, 40),  # 2: twice unusable
                     ("cut at the limit", 77), ("<think>hm</think> Sure, here it is:\n\n\u201cTwo =>\tcups\u201d\nAnother<|im_end|>", 9),  # 3
                     ("w " * 30, 30)])  # 4: thirty words are allowed
    monkeypatch.setattr(make_pairs, "load_chat_model", lambda args: (script, script))
    pairs, _ = make(tmp_path, "chatbot", "--captions", rows, "--model", "any", "--number", 3)
    assert [(pair["input"], pair["output"]) for pair in pairs] == [
        (captions[0], "fine"), (captions[2], "Two cups"), (captions[3], ("w " * 30).strip())]
    sentence = "Rewrite this caption of an image vividly, and keep it less than thirty words: "
    assert list(dict.fromkeys(messages[0]["content"] for messages in script.asked)) == [sentence + text for text in captions[:4]]
    assert not any("im_end" in messages[0]["content"] for messages in script.asked)


@pytest.mark.parametrize("answer, line, why", [
    ("a red bike", "a red bike", None), ("\n\n'A red bike.'\n", "A red bike.", None), ("hm</think>\n\nA bike", "A bike", None),
    ("<think>\nThe user wants ...\n</think>\n\nA red bike", "A red bike", None), ("<think>\nThe user", None, "a thought without end"),
    ("Here is the caption:\n**A red bike**", "**A red bike**", None), ("**Rewritten:**\n\n---\nA bike", "A bike", None),
    ("Sure:", None, "empty"), ('"a" and "b"', '"a" and "b"', None), ("...", None, "empty"), ("", None, "empty"), ("五月的花", "五月的花", None)])
def test_how_an_answer_is_read(answer, line, why):
    assert make_pairs.answer_line(answer) == (line, why)


def test_drawn_captions_are_usable_and_every_row_has_its_chance(rows):
    drawn = draw(rows, 1000)
    assert len(set(drawn)) == len(drawn) == 201  # one a row; "old house 0" is there twice
    assert all(2 <= len(text.split()) <= 30 for text in drawn)
    first = [draw(rows, 1, seed)[0].split()[-1] for seed in range(600)]
    assert 220 < sum(text in map(str, range(100)) for text in first) < 380  # the first half of the rows: half the draws


def coco_json(path, karpathy=False):
    captions = [[f"caption {j} of {i}\n" for j in range(5)] for i in range(20)]
    captions[0], captions[1] = ["only one", "only  one"], []
    splits = ["train", "restval", "val", "test"]
    data = {"images": [{"filename": "x", "split": splits[i % 4], "sentences": [{"raw": text} for text in texts]}
                       for i, texts in enumerate(captions)]} if karpathy else {
        "annotations": [{"image_id": i, "caption": text} for i, texts in enumerate(captions) for text in texts]}
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("karpathy", [False, True])
def test_coco(karpathy, tmp_path, capsys):
    path = coco_json(tmp_path / "coco.json", karpathy)
    groups, read = make(tmp_path, "coco", path, "--number", 8)
    assert {group["source"] for group in groups} == {"coco"} and read == [group["captions"] for group in groups]
    drawn = [int(group["captions"][0].split()[-1]) for group in groups]
    assert len(set(drawn)) == 8 and not {0, 1} & set(drawn)
    assert all(group["captions"] == [f"caption {j} of {i}" for j in range(5)] for i, group in zip(drawn, groups))
    assert not karpathy or all(i % 4 < 2 for i in drawn)  # never an image on which retrieval is tested
    assert make(tmp_path, "coco", path, "--number", 8)[0] == groups
    assert make(tmp_path, "coco", path, "--number", 8, "--seed", 1)[0] != groups
    assert "Read them" in capsys.readouterr().out


def test_human(rows, tmp_path, capsys):
    empty, _ = make(tmp_path, "human", "--captions", rows, "--number", 3)
    assert [pair["output"] for pair in empty] == [""] * 3 and {pair["source"] for pair in empty} == {"human"}
    assert "Fill in every output" in capsys.readouterr().out
    filled = tmp_path / "filled.jsonl"

    def fill(*outputs):
        filled.write_text("".join(json.dumps(pair | {"output": text}) + "\n" for pair, text in zip(empty, outputs)))

    fill("A red  bike, \u201cparked\u201d.", "two", "three")
    pairs, read = make(tmp_path, "human", "--filled", filled)
    assert [text for _, text in read] == ["A red bike, \u201cparked\u201d.", "two", "three"]
    assert [text for text, _ in read] == [pair["input"] for pair in empty]
    for outputs, told in [(("one", " ", "three"), "line 2: the output is empty"), ((), "no pair"),
                          (("w " * 31,), "line 1: the output is too long"), ((3,), "line 1: expected an object"),
                          (("one", empty[1]["input"].upper()), "line 2: the output is identical")]:
        fill(*outputs)
        with pytest.raises(SystemExit) as stop:
            make(tmp_path, "human", "--filled", filled)
        assert stop.value.code == 2 and told in capsys.readouterr().err


def test_mistakes(chat_folder, rows, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "plain").mkdir()
    for path in chat_folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / "plain" / path.name).write_bytes(path.read_bytes())
    coco_json(tmp_path / "coco.json")
    for arguments, told in [([], "COMMAND"), (["robot", "--output", out], "robot"), (["coco", tmp_path / "coco.json"], "--output"),
            (["human", "--output", out], "--captions"), (["human", "--captions", rows, "--output", rows], "exists"),
            (["human", "--captions", rows, "--output", tmp_path / "no" / "out"], "folder"),
            (["human", "--captions", tmp_path / "gone", "--output", out], "No such file"),
            (["human", "--captions", rows, "--filled", rows, "--output", out], "not allowed"),
            (["human", "--captions", rows, "--field", "title", "--output", out], "'title'"),
            (["human", "--captions", rows, "--number", 0, "--output", out], "--number"),
            (["coco", tmp_path / "coco.json", "--number", 19, "--output", out], "18 images"),
            (["coco", tmp_path / "list.json", "--output", out], "neither"), (["coco", tmp_path / "no.json", "--output", out], "neither"),
            (["coco", tmp_path / "gone.json", "--output", out], "No such file"), (["chatbot", "--captions", rows, "--output", out], "--model"),
            (["chatbot", "--captions", rows, "--model", tmp_path / "gone", "--output", out], "--model"),
            (["chatbot", "--captions", rows, "--model", tmp_path / "plain", "--output", out], "chat template")]:
        with pytest.raises(SystemExit) as stop:
            make_pairs.main([str(argument) for argument in arguments])
        error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert stop.value.code == 2 and len(error) == 1 and told in error[0], (arguments, error)
        assert not out.exists()
