"""The file formats of Darknet: a network from a `.cfg`, weights from and to `.weights`."""
