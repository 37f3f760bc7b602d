"""Rewrite captions with LLaMA by in-context learning: LaCLIP's augmentation (arXiv 2305.20088, section 3.1).

Every caption gets one rewrite a source. A source (chatgpt, bard, coco, human) is a set of input => output
pairs. The prompt is a task line, three pairs drawn from the set, and the caption, whose line the model ends.

    python rewrite_llama.py --input cc3m.jsonl --output cc3m.rewritten.jsonl --model huggyllama/llama-7b
    torchrun --nproc_per_node 8 rewrite_llama.py ...the same arguments...    # the ranks share the work
    python rewrite_llama.py --input a.jsonl --output b.jsonl --model FOLDER --limit 20  # a first look
    python rewrite_llama.py ...the same arguments... --server http://node1:8000 http://node2:8000  # vLLM

Row in:  {"image": "photos/1.jpg", "alt": "red bike"}
Row out: the same and "rewrite_chatgpt": "...", ...; null where no usable answer came, the reason in "error".
The same command resumes after any interruption; without --server, its output is then identical byte for byte.

Read draw_prompt and rewrite, then Completer.complete and decode, then sample, then main. What follows main is
the same in all three captioning scripts: rows, resuming, servers.
"""
import argparse
import contextlib
import copy
import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from functools import partial
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from tqdm import tqdm

SOURCES = ["chatgpt", "bard", "coco", "human"]  # M = 4 rewrites a caption (paper, section 3.1)
TASK = "Rewrite each image caption in other words, keeping its meaning."  # ours, not the release's
GROUP = 512  # texts that share their three pairs; ours (the release draws pairs for every text)
MAX_INPUT_TOKENS = 256  # a longer text is not a caption: its rewrite is null; our choice
PAIRS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prompts", "meta_pairs.jsonl")


# --- the prompt -------------------------------------------------------------------------------------------

def clean(text, markers=None):
    """The text as one line that cannot break the prompt."""
    return one_line(text.replace("=>", " "), markers)


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
    triples = [*zip(words, words[1:], words[2:])]
    return "repeats itself" if len(set(triples)) < len(triples) else None


def rewrite(complete, prompt, pairs, texts, seeds, notes):
    """Rewrites of cleaned texts; an unusable one is drawn again once. -> [(rewrite or None, reason or None)]

    complete(prompt, texts, seeds) -> [(answer, whether its line ended, None or why it cannot be asked)]"""
    results = [(None, "empty input")] * len(texts)
    todo = [i for i, text in enumerate(texts) if text]
    for attempt in range(2):
        if not todo:
            break
        answers = complete(prompt, [texts[i] for i in todo], [[*seeds[i], attempt] for i in todo])
        for i, (answer, ended, fault) in zip(todo, answers):
            answer = first_line(answer)
            reason = fault or reject(answer, ended, pairs)
            results[i] = (None if reason else answer, reason)
        todo = [i for i, (_, _, fault) in zip(todo, answers) if results[i][1] and not fault]
        if todo and attempt == 0:
            notes["drawn again"] += len(todo)
    return results


def load_pairs(path, sources):
    """{source: [example, ...]}. An example is a pair, or a list of texts of one image: two are drawn."""
    examples = {source: [] for source in sources}
    try:
        with open(path, encoding="utf-8-sig") as f:
            for entry in map(json.loads, f):
                example = entry.get("captions") or (entry["input"], entry["output"])
                if len(example) < 2 or not all(text.split() for text in example):
                    raise ValueError(f"no two texts in {entry}")
                if entry["source"] in examples:
                    examples[entry["source"]].append(example)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        die(f"--pairs {path}: {e!r}; expected lines of source, input, output (or captions)")
    return examples


# --- generation -------------------------------------------------------------------------------------------

