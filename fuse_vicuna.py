"""Fuse AltText and VeC into one caption with Vicuna: VeCLIP's VeCap (arXiv 2310.07699, section 3.3).

    python fuse_vicuna.py --input cc3m.vec.jsonl --output cc3m.fused.jsonl --model lmsys/vicuna-13b-v1.1
    torchrun --nproc_per_node 8 fuse_vicuna.py ...the same arguments...      # ranks share the file, not the work
    python fuse_vicuna.py --input a.jsonl --output b.jsonl --model FOLDER --format pairs --limit 8     # a small model

Row in:  {"image": "photos/1.jpg", "alt": "IMG_0123 sale!!", "vec": "a red bicycle leaning on a wall"}
Row out: the same and "vecap": "..."; a list of AltTexts gives a list. A refusal is asked again with the VeC alone, an
AltText over --max-alt-tokens is cut and the VeC never, and where one of the two is missing the other is rewritten alone.
The same command goes on after any interruption, and its result is the same to the byte.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

# Vicuna 1.1's conversation (release) and the paper's instruction (section 3.3)
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
          "and polite answers to the user's questions.")
INSTRUCTION = ("Rephrase the following {} into one short sentence while adhering to the provided instructions: Place "
               "attributes before noun entities without introducing new meaning. Do not start with \"The image\".")
SHOTS = 4  # pairs in the prompt of --format pairs
MAX_VEC_TOKENS = 256  # a longer VeC is no caption, and is never cut: its row is left null; assumed
PROMPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prompts")


# === rows: the same lines in rewrite_llama.py, caption_llava.py and fuse_vicuna.py; a test compares them ==============
# The input is cut into blocks of 64 KiB: the lines that start in it. A block is the unit of prompting, batching, fsync
# and resume, so a row's text depends neither on the number of ranks nor on interruptions. Blocks form shards; rank r of
# W takes shards r, r + W, ...; whoever finds all of them finished joins them. No process group, no row held for long.

BLOCK = 64 * 1024  # bytes


def die(message):
    """A user's mistake: one line on stderr and exit status 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def read_block(f, block, end):
    """The lines that start in a block and before byte `end`: [(byte offset, line without its newline)]."""
    f.seek(max(block * BLOCK - 1, 0))
    if block:
        f.readline()  # it began in an earlier block
    lines = []
    while (offset := f.tell()) < min((block + 1) * BLOCK, end):
        lines.append((offset, f.readline().rstrip(b"\n")))
    return lines


def parse_row(line):
    """The line's object. Of a line that is none: (a row that keeps it as text, with the reason, and) False."""
    try:
        row = json.loads(line.decode("utf-8"))
        reason = None if isinstance(row, dict) else "not a JSON object"
    except (ValueError, RecursionError) as e:
        reason = f"not JSON: {e}"
    if reason is None:
        return row, True
    return {"error": {"line": reason}, "line": line.decode("utf-8", "backslashreplace")}, False


def dump_row(row):
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: only an escape can carry it
        return json.dumps(row).encode("ascii") + b"\n"


