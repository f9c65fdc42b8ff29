"""Notice images that are replaced before a run is continued, or while it trains."""

import contextlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from detection.data.image_stamps import ImageStamps, change_line, changed_images, read_stamps
from detection.drawing.files import replace_file

FILE = "images.npz"  # in the run directory: stamps of the images that the run trains and is evaluated on


class ImageWatch:
    """The images as the first process of a run found them, and what has changed since.

    Args:
        sets: datasets by kind, "training" or "validation"; none in the other processes.
    """

    def __init__(self, sets: Mapping[str, object]) -> None:
        self.sets = sets
        self.stamps = {kind: read_stamps(dataset) for kind, dataset in self.sets.items()}

    def save(self, directory: Path) -> None:
        """Write the stamps to the run directory, for the next `--resume`."""
        arrays: dict[str, np.ndarray] = {}
        for kind, stamps in self.stamps.items():
            arrays |= {f"{kind}_root": np.array(stamps.root), f"{kind}_stamps": stamps.values}
        if arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **arrays)
            replace_file(directory / FILE, buffer.getvalue())

    def differences(self, directory: Path) -> list[str]:
        """Compare with the stamps in a run directory; a line per set. None or damaged ones are no difference."""
        lines = []
        with (
            contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile),
            np.load(directory / FILE, allow_pickle=False) as file,
        ):
            for kind, now in self.stamps.items():
                before = ImageStamps(str(file[f"{kind}_root"]), file[f"{kind}_stamps"])
                if changed := changed_images(before, now):
                    lines.append(change_line(kind, self.sets[kind], changed))
        return lines

    def look_again(self) -> list[str]:
        """Return a line per set whose images have changed since the last look; FILE keeps what the run began with."""
        lines = []
        for kind, dataset in self.sets.items():
            now = read_stamps(dataset)
            if changed := changed_images(self.stamps[kind], now):
                lines.append(
                    f"warning     {change_line(kind, dataset, changed)}; the run sees the new ones from here on"
                )
            self.stamps[kind] = now
        return lines
