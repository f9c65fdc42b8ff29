"""Reading of Darknet cfg files, and errors of one line that name the place."""

import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from detection.config.loading import read_cfg
from detection.errors import SettingsError
from detection.models.darknet.cfg import (
    CfgSection,
    cfg_notices,
    format_cfg,
    input_size,
    parse_cfg,
    unused_keys,
    with_classes,
)
from detection.models.darknet.layers import cfg_classes
from detection.models.darknet.network import DarknetNetwork
from tests.support.darknet_descriptions import (
    Section,
    conv,
    net,
    output,
    pool,
    route,
    shortcut,
    upsample,
    write_cfg,
    yolo,
    yolov4,
)

ANCHORS = "4,6, 8,12, 10,14"
# 2 anchors, 1 class: 2 * (5 + 1) = 12 filters
GOOD: list[Section] = [net(32), conv(4, 3, 2), conv(4, 3, 2), output(12), yolo("0,2", ANCHORS, 1)]


def changed(layer: int, **options: object) -> str:
    """GOOD with other options in one layer; None removes a key."""
    sections = [(name, dict(values)) for name, values in GOOD]
    for key, value in options.items():
        sections[layer + 1][1][key] = value
    return write_cfg(
        [(name, {key: value for key, value in values.items() if value is not None}) for name, values in sections]
    )


def with_layers(*layers: Section) -> str:
    """GOOD with more layers behind its second convolution."""
    return write_cfg([*GOOD[:3], *layers, *GOOD[3:]])


def extra(name: str, **options: object) -> str:
    """GOOD with one more layer, number 2."""
    return with_layers((name, options))


def scaled(**more: object) -> list[Section]:
    """A factor per channel for layer 1, 8 x 8 with 4 channels."""
    return [("avgpool", {}), conv(4, 1), ("scale_channels", {"from": 1, **more})]


GAUSSIAN = changed(3).replace("[yolo]", "[Gaussian_yolo]")  # its filters are [yolo]'s


def refusal(text: str) -> str:
    """The message of the error, reached before anything large is allocated."""
    started = time.perf_counter()
    with pytest.raises(SettingsError) as caught:
        sections = parse_cfg(text)
        DarknetNetwork(sections, cfg_classes(sections))
    assert time.perf_counter() - started < 2
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and message.startswith("cfg: "), message
    return message


def line_of(text: str, layer: int) -> int:
    """Where section number `layer` (-1: [net]) begins, lines counted from 1."""
    return [number for number, line in enumerate(text.split("\n"), 1) if line.startswith("[")][layer + 1]


def assert_refused(text: str, layer: int, *words: str) -> None:
    message = refusal(text)
    place = f"in line {line_of(text, layer)}"
    assert place in message or f"line {line_of(text, layer)}:" in message, message
    for word in words:
        assert word in message, message


# Reading


