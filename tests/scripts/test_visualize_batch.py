"""visualize_batch.py end to end: the batch of a run, its targets, and augmentations at known strengths."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import visualize_batch
from detection.config.settings import Settings
from detection.contract import AssignedPrediction
from detection.data.augmentation.mixing import Annotated
from detection.data.loaders import build_training_loader
from detection.drawing.boxes import class_color, draw_boxes
from detection.models.yolo import CRITERIA
from detection.training.automatic import load_run_settings
from detection.visualization.augmentation_sheet import augmentation_names, strength_rows, values_of
from detection.visualization.target_pictures import count_targets, draw_level
from tests.support.detectors import geometry_of
from tests.support.training_runs import load_main

Run = Callable[..., Any]
FILL = [124, 116, 104]
SMALL = (
    "run.device=cpu", "data.num_workers=0", "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[32, 32, 32]",
    "train.image_size=96", "train.batch_size=4", "evaluation.image_size=96",
)  # fmt: skip


@pytest.fixture
def run(run_script, drawn_dataset: Path, tmp_path: Path) -> Run:
    def started(*arguments: str | Path, root: Path = drawn_dataset) -> Any:
        out = tmp_path / "out"
        return run_script(visualize_batch.main, *SMALL, f"data.root={root}", *arguments, "--output", out)

    return started


def content_of(directory: Path, name: str = "batch") -> dict[str, Any]:
    return json.loads((directory / "out" / f"{name}.json").read_text())


def test_it_is_the_batch_of_the_run(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    """Step 5 of a run with multiscale, balancing and augmentation, against the run's own sampler and loader."""
    words = [
        "train.subdivisions=2", "train.resize_frequency=2", "train.multiscale_sizes=[64, 128]", "run.seed=3",
        "data.balance=repeat_factor", "data.balance_threshold=0.9",
    ]  # fmt: skip
    result = run(*words, "--step", 5)
    assert result.returncode == 0, result.stderr
    content = content_of(tmp_path)
    settings = load_run_settings([], [*SMALL, f"data.root={drawn_dataset}", *words])[0]
    module = load_main()
    training = module.Run(settings, module.join_ranks(settings), fresh=True)
    sampler = training.new_sampler(5, 6)
    positions = [position for batch in sampler for position in batch]
    assert [tuple(row[key] for key in ("index", "epoch", "size", "clean")) for row in content["images"]] == positions
    assert len(positions) == 8 and len({size for _, _, size, _ in positions}) == 1
    loader = build_training_loader(training.training_set, training.new_sampler(5, 6), 0, torch.device("cpu"))
    rows = iter(content["images"])
    for batch in loader:
        for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True):
            row = next(rows)
            assert np.array(row["boxes"]).reshape(-1, 4) == pytest.approx(boxes[labels >= 0].numpy(), abs=1e-3)
            assert row["classes"] == [("red", "green")[label] for label in labels[labels >= 0].tolist()]
            assert f"id {row['image_id']}" in result.stdout and row["file_name"] in result.stdout
            assert row["boxes_before"] == (row["image_id"] - 100) % 4 and row["image_id"] == 100 + row["index"]
    # the picture of the first image: as the loader has it, with boxes on it
    first = next(iter(loader))
    image, real = first["images"][0].permute(1, 2, 0).numpy(), first["labels"][0] >= 0
    drawn = draw_boxes(image, first["boxes"][0][real].numpy(), first["labels"][0][real].numpy(), ["red", "green"])
    sheet = cv2.imread(str(tmp_path / "out" / "batch.png"))[:, :, ::-1]
    size = image.shape[0]
    row_height = (sheet.shape[0] - 6) // 2
    assert (sheet[row_height - size : row_height, 6 : 6 + size] == drawn).all()


