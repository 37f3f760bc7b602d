"""Fuse AltText and VeC into one caption with Vicuna: VeCLIP's VeCap (arXiv 2310.07699, section 3.3).

    python fuse_vicuna.py --input cc3m.vec.jsonl --output cc3m.fused.jsonl --model lmsys/vicuna-13b-v1.1
    torchrun --nproc_per_node 8 fuse_vicuna.py ...the same arguments...      # the ranks share the work
    python fuse_vicuna.py --input a.jsonl --output b.jsonl --model FOLDER --format pairs  # small model
    python fuse_vicuna.py ...the same arguments... --server http://node1:8000 http://node2:8000  # vLLM writes

Row in:  {"image": "photos/1.jpg", "alt": "IMG_0123 sale!!", "vec": "a red bicycle leaning on a wall"}
Row out: the same and "vecap": "..."; a list of AltTexts gives a list. A refusal is asked again with the VeC
alone. An AltText over --max-alt-tokens is cut, a VeC never. If one is missing, the other is rewritten alone.
The same command resumes after any interruption; without --server, its output is then identical byte for byte.

Read chat_prompt, fuse and answer, then main. What follows main is the same in all three captioning scripts:
rows, resuming, servers.
"""
import argparse
import contextlib
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

# Vicuna 1.1's conversation (release) and the paper's instruction (section 3.3), for two texts and for one
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
          "helpful, detailed, and polite answers to the user's questions.")
INSTRUCTION = ("Rephrase the following two sentences into one short sentence while adhering to the provided "
               "instructions: Place attributes before noun entities without introducing new meaning. Do not "
               "start with \"The image\".")
ALONE = INSTRUCTION.replace("two sentences", "sentence")
SHOTS = 4  # pairs in the prompt of --format pairs
MAX_VEC_TOKENS = 256  # a longer VeC is not a caption, and is never cut: its result is null; our choice
PROMPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prompts")


# --- the prompts, and what follows a refusal --------------------------------------------------------------

def chat_prompt(alt, vec, instruction=INSTRUCTION):
    """Vicuna 1.1's conversation around the instruction. Either text may be "": then it has one."""
    texts = [text for text in (alt, vec) if text]
    numbered = " ".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    return f"{SYSTEM} USER: {instruction if len(texts) == 2 else ALONE} {numbered} ASSISTANT:"


def pairs_prompt(pairs, alt, vec):
    """The deviation for base models and small ones, which follow no instruction but continue a list."""
    lines = "".join(f"{pair['vec']} + {pair['alt']} => {pair['output']}\n" for pair in pairs)
    texts = " + ".join(text for text in (vec, alt) if text)
    return f"Merge two texts about one image into one short caption.\n\n{lines}{texts} =>"


def is_refusal(text, openings):
    return text.lower().replace("\u2019", "'").startswith(openings)


def unquote(text):
    """The text without the quotation marks around it, if there are no others."""
    return re.sub(r'^["\u201c]([^"\u201c\u201d]*)["\u201d]$', r"\1", text).strip()


def fuse(ask, inputs, openings, outcomes, notes):
    """Captions of [(AltText, VeC) or a reason not to ask]. -> [(caption or None, reason or None)]

    ask([(AltText, VeC), ...]) -> [(answer, reason or None)]; either text may be "". If the model refuses, the
    VeC alone is rewritten (section 3.3)."""
    results = [(None, pair if isinstance(pair, str) else None) for pair in inputs]
    todo = {i: pair for i, pair in enumerate(inputs) if not isinstance(pair, str)}
    outcomes.update(pair for pair in inputs if isinstance(pair, str))
    while todo:
        again = {}
        for (i, (alt, vec)), (text, reason) in zip(todo.items(), ask([*todo.values()])):
            text = unquote(first_line(text))
            refused = is_refusal(text, openings)
            if refused and alt and vec:
                again[i] = "", vec
                notes["refused, asked again with the VeC alone"] += 1
            else:
                reason = reason or ("refused" if refused else None if text else "empty")
                results[i] = None if reason else text, reason
                outcomes[reason or ("fused" if alt and vec else "AltText alone" if alt else "VeC alone")] += 1
        todo = again
    return results


# --- the texts of a row -----------------------------------------------------------------------------------

