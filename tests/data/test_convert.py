"""data/convert_checkpoint.py: a converted model gives the embeddings of the library that its weights come from."""
import argparse
import copy
import json
import os
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

import train_clip as T
from conftest import ROOT, assert_mistake
from data import convert_checkpoint as C
from tools import run_tool, word_tokenizer

TEXTS = ["red bar", "a green square that is blue all over", "<|endoftext|> red", ""]
HALVES, TENTHS = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)  # a mean and a standard deviation that are nobody's default


def convert(*arguments):
    """The command in this process. -> what load_checkpoint makes of its output"""
    C.main([str(argument) for argument in arguments])
    return T.load_checkpoint(str(arguments[2]))


def assert_refused(*arguments, words):
    """Exit status 2, one line, and no output. -> the line"""
    before, done = set(arguments[2].parent.iterdir()), run_tool("convert_checkpoint", *arguments)
    assert_mistake(done, *words)
    assert set(arguments[2].parent.iterdir()) == before
    return done.stderr


def randomise(module, std=0.1):
    """Every tensor random, biases and LayerNorms too: the libraries' initialisation would hide a lost one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return module.eval()


def same_features(model, theirs, ours=None, tokens=None):
    """theirs: images, tokens -> their features of both. ours: the tokens as our model takes them"""
    c = model.config
    images = torch.randn(3, 3, c.image_size, c.image_size)
    if ours is None:  # the end token at different places, other tokens behind it
        tokens = torch.from_numpy(np.random.default_rng(0).integers(3, c.vocab_size - 2, (5, c.context_length)))
        tokens[torch.arange(5), torch.arange(5) * 3 % c.context_length + 1] = c.vocab_size - 1
        ours = T.pack([row[:row.argmax() + 1] for row in tokens])
    with torch.inference_mode():
        got = model.encode_image(images), model.encode_text(ours)
        for a, b in zip(got, theirs(images, tokens), strict=True):
            assert b.std() > 1e-3  # no model of zeros
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def ids(tokenizer, texts, length=0):
    """-> the ids of the texts, [B, L], zeros behind them"""
    rows = [tokenizer.encode(text) for text in texts]
    longest = max(length, *map(len, rows))
    return torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])


@pytest.fixture(scope="module")
def vocabulary(shapes):
    tokenizer = T.Tokenizer.load(str(shapes / "tokenizer.json"))
    tokenizer.vocab_size, tokenizer.eot_id = tokenizer.tokenizer.get_vocab_size(), tokenizer.encode("a")[-1].item()
    return tokenizer


@pytest.fixture
def command(shapes, tmp_path):
    """For OpenAI's or open_clip's weights"""
    return "openai", tmp_path / "in.pt", tmp_path / "out.pt", "--tokenizer", shapes / "tokenizer.json"


def hf_model(folder, tokenizer, vision="gelu", text="quick_gelu", **text_config):
    from transformers import CLIPConfig, CLIPModel
    text_config = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                       hidden_act=text, max_position_embeddings=20, vocab_size=tokenizer.vocab_size,
                       eos_token_id=tokenizer.eot_id, bos_token_id=None, layer_norm_eps=0.02) | text_config
    vision = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3, image_size=32,
                  patch_size=8, hidden_act=vision, layer_norm_eps=1e-3)
    hf = randomise(CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=48)))
    hf.save_pretrained(folder)
    return hf


def hf_features(hf, images, input_ids, **more):
    texts = hf.get_text_features(input_ids=input_ids, **more).pooler_output
    return hf.get_image_features(pixel_values=images).pooler_output, texts


def copy_tokenizer(shapes, folder):
    shutil.copy(shapes / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.fixture(scope="module")
def hf_folder(shapes, vocabulary, tmp_path_factory):
    """A whole folder: weights, tokenizer, preprocessor."""
    from transformers import CLIPImageProcessor
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf_model(folder, vocabulary)
    copy_tokenizer(shapes, folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=HALVES,
                       image_std=TENTHS).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("vision, text", [("gelu", "quick_gelu"), ("quick_gelu", "gelu")])
@pytest.mark.parametrize("eos", ["real", 2])
def test_hf_to_ours_and_back(hf_folder, vocabulary, tmp_path, vision, text, eos):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    folder = shutil.copytree(hf_folder, tmp_path / "in")
    hf = hf_model(folder, vocabulary, vision, text, **({} if eos == "real" else {"eos_token_id": 2}))
    model, tokenizer, transform = convert("hf", folder, tmp_path / "ours.pt")
    same_features(model, partial(hf_features, hf))
    torch.testing.assert_close(model.logit_scale, hf.logit_scale)
    assert "eot_id" not in torch.load(tmp_path / "ours.pt", weights_only=True)["config"]
    assert (model.config.mean, model.config.std, model.config.resize) == (HALVES, TENTHS, "bicubic")
    assert ids(tokenizer, TEXTS).equal(ids(vocabulary, TEXTS))

    C.main(["to-hf", str(tmp_path / "ours.pt"), str(tmp_path / "back")])
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    back = CLIPModel.from_pretrained(tmp_path / "back")
    ignored = {"pad_token_id", "projection_dim", "dtype", "_name_or_path"}  # no part of the mathematics
    ignored |= {"eos_token_id"} if eos == 2 else set()  # the true one is written
    for tower in ("text_config", "vision_config"):
        a, b = ({k: v for k, v in getattr(x.config, tower).to_dict().items() if k not in ignored} for x in (hf, back))
        assert a == b
    batch = AutoTokenizer.from_pretrained(tmp_path / "back")(TEXTS, padding=True, return_tensors="pt")
    same_features(model, partial(hf_features, back, attention_mask=batch.attention_mask), tokenizer(TEXTS), batch.input_ids)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "back")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 40, 3), np.uint8))  # only cropped
    torch.testing.assert_close(processor(picture, return_tensors="pt").pixel_values[0], transform(picture))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """As T5's: </s> with id 1 behind a text"""
    path = tmp_path_factory.mktemp("t5") / "tokenizer.json"
    word_tokenizer("<pad> </s> <unk> red green blue square bar a that is all over".split(), "</s>").save(str(path))
    return path


