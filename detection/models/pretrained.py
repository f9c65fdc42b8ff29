"""`model.pretrained`: initial weights of the backbone or of a whole detector."""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models

from detection.checkpoints import TORCH_SUFFIXES, is_checkpoint, read_file, verify_checkpoint
from detection.config.command_line import DEFAULTS
from detection.config.loading import complete_settings
from detection.config.settings import ModelSettings, Settings
from detection.contract import DetectorModel
from detection.errors import CheckpointError, SettingsError
from detection.foreign_files import SAFETENSORS, describe_content, describe_file
from detection.models import build_detector
from detection.models.backbones.darknet import Darknet53
from detection.models.backbones.efficientnet import EfficientNet
from detection.models.backbones.form import check_form
from detection.models.backbones.timm_backbone import TimmBackbone
from detection.models.carried_classes import carry_outputs, listed
from detection.models.catalogue import WEIGHTS_DIRECTORY, find_weights
from detection.models.classifier_weights import (
    TorchvisionBackbone,
    load_efficientnet_file,
    load_published,
    load_timm_file,
    load_torchvision,
)
from detection.models.darknet.weights import as_darknet, load_darknet_weights
from detection.models.importers import (
    Imported,
    find_format,
    import_weights,
    placeholder_names,
    read_weights,
    settings_of,
)
from detection.models.own_classifier import CLASSIFIER, load_own_classifier
from detection.models.state_dicts import check_fit, find_state

DARKNET_FILE = "darknet53.conv.74"  # `model.pretrained: true`; none was published for DarknetTiny
OF_BACKBONE = ("backbone", "width", "depth", "leaky_slope")  # settings of which weights know one value
# What weights were trained with, from a network.
INPUTS: dict[str, Callable[[nn.Module], Any]] = {
    "the mean of the pixels (model.pixel_scaling)": lambda model: tuple(cast(Any, model).pixel_mean),
    "the deviation of the pixels (model.pixel_scaling)": lambda model: tuple(cast(Any, model).pixel_std),
    "range and order of the pixels (yolox.pixels)": lambda model: (
        (normalize := getattr(model, "normalize", None)) and (normalize.pixel_range, normalize.channel_order)
    ),
    "epsilon of batch norm (yolox.batch_norm_epsilon)": lambda model: sorted(
        {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    ),
}


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
    path = find_weights(settings.pretrained, fetch=True)
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"model.pretrained={path}: an ONNX file cannot be trained; give the weights it was made from"
        )
    backbone = cast(DetectorModel, model).backbone
    is_darknet = path.suffix == ".weights" or re.search(r"\.conv\.\d+$", path.name)
    is_safetensors = path.suffix == ".safetensors"
    usable = f"model.backbone={settings.backbone} starts from {usable_files(backbone)}"
    if path.is_file() and (is_darknet or is_safetensors):  # `read_file` names the others
        what = describe_file(path)
        if what is not None and not (is_safetensors and what == SAFETENSORS):
            raise CheckpointError(f"model.pretrained={path} is {what}; {usable}")
    if is_darknet and not zipfile.is_zipfile(path):
        return load_darknet_file(model, path, names)
    if not path.is_file():
        raise CheckpointError(f"model.pretrained = {path}: {'is no file' if path.exists() else 'does not exist'}")
    content = read_weights(path, usable)
    if is_checkpoint(content):
        return load_checkpoint_weights(model, settings, verify_checkpoint(content, path), path, names)
    known = find_format(content)
    if known is not None and (known.whole or not isinstance(backbone, TimmBackbone)):
        imported = import_weights(content, f"model.pretrained={path}")
        return load_imported(model, settings, imported, path, names)
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
    return "Darknet files (.weights, .conv.N), the weights that docs/weights.md lists, or a checkpoint of this program"


