"""Caption images with LLaVA: VeCLIP's visual-enriched captions, VeC (arXiv 2310.07699, section 3.2).

The model sees the picture and one fixed prompt; no caption field is read, so a VeC is independent of the AltText.

    python caption_llava.py --input cc3m.jsonl --output cc3m.vec.jsonl --image-root DIR --model llava-hf/llava-1.5-7b-hf
    torchrun --nproc_per_node 8 caption_llava.py ...the same arguments...    # ranks share the file, not the work
    python caption_llava.py --input a.jsonl --output b.jsonl --image-root DIR --model FOLDER --limit 8   # a first look

Row in:  {"image": "photos/1.jpg", "alt": "IMG_0123 sale!!"}
Row out: the same and "vec": "a red bicycle leaning on a wall"; null for a picture that cannot be read, the reason in
"error". The same command goes on after any interruption, and its result is the same to the byte.
"""
import argparse
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import stat
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

PROMPT = "Describe the image concisely, less than 20 words"  # paper, section 3.2


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


# --- pictures, in worker processes ------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # of Pillow's; EPS would run Ghostscript
MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES}  # one picture's fault


def open_image(root, name):
    """A PIL image, not yet decoded, from a file under `root` or from `shard.tar@OFFSET+SIZE`."""
    member = re.fullmatch(r"(.+)@(\d+)\+(\d+)", name) if isinstance(name, str) else None
    path = os.path.realpath(os.path.join(root, member[1] if member else name))
    if not path.startswith(os.path.join(os.path.realpath(root), "")):
        raise ValueError("outside --image-root")
    status = os.stat(path)
    size = int(member[3]) if member else status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no file")
    if size > 1 << 28:
        raise ValueError(f"{size} bytes are no picture")
    with open(path, "rb") as f:
        f.seek(int(member[2]) if member else 0)
        data = io.BytesIO(f.read(size))
    try:
        image = Image.open(data, formats=FORMATS)
    except UnidentifiedImageError:  # its own message has a memory address in it, another one in every run
        raise ValueError(f"no picture in one of {', '.join(FORMATS)}") from None
    if max(image.size) > 100 * min(image.size):  # its shorter side scaled up would fill the memory
        raise ValueError(f"{image.width} x {image.height} pixels are no picture")
    return image


def to_rgb(image):
    """Any PIL image -> RGB, upright; transparency becomes white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def begin_worker():
    """One thread a worker; and a worker leaves when its stage is gone, killed or not."""
    def watch(parent):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def process_images(images, prompt):
    """What the model takes in for RGB pictures: NumPy arrays by name; None for no picture."""
    return dict(processor(images=images, text=[prompt] * len(images), padding=True, return_tensors="np")) if images else None


def prepare_batch(names, root, prompt):
    """-> inputs of the pictures that can be read, and {number of a name: why it cannot}. Pillow and the processors raise
    nearly everything; a worker must outlive any file. A disk that fails is no picture's fault: a later launch reads them."""
    images, reasons = {}, {}
    for i, name in enumerate(names):
        try:
            images[i] = to_rgb(open_image(root, name))
        except Exception as e:
            number = getattr(e, "errno", None)  # Pillow's own OSErrors have none
            if number and number not in MISSING:
                raise
            reasons[i] = f"{type(e).__name__}: {os.strerror(number) if number else e}" if name else "no image"
    try:
        return process_images([*images.values()], prompt), reasons
    except Exception:  # each on its own: which one is it?
        for i, image in images.items():
            try:
                process_images([image], prompt)
            except Exception as e:
                reasons[i] = f"{type(e).__name__}: {e}"
        return process_images([image for i, image in images.items() if i not in reasons], prompt), reasons


def ahead(pool, function, calls, depth):
    """function(*call) for every call, in order, with `depth` of them under way in the pool."""
    waiting = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(function, *call))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (BrokenProcessPool, OSError) as e:
        die(f"pictures cannot be read: {e}. Nothing is lost: the same command goes on from here (if a worker was killed for "
            "want of memory, with fewer --workers)")


# --- the model --------------------------------------------------------------------------------------------------------

