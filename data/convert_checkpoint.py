"""Convert other projects' CLIP checkpoints to ours, and ours to Hugging Face's and open_clip's.

    python -m data.convert_checkpoint openai ViT-B-32.pt clip.pt                  # OpenAI's archive
    python -m data.convert_checkpoint openai open_clip_model.safetensors clip.pt  # open_clip; LaCLIP's LAION
    python -m data.convert_checkpoint openai FOLDER clip.pt                       # with open_clip_config.json
    python -m data.convert_checkpoint hf clip-vit-large-patch14-336 clip.pt       # a CLIPModel folder
    python -m data.convert_checkpoint veclip vecapdfn_clip_h14_336 clip.pt        # VeCLIP's release, unzipped
    python -m data.convert_checkpoint laclip cc12m_laclip.pt clip.pt              # LaCLIP's CC3M, ...; SLIP
    python -m data.convert_checkpoint to-hf runs/veclip/checkpoint.pt FOLDER
    python -m data.convert_checkpoint to-open-clip runs/veclip/checkpoint.pt FILE.pt

All families are the same model with different parameter names. They also differ in settings that the weights
do not show. With the settings of another family a model still runs, but its features are worse:

              GELU: image, text   LayerNorm eps   a text is pooled at   images
    OpenAI    quick, quick        1e-5            the highest id        bicubic; OpenAI's mean and std
    open_clip exact, exact (1)    1e-5            the highest id        the same
    HF        config.json         config.json     eos_token_id (2)      preprocessor_config.json, or the same
    VeCLIP    config.json         config.json     T5's end token        bilinear, no antialias; OpenAI's
    LaCLIP    exact, quick        image 1e-6      the highest id        bilinear; ImageNet's mean and std (3)

(1) --quick-gelu for models that open_clip calls ...-quickgelu, and for fine-tuned OpenAI weights.
(2) The first configs have a wrong eos_token_id of 2, which stands for the highest id. CLIPTextModel pools a
    text at the first such id.
(3) The image tower is timm's. It has no LayerNorm before the blocks, a bias in the patch embedding, and a
    LayerNorm on every head's queries and keys. SLIP's own models lack the LayerNorm on queries and keys.

The tokenizers of OpenAI, open_clip and LaCLIP first mend broken Unicode, curly quotes and HTML entities. A
converted checkpoint records this, and its tokenizer does the same (with ftfy). The tokenizer in a folder from
to-hf does not.
"""
import argparse
import codecs
import json
import math
import os
import re
import warnings
import zipfile

import numpy as np
import torch
from safetensors.torch import load_file

from data.common import die, new_parser, reason
from train_clip import CLIP, PRESETS, Config, Tokenizer, load_checkpoint, save_checkpoint


# === names: ours (OpenAI's) -> theirs =======================================================================

def block_names(ours, theirs, names):
    return {f"{ours}.resblocks.N.{a}": f"{theirs}.N.{b}" for a, b in names.items()}


OPENAI = {}
HF_BLOCK = {"ln_1": "layer_norm1", "attn.in_proj_weight": "self_attn.[qkv]_proj.weight",
            "attn.in_proj_bias": "self_attn.[qkv]_proj.bias", "attn.out_proj": "self_attn.out_proj",
            "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
HF = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
      "visual.conv1": "vision_model.embeddings.patch_embedding",
      "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
      "visual.ln_pre": "vision_model.pre_layrnorm",
      **block_names("visual.transformer", "vision_model.encoder.layers", HF_BLOCK),
      "visual.ln_post": "vision_model.post_layernorm",
      "visual.proj": "visual_projection.weight",
      "token_embedding": "text_model.embeddings.token_embedding",
      "positional_embedding": "text_model.embeddings.position_embedding.weight",
      **block_names("transformer", "text_model.encoder.layers", HF_BLOCK),
      "ln_final": "text_model.final_layer_norm",
      "text_projection": "text_projection.weight"}
