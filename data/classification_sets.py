"""The sets of eval_zeroshot.py --dataset: images, labels, class names, templates, and what the papers report.

    python -m data.classification_sets --data-root datasets    # which sets are there, how to fetch the others

Nothing is downloaded. A set without an official split is divided 6 : 2 : 2 by a hash of the image's path.
"""
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import sys
from functools import partial

import torch
from PIL import Image

from data.import_files import image_files, passed_over
from train_clip import FORMATS, BadRow, die, new_parser, open_image, open_rows, parse_row, texts_of

# The sets that torchvision reads, by clip-benchmark's names: torchvision's class, and its arguments for the
# train, validation (None: every fifth image of train) and test part
TORCHVISION = {
    "food101": ("Food101", {"split": "train"}, None, {"split": "test"}),
    "cifar10": ("CIFAR10", {"train": True}, None, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, None, {"train": False}),
    "cars": ("StanfordCars", {"split": "train"}, None, {"split": "test"}),
    "fgvc_aircraft": ("FGVCAircraft", {"split": "train"}, {"split": "val"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "val"}, {"split": "test"}),
    "pets": ("OxfordIIITPet", {"split": "trainval"}, None, {"split": "test"}),
    "flowers": ("Flowers102", {"split": "train"}, {"split": "val"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, None, {"split": "test"}),
    "gtsrb": ("GTSRB", {"split": "train"}, None, {"split": "test"}),
    "country211": ("Country211", {"split": "train"}, {"split": "valid"}, {"split": "test"}),
    "svhn": ("SVHN", {"split": "train"}, None, {"split": "test"}),
    "pcam": ("PCAM", {"split": "train"}, {"split": "val"}, {"split": "test"}),  # VTAB's Camelyon
}
# Sets of one folder a class: the folder of the test images under --data-root, that of the training images,
# and the source. Where both folders are the same there is no official split: `part_of` divides the images
FOLDERS = {
    "imagenet1k": ("imagenet/val", "imagenet/train", "image-net.org"),
    "imagenetv2": ("imagenetv2-matched-frequency-format-val", None,
                   "huggingface.co/datasets/vaishaal/ImageNetV2"),
    "caltech101": ("caltech101/101_ObjectCategories", "caltech101/101_ObjectCategories",
                   "torchvision.datasets.Caltech101"),
    "sun397": ("SUN397", "SUN397", "torchvision.datasets.SUN397"),
    "eurosat": ("eurosat/2750", "eurosat/2750", "torchvision.datasets.EuroSAT"),
    "resisc45": ("NWPU-RESISC45", "NWPU-RESISC45", "NWPU-RESISC45.rar"),
}
# Published class name -> folder, where the two differ
CALTECH101 = {"background": "BACKGROUND_Google", "off-center face": "Faces", "centered face": "Faces_easy",
              "leopard": "Leopards", "motorbike": "Motorbikes", "airplane": "airplanes",
              "side of a car": "car_side", "body of a cougar cat": "cougar_body",
              "face of a cougar cat": "cougar_face",
              "head of a  crocodile": "crocodile_head", "head of a flamingo": "flamingo_head",
              "snoopy (cartoon beagle)": "snoopy", "yin and yang symbol": "yin_yang"}
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
           "PermanentCrop", "Residential", "River", "SeaLake"]  # folders, in the order of the published names
SUITES = {
    "laclip15": ["food101", "cifar10", "cifar100", "sun397", "cars", "fgvc_aircraft", "dtd", "pets",
                 "caltech101", "flowers", "stl10", "eurosat", "resisc45", "gtsrb", "country211"],
    "vtab9": ["caltech101", "cifar100", "svhn", "dtd", "pets", "flowers", "eurosat", "resisc45",
              "pcam"],  # VeCLIP's
}
TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prompts", "templates.txt")
MEAN_PER_CLASS = {"fgvc_aircraft", "pets", "caltech101", "flowers"}  # report this metric; the others top-1


