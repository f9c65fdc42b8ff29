"""Run a detector on whole images, on their tiles (`tiling`) and in several variants (`tta`)."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detection.contract import Detector
from detection.data.loaders import collate_samples
from detection.data.transforms import Sample, Transform
from detection.errors import say
from detection.inference.exported_model import ExportedModel
from detection.inference.folding import prepare_inference
from detection.inference.tiling import Region, Tiling, merge_tiles, read_tiling
from detection.inference.tta import SCALES, Variant, fuse, mirror, variants
from detection.inference.weights import OpenedDetector
from detection.ops.letterbox import boxes_to_original
from detection.runtime.devices import Machine


@dataclass(frozen=True)
class Viewed:
    """One image, ready for the network: a sample per region and variant, regions outside."""

    width: int  # pixels of the image
    height: int
    regions: list[Region]
    samples: list[Sample]
    index: int = 0  # position of the image in its dataset
    unreadable: tuple[str, ...] = ()  # as in `Sample`


class Viewer:
    """A detector that looks at every image once or several times; its `prepare` takes the place of a `Transform`.

    Args:
        detector: on the machine's device.
        machine: device and precision.
        size: usual side of the network input in pixels.
        batch_size: images, tiles or variants that the network takes at a time.
        iou_threshold, max_detections: of the NMS that merges.
        tiling: None: whole images only.
        tta: look at each region in several variants.

    Attributes:
        deviations: how the detections depart from the evaluation protocol of docs/contract.md.
        notice: what of the request the network cannot do, one line; None: nothing.
    """

    def __init__(
        self,
        detector: Detector,
        machine: Machine,
        size: int,
        batch_size: int,
        iou_threshold: float,
        max_detections: int | None,
        tiling: Tiling | None = None,
        tta: bool = False,
    ) -> None:
        self.detector, self.machine, self.batch_size = detector, machine, batch_size
        self.merging = (iou_threshold, max_detections)
        self.tiling = tiling
        self.transform = Transform(detector.geometry, size)
        self.variants: list[Variant] = [(size, False)]
        self.deviations = [] if tiling is None else [tiling.describe()]
        self.notice: str | None = None
        if tta:
            model = detector.model
            fixed = isinstance(model, ExportedModel) and not model.description.dynamic_size
            self.variants = variants(size, detector.geometry.size_multiple, not fixed)
            if fixed:
                self.notice = (
                    f"--tta: the file takes {size} px only, so images are mirrored but not scaled by "
                    f"{SCALES[0]:g} and {SCALES[-1]:g} (export.py --dynamic-size)"
                )
            sizes = ", ".join(str(side) for side in dict.fromkeys(side for side, _ in self.variants))
            self.deviations.append(f"test-time augmentation (mirrored and not, {sizes} px)")

    @property
    def looks_once(self) -> bool:
        """Whether an image is looked at once, without tiles and test-time augmentation."""
        return self.tiling is None and len(self.variants) == 1

    @property
    def images_at_a_time(self) -> int:
        """Number of images to prepare for one `find`, which fills the network's batches without filling the memory."""
        if self.tiling is not None:
            return 1
        return self.batch_size if self.looks_once else max(self.batch_size // 2, 1)  # mirrored and not

    def prepare(
        self,
        image: np.ndarray,
        boxes: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        index: int = 0,
        epoch: int = 0,
        size: int = 0,
    ) -> Viewed:
        """Transform an image, RGB uint8 (H, W, 3); the other arguments of a `Transform` but for `index` are unused."""
        height, width = image.shape[:2]
        regions = [(0, 0, width, height)] if self.tiling is None else self.tiling.regions(width, height)
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        samples = []
        for left, top, right, bottom in regions:
            part = image[top:bottom, left:right]
            for side, mirrored in self.variants:
                # Mirrored before it is placed: the padding then is the one of any other image.
                pixels = np.ascontiguousarray(part[:, ::-1] if mirrored else part)
                samples.append(self.transform(pixels, *nothing, index, 0, side))
        return Viewed(width, height, regions, samples, index)

    @torch.no_grad()
    def find(self, images: Sequence[Viewed]) -> list[dict[str, Tensor]]:
        """Detect in prepared images.

        Returns:
            Per image boxes (K, 4) xyxy in pixels of the image, clipped to it, scores and labels (K,), on the CPU, by
            falling score. Boxes with a non-finite number are NaN.
        """
        samples = [sample for image in images for sample in image.samples]
        found = self._detect(samples)
        results = []
        for image in images:
            mine, found = found[: len(image.samples)], found[len(image.samples) :]
            results.append(self._merge(image, mine))
        return results

    def _detect(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Run the network; detections in pixels of each sample's part of the image, in the order of the samples."""
        found: list[dict[str, Tensor]] = [{}] * len(samples)
        for side in dict.fromkeys(side for side, _ in self.variants):
            of_size = [number for number, sample in enumerate(samples) if len(sample.image) == side]
            for start in range(0, len(of_size), self.batch_size):
                rows = of_size[start : start + self.batch_size]
                images = collate_samples([samples[row] for row in rows])["images"].to(self.machine.device)
                with self.machine.autocast():
                    outputs = self.detector.model(images)
                for row, detections in zip(rows, self.detector.postprocess(outputs), strict=True):
                    found[row] = {name: values.cpu() for name, values in detections.items()}
                    boxes = found[row]["boxes"].float()
                    original = boxes_to_original(boxes, samples[row].letterbox)
                    # Clipped to the image, an infinite box would become a finite one.
                    original[~boxes.isfinite().all(dim=1)] = torch.nan
                    found[row]["boxes"] = original
        return found

    def _merge(self, image: Viewed, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Merge the detections of all samples of an image: first the variants of each region, then the regions."""
        per_region = []
        for number, (left, top, right, _) in enumerate(image.regions):
            mine = found[number * len(self.variants) :][: len(self.variants)]
            for (_, mirrored), part in zip(self.variants, mine, strict=True):
                boxes = mirror(part["boxes"], right - left) if mirrored else part["boxes"]
                part["boxes"] = boxes + boxes.new_tensor([left, top, left, top])
            per_region.append(fuse(mine, *self.merging) if len(mine) > 1 else mine[0])
        if len(per_region) == 1:
            return per_region[0]
        return merge_tiles(image.regions, per_region, (image.width, image.height), *self.merging)


def build_viewer(
    opened: OpenedDetector, machine: Machine, batch_size: int, tiling: Tiling | None = None, tta: bool = False
) -> Viewer:
    """Build the viewer of opened weights, with the input size and the NMS of their settings."""
    evaluation = opened.settings.evaluation
    merging = evaluation.iou_threshold, evaluation.max_detections
    detector = machine.to_device(prepare_inference(opened.detector, machine))
    return Viewer(detector, machine, evaluation.image_size, batch_size, *merging, tiling, tta)


def open_viewer(arguments: argparse.Namespace, opened: OpenedDetector, machine: Machine, batch_size: int) -> Viewer:
    """Build the viewer of the options of `Parser.add_views`, and print what of them the network cannot do.

    Raises:
        SettingsError: an option has an impossible value.
    """
    viewer = build_viewer(opened, machine, batch_size, read_tiling(arguments.tiles, arguments.overlap), arguments.tta)
    if viewer.notice:
        say(viewer.notice)
    return viewer
