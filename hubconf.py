"""Entry point of torch.hub: torch.hub.load("checkout of this repository", "load_detector", source="local", ...)."""

dependencies = ["torch", "torchvision", "numpy", "cv2", "PIL", "pydantic", "yaml", "tqdm"]

from detection.inference.detector import load_detector  # noqa: E402, F401  (torch.hub finds it here)
