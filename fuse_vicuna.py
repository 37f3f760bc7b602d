"""Fuse AltText and VeC into one caption with Vicuna: VeCLIP's VeCap (arXiv 2310.07699, section 3.3).

    python fuse_vicuna.py --input cc3m.vec.jsonl --output cc3m.fused.jsonl --model lmsys/vicuna-13b-v1.1
    torchrun --nproc_per_node 8 fuse_vicuna.py ...the same arguments...      # the ranks share the work
    python fuse_vicuna.py --input a.jsonl --output b.jsonl --model FOLDER --format pairs --limit 8     # a small model
    python fuse_vicuna.py ...the same arguments... --server http://node1:8000 http://node2:8000    # vLLM generates

Row in:  {"image": "photos/1.jpg", "alt": "IMG_0123 sale!!", "vec": "a red bicycle leaning on a wall"}
Row out: the same and "vecap": "..."; a list of AltTexts gives a list. A refusal is asked again with the VeC alone. An
AltText over --max-alt-tokens is cut, a VeC never. Where one of the two is missing, the other is rewritten alone.
The same command resumes after any interruption. Without --server, its output is then identical byte for byte.

Read chat_prompt, fuse and answer, then main. What follows main is the same in all three captioning scripts: rows, resuming,
servers.
"""
import argparse
import contextlib
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

# Vicuna 1.1's conversation (release) and the paper's instruction (section 3.3), for two texts and for one
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
          "and polite answers to the user's questions.")
INSTRUCTION = ("Rephrase the following two sentences into one short sentence while adhering to the provided instructions: Place "
               "attributes before noun entities without introducing new meaning. Do not start with \"The image\".")
ALONE = INSTRUCTION.replace("two sentences", "sentence")
SHOTS = 4  # pairs in the prompt of --format pairs
MAX_VEC_TOKENS = 256  # a longer VeC is not a caption, and is never cut: its result is null; our choice
PROMPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prompts")


# --- the prompts ------------------------------------------------------------------------------------------------------

def clean(text, markers=None):
    """The text as one line that cannot break a prompt: no separator of --format pairs, no role of the conversation."""
    text = re.sub(r"=>|(?<=\s)\+(?=\s)", " ", one_line(text, markers))
    return one_line(re.sub(r"\b(USER|ASSISTANT|SYSTEM)[\s:]*:", r"\1", text), markers)


def chat_prompt(alt, vec, instruction=INSTRUCTION):
    """Vicuna 1.1's conversation around the instruction. Either text may be "": the other is rewritten alone."""
    given = [text for text in (alt, vec) if text]
    texts = " ".join(f"{number}. {text}" for number, text in enumerate(given, 1))
    return f"{SYSTEM} USER: {instruction if len(given) == 2 else ALONE} {texts} ASSISTANT:"


def pairs_prompt(pairs, alt, vec):
    """The deviation for base models and small ones, which do not follow the instruction but continue a list."""
    return "Merge two texts about one image into one short caption.\n\n" + "".join(
        f"{pair['vec']} + {pair['alt']} => {pair['output']}\n" for pair in pairs) + " + ".join(filter(None, (vec, alt))) + " =>"


def unquote(text):
    """The text without the quotation marks around it, if there are no others."""
    return re.sub(r'^["\u201c]([^"\u201c\u201d]*)["\u201d]$', r"\1", text).strip()


def is_refusal(text, openings):
    return text.lower().replace("\u2019", "'").startswith(openings)


def fuse(ask, given, openings, notes):
    """Captions of [(AltText, VeC)], of which one may be "", or of a reason not to ask. -> [(caption or None, reason or None)]

    ask(such pairs) -> [(answer, reason or None)]. If the model refuses, the VeC alone is rewritten (section 3.3)."""
    results, todo = [(None, pair) for pair in given], {i: pair for i, pair in enumerate(given) if isinstance(pair, tuple)}
    notes.update(pair for pair in given if isinstance(pair, str))
    while todo:
        answers, again = ask([*todo.values()]), {}
        for (i, (alt, vec)), (text, reason) in zip(todo.items(), answers):
            text = unquote(one_line(text.strip().split("\n")[0]).rstrip("\ufffd "))
            if is_refusal(text, openings) and alt and vec:
                again[i] = "", vec
            else:
                reason = reason or ("refused" if is_refusal(text, openings) else None if text else "empty")
                results[i] = None if reason else text, reason
                notes[reason or ("fused" if alt and vec else "AltText alone" if alt else "VeC alone")] += 1
        notes.update(["refused, asked again with the VeC alone"] * len(again))
        todo = again
    return results


