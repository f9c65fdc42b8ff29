"""Overfit a single batch, as a sanity check: a detector that cannot do this has a fault in its data or code.

python batch_overfit.py                                            built-in digits, about 20 seconds on 2 CPU cores
python batch_overfit.py --config recipes/bccd.yaml data.root=my_dataset --images 8 --steps 300
python batch_overfit.py model.backbone=darknet data.root=data/coco train.learning_rate=5e-4 && echo "the data is fine"

Trains on the first images that have boxes, with the given settings but without augmentation, schedule and EMA, until
AP50 on these images reaches --threshold (exit code 0) or --steps are done (exit code 1). Prints the components of the
loss, less what exact boxes leave of it; writes before.png and after.png (ground truth beside detections) and
metrics.json into a new directory below logs/.
"""

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from detection.runtime.habana import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

import numpy as np
from torch import nn
from tqdm import tqdm

from detection.config.command_line import Parser, device_flags
from detection.config.settings import Settings
from detection.contract import Batch, Detector
from detection.data.annotations import select_images
from detection.data.build import DetectionDataset, build_training_dataset
from detection.data.loaders import batch_to_device, collate_samples
from detection.data.transforms import Transform
from detection.data.workers import prepare_process
from detection.drawing.boxes import save_png
from detection.drawing.window import browse
from detection.errors import DataError, NumericsError, SettingsError, UserError, escape, exit_with_message, say
from detection.evaluation.error_analysis import confidence_curves
from detection.evaluation.evaluate import Evaluation, evaluate
from detection.evaluation.report import draw_detections, write_evaluation
from detection.models import build_detector
from detection.models.pretrained import load_pretrained
from detection.runtime.devices import Machine, describe_device, open_machine
from detection.runtime.reproducibility import seed_everything
from detection.runtime.run_directory import new_run_directory, writing_results
from detection.training.automatic import load_run_settings
from detection.training.optimizer import build_optimizer, set_backbone_frozen, set_learning_rates
from detection.training.step import tell_progress, train_step

BUILTIN = Path(__file__).resolve().parent / "recipes" / "quickstart.yaml"
WARMUP = 10  # steps of linear warm-up
EVALUATE_EVERY = 10  # steps
MEMORY_HINT = "out of memory: take fewer --images or a smaller train.image_size"


class NotLearned(UserError):
    """The network did not learn the batch."""


@dataclass(frozen=True)
class Overfit:
    """One batch, its ground truth and the detector that should learn it."""

    settings: Settings
    machine: Machine
    dataset: DetectionDataset  # only the images of the batch
    batch: Batch
    detector: Detector

    def evaluate(self) -> Evaluation:
        """Detect on the batch and score it with pycocotools, whatever evaluation.backend says."""
        machine = self.machine
        return evaluate(
            self.detector.model,
            self.detector.criterion,
            self.detector.postprocess,
            [self.batch],
            self.dataset.annotations,
            machine.device,
            machine.autocast,
            "pycocotools",
        )


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    own_data = arguments.config or any(word.startswith("data.") for word in arguments.settings)
    overlays = arguments.config if own_data else [BUILTIN]
    settings, notices = load_run_settings(overlays, arguments.settings, device_flags(arguments), unused=("scheduler",))
    machine = open_machine(settings.run)
    seed_everything(settings.run.seed)
    dataset = take_images(settings, arguments.images)
    detector = build_detector(settings, len(dataset.annotations.categories.names))
    detector.geometry.check_size("train.image_size", settings.train.image_size)
    dataset.sample_transform = Transform(detector.geometry, settings.train.image_size)
    batch = collate_samples([dataset[index] for index in range(arguments.images)])
    detector.require_criterion()
    for line in [
        *notices,
        *dataset.source_lines,
        *load_pretrained(detector.model, settings.model, dataset.annotations.categories.names),
    ]:
        say(line)
    overfit = Overfit(settings, machine, dataset, batch, machine.to_device(detector))
    boxes = len(dataset.annotations.labels)
    images = f"{len(dataset.annotations)} images with {boxes} boxes"
    say(f"{describe_device(machine.device)}; {images}, {detector.name}")

    directory = new_run_directory(Path(settings.run.logs_path), "batch_overfit", arguments.output)
    before = overfit.evaluate()
    evaluation, step = train(overfit, arguments.steps, arguments.threshold)
    # AP50 does not depend on calibration, so the pictures use the threshold of the highest F1 instead of a fixed one.
    curves = confidence_curves(dataset.annotations, evaluation.detections, settings.evaluation.confidence_threshold)
    drawn = float(curves.confidence[curves.best])
    pictures = []
    with writing_results(directory):
        for name, shown in (("before", before), ("after", evaluation)):
            picture = draw_detections(dataset, shown, drawn, settings.evaluation.visualize_images)
            if picture is not None:
                pictures.append(picture)
                save_png(directory / f"{name}.png", picture)
        used = settings.evaluation.model_dump(mode="json") | {"image_size": settings.train.image_size}
        write_evaluation(directory, evaluation, dataset, step, used)
    ap50 = evaluation.metrics["AP50"] or 0.0
    say(f"before.png, after.png (scores from {drawn:.2f}, of the highest mean F1) and metrics.json in {directory}")
    if arguments.show:
        browse("batch_overfit.py", len(pictures), pictures.__getitem__, first=len(pictures) - 1)
    if ap50 < arguments.threshold:
        raise NotLearned(
            f"not learned: AP50 {ap50:.3f} after {step} steps, {arguments.threshold:g} was asked for; look at "
            "after.png for wrong ground truth or objects of a few pixels, try another train.learning_rate or more "
            "--steps"
        )
    say(f"learned: AP50 {ap50:.3f} after {step} steps")


