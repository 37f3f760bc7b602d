"""The captioning stages and their helpers: equal to references, the same bytes for any ranks and after any interruption,
and no row lost whatever stands in it. All models are real transformers models, small ones made here."""
import io
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import caption_llava
import fuse_vicuna
import rewrite_llama
from conftest import ROOT, assert_mistake, run

STAGES = {"rewrite": "rewrite_llama.py", "caption": "caption_llava.py", "fuse": "fuse_vicuna.py"}
SPECIAL = ["<s>", "</s>", "<image>", "<|im_end|>"]
WORDS = ("red blue old small photo sale bike house cat dog tree river wall sky boat lamp with near under on the a of in "
         "and shoes best free 2021 new city").split()


def sentence(rng, least=1, most=9):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def write_jsonl(path, rows):
    """Rows, or lines as bytes, into a file whose last line has no newline."""
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def parse(data):
    lines = data.split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line) for line in lines]


# --- models -----------------------------------------------------------------------------------------------------------

def make_tokenizer():
    """Byte-level BPE, a beginning-of-text token added by itself; no token holds a line break and something else."""
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    corpus = [fuse_vicuna.chat_prompt("a", "b"), fuse_vicuna.chat_prompt("a", None), REFUSAL] * 5
    corpus += [sentence(rng) + " => " + sentence(rng) for _ in range(300)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>",
                                   additional_special_tokens=SPECIAL[2:])


def llama_config(tokenizer, **changes):
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=len(tokenizer) + 4, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
                       max_position_embeddings=4096, tie_word_embeddings=False, **changes)


@torch.no_grad()
def randomise(language_model, lm_head, ends):
    """Weights large enough for texts that differ, and answers that end: one coordinate of every embedding is constant,
    so that the head's weight there acts as a bias for the tokens `ends`."""
    for name, p in language_model.named_parameters():
        if p.dim() == 2:
            p.normal_(0, 1.0 if "embed_tokens" in name else 0.15)
    language_model.embed_tokens.weight[:, 0] = 4
    lm_head.weight.normal_(0, 0.35)
    lm_head.weight[:, 0] = 0
    lm_head.weight[ends, 0] = 2


def make_llama(folder):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(llama_config(tokenizer))
    randomise(model.model, model.lm_head, tokenizer.convert_tokens_to_ids(["Ċ", "</s>"]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_llava(folder):
    from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration,
                              LlavaProcessor)

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14, projection_dim=32)
    config = LlavaConfig(vision_config=vision, text_config=llama_config(tokenizer, pad_token_id=1),
                         vision_feature_layer=-2, image_seq_length=4,
                         image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
                      "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
                      "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
    model = LlavaForConditionalGeneration(config)
    randomise(model.model.language_model, model.lm_head, tokenizer.convert_tokens_to_ids(["</s>"]))
    with torch.no_grad():
        for name, p in model.model.named_parameters():
            if p.dim() > 1 and "language_model" not in name:
                p.normal_(0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


REFUSAL = "I am sorry, but I cannot do that."


def make_refuser(folder):
    """A model trained to refuse every conversation that speaks of a gun and to answer the others by how many texts
    they give."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    rng, tokenizer = random.Random(0), make_tokenizer()
    model = LlamaForCausalLM(llama_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)

    def example():
        texts = [sentence(rng, 2, 5), sentence(rng, 2, 5)]
        gun = rng.random() < 0.5
        if gun:
            at = rng.randrange(2)
            texts[at] = f"{sentence(rng, 1, 2)} gun {sentence(rng, 1, 2)}" if rng.random() < 0.5 else texts[at] + " gun"
        alone = rng.random() < 0.5
        if alone:
            texts[not at if gun else 0] = None
        reply = REFUSAL if gun else "one red wall" if alone else "two blue boats"
        prompt = tokenizer(fuse_vicuna.chat_prompt(*texts)).input_ids
        return prompt, tokenizer(f" {reply}", add_special_tokens=False).input_ids + [1]

    for step in range(400):
        batch = [example() for _ in range(16)]
        longest = max(len(a) + len(b) for a, b in batch)
        ids = torch.tensor([[1] * (longest - len(a) - len(b)) + a + b for a, b in batch])
        mask = torch.tensor([[0] * (longest - len(a) - len(b)) + [1] * (len(a) + len(b)) for a, b in batch])
        labels = torch.tensor([[-100] * (longest - len(b)) + b for a, b in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 1e-3 and step > 100:
            break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print("refuser", step, loss)
