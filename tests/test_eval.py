"""eval_zeroshot.py and eval_retrieval.py: equal to the field's tools and to plain references."""
import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

import eval_retrieval
import eval_zeroshot
import train_clip as T
from conftest import COLOURS, DEVICE, ROOT, assert_mistake, read_jsonl, run, worker_of
from data import clip_scores, search
from data.logistic_regression import LogisticRegression as OurLogisticRegression
from tools import run_tool


@pytest.mark.parametrize("script, most", [
    ("eval_zeroshot.py", 270), ("eval_retrieval.py", 210), ("data/classification_sets.py", 350),
    ("data/evaluation.py", 200), ("data/class_names.py", 150), ("data/search.py", 100),
    ("data/logistic_regression.py", 50), ("tests/test_eval.py", 600)])
def test_sizes(script, most):
    text = (ROOT / script).read_text()
    assert text.count("\n") <= most and max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


# --- equality with plain references ---------------------------------------------------------------

def generator(seed):
    return torch.Generator().manual_seed(seed)


def features(n, d=6, seed=0):
    return F.normalize(torch.randn(n, d, generator=generator(seed)), dim=-1)


def coarse(n, d=6, seed=0):
    """Features whose products are exact in any order of summing, and often the same."""
    x = torch.randint(-3, 4, (n, d), generator=generator(seed)) / 16
    return x.index_fill(0, (x == 0).all(1).nonzero()[:, 0], 1 / 16)


def plain_order(query, keys):
    """Indices of the keys, the most similar first; of equal ones the earlier first."""
    return sorted(range(len(keys)), key=lambda i: (-float(query @ keys[i]), i))


@pytest.mark.parametrize("block", [3, 1000])
def test_accuracies_equal_a_sort(block):
    images, weights = features(50), features(13, seed=1)
    targets = torch.randint(0, 12, (50,), generator=generator(2))
    targets[:12] = torch.arange(12)  # every class but the last has an image
    orders = [plain_order(image, weights) for image in images]
    found = eval_zeroshot.accuracies(images, weights, targets, block)
    for k in (1, 5, 10):
        right = [int(t) in order[:k] for t, order in zip(targets, orders)]
        assert found[f"top{k}"] == pytest.approx(sum(right) / 50)
    per_class = [[c == order[0] for t, order in zip(targets, orders) if t == c] for c in range(12)]
    mean = sum(sum(hits) / len(hits) for hits in per_class) / 13  # the last class counts as wrong
    assert found["mean_per_class"] == pytest.approx(mean)
    assert found["largest_class"] == max(map(len, per_class)) / 50 and found["chance"] == 1 / 13


def test_equal_scores_and_unreadable_images_are_defined():
    same = torch.ones(3, 4) / 2
    found = eval_zeroshot.accuracies(same, same, torch.tensor([0, 1, 2]))
    assert found["top1"] == pytest.approx(1 / 3) and found["top5"] == 1  # the first class wins
    unreadable = torch.cat([same[:2], torch.zeros(1, 4)])
    found = eval_zeroshot.accuracies(unreadable, same, torch.tensor([0, 0, 0]))
    assert found["top10"] == pytest.approx(2 / 3)


def owners(images, texts, seed=3):
    """Which image each text belongs to, at least one each."""
    more = torch.randint(0, images, (texts - images,), generator=generator(seed))
    return torch.sort(torch.cat([torch.arange(images), more])).values


def recalls(images, texts, owner):
    return eval_retrieval.recalls(*eval_retrieval.places_both_ways(images, texts, owner), owner)


