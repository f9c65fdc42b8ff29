"""The YOLO family: network, criteria (by name in `CRITERIA`) and postprocess."""

from detection.models.yolo.criterion import Criterion
from detection.models.yolo.darknet_loss import CIoULoss, DarknetLoss, GIoULoss
from detection.models.yolo.freebies_loss import FreebiesLoss, IoULoss
from detection.models.yolo.mmdetection_loss import MMDetectionLoss
from detection.models.yolo.multi_loss import MultiLoss

CRITERIA: dict[str, type[Criterion]] = {
    "darknet": DarknetLoss,
    "giou": GIoULoss,
    "ciou": CIoULoss,
    "mmdetection": MMDetectionLoss,
    "freebies": FreebiesLoss,
    "iou": IoULoss,
    "multi": MultiLoss,
}
