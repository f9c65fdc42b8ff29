"""The catalogue of published weights: names that a user types, and the files they stand for."""

import fcntl
import functools
import os
import subprocess
import time
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from tqdm import tqdm

from detection.config.fields import Count, Section
from detection.config.yaml_files import read_yaml
from detection.errors import CheckpointError, escape, say

WEIGHTS_DIRECTORY = Path(__file__).resolve().parents[2] / "models" / "weights"
CATALOGUE = WEIGHTS_DIRECTORY / "catalogue.yaml"
SCRIPT = WEIGHTS_DIRECTORY / "download_weights.sh"
POLL_SECONDS = 0.2  # between two looks at the file that grows

FileName = Annotated[str, Field(pattern=r"^[\w.+-]+$")]


class Entry(Section):
    """An entry of `catalogue.yaml`, which explains the fields."""

    name: FileName
    part: Literal["detector", "backbone"]
    family: str
    file: FileName
    classes: Count
    input: Count
    published: str | None
    licence: str
    size: Count | None
    size_from: Count | None
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{8}|[0-9a-f]{64})$")] | None
    geometry: str | None
    source: str
    by_hand: str | None
    addresses: tuple[Annotated[str, Field(pattern=r"^https?://\S+$")], ...]

    @model_validator(mode="after")
    def check_origin(self) -> "Entry":
        if (self.size is None) == (self.size_from is None):
            raise ValueError("size, size_from: exactly one of them is known")
        if bool(self.addresses) == (self.by_hand is not None):
            raise ValueError("addresses, by_hand: exactly one of them says where the file is")
        return self

    @property
    def megabytes(self) -> str:
        """Its size, for messages."""
        about = "" if self.size else "about "
        return f"{about}{(self.size or self.size_from or 0) / 1e6:.0f} MB"


@functools.cache
def read_catalogue(path: Path = CATALOGUE) -> dict[str, Entry]:
    """Read the entries by name.

    Raises:
        CheckpointError: the file is missing, or an entry is malformed, or two have one name or file.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
        listed = [{**item, "addresses": tuple(item["addresses"])} for item in content]
        entries = TypeAdapter(list[Entry]).validate_python(listed)
    except OSError as error:
        raise CheckpointError(f"catalogue {path} cannot be read: {error.strerror}") from None
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"catalogue {path}: not a list of entries with addresses ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"catalogue {path}: entry {place}: {first['msg'].removeprefix('Value error, ')}"
        ) from None
    for kind in ("name", "file"):
        values = [getattr(entry, kind) for entry in entries]
        if twice := [value for value in values if values.count(value) > 1]:
            raise CheckpointError(f"catalogue {path}: {twice[0]} is the {kind} of two entries")
    return {entry.name: entry for entry in entries}


def entry_of(weights: str | Path) -> Entry | None:
    """Return the entry that a word names, or whose file a path could be; None: there is none."""
    name = Path(weights).name
    return next((entry for entry in read_catalogue(CATALOGUE).values() if name in (entry.name, entry.file)), None)


def input_of(path: Path) -> int | None:
    """Side in pixels at which a file of the catalogue was validated; None: another file."""
    entry = entry_of(path)
    return None if entry is None else entry.input


def find_weights(weights: str | Path, fetch: bool = False) -> Path:
    """Return the file that a path or a name of the catalogue means.

    A file that is there wins over a name; a name is looked up in models/weights.

    Args:
        fetch: fetch what a name means if it is not there.

    Raises:
        CheckpointError: a name whose file is not there, or could not be fetched; says how to get it.
    """
    path = Path(weights)
    if path.exists() or path.parent != Path(".") or (entry := entry_of(path)) is None:
        return path
    file = WEIGHTS_DIRECTORY / entry.file
    if file.is_file():
        return file
    by_hand = f"put {entry.file} into {WEIGHTS_DIRECTORY}"
    if entry.by_hand is not None:
        raise CheckpointError(f"{weights}: no address gives this file to a program; {by_hand} ({entry.by_hand})")
    if not fetch:
        command = f"models/weights/{SCRIPT.name} {entry.name}"
        raise CheckpointError(f"{weights} is not here; fetch it with: {command} ({entry.megabytes}), or {by_hand}")
    lines = download(entry)
    if not file.is_file():
        reason = next((line for line in reversed(lines) if line.startswith("  http")), "see above").strip()
        raise CheckpointError(f"{weights} could not be fetched ({reason}); {by_hand}, from {entry.addresses[0]}")
    return file


def download(entry: Entry) -> list[str]:
    """Fetch the file of an entry with download_weights.sh, with a progress bar; returns what the script said.

    Of several processes one fetches and the others wait.
    """
    say(f"fetching {entry.name}: {entry.megabytes}, {entry.family}, licence {entry.licence}")
    lines: list[str] = []
    with locked(WEIGHTS_DIRECTORY / f".{entry.file}.lock"):
        if (WEIGHTS_DIRECTORY / entry.file).is_file():
            return lines
        command = ["sh", str(SCRIPT), entry.name]
        part = WEIGHTS_DIRECTORY / f"{entry.file}.part"
        environment = {**os.environ, "WEIGHTS_DIRECTORY": str(WEIGHTS_DIRECTORY), "WEIGHTS_CATALOGUE": str(CATALOGUE)}
        # Its messages go to a file: nothing reads a pipe while this process looks at the part.
        said = WEIGHTS_DIRECTORY / f".{entry.file}.log"
        with open(said, "w+", encoding="utf-8", errors="replace") as log:
            with subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, env=environment) as running:
                watch(running, part, entry)
            log.seek(0)
            lines = log.read().splitlines()
        said.unlink()
    for line in lines:
        tqdm.write(escape(line))
    return lines


def watch(running: "subprocess.Popen[bytes]", part: Path, entry: Entry) -> None:
    """Show a bar of the growing file until the program ends; ends it where this one is interrupted."""
    total = entry.size or entry.size_from
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc=entry.file, disable=None) as bar:
        try:
            while running.poll() is None:
                bar.update(max(part.stat().st_size if part.exists() else 0, 0) - bar.n)
                time.sleep(POLL_SECONDS)
        except BaseException:
            running.terminate()  # what is there stays as a part and is continued
            raise


class locked:
    """Hold a lock file, which other processes wait for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    def __enter__(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "w")
        except OSError as error:
            raise CheckpointError(f"{self.path.parent} cannot be written: {error.strerror}") from None
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        assert self.file is not None
        self.file.close()  # the name stays: unlinked, it would let in a second process
