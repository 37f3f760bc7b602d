"""data/classification_sets.py and data/class_names.py: small copies of the papers' sets."""
import io
import json
from argparse import Namespace

import pytest
from PIL import Image

from data import class_names, classification_sets
from tools import fill


def make_images(root, paths):
    Image.new("RGB", (40, 40), "red").save(file := io.BytesIO(), "PNG")
    fill(root, dict.fromkeys(paths, file.getvalue()))


def read_set(spec, root=None, **more):
    return classification_sets.read_set(spec, Namespace(data_root=str(root)), **more)


def names_of(spec, part, keys=None, classes=None, templates="file"):
    """-> the names of each class"""
    args = Namespace(classes=classes and str(classes), templates=templates)
    return class_names.class_names(spec, part, keys or sorted(set(part.labels)), args)


def refused(capsys, function, *arguments):
    """Call a function that must end the program. -> what it tells"""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def fill_dtd(root):
    names = [f"{name}/{name}_{i}.jpg" for i in range(3) for name in ("banded", "dotted")]
    make_images(root / "dtd/dtd/images", names)
    fill(root / "dtd/dtd/labels", {f"{split}1.txt": "\n".join(names[2 * i:2 * i + 2])
                                   for i, split in enumerate(("train", "val", "test"))})


def fill_gtsrb(root):
    make_images(root / "gtsrb/GTSRB/Training", [f"{sign:05}/0.ppm" for sign in range(43)])
    make_images(root / "gtsrb/GTSRB/Final_Test/Images", [f"{sign:05}.ppm" for sign in range(43)])
    rows = "".join(f"{i:05}.ppm;{i}\n" for i in range(43))
    (root / "gtsrb/GT-final_test.csv").write_text("Filename;ClassId\n" + rows)


EUROSAT = [f"eurosat/2750/{name}/{name}_{i}.jpg" for name in class_names.EUROSAT for i in range(20)]
COUNTRIES = [f"country211/{split}/C{i:03}/0.jpg" for split in ("train", "valid", "test") for i in range(211)]
IMAGENET1K = [f"imagenet/{folder}/{wnid}/{i}.JPEG" for folder, images in (("val", 1), ("train", 5))
              for wnid in ("n01440764", "n02123045") for i in range(images)]  # two of the thousand: tench, tabby
IMAGENETV2 = [f"imagenetv2-matched-frequency-format-val/{number}/0.jpeg" for number in range(1000)]
SETS = {  # name: its images, or what makes it; test, train and validation images; a class's key; its name
    "dtd": (fill_dtd, (2, 2, 2), "0001", "dotted"),
    "gtsrb": (fill_gtsrb, (43, 34, 9), "0000", "red and white circle 20 kph speed limit"),
    "country211": (COUNTRIES, (211, 211, 211), "0001", "United Arab Emirates"),
    "eurosat": (EUROSAT, None, "AnnualCrop", "annual crop land"),
    "imagenet1k": (IMAGENET1K, (2, 8, 2), "n02123045", "tabby cat"),
    "imagenetv2": (IMAGENETV2, (1000,), "281", "tabby cat")}


@pytest.mark.parametrize("name", SETS)
def test_sets_by_name(name, tmp_path, capsys):
    content, sizes, key, word = SETS[name]
    make_images(tmp_path, content) if isinstance(content, list) else content(tmp_path)
    parts = read_set(name, tmp_path, learn=name != "imagenetv2")
    for part, size in zip(("test", "train", "val"), sizes or ()):
        assert len(parts[part].names) == len(parts[part].labels) == size
    for part in parts.values():
        assert part.read(part.names[0]).size == (40, 40)
    if not sizes:  # no official split: disjoint, all there, about 6 : 2 : 2
        names = [name for part in parts.values() for name in part.names]
        assert len(set(names)) == len(names) == 200 and 100 < len(parts["train"].names) < 140
    keys, _ = classification_sets.number_classes(name, parts)
    told = capsys.readouterr().err
    if name == "imagenet1k":  # the missing classes stay in the set
        assert len(keys) == 1000 and "998 of 1000 classes" in told and "goldfish" in told
    else:
        assert set(keys) == set(parts["test"].labels) and not told
    assert names_of(name, parts["test"], keys, templates="openai")[keys.index(key)] == [word]
    assert name != "dtd" or parts["test"].words[key] == word  # torchvision's own name
    published = class_names.read_templates("openai", name)
    assert len(published) == 80 or not name.startswith("imagenet")
    assert all("{}" in template for template in published)
    assert len(class_names.read_templates("openai7", name)) == 7


