"""Model families: whatever architecture stands in --model, the captioning stages write what transformers' `generate` writes for
one text or one image at a time, or say in one line that they cannot. All models are tiny, with random weights."""
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

import caption_llava
import fuse_vicuna
import rewrite_llama
from conftest import ROOT, read_jsonl, run
from test_stages import TEXTS, generate, make_llama, make_llava, make_tokenizer, write_jsonl

PROMPT = "Say it again.\n\na red bike => one bike that is red\nold sky => a sky\n"
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0,
             eos_token_id=1, pad_token_id=1, tie_word_embeddings=False, max_position_embeddings=4096)
OLD = dict(num_key_value_heads=4, n_embd=64, n_layer=2, n_head=4, d_model=64, n_layers=2, n_heads=4)  # other names for the same
GEMMA = dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16)
TEXT = {  # family: its configuration; windows are smaller than the prompts
    "Llama": {}, "Qwen2": {}, "Mistral": dict(sliding_window=8), "Gemma2": GEMMA, "Gemma3Text": GEMMA,
    "GptOss": dict(head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),  # attention sinks
    "DeepseekV3": dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
                       n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32),
    "GPT2": OLD, "Bloom": OLD, "Mpt": OLD, "Mamba": dict(state_size=8), "Lfm2": dict(layer_types=["conv", "full_attention"]),
    "Qwen3_5Text": dict(head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
                        layer_types=["linear_attention", "full_attention"]),
    "Jamba": dict(num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8,
                  use_mamba_kernels=False)}
MUST = list(TEXT)[:7]  # the others: right, or one line that they cannot be


# --- models -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def strengthen(model, ends, bias=0.8):
    """test_stages.randomise for all families: texts that differ, and that end now and then."""
    draw, embedding, head = torch.Generator().manual_seed(0), model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, p in model.named_parameters():
        if p.dim() > 1 and "A_log" not in name:
            p.normal_(0, 1.6 / p[0].numel() ** 0.5, generator=draw)
    scale = 8 if "gemma" in model.config.model_type else 1  # it multiplies by this
    embedding.normal_(0, 1 / scale, generator=draw)
    if head is not embedding:
        embedding[:, 0] = 3 / scale
        head.normal_(0, 0.35, generator=draw)
        head[:, 0] = 0
        head[ends, 0] = bias


def make_text_model(family, folder):
    tokenizer = make_tokenizer()
    config = getattr(transformers, family + "Config")(**{**SIZES, "vocab_size": len(tokenizer) + 4, **TEXT[family]})
    model = AutoModelForCausalLM.from_config(config)
    strengthen(model, tokenizer.convert_tokens_to_ids(["Ċ", "</s>"]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
SQUARE = {"height": 28, "width": 28}
QWEN = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]


def llava_next(number):
    pins = [[28, 56], [56, 28], [56, 56]]
    return ("LlavaNext", dict(model_type="llama"), dict(VISION, model_type="clip_vision_model"),
            dict(image_token_id=number("<image>"), image_grid_pinpoints=pins, image_seq_length=4),
            transformers.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=pins),
            dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1))


def qwen_vl(number, version="2", vision=dict(embed_dim=32, hidden_size=64, mlp_ratio=2)):
    ids = zip(["vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id"], map(number, QWEN))
    videos = getattr(transformers, f"Qwen{version[0]}VLVideoProcessor")(patch_size=14)
    return (f"Qwen{version}VL", dict(head_dim=16, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)),
            dict(depth=2, num_heads=2, patch_size=14, **vision), dict(ids),
            transformers.Qwen2VLImageProcessor(size={"shortest_edge": 1568, "longest_edge": 9408}, patch_size=14), dict(video_processor=videos))


def qwen2_5_vl(number):
    return qwen_vl(number, "2_5_", dict(hidden_size=32, intermediate_size=64, out_hidden_size=64, window_size=56, fullatt_block_indexes=[1]))


