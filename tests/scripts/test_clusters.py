"""The examples in clusters/: what they start is what yolo-v3/main.py understands, and signals and exit codes arrive."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from detection.config.command_line import DEFAULTS
from detection.config.loading import load_settings
from detection.data.sampler import TrainingBatchSampler
from tests.support import processes
from tests.support.fault_runs import make_dataset
from tests.support.paths import MAIN, REPOSITORY
from tests.support.training_runs import load_main

CLUSTERS = REPOSITORY / "clusters"
WORDS = ["--config", str(REPOSITORY / "recipes" / "darknet_416.yaml"), "data.root=/data/my coco", "train.batch_size=4"]
# Stands for srun, scontrol and python3: records its command line, one JSON list per line.
STUB = """#!{python}
import json, os, signal, subprocess, sys, time
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR".split()
environment = {{key: os.environ.get(key) for key in names}}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([name, words, environment]) + "\\n")
if name == "scontrol" and words[0] == "show":
    print("node7\\nnode8")
if name == "srun":
    task = dict(os.environ, SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_NTASKS="4", SLURM_NNODES="2")
    sys.exit(subprocess.run([word for word in words if not word.startswith("--kill")], env=task).returncode)
if name == "python3" and os.environ.get("WAITS"):
    def stop(*_):
        with open(os.environ["WAITS"], "w") as file:
            file.write('{{"status": "stopped"}}\\n')
        sys.exit(1)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(60)
sys.exit(int(os.environ.get("CODE", "0")) if name == "python3" else 0)
"""


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """Environment with the stubs first on PATH; RECORD names what they write."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "scontrol", "python3"):
        stub = tmp_path / "bin" / name
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "RECORD": str(tmp_path / "record")}


def recorded(environment: dict[str, str]) -> list[Any]:
    return [json.loads(line) for line in Path(environment["RECORD"]).read_text().splitlines()]


def understood(words: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parse words as yolo-v3/main.py does; the settings must be valid."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    arguments = load_main().parse_arguments()
    configs = [path if path.is_absolute() else REPOSITORY / path for path in arguments.config]
    load_settings(DEFAULTS, configs, arguments.settings)
    return arguments


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_scripts_are_executable_bash(name: str) -> None:
    assert os.access(CLUSTERS / name, os.X_OK)
    assert subprocess.run(["bash", "-n", CLUSTERS / name], check=False).returncode == 0


# Slurm


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (143, True), (4, False)])
def test_slurm(
    stubs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, requeued: bool
) -> None:
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "CODE": str(code)}
    done = subprocess.run(["bash", CLUSTERS / "slurm.sh", *WORDS], env={**stubs, **job}, cwd=tmp_path, check=False)
    calls = recorded(stubs)
    assert done.returncode == code
    assert [call[:2] for call in calls if call[1][0] == "requeue"] == [["scontrol", ["requeue", "123456"]]] * requeued
    _, words, environment = next(call for call in calls if call[0] == "python3")
    assert words[0] == "yolo-v3/main.py"
    arguments = understood(words[1:], tmp_path, monkeypatch)
    assert (arguments.output, arguments.resume) == (Path("logs/slurm_123456"), None)  # auto: nothing there yet
    assert arguments.settings == WORDS[2:]
    assert environment == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node7"
    }  # fmt: skip