def load_processor(name, prompt):
    """The model's own processor and the prompt in its chat template. The workers inherit the processor by fork."""
    from transformers import AutoProcessor
    try:
        processor = AutoProcessor.from_pretrained(name)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        processor(images=[Image.new("RGB", (64, 64))], text=[text], return_tensors="np")  # it works: if one fails, it is the picture
    except Exception as e:  # transformers raises nearly everything for a folder that is none
        die(f"--model {name} has no working processor with a chat template: {type(e).__name__}: {e}")
    processor.tokenizer.padding_side = "left"  # a decoder-only model continues at the right end
    if processor.tokenizer.pad_token is None:  # what is padded is masked
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    mark_special(processor.tokenizer)
    return processor, text


def load_model(name, device, dtype):
    from transformers import AutoModelForImageTextToText
    try:
        return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, device_map=device).eval()
    except Exception as e:  # transformers raises nearly everything for a folder that is none
        die(f"--model {name} is no image captioner that transformers can load: {type(e).__name__}: {e}")


def caption(model, processor, inputs, stops, max_new_tokens, notes):
    """Greedy captions of one prepared batch, one line each."""
    inputs = {key: torch.from_numpy(value).to(model.device) for key, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    new, ended = decode(model, inputs, stops, max_new_tokens, greedy)
    notes.update(["cut off at --max-new-tokens"] * ended.count(False))
    return [one_line(text) for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


# --- the stage --------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    parser.add_argument("--input", required=True, help="JSONL, one row an image (data/README.md)")
    parser.add_argument("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    parser.add_argument("--image-root", required=True, help="the folder that the rows' image paths start from")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf",
                        help="LLaVA folder or hub name (default: %(default)s; version 1.5 is assumed)")
    parser.add_argument("--prompt", default=PROMPT, help="default: the paper's, %(default)r")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=40, help="a caption's limit (default: %(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="pictures at a time (default: %(default)s)")
    parser.add_argument("--workers", type=at_least(0), default=4, help="processes that read pictures (default: %(default)s)")
    parser.add_argument("--limit", type=at_least(0), help="only the first N lines of the input (default: all)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                        help="auto: bf16 where the hardware computes in it, else fp32 (fp16 for GPUs before Ampere)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--seed", type=at_least(0), default=0, help="kept in the header; greedy captions draw nothing")
    args = parser.parse_args(argv)
    outcomes, notes = Counter(), Counter()

    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    settings = {name: getattr(args, name) for name in ("model", "prompt", "max_new_tokens", "batch_size", "seed")}
    header = make_header(args, ["image"], ["vec"], {**settings, "dtype": dtype})
    if is_finished(args, header):
        return print(f"{args.output} is finished")

    global processor
    processor, prompt = load_processor(args.model, args.prompt)
    pool = ProcessPoolExecutor(max(1, args.workers), multiprocessing.get_context("fork"), begin_worker)
    list(pool.map(abs, range(max(1, args.workers))))  # forked now, before the model and CUDA are there
    model = load_model(args.model, device, DTYPES[dtype])
    stops = end_tokens(model, processor.tokenizer, newline=False)

    def process(block, rows, progress):
        """A caption for every row of the block whose picture can be read."""
        batches = [[row for _, row in rows[at:at + args.batch_size]] for at in range(0, len(rows), args.batch_size)]
        calls = [([row.get("image") for row in batch], args.image_root, prompt) for batch in batches]
        for batch, (inputs, reasons) in zip(batches, ahead(pool, prepare_batch, calls, args.workers)):
            texts = iter(caption(model, processor, inputs, stops, args.max_new_tokens, notes) if inputs else [])
            for i, row in enumerate(batch):
                text = None if i in reasons else next(texts)
                reason = reasons.get(i) or (None if text else "empty")
                put_texts(row, "vec", None, [(text or None, reason)])
                outcomes[reason.split(":")[0] if reason else "captioned"] += 1
            progress.set_postfix(images=outcomes.total())

    done = run_blocks(args, header, process, notes)
    pool.shutdown()
    report(args, done, "images", outcomes, notes)


if __name__ == "__main__":
    main()
