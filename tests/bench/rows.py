"""Two million rows of five texts as the trainer reads them, against holding them in lists: seconds and memory.

    python tests/bench/rows.py                  # about 5 minutes, 1.5 GB of disk for a while; also a tenth of the rows
    python tests/bench/rows.py --rows 20000 --reads 2000    # does it run? a minute

ours        Rows and Samples of train_clip.py: rows stay in the file and are found by their byte offsets
open_clip   its CsvDataset: pandas.read_csv, a list of paths, a list of texts (one text a row)
lists       as LaCLIP's loader holds them: a list of paths, a list of lists of five texts

index s     finding the byte offsets, at the start of every run
first s     from making the data set to the first batch, which finds them again; all files are in the page cache
main MB     what the main process grew by in that time and the reads (Rss)
worker MB   a worker's own memory (Private_Clean + Private_Dirty, mean of both), at the first batch and after --reads
            rows. It begins as a copy that shares all pages. Reading a Python string writes its reference count, so the
            page becomes the worker's own. An epoch reads all rows, not only these.

Each side runs in its own process and reads random rows as its trainer does. Tokenizer, crop and image are the same.
"""
import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from open_clip_train.data import CsvDataset
from PIL import Image

from inputs import FIELDS, T, make_rows
from peers import torchvision_transform
from train import print_table

BATCH, SIZE = 64, 32


class Lists(torch.utils.data.Dataset):
    def __init__(self, folder, transform, tokenizer):
        self.transform, self.tokenizer, self.images, self.texts = transform, tokenizer, [], []
        rewrites = [(folder / field).read_text().splitlines() for field in FIELDS[1:]]
        with open(folder / "rows.tsv", newline="") as f:
            next(f)
            for (image, alt), *others in zip(csv.reader(f, delimiter="\t"), *rewrites):
                self.images.append(image)
                self.texts.append([alt, *others])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.open(self.images[i])), self.tokenizer([random.choice(self.texts[i])])[0]


def collate(samples):
    images, texts = zip(*samples)
    return torch.stack(images), torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)


def make_loader(side, folder, tokenizer):
    """A DataLoader as the side's trainer makes it"""
    if side == "ours":
        args = T.parse_args(["--captions", str(folder / "rows.jsonl"), "--image-root", str(folder),
                             "--text", *FIELDS, "--batch-size", str(BATCH), "--out", "none"])
        rows = T.Rows(args.captions)
        return torch.utils.data.DataLoader(
            T.Samples(args, rows, tokenizer, SIZE), num_workers=2, collate_fn=T.collate,
            batch_sampler=T.pieces(args, len(rows), 0, len(rows) // BATCH, 1),
            worker_init_fn=T.begin_worker)

    def tokenize(texts):
        return [tokenizer.encode(text) for text in texts]

    samples = Lists(folder, torchvision_transform(SIZE), tokenize) if side == "lists" else CsvDataset(
        folder / "rows.tsv", torchvision_transform(SIZE), "filepath", "title", tokenizer=tokenize)
    return torch.utils.data.DataLoader(samples, BATCH, shuffle=True, num_workers=2, drop_last=True, collate_fn=collate)


def memory(*pids):
    """MB of a process, mean over some: Rss, Pss, private"""
    sums = dict.fromkeys(("Rss", "Pss", "Private_Clean", "Private_Dirty"), 0)
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if (name := line.split(":")[0]) in sums:
                sums[name] += int(line.split()[1]) / 1000 / len(pids)
    return {"Rss": sums["Rss"], "Pss": sums["Pss"], "private": sums["Private_Clean"] + sums["Private_Dirty"]}


def measure(side, folder, reads):
    """In a process of its own -> columns of the table"""
    tokenizer, start = T.Tokenizer.load(str(folder / "tokenizer.json")), time.perf_counter()
    if side == "ours":
        T.Rows([str(folder / "rows.jsonl")])
    index_s = time.perf_counter() - start if side == "ours" else None
    before, start = memory(os.getpid())["Rss"], time.perf_counter()
    loader = make_loader(side, folder, tokenizer)
    batches = iter(loader)
    next(batches)
    first_s, pids = time.perf_counter() - start, [worker.pid for worker in batches._workers]
    at_first = memory(*pids)
    for _ in range(reads // BATCH - 2):
        next(batches)
    worker, main_mb = memory(*pids), memory(os.getpid())["Rss"] - before
    return {"index s": index_s, "first s": first_s, "main MB": main_mb, "worker MB": at_first["private"],
            "after reads": worker["private"], "its Rss": worker["Rss"], "its Pss": worker["Pss"]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the larger file (default: %(default)s)")
    parser.add_argument("--reads", type=int, default=20_000, help="rows that both workers read (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rows < 10 * args.reads:
        parser.error(f"--rows {args.rows}: a tenth of them has to be at least --reads {args.reads}")
    if args.measure:
        return print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.reads)))
    if args.rows < 10 * 3 * BATCH or args.reads < 3 * BATCH:
        parser.error(f"expected --rows of {10 * 3 * BATCH} or more, --reads of {3 * BATCH} or more")
    table = []
    for n in (args.rows // 10, args.rows):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            make_rows(Path(folder), n, SIZE)
            for side in ("ours", "open_clip", "lists"):
                command = [sys.executable, __file__, "--reads", str(args.reads), "--measure", side, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                table.append({"rows": n, "side": side, **json.loads(done.stdout)})
    print_table(table)
    if args.json:
        Path(args.json).write_text(json.dumps({"reads": args.reads, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
