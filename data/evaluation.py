"""What the evaluations and their tools share: ranks, options, checks, messages; not a command."""
import os
import sys
from collections import defaultdict

import torch
import torch.distributed as dist

from data.common import check_output, die, new_parser, number, progress, reason
from data.rows import read_rows


# === ranks: torchrun starts them, each encodes its share ==========================================

def start_ranks(device):
    """Join torchrun's process group, if torchrun started this process."""
    if "cuda" in device:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # of the patches' convolution: fp32 is fp32
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new shape; texts have many
    if "RANK" in os.environ:
        needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in os.environ]:
            die(f"RANK is set, {' and '.join(missing)} not: torchrun sets them all")
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo")
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        die("several SLURM tasks without RANK would all do the same: start torchrun in one task a "
            "node")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(x):
    """The sum over the ranks, in place"""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def blocks(n, size):
    """This rank's [start, end) of range(n). The ranks take blocks of `size` in turn. One process
    alone computes the same blocks, so every bit of a result is the same for any number of ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return [(start, min(start + size, n)) for start in range(rank() * size, n, world * size)]


def own_cpus():
    """The node's CPUs that are this rank's, less one for the rank itself"""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cpus = len(affinity(0)) if affinity else os.cpu_count()
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


# === what one rank says ===========================================================================

def tell(message):
    """One line on stderr from the first rank, also before the ranks have joined."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr)


def first_few(items, n=20):
    """The first `n` of the items in one text, and how many more there are"""
    shown = ", ".join(map(str, items[:n]))
    return f"{shown} and {len(items) - n} more" if len(items) > n else shown


def with_progress(items, unit):
    return progress(items, unit, leave=False) if rank() == 0 else items


# === options ======================================================================================

def evaluation_parser(description):
    """The options of the evaluations, data/clip_scores.py and data/search.py"""
    parser = new_parser(description)
    add = parser.add_argument
    add("--checkpoint", required=True,
        help="checkpoint.pt of train_clip.py or data/convert_checkpoint.py")
    add("--batch-size", type=number(int, 1), default=64, help="images (default: %(default)s)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 where the hardware computes in it, else fp32 (default: %(default)s)")
    add("--workers", type=number(int, 0), default=own_cpus(), help="processes of a rank that read "
        "images, 0: none (default: this rank's CPUs less one, %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: a GPU")
    return parser


def rows_parser(description):
    """The same for rows: eval_retrieval.py, data/clip_scores.py and data/search.py"""
    parser = evaluation_parser(description)
    parser.add_argument("--captions", required=True, help="JSONL with image and texts")
    parser.add_argument("--image-root", required=True,
                        help="the folder that the image paths start from")
    return parser


def parse_args(parser, argv, *outputs):
    """One line now, not after hours: an input is missing, or an output cannot be written."""
    args = parser.parse_args(argv)
    for path in filter(None, (getattr(args, output) for output in outputs)):
        check_output(path, args.captions, args.checkpoint)
    if not os.path.isdir(args.image_root):
        die(f"--image-root {args.image_root}: no such folder")
    if not os.path.isfile(args.captions):
        die(f"--captions {args.captions}: no such file")
    return args


# === checks =======================================================================================

def open_checkpoint(load, path, device):
    """load(path, device), which is train_clip's, or one line that says what to do instead"""
    inside = os.path.join(path, "checkpoint.pt")
    if os.path.isfile(inside):
        die(f"--checkpoint {path} is a folder; its checkpoint is {inside}")
    try:
        return load(path, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # torch raises many classes for a file that is not one of its own
        if isinstance(e, OSError) and not os.path.isdir(path):  # it is missing or damaged
            die(f"--checkpoint {path}: {e.strerror or e}")
        die(f"--checkpoint {path} is no checkpoint of train_clip.py ({reason(e)}): python -m "
            "data.convert_checkpoint makes one of a Hugging Face folder or of released weights")


def check_readable(names, read):
    """End before the work begins if no image can be read, of a thousand that are tried at most."""
    for name in names[::-(-len(names) // 1000) or 1]:
        try:
            return read(name)
        except Exception as e:  # Pillow raises nearly everything
            fault = f"{name}: {type(e).__name__}: {e}"
    if len(names):
        die("--image-root or the set's folder: none of the images that were tried can be read; the "
            f"last one, {fault}")


def finite(features):
    """The features, or one line: no comparison with NaN is true, so all answers would be right."""
    if not features.isfinite().all():
        die("the model's features are not finite: are its weights?")
    return features


# === rows =========================================================================================

def image_rows(path):
    """The rows of a JSONL file. One without an image gets its place in the file as its image's
    name, which is reported as unreadable later."""
    for number_of_line, row in read_rows(path):
        yield {**row, "image": str(row.get("image") or f"{path}, line {number_of_line}")}


def label_of(value):
    """A class's key: a text, the first text of a list, or a whole number as a text; else None.
    White space makes no difference."""
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return " ".join(value.split()) or None if isinstance(value, str) else None


def tell_spellings(where, values):
    """Name the labels that are one class for `label_of`, but are written in several ways."""
    spellings = defaultdict(set)
    for value in values:
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value.strip():
            spellings[label_of(value)].add(value)
    several = [" = ".join(map(repr, sorted(group))) for group in spellings.values()
               if len(group) > 1]
    if several:
        tell(f"{where}: labels that differ only in white space are one class: {first_few(several)}")


def tell_left_out(rows, field):
    """One line about the rows [(name, value of the field)] that an evaluation leaves out"""
    if rows:
        examples = first_few([f"{name} ({value!r})" for name, value in rows], 3)
        tell(f"{len(rows)} rows have no usable {field}, left out: {examples}")