def source_list(row, args):
    """The list that the result follows: of AltTexts or, if there is none, of VeCs; None if there is none either"""
    return next((value for value in (row.get(args.alt_field), row.get(args.vec_field)) if value and isinstance(value, list)), None)


def read_texts(row, args, tokenizer, markers, notes):
    """For every AltText of a row: (AltText, VeC) to be asked, or the reason why not"""
    values = [row.get(args.alt_field), row.get(args.vec_field)]
    for i, _ in enumerate(as_list(source_list(row, args))):
        texts = [(value[i] if i < len(value) else None) if isinstance(value, list) else value for value in values]
        alt, vec = (clean(text, markers) if isinstance(text, str) else "" for text in texts)
        short = cut(tokenizer, alt, args.max_alt_tokens)
        notes.update(["AltText cut"] * (short != alt))
        yield (f"{args.vec_field} too long" if cut(tokenizer, vec, MAX_VEC_TOKENS) != vec else
               (short, vec) if short or vec else f"neither {args.alt_field} nor {args.vec_field}")


def cut(tokenizer, text, limit):
    """The text, or its first `limit` tokens. With --server the tokenizer is not here: a token is then four bytes."""
    if tokenizer is None:
        return text.encode()[:4 * limit].decode(errors="ignore").strip()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer.decode(ids[:limit]).rstrip("\ufffd").strip() if len(ids) > limit else text  # drops a character cut in half


# --- the model --------------------------------------------------------------------------------------------------------

def load_model(args, device):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = load(AutoTokenizer, args.model)
    model = load(AutoModelForCausalLM, args.model, dtype=DTYPES[args.dtype], device_map=device).eval()
    model.generation_config = GenerationConfig(  # greedy, whatever the folder says; what is padded is masked
        max_new_tokens=args.max_new_tokens, eos_token_id=end_tokens(model, tokenizer), pad_token_id=0,
        stop_strings=["\n"] if args.format == "pairs" else None)
    return model, tokenizer


