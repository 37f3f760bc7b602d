"""data/baselines.py: EDA and back-translation as a user runs them, the operations against the paper, restarts, faults."""
import json
import os
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import DEVICE, assert_mistake
from data import baselines
from tiny_models import read_jsonl
from tools import run_tool, word_tokenizer, works

LICENCE = "  1 This is the licence, indented by two blanks\n  2 as WordNet's own files have it\n"
SYNSETS = {"noun": [["dog", "hound"], ["dog", "frank", "hot_dog"], ["goose", "Honker"], ["bike", "bicycle", "wheel"],
                    ["wall", "barrier"], ["mosque"], ["city", "town"]],
           "verb": [["ride", "sit"], ["dog", "chase"]], "adv": [],
           "adj": [["red(p)", "scarlet"], ["old", "aged"], ["the", "teh"]]}
IRREGULAR = {"noun": "geese goose\n", "verb": "rode ride\n", "adj": "", "adv": ""}


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory):
    """A dictionary in the format of wndb(5WN)."""
    folder = tmp_path_factory.mktemp("wordnet")
    for pos, synsets in SYNSETS.items():
        data, index = LICENCE, {}
        for words in synsets:
            for word in words:
                index.setdefault(word.split("(")[0].lower(), []).append(len(data))
            pairs = "".join(f"{word} 0 " for word in words)
            data += f"{len(data):08d} 05 {pos[0]} {len(words):02x} {pairs}001 @ 00000042 n 0000 | a gloss; \"dog eat dog\"  \n"
        lines = [f"{word} {pos[0]} {len(at)} 2 @ ~ {len(at)} 0 {' '.join(f'{i:08d}' for i in at)}  \n"
                 for word, at in sorted(index.items())]
        (folder / f"data.{pos}").write_text(data)
        (folder / f"index.{pos}").write_text(LICENCE + "".join(lines))
        (folder / f"{pos}.exc").write_text(IRREGULAR[pos])
    return folder


@pytest.fixture(scope="session")
def marians(tmp_path_factory):
    """Two random Marians whose tokens are words and whose texts end after a few of them."""
    from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

    folders = [tmp_path_factory.mktemp("marian") for _ in range(2)]
    words = ["a", "red", "bike", "by", "the", "old", "wall", "two", "dogs", *map(str, range(40))]
    inner, pad = word_tokenizer(["</s>", "<unk>", *words, "<pad>"], "</s>"), len(words) + 2
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = MarianMTModel(MarianConfig(
            vocab_size=pad + 1, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
            encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=512, pad_token_id=pad, init_std=1.0,
            decoder_start_token_id=pad, eos_token_id=0, forced_eos_token_id=0, tie_word_embeddings=False))
        with torch.no_grad():
            torch.nn.init.normal_(model.lm_head.weight)
            model.final_logits_bias[0, [0, 1, pad]] = torch.tensor([8.0, -99, -99])
        model.generation_config.update(num_beams=4, max_length=512, min_new_tokens=3)  # beams as the published; no empty texts
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


ROWS = ['{"image": "1.jpg", "alt": "A red bike by the old wall", "mine": [1, {"a": null}]}',
        '{"image": "2.jpg", "alt": ["two dogs, geese", null, "the mosque", " "], "error": {"vec": "no image"}}',
        "no JSON", "[1]", '{"image": "3.jpg"}', '{"image": "4.jpg", "alt": "mosque"}', '{"image": "5.jpg", "alt": "東京タワー"}',
        '{"image": "6.jpg", "alt": "\\ud800 red\\n bike\\u2028 </s>"}']


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(ROWS))  # no newline at the end
    return path


@pytest.fixture
def many(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"alt": f"a red bike {i % 40} by the old wall {i % 7}"}) + "\n" for i in range(800)))
    return path


@pytest.mark.parametrize("word, synonyms", [
    ("dog", ["chase", "frank", "hot dog", "hound"]),  # all senses, all parts of speech
    ("Dogs,", ["chase", "frank", "hot dog", "hound"]), ("geese", ["honker"]), ("honker", ["goose"]), ("cities", ["town"]),
    ("rode", ["sit"]), ("riding", ["sit"]), ("red", ["scarlet"]), ("older", ["aged"]), ("teh", ["the"]),
    *((word, []) for word in ("hot", "mosque", "the", "unheard", "!"))])
def test_synonyms(wordnet, word, synonyms):
    assert list(baselines.WordNet(wordnet).synonyms(word)) == synonyms


