"""A network of one convolution whose detections are known by hand.

It looks at the top left pixel of each cell of 16 x 16 of its input of 64 x 64: where it is red or green, it finds a box
of the cell's size there, of the class of that name, with a score near 1.
"""

from pathlib import Path

import numpy as np
import torch

from detection.models.darknet.cfg import parse_cfg
from detection.models.darknet.network import DarknetNetwork
from detection.models.darknet.weights import Header, write_darknet_weights
from tests.support.darknet_descriptions import net, output, write_cfg, yolo

CFG = write_cfg([net(64), output(7, stride=16), yolo("0", "16,16", 2)])
RED, GREEN = (255, 0, 0), (0, 255, 0)


def build_block_network() -> DarknetNetwork:
    network = DarknetNetwork(parse_cfg(CFG), num_classes=2)
    (convolution,) = network.output_convolutions()
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.bias.zero_()  # x, y in the middle of the cell; width and height of the anchor
        convolution.weight[4, :2, 0, 0] = 20.0  # objectness: red or green
        convolution.weight[5, 0, 0, 0] = convolution.weight[6, 1, 0, 0] = 20.0
        convolution.bias[4:] = -10.0
    return network


def write_block_network(directory: Path) -> Path:
    """Write net.cfg, net.names and net.weights."""
    (directory / "net.cfg").write_text(CFG)
    (directory / "net.names").write_text("red\ngreen\n")
    write_darknet_weights(build_block_network(), directory / "net.weights", Header())
    return directory


def block_image(*blocks: tuple[int, int, tuple[int, int, int]], side: int = 64) -> np.ndarray:
    """Draw a black RGB image with a block of 16/64 of the side at each (column, row, colour)."""
    image = np.zeros((side, side, 3), np.uint8)
    cell = side // 4
    for column, row, color in blocks:
        x, y = cell * column, cell * row
        image[max(y - cell // 2, 0) : y + cell // 2, max(x - cell // 2, 0) : x + cell // 2] = color
    return image


def cell_box(column: int, row: int, side: int = 64) -> list[float]:
    """Box of a cell: x1, y1, x2, y2."""
    cell = side / 4
    return [cell * column, cell * row, cell * column + cell, cell * row + cell]
