"""data/plan.py: FLOPs against torch's counter, bytes against a real run's files, hours against arithmetic by hand."""
import json
import re
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import train
from data import grad_cache, plan
from data.slip import projection_head, simclr_loss
from train_clip import CLIP, PRESETS, Config, clip_loss, multitext_loss, pack
from tools import works


def counted(function):
    """FLOPs of a call; attention as plain products, since torch does not count its fused CPU kernel"""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture
def nano():
    torch.manual_seed(0)
    return CLIP(Config(**PRESETS["nano"], vocab_size=100))


def texts(n, length):
    return pack([torch.tensor([5] * (length - 1) + [99])] * n)


def test_the_towers_are_exact(nano):
    c = nano.config
    assert counted(lambda: nano.encode_image(torch.zeros(8, 3, c.image_size, c.image_size))) == 8 * plan.image_flops(c)
    assert counted(lambda: nano.encode_text(texts(8, 12))) == 8 * plan.text_flops(c, 12)


@pytest.mark.parametrize("loss, K, views, chunk", [
    ("infonce", 1, 1, 8), ("multitext", 5, 1, 8), ("infonce", 1, 3, 8), ("infonce", 1, 1, 4)])
def test_a_training_step_within_2_percent(nano, loss, K, views, chunk):
    c, head = nano.config, projection_head(nano.config.vision_width)
    images = torch.zeros(8, views, 3, c.image_size, c.image_size, dtype=torch.uint8)
    chunks = [(images[at:at + chunk], texts(chunk * K, 12)) for at in range(0, 8, chunk)]

    def objective(drawn, scale, images, texts, views=None):
        value = multitext_loss(images, texts, drawn, scale) if loss == "multitext" else clip_loss(images, texts[:, 0], scale)
        return value if views is None else value + simclr_loss(head, views)

    drawn = torch.zeros(8, dtype=torch.long)
    flops = counted(lambda: objective(drawn, *nano(*chunks[0])).backward() if chunk == 8 else
                    grad_cache.backward(nano, nano, objective, chunks, drawn, nullcontext))
    expected = plan.train_flops(c, 12, batch=8, texts=K, views=views, forwards=3 if chunk == 8 else 4)
    assert flops == pytest.approx(8 * expected, rel=0.02)  # the pixels need no gradient


def test_a_llama_reads_and_generates():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    llm, ids = plan.LLM(64, 2, 172, 500, 32), torch.ones(1, 20, dtype=torch.long)

    def generated(n):
        with torch.no_grad():
            return counted(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False))
    short, long = generated(1), generated(10)
    assert short == pytest.approx(llm.flops(20, 1), rel=0.1)  # kernels also multiply what the causal mask hides
    rotary = 2 * model.config.head_dim / 2  # angles of a token's position: an outer product, once a step
    assert long - short == pytest.approx(llm.flops(20, 10) - llm.flops(20, 1), rel=1e-9, abs=9 * rotary)
    assert llm.flops(5, 3, cached=20) == pytest.approx(llm.flops(25, 3) - llm.flops(20, 0))  # a shared beginning is read once


@pytest.mark.parametrize("name, published", [
    ("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320), ("llama-3.1-8b", 8_030_261_248)])
def test_the_llms_have_the_published_sizes(name, published):
    llm = plan.LLMS[name]
    matrices = (llm.flops(10 ** 6, 0) - 4 * llm.layers * llm.width * 10 ** 6 * (10 ** 6 + 1) / 2) / 2 / 10 ** 6
    assert matrices + 2 * llm.width * llm.vocabulary == pytest.approx(published, rel=1e-3)  # and embeddings and head


def test_bytes_are_those_of_a_real_run(shapes, tmp_path):
    rows = [{"image": f"{i:03d}.png", "alt": "a red bike", "vec": "one “red” bike"} for i in range(20)]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    lengths = {"image": 7, "alt": 10, "vec": len("one “red” bike".encode())}
    assert len(data) == 20 * plan.jsonl_bytes(lengths)

    done = train(shapes, tmp_path / "run", "--steps", 2, "--warmup", 1)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    n = plan.parameters(Config(**state["config"]))
    assert n == sum(x.numel() for x in state["model"].values())
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_size == pytest.approx(plan.checkpoint_bytes(n), rel=0.1)


def as_json(tmp_path, *arguments):
    plan.main([*map(str, arguments), "--json", str(tmp_path / "plan.json")])
    return json.loads((tmp_path / "plan.json").read_text())


def test_hours_by_hand(tmp_path):
    result, = as_json(tmp_path, "--rows", 3.6e6, "--epochs", 2, "--rate", "train=1000", "rewrite=50", "caption=26t", "fuse=100")
    hours = {name: stage["hours"] for name, stage in result["stages"].items()}
    assert hours == pytest.approx({"train": 2, "rewrite": 20, "caption": 1000, "fuse": 10})  # 26 tokens a caption
    assert result["LaCLIP"]["hours"] == pytest.approx(22) and result["VeCLIP"]["hours"] == pytest.approx(1012)
    assert result["VeCLIP"]["longest"] == "caption" and result["LaCLIP"]["share"] == pytest.approx(20 / 22)
    assert result["LaCLIP"]["even_epochs"] == pytest.approx(20)  # of one hour each
    result, = as_json(tmp_path, "--rows", 1e6, "--epochs", 10, "--peak", 100, "--mfu", 0.5, "--model", "ViT-B/32")
    expected = 1e7 * plan.train_flops(Config(**PRESETS["ViT-B/32"]), 27, 8192) / 50e12 / 3600
    assert result["stages"]["train"]["hours"] == result["stages"]["train"]["hours_peak"] == pytest.approx(expected)


def test_as_a_user():
    tables, rates = works("plan", "--rows", "3e6", "300e6", "--gpu", "H100", fresh=True).stdout.split("\nrates")
    assert len(re.findall(r"^[\d,]+ rows; ", tables, re.M)) == 2
    assert "SGLang" in rates and "989 TFLOP/s x 40%" in rates
    assert all(note in rates for note in re.findall(r" \[\d+\] ", tables))  # every rate says where it comes from