def test_veclip(vocabulary, t5, tmp_path):
    """Texts, padded with a mask as its release does it; the resize that is TensorFlow's; an embedding with rows without an id."""
    their_tokenizer = Tokenizer.from_file(str(t5))
    hf = hf_model(tmp_path / "in", vocabulary, text="gelu", vocab_size=64, eos_token_id=1)
    model, tokenizer, _ = convert("veclip", tmp_path / "in", tmp_path / "ours.pt", "--tokenizer", t5)
    assert (model.config.vocab_size, model.config.resize) == (64, "bilinear-unsmoothed")
    texts = ["red bar", "a green square that is blue all over", "blue"]
    their_tokenizer.enable_padding(pad_id=0)
    batch = their_tokenizer.encode_batch(texts)
    tokens, mask = (torch.tensor([getattr(row, name) for row in batch]) for name in ("ids", "attention_mask"))
    assert ids(tokenizer, texts).equal(tokens)
    same_features(model, partial(hf_features, hf, attention_mask=mask), tokenizer(texts), tokens)
    C.main(["to-hf", str(tmp_path / "ours.pt"), str(tmp_path / "back")])
    assert not (tmp_path / "back" / "preprocessor_config.json").exists()  # it would smooth


def open_clip_model(vocab_size, quick_gelu=False):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    vision = CLIPVisionCfg(layers=2, width=128, patch_size=8, image_size=32)
    text = CLIPTextCfg(16, vocab_size, width=64, heads=1, layers=3)
    return randomise(CLIP(48, vision, text, quick_gelu=quick_gelu), 0.05)


