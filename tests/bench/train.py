"""The trainer against what a user would pick instead, on this machine's CPU: whole samples/s, from file to optimizer step.

    python tests/bench/train.py                                          # all cases, about 80 minutes on two cores
    python tests/bench/train.py --cases b32-fp32 --pairs 1 --steps 2     # one of them, 3 minutes
    python tests/bench/train.py --model nano --pairs 1                   # do all of them run? 6 minutes, ratios mean nothing

Every run is a process of its own that decodes, augments, tokenises and trains. A step's time is the time between the
lines that two steps print, taken by this script's clock for every side; a run is stopped after its last measured step,
while its workers still read ahead. Sides take turns: of three, ours is in the middle, and every other round is reversed.

    b32, b16    train_clip.py | open_clip's own trainer on its CSV data set | transformers' CLIPModel in a plain loop
    multitext   train_clip.py --loss multitext, five texts an image | open_clip's model in a plain loop, the same loss
    mixed       train_clip.py, 1 % of the captions fill 77 tokens | none does. The peers pad to 77 anyway, so this is
                also ratio(mixed) / ratio(short), the share of the gain that is kept
    compile     train_clip.py with --compile | without
    decode      one thread: our reading and cropping of JPEGs | torchvision's

The same for all sides of a case: pictures, captions, vocabulary, architecture (GELU), batch, workers, threads, precision
(bf16 is autocast), AdamW, RandomResizedCrop(scale 0.5-1, bicubic). Different, since it is what is compared: ours cuts
texts to their length, decodes large JPEGs at a smaller DCT scale and has AdamW fused; the peers pad to 77 tokens and have
torch's default AdamW. "flops" is the ratio of both sides' matrix products: what cutting the texts alone would give.
"""
import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.datasets.folder import default_loader  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_clip as T  # noqa: E402

FIELDS = ["alt", "rewrite_chatgpt", "rewrite_bard", "rewrite_coco", "rewrite_human"]
CASES = {  # name: model, precision, what is compared
    **{f"{kind}-{precision}": (model, precision, kind.split("-")[-1])
       for kind, model in (("b32", "ViT-B/32"), ("b16", "ViT-B/16"), ("multitext", "ViT-B/32"), ("mixed", "ViT-B/32"),
                           ("compile", "ViT-B/32")) for precision in ("fp32", "bf16")}, "decode": (None, "fp32", "decode")}
AIMS = {"mixed-fp32": 0.9, "mixed-bf16": 0.9}  # smallest ratio to be content with
AHEAD = 6  # batches behind the last measured one, so that the workers are busy to its end


# === data =============================================================================================================

