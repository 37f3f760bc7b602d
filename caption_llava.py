"""Caption images with LLaVA: VeCLIP's visual-enriched captions, VeC (arXiv 2310.07699, section 3.2).

The model sees the image and one fixed prompt. No caption field is read: a VeC is independent of the AltText.

    python caption_llava.py --input cc3m.jsonl --output cc3m.vec.jsonl --image-root DIR
    torchrun --nproc_per_node 8 caption_llava.py ...the same arguments...    # the ranks share the work
    python caption_llava.py --input a.jsonl --output b.jsonl --image-root DIR --limit 8  # a first look
    python caption_llava.py ...the same arguments... --server http://node1:8000 http://node2:8000  # vLLM

Row in:  {"image": "photos/1.jpg", "alt": "IMG_0123 sale!!"}
Row out: the same and "vec": "a red bicycle leaning on a wall"; null for an unreadable image, with
the reason in "error".
The same command resumes after any interruption; without --server, its output is then identical byte for byte.

Read caption and Images, then main. What follows main is the same in all three captioning scripts: rows,
resuming, servers.
"""
import argparse
import base64
import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
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

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

PROMPT = "Describe the image concisely, less than 20 words"  # paper, section 3.2


# --- captions ---------------------------------------------------------------------------------------------

def caption(model, tokenizer, inputs, notes):
    """Greedy captions of the B images that `inputs` holds, one line each."""
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    new = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:].tolist()  # [B, up to max_new_tokens]
    answers = [[token for token in ids if token not in model.generation_config.eos_token_id] for ids in new]
    notes.update("cut off at --max-new-tokens" for ids, answer in zip(new, answers) if answer == ids)
    return [first_line(text) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def load_model(args, device):
    """-> the model, its processor, and the prompt in the model's chat template"""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    load(AutoConfig, args.model)  # its message is the clearest if this is no such model
    processor = load(AutoProcessor, args.model)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.prompt}]}
    try:  # once here, so that a later failure can be blamed on the image
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        processor.tokenizer.padding_side = "left"  # a decoder-only model continues at the right end
        processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
        Images(args.image_root, processor, prompt).prepare([Image.new("RGB", (64, 64))])
    except Exception as e:  # processors raise nearly everything
        die(f"--model {args.model} has no working processor with a chat template: {type(e).__name__}: {e}")
    model = load(AutoModelForImageTextToText, args.model, dtype=DTYPES[args.dtype], device_map=device).eval()
    ends = end_tokens(model, processor.tokenizer)
    model.generation_config = GenerationConfig(  # greedy, whatever the folder says
        max_new_tokens=args.max_new_tokens, eos_token_id=ends, pad_token_id=max(ends, default=0))
    return model, processor, prompt


def caption_request(image, args):
    """A server's request for one image, which is encoded as JPEG: every server reads that."""
    image.save(data := io.BytesIO(), "JPEG", quality=95)
    url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": args.prompt}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "seed": args.seed}


def caption_by_server(server, args, row):
    """-> (caption, None) or (None, the reason)"""
    request, fault = attempt(
        lambda: caption_request(to_rgb(open_image(args.image_root, row.get("image"))), args))
    if fault:
        return None, fault
    text, _, refusal = server.ask(**request)
    return first_line(text), refusal


# --- images, in worker processes --------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # EPS runs programs
MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES,
           errno.EINVAL, errno.EILSEQ}  # the last two: a name or an offset that this disk cannot have


def open_image(root, name):
    """A PIL image, not yet decoded, from a file under `root` or from `shard.tar@OFFSET+SIZE`. A row cannot
    name what lies outside; a link that lies inside is the user's own, and is followed."""
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
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
            7: "TRANSVERSE", 8: "ROTATE_90"}.get(orientation(image))
    if turn:
        image = image.transpose(Image.Transpose[turn])
    if image.mode in ("I", "F") or image.mode.startswith("I;"):  # convert("RGB") would clip these at 255
        bits = max(tags.get(258, (16,)))
        if image.mode == "F" or bits > 16 or tags.get(339, (1,)) != (1,):
            raise ValueError("grey of floats, signed or of more than 16 bits: the file does not say which "
                             "value is white")
        image = image.convert("I").point(lambda value: value * (255 / (2 ** bits - 1)) + 0.5).convert("L")
        image = ImageOps.invert(image) if tags.get(262) == 0 else image  # white is zero
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def attempt(make, *inputs):
    """-> (make(*inputs), None), or (None, the reason that an image's row gets). An error of the disk, with a
    number outside MISSING, is no image's fault: it ends the launch, and a later one goes on."""
    try:
        return make(*inputs), None
    except Exception as e:  # Pillow's decoders and the processors raise nearly everything
        code = getattr(e, "errno", None)
        if code and code not in MISSING:
            raise
        return None, f"{type(e).__name__}: {os.strerror(code) if code else e}"


