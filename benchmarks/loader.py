"""Cost of loading and transforming an image, and throughput of a core and of the loader.

python3 -m benchmarks.loader                          generated photographs of 640 x 480, 416 px, batches of 16
python3 -m benchmarks.loader data.root=data/coco      real ones
python3 -m benchmarks.loader data.decoder=simplejpeg data.cache=memory

Its batches have 16 images and its workers are 0, 1 and 2, whatever the settings say.

"read and augmented" takes the images in the order of a run, where mosaic finds its other images decoded already.
Times of one core are processor time; those of the loader are by the clock, with its workers beside this process. The
ceiling of every row is the decoder alone, measured in each repeat. torchvision's rows read, decode and resize by its
own functions; "as SSDlite" with the crops and flips of its reference training. About two minutes on 2 CPU cores.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.support.synthetic_dataset import write_annotations, write_photographs
from detection.config.augmentation import AugmentationSettings
from detection.config.command_line import DEFAULTS, Parser, at_least_one
from detection.config.loading import load_settings
from detection.config.settings import Settings
from detection.contract import Geometry
from detection.data.build import DetectionDataset, build_training_dataset, prepare_for_training
from detection.data.coco import CocoDataset
from detection.data.image_file import JPEG_DECODERS, choose_decoder, describe_decoder, read_file
from detection.data.loaders import build_training_loader, collate_samples
from detection.data.sampler import TrainingBatchSampler
from detection.data.transforms import Transform
from detection.data.workers import prepare_process
from detection.errors import SettingsError, exit_with_message
from detection.models import build_detector
from detection.visualization.augmentation_sheet import augmentation_names, only

BOXES = 7.27  # per image, the mean of COCO
BATCH = 16
LOADED = 384  # images for each row of the loader


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.loader", __doc__)
    parser.add_settings(device=False)
    parser.add_argument("--images", type=at_least_one, default=96, metavar="N", help="different images (default: 96)")
    parser.add_argument("--repeats", type=at_least_one, default=3, metavar="N", help="of each row (default: 3)")
    arguments = parser.parse_intermixed_args()
    settings, _ = load_settings(DEFAULTS, arguments.config, arguments.settings)
    unchanged = load_settings(DEFAULTS)[0].data
    places = ("root", "builtin", "fake", "train_annotations", "train_images")
    generated = all(getattr(settings.data, place) == getattr(unchanged, place) for place in places)
    generated = generated and not any(word.startswith("data.root=") for word in arguments.settings)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        if generated:
            root = Path(directory)
            write_photographs(root / "train", arguments.images)
            write_annotations(
                root / "annotations" / "instances_train.json", arguments.images, int(BOXES * arguments.images)
            )
            settings, _ = load_settings(settings, words=[f"data.root={root}"])
        report(settings, arguments.images, arguments.repeats)


def report(settings: Settings, count: int, repeats: int) -> None:
    data, size = settings.data, settings.train.image_size
    dataset = build_training_dataset(data, 0, settings.model.num_classes)
    augmentation = data.augmentation
    geometry = build_detector(settings, len(dataset.annotations.categories.names)).geometry
    dataset.sample_transform = Transform(geometry, size, 0, augmentation)
    if not isinstance(dataset, CocoDataset):
        raise SettingsError("data.fake: there are no files whose loading could be measured")
    count = min(count, len(dataset))
    annotations = dataset.annotations
    encoded = [read_file(dataset.image_root / annotations.file_name(index)) for index in range(count)]
    images = [dataset.load_image(index) for index in range(count)]
    shape = np.mean([image.shape[:2] for image in images], axis=0)
    decoder = choose_decoder(data.decoder)
    print(
        f"{describe_decoder(decoder)}, NumPy {np.__version__}, torch {torch.__version__}, one thread; {count} images "
        f"of {shape[1]:.0f} x {shape[0]:.0f} and {np.mean([len(file) for file in encoded]) / 1e3:.0f} kB, {size} px"
    )

    def transformed(transform: Transform) -> Callable[[int], object]:
        def call(index: int) -> object:
            rows = slice(*annotations.first_box[index : index + 2])
            return transform(images[index], annotations.boxes[rows], annotations.labels[rows], index, 0, 0)

        return call

    letterbox = Transform(geometry, size)
    samples = [transformed(letterbox)(index) for index in range(BATCH)]
    nothing = Transform(geometry, size, 0, only(augmentation, ""))
    everything = all_on(augmentation)
    rows: dict[str, Callable[[int], object]] = {}
    for name in dict.fromkeys(("opencv", decoder)):
        rows[f"decode, {name}"] = lambda index, name=name: JPEG_DECODERS[name](encoded[index])  # type: ignore[misc]
    rows |= {
        "read, check and decode": dataset.load_image,
        "letterbox": transformed(letterbox),
        "letterbox and augmentation": transformed(Transform(geometry, size, 0, augmentation)),
        "the same, all albumentations on": transformed(Transform(geometry, size, 0, everything)),
        "collate": lambda index: collate_samples(samples) if index % BATCH == 0 else None,  # type: ignore[arg-type]
    }
    rows |= torchvision_rows(dataset, size)
    transforms = {
        name: transformed(Transform(geometry, size, 0, only(augmentation, name)))
        for name in augmentation_names()
        if name not in ("mosaic", "mixup")  # they need other images: `measure_mixing`
    }
    times = measure({**rows, "": transformed(nothing), **transforms}, count, repeats)
    ceiling = times[f"decode, {decoder}"]
    print(f"\n{'one core':<36}{'ms':>8}{'spread':>16}{'images/s':>10}{'of decode':>10}")
    print_rows({name: times[name] for name in rows}, ceiling)
    loaded = [
        [sum(parts) for parts in zip(times["read, check and decode"], times[transform], times["collate"], strict=True)]
        for transform in ("letterbox", "letterbox and augmentation", "the same, all albumentations on")
    ]
    names = ("decode + letterbox + collate (P4)", "with the augmentation (P5)", "with all albumentations on")
    print_rows(dict(zip(names, loaded, strict=True)), ceiling)

    print(f"\n{'one transform on every image':<36}{'ms':>8}{'spread':>16}{'p':>10}{'ms at p':>10}")
    for name in transforms:
        extra = [one - plain for one, plain in zip(times[name], times[""], strict=True)]
        probability = getattr(data.augmentation, name).p
        spread = f"{min(extra):.2f}..{max(extra):.2f}"
        median = statistics.median(extra)
        print(f"{name:<36}{median:>8.2f}{spread:>16}{probability:>10g}{median * probability:>10.2f}")

    mixtures = with_mixing(augmentation)
    print(f"\n{'read and augmented, one core':<36}{'ms':>8}{'spread':>16}{'of plain':>10}")
    loaded_rows = measure_mixing(dataset, settings, geometry, mixtures, repeats)
    for name, values in loaded_rows.items():
        ratio = statistics.median(one / plain for one, plain in zip(values, loaded_rows["plain"], strict=True))
        spread = f"{min(values):.2f}..{max(values):.2f}"
        print(f"{name:<36}{statistics.median(values):>8.2f}{spread:>16}{ratio:>10.2f}")

    print(f"\n{'loader, by the clock':<28}{'workers':>8}{'images/s':>10}{'spread':>16}{'a matched consumer waits':>26}")
    chosen_rows = {"letterbox": only(augmentation, ""), "with the augmentation": augmentation}
    for name, chosen in {**chosen_rows, "with mosaic": mixtures["mosaic"]}.items():
        for workers in (0, 1, 2):
            use_augmentation(dataset, settings, geometry, chosen)
            rates = [images_per_second(dataset, workers, 0)[0] for _ in range(repeats)]
            rate = statistics.median(rates)
            _, waited = images_per_second(dataset, workers, BATCH / rate * 1.25)
            spread = f"{min(rates):.0f}..{max(rates):.0f}"
            print(f"{name:<28}{workers:>8}{rate:>10.0f}{spread:>16}{waited:>26.1%}")


def torchvision_rows(dataset: CocoDataset, size: int) -> dict[str, Callable[[int], object]]:
    """Build the same steps from torchvision's transforms, as its reference training scripts do."""
    annotations = dataset.annotations

    def read(index: int) -> tv_tensors.Image:
        encoded = torchvision.io.read_file(str(dataset.image_root / annotations.file_name(index)))
        return tv_tensors.Image(torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB))

    def letterbox(index: int) -> object:
        image = read(index)
        scale = size / max(image.shape[1:])
        image = v2.functional.resize(image, [round(side * scale) for side in image.shape[1:]])
        height, width = image.shape[1:]
        left, top = (size - width) // 2, (size - height) // 2
        return v2.functional.pad(image, [left, top, size - width - left, size - height - top], fill=[124, 116, 104])

    as_ssdlite = v2.Compose(
        [v2.RandomIoUCrop(), v2.RandomHorizontalFlip(), v2.Resize((size, size)), v2.SanitizeBoundingBoxes()]
    )

    def augmented(index: int) -> object:
        image, rows = read(index), slice(*annotations.first_box[index : index + 2])
        shape = (int(image.shape[1]), int(image.shape[2]))
        boxes = tv_tensors.BoundingBoxes(annotations.boxes[rows], format="XYXY", canvas_size=shape)  # type: ignore[call-overload]
        return as_ssdlite(image, {"boxes": boxes, "labels": torch.as_tensor(annotations.labels[rows])})

    return {"torchvision, letterbox": letterbox, "torchvision, as SSDlite": augmented}


