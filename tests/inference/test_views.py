"""Tiles and test-time augmentation, on images whose boxes are known: see tests/support/colour_finder.py."""

import numpy as np
import pytest
import torch

from detection.errors import SettingsError
from detection.inference.tiling import Tiling, merge_tiles, read_tiling
from detection.inference.tta import fuse, variants
from detection.inference.views import Viewer
from detection.ops.letterbox import Placement
from tests.support.colour_finder import SCORE, colour_viewer, paint

Box = tuple[int, int, int, int, int]


def boxes_of(viewer: Viewer, image: np.ndarray) -> list[tuple[float, ...]]:
    (found,) = viewer.find([viewer.prepare(image)])
    rows = torch.cat([found["boxes"], found["labels"][:, None].float()], dim=1)
    return sorted(map(tuple, rows.tolist()))


def detections(*rows: tuple[float, float, float, float, float, int]) -> dict[str, torch.Tensor]:
    """Rows of x1, y1, x2, y2, score, label."""
    values = torch.tensor([row[:5] for row in rows]).reshape(-1, 5)
    return {"boxes": values[:, :4], "scores": values[:, 4], "labels": torch.tensor([row[5] for row in rows]).long()}


# Tiles


@pytest.mark.parametrize(
    ("length", "starts"),
    # tiles of 40 that share at least 10 lie at most 30 apart: 100 = 30 + 30 + 40; 110 needs four, 70 / 3 apart
    [(30, [0]), (40, [0]), (41, [0, 1]), (70, [0, 30]), (71, [0, 16, 31]), (100, [0, 30, 60]), (110, [0, 23, 47, 70])],
)
def test_tiles_cover_an_image_evenly(length: int, starts: list[int]) -> None:
    regions = Tiling(40, 10).regions(length, 20)
    tiles = [(start, 0, min(start + 40, length), 20) for start in starts]
    assert regions == ([(0, 0, length, 20)] if len(starts) == 1 else [(0, 0, length, 20), *tiles])
    assert [region[1::2] for region in Tiling(40, 10).regions(20, length)] == [region[::2] for region in regions]


@pytest.mark.parametrize(
    "objects",
    [
        [(40, 20, 52, 44, 0)],  # across the right border of the tile at 0..64, smaller than what tiles share
        [(60, 20, 100, 44, 0)],  # across both tiles and larger: the whole image alone sees it in one piece
        [(50, 50, 60, 60, 1)],  # at the corner of four tiles
        [(20, 8, 46, 40, 0), (50, 8, 76, 40, 0)],  # neighbours on either side
        [(48, 8, 64, 40, 0)],  # ends at a border by itself
        [(0, 0, 128, 128, 1)],  # the whole image
        [(52, 52, 56, 56, 0), (90, 90, 94, 94, 1)],  # 2 pixels wide in the whole image's input
    ],
)
def test_every_object_has_one_box(objects: list[Box]) -> None:
    """Tiles of 64 px at 0, 32 and 64 in an image of 128; the whole image is seen at half its size."""
    image = paint(128, 128, *objects)
    assert boxes_of(colour_viewer(64, Tiling(64, 24)), image) == sorted(tuple(map(float, box)) for box in objects)


def test_an_image_that_fits_in_a_tile_is_seen_once() -> None:
    viewer = colour_viewer(64, Tiling(64, 16))
    assert boxes_of(viewer, paint(48, 64, (3, 4, 20, 30, 1))) == [(3, 4, 20, 30, 1)]
    assert viewer.detector.model.seen == [(1, 64)]


def test_a_part_stays_where_nothing_better_is_seen() -> None:
    """The whole image's box covers the part of the tile at 0..64, but has a third of its score."""
    regions = Tiling(64, 24).regions(104, 64)
    assert regions == [(0, 0, 104, 64), (0, 0, 64, 64), (40, 0, 104, 64)]
    whole, part, other = (10.0, 5.0, 90.0, 50.0), (10.0, 5.0, 64.0, 50.0), (10.0, 5.0, 30.0, 20.0)
    for score, kept in ((0.3, [0.9, 0.3]), (0.5, [0.5])):
        found = [detections((*whole, score, 0)), detections((*part, 0.9, 0)), detections()]
        assert merge_tiles(regions, found, (104, 64), 0.7, 100)["scores"].tolist() == pytest.approx(kept)
    # another class says nothing about it
    found = [detections((*whole, 0.9, 1)), detections((*part, 0.9, 0)), detections()]
    assert len(merge_tiles(regions, found, (104, 64), 0.45, 100)["scores"]) == 2
    # what the whole image sees and a tile sees larger counts once, as the tile sees it, whatever the scores
    found = [detections((*other, 0.9, 0)), detections((10.0, 5.0, 31.0, 20.0, 0.2, 0)), detections()]
    assert merge_tiles(regions, found, (104, 64), 0.45, 100)["boxes"].tolist() == [[10, 5, 31, 20]]


def test_the_best_per_class_are_kept() -> None:
    found = [detections(*((20.0 * k, 0.0, 20.0 * k + 9, 9.0, 0.1 * k, k % 2) for k in range(6))), detections()]
    merged = merge_tiles([(0, 0, 300, 300), (200, 0, 300, 300)], found, (300, 300), 0.45, 2)
    assert merged["labels"].tolist() == [1, 0, 1, 0] and merged["scores"].tolist() == pytest.approx(
        [0.5, 0.4, 0.3, 0.2]
    )


