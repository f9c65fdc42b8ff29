"""Time of the optimizer, EMA and batch-norm statistics, relative to a copy of the same bytes.

python3 -m benchmarks.optimizer                                     Darknet-53: 222 + 216 tensors
python3 -m benchmarks.optimizer --backbone mobilenet_v3_small --device cuda

Prints one table: EMA, optimizers in their three forms, clipping, statistics of the batch-norm layers; median
and spread, and the ratio to the copy of the same tensors that is measured in turn with them. About a minute on 2 cores.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.support.timing import milliseconds
from detection.config.command_line import DEFAULTS, Parser, at_least_one
from detection.config.loading import load_settings
from detection.data.workers import prepare_process
from detection.errors import exit_with_message
from detection.models import build_detector
from detection.runtime.devices import choose_device, describe_device
from detection.training.moving_average import ExponentialMovingAverage
from detection.training.optimizer import build_optimizer
from detection.training.skipped_steps import BatchNormStatistics, step_if
from detection.training.throughput import matmul_ceiling

FORMS = ("fused", "foreach", "per tensor")


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.optimizer", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="darknet")
    parser.add_argument("--repeats", type=at_least_one, default=7)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    settings, _ = load_settings(DEFAULTS, words=[f"model.backbone={arguments.backbone}"])
    model = build_detector(settings, 80).to(device, channels_last=True).model
    finite = torch.tensor(True, device=device)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    weights = list(model.parameters())
    mebibytes = sum(parameter.nbytes for parameter in weights) / 2**20
    ceiling = (matmul_ceiling(device, None) or 0) / 1e12
    print(
        f"{describe_device(device)}, torch {torch.__version__}, {arguments.backbone}: {len(weights)} weights, "
        f"{mebibytes:.0f} MiB in float32; matrix products {ceiling:.2f} TFLOP/s"
    )
    print(f"{'':<34}{'ms':>9}{'spread':>18}{'copy ms':>10}{'copies':>8}")

    def show(name: str, function: Callable[[], object], tensors: Sequence[Tensor]) -> None:
        compare(name, function, tensors, device, arguments.repeats)

    # As in a run: the statistics are joined before the average is made.
    kept = BatchNormStatistics(model)
    average = ExponentialMovingAverage(model, 0.9998, 2000)
    state = list(model.state_dict().values())
    show("EMA", lambda: average.update(model, 100_000, finite), state)
    show("  finding its tensors anew", lambda: (average.model.state_dict(), model.state_dict()), state)
    show("clipping", lambda: nn.utils.clip_grad_norm_(weights, 1e9), weights)
    statistics_ = [kept.floats, kept.counters]
    show("statistics: keep", kept.keep, statistics_)
    show("statistics: settle", lambda: kept.settle(finite), statistics_)
    for name in ("adam", "adamw", "sgd"):
        for form in FORMS:
            optimizer = build_optimizer(model, settings.train.model_copy(update={"optimizer": name}))
            for group in optimizer.param_groups:
                group.update(fused=form == "fused", foreach=form == "foreach")
            step = (lambda o=optimizer: step_if(o, finite)) if form == "fused" else optimizer.step
            show(f"{name}, {form}", step, weights)


def compare(
    name: str, function: Callable[[], object], tensors: Sequence[Tensor], device: torch.device, repeats: int
) -> None:
    """Print a line; function and copy alternate, so that both run under the same conditions."""
    sources = [tensor.detach() for tensor in tensors]
    targets = [tensor.clone() for tensor in sources]

    @torch.no_grad()
    def copy() -> None:
        torch._foreach_copy_(targets, sources)

    times, copies = [], []
    for _ in range(repeats):
        times += milliseconds(function, device, 1)
        copies += milliseconds(copy, device, 1)
    median, of_copy = statistics.median(times), statistics.median(copies)
    spread = f"{min(times):.2f}..{max(times):.2f}"
    print(f"{name:<34}{median:>9.2f}{spread:>18}{of_copy:>10.2f}{median / of_copy:>8.2f}", flush=True)


if __name__ == "__main__":
    exit_with_message(main)
