"""Packed shards: the same batches, losses and resumed runs as with the folder, and what happens to damaged ones."""

import hashlib
import json
import os
import pickle
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import check_dataset
import detect
import pack
import validation
from detection.config.settings import Settings
from detection.data.annotations import annotations_digest
from detection.data.build import build_datasets, build_validation_dataset
from detection.data.image_file import read_file, read_image
from detection.data.loaders import build_training_loader
from detection.data.packed.images import PackedImages
from detection.data.sampler import TrainingBatchSampler
from detection.errors import DataError, DataReadError
from detection.inference.coco_results import CocoResults
from detection.inference.sources import find_sources
from tests.support import fault_runs
from tests.support.detectors import datasets_of
from tests.support.formats import FORMATS, Splits, draw_splits
from tests.support.training_runs import first_difference, load_main, rows_of

Load = Callable[..., Settings]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return draw_splits(tmp_path_factory.mktemp("splits"), train=16, val=3)


@pytest.fixture
def shards(run_script: Run, drawn_dataset: Path, tmp_path: Path) -> Path:
    """The drawn dataset, 9 and 4 images, in two shards of each split."""
    result = run_script(pack.main, f"data.root={drawn_dataset}", "--output", "shards", "--shards", "2")
    assert result.returncode == 0, result.stderr
    return tmp_path / "shards"


def batches_of(settings: Settings, workers: int = 0) -> list[dict[str, Any]]:
    """Two epochs of batches of 4 with all augmentation, mosaic too, at changing sizes."""
    training, _ = datasets_of(settings, 64, 64)
    sampler = TrainingBatchSampler(len(training), 4, 1, (0, 6), 0, 64, 1, (64, 96))
    return list(build_training_loader(training, sampler, workers, torch.device("cpu")))


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    keys = ("images", "boxes", "labels", "indices")
    return len(first) == len(second) and all(
        torch.equal(one[key], other[key]) for one, other in zip(first, second, strict=True) for key in keys
    )


@pytest.mark.parametrize("name", ["coco", "voc", "label_studio"])
def test_every_format_gives_the_same_batches(
    name: str, splits: Splits, run_script: Run, default_settings: Load, tmp_path: Path
) -> None:
    """One set only, divided by ids or by names as before; file names that Label Studio made lead out of the dataset."""
    FORMATS[name](tmp_path / "set", {"train": splits["train"]})
    before = sorted((tmp_path / "set").rglob("*"))
    result = run_script(pack.main, "data.root=set", "--output", "shards", "--shards", "3")
    assert result.returncode == 0, result.stderr
    assert sorted((tmp_path / "set").rglob("*")) == before
    both = [default_settings(f"data.root={tmp_path / place}") for place in ("set", "shards")]
    parts = [[dataset.annotations for dataset in build_datasets(settings.data, 0, None)] for settings in both]
    for folder, packed in zip(*parts, strict=True):
        assert annotations_digest(folder) == annotations_digest(packed) and 0 < len(folder) < 16
        for key in ("coco_boxes", "areas", "image_sizes", "annotation_ids"):
            assert np.array_equal(getattr(folder, key), getattr(packed, key))
    assert same(*map(batches_of, both))


def test_workers_and_the_cache_change_nothing(
    shards: Path, drawn_dataset: Path, default_settings: Load, tmp_path: Path
) -> None:
    words = ["data.cache=disk", f"data.cache_path={tmp_path / 'cache'}", "data.cache_gib=1"]
    expected = batches_of(default_settings(f"data.root={drawn_dataset}"))
    for workers in (2, 0):  # the second run finds what the first one has cached
        assert same(expected, batches_of(default_settings(f"data.root={shards}", *words), workers))


