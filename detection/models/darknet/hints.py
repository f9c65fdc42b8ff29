"""What to type where a Darknet weights file is missing or belongs to another network."""

from pathlib import Path

# The files that models/weights/download_darknet_weights.sh downloads.
FETCHED = (
    *("darknet53.conv.74", "yolov3.weights", "yolov3-tiny.weights", "yolov3-spp.weights"),
    *("yolov4.weights", "yolov4-tiny.weights"),
)
# What to type for those whose network needs no cfg here, where the configured one is another.
CONFIGURED = {
    "yolov3-tiny.weights": "--config recipes/yolov3_tiny.yaml",
    "yolov3-spp.weights": "yolo.spp=true",
    "yolov3.weights": "model.backbone=darknet yolo.spp=false yolo.neck_channels=[512,256,128]",
}


def network_hint(model: object, path: Path) -> str:
    """Say what to type for the network that a file of weights belongs to, for an error about one that does not fit.

    Args:
        model: the network that does not fit; of a cfg or configured.
    """
    if hasattr(model, "described_classes"):
        return f"the cfg must be the one that {path.name} was trained with"
    beside = path.with_suffix(".cfg")
    cfg = beside if beside.is_file() else beside.name if path.name in FETCHED else "FILE"
    words = f"give the cfg of the weights, --cfg {cfg}, in a training model.backbone=darknet_cfg model.cfg={cfg}"
    return f"{words}; or {CONFIGURED[path.name]}" if path.name in CONFIGURED else words


def fetch_hint(path: Path) -> str:
    """Hint at the command that downloads a well-known file, for an error; otherwise empty."""
    return f"; fetch it with: models/weights/download_darknet_weights.sh {path.name}" if path.name in FETCHED else ""
