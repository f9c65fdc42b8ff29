"""Reading of Darknet cfg files, and errors of one line that name the place."""

import time
from pathlib import Path

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
    """CRLF, CR, and no newline at the end of the file."""
    text = write_cfg(GOOD)
    assert parse_cfg(text.replace("\n", ending)) == parse_cfg(text)
    assert parse_cfg(text.replace("\n", ending).rstrip()) == parse_cfg(text)


def test_byte_order_mark_of_windows_editors() -> None:
    assert parse_cfg("\ufeff" + write_cfg(GOOD)) == parse_cfg(write_cfg(GOOD))


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
        "[net] batch",
        "[net] angle",
        "[convolutional] stopbackward",
        "[convolutional] truth",
        "[dropout] dropblock",
        "[yolo] jitter",
        "[yolo] ignore_thresh",
        "[yolo] nms_kind",
    ]
    assert unknown == ["[yolo] colour"]
    assert unused_keys(parse_cfg(write_cfg(GOOD))) == ([], [])


@pytest.mark.parametrize(
    ("layer", "slip", "meant"),
    [
        (0, {"batch_normalise": 1}, "batch_normalize"),
        (0, {"filtres": 8}, "filters"),
        (0, {"actvation": "mish"}, "activation"),
        (3, {"scale_xy": 1.1}, "scale_x_y"),
        (3, {"new_coord": 1}, "new_coords"),
    ],
)
def test_a_slip_in_a_key_that_matters_is_refused(layer: int, slip: dict, meant: str) -> None:
    assert_refused(changed(layer, **slip), layer, repr(next(iter(slip))), repr(meant))


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


# Not a description


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n; nothing\n"])
def test_empty(text: str) -> None:
    assert "must begin with one [net] section" in refusal(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("The quick brown fox", 1),
        ("\n\n{'net': 3}", 3),
        ("width=3\n[net]", 1),
        ("[net]\nwidth=32\nfilters", 3),
        ("\x00\x01\x02\x7fELF\x00", 1),
        ("[net]\n" + 5000 * "x", 2),
    ],
)
def test_text_that_is_no_description(text: str, line: int) -> None:
    message = refusal(text)
    assert f"line {line}:" in message and "is this a .cfg file?" in message


def test_net_section_is_missing_double_or_late() -> None:
    for sections in (GOOD[1:], [GOOD[0], *GOOD], [*GOOD[1:], GOOD[0]]):
        assert "must begin with one [net] section" in refusal(write_cfg(sections))


def test_not_a_detector() -> None:
    assert "no [yolo] layer" in refusal(write_cfg(GOOD[:-1]))
    assert "no [yolo] layer" in refusal("[net]\n")


def test_different_numbers_of_classes() -> None:
    text = write_cfg([*GOOD, route(-4), output(14), yolo("0,1", ANCHORS, 2)])
    assert "[1, 2]" in refusal(text)


@pytest.mark.parametrize("name", ["connected", "region", "implicit", "local", "Yolo", "gaussian_yolo"])
def test_unknown_layer(name: str) -> None:
    text = with_layers((name, {"filters": 3}))
    assert_refused(text, 2, f"[{name}]", "known layers: Gaussian_yolo, avgpool, convolutional")


# Keys that change inference


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
        (pool(2, 1), "maxpool_depth", 1, 0),
        (pool(2, 1), "antialiasing", 1, 0),
        (pool(2, 1), "maxpool_zero_nonmax", 1, 0),
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
    if neutral is not None:
        sections = parse_cfg(with_layers((name, {**options, key: neutral})))
        DarknetNetwork(sections, 1)


def test_refused_keys_of_net_and_yolo() -> None:
    assert_refused(write_cfg([("net", {"width": 32, "height": 32, "time_steps": 4}), *GOOD[1:]]), -1, "time_steps = 4")
    assert_refused(changed(3, map="9k.map"), 3, "map = 9k.map")
    assert_refused(changed(0, dontload=1), 0, "dontload = 1")
    for kind in ("greedynms", "diounms"):  # NMS is the evaluation's
        DarknetNetwork(parse_cfg(changed(3, nms_kind=kind)), 1)


