"""`model.pretrained`: initial weights of the backbone or of a whole detector."""

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models

from detection.checkpoints import is_checkpoint, read_file, verify_checkpoint
from detection.config.command_line import DEFAULTS
from detection.config.loading import complete_settings
from detection.config.settings import ModelSettings
from detection.contract import DetectorModel, HasClassRows
from detection.errors import CheckpointError, SettingsError
from detection.foreign_files import SAFETENSORS, describe_content, describe_file
from detection.models.backbones.darknet import Darknet53
from detection.models.backbones.efficientnet import EfficientNet
from detection.models.backbones.form import check_form
from detection.models.backbones.timm_backbone import TimmBackbone
from detection.models.classifier_weights import (
    TorchvisionBackbone,
    check_fit,
    load_efficientnet_file,
    load_published,
    load_timm_file,
    load_torchvision,
    read_safetensors,
)
from detection.models.darknet.weights import as_darknet, load_darknet_weights

WEIGHTS_DIRECTORY = Path(__file__).resolve().parents[2] / "models" / "weights"
DARKNET_FILE = "darknet53.conv.74"  # `model.pretrained: true`; none was published for DarknetTiny
CLASSES_SHOWN = 10


def load_pretrained(model: nn.Module, settings: ModelSettings, names: Sequence[str]) -> list[str]:
    """Load the weights that the settings name into the model or its backbone.

    For new runs only: a resumed one has all weights in its checkpoint.

    Args:
        names: classes of the run, in the order of its labels.

    Returns:
        Lines about what was loaded, for the plan of the run.

    Raises:
        CheckpointError: weights are missing, damaged, foreign or do not fit, or the download failed.
        SettingsError: `pretrained: true` and the backbone has no standard weights.
    """
    if settings.pretrained is False:
        return []
    if settings.pretrained is True:
        return load_standard_weights(model, settings)
    path = Path(settings.pretrained)
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"model.pretrained={path}: an ONNX file cannot be trained; give the weights it was made from"
        )
    backbone = cast(DetectorModel, model).backbone
    is_darknet = path.suffix == ".weights" or re.search(r"\.conv\.\d+$", path.name)
    is_safetensors = isinstance(backbone, TimmBackbone | EfficientNet) and path.suffix == ".safetensors"
    usable = f"model.backbone={settings.backbone} starts from {usable_files(backbone)}"
    if path.is_file() and (is_darknet or is_safetensors):  # `read_file` names the others
        what = describe_file(path)
        if what is not None and not (is_safetensors and what == SAFETENSORS):
            raise CheckpointError(f"model.pretrained={path} is {what}; {usable}")
    if is_darknet and not zipfile.is_zipfile(path):
        return load_darknet_file(model, path, names)
    if not path.is_file():
        raise CheckpointError(f"model.pretrained = {path}: {'is no file' if path.exists() else 'does not exist'}")
    if is_safetensors:
        return load_classifier_file(model, read_safetensors(path), path, f"model.pretrained={path}")
    content = read_file(path, usable)
    if is_checkpoint(content):
        return load_checkpoint_weights(model, settings, verify_checkpoint(content, path), path, names)
    what = describe_content(content)
    state = find_state(content)
    if state and isinstance(backbone, TorchvisionBackbone | TimmBackbone):
        return load_classifier_file(model, state, path, f"model.pretrained={path}, {what},")
    raise CheckpointError(f"model.pretrained={path} is {what}; {usable}")


def load_classifier_file(model: nn.Module, state: Mapping[str, Tensor], path: Path, described: str) -> list[str]:
    """Load the state of a classifier of torchvision or timm into the backbone.

    Args:
        described: what the file is, for errors.
    """
    backbone = model.backbone
    check_form(model, described)
    if isinstance(backbone, TimmBackbone):
        return load_timm_file(backbone, state, path, described)
    if isinstance(backbone, EfficientNet):
        return load_efficientnet_file(backbone, state, path, described)
    assert isinstance(backbone, TorchvisionBackbone)
    return [load_torchvision(backbone, state, str(path), described)]


