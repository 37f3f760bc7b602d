"""The sets of eval_zeroshot.py --dataset: images, labels, and what the papers report of each.

    python -m data.classification_sets --data-root datasets    # which are there, or where to get

Nothing is downloaded. A set without an official split is divided 6 : 2 : 2 by a hash of the image's
path.
"""
import hashlib
import os
import re
from functools import partial

import torch
from PIL import Image

from data.class_names import TEMPLATES, missing_classes
from data.common import die, in_one_line, new_parser, print_table
from data.evaluation import first_few, image_rows, label_of, tell, tell_left_out, tell_spellings
from data.import_files import examples, image_files, is_hidden, passed_over
from data.texts import texts_of
from train_clip import open_image

# The sets that torchvision reads, by clip-benchmark's names: torchvision's class, its arguments for
# the train, validation (None: every fifth image of train) and test part
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
# Sets of one folder a class: the folder of the test images under --data-root, that of the training
# images, the source, the number of classes. Where both folders are the same there is no official
# split: `part_of` divides the images
FOLDERS = {
    "imagenet1k": ("imagenet/val", "imagenet/train", "image-net.org", 1000),
    "imagenetv2": ("imagenetv2-matched-frequency-format-val", None,
                   "huggingface.co/datasets/vaishaal/ImageNetV2", 1000),
    "caltech101": ("caltech101/101_ObjectCategories", "caltech101/101_ObjectCategories",
                   "torchvision.datasets.Caltech101", 101),
    "sun397": ("SUN397", "SUN397", "torchvision.datasets.SUN397", 397),
    "eurosat": ("eurosat/2750", "eurosat/2750", "torchvision.datasets.EuroSAT", 10),
    "resisc45": ("NWPU-RESISC45", "NWPU-RESISC45", "NWPU-RESISC45.rar", 45),
}
SUITES = {
    "laclip15": ["food101", "cifar10", "cifar100", "sun397", "cars", "fgvc_aircraft", "dtd", "pets",
                 "caltech101", "flowers", "stl10", "eurosat", "resisc45", "gtsrb", "country211"],
    "vtab9": ["caltech101", "cifar100", "svhn", "dtd", "pets", "flowers", "eurosat", "resisc45",
              "pcam"],  # VeCLIP's
}
NAMES = [*SUITES, *FOLDERS, *TORCHVISION]
MEAN_PER_CLASS = {"fgvc_aircraft", "pets", "caltech101", "flowers"}  # report this; the others top-1


def add_set_options(parser):
    """The options of eval_zeroshot.py that say which sets, with which class names and templates."""
    add = parser.add_argument_group("data sets").add_argument
    add("--dataset", nargs="+", required=True, metavar="NAME|imagefolder:DIR|jsonl:FILE",
        help="a folder with one folder for each class; rows with image and label; or, under "
        "--data-root: " + ", ".join(NAMES))
    add("--data-root", default="datasets", help="the folder of the sets with a NAME, each as "
        "torchvision unpacks it (default: %(default)s)")
    add("--image-root", help="the folder that the image paths of jsonl: start from")
    add("--label", default="label", metavar="FIELD",
        help="the class in jsonl: rows (default: %(default)s)")
    add("--train", metavar="imagefolder:DIR|jsonl:FILE",
        help="the training set of --protocol linear, if --dataset is no NAME")
    add("--templates", default=TEMPLATES, metavar="FILE|openai|openai7", help="a file with one "
        "template a line (default: data/prompts/templates.txt); openai: the published ones, 80 for "
        "ImageNet; openai7: the seven short ones")
    add("--classes", metavar="FILE|openai", help="a JSON object, folder or label -> class name or "
        "names; openai: the published names (default: these with published templates, else the "
        "set's own)")


def input_files(args):
    """The files and folders that the set options name"""
    users_sets = [spec.partition(":")[2] for spec in [*args.dataset, args.train or ""]]
    return [args.classes or "", args.templates, *users_sets]


# === images and labels ============================================================================

class Part:
    """Images and labels: names[i], read(names[i]) -> PIL image, labels[i] the key of its class.
    `words`: key -> the class's name or names. A class without an image has words, too."""

    def __init__(self, names, read, labels, words):
        self.names, self.read, self.labels, self.words = names, read, labels, words

    def of(self, keep):
        """keep: a bool for each image -> the Part of those that are kept"""
        names = [name for name, kept in zip(self.names, keep) if kept]
        labels = [label for label, kept in zip(self.labels, keep) if kept]
        return Part(names, self.read, labels, self.words)


