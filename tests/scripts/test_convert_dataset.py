"""convert_dataset.py end to end: boxes computed by hand, splits, names, and what is left out."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import convert_dataset
from detection.data.image_file import read_image
from tests.support.conversion_cases import (
    boxes_of,
    coco_of,
    coco_set,
    lay_out,
    names_in,
    save,
    tree,
    voc_object,
    voc_xml,
    write,
)
from tests.support.detectors import datasets_of
from tests.support.pictures import oriented

Run = Callable[..., Any]
RED = (255, 0, 0)


@pytest.fixture
def run(run_script, tmp_path: Path) -> Run:
    """Runner of convert_dataset.py into tmp_path/out: `run(SOURCE, ...)`."""

    def started(*arguments: str | Path, out: str = "out") -> Any:
        return run_script(convert_dataset.main, *arguments, "--output", out, cwd=tmp_path)

    return started


# Boxes, by hand


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0.5 0.5 1 1", [0, 0, 10, 20]),
        ("0 0.25 0.1 0.1 0.05", [2, 1.5, 1, 1]),  # (0.25 - 0.05) * 10, (0.1 - 0.025) * 20, 0.1 * 10, 0.05 * 20
        ("0 .5 5e-1 0.2 0.1", [4, 9, 2, 2]),
        ("0 0.3 0.3 0.2 0.2", [2, 4, 2, 4]),  # in binary fractions 0.3 - 0.1 is not 0.2
        ("0 0 0.5 0.2 1", [-1, 0, 2, 20]),  # reaches outside: stays as it is
        ("0 0.1 0.2 0.3 0.2 0.2 0.5", [1, 4, 2, 6]),  # a polygon (1, 4) (3, 4) (2, 10)
    ],
)
def test_yolo_boxes_by_hand(run: Run, tmp_path: Path, line: str, box: list[float]) -> None:
    save(tmp_path / "set" / "images" / "a.jpg")
    write(tmp_path / "set" / "labels" / "a.txt", line + "\n")
    write(tmp_path / "set" / "classes.txt", "cell\n")
    result = run("set")
    assert result.returncode == 0, result.stderr
    assert boxes_of(tmp_path / "out") == [("a.jpg", "cell", box)]
    (row,) = coco_of(tmp_path / "out")["annotations"]
    assert row["area"] == box[2] * box[3] and row["iscrowd"] == 0
    assert ("outside" in result.stdout) == (box[0] < 0) and ("polygons" in result.stdout) == (len(line.split()) > 6)


@pytest.mark.parametrize(
    ("corners", "option", "box"),
    [
        ((1, 1, 10, 20), "inclusive", [0, 0, 10, 20]),  # the whole image
        ((3, 5, 3, 5), "inclusive", [2, 4, 1, 1]),  # one pixel
        (("2.5", 1, "4.25", 2), "inclusive", [1.5, 0, 2.75, 2]),
        ((0, 0, 10, 20), "exclusive", [0, 0, 10, 20]),
        ((3, 5, 4, 7), "exclusive", [3, 5, 1, 2]),
        ((0, 3, 5, 6), "inclusive", [-1, 2, 6, 4]),  # corners from 0: said
    ],
)
def test_voc_corners_by_hand(run: Run, tmp_path: Path, corners: tuple[Any, ...], option: str, box: list[float]) -> None:
    save(tmp_path / "voc" / "JPEGImages" / "a.jpg")
    write(tmp_path / "voc" / "Annotations" / "a.xml", voc_xml(voc_object("cell", corners)))
    result = run("voc", "--voc-corners", option)
    assert result.returncode == 0 and ("note" in result.stdout) == (box[0] < 0), result.stderr
    assert box[0] >= 0 or re.search("1 boxes that begin before pixel 1.*a.xml: object 1", result.stdout)
    assert boxes_of(tmp_path / "out") == [("a.jpg", "cell", box)]


def test_coco_to_yolo_by_hand(run: Run, tmp_path: Path) -> None:
    coco_set(tmp_path / "set", [(7, [0, 0, 10, 20]), (3, [2, 1.5, 1, 1])])
    result = run("set")
    assert result.returncode == 0 and "COCO JSON, to YOLO txt" in result.stdout, result.stderr
    out = tmp_path / "out"
    assert (out / "labels" / "train" / "a.txt").read_text() == "1 0.5 0.5 1 1\n0 0.25 0.1 0.1 0.05\n"
    assert (out / "images" / "train" / "a.png").exists()
    assert yaml.safe_load((out / "data.yaml").read_text()) == {"train": "images/train", "names": {0: "cat", 1: "dog"}}


@pytest.mark.parametrize("size", [(3, 7), (640, 480), (1333, 17), (20011, 9973)])
def test_round_trip_is_exact(run: Run, tmp_path: Path, size: tuple[int, int]) -> None:
    """Pixels with up to 9 decimals survive the round trip exactly, even though thirds have no finite decimals."""
    generator = np.random.default_rng(0)
    boxes: list[list[float]] = [[0, 0, *size], [1, 2, 1, 3], [0.1, 0.2, 0.3, 0.7]]
    for digits in (0, 1, 2, 6, 9):
        for _ in range(30):
            x, y = (round(float(generator.uniform(0, side / 2)), digits) for side in size)
            width, height = (max(round(float(generator.uniform(0.1, side / 2)), digits), 1.0) for side in size)
            boxes.append([x, y, width, height])
    coco_set(tmp_path / "set", [(3, box) for box in boxes], size)
    assert run("set", out="yolo").returncode == 0
    assert run("yolo").returncode == 0
    assert [box for _, _, box in boxes_of(tmp_path / "out")] == boxes


def test_six_decimals_of_other_programs_stay_what_they_are(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "set" / "a.png", 640, 480)
    write(tmp_path / "set" / "a.txt", "0 0.333333 0.123457 0.1 0.2\n")
    assert run("set").returncode == 0
    ((_, _, box),) = boxes_of(tmp_path / "out")
    # 0.333333 * 640 - 32 and 0.123457 * 480 - 48, exactly
    assert box == [181.33312, 11.25936, 64, 96]


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["stored", "shown"])
def test_boxes_agree_with_what_the_loader_sees(run: Run, tmp_path: Path, orientation: int, kind: str) -> None:
    """With an EXIF rotation, VOC annotations of the stored pixels are rotated, those of the displayed ones are not."""
    pixels = np.zeros((48, 80, 3), np.uint8)
    pixels[8:24, 16:56] = RED
    (tmp_path / "voc").mkdir()
    Image.fromarray(pixels).save(tmp_path / "voc" / "a.png", exif=oriented(orientation))
    shown = read_image(tmp_path / "voc" / "a.png")
    rows, columns = np.nonzero(shown[..., 0] > 128)
    x, y, width, height = expected = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    corners, size = (x + 1, y + 1, x + width, y + height), (shown.shape[1], shown.shape[0])
    turned = kind == "stored" and orientation >= 5
    xml = voc_xml(voc_object("red", (17, 9, 56, 24)), 80, 48) if turned else voc_xml(voc_object("red", corners), *size)
    write(tmp_path / "voc" / "a.xml", xml)
    result = run("voc")
    assert ("turned by the EXIF" in result.stdout) == turned
    assert boxes_of(tmp_path / "out") == [("a.png", "red", expected)]
    (image,) = coco_of(tmp_path / "out")["images"]
    assert (image["width"], image["height"]) == size


def test_shares_are_of_the_image_as_it_is_shown(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "set" / "a.jpg", 20, 10, orientation=6)  # shown 10 x 20
    write(tmp_path / "set" / "a.txt", "0 0.25 0.1 0.1 0.05\n")
    assert run("set").returncode == 0
    assert boxes_of(tmp_path / "out")[0][2] == [2, 1.5, 1, 1]


def test_png_that_says_its_orientation_behind_the_pixels(run: Run, tmp_path: Path) -> None:
    content = save(tmp_path / "set" / "a.png", 20, 10, orientation=6).read_bytes()
    start = content.index(b"eXIf") - 4
    length = 12 + struct.unpack(">I", content[start : start + 4])[0]
    late = content[:start] + content[start + length : -12] + content[start : start + length] + content[-12:]
    (tmp_path / "set" / "a.png").write_bytes(late)
    assert read_image(tmp_path / "set" / "a.png").shape == (20, 10, 3)
    write(tmp_path / "set" / "a.txt", "0 0.5 0.5 1 1\n")
    assert run("set").returncode == 0
    assert boxes_of(tmp_path / "out")[0][2] == [0, 0, 10, 20]


def test_a_size_that_is_just_wrong_is_said(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "voc" / "a.jpg")
    write(tmp_path / "voc" / "a.xml", voc_xml(voc_object("cell", (1, 1, 2, 2)), 100, 200))
    result = run("voc")
    assert result.returncode == 0 and "1 images of another size than the annotation states" in result.stdout
    assert coco_of(tmp_path / "out")["images"][0]["width"] == 10


# Layouts of YOLO

WHOLE = "0.5 0.5 1 1"


TWO_SPLITS = {
    **{"images/train/a.jpg": "", "labels/train/a.txt": f"0 {WHOLE}"},
    **{"images/val/b.jpg": "", "labels/val/b.txt": f"1 {WHOLE}"},
}
TWO_FOLDERS = {
    **{"train/images/a.jpg": "", "train/labels/a.txt": f"0 {WHOLE}"},
    **{"valid/images/b.jpg": "", "valid/labels/b.txt": f"1 {WHOLE}"},
}
NAMES_LIST = "names: [cat, dog]\n"
LAYOUTS: list[dict[str, str]] = [
    {**TWO_SPLITS, "data.yaml": "train: images/train\nval: images/val\n" + NAMES_LIST},
    {**TWO_SPLITS, "a.yaml": "train: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"},
    {**TWO_SPLITS, "x.yml": "path: images\ntrain: train\nval: [val]\n" + NAMES_LIST},
    {**TWO_SPLITS, "data.yaml": "path: /not/here\ntrain: images/train\ntest: images/val\n" + NAMES_LIST},
    {**TWO_SPLITS, "classes.txt": "cat\ndog\n"},
    {**TWO_SPLITS, "labels/classes.txt": "cat\ndog\n"},
    {
        **{**TWO_SPLITS, "lists/t.txt": "../images/train/a.jpg\n", "lists/v.txt": "./images/val/b.jpg\n\n"},
        "data.yaml": "train: lists/t.txt\nval: lists/v.txt\n" + NAMES_LIST,
    },
    {
        **{**TWO_FOLDERS, "README.roboflow.txt": "about"},
        "data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 2\n" + NAMES_LIST,
    },
    {**TWO_FOLDERS, "obj.names": "cat\ndog\n"},
    {
        **{"obj/a.jpg": "", "obj/a.txt": f"0 {WHOLE}", "obj/b.jpg": "", "obj/b.txt": f"1 {WHOLE}"},
        **{"train.txt": "obj/a.jpg\n", "val.txt": "obj/b.jpg\n", "obj.names": "cat\ndog\n"},
        "obj.data": "classes = 2\ntrain = train.txt\nvalid = val.txt\nnames = obj.names\nbackup = backup/\n",
    },
]


@pytest.mark.parametrize("files", LAYOUTS)
def test_splits_and_names_of_every_layout(run: Run, tmp_path: Path, files: dict[str, str]) -> None:
    splits = first, second = ("train", "test" if "test:" in files.get("data.yaml", "") else "val")
    lay_out(tmp_path / "set", files)
    result = run("set", "--strict")
    assert result.returncode == 0 and "left out" not in result.stdout and "note" not in result.stdout, result
    out = tmp_path / "out"
    assert {path.name for path in (out / "annotations").iterdir()} == {f"instances_{split}.json" for split in splits}
    assert boxes_of(out, first) == [("a.jpg", "cat", [0, 0, 10, 20])]
    assert boxes_of(out, second) == [("b.jpg", "dog", [0, 0, 10, 20])]
    assert (out / first / "a.jpg").exists() and (out / second / "b.jpg").exists()
    ids = [row["id"] for split in splits for row in coco_of(out, split)["images"]]
    assert ids == [1, 2], "ids go on from split to split"
    assert [(entry["id"], entry["name"]) for entry in coco_of(out, first)["categories"]] == [(1, "cat"), (2, "dog")]


def test_names_from_a_file_or_none_at_all(run: Run, tmp_path: Path) -> None:
    lay_out(tmp_path / "set", {"a.jpg": "", "a.txt": "2 0.5 0.5 1 1\n"})
    write(tmp_path / "names", "x\ny\nz\n")
    assert run("set", "--names", "names", "--split", "all").returncode == 0
    assert boxes_of(tmp_path / "out", "all") == [("a.jpg", "z", [0, 0, 10, 20])]
    result = run("set", out="other")
    assert "class names are not in the dataset" in result.stdout
    assert [entry["name"] for entry in coco_of(tmp_path / "other")["categories"]] == ["class_0", "class_1", "class_2"]


# Layouts of VOC


def test_voc_lists_flags_and_alphabetical_classes(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "VOC2007"
    for name in "abcd":
        save(root / "JPEGImages" / f"{name}.jpg")
    flags = "<truncated>1</truncated><difficult>1</difficult>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    zebra, ant = voc_object("zebra", (1, 1, 10, 20), flags), voc_object("ant", (1, 1, 5, 5), part)
    for name, objects in zip("abcd", (zebra, ant, "", voc_object("bee", (1, 1, 5, 5))), strict=True):
        write(root / "Annotations" / f"{name}.xml", voc_xml(objects))
    lists = {
        "train": "a\nmissing\n",
        "val": "b\n\n",
        "test": "c\n",
        "trainval": "a\nb\n",
        "zebra_train": "a  1\nd -1\n",
    }
    for name, text in lists.items():
        write(root / "ImageSets" / "Main" / f"{name}.txt", text)
    result = run("VOC2007")
    assert result.returncode == 0, result.stderr
    assert "1 images of a list without an XML file (ImageSets/Main/train.txt:2)" in result.stdout
    assert "1 XML files in no list of ImageSets/Main (Annotations/d.xml)" in result.stdout
    out = tmp_path / "out"
    (row,) = coco_of(out)["annotations"]
    assert (row["iscrowd"], row["difficult"], row["truncated"]) == (1, 1, 1) and "occluded" not in row
    assert "1 difficult objects, made crowd regions" in result.stdout
    assert boxes_of(out) == [("a.jpg", "zebra", [0, 0, 10, 20])]
    assert boxes_of(out, "val") == [("b.jpg", "ant", [0, 0, 5, 5])]
    assert boxes_of(out, "test") == [] and len(coco_of(out, "test")["images"]) == 1
    assert [entry["name"] for entry in coco_of(out, "test")["categories"]] == ["ant", "zebra"]

    assert run("VOC2007", "--difficult", "keep", out="kept").returncode == 0
    (row,) = coco_of(tmp_path / "kept")["annotations"]
    assert (row["iscrowd"], row["difficult"]) == (0, 1)


def test_voc_folders_per_split_to_yolo(run: Run, tmp_path: Path) -> None:
    """Roboflow's export, with XML beside the images, to YOLO txt; difficult objects are left out."""
    for split, name in (("train", "a"), ("valid", "b")):
        save(tmp_path / "voc" / split / f"{name}.jpg")
        objects = voc_object(name, (1, 1, 10, 10)) + voc_object(name, (1, 1, 2, 2), "<difficult>1</difficult>")
        write(tmp_path / "voc" / split / f"{name}.xml", voc_xml(objects))
    result = run("voc", "--to", "yolo")
    assert result.returncode == 0 and "left out: 2 crowd regions" in result.stdout, result.stderr
    assert (tmp_path / "out" / "labels" / "train" / "a.txt").read_text() == "0 0.5 0.25 1 0.5\n"
    assert (tmp_path / "out" / "labels" / "val" / "b.txt").read_text() == "1 0.5 0.25 1 0.5\n"


