"""Count unreadable training images: each is reported once, and too many end the run."""

from detection.contract import Batch
from detection.errors import DataReadError

# Vote of a process that has too many of them; above any signal number.
STOP_UNREADABLE = 1000


class TooManyUnreadable(DataReadError):
    """Too many images cannot be read; all processes of the run stop after the same step."""


class UnreadableImages:
    """Unreadable images seen by this process since it started.

    Args:
        num_images: number of training images.
        max_fraction: share of them that may be unreadable, `data.max_unreadable_fraction`.
    """

    def __init__(self, num_images: int, max_fraction: float) -> None:
        self.num_images = num_images
        self.allowed = int(max_fraction * num_images)
        self.lines: dict[str, None] = {}  # one per image, in the order of their discovery

    def note(self, batch: Batch) -> list[str]:
        """Count the unreadable images of a batch; returns a warning for each new one."""
        found = [line for line in batch["unreadable"] if line not in self.lines]
        self.lines |= dict.fromkeys(found)
        count = f"{len(self.lines)} of {self.num_images} images so far, {self.allowed} are allowed"
        return [f"warning: {line}; another image takes its place ({count})" for line in found]

    def too_many(self) -> bool:
        """Return whether more images are unreadable than allowed."""
        return len(self.lines) > self.allowed

    def error(self) -> TooManyUnreadable:
        """Build the error of a run that ends because of unreadable images."""
        if not self.too_many():
            return TooManyUnreadable("another process could not read its images")
        last = next(reversed(self.lines))
        if not self.allowed:
            return TooManyUnreadable(last)
        return TooManyUnreadable(
            f"{last}; number {len(self.lines)} of them, data.max_unreadable_fraction allows {self.allowed}"
        )