def add_set_options(parser):
    """The options of eval_zeroshot.py that say which sets, with which class names and templates."""
    add = parser.add_argument_group("data sets").add_argument
    add("--dataset", nargs="+", required=True, metavar="NAME|imagefolder:DIR|jsonl:FILE",
        help="a folder with one folder for each class; rows with image and label; or, under --data-root: "
        + ", ".join([*SUITES, *FOLDERS, *TORCHVISION]))
    add("--data-root", default="datasets", help="the folder of the sets with a NAME, each as torchvision "
        "unpacks it (default: %(default)s)")
    add("--image-root", help="the folder that the image paths of jsonl: start from")
    add("--label", default="label", metavar="FIELD", help="the class in jsonl: rows (default: %(default)s)")
    add("--train", metavar="imagefolder:DIR|jsonl:FILE", help="the training set of --protocol linear, if "
        "--dataset is no NAME")
    add("--templates", default=TEMPLATES, metavar="FILE|openai|openai7", help="a file with one template a "
        "line (default: data/prompts/templates.txt); openai: the published ones, 80 for ImageNet; openai7: "
        "the seven short ones")
    add("--classes", metavar="FILE|openai", help="a JSON object, folder or label -> class name or names; "
        "openai: the published names (default: these with published templates, else the set's own)")


def input_files(args):
    """The files and folders that the set options name"""
    users_sets = [spec.partition(":")[2] for spec in [*args.dataset, args.train or ""]]
    return [args.classes or "", args.templates, *users_sets]


# === images and labels ======================================================================================

class Part:
    """Images and labels: names[i], read(names[i]) -> PIL image, labels[i] the key of its class. `words`: key
    -> the class name or names."""

    def __init__(self, names, read, labels, words=()):
        self.names, self.read, self.labels, self.words = names, read, labels, dict(words)

    def of(self, keep):
        """keep: a bool for each image -> the Part of those that are kept"""
        names, labels = ([x for x, kept in zip(every, keep) if kept] for every in (self.names, self.labels))
        return Part(names, self.read, labels, self.words)


def part_of(name):
    """train, val or test, 6 : 2 : 2, by a hash of the image's path in the set: the same on every machine"""
    tenth = int.from_bytes(hashlib.sha256(name.replace(os.sep, "/").encode()).digest()) % 10
    return "train" if tenth < 6 else "val" if tenth < 8 else "test"


def read_folder(spec, path, source=""):
    """The images below `path`; links are followed. An image's class is its folder relative to `path`. A last
    part that is the same in all classes (CLASS/images/) is left out."""
    if not os.path.isdir(path):
        die(f"--dataset {spec}: no folder {path}" + (f"; it comes from {source}" if source else ""))
    try:
        files = image_files(path)
    except OSError as e:
        die(f"--dataset {spec}: {e.filename}: {e.strerror}")
    names = [name for name in files if "/" in name]
    tell_left_out([(name, "in no folder") for name in files if "/" not in name], "class")
    if skipped := ", ".join(f"{count} {kind}" for kind, count in passed_over.items() if count):
        print(f"{path}: passed over: {skipped}", file=sys.stderr)
        passed_over.clear()
    labels = [os.path.dirname(name) for name in names]
    while (len(set(labels)) > 1 and all(os.path.dirname(label) for label in labels)
           and len({os.path.basename(label) for label in labels}) == 1):
        labels = [os.path.dirname(label) for label in labels]
    words = {label: re.sub("^[a-z]/", "", label).replace("_", " ").replace("/", " ")  # a/abbey
             for label in labels}
    return Part(names, partial(open_file, path), labels, words)


def open_file(root, name):
    return Image.open(os.path.join(root, name), formats=FORMATS)


def read_rows(path):
    """Yield all rows of a JSONL file, in order. A broken line in an evaluation set is a user's mistake. A row
    without an image gets its place in the file as the image's name, which is reported as unreadable later."""
    with open_rows(path) as f:
        for number, line in enumerate(f, 1):
            try:
                row = parse_row(line)
            except BadRow as e:
                die(f"{path}, line {number}: {e}")
            yield {**row, "image": row.get("image") or f"{path}, line {number}"}


