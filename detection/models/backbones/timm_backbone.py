"""Feature extractors of the optional package timm as backbones."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detection.errors import CheckpointError, SettingsError

COARSEST_STRIDE = 32  # pixels per cell of the last map
TIMM_PREFIX = "timm/"  # of the backbone's name in the settings
PROBE_SIZE = (64, 96)  # height, width; not square, to catch swapped axes


class TimmBackbone(nn.Module):
    """A timm model; (B, 3, H, W) to its feature maps at `out_indices`, stride ascending.

    Source: https://github.com/huggingface/pytorch-image-models (`features_only`)
    """

    def __init__(self, name: str, out_indices: Sequence[int]) -> None:
        super().__init__()
        import timm

        self.name = name
        self.out_indices = tuple(out_indices)
        self.features: Any = create_features(name, out_indices=self.out_indices)
        self.out_channels = tuple(self.features.feature_info.channels())
        self.strides = tuple(self.features.feature_info.reduction())
        data = timm.data.resolve_data_config({}, pretrained_cfg=self.features.pretrained_cfg)
        self.pixel_mean = tuple(data["mean"])
        self.pixel_std = tuple(data["std"])

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.features(images))


def timm_backbone(name: str, levels: int) -> TimmBackbone:
    """Build the backbone of a timm model's feature maps at the `levels` strides up to 32, with random weights.

    Raises:
        SettingsError: timm is not installed or has no such model; the model lacks such feature maps, or they are not
            as declared.
    """
    try:
        import timm
    except ImportError:
        raise SettingsError(f"model.backbone=timm/{name} needs the package timm: pip install timm") from None
    known = timm.list_models()
    names = (
        known
        if name.partition(".")[0] not in known
        else timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
    )
    if name not in [*known, *names]:
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        raise SettingsError(f"model.backbone=timm/{name}: timm has no such model; the nearest are {', '.join(nearest)}")
    reductions = [feature["reduction"] for feature in create_features(name).feature_info.info]
    last_of_stride = {stride: index for index, stride in enumerate(reductions)}
    strides = [COARSEST_STRIDE >> halvings for halvings in reversed(range(levels))]
    if not set(strides) <= set(reductions):
        raise SettingsError(
            f"model.backbone=timm/{name} has maps at the strides {', '.join(map(str, sorted(last_of_stride)))}; "
            f"{levels} levels need maps of strides {', '.join(map(str, strides))}"
        )
    backbone = TimmBackbone(name, [last_of_stride[stride] for stride in strides])
    check_declaration(backbone)
    return backbone


def create_features(name: str, **arguments: Any) -> Any:
    """Create timm's feature extractor; SettingsError if the model has none."""
    import timm

    try:
        return timm.create_model(name, features_only=True, **arguments)
    except Exception as error:  # noqa: BLE001  (each family of models raises its own)
        raise SettingsError(f"model.backbone=timm/{name} gives no features: {one_line(error)}") from None


@torch.no_grad()
def check_declaration(backbone: TimmBackbone) -> None:
    """Compare the feature maps of a small image with the declared channels and strides.

    Raises:
        SettingsError: they differ, or the model does not accept the image size.
    """
    height, width = PROBE_SIZE
    try:
        maps = backbone.eval()(torch.zeros(1, 3, height, width))
    except Exception as error:  # noqa: BLE001  (models of fixed size assert, raise or fail in a matmul)
        raise SettingsError(
            f"model.backbone=timm/{backbone.name} cannot be run on {width} x {height} pixels: {one_line(error)}"
        ) from None
    backbone.train()
    found = [tuple(feature.shape[1:]) for feature in maps]
    expected = [(c, height // s, width // s) for c, s in zip(backbone.out_channels, backbone.strides, strict=True)]
    if found != expected:
        raise SettingsError(
            f"model.backbone=timm/{backbone.name}: maps of (channels, rows, columns) {expected} are declared, "
            f"{found} come out of {width} x {height} pixels"
        )


def download_weights(backbone: TimmBackbone) -> str:
    """Load timm's default weights into the backbone; returns their address.

    Raises:
        CheckpointError: there are none, or the download failed.
    """
    features, where = create_pretrained(
        f"timm/{backbone.name}", backbone.name, features_only=True, out_indices=backbone.out_indices
    )
    backbone.features.load_state_dict(features.state_dict())
    return where


def download_classifier(name: str) -> tuple[dict[str, Tensor], str]:
    """State of a timm classifier with its default weights, and their address.

    Raises:
        SettingsError: timm is not installed.
        CheckpointError: there are no such weights, or the download failed.
    """
    try:
        import timm  # noqa: F401
    except ImportError:
        raise SettingsError(
            f"model.pretrained=true: weights of {name} need the package timm: pip install timm, or name a FILE"
        ) from None
    model, where = create_pretrained(name, name)
    return model.state_dict(), where


def create_pretrained(backbone: str, name: str, **arguments: Any) -> tuple[Any, str]:
    """Create a timm model with its default weights; returns their address too.

    Args:
        backbone: as in the settings, for the error.
        name: timm's.

    Raises:
        CheckpointError: there are none, or the download failed.
    """
    import timm

    hub = timm.models.get_pretrained_cfg_value(name, "hf_hub_id")
    where = f"https://huggingface.co/{hub}" if hub else "the model's page"
    try:
        return timm.create_model(name, pretrained=True, **arguments), where
    except Exception as error:  # noqa: BLE001  (hub, HTTP, socket and file errors share no base)
        raise CheckpointError(
            f"model.pretrained=true: weights of {backbone} could not be fetched ({one_line(error)}); without "
            f"a network, fetch model.safetensors from {where} elsewhere and use model.pretrained=FILE"
        ) from None


def classifier_state(backbone: TimmBackbone) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """State of the whole classifier, as in a file, and the prefixes of its last layers, which a file may lack."""
    import timm

    model: Any = timm.create_model(backbone.name)
    names = model.pretrained_cfg.get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    return model.state_dict(), tuple(f"{name}." for name in names)


def load_classifier(backbone: TimmBackbone, state: Mapping[str, Tensor]) -> None:
    """Load the state of a classifier, checked against `classifier_state`, into the backbone.

    timm maps the names, which differ.
    """
    features = create_features(
        backbone.name,
        out_indices=backbone.out_indices,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": dict(state)},
    )
    backbone.features.load_state_dict(features.state_dict())


def one_line(error: Exception) -> str:
    """Type and message of an error without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