def has_standard_weights(backbone: str) -> bool:
    """Return whether `pretrained: true` finds the weights of a backbone on this machine, without a download."""
    if backbone in list_models():
        url = get_model_weights(backbone)["IMAGENET1K_V1"].url
        return (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file()
    return backbone == "darknet" and (WEIGHTS_DIRECTORY / DARKNET_FILE).is_file()


def needed_settings(weights: str) -> dict[str, Any]:
    """Return path -> value of the settings that make the network of published weights; empty for other files.

    Args:
        weights: as in `model.pretrained`; a name of the catalogue is fetched. An error about the file is left to
            `load_pretrained`.

    Raises:
        CheckpointError: the download failed.
    """
    path = find_weights(weights, fetch=True)
    if not path.is_file() or path.suffix not in (*TORCH_SUFFIXES, ".pdparams", ".safetensors"):
        return {}
    try:
        content = read_weights(path)
        if is_checkpoint(content):
            return dict(content.get("needs") or {})
        return {} if find_format(content) is None else import_weights(content, weights).settings
    except CheckpointError:
        return {}


def detector_of(file: str) -> str | None:
    """Return the name of the detector of a checkpoint; None: another file, or one that cannot be read.

    Args:
        file: as in `model.pretrained`; an error about it is left to `load_pretrained`.
    """
    path = Path(file)
    try:
        content: Any = read_file(path) if path.suffix == ".pt" else None
        if not is_checkpoint(content) or CLASSIFIER in content:
            return None
        return complete_settings(content["settings"], DEFAULTS).model.detector
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
    if CLASSIFIER in checkpoint:
        return load_classifier_run(model, settings, checkpoint, path)
    try:
        if not checkpoint["settings"]:
            raise KeyError("settings")
        stored = complete_settings(checkpoint["settings"], DEFAULTS, lines)
        its = stored.model
        its_names = [str(name) for name in checkpoint["categories"]["names"]]
        state = dict(checkpoint["average"] or checkpoint["model"])
        step = checkpoint["step"]
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise CheckpointError(
            f"model.pretrained={path} is not the checkpoint of a run: no {str(error).strip(chr(39))}"
        ) from None
    check_same_network(settings, its, ("detector", *OF_BACKBONE), path)
    weights = "EMA" if checkpoint["average"] else "weights"
    lines.append(f"backbone, neck and heads from {path}: {weights} after {step} steps, {len(its_names)} classes")
    if "needs" in checkpoint:  # written by convert_weights.py
        check_same_input(model, stored, len(its_names), path)
    lines += carry_outputs(model, state, its_names, list(names))
    check_fit(state, model.state_dict(), str(path))
    model.load_state_dict(state)
    return lines


def load_classifier_run(model: nn.Module, settings: ModelSettings, checkpoint: dict[str, Any], path: Path) -> list[str]:
    """Load the backbone of a classifier that classify.py trained."""
    network = checkpoint[CLASSIFIER].get("network") if isinstance(checkpoint[CLASSIFIER], dict) else None
    if network is not None:
        raise CheckpointError(
            f"model.pretrained={path} is of the network {network}, which is no backbone of a detector"
        )
    its = complete_settings(checkpoint["settings"], DEFAULTS).model
    check_same_network(settings, its, OF_BACKBONE, path)
    return load_own_classifier(model, checkpoint, path)


def load_imported(
    model: nn.Module, settings: ModelSettings, imported: Imported, path: Path, names: Sequence[str]
) -> list[str]:
    """Load published weights of another program; of a detector as those of one of our runs."""
    its = settings_of(imported)
    parts = ("detector", *OF_BACKBONE) if imported.whole else OF_BACKBONE
    check_same_network(settings, its.model, parts, path)
    check_same_input(model, its, imported.num_classes, path)
    state = dict(imported.state)
    if not imported.whole:
        cast(DetectorModel, model).backbone.load_state_dict(state)
        return [f"backbone, {len(state)} tensors from {path}: {imported.source}", *imported.lines]
    its_names = list(imported.names or placeholder_names(imported.num_classes))
    lines = [f"backbone, neck and heads from {path}: {imported.source}, {len(its_names)} classes", *imported.lines]
    lines += carry_outputs(model, state, its_names, list(names))
    check_fit(state, model.state_dict(), f"model.pretrained={path}, {imported.source},")
    model.load_state_dict(state)
    return lines


def check_same_network(own: ModelSettings, its: ModelSettings, kinds: Sequence[str], path: Path) -> None:
    """Refuse weights of another detector or backbone."""
    for kind in kinds:
        if (ours := getattr(own, kind)) != (theirs := getattr(its, kind)):
            raise CheckpointError(f"model.pretrained={path} has the {kind} {theirs}, this run {ours}")


def check_same_input(model: nn.Module, its: Settings, num_classes: int, path: Path) -> None:
    """Refuse published weights in a network that sees other pixels, or divides by other deviations."""
    with torch.device("meta"):
        reference = build_detector(its, num_classes).model
    for what, read in INPUTS.items():
        if (ours := read(model)) != (theirs := read(reference)):
            raise CheckpointError(
                f"model.pretrained={path}: {what} must be {theirs} with these weights, is {ours} in this run"
            )
