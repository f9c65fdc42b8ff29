"""What is common to the importers: names of tensors paired with ours, and the result."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from detection.errors import CheckpointError
from detection.models.importers.coco_classes import COCO_IDS, COCO_NAMES

ANCHORS = 3  # per level, of every YOLOv3 that is read here


@dataclass(frozen=True)
class Imported:
    """Weights of another program as ours.

    Attributes:
        source: the program and its network, for messages.
        whole: of a detector; false: of a backbone alone.
        settings: path -> value of the settings that make the network.
        evaluation: path -> value of those that its published numbers were computed with.
        names, ids: classes, and their category ids where the format implies COCO's; None: not known.
        num_classes: of the detector.
        state: tensors by our names, of the model, or of its backbone.
        lines: what a user should know.
    """

    source: str
    whole: bool
    settings: dict[str, Any]
    evaluation: dict[str, Any]
    names: tuple[str, ...] | None
    ids: tuple[int, ...] | None
    num_classes: int
    state: dict[str, Tensor]
    lines: list[str] = field(default_factory=list)

    def named(self, names: Sequence[str]) -> "Imported":
        """The same weights with names for their classes, of which nothing more is known."""
        return dataclasses.replace(self, names=tuple(names), ids=None)


@dataclass(frozen=True)
class BlockNames:
    """Names of the tensors of a convolution with batch norm, below its prefix."""

    kernel: str = "conv.weight"
    norm: str = "bn"
    mean: str = "running_mean"
    variance: str = "running_var"
    counted: bool = True  # whether there is a num_batches_tracked

    def pairs(self, prefix: str, own: str) -> Iterable[tuple[str, str]]:
        """(their name, our name) of every tensor of our `conv_block` called `own`."""
        yield f"{prefix}.{self.kernel}", f"{own}.0.weight"
        for theirs, ours in (
            ("weight", "weight"),
            ("bias", "bias"),
            (self.mean, "running_mean"),
            (self.variance, "running_var"),
        ):
            yield f"{prefix}.{self.norm}.{theirs}", f"{own}.1.{ours}"
        if self.counted:
            yield f"{prefix}.{self.norm}.num_batches_tracked", f"{own}.1.num_batches_tracked"


def pair_names(
    model: nn.Module,
    convolutions: Sequence[nn.Module],
    theirs: Sequence[str | tuple[str, BlockNames]],
    names: BlockNames,
) -> dict[str, str]:
    """Map the names of a file's tensors to ours.

    Args:
        model: holds the convolutions.
        convolutions: each a `conv_block` or a plain convolution with bias.
        theirs: for each of them the prefix in the file, with names of its own where `names` are others.
        names: below the prefixes.
    """
    own_names = {id(module): name for name, module in model.named_modules()}
    pairs: list[tuple[str, str]] = []
    for module, entry in zip(convolutions, theirs, strict=True):
        prefix, block = (entry, names) if isinstance(entry, str) else entry
        own = own_names[id(module)]
        if isinstance(module, nn.Conv2d):
            pairs += [(f"{prefix}.{part}", f"{own}.{part}") for part in ("weight", "bias")]
        else:
            pairs += block.pairs(prefix, own)
    return dict(pairs)


def darknet_order(model: nn.Module) -> list[nn.Module]:
    """The convolutions of a network, or of a Darknet-53, in the order of Darknet's files."""
    return cast(Any, model).darknet_convolutions()


class Format:
    """A format of weights that is read; one object per network of another program.

    Attributes:
        source: the program and its network, for messages.
        marks: beginnings of names of tensors that only this format has.
        whole: a whole detector; false: a backbone.
        evaluation: settings of the published numbers, where they are those of all its files.
    """

    source = ""
    marks: tuple[str, ...] = ()
    whole = True
    evaluation: Mapping[str, Any] = {}

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state is in this format, even if damaged."""
        return any(name.startswith(self.marks) for name in state)

    def settings(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Path -> value of the settings of the network; CheckpointError if ours cannot be like it."""
        raise NotImplementedError

    def stated_settings(self, content: Any, source: str) -> tuple[dict[str, Any], list[str]]:
        """Path -> value of settings that tensors do not show and the rest of the file, or its name, may; lines on them.

        Raises:
            CheckpointError: they are malformed.
        """
        return {}, []

    def num_classes(self, state: Mapping[str, Tensor]) -> int:
        """Number of classes of the file, 1 for a backbone; CheckpointError if its outputs say nothing possible."""
        return 1

    def layout(self, model: nn.Module) -> dict[str, str]:
        """Name in the file -> our name, of every tensor that is copied as it is or changed by `place`."""
        raise NotImplementedError

    def others(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Tensors, by name and shape, that must be in the file besides those of `layout`; `place` may use them."""
        return {}

    def place(self, tensors: dict[str, Tensor], state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
        """Change the tensors, by our names, where the network of the file computes them otherwise, in place.

        Raises:
            CheckpointError: tensors that must agree do not.
        """

    def kept_classes(self, count: int) -> list[int] | None:
        """Of the file's classes those that are worth keeping, in the order that they get; None: all."""
        return None

    def classes(self, content: Any, count: int) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
        """Names of the classes and their category ids; None: not known. 80 classes are COCO's."""
        return (COCO_NAMES, COCO_IDS) if count == len(COCO_NAMES) else (None, None)

    def validation(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Path -> value of the settings of the published numbers."""
        return dict(self.evaluation)

    def lines(self, state: Mapping[str, Tensor]) -> list[str]:
        """What a user should know about weights of this format."""
        return []


def classes_of_outputs(state: Mapping[str, Tensor], biases: Sequence[str], source: str) -> int:
    """Number of classes of YOLOv3's output convolutions, ANCHORS * (5 + C) filters each.

    Raises:
        CheckpointError: none of the biases is there, or has such a length.
    """
    lengths = {state[name].numel() for name in biases if name in state}
    for length in lengths:
        if length % ANCHORS == 0 and length // ANCHORS > 5:
            return length // ANCHORS - 5
    raise CheckpointError(
        f"{source}: its outputs ({', '.join(biases)}) have {', '.join(map(str, sorted(lengths))) or 'no'} filters, not "
        f"{ANCHORS} * (5 + classes)"
    )


def bottom_blocks(blocks: Iterable[int], down: str, first: str, second: str) -> list[str]:
    """Prefixes of Darknet-53's stages.

    Args:
        blocks: number of residual blocks per stage.
        down, first, second: templates with `stage` (from 0) and `block` (from 0) of the strided convolution and of the
            two of a residual block.
    """
    prefixes = []
    for stage, count in enumerate(blocks):
        prefixes.append(down.format(stage=stage, next=stage + 1))
        for block in range(count):
            prefixes += [part.format(stage=stage, next=stage + 1, block=block) for part in (first, second)]
    return prefixes


DARKNET_BLOCKS = (1, 2, 8, 8, 4)
# (width, height) in pixels, stride ascending; YOLOv3, section 2.3
YOLOV3_ANCHORS = [
    [[10, 13], [16, 30], [33, 23]],
    [[30, 61], [62, 45], [59, 119]],
    [[116, 90], [156, 198], [373, 326]],
]
# Of every YOLOv3 on Darknet-53 here: the network alone, whatever a recipe says of it.
YOLOV3_SETTINGS: dict[str, Any] = {
    "model.detector": "yolo",
    "model.backbone": "darknet",
    "yolo.neck_channels": [512, 256, 128],
    "yolo.anchors": YOLOV3_ANCHORS,
    "yolo.anchor_size": None,
}