def same_as_open_clip(model, theirs):
    same_features(model, lambda images, tokens: (theirs.encode_image(images), theirs.encode_text(tokens)))


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("form", ["plain", "trainer", "compiled", "safetensors"])
def test_open_clip(vocabulary, command, form, quick_gelu):
    theirs = open_clip_model(vocabulary.vocab_size, quick_gelu)
    path, state = command[1], theirs.state_dict()
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif form == "plain":
        torch.save(state | {"attn_mask": theirs.attn_mask}, path)
    else:
        prefix = "module." if form == "trainer" else "_orig_mod.module."
        numbers = {"epoch": np.int64(3), "best_acc1": np.float64(12.3), "lr": np.float32(1), "done": np.bool_(True)}
        torch.save({"state_dict": {prefix + name: x for name, x in state.items()}, **numbers}, path)
    model, tokenizer, _ = convert("openai", path, *command[2:], *["--quick-gelu"] * quick_gelu)
    same_as_open_clip(model, theirs)
    assert model.config.mean == T.Config.mean and ids(tokenizer, TEXTS).equal(ids(vocabulary, TEXTS))


def test_an_open_clip_folder(shapes, vocabulary, tmp_path):
    """As open_clip pushes them to a hub, in shards: mean, std, resize and activation stand in open_clip_config.json."""
    theirs, folder = open_clip_model(vocabulary.vocab_size, quick_gelu=True), tmp_path / "in"
    folder.mkdir()
    state = theirs.state_dict()
    files = {name: f"open_clip_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, folder / file)
    (folder / "open_clip_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    model_cfg = {"embed_dim": 48, "vision_cfg": {"width": 128}, "text_cfg": {"width": 64}, "quick_gelu": True}
    pixels = {"mean": HALVES, "std": TENTHS, "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": pixels}))
    copy_tokenizer(shapes, folder)
    model, _, _ = convert("openai", folder, tmp_path / "ours.pt")
    same_as_open_clip(model, theirs)
    assert (model.config.mean, model.config.std, model.config.resize) == (HALVES, TENTHS, "bilinear")
    squashed = {"model_cfg": model_cfg, "preprocess_cfg": {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(squashed))
    assert_refused("openai", folder, tmp_path / "no.pt", words=["open_clip_config.json", "squash"])


def test_ours_to_open_clip(vocabulary, tmp_path, capfd):
    """open_clip.create_model(NAME, pretrained=FILE) on the file, NAME being the config that is printed."""
    import open_clip
    model = randomise(T.CLIP(T.Config(
        embed_dim=48, image_size=32, patch_size=8, vision_width=128, vision_layers=2, vision_heads=2, text_width=64,
        text_layers=3, text_heads=1, context_length=16, vocab_size=vocabulary.vocab_size)), 0.05)
    T.save_checkpoint(str(tmp_path / "ours.pt"), model, vocabulary)
    C.main(["to-open-clip", str(tmp_path / "ours.pt"), str(tmp_path / "theirs.pt")])
    told = capfd.readouterr().out
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "our-own.json").write_text(told[told.index('{"embed_dim"'):].splitlines()[0])
    open_clip.add_model_config(tmp_path / "configs")
    same_as_open_clip(model, open_clip.create_model("our-own", pretrained=str(tmp_path / "theirs.pt")).eval())