def test_entities_are_never_expanded(run: Run, tmp_path: Path) -> None:
    entities = '<!ENTITY a "ha">' + "".join(f'<!ENTITY {chr(98 + k)} "{f"&{chr(97 + k)};" * 10}">' for k in range(12))
    bomb = f"<!DOCTYPE annotation [{entities}]>" + voc_xml(voc_object("&m;", (1, 1, 2, 2)))
    outside = '<!DOCTYPE annotation [<!ENTITY x SYSTEM "file:///etc/hostname">]>' + voc_xml(
        voc_object("&x;", (1, 1, 2, 2))
    )
    for name, text in (("bomb", bomb), ("outside", outside), ("good", voc_xml(voc_object("cell", (1,) * 4)))):
        save(tmp_path / "voc" / f"{name}.jpg")
        write(tmp_path / "voc" / f"{name}.xml", text)
    result = run("voc")
    assert result.returncode == 0 and "2 XML files with a DOCTYPE" in result.stdout
    assert boxes_of(tmp_path / "out") == [("good.jpg", "cell", [0, 0, 1, 1])]


# What is left out, and what is kept but said


def report_of(out: Path) -> dict[str, dict[str, list[str]]]:
    content = json.loads((out / "conversion.json").read_text())
    return {key: content[key] for key in ("left_out", "notes")}


