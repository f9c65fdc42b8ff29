"""Open trained weights as a detector: checkpoints, Darknet .weights and files of export.py."""

import argparse
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.checkpoints import (
    DETECTOR_FIELDS,
    READ_HERE,
    TORCH_SUFFIXES,
    check_fields,
)
from detection.config.command_line import DEFAULTS, device_flags, weights_file
from detection.config.loading import Flag, complete_settings, load_settings, read_cfg
from detection.config.settings import DARKNET_CFG, Settings
from detection.contract import Detector
from detection.errors import CheckpointError, SettingsError, name_list, say
from detection.foreign_files import describe_file, read_bounded
from detection.inference.exported_files import EXPORTED, open_exported
from detection.inference.exported_model import ExportedModel, build_exported, refuse_changes, refuse_non_finite
from detection.models import DETECTORS, build_detector
from detection.models.catalogue import find_weights
from detection.models.darknet.cfg import input_size, parse_cfg
from detection.models.darknet.layers import cfg_classes
from detection.models.darknet.weights import as_darknet, load_darknet_weights
from detection.models.importers import placeholder_names, read_checkpoint
from detection.models.stored import check_values, stored_settings
from detection.runtime.devices import choose_device

UNUSED = ("train", "scheduler")  # sections that nothing reads once a detector is trained
COCO_CLASSES = 80
FOREIGN_SUFFIXES = (".pdparams", ".safetensors")
SHOWN_NAMES = 8  # of the classes that were taken by position


@dataclass(frozen=True)
class OpenedDetector:
    """Detector with trained weights, on the CPU, in evaluation mode."""

    detector: Detector
    settings: Settings  # those stored in the file, else args.yaml, with the changes of the command line
    names: tuple[str, ...] | None  # class of each label; None: not in the file
    num_classes: int
    step: int  # optimizer steps trained; 0: not in the file
    seen: int  # images trained on
    lines: list[str]  # what was loaded, to be printed
    category_ids: tuple[int, ...] | None = None  # category id of each label in the training annotations; None: unknown

    def class_names(self) -> tuple[str, ...]:
        """Return the class of each label, class_0, class_1, ... if unknown."""
        return self.names or placeholder_names(self.num_classes)

    def num_parameters(self) -> int:
        """Count the weights of the network; for an exported file, whose module has none, as stored in the file."""
        model = self.detector.model
        if isinstance(model, ExportedModel):
            return model.num_parameters
        return sum(parameter.numel() for parameter in model.parameters())


def unused_sections(own: Settings) -> tuple[str, ...]:
    """List the sections that nothing reads: those of training, and of other detectors than that of a file."""
    return (*UNUSED, *(name for name in DETECTORS if name != own.model.detector))


def check_classes(opened: OpenedDetector, names: Sequence[str]) -> None:
    """Compare the classes of a dataset, in label order, with those of a detector; prints them if the weights name none.

    Raises:
        SettingsError: the numbers of classes differ.
    """
    if len(names) != opened.num_classes:
        raise SettingsError(
            f"the network has {opened.num_classes} classes, the data {len(names)}; name the classes with --names"
        )
    if opened.names is None:
        shown = names if len(names) <= SHOWN_NAMES else (*names[: SHOWN_NAMES - 1], "...", names[-1])
        order = "data.class_names" if opened.settings.data.class_names else "ascending category id"
        say(f"the weights name no classes: taken by position, in the order of {order}: {name_list(shown)} (--names)")


def open_command_line(arguments: argparse.Namespace, words: Sequence[str]) -> OpenedDetector:
    """Open the weights given by the options of `Parser.add_weights` and `Parser.add_settings`; prints what was loaded.

    Args:
        arguments: parsed command line.
        words: its `key.path=value` words.

    Raises:
        CheckpointError, SettingsError: see `open_weights`.
    """
    opened = open_weights(
        arguments.weights,
        arguments.cfg,
        arguments.names,
        DEFAULTS,
        arguments.config,
        words,
        device_flags(arguments),
    )
    say(*opened.lines)
    return opened


