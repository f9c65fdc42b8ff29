"""convert_dataset.py: VOC output, several sources, --split with shares, --keep, --rename, and COCO to COCO."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

import convert_dataset
from tests.support.conversion_cases import boxes_of, coco_of, coco_set, lay_out, save, voc_object, voc_xml, write

Run = Callable[..., Any]


@pytest.fixture
def run(run_script, tmp_path: Path) -> Run:
    """Runner of convert_dataset.py into tmp_path/out: `run(SOURCE, ...)`."""

    def started(*arguments: str | Path, out: str = "out") -> Any:
        return run_script(convert_dataset.main, *arguments, "--output", out, cwd=tmp_path)

    return started


def done(result: Any) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def coco_file(root: Path, split: str, names: dict[int, str], boxes: dict[str, list[tuple[int, list[float]]]]) -> Path:
    """Images of 10 x 20 with (category id, bbox) each; ids from 100."""
    images = [{"id": 100 + k, "file_name": name, "width": 10, "height": 20} for k, name in enumerate(boxes)]
    rows = [(100 + k, *box) for k, found in enumerate(boxes.values()) for box in found]
    annotations = [
        {"id": 500 + k, "image_id": image, "category_id": category, "bbox": box, "area": 1, "iscrowd": 0}
        for k, (image, category, box) in enumerate(rows)
    ]
    for name in boxes:
        save(root / split / name)
    categories = [{"id": number, "name": name} for number, name in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write(root / "annotations" / f"instances_{split}.json", json.dumps(content))
    return root


# VOC output


@pytest.mark.parametrize(
    ("box", "edges"),
    [
        ([0, 0, 10, 20], ("1", "1", "10", "20")),  # the whole image
        ([2, 4, 1, 1], ("3", "5", "3", "5")),  # one pixel
        ([1.5, 0, 2.75, 2], ("2.5", "1", "4.25", "2")),
        ([-1, 2, 3, 4.000000001], ("0", "3", "2", "6.000000001")),
    ],
)
def test_voc_by_hand(run: Run, tmp_path: Path, box: list[float], edges: tuple[str, ...]) -> None:
    root = coco_set(tmp_path / "set", [(7, box), (3, [0, 0, 1, 1])], iscrowd=0)
    content = coco_of(root)
    content["annotations"][1]["iscrowd"] = 1
    write(root / "annotations" / "instances_train.json", json.dumps(content))
    out = done(run("set", "--to", "voc"))
    assert "1 crowd regions, written as difficult objects (train/a.png)" in out and "train with data.root=out" in out
    xml = ElementTree.parse(tmp_path / "out" / "Annotations" / "a.xml").getroot()
    assert [xml.findtext(key) for key in ("filename", "size/width", "size/height", "size/depth", "segmented")] == [
        "a.png", "10", "20", "3", "0"
    ]  # fmt: skip
    first, second = xml.findall("object")
    assert [first.findtext(key) for key in ("name", "pose", "truncated", "difficult")] == [
        "dog", "Unspecified", "0", "0"
    ]  # fmt: skip
    assert tuple(first.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")) == edges
    assert (second.findtext("name"), second.findtext("difficult")) == ("cat", "1")
    assert (tmp_path / "out/ImageSets/Main/train.txt").read_text() == "a\n"
    assert (tmp_path / "out/classes.txt").read_text() == "cat\ndog\n"
    assert (tmp_path / "out/JPEGImages/a.png").samefile(tmp_path / "set/train/a.png")


@pytest.mark.parametrize("size", [(3, 7), (640, 480), (20011, 9973)])
def test_round_trips_through_voc_are_exact(run: Run, tmp_path: Path, size: tuple[int, int]) -> None:
    """COCO to VOC to COCO and YOLO to VOC to YOLO, boxes with 0 to 9 decimals of a pixel."""
    generator = np.random.default_rng(0)
    boxes = [[0, 0, *size], [0.1, 0.2, 0.3, 0.7], [-1.5, 0, 2, 1]]
    for digits in (0, 1, 6, 9):
        for _ in range(20):
            x, y = (round(float(generator.uniform(0, side / 2)), digits) for side in size)
            boxes.append([x, y, *(max(round(float(generator.uniform(0.1, side / 2)), digits), 1.0) for side in size)])
    coco_set(tmp_path / "set", [((7, 3)[k % 2], box) for k, box in enumerate(boxes)], size)
    done(run("set", "--to", "voc", out="voc"))
    done(run("voc", "--strict"))
    assert boxes_of(tmp_path / "out") == boxes_of(tmp_path / "set")
    done(run("set", out="yolo"))
    done(run("yolo", "--to", "voc", out="voc_of_yolo"))
    done(run("voc_of_yolo", "--to", "yolo", "--names", "voc_of_yolo/classes.txt", "--strict", out="again"))
    for file in ("data.yaml", "labels/train/a.txt"):
        assert (tmp_path / "again" / file).read_text() == (tmp_path / "yolo" / file).read_text()


def test_what_voc_holds_otherwise_is_said(run: Run, tmp_path: Path) -> None:
    """Crowd regions come back as crowd regions; folders become part of the name; unused classes need classes.txt."""
    boxes = {"x/a.jpg": [(1, [0, 0, 2, 2])], "y/a.jpg": [(1, [0, 0, 3, 3])], "x_a.png": []}
    root = coco_file(tmp_path / "set", "train", {1: "b", 2: "a"}, boxes)
    coco_file(root, "val", {1: "b", 2: "a"}, {"x_a.jpg": [(1, [0, 0, 4, 4])]})
    out = done(run("set", "--to", "voc", out="voc"))
    assert "4 images renamed, because VOC has no folders, or another one has their name" in out
    assert "1 classes without an object, which VOC holds in classes.txt alone (a)" in out
    assert (tmp_path / "voc/ImageSets/Main/train.txt").read_text() == "x_a\ny_a\nx_a_2\n"
    assert (tmp_path / "voc/ImageSets/Main/val.txt").read_text() == "x_a_3\n"
    done(run("voc", "--names", "voc/classes.txt", "--strict"))
    assert boxes_of(tmp_path / "out") == [("x_a.jpg", "b", [0, 0, 2, 2]), ("y_a.jpg", "b", [0, 0, 3, 3])]
    assert boxes_of(tmp_path / "out", "val") == [("x_a_3.jpg", "b", [0, 0, 4, 4])]
    assert [row["name"] for row in coco_of(tmp_path / "out")["categories"]] == ["b", "a"]


def test_flags_of_voc_stay(run: Run, tmp_path: Path) -> None:
    flags = "<truncated>1</truncated><occluded>1</occluded><difficult>1</difficult>"
    save(tmp_path / "voc" / "a.jpg")
    objects = voc_object("cell", (1, 1, 5, 5), flags) + voc_object("ring", (1, 1, 6, 6))
    write(tmp_path / "voc" / "a.xml", voc_xml(objects))
    done(run("voc", "--to", "voc", "--keep", "cell"))
    (found,) = ElementTree.parse(tmp_path / "out/Annotations/a.xml").getroot().findall("object")
    assert [found.findtext(key) for key in ("name", "truncated", "occluded", "difficult")] == ["cell", "1", "1", "1"]


# --split with shares


def split_of_name(name: str, shares: list[float]) -> str:
    """The first 8 bytes of SHA-256 as a share of 2^64."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16
    return next(
        s for s, end in zip(("train", "val", "test"), np.cumsum([*shares[:-1], 9]), strict=False) if place < end
    )


