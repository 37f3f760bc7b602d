"""Rewrite captions with LLaMA by in-context learning: LaCLIP's text augmentation (2305.20088).

Section 3.1: people, two chatbots and MSCOCO each give a set of pairs "caption => rewrite". A prompt
is a task line, three pairs of one set, and a new caption, whose line LLaMA ends. Each set makes one
rewrite of every caption, so that training can sample one of M + 1 = 5 texts of an image.

    python rewrite_llama.py --input cc3m.jsonl --output cc3m.rewritten.jsonl
    torchrun --nproc_per_node 8 rewrite_llama.py ...the same arguments...  # ranks share the work
    head -n 20 cc3m.jsonl > few.jsonl                                      # for a first look

Row in:  {"image": "photos/1.jpg", "alt": "red bike"}
Row out: the same and "rewrite_chatgpt": "...", ...; null where there is no answer, the reason in
"error". A list of captions gives lists. Every answer is kept, as in the release; to drop bad ones
there is data/filter_captions.py. The same command goes on after any interruption, with any number
of ranks. One deviation: captions of a unit (64 KiB of input) share three pairs; the release draws
them for every caption.
"""
import argparse
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

SOURCES = ["chatgpt", "bard", "coco", "human"]  # M = 4 rewrites a caption (paper, section 3.1)
TASK = "Rewrite each image caption in other words, keeping its meaning."  # ours, not the release's
PAIRS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data/prompts/meta_pairs.jsonl")
MAX_CAPTION_TOKENS = 256  # a longer text is cut; ours
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\ufeff\ud800-\udfff]")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# --- the paper's idea -----------------------------------------------------------------------------

def clean(text):
    """The text as one line that cannot break the prompt; "" for what is not a text."""
    text = text.replace("=>", " ") if isinstance(text, str) else ""
    return " ".join(CONTROLS.sub(" ", text).split())


def draw_prompt(examples, shots, rng):
    """The prompt up to the caption: the task and `shots` pairs of one source (section 3.1)."""
    prompt = TASK + "\n\n"
    for i in rng.choice(len(examples), shots, replace=False):
        pair = examples[i]
        if isinstance(pair, list):  # MSCOCO: captions of one image, two of them in random order
            pair = rng.choice(pair, 2, replace=False)
        prompt += f"{clean(pair[0])} => {clean(pair[1])}\n"
    return prompt


# --- the model ------------------------------------------------------------------------------------

