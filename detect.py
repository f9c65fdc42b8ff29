"""Detect objects in images, videos and camera streams with trained weights.

python detect.py --weights logs/240224-211713_LambdaLR/best.pt photo.jpg folder/ 'holiday/*.jpg' clip.mp4
python detect.py --weights best.pt folder/ --recursive --confidence 0.3 --class person --class 'traffic light' --txt
python detect.py --weights best.pt clip.mp4 --stride 2              every second frame
python detect.py --weights best.pt 0 --show                         camera 0 until q or Ctrl-C
python detect.py --weights best.pt rtsp://camera.local/stream https://example.org/photo.jpg
python detect.py --weights best.pt aerial.tif --tiles 640 --overlap 128 --crops
python detect.py --weights best.pt --tta folder/ --coco-results results.json --annotations instances_val.json
python detect.py --weights my.weights --cfg my.cfg --names my.names photo.jpg

SOURCE is an image, a video (.mp4 .avi .mov .mkv .webm ...), a folder, a quoted pattern, a .txt file with one path or
address per line, the address of a picture, video or stream (http https rtsp rtsps rtmp), or the number of a camera.
Writes into a new directory below logs/: every image with its boxes, keeping the folder structure; every video as .mp4
(MPEG-4) of the same size and rate (divided by --stride); detections.json with boxes x1, y1, x2, y2 in pixels of the
image; with --txt also labels/ in YOLO txt (class, centre x and y, width, height, all relative to the image) and
classes.txt; with --crops also crops/CLASS/, every detection cut out. Damaged files and streams that end or stay silent
are reported, and what was found stays. Ctrl-C completes the files and stops.

--tiles         for images much larger than the network input, and --tta, slower and better: docs/large_images.md
--coco-results  writes all detections above evaluation.confidence_threshold, whatever --confidence shows, for the COCO
                metric: image ids by file name and category ids by class name, both from --annotations

About 30 images per second on 2 CPU cores with a network of a million parameters at 320 px.
"""

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from detection.runtime.habana import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

import numpy as np
from tqdm import tqdm

from detection.config.command_line import Parser
from detection.data.image_file import read_image
from detection.data.workers import prepare_process
from detection.drawing.window import Window, browse
from detection.errors import DataReadError, SettingsError, escape, exit_with_message, name_list, say
from detection.inference.coco_results import CocoResults
from detection.inference.finder import BATCH_SIZE, Finder
from detection.inference.results import Results
from detection.inference.sources import Source, batches, find_sources, read_ahead
from detection.inference.video import VideoReader, VideoWriter
from detection.inference.views import Viewed, open_viewer
from detection.inference.web import unreadable_hint
from detection.inference.weights import open_command_line
from detection.runtime.devices import open_machine
from detection.runtime.run_directory import new_run_directory, writing_results
from detection.runtime.signals import StopRequest

SETTING = re.compile(r"[a-z]\w*(\.\w+)*=")
MAX_THREADS = 8  # for reading and writing pictures; each holds a decoded image
Loaded = tuple[np.ndarray, Viewed] | DataReadError
STOP_KEYS = ("q", "escape")


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    words = [word for word in arguments.settings if SETTING.match(word) and not os.path.exists(word)]
    sources = find_sources([word for word in arguments.settings if word not in words], arguments.recursive)
    if arguments.confidence is not None:
        words.append(f"evaluation.visualization_threshold={arguments.confidence}")
    opened = open_command_line(arguments, words)
    settings = opened.settings
    batch_size = settings.evaluation.batch_size or BATCH_SIZE
    finder = Finder(opened, open_viewer(arguments, opened, open_machine(settings.run), batch_size), arguments.classes)
    coco = open_coco_results(arguments, finder.names)
    directory = new_run_directory(Path(settings.run.logs_path), f"detect_{arguments.weights.stem}", arguments.output)
    stop, start = StopRequest("frame or batch"), time.perf_counter()
    stop.install()
    picture_format = None if arguments.no_pictures else arguments.format
    txt = "scores" if arguments.txt_scores else "boxes" if arguments.txt else None
    with writing_results(directory), contextlib.ExitStack() as files:  # unreadable images raise DataReadError
        if coco is not None:
            files.enter_context(coco)
        crop_format = arguments.format if arguments.crops else None
        results = files.enter_context(Results(directory, finder.names, picture_format, txt, crop_format))
        run = Run(finder, results, coco, stop, arguments.stride, arguments.show)
        for are_images, group in groupby(sources, key=lambda source: source.kind == "image"):
            if are_images:
                run.look_at_images(list(group))
            else:
                for source in group:
                    run.look_at_video(source)
    say(results.summary(finder.threshold, time.perf_counter() - start))
    if coco is not None:
        say(f"{coco.boxes} boxes with a score above {finder.lowest:g} on {coco.images} images: {coco.path}")
    stop.check()
    if not results.images + results.frames:
        raise DataReadError("no image could be read")
    if run.no_window is not None:
        raise run.no_window
    if arguments.show and results.pictures:
        browse("detect.py", len(results.pictures), lambda page: read_image(results.pictures[page]))


