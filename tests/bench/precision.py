"""bf16 against fp32: the loss curves of the same run on the demo's set (after `bash data/demo.sh`).

    python tests/bench/precision.py        # 200 steps each, about ten minutes on 2 cores

Prints the means of both over windows of 20 steps and their relative difference; seed, batches and settings are the same.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def curve(demo, precision, steps, out):
    """-> the loss of every step"""
    command = ["train_clip.py", "--captions", demo / "filtered.jsonl", "--image-root", demo / "images", "--tokenizer",
               demo / "tokenizer.json", "--text", "alt", "rewrite_wording",
               "--model", "nano", "--augment", "drawing", "--batch-size", 256, "--steps", steps, "--warmup", 50, "--lr", 7e-4,
               "--wd", 0.1, "--workers", 0, "--log-every", 1, "--device", "cpu", "--precision", precision, "--out", out]
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fp32, bf16 = (curve(args.demo, precision, args.steps, Path(folder) / precision) for precision in ("fp32", "bf16"))
    print("steps      fp32    bf16    difference")
    worst = 0
    for start in range(0, args.steps, 20):
        a, b = (statistics.mean(losses[start:start + 20]) for losses in (fp32, bf16))
        worst = max(worst, abs(b / a - 1))
        print(f"{start + 1:3}-{min(start + 20, args.steps):3}  {a:7.4f} {b:7.4f}  {100 * (b / a - 1):+.2f} %")
    print(f"largest difference: {100 * worst:.2f} %")


if __name__ == "__main__":
    main()
