"""TFRecord files of images with boxes: framing by TensorBoard's writer, messages by Google's protobuf."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.summary.writer.record_writer import RecordWriter

from detection.data.image_file import read_file
from detection.data.packed.crc32c import crc32c
from detection.data.packed.example import parse_example
from detection.data.packed.tfrecord import read_records, read_split
from detection.errors import DataError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def message_class(packed: bool = True) -> Any:
    """tf.train.Example of the published example.proto and feature.proto, with packed lists or without."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"example_{packed}.proto", package=f"p{packed}", syntax="proto3")
    for name, kind in (("Bytes", kinds.TYPE_BYTES), ("Float", kinds.TYPE_FLOAT), ("Int64", kinds.TYPE_INT64)):
        values = file.message_type.add(name=f"{name}List").field.add(
            name="value", number=1, type=kind, label=kinds.LABEL_REPEATED
        )
        if kind != kinds.TYPE_BYTES:
            values.options.packed = packed
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes", "float", "int64"), start=1):
        feature.field.add(
            name=f"{name}_list", number=number, type=kinds.TYPE_MESSAGE, label=kinds.LABEL_OPTIONAL, oneof_index=0,
            type_name=f".p{packed}.{name.capitalize()}List",
        )  # fmt: skip
    features = file.message_type.add(name="Features")
    features.field.add(
        name="feature", number=1, type=kinds.TYPE_MESSAGE, label=kinds.LABEL_REPEATED,
        type_name=f".p{packed}.Features.FeatureEntry",
    )  # fmt: skip
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=kinds.TYPE_MESSAGE, label=kinds.LABEL_OPTIONAL, type_name=f".p{packed}.Feature"
    )
    file.message_type.add(name="Example").field.add(
        name="features", number=1, type=kinds.TYPE_MESSAGE, label=kinds.LABEL_OPTIONAL, type_name=f".p{packed}.Features"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"p{packed}.Example"))


def encode(features: dict[str, list[Any]], packed: bool = True) -> bytes:
    example = message_class(packed)()
    for key, values in features.items():
        feature = example.features.feature[key]
        kind = {bytes: feature.bytes_list, float: feature.float_list, int: feature.int64_list}[type(values[0])]
        kind.value.extend(values)
    return example.SerializeToString(deterministic=True)


def picture(number: int) -> bytes:
    image = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def record(number: int, boxes: list[tuple[float, ...]], **changes: list[Any] | None) -> dict[str, list[Any]]:
    """The features that EfficientDet's converter writes for an image of 60 x 40; boxes in pixels, x1, y1, x2, y2."""
    columns = list(zip(*boxes, strict=True)) or [()] * 4
    features: dict[str, Any] = {
        "image/height": [40],
        "image/width": [60],
        "image/filename": [f"{number}.jpg".encode()],
        "image/source_id": [str(number).encode()],
        "image/encoded": [picture(number)],
        "image/format": [b"jpeg"],
    }
    for side, column in zip(CORNERS, columns, strict=True):
        features[f"image/object/bbox/{side}"] = [value / (60 if side[0] == "x" else 40) for value in column]
    features |= {
        "image/object/class/label": [3 + index for index, _ in enumerate(boxes)],
        "image/object/class/text": [[b"cat", b"dog"][index] for index, _ in enumerate(boxes)],
        "image/object/is_crowd": [index for index, _ in enumerate(boxes)],
        "image/object/area": [100.5 for _ in boxes],
    }
    features |= {key.replace("_", "/", 1): value for key, value in changes.items() if value is not None}
    left_out = {key.replace("_", "/", 1) for key, value in changes.items() if value is None}
    return {key: values for key, values in features.items() if values and key not in left_out}


def write_records(path: Path, *messages: bytes) -> Path:
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for message in messages:
            writer.write(message)
    return path


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: dict[str, list[Any]], name: str = "train-00000-of-00001.tfrecord", packed: bool = True) -> Path:
        return write_records(tmp_path / name, *(encode(features, packed) for features in records))

    return write


def bit_by_bit(message: bytes) -> int:
    remainder = 0xFFFFFFFF
    for byte in message:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def test_crc32c() -> None:
    """Published values (RFC 3720, appendix B.4), and a loop over bits at the borders of the lanes."""
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    content = np.random.default_rng(0).integers(0, 256, 6000, np.uint8).tobytes()
    for length in (1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 64 * 7, 64 * 7 + 1, 5999):
        assert crc32c(content[:length]) == bit_by_bit(content[:length]), length


@pytest.mark.parametrize("packed", [True, False])
def test_messages_of_protobuf(packed: bool) -> None:
    features = {
        "numbers": [0, 1, -1, 127, 128, 300, 2**63 - 1, -(2**63)],
        "shares": [0.0, 0.5, -1.25, float(np.float32(1 / 3))],
        "texts": [b"", b"\x00\xff" * 200],
        "\u00fc": [7],
    }
    message = memoryview(encode(features, packed))
    found = parse_example(message)
    texts = [bytes(message[slice(*place)]) for place in found.pop("texts")]  # type: ignore[misc]
    assert texts == features.pop("texts") and found == features
    assert parse_example(memoryview(b"")) == {}


