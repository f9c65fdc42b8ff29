"""Classifiers: any backbone of a detector with pooling and one linear layer, and the small network of a sample."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.config.settings import Settings
from detection.contract import Detector, Geometry
from detection.errors import SettingsError
from detection.models.backbones import BACKBONES, build_backbone
from detection.ops.pixels import NormalizePixels

SIMPLE_CNN = "simple_cnn"
NETWORKS = (SIMPLE_CNN,)  # besides every `model.backbone`
SIMPLE_CNN_SIDE_PX = 32


class SimpleCNN(nn.Module):
    """Convolutions of 5x5 to 6 and 16 channels with pooling, then 120, 84 and C; (B, 3, 32, 32) to (B, C).

    The network of LeCun's LeNet-5 (1998) for colour images, as many first examples of PyTorch have it. Its pixels have
    mean and deviation 0.5. Its backbone is too small for a detector.
    """

    strides = (4,)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.normalize = NormalizePixels((0.5,) * 3, (0.5,) * 3)
        self.pixel_mean = self.pixel_std = (0.5,) * 3
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(self.normalize(images)).flatten(1))


class Classifier(nn.Module):
    """A detector's backbone, the mean of its last map, and one linear layer; (B, 3, H, W) to logits (B, C)."""

    def __init__(self, backbone: Any, num_classes: int, batch_norm_momentum: float) -> None:
        super().__init__()
        self.num_classes, self.strides = num_classes, backbone.strides
        self.pixel_mean, self.pixel_std = backbone.pixel_mean, backbone.pixel_std
        self.normalize = NormalizePixels(backbone.pixel_mean, backbone.pixel_std)
        self.backbone = backbone
        self.head = nn.Linear(backbone.out_channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = batch_norm_momentum

    def forward(self, images: Tensor) -> Tensor:
        coarsest = self.backbone(self.normalize(images))[-1]
        return self.head(coarsest.mean((2, 3)))


class ClassLoss(nn.Module):
    """Cross-entropy of an image's class; an image whose box the augmentation removed has no part in it."""

    def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = targets["labels"][:, 0]
        losses = F.cross_entropy(outputs.float(), labels.clamp(min=0), reduction="none")
        counted = (labels >= 0).float()
        return {"loss_class": (losses * counted).sum() / counted.sum().clamp(min=1)}


class LikeliestClass(nn.Module):
    """The likeliest class of each image with its probability, in the form of one detection without a box."""

    def forward(self, outputs: Tensor) -> list[dict[str, Tensor]]:
        scores, labels = outputs.float().softmax(dim=1).max(dim=1)
        boxes = torch.zeros(len(outputs), 1, 4, device=outputs.device)
        return [
            {"boxes": box, "scores": score[None], "labels": label[None]}
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]


def build_classifier(settings: Settings, num_classes: int, network: str | None) -> Detector:
    """Build a classifier with random weights, on the CPU, in the form that the parts of a training run take.

    Args:
        network: one of `NETWORKS`; None: the backbone of the settings.

    Raises:
        SettingsError: the backbone is that of a cfg, or the settings do not fit the network.
    """
    model_settings, multiple = settings.model, 32
    model: nn.Module
    if network == SIMPLE_CNN:
        sides = settings.train.image_size, settings.evaluation.image_size
        if sides != (SIMPLE_CNN_SIDE_PX,) * 2 or settings.train.resize_frequency:
            raise SettingsError(
                f"--network {SIMPLE_CNN}: train.image_size and evaluation.image_size must be {SIMPLE_CNN_SIDE_PX}, "
                f"are {sides[0]} and {sides[1]}; train.resize_frequency must be 0"
            )
        if model_settings.pretrained is not False:
            raise SettingsError(f"model.pretrained: no weights fit --network {SIMPLE_CNN}; must be false")
        model, name = SimpleCNN(num_classes), SIMPLE_CNN
        multiple = SIMPLE_CNN_SIDE_PX // 4  # what looks at other sizes than its own takes four times this side
    else:
        name = model_settings.backbone
        if name not in BACKBONES and not name.startswith("timm/"):
            raise SettingsError(f"model.backbone = {name!r} has no classifier; must be {', '.join(BACKBONES)}")
        if model_settings.batch_norm != "standard":
            raise SettingsError("model.batch_norm: must be standard for a classifier")
        levels = len(cast(Any, BACKBONES.get(name)).strides) if name == "darknet_tiny" else 3
        backbone = build_backbone(model_settings, levels, "a classifier")
        model = Classifier(backbone, num_classes, model_settings.batch_norm_momentum)
    pixels = {"pixel_mean": model.pixel_mean, "pixel_std": model.pixel_std}
    geometry = Geometry(
        size_multiple=multiple,
        placement=model_settings.placement or "letterbox",
        rounding=model_settings.rounding,
        interpolation=model_settings.interpolation,
        fill=model_settings.fill or Geometry.fill,
        **cast(Any, pixels),
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plan = (f"model       classifier {name}, {parameters:,} parameters",)
    return Detector(model, ClassLoss(), LikeliestClass(), geometry, plan, name)