def photograph(rng, width, height):
    """To a decoder like a photograph: smooth colours, a finer texture, a sensor's noise."""
    def field(cell, strength):
        coarse = rng.normal(0, strength, (height // cell + 2, width // cell + 2, 3)).clip(-127, 127) + 128
        return np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BICUBIC), np.float32) - 128
    pixels = 128 + field(width // 5, 60) + field(width // 40, 12) + rng.normal(0, 9, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def openai_tokenizer():
    """OpenAI CLIP's tokenizer.json, from the vocabulary and merges inside the open_clip package."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer
    theirs = SimpleTokenizer()
    vocab = {token: i for token, i in theirs.encoder.items() if i < 49406} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocab, merges=list(theirs.bpe_ranks)).backend_tokenizer.to_str()


def caption(rng, tokenizer, names):
    """A caption of 8 to 16 tokens, start and end included, each length as likely as the others."""
    length = rng.integers(8, 17)
    while True:
        a, b, c = rng.choice(names, 3)
        text = str(rng.choice([f"a photo of a {a} and a {b}", f"{a}, {b} and {c}", f"the {a} next to a {b}", f"{a} in the {b}",
                               f"two people look at a {a} behind the {b}", f"an old {a}, a {b} and a small {c}"]))
        if len(tokenizer.encode(text)) == length:
            return text


def make_data(folder, args):
    """images/, short.jsonl and mixed.jsonl, both also as open_clip's CSV, and tokenizer.json; for one pass of a run."""
    from open_clip import IMAGENET_CLASSNAMES, tokenize
    rng, names = np.random.default_rng(0), np.array(IMAGENET_CLASSNAMES)
    n, measured = args.batch_size * (args.warmup + args.steps + AHEAD), args.batch_size * args.steps
    (folder / "tokenizer.json").write_text(openai_tokenizer())
    tokenizer = T.Tokenizer.load(str(folder / "tokenizer.json"))
    (folder / "images").mkdir()
    rows = []
    for i in range(n):
        photograph(rng, 640, 480).save(folder / "images" / f"{i}.jpg", quality=88)
        rows.append({"image": f"{i}.jpg"} | {field: caption(rng, tokenizer, names) for field in FIELDS})
    every = measured // -(-measured // 100)  # at least 1 % of the measured texts, at even distances in our trainer's order
    long = {T.shuffled(p, n, 0) for p in range((args.warmup * args.batch_size + every // 2) % every, n, every)}
    mixed = [{**row, **({"alt": " and ".join(rng.choice(names, 60))} if i in long else {})} for i, row in enumerate(rows)]
    for name, some in (("short", rows), ("mixed", mixed)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        lines = [f"{folder / 'images' / row['image']}\t{row['alt']}\n" for row in some]
        (folder / f"{name}.tsv").write_text("filepath\ttitle\n" + "".join(lines))

    texts = [row[field] for row in rows + mixed for field in FIELDS]
    ids = [tokenizer.encode(text) for text in texts]
    assert all(ours + [0] * (77 - len(ours)) == theirs for ours, theirs in zip(ids, tokenize(texts).tolist()))
    size = statistics.mean(path.stat().st_size for path in (folder / "images").iterdir())
    print(f"data: {n} JPEGs of 640 x 480, {size / 1000:.0f} kB on average. The tokenizer gives open_clip's ids on all {len(texts)} "
          "texts\ntokens a text: texts of short.jsonl: " +
          ", ".join(f"{k}: {v}" for k, v in sorted(Counter(map(len, ids[:len(rows) * 5])).items())))
    filled = sum(length == 77 for length in seen_lengths(folder, "mixed", ["alt"], args))
    print(f"mixed.jsonl: {filled} of the {measured} measured texts fill 77 tokens, {100 * filled / measured:.1f} %")


def seen_lengths(folder, name, fields, args):
    """Tokens of each text that our trainer's measured steps see."""
    rows = list(T.read_rows(str(folder / f"{name}.jsonl")))
    tokenizer = T.Tokenizer.load(str(folder / "tokenizer.json"))
    measured = range(args.warmup * args.batch_size, (args.warmup + args.steps) * args.batch_size)
    return [len(tokenizer.encode(rows[T.shuffled(p, len(rows), 0)][field])) for p in measured for field in fields]


# === the peers' loops, each run in a process of its own ===============================================================

class Pairs(torch.utils.data.Dataset):
    def __init__(self, folder, fields, size, tokenize):
        self.folder, self.fields, self.tokenize = folder, fields, tokenize
        self.rows = list(T.read_rows(str(folder / "short.jsonl")))
        self.transform = torchvision_transform(size)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return self.transform(default_loader(self.folder / "images" / row["image"])), \
            self.tokenize([row[field] for field in self.fields])


def torchvision_transform(size):
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(), transforms.Normalize(T.Config.mean, T.Config.std)])


def transformers_clip(c, folder):
    """-> model, tokenize and loss as the documentation of transformers has them"""
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
    text = dict(hidden_size=c.text_width, intermediate_size=4 * c.text_width, num_hidden_layers=c.text_layers,
                num_attention_heads=c.text_heads, vocab_size=c.vocab_size, eos_token_id=c.eot_id, hidden_act="gelu")
    vision = dict(hidden_size=c.vision_width, intermediate_size=4 * c.vision_width, num_hidden_layers=c.vision_layers,
                  num_attention_heads=c.vision_heads, image_size=c.image_size, patch_size=c.patch_size, hidden_act="gelu")
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=c.embed_dim))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>")

    def tokenize(texts):
        return dict(tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"))

    def loss(images, texts):
        logits = model(pixel_values=images, **{name: x.flatten(0, 1) for name, x in texts.items()}).logits_per_image
        labels = torch.arange(len(images))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return model, tokenize, loss


def open_clip_multitext(name):
    """-> model, tokenize and LaCLIP-MT's loss: (L_I* + L_T) / 2, L_I* the mean over all five texts, L_T on a drawn one"""
    import open_clip
    model = open_clip.create_model(name)

    def loss(images, texts):  # texts [B, 5, 77]
        image = F.normalize(model.encode_image(images), dim=-1)
        text = F.normalize(model.encode_text(texts.flatten(0, 1)), dim=-1).view(*texts.shape[:2], -1)
        scale, labels = model.logit_scale.exp(), torch.arange(len(images))
        loss_i = sum(F.cross_entropy(scale * image @ text[:, j].T, labels) for j in range(texts.shape[1])) / texts.shape[1]
        drawn = text[labels, torch.randint(texts.shape[1], labels.shape)]
        return (loss_i + F.cross_entropy(scale * drawn @ image.T, labels)) / 2
    return model, open_clip.get_tokenizer(name), loss


def plain_loop(peer, folder, model_name, precision, batch_size, workers):
    """Trains until it is stopped or has seen all rows; one line of JSON a step."""
    folder = Path(folder)
    c = config(model_name)
    model, tokenize, loss_of = transformers_clip(c, folder) if peer == "transformers" else \
        open_clip_multitext(open_clip_name(model_name, folder))
    with torch.device("meta"):
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in T.CLIP(c).parameters())
    pairs = Pairs(folder, FIELDS if peer == "multitext" else FIELDS[:1], c.image_size, tokenize)
    loader = torch.utils.data.DataLoader(pairs, int(batch_size), shuffle=True, drop_last=True, num_workers=int(workers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for images, texts in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(images, texts)
        loss.backward()
        optimizer.step()
        print(json.dumps({"step loss": loss.item()}))


# === runs =============================================================================================================

def config(model):
    return T.Config(**T.PRESETS[model])


def open_clip_name(model, folder):
    """open_clip's name of our preset; of nano, which it does not have, a folder with the architecture."""
    if model != "nano":
        return model.replace("/", "-")
    c, there = config(model), folder / "nano-vit"
    there.mkdir(exist_ok=True)
    (there / "open_clip_config.json").write_text(json.dumps({"model_cfg": {
        "embed_dim": c.embed_dim, "vision_cfg": dict(image_size=c.image_size, layers=c.vision_layers, width=c.vision_width,
                                                     patch_size=c.patch_size),
        "text_cfg": dict(vocab_size=c.vocab_size, width=c.text_width, heads=c.text_heads, layers=c.text_layers)}}))
    return f"local-dir:{there}"


def commands(kind, folder, model, precision, args):
    """{side: command}, ours first; each trains on one pass of the data."""
    common = ["--batch-size", args.batch_size, "--workers", args.workers]
    ours = [sys.executable, ROOT / "train_clip.py", "--image-root", folder / "images", "--tokenizer", folder / "tokenizer.json",
            *common, "--epochs", 1, "--model", model, "--precision", precision, "--log-every", 1, "--device", "cpu",
            "--out", "out", "--captions"]
    loop = [sys.executable, Path(__file__).resolve(), "--loop"]
    settings = [folder, model, precision, args.batch_size, args.workers]
    open_clip = [sys.executable, "-m", "open_clip_train.main", "--dataset-type", "csv", "--train-data", folder / "short.tsv",
                 *common, "--epochs", 1, "--model", open_clip_name(model, folder), "--aug-cfg", "scale=(0.5, 1.0)",
                 "--precision", {"bf16": "amp_bf16"}.get(precision, precision), "--log-every-n-steps", 1, "--save-frequency", 0,
                 "--logs", "none", "--device", "cpu"]
    short, mixed = folder / "short.jsonl", folder / "mixed.jsonl"
    return {"multitext": {"ours": [*ours, short, "--loss", "multitext", "--text", *FIELDS],
                          "open_clip model": [*loop, "multitext", *settings]},
            "mixed": {"mixed": [*ours, mixed], "short": [*ours, short]},
            "compile": {"compiled": [*ours, short, "--compile"], "plain": [*ours, short]},
            }.get(kind, {"ours": [*ours, short], "open_clip": open_clip, "transformers": [*loop, "transformers", *settings]})


def run(command, args):
    """-> seconds of the measured steps, and how many of them ours waited for data"""
    with tempfile.TemporaryDirectory(prefix="run") as there:
        log, metrics = Path(there, "log"), Path(there, "out", "metrics.jsonl")
        with open(log, "w") as f:
            process = subprocess.Popen(list(map(str, command)), stdout=f, stderr=f, cwd=there, start_new_session=True, env={
                **os.environ, "OMP_NUM_THREADS": str(args.threads), "TMPDIR": tempfile.gettempdir()})
        stamps, last = [], time.perf_counter()
        try:
            while len(stamps) < args.warmup + args.steps:
                time.sleep(0.01)
                ended, now = process.poll(), time.perf_counter()
                lines = (metrics if "--captions" in command else log).read_text() if log.exists() and (
                    metrics.exists() or "--captions" not in command) else ""
                new = lines.count('"step') + lines.count("Batch (t)") - len(stamps)
                stamps, last = stamps + [now] * new, now if new else last
                if not new and (ended is not None or now - last > 1800):
                    raise SystemExit(f"a run ended early or hangs:\n{' '.join(map(str, command))}\n{log.read_text()[-3000:]}")
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
        seconds = np.diff(stamps)[args.warmup - 1:args.warmup - 1 + args.steps].tolist()
        waits = [json.loads(line)["data_wait_s"] for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return seconds, sum(waits[args.warmup:args.warmup + args.steps])
