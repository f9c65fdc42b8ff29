"""The memory estimate against a hand calculation and a real backward pass."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detection.runtime.devices import available_memory
from detection.training.memory.estimate import MemoryEstimate, estimate_memory
from tests.support.tiny_models import OneConvolution, Sum

CPU = torch.device("cpu")


def estimate(settings, model: nn.Module, size: int, *words: str) -> MemoryEstimate:
    train = settings(*words).train
    return estimate_memory(model, Sum(), train, train.micro_batch, size, contextlib.nullcontext, CPU)


def test_one_convolution_by_hand(default_settings) -> None:
    found = estimate(default_settings, OneConvolution(), 64, "train.batch_size=5", "train.optimizer=adam")
    assert found.activations == 5 * 64 * 64 * (3 + 4) * 4  # images, pixels, channels, bytes
    assert found.state == 12 * 4 * 4  # 12 weights; the weight, its gradient and two moments; bytes
    assert found.total == found.activations + found.state


@pytest.mark.parametrize(
    ("words", "copies"),
    [(["train.optimizer=sgd"], 3), (["train.optimizer=adamw"], 4), (["train.optimizer=sgd", "train.ema_decay=0.9"], 4)],
)
def test_state_counts_the_copies_of_the_weights(default_settings, words: list[str], copies: int) -> None:
    assert estimate(default_settings, OneConvolution(), 64, *words).state == 12 * 4 * copies


def test_nothing_is_changed(default_settings) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    network = OneConvolution()
    network.convolution = model  # type: ignore[assignment]
    network.train()
    model[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    estimate(default_settings, network, 64)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.training and not model[1].training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_weights_that_are_cast_do_not_grow_with_the_batch(default_settings) -> None:
    class Cast(OneConvolution):
        def forward(self, images: Tensor) -> list[Tensor]:
            weight = self.convolution.weight.expand(4, 3, 100, 100).contiguous().clone()  # a copy of fixed size
            return [(self.convolution(images.float()).square().sum() * weight.square().sum()).reshape(1)]

    one = estimate(default_settings, Cast(), 128, "train.batch_size=1").activations
    nine = estimate(default_settings, Cast(), 128, "train.batch_size=9").activations
    assert (nine - one) == pytest.approx(8 * 128 * 128 * (3 + 4) * 4, rel=0.01)
    assert one > 4 * 3 * 100 * 100 * 4


def test_line_names_all_parts() -> None:
    gib = 2**30
    line = MemoryEstimate(gib, gib, gib, 2, 10 * gib).line()
    assert "4.0 GiB of 10.0 GiB" in line and "optimizer 1.0" in line and "activations 3.0" in line
    assert "available" not in MemoryEstimate(gib, gib, gib, 2, None).line()


def test_available_memory_is_what_the_kernel_says() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc/meminfo on this system")
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    found = available_memory(CPU)
    assert found is not None and 0 < found <= total
