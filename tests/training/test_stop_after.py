"""run.stop_after: a run in pieces ends with the weights of a run that was never stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from detection.runtime.run_directory import read_status
from tests.support.fault_runs import NETWORK, OVERLAY, make_dataset
from tests.support.training_runs import first_difference, load_main, rows_of


def test_pieces_equal_the_whole(run_script: Callable[..., Any], tmp_path: Path) -> None:
    """8 steps at once; and to step 3, to step 5, a plain --resume that stays there, the rest; a cosine to the end."""
    make_dataset(tmp_path / "data")
    overlay = {**OVERLAY, "scheduler": {"strategy": "CosineAnnealingWarmRestartsWithWarmup", "warmup": 2}}
    overlay["model"] = {"backbone": "darknet_cfg", "cfg": NETWORK}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    words = ("--config", "overlay.yaml", "data.root=data", "run.loggers=[files]")
    main = load_main().main
    assert run_script(main, *words, "--output", "whole").returncode == 0
    done = run_script(main, *words, "--output", "parts", "run.stop_after=3")
    assert (done.returncode, "stopped after step 3: run.stop_after = 3; saved" in done.stderr) == (0, True), done.stderr
    assert "--resume parts run.stop_after=null" in done.stderr
    parts = tmp_path / "parts"
    assert torch.load(parts / "last.pt")["step"] == 3 and read_status(parts)["status"] != "finished"
    assert [row["step"] for row in rows_of(parts) if "val/AP" in row] == [3]
    for words, step in ((["run.stop_after=5"], 5), ([], 5), (["run.stop_after=null"], 8)):
        done = run_script(main, "--resume", "parts", *words)
        assert done.returncode == 0 and torch.load(parts / "last.pt")["step"] == step, done.stderr
    whole, pieces = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for key in ("model", "average", "optimizer", "step"):
        assert first_difference(whole[key], pieces[key]) is None, key
    losses = [
        [row for row in rows_of(tmp_path / name) if "train/loss" in row and "val/AP" not in row]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
