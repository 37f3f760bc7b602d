"""Train CLIP on rewritten captions: CLIP, LaCLIP, LaCLIP-MT and VeCLIP differ only in the text a step sees.

    CLIP        --text alt
    LaCLIP      --text alt rewrite_chatgpt rewrite_bard rewrite_coco rewrite_human     arXiv 2305.20088, section 3.2
    LaCLIP-MT   the same with --loss multitext                                         arXiv 2305.20088, multi-text loss
    VeCLIP      --text alt=0.5 vecap=0.5                                               arXiv 2310.07699, eq. 2

    torchrun --nproc_per_node 8 train_clip.py --captions cc3m.jsonl --image-root cc3m --text alt rewrite_chatgpt ... \\
        --batch-size 8192 --epochs 40 --out runs/laclip                     # one box of GPUs
    python train_clip.py --captions a.jsonl --image-root DIR --text alt --model nano --tokenizer tokenizer.json \\
        --batch-size 64 --steps 20 --out runs/try                           # a few seconds on a CPU

OUT holds checkpoint.pt (the newest), metrics.jsonl, settings.json and bad_images.jsonl. Read on in the order in which
data meets the code: rows, pictures, tokenizer, model, losses, the loop.
"""
import argparse
import hashlib
import io
import json
import math
import os
import re
import signal
import struct
import sys
import time
from array import array
from dataclasses import asdict, dataclass

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import nn
from tqdm import tqdm

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, channels R, G, B in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


def die(message):
    """A user's mistake: one line on stderr and exit status 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# === rows =============================================================================================================

def index_rows(path):
    """Write PATH.idx: the size and time of the file, then the byte offset of every line, all uint64. Made once, in one
    pass; afterwards a row costs two preads, and memory grows neither with rows nor with workers."""
    stat = os.stat(path)
    stamp = array("Q", [stat.st_size, stat.st_mtime_ns])
    if os.path.exists(path + ".idx"):
        with open(path + ".idx", "rb") as f:
            if f.read(16) == stamp.tobytes():
                return
    temporary = f"{path}.idx.{os.environ.get('RANK', 0)}.{os.getpid()}"  # two nodes may share the disk
    with open(path, "rb") as f, open(temporary, "wb") as out:
        stamp.tofile(out)
        offsets, at = array("Q"), 0
        for line in tqdm(f, desc=f"indexing {path}", unit="row", unit_scale=True, delay=2):
            offsets.append(at)
            at += len(line)
            if len(offsets) == 1 << 20:
                offsets.tofile(out)
                offsets = array("Q")
        offsets.tofile(out)
    os.replace(temporary, path + ".idx")


class Rows:
    """The rows of several JSONL files as one sequence of dicts, read where they lie."""

    def __init__(self, paths):
        self.paths, self.files = paths, None
        self.sizes = [os.path.getsize(path) for path in paths]
        self.ends = np.cumsum([os.path.getsize(path + ".idx") // 8 - 2 for path in paths])

    def __len__(self):
        return int(self.ends[-1])

    def __getstate__(self):  # a worker opens its own files
        return {**self.__dict__, "files": None}

    def __getitem__(self, i):
        if self.files is None:
            self.files = [(open(path, "rb"), open(path + ".idx", "rb")) for path in self.paths]
        number = int(np.searchsorted(self.ends, i, side="right"))
        i -= int(self.ends[number - 1]) if number else 0
        rows, index = (f.fileno() for f in self.files[number])
        start, *end = np.frombuffer(os.pread(index, 16, 16 + 8 * i), "<u8").tolist()
        line = os.pread(rows, (end[0] if end else self.sizes[number]) - start, start)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise BadRow(f"{self.paths[number]}, byte {start}: not JSON: {e}")
        if not isinstance(row, dict):
            raise BadRow(f"{self.paths[number]}, byte {start}: not a JSON object")
        return row


class BadRow(Exception):
    """A row that cannot be trained on, and why; another one takes its place and it is named in bad_images.jsonl."""


UNREADABLE = (BadRow, OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError)  # rows and pictures


def shuffled(i, n, key):
    """The i-th element of a permutation of range(n) that depends on `key` alone: an epoch's order in O(1) memory.

    A Feistel network of four hashed rounds permutes the next power of four; a value outside range(n) goes through again
    until it falls inside (cycle walking; fewer than four times on average). 5 microseconds a pass."""
    half = (max(n - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for round in range(4):
            digest = hashlib.blake2b(struct.pack("<QQQ", key, round, right), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest) & mask
        i = left << half | right
        if i < n:
            return i


def texts_of(value):
    """The usable texts of a caption field: it may be a text, a list with nulls in it, or absent."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()]


