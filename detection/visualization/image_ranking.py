"""Run a detector over a dataset, unreadable images left out, and find its mistakes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from detection.contract import Batch
from detection.data.coco import CocoDataset
from detection.data.loaders import build_evaluation_loader, collate_samples
from detection.data.transforms import Sample
from detection.errors import DataReadError, escape, say
from detection.evaluation.detections import Detections
from detection.evaluation.evaluate import evaluate
from detection.evaluation.matching import match_detections
from detection.evaluation.mistakes import Findings, count_mistakes
from detection.evaluation.report import protocol_line
from detection.inference.weights import OpenedDetector
from detection.runtime.devices import Machine, describe_device


class Readable(torch.utils.data.Dataset):
    """Dataset that returns (position, error message) for an unreadable image instead of raising."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | tuple[int, str]:
        try:
            return self.dataset[index]
        except DataReadError as error:
            return index, error.line


def collate_readable(items: Sequence[Sample | tuple[int, str]]) -> dict[str, Any]:
    """Collate the samples of `Readable` to "batch" (None if there are none) and the rest to "unreadable"."""
    samples = [item for item in items if isinstance(item, Sample)]
    unreadable = [item for item in items if not isinstance(item, Sample)]
    return {"batch": collate_samples(samples) if samples else None, "unreadable": unreadable}


def find_mistakes(
    opened: OpenedDetector, machine: Machine, dataset: CocoDataset, unreadable: dict[int, str]
) -> Findings:
    """Run the detector on every readable image and count its mistakes.

    Args:
        opened: trained weights with their settings.
        machine: device and precision.
        unreadable: filled with position -> error message of the other images.

    Raises:
        DataReadError: no image can be read.
    """
    settings, device = opened.settings, machine.device
    say(f"{describe_device(device)}; {protocol_line(settings, opened.detector, dataset)}")
    detector = machine.to_device(opened.detector)
    batch_size = settings.evaluation.batch_size or settings.train.micro_batch
    loader = build_evaluation_loader(
        Readable(dataset), batch_size, settings.data.num_workers, device, collate=collate_readable
    )

    def batches() -> Iterator[Batch]:
        for loaded in tqdm(loader, unit="batch", disable=None):
            for index, line in loaded["unreadable"]:
                unreadable[index] = line
                tqdm.write(escape(f"left out: {line}"))
            if loaded["batch"] is not None:
                yield loaded["batch"]
        if len(unreadable) == len(dataset):
            raise DataReadError(f"none of {len(dataset)} images can be read; {unreadable[0]}")

    found = evaluate(
        detector.model,
        None,
        detector.postprocess,
        batches(),
        dataset.annotations,
        device,
        machine.autocast,
        settings.evaluation.backend,
    ).detections
    threshold = max(settings.evaluation.visualization_threshold, settings.evaluation.confidence_threshold)
    shown = found.scores >= threshold
    detections = Detections(found.image_index[shown], found.boxes[shown], found.scores[shown], found.labels[shown])
    matches = match_detections(dataset.annotations, detections)
    return Findings(detections, matches, count_mistakes(dataset.annotations, detections, matches), threshold)
