"""Classification with a CLIP checkpoint: zero-shot, few-shot, linear probe. How images and texts are encoded.

    python eval_zeroshot.py --checkpoint clip.pt --dataset imagenet1k --data-root DIR --templates openai
    torchrun --nproc_per_node 8 eval_zeroshot.py --checkpoint clip.pt --dataset laclip15 --data-root DIR \\
        --templates openai7 --protocol zeroshot fewshot linear --json out.json     # LaCLIP's tables 2 to 4
    python eval_zeroshot.py --checkpoint clip.pt --dataset jsonl:test.jsonl --image-root DIR --device cpu

An unreadable image is named on stderr and counts as wrong. The table also shows the accuracy of guessing
(chance) and of always answering the largest class. The metrics do not depend on the number of ranks.
"""
import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data.classification_sets import (MEAN_PER_CLASS, add_set_options, class_names, input_files,
                                      number_classes, print_table, read_sets, read_templates)
from data.logistic_regression import LogisticRegression
from train_clip import (all_reduce, begin_worker, check_images, check_output, die, in_one_line,
                        load_checkpoint, new_parser, number, own_cpus, pick_device, rank, start_ranks, to_rgb)

QUERIES = 6  # images of a class that an episode classifies; assumed
PENALTIES = [10.0 ** -i for i in range(1, 8)]  # of the linear probe, the strongest first; assumed
PROGRESS = {"unit": "batch", "leave": False, "delay": 1}  # tqdm's


# === protocols ==============================================================================================

def classifier(encode_texts, names, templates):
    """names: C lists of synonyms; templates: with {} for the name -> [C, d].

    A class is the mean of its prompts: normalise, average, normalise (Radford et al. 2021; both papers)."""
    prompts = [[template.replace("{}", name) for name in words for template in templates] for words in names]
    features = encode_texts([prompt for prompts_of_class in prompts for prompt in prompts_of_class])
    return F.normalize(torch.stack([part.mean(0) for part in features.split([*map(len, prompts)])]), dim=-1)


def accuracies(features, weights, targets, block=4096):
    """features [N, d], weights [C, d], targets [N] -> {"top1": ..., ...}, fractions of 1.

    Of equal similarities the earlier class comes first. An unreadable image (a feature of zeros) is wrong."""
    places = []
    for image, target in zip(features.split(block), targets.split(block)):
        similarity = image @ weights.T  # [block, C]
        right = similarity.gather(1, target[:, None])
        earlier = torch.arange(similarity.shape[1]) < target[:, None]
        places.append(((similarity > right) | (similarity == right) & earlier).sum(1))
    place = torch.cat(places)  # of the right class, from 0
    place[(features == 0).all(1)] = 2 ** 62
    metrics = {f"top{k}": (place < k).double().mean().item() for k in (1, 5, 10)}
    return {**metrics, "mean_per_class": mean_per_class(place == 0, targets), "chance": 1 / len(weights),
            "largest_class": targets.bincount().max().item() / len(targets)}


def mean_per_class(right, targets):
    """right, targets [N] -> the mean of the classes' accuracies"""
    count = targets.bincount()
    return (targets.bincount(right.double()) / count)[count > 0].mean().item()


def draw_episodes(targets, ways=5, images=11, episodes=600, seed=0, block=50):
    """targets [N] -> [E, ways, images]: for every episode `ways` classes, and `images` images of each class.

    A class with fewer images is not drawn. None if fewer than `ways` classes are left."""
    count = torch.bincount(targets)
    eligible = (count >= images).nonzero()[:, 0]
    if len(eligible) < ways:
        return None
    members, first = targets.argsort(stable=True), count.cumsum(0) - count  # class by class; where it begins
    generator, drawn = torch.Generator().manual_seed(seed), []
    for E in torch.arange(episodes).split(block):
        classes = eligible[torch.rand(len(E), len(eligible), generator=generator).topk(ways).indices]
        order = torch.rand(len(E), ways, int(count[eligible].max()), generator=generator)
        order[torch.arange(order.shape[-1]) >= count[classes][..., None]] = -1  # a smaller class ends earlier
        drawn.append(members[first[classes][..., None] + order.topk(images).indices])
    return torch.cat(drawn)