def test_unknown_activation() -> None:
    assert_refused(changed(0, activation="selu"), 0, "'selu'", "leaky", "mish")
    assert_refused(with_layers(shortcut(-1, activation="norm_chan")), 2, "'norm_chan'")


# Impossible numbers

HUGE = (10**9, "1e9", 10**12, "1e400", 10**400)


@pytest.mark.parametrize("value", [0, -1, 1.5, "nan", "inf", "-inf", "", "many", *HUGE])
@pytest.mark.parametrize("key", ["filters", "size", "groups", "dilation"])
def test_numbers_of_a_convolution(key: str, value: object) -> None:
    assert_refused(changed(0, **{key: value}), 0, key if value not in HUGE else "[convolutional]")


@pytest.mark.parametrize("key", ["stride", "stride_x"])
@pytest.mark.parametrize("value", [0, -2, 0.5, "nan", "x"])
def test_strides(key: str, value: object) -> None:
    assert_refused(changed(0, **{key: value}), 0, "stride")


def test_unequal_strides() -> None:
    assert_refused(changed(0, stride_x=2, stride_y=1), 0, "stride_x and stride_y must be equal")
    network = DarknetNetwork(parse_cfg(changed(0, stride=1, stride_x=2, stride_y=2)), 1)
    assert network.strides == (4,)


@pytest.mark.parametrize("value", [-1, "nan", *HUGE])
def test_padding(value: object) -> None:
    assert_refused(changed(0, pad=0, padding=value), 0)
    assert_refused(with_layers(("maxpool", {"size": 2, "stride": 1, "padding": value})), 2)


@pytest.mark.parametrize("value", [0, -1, "nan", *HUGE])
def test_sizes_of_pooling_and_upsampling(value: object) -> None:
    assert_refused(with_layers(("maxpool", {"size": value, "stride": 1})), 2)
    assert_refused(with_layers(("upsample", {"stride": value})), 2)
    assert_refused(write_cfg([("net", {"width": 32, "height": value}), *GOOD[1:]]), -1, "[net]")
    assert_refused(write_cfg([("net", {"width": value, "height": 32}), *GOOD[1:]]), -1, "[net]")


@pytest.mark.parametrize("many", [(2**20, 2**9, 1), (4096, 4096, 9), (2**18, 3, 31)])
def test_kernels_beyond_memory(many: tuple[int, int, int]) -> None:
    """Each number may be possible, their product is not."""
    filters, before, size = many
    text = write_cfg([net(32), conv(before, 1), conv(filters, size), output(12), yolo("0,2", ANCHORS, 1)])
    assert_refused(text, 1, str(filters))


def test_maps_beyond_memory() -> None:
    text = write_cfg([net(32), *[upsample(32)] * 4, output(12), yolo("0,2", ANCHORS, 1)])
    assert_refused(text, 1, "upsample")


def test_pooling_windows_outside_the_map() -> None:
    """A window that lies in the padding alone has no largest value."""
    assert_refused(with_layers(("maxpool", {"size": 2, "stride": 1, "padding": 4})), 2, "padding")


def test_nothing_left() -> None:
    assert_refused(changed(1, size=17, pad=0, stride=1), 1, "nothing is left")
    assert_refused(with_layers(("maxpool", {"size": 9, "stride": 2, "padding": 0})), 2, "nothing is left")


@pytest.mark.parametrize(("key", "value"), [("groups", 3), ("groups", 8)])
def test_groups_must_divide(key: str, value: int) -> None:
    assert_refused(changed(1, **{key: value}), 1, f"groups = {value} must divide 4 channels and 4 filters")


@pytest.mark.parametrize("value", [-0.1, 1.1, "nan", "often"])
def test_dropout_probability(value: object) -> None:
    assert_refused(with_layers(("dropout", {"probability": value})), 2, "probability")


def test_only_rgb() -> None:
    assert_refused(write_cfg([("net", {"channels": 1}), *GOOD[1:]]), -1, "channels = 1")


# Layers of AlexeyAB's program


