"""Settings of a run from a command line, with a plan that fits one's own data where no recipe is named.

Imports torch, which takes a second, only where a value depends on the data or the device.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from detection.config.automatic import Facts, fill_in, has_auto, scale_anchors
from detection.config.command_line import DEFAULTS
from detection.config.loading import Flag, Values, merge_settings, tuples_of, unused_notice, validate
from detection.config.relations import no_effect
from detection.config.settings import DataSettings, Settings
from detection.config.yaml_files import read_settings_file
from detection.data.anchor_clustering import SMALL_GAIN, fit_anchors, mean_best_iou
from detection.errors import DataError

if TYPE_CHECKING:
    from detection.data.annotations import Annotations

OWN_DATA = DEFAULTS.parent.parent / "recipes" / "own_data.yaml"
COCO_SIZED = 20_000  # training images from which args.yaml, made for COCO's 118,287, is the plan
COCO_FILE = ("annotations/instances_train2017.json", 100 * 2**20)  # of this size: not read twice


def load_run_settings(
    overlays: Sequence[Path],
    words: Sequence[str],
    flags: Sequence[Flag] = (),
    unused: Sequence[str] = (),
    tolerant: bool = False,
    fit: bool = True,
    anchors: bool = False,
) -> tuple[Settings, list[str]]:
    """Merge args.yaml, overlays, words and flags, and resolve what says `auto` from the data and the device.

    `model.pretrained` with published weights of another program brings the settings of their network, below overlays,
    words and flags.

    Without an overlay, a dataset of fewer than `COCO_SIZED` training images gets `recipes/own_data.yaml` below the
    words and flags; a dataset that is not there, or synthetic, does not.

    Args:
        overlays, words, flags: as in `load_settings`.
        unused: sections that the script does not read; see `unused_notice`.
        tolerant: annotations that cannot be used are not an error here; the script reports them.
        fit: the script trains: fit anchors where they are auto, and name the values; false: the published anchors.
        anchors: the script is about anchors: a detector that is auto has some.

    Raises:
        SettingsError: as in `load_settings`; the device is not there.
        DataError: the annotations that a value depends on cannot be used.
        CheckpointError: weights that are named could not be fetched.
    """
    tree, notices, given = merge_settings(DEFAULTS, overlays, words, flags)
    annotations, plan = None, list[Path]()
    if not overlays and not is_coco(tree):
        annotations = read_training_annotations(tree, tolerant)
        if annotations is None or len(annotations) < COCO_SIZED:
            plan = [OWN_DATA]
            tree, notices, given = merge_settings(DEFAULTS, plan, words, flags)
            notices.insert(0, f"plan for own data, because no --config is given: {OWN_DATA}")
    if needs := settings_of_weights(tree["model"]["pretrained"]):
        again, _, given = merge_settings(DEFAULTS, [*plan, needs, *overlays], words, flags)
        changed = [path for path in needs.values if leaf_of(again, path) != leaf_of(tree, path)]
        notices += [f"{needs.origin}: {path} = {leaf_of(again, path)}" for path in changed]
        tree = again
    if has_auto(tree):
        from detection.models.pretrained import detector_of, has_standard_weights
        from detection.runtime.devices import choose_device

        if annotations is None:
            annotations = read_training_annotations(tree, tolerant)
        facts = Facts(
            choose_device(tree["run"]["device"]).type != "cpu",
            cores_per_process(),
            None if annotations is None else len(annotations),
            () if annotations is None else annotations.categories.names,
            tuple(given),
            anchors,
            detector_of,
            has_standard_weights,
            lambda complete: anchors_for(complete, annotations if fit else None),
        )
        lines = fill_in(tree, read_settings_file(DEFAULTS), facts)
        notices += [f"auto: {line}" for line in lines] if fit else []
    notices += scale_anchors(tree)
    settings = validate(tree)
    read = [path for path in given if path.partition(".")[0] not in unused]
    return settings, notices + no_effect(read, settings) + unused_notice(given, unused)


def settings_of_weights(weights: Any) -> Values | None:
    """The network that published weights need, below what overlays and words say; None: other weights.

    Raises:
        CheckpointError: a name of the catalogue whose file could not be fetched.
    """
    if not isinstance(weights, str) or weights == "auto":
        return None
    from detection.models.pretrained import needed_settings

    values = needed_settings(weights)
    return Values(f"model.pretrained={weights}", values) if values else None


def leaf_of(tree: dict[str, Any], path: str) -> Any:
    """Return the value of a path in a nested mapping."""
    for part in path.split("."):
        tree = tree[part]
    return tree


def cores_per_process() -> int:
    """Count the cores of the processor for each of the processes that torchrun started on this machine, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(cores // max(int(processes), 1), 1) if processes.isdecimal() else cores


def is_coco(tree: dict[str, Any]) -> bool:
    """Return whether the data is COCO itself, or is not there, or is synthetic: args.yaml is the plan."""
    data = tree["data"]
    if data["fake"] or data["builtin"] or data["train_annotations"]:
        return bool(data["fake"])
    root = Path(str(data["root"]))
    file, size = root / COCO_FILE[0], COCO_FILE[1]
    return not root.exists() or (file.is_file() and file.stat().st_size > size)


def read_training_annotations(tree: dict[str, Any], tolerant: bool) -> "Annotations | None":
    """Read the training annotations that the settings name; None: synthetic data, or invalid settings.

    Raises:
        DataError: they cannot be used; `tolerant`: None instead.
    """
    # What may still say auto has no part in the annotations.
    plain = {"num_workers": 0, "cache": "none", "augmentation": read_settings_file(DEFAULTS)["data"]["augmentation"]}
    try:
        data = DataSettings.model_validate(tuples_of({**tree["data"], **plain}))
    except ValidationError:  # `validate` reports it
        return None
    if data.fake:
        return None
    from detection.data.build import read_training_annotations as read_annotations

    try:
        return read_annotations(data)
    except DataError:
        if tolerant:
            return None
        raise


def anchors_for(tree: dict[str, Any], annotations: "Annotations | None") -> tuple[list | None, str]:
    """Fit anchors to the boxes at the input size of training, if the given ones fit badly.

    Args:
        tree: complete settings; its anchors are the given ones.
        annotations: training annotations; None: not known.

    Returns:
        Anchors per level, stride ascending, or None: the given ones stay; and a line about it.
    """
    if annotations is None:
        return None, "the published ones, the data is not known"
    import torch

    from detection.data.box_shapes import shapes_at
    from detection.models import build_detector

    settings = validate(tree)
    with torch.device("meta"):
        detector = build_detector(settings, len(annotations.categories.names))
    assert detector.anchors is not None
    levels, size = detector.anchors.levels, settings.train.image_size
    given = np.array([anchor for level in levels for anchor in level])
    try:
        shapes, _ = shapes_at(annotations, detector.geometry, [size], settings.run.seed)
        fitted = fit_anchors(shapes, len(given), settings.run.seed, known=given).round(1)
    except (DataError, ValueError) as error:
        return None, f"the published ones: {error}"
    before, after = mean_best_iou(shapes, given), mean_best_iou(shapes, fitted)
    if after - before < SMALL_GAIN:
        return None, f"the published ones fit (mean IoU {before:.3f}, fitted ones {after:.3f})"
    ends = np.cumsum([len(level) for level in levels])[:-1]
    line = f"fitted to {len(shapes)} boxes at {size} px, mean IoU {after:.3f} (published: {before:.3f})"
    return [piece.tolist() for piece in np.split(fitted, ends)], line
