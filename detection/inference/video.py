"""Videos and cameras, frame by frame, by OpenCV."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import cv2
import numpy as np

from detection.errors import DataReadError, OutputError

CODEC = "mp4v"  # MPEG-4 part 2: the codec for .mp4 that every wheel of OpenCV can write
USUAL_RATE = 25.0  # frames per second where a video or camera does not say


@dataclass(frozen=True)
class Frame:
    """One frame: its number from 0, its time since the beginning in seconds, and RGB uint8 (H, W, 3)."""

    number: int
    seconds: float
    image: np.ndarray


class VideoReader:
    """The frames of a video file, or of a camera until somebody stops it; turned as the file says. A context.

    Args:
        source: path of a file, or number of a camera.
        stride: every so many frames one is decoded and given.

    Attributes:
        rate: frames per second of the source.
        expected: frames that the file's header promises; 0: it does not say.
        read: frames read so far, with those that the stride leaves out.
        damaged: of these, those that could not be decoded.

    Raises:
        DataReadError: it cannot be opened.
    """

    def __init__(self, source: Path | int, stride: int = 1) -> None:
        self.live = isinstance(source, int)
        self.stride = stride
        self.read = self.damaged = 0
        # An absolute path to FFmpeg alone: OpenCV would else try a name as a pattern of numbered images, or a protocol.
        self._capture = (
            cv2.VideoCapture(source)
            if isinstance(source, int)
            else cv2.VideoCapture(str(source.absolute()), cv2.CAP_FFMPEG)
        )
        if not self._capture.isOpened():
            self._capture.release()
            if isinstance(source, int):
                raise DataReadError(f"camera {source} cannot be opened")
            raise DataReadError(
                f"video {source} {'is damaged or of an unknown kind' if source.exists() else 'is missing'}"
            )
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= 1000 else USUAL_RATE
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.expected = int(count) if not self.live and 0 < count < math.inf else 0

    def __iter__(self) -> Iterator[Frame]:
        start = time.perf_counter()
        while self._capture.grab():
            number = self.read
            self.read += 1
            if number % self.stride:
                continue
            decoded, image = self._capture.retrieve()
            if not decoded:
                self.damaged += 1
                continue
            seconds = time.perf_counter() - start if self.live else number / self.rate
            yield Frame(number, seconds, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._capture.release()


class VideoWriter:
    """Writes RGB frames as a video of a constant rate; a context, at whose end the file is complete and checked.

    The codec wants even sides: an odd one gets a line of pixels more. A frame of another size than the first is
    resized to it.

    Args:
        path: .mp4 file.
        rate: frames per second.

    Raises:
        OutputError: OpenCV cannot write such a video, or fewer frames are in the file than were written (full disk).
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self.frames = 0
        self._size: tuple[int, int] | None = None
        self._writer: cv2.VideoWriter | None = None

    def write(self, image: np.ndarray, copies: int = 1) -> None:
        """Append a frame, RGB uint8 (H, W, 3), `copies` times."""
        height, width = image.shape[:2]
        if self._writer is None:
            self._size = (width, height)
            even = (width + width % 2, height + height % 2)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*CODEC), self.rate, even)
            if not self._writer.isOpened():
                raise OutputError(f"{self.path}: OpenCV cannot write a video of {width} x {height} pixels here")
        if (width, height) != self._size:
            assert self._size is not None
            image = cv2.resize(image, self._size, interpolation=cv2.INTER_AREA)
            width, height = self._size
        image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        for _ in range(copies):
            self._writer.write(bgr)
        self.frames += copies

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._writer is None:
            return
        self._writer.release()  # OpenCV reports no failed write; what is in the file tells
        capture = cv2.VideoCapture(str(self.path.absolute()), cv2.CAP_FFMPEG)
        written = round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if written != self.frames and kind is None:
            raise OutputError(f"{self.path}: {written} of {self.frames} frames were written; is the disk full?")
