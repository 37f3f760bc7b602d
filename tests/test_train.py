"""train_clip.py: equal to the references, on any number of ranks, exact after a restart."""
import ast
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import train_clip as T
from conftest import (ROOT, assert_mistake, assert_same_runs, losses, random_texts, read_jsonl, run,
                      run_cases, train, train_arguments, without, worker_of)


def test_sizes():
    """The file, its functions and its columns are as short as they shall stay."""
    text = (ROOT / "train_clip.py").read_text()
    assert len(text.splitlines()) <= 880 and max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (110 if node.name == "train" else 60), node.name


def test_it_imports_nothing_of_the_project_but_by_a_flag():
    for node in ast.parse((ROOT / "train_clip.py").read_text()).body:
        names = [node.module] if isinstance(node, ast.ImportFrom) else [
            alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[0] in ("data", "tests") for name in names)


# --- the model equals transformers' ---------------------------------------------------------------

def from_hf(hf):
    """A Hugging Face CLIPModel's weights under OpenAI CLIP's names."""
    state, out = hf.state_dict(), {}
    names = {"vision_model.embeddings.class_embedding": "visual.class_embedding",
             "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
             "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
             "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
             "text_model.embeddings.position_embedding.weight": "positional_embedding",
             "logit_scale": "logit_scale"}
    layers = {"vision_model.pre_layrnorm": "visual.ln_pre",
              "vision_model.post_layernorm": "visual.ln_post",
              "text_model.final_layer_norm": "ln_final"}
    for theirs, ours, config in (("vision_model", "visual.", hf.config.vision_config),
                                 ("text_model", "", hf.config.text_config)):
        for i in range(config.num_hidden_layers):
            a, b = f"{theirs}.encoder.layers.{i}", f"{ours}transformer.resblocks.{i}"
            layers |= {f"{a}.self_attn.out_proj": f"{b}.attn.out_proj",
                       f"{a}.layer_norm1": f"{b}.ln_1", f"{a}.layer_norm2": f"{b}.ln_2",
                       f"{a}.mlp.fc1": f"{b}.mlp.c_fc", f"{a}.mlp.fc2": f"{b}.mlp.c_proj"}
            for kind in ("weight", "bias"):
                out[f"{b}.attn.in_proj_{kind}"] = torch.cat(
                    [state[f"{a}.self_attn.{n}_proj.{kind}"] for n in "qkv"])
    for kind in ("weight", "bias"):
        names |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in layers.items()}
    out |= {ours: state[theirs] for theirs, ours in names.items()}
    return out | {"visual.proj": state["visual_projection.weight"].T,
                  "text_projection": state["text_projection.weight"].T}


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_both_towers_equal_transformers(activation):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                vocab_size=500, max_position_embeddings=77, hidden_act=activation,
                bos_token_id=498, eos_token_id=499)
    vision = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=2, image_size=64,
                  num_attention_heads=3, patch_size=16, hidden_act=activation)
    hf = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)).eval()
    for parameter in hf.parameters():  # their biases begin at 0, which would hide a lost one
        torch.nn.init.normal_(parameter, std=0.1)
    quick = activation == "quick_gelu"
    ours = T.CLIP(T.Config(embed_dim=48, image_size=64, patch_size=16, vision_width=96,
                           vision_layers=2, vision_heads=3, text_width=64, text_layers=3,
                           text_heads=4, vocab_size=500, vision_quick_gelu=quick,
                           text_quick_gelu=quick))
    ours.load_state_dict(from_hf(hf))
    images, tokens = torch.randn(5, 3, 64, 64), torch.randint(1, 498, (5, 20))
    ends = (19, 4, 11, 1, 7)  # what follows the end token has no effect
    for row, end in zip(tokens, ends):
        row[end] = 499
    texts = T.pack([row[:end + 1] for row, end in zip(tokens, ends)])
    with torch.inference_mode():
        a, b = ours.encode_image(images), ours.encode_text(texts)
        theirs = hf(input_ids=tokens, pixel_values=images)
        torch.testing.assert_close(normalize(a), theirs.image_embeds, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(normalize(b), theirs.text_embeds, atol=1e-5, rtol=1e-4)
        logits = ours.logit_scale.exp() * normalize(a) @ normalize(b).T
        torch.testing.assert_close(logits, theirs.logits_per_image, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)],
                         ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("L", [9, 130])
