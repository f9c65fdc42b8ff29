"""Loader processes and their parent: threads, signals, messages and the end."""

import atexit
import multiprocessing.util
import os
import resource
import signal
import sys
import tempfile
import threading
import warnings

import cv2

from detection.errors import SettingsError
from detection.runtime.allocator import disable_malloc_trim
from detection.runtime.signals import STOPPING

# Batches travel through sockets in a folder of multiprocessing below TMPDIR; a socket's path has at most 107 bytes.
LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")
SHORT_TMPDIRS = ("/tmp", "/var/tmp", "/dev/shm")
FILES, FILES_OF_WORKER = 128, 16  # open at the same time: libraries, logs; two batches and pipes of a worker
FILES_WANTED = 4096


def prepare_process() -> None:
    """Set up a script's process, before it reads images or starts loader workers; a script calls it first.

    Changes what is global: OpenCV's threads and messages, freed memory, a warning of torch, what happens at exit, the
    limit of open files, and the folder of sockets where TMPDIR is too long for one.

    Raises:
        SettingsError: too few files may be open, or there is no folder for sockets.
    """
    require_files(0)
    shorten_sockets()
    _prepare_libraries()
    # On a machine with fewer cores than workers torch prints two lines; what counts is train/wait_fraction.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    atexit.unregister(kill_workers)  # once, however often this is called
    atexit.register(kill_workers)


def require_files(workers: int) -> None:
    """Raise the limit of open files as far as needed and allowed.

    Raises:
        SettingsError: it is too low for this number of loader workers.
    """
    needed = FILES + FILES_OF_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= max(needed, FILES_WANTED):
        return
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = max(needed, FILES_WANTED) if hard == resource.RLIM_INFINITY else min(max(needed, FILES_WANTED), hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < needed:
        lower = f", or lower data.num_workers ({workers})" if workers else ""
        raise SettingsError(f"at most {soft} files may be open (ulimit -n), {needed} are needed: raise it{lower}")


def shorten_sockets() -> None:
    """Let multiprocessing make its folder elsewhere if TMPDIR is too long: workers would fail, and training hang.

    Raises:
        SettingsError: there is no other place.
    """
    given = tempfile.gettempdir()
    if len(os.fsencode(given)) <= LONGEST_TMPDIR:
        return
    for place in SHORT_TMPDIRS:
        tempfile.tempdir = place
        try:
            multiprocessing.util.get_temp_dir()  # remembered, inherited by the workers and removed at exit
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = given
    raise SettingsError(
        f"TMPDIR has {len(os.fsencode(given))} bytes, sockets allow {LONGEST_TMPDIR}: set a shorter one"
    )


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
