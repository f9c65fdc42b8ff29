"""Train under Slurm, submitted from Python; needs submitit (pip install submitit).

python3 clusters/submitit_train.py logs/big --nodes 2 --gpus 8 -- --config recipes/darknet_416.yaml data.root=/data/coco
python3 clusters/submitit_train.py logs/try --cluster local --gpus 0 -- --config recipes/quickstart.yaml

Submits one task per GPU and prints the number of the job; RUN is started or continued (--resume auto). Before the end
of the time and on preemption the run is saved and the job requeued, which continues it. Logs: RUN_submitit/.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
STOPPED = 143  # exit code of yolo-v3/main.py: interrupted and saved
REQUEUE_SECONDS = 600  # until Slurm has ended a job that was stopped from outside


class Training:
    """What each task runs: yolo-v3/main.py as a process of its own, so that its exit code and signals stay its own.

    Args:
        run: run directory.
        words: command line of yolo-v3/main.py besides the run directory.
    """

    def __init__(self, run: str, words: list[str]) -> None:
        self.command = [sys.executable, "yolo-v3/main.py", "--output", run, "--resume", "auto", *words]
        self.pid: int | None = None

    def __call__(self) -> None:
        """Train to the end.

        Raises:
            RuntimeError: the training failed.
        """
        import submitit

        distributed = submitit.helpers.TorchDistributedEnvironment()
        distributed.export(set_cuda_visible_devices=False, overwrite=True)
        if distributed.world_size == 1:  # a single process needs no group
            del os.environ["WORLD_SIZE"]
        # The signal that tells submitit to requeue must not end the training, should Slurm send it there too.
        process = subprocess.Popen(
            self.command, cwd=REPOSITORY, preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        )
        self.pid = process.pid
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        process.returncode = code
        if code == STOPPED:  # the first task is requeueing the job, or Slurm is
            time.sleep(REQUEUE_SECONDS)
        if code != 0:
            raise RuntimeError(f"yolo-v3/main.py ended with exit code {code}, see RUN/train.log")

    def checkpoint(self) -> Any:
        """Save and stop; called by submitit in a signal handler of the first task. All tasks stop together."""
        import submitit

        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):  # it has ended already
                os.waitpid(self.pid, 0)
            self.pid = None
        return submitit.helpers.DelayedSubmission(self)


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Parse this script's options; what follows `--` is kept as it is, for yolo-v3/main.py."""
    own, of_main = words, list[str]()
    if "--" in words:
        own, of_main = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, on a disk that all nodes see")
    add("--nodes", type=int, default=1)
    add("--gpus", type=int, default=8, help="GPUs, and tasks, per node; 0: one task on the CPU")
    add("--cpus", type=int, default=16, help="cores per task")
    add("--minutes", type=int, default=24 * 60, help="time of one job")
    add("--requeues", type=int, default=100, help="how often the end of the time may requeue it")
    add("--partition", help="of Slurm")
    add("--cluster", default="slurm", choices=["slurm", "local"], help="local: on this machine, to try it")
    arguments = parser.parse_args(own)
    arguments.words = of_main
    return arguments


def main() -> None:
    import submitit

    arguments = parse_arguments(sys.argv[1:])
    run = arguments.run.absolute()
    executor = submitit.AutoExecutor(
        folder=f"{run}_submitit", cluster=arguments.cluster, slurm_max_num_timeout=arguments.requeues
    )
    executor.update_parameters(
        name=run.name,
        nodes=arguments.nodes,
        tasks_per_node=max(arguments.gpus, 1),
        gpus_per_node=arguments.gpus,
        cpus_per_task=arguments.cpus,
        timeout_min=arguments.minutes,
        slurm_signal_delay_s=300,
        **({"slurm_partition": arguments.partition} if arguments.partition else {}),
    )
    job = executor.submit(Training(str(run), arguments.words))
    print(f"job {job.job_id}, logs in {run}_submitit")
    if arguments.cluster == "local":
        job.result()


if __name__ == "__main__":
    main()
