"""data/classification_sets.py and data/class_names.py: small copies of the papers' sets."""
import json
import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from data import class_names, classification_sets


def make_image(path, colour="red"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), colour).save(path)


def fill_dtd(root):
    for name in ("banded", "dotted"):
        for i in range(3):
            make_image(root / f"dtd/dtd/images/{name}/{name}_{i}.jpg")
    (root / "dtd/dtd/labels").mkdir()
    for number, split in enumerate(("train", "val", "test")):
        lines = "".join(f"{name}/{name}_{number}.jpg\n" for name in ("banded", "dotted"))
        (root / f"dtd/dtd/labels/{split}1.txt").write_text(lines)


def fill_food101(root):
    (root / "food-101/meta").mkdir(parents=True)
    for split, numbers in (("train", range(10)), ("test", range(10, 12))):
        images = {name: [f"{name}/{i}" for i in numbers] for name in ("apple_pie", "waffles")}
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(images))
        for path in sum(images.values(), []):
            make_image(root / f"food-101/images/{path}.jpg")


def fill_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    pixels = torch.zeros(10, 3072, dtype=torch.uint8).numpy()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))


def fill_gtsrb(root):
    for sign in range(43):
        make_image(root / f"gtsrb/GTSRB/Training/{sign:05}/0.ppm")
        make_image(root / f"gtsrb/GTSRB/Final_Test/Images/{sign:05}.ppm")
    rows = "".join(f"{i:05}.ppm;{i}\n" for i in range(43))
    (root / "gtsrb/GT-final_test.csv").write_text("Filename;ClassId\n" + rows)


def fill_country211(root):
    for split in ("train", "valid", "test"):
        for i in range(211):
            make_image(root / f"country211/{split}/C{i:03}/0.jpg")


def fill_eurosat(root):
    for name in class_names.EUROSAT:
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


