"""Train CLIP on rewritten captions. The methods differ in the texts of a training step:

    CLIP        --text alt
    LaCLIP      --text alt rewrite_chatgpt rewrite_bard rewrite_coco rewrite_human  2305.20088, 3.2
    LaCLIP-MT   LaCLIP's with --loss multitext                                      a talk on it
    SLIP        --text alt --ssl                                                    2112.12750, 3
    LaSLIP      LaCLIP's with --ssl                                                 2305.20088, 4
    VeCLIP      --text alt=0.5 vecap=0.5                                            2310.07699

    torchrun --nproc_per_node 8 train_clip.py --captions cc3m.rewritten.jsonl --image-root cc3m \\
        --out runs/laclip --text alt rewrite_chatgpt ...                # one machine with GPUs
    python train_clip.py --captions a.jsonl --image-root DIR --text alt --model nano --steps 20 \\
        --tokenizer tokenizer.json --batch-size 64 --out runs/try       # a few seconds on a CPU

OUT gets checkpoint.pt, metrics.jsonl, settings.json and bad_images.jsonl. After a kill the same
command resumes; bad_images.jsonl may repeat a row. Some flags, such as --ssl, use a file in data/.

Read draw_texts, clip_loss, multitext_loss, CLIP and train, in this order: they are both papers. The
rest feeds train (samples, images, rows, tokenizer) and lets it end well (checkpoints, arguments).
"""
import fcntl
import html
import io
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from array import array
from bisect import bisect
from collections import Counter, OrderedDict
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import RandomResizedCrop, v2
from tqdm import tqdm

# === the text of a step: all that distinguishes LaCLIP and VeCLIP from CLIP =======================
def draw_texts(row, fields, rng):
    """LaCLIP's aug_T (eq. 2) and VeCLIP's mix (section 3.4): draw a field by its weight among those
    that the row has, then one of its texts. fields: {name: weight}

    -> a text for each field, the drawn field's index, and whether alt replaced its text. clip_loss
    uses the drawn text, multitext_loss all. A field without a text gets the row's first one. A text
    of one word gives way to alt (LaCLIP's release), even if `fields` lacks alt."""
    lists = [texts_of(row.get(field)) for field in (*fields, "alt")]
    present = np.array([any(texts) for texts in lists[:-1]], float)
    if not present.any():
        raise ValueError(f"no text in {', '.join(fields)}")
    weights = present * list(fields.values())
    weights = weights if weights.any() else present  # weight 0: where the others are missing
    drawn = int(rng.choice(len(fields), p=weights / weights.sum()))
    *texts, alt = one_of_each(lists, drawn, rng.random())
    replaced = [bool(text and alt) and field != "alt" and not SEVERAL_WORDS.search(text)
                for field, text in zip(fields, texts)]
    texts = [alt if one_word else text for one_word, text in zip(replaced, texts)]
    first = next(filter(None, texts))
    return [text or first for text in texts], drawn, replaced[drawn]

# A blank between words, or letters of a language that writes none: Thai, Chinese, Japanese
SEVERAL_WORDS = re.compile(r"\S\s+\S|[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")

def texts_of(value):  # of a field: a text, a list or absent -> its texts; None: a missing one
    entries = value if isinstance(value, list) else [value]
    return [text if isinstance(text, str) and text.strip() else None for text in entries]

def one_of_each(lists, drawn, u):
    """One text of every list, or None. `u` in [0, 1) picks among the drawn list's usable texts.
    Lists of equal length share the index, so that an AltText goes with its own VeCap."""
    index_of = {}  # {length of a list: which of its texts}
    for texts in (lists[drawn], *lists):
        if usable := [i for i, text in enumerate(texts) if text]:
            index_of.setdefault(len(texts), usable[int(u * len(usable))])
    return [texts[index_of[len(texts)]] if len(texts) in index_of else None for texts in lists]

# === losses =======================================================================================
def info_nce(queries, keys, scale):
    """-1/n sum_i log( exp(q_i . k_i / tau) / sum_k exp(q_i . k_k / tau) ): this rank's queries
    [n, d] against the keys of all ranks [N, d]. The mean over ranks, which DDP takes of the
    gradients, is the loss of the global batch."""
    labels = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return F.cross_entropy(scale * queries @ keys.T, labels)

def clip_loss(image_features, text_features, scale):
    """L = (L_I + L_T) / 2. Features [n, d] of unit length -> scalar. L_I is eq. 1 of both papers;
    with the texts that aug_T or mix drew, LaCLIP's eq. 3 and VeCLIP's eq. 2."""
    loss_i = info_nce(image_features, gather(text_features), scale)
    loss_t = info_nce(text_features, gather(image_features), scale)
    return (loss_i + loss_t) / 2

def multitext_loss(image_features, text_features, drawn, scale):
    """LaCLIP-MT: L = (L_I* + L_T) / 2. Features [n, d] and [n, M + 1, d], drawn [n] -> scalar

    L_I* compares an image with all its M + 1 texts, text j against the texts j of the other images.
    L_T uses the drawn text, as LaCLIP does. The talk writes 1/M before a sum of M + 1 terms; this
    is their mean, which is L_I if an image's texts are all the same."""
    losses = [info_nce(image_features, gather(texts), scale) for texts in text_features.unbind(1)]
    drawn_features = text_features[torch.arange(len(drawn), device=drawn.device), drawn]
    loss_t = info_nce(drawn_features, gather(image_features), scale)
    return (torch.stack(losses).mean() + loss_t) / 2

