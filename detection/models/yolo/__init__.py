"""The YOLO family: network, loss, postprocess. A loss is a file of its own, chosen by name from `CRITERIA`."""

from detection.models.yolo.darknet_loss import CIoULoss, DarknetLoss, GIoULoss
from detection.models.yolo.mmdetection_loss import MMDetectionLoss

CRITERIA = {"darknet": DarknetLoss, "giou": GIoULoss, "ciou": CIoULoss, "mmdetection": MMDetectionLoss}
