"""batch_overfit.py end to end: exit code 0 for a batch that can be learned, else 1."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import batch_overfit
from detection.data.loaders import collate_samples
from tests.support.detectors import transform_of

Run = Callable[..., tuple[int, str, str]]
SMALL = (
    "run.device=cpu", "run.precision=off", "data.num_workers=0", "model.backbone=mobilenet_v3_small",
    "yolo.neck_channels=[32, 32, 32]", "yolo.loss=darknet", "train.image_size=96", "train.learning_rate=3e-3",
    "yolo.anchors=[[[16, 14], [22, 20]], [[40, 40]], [[90, 90]]]",
)  # fmt: skip


@pytest.fixture
def run(run_script) -> Run:
    return lambda *arguments: run_script(batch_overfit.main, *arguments)


def test_coloured_rectangles_are_learned(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The training images alone are enough.
    files = [f"data.train_annotations={drawn_dataset / 'annotations' / 'instances_train.json'}"]
    words = [*files, f"data.train_images={drawn_dataset / 'train'}", *SMALL]
    code, text, err = run(*words, "--images", 4, "--steps", 150, "--output", out)
    assert code == 0, text + err
    assert "learned: AP50" in text and "objectness" in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["settings"]["image_size"] == 96  # what it was evaluated at, not evaluation.image_size
    assert metrics["AP50"] >= 0.95 and metrics["step"] <= 150 and metrics["step"] % 10 == 0
    before, after = ((out / f"{name}.png").read_bytes() for name in ("before", "after"))
    assert before != after
    # AP50 ranks and may be there while the scores are low: what is drawn is named and shows nearly every ground-truth
    # box.
    (drawn,) = re.findall(r"scores from (\d\.\d+), of the highest mean F1", text)
    shown = [row for row in json.loads((out / "detections.json").read_text()) if row["score"] >= float(drawn) - 0.005]
    assert 6 <= len(shown) <= 12
    # 4 of the images with boxes (k % 4 boxes on image k: 1, 2, 3 and, after the empty one, 1 again)
    assert sum(row["gt_boxes"] for row in metrics["class_AP"].values()) == 1 + 2 + 3 + 1


def test_too_few_steps_do_not_open_the_gate(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    code, out, err = run(
        f"data.root={drawn_dataset}", *SMALL, "--images", 2, "--steps", 1, "--output", tmp_path / "out"
    )
    assert "is left when every box is exact; it is subtracted below" in out
    assert code == 1 and err.startswith("not learned: AP50 0.0") and "after 1 steps, 0.95 was asked for" in err
    assert len(err.strip().splitlines()) == 1 and (tmp_path / "out" / "after.png").exists()


def test_augmentation_is_off_and_every_step_sees_the_same_pixels(run: Run, drawn_dataset: Path) -> None:
    words = [f"data.root={drawn_dataset}", *SMALL, "data.augmentation.vertical_flip.p=1.0"]
    settings, _ = batch_overfit.load_run_settings([], words)
    dataset = batch_overfit.take_images(settings, 3)
    dataset.sample_transform = transform_of(settings, settings.train.image_size)
    batch = collate_samples([dataset[index] for index in range(3)])
    first = dataset.load_image(0)
    letterbox = batch["letterboxes"][0]
    pixels = batch["images"][0].permute(1, 2, 0).numpy()
    middle = (pixels.shape[0] // 2, pixels.shape[1] // 2)
    assert letterbox.width == first.shape[1] and pixels[middle].tolist() == first[first.shape[0] // 2, 0].tolist()
    assert batch["indices"].tolist() == [0, 1, 2] and len(dataset.annotations) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--images", "0"], 2, "--images 0"),
        (["--steps", "0"], 2, "--steps 0"),
        (["--threshold", "1.5"], 2, "--threshold 1.5"),
        (["--images", "9"], 2, "only 6 training images have boxes"),
        (["yolo.nonsense=1"], 2, "yolo.nonsense"),
        (["model.pretrained=gone.pth", "--images", "2"], 7, "gone.pth"),
    ],
)
def test_bad_input_is_one_line(run: Run, drawn_dataset: Path, arguments: list[str], code: int, part: str) -> None:
    found, _, err = run(f"data.root={drawn_dataset}", *SMALL, *arguments)
    assert found == code and part in err and len(err.strip().splitlines()) == 1