def label_of(value):
    """The class's key: a text, the first text of a list, or a whole number as a text; else None."""
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(int(value)) if math.isfinite(value) and value == int(value) else None
    return value if isinstance(value, str) and value.strip() else None


def tell_left_out(rows, field):
    """One line on stderr about the rows [(name, value of the field)] that an evaluation leaves out."""
    if rows:
        examples = ", ".join(f"{name} ({value!r})" for name, value in rows[:3]) + ", ..." * (len(rows) > 3)
        print(f"{len(rows)} rows have no usable {field}, left out: {examples}", file=sys.stderr)


def read_jsonl(spec, path, args):
    if not args.image_root or not os.path.isdir(args.image_root):
        die(f"--dataset {spec} needs --image-root, the folder that its image paths start from; got "
            f"{args.image_root}")
    rows = [(row["image"], row.get(args.label)) for row in read_rows(path)]
    labelled = [(name, label_of(label), texts_of(label)) for name, label in rows if label_of(label)]
    if not labelled:
        die(f"--dataset {spec}: no row has a text or a whole number in the field {args.label!r}")
    tell_left_out([(name, label) for name, label in rows if not label_of(label)], args.label)
    names, labels, synonyms = zip(*labelled)
    words = {label: texts or label for label, texts in zip(labels, synonyms)}
    return Part(names, partial(open_image, args.image_root), labels, words)


def read_torchvision(spec, root, arguments):
    """torchvision's data set, never downloaded here. A class's key is torchvision's number for it."""
    import torchvision
    kind = TORCHVISION[spec][0]
    try:
        dataset = getattr(torchvision.datasets, kind)(root, **arguments)
        if kind == "PCAM":  # its labels, without opening 32,768 images
            with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as f:
                labels = f["y"][:].ravel()
    except ImportError as e:
        die(f"--dataset {spec}: {e}: pip install scipy")
    except (RuntimeError, OSError) as e:
        arguments = "".join(f", {key}={value!r}" for key, value in arguments.items())
        call = f"torchvision.datasets.{kind}({root!r}{arguments}, download=True)"
        fetch = f'python -c "import torchvision; {call}"'
        if kind == "StanfordCars":
            fetch = "torchvision's link is dead; its documentation of StanfordCars says where the files go"
        die(f"--dataset {spec}: not in --data-root {root}: {e} To fetch it: {fetch}")
    if kind in ("StanfordCars", "GTSRB"):
        labels = [label for _, label in dataset._samples]
    elif kind != "PCAM":
        attributes = ("_labels", "targets", "labels")
        labels = next(getattr(dataset, name) for name in attributes if hasattr(dataset, name))
    words = {f"{i:04}": name.replace("_", " ") for i, name in enumerate(getattr(dataset, "classes", []))}
    labels = [f"{int(label):04}" for label in labels]
    return Part(range(len(dataset)), partial(image_of, dataset), labels, words)


def image_of(dataset, i):
    Image.init()
    Image.ID[:] = FORMATS  # torchvision lets Pillow open whatever it can, EPS by Ghostscript
    return dataset[i][0]


def read_users_set(spec, args):
    kind, _, path = spec.partition(":")
    if kind not in ("imagefolder", "jsonl"):
        names = ", ".join([*SUITES, *FOLDERS, *TORCHVISION])
        die(f"--dataset {spec}: expected imagefolder:DIR, jsonl:FILE or {names}")
    return read_folder(spec, path) if kind == "imagefolder" else read_jsonl(spec, path, args)


