"""Speed of detection in images per second, and of its parts: network, decoding, NMS.

python3 -m benchmarks.inference [--device cpu|cuda] [--batches 1 32] [--networks darknet mobilenet] [--ways torch ...]

darknet     Darknet-53 with the settings' neck at 416 px, the default of args.yaml
mobilenet   MobileNetV3-large with the same neck at 416 px
ssdlite     torchvision's ssdlite320_mobilenet_v3_large at 416 px with its own post-processing, which finds nothing with
            random weights: a peer's network, not its NMS

torch: eager, in float32 and bfloat16, as `detect.py` runs it (batch norm folded, on x86 the convolutions of
`FusedConv2d`); unfolded: the network as it trains, float32; compiled: torch.compile, bfloat16 on CUDA; onnx: exported
to a temporary file and run by ONNX Runtime. Random weights. Decoding and NMS get random outputs, of which 1,000 per
image pass the threshold, as of a trained detector at 0.001. Prints one table: images/s of all parts together,
milliseconds per image (medians; spread of the network), the share of NMS, and the network's share of the matrix
product rate. About a minute on 2 CPU cores, where `compiled` is measured only when asked for: the compiler alone takes
a minute per network.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detection.config.command_line import Parser, at_least_one
from detection.config.loading import load_settings
from detection.config.settings import Settings
from detection.contract import Detector
from detection.data.workers import prepare_process
from detection.errors import exit_with_message
from detection.inference.export.onnx_export import ExportOptions, build_onnx
from detection.inference.folding import prepare_inference
from detection.inference.onnx_model import OnnxModel
from detection.inference.weights import OpenedDetector
from detection.models import build_detector
from detection.runtime.devices import (
    Machine,
    autocast,
    choose_device,
    compile_forward,
    describe_device,
    emulates_bfloat16,
    synchronize,
)
from detection.training.throughput import matmul_rates

ARGS = Path(__file__).resolve().parent.parent / "yolo-v3" / "args.yaml"
SIZE, CLASSES = 416, 80
CANDIDATES = 1000  # per image
NETWORKS = {"darknet": "darknet", "mobilenet": "mobilenet_v3_large"}
WAYS = ("torch", "unfolded", "compiled", "onnx")
HEADER = (
    f"{'network':<11}{'way':<20}{'batch':>5}{'images/s':>10}{'network ms':>12}{'spread':>18}"
    f"{'decode ms':>11}{'NMS ms':>8}{'NMS':>6}{'of matmul':>11}"
)


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.inference", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", nargs="+", type=at_least_one, help="default: 1 4 on the CPU, 1 8 32 elsewhere")
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS, "ssdlite"], choices=[*NETWORKS, "ssdlite"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all; see above")
    parser.add_argument("--repeats", type=at_least_one, help="default: 3 on the CPU, 20 elsewhere")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    on_cpu = device.type == "cpu"
    batches = arguments.batches or ([1, 4] if on_cpu else [1, 8, 32])
    repeats = arguments.repeats or (3 if on_cpu else 20)
    measure = functools.partial(milliseconds, device=device, repeats=repeats)
    dtypes = (torch.float32,) if emulates_bfloat16(device) else (torch.float32, torch.bfloat16)
    ceilings = {dtype: max(matmul_rates(3072, dtype, device, 3)) for dtype in dtypes}
    rates = ", ".join(f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.2f}" for dtype, rate in ceilings.items())
    print(
        f"{describe_device(device)}, torch {torch.__version__}, {SIZE} px, {CLASSES} classes, {CANDIDATES} candidates "
        f"per image; {repeats} repeats; matmul TFLOP/s: {rates}"
    )
    print(HEADER)
    for name in arguments.networks:
        if name == "ssdlite":
            for batch in batches:
                report_peer(batch, device, measure, ceilings[torch.float32])
            continue
        words = [f"model.backbone={NETWORKS[name]}", f"evaluation.image_size={SIZE}"]
        settings, _ = load_settings(ARGS, words=words)
        detector = build_detector(settings, CLASSES)
        detector.model.eval()
        operations = count_operations(detector.model)
        after = {batch: post_processing(detector, batch, device) for batch in batches}
        ways = arguments.ways or [way for way in WAYS if not (on_cpu and way == "compiled")]
        for way, dtype, network in open_ways(detector, settings, ways, device):
            for batch in batches:
                images = random_images(batch).to(device)

                def run(images: Tensor = images, network: Any = network, dtype: Any = dtype) -> Any:
                    with autocast(device, dtype):
                        return network(images)

                forward, (decode, nms) = measure(run), after[batch]
                median, spread = statistics.median(forward), f"{min(forward) / batch:.2f}..{max(forward) / batch:.2f}"
                total = median + decode + nms
                share = operations * batch / (median / 1e3) / ceilings[dtype or torch.float32]
                print(
                    f"{name:<11}{way:<20}{batch:>5}{batch / total * 1e3:>10.1f}{median / batch:>12.2f}{spread:>18}"
                    f"{decode / batch:>11.2f}{nms / batch:>8.2f}{nms / total:>6.1%}{share:>11.0%}",
                    flush=True,
                )


def random_images(batch: int) -> Tensor:
    """Make images, uint8 (B, 3, S, S), in the memory format of decoded images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def count_operations(model: nn.Module) -> int:
    """Count the floating point operations per image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_images(1))
    return counter.get_total_flops()


def open_ways(
    detector: Detector, settings: Settings, ways: list[str], device: torch.device
) -> Iterator[tuple[str, torch.dtype | None, Callable[[Tensor], Any]]]:
    """List name, autocast type (None: float32) and function of each way to run the network."""
    if "onnx" in ways:  # traced before the weights are moved to the device
        opened = OpenedDetector(detector, settings, None, CLASSES, 0, 0, [])
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "network.onnx"
            path.write_bytes(build_onnx(opened, ExportOptions(outputs="raw"))[0].SerializeToString())
            network = OnnxModel(path)
            used = network.use_device(str(device))
        yield f"onnx on {used}", None, network
    detector = detector.to(device, channels_last=True)
    model = detector.model
    if "unfolded" in ways:
        yield "unfolded float32", None, torch.no_grad()(model)
    if "torch" in ways:
        for dtype in (None,) if emulates_bfloat16(device) else (None, torch.bfloat16):
            prepared = prepare_inference(detector, Machine(device, dtype)).to(device, channels_last=True)
            yield f"torch {'float32' if dtype is None else 'bfloat16'}", dtype, torch.no_grad()(prepared.model)
    if "compiled" in ways:
        dtype = torch.bfloat16 if device.type == "cuda" else None
        name = f"compiled {'float32' if dtype is None else 'bfloat16'}"
        yield name, dtype, torch.no_grad()(compile_forward(model, device))


def post_processing(detector: Detector, batch: int, device: torch.device) -> tuple[float, float]:
    """Measure milliseconds per batch of decoding, and of NMS with the selection of candidates."""
    with torch.no_grad():
        shapes = [level.shape[1:] for level in detector.model(random_images(1))]
    generator = torch.Generator().manual_seed(0)
    outputs = [(torch.randn(batch, *shape, generator=generator) * 2).to(device) for shape in shapes]
    for level in outputs:
        level[..., :4] /= 4  # boxes near their anchors
    postprocess: Any = detector.postprocess.to(device)
    scores = postprocess.decode(outputs)[1].flatten()
    postprocess.confidence_threshold = float(scores.kthvalue(scores.numel() - CANDIDATES * batch).values)
    decode, rest = [], []
    for _ in range(11):
        decode += milliseconds(lambda: postprocess.decode(outputs), device, 1)
        rest += [time - decode[-1] for time in milliseconds(lambda: postprocess(outputs), device, 1)]
    return statistics.median(decode), statistics.median(rest)


def report_peer(batch: int, device: torch.device, measure: Callable[..., list[float]], ceiling: float) -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = (
        ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES + 1).to(device).eval()
    )
    model.transform.fixed_size = (SIZE, SIZE)
    images = list(random_images(batch).contiguous().to(device).float() / 255)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(images)
        whole = measure(lambda: model(images))
    median, spread = statistics.median(whole), f"{min(whole) / batch:.2f}..{max(whole) / batch:.2f}"
    share = counter.get_total_flops() / (median / 1e3) / ceiling
    print(
        f"{'ssdlite':<11}{'torch float32':<20}{batch:>5}{batch / median * 1e3:>10.1f}{median / batch:>12.2f}"
        f"{spread:>18}{share:>36.0%}",
        flush=True,
    )


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Measure each repeat, after one warm-up."""
    times = []
    for repeat in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        if repeat:
            times.append((time.perf_counter() - started) * 1e3)
    return times


if __name__ == "__main__":
    exit_with_message(main)