def one_line(text):
    """The text without control characters and line breaks of any kind, runs of white space as one blank."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def put_texts(row, field, like, results):
    """[(text or None, reason or None)] into row[field]: a list if `like`, what they were made from, is one. The reasons
    go to row["error"][field]."""
    texts, reasons = ([result[i] for result in results] for i in (0, 1))
    reason = (reasons if isinstance(like, list) else reasons[0]) if any(reasons) else None
    if row.get(field) is not None:  # further down than make_header looked
        reason = "was there before, kept"
    else:
        row[field] = texts if isinstance(like, list) else texts[0]
    earlier = row.get("error")
    if reason:
        earlier = earlier if isinstance(earlier, dict) else {} if earlier is None else {"row": earlier}  # the user's own: kept
        row["error"] = {**earlier, field: reason}
    elif isinstance(earlier, dict) and field in earlier:  # of a launch before, and true no more
        del earlier[field]


def make_header(args, reads, makes, settings):
    """What the output depends on: the input (size, hash of its first and last MiB, where to stop) and the settings."""
    if not os.path.isfile(args.input):
        die(f"--input {args.input}: no such file")
    if not os.path.isdir(args.model) and (args.model.count("/") > 1 or args.model[:1] in ("", ".", "/")):  # nor a hub name
        die(f"--model {args.model!r}: no such folder")
    with open(args.input, "rb") as f:
        rows = [parse_row(line)[0] for _, line in zip(range(1000), f)]
        fields = {key for row in rows for key in row if row[key] is not None}
        if rows and not fields & set(reads):
            die(f"none of the first {len(rows)} rows of {args.input} has {' or '.join(reads)}, only {sorted(fields)}")
        if there := fields & set(makes):
            die(f"{args.input} has {', '.join(sorted(there))} already, which this stage would overwrite")
        size = end = f.seek(0, os.SEEK_END)
        digest = hashlib.sha256()
        for start in (0, max(size - (1 << 20), 0)):
            f.seek(start)
            digest.update(f.read(1 << 20))
        if args.limit is not None:
            f.seek(0)
            end = sum(len(f.readline()) for _ in range(args.limit))
    return {"input_size": size, "input_sha256_of_ends": digest.hexdigest(), "end": end, **settings,
            "blocks_per_shard": max(1, end // BLOCK // 4096)}  # no function of W: a relaunch may have another


def is_finished(args, header):
    """Whether OUT is there, made with this header; what was begun with another one is a user's mistake."""
    path = os.path.join(args.output + ".parts", "header.json")
    if not os.path.exists(path):
        if os.path.exists(args.output):
            die(f"{args.output} exists and is not this stage's work; move it away or choose another --output")
        return False
    try:
        with open(path) as f:
            begun = json.load(f)
    except ValueError as e:
        die(f"{path} is damaged ({e}): delete {args.output}.parts to start over")
    for key in header:
        if begun.get(key) != header[key]:
            die(f"{args.output} was begun with {key} = {begun.get(key)!r}, now it is {header[key]!r}: choose another "
                f"--output, or delete {args.output} and {args.output}.parts to start over")
    return os.path.exists(args.output)


def cut_back(out, f, blocks, end):
    """How many of a shard's blocks stand whole in its .partial file, which is cut off behind the last of them."""
    out.seek(0)
    whole = 0
    for done, block in enumerate(blocks):
        if not all(out.readline().endswith(b"\n") for _ in read_block(f, block, end)):
            break
        whole = out.tell()
    else:
        done = len(blocks)
    out.truncate(whole)
    return done


def write_synced(out, data):
    try:
        while data:  # past Python's buffer, which on a full disk would try again on closing
            data = data[os.write(out.fileno(), data):]
        os.fsync(out.fileno())
    except OSError as e:
        die(f"{out.name}: {e.strerror}. Nothing is lost: the same command goes on from here")


def put_header(args, header):
    """Write header.json unless it is there: whole, by the first of all ranks and launches, and never replaced."""
    parts = args.output + ".parts"
    if os.path.exists(args.output) or os.path.exists(parts + "/header.json"):
        return
    try:
        os.makedirs(parts, exist_ok=True)
        with open(f"{parts}/header.{os.uname().nodename}.{os.getpid()}", "wb") as f:
            write_synced(f, json.dumps(header, indent=1).encode())
        with contextlib.suppress(FileExistsError):
            os.link(f.name, parts + "/header.json")
        os.remove(f.name)
    except OSError as e:
        die(f"{parts}: {e.strerror}")