def sample(logits, uniform, temperature, top_p, k):
    """Nucleus sampling: logits [B, V], uniform [B] in [0, 1) -> ids [B]. Temperature 0 is greedy.

    A row looks its own random number up in the distribution function of its nucleus, so that its
    token does not depend on other rows. Sorting k tokens is enough for nearly all nuclei."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits.float() / temperature).softmax(-1).topk(min(k, logits.shape[-1]))  # descending
    wide = p.sum(-1) < top_p
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the nucleus: the smallest set with top_p
    cdf = p.cumsum(-1)
    place = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1).minimum((p > 0).sum(-1) - 1)
    ids = ids.gather(1, place[:, None])[:, 0]
    if k < logits.shape[-1] and wide.any():  # not for these rows
        ids[wide] = sample(logits[wide], uniform[wide], temperature, top_p, logits.shape[-1])
    return ids


class Completer:
    """LLaMA: ends the lines of many captions behind one prompt."""

    def __init__(self, args, counts):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StaticCache
        from transformers.cache_utils import StaticLayer

        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        try:  # split_special_tokens: "</s>" in a caption is plain text
            self.tokenizer = AutoTokenizer.from_pretrained(
                args.model, split_special_tokens=True, padding_side="left")
            self.model = AutoModelForCausalLM.from_pretrained(
                args.model, dtype=DTYPES[args.dtype], device_map=args.device).eval()
        except Exception as e:  # transformers raises nearly everything for a folder without a model
            die(f"--model {args.model}: {e}")
        self.args, self.counts, self.shape = args, counts, None
        self.config = self.model.config.get_text_config()
        self.tensor = partial(torch.tensor, device=self.model.device)
        k = sys.maxsize if args.device == "cuda" else 1024  # a GPU sorts all sooner than it waits
        self.sample = partial(sample, temperature=args.temperature, top_p=args.top_p, k=k)
        named = [x.eos_token_id for x in (self.config, self.tokenizer, self.model.generation_config)]
        self.ends = {i for ids in named for i in (ids if isinstance(ids, list) else [ids])} - {None}
        pieces = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        self.stops = self.ends | {i for i, piece in enumerate(pieces) if "\n" in piece}
        self.model.generation_config = GenerationConfig(
            max_new_tokens=args.max_new_tokens, eos_token_id=[*self.stops], pad_token_id=min(self.ends))
        self.forward = self.model
        if args.device == "cuda" and args.compile == "on":  # or launching kernels takes most time
            self.forward = torch.compile(self.model, mode="reduce-overhead", dynamic=False)
        layers = StaticCache(config=self.config, max_cache_len=1).layers
        self.is_plain = (all(type(layer) is StaticLayer for layer in layers) and
                         "position_ids" in inspect.signature(self.model.forward).parameters)

    def complete(self, prompt, captions, rng):
        """-> [(what the model adds to `prompt` + caption + " =>" up to the end of the line, None)].
        A caption's random numbers are its own, so that no text depends on its neighbours."""
        encode = lambda text: self.tokenizer(text, add_special_tokens=False).input_ids
        n = len(encode("\n"))  # goes before a caption, or LLaMA's tokenizer puts a blank there
        texts = [encode(f"\n{caption}")[n:][:MAX_CAPTION_TOKENS] for caption in captions]
        texts = [text + encode(" =>") for text in texts]
        uniform = rng.random((len(texts), self.args.max_new_tokens), "f4")
        complete = self.by_slots if self.is_plain else self.by_generate
        new = complete(self.tokenizer(prompt).input_ids, texts, uniform) if texts else []
        self.counts["cut at --max-new-tokens"] += sum(map(self.stops.isdisjoint, new))
        new = [[token for token in ids if token not in self.ends] for ids in new]
        return [(self.tokenizer.decode(ids, skip_special_tokens=True), None) for ids in new]

    @torch.inference_mode()
    def by_slots(self, prompt, texts, uniform):
        """The ids that follow the prompt's and a text's ids until the line ends, for all texts.

        A step feeds one token to each of B slots: the next one of the slot's text, or the one drawn
        last. When its line ends, a slot takes the next text. So nobody waits, and all steps have
        one shape. The cache is a ring of W places behind the prompt: all slots write at the same
        place, and a slot's mask shows the prompt and the places of its own text. A text has at most
        W tokens, so no place that its slot needs is overwritten; what earlier texts left is masked;
        and positions are given, so that the order of the ring means nothing."""
        B, P, N = min(self.args.batch_size, len(texts)), len(prompt), uniform.shape[1]
        W = max(map(len, texts)) + N
        cache, mask = self.slots_with(prompt, B, W)
        hidden = torch.finfo(mask.dtype).min
        waiting = iter(sorted(range(len(texts)), key=lambda i: -len(texts[i])))
        slots = [next(waiting) for _ in range(B)]  # the number of each slot's text; None: no more
        lines, fed, step = [list(text) for text in texts], [0] * B, 0
        while any(i is not None for i in slots):
            if step and step % W == 0:
                cache.crop(-W)  # the ring begins again
            mask[..., P + step % W] = 0
            ids = [0 if i is None else lines[i][n] for i, n in zip(slots, fed)]
            positions = self.tensor(fed)[:, None] + P
            logits = self.forward(self.tensor(ids)[:, None], attention_mask=mask, cache=cache,
                                  position_ids=positions, logits_to_keep=1).logits[:, -1]  # [B, V]
            step, fed = step + 1, [n + (i is not None) for i, n in zip(slots, fed)]
            drawing = [b for b, i in enumerate(slots) if i is not None and fed[b] == len(lines[i])]
            drawn = [fed[b] - len(texts[slots[b]]) for b in drawing]  # how many tokens so far
            u = self.tensor(uniform[[slots[b] for b in drawing], drawn])
            new = self.sample(logits[drawing], u).tolist() if drawing else []
            for b, n, token in zip(drawing, drawn, new):
                lines[slots[b]].append(token)
                if token in self.stops or n + 1 == N:  # the line has ended
                    slots[b], fed[b] = next(waiting, None), 0
                    mask[b, ..., P:] = hidden
        return [line[len(text):] for line, text in zip(lines, texts)]

    def slots_with(self, prompt, B, W):
        """-> a cache of B slots with the prompt in each and W places behind it, and their mask"""
        from transformers import DynamicCache, StaticCache

        P, one = len(prompt), DynamicCache(config=self.config)
        self.model(self.tensor([prompt]), cache=one, logits_to_keep=1)
        shape = B, 1, 1, -(-(P + W) // 64) * 64  # rounded up, so that a GPU captures few shapes
        mask = torch.full(shape, torch.finfo(self.model.dtype).min).to(one.layers[0].keys)
        mask[..., :P] = 0
        if shape != self.shape:
            self.shape, self.cache = shape, StaticCache(config=self.config, max_cache_len=shape[3])
        for slots, layer in zip(self.cache.layers, one.layers):
            keys, values = (x.expand(B, -1, -1, -1) for x in (layer.keys, layer.values))
            if not slots.is_initialized:
                slots.lazy_initialization(keys, values)
            slots.keys[:, :, :P], slots.values[:, :, :P] = keys, values
            slots.cumulative_length.fill_(P)
        return self.cache, mask

    def by_generate(self, prompt, texts, uniform):
        """The same by `generate`, for models whose cache has windows or states."""
        new = []
        for at in range(0, len(texts), self.args.batch_size):
            rows = [prompt + text for text in texts[at:at + self.args.batch_size]]
            T = max(map(len, rows))
            ids = self.tensor([[0] * (T - len(row)) + row for row in rows])  # padded on the left
            mask = self.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])

            def draw(ids, logits):  # generate takes the likeliest token: make it the one we draw
                u = self.tensor(uniform[at:at + len(rows), ids.shape[1] - T])
                ids = self.sample(logits, u)[:, None]
                return torch.full_like(logits, -torch.inf).scatter(1, ids, 0)

            ids = self.model.generate(ids, attention_mask=mask, logits_processor=[draw])
            new += ids[:, T:].tolist()
        return new


