"""Non-finite steps: the bundle, and the diagnosis of a replay."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detection.errors import CheckpointError, OutputError
from detection.runtime.devices import autocast
from detection.training.replay import diagnose_batch, read_bundle, write_bundle
from tests.support.checkpoint_cases import STOPPED

CPU = torch.device("cpu")
BATCH = {
    "images": torch.ones(2, 3, 4, 4, dtype=torch.uint8),
    "boxes": torch.zeros(2, 1, 4),
    "labels": torch.zeros(2, 1, dtype=torch.int64),
    "indices": torch.tensor([1, 0]),
}
IDS = np.array([500, 900])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 1)
        self.second = nn.Conv2d(2, 2, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.second(self.first(images.float()))]


def criterion(outputs: list[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss_box": outputs[0].square().mean(), "loss_class": targets["boxes"].sum() + outputs[0].sum() * 0}


def diagnose(model: nn.Module, batch: dict[str, Tensor] = BATCH) -> list[str]:
    return diagnose_batch(model, criterion, batch, lambda: autocast(CPU, None), CPU, IDS)


def test_nothing_to_say_about_finite_numbers() -> None:
    assert diagnose(Network()) == []


def test_weights_and_first_output() -> None:
    model = Network()
    with torch.no_grad():
        model.second.weight[0, 0] = math.inf
    lines = diagnose(model)
    assert lines[0] == "non-finite weights: second.weight"
    assert lines[1] == "first non-finite output: of second"
    assert lines[2].startswith("loss: loss_box = ")
    assert any(line.startswith("non-finite gradients: ") and "first.weight" in line for line in lines)


def test_the_image_is_named() -> None:
    boxes = torch.zeros(2, 1, 4)
    boxes[1] = math.nan  # the second row of the batch is image 0 of the dataset
    lines = diagnose(Network(), BATCH | {"boxes": boxes})
    assert "loss of image id 500 alone: loss_class = nan" in lines and not any("900" in line for line in lines)


def test_statistics_that_the_replay_itself_breaks_are_not_called_the_cause() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train()

    def forward(images: Tensor) -> list[Tensor]:
        return [nn.Sequential.forward(model, images.float() * math.inf)]

    model.forward = forward
    lines = diagnose(model)
    assert not model[1].running_var.isfinite().all(), "now they are"
    assert lines[0] == "first non-finite output: of 0"


def test_bundle_comes_back(tmp_path: Path, full_disk) -> None:
    checkpoint = STOPPED | {"settings": {"train": {"steps": 3}}, "model": {"w": torch.ones(2)}}
    losses = {7: {"loss_box": math.nan, "loss_class": 1.5}, 8: {"loss_box": math.inf, "loss_class": 2.0}}
    write_bundle(tmp_path / "non_finite", checkpoint, 5, losses, {7: [1, 2], 8: [3, 4]})
    content = json.loads((tmp_path / "non_finite" / "report.json").read_text(), parse_constant=pytest.fail)
    assert content["seed"] == 5 and content["settings"] == {"train": {"steps": 3}}
    assert content["steps"][1] == {"step": 8, "losses": {"loss_box": "inf", "loss_class": "2.0"}, "image_ids": [3, 4]}
    state, report = read_bundle(tmp_path / "non_finite")
    assert state["step"] == 3 and report["steps"][0]["step"] == 7
    with full_disk(50), pytest.raises(OutputError):
        write_bundle(tmp_path / "another", checkpoint, 5, losses, {7: [1], 8: [2]})


@pytest.mark.parametrize("text", ["", "{}", '{"steps": []}', "[1]"])
def test_damaged_bundle(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_bundle(tmp_path)
    write_bundle(tmp_path, STOPPED | {"settings": {}}, 0, {1: {"loss_box": math.nan}}, {1: [1]})
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"report\.json cannot be read"):
        read_bundle(tmp_path)
