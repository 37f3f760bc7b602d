"""Classification with a CLIP checkpoint: zero-shot, few-shot and linear probe.

    python eval_zeroshot.py --checkpoint runs/laclip/checkpoint.pt --dataset imagenet1k --data-root DIR --templates openai
    torchrun --nproc_per_node 8 eval_zeroshot.py --checkpoint runs/laclip/checkpoint.pt --dataset laclip15 --data-root DIR \\
        --templates openai --protocol zeroshot fewshot linear --json out.json          # LaCLIP's tables 2 to 4
    python eval_zeroshot.py --checkpoint runs/try/checkpoint.pt --dataset jsonl:test.jsonl --image-root DIR

zeroshot    top-1, 5, 10 and the mean of the classes' accuracies. A class is the mean of its prompts' embeddings:
            normalise, average, normalise (Radford et al. 2021, section 3.1.4; both papers)
fewshot     --ways classes, --shots images each make a prototype; mean over --episodes and its 95 % interval (LaCLIP)
linear      logistic regression on the frozen features, its penalty chosen on a validation split, fitted again on
            train + validation (LaCLIP)

An image that cannot be read is named and counts as wrong. Beside the accuracy stands what guessing and what always
answering the largest class would score. Any number of ranks gives the same figures.
"""
import argparse
import hashlib
import importlib.util
import json
import os
import re
import sys
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image

from train_clip import (at_least, die, encode_images, encode_texts, label_of, load_checkpoint, open_image, pick_device,
                        read_rows, start_ranks, texts_of)

TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prompts", "templates.txt")
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
SUITES = {
    "laclip15": ["food101", "cifar10", "cifar100", "sun397", "cars", "fgvc_aircraft", "dtd", "pets", "caltech101", "flowers",
                 "stl10", "eurosat", "resisc45", "gtsrb", "country211"],
    "vtab9": ["caltech101", "cifar100", "svhn", "dtd", "pets", "flowers", "eurosat", "resisc45", "pcam"],  # VeCLIP's
}
QUERIES = 6  # images a class that an episode classifies; assumed
PENALTIES = [10.0 ** -i for i in range(1, 8)]  # of the linear probe, from the strongest on; assumed
MEAN_PER_CLASS = {"fgvc_aircraft", "pets", "caltech101", "flowers"}  # what is reported of these; of the others top-1


# === data sets ========================================================================================================

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
    """The images in `path`, links followed; the class of one is the folder that holds it, relative to `path`."""
    if not os.path.isdir(path):
        die(f"--dataset {spec}: no folder {path}" + (f"; it comes from {source}" if source else ""))
    kinds = tuple(Image.registered_extensions())
    names = sorted(os.path.relpath(os.path.join(folder, file), path) for folder, _, files in os.walk(path, followlinks=True)
                   if folder != path for file in files if file.lower().endswith(kinds) and not file.startswith("."))
    labels = [os.path.dirname(name) for name in names]
    words = {label: re.sub("^[a-z]/", "", label).replace("_", " ").replace("/", " ") for label in labels}  # a/abbey
    return Part(names, partial(open_file, path), labels, words)


def open_file(root, name):
    return Image.open(os.path.join(root, name))  # named by the disk, not by a row: it may be a link to anywhere


def read_jsonl(spec, path, args):
    if not args.image_root or not os.path.isdir(args.image_root):
        die(f"--dataset {spec} needs --image-root, the folder that its image paths start from; got {args.image_root}")
    rows = [(row.get("image"), row.get(args.label)) for row in read_rows(path)]
    found = [(name, label_of(label), texts_of(label)) for name, label in rows if label_of(label)]
    if not found:
        die(f"--dataset {spec}: no row has the field {args.label!r}")
    if len(found) < len(rows):
        print(f"{spec}: {len(rows) - len(found)} of {len(rows)} rows have no {args.label}, left out", file=sys.stderr)
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
    return dataset[i][0]


