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
import json
import os
import sys

import torch
import torch.nn.functional as F

from data.classification_sets import FOLDERS, SUITES, TORCHVISION, class_names, read_set, read_templates
from data.features import encode_images, encode_texts
from train_clip import check_output, die, in_one_line, load_checkpoint, new_parser, number, pick_device, start_ranks

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")

QUERIES = 6  # images a class that an episode classifies; assumed
PENALTIES = [10.0 ** -i for i in range(1, 8)]  # of the linear probe, from the strongest on; assumed
MEAN_PER_CLASS = {"fgvc_aircraft", "pets", "caltech101", "flowers"}  # what is reported of these; of the others top-1


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

def evaluate(spec, parts, args, model, tokenizer, transform):
    """-> the figures of one data set, `parts` of read_set, fractions of 1"""
    def encode(part):
        if unknown := set(part.labels) - set(keys):
            die(f"--dataset {spec} has no class {min(unknown)!r}, which its training images have")
        features = encode_images(model, transform, part.names, part.read, args.batch_size, args.workers)
        return features, torch.tensor([number_of[label] for label in part.labels]), (features != 0).any(1)

    test = parts["test"]
    keys = sorted({*test.labels, *(test.words if spec in TORCHVISION else ())})
    number_of = {key: i for i, key in enumerate(keys)}
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
            x, y, mask = encode(parts[part])
            learned.append((x[mask].to(device), y[mask].to(device)))
        probe, figures["penalty"] = linear_probe(*learned, len(keys))
        guess = probe.predict(features.to(device)).cpu()
        right = (guess == targets) & readable
        figures |= {"linear_top1": right.double().mean().item(), "linear_mean_per_class": mean_per_class(right, targets)}
    return figures


@in_one_line()
def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint.pt of train_clip.py, or of data/convert_checkpoint.py")
    add("--dataset", nargs="+", required=True, metavar="NAME|imagefolder:DIR|jsonl:FILE", help="a folder of one folder a "
        f"class; rows with image and label; or, under --data-root: {', '.join([*SUITES, *FOLDERS, *TORCHVISION])}")
    add("--data-root", default="datasets", help="where the sets by name lie, each as torchvision unpacks it (%(default)s)")
    add("--protocol", nargs="+", choices=["zeroshot", "fewshot", "linear"], default=["zeroshot"])
    add("--image-root", help="the folder that the image paths of jsonl: start from")
    add("--label", default="label", metavar="FIELD", help="the class's field of jsonl: (default: label)")
    add("--templates", default=os.path.join(DATA, "prompts", "templates.txt"), metavar="FILE|openai|openai7", help="a file, one template a line (default: "
        "data/prompts/templates.txt); openai: the published ones, 80 for ImageNet; openai7: the seven short ones")
    add("--classes", metavar="FILE|openai", help="JSON object, folder or label -> class name or names; openai: the published "
        "names (default: with published templates these, else the set's own)")
    add("--train", metavar="imagefolder:DIR|jsonl:FILE", help="what linear learns from, if --dataset is no NAME")
    add("--ways", type=number(int, 2), default=5, help="classes of an episode (default: %(default)s)")
    add("--shots", type=number(int, 1), default=5, help="images a class to learn from (default: %(default)s)")
    add("--episodes", type=number(int, 2), default=600, help="default: %(default)s")
    add("--batch-size", type=number(int, 1), default=64)
    add("--workers", type=number(int, 0), default=2, help="processes that read images (default: %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--seed", type=number(int, 0, below=2 ** 63), default=0, help="of the episodes")
    add("--json", help="write the figures there too, as fractions of 1")
    args = parser.parse_args(argv)
    args.json and check_output(args.json, args.checkpoint, args.classes or "", args.templates,
             *(spec.partition(":")[2] for spec in [*args.dataset, args.train or ""]))
    specs = [name for spec in args.dataset for name in SUITES.get(spec, [spec])]
    if "linear" in args.protocol and not args.train and (own := [spec for spec in specs if ":" in spec]):
        die(f"--protocol linear on {own[0]} needs --train, a set of the same classes")

    sets = {spec: read_set(spec, args, learn="linear" in args.protocol) for spec in specs}  # one that is missing is told now
    device = pick_device(args.device)
    rank, _ = start_ranks(device)
    model, tokenizer, transform = load_checkpoint(args.checkpoint, device)
    results = {}
    for spec in list(sets):
        results[spec] = evaluate(spec, sets.pop(spec), args, model, tokenizer, transform)
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
