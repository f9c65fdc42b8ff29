"""The catalogue of published weights: what it holds, who reads it, and downloads by a name."""

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.config.loading import load_settings
from detection.errors import CheckpointError
from detection.models import build_detector, catalogue
from detection.models.backbones import BACKBONES
from detection.models.catalogue import Entry, find_weights, read_catalogue
from detection.models.importers import FORMATS
from detection.models.pretrained import load_pretrained
from tests.support.paths import ARGS
from tests.support.weights_server import SCRIPT, needs_tools

ENTRIES = read_catalogue()


def test_the_shell_reads_what_python_reads() -> None:
    """Of every entry: file, size, least size, digest, and the addresses in order."""
    text = SCRIPT.read_text()
    function = text[text.index("fields() {") : text.index("# describe NAME")]
    program = f'catalogue={catalogue.CATALOGUE}\n{function}\nfor name; do fields "$name"; done'
    done = subprocess.run(["sh", "-c", program, "sh", *ENTRIES], capture_output=True, text=True, check=True)
    expected = [
        str(value)
        for entry in ENTRIES.values()
        for value in (
            *(entry.file, entry.size or "-", entry.size_from or "-", entry.sha256 or "-", entry.by_hand or "-"),
            "".join(f" {address}" for address in entry.addresses),
        )
    ]
    assert done.stdout.splitlines() == expected and len(ENTRIES) >= 46


def test_entries_of_formats_say_their_geometry() -> None:
    formats = {known.source: known for known in FORMATS}
    seen = set()
    for entry in ENTRIES.values():
        if (known := formats.get(entry.family)) is None:
            continue
        if entry.family in seen:  # three files of one network
            assert entry.geometry == next(other.geometry for other in ENTRIES.values() if other.family == entry.family)
            continue
        seen.add(entry.family)
        state: Any = {"fpn.resample.3.conv.conv.weight": torch.empty(64, 1), "fpn.resample.3.conv.conv.bias": None}
        state |= {"dbl_1_1.conv.weight": torch.empty(512, 1024, 1, 1), "backbone.conv_res_block1.": None}
        words = [f"{path}={value}".replace("None", "null") for path, value in known.settings(state).items()]
        settings, _ = load_settings(ARGS, words=words)
        with torch.device("meta"):
            assert build_detector(settings, 2).geometry.describe() == entry.geometry, entry.name
    assert seen == set(formats), "every format has an entry"


def test_digests_and_sizes_that_were_published() -> None:
    # first digits of SHA-256 in the names that MMDetection, timm and torchvision give their files
    in_names = {entry.file.rpartition("-")[2][:8] for entry in ENTRIES.values() if len(entry.sha256 or "") == 8}
    assert in_names == {entry.sha256 for entry in ENTRIES.values() if len(entry.sha256 or "") == 8}
    assert len(in_names) == 30
    # Darknet's files: 20 bytes of header, then numbers of 4 bytes; YOLOv3 has 62,001,757 of them with the statistics
    assert ENTRIES["yolov3.weights"].size == 20 + 4 * 62_001_757
    darknet = [entry for entry in ENTRIES.values() if entry.family.endswith("of Darknet")]
    assert len(darknet) == 6 and all(entry.size and (entry.size - 20) % 4 == 0 for entry in darknet)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("size: 162482580", "size: large"), r"entry 0.size: Input should be a valid integer"),
        (("size: 162482580", "size: null"), "size, size_from: exactly one"),
        (("part: backbone", "part: neck"), "entry 0.part"),
        (('"2495c269', '"zz95c269'), "entry 0.sha256"),
        (("- name: yolov3.weights", "- name: darknet53.conv.74"), "darknet53.conv.74 is the name of two entries"),
        (("  licence: public domain (Darknet)\n", ""), "entry 0.licence"),
        (("- https://data", "- ftp://data"), "entry 0.addresses.0"),
    ],
)
def test_a_slip_in_the_catalogue_is_named(change: tuple[str, str], words: str, tmp_path: Path) -> None:
    text = catalogue.CATALOGUE.read_text()
    assert change[0] in text
    path = tmp_path / "catalogue.yaml"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(CheckpointError, match=words) as raised:
        read_catalogue(path)
    assert "\n" not in str(raised.value)
    path.write_text("just text")
    with pytest.raises(CheckpointError, match="not a list of entries"):
        read_catalogue(path)


