"""pack.py end to end: what it writes and refuses, checking and repairing, and the flags of EfficientDet's converter."""

import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pack
from detection.data.build import build_datasets
from detection.data.packed import repair
from detection.data.packed.entries import Entry, SplitContent
from detection.data.packed.writer import ShardWriter, write_shards

Run = Callable[..., Any]


@pytest.fixture
def run(run_script: Run, tmp_path: Path) -> Run:
    """`run(...)` in tmp_path: exit code, stdout, stderr of pack.py."""
    return lambda *arguments: run_script(pack.main, *arguments, cwd=tmp_path)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_images_give_the_same_bytes(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    """Whenever they are packed, whatever the times of their files, and in whatever order a file lists them."""
    copy = tmp_path / "copy"
    for name, content in contents(drawn_dataset).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
        os.utime(copy / name, (10**9, 10**9))
    assert run(f"data.root={drawn_dataset}", "--output", "one").returncode == 0
    assert run("data.root=copy", "--output", "two").returncode == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    file = copy / "annotations" / "instances_train.json"
    listed = json.loads(file.read_text())
    file.write_text(json.dumps(listed | {"images": listed["images"][::-1]}))
    assert run("data.root=copy", "--output", "three").returncode == 0
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    changed = {name for name in one if one[name] != three[name]}
    assert one.keys() == three.keys() and changed == {"annotations/instances_train.json", "train.index"}
    # packed once more, from shards, and written as files again
    result = run("data.root=one", "--output", "four")
    assert result.returncode == 0 and contents(tmp_path / "four") == one, result.stderr
    result = run("--unpack", "one", "--output", "files")
    assert result.returncode == 0 and "13 images written to files" in result.stdout
    assert contents(tmp_path / "files") == contents(drawn_dataset)


def test_shards_are_filled_up_to_their_size(tmp_path: Path) -> None:
    """With headers and .json the images take 2,560, 4,608, 2,560 and 2,048 bytes, the end of a shard 1,024."""
    sizes = [1000, 3000, 600, 10]
    entries = []
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.gif.odd").write_bytes(bytes([number]) * size)
        entries.append(Entry({"id": number, "file_name": f"{number}.gif.odd"}, [], tmp_path / f"{number}.gif.odd"))
    index = write_shards(tmp_path, "val", SplitContent(entries, b"{}"), 5632, None, lambda found, _: found)
    assert [shard.size for shard in index.shards] == [2560 + 1024, 4608 + 1024, 2560 + 2048 + 1024]
    assert index.shard_of.tolist() == [0, 1, 2, 2] and index.sizes.tolist() == sizes
    assert [shard.name for shard in index.shards] == [f"val-0000{number}-of-00003.tar" for number in range(3)]
    members = repair.image_members(tmp_path / index.shards[2].name)
    assert members == [(2, 512, 600), (3, 512 + 1024 + 1024 + 512, 10)]  # of suffix .image: not .gif or .json


HERE = str(Path(__file__).parent)
REFUSED = {  # arguments, the line
    "nothing": ([], "--output is missing: the directory to write to"),
    "not empty": (["data.root=SET", "--output", HERE], f"--output {HERE} exists and is neither empty nor a folder of"),
    "inside": (["data.root=SET", "--output", "SET/train/x"], "--output SET/train/x lies in the dataset SET/train,"),
    "inside the root": (["data.root=SET", "--output", "SET/x"], "--output SET/x lies in the dataset SET, which"),
    "fake": (["data.fake=true", "model.num_classes=2", "--output", "x"], "data.fake: there are no images to pack"),
    "many shards": (["data.root=SET", "--output", "x", "--shards", "5"], "val: 4 images do not fill 5 shards"),
    "two modes": (["--check", "x", "data.root=SET"], "--check names the data; leave settings,"),
    "check": (["--check", "x", "--output", "y"], "--check works on the shards that it names; leave --output out"),
    "check nothing": (["--check", "SET"], "SET: no index of packed shards is here (SPLIT.index)"),
    "rebuild nothing": (["--rebuild-index", "SET"], "SET: no shards (SPLIT-00000-of-00004.tar) are here"),
    "no folder": (["--unpack", "nowhere", "--output", "x"], "nowhere does not exist or is no folder"),
    "no records": (["--from-tfrecord", "no-*", "--output", "x"], "--from-tfrecord 'no-*': no file matches"),
    "captions": (
        ["--image_dir=SET/train", "--caption_annotations_file=c.json", "--output_file_prefix=x/train"],
        "--caption_annotations_file: captions have no boxes; give --object_annotations_file",
    ),
    "masks": (["--include_masks"], "--include_masks: masks are not trained on"),
    "threads": (["--num_threads", "4"], "--num_threads: images are copied one after another"),
    "half": (["--image_dir=SET/train"], "--image_dir, --output_file_prefix and one of --object_annotations_file and"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line(case: str, run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    before = sorted(drawn_dataset.rglob("*"))
    arguments, line = REFUSED[case]
    result = run(*(word.replace("SET", str(drawn_dataset)) for word in arguments))
    assert result.returncode == (6 if case == "not empty" else 2) and result.stderr.count("\n") == 1
    assert result.stderr.startswith(line.replace("SET", str(drawn_dataset))), result.stderr
    assert sorted(drawn_dataset.rglob("*")) == before and not any(tmp_path.iterdir())


def test_missing_images_are_named_before_anything_is_written(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    (tmp_path / "set" / "val").mkdir()
    content = (drawn_dataset / "annotations" / "instances_val.json").read_bytes()
    (tmp_path / "set" / "annotations" / "instances_val.json").write_bytes(content)
    (tmp_path / "set" / "val" / "1.png").write_bytes((drawn_dataset / "val" / "1.png").read_bytes())
    result = run("data.root=set", "--output", "x")
    assert result.returncode == 2 and "3 of 4 images are missing, such as" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_full_disk_and_a_kill_leave_nothing_half(
    run: Run, drawn_dataset: Path, tmp_path: Path, full_disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_disk(3000):
        result = run(f"data.root={drawn_dataset}", "--output", "x")
    line = f"{tmp_path / 'x'} cannot be written: File too large\n"
    assert (result.returncode, result.stderr) == (6, line) and not any(tmp_path.iterdir())

    finish = ShardWriter.finish
    finished: list[object] = []

    def die_at_the_third(writer: ShardWriter) -> object:
        if len(finished) == 2:  # both of the training set
            os.kill(os.getpid(), signal.SIGKILL)
        finished.append(finish(writer))
        return finished[-1]

    monkeypatch.setattr(ShardWriter, "finish", die_at_the_third)
    if not (child := os.fork()):
        run(f"data.root={drawn_dataset}", "--output", "x", "--shards", "2")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(ShardWriter, "finish", finish)
    assert run(f"data.root={drawn_dataset}", "--output", "x").returncode == 0
    assert run("--check", "x").returncode == 0


def test_check_and_rebuild_index(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    shards = tmp_path / "x"
    assert run(f"data.root={drawn_dataset}", "--output", "x", "--shards", "2").returncode == 0
    whole = contents(shards)
    result = run("--check", "x")
    assert (result.returncode, result.stdout) == (0, "x: all shards and annotations are as they were packed\n")
    assert run("--rebuild-index", "x").stdout.count("nothing else than the index before said") == 2
    for index in shards.glob("*.index"):
        index.write_text("damaged")
    result = run("--rebuild-index", "x")
    assert result.returncode == 0 and "train: index of 9 images in 2 shards written anew" in result.stdout
    assert "train: x/train.index could not be read, so what changed since packing is not known" in result.stdout
    assert contents(shards) == whole

    def change(name: str, place: int) -> None:
        content = bytearray((shards / name).read_bytes())
        content[place] ^= 1
        (shards / name).write_bytes(content)

    change("train-00001-of-00002.tar", 700)
    (shards / "val-00000-of-00002.tar").write_bytes(b"short")
    change("annotations/instances_val.json", 20)
    result = run("--check", "x")
    assert result.returncode == 2 and result.stdout.splitlines() == [
        "shard x/train-00001-of-00002.tar was changed: its SHA-256 is not that of the index; copy or pack it again",
        f"shard x/val-00000-of-00002.tar has 5 bytes, the index says {len(whole['val-00000-of-00002.tar'])}; copy it "
        "again, or pack the dataset again",
    ]
    assert result.stderr.startswith("annotation file x/annotations/instances_val.json was changed after packing")

    for name, harm, line in (
        ("train-00001-of-00002.tar", lambda path: path.unlink(), "is missing; copy it again"),
        ("train-00000-of-00002.tar", lambda path: os.truncate(path, 2000), "ends within 000000000100.json; copy"),
        ("train-00000-of-00002.tar", lambda path: change(path.name, 3), "is damaged at byte 0: bad checksum"),
    ):
        for file, content in whole.items():
            (shards / file).write_bytes(content)
        harm(shards / name)
        result = run("--rebuild-index", "x")
        assert result.returncode == 2 and f"shard x/{name} {line}" in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1


def test_rebuild_index_says_what_it_accepts(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    """A flipped bit, another packing of other images under the same names, and an edited annotation file."""
    shards = tmp_path / "x"
    assert run(f"data.root={drawn_dataset}", "--output", "x", "--shards", "2").returncode == 0
    _, offset, size = repair.image_members(shards / "train-00001-of-00002.tar")[0]
    content = bytearray((shards / "train-00001-of-00002.tar").read_bytes())
    content[offset + size // 2] ^= 1
    (shards / "train-00001-of-00002.tar").write_bytes(content)
    file = shards / "annotations" / "instances_train.json"
    file.write_bytes(file.read_bytes() + b"\n")
    result = run("--rebuild-index", "x")
    look = "check_dataset.py data.root=SHARDS opens them"
    said = [line.removeprefix("train: ") for line in result.stdout.splitlines() if line.startswith("train: ")]
    assert result.returncode == 0 and said == [
        "index of 9 images in 2 shards written anew",
        "annotations/instances_train.json has other bytes than before",
        f"train-00001-of-00002.tar has other bytes than before; 0 of its 5 images have another size; {look}",
    ]
    assert "val: nothing else than the index before said" in result.stdout
    assert run("--check", "x").returncode == 0

    other = tmp_path / "other"
    (other / "annotations").mkdir(parents=True)
    (other / "val").mkdir()
    listed = json.loads((drawn_dataset / "annotations" / "instances_val.json").read_text())
    listed["images"][3]["file_name"] = "new.png"
    (other / "annotations" / "instances_val.json").write_text(json.dumps(listed))
    for place, name in enumerate(("0.png", "1.png", "2.png", "new.png")):
        source = drawn_dataset / ("train/8.png" if place == 1 else f"val/{place}.png")
        (other / "val" / name).write_bytes(source.read_bytes())
    assert run("data.root=other", "--output", "y", "--shards", "2").returncode == 0
    for name, changed in contents(tmp_path / "y").items():
        if not name.endswith(".index"):
            (shards / name).write_bytes(changed)
    sizes = [path.stat().st_size for path in (other / "val" / "1.png", drawn_dataset / "val" / "1.png")]
    said = run("--rebuild-index", "x").stdout
    assert "val: 1 images more, such as new.png\nval: 1 images fewer, such as 3.png\n" in said
    assert f"1 of its 2 images have another size, such as 1.png: {sizes[0]}, before {sizes[1]}\n" in said
    assert "train: nothing else than the index before said" in said


def test_other_files_given_for_tfrecord_are_named(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    assert run(f"data.root={drawn_dataset}", "--output", "x").returncode == 0
    (tmp_path / "tfrecord").mkdir()
    shard = (tmp_path / "x" / "val-00000-of-00001.tar").read_bytes()
    for content, kind in (
        (shard, "a tar archive"),
        (gzip.compress(b"record"), "compressed with gzip; unpack it with gunzip first"),
        ((drawn_dataset / "val" / "0.png").read_bytes(), "a PNG image"),
        (b'{"images": []}', "a JSON file"),
    ):
        (tmp_path / "tfrecord" / "val-00000-of-00001").write_bytes(content)
        result = run("--from-tfrecord", "tfrecord/val-*", "--output", "y")
        line = f"tfrecord/val-00000-of-00001 is no TFRecord file, it is {kind}\n"
        assert (result.returncode, result.stderr) == (2, line)
    result = run("--from-tfrecord", "x/val-*", "--output", "y")
    line = "x/val-00000-of-00001.tar is no TFRecord file, it is a shard of pack.py; its folder is read as it is: "
    assert (result.returncode, result.stderr) == (2, f"{line}data.root=x\n")


def test_the_flags_of_the_document(
    run: Run, drawn_dataset: Path, tmp_path: Path, default_settings: Callable[..., Any]
) -> None:
    """Its two commands, with the boxes' files instead of the captions': the second adds a split to the first."""
    for split in ("train", "val"):
        file = drawn_dataset / "annotations" / f"instances_{split}.json"
        result = run(
            f"--image_dir={drawn_dataset / split}", f"--object_annotations_file={file}",
            f"--output_file_prefix=tfrecord/{split}", "--num_shards=2",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert run(f"data.root={drawn_dataset}", "--output", "x", "--shards", "2").returncode == 0
    assert contents(tmp_path / "tfrecord") == contents(tmp_path / "x")
    result = run(f"data.root={drawn_dataset}", "--output", "x")
    assert (result.returncode, result.stderr) == (6, "--output x has the split train already\n")
    info = json.loads((drawn_dataset / "annotations" / "instances_val.json").read_text())
    del info["annotations"]
    (tmp_path / "image_info_test.json").write_text(json.dumps(info))
    result = run(
        f"--image_dir={drawn_dataset / 'val'}", "--image_info_file=image_info_test.json",
        "--output_file_prefix=x/test", "--num_shards=1",
    )  # fmt: skip
    assert result.returncode == 0 and "test: 4 images in 1 shards" in result.stdout, result.stderr
    assert sorted(path.name for path in tmp_path.glob("x/*.index")) == ["test.index", "train.index", "val.index"]
    training, validation = build_datasets(default_settings(f"data.root={tmp_path / 'x'}").data, 0, None)
    assert (len(training), len(validation)) == (9, 4)
