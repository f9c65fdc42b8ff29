"""ResNet-50 of torchvision as a backbone."""

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50

from detection.models.backbones.mobilenet import IMAGENET_MEAN, IMAGENET_STD

MAPS = ("layer2", "layer3", "layer4")  # torchvision's layers whose outputs have strides 8, 16 and 32


class ResNet50(nn.Module):
    """ResNet-50 without its classifier; (B, 3, H, W) to maps of 512, 1024, 2048 channels at strides 8, 16, 32.

    Source: Deep Residual Learning, table 1, https://arxiv.org/abs/1512.03385, with the stride in the 3x3 convolution
        as in torchvision
    """

    strides = (8, 16, 32)
    out_channels = (512, 1024, 2048)
    pixel_mean = IMAGENET_MEAN
    pixel_std = IMAGENET_STD
    standard_weights = ResNet50_Weights.IMAGENET1K_V1  # those that torchvision's RetinaNet starts from
    unused_tensors = ("fc.",)  # of torchvision's classifier

    def __init__(self) -> None:
        super().__init__()
        network = resnet50(weights=None)
        # Blocks one by one, which activation checkpointing recomputes; the stem is one, its ReLU works in place.
        stem = nn.Sequential(
            OrderedDict((name, getattr(network, name)) for name in ("conv1", "bn1", "relu", "maxpool"))
        )
        blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
        self.stages = nn.ModuleList()
        for layer in ("layer1", *MAPS):
            blocks |= {f"{layer}_{number}": block for number, block in enumerate(getattr(network, layer))}
            if layer in MAPS:
                self.stages.append(nn.Sequential(blocks))
                blocks = OrderedDict()

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        x = images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def torchvision_names(self) -> dict[str, str]:
        """Map torchvision's names to ours: layer3.0.bn1.weight to stages.1.layer3_0.bn1.weight."""
        own = ((name, name.split(".", 2)[2]) for name in self.state_dict())
        return {rest.removeprefix("stem.").replace("_", ".", rest.startswith("layer")): name for name, rest in own}
