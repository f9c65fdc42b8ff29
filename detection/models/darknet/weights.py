"""Darknet weight files (.weights, .conv.N): read into a network, written from one, bit for bit.

Little-endian. Header: major, minor, revision as int32, then the images seen in training as uint64 (uint32 before
version 0.2). Then float32 values, convolution by convolution in network order: with batch norm beta, gamma, running
mean, running variance, kernel; without it bias, kernel.

Source: load_weights and save_weights of https://github.com/pjreddie/darknet, src/parser.c.
"""

import contextlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from detection.errors import CheckpointError, OutputError
from detection.models.darknet.hints import fetch_hint, network_hint

# Rounding leaves variances of dead channels a little below 0 (-7e-44 in published files). In a file of another network
# kernels stand where variances should, and about half of a convolution's are negative.
SMALLEST_VARIANCE = -1e-6
WRONG_SHARE = 0.1  # of a convolution's variances, from which on the file is another network's


@runtime_checkable
class DarknetModel(Protocol):
    """Protocol of networks whose convolutions, or those of their backbone, have an order in Darknet."""

    num_classes: int

    def darknet_convolutions(self) -> list[nn.Module]:
        """Convolutions, each alone or in a Sequential with its batch norm, in network order; none: not in Darknet."""

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolutions that make the predictions."""

    def class_rows(self, num_classes: int) -> list[Tensor]:
        """For each of them the filters of the class scores, if there were so many classes, (A, C)."""


@dataclass(frozen=True)
class Header:
    """Header of a weights file."""

    major: int = 0
    minor: int = 2
    revision: int = 5
    seen: int = 0  # images in training

    @property
    def wide(self) -> bool:
        """Whether `seen` has 64 bits. Darknet uses versions above 1000 for another flag."""
        return self.major * 10 + self.minor >= 2 and self.major < 1000 and self.minor < 1000

    def pack(self) -> bytes:
        """The header as in a file."""
        numbers = struct.pack("<3i", self.major, self.minor, self.revision)
        return numbers + struct.pack("<Q" if self.wide else "<I", self.seen % 2 ** (64 if self.wide else 32))


@dataclass(frozen=True)
class Loaded:
    """Result of `load_darknet_weights`; `lines` describes it for the log."""

    header: Header
    convolutions: int  # number in the file, from the first of the network
    num_classes: int | None  # of the file, if not those of the network
    lines: list[str]


def read_header(content: bytes, path: Path) -> tuple[Header, int]:
    """Read the header; returns it and its length in bytes.

    Raises:
        CheckpointError: too short, or no plausible version numbers.
    """
    if len(content) >= 16:
        header = Header(*struct.unpack_from("<3i", content))
        length = 20 if header.wide else 16
        if 0 <= header.major < 10000 and 0 <= header.minor < 10000 and header.revision >= 0 and len(content) >= length:
            (seen,) = struct.unpack_from("<Q" if header.wide else "<I", content, 12)
            return Header(header.major, header.minor, header.revision, seen), length
    raise CheckpointError(f"{path} is not a Darknet weights file: no plausible header in its {len(content)} bytes")


def load_darknet_weights(network: nn.Module, path: Path) -> Loaded:
    """Load a file into the network.

    A file that ends exactly after a convolution is taken as backbone weights: the rest of the network keeps its values.
    A file of the same network with another number of classes fills everything except the output convolutions.
    Single negative variances become 0, and a line counts them.

    Raises:
        CheckpointError: missing, of another length in bytes, or with many negative variances.
    """
    model = as_darknet(network)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"weights file {path} cannot be read: {error.strerror}{fetch_hint(path)}") from None
    header, start = read_header(content, path)
    blocks = [convolution_tensors(module) for module in model.darknet_convolutions()]
    count, num_classes = identify(model, blocks, len(content), start, path)
    if count == len(blocks) and num_classes is None and getattr(network, "iou_aware", False):
        raise CheckpointError(f"{path} holds a network without predicted IoU; it needs yolo.iou_aware=false")
    values = np.frombuffer(content, dtype="<f4", offset=start)
    sizes = [_values_in_file(model, block, num_classes) for block in blocks[:count]]
    first_values = [0, *np.cumsum(sizes).tolist()]
    clamped = check_variances(path, blocks[:count], first_values, values)
    with torch.no_grad():
        for block, first, size in zip(blocks, first_values, sizes, strict=False):
            if size == _values_in_file(model, block, None):  # not an output for another number of classes
                fill(block, values[first : first + size])
            if len(block) == 5:
                block[3].copy_(torch.where(block[3] >= 0, block[3], 0.0))  # NaN becomes 0 too
    lines = describe(path, header, count, len(blocks), num_classes, model)
    if clamped:
        lines.append(f"{clamped} of its variances {'are' if clamped > 1 else 'is'} below 0 (dead channels), taken as 0")
    return Loaded(header, count, num_classes, lines)


def identify(
    model: DarknetModel, blocks: Sequence[Sequence[Tensor]], found: int, start: int, path: Path
) -> tuple[int, int | None]:
    """Tell from the length of a file what it holds.

    Args:
        blocks: tensors of each convolution of the network, in network order.
        found: length of the file in bytes.
        start: length of its header in bytes.

    Returns:
        The number of its convolutions, and its number of classes if not the network's.

    Raises:
        CheckpointError: it is neither the whole network, for any number of classes, nor its beginning.
    """
    ends = (start + 4 * np.cumsum([_values_in_file(model, block, None) for block in blocks])).tolist()
    if found in ends:
        return ends.index(found) + 1, None
    num_classes = classes_of_file(model, (found - ends[-1]) / 4)
    if num_classes is not None:
        return len(blocks), num_classes
    near = ends[int(np.searchsorted(ends, found)) - 1] if found > ends[0] else start
    raise CheckpointError(
        f"{path} has {found} bytes, this network needs {ends[-1]} ({found - ends[-1]:+d}); nor does it end after a "
        f"convolution, as backbone weights do (the nearest end is {near}). Incomplete download, or another network: "
        f"{network_hint(model, path)}"
    )


def _values_per_class(model: DarknetModel) -> dict[int, int]:
    """Values that a further class adds, by the id of each output convolution's kernel."""
    outputs, rows = model.output_convolutions(), model.class_rows(1)
    return {
        id(output.weight): filters.numel() * (output.weight[0].numel() + 1)
        for output, filters in zip(outputs, rows, strict=True)
    }