class Gather(torch.autograd.Function):
    """[n, d] of every rank -> [world * n, d], in the ranks' order. In the backward pass a rank
    receives the gradients of all ranks' losses, which a gather without gradient (SLIP's) drops."""
    @staticmethod
    def forward(ctx, x):
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]

def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x

# === model: OpenAI CLIP's, parameter names included ===============================================
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
    # what differs between families; the defaults are open_clip's
    vision_quick_gelu: bool = False  # OpenAI's own weights: True in both towers
    text_quick_gelu: bool = False
    vision_eps: float = 1e-5  # of LayerNorm
    text_eps: float = 1e-5
    pre_norm: bool = True  # a LayerNorm before the image blocks
    patch_bias: bool = False
    conv_stem: bool = False  # three convolutions in place of the patches
    qk_norm: bool = False  # a LayerNorm on the queries and keys of every head in the image tower
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the training images, R, G, B in [0, 1]
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "bicubic"  # see eval_transform
    mend_texts: bool = False  # by ftfy, as OpenAI's, open_clip's and LaCLIP's tokenizers do
    text_model: dict | None = None  # with --text-model: the configuration of that encoder

PRESETS = {  # ViT-S/16 to H/14 as open_clip has them; nano is ours, -laclip the release's
    "nano":     dict(embed_dim=128, image_size=32, patch_size=8, vision_width=128, vision_layers=2,
                     vision_heads=2, text_width=128, text_layers=2, text_heads=2,
                     mean=(1.0, 1.0, 1.0), std=(0.27, 0.27, 0.27)),  # for drawings: white is 0
    "ViT-S/16": dict(embed_dim=384, vision_width=384, vision_heads=6, text_width=384, text_heads=6),
    "ViT-B/32": dict(patch_size=32),
    "ViT-B/16": dict(),
    "ViT-L/14": dict(embed_dim=768, patch_size=14, vision_width=1024, vision_layers=24,
                     vision_heads=16, text_width=768, text_heads=12),
    "ViT-H/14": dict(embed_dim=1024, patch_size=14, vision_width=1280, vision_layers=32,
                     vision_heads=16, text_width=1024, text_layers=24, text_heads=16),
    "ViT-B/16-laclip": dict(qk_norm=True, pre_norm=False, patch_bias=True, vision_eps=1e-6,
                            text_quick_gelu=True, resize="bilinear",
                            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),  # timm's
}
PRESETS["nano-conv"] = {**PRESETS["nano"], "conv_stem": True}  # sees small objects much sooner

