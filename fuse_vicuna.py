"""Fuse AltText and VeC into one caption with Vicuna: VeCLIP's VeCap (2310.07699, section 3.3).

    python fuse_vicuna.py --input cc3m.vec.jsonl --output cc3m.fused.jsonl
    torchrun --nproc_per_node 8 fuse_vicuna.py ...the same arguments...  # ranks share the work

Row in:  {"image": "photos/1.jpg", "alt": "IMG_0123 sale!!", "vec": "a red bicycle by a wall"}
Row out: the same and "vecap": "...", or a list for a list of AltTexts; null with the reason in
"error" if there is no answer. After a refusal the VeC is rewritten alone (section 3.3). If either
text is missing, the other is rewritten alone (ours). An AltText over --max-alt-tokens is cut, a
VeC never. The same command resumes after any kill.
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
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# Vicuna 1.1's conversation (FastChat's release) and the paper's instruction (section 3.3)
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
INSTRUCTION = ("Rephrase the following two sentences into one short sentence while adhering to the "
               "provided instructions: Place attributes before noun entities without introducing "
               "new meaning. Do not start with \"The image\".")
SHOTS = 4  # pairs in the prompt of --format pairs; ours
MAX_PROMPT_TOKENS = 1024  # ours: a longer one is null, since it holds no caption
PROMPTS = Path(__file__).resolve().parent / "data" / "prompts"
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\ufeff\ud800-\udfff]")
DEVICES = [x for x in ("cuda", "mps") if getattr(torch, x).is_available()] + ["cpu"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
as_list = lambda value: value if isinstance(value, list) else [value]

# --- the paper's idea -----------------------------------------------------------------------------
def chat_prompt(alt, vec, instruction=INSTRUCTION):
    """Vicuna 1.1's conversation around the instruction. Either text may be "", and is left out."""
    texts = [text for text in (alt, vec) if text]
    numbered = " ".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
    if len(texts) == 1:
        instruction = instruction.replace("two sentences", "sentence")
    return f"{SYSTEM} USER: {instruction} {numbered} ASSISTANT:"

def pairs_prompt(pairs, alt, vec):
    """For base and small models, which continue a list but do not follow instructions; ours."""
    lines = "".join(f"{pair['vec']} + {pair['alt']} => {pair['output']}\n" for pair in pairs)
    texts = " + ".join(text for text in (vec, alt) if text)
    return f"Merge two texts about one image into one short caption.\n\n{lines}{texts} =>"

def fuse(ask, prompt_of, pairs, openings, counts):
    """Fuse [(AltText, VeC)], either of which may be "" -> [(caption, None) or (None, reason)]

    ask(prompts) -> [(answer, None) or (None, reason)]. A refusal is asked again with the VeC."""
    results = [(None, "no text")] * len(pairs)
    def ask_about(asked):  # {i: (AltText, VeC)}: what to ask for pairs[i]
        for i, answer in zip(asked, ask([prompt_of(*pair) for pair in asked.values()])):
            caption, reason = answer_line(*answer)
            refused = (caption or "").lower().replace("’", "'").startswith(tuple(openings))
            results[i] = (None, "refused") if refused else (caption, reason)
    ask_about({i: pair for i, pair in enumerate(pairs) if any(pair)})
    again = {i: ("", vec) for i, (alt, vec) in enumerate(pairs)
             if results[i] == (None, "refused") and alt and vec}
    ask_about(again)
    counts["refused, asked again with the VeC alone"] += len(again)
    counts["AltTexts rewritten without a VeC"] += sum(1 for alt, vec in pairs if alt and not vec)
    return results

def clean(text, prompt_format="chat"):
    """The text as one line that holds no role or separator of the prompt; "" for what is no text"""
    text = " ".join(CONTROLS.sub(" ", text).split()) if isinstance(text, str) else ""
    if prompt_format == "chat":
        return re.sub(r"\b(USER|ASSISTANT|SYSTEM)\b", lambda role: role[0].lower(), text)
    return " ".join(re.sub(r"(?<!\S)\+(?!\S)|=>", " ", text).split())

def text_pairs(row, args):
    """-> the row's [(AltText, VeC)], and whether a field is a list, so that the result is one, too.
    Lists pair by index; a single text goes with every entry."""
    values = [row.get(args.alt_field) or None, row.get(args.vec_field) or None]
    lengths = [len(value) for value in values if isinstance(value, list)]
    n = max(lengths, default=1)
    alts, vecs = (value if isinstance(value, list) else [value] * n for value in values)
    pairs = [(clean(alt, args.format), clean(vec, args.format))
             for alt, vec in zip_longest(alts, vecs)]
    return pairs, bool(lengths)