def parse_arguments() -> argparse.Namespace:
    parser = Parser("detect.py", __doc__)
    parser.add_weights()
    parser.add_settings()
    parser.add_output()
    parser.usage = "detect.py --weights FILE SOURCE ... [key.path=value ...] [options]"
    add = parser.add_argument
    add("--recursive", action="store_true", help="include subfolders")
    add(
        "--confidence",
        type=float,
        metavar="SCORE",
        help="minimum score (default: the setting evaluation.visualization_threshold)",
    )
    add(
        "--class",
        action="append",
        default=[],
        dest="classes",
        metavar="NAME",
        help="only detect this class; repeatable",
    )
    add("--stride", type=int, default=1, metavar="N", help="process every N-th frame of a video (default: 1)")
    add("--txt", action="store_true", help="also write YOLO txt, one file per image")
    add("--txt-scores", action="store_true", help="as --txt, with the score as a sixth column")
    add("--crops", action="store_true", help="also cut out every detection, into a folder per class")
    add("--format", choices=("jpg", "png"), default="jpg", help="format of pictures and crops (default: jpg)")
    add("--no-pictures", action="store_true", help="write no pictures and videos, only detections.json and YOLO txt")
    add("--coco-results", type=Path, metavar="FILE", help="also write a COCO result file; needs --annotations")
    add("--annotations", type=Path, metavar="FILE", help="annotation file with the image and category ids")
    parser.add_views()
    arguments = parser.parse_intermixed_args()
    if (arguments.coco_results is None) != (arguments.annotations is None):
        raise SettingsError("--coco-results and --annotations belong together: the ids are those of the annotations")
    if arguments.stride < 1:
        raise SettingsError(f"--stride {arguments.stride}: must be at least 1")
    if arguments.confidence is not None and not 0 <= arguments.confidence <= 1:
        raise SettingsError(f"--confidence {arguments.confidence:g}: must lie between 0 and 1")
    if arguments.show and arguments.no_pictures:
        raise SettingsError("--show and --no-pictures contradict each other")
    return arguments