class Images(torch.utils.data.Dataset):
    """What a DataLoader's workers do: image names in, the model's inputs out."""

    def __init__(self, root, processor, prompt):
        self.root, self.processor, self.prompt = root, processor, prompt

    def prepare(self, images):
        """The model's inputs for RGB images, the prompt included: a dict of tensors, empty for no images."""
        bos = self.processor.tokenizer.bos_token  # some templates write it themselves
        return dict(self.processor(
            images=[[image] for image in images], text=[self.prompt] * len(images), return_tensors="pt",
            padding=True, add_special_tokens=not (bos and self.prompt.startswith(bos)))) if images else {}

    def __getitems__(self, names):
        """-> (inputs of the images that can be read, {number of a name: why it cannot be})"""
        read = [attempt(lambda: to_rgb(open_image(self.root, name))) for name in names]
        images = {i: image for i, (image, fault) in enumerate(read) if not fault}
        faults = {i: fault for i, (_, fault) in enumerate(read) if fault}
        try:
            return self.prepare([*images.values()]), faults
        except Exception:  # one of the images fails: find out which
            tried = {i: attempt(self.prepare, [image])[1] for i, image in images.items()}
            faults |= {i: fault for i, fault in tried.items() if fault}
            return self.prepare([image for i, image in images.items() if i not in faults]), faults


def read_ahead(units, args, dataset):
    """Yield (unit, rows, whether they are its last, (inputs, faults)) for every batch. The workers do not
    wait for a unit to be written: they go on with the next one's images."""
    def batches():
        for unit in units:
            rows = [row for _, row in unit.todo]
            parts = batched(rows, args.batch_size) or [[]]  # a unit without images is written too
            yield from ((unit, rows, number == len(parts)) for number, rows in enumerate(parts, 1))

    def begin(worker, parent=os.getpid()):
        if os.getppid() != parent:  # it died before torch's own watch began
            os._exit(1)

    ahead, behind = itertools.tee(batches())
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=([row.get("image") for row in rows] for _, rows, _ in ahead),
        num_workers=args.workers, collate_fn=lambda batch: batch, worker_init_fn=begin,
        multiprocessing_context="fork" if args.workers else None)
    try:
        for inputs, batch in zip(loader, behind):
            yield *batch, inputs
    except Exception as e:
        die(f"images cannot be read: {str(e).strip().splitlines()[-1]}. Nothing is lost: the same command "
            "goes on from here (too little memory? try fewer --workers, and in a container more --shm-size)")


# --- the stage --------------------------------------------------------------------------------------------

def main(argv=None):
    parser = stage_parser(__doc__, "llava-hf/llava-1.5-7b-hf", batch_size=32, max_new_tokens=40)  # assumed
    add = parser.add_argument
    add("--image-root", required=True, help="the folder that the rows' image paths start from")
    add("--prompt", default=PROMPT, help="default: the paper's, %(default)r")
    add("--workers", type=number(int, 0), default=4, help="processes that read images (default: %(default)s)")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    device = pick_device(args)
    settings = {"image_root": os.path.realpath(args.image_root)}
    units = Units(args, settings, reads=["image"], makes=["vec"])
    if units.finished():
        return print(f"{args.output} is finished")

    def put(row, text, reason):
        reason = reason or (None if text else "empty")
        put_texts(row, "vec", None, [(None if reason else text, reason)])
        units.outcomes[reason.split(":")[0] if reason else "captioned"] += 1

    if args.server:
        trial = caption_request(Image.new("RGB", (64, 64)), args)
        server = Server(args, units, "/v1/chat/completions", **trial)
        for unit in units:
            rows = [row for _, row in unit.todo]
            for row, result in zip(rows, server.map(partial(caption_by_server, server, args), rows)):
                put(row, *result)
            units.write(unit)
    else:
        model, processor, prompt = load_model(args, device)
        images = Images(args.image_root, processor, prompt)
        for unit, rows, last, (inputs, faults) in read_ahead(units, args, images):
            texts = iter(caption(model, processor.tokenizer, inputs, units.notes) if inputs else [])
            for i, row in enumerate(rows):
                put(row, *((None, faults[i]) if i in faults else (next(texts), None)))
            if last:
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
