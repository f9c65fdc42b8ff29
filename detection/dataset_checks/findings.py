"""Findings of the dataset checks: every kind with its severity and advice, and the list that checks append to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SEVERITIES = ("error", "warning", "info")
MAX_LISTED = 5  # items in messages; check.json has all


class Kind(NamedTuple):
    """One kind of finding."""

    severity: str  # error: training refuses the dataset; warning: it trains, but worse or on less data than expected
    what: str  # description, follows the count
    advice: str


KINDS = {
    # the annotation file
    "unreadable_file": Kind("error", "annotation file is not COCO JSON", "export it again"),
    "no_annotation_file": Kind("error", "split without an annotation file", "--split checks only the other one"),
    "byte_order_mark": Kind("error", "byte order mark at the beginning of the JSON", "save it as UTF-8 without one"),
    "json_key_twice": Kind("error", "duplicate keys in a JSON object", "remove one: only the last is read"),
    "json_constant": Kind("error", "NaN or Infinity, which is not JSON", "write finite numbers"),
    "not_an_object": Kind("error", "entries that are not JSON objects", "remove them"),
    "missing_key": Kind("error", "entries without a required key", "add the key or remove the entry"),
    "bad_id": Kind("error", "entries whose id is not a whole number", "number them"),
    "bad_value": Kind("error", "entries with a value of the wrong type", "correct the value"),
    "bad_image_size": Kind("error", "images whose width or height is not a whole number", "correct or remove the keys"),
    "bad_box": Kind("error", "boxes that are not four finite numbers", "write bbox as [x, y, width, height]"),
    "bad_area": Kind("error", "areas that are not a finite number", "correct or remove the key: bbox implies it"),
    "refused": Kind("error", "reason why training refuses the file", ""),
    # categories
    "no_categories": Kind("error", "list of categories is empty", "list them"),
    "category_id_twice": Kind("error", "category ids that occur twice", "give each category its own id"),
    "category_name_twice": Kind("error", "category names that occur twice", "merge or rename them"),
    "similar_category_names": Kind("warning", "category names that differ only in case or spaces", "merge or rename"),
    "unknown_category": Kind("error", "boxes of an unlisted category", "list the category or remove the box"),
    "untrained_category": Kind("error", "validation categories that training lacks", "see data.class_names"),
    "other_category_ids": Kind("info", "categories whose ids differ between splits; names are matched", ""),
    "wrong_class_count": Kind("error", "number of classes other than model.num_classes", "correct or unset it"),
    "unused_category": Kind("warning", "categories without boxes", "remove them, or find their images"),
    "rare_category": Kind("info", "categories with under 1 % of the largest one's boxes", "data.balance=repeat_factor"),
    # entries and references
    "no_images": Kind("error", "list of images is empty", "list them"),
    "no_boxes": Kind("error", "training set without a usable box", "annotate it"),
    "no_ground_truth": Kind("warning", "validation set without a usable box: no AP", "annotate it"),
    "image_id_twice": Kind("error", "image ids that occur twice", "give each image its own id"),
    "file_name_twice": Kind("warning", "file names shared by several images", "merge the entries"),
    "file_name_escapes": Kind(
        "error", "file names that are not plain relative paths", "name files below the image directory"
    ),
    "annotation_id_twice": Kind("warning", "annotation ids that occur twice", "renumber: other programs drop boxes"),
    "annotation_id_zero": Kind("info", "annotation with id 0", "pycocotools counts it as missed; we do not"),
    "orphan_annotation": Kind("warning", "boxes of unlisted images, left out", "list the images"),
    "size_not_stated": Kind("info", "images without width or height in the file", "add them: boxes cannot be checked"),
    # boxes
    "degenerate_box": Kind("warning", "boxes without width or height, left out", "remove them"),
    "box_outside": Kind("warning", "boxes outside their image, left out", "correct or remove them"),
    "box_cut": Kind("warning", "boxes that exceed their image, clipped", "correct them: is it the right image?"),
    "box_hair_over": Kind("info", "boxes up to 1 pixel over the border, clipped", ""),
    "duplicate_box": Kind("warning", "duplicate boxes of the same category", "remove them"),
    "box_covers_image": Kind("info", "boxes over the whole image", "fine if the object fills it"),
    "area_disagrees": Kind("warning", "areas that do not match their box", "correct or remove: APs, APm, APl use it"),
    "crowd": Kind("info", "crowd regions: nothing is learned inside them", ""),
    "image_without_boxes": Kind("info", "images without boxes, used as background", "fine if they are empty"),
    "many_boxes": Kind("info", "images with over 100 boxes", "COCO counts 100 detections per image and class"),
    # image files
    "no_image_directory": Kind("error", "image directory is missing", "data.train_images, data.validation_images"),
    "image_missing": Kind("error", "missing image files", "restore them or remove the entries"),
    "image_not_regular": Kind("error", "image files that are not regular files", "replace them"),
    "image_outside": Kind("error", "image files that are links out of the directory", "data.follow_links=true"),
    "image_empty": Kind("error", "empty image files", "copy them again"),
    "image_too_large": Kind("error", "images too large to decode", "make them smaller"),
    "image_damaged": Kind("error", "image files that are damaged or not images", "copy them again"),
    "size_differs": Kind("error", "images whose size differs from the annotated one", "correct width and height"),
    "size_swapped": Kind("error", "images with width and height swapped", "annotate with the EXIF orientation applied"),
    "exif_orientation": Kind("info", "images with an EXIF orientation, which is applied", "boxes must fit that view"),
    "unusual_mode": Kind("info", "images other than 8-bit RGB, converted", ""),
    "wrong_extension": Kind("info", "image files with another format's extension, which is ignored", ""),
    "tiny_image": Kind("warning", "images with a side under 10 pixels", "remove them"),
    "extreme_aspect": Kind("warning", "images with an aspect ratio over 10", "cut them into pieces"),
    "unlisted_image": Kind("info", "images in the directory that are not listed", "list or ignore them"),
    "duplicate_image": Kind("warning", "images with the content of another one", "remove one of each"),
    # how the files were read
    "left_out": Kind("warning", "left out in reading", "correct them, or see voc_corners and difficult"),
    "reading_note": Kind("info", "in reading", ""),
    "meaning_lost": Kind("warning", "with a key that training does not read", "see docs/train_on_my_data.md"),
    # both splits
    "leakage": Kind("warning", "validation images equal to a training image", "remove them: they inflate AP"),
    "leakage_by_look": Kind("warning", "validation images similar to a training image", "compare the pairs"),
    # fit to the detector
    "tiny_box": Kind("warning", "boxes under 2 pixels wide or high for the network", "try a larger image_size"),
    "shared_prediction": Kind("info", "boxes that lose anchor and cell to another one", "try a larger image_size"),
    "poor_anchors": Kind("warning", "anchors that fit badly", "see anchor_creator.py, or efficientdet.anchor_scale"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """All items of one kind in one split."""

    kind: str
    severity: str
    split: str  # training, validation or both
    items: list[int | str]  # annotation ids, file names or category names
    details: list[str]  # one per item, or empty
    reason: str = ""  # more than the kind says

    @property
    def what(self) -> str:
        """What was found, with the reason where there is one."""
        kind = KINDS[self.kind].what
        return f"{kind}: {self.reason}" if self.reason else kind

    def row(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        kind = KINDS[self.kind]
        names = ["kind", "severity", "split", "count", "what", "advice", "items"]
        values = [self.kind, self.severity, self.split, len(self.items), self.what, kind.advice, self.items]
        return dict(zip(names, values, strict=True)) | ({"details": self.details} if self.details else {})

    def line(self) -> str:
        """Format for the log: count, first items, advice."""
        kind = KINDS[self.kind]
        return f"{self.what}: {len(self.items)} ({self.listed()})" + (f"; {kind.advice}" if kind.advice else "")

    def listed(self) -> str:
        """Format the first items with their details, without control characters."""
        shown = [str(item) for item in self.items[:MAX_LISTED]]
        if self.details:
            pairs = zip(shown, self.details, strict=False)
            shown = [f"{item}: {detail}" if detail else item for item, detail in pairs]
        text = ("; " if self.details else ", ").join(shown) + (" ..." if len(self.items) > MAX_LISTED else "")
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


@dataclass
class Findings:
    """Collected findings of all checks.

    Args:
        strict: whether degenerate boxes and boxes outside their image are errors, as with `data.strict`.
    """

    strict: bool = False
    found: list[Finding] = field(default_factory=list)

    def add(
        self, kind: str, split: str, items: Iterable[int | str], details: Sequence[str] = (), reason: str = ""
    ) -> None:
        """Add items, if any, to the finding of this kind, split and reason."""
        if not (items := list(items)):
            return
        for finding in self.found:
            if (finding.kind, finding.split, finding.reason) == (kind, split, reason):
                finding.items.extend(items)
                finding.details.extend(details)
                return
        severity = KINDS[kind].severity
        if self.strict and kind in ("degenerate_box", "box_outside"):
            severity = "error"
        self.found.append(Finding(kind, severity, split, items, list(details), reason))

    def of(self, severity: str) -> list[Finding]:
        """Select the findings of one severity: error, warning or info."""
        return [finding for finding in self.found if finding.severity == severity]

    def ordered(self) -> list[Finding]:
        """Return the findings by severity, errors first."""
        return sorted(self.found, key=lambda finding: SEVERITIES.index(finding.severity))

    def __getitem__(self, kind: str) -> list[int | str]:
        """Return all items of a kind over both splits."""
        return [item for finding in self.found if finding.kind == kind for item in finding.items]
