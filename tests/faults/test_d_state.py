"""D: kill -9, full disks, damaged and hostile files, signals, resuming."""

import argparse
import contextlib
import ctypes
import functools
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import pack
from detection import checkpoints
from detection.checkpoints import content_digest, load_checkpoint, save_checkpoint
from detection.config.command_line import DEFAULTS
from detection.config.loading import complete_settings, leaf_items, load_settings
from detection.data.loaders import collate_samples
from detection.errors import CheckpointError, OutputError, SettingsError
from detection.runtime.run_directory import new_run_directory
from detection.training import evaluation
from detection.training import run as run_module
from detection.training.checkpoint_writer import CheckpointWriter
from detection.training.resume import RESUMABLE, open_resumed_run
from tests.support.checkpoint_cases import Payload, equal
from tests.support.fault_runs import OVERLAY, Run, at_step, die, run_script
from tests.support.run_logging import logging_to
from tests.support.training_runs import first_difference, rows_of


def content(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.full((3,), float(step))}}


@pytest.fixture(scope="session")
def whole(server: Any, common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`whole(*settings)`: directory of an uninterrupted run with these settings; each is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*settings: str) -> Path:
        if settings not in made:
            directory = tmp_path_factory.mktemp("whole")
            words = [*common, *settings, "--output", str(directory / "run")]
            process = server.Process(
                target=run_script, args=(words, str(directory), str(directory / "out"), None, None, False)
            )
            process.start()
            Run(process, directory / "out").ends_with(0)
            made[settings] = directory / "run"
        return made[settings]

    return run


# D01: kill -9 in a write


class Tracer:
    """Runs a function in a forked process and kills it at its n-th entry into, or return from, the kernel (ptrace)."""

    TRACE_ME, SYSCALL = 0, 24

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        if self.stops_until_killed(lambda: None, 10_000) is None:
            pytest.skip("this system does not let a process trace its child")

    def stops_until_killed(self, action: Callable[[], Any], most: int) -> int | None:
        """Stops counted; fewer than `most` if the action came to its end. None: not allowed."""
        child = os.fork()
        if child == 0:
            try:
                if self.libc.ptrace(self.TRACE_ME, 0, None, None) == 0:
                    os.kill(os.getpid(), signal.SIGSTOP)
                    action()
                    os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            return None
        stops = 0
        while stops < most:
            self.libc.ptrace(self.SYSCALL, child, None, None)
            _, status = os.waitpid(child, 0)
            if not os.WIFSTOPPED(status):
                assert os.waitstatus_to_exitcode(status) == 0
                return stops
            stops += 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return stops


def check_killed_write(directory: Path, tracer: Tracer, stops: int) -> bool:
    """Kill a write of last.pt, best.pt and a numbered one at this stop; whether it came to its end before."""
    for path in directory.iterdir():
        path.unlink()
    with CheckpointWriter(directory, keep=2) as writer:
        for step in (1, 2):
            writer.save(content(step), best=step == 1, number=step)
    names = ["last.pt", "best.pt", "step_000000003.pt"]
    counted = tracer.stops_until_killed(lambda: CheckpointWriter(directory, keep=2)._write(content(3), names), stops)
    assert counted is not None
    last, best = (load_checkpoint(directory / name) for name in ("last.pt", "best.pt"))
    assert equal(last, {"format": checkpoints.FORMAT_VERSION, **content(last["step"])}) and last["step"] in (2, 3)
    assert equal(best, {"format": checkpoints.FORMAT_VERSION, **content(best["step"])}) and best["step"] in (1, 3)
    assert last["step"] == 2 or best["step"] == 3, "D12: who finds the new last.pt finds its best.pt"
    numbered = [load_checkpoint(path)["step"] for path in sorted(directory.glob("step_*.pt"))]
    assert numbered in ([1, 2], [1, 2, 3], [2, 3])
    # No repair: the next write works and removes what is left of the killed one.
    with CheckpointWriter(directory, keep=2) as writer:
        writer.save(content(4), number=4)
    assert load_checkpoint(directory / "last.pt")["step"] == 4
    assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]
    return counted < stops


