"""What train_clip.py imports by a flag: --ssl, --micro-batch, --text-model."""
import contextlib
import shutil

import numpy as np
import pytest
import torch

import train_clip as T
from conftest import assert_same_runs, random_texts, read_jsonl, run_cases, train_arguments, without
from data import grad_cache, slip
from tools import word_tokenizer


def test_simclr_loss_equals_the_formula():
    """NT-Xent of SimCLR (eq. 1) over 2 N views, the pair of a view its image's other view. BatchNorm is of each view, as in SLIP."""
    torch.manual_seed(0)
    views = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    z = (views - views.mean(0)) / (views.var(0, correction=0) + 1e-5) ** 0.5
    z = [z[i, a] / z[i, a].norm() for a in (0, 1) for i in range(5)]  # view 0 of all, then view 1
    terms = [-(torch.exp(z[i] @ z[(i + 5) % 10] / 0.1) / sum(
        torch.exp(z[i] @ z[k] / 0.1) for k in range(10) if k != i)).log() for i in range(10)]
    head = torch.nn.BatchNorm1d(8, affine=False, dtype=torch.float64)
    loss = slip.simclr_loss(head, views)  # the head's output is taken as float32
    torch.testing.assert_close(loss, (sum(terms) / 10).float(), atol=1e-6, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, views), torch.autograd.grad(sum(terms) / 10, views)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_micro_batches_have_the_whole_batchs_gradient_in_double_precision(monkeypatch):
    """So what differs elsewhere is rounding. BatchNorm in SLIP's head is over all twelve images."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    config = T.Config(**T.PRESETS["nano"], vocab_size=500)
    model, head = T.CLIP(config).double(), slip.projection_head(config.vision_width).double()
    images, texts = torch.randint(0, 256, (12, 3, 3, 32, 32), dtype=torch.uint8), random_texts(12)
    chunks = {size: [(images[at:at + size], T.pack(texts[at:at + size])) for at in range(0, 12, size)] for size in (12, 5)}

    def objective(_, scale, x, y, views):
        return T.clip_loss(x, y[:, 0], scale) + slip.simclr_loss(head, views)

    objective(None, *model(*chunks[12][0])).backward()
    parameters = dict([*model.named_parameters(), *head.named_parameters()])
    whole = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad(), head.zero_grad()
    grad_cache.backward(model, model, objective, chunks[5], None, contextlib.nullcontext)
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, whole[name], atol=1e-12, rtol=1e-9, msg=name)
    assert whole["logit_scale"].abs() > 1e-4


def test_slips_views_are_strong_and_the_image_itself_is_not(shapes, places, tmp_path):
    """Of three views the first is LaCLIP's crop; the others are flipped in half, grey in a fifth,
    jittered, and down to 0.08 of the image."""
    places.image.save(tmp_path / "places.png")
    args = T.parse_args(train_arguments(shapes, tmp_path, "--image-root", tmp_path, "--ssl"))
    rows = [{"image": "places.png", "alt": "red bar"}]
    data = T.Samples(args, rows, T.Tokenizer.load(args.tokenizer), 32)
    views = np.stack([data[0, i, 0][0].numpy() for i in range(600)]).astype(float)
    mine = places.features([places.box_of(view[0].transpose(1, 2, 0)) for view in views])
    assert (mine["area"] > 0.45).all() and (views[:, 0, 2] < 3).all()  # blue stays 0
    spread = views[:, :, 0].max((2, 3)) - views[:, :, 0].min((2, 3))
    for v in (1, 2):
        grey = (views[:, v, 0] == views[:, v, 1]).all((1, 2))
        assert abs(grey.mean() - 0.2) < 0.07
        flipped = views[:, v, 0, :, 1].mean(1) > views[:, v, 0, :, -2].mean(1)
        assert abs(flipped.mean() - 0.5) < 0.08
        assert (views[:, v, 2].max((1, 2)) > 3).mean() > 0.5  # jitter brings blue in
        assert np.quantile(spread[:, v], 0.2) < 0.75 * np.quantile(spread[:, 0], 0.2)
    assert not np.array_equal(views[:, 1], views[:, 2])


def test_slips_loss_is_added_with_weight_1(shapes, tmp_path, monkeypatch):
    parts = {}
    for module, name in ((T, "clip_loss"), (slip, "simclr_loss")):
        real, found = getattr(module, name), parts.setdefault(name, [])
        monkeypatch.setattr(module, name, lambda *a, real=real, found=found:
                            found.append(real(*a)) or found[-1])
    T.main(train_arguments(shapes, tmp_path, "--ssl", "--steps", 2, "--warmup", 0))
    for row, a, b in zip(read_jsonl(tmp_path / "metrics.jsonl"), *parts.values(), strict=True):
        assert row["loss"] == pytest.approx(a.item() + b.item()) and b.item() > 1


@pytest.fixture(scope="session")
def encoders(shapes, tmp_path_factory):
    """Folders of a small BERT, RoBERTa and T5 with random weights, and tokenizers of words with their start and end tokens"""
    import transformers as hf

    folder, rows = tmp_path_factory.mktemp("encoders"), read_jsonl(shapes / "captions.jsonl")
    words = sorted({word for row in rows for key in ("alt", "rewrite_a") for word in row[key].split()})
    size = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, vocab_size=200)
    t5 = hf.T5Config(vocab_size=200, d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3)
    for name, model, ends in (("bert", hf.BertModel(hf.BertConfig(max_position_embeddings=80, **size)), ["[CLS]", "[SEP]"]),
                              ("roberta", hf.RobertaModel(hf.RobertaConfig(max_position_embeddings=82, **size)), ["<s>", "</s>"]),
                              ("t5", hf.T5EncoderModel(t5), ["</s>"])):
        tokenizer = word_tokenizer([*ends[:-1], "<pad>", ends[-1], "<unk>", *words], *ends)
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
        tokenizer.save_pretrained(folder / name)
        torch.manual_seed(1)
        model.config.pad_token_id = len(ends) - 1
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
    return folder


def with_encoder(shapes, out, encoder, *arguments):
    return without(train_arguments(shapes, out, "--text-model", encoder, "--text", "alt", *arguments), "--tokenizer")


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_a_text_encoder_equals_transformers(shapes, encoders, tmp_path, family):
    """A frozen one keeps its weights; the feature is the projected mean over a text's tokens,
    whatever stands beside it. The checkpoint holds all that evaluation needs."""
    from transformers import AutoModelForTextEncoding, AutoTokenizer

    T.main(with_encoder(shapes, tmp_path, encoders / family, "--freeze-text", "--steps", 2, "--warmup", 0))
    model, tokenizer, _ = T.load_checkpoint(str(tmp_path / "checkpoint.pt"))
    theirs = AutoModelForTextEncoding.from_pretrained(encoders / family).eval()
    texts = ["red bar", "a cross that is green all over", "x", "", "a square that is blue and red"]
    inputs = AutoTokenizer.from_pretrained(encoders / family)(texts, padding=True, return_tensors="pt")
    mask = inputs.attention_mask
    with torch.inference_mode():
        states = theirs(input_ids=inputs.input_ids, attention_mask=mask).last_hidden_state
        expected = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) @ model.text_projection
        torch.testing.assert_close(model.encode_text(tokenizer(texts)), expected, atol=1e-5, rtol=1e-4)
    assert not model.text_encoder.training and model.text_projection.shape == (48, 128)


@pytest.mark.parametrize("frozen", [[], ["--freeze-text"]], ids=["tuned", "frozen"])
def test_a_text_encoder_goes_on_exactly(shapes, encoders, tmp_path, frozen):
    """Killed in the middle it ends with the same weights. What is frozen stays, all else moves."""
    command = with_encoder(shapes, tmp_path, encoders / "bert", *frozen, "--keep-every", 3, "--wd", 0.1, "--device", "cpu")
    T.main(command)
    whole, before = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("checkpoint.pt", "checkpoint-3.pt"))
    (tmp_path / "checkpoint-3.pt").rename(tmp_path / "checkpoint.pt")
    T.main(command)
    again = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    for name in whole:
        assert torch.equal(whole[name], again[name]), name
        stays = bool(frozen) and name.startswith("text_encoder.")
        assert torch.equal(whole[name], before[name]) == stays, name


def test_mistakes_with_a_text_encoder(shapes, encoders, tmp_path, capfd):
    bare = shutil.copytree(encoders / "bert", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    for encoder, flags, word in ((bare, [], "bare"), (encoders / "bert", ["--context-length", 81], "81 tokens")):
        with pytest.raises(SystemExit) as stop:
            T.main(with_encoder(shapes, tmp_path / "out", encoder, *flags))
        assert stop.value.code == 2 and word in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("ranks", [None, 2])
def test_text_encoders_on_ranks_and_in_micro_batches(shapes, encoders, tmp_path, ranks):
    methods = {"tuned": ["--text-model", encoders / "bert"],
               "frozen": ["--text-model", encoders / "t5", "--freeze-text"]}
    micro = {f"{name}-micro": [*arguments, "--micro-batch", 5] for name, arguments in methods.items()}
    (tmp_path / "one").mkdir()
    run_cases(shapes, tmp_path / "one", None, methods | ({} if ranks else micro))
    if ranks:
        run_cases(shapes, tmp_path, ranks, methods | micro)
    assert_same_runs(tmp_path if ranks else tmp_path / "one", micro, tmp_path / "one")
