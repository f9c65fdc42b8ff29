"""The messages of TFRecord files, tf.train.Example, from protobuf's wire format alone.

Example has the field 1, Features; that is a map, field 1, from a name to a Feature, which is one of three lists: of
bytes (1), of floats (2) or of whole numbers (3), each with the field 1 for its values, packed or not.

Source: https://protobuf.dev/programming-guides/encoding; tensorflow/core/example/example.proto and feature.proto
"""

import struct
from collections.abc import Iterator

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types

Span = tuple[int, int]  # first byte and end in the message
Feature = list[Span] | list[float] | list[int]


def parse_example(message: memoryview) -> dict[str, Feature]:
    """Read the features of an Example by name; values that are bytes as their places in the message.

    Raises:
        ValueError: it is not the wire format of an Example.
    """
    features: dict[str, Feature] = {}
    try:
        for number, _, value in _fields(message, 0, len(message)):
            if number != 1 or not isinstance(value, tuple):
                continue
            for inner, _, entry in _fields(message, *value):
                if inner == 1 and isinstance(entry, tuple):
                    name, feature = _entry(message, entry)
                    features[name] = feature
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a tf.train.Example ({error})") from None
    return features


def _entry(message: memoryview, span: Span) -> tuple[str, Feature]:
    """One entry of the map: key in field 1, Feature in field 2."""
    name, feature = "", list[int]()
    found: Feature = feature
    for number, _, value in _fields(message, *span):
        if number == 1 and isinstance(value, tuple):
            name = bytes(message[slice(*value)]).decode()
        elif number == 2 and isinstance(value, tuple):
            for kind, _, values in _fields(message, *value):
                if isinstance(values, tuple):
                    found = _values(message, kind, values)
    return name, found


def _values(message: memoryview, kind: int, span: Span) -> Feature:
    if kind == 1:
        return [value for number, _, value in _fields(message, *span) if number == 1 and isinstance(value, tuple)]
    if kind == 2:
        floats: list[float] = []
        for number, wire, value in _fields(message, *span):
            if number == 1 and wire == FIXED32 and isinstance(value, int):
                floats.append(struct.unpack("<f", struct.pack("<I", value))[0])
            elif number == 1 and isinstance(value, tuple):
                floats += np.frombuffer(message[slice(*value)], dtype="<f4").tolist()
        return floats
    numbers: list[int] = []
    for number, wire, value in _fields(message, *span):
        if number == 1 and wire == VARINT and isinstance(value, int):
            numbers.append(_signed(value))
        elif number == 1 and isinstance(value, tuple):
            position, end = value
            while position < end:
                item, position = _varint(message, position, end)
                numbers.append(_signed(item))
    return numbers


def _fields(message: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int | Span]]:
    """Yield (field number, wire type, value); of a field with a length the place of its content.

    Raises:
        ValueError: a field of a kind that protobuf no longer has, or one that ends beyond `end`.
    """
    while position < end:
        tag, position = _varint(message, position, end)
        wire = tag & 7
        value: int | Span
        if wire == VARINT:
            value, position = _varint(message, position, end)
        elif wire == BYTES:
            length, position = _varint(message, position, end)
            value = (position, position + length)
            position += length
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
            value = int.from_bytes(message[position : position + size], "little")
            position += size
        else:
            raise ValueError(f"not a tf.train.Example (wire type {wire} at byte {position})")
        if position > end:
            raise ValueError(f"not a tf.train.Example (a field ends beyond byte {end})")
        yield tag >> 3, wire, value


def _varint(message: memoryview, position: int, end: int) -> tuple[int, int]:
    """A number of 7 bits per byte, lowest first, and the position behind it."""
    value = shift = 0
    while position < end and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"not a tf.train.Example (a number without end at byte {position})")


def _signed(value: int) -> int:
    """int64 values are stored as their two's complement of 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
