"""The recipe of a run, against plain formulas and torchvision's distributions: what a mistake changes without a crash."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import train_clip as T
from conftest import read_jsonl, train_arguments


# --- the optimizer ----------------------------------------------------------------------------------------------------

@pytest.fixture
def recorded(monkeypatch):
    """Steps of AdamW that leave [{parameter: (before, gradient, after)}]; its weights are then replaced by `change`."""
    steps = []

    class Recorded(torch.optim.AdamW):
        change = staticmethod(lambda parameter: None)

        def step(self):
            parameters = [p for group in self.param_groups for p in group["params"]]
            before = [(p.detach().double().clone(), p.grad.double().clone()) for p in parameters]
            super().step()
            steps.append({p: (*b, p.detach().double().clone()) for p, b in zip(parameters, before)})
            with torch.no_grad():
                for p in parameters:
                    self.change(p)

    monkeypatch.setattr(T.torch.optim, "AdamW", Recorded)
    return steps, Recorded


def test_adamw_with_warm_up_cosine_and_decay_of_matrices_alone(shapes, tmp_path, recorded):
    """Every step of every parameter: decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2) at the rate of
    the step, linear from peak / 1000 over the warm-up, then half a cosine to peak / 100."""
    lr, wd, beta1, beta2, eps, warmup, steps = 3e-3, 0.3, 0.9, 0.95, 1e-6, 3, 7
    T.main(train_arguments(shapes, tmp_path / "out", "--lr", lr, "--wd", wd, "--beta2", beta2, "--eps", eps, "--warmup", warmup,
                           "--steps", steps))
    moments = {}
    for n, step in enumerate(recorded[0]):
        rate = lr / 1000 + n / warmup * (lr - lr / 1000) if n < warmup else \
            lr / 100 + (lr - lr / 100) * (1 + math.cos(math.pi * (n - warmup) / (steps - warmup))) / 2
        for p, (before, gradient, after) in step.items():
            m, v = moments.get(p, (0, 0))
            moments[p] = m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient ** 2
            expected = before * (1 - rate * wd * (p.ndim > 1))
            expected = expected - rate * (m / (1 - beta1 ** (n + 1))) / ((v / (1 - beta2 ** (n + 1))).sqrt() + eps)
            assert torch.allclose(after, expected, rtol=0, atol=2e-2 * rate + 1e-7), (n, p.shape, (after - expected).abs().max() / rate)
    assert n == steps - 1 and len(moments) == len(list(T.load_checkpoint(str(tmp_path / "out" / "checkpoint.pt"))[0].parameters()))
    rates = [row["lr"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")]
    np.testing.assert_allclose(rates[:4], [lr / 1000, lr / 1000 + (lr - lr / 1000) / 3, lr / 1000 + 2 * (lr - lr / 1000) / 3, lr])


def test_the_temperature_stays_above_a_hundredth(shapes, tmp_path, recorded):
    """1 / tau is at most 100 and at least 1, wherever a step leads."""
    for value, expected in ((5.0, 100), (-1.0, 1)):
        recorded[1].change = staticmethod(lambda p: p.fill_(value) if p.ndim == 0 else None)
        T.main(train_arguments(shapes, tmp_path / str(value), "--steps", 3))
        assert [row["logit_scale"] for row in read_jsonl(tmp_path / str(value) / "metrics.jsonl")] == pytest.approx([expected] * 3)


def test_gradients_in_chunks_are_those_of_the_whole_batch():
    """Also the temperature's, which every chunk reports: AdamW would hide a constant factor."""
    torch.manual_seed(0)
    model = T.CLIP(T.Config(**{**T.PRESETS["nano"], "image_size": 32}, vocab_size=50, eot_id=49))
    piece = {"images": torch.randint(0, 256, (12, 1, 3, 32, 32), dtype=torch.uint8), "drawn": torch.zeros(12, dtype=torch.long),
             "tokens": torch.cat([torch.randint(0, 49, (12, 1, 7)), torch.full((12, 1, 1), 49)], -1), "counts": Counter(), "bad": []}
    found = []
    for micro_batch in (12, 5):
        model.zero_grad()
        T.backward(model, model, lambda drawn, scale, images, texts: T.clip_loss(images, texts[:, 0], scale), T.join([piece], "cpu", micro_batch, 49),
                   lambda: torch.autocast("cpu", enabled=False))
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=2e-4, atol=2e-5 * gradient.abs().max().item(), msg=name)
    assert found[0]["logit_scale"].abs() > 1e-4