def files_of(out: Path) -> dict[str, str]:
    found = {}
    for file in (out / "annotations").iterdir():
        split = file.stem.removeprefix("instances_")
        for image in json.loads(file.read_text())["images"]:
            found[image["file_name"]] = split
            assert (out / split / image["file_name"]).is_file()
    return found


def test_the_command_to_train_can_be_pasted(run: Run, tmp_path: Path) -> None:
    coco_set(tmp_path / "set", [(3, [0, 0, 1, 1])])
    out = done(run("set", "--to", "voc", out="my set"))
    assert "train with 'data.root=my set' data.validation_fraction=0.1" in out


def test_shares_divide_by_name_and_adding_images_moves_none(run: Run, tmp_path: Path) -> None:
    names = [f"image_{number}.jpg" for number in range(60)]
    lay_out(tmp_path / "set", {**dict.fromkeys(names, ""), "image_0.txt": "0 .5 .5 1 1", "classes.txt": "cat"})
    out = done(run("set", "--split", "0.6/0.2/0.2", out="one"))
    assert "joined" not in out
    before = files_of(tmp_path / "one")
    assert before == {name: split_of_name(name, [0.6, 0.2, 0.2]) for name in names}
    counts = [sum(split == wanted for split in before.values()) for wanted in ("train", "val", "test")]
    # three standard deviations of the binomial distribution around 36 and 12
    assert 25 <= counts[0] <= 47 and 3 <= counts[1] <= 21 and 3 <= counts[2] <= 21
    lay_out(tmp_path / "set", {f"more_{number}.jpg": "" for number in range(20)} | {"sub/image_9b.jpg": ""})
    done(run("set", "--split", "0.6/0.2/0.2", out="two"))
    after = files_of(tmp_path / "two")
    assert len(after) == 81 and {name: after[name] for name in names} == before
    done(run("set", "--split", "0.5/0.5", out="half"))
    assert set(files_of(tmp_path / "half").values()) == {"train", "val"}


