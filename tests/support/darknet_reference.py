"""An independent, slow forward pass of Darknet networks for tests: float64, NumPy only, with its own file readers.

Written from the formulas of https://github.com/AlexeyAB/darknet; shares nothing with `detection`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

Section = tuple[str, dict[str, str]]

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda x: x,
    "leaky": lambda x: np.maximum(x, 0.1 * x),
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu6": lambda x: np.minimum(np.maximum(x, 0), 6),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "hard_mish": lambda x: np.where(x > 0, x, np.where(x > -2, x * x / 2 + x, 0)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "hard_swish": lambda x: x * np.minimum(np.maximum(x + 3, 0), 6) / 6,
}


def read_cfg(text: str) -> list[Section]:
    sections: list[Section] = []
    for line in text.split("\n"):
        line = line.split("#")[0].replace(" ", "").strip()
        if line.startswith("["):
            sections.append((line[1:-1], {}))
        elif line:
            key, value = line.split("=")
            sections[-1][1][key] = value
    return sections


def number(options: dict[str, str], key: str, default: int) -> int:
    return int(options.get(key, default))


def numbers(options: dict[str, str], key: str) -> list[float]:
    return [float(value) for value in options[key].split(",")]


def source_of(options: dict[str, str], index: int, key: str = "from") -> int:
    value = int(options[key])
    return value + index if value < 0 else value


def weight_shapes(text: str) -> list[tuple[bool, tuple[int, int, int, int]]]:
    """Whether each convolution has batch norm, and the shape of its kernel."""
    sections = read_cfg(text)
    channels: list[int] = []
    result = []
    for index, (name, options) in enumerate(sections[1:]):
        before = channels[-1] if channels else 3
        if name == "convolutional":
            groups, size, filters = number(options, "groups", 1), number(options, "size", 1), int(options["filters"])
            if "share_index" not in options:
                result.append((number(options, "batch_normalize", 0) == 1, (filters, before // groups, size, size)))
            before = filters
        elif name == "route":
            sources = [int(value + index * (value < 0)) for value in numbers(options, "layers")]
            before = sum(channels[source] for source in sources) // number(options, "groups", 1)
        elif name == "scale_channels":
            before = channels[source_of(options, index)]
        elif name in ("reorg", "reorg3d"):
            before *= int(options["stride"]) ** 2
        channels.append(before)
    return result


def random_weights(text: str, seed: int, header: tuple[int, int, int] = (0, 2, 5), seen: int = 0) -> bytes:
    """A weights file with random values that keep activations of the order of 1."""
    generator = np.random.default_rng(seed)
    parts = [np.array(header, "<i4").tobytes(), np.array([seen], "<u8").tobytes()]
    for normalised, (filters, channels, size, _) in weight_shapes(text):
        values = [generator.normal(0, 0.3, filters)]
        if normalised:
            values += [
                generator.uniform(0.5, 1.5, filters),
                generator.normal(0, 0.3, filters),
                generator.uniform(0.3, 2, filters),
            ]
        fan_in = channels * size * size
        values.append(generator.normal(0, (1.5 / fan_in) ** 0.5, filters * fan_in))
        parts.append(np.concatenate(values).astype("<f4").tobytes())
    return b"".join(parts)


def read_weights(path: Path) -> np.ndarray:
    """The values after the header."""
    major, minor, _ = np.fromfile(path, "<i4", count=3)
    return np.fromfile(path, "<f4", offset=20 if major * 10 + minor >= 2 else 16).astype(np.float64)


def convolve(
    x: np.ndarray, kernel: np.ndarray, stride: int, padding: int, dilation: int, groups: int, bias: np.ndarray
) -> np.ndarray:
    """(C, H, W) to (F, H', W'): the sum over kernel positions of shifted, strided maps."""
    channels, rows, columns = x.shape
    filters, _, size, _ = kernel.shape
    extent = dilation * (size - 1) + 1
    padded = np.zeros((channels, rows + 2 * padding, columns + 2 * padding))
    padded[:, padding : padding + rows, padding : padding + columns] = x
    out_rows = (rows + 2 * padding - extent) // stride + 1
    out_columns = (columns + 2 * padding - extent) // stride + 1
    in_group, out_group = channels // groups, filters // groups
    result = np.zeros((filters, out_rows, out_columns))
    for down in range(size):
        for right in range(size):
            top, left = down * dilation, right * dilation
            shifted = padded[
                :,
                top : top + stride * (out_rows - 1) + 1 : stride,
                left : left + stride * (out_columns - 1) + 1 : stride,
            ]
            if in_group == out_group == 1:
                result += kernel[:, :1, down, right, None] * shifted
                continue
            for group in range(groups):
                rows_of_group = slice(group * out_group, (group + 1) * out_group)
                weights = kernel[rows_of_group, :, down, right]
                maps = shifted[group * in_group : (group + 1) * in_group].reshape(in_group, -1)
                result[rows_of_group] += (weights @ maps).reshape(out_group, out_rows, out_columns)
    return result + bias[:, None, None]


def pool(x: np.ndarray, size: int, stride: int, padding: int) -> np.ndarray:
    """Max pooling, window by window; padding is ignored."""
    channels, rows, columns = x.shape
    before = padding // 2
    out_rows, out_columns = (rows + padding - size) // stride + 1, (columns + padding - size) // stride + 1
    result = np.zeros((channels, out_rows, out_columns))
    for row in range(out_rows):
        for column in range(out_columns):
            top, left = row * stride - before, column * stride - before
            window = x[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)]
            result[:, row, column] = window.max(axis=(1, 2))
    return result


def reorganise(x: np.ndarray, stride: int) -> np.ndarray:
    """[reorg3d], value by value: (C, H, W) to (C * stride^2, H / stride, W / stride)."""
    channels, rows, columns = x.shape
    result = np.zeros((channels * stride**2, rows // stride, columns // stride))
    for channel, row, column in np.ndindex(*result.shape):
        offset = channel // channels
        place = (channel % channels, row * stride + offset // stride, column * stride + offset % stride)
        result[channel, row, column] = x[place]
    return result


def reorganise_old(x: np.ndarray, stride: int) -> np.ndarray:
    """[reorg], in flat indices as the C loop of the original program, which loops over the sizes of its input."""
    channels, rows, columns = x.shape
    flat, result = x.flatten(), np.zeros(x.size)
    narrow = channels // stride**2
    for k in range(channels):
        for j in range(rows):
            for i in range(columns):
                wide_column, wide_row = i * stride + k // narrow % stride, j * stride + k // narrow // stride
                source = wide_column + columns * stride * (wide_row + rows * stride * (k % narrow))
                result[i + columns * (j + rows * k)] = flat[source]
    return result.reshape(channels * stride**2, rows // stride, columns // stride)


def forward(text: str, values: np.ndarray, image: np.ndarray, darknet_batch_norm: bool = False) -> list[np.ndarray]:
    """Input of each [yolo], in the order of the file, (filters, rows, columns).

    Args:
        values: of the weights file, after its header.
        image: RGB 0..1, (3, rows, columns).
        darknet_batch_norm: (x - mean) / (sqrt(variance) + 1e-6) instead of / sqrt(variance + 1e-5).
    """
    position = 0

    def take(count: int) -> np.ndarray:
        nonlocal position
        position += count
        assert position <= len(values)
        return values[position - count : position]

    shared: dict[int, list[np.ndarray]] = {}  # layer -> the values of its convolution
    maps: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    for index, (name, options) in enumerate(read_cfg(text)[1:]):
        x = maps[-1] if maps else image.astype(np.float64)
        activation = ACTIVATIONS[options.get("activation", "linear").replace("-", "_").replace("hardsw", "hard_sw")]
        if name == "convolutional":
            filters, size, groups = int(options["filters"]), number(options, "size", 1), number(options, "groups", 1)
            dilation = number(options, "dilation", 1)
            padding = size // 2 if number(options, "pad", 0) else number(options, "padding", 0)
            normalised = number(options, "batch_normalize", 0)
            if "share_index" in options:
                shared[index] = shared[source_of(options, index, "share_index")]
            else:
                counts = [filters] * (4 if normalised else 1)
                shared[index] = [take(count) for count in (*counts, filters * x.shape[0] // groups * size * size)]
            beta, *statistics, kernel = shared[index]
            gamma, mean, variance = statistics if normalised else (None, None, None)
            kernel = kernel.reshape(filters, -1, size, size)
            shift = np.zeros(filters) if normalised else beta
            x = convolve(x, kernel, number(options, "stride", 1), padding * dilation, dilation, groups, shift)
            if gamma is not None and mean is not None and variance is not None:
                deviation = np.sqrt(variance) + 1e-6 if darknet_batch_norm else np.sqrt(variance + 1e-5)
                x = gamma[:, None, None] * (x - mean[:, None, None]) / deviation[:, None, None] + beta[:, None, None]
            x = activation(x)
        elif name == "shortcut":
            x = x.copy()
            for source in numbers(options, "from"):
                other = maps[int(source + index * (source < 0))]
                for channel in range(min(len(x), len(other))):
                    x[channel] += other[channel]
            x = activation(x)
        elif name == "route":
            parts = []
            for source in numbers(options, "layers"):
                other = maps[int(source + index * (source < 0))]
                share = len(other) // number(options, "groups", 1)
                first = share * number(options, "group_id", 0)
                parts += [other[channel] for channel in range(first, first + share)]
            x = np.stack(parts)
        elif name == "maxpool":
            size = number(options, "size", 1)
            x = pool(x, size, number(options, "stride", 1), number(options, "padding", size - 1))
        elif name == "upsample":
            times = number(options, "stride", 2)
            result = np.zeros((len(x), x.shape[1] * times, x.shape[2] * times))
            for row in range(result.shape[1]):
                for column in range(result.shape[2]):
                    result[:, row, column] = x[:, row // times, column // times]
            x = result * float(options.get("scale", 1))
        elif name in ("scale_channels", "sam"):
            other = maps[source_of(options, index)]
            product = np.zeros(other.shape)
            for channel, row, column in np.ndindex(*other.shape):
                place = (channel, row, column)
                if name == "scale_channels":
                    place = (0, row, column) if number(options, "scale_wh", 0) else (channel, 0, 0)
                product[channel, row, column] = x[place] * other[channel, row, column]
            x = activation(product)
        elif name == "reorg3d":
            x = reorganise(x, int(options["stride"]))
        elif name == "reorg":
            x = reorganise_old(x, int(options["stride"]))
        elif name == "avgpool":
            x = x.sum(axis=(1, 2), keepdims=True) / (x.shape[1] * x.shape[2])
        elif name in ("yolo", "Gaussian_yolo"):
            outputs.append(x)
        else:
            assert name == "dropout", name
        maps.append(x)
    assert position == len(values), "the file holds more than the network takes"
    return outputs


def decode(text: str, outputs: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Boxes and scores of each [yolo], in the order of the file, cell by cell.

    Returns:
        "boxes" (A, H, W, 4) x1, y1, x2, y2 in pixels of the network input; "scores" (A, H, W, C).
    """
    sections = read_cfg(text)
    width, height = int(sections[0][1]["width"]), int(sections[0][1]["height"])
    results = []
    heads = [section for section in sections if section[0] in ("yolo", "Gaussian_yolo")]
    for (name, options), x in zip(heads, outputs, strict=True):
        anchors, mask = numbers(options, "anchors"), [int(value) for value in numbers(options, "mask")]
        scale, new_coords = float(options.get("scale_x_y", 1)), number(options, "new_coords", 0)
        _, rows, columns = x.shape
        x = x.reshape(len(mask), -1, rows, columns)
        certainty = np.ones((len(mask), 1, rows, columns))
        if name == "Gaussian_yolo":  # x, its uncertainty, y, its uncertainty, w, ..., h, ..., objectness, classes
            certainty[:, 0] = 1 - ACTIVATIONS["logistic"](x[:, [1, 3, 5, 7]]).sum(axis=1) / 4
            x = x[:, [0, 2, 4, 6, *range(8, x.shape[1])]]
        boxes = np.zeros((len(mask), rows, columns, 4))
        share = x if new_coords else ACTIVATIONS["logistic"](x)
        for position, anchor in enumerate(mask):
            for row in range(rows):
                for column in range(columns):
                    centre_x = (column + share[position, 0, row, column] * scale - (scale - 1) / 2) / columns * width
                    centre_y = (row + share[position, 1, row, column] * scale - (scale - 1) / 2) / rows * height
                    wh = x[position, 2:4, row, column]
                    wh = 4 * wh**2 if new_coords else np.exp(wh)
                    box_width, box_height = wh[0] * anchors[2 * anchor], wh[1] * anchors[2 * anchor + 1]
                    boxes[position, row, column] = (
                        centre_x - box_width / 2,
                        centre_y - box_height / 2,
                        centre_x + box_width / 2,
                        centre_y + box_height / 2,
                    )
        results.append({"boxes": boxes, "scores": (share[:, 4:5] * certainty * share[:, 5:]).transpose(0, 2, 3, 1)})
    return results