def read_folder(spec, path, source=""):
    """The images below `path`; links are followed. An image's class is its folder relative to
    `path`. A last part that is the same in all classes (CLASS/images/) is left out."""
    if not os.path.isdir(path):
        die(f"--dataset {spec}: no folder {path}" + (f"; it comes from {source}" if source else ""))
    try:
        files = image_files(path)
    except OSError as e:
        die(f"--dataset {spec}: {e.filename}: {e.strerror}")
    tell_left_out([(name, "in no folder") for name in files if "/" not in name], "class")
    if skipped := [f"{count} {kind} ({', '.join(examples[kind])})"
                   for kind, count in passed_over.items()]:
        tell(f"{path}: passed over: {', '.join(skipped)}")
        passed_over.clear()
        examples.clear()
    names = [name for name in files if "/" in name]
    labels = [os.path.dirname(name) for name in names]
    parts = {os.path.dirname(label) for label in labels}
    if len(parts) > 1 and parts <= {"train", "val", "validation", "test"}:
        die(f"--dataset {spec} has the parts {', '.join(sorted(parts))}: name one, as in DIR/val")
    while (len(classes := set(labels)) > 1 and all("/" in label for label in classes)
           and len({os.path.basename(label) for label in classes}) == 1):
        labels = [os.path.dirname(label) for label in labels]
    words = {label: re.sub("^[a-z]/", "", label).replace("_", " ").replace("/", " ")  # a/abbey
             for label in [*labels, *folders_without_images(path, labels)]}
    return Part(names, partial(open_image, path), labels, words)


def folders_without_images(root, labels):
    """Classes without an image: folders below `root` that hold no class and lie in none"""
    classes, parents = set(labels), set()
    for label in classes:
        above = label.split("/")[:-1]
        parents |= {"/".join(above[:depth]) for depth in range(len(above) + 1)}  # "": the root
    for parent in sorted(parents - classes):
        for entry in os.scandir(os.path.join(root, parent)):
            folder = f"{parent}/{entry.name}".lstrip("/")
            if entry.is_dir() and not is_hidden(entry.name) and folder not in classes | parents:
                yield folder


def read_jsonl(spec, path, args):
    if not args.image_root or not os.path.isdir(args.image_root):
        die(f"--dataset {spec} needs --image-root, the folder that its image paths start from; got "
            f"{args.image_root}")
    names, labels, words, unlabelled, values = [], [], {}, [], []
    for row in image_rows(path):
        value = row.get(args.label)
        label = label_of(value)
        if label is None:
            unlabelled.append((row["image"], value))
            continue
        names.append(row["image"])
        labels.append(label)
        values.append(value)
        words[label] = [text.strip() for text in texts_of(value)] or label
    if not names:
        die(f"--dataset {spec}: no row has a text or a whole number in the field {args.label!r}")
    tell_left_out(unlabelled, args.label)
    tell_spellings(spec, values)
    return Part(names, partial(open_image, args.image_root), labels, words)


def read_torchvision(spec, root, arguments):
    """torchvision's data set, never downloaded here. A class's key is torchvision's number."""
    import torchvision
    kind = TORCHVISION[spec][0]
    try:
        dataset = getattr(torchvision.datasets, kind)(root, **arguments)
        if kind == "PCAM":  # its labels, without opening 32,768 images
            file = dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]
            with dataset.h5py.File(file) as f:
                labels = f["y"][:].ravel()
    except ImportError as e:
        die(f"--dataset {spec}: {e}: pip install scipy")
    except (RuntimeError, OSError) as e:
        arguments = "".join(f", {key}={value!r}" for key, value in arguments.items())
        call = f"torchvision.datasets.{kind}({root!r}{arguments}, download=True)"
        fetch = f'python -c "import torchvision; {call}"'
        if kind == "StanfordCars":
            fetch = ("torchvision's link is dead; its documentation of StanfordCars says where the "
                     "files go")
        die(f"--dataset {spec}: not in --data-root {root}: {e} To fetch it: {fetch}")
    if kind in ("StanfordCars", "GTSRB"):
        labels = [label for _, label in dataset._samples]
    elif kind != "PCAM":
        attributes = ("_labels", "targets", "labels")
        labels = next(getattr(dataset, name) for name in attributes if hasattr(dataset, name))
    classes = getattr(dataset, "classes", [])
    words = {f"{i:04}": name.replace("_", " ") for i, name in enumerate(classes)}
    labels = [f"{int(label):04}" for label in labels]
    return Part(range(len(dataset)), partial(image_of, dataset), labels, words)


def image_of(dataset, i):
    Image.init()
    Image.ID[:] = [kind for kind in Image.ID if kind != "EPS"]  # it would run Ghostscript
    return dataset[i][0]


# === parts and classes ============================================================================

def part_of(name):
    """train, val or test, 6 : 2 : 2, by a hash of the image's path: the same on every machine"""
    tenth = int.from_bytes(hashlib.sha256(name.replace(os.sep, "/").encode()).digest()) % 10
    return "train" if tenth < 6 else "val" if tenth < 8 else "test"


def read_set(spec, args, learn=False):
    """NAME, imagefolder:DIR or jsonl:FILE -> {"test": Part}; with `learn` also "train" and "val".

    Of a NAME the set's own parts are used; of the other kinds --train is the training part. Where
    there is no validation part, every fifth training image makes one."""
    if spec in TORCHVISION:
        _, train, val, test = TORCHVISION[spec]
        wanted = {"test": test} | ({"train": train, "val": val} if learn else {})
        parts = {part: read_torchvision(spec, args.data_root, arguments)
                 for part, arguments in wanted.items() if arguments}
    elif spec in FOLDERS:
        parts = read_named_folders(spec, args.data_root, learn)
    else:
        parts = {"test": read_users_set(spec, args)}
        if learn:
            parts["train"] = read_users_set(args.train, args)
    if learn and "val" not in parts:
        train = parts["train"]
        fifth = [i % 5 == 0 for i in range(len(train.names))]
        parts |= {"val": train.of(fifth), "train": train.of([not held for held in fifth])}
    for name, part in parts.items():
        if not part.names:
            die(f"--dataset {spec}: its {name} part is empty")
    return parts