def qwen3_vl(number):
    return qwen_vl(number, "3", dict(hidden_size=32, intermediate_size=64, out_hidden_size=64, num_position_embeddings=16,
                                     deepstack_visual_indexes=[0]))


def idefics3(number):  # SmolVLM is the same with a processor that wants num2words
    return ("Idefics3", dict(model_type="llama"), dict(VISION, patch_size=7),
            dict(image_token_id=number("<image>"), scale_factor=2, pad_token_id=1),
            transformers.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}), dict(image_seq_len=4))


def gemma3(number):
    return ("Gemma3", GEMMA, dict(VISION, patch_size=7, model_type="siglip_vision_model"),
            dict(image_token_id=number("<image>"), boi_token_index=number("<boi>"), eoi_token_index=number("<eoi>"), mm_tokens_per_image=4),
            transformers.Gemma3ImageProcessor(size=SQUARE), dict(image_seq_length=4))


IMAGE = {"llava": "<image>", llava_next: "<image>", qwen_vl: "".join(QWEN[:3]), qwen2_5_vl: "".join(QWEN[:3]),
         qwen3_vl: "".join(QWEN[:3]), idefics3: "<image>", gemma3: "<boi>"}  # family: what stands for an image in the prompt


def make_image_model(family, folder):
    if family == "llava":
        return make_llava(folder)
    backend = make_tokenizer().backend_tokenizer
    backend.add_special_tokens(QWEN + ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<boi>", "<eoi>"])
    backend.add_special_tokens([f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)])
    extra = dict(boi_token="<boi>", eoi_token="<eoi>", image_token="<image>") if family is gemma3 else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", extra_special_tokens=extra)
    name, text, vision, more, images, parts = family(tokenizer.convert_tokens_to_ids)
    config = getattr(transformers, name + "Config")(
        text_config={**SIZES, "vocab_size": len(tokenizer) + 4, **text}, vision_config=vision, tie_word_embeddings=False, **more)
    model = AutoModelForImageTextToText.from_config(config)
    strengthen(model, [1])
    model.save_pretrained(folder)
    template = ("{% for m in messages %}USER: {% for c in m['content'] %}{{ 'IMAGE\n' if c['type'] == 'image' else c['text'] + ' ' }}"
                "{% endfor %}{% endfor %}ASSISTANT:").replace("IMAGE", IMAGE[family])
    getattr(transformers, name + "Processor")(images, tokenizer=tokenizer, chat_template=template, **parts).save_pretrained(folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """model_folder(family) -> a folder as it comes from the hub, made once."""
    made, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)

    def model_folder(family):
        if family not in made:
            torch.manual_seed(0)
            made[family] = tmp_path_factory.mktemp("model")
            (make_text_model if family in TEXT else make_image_model)(family, made[family])
        return made[family]
    yield model_folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 8 images of different sizes."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(8):
        pixels = draw.integers(0, 256, (*draw.integers(20, 90, 2), 3), np.uint8)
        Image.fromarray(pixels // (1 + i % 3)).save(folder / f"{i}.png")
    return folder


def load_reference(auto_class, folder):
    return auto_class.from_pretrained(folder, dtype=torch.float32).eval()


def right_or_refused(family, capfd, make):
    """What make() returns; None if it ends with one line, which not every family may."""
    try:
        return make()
    except SystemExit as e:
        lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert family not in MUST and e.code == 2 and len(lines) == 1 and "--model" in lines[0], lines


# --- the stages -------------------------------------------------------------------------------------------------------

def load_caption(folder, root, limit=12):
    args = SimpleNamespace(model=str(folder), dtype="fp32", max_new_tokens=limit, prompt=caption_llava.PROMPT, image_root=str(root))
    model, processor, prompt = caption_llava.load_model(args, "cpu")
    return model, processor.tokenizer, caption_llava.Images(str(root), processor, prompt)


def naive_captions(folder, paths, limit=12):
    """transformers alone, one image at a time"""
    model, processor = load_reference(AutoModelForImageTextToText, folder), AutoProcessor.from_pretrained(folder)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": caption_llava.PROMPT}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    for path in paths:
        inputs = processor(images=Image.open(path).convert("RGB"), text=prompt, return_tensors="pt")
        new = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0, inputs["input_ids"].shape[1]:]
        yield " ".join(caption_llava.one_line(processor.tokenizer.decode(new, skip_special_tokens=True)).rstrip("\ufffd ").split())


