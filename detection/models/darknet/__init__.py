"""File formats of Darknet: networks from and to `.cfg`, weights from and to `.weights`."""
