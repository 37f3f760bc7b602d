"""train_clip.py: equal to the references, the same on any number of ranks, exact after a restart, clear about mistakes."""
import contextlib
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

import train_clip as T
from conftest import ROOT, assert_mistake, read_jsonl, run, train, train_arguments, worker_of


# --- the model equals transformers' -----------------------------------------------------------------------------------

def from_hf(hf, heads):
    """A Hugging Face CLIPModel's weights under OpenAI CLIP's names."""
    state, out = hf.state_dict(), {}

    def blocks(theirs, ours, layers):
        for i in range(layers):
            a, b = f"{theirs}.encoder.layers.{i}", f"{ours}.resblocks.{i}"
            for kind in ("weight", "bias"):
                out[f"{b}.attn.in_proj_{kind}"] = torch.cat([state[f"{a}.self_attn.{n}_proj.{kind}"] for n in "qkv"])
                for x, y in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                    out[f"{b}.{y}.{kind}"] = state[f"{a}.{x}.{kind}"]

    vision, text = hf.config.vision_config, hf.config.text_config
    blocks("vision_model", "visual.transformer", vision.num_hidden_layers)
    blocks("text_model", "transformer", text.num_hidden_layers)
    for x, y in (("vision_model.embeddings.class_embedding", "visual.class_embedding"),
                 ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
                 ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
                 ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
                 ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
                 ("logit_scale", "logit_scale")):
        out[y] = state[x]
    for x, y in (("vision_model.pre_layrnorm", "visual.ln_pre"), ("vision_model.post_layernorm", "visual.ln_post"),
                 ("text_model.final_layer_norm", "ln_final")):
        out |= {f"{y}.{kind}": state[f"{x}.{kind}"] for kind in ("weight", "bias")}
    out["visual.proj"] = state["visual_projection.weight"].T
    out["text_projection"] = state["text_projection.weight"].T
    return out


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_both_towers_equal_transformers(activation):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=500,
                max_position_embeddings=77, hidden_act=activation, bos_token_id=498, eos_token_id=499)
    vision = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3, image_size=64,
                  patch_size=16, hidden_act=activation)
    hf = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)).eval()
    for parameter in hf.parameters():  # their initialisation leaves biases at 0, which would hide a lost one
        torch.nn.init.normal_(parameter, std=0.1)
    ours = T.CLIP(T.Config(embed_dim=48, image_size=64, patch_size=16, vision_width=96, vision_layers=2, vision_heads=3,
                           text_width=64, text_layers=3, text_heads=4, vocab_size=500, eot_id=499,
                           vision_quick_gelu=activation == "quick_gelu",
                           text_quick_gelu=activation == "quick_gelu"))
    ours.load_state_dict(from_hf(hf, 4))
    images, tokens = torch.randn(5, 3, 64, 64), torch.randint(1, 498, (5, 20))
    for row, end in zip(tokens, (19, 4, 11, 1, 7)):  # texts of different length: what follows the end has no effect
        row[end] = 499
    with torch.inference_mode():
        image = hf.get_image_features(pixel_values=images).pooler_output
        text = hf.get_text_features(input_ids=tokens).pooler_output
        torch.testing.assert_close(ours.encode_image(images), image, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.encode_text(tokens), text, atol=1e-4, rtol=1e-4)
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (ours.encode_image(images), ours.encode_text(tokens)))
        torch.testing.assert_close(ours.logit_scale.exp() * a @ b.T, hf(input_ids=tokens, pixel_values=images).logits_per_image,
                                   atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("L", [9, 130])
def test_attention_on_the_cpu_equals_torchs(L, causal, dtype, tolerance):
    """fp32 goes to torch's kernel, bf16 by the formula if there are fewer than 128 tokens."""
    torch.manual_seed(0)
    ours, theirs = T.Attention(48, 4), torch.nn.MultiheadAttention(48, 4, batch_first=True)
    torch.nn.init.normal_(ours.in_proj_weight, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, L, 48)
    mask = torch.full((L, L), -math.inf).triu(1) if causal else None
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = ours(x.flatten(0, 1), causal or None, [(3, L)]).view(3, L, 48)  # any Texts make it causal
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_bit_in_every_run(dtype):
    """Also with several threads: a gradient that they add up in the order in which they come would differ."""
    torch.manual_seed(0)
    model, threads = T.CLIP(T.Config(**T.PRESETS["nano"] | {"image_size": 48, "vocab_size": 500, "eot_id": 499})), torch.get_num_threads()
    tokens = torch.randint(1, 499, (256, 20)).masked_fill(torch.arange(20) >= torch.randint(4, 20, (256, 1)), 499)
    images = torch.randint(0, 256, (64, 1, 3, 48, 48)).float()
    torch.set_num_threads(4)
    try:
        seen = []
        for _ in range(8):
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                _, image_features, text_features = model(images, T.pack(tokens, 499, "cpu"))
            (image_features.sum() + text_features.pow(3).sum()).backward()
            seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.set_num_threads(threads)
    assert "positional_embedding" in seen[0]
    assert not [name for name in seen[0] if any(not torch.equal(seen[0][name], other[name]) for other in seen)]


def test_text_does_not_depend_on_its_padding():
    torch.manual_seed(0)
    model = T.CLIP(T.Config(**T.PRESETS["nano"], vocab_size=100, eot_id=99))
    tokens = torch.tensor([[98, 5, 6, 99], [98, 7, 99, 0]])
    longer = torch.cat([tokens, torch.zeros(2, 73, dtype=torch.long)], 1)
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(longer), atol=1e-6, rtol=1e-5)


# --- a pre-trained text encoder ---------------------------------------------------------------------------------------

def without(command, *flags):
    """A command line without these flags and their values."""
    for flag in flags:
        at = command.index(flag)
        command = command[:at] + command[at + 2:]
    return command


@pytest.fixture(scope="session")
def encoders(shapes, tmp_path_factory):
    """Folders of a small BERT, RoBERTa and T5 with random weights, each with a tokenizer of its family's kind."""
    import tokenizers
    import transformers as hf
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("encoders")
    texts = [text for row in read_jsonl(shapes / "captions.jsonl") for key in ("alt", "rewrite_a") for text in [row[key]]]
    size = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
    families = {  # model, what trains its tokenizer, its start and end token, its padding token
        "bert": (lambda n: hf.BertModel(hf.BertConfig(vocab_size=n, max_position_embeddings=80, **size)),
                 models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer, ["[CLS]", "[SEP]"], "[PAD]", "[UNK]"),
        "roberta": (lambda n: hf.RobertaModel(hf.RobertaConfig(vocab_size=n, max_position_embeddings=82, **size)),
                    models.BPE(), trainers.BpeTrainer, ["<s>", "</s>"], "<pad>", "<unk>"),
        "t5": (lambda n: hf.T5EncoderModel(hf.T5Config(vocab_size=n, d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3)),
               models.Unigram(), trainers.UnigramTrainer, ["</s>"], "<pad>", "<unk>")}
    for name, (model, kind, trainer, ends, pad, unknown) in families.items():
        tokenizer = tokenizers.Tokenizer(kind)
        tokenizer.normalizer = normalizers.BertNormalizer() if name == "bert" else None
        tokenizer.pre_tokenizer = {"bert": pre_tokenizers.BertPreTokenizer(), "roberta": pre_tokenizers.ByteLevel(),
                                   "t5": pre_tokenizers.Metaspace()}[name]
        special = [*ends[:-1], pad, ends[-1], unknown]
        more = {"unk_token": unknown} if name == "t5" else {}
        tokenizer.train_from_iterator(texts, trainer(vocab_size=200, special_tokens=special, show_progress=False, **more))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*ends[:-1], "$A", ends[-1]]), special_tokens=[(end, tokenizer.token_to_id(end)) for end in ends])
        hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown).save_pretrained(folder / name)
        torch.manual_seed(1)
        model = model(tokenizer.get_vocab_size())
        model.config.pad_token_id = tokenizer.token_to_id(pad)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
    return folder


