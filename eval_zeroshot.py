"""Classification with a CLIP checkpoint: zero-shot, few-shot and linear probe.

    python eval_zeroshot.py --checkpoint clip.pt --dataset imagenet1k --data-root DIR \\
        --templates openai
    torchrun --nproc_per_node 8 eval_zeroshot.py --checkpoint clip.pt --dataset laclip15 \\
        --data-root DIR --templates openai7 --protocol zeroshot fewshot linear --json out.json
    python eval_zeroshot.py --checkpoint clip.pt --dataset jsonl:test.jsonl --image-root DIR

The second command is LaCLIP's tables 2 to 4 without ImageNet; what the paper leaves open is marked
as assumed. The table also shows chance and the accuracy of always answering the largest class; *
marks the metric that papers report for a set. An unreadable image is wrong, a class without an
image scores 0 in mean_per_class; stderr names both. The metrics do not depend on the number of
ranks. First come the protocols, then how images and texts become features.
"""
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F

from data.class_names import class_names, read_templates, tell_same_names
from data.classification_sets import (MEAN_PER_CLASS, add_set_options, input_files, number_classes,
                                      print_results, read_sets, tell_lacking_classes,
                                      tell_small_classes)
from data.common import check_output, in_one_line, number, pick_device
from data.evaluation import (all_reduce, blocks, check_readable, evaluation_parser, finite,
                             open_checkpoint, rank, start_ranks, tell, with_progress)
from data.logistic_regression import LogisticRegression
from train_clip import load_checkpoint, resolve_precision

QUERIES = 6  # images of a class that an episode classifies; assumed
PENALTIES = [10.0 ** -i for i in range(1, 8)]  # of the linear probe, the strongest first; assumed

# === protocols ====================================================================================
def classifier(encode_texts, names, templates):
    """names: for each of C classes its synonyms; templates: with {} for the name -> [C, d].

    A class is the mean of its prompts: normalise, average, normalise (Radford et al. 2021)."""
    prompts, sizes = [], []
    for synonyms in names:
        prompts += [template.replace("{}", name) for name in synonyms for template in templates]
        sizes.append(len(synonyms) * len(templates))
    classes = encode_texts(prompts).split(sizes)  # each [its prompts, d]
    return F.normalize(torch.stack([features.mean(0) for features in classes]), dim=-1)

def accuracies(features, weights, targets, block=4096):
    """features [N, d], weights [C, d], targets [N] -> {"top1": ..., ...}, fractions of 1.

    Of equal similarities the earlier class comes first. An unreadable image (a feature of zeros) is
    wrong."""
    places = []  # of the right class among all, from 0
    for image, target in zip(features.split(block), targets.split(block)):
        similarity = image @ weights.T  # [block, C]
        right = similarity.gather(1, target[:, None])
        earlier = torch.arange(len(weights)) < target[:, None]
        ahead = (similarity > right) | (similarity == right) & earlier
        places.append(ahead.sum(1))
    place, readable = torch.cat(places), (features != 0).any(1)
    metrics = {f"top{k}": ((place < k) & readable).double().mean().item() for k in (1, 5, 10)}
    metrics["mean_per_class"] = mean_per_class((place == 0) & readable, targets, len(weights))
    return {**metrics, "chance": 1 / len(weights),
            "largest_class": targets.bincount().max().item() / len(targets)}

def mean_per_class(right, targets, classes):
    """right, targets [N] -> the mean of the classes' accuracies; 0 for a class without an image"""
    images = targets.bincount(minlength=classes).clamp(min=1)
    return (targets.bincount(right.double(), minlength=classes) / images).mean().item()

def draw_episodes(targets, ways=5, images=11, episodes=600, seed=0):
    """targets [N] -> [E, ways, images]: each episode draws `ways` classes, `images` images of each.

    A class with fewer images is not drawn. None if fewer than `ways` classes are left."""
    classes = targets.argsort(stable=True).split(targets.bincount().tolist())
    classes = [numbers.numpy() for numbers in classes if len(numbers) >= images]
    if len(classes) < ways:
        return None
    rng = np.random.default_rng(seed)
    drawn = [[rng.choice(classes[c], images, replace=False)
              for c in rng.choice(len(classes), ways, replace=False)] for _ in range(episodes)]
    return torch.from_numpy(np.array(drawn))

