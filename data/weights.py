"""Other projects' CLIP weights for data/convert_checkpoint.py: their files, and their names.

All families are the same model; their parameters have other names.
"""
import argparse
import codecs
import json
import os
import re
import warnings
import zipfile

import numpy as np
import torch
from safetensors.torch import load_file

from data.common import die, reason
from train_clip import CLIP, load_checkpoint

RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers


# === names: ours (OpenAI's) -> theirs =============================================================

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
# theirs: nn.Linear; ours: x @ projection
TRANSPOSED = {"visual_projection.weight", "text_projection.weight"}
LACLIP = {"visual.class_embedding": "visual.cls_token",
          "visual.conv1": "visual.patch_embed.proj",
          "visual.positional_embedding": "visual.pos_embed",
          **block_names("visual.transformer", "visual.blocks", {
              "ln_1": "norm1", "ln_2": "norm2", "attn.in_proj_weight": "attn.qkv.weight",
              "attn.in_proj_bias": "attn.qkv.bias", "attn.out_proj": "attn.proj",
              "attn.q_norm": "attn.q_norm", "attn.k_norm": "attn.k_norm",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}),
          "visual.ln_post": "visual.norm",
          "visual.proj": "image_projection"}  # the text tower is OpenAI's
# In OpenAI's archives; in older open_clip and transformers; SLIP's head
NO_WEIGHTS = (r"^(input_resolution|context_length|vocab_size)$|attn_mask$|\.position_ids$"
              r"|^image_mlp\.")
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
    """Their tensors -> our model. A missing or unknown key or a wrong shape ends the program."""
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
                die(f"{path}: {their} has shape {list(x.shape)}, expected "
                    f"{list(expected.shape)}")
            parts.append(x.T if their in TRANSPOSED else x)
        ours[name] = (torch.cat(parts) if len(parts) > 1 else parts[0]).float().contiguous()
    for their in unused:
        if not re.search(NO_WEIGHTS, their):
            die(f"{path}: unexpected {their}")
    model.load_state_dict(ours, assign=True)
    return model


# === files ========================================================================================

SCALAR = np.float64(0).__reduce__()[0]  # NumPy 1 and NumPy 2 pickle it under different names
KINDS = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"
NUMPY = [(SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"),
         np.dtype, *{type(np.dtype(kind)) for kind in KINDS}, codecs.encode]


def read_state(path):
    """-> {name: tensor} of a .safetensors file, a TorchScript archive, a state dict or a trainer's
    {"state_dict": ...}.

    A pickle may hold only tensors, plain values, NumPy's numbers and, as LaCLIP's do,
    argparse.Namespace."""
    if not os.path.isfile(path):
        die(f"{path}: no such file")
    try:
        safe_globals = torch.serialization.safe_globals([argparse.Namespace, *NUMPY])
        with warnings.catch_warnings(action="ignore"), safe_globals:
            if path.endswith(".safetensors"):
                state = load_file(path)
            elif is_torchscript(path):
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
            die(f"{path}: {name} is no tensor: expected a state dict, or one under the key "
                "state_dict")
    return state


def is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


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


def load_ours(path):
    """-> (model, tokenizer) of our checkpoint"""
    if not os.path.isfile(path):
        die(f"{path}: no such file")
    try:
        model, tokenizer, _ = load_checkpoint(path)
    except Exception as e:  # torch raises many classes for a file that is not one of its own
        die(f"{path} is not a checkpoint of train_clip.py: {reason(e)}")
    return model, tokenizer


def load_plain(path, target):
    """-> (model, tokenizer) of a checkpoint whose text tower is CLIP's"""
    model, tokenizer = load_ours(path)
    if model.config.text_model:
        kind = model.config.text_model["model_type"]
        die(f"{path}: its text tower is a {kind}, which {target} cannot express")
    if model.config.conv_stem:
        die(f"{path}: its image tower begins with convolutions, which {target} cannot express")
    return model, tokenizer


def end_id(tokenizer):
    """The end token, at which our models pool a text"""
    return tokenizer.tokenizer.encode("a").ids[-1]  # without ftfy
