"""Convert other projects' CLIP checkpoints to ours, and ours to Hugging Face's and open_clip's.

    python -m data.convert_checkpoint openai ViT-B-32.pt clip.pt     # OpenAI's archive
    python -m data.convert_checkpoint openai open_clip_model.safetensors clip.pt
    python -m data.convert_checkpoint openai FOLDER clip.pt          # with open_clip_config.json
    python -m data.convert_checkpoint hf clip-vit-large-patch14-336 clip.pt  # a CLIPModel folder
    python -m data.convert_checkpoint veclip vecapdfn_clip_h14_336 clip.pt   # VeCLIP's, unzipped
    python -m data.convert_checkpoint laclip cc12m_laclip.pt clip.pt   # LaCLIP's CC3M, ...; SLIP
    python -m data.convert_checkpoint to-hf runs/veclip/checkpoint.pt FOLDER
    python -m data.convert_checkpoint to-open-clip runs/veclip/checkpoint.pt FILE.pt

    python -m data.convert_checkpoint ours clip.pt long.pt --context-length 248

The second command also takes LaCLIP's LAION models. All families are the same model with different
parameter names. They also differ in settings that the weights do not show. With the settings of
another family a model still runs, but its features are worse:

              GELU: image, text   LayerNorm eps   text pooled at    images
    OpenAI    quick, quick        1e-5            the highest id    bicubic; OpenAI's (4)
    open_clip exact, exact (1)    1e-5            the highest id    the same
    HF        config.json         config.json     eos_token_id (2)  preprocessor_config.json (5)
    VeCLIP    config.json         config.json     T5's end token    bilinear-unsmoothed; OpenAI's
    LaCLIP    exact, quick        image 1e-6      the highest id    bilinear; ImageNet's (3)

(1) --quick-gelu for models that open_clip calls ...-quickgelu, and for fine-tuned OpenAI weights.
(2) The first configs have a wrong eos_token_id of 2, which stands for the highest id. CLIPTextModel
    pools a text at the first such id. Ours pools at a text's last token, the tokenizer's end token:
    a tokenizer whose end is not where the weights pool is refused.
(3) The image tower is timm's. It has no LayerNorm before the blocks, a bias in the patch embedding,
    and a LayerNorm on every head's queries and keys. SLIP's own models lack the latter.
(4) Mean and standard deviation of the training images. (5) Without it, as OpenAI.

The tokenizers of OpenAI, open_clip and LaCLIP first mend broken Unicode, curly quotes and HTML
entities. A converted checkpoint records this, and its tokenizer does the same (with ftfy). The
tokenizer in a folder from to-hf does not.
"""
import json
import math
import os
from dataclasses import replace

import torch
import torch.nn.functional as F

from data.common import die, in_one_line, new_parser, number, reason
from data.hf_weights import from_hf, to_hf
from data.weights import (LACLIP, OPENAI, RESAMPLE, end_id, load_ours, load_plain, ours_from,
                          read_folder, read_state, their_names)
from train_clip import CLIP, PRESETS, Config, Tokenizer, save_checkpoint

LACLIP_SETTINGS = {"mend_texts": True, **{field: PRESETS["ViT-B/16-laclip"][field] for field in (
    "pre_norm", "patch_bias", "vision_eps", "text_quick_gelu", "mean", "std", "resize")}}
VISION_HEADS = {preset["vision_width"]: preset["vision_heads"] for preset in PRESETS.values()
                if "vision_heads" in preset}  # ViT-H: its heads are 80 wide, not 64
SLIP_HEADS = {384: 12, 768: 12, 1024: 16}  # width: heads, SLIP's release; LaCLIP's q_norm tells


# === OpenAI, open_clip, LaCLIP: the sizes follow from the shapes ==================================

def infer_config(state, table, path, known_heads, **settings):
    def shape(ours):
        name = their_names(ours, table)[0]
        if name not in state:
            die(f"{path}: {name} is missing")
        if state[name].ndim < 2 or 0 in state[name].shape:
            die(f"{path}: {name} has shape {list(state[name].shape)}")
        return state[name].shape

    def layers(ours):
        prefix = their_names(f"{ours}.resblocks.0.ln_1", table)[0].split("0.")[0]
        names = [name for name in state if name.startswith(prefix)]
        return len({name[len(prefix):].split(".")[0] for name in names}) or 1

    def heads(width, of=64):
        if not of or width % of:
            die(f"{path}: a width of {width} is not a multiple of {of}, the width of a head")
        return width // of

    width, patch_size = shape("visual.conv1.weight")[0], shape("visual.conv1.weight")[-1]
    vocab_size, text_width = shape("token_embedding.weight")[:2]
    q_norm = state.get(their_names("visual.transformer.resblocks.0.attn.q_norm.weight", table)[0])
    if q_norm is not None:
        vision_heads = heads(width, q_norm.numel())
    else:
        vision_heads = known_heads.get(width) or heads(width)
    return Config(embed_dim=shape("text_projection")[1], patch_size=patch_size,
                  image_size=patch_size * math.isqrt(shape("visual.positional_embedding")[0] - 1),
                  vision_width=width, vision_layers=layers("visual.transformer"),
                  vision_heads=vision_heads, text_width=text_width,
                  text_layers=layers("transformer"), text_heads=heads(text_width),
                  context_length=shape("positional_embedding")[0], vocab_size=vocab_size,
                  qk_norm=q_norm is not None, **settings)


