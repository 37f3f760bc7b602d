"""Rewrite captions with LLaMA by in-context learning: LaCLIP's text augmentation (2305.20088).

Section 3.1: people, two chatbots and MSCOCO each give a set of pairs "caption => rewrite". A prompt
is a task line, three pairs of one set, and "red bike =>": LLaMA ends the line. Each set makes one
rewrite of every caption, so that training can sample one of M + 1 = 5 texts of an image.

    python rewrite_llama.py --input cc3m.jsonl --output cc3m.rewritten.jsonl
    torchrun --nproc_per_node 8 rewrite_llama.py ...the same arguments...  # ranks share the work

Row in:  {"image": "photos/1.jpg", "alt": "red bike"}, or a list of captions
Row out: the same and "rewrite_chatgpt": "...", ...; null where "error" says why. An answer ends
with its line or a second "=>", as in the release. The same command resumes after any kill.
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
DEVICES = [x for x in ("cuda", "mps") if getattr(torch, x).is_available()] + ["cpu"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
as_list = lambda value: value if isinstance(value, list) else [value]
BREAKS = re.compile("=>|[\0-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\ufeff\ud800-\udfff]")

def clean(text):  # -> one line that cannot break the prompt; "" for what is not a text
    return " ".join(BREAKS.sub(" ", text).split()) if isinstance(text, str) else ""

def draw_prompt(pairs, shots, rng):
    """The prompt up to the caption: the task and `shots` pairs of one source (section 3.1)."""
    prompt = TASK + "\n\n"
    for i in rng.choice(len(pairs), shots, replace=False):
        caption, rewrite = pairs[i].get("input"), pairs[i].get("output")
        if "captions" in pairs[i]:  # MSCOCO: two captions of one image, in random order
            caption, rewrite = rng.choice(pairs[i]["captions"], 2, replace=False)
        prompt += f"{clean(caption)} => {clean(rewrite)}\n"
    return prompt

def main(argv=None):
    args = parse_arguments(argv)
    examples = [parse_row(line) for line in open(args.pairs, "rb")]
    pairs = {name: [x for x in examples if x.get("source") == name] for name in args.sources}
    ok = [{"input", "output"} <= x.keys() or len(as_list(x.get("captions"))) > 1 for x in examples]
    if not all(ok) or not 0 <= args.shots <= min(map(len, pairs.values())):
        die(f"--pairs {args.pairs} needs --shots {args.shots} pairs of --sources {args.sources}")
    if not (args.temperature >= 0 and args.top_p > 0):  # NaN fails, too
        die("--temperature below 0, or --top-p not above 0")
    parts = Parts(args, pairs, reads={args.field}, makes={f"rewrite_{name}" for name in pairs})
    if parts.finish():  # OUT is there, or only had to be joined
        return
    if args.server:
        from data.server import Server
    model = (Server if args.server else Completer)(args, parts.counts)
    for number, rows in parts.to_make():
        texts = [[clean(text) for text in as_list(row.get(args.field))] for row in rows]
        captions = [text for row_texts in texts for text in row_texts]  # the unit's, in one list
        asked = [i for i, caption in enumerate(captions) if caption]
        for source in args.sources:
            rng = np.random.default_rng([args.seed, number, *source.encode()])
            prompt = draw_prompt(pairs[source], args.shots, rng)  # ours: one a unit, not one a text
            uniform = rng.random((len(captions), args.max_new_tokens), "f4")  # [text, its token]
            found = iter(model.complete(prompt, [captions[i] for i in asked], uniform[asked]))
            for row, row_texts in zip(rows, texts):
                results = [answer_line(*next(found)) if x else (None, "no text") for x in row_texts]
                parts.put(row, f"rewrite_{source}", results, isinstance(row.get(args.field), list))
        if len(asked) > 50 and not any(parts.counts[f"texts in rewrite_{name}"] for name in pairs):
            die(f"no rewrite of any of {len(asked)} texts: are --model and --dtype right?")
    parts.finish()

def sample(logits, uniform, temperature, top_p):
    """Nucleus sampling: logits [B, V], uniform [B] in [0, 1) -> ids [B]; temperature 0 is greedy.
    A row's own random number chooses in its own nucleus: rows do not depend on each other."""
    if temperature == 0:
        return logits.argmax(-1)
    p, V = (logits.float() / temperature).softmax(-1), logits.shape[-1]
    k = V if logits.is_cuda else min(1024, V)  # a GPU sorts all sooner than it waits
    while k < V and (p.topk(k)[0].sum(-1) < top_p).any():  # a nucleus has more than k tokens
        k = min(8 * k, V)
    p, ids = p.topk(k)  # descending
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the smallest set that reaches top_p
    cdf = p.cumsum(-1)  # the first token whose cdf exceeds uniform * total is drawn
    drawn = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1).minimum((p > 0).sum(-1) - 1)
    return ids.gather(1, drawn[:, None])[:, 0]

