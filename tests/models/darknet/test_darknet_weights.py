"""Darknet weight files byte by byte: which value goes where, what is refused, and the same bytes back."""

import copy
import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tests.support.darknet_reference as reference
from detection.config.loading import load_settings
from detection.errors import CheckpointError, OutputError
from detection.models import build_detector
from detection.models.darknet.cfg import parse_cfg
from detection.models.darknet.hints import FETCHED
from detection.models.darknet.network import DarknetNetwork
from detection.models.darknet.weights import (
    Header,
    Loaded,
    as_darknet,
    convolution_tensors,
    darknet_bytes,
    identify,
    load_darknet_weights,
    write_darknet_weights,
)
from tests.support.darknet_descriptions import Section, conv, net, output, route, upsample, write_cfg, yolo
from tests.support.paths import ARGS

# One normalised convolution of 2 filters, 3 x 3, on RGB: 4 * 2 + 54 values. One output of 1 anchor and 1 class:
# 6 filters on 2 channels: 6 + 12 values. With the header 20 + 4 * 80 = 340 bytes.
HAND = write_cfg([net(8), conv(2, 3), output(6), yolo("0", "4,6", 1)])
HAND_BYTES = 340
# Two levels, 2 classes. Values of the six convolutions: 4 * 4 + 4 * 3 * 9 = 124; 4 * 8 + 8 * 4 * 9 = 320; 14 + 14 * 8 =
# 126; 4 * 4 + 4 * 8 = 48, twice (the second on the 4 + 4 channels of a route); 7 + 7 * 4 = 35.
ENDS = (124, 444, 570, 618, 666, 701)
TWO_LEVELS = write_cfg(
    [
        net(16),
        *(conv(4, 3, 2), conv(8, 3, 2), output(14), yolo("1,2", "4,6, 8,12, 10,14", 2)),
        *(route(-3), conv(4, 1), upsample(), route(-1, 0), conv(4, 1), output(7), yolo("0", "4,6, 8,12, 10,14", 2)),
    ]
)


def build(text: str, num_classes: int, seed: int = 0) -> DarknetNetwork:
    torch.manual_seed(seed)
    return DarknetNetwork(parse_cfg(text), num_classes).eval()


def load_bytes(network: nn.Module, content: bytes, directory: Path, name: str = "some.weights") -> Loaded:
    path = directory / name
    path.write_bytes(content)
    return load_darknet_weights(network, path)


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(network.state_dict())


