"""Pascal VOC: one XML file per image with corners in pixels; lists of images in ImageSets/Main."""

import codecs
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from detection.data.conversion.dataset import (
    Box,
    ConvertedDataset,
    Corners,
    Findings,
    ImageEntry,
    check_names,
    common_root,
    finish_box,
    image_in_pixels,
    images_inside,
    note_duplicates,
    parse_number,
    read_text,
    relative_name,
    split_of,
    turn_box,
)
from detection.data.image_file import IMAGE_SUFFIXES
from detection.errors import DataError

ANNOTATIONS, IMAGES = ("Annotations", "annotations"), ("JPEGImages", "images", "Images")
CLASS_LISTS = ("labelmap.txt", "classes.txt", "labels.txt")  # CVAT's and labelImg's
DECLARATION = re.compile(rb"""<\?xml[^>]*?encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
EXPAT_ENCODINGS = (b"utf-8", b"iso-8859-1", b"us-ascii")
BACKGROUND = "background"  # first line of CVAT's list; no object has it
FLAGS = ("difficult", "truncated", "occluded")


def read_voc(
    source: Path,
    names: Sequence[str] | None,
    split: str,
    findings: Findings,
    progress: Any,
    inclusive: bool = True,
    difficult: str = "crowd",
    wanted: Collection[str] | None = None,
) -> ConvertedDataset:
    """Read a dataset.

    Args:
        source: folder with Annotations/ and JPEGImages/, with XML beside the images, or with such a folder per split.
        names: of the classes; None: those of labelmap.txt or classes.txt, then others that occur, in alphabetical
            order (which is that of VOC's own 20).
        split: name for images if the dataset has no splits.
        inclusive: corners as VOC's development kit defines them: the first pixel is 1, xmax and ymax belong to the
            box; False: the first pixel is 0 and they do not.
        difficult: objects so marked are "crowd" regions, which neither count nor are learned, as in VOC's own
            evaluation; or "keep": objects like others.
        wanted: splits to read; None: all.

    Raises:
        DataError: no annotations.

    Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html, "Annotation", "Bounding box"
    """
    files = find_splits(source, split, findings)
    if not any(files.values()):
        raise DataError(f"{source}: no XML annotations found")
    labels = {} if names is None else {name: label for label, name in enumerate(check_names(names, "--names"))}
    splits: dict[str, list[ImageEntry]] = {}
    for name in [name for name in files if wanted is None or name in wanted]:
        splits[name] = []
        for file in progress(files[name]):
            entry = read_entry(file, source, labels, names is None, findings, inclusive, difficult == "crowd")
            if entry is not None:
                splits[name].append(entry)
    if names is None:
        labels = sort_labels(splits, labels, listed_classes(source))
    used = {name: [entry.file for entry in entries if entry.file] for name, entries in splits.items()}
    roots = {name: common_root(images) for name, images in used.items() if images}
    for name, entries in splits.items():
        for entry in entries:
            entry.name = relative_name(entry.file or Path(entry.name), roots[name])
    find_unannotated([image for images in used.values() for image in images], annotations_of(source), findings)
    return ConvertedDataset(check_names(names or labels, str(source)), splits, roots)


def has_annotations(source: Path) -> bool:
    """Return whether a folder, or one of a split in it, holds VOC's XML."""
    names = {name.lower() for name in (*ANNOTATIONS, *IMAGES, "labels", "xml", "xmls")}
    below = [path for path in source.iterdir() if path.is_dir()]
    folders = [source, *(path for path in below if path.name.lower() in names or split_of(path.name))]
    first = (next(iter(sorted(folder.glob("*.xml"))), None) for folder in folders)
    return any(file is not None and _is_annotation(file) for file in first)


def _is_annotation(file: Path) -> bool:
    beginning = file.read_bytes()[:4000].replace(b"\0", b"")  # UTF-16 has a zero byte beside each of these letters
    return re.search(rb"<annotation[\s>]", beginning) is not None


def listed_classes(source: Path) -> list[str]:
    """Class names of a list beside the annotations, in its order; empty without one."""
    file = next((file for name in CLASS_LISTS if (file := source / name).is_file()), None)
    if file is None:
        return []
    lines = read_text(file).splitlines()
    return [name for line in lines if (name := line.split(":")[0].strip()) and not name.startswith("#")]


def sort_labels(splits: dict[str, list[ImageEntry]], labels: dict[str, int], listed: Sequence[str]) -> dict[str, int]:
    """From the order in which the classes were met to that of the list, others behind it by alphabet."""
    first = [name for name in dict.fromkeys(listed) if name in labels or name != BACKGROUND]
    new = {name: number for number, name in enumerate([*first, *sorted(labels.keys() - set(first))])}
    new_label = {label: new[name] for name, label in labels.items()}
    for entries in splits.values():
        for entry in entries:
            entry.boxes = [replace(box, label=new_label[box.label]) for box in entry.boxes]
    return new


def find_unannotated(used: Sequence[Path], annotations: Path, findings: Findings) -> None:
    """Images beside the used ones that have no XML file."""
    stems = {file.stem for file in annotations.rglob("*.xml")}
    for folder in sorted({image.parent for image in used}):
        for image in images_inside(folder):
            if image.stem not in stems:
                findings.skip("images without an XML file", str(image))


def annotations_of(source: Path) -> Path:
    return next((source / name for name in ANNOTATIONS if (source / name).is_dir()), source)


def find_splits(source: Path, fallback: str, findings: Findings) -> dict[str, list[Path]]:
    """XML files of each split: by ImageSets/Main/train.txt, val.txt, test.txt; by folders; else all as one split."""
    directory = annotations_of(source)
    lists = source / "ImageSets" / "Main"
    present = [name for name in ("train", "val", "test") if (lists / f"{name}.txt").is_file()]
    if "train" not in present and "val" not in present and (lists / "trainval.txt").is_file():
        present.append("trainval")
    if not present:
        folders = sorted(path for path in source.iterdir() if path.is_dir() and split_of(path.name))
        found = {str(split_of(folder.name)): sorted(folder.rglob("*.xml")) for folder in folders}
        if any(found.values()):
            return found
        return {fallback: sorted(directory.rglob("*.xml"))}
    splits: dict[str, list[Path]] = {}
    for name in present:
        file = lists / f"{name}.txt"
        splits["train" if name == "trainval" else name] = chosen = []
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            if line.strip():
                # the lists of single classes have a second column
                stems = (line.strip(), line.split()[0])
                found_file = next((path for stem in stems if (path := directory / f"{stem}.xml").is_file()), None)
                if found_file is None:
                    findings.skip("images of a list without an XML file", f"{file}:{number}")
                else:
                    chosen.append(found_file)
    listed = {file for chosen in splits.values() for file in chosen}
    for file in sorted(directory.rglob("*.xml")):
        if file not in listed:
            findings.skip("XML files in no list of ImageSets/Main", str(file))
    return splits


class _NoDoctype(ElementTree.TreeBuilder):
    """Entities are defined in a DOCTYPE, and entities of entities fill any memory; no annotation needs one."""

    def doctype(self, *_: Any) -> None:
        raise ValueError("DOCTYPE")


def parse_xml(file: Path, findings: Findings) -> ElementTree.Element | None:
    """The <annotation>; None: left out, which the findings say."""
    try:
        root = ElementTree.fromstring(decode_xml(file.read_bytes()), parser=ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, OSError, LookupError) as error:
        findings.skip("XML files that cannot be read", f"{file}: {error}")
    except ValueError:
        findings.skip("XML files with a DOCTYPE or of an unknown encoding, which are not read", str(file))
    else:
        if root.tag == "annotation":
            return root
        findings.skip("XML files that are no annotation", str(file))
    return None


def decode_xml(content: bytes) -> bytes | str:
    """Text where expat would refuse the declared encoding: it lacks GBK, which labelling tools write in China, and what
    programs of .NET declare as UTF-16 is often saved as UTF-8. A byte order mark is believed before a declaration.

    Raises:
        LookupError, UnicodeDecodeError: no such encoding, or the text is of another.
    """
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding)
    declared = DECLARATION.match(content)
    if declared is None or declared[1].lower() in EXPAT_ENCODINGS:
        return content
    return content.decode("utf-8" if declared[1].lower().startswith(b"utf-16") else declared[1].decode("ascii"))


def find_image(file: Path, root: ElementTree.Element, source: Path) -> Path | None:
    """The image of an annotation: of its name, or else of its <filename>, in JPEGImages/ or beside the XML file."""
    folders = [path for name in IMAGES for path in (source / name, file.parent.parent / name) if path.is_dir()]
    folders.append(file.parent)
    stated = Path((root.findtext("filename") or "").strip().replace("\\", "/")).name  # never a way out of the folder
    suffixes = [Path(stated).suffix, *sorted(IMAGE_SUFFIXES), *sorted(suffix.upper() for suffix in IMAGE_SUFFIXES)]
    tries = [f"{file.stem}{suffix}" for suffix in suffixes if suffix] + [stated]
    paths = (folder / name for folder in folders for name in tries if name and Path(name).suffix.lower() != ".xml")
    return next((path for path in paths if path.is_file()), None)


def read_entry(
    file: Path,
    source: Path,
    labels: dict[str, int],
    new_names: bool,
    findings: Findings,
    inclusive: bool,
    difficult_is_crowd: bool,
) -> ImageEntry | None:
    """One image and its boxes; None: it is left out, which the findings say. New names are added to the labels."""
    root = parse_xml(file, findings)
    if root is None:
        return None
    image = find_image(file, root, source)
    if image is None:
        findings.skip("images whose file is missing", str(file))
        return None
    sides = [parse_number(text_of(root, f"size/{name}")) for name in ("width", "height")]
    stated = (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None
    fitted = image_in_pixels(image, str(file), stated, findings)
    if fitted is None:
        return None
    size, turned = fitted
    boxes: list[Box] = []
    for number, entry in enumerate(root.findall("object"), start=1):
        place, name = f"{file}: object {number}", text_of(entry, "name")
        if not name or (name not in labels and not new_names):
            findings.skip("objects without a name, or of a class that is not among --names", place)
            continue
        corners = read_corners(entry, inclusive, place, findings)
        if corners is None:
            continue
        flags = {flag: 1 for flag in FLAGS if text_of(entry, flag) == "1"}
        crowd = difficult_is_crowd and "difficult" in flags
        if crowd:
            findings.note(
                "difficult objects, made crowd regions (--difficult keep or data.difficult=keep makes them objects)",
                place,
            )
        corners = corners if turned is None else turn_box(corners, turned)
        label = labels.setdefault(name, len(labels))
        box = finish_box(label, corners, size, place, findings, crowd, flags)
        if box is not None:
            boxes.append(box)
    note_duplicates(boxes, str(file), findings)
    return ImageEntry(image, image.name, *size, boxes)


def read_corners(entry: ElementTree.Element, inclusive: bool, place: str, findings: Findings) -> Corners | None:
    """Corners (x1, y1, x2, y2) of an <object> in pixels from 0, x2 and y2 outside; None: the findings say why."""
    edges = [parse_number(text_of(entry, f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax")]
    numbers = [edge for edge in edges if edge is not None]
    if len(numbers) < 4:
        findings.skip("objects whose bndbox lacks a usable number", place)
        return None
    if inclusive and min(numbers[:2]) < 1:
        findings.note(
            "boxes that begin before pixel 1, the first of VOC; --voc-corners or data.voc_corners=exclusive?", place
        )
    first = int(inclusive)
    return numbers[0] - first, numbers[1] - first, numbers[2], numbers[3]


def text_of(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
