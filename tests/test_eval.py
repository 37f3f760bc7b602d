"""eval_zeroshot.py and eval_retrieval.py: equal to the tools that the field trusts and to plainly written references."""
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

import eval_retrieval
import eval_zeroshot
import train_clip as T
from conftest import COLOURS, DEVICE, ROOT, assert_mistake, read_jsonl, run, worker_of
from data import classification_sets, clip_scores, logistic_regression, search
from tools import run_tool


# --- equality with plain references -----------------------------------------------------------------------------------

def features(n, d=6, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def coarse(n, d=6, seed=0):
    """Features whose products are exact in any order of summing, and often the same."""
    x = torch.randint(-3, 4, (n, d), generator=torch.Generator().manual_seed(seed)) / 16
    return x.index_fill(0, (x == 0).all(1).nonzero()[:, 0], 1 / 16)


def plain_order(query, keys):
    """Indices of the keys, the most similar first; of equal ones the earlier first."""
    return sorted(range(len(keys)), key=lambda i: (-float(query @ keys[i]), i))


@pytest.mark.parametrize("block", [3, 1000])
def test_accuracies_equal_a_sort(block):
    images, weights = features(50), features(12, seed=1)
    targets = torch.randint(0, 12, (50,), generator=torch.Generator().manual_seed(2))
    targets[:12] = torch.arange(12)  # every class has an image
    orders = [plain_order(image, weights) for image in images]
    found = eval_zeroshot.accuracies(images, weights, targets, block)
    for k in (1, 5, 10):
        assert found[f"top{k}"] == pytest.approx(sum(int(t) in o[:k] for t, o in zip(targets, orders)) / 50)
    per_class = [[int(t) == o[0] for t, o in zip(targets, orders) if t == c] for c in range(12)]
    assert found["mean_per_class"] == pytest.approx(sum(sum(hits) / len(hits) for hits in per_class) / 12)
    assert found["largest_class"] == max(map(len, per_class)) / 50 and found["chance"] == 1 / 12


def test_equal_scores_and_unreadable_images_are_defined():
    same = torch.ones(3, 4) / 2
    found = eval_zeroshot.accuracies(same, same, torch.tensor([0, 1, 2]))
    assert found["top1"] == pytest.approx(1 / 3) and found["top5"] == 1  # the first class wins
    unreadable = torch.cat([same[:2], torch.zeros(1, 4)])
    assert eval_zeroshot.accuracies(unreadable, same, torch.tensor([0, 0, 0]))["top10"] == pytest.approx(2 / 3)


def owners(images, texts, seed=3):
    """Which image each text belongs to, at least one each."""
    more = torch.randint(0, images, (texts - images,), generator=torch.Generator().manual_seed(seed))
    return torch.sort(torch.cat([torch.arange(images), more])).values


def recalls(images, texts, owner):
    return eval_retrieval.recalls(*eval_retrieval.ranks_both_ways(images, texts, owner), owner)


@pytest.mark.parametrize("block", [100, 2 ** 25])
def test_recalls_equal_a_sort_with_any_number_of_texts_an_image(block, monkeypatch):
    monkeypatch.setattr(eval_retrieval, "SIMILARITIES", block)
    images, texts, owner = coarse(20), coarse(47, seed=1), owners(20, 47)
    texts[5] = texts[9]  # a caption that stands twice
    found = recalls(images, texts, owner)
    for k in (1, 5, 10):
        i2t = [any(int(owner[t]) == i for t in plain_order(image, texts)[:k]) for i, image in enumerate(images)]
        t2i = [int(owner[t]) in plain_order(text, images)[:k] for t, text in enumerate(texts)]
        assert found[f"i2t_r{k}"] == pytest.approx(sum(i2t) / 20) and found[f"t2i_r{k}"] == pytest.approx(sum(t2i) / 47)


def test_chance_is_what_random_features_get():
    owner = torch.arange(10).repeat_interleave(3)
    found = [recalls(features(10, seed=s), features(30, seed=s + 1000), owner) for s in range(400)]
    for way in ("i2t", "t2i"):
        for k in (1, 5, 10):
            mean = sum(f[f"{way}_r{k}"] for f in found) / len(found)
            assert mean == pytest.approx(found[0][f"{way}_r{k}_chance"], abs=0.03)


def test_an_unreadable_image_finds_nothing_is_not_found_and_is_in_nobodys_way():
    images = features(4)
    images[2] = 0
    found = recalls(images, -images, torch.arange(4))  # all similarities to the right one are -1, to the unreadable 0
    assert found["i2t_r10"] == found["t2i_r10"] == 0.75  # though k is larger than the index
    hits = list(eval_retrieval.best_images(-images[:1], images))
    assert sorted(hits[0][1]) == [0, 1, 3]


@pytest.mark.parametrize("block", [30, 2 ** 25])
def test_average_precision_equals_its_definition(block, monkeypatch):
    monkeypatch.setattr(eval_retrieval, "SIMILARITIES", block)
    images, labels = coarse(30), torch.randint(0, 6, (30,), generator=torch.Generator().manual_seed(4))
    labels[7] = 99  # the only one of its label
    images[3] = 0  # unreadable
    images[11] = images[12]  # an image that is there twice
    found = eval_retrieval.average_precisions(images, labels)
    for q in range(30):
        order = sorted((i for i in range(30) if i != q), key=lambda i: (i == 3, -float(images[q] @ images[i]), i))
        places = [place for place, i in enumerate(order, 1) if labels[i] == labels[q]]
        if q == 7:
            assert math.isnan(found[q])
        elif q == 3:
            assert found[q] == 0
        else:
            assert found[q] == pytest.approx(sum(n / place for n, place in enumerate(places, 1)) / len(places), abs=1e-9)


def test_fewshot_equals_a_plain_loop():
    x, targets = features(200, 16), torch.arange(200) % 9
    targets[-3:] = 40  # too few images for an episode
    episodes = eval_zeroshot.draw_episodes(targets, ways=5, images=11, episodes=70, seed=1)
    assert episodes.shape == (70, 5, 11) and len(episodes.unique()) > 190
    right = []
    for episode in episodes:
        classes = [targets[images].unique().tolist() for images in episode]
        assert all(len(c) == 1 and c != [40] for c in classes) and len({c[0] for c in classes}) == 5
        assert len(set(episode.flatten().tolist())) == 55  # no image twice
        support = torch.stack([x[i] for images in episode for i in images[:5]])
        unit = lambda v: v / v.norm()
        prototypes = [unit(sum(unit(x[i] - support.mean(0)) for i in images[:5]) / 5) for images in episode]
        guesses = [(max(range(5), key=lambda w: float(prototypes[w] @ unit(x[i] - support.mean(0)))), way)
                   for way, images in enumerate(episode) for i in images[5:]]
        right.append(sum(guess == way for guess, way in guesses) / 30)
    found = eval_zeroshot.fewshot(x, episodes)
    mean = sum(right) / 70
    assert found["fewshot_mean"] == pytest.approx(mean, abs=1e-6)
    assert found["fewshot_ci95"] == pytest.approx(1.96 * (sum((r - mean) ** 2 for r in right) / 69 / 70) ** 0.5, abs=1e-6)
    assert torch.equal(episodes, eval_zeroshot.draw_episodes(targets, ways=5, images=11, episodes=70, seed=1))
    assert eval_zeroshot.draw_episodes(targets, ways=10, images=11) is None


# --- equality with the field's tools ----------------------------------------------------------------------------------

class AsClipBenchmark:
    """Our model as clip-benchmark calls one."""

    def __init__(self, model):
        self.model = model

    def encode_image(self, images):
        return self.model.encode_image(images)

    def encode_text(self, tokens):
        return self.model.encode_text(tokens)


def test_recall_equals_clip_benchmark(shapes, trained):
    model, tokenizer, transform = T.load_checkpoint(str(trained / "checkpoint.pt"))
    rows = [(row["image"], [row["alt"], row["rewrite_a"]]) for row in read_jsonl(shapes / "captions.jsonl")] * 2
    read = partial(T.open_image, str(shapes / "images"))
    images = [transform(T.to_rgb(read(name))) for name, _ in rows]
    batches = [(torch.stack(images[i:i + 8]), [texts for _, texts in rows[i:i + 8]]) for i in range(0, 32, 8)]
    theirs = zeroshot_retrieval.evaluate(AsClipBenchmark(model), batches, tokenizer, "cpu", amp=False, recall_k_list=[5, 10])
    encoder = eval_zeroshot.Encoder(model, tokenizer, transform, batch_size=8)
    images = encoder.encode_images([name for name, _ in rows], read)
    texts = encoder.encode_texts([text for _, both in rows for text in both])
    ours = recalls(images, texts, torch.arange(32).repeat_interleave(2))
    for k in (5, 10):  # every image and text is there twice, so recall@1 depends on how ties are broken
        assert ours[f"t2i_r{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert ours[f"i2t_r{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
    x, y = features(60, 8), features(150, 8, seed=1)  # no ties: recall@1 too
    owner = owners(60, 150)
    positive = torch.zeros(150, 60, dtype=torch.bool)
    positive[torch.arange(150), owner] = True
    ours = recalls(x, y, owner)
    for k in (1, 5, 10):
        theirs = [(zeroshot_retrieval.recall_at_k(scores, pairs, k) > 0).float().mean().item()
                  for scores, pairs in ((y @ x.T, positive), (x @ y.T, positive.T))]
        assert [ours[f"t2i_r{k}"], ours[f"i2t_r{k}"]] == pytest.approx(theirs, abs=1e-6)


def test_zeroshot_equals_clip_benchmark(shapes, trained):
    model, tokenizer, _ = T.load_checkpoint(str(trained / "checkpoint.pt"))
    names, templates = list(COLOURS), ["a {c} thing", "{c} square", "one {c} coloured cross"]
    theirs = zeroshot_classification.zero_shot_classifier(AsClipBenchmark(model), tokenizer, names, templates, "cpu", amp=False)
    encode_texts = eval_zeroshot.Encoder(model, tokenizer, None).encode_texts
    ours = eval_zeroshot.classifier(encode_texts, [[name] for name in names], [t.replace("{c}", "{}") for t in templates])
    torch.testing.assert_close(ours, theirs.T, atol=1e-6, rtol=1e-5)
    x, weights, y = features(500, 8), features(20, 8, seed=1), torch.arange(500) % 20
    scores, found = (x @ weights.T).numpy(), eval_zeroshot.accuracies(x, weights, y)
    for k in (1, 5, 10):  # clip-benchmark's own function for this fails with today's numpy
        assert found[f"top{k}"] == pytest.approx(top_k_accuracy_score(y, scores, k=k), abs=1e-6)
    assert found["mean_per_class"] == pytest.approx(balanced_accuracy_score(y, scores.argmax(1)), abs=1e-6)


def test_linear_probe_equals_scikit_learn():
    x, y = features(400, 10).double(), torch.arange(400) % 5
    x += 0.8 * F.normalize(torch.randn(5, 10, generator=torch.Generator().manual_seed(9)), dim=-1).double()[y]
    for penalty in (1e-1, 1e-3):
        theirs = LogisticRegression(C=1 / (penalty * 400), tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
        ours = logistic_regression.LogisticRegression(10, 5, dtype=torch.float64).fit(x, y, penalty, tolerance=1e-10, block=150)
        torch.testing.assert_close(ours.weight.detach(), torch.from_numpy(theirs.coef_), atol=1e-6, rtol=1e-6)
        probabilities = (x @ ours.weight.T + ours.bias).softmax(1).detach()
        torch.testing.assert_close(probabilities, torch.from_numpy(theirs.predict_proba(x.numpy())), atol=1e-6, rtol=1e-6)
    train, val, test = (slice(0, 240), slice(240, 320), slice(320, 400))
    probe, best = eval_zeroshot.linear_probe((x[train], y[train]), (x[val], y[val]), 5)
    accuracy = {p: (LogisticRegression(C=1 / (p * 240), tol=1e-8, max_iter=10_000).fit(x[train].numpy(), y[train].numpy())
                    .score(x[val].numpy(), y[val].numpy())) for p in eval_zeroshot.PENALTIES}
    assert best == max(eval_zeroshot.PENALTIES, key=accuracy.get)
    both = LogisticRegression(C=1 / (best * 320), tol=1e-8, max_iter=10_000).fit(x[:320].numpy(), y[:320].numpy())
    assert (probe.predict(x[test]).numpy() == both.predict(x[test].numpy())).mean() == 1


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts(trained):
    model, tokenizer, _ = T.load_checkpoint(str(trained / "checkpoint.pt"))
    encode_texts = eval_zeroshot.Encoder(model, tokenizer, None).encode_texts
    weights = eval_zeroshot.classifier(encode_texts, [["red bar"], ["blue cross", "cross"]], ["a {}", "one {} here"])
    with torch.inference_mode():
        for found, prompts in zip(weights, [["a red bar", "one red bar here"],
                                            ["a blue cross", "one blue cross here", "a cross", "one cross here"]]):
            each = torch.cat([model.encode_text(tokenizer([prompt])) for prompt in prompts])
            mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
            torch.testing.assert_close(found, mean / mean.norm(), atol=1e-5, rtol=1e-5)


# --- data sets --------------------------------------------------------------------------------------------------------

def make_image(path, colour="red"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), colour).save(path)


def fill_dtd(root):
    for name in ("banded", "dotted"):
        for i in range(3):
            make_image(root / f"dtd/dtd/images/{name}/{name}_{i}.jpg")
    (root / "dtd/dtd/labels").mkdir()
    for number, split in enumerate(("train", "val", "test")):
        (root / f"dtd/dtd/labels/{split}1.txt").write_text("".join(f"{n}/{n}_{number}.jpg\n" for n in ("banded", "dotted")))


def fill_food101(root):
    (root / "food-101/meta").mkdir(parents=True)
    for split, number in (("train", range(10)), ("test", range(10, 12))):
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(
            {name: [f"{name}/{i}" for i in number] for name in ("apple_pie", "waffles")}))
        for name in ("apple_pie", "waffles"):
            for i in number:
                make_image(root / f"food-101/images/{name}/{i}.jpg")


def fill_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    entry = {"data": torch.zeros(10, 3072, dtype=torch.uint8).numpy(), "labels": list(range(10))}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"kind {i}" for i in range(10)]}))