def open_weights(
    weights: Path,
    cfg: Path | None,
    names: Path | Sequence[str] | None,
    defaults: Path,
    overlays: Sequence[Path] = (),
    words: Sequence[str] = (),
    flags: Sequence[Flag] = (),
) -> OpenedDetector:
    """Build the detector that a file of weights belongs to and load the weights.

    Args:
        weights: checkpoint (.pt; its EMA if it has one), file written by export.py, Darknet weights, or
            published weights of other programs (docs/weights.md), also by their name in the catalogue.
        cfg: .cfg of a Darknet network; None: YOLOv3 as configured.
        names: file with the class names of Darknet weights, one per line, or the names.
        defaults: args.yaml.
        overlays, words, flags: settings of the command line, see `load_settings`.

    Raises:
        CheckpointError: the file is missing or damaged, or does not fit the network.
        SettingsError: the arguments contradict one another, or the device is absent.
    """
    weights = find_weights(weights_file(weights))
    kind = weights.suffix.lower()
    if kind not in EXPORTED:  # which have devices of their own, see `ExportedModel.use_device`
        refuse_absent_device(defaults, overlays, words, flags)
    if kind in (*TORCH_SUFFIXES, *FOREIGN_SUFFIXES, *EXPORTED) or zipfile.is_zipfile(weights):
        for flag, value in (("--cfg", cfg), ("--names", names)):
            if value is not None:
                raise SettingsError(f"{flag} belongs to Darknet weights; {weights} carries its own")
        return (_open_exported if kind in EXPORTED else _open_checkpoint)(weights, defaults, overlays, words, flags)
    if weights.is_file() and (foreign := describe_file(weights)):
        raise CheckpointError(f"{weights} is {foreign}; {READ_HERE}")
    try:
        return _open_darknet(weights, cfg, names, defaults, overlays, words, flags)
    except SettingsError as error:
        if cfg is None or not str(error).startswith("cfg: "):
            raise
        raise SettingsError(f"{cfg}: {str(error).removeprefix('cfg: ')}") from None


def refuse_absent_device(defaults: Path, overlays: Sequence[Path], words: Sequence[str], flags: Sequence[Flag]) -> None:
    """Check `run.device` before large files are read; weights bring no device of their own."""
    try:
        device = load_settings(defaults, overlays, words, flags)[0].run.device
    except SettingsError:  # may be valid with the settings of the file; `open_machine` checks again
        return
    choose_device(device)


def _open_checkpoint(
    weights: Path, defaults: Path, overlays: Sequence[Path], words: Sequence[str], flags: Sequence[Flag]
) -> OpenedDetector:
    checkpoint, moved = check_fields(read_checkpoint(weights), weights, DETECTOR_FIELDS), list[str]()
    own = on_this_machine(stored_settings(check_values(checkpoint, weights), weights, defaults, moved), defaults)
    try:
        settings, translated = load_settings(own, overlays, words, flags, unused_sections(own))
        names, ids = (tuple(checkpoint["categories"][key]) for key in ("names", "ids"))
        count = len(names)
        detector = build_detector(settings, count)
        detector.model.load_state_dict(checkpoint["average"] or checkpoint["model"])
        step = checkpoint["step"]
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"checkpoint {weights} does not fit the network of its settings: {reason}") from None
    source = f"{'EMA' if checkpoint['average'] else 'weights'} after {step} steps"
    source = str(checkpoint.get("source", source))  # of weights of another program
    lines = [*moved, *translated, f"{weights}: {source}, {detector.name}, {count} classes"]
    lines += map(str, checkpoint.get("lines", ()))
    seen = step * own.train.micro_batch * own.train.subdivisions
    known = None if "source" in checkpoint and names == placeholder_names(count) else names
    refuse_non_finite(detector.model.state_dict().items(), weights)
    return _finish(detector, settings, known, count, step, seen, lines, ids or None)


def _open_exported(
    weights: Path, defaults: Path, overlays: Sequence[Path], words: Sequence[str], flags: Sequence[Flag]
) -> OpenedDetector:
    model = open_exported(weights)
    description, moved = model.description, list[str]()
    try:
        own = complete_settings(description.settings_tree(), defaults, moved)
    except (SettingsError, KeyError) as error:
        raise CheckpointError(f"{weights}: its metadata is damaged or of another version: {error}") from None
    settings, translated = load_settings(own, overlays, words, flags, unused_sections(own))
    lines = [*moved, *translated]
    refuse_changes(model, own, settings)
    device = model.use_device(settings.run.device)
    used = [Flag("the file", "run.device", device), Flag("the file", "run.precision", "off")]
    settings, _ = load_settings(settings, flags=used)
    detector = build_exported(model, own, settings)
    count = len(description.names)
    names = None if description.names == placeholder_names(count) else description.names
    size = "any size" if description.dynamic_size else f"{description.image_size} px"
    half = ", network in float16" if description.half else ""
    half += ", convolutions in 8 bits" if description.int8 else ""
    lines.append(
        f"{weights}: {model.runtime}, outputs {description.output_kind}, {description.input} input, {size}{half}"
    )
    lines.append(f"{detector.name}, {count} classes, written by {description.program}")
    ids = description.category_ids
    return _finish(detector, settings, names, count, description.step, description.seen, lines, ids)