def read_named_folders(spec, data_root, learn):
    test_folder, train_folder, source, _ = FOLDERS[spec]
    test = read_folder(spec, os.path.join(data_root, test_folder), source)
    if test.names:
        test.words |= missing_classes(spec, test)
    if train_folder == test_folder:  # no official split
        return {part: test.of([part_of(name) == part for name in test.names])
                for part in ["test"] + ["train", "val"] * learn}
    if not learn:
        return {"test": test}
    if not train_folder:
        die(f"--dataset {spec} has nothing to train on")
    return {"test": test,
            "train": read_folder(spec, os.path.join(data_root, train_folder), source)}


def read_users_set(spec, args):
    kind, _, path = spec.partition(":")
    if kind not in ("imagefolder", "jsonl"):
        die(f"--dataset {spec}: expected imagefolder:DIR, jsonl:FILE or {', '.join(NAMES)}")
    return read_folder(spec, path) if kind == "imagefolder" else read_jsonl(spec, path, args)


def read_sets(args, learn=False):
    """--dataset -> {NAME or spec: what read_set returns}; a suite is its sets"""
    specs = [name for spec in args.dataset for name in SUITES.get(spec, [spec])]
    if learn and not args.train and (users := [spec for spec in specs if ":" in spec]):
        die(f"--protocol linear on {users[0]} needs --train, a set of the same classes")
    return {spec: read_set(spec, args, learn) for spec in specs}


def number_classes(spec, parts):
    """-> the sorted keys of the set's classes, {part: the number of each image's class [n]}"""
    test = parts["test"]
    keys = sorted({*test.labels, *test.words})
    if spec in FOLDERS and len(keys) < FOLDERS[spec][3]:
        die(f"--dataset {spec}: {len(keys)} of its {FOLDERS[spec][3]} classes are there. Fetch it "
            "again, or score what is there: --dataset imagefolder:DIR")
    if empty := sorted(set(keys) - set(test.labels)):
        tell(f"{spec}: {len(empty)} of {len(keys)} classes have no image to test, which counts as "
             f"wrong: {first_few([with_name(key, test) for key in empty])}")
    number_of = {key: i for i, key in enumerate(keys)}
    for part in parts.values():
        if unknown := set(part.labels) - set(keys):
            die(f"--dataset {spec} has no class {min(unknown)!r}, which its training images have")
    return keys, {name: torch.tensor([number_of[label] for label in part.labels])
                  for name, part in parts.items()}


def with_name(key, part):
    name = (texts_of(part.words.get(key)) or [key])[0]
    return key if name == key else f"{key} ({name})"


def tell_small_classes(spec, keys, targets, images):
    count = targets.bincount(minlength=len(keys)).tolist()
    if small := [key for key, n in zip(keys, count) if n < images]:
        tell(f"{spec}: {len(small)} of {len(keys)} classes have fewer than {images} images and are "
             f"in no episode: {first_few(small)}")


def tell_lacking_classes(spec, keys, train_targets):
    count = train_targets.cpu().bincount(minlength=len(keys)).tolist()
    if lacking := [key for key, n in zip(keys, count) if n == 0]:
        tell(f"{spec}: the training part has no image of {len(lacking)} of {len(keys)} classes, "
             f"which the linear probe never answers: {first_few(lacking)}")


# === the results ==================================================================================

COLUMNS = ["top1", "top5", "top10", "mean_per_class", "chance", "largest_class", "fewshot_mean",
           "fewshot_ci95", "linear_top1", "linear_mean_per_class"]


def print_results(results):
    """Print the metrics in per cent. A star marks what the papers report of a set; the last lines
    are the means of these over the sets, without ImageNet."""
    columns = [column for column in COLUMNS if any(column in m for m in results.values())]
    rows = []
    for spec, metrics in results.items():
        starred = {metrics["reported"], "linear_" + metrics["reported"], "fewshot_mean"}
        cells = [f"{100 * metrics[column]:.2f}{'*' if column in starred else ' '}"
                 if column in metrics else "- " for column in columns]
        rows.append([spec, *cells, metrics["images"], metrics["classes"]])
    print_table(["%", *columns, "images", "classes"], rows)
    sets = [metrics for spec, metrics in results.items() if not spec.startswith("imagenet")]
    for protocol, key in (("zero-shot", "{}"), ("few-shot", "fewshot_mean"),
                          ("linear", "linear_{}")):
        reported = [metrics.get(key.format(metrics["reported"])) for metrics in sets]
        if len(sets) > 1 and None not in reported:
            mean = 100 * sum(reported) / len(reported)
            print(f"mean of * over {len(sets)} sets, {protocol}: {mean:.2f}")


@in_one_line
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