def _values_in_file(model: DarknetModel, block: Sequence[Tensor], num_classes: int | None) -> int:
    """Number of values of a convolution in a file with `num_classes` classes; None: as many as the network has."""
    own = sum(tensor.numel() for tensor in block)
    if num_classes is None:
        return own
    return own + (num_classes - model.num_classes) * _values_per_class(model).get(id(block[-1]), 0)


def as_darknet(model: nn.Module) -> DarknetModel:
    """Cast a network to `DarknetModel`.

    Raises:
        CheckpointError: Darknet has no such network.
    """
    if not isinstance(model, DarknetModel) or not model.darknet_convolutions():
        raise CheckpointError(
            "Darknet weights need a network that Darknet has: model.backbone darknet, darknet_tiny or darknet_cfg "
            "(with their cfg, model.cfg=FILE), model.leaky_slope 0.1"
        )
    return model


def describe(
    path: Path, header: Header, count: int, total: int, num_classes: int | None, model: DarknetModel
) -> list[str]:
    """Lines about what was loaded, for the log."""
    version = f"version {header.major}.{header.minor}.{header.revision}, {header.seen:,} images seen"
    if count < total:
        return [
            f"{path.name}: Darknet backbone weights, {version}",
            f"loaded the first {count} of {total} convolutions; the rest starts from random weights",
        ]
    lines = [f"{path.name}: Darknet weights of the whole network, {version}"]
    if num_classes is None:
        return [*lines, f"loaded all {total} convolutions"]
    outputs = len(model.output_convolutions())
    return [
        *lines,
        f"loaded {total - outputs} of {total} convolutions; the {outputs} output convolutions start anew: the file has "
        f"{num_classes} classes by its size, this network {model.num_classes}",
    ]


def classes_of_file(model: DarknetModel, surplus: float) -> int | None:
    """Number of classes of a file with `surplus` more values than the network; None: it is of another network."""
    own = model.num_classes
    difference = surplus / sum(_values_per_class(model).values())
    if difference != int(difference) or own + difference < 1:
        return None
    classes = own + int(difference)
    described = getattr(model, "described_classes", classes)  # a cfg states it
    return classes if classes == described else None


def convolution_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors of one convolution in the order of the file."""
    convolution = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
    norm = next((part for part in module.modules() if isinstance(part, nn.BatchNorm2d)), None)
    if norm is None:
        assert convolution.bias is not None, "a convolution without batch norm has a bias in Darknet"
        return [convolution.bias, convolution.weight]
    assert norm.running_mean is not None and norm.running_var is not None
    return [norm.bias, norm.weight, norm.running_mean, norm.running_var, convolution.weight]


def check_variances(path: Path, blocks: Sequence[list[Tensor]], first_values: Sequence[int], values: np.ndarray) -> int:
    """Count the running variances that are negative or NaN.

    Raises:
        CheckpointError: they are so many in one convolution that the file is of another network of the same length.
    """
    clamped = 0
    for number, (block, first) in enumerate(zip(blocks, first_values, strict=False)):
        if len(block) == 5:
            filters = len(block[0])
            variances = values[first + 3 * filters : first + 4 * filters]
            wrong = filters - int((variances >= SMALLEST_VARIANCE).sum())  # NaN compares false
            if wrong > WRONG_SHARE * filters:
                raise CheckpointError(
                    f"{path} does not belong to this network: convolution {number} would get {wrong} negative "
                    f"variances of {filters}"
                )
            clamped += filters - int((variances >= 0).sum())
    return clamped


def fill(block: Sequence[Tensor], values: np.ndarray) -> None:
    """Copy the values of one convolution into its tensors, converted from little-endian to the machine's order."""
    position = 0
    for tensor in block:
        part = np.ascontiguousarray(values[position : position + tensor.numel()], dtype=np.float32)
        tensor.copy_(torch.from_numpy(part.copy()).view(tensor.shape))
        position += tensor.numel()


def darknet_bytes(network: nn.Module, header: Header, count: int | None = None) -> bytes:
    """Content of a file with the first `count` convolutions; None: all."""
    parts = [header.pack()]
    for module in as_darknet(network).darknet_convolutions()[:count]:
        for tensor in convolution_tensors(module):
            parts.append(tensor.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return b"".join(parts)


def write_darknet_weights(network: nn.Module, path: Path, header: Header, count: int | None = None) -> None:
    """Write a file with the first `count` convolutions (None: all) atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(darknet_bytes(network, header, count))
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(f"weights file {path} cannot be written: {error.strerror}") from None