@dataclass
class Run:
    """Runs the finder on sources and writes the results, until the stop request."""

    finder: Finder
    results: Results
    coco: CocoResults | None
    stop: StopRequest
    stride: int
    show: bool
    no_window: SettingsError | None = None  # raised at the end, when the files are written

    @property
    def stopped(self) -> bool:
        return self.stop.signal_number is not None

    def look_at_images(self, sources: list[Source]) -> None:
        """Process images in batches; reading and writing run in threads beside the network."""
        results, threads = self.results, min(MAX_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool, tqdm(total=len(sources), unit="image", disable=None) as bar:
            loaded = read_ahead(pool, self._load, sources, threads if self.finder.looks_once else 1)
            for batch in batches(loaded, self.finder.batch_size, pixels_of_loaded):
                for _, image in batch:
                    if isinstance(image, DataReadError):
                        results.leave_out(image.line)
                readable = [(source, *image) for source, image in batch if not isinstance(image, DataReadError)]
                prepared = [viewed for _, _, viewed in readable]
                founds = self.finder.find(prepared, all_scores=self.coco is not None) if readable else []
                rows = []
                for (source, pixels, _), found in zip(readable, founds, strict=True):
                    if self.coco is not None and (reason := self.coco.add(source.file, found)):
                        tqdm.write(escape(f"{source.label}: not in the result file: {reason}"), file=sys.stderr)
                    rows.append((source, pixels, found.at_least(self.finder.threshold)))
                if results.picture_format:
                    list(pool.map(lambda row: results.save_picture(*row), rows))
                for row in rows:
                    results.add(*row)
                bar.update(len(batch))
                if self.stopped:
                    break

    def _load(self, source: Source) -> Loaded:
        if self.stopped:
            return DataReadError(f"{source.label}: not looked at")
        try:
            image = source.read()
        except DataReadError as error:
            return error
        return image, self.finder.prepare(image)

    def look_at_video(self, source: Source) -> None:
        """Process a video, stream or camera until its end, the stop request, or q in its window."""
        if self.stopped:
            return
        assert isinstance(source.file, Path | str), "only images lie in shards"
        try:
            reader = VideoReader(int(str(source.file)) if source.kind == "camera" else source.file, self.stride)
        except DataReadError as error:
            self.results.leave_out(error.line)
            return
        window, live = self._open_window(source.label), reader.live
        if live:
            say(f"{source.label}: Ctrl-C{' or q' if window else ''} stops", error=True)
        rate = reader.rate if live else reader.rate / self.stride
        writer = VideoWriter(self.results.directory / f"{source.name}.mp4", rate)
        size = 1 if live or window else self.finder.batch_size
        with reader, writer, tqdm(total=reader.expected or None, unit="frame", disable=None) as bar:
            for frames in batches(reader, size, lambda frame: frame.image.shape[0] * frame.image.shape[1]):
                founds = self.finder.find([self.finder.prepare(frame.image) for frame in frames])
                for frame, found in zip(frames, founds, strict=True):
                    if self.results.picture_format:
                        drawn = self.results.draw(frame.image, found)
                        # A camera runs on while the network computes, so frames are repeated to keep its rate.
                        copies = max(round(frame.seconds * rate) - writer.frames, 0) + 1 if live else 1
                        writer.write(drawn, copies)
                    self.results.add(source, frame.image, found, frame)
                bar.update(reader.read - bar.n)
                if self.stopped or (window and (window.show(drawn) in STOP_KEYS or not window.open)):
                    break
            else:
                self._report_end(source, reader)
        if window:
            window.close()

    def _report_end(self, source: Source, reader: VideoReader) -> None:
        """Report frames of a video that are damaged or missing, and a stream that ended."""
        if not reader.read:
            hint = unreadable_hint(source.file) if isinstance(source.file, str) else ""
            self.results.leave_out(f"{source.label}: not one frame can be read{hint}")
        elif reader.live:
            tqdm.write(escape(f"{source.label}: the stream ended after {reader.read} frames"), file=sys.stderr)
        elif reader.read < reader.expected or reader.damaged:
            damaged = f", {reader.damaged} of them damaged and left out" if reader.damaged else ""
            text = f"{source.label}: {reader.read} of the {reader.expected} frames that its header promises{damaged}"
            tqdm.write(escape(text), file=sys.stderr)

    def _open_window(self, title: str) -> Window | None:
        if not self.show or self.no_window is not None:
            return None
        try:
            return Window(title)
        except SettingsError as error:
            self.no_window = error
            return None


def open_coco_results(arguments: argparse.Namespace, names: Sequence[str]) -> CocoResults | None:
    """Open the result file of --coco-results; says which classes it leaves out."""
    if arguments.coco_results is None:
        return None
    coco = CocoResults(arguments.coco_results, arguments.annotations, names)
    if coco.unlisted:
        say(f"--coco-results leaves out classes that {coco.annotations} lacks: {name_list(coco.unlisted)}")
    return coco


def pixels_of_loaded(loaded: tuple[Source, Loaded]) -> int:
    """Pixels of a decoded image, for `batches`; 0 where it could not be read."""
    return 0 if isinstance(loaded[1], DataReadError) else loaded[1][0].shape[0] * loaded[1][0].shape[1]


if __name__ == "__main__":
    exit_with_message(main)
