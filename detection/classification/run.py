"""A run that trains a classifier: its data and its network differ from a detector's, the rest is that of `Run`."""

import hashlib
from typing import Any

from detection.classification.datasets import open_class_sets
from detection.classification.network import build_classifier
from detection.config.settings import Settings
from detection.contract import Detector
from detection.data.annotations import annotations_digest
from detection.data.build import make_builtin
from detection.errors import SettingsError, name_list
from detection.models.own_classifier import CLASSIFIER, form_of
from detection.models.pretrained import OF_BACKBONE
from detection.runtime.devices import describe_device
from detection.runtime.distributed import Ranks
from detection.training.console import plan_warnings
from detection.training.run import Run
from detection.training.state import RunState


class ClassifierRun(Run):
    """Everything that is fixed before the first step of a classifier's training; see `Run`.

    Args:
        network: one of `network.NETWORKS`; None: the backbone of the settings.
        crops: the boxes of a detection dataset are cut out; see `open_class_sets`.
    """

    script = "classify.py"

    def __init__(self, settings: Settings, ranks: Ranks, fresh: bool, network: str | None, crops: bool) -> None:
        self.network, self.crops = network, crops
        check_supported(settings)
        super().__init__(settings, ranks, fresh)

    def _build_data(self) -> None:
        settings = self.settings
        if self.ranks.is_first:
            make_builtin(settings.data)
        self.ranks.broadcast(None)  # barrier: the others wait for the dataset
        sets = open_class_sets(settings.data, settings.run.seed, settings.evaluation.max_images, self.crops)
        self.training_set, self.validation_set = sets
        self.categories = self.training_set.annotations.categories
        count = settings.model.num_classes
        if count not in (None, len(self.categories.names)):
            raise SettingsError(f"model.num_classes is {count}, the data has {len(self.categories.names)} classes")
        self.data_digest, self.validation_digest = (
            hashlib.sha256(f"{annotations_digest(of.annotations)} {of.pixels_digest}".encode()).hexdigest()
            for of in sets
        )
        self.repeat_factors = None

    def _new_detector(self) -> Detector:
        return build_classifier(self.settings, len(self.categories.names), self.network)

    def _check_data(self) -> list[str]:
        counts = self._counts()
        few = [name for name, count in zip(self.categories.names, counts, strict=True) if not count]
        return [f"warning     no training image of {name_list(few)}"] if few else []

    def _counts(self) -> list[int]:
        """Training images of each class."""
        labels = self.training_set.annotations.labels.tolist()
        return [labels.count(label) for label in range(len(self.categories.names))]

    def checkpoint(self, state: RunState) -> dict[str, Any]:
        """Return a checkpoint's content: a run's, and what a detector compares before it takes the backbone."""
        model = self.settings.model
        return {
            **super().checkpoint(state),
            CLASSIFIER: {
                "network": self.network,
                "crops": self.crops,
                "form": form_of(self.detector.model),
                "top1": state.best_value,
            },
            # A detector that starts from these weights gets their network; see `needed_settings`.
            "needs": {} if self.network else {f"model.{name}": getattr(model, name) for name in OF_BACKBONE},
        }


def check_supported(settings: Settings) -> None:
    """Refuse settings that only detectors have.

    Raises:
        SettingsError: names the setting.
    """
    augmentation = settings.data.augmentation
    refused = {
        "data.fake": settings.data.fake,
        "data.balance": settings.data.balance != "none",
        "data.augmentation.mosaic.p": augmentation.mosaic.p,
        "data.augmentation.mixup.p": augmentation.mixup.p,
        "train.minutes": settings.train.minutes,
        "train.swa_cycles": settings.train.swa_cycles,
    }
    if given := [name for name, value in refused.items() if value]:
        raise SettingsError(f"{given[0]}: not for a classifier; leave it at its default")


def classifier_plan(run: ClassifierRun) -> list[str]:
    """Format the plan of a run: device, data, batch size, duration and schedule."""
    settings, train, names = run.settings, run.settings.train, run.categories.names
    steps = sorted({0, run.schedule.warmup, *run.schedule.changes(run.steps), run.steps - 1})
    rates = ", ".join(f"{run.schedule.at(step):.3g} at {step}" for step in steps if step < run.steps)
    when = f"every {run.evaluate_frequency} steps" if run.evaluate_frequency else "at the end"
    counts = run._counts()
    return [
        f"device      {describe_device(run.device)}, {run.precision}",
        *run.training_set.source_lines,
        *run.detector.plan,
        f"input       {run.detector.geometry.describe()}",
        f"classes     {len(names)}: {name_list(names[:10])}{' ...' if len(names) > 10 else ''}",
        f"training    {len(run.training_set)} images, {min(counts)} to {max(counts)} per class, {train.image_size} px",
        f"validation  {len(run.validation_set)} images, {settings.evaluation.image_size} px, {when}",
        f"batch       {train.micro_batch} x {train.subdivisions} subdivisions x {run.ranks.size} "
        f"process{'es' if run.ranks.size > 1 else ''} = {run.images_per_step} images per step",
        *run.batch_size_lines,
        f"duration    {run.steps} steps = {run.steps / run.steps_per_epoch:.1f} epochs"
        f" of {run.steps_per_epoch:.1f} steps",
        f"schedule    {train.optimizer}, {settings.scheduler.strategy}, learning rate {rates}",
        *(f"pretrained  {line}" for line in run.pretrained_lines),
        *run.data_warnings,
        *(f"warning     {line}" for line in plan_warnings(run)),
    ]
