import math
from typing import Any

import pytest
import torch
from torch import Tensor

from detection.models.yolo.postprocess import YOLOPostprocess
from detection.ops.letterbox import Letterbox, boxes_to_original
from tests.support.slow_boxes import slow_nms

STRIDES = [8, 16]
ANCHORS = [[(10.0, 13.0), (33.0, 23.0)], [(30.0, 61.0), (59.0, 40.0)]]
ROWS, COLUMNS = 4, 6  # of the first level: an input of 48 x 32 pixels


def random_outputs(images: int, classes: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, 2, ROWS // divisor, COLUMNS // divisor, 5 + classes, generator=generator)
        for divisor in (1, 2)
    ]


def build(**arguments: Any) -> YOLOPostprocess:
    return YOLOPostprocess(ANCHORS, STRIDES, **arguments)


# The oracle: one prediction, one class and one pair of boxes at a time


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_detections(
    outputs: list[Tensor],
    image: int,
    confidence: float,
    iou_threshold: float,
    max_detections: int,
    softmax: bool = False,
) -> list[tuple[float, int, list[float]]]:
    """(score, label, box), score descending."""
    candidates: dict[int, list[tuple[float, list[float]]]] = {}
    for output, stride, anchors in zip(outputs, STRIDES, ANCHORS, strict=True):
        for anchor, (anchor_width, anchor_height) in enumerate(anchors):
            for row in range(output.shape[2]):
                for column in range(output.shape[3]):
                    raw = output[image, anchor, row, column].tolist()
                    x, y = (column + sigmoid(raw[0])) * stride, (row + sigmoid(raw[1])) * stride
                    width, height = anchor_width * math.exp(raw[2]), anchor_height * math.exp(raw[3])
                    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
                    total = sum(math.exp(value) for value in raw[5:])
                    for label, value in enumerate(raw[5:]):
                        probability = math.exp(value) / total if softmax else sigmoid(value)
                        if sigmoid(raw[4]) * probability > confidence:
                            candidates.setdefault(label, []).append((sigmoid(raw[4]) * probability, box))
    found = []
    for label, of_class in candidates.items():
        kept = slow_nms([box for _, box in of_class], [score for score, _ in of_class], iou_threshold)
        found += [(of_class[row][0], label, of_class[row][1]) for row in kept[:max_detections]]
    return sorted(found, key=lambda detection: -detection[0])