TRANSPOSED = {"visual_projection.weight", "text_projection.weight"}  # theirs: nn.Linear; ours: x @ projection
RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers
LACLIP = {"visual.class_embedding": "visual.cls_token",
          "visual.conv1": "visual.patch_embed.proj",
          "visual.positional_embedding": "visual.pos_embed",
          **block_names("visual.transformer", "visual.blocks", {
              "ln_1": "norm1", "attn.in_proj_weight": "attn.qkv.weight", "attn.in_proj_bias": "attn.qkv.bias",
              "attn.q_norm": "attn.q_norm", "attn.k_norm": "attn.k_norm", "attn.out_proj": "attn.proj",
              "ln_2": "norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}),
          "visual.ln_post": "visual.norm",
          "visual.proj": "image_projection"}  # the text tower is OpenAI's
LACLIP_SETTINGS = {"mend_texts": True, **{field: PRESETS["ViT-B/16-laclip"][field] for field in (
    "pre_norm", "patch_bias", "vision_eps", "text_quick_gelu", "mean", "std", "resize")}}
VISION_HEADS = {preset["vision_width"]: preset["vision_heads"] for preset in PRESETS.values()
                if "vision_heads" in preset}  # ViT-H: its heads are 80 wide, not 64
SLIP_HEADS = {384: 12, 768: 12, 1024: 16}  # width: heads, from SLIP's release. For LaCLIP, q_norm tells them
NO_WEIGHTS = (r"^(input_resolution|context_length|vocab_size)$"  # in OpenAI's archives, nowhere else
              r"|attn_mask$|\.position_ids$|^image_mlp\.")  # older open_clip, older transformers, SLIP's head
HF_FIELDS = {"vision_config": {"vision_width": "hidden_size", "vision_layers": "num_hidden_layers",
                               "vision_heads": "num_attention_heads", "vision_eps": "layer_norm_eps",
                               "image_size": "image_size", "patch_size": "patch_size"},
             "text_config": {"text_width": "hidden_size", "text_layers": "num_hidden_layers",
                             "text_heads": "num_attention_heads", "text_eps": "layer_norm_eps",
                             "context_length": "max_position_embeddings", "vocab_size": "vocab_size"}}


def their_names(name, table):
    """Our name of a parameter -> [their name], or [their names of queries, keys and values]"""
    number = re.search(r"\.(\d+)\.", name)
    name = re.sub(r"\.\d+\.", ".N.", name)
    for ours, theirs in table.items():
        if f"{name}.".startswith(f"{ours}."):
            name = theirs + name[len(ours):]
            break
    name = name.replace(".N.", number[0]) if number else name
    return [name.replace("[qkv]", part) for part in "qkv"] if "[qkv]" in name else [name]


def theirs_of(name, x, table):
    """One of our tensors -> [(their name, their tensor)]"""
    theirs = their_names(name, table)
    parts = x.chunk(3) if len(theirs) == 3 else [x]
    return [(their, part.T if their in TRANSPOSED else part) for their, part in zip(theirs, parts)]


def ours_from(state, config, table, path):
    """Their tensors -> our model. A missing key, a wrong shape or an unknown key ends the program."""
    try:
        with torch.device("meta"):  # shapes without memory
            model = CLIP(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as e:
        die(f"{path}: no model has these sizes: {e}")
    ours, unused = {}, dict(state)
    for name, target in model.state_dict().items():
        parts = []
        for their, expected in theirs_of(name, target, table):
            if their not in unused:
                die(f"{path}: {their} is missing")
            x = unused.pop(their)
            if x.shape != expected.shape:
                die(f"{path}: {their} has shape {list(x.shape)}, expected {list(expected.shape)}")
            parts.append(x.T if their in TRANSPOSED else x)
        ours[name] = (torch.cat(parts) if len(parts) > 1 else parts[0]).float().contiguous()
    for their in unused:
        if not re.search(NO_WEIGHTS, their):
            die(f"{path}: unexpected {their}")
    model.load_state_dict(ours, assign=True)
    return model


# === files ==================================================================================================

SCALAR = np.float64(0).__reduce__()[0]  # NumPy 1 and NumPy 2 pickle it under different names
NUMPY = [(SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
         *{type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
         codecs.encode]


def read_state(path):
    """-> {name: tensor} of a .safetensors file, a TorchScript archive, a state dict or a trainer's
    {"state_dict": ...}.

    A pickle may hold only tensors, plain values, NumPy's numbers and, as LaCLIP's do, argparse.Namespace."""
    if not os.path.isfile(path):
        die(f"{path}: no such file")
    try:
        safe_globals = torch.serialization.safe_globals([argparse.Namespace, *NUMPY])
        with warnings.catch_warnings(action="ignore"), safe_globals:
            if path.endswith(".safetensors"):
                state = load_file(path)
            elif zipfile.is_zipfile(path) and "constants.pkl" in " ".join(zipfile.ZipFile(path).namelist()):
                state = torch.jit.load(path, map_location="cpu").state_dict()
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
                state = state.get("state_dict", state)
        # DDP and torch.compile add prefixes
        state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): x for name, x in state.items()}
    except Exception as e:  # each kind of broken file raises another class
        die(f"{path} is not a file of weights: {reason(e)}")
    for name, x in state.items():
        if not isinstance(x, torch.Tensor):
            die(f"{path}: {name} is no tensor: expected a state dict, or one under the key state_dict")
    return state


def read_folder(folder, *stems):
    """The weights of a folder: one file, or shards with an index. -> (state, path for messages)"""
    files = set(os.listdir(folder))
    names = [stem + ending for stem in stems for ending in (".safetensors", ".bin")]
    for name in names:
        if name in files:
            return read_state(os.path.join(folder, name)), os.path.join(folder, name)
        if (index := name + ".index.json") in files:
            try:
                with open(os.path.join(folder, index), encoding="utf-8") as f:
                    shards = sorted(set(json.load(f)["weight_map"].values()))
            except (ValueError, LookupError, TypeError, AttributeError) as e:
                die(f"{os.path.join(folder, index)}: {reason(e)}")
            state = {}
            for shard in shards:
                state |= read_state(os.path.join(folder, os.path.basename(shard)))
            return state, folder
    die(f"{folder} has no weights, expected one of {', '.join(names)}")


def fitting_tokenizer(name, config):
    """-> the tokenizer. The model must have an embedding for each of its ids and pool at its end token."""
    tokenizer = Tokenizer.load(name)
    highest = max(tokenizer.tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        die(f"--tokenizer {name}: it has ids up to {highest}, the model's embedding has {config.vocab_size} "
            "rows")
    pooled = highest if config.eot_id < 0 else config.eot_id
    if tokenizer.eot_id != pooled:
        die(f"--tokenizer {name}: its texts end with id {tokenizer.eot_id}, the model pools at id {pooled}")
    return tokenizer


# === OpenAI, open_clip, LaCLIP: the sizes follow from the shapes ============================================

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
        return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)}) or 1

    def heads(width, of=64):
        if not of or width % of:
            die(f"{path}: a width of {width} is not a multiple of {of}, the width of a head")
        return width // of

    width, patch_size = shape("visual.conv1.weight")[0], shape("visual.conv1.weight")[-1]
    vocab_size, text_width = shape("token_embedding.weight")[0], shape("token_embedding.weight")[1]
    q_norm = state.get(their_names("visual.transformer.resblocks.0.attn.q_norm.weight", table)[0])
    if q_norm is not None:
        vision_heads = heads(width, q_norm.numel())
    else:
        vision_heads = known_heads.get(width) or heads(width)
    return Config(embed_dim=shape("text_projection")[1], patch_size=patch_size,
                  image_size=patch_size * math.isqrt(shape("visual.positional_embedding")[0] - 1),
                  vision_width=width, vision_layers=layers("visual.transformer"), vision_heads=vision_heads,
                  text_width=text_width, text_layers=layers("transformer"), text_heads=heads(text_width),
                  context_length=shape("positional_embedding")[0], vocab_size=vocab_size,
                  eot_id=vocab_size - 1, qk_norm=q_norm is not None, **settings)


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
    config = infer_config(state, OPENAI, path, VISION_HEADS, vision_quick_gelu=quick, text_quick_gelu=quick,
                          mend_texts=True, **settings)
    return ours_from(state, config, OPENAI, path), tokenizer or "openai/clip-vit-base-patch32"


def read_open_clip_config(folder):
    """open_clip_config.json -> (the settings of ours that it changes, whether it uses QuickGELU)"""
    path = os.path.join(folder, "open_clip_config.json")
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        model, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
        settings = {name: tuple(pixels[name]) for name in ("mean", "std") if name in pixels}
        settings["resize"] = pixels.get("interpolation", "bicubic")
        if settings["resize"] not in RESAMPLE or pixels.get("resize_mode", "shortest") != "shortest":
            raise ValueError(f"preprocess_cfg is {pixels}: expected resize_mode shortest, and interpolation "
                             "bicubic or bilinear")
        known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"}
        is_timm = isinstance(model["vision_cfg"], dict) and "timm_model_name" in model["vision_cfg"]
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
    return ours_from(state, config, LACLIP, args.input), args.tokenizer


# === Hugging Face, VeCLIP: the settings are in config.json ==================================================

def quiet_transformers():
    """-> transformers without progress bars and advice, so that an error is one line"""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def read_hf_config(path):
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        if content["model_type"] != "clip":
            raise ValueError(f"model_type is {content['model_type']}, expected clip")
        hf = quiet_transformers().CLIPConfig.from_dict(content)
    except Exception as e:  # each kind of broken config raises another class
        die(f"{path} is not the config of a CLIPModel: {reason(e)}")
    values = {"embed_dim": hf.projection_dim, "eot_id": hf.text_config.eos_token_id}
    for tower, fields in HF_FIELDS.items():
        theirs = getattr(hf, tower)
        if theirs.hidden_act not in ("gelu", "quick_gelu"):
            die(f"{path}: hidden_act in {tower} is {theirs.hidden_act}, expected gelu or quick_gelu")
        if theirs.intermediate_size != 4 * theirs.hidden_size:
            die(f"{path}: intermediate_size in {tower} is {theirs.intermediate_size}, expected 4 x "
                f"{theirs.hidden_size}")
        values |= {ours: getattr(theirs, their) for ours, their in fields.items()}
        values[tower.replace("config", "quick_gelu")] = theirs.hidden_act == "quick_gelu"
    for name, value in values.items():
        if not isinstance(value, (int, float)) or value < 0:
            die(f"{path}: {name} would be {value}, expected one number, 0 or more")
    return Config(**values | {"eot_id": -1 if values["eot_id"] == 2 else values["eot_id"]})


def read_hf_transform(folder, config):
    """Copy mean, std and interpolation of preprocessor_config.json into the config.

    The other settings must be what EvalTransform does."""
    S = config.image_size
    try:
        theirs = quiet_transformers().CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        sides = {theirs.size.shortest_edge, theirs.crop_size.height, theirs.crop_size.width}
        steps = theirs.do_resize and theirs.do_center_crop and theirs.do_rescale and theirs.do_normalize
    except Exception as e:
        die(f"{folder}: preprocessor_config.json cannot be read: {reason(e)}")
    if sides != {S} or theirs.resample not in RESAMPLE.values() or not steps:
        die(f"{folder}: expected a preprocessor_config.json that resizes the shorter side to {S}, bicubic "
            "(3) or bilinear (2), crops the centre and normalises")
    config.resize = next(name for name, number in RESAMPLE.items() if number == theirs.resample)
    config.mean, config.std = tuple(theirs.image_mean), tuple(theirs.image_std)


def from_hf(args):
    if not os.path.isdir(args.input):
        die(f"{args.input}: no such folder")
    files = set(os.listdir(args.input))
    config = read_hf_config(os.path.join(args.input, "config.json"))
    if args.command == "veclip":
        config.resize = "bilinear-unsmoothed"
    elif files & {"preprocessor_config.json", "processor_config.json"}:
        read_hf_transform(args.input, config)
    if not args.tokenizer and not files & {"tokenizer.json", "vocab.json"}:
        # transformers would make an empty tokenizer
        die(f"{args.input} has no tokenizer: name one with --tokenizer")
    state, path = read_folder(args.input, "model", "pytorch_model")
    return ours_from(state, config, HF, path), args.tokenizer or args.input


def load_plain(path, target):
    """-> (model, tokenizer) of a checkpoint. Its text tower must be CLIP's."""
    model, tokenizer, _ = load_checkpoint(path)
    if model.config.text_model:
        kind = model.config.text_model["model_type"]
        die(f"{path}: its text tower is a {kind}, which {target} cannot express")
    return model, tokenizer


def to_hf(args):
    model, tokenizer = load_plain(args.input, "Hugging Face's CLIPModel")
    c, folder = model.config, os.path.normpath(args.output) + ".tmp"
    for name, expected in (("qk_norm", False), ("pre_norm", True), ("patch_bias", False)):
        if getattr(c, name) != expected:
            die(f"{args.input}: its config has {name} = {not expected}, which Hugging Face's CLIPModel "
                "cannot express")
    if c.eot_id == 2:
        die(f"{args.input}: its texts end with id 2, which Hugging Face's CLIPModel reads as the highest id")
    towers = {}
    for tower, fields in HF_FIELDS.items():
        towers[tower] = {their: getattr(c, ours) for ours, their in fields.items()}
        quick = getattr(c, tower.replace("config", "quick_gelu"))
        towers[tower] |= {"intermediate_size": 4 * towers[tower]["hidden_size"],
                          "projection_dim": c.embed_dim, "hidden_act": "quick_gelu" if quick else "gelu"}
    towers["text_config"] |= {"eos_token_id": 2 if c.eot_id < 0 else c.eot_id, "bos_token_id": None,
                              "pad_token_id": tokenizer.eot_id}  # padding follows the end: it has no effect
    transformers = quiet_transformers()
    hf = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=c.embed_dim))
    state = model.state_dict().items()
    hf.load_state_dict(dict(pair for name, x in state for pair in theirs_of(name, x, HF)))
    hf.save_pretrained(folder)
    end = tokenizer.tokenizer.id_to_token(tokenizer.eot_id)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.tokenizer.from_str(tokenizer.json_text), eos_token=end, pad_token=end,
        model_max_length=c.context_length, split_special_tokens=True).save_pretrained(folder)
    if c.resize in RESAMPLE:  # theirs always antialiases; else the folder has no transform, like VeCLIP's
        S = c.image_size
        transformers.CLIPImageProcessor(
            size={"shortest_edge": S}, crop_size={"height": S, "width": S}, resample=RESAMPLE[c.resize],
            image_mean=c.mean, image_std=c.std).save_pretrained(folder)
    os.rename(folder, args.output)
    return model