def scaled(**more: object) -> list[Section]:
    """A factor per channel for layer 1, 8 x 8 with 4 channels."""
    return [("avgpool", {}), conv(4, 1), ("scale_channels", {"from": 1, **more})]


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        (scaled(activation="mish"), ["no mish"]),
        (scaled(scale_wh=1), ["needs 1 channels of 8 x 8", "finds 4 of 1 x 1"]),
        (scaled(**{"from": 9}), ["names layer 9"]),
        ([conv(4, 1), ("scale_channels", {"from": 1})], ["needs 4 channels of 1 x 1", "finds 4 of 8 x 8"]),
        ([conv(3, 1), ("sam", {"from": 1})], ["needs 4 channels of 8 x 8", "finds 3 of 8 x 8"]),
        ([("reorg3d", {"stride": 3})], ["stride = 3 must divide 8 x 8 cells"]),
        ([("reorg3d", {"stride": 2, "reverse": 1})], ["reverse = 1 changes inference"]),
        ([conv(6, 1), ("reorg", {"stride": 2})], ["stride = 2 must divide", "square 6 channels"]),
        ([("reorg", {"stride": 2, "extra": 2})], ["extra = 2 changes inference"]),
        ([conv(4, 3, share_index=2)], ["share_index", "layers 0 to 1"]),
        ([conv(4, 1, share_index=1)], ["share_index = 1 must name a convolution"]),
        ([conv(4, 3, groups=2, share_index=1)], ["share_index = 1"]),
        ([conv(4, 3, batch_normalize=0, share_index=-1)], ["share_index = -1"]),
        ([pool(2, 1), conv(4, 3, share_index=2)], ["share_index = 2"]),
        ([conv(4, 3, share_index="0,1")], ["share_index = 0,1"]),
    ],
)
def test_new_layers_that_do_not_fit(layers: list[Section], parts: list[str]) -> None:
    assert_refused(with_layers(*layers), 1 + len(layers), *parts)


def test_gaussian_yolo_needs_nine_values_per_anchor() -> None:
    text = changed(3).replace("[yolo]", "[Gaussian_yolo]")
    assert_refused(text, 3, "filters = 2 * (9 + 1) = 20 before it, finds [convolutional] with 12")
    sections = parse_cfg(text.replace("filters=12", "filters=20"))
    assert with_classes(sections, 7)[3].options["filters"] == "32"  # 2 * (9 + 7)
    assert_refused(text.replace("num=3", "num=3\nyolo_point=left_top"), 3, "yolo_point = left_top changes inference")


# References to other layers


@pytest.mark.parametrize(
    "value", ["2", "3", "-3", "-9", "99", "0.5", "nan", "inf", "1e400", "", "x", "-1,7", ",", "1e30"]
)
@pytest.mark.parametrize(("name", "key"), [("route", "layers"), ("shortcut", "from")])
def test_sources_that_do_not_exist(name: str, key: str, value: str) -> None:
    """Layer 2: itself, a later one, and before the first."""
    assert_refused(with_layers((name, {key: value})), 2, f"[{name}]", key)


@pytest.mark.parametrize(("name", "key"), [("route", "layers"), ("shortcut", "from")])
def test_sources_are_missing(name: str, key: str) -> None:
    assert_refused(with_layers((name, {"groups": 1})), 2, f"has no '{key}'")


def test_maps_of_different_sizes() -> None:
    assert_refused(with_layers(route(0, 1)), 2, "16 x 16", "8 x 8")
    assert_refused(with_layers(shortcut(0)), 2, "16 x 16", "8 x 8")


@pytest.mark.parametrize(
    ("groups", "group"), [(2, 2), (3, 0), (8, 0), (0, 0), (-1, 0), (2, -1), ("nan", 0), (2, "inf"), (2, 0.5)]
)
def test_groups_of_a_route(groups: object, group: object) -> None:
    assert_refused(with_layers(route(-1, groups=groups, group_id=group)), 2, "[route]", "group")