def entry_for(path: Path, digest: str | None, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A catalogue with one entry more, for a file on the server; its size is known only as a least one."""
    digest_line = "null" if digest is None else f'"{digest}"'
    text = catalogue.CATALOGUE.read_text() + (
        f"\n- name: small\n  part: detector\n  family: none\n  file: {path.name}\n  classes: 1\n  input: 32\n"
        f"  published: null\n  licence: MIT\n  size: null\n  size_from: 100\n  sha256: {digest_line}\n"
        "  geometry: null\n  source: a test\n  by_hand: null\n  addresses:\n    - https://nowhere.invalid/x\n"
    )
    other = path.parent.parent / "catalogue.yaml"
    other.write_text(text)
    monkeypatch.setattr(catalogue, "CATALOGUE", other)
    return read_catalogue(other)["small"]


@needs_tools
def test_a_name_is_fetched_checked_and_pinned(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = served / "small.pth"
    torch.save({"a": torch.arange(100.0)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry_for(path, digest[:8], monkeypatch)
    with pytest.raises(CheckpointError, match="fetch it with"):
        find_weights("small")
    found = find_weights("small", fetch=True)
    assert found.read_bytes() == path.read_bytes()
    assert found.with_name("small.pth.sha256").read_text().split() == [digest, "small.pth"]
    printed = capsys.readouterr()
    assert "fetching small: about 0 MB, none, licence MIT" in printed.out
    torch.save({"a": torch.arange(101.0)}, path)  # the publisher exchanges the file
    assert find_weights("small", fetch=True) == found  # what is there is used
    found.unlink()
    with pytest.raises(CheckpointError, match=rf"could not be fetched \(http.*SHA-256 is .*, not {digest}\); put"):
        find_weights("small", fetch=True)
    assert not found.exists()


@needs_tools
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>" * 20, "not the header of a file of torch.save"),
        (b"PK\3\4" + bytes(60), "64 bytes, at least 100 were expected"),
        (b"PK\3\4" + bytes(600), "its end is missing"),
        (None, "404|error"),
    ],
)
def test_what_is_no_such_file_is_refused(
    content: bytes | None, words: str, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = served / "small.pth"
    if content is not None:
        path.write_bytes(content)
    entry_for(path, None, monkeypatch)
    with pytest.raises(CheckpointError, match=words) as raised:
        find_weights("small", fetch=True)
    line = str(raised.value)
    assert "\n" not in line and f"put small.pth into {catalogue.WEIGHTS_DIRECTORY}" in line
    assert not [name for name in os.listdir(catalogue.WEIGHTS_DIRECTORY) if not name.startswith(".")]


def test_classifiers_of_timm_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of another size, and of TensorFlow's form for torchvision's, is refused; the head is left out."""
    monkeypatch.setattr(catalogue, "WEIGHTS_DIRECTORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    backbone = BACKBONES["tf_efficientnet_b0"]()
    head = {"conv_head.weight": torch.ones(2, 3, 1, 1), "bn2.bias": torch.ones(2), "classifier.bias": torch.ones(2)}
    name = "tf_efficientnet_b0.ns_jft_in1k"
    torch.save({**backbone.state_dict(), **head}, tmp_path / ENTRIES[name].file)

    def start(form: str) -> tuple[Any, list[str]]:
        words = [f"model.backbone={form}efficientnet_b0", f"model.pretrained={name}", "yolo.neck_channels=[8, 8, 8]"]
        settings, _ = load_settings(ARGS, words=words)
        model = build_detector(settings, 2).model
        return model, load_pretrained(model, settings.model, ["a", "b"])

    model, (line,) = start("tf_")
    assert "a classifier timm/tf_efficientnet_b0" in line and "nothing says" not in line
    own = model.backbone.state_dict()
    assert all(torch.equal(own[key], value) for key, value in backbone.state_dict().items())
    with pytest.raises(CheckpointError, match=r"is of tf_efficientnet_b0; its form \(SAME padding"):
        start("")
    entries = [entry for entry in ENTRIES.values() if entry.name.startswith("tf_efficientnet_b")]
    sides = [224, 240, 260, 300, 380, 456, 528, 600]  # of B0 to B7 in EfficientNet's own code
    assert [entry.input for entry in entries] == [side for side in sides for _ in range(2)]
