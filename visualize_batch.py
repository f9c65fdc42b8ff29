"""Show a training or validation batch exactly as the network sees it, with boxes after the transforms.

python visualize_batch.py --config recipes/quickstart.yaml                     first batch of such a run, 5 seconds
python visualize_batch.py --config recipes/bccd.yaml data.root=my_dataset --step 1000
python visualize_batch.py data.root=my_dataset --split val                     letterboxed validation images
python visualize_batch.py --config recipes/quickstart.yaml --targets           assigned cells and anchors
python visualize_batch.py --config RUN/args.yaml --targets --weights RUN/best.pt     as a trained network has them
python visualize_batch.py --config recipes/quickstart.yaml --transform affine  one augmentation at several strengths

The batch of --step N is the one that yolo-v3/main.py trains on in that step with the same settings: images, order, size
and augmentation follow from run.seed. For each image it prints and writes the file, id, epoch, position in the dataset
and size. Writes batch.png and batch.json into a new directory below logs/; with --targets also targets.png (a row per
image with a panel per level: grid, assigned cells in the colour of their class, their anchors in black and white; where
the assignment depends on the predictions, those of --weights, else of random weights); with
--transform instead transform.png and transform.json (a row per setting, with values below, at and beyond its limits;
then random draws).
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from detection.drawing.files import replace_file
from detection.runtime.habana import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

import cv2
import numpy as np
import torch

from detection.config.command_line import Parser, device_flags
from detection.config.loading import Flag
from detection.config.settings import Settings
from detection.contract import AssignedPrediction, Batch, Detector, DetectorModel, Geometry
from detection.data.annotations import repeat_factors
from detection.data.build import (
    DetectionDataset,
    build_datasets,
    build_training_dataset,
    build_validation_dataset,
    prepare_for_training,
)
from detection.data.loaders import collate_samples
from detection.data.partners import PartnerImages
from detection.data.sampler import ImageOrder, Position, TrainingBatchSampler, size_step
from detection.data.transforms import Transform
from detection.data.workers import prepare_process
from detection.drawing.boxes import CROWD_LABEL, draw_boxes, make_grid, save_png
from detection.drawing.fonts import printable
from detection.drawing.window import browse
from detection.errors import DataError, SettingsError, exit_with_message, say
from detection.models import build_detector, check_shares
from detection.models.pretrained import load_pretrained
from detection.runtime.devices import open_machine
from detection.runtime.run_directory import new_run_directory, writing_results
from detection.training.automatic import load_run_settings
from detection.training.memory.batch_size import most_images, sizes_up_to
from detection.training.schedules import first_finishing_step, resolve_steps
from detection.training.step import tell_progress
from detection.visualization.augmentation_sheet import augmentation_names, strength_rows
from detection.visualization.target_pictures import count_targets, draw_targets, gt_boxes_of

IMAGES, IMAGES_WITH_TARGETS = 16, 3  # defaults of --images
COLUMNS = 4
DRAWS = 7  # random draws with --transform
TILE_SIDE = 260  # pixels, side of an image with --transform


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    flags = device_flags(arguments)
    if arguments.weights is not None:
        flags.append(Flag("--weights", "model.pretrained", str(arguments.weights)))
    settings, notices = load_run_settings(arguments.config, arguments.settings, flags, unused=("scheduler",))
    say(*notices)
    machine = open_machine(settings.run)  # else not used, but every script refuses an absent device
    dataset = open_dataset(settings, arguments.split)
    say(*dataset.source_lines)
    if settings.train.batch_size == "auto":
        settings = with_batch_size(settings, machine.device.type, len(dataset))
    names = [printable(name) for name in dataset.annotations.categories.names]
    detector = open_detector(settings, arguments.split, len(names), arguments.targets)
    use_geometry(dataset, detector.geometry, settings, arguments.split)
    positions = positions_of_step(settings, dataset, arguments.split, arguments.step, detector)
    if arguments.transform:
        pictures, content = show_transform(arguments, settings, dataset, names, positions, detector.geometry)
        name = "transform"
    else:
        count = arguments.images or (IMAGES_WITH_TARGETS if arguments.targets else IMAGES)
        pictures, content = show_batch(settings, dataset, names, positions, count, detector, arguments)
        name = "batch"
    directory = new_run_directory(Path(settings.run.logs_path), f"visualize_{name}", arguments.output)
    with writing_results(directory):
        for file, picture in pictures.items():
            save_png(directory / f"{file}.png", picture)
        replace_file(directory / f"{name}.json", json.dumps(content, indent=1).encode())
    say(f"{', '.join(f'{file}.png' for file in pictures)} and {name}.json in {directory}")
    if arguments.show:
        shown = list(pictures.values())
        browse("visualize_batch.py", len(shown), lambda number: shown[number])


def parse_arguments() -> argparse.Namespace:
    parser = Parser("visualize_batch.py", __doc__)
    parser.add_settings()
    parser.add_output()
    add = parser.add_argument
    add("--split", choices=("train", "val"), default="train", help="training or validation batches (default: train)")
    add(
        "--step",
        type=int,
        default=0,
        metavar="N",
        help="optimizer step, or number of the validation batch (default: 0)",
    )
    add("--images", type=int, metavar="N", help="number of images to draw (default: 16; with --targets 3)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--targets", action="store_true", help="also draw the assigned predictions of each level")
    group.add_argument("--transform", metavar="NAME", help="show a single augmentation of data.augmentation instead")
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="with --targets: model.pretrained, for assignments that see predictions",
    )
    add("--image", type=int, metavar="ID", help="image for --transform (default: first one of the batch with boxes)")
    arguments = parser.parse_intermixed_args()
    allowed = augmentation_names()
    if arguments.transform is not None and arguments.transform not in allowed:
        raise SettingsError(f"--transform {arguments.transform}: must be one of {', '.join(allowed)}")
    if arguments.transform and (arguments.split == "val" or arguments.images is not None):
        raise SettingsError(f"--{'split val' if arguments.split == 'val' else 'images'} does not go with --transform")
    if arguments.image is not None and not arguments.transform:
        raise SettingsError("--image belongs to --transform; --images N says how many images of a batch are drawn")
    if arguments.weights is not None and not arguments.targets:
        raise SettingsError("--weights belongs to --targets")
    if arguments.step < 0:
        raise SettingsError(f"--step {arguments.step}: must be at least 0")
    if arguments.images is not None and arguments.images < 1:
        raise SettingsError(f"--images {arguments.images}: must be at least 1")
    return arguments


def open_dataset(settings: Settings, split: str) -> DetectionDataset:
    """Build the training set, or the validation set without needing training annotations."""
    if split == "val" and not settings.data.fake:
        return build_validation_dataset(settings.data, None)
    seed, num_classes = settings.run.seed, settings.model.num_classes
    if split == "val":
        return build_datasets(settings.data, seed, num_classes)[1]
    return build_training_dataset(settings.data, seed, num_classes)


def with_batch_size(settings: Settings, device_type: str, num_images: int) -> Settings:
    """Replace `train.batch_size: auto` by what training takes where memory holds as much, and say so."""
    number = sizes_up_to(max(most_images(device_type, num_images) // settings.train.subdivisions, 1))[-1]
    say(f"train.batch_size=auto: {number}, as in training where memory holds so many images")
    return settings.model_copy(update={"train": settings.train.model_copy(update={"batch_size": number})})


def open_detector(settings: Settings, split: str, num_classes: int, targets: bool) -> Detector:
    """Build the detector: on the meta device, for its geometry, or with `targets` on the CPU, for its assignment.

    Raises:
        SettingsError: an image size or the mixup is invalid, or the criterion cannot show its assignment.
    """
    with torch.device("cpu" if targets else "meta"):
        detector = build_detector(settings, num_classes)
    check_shares(detector, settings)
    detector.geometry.check_size("train.image_size", settings.train.image_size)
    if split == "val":
        detector.geometry.check_size("evaluation.image_size", settings.evaluation.image_size)
    if targets and not any(
        hasattr(detector.criterion, name) for name in ("assigned_predictions", "assigned_by_outputs")
    ):
        raise SettingsError(f"--targets: the criterion of detector {settings.model.detector} shows no assignment")
    return detector


def use_geometry(dataset: DetectionDataset, geometry: Geometry, settings: Settings, split: str) -> None:
    """Set the training or validation transform of a dataset, as yolo-v3/main.py does."""
    if split == "val":
        dataset.sample_transform = Transform(geometry, settings.evaluation.image_size)
    else:
        prepare_for_training(dataset, geometry, settings, factors_of(dataset, settings))


def factors_of(dataset: DetectionDataset, settings: Settings) -> np.ndarray | None:
    """How often each training image is seen per epoch; None: once."""
    if settings.data.balance == "none":
        return None
    return repeat_factors(dataset.annotations, settings.data.balance_threshold)


def positions_of_step(
    settings: Settings, dataset: DetectionDataset, split: str, step: int, detector: Detector
) -> list[Position]:
    """List the images of a training step, micro-batch by micro-batch, or of a validation batch.

    Args:
        detector: determines the sizes of multiscale training; its criterion is told the progress of the step, or the
            end of the run for a validation batch.

    Raises:
        SettingsError: there is no such validation batch.
    """
    train = settings.train
    if split == "val":
        batch_size = settings.evaluation.batch_size or train.micro_batch
        batches = math.ceil(len(dataset) / batch_size)
        if step >= batches:
            raise SettingsError(f"--step {step}: the {len(dataset)} validation images make batches 0 to {batches - 1}")
        first = step * batch_size
        if detector.criterion is not None:
            tell_progress(detector.criterion, 1.0, train.clean_finish > 0)
        return [
            Position(index, 0, settings.evaluation.image_size)
            for index in range(first, min(first + batch_size, len(dataset)))
        ]
    factors = factors_of(dataset, settings)
    images_per_epoch = ImageOrder(len(dataset), settings.run.seed, factors).images_per_epoch
    steps = max(resolve_steps(train.steps, images_per_epoch / (train.micro_batch * train.subdivisions)), 1)
    finish = first_finishing_step(train.clean_finish, steps)
    sampler = TrainingBatchSampler(  # as in yolo-v3/main.py
        len(dataset),
        train.micro_batch,
        train.subdivisions,
        (step, step + 1),
        settings.run.seed,
        train.image_size,
        train.resize_frequency,
        train.multiscale_sizes,
        factors,
        size_step(detector.geometry.size_multiple),
        finish_step=finish if train.clean_finish else None,
    )
    if detector.criterion is not None:
        tell_progress(detector.criterion, min(step / steps, 1.0), step >= finish)
    return [position for micro_batch in sampler for position in micro_batch]


def show_batch(
    settings: Settings,
    dataset: DetectionDataset,
    names: Sequence[str],
    positions: Sequence[Position],
    count: int,
    detector: Detector,
    arguments: argparse.Namespace,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Draw a batch; returns pictures by file name, and the content of the JSON file. Prints a line per image."""
    size, drawn = positions[0][2], list(positions[:count])
    kind = "optimizer step" if arguments.split == "train" else "validation batch"
    head = f"{kind} {arguments.step}: {len(positions)} images of {size} px, seed {settings.run.seed}"
    if positions[0].clean:
        head += ", in the last part of the run: without mosaic and mixup"
    say(f"{head}; {len(drawn)} drawn" if len(drawn) < len(positions) else head)
    batch = collate_samples([dataset[position] for position in drawn])
    annotations = dataset.annotations
    rows: list[dict[str, Any]] = []
    tiles = []
    for place, (index, epoch, _, clean) in enumerate(drawn):
        image, boxes, labels = gt_boxes_of(batch, place)
        number = int(annotations.image_ids[index])
        row: dict[str, Any] = {
            "image_id": number,
            "file_name": annotations.file_name(index),
            "epoch": epoch,
            "index": index,
            "size": size,
            "clean": clean,
        }
        class_of = [None if label == CROWD_LABEL else annotations.categories.names[label] for label in labels.tolist()]
        rows.append(
            row | {"boxes": boxes.round(3).tolist(), "classes": class_of, "boxes_before": before(dataset, index)}
        )
        say(
            f"  id {number:<8} epoch {epoch}  index {index:<6} {len(labels):>3} of {before(dataset, index)} boxes  "
            f"{printable(row['file_name'])}"
        )
        title = f"id {number}, epoch {epoch}" if arguments.split == "train" else f"id {number}"
        tiles.append(draw_boxes(image, boxes, labels, names, title=title, legend=True))
    pictures = {"batch": make_grid(tiles, min(COLUMNS, len(tiles)), padding=6)}
    content: dict[str, Any] = {
        "split": arguments.split,
        "step": arguments.step,
        "seed": settings.run.seed,
        "augmentation": settings.data.augmentation.model_dump(mode="json") if arguments.split == "train" else None,
        "images": rows,
    }
    if arguments.targets:
        strides = cast(DetectorModel, detector.model).strides
        assigned = assigned_predictions(settings, detector, batch, names)
        anchors = None if detector.anchors is None else detector.anchors.levels
        say(*(f"  {line}" for line in count_targets(strides, anchors, assigned)))
        ids = [row["image_id"] for row in rows]
        pictures = {"targets": draw_targets(batch, ids, names, strides, assigned)} | pictures
        for place, row in enumerate(rows):
            row["targets"] = [
                {key: value for key, value in asdict(entry).items() if key != "image"}
                for entry in assigned
                if entry.image == place
            ]
    return pictures, content