class Slots(StaticLayer):  # B texts' keys, values: [B, heads, L, d]; a step writes at place[b]
    def update(self, keys, values, *_, **__):
        at = torch.arange(len(keys), device=keys.device), slice(None), self.place
        self.keys[at], self.values[at] = keys[:, :, 0], values[:, :, 0]  # scatter_ would copy all
        return self.keys, self.values

class Completer:  # LLaMA: ends the lines of many captions behind one prompt
    def __init__(self, args, counts):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        try:  # split_special_tokens: "</s>" in a caption is plain text
            self.tokenizer = AutoTokenizer.from_pretrained(args.model, split_special_tokens=True)
            self.model = AutoModelForCausalLM.from_pretrained(
                args.model, dtype=DTYPES[args.dtype], device_map=args.device).eval()
        except Exception as e:  # transformers raises nearly everything for a folder without a model
            die(f"--model {args.model}: {e}".replace("tiktoken", "sentencepiece protobuf"))
        self.args, self.counts, self.shape = args, counts, None
        config = self.model.config.get_text_config()
        named = config, self.model.generation_config, self.tokenizer  # each may name an end token
        self.ends = {i for x in named for i in as_list(x.eos_token_id)} - {None}
        pieces = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        self.stops = self.ends | {i for i, x in enumerate(pieces) if "\n" in x or "=>" in x}
        self.forward = self.model if args.device != "cuda" else torch.compile(
            self.model, mode="reduce-overhead", dynamic=False)  # CUDA graphs: one launch a step
        self.model.generation_config = GenerationConfig(  # by_generate's, whatever the folder says
            max_new_tokens=args.max_new_tokens, do_sample=args.temperature > 0, top_p=args.top_p,
            temperature=args.temperature or None, top_k=0, eos_token_id=[*self.stops])
        layers = DynamicCache(config=config).layers  # by_slots needs a plain cache and our mask
        plain = {type(x).__name__ for x in layers} <= {"DynamicLayer", "DynamicSlidingWindowLayer"}
        masks = self.model._can_compile_fullgraph and config.model_type not in ("bloom", "falcon")
        window = min(getattr(layer, "sliding_window", sys.maxsize) for layer in layers)
        longest_line = MAX_CAPTION_TOKENS + 8 + args.max_new_tokens  # 8: more than " =>" has
        self.longest_prompt = window - longest_line if plain and masks else 0  # 0: by_generate

    def complete(self, prompt, captions, uniform):
        """-> [(answer, None)]: what follows prompt + caption + " =>", to its line's end or "=>"."""
        encode = lambda text: self.tokenizer("\n" + text, add_special_tokens=False).input_ids
        n, arrow = len(encode("")), encode(" =>")  # n: of "\n", without which LLaMA's adds a blank
        texts = [encode(text)[n:][:MAX_CAPTION_TOKENS] + arrow[n:] for text in captions]
        prompt = self.tokenizer(prompt).input_ids
        generate = self.by_slots if len(prompt) <= self.longest_prompt else self.by_generate
        answers = list(generate(prompt, texts, uniform))
        self.counts["cut at --max-new-tokens"] += sum(map(self.stops.isdisjoint, answers))
        answers = [[token for token in ids if token not in self.ends] for ids in answers]
        answers = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [(answer.partition("=>")[0], None) for answer in answers]

    @torch.inference_mode()
    def by_slots(self, prompt, texts, uniform):
        """The ids that follow the prompt and each text until its line ends. A step feeds every slot
        one token: its text's next, or the one drawn last. A slot whose line has ended takes the
        next text; the mask hides its old keys. So all steps have one shape."""
        N, P, T = len(texts), len(prompt), uniform.shape[1]  # T: tokens of an answer, at most
        B = min(self.args.batch_size, 1 << (N - 1).bit_length())  # a power of 2
        L = -(-(P + max(map(len, texts), default=0) + T) // 128) * 128  # few shapes
        lines = [list(text) for text in texts] + [[0] * L]  # text + answer so far; line N: idle
        waiting = iter(sorted(range(N), key=lambda i: -len(texts[i])))  # the longest text first
        line_of, fed = [next(waiting, N) for _ in range(B)], [0] * B  # slot -> its line; tokens fed
        tensor = lambda values: torch.tensor(values, device=self.model.device)
        prefix = self.model(tensor([prompt]), use_cache=True, logits_to_keep=1)
        if not prefix.logits.isfinite().all():
            die(f"--model {self.args.model} in {self.args.dtype}: its logits are not finite")
        if self.shape != (B, L):  # else reuse the buffers, which a GPU has captured
            self.shape, self.place, self.places = (B, L), tensor(fed), tensor(range(L))
            self.cache = Cache([Slots(L) for _ in prefix.cache.layers])
        self.cache.reset()
        for layer, one in zip(self.cache.layers, prefix.cache.layers):  # the prompt, into all slots
            layer.place = self.place
            StaticLayer.update(layer, *(x.expand(B, -1, -1, -1) for x in (one.keys, one.values)))
        while any(i < N for i in line_of):
            ids = tensor([lines[i][n] for i, n in zip(line_of, fed)])
            self.place.copy_(tensor(fed) + P)
            mask = torch.where(self.places > self.place[:, None], -torch.inf, 0)[:, None, None]
            logits = self.forward(
                ids[:, None], position_ids=self.place[:, None], cache=self.cache, logits_to_keep=1,
                attention_mask=mask.to(self.model.dtype)).logits[:, -1]  # [B, V]
            fed = [n + 1 for n in fed]
            drawing = [(b, i) for b, i in enumerate(line_of) if fed[b] == len(lines[i])]
            u = tensor([uniform[i, fed[b] - len(texts[i])] for b, i in drawing])
            new = sample(logits[[b for b, _ in drawing]], u, self.args.temperature, self.args.top_p)
            for (b, i), token in zip(drawing, new.tolist()):
                lines[i].append(token)
                if token in self.stops or len(lines[i]) == len(texts[i]) + T:  # the line has ended
                    line_of[b], fed[b] = next(waiting, N), 0
        return [line[len(text):] for line, text in zip(lines, texts)]

    def by_generate(self, prompt, texts, uniform):  # one by one, for models by_slots cannot run
        for text, numbers in zip(texts, uniform):
            torch.manual_seed(int(numbers[0] * 2 ** 24))
            ids = torch.tensor([prompt + text], device=self.model.device)
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids))
            yield out[0, ids.shape[1]:].tolist()

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
    add("--batch-size", type=int, default=256, help="texts at a time (256; 7B: up to 64 GiB)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: bf16 if it is native")
    add("--device", default=DEVICES[0], choices=DEVICES, help="default here: %(default)s")
    add("--server", nargs="+", metavar="URL", help="ask OpenAI-compatible servers (data/server.py)")
    return settle(parser.parse_args(argv))