def clean(text, markers=None):
    """The text as one line without separators of --format pairs and roles of the conversation."""
    cleaned = re.sub(r"=>|(?<=\s)\+(?=\s)", " ", one_line(text, markers))
    cleaned = one_line(re.sub(r"\b(USER|ASSISTANT|SYSTEM)[\s:]*:", r"\1", cleaned), markers)
    return cleaned if cleaned == text else clean(cleaned, markers)  # what was cut may join to a role


def source_list(row, args):
    """The list that the result follows: of AltTexts, or else of VeCs; None if neither is a list."""
    values = row.get(args.alt_field), row.get(args.vec_field)
    return next((value for value in values if value and isinstance(value, list)), None)


def read_texts(row, args, tokenizer, markers, notes):
    """For every AltText of a row: (AltText, VeC), or the reason not to ask"""
    values = [row.get(args.alt_field), row.get(args.vec_field)]
    for i, _ in enumerate(as_list(source_list(row, args))):
        texts = [value[i:i + 1] if isinstance(value, list) else [value] for value in values]
        alt, vec = (clean(text[0], markers) if text and isinstance(text[0], str) else "" for text in texts)
        short = cut(tokenizer, alt, args.max_alt_tokens)
        notes.update(["AltText cut"] * (short != alt))
        if cut(tokenizer, vec, MAX_VEC_TOKENS) != vec:
            yield f"{args.vec_field} too long"
        else:
            yield (short, vec) if short or vec else f"neither {args.alt_field} nor {args.vec_field}"


def cut(tokenizer, text, limit):
    """The text, or its first `limit` tokens. A server's tokenizer is not here: a token is then four bytes."""
    if tokenizer is None:
        return text.encode()[:4 * limit].decode(errors="ignore").strip()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return text if len(ids) <= limit else tokenizer.decode(ids[:limit]).rstrip("\ufffd").strip()


def load_pairs(path):
    try:
        with open(path, encoding="utf-8-sig") as f:
            pairs = [{key: row[key] for key in ("alt", "vec", "output")} for row in map(json.loads, f)]
    except (OSError, ValueError, LookupError, TypeError) as e:
        die(f"--pairs {path}: expected JSONL of alt, vec and output ({type(e).__name__}: {e})")
    if len(pairs) < SHOTS:
        die(f"--pairs {path}: {len(pairs)} pairs, expected {SHOTS} or more")
    return pairs


# --- the model --------------------------------------------------------------------------------------------

def load_model(args, device):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = load(AutoTokenizer, args.model)
    model = load(AutoModelForCausalLM, args.model, dtype=DTYPES[args.dtype], device_map=device).eval()
    ends = end_tokens(model, tokenizer)
    model.generation_config = GenerationConfig(  # greedy, whatever the folder says
        max_new_tokens=args.max_new_tokens, eos_token_id=ends, pad_token_id=max(ends, default=0),
        stop_strings=["\n"] if args.format == "pairs" else None)
    return model, tokenizer