def test_splits_of_the_source_are_joined_first(run: Run, tmp_path: Path) -> None:
    root = coco_file(tmp_path / "set", "train", {1: "a"}, {f"{k}.jpg": [(1, [0, 0, k + 1, 2])] for k in range(8)})
    coco_file(root, "val", {1: "a"}, {"x.jpg": [(1, [0, 0, 9, 2])], "3.jpg": [(1, [0, 0, 10, 2])]})
    out = done(run("set", "--split", "0.5/0.5"))
    assert "COCO JSON, to COCO JSON" in out and "2 splits joined and divided anew (train, val)" in out
    assert "1 images renamed, because another one has their name (" in out
    found = files_of(tmp_path / "out")
    assert sorted(found) == sorted([*(f"{k}.jpg" for k in range(8)), "3_2.jpg", "x.jpg"])
    assert found["3.jpg"] == found["3_2.jpg"] == split_of_name("3.jpg", [0.5, 0.5])
    boxes = {name: box[2] for split in ("train", "val") for name, _, box in boxes_of(tmp_path / "out", split)}
    assert boxes == {**{f"{k}.jpg": k + 1 for k in range(8)}, "x.jpg": 9, "3_2.jpg": 10}
    assert "2 kinds of ids that count from 1 anew" in out  # images and annotations of both files begin at 100 and 500


# Classes


@pytest.mark.parametrize(
    ("words", "expected", "categories", "said"),
    [
        (
            ["--keep", "dog"],
            [("dog", 2), ("dog", 4)],
            {5: "dog"},
            "2 boxes of classes that --keep does not name (train/a",
        ),
        (["--keep", "dog", "cat"], [("cat", 1), ("dog", 2), ("dog", 4)], {3: "cat", 5: "dog"}, "1 boxes of classes"),
        (
            ["--rename", "cat=kitten"],
            [("kitten", 1), ("dog", 2), ("cow", 3), ("dog", 4)],
            {3: "kitten", 5: "dog", 9: "cow"},
            "1 classes renamed (cat to kitten)",
        ),
        (
            ["--rename", "cow=cat"],
            [("cat", 1), ("dog", 2), ("cat", 3), ("dog", 4)],
            {3: "cat", 5: "dog"},
            "1 classes made one (cat and cow to cat)",
        ),
        (
            ["--rename", "cat=dog", "dog=cat"],
            [("dog", 1), ("cat", 2), ("cow", 3), ("cat", 4)],
            {3: "dog", 5: "cat", 9: "cow"},
            "2 classes renamed (cat to dog, dog to cat)",
        ),
        (
            ["--rename", "dog=pet", "cat=pet", "--keep", "pet"],
            [("pet", 1), ("pet", 2), ("pet", 4)],
            {3: "pet"},
            "1 classes made one (cat and dog to pet)",
        ),
    ],
)
def test_keep_and_rename(
    run: Run, tmp_path: Path, words: list[str], expected: list[tuple[str, int]], categories: dict[int, str], said: str
) -> None:
    boxes = {
        "a.jpg": [(3, [0, 0, 1, 1]), (5, [0, 0, 2, 1])],
        "b.jpg": [(9, [0, 0, 3, 1])],
        "c.jpg": [(5, [0, 0, 4, 1])],
    }
    coco_file(tmp_path / "set", "train", {5: "dog", 3: "cat", 9: "cow"}, boxes)
    out = done(run("set", *words, "--strict"))
    assert said in out
    assert [(name, box[2]) for _, name, box in boxes_of(tmp_path / "out")] == expected
    content = coco_of(tmp_path / "out")
    assert {row["id"]: row["name"] for row in content["categories"]} == categories
    assert [(row["id"], row["file_name"]) for row in content["images"]] == [
        (100, "a.jpg"), (101, "b.jpg"), (102, "c.jpg")
    ]  # fmt: skip


# Several sources