class CLIP(nn.Module):
    """Two towers and a temperature (Radford et al. 2021): the model of both papers."""
    def __init__(self, c):
        super().__init__()
        self.config, W = c, c.text_width
        self.visual = VisionTransformer(c)
        self.token_embedding = nn.Embedding(c.vocab_size, W)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(torch.randn(c.context_length, W) * 0.01)
        self.transformer = Transformer(W, c.text_layers, c.text_heads, c.text_quick_gelu,
                                       c.text_eps)
        self.ln_final = nn.LayerNorm(W, c.text_eps)
        self.text_projection = nn.Parameter(torch.randn(W, c.embed_dim) * W ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # ln(1 / tau)
        self.register_buffer("mean", torch.tensor(c.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std).view(3, 1, 1), persistent=False)
        if c.text_model:
            from data.text_model import replace_text_tower
            replace_text_tower(self)

    def encode_image(self, images):  # [B, 3, S, S] of eval_transform -> [B, D], not normalised
        return self.visual(images) @ self.visual.proj

    def encode_text(self, texts):
        """Texts -> [B, embed_dim], not normalised: the feature at the end token. Padding would give
        the same, since attention is causal; so a text costs only its own tokens."""
        x = F.embedding(texts.positions, self.positional_embedding)  # reproducible, unlike indexing
        x = self.transformer(self.token_embedding(texts.ids) + x, texts)  # [T, W]
        return self.ln_final(x[texts.ends]) @ self.text_projection

    def forward(self, images, texts):
        """images [n, V, 3, S, S] in 0..255, Texts with K texts an image -> 1 / tau, image features
        [n, d] and text features [n, K, d] of unit length. With V = 3 (SLIP) also the image tower's
        features of views 1 and 2, [n, 2, W]."""
        n, V = images.shape[:2]
        x = self.visual((images.flatten(0, 1).float() / 255 - self.mean) / self.std)
        x = x.float().view(n, V, -1)
        image_features = F.normalize((x[:, 0] @ self.visual.proj).float(), dim=-1)
        text_features = F.normalize(self.encode_text(texts).float(), dim=-1)
        text_features = text_features.view(n, -1, self.config.embed_dim)  # [n K, d] -> [n, K, d]
        outputs = self.logit_scale.exp(), image_features, text_features
        return (*outputs, x[:, 1:]) if V > 1 else outputs

class VisionTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        W, patches = c.vision_width, (c.image_size // c.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, W, c.patch_size, c.patch_size, bias=c.patch_bias)
        if c.conv_stem:
            from data.stem import conv_stem
            self.conv1 = conv_stem(W, c.patch_size)
        self.class_embedding = nn.Parameter(torch.randn(W) * W ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, W) * W ** -0.5)
        self.ln_pre = nn.LayerNorm(W, c.vision_eps) if c.pre_norm else nn.Identity()
        self.transformer = Transformer(W, c.vision_layers, c.vision_heads, c.vision_quick_gelu,
                                       c.vision_eps, c.qk_norm)
        self.ln_post = nn.LayerNorm(W, c.vision_eps)
        self.proj = nn.Parameter(torch.randn(W, c.embed_dim) * W ** -0.5)

    def forward(self, x):  # [B, 3, S, S] -> [B, W], before the projection
        x = self.conv1(x).flatten(2).transpose(1, 2)  # [B, W, S/p, S/p] -> [B, patches, W]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return self.ln_post(self.transformer(self.ln_pre(x + self.positional_embedding))[:, 0])

class Transformer(nn.Module):
    rerun = False  # --grad-checkpointing: the backward pass computes the blocks again
    def __init__(self, width, layers, heads, quick_gelu, eps, qk_norm=False):
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, quick_gelu, eps, qk_norm) for _ in range(layers))
        for block in self.resblocks:  # OpenAI CLIP's scales for its text tower, here in both
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, x, texts=None):
        for block in self.resblocks:
            x = checkpoint(block, x, texts, use_reentrant=False) if self.rerun else block(x, texts)
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

    def forward(self, x, texts):
        x = x + self.attn(self.ln_1(x), texts)
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

    def forward(self, x, texts=None):
        """An image's tokens [B, L, W] attend to each other; in Texts [T, W] a token attends to
        itself and to those before it in its text."""
        x = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        if texts is None:
            y = self.attend(x)
        elif x.is_cuda and x.dtype != torch.float32:  # one call for all lengths; no q/k norm here
            starts, longest = texts.starts, texts.groups[-1][0]
            y = varlen_attn(*x.unbind(1), starts, starts, longest, longest,
                            window_size=(-1, 0)).flatten(1)  # causal: all before, none after
        else:  # a group is B texts of L tokens
            parts = zip(x.split([L * B for L, B in texts.groups]), texts.groups)
            y = [self.attend(part.unflatten(0, (B, L)), causal=True) for part, (L, B) in parts]
            y = torch.cat([part.flatten(0, 1) for part in y])
        return self.out_proj(y)

    def attend(self, x, causal=False):  # [B, L, 3, heads, W / heads] -> [B, L, W]
        q, k, v = x.permute(2, 0, 3, 1, 4)  # each [B, heads, L, W / heads]
        slow = x.is_cpu and x.dtype == torch.bfloat16 and x.shape[1] < 128  # in the fused kernel
        with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
            y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=causal)
        return y.transpose(1, 2).flatten(2)

class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)

class Texts(NamedTuple):
    """B texts with T tokens in all, from the shortest to the longest, one after another."""
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], a token's place in its text
    ends: torch.Tensor  # [B], in the caller's order: where each text's end token stands
    starts: torch.Tensor  # [B + 1], int32: where each text begins, and T
    groups: list  # [(L, B_L), ...]: B_L texts have L tokens

    def to(self, device):
        return Texts(*(to_device(x, device) for x in self[:4]), self.groups)

def pack(texts):
    """B tensors of ids, each with its end token last -> Texts"""
    lengths, order = torch.tensor([len(ids) for ids in texts]).sort()
    starts, ids = F.pad(lengths.cumsum(0), (1, 0)), torch.cat([texts[i] for i in order.tolist()])
    positions = torch.arange(len(ids)) - starts[:-1].repeat_interleave(lengths)
    ends = (starts[1:] - 1)[order.argsort()]  # in the caller's order again
    return Texts(ids, positions, ends, starts.int(), [*Counter(lengths.tolist()).items()])

def to_device(x, device):  # so that the host does not wait for the copy to a GPU
    return x.pin_memory().to(device, non_blocking=True) if "cuda" in str(device) else x.to(device)