def test_sections_keys_and_lines() -> None:
    text = "# about\n[net]\nwidth=32 # pixels\n\n; old way\n[conv]\nfilters = 8\n  size=\t3\n[max]\nsize=2"
    assert parse_cfg(text) == [
        CfgSection("net", 2, {"width": "32"}),
        CfgSection("convolutional", 6, {"filters": "8", "size": "3"}),
        CfgSection("maxpool", 9, {"size": "2"}),
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_ends(ending: str) -> None:
    """CRLF, CR, no newline at the end of the file, and the byte order mark of Windows' editors."""
    text = write_cfg(GOOD)
    for other in (text, text.rstrip("\n"), "\ufeff" + text):
        assert parse_cfg(other.replace("\n", ending)) == parse_cfg(text)


@pytest.mark.parametrize(
    ("comment", "encoding"),
    [
        ("\u5b66\u4e60\u7387 \uff1d 0.1", "utf-8"),  # "learning rate" and a full-width equals sign
        ("\u5b66\u4e60\u7387 \uff1d 0.1", "gbk"),
        ("gr\u00f6\u00dfe \u2026 100 \u20ac", "cp1252"),  # the ellipsis is 0x85, in latin-1 the end of a line
        ("taille \u00e0 ajuster", "latin-1"),
    ],
)
def test_comments_in_other_encodings(comment: str, encoding: str, tmp_path: Path) -> None:
    text = write_cfg(GOOD)
    lines = text.replace("filters=4\n", f"filters=4 # {comment}\n", 1)
    (tmp_path / "a.cfg").write_bytes(f"# {comment}\n{lines}".encode(encoding))
    sections = parse_cfg(read_cfg(str(tmp_path / "a.cfg")))
    assert [(each.name, each.options) for each in sections] == [(each.name, each.options) for each in parse_cfg(text)]


def test_the_first_of_two_equal_keys_counts() -> None:
    """As in Darknet."""
    text = write_cfg(GOOD).replace("filters=4\n", "filters=4\nfilters=7\n", 1)
    network = DarknetNetwork(parse_cfg(text), 1)
    assert network.backbone[0][0].out_channels == 4


def test_comma_at_the_end_of_a_list() -> None:
    text = write_cfg(GOOD).replace("anchors=4,6, 8,12, 10,14", "anchors = 4,6,  8,12,  10,14,")
    assert DarknetNetwork(parse_cfg(text), 1).anchors == (((4.0, 6.0), (10.0, 14.0)),)


def test_format_is_the_inverse_of_parse() -> None:
    for text in (write_cfg(GOOD), yolov4(), "[network]\n[conv]\nfilters=3\nfilters=4\n#x\n[shortcut]\nfrom=-1,-2"):
        sections = parse_cfg(text)
        again = parse_cfg(format_cfg(sections))
        assert [(s.name, s.options) for s in again] == [(s.name, s.options) for s in sections]
        assert format_cfg(again) == format_cfg(sections)


def test_input_size() -> None:
    assert input_size(parse_cfg("[net]\nwidth=608\nheight=352")) == 608
    assert input_size(parse_cfg("[net]\nwidth=320\nheight=640")) == 640
    assert input_size(parse_cfg("[net]")) == 416


def test_unused_keys_are_listed_once() -> None:
    """Keys without effect, split into those of Darknet's training and unknown ones."""
    sections: list[Section] = [
        ("net", {"width": 32, "height": 32, "batch": 64, "angle": 0}),
        conv(4, 3, 2, stopbackward=1, truth=1),
        ("dropout", {"probability": 0.2, "dropblock": 1}),
        conv(4, 3, 2, stopbackward=1),
        output(12),
        yolo("0,2", ANCHORS, 1, jitter=0.3, ignore_thresh=0.7, nms_kind="diounms", colour="red"),
    ]
    known, unknown = unused_keys(parse_cfg(write_cfg(sections)))
    assert known == [
        *("[net] batch", "[net] angle", "[convolutional] stopbackward", "[convolutional] truth"),
        *("[dropout] dropblock", "[yolo] jitter", "[yolo] ignore_thresh", "[yolo] nms_kind"),
    ]
    assert unknown == ["[yolo] colour"]
    assert unused_keys(parse_cfg(write_cfg(GOOD))) == ([], [])


def test_notices_say_size_and_unused_keys() -> None:
    sections = parse_cfg(write_cfg([net(32, 64), *GOOD[1:3], yolo("0,2", ANCHORS, 1, jitter=0.3, colour="red")]))
    assert cfg_notices(sections, {"train.image_size": 64, "evaluation.image_size": 96}) == [
        "made for 32 x 64 px, used with train.image_size = 64, evaluation.image_size = 96 (square)",
        "not used, the settings decide: [yolo] jitter",
        "unknown keys, ignored: [yolo] colour",
    ]
    assert cfg_notices(parse_cfg(write_cfg([net(32), *GOOD[1:]])), {"train.image_size": 32}) == []


# Other numbers of classes


def test_with_classes() -> None:
    sections = parse_cfg(write_cfg([*GOOD, route(-4), output(18), yolo("0,1,2", ANCHORS, 1)]))
    more = with_classes(sections, 7)
    assert cfg_classes(sections) == 1 and cfg_classes(more) == 7
    # 2 and 3 anchors of 5 + 7 values
    assert [section.options.get("filters") for section in more[1:]] == ["4", "4", "24", None, None, "36", None]
    assert [section.line for section in more] == [section.line for section in sections]
    assert sections == parse_cfg(write_cfg([*GOOD, route(-4), output(18), yolo("0,1,2", ANCHORS, 1)]))
    assert with_classes(more, 1) == sections


def test_with_classes_without_mask() -> None:
    """Without a mask all `num` anchors belong to the level."""
    text = changed(3, mask=None).replace("filters=12", "filters=18")
    assert DarknetNetwork(parse_cfg(text), 1).anchors == (((4.0, 6.0), (8.0, 12.0), (10.0, 14.0)),)
    assert with_classes(parse_cfg(text), 2)[3].options["filters"] == "21"


def test_with_classes_of_gaussian_yolo() -> None:
    """Nine values per anchor beside the classes."""
    sections = parse_cfg(GAUSSIAN.replace("filters=12", "filters=20"))
    assert with_classes(sections, 7)[3].options["filters"] == "32"  # 2 * (9 + 7)


@pytest.mark.parametrize(("mask", "used"), [("0,2", [(4, 6), (10, 14)]), (None, [(4, 6), (8, 12)])])
def test_more_anchors_than_num(mask: str | None, used: list[tuple[int, int]]) -> None:
    """cspx-p7-mish.cfg: num = 16 and masks up to 19; Darknet would read these beyond its array."""
    sections = parse_cfg(changed(3, num=2, mask=mask))
    assert DarknetNetwork(sections, 1).anchors == (tuple(used),)
    assert cfg_notices(sections, {}) == ["[yolo] in line 29 lists more anchors than num = 2; the listed ones count"]


# Not a description

NO_NET = "must begin with one [net] section"
NO_CFG = "is this a .cfg file?"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, [NO_NET]) for text in ("", "\n\n", "# nothing\n; nothing\n")),
        *((write_cfg(layers), [NO_NET]) for layers in (GOOD[1:], [GOOD[0], *GOOD], [*GOOD[1:], GOOD[0]])),
        ("The quick brown fox", ["line 1:", NO_CFG]),
        ("\n\n{'net': 3}", ["line 3:", NO_CFG]),
        ("width=3\n[net]", ["line 1:", NO_CFG]),
        ("[net]\nwidth=32\nfilters", ["line 3:", NO_CFG]),
        ("\x00\x01\x02\x7fELF\x00", ["line 1:", NO_CFG]),
        ("[net]\n" + 5000 * "x", ["line 2:", NO_CFG]),
        *((text, ["no [yolo] layer"]) for text in (write_cfg(GOOD[:-1]), "[net]\n")),
        (write_cfg([*GOOD, route(-4), output(14), yolo("0,1", ANCHORS, 2)]), ["[1, 2]"]),  # numbers of classes
    ],
)
def test_not_a_description_of_a_detector(text: str, words: list[str]) -> None:
    message = refusal(text)
    for word in words:
        assert word in message, message