def to_open_clip(args):
    """Write a plain state dict: open_clip has our names. Print the settings that open_clip needs as well."""
    model, _ = load_plain(args.input, "open_clip's CLIP")
    c = model.config
    plain = c.pre_norm and not c.qk_norm and not c.patch_bias and c.vision_eps == c.text_eps == 1e-5
    if not plain or c.vision_quick_gelu != c.text_quick_gelu:
        die(f"{args.input}: its config has what open_clip's CLIP cannot express (qk_norm, patch_bias, no "
            "pre_norm, two activations or another LayerNorm eps)")
    if c.eot_id not in (-1, c.vocab_size - 1):
        die(f"{args.input}: its texts end with id {c.eot_id}, open_clip pools at the highest id")
    temporary = args.output + ".tmp"
    torch.save(model.state_dict(), temporary)
    os.rename(temporary, args.output)
    vision = {"image_size": c.image_size, "layers": c.vision_layers, "width": c.vision_width,
              "head_width": c.vision_width // c.vision_heads, "patch_size": c.patch_size}
    text = {"context_length": c.context_length, "vocab_size": c.vocab_size, "width": c.text_width,
            "heads": c.text_heads, "layers": c.text_layers}
    config = {"embed_dim": c.embed_dim, "quick_gelu": c.vision_quick_gelu, "vision_cfg": vision,
              "text_cfg": text}
    print(f"open_clip.create_model(NAME, pretrained={args.output!r}), with a NAME that has this config: "
          + json.dumps(config))
    print(f"image_mean={c.mean}, image_std={c.std}, image_interpolation={c.resize!r}")
    return model


# === the command line =======================================================================================

COMMANDS = {  # function, default tokenizer, help
    "openai": (from_openai, None, "OpenAI's or open_clip's weights, or a folder with open_clip_config.json"),
    "hf": (from_hf, None, "a folder of Hugging Face's CLIPModel"),
    "veclip": (from_hf, "t5-base", "a folder of VeCLIP's release"),
    "laclip": (from_laclip, "openai/clip-vit-base-patch32", "LaCLIP's or SLIP's file of weights"),
    "to-hf": (to_hf, None, "our checkpoint, into a folder of Hugging Face's CLIPModel"),
    "to-open-clip": (to_open_clip, None, "our checkpoint, for open_clip.create_model(pretrained=OUTPUT)")}


def describe(model):
    c, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    quick = [tower for tower in ("vision", "text") if getattr(c, f"{tower}_quick_gelu")]
    quick = " and ".join(quick) or "no tower"
    pooled = "the highest id" if c.eot_id < 0 else f"id {c.eot_id}"
    vision = f"ViT {c.vision_width} x {c.vision_layers} patch {c.patch_size} at {c.image_size} px"
    return (f"{parameters / 1e6:.1f} M parameters, {vision}, text {c.text_width} x {c.text_layers}, "
            f"QuickGELU in {quick}, pooled at {pooled}")


def main(argv=None):
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, tokenizer, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.error = die
        command.add_argument("input", help=text)
        command.add_argument("output", help="must not exist yet")
        if not name.startswith("to-"):
            default = tokenizer or "that of the folder"
            if name == "openai":
                default += ", else openai/clip-vit-base-patch32"
            command.add_argument("--tokenizer", default=tokenizer,
                                 help=f"hub name, folder or tokenizer.json (default: {default})")
        if name == "openai":
            command.add_argument("--quick-gelu", action="store_true",
                                 help="QuickGELU in both towers (OpenAI's archives always have it)")
    args = parser.parse_args(argv)
    if os.path.exists(args.output):
        die(f"{args.output} exists already and is not overwritten")
    convert = COMMANDS[args.command][0]
    if convert in (to_hf, to_open_clip):
        model = convert(args)
    else:
        model, tokenizer = convert(args)
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                die(f"{args.input}: {name} has values that are not finite")
        save_checkpoint(args.output, model, fitting_tokenizer(tokenizer, model.config))
    print(f"{args.input} -> {args.output}: {describe(model)}")


if __name__ == "__main__":
    main()