def assert_unchanged(network: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def refused(network: nn.Module, content: bytes, directory: Path) -> str:
    """The message of the error, which leaves the network unchanged."""
    before = state(network)
    with pytest.raises(CheckpointError) as caught:
        load_bytes(network, content, directory)
    assert_unchanged(network, before)
    assert caught.value.exit_code == 7 and "\n" not in str(caught.value)
    return str(caught.value)


# Where each value goes


def hand_made(version: tuple[int, int, int] = (0, 2, 5), seen: int = 1234, wide: bool = True) -> bytes:
    """The values 1, 2, 3, ... 80."""
    header = struct.pack("<3i", *version) + struct.pack("<Q" if wide else "<I", seen)
    return header + struct.pack("<80f", *range(1, 81))


def assert_hand_made(network: DarknetNetwork) -> None:
    convolution, norm, _ = network.backbone[0]
    found = [value.tolist() for value in (norm.bias, norm.weight, norm.running_mean, norm.running_var)]
    assert found == [[1, 2], [3, 4], [5, 6], [7, 8]]
    for place in itertools.product(range(2), range(3), range(3), range(3)):  # filter, channel, row, column
        position = ((place[0] * 3 + place[1]) * 3 + place[2]) * 3 + place[3]
        assert convolution.weight[place] == 9 + position
    (last,) = network.output_convolutions()
    assert last.bias.tolist() == [63, 64, 65, 66, 67, 68]
    assert last.weight.flatten().tolist() == list(range(69, 81))
    assert last.weight[1, 0] == 71  # filter by filter


def test_values_by_hand(tmp_path: Path) -> None:
    network = build(HAND, 1)
    assert len(hand_made()) == HAND_BYTES
    loaded = load_bytes(network, hand_made(), tmp_path, "hand.weights")
    assert_hand_made(network)
    assert (loaded.header, loaded.convolutions, loaded.num_classes) == (Header(0, 2, 5, 1234), 2, None)
    assert loaded.lines == [
        "hand.weights: Darknet weights of the whole network, version 0.2.5, 1,234 images seen",
        "loaded all 2 convolutions",
    ]


@pytest.mark.parametrize(
    ("version", "wide"),
    [
        *(((0, 1, 0), False), ((0, 1, 9), False), ((0, 0, 0), False)),
        *(((0, 2, 0), True), ((1, 0, 0), True), ((0, 20, 1), True)),
        ((1001, 0, 0), False),  # a flag above 1000, before which the original program read an int
    ],
)
def test_width_of_seen_follows_the_version(version: tuple[int, int, int], wide: bool, tmp_path: Path) -> None:
    network = build(HAND, 1)
    for seen in (0, 32_013_312, 2**31, 2**32 - 1, *((2**32, 2**63 + 5, 2**64 - 1) if wide else ())):
        content = hand_made(version, seen, wide)
        loaded = load_bytes(network, content, tmp_path)
        assert loaded.header == Header(*version, seen) and f"{seen:,} images" in loaded.lines[0]
        assert_hand_made(network)
        assert darknet_bytes(network, loaded.header) == content


def test_seen_wraps_where_it_does_not_fit() -> None:
    assert Header(0, 1, 0, 2**32 + 3).pack() == struct.pack("<3iI", 0, 1, 0, 3)
    assert Header(0, 2, 0, 2**64 + 3).pack() == struct.pack("<3iQ", 0, 2, 0, 3)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0", bytes(12), bytes(15), struct.pack("<3iI", 0, 2, 5, 0), struct.pack("<3iQ", -1, 2, 5, 0)),
        *(struct.pack("<3iQ", 0, 2, -5, 0), b"<!DOCTYPE html><html>Not Found", b"PK\x03\x04" + bytes(40)),
    ],
)
def test_not_a_weights_file(content: bytes, tmp_path: Path) -> None:
    """Empty, too short for its header, negative versions, the page that a dead link returns, a zip file."""
    message = refused(build(HAND, 1), content, tmp_path)
    assert "not a Darknet weights file" in message and f"{len(content)} bytes" in message


# Back again


def test_write_equals_read(tmp_path: Path) -> None:
    content = reference.random_weights(TWO_LEVELS, 5, (0, 2, 5), 98_765_432_109)
    network = build(TWO_LEVELS, 2)
    loaded = load_bytes(network, content, tmp_path)
    write_darknet_weights(network, tmp_path / "again.weights", loaded.header)
    assert (tmp_path / "again.weights").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["again.weights", "some.weights"]
    assert darknet_bytes(network.to(memory_format=torch.channels_last), loaded.header) == content


def test_every_bit_pattern_survives(tmp_path: Path) -> None:
    """Signalling and quiet NaN with payloads, infinities, denormals, minus zero, everywhere but in variances."""
    patterns = np.array(
        [0x7FA00001, 0xFFC12345, 0x7F800001, 0x7F800000, 0xFF800000, 0x00000001, 0x807FFFFF, 0x80000000], "<u4"
    )
    content = bytearray(hand_made())
    values = np.frombuffer(content, "<u4", offset=20)
    for position in (*range(6), *range(8, 80)):  # 6 and 7 are the variances
        values[position] = patterns[position % len(patterns)]
    network = build(HAND, 1)
    loaded = load_bytes(network, bytes(content), tmp_path)
    assert darknet_bytes(network, loaded.header) == bytes(content)


@pytest.mark.parametrize(
    ("name", "seen"),  # as the README beside the files states
    [
        ("yoloface-50k", 504_704),
        ("yolo-fastest-1.1", 14_231_680),
        ("yolo-fastest-1.1-xl", 16_000_000),
        ("MobileNetV2-YOLOv3-Nano-coco", 14_547_712),
    ],
)
def test_real_files_bit_for_bit(shared_weights, name: str, seen: int) -> None:
    path = shared_weights(f"{name}.weights")
    network = build(path.with_suffix(".cfg").read_text(), 1 if name == "yoloface-50k" else 80)
    loaded = load_darknet_weights(network, path)
    assert darknet_bytes(network, loaded.header) == path.read_bytes()
    assert loaded.header == Header(0, 2, 5, seen)


