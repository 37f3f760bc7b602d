"""Caption images with LLaVA: VeCLIP's visual-enriched captions, VeC (arXiv 2310.07699, section 3.2).

The model sees the image and one fixed prompt. No caption field is read, so a VeC is independent of the AltText.

    python caption_llava.py --input cc3m.jsonl --output cc3m.vec.jsonl --image-root DIR --model llava-hf/llava-1.5-7b-hf
    torchrun --nproc_per_node 8 caption_llava.py ...the same arguments...    # the ranks share the work
    python caption_llava.py --input a.jsonl --output b.jsonl --image-root DIR --model FOLDER --limit 8    # a first look
    python caption_llava.py ...the same arguments... --server http://node1:8000 http://node2:8000    # vLLM generates

Row in:  {"image": "photos/1.jpg", "alt": "IMG_0123 sale!!"}
Row out: the same and "vec": "a red bicycle leaning on a wall"; null for an image that cannot be read, with the reason in
"error". The same command resumes after any interruption. Without --server, its output is then identical byte for byte.

Read caption and Images, then main. What follows main is the same in all three captioning scripts: rows, resuming, servers.
"""
import argparse
import base64
import contextlib
import errno
import hashlib
import http.client
import io
import itertools
import json
import os
import re
import shutil
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

PROMPT = "Describe the image concisely, less than 20 words"  # paper, section 3.2


# --- the model --------------------------------------------------------------------------------------------------------

def load_model(args, device):
    """-> the model, its processor, and the prompt in the model's chat template"""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    load(AutoConfig, args.model)  # whose message is the clearest if this is no such model
    processor = load(AutoProcessor, args.model)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.prompt}]}
    try:  # once here, so that a later failure can be blamed on the image
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        processor.tokenizer.padding_side = "left"  # a decoder-only model continues at the right end
        if processor.tokenizer.pad_token is None:  # what is padded is masked
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        Images(args.image_root, processor, prompt).prepare([Image.new("RGB", (64, 64))])
    except Exception as e:  # processors raise nearly everything
        die(f"--model {args.model} has no working processor with a chat template: {type(e).__name__}: {e}")
    model = load(AutoModelForImageTextToText, args.model, dtype=DTYPES[args.dtype], device_map=device).eval()
    model.generation_config = GenerationConfig(max_new_tokens=args.max_new_tokens, pad_token_id=processor.tokenizer.pad_token_id,
                                               eos_token_id=end_tokens(model, processor.tokenizer))  # greedy, whatever the folder says
    return model, processor, prompt


def caption(model, tokenizer, inputs, notes):
    """Greedy captions of the B images that `inputs` holds, one line each."""
    inputs = {name: x.to(model.device, model.dtype if x.is_floating_point() else None) for name, x in inputs.items()}
    new = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:].tolist()  # [B, at most max_new_tokens]
    answers = [until_end(ids, model.generation_config.eos_token_id) for ids in new]
    notes.update("cut off at --max-new-tokens" for ids, answer in zip(new, answers) if answer == ids)
    return [one_line(text).rstrip("\ufffd ") for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def caption_message(image, prompt):
    """The image and the prompt as a chat message. The image is encoded again as JPEG, which every server reads."""
    image.save(data := io.BytesIO(), "JPEG", quality=95)
    url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]}


def caption_by_server(server, args, row):
    """-> (caption or None, reason or None)"""
    try:
        message = caption_message(to_rgb(open_image(args.image_root, row.get("image"))), args.prompt)
    except Exception as e:
        return None, image_fault(e)
    text, _, refusal = server.ask(messages=[message], temperature=0, seed=args.seed)
    return one_line(text).rstrip("\ufffd "), refusal


# --- images, in worker processes --------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # of Pillow's; EPS would run Ghostscript
MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES}  # these are one image's fault, not the disk's


def open_image(root, name):
    """A PIL image, not yet decoded, from a file under `root` or from `shard.tar@OFFSET+SIZE`. A row cannot name what lies
    outside; a link that lies inside is the user's own, and is followed."""
    if not isinstance(name, str) or not name:
        raise ValueError("no image")
    member = re.fullmatch(r"(.+)@(\d+)\+(\d+)", name)
    path = member[1] if member else name
    if os.path.isabs(path) or ".." in path.split("/"):
        raise ValueError("outside --image-root")
    path = os.path.join(root, path)
    status = os.stat(path)
    size = int(member[3]) if member else status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no file")
    if size > 1 << 28:
        raise ValueError(f"{size} bytes are no image")
    with open(path, "rb") as f:
        f.seek(int(member[2]) if member else 0)
        data = io.BytesIO(f.read(size))
    try:
        image = Image.open(data, formats=FORMATS)
    except UnidentifiedImageError:  # its own message has a memory address in it, another one in every run
        raise ValueError(f"no image in one of {', '.join(FORMATS)}") from None
    if max(image.size) > 100 * min(image.size):  # its shorter side scaled up would fill the memory
        raise ValueError(f"{image.width} x {image.height} pixels are no image")
    return image


def orientation(image):
    """How the image is turned, by its EXIF tag; broken metadata says nothing."""
    try:
        return image.getexif().get(0x0112)
    except Exception:  # Pillow raises nearly everything there
        return None


