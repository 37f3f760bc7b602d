"""Model families: whatever architecture stands in --model, the captioning stages write what transformers' `generate` writes for
one text or one image at a time, or say in one line that they cannot. All models are tiny, with random weights."""
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache

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
from conftest import DEVICE, ROOT, read_jsonl, run
from test_stages import TEXTS, completer, generate, load_caption, load_fuse, make_llava, make_tokenizer, write_jsonl

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0,
             eos_token_id=1, pad_token_id=1, tie_word_embeddings=False, max_position_embeddings=4096)
OLD = dict(num_key_value_heads=4, n_embd=64, n_layer=2, n_head=4, d_model=64, n_layers=2, n_heads=4)  # other names for the same
GEMMA = dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16)
TEXT = {  # family: its configuration; windows are smaller than the prompts
    "Llama": {}, "Qwen2": {}, "Mistral": dict(sliding_window=16), "Gemma2": GEMMA, "Gemma3Text": GEMMA,
    "GptOss": dict(head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),  # attention sinks
    "DeepseekV3": dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16),
    "GPT2": OLD, "Bloom": OLD, "Mpt": OLD, "Mamba": dict(state_size=8), "Lfm2": dict(layer_types=["conv", "full_attention"]),
    "Qwen3_5Text": dict(head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
                        layer_types=["linear_attention", "full_attention"]),
    "Jamba": dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False),
    "RecurrentGemma": dict(num_hidden_layers=3, head_dim=16, lru_width=64, attention_window_size=8),
    "FalconH1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)}
MUST = list(TEXT)[:7]  # the others: right, or one line that they cannot be
IMAGE = ["llava", "LlavaNext", "Qwen2_5_VL", "Qwen3VL", "Idefics3", "Gemma3"]  # SmolVLM is Idefics3 with a package more


# --- models and pictures ----------------------------------------------------------------------------------------------

def image_families(number):
    """-> {family: (mark of an image, text, vision and other configuration, image processor, arguments of the processor)}"""
    square, pins = {"height": 28, "width": 28}, [[28, 56], [56, 28], [56, 56]]
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    qwen = ("<|vision_start|><|image_pad|><|vision_end|>",
            dict(head_dim=16, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)),
            dict(depth=2, num_heads=2, patch_size=14, hidden_size=32, intermediate_size=64, out_hidden_size=64, window_size=56,
                 fullatt_block_indexes=[1], num_position_embeddings=16, deepstack_visual_indexes=[0]),
            dict(vision_start_token_id=number("<|vision_start|>"), image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>")),
            transformers.Qwen2VLImageProcessor(size={"shortest_edge": 1568, "longest_edge": 9408}, patch_size=14))
    return {
        "LlavaNext": ("<image>", dict(model_type="llama"), dict(vision, patch_size=14, model_type="clip_vision_model"),
                      dict(image_token_id=number("<image>"), image_grid_pinpoints=pins, image_seq_length=4),
                      transformers.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=pins),
                      dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)),
        "Qwen2_5_VL": (*qwen, dict(video_processor=transformers.Qwen2VLVideoProcessor(patch_size=14))),
        "Qwen3VL": (*qwen, dict(video_processor=transformers.Qwen3VLVideoProcessor(patch_size=14))),
        "Idefics3": ("<image>", dict(model_type="llama"), vision, dict(image_token_id=number("<image>"), scale_factor=2, pad_token_id=1),
                     transformers.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}), dict(image_seq_len=4)),
        "Gemma3": ("<boi>", GEMMA, dict(vision, model_type="siglip_vision_model"),
                   dict({f"{name}_token_index": number(f"<{name}>") for name in ("boi", "eoi", "image")}, mm_tokens_per_image=4),
                   transformers.Gemma3ImageProcessor(size=square), dict(image_seq_length=4))}