@pytest.mark.parametrize(
    ("size", "overlap", "expected"),
    [
        (None, None, None),
        (640, None, 128),
        (640, "100", 100),
        (640, "0.25", 160),
        (640, "0", 0),
        (640, "0.5", 320),
        (None, "0.2", "belongs to --tiles"),
        (640, "half", "must be a share"),
        (640, "-1", "must be a share"),
        (640, "321", "whole pixels up to half of --tiles 640"),
        (640, "0.6", "must be a share"),
        (640, "10.5", "must be a share"),
        (640, "nan", "must be a share"),
        (640, "inf", "must be a share"),
    ],
)
def test_overlap_is_pixels_or_a_share(size: int | None, overlap: str | None, expected: int | str | None) -> None:
    if isinstance(expected, str):
        with pytest.raises(SettingsError, match=expected):
            read_tiling(size, overlap)
    else:
        tiling = read_tiling(size, overlap)
        assert tiling == (None if expected is None else Tiling(640, expected))


# Test-time augmentation


def test_variants_are_sizes_the_network_takes() -> None:
    # 320 * 0.8 = 256, 320 * 1.25 = 400, nearest multiple of 32: 12.5 rounds to the even 12
    assert variants(320, 32, True) == [(side, mirrored) for side in (256, 320, 384) for mirrored in (False, True)]
    assert variants(320, 32, False) == [(320, False), (320, True)]
    assert {side for side, _ in variants(32, 32, True)} == {32}


@pytest.mark.parametrize("placement", ["letterbox", "top_left", "squash"])
@pytest.mark.parametrize("tiles", [False, True])
def test_all_variants_agree_on_a_box(placement: Placement, tiles: bool) -> None:
    """128 x 64 at 48, 64 and 80 px: 0.375, 0.5 and 0.625 network pixels per pixel, whole ones for multiples of 16."""
    objects = [(16, 16, 48, 32, 0), (96, 0, 128, 48, 1)]
    viewer = colour_viewer(64, Tiling(128, 32) if tiles else None, tta=True, placement=placement)
    np.testing.assert_allclose(boxes_of(viewer, paint(128, 64, *objects)), objects, atol=1e-4)
    (found,) = viewer.find([viewer.prepare(paint(128, 64, *objects))])
    assert found["scores"].tolist() == pytest.approx([SCORE] * 2)
    assert "mirrored and not, 48, 64, 80 px" in viewer.deviations[-1]


def test_what_a_few_variants_see_loses_score() -> None:
    """Scores 0.3 at 48 px, 0.9 at 64 px and 0.6 at 80 px, each twice: 3.6 / 6."""
    viewer = colour_viewer(64, tta=True, score=lambda side: {48: 0.3, 64: 0.9, 80: 0.6}[side])
    (found,) = viewer.find([viewer.prepare(paint(128, 64, (16, 16, 48, 32, 0)))])
    assert found["scores"].tolist() == pytest.approx([0.6])


def test_fusion_by_hand() -> None:
    """IoU of the first two is 8 / 12; the box of the other class and the one far away are alone."""
    first = detections((0.0, 0.0, 10.0, 10.0, 0.8, 0), (50.0, 50.0, 60.0, 60.0, 0.6, 0))
    second = detections((2.0, 0.0, 12.0, 10.0, 0.4, 0), (0.0, 0.0, 10.0, 10.0, 0.5, 1))
    fused = fuse([first, second], 0.45, 100)
    assert fused["labels"].tolist() == [0, 0, 1]
    # (0 * 0.8 + 2 * 0.4) / 1.2, (10 * 0.8 + 12 * 0.4) / 1.2; (0.8 + 0.4) / 2, 0.6 / 2, 0.5 / 2
    expected = [[2 / 3, 0, 32 / 3, 10], [50, 50, 60, 60], [0, 0, 10, 10]]
    np.testing.assert_allclose(fused["boxes"], expected, rtol=1e-6)
    assert fused["scores"].tolist() == pytest.approx([0.6, 0.3, 0.25])
    nothing = fuse([detections(), detections()], 0.45, 100)
    assert nothing["boxes"].shape == (0, 4) and len(nothing["scores"]) == 0
    nan = fuse([detections((float("nan"), 0.0, 1.0, 1.0, 0.9, 0)), first], 0.45, 100)
    assert nan["boxes"].isfinite().all() and len(nan["boxes"]) == 2


def test_images_are_taken_in_batches_of_one_size() -> None:
    """Two images, tiles and variants: 2 * 4 regions * 3 sizes * 2 = 48 inputs in batches of up to 5 of a size."""
    viewer = colour_viewer(64, Tiling(64, 16), tta=True, batch_size=5)
    pictures = [paint(160, 64, (70, 20, 90, 40, label)) for label in (0, 1)]
    found = viewer.find([viewer.prepare(picture) for picture in pictures])
    assert [image["labels"].tolist() for image in found] == [[0], [1]]
    seen = viewer.detector.model.seen
    assert seen == [(count, side) for side in (48, 64, 80) for count in (5, 5, 5, 1)]
