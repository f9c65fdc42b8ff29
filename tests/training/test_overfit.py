"""Overfit one batch, from data to metric."""

import functools
import json

import pytest
import torch

from detection.config.loading import load_settings
from detection.data.loaders import build_evaluation_loader, collate_samples
from detection.evaluation.evaluate import evaluate
from detection.models import build_detector
from detection.runtime.devices import autocast, build_scaler, choose_precision
from detection.runtime.reproducibility import seed_everything
from detection.training.optimizer import build_optimizer
from detection.training.step import train_step
from tests.support.detectors import datasets_of
from tests.support.paths import REPOSITORY

COCO_MINI = REPOSITORY.parent / "shared" / "data" / "coco_mini"


@pytest.mark.slow
@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="needs ../shared/data/coco_mini, real COCO images")
def test_darknet53_overfits_one_batch_of_coco(tmp_path, capsys):
    """Darknet-53 from random weights learns 8 real COCO images of 320 px to AP50 above 0.95 (about 6 minutes)."""
    content = json.loads((COCO_MINI / "annotations" / "instances_train.json").read_text())
    content["images"] = content["images"][:8]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
    (tmp_path / "batch.json").write_text(json.dumps(content))
    words = [
        f"data.root={COCO_MINI}",
        *(f"data.{split}_annotations={tmp_path / 'batch.json'}" for split in ("train", "validation")),
        *(f"data.{split}_images=train" for split in ("train", "validation")),
        *("evaluation.image_size=320", "train.image_size=320", "train.learning_rate=5e-4", "train.weight_decay=0"),
    ]
    settings, _ = load_settings(REPOSITORY / "yolo-v3" / "args.yaml", words=words)
    device = torch.device("cpu")
    scaler, precision = (
        build_scaler(device, None),
        functools.partial(autocast, device, choose_precision(device, "auto")),
    )
    _, dataset = datasets_of(settings, 320, 320, seed=0, num_classes=80)
    batch = collate_samples([dataset[index] for index in range(8)])  # letterbox only: the same pixels in every step

    seed_everything(0)
    detector = build_detector(settings, 80).to(device, channels_last=True)
    optimizer = build_optimizer(detector.model, settings.train)
    ap50 = 0.0
    for step in range(240):
        losses = train_step(
            detector.model.train(), detector.criterion, optimizer, scaler, [batch], precision, device, 35.0
        ).losses
        if step >= 99 and step % 20 == 19:
            loader = build_evaluation_loader(dataset, 8, 0, device)
            evaluation = evaluate(
                detector.model, detector.criterion, detector.postprocess, loader, dataset.annotations, device, precision
            )
            ap50 = evaluation.metrics["AP50"]
            with capsys.disabled():
                print(f"step {step + 1}: loss {sum(losses.values()):.2f}, AP50 {ap50:.3f}", flush=True)
            if ap50 > 0.95:
                break
    assert ap50 > 0.95
