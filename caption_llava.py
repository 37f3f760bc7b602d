"""Caption images with LLaVA: VeCLIP's visual-enriched captions, VeC (2310.07699, section 3.2).

The model sees the image and one prompt, no caption field: a VeC is independent of the AltText.

    python caption_llava.py --input cc3m.jsonl --output cc3m.vec.jsonl --image-root DIR
    torchrun --nproc_per_node 8 caption_llava.py ...the same arguments...  # ranks share the work

Row in:  {"image": "photos/1.jpg", "alt": "IMG_0123 sale!!"}
Row out: the same and "vec": "a red bicycle leaning on a wall"; null where "error" says why. The
same command resumes after any kill.
"""
import hashlib
import io
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

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

PROMPT = "Describe the image concisely, less than 20 words"  # paper, section 3.2
DEVICES = [x for x in ("cuda", "mps") if getattr(torch, x).is_available()] + ["cpu"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
as_list = lambda value: value if isinstance(value, list) else [value]
FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM JPEG2000 AVIF".split()  # no EPS: it runs programs

# --- the paper's idea: an image and a prompt ------------------------------------------------------
def main(argv=None):
    args = parse_arguments(argv)
    parts = Parts(args, None, reads={"image"}, makes={"vec"})
    if parts.finish():  # OUT is there, or only had to be joined
        return
    if args.server:
        from data.server import Server
        model = Server(args, parts.counts, read_image)
    else:
        model = Captioner(args, parts.counts)
    for number, rows in parts.to_make():
        answers = model.caption([row.get("image") for row in rows])  # of the image alone
        results = [answer_line(*answer) for answer in answers]
        # a unit without a caption: a disk, a path or the model is at fault, not an image
        if rows and not any(text for text, _ in results) and (number == 0 or len(rows) > 50):
            die(f"no caption for any of {len(rows)} rows ({results[0][1]}): are --image-root, "
                "--model and --dtype right? Leave the rows of lost files out of --input")
        for row, result in zip(rows, results):
            parts.put(row, "vec", [result], is_list=False)
    parts.finish()

# --- the model ------------------------------------------------------------------------------------
class Captioner:  # LLaVA: captions images, greedily, by the prompt alone
    def __init__(self, args, counts):
        import transformers
        content = [{"type": "image"}, {"type": "text", "text": args.prompt}]
        try:
            transformers.AutoConfig.from_pretrained(args.model)  # has the clearest errors
            self.processor = transformers.AutoProcessor.from_pretrained(args.model)
            if not hasattr(self.processor, "image_processor"):
                die(f"--model {args.model} has no vision part: expected a model like LLaVA")
            self.prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True,
                enable_thinking=False)
            self.model = transformers.AutoModelForImageTextToText.from_pretrained(
                args.model, dtype=DTYPES[args.dtype], device_map=args.device).eval()
        except Exception as e:  # transformers raises nearly everything for a folder without a model
            die(f"--model {args.model}: {e}")
        torch.backends.cudnn.allow_tf32 = False  # in convolutions: fp32 is fp32
        self.args, self.counts, self.tokenizer = args, counts, self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # a decoder-only model continues on the right
        self.tokenizer.pad_token = (self.tokenizer.pad_token or self.tokenizer.eos_token
                                    or self.tokenizer.convert_ids_to_tokens(0))  # any will do
        config = self.model.config.get_text_config()
        named = config, self.model.generation_config, self.tokenizer  # each may name an end token
        self.ends = {i for x in named for i in as_list(x.eos_token_id)} - {None}
        self.model.generation_config = transformers.GenerationConfig(  # greedy
            max_new_tokens=args.max_new_tokens, eos_token_id=[*self.ends],
            pad_token_id=min(self.ends, default=0))

    @torch.inference_mode()
    def answer(self, inputs):  # of B images -> B answers
        inputs = inputs.to(self.model.device, self.model.dtype)
        new = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1]:].tolist()  # [B, T]
        self.counts["cut at --max-new-tokens"] += sum(map(self.ends.isdisjoint, new))
        new = [[token for token in ids if token not in self.ends] for ids in new]
        thought = "<think>" if self.prompt.rstrip().endswith("<think>") else ""  # of the template
        return [thought + self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    def caption(self, names):
        """-> [(answer, None) or (None, reason)] for the images with these names"""
        workers = self.args.workers
        loader = DataLoader(  # workers prepare the batches
            names, self.args.batch_size, collate_fn=self.prepare, num_workers=workers,
            multiprocessing_context="fork" if workers else None)
        results = []
        for batch in loader:
            for inputs, reasons in batch:  # one pair; one for each image if the processor refused
                answers = iter(self.answer(inputs) if inputs else [])
                results += [(None, why) if why else (next(answers), None) for why in reasons]
        return results

    def prepare(self, names):
        """-> [(the model's inputs, each name's reason or None)]: one pair for all names, or one for
        each name if the processor refuses the batch, so that a bad image costs only itself."""
        images, reasons = zip(*(read_image(self.args.image_root, name) for name in names))
        images = [[image] for image in images if image]  # a list for each text
        special = not self.prompt.startswith(self.tokenizer.bos_token or "\0")  # BOS only once
        try:
            inputs = images and self.processor(
                images=images, text=[self.prompt] * len(images), padding=True,
                add_special_tokens=special, return_tensors="pt")
            return [(inputs, reasons)]
        except Exception as e:  # the processor refuses an image: find out which
            if len(names) == 1:
                return [(None, [re.sub(r" at 0x\w+", "", repr(e))])]
            return [pair for name in names for pair in self.prepare([name])]

# --- images ---------------------------------------------------------------------------------------
def read_image(root, name):  # -> (RGB image, None), or (None, why it cannot be read)
    try:
        return to_rgb(open_image(root, name)), None
    except Exception as e:  # Pillow's decoders raise nearly everything, some with a memory address
        text = str(e).replace(os.path.join(os.path.abspath(root), ""), "")
        return None, f"{type(e).__name__}: {re.sub(' <_io.*?>| at 0x[0-9a-fA-F]+', '', text)}"

def open_image(root, name):
    """An image, not yet decoded, from a file under `root` or from `shard.tar@OFFSET+SIZE`. A row
    cannot name a file outside. Links under `root` are the user's own and are followed."""
    if not isinstance(name, str) or not name:
        raise ValueError("no image")
    path, offset, size = re.fullmatch(r"(.+?)(?:@(\d+)\+(\d+))?", name, re.DOTALL).groups()
    root = os.path.join(os.path.abspath(root), "")
    path = os.path.join(root, path)
    if not path.startswith(root) or ".." in path.split(os.sep):
        raise ValueError("outside --image-root")
    with open(path, "rb") as f:
        f.seek(int(offset or 0))
        image = Image.open(io.BytesIO(f.read(int(size or -1))), formats=FORMATS)
    if max(image.size) > 100 * min(image.size):  # its shorter side scaled up would fill the memory
        raise ValueError(f"{image.width} x {image.height} pixels are no image")
    return image

def to_rgb(image):
    """Any PIL image -> RGB, upright; transparency becomes white."""
    image.load()  # a broken file fails here; a second load would return part of it
    with suppress(Exception):  # broken metadata is ignored
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel
        raise ValueError(f"grey of mode {image.mode}: expected 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

# --- arguments ------------------------------------------------------------------------------------
def parse_arguments(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--input", required=True, help="JSONL, one row an image (data/README.md)")
    add("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    add("--image-root", required=True, help="the folder that the rows' image paths start from")
    add("--model", default="llava-hf/llava-1.5-7b-hf", help="folder or hub name (%(default)s)")
    add("--prompt", default=PROMPT, help="default: the paper's, %(default)r")
    add("--max-new-tokens", type=int, default=40, help="default: %(default)s, assumed")
    add("--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")
    add("--workers", type=int, default=4, help="processes that read images (default: %(default)s)")
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