@pytest.mark.parametrize("block", [100, 2 ** 25])
def test_recalls_equal_a_sort_with_any_number_of_texts_an_image(block, monkeypatch):
    monkeypatch.setattr(eval_retrieval, "SIMILARITIES", block)
    images, texts, owner = coarse(20), coarse(47, seed=1), owners(20, 47)
    texts[5] = texts[9]  # a caption that stands twice
    found = recalls(images, texts, owner)
    for k in (1, 5, 10):
        i2t = [any(int(owner[t]) == i for t in plain_order(image, texts)[:k])
               for i, image in enumerate(images)]
        t2i = [int(owner[t]) in plain_order(text, images)[:k] for t, text in enumerate(texts)]
        assert found[f"i2t_r{k}"] == pytest.approx(sum(i2t) / 20)
        assert found[f"t2i_r{k}"] == pytest.approx(sum(t2i) / 47)


def test_chance_is_what_random_features_get():
    owner = torch.arange(10).repeat_interleave(3)
    found = [recalls(features(10, seed=s), features(30, seed=s + 1000), owner) for s in range(400)]
    for name in ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"):
        mean = sum(metrics[name] for metrics in found) / len(found)
        assert mean == pytest.approx(found[0][f"{name}_chance"], abs=0.03)


def test_an_unreadable_image_finds_nothing_is_not_found_and_is_in_nobodys_way():
    images = features(4)
    images[2] = 0
    found = recalls(images, -images, torch.arange(4))  # the right ones have -1, the unreadable 0
    assert found["i2t_r10"] == found["t2i_r10"] == 0.75  # though k is larger than the index
    hits = list(search.best_images(-images[:1], images))
    assert sorted(hits[0][1]) == [0, 1, 3]


def test_the_best_images_equal_a_sort(monkeypatch):
    monkeypatch.setattr(search, "SIMILARITIES", 60)
    images = coarse(20)
    for i, (_, indices) in enumerate(search.best_images(images, images, k=5, leave_out=True)):
        order = [j for j in plain_order(images[i], images) if j != i]
        products = [float(images[i] @ images[j]) for j in indices]
        assert i not in indices and products == [float(images[i] @ images[j]) for j in order[:5]]


@pytest.mark.parametrize("block", [30, 2 ** 25])
def test_average_precision_equals_its_definition(block, monkeypatch):
    monkeypatch.setattr(eval_retrieval, "SIMILARITIES", block)
    images, labels = coarse(30), torch.randint(0, 6, (30,), generator=generator(4))
    labels[7] = 99  # the only one of its label
    images[3] = 0  # unreadable
    images[11] = images[12]  # an image that is there twice
    found = eval_retrieval.average_precisions(images, labels)
    for q in range(30):
        order = sorted((i for i in range(30) if i != q),
                       key=lambda i: (i == 3, -float(images[q] @ images[i]), i))
        places = [place for place, i in enumerate(order, 1) if labels[i] == labels[q]]
        if q == 7:
            assert math.isnan(found[q])
        elif q == 3:
            assert found[q] == 0
        else:
            mean = sum(n / place for n, place in enumerate(places, 1)) / len(places)
            assert found[q] == pytest.approx(mean, abs=1e-9)


def test_fewshot_equals_a_plain_loop():
    x, targets = features(200, 16), torch.arange(200) % 9
    targets[-3:] = 40  # too few images for an episode
    draw = partial(eval_zeroshot.draw_episodes, targets, images=11, episodes=70, seed=1)
    episodes, right = draw(ways=5), []
    assert episodes.shape == (70, 5, 11) and len(episodes.unique()) > 190
    for episode in episodes:
        classes = [targets[images].unique().tolist() for images in episode]
        assert all(len(c) == 1 and c != [40] for c in classes)
        assert len({c[0] for c in classes}) == 5
        assert len(set(episode.flatten().tolist())) == 55  # no image twice
        centre = torch.stack([x[i] for images in episode for i in images[:5]]).mean(0)
        unit = lambda v: v / v.norm()
        prototypes = [unit(sum(unit(x[i] - centre) for i in images[:5]) / 5) for images in episode]
        guesses = [(max(range(5), key=lambda w: float(prototypes[w] @ unit(x[i] - centre))), way)
                   for way, images in enumerate(episode) for i in images[5:]]
        right.append(sum(guess == way for guess, way in guesses) / 30)
    found, mean = eval_zeroshot.fewshot(x, episodes), sum(right) / 70
    assert found["fewshot_mean"] == pytest.approx(mean, abs=1e-6)
    variance = sum((r - mean) ** 2 for r in right) / 69
    assert found["fewshot_ci95"] == pytest.approx(1.96 * (variance / 70) ** 0.5, abs=1e-6)
    assert torch.equal(episodes, draw(ways=5)) and draw(ways=10) is None