def read_part(spec, part, args):
    """The "train", "val" or "test" part of NAME. Of imagefolder:DIR and jsonl:FILE all is the test part, or, of --train's,
    every fifth image the validation part; so it is where a set has no official validation part."""
    kind, _, path = spec.partition(":")
    divided = part == "test"  # the part is the whole of what is read
    if spec in TORCHVISION:
        train, val, test = TORCHVISION[spec][1:]
        found = read_torchvision(spec, args.data_root, {"train": train, "val": val or train, "test": test}[part])
        divided = divided or val
    elif spec in FOLDERS:
        test, train, source = FOLDERS[spec]
        if part != "test" and not train:
            die(f"--dataset {spec} has nothing to train on")
        found = read_folder(spec, os.path.join(args.data_root, test if part == "test" else train), source)
        if test == train:
            found, divided = found.of([part_of(name) == part for name in found.names]), True
    elif kind == "imagefolder":
        found = read_folder(spec, path)
    elif kind == "jsonl":
        found = read_jsonl(spec, path, args)
    else:
        die(f"--dataset {spec}: expected imagefolder:DIR, jsonl:FILE or {', '.join([*SUITES, *FOLDERS, *TORCHVISION])}")
    if not divided:
        found = found.of([(i % 5 == 0) == (part == "val") for i in range(len(found.names))])
    return found if found.names else die(f"--dataset {spec}: it is empty")


# === class names and templates ========================================================================================

def packaged(package, file):
    """Text of a file inside an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None:
        die("the published class names and templates come from two packages: pip install clip-benchmark open_clip_torch")
    with open(os.path.join(found.submodule_search_locations[0], file), encoding="utf-8") as f:
        return f.read()


def published_names(spec, part):
    """OpenAI's class names as clip-benchmark has them -> {key: name}; ImageNet's by synset, so any subset of it works."""
    names = json.loads(packaged("clip_benchmark", "datasets/en_classnames.json"))
    synsets = packaged("timm", "data/_info/imagenet_synsets.txt").split()  # timm comes with open_clip
    if spec == "imagenetv2":
        return {str(i): name for i, name in enumerate(names["imagenet1k"])}
    if set(part.labels) <= set(synsets):
        return dict(zip(synsets, names["imagenet1k"]))
    keys = sorted(set(part.labels))
    if spec == "caltech101" and keys[0] != "BACKGROUND_Google":  # torchvision leaves it out
        keys.insert(0, "BACKGROUND_Google")
    if spec not in names:
        return part.words  # published are the folders' or torchvision's own
    if len(names[spec]) != len(keys):
        die(f"--dataset {spec}: {len(keys)} classes, published are the names of {len(names[spec])}")
    return dict(zip(keys, names[spec]))


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
        with open(path, encoding="utf-8") as f:
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
            with open(args.classes, encoding="utf-8") as f:
                words = json.load(f)
        except (OSError, ValueError) as e:
            die(f"--classes {args.classes}: {e}")
    missing = [key for key in keys if not isinstance(words, dict) or not texts_of(words.get(key))]
    if missing:
        die(f"--dataset {spec}: no name for {len(missing)} classes, {missing[0]!r} the first: --classes FILE or openai")
    return [texts_of(words[key]) for key in keys]


# === protocols ========================================================================================================

def classifier(model, tokenizer, names, templates):
    """[C, d]: for each class the normalised mean of the normalised embeddings of its prompts."""
    prompts = [[template.replace("{}", name) for name in synonyms for template in templates] for synonyms in names]
    features = encode_texts(model, tokenizer, [prompt for some in prompts for prompt in some])
    return F.normalize(torch.stack([part.mean(0) for part in features.split([len(some) for some in prompts])]), dim=-1)


def accuracies(features, weights, targets, block=4096):
    """features [N, d], weights [C, d], targets [N] -> {"top1": ..., ...}. Among equal scores the earlier class wins; a
    feature of zeros (an image that could not be read) is never right."""
    ranks = []
    for image, target in zip(features.split(block), targets.split(block)):
        scores = image @ weights.T  # [block, C]
        own = scores.gather(1, target[:, None])
        earlier = torch.arange(scores.shape[1]) < target[:, None]
        ranks.append(((scores > own) | (scores == own) & earlier).sum(1))
    rank = torch.cat(ranks)
    rank[(features == 0).all(1)] = 2 ** 62
    figures = {f"top{k}": (rank < k).double().mean().item() for k in (1, 5, 10)}
    return {**figures, "mean_per_class": mean_per_class(rank == 0, targets), "chance": 1 / len(weights),
            "largest_class": targets.bincount().max().item() / len(targets)}


def mean_per_class(right, targets):
    """right, targets [N] -> the mean of the classes' accuracies"""
    count = targets.bincount()
    return (torch.zeros(len(count)).double().index_add_(0, targets, right.double()) / count)[count > 0].mean().item()


