"""A faster copy of a trained network, for inference alone: batch norm and activations inside the convolutions.

Which layer follows which is not guessed from names: one pass over a small image is watched, so networks of any package
can be folded. What does not fit (a convolution with a batch norm per level, as in EfficientDet's heads, or one whose
output something else takes too) stays as it is.
"""

import copy
import itertools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from detection.contract import Detector
from detection.inference.fused_convolution import PLAIN, FusedConv2d, can_fuse, fused_name
from detection.inference.watch import Watch
from detection.models.backbones.darknet import DarknetBatchNorm2d
from detection.models.backbones.mobilenet import DepthwiseConv2d
from detection.runtime.devices import Machine

CELLS = 2  # side of the coarsest map in the watched pass
PLAIN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, DarknetBatchNorm2d)
PLAIN_CONVOLUTIONS = (nn.Conv2d, DepthwiseConv2d)


class Group(NamedTuple):
    """A convolution with what follows it and nothing else uses."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d | None
    norm_arguments: dict[str, Any]
    activation: nn.Module | None  # that oneDNN has


def prepare_inference(detector: Detector, machine: Machine) -> Detector:
    """Return a detector with a network made for inference on a machine; the given one stays as it is.

    Batch norm is folded everywhere; on x86 processors convolutions also become `FusedConv2d`. A detector without
    convolutions of torch, such as an exported file, is returned as it is.
    """
    if not any(isinstance(module, nn.Conv2d) for module in detector.model.modules()):
        return detector
    side = CELLS * detector.geometry.size_multiple
    fuse = machine.device.type == "cpu" and can_fuse()
    model = fold(detector.model, torch.zeros(1, 3, side, side, dtype=torch.uint8), fuse, machine.dtype)
    return detector.replace(model=model)


@torch.no_grad()
def fold(model: nn.Module, images: Tensor, fuse: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a network, with batch norm folded into the convolutions before it.

    scale = gamma / sqrt(variance + epsilon),  weight' = weight * scale,  bias' = (bias - mean) * scale + beta

    Args:
        model: in evaluation mode, on the CPU; what is not folded shares its tensors with the copy.
        images: that the network accepts, (B, 3, H, W); only their way through the layers matters.
        fuse: also replace convolutions and the activations behind them by `FusedConv2d`.
        dtype: of these; None: float32.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    watch = Watch(model)
    watch.run(model, images)
    groups = [find_group(module, watch) for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms: dict[int, nn.Module] = {}
    others: dict[int, nn.Module] = {}
    for group in groups:
        if group.norm is not None:
            fold_tensors(group.convolution, group.norm_arguments)
            norms[id(group.norm)] = without_norm(group.norm)
        if not fuse or not is_plain(group.convolution, watch):
            continue
        activation = None if group.activation is None else fused_name(group.activation)
        others[id(group.convolution)] = FusedConv2d(group.convolution, *(activation or (PLAIN, [])), dtype)
        if group.activation is not None:
            others[id(group.activation)] = nn.Identity()
    replace_modules(model, norms)
    replace_modules(model, others)  # also within what took the place of a norm
    return model


def find_group(convolution: nn.Conv2d, watch: Watch) -> Group:
    """Find what follows a convolution, from a watched pass."""
    group = Group(convolution, None, {}, None)
    outputs = watch.outputs[id(convolution)]
    call = watch.only_call(outputs[0]) if len(outputs) == 1 else None
    if call is not None and call.norm is not None:
        norm = call.module
        if norm is None or len(watch.outputs[id(norm)]) != 1 or not can_remove(norm) or call.norm.get("training"):
            return group
        group = group._replace(norm=cast(nn.BatchNorm2d, norm), norm_arguments=call.norm)
        call = watch.only_call(call.output)
    activation = None if call is None else call.module
    if activation is None or fused_name(activation) is None or has_hooks(activation):
        return group
    return group._replace(activation=activation) if len(watch.entered[id(activation)]) == 1 else group


def can_remove(norm: nn.Module) -> bool:
    """Whether `without_norm` knows what a batch norm does besides; timm's has its activation inside."""
    known = type(norm) in PLAIN_NORMS or (isinstance(norm, nn.BatchNorm2d) and hasattr(norm, "act"))
    return known and not has_hooks(norm)


def without_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """What stays of a batch norm that was folded."""
    if type(norm) in PLAIN_NORMS:
        return nn.Identity()
    return nn.Sequential(cast(nn.Module, norm.drop), cast(nn.Module, norm.act)).eval()


def is_plain(convolution: nn.Conv2d, watch: Watch) -> bool:
    """Whether `FusedConv2d` can take the place of a convolution: no padding of its own, its weight used by no other."""
    return (
        type(convolution) in PLAIN_CONVOLUTIONS
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and convolution.weight.dtype == torch.float32
        and len(watch.entered[id(convolution)]) == len(watch.outputs[id(convolution)]) > 0
        and not has_hooks(convolution)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fold_tensors(convolution: nn.Conv2d, norm: dict[str, Any]) -> None:
    """Scale the filters of a convolution, in new tensors.

    Args:
        norm: arguments of `F.batch_norm`: its tensors (C,) and `eps`. Those of the module may be others, from which it
            computes them (`DarknetBatchNorm2d`).
    """
    weight, mean = convolution.weight, norm["running_mean"].double()
    scale = (norm["running_var"].double() + norm.get("eps", 1e-5)).rsqrt()
    if norm.get("weight") is not None:
        scale = scale * norm["weight"].double()
    bias = -mean if convolution.bias is None else convolution.bias.double() - mean
    bias = bias * scale
    if norm.get("bias") is not None:
        bias = bias + norm["bias"].double()
    scaled = weight.double() * scale.view(-1, 1, 1, 1)
    convolution.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)


def replace_modules(model: nn.Module, replaced: dict[int, nn.Module]) -> None:
    """Replace modules wherever they are held, by their `id`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
