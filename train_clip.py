"""Train CLIP on rewritten captions: the methods differ in the text that a step sees, and little else.

    CLIP        --text alt
    LaCLIP      --text alt rewrite_chatgpt rewrite_bard rewrite_coco rewrite_human     arXiv 2305.20088, section 3.2
    LaCLIP-MT   the same with --loss multitext                                         arXiv 2305.20088, multi-text loss
    SLIP        --text alt --ssl                                                       arXiv 2112.12750, section 3
    LaSLIP      LaCLIP's texts with --ssl                                              arXiv 2305.20088, section 4
    VeCLIP      --text alt=0.5 vecap=0.5                                               arXiv 2310.07699, eq. 2

    torchrun --nproc_per_node 8 train_clip.py --captions cc3m.jsonl --image-root cc3m --text alt rewrite_chatgpt ... \\
        --batch-size 8192 --epochs 40 --out runs/laclip                     # one box of GPUs
    python train_clip.py --captions a.jsonl --image-root DIR --text alt --model nano --tokenizer tokenizer.json \\
        --batch-size 64 --steps 20 --out runs/try                           # a few seconds on a CPU

OUT holds checkpoint.pt (the newest), metrics.jsonl, settings.json and bad_images.jsonl.

Read draw_texts, clip_loss, multitext_loss, CLIP and train, in this order: both papers are in them. Behind train stands
what feeds it (samples, images, rows, tokenizer) and what lets it end well (checkpoints, arguments, ranks).
"""
import argparse
import atexit
import errno
import fcntl
import hashlib
import html
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import stat
import struct
import sys
import time
import zipfile
import zlib
from array import array
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import functional as TF
from tqdm import tqdm

try:
    from torch.nn.attention.varlen import varlen_attn
    if "window_size" not in inspect.signature(varlen_attn).parameters:  # torch 2.10
        varlen_attn = None
except ImportError:
    varlen_attn = None


# === the text of a step: all that tells LaCLIP and VeCLIP from CLIP ===================================================

def draw_texts(row, fields, rng, alt_choice="random", every=False):
    """aug_T of LaCLIP (eq. 2), mix of VeCLIP (eq. 2): a field by its weight among those that the row has, then one of
    its texts. Lists of the same length belong together entry by entry, as alt and the vecap made of it.

    fields: {name: weight} -> the fields' texts (without `every` only the drawn one), its number, and whether alt took
    its place"""
    values = [row.get(field) for field in fields]
    there = np.array([bool(texts_of(value)) for value in values], float)
    if not there.any():
        raise BadRow(f"no text in {', '.join(fields)}")
    weights = there * list(fields.values())
    weights = weights if weights.any() else there
    drawn, at, chosen = int(rng.choice(len(values), p=weights / weights.sum())), rng.random(), {}

    def version(value):
        entries = value if isinstance(value, list) else [value]
        n, usable = len(entries), [i for i, text in enumerate(entries) if texts_of(text)]
        if usable and n not in chosen:
            chosen[n] = usable[int(at * len(usable))]  # VeCLIP: one at random beats the one of the highest CLIP score
            if alt_choice == "first":
                chosen[n] = usable[0]
            elif alt_choice == "best" and len(usable) > 1:
                chosen[n] = max(usable, key=clip_scores(row, [*fields, "alt"], n).__getitem__)
        return entries[chosen[n]] if usable and texts_of(entries[chosen[n]]) else None

    text, alt = version(values[drawn]), None
    if len(words_of(text)) < 2 and list(fields)[drawn] != "alt":
        alt = version(row.get("alt"))  # LaCLIP's release: one word says too little
    texts = [version(value) if every else None for value in values]
    texts[drawn] = alt or text
    return texts, drawn, bool(alt)


def clip_scores(row, fields, n):
    """One number an entry: the `clip_score` that eval_retrieval.py --score wrote for the first list of n among the fields."""
    scores = row.get("clip_score")
    for field in fields if isinstance(scores, dict) else ():
        if isinstance(row.get(field), list) and len(row[field]) == len(scores.get(field) or []) == n:
            return [-math.inf if score is None else score for score in scores[field]]
    raise BadRow("several texts, but no clip_score: eval_retrieval.py --score writes it")


def texts_of(value):
    """The usable texts of a caption field: it may be a text, a list with nulls in it, or absent."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()]


# Han, hiragana; katakana, a word a run; Thai, Lao, Burmese, Khmer: scripts that have no blanks between words
TWOS = "\u3005-\u3007\u3040-\u309f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
NO_BLANKS = re.compile(f"([{TWOS}]{{1,2}}|[\u30a0-\u30ff\uff66-\uff9f]+|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{{1,4}})")


def words_of(text):
    """The words of a text in any script: what stands between blanks and holds a letter or a digit. Where a script has no
    blanks, two characters count as a word, of Thai and its like four, as long as words are there on average."""
    return [word for word in NO_BLANKS.sub(r" \1 ", text).split() if any(map(str.isalnum, word))]


# === losses ===========================================================================================================

SIMILARITIES = 2 ** 25  # in a block of the similarity matrix: 128 MiB


def info_nce(queries, keys, scale, itself=0):
    """-1/n sum_i log( exp(q_i . k_i / tau) / sum_k exp(q_i . k_k / tau) ): this rank's queries [n, d] against the keys
    of all ranks [N, d]. The mean over ranks, which DDP takes of the gradients, is the loss of the global batch.

    If `itself` is given, the key that many places behind the right one is the query and no negative. A large similarity
    matrix is made in blocks of rows, each again in the backward pass: the whole one never exists."""
    labels = torch.arange(len(queries), device=queries.device) + rank() * len(queries)

    def block(queries, labels):
        logits = scale * queries @ keys.T
        if itself:
            logits = logits.scatter(1, labels[:, None] + itself, -math.inf)
        return F.cross_entropy(logits, labels, reduction="sum")

    rows = max(1, SIMILARITIES // len(keys))
    if rows < len(queries):
        block = partial(checkpoint, block, use_reentrant=False)
    return sum(block(*part) for part in zip(queries.split(rows), labels.split(rows))) / len(queries)


def clip_loss(images, texts, scale):
    """L = (L_I + L_T) / 2 (LaCLIP eq. 1, VeCLIP eq. 1). images, texts [n, d], of unit length -> scalar

    The texts are what aug_T or mix drew, and nothing else tells LaCLIP (eq. 3) and VeCLIP (eq. 2) from CLIP."""
    return (info_nce(images, gather(texts), scale) + info_nce(texts, gather(images), scale)) / 2


def multitext_loss(images, texts, drawn, scale):
    """LaCLIP-MT: L = (L_I* + L_T) / 2. images [n, d], texts [n, M + 1, d], drawn [n] in 0..M -> scalar

    L_I* compares an image with all its M + 1 texts, text j against the texts j of the other images; L_T uses the drawn
    text, as in LaCLIP. The paper writes 1/M before a sum of M + 1 terms (j = 0..M, original included); this is the
    mean, 1/(M + 1), so that L_I* weighs as much as L_T and equals L_I when all texts of an image are the same."""
    loss_i = torch.stack([info_nce(images, gather(version), scale) for version in texts.unbind(1)]).mean()
    text = texts[torch.arange(len(drawn), device=drawn.device), drawn]
    return (loss_i + info_nce(text, gather(images), scale)) / 2


def simclr_loss(head, views, temperature=0.1):
    """SLIP's self-supervision: NT-Xent, mean over both views. views [n, 2, W] from the image tower -> scalar

    A view finds the other view of its image among both views of all images, itself left out. BatchNorm needs the whole
    batch: every rank runs the head on the features of all ranks, as one process would."""
    n = len(views)
    views = gather(views)  # [N, 2, W]
    z = F.normalize(head(views.flatten(0, 1)).float(), dim=-1).view(len(views), 2, -1)
    mine = z[rank() * n:(rank() + 1) * n]
    losses = [info_nce(mine[:, a], torch.cat([z[:, 1 - a], z[:, a]]), 1 / temperature, itself=len(z)) for a in (0, 1)]
    return (losses[0] + losses[1]) / 2


def projection_head(width, hidden=4096, out=256):
    """SLIP's, on the image tower's features: three layers with BatchNorm after the first two (its release)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


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
    eot_id: int = 49407  # a text's feature is taken there; -1: at its highest id, as in HF configs with eos_token_id 2
    # what differs between families; the defaults are open_clip's
    vision_quick_gelu: bool = False  # OpenAI's own weights: True in both towers
    text_quick_gelu: bool = False
    vision_eps: float = 1e-5  # of LayerNorm
    text_eps: float = 1e-5
    pre_norm: bool = True  # a LayerNorm before the image blocks
    patch_bias: bool = False
    qk_norm: bool = False  # a LayerNorm on every head's queries and keys in the image tower
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the training pictures, R, G, B in [0, 1]
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "bicubic"  # see EvalTransform
    mend_texts: bool = False  # see mended; of OpenAI, open_clip and LaCLIP True
    text_model: dict | None = None  # config of the transformers encoder that is the text tower (--text-model)