def parse_arguments() -> argparse.Namespace:
    parser = Parser("batch_overfit.py", __doc__)
    parser.add_settings()
    add = parser.add_argument
    add("--images", type=int, default=8, metavar="N", help="number of images in the batch (default: 8)")
    add("--steps", type=int, default=200, metavar="N", help="maximum number of optimizer steps (default: 200)")
    add("--threshold", type=float, default=0.95, metavar="AP50", help="AP50 that counts as learned (default: 0.95)")
    parser.add_output()
    arguments = parser.parse_intermixed_args()
    for name in ("images", "steps"):
        if getattr(arguments, name) < 1:
            raise SettingsError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    if not 0 < arguments.threshold <= 1:
        raise SettingsError(f"--threshold {arguments.threshold:g}: must lie above 0 and not above 1")
    return arguments


def take_images(settings: Settings, count: int) -> DetectionDataset:
    """Build a dataset of the first `count` training images that have boxes.

    Raises:
        DataError: there are not enough of them.
    """
    dataset = build_training_dataset(settings.data, settings.run.seed, settings.model.num_classes)
    annotations = dataset.annotations
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    with_boxes = np.unique(image_of_box[~annotations.crowd])
    if len(with_boxes) < count:
        raise DataError(f"--images {count}: only {len(with_boxes)} training images have boxes")
    dataset.annotations = select_images(annotations, with_boxes[:count])
    return dataset


def train(overfit: Overfit, steps: int, threshold: float) -> tuple[Evaluation, int]:
    """Train on the one batch until AP50 reaches the threshold; returns the last evaluation and the number of steps."""
    machine, scaler = overfit.machine, overfit.machine.build_scaler()
    settings, model = overfit.settings.train, overfit.detector.model.train()
    criterion = cast(nn.Module, overfit.detector.criterion)
    set_backbone_frozen(model, False, settings.backbone_batch_norm)
    optimizer = build_optimizer(model, settings)
    evaluation, lowest = None, lowest_losses(overfit)
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for step in range(1, steps + 1):
            set_learning_rates(optimizer, functools.partial(warmup_rate, settings.learning_rate), step)
            tell_progress(criterion, (step - 1) / steps, finishing=False)
            losses, finite = train_step(
                model,
                criterion,
                optimizer,
                scaler,
                [overfit.batch],
                machine.autocast,
                machine.device,
                settings.clip_norm,
                mark_step=machine.mark_step,
                clip_tensor_norm=settings.clip_tensor_norm,
            )
            # Speed does not matter here, so waiting for the device each step is fine.
            if not finite and not scaler.is_enabled():
                parts = ", ".join(f"{name} = {value.item():g}" for name, value in losses.items())
                raise NumericsError(f"non-finite at step {step}: {parts}; try a lower train.learning_rate")
            bar.update()
            if step % EVALUATE_EVERY and step != steps:
                continue
            evaluation = overfit.evaluate()
            ap50 = evaluation.metrics["AP50"] or 0.0
            above = {name: value.item() - lowest.get(name, 0.0) for name, value in losses.items()}
            parts = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in above.items())
            total = sum(above.values())
            tqdm.write(escape(f"step {step}  loss {total:.3f}  {parts}  AP50 {ap50:.3f}"))
            if ap50 >= threshold:
                return evaluation, step
    assert evaluation is not None, "the last step is always evaluated"
    return evaluation, steps


def lowest_losses(overfit: Overfit) -> dict[str, float]:
    """Return the floor of each loss for this batch, which is subtracted from what is printed, and say it."""
    criterion = cast(Any, overfit.detector.criterion)
    if not hasattr(criterion, "lowest_losses"):
        return {}
    _, targets = batch_to_device(overfit.batch, overfit.machine.device)
    lowest: dict[str, float] = criterion.lowest_losses(targets, overfit.settings.train.image_size)
    for name, value in lowest.items():
        if value > 0.001:
            what = name.removeprefix("loss_")
            say(f"{what} loss: {value:.3f} is left when every {what} is exact; it is subtracted below")
    return lowest


def warmup_rate(learning_rate: float, step: int, _: str) -> float:
    """Return the learning rate of a step, the same for every parameter group."""
    return learning_rate * min(step / WARMUP, 1.0)


if __name__ == "__main__":
    exit_with_message(main, MEMORY_HINT)