# === a step, and the run ==========================================================================
def learning_rate(step, peak, warmup, steps):
    """Linear from peak / 1000, then a cosine to peak / 100 (LaCLIP: 1e-6, 1e-3, 1e-5)"""
    if step < warmup:
        return peak * (0.001 + 0.999 * step / warmup)
    progress = (step - warmup) / (steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

def train(args):
    device, world = start_ranks(args.device)
    rows, out = Rows(args.captions), partial(os.path.join, args.out)
    state, start, settings, metrics = begin(args, rows, device, world)
    steps, per_epoch = settings["steps"], len(rows) // args.batch_size
    if start == steps:
        return print(f"{args.out} is finished: {steps} steps")
    torch.manual_seed(args.seed)
    model, tokenizer = from_state(state) if state else new_model(args)
    model.to(device)
    Transformer.rerun = args.grad_checkpointing
    if args.freeze_text:
        if not model.config.text_model:
            die("--freeze-text: this model has no --text-model")
        model.text_encoder.requires_grad_(False)
    head = nn.Identity()  # SLIP's, with --ssl; else it has no weights
    if args.ssl:
        from data.slip import projection_head, simclr_loss
        head = projection_head(model.config.vision_width).to(device)
    optimizer = adamw([*model.parameters(), *head.parameters()], args)
    if start:
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
    if args.compile or args.compile is None and "cuda" in device:
        model.visual.compile()  # in place, so that names in the checkpoint stay as they are
    # no device_ids: with them DDP would copy the inputs and wait for the copy
    ddp_model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    batches = load_batches(args, rows, tokenizer, model.config, start, steps, world, device)
    autocast = partial(torch.autocast, device.split(":")[0], torch.bfloat16,
                       enabled=args.precision == "bf16")

    def objective(drawn, scale, image_features, text_features, views=None):
        if args.loss == "multitext":
            loss = multitext_loss(image_features, text_features, drawn, scale)
        else:
            loss = clip_loss(image_features, text_features[:, 0], scale)  # K = 1: the drawn text
        if args.ssl:  # autocast() also wraps a function: the head in bf16, its loss in fp32
            loss = loss + simclr_loss(autocast()(head.forward), gather(views))
        return loss
    progress = tqdm(total=steps, initial=start, unit="step", disable=rank() > 0)
    stopping = []  # by SIGTERM, when the node is taken back: save after this step and leave
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    counts = torch.tensor(state["counts"] if start else [0, 0, 0])  # images, unusable, replaced
    wait, logged_at, logged_step = 0.0, time.time(), start
    for step in range(start, steps):
        asked_at = time.time()
        chunks, drawn, replaced, unusable = next(batches)
        wait += time.time() - asked_at
        # the step: forward, loss, backward, update
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr, settings["warmup"], steps)
        optimizer.zero_grad(set_to_none=True)
        if args.micro_batch and len(chunks) > 1:
            from data import grad_cache
            loss = grad_cache.backward(model, ddp_model, objective, chunks, drawn, autocast)
        else:
            with autocast():
                outputs = ddp_model(*chunks[0])
            loss = objective(drawn, *outputs)  # in fp32: at 1 / tau = 100 bf16 is too coarse
            loss.backward()
        for parameter in head.parameters():  # DDP does not hold the head
            all_reduce(parameter.grad.div_(world))
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # tau >= 0.01 (CLIP; LaCLIP's release)
        # the step is done; what follows counts, logs and saves
        done = step + 1
        progress.update()
        for name, why in unusable:
            with open(out("bad_images.jsonl"), "a") as f:
                f.write(json.dumps({"step": done, "image": name, "reason": why}) + "\n")
        step_counts = all_reduce(torch.tensor([len(drawn), len(unusable), replaced, len(stopping)]))
        counts += step_counts[:3]
        images, bad, one_word = counts.tolist()
        if bad > args.max_bad * max(images + bad, 1000):  # before saving: a restart ends here, too
            progress.close()
            die(f"{bad} of {images + bad} rows are unusable (--max-bad): {out('bad_images.jsonl')}")
        leave = step_counts[3] > 0 or done == steps  # a rank was told to stop
        if done in (1, steps) or done % args.log_every == 0:
            loss = all_reduce(loss.detach() / world).item()
            if not math.isfinite(loss):
                die(f"the loss is {loss} at step {done}; {args.out} keeps the last good checkpoint")
            speed = (done - logged_step) * args.batch_size / (time.time() - logged_at)
            entry = {"step": done, "epoch": round(done / per_epoch, 4), "loss": loss,
                     "lr": optimizer.param_groups[0]["lr"], "samples_per_s": float(f"{speed:.4g}"),
                     "logit_scale": model.logit_scale.exp().item(), "data_wait_s": round(wait, 3),
                     "bad": bad, "replaced": round(one_word / images, 4)}
            wait, logged_at, logged_step = 0.0, time.time(), done
            progress.set_postfix(loss=f"{loss:.3f}", samples_per_s=entry["samples_per_s"])
            if rank() == 0:
                metrics.write(json.dumps(entry) + "\n")
        keep = args.keep_every and done % args.keep_every == 0
        if leave or keep or done % args.save_every == 0:
            if not all(parameter.isfinite().all() for parameter in model.parameters()):
                die(f"a weight is not finite after step {done}; {args.out} keeps the checkpoint")
            if rank() == 0:
                more = dict(step=done, head=head.state_dict(), optimizer=optimizer.state_dict(),
                            counts=counts.tolist(), settings=settings, logged=metrics.tell())
                if keep:
                    save_checkpoint(out(f"checkpoint-{done}.pt"), model, tokenizer, **more)
                save_checkpoint(out("checkpoint.pt"), model, tokenizer, **more)
        if leave:
            break
    progress.close()
    all_reduce(torch.zeros(1))  # wait until rank 0 has saved
    if done < steps and rank() == 0:
        print(f"stopped at step {done} of {steps}: the same command goes on", file=sys.stderr)

def adamw(parameters, args):  # decays what has 2 or more dimensions: kernels, embeddings, too
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.wd},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), eps=args.eps, fused=True)

