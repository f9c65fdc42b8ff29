"""The YOLO family: network, criteria (by name in `CRITERIA`) and postprocess."""

from detection.models.yolo.darknet_loss import CIoULoss, DarknetLoss, GIoULoss
from detection.models.yolo.mmdetection_loss import MMDetectionLoss

CRITERIA = {"darknet": DarknetLoss, "giou": GIoULoss, "ciou": CIoULoss, "mmdetection": MMDetectionLoss}
