"""What check_dataset.py can find: every kind with its severity and what to do, and the list that checks add to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SEVERITIES = ("error", "warning", "info")
MAX_LISTED = 5  # items in the text; the JSON has all


class Kind(NamedTuple):
    """One kind of finding."""

    severity: str  # error: training refuses it, or stops at it; warning: it trains, but worse or on less than you think
    what: str  # after the count
    advice: str


KINDS = {
    # the annotation file
    "unreadable_file": Kind("error", "annotation file is no COCO JSON", "export it again"),
    "no_annotation_file": Kind("error", "split without an annotation file", "--split checks the other alone"),
    "byte_order_mark": Kind("error", "byte order mark at the beginning of the JSON", "save it as UTF-8 without one"),
    "json_key_twice": Kind("error", "keys that occur twice in one JSON object", "remove one: only the last is read"),
    "json_constant": Kind("error", "NaN or Infinity, which is no JSON", "write finite numbers"),
    "not_an_object": Kind("error", "entries that are no JSON objects", "remove them"),
    "missing_key": Kind("error", "entries without a key that is needed", "add the key or remove the entry"),
    "bad_id": Kind("error", "entries with an id that is no whole number", "number them"),
    "bad_value": Kind("error", "entries with a value of the wrong type", "correct the value"),
    "bad_image_size": Kind("error", "images whose width or height is no whole number", "correct or remove the keys"),
    "bad_box": Kind("error", "boxes that are not four finite numbers", "write bbox as [x, y, width, height]"),
    "bad_area": Kind("error", "areas that are no finite number", "correct or remove the key: it follows from bbox"),
    "refused": Kind("error", "reason why training refuses the file", ""),
    # categories
    "no_categories": Kind("error", "list of categories is empty", "list them"),
    "category_id_twice": Kind("error", "category ids that occur twice", "give each category its own id"),
    "category_name_twice": Kind("error", "category names that occur twice", "merge or rename them"),
    "similar_category_names": Kind("warning", "category names that differ in case or spaces only", "merge or rename"),
    "unknown_category": Kind("error", "boxes of a category that is not listed", "list the category or remove the box"),
    "untrained_category": Kind("error", "validation categories that training lacks", "see data.class_names"),
    "other_category_ids": Kind("info", "categories with another id in validation; names decide", ""),
    "wrong_class_count": Kind("error", "number of classes other than model.num_classes", "correct or unset it"),
    "unused_category": Kind("warning", "categories without a box", "remove them, or find their images"),
    "rare_category": Kind("info", "categories with under 1 % of the largest one's boxes", "data.balance=repeat_factor"),
    # entries and references
    "no_images": Kind("error", "list of images is empty", "list them"),
    "no_boxes": Kind("error", "training set without a usable box", "annotate it"),
    "no_ground_truth": Kind("warning", "validation set without a usable box: no AP", "annotate it"),
    "image_id_twice": Kind("error", "image ids that occur twice", "give each image its own id"),
    "file_name_twice": Kind("warning", "file names that two images share", "merge the entries"),
    "file_name_escapes": Kind("error", "file names that are no plain path", "name files below the image directory"),
    "annotation_id_twice": Kind("warning", "annotation ids that occur twice", "renumber: other programs lose boxes"),
    "annotation_id_zero": Kind("info", "annotation with the id 0", "pycocotools alone would count it as not found"),
    "orphan_annotation": Kind("warning", "boxes of images that are not listed, left out", "list the image"),
    "size_not_stated": Kind("info", "images without width or height in the file", "add them: boxes cannot be checked"),
    # boxes
    "degenerate_box": Kind("warning", "boxes without width or height, left out", "remove them"),
    "box_outside": Kind("warning", "boxes outside their image, left out", "correct or remove them"),
    "box_cut": Kind("warning", "boxes that reach out of their image, cut", "correct them: is it the right image?"),
    "box_hair_over": Kind("info", "boxes up to 1 pixel over the border, cut", ""),
    "duplicate_box": Kind("warning", "boxes that repeat one of the same category", "remove them"),
    "box_covers_image": Kind("info", "boxes over the whole image", "fine if the object fills it"),
    "area_disagrees": Kind("warning", "areas that do not fit their box", "correct or remove: APs, APm, APl use it"),
    "crowd": Kind("info", "crowd boxes: nothing is learned inside them", ""),
    "image_without_boxes": Kind("info", "images without boxes, trained on as background", "fine if nothing is there"),
    "many_boxes": Kind("info", "images with over 100 boxes", "COCO counts 100 detections per image and class"),
    # image files
    "no_image_directory": Kind("error", "image directory is not there", "data.train_images, data.validation_images"),
    "image_missing": Kind("error", "image files that do not exist", "put them back or remove the entries"),
    "image_not_regular": Kind("error", "image files that are no regular file", "replace them"),
    "image_outside": Kind("error", "image files that are links out of the directory", "data.follow_links=true"),
    "image_empty": Kind("error", "image files of 0 bytes", "copy them again"),
    "image_too_large": Kind("error", "images too large to decode", "make them smaller"),
    "image_damaged": Kind("error", "image files that are damaged or no image", "copy them again"),
    "size_differs": Kind("error", "images of another size than the file says", "correct width and height"),
    "size_swapped": Kind("error", "images with width and height swapped", "annotate with the EXIF orientation applied"),
    "exif_orientation": Kind("info", "images with an EXIF orientation, which is applied", "boxes must fit that view"),
    "unusual_mode": Kind("info", "images other than 8-bit RGB, converted", ""),
    "wrong_extension": Kind("info", "image files whose ending is another format's; the content decides", ""),
    "tiny_image": Kind("warning", "images with a side under 10 pixels", "remove them"),
    "extreme_aspect": Kind("warning", "images over 10 times as long as wide", "cut them into pieces"),
    "unlisted_image": Kind("info", "images in the directory that the file does not list", "list them or ignore it"),
    "duplicate_image": Kind("warning", "images with the content of another one", "remove one of each"),
    # both splits
    "leakage": Kind("warning", "validation images with the content of a training image", "remove them: AP is too good"),
    "leakage_by_look": Kind("warning", "validation images that look like a training image", "look at the pairs"),
    # fit to the network
    "tiny_box": Kind("warning", "boxes under 2 pixels wide or high for the network", "try a larger image_size"),
    "shared_prediction": Kind("info", "boxes that lose anchor and cell to another one", "try a larger image_size"),
    "poor_anchors": Kind("warning", "anchors that fit the boxes badly", "anchor_creator.py makes better ones"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """All items of one kind in one split."""

    kind: str
    severity: str
    split: str  # training, validation or both
    items: list[int | str]  # annotation ids, file names or category names
    details: list[str]  # one per item, or empty

    def row(self) -> dict[str, Any]:
        """For JSON: everything."""
        kind = KINDS[self.kind]
        names = ["kind", "severity", "split", "count", "what", "advice", "items"]
        values = [self.kind, self.severity, self.split, len(self.items), kind.what, kind.advice, self.items]
        return dict(zip(names, values, strict=True)) | ({"details": self.details} if self.details else {})

    def line(self) -> str:
        """For the log: count, the first items, what to do."""
        kind = KINDS[self.kind]
        return f"{kind.what}: {len(self.items)} ({self.listed()})" + (f"; {kind.advice}" if kind.advice else "")

    def listed(self) -> str:
        """The first items with their details, safe for a terminal."""
        shown = [str(item) for item in self.items[:MAX_LISTED]]
        if self.details:
            pairs = zip(shown, self.details, strict=False)
            shown = [f"{item}: {detail}" if detail else item for item, detail in pairs]
        text = ("; " if self.details else ", ").join(shown) + (" ..." if len(self.items) > MAX_LISTED else "")
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


@dataclass
class Findings:
    """What checks have found so far.

    Args:
        strict: degenerate and outside boxes are errors, as `data.strict` makes them.
    """

    strict: bool = False
    found: list[Finding] = field(default_factory=list)

    def add(self, kind: str, split: str, items: Iterable[int | str], details: Sequence[str] = ()) -> None:
        """Nothing where there are no items; joined to what is there of the same kind and split."""
        if not (items := list(items)):
            return
        for finding in self.found:
            if (finding.kind, finding.split) == (kind, split):
                finding.items.extend(items)
                finding.details.extend(details)
                return
        severity = KINDS[kind].severity
        if self.strict and kind in ("degenerate_box", "box_outside"):
            severity = "error"
        self.found.append(Finding(kind, severity, split, items, list(details)))

    def of(self, severity: str) -> list[Finding]:
        return [finding for finding in self.found if finding.severity == severity]

    def ordered(self) -> list[Finding]:
        """Errors first."""
        return sorted(self.found, key=lambda finding: SEVERITIES.index(finding.severity))

    def __getitem__(self, kind: str) -> list[int | str]:
        """All items of a kind, over the splits."""
        return [item for finding in self.found if finding.kind == kind for item in finding.items]