def with_encoder(shapes, out, encoder, *arguments):
    return without(train_arguments(shapes, out, "--text-model", encoder, "--text", "alt", *arguments), "--tokenizer")


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_a_text_encoder_equals_transformers(shapes, encoders, tmp_path, family):
    """A frozen one keeps the weights of its folder; the feature is the projected mean over the tokens of a text, whatever
    stands beside it in the batch. The checkpoint holds all that evaluation needs: the folder is gone."""
    import shutil

    from eval_zeroshot import Encoder
    from transformers import AutoModelForTextEncoding, AutoTokenizer

    shutil.copytree(encoders / family, tmp_path / family)
    T.main(with_encoder(shapes, tmp_path / "out", tmp_path / family, "--freeze-text", "--steps", 2, "--warmup", 0))
    (tmp_path / family).rename(tmp_path / "gone")
    model, tokenizer, _ = T.load_checkpoint(str(tmp_path / "out" / "checkpoint.pt"))
    theirs = AutoModelForTextEncoding.from_pretrained(encoders / family).eval()
    texts = ["red bar", "a cross that is green all over", "x", "", "a square that is blue all over and red and yellow"]
    inputs = AutoTokenizer.from_pretrained(encoders / family)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states, mask = theirs(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state, inputs.attention_mask[..., None]
        expected = (states * mask).sum(1) / mask.sum(1) @ model.text_projection
        torch.testing.assert_close(model.encode_text(tokenizer(texts)), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(Encoder(model, tokenizer, None).encode_texts(texts), torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)
    assert not model.training and model.text_projection.shape == (48, 128)
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("frozen", [[], ["--freeze-text"]], ids=["tuned", "frozen"])
def test_a_text_encoder_goes_on_exactly(shapes, encoders, tmp_path, frozen):
    """Resumed in the middle it ends with the same weights; what is frozen has not moved, all else has."""
    arguments = [*frozen, "--steps", 6, "--keep-every", 3, "--wd", 0.1, "--device", "cpu"]
    T.main(with_encoder(shapes, tmp_path / "whole", encoders / "bert", *arguments))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "checkpoint.pt").write_bytes((tmp_path / "whole" / "checkpoint-3.pt").read_bytes())
    T.main(with_encoder(shapes, tmp_path / "cut", encoders / "bert", *arguments, "--resume", "auto"))
    whole, cut, before = (torch.load(tmp_path / path, weights_only=True)["model"]
                          for path in ("whole/checkpoint.pt", "cut/checkpoint.pt", "whole/checkpoint-3.pt"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")[3:]
    for name in whole:
        assert torch.equal(whole[name], cut[name]), name
        assert torch.equal(whole[name], before[name]) == (bool(frozen) and name.startswith("text_encoder.")), name


def test_a_text_encoder_in_bf16_and_as_init(shapes, encoders, tmp_path):
    """--init takes the encoder with the rest; a longer context needs no stretched positions, only an encoder that has them."""
    T.main(with_encoder(shapes, tmp_path / "bf16", encoders / "roberta", "--precision", "bf16", "--steps", 3))
    T.main(with_encoder(shapes, tmp_path / "fp32", encoders / "roberta", "--steps", 3))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), abs=0.05)
    command = without(train_arguments(shapes, tmp_path / "init", "--text", "alt", "--init", tmp_path / "fp32" / "checkpoint.pt",
                                      "--context-length", 80, "--freeze-text", "--steps", 3), "--model", "--tokenizer")
    T.main(command)
    fp32, init = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("fp32", "init"))
    assert init["config"]["context_length"] == 80
    for name, value in fp32["model"].items():
        assert torch.equal(init["model"][name], value) or not name.startswith("text_encoder.")


