"""Train a LLaVA that is small enough for minutes on a CPU: image tower, projector, LLM (arXiv
2304.08485, 4).

    python -m data.demo.make_llava out/demo/tower/checkpoint.pt out/demo/captioner.jsonl \\
        out/demo/llava \\
        --image-root out/demo/images

The image tower is that of a CLIP of train_clip.py. A two-layer projector maps all its tokens into
the embedding space of a three-layer LLaMA. LLaVA's LLM is pre-trained; this one starts from random
weights and learns its words from the captions (`alt`). So all three parts learn together, from the
caption's likelihood.

The output is an ordinary LLaVA folder, which caption_llava.py loads like any other. The model
ignores its prompt: it can only caption. """
import math
import os
import shutil
import tempfile

import numpy as np
import torch
from tokenizers import processors
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.common import die, in_one_line, new_parser, number, pick_device
from data.demo.drawing import augment_drawing
from data.convert_checkpoint import main as convert
from data.rows import read_rows
from data.texts import texts_of
from train_clip import open_image, resolve_precision, to_rgb

# The image's tokens, then the start token. The model continues with the caption and the end token.
TEMPLATE = "{% for message in messages %}{{ '<image><|startoftext|>' }}{% endfor %}"


def build(checkpoint, device, width=192, layers=3):
    """-> LlavaForConditionalGeneration with an untrained projector and LLM, and its processor"""
    from transformers import (CLIPImageProcessor, CLIPVisionModel, LlamaConfig, LlavaConfig,
                              LlavaForConditionalGeneration, LlavaProcessor,
                              PreTrainedTokenizerFast)
    with tempfile.TemporaryDirectory() as folder:
        clip = os.path.join(folder, "clip")
        convert(["to-hf", checkpoint, clip])
        tower = CLIPVisionModel.from_pretrained(clip, dtype=torch.float32)
        image_processor = CLIPImageProcessor.from_pretrained(clip)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(clip, bos_token="<|startoftext|>",
                                                            split_special_tokens=False)
    # TEMPLATE writes the start token
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    heads, patch_size = width // 64, tower.config.patch_size
    llm = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True)
    config = LlavaConfig(
        vision_config=tower.config, text_config=llm, vision_feature_layer=-1,
        image_seq_length=(tower.config.image_size // patch_size) ** 2 + 1,  # and the class token
        vision_feature_select_strategy="full", tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=patch_size, num_additional_image_tokens=1,
        vision_feature_select_strategy="full", chat_template=TEMPLATE)
    if device == "cpu":  # for so few tokens the plain formula is faster than torch's kernel
        model.set_attn_implementation("eager")
    return model.to(device), processor


def prepare(processor, config, root, rows):
    """-> the model's inputs. A sequence is image tokens, start token, caption, end token.

    Only the caption and the end token are learned: the labels of other positions are -100.
    """
    tokenizer, S = processor.tokenizer, config.vision_config.image_size
    images = [to_rgb(open_image(root, row["image"])) for row in rows]
    images = np.stack([augment_drawing(image, S) for image in images])
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    pixels = torch.from_numpy((images / 255 - mean) / std).float()  # [N, S, S, 3]
    texts = [texts_of(row["alt"])[0] for row in rows]
    captions = [ids[:20] for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    prompt = [config.image_token_id] * config.image_seq_length + [tokenizer.bos_token_id]
    ids = [torch.tensor(prompt + caption + [tokenizer.eos_token_id]) for caption in captions]
    not_learned = torch.full((len(prompt),), -100)
    labels = [torch.cat([not_learned, sequence[len(prompt):]]) for sequence in ids]
    masks = [torch.ones_like(sequence) for sequence in ids]
    return {"pixel_values": pixels.permute(0, 3, 1, 2),
            "input_ids": pad_sequence(ids, True, tokenizer.eos_token_id),
            "attention_mask": pad_sequence(masks, True, 0),
            "labels": pad_sequence(labels, True, -100)}


def train(model, processor, rows, args):
    rng, device = np.random.default_rng(args.seed), model.device
    has_bf16 = resolve_precision("auto", device) == "bf16"
    tower = list(model.model.vision_tower.parameters())
    projector_and_llm = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW([{"params": projector_and_llm, "peak_lr": 1e-3},
                                   {"params": tower, "peak_lr": 2e-4}], weight_decay=0.05)
    progress = tqdm(range(args.steps), desc="LLaVA", unit="step")
    for step in progress:
        batch_rows = [rows[i] for i in rng.integers(len(rows), size=args.batch_size)]
        batch = prepare(processor, model.config, args.image_root, batch_rows)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16):
            loss = model(**{name: x.to(device) for name, x in batch.items()}).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        warmup = min(1, (step + 1) / 50)
        cosine = 0.505 + 0.495 * math.cos(math.pi * step / args.steps)  # 1 to 0.01
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * warmup * cosine
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    epochs = args.steps * args.batch_size / len(rows)
    print(f"{epochs:.1f} epochs of {len(rows)} images, last loss {loss.item():.3f}")


@in_one_line
def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", help="checkpoint.pt of train_clip.py: the image tower and the tokenizer")
    add("captions", help="JSONL with image and alt")
    add("output", help="the folder to make")
    add("--image-root", required=True)
    add("--steps", type=number(int, 1), default=900, help="default: %(default)s")
    add("--batch-size", type=number(int, 1), default=128, help="default: %(default)s")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--seed", type=number(int, 0), default=0)
    args = parser.parse_args(argv)
    if os.path.exists(args.output):
        die(f"{args.output} exists")
    rows = [row for _, row in read_rows(args.captions)]
    torch.manual_seed(args.seed)
    model, processor = build(args.checkpoint, pick_device(args.device))
    train(model, processor, rows, args)
    shutil.rmtree(args.output + ".tmp", ignore_errors=True)
    model.save_pretrained(args.output + ".tmp")
    processor.save_pretrained(args.output + ".tmp")
    os.rename(args.output + ".tmp", args.output)


if __name__ == "__main__":
    main()
