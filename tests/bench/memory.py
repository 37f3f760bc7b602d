"""What training keeps in memory: per image and preset, and in one step of a large batch.

    python tests/bench/memory.py presets                        # what autograd keeps for backward; two minutes, no GPU needed
    python tests/bench/memory.py step                           # a step of 32,768 with five texts an image; after data/demo.sh, six minutes
    python tests/bench/memory.py step --batch-size 4096 --micro-batch 4096      # without chunks, to compare

presets: bf16 autocast, one text of 16 tokens an image. The tensors that autograd saves are counted by its own hooks for two batch
sizes; the difference is what an image costs, whatever the batch. What weights, gradients and AdamW cost beside it is 16 bytes a
parameter. Left out are the temporary tensors of the largest operation, a few hundred MB at 1,024 images.

step: the similarity matrix of 32,768 x 32,768 alone is 4 GiB, and multi-text has five of them one way and one the other.
"""
import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import train_clip as T  # noqa: E402


def kept(model, n):
    """Bytes that autograd keeps of a forward pass of n images, weights left out"""
    weights, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x  # held, so that no other tensor gets its address
        return x

    size = model.config.image_size
    images = torch.zeros(n, 1, 3, size, size, dtype=torch.uint8)
    texts = T.pack([torch.full((16,), 5)] * n)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        outputs = model(images, texts)
    found = sum(x.untyped_storage().nbytes() for pointer, x in storages.items() if pointer not in weights)
    del outputs
    return found


def presets(args):
    print(f"{'':18}{'parameters':>12}{'MB an image':>13}{'checkpointed':>14}{'GB fixed':>10}{'images in 75 GB':>17}{'checkpointed':>14}")
    for name in args.presets:
        costs = []
        for checkpointing in (False, True):
            model = T.CLIP(T.Config(**T.PRESETS[name]))
            T.Transformer.twice = checkpointing
            costs.append((kept(model, 6) - kept(model, 2)) / 4)
            parameters = sum(p.numel() for p in model.parameters())
            del model
        fixed = 16 * parameters
        print(f"{name:18}{parameters / 1e6:10.0f} M{costs[0] / 1e6:13.1f}{costs[1] / 1e6:14.1f}{fixed / 1e9:10.1f}"
              + "".join(f"{int((75e9 - fixed) / cost):{width},}" for cost, width in zip(costs, (17, 14))), flush=True)


def step(args):
    lines = (args.demo / "filtered.jsonl").read_text().splitlines(True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text("".join(lines[i % len(lines)] for i in range(args.batch_size)))
        command = ["train_clip.py", "--captions", f"{folder}/rows.jsonl", "--image-root", args.demo / "images", "--tokenizer",
                   args.demo / "tokenizer.json", "--model", "nano", "--loss", "multitext", "--text", "alt", "rewrite_chatgpt",
                   "rewrite_bard", "rewrite_coco", "rewrite_human", "--batch-size", args.batch_size, "--micro-batch",
                   args.micro_batch, "--steps", 1, "--workers", 1, "--precision", "fp32", "--device", "cpu", "--out", f"{folder}/out"]
        subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20
    print(f"batch {args.batch_size}, {args.micro_batch} at a time: peak {peak:.1f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("presets", help="what an image costs")
    command.add_argument("--presets", nargs="+", choices=T.PRESETS, default=[*T.PRESETS], metavar="NAME", help="default: all")
    command.set_defaults(run=presets)
    command = commands.add_parser("step", help="the peak of one step")
    command.add_argument("--demo", type=Path, default=ROOT / "out" / "demo")
    command.add_argument("--batch-size", type=int, default=32768)
    command.add_argument("--micro-batch", type=int, default=512)
    command.set_defaults(run=step)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