def test_part_of_a_network_is_written_as_backbone(tmp_path: Path) -> None:
    network = build(TWO_LEVELS, 2)
    write_darknet_weights(network, tmp_path / "backbone.conv.2", Header(), count=2)
    assert (tmp_path / "backbone.conv.2").stat().st_size == 20 + 4 * (124 + 320)
    other = build(TWO_LEVELS, 2, seed=1)
    loaded = load_darknet_weights(other, tmp_path / "backbone.conv.2")
    assert loaded.convolutions == 2
    assert_equal_up_to(other, network, 2)


def assert_equal_up_to(network: DarknetNetwork, other: DarknetNetwork, count: int) -> None:
    for one, two in zip(network.darknet_convolutions()[:count], other.darknet_convolutions()[:count], strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[name]), name


# Sizes that do not fit


@pytest.mark.parametrize("change", [*range(-12, 0), *range(1, 12), -100, -319, 1000, 4096, 100_003])
def test_short_and_long_files(change: int, tmp_path: Path) -> None:
    """One more class would be 3 more values, so nothing here is another number of classes; -12 bytes would be none."""
    content = (hand_made() + bytes(100_003))[: HAND_BYTES + change]
    message = refused(build(HAND, 1), content, tmp_path)
    assert f"has {HAND_BYTES + change} bytes, this network needs {HAND_BYTES} ({change:+d})" in message


def test_every_shorter_file(tmp_path: Path) -> None:
    """Only the end of the first convolution, 20 + 4 * 62 bytes, is accepted."""
    network = build(HAND, 1)
    accepted = []
    for size in range(HAND_BYTES):
        try:
            accepted.append((size, load_bytes(network, hand_made()[:size], tmp_path).convolutions))
        except CheckpointError as error:
            assert f"{size} bytes" in str(error)
    assert accepted == [(268, 1)]


def test_old_header_counts_16_bytes(tmp_path: Path) -> None:
    content = hand_made((0, 1, 0), 5, False)
    assert len(content) == 336
    assert "has 335 bytes, this network needs 336 (-1)" in refused(build(HAND, 1), content[:-1], tmp_path)
    assert "has 340 bytes, this network needs 336 (+4)" in refused(build(HAND, 1), content + bytes(4), tmp_path)


@pytest.mark.parametrize("count", range(1, 6))
def test_files_that_end_after_a_convolution(count: int, tmp_path: Path) -> None:
    """Backbone weights: the first convolutions are those of the file, the others keep their values; both are logged."""
    content = reference.random_weights(TWO_LEVELS, 3)
    whole = build(TWO_LEVELS, 2)
    load_bytes(whole, content, tmp_path)
    network = build(TWO_LEVELS, 2, seed=4)
    before = build(TWO_LEVELS, 2, seed=4)
    end = 20 + 4 * ENDS[count - 1]
    loaded = load_bytes(network, content[:end], tmp_path, f"net.conv.{count}")
    assert loaded.convolutions == count and loaded.num_classes is None
    assert_equal_up_to(network, whole, count)
    rest, unchanged = network.darknet_convolutions()[count:], before.darknet_convolutions()[count:]
    assert len(rest) == 6 - count
    for one, two in zip(rest, unchanged, strict=True):
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert loaded.lines == [
        f"net.conv.{count}: Darknet backbone weights, version 0.2.5, 0 images seen",
        f"loaded the first {count} of 6 convolutions; the rest starts from random weights",
    ]
    # and one byte to either side it is nothing
    assert f"{end}" in refused(network, content[: end + 1], tmp_path)
    refused(network, content[: end - 1], tmp_path)


# Other numbers of classes