def test_a_run_is_continued_with_shards_bit_for_bit(
    shards: Path, drawn_dataset: Path, run_script: Run, tmp_path: Path
) -> None:
    """Six steps on the folder; four on the folder and two on shards."""
    (tmp_path / "network.cfg").write_text(fault_runs.NETWORK)
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(fault_runs.OVERLAY))
    words = ["--config", "overlay.yaml", "model.cfg=network.cfg"]
    runs = [
        [*words, f"data.root={drawn_dataset}", "train.steps=6", "--output", "whole"],
        [*words, f"data.root={drawn_dataset}", "train.steps=4", "--output", "parts"],
        ["--resume", "parts", f"data.root={shards}", "train.steps=6"],
    ]
    for arguments in runs:
        result = run_script(load_main().main, *arguments)
        assert result.returncode == 0, result.stderr
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for key in ("model", "average", "optimizer", "step"):
        assert first_difference(whole[key], parts[key]) is None
    losses = [
        [row["train/loss"] for row in rows_of(tmp_path / name) if "train/loss" in row] for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.slow
def test_a_run_on_shards_from_training_to_results(
    shards: Path, drawn_dataset: Path, run_script: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on shards; validated, detected and given to the evaluation server from both: the same numbers."""
    monkeypatch.setattr("detection.training.console.report_run", lambda *_: [])
    (tmp_path / "network.cfg").write_text(fault_runs.NETWORK)
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(fault_runs.OVERLAY))

    def run(main: Callable[[], None], *arguments: str | Path) -> None:
        result = run_script(main, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr

    words = ["--config", "overlay.yaml", "model.cfg=network.cfg", f"data.root={shards}", "train.steps=8"]
    run(load_main().main, *words, "--output", "run")
    places = {"folder": (drawn_dataset, drawn_dataset / "val"), "shards": (shards, shards / "val.index")}
    found: dict[str, list[Any]] = {}
    for name, (root, images) in places.items():
        low = "evaluation.confidence_threshold=0.0001"
        run(validation.main, "--weights", "run", f"data.root={root}", low, "--output", f"val_{name}")
        metrics = json.loads((tmp_path / f"val_{name}" / "metrics.json").read_text())
        assert metrics["images"] == 4 and metrics["boxes"] > 0
        run(detect.main, "--weights", "run", images, low, "--confidence", "0.0001", "--output", f"detect_{name}")
        rows = json.loads((tmp_path / f"detect_{name}" / "detections.json").read_text())
        scores = {key: value for key, value in metrics.items() if key.startswith("AP") or key == "losses"}
        listed = (tmp_path / f"val_{name}" / "detections.json").read_bytes()
        found[name] = [scores, listed, [{**row, "file": None} for row in rows]]
    assert found["folder"] == found["shards"]

    # As --testdev_dir says, with the files of test-dev: images without a list of annotations.
    test = tmp_path / "coco"
    shutil.copytree(drawn_dataset / "val", test / "test2017")
    content = json.loads((drawn_dataset / "annotations" / "instances_val.json").read_text())
    del content["annotations"]
    (test / "annotations").mkdir()
    (test / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    result = run_script(load_main().main, "--testdev_dir", "out put", "--model_dir", "run", "--dataset_dir", test)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    script, *words = shlex.split(result.stderr.partition("written there by: ")[2])
    assert script == "validation.py"
    run(validation.main, *words, low)
    assert (tmp_path / "out put" / "detections.json").read_bytes() == found["folder"][1]
    info = test / "annotations" / "image_info_test-dev2017.json"
    packing = [
        f"--image_dir={test / 'test2017'}",
        f"--image_info_file={info}",
        f"--output_file_prefix={shards}/testdev",
    ]
    run(pack.main, *packing)
    words = [f"data.root={shards}", "data.validation_annotations=annotations/instances_testdev.json", low]
    run(validation.main, "--weights", "run", "--no-ground-truth", *words, "--output", "from_shards")
    assert (tmp_path / "from_shards" / "detections.json").read_bytes() == found["folder"][1]


def test_any_tar_program_reads_a_shard_and_the_index_agrees(shards: Path, drawn_dataset: Path) -> None:
    """The layout by Python's tarfile, which knows nothing of the index."""
    listed = json.loads((drawn_dataset / "annotations" / "instances_train.json").read_text())
    body = json.loads((shards / "train.index").read_text().splitlines()[1])
    found = []
    for number, (name, size, digest) in enumerate(body["shards"]):
        content = (shards / name).read_bytes()
        assert name == f"train-0000{number}-of-00002.tar" and len(content) == size
        assert hashlib.sha256(content).hexdigest() == digest
        with tarfile.open(shards / name) as tar:
            members = tar.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(315532800, 0, 0, "", "")}
            for image, text in zip(members[::2], members[1::2], strict=True):
                found.append((number, image.offset_data, image.size))
                row = json.loads(tar.extractfile(text).read())
                assert image.name == f"{row['image_id']:012d}.png" and text.name == f"{row['image_id']:012d}.json"
                assert tar.extractfile(image).read() == (drawn_dataset / "train" / row["file_name"]).read_bytes()
                assert row["annotations"] == [a for a in listed["annotations"] if a["image_id"] == row["image_id"]]
                (entry,) = [e for e in listed["images"] if e["id"] == row["image_id"]]
                assert [row[key] for key in ("file_name", "width", "height")] == list(entry.values())[1:]
    assert found == list(zip(body["shard_of"], body["offsets"], body["sizes"], strict=True))
    assert body["ids"] == list(range(100, 109))
    copied = (shards / "annotations" / "instances_train.json").read_bytes()
    assert copied == (drawn_dataset / "annotations" / "instances_train.json").read_bytes()


def test_images_are_read_by_any_number_of_processes(shards: Path, drawn_dataset: Path) -> None:
    images = PackedImages(shards / "train.index")
    names = images.names()
    expected = {name: (drawn_dataset / "train" / name).read_bytes() for name in names}
    assert read_file(images.locate(names[0])).tobytes() == expected[names[0]]  # descriptors are open before the fork
    spawned = pickle.loads(pickle.dumps(images))
    assert not spawned.files._opened and images.files._opened
    children = []
    for seed in range(3):
        if not (child := os.fork()):
            order = np.random.default_rng(seed).choice(names, 200)
            os._exit(any(read_file(images.locate(name)).tobytes() != expected[name] for name in order.tolist()))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert all(read_file(spawned.locate(name)).tobytes() == expected[name] for name in names)


def test_every_script_reads_shards(shards: Path, drawn_dataset: Path, run_script: Run, tmp_path: Path) -> None:
    """The dataset doctor finds what it finds in the folder; detect.py takes a folder of shards or one index."""
    reports = []
    for root in (drawn_dataset, shards):
        result = run_script(check_dataset.main, f"data.root={root}", "--output", tmp_path / f"check_{root.name}")
        assert result.returncode == 0, result.stdout + result.stderr
        report = json.loads((tmp_path / f"check_{root.name}" / "check.json").read_text())
        reports.append([(found["kind"], found["split"], found["items"]) for found in report["findings"]])
        assert report["splits"]["training"]["images_opened"] == 9
    assert reports[0] == reports[1]
    sources = find_sources([str(shards / "val.index"), str(shards)])
    assert len(sources) == 4 + 13 and len({source.name for source in sources}) == 17
    for source, name in zip(sources, ["0.png", "1.png", "2.png", "3.png"], strict=False):
        assert source.label == f"{shards}/val-0000{int(name[0]) // 2}-of-00002.tar/{name}"
        assert np.array_equal(source.read(), read_image(drawn_dataset / "val" / name))
    results = CocoResults.__new__(CocoResults)
    results._image_ids, results._by_last_part = {"3.png": 103}, {}
    assert results.image_id(sources[3].file) == 103


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def edit_index(path: Path, **changes: Any) -> None:
    """Change an index, and its checksum too."""
    header, rows = (json.loads(line) for line in path.read_text().splitlines())
    encoded = json.dumps(rows | changes)
    path.write_text(json.dumps(header | {"sha256": hashlib.sha256(encoded.encode()).hexdigest()}) + f"\n{encoded}\n")


SHARD = "train-00001-of-00002.tar"
AGAIN = "python pack.py --rebuild-index ROOT"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {  # what happens to the folder; the line
    "short": (
        lambda root: cut(root / SHARD, 5000),
        "shard ROOT/" + SHARD + " has 5000 bytes, the index says SIZE; copy it again, or pack the dataset again",
    ),
    "missing": (
        lambda root: (root / SHARD).unlink(),
        "shard ROOT/" + SHARD + " cannot be read: No such file or directory; copy it again",
    ),
    "pipe": (
        lambda root: ((root / SHARD).unlink(), os.mkfifo(root / SHARD)),
        "shard ROOT/" + SHARD + " cannot be read: not a regular file",
    ),
    "link": (
        lambda root: (root / SHARD).rename(root.parent / "x") and (root / SHARD).symlink_to(root.parent / "x"),
        "shard ROOT/" + SHARD + " is a link out of its folder (data.follow_links: true allows it)",
    ),
    "index cut off": (
        lambda root: cut(root / "train.index", 300),
        f"index ROOT/train.index is damaged: its checksum does not match; {AGAIN}",
    ),
    "index emptied": (
        lambda root: cut(root / "train.index", 0),
        f"index ROOT/train.index is damaged or was not written by pack.py; {AGAIN}",
    ),
    "index gone": (
        lambda root: (root / "train.index").unlink(),
        "ROOT/train.index is missing; its shards are there: python pack.py --rebuild-index ROOT",
    ),
    "index leads out": (
        lambda root: edit_index(root / "train.index", shards=[["../x-00000-of-00001.tar", 9, ""]] * 2),
        f"index ROOT/train.index is damaged ('../x-00000-of-00001.tar' is no name of a shard); {AGAIN}",
    ),
    "offset": (
        lambda root: edit_index(root / "train.index", offsets=[10**9] * 9),
        f"index ROOT/train.index is damaged (an image lies outside its shard); {AGAIN}",
    ),
    "fewer images": (
        lambda root: edit_index(
            root / "train.index", **{key: [0] * 1 for key in ("ids", "shard_of", "offsets", "sizes")}, names=["0.png"]
        ),
        "ROOT/train.index has 1 images, ROOT/annotations/instances_train.json lists 9, and '1.png' is not among them; "
        "pack the dataset again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_damaged_shards_are_refused_in_one_line(case: str, shards: Path, default_settings: Load) -> None:
    size = (shards / SHARD).stat().st_size
    harm, line = FAULTS[case]
    harm(shards)
    with pytest.raises(DataError) as caught:
        build_datasets(default_settings(f"data.root={shards}").data, 0, None)
    assert str(caught.value) == line.replace("ROOT", str(shards)).replace("SIZE", str(size))
    assert build_validation_dataset(default_settings(
        f"data.root={shards}", f"data.validation_annotations={shards / 'annotations/instances_val.json'}"
    ).data, None)  # fmt: skip


def test_a_record_that_ends_early_in_training_is_an_unreadable_image(shards: Path, default_settings: Load) -> None:
    training, _ = datasets_of(default_settings(f"data.root={shards}"), 64, 64)
    os.truncate(shards / SHARD, (shards / SHARD).stat().st_size - 3000)
    with pytest.raises(DataReadError, match=rf"image {shards / SHARD}/8\.png is damaged: the file ends after \d+ of"):
        training[8]
    training.substitutes = True
    sample = training[8]
    assert sample.index == 0 and len(sample.unreadable) == 1 and "8.png is damaged" in sample.unreadable[0]
