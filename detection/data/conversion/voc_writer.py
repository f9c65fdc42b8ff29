"""Pascal VOC, written: one XML file per image, lists of the splits in ImageSets/Main, class names in classes.txt."""

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from detection.data.annotation_file import CONTROL
from detection.data.conversion.dataset import SPLITS, Box, ConvertedDataset, Findings, ImageEntry, as_decimal
from detection.errors import DataError

# Written with every object, as VOC's files have them: name -> value where the dataset tells none.
FLAGS = {"truncated": 0, "difficult": 0}


def note_losses(dataset: ConvertedDataset, findings: Findings) -> None:
    """Say what VOC holds otherwise or not at all.

    Raises:
        DataError: a class name has control characters, which XML does not allow.
    """
    used = {box.label for entries in dataset.splits.values() for entry in entries for box in entry.boxes}
    for label, name in enumerate(dataset.names):
        if CONTROL.search(name):
            raise DataError(
                f"the class name {name!r} holds control characters, which VOC's XML cannot hold; --rename it"
            )
        if label not in used:
            findings.note("classes without an object, which VOC holds in classes.txt alone", name)
    for split, entries in dataset.splits.items():
        if split not in SPLITS:
            findings.note("splits whose name VOC does not know; their list is ImageSets/Main/NAME.txt", split)
        for entry in entries:
            for box in entry.boxes:
                if box.crowd and not box.extra.get("difficult"):
                    findings.note("crowd regions, written as difficult objects", f"{split}/{entry.name}")


def write_voc(dataset: ConvertedDataset, root: Path, progress: Any) -> None:
    """Write Annotations/, ImageSets/Main/ and classes.txt; images belong into JPEGImages/.

    Raises:
        OSError: cannot be written.
    """
    lists = root / "ImageSets" / "Main"
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    lists.mkdir(parents=True)
    for split, entries in dataset.splits.items():
        for entry in progress(entries):
            file = (root / "Annotations" / entry.name).with_suffix(".xml")
            file.write_bytes(voc_xml(entry, dataset.names))
        stems = "".join(f"{Path(entry.name).stem}\n" for entry in entries)
        (lists / f"{split}.txt").write_text(stems, encoding="utf-8")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in dataset.names), encoding="utf-8")


def voc_xml(entry: ImageEntry, names: Sequence[str]) -> bytes:
    """The <annotation> of an image as UTF-8."""
    root = ElementTree.Element("annotation")
    add(root, "folder", "JPEGImages")
    add(root, "filename", entry.name)
    size = add(root, "size")
    for name, value in (("width", entry.width), ("height", entry.height), ("depth", 3)):
        add(size, name, value)
    add(root, "segmented", 0)
    for box in entry.boxes:
        add_object(root, box, names[box.label])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def add_object(root: ElementTree.Element, box: Box, name: str) -> None:
    """An <object>. Corners count from 1 and are inclusive; parts of a pixel stay as decimals.

    Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html, "Bounding box"
    """
    element = add(root, "object")
    add(element, "name", name)
    add(element, "pose", "Unspecified")
    flags = FLAGS | {flag: box.extra[flag] for flag in ("truncated", "occluded", "difficult") if flag in box.extra}
    for flag, value in (flags | ({"difficult": 1} if box.crowd else {})).items():
        add(element, flag, int(bool(value)))
    x, y, width, height = (as_decimal(value) for value in box.xywh)
    corners = add(element, "bndbox")
    for tag, value in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + width), ("ymax", y + height)):
        add(corners, tag, plain(value))


def add(parent: ElementTree.Element, tag: str, text: Any = None) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag)
    element.text = None if text is None else str(text)
    return element


def plain(value: Decimal) -> str:
    """Every digit, without exponent and without zeros at the end."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
