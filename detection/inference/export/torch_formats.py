"""Export a detector to TorchScript and torch.export, with batch norm folded and without NMS."""

import dataclasses
from pathlib import Path

import torch

from detection.errors import SettingsError
from detection.inference.export.onnx_export import ExportedDetector, ExportOptions, describe, example_images
from detection.inference.folding import fold
from detection.inference.torch_programs import save_exported_program, save_torchscript
from detection.inference.weights import OpenedDetector


def write_torchscript(opened: OpenedDetector, options: ExportOptions, path: Path) -> Path:
    """Trace the detector, for the size of its settings and any batch; returns the path."""
    images, _ = example_images(opened, options)
    save_torchscript(folded(opened, options, images), images, path, describe(opened, options).to_metadata())
    return path


def write_exported_program(opened: OpenedDetector, options: ExportOptions, path: Path) -> Path:
    """Export the detector with torch.export; returns the path.

    Raises:
        SettingsError: torch cannot export the network.
    """
    images, sizes = example_images(opened, options)
    module = folded(opened, options, images)
    try:
        save_exported_program(module, images, sizes, path, describe(opened, options).to_metadata())
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        hint = " with --dynamic-size" if options.dynamic_size else ""
        raise SettingsError(f"torch cannot export this network{hint}: {' '.join(str(error).split())[:300]}") from None
    return path


def folded(opened: OpenedDetector, options: ExportOptions, images: torch.Tensor) -> ExportedDetector:
    """The module to export: the network with folded batch norm, and the decoding."""
    detector = opened.detector.replace(model=fold(opened.detector.model, images[:1]))
    with_folded = dataclasses.replace(opened, detector=detector)
    return ExportedDetector(with_folded, options.outputs != "raw", levels=False).eval()