@pytest.mark.parametrize(("own", "of_file"), [(2, 1), (1, 2), (2, 80), (80, 2), (3, 4)])
def test_other_number_of_classes(own: int, of_file: int, tmp_path: Path) -> None:
    """Everything but the outputs is the file's; the outputs keep their own random values."""
    network, before = build(TWO_LEVELS, own, seed=1), build(TWO_LEVELS, own, seed=1)
    source = build(TWO_LEVELS, of_file, seed=2)
    network.described_classes = of_file  # as if the description were that of the file
    loaded = load_bytes(network, darknet_bytes(source, Header(seen=640)), tmp_path, "other.weights")
    assert (loaded.convolutions, loaded.num_classes) == (6, of_file)
    outputs = {id(part) for part in network.output_convolutions()}
    kinds = []
    for part, old, new in zip(*(each.darknet_convolutions() for each in (network, before, source)), strict=True):
        is_output = id(part[0]) in outputs
        expected = old if is_output else new
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in part.state_dict().items())
        kinds.append(is_output)
    assert kinds == [False, False, True, False, False, True]
    assert loaded.lines == [
        "other.weights: Darknet weights of the whole network, version 0.2.5, 640 images seen",
        f"loaded 4 of 6 convolutions; the 2 output convolutions start anew: the file has {of_file} classes by "
        f"its size, this network {own}",
    ]


def test_a_description_tells_the_classes_of_its_file(tmp_path: Path) -> None:
    """A file cut by a whole number of classes is no file for fewer classes."""
    network = build(TWO_LEVELS, 5)
    for of_file in (1, 3, 80):
        assert of_file != network.described_classes
        message = refused(network, darknet_bytes(build(TWO_LEVELS, of_file), Header()), tmp_path)
        assert "bytes" in message


# Another network of the same size


def layers_of(*normalised: int) -> str:
    layers: list[Section] = [conv(4, 1, 1, "linear", batch_normalize=number) for number in normalised]
    return write_cfg([net(8), *layers, output(6), yolo("0", "4,6", 1)])


def test_another_network_of_equal_size(tmp_path: Path) -> None:
    """Same number of values in another order: what would be a variance is a kernel's or a bias's value."""
    content = reference.random_weights(layers_of(1, 1, 0), 0)
    assert len(content) == len(reference.random_weights(layers_of(0, 1, 1), 0))
    load_bytes(build(layers_of(1, 1, 0), 1), content, tmp_path)
    message = refused(build(layers_of(0, 1, 1), 1), content, tmp_path)
    assert "does not belong to this network: convolution" in message and "negative variance" in message


@pytest.mark.parametrize("value", [-1e-5, -1.0, float("nan"), float("-inf")])
def test_impossible_variances(value: float, tmp_path: Path) -> None:
    content = bytearray(hand_made())
    content[20 + 4 * 7 : 20 + 4 * 8] = struct.pack("<f", value)
    assert "convolution 0 would get 1 negative variances of 2" in refused(build(HAND, 1), bytes(content), tmp_path)
    content[20 + 4 * 6 : 20 + 4 * 8] = struct.pack("<2f", 0.0, -0.0)  # of dead filters
    load_bytes(build(HAND, 1), bytes(content), tmp_path)


# Of 20 filters a tenth may be wrong; any number may be a rounding error below 0, as the -7e-44 of a published file.
@pytest.mark.parametrize(
    ("wrong", "accepted"),
    [
        ([-7e-44], True),
        ([-7e-44] * 20, True),
        ([-1e-7] * 12, True),
        ([-0.2, float("nan")], True),
        ([-0.2, -7e-44, float("nan"), -1e-7], True),
        ([-0.2] * 3, False),
        ([float("nan")] * 3, False),
    ],
)
def test_the_share_of_wrong_variances_decides(wrong: list[float], accepted: bool, tmp_path: Path) -> None:
    text = write_cfg([net(8), conv(20, 1), output(6), yolo("0", "4,6", 1)])
    content = bytearray(reference.random_weights(text, 0))
    start = 20 + 4 * 60  # behind beta, gamma and mean
    content[start : start + 4 * len(wrong)] = struct.pack(f"<{len(wrong)}f", *wrong)
    network = build(text, 1)
    if not accepted:
        assert "does not belong to this network" in refused(network, bytes(content), tmp_path)
        return
    loaded = load_bytes(network, bytes(content), tmp_path)
    rest = struct.unpack_from(f"<{20 - len(wrong)}f", content, start + 4 * len(wrong))
    assert network.backbone[0][1].running_var.tolist() == [0.0] * len(wrong) + list(rest)
    assert loaded.lines[2].startswith(f"{len(wrong)} of its variances ")
    with torch.no_grad():
        assert network(torch.rand(1, 3, 8, 8))[0].isfinite().all()


