"""COCO metrics of trained weights on a validation set.

python validation.py --weights logs/240224-211713_LambdaLR/best.pt
python validation.py --weights yolov3.weights --names coco.names evaluation.image_size=416 data.root=data/coco
python validation.py --weights my.weights --cfg my.cfg --names my.names data.root=my_dataset
python validation.py --config recipes/darknet_protocol.yaml --weights my.weights --cfg my.cfg --names my.names

Prints the official table by pycocotools and writes metrics.json, detections.json (COCO result format) and a picture of
truth beside detections into a new directory below logs/. About 20 images per second on 2 CPU cores with a network of a
million parameters.
"""

import functools
import sys
from pathlib import Path

from detection.habana_environment import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

from tqdm import tqdm

from detection.aliases import add_evaluation_flags
from detection.command_line import Parser
from detection.data import build_validation_dataset
from detection.data.coco import CocoDataset
from detection.data.loaders import build_evaluation_loader
from detection.devices import autocast, choose_precision, describe_device, open_device
from detection.drawing import save_png
from detection.errors import OutputError, SettingsError, exit_with_message
from detection.evaluation import Evaluation, evaluate
from detection.reports import draw_detections, metric_table, protocol_line, write_evaluation
from detection.run_loggers import new_run_directory
from detection.weights import OpenedDetector, open_command_line


def main() -> None:
    parser = Parser("validation.py", __doc__)
    parser.add_weights()
    parser.add_settings()
    add_evaluation_flags(parser)
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="where results go (default: new, below logs/)")
    arguments = parser.parse_intermixed_args()
    opened = open_command_line(arguments, arguments.settings)
    settings = opened.settings
    dataset = build_validation_dataset(settings.data, settings.evaluation.image_size, opened.names)
    if len(dataset.annotations.categories.names) != opened.num_classes:
        raise SettingsError(
            f"the network has {opened.num_classes} classes, the data {len(dataset.annotations.categories.names)}; "
            "say with --names which class is which"
        )

    evaluation = evaluate_with_bar(opened, dataset)
    print("\n".join(metric_table(evaluation)))
    network, metric = evaluation.seconds["network"], evaluation.seconds["metric"]
    print(
        f"{len(evaluation.detections)} boxes on {len(dataset)} images; loading, network and NMS {network:.1f} s "
        f"({len(dataset) / network:.1f} images/s), {evaluation.backend} {metric:.1f} s"
    )
    if evaluation.dropped:
        print(f"warning: {evaluation.dropped} detections were not finite numbers and were dropped")

    name = f"validation_{arguments.weights.stem}"
    directory = new_run_directory(Path(settings.run.logs_path), name, arguments.output)
    picture = draw_detections(
        dataset, evaluation, settings.evaluation.visualization_threshold, settings.evaluation.visualize_images
    )
    try:
        write_evaluation(directory, evaluation, dataset, opened.step, settings.evaluation.model_dump(mode="json"))
        if picture is not None:
            save_png(directory / "validation.png", picture)
    except OSError as error:
        raise OutputError(f"results in {directory} cannot be written: {error.strerror or error}") from None
    print(f"results in {directory}")


def evaluate_with_bar(opened: OpenedDetector, dataset: CocoDataset) -> Evaluation:
    """Every image of the dataset through the detector, on the device of the settings; a bar on a terminal."""
    settings = opened.settings
    device = open_device(settings.run)
    dtype = choose_precision(device, settings.run.precision)
    precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    print(f"{describe_device(device)}, {precision}; {protocol_line(settings)}", flush=True)
    detector = opened.detector.to(device, settings.run.channels_last)
    batch_size = settings.evaluation.batch_size or settings.train.batch_size
    loader = build_evaluation_loader(dataset, batch_size, settings.data.num_workers, device)
    with tqdm(total=len(loader), unit="batch", disable=None) as bar:

        def advance() -> None:
            bar.update()

        return evaluate(
            detector.model,
            detector.criterion,
            detector.postprocess,
            loader,
            dataset.annotations,
            device,
            functools.partial(autocast, device, dtype),
            "pycocotools" if settings.evaluation.backend == "auto" else settings.evaluation.backend,
            on_batch=advance,
        )


if __name__ == "__main__":
    exit_with_message(main)