@pytest.mark.parametrize("family", IMAGE, ids=lambda family: getattr(family, "__name__", family))
def test_captions_in_a_batch_equal_generate(family, model_folder, pictures):
    model, tokenizer, images = load_caption(model_folder(family), pictures)
    names = [path.name for path in sorted(pictures.iterdir())]
    inputs, faults = images.__getitems__(names)
    together = caption_llava.caption(model, tokenizer, inputs, Counter())
    assert together == [caption_llava.caption(model, tokenizer, images.__getitems__([name])[0], Counter())[0] for name in names]
    assert not faults and together == list(naive_captions(model_folder(family), sorted(pictures.iterdir())))
    assert len(set(together)) > 5 and (family in ("llava", gemma3) or not inputs["attention_mask"].all())  # lengths differ


@pytest.mark.parametrize("style", ["chat", "pairs"])
@pytest.mark.parametrize("family", TEXT)
def test_answers_in_a_batch_equal_generate(family, style, model_folder, capfd):
    """Prompts of uneven length, with much in common and with little."""
    args, pairs = SimpleNamespace(model=str(model_folder(family)), dtype="fp32", max_new_tokens=12, format=style), read_jsonl(
        ROOT / "data/prompts/fuse_pairs.jsonl")
    model, tokenizer = fuse_vicuna.load_model(args, "cpu")
    prompts = [fuse_vicuna.chat_prompt(text, "a red wall") if style == "chat" else fuse_vicuna.pairs_prompt(pairs[:2], text, "a red wall")
               for text in TEXTS] + TEXTS
    answers = right_or_refused(family, capfd, lambda: fuse_vicuna.answer(model, tokenizer, prompts, 8, notes := Counter()) + [notes])
    if answers:
        reference = load_reference(AutoModelForCausalLM, model_folder(family))
        stops = [1] + [i for i in range(len(tokenizer)) if style == "pairs" and "\n" in tokenizer.decode([i])]
        expected = [generate(reference, tokenizer, prompt, 12, stops) for prompt in prompts]
        assert answers[:-1] == [(text, None) for text, _ in expected] and len(set(expected)) > 8
        assert answers[-1] == {"cut off at --max-new-tokens": sum(not ended for _, ended in expected)}


def load_rewrite(folder, **changes):
    args = SimpleNamespace(**{"max_new_tokens": 8, "temperature": 0, "top_p": 0.95, "batch_size": 16, "model": str(folder), **changes})
    return rewrite_llama.Completer(load_reference(AutoModelForCausalLM, folder), AutoTokenizer.from_pretrained(folder), args)


@pytest.mark.parametrize("family", TEXT)
def test_rewrites_in_a_batch_equal_generate(family, model_folder, capfd):
    texts = TEXTS + [text[::-1] for text in TEXTS]
    ours = right_or_refused(family, capfd, lambda: load_rewrite(model_folder(family)))
    answers = right_or_refused(family, capfd, lambda: ours.complete(PROMPT, texts, [[0]] * len(texts))) if ours else None
    if answers:
        assert family not in MUST or ours.shares == (family in ("Llama", "Qwen2"))
        assert capfd.readouterr().err.count("cannot share the prompt") == (not ours.shares)
        reference = load_reference(AutoModelForCausalLM, model_folder(family))
        stops = [1] + [i for i in range(len(ours.tokenizer)) if "\n" in ours.tokenizer.decode([i])]
        expected = [generate(reference, ours.tokenizer, f"{PROMPT}{text} =>", 8, stops) for text in texts]
        assert answers == [(*answer, None) for answer in expected] and len(set(expected)) > 4
        drawn = [load_rewrite(model_folder(family), temperature=0.9, batch_size=size).complete(PROMPT, texts, [[i] for i in range(len(texts))])
                 for size in (1, 16)]
        assert drawn[0] == drawn[1] and len(set(drawn[0])) > 8


