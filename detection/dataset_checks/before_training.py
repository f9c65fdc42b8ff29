"""The cheap checks, which open no image, as training runs them before its first step."""

from detection.config.settings import DataSettings, TrainSettings
from detection.contract import Detector
from detection.data.coco import CocoDataset
from detection.data.fake import FakeDataset
from detection.dataset_checks.annotation_checks import DROPPED, check_annotations, compare_categories
from detection.dataset_checks.findings import Findings
from detection.dataset_checks.fit_checks import check_fit
from detection.dataset_checks.image_checks import Split, check_listing, check_shared_names
from detection.errors import DataError


def check_before_training(
    training: CocoDataset | FakeDataset,
    validation: CocoDataset | FakeDataset,
    data: DataSettings,
    train: TrainSettings,
    detector: Detector,
) -> list[str]:
    """Check both splits and return warnings for the plan, except about dropped boxes, which the plan lists itself.

    Raises:
        DataError: images are missing; one line with the first names.
    """
    if isinstance(training, FakeDataset) or isinstance(validation, FakeDataset):
        return []
    findings = Findings(data.strict)
    splits = [
        Split(name, dataset.images, dataset.annotations)
        for name, dataset in (("training", training), ("validation", validation))
    ]
    check_listing(splits, findings)
    if errors := findings.of("error"):
        text = "; ".join(f"{finding.split}: {finding.line()}" for finding in errors)
        raise DataError(f"{text} (check_dataset.py lists all, {training.image_root})")
    check_shared_names(splits, findings)
    for split in splits:
        check_annotations(split.annotations, split.name, findings)
    compare_categories(training.annotations, validation.annotations, findings)
    check_fit(training.annotations, detector, train, "training", findings)
    warnings = [finding for finding in findings.of("warning") if finding.kind not in DROPPED.values()]
    return [f"warning     {finding.split}: {finding.line()}" for finding in warnings]
