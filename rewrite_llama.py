"""Rewrite captions with LLaMA by in-context learning: LaCLIP's text augmentation (2305.20088).

Section 3.1: people, two chatbots and MSCOCO each give a set of pairs "caption => rewrite". A prompt
is a task line, three pairs of one set, and "red bike =>": LLaMA ends the line. Each set makes one
rewrite of every caption, so that training can sample one of M + 1 = 5 texts of an image.

    python rewrite_llama.py --input cc3m.jsonl --output cc3m.rewritten.jsonl
    torchrun --nproc_per_node 8 rewrite_llama.py ...the same arguments...  # ranks share the work

Row in:  {"image": "photos/1.jpg", "alt": "red bike"}, or a list of captions
Row out: the same and "rewrite_chatgpt": "...", ...; null where "error" says why. Answers are
kept as in the release, but one that ends in ":". The same command resumes after any kill.
"""
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

SOURCES = ["chatgpt", "bard", "coco", "human"]  # M = 4 rewrites a caption (paper, section 3.1)
TASK = "Rewrite each image caption in other words, keeping its meaning."  # ours, not the release's
MAX_CAPTION_TOKENS = 256  # a longer text is cut; ours
DEVICES = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.mps.is_available() + ["cpu"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BREAKS = re.compile("=>|[\0-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\ufeff\ud800-\udfff]")


def clean(text):
    """The text as one line that cannot break the prompt; "" for what is not a text."""
    return " ".join(BREAKS.sub(" ", text).split()) if isinstance(text, str) else ""


def draw_prompt(examples, shots, rng):
    """The prompt up to the caption: the task and `shots` pairs of one source (section 3.1)."""
    prompt = TASK + "\n\n"
    for i in rng.choice(len(examples), shots, replace=False):
        pair = examples[i].get("captions") or [examples[i]["input"], examples[i]["output"]]
        if "captions" in examples[i]:  # MSCOCO: two captions of one image, in random order
            pair = rng.choice(pair, 2, replace=False)
        prompt += f"{clean(pair[0])} => {clean(pair[1])}\n"
    return prompt


def main(argv=None):
    args = parse_arguments(argv)
    pairs = [parse_row(line) for line in open(args.pairs, "rb")]
    examples = {name: [p for p in pairs if p.get("source") == name] for name in args.sources}
    broken = any("captions" not in p and {"input", "output"} - p.keys() for p in pairs)
    if broken or not 0 <= args.shots <= min(map(len, examples.values())):
        die(f"--pairs {args.pairs}: expected JSON, --shots {args.shots} pairs of {args.sources}")
    if args.temperature < 0 or args.top_p <= 0:
        die("--temperature below 0, or --top-p not above 0")
    parts = Parts(args, [TASK, examples], reads={args.field},
                  makes={f"rewrite_{source}" for source in args.sources})
    if parts.join():
        return print(f"{args.output} is finished")
    if args.server:
        from data.server import Server
    complete = (Server if args.server else Completer)(args, parts.counts).complete
    as_list = lambda value: value if isinstance(value, list) else [value]
    for number, rows in parts.to_make():
        texts = [[clean(text) for text in as_list(row.get(args.field))] for row in rows]
        captions = np.array([text for own in texts for text in own], object)
        asked = captions != ""
        for source in args.sources:
            rng = np.random.default_rng([args.seed, number, *source.encode()])
            prompt = draw_prompt(examples[source], args.shots, rng)  # release: one for each caption
            uniform = rng.random((len(captions), args.max_new_tokens), "f4")  # a token's own number
            answers = iter(complete(prompt, captions[asked].tolist(), uniform[asked]))
            for row, own in zip(rows, texts):
                parts.put(row, f"rewrite_{source}", row.get(args.field), [
                    answer_line(*next(answers)) if text else (None, "no text") for text in own])
    parts.join()


def sample(logits, uniform, temperature, top_p):
    """Nucleus sampling: logits [B, V], uniform [B] in [0, 1) -> ids [B]; temperature 0 is greedy.
    A row's own random number chooses in its own nucleus: rows do not depend on each other."""
    if temperature == 0:
        return logits.argmax(-1)
    p, V = (logits.float() / temperature).softmax(-1), logits.shape[-1]
    k = V if logits.is_cuda else min(1024, V)  # a GPU sorts all of them sooner than it waits
    while k < V and (p.topk(k)[0].sum(-1) < top_p).any():  # a nucleus has more than k tokens
        k = min(8 * k, V)
    p, ids = p.topk(k)  # descending
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the smallest set that reaches top_p
    cdf = p.cumsum(-1)
    place = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1).minimum((p > 0).sum(-1) - 1)
    return ids.gather(1, place[:, None])[:, 0]


