"""Training images that cannot be read: each is named once and counted; too many of them end the run."""

from detection.contract import Batch
from detection.errors import DataReadError

# What a process votes for when it wants all to stop for this; above any signal number.
STOP_UNREADABLE = 1000


class TooManyUnreadable(DataReadError):
    """All processes of the run stop for it, after the same step."""


class UnreadableImages:
    """Of this process, since it started.

    Args:
        num_images: of the training set.
        most: share of them that may be unreadable, `data.max_unreadable_fraction`.
    """

    def __init__(self, num_images: int, most: float) -> None:
        self.num_images = num_images
        self.allowed = int(most * num_images)
        self.lines: dict[str, None] = {}  # what was wrong with each, in the order of finding

    def note(self, batch: Batch) -> list[str]:
        """A warning for each image of a batch that is met for the first time."""
        found = [line for line in batch["unreadable"] if line not in self.lines]
        self.lines |= dict.fromkeys(found)
        count = f"{len(self.lines)} of {self.num_images} images so far, {self.allowed} are allowed"
        return [f"warning: {line}; another image takes its place ({count})" for line in found]

    def too_many(self) -> bool:
        return len(self.lines) > self.allowed

    def error(self) -> TooManyUnreadable:
        """For the run that ends here."""
        if not self.too_many():
            return TooManyUnreadable("another process could not read its images")
        last = next(reversed(self.lines))
        if not self.allowed:
            return TooManyUnreadable(last)
        return TooManyUnreadable(
            f"{last}; number {len(self.lines)} of them, data.most_unreadable allows {self.allowed}"
        )