def read_set(spec, args, learn=False):
    """NAME, imagefolder:DIR or jsonl:FILE -> {"test": Part}; with `learn` also "train" and "val".

    Of a NAME the set's own parts are used; of the other kinds --train is the training part. Where there is no
    validation part, every fifth training image makes one."""
    if spec in TORCHVISION:
        arguments = dict(zip(("test", "train", "val"), [TORCHVISION[spec][i] for i in (3, 1, 2)]))
        parts = {part: read_torchvision(spec, args.data_root, arguments[part]) for part in arguments
                 if part == "test" or learn and arguments[part]}
    elif spec in FOLDERS:
        test, train, source = FOLDERS[spec]
        parts = {"test": read_folder(spec, os.path.join(args.data_root, test), source)}
        if test == train:
            every = parts["test"]
            parts = {part: every.of([part_of(name) == part for name in every.names])
                     for part in ["test"] + ["train", "val"] * learn}
        elif learn and not train:
            die(f"--dataset {spec} has nothing to train on")
        elif learn:
            parts["train"] = read_folder(spec, os.path.join(args.data_root, train), source)
    else:
        parts = {"test": read_users_set(spec, args)}
        if learn:
            parts["train"] = read_users_set(args.train, args)
    if learn and "val" not in parts:
        fifth = [i % 5 == 0 for i in range(len(parts["train"].names))]
        parts |= {"val": parts["train"].of(fifth), "train": parts["train"].of([not held for held in fifth])}
    for name, part in parts.items():
        if not part.names:
            die(f"--dataset {spec}: its {name} part is empty")
    return parts


def read_sets(args, learn=False):
    """--dataset -> {NAME or spec: what read_set returns}; a suite is its sets"""
    specs = [name for spec in args.dataset for name in SUITES.get(spec, [spec])]
    if learn and not args.train and (users := [spec for spec in specs if ":" in spec]):
        die(f"--protocol linear on {users[0]} needs --train, a set of the same classes")
    return {spec: read_set(spec, args, learn) for spec in specs}


def number_classes(spec, parts):
    """-> the sorted keys of the classes, {part: the number of each image's class [n]}"""
    test = parts["test"]
    keys = sorted({*test.labels, *(test.words if spec in TORCHVISION else ())})
    number_of = {key: i for i, key in enumerate(keys)}
    for part in parts.values():
        if unknown := set(part.labels) - set(keys):
            die(f"--dataset {spec} has no class {min(unknown)!r}, which its training images have")
    return keys, {name: torch.tensor([number_of[label] for label in part.labels])
                  for name, part in parts.items()}


# === class names and templates ==============================================================================

def packaged(package, file):
    """The text of a file in an installed package; the package is not imported."""
    module = importlib.util.find_spec(package)
    if module is None:
        die("the published class names and templates come from packages: pip install clip-benchmark "
            "open_clip_torch")
    with open(os.path.join(module.submodule_search_locations[0], file), encoding="utf-8") as f:
        return f.read()


def published_names(spec, part):
    """OpenAI's class names, from clip-benchmark -> {key: name}. The key is the synset or number in ImageNet,
    the number in torchvision's sets, the folder in Caltech-101 and EuroSAT; never the place in a sort."""
    names = json.loads(packaged("clip_benchmark", "datasets/en_classnames.json"))
    imagenet = names["imagenet1k"]
    synsets = packaged("timm", "data/_info/imagenet_synsets.txt").split()  # timm comes with open_clip
    if set(part.labels) <= set(synsets):
        return dict(zip(synsets, imagenet))
    if spec in ("imagenet1k", "imagenetv2"):
        numbers = (key for key in part.labels if key.isdecimal() and int(key) < len(imagenet))
        return {key: imagenet[int(key)] for key in numbers}
    if spec == "caltech101":
        return {CALTECH101.get(name, name.replace(" ", "_")): name for name in names[spec]}
    if spec == "eurosat":
        return dict(zip(EUROSAT, names[spec]))
    if spec not in names:
        return part.words  # the published names are those of the folders or of torchvision
    if len(names[spec]) <= max(map(int, part.labels)):
        classes = max(map(int, part.labels)) + 1
        die(f"--dataset {spec}: {classes} classes, but {len(names[spec])} published names")
    return {f"{i:04}": name for i, name in enumerate(names[spec])}


