"""Parsing of annotation files without the outlines of polygons."""

import codecs
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from detection.data.outside_names import settle_names
from detection.errors import DataError

INCOMPLETE = "not complete JSON"
BYTE_ORDER_MARK = "\ufeff"
# Outlines of polygons, which are most of COCO's bytes and which nobody reads. Sound where no string holds a backslash:
# then a key is exactly what stands between two quotes before a colon.
OUTLINES = re.compile(rb'"segmentation"\s*+:\s*+\[(?:\s*+\[[0-9eE+\-.,\s]*+\]\s*+,?+)*+\s*+\]')

Place = tuple[str, int]  # name of a list of the file, position in it


class Fault(NamedTuple):
    """One reason for training to refuse the file."""

    kind: str  # key of `findings.KINDS`
    item: int | str  # id, file name or category name to list
    message: str
    place: Place | None = None  # the faulty entry; None if the fault is not of a single entry


def read_json(path: Path) -> tuple[Any, list[Fault]]:
    """Parse a file without its segmentations, which take most of the time and half of the memory.

    Returns:
        The parsed content, with the names of `settle_names`; and faults for what Python accepts but JSON does not
        allow.

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    faults: list[Fault] = []

    def constant(name: str) -> float:
        faults.append(Fault("json_constant", name, f"contains {name}, which is not JSON"))
        return float(name)

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            key = next(key for key in keys if keys.count(key) > 1)
            item = f"{key} (object with id {result.get('id')})"
            faults.append(Fault("json_key_twice", item, f"the key {item} occurs twice in one object"))
        result.pop("segmentation", None)
        return result

    try:
        content = path.read_bytes()
        text = (content if b"\\" in content else OUTLINES.sub(b'"segmentation":0', content)).decode()
        del content
        if text.startswith(BYTE_ORDER_MARK):
            message = "begins with a byte order mark; save it as UTF-8 without one"
            faults.append(Fault("byte_order_mark", path.name, message))
            text = text.removeprefix(BYTE_ORDER_MARK)
        parsed = json.loads(text, parse_constant=constant, object_pairs_hook=build_object)
        settle_names(parsed, path)
        return parsed, faults
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {describe_error(error)}") from None
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from None


def describe_error(error: Exception) -> str:
    """Say why text is no JSON; a file that was copied or exported in part ends too early."""
    if isinstance(error, json.JSONDecodeError):
        text = error.doc.rstrip()
        if not text:
            return "not a JSON file: it is empty"
        if error.pos >= len(text) or not text.endswith("}"):
            return f"{INCOMPLETE}, it ends too early ({error}); export or copy it again"
    if isinstance(error, UnicodeDecodeError) and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not a JSON file: it is UTF-16; save it as UTF-8"
    return f"not a JSON file: {error}"
