"""Speed summary, profile and prefetching."""

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from detection.errors import DataReadError
from detection.models import build_detector
from detection.runtime.devices import CUDA_GRAPHS, compile_forward
from detection.runtime.profiling import RECORDED, SHOWN, TRACE, WARM_UP, StepProfiler, waiting_for_data
from detection.training import prefetch
from detection.training.prefetch import Prefetcher
from detection.training.throughput import Throughput, flops_per_pixel, matmul_ceiling, summary_lines

CPU = torch.device("cpu")


# Summary


class TwoConvolutions(nn.Module):
    strides = (2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 5, 1, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(images.float()))


def test_operations_by_hand() -> None:
    # per pixel: a quarter has 8 outputs of 3 * 9 products, a sixteenth 5 of 8; two operations each; backward is twice
    assert flops_per_pixel(TwoConvolutions(), 4) == pytest.approx(3 * 2 * (8 * 27 / 4 + 5 * 8 / 16))


def test_operations_of_darknet_53_are_the_published_ones(default_settings) -> None:
    """65.86 billion at 416 px for YOLOv3 on COCO (the table of https://pjreddie.com/darknet/yolo), forward."""
    settings = default_settings()
    model = build_detector(settings, 80).model.train()
    before = model.get_buffer("backbone.stem.1.running_mean").clone()
    assert flops_per_pixel(model, 32) * 416**2 / 3 == pytest.approx(65.86e9, rel=0.01)
    assert model.training and torch.equal(model.get_buffer("backbone.stem.1.running_mean"), before)


def test_summary_by_hand() -> None:
    # 2 processes of 40 images of 10 x 10 in 8 s: 10 images/s; 50 operations per pixel: 25,000/s of 100,000 each
    total = Throughput(images=40, pixels=4000, seconds=8.0, waited=0.4)
    speed, cost = summary_lines(total, 2, 50.0, 100_000.0, "bfloat16", 205, 1.25)
    assert "10.0 images/s" in speed and "25% of the ceiling (bfloat16" in speed and "waiting for data 5.0%" in speed
    assert "20.5 s per epoch of 205 images" in cost and "1.2 GiB" in cost
    assert "not measured" in summary_lines(total, 2, 50.0, None, "float32", 205, 1.0)[0]
    assert summary_lines(Throughput(), 1, 50.0, 1.0, "float32", 205, 1.0) == []


def test_products_that_would_take_long_are_left_out(monkeypatch) -> None:
    tried: list[int] = []

    def rates(size: int, *_: Any) -> list[float]:  # 2 * 768^3 = 0.9e9 operations take 0.23 s
        tried.append(size)
        return [4e9]

    monkeypatch.setitem(matmul_ceiling.__globals__["MATRIX_SIDES"], "cpu", 3072)
    monkeypatch.setitem(matmul_ceiling.__globals__, "matmul_rates", rates)
    assert matmul_ceiling(CPU, torch.bfloat16) == 4e9 and tried == [384, 768]


def test_ceiling_without_memory_is_none(monkeypatch) -> None:
    monkeypatch.setitem(matmul_ceiling.__globals__["MATRIX_SIDES"], "cpu", 64)
    assert matmul_ceiling(CPU, torch.bfloat16) > 0

    def no_memory(*_: Any) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(matmul_ceiling.__globals__, "matmul_rates", no_memory)
    assert matmul_ceiling(CPU, None) is None


# Profile


def take_profiled_steps(directory: Path, steps: int, enabled: bool = True) -> list[str]:
    lines: list[str] = []
    profiler = StepProfiler(directory, CPU, lines.append, enabled)
    for _ in range(steps):
        with waiting_for_data():
            time.sleep(0.002)
        torch.ones(300, 300) @ torch.ones(300, 300)
        profiler.step()
    profiler.close()
    return lines


def test_profile_names_operations_and_the_wait_and_writes_a_trace(tmp_path: Path) -> None:
    lines = take_profiled_steps(tmp_path, WARM_UP + RECORDED + 3)
    assert "waiting for data" in lines[0] and str(tmp_path / TRACE) in lines[-1]
    waited = float(lines[0].split("waiting for data ")[1].split("%")[0])
    assert 20 < waited < 100  # 2 ms beside some products
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:-1]}
    assert rows["aten::mm"][2] == "1" and rows["aten::fill_"][2] == "2" and len(rows) <= SHOWN  # calls per step
    events = json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == RECORDED


