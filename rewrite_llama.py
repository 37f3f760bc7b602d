"""Rewrite captions with LLaMA by in-context learning: LaCLIP's text augmentation (arXiv 2305.20088, section 3).

Every caption gets one rewrite a source. A source (chatgpt, bard, coco, human) is a set of input => output pairs; the
prompt is a task line, three pairs drawn from the set, and the caption; the language model completes the line.

    python rewrite_llama.py --input cc3m.jsonl --output cc3m.rewritten.jsonl --model huggyllama/llama-7b
    torchrun --nproc_per_node 8 rewrite_llama.py ...the same arguments...    # ranks share the file, not the work
    python rewrite_llama.py --input a.jsonl --output b.jsonl --model FOLDER --limit 20    # a first look, on a CPU too

Row in:  {"image": "photos/1.jpg", "alt": "red bike"}
Row out: the same and "rewrite_chatgpt": "...", ...; null where no usable answer came, the reason in "error".
The same command goes on after any interruption, and its result is the same to the byte.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
import zlib
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

SOURCES = ["chatgpt", "bard", "coco", "human"]  # M = 4 rewrites a caption (paper, section 3.1)
TASK = "Rewrite each image caption in other words, keeping its meaning."  # ours; the release's: "write image captions differently,"
MAX_INPUT_TOKENS = 256  # a longer text is no caption: it is left null; assumed
PAIRS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prompts", "meta_pairs.jsonl")


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


# --- the prompt -------------------------------------------------------------------------------------------------------

def clean(text):
    """One line that cannot break a prompt: no control character, no line break of any kind, no separator."""
    return one_line(text.replace("=>", " "))


def load_pairs(path, sources):
    """{source: [example, ...]}, an example being a list of texts of one image of which two are drawn, or a pair."""
    examples = {source: [] for source in sources}
    try:
        with open(path, encoding="utf-8") as f:
            for entry in map(json.loads, f):
                if entry["source"] in examples:
                    example = entry.get("captions") or (entry["input"], entry["output"])
                    if len(example) < 2 or not all(isinstance(text, str) and clean(text) for text in example):
                        raise ValueError(f"no two texts in {entry}")
                    examples[entry["source"]].append(example)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        die(f"--pairs {path}: {e!r}; expected lines of source, input, output (or captions)")
    return examples


def draw_prefix(examples, shots, rng):
    """The prompt up to the caption: the task and `shots` pairs, drawn once a block and source. -> (str, the pairs)"""
    pairs = []
    for i in rng.choice(len(examples), shots, replace=False):
        example = examples[i]
        if isinstance(example, list):  # captions of one image: two of them, in random order (paper, MSCOCO sampling)
            example = [example[j] for j in rng.choice(len(example), 2, replace=False)]
        pairs.append((clean(example[0]), clean(example[1])))
    return TASK + "\n\n" + "".join(f"{a} => {b}\n" for a, b in pairs), pairs


def reject(answer, ended, pairs):
    """Why an answer is unusable, or None."""
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


def load_model(name, device, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device)
    except Exception as e:  # transformers raises nearly everything for a folder that is none
        die(f"--model {name} is no language model that transformers can load: {e}")
    mark_special(tokenizer)
    return model.eval(), tokenizer


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


def attend_with_prefix(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention over a prefix that all rows share and the row's own keys, as transformers calls it.

    query [B, H, T, D], key and value [B, G, S, D] of the row itself (G = H heads or fewer, grouped), mask [B, 1, T, S].
    The prefix, [1, G, P, D], is read once for all rows instead of being copied to each: at a batch of 64 and a prompt of
    100 tokens that copy, not the matrix products, is what a step would cost."""
    if unknown := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        die(f"--model: attention with {' and '.join(unknown)} is not supported, only LLaMA's")
    B, H, T, D = query.shape
    G, P = key.shape[1], 0
    q = query.reshape(B, G, H // G * T, D)
    scores = q @ key.transpose(2, 3)  # [B, G, H / G T, S]
    scores = scores.view(B, H, T, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    if module.prefix is not None:
        prefix_key, prefix_value = module.prefix
        P = prefix_key.shape[2]
        rows = q.transpose(0, 1).reshape(1, G, -1, D)  # all rows' queries as one matrix a group
        shared = (rows @ prefix_key.transpose(2, 3)).view(G, B, H // G, T, P).transpose(0, 1).reshape(B, H, T, P)
        scores = torch.cat([shared * scaling, scores], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)  # [B, H, T, P + S]
    out = (weights[..., P:].reshape(B, G, H // G * T, -1) @ value).view(B, H, T, D)
    if P:
        rows = weights[..., :P].reshape(B, G, -1, P).transpose(0, 1).reshape(1, G, -1, P)
        out = out + (rows @ prefix_value).view(G, B, H // G, T, D).transpose(0, 1).reshape(B, H, T, D)
    return out.transpose(1, 2), None  # [B, T, H, D]


class Generator:
    """Completes lines. The prefix's keys and values are computed once and shared; rows leave the batch as they end."""

    def __init__(self, model, tokenizer, max_new_tokens, temperature, top_p):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register("attend_with_prefix", attend_with_prefix)
        AttentionMaskInterface.register("attend_with_prefix", eager_mask)
        model.set_attn_implementation("attend_with_prefix")
        self.model, self.tokenizer = model, tokenizer
        self.attentions = [module for module in model.modules() if hasattr(module, "q_proj")]
        if len(self.attentions) != model.config.num_hidden_layers:
            die(f"--model: attention without q_proj ({model.config.model_type}) is not supported, only LLaMA's")
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.stops = end_tokens(model, tokenizer, newline=True)

    @torch.inference_mode()
    def set_prefix(self, prefix):
        """Compute the prefix's keys and values; what is completed afterwards continues it."""
        for attention in self.attentions:
            attention.prefix = None
        ids = self.tokenizer(prefix, return_tensors="pt", split_special_tokens=True).input_ids.to(self.model.device)
        cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        for attention, layer in zip(self.attentions, cache.layers, strict=True):
            attention.prefix = layer.keys, layer.values
        self.prefix_length = ids.shape[1]
        window = getattr(self.model.config, "sliding_window", None)
        if window and window < self.prefix_length + MAX_INPUT_TOKENS + self.max_new_tokens:
            die(f"--model: a sliding window of {window} tokens does not hold prompt and answer")

    def complete(self, texts, uniform):
        """texts: B lists of ids; uniform [B, max_new_tokens]. -> B pairs (answer, whether its line ended)"""
        T = max(map(len, texts))
        ids, mask = (torch.tensor(rows, device=self.model.device) for rows in (  # [B, T], padded on the left
            [[0] * (T - len(text)) + text for text in texts], [[0] * (T - len(text)) + [1] * len(text) for text in texts]))
        position = self.prefix_length + (mask.cumsum(-1) - 1).clamp(min=0)  # as if there were no padding
        uniform = uniform.to(self.model.device)

        def choose(logits, alive, step):
            return torch.cat([sample(some, u, self.temperature, self.top_p) for some, u in
                              zip(logits.split(32), uniform[alive, step].split(32))])  # in pieces that fit a cache

        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
        new, ended = decode(self.model, inputs, self.stops, self.max_new_tokens, choose)
        answers = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(one_line(answer.split("\n")[0]), end) for answer, end in zip(answers, ended)]


def rewrite_texts(generator, prefix, pairs, texts, seeds, batch_size, notes):
    """Rewrites of cleaned texts, each drawn again once if unusable. -> [(rewrite or None, reason or None)]"""
    generator.set_prefix(prefix)
    encode = lambda text: generator.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    newline = len(encode("\n"))  # the text follows one; on its own LLaMA's tokenizer would put a blank before it
    ids = [encode(f"\n{text} =>")[newline:] for text in texts]
    results = [(None, "empty input" if not text else "input too long") for text in texts]
    todo = [i for i, text in enumerate(texts) if text and len(ids[i]) <= MAX_INPUT_TOKENS]
    for attempt in range(2):
        todo.sort(key=lambda i: len(ids[i]))  # rows of one length share a batch: little padding
        failed = []
        for at in range(0, len(todo), batch_size):
            batch = todo[at:at + batch_size]
            uniform = np.stack([np.random.default_rng([*seeds[i], attempt]).random(generator.max_new_tokens, "f4")
                                for i in batch])
            answers = generator.complete([ids[i] for i in batch], torch.from_numpy(uniform))
            for i, (answer, ended) in zip(batch, answers):
                reason = reject(answer, ended, pairs)
                results[i] = (None if reason else answer, reason)
                if reason:
                    failed.append(i)
        todo = failed
        notes.update(["drawn again"] * len(failed) * (attempt == 0))
    return results


# --- the stage --------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    parser.add_argument("--input", required=True, help="JSONL, one row an image (data/README.md)")
    parser.add_argument("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    parser.add_argument("--model", default="huggyllama/llama-7b", help="LLaMA-like folder or hub name (default: %(default)s)")
    parser.add_argument("--field", default="alt", help="the field to rewrite, a text or a list of them (default: %(default)s)")
    parser.add_argument("--sources", nargs="+", default=SOURCES, help="sets of pairs; each makes rewrite_SOURCE")
    parser.add_argument("--pairs", default=PAIRS, help="JSONL of the sources' pairs (default: data/prompts/meta_pairs.jsonl)")
    parser.add_argument("--shots", type=at_least(0), default=3, help="pairs in the prompt (default: %(default)s, paper)")
    parser.add_argument("--temperature", type=at_least(0, float), default=0.9, help="0 is greedy (default: %(default)s, release)")
    parser.add_argument("--top-p", type=at_least(0, float), default=0.95, help="nucleus, 1 is off (default: %(default)s, release)")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=77, help="an answer's limit (default: %(default)s, release)")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="texts at a time (default: %(default)s)")
    parser.add_argument("--limit", type=at_least(0), help="only the first N lines of the input (default: all)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                        help="auto: bf16 where the hardware computes in it, else fp32 (fp16 for GPUs before Ampere)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the pairs and of every row's sampling")
    args = parser.parse_args(argv)
    outcomes, notes = Counter(), Counter()

    if not 0 < args.top_p <= 1:
        die(f"--top-p {args.top_p}: expected more than 0 and at most 1")
    examples = load_pairs(args.pairs, args.sources)
    for source, found in examples.items():
        if len(found) < args.shots:
            die(f"--pairs {args.pairs} has {len(found)} examples of source {source!r}, --shots needs {args.shots}")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    settings = {name: getattr(args, name) for name in ("model", "field", "sources", "shots", "temperature", "top_p",
                                                       "max_new_tokens", "batch_size", "seed")}
    settings |= {"dtype": dtype, "pairs_sha256": hashlib.sha256(json.dumps([TASK, examples]).encode()).hexdigest()}
    header = make_header(args, [args.field], [f"rewrite_{source}" for source in args.sources], settings)
    if is_finished(args, header):
        return print(f"{args.output} is finished")

    model, tokenizer = load_model(args.model, device, DTYPES[dtype])
    generator = Generator(model, tokenizer, args.max_new_tokens, args.temperature, args.top_p)

    def process(block, rows, progress):
        """One rewrite a source for every text of the block's rows."""
        if not rows:  # a block inside one very long line
            return
        values = [row.get(args.field) for _, row in rows]
        lists = [value if isinstance(value, list) else [value] for value in values]
        texts = [clean(text) if isinstance(text, str) else "" for texts in lists for text in texts]
        for source in args.sources:
            key = [args.seed, zlib.crc32(source.encode())]
            prefix, pairs = draw_prefix(examples[source], args.shots, np.random.default_rng([*key, block]))
            seeds = [[*key, offset, i] for (offset, _), texts in zip(rows, lists) for i in range(len(texts))]
            results = rewrite_texts(generator, prefix, pairs, texts, seeds, args.batch_size, notes)
            outcomes.update(reason or "rewritten" for _, reason in results)
            results = iter(results)
            for (_, row), value, texts_of_row in zip(rows, values, lists):
                put_texts(row, f"rewrite_{source}", value, [next(results) for _ in texts_of_row])
            progress.set_postfix(texts=outcomes.total())

    done = run_blocks(args, header, process, notes)
    report(args, done, "texts", outcomes, notes)


if __name__ == "__main__":
    main()
