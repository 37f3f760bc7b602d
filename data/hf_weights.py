"""Hugging Face's CLIPModel folders, VeCLIP's among them: the settings are in config.json."""
import json
import os

from data.common import die, reason
from data.weights import HF, RESAMPLE, end_id, load_plain, ours_from, read_folder, theirs_of
from train_clip import Config

HF_FIELDS = {  # ours: theirs
    "vision_config": {
        "vision_width": "hidden_size", "vision_layers": "num_hidden_layers",
        "vision_heads": "num_attention_heads", "vision_eps": "layer_norm_eps",
        "image_size": "image_size", "patch_size": "patch_size"},
    "text_config": {
        "text_width": "hidden_size", "text_layers": "num_hidden_layers",
        "text_heads": "num_attention_heads", "text_eps": "layer_norm_eps",
        "context_length": "max_position_embeddings", "vocab_size": "vocab_size"}}


def quiet_transformers():
    """-> transformers without progress bars and advice, so that an error is one line"""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def read_hf_config(path):
    """-> Config, and the id at which a text is pooled; None: the highest id"""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        if content["model_type"] != "clip":
            raise ValueError(f"model_type is {content['model_type']}, expected clip")
        hf = quiet_transformers().CLIPConfig.from_dict(content)
    except Exception as e:  # each kind of broken config raises another class
        die(f"{path} is not the config of a CLIPModel: {reason(e)}")
    values = {"embed_dim": hf.projection_dim, "eos_token_id": hf.text_config.eos_token_id}
    for tower, fields in HF_FIELDS.items():
        theirs = getattr(hf, tower)
        if theirs.hidden_act not in ("gelu", "quick_gelu"):
            die(f"{path}: hidden_act in {tower} is {theirs.hidden_act}, expected gelu or "
                "quick_gelu")
        if theirs.intermediate_size != 4 * theirs.hidden_size:
            die(f"{path}: intermediate_size in {tower} is {theirs.intermediate_size}, expected "
                f"4 x {theirs.hidden_size}")
        values |= {ours: getattr(theirs, their) for ours, their in fields.items()}
        values[tower.replace("config", "quick_gelu")] = theirs.hidden_act == "quick_gelu"
    for name, value in values.items():
        if not isinstance(value, (int, float)) or value < 0:
            die(f"{path}: {name} would be {value}, expected one number, 0 or more")
    pooled = values.pop("eos_token_id")
    return Config(**values), None if pooled == 2 else pooled


def read_hf_transform(folder, config):
    """Copy mean, std and interpolation of preprocessor_config.json into the config.

    The other settings must be what train_clip.py's eval_transform does."""
    S = config.image_size
    try:
        processor = quiet_transformers().CLIPImageProcessor
        theirs = processor.from_pretrained(folder, local_files_only=True)
        sides = {theirs.size.shortest_edge, theirs.crop_size.height, theirs.crop_size.width}
        steps = [theirs.do_resize, theirs.do_center_crop, theirs.do_rescale, theirs.do_normalize]
    except Exception as e:
        die(f"{folder}: preprocessor_config.json cannot be read: {reason(e)}")
    if sides != {S} or theirs.resample not in RESAMPLE.values() or not all(steps):
        die(f"{folder}: expected a preprocessor_config.json that resizes the shorter side to {S}, "
            "bicubic (3) or bilinear (2), crops the centre and normalises")
    config.resize = next(name for name, code in RESAMPLE.items() if code == theirs.resample)
    config.mean, config.std = tuple(theirs.image_mean), tuple(theirs.image_std)


def from_hf(args):
    if not os.path.isdir(args.input):
        die(f"{args.input}: no such folder")
    files = set(os.listdir(args.input))
    config, pooled = read_hf_config(os.path.join(args.input, "config.json"))
    if args.command == "veclip":
        config.resize = "bilinear-unsmoothed"
    elif files & {"preprocessor_config.json", "processor_config.json"}:
        read_hf_transform(args.input, config)
    if not args.tokenizer and not files & {"tokenizer.json", "vocab.json"}:
        # transformers would make an empty tokenizer
        die(f"{args.input} has no tokenizer: name one with --tokenizer")
    state, path = read_folder(args.input, "model", "pytorch_model")
    return ours_from(state, config, HF, path), args.tokenizer or args.input, pooled


def to_hf(args):
    model, tokenizer = load_plain(args.input, "Hugging Face's CLIPModel")
    c, folder = model.config, os.path.normpath(args.output) + ".tmp"
    for name, expected in (("qk_norm", False), ("pre_norm", True), ("patch_bias", False)):
        if getattr(c, name) != expected:
            die(f"{args.input}: its config has {name} = {not expected}, which Hugging Face's "
                "CLIPModel cannot express")
    end = end_id(tokenizer)
    if end == 2:
        die(f"{args.input}: its texts end with id 2, which Hugging Face's CLIPModel reads as the "
            "highest id")
    towers = {}
    for tower, fields in HF_FIELDS.items():
        towers[tower] = {their: getattr(c, ours) for ours, their in fields.items()}
        quick = getattr(c, tower.replace("config", "quick_gelu"))
        towers[tower] |= {"intermediate_size": 4 * towers[tower]["hidden_size"],
                          "hidden_act": "quick_gelu" if quick else "gelu",
                          "projection_dim": c.embed_dim}
    towers["text_config"] |= {"eos_token_id": end, "bos_token_id": None,
                              "pad_token_id": end}  # padding follows the end: it has no effect
    transformers = quiet_transformers()
    hf = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=c.embed_dim))
    state = model.state_dict().items()
    hf.load_state_dict(dict(pair for name, x in state for pair in theirs_of(name, x, HF)))
    hf.save_pretrained(folder)
    end_text = tokenizer.tokenizer.id_to_token(end)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.tokenizer.from_str(tokenizer.json_text), eos_token=end_text,
        pad_token=end_text, model_max_length=c.context_length,
        split_special_tokens=True).save_pretrained(folder)
    if c.resize in RESAMPLE:  # else the folder has none, like VeCLIP's: theirs always antialiases
        S = c.image_size
        transformers.CLIPImageProcessor(
            size={"shortest_edge": S}, crop_size={"height": S, "width": S},
            resample=RESAMPLE[c.resize], image_mean=c.mean,
            image_std=c.std).save_pretrained(folder)
    os.rename(folder, args.output)
    return model