def read_templates(path, spec):
    """-> templates with {} in place of the class name: a file's lines, or the published ones"""
    if path == "openai7":  # LaCLIP's release has these for models trained on CC3M, CC12M and RedCaps
        try:
            from open_clip import SIMPLE_IMAGENET_TEMPLATES
        except ImportError:
            die("--templates openai7: pip install open_clip_torch")
        return [template("{}") for template in SIMPLE_IMAGENET_TEMPLATES]
    if path == "openai":
        sets = json.loads(packaged("clip_benchmark", "datasets/en_zeroshot_classification_templates.json"))
        return [template.replace("{c}", "{}") for template in sets.get(spec, sets["imagenet1k"])]
    try:
        with io.TextIOWrapper(open_rows(path), "utf-8-sig") as f:
            templates = [line.rstrip("\n") for line in f if line.strip()]
    except (OSError, ValueError) as e:
        die(f"--templates {path}: {e}")
    for template in templates:
        if "{}" not in template:
            die(f"--templates {path}: no {{}} in {template!r}")
    if not templates:
        die(f"--templates {path} is empty")
    return templates


def class_names(spec, part, keys, args):
    """-> for each key the list of the class's names: from --classes, the published ones, or the set's own"""
    words = part.words
    if args.classes == "openai" or not args.classes and args.templates in ("openai", "openai7"):
        words = published_names(spec, part)
    elif args.classes:
        try:
            with io.TextIOWrapper(open_rows(args.classes), "utf-8-sig") as f:
                words = json.load(f)
        except (OSError, ValueError) as e:
            die(f"--classes {args.classes}: {e}")
    elif spec not in TORCHVISION and all(re.fullmatch(r"\d+|n\d{8}|[0-9a-f-]{16,}", key) for key in keys):
        print(f"note: the class names of {spec} look like ids ({keys[0]!r}): --classes FILE or openai gives "
              "names", file=sys.stderr)
    missing = [key for key in keys if not isinstance(words, dict) or not texts_of(words.get(key))]
    if missing:
        die(f"--dataset {spec}: no name for {len(missing)} classes, {missing[0]!r} the first: --classes FILE "
            "or openai")
    return [texts_of(words[key]) for key in keys]


# === the results ============================================================================================

def print_table(results):
    """Print the metrics in per cent. A star marks what the papers report of a set; the last lines are the
    means of these over the sets, without ImageNet."""
    columns = ["top1", "top5", "top10", "mean_per_class", "chance", "largest_class", "fewshot_mean",
               "fewshot_ci95", "linear_top1", "linear_mean_per_class"]
    columns = [column for column in columns if any(column in metrics for metrics in results.values())]
    width = max(len("mean of *"), *map(len, results))
    header = "".join(f"{column[:15]:>16}" for column in columns)
    print(f"{'%':{width}}{header}{'images':>9}{'classes':>9}")
    for spec, metrics in results.items():
        starred = {metrics["reported"], "linear_" + metrics["reported"], "fewshot_mean"}
        cells = ""
        for column in columns:
            cell = f"{100 * metrics[column]:.2f}" if column in metrics else "-"
            cells += f"{cell + ('*' if column in starred and column in metrics else ' '):>16}"
        print(f"{spec:{width}}{cells}{metrics['images']:9d}{metrics['classes']:9d}")
    sets = [metrics for spec, metrics in results.items() if not spec.startswith("imagenet")]
    for protocol, key in (("zero-shot", "{}"), ("few-shot", "fewshot_mean"), ("linear", "linear_{}")):
        reported = [metrics.get(key.format(metrics["reported"])) for metrics in sets]
        if len(sets) > 1 and None not in reported:
            print(f"mean of * over {len(sets)} sets, {protocol}: {100 * sum(reported) / len(reported):.2f}")


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--data-root", default="datasets", help="default: %(default)s")
    args = parser.parse_args(argv)
    for spec in sorted([*FOLDERS, *TORCHVISION]):
        try:
            test = read_set(spec, args)["test"]
            print(f"{spec:16}{len(test.names):8} test images of {len(set(test.labels))} classes")
        except SystemExit:  # die has printed the reason
            print(f"{spec:16}       -")


if __name__ == "__main__":
    main()