def test_records_become_images_with_boxes(written: Callable[..., Path]) -> None:
    """Shares in float32 become the pixels that they were made from; ids are the source's."""
    first = written(record(7, [(3.25, 4.5, 30.01, 20.3), (0, 0, 60, 40)]), record(5, []))
    other = written(record(9, [(1, 2, 3, 4)]), name="train-00001-of-00002.tfrecord", packed=False)
    split = read_split([first, other], iter)
    assert split.images == [
        {"id": number, "file_name": f"{number}.jpg", "width": 60, "height": 40} for number in (7, 5, 9)
    ]
    common = {"area": 100.5}
    assert split.rows == [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [3.25, 4.5, 26.76, 15.8], "iscrowd": 0} | common,
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 60, 40], "iscrowd": 1} | common,
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [1, 2, 2, 2], "iscrowd": 0} | common,
    ]
    assert split.names == {3: "cat", 4: "dog"} and split.unread == {}
    for number, file in zip((7, 5, 9), split.files, strict=True):
        assert read_file(file).tobytes() == picture(number)


def test_what_a_record_may_lack(written: Callable[..., Path]) -> None:
    box = [(1.0, 2.0, 3.0, 5.0)]
    without = {"image_height": None, "image_filename": None, "image_object/is_crowd": None, "image_object/area": None}
    masks = {"image_object/mask": [b"png"], "image_caption": [b"a cat"], "image_object/class/text": None}
    split = read_split([written(record(7, box, **without, **masks), record(7, [], image_source_id=[b"x"]))], iter)
    assert [image["id"] for image in split.images] == [1, 2]  # one id is none
    assert split.images[0] == {"id": 1, "file_name": "000000000001.jpg", "width": 60, "height": 40}
    assert (split.rows[0]["area"], split.rows[0]["iscrowd"]) == (6, 0) and split.names == {3: ""}
    assert split.unread == {"masks": 1, "captions": 1}


WRONG = {
    "no image": (record(1, [], image_encoded=None), "it has no 'image/encoded'"),
    "no labels": (
        record(1, [(1, 2, 3, 4)], **{"image_object/class/label": None}),
        "image/object/bbox/xmin has 1 values, image/object/class/label has 0",
    ),
    "kind": (record(1, [], image_height=[b"40"]), "image/height must be numbers"),
    "no size": (
        record(1, [], image_height=None, image_encoded=[b"nothing"]),
        "it has neither image/width and image/height nor an image that can be read",
    ),
    "two names": (
        record(1, [(1, 2, 3, 4)] * 2, **{"image_object/class/label": [3, 3]}),
        "the class 3 is 'dog', before it was 'cat'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_record_that_is_no_image_is_named(case: str, written: Callable[..., Path]) -> None:
    features, reason = WRONG[case]
    good = record(2, [])
    path = written(good, features)
    with pytest.raises(DataError) as caught:
        read_split([path], iter)
    assert str(caught.value) == f"{path}: the record at byte {16 + len(encode(good))}: {reason}"


def test_a_message_that_is_none_is_named(tmp_path: Path) -> None:
    for message, reason in (
        (b"\x0b", "wire type 3"),
        (b"\x0a\x09x", "a field ends beyond"),
        (b"\xff" * 12, "a number"),
    ):
        path = write_records(tmp_path / "x", message)
        with pytest.raises(DataError, match=rf"x: the record at byte 0: not a tf\.train\.Example \({reason}"):
            read_split([path], iter)


@pytest.mark.parametrize("place", range(0, 16 + 5))
def test_every_flipped_bit_is_noticed(place: int, tmp_path: Path) -> None:
    """In the length, its checksum, the data and its checksum of the second record."""
    path = write_records(tmp_path / "x", b"abc", b"12345")
    content = bytearray(path.read_bytes())
    assert [bytes(data) for _, data in read_records(path)] == [b"abc", b"12345"]
    content[19 + place] ^= 4
    path.write_bytes(content)
    what = "length" if place < 12 else "data"
    with pytest.raises(DataError, match=rf"x: the record at byte 19 is damaged: the checksum of its {what} does not"):
        list(read_records(path))


def test_a_file_that_ends_early_is_noticed(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x", b"abc", b"12345")
    whole = path.read_bytes()
    for size in range(20, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="x: the record at byte 19 is cut off; copy the file again"):
            list(read_records(path))
    head = struct.pack("<Q", 2**40)
    value = bit_by_bit(head)
    masked = ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
    path.write_bytes(head + struct.pack("<I", masked))
    with pytest.raises(DataError, match="has 1099511627776 bytes, at most 2147483648 are read"):
        list(read_records(path))