def with_mixing(augmentation: AugmentationSettings) -> dict[str, AugmentationSettings]:
    """The same augmentation without mosaic and mixup, and with either on every image."""

    def change(mosaic: float, mixup: float, beta: float | None = None) -> AugmentationSettings:
        sections = {
            "mosaic": augmentation.mosaic.model_copy(update={"p": mosaic}),
            "mixup": augmentation.mixup.model_copy(update={"p": mixup, "beta": beta}),
        }
        return augmentation.model_copy(update=sections)

    return {
        "plain": change(0, 0),
        "mosaic": change(1, 0),
        "mosaic and mixup": change(1, 1),
        "weighted mixup": change(0, 1, 1.5),
    }


def use_augmentation(
    dataset: CocoDataset, settings: Settings, geometry: Geometry, augmentation: AugmentationSettings
) -> None:
    data = settings.data.model_copy(update={"augmentation": augmentation})
    prepare_for_training(dataset, geometry, settings.model_copy(update={"data": data}))


def measure_mixing(
    dataset: CocoDataset,
    settings: Settings,
    geometry: Geometry,
    augmentations: dict[str, AugmentationSettings],
    repeats: int,
) -> dict[str, list[float]]:
    """Measure milliseconds of CPU time per image, read and augmented in the order of a run, batch after batch."""
    times: dict[str, list[float]] = {name: [] for name in augmentations}
    steps = min(len(dataset), LOADED) // BATCH or 1
    for repeat in range(repeats):
        for name, augmentation in augmentations.items():
            use_augmentation(dataset, settings, geometry, augmentation)
            batches = list(TrainingBatchSampler(len(dataset), BATCH, 1, (repeat * steps, (repeat + 1) * steps), 0, 0))
            dataset.__getitems__([*batches[0][:2]])
            started = time.process_time()
            for positions in batches:
                dataset.__getitems__([*positions])
            times[name].append((time.process_time() - started) / (steps * BATCH) * 1e3)
    return times