WORDS = [f"w{i}" for i in range(30)]


def synonyms(word):
    return (word + "+", word + "*") if word.startswith("w") and int(word[1:]) % 2 else ()


def changed(operation, words=WORDS, n=3, alpha=0.1, times=2000):
    rng = random.Random(0)
    return [operation(words, n, alpha, synonyms, rng) for _ in range(times)]


def test_replacement_changes_n_words_that_have_synonyms():
    places = Counter()
    for new in changed(baselines.replace_synonyms):
        at = [i for i, (a, b) in enumerate(zip(WORDS, new)) if a != b]
        assert len(new) == 30 and len(at) == 3 and all(new[i] in synonyms(WORDS[i]) for i in at)
        places.update(at)
    assert set(places) == set(range(1, 30, 2)) and max(places.values()) < 1.3 * min(places.values())
    assert baselines.replace_synonyms(["(a,", "b"], 5, 0.1, {"(a,": ("x",)}.get, random.Random(0)) == ["(x,", "b"]


def test_insertion_and_swap_happen_n_times():
    places = Counter()
    for new in changed(baselines.insert_synonyms):
        added = [i for i, word in enumerate(new) if word not in WORDS]
        assert len(added) == 3 and [word for word in new if word in WORDS] == WORDS
        places.update(added)
    assert {0, 32} <= set(places)
    moved = Counter(sum(a != b for a, b in zip(WORDS, new)) for new in changed(baselines.swap, n=1))
    assert moved == {2: 2000}
    assert all(sorted(new) == sorted(WORDS) for new in changed(baselines.swap))
    for operation, words in (baselines.insert_synonyms, ["w2", "w4"]), (baselines.swap, ["w1"]):
        assert changed(operation, words, n=1, times=1) == [words]  # no word has a synonym; no two words


def test_deletion_drops_every_word_with_probability_alpha():
    left = changed(baselines.delete)
    assert np.mean([len(new) for new in left]) == pytest.approx(27, abs=0.2)  # of 30; five standard errors
    assert all(new == [word for word in WORDS if word in new] for new in left)


@pytest.mark.parametrize("words, alpha, n", [(5, 0.1, 1), (19, 0.1, 1), (20, 0.1, 2), (20, 0.5, 10)])
def test_n_is_alpha_of_the_words(words, alpha, n, monkeypatch):
    monkeypatch.setattr(baselines, "OPERATIONS", [baselines.insert_synonyms] * 4)
    (new, _), = baselines.eda(" ".join(WORDS[:words]), 1, alpha, synonyms, random.Random(0))
    assert len(new.split()) == words + n


def test_eda_keeps_the_contract(rows, wordnet, tmp_path):
    assert "8 rows" in works("baselines", "eda", rows, tmp_path / "out.jsonl", "--wordnet", wordnet).stdout
    out = read_jsonl(tmp_path / "out.jsonl")
    fields = [f"rewrite_eda_{i}" for i in range(1, 5)]
    assert len(out) == len(ROWS) and (tmp_path / "out.jsonl").read_bytes().endswith(b"\n")
    first, listed, bad, number, none, alone, tokyo, broken = out
    assert first["mine"] == [1, {"a": None}] and list(first) == ["image", "alt", "mine", *fields]
    assert all(isinstance(first[field], str) and first[field] != first["alt"] for field in fields)
    assert "wall" in " ".join(first[field] for field in fields) and "A" in first[fields[0]].split()
    for field in fields:
        made = listed[field]
        assert len(made) == 4 and isinstance(made[0], str) and made[1] is made[3] is None
        assert listed["error"][field][1] == listed["error"][field][3] == "empty input" and listed["error"]["vec"] == "no image"
        assert none[field] is None and none["error"][field] == "empty input"
        assert alone[field] is None and alone["error"][field] == "no operation changes it"
        assert tokyo[field] is None and "blanks" in tokyo["error"][field]
        assert "\n" not in broken[field] and "\u2028" not in broken[field]
    assert bad["line"] == "no JSON" and "not JSON" in bad["error"]["line"] and number["line"] == "[1]"


