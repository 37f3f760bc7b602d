"""The papers' classification sets by name, their class names and templates: what eval_zeroshot.py --dataset reads.

    python data/classification_sets.py --data-root datasets      # which sets are there, and where the others come from

Nothing is downloaded. A set without an official split is divided 6 : 2 : 2 by a hash of the image's path.
"""
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
from functools import partial

from PIL import Image

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from data.features import label_of, read_rows, tell_left_out  # noqa: E402
from data.import_captions import image_files, passed_over  # noqa: E402
from train_clip import FORMATS, die, new_parser, open_image, open_rows, texts_of  # noqa: E402

# clip-benchmark's names. What torchvision reads: its class, and its arguments for train, validation (None: every fifth
# of train) and test
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
# Folders of one folder a class under --data-root: of the test images, of the training images, and where they come from.
# Where both are the same there is no official split: an image belongs to train, validation or test by its path, `part_of`
FOLDERS = {
    "imagenet1k": ("imagenet/val", "imagenet/train", "image-net.org"),
    "imagenetv2": ("imagenetv2-matched-frequency-format-val", None, "huggingface.co/datasets/vaishaal/ImageNetV2"),
    "caltech101": ("caltech101/101_ObjectCategories", "caltech101/101_ObjectCategories", "torchvision.datasets.Caltech101"),
    "sun397": ("SUN397", "SUN397", "torchvision.datasets.SUN397"),
    "eurosat": ("eurosat/2750", "eurosat/2750", "torchvision.datasets.EuroSAT"),
    "resisc45": ("NWPU-RESISC45", "NWPU-RESISC45", "NWPU-RESISC45.rar"),
}
# Their folders, where the published name is another one
CALTECH101 = {"background": "BACKGROUND_Google", "off-center face": "Faces", "centered face": "Faces_easy", "leopard": "Leopards",
              "motorbike": "Motorbikes", "airplane": "airplanes", "side of a car": "car_side", "body of a cougar cat": "cougar_body",
              "face of a cougar cat": "cougar_face", "head of a  crocodile": "crocodile_head",
              "head of a flamingo": "flamingo_head", "snoopy (cartoon beagle)": "snoopy", "yin and yang symbol": "yin_yang"}
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential",
           "River", "SeaLake"]  # in the order of their published names
SUITES = {
    "laclip15": ["food101", "cifar10", "cifar100", "sun397", "cars", "fgvc_aircraft", "dtd", "pets", "caltech101", "flowers",
                 "stl10", "eurosat", "resisc45", "gtsrb", "country211"],
    "vtab9": ["caltech101", "cifar100", "svhn", "dtd", "pets", "flowers", "eurosat", "resisc45", "pcam"],  # VeCLIP's
}


# === images and labels ================================================================================================

class Part:
    """Images and labels: names[i], read(names[i]) -> PIL image, labels[i] the key of its class. `words`: key -> name or names."""

    def __init__(self, names, read, labels, words=()):
        self.names, self.read, self.labels, self.words = names, read, labels, dict(words)

    def of(self, keep):
        return Part([n for n, k in zip(self.names, keep) if k], self.read, [y for y, k in zip(self.labels, keep) if k], self.words)


def part_of(name):
    """train, val or test, 6 : 2 : 2, by the image's path inside the set: the same on every machine."""
    tenth = int.from_bytes(hashlib.sha256(name.replace(os.sep, "/").encode()).digest()) % 10
    return "train" if tenth < 6 else "val" if tenth < 8 else "test"


def read_folder(spec, path, source=""):
    """The images in `path`, links followed; the class of one is the folder that holds it, relative to `path`, without a last
    part that is the same for all."""
    if not os.path.isdir(path):
        die(f"--dataset {spec}: no folder {path}" + (f"; it comes from {source}" if source else ""))
    names, above = [], []
    try:
        files = image_files(path)
    except OSError as e:
        die(f"--dataset {spec}: {e.filename}: {e.strerror}")
    for name in files:
        (names if "/" in name else above).append(name)
    tell_left_out([(name, "in no folder") for name in above], "class")
    if over := {what: count for what, count in passed_over.items() if count}:
        print(f"{path}: passed over: " + ", ".join(f"{count} {what}" for what, count in over.items()), file=sys.stderr)
        passed_over.clear()
    labels = [os.path.dirname(name) for name in names]
    while len(set(labels)) > 1 and all(map(os.path.dirname, labels)) and len(set(map(os.path.basename, labels))) == 1:
        labels = [os.path.dirname(label) for label in labels]  # CLASS/images/x.png, the same folder in every class
    words = {label: re.sub("^[a-z]/", "", label).replace("_", " ").replace("/", " ") for label in labels}  # a/abbey
    return Part(names, partial(open_file, path), labels, words)


def open_file(root, name):
    return Image.open(os.path.join(root, name), formats=FORMATS)


def read_jsonl(spec, path, args):
    if not args.image_root or not os.path.isdir(args.image_root):
        die(f"--dataset {spec} needs --image-root, the folder that its image paths start from; got {args.image_root}")
    rows = [(row["image"], row.get(args.label)) for row in read_rows(path)]
    found = [(name, label_of(label), texts_of(label)) for name, label in rows if label_of(label)]
    if not found:
        die(f"--dataset {spec}: no row has a text or a whole number in the field {args.label!r}")
    tell_left_out([(name, label) for name, label in rows if not label_of(label)], args.label)
    names, labels, synonyms = zip(*found)
    return Part(names, partial(open_image, args.image_root), labels, {y: words or y for y, words in zip(labels, synonyms)})


