"""Random geometry and colour of a training image; every choice is a function of (seed, epoch, index)."""

import os

# Stop albumentations from asking the package index for a newer version on import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