def test_attention_on_the_cpu_equals_torchs(L, causal, dtype, tolerance):
    """Texts and images; in bf16 by the formula if there are fewer than 128 tokens."""
    torch.manual_seed(0)
    ours, theirs = T.Attention(48, 4), torch.nn.MultiheadAttention(48, 4, batch_first=True)
    torch.nn.init.normal_(ours.in_proj_weight, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, L, 48)
    mask = torch.full((L, L), -math.inf).triu(1) if causal else None
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        texts = T.pack([torch.arange(L)] * 3)
        got = ours(x.flatten(0, 1), texts).view(3, L, 48) if causal else ours(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_bit_in_every_run(dtype):
    """Also with several threads, which must not add a gradient up in the order they come in."""
    torch.manual_seed(0)
    model = T.CLIP(T.Config(**T.PRESETS["nano-conv"] | {"vocab_size": 500}))
    texts, threads = T.pack(random_texts(256)), torch.get_num_threads()
    images, seen = torch.randint(0, 256, (64, 1, 3, 32, 32)).float(), []
    torch.set_num_threads(4)
    try:
        for _ in range(8):
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                _, image_features, text_features = model(images, texts)
            (image_features.sum() + text_features.pow(3).sum()).backward()
            seen.append({name: p.grad.clone() for name, p in model.named_parameters()
                         if p.grad is not None})
    finally:
        torch.set_num_threads(threads)
    assert "positional_embedding" in seen[0]
    for name, gradient in seen[0].items():
        assert all(torch.equal(gradient, other[name]) for other in seen), name


@pytest.mark.parametrize("preset", ["nano", "nano-conv"])
def test_a_text_and_an_image_do_not_depend_on_their_neighbours(preset):
    torch.manual_seed(0)
    model, texts = T.CLIP(T.Config(**T.PRESETS[preset], vocab_size=500)), random_texts(9)
    alone = torch.cat([model.encode_text(T.pack([text])) for text in texts])
    torch.testing.assert_close(model.encode_text(T.pack(texts)), alone, atol=1e-5, rtol=1e-4)
    images = torch.randn(5, 3, 32, 32)
    alone = torch.cat([model.encode_image(image[None]) for image in images])
    torch.testing.assert_close(model.encode_image(images), alone, atol=1e-5, rtol=1e-4)


def test_packed_texts():
    """From the shortest to the longest; `ends` are in the order in which the texts came."""
    texts = T.pack([torch.tensor(ids) for ids in ([9, 4, 5, 8], [9, 8], [9, 3, 2, 8], [9, 8])])
    assert texts.ids.tolist() == [9, 8, 9, 8, 9, 4, 5, 8, 9, 3, 2, 8]
    assert texts.positions.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
    assert texts.starts.tolist() == [0, 2, 4, 8, 12] and texts.starts.dtype == torch.int32
    assert texts.ends.tolist() == [7, 1, 11, 3] and texts.groups == [(2, 2), (4, 2)]


# --- the losses equal their formulas --------------------------------------------------------------

def plain_nce(queries, keys, scale):
    """-1/N sum_i log(exp(s q_i k_i) / sum_k exp(s q_i k_k)), as both papers write it."""
    total = 0
    for i in range(len(queries)):
        similarity = [scale * (queries[i] * keys[k]).sum() for k in range(len(keys))]
        total = total - torch.log(similarity[i].exp() / sum(s.exp() for s in similarity))
    return total / len(queries)


def unit(*shape):
    x = torch.randn(*shape, dtype=torch.float64)
    return (x / x.norm(dim=-1, keepdim=True)).requires_grad_()


def same_value_and_gradients(loss, plain, *inputs):
    torch.testing.assert_close(loss, plain, atol=1e-12, rtol=1e-10)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_losses_equal_their_formulas():
    torch.manual_seed(0)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    images, texts, drawn = unit(5, 8), unit(5, 3, 8), torch.tensor([0, 2, 1, 1, 0])
    plain = (plain_nce(images, texts[:, 0], scale) + plain_nce(texts[:, 0], images, scale)) / 2
    loss = T.clip_loss(images, texts[:, 0], scale)
    same_value_and_gradients(loss, plain, images, texts, scale)
    l_i = sum(plain_nce(images, texts[:, j], scale) for j in range(3)) / 3  # M + 1 = 3 texts
    l_t = plain_nce(torch.stack([texts[i, drawn[i]] for i in range(5)]), images, scale)
    loss = T.multitext_loss(images, texts, drawn, scale)
    same_value_and_gradients(loss, (l_i + l_t) / 2, images, texts, scale)


def test_multitext_of_equal_texts_is_the_clip_loss():
    """What the mean, 1/(M + 1), is for. 1/M would weigh images more."""
    torch.manual_seed(0)
    images, texts, scale = unit(5, 8), unit(5, 8), torch.tensor(9.0, dtype=torch.float64)
    copies, drawn = texts[:, None].expand(5, 4, 8), torch.tensor([3, 1, 0, 2, 2])
    loss = T.multitext_loss(images, copies, drawn, scale)
    torch.testing.assert_close(loss, T.clip_loss(images, texts, scale))


# --- the rows, their order, and what is drawn -----------------------------------------------------

@pytest.mark.parametrize("shuffle", ["full", "blocks"])
@pytest.mark.parametrize("n", [1, 2, 999, 1000, 2500, 300_123])
def test_an_epochs_order(n, shuffle):
    """Every row once, in another order in the next epoch; blocks: at any time of 257 blocks."""
    a, b = (T.epoch_order(n, shuffle, 7, epoch) for epoch in range(2))
    assert sorted(a.tolist()) == sorted(b.tolist()) == [*range(n)]
    assert n < 100 or not np.array_equal(a, b)
    assert n < 999 or max(abs(np.corrcoef(a, other)[0, 1]) for other in (b, np.arange(n))) < 0.2
    if shuffle == "blocks":
        assert all(len(set(a[at:at + 256_000] // 1000)) <= 257 for at in range(0, n, 256_000))


@pytest.mark.parametrize("rank, world, n", [(0, 1, 600), (1, 3, 200), (2, 4, 7)])
def test_pieces_of_a_step_are_this_ranks_share(shapes, tmp_path, monkeypatch, rank, world, n):
    monkeypatch.setattr(T, "rank", lambda: rank)
    rows, batch = 3 * n * world + 1, n * world
    args = T.parse_args(train_arguments(shapes, tmp_path, "--batch-size", batch))
    for start in (0, 2):
        pieces = [*T.pieces(args, rows, start, 4, world)]
        assert max(map(len, pieces)) <= 256
        samples = [sample for piece in pieces for sample in piece]
        places = [(step // 3, step % 3 * batch + rank * n + i) for step in range(start, 4)
                  for i in range(n)]
        assert [sample[:2] for sample in samples] == places
        orders = [T.epoch_order(rows, "full", 0, epoch) for epoch in range(2)]
        assert all(row == orders[epoch][place] for epoch, place, row in samples)


def test_rows_are_read_where_they_lie(tmp_path):
    first, empty, second = (tmp_path / name for name in ("a.jsonl", "e.jsonl", "b.jsonl"))
    first.write_bytes('\ufeff{"n": 0, "t": "\u2028 \u00e9"}\n\n[1]\n{"n": 3}'.encode())
    empty.write_text("")
    second.write_text('{"n": 4}\n')
    rows = T.Rows([str(path) for path in (first, empty, second)])
    assert len(rows) == 5 and [rows[i]["n"] for i in (0, 3, 4)] == [0, 3, 4]
    with pytest.raises(ValueError):
        rows[1]
    second.write_text('{"n": 5}\n')
    assert T.Rows([str(first), str(second)]).checksum != rows.checksum


def samples(shapes, *arguments, rows=None):
    """T.Samples of a command, over the shapes or `rows`, and its tokenizer's decoder"""
    args = T.parse_args(train_arguments(shapes, "out", *arguments))
    tokenizer = T.Tokenizer.load(args.tokenizer)
    data = T.Samples(args, rows or T.Rows(args.captions), tokenizer, 32)
    return data, lambda ids: tokenizer.tokenizer.decode(ids.tolist()).strip()


def texts_drawn(shapes, row, *arguments, n=100):
    """The texts of n draws from one row, each a tuple, and how many were replaced"""
    data, decode = samples(shapes, *arguments, rows=[{"image": "red-bar.png", **row}])
    drawn = [data[0, place, 0] for place in range(n)]
    return [tuple(map(decode, sample[1])) for sample in drawn], sum(sample[3] for sample in drawn)


def test_texts_are_drawn_by_weight_among_those_present(shapes):
    row = {"alt": "red bar", "rewrite_a": "a red bar", "vec": ["x y", None, "z w"]}
    texts, _ = texts_drawn(shapes, row, "--text", "alt", "rewrite_a=3", "rewrite_b=50", "vec=0",
                           "no=5", n=2000)
    assert set(texts) == {("red bar",), ("a red bar",)}
    assert abs(texts.count(("a red bar",)) / 2000 - 0.75) < 0.04  # four standard deviations
    assert set(texts_drawn(shapes, row, "--text", "vec")[0]) == {("x y",), ("z w",)}
    row = {"alt": [], "r": " ", "spare": "z z"}  # weight 0: where the others are missing
    assert set(texts_drawn(shapes, row, "--text", "alt", "r", "spare=0")[0]) == {("z z",)}


@pytest.mark.parametrize("alt", ["plain text", ["first plain", "second plain", "third plain"]])
def test_a_field_is_drawn_before_its_entry(alt):
    """However many texts a field has, its weight is its share, which its texts share equally."""
    row = {"alt": alt, "short": ["s 0", "s 1"], "long": [f"l {i}" for i in range(6)], "zero": "z z"}
    fields, n = {"alt": 1, "short": 1, "long": 2, "zero": 0}, 4000
    drawn = [T.draw_texts(row, fields, np.random.default_rng(i)) for i in range(n)]
    found = [texts[k] for texts, k, _ in drawn]
    alts = alt if isinstance(alt, list) else [alt]
    expected = {f"s {i}": 1 / 8 for i in range(2)} | {f"l {i}": 1 / 12 for i in range(6)}
    expected |= {text: 1 / 4 / len(alts) for text in alts}
    assert set(found) == expected.keys()
    for text, share in expected.items():  # four standard deviations
        assert abs(found.count(text) / n - share) < 4 * (share * (1 - share) / n) ** 0.5, text


def test_one_word_gives_way_to_alt(shapes):
    """Not a sentence of a script without blanks between words: Chinese, Japanese, Thai."""
    one_word = {"alt": "red bar", "r": "bar"}
    assert texts_drawn(shapes, one_word, "--text", "r", n=1) == ([("red bar",)], 1)
    assert texts_drawn(shapes, {**one_word, "alt": None}, "--text", "r", n=1) == ([("bar",)], 0)
    assert texts_drawn(shapes, {"alt": "red"}, "--text", "alt", n=1) == ([("red",)], 0)
    sentences = [
        "\u684c\u5b50\u4e0a\u653e\u7740\u4e00\u4e2a\u7ea2\u8272\u7684\u676f\u5b50",
        "\u8d64\u3044\u81ea\u8ee2\u8eca\u304c\u3042\u308a\u307e\u3059",
        "\u0e23\u0e16\u0e22\u0e19\u0e15\u0e4c\u0e2a\u0e35\u0e41\u0e14\u0e07\u0e27\u0e32\u0e07"]
    assert texts_drawn(shapes, {"alt": "red bar", "r": sentences}, "--text", "r")[1] == 0
    for word in ("caf\u00e9", "\u0441\u043e\u0431\u0430\u043a\u0430"):
        assert T.draw_texts({"alt": "x y", "r": word}, {"r": 1}, np.random.default_rng(0))[2]


def test_multitext_has_the_text_of_every_field(shapes):
    """A missing one is the row's first. One index serves all lists of a length."""
    flags = "--loss", "multitext", "--text"
    row = {"alt": None, "a": "a red bar", "b": "one bar in red"}
    texts, _ = texts_drawn(shapes, row, *flags, "alt", "a", "b")
    assert set(texts) == {("a red bar", "a red bar", "one bar in red")}
    row = {"alt": "red bar", "a": "bar", "b": "one bar in red"}  # whichever is drawn
    assert set(texts_drawn(shapes, row, *flags, "a", "b")[0]) == {("red bar", "one bar in red")}
    row = {"alt": ["red bar", "green cross", "blue frame"], "vec": "yellow square",
           "vecap": ["a red bar", None, "a blue frame"]}
    texts, _ = texts_drawn(shapes, row, *flags, "alt", "vecap", "vec")
    assert set(texts) == {("red bar", "a red bar", "yellow square"),
                          ("green cross", "green cross", "yellow square"),
                          ("blue frame", "a blue frame", "yellow square")}
    texts, _ = texts_drawn(shapes, row, "--text", "vecap")  # its null is never drawn
    assert set(texts) == {("a red bar",), ("a blue frame",)}


def test_a_sample_is_a_function_of_its_place(shapes):
    """Whatever was read before it. Another place or epoch has another crop."""
    (a, _), (b, _) = (samples(shapes, "--ssl") for _ in range(2))
    b[0, 3, 2], b[1, 5, 4], torch.rand(7)
    one, same, epoch, place = a[1, 5, 9], b[1, 5, 9], a[2, 5, 9], a[1, 6, 9]
    assert torch.equal(one[0], same[0]) and torch.equal(one[1][0], same[1][0])
    assert not torch.equal(one[0], epoch[0]) and not torch.equal(one[0], place[0])


# --- images and texts -----------------------------------------------------------------------------

TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:1200, :1600]
    waves = np.stack([128 + 100 * np.sin(x / 90 + k) * np.cos(y / 70) for k in range(3)], -1)
    picture = Image.fromarray(waves.astype(np.uint8))
    for name, tags in (("large", b""), ("lying", TURNED)):
        picture.save(tmp_path / f"{name}.jpg", quality=95, exif=tags)
        picture.save(tmp_path / f"{name}.png", exif=tags)
        for seed in range(5):
            crops = []
            for kind in (".jpg", ".png"):
                torch.manual_seed(seed)
                crops.append(T.augment_crop(T.open_image(str(tmp_path), name + kind), 64))
            small, whole = (np.asarray(crop, float) for crop in crops)
            assert np.abs(small - whole).mean() < 1.5 and small.shape == (64, 64, 3)
    jpeg = T.open_image(str(tmp_path), "large.jpg")
    T.augment_crop(jpeg, 64)
    assert jpeg.size[0] <= 800  # decoded at a half or less


def test_pictures_of_every_kind(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("P", (8, 8)).save(tmp_path / "palette.png", transparency=0)
    Image.new("CMYK", (8, 8)).save(tmp_path / "cmyk.jpg")
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    grey = np.full((8, 8), 65535 // 2, np.uint16)
    grey[0] = 300
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "floats.tif")
    Image.new("RGB", (8, 4)).save(tmp_path / "exif.jpg", exif=TURNED)
    Image.new("RGB", (8, 4)).save(tmp_path / "broken.jpg", exif=TURNED[:-9])
    Image.new("RGB", (2000, 1)).save(tmp_path / "thread.png")
    blob = (tmp_path / "grey.png").read_bytes()
    (tmp_path / "shard.tar").write_bytes(b"-" * 100 + blob + b"-" * 100)
    os.symlink(tmp_path / "grey.png", tmp_path / "link.png")
    (tmp_path / "within").mkdir()

    def read(name, root=tmp_path):
        return T.to_rgb(T.open_image(str(root), name))

    white = (255, 255, 255)
    assert read("clear.png").getpixel((0, 0)) == read("palette.png").getpixel((0, 0)) == white
    assert {read(f"{name}.{kind}").mode for name, kind in (
        ("cmyk", "jpg"), ("grey", "png"), ("link", "png"))} == {"RGB"}
    assert read("exif.jpg").size == (4, 8) and read("broken.jpg").size == (8, 4)
    assert read(f"shard.tar@100+{len(blob)}").size == (8, 8)
    assert read(str(tmp_path / "grey.png")).size == (8, 8)
    for name in ("floats.tif", "deep.png", "thread.png", None, "missing.png"):
        pytest.raises((OSError, ValueError, TypeError), read, name)
    for name in ("/etc/hostname", "../grey.png", str(tmp_path / "grey.png"), "x/../../grey.png"):
        with pytest.raises(ValueError, match="outside --image-root"):
            read(name, tmp_path / "within")


def test_the_evaluation_transform(tmp_path):
    """OpenAI's: Pillow resizes. VeCLIP's: floats are resized, without antialias."""
    rng, S = np.random.default_rng(0), 32
    for height, width in ((50, 33), (33, 51), (32, 32), (20, 90)):
        pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
        w, h = (S, S * height // width) if width < height else (S * width // height, S)
        resized = {
            "bicubic": np.asarray(Image.fromarray(pixels).resize((w, h), Image.BICUBIC)),
            "bilinear": np.asarray(Image.fromarray(pixels).resize((w, h), Image.BILINEAR)),
            "bilinear-unsmoothed": torch.nn.functional.interpolate(
                torch.tensor(pixels).permute(2, 0, 1)[None].float(), (h, w), mode="bilinear",
                antialias=False)[0].permute(1, 2, 0).numpy()}
        left, top = round((w - S) / 2), round((h - S) / 2)
        for resize, array in resized.items():
            config = T.Config(image_size=S, resize=resize)
            expected = (array[top:top + S, left:left + S] / 255 - config.mean) / config.std
            got = T.eval_transform(config)(Image.fromarray(pixels)).permute(1, 2, 0).numpy()
            np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=resize)


def test_tokenizer(shapes):
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    end = tokenizer.tokenizer.get_vocab_size() - 1
    hostile = ["", "<|endoftext|>", "red <|startoftext|> bar", "a\0b\u2028c\r\n", "\ud800",
               "red " * 50_000]
    for ids in map(tokenizer.encode, hostile):
        assert ids[0] == end - 1 and ids[-1] == end and len(ids) <= 77
        assert end not in ids[:-1] and end - 1 not in ids[1:]
    assert len(tokenizer.encode(hostile[-1])) == 77
    one, several = tokenizer("red bar"), tokenizer(["red bar"]).to("cpu")
    assert torch.equal(one.ids, several.ids) and one.groups == several.groups


def test_tokenizers_that_would_end_texts_elsewhere():
    """The end token stands once, behind the text: not at its start, not where a caption has it."""
    import tokenizers

    piece = tokenizers.Tokenizer(tokenizers.models.Unigram(
        [("<unk>", 0), ("</s>", 0), ("\u2581", -1), ("a", -1)], 0))
    piece.add_special_tokens(["</s>"])
    piece.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    piece.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = T.Tokenizer(piece.to_str())  # T5's vocabulary holds its end token as a piece of text
    assert t5.encode("a </s> a").tolist().count(1) == 1
    both = json.loads(piece.to_str())
    both["post_processor"]["single"].insert(0, both["post_processor"]["single"][-1])  # GPT-2's
    for broken in (both, {**both, "post_processor": None}):
        with pytest.raises(OSError, match="end token"):
            T.Tokenizer(json.dumps(broken))


# --- training -------------------------------------------------------------------------------------

def curve(out):
    """What a metrics.jsonl says of the mathematics."""
    return [{key: row[key] for key in ("step", "epoch", "loss", "lr", "logit_scale")}
            for row in read_jsonl(out / "metrics.jsonl")]


def load(path):
    return torch.load(path, weights_only=True)


def test_it_learns(trained):
    values, first = losses(trained), read_jsonl(trained / "metrics.jsonl")[0]
    assert values[0] > 2.5 and np.mean(values[-10:]) < 1.2  # ln(16) = 2.77
    assert {"step", "epoch", "loss", "lr", "logit_scale", "samples_per_s", "data_wait_s", "bad",
            "replaced"} <= first.keys()
    model, tokenizer, transform = T.load_checkpoint(str(trained / "checkpoint.pt"))
    picture = transform(Image.new("RGB", (50, 40)))[None]
    assert not model.training and model.encode_image(picture).shape == (1, 128)
    assert model.encode_text(tokenizer(["red bar", "a"]).to("cpu")).shape == (2, 128)


METHODS = {"infonce": [], "multitext": ["--loss", "multitext"], "ssl": ["--ssl"],
           "multitext-ssl": ["--loss", "multitext", "--ssl"]}
MICRO = {f"{name}-micro": [*arguments, "--micro-batch", 2] for name, arguments in METHODS.items()}


@pytest.fixture(scope="module")
def one_process(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_cases(shapes, folder, None, METHODS)
    return folder


@pytest.mark.parametrize("ranks", [None, 2, 3, 4])
def test_ranks_and_micro_batches_equal_one_process_with_the_whole_batch(
        shapes, tmp_path, one_process, ranks):
    """Of 12 samples a rank has 6, 4 or 3, of which the last of micro-batches of 2 has 1. The eps
    keeps AdamW from blowing up gradients that are 0 but for rounding, like a key's bias."""
    cases = MICRO | (METHODS if ranks else {"infonce-again": ["--grad-checkpointing"]})
    run_cases(shapes, tmp_path, ranks, cases)
    assert_same_runs(tmp_path, cases, one_process)


def start(shapes, out, *arguments, ranks=None, stderr=subprocess.DEVNULL):
    """A run in the background, to be killed."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launch * bool(ranks), ROOT / "train_clip.py"]
    command += train_arguments(shapes, out, *arguments)
    return subprocess.Popen([sys.executable, *command], stderr=stderr, text=True)


def wait_for_steps(running, out, number):
    """Until metrics.jsonl has so many lines; the run must not end before."""
    path = out / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < number:
        assert running.poll() is None
        time.sleep(0.01)


def test_killed_again_and_again_a_run_equals_an_uninterrupted_one(shapes, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ("--steps", 40, "--save-every", 4, "--device", "cpu")
    assert train(shapes, whole, *arguments).returncode == 0
    rng, reached = np.random.default_rng(), 0  # another moment every time
    for _ in range(3):
        running = start(shapes, cut, *arguments)
        wait_for_steps(running, cut, reached := min(38, reached + int(rng.integers(2, 12))))
        running.send_signal(signal.SIGKILL)
        running.wait()
        (cut / "checkpoint.pt.tmp").write_bytes(b"cut short")  # as a kill while saving leaves it
        with open(cut / "metrics.jsonl", "a") as f:
            f.write('{"step": 3')
    for other in (("--lr", "1e-4"), ("--loss", "multitext")):
        assert_mistake(train(shapes, cut, *arguments, *other), "was begun with", other[0][2:])
    done = train(shapes, cut, *arguments)
    assert done.returncode == 0, done.stderr
    assert curve(cut) == curve(whole)
    for name, value in load(whole / "checkpoint.pt")["model"].items():
        assert torch.equal(load(cut / "checkpoint.pt")["model"][name], value)
    assert "finished" in train(shapes, cut, *arguments).stdout


HUNDRED = ("--steps", 100, "--eps", "1e-3", "--lr", "1e-4", "--device", "cpu")


@pytest.mark.parametrize("ranks", [None, 2])
def test_sigterm_saves_and_leaves_and_another_number_of_ranks_goes_on(shapes, tmp_path, ranks):
    assert train(shapes, tmp_path / "undisturbed", *HUNDRED).returncode == 0
    out = tmp_path / "run"
    running = start(shapes, out, *HUNDRED, ranks=ranks)
    wait_for_steps(running, out, 3)
    running.terminate()
    assert running.wait() == (1 if ranks else 0)  # torchrun itself reports 1
    step = load(out / "checkpoint.pt")["step"]
    assert 3 <= step == read_jsonl(out / "metrics.jsonl")[-1]["step"] < 100
    assert train(shapes, out, *HUNDRED, "--micro-batch", 3).returncode == 0  # it may change
    np.testing.assert_allclose(losses(out), losses(tmp_path / "undisturbed"), rtol=1e-4)


def test_workers_read_and_sigterm_to_them_too_saves(shapes, tmp_path):
    """As SLURM sends it, to every process of the job; and no worker stays."""
    out = tmp_path / "run"
    running = start(shapes, out, "--steps", 5000, "--workers", 2)
    wait_for_steps(running, out, 2)
    workers = []
    while worker := worker_of(running.pid, workers):
        workers.append(worker)
    for pid in (*workers, running.pid):
        os.kill(pid, signal.SIGTERM)
    assert running.wait(60) == 0 and len(workers) == 2
    assert load(out / "checkpoint.pt")["step"] == read_jsonl(out / "metrics.jsonl")[-1]["step"]
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


def test_killed_workers_and_launches(shapes, tmp_path):
    """A killed worker ends the run, which says so. A killed run leaves no worker."""
    running = start(shapes, tmp_path / "a", "--steps", 5000, "--workers", 1,
                    stderr=subprocess.PIPE)
    wait_for_steps(running, tmp_path / "a", 3)
    os.kill(worker_of(running.pid), signal.SIGKILL)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode and "worker" in "".join(stderr.splitlines()[-4:])
    running = start(shapes, tmp_path / "b", "--steps", 5000, "--workers", 1)
    wait_for_steps(running, tmp_path / "b", 1)
    worker, deadline = worker_of(running.pid), time.monotonic() + 60
    running.send_signal(signal.SIGKILL)
    running.wait()
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")


def test_a_second_launch_into_the_same_folder_leaves(shapes, tmp_path):
    out, arguments = tmp_path / "run", ("--steps", 400, "--log-every", 5)
    first = start(shapes, out, *arguments)
    wait_for_steps(first, out, 2)
    assert_mistake(train(shapes, out, *arguments), "another launch is at work")
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)  # whoever held the lock, it is free
    first.wait()
    assert train(shapes, out, *arguments).returncode == 0


def test_a_full_disk_keeps_the_last_checkpoint(shapes, tmp_path):
    """A limit on the size of a file, half of a checkpoint, stands for the full disk."""
    import resource

    arguments = train_arguments(shapes, tmp_path / "run", "--steps", 4, "--save-every", 2)
    assert run("train_clip.py", *arguments).returncode == 0
    path = tmp_path / "run" / "checkpoint.pt"
    before = path.read_bytes()
    limit = len(before) // 2
    command = [sys.executable, str(ROOT / "train_clip.py"), *arguments]
    command[-1:] = ["2", "--out", str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode and not (tmp_path / "full" / "checkpoint.pt").exists()
    data = bytearray(before)
    data[limit:limit + 4000] = bytes(byte ^ 0x11 for byte in data[limit:limit + 4000])
    for damaged, word in ((data, "damaged"), (before[:limit], "no checkpoint of")):
        path.write_bytes(damaged)
        assert_mistake(run("train_clip.py", *arguments), word)


def test_unusable_rows_are_replaced_and_named(shapes, tmp_path):
    rows = (shapes / "captions.jsonl").read_text() + (
        '{"image": "gone.png", "alt": "no file"}\nnot json\n{"image": "red-bar.png"}\n')
    (tmp_path / "captions.jsonl").write_text(rows)
    arguments = "--captions", tmp_path / "captions.jsonl"
    done = train(shapes, tmp_path / "run", *arguments, "--max-bad", 0.1)
    assert done.returncode == 0, done.stderr
    bad = read_jsonl(tmp_path / "run" / "bad_images.jsonl")
    named = {row["image"]: row["reason"] for row in bad}
    assert "FileNotFoundError" in named["gone.png"] and "no text" in named["red-bar.png"]
    assert "JSONDecodeError" in named["row 18"]
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["bad"] == len(bad)
    done = train(shapes, tmp_path / "strict", *arguments, "--max-bad", 0)
    assert done.returncode == 2 and "--max-bad" in done.stderr.splitlines()[-1]


def test_a_restart_does_not_get_past_too_many_unusable_rows(shapes, tmp_path):
    """What is counted goes on with the run, and the step that had too many is not saved."""
    rows = (shapes / "captions.jsonl").read_text() + '{"image": "gone.png", "alt": "no file"}\n' * 16
    (tmp_path / "captions.jsonl").write_text(rows)
    arguments = "--captions", tmp_path / "captions.jsonl", "--steps", 40, "--save-every", 1, "--max-bad", 0.06
    assert train(shapes, tmp_path, *arguments).returncode == 2  # over 60 rows, 6 % of at least 1,000
    before = load(tmp_path / "checkpoint.pt")
    images, bad, _ = before["counts"]
    assert 0 < before["step"] < 40 and bad <= 60 and images == 8 * before["step"]
    for _ in range(2):
        assert train(shapes, tmp_path, *arguments).returncode == 2
        assert load(tmp_path / "checkpoint.pt")["step"] == before["step"]


def test_how_many_texts_of_one_word_were_replaced_is_logged(shapes, tmp_path):
    rows = [{**row, "rewrite_a": row["label"]} for row in read_jsonl(shapes / "captions.jsonl")]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for text, share in (("rewrite_a", 1), ("alt", 0)):
        T.main(train_arguments(shapes, tmp_path / text, "--captions", tmp_path / "captions.jsonl",
                               "--text", text))
        assert {row["replaced"] for row in read_jsonl(tmp_path / text / "metrics.jsonl")} == {share}


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(shapes, tmp_path):
    done = train(shapes, tmp_path, "--steps", 30, "--lr", "1e30", "--warmup", 0, "--save-every", 1)
    assert done.returncode == 2 and "error: the loss is nan" in done.stderr
    path = tmp_path / "checkpoint.pt"
    assert not path.exists() or all(v.isfinite().all() for v in load(path)["model"].values())


MISTAKES = {
    "--captions missing.jsonl": "missing.jsonl", "--text nothing": "nothing",
    "--text alt=much": "alt=much", "--model ViT-Z": "nano", "--batch-size 17": "17",
    "--batch-size 0": "--batch-size 0", "--tokenizer missing.json": "missing.json",
    "--init missing.pt": "--init", "--precision fp8": "fp8", "--nonsense": "--nonsense",
    "--micro-batch 0": "--micro-batch 0", "--text alt alt": "twice",
    "--steps 0": "--steps 0", "--epochs 0.1": "--epochs", "--seed -1": "--seed -1",
    "--lr nan": "--lr nan", "--lr 0": "--lr 0", "--wd -1": "--wd -1", "--eps 0": "--eps 0",
    "--workers -1": "--workers -1", "--save-every 0": "--save-every 0",
    "--log-every 0": "--log-every 0", "--image-size 33": "multiple of 8", "--warmup 6": "6 steps",
    "--device mps": "--device", "--out checkpoint.pt/x": "checkpoint.pt",
    "--image-root .": "No such file", "--image-root . --workers 1": "100 rows in succession",
    "--freeze-text": "--freeze-text"}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(shapes, tmp_path, arguments, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint.pt").write_text("no checkpoint")
    command = train_arguments(shapes, tmp_path / "out", *arguments.split())
    if arguments == "--epochs 0.1":
        command = without(command, "--steps", "--warmup")
    with pytest.raises(SystemExit) as stop:
        T.main(command)
    lines = capfd.readouterr().err.splitlines()  # a line on the run, and the bar, may be there
    told = "\n".join(line for line in lines if "error" in line.lower() or "Traceback" in line)
    assert_mistake(subprocess.CompletedProcess([], stop.value.code, stderr=told),
                   MISTAKES[arguments])
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_rows_that_are_no_jsonl(shapes, tmp_path):
    rows = json.dumps(read_jsonl(shapes / "captions.jsonl"), indent=1)
    (tmp_path / "array.json").write_text(rows)
    done = train(shapes, tmp_path / "out", "--captions", tmp_path / "array.json")
    assert_mistake(done, "array.json", "JSONL")


def test_rows_in_another_order_do_not_go_on(shapes, tmp_path):
    lines = (shapes / "captions.jsonl").read_text().splitlines(True)
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    arguments = ("--captions", tmp_path / "captions.jsonl", "--steps", 4)
    assert train(shapes, tmp_path / "out", *arguments).returncode == 0
    (tmp_path / "captions.jsonl").write_text("".join(lines[::-1]))
    assert_mistake(train(shapes, tmp_path / "out", *arguments), "checksum of --captions")


def test_init_begins_with_other_weights(shapes, trained, tmp_path):
    """With a new optimizer, its own sizes and tokenizer; older checkpoints have an eot_id, too."""
    state = load(trained / "checkpoint.pt")
    state["config"]["eot_id"] = 310
    torch.save(state, tmp_path / "older.pt")
    command = without(train_arguments(
        shapes, tmp_path / "out", "--batch-size", 16, "--init", tmp_path / "older.pt", "--steps", 2,
        "--warmup", 1), "--model", "--tokenizer", "--image-size")
    T.main(command)
    assert losses(tmp_path / "out")[0] < 1.5 < losses(trained)[0]
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 2
    T.load_checkpoint(str(tmp_path / "older.pt"))


def test_kept_checkpoints(shapes, tmp_path):
    T.main(train_arguments(shapes, tmp_path, "--steps", 7, "--keep-every", 3))
    steps = {path.name: load(path)["step"] for path in tmp_path.glob("checkpoint*.pt")}
    assert steps == {"checkpoint-3.pt": 3, "checkpoint-6.pt": 6, "checkpoint.pt": 7}


def test_what_was_logged_behind_a_checkpoint_is_cut_off(shapes, tmp_path):
    """Also by a run that goes on from a step which logs nothing, and is killed again after the next."""
    arguments = train_arguments(shapes, tmp_path, "--steps", 12, "--log-every", 5, "--keep-every", 1)
    T.main(arguments)
    for step in (3, 4):
        os.replace(tmp_path / f"checkpoint-{step}.pt", tmp_path / "checkpoint.pt")
        T.main(arguments)
        assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 5, 10, 12]


def test_ranks_that_differ_stop(shapes, tmp_path):
    """Each with an OUT of its own, as on nodes that do not share their disks."""
    T.main(train_arguments(shapes, tmp_path / "0", "--steps", 4, "--save-every", 2,
                           "--keep-every", 2))
    (tmp_path / "0" / "checkpoint-2.pt").rename(tmp_path / "0" / "checkpoint.pt")
    (tmp_path / "two.py").write_text(
        f"import json, os, sys; sys.path.insert(0, {str(ROOT)!r}); import train_clip as T\n"
        "T.main(json.loads(sys.argv[1])[int(os.environ['RANK'])])")
    both = [train_arguments(shapes, tmp_path / str(rank), "--steps", 4, "--device", "cpu",
                            "--save-every", 2, "--keep-every", 2) for rank in (0, 1)]
    done = run(tmp_path / "two.py", json.dumps(both), ranks=2)
    assert done.returncode != 0 and "the ranks begin at different steps" in done.stderr


def test_several_files_are_one_data_set(shapes, tmp_path):
    (tmp_path / "more.jsonl").write_text('{"image": "red-bar.png", "vecap": "a red bar"}\n' * 8)
    done = train(shapes, tmp_path / "out", "--captions", shapes / "captions.jsonl",
                 tmp_path / "more.jsonl", "--text", "alt", "vecap")
    assert done.returncode == 0 and "24 rows" in done.stderr, done.stderr


@pytest.mark.parametrize("arguments", ["--ssl", "--model ViT-B/16-laclip", "--compile",
                                       "--augment drawing --ssl", "--shuffle blocks"])
def test_a_step_of_every_kind(shapes, tmp_path, arguments):
    T.main(train_arguments(shapes, tmp_path, *arguments.split(), "--steps", 1, "--warmup", 0,
                           "--batch-size", 4))
    model, _, transform = T.load_checkpoint(str(tmp_path / "checkpoint.pt"))
    assert model.encode_image(transform(Image.new("RGB", (50, 40)))[None]).isfinite().all()


# --- precision ------------------------------------------------------------------------------------

@pytest.mark.parametrize("able, expected", [
    ({"avx2": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
    ({"bf16": True}, "bf16"), ({"avx512_bf16": False, "avx512_f": True}, "fp32"), (None, "fp32")])
def test_precision_is_what_the_hardware_computes_in(monkeypatch, able, expected):
    if able is None:  # a torch that cannot say
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert T.resolve_precision("auto", "cpu") == expected
    assert T.resolve_precision("auto", torch.device("cpu")) == expected
    assert T.resolve_precision("bf16", "cpu") == "bf16"
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
        assert T.resolve_precision("auto", "cuda:1") == ("bf16" if gpu else "fp32")
        assert T.resolve_precision("fp32", "cuda") == "fp32"


def test_a_run_keeps_the_precision_that_it_began_with(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    arguments = ("--precision", "auto", "--device", "cpu", "--keep-every", 2, "--steps", 4)
    T.main(train_arguments(shapes, tmp_path, *arguments))
    assert json.loads((tmp_path / "settings.json").read_text())["precision"] == "bf16"
    assert "bf16" in capsys.readouterr().err
    whole = losses(tmp_path)
    (tmp_path / "checkpoint-2.pt").rename(tmp_path / "checkpoint.pt")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)
    T.main(train_arguments(shapes, tmp_path, *arguments))
    assert losses(tmp_path) == whole
    assert_mistake(train(shapes, tmp_path, *arguments, "--precision", "fp32"), "precision = 'bf16'")