# --- equality with the field's tools --------------------------------------------------------------

class AsClipBenchmark:
    """Our model as clip-benchmark calls one."""

    def __init__(self, model):
        self.encode_image, self.encode_text = model.encode_image, model.encode_text


def test_recall_equals_clip_benchmark(shapes, trained):
    model, tokenizer, transform = T.load_checkpoint(str(trained / "checkpoint.pt"))
    rows = [(row["image"], [row["alt"], row["rewrite_a"]])
            for row in read_jsonl(shapes / "captions.jsonl")] * 2
    read = partial(T.open_image, str(shapes / "images"))
    images = [transform(T.to_rgb(read(name))) for name, _ in rows]
    batches = [(torch.stack(images[i:i + 8]), [texts for _, texts in rows[i:i + 8]])
               for i in range(0, 32, 8)]
    theirs = zeroshot_retrieval.evaluate(AsClipBenchmark(model), batches, tokenizer, "cpu",
                                         amp=False, recall_k_list=[5, 10])
    encoder = eval_zeroshot.Encoder(model, tokenizer, transform, batch_size=8)
    images = encoder.encode_images([name for name, _ in rows], read)
    texts = encoder.encode_texts([text for _, both in rows for text in both])
    ours = recalls(images, texts, torch.arange(32).repeat_interleave(2))
    for k in (5, 10):  # all is there twice, so recall@1 depends on how ties are broken
        found = [ours[f"t2i_r{k}"], ours[f"i2t_r{k}"]]
        assert found == pytest.approx([theirs[f"image_retrieval_recall@{k}"],
                                       theirs[f"text_retrieval_recall@{k}"]], abs=1e-6)
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
    theirs = zeroshot_classification.zero_shot_classifier(AsClipBenchmark(model), tokenizer, names,
                                                          templates, "cpu", amp=False)
    ours = eval_zeroshot.classifier(eval_zeroshot.Encoder(model, tokenizer, None).encode_texts,
                                    [[name] for name in names],
                                    [template.replace("{c}", "{}") for template in templates])
    torch.testing.assert_close(ours, theirs.T, atol=1e-6, rtol=1e-5)
    x, weights, y = features(500, 8), features(20, 8, seed=1), torch.arange(500) % 20
    scores, found = (x @ weights.T).numpy(), eval_zeroshot.accuracies(x, weights, y)
    for k in (1, 5, 10):  # clip-benchmark's own function for this fails with today's numpy
        assert found[f"top{k}"] == pytest.approx(top_k_accuracy_score(y, scores, k=k), abs=1e-6)
    balanced = balanced_accuracy_score(y, scores.argmax(1))
    assert found["mean_per_class"] == pytest.approx(balanced, abs=1e-6)


def sklearn_probe(x, y, penalty, tol=1e-10):
    probe = LogisticRegression(C=1 / (penalty * len(x)), tol=tol, max_iter=10_000)
    return probe.fit(x.numpy(), y.numpy())


