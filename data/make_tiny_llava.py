"""A small LLaVA, built the way LLaVA was (Liu et al. 2023, section 4.2): a CLIP image tower, a projector, a language model.

    python data/make_tiny_llava.py out/demo/clip-noisy/checkpoint.pt out/demo/smollm2 out/demo/half_a.jsonl \\
        out/demo/tiny-llava --image-root out/demo/images      # half an hour on 2 cores

The image tower is a CLIP of train_clip.py, in its Hugging Face form, and stays frozen. A two-layer projector carries all
its tokens into the language model's space. First the projector learns alone, then with the language model's upper
--layers; the loss is on the caption (`alt`) alone. OUT is an ordinary LLaVA folder: caption_llava.py loads it like any
other, and so does transformers. For more than a demonstration, take a released LLaVA.
"""
import argparse
import math
import os
import random
import shutil
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from caption_llava import PROMPT  # noqa: E402
from data.features import read_rows  # noqa: E402
from train_clip import augment_crop, die, open_image, pick_device, texts_of, to_rgb  # noqa: E402

# The instruction, the picture's tokens, and the caption follow one another; a newline ends the caption for the reader
TEMPLATE = ("{% for m in messages %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
            "{{ '\n<image>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Caption:' }}{% endif %}")


def build(checkpoint, llm, device):
    """-> LlavaForConditionalGeneration with an untrained projector, and its processor"""
    from transformers import (AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlavaConfig,
                              LlavaForConditionalGeneration, LlavaProcessor)

    from convert_checkpoint import main as convert
    with tempfile.TemporaryDirectory() as folder:
        convert(["to-hf", checkpoint, os.path.join(folder, "clip")])
        tower = CLIPVisionModel.from_pretrained(os.path.join(folder, "clip"), dtype=torch.float32)
        pictures = CLIPImageProcessor.from_pretrained(os.path.join(folder, "clip"))
    tokenizer = AutoTokenizer.from_pretrained(llm)
    language = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language.resize_token_embeddings(len(tokenizer))
    tokens = (tower.config.image_size // tower.config.patch_size) ** 2 + 1
    # The last layer but one, as LLaVA; unlike LLaVA with its class token, which says most in so small a tower
    config = LlavaConfig(vision_config=tower.config, text_config=language.config, vision_feature_layer=-2,
                         vision_feature_select_strategy="full", image_seq_length=tokens,
                         image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    processor = LlavaProcessor(pictures, tokenizer, patch_size=tower.config.patch_size, num_additional_image_tokens=1,
                               vision_feature_select_strategy="full", chat_template=TEMPLATE)
    if device == "cpu":  # for sixty tokens the plain formula is faster there than torch's kernel
        model.set_attn_implementation("eager")
    return model.to(device), processor


def prepare(processor, root, rows, rng, prompt, S):
    """Pictures, a little cropped, and captions -> the model's inputs, right-padded, with labels on the caption and the end
    token alone (-100 elsewhere)"""
    tokenizer = processor.tokenizer
    images = [augment_crop(open_image(root, row["image"]), S, rng, scale=(0.8, 1.0)) for row in rows]
    prompts = processor(images=images, text=[prompt] * len(rows), return_tensors="pt")
    captions = [tokenizer(" " + texts_of(row["alt"])[0], add_special_tokens=False).input_ids[:40] + [tokenizer.eos_token_id]
                for row in rows]
    ids = [torch.cat([p, torch.tensor(c)]) for p, c in zip(prompts.input_ids, captions)]
    labels = [torch.cat([torch.full_like(p, -100), torch.tensor(c)]) for p, c in zip(prompts.input_ids, captions)]
    return {"pixel_values": prompts.pixel_values, "input_ids": pad_sequence(ids, True, tokenizer.eos_token_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], True, 0)}, pad_sequence(labels, True, -100)


def train(model, processor, root, rows, args):
    """Stage 1, a sixth of the steps: the projector. Stage 2: with the language model's upper layers."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    rng, order, S = np.random.default_rng(args.seed), random.Random(args.seed), model.config.vision_config.image_size
    model.requires_grad_(False)
    projector = list(model.model.multi_modal_projector.requires_grad_(True).parameters())
    layers = model.model.language_model.layers
    upper = [p for layer in layers[max(0, len(layers) - args.layers):] for p in layer.parameters()]
    optimizer = torch.optim.AdamW([{"params": projector, "peak": 1e-3}, {"params": upper, "peak": 2e-4}], weight_decay=0.05)
    queue, progress = [], tqdm(range(args.steps), desc="projector", unit="step")
    for step in progress:
        if step == args.steps // 6 and upper:
            for p in upper:
                p.requires_grad_(True)
            progress.set_description("and upper layers")
        while len(queue) < args.batch_size:
            queue += order.sample(rows, len(rows))
        batch, queue = queue[:args.batch_size], queue[args.batch_size:]
        inputs, labels = prepare(processor, root, batch, rng, prompt, S)
        keep = labels.shape[1] - int((labels[0] != -100).nonzero()[0]) + 1  # the captions' positions and the one before
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(**{k: v.to(model.device) for k, v in inputs.items()}, logits_to_keep=keep).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1 - keep:].flatten().to(model.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, (step + 1) / 20) * (0.51 + 0.49 * math.cos(math.pi * step / args.steps))
        torch.nn.utils.clip_grad_norm_(projector + upper, 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    print(f"{args.steps * args.batch_size / len(rows):.1f} epochs, last loss {loss.item():.3f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("checkpoint", help="of train_clip.py: its image tower")
    add("llm", help="folder or hub name of a language model")
    add("captions", help="JSONL with image and alt")
    add("output", help="the folder to make")
    add("--image-root", required=True)
    add("--steps", type=int, default=600, help="a sixth of them for the projector alone (default: %(default)s)")
    add("--layers", type=int, default=6, help="of the language model's, from the top, that learn too (default: 6; 0: none)")
    add("--batch-size", type=int, default=32)
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if os.path.exists(args.output):
        die(f"{args.output} exists")
    if min(args.steps, args.batch_size) < 1:
        die("--steps and --batch-size are 1 or more")
    rows = [row for row in read_rows(args.captions) if texts_of(row.get("alt"))]
    if not rows:
        die(f"{args.captions}: no row has a text in alt")
    for row in rows:
        try:
            to_rgb(open_image(args.image_root, row.get("image")))
        except Exception as e:  # Pillow's decoders raise nearly everything
            die(f"{row.get('image')} cannot be read: {e}")
    torch.manual_seed(args.seed)
    model, processor = build(args.checkpoint, args.llm, pick_device(args.device))
    train(model, processor, args.image_root, rows, args)
    shutil.rmtree(args.output + ".tmp", ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(args.output + ".tmp")
    processor.save_pretrained(args.output + ".tmp")
    os.rename(args.output + ".tmp", args.output)


if __name__ == "__main__":
    main()