def draw_episodes(targets, ways=5, images=11, episodes=600, seed=0, block=50):
    """targets [N] -> [E, ways, images]: for every episode `ways` classes and as many different images of each.

    A class with fewer images is not drawn; a set with fewer than `ways` such classes has no episodes: None."""
    count = torch.bincount(targets)
    eligible = (count >= images).nonzero()[:, 0]
    if len(eligible) < ways:
        return None
    members, first = targets.argsort(stable=True), count.cumsum(0) - count  # class after class, and where each begins
    generator, drawn = torch.Generator().manual_seed(seed), []
    for E in torch.arange(episodes).split(block):
        classes = eligible[torch.rand(len(E), len(eligible), generator=generator).topk(ways).indices]  # [e, ways]
        order = torch.rand(len(E), ways, int(count[eligible].max()), generator=generator)
        order[torch.arange(order.shape[-1]) >= count[classes][..., None]] = -1  # a smaller class ends earlier
        drawn.append(members[first[classes][..., None] + order.topk(images).indices])
    return torch.cat(drawn)


def fewshot(features, episodes, shots=5):
    """Prototype classifier: `shots` images a class make its prototype, by which the others are classified.

    features [N, d], episodes [E, ways, images] -> the mean accuracy and half of its 95 % interval. 5 ways, 5 shots are
    LaCLIP's; 600 episodes, 6 queries a class, centring by the support's mean and unit length are assumed."""
    right = []
    for images in episodes.split(50):
        x = features[images]  # [e, ways, images, d]
        x = F.normalize(x - x[:, :, :shots].mean((1, 2), keepdim=True), dim=-1)
        prototypes = F.normalize(x[:, :, :shots].mean(2), dim=-1)  # [e, ways, d]
        guess = torch.einsum("ewqd,evd->ewqv", x[:, :, shots:], prototypes).argmax(-1)
        readable = (features[images[:, :, shots:]] != 0).any(-1)
        right.append(((guess == torch.arange(images.shape[1])[:, None]) & readable).double().mean((1, 2)))
    right = torch.cat(right)
    return {"fewshot_mean": right.mean().item(), "fewshot_ci95": 1.96 * right.std().item() / len(right) ** 0.5}


