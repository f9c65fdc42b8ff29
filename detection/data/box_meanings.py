"""Keys of annotation files that change what a box means and that training does not read."""

from typing import Any

IGNORE = '"ignore": 1 (data.ignore_as_crowd=true makes them crowd regions)'
DIFFICULT = '"difficult": 1, read as ordinary objects'
ROTATED = "attributes.rotation: the box is drawn turned, and read as upright"
GROUP = "OpenImages' IsGroupOf: one box around many objects, read as one object"
DRAWING = "OpenImages' IsDepiction or IsInside, read as ordinary objects"
PARTLY_LABELLED = (
    "LVIS' neg_category_ids or not_exhaustive_category_ids: only some classes are labelled in an image; "
    "the rest counts as background"
)


def find_meanings(images: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """List annotation ids (of `PARTLY_LABELLED` image ids) by the key that changes their meaning.

    Source: LVIS, https://www.lvisdataset.org/dataset; Open Images V7, "Boxes"; CVAT's COCO export.
    """
    found = {
        IGNORE: [row["id"] for row in rows if row.get("ignore") in (1, True) and not row.get("iscrowd")],
        DIFFICULT: [row["id"] for row in rows if row.get("difficult") in (1, True) and not row.get("iscrowd")],
        ROTATED: [row["id"] for row in rows if "attributes" in row and _is_rotated(row["attributes"])],
        GROUP: [row["id"] for row in rows if row.get("IsGroupOf") or row.get("isgroupof")],
        DRAWING: [row["id"] for row in rows if row.get("IsDepiction") or row.get("IsInside")],
        PARTLY_LABELLED: [
            entry["id"] for entry in images if "neg_category_ids" in entry or entry.get("not_exhaustive_category_ids")
        ],
    }
    return {key: ids for key, ids in found.items() if ids}


def _is_rotated(attributes: Any) -> bool:
    angle = attributes.get("rotation") if isinstance(attributes, dict) else None
    return isinstance(angle, int | float) and angle % 360 != 0
