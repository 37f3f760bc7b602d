"""Caption images with LLaVA: VeCLIP's visual-enriched captions, VeC (arXiv 2310.07699, section 3.2).

The model sees the image and one fixed prompt. No caption field is read: a VeC is independent of the
AltText, so that it can add what the AltText lacks.

    python caption_llava.py --input cc3m.jsonl --output cc3m.vec.jsonl --image-root DIR
    torchrun --nproc_per_node 8 caption_llava.py ...the same arguments...  # ranks share the work
    head -n 20 cc3m.jsonl > few.jsonl                                      # for a first look

Row in:  {"image": "photos/1.jpg", "alt": "IMG_0123 sale!!"}
Row out: the same and "vec": "a red bicycle leaning on a wall"; null for an unreadable image, the
reason in "error". The same command goes on after any interruption, with any number of ranks.
"""
import argparse
import hashlib
import io
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
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

PROMPT = "Describe the image concisely, less than 20 words"  # paper, section 3.2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # EPS runs programs


# --- the model ------------------------------------------------------------------------------------

class Captioner:
    """LLaVA: captions images by the prompt alone, greedily."""

    def __init__(self, args, counts):
        from transformers import (AutoConfig, AutoModelForImageTextToText, AutoProcessor,
                                  GenerationConfig)

        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.backends.cudnn.allow_tf32 = False  # in convolutions: fp32 is fp32
        content = [{"type": "image"}, {"type": "text", "text": args.prompt}]
        try:
            AutoConfig.from_pretrained(args.model)  # says best what is wrong with a folder
            self.processor = AutoProcessor.from_pretrained(args.model)
            if not hasattr(self.processor, "image_processor"):
                die(f"--model {args.model} has no vision part: expected a model like LLaVA")
            self.prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, enable_thinking=False)
            self.model = AutoModelForImageTextToText.from_pretrained(
                args.model, dtype=DTYPES[args.dtype], device_map=args.device).eval()
        except Exception as e:  # transformers raises nearly everything for a folder without a model
            die(f"--model {args.model}: {e}")
        self.args, self.counts, self.tokenizer = args, counts, self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # a decoder-only model goes on at the right end
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        config, how = self.model.config.get_text_config(), self.model.generation_config
        named = [x.eos_token_id for x in (config, how, self.tokenizer)]
        self.ends = {i for ids in named for i in (ids if isinstance(ids, list) else [ids])} - {None}
        self.model.generation_config = GenerationConfig(max_new_tokens=args.max_new_tokens,
            eos_token_id=[*self.ends], pad_token_id=min(self.ends))  # greedy, whatever the folder says

    @torch.inference_mode()
    def caption(self, names):
        """-> [(answer, None) or (None, reason)] for the images with these names"""
        results, size = [], self.args.batch_size
        batches = [names[at:at + size] for at in range(0, len(names), size)]
        prepared = Batches(batches, self.args.image_root, self.processor, self.prompt)
        for batch in DataLoader(prepared, batch_size=None, num_workers=self.args.workers,
                                collate_fn=list, multiprocessing_context="fork" if self.args.workers else None):
            for inputs, reasons in batch:
                answers = iter(self.answer(inputs) if inputs else [])
                results += [(None, reason) if reason else next(answers) for reason in reasons]
        return results

    def answer(self, inputs):
        """Greedy answers to the model's inputs of B images"""
        inputs = inputs.to(self.model.device, self.model.dtype)
        new = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1]:].tolist()
        self.counts["cut at --max-new-tokens"] += sum(map(self.ends.isdisjoint, new))
        new = [[token for token in ids if token not in self.ends] for ids in new]
        thought = "<think>" * self.prompt.rstrip().endswith("<think>")  # by the template
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(thought + text, None) for text in texts]


# --- images, in the DataLoader's workers ----------------------------------------------------------

class Batches(Dataset):
    """What a worker makes of a batch of names: [(the model's inputs, [reason or None of each])]"""

    def __init__(self, batches, root, processor, prompt):
        self.batches, self.root, self.processor, self.prompt = batches, root, processor, prompt

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.prepare(self.batches[number])

    def prepare(self, names):
        images, reasons = zip(*(read_image(self.root, name) for name in names))
        images = [[image] for image in images if image]
        bos = self.processor.tokenizer.bos_token  # some templates write it themselves
        special = not (bos and self.prompt.startswith(bos))
        try:
            return [(self.processor(images=images, text=[self.prompt] * len(images), padding=True,
                                    add_special_tokens=special, return_tensors="pt") if images else None, reasons)]
        except Exception as e:  # processors raise nearly everything
            if len(names) == 1:
                return [(None, [reason_of(e)])]
            return [one for name in names for one in self.prepare([name])]  # one image is at fault


def read_image(root, name):
    """-> (RGB image, None), or (None, why it cannot be read)"""
    try:
        return to_rgb(open_image(root, name)), None
    except Exception as e:  # Pillow's decoders raise nearly everything
        return None, reason_of(e)


def reason_of(error):  # Pillow's messages have a memory address, another one in every run
    return f"{type(error).__name__}: {re.sub(' <.*?>| object at 0x[0-9a-f]+', '', str(error))}"


def open_image(root, name):
    """An image, not yet decoded, from a file under `root` or from `shard.tar@OFFSET+SIZE`. A row
    cannot name what lies outside. A link that lies inside is the user's own, and is followed."""
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
    with suppress(Exception):  # broken metadata says nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "I;16" and image.format == "PNG":  # convert would clip it
        grey = np.asarray(image)
        grey = np.where(grey == image.info.get("transparency", -1), 65535, grey)
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError(f"grey of mode {image.mode}: the file does not say which value is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# --- the stage ------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_arguments(argv)
    parts = Parts(args, args.prompt, reads={"image"}, makes={"vec"})
    if parts.join():
        return print(f"{args.output} is finished")
    if args.server:
        from data.server import Server
        caption = partial(Server(args, parts.counts).caption,
                          read_image=partial(read_image, args.image_root))
    else:
        caption = Captioner(args, parts.counts).caption
    for _, rows in parts.to_make():
        answers = caption([row.get("image") for row in rows])
        results = [answer_line(*answer) for answer in answers]
        if results and not any(text for text, _ in results):
            die(f"none of {len(results)} images got a caption, the first for this reason: "
                f"{results[0][1]}. The same command goes on from here")
        for row, result in zip(rows, results):
            parts.put(row, "vec", None, [result])
    parts.join()


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--input", required=True, help="JSONL, one row an image (data/README.md)")
    add("--output", required=True, help="JSONL, one row for every row of --input, in its order")
    add("--image-root", required=True, help="the folder that the rows' image paths start from")
    add("--model", default="llava-hf/llava-1.5-7b-hf", help="folder or hub name (default: %(default)s)")
    add("--prompt", default=PROMPT, help="default: the paper's, %(default)r")
    add("--max-new-tokens", type=int, default=40, help="default: %(default)s, assumed")
    add("--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")
    add("--workers", type=int, default=4, help="processes that read images (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: bf16 if it is native")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--server", nargs="+", metavar="URL", help="ask OpenAI-compatible servers (data/server.py)")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.max_new_tokens) < 1:
        die("--batch-size and --max-new-tokens begin at 1")
    for path in (args.input, args.image_root):
        if not os.path.exists(path):
            die(f"{path}: no such file or folder")
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
