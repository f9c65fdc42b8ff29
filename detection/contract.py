"""What crosses the borders between data, detectors, training and evaluation; docs/contract.md explains it."""

from typing import Any, NamedTuple

import torch
from torch import nn

Batch = dict[str, Any]


class Detector(NamedTuple):
    """outputs = model(images); losses = criterion(outputs, targets); found = postprocess(outputs)."""

    model: nn.Module
    criterion: nn.Module | None  # None: a network that can only detect
    postprocess: nn.Module

    def to(self, device: torch.device, channels_last: bool) -> "Detector":
        """All three on the device, the model's weights in the memory layout that suits it."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)
        criterion = None if self.criterion is None else self.criterion.to(device)
        return Detector(self.model.to(device), criterion, self.postprocess.to(device))


PADDING_LABEL = -1

CROWD_LABEL = -2