def test_validation_is_letterboxed(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    """Image 101 is 68 x 92: at 96 px it is 71 x 96, 12 px from the left; image 100 has no box."""
    result = run("--split", "val", "evaluation.batch_size=2")
    assert result.returncode == 0, result.stderr
    rows = content_of(tmp_path)["images"]
    assert [row["image_id"] for row in rows] == [100, 101] and rows[0]["boxes"] == []
    annotations = json.loads((drawn_dataset / "annotations" / "instances_val.json").read_text())["annotations"]
    (gt,) = [row for row in annotations if row["image_id"] == 101]
    x, y, width, height = gt["bbox"]
    scale_x, scale_y = 71 / 68, 96 / 92
    by_hand = [x * scale_x + 12, y * scale_y, (x + width) * scale_x + 12, (y + height) * scale_y]
    assert rows[1]["boxes"][0] == pytest.approx(by_hand, abs=1e-3)
    sheet = cv2.imread(str(tmp_path / "out" / "batch.png"))[:, :, ::-1]
    assert sheet.shape[1] == 2 * (96 + 6) + 6
    assert sheet[-20, 6 + 96 + 6 + 5].tolist() == FILL and sheet[-20, 6 + 96 + 6 + 12 + 5].tolist() != FILL


def test_last_validation_batch_may_be_smaller(run: Run, tmp_path: Path) -> None:
    assert run("--split", "val", "evaluation.batch_size=3", "--step", 1).returncode == 0
    assert [row["image_id"] for row in content_of(tmp_path)["images"]] == [103]


# Targets

ANCHORS = (((4.0, 4.0), (8.0, 4.0)), ((18.0, 18.0),), ((60.0, 60.0),))
BOXES = torch.tensor([[[12.0, 12, 30, 30], [10, 12, 30, 28], [56, 56, 60, 60], [0, 0, 40, 40], [0, 0, 0, 0]]])
LABELS = torch.tensor([[1, 0, 1, -2, -1]])


def rows_of(criterion_name: str, boxes: torch.Tensor, labels: torch.Tensor) -> list[tuple]:
    criterion = CRITERIA[criterion_name](ANCHORS, [8, 16, 32], 0.5)
    found = criterion.assigned_predictions(boxes, labels, 64)
    return [(e.image, e.gt, e.level, e.anchor, e.anchor_size, e.column, e.row, e.overruled) for e in found]


def test_assignment_by_hand() -> None:
    """18 x 18 and 20 x 16 (IoU with 18 x 18: 288 / 356) in the cell of (21, 21) and (20, 20): the later one rules.

    4 x 4 around (58, 58): the last cell but none of stride 8. Crowd and padding learn nothing.
    """
    assert rows_of("darknet", BOXES, LABELS) == [
        (0, 0, 1, 0, (18.0, 18.0), 1, 1, True),
        (0, 1, 1, 0, (18.0, 18.0), 1, 1, False),
        (0, 2, 0, 0, (4.0, 4.0), 7, 7, False),
    ]


def test_assignment_of_mmdetection_by_hand() -> None:
    """20 x 16 around (24, 24), the middle of cell (1, 1) of stride 16; other priors there overlap it by less than 0.1.

    The second image has an 8 x 4 box in the middle of a cell of stride 8: the 4 x 4 prior has IoU 0.5, not above 0.5.
    """
    boxes = torch.tensor([[[14.0, 16, 34, 32]], [[16, 26, 24, 30]]])
    assert rows_of("mmdetection", boxes, torch.tensor([[0], [0]])) == [
        (0, 0, 1, 0, (18.0, 18.0), 1, 1, False),
        (1, 0, 0, 1, (8.0, 4.0), 2, 3, False),
    ]


def test_level_is_drawn_where_it_lies() -> None:
    """640 px: ten times 64, so cell (1, 1) of stride 16 is 160..320 and its anchor of 18 px 150..330."""
    criterion = CRITERIA["darknet"](ANCHORS, [8, 16, 32], 0.5)
    found = [entry for entry in criterion.assigned_predictions(BOXES, LABELS, 64) if entry.level == 1]
    picture = draw_level(np.zeros((64, 64, 3), np.uint8), BOXES[0].numpy(), LABELS[0].numpy(), "ab", found, 16, "title")
    picture = picture[-640:]
    inside, grid, outside = picture[250, 200], picture[400, 480], picture[400, 400]
    # both ground-truth boxes fill the cell, one over the other
    expected = np.rint(np.rint(np.array(class_color(1)) * 0.55) * 0.45 + np.array(class_color(0)) * 0.55)
    assert np.abs(inside - expected).max() <= 1
    assert grid.tolist() == [round(0.3 * 255)] * 3 and outside.tolist() == [0, 0, 0]
    assert picture[240, 150].tolist() == picture[330, 200].tolist() == [255, 255, 255]  # the anchor


def test_cells_without_anchors_are_counted_and_drawn() -> None:
    """Two cells of one box, without anchors: their colour, no white rectangle."""
    found = [AssignedPrediction(0, 0, 1, 16, 0, None, column, 1, False) for column in (1, 2)]
    blank = np.zeros((64, 64, 3), np.uint8)
    picture = draw_level(blank, BOXES[0].numpy(), LABELS[0].numpy(), "ab", found, 16, "title")[-640:]
    colour = np.rint(np.array(class_color(1)) * 0.55)
    assert (
        all(np.abs(picture[250, x] - colour).max() <= 1 for x in (200, 400)) and picture[250, 560].tolist() == [0] * 3
    )
    assert (picture[180:280] != 255).any(axis=2).all()
    assert count_targets([8, 16], None, found) == [
        "level 0, stride 8: 0 assignments",
        "level 1, stride 16: 2 assignments",
    ]


def test_targets_that_depend_on_predictions(run: Run, tmp_path: Path) -> None:
    words = ("model.detector=yolox", "yolox.neck_channels=[8, 8, 8]", "yolox.head_channels=8")
    result = run("--targets", "--images", 4, *words)
    assert result.returncode == 0 and "the predictions are those of random weights" in result.stdout, result.stderr
    for row in content_of(tmp_path)["images"]:
        assert {target["gt"] for target in row["targets"]} <= set(range(len(row["boxes"])))
        assert {target["anchor_size"] for target in row["targets"]} <= {None}
    assert any(row["targets"] for row in content_of(tmp_path)["images"])
    result = run(*words, "--weights", "best.pt")
    assert result.returncode == 2 and "--weights belongs to --targets" in result.stderr
    result = run("--targets", *words, "--weights", "absent.pt")
    assert result.returncode == 7 and "model.pretrained = absent.pt: does not exist" in result.stderr


def test_targets_are_those_of_the_step(run: Run) -> None:
    """ATSS assigns in the first third of the 30 steps, then the assigner of the settings, which is SimOTA here."""
    words = ["model.detector=yolox", "yolox.neck_channels=[8, 8, 8]", "yolox.head_channels=8", "train.steps=30"]
    words += ["yolox.loss=aligned", "data.augmentation.affine.p=0", "--targets", "--images", "4"]
    counts = {}
    for share in (0.0, 0.33, 1.0):
        for step in (9, 10):
            lines = run(*words, f"yolox.atss_share={share}", "--step", step).stdout.splitlines()
            counts[share, step] = [line for line in lines if "assignments" in line]
    assert counts[0.0, 9] != counts[1.0, 9] and counts[0.0, 10] != counts[1.0, 10]
    assert (counts[0.33, 9], counts[0.33, 10]) == (counts[1.0, 9], counts[0.0, 10])


def test_the_batch_of_the_plan_for_own_data(
    run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path
) -> None:
    """9 images: batches of 8, as the training takes them."""
    words = ("run.device=cpu", "data.num_workers=0", "train.image_size=64", f"data.root={drawn_dataset}")
    result = run_script(visualize_batch.main, *words, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "train.batch_size=auto: 8, as in training" in result.stdout
    assert "optimizer step 0: 8 images of 64 px" in result.stdout


def test_targets_are_written_for_every_level(run: Run, tmp_path: Path) -> None:
    words = ["yolo.loss=darknet", "yolo.anchors=[[[10, 10]], [[20, 20], [30, 30]], [[60, 60]]]"]
    result = run("--targets", "--images", 4, *words)
    assert result.returncode == 0, result.stderr
    assert "level 1, stride 16:" in result.stdout and "anchors 20 x 20:" in result.stdout
    rows = content_of(tmp_path)["images"]
    # Darknet's rule: each ground-truth box exactly once, in the cell of its centre
    for row in rows:
        assert [target["gt"] for target in row["targets"]] == list(range(len(row["boxes"])))
        for target in row["targets"]:
            x1, y1, x2, y2 = row["boxes"][target["gt"]]
            assert target["column"] == (x1 + x2) / 2 // target["stride"]
            assert target["row"] == (y1 + y2) / 2 // target["stride"]
    assert any(row["targets"] for row in rows)
    sheet = cv2.imread(str(tmp_path / "out" / "targets.png"))
    side = 96 * 7  # enlarged by a whole number to at least 640 px
    assert sheet.shape[1] == 3 * (side + 6) + 6 and (tmp_path / "out" / "batch.png").exists()


def test_targets_of_two_levels(run: Run, tmp_path: Path) -> None:
    words = ("model.backbone=darknet_tiny", "yolo.neck_channels=[8, 8]", "yolo.anchors=[[[10, 14]], [[81, 82]]]")
    assert run("--targets", "--split", "val", *words).returncode == 0
    assert cv2.imread(str(tmp_path / "out" / "targets.png")).shape[1] == 2 * (96 * 7 + 6) + 6
    strides = {target["stride"] for row in content_of(tmp_path)["images"] for target in row["targets"]}
    assert strides and strides <= {16, 32}


def test_targets_of_a_darknet_description(run: Run, tmp_path: Path, shared_weights) -> None:
    cfg = shared_weights("yolo-fastest-1.1-xl.cfg")
    result = run("--targets", "model.backbone=darknet_cfg", f"model.cfg={cfg}")
    assert result.returncode == 0 and "level 1, stride 32" in result.stdout, result.stderr
    sizes = {tuple(target["anchor_size"]) for row in content_of(tmp_path)["images"] for target in row["targets"]}
    # from the file's own line: anchors = 12, 18,  37, 49,  52,132, 115, 73, 119,199, 242,238
    assert sizes and sizes <= {(12, 18), (37, 49), (52, 132), (115, 73), (119, 199), (242, 238)}


# One augmentation at several strengths


@pytest.mark.parametrize(
    ("path", "setting", "values"),
    [
        ("affine.scale", [0.25, 4.0], [0.0625, 0.25, 0.5, None, 2, 4, 16]),
        ("affine.rotate", [-5.0, 6.0], [-10, -5, -2.5, None, 3, 6, 12]),
        ("affine.rotate", [0.0, 6.0], [None, 3, 6, 12]),
        ("color_jitter.hue", [-0.3, 0.3], [-0.3, -0.15, None, 0.15, 0.3]),
        ("random_brightness_contrast.brightness_limit", 0.2, [-0.4, -0.2, -0.1, None, 0.1, 0.2, 0.4]),
        ("rgb_shift.r_shift_limit", 200, [-200, -100, None, 100, 200]),
        ("clahe.clip_limit", [1.0, 4.0], [None, 2, 4, 16]),
        ("darknet_hsv.exposure", 4.0, [0.0625, 0.25, 0.5, None, 2, 4, 16]),
        ("gauss_noise.std_range", [0.01, 0.04], [None, 0.005, 0.01, 0.02, 0.04, 0.08]),
        ("posterize.num_bits", [4, 6], [None, 7, 6, 5, 4, 3, 2]),
        ("posterize.num_bits", [1, 7], [None, 7, 6, 5, 4, 3, 2, 1]),
        ("darknet_jitter.jitter", 0.3, [None, 0.15, 0.3, 0.6]),
        ("darknet_jitter.jitter", 0.5, [None, 0.25, 0.5]),
        ("iou_crop.min_crop_size", 0.4, [None, 0.8, 0.4, 0.2]),
        ("iou_crop.min_ious", [0.5, 0.3], [None, 0, 0.3, 0.5]),
        ("affine.shear", [0.0, 0.0], [None]),
    ],
)
def test_strengths_by_hand(default_settings, path: str, setting: Any, values: list[float | None]) -> None:
    section, name = path.split(".")
    augmentation = default_settings(f"data.augmentation.{path}={setting}").data.augmentation
    found = values_of(getattr(augmentation, section), name)
    assert [None if label == "off" else value for value, label in found] == pytest.approx(values)
    if section in ("affine", "color_jitter") and name != "scale":
        assert {value for value, label in found if "limit" in label} == {limit for limit in setting if limit}


@pytest.fixture(scope="module")
def sheet(default_settings: Callable[..., Settings]) -> Callable[..., dict[tuple[str, str], Any]]:
    """Samples of an augmentation by (setting, value) on a 100 x 100 image: (80, 120, 160) but for two blocks."""
    image = np.full((100, 100, 3), (80, 120, 160), np.uint8)
    image[30:70, 30:70] = 60
    image[90:, 80:] = 0  # not symmetric

    def made(name: str, *words: str, size: int = 100) -> dict[tuple[str, str], Any]:
        settings = default_settings(*words)
        own = Annotated(image, np.array([[30, 30, 70, 70]], np.float32), np.array([0]))
        other = own._replace(image=255 - image)
        rows = strength_rows(
            settings.data.augmentation, geometry_of(settings), name, size, 0, *own, 0, 3,
            partners=lambda epoch: lambda generator, count: [other] * count,
        )  # fmt: skip
        return {(tile.setting, tile.value): tile.sample for row in rows for tile in row}

    return made


def test_each_value_does_what_it_says(sheet) -> None:
    """Corner pixel (80, 120, 160), middle pixel 60, box 30..70, against arithmetic."""

    def corner(sample: Any) -> list[int]:
        return sample.image[2, 2].tolist()

    made = sheet("random_brightness_contrast")  # brightness adds a share of 255
    assert corner(made["brightness_limit", "0.2 = limit"]) == pytest.approx([131, 171, 211], abs=1)
    assert corner(made["brightness_limit", "off"]) == corner(made["contrast_limit", "off"]) == [80, 120, 160]
    made = sheet("rgb_shift")
    assert corner(made["g_shift_limit", "-40"]) == [80, 80, 160]
    made = sheet("color_jitter")
    assert corner(made["brightness", "1.44"]) == pytest.approx([115, 173, 230], abs=1)
    made = sheet("photometric_distortion")
    assert corner(made["brightness", "1.125 = limit"]) == pytest.approx([90, 135, 180], abs=1)
    assert corner(made["channels", "BGR"]) == [160, 120, 80]
    made = sheet("darknet_hsv")
    assert corner(made["exposure", "1.5 = limit"]) == pytest.approx([120, 180, 240], abs=3)  # 8 bits of saturation
    made = sheet("hsv")  # value 160, saturation 1/2: 15 levels more of 255
    assert corner(made["value", "30 = limit"]) == pytest.approx([95, 142, 190], abs=2)
    assert corner(made["saturation", "15"]) == pytest.approx([71, 116, 160], abs=3)
    made = sheet("mixup")  # the second picture is the negative; scaled by 1.5 * 1.5 and placed anywhere
    assert corner(made["scale", "2.25"]) in ([127, 127, 127], [128, 128, 128])
    assert len(made["scale", "1.5 = limit"].boxes) == 2 and len(made["scale", "off"].boxes) == 1
    made = sheet("mosaic")
    assert made["draw", "epoch 0"].image.tolist() != made["draw", "epoch 1"].image.tolist()
    made = sheet("multiplicative_noise")
    assert corner(made["multiplier", "0.9 = limit"]) == pytest.approx([72, 108, 144], abs=1)
    made = sheet("posterize")
    assert len(np.unique(made["num_bits", "2 bits"].image)) <= 4
    made = sheet("gauss_noise", "data.augmentation.gauss_noise.std_range=[0.0, 0.05]")
    spread = made["std_range", "0.05 = limit"].image[:28].astype(float) - [80, 120, 160]
    assert spread.std() == pytest.approx(0.05 * 255, rel=0.1)

    made = sheet("affine")
    assert made["scale", "0.5 = limit"].boxes[0] == pytest.approx([40, 40, 60, 60], abs=1)
    assert made["translate_percent", "-0.25 = limit"].boxes[0] == pytest.approx([5, 5, 45, 45], abs=1)
    assert made["rotate", "off"].boxes.tolist() == [[30, 30, 70, 70]]
    made = sheet("expand")
    width, height = made["ratio", "2 = limit"].boxes[0, 2:] - made["ratio", "2 = limit"].boxes[0, :2]
    assert (width, height) == pytest.approx((20, 20), abs=1)
    made = sheet("horizontal_flip")
    assert list(made) == [("draw", "off"), ("draw", "on")]


def test_crops_overlap_as_far_as_asked(sheet) -> None:
    """The box is 0.16 of the image; a crop of which it is at least the half cannot show more than 0.32 of it."""
    made = sheet("iou_crop", "data.augmentation.iou_crop.min_ious=[0.5, 0.99]")
    x1, y1, x2, y2 = made["min_ious", "0.5"].boxes[0]
    content = (made["min_ious", "0.5"].image != FILL).any(axis=2).sum()
    assert (x2 - x1) * (y2 - y1) >= 0.48 * content  # whole pixels
    # nothing overlaps by 0.99: the image is kept, and it is said
    assert made["min_ious", "0.99: no such crop"].boxes[0] == pytest.approx([30, 30, 70, 70], abs=1e-3)


@pytest.mark.parametrize("name", augmentation_names())
def test_every_augmentation_is_shown(sheet, name: str) -> None:
    made = sheet(name, size=80 if name == "random_interpolation" else 100)  # at 100 px nothing is resized
    plain = next(sample.image for (_, value), sample in made.items() if value == "off")
    assert plain[2, 2].tolist() == [80, 120, 160] and plain[50, 50].tolist() == [60, 60, 60]
    assert any((sample.image != plain).any() for sample in made.values())


def test_transform_is_written(run: Run, tmp_path: Path) -> None:
    result = run("--transform", "darknet_jitter", "--image", 103)
    assert result.returncode == 0 and result.stderr == ""
    assert "on image 103" in result.stdout and "p is 0.0 in these settings" in result.stdout
    content = content_of(tmp_path, "transform")
    assert (content["transform"], content["image_id"], content["settings"]["jitter"]) == ("darknet_jitter", 103, 0.3)
    values = [tile["value"] for tile in content["tiles"] if tile["setting"] == "jitter"]
    assert values == ["off", "0.15", "0.3 = limit", "0.6"]
    assert cv2.imread(str(tmp_path / "out" / "transform.png")).shape[1] == 7 * (260 + 6) + 6


def test_synthetic_data_has_batches_too(run: Run, tmp_path: Path) -> None:
    result = run("data.fake=true", "model.num_classes=2", "--step", 2, "--images", 3)
    assert result.returncode == 0 and len(content_of(tmp_path)["images"]) == 3
    assert "optimizer step 2: 4 images of 96 px, seed 0; 3 drawn" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--transform", "blur"], 2, "--transform blur: must be one of multiplicative_noise, clahe"),
        (["--transform", "min_visibility"], 2, "must be one of"),
        (["--transform", "affine", "--image", "5"], 2, "--image 5: no training image"),
        (["--transform", "affine", "--split", "val"], 2, "--split val"),
        (["--transform", "affine", "--targets"], 2, "not allowed with"),
        (["--image", "101"], 2, "--image belongs to --transform"),
        (["--images", "0"], 2, "--images 0"),
        (["--step", "-1"], 2, "--step -1"),
        (["--split", "val", "--step", "1"], 2, "4 validation images make batches 0 to 0"),
        (["--targets", "model.backbone=darknet_tiny"], 2, "yolo.anchors"),
        (["--show"], 2, "--show: there is no display"),
        (["data.root=/nowhere"], 2, "/nowhere"),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: list[str], code: int, part: str) -> None:
    result = run(*arguments)
    assert result.returncode == code and part in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_unwritable_and_full(run: Run, run_script, drawn_dataset: Path, full_disk) -> None:
    result = run_script(visualize_batch.main, *SMALL, f"data.root={drawn_dataset}", "--output", "/proc/none")
    assert result.returncode == 6 and len(result.stderr.strip().splitlines()) == 1
    with full_disk(3000):
        result = run()
    assert result.returncode == 6 and "cannot be written" in result.stderr