def assert_equals_oracle(found: dict[str, Tensor], expected: list[tuple[float, int, list[float]]]) -> None:
    assert found["labels"].tolist() == [label for _, label, _ in expected]
    assert found["scores"].tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-4)
    torch.testing.assert_close(found["boxes"], torch.tensor([box for _, _, box in expected]), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("class_loss", ["bce", "cross_entropy"])
@pytest.mark.parametrize(
    ("classes", "confidence", "iou_threshold", "max_detections"),
    [(3, 0.001, 0.45, 100), (3, 0.001, 0.45, 4), (1, 0.3, 0.6, 100), (5, 0.001, 0.1, 7), (20, 0.05, 0.45, 2)],
)
def test_detections_against_loop(
    classes: int, confidence: float, iou_threshold: float, max_detections: int, class_loss: str
) -> None:
    """Multi-label, NMS within a class, at most `max_detections` per class, by falling score."""
    outputs = random_outputs(2, classes, seed=classes)
    thresholds = {"confidence_threshold": confidence, "iou_threshold": iou_threshold}
    postprocess = build(**thresholds, max_detections=max_detections, class_loss=class_loss)
    softmax = class_loss == "cross_entropy"
    for image, found in enumerate(postprocess(outputs)):
        expected = slow_detections(outputs, image, confidence, iou_threshold, max_detections, softmax)
        assert len(expected) > 3
        assert_equals_oracle(found, expected)


def test_many_candidates_against_loop() -> None:
    outputs = random_outputs(1, 30, seed=40)
    outputs = [output + 3 * (torch.arange(35) >= 4) for output in outputs]
    expected = slow_detections(outputs, 0, 0.001, 0.45, 100)
    assert_equals_oracle(build()(outputs)[0], expected)
    assert sum(output[..., 5:].numel() for output in outputs) > 1000


def quiet_outputs(classes: int) -> list[Tensor]:
    """No candidates: objectness sigmoid(-20) = 2e-9."""
    outputs = [output * 0 for output in random_outputs(1, classes, seed=0)]
    for output in outputs:
        output[..., 4:] = -20
    return outputs


def test_one_prediction_may_have_several_classes() -> None:
    outputs = quiet_outputs(classes=3)
    outputs[0][0, 1, 2, 3, 4:] = torch.tensor([20.0, math.log(3), -20.0, 0.0])  # probabilities 3/4, 0, 1/2
    found = build()(outputs)[0]
    assert found["labels"].tolist() == [0, 2]
    torch.testing.assert_close(found["scores"], torch.tensor([0.75, 0.5]))
    # cell (column 3, row 2) of stride 8, anchor 33 x 23 around (28, 20)
    torch.testing.assert_close(found["boxes"], torch.tensor([[28 - 16.5, 20 - 11.5, 28 + 16.5, 20 + 11.5]] * 2))


def test_softmax_probabilities_are_those_of_the_loss() -> None:
    outputs = quiet_outputs(classes=3)
    outputs[0][0, 0, 0, 0, 4:] = torch.tensor([20.0, math.log(6), math.log(3), 0.0])  # 6/10, 3/10, 1/10
    found = build(class_loss="cross_entropy")(outputs)[0]
    torch.testing.assert_close(found["scores"], torch.tensor([0.6, 0.3, 0.1]))
    assert found["labels"].tolist() == [0, 1, 2]


def test_confidence_threshold() -> None:
    """Every detection exceeds it, and without NMS a lower one only adds detections."""
    outputs = random_outputs(1, 4, seed=50)
    all_found = build(confidence_threshold=0.0, iou_threshold=1.0)(outputs)[0]
    candidates = 2 * (ROWS * COLUMNS + ROWS * COLUMNS // 4) * 4
    assert len(all_found["scores"]) == candidates
    threshold = all_found["scores"][candidates // 3].item()
    some_found = build(confidence_threshold=threshold, iou_threshold=1.0)(outputs)[0]
    assert len(some_found["scores"]) == candidates // 3  # exclusive: the score at the threshold is out
    assert torch.equal(some_found["scores"], all_found["scores"][: candidates // 3])


@pytest.mark.parametrize("max_detections", [1, 5])
def test_most_detections_are_per_class(max_detections: int) -> None:
    outputs = random_outputs(2, 3, seed=60)
    unlimited = build(iou_threshold=1.0, max_detections=10**6)(outputs)
    for found, every in zip(build(iou_threshold=1.0, max_detections=max_detections)(outputs), unlimited, strict=True):
        assert found["labels"].bincount().tolist() == [max_detections] * 3
        for label in range(3):
            best = every["scores"][every["labels"] == label][:max_detections]
            assert torch.equal(found["scores"][found["labels"] == label], best)


def test_no_candidates() -> None:
    """Also beside an image with some."""
    outputs = [torch.cat([a, b]) for a, b in zip(quiet_outputs(3), random_outputs(1, 3, seed=70), strict=True)]
    nothing, something = build()(outputs)
    assert len(something["scores"]) > 0
    assert {name: (tuple(value.shape), value.dtype) for name, value in nothing.items()} == {
        "boxes": ((0, 4), torch.float32),
        "scores": ((0,), torch.float32),
        "labels": ((0,), torch.int64),
    }


def test_batch_equals_singles() -> None:
    outputs = random_outputs(3, 4, seed=80)
    for image, found in enumerate(build()(outputs)):
        alone = build()([output[image : image + 1] for output in outputs])[0]
        for name, value in found.items():
            assert torch.equal(value, alone[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype: torch.dtype) -> None:
    """All arithmetic is float32: only the outputs themselves are rounded."""
    outputs = [output.to(dtype) for output in random_outputs(1, 4, seed=90)]
    found, expected = build()(outputs)[0], build()([output.float() for output in outputs])[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    for name, value in found.items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("log_size", [12.0, 60.0, 1000.0])
def test_huge_box_of_one_class_changes_nothing_in_another(log_size: float) -> None:
    """A box of e^12 anchors (about 5 million pixels), of 1e27 pixels, of infinite size, as of a diverging network."""
    outputs = quiet_outputs(classes=80)
    # Four boxes of 10 x 13 in one row, shares of the cell 1, 0.2, 0 and 1: centres x 8.0, 9.7, 16.0, 32.0.
    for column, (x, score) in enumerate([(6.0, 0.0), (-1.3, -1.0), (-6.0, -2.0), (6.0, -3.0)]):
        outputs[0][0, 0, 1, column, 0] = x
        outputs[0][0, 0, 1, column, 4], outputs[0][0, 0, 1, column, 5 + 79] = 20, score
    expected = build()(outputs)[0]
    assert len(expected["scores"]) == 3  # the first two have IoU 8.3 / 11.7

    outputs[1][0, 0, 0, 0, 2:4] = log_size
    outputs[1][0, 0, 0, 0, 4:6] = 20  # objectness and class 0
    found = build()(outputs)[0]
    for name, value in expected.items():
        assert torch.equal(found[name][found["labels"] == 79], value)


def test_nan_scores_are_left_out() -> None:
    outputs = random_outputs(1, 3, seed=100)
    outputs[0][0, 0, 0, 0, 4] = float("nan")
    expected = [output.clone() for output in outputs]
    expected[0][0, 0, 0, 0, 4] = -1000
    for name, value in build()(expected)[0].items():
        assert torch.equal(build()(outputs)[0][name], value)


# Geometry


@pytest.mark.parametrize(
    ("letterbox", "original", "network"),
    [
        # 640 x 480 into 416 x 416: scale 0.65, 312 rows, 52 above and below
        (Letterbox(0.65, 0.65, 0, 52, 640, 480), [0.0, 0, 640, 480], [0.0, 52, 416, 364]),
        (Letterbox(0.65, 0.65, 0, 52, 640, 480), [100.0, 200, 300, 400], [65.0, 182, 195, 312]),
        (
            Letterbox(scale_x=0.5, scale_y=2.0, left=10, top=20, width=100, height=30),
            [2.0, 3, 4, 5],
            [11.0, 26, 12, 30],
        ),
    ],
)
def test_letterbox_by_hand(letterbox: Letterbox, original: list[float], network: list[float]) -> None:
    torch.testing.assert_close(letterbox.to_input(torch.tensor([original])), torch.tensor([network]))
    torch.testing.assert_close(letterbox.to_original(torch.tensor([network])), torch.tensor([original]))


def test_boxes_to_original_are_clipped_to_the_image() -> None:
    letterbox = Letterbox(scale_x=0.5, scale_y=0.5, left=0, top=10, width=200, height=80)
    boxes = torch.tensor(
        [
            [10.0, 20, 30, 40],  # (20, 20) to (60, 60)
            [-5, 0, 200, 100],  # over every side, into the padding
            [0, 0, 20, 9],  # inside the padding above the image
        ]
    )
    expected = [[20, 20, 60, 60], [0, 0, 200, 80], [0, 0, 40, 0]]
    assert boxes_to_original(boxes, letterbox).tolist() == expected
    assert boxes_to_original(torch.zeros(0, 4), letterbox).shape == (0, 4)


# One pass for several thresholds, and decoding in pieces


@pytest.mark.parametrize("max_detections", [3, 100, None])
@pytest.mark.parametrize("step", [0, 0.05])
def test_a_higher_threshold_gives_the_start_of_what_a_lower_one_gives(max_detections: int | None, step: float) -> None:
    """A step rounds the logits, so that many scores are equal."""
    outputs = random_outputs(images=3, classes=2, seed=4)
    if step:
        outputs = [(level / step).round() * step for level in outputs]
    lowest = build(confidence_threshold=0.0001, max_detections=max_detections)(outputs)
    for threshold in (0.001, 0.01, 0.1, 0.3):
        for wide, narrow in zip(
            lowest, build(confidence_threshold=threshold, max_detections=max_detections)(outputs), strict=True
        ):
            kept = wide["scores"] > threshold
            assert len(narrow["scores"]) > 0
            for name in ("boxes", "scores", "labels"):
                assert torch.equal(wide[name][kept], narrow[name])


def test_decoding_in_pieces_changes_nothing(monkeypatch) -> None:
    from detection.models import postprocess as postprocessing

    outputs = random_outputs(images=5, classes=3, seed=5)
    whole = build()(outputs)
    postprocess, decoded = build(), []
    decode = postprocess.decode
    monkeypatch.setattr(postprocess, "decode", lambda levels: decoded.append(len(levels[0])) or decode(levels))
    # 2 anchors on 4 x 6 and 2 x 3 cells: 60 predictions of 5 + 3 values
    for limit, sizes in ((1, [1] * 5), (960, [2, 2, 1]), (2399, [4, 1])):
        monkeypatch.setattr(postprocessing, "MAX_VALUES", limit)
        decoded.clear()
        for expected, found in zip(whole, postprocess(outputs), strict=True):
            assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert decoded == sizes


def test_score_by_objectness_has_one_class_per_prediction() -> None:
    """As the research repository scored: objectness alone, for the likeliest class."""
    outputs = random_outputs(images=1, classes=4, seed=6)
    (found,) = build(score="objectness", iou_threshold=1.0, max_detections=None, confidence_threshold=0.4)(outputs)
    expected = sorted(
        (
            (sigmoid(raw[4]), max(range(4), key=lambda label: raw[5 + label]))
            for level in outputs
            for raw in level[0].reshape(-1, 9).tolist()
            if sigmoid(raw[4]) > 0.4
        ),
        reverse=True,
    )
    assert found["scores"].tolist() == pytest.approx([confidence for confidence, _ in expected])
    assert found["labels"].tolist() == [label for _, label in expected]


# A head that predicts its IoU


@pytest.mark.parametrize("score", ["product", "objectness"])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_the_predicted_iou_is_part_of_the_score(factor: float, score: Any) -> None:
    """objectness^(1 - f) * IoU^f takes the place of objectness, in the threshold too; boxes and classes as without."""
    plain = random_outputs(2, 3, seed=5)
    generator = torch.Generator().manual_seed(6)
    iou = [torch.randn(*output.shape[:-1], 1, generator=generator) for output in plain]
    outputs = [torch.cat([a[..., :5], b, a[..., 5:]], dim=-1) for a, b in zip(plain, iou, strict=True)]
    boxes, scores = build(iou_factor=factor, score=score).decode(outputs)
    expected_boxes, classes = build(score=score).decode([torch.where(torch.arange(8) == 4, 100.0, a) for a in plain])
    assert torch.equal(boxes, expected_boxes)
    quality = torch.cat(
        [
            (a[..., 4].sigmoid() ** (1 - factor) * b[..., 0].sigmoid() ** factor).permute(0, 2, 3, 1).flatten(1)
            for a, b in zip(plain, iou, strict=True)
        ],
        dim=1,
    )
    torch.testing.assert_close(scores, quality[..., None] * classes)
    _, dropped = build(iou_factor=factor, score=score, objectness_threshold=0.4).decode(outputs)
    torch.testing.assert_close(dropped, scores * (quality > 0.4)[..., None])
