"""Files written by export.py: their metadata, and what a module needs that runs one in place of a PyTorch network."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from detection.config.loading import changed_settings
from detection.config.settings import Settings
from detection.contract import Detector, Geometry
from detection.errors import CheckpointError, SettingsError
from detection.foreign_files import clean
from detection.models import POSTPROCESSES, upgrade_metadata
from detection.models.postprocess import DecodedPostprocess, FinalDetections, Selection

OutputKind = Literal["raw", "decoded", "nms"]
NMS_SETTINGS = [f"evaluation.{name}" for name in ("confidence_threshold", "iou_threshold", "max_detections")]


class Description(BaseModel):
    """Metadata of an exported file: each field is an entry with a JSON value."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    program: str  # name and version of the program that wrote the file
    output_kind: OutputKind
    network: str = ""  # `Detector.name`; empty in older files, which hold YOLO with the backbone of their settings
    names: tuple[str, ...]  # class of each label; class_0, class_1, ... if the weights had no names
    category_ids: tuple[int, ...] | None  # of the training annotations; None: unknown
    input: Literal["uint8", "float"]  # RGB 0..255, or 0..1
    image_size: int  # side of the square input in pixels; with dynamic_size the validation size
    dynamic_size: bool  # any height and width that are multiples of size_multiple
    size_multiple: int
    int8: bool = False  # convolutions and what lies between them compute in 8 bits
    half: bool  # the network computes in float16; inputs, outputs, decoding and NMS do not
    geometry: dict[str, Any]  # placement, fill, interpolation, rounding, ...: how an image becomes the input
    strides: tuple[int, ...]  # of raw outputs
    decoding: dict[str, Any]  # `Detector.metadata`: what decodes raw outputs
    score: str  # formula of the detection score, as text
    deviations: tuple[str, ...] = ()  # from the evaluation protocol; older files do not say
    thresholds: dict[str, Any]  # confidence, iou, max_detections (per image and class)
    held_settings: dict[Literal["network", "decoding"], list[str]]  # see `Detector.held_settings`
    settings: dict[str, Any]  # the section `model` and that of the detector
    parameters: int  # number of weights of the network
    step: int
    seen: int

    def to_metadata(self) -> dict[str, str]:
        """Format the fields as entries of a file's metadata."""
        return {key: json.dumps(value) for key, value in self.model_dump(mode="json").items()}

    def settings_tree(self) -> dict[str, Any]:
        """Return the settings stored in the file, nested by section."""
        evaluation = {
            "image_size": self.image_size,
            "confidence_threshold": self.thresholds["confidence"],
            "iou_threshold": self.thresholds["iou"],
            "max_detections": self.thresholds["max_detections"],
        }
        return {**self.settings, "evaluation": evaluation}


