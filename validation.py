"""Validate trained weights: COCO metrics, error analysis and speed on a validation set.

python validation.py --weights logs/240224-211713_LambdaLR/best.pt
python validation.py --weights best.onnx data.root=my_dataset
python validation.py --weights my.weights --cfg my.cfg --names my.names data.root=my_dataset
python validation.py --config recipes/darknet_protocol.yaml --weights my.weights --cfg my.cfg --names my.names
python validation.py --weights best.pt --confidence 0.01 0.001 0.0001
python validation.py --weights best.pt --score objectness evaluation.max_images=1000
python validation.py CONFIG CHECKPOINT --eval bbox                      the call of mmdetection's tools/test.py
python validation.py --weights best.pt --tiles 640 --overlap 128        images much larger than the network input
python validation.py --weights best.pt --no-ground-truth data.root=data/coco \
    data.validation_annotations=annotations/image_info_test-dev2017.json data.validation_images=test2017
python validation.py --follow logs/240224-211713_LambdaLR [--follow-timeout 60]    each new checkpoint of a run
python validation.py --compare logs/A/best.pt logs/B/best.pt C.onnx D.weights --names coco.names data.root=data/coco

Prints the COCO table, AP per class, by box size and by aspect ratio, the confidence of the best F1, and timings. Writes
into a new directory below logs/: metrics.json, detections.json (COCO result format), pictures and CSV files of the
precision-recall and confidence curves, the confusion matrix (of detections with a score of at least
evaluation.visualization_threshold) and the metrics by size and aspect ratio, and validation.png (ground truth beside
detections).

--confidence  needs one pass over the images, at the lowest threshold; the tables are those of separate runs
--tiles, --tta
              look at each image several times (docs/large_images.md); the header names it as a deviation
--no-ground-truth
              scores nothing and writes detections.json alone, for the evaluation server: any annotations are ignored
--follow      evaluates each new checkpoint of a run while it trains, here or on another machine that sees its files,
              until the run ends: exit code 0 if it has finished, 1 if it was stopped, has failed or died, or if there
              is no new checkpoint for --follow-timeout minutes. Writes the files of a run into RUN/evaluator, which the
              run's report.html, compare_runs.py and TensorBoard show beside its own (docs/follow_a_run.md)
--compare     shows metrics, parameters, images/s and AP per class side by side; for Darknet FILE.weights it uses
              FILE.cfg and, without --names, FILE.names in the same directory

With --weights, the COCO metrics are computed again by pycocotools, the official implementation, if that is estimated to
take less than a minute; a line and "pycocotools" in metrics.json report whether they agree. If not, the exit code is 1,
after everything has been written.

About 25 images per second on a CPU core with a network of a million parameters. Scoring 1.5 million boxes on 5000
images takes 3 seconds and 80 MiB; evaluation.backend=pycocotools gives the same numbers in 2 minutes.
"""

import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path

from detection.runtime.habana import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from detection.config.aliases import add_evaluation_flags
from detection.config.command_line import Parser, at_least_zero, device_flags, read_confidences, weights_file
from detection.config.mmdetection_call import take_positions
from detection.data.build import build_validation_dataset
from detection.data.coco import CocoDataset
from detection.data.loaders import build_evaluation_loader, collate_samples
from detection.data.transforms import Transform
from detection.data.workers import prepare_process
from detection.drawing.boxes import save_png
from detection.drawing.window import browse
from detection.errors import DataError, SettingsError, UserError, exit_with_message, name_list, say
from detection.evaluation.comparison import (
    Compared,
    check_same_data,
    class_table,
    comparison_table,
    display_names,
    images_per_second,
    write_comparison,
)
from detection.evaluation.detections import write_detections
from detection.evaluation.error_analysis import analyse, group_table, write_analysis
from detection.evaluation.evaluate import (
    Evaluation,
    InferenceResult,
    compute_metrics,
    drop_non_finite,
    run_finder,
    run_inference,
)
from detection.evaluation.figures import draw_comparison, draw_evaluation
from detection.evaluation.pycocotools_check import check_with_pycocotools
from detection.evaluation.report import (
    best_f1_line,
    class_lines,
    compare_thresholds,
    deviations,
    draw_detections,
    protocol_line,
    write_evaluation,
)
from detection.inference.exported_files import EXPORTED
from detection.inference.views import Viewer, open_viewer
from detection.inference.weights import OpenedDetector, check_classes, open_command_line
from detection.runtime.devices import describe_device, open_machine, peak_memory_gib
from detection.runtime.run_directory import new_run_directory, writing_results
from detection.training.follow import Timing, follow