# --- the stage ------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_arguments(argv)
    examples = load_pairs(args.pairs, args.sources, args.shots)
    parts = Parts(args, json.dumps([TASK, examples]), reads={args.field},
                  makes={f"rewrite_{source}" for source in args.sources})
    if parts.join():
        return print(f"{args.output} is finished")
    if args.server:
        from data.server import Server
    complete = (Server if args.server else Completer)(args, parts.counts).complete
    as_list = lambda value: value if isinstance(value, list) else [value]
    for number, rows in parts.to_make():
        captions = [clean(text) for row in rows for text in as_list(row.get(args.field))]
        for source in args.sources:
            rng = np.random.default_rng([args.seed, number, *source.encode()])
            prompt = draw_prompt(examples[source], args.shots, rng)
            answers = iter(complete(prompt, list(filter(None, captions)), rng))
            for row in rows:
                value = row.get(args.field)
                parts.put(row, f"rewrite_{source}", value, [
                    answer_line(*next(answers)) if clean(text) else (None, "no text")
                    for text in as_list(value)])
    parts.join()


def load_pairs(path, sources, shots):
    """{source: [(text, rewrite), ...]}; MSCOCO's entries are lists of captions of one image."""
    examples = {source: [] for source in sources}
    with open(path, encoding="utf-8-sig") as f:
        for entry in map(json.loads, f):
            pair = entry.get("captions") or (entry["input"], entry["output"])
            examples.get(entry["source"], []).append(pair)
    for source in sources:
        if len(examples[source]) < max(shots, 1):
            die(f"--pairs {path} has {len(examples[source])} pairs of {source}, --shots is {shots}")
    return examples


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--input", required=True, help="JSONL, one row an image (data/README.md)")
    add("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    add("--model", default="huggyllama/llama-7b", help="folder or hub name (default: %(default)s)")
    add("--field", default="alt", help="field to rewrite, a text or a list (default: %(default)s)")
    add("--sources", nargs="+", default=SOURCES, help="sets of pairs; each makes rewrite_SOURCE")
    add("--pairs", default=PAIRS, help="JSONL of pairs (default: data/prompts/meta_pairs.jsonl)")
    add("--shots", type=int, default=3, help="pairs in the prompt (default: %(default)s, paper)")
    add("--temperature", type=float, default=0.9, help="0: greedy (default: %(default)s, release)")
    add("--top-p", type=float, default=0.95, help="1: off (default: %(default)s, release)")
    add("--max-new-tokens", type=int, default=77, help="default: %(default)s, release")
    add("--seed", type=int, default=0, help="of all random draws (default: %(default)s)")
    add("--batch-size", type=int, default=256, help="captions at a time (default: %(default)s); "
        "LLaMA-7B needs 13 GB, and 0.5 MB for each caption and token of its prompt and line")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: bf16 if it is native")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--compile", default="on", choices=["on", "off"], help="capture the steps on a GPU")
    add("--server", nargs="+", metavar="URL", help="ask OpenAI-compatible servers (data/server.py)")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.max_new_tokens, args.shots + 1) < 1 or args.temperature < 0:
        die("--batch-size and --max-new-tokens begin at 1, --shots and --temperature at 0")
    for path in (args.input, args.pairs):
        if not os.path.isfile(path):
            die(f"{path}: no such file")
    if args.dtype == "auto":
        args.dtype = "bf16" if has_bf16(args.device) else "fp32"
    return args


