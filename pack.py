"""Pack a dataset into few large files: tar shards with the original images, an index, and the annotations.

python pack.py data.root=data/coco --output data/coco_shards && python yolo-v3/main.py data.root=data/coco_shards
python pack.py data.root=my_dataset --output my_shards --shards 8      any format that training reads
python pack.py --check my_shards                                       sizes and SHA-256 of all shards
python pack.py --rebuild-index my_shards                               from the shards, and say what changed
python pack.py --unpack my_shards --output my_images                   files again
python pack.py --from-tfrecord 'tfrecord/train-*' 'tfrecord/val-*' --output my_shards

Writes for every split (train, val, test; all, where there is one set only) shards SPLIT-00000-of-00004.tar, the index
SPLIT.index and annotations/instances_SPLIT.json into a new folder, which is data.root then: every script reads it as
the dataset itself, with the same numbers. A shard holds KEY.jpg, byte by byte the original, and KEY.json, in the order
of the image ids, which are the keys. The same dataset gives the same bytes; it is never changed. Takes about as long as
copying the files.

A folder that has other splits already gets the new ones in addition. --from-tfrecord reads the files of EfficientDet's
converter (create_coco_tfrecord.py), whose flags are understood too: --image_dir, --object_annotations_file,
--image_info_file, --output_file_prefix, --num_shards. Exit code: 2 if a shard is damaged.
"""

import argparse
import functools
import glob
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from detection.config.command_line import DEFAULTS, Parser, at_least_one
from detection.config.loading import load_settings
from detection.config.settings import DataSettings, Settings
from detection.data.build import make_builtin
from detection.data.coco_files import split_in
from detection.data.dataset_formats import coco_source
from detection.data.packed import tfrecord
from detection.data.packed.entries import Entry, SplitContent, read_split
from detection.data.packed.index import PackedIndex, find_indexes
from detection.data.packed.repair import check_shards, rebuild_indexes, shard_bytes, unpack
from detection.data.packed.writer import write_dataset, write_shards, writing_beside
from detection.data.sources import every_source, source_lines
from detection.errors import DataError, OutputError, SettingsError, escape, exit_with_message, say