def to_rgb(image):
    """Any PIL image -> RGB, upright; transparency becomes white, grey of 9 to 16 bits is scaled."""
    image.load()  # which turns a TIFF
    tags = getattr(image, "tag_v2", {})  # a TIFF's; elsewhere Pillow gives grey of 8 or 16 bits
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
            8: "ROTATE_90"}.get(orientation(image))
    if turn:
        image = image.transpose(Image.Transpose[turn])
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # convert("RGB") would clip these at 255
        bits = max(tags.get(258, (16,)))
        if image.mode == "F" or bits > 16 or tags.get(339, (1,)) != (1,):
            raise ValueError("grey of floats, signed or of more than 16 bits: the file does not say which value is white")
        image = image.convert("I").point(lambda value: value * (255 / (2 ** bits - 1)) + 0.5).convert("L")
        image = ImageOps.invert(image) if tags.get(262) == 0 else image  # white is zero
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def image_fault(e):
    """The reason that a row gets for its image. A disk that fails is no image's fault: the launch ends, and a later one goes
    on. Pillow's own OSErrors have no number."""
    code = getattr(e, "errno", None)
    if code and code not in MISSING:
        raise e
    return f"{type(e).__name__}: {os.strerror(code) if code else e}"


class Images(torch.utils.data.Dataset):
    """What a DataLoader's workers do: image names in, the model's inputs out."""

    def __init__(self, root, processor, prompt):
        self.root, self.processor, self.prompt = root, processor, prompt

    def prepare(self, images):
        """The model's inputs for RGB images, the prompt included: a dict of tensors, empty for no images."""
        texts = [self.prompt] * len(images)
        bos = self.processor.tokenizer.bos_token  # some templates write it themselves
        return dict(self.processor(images=[[image] for image in images], text=texts, padding=True, return_tensors="pt",
                                   add_special_tokens=not (bos and self.prompt.startswith(bos)))) if images else {}

    def __getitems__(self, names):
        """-> (inputs of the images that can be read, {number of a name: why it cannot be})"""
        images, faults = {}, {}
        for i, name in enumerate(names):
            try:
                images[i] = to_rgb(open_image(self.root, name))
            except Exception as e:
                faults[i] = image_fault(e)
        try:
            return self.prepare([*images.values()]), faults
        except Exception:  # find out which image fails
            for i, image in images.items():
                try:
                    self.prepare([image])
                except Exception as e:
                    faults[i] = f"{type(e).__name__}: {e}"
            return self.prepare([image for i, image in images.items() if i not in faults]), faults


def read_ahead(units, args, dataset):
    """Yield (unit, rows, whether they are its last, (inputs, faults)). The workers do not wait for a unit to be written: they
    go on to the next one's images."""
    begun = deque()

    def batches():
        for unit in units:
            parts = batched([row for _, row in unit.todo], args.batch_size) or [[]]  # an empty unit gets one empty batch, so that it is written
            for rows in parts:
                begun.append((unit, rows, rows is parts[-1]))
                yield [row.get("image") for row in rows]

    def begin(worker, stage=os.getpid()):
        if os.getppid() != stage:  # it died before torch's own watch began
            os._exit(1)

    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches(), num_workers=args.workers, collate_fn=lambda batch: batch, worker_init_fn=begin,
        multiprocessing_context="fork" if args.workers else None)
    try:
        for batch in loader:
            yield *begun.popleft(), batch
    except Exception as e:
        die(f"images cannot be read: {str(e).strip().splitlines()[-1]}. Nothing is lost: the same command goes on from here "
            "(if a worker was killed for want of memory, with fewer --workers, or in a container with more --shm-size)")


# --- the stage --------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = stage_parser(__doc__, model="llava-hf/llava-1.5-7b-hf", batch_size=32, max_new_tokens=40)  # 1.5, 40: assumed
    parser.add_argument("--image-root", required=True, help="the folder that the rows' image paths start from")
    parser.add_argument("--prompt", default=PROMPT, help="default: the paper's, %(default)r")
    parser.add_argument("--workers", type=number(int, 0), default=4, help="processes that read images (default: %(default)s)")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    device = pick_device(args)
    settings = {"prompt": args.prompt, "image_root": os.path.realpath(args.image_root)}
    units = Units(args, settings, reads=["image"], makes=["vec"])
    if units.finished():
        return print(f"{args.output} is finished")

    def put(row, text, reason):
        put_texts(row, "vec", None, [(text or None, reason or (None if text else "empty"))])
        units.outcomes[row["error"]["vec"].split(":")[0] if not text else "captioned"] += 1

    if args.server:
        message = caption_message(Image.new("RGB", (64, 64)), args.prompt)
        server = Server(args, units, "/v1/chat/completions", messages=[message], temperature=0, seed=args.seed)
        for unit in units:
            rows = [row for _, row in unit.todo]
            for row, result in zip(rows, server.map(partial(caption_by_server, server, args), rows)):
                put(row, *result)
            units.write(unit)
    else:
        model, processor, prompt = load_model(args, device)
        for unit, rows, last, (inputs, faults) in read_ahead(units, args, Images(args.image_root, processor, prompt)):
            texts = iter(caption(model, processor.tokenizer, inputs, units.notes) if inputs else [])
            for i, row in enumerate(rows):
                put(row, *((None, faults[i]) if i in faults else (next(texts), None)))
            if last:
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