def test_D01_D12_killed_at_some_system_calls_of_a_write(tmp_path: Path) -> None:
    tracer = Tracer()
    total = tracer.stops_until_killed(
        lambda: CheckpointWriter(tmp_path, keep=2)._write(content(3), ["last.pt", "best.pt", "step_000000003.pt"]),
        10**5,
    )
    assert total is not None and total > 100
    # The last ones are those around the renames; of the others every 13th.
    for stops in [*range(1, total - 40, 13), *range(total - 40, total, 2)]:
        check_killed_write(tmp_path, tracer, stops)


@pytest.mark.faults
@pytest.mark.guard(
    "detection.checkpoints:save_checkpoint",
    "os.replace(temporary, path)",
    "shutil.copyfile(temporary, path), temporary.unlink()",
)
def test_D01_D12_killed_at_every_system_call_of_a_write(tmp_path: Path) -> None:
    tracer, stops = Tracer(), 1
    while not check_killed_write(tmp_path, tracer, stops):
        stops += 1
    assert stops > 100


@pytest.mark.parametrize("round_", range(3))
def test_D01_killed_at_a_random_moment_of_saving_all_the_time(tmp_path: Path, round_: int) -> None:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), CheckpointWriter(tmp_path, keep=1) as writer:
            for step in range(10**9):
                writer.save(content(step), best=step % 2 == 0, number=step)
        os._exit(0)
    deadline = time.monotonic() + 20
    while not (tmp_path / "best.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.05 + 0.037 * round_)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in tmp_path.glob("*.pt"):
        step = load_checkpoint(path)["step"]
        assert equal(load_checkpoint(path), {"format": checkpoints.FORMAT_VERSION, **content(step)})
    assert (tmp_path / "last.pt").exists()


# D02, D03: no room, no permission


def fill_disk(main: ModuleType, step: int) -> None:
    """From this step on no file of the process can grow, nor a new one be written."""
    at_step(main, step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)))


def test_D02_disk_full_at_a_checkpoint(train, tmp_path: Path) -> None:
    # Log lines come every 1000 steps, so the checkpoint after step 6 is the first to be written on the full disk.
    words = ["run.log_frequency=1000", "train.save_frequency=3", "evaluation.evaluate_frequency=1000"]
    run = train("run", *words, fault=functools.partial(fill_disk, step=4))
    assert run.wait() == 6  # the line on stderr went to the full disk too, as nohup's would
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.faults
def test_D02_disk_full_at_a_log_line(train, tmp_path: Path) -> None:
    run = train("run", "train.save_frequency=3", fault=functools.partial(fill_disk, step=4))
    assert run.wait() == 6
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4  # the evaluation's
    assert [row["step"] for row in rows_of(tmp_path / "run") if "train/loss" in row] == [1, 2, 3, 4]


@contextlib.contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """A file system of its own that is small, in memory."""
    directory.mkdir()
    if os.geteuid() != 0 or subprocess.call(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory]):
        pytest.skip("only root may mount a small file system, and not everywhere")
    try:
        yield directory
    finally:
        subprocess.check_call(["umount", "-l", directory])


@pytest.mark.parametrize("preflight", [True, False])
def test_D02_a_really_full_disk(launch, common: list[str], tmp_path: Path, preflight: bool) -> None:
    # A checkpoint has about 170 kB; two and a temporary one do not fit beside logs and pictures.
    with small_disk(tmp_path / "disk", "400k" if preflight else "700k") as disk:
        if preflight:
            (disk / "other").write_bytes(bytes(250_000))
        words = ["--output", disk / "run", f"run.preflight={preflight}", "train.save_frequency=1", "train.steps=500"]
        run = launch("out", *common, *words, "train.keep_checkpoints=20", "evaluation.evaluate_frequency=1000")
        run.ends_with(6, str(disk))
        whole = [load_checkpoint(path) for path in (disk / "run").glob("*.pt")]
        assert "from step 0" not in run.out if preflight else whole, "what was written before is whole"


def become_nobody(main: ModuleType, step: int | None = None) -> None:
    """Root may write everywhere; the fault needs another user."""

    def change() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)

    change() if step is None else at_step(main, step, change)


