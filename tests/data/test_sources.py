"""Any usual format trains in place: what is recognised, what is refused, and what is said."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detection.config.settings import Settings
from detection.data.annotations import Annotations, flatten_annotations, load_annotations, place_of
from detection.data.build import build_datasets, read_training_annotations
from detection.data.conversion.coco import read_coco
from detection.data.conversion.dataset import Findings as ConversionFindings
from detection.data.image_places import open_images
from detection.data.sources import find_source, source_lines
from detection.dataset_checks.findings import Findings
from detection.dataset_checks.image_checks import Split as CheckedSplit
from detection.dataset_checks.image_checks import check_listing
from detection.errors import DataError
from tests.support.formats import (
    FORMATS,
    KINDS,
    TWO_SPLITS,
    Split,
    Splits,
    draw_splits,
    first_losses,
    read_splits,
    write_coco,
)
from tests.support.layouts import LINE, XML, YOLO, box, lay_out

Load = Callable[..., Settings]
TINY = (
    *("model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8,8,8]", "train.image_size=64", "train.batch_size=4"),
    *("evaluation.image_size=64", "run.device=cpu"),
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return draw_splits(tmp_path_factory.mktemp("drawn"), train=16, val=5)


@pytest.fixture(scope="module")
def losses_of_coco(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], int, list[str]]:
    root = tmp_path_factory.mktemp("coco")
    FORMATS["coco"](root, {"train": splits["train"]})
    return first_losses(*TINY, f"data.root={root}")


@pytest.fixture(scope="module")
def losses_by_name(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], int, list[str]]:
    """COCO files that hold what a division by file names gives."""
    root, content = tmp_path_factory.mktemp("by_name"), splits["train"].content
    shares: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for image in content["images"]:
        shares["train" if place_of(image["file_name"]) < 0.9 else "val"].append(image)
    divided = {name: Split(content | {"images": images}, splits["train"].images) for name, images in shares.items()}
    FORMATS["coco"](root, divided)
    return first_losses(*TINY, f"data.root={root}")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_first_losses_of_coco(
    tmp_path: Path, splits: Splits, losses_of_coco, losses_by_name, name: str
) -> None:
    """One set only, of which the same tenth validates, by id in COCO's formats and by name in the others."""
    FORMATS[name](tmp_path, {"train": splits["train"]})
    before = sorted(tmp_path.rglob("*"))
    losses, count, lines = first_losses(*TINY, f"data.root={tmp_path}")
    expected = losses_by_name if name in KINDS else losses_of_coco
    assert (losses, count) == expected[:2] and 0 < count < 16
    assert f"hash of their {'file names' if name in KINDS else 'ids'}" in lines[1]
    assert KINDS.get(name, "COCO JSON") in lines[0] and str(tmp_path) in lines[0] and "one set only: 0." in lines[1]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written beside the data


def facts(annotations: Annotations) -> tuple[Any, ...]:
    names = [Path(annotations.file_name(index)).name for index in range(len(annotations))]
    return names, annotations.boxes.tolist(), annotations.labels.tolist(), annotations.categories.names


def written_coco(root: Path, split: Split) -> Path:
    write_coco(root / "a.json", split)
    return root / "a.json"


@pytest.mark.parametrize("name", TWO_SPLITS)
def test_both_splits_are_found(tmp_path: Path, splits: Splits, default_settings: Load, name: str) -> None:
    FORMATS[name](tmp_path, splits)
    for dataset, split in zip(
        build_datasets(default_settings(f"data.root={tmp_path}").data, 0, None), splits, strict=True
    ):
        assert facts(dataset.annotations) == facts(load_annotations(written_coco(tmp_path / "coco", splits[split])))