# === from here on the same lines in the three captioning scripts: answers, rows, restart ==========

def die(message):
    tqdm.write("error: " + " ".join(message.split())[:600], file=sys.stderr)
    sys.exit(2)


def has_bf16(device):
    """Whether the hardware computes in bf16. A CPU that emulates it is many times slower."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.13 cannot tell
    return any(map(cpu.get, ["avx512_bf16", "amx_bf16", "bf16"]))


def answer_line(answer, reason=None):
    """The caption in a model's answer -> (caption, None), or (None, why there is none). A thought,
    an introduction that ends in a colon, and quotation marks around the caption are cut off."""
    if answer is None:
        return None, reason
    answer = answer.rpartition("</think>")[2]
    lines = [line.split() for line in answer.splitlines() if any(map(str.isalnum, line))]
    if lines and lines[0][-1].rstrip("*_").endswith((":", "\uff1a")):
        del lines[0]
    if "<think>" in answer or not lines:
        return None, "a thought without end" if "<think>" in answer else "empty"
    line = " ".join(lines[0]).strip("\ufffd ")  # half a character, where the answer was cut
    return re.sub("^[\"'“„«]([^\"“”„«»]+)[\"'”“»]$", r"\1", line), None


def parse_row(line):
    """The line's JSON object; of any other line, a row that keeps it and says why."""
    try:
        row, reason = json.loads(line), "not a JSON object"
    except (ValueError, RecursionError) as e:
        row, reason = None, f"not JSON: {e}"
    line = line.decode(errors="backslashreplace").rstrip("\r\n")
    return row if isinstance(row, dict) else {"error": {"line": reason}, "line": line}


