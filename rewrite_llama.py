"""Rewrite captions with LLaMA by in-context learning: LaCLIP's text augmentation (arXiv 2305.20088, section 3.1).

Every caption gets one rewrite a source. A source (chatgpt, bard, coco, human) is a set of input => output pairs. The
prompt is a task line, three pairs drawn from the set, and the caption; the language model completes the line.

    python rewrite_llama.py --input cc3m.jsonl --output cc3m.rewritten.jsonl --model huggyllama/llama-7b
    torchrun --nproc_per_node 8 rewrite_llama.py ...the same arguments...    # the ranks share the work
    python rewrite_llama.py --input a.jsonl --output b.jsonl --model FOLDER --limit 20    # a first look, on a CPU too
    python rewrite_llama.py ...the same arguments... --server http://node1:8000 http://node2:8000    # vLLM generates

Row in:  {"image": "photos/1.jpg", "alt": "red bike"}
Row out: the same and "rewrite_chatgpt": "...", ...; null where no usable answer came, with the reason in "error".
The same command resumes after any interruption. Without --server, its output is then identical byte for byte.

Read draw_prompt, rewrite, Completer.complete and sample, in this order, then main. What follows main is the same in all
three captioning scripts: rows, resuming, servers.
"""
import argparse
import contextlib
import copy
import hashlib
import http.client
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

SOURCES = ["chatgpt", "bard", "coco", "human"]  # M = 4 rewrites a caption (paper, section 3.1)
TASK = "Rewrite each image caption in other words, keeping its meaning."  # ours; the release's: "write image captions differently,"
GROUP = 512  # texts that share their three pairs; ours (the release draws pairs for every text)
MAX_INPUT_TOKENS = 256  # a longer text is not a caption: its rewrite is null; our choice
PAIRS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prompts", "meta_pairs.jsonl")


# --- the prompt -------------------------------------------------------------------------------------------------------

def clean(text, markers=None):
    """The text as one line that cannot break the prompt."""
    return one_line(text.replace("=>", " "), markers)


def load_pairs(path, sources):
    """{source: [example, ...]}. An example is a pair, or a list of texts of one image, of which two are drawn."""
    examples = {source: [] for source in sources}
    try:
        with open(path, encoding="utf-8-sig") as f:
            for entry in map(json.loads, f):
                if entry["source"] in examples:
                    example = entry.get("captions") or (entry["input"], entry["output"])
                    if len(example) < 2 or not all(isinstance(text, str) and text.split() for text in example):
                        raise ValueError(f"no two texts in {entry}")
                    examples[entry["source"]].append(example)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        die(f"--pairs {path}: {e!r}; expected lines of source, input, output (or captions)")
    return examples


def draw_prompt(examples, shots, rng, markers):
    """The prompt up to the caption: the task and `shots` pairs (paper, section 3.1). -> (str, the pairs)"""
    pairs = []
    for i in rng.choice(len(examples), shots, replace=False):
        example = examples[i]
        if isinstance(example, list):  # MSCOCO: two captions of one image, in random order
            example = [example[j] for j in rng.choice(len(example), 2, replace=False)]
        pairs.append((clean(example[0], markers), clean(example[1], markers)))
    return TASK + "\n\n" + "".join(f"{a} => {b}\n" for a, b in pairs), pairs


def reject(answer, ended, pairs):
    """Why an answer is unusable, or None. Ours, not the paper's: the release keeps every answer."""
    words = answer.lower().split()
    if not words:
        return "empty"
    if not ended:
        return "no end of line within --max-new-tokens"
    if "=>" in answer or any(answer in pair for pair in pairs):
        return "copies the prompt"
    triples = Counter(zip(words, words[1:], words[2:]))
    if triples and max(triples.values()) > 1:
        return "repeats itself"
    return None


