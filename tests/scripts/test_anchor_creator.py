"""anchor_creator.py end to end: from an annotation file to an overlay that training reads."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import pytest

import anchor_creator
from detection.config.command_line import DEFAULTS
from detection.config.loading import load_settings
from detection.data.build import read_training_annotations
from detection.models.yolo.detector import build_model
from detection.training.automatic import OWN_DATA, load_run_settings
from tests.support import darknet_descriptions
from tests.support.evaluation_cases import coco_content

COCO = [[[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]]
OTHER = [[[20, 20], [25, 60], [60, 25]], [[60, 60], [70, 180], [180, 70]], [[200, 200], [200, 390], [390, 200]]]
Run = Callable[..., Any]


@pytest.fixture
def run(run_script: Run) -> Run:
    return lambda *arguments: run_script(anchor_creator.main, "train.image_size=416", *arguments)


def write_boxes(path: Path, sizes: Sequence[Sequence[float]], side: int = 416, crowd: int = 0) -> Path:
    """One square image per box, of two categories in turn; the first `crowd` boxes are crowd regions."""
    boxes = [(1 + k, 1 + k % 2, [0.0, 0.0, *size]) for k, size in enumerate(sizes)]
    content = coco_content(boxes, len(sizes), categories=(1, 2), size=(side, side), crowd=tuple(range(crowd)))
    path.write_text(json.dumps(content))
    return path


def all_of(boxes: Path) -> list[str]:
    """Train on the whole file: it validates too, so that no tenth of it is kept for that."""
    return [f"data.{name}_annotations={boxes}" for name in ("train", "validation")]


def flat(levels: Sequence[Sequence[Any]]) -> list[Any]:
    return [anchor for level in levels for anchor in level]


def anchors_in(overlay: Path) -> list[list[list[float]]]:
    settings, _ = load_settings(DEFAULTS, [overlay])
    return [[list(anchor) for anchor in level] for level in settings.yolo.anchors]


def test_overlay_figure_and_numbers(run: Run, tmp_path: Path) -> None:
    """Images of 832 px halve the boxes; with nine shapes, the anchors are these shapes sorted by area."""
    boxes = write_boxes(tmp_path / "boxes.json", [(2 * w, 2 * h) for w, h in flat(OTHER)[::-1] * 3], side=832)
    result = run(*all_of(boxes), "--output", tmp_path / "out")
    assert result.returncode == 0 and result.stderr == ""
    assert "27 images, 27 box shapes at 416 px" in result.stdout and "none left out" in result.stdout
    assert "recommendation: use the new anchors" in result.stdout
    assert anchors_in(tmp_path / "out" / "anchors.yaml") == OTHER
    # An overlay alone would be put on COCO's plan, and the plan for own data has no anchors unless it is told.
    assert f"train with --config {OWN_DATA} --config {tmp_path / 'out' / 'anchors.yaml'}\n" in result.stdout
    words = [*all_of(boxes), "run.device=cpu"]
    trained = load_run_settings([OWN_DATA, tmp_path / "out" / "anchors.yaml"], words)[0]
    assert trained.model.detector == "yolo" and trained.yolo.anchor_size == trained.train.image_size == 320
    report = json.loads((tmp_path / "out" / "anchors.json").read_text())
    assert report["anchors"] == OTHER and report["strides"] == [8, 16, 32] and report["sizes"] == [416]
    new, current = report["fits"]["new"], report["fits"]["current = YOLOv3 for COCO"]
    assert new["mean_iou"] == pytest.approx(1) and new["share_iou_0.5"] == new["share_ratio_4"] == 1
    assert current["anchors"] == flat(COCO)
    # best published anchor of each shape by hand, (shared area) / (sum of areas - shared area):
    by_hand = [
        16 * 20 / (400 + 480 - 320),  # 20 x 20 and 16 x 30; 10 x 13 and 33 x 23 (400 / 759) share less
        25 * 60 / (30 * 61),  # inside 30 x 61
        60 * 25 / (62 * 45),  # inside 62 x 45
        60 * 45 / (3600 + 2790 - 2700),  # 62 x 45
        59 * 119 / (70 * 180),  # 59 x 119 lies inside
        116 * 70 / (180 * 70 + 116 * 90 - 116 * 70),  # 116 x 90
        156 * 198 / (200 * 200),  # 156 x 198 lies inside
        200 * 326 / (200 * 390 + 373 * 326 - 200 * 326),  # 373 x 326 (0.486); 156 x 198 has 0.396
        373 * 200 / (390 * 200 + 373 * 326 - 373 * 200),  # 373 x 326
    ]
    assert current["mean_iou"] == pytest.approx(sum(by_hand) / 9)
    assert current["share_iou_0.5"] == pytest.approx(sum(iou >= 0.5 for iou in by_hand) / 9)
    picture = cv2.imread(str(tmp_path / "out" / "anchors.png"))
    assert picture is not None and picture.std() > 10


def test_good_anchors_are_kept(run: Run, tmp_path: Path) -> None:
    boxes = write_boxes(tmp_path / "boxes.json", flat(COCO) * 2)
    result = run(*all_of(boxes), "--output", tmp_path / "out")
    assert result.returncode == 0
    assert "keep the current anchors, the new ones gain 0.000 mean IoU (below 0.02)" in result.stdout
    assert anchors_in(tmp_path / "out" / "anchors.yaml") == COCO  # written all the same
    result = run(*all_of(boxes), f"yolo.anchors={OTHER}", "--output", tmp_path / "other")
    assert "use the new anchors" in result.stdout
    assert "the anchors of YOLOv3 for COCO are good enough too (0.000 below the new ones)" in result.stdout


def test_multiscale_training_meets_a_box_at_every_size(run: Run, tmp_path: Path) -> None:
    """Boxes of half the image at 320, 352, ... 608 px: ten shapes for ten anchors, 4, 3 and 3 per level."""
    boxes = write_boxes(tmp_path / "boxes.json", [(208, 208), (208, 208)])
    result = run(
        *all_of(boxes), "train.resize_frequency=10", "--per-level", "4,3,3",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0 and "20 box shapes at 10 sizes from 320 to 608 px" in result.stdout
    anchors = anchors_in(tmp_path / "out" / "anchors.yaml")
    assert [len(level) for level in anchors] == [4, 3, 3]
    assert flat(anchors) == [[side, side] for side in range(160, 305, 16)]


def test_what_training_leaves_out_is_left_out_and_named(run: Run, tmp_path: Path) -> None:
    sizes = [(400, 10), (0.5, 200), *flat(OTHER) * 2]
    boxes = write_boxes(tmp_path / "boxes.json", sizes, crowd=1)
    result = run(*all_of(boxes), "--output", tmp_path / "out")
    assert "left out: 1 crowd regions" in result.stdout and "left out: 1 boxes narrower" in result.stdout
    assert anchors_in(tmp_path / "out" / "anchors.yaml") == OTHER
    # the second category has every second box
    result = run(*all_of(boxes), "data.class_names=[name 2]", "--output", tmp_path / "two")
    assert "9 box shapes" in result.stdout and "10 boxes of categories that are not chosen" in result.stdout
    many = write_boxes(tmp_path / "many.json", [(10 + k, 300 - k) for k in range(200)])
    result = run(
        f"data.train_annotations={many}", "data.validation_fraction=0.5", "--output", tmp_path / "half", "--restarts", 1
    )
    assert 60 < int(result.stdout.split(" box shapes")[0].split()[-1]) < 140


def test_the_anchors_are_those_of_the_training_part(run: Run, tmp_path: Path, default_settings: Run) -> None:
    """Of a single set a tenth validates, and its boxes are not looked at; training fits anchors to the same boxes."""
    many = write_boxes(tmp_path / "many.json", [(10 + k, 300 - k) for k in range(200)])
    annotations = read_training_annotations(default_settings(f"data.root={many}").data)
    result = run(f"data.root={many}", "--output", tmp_path / "out", "--restarts", 1)
    assert f"many.json: {len(annotations)} images, {len(annotations.labels)} box shapes" in result.stdout
    assert "one set only: 0.1 of the images" in result.stdout and 150 < len(annotations) < 200


def test_darknet_description_gets_the_anchors(run: Run, tmp_path: Path) -> None:
    """Two levels of three anchors; the new cfg is in the overlay and in a separate file."""
    cfg = tmp_path / "tiny.cfg"
    cfg.write_text(darknet_descriptions.yolov3_tiny(64))
    shapes = flat(OTHER)[:6]
    boxes = write_boxes(tmp_path / "boxes.json", shapes * 3)
    words = (*all_of(boxes), "model.backbone=darknet_cfg", f"model.cfg={cfg}")
    result = run(*words, "--output", tmp_path / "out")
    assert result.returncode == 0 and "stride 16: 20 x 20" in result.stdout
    assert "current = YOLOv3-tiny for COCO" in result.stdout
    settings, _ = load_settings(DEFAULTS, [tmp_path / "out" / "anchors.yaml"])
    model = build_model(settings.model, settings.yolo, 80)
    assert model.strides == (16, 32)
    assert [[list(anchor) for anchor in level] for level in model.anchors] == [shapes[:3], shapes[3:]]
    assert (tmp_path / "out" / "anchors.cfg").read_text().strip() == (settings.model.cfg or "").strip()
    result = run(*words, "--per-level", 2, "--output", tmp_path / "other")
    assert result.returncode == 2 and "the cfg has 3,3" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["data.root=.", "data.train_annotations=nowhere.json"], 2, "nowhere.json"),
        (["data.root=nowhere"], 2, "nowhere"),
        (["data.root=.", "data.train_annotations=broken.json"], 2, "broken.json"),
        (
            ["data.root=.", "data.train_annotations=few.json"],
            2,
            "9 anchors need at least 9 distinct box shapes, found 2",
        ),
        (["data.root=.", "data.train_annotations=crowd.json"], 2, "no box to fit anchors to (2 crowd regions)"),
        (["data.fake=true", "model.num_classes=3"], 2, "data.fake"),
        (["--per-level", "3,3"], 2, "--per-level 3,3"),
        (["--per-level", "none"], 2, "--per-level none"),
        (["--per-level", "0"], 2, "--per-level 0"),
        (["--restarts", "0"], 2, "--restarts 0"),
        (["--threshold", "1"], 2, "--threshold 1"),
        (["--ratio", "nan"], 2, "--ratio nan"),
        (["data.root=.", *all_of(Path("good.json")), "--output", "/proc/none"], 6, "/proc/none"),
    ],
)
def test_bad_input_is_one_line(run: Run, tmp_path: Path, arguments: list[str], code: int, part: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    write_boxes(tmp_path / "few.json", [(10, 10), (20, 20)])
    write_boxes(tmp_path / "crowd.json", [(10, 10), (20, 20)], crowd=2)
    write_boxes(tmp_path / "good.json", flat(OTHER))
    result = run(*arguments)
    assert result.returncode == code and part in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_full_disk_is_one_line(run: Run, tmp_path: Path, full_disk: Callable) -> None:
    boxes = write_boxes(tmp_path / "boxes.json", flat(OTHER))
    (tmp_path / "out").mkdir()
    with full_disk(3000):
        result = run(*all_of(boxes), "--output", tmp_path / "out")
    assert result.returncode == 6 and "cannot be written" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
