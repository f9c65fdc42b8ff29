"""What `--resume` accepts as the name of a run."""

import argparse
from pathlib import Path

import pytest
import torch

from detection.checkpoints import save_checkpoint
from detection.errors import CheckpointError, SettingsError
from detection.training.resume import open_resumed_run


def test_resume_takes_the_run_or_its_last_checkpoint(tmp_path: Path, default_settings) -> None:
    run = tmp_path / "run"
    run.mkdir()
    content = {
        "step": 3, "settings": default_settings().model_dump(mode="json"), "categories": {}, "optimizer": {},
        "model": {"weight": torch.zeros(1)}, "data_digest": "", "progress": {},
    }  # fmt: skip
    for name in ("last.pt", "best.pt"):
        save_checkpoint(run / name, content)

    def resumed(path: Path) -> Path:
        common = {"config": [], "output": None, "settings": [], "accept_changes": False, "extend": False}
        words = argparse.Namespace(resume=str(path), **common)
        return open_resumed_run(words, [])[1]

    assert resumed(run) == resumed(run / "last.pt") == run
    with pytest.raises(SettingsError, match=r"best\.pt: a run is continued from its last\.pt$"):
        resumed(run / "best.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        resumed(tmp_path / "gone" / "last.pt")
