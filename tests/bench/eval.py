"""The evaluations against clip-benchmark's and scikit-learn's, on this machine's CPU: seconds from files to metrics.

    python tests/bench/eval.py                                     # all cases, about 14 minutes on two cores
    python tests/bench/eval.py --cases retrieval --pairs 1

    zeroshot    a hundredth of ImageNet: 10 classes x OpenAI's 80 templates, 500 JPEGs | clip-benchmark's evaluate
    retrieval   a twenty-fifth of COCO's test split: 200 JPEGs, 1,000 captions | clip-benchmark's evaluate
    probe       the linear probe's seven penalties on 20,000 x 512 features of 100 classes, each scored on 5,000 others
                | scikit-learn's LogisticRegression, a fit a penalty
    blocks      recalls of 30,000 images and 150,000 texts, features given: time and peak memory, without a peer

Both sides have the same ViT-B/32 (random weights), fp32, images, prompts, workers and batch size. They take turns.
clip-benchmark pads every text to 77 tokens and holds the whole similarity matrix.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402

from inputs import T, caption, openai_tokenizer, photograph  # noqa: E402
import eval_retrieval  # noqa: E402
import eval_zeroshot  # noqa: E402
from data.classification_sets import read_sets  # noqa: E402
from data.logistic_regression import LogisticRegression as OurLogisticRegression  # noqa: E402

# clip-benchmark's own fails from numpy 2.4 on; both cost next to nothing
zeroshot_classification.accuracy = lambda output, target, topk: [
    (output.topk(k).indices == target[:, None]).any(1).double().mean().item() for k in topk]
AIMS = {"zeroshot": 1.5, "retrieval": 1.5, "probe": 1.0}


def models(folder):
    """The same weights twice -> (ours, tokenizer, transform), (open_clip's, tokenizer, transform)"""
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32").eval()
    ours = T.CLIP(T.Config(**T.PRESETS["ViT-B/32"])).eval()
    ours.load_state_dict(theirs.state_dict())
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=224), is_train=False)
    T.save_checkpoint(str(folder / "clip.pt"), ours, T.Tokenizer(openai_tokenizer()))
    return T.load_checkpoint(str(folder / "clip.pt")), (theirs, open_clip.get_tokenizer("ViT-B-32"), transform)


def zeroshot(args, folder):
    rng, names = np.random.default_rng(0), open_clip.IMAGENET_CLASSNAMES[:10]
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    (folder / "templates.txt").write_text("\n".join(templates))
    for i in range(args.images or 500):
        (folder / "images" / names[i % 10]).mkdir(parents=True, exist_ok=True)
        photograph(rng, 500, 375).save(folder / "images" / names[i % 10] / f"{i}.jpg", quality=88)
    ours, (theirs, their_tokenizer, their_transform) = models(folder)
    encoder, spec = eval_zeroshot.Encoder(*ours, batch_size=64, workers=args.workers), f"imagefolder:{folder / 'images'}"
    options = Namespace(dataset=[spec], train=None, templates=folder / "templates.txt", classes=None, protocol=["zeroshot"])

    def we():
        metrics = eval_zeroshot.evaluate(spec, read_sets(options)[spec], options, encoder)
        return [metrics["top1"], metrics["top5"]]

    def they():
        dataset = ImageFolder(folder / "images", their_transform)
        loader = torch.utils.data.DataLoader(dataset, 64, num_workers=args.workers)
        found = zeroshot_classification.evaluate(theirs, loader, their_tokenizer, dataset.classes,
                                                 [t.replace("{}", "{c}") for t in templates], "cpu", amp=False)
        return [found["acc1"], found["acc5"]]

    return {"ours": we, "clip-benchmark": they}


class Captions(torch.utils.data.Dataset):
    def __init__(self, root, rows, transform):
        self.root, self.rows, self.transform = root, rows, transform

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.transform(T.Image.open(self.root / self.rows[i]["image"])), self.rows[i]["alt"]


def pairs_of(batch):
    images, texts = zip(*batch)
    return torch.stack(images), list(texts)


