"""Cfg texts of published detectors, generated from their published structure."""

from collections.abc import Sequence
from typing import Any

Section = tuple[str, dict[str, Any]]
COCO_ANCHORS = "10,13, 16,30, 33,23, 30,61, 62,45, 59,119, 116,90, 156,198, 373,326"
COCO_ANCHORS_V4 = "12,16, 19,36, 40,28, 36,75, 76,55, 72,146, 142,110, 192,243, 459,401"
TINY_ANCHORS = "10,14, 23,27, 37,58, 81,82, 135,169, 344,319"


def write_cfg(sections: Sequence[Section]) -> str:
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key}={value}\n" for key, value in options.items()) for name, options in sections
    )


def net(width: int, height: int | None = None) -> Section:
    return "net", {"width": width, "height": height or width, "channels": 3}


def conv(filters: int, size: int, stride: int = 1, activation: str = "leaky", **more: Any) -> Section:
    options = {"batch_normalize": 1, "filters": filters, "size": size, "stride": stride, "pad": 1}
    return "convolutional", {**options, "activation": activation, **more}


def output(filters: int = 255, **more: Any) -> Section:
    return "convolutional", {"size": 1, "stride": 1, "pad": 1, "filters": filters, "activation": "linear", **more}


def yolo(mask: str, anchors: str, classes: int = 80, **more: Any) -> Section:
    num = len(anchors.split(",")) // 2
    return "yolo", {"mask": mask, "anchors": anchors, "classes": classes, "num": num, **more}


def route(*layers: int, **more: Any) -> Section:
    return "route", {"layers": ",".join(map(str, layers)), **more}


def shortcut(*layers: int, activation: str = "linear", **more: Any) -> Section:
    return "shortcut", {"from": ",".join(map(str, layers)), "activation": activation, **more}


def pool(size: int, stride: int) -> Section:
    return "maxpool", {"size": size, "stride": stride}


def upsample(stride: int = 2) -> Section:
    return "upsample", {"stride": stride}


def pyramid_pooling(first: int) -> list[Section]:
    """Max pooling of sizes 5, 9 and 13 concatenated with the input, and the 1x1 convolution after it."""
    pools = [pool(5, 1), route(-2), pool(9, 1), route(-4), pool(13, 1), route(-1, -3, -5, -6)]
    return [*pools, conv(first, 1)]


def yolov3(spp: bool = False, size: int = 416, widths: tuple[int, int, int] = (512, 256, 128)) -> str:
    layers: list[Section] = [conv(32, 3)]
    for filters, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        layers.append(conv(filters, 3, 2))
        for _ in range(blocks):
            layers += [conv(filters // 2, 1), conv(filters, 3), shortcut(-3)]
    for width, mask, lateral in zip(widths, ("6,7,8", "3,4,5", "0,1,2"), (None, 61, 36), strict=True):
        if lateral is not None:
            layers += [route(-4), conv(width, 1), upsample(), route(-1, lateral)]
        pair = [conv(width, 1), conv(2 * width, 3)]
        if spp and lateral is None:
            layers += [*pair, conv(width, 1), *pyramid_pooling(width), conv(2 * width, 3), *pair]
        else:
            layers += pair * 3
        layers += [output(), yolo(mask, COCO_ANCHORS)]
    return write_cfg([net(size), *layers])


def yolov3_tiny(size: int = 416) -> str:
    layers: list[Section] = []
    for filters in (16, 32, 64, 128, 256):
        layers += [conv(filters, 3), pool(2, 2)]
    layers += [conv(512, 3), pool(2, 1), conv(1024, 3), conv(256, 1), conv(512, 3)]
    layers += [output(), yolo("3,4,5", TINY_ANCHORS), route(-4), conv(128, 1), upsample(), route(-1, 8), conv(256, 3)]
    return write_cfg([net(size), *layers, output(), yolo("0,1,2", TINY_ANCHORS)])


def yolov4(size: int = 608) -> str:
    layers: list[Section] = [conv(32, 3, 1, "mish")]
    for filters, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        # the first stage does not halve the channels of its two branches, only those inside its block
        branch = filters if filters == 64 else filters // 2
        layers += [conv(filters, 3, 2, "mish"), conv(branch, 1, 1, "mish"), route(-2), conv(branch, 1, 1, "mish")]
        for _ in range(blocks):
            layers += [conv(filters // 2, 1, 1, "mish"), conv(branch, 3, 1, "mish"), shortcut(-3)]
        layers += [conv(branch, 1, 1, "mish"), route(-1, -(3 * blocks + 4)), conv(filters, 1, 1, "mish")]
    layers += [conv(512, 1), conv(1024, 3), conv(512, 1), *pyramid_pooling(512), conv(1024, 3), conv(512, 1)]
    for width, lateral in ((256, 85), (128, 54)):
        layers += [conv(width, 1), upsample(), route(lateral), conv(width, 1), route(-1, -3)]
        layers += [conv(width, 1), conv(2 * width, 3)] * 2 + [conv(width, 1)]
    heads = ((128, "0,1,2", 1.2, None), (256, "3,4,5", 1.1, -16), (512, "6,7,8", 1.05, -37))
    for width, mask, scale, lateral in heads:
        if lateral is not None:
            layers += [route(-4), conv(width, 3, 2), route(-1, lateral)]
            layers += [conv(width, 1), conv(2 * width, 3)] * 2 + [conv(width, 1)]
        layers += [conv(2 * width, 3), output(), yolo(mask, COCO_ANCHORS_V4, scale_x_y=scale)]
    return write_cfg([net(size), *layers])


def yolov4_tiny(size: int = 416) -> str:
    layers: list[Section] = [conv(32, 3, 2), conv(64, 3, 2)]
    for filters in (64, 128, 256):
        half = filters // 2
        layers += [conv(filters, 3), route(-1, groups=2, group_id=1), conv(half, 3), conv(half, 3), route(-1, -2)]
        layers += [conv(filters, 1), route(-6, -1), pool(2, 2)]
    layers += [conv(512, 3), conv(256, 1), conv(512, 3), output(), yolo("3,4,5", TINY_ANCHORS, scale_x_y=1.05)]
    layers += [route(-4), conv(128, 1), upsample(), route(-1, 23), conv(256, 3), output()]
    return write_cfg([net(size), *layers, yolo("1,2,3", TINY_ANCHORS, scale_x_y=1.05)])