def fill_gtsrb(root):
    for sign in range(43):
        make_image(root / f"gtsrb/GTSRB/Training/{sign:05}/0.ppm")
        make_image(root / f"gtsrb/GTSRB/Final_Test/Images/{sign:05}.ppm")
    (root / "gtsrb/GT-final_test.csv").write_text("Filename;ClassId\n" + "".join(f"{i:05}.ppm;{i}\n" for i in range(43)))


def fill_country211(root):
    for split in ("train", "valid", "test"):
        for i in range(211):
            make_image(root / f"country211/{split}/C{i:03}/0.jpg")


def fill_eurosat(root):
    for name in ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
                 "Residential", "River", "SeaLake"):
        for i in range(20):
            make_image(root / f"eurosat/2750/{name}/{name}_{i}.jpg")


def fill_imagenet1k(root):
    for wnid in ("n01440764", "n02123045"):  # two of the thousand: tench, tabby
        make_image(root / f"imagenet/val/{wnid}/0.JPEG")
        for i in range(5):
            make_image(root / f"imagenet/train/{wnid}/{i}.JPEG")


def fill_imagenetv2(root):
    for number in range(1000):
        make_image(root / f"imagenetv2-matched-frequency-format-val/{number}/0.jpeg")


SETS = {  # name: (how to make a small one, its test, train and validation images, classes, a published class name by key)
    "dtd": (fill_dtd, (2, 2, 2), "0001", "dotted"), "food101": (fill_food101, (4, 16, 4), "0000", "apple pie"),
    "cifar10": (fill_cifar10, (10, 40, 10), "0003", "kind 3"),
    "gtsrb": (fill_gtsrb, (43, 34, 9), "0000", "red and white circle 20 kph speed limit"),
    "country211": (fill_country211, (211, 211, 211), "0001", "United Arab Emirates"),
    "eurosat": (fill_eurosat, None, "AnnualCrop", "annual crop land"),
    "imagenet1k": (fill_imagenet1k, (2, 8, 2), "n02123045", "tabby cat"),
    "imagenetv2": (fill_imagenetv2, (1000, None, None), "281", "tabby cat"),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_by_name(name, tmp_path, monkeypatch):
    fill, sizes, key, word = SETS[name]
    fill(tmp_path)
    for name_of_check in ("_check_integrity", "_load_meta"):  # they know the real files' md5
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name_of_check, lambda self: setattr(
            self, "classes", [f"kind {i}" for i in range(10)]) is None)
    parts = classification_sets.read_set(name, Namespace(data_root=str(tmp_path)), learn=name != "imagenetv2")
    for part, size in zip(("test", "train", "val"), sizes or ()):
        if size:
            assert len(parts[part].names) == len(parts[part].labels) == size
    for part in parts.values():
        assert part.read(part.names[0]).size in ((40, 40), (32, 32))
    if not sizes:  # no official split: disjoint, all there, about 6 : 2 : 2
        names = [name for part in parts.values() for name in part.names]
        assert len(set(names)) == len(names) == 200 and 100 < len(parts["train"].names) < 140
    keys, args = sorted(set(parts["test"].labels)), Namespace(classes=None, templates="openai")
    assert classification_sets.class_names(name, parts["test"], keys, args)[keys.index(key)] == [word]
    for kind, number in (("openai", 80 if name.startswith("imagenet") else None), ("openai7", 7)):
        templates = classification_sets.read_templates(kind, name)
        assert all("{}" in template for template in templates) and number in (None, len(templates))


