"""Datasets as they arrive from elsewhere: names of another machine, cut-off files, other encodings, several sets."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detection.config.settings import Settings
from detection.data import sources
from detection.data.annotation_file import read_without_boxes
from detection.data.build import build_datasets
from detection.data.conversion.coco import coco_json, read_coco
from detection.data.conversion.dataset import ConvertedDataset, ImageEntry, read_text
from detection.data.conversion.dataset import Findings as ConversionFindings
from detection.data.conversion.operations import split_by_name
from detection.data.conversion.voc import parse_xml
from detection.data.dataset_formats import recognise
from detection.data.outside_names import STATED
from detection.data.sources import find_source, source_lines
from detection.dataset_checks.annotation_checks import read_source
from detection.dataset_checks.findings import Findings
from detection.errors import DataError
from tests.support.layouts import LINE, XML, YOLO, box, lay_out

Load = Callable[..., Settings]


def listing(*names: str) -> dict[str, Any]:
    """COCO content with a box on each image."""
    parts = [box(name, number=number) for number, name in enumerate(names, start=1)]
    images = [part["images"][0] | {"id": number} for number, part in enumerate(parts, start=1)]
    rows = [part["annotations"][0] | {"image_id": number} for number, part in enumerate(parts, start=1)]
    return {"images": images, "annotations": rows, "categories": parts[0]["categories"]}


TWO = ["images/a.png", "images/b.png"]
SETTLED = {  # names in the file, files beside it, names that are read, image directory
    "upload": (["/data/upload/1/a.png", "/data/upload/1/b.png"], TWO, ["a.png", "b.png"], "images"),
    "media": (["../../label-studio/data/media/upload/1/a.png"], TWO, ["a.png"], "images"),
    "prefix kept": (["/data/upload/1/0f3a9c1b-a.png"], ["images/0f3a9c1b-a.png"], ["0f3a9c1b-a.png"], "images"),
    "prefix gone": (["/data/upload/1/0f3a9c1b-a.png"], ["pictures/a.png"], ["a.png"], "pictures"),
    "local files": (["/data/local-files/?d=set/a%201.png"], ["set/a 1.png"], ["a 1.png"], "set"),
    "bucket": (["s3://mine/set/a.png", "https://host/b.png?key=1"], TWO, ["a.png", "b.png"], "images"),
    "Windows": ([r"C:\Users\me\a.png", r"..\b.png"], TWO, ["a.png", "b.png"], "images"),
    "folders": (["/data/a.png", "/data/b.png"], ["p/1/a.png", "p/2/b.png"], ["1/a.png", "2/b.png"], "p"),
    "some plain": (["/data/a.png", "b.png"], TWO, ["a.png", "b.png"], "images"),
    "plain with their folder": (["/data/a.png", "images/b.png"], TWO, ["images/a.png", "images/b.png"], "."),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTLED)
def test_names_that_lead_out_are_settled_by_what_is_there(tmp_path: Path, default_settings: Load, case: str) -> None:
    names, files, read, directory = SETTLED[case]
    lay_out(tmp_path, *files, "result.json", content=listing(*names))
    source = find_source(default_settings(f"data.root={tmp_path}").data, "training")
    assert source.columns().file_names == read
    assert source.image_directory() == tmp_path / directory
    moved = [name for name, now in zip(names, read, strict=True) if name != now]
    (note,) = [line for line in source_lines(source) if "note: " in line]
    assert f"note: {len(moved)} file names that lead out of the dataset" in note and repr(moved[0]) in note
    findings = Findings()
    read_source(source, "training", findings)
    assert not findings.of("error") and [len(found.items) for found in findings.found] == [len(moved)]
    assert read_without_boxes(tmp_path / "result.json").file_names == source.columns().file_names


def test_a_converted_file_has_the_settled_names(tmp_path: Path) -> None:
    lay_out(tmp_path, "images/a.png", "result.json", content=listing("/data/upload/1/a.png"))
    findings = ConversionFindings()
    dataset = read_coco(tmp_path, "train", True, findings, iter, further_keys=True)
    (image,) = coco_json(dataset, "train", 1, 1, "")["images"]
    assert image["file_name"] == "a.png" and STATED not in image
    assert any("lead out of the dataset" in reason for reason in findings.notes)


UNSETTLED = {  # names in the file, files beside it, end of the message
    "not there": (["/etc/passwd.png", "b.png"], ["b.png"], "; no image file called 'passwd.png' is in ROOT"),
    "no image": (["/etc/passwd"], ["passwd: text"], "; no image file called 'passwd' is in ROOT"),
    "outside": (["../a.png"], ["x.png", "../a.png"], "; no image file called 'a.png' is in ROOT"),
    "twice": (["/d/a.png"], ["one/a.png", "two/a.png"], "; there are ROOT/one/a.png and ROOT/two/a.png"),
    "elsewhere": (["/d/a.png", "b.png"], ["one/a.png", "two/b.png"], "; there is ROOT/one/a.png"),
    "two names": (["/1/a.png", "/2/a.png"], ["a.png"], "; there is ROOT/a.png"),
}


@pytest.mark.parametrize("case", UNSETTLED)
def test_a_name_that_leads_out_is_refused_with_what_is_there(tmp_path: Path, default_settings: Load, case: str) -> None:
    names, files, hint = UNSETTLED[case]
    root = tmp_path / "root"
    lay_out(root, *files, "result.json", content=listing(*names))
    with pytest.raises(DataError) as caught:
        find_source(default_settings(f"data.root={root}").data, "training").columns()
    message = f"{root}/result.json: file_name {names[0]!r} is not a plain path inside the image directory"
    assert str(caught.value) == message + hint.replace("ROOT", str(root))


WHOLE = json.dumps(listing(*(f"{number}.png" for number in range(9))))
ODD_JSON = {  # bytes, part of the message; "": not recognised
    "in a key": (WHOLE[: WHOLE.index("bbox") + 2].encode(), "not complete JSON"),
    "behind an entry": (WHOLE[: WHOLE.index("}, {") + 1].encode(), "not complete JSON"),
    "without its last bracket": (WHOLE[:-1].encode(), "not complete JSON"),
    "UTF-16": (WHOLE.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "something else": (b'{"images": [1, 2]}', ""),
    "something else, cut off": (b'{"pictures": [1, 2', ""),
}


@pytest.mark.parametrize("case", ODD_JSON)
def test_a_cut_off_file_of_any_name_is_called_so(tmp_path: Path, default_settings: Load, case: str) -> None:
    content, part = ODD_JSON[case]
    lay_out(tmp_path, "images/0.png")
    (tmp_path / "my export.json").write_bytes(content)
    data = default_settings(f"data.root={tmp_path}").data
    with pytest.raises(DataError) as caught:
        build_datasets(data, 0, None)
    expected = f"{tmp_path}/my export.json: " if part else "no dataset recognised"
    assert str(caught.value).startswith(expected) and part in str(caught.value)
    with pytest.raises(DataError, match=part or "has no list|not complete JSON"):
        read_coco(tmp_path / "my export.json", "train", True, ConversionFindings(), iter)


DECLARED = '<?xml version="1.0" encoding="{}"?>' + XML.replace("cell", "\u7ec6\u80de")
ENCODINGS = [  # declared, of the file
    *(("utf-16", "utf-16"), ("utf-16", "utf-16-le"), ("UTF-16", "utf-16-be"), ("utf-16", "utf-8")),
    *(("utf-16", "utf-8-sig"), ("utf-8", "utf-16"), ("utf-8", "utf-8-sig"), ("GB2312", "gbk")),
]


@pytest.mark.parametrize(("declared", "encoding"), ENCODINGS)
def test_voc_of_any_encoding_is_recognised_and_read(
    tmp_path: Path, default_settings: Load, declared: str, encoding: str
) -> None:
    """Programs of .NET write UTF-16, or declare it and write UTF-8."""
    lay_out(tmp_path, "JPEGImages/x.png", "Annotations/x.xml: ")
    (tmp_path / "Annotations" / "x.xml").write_bytes(DECLARED.format(declared).encode(encoding))
    source = find_source(default_settings(f"data.root={tmp_path}").data, "training")
    assert source.kind == "Pascal VOC XML" and source.columns().category_names == ["\u7ec6\u80de"]


def test_xml_that_is_not_of_its_encoding_is_left_out(tmp_path: Path) -> None:
    findings = ConversionFindings()
    (tmp_path / "x.xml").write_bytes(b"\xff\xfe<\0a")
    assert parse_xml(tmp_path / "x.xml", findings) is None and len(findings.skipped) == 1


def test_several_loose_sets_are_refused_or_named(tmp_path: Path, default_settings: Load) -> None:
    """Without class names class 0 of two sets may be two things."""
    nested = [f"{folder}/{file}" for folder in "ab" for file in YOLO]
    beside = [f"{folder}/{file}" for folder in "ab" for file in (f"{folder}.png", f"{folder}.txt:{LINE}")]
    for name, files in {
        "nested": nested,
        "deeper": [f"set/{file}" for file in nested],
        "by split": [file.replace("/x", "/train/x") for file in nested],
        "mixed": nested[:2] + beside[2:],
    }.items():
        lay_out(tmp_path / name, *files)
        root = tmp_path / name / ("set" if name == "deeper" else "")
        with pytest.raises(DataError, match=f"holds several datasets: {root}/a, {root}/b; .* or join them with"):
            find_source(default_settings(f"data.root={tmp_path / name}").data, "training")
    lay_out(tmp_path / "beside", *beside)
    source = find_source(default_settings(f"data.root={tmp_path / 'beside'}").data, "training")
    assert "note: 2 folders joined, whose class numbers are taken to mean the same (a, b)" in source.notes()
    lay_out(tmp_path / "one", *nested[:2], "raw/y.png", "notes/y.md:hello")
    source = find_source(default_settings(f"data.root={tmp_path / 'one'}").data, "training")
    assert source.columns().file_names == ["x.png"] and not any("joined" in note for note in source.notes())


NOT_UTF8 = {  # files; the one of them that is Latin-1
    "list": ["train.txt", "data.yaml:train: train.txt|names: [a]", "images/x.png", f"images/x.txt:{LINE}"],
    "obj.data": ["obj.data", *YOLO],
    "obj.names": ["obj.names", "obj.data:train = images|names = obj.names", *YOLO],
    "classes.txt": ["classes.txt", *YOLO],
    "data.yaml": ["data.yaml", *YOLO],
    "labelmap.txt": ["labelmap.txt", "JPEGImages/x.png", f"Annotations/x.xml:{XML}"],
    "ImageSets": ["ImageSets/Main/train.txt", "JPEGImages/x.png", f"Annotations/x.xml:{XML}"],
}


@pytest.mark.parametrize("case", NOT_UTF8)
def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path, default_settings: Load, case: str) -> None:
    first, *others = NOT_UTF8[case]
    lay_out(tmp_path, f"{first}: ", *others)
    (tmp_path / first).write_bytes("a\nMöwe = ä\n".encode("latin-1"))
    with pytest.raises(DataError, match=rf"{tmp_path / first}: .*line 2 is not UTF-8 text \(byte 0xf6\)"):
        find_source(default_settings(f"data.root={tmp_path}").data, "training").columns()
    with pytest.raises(DataError, match="line 2 is not UTF-8 text"):
        read_text(tmp_path / first)


def validation_of(data: Any) -> set[str]:
    """Names of the validation images; the training set has all others."""
    parts = [dataset.annotations for dataset in build_datasets(data, 0, None)]
    names = [{Path(part.file_name(index)).name for index in range(len(part))} for part in parts]
    assert not names[0] & names[1] and names[0]
    return names[1]


DIVIDED = {  # a set of the images of these names; everything but COCO has ids that are positions
    "YOLO": lambda names: [f"{part}/{name}.{suffix}" for name in names for part, suffix in
                           (("images", "png"), ("labels", f"txt:{LINE}"))],
    "YOLO, list": lambda names: ["train.txt:" + "|".join(f"p/{name}.png" for name in names)] + [
        f"p/{name}.{suffix}" for name in names for suffix in ("png", f"txt:{LINE}")],
    "VOC": lambda names: [file for name in names for file in
                          (f"JPEGImages/{name}.png", f"Annotations/{name}.xml:{XML.replace('x.png', name + '.png')}")],
}  # fmt: skip


@pytest.mark.parametrize("case", DIVIDED)
def test_added_images_move_no_other_one(tmp_path: Path, default_settings: Load, case: str) -> None:
    """A folder more changes where names begin, an image in front changes every position."""
    names = [f"b{number:02}" for number in range(20)]
    found = []
    for folder, listed in {"before": names, "after": ["a0", "deep/er", *names, "c1"]}.items():
        lay_out(tmp_path / folder, *DIVIDED[case](listed))
        found.append(validation_of(default_settings(f"data.root={tmp_path / folder}").data))
    assert found[0] and found[0] == {name for name in found[1] if name.startswith("b")}
    dataset = ConvertedDataset(("a",), {"all": [ImageEntry(None, f"{name}.png", 1, 1, []) for name in names]}, {})
    split_by_name(dataset, [0.9, 0.1], ConversionFindings())  # as convert_dataset.py --split 0.9/0.1 does
    assert {entry.name for entry in dataset.splits["val"]} == found[0]


def test_the_division_of_coco_stays(tmp_path: Path, default_settings: Load) -> None:
    """By the hash of image ids: old runs continue with the same images."""
    content = listing(*(f"{number}.png" for number in range(1, 41)))
    lay_out(tmp_path, "a.json", *(f"images/{number}.png" for number in range(1, 41)), content=content)
    found = validation_of(default_settings(f"data.root={tmp_path}").data)
    assert found == {f"{number}.png" for number in range(1, 41) if zlib.crc32(str(number).encode()) % 10**6 < 10**5}


@pytest.mark.parametrize("case", ["set", "splits"])
def test_a_folder_is_looked_at_once_for_both_sets(tmp_path: Path, default_settings: Load, monkeypatch, case) -> None:
    """It may hold 100,000 files."""
    folders = {"set": [""], "splits": ["train", "val"]}[case]
    names = [f"{kind}/{folder}/{number}.{end}" for folder in folders for number in range(4)
             for kind, end in (("images", "png"), ("labels", f"txt:{LINE}"))]  # fmt: skip
    lay_out(tmp_path, *names)
    looks = []
    monkeypatch.setattr(sources, "recognise", lambda *words: looks.append(words) or recognise(*words))
    training, validation = build_datasets(default_settings(f"data.root={tmp_path}").data, 0, None)
    assert len(looks) == 1 and len(training) + len(validation) == 4 * len(folders)


def test_a_set_that_lacks_some_images_says_how_many_and_which(tmp_path: Path, default_settings: Load) -> None:
    """Up to a tenth: one line of the plan, with three examples, and a warning of check_dataset.py with all of them."""
    names = [f"p/{number}.png" for number in range(40)] + [f"p/gone{number}.png" for number in range(4)]
    files = [file for number in range(40) for file in (f"p/{number}.png", f"p/{number}.txt:{LINE}")]
    lay_out(tmp_path, *files, "train.txt:" + "|".join(names), "data.yaml:train: train.txt|names: [a]")
    source = find_source(default_settings(f"data.root={tmp_path}").data, "training")
    line = "left out: 4 images whose file is missing (p/gone0.png, p/gone1.png, p/gone2.png, ...)"
    assert f"data        {line}" in source_lines(source)
    findings = Findings()
    read_source(source, "both", findings)
    (warning,) = findings.of("warning")
    assert len(warning.items) == 4 and warning.what == "left out in reading: images whose file is missing"