# name: (what makes a small one; its test, train and validation images; a class's key; its name)
SETS = {
    "dtd": (fill_dtd, (2, 2, 2), "0001", "dotted"),
    "food101": (fill_food101, (4, 16, 4), "0000", "apple pie"),
    "cifar10": (fill_cifar10, (10, 40, 10), "0003", "kind 3"),
    "gtsrb": (fill_gtsrb, (43, 34, 9), "0000", "red and white circle 20 kph speed limit"),
    "country211": (fill_country211, (211, 211, 211), "0001", "United Arab Emirates"),
    "eurosat": (fill_eurosat, None, "AnnualCrop", "annual crop land"),
    "imagenet1k": (fill_imagenet1k, (2, 8, 2), "n02123045", "tabby cat"),
    "imagenetv2": (fill_imagenetv2, (1000, None, None), "281", "tabby cat"),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_by_name(name, tmp_path, monkeypatch, capsys):
    fill, sizes, key, word = SETS[name]
    fill(tmp_path)
    for check in ("_check_integrity", "_load_meta"):  # they know the real files' md5
        monkeypatch.setattr(torchvision.datasets.CIFAR10, check, lambda self: setattr(
            self, "classes", [f"kind {i}" for i in range(10)]) is None)
    parts = classification_sets.read_set(name, Namespace(data_root=str(tmp_path)),
                                         learn=name != "imagenetv2")
    for part, size in zip(("test", "train", "val"), sizes or ()):
        if size:
            assert len(parts[part].names) == len(parts[part].labels) == size
    for part in parts.values():
        assert part.read(part.names[0]).size in ((40, 40), (32, 32))
    if not sizes:  # no official split: disjoint, all there, about 6 : 2 : 2
        names = [name for part in parts.values() for name in part.names]
        assert len(set(names)) == len(names) == 200 and 100 < len(parts["train"].names) < 140
    keys, _ = classification_sets.number_classes(name, parts)
    told = capsys.readouterr().err
    if name == "imagenet1k":  # the missing classes stay in the set
        assert len(keys) == 1000 and "998 of 1000 classes" in told and "goldfish" in told
    else:
        assert set(keys) == set(parts["test"].labels) and not told
    args = Namespace(classes=None, templates="openai")
    names = class_names.class_names(name, parts["test"], keys, args)
    assert names[keys.index(key)] == [word]
    published = class_names.read_templates("openai", name)
    assert len(published) == 80 or not name.startswith("imagenet")
    assert all("{}" in template for template in published)
    assert len(class_names.read_templates("openai7", name)) == 7


def test_a_missing_set_says_how_to_fetch_it_and_fetches_nothing(tmp_path, capsys):
    for name in [*classification_sets.TORCHVISION, *classification_sets.FOLDERS]:
        with pytest.raises(SystemExit):
            classification_sets.read_set(name, Namespace(data_root=str(tmp_path)))
        said = capsys.readouterr().err
        assert name in said and str(tmp_path) in said and said.count("\n") == 1
        if kind := classification_sets.TORCHVISION.get(name):
            fetch = said.split("fetch it:")[1]
            assert kind[0] in said and (name == "cars") != ("download=True" in fetch)


def test_a_set_without_names_of_its_own_says_so(tmp_path, capsys):
    fill_gtsrb(tmp_path)
    part = classification_sets.read_set("gtsrb", Namespace(data_root=str(tmp_path)))["test"]
    with pytest.raises(SystemExit):
        class_names.class_names("gtsrb", part, sorted(set(part.labels)),
                                Namespace(classes=None, templates="file"))
    assert "--classes" in capsys.readouterr().err


def read_rows_set(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Namespace(image_root=str(tmp_path), label="label")
    return classification_sets.read_set(f"jsonl:{tmp_path / 'rows.jsonl'}", args)["test"]


def test_labels_of_rows(tmp_path, capsys):
    part = read_rows_set(tmp_path, [
        {"image": "a", "label": ["cat", "tomcat"]}, {"image": "b", "label": 7},
        {"image": "c", "label": 7.0}, {"image": "d"}, {"image": "e", "label": 0.5},
        {"image": "f", "label": True}, {"image": "g", "label": float("nan")}])
    assert list(part.labels) == ["cat", "7", "7"]
    said = "4 rows have no usable label, left out: d (None), e (0.5), f (True) and 1 more"
    assert said in capsys.readouterr().err
    names = class_names.class_names("jsonl", part, ["7", "cat"],
                                    Namespace(classes=None, templates="file"))
    assert names == [["7"], ["cat", "tomcat"]]


def test_labels_that_differ_only_in_white_space_are_one_class(tmp_path, capsys):
    part = read_rows_set(tmp_path, [{"image": "a", "label": label} for label in (
        "ice cream", "ice  cream", " ice\u00a0cream\n", "cone")])
    assert set(part.labels) == {"ice cream", "cone"}
    said = capsys.readouterr().err
    assert "differ only in white space" in said and "'ice  cream'" in said and "cone" not in said


def test_suites_name_known_sets():
    known = {*classification_sets.TORCHVISION, *classification_sets.FOLDERS}
    sizes = {len(set(sets) & known) for sets in classification_sets.SUITES.values()}
    assert sizes == {15, 9}
    for name, (kind, *_) in classification_sets.TORCHVISION.items():
        assert hasattr(torchvision.datasets, kind), name


def test_the_split_of_sets_without_one_is_fixed():
    parts = [classification_sets.part_of(f"Forest/Forest_{i}.jpg") for i in range(1, 9)]
    assert parts == ["train", "train", "test", "test", "train", "val", "train", "train"]


def test_a_folder_of_links_and_other_files(tmp_path, capsys):
    make_image(tmp_path / "elsewhere/cat/1.png")
    (tmp_path / "set/dog").mkdir(parents=True)
    (tmp_path / "set/cat").symlink_to(tmp_path / "elsewhere/cat")
    (tmp_path / "set/dog/2.PNG").symlink_to(tmp_path / "elsewhere/cat/1.png")
    (tmp_path / "set/dog/Thumbs.db").write_bytes(b"x")
    for hidden in (".ipynb_checkpoints/3.png", "__MACOSX/4.png", "dog/._2.png"):
        make_image(tmp_path / "set" / hidden)
    (tmp_path / "set/.cache").mkdir()
    part = classification_sets.read_set(f"imagefolder:{tmp_path / 'set'}", None)["test"]
    assert part.names == ["cat/1.png", "dog/2.PNG"]
    assert "1 .db (dog/Thumbs.db)" in capsys.readouterr().err
    assert part.labels == ["cat", "dog"] == [*part.words]
    assert part.read("dog/2.PNG").size == (40, 40)
    (tmp_path / "set/dog/5.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises((OSError, ValueError)):  # it would run Ghostscript
        part.read("dog/5.png")


def test_a_folder_inside_every_class_is_no_class(tmp_path):
    for name in ("cat", "big/dog"):
        make_image(tmp_path / name / "images/1.png")
        (tmp_path / name / "annotations").mkdir()
    part = classification_sets.read_set(f"imagefolder:{tmp_path}", None)["test"]
    assert part.labels == ["big/dog", "cat"]
    assert part.words == {"big/dog": "big dog", "cat": "cat"}


def test_class_names_go_by_what_a_class_is_called(tmp_path, capsys):
    """Not by its place in a sort, in which folder 10 comes before folder 2."""
    args = Namespace(classes="openai", templates="file", data_root=str(tmp_path))
    for number in range(1000):
        make_image(tmp_path / f"imagenet/val/{number}/0.png")
    part = classification_sets.read_set("imagenet1k", args)["test"]
    keys = sorted(set(part.labels))
    names = dict(zip(keys, class_names.class_names("imagenet1k", part, keys, args)))
    assert [names[key] for key in ("10", "281", "999")] == [["brambling"], ["tabby cat"],
                                                            ["toilet paper"]]
    fill_eurosat(tmp_path)
    os.rename(tmp_path / "eurosat/2750/River", tmp_path / "eurosat/2750/Water")
    part = classification_sets.read_set("eurosat", args)["test"]
    with pytest.raises(SystemExit) as stop:
        class_names.class_names("eurosat", part, sorted(set(part.labels)), args)
    assert stop.value.code == 2 and "no name for 1 classes, 'Water'" in capsys.readouterr().err
    names = class_names.published_names("caltech101", part)
    assert len(names) == 102 and names["yin_yang"] == "yin and yang symbol"


def test_classes_of_a_file_that_the_set_lacks_are_told(tmp_path, capsys):
    (tmp_path / "classes.json").write_text('{"ice  cream": "ice", "cone": "a cone", "cup": "cup"}')
    part = read_rows_set(tmp_path, [{"image": "a", "label": label} for label in (
        "ice cream", "cone")])
    args = Namespace(classes=str(tmp_path / "classes.json"), templates="file")
    names = class_names.class_names("x", part, ["cone", "ice cream"], args)
    assert names == [["a cone"], ["ice"]]
    assert "1 classes of --classes are not in the set, left out: cup" in capsys.readouterr().err


def test_names_that_look_like_ids_are_told(tmp_path, capsys):
    make_image(tmp_path / "n01440764/0.png")
    part = classification_sets.read_set(f"imagefolder:{tmp_path}", None)["test"]
    class_names.class_names("x", part, ["n01440764"], Namespace(classes=None, templates="file"))
    assert "look like ids ('n01440764')" in capsys.readouterr().err


def test_a_set_with_too_few_folders_is_refused_if_no_package_names_the_others(capsys):
    part = classification_sets.Part(["1"], None, ["a/abbey"], {"a/abbey": "abbey"})
    with pytest.raises(SystemExit):
        classification_sets.number_classes("sun397", {"test": part})
    assert "1 of its 397 classes" in capsys.readouterr().err