def fewshot(features, episodes, shots=5):
    """`shots` images of each class make its prototype, which classifies the other images (LaCLIP).

    features [N, d], episodes [E, ways, images] -> the mean accuracy and half of its 95 % interval.
    LaCLIP has 5 ways and 5 shots. Assumed: 600 episodes, 6 queries a class, all from the test
    images; features and prototypes of unit length, centred by the support's mean."""
    accuracy = []
    for images in episodes:  # [ways, images]
        x = features[images]  # [ways, images, d]
        x = F.normalize(x - x[:, :shots].mean((0, 1)), dim=-1)
        prototypes = F.normalize(x[:, :shots].mean(1), dim=-1)  # [ways, d]
        guess = (x[:, shots:] @ prototypes.T).argmax(-1)  # [ways, queries]
        readable = (features[images[:, shots:]] != 0).any(-1)
        right = (guess == torch.arange(len(images))[:, None]) & readable
        accuracy.append(right.double().mean())
    accuracy = torch.stack(accuracy)
    return {"fewshot_mean": accuracy.mean().item(),
            "fewshot_ci95": 1.96 * accuracy.std().item() / len(episodes) ** 0.5}

def linear_probe(train, val, classes, penalties=PENALTIES):
    """train, val: (features [n, d], targets [n]) -> (probe, penalty)

    The penalty with the best accuracy on val is chosen, of equal ones the strongest. Then the probe
    is fitted on train and val together (LaCLIP). Assumed: features of unit length, after the
    projection."""
    (x, y), (vx, vy) = train, val
    probe, right = LogisticRegression(x.shape[1], classes, x.device, x.dtype), {}
    for penalty in penalties:
        right[penalty] = (probe.fit(x, y, penalty).predict(vx) == vy).sum().item()
    best = max(penalties, key=right.get)
    return probe.fit(torch.cat([x, vx]), torch.cat([y, vy]), best), best

# === images and texts -> features =================================================================
class Images(torch.utils.data.Dataset):
    def __init__(self, names, read, transform, image_size):
        self.names, self.read, self.transform = names, read, transform
        self.blank = torch.zeros(3, image_size, image_size)

    def __getitem__(self, i):
        """-> image [3, S, S] and ""; or zeros and the reason why it cannot be read"""
        try:
            return self.transform(self.read(self.names[i])), ""
        except Exception as e:  # Pillow raises nearly everything
            return self.blank, f"{type(e).__name__}: {e}"

class Encoder:
    """A checkpoint's model: images or texts -> features of unit length, fp32, on all ranks' CPUs"""

    def __init__(self, model, tokenizer, transform, batch_size=64, workers=0, precision="fp32"):
        self.model, self.tokenizer, self.transform = model, tokenizer, transform
        self.batch_size, self.workers, self.device = batch_size, workers, model.logit_scale.device
        self.precision = precision  # bf16: of the towers alone
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, precision == "bf16")

    def encode_images(self, names, read, all_may_fail=False):
        """names [N], read(name) -> PIL image; -> features [N, d]

        An unreadable image is named on stderr. Its feature is zero: it matches nothing and stays in
        every denominator. If none can be read, the command is wrong, unless `all_may_fail`."""
        if not all_may_fail:
            check_readable(names, read)
        config, batches = self.model.config, blocks(len(names), self.batch_size)
        loader = torch.utils.data.DataLoader(
            Images(names, read, self.transform, config.image_size), num_workers=self.workers,
            batch_sampler=[list(range(start, end)) for start, end in batches])
        features = torch.zeros(len(names), config.embed_dim)
        for (start, end), (images, faults) in zip(batches, with_progress(loader, " image batches")):
            readable = torch.tensor([[not fault] for fault in faults])  # [batch, 1]
            encoded = self.encode(self.model.encode_image, images)
            features[start:end] = encoded.where(readable, 0.0)
            for name, fault in zip(names[start:end], faults):
                if fault:
                    print(f"unreadable: {name}: {fault}", file=sys.stderr)
        features = finite(all_reduce(features))  # a row is zero on all ranks but one
        if unreadable := int((features == 0).all(1).sum()):
            tell(f"{unreadable} of {len(names)} images are unreadable")
        return features

    def encode_texts(self, texts, batch_size=256):
        """T texts -> features [T, d]"""
        features = torch.zeros(len(texts), self.model.config.embed_dim)
        for start, end in with_progress(blocks(len(texts), batch_size), " text batches"):
            tokens = self.tokenizer(texts[start:end])
            features[start:end] = self.encode(self.model.encode_text, tokens)
        return finite(all_reduce(features))

    @torch.inference_mode()
    def encode(self, tower, batch):
        with self.autocast:
            features = tower(batch.to(self.device))
        return F.normalize(features.float(), dim=-1).cpu()

