"""Train CLIP on rewritten captions. The methods differ in the texts of a training step, and in little else.

    CLIP        --text alt
    LaCLIP      --text alt rewrite_chatgpt rewrite_bard rewrite_coco rewrite_human    arXiv 2305.20088, 3.2
    LaCLIP-MT   LaCLIP's with --loss multitext                                        arXiv 2305.20088, slides
    SLIP        --text alt --ssl                                                      arXiv 2112.12750, 3
    LaSLIP      LaCLIP's with --ssl                                                   arXiv 2305.20088, 4
    VeCLIP      --text alt=0.5 vecap=0.5                                              arXiv 2310.07699, eq. 2

    torchrun --nproc_per_node 8 train_clip.py --captions cc3m.jsonl --image-root cc3m --out runs/laclip \\
        --text alt rewrite_chatgpt ... --batch-size 8192 --epochs 40        # one machine with GPUs
    python train_clip.py --captions a.jsonl --image-root DIR --text alt --model nano --out runs/try \\
        --tokenizer tokenizer.json --batch-size 64 --steps 20               # a few seconds on a CPU

OUT holds checkpoint.pt (the newest), metrics.jsonl, settings.json and bad_images.jsonl.

Read draw_texts, clip_loss, multitext_loss, CLIP and train, in this order: they are both papers. The rest
feeds train (samples, images, rows, tokenizer) and lets it end well (checkpoints, arguments, ranks).
"""
import argparse
import atexit
import errno
import fcntl
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import stat
import struct
import sys
import time
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
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


# === the text of a step: all that distinguishes LaCLIP and VeCLIP from CLIP =================================

def draw_texts(row, fields, rng, alt_choice="random", every=False):
    """LaCLIP's aug_T (eq. 2) and VeCLIP's mix (eq. 2): draw a field by its weight among those that the row
    has, then one of its texts. Lists of one length belong together entry by entry, like alt and the vecap
    made from it.

    fields: {name: weight} -> [text or None of each field] (only the drawn one's unless `every`), the number
    of the drawn field, and whether alt replaced a text of one word. Raises BadRow if the row has no text."""
    values = [row.get(field) for field in fields]
    present = np.array([bool(texts_of(value)) for value in values], float)
    if not present.any():
        raise BadRow(f"no text in {', '.join(fields)}")
    weights = present * list(fields.values())
    weights = weights if weights.any() else present
    drawn = int(rng.choice(len(values), p=weights / weights.sum()))
    place, index_of = rng.random(), {}  # {length of a list: the index that all lists of this length use}

    def pick(value):
        entries = value if isinstance(value, list) else [value]
        n, usable = len(entries), [i for i, text in enumerate(entries) if texts_of(text)]
        if usable and n not in index_of:
            index_of[n] = usable[int(place * len(usable))]  # VeCLIP: a random one beats the best CLIP score
            if alt_choice == "first":
                index_of[n] = usable[0]
            elif alt_choice == "best" and len(usable) > 1:
                index_of[n] = max(usable, key=clip_scores(row, [*fields, "alt"], n).__getitem__)
        return entries[index_of[n]] if usable and texts_of(entries[index_of[n]]) else None

    text, alt = pick(values[drawn]), None
    if len(words_of(text)) < 2 and list(fields)[drawn] != "alt":
        alt = pick(row.get("alt"))  # LaCLIP's release replaces a text of one word by the original
    texts = [pick(value) if every else None for value in values]
    texts[drawn] = alt or text
    return texts, drawn, bool(alt)


# === losses =================================================================================================

SIMILARITIES = 2 ** 25  # entries in a block of the similarity matrix: 128 MiB


def info_nce(queries, keys, scale, itself=0):
    """-1/n sum_i log( exp(q_i . k_i / tau) / sum_k exp(q_i . k_k / tau) ): this rank's queries [n, d] against
    the keys of all ranks [N, d]. The mean over ranks, which DDP takes of the gradients, is the loss of the
    global batch.

    `itself` > 0: exclude the query itself, which sits `itself` columns after its positive. A large similarity
    matrix is computed in blocks of rows, and again in the backward pass: it never exists as a whole."""
    labels = torch.arange(len(queries), device=queries.device) + rank() * len(queries)

    def block_loss(queries, labels):
        logits = scale * queries @ keys.T
        if itself:
            logits = logits.scatter(1, labels[:, None] + itself, -math.inf)
        return F.cross_entropy(logits, labels, reduction="sum")

    rows = max(1, SIMILARITIES // len(keys))
    if rows < len(queries):
        block_loss = partial(checkpoint, block_loss, use_reentrant=False)
    return sum(block_loss(*block) for block in zip(queries.split(rows), labels.split(rows))) / len(queries)


def clip_loss(images, texts, scale):
    """L = (L_I + L_T) / 2 (LaCLIP eq. 1, VeCLIP eq. 1). images, texts [n, d], of unit length -> scalar

    LaCLIP (eq. 3) and VeCLIP (eq. 2) are this loss with the texts that aug_T or mix drew."""
    return (info_nce(images, gather(texts), scale) + info_nce(texts, gather(images), scale)) / 2


def multitext_loss(images, texts, drawn, scale):
    """LaCLIP-MT: L = (L_I* + L_T) / 2. images [n, d], texts [n, M + 1, d], drawn [n] in 0..M -> scalar

    L_I* compares an image with all its M + 1 texts, text j against the texts j of the other images. L_T uses
    the drawn text, as LaCLIP does. The paper writes 1/M before a sum of M + 1 terms (j = 0..M, original
    included). This is the mean, 1/(M + 1): L_I* then weighs as much as L_T, and is L_I if an image's texts
    are all the same."""
    loss_i = torch.stack([info_nce(images, gather(version), scale) for version in texts.unbind(1)]).mean()
    text = texts[torch.arange(len(drawn), device=drawn.device), drawn]
    return (loss_i + info_nce(text, gather(images), scale)) / 2


def simclr_loss(head, views, temperature=0.1):
    """SLIP's self-supervision: NT-Xent, mean over both views. views [n, 2, W] of the image tower -> scalar

    A view must find the other view of its image among both views of all images, itself excluded. BatchNorm
    needs the whole batch, so every rank runs the head on the features of all ranks."""
    n = len(views)
    views = gather(views)  # [N, 2, W]
    z = F.normalize(head(views.flatten(0, 1)).float(), dim=-1).view(len(views), 2, -1)
    own = z[rank() * n:(rank() + 1) * n]
    losses = (info_nce(own[:, a], torch.cat([z[:, 1 - a], z[:, a]]), 1 / temperature, len(z)) for a in (0, 1))
    return sum(losses) / 2


def projection_head(width, hidden=4096, out=256):
    """SLIP's, on the image tower's features: three layers, BatchNorm after the first two (its release)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class Gather(torch.autograd.Function):
    """[n, d] of every rank -> [world * n, d], in the ranks' order. In the backward pass a rank receives the
    gradients of all ranks' losses. A gather without gradient (SLIP's) would drop what a feature contributes
    to the other features' losses."""

    @staticmethod
    def forward(ctx, x):
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x


# === model: OpenAI CLIP's, parameter names included =========================================================

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
    eot_id: int = 49407  # a text's feature is taken there; -1: at the highest id (HF's eos_token_id 2)
    # what differs between families; the defaults are open_clip's
    vision_quick_gelu: bool = False  # OpenAI's own weights: True in both towers
    text_quick_gelu: bool = False
    vision_eps: float = 1e-5  # of LayerNorm
    text_eps: float = 1e-5
    pre_norm: bool = True  # a LayerNorm before the image blocks
    patch_bias: bool = False
    qk_norm: bool = False  # a LayerNorm on the queries and keys of every head in the image tower
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the training images, R, G, B in [0, 1]
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "bicubic"  # see EvalTransform
    mend_texts: bool = False  # see mended; True for OpenAI, open_clip and LaCLIP
    text_model: dict | None = None  # with --text-model: the configuration of that transformers encoder


