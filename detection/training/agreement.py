"""Ranks of a run must be the same program on the same data: else they train a mixture, or wait for one another."""

from typing import Any

import torch

from detection.checkpoints import content_digest
from detection.config.loading import leaf_items
from detection.config.settings import Settings
from detection.errors import name_list
from detection.runtime.distributed import Ranks
from detection.runtime.reproducibility import code_digest
from detection.training.run import Run

# Settings that may differ between machines: paths, of whose content digests are compared, and how images are loaded.
OWN = {
    "run.device", "run.logs_path", "model.cfg", "model.pretrained", "data.root", "data.train_annotations",
    "data.train_images", "data.validation_annotations", "data.validation_images", "data.num_workers", "data.decoder",
    "data.cache", "data.cache_gib", "data.cache_path", "data.slow_sample_seconds",
}  # fmt: skip


def require_same_program(ranks: Ranks, settings: Settings) -> None:
    """Compare settings and code of all ranks.

    Raises:
        SettingsError: they differ.
    """
    if ranks.size > 1:
        leaves = dict(leaf_items(settings.model_dump(mode="json")))
        facts = {key: value for key, value in leaves.items() if key not in OWN}
        ranks.require_same({"torch": torch.__version__, "code version": code_digest(), **facts})


def require_same_run(run: Run, checkpoint: dict[str, Any] | None) -> None:
    """Compare data, classes, decoder and weights of all ranks, after `require_same_program`.

    Args:
        checkpoint: checkpoint that the run is resumed from; None: a new run.

    Raises:
        SettingsError: they differ.
    """
    if run.ranks.size > 1:
        facts = {
            "classes": name_list(run.categories.names),
            "training annotations": run.data_digest,
            "validation annotations": run.validation_digest,
            **run.conditions(),
            "initial weights": content_digest(dict(run.detector.model.state_dict())),
            "last.pt": checkpoint and content_digest(checkpoint),
        }
        run.ranks.require_same(facts)
