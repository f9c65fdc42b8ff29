"""Packed shards beside the folder of files that they were packed from: system calls, images/s, cold and warm.

python3 -m benchmarks.packed                          512 generated photographs of 640 x 480, about a minute
python3 -m benchmarks.packed --images 4096 --repeats 5
python3 -m benchmarks.packed --directory /mnt/share   on another disk, where the files are made and removed

"read" takes the bytes of every image in a random order, "decoded" makes an image of them too, as training does, both in
one process. Before a cold round the system is asked to drop the files from its page cache (POSIX_FADV_DONTNEED); what
it knows of the directories stays, and so may what a disk or a virtual machine's host keeps, so cold is cold-ish: the
difference that a network file system makes is larger. Opens are those that Python's audit events report.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks.support.synthetic_dataset import write_annotations, write_photographs
from detection.config.command_line import DEFAULTS, Parser, at_least_one
from detection.config.loading import load_settings
from detection.data.image_file import read_file, read_image
from detection.data.image_places import ImagePlace, open_images
from detection.data.packed.entries import Entry, read_split
from detection.data.packed.index import PackedIndex
from detection.data.packed.writer import write_dataset, write_shards
from detection.data.sources import every_source
from detection.data.workers import prepare_process
from detection.errors import exit_with_message

SHARD_MIB = 32
OPENED = [0]  # files, of this process


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.packed", __doc__)
    parser.add_argument("--images", type=at_least_one, default=512, metavar="N", help="photographs (default: 512)")
    parser.add_argument("--repeats", type=at_least_one, default=3, metavar="N", help="of each row (default: 3)")
    parser.add_argument("--directory", type=Path, metavar="DIRECTORY", help="where to measure (default: temporary)")
    arguments = parser.parse_args()
    sys.addaudithook(count_opens)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        root, shards = Path(directory) / "folder", Path(directory) / "shards"
        size = write_photographs(root / "train", arguments.images)
        write_annotations(root / "annotations" / "instances_train.json", arguments.images, 7 * arguments.images)
        data = load_settings(DEFAULTS, words=[f"data.root={root}"])[0].data
        source = every_source(data)["train"]
        started = time.perf_counter()
        content = read_split(source, False)

        def write(folder: Path, split: str) -> PackedIndex:
            return write_shards(folder, split, content, SHARD_MIB * 2**20, None, pass_on)

        index = write_dataset(shards, ["train"], write)["train"]
        seconds = time.perf_counter() - started
        total = arguments.images * size / 2**20
        print(
            f"{arguments.images} images of {size / 1e3:.0f} kB, {total:.0f} MiB, in {len(index.shards)} shards, packed "
            f"in {seconds:.1f} s ({total / seconds:.0f} MiB/s, written to the disk); {os.uname().machine}, one process"
        )
        places = {"files": open_images(root / "train"), "shards": open_images(shards / "train.index")}
        paths = {"files": sorted((root / "train").iterdir()), "shards": sorted(shards.glob("*.tar"))}
        report(places, paths, arguments.repeats)


def report(places: dict[str, ImagePlace], paths: dict[str, list[Path]], repeats: int) -> None:
    """Measure both places in turn, so that a change of the machine meets both."""
    names = places["files"].names()
    work: dict[str, Callable[[ImagePlace, str], object]] = {
        "read": lambda place, name: read_file(place.locate(name)),
        "decoded": lambda place, name: read_image(place.locate(name)),
    }
    rates: dict[tuple[str, bool, str], list[float]] = {}
    opens: dict[str, int] = {}
    for repeat in range(repeats):
        order = np.random.default_rng(repeat).permutation(names).tolist()
        for what, take in work.items():
            for cold in (True, False):
                for where, place in places.items():
                    if cold:
                        drop_pages(paths[where])
                    before, started = OPENED[0], time.perf_counter()
                    for name in order:
                        take(place, name)
                    rates.setdefault((what, cold, where), []).append(len(order) / (time.perf_counter() - started))
                    opens.setdefault(where, OPENED[0] - before)
    print(f"\n{'images/s, one process':<28}{'files':>10}{'shards':>10}{'shards / files':>28}")
    for what in work:
        for cold in (True, False):
            both = [rates[what, cold, where] for where in ("files", "shards")]
            ratios = [shards / files for files, shards in zip(*both, strict=True)]
            medians = "".join(f"{statistics.median(values):>10.0f}" for values in both)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            print(f"{what + (', cold-ish' if cold else ', warm'):<28}{medians}{spread:>28}")
    print(f"{'files opened, first epoch':<28}{opens['files']:>10}{opens['shards']:>10}")


def drop_pages(paths: list[Path]) -> None:
    """Ask the system to forget the content of files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def count_opens(event: str, _: object) -> None:
    if event == "open":
        OPENED[0] += 1


def pass_on(entries: Iterable[Entry], _: str) -> Iterable[Entry]:
    return entries


if __name__ == "__main__":
    exit_with_message(main)
