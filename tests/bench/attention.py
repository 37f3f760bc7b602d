"""A training step of the nano preset on the CPU: attention by the formula against torch's fused kernel, in turn.

    python tests/bench/attention.py        # half a minute; prints the median, smallest and largest ratio of the pairs
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_clip as T  # noqa: E402


def fused(self, x, groups, causal):
    W, out = x.shape[-1], []
    x = F.linear(x, self.in_proj_weight, self.in_proj_bias)
    for part, (B, L) in zip(x.split([B * L for B, L in groups]), groups):
        q, k, v = part.view(B, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        part = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out.append(part.transpose(1, 2).reshape(B * L, W))
    return self.out_proj(torch.cat(out))


def main(batch=256, pairs=8):
    formula = T.Attention.forward
    for bf16 in (True, False):
        model = T.CLIP(T.Config(**T.PRESETS["nano"], vocab_size=4096, eot_id=4095))
        optimizer = torch.optim.AdamW(model.parameters())
        images = torch.randint(0, 256, (batch, 1, 3, model.config.image_size, model.config.image_size), dtype=torch.uint8)
        tokens = torch.randint(0, 4095, (batch, 1, 14))
        tokens[..., -1] = 4095
        ratios = []
        for _ in range(pairs + 1):
            seconds = {}
            for forward in (formula, fused):
                T.Attention.forward = forward
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    scale, image_features, text_features = model(images, tokens)
                loss = T.clip_loss(image_features, text_features[:, 0], scale)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seconds[forward] = time.perf_counter() - start
            ratios.append(seconds[fused] / seconds[formula])
        ratios = ratios[1:]  # the first pair warms up
        print(f"{'bf16' if bf16 else 'fp32'}: fused / formula {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f}, {pairs} pairs)")


if __name__ == "__main__":
    main()
