"""Compare several detectors on the same images: one row each, as a table, a CSV and a JSON file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.data.annotations import Annotations
from detection.drawing.files import replace_csv, replace_file
from detection.errors import SettingsError
from detection.evaluation.coco_metric import count_gt
from detection.evaluation.evaluate import Evaluation

SHOWN_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


@dataclass(frozen=True)
class Compared:
    """One detector's row."""

    name: str
    file: str
    parameters: int | None  # None: the file does not say (ONNX)
    image_size: int  # side of the network input, pixels
    metrics: dict[str, float | None]
    class_ap: dict[str, float | None]
    boxes: int
    images_per_second: float  # load, network and NMS
    step: int
    protocol: str


def images_per_second(evaluation: Evaluation, images: int) -> float:
    """Images per second through loading, network and NMS, without loss and metric."""
    return images / max(sum(evaluation.seconds[part] for part in ("load", "network", "nms")), 1e-9)


def display_names(files: Sequence[Path]) -> list[str]:
    """Return the file names without suffix, with the directory where two are equal (every run has a best.pt).

    Raises:
        SettingsError: fewer than two files, or a repeated one.
    """
    if len(files) < 2:
        raise SettingsError(f"--compare {files[0]}: at least two files of weights are needed")
    real = [file.resolve() for file in files]
    if twice := [str(file) for file, path in zip(files, real, strict=True) if real.count(path) > 1]:
        raise SettingsError(f"--compare: {twice[-1]} occurs twice")
    names = [path.stem for path in real]
    names = [f"{path.parent.name}/{path.stem}" if names.count(path.stem) > 1 else path.stem for path in real]
    return [str(path) if names.count(name) > 1 else name for name, path in zip(names, real, strict=True)]


def check_same_data(first: Annotations, other: Annotations, file: Path) -> None:
    """Refuse detectors whose settings lead to other images or ground truth; the order of classes may differ.

    Raises:
        SettingsError: names the second file.
    """

    def content(annotations: Annotations) -> tuple[Any, ...]:
        gt_boxes = dict(zip(annotations.categories.names, count_gt(annotations).tolist(), strict=True))
        present = {name: count for name, count in gt_boxes.items() if count}
        return annotations.image_ids.tolist(), annotations.file_names.tobytes(), present

    if content(first) != content(other):
        raise SettingsError(
            f"--compare: the settings of {file} lead to other validation images or classes than those before; "
            "give the same to all, e.g. data.root=DIRECTORY"
        )


def comparison_table(rows: Sequence[Compared]) -> list[str]:
    """Format one line per detector, with the best value of each metric marked by *."""
    width = max(len("weights"), *(len(row.name) for row in rows))
    best = {name: max((row.metrics[name] or 0.0) for row in rows) for name in SHOWN_METRICS}
    columns = "  ".join(f"{name:>6}" for name in SHOWN_METRICS)
    lines = [f" {'weights':<{width}}  {'parameters':>11}  {'size':>5}  {columns}  {'boxes':>9}  {'images/s':>8}"]
    for row in rows:
        values = []
        for name in SHOWN_METRICS:
            value = row.metrics[name]
            mark = "*" if value is not None and value == best[name] else " "
            values.append("-".rjust(6) if value is None else f"{mark}{value:.3f}".rjust(6))
        parameters = "-" if row.parameters is None else f"{row.parameters:,}"
        lines.append(
            f" {row.name:<{width}}  {parameters:>11}  {row.image_size:>5}  {'  '.join(values)}  {row.boxes:>9}  "
            f"{row.images_per_second:>8.1f}"
        )
    return lines


def class_table(rows: Sequence[Compared]) -> list[str]:
    """Format AP per class of the first detector and the differences of the others; only classes with ground truth."""
    first, *others = rows
    defined = {name: ap for name, ap in first.class_ap.items() if ap is not None}
    width = max(len("class"), *(len(name) for name in defined))
    columns = [max(len(row.name), 6) for row in rows]
    titles = "  ".join(f"{row.name:>{column}}" for row, column in zip(rows, columns, strict=True))
    lines = [f" {'class':<{width}}  {titles}"]
    for name, ap in defined.items():
        values = [f"{ap:>{columns[0]}.3f}"]
        values += [f"{(row.class_ap[name] or 0.0) - ap:>+{c}.3f}" for row, c in zip(others, columns[1:], strict=True)]
        lines.append(f" {name:<{width}}  {'  '.join(values)}")
    return lines


def write_comparison(directory: Path, rows: Sequence[Compared]) -> None:
    """Write `comparison.json` with everything and `comparison.csv` with one row per detector."""
    replace_file(directory / "comparison.json", json.dumps([vars(row) for row in rows], indent=2).encode())
    names = list(rows[0].metrics)
    table: list[list[Any]] = [["weights", "file", "parameters", "image_size", *names, "boxes", "images_per_second"]]
    for row in rows:
        start = [row.name, row.file, row.parameters, row.image_size]
        values = [row.metrics[name] for name in names]
        table.append([*start, *values, row.boxes, round(row.images_per_second, 2)])
    replace_csv(directory / "comparison.csv", table)