# === the command ==================================================================================
def load_encoder(args):
    """Start the ranks. -> the Encoder of --checkpoint"""
    device = pick_device(args.device)
    start_ranks(device)
    precision = resolve_precision(args.precision, torch.device(device))
    model, tokenizer, transform = open_checkpoint(load_checkpoint, args.checkpoint, device)
    return Encoder(model, tokenizer, transform, args.batch_size, args.workers, precision)

def evaluate(spec, parts, args, encoder):
    """One data set, as read_sets returns it -> its metrics, fractions of 1"""
    keys, targets = number_classes(spec, parts)
    names = [[key] for key in keys]  # the set's own, for the protocols without texts
    if "zeroshot" in args.protocol:  # so that a mistake shows before images are read
        templates = read_templates(args.templates, spec)
        names = class_names(spec, parts["test"], keys, args)
    tell_same_names(spec, keys, names)
    features = {name: encoder.encode_images(part.names, part.read) for name, part in parts.items()}
    x, y = features["test"], targets["test"]
    metrics = {"images": len(y), "classes": len(keys), "unreadable": int((x == 0).all(1).sum()),
               "reported": "mean_per_class" if spec in MEAN_PER_CLASS else "top1"}
    if "zeroshot" in args.protocol:
        metrics |= accuracies(x, classifier(encoder.encode_texts, names, templates), y)
    if "fewshot" in args.protocol:
        images = args.shots + QUERIES
        tell_small_classes(spec, keys, y, images)
        episodes = draw_episodes(y, args.ways, images, args.episodes, args.seed)
        if episodes is None:
            tell(f"{spec}: no episodes, fewer than {args.ways} classes have {images} images")
        else:
            metrics |= fewshot(x, episodes, args.shots)
    if "linear" in args.protocol:
        metrics |= evaluate_probe(spec, features, targets, keys, encoder.device)
    return metrics

def evaluate_probe(spec, features, targets, keys, device):
    """features and targets of "train", "val" and "test" -> the probe's metrics on test"""
    readable = {part: (x != 0).any(1) for part, x in features.items()}
    train, val = ([values[part][readable[part]].to(device) for values in (features, targets)]
                  for part in ("train", "val"))
    tell_lacking_classes(spec, keys, torch.cat([train[1], val[1]]))
    probe, penalty = linear_probe(train, val, len(keys))
    answers = probe.predict(features["test"].to(device)).cpu()
    right = (answers == targets["test"]) & readable["test"]
    return {"penalty": penalty, "linear_top1": right.double().mean().item(),
            "linear_mean_per_class": mean_per_class(right, targets["test"], len(keys))}

@in_one_line
def main(argv=None):
    parser = evaluation_parser(__doc__)
    add_set_options(parser)
    add = parser.add_argument
    add("--protocol", nargs="+", choices=["zeroshot", "fewshot", "linear"], default=["zeroshot"],
        help="fewshot, linear: of frozen image features (default: zeroshot)")
    add("--ways", type=number(int, 2), default=5, help="classes of an episode (default: 5)")
    add("--shots", type=number(int, 1), default=5, help="images a class to learn from (default: 5)")
    add("--episodes", type=number(int, 2), default=600, help="default: %(default)s")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of the episodes (default: 0)")
    add("--json", help="write the metrics there too, as fractions of 1")
    args = parser.parse_args(argv)
    if args.json:
        check_output(args.json, args.checkpoint, *input_files(args))
    sets = read_sets(args, learn="linear" in args.protocol)  # a missing set ends here
    encoder, results = load_encoder(args), {}
    for spec in list(sets):
        results[spec] = evaluate(spec, sets.pop(spec), args, encoder)
        if rank() == 0 and args.json:  # after every set: the next one may take an hour
            with open(args.json, "w") as f:
                json.dump(results, f, indent=1)
    if rank() == 0:
        print(f"precision: {encoder.precision}")
        print_results(results)

if __name__ == "__main__":
    main()