@pytest.mark.slow
def test_bccd_has_the_same_first_losses_in_eleven_formats(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    root = shared_data("bccd")
    splits = read_splits(root, "train", "val")
    validation = [
        f"data.validation_annotations={root}/annotations/instances_val.json",
        f"data.validation_images={root}/val",
    ]
    words = ("run.device=cpu", "train.batch_size=16")  # else the plan's own choices
    found = {}
    for name, write_format in FORMATS.items():
        write_format(tmp_path / name, splits)
        rest = [] if name in TWO_SPLITS else validation  # these layouts have one set
        found[name] = first_losses(*words, f"data.root={tmp_path / name}", *rest)[:2]
        print(f"{name:<14} {found[name][1]} images  {found[name][0]}")
    assert set(map(str, found.values())) == {str(found["coco"])} and found["coco"][1] == 205


def checked_split(names: list[str], root: Path) -> CheckedSplit:
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    return CheckedSplit("training", open_images(root), flatten_annotations(content, "test"))


# --- what else is recognised, and what is refused ---


WINDOWS = r"data.yaml:train: D:\my\set\train\images|val: ..\valid\images|names: [cell]"
IMAGES_OF = {  # where the images of the training set must be found, below the root
    # fault 4: folders that exist and hold other images
    "images/ exists": (["result.json", "images/other.png", "pictures/x.png"], "pictures"),
    "names of the split exist": (["annotations/instances_train.json", "train/y.png", "images/x.png"], "images"),
    "the root itself": (["any name.json", "images/y.png", "x.png"], "."),
    "the other split is not it": (["annotations/instances_train.json", "val/x.png", "deep/er/x.png"], "deep/er"),
    "train2017": (
        ["annotations/instances_train2017.json", "images/train2017/x.png", "images/x.png"],
        "images/train2017",
    ),
    "one folder further down": (
        ["unpacked/annotations/instances_train.json", "unpacked/train/x.png"],
        "unpacked/train",
    ),
    "YOLO further down": (
        [
            *(
                "logo.png",
                "set/images/train/x.png",
                f"set/labels/train/x.txt:{LINE}",
                "set/data.yaml:train: images/train|names: [a]",
            ),
            *("set/images/val/y.png", f"set/labels/val/y.txt:{LINE}"),
        ],
        "set/images/train",
    ),
    "YOLO folders further down": (
        ["set/images/train/x.png", f"set/labels/train/x.txt:{LINE}", "set/images/val/y.png", "set/labels/val/y.txt: "],
        "set/images/train",
    ),
    "FiftyOne's splits": (["train/labels.json", "train/data/x.png", "test/labels.json"], "train/data"),
    # faults 2 and 9: labels and images that one rule does not find
    "JPEGImages": (["JPEGImages/x.png", f"labels/x.txt:{LINE}"], "JPEGImages"),
    "Images, Labels": (["Images/x.png", f"Labels/x.txt:{LINE}"], "Images"),
    "TXT": (["images/x.png", f"labels/x.TXT:{LINE}"], "images"),
    "beside": (["x.png", f"x.TXT:{LINE}"], "."),
    "Images per split": (
        ["Images/Train/x.png", f"Labels/Train/x.txt:{LINE}", "Images/Val/y.png", f"Labels/Val/y.txt:{LINE}"],
        "Images/Train",
    ),
    "Windows": (
        [
            "train/images/x.png",
            f"train/labels/x.txt:{LINE}",
            "valid/images/y.png",
            f"valid/labels/y.txt:{LINE}",
            WINDOWS,
        ],
        "train/images",
    ),
    "XML beside images": (["images/x.png", f"images/x.xml:{XML}"], "images"),
    "VOCdevkit": (
        ["VOCdevkit/VOC2007/JPEGImages/x.png", f"VOCdevkit/VOC2007/Annotations/x.xml:{XML}"],
        "VOCdevkit/VOC2007/JPEGImages",
    ),
    "lists without a description": (["train.txt:data/p/x.png", "p/x.png", f"p/x.txt:{LINE}"], "p"),
}


@pytest.mark.parametrize("case", IMAGES_OF)
def test_images_are_where_the_listed_files_are(tmp_path: Path, default_settings: Load, case: str) -> None:
    names, expected = IMAGES_OF[case]
    lay_out(tmp_path, *names)
    source = find_source(default_settings(f"data.root={tmp_path}").data, "training")
    assert source.image_directory() == tmp_path / expected
    assert source.columns().file_names == ["x.png"] and len(source.columns().coco_boxes) == 1


def test_prefixes_in_file_names(tmp_path: Path, default_settings: Load) -> None:
    """Label Studio's images/x.png where images/ exists, and the split's folder in front of the names."""
    for name, folder in (("images/x.png", "images"), ("train/x.png", "train")):
        root = tmp_path / folder
        lay_out(root, f"{folder}/x.png", "annotations/instances_train.json", content=box(name))
        assert find_source(default_settings(f"data.root={root}").data, "training").image_directory() == root


TRAIN_YAML = "data.yaml:train: images|names: [a]"
SPLITS_YAML = "data.yaml:train: images|val: v|names: [a]"
REFUSED = {  # files, words, parts of the message; ROOT is the folder
    "nothing": (
        ["notes.md: hello"],
        [],
        ["no dataset recognised in ROOT", "notes.md", "data.yaml", "data.train_annotations"],
    ),
    "not there": ([], ["root=ROOT/absent"], ["'ROOT/absent' does not exist", "data.yaml"]),
    "COCO's own folder": ([], ["root=data/coco"], ["data/download_coco.sh", "recipes/quickstart.yaml"]),
    "two formats": (
        [*YOLO, TRAIN_YAML, "instances_train.json"],
        [],
        ["coco: instances_train.json", "yolo: data.yaml", "data.format=coco|yolo"],
    ),
    "two datasets": (
        ["a/b.json", "c/b.json", "a/x.png", "c/x.png"],
        ["format=coco"],
        ["several COCO files", "a/b.json, c/b.json"],
    ),
    "two datasets of YOLO": (
        [f"{d}/{f}" for d in "ac" for f in (*YOLO, f"data.yaml:train: images|names: [{d}]")],
        [],
        ["several datasets: ROOT/a, ROOT/c"],
    ),
    "a broken dataset further down": (
        [*(f"set/{file}" for file in YOLO), "set/data.yaml:train: gone|names: [a]"],
        [],
        ["ROOT/set/data.yaml: names no images", "train: gone"],
    ),
    "only validation": (
        ["annotations/instances_val.json", "val/x.png"],
        [],
        ["only the validation set", "data.train_annotations"],
    ),
    "a fraction of a divided set": (
        [*YOLO, "v/x.png", f"v/x.txt:{LINE}", SPLITS_YAML],
        ["validation_fraction=0.2"],
        ["data.validation_fraction = 0.2, but there is a validation set"],
    ),
    "a fraction and a found file": (
        ["instances_train.json", "instances_val.json", "x.png"],
        ["validation_fraction=0.2"],
        ["= 0.2, but there is a validation set: ROOT/instances_val.json"],
    ),
    "a fraction and a named file": (
        ["instances_train.json", "b.json"],
        ["validation_fraction=0.2", "validation_annotations=b.json"],
        ["validation_fraction", "validation_annotations"],
    ),
    # fault 1
    "not below root": (
        ["train.json", "x.png"],
        ["train_annotations=here.json"],
        ["ROOT/here.json does not exist", "relative paths begin at data.root", "there is CWD/here.json"],
    ),
    "images not below root": (
        ["train.json", "x.png"],
        ["train_images=here.json"],
        ["ROOT/here.json does not exist", "there is CWD/here.json"],
    ),
    # fault 2
    "no label": (
        ["images/x.png", "other/y.txt:" + LINE, TRAIN_YAML],
        [],
        ["none of the 1 images of 'train'", "ROOT/images", "ROOT/other/y.txt", "empty label file"],
    ),
    "few labels": (
        [
            *(f"images/{n}.png" for n in range(11)),
            f"images/1.txt:{LINE}",
            *(f"txt/{n}.txt:{LINE}" for n in range(11)),
            TRAIN_YAML,
        ],
        [],
        ["1 of the 11 images", "ROOT/txt/0.txt"],
    ),
    # faults 4 and 9: what is there instead
    "images nowhere": (
        ["annotations/instances_train.json", "train/y.png"],
        [],
        ["none of the images such as 'x.png'", "ROOT/train", "data.train_images"],
    ),
    "another suffix": (
        ["annotations/instances_train.json", "train/X.JPG"],
        [],
        ["there is ROOT/train/X.JPG instead of 'x.png'"],
    ),
    # fault 8: what was found before a step gives up
    "entries that are not there": (
        ["obj.data:train = data/lost.txt|names = data/obj.names", "obj.names:a"],
        [],
        ["names no images", "left out: 1 entries of obj.data", "train: data/lost.txt"],
    ),
    "a validation set that is not there": (
        [*YOLO, "data.yaml:train: images|val: gone|names: [a]"],
        [],
        ["val: gone does not exist"],
    ),
    "no usable box": (
        ["images/x.png", "labels/x.txt:7 0.5 0.5 0.5 0.5", "v/x.png", f"v/x.txt:{LINE}", SPLITS_YAML],
        [],
        ["no usable box", "left out: 1 lines whose class does not exist (labels/x.txt:1)"],
    ),
    "images that are none": (
        [*YOLO, "images/y.jpeg:hello", TRAIN_YAML, f"labels/y.txt:{LINE}"],
        [],
        ["1 of 2 image files cannot be read, such as ROOT/images/y.jpeg;"],
    ),
    "images of a list that are not there": (
        ["train.txt:p/x.png|p/lost.png", "p/x.png", f"p/x.txt:{LINE}", "data.yaml:train: train.txt|names: [a]"],
        [],
        ["1 of 2 image files are missing", "p/lost.png"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_line(tmp_path: Path, monkeypatch, default_settings: Load, case: str) -> None:
    names, words, parts = REFUSED[case]
    root, here = tmp_path / "root", tmp_path / "here"
    root.mkdir()
    lay_out(root, *names)
    lay_out(here, "here.json", "x.png")
    monkeypatch.chdir(here)
    settings = default_settings(*(f"data.{word}".replace("ROOT", str(root)) for word in ("root=ROOT", *words)))
    with pytest.raises(DataError) as caught:
        build_datasets(settings.data, 0, None)
    for part in parts:
        assert part.replace("ROOT", str(root)).replace("CWD", str(here)) in str(caught.value)
    assert "\n" not in str(caught.value) and (case == "COCO's own folder") == ("download_coco" in str(caught.value))


def test_a_relative_path_has_one_base(tmp_path: Path, monkeypatch, default_settings: Load) -> None:
    """Fault 1: the same names in the working directory are another dataset."""
    for folder in ("root", "here"):
        lay_out(tmp_path / folder, "a.json", "p/x.png", "b.json", "q/x.png")
    monkeypatch.chdir(tmp_path / "here")
    words = ["train_annotations=a.json", "train_images=p", "validation_annotations=b.json", "validation_images=q"]
    data = default_settings(f"data.root={tmp_path / 'root'}", *(f"data.{word}" for word in words)).data
    found = [find_source(data, split) for split in ("training", "validation")]
    root = tmp_path / "root"
    assert [(s.file, s.images) for s in found] == [(root / "a.json", root / "p"), (root / "b.json", root / "q")]
    assert str(root / "a.json") in source_lines(*found)[0]


def test_class_names_are_text(tmp_path: Path, default_settings: Load) -> None:
    """Fault 5: YAML 1.1 reads no as False, 010 as 8 and null as None."""
    listed = [
        ("names: [no, 010, null, 1.50, yes]", "list"),
        ("names: {0: no, 1: 010, 2: null, 3: 1.50, 4: yes}", "table"),
    ]
    for names, folder in listed:
        lay_out(tmp_path / folder, *YOLO, f"data.yaml:train: images|{names}")
        columns = find_source(default_settings(f"data.root={tmp_path / folder}").data, "training").columns()
        assert columns.category_names == ["no", "010", "null", "1.50", "yes"]
    content = box("x.png") | {"categories": [{"id": 1, "name": 10}]}
    lay_out(tmp_path / "json", "a.json", "x.png", content=content)
    with pytest.raises(DataError, match="category 1: name is 10, must be text"):
        build_datasets(default_settings(f"data.root={tmp_path / 'json'}").data, 0, None)


MEANINGS = [  # keys of the annotation, keys of the image, word of the note
    ({"ignore": 1}, {}, "ignore"),
    ({"attributes": {"rotation": 30.0}}, {}, "rotation"),
    ({"difficult": 1}, {}, "difficult"),
    ({"IsGroupOf": 1}, {}, "IsGroupOf"),
    ({"IsDepiction": 1}, {}, "IsDepiction"),
    ({}, {"neg_category_ids": [3]}, "LVIS"),
    ({"ignore": 0, "attributes": {"rotation": 0.0}, "difficult": 0, "IsGroupOf": 0}, {}, ""),
]


@pytest.mark.parametrize(("keys", "of_image", "word"), MEANINGS, ids=[word or "zeros" for *_, word in MEANINGS])
def test_keys_that_change_a_meaning_are_named(tmp_path: Path, default_settings: Load, keys, of_image, word) -> None:
    """Fault 7, and `data.ignore_as_crowd`."""
    content = box("x.png", **keys)
    content["images"][0] |= of_image
    lay_out(tmp_path, "a.json", "x.png", content=content)
    source = find_source(default_settings(f"data.root={tmp_path}").data, "training")
    assert len(source.notes()) == bool(word) and all("note: 1 " in note and word in note for note in source.notes())
    findings = ConversionFindings()
    read_coco(tmp_path / "a.json", "train", True, findings, iter)
    noted = [places for reason, places in findings.notes.items() if word and word in reason]
    assert noted == [[f"{tmp_path / 'a.json'}: 1"]] * bool(word)
    asked = find_source(default_settings(f"data.root={tmp_path}", "data.ignore_as_crowd=true").data, "training")
    assert asked.columns().crowd.tolist() == [word == "ignore"] and len(asked.notes()) == (word not in ("", "ignore"))


def test_voc_settings_act_in_place(tmp_path: Path, default_settings: Load) -> None:
    lay_out(tmp_path, "JPEGImages/x.png", f"Annotations/x.xml:{XML}")
    for words, expected, crowd in (
        ([], [2, 4, 7, 4], True),
        (["voc_corners=exclusive", "difficult=keep"], [3, 5, 6, 3], False),
    ):
        data = default_settings(f"data.root={tmp_path}", *(f"data.{word}" for word in words)).data
        columns = find_source(data, "training").columns()
        assert columns.coco_boxes.tolist() == [expected] and columns.crowd.tolist() == [crowd]


def test_gbk_xml_is_read(tmp_path: Path, default_settings: Load) -> None:
    """Fault 8: expat does not know GBK, in which Chinese labelling tools write."""
    text = ('<?xml version="1.0" encoding="GBK"?><annotation><object><name>\u7ec6\u80de</name><bndbox><xmin>1</xmin>'
            "<ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object></annotation>")  # fmt: skip
    lay_out(tmp_path, "JPEGImages/x.png", "Annotations/y.xml:<other/>")
    (tmp_path / "Annotations" / "x.xml").write_bytes(text.encode("gbk"))
    source = find_source(default_settings(f"data.root={tmp_path}").data, "training")
    assert source.columns().category_names == ["\u7ec6\u80de"]
    assert "left out: 1 XML files that are no annotation (Annotations/y.xml)" in source.notes()


def test_missing_images_name_what_is_there(tmp_path: Path) -> None:
    """Fault 9: other case, Unicode form, backslashes, a folder more."""
    for missing, there in (
        ("b.png", "B.PNG"),
        ("\u00e9.png", "e\u0301.png"),
        ("s\\c.png", "s/c.png"),
        ("d.png", "s/d.png"),
    ):
        root = tmp_path / str(len(missing) + ord(missing[0]))
        lay_out(root, "p/x.png", f"p/{there}")
        split = checked_split([missing, "x.png"], root / "p")
        findings = Findings()
        check_listing([split], findings)
        (found,) = findings.of("error")
        assert (
            found.items == [missing] and found.details == [f"there is {there}"] and f"there is {there}" in found.line()
        )


def test_reading_is_kept_until_a_file_changes(tmp_path: Path, default_settings: Load) -> None:
    lay_out(tmp_path, *YOLO)
    data = default_settings(f"data.root={tmp_path}").data
    first = find_source(data, "training").columns()
    assert find_source(data, "training").columns() is first
    lay_out(tmp_path, "images/y.png", "labels/y.txt:0 0.5 0.5 0.1 0.1")
    assert find_source(data, "training").columns().file_names == ["x.png", "y.png"]


def test_training_images_are_chosen(tmp_path: Path, default_settings: Load) -> None:
    """`data.skip_empty`, then `data.max_train_images` spread over the rest; validation keeps all."""
    names = [f"{number}.png" for number in range(8)]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    rows = [box(number=number)["annotations"][0] | {"image_id": number} for number in range(8) if number != 3]
    for split in ("train", "val"):
        lay_out(tmp_path, *(f"{split}/{name}" for name in names), f"annotations/instances_{split}.json",
                content={"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]})  # fmt: skip
    words = [["skip_empty=true"], ["max_train_images=4"], ["skip_empty=true", "max_train_images=3"]]
    for given, ids in zip(words, ([0, 1, 2, 4, 5, 6, 7], [0, 2, 4, 6], [0, 2, 5]), strict=True):
        data = default_settings(f"data.root={tmp_path}", *(f"data.{word}" for word in given)).data
        training, validation = build_datasets(data, 0, None)
        assert training.annotations.image_ids.tolist() == ids and len(validation.annotations) == 8
        assert [training.annotations.file_name(k) for k in range(len(ids))] == [names[number] for number in ids]
    data = default_settings(f"data.root={tmp_path}", "data.skip_empty=true").data
    lay_out(tmp_path, "annotations/instances_train.json", content=box("0.png") | {"annotations": []})
    assert len(read_training_annotations(data)) == 1
    with pytest.raises(DataError, match="no usable box in any training image"):
        build_datasets(data, 0, None)


SCRIPTS = {  # words, and what the output says besides the line about the data
    "anchor_creator": (["--restarts", "1"], "48 box shapes"),
    "visualization": (["--pages", "1"], "16 images"),
    "visualize_batch": (["--images", "2", "train.batch_size=2"], "batch.png"),
    "batch_overfit": (["--images", "2", "--steps", "1", "--threshold", "0.01"], "2 images with 6 boxes"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_take_the_same_folder(tmp_path: Path, splits: Splits, run_script, script: str) -> None:
    FORMATS["cvat_yolo"](tmp_path / "set", splits)
    words, expected = SCRIPTS[script]
    main = importlib.import_module(script).main
    result = run_script(main, *TINY, f"data.root={tmp_path / 'set'}", "data.num_workers=0", *words, "--output", "out")
    assert result.returncode in (0, 1) and expected in result.stdout, result.stderr
    assert f"Darknet obj.data: {tmp_path}/set/obj.data; training {tmp_path}/set/obj_train_data" in result.stdout


def test_a_file_may_be_the_root_and_the_format_may_be_asked_for(tmp_path: Path, default_settings: Load) -> None:
    content = box("x.png") | {"annotations": []}
    lay_out(tmp_path, *YOLO, TRAIN_YAML, "images/a.json", content=content)
    lay_out(tmp_path, "d.data:train=data/l.txt|names=data/n.names", "l.txt:data/images/x.png", "n.names:b")
    asked = {
        **{"data.yaml": 1, "d.data": 1, "images/a.json": 0},  # boxes
        **{"/data.format=coco": 0, "/data.format=yolo": "d.data, data.yaml"},
    }
    for words, boxes in asked.items():
        file, _, rest = words.partition("/data.format")
        data = default_settings(f"data.root={tmp_path / file}", *([f"data.format{rest}"] if rest else [])).data
        if isinstance(boxes, str):
            with pytest.raises(DataError, match=boxes):
                find_source(data, "training")
        else:
            source = find_source(data, "training")
            assert len(source.columns().coco_boxes) == boxes and source.image_directory() == tmp_path / "images"