def test_bf16_is_bf16(shapes, tmp_path):
    first = {}
    for precision in ("fp32", "bf16"):
        T.main(train_arguments(shapes, tmp_path / precision, "--precision", precision, "--steps", 1, "--warmup", 0))
        first[precision] = read_jsonl(tmp_path / precision / "metrics.jsonl")[0]["loss"]
    assert 1e-5 < abs(first["fp32"] - first["bf16"]) < 0.03


def test_initial_weights_have_openais_scales():
    torch.manual_seed(0)
    W, layers = 192, 6
    model = T.CLIP(T.Config(embed_dim=160, image_size=64, patch_size=8, vision_width=W, vision_layers=layers, vision_heads=3,
                            text_width=128, text_layers=4, text_heads=2, vocab_size=3000, eot_id=2999))
    expected = {"token_embedding.weight": 0.02, "positional_embedding": 0.01, "text_projection": 128 ** -0.5, "visual.proj": W ** -0.5,
                "visual.class_embedding": W ** -0.5, "visual.positional_embedding": W ** -0.5}
    for tower, width, n in (("visual.transformer", W, layers), ("transformer", 128, 4)):
        for i in range(n):
            block = f"{tower}.resblocks.{i}"
            expected |= {f"{block}.attn.in_proj_weight": width ** -0.5, f"{block}.attn.out_proj.weight": width ** -0.5 * (2 * n) ** -0.5,
                         f"{block}.mlp.c_fc.weight": (2 * width) ** -0.5, f"{block}.mlp.c_proj.weight": width ** -0.5 * (2 * n) ** -0.5}
    state = model.state_dict()
    for name, std in expected.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.2 if state[name].numel() < 1000 else 0.03), name
        assert abs(state[name].mean().item()) < 5 * std / state[name].numel() ** 0.5, name
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    for name in state:
        if name.endswith("bias") and "conv1" not in name and "out_proj" not in name and ".mlp." not in name:
            assert not state[name].any(), name


# --- the order of the rows --------------------------------------------------------------------------------------------

def order(shapes, out, monkeypatch, *arguments):
    """The images that a run opens, in order."""
    opened, real = [], T.open_image
    monkeypatch.setattr(T, "open_image", lambda root, name: opened.append(name) or real(root, name))
    command = train_arguments(shapes, out, *arguments)
    at = command.index("--steps")
    T.main(command[:at] + command[at + 2:])
    monkeypatch.setattr(T, "open_image", real)
    return opened[1:]  # the first is a look at the root, before anything else


