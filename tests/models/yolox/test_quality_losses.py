"""Quality focal, varifocal and distribution focal loss by hand."""

import math

import pytest
import torch

from detection.models.yolox.losses import distribution_focal_loss, quality_focal_loss, varifocal_loss

LOG_3 = math.log(3)  # sigmoid(log 3) = 3/4


# BCE(z, y) with p = 3/4: -y log(3/4) - (1 - y) log(1/4)
@pytest.mark.parametrize(
    ("quality", "focal", "varifocal"),
    [
        (0.0, 0.75**2 * math.log(4), 0.75 * 0.75**2 * math.log(4)),
        (1.0, 0.25**2 * math.log(4 / 3), math.log(4 / 3)),
        (0.5, 0.25**2 * (math.log(4 / 3) + math.log(4)) / 2, 0.5 * (math.log(4 / 3) + math.log(4)) / 2),
        (0.75, 0.0, 0.75 * (0.75 * math.log(4 / 3) + 0.25 * math.log(4))),
    ],
)
def test_scores_by_hand(quality: float, focal: float, varifocal: float) -> None:
    logits, wanted = torch.tensor([LOG_3]), torch.tensor([quality])
    assert float(quality_focal_loss(logits, wanted)) == pytest.approx(focal, abs=1e-6)
    assert float(varifocal_loss(logits, wanted)) == pytest.approx(varifocal, abs=1e-6)


def test_the_weight_of_varifocal_loss_has_no_gradient() -> None:
    logits = torch.tensor([LOG_3], requires_grad=True)
    varifocal_loss(logits, torch.tensor([0.0])).sum().backward()
    assert logits.grad is not None
    assert float(logits.grad) == pytest.approx(0.75 * 0.75**2 * 0.75)  # weight * (p - q)


def test_distribution_by_hand() -> None:
    """Bins 1, 2 and 5 parts of 8; y = 1.25 is three quarters of bin 1 and one quarter of bin 2."""
    logits = torch.tensor([1.0, 2.0, 5.0]).log().expand(1, 2, 3)
    loss = distribution_focal_loss(logits, torch.tensor([[1.25, 0.0]]))
    first, second = -(0.75 * math.log(2 / 8) + 0.25 * math.log(5 / 8)), -math.log(1 / 8)
    assert loss.tolist() == pytest.approx([(first + second) / 2])


@pytest.mark.parametrize(("target", "expected"), [(-3.0, 8 / 1), (99.0, (8 / 2) ** 0.01 * (8 / 5) ** 0.99)])
def test_distribution_beyond_its_range_takes_the_outer_bins(target: float, expected: float) -> None:
    logits = torch.tensor([1.0, 2.0, 5.0]).log().expand(1, 1, 3)
    loss = float(distribution_focal_loss(logits, torch.tensor([[target]])))
    assert loss == pytest.approx(math.log(expected), abs=1e-5)