def rewrite(complete, prompt, pairs, texts, seeds, notes):
    """Rewrites of cleaned texts, each drawn again once if it is unusable. -> [(rewrite or None, reason or None)]

    complete(prompt, texts, seeds) -> [(answer, whether its line ended, None or why it cannot be asked)]"""
    results = [(None, "empty input")] * len(texts)
    todo = [i for i, text in enumerate(texts) if text]
    for attempt in range(2):
        if not todo:
            break
        answers = complete(prompt, [texts[i] for i in todo], [[*seeds[i], attempt] for i in todo])
        for i, (answer, ended, fault) in zip(todo, answers):
            answer = one_line(answer.split("\n")[0]).rstrip("\ufffd ")
            reason = fault or reject(answer, ended, pairs)
            results[i] = (None if reason else answer, reason)
        todo = [i for i, (_, _, fault) in zip(todo, answers) if results[i][1] and not fault]
        notes.update(["drawn again"] * len(todo) * (attempt == 0))
    return results


# --- generation -------------------------------------------------------------------------------------------------------

def sample(logits, uniform, temperature, top_p, k=256):
    """Nucleus sampling of one token a row: logits [B, V], uniform [B] in [0, 1) -> ids [B].

    A row's own random number is looked up in the cumulative distribution of its nucleus, so its draw does not depend on
    the other rows of the batch. Temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits.float() / temperature).softmax(-1).topk(min(k, logits.shape[-1]))  # descending
    wide = p.sum(-1) < top_p  # the k likeliest tokens do not hold the nucleus: these rows again, with more
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the smallest set of tokens that reaches top_p
    cdf = p.cumsum(-1)
    pick = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    ids = ids.gather(1, pick)[:, 0]
    if k < logits.shape[-1] and wide.any():
        ids[wide] = sample(logits[wide], uniform[wide], temperature, top_p, 8 * k)
    return ids


class Completer:
    """Completes many lines behind one prompt.

    The keys and values of the prompt are computed once and read once a step for all rows, instead of being copied to each:
    at 64 rows and a prompt of 100 tokens that copy, not the matrix products, is what a step would cost. A row leaves the
    batch at its line's end. test_stages.py compares it with `generate`, one row at a time."""

    def __init__(self, model, tokenizer, args):
        from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
        from transformers.cache_utils import DynamicLayer
        from transformers.masking_utils import eager_mask

        self.model, self.tokenizer, self.args, self.prefix = model, tokenizer, args, None
        self.new_cache = partial(DynamicCache, config=model.config.get_text_config())
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
        pieces = tokenizer.batch_decode([[i] for i in range(model.get_input_embeddings().num_embeddings)])
        self.stops = torch.tensor(["\n" in piece for piece in pieces], device=model.device)  # [V]: tokens that end a line
        self.ends = end_tokens(model, tokenizer)
        self.stops[self.ends] = True
        if not all(isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") for layer in self.new_cache().layers):
            die(f"--model {args.model}: some layers have no attention, which is not supported here; use --server")
        AttentionInterface.register("shared_prefix", self.attend)
        AttentionMaskInterface.register("shared_prefix", eager_mask)
        if not self.try_sharing():
            print("this model's attention cannot share the prompt among rows: each gets a copy, which is slower", file=sys.stderr)

    def attend(self, module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs):
        """Attention over the prompt, which all rows share, and a row's own tokens, as transformers calls it.

        query [B, H, T, D], key and value [B, G, S, D] of the row itself (G = H heads or fewer, grouped), mask [B, 1, T, S].
        The prompt's keys and values are [1, G, P, D]. One softmax goes over P + S."""
        if softcap is not None or s_aux is not None:
            raise ValueError("softcap or attention sinks")  # for try_sharing
        B, H, T, D = query.shape
        G, P = key.shape[1], 0
        q = query.reshape(B, G, H // G * T, D)
        scores = (q @ key.transpose(2, 3)).view(B, H, T, -1) * scaling + attention_mask
        if self.prefix is not None:
            prefix = self.prefix.layers[module.layer_idx]
            P = prefix.keys.shape[2]
            rows = q.transpose(0, 1).reshape(1, G, -1, D)  # all rows' queries as one matrix a group
            shared = (rows @ prefix.keys.transpose(2, 3)).view(G, B, H // G, T, P).transpose(0, 1).reshape(B, H, T, P)
            scores = torch.cat([shared * scaling, scores], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)  # [B, H, T, P + S]
        out = (weights[..., P:].reshape(B, G, H // G * T, -1) @ value).view(B, H, T, D)
        if P:
            rows = weights[..., :P].reshape(B, G, -1, P).transpose(0, 1).reshape(1, G, -1, P)
            out = out + (rows @ prefix.values).view(G, B, H // G, T, D).transpose(0, 1).reshape(B, H, T, D)
        return out.transpose(1, 2), None  # [B, T, H, D]

    def forward(self, ids, mask, position, cache):
        """Logits [B, V] of the token after ids [B, T]. The cache takes their keys and values."""
        length = cache.get_seq_length()
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1,
                            **{self.cache_name: cache}).logits[:, -1]
        if cache.get_seq_length() != length + ids.shape[1]:  # forward swallows an argument that it does not know
            die(f"--model {self.args.model}: this version of transformers does not fill {self.cache_name}")
        return logits

    @torch.inference_mode()
    def set_prefix(self, ids):
        """Compute the keys and values of ids [1, P]; what is completed afterwards continues them."""
        self.prefix, cache = None, self.new_cache()
        self.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1], device=ids.device)[None], cache)
        self.prefix = cache

    @torch.inference_mode()
    def try_sharing(self):
        """Whether attention over shared and own tokens gives what the model's own attention gives, tried on twelve tokens.
        A sliding window cannot be shared, nor can attention with a softcap or sinks."""
        ids = torch.arange(12, device=self.model.device)[None] + 5
        own, position = ids[:, 8:], torch.arange(8, 12, device=ids.device)[None]
        before = self.model.config._attn_implementation
        expected = self.forward(ids, torch.ones_like(ids), torch.arange(12, device=ids.device)[None], cache := self.new_cache())
        try:
            self.model.set_attn_implementation("shared_prefix")
            self.set_prefix(ids[:, :8])
            logits = self.forward(own, torch.ones_like(own), position, self.new_cache())
            self.shares = not any(cache.is_sliding) and bool((logits - expected).norm() < 0.25 * expected.norm())  # bf16: 0.1
        except (RuntimeError, ValueError, TypeError, AttributeError):
            self.shares = False
        if not self.shares:
            self.model.set_attn_implementation(before)
        return self.shares

    def complete(self, prompt, texts, seeds):
        """-> for each text (answer, whether its line ended, None), or ("", False, why it cannot be asked)"""
        self.set_prefix(torch.tensor([self.tokenizer(prompt).input_ids], device=self.model.device))
        encode = partial(self.tokenizer, add_special_tokens=False)
        newline = len(encode("\n").input_ids)  # the text follows one; without it LLaMA's tokenizer adds a blank
        ids = [encode(f"\n{text} =>").input_ids[newline:] for text in texts]
        uniform = [np.random.default_rng(seed).random(self.args.max_new_tokens, "f4") for seed in seeds]
        results = [("", False, "input too long")] * len(texts)
        order = sorted((i for i in range(len(texts)) if len(ids[i]) <= MAX_INPUT_TOKENS), key=lambda i: len(ids[i]))
        for _, same in itertools.groupby(order, lambda i: self.shares or len(ids[i])):  # without sharing, only texts of one length: a window would count the padding
            for batch in batched(list(same), self.args.batch_size):
                new = self.decode([ids[i] for i in batch], torch.tensor(np.stack([uniform[i] for i in batch])))
                answers = [until_end(tokens, self.ends) for tokens in new]
                for i, tokens, answer in zip(batch, new, self.tokenizer.batch_decode(answers, skip_special_tokens=True)):
                    results[i] = answer, self.stops[tokens[-1]].item(), None
        return results

    @torch.inference_mode()
    def decode(self, texts, uniform):
        """Continue B texts' ids with uniform [B, max_new_tokens] until their lines end. -> B lists of new ids"""
        T, P, device = max(map(len, texts)), self.prefix.get_seq_length(), self.model.device
        ids = torch.tensor([[0] * (T - len(text)) + text for text in texts], device=device)  # [B, T], padded on the left
        mask = torch.tensor([[0] * (T - len(text)) + [1] * len(text) for text in texts], device=device)
        position, cache = P + (mask.cumsum(-1) - 1).clamp(min=0), self.new_cache()  # as if there were no padding
        if not self.shares:
            cache = copy.deepcopy(self.prefix)
            cache.batch_repeat_interleave(len(texts))
            mask = torch.cat([mask.new_ones(len(texts), P), mask], 1)
        alive, uniform, new = torch.arange(len(texts), device=device), uniform.to(device), [[] for _ in texts]
        for step in range(self.args.max_new_tokens):
            logits = self.forward(ids, mask, position, cache)
            ids = torch.cat([sample(part, u, self.args.temperature, self.args.top_p) for part, u in
                             zip(logits.split(32), uniform[alive, step].split(32))])  # in parts that fit a CPU's cache
            for b, token in zip(alive.tolist(), ids.tolist()):
                new[b].append(token)
            keep = (~self.stops[ids]).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) < len(alive):
                alive, ids, mask, position = alive[keep], ids[keep], mask[keep], position[keep]
                cache.batch_select_indices(keep)
            ids, position = ids[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return new


def complete_by_server(server, args, prompt, texts, seeds):
    """Completer.complete, by a server."""
    def ask(text, seed):
        if len(text.encode()) > 4 * MAX_INPUT_TOKENS:  # its tokenizer is not here; a token has about four bytes
            return "", False, "input too long"
        text, ended, fault = server.ask(prompt=f"{prompt}{text} =>", temperature=args.temperature, top_p=args.top_p,
                                        seed=zlib.crc32(repr(seed).encode()) >> 1, stop=["\n"])
        return text, ended or "\n" in text, fault
    return server.map(lambda pair: ask(*pair), zip(texts, seeds))


# --- the stage --------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = stage_parser(__doc__, model="huggyllama/llama-7b", batch_size=64, max_new_tokens=77)  # 77: release
    parser.add_argument("--field", default="alt", help="the field to rewrite, a text or a list of them (default: %(default)s)")
    parser.add_argument("--sources", nargs="+", default=SOURCES, help="sets of pairs; each makes rewrite_SOURCE")
    parser.add_argument("--pairs", default=PAIRS, help="JSONL of the sources' pairs (default: data/prompts/meta_pairs.jsonl)")
    parser.add_argument("--shots", type=number(int, 0), default=3, help="pairs in the prompt (default: %(default)s, paper)")
    parser.add_argument("--temperature", type=number(float, 0), default=0.9, help="0 is greedy (default: %(default)s, release)")
    parser.add_argument("--top-p", type=number(float, 0), default=0.95, help="nucleus, 1 is off (default: %(default)s, release)")
    args = parser.parse_args(argv)
    if not 0 < args.top_p <= 1:
        die(f"--top-p {args.top_p}: expected more than 0 and at most 1")
    args.sources = list(dict.fromkeys(args.sources))
    examples = load_pairs(args.pairs, args.sources)
    for source, found in examples.items():
        if len(found) < args.shots:
            die(f"--pairs {args.pairs} has {len(found)} examples of source {source!r}, --shots needs {args.shots}")

    device = pick_device(args)
    settings = {name: getattr(args, name) for name in ("field", "sources", "shots", "temperature", "top_p")}
    settings["pairs_sha256"] = hashlib.sha256(json.dumps([TASK, GROUP, examples]).encode()).hexdigest()
    units = Units(args, settings, reads=[args.field], makes=[f"rewrite_{source}" for source in args.sources])
    if units.finished():
        return print(f"{args.output} is finished")

    if args.server:
        markers = special_markers(None)
        trial = draw_prompt(examples[args.sources[0]], args.shots, np.random.default_rng(0), markers)[0] + "a photo of a dog =>"
        server = Server(args, units, "/v1/completions", prompt=trial, temperature=args.temperature, top_p=args.top_p, seed=0, stop=["\n"])
        complete = partial(complete_by_server, server, args)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer = load(AutoTokenizer, args.model)
        model = load(AutoModelForCausalLM, args.model, dtype=DTYPES[args.dtype], device_map=device).eval()
        markers, complete = special_markers(tokenizer), Completer(model, tokenizer, args).complete

    for unit in units:
        texts = [((offset, i), clean(text, markers) if isinstance(text, str) else "")
                 for offset, row in unit.todo for i, text in enumerate(as_list(row.get(args.field)))]
        for source in args.sources:
            key, results = [args.seed, zlib.crc32(source.encode())], []
            for group in batched(texts, GROUP):
                prompt, pairs = draw_prompt(examples[source], args.shots, np.random.default_rng([*key, *group[0][0]]), markers)
                results += rewrite(complete, prompt, pairs, [text for _, text in group], [[*key, *place] for place, _ in group], units.notes)
            units.outcomes.update(reason or "rewritten" for _, reason in results)
            results = iter(results)
            for _, row in unit.todo:
                value = row.get(args.field)
                put_texts(row, f"rewrite_{source}", value, [next(results) for _ in as_list(value)])
        units.write(unit)
    units.join()


# === rows: the same lines in rewrite_llama.py, caption_llava.py and fuse_vicuna.py; a test compares them ==============

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def die(message):
    """End with one line on stderr and exit status 2."""
    line = " ".join(re.sub(r"\x1b\[[\d;]*m", "", message).split())
    tqdm.write(f"{os.path.basename(sys.argv[0])}: error: {line if len(line) < 600 else line[:600] + ' ...'}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, low):
    """For argparse: a finite number, `low` or more."""
    def parse(text):
        if not low <= kind(text) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: expected {low} or more")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def stage_parser(description, **defaults):
    """The arguments of all three stages."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--input", required=True, help="JSONL, one row an image (data/README.md)")
    add("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    add("--model", help="folder or hub name; with --server the name that it serves (default: %(default)s)")
    add("--max-new-tokens", type=number(int, 1), help="longest answer, in tokens (default: %(default)s)")
    add("--batch-size", type=number(int, 1), help="prompts a batch (default: %(default)s)")
    add("--limit", type=number(int, 0), help="only the first N lines, and an estimate for whole data sets (default: all)")
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="auto: bf16 where the hardware computes in it, else fp32 (fp16 for GPUs before Ampere)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: a GPU if there is one")
    add("--seed", type=number(int, 0), default=0, help="seed of all random draws (default: %(default)s)")
    add("--server", nargs="+", metavar="URL", help="OpenAI-compatible servers (vLLM, SGLang) that generate the texts and share "
        "the work; a second run may give other texts (default: generate here)")
    add("--concurrency", type=number(int, 1), default=64, help="open requests per server (default: %(default)s)")
    parser.set_defaults(**defaults)
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    return parser


def pick_device(args):
    """Return the model's device. Set args.dtype to the dtype in use: it changes the texts, so it is one of OUT's settings."""
    if args.server:
        args.dtype = args.batch_size = "the server's"
        return None
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in found if found[name]) if args.device == "auto" else args.device
    if not found[device]:
        die(f"--device {device}: torch finds no such device")
    if args.dtype == "auto":
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else
                  device == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))
        args.dtype = "bf16" if native else "fp32"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new length, and each token has one
    return device


def load(auto_class, name, **options):
    """auto_class.from_pretrained, or one line that says what is wrong with --model."""
    try:
        return auto_class.from_pretrained(name, **options)
    except Exception as e:  # transformers raises nearly everything for a folder without a model
        fault = f"{type(e).__name__}: {e}"
        if "llava_llama" in fault:
            fault = "llava_llama is the format of LLaVA's authors: take the same model from llava-hf"
        if "tiktoken" in fault or "sentencepiece" in fault.lower():  # transformers asks for the wrong one
            fault = "its tokenizer.model needs: pip install sentencepiece protobuf"
        die(f"--model {name}: {auto_class.__name__} cannot load it: {fault}")


def end_tokens(model, tokenizer):
    """The ids that end an answer. Conversions of the same model name them in different places."""
    places = [model.config.get_text_config().eos_token_id, model.generation_config.eos_token_id, tokenizer.eos_token_id]
    return sorted({i for ids in places for i in (ids if isinstance(ids, list) else [ids]) if i is not None})


def until_end(ids, ends):
    """The ids before the first end token"""
    return list(itertools.takewhile(lambda i: i not in ends, ids))


def special_markers(tokenizer):
    """A pattern of all texts that the tokenizer reads as a special token, flagged as one or not (<|end|>). Of an unknown
    tokenizer (None: a server's), of all that look like one."""
    if tokenizer is None:
        return re.compile(r"<[|\uff5c].*?[|\uff5c]>|<</?\w+>>|</?\w+>|\[/?[A-Z_]+\]")
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()
             if token.special or str(token)[0] in "<[{" and str(token)[-1] in ">]}"} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def one_line(text, markers=None):
    """The text without control characters, line breaks of any kind and `markers`, runs of white space as one blank."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return one_line(markers.sub(" ", text), markers) if markers and markers.search(text) else text


def as_list(value):
    """The texts of a field: all of a list, or the one that is there; none is there in []."""
    return value if value and isinstance(value, list) else [value or None]


def put_texts(row, field, source, results):
    """Put [(text or None, reason or None)] into row[field]: a list if `source`, what they were made from, is one. The
    reasons go to row["error"][field]."""
    if row.get(field) is not None:  # Units checks only the first 1,000 rows
        source, results = None, [(row[field], "was there before, kept")]
    texts, reasons = ([result[i] for result in results] for i in (0, 1))
    row[field], reason = (texts, reasons) if as_list(source) is source else (texts[0], reasons[0])
    error = row.get("error")
    if any(reasons):
        error = error if isinstance(error, dict) else {} if error is None else {"row": error}  # the user's own: kept
        row["error"] = {**error, field: reason}
    elif isinstance(error, dict) and error.pop(field, None) and not error:  # from an earlier run, no longer true
        del row["error"]


def parse_row(line):
    """The line's object and True. If the line is not a JSON object: a row that keeps its text and the reason, and False."""
    try:
        row = json.loads(line.decode("utf-8-sig"))  # which skips a byte order mark
        if isinstance(row, dict):
            return row, True
        reason = "not a JSON object"
    except (ValueError, RecursionError) as e:
        reason = f"not JSON: {e}"
    return {"error": {"line": reason}, "line": line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")}, False


class Units:
    """The input in units, and the output that is made of them.

    A unit is some consecutive lines, together 64 KiB or a little more. What a stage makes of a unit depends on the settings,
    the unit's lines and their place in the file, and on nothing else. Its file in OUT.parts is named by a hash of just
    these, and gets this name when it is complete and on the disk. So a file that is there is right, whatever was killed and
    whoever else is at work; one that is not there is made. No locks, no process group, nothing else to remember."""

    def __init__(self, args, settings, reads, makes):
        """The first 1,000 rows must have one of the fields `reads` and none of the fields `makes`."""
        self.args, self.output, self.parts, self.servers = args, args.output, args.output + ".parts", []
        self.settings = {name: getattr(args, name) for name in ("model", "max_new_tokens", "batch_size", "dtype", "seed", "limit")}
        self.settings |= {"stage": os.path.basename(__file__), **settings}
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.outcomes, self.notes, self.paths = Counter(), Counter(), []  # how texts ended; what else happened; units' files
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "RANK" not in os.environ:
            die("several SLURM tasks without RANK would all do the same work: start them by torchrun, or set RANK and WORLD_SIZE")
        try:
            with open(args.input, "rb") as f:
                lines = list(itertools.islice(f, 1000))
        except OSError as e:
            die(f"--input {args.input}: {e.strerror}")
        if lines and lines[0].startswith((b"\xff\xfe", b"\xfe\xff")):
            die(f"--input {args.input} is UTF-16; expected UTF-8")
        fields = {key for line in lines for key, value in parse_row(line)[0].items() if value is not None}
        if lines and not fields & set(reads):
            die(f"none of the first {len(lines)} rows of {args.input} has {' or '.join(reads)}, only {sorted(fields)}")
        if there := fields & set(makes):
            die(f"{args.input} has {', '.join(sorted(there))} already, which this stage would overwrite")

    def __iter__(self):
        """The units that rank r of W has to make, of units r, r + W, ...: path, rows, and todo, [(byte offset, row)] without
        the rows that are no JSON object. Reads and hashes the whole input, which takes minutes for 300 M rows."""
        self.paths, self.input_hash, self.clock = [], hashlib.sha256(), [(0, time.time())]
        size, end = os.path.getsize(self.args.input), 0
        unit_size = 64 << 10
        while size / unit_size > 65_536:
            unit_size *= 2
        self.progress = tqdm(total=size if self.args.limit is None else None, unit="B", unit_scale=True,
                             delay=1, disable=self.rank > 0)
        left = sys.maxsize if self.args.limit is None else self.args.limit
        with open(self.args.input, "rb") as f:
            while unit := f.readlines(unit_size - 1)[:left]:  # the next lines, until they are unit_size together
                left -= len(unit)
                offsets = list(itertools.accumulate(map(len, unit), initial=end))
                content = hashlib.sha256(b"".join(unit)).hexdigest()
                key = hashlib.sha256(json.dumps([self.settings, end, content], sort_keys=True).encode()).hexdigest()
                number, path = len(self.paths), f"{self.parts}/{len(self.paths):05d}-{key[:32]}"
                self.paths.append(path)
                self.input_hash.update(content.encode())
                size, end = offsets[-1] - end, offsets[-1]
                if number % self.world != self.rank or os.path.exists(path) or os.path.exists(self.output):
                    self.progress.update(size)
                    continue
                rows = [parse_row(line) for line in unit]
                self.notes.update("not a JSON object, kept as text" for _, good in rows if not good)
                yield SimpleNamespace(path=path, size=size, rows=[row for row, _ in rows],
                                      todo=[(offset, row) for offset, (row, good) in zip(offsets, rows) if good])

    def write(self, unit):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in unit.rows)
        self.save(unit.path, (line.encode(errors="backslashreplace") for line in lines))  # a lone surrogate stays an escape
        self.clock.append((self.clock[-1][0] + len(unit.rows), time.time()))
        self.progress.update(unit.size)
        self.progress.set_postfix_str(f"{self.outcomes.total() / (time.time() - self.clock[0][1]):.1f} texts/s", refresh=False)

    def save(self, path, chunks):
        """Write a file whole or not at all: under a name of this host and process, synced, then renamed."""
        temporary = os.path.join(self.parts, f"{os.path.basename(path)}.{os.uname().nodename}.{os.getpid()}")
        try:
            os.makedirs(self.parts, exist_ok=True)
            with open(temporary, "wb") as f:
                f.writelines(chunks)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            if not (isinstance(e, FileNotFoundError) and os.path.exists(self.output)):  # else another launch was first to join
                die(f"{path}: {e.strerror}. Nothing is lost: the same command goes on from here")

    def finished(self):
        """Whether OUT is there, made from this input with these settings. If it was made otherwise, one line says how."""
        if not os.path.exists(self.output):
            return False
        try:
            with open(self.output + ".settings.json") as f:
                made = json.load(f)
        except (OSError, ValueError) as e:
            die(f"{self.output} exists, but nothing says how it was made ({e}): choose another --output")
        list(self)  # hashes the input: while OUT is there, there is nothing to make
        self.progress.close()
        for key, value in {**self.settings, "input": self.input_hash.hexdigest()}.items():
            if made.get(key) != value:
                die(f"{self.output} was made with {key} = {made.get(key)!r}, now it is {value!r}: choose another --output")
        shutil.rmtree(self.parts, ignore_errors=True)  # if the launch that joined them was killed before it could
        return True

    def join(self):
        """Join the units if all are there, and say what this launch did."""
        self.progress.close()
        clock, there = self.clock, set(os.listdir(self.parts)) if os.path.isdir(self.parts) else set()
        missing = {os.path.basename(path) for path in self.paths} - there
        if not self.finished() and missing:
            print(f"{len(missing)} of {len(self.paths)} units are not there yet: the last rank joins all (if none is at work, repeat the command)")
        elif not os.path.exists(self.output):
            record = json.dumps({**self.settings, "input": self.input_hash.hexdigest(), "servers": self.servers}, indent=1)
            self.save(self.output + ".settings.json", [record.encode()])
            self.save(self.output, (line for path in self.paths for line in open(path, "rb")))
            shutil.rmtree(self.parts, ignore_errors=True)
        rows, seconds = clock[-1][0], clock[-1][1] - clock[0][1]
        print(f"{rows} rows, {self.outcomes.total()} texts in {seconds:.0f} s without loading the model: "
              f"{rows / max(seconds, 1e-9):.2f} rows a second")
        for what, count in self.outcomes.most_common() + self.notes.most_common():
            print(f"{count:9d}  {what}")
        if self.args.limit is not None and rows:
            first, begun = clock[len(clock) > 2]  # after the first unit, which includes the warm-up
            for millions in (1, 12, 300):
                days = millions * 1e6 * (clock[-1][1] - begun) / (rows - first) / self.world / 86400
                print(f"{millions:6d} M rows would take {days:10,.2f} days at this rate on {self.world} rank(s)")


def batched(items, size):
    return [items[at:at + size] for at in range(0, len(items), size)]


class Server:
    """Texts from OpenAI-compatible servers: one text a request, many requests at once.

    A request that a server refuses (400, 413, 422) while it still answers a harmless one is its row's error. A server that is
    not there, busy or broken is asked again for half a minute, in turn with the others. All else ends the launch."""

    def __init__(self, args, units, path, **trial):
        """trial: a harmless request, which every server has to answer before the first row"""
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in args.server]
        if wrong := [url for url in self.urls if not url.startswith(("http://", "https://"))]:
            die(f"--server {wrong[0]}: expected http://HOST:PORT")
        self.path, self.trial, self.common = path, trial, {"model": args.model, "max_tokens": args.max_new_tokens}
        self.pool = ThreadPoolExecutor(args.concurrency * len(self.urls))
        self.answered, self.refused, self.turns, self.leaving = 0, 0, itertools.count(), threading.Event()
        self.map(lambda url: self.ask([url], **trial), self.urls)
        for url in self.urls:
            with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(url + "/version", timeout=10) as response:
                units.servers.append(json.load(response))  # vLLM reports it; not a setting: a long run survives an update

    def map(self, function, items):
        """[function(item) for item in items], many at a time"""
        futures = [self.pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException as e:  # Ctrl-C too: what waits is not asked any more
            self.leaving.set()
            self.pool.shutdown(cancel_futures=True)
            if isinstance(e, OSError):  # from a server, or from the disk that holds an image
                die(f"{e}. Nothing is lost: the same command goes on from here")
            raise

    def ask(self, urls=None, **request):
        """-> (text, whether it ended by itself, None) or ("", False, why the request was refused)"""
        urls, turn, failures, broken = urls or self.urls, next(self.turns), 0, 0
        data = json.dumps({**self.common, **request}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        while True:
            url, code, answered = urls[turn % len(urls)], 0, self.answered
            try:
                try:
                    response = urllib.request.urlopen(urllib.request.Request(url + self.path, data, headers), timeout=300)
                except urllib.error.HTTPError as e:
                    code, response = e.code, e
                with response:
                    body = response.read()
                if code == 0:
                    choice = json.loads(body)["choices"][0]
                    text = "" + ((choice["message"]["content"] if "message" in choice else choice["text"]) or "")
                    self.answered, self.refused = self.answered + 1, self.refused if request == self.trial else 0
                    return text, choice.get("finish_reason") == "stop", None
                fault = f"{code} {one_line(body.decode(errors='replace'))[:200]}"
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:  # or no answer of this kind
                fault = f"{type(e).__name__}: {e}"
            broken += code == 500
            if (code in (400, 413, 422) or broken == 3) and request != self.trial:
                self.ask([url], **self.trial)  # if even this is refused, it is not the row's fault, and the launch ends
                self.refused += 1  # one row after another, without an answer in between
                if self.refused >= 100:
                    raise ConnectionError(f"--server {url} refuses every row: {fault}")
                return "", False, f"refused by the server: {fault}"
            failures += not (code in (429, 503) and self.answered > answered)  # else it is only busy
            if failures > 6 or 400 <= code < 500 and code not in (408, 429) or self.leaving.wait(2 ** failures / 4):
                raise ConnectionError(f"--server {url}: {fault}")
            turn += 1

# === end of rows ======================================================================================================


if __name__ == "__main__":
    main()
