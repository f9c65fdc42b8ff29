"""Rate of square matrix products, the upper bound that other speeds are compared with.

python3 -m benchmarks.matmul [--device cpu|cuda] [--size 4096]

Prints one table, of float32 and, unless it is emulated, bfloat16; takes 10 to 30 seconds on 2 CPU cores.
"""

import statistics

import torch

from detection.config.command_line import Parser, at_least_one
from detection.data.workers import prepare_process
from detection.errors import exit_with_message
from detection.runtime.devices import choose_device, emulates_bfloat16
from detection.training.throughput import matmul_rates


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.matmul", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=at_least_one, default=4096, help="rows and columns")
    parser.add_argument("--repeats", type=at_least_one, default=5)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, n = {arguments.size}")
    print(f"{'type':<10}{'best TFLOP/s':>14}{'median':>10}")
    for dtype in (torch.float32,) if emulates_bfloat16(device) else (torch.float32, torch.bfloat16):
        rates = [rate / 1e12 for rate in matmul_rates(arguments.size, dtype, device, arguments.repeats)]
        print(f"{str(dtype).removeprefix('torch.'):<10}{max(rates):>14.3f}{statistics.median(rates):>10.3f}")


if __name__ == "__main__":
    exit_with_message(main)
