"""Train a LLaVA that is small enough for minutes on a CPU: image tower, projector, LLM (arXiv
2304.08485, 4).

    python -m data.demo.make_llava out/demo/captioner.jsonl out/demo/llava \\
        --image-root out/demo/images

No trained vision-language model installs from a package index. LLaVA's image tower and LLM are
pre-trained; here all three parts start from random weights and learn together, from the captions'
(`alt`) likelihood. The output is an ordinary LLaVA folder, which caption_llava.py loads like any
other. The model ignores its prompt: it can only caption.
"""
import math
import os
import shutil
import tempfile

import numpy as np
import torch
from tokenizers import processors
from tqdm import tqdm
from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

from data.common import die, in_one_line, new_parser, number
from data.drawing import augment_drawing
from data.make_tokenizer import END, START
from data.make_tokenizer import main as make_tokenizer
from data.rows import read_rows
from train_clip import open_image, resolve_precision, to_rgb

SIZE, PATCH = 32, 8  # pixels
# The image's tokens, then the start token. The model continues with the caption and the end token.
TEMPLATE = "{% for message in messages %}{{ '<image>" + START + "' }}{% endfor %}"


def make_processor(captions):
    """-> LlavaProcessor with a tokenizer of these captions and white as 0"""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokenizer.json")
        make_tokenizer([captions, path, "--vocab-size", "4096"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=path, bos_token=START, eos_token=END,
                                            pad_token=END, split_special_tokens=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # TEMPLATE has the start
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[1.0] * 3,
                                image_std=[0.27] * 3)
    return LlavaProcessor(images, tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
                          vision_feature_select_strategy="full", chat_template=TEMPLATE)


def build(processor):
    """-> LlavaForConditionalGeneration with random weights"""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3,
                              num_attention_heads=2, image_size=SIZE, patch_size=PATCH)
    llm = LlamaConfig(vocab_size=len(tokenizer), hidden_size=192, intermediate_size=768,
                      num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3,
                      bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                      pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True)
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=llm, vision_feature_layer=-1, tie_word_embeddings=True,
        image_seq_length=(SIZE // PATCH) ** 2 + 1,  # and the class token
        vision_feature_select_strategy="full",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>")))


def prepare(processor, config, root, rows):
    """-> the model's inputs. A sequence is image tokens, start token, caption, end token, padding;
    of these the caption and the end token are learned, the labels of the others are -100."""
    images = [to_rgb(open_image(root, row["image"])) for row in rows]
    images = np.stack([augment_drawing(image, SIZE) for image in images])
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    pixels = torch.from_numpy((images / 255 - mean) / std).float()  # [N, S, S, 3]
    prompt = "<image>" * config.image_seq_length + START
    batch = processor.tokenizer([prompt + row["alt"] + END for row in rows],
                                add_special_tokens=False, padding=True, return_tensors="pt")
    learned = batch.attention_mask.bool()
    learned[:, :config.image_seq_length + 1] = False
    return {"pixel_values": pixels.permute(0, 3, 1, 2), **batch,
            "labels": batch.input_ids.masked_fill(~learned, -100)}


def train(model, processor, rows, args):
    rng, has_bf16 = np.random.default_rng(0), resolve_precision("auto", "cpu") == "bf16"
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    progress = tqdm(range(args.steps), desc="LLaVA", unit="step")
    for step in progress:
        drawn = [rows[i] for i in rng.integers(len(rows), size=args.batch_size)]
        batch = prepare(processor, model.config, args.image_root, drawn)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16):
            loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        cosine = 0.505 + 0.495 * math.cos(math.pi * step / args.steps)  # 1 to 0.01
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1, (step + 1) / 50) * cosine
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


@in_one_line
def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("captions", help="JSONL with image and alt")
    add("output", help="the folder to make")
    add("--image-root", required=True)
    add("--steps", type=number(int, 1), default=800, help="default: %(default)s")
    add("--batch-size", type=number(int, 1), default=128, help="default: %(default)s")
    args = parser.parse_args(argv)
    if os.path.exists(args.output):
        die(f"{args.output} exists")
    rows = [row for _, row in read_rows(args.captions)]
    torch.manual_seed(0)
    processor = make_processor(args.captions)
    model = build(processor)
    model.set_attn_implementation("eager")  # for so few tokens faster than torch's kernel
    train(model, processor, rows, args)
    shutil.rmtree(args.output + ".tmp", ignore_errors=True)
    model.save_pretrained(args.output + ".tmp")
    processor.save_pretrained(args.output + ".tmp")
    os.rename(args.output + ".tmp", args.output)


if __name__ == "__main__":
    main()