# Paths


def test_unreadable_paths(tmp_path: Path) -> None:
    network = build(HAND, 1)
    (tmp_path / "file").touch()
    cases = {"gone.weights": "No such file", ".": "Is a directory", "file/x.weights": "Not a directory"}
    cases["x" * 300] = "File name too long"
    for name, reason in cases.items():
        with pytest.raises(CheckpointError) as caught:
            load_darknet_weights(network, tmp_path / name)
        assert reason in str(caught.value) and "download" not in str(caught.value)
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "file").chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        load_darknet_weights(network, tmp_path / "file")


@pytest.mark.parametrize("name", FETCHED)
def test_well_known_files_name_the_command_that_fetches_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"No such file.*download_darknet_weights.sh {name}"):
        load_darknet_weights(build(HAND, 1), tmp_path / "weights" / name)


def test_networks_that_darknet_does_not_have(tmp_path: Path) -> None:
    for model in (nn.Conv2d(3, 3, 1), nn.Sequential()):
        with pytest.raises(CheckpointError, match=r"model\.backbone"):
            as_darknet(model)
        with pytest.raises(CheckpointError):
            load_darknet_weights(model, tmp_path / "gone")


@pytest.mark.parametrize("room", [0, 10, HAND_BYTES - 1])
def test_full_disk_leaves_the_old_file(room: int, full_disk, tmp_path: Path) -> None:
    path = tmp_path / "kept.weights"
    network = build(HAND, 1)
    write_darknet_weights(network, path, Header(seen=1))
    before = path.read_bytes()
    with full_disk(room), pytest.raises(OutputError) as caught:
        write_darknet_weights(network, path, Header(seen=2))
    assert caught.value.exit_code == 6 and str(path) in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["kept.weights"]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    network = build(HAND, 1)
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "directory").mkdir()
    for name in ("gone/x.weights", "file/x.weights", "directory", 300 * "x"):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            write_darknet_weights(network, tmp_path / name, Header())
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"] and (tmp_path / "file").read_bytes() == b"old"
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "directory").chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            write_darknet_weights(network, tmp_path / "directory" / "x.weights", Header())
    finally:
        (tmp_path / "directory").chmod(0o700)


TINY_RECIPE = "--config recipes/yolov3_tiny.yaml"


@pytest.mark.parametrize(
    ("name", "bytes_", "recipe"),
    [
        ("yolov3-tiny.weights", 35_434_956, TINY_RECIPE),
        ("yolov3-spp.weights", 252_209_544, "yolo.spp=true"),
        ("yolov4.weights", 257_717_640, None),
        ("yolov4-tiny.weights", 24_251_276, None),
        ("mine.weights", 35_434_956, None),
    ],
)
def test_weights_without_their_cfg(name: str, bytes_: int, recipe: str | None, tmp_path: Path) -> None:
    """Files of the published sizes in the network that is configured where no cfg is given."""
    with torch.device("meta"):
        model = build_detector(load_settings(ARGS)[0], 80).model
    blocks = [convolution_tensors(module) for module in as_darknet(model).darknet_convolutions()]

    def refusal() -> str:
        with pytest.raises(CheckpointError) as raised:
            identify(as_darknet(model), blocks, bytes_, 20, tmp_path / name)
        return str(raised.value)

    cfg = "FILE" if name == "mine.weights" else f"{name.removesuffix('.weights')}.cfg"
    message = refusal()
    assert f"--cfg {cfg}, in a training model.backbone=darknet_cfg model.cfg={cfg}" in message and "\n" not in message
    assert message.endswith(f"; or {recipe}") if recipe else "; or " not in message
    beside = (tmp_path / name).with_suffix(".cfg")
    beside.touch()
    assert f"model.cfg={beside}" in refusal()


def test_weights_of_another_cfg(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the cfg must be the one that some\.weights was trained with$"):
        load_bytes(build(HAND, 1), bytes(HAND_BYTES + 4), tmp_path)
