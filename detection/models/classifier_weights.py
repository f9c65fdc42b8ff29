"""Weights of published classifiers, torchvision's and timm's, for the backbone of a detector."""

import http.client
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from detection.errors import CheckpointError
from detection.models.backbones.efficientnet import TENSORFLOW_BATCH_NORM, TORCH_BATCH_NORM, EfficientNet
from detection.models.backbones.mobilenet import IMAGENET_MEAN, IMAGENET_STD, MobileNet
from detection.models.backbones.resnet import ResNet50
from detection.models.backbones.timm_backbone import (
    TimmBackbone,
    classifier_state,
    download_classifier,
    download_weights,
    load_classifier,
)
from detection.models.state_dicts import check_fit

TorchvisionBackbone = MobileNet | EfficientNet | ResNet50
TIMM_HEAD = ("conv_head.", "bn2.", "classifier.")  # of timm's EfficientNets, not part of the backbone
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # lie beside a config.json in a download from the hub
HALVES = (0.5, 0.5, 0.5)  # mean and deviation of the AdvProp weights and some newer ones


class TimmOrigin(NamedTuple):
    """What tells the form of a timm EfficientNet file, which its tensors do not."""

    architecture: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


def load_torchvision(
    backbone: TorchvisionBackbone, state: Mapping[str, Tensor], source: str, described: str | None = None
) -> str:
    """Load the state of torchvision's classifier, or of its `features` alone, into the backbone.

    Args:
        backbone: its `torchvision_names` map names without `features.` to its own, its `unused_tensors` are the
            beginnings of those that it lacks.
        source: where it is from, for the line that is returned.
        described: what it is, for the error if it does not fit; None: `source`.
    """
    named = ((name.removeprefix("features."), value) for name, value in state.items())
    state = {name: value for name, value in named if not name.startswith(backbone.unused_tensors)}
    ours = backbone.torchvision_names()
    own_state = backbone.state_dict()
    check_fit(state, {name: own_state[own] for name, own in ours.items()}, described or source)
    backbone.load_state_dict({ours[name]: value for name, value in state.items()})
    return f"backbone, {len(ours)} tensors from {source}"


def load_timm_file(backbone: TimmBackbone, state: Mapping[str, Tensor], path: Path, described: str) -> list[str]:
    """Load the state of a timm classifier, with or without its last layers, into the backbone.

    Args:
        described: what the file is, for the error if it does not fit.
    """
    expected, classifier = classifier_state(backbone)
    kept = {name: value for name, value in state.items() if not name.startswith(classifier)}
    check_fit(kept, {name: value for name, value in expected.items() if not name.startswith(classifier)}, described)
    load_classifier(backbone, state)
    return [f"backbone from {path}, a classifier timm/{backbone.name}"]


def load_efficientnet_file(
    backbone: EfficientNet, state: Mapping[str, Tensor], path: Path, described: str
) -> list[str]:
    """Load the state of torchvision's or timm's EfficientNet classifier into the backbone of the same form.

    torchvision's names tell the form. timm has the same names for both: the file's name or a config.json beside it may
    tell it; where nothing does, the file is taken as of the backbone's form, and the line says so.

    Args:
        described: what the file is, for errors.

    Raises:
        CheckpointError: the file has another form, or does not fit.
    """
    if {"features.0.0.weight", "0.0.weight"} & set(state):
        if backbone.same_padding:
            raise CheckpointError(
                f"{described} has the layout of torchvision, whose padding is symmetric; "
                f"{other_form(backbone, False, TORCH_BATCH_NORM['eps'])}"
            )
        return [load_torchvision(backbone, state, str(path), described)]
    kept = {name: value for name, value in state.items() if not name.startswith(TIMM_HEAD)}
    check_fit(kept, backbone.state_dict(), described)
    origin = find_origin(path)
    if origin is not None:
        tensorflow = origin.architecture.startswith("tf_")
        epsilon = (TENSORFLOW_BATCH_NORM if tensorflow else TORCH_BATCH_NORM)["eps"]
        if (tensorflow, epsilon) != (backbone.same_padding, backbone.batch_norm_epsilon):
            raise CheckpointError(
                f"{described} is of {origin.architecture}; {other_form(backbone, tensorflow, epsilon)}"
            )
        if (origin.pixel_mean, origin.pixel_std) != (backbone.pixel_mean, backbone.pixel_std):
            means = [" ".join(f"{value:g}" for value in values) for values in (origin.pixel_mean, backbone.pixel_mean)]
            raise CheckpointError(
                f"{described} was trained with pixels of mean {means[0]}; the backbone has {means[1]}"
            )
    backbone.load_state_dict(kept)
    doubt = "" if origin else f"; nothing says whether it is of this form ({form_words(backbone)}): taken as such"
    return [f"backbone from {path}, a classifier timm/{origin.architecture if origin else backbone.name}{doubt}"]


def other_form(backbone: EfficientNet, same_padding: bool, epsilon: float) -> str:
    """Second half of an error: what the file's form is, and what the backbone's."""
    words = f"{'SAME' if same_padding else 'symmetric'} padding, batch norm epsilon {epsilon:g}"
    return f"its form ({words}) is not that of model.backbone={backbone.name} ({form_words(backbone)})"


def form_words(backbone: EfficientNet) -> str:
    """Padding and epsilon in a few words."""
    padding = "SAME" if backbone.same_padding else "symmetric"
    return f"{padding} padding, batch norm epsilon {backbone.batch_norm_epsilon:g}"


def find_origin(path: Path) -> TimmOrigin | None:
    """Find out which of timm's EfficientNets a file is of, from a config.json beside it or from its name."""
    config = path.with_name("config.json")
    if path.name in HUB_FILES and config.is_file():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            pixels = content["pretrained_cfg"]
            return TimmOrigin(content["architecture"], tuple(pixels["mean"]), tuple(pixels["std"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
    found = re.search(r"(?<![a-z])(tf_)?efficientnet_b\d", path.name)
    if not found:
        return None
    halves = re.search(r"[._](ap|ra4_e3600)(?![a-z0-9])", path.name)
    return TimmOrigin(found[0], *((HALVES, HALVES) if halves else (IMAGENET_MEAN, IMAGENET_STD)))


def load_published(backbone: nn.Module) -> list[str] | None:
    """Load the weights of `model.pretrained: true`, after a download where they are not cached.

    Returns:
        Lines about them; None: the backbone is none of torchvision's or timm's.

    Raises:
        CheckpointError: the download failed.
        SettingsError: timm is needed and not installed.
    """
    if isinstance(backbone, TimmBackbone):
        return [f"backbone from timm's weights, {download_weights(backbone)}"]
    if isinstance(backbone, EfficientNet) and backbone.standard_weights is None:
        state, where = download_classifier(backbone.name)
        kept = {name: value for name, value in state.items() if not name.startswith(TIMM_HEAD)}
        check_fit(kept, backbone.state_dict(), where)
        backbone.load_state_dict(kept)
        return [f"backbone from timm's weights, {where}"]
    if not isinstance(backbone, TorchvisionBackbone) or backbone.standard_weights is None:
        return None
    weights = backbone.standard_weights
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    # OSError: no network, no room; RuntimeError: wrong hash or damaged file
    except (OSError, http.client.HTTPException, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"model.pretrained=true: {weights.url} could not be fetched ({reason}); without a network, fetch it "
            "elsewhere and use model.pretrained=FILE"
        ) from None
    return [load_torchvision(backbone, state, f"torchvision's {weights} ({Path(weights.url).name})")]
