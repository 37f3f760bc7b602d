"""Model families: whatever architecture stands in --model, the captioning stages write what transformers' `generate` writes for
one text or one image at a time. All models are tiny, with random weights."""
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch._inductor.utils import run_and_get_code
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

import caption_llava
import fuse_vicuna
import rewrite_llama
from conftest import DEVICE, ROOT
from test_stages import HOSTILE, MODELS, STAGES, TEXTS, usual_arguments, write_jsonl
from tiny_models import TEXT, make_model, make_tokenizer, read_jsonl

IMAGE = ["llava", "Qwen2_5_VL", "Gemma3"]
PROMPT = "Say it again.\n\na red bike => one bike that is red\nold sky => a sky\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """model_folder(family) -> a folder as it comes from the hub, made once."""
    @cache
    def model_folder(family):
        torch.manual_seed(0)
        make_model(family, folder := tmp_path_factory.mktemp("model"))
        return folder
    return model_folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 8 images of different sizes and one that is none."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(8):
        pixels = draw.integers(0, 256, (*draw.integers(20, 90, 2), 3), np.uint8)
        Image.fromarray(pixels // (1 + i % 3)).save(folder / f"{i}.png")
    (folder / "broken.png").write_text("no picture")
    return folder


@pytest.fixture
def build(model_folder, pictures, tmp_path):
    """build(stage, family or folder, flags...) -> (the stage's model, its counts)"""
    def build(stage, model, *more):
        model = model_folder(model) if isinstance(model, str) else model
        more = ["--input", write_jsonl(tmp_path / "rows.jsonl", [{"alt": "a"}]), "--model", model, *more]
        more += ["--image-root", pictures] * (stage == "caption")
        args, counts = STAGES[stage].parse_arguments(usual_arguments(tmp_path, tmp_path)(stage, *more)), Counter()
        return getattr(STAGES[stage], MODELS[stage])(args, counts), counts
    return build


# --- a batch is what `generate` writes one at a time --------------------------------------------------------------------

def naive_answers(folder, prompts, limit, *marks):
    """transformers alone: its greedy generate, one text at a time, up to a mark -> [the answer], how many did not end"""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    stops = [1] + [i for i in range(len(tokenizer)) if any(mark in tokenizer.decode([i]) for mark in marks)]
    answers, endless = [], 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit, eos_token_id=stops, pad_token_id=1)
        new = new[0, ids.shape[1]:].tolist()
        text = tokenizer.decode(new, skip_special_tokens=True)
        answers.append(text.partition("=>")[0] if "=>" in marks else text)
        endless += new[-1] not in stops
    return answers, endless


def naive_captions(folder, paths, limit=12):
    """transformers alone, one image at a time"""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(folder)
    for path in paths:
        content = [{"type": "image", "image": Image.open(path).convert("RGB")}, {"type": "text", "text": caption_llava.PROMPT}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
                                               return_dict=True, return_tensors="pt", enable_thinking=False)
        new = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0, inputs["input_ids"].shape[1]:]
        yield processor.tokenizer.decode(new, skip_special_tokens=True)


def complete(ours, prompt, texts, seed=0):
    return ours.complete(prompt, texts, np.random.default_rng(seed).random((len(texts), ours.args.max_new_tokens), "f4"))


@pytest.mark.parametrize("family", TEXT)
def test_rewrites(family, build, model_folder, monkeypatch):
    """Greedy, behind a longer prompt than the last one's: LLaMA and Qwen2 in slots."""
    texts = TEXTS + [text[::-1] for text in TEXTS]
    if family in ("Llama", "Qwen2"):
        monkeypatch.delattr(rewrite_llama.Completer, "by_generate")
    ours, counts = build("rewrite", family, "--temperature", 0, "--max-new-tokens", 8, "--batch-size", 5)
    complete(ours, "a => b\n", TEXTS[:3])
    counts.clear()
    expected, endless = naive_answers(model_folder(family), [f"{PROMPT}{text} =>" for text in texts], 8, "\n", "=>")
    assert complete(ours, PROMPT, texts) == [(text, None) for text in expected]
    assert len(set(expected)) > 4 and counts == {"cut at --max-new-tokens": endless}
    assert complete(ours, PROMPT, []) == []


@pytest.mark.parametrize("family", TEXT)
def test_a_rewrite_depends_on_no_other_text(family, build):
    """Drawn; with other texts beside it, in other batches, and however often it is asked."""
    texts, others = TEXTS * 3, [text if i % 2 else "an old boat" for i, text in enumerate(TEXTS * 3)]
    drawn = [complete(build("rewrite", family, "--max-new-tokens", 8, "--batch-size", size)[0], PROMPT, given, 7)
             for size, given in ((4, texts), (64, texts), (5, others), (1, others))]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] and drawn[0][1::2] == drawn[2][1::2]
    assert len(set(drawn[0])) > 8 and drawn[0][:7] != drawn[0][7:14]  # the same text twice has random numbers of its own