def settle(args):
    """Check what all stages share, and choose --dtype: emulated bf16 is many times slower."""
    checks = {"input": os.path.isfile, "pairs": os.path.isfile, "image_root": os.path.isdir,
              "model": lambda x: args.server or os.path.isdir(x) or x.count("/") < 2}  # hub name
    for name, exists in checks.items():
        if name in args and not exists(getattr(args, name)):
            die(f"--{name.replace('_', '-')} {getattr(args, name)}: no such file or folder")
    for name, least in {"batch_size": 1, "max_new_tokens": 1, "workers": 0, "seed": 0}.items():
        if getattr(args, name, least) < least:
            die(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more")
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.13 cannot tell
    native = args.device == "cpu" and any(map(cpu.get, ["avx512_bf16", "amx_bf16", "bf16"]))
    if args.device == "cuda" and not args.server:
        if (local_rank := int(os.environ.get("LOCAL_RANK", 0))) >= torch.cuda.device_count():
            die(f"rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    args.dtype = args.dtype.replace("auto", "bf16" if native else "fp32")
    return args

# === from here on the same lines in the three captioning scripts, as is `settle`: restart =========
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

def parse_row(line):  # -> the line's JSON object, or a row that holds the line as it is
    with suppress(ValueError, RecursionError):
        if isinstance(row := json.loads(line.decode("utf-8-sig")), dict):
            return row
    line = line.decode(errors="backslashreplace").rstrip("\r\n")
    return {"error": {"line": "not a JSON object"}, "line": line}

class Parts:
    """Exact restart. The input is cut into units of whole lines; each becomes a file, its part. Its
    name is a hash of settings (of a model: its name), script and lines, and is given only when it
    is complete. So a part that exists is right. When none is missing, they are joined."""
    def __init__(self, args, files, reads, makes):  # input: a field of reads, none of makes
        self.input, self.output, self.folder = args.input, args.output, args.output + ".parts"
        free = {"input", "output", "pairs", "workers", "batch_size"}  # change no text (in fp32)
        free |= {"dtype", "device"} if args.server else set()
        self.settings = {name: value for name, value in vars(args).items() if name not in free}
        self.settings |= {"server": bool(args.server), "files": files,
                          "script": Path(__file__).read_text(encoding="utf-8")}
        self.counts, self.paths, content, fields = Counter(), [], hashlib.sha256(), set()
        for _, path, lines in self.units():
            self.paths.append(path)
            content.update(b"".join(lines))
            if fields.isdisjoint(reads):  # look into units until one has the field to read
                fields |= {name for line in lines for name, x in parse_row(line).items() if x}
        if self.paths and (fields.isdisjoint(reads) or fields & makes):
            fields = sorted(fields - {"error", "line"})
            die(f"{args.input}: JSONL needs {[*reads]}, not {[*makes]}; it has {fields}")
        self.made = self.settings | {"input": content.hexdigest()}

    def units(self):
        """Yield (its number, the path of its part, its lines) for every unit of the input."""
        size = 1 << max(16, os.path.getsize(self.input).bit_length() // 2 + 4)  # of 1 GB: 512 KiB
        with open(self.input, "rb") as f:
            for number, lines in enumerate(iter(lambda: f.readlines(size), [])):
                name = hashlib.sha256(repr((self.settings, number, lines)).encode()).hexdigest()
                yield number, os.path.join(self.folder, name), lines

    def to_make(self):
        """Yield (number, rows) of each missing part of this rank; write them once filled in."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for number, path, lines in tqdm(self.units(), total=len(self.paths), disable=rank, delay=1):
            if number % world != rank or os.path.exists(path) or os.path.exists(self.output):
                continue  # another rank's, or made before
            rows = [parse_row(line) for line in lines]
            todo = [row for row in rows if row.keys() != {"error", "line"}]
            yield number, todo
            self.counts["lines that are not JSON objects"] += len(rows) - len(todo)
            self.write(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def put(self, row, field, results, is_list):
        """Put [(text, None) or (None, reason)] into the row: as lists, or the only one alone."""
        if row.get(field) is not None:
            return self.counts.update([f"{field} was there before"])
        self.counts.update((reason or f"texts in {field}").split(":")[0] for _, reason in results)
        texts, reasons = [text for text, _ in results], [reason for _, reason in results]
        row[field] = texts if is_list else texts[0]
        error = row.get("error") or {}
        error = error if isinstance(error, dict) else {"row": error}  # the user's own
        if any(reasons) or field in error:  # or what an earlier attempt left
            row["error"] = error | {field: reasons if is_list else reasons[0]}

    def write(self, path, lines):
        """Write a file whole or not at all. If its folder is gone, OUT was joined."""
        os.makedirs(self.folder, exist_ok=True)
        with (suppress(FileNotFoundError), tempfile.TemporaryDirectory(dir=self.folder) as folder,
              open(f"{folder}/part", "w", encoding="utf-8", errors="backslashreplace") as f):
            f.writelines(lines)
            f.flush()
            os.fsync(f.fileno())
            os.replace(f.name, path)

    def finish(self):
        """Print this launch's counts; if all parts exist, join them. -> whether OUT exists"""
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
        print(f"{self.output} is finished")
        return True

if __name__ == "__main__":
    try:
        main()
    except OSError as e:  # a full disk, a folder that takes no files; nothing finished is lost
        die(str(e))