def begin(args, rows, device, world):
    """-> state: OUT's checkpoint, else --init's, else {}; the step to start from; the settings that
    must stay as they are; metrics.jsonl (rank 0's), cut to that step and locked"""
    path = os.path.join(args.out, "checkpoint.pt")
    resumed = os.path.exists(path)
    source = path if resumed else args.init
    state = read_checkpoint(source) if source else {}
    start, before = (state["step"], state["settings"]) if resumed else (0, {})
    if args.precision == "auto":  # a resumed run keeps its precision
        args.precision = before.get("precision") or resolve_precision("auto", device)
    settings = read_settings(args, rows, world)
    for name in settings:
        if resumed and before.get(name) != settings[name]:
            die(f"{args.out} was begun with {name} = {before.get(name)!r}, not {settings[name]!r}")
    mine = torch.tensor([start, zlib.crc32(json.dumps(settings).encode())])
    if not all_reduce(mine.clone(), dist.ReduceOp.MAX).equal(mine):  # on one rank at least
        die(f"the ranks begin at different steps (this one at {start}) or with different rows")
    os.makedirs(args.out, exist_ok=True)  # on every node, since nodes may not share it
    if rank() > 0:
        return state, start, settings, None
    metrics = open(os.path.join(args.out, "metrics.jsonl"), "a", buffering=1)
    try:
        fcntl.lockf(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except (BlockingIOError, PermissionError):
        die(f"--out {args.out}: another launch is at work in it")
    except OSError as e:  # NFS and Lustre may have no locks
        print(f"--out {args.out}: no lock ({e.strerror}), start no second launch", file=sys.stderr)
    logged = state["logged"] if resumed else 0  # bytes, up to the checkpoint's step
    metrics.seek(metrics.truncate(min(metrics.tell(), logged)))
    with open(os.path.join(args.out, "settings.json"), "w") as f:
        json.dump({**settings, "command": sys.argv, "torch": torch.__version__}, f, indent=1)
    print(f"{len(rows)} rows; {args.precision}; steps {start} to {settings['steps']}; CLIP's "
          f"loss by chance: ln(batch) = {math.log(args.batch_size):.2f}", file=sys.stderr)
    return state, start, settings, metrics

# === samples ======================================================================================
def epoch_order(n, shuffle, seed, epoch, block=1000, window=256):
    """The order of n rows in an epoch. full: shuffle the rows. blocks, if random reads are slow:
    shuffle blocks of 1,000 rows, then the rows within every 256 successive blocks."""
    rng, order = np.random.default_rng([seed, epoch]), np.arange(n, dtype=np.uint32)
    if shuffle == "full":
        rng.shuffle(order)
        return order
    order = np.concatenate([order[at:at + block] for at in rng.permutation(range(0, n, block))])
    for at in range(0, n, window * block):
        rng.shuffle(order[at:at + window * block])
    return order

def pieces(args, n, start, steps, world, size=256):
    """Yield this rank's share of every batch from step `start` on, in lists of at most `size`
    (epoch, place, row), so that the prefetched samples do not grow with the batch."""
    share = args.batch_size // world
    for step in range(start, steps):
        epoch, batch = divmod(step, n // args.batch_size)
        if step == start or batch == 0:
            order = epoch_order(n, args.shuffle, args.seed, epoch)
        first = batch * args.batch_size + rank() * share
        for at in range(first, first + share, size):
            places = range(at, min(at + size, first + share))
            yield [(epoch, place, int(order[place])) for place in places]

class Samples(torch.utils.data.Dataset):
    """Every random draw is a function of (seed, epoch, place), not of ranks, workers, restarts."""
    def __init__(self, args, rows, tokenizer, S):  # S: pixels a side
        self.args, self.rows, self.tokenizer, self.S = args, rows, tokenizer, S
        self.views = [augment_crop]
        if args.augment == "drawing":
            from data.drawing import augment_drawing
            self.views = [augment_drawing]
        if args.ssl:
            from data.slip import augment_slip
            self.views += [partial(augment_slip, crop=augment_crop)] * 2

    def __getitem__(self, sample):
        """-> uint8 [V, 3, S, S]; ids of the drawn text or of all; the drawn one's index; whether
        alt replaced it; [(name, reason)] of the unusable rows that this one replaces"""
        (epoch, place, index), args = sample, self.args
        rng, bad = np.random.default_rng([args.seed, epoch, place]), []
        while len(bad) < 100:
            name = f"row {index + 1}"
            try:
                row = self.rows[index]
                name = str(row.get("image") or name)
                texts, drawn, replaced = draw_texts(row, dict(args.text), rng)
                texts = texts if args.loss == "multitext" else [texts[drawn]]
                ids = [self.tokenizer.encode(text) for text in texts]
                image = open_image(args.image_root, name)
                if self.views != [augment_crop]:  # augment_crop decodes at its own scale
                    image = to_rgb(image)
                torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))  # torchvision's
                views = [v2.functional.pil_to_tensor(view(image, self.S)) for view in self.views]
                return torch.stack(views), ids, drawn, replaced, bad
            except Exception as e:  # Pillow raises nearly everything; no file may end a month's run
                bad.append((name, f"{type(e).__name__}: {re.sub(' <_io.*?>', '', str(e))}"))
                index = int(rng.integers(len(self.rows)))
        raise OSError(f"100 rows in succession are unusable; the last one, {': '.join(bad[-1])}")

def collate(samples):
    views, texts, drawn, replaced, bad = zip(*samples)
    texts = sum(texts, [])
    return (torch.stack(views), torch.cat(texts), [len(ids) for ids in texts],
            torch.tensor(drawn), sum(replaced), sum(bad, []))