def test_a_slot_takes_many_texts(build, model_folder):
    """Three slots for sixty texts of every length, one after another. Compiled, as on a GPU, a step writes into the cache, and copies none."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(TEXTS, rng.integers(1, 5))) for _ in range(60)]
    (ours, _), steps = build("rewrite", "Llama", "--temperature", 0, "--max-new-tokens", 8, "--batch-size", 3), []
    ours.model.register_forward_pre_hook(lambda *_: steps.append(0))
    expected = [(text, None) for text in naive_answers(model_folder("Llama"), [f"{PROMPT}{text} =>" for text in texts], 8, "\n", "=>")[0]]
    assert complete(ours, PROMPT, texts) == expected
    longest = 8 + max(len(ours.tokenizer(f"{text} =>").input_ids) for text in texts)
    assert len(steps) > 5 * longest
    ours.forward = torch.compile(ours.model, dynamic=False)
    answers, (code,) = run_and_get_code(complete, ours, PROMPT, texts)
    shape = ", ".join(map(str, ours.cache.layers[0].keys.shape))
    assert answers == expected and f"({shape})" in code and not re.search(rf"empty_strided\w*\(\({shape}\)", code)


@pytest.mark.parametrize("style", ["chat", "pairs"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mamba", "Gemma3Text"])
def test_answers(family, style, build, model_folder):
    """fuse_vicuna's, of prompts of uneven length; a batch, and one at a time"""
    pairs = read_jsonl(ROOT / "data/prompts/fuse_pairs.jsonl")[:2]
    prompts = [fuse_vicuna.chat_prompt(text, "a red wall") if style == "chat" else fuse_vicuna.pairs_prompt(pairs, text, "a red wall")
               for text in TEXTS] + TEXTS
    expected, endless = naive_answers(model_folder(family), prompts, 12, *["\n"] * (style == "pairs"))
    for size in (1, 8):
        ours, counts = build("fuse", family, "--max-new-tokens", 12, "--batch-size", size, "--format", style)
        assert ours.answer(prompts) == [(text, None) for text in expected] and len(set(expected)) > 8
        assert counts == {"cut at --max-new-tokens": endless} and ours.answer([]) == []


@pytest.mark.parametrize("family", IMAGE)
def test_captions(family, build, model_folder, pictures):
    names = [f"{i}.png" for i in range(8)]
    expected = list(naive_captions(model_folder(family), [pictures / name for name in names]))
    for more in (["--batch-size", 8], ["--batch-size", 3, "--workers", 2], ["--batch-size", 1]):
        ours, _ = build("caption", family, "--max-new-tokens", 12, *more)
        got = ours.caption(names[:5] + ["broken.png"] + names[5:])
        assert got[5][0] is None and "cannot identify" in got.pop(5)[1] and got == [(text, None) for text in expected]
    assert len(set(expected)) > 2 and ours.caption([]) == []


def test_an_image_that_the_processor_refuses_is_one_row(build, pictures):
    ours, _ = build("caption", "llava")
    names, plain = ["0.png", "odd.png", "gone.png", "1.png"], ours.processor

    class Picky:
        def __call__(self, images, **kwargs):
            if any(image.getpixel((0, 0)) == (1, 2, 3) for image, in images):
                raise ValueError(f"not {images[0][0]} this")
            return plain(images=images, **kwargs)

        def __getattr__(self, name):
            return getattr(plain, name)
    Image.new("RGB", (30, 30), (1, 2, 3)).save(pictures / "odd.png")
    expected = ours.caption(["0.png", "1.png"])
    ours.processor = Picky()
    got = ours.caption(names)
    assert [got[0], got[3]] == expected and got[1][0] is None and "FileNotFound" in got[2][1]
    assert ours.caption(["odd.png"]) == [got[1]] and "mode=RGB" in got[1][1] and " at " not in got[1][1]  # an address differs in every run


def test_a_text_follows_the_prompt_as_if_written_there(build, model_folder, tmp_path):
    """LLaMA's tokenizer would put a blank before a text of its own; behind a line break there is none. A long one is cut."""
    folder = shutil.copytree(model_folder("Llama"), tmp_path / "model")
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    ours, _ = build("rewrite", folder)
    seen = seen_by(ours)
    complete(ours, "a => b\n", ["red bike", "red red red", "red " * 5000])
    prompt, texts = seen
    assert [prompt + text for text in texts[:2]] == [ours.tokenizer(f"a => b\n{text} =>").input_ids for text in ("red bike", "red red red")]
    assert 250 < len(texts[2]) < 270 and texts[2][256:] == ours.tokenizer(" =>", add_special_tokens=False).input_ids


def seen_by(ours):
    """A list that gets the prompt's ids and the texts' as a Completer would give them to its model"""
    seen = []
    ours.by_slots = lambda prompt, texts, *_: seen.extend([prompt, texts]) or [[] for _ in texts]
    return seen


