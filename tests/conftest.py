"""Fixtures shared by several test files."""

import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

import validation
from detection.config.loading import load_settings
from detection.config.settings import Settings
from detection.data.workers import kill_workers
from detection.errors import exit_with_message
from detection.training import console, throughput
from tests.support.paths import REPOSITORY

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # as `prepare_process` does for scripts
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

pytest_plugins = ["tests.support.darknet_files", "tests.support.detect_runs"]


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    """The traceback of an expected error keeps a loader alive, and its end would cost the next test ten seconds."""
    yield
    if multiprocessing.active_children():
        kill_workers()


@pytest.fixture(scope="session")
def default_settings() -> Callable[..., Settings]:
    """`default_settings("train.batch_size=4", ...)`: args.yaml changed by words."""

    def load(*words: str) -> Settings:
        return load_settings(REPOSITORY / "yolo-v3" / "args.yaml", words=words)[0]

    return load


class ScriptResult(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_script(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., ScriptResult]:
    """`run_script(detect.main, "--weights", ..., cwd=...)`: a script in this process; starting Python takes seconds."""
    monkeypatch.setitem(throughput.MATRIX_SIDES, "cpu", 64)  # a training measures them at its end, for seconds
    # Its pictures take as long as a small training. tests/scripts/test_main.py and test_report_page.py look at them.
    monkeypatch.setattr(console, "report_run", lambda *_: None)
    monkeypatch.setattr(validation, "draw_evaluation", lambda *_: {})  # test_validation.py looks at these

    def started(main: Callable[[], None], *arguments: str | Path, cwd: Path = tmp_path) -> ScriptResult:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            exit_with_message(main)
        out, err = capfd.readouterr()
        return ScriptResult(int(left.value.code or 0), out, err)

    return started


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("bccd")`: real data beside the repository; the test is skipped where there is none."""

    def find(name: str) -> Path:
        directory = SHARED_DATA / name
        if not directory.is_dir():
            pytest.skip(f"real data {directory} is not on this machine")
        return directory

    return find


@pytest.fixture(scope="session")
def shared_weights() -> Callable[[str], Path]:
    """`shared_weights("coco.names")`: trained by Darknet; the test is skipped where there is none."""

    def find(name: str) -> Path:
        path = SHARED_DATA.parent / "weights" / name
        if not path.is_file():
            pytest.skip(f"trained weights {path} are not on this machine")
        return path

    return find


@pytest.fixture(scope="session")
def drawn_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO layout with 9 training and 4 validation images; every box is a filled rectangle in its category's colour.

    Category ids 3 (red) and 7 (green); image k has k % 4 boxes, so some have none; sizes differ.
    """
    root = tmp_path_factory.mktemp("drawn")
    (root / "annotations").mkdir()
    colours = {3: (255, 0, 0), 7: (0, 255, 0)}
    for split, count in (("train", 9), ("val", 4)):
        (root / split).mkdir()
        images, rows = [], []
        generator = np.random.default_rng(count)
        for number in range(count):
            width, height = 60 + 8 * number, 96 - 4 * number
            image = np.full((height, width, 3), 20 + 10 * number, np.uint8)
            for _ in range(number % 4):
                category = int(generator.choice([3, 7]))
                x, y = int(generator.integers(0, width - 24)), int(generator.integers(0, height - 20))
                box_width, box_height = (int(side) for side in generator.integers(8, 20, 2))
                cv2.rectangle(image, (x, y), (x + box_width - 1, y + box_height - 1), colours[category], cv2.FILLED)
                box = {"bbox": [x, y, box_width, box_height], "area": box_width * box_height, "iscrowd": 0}
                rows.append({"id": len(rows) + 1, "image_id": 100 + number, "category_id": category, **box})
            cv2.imwrite(str(root / split / f"{number}.png"), image[..., ::-1])
            images.append({"id": 100 + number, "file_name": f"{number}.png", "width": width, "height": height})
        categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}]
        content = {"images": images, "annotations": rows, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(100):` files cannot grow beyond 100 bytes, the nearest to a full disk that needs no privileges.

    A context, not a switch: pytest itself writes its progress, perhaps to a file, before fixtures are taken down.
    """

    @contextmanager
    def limited(byte_count: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte_count, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
