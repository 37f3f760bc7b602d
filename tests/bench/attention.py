"""Attention on the CPU, forward and backward: by the formula against torch's kernel, for the sequences CLIP has.

    python tests/bench/attention.py        # half a minute; medians of five pairs in milliseconds

The trainer takes the formula for fewer than 128 tokens in bf16, else the kernel.
"""
import statistics
import time

import torch
import torch.nn.functional as F


def formula(q, k, v):
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def milliseconds(attend, qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    start = time.perf_counter()
    attend(q, k, v).transpose(1, 2).flatten(2).sum().backward()
    return 1000 * (time.perf_counter() - start)


def main(pairs=5):
    print("dtype  batch  heads  length  formula  kernel  kernel / formula")
    for dtype in (torch.bfloat16, torch.float32):
        for B, heads, L in ((256, 2, 37), (32, 12, 50), (32, 12, 197), (16, 16, 257)):  # nano, B/32, B/16, L/14
            qkv = torch.randn(B, L, 3, heads, 64).to(dtype).requires_grad_()
            runs = [(milliseconds(formula, qkv), milliseconds(F.scaled_dot_product_attention, qkv)) for _ in range(pairs + 1)]
            a, b = (statistics.median(times) for times in zip(*runs[1:]))  # the first pair warms up
            print(f"{str(dtype)[6:]:9}{B:3}{heads:7}{L:8}{a:9.1f}{b:8.1f}{b / a:18.2f}")


if __name__ == "__main__":
    main()