def from_openai(args):
    folder, settings, tokenizer = os.path.isdir(args.input), {}, args.tokenizer
    if folder:
        state, path = read_folder(args.input, "open_clip_model", "open_clip_pytorch_model")
        settings, quick = read_open_clip_config(args.input)
        if tokenizer is None and {"tokenizer.json", "vocab.json"} & set(os.listdir(args.input)):
            tokenizer = args.input
    else:
        state, path = read_state(args.input), args.input
        quick = "input_resolution" in state
    quick = quick or args.quick_gelu
    config = infer_config(state, OPENAI, path, VISION_HEADS, vision_quick_gelu=quick,
                          text_quick_gelu=quick, mend_texts=True, **settings)
    model = ours_from(state, config, OPENAI, path)
    return model, tokenizer or "openai/clip-vit-base-patch32", config.vocab_size - 1


def read_open_clip_config(folder):
    """open_clip_config.json -> (the settings of ours that it changes, whether it uses QuickGELU)"""
    path = os.path.join(folder, "open_clip_config.json")
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        model, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
        settings = {name: tuple(pixels[name]) for name in ("mean", "std") if name in pixels}
        settings["resize"] = pixels.get("interpolation", "bicubic")
        by_side = pixels.get("resize_mode", "shortest") == "shortest"
        if settings["resize"] not in RESAMPLE or not by_side:
            raise ValueError(f"preprocess_cfg is {pixels}: expected resize_mode shortest, and "
                             "interpolation bicubic or bilinear")
        known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale",
                 "init_logit_bias"}
        is_timm = "timm_model_name" in dict(model["vision_cfg"])
        if set(model) - known or is_timm:
            raise ValueError("model_cfg describes another architecture than OpenAI's")
        return settings, bool(model.get("quick_gelu"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        die(f"{path}: {reason(e)}")


def from_laclip(args):
    state = read_state(args.input)
    for name in ("visual.cls_token", "visual.pos_embed"):
        if name in state:
            state[name] = state[name].squeeze()
    config = infer_config(state, LACLIP, args.input, SLIP_HEADS, **LACLIP_SETTINGS)
    return ours_from(state, config, LACLIP, args.input), args.tokenizer, config.vocab_size - 1


# === ours =========================================================================================

def from_ours(args):
    model, tokenizer = load_ours(args.input)
    return model, tokenizer, end_id(tokenizer)


def fitting_tokenizer(name, config, pooled):
    """-> the tokenizer, whose ids all have an embedding and whose texts end where the model pools.

    pooled: an id, or None: the highest id"""
    try:
        tokenizer = Tokenizer.load(name, config.context_length)
    except Exception as e:  # tokenizers and transformers raise nearly everything
        die(f"--tokenizer {name}: {reason(e)}")
    highest = max(tokenizer.tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        die(f"--tokenizer {name}: it has ids up to {highest}, the model's embedding has "
            f"{config.vocab_size} rows")
    pooled = highest if pooled is None else pooled
    if end_id(tokenizer) != pooled:
        die(f"--tokenizer {name}: its texts end with id {end_id(tokenizer)}, the model pools at id "
            f"{pooled}")
    return tokenizer


def stretched(positions, length, kept=20):
    """Position embeddings [L, W] -> [length, W]. More positions: keep the first `kept`, which are
    trained best, and interpolate the others (Long-CLIP, arXiv 2403.15378, section 3.1). Fewer: keep
    the first."""
    if length <= len(positions):
        return positions[:length]
    kept = kept if len(positions) > kept else 0
    rest = F.interpolate(positions[kept:].T[None], length - kept, mode="linear", align_corners=True)
    return torch.cat([positions[:kept], rest[0].T])


def with_context(model, length):
    """The model for texts of up to `length` tokens"""
    config, weights = replace(model.config, context_length=length), dict(model.state_dict())
    if not config.text_model:
        weights["positional_embedding"] = stretched(weights["positional_embedding"], length)
    longer = CLIP(config)
    longer.load_state_dict(weights)
    return longer


def to_open_clip(args):
    """Write a plain state dict: open_clip has our names. Print the settings that it needs, too."""
    model, tokenizer = load_plain(args.input, "open_clip's CLIP")
    c, end, ids = model.config, end_id(tokenizer), tokenizer.tokenizer.get_vocab().values()
    plain = c.pre_norm and not c.qk_norm and not c.patch_bias and c.vision_eps == c.text_eps == 1e-5
    if not plain or c.vision_quick_gelu != c.text_quick_gelu:
        die(f"{args.input}: its config has what open_clip's CLIP cannot express (qk_norm, "
            "patch_bias, no pre_norm, two activations or another LayerNorm eps)")
    if end != max(ids):
        die(f"{args.input}: its texts end with id {end}, open_clip pools at the highest id")
    temporary = args.output + ".tmp"
    torch.save(model.state_dict(), temporary)
    os.rename(temporary, args.output)
    vision = {"image_size": c.image_size, "layers": c.vision_layers, "width": c.vision_width,
              "head_width": c.vision_width // c.vision_heads, "patch_size": c.patch_size}
    text = {"context_length": c.context_length, "vocab_size": c.vocab_size, "width": c.text_width,
            "heads": c.text_heads, "layers": c.text_layers}
    config = {"embed_dim": c.embed_dim, "quick_gelu": c.vision_quick_gelu, "vision_cfg": vision,
              "text_cfg": text}
    print(f"open_clip.create_model(NAME, pretrained={args.output!r}), with a NAME that has this "
          f"config: {json.dumps(config)}")
    print(f"image_mean={c.mean}, image_std={c.std}, image_interpolation={c.resize!r}")
    return model


# === the command ==================================================================================

OPENAI_TOKENIZER = "openai/clip-vit-base-patch32"
COMMANDS = {  # function, default tokenizer, help
    "openai": (from_openai, None, "OpenAI's or open_clip's weights, or a folder with "
               "open_clip_config.json"),
    "hf": (from_hf, None, "a folder of Hugging Face's CLIPModel"),
    "veclip": (from_hf, "t5-base", "a folder of VeCLIP's release"),
    "laclip": (from_laclip, OPENAI_TOKENIZER, "LaCLIP's or SLIP's file of weights"),
    "ours": (from_ours, None, "our checkpoint, for --context-length"),
    "to-hf": (to_hf, None, "our checkpoint, into a folder of Hugging Face's CLIPModel"),
    "to-open-clip": (to_open_clip, None, "our checkpoint, for open_clip.create_model(pretrained="
                     "OUTPUT)")}


def describe(model):
    c, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    quick = [tower for tower in ("vision", "text") if getattr(c, f"{tower}_quick_gelu")]
    quick = " and ".join(quick) or "no tower"
    vision = f"ViT {c.vision_width} x {c.vision_layers} patch {c.patch_size} at {c.image_size} px"
    text = f"text {c.text_width} x {c.text_layers} of {c.context_length} tokens"
    return f"{parameters / 1e6:.1f} M parameters, {vision}, {text}, QuickGELU in {quick}"


def add_commands(parser):
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, tokenizer, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.error = die
        add = command.add_argument
        add("input", help=text)
        add("output", help="must not exist yet")
        if not name.startswith("to-"):
            add("--context-length", type=number(int, 2), metavar="N", help="tokens of a text: more "
                "positions are interpolated, to be trained on (default: the weights' own)")
        if name not in ("ours", "to-hf", "to-open-clip"):
            default = tokenizer or "that of the folder"
            if name == "openai":
                default += ", else " + OPENAI_TOKENIZER
            add("--tokenizer", default=tokenizer,
                help=f"hub name, folder or tokenizer.json (default: {default})")
        if name == "openai":
            add("--quick-gelu", action="store_true",
                help="QuickGELU in both towers (OpenAI's archives always have it)")


def save(args, model, tokenizer, pooled):
    """Write what is converted as our checkpoint."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            die(f"{args.input}: {name} has values that are not finite")
    if isinstance(tokenizer, str):
        tokenizer = fitting_tokenizer(tokenizer, model.config, pooled)
    if args.context_length:
        model = with_context(model, args.context_length)
    save_checkpoint(args.output, model, tokenizer)
    return model


@in_one_line
def main(argv=None):
    parser = new_parser(__doc__)
    add_commands(parser)
    args = parser.parse_args(argv)
    if os.path.exists(args.output):
        die(f"{args.output} exists already and is not overwritten")
    convert = COMMANDS[args.command][0]
    result = convert(args)
    model = result if convert in (to_hf, to_open_clip) else save(args, *result)
    print(f"{args.input} -> {args.output}: {describe(model)}")


if __name__ == "__main__":
    main()