def test_an_epoch_is_every_row_once_in_an_order_of_its_own(shapes, tmp_path, monkeypatch):
    """3 epochs of 16 rows in batches of 5: 3 steps an epoch, of which the last row in the order has no part."""
    names = {row["image"] for row in read_jsonl(shapes / "captions.jsonl")}
    seen = {seed: order(shapes, tmp_path / str(seed), monkeypatch, "--batch-size", 5, "--epochs", 3, "--text", "alt", "--seed", seed)
            for seed in (0, 1)}
    for opened in seen.values():
        assert len(opened) == 45
        epochs = [opened[at:at + 15] for at in (0, 15, 30)]
        assert all(len(set(epoch)) == 15 and set(epoch) < names for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert seen[0] != seen[1] and seen[0][:15] != seen[1][:15]
    rows = read_jsonl(tmp_path / "0" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == pytest.approx([n / 3 for n in range(1, 10)], abs=1e-4)


# --- crops and views --------------------------------------------------------------------------------------------------

SIZE = (240, 180)  # width, height


@pytest.fixture(scope="module")
def places():
    """An image whose red is a pixel's column and whose green is its row: a crop of it shows where it was taken."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def box_of(crop):
    """[S, S] crop of `places` -> left, top, width, height in pixels; a width below zero is a flip"""
    pixels = np.asarray(crop, float)
    S = len(pixels)
    w, h = ((pixels[:, -2, 0] - pixels[:, 1, 0]).mean() * S / (S - 3), (pixels[-2, :, 1] - pixels[1, :, 1]).mean() * S / (S - 3))
    return pixels[:, :, 0].mean() - w / 2, pixels[:, :, 1].mean() - h / 2, w, h


def features(boxes):
    left, top, w, h = np.array(boxes).T
    return {"area": w * h / SIZE[0] / SIZE[1], "ratio": np.log(w / h), "x": left + w / 2, "y": top + h / 2}


def test_the_crop_is_torchvisions(places):
    """RandomResizedCrop(scale 0.5 to 1, ratio 3:4 to 4:3) without a flip: the same deciles of area, ratio and centre."""
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(32, (0.5, 1.0), (3 / 4, 4 / 3))
    params = [theirs.make_params([places]) for _ in range(3000)]
    expected = features([(p["left"], p["top"], p["width"], p["height"]) for p in params])
    ours = features([box_of(T.augment_crop(places, 32, np.random.default_rng(i))) for i in range(3000)])
    assert (ours["area"] > 0).all()  # no flip: captions say left and right
    for name, tolerance in (("area", 0.02), ("ratio", 0.03), ("x", 3), ("y", 3)):
        deciles = np.arange(0.1, 1, 0.1)
        np.testing.assert_allclose(np.quantile(ours[name], deciles), np.quantile(expected[name], deciles), atol=tolerance, err_msg=name)


def test_slips_views_are_strong_and_the_image_itself_is_not(shapes, places, tmp_path):
    """Of three views the first is LaCLIP's crop; the others are flipped in half, grey in a fifth, jittered, and down to 0.08."""
    places.save(tmp_path / "places.png")
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    rows = [{"image": "places.png", "alt": "red bar"}]
    data = T.Samples(rows, str(tmp_path), {"alt": 1}, "random", T.augment_crop, 32, tokenizer, 0, 1, False, True)
    views = np.stack([data[i]["images"].numpy() for i in range(600)]).astype(float)  # [N, 3, 3, S, S]
    mine = features([box_of(view[0].transpose(1, 2, 0)) for view in views])
    assert (mine["area"] > 0.45).all() and (views[:, 0, 2] < 3).all()  # blue stays 0
    for v in (1, 2):
        grey = (views[:, v, 0] == views[:, v, 1]).all((1, 2))
        assert abs(grey.mean() - 0.2) < 0.07
        flipped = views[:, v, 0, :, 1] .mean(1) > views[:, v, 0, :, -2].mean(1)
        assert abs(flipped.mean() - 0.5) < 0.08
        assert (views[:, v, 2].max((1, 2)) > 3).mean() > 0.5  # jitter brings blue in
        spread = (views[:, v, 0].max((1, 2)) - views[:, v, 0].min((1, 2)))
        assert np.quantile(spread, 0.2) < 0.75 * np.quantile(views[:, 0, 0].max((1, 2)) - views[:, 0, 0].min((1, 2)), 0.2)
    assert not np.array_equal(views[:, 1], views[:, 2])


def test_slips_loss_is_added_with_weight_1(shapes, tmp_path, monkeypatch):
    parts = {"clip_loss": [], "simclr_loss": []}
    for name, found in parts.items():
        real = getattr(T, name)
        monkeypatch.setattr(T, name, lambda *a, real=real, found=found: found.append(real(*a)) or found[-1])
    T.main(train_arguments(shapes, tmp_path / "out", "--ssl", "--steps", 2, "--warmup", 0))
    for row, a, b in zip(read_jsonl(tmp_path / "out" / "metrics.jsonl"), *parts.values(), strict=True):
        assert row["loss"] == pytest.approx(a.item() + b.item()) and b.item() > 1