def test_a_missing_set_says_how_to_fetch_it_and_fetches_nothing(tmp_path, capsys):
    for name in [*classification_sets.TORCHVISION, *classification_sets.FOLDERS]:
        told = refused(capsys, read_set, name, tmp_path)
        assert name in told and str(tmp_path) in told and told.count("\n") == 1
        if kind := classification_sets.TORCHVISION.get(name):
            assert kind[0] in told and (name == "cars") != ("download=True" in told.split("fetch it:")[1])
    known = {*classification_sets.TORCHVISION, *classification_sets.FOLDERS}  # the suites are as large as in the papers
    assert {len(set(sets) & known) for sets in classification_sets.SUITES.values()} == {15, 9}


def test_the_split_of_sets_without_one_is_fixed():
    parts = [classification_sets.part_of(f"Forest/Forest_{i}.jpg") for i in range(1, 9)]
    assert parts == ["train", "train", "test", "test", "train", "val", "train", "train"]


def read_rows_set(tmp_path, labels):
    rows = [{"image": chr(ord("a") + i), "label": label} for i, label in enumerate(labels)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Namespace(image_root=str(tmp_path), label="label")
    return classification_sets.read_set(f"jsonl:{tmp_path / 'rows.jsonl'}", args)["test"]


def test_labels_of_rows(tmp_path, capsys):
    part = read_rows_set(tmp_path, [["cat", "tomcat"], 7, 7.0, None, 0.5, True, float("nan")])
    assert list(part.labels) == ["cat", "7", "7"]
    assert "4 rows have no usable label, left out: d (None), e (0.5), f (True) and 1 more" in capsys.readouterr().err
    assert names_of("jsonl", part) == [["7"], ["cat", "tomcat"]]


def test_labels_that_differ_only_in_white_space_are_one_class(tmp_path, capsys):
    part = read_rows_set(tmp_path, ["ice cream", "ice  cream", " ice\u00a0cream\n", "cone"])
    assert set(part.labels) == {"ice cream", "cone"}
    (tmp_path / "classes.json").write_text('{"ice  cream": "ice", "cone": "a cone", "cup": "cup"}')
    assert names_of("x", part, classes=tmp_path / "classes.json") == [["a cone"], ["ice"]]
    told = capsys.readouterr().err
    assert "'ice  cream'" in told and "1 classes of --classes are not in the set, left out: cup" in told


def test_folders_of_images(tmp_path, capsys):
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    make_images(elsewhere, ["cat/1.png"])
    make_images(root, [".ipynb_checkpoints/3.png", "dog/._2.png"])  # hidden
    (root / "cat").symlink_to(elsewhere / "cat")
    (root / "dog/2.PNG").symlink_to(elsewhere / "cat/1.png")
    (root / "dog/Thumbs.db").write_bytes(b"x")
    part = read_set(f"imagefolder:{root}")["test"]
    assert part.names == ["cat/1.png", "dog/2.PNG"]
    assert "1 .db (dog/Thumbs.db)" in capsys.readouterr().err
    assert part.labels == ["cat", "dog"] == [*part.words]
    assert part.read("dog/2.PNG").size == (40, 40)
    for name in ("cat", "big/dog"):  # a folder inside every class is no class
        make_images(tmp_path / "deep" / name, ["images/1.png"])
        (tmp_path / "deep" / name / "annotations").mkdir()
    part = read_set(f"imagefolder:{tmp_path / 'deep'}")["test"]
    assert part.labels == ["big/dog", "cat"] and part.words == {"big/dog": "big dog", "cat": "cat"}


def test_class_names_go_by_what_a_class_is_called(tmp_path, capsys):
    """Not by its place in a sort, in which folder 10 comes before folder 2."""
    make_images(tmp_path, [f"imagenet/val/{number}/0.png" for number in range(1000)])
    part = read_set("imagenet1k", tmp_path)["test"]
    names = dict(zip(sorted(set(part.labels)), names_of("imagenet1k", part, classes="openai")))
    assert [names[key] for key in ("10", "281", "999")] == [["brambling"], ["tabby cat"], ["toilet paper"]]
    make_images(tmp_path, [path.replace("River", "Water") for path in EUROSAT])
    part = read_set("eurosat", tmp_path)["test"]
    assert "no name for 1 classes, 'Water'" in refused(capsys, names_of, "eurosat", part, None, "openai")
    names = class_names.published_names("caltech101", part)
    assert len(names) == 102 and names["yin_yang"] == "yin and yang symbol"


def test_sets_without_names_or_folders_say_so(tmp_path, capsys):
    fill_gtsrb(tmp_path)
    assert "--classes" in refused(capsys, names_of, "gtsrb", read_set("gtsrb", tmp_path)["test"])
    make_images(tmp_path, ["set/n01440764/0.png"])
    names_of("x", read_set(f"imagefolder:{tmp_path / 'set'}")["test"])
    assert "look like ids ('n01440764')" in capsys.readouterr().err
    part = classification_sets.Part(["1"], None, ["a/abbey"], {"a/abbey": "abbey"})
    assert "1 of its 397 classes" in refused(capsys, classification_sets.number_classes, "sun397", {"test": part})
