"""Time that a checkpoint takes: in the training loop, and in total.

python3 -m benchmarks.checkpoint                                   Darknet-53 with Adam and an EMA
python3 -m benchmarks.checkpoint model.backbone=mobilenet_v3_small

The loop waits for `save` alone, which copies; a thread writes, reads back and renames.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from detection.checkpoints import load_checkpoint
from detection.config.command_line import DEFAULTS, Parser, at_least_one, device_flags
from detection.config.loading import load_settings
from detection.data.workers import prepare_process
from detection.errors import OutputError, exit_with_message
from detection.models import build_detector
from detection.runtime.devices import build_scaler, choose_device, describe_device
from detection.training.checkpoint_writer import CheckpointWriter
from detection.training.dry_run import tensor_bytes
from detection.training.state import RunState


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.checkpoint", __doc__)
    parser.add_settings()
    parser.add_argument("--repeats", type=at_least_one, default=5, metavar="N", help="saves measured (default: 5)")
    parser.add_argument("--directory", type=Path, metavar="DIRECTORY", help="disk to write to (default: the temporary)")
    arguments = parser.parse_intermixed_args()
    words = ["train.ema_decay=0.9998", *arguments.settings]
    settings, _ = load_settings(DEFAULTS, arguments.config, words, device_flags(arguments))
    if arguments.directory is not None and not arguments.directory.is_dir():
        raise OutputError(f"--directory {arguments.directory}: is no directory")
    device = choose_device(settings.run.device)
    detector = build_detector(settings, settings.model.num_classes or 80)
    state = RunState(detector.to(device, True).model, settings.train, None, build_scaler(device, None))
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # the optimizer has its state now
    content = state.content()
    size = tensor_bytes(content)

    waits, writes = [], []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        writer = CheckpointWriter(Path(directory))
        for _ in range(arguments.repeats + 1):
            started = time.perf_counter()
            writer.save(content)
            waits.append(time.perf_counter() - started)
            writer.wait()
            writes.append(time.perf_counter() - started)
        started = time.perf_counter()
        load_checkpoint(Path(directory) / "last.pt")
        loading = time.perf_counter() - started
    print(f"{describe_device(device)}, torch {torch.__version__}, {settings.model.backbone}, {size / 2**20:.0f} MiB")
    print(f"{'seconds':<40}{'median':>8}{'spread':>16}{'first':>8}")
    for name, values in (("the loop waits (save)", waits), ("until it is verified on the disk", writes)):
        rest = values[1:]
        spread = f"{min(rest):.2f}..{max(rest):.2f}"
        print(f"{name:<40}{statistics.median(rest):>8.2f}{spread:>16}{values[0]:>8.2f}")
    print(f"{'loading with its digest':<40}{loading:>8.2f}")


if __name__ == "__main__":
    exit_with_message(main)