def test_slurm_asks_for_its_signal_and_for_requeueing() -> None:
    options = re.findall(r"^#SBATCH (--\S+)", (CLUSTERS / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=USR1@300"} <= set(options)  # no B: the tasks get it


# torchrun


def test_torchrun(stubs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bash", CLUSTERS / "torchrun.sh", tmp_path / "a run", "--nproc_per_node=8", "--", *WORDS]
    for code in (0, 1):
        done = subprocess.run(command, env={**stubs, "CODE": str(code)}, check=False)
        assert done.returncode == code
    (name, words, _), _ = recorded(stubs)
    started = ["-m", "torch.distributed.run", "--max-restarts=3", "--nproc_per_node=8", str(MAIN)]
    assert (name, words[:5]) == ("python3", started)
    arguments = understood(words[5:], tmp_path, monkeypatch)
    assert arguments.output == tmp_path / "a run" and arguments.settings == WORDS[2:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_torchrun_and_the_exit_code_says_interrupted(
    stubs: dict[str, str], tmp_path: Path, number: int
) -> None:
    environment = {**stubs, "WAITS": str(tmp_path / "status.json")}
    command = ["bash", str(CLUSTERS / "torchrun.sh"), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(30) == 143


@pytest.mark.slow
def test_real_torchrun_restarts_after_a_crash(tmp_path: Path) -> None:
    """One of two processes is killed after the first checkpoint; torchrun starts both again, which end the run."""
    make_dataset(tmp_path / "data", 12, sizes=((64, 90), (100, 60)))
    overlay = {**processes.OVERLAY, "train": {**processes.OVERLAY["train"], "save_frequency": 1, "steps": 40}}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    run = tmp_path / "run"
    launcher = tmp_path / "python3"
    launcher.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    launcher.chmod(0o755)
    options = ["--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={processes.free_port()}"]
    words = ["--config", tmp_path / "overlay.yaml", f"data.root={tmp_path / 'data'}", "train.batch_size=2"]
    with subprocess.Popen(
        ["bash", CLUSTERS / "torchrun.sh", run, *options, "--", *words],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 200
        while not (run / "last.pt").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.kill(json.loads((run / "status.json").read_text())["pid"], signal.SIGKILL)
        out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, out
    assert "--resume auto" in out and json.loads((run / "status.json").read_text())["status"] == "finished", out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 41))


# SkyPilot and Kubeflow


def test_skypilot(stubs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    assert task["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"
    places = {"SKYPILOT_TASK_ID": "sky-1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    counts = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    (tmp_path / "clusters").symlink_to(CLUSTERS)  # the task puts .venv of its directory before the stubs
    subprocess.run(["bash", "-c", task["run"]], env={**stubs, **places, **counts}, cwd=tmp_path, check=True)
    [(name, words, _)] = recorded(stubs)
    assert name == "python3" and {"--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1"} <= set(words)
    script = next(number for number, word in enumerate(words) if word.endswith("yolo-v3/main.py"))
    assert understood(words[script + 1 :], tmp_path, monkeypatch).output == Path("/runs/sky-1")


def test_kubeflow(stubs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, job = yaml.safe_load_all((CLUSTERS / "kubeflow.yaml").read_text())
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert runtime["apiVersion"] == job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    [group] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = group["template"]["spec"]["template"]["spec"]
    assert group["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert pod["terminationGracePeriodSeconds"] > 30 and pod["securityContext"]["runAsNonRoot"] is True
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    trainer = job["spec"]["trainer"]
    subprocess.run([*trainer["command"], *trainer["args"]], env=stubs, cwd=REPOSITORY, check=True)
    [(_, words, _)] = recorded(stubs)
    script = next(number for number, word in enumerate(words) if word.endswith("yolo-v3/main.py"))
    assert understood(words[script + 1 :], tmp_path, monkeypatch).output == Path("/runs/big")


# submitit


@pytest.fixture
def submitit_train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with a stand-in for submitit."""
    spec = importlib.util.spec_from_file_location("submitit_train", CLUSTERS / "submitit_train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    distributed = SimpleNamespace(world_size=2, export=lambda **_: None)
    helpers = SimpleNamespace(
        TorchDistributedEnvironment=lambda: distributed, DelayedSubmission=lambda task: ("again", task)
    )
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(helpers=helpers))
    monkeypatch.setattr(module, "REQUEUE_SECONDS", 0)
    return module


def test_submitit_starts_what_main_understands(
    submitit_train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = submitit_train.Training(str(tmp_path / "run"), WORDS)
    assert training.command[:2] == [sys.executable, "yolo-v3/main.py"]
    arguments = understood(training.command[2:], tmp_path, monkeypatch)
    assert arguments.output == tmp_path / "run" and arguments.settings == WORDS[2:]


@pytest.mark.parametrize("code", [0, 4, 143])
def test_a_task_of_submitit_fails_as_its_training_does(submitit_train: Any, code: int) -> None:
    training = submitit_train.Training("run", [])
    training.command = [sys.executable, "-c", f"raise SystemExit({code})"]
    if code == 0:
        training()
    else:
        with pytest.raises(RuntimeError, match=f"exit code {code}"):
            training()


def test_submitit_saves_before_it_requeues(submitit_train: Any, tmp_path: Path) -> None:
    """As submitit does: its handler of SIGUSR2 calls `checkpoint` while the task waits for the training."""
    training = submitit_train.Training("run", [])
    program = (
        "import signal, sys, time; open(sys.argv[1] + '/ready', 'w').close()\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1] + '/saved', 'w').close(), sys.exit(143)))\n"
        "import os; os.kill(os.getppid(), signal.SIGUSR2); time.sleep(60)"
    )
    training.command = [sys.executable, "-c", program, str(tmp_path)]
    answers: list[Any] = []

    def handler(*_: Any) -> None:
        answers.append(training.checkpoint())
        raise SystemExit(255)  # submitit's `_exit`

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(SystemExit):
            training()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert answers == [("again", training)] and (tmp_path / "saved").exists()


def test_submitit_itself_pickles_and_runs_the_task(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    words = ["--cluster", "local", "--gpus", "0", "--cpus", "1", "--minutes", "5", "--", "train.steps=no"]
    command = [sys.executable, CLUSTERS / "submitit_train.py", tmp_path / "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 1 and "exit code 2" in done.stderr, done.stderr  # main.py refused the setting
    assert any("train.steps" in file.read_text() for file in (tmp_path / "run_submitit").glob("*.err"))


# What docs/clusters.md says about another number of processes


def test_the_same_product_gives_the_same_micro_batches_on_half_the_processes() -> None:
    def micro_batches(ranks: int, subdivisions: int) -> list[Any]:
        """Of steps 3 and 4, all processes, in the order of the stream of images."""
        samplers = [
            TrainingBatchSampler(50, 4, subdivisions, (3, 5), 7, 64, 2, (64, 128), rank=rank, ranks=ranks)
            for rank in range(ranks)
        ]
        return [batch for together in zip(*samplers, strict=True) for batch in together]

    assert micro_batches(8, 1) == micro_batches(4, 2) == micro_batches(1, 8)
    assert micro_batches(4, 1) != micro_batches(8, 1)[:8]