PRESETS = {  # as open_clip has them; parameters with OpenAI's vocabulary
    "nano":     dict(embed_dim=128, image_size=32, patch_size=8, vision_width=128, vision_layers=2, vision_heads=2,
                     text_width=128, text_layers=2, text_heads=2,  # 0.9 M and the vocabulary: for the demo's icons
                     mean=(1.0, 1.0, 1.0), std=(0.27, 0.27, 0.27)),  # white is 0, or icons would all look the same at first
    "ViT-S/16": dict(embed_dim=384, patch_size=16, vision_width=384, vision_heads=6, text_width=384, text_heads=6),  # 62 M
    "ViT-B/32": dict(patch_size=32),  # 151 M
    "ViT-B/16": dict(patch_size=16),  # 150 M
    "ViT-L/14": dict(embed_dim=768, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16,
                     text_width=768, text_heads=12),  # 428 M
    "ViT-H/14": dict(embed_dim=1024, patch_size=14, vision_width=1280, vision_layers=32, vision_heads=16,
                     text_width=1024, text_layers=24, text_heads=16),  # 986 M
    # LaCLIP's release, whose image tower is timm's; 150 M. The initial weights are drawn as for the others
    "ViT-B/16-laclip": dict(patch_size=16, qk_norm=True, pre_norm=False, patch_bias=True, vision_eps=1e-6,
                            text_quick_gelu=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize="bilinear"),
}


class CLIP(nn.Module):
    """Two towers and a temperature. Radford et al. 2021; the model of both papers."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.visual = VisionTransformer(c)
        if c.text_model:
            self.text_encoder = build_text_encoder(c.text_model)
        else:
            self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
            self.positional_embedding = nn.Parameter(torch.randn(c.context_length, c.text_width) * 0.01)
            self.transformer = Transformer(c.text_width, c.text_layers, c.text_heads, c.text_quick_gelu, c.text_eps)
            self.ln_final = nn.LayerNorm(c.text_width, c.text_eps)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.text_projection = nn.Parameter(torch.randn(c.text_width, c.embed_dim) * c.text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # ln(1 / tau)
        self.register_buffer("mean", torch.tensor(c.mean), persistent=False)  # on the device: a copy would wait for it
        self.register_buffer("std", torch.tensor(c.std), persistent=False)

    def encode_image(self, images):
        """[B, 3, S, S], normalised pixels -> [B, embed_dim], not normalised"""
        return self.visual(images) @ self.visual.proj

    def encode_text(self, tokens):
        """[B, L] ids with L <= context_length -> [B, embed_dim], not normalised: the feature at the first end token.

        Attention is causal, so what stands behind that token has no effect and is not computed: the texts are packed one
        behind another, and each costs its own tokens. Padding to 77 gives the same. A text encoder (--text-model) attends
        both ways; its feature is the mean over the tokens up to the end token."""
        return self.encode_packed(pack(tokens.cpu(), self.config.eot_id, self.logit_scale.device))

    def encode_packed(self, texts):
        if self.config.text_model:
            return mean_over_tokens(self.text_encoder, texts) @ self.text_projection
        # Not positional_embedding[positions]: on a CPU threads would add up its gradient in no fixed order
        x = self.token_embedding(texts.ids) + F.embedding(texts.positions, self.positional_embedding)  # [T, W]
        x = self.transformer(x, texts, texts.groups)
        return self.ln_final(x[texts.ends]) @ self.text_projection

    def forward(self, images, texts):
        """images [n, V, 3, S, S] in 0..255, Texts of K an image -> 1 / tau, image features [n, d] and text features [n, K, d]
        of unit length; if there are further views, V = 3 (SLIP), also the image tower's features of these, [n, 2, W]"""
        n, V = images.shape[:2]
        x = self.visual(normalise(images.flatten(0, 1), self.mean, self.std)).float().view(n, V, -1)
        image_features = F.normalize((x[:, 0] @ self.visual.proj).float(), dim=-1)
        text_features = F.normalize(self.encode_packed(texts).float(), dim=-1).view(n, -1, image_features.shape[1])
        return self.logit_scale.exp(), image_features, text_features, *([x[:, 1:]] if V > 1 else [])


def build_text_encoder(config):
    """A transformers encoder (BERT, RoBERTa, T5, ...) with random weights; `config` is its own, as a dict.

    It stays in eval mode while it trains: dropout would differ between the two passes of a micro-batch and after a restart."""
    from transformers import AutoConfig, AutoModelForTextEncoding
    encoder = AutoModelForTextEncoding.from_config(AutoConfig.for_model(**config), dtype=torch.float32,
                                                   attn_implementation="sdpa", trust_remote_code=False)
    encoder.pooler = None  # it has no gradient, and DDP waits for the gradient of every parameter
    return encoder.eval()


def mean_over_tokens(encoder, texts):
    """Texts -> [B, W]: the mean of the encoder's outputs at a text's tokens, first and end token included.

    LaCLIP does not say how it pools (assumed): Sentence-BERT (arXiv 1908.10084) finds the mean at least as good as the class
    token, and T5 has no class token."""
    lengths = texts.starts.diff()  # [B], ascending
    mask = torch.arange(texts.groups[-1][1], device=lengths.device) < lengths[:, None]  # [B, L]
    ids = torch.zeros_like(mask, dtype=torch.long).masked_scatter(mask, texts.ids)
    states = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()  # [B, L, W]
    means = (states * mask[..., None]).sum(1) / lengths[:, None]
    return means[torch.searchsorted(texts.starts[1:], texts.ends.int(), right=True)]  # in the order in which they came


class VisionTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        W, patches = c.vision_width, (c.image_size // c.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, W, c.patch_size, c.patch_size, bias=c.patch_bias)
        self.class_embedding = nn.Parameter(torch.randn(W) * W ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, W) * W ** -0.5)
        self.ln_pre = nn.LayerNorm(W, c.vision_eps) if c.pre_norm else nn.Identity()
        self.transformer = Transformer(W, c.vision_layers, c.vision_heads, c.vision_quick_gelu, c.vision_eps, c.qk_norm)
        self.ln_post = nn.LayerNorm(W, c.vision_eps)
        self.proj = nn.Parameter(torch.randn(W, c.embed_dim) * W ** -0.5)

    def forward(self, x):
        """[B, 3, S, S] -> [B, W], before the projection"""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # [B, W, S/p, S/p] -> [B, patches, W]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        B, L, W = x.shape
        x = self.transformer(self.ln_pre(x).view(B * L, W), None, [(B, L)])
        return self.ln_post(x.view(B, L, W)[:, 0])


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, quick_gelu, eps, qk_norm=False):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, quick_gelu, eps, qk_norm) for _ in range(layers))
        self.grad_checkpointing = False
        for block in self.resblocks:  # OpenAI CLIP's scales
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, x, texts, groups):
        for block in self.resblocks:
            x = checkpoint(block, x, texts, groups, use_reentrant=False) if self.grad_checkpointing \
                else block(x, texts, groups)
        return x


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, quick_gelu, eps, qk_norm):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, eps, qk_norm)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU() if quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x, texts, groups):
        x = x + self.attn(self.ln_1(x), texts, groups)
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    def __init__(self, width, heads, eps=1e-5, qk_norm=False):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads, eps) if qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x, texts, groups):
        """x [T, W], sequences one behind another without padding: Texts, which look back only, or None and as many of equal
        length as `groups` says, [(B, L), ...]"""
        (T, W), out = x.shape, []
        x = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(T, 3, self.heads, -1)
        if texts and x.is_cuda and x.dtype != torch.float32 and varlen_attn:  # one call, whatever the lengths
            q, k, v = x.unbind(1)
            starts, longest = texts.starts, groups[-1][1]
            out = varlen_attn(self.q_norm(q), self.k_norm(k), v, starts, starts, longest, longest, window_size=(-1, 0))
            return self.out_proj(out.flatten(1))
        for part, (B, L) in zip(x.split([B * L for B, L in groups]), groups):
            q, k, v = part.view(B, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # [B, heads, L, W / heads]
            q, k = self.q_norm(q), self.k_norm(k)
            if q.is_cpu and q.dtype == torch.bfloat16 and L < 128:  # the formula: for short sequences torch's kernel
                scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # takes four times as long (bench/attention.py)
                if texts:
                    scores = scores + torch.full((L, L), -torch.inf).triu(1)
                part = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
            else:
                part = F.scaled_dot_product_attention(q, k, v, is_causal=texts is not None)
            out.append(part.transpose(1, 2).reshape(B * L, W))
        return self.out_proj(torch.cat(out) if len(out) > 1 else out[0])


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Texts(NamedTuple):
    """B texts of together T tokens, one behind another without padding, from the shortest to the longest."""
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], a token's place in its text
    ends: torch.Tensor  # [B], where each text's end token stands in ids; in the order in which the texts came
    starts: torch.Tensor  # [B + 1], int32: where the texts begin, and T
    groups: list  # [(B_l, l), ...]: B_l of them have length l


