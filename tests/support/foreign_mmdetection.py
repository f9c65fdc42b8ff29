"""MMDetection's networks as plain functions that read tensors by their names there; see `foreign_networks`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.foreign_networks import BLOCKS, MEAN, STD, Recorder, Source, by_anchor, conv_bn, norm, plain, up


def mmdetection(t: Source, images: Tensor, classes: int = 80) -> list[Tensor]:
    """mmdet's YOLOV3 on Darknet; outputs of the strides 8, 16, 32."""
    x = conv_bn(t, images.float() / 255, "backbone.conv1", 32, 3)
    maps = []
    for stage, count in enumerate(BLOCKS, 1):
        name, width = f"backbone.conv_res_block{stage}", 32 * 2**stage
        x = conv_bn(t, x, f"{name}.conv", width, 3, 2)
        for block in range(count):
            y = conv_bn(t, x, f"{name}.res{block}.conv1", width // 2, 1)
            x = x + conv_bn(t, y, f"{name}.res{block}.conv2", width, 3)
        maps.append(x)
    return mmdetection_neck(t, maps, (512, 256, 128), (1024, 512, 256), classes)


def mmdetection_mobilenet(t: Source, images: Tensor, classes: int = 80) -> list[Tensor]:
    """mmdet's YOLOV3 on MobileNetV2: expansion, channels, blocks, stride of each stage; levels are stages 3, 5, 7."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    x, maps = conv_bn(t, (images.float() / 255 - MEAN) / STD, "backbone.conv1", 32, 3, 2), []
    for number, (expansion, out, count, stride) in enumerate(stages, 1):
        for block in range(count):
            name, y, wide = f"backbone.layer{number}.{block}", x, expansion * x.shape[1]
            if expansion > 1:
                y = conv_bn(t, y, f"{name}.expand_conv", wide, 1)
            kernel = t(f"{name}.depthwise_conv.conv.weight", wide, 1, 3, 3)
            y = F.conv2d(y, kernel, None, 1 if block else stride, 1, groups=wide)
            y = F.leaky_relu(norm(t, y, f"{name}.depthwise_conv.bn"), 0.1)
            y = F.conv2d(y, t(f"{name}.linear_conv.conv.weight", out, wide, 1, 1))
            y = norm(t, y, f"{name}.linear_conv.bn")
            x = x + y if block else y
        maps.append(x)
    if isinstance(t, Recorder):  # the classifier's convolution is stored and not used
        conv_bn(t, x, "backbone.conv2", 1280, 1)
    return mmdetection_neck(t, maps[2::2], (96, 96, 96), (96, 96, 96), classes)


def mmdetection_neck(
    t: Source, maps: list[Tensor], widths: Sequence[int], bridges: Sequence[int], classes: int
) -> list[Tensor]:
    """mmdet's YOLOV3Neck and YOLOV3Head; widths from the coarsest level."""
    outputs: list[Tensor] = []
    x = maps[-1]
    for level, (width, bridge) in enumerate(zip(widths, bridges, strict=True)):
        if level:
            x = torch.cat([up(conv_bn(t, x, f"neck.conv{level}", width, 1)), maps[-1 - level]], 1)
        for number in range(1, 6):
            odd = number % 2
            x = conv_bn(t, x, f"neck.detect{level + 1}.conv{number}", width if odd else 2 * width, 1 if odd else 3)
        y = conv_bn(t, x, f"bbox_head.convs_bridge.{level}", bridge, 3)
        outputs.insert(0, by_anchor(plain(t, y, f"bbox_head.convs_pred.{level}", 3 * (5 + classes))))
    return outputs