@torch.no_grad()
def make_model(family, folder):
    """test_stages' models for all families: texts that differ, and that end now and then."""
    if family == "llava":
        return make_llava(folder)
    tokenizer, parts = make_tokenizer(), []
    ends = tokenizer.convert_tokens_to_ids(["Ċ", "</s>"])
    if family in TEXT:
        config = getattr(transformers, family + "Config")(**{**SIZES, "vocab_size": len(tokenizer) + 4, **TEXT[family]})
    else:
        tokenizer.add_tokens([f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")] + [
            "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<boi>", "<eoi>"], special_tokens=True)
        tokenizer.add_tokens([f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)], special_tokens=True)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
            extra_special_tokens=dict(boi_token="<boi>", eoi_token="<eoi>", image_token="<image>") if family == "Gemma3" else None)
        mark, text, vision, more, images, parts = image_families(tokenizer.convert_tokens_to_ids)[family]
        config = getattr(transformers, family + "Config")(
            text_config={**SIZES, "vocab_size": len(tokenizer) + 4, **text}, vision_config=vision, tie_word_embeddings=False, **more)
        template = ("{{ bos_token }}{% for m in messages %}USER: {% for c in m['content'] %}{{ 'MARK\n' if c['type'] == 'image' else c['text'] + ' ' }}"
                    "{% endfor %}{% endfor %}ASSISTANT:").replace("MARK", mark)
        tokenizer = getattr(transformers, family + "Processor")(images, tokenizer=tokenizer, chat_template=template, **parts)
    model = (AutoModelForCausalLM if family in TEXT else AutoModelForImageTextToText).from_config(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, p in model.named_parameters():
        if p.dim() > 1 and "A_log" not in name:
            p.normal_(0, 1.6 / p[0].numel() ** 0.5)
    scale = 8 if "gemma" in config.model_type else 1  # it multiplies by this
    embedding.normal_(0, 1 / scale)
    if head is not embedding:  # as test_stages.randomise
        embedding[:, 0] = 3 / scale
        head.normal_(0, 0.35)
        head[:, 0] = 0
        head[ends, 0] = 0.8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """model_folder(family) -> a folder as it comes from the hub, made once."""
    @cache
    def model_folder(family):
        torch.manual_seed(0)
        make_model(family, folder := tmp_path_factory.mktemp("model"))
        return folder
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield model_folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 8 images of different sizes and one that is none."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(8):
        pixels = draw.integers(0, 256, (*draw.integers(20, 90, 2), 3), np.uint8)
        Image.fromarray(pixels // (1 + i % 3)).save(folder / f"{i}.png")
    (folder / "broken.png").write_text("no picture")
    return folder


# --- a batch is what `generate` writes one at a time --------------------------------------------------------------------

def naive_answers(folder, tokenizer, prompts, limit, newline):
    """transformers alone, one text at a time -> [(answer, whether it ended)]"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stops = [1] + [i for i in range(len(tokenizer)) if newline and "\n" in tokenizer.decode([i])]
    return [generate(model, tokenizer, prompt, limit, stops) for prompt in prompts]


def naive_captions(folder, paths, limit=12):
    """transformers alone, one image at a time"""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(folder)
    for path in paths:
        content = [{"type": "image", "image": Image.open(path).convert("RGB")}, {"type": "text", "text": caption_llava.PROMPT}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
                                               return_dict=True, return_tensors="pt")
        new = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0, inputs["input_ids"].shape[1]:]
        yield caption_llava.one_line(processor.tokenizer.decode(new, skip_special_tokens=True)).rstrip("\ufffd ")


def right_or_refused(family, capfd, make):
    """What make() returns; None if it ends with one line, which not every family may."""
    try:
        return make()
    except SystemExit as e:
        lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert family not in MUST and e.code == 2 and len(lines) == 1 and "--model" in lines[0], lines


@pytest.mark.parametrize("family", IMAGE)
def test_captions(family, model_folder, pictures):
    (model, processor, images), names = load_caption(pictures, 12, model_folder(family), pictures), [f"{i}.png" for i in range(8)]
    inputs, faults = images.__getitems__(names)
    together, alone = (sum((caption_llava.caption(model, processor.tokenizer, images.__getitems__(batch)[0], Counter())
                            for batch in batches), []) for batches in ([names], [[name] for name in names]))
    assert not faults and together == alone == list(naive_captions(model_folder(family), [pictures / name for name in names]))
    assert len(set(together)) > 2 and (family in ("llava", "Gemma3") or not inputs["attention_mask"].all())  # lengths differ


@pytest.mark.parametrize("style", ["chat", "pairs"])
@pytest.mark.parametrize("family", TEXT)
def test_answers(family, style, model_folder, capfd):
    """fuse_vicuna's, of prompts of uneven length, with much in common and with little"""
    pairs = read_jsonl(ROOT / "data/prompts/fuse_pairs.jsonl")[:2]
    prompts = [fuse_vicuna.chat_prompt(text, "a red wall") if style == "chat" else fuse_vicuna.pairs_prompt(pairs, text, "a red wall")
               for text in TEXTS] + TEXTS

    def make():
        model, tokenizer = load_fuse(ROOT, 12, style, model_folder(family))
        return fuse_vicuna.answer(model, tokenizer, prompts, 8, notes := Counter()), tokenizer, notes
    if made := right_or_refused(family, capfd, make):
        answers, tokenizer, notes = made
        expected = naive_answers(model_folder(family), tokenizer, prompts, 12, style == "pairs")
        assert answers == [(text, None) for text, _ in expected] and len(set(expected)) > 8
        assert notes.total() == sum(not ended for _, ended in expected)


@pytest.mark.parametrize("family", TEXT)
def test_rewrites(family, model_folder, capfd):
    """Greedy as `generate`; drawn the same alone and in company; the prompt is shared where that can be, else one line says no."""
    prompt, texts = "Say it again.\n\na red bike => one bike that is red\nold sky => a sky\n", TEXTS + [text[::-1] for text in TEXTS]
    seeds = [[i, 1] for i in range(len(texts))]
    make = lambda **how: (ours := completer(ROOT, 8, model=model_folder(family), **how), ours.complete(prompt, texts, seeds))
    if made := right_or_refused(family, capfd, make):
        ours, answers = made
        assert capfd.readouterr().err.count("cannot share the prompt") == (not ours.shares)
        assert family not in MUST or ours.shares == (family in ("Llama", "Qwen2"))
        expected = naive_answers(model_folder(family), ours.tokenizer, [f"{prompt}{text} =>" for text in texts], 8, True)
        assert answers == [(*answer, None) for answer in expected] and len(set(expected)) > 4
        alone, together = (make(temperature=0.9, top_p=0.95, batch_size=size)[1] for size in (1, 16))
        assert alone == together and len(set(alone)) > 8


@torch.no_grad()
def test_a_model_that_ignores_the_attention_does_not_share(model_folder, tmp_path):
    """BLOOM has attention of its own: it never calls ours, so it would not read the prompt. Logits with a large common offset
    look alike with and without a prompt."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("Bloom"), dtype=torch.float32)
    model.transformer.ln_f.bias.fill_(4)
    model.get_output_embeddings().weight += 4
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder("Bloom")).save_pretrained(tmp_path)
    assert not completer(ROOT, 8, model=tmp_path).shares


# --- where an answer ends ---------------------------------------------------------------------------------------------

def answers_of(stage, folder, pictures):
    """-> (answers, how many of them did not end)"""
    if stage == "rewrite":
        answers = completer(ROOT, 40, model=folder).complete("a => b\n", TEXTS, [[0]] * len(TEXTS))
        return [text for text, _, _ in answers], sum(not ended for _, ended, _ in answers)
    if stage == "fuse":
        answers = fuse_vicuna.answer(*load_fuse(ROOT, 40, model=folder), TEXTS, 8, notes := Counter())
        return [text for text, _ in answers], notes.total()
    model, processor, images = load_caption(pictures, 40, folder, pictures)
    inputs, _ = images.__getitems__([f"{i}.png" for i in range(8)])
    return caption_llava.caption(model, processor.tokenizer, inputs, notes := Counter()), notes.total()


@pytest.mark.parametrize("place", ["config.json", "generation_config.json", "tokenizer_config.json", "unflagged"])
@pytest.mark.parametrize("stage", ["rewrite", "caption", "fuse"])
def test_an_end_token_ends_the_answer(stage, place, model_folder, pictures, tmp_path):
    """The model ends its answers with another token than </s>, which one file of the folder names, and no answer holds it."""
    folder = shutil.copytree(model_folder("llava" if stage == "caption" else "Llama"), tmp_path / "model")
    tokenizer, end = AutoTokenizer.from_pretrained(folder), "<|im_end|>"
    if place == "unflagged":
        place = "generation_config.json"
        tokenizer.add_tokens(end := "<|end|>")
        tokenizer.save_pretrained(folder)
    model = (AutoModelForImageTextToText if stage == "caption" else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[number := tokenizer.convert_tokens_to_ids(end), 0] = 2.8 if stage == "caption" else 3.2
    model.save_pretrained(folder)
    assert answers_of(stage, folder, pictures)[1] > 4  # nothing names it yet
    settings = json.loads((folder / place).read_text())
    settings.get("text_config", settings).update({"eos_token": end} if "tokenizer" in place else {"eos_token_id": number})
    (folder / place).write_text(json.dumps(settings))
    answers, endless = answers_of(stage, folder, pictures)
    assert endless <= 2 and len(set(answers)) > 2, answers  # one may fall into a loop
    assert not any("<|" in text for text in answers)


# --- special markers --------------------------------------------------------------------------------------------------

def sentencepiece_like(prepend, special=()):
    """Like LLaMA's and Gemma's tokenizers: blanks are marked, what is unknown falls to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581")] * prepend + [normalizers.Replace(" ", "\u2581")])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(flagged=(), plain=(), end="</s>"):
    backend = make_tokenizer().backend_tokenizer
    backend.add_special_tokens(list(flagged))
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("covid", *plain)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end)


TOKENIZERS = {
    "tiny": make_tokenizer, "LLaMA": lambda: sentencepiece_like(True), "Phi": lambda: byte_level(plain=["<|end|>", "<|user|>"]),
    "Gemma": lambda: sentencepiece_like(False, ["<start_of_turn>", "<end_of_turn>", "<unused0>", "<table>", "[multimodal]"]),
    "Qwen": lambda: byte_level(["<|im_start|>", "<|endoftext|>"], ["<think>", "</think>"], end="<|im_end|>"),
    "MiniMax, Falcon": lambda: byte_level(["]~b]", "[e~[", ">>ANSWER<<"]),
    **{path.parent.name: lambda path=path: AutoTokenizer.from_pretrained(path.parent) for path in ROOT.glob("out/demo/*/tokenizer.json")}}


@pytest.mark.parametrize("clean", [rewrite_llama.clean, fuse_vicuna.clean], ids=["rewrite", "fuse"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_holds_a_marker(name, clean, tmp_path):
    """Every added token of a tokenizer, as it is and hidden in others; a word that somebody added stays."""
    TOKENIZERS[name]().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    markers, added = rewrite_llama.special_markers(tokenizer), {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    added.pop("covid", None)
    for token in added:
        for text in (f"before {token} after", f"before{token}after", token[0] + token + token[1:], token * 3,
                     *(token[:2] + inner + token[2:] for inner in ("=>", "<|im_<s>end|>", "\0", "\u200b", "\n", *list(added)[:20]))):
            assert set(added.values()).isdisjoint(tokenizer(clean(text, markers), add_special_tokens=False).input_ids), (token, text)
        assert clean(f"before {token} after", markers) == "before after"
    assert clean("a covid <b> test [1]", markers) == "a covid <b> test [1]"


# --- as a user starts them --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def launched(model_folder, pictures, tmp_path_factory):
    """What every stage said and wrote, with warnings on: {stage, or caption's family: (CompletedProcess, rows)}"""
    out, names = tmp_path_factory.mktemp("launched"), ["0.png", "1.png", "broken.png", "2.png", "3.png"]
    rows = write_jsonl(out / "rows", [{"image": name, "alt": text, "seen": "a red wall"} for name, text in zip(names, TEXTS)])
    for family in ("Llama", *IMAGE):  # many folders ask for sampling
        path = model_folder(family) / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "temperature": 0.9, "top_p": 0.6, "top_k": 1}))

    def launch(name):
        script, *more = {"rewrite": ["rewrite_llama.py", "--sources", "coco"], "fuse": ["fuse_vicuna.py", "--vec-field", "seen"]}.get(
            name, ["caption_llava.py", "--image-root", pictures, "--workers", 1])
        done = run(script, "--input", rows, "--output", out / name, "--model", model_folder(name if name in IMAGE else "Llama"),
                   "--device", DEVICE, "--dtype", "fp32", "--batch-size", 2, "--max-new-tokens", 12, *more,
                   fresh=True, env={"PYTHONWARNINGS": "default,ignore:This process:DeprecationWarning",  # Python 3.12's about fork
                                    "TRANSFORMERS_VERBOSITY": "warning"})
        return name, (done, read_jsonl(out / name) if done.returncode == 0 else None)
    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(launch, ["rewrite", "fuse", *IMAGE]))


@pytest.mark.parametrize("name", ["rewrite", "fuse", *IMAGE])
def test_end_to_end_without_a_warning(name, launched, model_folder, pictures):
    done, rows = launched[name]
    assert done.returncode == 0 and len(rows) == 5, done.stderr
    assert not any(word in done.stderr.lower() for word in ("deprecat", "past_key_values", "generation flags")), done.stderr
    if name in IMAGE:
        assert rows[2]["vec"] is None and "JPEG" in rows[2]["error"]["vec"]
        assert [row["vec"] or "" for row in rows if row is not rows[2]] == list(naive_captions(model_folder(name), sorted(pictures.glob("[0-3].png"))))
