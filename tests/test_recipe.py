"""The recipe of a run, against formulas and torchvision: what a mistake changes without a crash."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import train_clip as T
from conftest import read_jsonl, train_arguments, without


@pytest.fixture
def recorded(monkeypatch):
    """AdamW's steps as [{parameter: (before, gradient, after)}]; then `change` alters weights."""
    steps = []

    class Recorded(torch.optim.AdamW):
        change = staticmethod(lambda parameter: None)

        def step(self):
            parameters = [p for group in self.param_groups for p in group["params"]]
            before = [(p.detach().double().clone(), p.grad.double().clone()) for p in parameters]
            super().step()
            steps.append({p: (*b, p.detach().double().clone())
                          for p, b in zip(parameters, before)})
            with torch.no_grad():
                for p in parameters:
                    self.change(p)

    monkeypatch.setattr(T.torch.optim, "AdamW", Recorded)
    return steps, Recorded


def test_adamw_with_warm_up_cosine_and_decay_of_matrices_alone(shapes, tmp_path, recorded):
    """Every step of every parameter: decoupled weight decay (Loshchilov and Hutter 2019, algorithm
    2) at the rate of the step: linear from peak / 1000, then half a cosine to peak / 100."""
    lr, wd, beta1, beta2, eps, warmup, steps = 3e-3, 0.3, 0.9, 0.95, 1e-6, 3, 7
    T.main(train_arguments(shapes, tmp_path, "--lr", lr, "--wd", wd, "--beta2", beta2, "--eps", eps,
                           "--warmup", warmup, "--steps", steps))
    moments, rates = {}, []
    for n, step in enumerate(recorded[0]):
        rate = lr / 1000 + n / warmup * (lr - lr / 1000) if n < warmup else \
            lr / 100 + (lr - lr / 100) * (1 + math.cos(
                math.pi * (n - warmup) / (steps - warmup))) / 2
        rates.append(rate)
        for p, (before, gradient, after) in step.items():
            m, v = moments.get(p, (0, 0))
            m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient ** 2
            moments[p] = m, v
            expected = before * (1 - rate * wd * (p.ndim > 1)) - rate * (
                m / (1 - beta1 ** (n + 1))) / ((v / (1 - beta2 ** (n + 1))).sqrt() + eps)
            assert torch.allclose(after, expected, rtol=0, atol=2e-2 * rate + 1e-7), (n, p.shape)
    model = T.load_checkpoint(str(tmp_path / "checkpoint.pt"))[0]
    assert n == steps - 1 and len(moments) == len(list(model.parameters()))
    np.testing.assert_allclose([r["lr"] for r in read_jsonl(tmp_path / "metrics.jsonl")], rates)


def test_the_temperature_stays_above_a_hundredth(shapes, tmp_path, recorded):
    """1 / tau is at most 100 and at least 1, wherever a step leads."""
    for value, expected in ((5.0, 100), (-1.0, 1)):
        recorded[1].change = staticmethod(lambda p: p.fill_(value) if p.ndim == 0 else None)
        out = tmp_path / str(value)
        T.main(train_arguments(shapes, out, "--steps", 3))
        scales = [row["logit_scale"] for row in read_jsonl(out / "metrics.jsonl")]
        assert scales == pytest.approx([expected] * 3)


def test_bf16_is_bf16(shapes, tmp_path):
    first = {}
    for precision in ("fp32", "bf16"):
        T.main(train_arguments(shapes, tmp_path / precision, "--precision", precision, "--steps", 1,
                               "--warmup", 0))
        first[precision] = read_jsonl(tmp_path / precision / "metrics.jsonl")[0]["loss"]
    assert 1e-5 < abs(first["fp32"] - first["bf16"]) < 0.03


def test_initial_weights_have_openais_scales():
    torch.manual_seed(0)
    W, layers = 192, 6
    model = T.CLIP(T.Config(embed_dim=160, image_size=64, patch_size=8, vision_width=W,
                            vision_layers=layers, vision_heads=3, text_width=128, text_layers=4,
                            text_heads=2, vocab_size=3000))
    expected = {"token_embedding.weight": 0.02, "positional_embedding": 0.01,
                "text_projection": 128 ** -0.5, "visual.proj": W ** -0.5,
                "visual.class_embedding": W ** -0.5, "visual.positional_embedding": W ** -0.5}
    for tower, width, n in (("visual.transformer", W, layers), ("transformer", 128, 4)):
        for block in (f"{tower}.resblocks.{i}" for i in range(n)):
            expected |= {f"{block}.attn.in_proj_weight": width ** -0.5,
                         f"{block}.attn.out_proj.weight": width ** -0.5 * (2 * n) ** -0.5,
                         f"{block}.mlp.c_fc.weight": (2 * width) ** -0.5,
                         f"{block}.mlp.c_proj.weight": width ** -0.5 * (2 * n) ** -0.5}
    state = model.state_dict()
    for name, std in expected.items():
        few = state[name].numel() < 1000
        assert state[name].std().item() == pytest.approx(std, rel=0.2 if few else 0.03), name
        assert abs(state[name].mean().item()) < 5 * std / state[name].numel() ** 0.5, name
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_an_epoch_is_every_row_once_in_an_order_of_its_own(shapes, tmp_path, monkeypatch):
    """3 epochs of 16 rows in batches of 5: 3 steps an epoch, without the last row of the order."""
    names, seen, real = {row["image"] for row in read_jsonl(shapes / "captions.jsonl")}, {}, \
        T.open_image
    for seed in (0, 1):
        opened = seen[seed] = []
        monkeypatch.setattr(T, "open_image",
                            lambda root, name: opened.append(name) or real(root, name))
        T.main(without(train_arguments(shapes, tmp_path / str(seed), "--batch-size", 5, "--epochs",
                                       3, "--text", "alt", "--seed", seed), "--steps"))
        assert len(opened) == 45
        epochs = [opened[at:at + 15] for at in (0, 15, 30)]
        assert all(len(set(epoch)) == 15 and set(epoch) < names for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert seen[0][:15] != seen[1][:15]
    rows = read_jsonl(tmp_path / "0" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == pytest.approx([n / 3 for n in range(1, 10)], abs=1e-4)


def test_the_crop_is_torchvisions(places):
    """RandomResizedCrop(0.5 to 1, 3:4 to 4:3): the same deciles of area, ratio and centre, and no
    flip, since captions say left and right."""
    theirs = v2.RandomResizedCrop(32, (0.5, 1.0), (3 / 4, 4 / 3))
    drawn = [theirs.make_params([places.image]) for _ in range(3000)]
    expected = places.features([(p["left"], p["top"], p["width"], p["height"]) for p in drawn])
    ours = places.features([places.box_of(T.augment_crop(places.image, 32)) for _ in range(3000)])
    assert (ours["area"] > 0).all()
    deciles = np.arange(0.1, 1, 0.1)
    for name, tolerance in (("area", 0.02), ("ratio", 0.03), ("x", 3), ("y", 3)):
        np.testing.assert_allclose(np.quantile(ours[name], deciles),
                                   np.quantile(expected[name], deciles), atol=tolerance,
                                   err_msg=name)
    long = Image.new("RGB", (500, 20))
    assert T.augment_crop(long, 32).size == (32, 32)