def pack(tokens, eot_id, device):
    """[B, L] ids on the CPU -> Texts on the device. What stands behind a text's end token is left out.

    All that the device needs to know is worked out here, on the host, which need not wait for the device then."""
    end = tokens == (eot_id if eot_id >= 0 else tokens.max(1, keepdim=True).values)
    lengths, order = (end.int().argmax(-1) + 1).sort()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    kept = positions < lengths[:, None]
    starts = F.pad(lengths.cumsum(0), (1, 0))
    groups = list(zip(*(x.tolist() for x in lengths.unique_consecutive(return_counts=True)[::-1])))
    parts = tokens[order][kept], positions[kept], (starts[1:] - 1)[order.argsort()], starts.int()
    return Texts(*(to_device(part, device) for part in parts), groups)


# === a step, and the run ==============================================================================================

def backward(model, towers, objective, batch, autocast):
    """Loss of the batch; its gradients into .grad. `towers` is the model, under DDP if there are several ranks.

    More than one chunk is GradCache (Gao et al. 2021): all features without gradients, the loss of the whole batch and
    its gradients with respect to them, then every chunk again, to carry these on into the towers."""
    chunks = batch["chunks"]
    if len(chunks) == 1:
        with autocast():
            outputs = towers(*chunks[0])
        loss = objective(batch["drawn"], *outputs)  # similarities are fp32: at 1 / tau = 100 bf16 would be too coarse
        loss.backward()
        return loss.detach()

    with torch.no_grad(), autocast():
        scales, *features = zip(*(model(*chunk) for chunk in chunks))
    scale, features = scales[0].requires_grad_(), [torch.cat(parts).requires_grad_() for parts in features]
    loss = objective(batch["drawn"], scale, *features)
    loss.backward()
    gradients = zip(*(feature.grad.split(len(chunks[0][0])) for feature in features))
    for i, (chunk, gradient) in enumerate(zip(chunks, gradients)):
        last = i == len(chunks) - 1
        with nullcontext() if last or towers is model else towers.no_sync():  # ranks talk once
            with autocast():
                outputs = towers(*chunk)
            torch.autograd.backward(outputs, [scale.grad / len(chunks), *gradient])
    return loss.detach()


