"""Validate trained weights: COCO metrics, error analysis and speed on a validation set.

python validation.py --weights logs/240224-211713_LambdaLR/best.pt
python validation.py --weights best.onnx data.root=my_dataset
python validation.py --weights my.weights --cfg my.cfg --names my.names data.root=my_dataset
python validation.py --config recipes/darknet_protocol.yaml --weights my.weights --cfg my.cfg --names my.names
python validation.py --weights best.pt --confidence 0.01 0.001 0.0001
python validation.py --weights best.pt --score objectness evaluation.max_images=1000
python validation.py --compare logs/A/best.pt logs/B/best.pt C.onnx D.weights --names coco.names data.root=data/coco

Prints the COCO table, AP per class, by box size and by aspect ratio, the confidence of the best F1, and timings. Writes
into a new directory below logs/: metrics.json, detections.json (COCO result format), pictures and CSV files of the
precision-recall and confidence curves, the confusion matrix (of detections with a score of at least
evaluation.visualization_threshold) and the metrics by size and aspect ratio, and validation.png (ground truth beside
detections).

--confidence  needs one pass over the images, at the lowest threshold; the tables are those of separate runs
--compare     shows metrics, parameters, images/s and AP per class side by side; for Darknet FILE.weights it uses
              FILE.cfg and, without --names, FILE.names in the same directory

With --weights, the COCO metrics are computed again by pycocotools, the official implementation, if that is estimated to
take less than a minute; a line and "pycocotools" in metrics.json report whether they agree. If not, the exit code is 1,
after everything has been written.

About 25 images per second on a CPU core with a network of a million parameters. Scoring 1.5 million boxes on 5000
images takes 3 seconds and 80 MiB; evaluation.backend=pycocotools gives the same numbers in 2 minutes.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.runtime.habana import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

import torch
from tqdm import tqdm

from detection.config.aliases import add_evaluation_flags
from detection.config.command_line import Parser, device_flags, weights_file
from detection.data.build import build_validation_dataset
from detection.data.coco import CocoDataset
from detection.data.loaders import build_evaluation_loader
from detection.data.transforms import Transform
from detection.data.workers import prepare_process
from detection.drawing.boxes import save_png
from detection.drawing.window import browse
from detection.errors import DataError, OutputError, SettingsError, UserError, exit_with_message
from detection.evaluation.coco_metric import score
from detection.evaluation.comparison import (
    Compared,
    check_same_data,
    class_table,
    comparison_table,
    display_names,
    images_per_second,
    write_comparison,
)
from detection.evaluation.error_analysis import Analysis, analyse, group_table, write_analysis
from detection.evaluation.evaluate import Evaluation, evaluate
from detection.evaluation.figures import draw_comparison, draw_evaluation
from detection.evaluation.pycocotools_check import check_with_pycocotools
from detection.evaluation.report import (
    class_lines,
    deviations,
    draw_detections,
    metric_lines,
    protocol_line,
    write_evaluation,
)
from detection.inference.weights import OpenedDetector, open_command_line
from detection.runtime.devices import Machine, describe_device, open_machine, peak_memory_gib
from detection.runtime.run_directory import new_run_directory

SETTING = re.compile(r"[a-z]\w*(\.\w+)*=")
CARRY_THEIR_OWN = {".pt", ".onnx"}  # suffixes of files that contain class names and network


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    if arguments.compare:
        compare(arguments)
    else:
        validate(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = Parser("validation.py", __doc__)
    parser.add_weights(required=False)
    add = parser.add_argument
    add("--compare", nargs="+", default=[], metavar="FILE", help="two or more weights to compare, instead of --weights")
    add("--confidence", nargs="+", default=[], metavar="C", help="one or more confidence thresholds to compare")
    add("--score", metavar="NAME", help="how YOLO scores a detection: product (default) or objectness")
    parser.add_settings()
    add_evaluation_flags(parser)
    parser.add_output()
    arguments = parser.parse_intermixed_args()
    for name in ("compare", "confidence"):  # options with several values also consume the settings that follow
        words = getattr(arguments, name)
        settings = [word for word in words if SETTING.match(word) and not Path(word).exists()]
        arguments.settings += settings
        setattr(arguments, name, [word for word in words if word not in settings])
    arguments.compare = [weights_file(word) for word in arguments.compare]
    if bool(arguments.compare) == (arguments.weights is not None):
        raise SettingsError("give either --weights FILE or --compare FILE FILE")
    if arguments.compare and (arguments.cfg or arguments.confidence):
        flag = "--cfg" if arguments.cfg else "--confidence"
        raise SettingsError(f"{flag} belongs to --weights; --compare takes the .cfg beside each file and one threshold")
    arguments.confidence = read_confidences(arguments.confidence, arguments.settings)
    return arguments


def read_confidences(words: Sequence[str], settings: list[str]) -> list[float]:
    """Parse the values of --confidence, and append the lowest to the settings.

    Raises:
        SettingsError: a value is not between 0 and 1 or is repeated, or the setting is given too.
    """
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            raise SettingsError(f"--confidence {word}: is not a number") from None
        if not 0 < values[-1] < 1:
            raise SettingsError(f"--confidence {word}: must lie between 0 and 1")
        if values.count(values[-1]) > 1:
            raise SettingsError(f"--confidence {word}: occurs twice")
    if values:
        if other := [word for word in settings if word.split("=")[0].endswith("confidence_threshold")]:
            raise SettingsError(f"--confidence and {other[0]} contradict one another; give one of them")
        settings.append(f"evaluation.confidence_threshold={min(values)!r}")
    return values


def validate(arguments: argparse.Namespace) -> None:
    """Evaluate one detector."""
    opened = open_detector(arguments)
    settings = opened.settings
    machine = open_machine(settings.run)
    dataset = open_dataset(opened)
    name = f"validation_{arguments.weights.stem}"
    directory = new_run_directory(Path(settings.run.logs_path), name, arguments.output)
    evaluation = evaluate_with_bar(opened, dataset, machine)
    thresholds, lines = compare_thresholds(arguments.confidence, evaluation, dataset)
    official, official_line = check_with_pycocotools(
        dataset.annotations, evaluation.detections, evaluation.metrics, evaluation.backend
    )

    started = time.perf_counter()
    analysis = analyse(
        dataset.annotations,
        evaluation.detections,
        settings.evaluation.confidence_threshold,
        settings.evaluation.visualization_threshold,
        evaluation.backend,
    )
    evaluation.seconds["analysis"] = time.perf_counter() - started
    lines += [*class_lines(evaluation.class_ap), official_line]
    lines += [*group_table("size (pixels)", analysis.sizes), *group_table("width:height", analysis.aspects)]
    lines += [best_f1_line(analysis), *time_lines(opened, evaluation, len(dataset))]

    more = {
        "weights": str(arguments.weights),
        "images": len(dataset),
        "parameters": opened.num_parameters(),
        "protocol": protocol_line(settings, opened.detector),
        "deviations": deviations(settings, opened.detector),
        "thresholds": thresholds,
        "pycocotools": official,
        **analysis.summary(),
        "seconds": evaluation.seconds,
        "images_per_second": images_per_second(evaluation, len(dataset)),
        "peak_memory_gib": peak_memory_gib(torch.device("cpu")),
    }
    shown_from = settings.evaluation.visualization_threshold
    picture = draw_detections(dataset, evaluation, shown_from, settings.evaluation.visualize_images)
    pictures = {} if picture is None else {"validation": picture}
    pictures |= draw_evaluation(evaluation, analysis, dataset.annotations, shown_from)
    try:
        used = settings.evaluation.model_dump(mode="json")
        write_evaluation(directory, evaluation, dataset, opened.step, used, more)
        write_analysis(directory, analysis, evaluation, dataset.annotations)
        for file_name, picture in pictures.items():
            save_png(directory / f"{file_name}.png", picture)
    except OSError as error:
        raise OutputError(f"results in {directory} cannot be written: {error.strerror or error}") from None
    finally:  # after the files, which do not depend on the terminal; and also where they cannot be written
        print("\n".join(lines), flush=True)
    print(f"results in {directory}")
    if arguments.show:
        browse(name, len(pictures), list(pictures.values()).__getitem__)
    if official["differences"]:
        raise UserError(official_line)


def compare(arguments: argparse.Namespace) -> None:
    """Compare several detectors on the same images."""
    files = arguments.compare
    names = display_names(files)
    if arguments.names and not [file for file in files if file.suffix not in CARRY_THEIR_OWN]:
        raise SettingsError("--names belongs to Darknet weights; all files of --compare carry their own")
    detectors = [open_detector(arguments_for(arguments, file)) for file in files]
    machines = [open_machine(opened.settings.run) for opened in detectors]
    datasets = [open_dataset(opened) for opened in detectors]
    for file, dataset in zip(files, datasets, strict=True):
        check_same_data(datasets[0].annotations, dataset.annotations, file)
    directory = new_run_directory(Path(detectors[0].settings.run.logs_path), "compare", arguments.output)
    rows = []
    for name, file, opened, dataset, machine in zip(names, files, detectors, datasets, machines, strict=True):
        print(f"{name}: ", end="")
        evaluation = evaluate_with_bar(opened, dataset, machine)
        rows.append(
            Compared(
                name,
                str(file),
                opened.num_parameters(),
                opened.settings.evaluation.image_size,
                evaluation.metrics,
                {class_name: ap for class_name, (ap, _, _) in evaluation.class_ap.items()},
                len(evaluation.detections),
                images_per_second(evaluation, len(dataset)),
                opened.step,
                protocol_line(opened.settings, opened.detector),
            )
        )
    lines = [*class_table(rows), *comparison_table(rows)]
    if len({row.protocol for row in rows}) > 1:
        lines.append("note: the protocols differ, as printed above; settings on the command line hold for all")
    picture = draw_comparison({row.name: row.metrics for row in rows}, {row.name: row.class_ap for row in rows})
    try:
        write_comparison(directory, rows)
        save_png(directory / "comparison.png", picture)
    except OSError as error:
        raise OutputError(f"results in {directory} cannot be written: {error.strerror or error}") from None
    finally:
        print("\n".join(lines), flush=True)
    print(f"results in {directory}")
    if arguments.show:
        browse("comparison", 1, lambda _: picture)


def open_detector(arguments: argparse.Namespace) -> OpenedDetector:
    """Open the weights of --weights; refuses --score for a detector without that setting."""
    opened = open_command_line(arguments, arguments.settings)
    own = opened.settings.model.detector
    if foreign := [f for f in device_flags(arguments) if f.spelling == "--score" and not f.path.startswith(f"{own}.")]:
        raise SettingsError(f"--score sets {foreign[0].path}, which the detector {own} of {arguments.weights} has not")
    return opened


def arguments_for(arguments: argparse.Namespace, file: Path) -> argparse.Namespace:
    """Return the arguments with `file` as --weights, and the .cfg and .names beside Darknet weights."""
    own = vars(arguments) | {"weights": file, "cfg": None, "names": None}
    if file.suffix not in CARRY_THEIR_OWN:
        cfg, class_names = file.with_suffix(".cfg"), file.with_suffix(".names")
        own["cfg"] = cfg if cfg.is_file() else None
        own["names"] = arguments.names or (class_names if class_names.is_file() else None)
    return argparse.Namespace(**own)


def open_dataset(opened: OpenedDetector) -> CocoDataset:
    """Open the validation set with the labels of the detector.

    Raises:
        SettingsError: the numbers of classes of data and network differ.
        DataError: there is no data, or it has no ground-truth box.
    """
    evaluation = opened.settings.evaluation
    dataset = build_validation_dataset(opened.settings.data, opened.names, evaluation.max_images)
    dataset.sample_transform = Transform(opened.detector.geometry, evaluation.image_size)
    print("\n".join(dataset.source_lines))
    annotations = dataset.annotations
    if len(annotations.categories.names) != opened.num_classes:
        raise SettingsError(
            f"the network has {opened.num_classes} classes, the data {len(annotations.categories.names)}; "
            "name the classes with --names"
        )
    if annotations.crowd.all():
        raise DataError(f"no ground-truth box: none of the {len(dataset)} validation images has a usable box")
    return dataset


def evaluate_with_bar(opened: OpenedDetector, dataset: CocoDataset, machine: Machine) -> Evaluation:
    """Run the detector on the dataset and compute the metrics, with a progress bar on a terminal."""
    settings, device = opened.settings, machine.device
    how = f"{describe_device(device)}, {machine.precision}"
    print(f"{how}, {len(dataset)} images; {protocol_line(settings, opened.detector)}", flush=True)
    detector = machine.to_device(opened.detector)
    batch_size = settings.evaluation.batch_size or settings.train.micro_batch
    loader = build_evaluation_loader(dataset, batch_size, settings.data.num_workers, device)
    with tqdm(total=len(loader), unit="batch", disable=None) as bar:

        def advance() -> None:
            bar.update()

        evaluation = evaluate(
            detector.model,
            detector.criterion,
            detector.postprocess,
            loader,
            dataset.annotations,
            device,
            machine.autocast,
            settings.evaluation.backend,
            on_batch=advance,
        )
    if evaluation.dropped:
        print(f"warning: {evaluation.dropped} detections were non-finite numbers and were dropped")
    return evaluation


def compare_thresholds(
    confidences: Sequence[float], evaluation: Evaluation, dataset: CocoDataset
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score each threshold; returns the metrics per threshold for metrics.json, and the COCO tables as lines."""
    if not confidences:
        return [], metric_lines(evaluation.metrics)
    rows, lines = [], []
    for confidence in confidences:
        detections, metrics = evaluation.detections, evaluation.metrics
        if confidence != min(confidences):
            detections = detections.above(confidence)
            metrics = score(dataset.annotations, detections, evaluation.backend).metrics
        lines += [f"Confidence Threshold: {confidence:g}", f"Found Boxes: {len(detections)}", *metric_lines(metrics)]
        rows.append({"confidence": confidence, "boxes": len(detections), **metrics})
    return rows, lines


