"""Other names of settings: flat and earlier ones, those of other programs, and the nearest one to a misspelt name."""

import difflib
from collections.abc import Sequence
from typing import Any

# Flat names, as in the args.yaml of the research repository -> path of the setting.
FLAT_NAMES = {
    "name": "run.name",
    "logs_path": "run.logs_path",
    "device": "run.device",
    "seed": "run.seed",
    "data_path": "data.root",
    "num_workers": "data.num_workers",
    "classes": "data.class_names",
    "encoder": "model.backbone",
    "backbone": "model.backbone",
    "num_classes": "model.num_classes",
    "anchors": "yolo.anchors",
    "ignore_threshold": "yolo.ignore_threshold",
    "batch_size": "train.batch_size",
    "subdivisions": "train.subdivisions",
    "steps": "train.steps",
    "train_img_size": "train.image_size",
    "resize_frequency": "train.resize_frequency",
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "unfreeze_step": "train.unfreeze_step",
    "evaluate_frequency": "evaluation.evaluate_frequency",
    "val_img_size": "evaluation.image_size",
    "confidence_threshold": "evaluation.confidence_threshold",
    "iou_threshold": "evaluation.iou_threshold",
    "visualization_threshold": "evaluation.visualization_threshold",
}

# Settings of the research repository without a direct counterpart.
REPLACED_NAMES = {
    "continue_training": "use --resume DIRECTORY",
    "checkpoint": "use --resume DIRECTORY",
    "epoch_num": "use --resume DIRECTORY",
    "output_path": "use run.logs_path",
    "train_ratio": "use data.validation_fraction",
    "val_ratio": "the whole validation set is evaluated",
    "metric_ratio": "use evaluation.max_images",
    "visualize_ratio": "use evaluation.visualize_images",
    "close_mosaic": "use train.clean_finish, a share of the run",
    "mosaic": "use data.augmentation.mosaic.p",
    "mixup": "use data.augmentation.mixup.p",
}

# Keys of other programs' command lines and files (ultralytics, Darknet, mmdetection) -> what to write here.
PEER_NAMES = {
    "imgsz": "train.image_size and evaluation.image_size",
    "img_size": "train.image_size and evaluation.image_size",
    "width": "train.image_size and evaluation.image_size",
    "height": "train.image_size and evaluation.image_size",
    "epochs": 'train.steps, e.g. train.steps="12ep"',
    "max_epochs": 'train.steps, e.g. train.steps="12ep"',
    "max_batches": "train.steps",
    "time": "train.minutes",
    "batch": "train.batch_size",
    "lr": "train.learning_rate",
    "lr0": "train.learning_rate",
    "lrf": "scheduler.eta_min_factor",
    "warmup_epochs": 'scheduler.warmup, e.g. scheduler.warmup="3ep"',
    "burn_in": "scheduler.warmup",
    "workers": "data.num_workers",
    "data": "data.root, a folder or its data.yaml",
    "source": "data.root, a folder or its data.yaml",
    "names": "data.class_names",
    "nc": "model.num_classes",
    "model": "model.backbone, or model.cfg for a Darknet network",
    "weights": "model.pretrained",
    "pretrained": "model.pretrained",
    "freeze": "train.unfreeze_step",
    "fraction": "data.max_train_images, a number of images",
    "cos_lr": "scheduler.strategy=CosineAnnealingWarmRestartsWithWarmup",
    "multi_scale": "train.resize_frequency and train.multiscale_sizes",
    "patience": "train.patience",
    "save_period": "train.save_frequency",
    "name": "run.name",
    "project": "run.logs_path",
    "exist_ok": "--output DIRECTORY",
    "resume": "--resume DIRECTORY",
    "conf": "evaluation.confidence_threshold",
    "iou": "evaluation.iou_threshold",
    "max_det": "evaluation.max_detections",
    "amp": "run.precision",
    "half": "run.precision",
    "fliplr": "data.augmentation.horizontal_flip, e.g. {p: 0.5}",
    "flipud": "data.augmentation.vertical_flip, e.g. {p: 0.5}",
}
LIKENESS = 0.6  # of a name that is suggested

# Removed values -> their replacement.
REPLACED_VALUES = {("evaluation.backend", "faster_coco_eval"): "arrays"}
# Earlier paths of settings -> current path, so that old overlays, command lines and checkpoints keep working.
MOVED_NAMES = {
    **{
        f"yolo.{name}": f"model.{name}"
        for name in ("cfg", "pretrained", "num_classes", "batch_norm", "batch_norm_momentum")
    },
    "yolo.encoder": "model.backbone",
    "data.keep_aspect": "model.placement",
    "data.letterbox_rounding": "model.rounding",
    "data.interpolation": "model.interpolation",
    "data.fill": "model.fill",
    "data.most_unreadable": "data.max_unreadable_fraction",
    "train.encoder_learning_rate_factor": "train.backbone_learning_rate_factor",
    "train.encoder_batch_norm": "train.backbone_batch_norm",
    "train.most_skipped_steps": "train.max_skipped_steps",
    "evaluation.score": "yolo.score",
    "evaluation.objectness_threshold": "yolo.objectness_threshold",
}
MOVED_VALUES = {("data.keep_aspect", True): "letterbox", ("data.keep_aspect", False): "squash"}
CONVERTED = {key for key, _ in MOVED_VALUES}


def follow_move(key: str, value: Any) -> tuple[str, Any]:
    """Translate an earlier path of a setting, and its value, to the current ones."""
    return MOVED_NAMES[key], MOVED_VALUES.get((key, value), value) if isinstance(value, bool) else value


def nearest_name(key: str, known: Sequence[str]) -> str | None:
    """Find the setting whose last part, or whose path, is spelled most like `key`; None: none is alike.

    A path is alike only if its last part is: a section in common is no likeness.
    """
    spellings, last = [*known, *MOVED_NAMES], key.rpartition(".")[2]
    last_parts = [path.rpartition(".")[2] for path in spellings]
    by_last_part = difflib.get_close_matches(last, last_parts, n=1, cutoff=0.76)
    alike = [
        path
        for path in (*spellings, *FLAT_NAMES)
        if difflib.SequenceMatcher(None, last, path.rpartition(".")[2]).ratio() >= LIKENESS
    ]
    by_path = difflib.get_close_matches(key, alike, n=1, cutoff=LIKENESS)
    nearest = spellings[last_parts.index(by_last_part[0])] if by_last_part else next(iter(by_path), None)
    return None if nearest is None else (MOVED_NAMES | FLAT_NAMES).get(nearest, nearest)