def test_profile_of_too_few_steps_says_so(tmp_path: Path) -> None:
    (line,) = take_profiled_steps(tmp_path, 4)
    assert "4 of 8 steps" in line and not list(tmp_path.iterdir())
    assert take_profiled_steps(tmp_path, 20, enabled=False) == [] and not list(tmp_path.iterdir())


# Prefetching


class Event:
    pass


class Stream:
    """Replaces a CUDA stream; logs what is recorded and waited for."""

    def __init__(self) -> None:
        self.waited: list[Event] = []

    def record_event(self) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@pytest.fixture
def current(monkeypatch) -> Stream:
    """Pretend that the CPU is a CUDA device; returns the stream that computes."""
    stream = Stream()
    cuda = SimpleNamespace(
        Stream=lambda device: Stream(), stream=lambda stream: stream, current_stream=lambda device: stream, Event=Event
    )
    monkeypatch.setattr(prefetch, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(int(tensor.flatten()[0])))
    monkeypatch.setattr(prefetch, "batch_to_device", lambda batch, device: (batch["images"] + 0, {
        name: batch[name] + 0 for name in ("boxes", "labels")}))  # fmt: skip
    recorded: list[int] = []
    stream.recorded = recorded  # type: ignore[attr-defined]
    return stream


def numbered(count: int, taken: list[int], error: Exception | None = None) -> Iterator[dict[str, Any]]:
    for number in range(count):
        taken.append(number)
        yield {name: torch.full((1,), number) for name in ("images", "boxes", "labels")} | {"indices": number}
    if error is not None:
        raise error


CUDA = torch.device("cuda")


def test_batches_come_in_order_and_are_waited_for(current: Stream) -> None:
    taken: list[int] = []
    batches = Prefetcher(numbered(7, taken), CUDA)
    found = [next(batches)]  # nothing was asked for yet
    assert taken == [0] and not current.waited
    batches.prefetch(2)
    assert taken == [0, 1, 2]
    batches.prefetch(2)
    assert taken == [0, 1, 2]  # they are there
    found += [next(batches), next(batches), next(batches)]
    assert len(current.waited) == 2 and current.recorded == [1] * 3 + [2] * 3  # type: ignore[attr-defined]
    batches.prefetch(9)
    found += list(batches)
    assert [batch["indices"] for batch in found] == [int(batch["images"]) for batch in found] == list(range(7))


def test_an_error_comes_after_the_batches_before_it(current: Stream) -> None:
    batches = Prefetcher(numbered(2, [], DataReadError("image 7 cannot be read")), CUDA)
    batches.prefetch(4)  # says nothing: the step that computes is finished and counted first
    assert [next(batches)["indices"], next(batches)["indices"]] == [0, 1]
    for _ in range(2):
        with pytest.raises(DataReadError, match="image 7"):
            next(batches)
    batches.prefetch(4)


def test_elsewhere_batches_pass_through() -> None:
    taken: list[int] = []
    batches = Prefetcher(numbered(3, taken), CPU)
    batches.prefetch(2)
    assert taken == []
    assert [batch["indices"] for batch in batches] == [0, 1, 2]


@pytest.mark.gpu
def test_prefetched_batches_are_those_of_the_loader() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = [torch.randint(0, 256, (8, 3, 256, 256), dtype=torch.uint8).pin_memory() for _ in range(20)]
    source = ({"images": image, "boxes": torch.zeros(1), "labels": torch.zeros(1)} for image in images)
    batches = Prefetcher(iter(source), CUDA)
    for image in images:
        sums = next(batches)["images"].to("cuda").long().sum()
        batches.prefetch(2)
        assert sums.item() == image.long().sum()


@pytest.mark.gpu
def test_cuda_graphs_accumulate_the_gradient_of_eager_mode() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.LeakyReLU(0.1)).to(CUDA)
    compiled = compile_forward(network, CUDA, mode=CUDA_GRAPHS)

    def gradients(called: torch.nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(1)
        kept = []
        for _ in range(5):  # the first ones warm up and record
            network.zero_grad(set_to_none=True)
            for _ in range(3):  # subdivisions
                called(torch.randn(2, 3, 16, 16, device=CUDA)).square().sum().backward()
            kept += [parameter.grad.clone() for parameter in network.parameters()]
        return kept

    torch.testing.assert_close(gradients(compiled), gradients(network))