def assigned_predictions(
    settings: Settings, detector: Detector, batch: Batch, names: Sequence[str]
) -> list[AssignedPrediction]:
    """Ask the criterion for its assignment; where that depends on the predictions, the network makes them first.

    As in training, batch norm uses the statistics of the batch.

    Raises:
        CheckpointError: the weights of the settings cannot be used.
    """
    criterion, boxes, labels = cast(Any, detector.criterion), batch["boxes"], batch["labels"]
    if not hasattr(criterion, "assigned_by_outputs"):
        return cast(list[AssignedPrediction], criterion.assigned_predictions(boxes, labels, batch["images"].shape[-1]))
    lines = load_pretrained(detector.model, settings.model, names) or ["the predictions are those of random weights"]
    say(*(f"  {line}" for line in lines))
    with torch.no_grad():
        outputs = detector.model.train()(batch["images"])
    return cast(list[AssignedPrediction], criterion.assigned_by_outputs(outputs, boxes, labels))


def before(dataset: DetectionDataset, index: int) -> int:
    """Return the number of boxes of an image before the transforms."""
    first, end = dataset.annotations.first_box[index : index + 2]
    return int(end - first)


def show_transform(
    arguments: argparse.Namespace,
    settings: Settings,
    dataset: DetectionDataset,
    names: Sequence[str],
    positions: Sequence[Position],
    geometry: Geometry,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Draw one augmentation at several strengths; returns pictures by file name, and the content of the JSON file."""
    annotations = dataset.annotations
    if arguments.image is not None:
        found = np.flatnonzero(annotations.image_ids == arguments.image)
        if not len(found):
            raise DataError(
                f"--image {arguments.image}: no training image has this id; the first is {annotations.image_ids[0]}"
            )
        index = int(found[0])
    else:
        index = next((place for place, *_ in positions if before(dataset, place)), positions[0].image)
    start, end = annotations.first_box[index : index + 2]
    labels = np.where(annotations.crowd[start:end], CROWD_LABEL, annotations.labels[start:end])
    size, section = positions[0].size, getattr(settings.data.augmentation, arguments.transform)
    say(
        f"{arguments.transform} with {section.model_dump(exclude={'p'})} at {size} px "
        f"on image {annotations.image_ids[index]}"
    )
    if section.p == 0:
        say("  p is 0.0 in these settings: training does not use it")
    image = dataset.load_image(index)
    if dataset.partners is None and arguments.transform in ("mosaic", "mixup"):
        order = ImageOrder(len(dataset), settings.run.seed, factors_of(dataset, settings))
        dataset.partners = PartnerImages(order)
    drawn, content = [], []
    for row in strength_rows(
        settings.data.augmentation,
        geometry,
        arguments.transform,
        size,
        settings.run.seed,
        image,
        annotations.boxes[start:end],
        labels,
        index,
        DRAWS,
        None if dataset.partners is None else lambda epoch: dataset.partners_of(index, epoch, []),
    ):
        drawn.append(
            [
                draw_tile(tile.sample.image, tile.sample.boxes, tile.sample.labels, names, tile.setting, tile.value)
                for tile in row
            ]
        )
        content += [
            {"setting": tile.setting, "value": tile.value, "boxes": tile.sample.boxes.round(3).tolist()} for tile in row
        ]
        say(f"  {row[0].setting}: {', '.join(tile.value for tile in row)}")
    columns = max(map(len, drawn))
    blank = np.full_like(drawn[0][0], 255)
    sheet = make_grid([tile for row in drawn for tile in [*row, *[blank] * (columns - len(row))]], columns, padding=6)
    description = {
        "transform": arguments.transform,
        "seed": settings.run.seed,
        "settings": section.model_dump(mode="json"),
    }
    where = {"image_id": int(annotations.image_ids[index]), "file_name": annotations.file_name(index), "size": size}
    return {"transform": sheet}, description | where | {"tiles": content}


def draw_tile(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, names: Sequence[str], setting: str, value: str
) -> np.ndarray:
    """Draw an image (H, W, 3) with its boxes at `TILE_SIDE` pixels, its setting and value above."""
    factor = TILE_SIDE / image.shape[0]
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    resized = cv2.resize(image, (TILE_SIDE, TILE_SIDE), interpolation=interpolation)
    return draw_boxes(resized, boxes * factor, labels, names, title=f"{setting} {value}")


if __name__ == "__main__":
    exit_with_message(main)