SETTING = re.compile(r"[a-z]\w*(\.\w+)*=")
CARRY_THEIR_OWN = {".pt", *EXPORTED}  # suffixes of files that contain class names and network


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    if arguments.follow:
        seconds = None if arguments.follow_timeout is None else 60 * arguments.follow_timeout
        follow(arguments, arguments.follow, Timing(seconds, arguments.min_eval_interval))
    elif arguments.compare:
        compare(arguments)
    elif arguments.no_ground_truth:
        predict(arguments)
    else:
        validate(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = Parser("validation.py", __doc__)
    parser.add_weights(required=False)
    add = parser.add_argument
    add("--compare", nargs="+", default=[], metavar="FILE", help="two or more weights to compare, instead of --weights")
    add(
        "--follow", type=Path, metavar="RUN", help="run directory whose checkpoints are evaluated, instead of --weights"
    )
    add("--follow-timeout", type=at_least_zero, metavar="MINUTES", help="end without a new checkpoint for so long")
    add(
        "--min-eval-interval",
        type=at_least_zero,
        default=0.0,
        metavar="SECONDS",
        help="from one evaluation to the next",
    )
    add("--confidence", nargs="+", default=[], metavar="C", help="one or more confidence thresholds to compare")
    add("--score", metavar="NAME", help="how YOLO scores a detection: product (default) or objectness")
    add("--no-ground-truth", action="store_true", help="write the COCO result file of images without annotations")
    parser.add_views()
    parser.add_settings()
    add_evaluation_flags(parser)
    parser.add_output()
    arguments = parser.parse_intermixed_args()
    for name in ("compare", "confidence"):  # options with several values also consume the settings that follow
        words = getattr(arguments, name)
        settings = [word for word in words if SETTING.match(word) and not Path(word).exists()]
        arguments.settings += settings
        setattr(arguments, name, [word for word in words if word not in settings])
    take_positions(arguments)
    arguments.compare = [weights_file(word) for word in arguments.compare]
    sources = (arguments.weights is not None, bool(arguments.compare), arguments.follow is not None)
    if sum(sources) != 1:
        raise SettingsError("give one of --weights FILE, --compare FILE FILE and --follow RUN")
    if arguments.follow:
        others = ("cfg", "names", "confidence", "score", "no_ground_truth", "tiles", "tta", "show")
        if given := [name for name in others if getattr(arguments, name)]:
            raise SettingsError(f"--{given[0].replace('_', '-')} does not go with --follow; run --weights FILE for it")
    elif arguments.follow_timeout is not None or arguments.min_eval_interval:
        raise SettingsError("--follow-timeout and --min-eval-interval belong to --follow")
    if arguments.compare and (arguments.cfg or arguments.confidence):
        flag = "--cfg" if arguments.cfg else "--confidence"
        raise SettingsError(f"{flag} belongs to --weights; --compare takes the .cfg beside each file and one threshold")
    if arguments.no_ground_truth and (arguments.compare or arguments.confidence or arguments.show):
        raise SettingsError("--no-ground-truth scores nothing: --compare, --confidence and --show do not go with it")
    if len(arguments.confidence) > 1 and (arguments.tiles or arguments.tta):
        raise SettingsError("--confidence takes one value with --tiles and --tta: merging depends on weaker boxes")
    arguments.confidence = read_confidences(arguments.confidence, arguments.settings)
    return arguments


def validate(arguments: argparse.Namespace) -> None:
    """Evaluate one detector."""
    opened, viewer = open_detector(arguments)
    settings = opened.settings
    dataset = open_dataset(opened)
    name = f"validation_{arguments.weights.stem}"
    directory = new_run_directory(Path(settings.run.logs_path), name, arguments.output)
    evaluation = evaluate_with_bar(opened, dataset, viewer)
    thresholds, lines = compare_thresholds(arguments.confidence, evaluation, dataset.annotations)
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
        "protocol": protocol_line(settings, opened.detector, dataset),
        "deviations": deviations(settings, opened.detector, dataset),
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
        with writing_results(directory):
            used = settings.evaluation.model_dump(mode="json")
            write_evaluation(directory, evaluation, dataset, opened.step, used, more)
            write_analysis(directory, analysis, evaluation, dataset.annotations)
            for file_name, picture in pictures.items():
                save_png(directory / f"{file_name}.png", picture)
    finally:  # after the files, which do not depend on the terminal; and also where they cannot be written
        say(*lines)
    say(f"results in {directory}")
    if arguments.show:
        browse(name, len(pictures), list(pictures.values()).__getitem__)
    if official["differences"]:
        raise UserError(official_line)


def predict(arguments: argparse.Namespace) -> None:
    """Write the detections on images without ground truth in COCO result format."""
    opened, viewer = open_detector(arguments)
    dataset = open_dataset(opened, ground_truth=False)
    logs, name = Path(opened.settings.run.logs_path), f"test_{arguments.weights.stem}"
    directory = new_run_directory(logs, name, arguments.output)
    detections, dropped = drop_non_finite(infer_with_bar(opened, dataset, viewer, None).detections)
    detections = detections.take(~np.isin(detections.labels, dataset.unlisted))
    if dataset.unlisted:
        names = [dataset.annotations.categories.names[label] for label in dataset.unlisted]
        say(f"left out, since the annotation file has no such category: {name_list(names)}")
    with writing_results(directory):
        write_detections(directory / "detections.json", dataset.annotations, detections)
    non_finite = f", {dropped} non-finite ones dropped" if dropped else ""
    say(f"{len(detections)} boxes on {len(dataset)} images{non_finite}: {directory / 'detections.json'}")


def compare(arguments: argparse.Namespace) -> None:
    """Compare several detectors on the same images."""
    files = arguments.compare
    names = display_names(files)
    if arguments.names and not [file for file in files if file.suffix not in CARRY_THEIR_OWN]:
        raise SettingsError("--names belongs to Darknet weights; all files of --compare carry their own")
    detectors, viewers = zip(*(open_detector(arguments_for(arguments, file)) for file in files), strict=True)
    datasets = [open_dataset(opened) for opened in detectors]
    for file, dataset in zip(files, datasets, strict=True):
        check_same_data(datasets[0].annotations, dataset.annotations, file)
    directory = new_run_directory(Path(detectors[0].settings.run.logs_path), "compare", arguments.output)
    rows = []
    for name, file, opened, dataset, viewer in zip(names, files, detectors, datasets, viewers, strict=True):
        say(f"{name}: ", end="")
        evaluation = evaluate_with_bar(opened, dataset, viewer)
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
                protocol_line(opened.settings, opened.detector, dataset),
            )
        )
    lines = [*class_table(rows), *comparison_table(rows)]
    if len({row.protocol for row in rows}) > 1:
        lines.append("note: the protocols differ, as printed above; settings on the command line hold for all")
    picture = draw_comparison({row.name: row.metrics for row in rows}, {row.name: row.class_ap for row in rows})
    try:
        with writing_results(directory):
            write_comparison(directory, rows)
            save_png(directory / "comparison.png", picture)
    finally:
        say(*lines)
    say(f"results in {directory}")
    if arguments.show:
        browse("comparison", 1, lambda _: picture)


