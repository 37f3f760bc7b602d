"""Rows of JSONL files: how every tool reads them, writes them, and goes on after a kill."""
import fcntl
import json
import os
import sys
from contextlib import contextmanager, suppress
from itertools import islice

from data.common import die, progress


# === reading ================================================================================

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
    lines = [line.strip() for line in text.split(b"\n")]
    if text.startswith(b"["):
        alone = parse_row(lines[0])[1] == "not a JSON object" and b"{" not in lines[0]
        if not alone:  # a list without objects can be one bad line among rows
            return "it is a JSON array"
    if len(head) >= HEAD and lines[-1].startswith(b'{"'):
        return None  # a row that is longer than the head
    if any(lines) and not any(line[:1] + line[-1:] == b"{}" for line in lines):
        return f"it begins with {lines[0][:60].decode(errors='replace')!r}"
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
    bad, examples = 0, []
    with open_rows(path) as f:
        for line_number, line in enumerate(progress(f), 1):
            row, why = parse_row(line)
            if why is None:
                yield line_number, row
                continue
            bad += 1
            if len(examples) < 3:
                examples.append(f"line {line_number} ({why})")
    if bad:
        more = ", ..." if bad > 3 else ""
        print(f"{path}: {bad} lines are no JSON objects, passed over: {', '.join(examples)}{more}",
              file=sys.stderr)


def to_line(row):
    """A row as the stages write it. A lone surrogate, which has no UTF-8, becomes an escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


# === writing ================================================================================

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
        with suppress(OSError):
            os.remove(temporary)


class BlockWriter:
    """OUT, written a block of rows at a time, which survives any kill; see `continued`."""

    def __init__(self, path, settings, block):
        self.path, self.part, self.about = path, path + ".part", path + ".settings.json"
        self.compare(settings)
        with open(self.about + ".tmp", "w") as f:
            json.dump(settings, f, indent=1)
        os.replace(self.about + ".tmp", self.about)
        self.finished, self.done = os.path.exists(path), 0
        if not self.finished:
            self.cut_back(block)

    def compare(self, settings):
        """End if OUT, or what there is of it, was made otherwise."""
        if not os.path.exists(self.path) and not os.path.exists(self.part):
            return
        if not os.path.exists(self.about):
            die(f"{self.path} exists, but nothing says how it was made: choose another name")
        try:
            with open(self.about, "rb") as f:
                before = dict(json.load(f))
        except (ValueError, TypeError):
            die(f"{self.about} is damaged: remove it, {self.path} and {self.part}, or choose "
                "another name")
        for name in settings:
            if before.get(name) != settings[name]:
                die(f"{self.path} was made with {name} = {before.get(name)!r}, now it is "
                    f"{settings[name]!r}: choose another name")

    def cut_back(self, block):
        """Cut OUT.part back to its whole blocks; `done` is the number of their rows."""
        with open(self.part, "a+b") as f:
            f.seek(0)
            whole_lines = sum(line.endswith(b"\n") for line in f)
            self.done = whole_lines - whole_lines % block
            f.seek(0)
            f.truncate(sum(map(len, islice(f, self.done))))

    def append(self, lines):
        with open(self.part, "ab") as f:
            f.writelines(lines)
            f.flush()
            os.fsync(f.fileno())

    def finish(self):
        os.replace(self.part, self.path)


@contextmanager
def continued(path, settings, block):
    """A BlockWriter of `path`, which no other launch can use meanwhile.

    Whole blocks of `block` rows are appended to OUT.part. After a kill the same command cuts it
    back to its last whole block and goes on with the next one. OUT.settings.json says how both are
    made; with other settings the command ends."""
    held = lock(path + ".lock", path)
    try:
        yield BlockWriter(path, settings, block)
    except OSError as e:
        die(f"{e.filename or path + '.part'}: {e.strerror}. Nothing is lost: the same command goes "
            "on from here")
    finally:
        os.remove(held.name)


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
