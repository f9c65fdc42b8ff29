"""Soft-NMS against a plain loop, and what a detector's own selection adds to thresholds and NMS."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from detection.inference.export.nms_graph import add_nms, nms_text
from detection.models.postprocess import DecodedPostprocess, Selection
from detection.ops.soft_nms import soft_nms
from tests.support.slow_boxes import slow_iou


def slow_soft_nms(boxes: Tensor, scores: Tensor, groups: Tensor, sigma: float, min_score: float) -> list:
    """[(index, final score)] of each group on its own, one box at a time, then sorted together."""
    found = []
    for group in set(groups.tolist()):
        left = {index: scores[index].item() for index in range(len(scores)) if groups[index] == group}
        while left:
            best = max(left, key=lambda index: (left[index], -index))
            score = left.pop(best)
            if score > min_score:
                found.append((best, score))
            for index in left:
                left[index] *= math.exp(-(slow_iou(boxes[best].tolist(), boxes[index].tolist()) ** 2) / sigma)
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def some_boxes(seed: int, count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner, side = (torch.rand(count, 2, generator=generator) * 20 for _ in range(2))
    scores, groups = torch.rand(count, generator=generator), torch.randint(3, (count,), generator=generator)
    return torch.cat([corner, corner + side + 1], dim=1), scores, groups


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [None, 10])
def test_soft_nms_is_that_of_a_loop(seed: int, most: int | None) -> None:
    boxes, scores, groups = some_boxes(seed)
    kept, final = soft_nms(boxes, scores, groups, 0.5, 0.2, most)
    expected = slow_soft_nms(boxes, scores, groups, 0.5, 0.2)[:most]
    assert kept.tolist() == [index for index, _ in expected] and len(kept) < 40
    torch.testing.assert_close(final, torch.tensor([score for _, score in expected]))
    kept, _ = soft_nms(boxes, scores, groups, 0.5, 0.2, most, max_per_group=2)
    assert all(count <= 2 for count in groups[kept].bincount().tolist())
    ranks = [groups[kept[:place]].eq(groups[index]).sum().item() for place, index in enumerate(kept)]
    assert ranks == sorted(ranks) or max(ranks) < 2


def test_soft_nms_by_hand() -> None:
    """Two equal boxes: IoU 1, so the second one keeps exp(-2) of its score; a third one is far away."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8], [50, 50, 60, 60]])
    kept, final = soft_nms(boxes, torch.tensor([0.5, 0.9, 0.3]), torch.zeros(3, dtype=torch.int64), 0.5, 0.001)
    assert kept.tolist() == [1, 2, 0] and final.tolist() == pytest.approx([0.9, 0.3, 0.5 * math.exp(-2)])
    kept, _ = soft_nms(boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5, 0.001)
    assert kept.shape == (0,)
    boxes[1] = torch.inf  # changes no other score
    kept, final = soft_nms(boxes, torch.tensor([0.5, 0.9, 0.3]), torch.zeros(3, dtype=torch.int64), 0.5, 0.001)
    assert kept.tolist() == [1, 0, 2] and final.tolist() == pytest.approx([0.9, 0.5, 0.3])


def decoded(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner, side = (torch.rand(2, 30, 2, generator=generator) * 40 for _ in range(2))
    scores = (torch.rand(2, 30, 4, generator=generator) * 20).round() / 20  # many are equal
    return torch.cat([corner, corner + side + 1], dim=2), scores


def test_limits_of_candidates_and_of_an_image() -> None:
    """Of equal scores the first prediction counts, then the first class: a sort of all pairs, one image at a time."""
    boxes, scores = decoded(0)
    limited = DecodedPostprocess(0.3, 0.5, None, selection=Selection(max_candidates=25, max_per_image=6))
    for image, found in enumerate(limited([boxes, scores])):
        pairs = sorted(np.ndindex(30, 4), key=lambda pair: -scores[image][pair].item())[:25]  # stable
        few = torch.zeros(30, 4)
        for pair in pairs:
            few[pair] = scores[image][pair]
        (everything,) = DecodedPostprocess(0.3, 0.5, None)([boxes[image, None], few[None]])
        assert len(everything["scores"]) > 6
        for name, values in found.items():
            assert torch.equal(values, everything[name][:6])
    no_limit = DecodedPostprocess(0.3, 0.5, None, selection=Selection(max_candidates=1000, max_per_image=1000))
    for found, everything in zip(
        no_limit([boxes, scores]), DecodedPostprocess(0.3, 0.5, None)([boxes, scores]), strict=True
    ):
        assert all(torch.equal(found[name], everything[name]) for name in found)
    scores[0, 3, 1] = torch.nan  # is no candidate, and takes no other one's place
    assert len(limited([boxes, scores])[0]["scores"]) == 6


def test_soft_selection_of_images() -> None:
    boxes, scores = decoded(1)
    postprocess = DecodedPostprocess(0.3, 0.5, 100, selection=Selection(max_per_image=9, soft_sigma=0.5))
    for image, found in enumerate(postprocess([boxes, scores])):
        prediction, label = (scores[image] > 0.3).nonzero(as_tuple=True)
        values = scores[image, prediction, label]
        expected = slow_soft_nms(boxes[image, prediction], values, label, 0.5, 0.3)[:9]
        assert found["labels"].tolist() == [label[index].item() for index, _ in expected]
        torch.testing.assert_close(found["scores"], torch.tensor([score for _, score in expected]))
    nothing = postprocess([boxes, scores * 0])
    assert [found["boxes"].shape for found in nothing] == [(0, 4), (0, 4)]


@pytest.mark.parametrize("limits", [(30, None), (None, 7), (50, 7), (1000, 1000)])
def test_the_limits_in_an_exported_graph(limits: tuple[int | None, int | None]) -> None:
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    boxes, _ = decoded(2)
    scores = torch.rand(2, 30, 4, generator=torch.Generator().manual_seed(3))  # all different: ties stay in the graph
    text = nms_text(10, 18, 0.1, 0.5, 20, Selection(*limits))
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
    results = session.run(None, {"all_boxes": boxes.numpy(), "all_scores": scores.numpy()})
    found_boxes, found_scores, labels, image_index = map(torch.from_numpy, results)
    for image, expected in enumerate(DecodedPostprocess(0.1, 0.5, 20, selection=Selection(*limits))([boxes, scores])):
        rows = image_index == image
        for name, values in (("boxes", found_boxes), ("scores", found_scores), ("labels", labels)):
            assert torch.equal(values[rows], expected[name])


def test_soft_nms_cannot_be_exported() -> None:
    with pytest.raises(Exception, match="ONNX has no operator for soft-NMS") as caught:
        add_nms(None, DecodedPostprocess(selection=Selection(soft_sigma=0.5)))
    assert type(caught.value).__name__ == "SettingsError"