# --- where an answer ends ---------------------------------------------------------------------------------------------

def answers_of(stage, folder, pictures):
    """-> (answers, how many of them did not end)"""
    if stage == "rewrite":
        answers = load_rewrite(folder, max_new_tokens=40).complete("a => b\n", TEXTS, [[0]] * len(TEXTS))
        return [text for text, _, _ in answers], sum(not ended for _, ended, _ in answers)
    if stage == "fuse":
        args = SimpleNamespace(model=str(folder), dtype="fp32", max_new_tokens=40, format="chat")
        answers = fuse_vicuna.answer(*fuse_vicuna.load_model(args, "cpu"), TEXTS, 8, notes := Counter())
        return [text for text, _ in answers], notes.total()
    model, tokenizer, images = load_caption(folder, pictures, limit=40)
    inputs, _ = images.__getitems__([path.name for path in pictures.iterdir()])
    return caption_llava.caption(model, tokenizer, inputs, notes := Counter()), notes.total()


@pytest.mark.parametrize("place", ["config.json", "generation_config.json", "tokenizer_config.json", "an unflagged token"])
@pytest.mark.parametrize("stage", ["rewrite", "caption", "fuse"])
def test_an_end_token_ends_the_answer_wherever_it_is_named(stage, place, model_folder, pictures, tmp_path):
    """The model ends its answers with another token than </s>, which one file of the folder names, and no answer holds it."""
    folder = shutil.copytree(model_folder("llava" if stage == "caption" else "Llama"), tmp_path / "model")
    tokenizer, end = AutoTokenizer.from_pretrained(folder), "<|im_end|>"
    if place == "an unflagged token":
        tokenizer.add_tokens(end := "<|end|>")
        tokenizer.save_pretrained(folder)
        place = "generation_config.json"
    model = load_reference(AutoModelForImageTextToText if stage == "caption" else AutoModelForCausalLM, folder)
    with torch.no_grad():
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(end), 0] = 2
    model.save_pretrained(folder)
    assert answers_of(stage, folder, pictures)[1] == (8 if stage == "caption" else len(TEXTS))  # nothing names it yet
    settings = json.loads((folder / place).read_text())
    settings.get("text_config", settings)["eos_token" if "tokenizer" in place else "eos_token_id"] = (
        end if "tokenizer" in place else tokenizer.convert_tokens_to_ids(end))
    (folder / place).write_text(json.dumps(settings))
    answers, endless = answers_of(stage, folder, pictures)
    assert endless == 0 and len(set(answers)) > 2 and not any("<|" in text for text in answers)


# --- special markers --------------------------------------------------------------------------------------------------