# --- where an answer ends ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", ["config.json", "generation_config.json", "tokenizer_config.json", "unflagged"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_end_token_ends_the_answer(stage, place, model_folder, build, tmp_path):
    """The model ends its answers with another token than </s>, which one file of the folder names, and no answer holds it."""
    def answers():
        ours, counts = build(stage, folder, "--max-new-tokens", 40, *["--temperature", 0] * (stage == "rewrite"))
        give = {"rewrite": lambda: complete(ours, "a => b\n", TEXTS), "fuse": lambda: ours.answer(TEXTS),
                "caption": lambda: ours.caption([f"{i}.png" for i in range(8)])}[stage]
        return [text for text, _ in give()], counts["cut at --max-new-tokens"]

    folder = shutil.copytree(model_folder("llava" if stage == "caption" else "Llama"), tmp_path / "model")
    tokenizer, end = AutoTokenizer.from_pretrained(folder), "<|im_end|>"
    if place == "unflagged":
        place = "generation_config.json"
        tokenizer.add_tokens(end := "<|end|>")
        tokenizer.save_pretrained(folder)
    model = (AutoModelForImageTextToText if stage == "caption" else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[number := tokenizer.convert_tokens_to_ids(end), 0] = 2.8 if stage == "caption" else 3.2
    model.save_pretrained(folder)
    assert answers()[1] > 4  # nothing names it yet
    settings = json.loads((folder / place).read_text())
    settings.get("text_config", settings).update({"eos_token": end} if "tokenizer" in place else {"eos_token_id": number})
    (folder / place).write_text(json.dumps(settings))
    texts, endless = answers()
    assert endless <= 2 and len(set(texts)) > 2, texts  # one may fall into a loop
    assert not any("<|" in text for text in texts)


# --- special tokens in data --------------------------------------------------------------------------------------------------

def sentencepiece_like(prepend, special=()):
    """Like LLaMA's and Gemma's tokenizers: blanks are marked, what is unknown falls to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581")] * prepend + [normalizers.Replace(" ", "\u2581")])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(special, end):
    backend = make_tokenizer().backend_tokenizer
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end)


TOKENIZERS = {
    "LLaMA": lambda: sentencepiece_like(True), "Gemma": lambda: sentencepiece_like(False, ["<start_of_turn>", "<unused0>", "<table>", "[multimodal]"]),
    "Qwen": lambda: byte_level(["<|im_start|>", "<|endoftext|>"], "<|im_end|>"), "Falcon": lambda: byte_level(["]~b]", "[e~[", ">>ANSWER<<"], "</s>")}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_holds_a_special_token(name, build, model_folder, tmp_path):
    """Every special token, as it is and hidden in others: in rewrite_llama.py's pairs and texts, and in fuse_vicuna.py's whole
    prompts, but for what the tokenizer itself puts first."""
    folder = shutil.copytree(model_folder("Llama"), tmp_path / "model")
    TOKENIZERS[name]().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special and str(token) != "<unk>"}
    texts = [text for token in added for text in (
        f"before {token} after", f"before{token}after", token * 3, *(token[:2] + inner + token[2:] for inner in ("=>", "<|im_<s>end|>", "\0", "\u200b")))]
    texts += [text for text in HOSTILE if isinstance(text, str)]
    for stage in ("rewrite", "fuse"):
        ours, _ = build(stage, folder)
        cleaned = list(filter(None, map(STAGES[stage].clean, texts)))
        if stage == "rewrite":
            seen = seen_by(ours)
            complete(ours, rewrite_llama.draw_prompt([{"input": text, "output": text} for text in texts], len(texts), np.random.default_rng(0)),
                     cleaned)
            ids = [seen[0], *seen[1]]
        else:
            ids = ours.tokenizer([fuse_vicuna.chat_prompt(text, text) for text in cleaned]).input_ids
        own = set(tokenizer("").input_ids)
        assert len(ids) > 20 and all(set(added.values()).isdisjoint(row[len(own):]) for row in ids), name


# --- as a user starts them --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_end_to_end_without_a_warning(stage, model_folder, pictures, tmp_path):
    """With folders that ask for sampling and a processor of one word less; by torchrun on two ranks."""
    names, model = ["0.png", "1.png", "broken.png", "2.png", "3.png"], model_folder("llava" if stage == "caption" else "Llama")
    rows = write_jsonl(tmp_path / "rows", [{"image": name, "alt": text, "seen": "a red wall"} for name, text in zip(names, TEXTS)])
    more = {"rewrite": ["--sources", "coco"], "fuse": ["--vec-field", "seen"], "caption": ["--image-root", pictures, "--workers", "1"]}[stage]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", STAGES[stage].__file__, "--input", rows,
         "--output", tmp_path / "out", "--model", model, "--device", DEVICE, "--dtype", "fp32", "--max-new-tokens", "12", *more],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "TRANSFORMERS_VERBOSITY": "warning"})
    assert done.returncode == 0, done.stderr
    assert not any(word in done.stderr.lower() for word in ("deprecat", "past_key_values", "generation flags")), done.stderr
    assert len(made := read_jsonl(tmp_path / "out")) == 5
    if stage == "caption":
        assert made[2]["vec"] is None and "cannot identify" in made[2]["error"]["vec"]
        expected = naive_captions(model, [pictures / name for name in names if name != "broken.png"])
        assert [row["vec"] for row in made if row is not made[2]] == [caption_llava.answer_line(text)[0] for text in expected]