def test_eda_depends_on_seed_source_and_place_alone(many, wordnet, tmp_path):
    lines = many.read_text().splitlines()
    changed = [*lines[:300], lines[300].replace("red", "old"), *lines[301:]]  # another text of the same length
    made = []
    for before, *more in (lines,), (changed,), (lines, "--seed", 1, "--n", 1):
        many.write_text("\n".join(before) + "\n")
        out = tmp_path / f"{len(made)}.jsonl"
        works("baselines", "eda", many, out, "--wordnet", wordnet, *more)
        made.append(read_jsonl(out))
    a, b, c = made
    assert [i for i, (one, other) in enumerate(zip(a, b)) if one != other] == [300]
    assert lines[0] == lines[280] and a[0] != a[280]  # the same caption elsewhere
    assert sum(one["rewrite_eda_1"] == other["rewrite_eda_1"] for one, other in zip(a, c)) < 200
    works("baselines", "eda", out, tmp_path / "d", "--wordnet", wordnet, "--source", "eda2", "--n", 2)  # beside it
    assert {"rewrite_eda_1", "rewrite_eda2_1", "rewrite_eda2_2"} <= set(read_jsonl(tmp_path / "d")[0])


def one_by_one(text, folders):
    """The naive twin: transformers' own greedy search, one text at a time, there and back again."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    for folder in folders:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
        ids = model.generate(**tokenizer(text, return_tensors="pt"), num_beams=1, do_sample=False, max_new_tokens=20,
                             max_length=None, forced_eos_token_id=None)[0]
        if 0 not in ids[1:].tolist():
            return None
        text = tokenizer.decode(ids, skip_special_tokens=True)
    return text or None


def test_greedy_is_transformers_own(many, marians, tmp_path):
    lines = many.read_text().splitlines()[:24]
    lines[3] = json.dumps({"alt": ["two dogs", "a red bike by the old wall " * 9]})
    (rows := tmp_path / "rows.jsonl").write_text("\n".join(lines))
    works("baselines", "back-translation", rows, tmp_path / "bt", "--there", marians[0], "--back", marians[1], "--n", 1,
          "--temperature", 0, "--dtype", "fp32", "--device", DEVICE, "--batch-size", 7, "--max-new-tokens", 20)
    texts = [json.loads(line)["alt"] for line in lines]
    made = [row["rewrite_backtranslation_1"] for row in read_jsonl(tmp_path / "bt")]
    assert made == [[one_by_one(entry, marians) for entry in text] if isinstance(text, list) else one_by_one(text, marians)
                    for text in texts]
    assert sum(isinstance(text, str) for text in made) > 12


def test_sampling(rows, marians, tmp_path):
    for name, *more in ("a",), ("b",), ("c", "--seed", 1):
        works("baselines", "back-translation", rows, tmp_path / name, "--there", marians[0], "--back", marians[1],
              "--n", 3, "--device", DEVICE, *more)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    first, *_, broken = read_jsonl(tmp_path / "a")
    fields = [f"rewrite_backtranslation_{i}" for i in (1, 2, 3)]
    assert len({first[field] for field in fields}) > 1
    assert all(word not in json.dumps(broken[field]) for field in fields for word in ("</s>", "<pad>"))


def test_the_original_again_is_null():
    model = SimpleNamespace(translate=lambda texts: [(text and "red bike", why) for text, why in texts])
    made = baselines.back_translate([("Red  bike", None), (None, "empty input"), ("a bike", None)], model, model)
    assert made == [(None, "identical"), (None, "empty input"), ("red bike", None)]


@pytest.mark.parametrize("file, content, words", [
    ("data.noun", "shorter by this {}", ["data.noun", "synset"]), ("index.verb", "ride verb\n", ["index.verb"])])
def test_a_damaged_wordnet_is_one_line(rows, wordnet, tmp_path, file, content, words):
    path = shutil.copytree(wordnet, tmp_path / "broken") / file
    path.write_text(content.format(path.read_text()[20:]))
    assert_mistake(run_tool("baselines", "eda", rows, tmp_path / "out.jsonl", "--wordnet", path.parent), *words)
    assert not (tmp_path / "out.jsonl").exists()


def test_other_settings_and_inputs_are_refused(rows, wordnet, tmp_path):
    out = tmp_path / "out.jsonl"
    command = "baselines", "eda", rows, out, "--wordnet", wordnet
    works(*command)
    before = out.read_bytes()
    assert_mistake(run_tool(*command, "--seed", 1), "seed = 0", "1")
    os.utime(rows, (1, 1))
    assert_mistake(run_tool(*command), "input_mtime_ns")
    again = "baselines", "eda", out, tmp_path / "again.jsonl", "--wordnet", wordnet
    assert_mistake(run_tool(*again), "rewrite_eda_1", "--source")
    (tmp_path / "out.jsonl.settings.json").unlink()
    assert_mistake(run_tool(*command), "nothing says")
    assert out.read_bytes() == before
