"""data/make_tokenizer.py: a tokenizer that frames every text itself."""
import json

from tokenizers import Tokenizer

from tools import works


def test_tokenizer_frames_every_text_itself(tmp_path):
    rows = [{"alt": "a red bike with old shoes", "rewrite_x": [f"blue boat {i}", None], "vec": 5} for i in range(200)]
    rows.append({"error": {"line": "not JSON"}, "line": "x"})
    (tmp_path / "in").write_text("\n".join(map(json.dumps, rows)))
    done = works("make_tokenizer", tmp_path / "in", tmp_path / "tokenizer.json", "--text", "alt", "rewrite_x", "vec",
                 "--vocab-size", 340)
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
