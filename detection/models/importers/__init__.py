"""Published weights of other programs, as weights of our networks. Each format is a file here, and listed below.

Nothing in a file is executed: torch.load with weights_only=True, and an unpickler of arrays for PaddlePaddle's.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.checkpoints import READ_HERE, is_checkpoint, read_file, verify_checkpoint
from detection.config.command_line import DEFAULTS
from detection.config.loading import Flag, load_settings
from detection.config.settings import Settings
from detection.contract import HasClassRows
from detection.errors import CheckpointError
from detection.models import build_detector
from detection.models.catalogue import input_of
from detection.models.importers.efficientdet import TensorFlowEfficientDet
from detection.models.importers.formats import Format, Imported
from detection.models.importers.mmdetection import MMDetectionMobileNetV2, MMDetectionYOLOv3
from detection.models.importers.paddle import PaddleYOLOv3
from detection.models.importers.paddle_file import read_pdparams
from detection.models.importers.research import ResearchYOLOv3
from detection.models.importers.timm_darknet import TimmDarknet53
from detection.models.importers.yolox import YOLOXDarknet
from detection.models.own_classifier import CLASSIFIER
from detection.models.state_dicts import check_fit, filters_of_no_class, find_state, read_safetensors

FORMATS: tuple[Format, ...] = (
    PaddleYOLOv3(),
    MMDetectionMobileNetV2(),  # has a mark of the next one too
    MMDetectionYOLOv3(),
    YOLOXDarknet(),
    ResearchYOLOv3(),
    TensorFlowEfficientDet(),
    TimmDarknet53(),
)
COUNTER = "num_batches_tracked"  # of batch norm; Paddle has none


def read_weights(path: Path, usable: str = READ_HERE) -> Any:
    """Read the tensors and plain values of a file, of ours or of another program.

    Args:
        usable: end of the error about a foreign file: which files are read.

    Raises:
        CheckpointError: missing, damaged, or holds other objects.
    """
    if path.suffix == ".pdparams":
        return read_pdparams(path)
    return read_safetensors(path) if path.suffix == ".safetensors" else read_file(path, usable)


def find_format(content: Any) -> Format | None:
    """Return the format of what `read_weights` returned; None: none that is known."""
    state = find_state(content)
    return None if state is None else next((known for known in FORMATS if known.matches(state)), None)


def import_weights(content: Any, source: str, keep_classes: bool = False) -> Imported:
    """Convert what `read_weights` returned; every tensor of the file has its place, and every place its tensor.

    Args:
        content: in one of `FORMATS`.
        source: the file, for messages.
        keep_classes: keep classes that never have objects; see `Format.kept_classes`.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or contradict one another.
    """
    format_, state = find_format(content), find_state(content)
    assert format_ is not None and state is not None
    try:
        stated, notes = format_.stated_settings(content, source)
        wanted = format_.settings(state) | stated
        count = format_.num_classes(state)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    model = _empty_network(wanted, count, format_.whole)
    layout, expected = format_.layout(model), model.state_dict()
    shapes = {name: expected[own] for name, own in layout.items()} | format_.others(state, model)
    check_fit(state, shapes, f"{source}, {format_.source},")
    tensors = {own: state[name].to(expected[own].dtype) for name, own in layout.items()}
    tensors |= {name: torch.tensor(0) for name in expected if name.endswith(COUNTER) and name not in tensors}
    assert set(tensors) == set(expected), f"{format_.source}: the layout leaves tensors of ours without a value"
    format_.place(tensors, state, model, source)
    names, ids = format_.classes(content, count) if format_.whole else (None, None)
    kept, lines = format_.kept_classes(count), [*format_.lines(state), *notes]
    if kept is not None and not keep_classes:
        assert names is not None and ids is not None
        _keep_classes(model, tensors, kept)
        lines.append(f"{count} classes in the file, of which {len(kept)} are COCO's and kept")
        names, ids, count = (tuple(names[number] for number in kept), tuple(ids[number] for number in kept), len(kept))
    evaluation = format_.validation(state)
    return Imported(format_.source, format_.whole, wanted, evaluation, names, ids, count, tensors, lines)


def settings_of(imported: Imported) -> Settings:
    """The settings of an imported detector, or of one on an imported backbone: args.yaml with what the weights need."""
    values = imported.settings | imported.evaluation
    return load_settings(DEFAULTS, flags=[Flag("weights", path, value) for path, value in values.items()])[0]


def checkpoint_of(imported: Imported, image_size: int | None = None) -> dict[str, Any]:
    """Content of a checkpoint of ours, for `save_checkpoint`, with the weights of a detector.

    Args:
        image_size: side of the input that this file was validated at; None: the usual one of its format.
    """
    settings = settings_of(imported)
    if image_size is not None:
        size = [Flag("weights", "evaluation.image_size", image_size)]
        settings, _ = load_settings(settings, flags=size)
    names = imported.names or placeholder_names(imported.num_classes)
    return {
        "step": 0,
        "settings": settings.model_dump(mode="json"),
        "categories": {"names": list(names), "ids": list(imported.ids or ())},
        "model": imported.state,
        "average": None,
        "source": imported.source,
        "needs": imported.settings,
        "lines": imported.lines,
    }


def read_checkpoint(weights: Path) -> dict[str, Any]:
    """Read one of our checkpoints, or published weights of another program as one.

    Raises:
        CheckpointError: missing, damaged or foreign; of published weights, a backbone alone; a classifier.
    """
    content = read_weights(weights)
    if is_checkpoint(content) or find_format(content) is None:
        content = verify_checkpoint(content, weights)
        if CLASSIFIER in content:
            raise CheckpointError(
                f"{weights} holds a classifier of classify.py; it starts a training (model.pretrained={weights}), it "
                "detects nothing"
            )
        return content
    imported = import_weights(content, str(weights))
    if not imported.whole:
        raise CheckpointError(
            f"{weights} holds a backbone only ({imported.source}); it starts a training (model.pretrained={weights}), "
            "it detects nothing"
        )
    return checkpoint_of(imported, input_of(weights))


def placeholder_names(num_classes: int) -> tuple[str, ...]:
    """Name the classes of weights without names."""
    return tuple(f"class_{label}" for label in range(num_classes))


def _empty_network(wanted: dict[str, Any], count: int, whole: bool) -> nn.Module:
    """The network of the settings without values, or its backbone."""
    settings, _ = load_settings(DEFAULTS, flags=[Flag("weights", path, value) for path, value in wanted.items()])
    with torch.device("meta"):
        model = build_detector(settings, count).model
    return model if whole else cast(Any, model).backbone


def _keep_classes(model: nn.Module, tensors: dict[str, Tensor], kept: list[int]) -> None:
    """Leave only some classes in the output convolutions, in place."""
    assert isinstance(model, HasClassRows)
    outputs = {id(output): number for number, output in enumerate(cast(Any, model).output_convolutions())}
    before, after = model.class_rows(cast(Any, model).num_classes), model.class_rows(len(kept))
    for prefix, module in model.named_modules():
        if id(module) not in outputs:
            continue
        theirs, ours = (table[outputs[id(module)]] for table in (before, after))
        for part in ("weight", "bias"):
            old = tensors[f"{prefix}.{part}"]
            new = old.new_empty(len(old) - theirs.numel() + ours.numel(), *old.shape[1:])
            new[filters_of_no_class(ours, len(new))] = old[filters_of_no_class(theirs, len(old))]
            new[ours.flatten()] = old[theirs[:, kept].flatten()]
            tensors[f"{prefix}.{part}"] = new


__all__ = [
    "FORMATS",
    "Imported",
    "checkpoint_of",
    "find_format",
    "import_weights",
    "placeholder_names",
    "read_checkpoint",
    "read_weights",
    "settings_of",
]