def test_a_missing_set_says_how_to_fetch_it_and_fetches_nothing(tmp_path, capsys):
    for name in [*classification_sets.TORCHVISION, *classification_sets.FOLDERS]:
        with pytest.raises(SystemExit):
            classification_sets.read_set(name, Namespace(data_root=str(tmp_path)))
        said = capsys.readouterr().err
        assert name in said and (str(tmp_path) in said) and said.count("\n") == 1
        if name in classification_sets.TORCHVISION:
            assert classification_sets.TORCHVISION[name][0] in said and (name == "cars") != ("download=True" in said.split("fetch it:")[1])


def test_a_set_without_names_of_its_own_says_so(tmp_path, capsys):
    fill_gtsrb(tmp_path)
    part = classification_sets.read_set("gtsrb", Namespace(data_root=str(tmp_path)))["test"]
    with pytest.raises(SystemExit):
        classification_sets.class_names("gtsrb", part, sorted(set(part.labels)), Namespace(classes=None, templates="file"))
    assert "--classes" in capsys.readouterr().err


def test_labels_of_rows(tmp_path, capsys):
    rows = [{"image": "a", "label": ["cat", "tomcat"]}, {"image": "b", "label": 7}, {"image": "c", "label": 7.0}, {"image": "d"},
            {"image": "e", "label": 0.5}, {"image": "f", "label": True}, {"image": "g", "label": float("nan")}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = classification_sets.read_set(f"jsonl:{tmp_path / 'rows.jsonl'}", Namespace(image_root=str(tmp_path), label="label"))["test"]
    assert list(part.labels) == ["cat", "7", "7"]
    assert "4 rows have no usable label, left out: d (None), e (0.5), f (True), ..." in capsys.readouterr().err
    names = classification_sets.class_names("jsonl", part, ["7", "cat"], Namespace(classes=None, templates="file"))
    assert names == [["7"], ["cat", "tomcat"]]


def test_suites_name_known_sets():
    known = {*classification_sets.TORCHVISION, *classification_sets.FOLDERS}
    assert {len(set(sets) & known) for sets in classification_sets.SUITES.values()} == {15, 9}
    for name, (kind, *_) in classification_sets.TORCHVISION.items():
        assert hasattr(torchvision.datasets, kind), name


def test_the_split_of_sets_without_one_is_fixed():
    assert [classification_sets.part_of(f"Forest/Forest_{i}.jpg") for i in range(1, 9)] == \
        ["train", "train", "test", "test", "train", "val", "train", "train"]


# --- end to end -------------------------------------------------------------------------------------------------------

def test_zeroshot_as_a_user(shapes, trained, tmp_path):
    for row in read_jsonl(shapes / "captions.jsonl"):
        (tmp_path / "folder" / row["label"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(shapes / "images" / row["image"], tmp_path / "folder" / row["label"])
    (tmp_path / "templates.txt").write_text("{} square\n{} bar\n{} cross\n{} frame\n")
    rows = (shapes / "captions.jsonl").read_text() + '{"image": "gone.png", "label": "red"}\n{"image": "no-label.png"}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    folder, file = f"imagefolder:{tmp_path / 'folder'}", f"jsonl:{tmp_path / 'rows.jsonl'}"
    done = run("eval_zeroshot.py", "--checkpoint", trained / "checkpoint.pt", "--dataset", folder, file, "--image-root",
               shapes / "images", "--templates", tmp_path / "templates.txt", "--workers", 1, "--json", tmp_path / "out.json", fresh=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found[folder]["top1"] >= 0.8 and found[folder]["classes"] == len(COLOURS) and found[folder]["images"] == 16
    assert found[file]["images"] == 17 and found[file]["unreadable"] == 1 and "gone.png" in done.stderr
    assert found[file]["top1"] == pytest.approx(found[folder]["top1"] * 16 / 17)  # never dropped from the denominator
    assert "top1" in done.stdout and folder in done.stdout


def test_retrieval_as_a_user(shapes, trained, tmp_path):
    arguments = ["--checkpoint", trained / "checkpoint.pt", "--captions", shapes / "captions.jsonl", "--image-root",
                 shapes / "images", "--workers", 1]
    done = run("eval_retrieval.py", *arguments, "--json", tmp_path / "out.json", "--hits", tmp_path / "hits.jsonl", fresh=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["t2i_r1"] >= 0.8 and found["i2t_r1"] >= 0.8 and found["t2i_r1_chance"] == 1 / 16
    hits = read_jsonl(tmp_path / "hits.jsonl")
    assert len(hits) == 16 and sum(row["hits"][0]["image"] == row["truth"] for row in hits) / 16 == found["t2i_r1"]
    done = run_tool("search", *arguments, "--query", "blue square", "red cross", "--hits", tmp_path / "found.jsonl")
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["blue square", "red cross"] and len(lines) == 12
    queries = read_jsonl(tmp_path / "found.jsonl")
    assert [row["query"] for row in queries] == ["blue square", "red cross"] and {len(row["hits"]) for row in queries} == {10}
    assert queries[0]["hits"][0]["image"] == "blue-square.png" and lines[1].split()[1] == "blue-square.png"


def test_every_protocol_is_the_same_for_any_number_of_ranks(shapes, trained, tmp_path):
    for number in range(12):  # variants, so that there are episodes and something to learn from
        for row in read_jsonl(shapes / "captions.jsonl"):
            image = Image.open(shapes / "images" / row["image"]).rotate(3 * number, fillcolor="white")
            path = tmp_path / ("train" if number < 8 else "test") / row["label"] / f"{number}-{row['image']}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    (tmp_path / "test/red/broken.png").write_bytes(b"no image")
    arguments = ["--checkpoint", trained / "checkpoint.pt", "--dataset", f"imagefolder:{tmp_path / 'test'}", "--train",
                 f"imagefolder:{tmp_path / 'train'}", "--protocol", "zeroshot", "fewshot", "linear", "--ways", 3,
                 "--batch-size", 7, "--workers", 1, "--device", "cpu"]
    found = []
    for ranks in (None, 2, 3):
        done = run("eval_zeroshot.py", *arguments, "--json", tmp_path / f"{ranks}.json", ranks=ranks, fresh=ranks == 3)
        assert done.returncode == 0 and "broken.png" in done.stderr, done.stderr
        found.append((tmp_path / f"{ranks}.json").read_text())
    assert found[0] == found[1] == found[2]
    (metrics,) = json.loads(found[0]).values()
    assert metrics["linear_top1"] > 0.9 and metrics["fewshot_mean"] > 0.6 and metrics["unreadable"] == 1
    assert metrics["images"] == 65 and metrics["linear_top1"] <= 64 / 65  # the unreadable one is in the denominator


def test_retrieval_is_the_same_for_any_number_of_ranks(shapes, trained, tmp_path):
    rows = [{**row, "alt": [row["alt"], row["rewrite_a"]], "domain": row["image"].split("-")[1]} for row
            in read_jsonl(shapes / "captions.jsonl")] + [{"image": "gone.png", "alt": "nothing", "label": "red"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--checkpoint", trained / "checkpoint.pt", "--captions", tmp_path / "rows.jsonl", "--image-root",
                 shapes / "images", "--batch-size", 3, "--workers", 1, "--device", "cpu"]
    retrieve = partial(run, "eval_retrieval.py")
    for launch, way, world in ((retrieve, ["--json"], 3), (retrieve, ["--image-to-image", "--json"], 2),
                               (partial(run_tool, "clip_scores"), ["--output"], 3)):
        found = []
        for ranks in (None, world):
            out = tmp_path / f"{way}{ranks}"
            done = launch(*arguments, *way, out, ranks=ranks)
            assert done.returncode == 0 and "gone.png" in done.stderr, done.stderr
            found.append(out.read_text())
        assert found[0] == found[1]
        if "--image-to-image" in way:
            metrics = json.loads(found[0])
            assert metrics["images"] == 17 and metrics["map"] > 0.5 and "map_bar.png" in metrics and metrics["alone"] == 0


def test_scores_are_cosines_and_serve_best_and_the_filter(shapes, trained, tmp_path):
    rows = read_jsonl(shapes / "captions.jsonl")
    wrongs = [next(other["alt"] for other in rows if other["label"] != row["label"]) for row in rows]
    for row, wrong in zip(rows, wrongs):
        row |= {"alt": [wrong, row["alt"], None, "\ud800 \u2028"], "user": {"kept": 1}}
    rows += [{"image": "gone.png", "alt": "red square", "rewrite_a": "a red square"}, {"no": "image", "vec": [["a list in a list"]]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n\n")
    arguments = ["--checkpoint", trained / "checkpoint.pt", "--captions", tmp_path / "rows.jsonl", "--image-root",
                 shapes / "images", "--workers", 0, "--output", tmp_path / "scored.jsonl"]
    done = run_tool("clip_scores", *arguments, fresh=True)
    assert done.returncode == 0, done.stderr
    *lines, broken, blank = (tmp_path / "scored.jsonl").read_text().split("\n")[:-1]
    scored = [json.loads(line) for line in lines]
    assert (broken, blank) == ("no row", "")
    assert [{key: value for key, value in row.items() if key != "clip_score"} for row in scored] == rows
    model, tokenizer, transform = T.load_checkpoint(str(trained / "checkpoint.pt"))
    with torch.inference_mode():
        image = model.encode_image(transform(T.to_rgb(T.open_image(str(shapes / "images"), rows[0]["image"])))[None])
        for field, text, score in (("alt", rows[0]["alt"][1], scored[0]["clip_score"]["alt"][1]),
                                   ("rewrite_a", rows[0]["rewrite_a"], scored[0]["clip_score"]["rewrite_a"])):
            expected = F.cosine_similarity(image, model.encode_text(tokenizer([text])))
            assert score == pytest.approx(expected.item(), abs=2e-5), field
    assert scored[0]["clip_score"]["alt"][2] is None and isinstance(scored[0]["clip_score"]["alt"][3], float)
    assert scored[-2]["clip_score"] == {"alt": None, "rewrite_a": None} and scored[-1]["clip_score"] == {"vec": [None]}
    best = [row["clip_score"]["alt"][1] > row["clip_score"]["alt"][0] for row in scored[:16]]
    assert sum(best) >= 14
    assert "is finished" in run_tool("clip_scores", *arguments).stdout
    assert_mistake(run_tool("clip_scores", *arguments, "--best-field", "alt_best"), "made with best_field = None")

    done = run("train_clip.py", "--captions", tmp_path / "scored.jsonl", "--image-root", shapes / "images", "--text", "alt",
               "--alt-choice", "best", "--model", "nano", "--image-size", 32, "--tokenizer", shapes / "tokenizer.json",
               "--batch-size", 8, "--steps", 1, "--workers", 0, "--max-bad", 1, "--out", tmp_path / "run", "--device", DEVICE)
    assert done.returncode == 0, done.stderr
    least = sorted(row["clip_score"]["rewrite_a"] for row in scored[:16])[8]
    for row in scored[:16]:  # one text a row
        row["alt"], row["clip_score"]["alt"] = row["alt"][1], row["clip_score"]["alt"][1]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    done = run_tool("filter_captions", tmp_path / "single.jsonl", tmp_path / "best.jsonl", "--min-score", least, fresh=True)
    assert done.returncode == 0, done.stderr
    for row in read_jsonl(tmp_path / "best.jsonl")[:16]:
        assert (row["rewrite_a"] is not None) == (row["clip_score"]["rewrite_a"] >= least)
        assert row["rewrite_a"] or row["error"]["rewrite_a"] == "score"
    assert read_jsonl(tmp_path / "best.jsonl")[16]["error"] == {"rewrite_a": "unscored"}
    done = run_tool("filter_captions", tmp_path / "single.jsonl", tmp_path / "gain.jsonl", "--min-gain", "0")
    for row in read_jsonl(tmp_path / "gain.jsonl")[:16]:
        assert (row["rewrite_a"] is not None) == (row["clip_score"]["rewrite_a"] >= row["clip_score"]["alt"])
    assert_mistake(run_tool("filter_captions", shapes / "captions.jsonl", tmp_path / "x.jsonl", "--min-gain", 0), "clip_score")


def test_scoring_goes_on_where_it_was_killed(shapes, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_scores, "CHUNK", 4)
    args = ["--checkpoint", str(trained / "checkpoint.pt"), "--captions", str(shapes / "captions.jsonl"), "--image-root",
            str(shapes / "images"), "--workers", "0", "--output"]
    clip_scores.main([*args, str(tmp_path / "whole.jsonl")])
    whole, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl.part"
    stop, encode_texts = iter(range(3)), eval_zeroshot.Encoder.encode_texts

    def killed(*arguments):  # in the third chunk of four rows
        if next(stop) == 2:
            raise KeyboardInterrupt
        return encode_texts(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(eval_zeroshot.Encoder, "encode_texts", killed)
        with pytest.raises(KeyboardInterrupt):
            clip_scores.main([*args, str(tmp_path / "out.jsonl")])
    assert out.read_bytes() == b"".join(whole.splitlines(True)[:8])
    out.write_bytes(out.read_bytes() + whole.splitlines(True)[8] + b'{"torn')
    clip_scores.main([*args, str(tmp_path / "out.jsonl")])
    assert (tmp_path / "out.jsonl").read_bytes() == whole and not out.exists()
    out.write_bytes(b"")
    (tmp_path / "out.jsonl.settings.json").write_text("{}")
    os.remove(tmp_path / "out.jsonl")
    with pytest.raises(SystemExit):
        clip_scores.main([*args, str(tmp_path / "out.jsonl")])


def test_bf16_is_near_fp32(shapes, trained, tmp_path):
    """--precision bf16 rounds the towers and little else: the same recall, features a hundredth apart at most."""
    encoders = [eval_zeroshot.Encoder(*T.load_checkpoint(str(trained / "checkpoint.pt")), precision=p) for p in ("fp32", "bf16")]
    names, read = [row["image"] for row in read_jsonl(shapes / "captions.jsonl")], partial(T.open_image, str(shapes / "images"))
    for encode in (lambda encoder: encoder.encode_images(names, read), lambda encoder: encoder.encode_texts(names)):
        exact, rounded = map(encode, encoders)
        assert exact.dtype == rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
        assert (exact * rounded).sum(1).min() > 0.999
    found = []
    for precision in ("fp32", "bf16"):
        eval_retrieval.main(["--checkpoint", str(trained / "checkpoint.pt"), "--captions", str(shapes / "captions.jsonl"), "--device",
                             DEVICE, "--image-root", str(shapes / "images"), "--precision", precision, "--workers", "0", "--json",
                             str(tmp_path / "out.json")])
        found.append(json.loads((tmp_path / "out.json").read_text()))
    assert found[0]["t2i_r5"] == pytest.approx(found[1]["t2i_r5"], abs=0.1)


def test_rows_of_the_same_image_are_one(tmp_path):
    rows = [{"image": name, "alt": text} for name in ("a", "b") for text in ("one", "two", ["three", "four"])] + [{"image": "c"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names, texts, owner = eval_retrieval.read_captions(str(tmp_path / "rows.jsonl"), "alt")
    assert names == ["a", "b"] and len(texts) == 8 and owner.tolist() == [0] * 4 + [1] * 4


def test_a_folder_of_links_and_other_files(tmp_path):
    make_image(tmp_path / "elsewhere/cat/1.png")
    (tmp_path / "set/dog").mkdir(parents=True)
    (tmp_path / "set/cat").symlink_to(tmp_path / "elsewhere/cat")
    (tmp_path / "set/dog/2.PNG").symlink_to(tmp_path / "elsewhere/cat/1.png")
    (tmp_path / "set/dog/Thumbs.db").write_bytes(b"x")
    (tmp_path / "set/notes").mkdir()
    (tmp_path / "set/notes/readme.txt").write_text("x")
    for hidden in (".ipynb_checkpoints/3.png", "__MACOSX/4.png", "dog/._2.png"):
        make_image(tmp_path / "set" / hidden)
    part = classification_sets.read_set(f"imagefolder:{tmp_path / 'set'}", None)["test"]
    assert part.names == ["cat/1.png", "dog/2.PNG"] and part.labels == ["cat", "dog"]
    assert part.read("dog/2.PNG").size == (40, 40)
    (tmp_path / "set/dog/5.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would run Ghostscript
    with pytest.raises(OSError):
        part.read("dog/5.png")


def test_a_folder_inside_every_class_is_no_class(tmp_path):
    for name in ("cat", "big/dog"):
        make_image(tmp_path / name / "images/1.png")
    part = classification_sets.read_set(f"imagefolder:{tmp_path}", None)["test"]
    assert part.labels == ["big/dog", "cat"] and part.words == {"big/dog": "big dog", "cat": "cat"}


def test_class_names_go_by_what_a_class_is_called(tmp_path, capsys):
    """Not by its place in a sort, in which folder 10 comes before folder 2."""
    args = Namespace(classes="openai", templates="file", data_root=str(tmp_path))
    for number in range(1000):
        make_image(tmp_path / f"imagenet/val/{number}/0.png")
    part = classification_sets.read_set("imagenet1k", args)["test"]
    names = dict(zip(keys := sorted(set(part.labels)), classification_sets.class_names("imagenet1k", part, keys, args)))
    assert names["10"] == ["brambling"] and names["281"] == ["tabby cat"] and names["999"] == ["toilet paper"]
    (tmp_path / "eurosat").mkdir()
    fill_eurosat(tmp_path)
    os.rename(tmp_path / "eurosat/2750/River", tmp_path / "eurosat/2750/Water")
    part = classification_sets.read_set("eurosat", args)["test"]
    with pytest.raises(SystemExit) as stop:
        classification_sets.class_names("eurosat", part, sorted(set(part.labels)), args)
    assert stop.value.code == 2 and "no name for 1 classes, 'Water'" in capsys.readouterr().err
    names = classification_sets.published_names("caltech101", part)
    assert len(names) == 102 and names["yin_yang"] == "yin and yang symbol" and names["dollar_bill"] == "dollar bill"


def test_names_that_look_like_ids_are_told(tmp_path, capsys):
    make_image(tmp_path / "n01440764/0.png")
    part = classification_sets.read_set(f"imagefolder:{tmp_path}", None)["test"]
    classification_sets.class_names("x", part, ["n01440764"], Namespace(classes=None, templates="file"))
    assert "look like ids ('n01440764')" in capsys.readouterr().err


def test_weights_that_are_not_finite_score_nothing(shapes, trained, tmp_path, capsys):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    state["model"]["ln_final.weight"][:] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    arguments = ["--checkpoint", tmp_path / "nan.pt", "--image-root", shapes / "images", "--workers", 0, "--captions",
                 shapes / "captions.jsonl"]
    for done in (run("eval_retrieval.py", *arguments), run_tool("clip_scores", *arguments, "--output", tmp_path / "s.jsonl")):
        assert done.returncode == 2 and done.stderr.count("not finite") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "s.jsonl").exists()


def test_files_with_a_mark_and_a_terminal_of_ascii(shapes, trained, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + (shapes / "captions.jsonl").read_bytes())
    (tmp_path / "templates.txt").write_bytes("\ufeffa {}\n".encode())
    (tmp_path / "classes.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({c: f"{c} caf\u00e9" for c in COLOURS}).encode())
    common = ["--checkpoint", trained / "checkpoint.pt", "--image-root", shapes / "images", "--workers", 0]
    done = run("eval_zeroshot.py", *common, "--dataset", f"jsonl:{tmp_path}/rows.jsonl", "--templates", tmp_path / "templates.txt",
               "--classes", tmp_path / "classes.json")
    assert done.returncode == 0 and " 16" in done.stdout, done.stderr
    done = run_tool("search", *common, "--captions", tmp_path / "rows.jsonl", "--query", "caf\u00e9",
                    fresh=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "caf\\xe9" in done.stdout, done.stderr
    (tmp_path / "wide.jsonl").write_bytes((shapes / "captions.jsonl").read_text().encode("utf-16"))
    assert_mistake(run("eval_retrieval.py", *common, "--captions", tmp_path / "wide.jsonl"), "wide.jsonl", "UTF-16")


def test_a_killed_worker_is_told_in_one_line(shapes, trained, tmp_path):
    (tmp_path / "rows.jsonl").write_text((shapes / "captions.jsonl").read_text() * 2000)
    running = subprocess.Popen([sys.executable, str(ROOT / "eval_zeroshot.py"), "--checkpoint", str(trained / "checkpoint.pt"), "--dataset",
                                f"jsonl:{tmp_path}/rows.jsonl", "--image-root", str(shapes / "images"), "--workers", "1"],
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (worker := worker_of(running.pid)):
        assert running.poll() is None
    os.kill(worker, signal.SIGKILL)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 2 and "Traceback" not in stderr and "worker" in stderr.splitlines()[-1], stderr


def test_hits_of_images(shapes, trained, tmp_path):
    done = run("eval_retrieval.py", "--checkpoint", trained / "checkpoint.pt", "--captions", shapes / "captions.jsonl",
               "--image-root", shapes / "images", "--workers", 0, "--image-to-image", "--hits", tmp_path / "hits.jsonl")
    assert done.returncode == 0, done.stderr
    for row in read_jsonl(tmp_path / "hits.jsonl"):
        assert len(row["hits"]) == 10 and row["image"] not in [hit["image"] for hit in row["hits"]]
        assert [hit["correct"] for hit in row["hits"]] == [hit["image"].startswith(row["truth"]) for hit in row["hits"]]


@pytest.mark.parametrize("module, arguments, words", [
    (eval_zeroshot, ["--dataset", "imagefolder:missing"], ["missing"]),
    (eval_zeroshot, ["--dataset", "jsonl:missing.jsonl", "--image-root", "."], ["missing.jsonl"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}"], ["--image-root"]),
    (eval_zeroshot, ["--dataset", "ImageNoNet"], ["ImageNoNet", "imagefolder:"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}", "--image-root", ".", "--label", "kind"], ["kind"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}", "--image-root", ".", "--protocol", "linear"], ["--train"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}", "--image-root", ".", "--templates", "nowhere.txt"], ["nowhere.txt"]),
    (eval_zeroshot, ["--dataset", "imagefolder:{empty}"], ["empty"]),
    (eval_zeroshot, ["--dataset", "cifar10", "--data-root", "{empty}"], ["cifar10", "download=True"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}", "--image-root", ".", "--classes", "{classes}"], ["no name", "green"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}", "--image-root", ".", "--checkpoint", "{notok}"], ["tokenizer"]),
    (eval_retrieval, ["--captions", "{nolabel}", "--image-root", ".", "--image-to-image"], ["label"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--checkpoint", "{notok}"], ["tokenizer"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}", "--image-root", ".", "--templates", "{rows}"], ["{}"]),
    (eval_retrieval, ["--captions", "missing.jsonl", "--image-root", "."], ["missing.jsonl"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", "."], ["--image-root", "none of the images"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}", "--image-root", "."], ["--image-root", "none of the images"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--json", "{rows}"], ["is read"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--json", "{empty}"], ["can be written"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--json", "x.json", "--hits", "x.json"], ["two files"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--workers", "-1"], ["--workers", "0 or more"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--precision", "fp16"], ["--precision", "bf16"]),
    (search, ["--captions", "{rows}", "--image-root", "."], ["--query"]),
    (search, ["--captions", "missing.jsonl", "--image-root", ".", "--query", "a"], ["missing.jsonl"]),
    (search, ["--captions", "{rows}", "--image-root", ".", "--query", "a", "--hits", "{rows}"], ["is read"]),
    (clip_scores, ["--captions", "{rows}", "--image-root", "."], ["--output"]),
    (clip_scores, ["--captions", "{rows}", "--image-root", ".", "--output", "{rows}"], ["is read"]),
    (clip_scores, ["--captions", "{rows}", "--image-root", "missing", "--output", "x.jsonl"], ["missing"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", "missing"], ["missing"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--field", "vecap"], ["vecap"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--checkpoint", "missing.pt"], ["missing.pt"]),
], ids=lambda value: str(value)[:60])
def test_mistakes(shapes, trained, module, arguments, words, capfd, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes.json").write_text('{"blue": "blue"}')
    (tmp_path / "nolabel.jsonl").write_text('{"image": "a.png", "alt": "a"}\n')
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "tokenizer"}, tmp_path / "notok.pt")
    names = {"{rows}": shapes / "captions.jsonl", "{empty}": tmp_path / "empty", "{classes}": tmp_path / "classes.json",
             "{nolabel}": tmp_path / "nolabel.jsonl", "{notok}": tmp_path / "notok.pt"}
    for name, path in names.items():
        arguments = [a.replace(name, str(path)) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        module.main(["--checkpoint", str(trained / "checkpoint.pt"), *arguments])
    assert_mistake(subprocess.CompletedProcess([], stop.value.code, stderr=capfd.readouterr().err), *words)