def arguments_for(arguments: argparse.Namespace, file: Path) -> argparse.Namespace:
    """Return the arguments with `file` as --weights, and the .cfg and .names beside Darknet weights."""
    own = vars(arguments) | {"weights": file, "cfg": None, "names": None}
    if file.suffix not in CARRY_THEIR_OWN:
        cfg, class_names = file.with_suffix(".cfg"), file.with_suffix(".names")
        own["cfg"] = cfg if cfg.is_file() else None
        own["names"] = arguments.names or (class_names if class_names.is_file() else None)
    return argparse.Namespace(**own)


def open_detector(arguments: argparse.Namespace) -> tuple[OpenedDetector, Viewer]:
    """Open --weights and the ways to look at images, which its deviations name; --score only where it is a setting."""
    opened = open_command_line(arguments, arguments.settings)
    settings, own = opened.settings, opened.settings.model.detector
    if foreign := [f for f in device_flags(arguments) if f.spelling == "--score" and not f.path.startswith(f"{own}.")]:
        raise SettingsError(f"--score sets {foreign[0].path}, which the detector {own} of {arguments.weights} has not")
    batch_size = settings.evaluation.batch_size or settings.train.micro_batch
    viewer = open_viewer(arguments, opened, open_machine(settings.run), batch_size)
    detector = opened.detector.replace(deviations=(*opened.detector.deviations, *viewer.deviations))
    return dataclasses.replace(opened, detector=detector), viewer