# Layers and keys that cannot be

HUGE = (10**9, "1e9", 10**12, "1e400", 10**400)
NO_SOURCES = ("2", "3", "-3", "-9", "99", "0.5", "nan", "inf", "1e400", "", "x", "-1,7", ",", "1e30")
NO_ANCHORS = (
    *("", "4,6", "4,6,8,12,10", "4,6,8,12,10,14,16", "0,6,8,12,10,14", "4,-6,8,12,10,14"),
    *("nan,6,8,12,10,14", "4,6,8,12,10,inf", "4,6,8,12,10,1e400", "4,6,8,12,10,x"),
)
NO_GROUPS = ((2, 2), (3, 0), (8, 0), (0, 0), (-1, 0), (2, -1), ("nan", 0), (2, "inf"), (2, 0.5))
# Descriptions, the number of the layer that the message names (-1: [net]), words of the message
REFUSED: dict[str, list[tuple[Any, ...]]] = {
    "slips in keys that matter": [
        (changed(number, **{slip: 1}), number, repr(slip), repr(meant))
        for number, slip, meant in (
            *((0, "batch_normalise", "batch_normalize"), (0, "filtres", "filters"), (0, "actvation", "activation")),
            *((3, "scale_xy", "scale_x_y"), (3, "new_coord", "new_coords")),
        )
    ],
    "unknown layers": [
        (extra(name, filters=3), 2, f"[{name}]", "known layers: Gaussian_yolo, avgpool, convolutional")
        for name in ("connected", "region", "implicit", "local", "Yolo", "gaussian_yolo")
    ],
    "keys of net, yolo and convolutional": [
        (changed(-1, time_steps=4), -1, "time_steps = 4"),
        (changed(-1, channels=1), -1, "channels = 1"),
        (changed(3, map="9k.map"), 3, "map = 9k.map"),
        (changed(0, dontload=1), 0, "dontload = 1"),
    ],
    "unknown activations": [
        (changed(0, activation="selu"), 0, "'selu'", "leaky", "mish"),
        (with_layers(shortcut(-1, activation="norm_chan")), 2, "'norm_chan'"),
    ],
    "numbers of a convolution": [
        (changed(0, **{key: value}), 0, key if value not in HUGE else "[convolutional]")
        for key in ("filters", "size", "groups", "dilation")
        for value in (0, -1, 1.5, "nan", "inf", "-inf", "", "many", *HUGE)
    ],
    "strides": [
        *((changed(0, stride=value), 0, "stride") for value in (0, -2, 0.5, "nan", "x")),
        *((changed(0, stride_x=value), 0, "stride") for value in (0, -2, 0.5, "nan", "x")),
        (changed(0, stride_x=2, stride_y=1), 0, "stride_x and stride_y must be equal"),
    ],
    "padding": [
        *((changed(0, pad=0, padding=value), 0) for value in (-1, "nan", *HUGE)),
        *((extra("maxpool", size=2, stride=1, padding=value), 2) for value in (-1, "nan", *HUGE)),
        (extra("maxpool", size=2, stride=1, padding=4), 2, "padding"),  # windows in the padding have no largest value
    ],
    "sizes of pooling, upsampling and the input": [
        case
        for value in (0, -1, "nan", *HUGE)
        for case in (
            *((extra("maxpool", size=value, stride=1), 2), (extra("upsample", stride=value), 2)),
            *((changed(-1, height=value), -1, "[net]"), (changed(-1, width=value), -1, "[net]")),
        )
    ],
    "kernels beyond memory": [  # each number may be possible, their product is not
        (write_cfg([net(32), conv(before, 1), conv(filters, size), *GOOD[3:]]), 1, str(filters))
        for filters, before, size in ((2**20, 2**9, 1), (4096, 4096, 9), (2**18, 3, 31))
    ],
    "maps beyond memory": [(write_cfg([net(32), *[upsample(32)] * 4, *GOOD[3:]]), 1, "upsample")],
    "nothing left": [
        (changed(1, size=17, pad=0, stride=1), 1, "nothing is left"),
        (extra("maxpool", size=9, stride=2, padding=0), 2, "nothing is left"),
    ],
    "groups that do not divide": [
        (changed(1, groups=value), 1, f"groups = {value} must divide 4 channels and 4 filters") for value in (3, 8)
    ],
    "dropout": [(extra("dropout", probability=value), 2, "probability") for value in (-0.1, 1.1, "nan", "often")],
    # layer 2: itself, a later one, and before the first
    "sources of a route": [(extra("route", layers=value), 2, "[route]", "layers") for value in NO_SOURCES],
    "sources of a shortcut": [(extra("shortcut", **{"from": value}), 2, "[shortcut]", "from") for value in NO_SOURCES],
    "sources that are missing": [
        (extra("route", groups=1), 2, "has no 'layers'"),
        (extra("shortcut", groups=1), 2, "has no 'from'"),
    ],
    "maps of different sizes": [
        (with_layers(route(0, 1)), 2, "16 x 16", "8 x 8"),
        (with_layers(shortcut(0)), 2, "16 x 16", "8 x 8"),
    ],
    "groups of a route": [
        (with_layers(route(-1, groups=groups, group_id=group)), 2, "[route]", "group") for groups, group in NO_GROUPS
    ],
    "layers of AlexeyAB's program": [
        (with_layers(*layers), 1 + len(layers), *words)
        for layers, *words in (
            (scaled(activation="mish"), "no mish"),
            (scaled(scale_wh=1), "needs 1 channels of 8 x 8", "finds 4 of 1 x 1"),
            (scaled(**{"from": 9}), "names layer 9"),
            ([conv(4, 1), ("scale_channels", {"from": 1})], "needs 4 channels of 1 x 1", "finds 4 of 8 x 8"),
            ([conv(3, 1), ("sam", {"from": 1})], "needs 4 channels of 8 x 8", "finds 3 of 8 x 8"),
            ([("reorg3d", {"stride": 3})], "stride = 3 must divide 8 x 8 cells"),
            ([("reorg3d", {"stride": 2, "reverse": 1})], "reverse = 1 changes inference"),
            ([conv(6, 1), ("reorg", {"stride": 2})], "stride = 2 must divide", "square 6 channels"),
            ([("reorg", {"stride": 2, "extra": 2})], "extra = 2 changes inference"),
        )
    ],
    "shared weights": [
        (with_layers(*layers), 1 + len(layers), *words)
        for layers, *words in (
            ([conv(4, 3, share_index=2)], "share_index", "layers 0 to 1"),
            ([conv(4, 1, share_index=1)], "share_index = 1 must name a convolution"),
            ([conv(4, 3, groups=2, share_index=1)], "share_index = 1"),
            ([conv(4, 3, batch_normalize=0, share_index=-1)], "share_index = -1"),
            ([pool(2, 1), conv(4, 3, share_index=2)], "share_index = 2"),
            ([conv(4, 3, share_index="0,1")], "share_index = 0,1"),
        )
    ],
    "Gaussian_yolo": [
        (GAUSSIAN, 3, "filters = 2 * (9 + 1) = 20 before it, finds [convolutional] with 12"),
        (GAUSSIAN.replace("num=3", "num=3\nyolo_point=left_top"), 3, "yolo_point = left_top changes inference"),
    ],
    "sources behind an output": [
        (write_cfg([*GOOD, route(-1), *GOOD[3:]]), 4, "takes layer 3, which is a [yolo]"),
        (write_cfg([*GOOD, route(-3), conv(12, 1), shortcut(3), *GOOD[3:]]), 6, "takes layer 3, which is a [yolo]"),
    ],
    "layers after an output": [  # Darknet would convolve the activated predictions
        (write_cfg([*GOOD, (name, options)]), 4, f"[{name}]", "[yolo] ")
        for name, options in (conv(4, 1), pool(2, 2), upsample(), GOOD[-1], shortcut(-3), ("dropout", {}))
    ],
    "masks": [
        (changed(3, mask=mask), 3, "mask")
        for mask in ("3", "0,3", "-1,0", "0.5,1", "nan,0", "inf,0", "1e400,0", "", "a,b", "0,1,2,3", "1e30,0")
    ],
    "anchors": [
        *((changed(3, anchors=anchors), 3, "anchor") for anchors in NO_ANCHORS),
        (changed(3, anchors=None), 3, "has no 'anchors'"),
    ],
    "number of anchors": [
        (changed(3, num=num, mask=mask), 3, "num") for num in (0, -3, 4, "nan", "x", *HUGE) for mask in ("0,2", None)
    ],
    "number of classes": [(changed(3, classes=value), 3) for value in (0, -1, 2, 1.5, "nan", "x", *HUGE)],
    "filters before an output": [
        (write_cfg(GOOD).replace("filters=12", "filters=13"), 3, "filters = 2 * (5 + 1) = 12", "13"),
        (write_cfg([*GOOD[:3], conv(12, 1), pool(2, 2), GOOD[-1]]), 4, "finds [maxpool] with 12"),
        (write_cfg([net(32), GOOD[-1]]), 0, "finds [net] with 3"),
    ],
    "convolution before an output": [
        (changed(2, **{key: value}), 3, "no batch_normalize and activation=linear")
        for key, value in (
            *(("activation", "leaky"), ("activation", "logistic"), ("activation", None)),
            *(("batch_normalize", 1), ("cbn", 1)),
        )
    ],
    "scale_x_y": [(changed(3, scale_x_y=value), 3, "scale_x_y") for value in (0, -1.2, "nan", "inf", "x")],
    "cells that do not divide the input": [
        (changed(-1, width=30, height=30), 3, "8 x 8 cells", "30 x 30"),
        (changed(-1, height=30), 3, "32 x 30"),
    ],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_place_and_the_reason(name: str) -> None:
    for text, number, *words in REFUSED[name]:
        assert_refused(text, number, *words)


@pytest.mark.parametrize(
    ("layer", "key", "value", "neutral"),
    [
        *[
            (conv(4, 3), key, 1, 0)
            for key in (
                *("antialiasing", "binary", "xnor", "bin_output", "flipped", "coordconv", "reverse"),
                *("sway", "rotate", "stretch", "stretch_sway", "dot"),
            )
        ],
        *[(pool(2, 1), key, 1, 0) for key in ("maxpool_depth", "antialiasing", "maxpool_zero_nonmax")],
        (shortcut(-1), "weights_type", "per_feature", "none"),
        (shortcut(-1), "weights_normalization", "softmax", "none"),
        (shortcut(-1), "alpha", 0.5, 1),  # Redmon's program: alpha * one + beta * other
        (shortcut(-1), "beta", 2, "1.0"),
    ],
)
def test_keys_that_change_inference(layer: Section, key: str, value: object, neutral: object) -> None:
    name, options = layer
    text = with_layers((name, {**options, key: value}))
    assert_refused(text, 2, f"[{name}]", f"{key} = {value}", "changes inference")
    DarknetNetwork(parse_cfg(with_layers((name, {**options, key: neutral}))), 1)


def test_equal_strides_of_both_axes_and_the_nms_of_training_are_taken() -> None:
    assert DarknetNetwork(parse_cfg(changed(0, stride=1, stride_x=2, stride_y=2)), 1).strides == (4,)
    for kind in ("greedynms", "diounms"):  # NMS is the evaluation's
        DarknetNetwork(parse_cfg(changed(3, nms_kind=kind)), 1)


def test_new_coords_take_the_sigmoid_from_either_layer() -> None:
    """The convolution's in newer descriptions (yolov4-csp of 2021), the [yolo] layer's own in older ones."""
    linear = changed(3, new_coords=1)
    for text in (linear, linear.replace("activation=linear", "activation=logistic")):
        network = DarknetNetwork(parse_cfg(text), 1)
        assert network.new_coords and not any(isinstance(module, nn.Sigmoid) for module in network.modules())
    assert_refused(linear.replace("activation=linear", "activation=mish"), 3, "logistic or linear", "activation=mish")


def test_new_coords_feed_nothing_else() -> None:
    """The sigmoid is taken out of that convolution, which another layer would miss."""
    text = changed(3, new_coords=1).replace("activation=linear", "activation=logistic")
    text += "\n" + write_cfg([route(2), output(12), yolo("0,2", ANCHORS, 1)])
    assert "layer 2" in refusal(text)