def test_mistakes_with_a_text_encoder(shapes, encoders, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no weights").mkdir()
    for path in (encoders / "bert").iterdir():
        if path.suffix == ".json":
            (tmp_path / "no weights" / path.name).write_bytes(path.read_bytes())
    both = train_arguments(shapes, tmp_path / "out", "--text-model", encoders / "bert")
    for command, words in (
            (both, ["--text-model", "--tokenizer"]),
            (train_arguments(shapes, tmp_path / "out", "--freeze-text"), ["--freeze-text", "--text-model"]),
            (with_encoder(shapes, tmp_path / "out", tmp_path / "empty"), ["empty", "no tokenizer.json"]),
            (with_encoder(shapes, tmp_path / "out", tmp_path / "no weights"), ["--text-model", "no weights"]),
            (with_encoder(shapes, tmp_path / "out", encoders / "bert", "--context-length", 81), ["--context-length 81"]),
            (with_encoder(shapes, tmp_path / "out", encoders / "roberta", "--context-length", 81), ["--context-length 81"])):
        with pytest.raises(SystemExit) as stop:
            T.main(command)
        assert_mistake(subprocess.CompletedProcess([], stop.value.code, stderr=capfd.readouterr().err), *words)
        assert not (tmp_path / "out").exists()


# --- the losses equal their formulas ----------------------------------------------------------------------------------

def plain_nce(queries, keys, scale):
    """-1/N sum_i log(exp(s q_i k_i) / sum_k exp(s q_i k_k)), as written in both papers, in float64."""
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


def test_clip_loss_equals_the_formula():
    torch.manual_seed(0)
    images, texts, scale = unit(6, 8), unit(6, 8), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    plain = (plain_nce(images, texts, scale) + plain_nce(texts, images, scale)) / 2
    same_value_and_gradients(T.clip_loss(images, texts, scale), plain, images, texts, scale)


def test_multitext_loss_equals_the_formula_with_a_mean_over_all_texts():
    torch.manual_seed(0)
    images, texts, scale = unit(5, 8), unit(5, 3, 8), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    drawn = torch.tensor([0, 2, 1, 1, 0])
    l_i = sum(plain_nce(images, texts[:, j], scale) for j in range(3)) / 3  # M + 1 = 3 texts an image
    l_t = plain_nce(torch.stack([texts[i, drawn[i]] for i in range(5)]), images, scale)
    same_value_and_gradients(T.multitext_loss(images, texts, drawn, scale), (l_i + l_t) / 2, images, texts, scale)


def test_multitext_of_equal_texts_is_the_clip_loss():
    """What the mean, 1/(M + 1), is for: M + 1 copies of one text change nothing. 1/M would weigh images more."""
    torch.manual_seed(0)
    images, texts, scale = unit(5, 8), unit(5, 8), torch.tensor(9.0, dtype=torch.float64)
    loss = T.multitext_loss(images, texts[:, None].expand(5, 4, 8), torch.tensor([3, 1, 0, 2, 2]), scale)
    torch.testing.assert_close(loss, T.clip_loss(images, texts, scale))


def test_simclr_loss_equals_the_formula():
    """NT-Xent of SimCLR (eq. 1) over 2 N views, the pair of a view its other view; both views weigh the same (SLIP)."""
    torch.manual_seed(0)
    views = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    z = views / views.norm(dim=-1, keepdim=True)
    z = [z[i, a] for a in (0, 1) for i in range(5)]  # view 0 of all images, then view 1
    terms = [-(torch.exp(z[i] @ z[(i + 5) % 10] / 0.1) / sum(torch.exp(z[i] @ z[k] / 0.1) for k in range(10) if k != i)).log()
             for i in range(10)]
    loss = T.simclr_loss(torch.nn.Identity(), views)  # the head's output is taken as float32
    torch.testing.assert_close(loss, (sum(terms) / 10).float(), atol=1e-6, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, views), torch.autograd.grad(sum(terms) / 10, views)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("similarities", [1, 13, 30])
def test_losses_in_blocks_are_the_same(monkeypatch, similarities):
    torch.manual_seed(0)
    images, texts, scale = unit(7, 8), unit(7, 3, 8), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    drawn, views = torch.tensor([0, 2, 1, 1, 0, 2, 2]), torch.randn(7, 2, 8, requires_grad=True)

    def losses():
        return T.multitext_loss(images, texts, drawn, scale), T.simclr_loss(torch.nn.Identity(), views)

    whole = losses()
    monkeypatch.setattr(T, "SIMILARITIES", similarities)  # of 7 x 7, and 7 x 14 with views
    for block, one, inputs in zip(losses(), whole, ((images, texts, scale), (views,))):
        torch.testing.assert_close(block, one)
        for a, b in zip(torch.autograd.grad(block, inputs), torch.autograd.grad(one, inputs)):
            torch.testing.assert_close(a, b)


# --- data -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 100, 1023, 1025, 4097])
def test_an_epochs_order_is_a_permutation(n):
    assert sorted(T.shuffled(i, n, 7) for i in range(n)) == list(range(n))


def test_epochs_have_different_orders_that_look_random():
    orders = np.array([[T.shuffled(i, 1000, epoch) for i in range(1000)] for epoch in range(4)])
    assert abs(np.corrcoef(orders)[np.triu_indices(4, 1)]).max() < 0.12
    assert abs(np.corrcoef(orders[0], np.arange(1000))[0, 1]) < 0.12


@pytest.mark.parametrize("n", [1, 999, 1000, 2500, 300_123])
def test_an_epochs_order_in_blocks(n):
    """Every row once; at any time from 256 blocks of 1,000 (and a shift), in another order in the next epoch."""
    places = range(n) if n < 10_000 else [*range(0, 3000), *range(255_000, 258_000), *range(n - 500, n)]
    orders = [[T.shuffled_in_blocks(i, n, 7 << 32 | epoch) for i in places] for epoch in range(2)]
    for epoch, order in enumerate(orders):
        assert sorted(order) == list(range(n)) if n < 10_000 else len(set(order)) == len(places) and 0 <= min(order) and max(order) < n
        shift = T.shuffled(0, n, 7 << 32 | epoch)
        blocks = [{(row - shift) % n // 1000 for row, i in zip(order, places) if i // 256_000 == window} for window in (0, 1)]
        assert len(blocks[0]) <= 256 and not blocks[0] & blocks[1] or n == 300_123 and blocks[0] & blocks[1] <= {300}
    assert n == 1 or orders[0] != orders[1]


def test_rows_are_read_where_they_lie(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"n": 0, "t": "\u2028 \u00e9"}\n\n[1]\n{"n": 3}')  # the last line is not ended
    second.write_text('{"n": 4}\n')
    for path in (first, second):
        T.index_rows(str(path))
    rows = T.Rows([str(first), str(second)])
    assert len(rows) == 5 and [rows[i]["n"] for i in (0, 3, 4)] == [0, 3, 4]
    for i in (1, 2):
        with pytest.raises(T.BadRow):
            rows[i]
    assert rows.name(3).endswith("a.jsonl, line 4") and rows.name(4).endswith("b.jsonl, line 1")


def test_an_index_that_is_not_the_files_is_made_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(16)))
    T.index_rows(str(path))
    index, before, contents = path.with_name("a.jsonl.idx"), path.stat(), T.Rows([str(path)]).contents
    for cut in (0, 39, 40, 100, index.stat().st_size - 8):
        index.write_bytes(index.read_bytes()[:cut])
        T.index_rows(str(path))
        assert [row["n"] for row in T.Rows([str(path)])] == [*range(16)]
    path.write_text("".join(f'{{"n": {n}}}\n' for n in reversed(range(16))))  # other content of the same size and time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    T.index_rows(str(path))
    assert [row["n"] for row in T.Rows([str(path)])] == [*reversed(range(16))] and T.Rows([str(path)]).contents != contents
    path.write_bytes("{}\n".encode("utf-16"))
    with pytest.raises(SystemExit):
        T.index_rows(str(path))


def samples(shapes, tokenizer, fields, every_text=False, rows=None):
    path = str(shapes / "captions.jsonl")
    T.index_rows(path)
    rows = rows or T.Rows([path])
    return T.Samples(rows, str(shapes / "images"), fields, "random", T.augment_crop, 32, tokenizer, 0, len(rows), every_text, False)


def test_texts_are_drawn_by_weight_among_those_present(shapes):
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    rows = [{"image": "red-bar.png", "alt": "red bar", "rewrite_a": "a red bar", "rewrite_b": None, "vec": ["x y", None, "z w"]}]
    data = samples(shapes, tokenizer, {"alt": 1, "rewrite_a": 3, "rewrite_b": 50, "vec": 0, "no": 5}, rows=rows)
    texts = [tokenizer.tokenizer.decode(data[position]["ids"][0]).strip() for position in range(2000)]
    assert set(texts) == {"red bar", "a red bar"}
    assert abs(texts.count("a red bar") / 2000 - 0.75) < 0.04  # four standard deviations
    data = samples(shapes, tokenizer, {"vec": 1}, rows=rows)
    assert {tokenizer.tokenizer.decode(data[i]["ids"][0]).strip() for i in range(50)} == {"x y", "z w"}


def test_one_word_gives_way_to_alt(shapes):
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    data = samples(shapes, tokenizer, {"r": 1}, rows=[{"image": "red-bar.png", "alt": "red bar", "r": "bar"}])
    assert tokenizer.tokenizer.decode(data[0]["ids"][0]).strip() == "red bar" and data[0]["replaced"]
    data = samples(shapes, tokenizer, {"r": 1}, rows=[{"image": "red-bar.png", "alt": None, "r": "bar"}])
    assert tokenizer.tokenizer.decode(data[0]["ids"][0]).strip() == "bar" and not data[0]["replaced"]


@pytest.mark.parametrize("text, number", [
    ("", 0), ("red", 1), ("a red bike", 3), ("\u2014 !", 0), ("T-shirt", 1), ("caf\u00e9 \u00e0 Paris", 3), ("\u732b", 1), ("\u8336\u676f", 1), ("\u684c\u5b50\u4e0a\u653e\u7740\u4e00\u4e2a\u7ea2\u8272\u7684\u676f\u5b50", 6), ("\u8d64\u3044\u30d0\u30a4\u30af", 2),
    ("\u30c6\u30fc\u30d6\u30eb", 1), ("\u0e23\u0e16\u0e22\u0e19\u0e15\u0e4c\u0e2a\u0e35\u0e41\u0e14\u0e07", 3), ("\ube68\uac04 \uc790\uc804\uac70", 2), ("\u0932\u093e\u0932 \u0938\u093e\u0907\u0915\u093f\u0932", 2), ("\u7ea2\u8272\u3002bike", 2), ("\U0001f6b2 \U0001f697", 0)])
def test_words_of_every_script(text, number):
    assert len(T.words_of(text)) == number


def test_sentences_without_blanks_are_drawn(shapes):
    """In Chinese, Japanese and Thai a rewrite has no blank in it and is a sentence all the same."""
    rows = [{"image": "red-bar.png", "alt": "red bar", "r": text} for text in (
        "\u684c\u5b50\u4e0a\u653e\u7740\u4e00\u4e2a\u7ea2\u8272\u7684\u676f\u5b50", "\u8d64\u3044\u81ea\u8ee2\u8eca\u304c\u3042\u308a\u307e\u3059", "\u0e23\u0e16\u0e22\u0e19\u0e15\u0e4c\u0e2a\u0e35\u0e41\u0e14\u0e07\u0e27\u0e32\u0e07\u0e2d\u0e22\u0e39\u0e48")]
    data = samples(shapes, T.Tokenizer.load(str(shapes / "tokenizer.json")), {"r": 1}, rows=rows)
    assert not any(data[i]["replaced"] for i in range(100))


@pytest.mark.parametrize("alt", ["plain text", ["first plain", "second plain", "third plain"]])
def test_a_field_is_drawn_before_its_entry(alt):
    """However many texts a field has, its weight is its share; its texts have equal shares of that."""
    rows = [{"image": "red-bar.png", "alt": alt, "short": ["s 0", "s 1"], "long": [f"l {i}" for i in range(6)], "zero": "z z"}]
    fields, n = {"alt": 1, "short": 1, "long": 2, "zero": 0}, 4000
    found = [texts[drawn] for texts, drawn, _ in (T.draw_texts(rows[0], fields, np.random.default_rng(i)) for i in range(n))]
    shares = {text: found.count(text) / n for text in set(found)}
    expected = {f"s {i}": 1 / 8 for i in range(2)} | {f"l {i}": 1 / 12 for i in range(6)} | (
        {text: 1 / 4 / len(alt) for text in alt} if isinstance(alt, list) else {alt: 1 / 4})
    assert shares.keys() == expected.keys()
    for text, share in expected.items():  # four standard deviations
        assert abs(shares[text] - share) < 4 * (share * (1 - share) / n) ** 0.5, text


def test_a_field_of_weight_0_is_used_where_the_others_are_missing(shapes):
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    rows = [{"image": "red-bar.png", "alt": [], "r": " ", "spare": "z z"}]
    assert tokenizer.tokenizer.decode(samples(shapes, tokenizer, {"alt": 1, "r": 1, "spare": 0}, rows=rows)[0]["ids"][0]).strip() == "z z"


def test_multitext_fills_a_missing_version_with_the_first_present(shapes):
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    rows = [{"image": "red-bar.png", "alt": None, "a": "a red bar", "b": "one bar in red"}]
    sample = samples(shapes, tokenizer, {"alt": 1, "a": 1, "b": 1}, every_text=True, rows=rows)[0]
    assert sample["filled"] == 1 and sample["ids"][0] == sample["ids"][1] != sample["ids"][2] and sample["drawn"] in (1, 2)


def test_of_several_alttexts_one_index_serves_all_fields(shapes):
    """alt and what was made from it stay together, nulls in the lists or not; a text that is no list goes with each."""
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    rows = [{"image": "red-bar.png", "alt": ["red bar", "green cross", "blue frame"], "vec": "yellow square",
             "vecap": ["a red bar", None, "a blue frame"], "clip_score": {"alt": [0.1, 0.9, None]}}]
    fields = {"alt": 1, "vecap": 1, "vec": 1}

    def seen(choice, fields=fields, rows=rows):
        data = samples(shapes, tokenizer, fields, every_text=True, rows=rows)
        data.alt_choice = choice
        return {tuple(tokenizer.tokenizer.decode(ids).strip() for ids in data[i]["ids"]) for i in range(60)}

    triples = {("red bar", "a red bar", "yellow square"), ("green cross", "green cross", "yellow square"),
               ("blue frame", "a blue frame", "yellow square")}
    assert seen("random") == triples
    alts = {"alt": 1, "vecap": 0, "vec": 0}  # where vecap is drawn, its null is not chosen
    assert seen("first", alts) == {("red bar", "a red bar", "yellow square")}
    assert seen("best", alts) == {("green cross", "green cross", "yellow square")}
    assert seen("random", {"vecap": 1}) == {("a red bar",), ("a blue frame",)}  # the null is never drawn
    assert seen("best", {"vec": 1}) == {("yellow square",)}  # one text needs no score
    for scores in ({}, {"clip_score": 3}, {"clip_score": {"alt": [1]}}):
        with pytest.raises(T.BadRow, match="clip_score"):
            seen("best", alts, rows=[{**rows[0], "clip_score": None, **scores}])


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:1200, :1600]
    picture = np.stack([128 + 100 * np.sin(x / 90 + k) * np.cos(y / 70) for k in range(3)], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(picture).save(tmp_path / "lying.jpg", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    Image.fromarray(picture).save(tmp_path / "large.png")
    Image.fromarray(np.rot90(picture, -1)).save(tmp_path / "lying.png")
    for name in ("large", "lying"):
        for seed in range(5):
            small, whole = (T.augment_crop(T.open_image(str(tmp_path), name + kind), 64, np.random.default_rng(seed))
                            for kind in (".jpg", ".png"))
            difference = np.abs(np.asarray(small, float) - np.asarray(whole, float))
            assert difference.mean() < 1.5 and small.size == (64, 64)
    jpeg = T.open_image(str(tmp_path), "large.jpg")
    T.augment_crop(jpeg, 64, np.random.default_rng(0))
    assert jpeg.size[0] <= 800  # decoded at a half or less


@pytest.mark.parametrize("rank, world, n", [(0, 1, 600), (1, 3, 200), (2, 2, 7)])
def test_pieces_of_a_step_join_to_this_ranks_share(rank, world, n):
    pieces = T.Pieces(2, 4, n * world, rank, world)
    lists = list(pieces)
    assert len(lists) == 2 * pieces.per_step and max(map(len, lists)) <= 256
    assert [position for piece in lists for position in piece] == [step * n * world + rank * n + i for step in (2, 3) for i in range(n)]


def test_joined_pieces_are_one_batch():
    def piece(lengths):
        return T.collate([{"images": torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "ids": [list(range(1, n + 1))], "drawn": 0,
                           "filled": 1, "replaced": True, "bad": [("x", "y")]} for n in lengths])

    batch = T.join([piece([2, 3]), piece([5])], "cpu", 2, -1)
    assert batch["counts"] == {"images": 3, "filled": 3, "replaced": 3, "bad": 3} and batch["bad"] == [("x", "y")] * 3
    (two, texts), (one, last) = batch["chunks"]
    assert two.shape == (2, 1, 3, 4, 4) and one.shape == (1, 1, 3, 4, 4)
    assert texts.ids.tolist() == [1, 2, 1, 2, 3] and last.ids.tolist() == [1, 2, 3, 4, 5]


def test_pinned_pieces_keep_their_counts(monkeypatch):
    """torch's pin_memory, which runs for a GPU only, copies a dict by `update`: a Counter's numbers it would double."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    piece = T.collate([{"images": torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "ids": [[1]], "drawn": 0, "filled": 1, "replaced": True,
                        "bad": []}])
    batch = T.join([torch.utils.data._utils.pin_memory.pin_memory(piece)], "cpu", 1, -1)
    assert batch["counts"] == {"images": 1, "filled": 1, "replaced": 1}


def test_packed_texts():
    """From the shortest to the longest, cut behind the first end token; `ends` finds each in the order in which they came."""
    tokens = torch.tensor([[9, 4, 5, 8, 7], [9, 8, 6, 6, 6], [9, 3, 2, 8, 0], [9, 8, 8, 0, 0]])
    texts = T.pack(tokens, 8, "cpu")
    assert texts.ids.tolist() == [9, 8, 9, 8, 9, 4, 5, 8, 9, 3, 2, 8] and texts.groups == [(2, 2), (2, 4)]
    assert texts.positions.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3] and texts.starts.tolist() == [0, 2, 4, 8, 12]
    assert texts.starts.dtype == torch.int32 and texts.ids[texts.ends].tolist() == [8] * 4
    assert texts.ends.tolist() == [7, 1, 11, 3]
    assert T.pack(tokens, -1, "cpu").ends.tolist() == [0, 1, 2, 3]  # at the highest id, which is the first here


def test_a_sample_is_a_function_of_its_position(shapes):
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    a, b = (samples(shapes, tokenizer, {"alt": 1, "rewrite_a": 1}) for _ in range(2))
    b[3], b[40]  # reading others first changes nothing
    assert a[21]["ids"] == b[21]["ids"] and torch.equal(a[21]["images"], b[21]["images"])
    assert not all(torch.equal(a[i]["images"], a[i + 16]["images"]) for i in range(4))  # another epoch, another crop


def test_pictures_of_every_kind(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "cmyk.jpg")
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    rotated = Image.new("RGB", (8, 4))
    rotated.save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    blob = (tmp_path / "grey.png").read_bytes()
    (tmp_path / "shard.tar").write_bytes(b"-" * 100 + blob + b"-" * 100)

    def read(name):
        return T.to_rgb(T.open_image(str(tmp_path), name))

    assert read("clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert read("cmyk.jpg").mode == read("grey.png").mode == "RGB"
    assert read("exif.jpg").size == (4, 8)
    assert read(f"shard.tar@100+{len(blob)}").size == (8, 8)
    os.symlink("/etc/hostname", tmp_path / "link.png")
    for name in ("../x.png", "/etc/hostname", "link.png", None, 7, "missing.png"):
        with pytest.raises((OSError, ValueError, TypeError)):
            read(name)


def test_the_evaluation_transform_is_openais():
    from torchvision.transforms import v2
    theirs = v2.Compose([v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.ToImage(),
                         v2.ToDtype(torch.float32, scale=True), v2.Normalize(T.Config.mean, T.Config.std)])
    rng = np.random.default_rng(0)
    for size in ((50, 33), (33, 51), (32, 32), (20, 90)):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
        torch.testing.assert_close(T.EvalTransform(T.Config(image_size=32))(image), theirs(image))


def test_tokenizer(shapes):
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert tokenizer.eot_id == end
    hostile = ["", "<|endoftext|>", "red <|startoftext|> bar", "a\0b\u2028c\r\n", "\ud800", "red " * 50_000]
    tokens = tokenizer(hostile)
    assert tokens.shape == (len(hostile), 77) and tokens.dtype == torch.long
    for row in tokens:
        ids = row.tolist()
        assert ids[0] == start and ids.count(end) == 1 and ids.count(start) == 1
        assert not any(ids[ids.index(end) + 1:])  # zeros behind
    assert tokens[-1, -1] == end  # cut text still ends
    assert tokenizer("red bar").tolist() == tokenizer(["red bar"]).tolist()  # one text may come without a list


def test_tokenizers_that_would_end_texts_elsewhere(shapes, tmp_path, capsys):
    """The end token stands once, behind the text: not as its start too, and not where a caption spells it."""
    import tokenizers

    piece = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0), ("</s>", 0), ("\u2581", -1), ("a", -1)], 0))
    piece.add_special_tokens(["</s>"])
    piece.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    piece.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = T.Tokenizer(piece.to_str())  # like T5's, whose vocabulary holds its end token as a piece of text
    assert t5.eot_id == 1 and t5(["a </s> a"])[0].tolist().count(1) == 1
    both = json.loads(piece.to_str())
    both["post_processor"]["single"].insert(0, both["post_processor"]["single"][-1])  # GPT-2's: one token for both
    with pytest.raises(ValueError, match="end token"):
        T.Tokenizer(json.dumps(both))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        T.Tokenizer.load(str(tmp_path / "empty"))
    assert "no tokenizer.json" in capsys.readouterr().err


# --- training ---------------------------------------------------------------------------------------------------------

def losses(out):
    return [row["loss"] for row in read_jsonl(out / "metrics.jsonl")]


def test_it_learns(trained):
    values = losses(trained)
    assert values[0] > 2.5 and np.mean(values[-10:]) < 1.2  # ln(16) = 2.77; three texts a picture never reach 0
    assert {"step", "epoch", "loss", "lr", "logit_scale", "samples_per_s", "data_wait_s"} <= set(
        read_jsonl(trained / "metrics.jsonl")[0])


METHODS = {"infonce": [], "multitext": ["--loss", "multitext"], "ssl": ["--ssl"], "multitext-ssl": ["--loss", "multitext", "--ssl"],
           "encoder": ["--text-model", "bert"], "encoder-frozen": ["--text-model", "t5", "--freeze-text"]}


def run_cases(shapes, encoders, folder, ranks, cases):
    """Trains METHODS[case] with more arguments, in `ranks` processes, into folder/case."""
    commands = [train_arguments(shapes, folder / name, "--batch-size", 12, "--eps", "1e-2", "--steps", 4, *arguments,
                                *(["--device", "cpu"] if ranks else []))
                for name, arguments in cases.items()]
    commands = [[str(encoders / word) if word in ("bert", "t5") else word for word in without(command, "--tokenizer")]
                if "--text-model" in command else command for command in commands]
    done = run("tests/run_cases.py", json.dumps(commands), ranks=ranks)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def one_process(shapes, encoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_cases(shapes, encoders, folder, None, METHODS)
    return folder


def test_micro_batches_have_the_whole_batchs_gradient_in_double_precision(monkeypatch):
    """So what differs elsewhere is rounding. BatchNorm in SLIP's head is over all twelve images."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    config = T.Config(**T.PRESETS["nano"], vocab_size=300, eot_id=299)
    model, head = T.CLIP(config).double(), T.projection_head(config.vision_width).double()
    images = torch.randint(0, 256, (12, 3, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.cat([torch.randint(1, 298, (12, 6)), torch.full((12, 1), 299)], 1)
    gradients = []
    for size in (12, 5):
        model.zero_grad(), head.zero_grad()
        chunks = [(part, T.pack(ids, 299, "cpu")) for part, ids in zip(images.split(size), tokens.split(size))]
        T.backward(model, model, lambda _, scale, x, y, views: T.clip_loss(x, y[:, 0], scale) + T.simclr_loss(head, views),
                   {"chunks": chunks, "drawn": None}, contextlib.nullcontext)
        gradients.append({name: p.grad.clone() for name, p in [*model.named_parameters(), *head.named_parameters()]})
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, atol=1e-12, rtol=1e-9, msg=name)


@pytest.mark.parametrize("ranks", [None, 2, 3, 4])
def test_ranks_and_micro_batches_equal_one_process_with_the_whole_batch(shapes, encoders, tmp_path, one_process, ranks):
    """Of 12 samples a rank has 6, 4 or 3 and holds 6, 4, 3 or 2 (the last chunk is shorter where 2 does not divide 3). The eps keeps
    AdamW from blowing up gradients that are 0 but for rounding: a key's bias, a bias before BatchNorm."""
    micro = {f"{name}-micro": [*arguments, "--micro-batch", 2 if ranks else 5] for name, arguments in METHODS.items()}
    cases = {**METHODS, **micro} if ranks else {**micro, "infonce-checkpointing": ["--grad-checkpointing"]}
    run_cases(shapes, encoders, tmp_path, ranks, cases)
    for case in cases:
        method = case.removesuffix("-micro").removesuffix("-checkpointing")
        np.testing.assert_allclose(losses(tmp_path / case), losses(one_process / method), rtol=1e-5, err_msg=case)
        one, many = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (one_process / method, tmp_path / case))
        for part in ("model", "head"):
            for name in one[part]:
                torch.testing.assert_close(many[part][name], one[part][name], atol=2e-5, rtol=1e-4, msg=f"{case}: {name}")


def start(shapes, out, *arguments, ranks=None):
    """A run in the background, to be killed."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    command = [sys.executable, *launch, str(ROOT / "train_clip.py"), *train_arguments(shapes, out, *arguments)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_steps(running, out, number):
    """Until metrics.jsonl has so many lines; the run must not end before."""
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < number:
        assert running.poll() is None


def curve(out):
    """What a metrics.jsonl says of the mathematics."""
    return [{key: row[key] for key in ("step", "epoch", "loss", "lr", "logit_scale")} for row in read_jsonl(out / "metrics.jsonl")]


def test_killed_again_and_again_a_run_equals_an_uninterrupted_one(shapes, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ("--steps", 40, "--save-every", 4, "--device", "cpu")
    assert train(shapes, whole, *arguments).returncode == 0
    rng, reached = np.random.default_rng(), 0  # another moment every time
    for _ in range(4):
        running = start(shapes, cut, *arguments, "--resume", "auto")
        wait_for_steps(running, cut, reached := min(38, reached + int(rng.integers(2, 10))))
        running.send_signal(signal.SIGKILL)
        running.wait()
        (cut / "checkpoint.pt.tmp").write_bytes(b"cut short")  # as a kill while saving leaves it
    (cut / "metrics.jsonl").open("a").write('{"step": 3')
    assert_mistake(train(shapes, cut, *arguments), "--resume")
    assert_mistake(train(shapes, cut, *arguments, "--resume", "auto", "--lr", "1e-4"), "lr")
    assert_mistake(train(shapes, cut, *arguments, "--resume", "auto", "--loss", "multitext"), "loss")
    done = train(shapes, cut, *arguments, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert curve(cut) == curve(whole)
    assert "finished" in train(shapes, cut, *arguments, "--resume", "auto").stdout


def test_another_tokenizer_cannot_go_on(shapes, tmp_path):
    content = json.loads((shapes / "tokenizer.json").read_text())
    content["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    arguments = ("--steps", 3, "--resume", "auto")
    assert train(shapes, tmp_path / "out", *arguments).returncode == 0
    assert_mistake(train(shapes, tmp_path / "out", *arguments, "--tokenizer", tmp_path / "tokenizer.json"), "tokenizer")


TWO_HUNDRED = ("--steps", 200, "--eps", "1e-3", "--lr", "1e-4")


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory):
    """The run that the next test disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(shapes, out, *TWO_HUNDRED).returncode == 0
    return out


@pytest.mark.parametrize("ranks", [None, 2])
def test_sigterm_saves_and_leaves_and_another_number_of_ranks_goes_on(shapes, undisturbed, tmp_path, ranks):
    out = tmp_path / "run"
    running = start(shapes, out, *TWO_HUNDRED, *(["--device", "cpu"] if ranks else []), ranks=ranks)
    wait_for_steps(running, out, 3)
    running.terminate()
    assert running.wait() == (1 if ranks else 0)  # torchrun itself reports 1
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert 3 <= step == read_jsonl(out / "metrics.jsonl")[-1]["step"] < 200
    more = ("--resume", "auto", "--micro-batch", 3)  # this may change, as the number of ranks may
    assert train(shapes, out, *TWO_HUNDRED, *more).returncode == 0
    np.testing.assert_allclose(losses(out), losses(undisturbed), rtol=1e-4)


def test_a_full_disk_keeps_the_last_checkpoint(shapes, tmp_path):
    """A limit on the size of a file, half of a checkpoint, stands for the full disk."""
    import resource

    out = tmp_path / "run"
    assert train(shapes, out, "--steps", 4, "--save-every", 2).returncode == 0
    before = (out / "checkpoint.pt").read_bytes()
    arguments = train_arguments(shapes, tmp_path / "full", "--steps", 4, "--save-every", 2)
    limit = len(before) // 2
    done = subprocess.run([sys.executable, str(ROOT / "train_clip.py"), *arguments], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_stopped(done, "could not be written")
    assert not list((tmp_path / "full").glob("checkpoint*"))
    (tmp_path / "full" / "checkpoint.pt").write_bytes(before[:limit])
    assert_mistake(train(shapes, tmp_path / "full", "--resume", "auto"), "not a checkpoint")


def test_unusable_rows_are_replaced_and_named(shapes, tmp_path):
    rows = (shapes / "captions.jsonl").read_text() + '{"image": "gone.png", "alt": "no file"}\nnot json\n{"image": "red-bar.png"}\n'
    (tmp_path / "captions.jsonl").write_text(rows)
    done = train(shapes, tmp_path / "run", "--captions", tmp_path / "captions.jsonl")
    assert done.returncode == 0, done.stderr
    named = {row["image"]: row["reason"] for row in read_jsonl(tmp_path / "run" / "bad_images.jsonl")}
    assert "FileNotFoundError" in named["gone.png"] and "no text" in named["red-bar.png"] and "not JSON" in named[f"{tmp_path}/captions.jsonl, line 18"]
    done = train(shapes, tmp_path / "strict", "--captions", tmp_path / "captions.jsonl", "--max-bad", 0)
    assert_stopped(done, "--max-bad")


def test_how_many_texts_of_one_word_were_replaced_is_logged(shapes, tmp_path):
    rows = read_jsonl(shapes / "captions.jsonl")
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({**row, "rewrite_a": row["label"]}) + "\n" for row in rows))
    for text, share in (("rewrite_a", 1), ("alt", 0)):
        assert train(shapes, tmp_path / text, "--captions", tmp_path / "captions.jsonl", "--text", text).returncode == 0
        assert {row["replaced"] for row in read_jsonl(tmp_path / text / "metrics.jsonl")} == {share}


def assert_stopped(done, *words):
    """A mistake found while training: the message is one line, beside those of the progress bar."""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(shapes, tmp_path):
    done = train(shapes, tmp_path / "run", "--steps", 30, "--lr", "1e30", "--warmup", 0, "--save-every", 1)
    assert_stopped(done, "the loss is nan")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"] if (
        tmp_path / "run" / "checkpoint.pt").exists() else {}
    assert all(value.isfinite().all() for value in checkpoint.values())