def learning_rate(step, peak, warmup, steps):
    """Linear from peak/1000 over the warm-up steps, then a cosine to peak/100: at peak 1e-3 LaCLIP's 1e-6 and 1e-5."""
    if step < warmup:
        return peak * (0.001 + 0.999 * step / warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def train(args):
    device = pick_device(args.device)
    for path in args.captions:  # before the ranks meet, since it may take longer than --timeout
        if not os.path.isfile(path):
            die(f"--captions {path}: no such file")
        if (local := int(os.environ.get("LOCAL_RANK", 0))) == 0:  # once a node: it need not share its disk
            index_rows(path)
            read_index(path) or die(f"{path} changes while it is read")
        while local and not read_index(path):
            time.sleep(1)
    rank, world = start_ranks(device, args.timeout)
    rows, fields, tokenizer, config, settings, weights = read_settings(args, world)
    steps, steps_per_epoch = settings["steps"], len(rows) // args.batch_size
    try:
        os.makedirs(args.out, exist_ok=True)  # on every node, should it not be shared
        if rank == 0:
            locked = lock(os.path.join(args.out, "lock"), f"--out {args.out}")  # noqa: F841  held until train returns
    except OSError as e:
        die(f"--out {args.out}: {e.strerror}")
    state = resumed_state(args, settings, tokenizer)
    start = state["step"] if state else 0
    mine = torch.tensor([start, zlib.crc32(json.dumps(settings).encode())])
    if (all_reduce(mine.clone(), dist.ReduceOp.MIN) != all_reduce(mine.clone(), dist.ReduceOp.MAX)).any():
        die(f"the ranks begin at different steps (this one at {start}) or with different rows: --out and --captions must be "
            "the same for all")
    if start >= steps:
        return print(f"{args.out} is finished: {start} steps") if rank == 0 else None

    # model, optimizer, data
    torch.manual_seed(args.seed)
    model = CLIP(config).to(device)
    if args.freeze_text:
        model.text_encoder.requires_grad_(False)
    head = projection_head(config.vision_width).to(device) if args.ssl else nn.Identity()
    decay, no_decay = [], []
    for parameter in filter(lambda p: p.requires_grad, [*model.parameters(), *head.parameters()]):
        (decay if parameter.ndim > 1 else no_decay).append(parameter)
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": args.wd}, {"params": no_decay, "weight_decay": 0}],
                                  lr=args.lr, betas=(0.9, args.beta2), eps=args.eps, fused=True)
    if state:
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        model.load_state_dict({**model.state_dict(), **weights})
    del state, weights
    for transformer in (module for module in model.modules() if isinstance(module, Transformer)):
        transformer.grad_checkpointing = args.grad_checkpointing
    if args.compile == "on" or args.compile == "auto" and "cuda" in device:
        model.visual.compile()  # in place: names in the checkpoint stay as they are
    towers = model  # device_ids would make DDP copy the inputs, and wait
    if world > 1:
        towers = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    samples = Samples(rows, args.image_root, fields, args.alt_choice, AUGMENTATIONS[args.augment], config.image_size,
                      tokenizer, args.seed, steps_per_epoch * args.batch_size, args.loss == "multitext", args.ssl,
                      SHUFFLES[args.shuffle])
    pieces = Pieces(start, steps, args.batch_size, rank, world)
    loader = iter(torch.utils.data.DataLoader(
        samples, batch_sampler=pieces, num_workers=args.workers, collate_fn=collate, pin_memory="cuda" in device,
        worker_init_fn=begin_worker,
        prefetch_factor=1 + -(-pieces.per_step // args.workers) if args.workers else None))
    micro_batch = args.micro_batch or args.batch_size

    autocast = partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")

    def objective(drawn, scale, images, texts, views=None):
        loss = multitext_loss(images, texts, drawn, scale) if args.loss == "multitext" else \
            clip_loss(images, texts[:, 0], scale)
        return loss + simclr_loss(autocast()(head.forward), views) if args.ssl else loss  # SLIP: weight 1

    if rank == 0:
        with open(os.path.join(args.out, "settings.json"), "w") as f:
            json.dump({**settings, "command": sys.argv, "torch": torch.__version__, "ranks": world}, f, indent=1)
        metrics = open_log(os.path.join(args.out, "metrics.jsonl"), start)
        print(f"{settings['model']}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {len(rows)} rows; {steps} "
              f"steps of {args.batch_size}, {steps / steps_per_epoch:.1f} epochs; chance: ln(batch) = "
              f"{math.log(args.batch_size):.2f}", file=sys.stderr)
        open_log(os.path.join(args.out, "bad_images.jsonl"), start).close()
    all_reduce(torch.zeros(1))  # bad_images.jsonl is cut back before anybody appends
    bad_images = open(os.path.join(args.out, "bad_images.jsonl"), "ab", buffering=0)
    progress = tqdm(total=steps, initial=start, unit="step", desc=os.path.basename(args.out), disable=rank > 0)

    stopping, faults = [], []  # SIGTERM (a preempted node), a full disk: save at the next step boundary and leave
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    seen = bad = filled = replaced = 0  # since the start of this process, on this rank
    wait, since, timed, losses = 0.0, time.time(), start, []
    for step in range(start, steps):
        asked = time.time()
        batch = join([next(loader) for _ in range(pieces.per_step)], device, micro_batch, config.eot_id)
        wait += time.time() - asked

        optimizer.zero_grad(set_to_none=True)
        losses.append(backward(model, towers, objective, batch, autocast))
        for parameter in head.parameters():  # the head stands outside of DDP
            all_reduce(parameter.grad.div_(world))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr, settings["warmup"], steps)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # tau >= 0.01 (CLIP; LaCLIP's release)

        seen, bad = seen + batch["n"], bad + len(batch["bad"])
        filled, replaced = filled + batch["filled"], replaced + batch["replaced"]
        for name, why in batch["bad"]:
            log_line(bad_images, {"step": step + 1, "image": name, "reason": why}, faults)
        if bad > args.max_bad * max(seen + bad, 1000):
            faults.append(f"{bad} of {seen + bad} rows were unusable, more than --max-bad {args.max_bad}: {bad_images.name} "
                          "names them")
        leave = bool(all_reduce(torch.tensor(len(stopping + faults)), dist.ReduceOp.MAX)) or step + 1 == steps
        keep = args.keep_every and (step + 1) % args.keep_every == 0
        save = leave or keep or (step + 1) % args.save_every == 0
        log = step in (0, steps - 1) or (step + 1) % args.log_every == 0
        if save or log:
            losses = all_reduce(torch.stack(losses) / world).tolist()  # of the steps since the last look
            for number, loss in enumerate(losses, step + 2 - len(losses)):
                if not math.isfinite(loss):
                    die(f"the loss is {loss} at step {number}; {args.out} keeps the last good checkpoint")
            if log and rank == 0:
                now = time.time()
                entry = {"step": step + 1, "epoch": round((step + 1) / steps_per_epoch, 4), "loss": losses[-1],
                         "lr": optimizer.param_groups[0]["lr"], "logit_scale": model.logit_scale.exp().item(),
                         "samples_per_s": float(f"{(step + 1 - timed) * args.batch_size / (now - since):.4g}"),
                         "data_wait_s": round(wait, 3), "replaced": round(replaced / seen, 4)}  # share of texts of one word
                if args.loss == "multitext":
                    entry["filled"] = round(filled / (seen * len(fields)), 4)  # share of versions that were missing
                log_line(metrics, entry, faults)
                progress.set_postfix(loss=f"{losses[-1]:.3f}", samples_per_s=entry["samples_per_s"])
                timed, since, wait = step + 1, now, 0.0
            losses = []
        progress.update()
        if save and not all(parameter.isfinite().all() for parameter in model.parameters()):
            die(f"a weight is not finite after step {step + 1}; {args.out} keeps the last good checkpoint")
        if save and rank == 0:
            save_checkpoint(os.path.join(args.out, "checkpoint.pt"), model, tokenizer, head=head.state_dict(),
                            optimizer=optimizer.state_dict(), step=step + 1,
                            settings={**settings, "captions": args.captions})
            if keep:
                keep_checkpoint(args.out, step + 1, faults)
        if leave:
            break
    progress.close()
    all_reduce(torch.zeros(1))  # rank 0 has saved
    if faults:
        die(f"{faults[0]}; the state of step {step + 1} is saved")
    if rank == 0 and step + 1 < steps:
        print(f"stopped at step {step + 1} of {steps}: the same command with --resume auto goes on", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()


# === samples ==========================================================================================================

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


BLOCK, WINDOW = 1000, 256  # rows, blocks


def shuffled_in_blocks(i, n, key):
    """The same for storage that is slow at random reads: blocks of consecutive rows in random order, the rows of a window
    of such blocks mixed. A random shift moves the rows that make no whole block: none stands at the end in every epoch."""
    blocks, row = n // BLOCK, i
    if blocks < 2:
        return shuffled(i, n, key)
    if i < blocks * BLOCK:
        window, place = divmod(i, WINDOW * BLOCK)
        first = window * WINDOW
        place = shuffled(place, min(WINDOW, blocks - first) * BLOCK, key ^ (window + 1) << 20)
        row = shuffled(first + place // BLOCK, blocks, key) * BLOCK + place % BLOCK
    return (row + shuffled(0, n, key)) % n


SHUFFLES = {"full": shuffled, "blocks": shuffled_in_blocks}


class Samples(torch.utils.data.Dataset):
    """Sample number `position` of the run. Every random draw in it is a function of (seed, position) alone, so neither
    ranks nor workers nor a restart change what the model sees."""

    def __init__(self, rows, image_root, text, alt_choice, augment, image_size, tokenizer, seed, per_epoch, multitext, ssl,
                 shuffle=shuffled):
        self.rows, self.image_root, self.fields = rows, image_root, text
        self.alt_choice, self.augment, self.image_size, self.tokenizer = alt_choice, augment, image_size, tokenizer
        self.seed, self.per_epoch, self.multitext, self.ssl, self.shuffle = seed, per_epoch, multitext, ssl, shuffle

    def __getitem__(self, position):
        """-> dict: images uint8 [1, 3, S, S], or with ssl [3, ...], two more views; ids, one text's or (multitext) all
        M + 1; drawn, the index of the drawn one; filled, how many were missing; replaced, whether alt took the place of
        one word; bad, [(name, reason)] of rows that this one replaced."""
        epoch, place = divmod(position, self.per_epoch)
        rng = np.random.default_rng([self.seed, epoch, place])
        index, bad = self.shuffle(place, len(self.rows), self.seed << 32 | epoch), []
        while True:
            name = None
            try:
                row = self.rows[index]
                name = row.get("image")
                sample = self.encoded(*draw_texts(row, self.fields, rng, self.alt_choice, self.multitext))
                image = open_image(self.image_root, name)
                image = to_rgb(image) if self.ssl else image  # one decode for three crops
                views = [self.augment(image, self.image_size, rng)]
                views += [augment_slip(image, self.image_size, rng) for _ in range(2 * self.ssl)]
                return {**sample, "images": torch.stack([to_uint8(view) for view in views]), "bad": bad}
            except Exception as e:  # Pillow's decoders raise nearly everything; a month's run must outlive any file
                bad.append((name or self.rows.name(index), f"{type(e).__name__}: {e}"))
                index = int(rng.integers(len(self.rows)))
                if len(bad) == 100:
                    last = ": ".join(map(str, bad[-1]))
                    raise BadRow(f"a hundred rows in a row are unusable, the last one is {last}") from None

    def encoded(self, texts, drawn, replaced):
        """The drawn text's ids, or all texts': a missing one is the first that is there."""
        if not self.multitext:
            return {"ids": [self.tokenizer.encode(texts[drawn])], "drawn": 0, "filled": 0, "replaced": replaced}
        first = next(filter(None, texts))
        return {"ids": [self.tokenizer.encode(text or first) for text in texts], "drawn": drawn, "filled": texts.count(None),
                "replaced": replaced}


def collate(samples):
    """-> images uint8 [n, 1 or 3, 3, S, S], tokens [n, 1 or M + 1, L], drawn [n], filled, replaced, bad"""
    texts, K = pad([ids for sample in samples for ids in sample["ids"]]), len(samples[0]["ids"])
    return {"images": torch.stack([sample["images"] for sample in samples]),
            "tokens": texts.view(len(samples), K, -1),
            "drawn": torch.tensor([sample["drawn"] for sample in samples]),
            "filled": sum(sample["filled"] for sample in samples), "replaced": sum(sample["replaced"] for sample in samples),
            "bad": [bad for sample in samples for bad in sample["bad"]]}


class Pieces:
    """This rank's share of every global batch from step `start` on: lists of at most 256 positions, so that what workers
    hold ahead does not grow with the batch and the first one is soon there."""

    def __init__(self, start, steps, batch_size, rank, world, size=256):
        self.steps, self.batch_size, self.n = range(start, steps), batch_size, batch_size // world
        self.rank, self.size = rank, size
        self.per_step = -(-self.n // size)

    def __iter__(self):
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.n
            for at in range(first, first + self.n, self.size):
                yield list(range(at, min(at + self.size, first + self.n)))

    def __len__(self):
        return len(self.steps) * self.per_step


def join(pieces, device, micro_batch, eot_id):
    """The pieces of a step -> its batch, in chunks of `micro_batch` images with their packed texts"""
    length = max(piece["tokens"].shape[-1] for piece in pieces)
    images = torch.cat([piece["images"].to(device, non_blocking=True) for piece in pieces])
    tokens = torch.cat([F.pad(piece["tokens"], (0, length - piece["tokens"].shape[-1])) for piece in pieces])
    chunks = [(part, pack(ids.flatten(0, 1), eot_id, device))
              for part, ids in zip(images.split(micro_batch), tokens.split(micro_batch))]
    return {"chunks": chunks, "n": len(images), "drawn": to_device(torch.cat([piece["drawn"] for piece in pieces]), device),
            **{key: sum(piece[key] for piece in pieces) for key in ("filled", "replaced")},
            "bad": [bad for piece in pieces for bad in piece["bad"]]}


def to_device(x, device):
    return x.pin_memory().to(device, non_blocking=True) if "cuda" in str(device) else x.to(device)


@atexit.register
def end_workers():
    """multiprocessing would end them by SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def begin_worker(worker):
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to all processes; the main one needs batches to the end
    if multiprocessing.get_start_method() == "fork" and os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)  # the main process died before torch's own watch began


# === images ===========================================================================================================

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # of Pillow's; EPS would run Ghostscript


def open_image(root, name):
    """A PIL image, not yet decoded, from a file under `root` or from `shard.tar@OFFSET+SIZE`. A row cannot name what lies
    outside; a link that lies inside is the user's own, and is followed."""
    if not isinstance(name, str) or not name:
        raise ValueError("no image")
    member = re.fullmatch(r"(.+)@(\d+)\+(\d+)", name)
    path = member[1] if member else name
    if os.path.isabs(path) or ".." in path.split("/"):
        raise ValueError("outside --image-root")
    path = os.path.join(root, path)
    status = os.stat(path)
    size = int(member[3]) if member else status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no file")
    if size > 1 << 28:
        raise ValueError(f"{size} bytes are no image")
    with open(path, "rb") as f:
        f.seek(int(member[2]) if member else 0)
        data = io.BytesIO(f.read(size))
    try:
        image = Image.open(data, formats=FORMATS)
    except UnidentifiedImageError:  # its own message has a memory address in it, another one in every run
        raise ValueError(f"no image in one of {', '.join(FORMATS)}") from None
    if max(image.size) > 100 * min(image.size):  # its shorter side scaled up would fill the memory
        raise ValueError(f"{image.width} x {image.height} pixels are no image")
    return image


def orientation(image):
    """How the image is turned, by its EXIF tag; broken metadata says nothing."""
    try:
        return image.getexif().get(0x0112)
    except Exception:  # Pillow raises nearly everything there
        return None


def to_rgb(image):
    """Any PIL image -> RGB, upright; transparency becomes white, grey of 9 to 16 bits is scaled."""
    image.load()  # which turns a TIFF
    tags = getattr(image, "tag_v2", {})  # a TIFF's; elsewhere Pillow gives grey of 8 or 16 bits
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
            8: "ROTATE_90"}.get(orientation(image))
    if turn:
        image = image.transpose(Image.Transpose[turn])
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # convert("RGB") would clip these at 255
        bits = max(tags.get(258, (16,)))
        if image.mode == "F" or bits > 16 or tags.get(339, (1,)) != (1,):
            raise ValueError("grey of floats, signed or of more than 16 bits: the file does not say which value is white")
        image = image.convert("I").point(lambda value: value * (255 / (2 ** bits - 1)) + 0.5).convert("L")
        image = ImageOps.invert(image) if tags.get(262) == 0 else image  # white is zero
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def check_images(where, n, read):
    """One line and the end, if of a thousand of `n` images, taken evenly, read(i) can open none."""
    for i in range(0, n, -(-n // 1000) or 1):
        try:
            return read(i)
        except Exception as e:  # as in Samples
            fault = f"{type(e).__name__}: {e}"
    if n:
        die(f"{where}: none of the images that were tried can be read, the last one for this reason: {fault}")


def to_uint8(image):
    """RGB PIL image -> uint8 [3, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalise(images, mean, std):
    """uint8 or float32 [..., 3, H, W] in 0..255 -> float32, zero mean and unit variance a channel"""
    mean, std = (torch.as_tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images.float() / 255 - mean) / std


class EvalTransform:
    """PIL image -> [3, S, S]: shorter side to S, centre crop, normalised.

    resize "bicubic" is OpenAI CLIP's, "bilinear" LaCLIP's (both smooth what they shrink), "bilinear-unsmoothed" VeCLIP's:
    no antialias, and floats until the end."""

    def __init__(self, config):
        self.image_size, self.mean, self.std, self.resize = config.image_size, config.mean, config.std, config.resize

    def __call__(self, image):
        S, (w, h) = self.image_size, image.size
        if self.resize == "bilinear-unsmoothed":
            w, h = max(S, round(S * w / h)), max(S, round(S * h / w))
            pixels = F.interpolate(to_uint8(image)[None].float(), (h, w), mode="bilinear")[0]
            left, top = (w - S) // 2, (h - S) // 2
        else:
            w, h = (S, S * h // w) if w <= h else (S * w // h, S)
            pixels = to_uint8(image.resize((w, h), Image.Resampling[self.resize.upper()]))
            left, top = round((w - S) / 2), round((h - S) / 2)
        return normalise(pixels[:, top:top + S, left:left + S], self.mean, self.std)


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


def augment_crop(image, S, rng, scale=(0.5, 1.0)):
    """LaCLIP's: RandomResizedCrop(scale 0.5-1), no flip, since captions say left and right. -> RGB [S, S]

    A JPEG of which the crop needs less than half the pixels a side is decoded at a half, a quarter or an eighth (DCT
    scaling). The box is that of the whole picture; pixel values differ a little from those of a full decode."""
    w, h = image.size[::-1] if orientation(image) in (5, 6, 7, 8) and image.format != "TIFF" else image.size  # on its side
    left, top, right, bottom = crop_box(w, h, rng, scale)
    shrink = max(1, min(right - left, bottom - top) // S)
    image.draft(None, (image.width // shrink, image.height // shrink))
    image = to_rgb(image)
    x, y = image.width / w, image.height / h
    return image.resize((S, S), Image.BICUBIC, box=(left * x, top * y, right * x, bottom * y))


def augment_drawing(image, S, rng):
    """For small sets of drawings: turn, zoom, shift and shear a little; at times draw the edges too."""
    image = to_rgb(image)
    angle, (shear, dx, dy) = rng.uniform(-0.105, 0.105), rng.uniform(-0.045, 0.045, 3)
    zx, zy = np.array(image.size) / S * rng.uniform(0.93, 1.07) * rng.uniform(0.97, 1.03, 2)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = zx * cos, zx * (shear - sin), zy * sin, zy * cos  # output pixel -> input pixel
    cx, cy = image.width * (0.5 + dx), image.height * (0.5 + dy)
    image = image.transform((S, S), Image.AFFINE, (a, b, cx - (a + b) * S / 2, d, e, cy - (d + e) * S / 2),
                            Image.BILINEAR, fillcolor="white")
    return ImageChops.multiply(image, image.filter(ImageFilter.CONTOUR)) if rng.random() < 0.3 else image


def augment_slip(image, S, rng):
    """A view for SLIP's self-supervision; all figures are its release's (SimCLR's). -> RGB [S, S]"""
    image = augment_crop(image, S, rng, scale=(0.08, 1.0))
    if rng.random() < 0.8:  # colour jitter in any order
        jitters = [(TF.adjust_brightness, rng.uniform(0.6, 1.4)), (TF.adjust_contrast, rng.uniform(0.6, 1.4)),
                   (TF.adjust_saturation, rng.uniform(0.6, 1.4)), (TF.adjust_hue, rng.uniform(-0.1, 0.1))]
        for i in rng.permutation(4):
            image = jitters[i][0](image, jitters[i][1])
    if rng.random() < 0.2:
        image = TF.rgb_to_grayscale(image, 3)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    return TF.hflip(image) if rng.random() < 0.5 else image


AUGMENTATIONS = {"crop": augment_crop, "drawing": augment_drawing}


# === rows =============================================================================================================

class BadRow(Exception):
    """A row that cannot be trained on, and why; another one takes its place and it is named in bad_images.jsonl."""


def parse_row(line):
    """The object of a JSONL line; a byte order mark before it is skipped."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise BadRow(f"not JSON: {e}") from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    return row


def open_rows(path):
    """A JSONL file, open as bytes, or one line that says why not."""
    try:
        f = open(path, "rb")
    except OSError as e:
        die(f"{path}: {e.strerror}")
    if f.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        die(f"{path} is UTF-16; expected UTF-8")
    return f


INDEX_HEADER = 5  # numbers before the offsets: size and times of the rows' file, how many rows there are, a hash


def read_index(path):
    """The rows' number and a hash of the file's content, if PATH.idx was made of it and is whole; else None."""
    with suppress(OSError), open(path + ".idx", "rb") as f:
        header, now = np.fromfile(f, "<u8", INDEX_HEADER).tolist(), os.stat(path)
        if len(header) == INDEX_HEADER:
            *file, rows, content = header
            whole = os.fstat(f.fileno()).st_size == 8 * (INDEX_HEADER + rows)
            if whole and file == [now.st_size, now.st_mtime_ns, now.st_ctime_ns]:
                return rows, content
    return None


def index_rows(path):
    """Write PATH.idx: size, time and change time of the file, number of rows, hash of the content, then the byte offset of
    every line, all uint64. Made once, in one pass (every write to a file renews its change time, which nobody can set
    back); afterwards a row costs two preads, and memory grows neither with rows nor with workers."""
    if read_index(path):
        return
    temporary = f"{path}.idx.{os.uname().nodename}.{os.getpid()}"  # two nodes may share the disk
    try:
        with open_rows(path) as f, open(temporary, "wb") as out:
            now, content = os.fstat(f.fileno()), hashlib.sha256()
            out.write(bytes(8 * INDEX_HEADER))
            offsets, at, rows = array("Q"), 0, 0
            for line in tqdm(f, desc=f"indexing {path}", unit="row", unit_scale=True, delay=2):
                offsets.append(at)
                content.update(line)
                at += len(line)
                if len(offsets) == 1 << 20:
                    offsets.tofile(out)
                    rows, offsets = rows + len(offsets), array("Q")
            offsets.tofile(out)
            out.seek(0)
            array("Q", [now.st_size, now.st_mtime_ns, now.st_ctime_ns, rows + len(offsets),
                        int.from_bytes(content.digest()[:8])]).tofile(out)
        os.replace(temporary, path + ".idx")
    except OSError as e:
        with suppress(OSError):
            os.remove(temporary)
        die(f"the rows' offsets cannot be written beside {path}: {e}")


class Rows:
    """The rows of several JSONL files as one sequence of dicts, read where they lie."""

    def __init__(self, paths):
        self.paths, self.files = paths, None
        self.sizes = [os.path.getsize(path) for path in paths]
        counts, self.contents = zip(*map(read_index, paths))
        self.ends = np.cumsum(counts)

    def __len__(self):
        return int(self.ends[-1])

    def __getstate__(self):  # a worker opens its own files
        return {**self.__dict__, "files": None}

    def place(self, i):
        """Row i -> (number of its file, its number in this file)"""
        number = int(np.searchsorted(self.ends, i, side="right"))
        return number, i - (int(self.ends[number - 1]) if number else 0)

    def name(self, i):
        number, i = self.place(i)
        return f"{self.paths[number]}, line {i + 1}"

    def __getitem__(self, i):
        if self.files is None:
            self.files = [(open(path, "rb"), open(path + ".idx", "rb")) for path in self.paths]
        number, i = self.place(i)
        rows, index = (f.fileno() for f in self.files[number])
        start, *end = np.frombuffer(os.pread(index, 16, 8 * (INDEX_HEADER + i)), "<u8").tolist()
        return parse_row(os.pread(rows, (end[0] if end else self.sizes[number]) - start, start))


# === tokenizer ========================================================================================================

class Tokenizer:
    """texts -> LongTensor [B, L] of ids, start ... end, 0 behind; L is the longest of the batch, at most
    `context_length`. Holds any tokenizers.Tokenizer whose own post-processor adds the start and end tokens."""

    def __init__(self, json_text, context_length=77, mend=False):
        self.json_text, self.context_length, self.mend = json_text, context_length, mend
        if mend:
            mended("")  # which says now if ftfy is missing
        self.tokenizer = tokenizers.Tokenizer.from_str(json_text)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(context_length)  # keeps the end token the last
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a caption is just text
        (*_, self.eot_id), other = (self.tokenizer.encode(text).ids for text in ("a", "dog"))
        if other[-1] != self.eot_id or other.count(self.eot_id) > 1 or \
                self.eot_id not in self.tokenizer.get_added_tokens_decoder():
            raise ValueError("it has no end token: its post-processor must add one behind every text, and only there")
        self.vocab_size = self.tokenizer.get_vocab_size()

    @classmethod
    def load(cls, name):
        """From a tokenizer.json, a folder or a hub name."""
        if os.path.isdir(name) and not {"tokenizer.json", "vocab.json", "vocab.txt"} & set(os.listdir(name)):
            die(f"--tokenizer {name}: no tokenizer.json in it")  # transformers would make up an empty one
        try:
            if name.endswith(".json"):
                with open(name, encoding="utf-8") as f:
                    return cls(f.read())
            from transformers import AutoTokenizer
            return cls(AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer.to_str())
        except Exception as e:  # tokenizers raises bare Exception for a file it cannot parse
            die(f"--tokenizer {name}: {type(e).__name__}: {e}")

    def encode(self, text):
        """Ids of one text. A hundred kilobytes are no caption: their first twenty are read."""
        text = text[:20_000].encode("utf-8", "replace").decode()
        *ids, end = self.tokenizer.encode(mended(text) if self.mend else text).ids
        return [i for i in ids if i != end] + [end]  # T5's vocabulary has "</s>" as a piece of text, too

    def __call__(self, texts):
        return pad([self.encode(text) for text in texts])

    def __getstate__(self):
        return self.json_text, self.context_length, self.mend

    def __setstate__(self, state):
        self.__init__(*state)


def mended(text):
    """What the tokenizers of OpenAI, open_clip and LaCLIP do first: mend broken Unicode, curly quotes, HTML entities."""
    try:
        import ftfy
    except ImportError:
        die("this checkpoint was trained on texts that ftfy had mended: pip install ftfy")
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def pad(ids):
    """Lists of ids -> LongTensor [B, L], zeros behind; attention is causal, so what follows the end has no effect."""
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for row, text in zip(tokens, ids):
        row[:len(text)] = torch.tensor(text)
    return tokens


# === checkpoints ======================================================================================================

def save_checkpoint(path, model, tokenizer, **more):
    """Complete or absent: a temporary name, synced, then renamed."""
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save({"model": model.state_dict(), "config": asdict(model.config), "tokenizer": tokenizer.json_text,
                        **more}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:  # a full disk: torch raises either
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        die(f"{path} could not be written, the one before it is kept: {e}")


def keep_checkpoint(out, step, faults):
    """checkpoint.pt under a second name, too. The same file: it is never written again, only replaced."""
    newest, kept = os.path.join(out, "checkpoint.pt"), os.path.join(out, f"checkpoint-{step}.pt")
    try:
        with suppress(FileNotFoundError):
            os.remove(kept)
        try:
            os.link(newest, kept)
        except OSError:  # a disk without links
            shutil.copyfile(newest, kept + ".tmp")
            os.replace(kept + ".tmp", kept)
    except OSError as e:
        faults.append(f"{kept}: {e.strerror}")


def reason(error):
    """An exception in one short line; torch's have escape codes, and advice to read the file unsafely."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    return f"it holds {foreign[1]}, which is neither a tensor nor a plain value" if foreign else \
        f"{type(error).__name__}: {text.strip().splitlines()[0][:200] if text.strip() else ''}"


def read_checkpoint(path):
    """The checkpoint's dict, on the CPU and mapped, so that ranks of a node share its pages; only tensors and plain values
    are unpickled."""
    if not os.path.isfile(path):
        die(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                die(f"{path} is damaged: {damaged} is not what was written")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch raises a different class for every way in which a file is not one of its own
        die(f"{path} is not a checkpoint of train_clip.py: {reason(e)}")
    if missing := {"model", "config", "tokenizer"} - set(checkpoint if isinstance(checkpoint, dict) else ()):
        die(f"{path} is not a checkpoint of train_clip.py: it has no {', '.join(sorted(missing))}")
    return checkpoint


def load_text_encoder(name):
    """The encoder with its pre-trained weights, from a folder or the hub. Weights that are missing are a mistake, not drawn."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        encoder, report = transformers.AutoModelForTextEncoding.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    except Exception as e:  # of every class, as for tokenizers
        die(f"--text-model {name}: expected the folder or hub name of a transformers text encoder: {reason(e)}")
    if missing := [key for key in report["missing_keys"] if not key.startswith("pooler.")]:
        die(f"--text-model {name}: its weights lack {missing[0]} and {len(missing) - 1} more")
    encoder.pooler = None  # as in build_text_encoder
    return encoder.eval()


def stretched(positions, length, kept=20):
    """Position embeddings [L, W] for another context length. A longer one keeps the first `kept`, which are trained best,
    and interpolates the rest (Long-CLIP, arXiv 2403.15378, section 3.1); a shorter one keeps the first."""
    if length <= len(positions):
        return positions[:length]
    kept = kept if len(positions) > kept else 0
    rest = F.interpolate(positions[kept:].T[None], length - kept, mode="linear", align_corners=True)[0].T
    return torch.cat([positions[:kept], rest])


def load_checkpoint(path, device="cpu"):
    """-> (model in eval mode, tokenizer, transform): all that evaluation needs."""
    state = read_checkpoint(path)
    try:
        model = CLIP(Config(**state["config"]))
        model.load_state_dict(state["model"])
        tokenizer = Tokenizer(state["tokenizer"], model.config.context_length, model.config.mend_texts)
    except Exception as e:  # tokenizers raises no less
        die(f"{path} does not fit its own config: {reason(e)}")
    return model.eval().to(device), tokenizer, EvalTransform(model.config)


def resumed_state(args, settings, tokenizer):
    """The checkpoint to go on from, or None for a new run; one that was made otherwise is a user's mistake."""
    newest = os.path.join(args.out, "checkpoint.pt")
    used = os.path.isdir(args.out) and set(os.listdir(args.out)) - {"lock"}
    if used and args.resume != "auto" and not (args.resume and os.path.samefile(os.path.dirname(args.resume) or ".", args.out)):
        die(f"--out {args.out} is not empty: --resume auto goes on with it, or choose another folder")
    if not args.resume or args.resume == "auto" and not os.path.exists(newest):
        return None
    state = read_checkpoint(newest if args.resume == "auto" else args.resume)
    if "optimizer" not in state:
        die(f"--resume {args.resume}: weights alone, converted or exported; there is no run to go on with")
    for name, value in settings.items():
        if (before := state["settings"].get(name, value)) != value:
            die(f"--resume: the checkpoint was made with {name} = {before!r}, now it is {value!r}")
    if state["tokenizer"] != tokenizer.json_text:
        die(f"--resume: the checkpoint was made with another tokenizer")
    return state


# === the command ======================================================================================================

def parse_args(argv):
    parser = new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--captions", nargs="+", required=True, metavar="JSONL", help="one or more files, together one data set")
    add("--image-root", required=True, help="the folder that the rows' image paths start from")
    add("--text", nargs="+", default=["alt"], metavar="FIELD[=WEIGHT]", help="fields to draw a text from (default: alt)")
    add("--alt-choice", choices=["random", "first", "best"], default="random",
        help="of an image with several AltTexts; best: the highest clip_score (default: %(default)s)")
    add("--shuffle", choices=SHUFFLES, default="full", help="full: every row anywhere in the epoch, for local disks; blocks: "
        "of 1,000 rows, mixed 256 at a time, for NFS, Lustre and object storage (default: full)")
    add("--augment", choices=AUGMENTATIONS, default="crop", help="crop: LaCLIP's; drawing: for small sets of drawings")
    add("--workers", type=number(int, 0), default=own_cpus(), help="processes a rank that read images, 0: none (default: "
        "this rank's CPUs less one, %(default)s)")
    add("--max-bad", type=number(float, 0), default=0.01, help="stop above this share of unusable rows (default: %(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=PRESETS, help="default: ViT-B/16")
    add("--init", metavar="PATH", help="begin with the weights, sizes and tokenizer of this checkpoint (OpenAI's, "
        "open_clip's: data/convert_checkpoint.py), instead of random weights of --model")
    add("--text-model", metavar="NAME", help="hub name or folder of a pre-trained transformers encoder (BERT, RoBERTa, T5, ...): it "
        "and its tokenizer replace the text tower of --model; a text's feature is a projection of the mean over its tokens")
    add("--freeze-text", action="store_true", help="train the projection of --text-model only, not its encoder")
    add("--image-size", type=number(int, 1), help="pixels a side (default: 224, nano 32)")
    add("--context-length", type=number(int, 2), help="longest text in tokens (default: 77). With --init a longer one keeps "
        "the first 20 positions and stretches the rest (Long-CLIP, arXiv 2403.15378)")
    add("--tokenizer", help="hub name, folder or tokenizer.json (default: openai/clip-vit-base-patch32, or that of --init or "
        "--text-model)")
    add = parser.add_argument_group("training; defaults are LaCLIP's release for CC3M and CC12M").add_argument
    add("--loss", choices=["infonce", "multitext"], default="infonce", help="multitext: LaCLIP-MT")
    add("--ssl", action="store_true", help="add SLIP's loss on two more views of every image (SLIP, LaSLIP)")
    add("--batch-size", type=number(int, 1), default=8192, help="global, over all ranks (default: %(default)s)")
    add("--micro-batch", type=number(int, 1), metavar="N", help="images that a rank holds at a time; same loss and "
        "gradients, a second forward pass (GradCache; default: all of its share)")
    add("--epochs", type=positive, default=40, help="passes over the rows, without the last partial batch (default: 40)")
    add("--steps", type=number(int, 1), help="steps, instead of --epochs")
    add("--lr", type=positive, default=1e-3, help="peak learning rate (default: %(default)s)")
    add("--wd", type=number(float, 0), default=0.5, help="weight decay, not on parameters of <= 1 dimension (default: %(default)s)")
    add("--beta2", type=number(float, 0, below=1), default=0.98)
    add("--eps", type=positive, default=1e-8)
    add("--warmup", type=number(int, 0), help="steps of linear warm-up (default: one epoch; of a run of one, a tenth)")
    add("--precision", choices=["fp32", "bf16"], default="bf16", help="bf16: autocast; weights and loss stay fp32")
    add("--grad-checkpointing", action="store_true", help="keep no activations inside blocks, compute them again")
    add("--compile", nargs="?", const="on", default="auto", choices=["auto", "on", "off"],
        help="torch.compile the image tower (the text tower's shapes change every step); auto: on a GPU")
    add("--seed", type=number(int, 0, below=2 ** 31), default=0)
    add = parser.add_argument_group("run").add_argument
    add("--out", required=True, help="folder of checkpoint, metrics and settings")
    add("--resume", metavar="auto|PATH", help="auto: go on from OUT's checkpoint, or begin; PATH: from that checkpoint")
    add("--save-every", type=number(int, 1), default=1000, help="steps between checkpoints (default: %(default)s)")
    add("--keep-every", type=number(int, 1), metavar="N", help="keep the checkpoints of every Nth step, as checkpoint-STEP.pt")
    add("--log-every", type=number(int, 1), default=10, help="steps between lines of metrics.jsonl (default: %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--timeout", type=number(float, -math.inf, above=0, below=1e5), default=10, metavar="MINUTES",
        help="how long ranks wait for one that died (default: %(default)s)")
    return parser.parse_args(argv)


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


def own_cpus():
    """The CPUs of this process, shared among the ranks of its node, less one for the process itself"""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


def read_settings(args, world):
    """The user's mistakes, before anything is written. -> rows, fields, tokenizer, config, the settings that change
    the mathematics (a run goes on only with the same), and the weights to begin with, {name: tensor}."""
    if args.batch_size % world:
        die(f"--batch-size {args.batch_size} does not divide by the number of ranks, {world}")
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    if args.resume not in (None, "auto") and not os.path.isfile(args.resume):
        die(f"--resume {args.resume}: no such checkpoint")
    rows, fields, init, encoder = Rows(args.captions), parse_text(args.text), None, None
    if args.init and (args.model or args.tokenizer or args.text_model):
        die("--init brings its own sizes and tokenizer: no --model, --text-model or --tokenizer beside it")
    if args.text_model and args.tokenizer:
        die("--text-model brings its own tokenizer: no --tokenizer beside it")
    if args.init:
        init, tokenizer, _ = load_checkpoint(args.init)
        config, encoder = init.config, getattr(init, "text_encoder", None)
    else:
        config = Config(**PRESETS[args.model or "ViT-B/16"])
        tokenizer = Tokenizer.load(args.tokenizer or args.text_model or "openai/clip-vit-base-patch32")
        if args.text_model:
            encoder = load_text_encoder(args.text_model)
            config.text_model, config.text_width = encoder.config.to_dict(), encoder.config.hidden_size
    if args.freeze_text and not encoder:
        die("--freeze-text: expected --text-model, or an --init that was trained with it")
    steps_per_epoch = len(rows) // args.batch_size
    if not steps_per_epoch:
        die(f"--batch-size {args.batch_size} is more than the {len(rows)} rows of {' '.join(args.captions)}")
    check_rows(rows, fields, args.image_root)
    if init and args.image_size not in (None, config.image_size):
        die(f"--image-size {args.image_size}: the checkpoint of --init has {config.image_size}")
    if not init:
        config.vocab_size, config.eot_id = tokenizer.vocab_size, tokenizer.eot_id
        config.image_size = args.image_size or config.image_size
    if config.image_size % config.patch_size:
        die(f"--image-size {config.image_size}: expected a multiple of the patch size, {config.patch_size}")
    config.context_length = args.context_length or config.context_length
    tokenizer = Tokenizer(tokenizer.json_text, config.context_length, config.mend_texts)
    weights = init.state_dict() if init else {f"text_encoder.{name}": x for name, x in encoder.state_dict().items()} if encoder else {}
    if encoder:
        try:
            with torch.no_grad():
                encoder(input_ids=torch.full((1, config.context_length), config.vocab_size - 1))
        except (IndexError, RuntimeError) as e:
            die(f"--context-length {config.context_length}: the text encoder takes no text of so many tokens with ids up to "
                f"{config.vocab_size - 1}: {reason(e)}")
    elif init:
        weights["positional_embedding"] = stretched(weights["positional_embedding"], config.context_length)
    steps = args.steps if args.steps is not None else round(args.epochs * steps_per_epoch)
    if not steps:
        die(f"--epochs {args.epochs}: no step, since an epoch has {steps_per_epoch}")
    warmup = args.warmup if args.warmup is not None else steps_per_epoch
    if warmup >= steps and args.warmup is not None:
        die(f"--warmup {warmup} is as long as the run of {steps} steps: --lr would never be used")
    if warmup >= steps:
        warmup = steps // 10
        print(f"note: a warm-up of one epoch would be the whole run of {steps} steps; it is {warmup} (--warmup)", file=sys.stderr)
    settings = {"rows": len(rows), "contents": list(rows.contents), "text": fields, "steps": steps,
                "warmup": warmup, "model": args.init or args.model or "ViT-B/16", "image_size": config.image_size,
                "context_length": config.context_length, "text_model": args.text_model}
    settings |= {name: getattr(args, name) for name in ("loss", "ssl", "freeze_text", "alt_choice", "augment", "shuffle", "batch_size", "lr",
                                                        "wd", "beta2", "eps", "precision", "seed")}
    return rows, fields, tokenizer, config, settings, weights


def check_rows(rows, fields, image_root):
    """Stop before training if the first thousand rows of a file have none of the fields, or those of all files lack one, or
    if of a thousand rows all over the files none has an image that can be read."""
    missing = set(fields)
    for path, start, end in zip(rows.paths, [0, *rows.ends], rows.ends):
        found = set()
        for i in range(start, min(start + 1000, end)):
            try:
                found |= {field for field in fields if texts_of(rows[i].get(field))}
            except BadRow:
                continue
        if not found:
            die(f"--text {' '.join(fields)}: none of them has a text in the first 1,000 rows of {path}")
        missing -= found
    if missing:
        die(f"--text {' '.join(sorted(missing))}: no text in the first 1,000 rows of {' '.join(rows.paths)}")
    check_images(f"--image-root {image_root}", len(rows), lambda i: open_image(image_root, rows[i].get("image")))


def new_parser(description):
    """argparse's, with mistakes in one line; a terminal that is not UTF-8 gets escapes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    sys.stdout.reconfigure(errors="backslashreplace")
    return parser


def number(kind, low, below=math.inf, above=-math.inf):
    """For argparse: low <= x < below, and x > above"""
    def parse(text):
        if not (low <= (value := kind(text)) < below and value > above):
            bounds = {f"{low} or more": low, f"more than {above}": above, f"less than {below}": below}
            bounds = [words for words, bound in bounds.items() if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(f"{text}: expected {', '.join(bounds)}")
        return value
    parse.__name__ = kind.__name__
    return parse


positive = number(float, -math.inf, above=0)


def check_output(path, *inputs):
    """One line now, not after hours, if `path` cannot be written, or is one of the files that are read."""
    if not os.path.isdir(os.path.dirname(path) or "."):
        die(f"{path}: no such folder")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else os.path.dirname(path) or ".", os.W_OK):
        die(f"{path}: expected a file that can be written")
    for other in inputs:
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            die(f"{path} is read: expected another file to write to")


# === ranks, logs, and what ends a run =================================================================================

def pick_device(name):
    """auto: this rank's GPU, or Apple's, or the CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        die(f"--device {name}: torch finds none here")
    if name == "cuda" and (local := int(os.environ.get("LOCAL_RANK", 0))) >= torch.cuda.device_count():
        die(f"rank {local} of this node has no GPU: there are {torch.cuda.device_count()}")
    return f"cuda:{local}" if name == "cuda" else name


def start_ranks(device, minutes=30):
    """torchrun's environment, or a single process. -> (rank, number of ranks). `minutes`: how long a rank waits for another"""
    if "cuda" in device:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            die("several SLURM tasks without RANK would all do the same: start torchrun in one task a node")
        return 0, 1
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        die(f"RANK is set, {' and '.join(missing)} not: torchrun sets them all")
    dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo",  # gloo: what CPUs tell each other
                            timeout=timedelta(minutes=minutes))
    return dist.get_rank(), dist.get_world_size()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def open_log(path, step):
    """A JSONL file to append to, cut back to the lines up to `step`; what a kill left unfinished goes too."""
    f, end = open(path, "a+b"), 0
    f.seek(0)
    for line in f:
        try:
            if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                break
        except (ValueError, TypeError, LookupError):
            break
        end += len(line)
    f.truncate(end)
    f.close()
    return open(path, "ab", buffering=0)  # line by line; all ranks append to the same file


def log_line(f, entry, faults):
    """One line of JSON; what the disk says against it goes to `faults`, and the run saves its state and leaves."""
    try:
        line = json.dumps(entry).encode() + b"\n"
        if f.write(line) < len(line):
            raise OSError(0, "no space left")
    except OSError as e:
        faults.append(f"{f.name}: {e.strerror}")


def lock(path, what):
    """Keep other launches out until this process ends. The kernel holds the lock for the process, on a network disk its server
    does; when the process ends, however it ends, so does the lock. That the file is there says nothing."""
    f = open(path, "a")
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        die(f"{what}: another launch is at work in it")
    except OSError as e:
        print(f"{what}: no lock ({e.strerror}): see to it yourself that no second launch writes there", file=sys.stderr)
    return f


def die(message):
    """A user's mistake: one line on stderr and exit status 2."""
    line = f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}"
    tqdm.write(line, file=sys.stderr)  # above a progress bar
    raise SystemExit(2)


@contextmanager
def in_one_line():
    """What has no better place to be told: killed workers, rows of which none can be used, a full GPU, ranks that left."""
    try:
        yield
    except BadRow as e:
        die(str(e).strip().split("\n")[-1])
    except torch.OutOfMemoryError as e:
        die("the GPU's memory is full: --micro-batch or --grad-checkpointing help in training, --batch-size in evaluation: "
            + reason(e))
    except (RuntimeError, OSError, EOFError) as e:
        if dist.is_initialized() and (isinstance(e, dist.DistError) or "gloo" in str(e)):
            die("another rank left; its own line says why")
        if isinstance(e, (ConnectionError, EOFError)) or "DataLoader worker" in str(e) and "Caught" not in str(e):
            die(f"a worker that reads images was killed, for want of memory perhaps (then try fewer --workers): {reason(e)}")
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            die(f"{e.filename}: {e.strerror}")
        raise


def main(argv=None):
    with in_one_line():
        train(parse_args(argv))


if __name__ == "__main__":
    main()