def test_several_sources_become_one(run: Run, tmp_path: Path) -> None:
    """YOLO and VOC: classes by name, images of equal names told apart, splits by name."""
    lay_out(
        tmp_path / "one",
        {
            "images/train/a.jpg": "", "labels/train/a.txt": "0 0.5 0.5 1 1\n1 0.25 0.1 0.1 0.05\n",
            "images/val/b.jpg": "", "labels/val/b.txt": "1 0.5 0.5 1 1", "classes.txt": "cat\ndog\n",
        },
    )  # fmt: skip
    for name in ("a", "c"):
        save(tmp_path / "two" / "JPEGImages" / f"{name}.jpg")
        objects = voc_object("dog", (1, 1, 5, 5)) + voc_object("cow", (1, 1, 6, 6))
        write(tmp_path / "two" / "Annotations" / f"{name}.xml", voc_xml(objects))
    out = done(run("one", "two", "--rename", "cow=animal"))
    assert "one: YOLO txt, to COCO JSON" in out and "two: Pascal VOC XML, to COCO JSON" in out
    assert "1 classes joined from several sources by their name (dog)" in out
    assert "2 classes of one source (cat, cow)" in out
    assert "1 images renamed, because another one has their name (train/a.jpg to a_2.jpg)" in out
    assert boxes_of(tmp_path / "out") == [
        ("a.jpg", "cat", [0, 0, 10, 20]), ("a.jpg", "dog", [2, 1.5, 1, 1]),
        ("a_2.jpg", "dog", [0, 0, 5, 5]), ("a_2.jpg", "animal", [0, 0, 6, 6]),
        ("c.jpg", "dog", [0, 0, 5, 5]), ("c.jpg", "animal", [0, 0, 6, 6]),
    ]  # fmt: skip
    assert boxes_of(tmp_path / "out", "val") == [("b.jpg", "dog", [0, 0, 10, 20])]
    assert (tmp_path / "out/train/a_2.jpg").samefile(tmp_path / "two/JPEGImages/a.jpg")
    assert {row["id"]: row["name"] for row in coco_of(tmp_path / "out")["categories"]} == {
        1: "cat", 2: "dog", 3: "animal"
    }  # fmt: skip
    done(run("one", "two", "--to", "yolo", out="yolo"))
    assert yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["names"] == {0: "cat", 1: "dog", 2: "cow"}
    assert (tmp_path / "yolo/labels/train/a_2.txt").is_file()


def test_an_image_in_two_splits_is_noted(run: Run, tmp_path: Path) -> None:
    """The same pixels under two names, in the training set of one source and the validation set of the other."""
    lay_out(tmp_path / "one", {"images/train/a.jpg": "", "labels/train/a.txt": "0 0.5 0.5 1 1", "classes.txt": "cat\n"})
    lay_out(tmp_path / "two", {"images/val/b.jpg": "", "labels/val/b.txt": "0 0.5 0.5 1 1", "classes.txt": "cat\n"})
    assert "1 images that stand in several splits; --split divides anew (train/a.jpg and val/b.jpg)" in done(
        run("one", "two")
    )
    save(tmp_path / "two" / "images" / "val" / "b.jpg", 11, 20)
    assert "several splits" not in done(run("one", "two", out="other"))


# COCO to COCO


def test_ids_and_further_keys_stay(run: Run, tmp_path: Path) -> None:
    root = coco_set(tmp_path / "set", [(7, [0, 0, 10, 20]), (3, [2, 1.5, 1, 1])], segmentation=[[0, 0, 5, 0, 5, 5]])
    content = coco_of(root)
    content |= {"info": {"year": 2020}, "licenses": [{"id": 4, "name": "CC"}]}
    content["images"][0] |= {"license": 4, "coco_url": "http://x"}
    content["annotations"][0] |= {"id": 77, "area": 123.5, "attributes": {"occluded": True}, "score": 0.5}
    content["categories"][0]["supercategory"] = "animal"
    write(root / "annotations" / "instances_train.json", json.dumps(content))
    out = done(run("set", "--split", "1/0", "--rename", "dog=hound"))
    assert "segmentation" not in out and "ids" not in out
    found = coco_of(tmp_path / "out")
    assert (found["info"], found["licenses"]) == (content["info"], content["licenses"])
    assert found["images"] == content["images"]
    assert found["annotations"] == content["annotations"]
    assert sorted(found["categories"], key=lambda row: row["id"]) == [
        {"id": 3, "name": "cat"}, {"id": 7, "name": "hound", "supercategory": "animal"}
    ]  # fmt: skip


