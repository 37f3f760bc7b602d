"""What the tools of data/ and the evaluations share: errors in one line, arguments, rows, texts.

Importing it costs no torch, so that a tool that needs none starts at once.
"""
import argparse
import fcntl
import functools
import json
import math
import os
import re
import signal
import sys
from contextlib import contextmanager, suppress

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
    if foreign:
        return f"it holds {foreign[1]}, which is neither a tensor nor a plain value"
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def in_one_line(main):
    """Decorator of a main: what no other place reports becomes one line, too."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            main(argv)
        except (RuntimeError, OSError, EOFError) as e:
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
    lost_worker = "DataLoader worker" in text and "Caught" not in text
    if lost_worker or isinstance(error, (ConnectionError, EOFError)):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for the next one
        return ("a worker that reads images was killed, perhaps because memory was full (then try "
                f"fewer --workers): {reason(error)}")
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


@contextmanager
def new_file(path):
    """A file to write bytes to. It gets its name when it is complete: all of it or nothing."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        die(f"{e.filename or path}: {e.strerror}")
    finally:  # also after Ctrl-C
        with suppress(FileNotFoundError):
            os.remove(temporary)


def lock(path, what):
    """Keep other launches out until this process ends, however it ends."""
    f = open(path, "a")
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        die(f"{what}: another launch is at work in it")
    except OSError as e:
        print(f"{what}: no lock ({e.strerror}): let no other launch write there", file=sys.stderr)
    return f


# === rows ===================================================================================

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
         b"PK\x03\x04": "a zip archive", b"PAR1": "parquet", b"ARROW1": "arrow"}
HEAD = 1 << 16  # bytes that tell what a file is


def open_rows(path):
    """A JSONL file, open as bytes; or one line that says what the file is instead."""
    try:
        f = open(path, "rb", buffering=HEAD)
    except OSError as e:
        die(f"{path}: {e.strerror}")
    if kind := other_format(f.peek()):
        die(f"{path} is no JSONL, one JSON object a line: {kind}")
    return f


def other_format(head):
    """What a file that begins with these bytes is, if it is no JSONL; else None"""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return f"it is {name}"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:4]:
        return "it is UTF-16; expected UTF-8"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return "it is a page of HTML or XML"
    lines = text.split(b"\n")
    first = lines[0]
    if len(head) >= HEAD:
        lines.pop()  # cut
    if text.startswith(b"[") and (b"{" in first or parse_row(first)[1] != "not a JSON object"):
        return "it is a JSON array"  # a list without objects can be one bad line among rows
    lines = [line.strip() for line in lines if line.strip()]
    if lines and not any(line[:1] + line[-1:] == b"{}" for line in lines):
        return f"it begins with {first[:60].decode(errors='replace')!r}"
    return None


def parse_row(line):
    """-> (the line's JSON object, None). If it is none: (a row that keeps its text, the reason),
    the row that the stages write for such a line. A byte order mark is skipped."""
    try:
        row, why = json.loads(line.decode("utf-8-sig")), None
        if not isinstance(row, dict):
            why = "not a JSON object"
    except (ValueError, RecursionError) as e:
        why = f"not JSON: {e}"
    if why is None:
        return row, None
    text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    return {"error": {"line": why}, "line": text}, why


def read_rows(path):
    """Yield (line number, row). Lines that are no JSON objects are counted and named at the end."""
    bad = []
    with open_rows(path) as f:
        for line_number, line in enumerate(progress(f), 1):
            row, why = parse_row(line)
            if why is None:
                yield line_number, row
            else:
                bad.append(f"line {line_number} ({why})")
    if bad:
        more = ", ..." if len(bad) > 3 else ""
        print(f"{path}: {len(bad)} lines are no JSON objects, passed over: {', '.join(bad[:3])}"
              f"{more}", file=sys.stderr)


def to_line(row):
    """A row as the stages write it. A lone surrogate, which has no UTF-8, becomes an escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


# === texts ==================================================================================

# Han and hiragana; katakana, one word a run; Thai, Lao, Burmese, Khmer: scripts without blanks
TWOS = "\u3005-\u3007\u3040-\u309f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
NO_BLANKS = re.compile(f"([{TWOS}]{{1,2}}|[\u30a0-\u30ff\uff66-\uff9f]+"
                       "|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{1,4})")
# Controls, marks of direction, lone surrogates, hidden tags; not the joiners of emoji and Persian
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                      "\ud800-\udfff\ufeff\U000e0000-\U000e007f]")


def words_of(text):
    """The words of a text: what stands between blanks and holds a letter or a digit. In a script
    without blanks two characters count as a word, and four in Thai and its like."""
    return [word for word in NO_BLANKS.sub(r" \1 ", text).split() if any(map(str.isalnum, word))]


def texts_of(value):
    """The usable texts of a caption field: a text, a list of texts and nulls, or absent."""
    entries = value if isinstance(value, list) else [value]
    return [text for text in entries if isinstance(text, str) and text.strip()]


def one_line(text):
    """The text without control characters, all white space as single blanks"""
    return " ".join(CONTROLS.sub(" ", text).split())


# === what a command shows ===================================================================

def progress(items=None, unit=" rows", **more):
    """A progress bar on a terminal, of what takes over a second"""
    return tqdm(items, unit=unit, unit_scale=True, disable=None, delay=1, **more)


def print_table(columns, rows):
    """Print one aligned table: the first column to the left, the others to the right."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        line = first.ljust(widths[0])
        for cell, width in zip(others, widths[1:]):
            line += "  " + cell.rjust(width)
        print(line.rstrip())