@pytest.mark.parametrize("arguments, words", [
    (["--captions", "missing.jsonl"], ["missing.jsonl", "no such file"]),
    (["--image-root", "missing"], ["missing", "no such folder"]),
    (["--text", "nothing"], ["nothing"]),
    (["--text", "alt=much"], ["alt=much"]),
    (["--text", "alt=0"], ["weights"]),
    (["--model", "ViT-Z"], ["ViT-Z", "nano"]),
    (["--batch-size", 17], ["17", "16 rows"]),
    (["--batch-size", 0], ["0"]),
    (["--tokenizer", "missing.json"], ["missing.json"]),
    (["--resume", "missing.pt"], ["missing.pt"]),
    (["--precision", "fp8"], ["fp8"]),
    (["--nonsense"], ["--nonsense"]),
    (["--micro-batch", 0], ["--micro-batch", "1 or more"]),
    (["--steps", 0], ["--steps", "1 or more"]),
    (["--seed", -1], ["--seed", "0 or more"]),
    (["--lr", "nan"], ["--lr", "more than 0"]),
    (["--lr", 0], ["--lr", "more than 0"]),
    (["--wd", -1], ["--wd", "0 or more"]),
    (["--beta2", 1], ["--beta2", "less than 1"]),
    (["--eps", 0], ["--eps", "more than 0"]),
    (["--workers", -1], ["--workers", "0 or more"]),
    (["--save-every", 0], ["--save-every"]),
    (["--log-every", 0], ["--log-every"]),
    (["--image-size", 33], ["--image-size 33", "multiple of", "8"]),
    (["--warmup", 6], ["--warmup 6", "6 steps"]),
    (["--image-root", "/"], ["--image-root /", "none of the images"]),
    (["--alt-choice", "last"], ["last", "first"]),
], ids=lambda value: str(value[:2]))
def test_mistakes(shapes, tmp_path, arguments, words, capfd):
    with pytest.raises(SystemExit) as stop:
        T.main(train_arguments(shapes, tmp_path / "out", *arguments))
    assert_mistake(subprocess.CompletedProcess([], stop.value.code, stderr=capfd.readouterr().err), *words)
    assert not (tmp_path / "out").exists()