def test_texts_are_mended_as_open_clip_mends_them(tmp_path):
    """Entities, curly quotes, broken Unicode: the ids of open_clip's tokenizer, and of both spellings the same."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer
    theirs, path = SimpleTokenizer(), tmp_path / "tokenizer.json"
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokens = {names.get(token, token): i for token, i in theirs.encoder.items()}  # OpenAI's 49,408
    CLIPTokenizer(vocab=tokens, merges=list(theirs.bpe_ranks)).backend_tokenizer.save(str(path))
    texts = ["salt &amp; pepper", "salt & pepper", "the dog\u2019s \u201cred\u201d bowl", "the dog's \"red\" bowl",
             "a &amp;lt;b&gt; c", "caf\u00c3\u00a9 \u00e2\u20ac\u201d bar", "\ufb01ne  \t ART"]
    tokens = ids(T.Tokenizer(path.read_text(), 77, mend=True), texts, 77)
    assert tokens.equal(theirs(texts))
    assert tokens[0].equal(tokens[1]) and tokens[2].equal(tokens[3])
    torch.save(open_clip_model(49408).state_dict(), tmp_path / "in.pt")
    _, tokenizer, _ = convert("openai", tmp_path / "in.pt", tmp_path / "ours.pt", "--tokenizer", path)
    tokenizer = pickle.loads(pickle.dumps(tokenizer))  # as loader workers get it
    assert ids(tokenizer, texts, 77)[:, :16].equal(theirs(texts)[:, :16])


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_openais_archive(vocabulary, command):
    """TorchScript, fp16, with three numbers beside the weights, and QuickGELU without saying so."""
    theirs = open_clip_model(vocabulary.vocab_size, quick_gelu=True).half().float()
    archived = copy.deepcopy(theirs)
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(archived).pop(name, None)
        archived.register_buffer(name, torch.tensor(7))
    inputs = torch.zeros(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.long)
    torch.jit.trace(archived, inputs, check_trace=False).half().save(str(command[1]))
    done = run_tool("convert_checkpoint", *command)
    assert done.returncode == 0 and not done.stderr and "QuickGELU in vision and text" in done.stdout, done.stderr
    saved = torch.load(command[2], weights_only=True)["model"]
    assert {x.dtype for x in saved.values()} == {torch.float32}
    same_as_open_clip(T.load_checkpoint(str(command[2]))[0], theirs)


@pytest.mark.parametrize("name", ["ViT-S/16", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-H/14"])
def test_presets_are_open_clips(name):
    """Names, shapes and heads, without memory."""
    import open_clip
    with torch.device("meta"):
        theirs = open_clip.create_model(name.replace("/", "-"), device="meta")
        ours = T.CLIP(T.Config(**T.PRESETS[name]))
    state = theirs.state_dict()
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in ours.state_dict().items()}
    assert C.infer_config(state, C.OPENAI, "", C.VISION_HEADS) == ours.config
    assert theirs.visual.transformer.resblocks[0].attn.num_heads == ours.config.vision_heads
    assert theirs.transformer.resblocks[0].attn.num_heads == ours.config.text_heads


def laclip_towers(vocab_size, width, heads, qk_norm):
    """A state dict as LaCLIP's release has it, and timm's image tower, which it is built on."""
    from timm.models.vision_transformer import VisionTransformer
    torch.manual_seed(0)
    tower = randomise(VisionTransformer(img_size=32, patch_size=16, embed_dim=width, depth=2, num_heads=heads,
                                        qk_norm=qk_norm, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    text = {name: x for name, x in open_clip_model(vocab_size).state_dict().items() if not name.startswith("visual.")}
    state = {f"visual.{name}": x for name, x in tower.state_dict().items()} | text
    return tower, state | {"image_projection": torch.randn(width, 48) * 0.1}


@pytest.mark.parametrize("width, heads, qk_norm", [(96, 6, True), (384, 12, False)], ids=["laclip", "slip"])
def test_laclip_and_slip(vocabulary, command, width, heads, qk_norm):
    tower, state = laclip_towers(vocabulary.vocab_size, width, heads, qk_norm)
    head = {"image_mlp.layer1.weight": torch.zeros(8, 8), "image_mlp.bn1.running_mean": torch.zeros(8)}
    weights = {f"module.{name}": x for name, x in (state if qk_norm else state | head).items()}
    torch.save({"epoch": 35, "state_dict": weights, "args": argparse.Namespace(model="CLIP_VITB16")}, command[1])
    model, _, _ = convert("laclip", *command[1:])
    theirs = open_clip_model(vocabulary.vocab_size, quick_gelu=True)  # the text tower is OpenAI's
    theirs.load_state_dict({name: state.get(name, x) for name, x in theirs.state_dict().items()})
    same_features(model, lambda images, tokens: (tower(images) @ state["image_projection"], theirs.encode_text(tokens)))
    assert model.config.mean == (0.485, 0.456, 0.406) and model.config.std == (0.229, 0.224, 0.225)
    assert (model.config.vision_heads, model.config.vision_eps, model.config.text_eps) == (heads, 1e-6, 1e-5)


def test_our_preset_is_laclips():
    """ViT-B/16: the names and shapes of timm's tower, and the config that follows from them."""
    from timm.models.vision_transformer import VisionTransformer
    ours = T.Config(**T.PRESETS["ViT-B/16-laclip"], mend_texts=True)
    with torch.device("meta"):
        tower = VisionTransformer(num_classes=0, qk_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        text = {name: x for name, x in T.CLIP(ours).state_dict().items() if not name.startswith("visual.")}
    state = {f"visual.{name}": x.squeeze() if x.ndim == 3 else x for name, x in tower.state_dict().items()} | text
    state["image_projection"] = torch.empty(768, 512, device="meta")
    config = C.infer_config(state, C.LACLIP, "", {}, **C.LACLIP_SETTINGS)
    assert config == ours
    C.ours_from(state, config, C.LACLIP, "")  # every name, every shape


class Code:
    """Where it is unpickled, a folder appears."""

    def __reduce__(self):
        return os.mkdir, ("the-pickle-ran",)


LOST, SHORT = "transformer.resblocks.1.mlp.c_fc.bias", "visual.ln_post.weight"
EXTRA = "visual.transformer.resblocks.0.ls_1.gamma"  # of a model with LayerScale


@pytest.mark.parametrize("content, words", [
    ({LOST: None}, [LOST, "missing"]),
    ({"visual.conv1.weight": None}, ["visual.conv1.weight", "missing"]),  # a size follows from it
    ({SHORT: torch.ones(127)}, [SHORT, "[127]", "[128]"]),
    ({"token_embedding.weight": torch.ones(5)}, ["token_embedding.weight", "[5]"]),
    ({"visual.conv1.weight": torch.ones(100, 3, 8, 8)}, ["100", "64"]),
    ({EXTRA: torch.ones(128)}, [EXTRA, "unexpected"]), ({"extra": Code()}, ["mkdir"]),
    ({"logit_bias": "text"}, ["logit_bias", "no tensor"]),
    ({"visual.proj": torch.full((128, 48), float("nan"))}, ["visual.proj", "not finite"]),
    *((content, ["in.pt"])  # an empty file, a text, code, a list, a checkpoint of ours
      for content in (b"", b"no checkpoint", pickle.dumps(Code()), Code(), [1, 2], {"model": {}, "step": 1}))])
def test_partial_or_foreign_weights_and_other_files(vocabulary, command, content, words):
    if isinstance(content, bytes):
        command[1].write_bytes(content)
    else:
        if isinstance(content, dict) and "model" not in content:
            state = open_clip_model(vocabulary.vocab_size).state_dict() | content
            content = {name: x for name, x in state.items() if x is not None}
        torch.save(content, command[1])
    told = assert_refused(*command, words=words)
    assert len(told) < 400 and "\x1b" not in told and "weights_only" not in told
    assert not (ROOT / "the-pickle-ran").exists()


@pytest.mark.parametrize("kind", ["openai", "hf", "veclip", "laclip", "to-hf"])
def test_missing_input_and_existing_output(tmp_path, kind):
    assert_refused(kind, tmp_path / "missing", tmp_path / "out", words=["missing", "no such"])
    (tmp_path / "out").write_text("precious")
    assert_refused(kind, tmp_path / "missing", tmp_path / "out", words=["out", "exists"])
    assert (tmp_path / "out").read_text() == "precious"


def test_tokenizers_that_do_not_fit_and_what_hf_cannot_express(hf_folder, shapes, vocabulary, t5, tmp_path):
    path, out, size = tmp_path / "tokenizer.json", tmp_path / "out.pt", vocabulary.vocab_size
    content = json.loads((shapes / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": size, "content": "<more>"})
    path.write_text(json.dumps(content))
    assert_refused("hf", hf_folder, out, "--tokenizer", path, words=[f"ids up to {size}", f"{size} rows"])
    assert_refused("hf", hf_folder, out, "--tokenizer", t5, words=["end with id 1", f"pools at id {vocabulary.eot_id}"])
    assert_refused("hf", hf_folder, out, "--tokenizer", tmp_path / "none.json", words=["none.json"])
    torch.save(open_clip_model(size).state_dict(), tmp_path / "in.pt")
    assert_refused("openai", tmp_path / "in.pt", out, words=["--tokenizer openai/"])  # offline
    hf_model(tmp_path / "highest", vocabulary, eos_token_id=2)
    assert_refused("veclip", tmp_path / "highest", out, "--tokenizer", t5, words=["with id 1"])
    assert_refused("hf", tmp_path / "highest", out, words=["no tokenizer", "--tokenizer"])
    for name, value, word in (("pre_norm", False, "pre_norm = False"), ("conv_stem", True, "begins with convolutions")):
        config = T.Config(**T.PRESETS["nano"] | {"vocab_size": size, name: value})
        T.save_checkpoint(str(tmp_path / "ours.pt"), T.CLIP(config), vocabulary)
        assert_refused("to-hf", tmp_path / "ours.pt", tmp_path / "hf", words=[word])
    low = word_tokenizer(["a", "b", "<end>", "<unk>"], "<end>")
    T.save_checkpoint(str(tmp_path / "low.pt"), T.CLIP(T.Config(**T.PRESETS["nano"], vocab_size=4)), T.Tokenizer(low.to_str()))
    assert_refused("to-hf", tmp_path / "low.pt", tmp_path / "hf", words=["id 2"])
    assert_refused("to-open-clip", tmp_path / "low.pt", tmp_path / "hf", words=["id 2", "highest"])


@pytest.mark.parametrize("change, words", [
    ({"model_type": "siglip"}, ["model_type", "siglip"]), ({"text_config": {"hidden_act": "relu"}}, ["hidden_act", "relu"]),
    ({"vision_config": {"intermediate_size": 300}}, ["intermediate_size", "300", "4 x 96"]),
    ({"text_config": {"eos_token_id": -5}}, ["eos_token_id", "-5"]), ({"vision_config": {"patch_size": 0}}, ["sizes"]),
    ({"vision_config": {"image_size": [32, 48]}}, ["image_size", "[32, 48]"]),
    ({"vision_config": {"num_hidden_layers": 3}}, ["vision_model.encoder.layers.2.", "missing"]),
    ({"resample": 0}, ["bicubic"]), ({"do_normalize": False}, ["normalises"]), ({"size": None}, ["preprocessor_config.json"]),
    ({"crop_size": {"height": 64, "width": 64}}, ["to 32"])], ids=str)
def test_folders_that_are_no_clip_of_ours(hf_folder, tmp_path, change, words):
    folder = shutil.copytree(hf_folder, tmp_path / "in")
    key, value = *change, *change.values()
    file = folder / ("config.json" if "config" in key or key == "model_type" else "preprocessor_config.json")
    content = json.loads(file.read_text())
    content[key] = {**content[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(content))
    assert_refused("hf", folder, tmp_path / "out.pt", words=words)


def test_longer_contexts(vocabulary, command):
    """--context-length: the first twenty positions stay, the others are interpolated; short texts have the same features."""
    _, weights, out, *_ = command
    positions = torch.arange(77.0)[:, None] * torch.ones(1, 3)
    longer = C.stretched(positions, 248)
    assert longer.shape == (248, 3) and longer[:20].equal(positions[:20]) and longer[20, 0] == 20 and longer[-1, 0] == 76
    assert (longer.diff(dim=0) > 0).all() and C.stretched(positions, 10).equal(positions[:10])
    model = randomise(T.CLIP(T.Config(**T.PRESETS["nano"], vocab_size=vocabulary.vocab_size)))
    ours = out.with_name("ours.pt")
    T.save_checkpoint(str(ours), model, vocabulary)
    longer, tokenizer, _ = convert("ours", ours, out.with_name("long.pt"), "--context-length", 120)
    assert len(longer.positional_embedding) == 120 == len(tokenizer.encode("red " * 500))
    same_features(longer, lambda images, _: (model.encode_image(images), model.encode_text(vocabulary(TEXTS))), tokenizer(TEXTS))
    torch.save(open_clip_model(vocabulary.vocab_size).state_dict(), weights)
    assert convert(*command, "--context-length", 40)[0].config.context_length == 40
    assert_refused("ours", weights, out.with_name("no.pt"), words=["in.pt", "not a checkpoint"])