class Parts:
    """Restart. The input is cut into units of whole lines; what is made of a unit is one file, its
    part. A part's name is a hash of everything that its bytes depend on, and the part gets the name
    when it is complete. So a part that exists is right, whoever made it and whatever was killed;
    one that is missing is made; when none is missing, they are joined. Nothing else is kept."""

    def __init__(self, args, prompts, reads, makes):
        """The first rows must have a field of `reads` and none of `makes`."""
        self.input, self.output, self.folder = args.input, args.output, args.output + ".parts"
        self.settings = {name: value for name, value in vars(args).items() if name not in (
            "input", "output", "pairs", "workers", "server", "batch_size")}  # they change no text
        self.settings |= {"server": bool(args.server), "prompts": prompts,
                          "script": Path(__file__).read_text(encoding="utf-8")}
        self.counts, self.paths, content = Counter(), [], hashlib.sha256()
        for path, lines in self.units():
            if not self.paths:
                fields = {name for row in map(parse_row, lines) for name in row if row[name]}
                if not fields & reads or fields & makes:
                    die(f"{args.input}: expected JSONL, one object a line, with {reads}, without "
                        f"{makes}; the first rows have {sorted(fields - {'error', 'line'})}")
            self.paths.append(path)
            content.update(b"".join(lines))
        self.made = {**self.settings, "input": content.hexdigest()}

    def units(self):
        """Yield (path of its part, its lines) for every unit of the input."""
        size = 1 << max(16, os.path.getsize(self.input).bit_length() - 16)  # at most 65,536 units
        with open(self.input, "rb") as f:
            while lines := f.readlines(size):
                name = hashlib.sha256(repr((self.settings, f.tell(), lines)).encode()).hexdigest()
                yield os.path.join(self.folder, name), lines

    def to_make(self):
        """Yield (number, rows) of this rank's missing parts, and write the rows that come back."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        progress = tqdm(self.units(), total=len(self.paths), unit="unit", disable=rank > 0)
        for number, (path, lines) in enumerate(progress):
            if number % world == rank and not os.path.exists(path):
                rows = [parse_row(line) for line in lines]
                yield number, [row for row in rows if row.keys() != {"error", "line"}]
                self.write(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def put(self, row, field, value, results):
        """Write [(text, None) or (None, reason)], made from `value`: a list's into a list."""
        self.counts.update(reason or f"texts in {field}" for _, reason in results)
        texts, reasons = [text for text, _ in results], [reason for _, reason in results]
        row[field] = texts if isinstance(value, list) else texts[0]
        if any(reasons):
            error = row.get("error") or {}
            error = error if isinstance(error, dict) else {"row": error}  # the user's own
            row["error"] = error | {field: reasons if isinstance(value, list) else reasons[0]}

    def write(self, path, lines):
        """Write a file whole or not at all: under another name, synced, then renamed."""
        os.makedirs(self.folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            file = os.path.join(folder, "part")
            with open(file, "w", encoding="utf-8", errors="backslashreplace") as f:
                f.writelines(lines)
                f.flush()
                os.fsync(f.fileno())
            os.replace(file, path)

    def join(self):
        """Join the parts to OUT if none is missing -> whether OUT is there."""
        print("".join(f"{count:9,d}  {what}\n" for what, count in self.counts.items()), end="")
        missing = sum(not os.path.exists(path) for path in self.paths)
        if not missing and not os.path.exists(self.output):
            with suppress(FileNotFoundError):  # another rank was faster
                self.write(self.output + ".settings.json", [json.dumps(self.made)])
                self.write(self.output, (line for path in self.paths for line in open(path)))
        if not os.path.exists(self.output):
            return print(f"{missing} of {len(self.paths)} units are missing")
        then = json.loads(Path(self.output + ".settings.json").read_text())
        if other := [name for name in self.made if self.made[name] != then.get(name)]:
            die(f"{self.output} was made with other {', '.join(other)}: choose a new --output")
        shutil.rmtree(self.folder, ignore_errors=True)
        return True


if __name__ == "__main__":
    main()
