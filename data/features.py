"""Rows, and the features of images and texts, for the two evaluations and the tools of data/; no command.

The same on any number of ranks: each encodes every so-many-th batch, and all get all features.
"""
import math
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from train_clip import BadRow, all_reduce, begin_worker, check_images, die, open_rows, parse_row, rank, to_rgb  # noqa: E402


def read_rows(path):
    """All rows of a JSONL file, in order; an evaluation set with a broken line is a user's mistake. A row without an image
    gets its place as the name of one, which is then told as unreadable."""
    with open_rows(path) as f:
        for number, line in enumerate(f, 1):
            try:
                row = parse_row(line)
            except BadRow as e:
                die(f"{path}, line {number}: {e}")
            yield {**row, "image": row.get("image") or f"{path}, line {number}"}


def label_of(value):
    """The class's key: a text, the first of a list, or a whole number as a text; None if there is none."""
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(int(value)) if math.isfinite(value) and value == int(value) else None
    return value if isinstance(value, str) and value.strip() else None


def tell_left_out(rows, what):
    """One line about the rows [(name, why or value)] that an evaluation leaves out."""
    if rows:
        print(f"{len(rows)} rows have no usable {what}, left out: " + ", ".join(f"{name} ({value!r})" for name, value in rows[:3])
              + ", ..." * (len(rows) > 3), file=sys.stderr)


def blocks(n, size):
    """This rank's [start, end) of range(n): blocks of `size` go to the ranks in turn, so that what is computed together,
    and so every bit of the result, is the same for any number of ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return [(start, min(start + size, n)) for start in range(rank() * size, n, world * size)]


class Pictures(torch.utils.data.Dataset):
    def __init__(self, names, read, transform):
        self.names, self.read, self.transform = names, read, transform

    def __getitem__(self, i):
        """-> [3, S, S], or the reason why there is none"""
        try:
            return self.transform(to_rgb(self.read(self.names[i])))
        except Exception as e:  # as in Samples
            return f"{type(e).__name__}: {e}"


def collate_pictures(pictures):
    """-> [n, 3, S, S] of those that could be read, as one tensor (each costs a file handle between processes); which these
    are; {which: why not} of the others"""
    readable = [i for i, picture in enumerate(pictures) if not isinstance(picture, str)]
    stacked = torch.stack([pictures[i] for i in readable]) if readable else None
    return stacked, readable, {i: picture for i, picture in enumerate(pictures) if isinstance(picture, str)}


def finite(features):
    """features, or one line: a comparison with NaN is never true, and every rank would be the first."""
    return features if features.isfinite().all() else die("the model's features are not finite: are its weights?")


@torch.inference_mode()
def encode_images(model, transform, names, read, batch_size=64, workers=2, all_may_fail=False):
    """names -> features [N, d] of unit length, on the CPU of every rank; read(name) gives a PIL image.

    One that cannot be read is named on stderr. Its feature is zero: it matches nothing and stays in every denominator."""
    if not all_may_fail:
        check_images("--image-root or the set's folder", len(names), lambda i: read(names[i]))
    device, features = model.logit_scale.device, torch.zeros(len(names), model.config.embed_dim)
    batches = [list(range(*block)) for block in blocks(len(names), batch_size)]
    loader = torch.utils.data.DataLoader(Pictures(names, read, transform), batch_sampler=batches, num_workers=workers,
                                         collate_fn=collate_pictures, worker_init_fn=begin_worker)
    progress = tqdm(loader, desc="images", unit="batch", leave=False, disable=rank() > 0, delay=1)
    for indices, (pictures, readable, reasons) in zip(batches, progress):
        for i, reason in reasons.items():
            print(f"unreadable: {names[indices[i]]}: {reason}", file=sys.stderr)
        if readable:
            encoded = model.encode_image(pictures.to(device))
            features[[indices[i] for i in readable]] = F.normalize(encoded.float(), dim=-1).cpu()
    return finite(all_reduce(features))  # every row is zero on all ranks but one


@torch.inference_mode()
def encode_texts(model, tokenizer, texts, batch_size=256):
    """list of str -> features [T, d] of unit length, on the CPU of every rank"""
    device, features = model.logit_scale.device, torch.zeros(len(texts), model.config.embed_dim)
    mine = blocks(len(texts), batch_size)
    for start, end in tqdm(mine, desc="texts", unit="batch", leave=False, disable=rank() > 0, delay=1):
        tokens = tokenizer(texts[start:end]).to(device)
        features[start:end] = F.normalize(model.encode_text(tokens).float(), dim=-1).cpu()
    return finite(all_reduce(features))
