"""CRC-32C, the checksum of TFRecord files, by tables and in NumPy: a record of an image takes a millisecond.

The message is cut into lanes of equal length whose remainders are computed side by side; two neighbouring remainders
become one by shifting the first by the length of the second, which is linear and so a lookup in two tables.

Source: Castagnoli, Braeuer and Herrmann, Optimization of Cyclic Redundancy-Check Codes, IEEE Transactions on
Communications 41 (6), 1993; RFC 3720, section 12.1 and appendix B.4
"""

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # 0x1EDC6F41, lowest bit first
LANE = 64  # bytes
MASK_DELTA = 0xA282EAD8  # of TFRecord


def masked_crc32c(content: bytes | memoryview | np.ndarray) -> int:
    """The checksum as TFRecord stores it, turned by 15 bits and shifted, since the CRC of a CRC is a weak one.

    Source: TensorFlow, tensorflow/core/lib/hash/crc32c.h
    """
    value = crc32c(content)
    return ((value >> 15 | value << 17) + MASK_DELTA) & 0xFFFFFFFF


def crc32c(content: bytes | memoryview | np.ndarray) -> int:
    """CRC-32C of bytes, e.g. 0xE3069283 of b"123456789"."""
    message = np.frombuffer(content, dtype=np.uint8)
    if len(message) < 4:
        remainder = 0xFFFFFFFF
        for byte in message.tolist():
            remainder = remainder >> 8 ^ int(_byte_table()[(remainder ^ byte) & 0xFF])
        return remainder ^ 0xFFFFFFFF
    # The initial remainder of ones is the same as inverting the first four bytes; zeros in front then change nothing.
    padded = np.zeros(len(message) + -len(message) % LANE, dtype=np.uint8)
    start = len(padded) - len(message)
    padded[start:] = message
    padded[start : start + 4] ^= 0xFF
    words = padded.view("<u2").reshape(-1, LANE // 2)
    table = _word_table()
    remainders = np.zeros(len(words), dtype=np.uint32)
    for column in np.ascontiguousarray(words.T):
        remainders = table[(remainders ^ column) & 0xFFFF] ^ remainders >> 16
    level = 0
    while len(remainders) > 1:
        if len(remainders) % 2:
            remainders = np.concatenate([np.zeros(1, np.uint32), remainders])
        low, high = _shift_tables(level)
        first = remainders[::2]
        remainders = low[first & 0xFFFF] ^ high[first >> 16] ^ remainders[1::2]
        level += 1
    return int(remainders[0]) ^ 0xFFFFFFFF


@functools.cache
def _byte_table() -> np.ndarray:
    """Remainder of each byte, (256,) uint32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


@functools.cache
def _word_table() -> np.ndarray:
    """Remainder of each pair of bytes, (65536,) uint32."""
    return _append_byte(_append_byte(np.arange(2**16, dtype=np.uint32)))


def _append_byte(remainders: np.ndarray) -> np.ndarray:
    """Shift remainders by one zero byte."""
    return _byte_table()[remainders & 0xFF] ^ remainders >> 8


@functools.cache
def _shift_tables(level: int) -> tuple[np.ndarray, np.ndarray]:
    """The shift by LANE * 2^level zero bytes, of the lower and of the upper 16 bits of a remainder."""
    if level:
        low, high = _shift_tables(level - 1)
        bits = 1 << np.arange(32, dtype=np.uint32)
        for _ in range(2):
            bits = low[bits & 0xFFFF] ^ high[bits >> 16]
    else:
        bits = 1 << np.arange(32, dtype=np.uint32)
        for _ in range(LANE):
            bits = _append_byte(bits)
    return _all_sums(bits[:16]), _all_sums(bits[16:])


def _all_sums(bits: np.ndarray) -> np.ndarray:
    """XOR of every subset of 16 values, by the bits of its number, (65536,) uint32."""
    sums = np.zeros(1, dtype=np.uint32)
    for value in bits:
        sums = np.concatenate([sums, sums ^ value])
    return sums