def retrieval(args, folder):
    rng, (ours, (theirs, their_tokenizer, their_transform)) = np.random.default_rng(0), models(folder)
    (folder / "images").mkdir()
    rows = []
    for i in range(args.images or 200):
        photograph(rng, 640, 480).save(folder / "images" / f"{i}.jpg", quality=88)
        rows.append({"image": f"{i}.jpg", "alt": [caption(rng, ours[1], open_clip.IMAGENET_CLASSNAMES) for _ in range(5)]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = eval_zeroshot.Encoder(*ours, batch_size=64, workers=args.workers)
    options = Namespace(captions=folder / "rows.jsonl", image_root=folder / "images", field="alt", hits=None)

    def we():
        metrics = eval_retrieval.text_retrieval(options, encoder)
        return [metrics["t2i_r5"], metrics["i2t_r5"]]

    def they():
        loader = torch.utils.data.DataLoader(Captions(folder / "images", rows, their_transform), 64,
                                             num_workers=args.workers, collate_fn=pairs_of)
        found = zeroshot_retrieval.evaluate(theirs, loader, their_tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
        return [found["image_retrieval_recall@5"], found["text_retrieval_recall@5"]]

    return {"ours": we, "clip-benchmark": they}


def probe(args, folder):
    generator = torch.Generator().manual_seed(0)
    n, classes = args.images or 20_000, 100
    y = torch.arange(n + n // 4) % classes
    x = 0.35 * torch.randn(classes, 512, generator=generator)[y] + torch.randn(len(y), 512, generator=generator)
    x = F.normalize(x * torch.logspace(0, -1, 512), dim=-1)  # as of a trained tower: few directions carry most
    (a, b), (va, vb) = (x[:n], y[:n]), (x[n:], y[n:])

    def we():
        fitted, found = OurLogisticRegression(512, classes), []
        for penalty in eval_zeroshot.PENALTIES:
            found.append((fitted.fit(a, b, penalty).predict(va) == vb).double().mean().item())
        return found

    def they():
        return [LogisticRegression(C=1 / (penalty * n), max_iter=1000).fit(a.numpy(), b.numpy()).score(va.numpy(), vb.numpy())
                for penalty in eval_zeroshot.PENALTIES]

    return {"ours": we, "scikit-learn": they}


def blocks():
    """In a process of its own, so that its peak is its own."""
    images, texts = (F.normalize(torch.randn(n, 512), dim=-1) for n in (30_000, 150_000))
    owner, start = torch.arange(30_000).repeat_interleave(5), time.perf_counter()
    eval_retrieval.recalls(*eval_retrieval.places_both_ways(images, texts, owner), owner)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"blocks: 30,000 images x 150,000 texts both ways in {time.perf_counter() - start:.0f} s, peak of the process "
          f"{peak:.1f} GiB; the matrix alone would be {30_000 * 150_000 * 4 / 2 ** 30:.1f} GiB", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cases = parser.add_argument, {"zeroshot": zeroshot, "retrieval": retrieval, "probe": probe}
    add("--cases", nargs="+", choices=[*cases, "blocks"], default=[*cases, "blocks"])
    add("--pairs", type=int, default=3, help="rounds a case (default: %(default)s)")
    add("--images", type=int, help="of a case, to try the script (default: as above)")
    add("--workers", type=int, default=2)
    add("--threads", type=int, default=os.cpu_count(), help="default: all, %(default)s")
    add("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = {name: version(name) for name in ("torch", "open_clip_torch", "clip-benchmark", "scikit-learn")}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results = {}
    for case in args.cases:
        if case == "blocks":
            subprocess.run([sys.executable, "-c", "import eval; eval.blocks()"], cwd=Path(__file__).parent, check=True)
            continue
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            sides = cases[case](args, Path(folder))
            seconds, metrics = {side: [] for side in sides}, {}
            for round in range(args.pairs):
                for side in (list(sides) if round % 2 == 0 else list(sides)[::-1]):
                    start = time.perf_counter()
                    metrics[side] = sides[side]()
                    seconds[side].append(time.perf_counter() - start)
                    print(f"{case}, round {round + 1}: {side} {seconds[side][-1]:.1f} s, metrics "
                          f"{' '.join(f'{value:.4f}' for value in metrics[side])}", flush=True)
        ours, theirs = seconds.values()
        ratios = [their / our for our, their in zip(ours, theirs)]
        results[case] = {"seconds": seconds, "ratios": ratios, "metrics": metrics}
        median = statistics.median(ratios)
        print(f"{case}: {median:.2f} x ({min(ratios):.2f}-{max(ratios):.2f}), aim {AIMS[case]}"
              f"{'' if median >= AIMS[case] else ': MISSED'}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps({**about, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