class Probe:
    """Multinomial logistic regression: the mean cross-entropy + penalty / 2 * |W|^2, the bias free, by L-BFGS; what
    scikit-learn's LogisticRegression(C=1 / (penalty * n)) minimises. A fit starts where the one before it ended."""

    def __init__(self, d, classes, device="cpu", dtype=torch.float32):
        self.weight = torch.zeros(classes, d, device=device, dtype=dtype, requires_grad=True)
        self.bias = torch.zeros(classes, device=device, dtype=dtype, requires_grad=True)

    def fit(self, x, y, penalty, tolerance=1e-5, steps=1000, block=2 ** 16):
        """x [n, d], y [n]; ends when no gradient is above `tolerance`"""
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=steps, tolerance_grad=tolerance,
                                      tolerance_change=0, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = penalty / 2 * self.weight.square().sum()
            loss.backward()
            for part, target in zip(x.split(block), y.split(block)):  # a million images: the logits stay small
                fit = F.cross_entropy(part @ self.weight.T + self.bias, target, reduction="sum") / len(x)
                fit.backward()
                loss = loss.detach() + fit.detach()
            return loss

        optimizer.step(closure)
        return self

    @torch.no_grad()
    def predict(self, x):
        return (x @ self.weight.T + self.bias).argmax(1)


def linear_probe(train, val, classes, penalties=PENALTIES):
    """train, val: (features [n, d], targets [n]) -> (the Probe fitted on both, the penalty that was best on val, of equal
    ones the strongest)."""
    (x, y), (vx, vy) = train, val
    probe, right = Probe(x.shape[1], classes, x.device, x.dtype), {}
    for penalty in penalties:
        right[penalty] = (probe.fit(x, y, penalty).predict(vx) == vy).sum().item()
    best = max(penalties, key=right.get)
    return probe.fit(torch.cat([x, vx]), torch.cat([y, vy]), best), best


# === the command ======================================================================================================

def evaluate(spec, args, model, tokenizer, transform):
    """-> the figures of one data set, fractions of 1"""
    def encode(part):
        if unknown := set(part.labels) - set(keys):
            die(f"--train {args.train}: its class {min(unknown)!r} is not among those of {spec}")
        features = encode_images(model, transform, part.names, part.read, args.batch_size, args.workers)
        return features, torch.tensor([number[label] for label in part.labels]), (features != 0).any(1)

    test = read_part(spec, "test", args)
    keys = sorted({*test.labels, *(test.words if spec in TORCHVISION else ())})
    number = {key: i for i, key in enumerate(keys)}
    if "zeroshot" in args.protocol:  # what is wrong with these is told before the images are read
        templates, names = read_templates(args.templates, spec), class_names(spec, test, keys, args)
    features, targets, readable = encode(test)
    figures = {"images": len(targets), "classes": len(keys), "unreadable": len(targets) - int(readable.sum()),
               "reported": "mean_per_class" if spec in MEAN_PER_CLASS else "top1"}
    if "zeroshot" in args.protocol:
        figures |= accuracies(features, classifier(model, tokenizer, names, templates), targets)
    if "fewshot" in args.protocol:
        episodes = draw_episodes(targets, args.ways, args.shots + QUERIES, args.episodes, args.seed)
        if episodes is not None:
            figures |= fewshot(features, episodes, args.shots)
        else:
            print(f"{spec}: fewer than {args.ways} classes of {args.shots + QUERIES} images, no episodes", file=sys.stderr)
    if "linear" in args.protocol:
        device, learned = model.logit_scale.device, []
        for part in ("train", "val"):
            x, y, mask = encode(read_part(args.train if ":" in spec else spec, part, args))
            learned.append((x[mask].to(device), y[mask].to(device)))
        probe, figures["penalty"] = linear_probe(*learned, len(keys))
        guess = probe.predict(features.to(device)).cpu()
        right = (guess == targets) & readable
        figures |= {"linear_top1": right.double().mean().item(), "linear_mean_per_class": mean_per_class(right, targets)}
    return figures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--checkpoint", required=True, help="checkpoint.pt of train_clip.py, or of data/convert_checkpoint.py")
    add("--dataset", nargs="+", required=True, metavar="NAME|imagefolder:DIR|jsonl:FILE", help="a folder of one folder a "
        f"class; rows with image and label; or, under --data-root: {', '.join([*SUITES, *FOLDERS, *TORCHVISION])}")
    add("--data-root", default="datasets", help="where the sets by name lie, each as torchvision unpacks it (%(default)s)")
    add("--protocol", nargs="+", choices=["zeroshot", "fewshot", "linear"], default=["zeroshot"])
    add("--image-root", help="the folder that the image paths of jsonl: start from")
    add("--label", default="label", metavar="FIELD", help="the class's field of jsonl: (default: label)")
    add("--templates", default=TEMPLATES, metavar="FILE|openai|openai7", help="a file, one template a line (default: "
        "data/prompts/templates.txt); openai: the published ones, 80 for ImageNet; openai7: the seven short ones")
    add("--classes", metavar="FILE|openai", help="JSON object, folder or label -> class name or names; openai: the published "
        "names (default: with published templates these, else the set's own)")
    add("--train", metavar="imagefolder:DIR|jsonl:FILE", help="what linear learns from, if --dataset is no NAME")
    add("--ways", type=at_least(2), default=5, help="classes of an episode (default: %(default)s)")
    add("--shots", type=at_least(1), default=5, help="images a class to learn from (default: %(default)s)")
    add("--episodes", type=at_least(2), default=600, help="default: %(default)s")
    add("--batch-size", type=at_least(1), default=64)
    add("--workers", type=at_least(0), default=2, help="processes that read images (default: %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--seed", type=int, default=0, help="of the episodes")
    add("--json", help="write the figures there too, as fractions of 1")
    args = parser.parse_args(argv)
    if not os.path.isdir(os.path.dirname(args.json or "") or "."):
        die(f"--json {args.json}: no such folder")
    specs = [name for spec in args.dataset for name in SUITES.get(spec, [spec])]
    if "linear" in args.protocol and not args.train and (own := [spec for spec in specs if ":" in spec]):
        die(f"--protocol linear on {own[0]} needs --train, a set of the same classes")

    for spec in specs:  # a set that is missing is told now, not after hours
        read_part(spec, "test", args)
        if "linear" in args.protocol:
            read_part(args.train if ":" in spec else spec, "train", args)
    device = pick_device(args.device)
    rank, _ = start_ranks(device)
    model, tokenizer, transform = load_checkpoint(args.checkpoint, device)
    results = {}
    for spec in specs:
        results[spec] = evaluate(spec, args, model, tokenizer, transform)
        if rank == 0 and args.json:  # after every set: the next one may take an hour
            with open(args.json, "w") as f:
                json.dump(results, f, indent=1)
    if rank == 0:
        print_table(results)