def test_linear_probe_equals_scikit_learn():
    x, y = features(400, 10).double(), torch.arange(400) % 5
    x += 0.8 * features(5, 10, seed=9).double()[y]
    for penalty in (1e-1, 1e-3):
        theirs = sklearn_probe(x, y, penalty)
        ours = OurLogisticRegression(10, 5, dtype=torch.float64)
        ours.fit(x, y, penalty, tolerance=1e-10, block=150)
        close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-6)
        close(ours.weight.detach(), torch.from_numpy(theirs.coef_))
        probabilities = (x @ ours.weight.T + ours.bias).softmax(1).detach()
        close(probabilities, torch.from_numpy(theirs.predict_proba(x.numpy())))
    train, val, test = ((x[start:end], y[start:end])
                        for start, end in ((0, 240), (240, 320), (320, 400)))
    probe, best = eval_zeroshot.linear_probe(train, val, 5)
    accuracy = {p: sklearn_probe(*train, p, 1e-8).score(val[0].numpy(), val[1].numpy())
                for p in eval_zeroshot.PENALTIES}
    assert best == max(eval_zeroshot.PENALTIES, key=accuracy.get)
    both = sklearn_probe(x[:320], y[:320], best, 1e-8)
    assert (probe.predict(test[0]).numpy() == both.predict(test[0].numpy())).all()


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts(trained):
    model, tokenizer, _ = T.load_checkpoint(str(trained / "checkpoint.pt"))
    encode_texts = eval_zeroshot.Encoder(model, tokenizer, None).encode_texts
    weights = eval_zeroshot.classifier(encode_texts, [["red bar"], ["blue cross", "cross"]],
                                       ["a {}", "one {} here"])
    prompts_of = [["a red bar", "one red bar here"],
                  ["a blue cross", "one blue cross here", "a cross", "one cross here"]]
    for found, prompts in zip(weights, prompts_of):
        with torch.inference_mode():
            each = torch.cat([model.encode_text(tokenizer([prompt])) for prompt in prompts])
        mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
        torch.testing.assert_close(found, mean / mean.norm(), atol=1e-5, rtol=1e-5)


# --- end to end -----------------------------------------------------------------------------------

@pytest.fixture
def common(shapes, trained):
    """The options that all commands share."""
    return ["--checkpoint", trained / "checkpoint.pt", "--image-root", shapes / "images",
            "--workers", 0, "--precision", "fp32", "--device", DEVICE]


def class_folders(shapes, root, numbers=(0,)):
    """The shapes in a folder for each colour, turned a little for each number. -> the spec"""
    for row in read_jsonl(shapes / "captions.jsonl"):
        image = Image.open(shapes / "images" / row["image"])
        (root / row["label"]).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            turned = image.rotate(3 * number, fillcolor="white")
            turned.save(root / row["label"] / f"{number}-{row['image']}")
    return f"imagefolder:{root}"


def test_zeroshot_as_a_user(shapes, common, tmp_path):
    folder, file = class_folders(shapes, tmp_path / "folder"), f"jsonl:{tmp_path / 'rows.jsonl'}"
    (tmp_path / "templates.txt").write_text("{} square\n{} bar\n{} cross\n{} frame\n")
    (tmp_path / "rows.jsonl").write_text(
        (shapes / "captions.jsonl").read_text() +
        '{"image": "gone.png", "label": "red"}\n{"image": "no-label.png"}\nno row\n')
    done = run("eval_zeroshot.py", *common, "--dataset", folder, file, "--templates",
               tmp_path / "templates.txt", "--json", tmp_path / "out.json", fresh=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found[folder]["top1"] >= 0.8 and found[folder]["classes"] == len(COLOURS)
    assert found[folder]["images"] == 16 and found[file]["images"] == 17
    assert found[file]["unreadable"] == 1 and "unreadable: gone.png" in done.stderr
    assert "1 of 17 images are unreadable" in done.stderr and "no-label.png" in done.stderr
    assert "line 19" in done.stderr
    # never dropped from the denominator
    assert found[file]["top1"] == pytest.approx(found[folder]["top1"] * 16 / 17)
    assert "top1" in done.stdout and folder in done.stdout and "precision: fp32" in done.stdout


def test_what_a_set_loses_is_told_and_stays_in_the_set(shapes, common, tmp_path):
    """A class without an image, classes of one name, a class that is not in the training part."""
    spec, train = class_folders(shapes, tmp_path / "test"), tmp_path / "train"
    class_folders(shapes, train, range(3))
    (tmp_path / "test/light_purple").mkdir()
    shutil.rmtree(train / "yellow")
    for name in ("Red", "red ", "re_d"):
        shutil.copytree(tmp_path / "test/red", tmp_path / "test" / name)
    done = run("eval_zeroshot.py", *common, "--dataset", spec, "--train", f"imagefolder:{train}",
               "--protocol", "zeroshot", "fewshot", "linear", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "out.json").read_text()).values()
    assert found["classes"] == 8 and found["chance"] == 1 / 8 and found["images"] == 28
    assert found["mean_per_class"] == pytest.approx(found["top1"] * 7 / 8)
    for said in ("1 of 8 classes have no image to test", "light_purple",
                 "'Red' = 're_d' = 'red' = 'red '", "no image of 5 of 8 classes", "yellow",
                 "8 of 8 classes have fewer than 11 images", "no episodes"):
        assert said in done.stderr
    assert found["linear_top1"] <= 12 / 28  # of the classes that are in the training part


