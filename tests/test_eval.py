"""eval_zeroshot.py and eval_retrieval.py: equal to plainly written references, and right on a model that has learned."""
import json
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F

import eval_retrieval
import eval_zeroshot
import train_clip as T
from conftest import COLOURS, assert_mistake, read_jsonl, run


# --- equality with plain references -----------------------------------------------------------------------------------

def features(n, d=6, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


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


def test_recalls_equal_a_sort_with_any_number_of_texts_an_image():
    images, texts = features(20), features(47, seed=1)
    texts[5] = texts[9]  # a caption that stands twice
    owner = torch.sort(torch.cat([torch.arange(20), torch.randint(0, 20, (27,), generator=torch.Generator().manual_seed(3))])).values
    found = eval_retrieval.recalls(images, texts, owner)
    for k in (1, 5, 10):
        i2t = [any(int(owner[t]) == i for t in plain_order(image, texts)[:k]) for i, image in enumerate(images)]
        t2i = [int(owner[t]) in plain_order(text, images)[:k] for t, text in enumerate(texts)]
        assert found[f"i2t_r{k}"] == pytest.approx(sum(i2t) / 20) and found[f"t2i_r{k}"] == pytest.approx(sum(t2i) / 47)


def test_blocks_do_not_change_ranks():
    images, texts = features(30), features(30, seed=1)
    own = lambda start, end: torch.eye(30, dtype=torch.bool)[start:end]
    assert torch.equal(eval_retrieval.rank_of_own(images, texts, own, block=7), eval_retrieval.rank_of_own(images, texts, own))


def test_chance_is_what_random_features_get():
    owner = torch.arange(10).repeat_interleave(3)
    found = [eval_retrieval.recalls(features(10, seed=s), features(30, seed=s + 1000), owner) for s in range(400)]
    for way in ("i2t", "t2i"):
        for k in (1, 5, 10):
            mean = sum(f[f"{way}_r{k}"] for f in found) / len(found)
            assert mean == pytest.approx(found[0][f"{way}_r{k}_chance"], abs=0.03)


def test_an_unreadable_image_finds_nothing_and_is_not_found():
    images = features(4)
    images[2] = 0
    found = eval_retrieval.recalls(images, images.clone(), torch.arange(4))
    assert found["i2t_r10"] == found["t2i_r10"] == 0.75  # though k is larger than the index


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts(trained):
    model, tokenizer, _ = T.load_checkpoint(str(trained / "checkpoint.pt"))
    weights = eval_zeroshot.classifier(model, tokenizer, [["red bar"], ["blue cross", "cross"]], ["a {}", "one {} here"])
    with torch.inference_mode():
        for found, prompts in zip(weights, [["a red bar", "one red bar here"],
                                            ["a blue cross", "one blue cross here", "a cross", "one cross here"]]):
            each = torch.cat([model.encode_text(tokenizer([prompt])) for prompt in prompts])
            mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
            torch.testing.assert_close(found, mean / mean.norm(), atol=1e-5, rtol=1e-5)


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
               shapes / "images", "--templates", tmp_path / "templates.txt", "--workers", 1, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found[folder]["top1"] >= 0.8 and found[folder]["classes"] == len(COLOURS) and found[folder]["images"] == 16
    assert found[file]["images"] == 17 and found[file]["unreadable"] == 1 and "gone.png" in done.stderr
    assert found[file]["top1"] == pytest.approx(found[folder]["top1"] * 16 / 17)  # never dropped from the denominator
    assert "top1" in done.stdout and folder in done.stdout


def test_retrieval_as_a_user(shapes, trained, tmp_path):
    arguments = ["--checkpoint", trained / "checkpoint.pt", "--captions", shapes / "captions.jsonl", "--image-root",
                 shapes / "images", "--workers", 1]
    done = run("eval_retrieval.py", *arguments, "--json", tmp_path / "out.json", "--hits", tmp_path / "hits.jsonl")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["t2i_r1"] >= 0.8 and found["i2t_r1"] >= 0.8 and found["t2i_r1_chance"] == 1 / 16
    hits = read_jsonl(tmp_path / "hits.jsonl")
    assert len(hits) == 16 and sum(row["hits"][0]["image"] == row["truth"] for row in hits) / 16 == found["t2i_r1"]
    done = run("eval_retrieval.py", *arguments, "--query", "blue square", "red cross")
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["blue square", "red cross"] and len(lines) == 12


@pytest.mark.parametrize("module, arguments, words", [
    (eval_zeroshot, ["--dataset", "imagefolder:missing"], ["missing"]),
    (eval_zeroshot, ["--dataset", "jsonl:missing.jsonl", "--image-root", "."], ["missing.jsonl"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}"], ["--image-root"]),
    (eval_zeroshot, ["--dataset", "ImageNoNet"], ["ImageNoNet", "imagefolder:"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}", "--image-root", ".", "--label", "kind"], ["kind"]),
    (eval_zeroshot, ["--dataset", "jsonl:{rows}", "--image-root", ".", "--templates", "{rows}"], ["{}"]),
    (eval_retrieval, ["--captions", "missing.jsonl", "--image-root", "."], ["missing.jsonl"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", "missing"], ["missing"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--field", "vecap"], ["vecap"]),
    (eval_retrieval, ["--captions", "{rows}", "--image-root", ".", "--checkpoint", "missing.pt"], ["missing.pt"]),
], ids=lambda value: str(value)[:60])
def test_mistakes(shapes, trained, module, arguments, words, capfd):
    arguments = [a.replace("{rows}", str(shapes / "captions.jsonl")) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        module.main(["--checkpoint", str(trained / "checkpoint.pt"), *arguments])
    assert_mistake(subprocess.CompletedProcess([], stop.value.code, stderr=capfd.readouterr().err), *words)
