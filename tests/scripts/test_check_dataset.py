"""check_dataset.py finds every injected fault, with exactly its ids, and nothing in a valid dataset."""

import copy
import json
import stat
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import check_dataset
from detection.config.command_line import DEFAULTS
from detection.config.loading import load_settings
from detection.config.settings import Settings
from detection.contract import Anchors, Detector, Geometry
from detection.data.annotation_file import sound_columns
from detection.data.annotations import flatten_annotations
from detection.data.dataset_formats import Source
from detection.data.image_file import list_images
from detection.dataset_checks.annotation_checks import check_annotations, check_categories, flatten_tolerantly
from detection.dataset_checks.before_training import check_before_training
from detection.dataset_checks.findings import KINDS, Findings
from detection.dataset_checks.fit_checks import check_fit
from detection.errors import DataError, DataReadError, UserError
from detection.models import build_detector
from detection.models.yolo.fit import AnchorFit
from tests.support.broken_dataset import FAULTS, WORDS, Dataset, Expected, encode
from tests.support.detectors import datasets_of
from tests.support.evaluation_cases import coco_content

Check = Callable[..., tuple[int, dict[str, Any], str, str]]
detectors: dict[str, Detector] = {}  # most tests use the same


def built_once(settings: Settings, num_classes: int) -> Detector:
    key = repr((settings.model, settings.yolo, settings.train.image_size))
    if key not in detectors:
        detectors[key] = build_detector(settings, num_classes)
    return detectors[key]