PRESETS = {  # as open_clip has them; parameters with OpenAI's vocabulary
    # 0.9 M and the vocabulary, for the demo's icons. White is 0, or all icons would look the same at first
    "nano":     dict(embed_dim=128, image_size=32, patch_size=8, vision_width=128, vision_layers=2,
                     vision_heads=2, text_width=128, text_layers=2, text_heads=2, mean=(1.0, 1.0, 1.0),
                     std=(0.27, 0.27, 0.27)),
    "ViT-S/16": dict(embed_dim=384, patch_size=16, vision_width=384, vision_heads=6,
                     text_width=384, text_heads=6),  # 62 M
    "ViT-B/32": dict(patch_size=32),  # 151 M
    "ViT-B/16": dict(patch_size=16),  # 150 M
    "ViT-L/14": dict(embed_dim=768, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16,
                     text_width=768, text_heads=12),  # 428 M
    "ViT-H/14": dict(embed_dim=1024, patch_size=14, vision_width=1280, vision_layers=32, vision_heads=16,
                     text_width=1024, text_layers=24, text_heads=16),  # 986 M
    # LaCLIP's release, whose image tower is timm's; 150 M. Its initial weights are drawn as for the others
    "ViT-B/16-laclip": dict(patch_size=16, qk_norm=True, pre_norm=False, patch_bias=True, vision_eps=1e-6,
                            text_quick_gelu=True, resize="bilinear",
                            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


class CLIP(nn.Module):
    """Two towers and a temperature (Radford et al. 2021): the model of both papers."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.visual = VisionTransformer(c)
        if c.text_model:
            self.text_encoder = build_text_encoder(c.text_model)
        else:
            self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
            self.positional_embedding = nn.Parameter(torch.randn(c.context_length, c.text_width) * 0.01)
            self.transformer = Transformer(c.text_width, c.text_layers, c.text_heads, c.text_quick_gelu,
                                           c.text_eps)
            self.ln_final = nn.LayerNorm(c.text_width, c.text_eps)
        self.text_projection = nn.Parameter(torch.randn(c.text_width, c.embed_dim) * c.text_width ** -0.5)
        if not c.text_model:
            nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # ln(1 / tau)
        self.register_buffer("mean", torch.tensor(c.mean), persistent=False)  # no copy in a step
        self.register_buffer("std", torch.tensor(c.std), persistent=False)

    def encode_image(self, images):
        """[B, 3, S, S], normalised pixels -> [B, embed_dim], not normalised"""
        return self.visual(images) @ self.visual.proj

    def encode_text(self, tokens):
        """[B, L] ids with L <= context_length -> [B, embed_dim], not normalised: the feature at the first end
        token.

        Attention is causal, so the ids after the end token have no effect, and their features are not
        computed: the texts are packed one after another, and each costs its own tokens. Padding to 77 gives
        the same features. An encoder of --text-model attends both ways; its feature is the mean up to the end
        token."""
        return self.encode_packed(pack(tokens.cpu(), self.config.eot_id, self.logit_scale.device))

    def encode_packed(self, texts):
        if self.config.text_model:
            return mean_over_tokens(self.text_encoder, texts) @ self.text_projection
        # not positional_embedding[positions]: on a CPU, threads would sum up its gradient in no fixed order
        x = self.token_embedding(texts.ids) + F.embedding(texts.positions, self.positional_embedding)
        x = self.transformer(x, texts, texts.groups)  # [T, W]
        return self.ln_final(x[texts.ends]) @ self.text_projection

    def forward(self, images, texts):
        """images [n, V, 3, S, S] in 0..255, Texts with K texts an image -> 1 / tau, image features [n, d] and
        text features [n, K, d] of unit length. With V = 3 (SLIP) also the image tower's features of views 1
        and 2, [n, 2, W]."""
        n, V = images.shape[:2]
        x = self.visual(normalise(images.flatten(0, 1), self.mean, self.std)).float().view(n, V, -1)
        image_features = F.normalize((x[:, 0] @ self.visual.proj).float(), dim=-1)
        text_features = F.normalize(self.encode_packed(texts).float(), dim=-1)
        text_features = text_features.view(n, -1, self.config.embed_dim)  # [n K, d] -> [n, K, d]
        return self.logit_scale.exp(), image_features, text_features, *([x[:, 1:]] if V > 1 else [])


class VisionTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        W, patches = c.vision_width, (c.image_size // c.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, W, c.patch_size, c.patch_size, bias=c.patch_bias)
        self.class_embedding = nn.Parameter(torch.randn(W) * W ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, W) * W ** -0.5)
        self.ln_pre = nn.LayerNorm(W, c.vision_eps) if c.pre_norm else nn.Identity()
        self.transformer = Transformer(W, c.vision_layers, c.vision_heads, c.vision_quick_gelu, c.vision_eps,
                                       c.qk_norm)
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
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, quick_gelu, eps, qk_norm)
                                       for _ in range(layers))
        self.grad_checkpointing = False
        for block in self.resblocks:  # OpenAI CLIP's scales
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, x, texts, groups):
        for block in self.resblocks:
            call = partial(checkpoint, block, use_reentrant=False) if self.grad_checkpointing else block
            x = call(x, texts, groups)
        return x


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, quick_gelu, eps, qk_norm):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, eps, qk_norm)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width),
                                             gelu=QuickGELU() if quick_gelu else nn.GELU(),
                                             c_proj=nn.Linear(4 * width, width)))

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
        self.q_norm = nn.LayerNorm(width // heads, eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps) if qk_norm else nn.Identity()

    def forward(self, x, texts, groups):
        """x [T, W]: sequences one after another without padding, B of length L for every (B, L) in `groups`.
        With Texts a token attends to itself and those before it; with None, to its whole sequence."""
        (T, W), outputs = x.shape, []
        x = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(T, 3, self.heads, -1)
        if texts and x.is_cuda and x.dtype != torch.float32 and varlen_attn:  # one call for all lengths
            q, k, v = x.unbind(1)
            lengths = texts.starts, texts.starts, groups[-1][1], groups[-1][1]  # queries', keys'; the longest
            x = varlen_attn(self.q_norm(q), self.k_norm(k), v, *lengths, window_size=(-1, 0))
            return self.out_proj(x.flatten(1))
        for group, (B, L) in zip(x.split([B * L for B, L in groups]), groups):
            q, k, v = group.view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, L, W/heads]
            q, k = self.q_norm(q), self.k_norm(k)
            if q.is_cpu and q.dtype == torch.bfloat16 and L < 128:
                # the formula: for short sequences torch's kernel takes 4 x as long (bench/attention.py)
                scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
                if texts:
                    scores = scores + torch.full((L, L), -torch.inf).triu(1)
                y = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=texts is not None)
            outputs.append(y.transpose(1, 2).reshape(B * L, W))
        return self.out_proj(torch.cat(outputs) if len(outputs) > 1 else outputs[0])


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Texts(NamedTuple):
    """B texts with T tokens in all, one after another without padding, from the shortest to the longest."""
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], a token's place in its text
    ends: torch.Tensor  # [B], where each text's end token stands in ids; in the order in which the texts came
    starts: torch.Tensor  # [B + 1], int32: where each text begins, and T
    groups: list  # [(B_l, l), ...]: B_l texts have length l


def pack(tokens, eot_id, device):
    """[B, L] ids on the CPU -> Texts on the device, without the ids after a text's end token.

    The host works out all that the device needs to know, so that it never waits for the device."""
    end = tokens == (eot_id if eot_id >= 0 else tokens.max(1, keepdim=True).values)
    lengths, order = (end.int().argmax(-1) + 1).sort()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    kept = positions < lengths[:, None]
    starts = F.pad(lengths.cumsum(0), (1, 0))
    groups = list(zip(*(x.tolist() for x in lengths.unique_consecutive(return_counts=True)[::-1])))
    tensors = tokens[order][kept], positions[kept], (starts[1:] - 1)[order.argsort()], starts.int()
    return Texts(*(to_device(tensor, device) for tensor in tensors), groups)


def to_device(x, device):
    return x.pin_memory().to(device, non_blocking=True) if "cuda" in str(device) else x.to(device)


def build_text_encoder(config):
    """A transformers encoder (BERT, RoBERTa, T5, ...) with random weights; `config` is its own, as a dict.

    The encoder stays in eval mode: dropout would differ between a micro-batch's two passes and after a
    restart."""
    from transformers import AutoConfig, AutoModelForTextEncoding
    encoder = AutoModelForTextEncoding.from_config(AutoConfig.for_model(**config), dtype=torch.float32,
                                                   attn_implementation="sdpa", trust_remote_code=False)
    encoder.pooler = None  # unused, and DDP waits for the gradient of every parameter
    return encoder.eval()


def mean_over_tokens(encoder, texts):
    """Texts -> [B, W]: the mean of the encoder's outputs at all tokens of a text, start and end token
    included.

    LaCLIP does not say how it pools (assumed): Sentence-BERT (arXiv 1908.10084) finds the mean at least as
    good as the class token, and T5 has no class token."""
    lengths = texts.starts.diff()  # [B], ascending
    mask = torch.arange(texts.groups[-1][1], device=lengths.device) < lengths[:, None]  # [B, L]
    ids = torch.zeros_like(mask, dtype=torch.long).masked_scatter(mask, texts.ids)
    states = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()  # [B, L, W]
    means = (states * mask[..., None]).sum(1) / lengths[:, None]  # [B, W], shortest text first
    return means[torch.searchsorted(texts.starts[1:], texts.ends.int(), right=True)]


# === a step, and the run ====================================================================================

def backward(model, towers, objective, batch, autocast):
    """Put the gradients of the batch's loss into .grad, return the loss. `towers` is the model or its DDP.

    Several chunks are GradCache (Gao et al. 2021): compute all features without gradients, then the loss of
    the whole batch and its gradients with respect to the features, then each chunk again, to carry these into
    the towers."""
    chunks = batch["chunks"]
    if len(chunks) == 1:
        with autocast():
            outputs = towers(*chunks[0])
        loss = objective(batch["drawn"], *outputs)  # in fp32: at 1 / tau = 100 bf16 is too coarse
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
        with nullcontext() if last or towers is model else towers.no_sync():  # exchange gradients once
            with autocast():
                outputs = towers(*chunk)
            torch.autograd.backward(outputs, [scale.grad / len(chunks), *gradient])
    return loss.detach()


def learning_rate(step, peak, warmup, steps):
    """Linear from peak/1000 over the warm-up steps, then a cosine to peak/100 (LaCLIP: 1e-6, 1e-3, 1e-5)."""
    if step < warmup:
        return peak * (0.001 + 0.999 * step / warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def train(args):
    device = pick_device(args.device)
    index_captions(args.captions)  # before the ranks meet, since it may take longer than --timeout
    _, world = start_ranks(device, args.timeout)
    first_rank, in_out = rank() == 0, partial(os.path.join, args.out)
    rows, config, tokenizer, weights, settings = read_settings(args, world)
    fields, steps, steps_per_epoch = settings["text"], settings["steps"], len(rows) // args.batch_size
    try:
        os.makedirs(args.out, exist_ok=True)  # on every node, since nodes may not share it
        held = lock(in_out("lock"), f"--out {args.out}") if first_rank else None  # noqa: F841  until the end
    except OSError as e:
        die(f"--out {args.out}: {e.strerror}")
    state = resumed_state(args, settings, tokenizer)
    start = state["step"] if state else 0
    begin = torch.tensor([start, zlib.crc32(json.dumps(settings).encode())])
    if not all_reduce(begin.clone(), dist.ReduceOp.MIN).equal(all_reduce(begin.clone(), dist.ReduceOp.MAX)):
        die(f"the ranks begin at different steps (this one at {start}) or with different rows: --out and "
            "--captions must be the same for all")
    if start >= steps:
        return print(f"{args.out} is finished: {start} steps") if first_rank else None

    # model, optimizer, data
    torch.manual_seed(args.seed)
    model = CLIP(config).to(device)
    head = projection_head(config.vision_width).to(device) if args.ssl else nn.Identity()
    if args.freeze_text:
        model.text_encoder.requires_grad_(False)
    parameters = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.wd},
                                   {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0}],
                                  lr=args.lr, betas=(0.9, args.beta2), eps=args.eps, fused=True)
    if state:
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        model.load_state_dict({**model.state_dict(), **weights})
    del state, weights
    for module in model.modules():
        if isinstance(module, Transformer):
            module.grad_checkpointing = args.grad_checkpointing
    if args.compile == "on" or args.compile == "auto" and "cuda" in device:
        model.visual.compile()  # in place, so that names in the checkpoint stay as they are
    towers = model
    if world > 1:  # with device_ids, DDP would copy the inputs and wait for the copy
        towers = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    batches = load_batches(args, rows, fields, tokenizer, config, start, steps, world, device)
    autocast = partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=args.precision == "bf16")

    def objective(drawn, scale, images, texts, views=None):
        loss = multitext_loss(images, texts, drawn, scale) if args.loss == "multitext" else \
            clip_loss(images, texts[:, 0], scale)
        return loss + simclr_loss(autocast()(head.forward), views) if args.ssl else loss  # SLIP: weight 1

    metrics, bad_images = open_run(args, settings, model, start, world)
    progress = tqdm(total=steps, initial=start, unit="step", desc=os.path.basename(args.out),
                    disable=not first_rank)

    # SIGTERM (a node is taken back) or a fault (a full disk): save at the next step boundary and leave
    stopping, faults = [], []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    counts = Counter()  # of this process
    wait, logged_at, logged_step, losses = 0.0, time.time(), start, []
    for step in range(start, steps):
        asked_at = time.time()
        batch = next(batches)
        wait += time.time() - asked_at

        optimizer.zero_grad(set_to_none=True)
        losses.append(backward(model, towers, objective, batch, autocast))
        for parameter in head.parameters():  # DDP does not hold the head
            all_reduce(parameter.grad.div_(world))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr, settings["warmup"], steps)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # tau >= 0.01 (CLIP; LaCLIP's release)

        done = step + 1
        counts.update(batch["counts"])
        for name, why in batch["bad"]:
            write_line(bad_images, {"step": done, "image": name, "reason": why}, faults)
        if counts["bad"] > args.max_bad * max(counts["images"] + counts["bad"], 1000):
            faults.append(f"{counts['bad']} of {counts['images'] + counts['bad']} rows were unusable, more "
                          f"than --max-bad {args.max_bad}: {bad_images.name} names them")
        leave = bool(all_reduce(torch.tensor(len(stopping + faults)), dist.ReduceOp.MAX)) or done == steps
        keep = args.keep_every and done % args.keep_every == 0
        save = leave or keep or done % args.save_every == 0
        log = done in (1, steps) or done % args.log_every == 0
        if save or log:
            losses = all_reduce(torch.stack(losses) / world).tolist()  # of the steps since the last look
            for number, loss in enumerate(losses, done + 1 - len(losses)):
                if not math.isfinite(loss):
                    die(f"the loss is {loss} at step {number}; {args.out} keeps the last good checkpoint")
        if log and first_rank:
            now = time.time()
            speed = (done - logged_step) * args.batch_size / (now - logged_at)
            entry = {"step": done, "epoch": round(done / steps_per_epoch, 4), "loss": losses[-1],
                     "lr": optimizer.param_groups[0]["lr"], "logit_scale": model.logit_scale.exp().item(),
                     "samples_per_s": float(f"{speed:.4g}"), "data_wait_s": round(wait, 3),
                     "replaced": round(counts["replaced"] / counts["images"], 4)}  # share of one-word texts
            if args.loss == "multitext":  # share of missing versions
                entry["filled"] = round(counts["filled"] / (counts["images"] * len(fields)), 4)
            write_line(metrics, entry, faults)
            progress.set_postfix(loss=f"{losses[-1]:.3f}", samples_per_s=entry["samples_per_s"])
            logged_at, logged_step, wait = now, done, 0.0
        losses = [] if save or log else losses
        progress.update()
        if save and not all(parameter.isfinite().all() for parameter in model.parameters()):
            die(f"a weight is not finite after step {done}; {args.out} keeps the last good checkpoint")
        if save and first_rank:
            for name in ["checkpoint.pt", f"checkpoint-{done}.pt"] if keep else ["checkpoint.pt"]:
                save_checkpoint(in_out(name), model, tokenizer, head=head.state_dict(), step=done,
                                optimizer=optimizer.state_dict(),
                                settings={**settings, "captions": args.captions})
        if leave:
            break
    progress.close()
    all_reduce(torch.zeros(1))  # wait until rank 0 has saved
    if faults:
        die(f"{faults[0]}; the state of step {done} is saved")
    if first_rank and done < steps:
        print(f"stopped at step {done} of {steps}: the same command with --resume auto goes on",
              file=sys.stderr)


# === samples ================================================================================================

def clip_scores(row, fields, n):
    """`clip_score` of the first of the fields that is a list of n texts: one number a text"""
    scores = row.get("clip_score")
    for field in fields if isinstance(scores, dict) else ():
        if isinstance(row.get(field), list) and len(row[field]) == len(scores.get(field) or []) == n:
            return [-math.inf if score is None else score for score in scores[field]]
    raise BadRow("several texts, but no clip_score: python -m data.clip_scores writes it")


def texts_of(value):
    """The usable texts of a caption field, whose value is a text, a list of texts and nulls, or absent."""
    entries = value if isinstance(value, list) else [value]
    return [text for text in entries if isinstance(text, str) and text.strip()]


# Han and hiragana; katakana, one word a run; Thai, Lao, Burmese, Khmer: scripts without blanks between words
TWOS = "\u3005-\u3007\u3040-\u309f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
NO_BLANKS = re.compile(f"([{TWOS}]{{1,2}}|[\u30a0-\u30ff\uff66-\uff9f]+"
                       "|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{1,4})")


def words_of(text):
    """The words of a text in any script: what stands between blanks and holds a letter or a digit. Without
    blanks, two characters count as a word, and four in Thai and its like: about right on average."""
    return [word for word in NO_BLANKS.sub(r" \1 ", text).split() if any(map(str.isalnum, word))]


def shuffled(i, n, key):
    """The i-th element of a permutation of range(n) that depends on `key` alone: an epoch's order in O(1)
    memory.

    A Feistel network of four hashed rounds permutes the next power of four; a value outside range(n) goes
    through again until it falls inside (cycle walking; under four times on average). 5 microseconds a
    pass."""
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
    """`shuffled` for storage with slow random reads: a permutation of blocks of consecutive rows, and of the
    rows in a window of such blocks. A random shift keeps the rows that fill no block from being the last in
    every epoch."""
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
    """The run's samples by position. Every random draw is a function of (seed, position), so that ranks,
    workers and restarts do not change what the model sees."""

    def __init__(self, rows, image_root, fields, alt_choice, augment, image_size, tokenizer, seed, per_epoch,
                 multitext, ssl, shuffle=shuffled):
        self.rows, self.image_root, self.fields, self.alt_choice = rows, image_root, fields, alt_choice
        self.augment, self.image_size, self.tokenizer, self.seed = augment, image_size, tokenizer, seed
        self.per_epoch, self.multitext, self.ssl, self.shuffle = per_epoch, multitext, ssl, shuffle

    def __getitem__(self, position):
        """-> dict: images uint8 [1, 3, S, S], with ssl [3, 3, S, S]; ids of the drawn text, with multitext of
        all M + 1; drawn, the drawn one's index; filled, how many were missing; replaced, whether alt replaced
        a text of one word; bad, [(name, reason)] of the unusable rows that this one replaces."""
        epoch, place = divmod(position, self.per_epoch)
        rng = np.random.default_rng([self.seed, epoch, place])
        index, bad = self.shuffle(place, len(self.rows), self.seed << 32 | epoch), []
        while True:
            name = None
            try:
                row = self.rows[index]
                name = row.get("image")
                texts, drawn, replaced = draw_texts(row, self.fields, rng, self.alt_choice, self.multitext)
                filled = texts.count(None) if self.multitext else 0  # by the first text of the row
                first = next(filter(None, texts))
                texts = [text or first for text in texts] if self.multitext else [texts[drawn]]
                image = open_image(self.image_root, name)
                image = to_rgb(image) if self.ssl else image  # decode once for three crops
                views = [self.augment(image, self.image_size, rng)]
                views += [augment_slip(image, self.image_size, rng) for _ in range(2 * self.ssl)]
                return {"images": torch.stack([to_uint8(view) for view in views]),
                        "ids": [self.tokenizer.encode(text) for text in texts],
                        "drawn": drawn if self.multitext else 0, "filled": filled, "replaced": replaced,
                        "bad": bad}
            except Exception as e:  # Pillow's decoders raise nearly everything; no file may end a month's run
                bad.append((name or self.rows.name(index), f"{type(e).__name__}: {e}"))
                index = int(rng.integers(len(self.rows)))
                if len(bad) == 100:
                    last = ": ".join(map(str, bad[-1]))
                    raise BadRow(f"100 rows in succession are unusable; the last one is {last}") from None


def collate(samples):
    """-> images uint8 [n, 1 or 3, 3, S, S], tokens [n, 1 or M + 1, L], drawn [n], bad, counts"""
    tokens = pad([ids for sample in samples for ids in sample["ids"]])
    bad = [name_and_reason for sample in samples for name_and_reason in sample["bad"]]
    return {"images": torch.stack([sample["images"] for sample in samples]),
            "tokens": tokens.view(len(samples), -1, tokens.shape[-1]),
            "drawn": torch.tensor([sample["drawn"] for sample in samples]), "bad": bad,
            # not a Counter, whose numbers torch's pin_memory doubles
            "counts": {"images": len(samples), "bad": len(bad), "filled": sum(s["filled"] for s in samples),
                       "replaced": sum(s["replaced"] for s in samples)}}


class Pieces:
    """A batch sampler: this rank's share of every batch from step `start` on, in ranges of at most `size`
    positions. What workers hold ahead then does not grow with the batch."""

    def __init__(self, start, steps, batch_size, this_rank, world, size=256):
        self.steps, self.batch_size, self.share = range(start, steps), batch_size, batch_size // world
        self.this_rank, self.size, self.per_step = this_rank, size, -(-self.share // size)

    def __iter__(self):
        for step in self.steps:
            begin = step * self.batch_size + self.this_rank * self.share
            end = begin + self.share
            yield from (range(at, min(at + self.size, end)) for at in range(begin, end, self.size))


def load_batches(args, rows, fields, tokenizer, config, start, steps, world, device):
    """Iterate over this rank's share of the batches from step `start` on, as `join` makes them."""
    samples = Samples(rows, args.image_root, fields, args.alt_choice, AUGMENTATIONS[args.augment],
                      config.image_size, tokenizer, args.seed, len(rows) // args.batch_size * args.batch_size,
                      args.loss == "multitext", args.ssl, SHUFFLES[args.shuffle])
    sampler = Pieces(start, steps, args.batch_size, rank(), world)
    loader = iter(torch.utils.data.DataLoader(
        samples, batch_sampler=sampler, num_workers=args.workers, worker_init_fn=begin_worker,
        collate_fn=collate, pin_memory="cuda" in device,
        prefetch_factor=1 + -(-sampler.per_step // args.workers) if args.workers else None))
    for _ in range(start, steps):
        parts = [next(loader) for _ in range(sampler.per_step)]
        yield join(parts, device, args.micro_batch or args.batch_size, config.eot_id)


def join(parts, device, micro_batch, eot_id):
    """What `collate` made of a step's pieces -> its batch, in chunks of `micro_batch` images"""
    length = max(part["tokens"].shape[-1] for part in parts)
    images = torch.cat([part["images"].to(device, non_blocking=True) for part in parts])
    tokens = torch.cat([F.pad(part["tokens"], (0, length - part["tokens"].shape[-1])) for part in parts])
    chunks = [(chunk, pack(ids.flatten(0, 1), eot_id, device))
              for chunk, ids in zip(images.split(micro_batch), tokens.split(micro_batch))]
    return {"chunks": chunks, "drawn": to_device(torch.cat([part["drawn"] for part in parts]), device),
            "counts": sum((Counter(part["counts"]) for part in parts), Counter()),
            "bad": sum((part["bad"] for part in parts), [])}


@atexit.register
def end_workers():
    """End loader workers at exit: multiprocessing would send SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def begin_worker(worker):
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM signals workers too, but train needs their batches
    if multiprocessing.get_start_method() == "fork" and os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)  # the main process died before torch could watch it


# === images =================================================================================================

# of Pillow's; EPS would run Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def open_image(root, name):
    """A PIL image, not yet decoded, from a file under `root` or from `shard.tar@OFFSET+SIZE`. A row cannot
    name what lies outside; a link that lies inside is the user's own, and is followed."""
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
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
            7: "TRANSVERSE", 8: "ROTATE_90"}.get(orientation(image))
    if turn:
        image = image.transpose(Image.Transpose[turn])
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # convert("RGB") would clip these at 255
        bits = max(tags.get(258, (16,)))
        if image.mode == "F" or bits > 16 or tags.get(339, (1,)) != (1,):
            raise ValueError("grey of floats, signed or of more than 16 bits: the file does not say which "
                             "value is white")
        image = image.convert("I").point(lambda value: value * (255 / (2 ** bits - 1)) + 0.5).convert("L")
        image = ImageOps.invert(image) if tags.get(262) == 0 else image  # white is zero
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def check_images(where, n, read):
    """Try at most a thousand of n images, taken evenly. If read(i) opens none of them, end with one line."""
    for i in range(0, n, -(-n // 1000) or 1):
        try:
            return read(i)
        except Exception as e:  # as in Samples
            fault = f"{type(e).__name__}: {e}"
    if n:
        die(f"{where}: none of the images that were tried can be read; the last one: {fault}")


def to_uint8(image):
    """RGB PIL image -> uint8 [3, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalise(images, mean, std):
    """uint8 or float32 [..., 3, H, W] in 0..255 -> float32, zero mean and unit variance a channel"""
    mean, std = (torch.as_tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images.float() / 255 - mean) / std


class EvalTransform:
    """PIL image -> [3, S, S]: shorter side to S, centre crop, normalised.

    resize: "bicubic" is OpenAI CLIP's, "bilinear" LaCLIP's; both smooth what they shrink.
    "bilinear-unsmoothed" is VeCLIP's: no antialias, and floats until the end."""

    def __init__(self, config):
        self.image_size, self.resize = config.image_size, config.resize
        self.mean, self.std = config.mean, config.std

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
    """RandomResizedCrop's box (left, top, right, bottom): a share `scale` of the area, an aspect `ratio`."""
    for _ in range(10):
        area = w * h * rng.uniform(*scale)
        r = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        cw, ch = round(math.sqrt(area * r)), round(math.sqrt(area / r))
        if 0 < cw <= w and 0 < ch <= h:
            left, top = rng.integers(w - cw + 1), rng.integers(h - ch + 1)
            return left, top, left + cw, top + ch
    cw, ch = min(w, round(h * ratio[1])), min(h, round(w / ratio[0]))  # a very long image: its centre
    return (w - cw) // 2, (h - ch) // 2, (w + cw) // 2, (h + ch) // 2


def augment_crop(image, S, rng, scale=(0.5, 1.0)):
    """LaCLIP's: RandomResizedCrop(scale 0.5-1), no flip, since captions say left and right. -> RGB [S, S]

    If the crop needs less than half of a JPEG's pixels a side, the JPEG is decoded at a half, a quarter or an
    eighth of its size (DCT scaling). The box is that of the whole image; pixel values differ a little."""
    on_its_side = orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"
    w, h = image.size[::-1] if on_its_side else image.size
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


# === rows ===================================================================================================

class BadRow(Exception):
    """A row that cannot be trained on, and why. Another row replaces it; bad_images.jsonl names it."""


def parse_row(line):
    """The JSON object of a line; a byte order mark before it is skipped. Raises BadRow."""
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


INDEX_HEADER = 6  # numbers: size, time and change time of the rows' file, how many rows, content's hash, 0


def read_index(path):
    """The number of rows and the content's hash, if PATH.idx is whole and of this file; else None."""
    with suppress(OSError, struct.error), open(path + ".idx", "rb") as f:
        *file, rows, content, _ = struct.unpack("<6Q", f.read(8 * INDEX_HEADER))
        now, size = os.stat(path), os.fstat(f.fileno()).st_size
        if file == [now.st_size, now.st_mtime_ns, now.st_ctime_ns] and size == 8 * (INDEX_HEADER + rows):
            return rows, content


def index_rows(path):
    """Write PATH.idx, once and in one pass: the header, then the byte offset of every row's end, all as
    uint64. (Every write to a file renews its change time, which nobody can set back.)"""
    if read_index(path):
        return
    temporary = f"{path}.idx.{os.uname().nodename}.{os.getpid()}"  # two nodes may share the disk
    try:
        with open_rows(path) as f, open(temporary, "wb") as out:
            now, content, rows, end = os.fstat(f.fileno()), hashlib.sha256(), 0, 0
            out.write(bytes(8 * INDEX_HEADER))
            for line in tqdm(f, desc=f"indexing {path}", unit="row", unit_scale=True, delay=2):
                rows, end = rows + 1, end + len(line)
                out.write(struct.pack("<Q", end))
                content.update(line)
            out.seek(0)
            out.write(struct.pack("<5Q", now.st_size, now.st_mtime_ns, now.st_ctime_ns, rows,
                                  int.from_bytes(content.digest()[:8])))
        os.replace(temporary, path + ".idx")
    except OSError as e:
        with suppress(OSError):
            os.remove(temporary)
        die(f"the rows' offsets cannot be written beside {path}: {e}")


def index_captions(paths):
    """Index the files once on every node, since nodes may not share a disk; the node's other ranks wait."""
    for path in paths:
        if not os.path.isfile(path):
            die(f"--captions {path}: no such file")
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank == 0:
            index_rows(path)
            if not read_index(path):
                die(f"{path} changes while it is read")
        while local_rank and not read_index(path):
            time.sleep(1)


class Rows:
    """The rows of indexed JSONL files as one sequence of dicts. A row costs two preads, and no memory."""

    def __init__(self, paths):
        self.paths, self.files = paths, None
        counts, self.contents = zip(*map(read_index, paths))
        self.ends = list(itertools.accumulate(counts))

    def __len__(self):
        return self.ends[-1]

    def __getstate__(self):  # a worker opens its own files
        return {**self.__dict__, "files": None}

    def place(self, i):
        """Row i -> (number of its file, its number in that file)"""
        number = bisect_right(self.ends, i)
        return number, i - (self.ends[number - 1] if number else 0)

    def name(self, i):
        number, i = self.place(i)
        return f"{self.paths[number]}, line {i + 1}"

    def __getitem__(self, i):
        if self.files is None:
            self.files = [(open(path, "rb"), open(path + ".idx", "rb")) for path in self.paths]
        number, i = self.place(i)
        rows, index = (f.fileno() for f in self.files[number])
        start, end = struct.unpack("<2Q", os.pread(index, 16, 8 * (INDEX_HEADER - 1 + i)))
        return parse_row(os.pread(rows, end - start, start))


# === tokenizer ==============================================================================================

class Tokenizer:
    """texts -> LongTensor [B, L] of ids: start ... end, then zeros. L is the longest text's length, at most
    `context_length`. Holds a tokenizers.Tokenizer whose post-processor adds the start and end tokens."""

    def __init__(self, json_text, context_length=77, mend=False):
        self.json_text, self.context_length, self.mend = json_text, context_length, mend
        if mend:
            mended("")  # ends here if ftfy is missing
        self.tokenizer = tokenizers.Tokenizer.from_str(json_text)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(context_length)  # cuts before the end token
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a caption is plain text
        (*_, self.eot_id), other = (self.tokenizer.encode(text).ids for text in ("a", "dog"))
        if other[-1] != self.eot_id or other.count(self.eot_id) > 1 or \
                self.eot_id not in self.tokenizer.get_added_tokens_decoder():
            raise ValueError("it has no end token: its post-processor must add one after every text")
        self.vocab_size = self.tokenizer.get_vocab_size()

    @classmethod
    def load(cls, name, context_length=77, flag="--tokenizer"):
        """From a tokenizer.json, a folder or a hub name."""
        if os.path.isdir(name) and not {"tokenizer.json", "vocab.json", "vocab.txt"} & set(os.listdir(name)):
            die(f"{flag} {name}: no tokenizer.json in it")  # transformers would make up an empty one
        try:
            if name.endswith(".json"):
                with open(name, encoding="utf-8") as f:
                    return cls(f.read(), context_length)
            from transformers import AutoTokenizer
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            return cls(tokenizer.backend_tokenizer.to_str(), context_length)
        except Exception as e:  # tokenizers raises bare Exception for a file it cannot parse
            die(f"{flag} {name}: {type(e).__name__}: {e}")

    def encode(self, text):
        """Ids of one text. Of a longer text only 20,000 characters are read: 100 kB are no caption."""
        text = text[:20_000].encode("utf-8", "replace").decode()
        *ids, end = self.tokenizer.encode(mended(text) if self.mend else text).ids
        return [i for i in ids if i != end] + [end]  # "</s>" is also a piece of text in T5's vocabulary

    def __call__(self, texts):
        return pad([self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)])

    def __getstate__(self):
        return self.json_text, self.context_length, self.mend

    def __setstate__(self, state):
        self.__init__(*state)


def mended(text):
    """Broken Unicode, curly quotes and HTML entities mended, as OpenAI's, open_clip's and LaCLIP's tokenizers
    do."""
    try:
        import ftfy
    except ImportError:
        die("this checkpoint was trained on texts that ftfy had mended: pip install ftfy")
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def pad(ids):
    """Lists of ids -> LongTensor [B, L], zeros after the shorter ones"""
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for row, text in zip(tokens, ids):
        row[:len(text)] = torch.tensor(text)
    return tokens


# === checkpoints ============================================================================================

def save_checkpoint(path, model, tokenizer, **more):
    """The file is complete or absent: written under a temporary name, synced, then renamed."""
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save({"model": model.state_dict(), "config": asdict(model.config),
                        "tokenizer": tokenizer.json_text, **more}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:  # torch raises either if the disk is full
        with suppress(OSError):
            os.remove(path + ".tmp")
        die(f"{path} could not be written; the checkpoint before it is kept: {e}")


def reason(error):
    """An exception in one short line. torch's have escape codes, and advice to read the file unsafely."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip()
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    if foreign:
        return f"it holds {foreign[1]}, which is neither a tensor nor a plain value"
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def read_checkpoint(path):
    """The checkpoint's dict, on the CPU and mapped, so that ranks of a node share its pages. Only tensors and
    plain values are read."""
    if not os.path.isfile(path):
        die(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                die(f"{path} is damaged: {damaged} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch raises many classes for a file that is not one of its own
        die(f"{path} is not a checkpoint of train_clip.py: {reason(e)}")
    if missing := {"model", "config", "tokenizer"} - set(state if isinstance(state, dict) else ()):
        die(f"{path} is not a checkpoint of train_clip.py: it has no {', '.join(sorted(missing))}")
    return state


def load_checkpoint(path, device="cpu", context_length=None):
    """-> (model in eval mode, tokenizer, transform): all that evaluation needs. Another `context_length` than
    the checkpoint's has its positions from `stretched`."""
    state = read_checkpoint(path)
    try:
        config, weights = Config(**state["config"]), dict(state["model"])
        if context_length:
            config = replace(config, context_length=context_length)
            if not config.text_model:
                weights["positional_embedding"] = stretched(weights["positional_embedding"], context_length)
        model = CLIP(config)
        model.load_state_dict(weights)
        tokenizer = Tokenizer(state["tokenizer"], config.context_length, config.mend_texts)
    except Exception as e:  # tokenizers raises bare Exception, too
        die(f"{path} does not fit its own config: {reason(e)}")
    return model.eval().to(device), tokenizer, EvalTransform(config)


def stretched(positions, length, kept=20):
    """Position embeddings [L, W] -> [length, W]. More positions: keep the first `kept`, which are trained
    best, and interpolate the others (Long-CLIP, arXiv 2403.15378, section 3.1). Fewer: keep the first."""
    if length <= len(positions):
        return positions[:length]
    kept = kept if len(positions) > kept else 0
    rest = F.interpolate(positions[kept:].T[None], length - kept, mode="linear", align_corners=True)[0].T
    return torch.cat([positions[:kept], rest])


def load_text_encoder(name):
    """The encoder with its pre-trained weights, from a folder or the hub. A missing weight is a mistake."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        encoder, report = transformers.AutoModelForTextEncoding.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    except Exception as e:  # transformers raises many classes, too
        die(f"--text-model {name}: expected a transformers text encoder's hub name or folder: {reason(e)}")
    if missing := [key for key in report["missing_keys"] if not key.startswith("pooler.")]:
        die(f"--text-model {name}: its weights lack {missing[0]} and {len(missing) - 1} more")
    encoder.pooler = None  # as in build_text_encoder
    return encoder.eval()


def resumed_state(args, settings, tokenizer):
    """The checkpoint to go on from, or None for a new run. Other settings are a user's mistake."""
    newest = os.path.join(args.out, "checkpoint.pt")
    used = os.path.isdir(args.out) and set(os.listdir(args.out)) - {"lock"}
    folder = os.path.dirname(args.resume or "") or "."
    if used and args.resume != "auto" and not (args.resume and os.path.samefile(folder, args.out)):
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
        die("--resume: the checkpoint was made with another tokenizer")
    return state


# === the command ============================================================================================

def parse_args(argv):
    parser = new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--captions", nargs="+", required=True, metavar="JSONL", help="files that are together one data set")
    add("--image-root", required=True, help="the folder that image paths in the rows start from")
    add("--text", nargs="+", type=field_and_weight, default=[("alt", 1.0)], metavar="FIELD[=WEIGHT]",
        help="fields to draw texts from; weight 0: only where the others are missing (default: alt)")
    add("--alt-choice", choices=["random", "first", "best"], default="random",
        help="which of several AltTexts; best: of the highest clip_score (default: %(default)s)")
    add("--shuffle", choices=SHUFFLES, default="full", help="full: any row at any time, for local disks; "
        "blocks: windows of 256 blocks of 1,000 rows, for NFS, Lustre and object storage (default: full)")
    add("--augment", choices=AUGMENTATIONS, default="crop",
        help="crop: LaCLIP's; drawing: for small sets of drawings (default: crop)")
    add("--workers", type=number(int, 0), default=own_cpus(),
        help="processes a rank that read images; 0: none (default: this rank's CPUs less one, %(default)s)")
    add("--max-bad", type=number(float, 0), default=0.01, metavar="SHARE",
        help="stop if more of the rows are unusable (default: %(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=PRESETS, help="default: ViT-B/16")
    add("--text-model", metavar="NAME", help="hub name or folder of a pre-trained transformers encoder "
        "(BERT, RoBERTa, T5, ...). It and its tokenizer replace the text tower of --model")
    add("--freeze-text", action="store_true", help="train --text-model's projection only, not its encoder")
    add("--init", metavar="PATH", help="begin with this checkpoint's weights, sizes and tokenizer (OpenAI's, "
        "open_clip's: data/convert_checkpoint.py) instead of random weights of --model")
    add("--image-size", type=number(int, 1), help="pixels a side (default: the preset's)")
    add("--context-length", type=number(int, 2), help="tokens of the longest text (default: 77). More than "
        "--init's keeps its first 20 positions and stretches the others (Long-CLIP, arXiv 2403.15378)")
    add("--tokenizer", help="hub name, folder or tokenizer.json (default: that of --init or --text-model, or "
        "openai/clip-vit-base-patch32)")
    add = parser.add_argument_group("training; defaults: LaCLIP's release, the epochs assumed").add_argument
    add("--loss", choices=["infonce", "multitext"], default="infonce", help="multitext: LaCLIP-MT")
    add("--ssl", action="store_true", help="add SLIP's loss on two more views of every image (SLIP, LaSLIP)")
    add("--batch-size", type=number(int, 1), default=8192, help="of all ranks together (default: 8192)")
    add("--micro-batch", type=number(int, 1), metavar="N", help="images that a rank holds at a time; same "
        "loss and gradients, a second forward pass (GradCache; default: its whole share)")
    add("--epochs", type=positive, default=40, help="passes over the rows, whole batches only (default: 40)")
    add("--steps", type=number(int, 1), help="steps, instead of --epochs")
    add("--lr", type=positive, default=1e-3, help="peak learning rate (default: %(default)s)")
    add("--wd", type=number(float, 0), default=0.5, help="weight decay of matrices; 0: none (default: 0.5)")
    add("--beta2", type=number(float, 0, below=1), default=0.98, help="of AdamW (default: %(default)s)")
    add("--eps", type=positive, default=1e-8, help="of AdamW (default: %(default)s)")
    add("--warmup", type=number(int, 0),
        help="steps of linear warm-up (default: one epoch, or a tenth of the run if it is no longer)")
    add("--precision", choices=["fp32", "bf16"], default="bf16",
        help="bf16: autocast; weights and loss stay fp32 (default: bf16)")
    add("--grad-checkpointing", action="store_true",
        help="keep no activations inside blocks, compute them again (not in --text-model)")
    add("--compile", nargs="?", const="on", default="auto", choices=["auto", "on", "off"],
        help="torch.compile the image tower (the text tower's shapes change every step); auto: on a GPU")
    add("--seed", type=number(int, 0, below=2 ** 31), default=0)
    add = parser.add_argument_group("run").add_argument
    add("--out", required=True, help="folder of checkpoint, metrics and settings")
    add("--resume", metavar="auto|PATH", help="auto: go on from OUT's checkpoint, or begin; PATH: from it")
    add("--save-every", type=number(int, 1), default=1000, help="steps between checkpoints (default: 1000)")
    add("--keep-every", type=number(int, 1), metavar="N", help="keep the checkpoint of every Nth step")
    add("--log-every", type=number(int, 1), default=10, help="steps between logged ones (default: 10)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--timeout", type=number(float, -math.inf, above=0, below=1e5), default=10, metavar="MINUTES",
        help="how long ranks wait for one that died (default: %(default)s)")
    return parser.parse_args(argv)


def field_and_weight(text):
    """A type for argparse: "alt=0.5" -> ("alt", 0.5), "vecap" -> ("vecap", 1.0)"""
    field, _, weight = text.partition("=")
    with suppress(ValueError):
        if field and 0 <= float(weight or 1) < math.inf:
            return field, float(weight or 1)
    raise argparse.ArgumentTypeError(f"{text}: expected FIELD or FIELD=WEIGHT with a weight of 0 or more")


def own_cpus():
    """The CPUs of this process, shared among the ranks of its node, less one for the process itself"""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


def read_settings(args, world):
    """Find the user's mistakes before anything is written. -> rows, config, tokenizer, the weights to begin
    with {name: tensor}, and the settings that change the mathematics: a run goes on only with the same."""
    if args.batch_size % world:
        die(f"--batch-size {args.batch_size} does not divide by the number of ranks, {world}")
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    if args.resume not in (None, "auto") and not os.path.isfile(args.resume):
        die(f"--resume {args.resume}: no such checkpoint")
    rows, fields = Rows(args.captions), dict(args.text)
    if not any(fields.values()):
        die("--text: all weights are 0")
    steps_per_epoch = len(rows) // args.batch_size
    if not steps_per_epoch:
        die(f"--batch-size {args.batch_size} is more than the {len(rows)} rows of {' '.join(args.captions)}")

    missing_fields = set(fields)
    for path, start, end in zip(args.captions, [0, *rows.ends], rows.ends):
        usable = set()
        for i in range(start, min(start + 1000, end)):
            with suppress(BadRow):
                usable |= {field for field in fields if texts_of(rows[i].get(field))}
        if not usable:
            die(f"--text {' '.join(fields)}: none of them has a text in the first 1,000 rows of {path}")
        missing_fields -= usable
    if missing_fields:
        die(f"--text {' '.join(sorted(missing_fields))}: no text in the first 1,000 rows of "
            + " ".join(args.captions))
    check_images(f"--image-root {args.image_root}", len(rows),
                 lambda i: open_image(args.image_root, rows[i].get("image")))

    config, tokenizer, weights = read_model(args)
    steps = args.steps or round(args.epochs * steps_per_epoch)
    if not steps:
        die(f"--epochs {args.epochs}: no step, since an epoch has {steps_per_epoch}")
    warmup = steps_per_epoch if args.warmup is None else args.warmup
    if warmup >= steps:
        if args.warmup is not None:
            die(f"--warmup {warmup} is as long as the run of {steps} steps: --lr would never be used")
        warmup = steps // 10
        print(f"note: a warm-up of one epoch would be the whole run of {steps} steps; it is {warmup} "
              "(--warmup)", file=sys.stderr)
    settings = {"rows": len(rows), "contents": list(rows.contents), "text": fields, "steps": steps,
                "warmup": warmup, "model": args.init or args.model or "ViT-B/16",
                "image_size": config.image_size, "context_length": config.context_length}
    settings |= {name: getattr(args, name) for name in (
        "text_model", "freeze_text", "loss", "ssl", "alt_choice", "augment", "shuffle", "batch_size", "lr",
        "wd", "beta2", "eps", "precision", "seed")}
    return rows, config, tokenizer, weights, settings


def read_model(args):
    """-> config, tokenizer, and the weights to begin with: {name: tensor} of --init or --text-model"""
    if args.init and (args.model or args.tokenizer or args.text_model):
        die("--init brings its own sizes and tokenizer: no --model, --text-model or --tokenizer beside it")
    if args.text_model and args.tokenizer:
        die("--text-model brings its own tokenizer: no --tokenizer beside it")
    if args.init:
        model, tokenizer, _ = load_checkpoint(args.init, context_length=args.context_length)
        config, weights, encoder = model.config, model.state_dict(), getattr(model, "text_encoder", None)
        if args.image_size not in (None, config.image_size):
            die(f"--image-size {args.image_size}: the checkpoint of --init has {config.image_size}")
    else:
        config, weights, encoder = Config(**PRESETS[args.model or "ViT-B/16"]), {}, None
        config.image_size = args.image_size or config.image_size
        config.context_length = args.context_length or config.context_length
        name, flag = (args.text_model, "--text-model") if args.text_model else (args.tokenizer, "--tokenizer")
        tokenizer = Tokenizer.load(name or "openai/clip-vit-base-patch32", config.context_length, flag)
        config.vocab_size, config.eot_id = tokenizer.vocab_size, tokenizer.eot_id
        if args.text_model:
            encoder = load_text_encoder(args.text_model)
            config.text_model, config.text_width = encoder.config.to_dict(), encoder.config.hidden_size
            weights = {f"text_encoder.{name}": value for name, value in encoder.state_dict().items()}
    if config.image_size % config.patch_size:
        die(f"--image-size {config.image_size}: expected a multiple of the patch size, {config.patch_size}")
    if args.freeze_text and not encoder:
        die("--freeze-text: expected --text-model, or an --init that was trained with it")
    if encoder:
        try:
            with torch.no_grad():
                encoder(input_ids=torch.full((1, config.context_length), config.vocab_size - 1))
        except (IndexError, RuntimeError) as e:
            die(f"--context-length {config.context_length}: the text encoder takes no text of so many tokens "
                f"with ids up to {config.vocab_size - 1}: {reason(e)}")
    return config, tokenizer, weights


def new_parser(description):
    """argparse's, with mistakes in one line; a terminal that is not UTF-8 gets escapes."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    sys.stdout.reconfigure(errors="backslashreplace")
    return parser


def number(kind, low, below=math.inf, above=-math.inf):
    """A type for argparse: low <= x < below, and x > above"""
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
    """End now, not after hours, if `path` cannot be written or is one of the files that are read."""
    if not os.path.isdir(os.path.dirname(path) or "."):
        die(f"{path}: no such folder")
    written = path if os.path.exists(path) else os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.access(written, os.W_OK):
        die(f"{path}: expected a file that can be written")
    for other in inputs:
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            die(f"{path} is read: expected another file to write to")


# === ranks, logs, and what ends a run =======================================================================

def pick_device(name):
    """auto: this rank's GPU, or Apple's, or the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        die(f"--device {name}: torch finds none here")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        die(f"rank {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}")
    return f"cuda:{local_rank}" if name == "cuda" else name


def start_ranks(device, minutes=30):
    """Join torchrun's process group, if torchrun started this process. -> (rank, number of ranks)

    minutes: how long a rank waits for another one."""
    if "cuda" in device:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # of the patches' convolution: fp32 is fp32
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new shape, and texts have many
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            die("several SLURM tasks without RANK would all do the same: start torchrun in one task a node")
        return 0, 1
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        die(f"RANK is set, {' and '.join(missing)} not: torchrun sets them all")
    backend = "cpu:gloo,cuda:nccl" if "cuda" in device else "gloo"  # gloo carries what CPUs tell each other
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    return dist.get_rank(), dist.get_world_size()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def open_run(args, settings, model, start, world):
    """Write settings.json, cut the logs back to step `start`. -> metrics.jsonl (rank 0) and
    bad_images.jsonl"""
    path, metrics = partial(os.path.join, args.out), None
    if rank() == 0:
        with open(path("settings.json"), "w") as f:
            about = {"command": sys.argv, "torch": torch.__version__, "ranks": world}
            json.dump({**settings, **about}, f, indent=1)
        steps, epochs = settings["steps"], settings["steps"] / (settings["rows"] // args.batch_size)
        print(f"{settings['model']}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
              f"{settings['rows']} rows; {steps} steps of {args.batch_size}, {epochs:.1f} epochs; chance: "
              f"ln(batch) = {math.log(args.batch_size):.2f}", file=sys.stderr)
        metrics = open_log(path("metrics.jsonl"), start)
        open_log(path("bad_images.jsonl"), start).close()
    all_reduce(torch.zeros(1))  # wait: a rank appends to bad_images.jsonl only after it is cut back
    return metrics, open(path("bad_images.jsonl"), "ab", buffering=0)


def open_log(path, step):
    """A JSONL file to append to, cut back to its whole lines up to `step`."""
    def is_kept(line):
        written = re.fullmatch(rb'\{"step": (\d+),.*\}\n', line)
        return written and int(written[1]) <= step

    with open(path, "a+b") as f:
        f.seek(0)
        f.truncate(sum(map(len, itertools.takewhile(is_kept, f))))
    return open(path, "ab", buffering=0)  # a write a line, since all ranks append to the same file


def write_line(f, entry, faults):
    """Append one line of JSON. A disk's refusal goes to `faults`: the run saves its state and leaves."""
    try:
        line = json.dumps(entry).encode() + b"\n"
        if f.write(line) < len(line):
            raise OSError(0, "no space left")
    except OSError as e:
        faults.append(f"{f.name}: {e.strerror}")


def lock(path, what):
    """Keep other launches out until this process ends. The kernel, or a network disk's server, holds the lock
    for the process and releases it however the process ends; that the file exists means nothing."""
    f = open(path, "a")
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        die(f"{what}: another launch is at work in it")
    except OSError as e:
        print(f"{what}: no lock ({e.strerror}): make sure that no other launch writes there", file=sys.stderr)
    return f


def die(message):
    """A user's mistake: one line on stderr and exit status 2."""
    line = f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}"
    tqdm.write(line, file=sys.stderr)  # above a progress bar
    raise SystemExit(2)


@contextmanager
def in_one_line():
    """What no other place reports: unusable rows, a full GPU or disk, lost ranks and workers."""
    try:
        yield
        if dist.is_initialized():  # else gloo's threads outlive the interpreter, and now and then it aborts
            dist.destroy_process_group()
    except BadRow as e:
        die(str(e).strip().split("\n")[-1])
    except torch.OutOfMemoryError as e:
        die("the GPU's memory is full: --micro-batch or --grad-checkpointing help in training, --batch-size "
            f"in evaluation: {reason(e)}")
    except (RuntimeError, OSError, EOFError) as e:
        if dist.is_initialized() and (isinstance(e, dist.DistError) or "gloo" in str(e)):
            die("another rank left; its own line says why")
        lost = isinstance(e, (ConnectionError, EOFError))
        if lost or "DataLoader worker" in str(e) and "Caught" not in str(e):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for the next one, too
            die("a worker that reads images was killed, perhaps because memory was full (then try fewer "
                f"--workers): {reason(e)}")
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            die(f"{e.filename}: {e.strerror}")
        raise


def main(argv=None):
    with in_one_line():
        train(parse_args(argv))


if __name__ == "__main__":
    main()
