"""Started by torchrun in tests: yolo-v3/main.py with all batch-norm layers frozen.

So results do not depend on the number of processes. The first argument is a fault: raise, kill or hang of rank 1 at
step 2, hang_in_evaluation of rank 1, slow_evaluation of rank 0, timed_evaluation (what was measured counts as 2 s where
anything was), or none.
"""

import json
import os
import signal
import sys
import time

import pytest
import torch

from detection.training import clock, console, evaluation, throughput
from tests.support.guards import switch_off
from tests.support.training_runs import load_main


def main() -> None:
    fault = sys.argv.pop(1)
    torch.set_num_threads(1)
    throughput.MATRIX_SIDES["cpu"] = 64  # measured at the end, for seconds
    console.report_run = lambda *_: None  # its pictures take as long as the training
    module = load_main()
    if "FAULTS_GUARD_OFF" in os.environ:
        switch_off(*json.loads(os.environ["FAULTS_GUARD_OFF"]), pytest.MonkeyPatch())
    set_frozen, next_batches = module.set_backbone_frozen, module.Supervisor.next_batches

    def freeze_all(model, frozen, batch_norm="train"):
        set_frozen(model, frozen, batch_norm)
        for part in model.modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                part.eval()

    def faulty_batches(supervisor, count):
        if supervisor.run.ranks.rank == 1 and supervisor.step == 2:
            if fault == "raise":
                raise ValueError("a bug in rank 1")
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hang":
                time.sleep(1000)
        return next_batches(supervisor, count)

    def slow_compute_metrics(*arguments):
        time.sleep(15)
        return compute_metrics(*arguments)

    def hanging_run_inference(*arguments, **keywords):
        if int(os.environ["RANK"]) == 1:
            time.sleep(1000)
        return run_inference(*arguments, **keywords)

    def timed_evaluation(run):
        seconds = measure_evaluation(run)
        print(f"rank {run.ranks.rank} measured {'something' if seconds else 'nothing'}", flush=True)
        return 2.0 if seconds else 0.0

    measure_evaluation = clock.measure_evaluation
    compute_metrics, run_inference = evaluation.compute_metrics, evaluation.run_inference
    if fault == "hang_in_evaluation":
        evaluation.run_inference = hanging_run_inference
    if fault == "timed_evaluation":
        clock.measure_evaluation = timed_evaluation
    if fault == "slow_evaluation":
        evaluation.compute_metrics = slow_compute_metrics
    module.set_backbone_frozen, module.Supervisor.next_batches = freeze_all, faulty_batches
    module.exit_with_message(module.main, module.OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