class ExportedModel(nn.Module):
    """Module that runs an exported file, called like a detector's model; has no torch parameters.

    Args:
        path: of the file.
        metadata: its entries, see `Description.to_metadata`.
        weights: names and values.

    Attributes:
        runtime: what runs it, for messages.

    Raises:
        CheckpointError: the file was written by another program, its metadata is damaged, or a weight is not finite.
    """

    runtime = ""

    def __init__(self, path: Path, metadata: dict[str, str], weights: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.path = path
        self.description = read_metadata(metadata, path)
        refuse_non_finite(weights, path)
        self.strides = self.description.strides
        self.size_multiple = self.description.size_multiple
        self.num_parameters = self.description.parameters

    def use_device(self, name: str) -> str:
        """Select the device of a `run.device` setting; returns the one in use (`auto` is the CPU).

        Raises:
            SettingsError: the file cannot run there.
        """
        if name in ("auto", "cpu"):
            return "cpu"
        raise SettingsError(f"device {name!r}: {self.path} runs on cpu here")

    def compute(self, images: Tensor) -> list[Tensor]:
        """Run the file on its own input, uint8 or float (B, 3, H, W), on the CPU; outputs in the order of the file."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        """Run the network.

        Args:
            images: uint8 RGB (B, 3, H, W), of a size that the file accepts.

        Returns:
            Depending on `output_kind`: "raw": logits per level; "decoded": all boxes (B, P, 4) and scores (B, P, C);
            "nms": final boxes (K, 4), scores, labels and image_index (K,), and the image numbers 0..B-1 (B,).
        """
        values = images.contiguous().cpu()
        if self.description.input == "float":
            values = values.float() / 255
        outputs = [output.to(images.device) for output in self.compute(values)]
        if self.description.output_kind == "nms":
            outputs.append(torch.arange(len(images), device=images.device))
        return outputs


def refuse_non_finite(weights: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Check the weights of a network, which would find no boxes with NaN in them.

    Args:
        weights: names and values.
        path: their file.

    Raises:
        CheckpointError: a tensor has NaN or infinity.
    """
    finite = {name: bool(torch.isfinite(value).all()) for name, value in weights}
    if bad := [name for name in finite if not finite[name]]:
        raise CheckpointError(
            f"{path} is of no use: {len(bad)} of its {len(finite)} tensors have NaN or infinity ({clean(bad[0])}); "
            "the training that wrote it went wrong, take an earlier checkpoint"
        )


def build_exported(model: ExportedModel, own: Settings, settings: Settings) -> Detector:
    """Build the detector of an exported file; it has no criterion.

    Args:
        own: settings of the file.
        settings: the same with the changes of the command line, checked by `refuse_changes`.
    """
    description, evaluation = model.description, settings.evaluation
    postprocess: nn.Module
    if description.output_kind == "nms":
        postprocess = FinalDetections()
    elif description.output_kind == "decoded":
        postprocess = DecodedPostprocess(
            evaluation.confidence_threshold,
            evaluation.iou_threshold,
            evaluation.max_detections,
            not description.decoding.get("one_to_one", False),
            Selection(**description.decoding.get("selection", {})),
        )
    else:
        postprocess = POSTPROCESSES[settings.model.detector](description.decoding, settings)
    geometry = Geometry(**{key: _tuple(value) for key, value in description.geometry.items()})
    # The file holds the detector's own geometry; the settings matter only where the command line changed them.
    changed = {name: getattr(settings.model, name) for name in ("placement", "rounding", "interpolation", "fill")}
    changed = {name: value for name, value in changed.items() if value not in (None, getattr(own.model, name))}
    return Detector(
        model,
        None,
        postprocess,
        dataclasses.replace(geometry, **changed),
        name=description.network or settings.model.backbone,
        score=description.score,
        deviations=description.deviations,
        metadata=description.decoding,
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_metadata(metadata: dict[str, str], path: Path) -> Description:
    """Parse the metadata that export.py writes.

    Raises:
        CheckpointError: the metadata was written by another program, or is damaged.
    """
    if "program" not in metadata or "output_kind" not in metadata:
        raise CheckpointError(f"{path} has no metadata of export.py: only files that it wrote can be read here")
    try:
        entries = {key: json.loads(value) for key, value in metadata.items()}
        return Description.model_validate(upgrade_metadata(entries))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: its metadata is damaged or of another version: {reason}") from None


def refuse_changes(model: ExportedModel, own: Settings, settings: Settings) -> None:
    """Refuse changes to settings that are fixed in the exported graph.

    Args:
        own: settings of the file.
        settings: the same with the changes of the command line.

    Raises:
        SettingsError: names the setting and the export that has the wanted value.
    """
    description = model.description
    if settings.run.precision not in ("auto", "off"):
        raise SettingsError(
            f"run.precision = {settings.run.precision!r}: {model.path} computes as exported; see export.py --half"
        )
    held = [f"model.{name}" for name in ("detector", "backbone", "cfg", "batch_norm")]
    held += description.held_settings["network"]
    held += [] if description.dynamic_size else ["evaluation.image_size"]
    held += [] if description.output_kind == "raw" else description.held_settings["decoding"]
    held += NMS_SETTINGS if description.output_kind == "nms" else []
    for key, (old, new) in changed_settings(own, settings).items():
        if key in held:
            hint = " with --dynamic-size" if key == "evaluation.image_size" else ""
            raise SettingsError(
                f"{key} = {new!r}: {model.path} was exported with {old!r} inside; export the weights again{hint}"
            )