def test_every_bad_line_and_image_of_yolo_is_named(run: Run, tmp_path: Path) -> None:
    lines = [
        *("0 0.5 0.5 1 1", "", "0 0.5 0.5 1"),  # 3: too few
        *("0 0.5 nan 1 1", "0 0.5 inf 1 1", "0 0.5 1_0 1 1", "0 half 0.5 1 1", "0 0.5 0.5 1e9 1"),  # 8: too large
        *("2 0.5 0.5 1 1", "-1 0.5 0.5 1 1", "0.5 0.5 0.5 1 1"),  # 9 to 11: there are two classes
        *("0 0.5 0.5 0 1", "0 0.5 0.5 1 -0.5"),  # 12: no width, 13: no height
        *("0 0.5 0.5 1 1 0.9", "1 0.5 0.5 0.2 0.1"),  # 14: with a score
        "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4",  # 16: neither a box nor a polygon
    ]
    files = {
        "data.yaml": "train: images/train\nval: images/val\ntest: ../test/images\n" + NAMES_LIST,
        **{
            **TWO_SPLITS,
            "labels/train/a.txt": "\n".join(lines),
            "images/train/none.jpg": "",
            "images/train/latin.jpg": "",
        },
        **{"images/train/empty.jpg": "", "labels/train/empty.txt": ""},
        **{"labels/train/orphan.txt": f"0 {WHOLE}", "labels/train/classes.txt": "cat\ndog"},
    }
    lay_out(tmp_path / "set", files)
    (tmp_path / "set" / "images" / "train" / "damaged.png").write_bytes(b"no image")
    (tmp_path / "set" / "labels" / "train" / "latin.txt").write_bytes(b"\xff\xfe0")
    before = tree(tmp_path / "set")
    result = run("set")
    assert result.returncode == 0, result.stderr
    report = report_of(tmp_path / "out")
    found = {reason: [re.split("[/:]", place)[-1] for place in places] for reason, places in report["left_out"].items()}
    assert found == {
        "lines with a word that is no usable number": ["4", "5", "6", "7", "8"],
        "lines of neither 5 numbers nor a polygon": ["3", "16"],
        "lines whose class does not exist": ["9", "10", "11"],
        "boxes without width or height": ["12", "13"],
        "images that cannot be read": ["damaged.png"],
        "images whose label file cannot be read as text": ["latin.txt"],
        "label files without an image": ["orphan.txt"],
        "entries of data.yaml that do not exist": ["images"],
    }
    notes = {reason.split(",")[0]: places for reason, places in report["notes"].items()}
    assert len(notes["images without a label file"]) == 1
    assert notes["lines whose sixth number"][0].endswith("a.txt:14")
    assert len(notes["images with the same box of the same class more than once"]) == 1
    images = {image["file_name"] for image in coco_of(tmp_path / "out")["images"]}
    assert images == {"a.jpg", "none.jpg", "empty.jpg"}
    assert [box[2] for box in boxes_of(tmp_path / "out")] == [[0, 0, 10, 20], [0, 0, 10, 20], [4, 9, 2, 2]]
    assert "left out: 5 lines with a word" in result.stdout and "labels/train/a.txt:4" in result.stdout
    assert "train: 3 images, 2 of them without boxes, 3 boxes" in result.stdout
    assert tree(tmp_path / "set") == before, "the source is never changed"


