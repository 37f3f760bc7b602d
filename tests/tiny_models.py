"""Tiny models with random weights, in folders as they come from the hub: a LLaMA, a LLaVA, and one of each other family."""
import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

import fuse_vicuna
import rewrite_llama
from conftest import ROOT

SPECIAL = ["<s>", "</s>", "<image>", "<|im_end|>"]
WORDS = ("red blue old small photo sale bike house cat dog tree river wall sky boat lamp with near under on "
         "the a of in and shoes best free 2021 new city").split()
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0,
             eos_token_id=1, pad_token_id=1, tie_word_embeddings=False, max_position_embeddings=4096)
OLD = dict(num_key_value_heads=4, n_embd=64, n_layer=2, n_head=4, d_model=64, n_layers=2, n_heads=4)  # other names for the same
GEMMA = dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16)
TEXT = {  # family: its configuration; windows are smaller than the prompts
    "Llama": {}, "Qwen2": {}, "Gemma3Text": GEMMA, "Mamba": dict(state_size=8), "GPT2": OLD, "Mistral": dict(sliding_window=16), "Bloom": OLD,
    "GptOss": dict(head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),  # attention sinks
    "DeepseekV3": dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16),
    "Qwen3_5Text": dict(head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
                        layer_types=["linear_attention", "full_attention"])}


def sentence(rng, least=1, most=9):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]


def make_tokenizer():
    """Byte-level BPE that adds its own beginning-of-text token."""
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    corpus = [fuse_vicuna.chat_prompt("a", "b"), fuse_vicuna.chat_prompt("a", ""), rewrite_llama.TASK] * 5
    corpus += [" ".join(pair.values()) for pair in read_jsonl(ROOT / "data/prompts/fuse_pairs.jsonl")] * 3
    corpus += [sentence(rng) + " => " + sentence(rng) for _ in range(300)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:])


def llama_config(tokenizer, **changes):
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=len(tokenizer) + 4, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
                       max_position_embeddings=4096, tie_word_embeddings=False, **changes)


@torch.no_grad()
def randomise(language_model, lm_head, ends):
    """Weights for texts that differ, and that end: one coordinate of every embedding is constant, so that the head's weight there
    is a bias for the tokens `ends`."""
    for name, p in language_model.named_parameters():
        if p.dim() == 2:
            p.normal_(0, {"embed_tokens": 1.0, "q_proj": 0.4, "k_proj": 0.4}.get(name.split(".")[-2], 0.15))
    language_model.embed_tokens.weight[:, 0] = 4
    lm_head.weight.normal_(0, 0.35)
    lm_head.weight[:, 0] = 0
    lm_head.weight[ends, 0] = 2.4


def make_llama(folder):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(llama_config(tokenizer))
    randomise(model.model, model.lm_head, tokenizer.convert_tokens_to_ids(["\u010a", "</s>"]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_llava(folder, thinks=True):
    """Its template asks the model to think, unless it is told not to."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                              patch_size=14, projection_dim=32)
    config = LlavaConfig(vision_config=vision, text_config=llama_config(tokenizer, pad_token_id=1), vision_feature_layer=-2,
                         image_seq_length=4, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
                      "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
                      "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
                      + "{% if enable_thinking is not defined or enable_thinking %}{{ ' <think>' }}{% endif %}" * thinks)
    model = LlavaForConditionalGeneration(config)
    randomise(model.model.language_model, model.lm_head, tokenizer.convert_tokens_to_ids(["</s>"]))
    with torch.no_grad():
        for name, p in model.model.named_parameters():
            if p.dim() > 1 and "language_model" not in name:
                p.normal_(0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def image_families(number):
    """-> {family: (mark of an image, text, vision and other configuration, image processor, arguments of the processor)}"""
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    return {
        "Qwen2_5_VL": (
            "<|vision_start|><|image_pad|><|vision_end|>",
            dict(head_dim=16, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)),
            dict(depth=2, num_heads=2, patch_size=14, hidden_size=32, intermediate_size=64, out_hidden_size=64, window_size=56,
                 fullatt_block_indexes=[1]),
            dict(vision_start_token_id=number("<|vision_start|>"), image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>")),
            transformers.Qwen2VLImageProcessor(size={"shortest_edge": 1568, "longest_edge": 9408}, patch_size=14),
            dict(video_processor=transformers.Qwen2VLVideoProcessor(patch_size=14))),
        "Gemma3": ("<boi>", GEMMA, dict(vision, model_type="siglip_vision_model"),
                   dict({f"{name}_token_index": number(f"<{name}>") for name in ("boi", "eoi", "image")}, mm_tokens_per_image=4),
                   transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28}), dict(image_seq_length=4))}


@torch.no_grad()
def make_model(family, folder):
    """the models above, for all families: texts that differ, and that end now and then. Their folders ask for sampling."""
    if family == "llava":
        return make_llava(folder)
    tokenizer, parts = make_tokenizer(), []
    ends = tokenizer.convert_tokens_to_ids(["Ċ", "</s>"])
    if family in TEXT:
        config = getattr(transformers, family + "Config")(**{**SIZES, "vocab_size": len(tokenizer) + 4, **TEXT[family]})
    else:
        tokenizer.add_tokens([f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")] + ["<boi>", "<eoi>"],
                             special_tokens=True)
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
    model.generation_config.update(do_sample=True, temperature=0.9, top_k=1, top_p=0.6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
