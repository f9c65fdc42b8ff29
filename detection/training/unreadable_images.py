"""Counts training images that cannot be read: each is named once; too many of them end the run."""

from detection.contract import Batch
from detection.errors import DataReadError

# The vote of a process that wants all to stop for this; above any signal number.
STOP_UNREADABLE = 1000


class TooManyUnreadable(DataReadError):
    """Too many images cannot be read; all processes of the run stop after the same step."""


class UnreadableImages:
    """The unreadable images that this process has met since it started.

    Args:
        num_images: of the training set.
        max_fraction: of them that may be unreadable, `data.max_unreadable_fraction`.
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
        """Whether more are unreadable than allowed."""
        return len(self.lines) > self.allowed

    def error(self) -> TooManyUnreadable:
        """Return the error of a run that ends because of them."""
        if not self.too_many():
            return TooManyUnreadable("another process could not read its images")
        last = next(reversed(self.lines))
        if not self.allowed:
            return TooManyUnreadable(last)
        return TooManyUnreadable(
            f"{last}; number {len(self.lines)} of them, data.max_unreadable_fraction allows {self.allowed}"
        )
