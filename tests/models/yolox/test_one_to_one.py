"""The one-to-one branch: two heads in training, one in evaluation, and detection without NMS."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch

from detection.config.settings import Settings
from detection.contract import Detector
from detection.inference.exported_model import build_exported
from detection.models import build_detector
from detection.models.postprocess import DecodedPostprocess
from detection.models.yolox.aligned import AlignedLoss
from detection.models.yolox.assigners.task_aligned import assign_aligned_half, assign_one_to_one

WORDS = [
    "model.detector=yolox", "model.backbone=darknet_tiny", "yolox.neck_channels=[8, 8]", "yolox.head_channels=8",
    "yolox.loss=aligned", "yolox.assigner=task_aligned_half", "yolox.box_weight=2", "yolox.one_to_one=true",
]  # fmt: skip
TARGETS = {
    "boxes": torch.tensor([[[3.0, 5, 40, 60], [30, 30, 50, 44], [0, 0, 0, 0]]]),
    "labels": torch.tensor([[1, 0, -1]]),
}


def make_detector(default_settings) -> Detector:
    torch.manual_seed(0)
    made: Settings = default_settings(*WORDS)
    return build_detector(made, 2)


def test_losses_of_both_branches_are_added_and_the_second_leaves_the_neck_alone(default_settings) -> None:
    detector = make_detector(default_settings)
    model, criterion = detector.model.train(), detector.require_criterion()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    outputs = model(images)
    assert [tuple(output.shape) for output in outputs] == [(1, 1, 4, 4, 6), (1, 1, 2, 2, 6)] * 2
    losses = criterion(outputs, TARGETS)
    layout, strides = criterion.one.decoding.layout, criterion.one.decoding.strides
    many = AlignedLoss(layout, strides, assign_aligned_half)(outputs[:2], TARGETS)
    one = AlignedLoss(layout, strides, assign_one_to_one)(outputs[2:], TARGETS)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, many[name] + one[name])
    sum(one.values()).backward()
    assert all(parameter.grad is None for parameter in [*model.backbone.parameters(), *model.neck.parameters()])
    assert any(bool(parameter.grad.any()) for parameter in model.one_to_one_heads.parameters())


def test_evaluation_has_the_second_branch_alone(default_settings) -> None:
    detector = make_detector(default_settings)
    model = detector.model.train()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for head in model.heads:
            head.boxes.weight.fill_(9.0)  # what the first branch says does not matter
        outputs = model.eval()(images)
    assert len(outputs) == 2
    losses = detector.require_criterion()(outputs, TARGETS)
    one = AlignedLoss(detector.criterion.one.decoding.layout, model.strides, assign_one_to_one)(outputs, TARGETS)
    assert {name: float(loss) for name, loss in losses.items()} == {name: float(loss) for name, loss in one.items()}
    found = detector.postprocess(outputs)[0]
    assert len(found["scores"]) == 40 and bool((found["scores"].diff() <= 0).all())  # (16 + 4) cells of 2 classes
    rows = model.class_rows(2)
    assert len(rows) == len(model.output_convolutions()) == 8
    assert [len(row) for row in rows] == [0, 1] * 4


def test_an_exported_file_of_decoded_boxes_needs_no_suppression_either(default_settings) -> None:
    for words, suppress in ((WORDS, False), ([*WORDS, "yolox.one_to_one=false"], True)):
        settings = default_settings(*words)
        detector = build_detector(settings, 2)
        description = SimpleNamespace(
            output_kind="decoded",
            decoding=detector.metadata,
            geometry=dataclasses.asdict(detector.geometry),
            network=detector.name,
            score=detector.score,
            deviations=detector.deviations,
        )
        file: Any = SimpleNamespace(description=description)
        exported = build_exported(file, settings, settings)
        assert exported.postprocess.suppress is suppress
        assert exported.deviations == (() if suppress else ("without NMS",))


def test_selection_without_suppression_by_hand() -> None:
    """Equal boxes stay; a score at the threshold does not."""
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 9], [5, 5, 8, 8]]])
    scores = torch.tensor([[[0.9, 0.2], [0.8, 0.1], [0.3, 0.1]]])
    postprocess = DecodedPostprocess(confidence_threshold=0.1, suppress=False)
    found = postprocess((boxes, scores))[0]
    assert found["labels"].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.8, 0.3, 0.2]))
    torch.testing.assert_close(found["boxes"], boxes[0, [0, 1, 2, 0]])