def run_blocks(args, header, process, notes):
    """All blocks of this rank's shards through process(block, [(byte offset, row to change)], progress).
    -> (rows of this launch, seconds); lines that are no row are counted in notes"""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    end, per_shard = header["end"], header["blocks_per_shard"]
    n_blocks = -(-end // BLOCK)
    shards = [range(b, min(b + per_shard, n_blocks)) for b in range(0, n_blocks, per_shard)]
    names = [os.path.join(args.output + ".parts", f"{number:05d}.jsonl") for number in range(len(shards))]
    put_header(args, header)
    if is_finished(args, header):  # begun or even finished by another launch while the model was loading
        return 0, 0
    rows, started = 0, time.time()
    progress = tqdm(total=sum(map(len, shards[rank::world])), unit="block", disable=rank > 0)
    with open(args.input, "rb") as f:
        for name, blocks in zip(names[rank::world], shards[rank::world]):
            if os.path.exists(name):
                progress.update(len(blocks))
                continue
            with open(name + ".partial", "ab+") as out:
                lock(out) or die(f"another process is writing {name}.partial, or died on another node less than two minutes ago")
                done = cut_back(out, f, blocks, end)
                progress.update(done)
                for block in blocks[done:]:
                    lines = [(offset, *parse_row(line)) for offset, line in read_block(f, block, end)]
                    process(block, [(offset, row) for offset, row, good in lines if good], progress)
                    rows += len(lines)
                    notes.update("no JSON object, kept as text" for *_, good in lines if not good)
                    write_synced(out, b"".join(dump_row(row) for _, row, _ in lines))
                    progress.update()
            os.replace(name + ".partial", name)
    progress.close()
    with open(args.output + ".parts/join.lock", "w") as guard:
        if all(map(os.path.exists, names)) and lock(guard) and not os.path.exists(args.output):
            with open(args.output + ".tmp", "wb") as out:
                for name in names:
                    with open(name, "rb") as f:
                        for data in iter(lambda: f.read(1 << 26), b""):
                            write_synced(out, data)
            os.replace(args.output + ".tmp", args.output)
            for name in names:
                os.remove(name)
    return rows, time.time() - started


def report(args, done, unit, outcomes, notes):
    """The end of a rank's run: how many, how fast, with which outcome, what else is worth knowing; after a --limit run
    also what whole data sets would take."""
    (rows, seconds), world = done, int(os.environ.get("WORLD_SIZE", 1))
    print(f"{rows} rows, {outcomes.total()} {unit} in {seconds:.0f} s without loading the model: "
          f"{rows / max(seconds, 1e-9):.2f} rows a second")
    for what, number in outcomes.most_common() + notes.most_common():
        print(f"{number:9d}  {what}")
    if args.limit is not None and rows:
        for millions in (1, 12, 300):
            days, hours = divmod(millions * 1e6 * seconds / rows / world / 3600, 24)
            print(f"{millions:6d} M rows would take {days:6.0f} days {hours:4.1f} hours at this rate on {world} rank{'s' * (world > 1)}")


@torch.inference_mode()
def decode(model, inputs, stops, max_new_tokens, choose, cache=None):
    """Continue B prompts. -> for each the new ids, and whether the last one is a stop token. Rows leave the batch as they end.

    inputs: input_ids, position_ids [B, T], padded on the left, and what else the first step needs (pictures); cache: keys
    and values of P tokens before them, or None; attention_mask [B, P + T]; stops: bool [V];
    choose(logits [rows, V], alive [rows], step) -> ids [rows], `alive` being their numbers in 0..B-1."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    mask, position = inputs["attention_mask"], inputs["position_ids"]
    alive = torch.arange(len(mask), device=mask.device)
    new, ended = [[] for _ in alive], [False] * len(alive)
    for step in range(max_new_tokens):
        logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # [rows, V]
        ids = choose(logits, alive, step)
        stop = stops[ids]
        for b, token, stopped in zip(alive.tolist(), ids.tolist(), stop.tolist()):
            new[b].append(token)
            ended[b] = stopped
        keep = (~stop).nonzero()[:, 0]
        if len(keep) == 0:
            break
        if len(keep) < len(alive):
            alive, ids, mask, position = alive[keep], ids[keep], mask[keep], position[keep]
            cache.batch_select_indices(keep)
        position = position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        inputs = {"input_ids": ids[:, None], "attention_mask": mask, "position_ids": position}
    return new, ended


def greedy(logits, alive, step):
    return logits.argmax(-1)


def end_tokens(model, tokenizer, newline):
    """bool [V]: the model's end tokens, one or several, and with `newline` every token that has a line break in it."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    stops = torch.zeros(vocabulary, dtype=torch.bool)
    stops[torch.tensor([] if ends is None else ends, dtype=torch.long)] = True
    if newline:
        stops |= torch.tensor(["\n" in piece for piece in tokenizer.batch_decode([[i] for i in range(vocabulary)])])
    return stops.to(model.device)


def mark_special(tokenizer):
    """Make added tokens that look like markers, <|end|> or [INST], special ones: never read from data, never shown. Some
    checkpoints flag only a few of theirs. An added word stays a word."""
    markers = [token for token in tokenizer.get_added_vocab() if token[0] in "<[{" and token[-1] in ">]}"]
    tokenizer.add_special_tokens({"additional_special_tokens": markers})


def lock(f):
    """Take a file for this process. It is free again when the process dies; on NFS, of a node that dies, once the server
    misses it."""
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as e:
        die(f"{f.name}: {e.strerror}: --output must be on a file system with locks (Lustre: mount with flock)")


def at_least(least, kind=int):
    """For argparse: a number that is not smaller."""
    def number(text):
        if not (value := kind(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value
    return number


def pick_device(name):
    """auto: this rank's GPU, or Apple's, or the CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        die(f"--device {name}: torch finds none here")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def pick_dtype(name, device):
    """auto: bf16 where the hardware computes in it, else fp32. Another dtype gives other texts, so OUT records it."""
    if name == "auto":
        native = (torch.cpu.get_capabilities().get("avx512_bf16") if device == "cpu" else
                  device != "mps" and torch.cuda.is_bf16_supported(including_emulation=False))
        return "bf16" if native else "fp32"
    return name


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# === end of rows ======================================================================================================


# --- the prompts ------------------------------------------------------------------------------------------------------

def clean(text):
    """One line that cannot break a prompt: no control character, no line break of any kind, no separator, no role."""
    text = re.sub(r"=>|(?<=\s)\+(?=\s)", " ", one_line(text))  # the separators of --format pairs
    return one_line(re.sub(r"\b(USER|ASSISTANT|SYSTEM)[\s:]*:", r"\1", text))


def usable(value, i=0):
    """The cleaned text, of a list its entry i, or None if there is nothing to rewrite."""
    text = value if not isinstance(value, list) else value[i] if i < len(value) else None
    return clean(text) or None if isinstance(text, str) else None


def read_prompts():
    """-> pairs for --format pairs, openings by which a refusal is known (lower case)"""
    with open(os.path.join(PROMPTS, "fuse_pairs.jsonl"), encoding="utf-8") as f:
        pairs = [json.loads(line) for line in f]
    with open(os.path.join(PROMPTS, "refusals.txt"), encoding="utf-8") as f:
        return pairs, tuple(f.read().splitlines())


def chat_prompt(alt, vec):
    """Vicuna 1.1's conversation around the paper's instruction. Either text may be None: the other is rewritten alone."""
    given = [text for text in (alt, vec) if text]
    what = "two sentences" if len(given) == 2 else "sentence"
    texts = " ".join(f"{number}. {text}" for number, text in enumerate(given, 1))
    return f"{SYSTEM} USER: {INSTRUCTION.format(what)} {texts} ASSISTANT:"


def pairs_prompt(pairs, alt, vec):
    """The deviation for base models and small ones, which do not follow the instruction but continue a list."""
    given = [text for text in (vec, alt) if text]
    return "Merge two texts about one picture into one short caption.\n\n" + "".join(
        f"{clean(pair['vec'])} + {clean(pair['alt'])} => {clean(pair['output'])}\n" for pair in pairs) + " + ".join(given) + " =>"


def cut(tokenizer, text, limit):
    """The text's first `limit` tokens, and whether that is less than all."""
    if not text:
        return None, False
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return (tokenizer.decode(ids[:limit]).strip(), True) if len(ids) > limit else (text, False)


# --- the model --------------------------------------------------------------------------------------------------------

def load_model(name, device, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device)
    except Exception as e:  # transformers raises nearly everything for a folder that is none
        die(f"--model {name} is no language model that transformers can load: {type(e).__name__}: {e}")
    mark_special(tokenizer)
    return model.eval(), tokenizer


def unquote(text):
    """The text without the quotation marks around it, if there are no others."""
    return re.sub(r'^["\u201c]([^"\u201c\u201d]*)["\u201d]$', r"\1", text).strip()


@torch.inference_mode()
def answer(model, tokenizer, prompts, stops, batch_size, max_new_tokens, notes):
    """Greedy answers, one line each. Prompts of one length share a batch, and what they all begin with is computed once."""
    from transformers import DynamicCache

    answers = [None] * len(prompts)
    sliding = any(DynamicCache(config=model.config.get_text_config()).is_sliding)  # its window would count the padding
    ids = {i: tokenizer(prompt, split_special_tokens=True).input_ids for i, prompt in enumerate(prompts) if prompt}
    order = sorted(ids, key=lambda i: len(ids[i]))
    for at in range(0, len(order), batch_size):
        batch = order[at:at + batch_size]
        rows = [ids[i] for i in batch]  # the longest last
        T, P = len(rows[-1]), min(len(os.path.commonprefix(rows)), len(rows[0]) - 1)  # one token of its own for each at least
        P = 0 if sliding else P
        cache = None
        if P:
            cache = model(torch.tensor([rows[0][:P]], device=model.device), use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(batch))
        own = torch.tensor([[0] * (T - len(row)) + row[P:] for row in rows], device=model.device)  # [B, T - P], padded on the left
        mask = torch.tensor([[1] * P + [0] * (T - len(row)) + [1] * (len(row) - P) for row in rows], device=model.device)
        inputs = {"input_ids": own, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, P:]}
        new, ended = decode(model, inputs, stops, max_new_tokens, greedy, cache)
        notes.update(["cut off at --max-new-tokens"] * ended.count(False))
        for i, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True)):
            answers[i] = unquote(one_line(text.strip().split("\n")[0]))
    return answers