def all_on(augmentation: AugmentationSettings) -> AugmentationSettings:
    """Return settings that apply every albumentations transform to every image."""
    of_others = (
        "expand", "iou_crop", "darknet_jitter", "darknet_hsv", "photometric_distortion",
        "mosaic", "mixup", "hsv", "random_interpolation",
    )  # fmt: skip
    sections = {
        name: getattr(augmentation, name).model_copy(update={"p": 1.0})
        for name in augmentation_names()
        if name not in of_others
    }
    return augmentation.model_copy(update=sections)


def measure(rows: dict[str, Callable[[int], object]], count: int, repeats: int) -> dict[str, list[float]]:
    """Measure milliseconds of CPU time per image; each repeat runs all rows, to average over changes of the machine."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(-1, repeats):
        for name, work in rows.items():
            started = time.process_time()
            for index in range(count if repeat >= 0 else 4):
                work(index)
            if repeat >= 0:
                times[name].append((time.process_time() - started) / count * 1e3)
    return times


def print_rows(rows: dict[str, list[float]], ceiling: list[float]) -> None:
    for name, values in rows.items():
        median = statistics.median(values)
        share = statistics.median(limit / value for limit, value in zip(ceiling, values, strict=True))
        print(
            f"{name:<36}{median:>8.2f}{f'{min(values):.2f}..{max(values):.2f}':>16}{1e3 / median:>10.0f}{share:>10.0%}"
        )


def images_per_second(dataset: DetectionDataset, workers: int, consumer: float) -> tuple[float, float]:
    """Measure images per second after the first batch, and the share of time that a consumer waits.

    Args:
        consumer: seconds that the consumer sleeps per batch, which leaves the cores to the workers.
    """
    steps = LOADED // BATCH
    sampler = TrainingBatchSampler(len(dataset), BATCH, 1, (0, steps + 1), 0, 0)
    batches = iter(build_training_loader(dataset, sampler, workers, torch.device("cpu")))
    next(batches)
    started, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        waiting = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - waiting
        time.sleep(consumer)
    seconds = time.perf_counter() - started
    return steps * BATCH / seconds, waited / seconds


if __name__ == "__main__":
    exit_with_message(main)