def begin_worker(worker):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM signals workers too, but train needs them

def load_batches(args, rows, tokenizer, config, start, steps, world, device, size=256):
    """This rank's share of each step: [(images, Texts), ...], drawn [n], replaced, unusable rows"""
    share, micro = args.batch_size // world, args.micro_batch or args.batch_size
    loader = iter(torch.utils.data.DataLoader(
        Samples(args, rows, tokenizer, config.image_size), num_workers=args.workers,
        batch_sampler=pieces(args, len(rows), start, steps, world, size), collate_fn=collate,
        multiprocessing_context="fork" if args.workers and sys.platform == "linux" else None,
        worker_init_fn=begin_worker, pin_memory="cuda" in device,  # forks share Rows' memory
        prefetch_factor=2 + share // size // args.workers if args.workers else None))
    for _ in range(start, steps):
        parts = [next(loader) for _ in range(0, share, size)]
        images, ids, lengths, drawn, replaced, bad = zip(*parts)
        images = torch.cat([x.to(device, non_blocking=True) for x in images])
        texts = torch.cat(ids).split(sum(lengths, []))
        K = len(texts) // share  # texts an image
        chunks = [(images[at:at + micro], pack(texts[at * K:(at + micro) * K]).to(device))
                  for at in range(0, share, micro)]
        yield chunks, to_device(torch.cat(drawn), device), sum(replaced), sum(bad, [])

# === images and rows ==============================================================================
FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"  # not EPS

def open_image(root, name):
    """A PIL image, not yet decoded, from a file under `root` or from `shard.tar@OFFSET+SIZE`. A row
    cannot name a file outside. Links under `root` are the user's own and are followed."""
    path, offset, size = re.fullmatch(r"(.+?)(?:@(\d+)\+(\d+))?", name, re.DOTALL).groups()
    root = os.path.join(os.path.abspath(root), "")
    path = os.path.join(root, path)
    if not path.startswith(root) or ".." in path.split(os.sep):
        raise ValueError("outside --image-root")
    with open(path, "rb") as f:
        f.seek(int(offset or 0))
        image = Image.open(io.BytesIO(f.read(int(size or -1))), formats=FORMATS)
    if max(image.size) > 100 * min(image.size):  # its shorter side scaled up would fill the memory
        raise ValueError(f"{image.width} x {image.height} pixels are no image")
    return image

def to_rgb(image):
    """Any PIL image -> RGB, upright; transparency becomes white."""
    image.load()  # a broken file fails here; a second load would return part of it
    with suppress(Exception):  # broken metadata is ignored
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel
        raise ValueError(f"grey of mode {image.mode}: expected 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def augment_crop(image, S, least=0.5):
    """LaCLIP's, but bicubic: RandomResizedCrop of a share `least` to 1 of the area, no flip, since
    captions say left and right. -> RGB [S, S]. A JPEG is decoded at a half, a quarter or an eighth
    (DCT scaling) where this leaves the crop S pixels a side or more; pixels change a little."""
    w, h = image.size
    top, left, height, width = RandomResizedCrop.get_params(image, (least, 1), (3 / 4, 4 / 3))
    shrink = max(1, min(width, height) // S)
    image.draft(None, (w // shrink, h // shrink))
    image = to_rgb(image)
    if (image.width > image.height) != (w > h):  # EXIF turned it on its side: turn the box, too
        w, h, left, top, width, height = h, w, top, left, height, width
    x, y = image.width / w, image.height / h
    box = left * x, top * y, (left + width) * x, (top + height) * y
    return image.resize((S, S), Image.BICUBIC, box)

def eval_transform(config):
    """PIL image -> [3, S, S]: shorter side to S, centre crop, normalised. resize: "bicubic" is
    OpenAI's, "bilinear" LaCLIP's, "bilinear-unsmoothed" VeCLIP's: no antialias, and on floats."""
    S, to_floats = config.image_size, [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    if config.resize == "bilinear-unsmoothed":
        from data.unsmoothed import resize_unsmoothed
        steps = [*to_floats, partial(resize_unsmoothed, S=S)]
    else:
        steps = [v2.Resize(S, v2.InterpolationMode(config.resize)), v2.CenterCrop(S), *to_floats]
    return v2.Compose([to_rgb, *steps, v2.Normalize(config.mean, config.std)])

class Rows:  # of JSONL files, as if they were one; it keeps where each row begins: 8 bytes
    def __init__(self, paths):
        self.paths, self.first_rows, self.checksum, begins = paths, [], 0, array("q", [0])
        for path in paths:
            self.first_rows.append(len(begins) - 1)
            with open(path, "rb") as f:
                for line in f:
                    begins.append(begins[-1] + len(line))
                    self.checksum = zlib.crc32(line, self.checksum)
        self.begins = np.frombuffer(begins, np.int64)

    def __len__(self):
        return len(self.begins) - 1

    def __getitem__(self, i):
        begin, end = self.begins[i:i + 2].tolist()
        number = bisect(self.first_rows, i) - 1
        with open(self.paths[number], "rb") as f:
            f.seek(begin - self.begins[self.first_rows[number]])
            return json.loads(f.read(end - begin))

# === tokenizer and checkpoints ====================================================================
class Tokenizer:  # texts -> Texts, by a tokenizers.Tokenizer that adds start and end tokens
    def __init__(self, json_text, context_length=77, mend=False):
        self.json_text, self.context_length, self.mend = json_text, context_length, mend
        self.tokenizer = tokenizers.Tokenizer.from_str(json_text)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(context_length)  # cuts before the end token
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a caption is plain text
        a, dog = self.tokenizer.encode("a").ids, self.tokenizer.encode("dog").ids
        if a[-1] != dog[-1] or dog.count(dog[-1]) > 1:  # features are taken at the end token
            raise OSError("--tokenizer: expected one that adds an end token to every text")

    @classmethod
    def load(cls, name, context_length=77):  # from a tokenizer.json, a folder or a hub name
        if name.endswith(".json"):
            return cls(open(name, encoding="utf-8").read(), context_length)
        from transformers import AutoTokenizer
        return cls(AutoTokenizer.from_pretrained(name).backend_tokenizer.to_str(), context_length)

    def encode(self, text):  # -> its ids, the end token last
        text = text[:20_000].encode(errors="replace").decode()  # without halves of surrogate pairs
        if self.mend:
            import ftfy
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        *ids, end = self.tokenizer.encode(text).ids
        return torch.tensor([i for i in ids if i != end] + [end])  # T5 reads "</s>" in texts, too

    def __call__(self, texts):
        return pack([self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)])

    def __reduce__(self):
        return Tokenizer, (self.json_text, self.context_length, self.mend)

def save_checkpoint(path, model, tokenizer, **more):
    """The file is complete or absent: written under a temporary name, synced, then renamed."""
    with open(path + ".tmp", "wb") as f:
        try:
            torch.save({"model": model.state_dict(), "config": asdict(model.config),
                        "tokenizer": tokenizer.json_text, **more}, f)
        except RuntimeError as e:  # torch hides why the file took no more, as on a full disk
            raise e.__context__ or e
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)

def read_checkpoint(path):
    """The checkpoint's dict, mapped, so that ranks of a node share its pages. It runs no code."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise OSError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state["config"].pop("eot_id", None)  # older ones have it: every text's last id
    except Exception as e:  # torch raises many classes, with pages of advice
        raise OSError(f"{path}: no checkpoint of train_clip.py ({str(e)[:200]}): python -m "
                      "data.convert_checkpoint makes one of released weights") from None
    return state

def from_state(state):  # a checkpoint's dict -> model, tokenizer
    model = CLIP(Config(**state["config"]))
    model.load_state_dict(state["model"])
    length, mend = model.config.context_length, model.config.mend_texts
    return model, Tokenizer(state["tokenizer"], length, mend)

def load_checkpoint(path, device="cpu"):
    """-> (model in eval mode, tokenizer, transform): all that evaluation needs"""
    model, tokenizer = from_state(read_checkpoint(path))
    return model.eval().to(device), tokenizer, eval_transform(model.config)

# === the command, and ranks =======================================================================
DEVICES = [x for x in ("cuda", "mps") if getattr(torch, x).is_available()] + ["cpu"]

def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = die
    add = parser.add_argument_group("data").add_argument
    add("--captions", nargs="+", required=True, help="JSONL files, read as one data set")
    add("--image-root", required=True, help="the folder that image paths in the rows start from")
    add("--text", nargs="+", metavar="FIELD[=WEIGHT]", type=field_and_weight,
        default=[("alt", 1.0)], help="drawn by weight; 0: if others are missing (default: alt)")
    add("--shuffle", choices=["full", "blocks"], default="full", help="blocks: for NFS and Lustre")
    add("--augment", choices=["crop", "drawing"], default="crop", help="drawing: the demo's")
    add("--workers", type=int, default=4, help="processes a rank that read images (default: 4)")
    add("--max-bad", type=float, default=0.01, help="unusable share allowed (default: 0.01)")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=PRESETS, help="default: ViT-B/16")
    add("--init", metavar="PATH", help="begin with a checkpoint's weights, sizes and tokenizer")
    add("--text-model", help="hub name or folder of a transformers encoder, for the text tower")
    add("--freeze-text", action="store_true", help="of the text tower, train the projection only")
    add("--image-size", type=int, help="pixels a side (default: the preset's)")
    add("--context-length", type=int, help="tokens of the longest text (default: 77)")
    add("--tokenizer", help="hub name, folder or tokenizer.json (default: OpenAI CLIP's)")
    add = parser.add_argument_group("training; defaults: LaCLIP on CC3M, assumed").add_argument
    add("--loss", choices=["infonce", "multitext"], default="infonce", help="multitext: LaCLIP-MT")
    add("--ssl", action="store_true", help="add SLIP's loss on two more views of every image")
    add("--batch-size", type=int, default=8192, help="of all ranks together (default: 8192)")
    add("--micro-batch", type=int, help="images that a rank holds at a time (default: its share)")
    add("--epochs", type=float, default=40, help="passes over the rows (default: 40)")
    add("--steps", type=int, help="steps, instead of --epochs")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    add("--wd", type=float, default=0.5, help="weight decay of matrices (default: %(default)s)")
    add("--beta2", type=float, default=0.98, help="of AdamW (default: %(default)s)")
    add("--eps", type=float, default=1e-8, help="of AdamW (default: %(default)s)")
    add("--warmup", type=int, help="steps (default: an epoch, at most a tenth of the run)")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="default: auto")
    add("--grad-checkpointing", action="store_true", help="compute activations inside blocks twice")
    add("--compile", action=BooleanOptionalAction, help="default: the image tower on GPUs")
    add("--seed", type=int, default=0, help="of all random draws (default: 0)")
    add("--out", required=True, help="folder of checkpoint, metrics and settings")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    add("--keep-every", type=int, metavar="N", help="keep the checkpoint of every Nth step")
    add("--log-every", type=int, default=10, help="steps between log rows (default: 10)")
    add("--device", default=DEVICES[0], choices=DEVICES, help="default here: %(default)s")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():  # None and False are no numbers
        may_be_0 = name in ("workers", "max_bad", "wd", "warmup", "seed")
        if type(value) in (int, float) and not (value > 0 or value == 0 and may_be_0):
            least = "0 or more" if may_be_0 else "more than 0"
            die(f"--{name.replace('_', '-')} {value}: expected {least}")
    if len(dict(args.text)) < len(args.text):
        die("--text names a field twice: give it a weight instead, FIELD=WEIGHT")
    beside = args.model, args.text_model, args.tokenizer, args.image_size, args.context_length
    if args.init and any(beside):
        die("--init sets model, tokenizer and sizes: leave their flags out")
    return args

def field_and_weight(text):  # "alt=0.5" -> ("alt", 0.5), "vecap" -> ("vecap", 1.0)
    field, _, weight = text.partition("=")
    if not 0 <= float(weight or 1) < math.inf:
        raise ValueError
    return field, float(weight or 1)

def resolve_precision(name, device):
    """auto: bf16 where the hardware computes in it. A CPU that emulates it is 7 to 20 x slower."""
    kind, able = torch.device(device).type, getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = kind == "cpu" and any(map(able.get, ("avx512_bf16", "amx_bf16", "bf16")))
    if kind == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return name.replace("auto", "bf16" if has_bf16 else "fp32")

MAY_CHANGE = ("captions", "image_root", "workers", "max_bad", "micro_batch", "grad_checkpointing",
              "compile", "out", "save_every", "keep_every", "log_every", "device", "epochs")

def read_settings(args, rows, world):
    """The settings that change results: a run resumes only with these. Ends at mistakes in them."""
    per_epoch, fields = len(rows) // args.batch_size, set()
    if not per_epoch or args.batch_size % world:
        die(f"--batch-size {args.batch_size}: at most {len(rows)} rows, in {world} equal shares")
    steps = args.steps or round(args.epochs * per_epoch)
    warmup = min(per_epoch, steps // 10) if args.warmup is None else args.warmup
    if warmup >= steps:
        die(f"--warmup {warmup} is not less than the {steps} steps of the run (--steps, --epochs)")
    sampled = {i for first in rows.first_rows[:1000] for i in range(len(rows))[first:first + 100]}
    for i in sampled.union(range(0, len(rows), len(rows) // 1000 or 1)):  # and 1,000 in all
        with suppress(ValueError, AttributeError):  # no JSON; no object
            fields |= {field for field, value in rows[i].items() if any(texts_of(value))}
    if missing := dict(args.text).keys() - fields:
        die(f"--text {' '.join(missing)}: in no sampled JSONL row of {' '.join(args.captions)}")
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    return {**settings, "steps": steps, "warmup": warmup, "rows": len(rows),
            "checksum of --captions": rows.checksum}

def new_model(args):  # -> model, tokenizer
    config, weights = Config(**PRESETS[args.model or "ViT-B/16"]), {}
    config.image_size = args.image_size or config.image_size
    config.context_length = args.context_length or config.context_length
    if config.image_size % config.patch_size:
        die(f"--image-size {config.image_size}: expected a multiple of {config.patch_size}")
    name = args.tokenizer or args.text_model or "openai/clip-vit-base-patch32"
    tokenizer = Tokenizer.load(name, config.context_length)
    config.vocab_size = tokenizer.tokenizer.get_vocab_size()
    if args.text_model:
        from data.text_model import load
        weights = load(args.text_model, config)
    model = CLIP(config)
    model.load_state_dict({**model.state_dict(), **weights})
    return model, tokenizer

def start_ranks(device):  # joins torchrun's, if any -> this rank's device, the number of ranks
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            die(f"rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # of the patches' convolution: fp32 is fp32
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new shape; texts have many
    if "RANK" not in os.environ:
        return device, 1
    dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo")  # gloo for CPUs
    return device, dist.get_world_size()

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x

def die(message):  # a user's mistake: one line on stderr and exit status 2
    tqdm.write(f"train_clip.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)

def main(argv=None):
    try:
        train(parse_args(argv))
        if dist.is_initialized():  # else gloo's threads outlive the interpreter, which may abort
            dist.destroy_process_group()
    except (ConnectionError, EOFError) as e:  # the pipe to it broke before torch saw its end
        die(f"a worker was killed: {e!r}")
    except OSError as e:  # a missing file, a full disk; from a worker, behind its traceback
        die(str(e).rpartition("\nOSError: ")[2])
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
        for worker in torch.multiprocessing.active_children():  # they ignore SIGTERM
            worker.kill()

if __name__ == "__main__":
    main()
