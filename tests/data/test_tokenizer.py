"""data/make_tokenizer.py: a tokenizer that frames every text itself, and mistakes."""
import json
import random

from tokenizers import Tokenizer

from conftest import assert_mistake
from tools import run_tool

WORDS = ("red blue old small photo sale bike house cat dog tree river wall sky boat lamp with near under on "
         "the a of in and shoes best free 2021 new city").split()


def sentence(rng, least=1, most=9):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def write_jsonl(path, rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def test_tokenizer_frames_every_text_itself(tmp_path):
    rng = random.Random(0)
    rows = [{"alt": sentence(rng), "rewrite_x": [sentence(rng), None], "vec": 5} for _ in range(200)]
    rows.append({"error": {"line": "not JSON"}, "line": "x"})
    done = run_tool("make_tokenizer", write_jsonl(tmp_path / "in", rows), tmp_path / "tokenizer.json",
               "--text", "alt", "rewrite_x", "vec", "--vocab-size", 340)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 340 and "340 tokens" in done.stdout
    start, end = (tokenizer.token_to_id(f"<|{name}oftext|>") for name in ("start", "end"))
    assert (start, end) == (338, 339)
    for text in ("red bike", "", "Caf\u00e9 \U0001f431\u732b", "x" * 100, "\0\x07"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == start and ids[-1] == end and all(i < start for i in ids[1:-1])
        assert tokenizer.decode(ids).strip() == text.lower()
    assert tokenizer.encode(" Red\n BIKE\t").ids == tokenizer.encode("red bike").ids
    assert len(tokenizer.encode("red bike with shoes").ids) < 10  # the captions' words are learnt


def test_tokenizer_mistakes(tmp_path):
    write_jsonl(tmp_path / "in", [{"alt": "red bike", "n": 5}] * 3)
    write_jsonl(tmp_path / "broken", [b"{not json"] * 3)
    write_jsonl(tmp_path / "lists", [b"[1, 2]"] * 3)
    for arguments, word in ((["absent", "out"], "absent"), (["in", "out", "--text", "nothing"], "nothing"),
                            (["in", "out", "--vocab-size", "many"], "--vocab-size"), (["in"], "output"),
                            (["broken", "out"], "broken"), (["lists", "out"], "lists")):
        paths = [tmp_path / a if i < 2 else a for i, a in enumerate(arguments)]
        assert_mistake(run_tool("make_tokenizer", *paths), word)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
