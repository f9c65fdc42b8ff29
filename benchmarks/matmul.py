"""Rate of square matrix products: the ceiling that every speed of the same minute is compared with.

python3 -m benchmarks.matmul [--device cpu|cuda] [--size 4096]

Prints one table; takes about 10 seconds on 2 CPU cores.
"""

import argparse
import statistics
import time

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, n = {arguments.size}")
    print(f"{'type':<10}{'best TFLOP/s':>14}{'median':>10}")
    for dtype in (torch.float32, torch.bfloat16):
        rates = [rate / 1e12 for rate in measure(arguments.size, dtype, device, arguments.repeats)]
        print(f"{str(dtype).removeprefix('torch.'):<10}{max(rates):>14.3f}{statistics.median(rates):>10.3f}")


def measure(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> list[float]:
    """Floating point operations per second of each repeat, after one warm-up."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rates = []
    for repeat in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            rates.append(2 * size**3 / (time.perf_counter() - started))
    return rates


if __name__ == "__main__":
    main()
