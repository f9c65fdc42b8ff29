"""What a backbone computes besides its tensors: weights fit only the form they were trained in."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from detection.errors import CheckpointError
from detection.ops.pixels import NormalizePixels


@dataclass(frozen=True)
class BackboneForm:
    """Batch norm and normalisation of the pixels of a backbone.

    Attributes:
        norms: class and epsilon of its normalisation layers, in their order.
        pixel_mean, pixel_std: of RGB in 0..1.
    """

    norms: tuple[tuple[type, float], ...]
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    @classmethod
    def of(cls, backbone: Any) -> "BackboneForm":
        """Read the form of a backbone."""
        norms = tuple((type(module), float(module.eps)) for module in backbone.modules() if hasattr(module, "eps"))
        return cls(norms, tuple(backbone.pixel_mean), tuple(backbone.pixel_std))

    def describe_norms(self) -> str:
        """Say in a few words which kinds of normalisation layers there are."""
        return " and ".join(f"{kind.__name__} with epsilon {eps:g}" for kind, eps in dict.fromkeys(self.norms))


def check_form(model: nn.Module, described: str) -> None:
    """Check that a detector's backbone is still in the form of its published weights.

    Args:
        model: a detector whose backbone comes from `build_backbone`.
        described: what is to be loaded, for the error.

    Raises:
        CheckpointError: the detector changed its batch norm or normalises pixels otherwise; names the settings.
    """
    built = getattr(model.backbone, "built_as", None)
    if not isinstance(built, BackboneForm):
        return
    form = BackboneForm.of(model.backbone)
    if form.norms != built.norms:
        raise CheckpointError(
            f"{described} needs {built.describe_norms()} in the backbone, which has {form.describe_norms()}: "
            "model.batch_norm must be standard, and a batch_norm_epsilon of the detector null"
        )
    pixels = getattr(model, "normalize", None)
    if not isinstance(pixels, NormalizePixels):
        return
    found = [pixels.get_buffer(name).flatten().tolist() for name in ("mean", "std")]
    same = all(
        abs(value - own) < 1e-6
        for values, owns in zip(found, (built.pixel_mean, built.pixel_std), strict=True)
        for value, own in zip(values, owns, strict=True)
    )
    if not same or (pixels.pixel_range, pixels.channel_order) != (1.0, "rgb"):
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (built.pixel_mean, built.pixel_std))
        raise CheckpointError(
            f"{described} needs RGB in 0..1 with mean {mean} and deviation {std}; this detector normalises pixels "
            "otherwise: model.pixel_scaling and the detector's own setting of pixels must be backbone"
        )