def usable_files(backbone: nn.Module) -> str:
    """Say in a few words what a backbone can start from."""
    if isinstance(backbone, EfficientNet):
        source = f"timm's {backbone.name} (.pth, .safetensors)" if backbone.same_padding else "torchvision's classifier"
        return f"the state dict of {source} or a checkpoint of this program"
    if isinstance(backbone, TorchvisionBackbone):
        return "the state dict of torchvision's classifier or a checkpoint of this program"
    if isinstance(backbone, TimmBackbone):
        return (
            f"the state dict (.pth, .safetensors) of timm's classifier {backbone.name} or a checkpoint of this program"
        )
    return "Darknet files (.weights, .conv.N) or a checkpoint of this program"


def has_standard_weights(backbone: str) -> bool:
    """Return whether `pretrained: true` finds the weights of a backbone on this machine, without a download."""
    if backbone in list_models():
        url = get_model_weights(backbone)["IMAGENET1K_V1"].url
        return (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file()
    return backbone == "darknet" and (WEIGHTS_DIRECTORY / DARKNET_FILE).is_file()


def detector_of(file: str) -> str | None:
    """Return the name of the detector of a checkpoint; None: another file, or one that cannot be read.

    Args:
        file: as in `model.pretrained`; an error about it is left to `load_pretrained`.
    """
    path = Path(file)
    try:
        content: Any = read_file(path) if path.suffix == ".pt" else None
        return complete_settings(content["settings"], DEFAULTS).model.detector if is_checkpoint(content) else None
    except (CheckpointError, SettingsError):
        return None


def load_standard_weights(model: nn.Module, settings: ModelSettings) -> list[str]:
    """Load the published weights of a backbone (`pretrained: true`); see `load_pretrained`."""
    backbone = cast(DetectorModel, model).backbone
    if isinstance(backbone, Darknet53):
        if (backbone.width, backbone.depth) != (1, 1):
            raise SettingsError(
                f"model.pretrained = true: the published weights are of model.width 1 and model.depth 1, not of "
                f"{backbone.width:g} and {backbone.depth:g}; must be false, or a FILE of such a network"
            )
        return load_darknet_weights(model, WEIGHTS_DIRECTORY / DARKNET_FILE).lines
    check_form(model, "model.pretrained=true")
    lines = load_published(backbone)
    if lines is not None:
        return lines
    named = f"detector {settings.detector} with backbone {settings.backbone}"
    raise SettingsError(f"model.pretrained = true: {named} has no standard weights; name a FILE")


def load_darknet_file(model: nn.Module, path: Path, names: Sequence[str]) -> list[str]:
    """Load a Darknet file; where its output convolutions are taken, its classes are the run's by their number."""
    loaded = load_darknet_weights(model, path)
    whole = loaded.convolutions == len(as_darknet(model).darknet_convolutions())
    if not whole or loaded.num_classes is not None:
        return loaded.lines
    return [*loaded.lines, f"the file has no class names; its classes are taken by position: {listed(names)}"]


def load_checkpoint_weights(
    model: nn.Module, settings: ModelSettings, checkpoint: dict[str, Any], path: Path, names: Sequence[str]
) -> list[str]:
    """Load the detector of one of our runs; of the output convolutions what belongs to classes of the same names."""
    lines: list[str] = []
    try:
        if not checkpoint["settings"]:
            raise KeyError("settings")
        its = complete_settings(checkpoint["settings"], DEFAULTS, lines).model
        its_names = [str(name) for name in checkpoint["categories"]["names"]]
        state = dict(checkpoint["average"] or checkpoint["model"])
        step = checkpoint["step"]
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise CheckpointError(
            f"model.pretrained={path} is not the checkpoint of a run: no {str(error).strip(chr(39))}"
        ) from None
    for kind in ("detector", "backbone", "width", "depth"):
        if (own := getattr(settings, kind)) != (other := getattr(its, kind)):
            raise CheckpointError(f"model.pretrained={path} has the {kind} {other}, this run {own}")
    weights = "EMA" if checkpoint["average"] else "weights"
    lines.append(f"backbone, neck and heads from {path}: {weights} after {step} steps, {len(its_names)} classes")
    lines += carry_outputs(model, state, its_names, list(names))
    check_fit(state, model.state_dict(), str(path))
    model.load_state_dict(state)
    return lines


def carry_outputs(model: nn.Module, state: dict[str, Tensor], its_names: list[str], names: list[str]) -> list[str]:
    """Make the output convolutions of a file fit the classes of the run, in place.

    Filters of classes that both have are the file's, wherever they stand; those of other classes are the new model's;
    those of no class (boxes, objectness) are the file's. Which filters are which says the model's `class_rows`; where
    it has none, or the file has other anchors, differing classes leave nothing to take.

    Args:
        state: tensors of the file.
        its_names, names: classes of the file and of the run.

    Returns:
        A line about what was taken; none if everything fits as it is.
    """
    declared = cast(DetectorModel, model)
    own_state = model.state_dict()
    numbers = {id(convolution): number for number, convolution in enumerate(declared.output_convolutions())}
    outputs = {  # name of each tensor -> number of its convolution
        f"{prefix}.{name}": numbers[id(module)]
        for prefix, module in model.named_modules(remove_duplicate=False)
        if id(module) in numbers
        for name, _ in module.named_parameters()
    }
    counts = len(its_names), len(names)
    tables = [model.class_rows(count) for count in counts] if isinstance(model, HasClassRows) else None
    its_filters = {
        name: len(own_state[name]) + (0 if tables is None else tables[0][number].numel() - tables[1][number].numel())
        for name, number in outputs.items()
    }
    fits = all(
        name in state and state[name].shape == (filters, *own_state[name].shape[1:])
        for name, filters in its_filters.items()
    )
    if fits and its_names == names:
        return []
    if tables is None or not fits:
        state.update({name: own_state[name] for name in outputs})
        reasons = ["other anchors"] * (tables is not None and not fits) + [f"other classes ({listed(its_names)})"] * (
            its_names != names
        )
        return [f"the output convolutions start anew: the file has {' and '.join(reasons) or 'others'}"]
    shared = [(label, its_names.index(name)) for label, name in enumerate(names) if name in its_names]
    for name, number in outputs.items():
        theirs, own = (table[number] for table in tables)
        merged = own_state[name].clone()
        merged[filters_of_no_class(own, len(merged))] = state[name][filters_of_no_class(theirs, len(state[name]))]
        for label, its_label in shared:
            merged[own[:, label]] = state[name][theirs[:, its_label]]
        state[name] = merged
    if sorted(its_names) == sorted(names):
        return [
            f"output convolutions: the file has the same classes in another order, put into this run's: {listed(names)}"
        ]
    kept, new = ([name for name in names if (name in its_names) == wanted] for wanted in (True, False))
    line = f"output convolutions: what is of no class (boxes) from the file; classes from the file: {listed(kept)}"
    unused = [name for name in its_names if name not in names]
    return [f"{line}; starting anew: {listed(new)}" + (f"; not used: {listed(unused)}" if unused else "")]


def filters_of_no_class(rows: Tensor, count: int) -> Tensor:
    """Numbers of an output convolution's `count` filters that are not among the class rows (A, C)."""
    others = torch.ones(count, dtype=torch.bool)
    others[rows.flatten()] = False
    return others.nonzero()[:, 0]


def listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)})" if len(names) > CLASSES_SHOWN else ""
    return ", ".join(names[:CLASSES_SHOWN]) + more if names else "none"


def find_state(content: Any) -> dict[str, Tensor] | None:
    """Return the state dict in the content of a file, possibly under "state_dict" or "model"; None: there is none."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return content
