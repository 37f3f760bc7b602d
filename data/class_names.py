"""Class names and templates of eval_zeroshot.py: published ones or the user's; not a command."""
import importlib.util
import json
import os
import re
from collections import defaultdict

from data.common import die
from data.evaluation import first_few, label_of, tell
from data.texts import texts_of

TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prompts", "templates.txt")
# Published class name -> folder, where the two differ
CALTECH101 = {"background": "BACKGROUND_Google", "off-center face": "Faces",
              "centered face": "Faces_easy", "leopard": "Leopards", "motorbike": "Motorbikes",
              "airplane": "airplanes", "side of a car": "car_side",
              "body of a cougar cat": "cougar_body", "face of a cougar cat": "cougar_face",
              "head of a  crocodile": "crocodile_head", "head of a flamingo": "flamingo_head",
              "snoopy (cartoon beagle)": "snoopy", "yin and yang symbol": "yin_yang"}
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
           "PermanentCrop", "Residential", "River", "SeaLake"]  # in the order of the names


def packaged(package, file):
    """The text of a file in an installed package; the package is not imported."""
    module = importlib.util.find_spec(package)
    if module is None:
        die("the published class names and templates come from packages: pip install "
            "clip-benchmark open_clip_torch")
    folder = module.submodule_search_locations[0]
    with open(os.path.join(folder, file), encoding="utf-8") as f:
        return f.read()


def published_names(spec, part):
    """OpenAI's class names, from clip-benchmark -> {key: name}. The key is the synset or number in
    ImageNet, the number in torchvision's sets, the folder in Caltech-101 and EuroSAT; never the
    place in a sort, in which folder 10 comes before folder 2."""
    names = json.loads(packaged("clip_benchmark", "datasets/en_classnames.json"))
    imagenet, labels = names["imagenet1k"], set(part.labels)
    synsets = packaged("timm", "data/_info/imagenet_synsets.txt").split()  # open_clip needs timm
    if labels <= set(synsets):
        return dict(zip(synsets, imagenet))
    if spec in ("imagenet1k", "imagenetv2"):
        folders = {int(label): label for label in labels if label.isdecimal()}
        return {folders.get(i, str(i)): name for i, name in enumerate(imagenet)}
    if spec == "caltech101":
        return {CALTECH101.get(name, name.replace(" ", "_")): name for name in names[spec]}
    if spec == "eurosat":
        return dict(zip(EUROSAT, names[spec]))
    if spec not in names:
        return part.words  # the published names are those of the folders or of torchvision
    classes = max(map(int, labels)) + 1
    if len(names[spec]) < classes:
        die(f"--dataset {spec}: {classes} classes, but {len(names[spec])} published names")
    return {f"{i:04}": name for i, name in enumerate(names[spec])}


def missing_classes(spec, part):
    """{key: name} of the published classes that have no folder; {} where no package knows them"""
    if not all(map(importlib.util.find_spec, ("clip_benchmark", "timm"))):
        return {}
    published = published_names(spec, part)
    complete = len(published) <= len(part.words)
    return {} if complete else {key: published[key] for key in published.keys() - part.words}


def class_names(spec, part, keys, args):
    """-> for each key the list of the class's names: from --classes, the published ones, or the
    set's own"""
    words = part.words
    if args.classes == "openai" or not args.classes and args.templates in ("openai", "openai7"):
        words = published_names(spec, part)
    elif args.classes:
        words = read_classes(args.classes)
        if strange := sorted({label_of(key) for key in words} - {label_of(key) for key in keys}):
            tell(f"{spec}: {len(strange)} classes of --classes are not in the set, left out: "
                 f"{first_few(strange)}")
    elif all(re.fullmatch(r"\d+|n\d{8}|[0-9a-f-]{16,}", str(words.get(key, key))) for key in keys):
        tell(f"note: the class names of {spec} look like ids ({keys[0]!r}): --classes FILE or "
             "openai gives names")
    names = [texts_of(words.get(key)) for key in keys]
    if missing := [key for key, of_class in zip(keys, names) if not of_class]:
        die(f"--dataset {spec}: no name for {len(missing)} classes, {missing[0]!r} the first: "
            "--classes FILE or openai")
    return names


def read_classes(path):
    """--classes FILE -> {key: name or names}, also by `label_of`'s key"""
    try:
        with open(path, encoding="utf-8-sig") as f:
            words = json.load(f)
    except (OSError, ValueError) as e:
        die(f"--classes {path}: {e}")
    if not isinstance(words, dict):
        die(f"--classes {path}: expected a JSON object, folder or label -> name")
    words = {key: name for key, name in words.items() if key.strip()}
    return {**{label_of(key): name for key, name in words.items()}, **words}


def read_templates(path, spec):
    """-> templates with {} in place of the class name: a file's lines, or the published ones"""
    if path == "openai7":  # LaCLIP's release has these for models of CC3M, CC12M and RedCaps
        try:
            from open_clip import SIMPLE_IMAGENET_TEMPLATES
        except ImportError:
            die("--templates openai7: pip install open_clip_torch")
        return [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES]
    if path == "openai":
        file = "datasets/en_zeroshot_classification_templates.json"
        sets = json.loads(packaged("clip_benchmark", file))
        return [template.replace("{c}", "{}") for template in sets.get(spec, sets["imagenet1k"])]
    try:
        with open(path, encoding="utf-8-sig") as f:
            templates = [line.rstrip("\n") for line in f if line.strip()]
    except (OSError, ValueError) as e:
        die(f"--templates {path}: {e}")
    for template in templates:
        if "{}" not in template:
            die(f"--templates {path}: no {{}} in {template!r}")
    if not templates:
        die(f"--templates {path} is empty")
    return templates


def tell_same_names(spec, keys, names):
    """Name the classes whose names are the same but for blanks, underscores and case: most
    tokenizers make the same ids of them, so no model can tell them apart."""
    groups = defaultdict(list)
    for key, synonyms in zip(keys, names):
        groups[frozenset(re.sub(r"[\s_]", "", name).casefold() for name in synonyms)].append(key)
    alike = [" = ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    if alike:
        tell(f"{spec}: names of classes that differ in blanks or case alone, or not at all: "
             f"{first_few(alike)}")