UNUSED = tuple(section for section in Settings.model_fields if section != "data")  # of the settings, not read here
SHARD_MIB = 256
REFUSED = {  # flags of create_coco_tfrecord.py without a meaning here, and what answers them
    "--caption_annotations_file": "captions have no boxes; give --object_annotations_file instances_train2017.json",
    "--include_masks": "masks are not trained on; the annotation file beside the shards keeps its outlines",
    "--num_threads": "images are copied one after another, as fast as the disk reads; leave it out",
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.check is not None:
        check(arguments.check)
    elif arguments.rebuild_index is not None:
        rebuild(arguments.rebuild_index)
    elif arguments.unpack is not None:
        write_files(arguments.unpack, arguments.output)
    else:
        pack(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = Parser("pack.py", __doc__)
    parser.add_settings(device=False)
    add = parser.add_argument
    add("--output", type=Path, metavar="DIRECTORY", help="new or empty directory, or shards that lack these splits")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--shard-mib",
        type=at_least_one,
        default=SHARD_MIB,
        metavar="N",
        help=f"largest size of a shard in MiB (default: {SHARD_MIB})",
    )
    size.add_argument("--shards", "--num_shards", type=at_least_one, metavar="N", help="number of shards of each split")
    other = parser.add_argument_group("instead of packing data.root").add_mutually_exclusive_group()
    other.add_argument("--check", type=Path, metavar="SHARDS", help="compare all shards with their SHA-256")
    other.add_argument("--rebuild-index", type=Path, metavar="SHARDS", help="write the indexes anew from the shards")
    other.add_argument("--unpack", type=Path, metavar="SHARDS", help="write image files to --output")
    other.add_argument("--from-tfrecord", nargs="+", metavar="PATTERN", help="pack TFRecord files, a pattern per split")
    text = "--image_dir DIR --object_annotations_file FILE (or --image_info_file FILE) --output_file_prefix DIR/SPLIT"
    foreign = parser.add_argument_group("one split, under the names of create_coco_tfrecord.py", text)
    hidden = functools.partial(foreign.add_argument, help=argparse.SUPPRESS)
    for flag in ("--image_dir", "--image_info_file", "--object_annotations_file"):
        hidden(flag, type=Path)
    hidden("--output_file_prefix", type=Path)
    for flag in REFUSED:
        hidden(flag, nargs="?", const="", dest=f"refused{flag}")
    arguments = parser.parse_intermixed_args()
    for flag, answer in REFUSED.items():
        if getattr(arguments, f"refused{flag}") is not None:
            raise SettingsError(f"{flag}: {answer}")
    settle_foreign(arguments)
    check_arguments(arguments)
    return arguments


def settle_foreign(arguments: argparse.Namespace) -> None:
    """Turn the flags of create_coco_tfrecord.py into `output` and `split_files`: split -> annotation file, images."""
    files = [file for file in (arguments.object_annotations_file, arguments.image_info_file) if file is not None]
    prefix = arguments.output_file_prefix
    arguments.split_files = None
    if arguments.image_dir is None and not files and prefix is None:
        return
    if arguments.image_dir is None or len(files) != 1 or prefix is None or not prefix.name:
        raise SettingsError(
            "--image_dir, --output_file_prefix and one of --object_annotations_file and --image_info_file belong "
            "together; or give data.root=FOLDER --output DIRECTORY"
        )
    if arguments.output is not None:
        raise SettingsError("--output and --output_file_prefix both say where to write; give one of them")
    if arguments.settings or arguments.config:
        raise SettingsError("--image_dir names the data; leave settings and --config out")
    arguments.output = prefix.parent
    arguments.split_files = (split_in(Path(prefix.name)) or prefix.name, files[0], arguments.image_dir)


def check_arguments(arguments: argparse.Namespace) -> None:
    in_place = "--check" if arguments.check else "--rebuild-index" if arguments.rebuild_index else None
    other = in_place or ("--unpack" if arguments.unpack else "--from-tfrecord" if arguments.from_tfrecord else None)
    if in_place and arguments.output is not None:
        raise SettingsError(f"{in_place} works on the shards that it names; leave --output out")
    if other and (arguments.settings or arguments.config or arguments.split_files):
        raise SettingsError(f"{other} names the data; leave settings, --config and --image_dir out")
    if (in_place or arguments.unpack) and (arguments.shards or arguments.shard_mib != SHARD_MIB):
        raise SettingsError(f"{other}: --shards and --shard-mib are for packing")
    if not in_place and arguments.output is None:
        raise SettingsError("--output is missing: the directory to write to")


def pack(arguments: argparse.Namespace) -> None:
    """Pack a dataset, one pair of annotation file and folder, or TFRecord files."""
    output: Path = arguments.output.absolute()
    sources: dict[str, Callable[[], SplitContent]]
    if arguments.from_tfrecord:
        sources = find_records(arguments.from_tfrecord)
    elif arguments.split_files:
        split, file, images = arguments.split_files
        if not images.is_dir():
            raise DataError(f"--image_dir {images} does not exist")
        data = load_settings(DEFAULTS)[0].data.model_copy(update={"root": str(images), "train_images": str(images)})
        sources = {split: functools.partial(read_pair, file, images, data)}
    else:
        sources = find_splits(arguments, output)
    check_output(output, arguments.output, sources)

    def write(folder: Path, split: str) -> PackedIndex:
        size = None if arguments.shards else arguments.shard_mib * 2**20
        return write_shards(folder, split, sources[split](), size, arguments.shards, show_progress)

    indexes = write_dataset(output, sources, write)
    for split, index in indexes.items():
        size = sum(shard.size for shard in index.shards) / 2**20
        say(f"{split}: {len(index.names)} images in {len(index.shards)} shards, {size:.1f} MiB")
    say(f"written to {arguments.output}; read with data.root={arguments.output}")


def find_splits(arguments: argparse.Namespace, output: Path) -> dict[str, Callable[[], SplitContent]]:
    """The splits of data.root."""
    settings, notices = load_settings(DEFAULTS, arguments.config, arguments.settings, unused=UNUSED)
    data = settings.data
    if data.fake:
        raise SettingsError("data.fake: there are no images to pack")
    say(*notices)
    make_builtin(data)
    found = every_source(data)
    named = data.train_annotations is not None or data.validation_annotations is not None
    for source in found.values():
        images = source.image_directory().resolve()  # a missing one is reported before time is spent on the others
        for folder in (images, *([] if named else [source.root.resolve()])):
            if folder in (output.resolve(), *output.resolve().parents):
                raise SettingsError(f"--output {arguments.output} lies in the dataset {folder}, which is not changed")
    say(*source_lines(*found.values()))
    return {split: functools.partial(read_split, source, data.follow_links) for split, source in found.items()}


def read_pair(file: Path, images: Path, data: DataSettings) -> SplitContent:
    """Read the split of --object_annotations_file or --image_info_file."""
    source = coco_source(file, file.parent, "", data)
    return read_split(source.with_images(images), data.follow_links)


def find_records(patterns: list[str]) -> dict[str, Callable[[], SplitContent]]:
    """Read the annotations of TFRecord files, a split per pattern, named by the files' names.

    Raises:
        DataError: a pattern matches nothing, two are of the same split, or a record is damaged.
    """
    splits: dict[str, tfrecord.RecordSplit] = {}
    for pattern in patterns:
        paths = [Path(path) for path in sorted(glob.glob(pattern)) if Path(path).is_file()]
        if not paths:
            raise DataError(f"--from-tfrecord {pattern!r}: no file matches")
        split = split_in(Path(paths[0].name)) or "train"
        if split in splits:
            raise DataError(f"--from-tfrecord {pattern!r}: is of the split {split}, as another pattern is")
        splits[split] = tfrecord.read_split(
            paths, functools.partial(tqdm, unit="file", desc=escape(split), disable=None)
        )
        for what, count in splits[split].unread.items():
            say(f"note: {what} in {count} records of {split} are left out")
    names = tfrecord.merge_names(splits.values())
    return {
        split: functools.partial(tfrecord.to_content, content, names, patterns[number])
        for number, (split, content) in enumerate(splits.items())
    }


def check_output(output: Path, given: Path, splits: Iterable[str]) -> None:
    """Refuse a folder that holds something else than shards of other splits."""
    try:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return
        there = find_indexes(output)
    except OSError as error:
        raise OutputError(f"--output {given}: {error.strerror}") from None
    if not there:
        raise OutputError(f"--output {given} exists and is neither empty nor a folder of packed shards")
    if taken := [split for split in splits if split in there]:
        raise OutputError(f"--output {given} has the split {taken[0]} already")


def show_progress(entries: Iterable[Entry], split: str) -> Iterable[Entry]:
    return tqdm(entries, unit="image", desc=escape(split), disable=None, leave=False)


def bytes_bar(folder: Path) -> tqdm:
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist or is no folder")
    return tqdm(total=shard_bytes(folder), unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False)


def check(folder: Path) -> None:
    """Compare all shards with their digests.

    Raises:
        DataError: one differs.
    """
    with bytes_bar(folder) as bar:
        faults = check_shards(folder, bar.update)
    if faults:
        say(*faults[:-1])
        raise DataError(faults[-1])
    say(f"{folder}: all shards and annotations are as they were packed")


def rebuild(folder: Path) -> None:
    """Write the indexes anew, and say what they accept."""
    with bytes_bar(folder) as bar:
        rebuilt = rebuild_indexes(folder, bar.update)
    for split, one in rebuilt.items():
        say(f"{split}: index of {len(one.index.names)} images in {len(one.index.shards)} shards written anew")
        say(*(f"{split}: {line}" for line in one.changes or ["nothing else than the index before said"]))


def write_files(folder: Path, output: Path) -> None:
    """Write the images of shards as files, in COCO's layout."""
    check_output(output.absolute(), output, find_indexes(folder))
    if output.is_dir() and any(output.iterdir()):
        raise OutputError(f"--output {output} is not empty")
    with bytes_bar(folder) as bar, writing_beside(output.absolute()) as temporary:
        count = unpack(folder, temporary, bar.update)
    say(f"{count} images written to {output}; read with data.root={output}")


if __name__ == "__main__":
    exit_with_message(main)
