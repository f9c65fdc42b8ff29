"""Tell what a file of weights is that this program did not write. Nothing in the file is executed."""

import codecs
import contextlib
import errno
import itertools
import json
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

MOST_OPERATIONS = 200_000  # of a pickle that are looked at; a large model has some ten thousand
PICKLES_OF_OLD_FILES = 4  # torch.save before 1.6: magic number, version, machine, then the content
MOST_BYTES = 16 << 20  # of settings, names and descriptions of networks
SHOWN = 60  # characters of a name from a file
SHOWN_TEXT = 30  # of the beginning of a text file

# First bytes, at an offset -> what the file is.
MAGIC = {
    (0, b"\x89HDF"): "an HDF5 file, as Keras writes it",
    (4, b"TFL3"): "a TensorFlow Lite file",
    (
        0,
        b"version https://git-lfs",
    ): "a pointer of Git LFS; fetch the weights themselves with: git lfs pull",
    (0, b"\x1f\x8b"): "a gzip archive",
}
WEB_PAGE = "a web page: the download failed"
WEB_STARTS = (b"<!doctype", b"<html", b"<head", b"<body", b"<!--", b"<?xml", b"<script")  # in lower case
SAFETENSORS = "a safetensors file"
# Package whose classes a pickle names -> the program.
PROGRAMS = {
    "ultralytics": "a checkpoint of ultralytics (a pickled model of that program)",
    "models": "a checkpoint of YOLOv5, YOLOv7 or a relative (a pickled model of that program)",
    "yolox": "a checkpoint of YOLOX",
    "super_gradients": "a checkpoint of super-gradients",
    "mmengine": "a checkpoint of OpenMMLab (mmdetection, mmyolo)",
    "mmcv": "a checkpoint of OpenMMLab (mmdetection, mmyolo)",
    "detectron2": "a checkpoint of detectron2",
    "pytorch_lightning": "a checkpoint of PyTorch Lightning",
    "lightning": "a checkpoint of PyTorch Lightning",
    "transformers": "a pickled model of transformers",
    "timm": "a pickled model of timm",
    "torchvision": "a pickled model of torchvision",
}
# Names of tensors -> whose state dict it is; the first of which all names are in the file.
STATES = {
    ("rpn.head.cls_logits.weight", "backbone.body.conv1.weight"): "torchvision's weights of a detector",
    ("conv1.weight", "layer1.0.conv1.weight", "fc.weight"): "torchvision's weights of a ResNet",
    ("features.0.0.weight", "classifier.3.weight"): "torchvision's weights of a MobileNet",
    ("features.0.weight", "classifier.6.weight"): "torchvision's weights of a VGG or AlexNet",
    ("model.0.conv.weight",): "a state dict of YOLOv5, YOLOv8 or a relative",
    ("module_list.0.Conv2d.weight",): "a state dict of ultralytics' YOLOv3 before YOLOv5",
    ("backbone.backbone.stem.conv.conv.weight",): "a state dict of YOLOX",
}
PLAIN_PACKAGES = {"torch", "collections", "numpy", "_codecs", "builtins", "__builtin__"}  # of tensors and plain values


def read_bounded(path: Path) -> bytes:
    """Read a small file of text that a user names, which may be a pipe, but not one without end.

    Raises:
        OSError: it cannot be read, or has more than `MOST_BYTES`.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MOST_BYTES >> 20} MiB")
    return content


def describe_file(path: Path) -> str | None:
    """Say in a few words what a file is, from its first bytes, its archive and the names in its pickle.

    Returns:
        None: not recognised, or unreadable; it may be damaged, or a Darknet file.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _describe_archive(archive)
        with open(path, "rb") as file:
            start = file.read(64)
            if not start:
                return "an empty file"
            for (offset, magic), text in MAGIC.items():
                if start[offset : offset + len(magic)] == magic:
                    return text
            if start[8:10] == b'{"' and struct.unpack("<Q", start[:8])[0] < path.stat().st_size:
                return SAFETENSORS
            if what := _describe_text(start):
                return what
            if start[0] != 0x80:  # the first byte of every pickle that torch writes
                return None
            file.seek(0)
            names = list(_globals(file))
            with contextlib.suppress(ValueError):  # a single pickle: there is no other
                for _ in range(PICKLES_OF_OLD_FILES - 1):
                    names += _globals(file)
            return _describe_globals(names) or "a Python pickle"
    except Exception:  # noqa: BLE001  (damaged archives and pickles raise at least ten types)
        return None


def _describe_text(start: bytes) -> str | None:
    """Say what a file is that begins with text; a Darknet file begins with small numbers of 4 bytes, so with zeros."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(WEB_STARTS):
        return WEB_PAGE
    try:
        letters = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last letter may be cut
    except UnicodeDecodeError:
        return None
    if len(letters) > 3 and all(letter.isprintable() or letter in "\t\r\n" for letter in letters):
        return f"a text file (it begins with {clean(' '.join(letters.split()))[:SHOWN_TEXT]})"
    return None


def _describe_archive(archive: zipfile.ZipFile) -> str | None:
    names = archive.namelist()
    ends = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in ends or any(end.startswith("code/") for end in ends):
        return "TorchScript (torch.jit.save)"
    if "data.pkl" not in ends:
        if "model.weights.h5" in names:
            return "a Keras model"
        return "an archive of NumPy" if names and names[0].endswith(".npy") else "a zip archive without a checkpoint"
    with archive.open(next(name for name in names if name.endswith("data.pkl"))) as file:
        return _describe_globals(_globals(file))


def _globals(file: IO[bytes]) -> Iterator[str]:
    """Yield the names of classes and functions that the next pickle of a file refers to, as "module name"."""
    texts: list[str] = []  # STACK_GLOBAL takes module and name from the stack
    for operation, argument, _ in itertools.islice(pickletools.genops(file), MOST_OPERATIONS):
        if operation.name == "GLOBAL":
            yield str(argument)
        elif operation.name == "STACK_GLOBAL" and len(texts) >= 2:
            yield " ".join(texts[-2:])
        elif isinstance(argument, str):
            texts = [*texts[-1:], argument]


def _describe_globals(names: Iterable[str]) -> str | None:
    foreign = {name for name in names if name.split(" ")[0].split(".")[0] not in PLAIN_PACKAGES or ".nn." in name}
    packages = {name.split(" ")[0].split(".")[0] for name in foreign}
    for package, text in PROGRAMS.items():
        if package in packages:
            return text
    if foreign:
        first = clean(sorted(foreign)[0].replace(" ", "."))
        return f"a pickled object of another program ({first})"
    return None


def describe_content(content: Any) -> str:
    """Say in a few words what tensors and plain values loaded from a file are."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}, saved with torch.save"
    for state in (content, content.get("state_dict"), content.get("model"), content.get("model_state_dict")):
        if isinstance(state, Mapping) and state and all(hasattr(value, "shape") for value in state.values()):
            names = [str(name).removeprefix("module.") for name in state]
            known = next((text for needed, text in STATES.items() if set(needed) <= set(names)), "a plain state dict")
            return f"{known} ({len(names)} tensors: {', '.join(map(clean, names[:2]))}, ...)"
    keys = ", ".join(clean(str(key)) for key in list(content)[:4])
    return f"a checkpoint of another program (with {keys})" if keys else "an empty dict, saved with torch.save"


def clean(text: str) -> str:
    """Shorten a text from a file and escape what a terminal would obey."""
    text = json.dumps(text[:SHOWN], ensure_ascii=False)[1:-1]
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