def print_table(results):
    """Per cent; a star marks what is reported of a set, and the last line is the mean of these, ImageNet's left out."""
    columns = [c for c in ("top1", "top5", "top10", "mean_per_class", "chance", "largest_class", "fewshot_mean", "fewshot_ci95",
                           "linear_top1", "linear_mean_per_class") if any(c in figures for figures in results.values())]
    width = max(len("mean of *"), *map(len, results))
    print(f"{'%':{width}}" + "".join(f"{column[:15]:>16}" for column in columns) + f"{'images':>9}{'classes':>9}")
    for spec, figures in results.items():
        starred = {figures["reported"], "linear_" + figures["reported"], "fewshot_mean"}
        cells = [f"{100 * figures[c]:.2f}{'*' if c in starred else ' '}" if c in figures else "- " for c in columns]
        print(f"{spec:{width}}" + "".join(f"{cell:>16}" for cell in cells) + f"{figures['images']:9d}{figures['classes']:9d}")
    sets = [figures for spec, figures in results.items() if not spec.startswith("imagenet")]
    for name, prefix in (("zero-shot", ""), ("few-shot", "fewshot"), ("linear", "linear_")):
        found = [figures.get("fewshot_mean" if prefix == "fewshot" else prefix + figures["reported"]) for figures in sets]
        if len(sets) > 1 and None not in found:
            print(f"mean of * over {len(sets)} sets, {name}: {100 * sum(found) / len(found):.2f}")


if __name__ == "__main__":
    main()