def fewshot(features, episodes, shots=5):
    """`shots` images of each class make its prototype, by which the other images are classified (LaCLIP).

    features [N, d], episodes [E, ways, images] -> the mean accuracy and half of its 95 % interval. LaCLIP has
    5 ways, 5 shots. Assumed: 600 episodes, 6 queries a class, centring by the support's mean, unit length."""
    right = []
    for images in episodes.split(50):
        x = features[images]  # [e, ways, images, d]
        x = F.normalize(x - x[:, :, :shots].mean((1, 2), keepdim=True), dim=-1)
        prototypes = F.normalize(x[:, :, :shots].mean(2), dim=-1)  # [e, ways, d]
        guess = torch.einsum("ewqd,evd->ewqv", x[:, :, shots:], prototypes).argmax(-1)
        readable = (features[images[:, :, shots:]] != 0).any(-1)
        right.append(((guess == torch.arange(images.shape[1])[:, None]) & readable).double().mean((1, 2)))
    mean, std = torch.cat(right).mean().item(), torch.cat(right).std().item()
    return {"fewshot_mean": mean, "fewshot_ci95": 1.96 * std / len(episodes) ** 0.5}


def linear_probe(train, val, classes, penalties=PENALTIES):
    """train, val: (features [n, d], targets [n]) -> (probe, penalty)

    The penalty with the best accuracy on val is chosen, of equal ones the strongest. Then the probe is fitted
    on train and val together (LaCLIP)."""
    (x, y), (vx, vy) = train, val
    probe, right = LogisticRegression(x.shape[1], classes, x.device, x.dtype), {}
    for penalty in penalties:
        right[penalty] = (probe.fit(x, y, penalty).predict(vx) == vy).sum().item()
    best = max(penalties, key=right.get)
    return probe.fit(torch.cat([x, vx]), torch.cat([y, vy]), best), best


# === images and texts -> features ===========================================================================

class Images(torch.utils.data.Dataset):
    def __init__(self, names, read, transform):
        self.names, self.read, self.transform = names, read, transform

    def __getitem__(self, i):
        """-> image [3, S, S] and ""; or zeros and the reason why it cannot be read"""
        try:
            return self.transform(to_rgb(self.read(self.names[i]))), ""
        except Exception as e:  # Pillow raises nearly everything
            return torch.zeros(3, *[self.transform.image_size] * 2), f"{type(e).__name__}: {e}"


def blocks(n, size):
    """This rank's [start, end) of range(n). The ranks take blocks of `size` in turn. One process alone would
    compute the same blocks, so every bit of the result is the same for any number of ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return [(start, min(start + size, n)) for start in range(rank() * size, n, world * size)]


class Encoder:
    """A checkpoint's model: images or texts -> features of unit length, fp32, on the CPU of every rank."""

    def __init__(self, model, tokenizer, transform, batch_size=64, workers=0, precision="fp32"):
        self.model, self.tokenizer, self.transform = model, tokenizer, transform
        self.batch_size, self.workers, self.device = batch_size, workers, model.logit_scale.device
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def encode_images(self, names, read, all_may_fail=False):
        """names [N], read(name) -> PIL image; -> features [N, d]

        An unreadable image is named on stderr. Its feature is zero: it matches nothing and stays in every
        denominator. If none can be read, that is a mistake in the command, unless `all_may_fail`."""
        if not all_may_fail:
            check_images("--image-root or the set's folder", len(names), lambda i: read(names[i]))
        batches = [list(range(*block)) for block in blocks(len(names), self.batch_size)]
        loader = torch.utils.data.DataLoader(Images(names, read, self.transform), batch_sampler=batches,
                                             num_workers=self.workers, worker_init_fn=begin_worker)
        features = torch.zeros(len(names), self.model.config.embed_dim)
        for batch, (images, reasons) in zip(batches, tqdm(loader, "images", **PROGRESS, disable=rank() > 0)):
            readable = [i for i, reason in enumerate(reasons) if not reason]
            if readable:
                encoded = self.encode(self.model.encode_image, images[readable])
                features[[batch[i] for i in readable]] = encoded
            for i, reason in zip(batch, reasons):
                if reason:
                    print(f"unreadable: {names[i]}: {reason}", file=sys.stderr)
        return finite(all_reduce(features))  # a row is zero on all ranks but one

    def encode_texts(self, texts, batch_size=256):
        """T texts -> features [T, d]"""
        features = torch.zeros(len(texts), self.model.config.embed_dim)
        for start, end in tqdm(blocks(len(texts), batch_size), "texts", **PROGRESS, disable=rank() > 0):
            features[start:end] = self.encode(self.model.encode_text, self.tokenizer(texts[start:end]))
        return finite(all_reduce(features))

    @torch.inference_mode()
    def encode(self, tower, batch):
        with self.autocast:
            features = tower(batch.to(self.device))
        return F.normalize(features.float(), dim=-1).cpu()