def test_images_of_no_split_are_named(run: Run, tmp_path: Path) -> None:
    lay_out(
        tmp_path / "set", {**TWO_SPLITS, "classes.txt": "cat\ndog", "images/c.jpg": "", "labels/c.txt": "0 .5 .5 1 1"}
    )
    result = run("set")
    assert "left out: 1 images of no split (images/c.jpg)" in result.stdout


def test_every_bad_object_of_voc_is_named(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    for name in ("a", "lonely", "broken", "other"):
        save(root / f"{name}.jpg")
    objects = [
        voc_object("cell", (1, 1, 10, 20)),
        voc_object("", (1, 1, 10, 20)),
        "<object><name>cell</name></object>",
        voc_object("cell", (1, 1, "NaN", 20)),
        voc_object("cell", (5, 5, 4, 9)),  # width 4 - 5 + 1 = 0
        voc_object("cell", (5, 5, 2, 9)),
    ]
    write(root / "a.xml", voc_xml("".join(objects)))
    write(root / "missing.xml", voc_xml("", filename="../../../etc/missing.jpg"))
    write(root / "broken.xml", "<annotation><object>")
    write(root / "other.xml", "<labels/>")
    result = run("voc")
    assert result.returncode == 0, result.stderr
    left_out = report_of(tmp_path / "out")["left_out"]
    found = {
        reason: [re.findall(r"object \d|^[^:]+", place)[-1] for place in places] for reason, places in left_out.items()
    }
    assert found == {
        "objects without a name, or of a class that is not among --names": ["object 2"],
        "objects whose bndbox lacks a usable number": ["object 3", "object 4"],
        "boxes without width or height": ["object 5", "object 6"],
        "images whose file is missing": ["voc/missing.xml"],
        "XML files that cannot be read": ["voc/broken.xml"],
        "XML files that are no annotation": ["voc/other.xml"],
        "images without an XML file": ["voc/lonely.jpg"],
    }
    assert boxes_of(tmp_path / "out") == [("a.jpg", "cell", [0, 0, 10, 20])]


def test_what_coco_loses_on_the_way_to_yolo_is_counted(run: Run, tmp_path: Path) -> None:
    root = coco_set(tmp_path / "set", [(3, [0, 0, 10, 20]), (7, [1, 1, 0, 5]), (3, [5, 5, 20, 20]), (7, [2, 2, 2, 2])])
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = [[0, 0, 10, 0, 10, 20]]
    content["annotations"][3]["iscrowd"] = 1
    content["annotations"].append({**content["annotations"][0], "id": 50, "image_id": 99})
    content["images"].append({"id": 6, "file_name": "gone.png", "width": 3, "height": 4})
    write(file, json.dumps(content))
    save(root / "train" / "unlisted.png")
    result = run("set")
    assert result.returncode == 0, result.stderr
    report = report_of(tmp_path / "out")
    found = {reason: [place.split(": ")[-1] for place in places] for reason, places in report["left_out"].items()}
    assert found == {
        "annotations of images that are not listed": ["annotation 50"],
        "boxes without width or height": ["annotation 1"],
        "images whose file is missing": ["image 6 (gone.png)"],
        "crowd regions, which YOLO txt cannot hold": ["train/a.png"],
    }
    assert {reason.split(",")[0]: len(places) for reason, places in report["notes"].items()} == {
        "segmentations": 1, "boxes that reach outside their image": 1, "image files that are not converted": 1
    }  # fmt: skip
    # [5, 5, 20, 20] on 10 x 20 stays as it is: centre 15 / 10 and 15 / 20
    assert (tmp_path / "out/labels/train/a.txt").read_text() == "0 0.5 0.5 1 1\n0 1.5 0.75 2 1\n"

    assert run("set", "--images", "none", out="bare").returncode == 0
    assert sorted(tree(tmp_path / "bare")) == [
        "conversion.json", "data.yaml", "labels/train/a.txt", "labels/train/gone.txt"
    ]  # fmt: skip


def test_file_names_that_are_no_text_and_numbers_that_are_no_box(run: Run, tmp_path: Path) -> None:
    lay_out(tmp_path / "set", {"a.jpg": "", "a.txt": "0 0.5 0.5 1 1", "b\n.jpg": "", "classes.txt": "cat"})
    os.rename(save(tmp_path / "set" / "c.jpg"), os.fsencode(tmp_path / "set") + b"/\xff.jpg")
    result = run("set")
    assert result.returncode == 0, result
    assert "2 images whose file name holds control characters (train/b\\n.jpg, train/\\udcff.jpg)" in result.stdout
    assert [image["file_name"] for image in coco_of(tmp_path / "out")["images"]] == ["a.jpg"]
    coco_set(tmp_path / "coco", [(3, [0, 0, 1e300, 1]), (3, [0, 0, 10, 20])])
    result = run("coco", out="yolo")
    assert result.returncode == 0 and "1 boxes far away from any image" in result.stdout, result
    assert (tmp_path / "yolo" / "labels" / "train" / "a.txt").read_text() == "0 0.5 0.5 1 1\n"


def test_images_that_a_list_names_twice_are_taken_once(run: Run, tmp_path: Path) -> None:
    lay_out(
        tmp_path / "set", {"a.jpg": "", "a.txt": "0 .5 .5 1 1", "t.txt": "a.jpg\na.jpg\n", "d.yaml": "train: t.txt\n"}
    )
    result = run("set", "--strict")
    assert result.returncode == 0 and "note: 1 images that a split names more than once" in result.stdout
    assert len(boxes_of(tmp_path / "out")) == 1


def test_strict_writes_nothing(run: Run, tmp_path: Path) -> None:
    lay_out(tmp_path / "set", {"a.jpg": "", "a.txt": "0 0.5 0.5 1 1\n0 0.5 0.5 1\n", "classes.txt": "cat"})
    result = run("set", "--strict")
    assert result.returncode == 1 and "1 things would be left out (--strict)" in result.stderr
    assert "a.txt:2" in result.stdout and not (tmp_path / "out").exists()
    write(tmp_path / "set" / "a.txt", "0 0.5 0.5 1 1\n")
    assert run("set", "--strict").returncode == 0


# Files


def refuse(*_: Any) -> None:
    raise OSError(18, "Invalid cross-device link")


@pytest.mark.parametrize("kind", ["link", "copy", "none", "link across devices"])
def test_images_are_linked_copied_or_left(
    run: Run, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, default_settings
) -> None:
    """And the dataset trains from the words that are printed."""
    lay_out(tmp_path / "set", {**TWO_SPLITS, "classes.txt": "cat\ndog", "images/train/empty.jpg": ""})
    source, target = tmp_path / "set/images/train/a.jpg", tmp_path / "out/train/a.jpg"
    source.symlink_to(source.rename(source.with_name("real")))  # what it leads to is linked
    if kind == "link across devices":
        monkeypatch.setattr(os, "link", refuse)
    result = run("set", "--images", kind.split()[0])
    assert result.returncode == 0 and ("3 images were copied" in result.stdout) == ("across" in kind), result
    assert target.exists() == (kind != "none")
    if kind != "none":
        assert target.read_bytes() == source.read_bytes() and not target.is_symlink()
        assert os.path.samefile(source, target) == (kind == "link")
    words = re.search(r"train with (.*)", result.stdout).group(1).split()
    monkeypatch.chdir(tmp_path)
    training, validation = datasets_of(default_settings(*words, "data.strict=true"), 64, 64, 0, None)
    assert (len(training), len(validation)) == (2, 1) and training.annotations.categories.names == ("cat", "dog")
    assert training[0].labels.tolist() == [0] and validation[0].labels.tolist() == [1]
    assert training.load_image(0).shape == validation.load_image(0).shape == (20, 10, 3)


def test_equal_names_are_told_apart(run: Run, tmp_path: Path) -> None:
    """Two lists of folders with an a.jpg each; in YOLO's format also a.jpg and a.png, which share a.txt."""
    files = {
        "one/images/a.jpg": "",
        "one/labels/a.txt": f"0 {WHOLE}",
        "two/images/a.jpg": "",
        "two/labels/a.txt": f"1 {WHOLE}",
    }
    lay_out(tmp_path / "set", {**files, "data.yaml": "train: [one/images, two/images]\n" + NAMES_LIST})
    assert run("set").returncode == 0
    assert [box[:2] for box in boxes_of(tmp_path / "out")] == [("one/images/a.jpg", "cat"), ("two/images/a.jpg", "dog")]
    root = coco_set(tmp_path / "coco", [(3, [0, 0, 10, 20])])
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    save(root / "train" / "a.jpg")
    content["images"].append({"id": 9, "file_name": "a.jpg", "width": 10, "height": 20})
    write(root / "annotations" / "instances_train.json", json.dumps(content))
    result = run("coco", out="yolo")
    assert "1 images renamed" in result.stdout and "train/a.jpg to a_2.jpg" in result.stdout
    labels = tmp_path / "yolo" / "labels" / "train"
    assert (labels / "a.txt").read_text() == "0 0.5 0.5 1 1\n" and (labels / "a_2.txt").read_text() == ""


def test_paths_that_lead_out_of_the_output_do_not(run: Run, tmp_path: Path) -> None:
    lay_out(tmp_path, {"elsewhere/a.jpg": "", "elsewhere/a.txt": "0 0.5 0.5 1 1", "set/images/b.jpg": ""})
    write(tmp_path / "set" / "list.txt", "../elsewhere/a.jpg\nimages/../images/b.jpg\n")
    write(tmp_path / "set" / "data.yaml", "train: list.txt\n" + NAMES_LIST)
    assert run("set").returncode == 0
    assert {image["file_name"] for image in coco_of(tmp_path / "out")["images"]} == {
        "elsewhere/a.jpg",
        "set/images/b.jpg",
    }
    assert sorted(tree(tmp_path / "out" / "train")) == ["elsewhere/a.jpg", "set/images/b.jpg"]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["nowhere"], 2, "nowhere does not exist"),
        (["empty"], 2, "no annotations recognised"),
        (["both"], 2, "has COCO JSON and Pascal VOC XML in it; say which with --from"),
        (["set", "--to", "yolo"], 2, "YOLO txt already"),
        (["set", "--output", "set/out"], 2, "inside the source"),
        (["set", "--output", "full"], 6, "not an empty folder"),
        (["set", "--output", "set/a.jpg/x"], 2, "inside the source"),
        (["set", "--output", "full/file/x"], 6, "full/file/x"),
        (["set", "--split", "../x"], 2, "--split"),
        (["set", "--from", "voc"], 2, "no XML annotations found"),
        (["set", "--from", "coco"], 2, "name the file itself"),
        (["set", "--names", "nowhere"], 2, "--names nowhere"),
        (["coco", "--names", "full/file"], 2, "has its own class names"),
        (["bad.json"], 2, "not complete JSON"),
        (["list.json"], 2, "is not a COCO annotation file"),
        (["bad.yaml"], 2, "cannot be read as YAML"),
        (["none.yaml"], 2, "names no images"),
        (["twice.yaml"], 2, "'cat' occurs twice"),
        (["points.yaml"], 2, "kpt_shape"),
        (["set/a.jpg"], 2, "a file must be"),
        (["gone"], 2, "no image is left"),
    ],
)
def test_refused_in_one_line(run: Run, tmp_path: Path, words: list[str], code: int, part: str) -> None:
    lay_out(tmp_path / "set", {"a.jpg": "", "a.txt": "0 0.5 0.5 1 1", "classes.txt": "cat"})
    (tmp_path / "empty").mkdir()
    coco_set(tmp_path / "coco", [(3, [0, 0, 1, 1])])
    write(coco_set(tmp_path / "both", [(3, [0, 0, 1, 1])]) / "a.xml", voc_xml(""))
    (coco_set(tmp_path / "gone", [(3, [0, 0, 1, 1])]) / "train" / "a.png").unlink()
    files = {
        **{"full/file": "x", "bad.json": "{", "list.json": "[]", "bad.yaml": "train: ["},
        **{"none.yaml": "train: nothing/here\n" + NAMES_LIST, "twice.yaml": "train: set\nnames: [cat, cat]\n"},
        "points.yaml": "train: set\nkpt_shape: [17, 3]\n" + NAMES_LIST,
    }
    lay_out(tmp_path, files)
    before = tree(tmp_path)
    result = run(*words) if "--output" not in words else run(*words[:-2], out=words[-1])
    assert result.returncode == code and part in result.stderr, result
    assert len(result.stderr.strip().splitlines()) == 1 and "" not in result.stdout.splitlines()
    assert tree(tmp_path) == before, "nothing is written, nothing is left"


