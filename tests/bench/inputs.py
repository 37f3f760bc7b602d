"""What the benchmarks train on, made on the spot and always the same: pictures, captions, OpenAI's tokenizer.json."""
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_clip as T  # noqa: E402
from data.rows import read_rows  # noqa: E402

FIELDS = ["alt", "rewrite_chatgpt", "rewrite_bard", "rewrite_coco", "rewrite_human"]
AHEAD = 6  # batches behind the last measured one: the workers are busy to the end


def photograph(rng, width, height):
    """To a decoder like a photograph: smooth colours, a finer texture, a sensor's noise."""
    pixels = 128 + rng.normal(0, 9, (height, width, 1))
    for cells, strength in ((5, 60), (width // 16, 12)):
        field = (128 + rng.normal(0, strength, (cells, cells, 3))).clip(0, 255).astype(np.uint8)
        pixels = pixels + np.asarray(Image.fromarray(field).resize((width, height), Image.BICUBIC), np.float32) - 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def openai_tokenizer():
    """OpenAI CLIP's tokenizer.json, from the vocabulary and merges inside the open_clip package."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer
    theirs = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): i for token, i in theirs.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(theirs.bpe_ranks)).backend_tokenizer.to_str()


def caption(rng, tokenizer, names):
    """Of 8 to 16 tokens, start and end included, each length as likely as the others."""
    forms = ["a {} and a {}", "{}, {} and {}", "an old {} next to a {}", "the {} of a {} in a {}"]
    length = rng.integers(8, 17)
    while len(tokenizer.encode(text := rng.choice(forms).format(*rng.choice(names, 3)))) != length:
        pass
    return text


def captions(rng, n):
    """As people caption photographs, 6 to 16 words"""
    who = ["a man", "two women", "a brown dog", "a young girl in a red coat", "several people", "an old couple", "a black and white cat",
           "a small boat", "a yellow bus", "three children"]
    does = ["sitting on a bench", "walking along the beach", "standing next to a tree", "lying on a wooden floor", "looking at the camera",
            "waiting at a crossing", "under a large umbrella", "crossing a bridge", "in front of a brick wall"]
    where = ["", "in the snow", "at sunset", "on a busy street", "near a lake with mountains behind it", "in a park with many other people",
             "while it is raining"]
    return [" ".join(f"{rng.choice(who)} {rng.choice(does)} {rng.choice(where)}".split()) for _ in range(n)]


def titles(rng, n):
    """As web pages title images: a thing, up to three adjectives, up to three phrases that shops and stock photos add"""
    adjectives = "vintage handmade blue wooden modern antique large soft rustic premium outdoor leather ceramic floral organic".split()
    things = ["coffee table", "wedding dress", "running shoes", "garden chair", "bedroom with white walls", "mountain lake at sunset",
              "chocolate cake recipe", "golden retriever puppy", "wrist watch", "red sports car", "city skyline", "birthday card"]
    phrases = ["for sale in Denver, CO", "with free shipping", "stock photo", "ideas for small spaces", "by John Miller",
               "- royalty free vector illustration", "2019 model, 2 owners", "how to make it in 5 easy steps", "| Etsy",
               "and accessories for women, men & kids", "from the 1960s, signed by the artist", "wallpaper HD 1920x1080"]
    some = lambda words: rng.sample(words, rng.choice([0, 1, 1, 2, 3]))
    return [" ".join([*some(adjectives), rng.choice(things), *some(phrases)]).capitalize() for _ in range(n)]


def make_data(folder, batch_size, warmup, steps):
    """For one pass of a run: images/, tokenizer.json, short.jsonl and mixed.jsonl; short.tsv for open_clip."""
    from open_clip import IMAGENET_CLASSNAMES, tokenize
    rng, n, measured = np.random.default_rng(0), batch_size * (warmup + steps + AHEAD), batch_size * steps
    (folder / "tokenizer.json").write_text(openai_tokenizer())
    tokenizer = T.Tokenizer.load(str(folder / "tokenizer.json"))
    (folder / "images").mkdir()
    rows = []
    for i in range(n):
        photograph(rng, 640, 480).save(folder / "images" / f"{i}.jpg", quality=88)
        rows.append({"image": f"{i}.jpg"} | {field: caption(rng, tokenizer, IMAGENET_CLASSNAMES) for field in FIELDS})
    every = measured // -(-measured // 100)  # at least 1 % of the measured texts, evenly spread in the order of a run
    order = T.epoch_order(n, "full", 0, 0)
    long = {*order[(warmup * batch_size + every // 2) % every::every].tolist()}
    mixed = [{**row, "alt": " and ".join([row["alt"]] * 20)} if i in long else row for i, row in enumerate(rows)]
    for name, some in (("short", rows), ("mixed", mixed)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    lines = [f"{folder / 'images' / row['image']}\t{row['alt']}\n" for row in rows]
    (folder / "short.tsv").write_text("filepath\ttitle\n" + "".join(lines))

    texts = [row[field] for row in rows + mixed for field in FIELDS]
    ids = [tokenizer.encode(text) for text in texts]
    assert [ours.tolist() + [0] * (77 - len(ours)) for ours in ids] == tokenize(texts).tolist()
    size = statistics.mean(path.stat().st_size for path in (folder / "images").iterdir())
    filled = seen_lengths(folder, "mixed", FIELDS[:1], batch_size, warmup, steps).count(77)
    print(f"{n} JPEGs of 640 x 480, {size / 1000:.0f} kB on average\n"
          f"our tokenizer gives open_clip's ids on all {len(ids)} texts\n"
          f"short captions, tokens: texts: {dict(sorted(Counter(map(len, ids[:n * len(FIELDS)])).items()))}\n"
          f"mixed captions: {filled} of the {measured} measured ones fill 77 tokens, {100 * filled / measured:.1f} %",
          flush=True)


def seen_lengths(folder, name, fields, batch_size, warmup, steps):
    """Tokens of each text that our trainer's measured steps see."""
    rows = [row for _, row in read_rows(str(folder / f"{name}.jsonl"))]
    tokenizer = T.Tokenizer.load(str(folder / "tokenizer.json"))
    order = T.epoch_order(len(rows), "full", 0, 0)
    seen = order[warmup * batch_size:(warmup + steps) * batch_size].tolist()
    return [len(tokenizer.encode(rows[i][field])) for i in seen for field in fields]