def test_retrieval_as_a_user(shapes, common, tmp_path):
    common += ["--captions", shapes / "captions.jsonl"]
    done = run("eval_retrieval.py", *common, "--json", tmp_path / "out.json", "--hits",
               tmp_path / "hits.jsonl", fresh=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["t2i_r1"] >= 0.8 and found["i2t_r1"] >= 0.8 and found["t2i_r1_chance"] == 1 / 16
    hits = read_jsonl(tmp_path / "hits.jsonl")
    right = [row["hits"][0]["image"] == row["truth"] for row in hits]
    assert len(hits) == 16 and sum(right) / 16 == found["t2i_r1"]
    done = run_tool("search", *common, "--query", "blue square", "red cross", "--hits",
                    tmp_path / "found.jsonl")
    lines, queries = done.stdout.splitlines(), read_jsonl(tmp_path / "found.jsonl")
    assert lines[::6] == ["blue square", "red cross"] and len(lines) == 12
    assert [row["query"] for row in queries] == ["blue square", "red cross"]
    assert {len(row["hits"]) for row in queries} == {10}
    assert queries[0]["hits"][0]["image"] == "blue-square.png" == lines[1].split()[1]


def test_hits_of_images_and_labels_that_are_alike(shapes, common, tmp_path):
    rows = read_jsonl(shapes / "captions.jsonl")
    rows[0]["label"], rows[1]["label"], rows[2]["label"] = "red ", "RED", "odd"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("eval_retrieval.py", *common, "--captions", tmp_path / "rows.jsonl",
               "--image-to-image", "--hits", tmp_path / "hits.jsonl", "--json", tmp_path / "j.json")
    assert done.returncode == 0, done.stderr
    for said in ("white space are one class: 'red' = 'red '",
                 "blanks or case alone", "'RED' = 'red'",
                 "2 images are alone with their label and no queries: RED, odd"):
        assert said in done.stderr
    assert json.loads((tmp_path / "j.json").read_text())["labels"] == 6
    label = {row["image"]: row["label"].strip() for row in rows}
    for row in read_jsonl(tmp_path / "hits.jsonl"):
        images = [hit["image"] for hit in row["hits"]]
        assert len(images) == 10 and row["image"] not in images
        assert [hit["correct"] for hit in row["hits"]] == [label[i] == row["truth"] for i in images]


def test_every_protocol_is_the_same_for_any_number_of_ranks(shapes, common, tmp_path):
    test = class_folders(shapes, tmp_path / "test", range(8, 12))
    train = class_folders(shapes, tmp_path / "train", range(8))
    (tmp_path / "test/red/broken.png").write_bytes(b"no image")
    arguments = [*common, "--dataset", test, "--train", train, "--protocol", "zeroshot", "fewshot",
                 "linear", "--ways", 3, "--batch-size", 7, "--workers", 1, "--device", "cpu"]
    found = []
    for ranks in (None, 2, 3):
        done = run("eval_zeroshot.py", *arguments, "--json", tmp_path / f"{ranks}.json",
                   ranks=ranks, fresh=ranks == 3)
        assert done.returncode == 0 and "broken.png" in done.stderr, done.stderr
        assert done.stderr.count("1 of 65 images are unreadable") == 1
        found.append((tmp_path / f"{ranks}.json").read_text())
    assert found[0] == found[1] == found[2]
    (metrics,) = json.loads(found[0]).values()
    assert metrics["linear_top1"] > 0.9 and metrics["fewshot_mean"] > 0.6
    assert metrics["unreadable"] == 1 and metrics["images"] == 65
    assert metrics["linear_top1"] <= 64 / 65  # the unreadable one is in the denominator


def test_retrieval_is_the_same_for_any_number_of_ranks(shapes, common, tmp_path):
    rows = [{**row, "alt": [row["alt"], row["rewrite_a"]], "domain": row["image"].split("-")[1]}
            for row in read_jsonl(shapes / "captions.jsonl")]
    rows.append({"image": "gone.png", "alt": "nothing", "label": "red", "domain": 7})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*common, "--captions", tmp_path / "rows.jsonl", "--batch-size", 3, "--workers", 1,
                 "--device", "cpu"]
    retrieve = partial(run, "eval_retrieval.py")
    for launch, way, world in ((retrieve, ["--json"], 3),
                               (retrieve, ["--image-to-image", "--json"], 2),
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
            assert metrics["images"] == 17 and metrics["map"] > 0.5 and metrics["alone"] == 0
            assert "map_bar.png" in metrics and metrics["map_7"] == 0


def test_bf16_is_near_fp32(shapes, trained, common, tmp_path):
    """bf16 rounds the towers and little else: the same recall, features a hundredth apart."""
    encoders = [eval_zeroshot.Encoder(*T.load_checkpoint(str(trained / "checkpoint.pt")),
                                      precision=precision) for precision in ("fp32", "bf16")]
    names = [row["image"] for row in read_jsonl(shapes / "captions.jsonl")]
    read = partial(T.open_image, str(shapes / "images"))
    for encode in (lambda encoder: encoder.encode_images(names, read),
                   lambda encoder: encoder.encode_texts(names)):
        exact, rounded = map(encode, encoders)
        assert exact.dtype == rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
        assert (exact * rounded).sum(1).min() > 0.999


@pytest.mark.parametrize("capabilities, precision", [({"avx512_bf16": True}, "bf16"),
                                                     ({"avx2": True}, "fp32")])
def test_the_hardware_picks_the_precision(shapes, common, monkeypatch, capsys, capabilities,
                                          precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    eval_retrieval.main([*map(str, common), "--captions", str(shapes / "captions.jsonl"),
                         "--precision", "auto", "--device", "cpu"])
    assert f"precision: {precision}" in capsys.readouterr().out


def test_rows_of_the_same_image_are_one(tmp_path):
    rows = [{"image": name, "alt": text} for name in ("a", "b")
            for text in ("one", "two", ["three", "four"])] + [{"image": "c"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names, texts, owner = eval_retrieval.read_captions(str(tmp_path / "rows.jsonl"), "alt")
    assert names == ["a", "b"] and len(texts) == 8 and owner.tolist() == [0] * 4 + [1] * 4


def test_an_absolute_path_inside_the_root_is_that_image(shapes, common, tmp_path):
    rows = read_jsonl(shapes / "captions.jsonl")
    for row in rows[:-1]:
        row["image"] = str(shapes / "images" / row["image"])
    rows[-1]["image"] = "/etc/hostname"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("eval_retrieval.py", *common, "--captions", tmp_path / "rows.jsonl")
    assert done.returncode == 0 and "16 images, 16 texts of alt, 1 unreadable" in done.stdout
    assert "unreadable: /etc/hostname" in done.stderr and "outside --image-root" in done.stderr
    (tmp_path / "elsewhere").mkdir()
    assert_mistake(run("eval_retrieval.py", *common, "--captions", tmp_path / "rows.jsonl",
                       "--image-root", tmp_path / "elsewhere"), "outside --image-root")


def test_weights_that_are_not_finite_score_nothing(shapes, trained, common, tmp_path):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    state["model"]["ln_final.weight"][:] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    done = run("eval_retrieval.py", *common, "--captions", shapes / "captions.jsonl",
               "--checkpoint", tmp_path / "nan.pt")
    assert_mistake(done, "not finite")


def test_files_with_a_mark_and_a_terminal_of_ascii(shapes, common, tmp_path):
    mark, captions = b"\xef\xbb\xbf", (shapes / "captions.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(mark + captions)
    (tmp_path / "templates.txt").write_bytes(mark + b"a {}\n")
    classes = {colour: f"{colour} caf\u00e9" for colour in COLOURS}
    (tmp_path / "classes.json").write_bytes(mark + json.dumps(classes).encode())
    done = run("eval_zeroshot.py", *common, "--dataset", f"jsonl:{tmp_path}/rows.jsonl",
               "--templates", tmp_path / "templates.txt", "--classes", tmp_path / "classes.json")
    assert done.returncode == 0 and " 16" in done.stdout, done.stderr
    done = run_tool("search", *common, "--captions", tmp_path / "rows.jsonl", "--query",
                    "caf\u00e9", fresh=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "caf\\xe9" in done.stdout, done.stderr


def test_a_killed_worker_is_told_in_one_line(shapes, common, tmp_path):
    (tmp_path / "rows.jsonl").write_text((shapes / "captions.jsonl").read_text() * 2000)
    command = [sys.executable, str(ROOT / "eval_zeroshot.py"), *map(str, common), "--workers", "1",
               "--dataset", f"jsonl:{tmp_path}/rows.jsonl"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               text=True)
    while not (worker := worker_of(running.pid)):
        assert running.poll() is None
    os.kill(worker, signal.SIGKILL)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 2 and "Traceback" not in stderr, stderr
    assert "worker" in stderr.splitlines()[-1]


@pytest.mark.parametrize("module, arguments, words", [
    (eval_zeroshot, "--dataset imagefolder:missing", ["missing"]),
    (eval_zeroshot, "--dataset jsonl:missing.jsonl --image-root .", ["missing.jsonl"]),
    (eval_zeroshot, "--dataset jsonl:{rows}", ["--image-root"]),
    (eval_zeroshot, "--dataset ImageNoNet", ["ImageNoNet", "imagefolder:"]),
    (eval_zeroshot, "--dataset imagefolder:{empty}", ["empty"]),
    (eval_zeroshot, "--dataset cifar10 --data-root {empty}", ["cifar10", "download=True"]),
    (eval_zeroshot, "--dataset jsonl:{wide} --image-root .", ["wide.jsonl", "UTF-16"]),
    (eval_zeroshot, "{set}", ["--image-root", "none of the images"]),
    (eval_zeroshot, "{set} --label kind", ["kind"]),
    (eval_zeroshot, "{set} --protocol linear", ["--train"]),
    (eval_zeroshot, "{set} --templates nowhere.txt", ["nowhere.txt"]),
    (eval_zeroshot, "{set} --templates {rows}", ["{}"]),
    (eval_zeroshot, "{set} --classes {classes}", ["no name", "green"]),
    (eval_zeroshot, "{set} --checkpoint {notok}", ["tokenizer", "data.convert_checkpoint"]),
    (eval_zeroshot, "{set} --checkpoint {rows}", ["python -m data.convert_checkpoint"]),
    (eval_zeroshot, "{set} --checkpoint {weights}", ["python -m data.convert_checkpoint"]),
    (eval_retrieval, "{all} --checkpoint {empty}", ["python -m data.convert_checkpoint"]),
    (search, "{all} --query a --checkpoint {blob}", ["python -m data.convert_checkpoint"]),
    (eval_retrieval, "{all} --checkpoint {run}", ["run/checkpoint.pt"]),
    (eval_retrieval, "{all} --checkpoint {broken}", ["broken.pt", "damaged"]),
    (eval_retrieval, "{all} --checkpoint missing.pt", ["missing.pt"]),
    (eval_retrieval, "--captions {nolabel} --image-root . --image-to-image", ["label"]),
    (eval_retrieval, "--captions missing.jsonl --image-root .", ["missing.jsonl"]),
    (eval_retrieval, "--captions {array} --image-root .", ["array.json", "JSON array"]),
    (eval_retrieval, "--captions {rows} --image-root missing", ["missing"]),
    (eval_retrieval, "{all}", ["--image-root", "none of the images"]),
    (eval_retrieval, "{all} --json {rows}", ["is read"]),
    (eval_retrieval, "{all} --json {empty}", ["can be written"]),
    (eval_retrieval, "{all} --json x.json --hits x.json", ["two files"]),
    (eval_retrieval, "{all} --workers -1", ["--workers", "0"]),
    (eval_retrieval, "{all} --precision fp16", ["--precision", "bf16"]),
    (eval_retrieval, "{all} --field vecap", ["vecap"]),
    (search, "{all}", ["--query"]), (search, "{all} --query a --hits {rows}", ["is read"]),
    (clip_scores, "{all}", ["--output"]), (clip_scores, "{all} --output {rows}", ["is read"]),
    (eval_zeroshot, "--dataset imagefolder:{parts}", ["train, val", "name one"]),
])
def test_mistakes(shapes, trained, module, arguments, words, capfd, tmp_path):
    paths = {name: tmp_path / name for name in ("empty", "run", "blob", "parts")}
    for part in ("train", "val"):
        class_folders(shapes, paths["parts"] / part)
    paths |= {"rows": shapes / "captions.jsonl", "wide": tmp_path / "wide.jsonl",
              "array": tmp_path / "array.json", "classes": tmp_path / "classes.json",
              "nolabel": tmp_path / "nolabel.jsonl", "notok": tmp_path / "notok.pt",
              "weights": tmp_path / "model.safetensors", "broken": tmp_path / "broken.pt"}
    paths["empty"].mkdir()
    shutil.copytree(trained, paths["run"])
    paths["classes"].write_text('{"blue": "blue"}')
    paths["nolabel"].write_text('{"image": "a.png", "alt": "a"}\n')
    paths["wide"].write_bytes(paths["rows"].read_text().encode("utf-16"))
    paths["array"].write_text(json.dumps(read_jsonl(paths["rows"])))
    content = bytearray((trained / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    paths["broken"].write_bytes(content)
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    for name in ("weights", "blob"):
        save_file(state["model"], paths[name])
    del state["tokenizer"]
    torch.save(state, paths["notok"])
    arguments = arguments.replace("{set}", "--dataset jsonl:{rows} --image-root .")
    arguments = arguments.replace("{all}", "--captions {rows} --image-root .")
    for name, path in paths.items():
        arguments = arguments.replace("{%s}" % name, str(path))
    with pytest.raises(SystemExit) as stop:
        module.main(["--checkpoint", str(trained / "checkpoint.pt"), *arguments.split()])
    stderr = capfd.readouterr().err
    assert_mistake(subprocess.CompletedProcess([], stop.value.code, stderr=stderr), *words)
