"""Processes of the loaders: their threads, their signals, their end."""

import atexit
import multiprocessing
import signal
import sys
import threading
import warnings

import cv2

from detection.runtime.allocator import disable_malloc_trim
from detection.runtime.signals import STOPPING


def prepare_worker(_: int) -> None:
    """OpenCV's own threads would fight with the workers; signals to stop are the training process's to handle."""
    cv2.setNumThreads(0)
    disable_malloc_trim()
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    # Errors of the dataset travel to the training process. What is left are those of the thread that hands batches
    # over, when the training process ends before it has taken them: no news to anybody.
    sys.excepthook = lambda *_: None


def prepare_process() -> None:
    """The training process's side of `prepare_worker`."""
    cv2.setNumThreads(0)
    disable_malloc_trim()  # decoded images are large enough to be taken anew too
    # On a machine with fewer cores than workers torch prints two lines; what counts is train/wait_fraction.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    atexit.unregister(kill_workers)  # once, however many loaders are built
    atexit.register(kill_workers)


def restore_default_sigchld() -> None:
    """A worker that dies is found by its loader when its batch does not come, after a step, not in the middle of one.

    To be called when a loader has started its workers: torch's handler raises wherever the program is, with the weights
    half moved.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def kill_workers() -> None:
    """At exit multiprocessing ends the workers that are left by SIGTERM, which they ignore, and would wait forever.

    Some are left whenever an error leaves the loop over a loader: its traceback keeps the loader alive.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call each of them a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
