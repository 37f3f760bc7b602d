"""One step of a global batch of 32,768 with five texts an image in one process: its peak memory.

    python tests/bench/memory.py        # after `bash data/demo.sh`; six minutes on 2 cores
    python tests/bench/memory.py --batch-size 4096 --micro-batch 4096      # without chunks, to compare

The similarity matrix of 32,768 x 32,768 alone would be 4 GiB, and multi-text has five of them one way and one the other.
"""
import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--batch-size", type=int, default=32768)
    parser.add_argument("--micro-batch", type=int, default=512)
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