# --- the stage ------------------------------------------------------------------------------------
def main(argv=None):
    args = parse_arguments(argv)
    openings = (PROMPTS / "refusals.txt").read_text(encoding="utf-8").splitlines()  # lower case
    openings = [opening for opening in openings if opening.strip()]
    pairs = [parse_row(line) for line in open(args.pairs, "rb")]
    if args.max_alt_tokens < 1:
        die(f"--max-alt-tokens {args.max_alt_tokens}: expected 1 or more")
    if len(pairs) < SHOTS or any({"alt", "vec", "output"} - pair.keys() for pair in pairs):
        die(f"--pairs {args.pairs}: expected {SHOTS} or more rows with alt, vec and output")
    parts = Parts(args, [openings, pairs], {args.alt_field, args.vec_field}, makes={"vecap"})
    if parts.finish():  # OUT is there, or only had to be joined
        return
    if args.server:
        from data.server import Server
    model = (Server if args.server else Fuser)(args, parts.counts)
    for number, rows in parts.to_make():
        prompt_of = partial(chat_prompt, instruction=args.prompt)
        if args.format == "pairs":
            shots = np.random.default_rng([args.seed, number]).choice(pairs, SHOTS, replace=False)
            prompt_of = partial(pairs_prompt, shots)
        of_rows = [text_pairs(row, args) for row in rows]
        to_fuse = [(model.cut(alt), vec) for row_pairs, _ in of_rows for alt, vec in row_pairs]
        results = fuse(model.answer, prompt_of, to_fuse, openings, parts.counts)
        if (asked := sum(map(any, to_fuse))) > 50 and not any(text for text, _ in results):
            die(f"no caption for any of {asked} texts: are --model and --dtype right?")
        results = iter(results)
        for row, (row_pairs, is_list) in zip(rows, of_rows):
            parts.put(row, "vecap", [next(results) for _ in row_pairs], is_list)
    parts.finish()

# --- the model ------------------------------------------------------------------------------------
class Fuser:
    """Vicuna: answers prompts greedily."""
    def __init__(self, args, counts):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        try:  # split_special_tokens: "</s>" in a caption is plain text
            self.tokenizer = AutoTokenizer.from_pretrained(
                args.model, split_special_tokens=True, padding_side="left")
            self.model = AutoModelForCausalLM.from_pretrained(
                args.model, dtype=DTYPES[args.dtype], device_map=args.device).eval()
        except Exception as e:  # transformers raises nearly everything for a folder without a model
            die(f"--model {args.model}: {e}".replace("tiktoken", "sentencepiece protobuf"))
        self.args, self.counts = args, counts
        self.tokenizer.pad_token = (self.tokenizer.pad_token or self.tokenizer.eos_token
                                    or self.tokenizer.convert_ids_to_tokens(0))  # any will do
        config = self.model.config.get_text_config()
        named = config, self.model.generation_config, self.tokenizer  # each may name an end token
        self.ends = {i for x in named for i in as_list(x.eos_token_id)} - {None}
        self.model.generation_config = GenerationConfig(  # greedy, whatever the folder says
            max_new_tokens=args.max_new_tokens, eos_token_id=[*self.ends],
            pad_token_id=min(self.ends, default=0),  # fills up a batch's shorter answers
            stop_strings=["\n"] if args.format == "pairs" else None)

    @torch.inference_mode()
    def answer(self, prompts):
        """-> [(answer, None) or (None, reason)]. A batch has prompts of similar length."""
        ids = self.tokenizer(prompts).input_ids if prompts else []
        results = [(None, f"a prompt of over {MAX_PROMPT_TOKENS} tokens")] * len(ids)
        order = [i for i in range(len(ids)) if len(ids[i]) <= MAX_PROMPT_TOKENS]
        order.sort(key=lambda i: len(ids[i]))
        for at in range(0, len(order), self.args.batch_size):
            batch = order[at:at + self.args.batch_size]
            inputs = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
            inputs = inputs.to(self.model.device)  # [B, T], padded on the left
            new = self.model.generate(**inputs, tokenizer=self.tokenizer)
            new = new[:, inputs["input_ids"].shape[1]:].tolist()
            for i, tokens in zip(batch, new):
                kept = [token for token in tokens if token not in self.ends]
                text = self.tokenizer.decode(kept, skip_special_tokens=True)
                ended = len(kept) < len(tokens) or (self.args.format == "pairs" and "\n" in text)
                self.counts["cut at --max-new-tokens"] += not ended
                results[i] = text, None
        return results

    def cut(self, text):
        """The text, or its first --max-alt-tokens tokens"""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) <= self.args.max_alt_tokens:
            return text
        return self.tokenizer.decode(ids[:self.args.max_alt_tokens]).strip("\ufffd ")

# --- arguments ------------------------------------------------------------------------------------
def parse_arguments(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--input", required=True, help="JSONL, one row an image (data/README.md)")
    add("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    add("--model", default="lmsys/vicuna-13b-v1.1", help="folder or hub name (%(default)s)")
    add("--alt-field", default="alt", help="AltText, a text or a list (default: %(default)s)")
    add("--vec-field", default="vec", help="VeC, of caption_llava.py (default: %(default)s)")
    add("--prompt", default=INSTRUCTION, help="the instruction (default: the paper's)")
    add("--max-alt-tokens", type=int, default=128, help="AltText's (default: %(default)s, assumed)")
    add("--format", default="chat", choices=["chat", "pairs"],
        help="chat: Vicuna 1.1's; pairs: in-context pairs, for base models and small ones; ours")
    add("--pairs", default=PROMPTS / "fuse_pairs.jsonl", help="JSONL of alt, vec and output")
    add("--seed", type=int, default=0, help="of the pairs that are drawn (default: %(default)s)")
    add("--max-new-tokens", type=int, default=77, help="default: %(default)s, assumed")
    add("--batch-size", type=int, default=32, help="prompts at a time (default: %(default)s)")
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