def on_this_machine(settings: Settings, defaults: Path) -> Settings:
    """Replace the device and its modes in a checkpoint's settings by the defaults: it may be from another machine."""
    machine = load_settings(defaults)[0].run
    here = {name: getattr(machine, name) for name in ("device", "lazy", "compile", "deterministic")}
    return settings.model_copy(update={"run": settings.run.model_copy(update=here)})


def _open_darknet(
    weights: Path,
    cfg: Path | None,
    names: Path | Sequence[str] | None,
    defaults: Path,
    overlays: Sequence[Path],
    words: Sequence[str],
    flags: Sequence[Flag],
) -> OpenedDetector:
    class_names = read_names(names) if isinstance(names, Path) else None if names is None else check_names(names)
    base: list[Flag] = []
    if cfg is not None:
        text = read_cfg(str(cfg))
        sections = parse_cfg(text)
        size = input_size(sections)
        described = {"model.backbone": DARKNET_CFG, "model.cfg": text}
        described |= {"evaluation.image_size": size, "train.image_size": size}
        base = [Flag("--cfg", path, value) for path, value in described.items()]
    settings, lines = load_settings(load_settings(defaults, flags=base)[0], overlays, words, flags, UNUSED)
    if settings.model.cfg is not None:
        num_classes = cfg_classes(parse_cfg(settings.model.cfg))
    else:
        num_classes = len(class_names or ()) or settings.model.num_classes or COCO_CLASSES
    if class_names is not None and len(class_names) != num_classes:
        where = names if isinstance(names, Path) else "names"
        raise SettingsError(f"{where}: has {len(class_names)} names, the network {num_classes} classes")

    detector = build_detector(settings, num_classes)
    lines += detector.notices({"evaluation.image_size": settings.evaluation.image_size})
    loaded = load_darknet_weights(detector.model, weights)
    if loaded.num_classes is not None and class_names is None and settings.model.cfg is None:
        num_classes = loaded.num_classes
        detector = build_detector(settings, num_classes)
        loaded = load_darknet_weights(detector.model, weights)
    if loaded.num_classes is not None:
        raise CheckpointError(f"{weights} has {loaded.num_classes} classes, the network {num_classes}")
    if loaded.convolutions < len(as_darknet(detector.model).darknet_convolutions()):
        raise CheckpointError(
            f"{weights} holds backbone weights only ({loaded.convolutions} convolutions); they start a training "
            f"(model.pretrained={weights}), they detect nothing"
        )
    refuse_non_finite(detector.model.state_dict().items(), weights)
    return _finish(detector, settings, class_names, num_classes, 0, loaded.header.seen, [*lines, *loaded.lines])


def _finish(detector: Detector, settings: Settings, *rest: Any) -> OpenedDetector:
    detector.geometry.check_size("evaluation.image_size", settings.evaluation.image_size)
    detector.model.eval()
    return OpenedDetector(detector, settings, *rest)


def read_names(path: Path) -> tuple[str, ...]:
    """Read class names, one per line; ignores empty lines at the end.

    Raises:
        SettingsError: the file cannot be read or is empty, or a name is empty or occurs twice.
    """
    try:
        names = tuple(line.strip() for line in read_bounded(path).decode("utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--names {path}: cannot be read: {error}") from None
    return check_names(names, f"--names {path}")


def check_names(names: Sequence[str], where: str = "names") -> tuple[str, ...]:
    """Check class names; SettingsError as `read_names`."""
    if not names or not all(names):
        raise SettingsError(f"{where}: must hold one class name per line")
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"{where}: {twice[0]!r} occurs twice")
    return tuple(names)