@pytest.fixture
def check(run_script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Runner of check_dataset.py: exit code, check.json, text and error line."""
    monkeypatch.setattr(check_dataset, "build_detector", built_once)

    def started(dataset: Dataset, *arguments: str) -> tuple[int, dict[str, Any], str, str]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        dataset.write()
        result = run_script(check_dataset.main, *WORDS, *dataset.words, *arguments, "--output", out)
        report = json.loads((out / "check.json").read_text()) if (out / "check.json").exists() else {}
        return result.returncode, report, result.stdout, result.stderr

    return started


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "data")


def found_in(report: dict[str, Any]) -> Expected:
    rows = report["findings"]
    assert all(row["count"] == len(row["items"]) for row in rows)
    assert len({(row["kind"], row["split"]) for row in rows}) == len(rows)  # one line per kind and split
    return {(row["kind"], row["split"]): row["items"] for row in rows}


def as_sets(expected: Expected) -> dict[tuple[str, str], list[str]]:
    """Count items, to compare them regardless of order."""
    return {key: sorted(map(repr, items)) for key, items in expected.items()}


def state_of(root: Path) -> list[tuple[Any, ...]]:
    """Type, time and content of everything below a directory."""
    found = [(path, path.lstat()) for path in sorted(root.rglob("*"))]
    return [(p, s.st_mode, s.st_mtime_ns, p.read_bytes() if stat.S_ISREG(s.st_mode) else b"") for p, s in found]


# --- what is found ---


def test_a_sound_dataset_is_called_sound(check: Check, tmp_path: Path) -> None:
    code, report, text, err = check(Dataset(tmp_path / "data"), "--strict")
    assert (code, err) == (0, "")
    assert report["findings"] == [] and (report["errors"], report["warnings"], report["depth"]) == (0, 0, "full")
    assert report["splits"]["training"] | {"annotations": 0, "images_directory": 0} == {
        **{"format": "COCO JSON", "annotations": 0, "images_directory": 0, "images": 4, "boxes": 4, "images_opened": 4},
        "boxes_per_class": {"cat": 2, "dog": 2},
    }
    # every box is 20 x 20 and so is an anchor
    assert report["fit"] == {"image_size": 64, "boxes": 4, "mean_best_iou": 1.0, "recall_at_iou_0.5": 1.0}
    assert "no error, no warning" in text and len(text.strip().splitlines()) == 6  # one about the plan


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_each_fault_alone_is_found_with_exactly_its_ids(check: Check, dataset: Dataset, fault) -> None:
    expected = fault(dataset)
    code, report, text, err = check(dataset)
    assert as_sets(found_in(report)) == as_sets(expected)
    severities = {KINDS[kind].severity for kind, _ in expected}
    assert code == ("error" in severities) and bool(err) == bool(code)
    assert all(kind in text for kind, _ in expected)
    assert all(letter.isprintable() or letter == "\n" for letter in text)  # names from the file cannot move the cursor


def test_all_faults_at_once(check: Check, dataset: Dataset) -> None:
    together: Expected = defaultdict(list)
    for fault in FAULTS.values():
        for key, items in fault(dataset).items():
            together[key] += items
    together[("wrong_class_count", "training")] = ["4, not 80"]  # with "Dog " and "elk" of other faults
    together[("rare_category", "training")] = ["Dog "]  # one box, beside the 101 of many_boxes
    code, report, _, err = check(dataset)
    assert code == 1 and "errors" in err and len(err.splitlines()) == 1
    assert as_sets(found_in(report)) == as_sets(together)
    kinds = {kind for kind, _ in together}
    assert len(kinds) >= 45
    order = [row["severity"] for row in report["findings"]]
    assert order == sorted(order, key=["error", "warning", "info"].index)  # errors first


def test_depths_see_what_they_can(check: Check, dataset: Dataset) -> None:
    expected: Expected = {}
    for name in ("image_missing", "size_differs", "image_empty", "exif_orientation"):
        expected |= FAULTS[name](dataset)
    cut = dataset.image(data=encode(dataset.picture())[:-200])
    expected[("image_damaged", "training")] = [cut["file_name"]]
    by_depth = (("--quick", "image_missing"), ("--headers", ("image_missing", "size_differs", "image_empty", "exif_")))
    for depth, kinds in by_depth:
        _, report, *_ = check(dataset, depth)
        assert as_sets(found_in(report)) == as_sets({k: v for k, v in expected.items() if k[0].startswith(kinds)})
        assert report["depth"] == depth[2:]
    assert as_sets(found_in(check(dataset)[1])) == as_sets(expected)


def test_quick_sees_equal_files_of_one_name_in_both_splits(check: Check, dataset: Dataset) -> None:
    for same in (True, False):  # the other pair has one name and one size too, but another content
        entry = dataset.image(data=encode(dataset.picture(), "BMP"), suffix="bmp")
        copy = dataset.image("validation", data=None, file_name=entry["file_name"])
        data = dataset.path(entry).read_bytes()
        dataset.path(copy, "validation").write_bytes(data if same else data[:-1] + bytes([data[-1] ^ 255]))
    (leaked, _) = dataset.content["validation"]["images"][-2:]
    _, report, *_ = check(dataset, "--quick")
    assert found_in(report) == {("leakage", "both"): [leaked["file_name"]]}


# --- errors stop training, warnings do not ---


def train_as_far_as_data_goes(words: list[str]) -> list[str]:
    """Open, check and read a dataset as yolo-v3/main.py does; returns the warnings of the plan."""
    settings, _ = load_settings(DEFAULTS, words=[*WORDS, *words])
    sets = datasets_of(settings, 64, 64, 0, settings.model.num_classes)
    detector = detector_with(settings.yolo.anchors, (8, 16, 32))
    warnings = check_before_training(*sets, settings.data, settings.train, detector)
    for dataset in sets:
        for index in range(len(dataset)):
            sample = dataset[(index, 0, 0)]
            assert np.isfinite(sample.boxes).all()
    return warnings


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_training_refuses_errors_and_nothing_else(dataset: Dataset, fault) -> None:
    expected = fault(dataset)
    dataset.write()
    if any(KINDS[kind].severity == "error" for kind, _ in expected):
        with pytest.raises(UserError) as caught:
            train_as_far_as_data_goes(dataset.words)
        assert caught.value.exit_code in (2, 3)
        assert "\n" not in caught.value.line
        return
    warnings = train_as_far_as_data_goes(dataset.words)
    settings, _ = load_settings(DEFAULTS, words=[*WORDS, *dataset.words])
    training, _ = datasets_of(settings, 64, 64, 0, None)
    for kind, split in expected:
        if kind in ("degenerate_box", "box_outside", "orphan_annotation"):
            assert list(training.annotations.counts.ids.values()) == [expected[kind, split]]
        elif KINDS[kind].severity == "warning" and kind not in ("duplicate_image", "leakage", "leakage_by_look"):
            assert any(KINDS[kind].what in line and split in line for line in warnings), kind


def test_degenerate_and_outside_boxes_are_errors_under_strict(check: Check, tmp_path: Path) -> None:
    for name in ("degenerate_box", "box_outside"):
        dataset = Dataset(tmp_path / name)
        expected = FAULTS[name](dataset)
        assert check(dataset)[0] == 0
        dataset.words.append("data.strict=true")
        code, report, *_ = check(dataset)
        assert code == 1 and found_in(report) == expected and report["errors"] == 1
        with pytest.raises(UserError):
            train_as_far_as_data_goes(dataset.words)


ODD_VALUES: list[Any] = [
    *(None, "", "3", "x", [], {}, True, False, 0, -1, 1, 3, 7, 99, 2.5, 64.0, 1e300, 2**31, 2**70),
    *(float("nan"), float("inf"), [1, 2, 3, 4], [1, 2, -3, 4], [1, 2, 3], [1e300, 1, 1e300, 1e300], "../a.png"),
]


def test_doctor_and_loader_agree_on_any_value_anywhere(dataset: Dataset, tmp_path: Path) -> None:
    """With one to three random values replaced, it reports errors exactly if the loader refuses, and never crashes."""
    generator = np.random.default_rng(0)
    outcomes = []
    for _ in range(1500):
        content = copy.deepcopy(dataset.content["training"])
        for _ in range(generator.integers(1, 4)):
            row = content[str(generator.choice(list(content)))]
            keys = ["id", "file_name", "width", "image_id", "category_id", "bbox", "area", "iscrowd", "name"]
            place, value = generator.integers(len(row)), ODD_VALUES[generator.integers(len(ODD_VALUES))]
            row[place][str(generator.choice(keys))] = value
        findings = Findings()
        source = Source("training", "COCO JSON", tmp_path / "file.json", tmp_path, None)
        sound = sound_columns(content, "file.json", lambda fault, to=findings: to.add(fault.kind, "training", ["x"]))
        found = flatten_tolerantly(sound, source, None, None, findings)
        if found is not None:
            check_annotations(found, "training", findings)
        try:
            flatten_annotations(content, "file.json")
            refused = False
        except DataError:
            refused = True
        errors = [finding.kind for finding in findings.of("error") if finding.kind != "no_boxes"]
        assert bool(errors) == refused, (content, errors)
        outcomes.append(refused)
    assert 300 < sum(outcomes) < 1400


def test_links_may_be_allowed(check: Check, dataset: Dataset) -> None:
    FAULTS["image_outside"](dataset)
    dataset.words.append("data.follow_links=true")
    assert check(dataset)[0] == 0
    train_as_far_as_data_goes(dataset.words)


def test_a_link_is_not_followed_in_the_middle_of_a_run_either(dataset: Dataset, tmp_path: Path) -> None:
    dataset.write()
    settings, _ = load_settings(DEFAULTS, words=[*WORDS, *dataset.words])
    training, _ = datasets_of(settings, 64, 64, 0, None)
    path = dataset.path(dataset.content["training"]["images"][0])
    path.rename(tmp_path / "secret.png")
    path.symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataReadError, match="follow_links"):
        training.load_image(0)


def test_every_kind_has_a_case() -> None:
    """Every kind of finding is produced by a test."""
    here = Path(__file__).read_text(encoding="utf-8")
    assert [kind for kind in KINDS if kind not in FAULTS and f'"{kind}"' not in here] == []


# --- what leaves nothing of a split ---


@pytest.mark.parametrize(
    ("key", "kind"), [("images", "no_images"), ("categories", "no_categories"), ("annotations", "no_boxes")]
)
def test_empty_lists(check: Check, dataset: Dataset, key: str, kind: str) -> None:
    for emptied in {key, "annotations"}:
        dataset.content["training"][emptied] = []
    code, report, *_ = check(dataset)
    assert code == 1 and found_in(report)[kind, "training"] == [key]
    assert report["errors"] == 1 and report["splits"]["validation"]["images_opened"] == 2
    with pytest.raises(UserError):
        train_as_far_as_data_goes(dataset.words)


def test_a_validation_set_without_boxes_is_a_warning(check: Check, dataset: Dataset) -> None:
    dataset.content["validation"]["annotations"] = []
    code, report, *_ = check(dataset)
    assert code == 0 and found_in(report)["no_ground_truth", "validation"] == ["annotations"]
    assert check(dataset, "--strict")[0] == 1


def test_all_images_faulty(check: Check, dataset: Dataset) -> None:
    for row in dataset.content["training"]["images"]:
        row["id"] = "1"
    code, report, *_ = check(dataset)
    found = found_in(report)
    assert code == 1 and found["bad_id", "training"] == [f"number {k}" for k in range(4)]
    assert found["no_images", "training"] == ["images"]


BROKEN_FILES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "deep": lambda data: b"[" * 100_000,
    "list": lambda data: b"[]",
    "other": lambda data: b'{"shapes": []}',
    "binary": lambda data: b"\x89PNG\xff\xfe",
    "utf-16": lambda data: data.decode().encode("utf-16"),
}


@pytest.mark.parametrize("edit", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_file_that_cannot_be_read_is_an_error_and_alone_the_end(check: Check, dataset: Dataset, edit) -> None:
    dataset.raw.append(edit)
    code, report, *_ = check(dataset)
    assert code == 1 and found_in(report) == {("unreadable_file", "training"): ["instances_train.json"]}
    code, report, _, err = check(dataset, "--split", "training")
    assert (code, report) == (2, {}) and "instances_train.json" in err and len(err.splitlines()) == 1


def test_one_annotation_file(check: Check, dataset: Dataset, tmp_path: Path) -> None:
    dataset.write = lambda: (Dataset.write(dataset), (dataset.root / "annotations/instances_val.json").unlink())[0]
    _, report, *_ = check(dataset)  # a tenth of it validates, as in training; of four images more than that
    assert sum(report["splits"][split]["images"] for split in ("training", "validation")) == 4
    code, report, *_ = check(dataset, "--split", "training")
    assert list(report["splits"]) == ["training"]
    # or a share of it validates; a fault of the file is named once, one of an image in its split
    dataset.words.append("data.validation_fraction=0.5")
    dataset.box(["a"], dataset.content["training"]["images"][0])
    _, report, *_ = check(dataset)
    assert [key for key in found_in(report) if key[0] == "bad_box"] == [("bad_box", "both")]
    assert sum(report["splits"][split]["images"] for split in ("training", "validation")) == 4
    # explicit paths outside any layout
    annotations, images = tmp_path / "boxes.json", tmp_path / "data" / "train"
    annotations.write_text(json.dumps(dataset.content["validation"]))
    dataset.words[:] = [f"data.train_annotations={annotations}", f"data.train_images={images}"]
    code, report, *_ = check(dataset, "--split", "training")
    assert code == 1 and len(found_in(report)["image_missing", "training"]) == 1  # the other one of two validates


def test_validation_annotations_alone(check: Check, dataset: Dataset) -> None:
    dataset.write = lambda: (Dataset.write(dataset), (dataset.root / "annotations/instances_train.json").unlink())[0]
    code, report, *_ = check(dataset)
    assert code == 1 and found_in(report) == {("no_annotation_file", "training"): ["training"]}


def test_no_images_directory(check: Check, dataset: Dataset, tmp_path: Path) -> None:
    dataset.write()
    (tmp_path / "data" / "val").rename(tmp_path / "elsewhere")
    code, report, *_ = check(dataset)
    assert code == 1 and found_in(report) == {("no_image_directory", "validation"): ["validation"]}
    assert report["splits"]["validation"]["images"] == 2


def test_class_names_that_the_file_lacks(check: Check, dataset: Dataset) -> None:
    dataset.words.append('data.class_names=["cat", "bird"]')
    code, report, *_ = check(dataset)
    assert code == 1 and "bird" in str(found_in(report)["refused", "training"][0])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.root=nowhere"], "nowhere"),
        (["data.fake=true"], "data.fake"),
        (["data.rot=x"], "data.rot"),
        (["--quick", "--headers"], "--headers"),
        (["data.validation_fraction=0.5", "data.validation_annotations=a.json"], "validation_annotations"),
        (["data.train_annotations=absent.json", "--split", "training"], "absent.json"),
    ],
)
def test_refusals_in_one_line(run_script, words: list[str], expected: str) -> None:
    result = run_script(check_dataset.main, *words)
    assert result.returncode == 2 and expected in result.stderr and len(result.stderr.splitlines()) == 1


def test_unwritable_output(run_script, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dataset.write()
    result = run_script(check_dataset.main, *WORDS, *dataset.words, "--quick", "--output", tmp_path / "file" / "below")
    assert result.returncode == 6 and len(result.stderr.splitlines()) == 1


# --- the user's data ---


def test_nothing_is_changed_and_a_read_only_dataset_will_do(check: Check, dataset: Dataset, tmp_path: Path) -> None:
    for fault in FAULTS.values():
        fault(dataset)
    dataset.write()
    dataset.write = lambda: dataset
    directories = [path for path in (tmp_path / "data").rglob("*") if path.is_dir() and not path.is_symlink()]
    try:
        for directory in directories:
            directory.chmod(0o555)
        before = state_of(tmp_path / "data")
        assert check(dataset)[0] == 1
        assert state_of(tmp_path / "data") == before
    finally:
        for directory in directories:
            directory.chmod(0o755)


def test_nothing_outside_the_image_directory_is_opened(check: Check, dataset: Dataset, monkeypatch) -> None:
    for name in ("image_outside", "file_name_escapes", "image_not_regular"):
        FAULTS[name](dataset)
    opened, original = [], np.fromfile
    monkeypatch.setattr(
        np, "fromfile", lambda path, *rest, **more: opened.append(path) or original(path, *rest, **more)
    )
    check(dataset)
    assert len(opened) == 6 and all(path.parent.name in ("train", "val") and path.is_file() for path in opened)


# --- parts ---


def annotations_of(boxes: list[list[float]], size: tuple[int, int] = (64, 64), labels: list[int] | None = None):
    rows = [(1, label, box) for label, box in zip(labels or [1] * len(boxes), boxes, strict=True)]
    return flatten_annotations(coco_content(rows, categories=(1, 2), size=size), "file.json")


def detector_with(anchors: Anchors, strides: tuple[int, ...]) -> Detector:
    """Detector with anchors and nothing else."""
    nothing = torch.nn.Identity()
    fit = AnchorFit(anchors, strides, [1.0] * len(strides))
    return Detector(nothing, nothing, nothing, Geometry(strides[-1]), check_fit=fit)


def test_fit_by_hand(default_settings) -> None:
    """A 128 x 128 image in a 64 px network: everything is halved."""
    network = detector_with((((10.0, 10.0),), ((40.0, 40.0),)), (8, 16))
    words = ("train.image_size=64", "train.resize_frequency=1", "train.multiscale_sizes=[32, 64]")
    train = default_settings(*words).train
    # 20x20 -> 10x10: IoU 1 with the first anchor; 40x40 -> 20x20: 100/400 and 400/1600, both 0.25, the first wins;
    # 7x20 -> 3.5x10: 35/100, and at the smallest size 1.75 px wide: tiny
    annotations = annotations_of([[0, 0, 20, 20], [50, 50, 40, 40], [100, 0, 7, 20]], (128, 128))
    findings = Findings()
    numbers, _ = check_fit(annotations, network, train, "training", findings)
    assert numbers["mean_best_iou"] == pytest.approx((1 + 0.25 + 0.35) / 3)
    assert numbers["recall_at_iou_0.5"] == pytest.approx(1 / 3)
    assert findings["tiny_box"] == [3] and findings["poor_anchors"] == findings["shared_prediction"] == []
    check_fit(annotations_of([[50, 50, 40, 40]], (128, 128)), network, train, "training", findings)
    assert findings["poor_anchors"] == ["yolo.anchors"]


def test_the_letterbox_is_part_of_the_fit(default_settings) -> None:
    """128 x 64 in 64 px: scale 0.5, 16 px of border above; two centres share a cell of 8 px only with it."""
    network = detector_with((((10.0, 10.0),),), (8,))
    train = default_settings("train.image_size=64").train
    # centres y 12 and 20 -> 6 and 10 without the border: rows 0 and 1; the border of 16 px keeps the rows apart
    apart = annotations_of([[0, 2, 20, 20], [0, 10, 20, 20]], (128, 64))
    # y 18 and 28 -> 9 + 16 = 25 and 14 + 16 = 30: both row 3
    together = annotations_of([[0, 8, 20, 20], [0, 18, 20, 20]], (128, 64))
    for annotations, expected in ((apart, []), (together, [1])):
        findings = Findings()
        check_fit(annotations, network, train, "training", findings)
        assert findings["shared_prediction"] == expected


def test_the_loser_of_a_shared_prediction_is_the_one_training_leaves_out() -> None:
    """The reported boxes agree with the assignment of the loss."""
    from detection.models.yolo.darknet_loss import assign_targets
    from detection.models.yolo.grid import anchor_table

    generator = np.random.default_rng(3)
    corners = generator.uniform(0, 40, (60, 2))
    annotations = annotations_of(np.hstack([corners, generator.uniform(4, 24, (60, 2))]).tolist())
    levels = [torch.tensor([[8.0, 8.0], [16.0, 8.0]]), torch.tensor([[20.0, 20.0]])]
    table = anchor_table(levels, (8, 16), [(8, 8), (4, 4)], (1.0, 1.0))
    boxes = torch.from_numpy(annotations.boxes)[None]
    assignment = assign_targets(boxes, torch.zeros(1, 60, dtype=torch.int64), table)
    lost = annotations.annotation_ids[~assignment.last[0].numpy()].tolist()
    assert 5 < len(lost) < 55
    train = load_settings(DEFAULTS, words=["train.image_size=64"])[0].train
    findings = Findings()
    network = detector_with(tuple(tuple(map(tuple, level.tolist())) for level in levels), (8, 16))
    check_fit(annotations, network, train, "training", findings)
    assert findings["shared_prediction"] == sorted(lost)


def test_a_rare_category() -> None:
    for count, expected in ((100, []), (101, ["name 2"])):
        findings = Findings()
        labels = [1] * count + [2]
        boxes = [[0.1 * k, 0, 5, 5] for k in range(count + 1)]
        check_categories(annotations_of(boxes, labels=labels), "training", findings)
        assert findings["rare_category"] == expected


def test_names_are_looked_up_by_listing(tmp_path: Path, monkeypatch) -> None:
    """Directories are listed once, and single files queried only if they are links or missing."""
    for folder in ("", "a", "a/b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for number in range(20):
            (tmp_path / folder / f"{number}.jpg").touch()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "0.jpg")
    names = [f"{folder}{number}.jpg" for folder in ("", "a/", "a/b/", "./a//") for number in range(20)]
    asked, original = [], Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: asked.append(path.name) or original(path))
    listing = list_images(tmp_path, [*names, "link.jpg", "absent.jpg", "absent/0.jpg"], follow_links=False)
    assert asked == ["link.jpg", "absent.jpg", "0.jpg"]
    assert listing.missing == [len(names) + 1, len(names) + 2]
    assert listing.outside == listing.not_regular == []


# --- training, and real data ---


def test_training_names_missing_images_before_the_first_step(dataset: Dataset) -> None:
    names = [dataset.image(data=None)["file_name"] for _ in range(7)]
    dataset.write()
    with pytest.raises(UserError) as caught:
        train_as_far_as_data_goes(dataset.words)
    assert caught.value.exit_code == 2 and "missing image files: 7 (" in caught.value.line
    assert all(name in caught.value.line for name in names[:5]) and names[6] not in caught.value.line


def test_blood_cells(run_script, shared_data, tmp_path: Path) -> None:
    """The two splits contain two photographs of the same field of view, verified by eye."""
    words = ["--config", DEFAULTS.parent.parent / "recipes" / "bccd.yaml", f"data.root={shared_data('bccd')}"]
    result = run_script(check_dataset.main, *words, "--output", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert result.returncode == 0 and report["errors"] == 0 and report["warnings"] == 1
    assert found_in(report)["leakage_by_look", "both"] == ["BloodImage_00037.jpg"]
    assert report["splits"]["training"]["boxes_per_class"] == {"RBC": 2381, "WBC": 214, "Platelets": 209}


# --- other formats, read in place ---


def test_what_reading_leaves_out_and_does_not_understand_is_found(
    check: Check, dataset: Dataset, tmp_path: Path
) -> None:
    """A YOLO line without a class, a score; and keys of a JSON file that change what a box means."""
    root = tmp_path / "yolo"
    for number, text in enumerate(("0 .5 .5 .5 .5 .9", "7 .5 .5 .5 .5\n0 .5 .5 .5 .5")):
        for split in ("train", "val"):
            (root / "images" / split).mkdir(parents=True, exist_ok=True)
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            (root / "images" / split / f"{number}.png").write_bytes(
                encode(np.full((64, 64, 3), 99 * number + (split == "val"), np.uint8))
            )
            (root / "labels" / split / f"{number}.txt").write_text(text)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cell]")
    words = list(dataset.words)
    dataset.words.append(f"data.root={root}")
    _, report, text, _ = check(dataset)
    found = {(row["kind"], row["what"].partition(": ")[2]): row["count"] for row in report["findings"]}
    assert found["left_out", "lines whose class does not exist"] == 2
    assert found["reading_note", "lines whose sixth number, a score, has no place in the new format"] == 2
    assert "YOLO data.yaml" in text and report["splits"]["training"]["boxes"] == 2
    dataset.words[:] = words
    dataset.content["training"]["annotations"][0]["ignore"] = 1
    _, report, *_ = check(dataset)
    assert len(found_in(report)["meaning_lost", "training"]) == 1
    dataset.words.append("data.ignore_as_crowd=true")
    _, report, *_ = check(dataset)
    assert ("meaning_lost", "training") not in found_in(report) and ("crowd", "training") in found_in(report)
