"""Read videos, streams and cameras frame by frame, and write videos, with OpenCV."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import cv2
import numpy as np

from detection.errors import DataReadError, OutputError
from detection.inference import web

CODEC = "mp4v"  # MPEG-4 part 2: the .mp4 codec that all OpenCV wheels can write
DEFAULT_RATE = 25.0  # frames per second if the video or camera does not report a rate


@dataclass(frozen=True)
class Frame:
    """One frame: its number from 0, its time since the beginning in seconds, and RGB uint8 (H, W, 3)."""

    number: int
    seconds: float
    image: np.ndarray


class VideoReader:
    """Iterable over the frames of a video file, rotated as its metadata says, or of a camera. A context manager.

    A network stream that stays silent for `web.TIMEOUT` seconds has ended.

    Args:
        source: path of a file, number of a camera, or address (str) of a video or stream.
        stride: decode and yield every `stride`-th frame.

    Attributes:
        live: whether frames come as they are taken: from a camera, or an address that states no number of frames.
        rate: frames per second of the source.
        expected: number of frames according to the file header; 0: unknown.
        read: number of frames read so far, including those that the stride skips.
        damaged: number of these that could not be decoded.

    Raises:
        DataReadError: the source cannot be opened.
    """

    def __init__(self, source: Path | int | str, stride: int = 1) -> None:
        self.stride = stride
        self.read = self.damaged = 0
        # Absolute path and FFmpeg only: OpenCV would otherwise also try the name as an image-sequence pattern or URL.
        if isinstance(source, int):
            self._capture = cv2.VideoCapture(source)
        elif isinstance(source, str):
            limits = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, cv2.CAP_PROP_READ_TIMEOUT_MSEC)
            options = [value for limit in limits for value in (limit, round(1000 * web.TIMEOUT))]
            self._capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, options)
        else:
            self._capture = cv2.VideoCapture(str(source.absolute()), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            self._capture.release()
            if isinstance(source, int):
                raise DataReadError(f"camera {source} cannot be opened")
            if isinstance(source, str):
                raise DataReadError(
                    f"{web.without_password(source)}: cannot be opened as a picture, video or stream"
                    f"{web.unreadable_hint(source)}"
                )
            raise DataReadError(
                f"video {source} {'is damaged or of an unknown kind' if source.exists() else 'is missing'}"
            )
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= 1000 else DEFAULT_RATE
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        counted = not isinstance(source, int) and 0 < count < math.inf
        self.expected = int(count) if counted else 0
        self.live = isinstance(source, int) or (isinstance(source, str) and not counted)

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
    """Writer of RGB frames at a constant rate. A context manager: on exit the file is completed and checked.

    The codec needs even sides, so odd ones are padded by one pixel. Frames of another size than the first are resized.

    Args:
        path: .mp4 file.
        rate: frames per second.

    Raises:
        OutputError: OpenCV cannot write the video, or the file has fewer frames than were written (disk full).
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        # A kill leaves the previous video; OpenCV chooses the format by the end of the name.
        self._temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
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
            self._writer = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter.fourcc(*CODEC), self.rate, even)
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
        self._writer.release()  # OpenCV does not report failed writes, so the frames in the file are counted
        capture = cv2.VideoCapture(str(self._temporary.absolute()), cv2.CAP_FFMPEG)
        written = round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if written == self.frames:
            os.replace(self._temporary, self.path)
            return
        self._temporary.unlink(missing_ok=True)
        if kind is None:
            raise OutputError(f"{self.path}: {written} of {self.frames} frames were written; is the disk full?")
