"""Loader processes and their parent: threads, signals, messages and the end."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import warnings

import cv2

from detection.runtime.allocator import disable_malloc_trim
from detection.runtime.signals import STOPPING


def prepare_process() -> None:
    """Set up a script's process, before it reads images or starts loader workers; a script calls it first.

    Changes what is global: OpenCV's threads and messages, freed memory, a warning of torch, and what happens at exit.
    """
    _prepare_libraries()
    # On a machine with fewer cores than workers torch prints two lines; what counts is train/wait_fraction.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    atexit.unregister(kill_workers)  # once, however often this is called
    atexit.register(kill_workers)


def prepare_worker(_: int) -> None:
    """Set up a loader worker; signals to stop are handled by the training process alone."""
    _prepare_libraries()
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    # Errors of the dataset travel to the training process. Only the thread that hands batches over still raises here,
    # after the training process has ended without taking them; these errors can be ignored.
    sys.excepthook = lambda *_: None


def _prepare_libraries() -> None:
    cv2.setNumThreads(0)  # OpenCV's own threads would compete with the workers
    # A damaged image or video is one line of ours; OpenCV's and FFmpeg's name neither the file nor the consequence.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the package index for a new version
    disable_malloc_trim()  # decoded images and the tensors of a step are large enough to be mapped anew each time


def restore_default_sigchld() -> None:
    """Disable PyTorch's SIGCHLD handler so that a dead worker raises at the next batch, not in the middle of a step.

    Call it when a loader has started its workers: PyTorch's handler raises wherever the program is, with the weights
    half updated.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def kill_workers() -> None:
    """Kill the workers that are left at exit: multiprocessing would send SIGTERM, which they ignore, and wait forever.

    Some are left whenever an error leaves the loop over a loader: its traceback keeps the loader alive.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would call each of them a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