def is_refusal(text, openings):
    return text.lower().replace("\u2019", "'").startswith(openings)


# --- the stage --------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    parser.add_argument("--input", required=True, help="JSONL, one row an image (data/README.md)")
    parser.add_argument("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    parser.add_argument("--model", default="lmsys/vicuna-13b-v1.1", help="folder or hub name (default: %(default)s, paper)")
    parser.add_argument("--alt-field", default="alt", help="AltText, a text or a list of them (default: %(default)s)")
    parser.add_argument("--vec-field", default="vec", help="what the picture shows (default: %(default)s)")
    parser.add_argument("--max-alt-tokens", type=at_least(0), default=128, help="AltText is cut there, VeC never (default: %(default)s)")
    parser.add_argument("--format", default="chat", choices=["chat", "pairs"],
                        help="chat: Vicuna 1.1's conversation; pairs: in-context pairs, a deviation for base models")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=77, help="an answer's limit (default: %(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="rows at a time (default: %(default)s)")
    parser.add_argument("--limit", type=at_least(0), help="only the first N lines of the input (default: all)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                        help="auto: bf16 where the hardware computes in it, else fp32 (fp16 for GPUs before Ampere)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the pairs' draw; the answers are greedy")
    args = parser.parse_args(argv)
    outcomes, notes = Counter(), Counter()

    pairs, openings = read_prompts()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    settings = {name: getattr(args, name) for name in ("model", "alt_field", "vec_field", "max_alt_tokens", "format",
                                                       "max_new_tokens", "batch_size", "seed")}
    header = make_header(args, [args.alt_field, args.vec_field], ["vecap"],
                         {**settings, "dtype": dtype, "prompts_sha256": hashlib.sha256(
                             json.dumps([SYSTEM, INSTRUCTION, pairs, openings]).encode()).hexdigest()})
    if is_finished(args, header):
        return print(f"{args.output} is finished")

    model, tokenizer = load_model(args.model, device, DTYPES[dtype])
    stops = end_tokens(model, tokenizer, newline=args.format == "pairs")

    def ask(given, block):
        """Answers to [(alt or None, vec or None)], None where both are missing or the VeC is too long."""
        drawn = [pairs[i] for i in np.random.default_rng([args.seed, block]).choice(len(pairs), SHOTS, replace=False)]
        prompts = [None if not alt and not vec or cut(tokenizer, vec, MAX_VEC_TOKENS)[1] else
                   chat_prompt(alt, vec) if args.format == "chat" else pairs_prompt(drawn, alt, vec) for alt, vec in given]
        return answer(model, tokenizer, prompts, stops, args.batch_size, args.max_new_tokens, notes)

    def judge(alt, vec, text):
        """(fused caption or None, reason or None); what it was made of is counted."""
        reason = (f"neither {args.alt_field} nor {args.vec_field}" if not alt and not vec else
                  f"{args.vec_field} too long" if text is None else
                  "refused" if is_refusal(text, openings) else None if text else "empty")
        outcomes[reason or ("fused" if alt and vec else "AltText alone" if alt else "VeC alone")] += 1
        return (None, reason) if reason else (text, None)

    def process(block, rows, progress):
        """A fused caption for every AltText of the block's rows."""
        values = [row.get(args.alt_field) for _, row in rows]
        lists = [value if isinstance(value, list) else [value] for value in values]
        given = []  # (alt or None, vec or None) for every AltText
        for (_, row), alts in zip(rows, lists):
            for i, alt in enumerate(alts):
                alt, shortened = cut(tokenizer, usable(alt), args.max_alt_tokens)
                notes.update(["AltText cut"] * shortened)
                given.append((alt, usable(row.get(args.vec_field), i)))
        answers = ask(given, block)
        again = [i for i, (alt, vec) in enumerate(given) if alt and vec and is_refusal(answers[i] or "", openings)]
        notes.update(["refused, asked again with the VeC alone"] * len(again))  # paper, section 3.3: ethical concerns
        for i in again:
            given[i] = None, given[i][1]
        for i, text in zip(again, ask([given[i] for i in again], block)):
            answers[i] = text
        results = iter([judge(alt, vec, text) for (alt, vec), text in zip(given, answers)])
        for (_, row), value, alts in zip(rows, values, lists):
            put_texts(row, "vecap", value, [next(results) for _ in alts])
        progress.set_postfix(texts=outcomes.total())

    done = run_blocks(args, header, process, notes)
    report(args, done, "texts", outcomes, notes)


if __name__ == "__main__":
    main()