def test_route_to_an_output() -> None:
    text = write_cfg([*GOOD, route(-1), output(12), yolo("0,1", ANCHORS, 1)])
    assert_refused(text, 4, "takes layer 3, which is a [yolo] layer")
    text = write_cfg([*GOOD, route(-3), conv(12, 1), shortcut(3), output(12), yolo("0,1", ANCHORS, 1)])
    assert_refused(text, 6, "takes layer 3, which is a [yolo] layer")


def test_layers_after_an_output() -> None:
    """Darknet would convolve the activated predictions."""
    for layer in (conv(4, 1), pool(2, 2), upsample(), yolo("0,2", ANCHORS, 1), shortcut(-3), ("dropout", {})):
        assert_refused(write_cfg([*GOOD, layer]), 4, f"[{layer[0]}]", "[yolo] ")


# Outputs


@pytest.mark.parametrize(
    "mask", ["3", "0,3", "-1,0", "0.5,1", "nan,0", "inf,0", "1e400,0", "", "a,b", "0,1,2,3", "1e30,0"]
)
def test_masks(mask: str) -> None:
    assert_refused(changed(3, mask=mask), 3, "mask")


@pytest.mark.parametrize(
    "anchors",
    [
        *("", "4,6", "4,6,8,12,10", "4,6,8,12,10,14,16", "0,6,8,12,10,14", "4,-6,8,12,10,14"),
        *("nan,6,8,12,10,14", "4,6,8,12,10,inf", "4,6,8,12,10,1e400", "4,6,8,12,10,x"),
    ],
)
def test_anchors(anchors: str) -> None:
    assert_refused(changed(3, anchors=anchors), 3, "anchor")


@pytest.mark.parametrize(("mask", "used"), [("0,2", [(4, 6), (10, 14)]), (None, [(4, 6), (8, 12)])])
def test_more_anchors_than_num(mask: str | None, used: list[tuple[int, int]]) -> None:
    """cspx-p7-mish.cfg: num = 16 and masks up to 19; Darknet would read these beyond its array."""
    sections = parse_cfg(changed(3, num=2, mask=mask))
    assert DarknetNetwork(sections, 1).anchors == (tuple(used),)
    assert cfg_notices(sections, {}) == ["[yolo] in line 29 lists more anchors than num = 2; the listed ones count"]


def test_anchors_are_missing() -> None:
    assert_refused(changed(3, anchors=None), 3, "has no 'anchors'")


@pytest.mark.parametrize("num", [0, -3, 4, "nan", "x", *HUGE])
@pytest.mark.parametrize("mask", ["0,2", None])
def test_number_of_anchors(num: object, mask: str | None) -> None:
    assert_refused(changed(3, num=num, mask=mask), 3, "num")


@pytest.mark.parametrize("classes", [0, -1, 2, 1.5, "nan", "x", *HUGE])
def test_number_of_classes(classes: object) -> None:
    assert_refused(changed(3, classes=classes), 3)


def test_wrong_filters_before_an_output() -> None:
    text = write_cfg(GOOD).replace("filters=12", "filters=13")
    assert_refused(text, 3, "filters = 2 * (5 + 1) = 12", "13")
    text = write_cfg([*GOOD[:3], conv(12, 1), pool(2, 2), GOOD[-1]])
    assert_refused(text, 4, "finds [maxpool] with 12")
    assert_refused(write_cfg([net(32), yolo("0,2", ANCHORS, 1)]), 0, "finds [net] with 3")


@pytest.mark.parametrize(
    "options",
    [{"activation": "leaky"}, {"activation": "logistic"}, {"activation": None}, {"batch_normalize": 1}, {"cbn": 1}],
)
def test_wrong_convolution_before_an_output(options: dict[str, object]) -> None:
    assert_refused(changed(2, **options), 3, "no batch_normalize and activation=linear")


@pytest.mark.parametrize("value", [0, -1.2, "nan", "inf", "x"])
def test_scale_x_y(value: object) -> None:
    assert_refused(changed(3, scale_x_y=value), 3, "scale_x_y")


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


def test_cells_must_divide_the_input() -> None:
    assert_refused(write_cfg([net(30), *GOOD[1:]]), 3, "8 x 8 cells", "30 x 30")
    assert_refused(write_cfg([net(32, 30), *GOOD[1:]]), 3, "32 x 30")