def test_a_file_with_none_of_the_fields_is_named(shapes, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"image": "red-bar.png", "title": "red bar"}\n' * 20)
    done = train(shapes, tmp_path / "out", "--captions", shapes / "captions.jsonl", tmp_path / "other.jsonl")
    assert_mistake(done, "other.jsonl", "alt rewrite_a rewrite_b")


def test_a_short_run_gets_a_short_warm_up_and_a_run_of_no_steps_is_none(shapes, tmp_path):
    command = train_arguments(shapes, tmp_path / "out", "--epochs", 1, "--batch-size", 1)
    for flag in ("--steps", "--warmup"):
        at = command.index(flag)
        command = command[:at] + command[at + 2:]
    done = run("train_clip.py", *command)
    assert done.returncode == 0 and "warm-up" in done.stderr and "it is 1" in done.stderr
    assert max(row["lr"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")) == 1e-3
    none = run("train_clip.py", *command, "--out", tmp_path / "none", "--epochs", "0.01")
    assert_mistake(none, "--epochs 0.01", "no step")
    assert not (tmp_path / "none").exists()


def test_a_second_launch_into_the_same_folder_leaves(shapes, tmp_path):
    out, arguments = tmp_path / "run", ("--steps", 400, "--resume", "auto")
    first = start(shapes, out, *arguments)
    wait_for_steps(first, out, 2)
    assert_mistake(train(shapes, out, *arguments), "another launch is at work")
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)  # whoever held the lock, it is free
    first.wait()
    assert train(shapes, out, *arguments[2:], "--steps", 400, "--resume", "auto", "--log-every", 400).returncode == 0


def test_another_runs_folder_is_not_written_to(shapes, tmp_path):
    for name in "ab":
        assert train(shapes, tmp_path / name, "--steps", 3).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert_mistake(train(shapes, tmp_path / "b", "--steps", 3, "--resume", tmp_path / "a" / "checkpoint.pt"), "not empty")
    assert {path: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert "finished" in train(shapes, tmp_path / "a", "--steps", 3, "--resume", tmp_path / "a" / "checkpoint.pt").stdout


def test_rows_in_another_order_do_not_go_on(shapes, tmp_path):
    lines = (shapes / "captions.jsonl").read_text().splitlines(True)
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    arguments = ("--captions", tmp_path / "captions.jsonl", "--steps", 4)
    assert train(shapes, tmp_path / "out", *arguments).returncode == 0
    (tmp_path / "captions.jsonl").write_text("".join(lines[::-1]))
    assert_mistake(train(shapes, tmp_path / "out", *arguments, "--resume", "auto"), "contents")


def test_a_damaged_checkpoint_is_not_gone_on_with(shapes, trained, tmp_path):
    data = bytearray((trained / "checkpoint.pt").read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 4000):
        data[at] ^= 0x11
    (tmp_path / "checkpoint.pt").write_bytes(data)
    assert_mistake(train(shapes, tmp_path / "out", "--resume", tmp_path / "checkpoint.pt"), "checkpoint.pt", "damaged")


def test_a_full_disk_while_logging_saves_the_state(shapes, tmp_path):
    """/dev/full takes no byte: in the place of metrics.jsonl it is a disk that is full for the log alone."""
    whole, full = tmp_path / "whole", tmp_path / "full"
    code = f"""import runpy, sys, train_clip as T
real = T.open_log
T.open_log = lambda path, step: open("/dev/full", "ab", buffering=0) if "metrics" in path and not {str(whole)!r} in path else real(path, step)
T.main(sys.argv[1:])"""
    for folder in (whole, full):
        done = subprocess.run([sys.executable, "-c", code, *train_arguments(shapes, folder, "--steps", 4, "--device", "cpu")], cwd=ROOT,
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == (0 if folder == whole else 2), done.stderr
    assert_stopped(done, "No space left", "is saved")
    assert 1 <= torch.load(full / "checkpoint.pt", weights_only=True)["step"] <= 2
    assert train(shapes, full, "--steps", 4, "--resume", "auto", "--device", "cpu").returncode == 0
    for name, value in torch.load(whole / "checkpoint.pt", weights_only=True)["model"].items():
        assert torch.equal(torch.load(full / "checkpoint.pt", weights_only=True)["model"][name], value)


def test_sigterm_to_the_workers_too_saves(shapes, tmp_path):
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
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == read_jsonl(out / "metrics.jsonl")[-1]["step"]
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


def test_init_goes_on_from_other_weights(shapes, trained, tmp_path):
    """With a new optimizer, its own sizes and tokenizer; the first loss is that of the weights, not ln(batch)."""
    command = train_arguments(shapes, tmp_path / "out", "--batch-size", 16, "--init", trained / "checkpoint.pt", "--steps", 2, "--warmup", 1)
    for flag in ("--model", "--tokenizer"):
        at = command.index(flag)
        command = command[:at] + command[at + 2:]
    done = run("train_clip.py", *command)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out")[0] < 1.5 < losses(trained)[0]
    assert_mistake(run("train_clip.py", *command, "--out", tmp_path / "x", "--model", "nano"), "--init", "--model")
    assert_mistake(run("train_clip.py", *command, "--out", tmp_path / "x", "--image-size", 48), "--image-size 48", "32")
    longer = run("train_clip.py", *command, "--out", tmp_path / "long", "--context-length", 120)
    assert longer.returncode == 0, longer.stderr
    model, tokenizer, _ = T.load_checkpoint(str(tmp_path / "long" / "checkpoint.pt"))
    assert model.positional_embedding.shape[0] == 120 == tokenizer(["red " * 500]).shape[1]
    assert losses(tmp_path / "long")[0] == pytest.approx(losses(tmp_path / "out")[0], rel=1e-4)  # of texts under 20 tokens


def test_stretched_positions():
    positions = torch.arange(77.0)[:, None] * torch.ones(1, 3)
    longer = T.stretched(positions, 248)
    assert longer.shape == (248, 3) and longer[:20].equal(positions[:20]) and longer[20, 0] == 20 and longer[-1, 0] == 76
    assert (longer.diff(dim=0) > 0).all() and T.stretched(positions, 10).equal(positions[:10])


def test_kept_checkpoints(shapes, tmp_path):
    assert train(shapes, tmp_path / "out", "--steps", 7, "--keep-every", 3).returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint*")) == ["checkpoint-3.pt", "checkpoint-6.pt", "checkpoint.pt"]
    assert [torch.load(tmp_path / "out" / name, weights_only=True)["step"] for name in ("checkpoint-3.pt", "checkpoint.pt")] == [3, 7]
    T.load_checkpoint(str(tmp_path / "out" / "checkpoint-6.pt"))


def test_ranks_that_differ_stop(shapes, tmp_path):
    """Each with an OUT of its own, as on nodes that do not share their disks: one resumes, one would begin."""
    running = start(shapes, tmp_path / "0", "--steps", 400)
    wait_for_steps(running, tmp_path / "0", 3)
    running.terminate()
    assert running.wait() == 0
    code = "import json, os, sys, train_clip as T; T.main(json.loads(sys.argv[1])[int(os.environ['RANK'])])"
    (tmp_path / "two.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code)
    same = [train_arguments(shapes, tmp_path / str(rank), "--steps", 400, "--resume", "auto", "--device", "cpu") for rank in (0, 1)]
    done = run(tmp_path / "two.py", json.dumps(same), ranks=2, fresh=True)
    assert done.returncode != 0 and "the ranks begin at different steps" in done.stderr and "Traceback (most recent call last):\n  File \"" + str(tmp_path) not in done.stderr


def test_a_killed_worker_is_told_in_one_line(shapes, tmp_path):
    running = subprocess.Popen([sys.executable, str(ROOT / "train_clip.py"), *train_arguments(shapes, tmp_path / "out", "--steps", 5000, "--workers", 1)],
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for_steps(running, tmp_path / "out", 3)
    os.kill(worker_of(running.pid), signal.SIGKILL)
    _, stderr = running.communicate(timeout=120)
    assert_stopped(subprocess.CompletedProcess([], running.returncode, stderr=stderr), "worker", "killed", "--workers")


def test_a_killed_launch_leaves_no_worker(shapes, tmp_path):
    running = start(shapes, tmp_path / "out", "--steps", 5000, "--workers", 1)
    wait_for_steps(running, tmp_path / "out", 1)
    worker = worker_of(running.pid)
    running.send_signal(signal.SIGKILL)
    running.wait()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")


@pytest.mark.parametrize("variables, words", [({"RANK": "0"}, ["WORLD_SIZE", "MASTER_ADDR"]), ({"SLURM_NTASKS": "2"}, ["SLURM", "RANK"])])
def test_launchers_that_are_half_set(shapes, tmp_path, variables, words):
    assert_mistake(run("train_clip.py", *train_arguments(shapes, tmp_path / "out"), env=variables), *words)


def test_several_files_are_one_data_set(shapes, tmp_path):
    (tmp_path / "more.jsonl").write_text('{"image": "red-bar.png", "vecap": "a red bar"}\n' * 8)
    done = train(shapes, tmp_path / "out", "--captions", shapes / "captions.jsonl", tmp_path / "more.jsonl", "--text", "alt", "vecap")
    assert done.returncode == 0 and "24 rows" in done.stderr, done.stderr


@pytest.mark.parametrize("arguments", [["--ssl"], ["--model", "ViT-B/16-laclip"], ["--compile"]], ids=lambda a: a[0] + a[-1])
def test_a_step_of_every_kind(shapes, tmp_path, arguments):
    done = train(shapes, tmp_path / "out", *arguments, "--steps", 1, "--warmup", 0, "--batch-size", 4, "--save-every", 9)
    assert done.returncode == 0 and len(losses(tmp_path / "out")) == 1, done.stderr
    model, _, transform = T.load_checkpoint(str(tmp_path / "out" / "checkpoint.pt"))
    assert model.encode_image(transform(Image.new("RGB", (50, 40)))[None]).isfinite().all()


def test_a_tokenizer_without_an_end_token(shapes, tmp_path):
    content = json.loads((shapes / "tokenizer.json").read_text())
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert_mistake(train(shapes, tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.json"), "end token")


def test_load_checkpoint_needs_nothing_else(trained):
    model, tokenizer, transform = T.load_checkpoint(str(trained / "checkpoint.pt"))
    assert not model.training
    assert model.encode_image(transform(Image.new("RGB", (50, 40)))[None]).shape == (1, 128)
    assert model.encode_text(tokenizer(["red bar", "a"])).shape == (2, 128)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_what_is_no_checkpoint(tmp_path, content, capsys):
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"epoch": 1}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        T.load_checkpoint(str(path))
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
