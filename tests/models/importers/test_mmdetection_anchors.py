"""Anchors of MMDetection's files, which their tensors do not show."""

from typing import Any

import pytest
from torch import Tensor

from detection.errors import CheckpointError
from detection.models.importers import import_weights, settings_of
from tests.support import foreign_networks as foreign
from tests.support.foreign_mmdetection import mmdetection_mobilenet

USUAL = [[[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]]
OF_320 = [[[10, 15], [24, 36], [72, 42]], [[35, 87], [102, 96], [60, 170]], [[220, 125], [128, 222], [264, 266]]]
OWN = "x = 1\nbase_sizes=[[(1, 2), (3, 4.5), (5, 6)],\n [(7, 8), (9, 10), (11, 12)],[(7, 8), (9, 10), (11, 12)],]\ny"


@pytest.fixture(scope="module")
def mobilenet() -> dict[str, Tensor]:
    return foreign.synthetic_file(mmdetection_mobilenet, 2)


@pytest.mark.parametrize(
    ("source", "meta", "expected"),
    [
        ("yolov3_mobilenetv2_mstrain-416_300e_coco_20210718_010823-f68a07b3.pth", {}, USUAL),
        ("320/yolov3_mobilenetv2_mstrain-416.pth", {"config": 5}, USUAL),
        ("a/yolov3_mobilenetv2_320_300e_coco_20210719_215349-d18dff72.pth", {}, OF_320),
        ("yolov3_mobilenetv2_8xb24-320-300e_coco.pth", {}, OF_320),
        # the configuration is believed more than the name
        ("yolov3_mobilenetv2_320_300e_coco.pth", {"config": f"head=dict(base_sizes={USUAL[::-1]},\n s=[8])"}, USUAL),
        ("own.pth", {"cfg": OWN}, [[[7, 8], [9, 10], [11, 12]]] * 2 + [[[1, 2], [3, 4.5], [5, 6]]]),
    ],
)
def test_anchors_of_mmdetection(source: str, meta: dict[str, Any], expected: Any, mobilenet: dict[str, Tensor]) -> None:
    """Both files of MobileNetV2 have the same tensors; levels are written from the coarsest to the finest."""
    imported = import_weights({"meta": meta, "state_dict": mobilenet}, source)
    assert imported.settings["yolo.anchors"] == expected
    assert settings_of(imported).yolo.anchors == tuple(tuple(map(tuple, level)) for level in expected)
    assert any("anchors" in line for line in imported.lines) == (meta.get("config", 5) == 5)


@pytest.mark.parametrize(
    "text",
    [
        *("[[(1, 2)], [(3, 4)], [(5, 6)]]", "[[(1, 2, 3)] * 3] * 3", "[", "[1, 2, 3]", "[[('1', 2)]]", "[" * 900),
        *("[__import__('os')]", f"[{'(1, 2), ' * 400}]"),
        *(f"[{f'[(1, 2), (3, 4), (5, {side})],' * 3}]" for side in ("0", "-6", "1e999")),
    ],
)
def test_anchors_that_are_none(text: str, mobilenet: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"^file: base_sizes of its configuration are not three levels") as raised:
        import_weights({"meta": {"config": f"base_sizes = {text}"}, "state_dict": mobilenet}, "file")
    assert "\n" not in str(raised.value)