@torch.inference_mode()
def answer(model, tokenizer, prompts, batch_size, notes):
    """Greedy answers, one line each. Prompts of similar length share a batch, and what all of it begin with is computed once."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    known, layers = inspect.signature(model.forward).parameters, DynamicCache(config=model.config.get_text_config()).layers
    cache_name = "cache" if "cache" in known else "past_key_values"  # before transformers 5.24
    can_share = "position_ids" in known and all(type(layer) is DynamicLayer for layer in layers)  # no window, no recurrence
    can_pad = all(isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") for layer in layers)  # no recurrence
    texts, ids = [None] * len(prompts), [tokenizer(prompt).input_ids for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    groups = [list(same) for _, same in itertools.groupby(order, lambda i: can_pad or len(ids[i]))]
    for batch in (batch for group in groups for batch in batched(group, batch_size)):
        rows, cache = [ids[i] for i in batch], DynamicCache(config=model.config.get_text_config())
        T, P = len(rows[-1]), 0
        if can_share and len(rows) > 1:  # the prefix is computed once; the padding goes behind it
            P = min(len(os.path.commonprefix(rows)), len(rows[0]) - 1)
        if P:
            model(input_ids=torch.tensor([rows[0][:P]], device=model.device), use_cache=True, logits_to_keep=1, **{cache_name: cache})
            if cache.get_seq_length() != P:
                die(f"--model: this version of transformers does not fill {cache_name}")
            cache.batch_repeat_interleave(len(rows))
        inputs = torch.tensor([row[:P] + [0] * (T - len(row)) + row[P:] for row in rows], device=model.device)  # [B, T]
        mask = torch.tensor([[1] * P + [0] * (T - len(row)) + [1] * (len(row) - P) for row in rows], device=model.device)
        new = model.generate(input_ids=inputs, attention_mask=mask, tokenizer=tokenizer, **{cache_name: cache} if P else {})[:, T:].tolist()
        until = [until_end(row, model.generation_config.eos_token_id) for row in new]
        for i, row, kept, text in zip(batch, new, until, tokenizer.batch_decode(until, skip_special_tokens=True)):
            cut_off = kept == row and not (model.generation_config.stop_strings and "\n" in text)
            notes.update(["cut off at --max-new-tokens"] * cut_off)
            texts[i] = text
    return [(text, None) for text in texts]


# --- the stage --------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = stage_parser(__doc__, model="lmsys/vicuna-13b-v1.1", batch_size=32, max_new_tokens=77)  # 77: assumed
    parser.add_argument("--alt-field", default="alt", help="AltText, a text or a list of them (default: %(default)s)")
    parser.add_argument("--vec-field", default="vec", help="the VeC, as caption_llava.py writes it (default: %(default)s)")
    parser.add_argument("--prompt", default=INSTRUCTION, help="the instruction before \"1. AltText 2. VeC\" (default: the paper's)")
    parser.add_argument("--max-alt-tokens", type=number(int, 0), default=128, help="AltText is cut there, VeC never (default: %(default)s)")
    parser.add_argument("--format", default="chat", choices=["chat", "pairs"],
                        help="chat: Vicuna 1.1's conversation; pairs: in-context pairs, a deviation for base models")
    parser.add_argument("--pairs", default=os.path.join(PROMPTS, "fuse_pairs.jsonl"), metavar="FILE",
                        help="JSONL of alt, vec and output, for --format pairs (default: data/prompts/fuse_pairs.jsonl)")
    args = parser.parse_args(argv)
    try:
        with open(args.pairs, encoding="utf-8-sig") as f:
            pairs = [{key: row[key] for key in ("alt", "vec", "output")} for row in map(json.loads, f)]
    except (OSError, ValueError, LookupError, TypeError) as e:
        die(f"--pairs {args.pairs}: expected JSONL of alt, vec and output ({type(e).__name__}: {e})")
    if len(pairs) < SHOTS:
        die(f"--pairs {args.pairs}: {len(pairs)} pairs, expected {SHOTS} or more")
    with open(os.path.join(PROMPTS, "refusals.txt"), encoding="utf-8-sig") as f:
        openings = tuple(filter(None, f.read().splitlines()))  # in lower case
    device = pick_device(args)
    settings = {name: getattr(args, name) for name in ("alt_field", "vec_field", "prompt", "max_alt_tokens", "format")}
    settings["prompts_sha256"] = hashlib.sha256(json.dumps([SYSTEM, ALONE, pairs_prompt(pairs, "", ""), openings]).encode()).hexdigest()
    units = Units(args, settings, reads=[args.alt_field, args.vec_field], makes=["vecap"])
    if units.finished():
        return print(f"{args.output} is finished")

    if args.server:
        tokenizer, how = None, {"temperature": 0, "top_p": 1, "seed": args.seed, "stop": ["\n"]}
        server = Server(args, units, "/v1/completions", prompt=chat_prompt("a photo of a dog", "a brown dog", args.prompt), **how)

        def ask_prompts(prompts):
            answers = server.map(lambda prompt: server.ask(prompt=prompt, **how), prompts)
            units.notes.update("cut off at --max-new-tokens" for text, ended, refusal in answers if not (ended or refusal or "\n" in text))
            return [(text, refusal) for text, _, refusal in answers]
    else:
        model, tokenizer = load_model(args, device)
        ask_prompts = lambda prompts: answer(model, tokenizer, prompts, args.batch_size, units.notes)
    markers = special_markers(tokenizer)
    for unit in units:
        rng = np.random.default_rng([args.seed, *(offset for offset, _ in unit.todo[:1])])
        drawn = [pairs[i] for i in rng.choice(len(pairs), SHOTS, replace=False)]
        ask = lambda given: ask_prompts([chat_prompt(alt, vec, args.prompt) if args.format == "chat" else
                                         pairs_prompt(drawn, alt, vec) for alt, vec in given])
        given = [[*read_texts(row, args, tokenizer, markers, units.notes)] for _, row in unit.todo]
        results = iter(fuse(ask, [pair for texts in given for pair in texts], openings, units.outcomes))
        for (_, row), texts in zip(unit.todo, given):
            put_texts(row, "vecap", source_list(row, args), [next(results) for _ in texts])
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