# === pictures =========================================================================================================

def read_image(root, name):
    """An RGB PIL image from a file under `root`, or from `shard.tar@OFFSET+SIZE`; transparency becomes white."""
    member = re.fullmatch(r"(.+)@(\d+)\+(\d+)", name) if isinstance(name, str) else None
    path = os.path.realpath(os.path.join(root, member[1] if member else name))
    if not path.startswith(os.path.join(os.path.realpath(root), "")):
        raise ValueError("outside --image-root")
    with open(path, "rb") as f:
        if member:
            f.seek(int(member[2]))
            f = io.BytesIO(f.read(int(member[3])))
        image = ImageOps.exif_transpose(Image.open(f))
        if max(image.size) > 100 * min(image.size):  # its shorter side scaled up would fill the memory
            raise ValueError(f"{image.width} x {image.height} pixels are no picture")
        if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def to_uint8(image):
    """RGB PIL image -> uint8 [3, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalise(images, mean=MEAN, std=STD):
    """uint8 [..., 3, H, W] -> float32, zero mean and unit variance a channel"""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images.float() / 255 - mean) / std


class EvalTransform:
    """PIL image -> [3, S, S]: shorter side to S (bicubic), centre crop, normalised. OpenAI CLIP's."""

    def __init__(self, image_size, mean=MEAN, std=STD):
        self.image_size, self.mean, self.std = image_size, mean, std

    def __call__(self, image):
        S, (w, h) = self.image_size, image.size
        w, h = (S, S * h // w) if w <= h else (S * w // h, S)
        image = image.resize((w, h), Image.BICUBIC)
        left, top = round((w - S) / 2), round((h - S) / 2)
        return normalise(to_uint8(image.crop((left, top, left + S, top + S))), self.mean, self.std)


def crop_box(w, h, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's box (left, top, right, bottom): a share `scale` of the area, a side ratio in `ratio`."""
    for _ in range(10):
        area = w * h * rng.uniform(*scale)
        r = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        cw, ch = round(math.sqrt(area * r)), round(math.sqrt(area / r))
        if 0 < cw <= w and 0 < ch <= h:
            left, top = rng.integers(w - cw + 1), rng.integers(h - ch + 1)
            return left, top, left + cw, top + ch
    cw, ch = min(w, round(h * ratio[1])), min(h, round(w / ratio[0]))  # a very long image: its middle
    return (w - cw) // 2, (h - ch) // 2, (w + cw) // 2, (h + ch) // 2


def augment_crop(image, S, rng):
    """LaCLIP's: RandomResizedCrop(scale 0.5-1), no flip, since captions say left and right. -> RGB [S, S]"""
    return image.resize((S, S), Image.BICUBIC, box=crop_box(*image.size, rng))


def augment_strong(image, S, rng):
    """For a few thousand drawings: rotate, scale, shift and shear, mix the colour channels, at times draw the edges."""
    angle, (shear, dx, dy) = rng.uniform(-0.35, 0.35), rng.uniform(-0.15, 0.15, 3)
    zx, zy = np.array(image.size) / S * rng.uniform(0.8, 1.25) * rng.uniform(0.9, 1.1, 2)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = zx * cos, zx * (shear - sin), zy * sin, zy * cos  # output pixel -> input pixel
    cx, cy = image.width * (0.5 + dx), image.height * (0.5 + dy)
    image = image.transform((S, S), Image.AFFINE, (a, b, cx - (a + b) * S / 2, d, e, cy - (d + e) * S / 2),
                            Image.BILINEAR, fillcolor="white")
    if rng.random() < 0.3:
        image = ImageChops.multiply(image, image.filter(ImageFilter.CONTOUR))
    mix = np.eye(3) + rng.normal(0, 0.25, (3, 3))
    if rng.random() < 0.2:
        mix[:] = mix.mean(0)  # grey
    mix /= mix.sum(1, keepdims=True)  # white stays white
    return image.convert("RGB", np.hstack([mix, np.zeros((3, 1))]).ravel().tolist())


AUGMENTATIONS = {"crop": augment_crop, "strong": augment_strong}


# === tokenizer ========================================================================================================

class Tokenizer:
    """texts -> LongTensor [B, L] of ids, start ... end, 0 behind; L is the longest of the batch, at most
    `context_length`. Holds any tokenizers.Tokenizer whose own post-processor adds the start and end tokens."""

    def __init__(self, json_text, context_length=77):
        self.json_text, self.context_length = json_text, context_length
        self.tokenizer = tokenizers.Tokenizer.from_str(json_text)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(context_length)  # keeps the end token the last
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a caption is just text
        ends = {self.tokenizer.encode(text).ids[-1] for text in ("a", "dog")}
        self.eot_id = ends.pop()
        if ends or self.eot_id not in self.tokenizer.get_added_tokens_decoder():
            raise ValueError("it has no end token: its post-processor must add one behind every text")
        self.vocab_size = self.tokenizer.get_vocab_size()

    @classmethod
    def load(cls, name):
        """From a tokenizer.json, a folder or a hub name."""
        try:
            if name.endswith(".json"):
                with open(name, encoding="utf-8") as f:
                    return cls(f.read())
            from transformers import AutoTokenizer
            return cls(AutoTokenizer.from_pretrained(name).backend_tokenizer.to_str())
        except Exception as e:  # tokenizers raises bare Exception for a file it cannot parse
            die(f"--tokenizer {name}: {type(e).__name__}: {e}")

    def encode(self, text):
        """Ids of one text. A hundred kilobytes are no caption: their first twenty are read."""
        return self.tokenizer.encode(text[:20_000].encode("utf-8", "replace").decode()).ids

    def __call__(self, texts):
        return pad([self.encode(text) for text in texts])

    def __getstate__(self):
        return self.json_text, self.context_length

    def __setstate__(self, state):
        self.__init__(*state)


def pad(ids):
    """Lists of ids -> LongTensor [B, L], zeros behind; attention is causal, so what follows the end has no effect."""
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for row, text in zip(tokens, ids):
        row[:len(text)] = torch.tensor(text)
    return tokens


# === batches ==========================================================================================================

class Samples(torch.utils.data.Dataset):
    """Sample number `position` of the run. Every random draw in it is a function of (seed, position) alone, so neither
    ranks nor workers nor a restart change what the model sees."""

    def __init__(self, rows, image_root, text, transform, image_size, tokenizer, seed, per_epoch, every_text):
        self.rows, self.image_root, self.fields, self.weights = rows, image_root, list(text), list(text.values())
        self.transform, self.image_size, self.tokenizer = transform, image_size, tokenizer
        self.seed, self.per_epoch, self.every_text = seed, per_epoch, every_text

    def __getitem__(self, position):
        """-> dict: image uint8 [3, S, S]; ids, one text's or (multitext) all M + 1; drawn, the index of the drawn one;
        filled, how many were missing; bad, [(name, reason)] of rows that this one replaced."""
        epoch, place = divmod(position, self.per_epoch)
        rng = np.random.default_rng([self.seed, epoch, place])
        index, bad = shuffled(place, len(self.rows), self.seed << 32 | epoch), []
        while True:
            name = f"row {index}"
            try:
                row = self.rows[index]
                name = row.get("image", name)
                sample = self.draw_texts(row, rng)
                image = read_image(self.image_root, name)
                break
            except UNREADABLE as e:
                bad.append((name, f"{type(e).__name__}: {e}"))
                index = int(rng.integers(len(self.rows)))
                if len(bad) == 100:
                    raise RuntimeError(f"a hundred rows in a row are unusable, the last one: {bad[-1]}")
        return {**sample, "image": to_uint8(self.transform(image, self.image_size, rng)), "bad": bad}

    def draw_texts(self, row, rng):
        """aug_T of LaCLIP, mix of VeCLIP (eq. 2): a field by weight among those present, then one text of it."""
        at = rng.random()  # the same place in every list: alt and what was made from it stay together
        texts = [(found := texts_of(row.get(field))) and found[int(at * len(found))] for field in self.fields]
        weights = np.array([weight if text else 0 for weight, text in zip(self.weights, texts)])
        if not weights.sum():
            raise BadRow(f"no text in {', '.join(self.fields)}")
        drawn = int(rng.choice(len(texts), p=weights / weights.sum()))
        if len(texts[drawn].split()) < 2 and (alt := texts_of(row.get("alt"))):
            texts[drawn] = alt[int(at * len(alt))]  # LaCLIP's release: one word says too little
        if not self.every_text:
            return {"ids": [self.tokenizer.encode(texts[drawn])], "drawn": 0, "filled": 0}
        first = next(filter(None, texts))
        ids = [self.tokenizer.encode(text or first) for text in texts]
        return {"ids": ids, "drawn": drawn, "filled": sum(not text for text in texts)}


def collate(samples):
    """-> image uint8 [n, 3, S, S], tokens [(M + 1) n, L] version by version, drawn [n], filled, bad"""
    versions = zip(*(sample["ids"] for sample in samples))
    return {"image": torch.stack([sample["image"] for sample in samples]),
            "tokens": pad([ids for version in versions for ids in version]),
            "drawn": torch.tensor([sample["drawn"] for sample in samples]),
            "filled": sum(sample["filled"] for sample in samples),
            "bad": [bad for sample in samples for bad in sample["bad"]]}


def one_thread(worker):
    torch.set_num_threads(1)


class Positions:
    """This rank's share of every global batch: lists of positions, from step `start` on."""

    def __init__(self, start, steps, batch_size, rank, world):
        self.start, self.steps, self.batch_size, self.n, self.rank = start, steps, batch_size, batch_size // world, rank

    def __iter__(self):
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.rank * self.n
            yield list(range(first, first + self.n))

    def __len__(self):
        return self.steps - self.start


# === model: OpenAI CLIP's, parameter names included ===================================================================

@dataclass
class Config:
    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77
    vocab_size: int = 49408
    eot_id: int = 49407
    quick_gelu: bool = False  # OpenAI's own weights and Hugging Face's CLIPModel: True; open_clip's presets: False


PRESETS = {  # as open_clip has them; parameters with OpenAI's vocabulary
    "nano":     dict(embed_dim=128, image_size=48, patch_size=8, vision_width=128, vision_layers=4, vision_heads=2,
                     text_width=128, text_layers=2, text_heads=2),  # 1.2 M and the vocabulary: for the demo
    "ViT-S/16": dict(embed_dim=384, patch_size=16, vision_width=384, vision_heads=6, text_width=384, text_heads=6),  # 62 M
    "ViT-B/32": dict(patch_size=32),  # 151 M
    "ViT-B/16": dict(patch_size=16),  # 150 M
    "ViT-L/14": dict(embed_dim=768, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16,
                     text_width=768, text_heads=12),  # 428 M
    "ViT-H/14": dict(embed_dim=1024, patch_size=14, vision_width=1280, vision_layers=32, vision_heads=16,
                     text_width=1024, text_layers=24, text_heads=16),  # 986 M
}


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        B, L, W = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, L, 3 W]
        q, k, v = qkv.view(B, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # each [B, heads, L, W / heads]
        if x.is_cpu:  # the formula: a bf16 step takes half as long as with torch's fused kernel, an fp32 one as long
            # (nano preset: tests/bench/attention.py)
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, L, L]
            if causal:
                scores = scores + torch.full((L, L), -torch.inf).triu(1)
            x = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, W))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, activation):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, activation) for _ in range(layers))
        for block in self.resblocks:  # OpenAI CLIP's scales
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, x, causal):
        for block in self.resblocks:
            x = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, c, activation):
        super().__init__()
        W, patches = c.vision_width, (c.image_size // c.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, W, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(W) * W ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, W) * W ** -0.5)
        self.ln_pre = nn.LayerNorm(W)
        self.transformer = Transformer(W, c.vision_layers, c.vision_heads, activation)
        self.ln_post = nn.LayerNorm(W)
        self.proj = nn.Parameter(torch.randn(W, c.embed_dim) * W ** -0.5)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # [B, 3, S, S] -> [B, W, S/p, S/p] -> [B, patches, W]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x), causal=False)
        return self.ln_post(x[:, 0]) @ self.proj  # [B, embed_dim]


class CLIP(nn.Module):
    """Two towers and a temperature. Radford et al. 2021; the model of both papers."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        activation = QuickGELU if c.quick_gelu else nn.GELU
        self.visual = VisionTransformer(c, activation)
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.positional_embedding = nn.Parameter(torch.randn(c.context_length, c.text_width) * 0.01)
        self.transformer = Transformer(c.text_width, c.text_layers, c.text_heads, activation)
        self.ln_final = nn.LayerNorm(c.text_width)
        self.text_projection = nn.Parameter(torch.randn(c.text_width, c.embed_dim) * c.text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # ln(1 / tau)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """[B, 3, S, S], normalised pixels -> [B, embed_dim], not normalised"""
        return self.visual(images)

    def encode_text(self, tokens):
        """[B, L] ids with L <= context_length -> [B, embed_dim], not normalised: the feature at the first end token"""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # [B, L, W]
        x = self.transformer(x, causal=True)
        end = (tokens == self.config.eot_id).int().argmax(-1)
        return self.ln_final(x[torch.arange(len(x), device=x.device), end]) @ self.text_projection

    def forward(self, images, tokens):
        """-> image features [n, d] and text features [m, d], both of unit length, and 1 / tau"""
        return (F.normalize(self.encode_image(images).float(), dim=-1),
                F.normalize(self.encode_text(tokens).float(), dim=-1), self.logit_scale.exp())


# === losses ===========================================================================================================

class Gather(torch.autograd.Function):
    """[n, d] of every rank -> [world * n, d], in order of rank. Backward, a rank receives what all ranks' losses say
    about its own features: without that each tower would get 1/world of its gradient."""

    @staticmethod
    def forward(ctx, x):
        out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(out, x.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x


def info_nce(queries, keys, scale):
    """-1/n sum_i log( exp(q_i . k_i / tau) / sum_k exp(q_i . k_k / tau) ): this rank's queries [n, d] against the keys
    of all ranks [N, d]. The mean over ranks, which DDP takes of the gradients, is the loss of the global batch."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    labels = torch.arange(len(queries), device=queries.device) + rank * len(queries)
    return F.cross_entropy(scale * queries @ keys.T, labels)


def clip_loss(images, texts, scale):
    """L = (L_I + L_T) / 2 (LaCLIP eq. 1, VeCLIP eq. 1). images, texts [n, d], of unit length -> scalar

    The texts are what aug_T or mix drew, and nothing else tells LaCLIP (eq. 3) and VeCLIP (eq. 2) from CLIP."""
    return (info_nce(images, gather(texts), scale) + info_nce(texts, gather(images), scale)) / 2


def multitext_loss(images, texts, drawn, scale):
    """LaCLIP-MT: L = (L_I* + L_T) / 2. images [n, d], texts [M + 1, n, d], drawn [n] in 0..M -> scalar

    L_I* compares an image with all its M + 1 texts, text j against the texts j of the other images; L_T uses the drawn
    text, as in LaCLIP. The paper writes 1/M before a sum of M + 1 terms (j = 0..M, original included); this is the
    mean, 1/(M + 1), so that L_I* weighs as much as L_T and equals L_I when all texts of an image are the same."""
    loss_i = torch.stack([info_nce(images, gather(version), scale) for version in texts]).mean()
    text = texts[drawn, torch.arange(len(drawn), device=drawn.device)]
    return (loss_i + info_nce(text, gather(images), scale)) / 2


# === checkpoints ======================================================================================================

def save_checkpoint(path, model, optimizer, step, settings, tokenizer):
    """Complete or absent: a temporary name, synced, then renamed."""
    with open(path + ".tmp", "wb") as f:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                    "settings": settings, "config": asdict(model.config), "tokenizer": tokenizer.json_text,
                    "transform": {"image_size": model.config.image_size, "mean": MEAN, "std": STD}}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def read_checkpoint(path, device="cpu"):
    """The checkpoint's dict; only tensors and plain values are unpickled."""
    if not os.path.isfile(path):
        die(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # torch raises a different class for every way in which a file is not one of its own
        die(f"{path} is not a checkpoint of train_clip.py: {type(e).__name__}: {e}")
    if missing := {"model", "config", "tokenizer", "transform"} - set(checkpoint):
        die(f"{path} is not a checkpoint of train_clip.py: it has no {', '.join(sorted(missing))}")
    return checkpoint


def load_checkpoint(path, device="cpu"):
    """-> (model in eval mode, tokenizer, transform): all that evaluation needs."""
    checkpoint = read_checkpoint(path, device)
    model = CLIP(Config(**checkpoint["config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    tokenizer = Tokenizer(checkpoint["tokenizer"], model.config.context_length)
    return model.eval(), tokenizer, EvalTransform(**checkpoint["transform"])


# === features, for the evaluations ====================================================================================

def read_rows(path):
    """All rows of a JSONL file, in order; an evaluation set with a broken line is a user's mistake."""
    if not os.path.isfile(path):
        die(f"{path}: no such file")
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                die(f"{path}, line {number}: not a JSON object")
            yield row


class Pictures(torch.utils.data.Dataset):
    def __init__(self, root, names, transform):
        self.root, self.names, self.transform = root, names, transform

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """-> [3, S, S], or the reason why there is none"""
        try:
            return self.transform(read_image(self.root, self.names[i]))
        except UNREADABLE as e:
            return f"{type(e).__name__}: {e}"


@torch.inference_mode()
def encode_images(model, transform, root, names, batch_size=64, workers=2):
    """Paths under `root` -> (features [N, d] of unit length, on the CPU; {index: reason} of those that cannot be read,
    whose features are zero, so that they match nothing and stay in every denominator)."""
    device, features, unreadable = model.logit_scale.device, torch.zeros(len(names), model.config.embed_dim), {}
    loader = torch.utils.data.DataLoader(Pictures(root, names, transform), batch_size, num_workers=workers,
                                         collate_fn=list)
    for number, batch in enumerate(tqdm(loader, desc="images", unit="batch", leave=False)):
        indices = range(number * batch_size, number * batch_size + len(batch))
        unreadable |= {i: picture for i, picture in zip(indices, batch) if isinstance(picture, str)}
        readable = [i for i in indices if i not in unreadable]
        if readable:
            pictures = torch.stack([picture for picture in batch if not isinstance(picture, str)]).to(device)
            features[readable] = F.normalize(model.encode_image(pictures).float(), dim=-1).cpu()
    return features, unreadable


@torch.inference_mode()
def encode_texts(model, tokenizer, texts, batch_size=256):
    """list of str -> features [T, d] of unit length, on the CPU"""
    device, features = model.logit_scale.device, torch.zeros(len(texts), model.config.embed_dim)
    for at in tqdm(range(0, len(texts), batch_size), desc="texts", unit="batch", leave=False):
        tokens = tokenizer(texts[at:at + batch_size]).to(device)
        features[at:at + batch_size] = F.normalize(model.encode_text(tokens).float(), dim=-1).cpu()
    return features


# === the loop =========================================================================================================

def parse_text(specs):
    """["alt=0.5", "vecap"] -> {"alt": 0.5, "vecap": 1.0}"""
    fields = {}
    for spec in specs:
        field, _, weight = spec.partition("=")
        try:
            fields[field] = float(weight or 1)
        except ValueError:
            die(f"--text {spec}: the weight is no number")
        if not field or not 0 <= fields[field] < math.inf:
            die(f"--text {spec}: expected FIELD or FIELD=WEIGHT with a weight of 0 or more")
    if not sum(fields.values()):
        die("--text: all weights are 0")
    return fields


def check_rows(rows, fields):
    """Stop before training if a field has no text in the first thousand rows of any file."""
    missing = set(fields)
    for start, end in zip([0, *rows.ends], rows.ends):
        for i in range(start, min(start + 1000, end)):
            try:
                missing -= {field for field in missing if texts_of(rows[i].get(field))}
            except BadRow:
                continue
    if missing:
        die(f"--text {' '.join(sorted(missing))}: no text in the first 1,000 rows of {' '.join(rows.paths)}")


def learning_rate(step, peak, warmup, steps):
    """Linear from peak/1000 over the warm-up steps, then a cosine to peak/100: at peak 1e-3 LaCLIP's 1e-6 and 1e-5."""
    if step < warmup:
        return peak * (0.001 + 0.999 * step / warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    add = parser.add_argument_group("data").add_argument
    add("--captions", nargs="+", required=True, metavar="JSONL", help="one or more files, together one data set")
    add("--image-root", required=True, help="the folder that the rows' image paths start from")
    add("--text", nargs="+", default=["alt"], metavar="FIELD[=WEIGHT]", help="fields to draw a text from (default: alt)")
    add("--augment", choices=AUGMENTATIONS, default="crop", help="crop: LaCLIP's; strong: for small sets of drawings")
    add("--workers", type=int, default=4, help="processes a rank that read pictures, 0: none (default: %(default)s)")
    add("--max-bad", type=float, default=0.01, help="stop above this share of unusable rows (default: %(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=PRESETS, default="ViT-B/16")
    add("--image-size", type=int, help="pixels a side (default: 224, nano 48)")
    add("--tokenizer", default="openai/clip-vit-base-patch32", help="hub name, folder or tokenizer.json")
    add = parser.add_argument_group("training; defaults are LaCLIP's release for CC3M and CC12M").add_argument
    add("--loss", choices=["infonce", "multitext"], default="infonce", help="multitext: LaCLIP-MT")
    add("--batch-size", type=int, default=8192, help="global, over all ranks (default: %(default)s)")
    add("--epochs", type=float, default=40, help="passes over the rows, without the last partial batch (default: 40)")
    add("--steps", type=int, help="steps, instead of --epochs")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    add("--wd", type=float, default=0.5, help="weight decay, not on parameters of <= 1 dimension (default: %(default)s)")
    add("--beta2", type=float, default=0.98)
    add("--eps", type=float, default=1e-8)
    add("--warmup", type=int, help="steps of linear warm-up (default: one epoch)")
    add("--precision", choices=["fp32", "bf16"], default="bf16", help="bf16: autocast; weights and loss stay fp32")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("run").add_argument
    add("--out", required=True, help="folder of checkpoint, metrics and settings")
    add("--resume", metavar="auto|PATH", help="auto: go on from OUT's checkpoint, or begin; PATH: from that checkpoint")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default: %(default)s)")
    add("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl (default: %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args(argv)


def pick_device(name):
    """auto: this rank's GPU, or Apple's, or the CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        die(f"--device {name}: torch finds none here")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def start_ranks(device):
    """torchrun's environment, or a single process. -> (rank, number of ranks)"""
    if "cuda" in device:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo")  # gloo: what CPUs tell each other
    return dist.get_rank(), dist.get_world_size()


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def resumed_checkpoint(args, settings, tokenizer):
    """The checkpoint to go on from, or None for a new run; one that was made otherwise is a user's mistake."""
    newest = os.path.join(args.out, "checkpoint.pt")
    if not args.resume and os.path.isdir(args.out) and os.listdir(args.out):
        die(f"--out {args.out} is not empty: --resume auto goes on with it, or choose another folder")
    if not args.resume or args.resume == "auto" and not os.path.exists(newest):
        return None
    checkpoint = read_checkpoint(newest if args.resume == "auto" else args.resume)
    for name, value in settings.items():
        if (before := checkpoint["settings"].get(name)) != value:
            die(f"--resume: the checkpoint was made with {name} = {before!r}, now it is {value!r}")
    if checkpoint["tokenizer"] != tokenizer.json_text:
        die(f"--resume: the checkpoint was made with another tokenizer than {args.tokenizer}")
    return checkpoint


def open_metrics(path, step):
    """metrics.jsonl to append to, without the lines behind the checkpoint's step."""
    kept = []
    if os.path.exists(path):
        with open(path) as f:
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
    f = open(path, "w")
    f.writelines(kept)
    return f


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    rank, world = start_ranks(device)

    # the user's mistakes, before anything is written
    if args.batch_size < 1 or args.batch_size % world:
        die(f"--batch-size {args.batch_size} does not divide by the number of ranks, {world}")
    for path in args.captions:
        if not os.path.isfile(path):
            die(f"--captions {path}: no such file")
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a node: it need not share its disk
            index_rows(path)
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    all_reduce(torch.zeros(1))  # the others wait for the index
    rows, fields, tokenizer = Rows(args.captions), parse_text(args.text), Tokenizer.load(args.tokenizer)
    steps_per_epoch = len(rows) // args.batch_size
    if not steps_per_epoch:
        die(f"--batch-size {args.batch_size} is more than the {len(rows)} rows of {' '.join(args.captions)}")
    check_rows(rows, fields)
    steps = args.steps if args.steps is not None else round(args.epochs * steps_per_epoch)
    warmup = args.warmup if args.warmup is not None else steps_per_epoch
    config = Config(**PRESETS[args.model], vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id)
    config.image_size = args.image_size or config.image_size
    settings = {"rows": len(rows), "bytes": rows.sizes, "text": fields, "steps": steps, "warmup": warmup}  # what changes the mathematics
    settings |= {name: getattr(args, name) for name in ("model", "image_size", "loss", "augment", "batch_size", "lr", "wd",
                                                        "beta2", "eps", "precision", "seed")}
    checkpoint = resumed_checkpoint(args, settings, tokenizer)
    start = checkpoint["step"] if checkpoint else 0
    if start >= steps:
        return print(f"{args.out} is finished: {start} steps") if rank == 0 else None

    # model, optimizer, data
    torch.manual_seed(args.seed)
    model = CLIP(config).to(device)
    decay, no_decay = [], []
    for parameter in model.parameters():
        (decay if parameter.ndim > 1 else no_decay).append(parameter)
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": args.wd}, {"params": no_decay, "weight_decay": 0}],
                                  lr=args.lr, betas=(0.9, args.beta2), eps=args.eps)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    parallel = nn.parallel.DistributedDataParallel(model, device_ids=[device] if "cuda" in device else None) \
        if world > 1 else model
    samples = Samples(rows, args.image_root, fields, AUGMENTATIONS[args.augment], config.image_size, tokenizer,
                      args.seed, steps_per_epoch * args.batch_size, args.loss == "multitext")
    loader = torch.utils.data.DataLoader(
        samples, batch_sampler=Positions(start, steps, args.batch_size, rank, world), num_workers=args.workers,
        collate_fn=collate, pin_memory="cuda" in device, worker_init_fn=one_thread)

    os.makedirs(args.out, exist_ok=True)
    bad_images = open(os.path.join(args.out, "bad_images.jsonl"), "a", buffering=1)  # all ranks append whole lines
    if rank == 0:
        with open(os.path.join(args.out, "settings.json"), "w") as f:
            json.dump({**settings, "command": sys.argv, "torch": torch.__version__, "ranks": world}, f, indent=1)
        metrics = open_metrics(os.path.join(args.out, "metrics.jsonl"), start)
        print(f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {len(rows)} rows; {steps} "
              f"steps of {args.batch_size}, {steps / steps_per_epoch:.1f} epochs; chance: ln(batch) = "
              f"{math.log(args.batch_size):.2f}", file=sys.stderr)
    progress = tqdm(total=steps, initial=start, unit="step", desc=os.path.basename(args.out), disable=rank > 0)

    stopping = []  # SIGTERM (a preempted node): save at the next step boundary and leave
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    seen = bad = filled = 0  # since the start of this process, on this rank
    wait, since, timed, batches = 0.0, time.time(), start, iter(loader)
    for step in range(start, steps):
        asked = time.time()
        batch = next(batches)
        wait += time.time() - asked
        images = normalise(batch["image"].to(device, non_blocking=True))  # [n, 3, S, S]
        tokens = batch["tokens"].to(device, non_blocking=True)  # [n, L]; multitext: [(M + 1) n, L]

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr, warmup, steps)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16"):
            image_features, text_features, scale = parallel(images, tokens)
        if args.loss == "multitext":
            versions = text_features.view(len(fields), len(images), -1)  # [M + 1, n, d]
            loss = multitext_loss(image_features, versions, batch["drawn"].to(device), scale)
        else:
            loss = clip_loss(image_features, text_features, scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # tau >= 0.01 (CLIP; LaCLIP's release)

        seen, bad, filled = seen + len(images), bad + len(batch["bad"]), filled + batch["filled"]
        for name, reason in batch["bad"]:
            bad_images.write(json.dumps({"step": step + 1, "image": name, "reason": reason}) + "\n")
        if bad > args.max_bad * max(seen, 1000):
            die(f"{bad} of {seen} rows were unusable, more than --max-bad {args.max_bad}: {bad_images.name} names them")
        leave = bool(all_reduce(torch.tensor(len(stopping)), dist.ReduceOp.MAX)) or step + 1 == steps
        save = leave or (step + 1) % args.save_every == 0
        log = step in (0, steps - 1) or (step + 1) % args.log_every == 0
        if save or log:
            loss = all_reduce(loss.detach() / world).item()
            if not math.isfinite(loss):
                die(f"the loss is {loss} at step {step + 1}; {args.out} keeps the last good checkpoint")
            if log and rank == 0:
                now = time.time()
                entry = {"step": step + 1, "epoch": round((step + 1) / steps_per_epoch, 4), "loss": loss,
                         "lr": optimizer.param_groups[0]["lr"], "logit_scale": scale.item(),
                         "samples_per_s": round((step + 1 - timed) * args.batch_size / (now - since), 1),
                         "data_wait_s": round(wait, 3)}
                if args.loss == "multitext":
                    entry["filled"] = round(filled / (seen * len(fields)), 4)  # share of versions that were missing
                metrics.write(json.dumps(entry) + "\n")
                metrics.flush()
                progress.set_postfix(loss=f"{loss:.3f}", samples_per_s=entry["samples_per_s"])
                timed, since, wait = step + 1, now, 0.0
        progress.update()
        if save and rank == 0:
            save_checkpoint(os.path.join(args.out, "checkpoint.pt"), model, optimizer, step + 1,
                            {**settings, "captions": args.captions}, tokenizer)
        if leave:
            break
    progress.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