def sample(logits, uniform, temperature, top_p, k=256):
    """Nucleus sampling of one token a row: logits [B, V], uniform [B] in [0, 1) -> ids [B].

    A row's own random number is looked up in the cumulative distribution of its nucleus, so its draw does not
    depend on the other rows of the batch. Temperature 0 is greedy."""
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

    The prompt's keys and values are computed once, and each step reads them once for all rows. Copies for 64
    rows would be 4 GB (LLaMA-7B, 120 tokens), to be read at each step beside 13 GB of weights. A row leaves
    the batch when its line ends. test_stages.py compares with `generate`, one row at a time."""

    def __init__(self, model, tokenizer, args):
        from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
        from transformers.cache_utils import DynamicLayer
        from transformers.masking_utils import eager_mask

        self.model, self.tokenizer, self.args, self.prefix = model, tokenizer, args, None
        self.attended = set()  # the layers that `attend` was called for, behind a prompt
        self.tensor = partial(torch.tensor, device=model.device)
        self.new_cache = partial(DynamicCache, config=model.config.get_text_config())
        known = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"  # before transformers 5.24
        self.ends = end_tokens(model, tokenizer)
        pieces = tokenizer.batch_decode([[i] for i in range(model.get_input_embeddings().num_embeddings)])
        self.stops = {*self.ends, *(i for i, piece in enumerate(pieces) if "\n" in piece)}  # they end a line
        layers = self.new_cache().layers
        if any(not isinstance(layer, DynamicLayer) or hasattr(layer, "conv_states") for layer in layers):
            die(f"--model {args.model}: some layers have no attention, which only --server supports")
        self.attention = f"shared_prefix_{id(self)}"
        AttentionInterface.register(self.attention, self.attend)
        AttentionMaskInterface.register(self.attention, eager_mask)
        self.shares = all(type(layer) is DynamicLayer for layer in layers) and self.try_sharing()  # no window
        if not self.shares:
            print("this model's attention cannot share the prompt among rows: each row gets a copy, which is "
                  "slower", file=sys.stderr)

    def attend(self, module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs):
        """Attention over the prompt, which all rows share, and a row's own tokens. transformers calls it.

        query [B, H, T, D]; key and value [B, G, S, D] of the row's own tokens (G = H, or fewer with grouped
        queries); mask [B, 1, T, S]. The prompt's keys and values: [G, P, D]. One softmax covers both."""
        if softcap is not None or s_aux is not None:
            raise ValueError("softcap or attention sinks")  # for try_sharing
        keys, values = key[0, :, :0], value[0, :, :0]  # none, while the prompt itself is computed
        if self.prefix is not None:
            layer = self.prefix.layers[module.layer_idx]
            keys, values = layer.keys[0], layer.values[0]
            self.attended.add(module.layer_idx)
        query = query.unflatten(1, (key.shape[1], -1))  # [B, G, H / G, T, D]
        shared = torch.einsum("bghtd,gpd->bghtp", query, keys)
        own = torch.einsum("bghtd,bgsd->bghts", query, key)
        scores = torch.cat([shared * scaling, own * scaling + attention_mask[:, None]], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)  # [B, G, H / G, T, P + S]
        on_prompt, on_own = weights.split([keys.shape[1], key.shape[2]], -1)
        out = torch.einsum("bghtp,gpd->bghtd", on_prompt, values)
        out = out + torch.einsum("bghts,bgsd->bghtd", on_own, value)
        return out.flatten(1, 2).transpose(1, 2), None  # [B, T, H, D]

    @torch.inference_mode()
    def forward(self, ids, mask, cache):
        """Logits [B, V] of the token after ids [B, T], whose keys and values are added to the cache. The mask
        [B, P + S] is 0 at padding: it covers the prompt's P tokens and the row's own S, ids included."""
        length = cache.get_seq_length() + ids.shape[1]  # S, or P + S where the cache holds the prompt too
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]  # as if there were no padding
        logits = self.model(input_ids=ids, attention_mask=mask[:, -length:], position_ids=position,
                            use_cache=True, logits_to_keep=1, **{self.cache_name: cache}).logits[:, -1]
        if cache.get_seq_length() != length:  # an unknown argument is ignored silently
            die(f"--model {self.args.model}: this version of transformers does not fill {self.cache_name}")
        return logits

    def set_prefix(self, ids):
        """Compute the keys and values of the prompt's ids [1, P]. `decode` continues them."""
        self.prefix, cache = None, self.new_cache()
        self.forward(ids, torch.ones_like(ids), cache)
        self.prefix = cache

    def try_sharing(self):
        """Whether `attend` gives what the model's own attention gives, tried on twelve tokens. Attention with
        a softcap or sinks cannot share the prompt, and a model may ignore set_attn_implementation."""
        ids, before = self.tensor([[*range(5, 17)]]), self.model.config._attn_implementation
        expected = self.forward(ids, torch.ones_like(ids), self.new_cache())
        with contextlib.suppress(RuntimeError, ValueError, TypeError, AttributeError):
            self.model.set_attn_implementation(self.attention)
            self.set_prefix(ids[:, :8])
            logits = self.forward(ids[:, 8:], torch.ones_like(ids), self.new_cache())
            close = (logits - expected).norm() < 0.25 * expected.norm()  # rounding to bf16 makes up to 0.1
            if close and len(self.attended) == len(self.prefix.layers):
                return True
        self.model.set_attn_implementation(before)
        return False

    def complete(self, prompt, texts, seeds):
        """-> for each text (answer, whether its line ended, None), or ("", False, why it cannot be asked)"""
        self.set_prefix(self.tensor([self.tokenizer(prompt).input_ids]))
        encode = partial(self.tokenizer, add_special_tokens=False)
        newline = len(encode("\n").input_ids)  # before the text, or LLaMA's tokenizer puts a blank there
        ids = [encode(f"\n{text} =>").input_ids[newline:] for text in texts]
        steps = self.args.max_new_tokens
        uniform = torch.tensor(np.stack([np.random.default_rng(seed).random(steps, "f4") for seed in seeds]))
        results = [("", False, "input too long")] * len(texts)
        order = [i for i in range(len(texts)) if len(ids[i]) <= MAX_INPUT_TOKENS]
        order.sort(key=lambda i: len(ids[i]))
        # Without sharing, a batch holds texts of one length: a sliding window would count the padding
        for _, group in itertools.groupby(order, lambda i: 0 if self.shares else len(ids[i])):
            for batch in batched(list(group), self.args.batch_size):
                new = self.decode([ids[i] for i in batch], uniform[batch])
                kept = [[token for token in tokens if token not in self.ends] for tokens in new]
                answers = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
                for i, tokens, answer in zip(batch, new, answers):
                    results[i] = answer, tokens[-1] in self.stops, None
        return results

    @torch.inference_mode()
    def decode(self, texts, uniform):
        """Continue the ids of B texts, with uniform [B, max_new_tokens], until their lines end -> B lists"""
        T, P, cache = max(map(len, texts)), self.prefix.get_seq_length(), self.new_cache()
        ids = self.tensor([[0] * (T - len(text)) + text for text in texts])  # [B, T], padded on the left
        mask = self.tensor([[1] * P + [0] * (T - len(text)) + [1] * len(text) for text in texts])
        if not self.shares:
            cache = copy.deepcopy(self.prefix)
            cache.batch_repeat_interleave(len(texts))
        new, alive, uniform = [[] for _ in texts], list(range(len(texts))), uniform.to(ids.device)
        for step in range(self.args.max_new_tokens):
            logits = self.forward(ids, mask, cache)
            ids = sample(logits, uniform[:, step], self.args.temperature, self.args.top_p)  # [rows alive]
            tokens = ids.tolist()
            for b, token in zip(alive, tokens):
                new[b].append(token)
            keep = [i for i, token in enumerate(tokens) if token not in self.stops]
            if not keep:
                break
            if len(keep) < len(alive):  # the rows whose lines ended leave, with their keys and values
                alive, keep = [alive[i] for i in keep], self.tensor(keep)
                ids, mask, uniform = ids[keep], mask[keep], uniform[keep]
                cache.batch_select_indices(keep)
            ids, mask = ids[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return new


def complete_by_server(server, args, prompt, texts, seeds):
    """Completer.complete, by a server."""
    def ask(text, seed):
        if len(text.encode()) > 4 * MAX_INPUT_TOKENS:  # a token has about four bytes
            return "", False, "input too long"
        answer, ended, refusal = server.ask(
            prompt=f"{prompt}{text} =>", temperature=args.temperature, top_p=args.top_p, stop=["\n"],
            seed=zlib.crc32(repr(seed).encode()) >> 1)
        return answer, ended or "\n" in answer, refusal
    return server.map(lambda pair: ask(*pair), zip(texts, seeds))


# --- the stage --------------------------------------------------------------------------------------------

def main(argv=None):
    parser = stage_parser(__doc__, "huggyllama/llama-7b", batch_size=256, max_new_tokens=77)  # 77: release
    add = parser.add_argument
    add("--field", default="alt", help="field to rewrite, a text or a list (default: %(default)s)")
    add("--sources", nargs="+", default=SOURCES, help="sets of pairs; each makes rewrite_SOURCE")
    add("--pairs", default=PAIRS, help="JSONL of the sources' pairs (default: data/prompts/meta_pairs.jsonl)")
    add("--shots", type=number(int, 0), default=3, help="pairs in the prompt (default: %(default)s, paper)")
    add("--temperature", type=number(float, 0), default=0.9, help="0: greedy (default: %(default)s, release)")
    add("--top-p", type=number(float, 1e-6, 1), default=0.95, help="1: off (default: %(default)s, release)")
    args = parser.parse_args(argv)
    args.sources = list(dict.fromkeys(args.sources))
    examples = load_pairs(args.pairs, args.sources)
    for source in args.sources:
        if len(examples[source]) < args.shots:
            die(f"--pairs {args.pairs}: {source!r} has {len(examples[source])} examples, fewer than --shots")
    device = pick_device(args)
    settings = {"pairs_sha256": hashlib.sha256(json.dumps([TASK, GROUP, examples]).encode()).hexdigest()}
    units = Units(args, settings, reads=[args.field], makes=[f"rewrite_{source}" for source in args.sources])
    if units.finished():
        return print(f"{args.output} is finished")

    if args.server:
        markers = SERVER_MARKERS
        prompt, _ = draw_prompt(examples[args.sources[0]], args.shots, np.random.default_rng(0), markers)
        server = Server(args, units, "/v1/completions", prompt=prompt + "a photo of a dog =>", stop=["\n"],
                        seed=0, temperature=args.temperature, top_p=args.top_p)
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
                rng = np.random.default_rng([*key, *group[0][0]])  # the place of the group's first text
                prompt, pairs = draw_prompt(examples[source], args.shots, rng, markers)
                seeds = [[*key, *place] for place, _ in group]
                results += rewrite(complete, prompt, pairs, [text for _, text in group], seeds, units.notes)
            units.outcomes.update(reason or "rewritten" for _, reason in results)
            answers = iter(results)
            for _, row in unit.todo:
                value = row.get(args.field)
                put_texts(row, f"rewrite_{source}", value, [next(answers) for _ in as_list(value)])
        units.write(unit)
    units.join()


# === rows: the same lines in rewrite_llama.py, caption_llava.py and fuse_vicuna.py; a test compares them ====

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# how most models write special tokens: for a server, whose tokenizer is not here
SERVER_MARKERS = re.compile(r"<[|\uff5c].*?[|\uff5c]>|<</?\w+>>|</?\w+>|\[/?[a-z]*[A-Z_]+\]")


def die(message):
    """End with one line on stderr and exit status 2."""
    line = " ".join(re.sub(r"\x1b\[[\d;]*m", "", message).split())  # transformers colours its messages
    tqdm.write(f"{os.path.basename(sys.argv[0])}: error: {line[:600]}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, low, high=10 ** 12):
    """A type for argparse: numbers from `low` to `high`."""
    def number(text):  # argparse shows this name
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def stage_parser(doc, model, batch_size, max_new_tokens):
    """The arguments that all three stages have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--input", required=True, help="JSONL, one row an image (data/README.md)")
    add("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    add("--model", default=model, help="folder, hub name, or a server's name of it (default: %(default)s)")
    add("--max-new-tokens", type=number(int, 1), default=max_new_tokens, help="(default: %(default)s)")
    add("--batch-size", type=number(int, 1), default=batch_size, help="of prompts (default: %(default)s)")
    add("--limit", type=number(int, 0), help="only the first N lines; says how long data sets would take")
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="auto: bf16 where the hardware computes in it, else fp32 (fp16 suits GPUs before Ampere)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: a GPU if present")
    add("--seed", type=number(int, 0), default=0, help="seed of all random draws (default: %(default)s)")
    add("--server", nargs="+", metavar="http://HOST:PORT", help="OpenAI-compatible servers (vLLM, SGLang) "
        "that generate the texts and share the work; a second run may give other texts (default: none)")
    add("--concurrency", type=number(int, 1), default=64, help="requests at a time, a server (default: 64)")
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    return parser


def pick_device(args):
    """The model's device. Sets args.dtype to the dtype in use, which is one of OUT's settings."""
    if args.server:
        args.dtype = args.batch_size = "the server's"
        return None
    accelerator = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = accelerator.type if args.device == "auto" else args.device
    if device not in ("cpu", accelerator.type):
        die(f"--device {device}: torch finds no such device")
    if args.dtype == "auto":
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else
                  device == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))
        args.dtype = "bf16" if native else "fp32"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new length, and each token has one
        torch.backends.cudnn.allow_tf32 = False  # of convolutions: fp32 is fp32
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
    named = [x.eos_token_id for x in (model.config.get_text_config(), model.generation_config, tokenizer)]
    return sorted({i for ids in named for i in (ids if isinstance(ids, list) else [ids])} - {None})


def special_markers(tokenizer):
    """A pattern of all texts that the tokenizer reads as a special token, flagged as one or not (<|end|>)."""
    markers = {str(token) for token in tokenizer.added_tokens_decoder.values()
               if token.special or str(token)[0] in "<[{" and str(token)[-1] in ">]}"}
    longest_first = sorted(markers | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, filter(str.strip, longest_first))) or "(?!)")


# Controls, marks of direction, lone surrogates, hidden tags; not the joiners of emoji and of Persian words
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
                      "\U000e0000-\U000e007f]")


def one_line(text, markers=None):
    """The text without control characters and `markers`, all white space as single blanks."""
    text = " ".join(CONTROLS.sub(" ", text).split())
    return one_line(markers.sub(" ", text), markers) if markers and markers.search(text) else text


def first_line(text):
    """The first line of an answer, without half a character at its end."""
    return one_line(text.strip().split("\n")[0]).rstrip("\ufffd ")


def as_list(value):
    """The texts of a field: a list's entries, or the one text; an empty list counts as one missing text."""
    return value if value and isinstance(value, list) else [value or None]


def put_texts(row, field, like, results):
    """Write the texts of results, [(text or None, reason or None)], into row[field], the reasons into
    row["error"][field]. Both are lists if `like`, which the texts were made from, is a list."""
    if row.get(field) is not None:  # Units checks only the first 1,000 rows
        like, results = None, [(row[field], "was there before, kept")]
    texts, reasons = map(list, zip(*results))
    row[field], reason = (texts, reasons) if like and isinstance(like, list) else (texts[0], reasons[0])
    error = row.get("error")
    if any(reasons):
        error = error if isinstance(error, dict) else {} if error is None else {"row": error}  # user's own
        row["error"] = {**error, field: reason}
    elif isinstance(error, dict) and error.pop(field, None) and not error:  # an earlier run's, no longer true
        del row["error"]


def parse_row(line):
    """The line's JSON object and True. Of any other line: a row with its text and the reason, and False."""
    try:
        row = json.loads(line.decode("utf-8-sig"))  # which skips a byte order mark
        if isinstance(row, dict):
            return row, True
        reason = "not a JSON object"
    except (ValueError, RecursionError) as e:
        reason = f"not JSON: {e}"
    text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    return {"error": {"line": reason}, "line": text}, False


def batched(items, size):
    return [items[at:at + size] for at in range(0, len(items), size)]


class Units:
    """The input in units of consecutive lines, and the output made of them, which survives any interruption.

    OUT.parts has a folder for these settings. In it, the name of a unit's file is a hash of the unit's lines
    and their place in the input. A file gets its name after it is complete and synced. So an existing file is
    right, whatever was killed and whoever else is at work, and a missing file is made."""

    def __init__(self, args, settings, reads, makes):
        """The first 1,000 rows must have one of the fields `reads` and none of the fields `makes`."""
        # these change no text, or a hash of them is a setting; with --server, dtype says so
        apart = ("input", "output", "device", "server", "concurrency", "workers", "pairs")
        self.settings = {name: value for name, value in vars(args).items() if name not in apart}
        self.settings |= {"stage": os.path.basename(__file__), **settings}
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:32]
        self.args, self.output = args, args.output
        self.parts = os.path.join(args.output + ".parts", key)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.outcomes, self.notes = Counter(), Counter()  # how texts ended; what else happened
        self.servers = []  # what the servers say of their versions
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "RANK" not in os.environ:
            die("several SLURM tasks without RANK would all do the same: start torchrun in one task a node")
        try:
            with open(args.input, "rb") as f:
                lines = list(itertools.islice(f, 1000))
        except OSError as e:
            die(f"--input {args.input}: {e.strerror}")
        if lines and lines[0].startswith((b"\xff\xfe", b"\xfe\xff")):
            die(f"--input {args.input} is UTF-16; expected UTF-8")
        rows = [parse_row(line)[0] for line in lines]
        fields = {key for row in rows for key, value in row.items() if value is not None}
        if rows and not fields & set(reads):
            die(f"{args.input}: no row has {' or '.join(reads)}, the first {len(rows)} have {sorted(fields)}")
        if fields & set(makes):
            die(f"{args.input} has {sorted(fields & set(makes))} already, which this stage would overwrite")
        with contextlib.suppress(OSError):
            others = {*os.listdir(args.output + ".parts")} - {key}
            if others and self.rank == 0 and not os.path.exists(args.output):
                print(f"note: {args.output}.parts also has units of {len(others)} other settings, which are "
                      "not used", file=sys.stderr)

    def __iter__(self):
        """Read the input, and yield what this rank has to make of units r, r + W, ...: path, rows, and todo,
        which is [(byte offset, row)] of those rows that are JSON objects. If OUT is there, nothing is
        yielded: the input is only hashed."""
        # [(rows that this launch made, time)]: at the start, after its first unit, after its latest
        self.clock = [(0, time.time())]
        self.paths, begin, size = [], 0, os.path.getsize(self.args.input)
        unit_size = 1 << max(16, (size >> 16).bit_length())  # 64 KiB, or more: at most 65,536 units
        left = sys.maxsize if self.args.limit is None else self.args.limit
        with open(self.args.input, "rb") as f, tqdm(
                total=size if self.args.limit is None else None, unit="B", unit_scale=True, delay=1,
                disable=self.rank > 0) as progress:
            while lines := f.readlines(unit_size - 1)[:left]:  # reads until they are unit_size together
                content, number = b"".join(lines), len(self.paths)
                key = hashlib.sha256(b"%d " % begin + content).hexdigest()[:32]
                self.paths.append(path := os.path.join(self.parts, f"{number:05d}-{key}"))
                made = os.path.exists(path) or os.path.exists(self.output)
                if number % self.world == self.rank and not made:
                    rows = [parse_row(line) for line in lines]
                    self.notes.update("not a JSON object, kept as text" for _, good in rows if not good)
                    offsets = itertools.accumulate(map(len, lines), initial=begin)
                    todo = [(offset, row) for offset, (row, good) in zip(offsets, rows) if good]
                    yield SimpleNamespace(path=path, rows=[row for row, _ in rows], todo=todo)
                left, begin = left - len(lines), begin + len(content)
                rate = self.outcomes.total() / (time.time() - self.clock[0][1])
                progress.set_postfix_str(f"{rate:.1f} texts/s", refresh=False)
                progress.update(len(content))
        names = " ".join(map(os.path.basename, self.paths))  # which hold hashes of all lines
        self.settings["input"] = hashlib.sha256(names.encode()).hexdigest()

    def write(self, unit):
        """Write a unit's file, when its rows are complete."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in unit.rows)
        self.save(unit.path, (line.encode(errors="backslashreplace") for line in lines))  # lone surrogates
        self.clock[2:] = [(self.clock[-1][0] + len(unit.rows), time.time())]

    def save(self, path, chunks):
        """Write a file whole or not at all: in a folder of its own, synced, then renamed."""
        try:
            os.makedirs(self.parts, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.parts) as folder:
                with open(os.path.join(folder, "file"), "wb") as f:
                    f.writelines(chunks)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(f.name, path)
        except OSError as e:
            if not os.path.exists(self.output):  # else another launch made OUT and removed the units
                die(f"{path}: {e.strerror}. Nothing is lost: the same command goes on from here")

    def finished(self):
        """Whether OUT is there. If these settings and this input made it, its units are removed. If not, one
        line says so, nothing is touched, and the launch ends."""
        if not os.path.exists(self.output):
            return False
        try:
            with open(self.output + ".settings.json") as f:
                made = json.load(f)
        except (OSError, ValueError) as e:
            die(f"{self.output} exists, but nothing says how it was made ({e}): choose another --output")
        if "input" not in self.settings:
            for _ in self:  # reads and hashes it: there is no unit to make
                pass
        for key, now in self.settings.items():
            if (then := made.get(key)) != now:
                how = "from another input" if key == "input" else f"with {key} = {then!r}, now it is {now!r}"
                die(f"{self.output} was made {how}: choose another --output")
        shutil.rmtree(self.parts, ignore_errors=True)
        with contextlib.suppress(OSError):  # units of other settings stay
            os.rmdir(self.output + ".parts")
        return True

    def join(self):
        """Join the units to OUT if all are there, and say what this launch did."""
        (_, begun), (rows, ended) = self.clock[0], self.clock[-1]
        seconds = max(ended - begun, 1e-9)
        missing = sum(not os.path.exists(path) for path in self.paths)
        if not missing and not os.path.exists(self.output):  # else another launch made it
            record = {**self.settings, "servers": self.servers}
            self.save(self.output + ".settings.json", [json.dumps(record, indent=1).encode()])
            self.save(self.output, (line for path in self.paths for line in open(path, "rb")))
        if not self.finished():
            print(f"{missing} of {len(self.paths)} units are missing: the last rank joins all (if none is at "
                  "work, repeat the command)")
        print(f"{rows} rows, {self.outcomes.total()} texts in {seconds:.0f} s without loading the model: "
              f"{rows / seconds:.2f} rows a second")
        for outcome, count in self.outcomes.most_common() + self.notes.most_common():
            print(f"{count:9d}  {outcome}")
        if self.args.limit is not None and rows:
            first, since = self.clock[-2]  # after the first unit, which has the warm-up, if there are more
            for size in (1, 12, 300):
                days = size * 1e6 / (rows - first) * (ended - since) / 86400 / self.world
                print(f"{size:4d} M rows would take {days:9,.2f} days at this rate on {self.world} rank(s)")


class Server:
    """Texts from OpenAI-compatible servers: one text a request, many requests at once, the servers in turn.

    A request that fails goes to the next server. The failure counts, unless the server is only busy (429,
    503) while others are answered. One for every server and seven more end the launch: after half a minute,
    or 40 minutes if they hang. A request that a server refuses (400, 413, 422, or the third 500) while it
    answers a harmless one is its row's error. Other statuses of 400 to 499 end the launch at once."""

    def __init__(self, args, units, path, **harmless):
        """harmless: a request that every server must answer before the first row is asked"""
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in args.server]
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                die(f"--server {url}: expected http://HOST:PORT")
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        self.common = {"model": args.model, "max_tokens": args.max_new_tokens}
        self.path, self.harmless, self.turns = path, harmless, itertools.count()
        self.answered = self.refused = 0  # requests in all; rows since the last answer
        self.down = {}  # url -> until when others go first, because it gave no answer; 0 if it gave one
        self.threads = ThreadPool(args.concurrency * len(self.urls))
        self.map(lambda url: self.ask([url], **harmless), self.urls)
        for url in self.urls:
            with contextlib.suppress(OSError, ValueError), urlopen(url + "/version", timeout=10) as response:
                units.servers.append(json.load(response))  # vLLM's; a long run may outlive an update

    def map(self, function, items):
        """[function(item) for item in items], many at a time"""
        try:
            return [*self.threads.imap(function, items)]
        except OSError as e:  # from a server, or from the disk that holds an image
            die(f"{e}. Nothing is lost: the same command goes on from here")

    def post(self, url, request):
        """-> (200, what ask returns), or (another status, the fault). Status 0: no usable answer"""
        data = json.dumps({**self.common, **request}).encode()
        try:
            try:
                response = urlopen(Request(url + self.path, data, self.headers), timeout=300)
            except HTTPError as e:
                response = e
            with response:
                status, body = response.status, response.read()
            if status != 200:
                return status, f"{status} {one_line(body.decode(errors='replace'))[:200]}"
            choice = json.loads(body)["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            return status, ((text or "") + "", choice.get("finish_reason") == "stop", None)
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as e:
            return 0, f"{type(e).__name__}: {e}"

    def ask(self, urls=None, **request):
        """-> (text, whether it ended by itself, None) or ("", False, why the server refuses the request)"""
        urls, failures, crashes, answered = urls or self.urls, 0, 0, self.answered
        for turn in itertools.count(next(self.turns)):
            first, now = turn % len(urls), time.monotonic()  # the next in turn; those that are down come last
            url = min(urls[first:] + urls[:first], key=lambda url: max(self.down.get(url, 0), now))
            if self.down.get(url):
                self.down[url] = now + 300  # this thread tries it again, the others do not wait for it too
            status, answer = self.post(url, request)
            self.down[url] = time.monotonic() + 60 if status == 0 else 0
            if status == 200:
                self.answered += 1
                if request != self.harmless:
                    self.refused = 0
                return answer
            crashes += status == 500
            if (status in (400, 413, 422) or crashes == 3) and request != self.harmless:
                self.ask([url], **self.harmless)  # ends the launch if even this is refused
                self.refused += 1
                if self.refused >= 100:
                    raise ConnectionError(f"--server {url} refuses every row: {answer}")
                return "", False, f"refused by the server: {answer}"
            failures += not (status in (429, 503) and self.answered > answered)
            answered = self.answered
            if failures > 6 + len(urls) or 400 <= status < 500 and status not in (408, 429):
                raise ConnectionError(f"--server {url}: {answer}")
            time.sleep(2 ** max(failures - len(urls), 0) / 4)

# === end of rows ============================================================================================


if __name__ == "__main__":
    main()