def test_a_full_disk_leaves_nothing_behind(run: Run, tmp_path: Path, full_disk) -> None:
    lay_out(tmp_path / "set", {"a.jpg": "", "a.txt": "0 0.5 0.5 1 1\n" * 50, "classes.txt": "cat"})
    before = tree(tmp_path)
    with full_disk(1000):
        result = run("set")
    assert result.returncode == 6 and "cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert tree(tmp_path) == before and {path.name for path in tmp_path.iterdir()} == {"set"}


# Real data


def real_boxes(file: Path) -> list[Any]:
    content = json.loads(file.read_text())
    names, images = names_in(content)
    return sorted(
        (images[row["image_id"]], names[row["category_id"]], *row["bbox"])
        for row in content["annotations"]
        if not row["iscrowd"]
    )


@pytest.mark.parametrize("name", ["bccd", "coco_mini"])
def test_real_data_comes_back_equal(run: Run, tmp_path: Path, shared_data, name: str) -> None:
    source = shared_data(name)
    assert run(source, out="yolo").returncode == 0
    assert run("yolo", "--strict").returncode == 0
    for split in ("train", "val"):
        file = f"annotations/instances_{split}.json"
        expected = real_boxes(source / file)
        assert expected and real_boxes(tmp_path / "out" / file) == expected
        sizes = [
            {(image["file_name"], image["width"], image["height"]) for image in json.loads(path.read_text())["images"]}
            for path in (source / file, tmp_path / "out" / file)
        ]
        assert sizes[0] == sizes[1]