def sentencepiece_like(prepend, *special):
    """Like LLaMA's and Gemma's tokenizers: blanks are marked, what is unknown falls to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581")] * prepend + [normalizers.Replace(" ", "\u2581")])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(plain=(), flagged=(), end="</s>"):
    backend = make_tokenizer().backend_tokenizer
    backend.add_special_tokens(list(flagged))
    backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end)


TOKENIZERS = {
    "tiny": make_tokenizer, "LLaMA": lambda: sentencepiece_like(True), "Vicuna": lambda: sentencepiece_like(True, "<pad>"),
    "Gemma": lambda: sentencepiece_like(False, "<start_of_turn>", "<end_of_turn>", "<unused0>", "<table>", "[multimodal]"),
    "Qwen": lambda: byte_level(["<think>", "</think>", "covid"], ["<|im_start|>", "<|endoftext|>"], "<|im_end|>"),
    "Phi": lambda: byte_level(["<|end|>", "<|user|>", "covid"]), "MiniMax": lambda: byte_level(["covid"], ["]~b]", "[e~["]),
    "Falcon": lambda: byte_level(["covid"], [">>ANSWER<<", ">>QUESTION<<"]),
    **{path.parent.name: lambda path=path: AutoTokenizer.from_pretrained(path.parent) for path in ROOT.glob("out/demo/*/tokenizer.json")}}


@pytest.mark.parametrize("clean", [rewrite_llama.clean, fuse_vicuna.clean], ids=["rewrite", "fuse"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_holds_a_marker(name, clean, tmp_path):
    """Every added token of a tokenizer, as it is and hidden in others; a word that somebody added stays."""
    TOKENIZERS[name]().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    markers, added = rewrite_llama.special_markers(tokenizer), {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    special = {i for token, i in added.items() if token != "covid"}
    for token in added.keys() - {"covid"}:
        for text in (f"before {token} after", f"before{token}after", token[0] + token + token[1:], f"{token[:2]}=>{token[2:]}", token * 3,
                     *(token[:2] + inner + token[2:] for inner in ("<s>", "</s>", "<|im_<s>end|>", "\0", "\u200b", "\n", *list(added)[:20]))):
            assert special.isdisjoint(tokenizer(clean(text, markers), add_special_tokens=False).input_ids), (token, text)
        assert clean(f"before {token} after", markers) == "before after"
    assert clean("a covid <b> test [1]", markers) == "a covid <b> test [1]"


# --- as a user starts them --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def launched(model_folder, pictures, tmp_path_factory):
    """What every stage wrote and said, with warnings on: {name: (CompletedProcess, rows)}. Two run at a time."""
    out = tmp_path_factory.mktemp("launched")
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    rows = [{"image": name, "alt": text, "vec_old": "a red wall"} for name, text in
            zip(["0.png", "1.png", "broken.png", "2.png", "3.png"], TEXTS)]
    rows = write_jsonl(out / "rows.jsonl", rows)
    for family in ("Llama", "llava", qwen_vl):  # Vicuna's folder names sampling without do_sample
        path = model_folder(family) / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.9, "top_p": 0.6}))

    def launch(name):
        script, family = {"rewrite": ("rewrite_llama.py", "Llama"), "fuse": ("fuse_vicuna.py", "Llama")}.get(name, ("caption_llava.py", name))
        more = {"rewrite": ["--sources", "coco"], "fuse": ["--vec-field", "vec_old"]}.get(name, ["--image-root", pictures, "--workers", 1])
        output = out / f"{getattr(name, '__name__', name)}.jsonl"
        done = run(script, "--input", rows, "--output", output, "--model", model_folder(family), "--dtype", "fp32", "--device", "cpu",
                   "--batch-size", 2, "--max-new-tokens", 12, *more, env={"PYTHONWARNINGS": "default", "TRANSFORMERS_VERBOSITY": "warning"})
        return name, (done, read_jsonl(output) if output.exists() else None)
    for family in IMAGE:
        model_folder(family)
    with ThreadPoolExecutor(2) as pool:
        yield dict(pool.map(launch, ["rewrite", "fuse", *IMAGE]))
    (pictures / "broken.png").unlink()


@pytest.mark.parametrize("name", ["rewrite", "fuse", *IMAGE], ids=lambda name: getattr(name, "__name__", name))
def test_end_to_end_without_a_warning(name, launched, model_folder, pictures):
    done, rows = launched[name]
    assert done.returncode == 0 and len(rows) == 5, done.stderr
    assert not any(word in done.stderr.lower() for word in ("deprecat", "past_key_values", "generation flags")), done.stderr
    if name in IMAGE:
        good = [row for row in rows if row["image"] != "broken.png"]
        assert [row["vec"] for row in good] == list(naive_captions(model_folder(name), [pictures / row["image"] for row in good]))
        assert rows[2]["vec"] is None and "no picture" in rows[2]["error"]["vec"] or "OSError" in rows[2]["error"]["vec"]