@torch.inference_mode()
def answer(model, tokenizer, prompts, batch_size, notes):
    """Greedy answers to the prompts -> [(answer, None)]. A batch has prompts of similar length; the beginning
    that all share is computed once. Recurrent layers would read padding: their batches have one length."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    new_cache = partial(DynamicCache, config=model.config.get_text_config())
    layers, known = new_cache().layers, inspect.signature(model.forward).parameters
    cache_name = "cache" if "cache" in known else "past_key_values"  # before transformers 5.24
    can_pad = all(isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") for layer in layers)
    can_share = "position_ids" in known and all(type(layer) is DynamicLayer for layer in layers)  # no window
    tensor, how = partial(torch.tensor, device=model.device), model.generation_config
    answers, ids = [None] * len(prompts), [tokenizer(prompt).input_ids for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    groups = [[*group] for _, group in itertools.groupby(order, lambda i: 0 if can_pad else len(ids[i]))]
    for batch in itertools.chain(*(batched(group, batch_size) for group in groups)):
        rows, past = [ids[i] for i in batch], {}
        P = min(len(os.path.commonprefix(rows)), len(rows[0]) - 1) if can_share and len(rows) > 1 else 0
        if P:
            past[cache_name] = cache = new_cache()
            model(input_ids=tensor([rows[0][:P]]), use_cache=True, logits_to_keep=1, **past)
            if cache.get_seq_length() != P:  # an unknown argument is ignored silently
                die(f"--model: this version of transformers does not fill {cache_name}")
            cache.batch_repeat_interleave(len(rows))
        T = len(rows[-1])
        inputs = tensor([row[:P] + [0] * (T - len(row)) + row[P:] for row in rows])  # [B, T], padded after P
        mask = tensor([[1] * P + [0] * (T - len(row)) + [1] * (len(row) - P) for row in rows])
        new = model.generate(inputs, attention_mask=mask, tokenizer=tokenizer, **past)[:, T:].tolist()
        kept = [[token for token in row if token not in how.eos_token_id] for row in new]
        texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
        for i, row, rest, text in zip(batch, new, kept, texts):
            answers[i] = text, None
            if rest == row and not (how.stop_strings and "\n" in text):
                notes["cut off at --max-new-tokens"] += 1
    return answers


# --- the stage --------------------------------------------------------------------------------------------

def main(argv=None):
    parser = stage_parser(__doc__, "lmsys/vicuna-13b-v1.1", batch_size=32, max_new_tokens=77)  # 77: assumed
    add = parser.add_argument
    add("--alt-field", default="alt", help="AltText, a text or a list of them (default: %(default)s)")
    add("--vec-field", default="vec", help="the VeC, as caption_llava.py writes it (default: %(default)s)")
    add("--prompt", default=INSTRUCTION, help="the instruction before both texts (default: the paper's)")
    add("--max-alt-tokens", type=number(int, 0), default=128, help="AltText is cut there (default: 128)")
    add("--format", default="chat", choices=["chat", "pairs"],
        help="chat: Vicuna 1.1's conversation; pairs: in-context pairs, a deviation for base models")
    add("--pairs", default=os.path.join(PROMPTS, "fuse_pairs.jsonl"), metavar="FILE",
        help="JSONL of alt, vec and output, for --format pairs (default: data/prompts/fuse_pairs.jsonl)")
    args = parser.parse_args(argv)
    pairs = load_pairs(args.pairs) if args.format == "pairs" else []
    with open(os.path.join(PROMPTS, "refusals.txt"), encoding="utf-8-sig") as f:
        openings = tuple(filter(None, f.read().splitlines()))  # in lower case
    device = pick_device(args)
    texts = json.dumps([SYSTEM, ALONE, pairs_prompt(pairs, "", ""), openings])
    settings = {"prompts_sha256": hashlib.sha256(texts.encode()).hexdigest()}
    units = Units(args, settings, reads=[args.alt_field, args.vec_field], makes=["vecap"])
    if units.finished():
        return print(f"{args.output} is finished")

    if args.server:
        tokenizer, markers = None, SERVER_MARKERS
        how = {"temperature": 0, "top_p": 1, "seed": args.seed, "stop": ["\n"]}
        prompt = chat_prompt("a photo of a dog", "a brown dog", args.prompt)
        server = Server(args, units, "/v1/completions", prompt=prompt, **how)

        def complete(prompts):
            answers = server.map(lambda prompt: server.ask(prompt=prompt, **how), prompts)
            units.notes.update("cut off at --max-new-tokens" for text, ended, refusal in answers
                               if not (ended or refusal or "\n" in text))
            return [(text, refusal) for text, _, refusal in answers]
    else:
        model, tokenizer = load_model(args, device)
        markers = special_markers(tokenizer)
        complete = lambda prompts: answer(model, tokenizer, prompts, args.batch_size, units.notes)

    for unit in units:
        rng = np.random.default_rng([args.seed, *(offset for offset, _ in unit.todo[:1])])
        shots = [pairs[i] for i in rng.choice(len(pairs), SHOTS, replace=False)] if pairs else []
        ask = lambda texts: complete([chat_prompt(*pair, args.prompt) if args.format == "chat" else
                                      pairs_prompt(shots, *pair) for pair in texts])
        inputs = [[*read_texts(row, args, tokenizer, markers, units.notes)] for _, row in unit.todo]
        results = iter(fuse(ask, [*itertools.chain(*inputs)], openings, units.outcomes, units.notes))
        for (_, row), texts in zip(unit.todo, inputs):
            put_texts(row, "vecap", source_list(row, args), [next(results) for _ in texts])
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