def finite(features):
    """The features, or one line: no comparison with NaN is true, so every answer would count as right."""
    if not features.isfinite().all():
        die("the model's features are not finite: are its weights?")
    return features


# === the command ============================================================================================

def evaluation_parser(description):
    """The options that the evaluations, data/clip_scores.py and data/search.py share."""
    parser = new_parser(description)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint.pt of train_clip.py or data/convert_checkpoint.py")
    add("--batch-size", type=number(int, 1), default=64, help="images (default: %(default)s)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast (default: %(default)s)")
    add("--workers", type=number(int, 0), default=own_cpus(), help="processes of a rank that read images, 0: "
        "none (default: this rank's CPUs less one, %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser


def load_encoder(args):
    """Start the ranks. -> the Encoder of --checkpoint"""
    device = pick_device(args.device)
    start_ranks(device)
    return Encoder(*load_checkpoint(args.checkpoint, device), args.batch_size, args.workers, args.precision)


def evaluate(spec, parts, args, encoder):
    """One data set, as read_sets returns it -> its metrics, fractions of 1"""
    keys, targets = number_classes(spec, parts)
    if "zeroshot" in args.protocol:  # a mistake in these is told before the images are read
        templates, names = read_templates(args.templates, spec), class_names(spec, parts["test"], keys, args)
    features = {name: encoder.encode_images(part.names, part.read) for name, part in parts.items()}
    test, readable = targets["test"], {name: (x != 0).any(1) for name, x in features.items()}
    metrics = {"images": len(test), "classes": len(keys), "unreadable": int((~readable["test"]).sum()),
               "reported": "mean_per_class" if spec in MEAN_PER_CLASS else "top1"}
    if "zeroshot" in args.protocol:
        metrics |= accuracies(features["test"], classifier(encoder.encode_texts, names, templates), test)
    if "fewshot" in args.protocol:
        episodes = draw_episodes(test, args.ways, args.shots + QUERIES, args.episodes, args.seed)
        if episodes is None:
            print(f"{spec}: no episodes, fewer than {args.ways} classes have {args.shots + QUERIES} images",
                  file=sys.stderr)
        else:
            metrics |= fewshot(features["test"], episodes, args.shots)
    if "linear" in args.protocol:
        train, val = ([x[name][readable[name]].to(encoder.device) for x in (features, targets)]
                      for name in ("train", "val"))
        probe, metrics["penalty"] = linear_probe(train, val, len(keys))
        right = (probe.predict(features["test"].to(encoder.device)).cpu() == test) & readable["test"]
        metrics |= {"linear_top1": right.double().mean().item(),
                    "linear_mean_per_class": mean_per_class(right, test)}
    return metrics


@in_one_line()
def main(argv=None):
    parser = evaluation_parser(__doc__)
    add_set_options(parser)
    add = parser.add_argument
    add("--protocol", nargs="+", choices=["zeroshot", "fewshot", "linear"], default=["zeroshot"])
    add("--ways", type=number(int, 2), default=5, help="classes of an episode (default: %(default)s)")
    add("--shots", type=number(int, 1), default=5, help="images a class to learn from (default: %(default)s)")
    add("--episodes", type=number(int, 2), default=600, help="default: %(default)s")
    add("--seed", type=number(int, 0, below=2 ** 63), default=0, help="of the episodes (default: 0)")
    add("--json", help="write the metrics there too, as fractions of 1")
    args = parser.parse_args(argv)
    if args.json:
        check_output(args.json, args.checkpoint, *input_files(args))
    sets = read_sets(args, learn="linear" in args.protocol)  # a missing set is told now
    encoder, results = load_encoder(args), {}
    for spec in list(sets):
        results[spec] = evaluate(spec, sets.pop(spec), args, encoder)
        if rank() == 0 and args.json:  # after every set: the next one may take an hour
            with open(args.json, "w") as f:
                json.dump(results, f, indent=1)
    if rank() == 0:
        print_table(results)


if __name__ == "__main__":
    main()
