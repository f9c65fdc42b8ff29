"""Weights of a classifier that classify.py trained, for the backbone of a detector."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from detection.errors import CheckpointError
from detection.models.state_dicts import check_fit
from detection.ops.pixels import NormalizePixels

CLASSIFIER = "classifier"  # key of such a checkpoint
PREFIX = "backbone."
# What no tensor shows -> the settings of a detector that decide about it.
SETTINGS = {
    "activations": "model.leaky_slope",
    "batch_norm": "model.batch_norm, or a batch_norm_epsilon of the detector",
    "padding": "model.backbone",
    "pixels": "model.pixel_scaling, or the detector's own setting of pixels",
}


def form_of(model: nn.Module) -> dict[str, list[str]]:
    """Describe what a backbone computes besides its tensors, and the pixels it gets, in plain values.

    Args:
        model: a network with a `backbone` and a `normalize`.
    """
    backbone, pixels = cast(nn.Module, model.backbone), cast(NormalizePixels, model.normalize)
    activations, norms, padding = set[str](), set[str](), set[str]()
    for module in backbone.modules():
        kind = type(module).__name__
        if isinstance(module, nn.LeakyReLU):
            activations.add(f"{kind} of slope {module.negative_slope:g}")
        elif isinstance(module, nn.ReLU | nn.ReLU6 | nn.Hardswish | nn.SiLU | nn.Mish):
            activations.add(kind)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            norms.add(f"{kind} with epsilon {module.eps:g}")
        elif isinstance(module, nn.Conv2d):
            sides, steps, rims = ("x".join(map(str, of)) for of in (module.kernel_size, module.stride, module.padding))
            padding.add(f"{sides} stride {steps} padding {rims}")
        elif "Pad" in kind:
            padding.add(kind)
    # Rounded: a mean may have become a float32 in between.
    mean, std = ([f"{value:.6g}" for value in pixels.get_buffer(part).flatten().tolist()] for part in ("mean", "std"))
    return {
        "activations": sorted(activations),
        "batch_norm": sorted(norms),
        "padding": sorted(padding),
        "pixels": [
            f"{pixels.channel_order.upper()} 0..{pixels.pixel_range:g}",
            f"mean {' '.join(mean)}",
            f"deviation {' '.join(std)}",
        ],
    }


def load_own_classifier(model: nn.Module, content: Mapping[str, Any], path: Path) -> list[str]:
    """Load the backbone of a classifier's checkpoint into a detector; its last layer is left out.

    Args:
        content: the verified checkpoint; that its backbone is the detector's is checked before.

    Returns:
        A line about what was loaded.

    Raises:
        CheckpointError: activation, batch norm, padding or pixels differ, or the tensors do not fit.
    """
    try:
        stored = content[CLASSIFIER]
        form, state = stored["form"], dict(content["average"] or content["model"])
        names, step, top1 = content["categories"]["names"], content["step"], stored["top1"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"model.pretrained={path} is no complete classifier: no {error}") from None
    ours = form_of(model)
    for what, setting in SETTINGS.items():
        if ours[what] != form.get(what):
            theirs, own = (", ".join(values or ["none"]) for values in (form.get(what), ours[what]))
            raise CheckpointError(
                f"model.pretrained={path}: {what.replace('_', ' ')} must be {theirs} with these weights, is {own} in "
                f"this run ({setting})"
            )
    backbone = cast(nn.Module, model.backbone)
    own_state: dict[str, Tensor] = {
        name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)
    }
    check_fit(own_state, backbone.state_dict(), str(path))
    backbone.load_state_dict(own_state)
    share = "" if top1 is None else f", top-1 {top1:.3f}"
    weights = "EMA" if content["average"] else "weights"
    left = len(state) - len(own_state)
    return [
        f"backbone, {len(own_state)} tensors from {path}: {weights} of a classifier of {len(names)} classes after "
        f"{step} steps{share}; {left} tensors of its last layer left out"
    ]
