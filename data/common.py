"""What the tools of data/ and the evaluations share: errors in one line, arguments, tables.

Importing it costs no torch, so that a tool that needs none starts at once.
"""
import argparse
import functools
import math
import os
import re
import signal
import sys

from tqdm import tqdm


# === errors: one line =======================================================================

def die(message):
    """A user's mistake: one line on stderr, above a progress bar, and exit status 2."""
    line = f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(message).split())}"
    tqdm.write(line, file=sys.stderr)
    raise SystemExit(2)


def reason(error):
    """An exception in one short line. torch's have escape codes and advise to read unsafely."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip()
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    if "weights_only" in text and not foreign:
        return "it holds no weights that torch reads"
    if foreign:
        return f"it holds {foreign[1]}, which is neither a tensor nor a plain value"
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def in_one_line(main):
    """Decorator of a main: what no other place reports becomes one line, too."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            main(argv)
        except (RuntimeError, OSError, EOFError, ModuleNotFoundError) as e:
            told = machine_fault(e)
            if not told:
                raise
            die(told)
        dist = sys.modules.get("torch.distributed")
        if dist and dist.is_initialized():  # else gloo's threads now and then abort the exit
            dist.destroy_process_group()
    return run


def machine_fault(error):
    """A full disk or GPU, a lost rank or worker, as one line. None: it is another error."""
    kind, text = type(error).__name__, str(error)
    if kind == "OutOfMemoryError":
        return f"the GPU's memory is full, a smaller --batch-size helps: {reason(error)}"
    if kind.startswith("Dist") or "gloo" in text:
        return "another rank left; its own line says why"
    if isinstance(error, BrokenPipeError):
        return "a pipe is closed: what reads the output has left, or a worker was killed"
    lost_worker = "DataLoader worker" in text and "Caught" not in text
    if lost_worker or isinstance(error, (ConnectionError, EOFError)):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for the next one
        return ("a worker that reads images was killed, perhaps because memory was full (then try "
                f"fewer --workers): {reason(error)}")
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: pip install -r data/requirements.txt"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


# === arguments and files ====================================================================

def new_parser(doc):
    """argparse's, with mistakes in one line; a terminal that is not UTF-8 gets escapes."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    parser.error = die
    sys.stdout.reconfigure(errors="backslashreplace")
    return parser


def number(kind, low, high=math.inf):
    """A type for argparse: low <= x <= high"""
    def parse(text):
        if not low <= (value := kind(text)) <= high:  # also NaN
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: expected at least {low}{most}")
        return value
    parse.__name__ = kind.__name__  # argparse shows it
    return parse


def pick_device(name):
    """auto: this rank's GPU, or Apple's, or the CPU."""
    import torch
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        die(f"--device {name}: torch finds none here")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        die(f"rank {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}")
    return f"cuda:{local_rank}" if name == "cuda" else name


def check_output(path, *inputs, new=False):
    """End now, not after hours, if `path` cannot be written or is one of the `inputs`.

    new: nothing may be there yet"""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        die(f"{path}: no such folder")
    if new and os.path.lexists(path):
        die(f"{path} exists: choose another name")
    written = path if os.path.exists(path) else folder
    if os.path.isdir(path) or not os.access(written, os.W_OK):
        die(f"{path}: expected a file that can be written")
    for other in inputs:
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            die(f"{path} is read: expected another file to write to")


# === what a command shows ===================================================================

def progress(items=None, unit=" rows", **more):
    """A progress bar on a terminal, of what takes over a second"""
    return tqdm(items, **{"unit": unit, "unit_scale": True, "disable": None, "delay": 1, **more})


def print_table(columns, rows):
    """Print one aligned table: the first column to the left, the others to the right."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        line = first.ljust(widths[0])
        for cell, width in zip(others, widths[1:]):
            line += "  " + cell.rjust(width)
        print(line.rstrip())
