"""TensorBoard event files."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from detection.config.settings import Settings
from detection.drawing.boxes import encode_jpeg
from detection.training.loggers.protocol import Resumed

VERSION = "brain.Event:2"  # of the file format


class TensorBoardLogger:
    """Writes scalars and images as TensorBoard events into the run directory.

    Records are in the file when a method returns, unlike with torch's `SummaryWriter`, which writes in a thread, with
    one event per scalar, and cannot report a full disk.
    """

    def start(
        self, directory: Path, settings: Settings, environment: Mapping[str, Any], resumed: Resumed | None
    ) -> None:
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise ImportError("TensorBoard is not installed: no event files (pip install tensorboard)") from None
        self._protocol = event_pb2
        self._file = _new_event_file(directory)
        self._records = RecordWriter(self._file)
        self._write(file_version=VERSION)
        if resumed is not None:
            # Makes TensorBoard hide steps >= this one in earlier files; the resumed step itself is not repeated.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=resumed.step + 1, file_version=VERSION)
            self._write(step=resumed.step + 1, session_log=start)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        defined = [(tag, float(value)) for tag, value in values.items() if value is not None]
        # One event for all values is half the size of one event each.
        numbers = [Summary.Value(tag=tag, simple_value=value) for tag, value in defined]
        self._write(step=step, summary=Summary(value=numbers))

    def evaluation(self, step: int, row: Mapping[str, float | None]) -> None:
        self.log(step, row)

    def line(self, text: str) -> None:
        """Do nothing: TensorBoard shows no log lines."""

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = image.shape
        # As PNG, photographs would be larger than all scalars of a run.
        encoded = encode_jpeg(image)
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=picture)]))

    def artifact(self, path: Path) -> None:
        """Do nothing: TensorBoard stores no files."""

    def finish(self, status: str) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        event = self._protocol.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()


def _new_event_file(directory: Path) -> BinaryIO:
    """Open a file named as TensorBoard expects; it reads the files of a directory in the order of their names."""
    name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
    number = 0
    while (directory / f"{name}.{number}").exists():
        number += 1
    return open(directory / f"{name}.{number}", "wb")