@pytest.mark.faults
def test_D03_directory_that_is_lost_in_mid_run(train, tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    lose = functools.partial(remove_before_step_3, directory=directory)
    run = train("run", "run.log_frequency=1000", "train.save_frequency=2", fault=lose)
    run.ends_with(6, directory, "cannot be written")
    run = train("run", "train.save_frequency=1000", fault=lose)  # noticed at the evaluation
    run.ends_with(6, directory, "cannot be written")


def remove_before_step_3(main: ModuleType, directory: str) -> None:
    at_step(main, 3, lambda: shutil.rmtree(directory))


@pytest.mark.parametrize("locked", ["parent", "itself"])
def test_D03_no_permission_at_the_start(launch, common: list[str], tmp_path: Path, locked: str) -> None:
    directory = tmp_path / "locked"
    directory.mkdir(mode=0o555)
    for parent in tmp_path.parents:  # pytest closes its directories to others
        if "pytest-" in str(parent):
            parent.chmod(0o755)
    subprocess.check_call(["chmod", "-R", "a+rX", tmp_path.parent])
    output = directory / "run" if locked == "parent" else directory
    run = launch("out", *common, "--output", output, fault=become_nobody)
    run.ends_with(6, str(directory), "Permission denied")
    assert not list(directory.iterdir())


def test_D03_no_permission_in_mid_run(train, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs a process that can give its permission away")
    words = ["run.log_frequency=1000", "train.save_frequency=3", "evaluation.evaluate_frequency=1000"]
    run = train("run", *words, fault=functools.partial(become_nobody, step=4))
    run.ends_with(6, "last.pt", "Permission denied")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3


@pytest.mark.faults
def test_D04_temporary_folder_that_does_not_exist(train, tmp_path: Path) -> None:
    run = train("run", "data.num_workers=2", "run.preflight=true", fault=no_temporary_folder)
    run.ends_with(0)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == OVERLAY["train"]["steps"]


def no_temporary_folder(main: ModuleType) -> None:
    os.environ["TMPDIR"] = "/nowhere/at/all"
    tempfile.tempdir = None


# D05, D06: damaged and hostile files


@pytest.mark.guard("detection.checkpoints:verify_checkpoint", "digest is None or digest != expected", "False")
def test_D05_no_single_flipped_bit_loads_with_other_values(tmp_path: Path) -> None:
    # The bits of the values themselves; tests/test_checkpoints.py flips those of the whole file.
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(7))
    raw = bytearray(path.read_bytes())
    place = raw.index(content(7)["model"]["w"].numpy().tobytes())
    for bit in range(8 * 12):
        damaged = bytearray(raw)
        damaged[place + bit // 8] ^= 1 << bit % 8
        path.write_bytes(repaired(bytes(damaged)))
        with pytest.raises(CheckpointError, match=r"last\.pt is damaged"):
            load_checkpoint(path)


def repaired(raw: bytes) -> bytes:
    """The same zip file with correct checksums of its entries: a damage that happened before it was written."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as written, zipfile.ZipFile(io.BytesIO(raw)) as archive:
        for entry in archive.infolist():
            start = entry.header_offset + 26
            name, extra = (int.from_bytes(raw[at : at + 2], "little") for at in (start, start + 2))
            begin = start + 4 + name + extra
            written.writestr(entry.filename, raw[begin : begin + entry.file_size])
    return target.getvalue()


@pytest.mark.faults
def test_D05_a_damaged_last_names_what_is_whole(train, launch, tmp_path: Path) -> None:
    train("run", "train.save_frequency=3", "train.keep_checkpoints=5").ends_with(0)
    raw = (tmp_path / "run" / "last.pt").read_bytes()
    (tmp_path / "run" / "last.pt").unlink()
    (tmp_path / "run" / "last.pt").write_bytes(raw[:5000])
    run = launch("refused", "--resume", tmp_path / "run")
    words = [str(tmp_path / "run" / "last.pt"), "is damaged", "step_000000003.pt (step 3)", "best.pt (step"]
    assert "last.pt (step" not in run.ends_with(7, *words)
    shutil.copy(tmp_path / "run" / "step_000000003.pt", tmp_path / "run" / "last.pt")
    launch("resumed", "--resume", tmp_path / "run").ends_with(0, "from step 3")


@pytest.mark.guard("detection.checkpoints:read_file", "weights_only=True", "weights_only=False")
@pytest.mark.parametrize("place", ["--resume", "model.pretrained", "--replay"])
def test_D06_pickled_code_is_not_run(launch, common: list[str], tmp_path: Path, place: str) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "run").mkdir()
    for name in ("last.pt", "state.pt"):
        torch.save({"format": 1, "digest": "0" * 64, "model": Payload(marker)}, tmp_path / "run" / name)
    if place == "model.pretrained":
        words = [*common, "model.cfg=null", "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8, 8, 8]"]
        run = launch("out", *words, f"model.pretrained={tmp_path / 'run' / 'last.pt'}")
    else:
        run = launch("out", place, tmp_path / "run")
    run.wait()
    assert not marker.exists(), "the payload ran"
    run.ends_with(7, str(tmp_path / "run"), "a pickled object of another program")


# D07, D08: exact resume


@pytest.mark.guard(
    "detection.training.state:RunState.load", 'self.optimizer.load_state_dict(checkpoint["optimizer"])', "pass"
)
def test_D07_killed_in_mid_epoch_with_workers_and_resumed_is_the_same_run(train, launch, whole, tmp_path: Path) -> None:
    # Saved after 2, 4, 6, 8 and killed in step 5: 4 is taken again. An epoch is 3.25 steps.
    words = ["data.num_workers=2", "train.save_frequency=2"]
    run = train("run", *words, fault=functools.partial(at_step, step=5, action=die))
    assert run.wait() == -signal.SIGKILL
    launch("resumed", "--resume", tmp_path / "run", "train.save_frequency=1000").ends_with(0, "from step 4")
    compare_with(whole(), tmp_path / "run")


@pytest.mark.faults
def test_D07_killed_on_shards_and_resumed_is_the_run_on_the_folder(
    train, launch, whole, dataset: Path, run_script, tmp_path: Path
) -> None:
    packed = run_script(pack.main, f"data.root={dataset}", "--output", tmp_path / "shards", "--shards", "2")
    assert packed.returncode == 0, packed.stderr
    words = [f"data.root={tmp_path / 'shards'}", "data.num_workers=2", "train.save_frequency=2"]
    run = train("run", *words, fault=functools.partial(at_step, step=5, action=die))
    assert run.wait() == -signal.SIGKILL
    launch("resumed", "--resume", tmp_path / "run", "train.save_frequency=1000").ends_with(0, "from step 4")
    compare_with(whole(), tmp_path / "run")


# YOLOX's last part has no mosaic and mixup, and a further loss.
YOLOX = (
    "model.detector=yolox", "model.cfg=null", "model.backbone=mobilenet_v3_small", "yolox.neck_channels=[8, 8, 8]",
    "yolox.head_channels=8", "yolox.loss=yolox", "yolox.assigner=simota", "yolox.l1_weight=1",
)  # fmt: skip


@pytest.mark.parametrize(
    "detector",
    [
        ("data.augmentation.mixup={p: 0.5, beta: 1.5}",),
        pytest.param((*YOLOX, "data.augmentation.mixup.p=0.5"), marks=pytest.mark.faults),
    ],
)
def test_D07_killed_before_the_last_part_and_resumed_is_the_same_run(
    train, launch, whole, tmp_path: Path, detector: tuple[str, ...]
) -> None:
    """The last part begins at step 5 of 8; the run is killed in step 4, and continued from 2 with other workers."""
    words = [*detector, "data.augmentation.mosaic.p=0.8", "train.clean_finish=0.4"]
    run = train("run", *words, "train.save_frequency=2", fault=functools.partial(at_step, step=3, action=die))
    assert run.wait() == -signal.SIGKILL
    words_of_resume = ["--resume", tmp_path / "run", "train.save_frequency=1000", "data.num_workers=1"]
    launch("resumed", *words_of_resume).ends_with(0, "from step 2", "from step 5 without mosaic and mixup")
    reference = whole(*words)
    compare_with(reference, tmp_path / "run")
    # without that last part it would have been another run
    train("other", *words[:-1]).ends_with(0)
    first, second = (load_checkpoint(path / "last.pt")["model"] for path in (reference, tmp_path / "other"))
    assert first_difference(first, second) is not None
    refused = launch("longer", "--resume", tmp_path / "run", "train.steps=12")
    refused.ends_with(2, "train.clean_finish follow the length of the run")


def compare_with(whole: Path, directory: Path) -> None:
    """Weights, average, optimizer, counters of newest and best checkpoint, and all rows, to the bit; not settings."""
    for name in ("last.pt", "best.pt"):
        one, two = (load_checkpoint(path / name) for path in (whole, directory))
        for key in one.keys() - {"settings"}:
            assert first_difference(one[key], two[key]) is None, (name, key)
    assert rows_of(whole) == rows_of(directory)
    for name in ("results.csv", "metrics.json", "detections.json", "best_metrics.json", "best_detections.json"):
        assert (whole / name).read_text() == (directory / name).read_text(), name


@pytest.mark.faults
def test_D07_a_row_of_several_steps_is_the_same_after_a_stop_between_them(train, launch, whole, tmp_path: Path) -> None:
    # Other features than in the other runs: bf16, SGD's momentum, cosine restarts, a backbone frozen for some steps.
    words = [
        "run.log_frequency=5", "train.steps=9", "run.precision=bf16", "train.optimizer=sgd", "train.unfreeze_step=5",
        "train.backbone_learning_rate_factor=0.5", "train.backbone_batch_norm=frozen", "scheduler.T_0=4",
        "scheduler.strategy=CosineAnnealingWarmRestartsWithWarmup", "model.cfg=null",
        "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8, 8, 8]",
    ]  # fmt: skip
    train("run", *words, "data.num_workers=2", fault=ctrl_c).ends_with(130, "saved after step 3")
    launch("resumed", "--resume", tmp_path / "run").ends_with(0)
    compare_with(whole(*words), tmp_path / "run")


def ctrl_c(main: ModuleType) -> None:
    """It reaches the loader's workers too."""
    at_step(main, 2, lambda: os.killpg(os.getpid(), signal.SIGINT))


@pytest.mark.faults
def test_D09_other_validation_annotations_are_refused_unless_told(train, launch, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    train("run", f"data.root={tmp_path / 'data'}", "train.steps=2").ends_with(0)
    path = tmp_path / "data" / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    path.write_text(json.dumps(content))
    words = ["--resume", tmp_path / "run", "train.steps=3"]
    launch("resumed", *words).ends_with(2, "the validation annotations are not those of", "--accept-changes")
    launch("told", *words, "--accept-changes").ends_with(0)


@pytest.mark.faults
@pytest.mark.parametrize("precision", ["off", "bf16"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", range(1, 9))
def test_D07_D08_stopped_at_any_step_and_resumed_is_the_same_run(
    train, launch, whole, tmp_path: Path, step: int, workers: int, precision: str
) -> None:
    words = [f"run.precision={precision}", "train.steps=9"]
    stop = functools.partial(signal_at, number=signal.SIGTERM, place="step", step=step - 1)
    train("run", *words, f"data.num_workers={workers}", fault=stop).ends_with(143, f"saved after step {step}")
    other = 2 - workers
    launch("resumed", "--resume", tmp_path / "run", f"data.num_workers={other}").ends_with(0)
    compare_with(whole(*words), tmp_path / "run")


def kill_in_micro_step(main: ModuleType, step: int, micro_step: int) -> None:
    """Between two backward passes of one optimizer step."""
    real, seen = main.Run.new_state, 0

    def new_state(*arguments: Any) -> Any:
        state = real(*arguments)

        def count(*_: Any) -> None:
            nonlocal seen
            seen += state.model.training and state.step == step
            if seen > micro_step:
                die()

        state.model.register_forward_pre_hook(count)
        return state

    main.Run.new_state = new_state


@pytest.mark.parametrize("micro_step", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_D08_killed_in_mid_accumulation_repeats_the_step(train, launch, whole, tmp_path: Path, micro_step: int) -> None:
    fault = functools.partial(kill_in_micro_step, step=3, micro_step=micro_step)
    run = train("run", "train.save_frequency=1", fault=fault)
    assert run.wait() == -signal.SIGKILL
    saved = load_checkpoint(tmp_path / "run" / "last.pt")["step"]
    assert saved in (2, 3)  # 3 if the background write was quicker than the kill
    launch("resumed", "--resume", tmp_path / "run").ends_with(0, f"from step {saved}")
    compare_with(whole(), tmp_path / "run")


# D09, D10, D14: what does not fit


def other_values(value: Any) -> list[Any]:
    """Candidates that differ from a setting's value, of its kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2, value + 1, value / 2, 1, 0.25, 64]
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        return [[item * 2 for item in value], [*value[:-1], value[-1] * 2], [*value[:-1], value[-1] / 2]]
    if isinstance(value, list) and value and isinstance(value[0], list):  # anchors, sizes of levels
        return [one_more(value)]
    words = ["5ep", "sgd", "constant", "giou", "cross_entropy", "frozen", "darknet", "cubic", "down", "repeat_factor"]
    return [*words, 7, 0.5, ["blue"]]


def one_more(value: Any) -> Any:
    """Add 1 to each number of nested lists."""
    return [one_more(item) for item in value] if isinstance(value, list) else value + 1


@pytest.mark.faults
def test_D09_every_setting_that_changes_the_numbers_is_refused(train, common: list[str], tmp_path: Path) -> None:
    train("run", "train.steps=1").ends_with(0)
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    settings = complete_settings(checkpoint["settings"], DEFAULTS)
    tried = 0
    for key, value in leaf_items(settings.model_dump(mode="json")):
        for other in other_values(value):
            word = f"{key}={yaml.safe_dump(other, default_flow_style=True).splitlines()[0]}"
            try:
                changed = load_settings(settings, [], [word])[0]
            except SettingsError:
                continue
            if changed != settings:
                break
        else:
            continue
        tried += 1
        resume = argparse.Namespace(
            resume=str(tmp_path / "run"), config=[], output=None, settings=[word], accept_changes=False, extend=False
        )
        if key in RESUMABLE:
            assert open_resumed_run(resume, {})[3], key
            continue
        with pytest.raises(SettingsError, match=f"{key} was .* and cannot become") as raised:
            open_resumed_run(resume, {})
        assert raised.value.exit_code == 2
        resume.accept_changes = True
        assert any(f"continued with {key} = " in line for line in open_resumed_run(resume, {})[3])
    assert tried > 60


def test_D09_other_conditions_are_named_and_refused_unless_told(train, launch, tmp_path: Path) -> None:
    train("run", "train.steps=2").ends_with(0)
    path = tmp_path / "run" / "last.pt"
    changed = load_checkpoint(path)
    others = {"processes": 4, "image decoder": "OpenCV 1.0"}
    differences = [
        f"was trained with {name} {other}, this is {changed['conditions'][name]}" for name, other in others.items()
    ]
    changed["conditions"] |= others
    save_checkpoint(path, changed)
    launch("resumed", "--resume", tmp_path / "run", "train.steps=3").ends_with(2, differences[0], "--accept-changes")
    warnings = [f"warning     {tmp_path / 'run'} {difference}" for difference in differences]
    launch("told", "--resume", tmp_path / "run", "train.steps=3", "--accept-changes").ends_with(0, *warnings)


@pytest.mark.faults
def test_D10_a_checkpoint_of_format_1_is_continued(train, launch, tmp_path: Path) -> None:
    # Format 1 knew neither skipped steps nor conditions.
    train("run", "train.steps=3", "evaluation.evaluate_frequency=3").ends_with(0)
    path = tmp_path / "run" / "last.pt"
    old = load_checkpoint(path) | {"format": 1}
    del old["skipped"], old["conditions"]
    old["settings"]["train"]["most_skipped_steps"] = old["settings"]["train"].pop("max_skipped_steps")
    torch.save(old | {"digest": content_digest(old)}, path)
    resumed = launch("resumed", "--resume", tmp_path / "run", "train.steps=5")
    out = resumed.ends_with(0, "from step 3")
    assert "stored settings: train.most_skipped_steps is now train.max_skipped_steps\n" in out
    assert load_checkpoint(path)["format"] == checkpoints.FORMAT_VERSION


# D11: signals


def signal_at(main: ModuleType, number: int, place: str, step: int = 2, twice: bool = False) -> None:
    """Send the process a signal in the middle of something."""

    def send() -> None:
        os.kill(os.getpid(), number)
        if twice:
            time.sleep(main.StopRequest._receive.__globals__["ECHO_SECONDS"] + 0.1)
            os.kill(os.getpid(), number)
            time.sleep(30)

    if place == "step":
        at_step(main, step, send)
    if place == "data wait":
        collate, count = collate_samples, 0

        def build(*arguments: Any) -> Any:
            loader = real(*arguments)

            def slow(samples: Any) -> Any:
                nonlocal count
                count += 1
                if count == 2 * step + 1:
                    send()
                return collate(samples)

            loader.collate_fn = slow
            return loader

        real = run_module.build_training_loader
        run_module.build_training_loader = build
    if place == "evaluation":
        run_inference = evaluation.run_inference

        def found(*arguments: Any, **keywords: Any) -> Any:
            send()
            return run_inference(*arguments, **keywords)

        evaluation.run_inference = found
    if place == "save":
        save = CheckpointWriter.save

        def saved(*arguments: Any, **keywords: Any) -> None:
            save(*arguments, **keywords)
            send()  # while the thread writes

        CheckpointWriter.save = saved


@pytest.mark.parametrize(
    ("number", "place"),
    [
        (signal.SIGTERM, "step"),
        *(
            pytest.param(number, place, marks=pytest.mark.faults)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
            for place in ("data wait", "step", "evaluation", "save")
            if (number, place) != (signal.SIGTERM, "step")
        ),
    ],
)
def test_D11_a_signal_anywhere_saves_and_loses_nothing(
    train, launch, whole, tmp_path: Path, number: int, place: str
) -> None:
    fault = functools.partial(signal_at, number=number, place=place)
    run = train("run", "train.save_frequency=3", fault=fault)
    started = time.monotonic()
    code = 143 if number == signal.SIGUSR1 else 128 + number
    line = run.ends_with(code, f"stopped by {signal.Signals(number).name}")
    assert time.monotonic() - started < 10 + 5  # a run of its own has to begin first
    step = load_checkpoint(tmp_path / "run" / "last.pt")["step"]
    assert f"saved after step {step}" in line
    launch("resumed", "--resume", tmp_path / "run", "train.save_frequency=1000").ends_with(0)
    compare_with(whole(), tmp_path / "run")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.faults), signal.SIGINT])
def test_D11_a_second_signal_ends_at_once(train, tmp_path: Path, number: int) -> None:
    run = train("run", fault=functools.partial(signal_at, number=number, place="step", twice=True))
    started = time.monotonic()
    assert run.wait() == -number
    assert time.monotonic() - started < 15


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_D11_ignored_signals_stay_ignored(train, tmp_path: Path, number: int) -> None:
    train("run", fault=functools.partial(ignore_and_send, number=number)).ends_with(0)


def ignore_and_send(main: ModuleType, number: int) -> None:
    signal.signal(number, signal.SIG_IGN)  # as a shell's `&` and nohup do
    signal_at(main, number, "step")


# D12: between best and last


def die_between(main: ModuleType, at: str) -> None:
    """At the first evaluation, when this file has its name and what comes after it not yet.

    last.pt of the step before it is on the disk: another thread writes it, and without it there is no run to resume.
    """
    link_file = checkpoints.link_file

    def link_and_die(path: Path, name: Path) -> None:
        link_file(path, name)
        if name.name == at:
            while not (name.parent / "last.pt").exists():
                time.sleep(0.01)
            die()

    checkpoints.link_file = evaluation.link_file = link_and_die


FILES_OF_BEST = [pytest.param(name, marks=pytest.mark.faults) for name in ("best_detections.json", "best_metrics.json")]


@pytest.mark.parametrize("at", [*FILES_OF_BEST, "best.pt"])
def test_D12_killed_between_best_and_last(train, launch, whole, tmp_path: Path, at: str) -> None:
    assert train("run", fault=functools.partial(die_between, at=at)).wait() == -signal.SIGKILL
    if at == "best.pt":
        best = load_checkpoint(tmp_path / "run" / "best.pt")
        assert best["step"] == 4 == best["progress"]["best_step"] and best["progress"]["best_value"] is not None
    launch("resumed", "--resume", tmp_path / "run").ends_with(0)
    compare_with(whole(), tmp_path / "run")


@pytest.mark.faults
@pytest.mark.parametrize("lost", ["best_metrics.json", "best_detections.json"])
def test_D12_what_best_found_is_found_again_where_its_file_is_lost(launch, whole, tmp_path: Path, lost: str) -> None:
    """The page of a run is about best.pt, of step 4 here: the EMA is off. The last evaluation is that of step 8."""
    shutil.copytree(whole("train.ema_decay=null"), tmp_path / "run")
    found = [
        json.loads((tmp_path / "run" / name).read_text())["step"] for name in ("best_metrics.json", "metrics.json")
    ]
    assert found == [4, 8]
    (tmp_path / "run" / lost).unlink()
    run = launch("resumed", "--resume", tmp_path / "run", report=True)
    run.ends_with(0)
    assert "best.pt is evaluated again for the report" in run.out
    compare_with(whole("train.ema_decay=null"), tmp_path / "run")
    assert "best.pt, the weights after step 4: " in (tmp_path / "run" / "report.html").read_text()


# D13: two runs, clock


def claim(directory: Path, barrier: Any, codes: Any, number: int) -> None:
    barrier.wait()
    try:
        with logging_to(new_run_directory(directory.parent, "x", directory)) as logger:
            logger.line(f"run {number}")
            codes[number] = 1
            barrier.wait()  # hold it until the other one has tried
    except OutputError as error:
        assert "another process writes" in str(error) or "not empty" in str(error), error
        codes[number] = error.exit_code
        barrier.wait()


def test_D13_of_two_runs_into_one_directory_one_is_refused(server: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        barrier, codes = context.Barrier(2, timeout=30), context.Array("i", 2)
        both = [context.Process(target=claim, args=(directory, barrier, codes, number)) for number in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert sorted(codes) == [1, 6], attempt
        assert (directory / "train.log").read_text() in ("run 0\n", "run 1\n")


@pytest.mark.faults
def test_D13_a_run_is_not_continued_while_it_runs(train, launch, tmp_path: Path) -> None:
    run = train("run", "train.steps=100000", "train.save_frequency=1", "data.num_workers=2")
    run.until(lambda: (tmp_path / "run" / "last.pt").exists())
    launch("second", "--resume", tmp_path / "run").ends_with(6, "another process writes to", str(tmp_path / "run"))
    assert run.process.is_alive()
    # A killed one leaves no lock, although its workers live on for some seconds.
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.join()
    steps = load_checkpoint(tmp_path / "run" / "last.pt")["step"] + 2
    launch("third", "--resume", tmp_path / "run", f"train.steps={steps}").ends_with(0)


def clock_goes_back(main: ModuleType) -> None:
    now = time.time()
    at_step(main, 3, lambda: setattr(time, "time", lambda: now - 10**8))


@pytest.mark.faults
def test_D13_a_clock_that_goes_back_changes_nothing(train, whole, tmp_path: Path) -> None:
    train("run", "train.save_minutes=1000", fault=clock_goes_back).ends_with(0)
    compare_with(whole(), tmp_path / "run")


# D15: logs


def test_D15_logs_stay_small(whole, default_settings, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (whole() / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "train/loss" in row)
    step_of_row = row.pop("step")
    printed = max((whole() / "train.log").read_text().splitlines(), key=len)
    every = default_settings().run.log_frequency
    with logging_to(tmp_path / "logs") as logger:
        for number in range(1, 1001):
            if number % every == 0:
                logger.log(step_of_row + number, row)
                logger.line(printed, show=False)
    written = sum(path.stat().st_size for path in (tmp_path / "logs").iterdir() if path.is_file())
    assert 1000 < written * 100 < 50e6  # of 100,000 steps