def read_torchvision(spec, root, arguments):
    """torchvision's data set, which is never downloaded here; a class's key is its number there."""
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
        fetch = f"python -c \"import torchvision; torchvision.datasets.{kind}({root!r}{arguments}, download=True)\""
        if kind == "StanfordCars":
            fetch = "torchvision's own link to it is dead, its documentation of StanfordCars says where to put which files"
        die(f"--dataset {spec}: not in --data-root {root}: {e} To fetch it: {fetch}")
    if kind in ("StanfordCars", "GTSRB"):
        labels = [label for _, label in dataset._samples]
    elif kind != "PCAM":
        labels = next(getattr(dataset, name) for name in ("_labels", "targets", "labels") if hasattr(dataset, name))
    words = {f"{i:04}": name.replace("_", " ") for i, name in enumerate(getattr(dataset, "classes", []))}
    return Part(range(len(dataset)), partial(image_of, dataset), [f"{int(label):04}" for label in labels], words)


def image_of(dataset, i):
    Image.init()
    Image.ID[:] = FORMATS  # torchvision lets Pillow open whatever it can, EPS by Ghostscript
    return dataset[i][0]


def read_own(spec, args):
    kind, _, path = spec.partition(":")
    if kind not in ("imagefolder", "jsonl"):
        die(f"--dataset {spec}: expected imagefolder:DIR, jsonl:FILE or {', '.join([*SUITES, *FOLDERS, *TORCHVISION])}")
    return read_folder(spec, path) if kind == "imagefolder" else read_jsonl(spec, path, args)


def read_set(spec, args, learn=False):
    """NAME, imagefolder:DIR or jsonl:FILE -> {"test": Part}, and to learn from also "train" and "val": --train's for the
    latter two kinds. Without an official validation part that is every fifth image to learn from."""
    if spec in TORCHVISION:
        splits = dict(zip(("train", "val", "test"), TORCHVISION[spec][1:]))
        parts = {part: read_torchvision(spec, args.data_root, arguments) for part, arguments in splits.items()
                 if part == "test" or learn and arguments}
    elif spec in FOLDERS:
        test, train, source = FOLDERS[spec]
        read = lambda folder: read_folder(spec, os.path.join(args.data_root, folder), source)
        parts = {"test": read(test)}
        if test == train:
            every = parts["test"]
            parts = {part: every.of([part_of(name) == part for name in every.names]) for part in ("train", "val", "test")}
        elif learn:
            parts["train"] = read(train) if train else die(f"--dataset {spec} has nothing to train on")
    else:
        parts = {"test": read_own(spec, args)} | ({"train": read_own(args.train, args)} if learn else {})
    if learn and "val" not in parts:
        fifth = [i % 5 == 0 for i in range(len(parts["train"].names))]
        parts |= {"val": parts["train"].of(fifth), "train": parts["train"].of([not held for held in fifth])}
    for part in ["test"] + ["train", "val"] * learn:
        if not parts[part].names:
            die(f"--dataset {spec}: its {part} part is empty")
    return parts


# === class names and templates ========================================================================================

def packaged(package, file):
    """Text of a file inside an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None:
        die("the published class names and templates come from two packages: pip install clip-benchmark open_clip_torch")
    with open(os.path.join(found.submodule_search_locations[0], file), encoding="utf-8") as f:
        return f.read()


def published_names(spec, part):
    """OpenAI's class names as clip-benchmark has them -> {key: name}, by what a class is called, never by its place in a sort:
    ImageNet's by synset or number, torchvision's sets by number, Caltech-101 and EuroSAT by folder."""
    names = json.loads(packaged("clip_benchmark", "datasets/en_classnames.json"))
    imagenet = names["imagenet1k"]
    synsets = packaged("timm", "data/_info/imagenet_synsets.txt").split()  # timm comes with open_clip
    if set(part.labels) <= set(synsets):
        return dict(zip(synsets, imagenet))
    if spec in ("imagenet1k", "imagenetv2"):
        return {key: imagenet[int(key)] for key in part.labels if key.isdecimal() and int(key) < len(imagenet)}
    if spec == "caltech101":
        return {CALTECH101.get(name, name.replace(" ", "_")): name for name in names[spec]}
    if spec == "eurosat":
        return dict(zip(EUROSAT, names[spec]))
    if spec not in names:
        return part.words  # published are the folders' or torchvision's own
    if len(names[spec]) <= max(map(int, part.labels)):
        die(f"--dataset {spec}: {max(map(int, part.labels)) + 1} classes, published are the names of {len(names[spec])}")
    return {f"{i:04}": name for i, name in enumerate(names[spec])}


def read_templates(path, spec):
    """With {} where the class name goes: a file's lines, or the published ones."""
    if path == "openai7":  # LaCLIP's release, for models trained on CC3M, CC12M and RedCaps
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
    return templates or die(f"--templates {path} is empty")


def class_names(spec, part, keys, args):
    """The words for each class, one or several: --classes', or the published ones, or the set's own."""
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
        print(f"note: the class names of {spec} look like ids ({keys[0]!r}): --classes FILE or openai gives names",
              file=sys.stderr)
    missing = [key for key in keys if not isinstance(words, dict) or not texts_of(words.get(key))]
    if missing:
        die(f"--dataset {spec}: no name for {len(missing)} classes, {missing[0]!r} the first: --classes FILE or openai")
    return [texts_of(words[key]) for key in keys]


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--data-root", default="datasets", help="where the sets lie (default: %(default)s)")
    args = parser.parse_args(argv)
    for spec in sorted([*FOLDERS, *TORCHVISION]):
        try:
            test = read_set(spec, args)["test"]
            print(f"{spec:16}{len(test.names):8} test images of {len(set(test.labels))} classes")
        except SystemExit:  # which has said why
            print(f"{spec:16}       -")


if __name__ == "__main__":
    main()