class Slots(StaticLayer):
    """Keys and values of B texts, [B, heads, L, d]. A step's go to `place` [B], each text's own."""
    def update(self, keys, values, *_, **__):
        at = self.place[:, None, None, None]
        return (self.keys.scatter_(2, at.expand_as(keys), keys),
                self.values.scatter_(2, at.expand_as(values), values))


class Completer:
    """LLaMA: ends the lines of many captions behind one prompt."""
    def __init__(self, args, counts):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        try:  # split_special_tokens: "</s>" in a caption is plain text
            self.tokenizer = AutoTokenizer.from_pretrained(args.model, split_special_tokens=True)
            self.model = AutoModelForCausalLM.from_pretrained(
                args.model, dtype=DTYPES[args.dtype], device_map=args.device).eval()
        except Exception as e:  # transformers raises nearly everything for a folder without a model
            die(f"--model {args.model}: {e}".replace("tiktoken", "sentencepiece"))  # what it lacks
        self.args, self.counts, self.shape = args, counts, None
        config, how = self.model.config.get_text_config(), self.model.generation_config
        named = [x.eos_token_id for x in (config, how, self.tokenizer)]
        self.ends = {i for ids in named for i in (ids if isinstance(ids, list) else [ids])} - {None}
        pieces = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        self.stops = self.ends | {i for i, piece in enumerate(pieces) if "\n" in piece}
        self.forward = self.model if args.device != "cuda" else torch.compile(  # captured, or
            self.model, mode="reduce-overhead", dynamic=False)  # launching kernels takes most time
        self.model.generation_config = GenerationConfig(  # by_generate's, whatever the folder says
            max_new_tokens=args.max_new_tokens, do_sample=args.temperature > 0, top_p=args.top_p,
            temperature=args.temperature or None, top_k=0, eos_token_id=[*self.stops])
        layers = DynamicCache(config=config).layers  # by_slots needs keys and values, and masks
        plain = {type(x).__name__ for x in layers} <= {"DynamicLayer", "DynamicSlidingWindowLayer"}
        able = self.model._can_compile_fullgraph and config.model_type not in ("bloom", "falcon")
        window = min(getattr(layer, "sliding_window", sys.maxsize) for layer in layers)
        text = MAX_CAPTION_TOKENS + len(self.tokenizer(" =>").input_ids) + args.max_new_tokens
        self.longest_prompt = window - text if plain and able else 0  # that by_slots takes; 0: none

    def complete(self, prompt, captions, uniform):
        """-> [(what follows `prompt` + caption + " =>" up to the end of its line, None)]"""
        encode = lambda text: self.tokenizer(text, add_special_tokens=False).input_ids
        n = len(encode("\n"))  # a caption follows "\n": alone, LLaMA's tokenizer adds a blank
        texts = [encode(f"\n{text}")[n:][:MAX_CAPTION_TOKENS] + encode(" =>") for text in captions]
        prompt = self.tokenizer(prompt).input_ids
        new = self.by_slots(prompt, texts, uniform) if len(prompt) <= self.longest_prompt else [
            self.by_generate(prompt + text, u) for text, u in zip(texts, uniform)]
        self.counts["cut at --max-new-tokens"] += sum(map(self.stops.isdisjoint, new))
        new = [[token for token in ids if token not in self.ends] for ids in new]
        return [(self.tokenizer.decode(ids, skip_special_tokens=True), None) for ids in new]

    @torch.inference_mode()
    def by_slots(self, prompt, texts, uniform):
        """The ids that follow the prompt and each text until its line ends. A step feeds every slot
        one token: its text's next, or the one drawn last. A slot whose line has ended takes the
        next text; the mask hides its old keys. So all steps have one shape."""
        idle, P, W = len(texts), len(prompt), max(map(len, texts), default=0) + uniform.shape[1]
        B = min(self.args.batch_size, 1 << (idle - 1).bit_length())  # a power of 2: few shapes
        waiting = iter(sorted(range(idle), key=lambda i: -len(texts[i])))
        slots, fed = [next(waiting, idle) for _ in range(B)], [0] * B
        lines = [list(text) for text in texts] + [[0] * (W + 1)]  # the last: of idle slots
        tensor = lambda values: torch.tensor(values, device=self.model.device)
        first = self.model(tensor([prompt]), use_cache=True, logits_to_keep=1).cache
        if self.shape != (shape := (B, -(-(P + W) // 64) * 64)):
            self.shape, self.place, self.places = shape, tensor(fed), tensor(range(shape[1]))
            self.cache = Cache([Slots(shape[1]) for _ in first.layers])
        self.cache.reset()
        for layer, one in zip(self.cache.layers, first.layers):
            layer.place = self.place
            StaticLayer.update(layer, *(x.expand(B, -1, -1, -1) for x in (one.keys, one.values)))
        while any(i != idle for i in slots):
            ids = tensor([lines[i][n] for i, n in zip(slots, fed)])
            self.place.copy_(tensor(fed) + P)
            mask = torch.where(self.places > self.place[:, None], -torch.inf, 0)[:, None, None]
            logits = self.forward(
                ids[:, None], position_ids=self.place[:, None], cache=self.cache, logits_to_keep=1,
                attention_mask=mask.to(self.model.dtype)).logits[:, -1]  # [B, V]
            fed = [n + 1 for n in fed]
            drawing = [(b, i) for b, i in enumerate(slots) if fed[b] == len(lines[i])]
            u = tensor([uniform[i, fed[b] - len(texts[i])] for b, i in drawing])
            new = sample(logits[[b for b, _ in drawing]], u, self.args.temperature, self.args.top_p)
            for (b, i), token in zip(drawing, new.tolist()):
                lines[i].append(token)
                if token in self.stops or len(lines[i]) == len(texts[i]) + uniform.shape[1]:
                    slots[b], fed[b] = next(waiting, idle), 0  # the line has ended
        return [line[len(text):] for line, text in zip(lines, texts)]

    def by_generate(self, ids, uniform):  # one text, by transformers: for all other models
        torch.manual_seed(int(uniform[0] * 2 ** 24))
        ids = torch.tensor([ids], device=self.model.device)
        return self.model.generate(ids, attention_mask=ids >= 0)[0, ids.shape[1]:].tolist()


def parse_arguments(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--input", required=True, help="JSONL, one row an image (data/README.md)")
    add("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    add("--model", default="huggyllama/llama-7b", help="folder or hub name (default: %(default)s)")
    add("--field", default="alt", help="field to rewrite, a text or a list (default: %(default)s)")
    add("--sources", nargs="+", default=SOURCES, help="sets of pairs; each makes rewrite_SOURCE")
    add("--pairs", default=Path(__file__).parent / "data/prompts/meta_pairs.jsonl", help="JSONL")
    add("--shots", type=int, default=3, help="pairs in the prompt (default: %(default)s, paper)")
    add("--temperature", type=float, default=0.9, help="0: greedy (default: %(default)s, release)")
    add("--top-p", type=float, default=0.95, help="1: off (default: %(default)s, release)")
    add("--max-new-tokens", type=int, default=77, help="default: %(default)s, release")
    add("--seed", type=int, default=0, help="of all random draws (default: %(default)s)")
    add("--batch-size", type=int, default=256, help="slots, 0.5 MB a token of LLaMA-7B (256)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: bf16 if it is native")
    add("--device", default=DEVICES[0], choices=DEVICES, help="default here: %(default)s")
    add("--server", nargs="+", metavar="URL", help="ask OpenAI-compatible servers (data/server.py)")
    return settle(parser.parse_args(argv))


def settle(args):
    """Check what all stages share, and choose --dtype: emulated bf16 is many times slower."""
    files, root = [args.input, getattr(args, "pairs", args.input)], getattr(args, "image_root", ".")
    missing = [x for x in files if not os.path.isfile(x)] + [root] * (not os.path.isdir(root))
    if missing or min(args.batch_size, args.max_new_tokens) < 1:
        die(f"no file {missing[0]}" if missing else "--batch-size or --max-new-tokens below 1")
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.13 cannot tell
    native = args.device == "cpu" and any(map(cpu.get, ["avx512_bf16", "amx_bf16", "bf16"]))
    if args.device == "cuda" and not args.server:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    args.dtype = args.dtype.replace("auto", "bf16" if native else "fp32")
    return args


# === from here on the same lines in the three captioning scripts: answers, rows, restart ==========
def die(message):
    tqdm.write("error: " + " ".join(message.split())[:600], file=sys.stderr)
    sys.exit(2)


def answer_line(answer, reason=None):
    """The caption in a model's answer -> (caption, None), or (None, why there is none). A thought,
    an introduction that ends in a colon, and quotation marks around the caption are cut off."""
    text = (answer or "").rpartition("</think>")[2]
    lines = [line.split() for line in text.splitlines() if any(map(str.isalnum, line))]
    if lines and lines[0][-1].rstrip("*_").endswith((":", "\uff1a")):
        del lines[0]
    if "<think>" in text or not lines:
        return None, reason or ("a thought without end" if "<think>" in text else "empty")
    s = " ".join(lines[0]).strip("\ufffd ")  # half a character, where the answer was cut
    return re.sub("^[\"“„«「]([^\"“-„«»「」]+)[\"”“»」]$|^['‘]([^'‘]+)['’]$", r"\1\2", s).strip(), None


def parse_row(line):
    """The line's JSON object; of any other line, a row that keeps it."""
    with suppress(ValueError, RecursionError):
        if isinstance(row := json.loads(line.decode("utf-8-sig")), dict):
            return row
    line = line.decode(errors="backslashreplace").rstrip("\r\n")
    return {"error": {"line": "not a JSON object"}, "line": line}


class Parts:
    """Exact restart. The input is cut into units of whole lines. A unit's rows become a file, its
    part, named by a hash of all that its bytes depend on (of a model: its name), and renamed to it
    only when complete. So one that exists is right; when none is missing, they are joined."""
    def __init__(self, args, prompts, reads, makes):
        """The input must have a field of `reads`, and its first rows none of `makes`."""
        self.input, self.output, self.folder = args.input, args.output, args.output + ".parts"
        free = "input output pairs workers server batch_size " + "dtype device" * bool(args.server)
        self.settings = {name: x for name, x in vars(args).items() if name not in free.split()}
        self.settings |= {"server": bool(args.server), "prompts": prompts,
                          "script": Path(__file__).read_text(encoding="utf-8")}
        self.counts, self.paths, content, seen = Counter(), [], hashlib.sha256(), set()
        for _, path, lines in self.units():
            self.paths.append(path)
            content.update(b"".join(lines))
            if not seen & reads:  # until one is found; `makes` is looked for in these rows alone
                seen |= {name for line in lines for name, x in parse_row(line).items() if x}
        if self.paths and (not seen & reads or seen & makes):
            seen -= {"error", "line"}
            die(f"{args.input}: expected JSONL with {reads}, without {makes}; has {sorted(seen)}")
        self.made = self.settings | {"input": content.hexdigest()}

    def units(self):
        """Yield (its number, the path of its part, its lines) for every unit of the input."""
        size = 1 << max(16, os.path.getsize(self.input).bit_length() // 2 + 4)  # of 1 GB: 512 KiB
        with open(self.input, "rb") as f:
            for number, lines in enumerate(iter(lambda: f.readlines(size), [])):
                name = hashlib.sha256(repr((self.settings, number, lines)).encode()).hexdigest()
                yield number, os.path.join(self.folder, name), lines

    def to_make(self):
        """Yield (number, rows) of this rank's missing parts, then write the rows, now filled."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for number, path, lines in tqdm(self.units(), total=len(self.paths), disable=rank, delay=1):
            done = os.path.exists(path) or os.path.exists(self.output)
            if number % world == rank and not done:
                rows = [parse_row(line) for line in lines]
                todo = [row for row in rows if row.keys() != {"error", "line"}]
                yield number, todo
                self.counts["lines that are not JSON objects"] += len(rows) - len(todo)
                self.write(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def put(self, row, field, value, results):
        """Write [(text, None) or (None, reason)], made from `value`: a list's into a list."""
        if row.get(field) is not None:
            return self.counts.update([f"{field} was there before"])
        self.counts.update((reason or f"texts in {field}").split(":")[0] for _, reason in results)
        texts, reasons = [text for text, _ in results], [reason for _, reason in results]
        row[field] = texts if isinstance(value, list) else texts[0]
        error = row.get("error") or {}
        error = error if isinstance(error, dict) else {"row": error}  # the user's own
        if any(reasons) or field in error:  # or what an earlier attempt left
            row["error"] = error | {field: reasons if isinstance(value, list) else reasons[0]}

    def write(self, path, lines):
        """Write a file whole or not at all; not if its folder goes away: then OUT was joined."""
        os.makedirs(self.folder, exist_ok=True)
        with suppress(FileNotFoundError), tempfile.TemporaryDirectory(dir=self.folder) as folder, \
                open(f"{folder}/part", "w", encoding="utf-8", errors="backslashreplace") as f:
            f.writelines(lines)
            f.flush()
            os.fsync(f.fileno())
            os.replace(f.name, path)

    def join(self):
        """Join the parts to OUT if none is missing -> whether OUT is there."""
        print(*(f"{count:9,d}  {what}\n" for what, count in (+self.counts).items()), sep="", end="")
        missing = sum(not os.path.exists(path) for path in self.paths)
        if not missing and not os.path.exists(self.output):
            self.write(self.output + ".settings.json", [json.dumps(self.made)])
            lines = (line for path in self.paths for line in open(path, encoding="utf-8"))
            self.write(self.output, lines)
        if not os.path.exists(self.output):
            return print(f"{self.output}: {missing} of {len(self.paths)} parts are still to make")
        settings = Path(self.output + ".settings.json")
        then = json.loads(settings.read_text()) if settings.exists() else {}
        if other := [name for name in self.made if self.made[name] != then.get(name)]:
            die(f"{self.output} was made with other {', '.join(other)}: choose a new --output")
        shutil.rmtree(self.folder, ignore_errors=True)
        return True


if __name__ == "__main__":
    main()