LICENSED = {  # licenses of two files; of their images; joined: id of each license, license by image
    "the same": (["CC", "BY"], ["CC", "BY"], [1, 2, 2], {"CC": 1, "BY": 2}, ["CC", "BY", "BY"]),
    "other numbers": (["CC", "BY"], ["BY", "GPL"], [1, 2, 2], {"CC": 1, "BY": 2, "GPL": 3}, ["CC", "BY", "GPL"]),
    "one file lists none": (["CC"], [], [1, 1, 1], {"CC": 1}, ["CC", "CC", None]),
    "not listed": (["CC"], ["BY"], [1, 1, 7], {"CC": 1, "BY": 2}, ["CC", "CC", None]),
    "none at all": ([], [], [4, 4, 4], {}, [4, 4, 4]),
}


@pytest.mark.parametrize("words", [["one", "two"], ["both", "--split", "1/0"]], ids=["sources", "splits"])
@pytest.mark.parametrize("case", LICENSED)
def test_an_image_keeps_its_license(run: Run, tmp_path: Path, case: str, words: list[str]) -> None:
    """The number of a license means what its own file says."""
    *listed, numbers, joined, of_images = LICENSED[case]
    images = [["a.png", "b.png"], ["c.png"]]
    for part, (names, rows) in enumerate(zip(images, listed, strict=True)):
        split = ("train", "val")[part] if words[0] == "both" else "train"
        root = tmp_path / ("both" if words[0] == "both" else words[part])
        coco_file(root, split, {1: "cat"}, {name: [(1, [part, 0, 5, 5])] for name in names})
        content = coco_of(root, split) | {"licenses": [{"id": k, "name": name} for k, name in enumerate(rows, start=1)]}
        for image in content["images"]:
            image["license"] = numbers["abc".index(image["file_name"][0])]
        write(root / "annotations" / f"instances_{split}.json", json.dumps(content))
    out = done(run(*words, "--to", "coco"))
    found = coco_of(tmp_path / "out")
    assert {row["name"]: row["id"] for row in found["licenses"]} == joined
    names = {number: name for name, number in joined.items()}
    by_image = {image["file_name"]: image.get("license") for image in found["images"]}
    assert [names.get(by_image[f"{letter}.png"], by_image[f"{letter}.png"]) for letter in "abc"] == of_images
    assert ("images whose license their file does not list, removed" in out) == (None in of_images)
    assert ("licenses numbered anew" in out) == (case in ("other numbers", "not listed"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["set"], "something to change: --split with shares"),
        (["set", "--split", "0.8/0.1"], "that sum to 1, as 0.8/0.1/0.1"),
        (["set", "--split", "0.9"], "that sum to 1, as 0.8/0.1/0.1"),
        (["set", "--split", "80/10/10"], "that sum to 1, as 0.8/0.1/0.1"),
        (["set", "--split", "1.2/-0.2"], "that sum to 1"),
        (["set", "--split", "nan/1"], "that sum to 1"),
        (["set", "--keep", "cats"], "--keep: there is no class 'cats'; there are cat, dog"),
        (["set", "--rename", "cow=dog"], "--rename: there is no class 'cow'; there are cat, dog"),
        (["set", "--rename", "cat"], "--rename cat: must be OLD=NEW"),
        (["set", "--rename", "cat="], "must be OLD=NEW"),
        (["set", "set", "--images", "none"], "would lie in several folders"),
        (["set", "set", "--output", "set/x"], "inside the source"),
        (["set", "gone"], "gone does not exist"),
    ],
)
def test_refused_in_one_line(run: Run, tmp_path: Path, words: list[str], part: str) -> None:
    coco_set(tmp_path / "set", [(3, [0, 0, 1, 1])])
    out = words[-1] if "--output" in words else "out"
    words = words[:-2] if "--output" in words else words
    result = run(*words, "--to", "coco", out=out)
    assert result.returncode == 2 and part in result.stderr, result
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bccd", "coco_mini"])
def test_real_data_through_voc(run: Run, tmp_path: Path, shared_data, name: str) -> None:
    """Every box of the real sets comes back, crowd regions as crowd regions."""
    source = shared_data(name)
    done(run(source, "--to", "voc", out="voc"))
    done(run("voc", "--names", "voc/classes.txt", "--strict"))
    for split in ("train", "val"):
        assert sorted(boxes_of(tmp_path / "out", split)) == sorted(boxes_of(source, split))
        crowds = [
            sum(row["iscrowd"] for row in coco_of(root, split)["annotations"]) for root in (source, tmp_path / "out")
        ]
        assert crowds[0] == crowds[1]
