"""What a user would write instead of train_clip.py: a plain training loop on the CPU. tests/bench/train.py runs it.

    python tests/bench/peers.py transformers DATA --model ViT-B/32 --precision bf16 --batch-size 32 --workers 2

    transformers          transformers' CLIPModel, its tokenizer padded to 77, cross entropy both ways
    open_clip-multitext   open_clip's model and tokenizer, five texts an image, LaCLIP's multi-text loss

DATA is the folder that tests/bench/train.py makes. One line of JSON a step, until it is stopped or DATA has been seen.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from inputs import FIELDS, T, read_rows


def torchvision_transform(size):
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(), transforms.Normalize(T.Config.mean, T.Config.std)])


class Pairs(torch.utils.data.Dataset):
    def __init__(self, folder, fields, size, tokenize):
        self.folder, self.fields, self.tokenize, self.transform = folder, fields, tokenize, torchvision_transform(size)
        self.rows = [row for _, row in read_rows(f"{folder}/short.jsonl")]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        image = self.transform(default_loader(f"{self.folder}/images/{self.rows[i]['image']}"))
        return image, self.tokenize([self.rows[i][field] for field in self.fields])


def transformers_clip(c, folder):
    """-> model, tokenize, loss"""
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
    text = dict(hidden_size=c.text_width, intermediate_size=4 * c.text_width, num_hidden_layers=c.text_layers,
                num_attention_heads=c.text_heads, hidden_act="gelu", vocab_size=c.vocab_size, eos_token_id=c.vocab_size - 1)
    vision = dict(hidden_size=c.vision_width, intermediate_size=4 * c.vision_width, num_hidden_layers=c.vision_layers,
                  num_attention_heads=c.vision_heads, hidden_act="gelu", image_size=c.image_size,
                  patch_size=c.patch_size)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=c.embed_dim))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token="<|endoftext|>")

    def tokenize(texts):
        return dict(tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"))

    def loss(images, texts):  # [B, 3, S, S], {"input_ids", "attention_mask": [B, 1, 77]}
        logits = model(pixel_values=images, **{name: x.flatten(0, 1) for name, x in texts.items()}).logits_per_image
        labels = torch.arange(len(images))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return model, tokenize, loss


def open_clip_multitext(name):
    """-> model, tokenize, loss: (L_I* + L_T) / 2, where L_I* is the mean over the five texts and L_T has a drawn one"""
    import open_clip
    model = open_clip.create_model(name)

    def loss(images, texts):  # [B, 3, S, S], [B, 5, 77]
        image = F.normalize(model.encode_image(images), dim=-1)
        text = F.normalize(model.encode_text(texts.flatten(0, 1)), dim=-1).view(*texts.shape[:2], -1)
        scale, labels = model.logit_scale.exp(), torch.arange(len(images))
        loss_i = sum(F.cross_entropy(scale * image @ one.T, labels) for one in text.unbind(1)) / texts.shape[1]
        drawn = text[labels, torch.randint(texts.shape[1], labels.shape)]
        return (loss_i + F.cross_entropy(scale * drawn @ image.T, labels)) / 2
    return model, open_clip.get_tokenizer(name), loss


def open_clip_name(model, folder):
    """open_clip's name of our preset; of nano, which it does not have, a folder that describes it."""
    if model != "nano":
        return model.replace("/", "-")
    c, path = T.Config(**T.PRESETS[model]), Path(folder, "nano-vit", "open_clip_config.json")
    path.parent.mkdir(exist_ok=True)
    vision = dict(image_size=c.image_size, layers=c.vision_layers, width=c.vision_width, patch_size=c.patch_size)
    text = dict(vocab_size=c.vocab_size, width=c.text_width, heads=c.text_heads, layers=c.text_layers)
    path.write_text(json.dumps({"model_cfg": {"embed_dim": c.embed_dim, "vision_cfg": vision, "text_cfg": text}}))
    return f"local-dir:{path.parent}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["transformers", "open_clip-multitext"])
    parser.add_argument("folder", metavar="DATA")
    parser.add_argument("--model", choices=T.PRESETS, default="ViT-B/32")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)

    c = T.Config(**T.PRESETS[args.model])
    model, tokenize, objective = transformers_clip(c, args.folder) if args.peer == "transformers" else \
        open_clip_multitext(open_clip_name(args.model, args.folder))
    with torch.device("meta"):  # the same architecture as ours
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in T.CLIP(c).parameters())
    pairs = Pairs(args.folder, FIELDS[:1] if args.peer == "transformers" else FIELDS, c.image_size, tokenize)
    loader = torch.utils.data.DataLoader(pairs, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step, (images, texts) in enumerate(loader, 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = objective(images, texts)
        loss.backward()
        optimizer.step()
        print(json.dumps({"step": step, "loss": loss.item()}), flush=True)


if __name__ == "__main__":
    main()