def open_dataset(opened: OpenedDetector, ground_truth: bool = True) -> CocoDataset:
    """Open the validation set with the labels of the detector; says which, where the weights name no classes.

    Raises:
        SettingsError: the numbers of classes of data and network differ.
        DataError: there is no data, or it has no ground-truth box where one is needed.
    """
    data, evaluation = opened.settings.data, opened.settings.evaluation
    dataset = build_validation_dataset(data, opened.names, evaluation.max_images, ground_truth)
    dataset.sample_transform = Transform(opened.detector.geometry, evaluation.image_size)
    say(*dataset.source_lines)
    annotations = dataset.annotations
    check_classes(opened, annotations.categories.names)
    if ground_truth and annotations.crowd.all():
        raise DataError(f"no ground-truth box: none of the {len(dataset)} validation images has a usable box")
    return dataset


def infer_with_bar(
    opened: OpenedDetector, dataset: CocoDataset, viewer: Viewer, criterion: nn.Module | None
) -> InferenceResult:
    """Run the detector on the dataset, with a progress bar on a terminal."""
    settings, machine, detector = opened.settings, viewer.machine, viewer.detector
    how = f"{describe_device(machine.device)}, {machine.precision}"
    say(f"{how}, {len(dataset)} images; {protocol_line(settings, opened.detector, dataset)}")
    collate = collate_samples if viewer.looks_once else list
    if not viewer.looks_once:
        dataset.sample_transform = viewer.prepare
    workers, count = settings.data.num_workers, viewer.images_at_a_time
    loader = build_evaluation_loader(dataset, count, workers, machine.device, collate=collate)
    with tqdm(total=len(loader), unit="batch", disable=None) as bar:

        def advance() -> None:
            bar.update()

        if not viewer.looks_once:
            return run_finder(viewer.find, loader, advance)
        return run_inference(
            detector.model, criterion, detector.postprocess, loader, machine.device, machine.autocast, advance
        )


def evaluate_with_bar(opened: OpenedDetector, dataset: CocoDataset, viewer: Viewer) -> Evaluation:
    """Run the detector on the dataset and compute the metrics."""
    result = infer_with_bar(opened, dataset, viewer, viewer.detector.criterion)
    evaluation = compute_metrics([result], dataset.annotations, opened.settings.evaluation.backend)
    if evaluation.dropped:
        say(f"warning: {evaluation.dropped} detections were non-finite numbers and were dropped")
    return evaluation


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
