"""`model.pretrained`: initial weights of the backbone or of a whole detector."""

import http.client
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from detection.checkpoints import is_checkpoint, read_file, verify_checkpoint
from detection.config.command_line import DEFAULTS
from detection.config.loading import complete_settings
from detection.config.settings import ModelSettings
from detection.contract import DetectorModel
from detection.errors import CheckpointError, SettingsError
from detection.models.backbones.darknet import Darknet53
from detection.models.backbones.mobilenet import MobileNetV3
from detection.models.backbones.timm_backbone import TimmBackbone, classifier_state, download_weights, load_classifier
from detection.models.darknet.weights import load_darknet_weights

WEIGHTS_DIRECTORY = Path(__file__).resolve().parents[2] / "models" / "weights"
DARKNET_FILE = "darknet53.conv.74"  # `model.pretrained: true`; none was published for DarknetTiny
NAMES_SHOWN = 3  # in an error about tensors that do not fit


def load_pretrained(model: nn.Module, settings: ModelSettings) -> list[str]:
    """Load the weights that the settings name into the model or its backbone.

    For new runs only: a resumed one has all weights in its checkpoint.

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
    if path.suffix == ".weights" or re.search(r"\.conv\.\d+$", path.name):
        return load_darknet_weights(model, path).lines
    if not path.is_file():
        raise CheckpointError(f"model.pretrained = {path}: {'is no file' if path.exists() else 'does not exist'}")
    backbone = cast(DetectorModel, model).backbone
    if isinstance(backbone, TimmBackbone) and path.suffix == ".safetensors":
        return load_timm_file(backbone, read_safetensors(path), path)
    content = read_file(path)
    if is_checkpoint(content):
        return load_checkpoint_weights(model, settings, verify_checkpoint(content, path), path)
    state = find_state(content, path)
    if isinstance(backbone, MobileNetV3):
        return [load_torchvision(backbone, state, str(path))]
    if isinstance(backbone, TimmBackbone):
        return load_timm_file(backbone, state, path)
    raise CheckpointError(
        f"model.pretrained={path} holds plain tensors; model.backbone={settings.backbone} starts from Darknet files "
        "(.weights, .conv.N) or checkpoints of this program"
    )


def load_standard_weights(model: nn.Module, settings: ModelSettings) -> list[str]:
    """Load the published weights of a backbone (`pretrained: true`); see `load_pretrained`."""
    backbone = cast(DetectorModel, model).backbone
    if isinstance(backbone, Darknet53):
        return load_darknet_weights(model, WEIGHTS_DIRECTORY / DARKNET_FILE).lines
    if isinstance(backbone, MobileNetV3):
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
    if isinstance(backbone, TimmBackbone):
        where = download_weights(backbone)
        return [f"backbone from timm's weights, {where}"]
    named = f"detector {settings.detector} with backbone {settings.backbone}"
    raise SettingsError(f"model.pretrained = true: {named} has no standard weights; name a FILE")


def load_torchvision(backbone: MobileNetV3, state: Mapping[str, Tensor], source: str) -> str:
    """Load the state of torchvision's classifier, or of its `features` alone, into the backbone."""
    if any(name.startswith("features.") for name in state):
        state = {
            name.removeprefix("features."): value for name, value in state.items() if not name.startswith("classifier.")
        }
    ours = backbone.torchvision_names()
    own_state = backbone.state_dict()
    check_fit(state, {name: own_state[own] for name, own in ours.items()}, source)
    backbone.load_state_dict({ours[name]: value for name, value in state.items()})
    return f"backbone, {len(ours)} tensors from {source}"


def load_timm_file(backbone: TimmBackbone, state: Mapping[str, Tensor], path: Path) -> list[str]:
    """Load the state of a timm classifier, with or without its last layers, into the backbone."""
    expected, classifier = classifier_state(backbone)
    kept = {name: value for name, value in state.items() if not name.startswith(classifier)}
    check_fit(kept, {name: value for name, value in expected.items() if not name.startswith(classifier)}, str(path))
    load_classifier(backbone, state)
    return [f"backbone from {path}, a classifier timm/{backbone.name}"]


def load_checkpoint_weights(
    model: nn.Module, settings: ModelSettings, checkpoint: dict[str, Any], path: Path
) -> list[str]:
    """Load the detector of one of our runs, except output convolutions for other classes or anchors."""
    declared, lines = cast(DetectorModel, model), list[str]()
    try:
        if not checkpoint["settings"]:
            raise KeyError("settings")
        its = complete_settings(checkpoint["settings"], DEFAULTS, lines).model
        names = checkpoint["categories"]["names"]
        state = dict(checkpoint["average"] or checkpoint["model"])
        step = checkpoint["step"]
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise CheckpointError(
            f"model.pretrained={path} is not the checkpoint of a run: no {str(error).strip(chr(39))}"
        ) from None
    for kind in ("detector", "backbone"):
        if (own := getattr(settings, kind)) != (other := getattr(its, kind)):
            raise CheckpointError(f"model.pretrained={path} has the {kind} {other}, this run {own}")
    weights = "EMA" if checkpoint["average"] else "weights"
    lines.append(f"backbone, neck and heads from {path}: {weights} after {step} steps, {len(names)} classes")
    expected = model.state_dict()
    output_ids = {id(value) for convolution in declared.output_convolutions() for value in convolution.parameters()}
    outputs = {name for name, value in model.named_parameters() if id(value) in output_ids}
    reshaped = any(name in state and state[name].shape != expected[name].shape for name in outputs)
    if len(names) != declared.num_classes or reshaped:
        state = {name: value for name, value in state.items() if name not in outputs}
        expected = {name: value for name, value in expected.items() if name not in outputs}
        other_anchors = "" if len(names) != declared.num_classes else " and other anchors"
        lines.append(
            f"the output convolutions start anew: the file has {len(names)} classes{other_anchors}, this run "
            f"{declared.num_classes}"
        )
    check_fit(state, expected, str(path))
    model.load_state_dict(state, strict=False)
    return lines


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Check the names and shapes of a state.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; names the first of each kind.
    """
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    missing = [name for name in expected if name not in state]
    foreign = [name for name in state if name not in expected]
    parts = [
        f"{len(found)} {kind}: {', '.join(found[:NAMES_SHOWN])}{', ...' if len(found) > NAMES_SHOWN else ''}"
        for kind, found in (("missing", missing), ("unknown", foreign), ("of another shape", shapes))
        if found
    ]
    if parts:
        raise CheckpointError(f"{source} does not fit this network; tensors {'; '.join(parts)}")


def find_state(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict of a file, possibly under "state_dict" or "model"; CheckpointError if it has none."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"model.pretrained={path} holds no state dict (names and tensors)")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file; CheckpointError if that fails."""
    from safetensors import SafetensorError  # a dependency of timm
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"model.pretrained={path} cannot be read: {' '.join(str(error).split())[:200]}") from None