def best_f1_line(analysis: Analysis) -> str:
    best = analysis.summary()["best_f1"]
    return (
        f"highest mean F1 {best['f1']:.3f} at confidence {best['confidence']:.3f}: precision {best['precision']:.3f}, "
        f"recall {best['recall']:.3f} (IoU 0.5, mean over classes)"
    )


def time_lines(opened: OpenedDetector, evaluation: Evaluation, images: int) -> list[str]:
    """Format the timings; accelerators are synchronised after each part."""
    seconds, workers = evaluation.seconds, opened.settings.data.num_workers
    load = f"waiting for {workers} loader processes" if workers else "loading"
    loss = f", loss {seconds['loss']:.1f} s" if evaluation.losses else ""
    return [
        f"{len(evaluation.detections)} boxes on {images} images; {images_per_second(evaluation, images):.1f} images/s: "
        f"{load} {seconds['load']:.1f} s, network {seconds['network']:.1f} s, NMS {seconds['nms']:.1f} s{loss}",
        f"{evaluation.backend} {seconds['metric']:.1f} s, curves, confusion and groups {seconds['analysis']:.1f} s; "
        f"peak memory of this process {peak_memory_gib(torch.device('cpu')):.2f} GiB",
    ]


if __name__ == "__main__":
    exit_with_message(main)
