"""Data-parallel processes of a run: torchrun's environment, the process group, and a few collectives.

Everything but gradients and batch-norm statistics goes over gloo on the host, which does not wait for the device.
"""

import datetime
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import rendezvous

from detection.config.aliases import TORCHRUN_VARIABLES
from detection.errors import SettingsError, UserError

T = TypeVar("T")
EVALUATION_TIMEOUT = datetime.timedelta(days=1)  # one process scores while the others wait
JOIN_TIMEOUT = datetime.timedelta(minutes=1)
MAX_DIFFERENCES, MAX_VALUE_CHARS = 4, 40  # between ranks, in an error
MAX_MESSAGE_CHARS = 200  # of torch's messages, which begin with the cause


class RankError(UserError):
    """Another process of the run has failed or does not respond."""

    exit_code = 3


class Ranks:
    """Rank of this process and the collectives of its run. A single process has no group; its collectives are no-ops.

    Args:
        device: device of this process.
        backend: registers and names the backend of the device: nccl, hccl or gloo; not called for a single process.
        timeout_seconds: the run ends if a process does not respond for that long.

    Raises:
        SettingsError: torchrun's environment is incomplete, or the processes cannot connect.
    """

    def __init__(self, device: torch.device, backend: Callable[[], str], timeout_seconds: float) -> None:
        self.rank, self.local_rank, self.size = read_environment()
        self.local_size = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), self.size)  # on this machine
        self.device, self.timeout_seconds = device, timeout_seconds
        if self.size == 1:
            return
        timeout = datetime.timedelta(seconds=timeout_seconds)
        name = backend()
        try:
            # Processes start together, so one missing after a minute has failed; later they may wait longer.
            joined = min(timeout, JOIN_TIMEOUT)
            store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=joined))
            store.set_timeout(timeout)
            if self.size == self.local_size:
                # After a crash torchrun starts the processes anew but keeps its store, with the addresses of the dead
                # ones. On several machines the counts may differ.
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"attempt_{attempt}", store)
            backends = "gloo" if name == "gloo" else f"cpu:gloo,{device.type}:{name}"
            dist.init_process_group(backends, store=store, rank=self.rank, world_size=self.size, timeout=timeout)
            self._patient: Any = dist.new_group(backend="gloo", timeout=EVALUATION_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
            raise SettingsError(
                f"rank {self.rank}: the {self.size} processes do not find one another: {reason}"
            ) from None

    @property
    def is_first(self) -> bool:
        """Whether this process prints, writes and computes the metrics."""
        return self.rank == 0

    def explain(self, error: RuntimeError, step: int) -> RankError | None:
        """Return the user error behind a failed collective; None for any other error."""
        if self.size == 1 or not is_exchange_failure(error):
            return None
        reason = " ".join(str(error).split())[:MAX_MESSAGE_CHARS]
        return RankError(f"rank {self.rank} of {self.size}, step {step}: another process failed or hangs: {reason}")

    def all_reduce_max_async(self, value: Callable[[], int]) -> Callable[[], int]:
        """Start an all-reduce of a number; the returned function waits and returns the maximum over all ranks.

        Args:
            value: returns the number; called now, but with a single process only when the result is read.
        """
        if self.size == 1:
            return value
        tensor = torch.tensor(value())
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)

        def finish() -> int:
            work.wait()
            return int(tensor)

        return finish

    def average_(self, tensor: Tensor) -> None:
        """Average a tensor over all ranks in place, with the backend of its device."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size

    def average_of(self, values: Tensor) -> Tensor:
        """Average a CPU tensor over all ranks in place, and return it."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def average(self, values: dict[str, float]) -> dict[str, float]:
        """Average numbers over all ranks."""
        tensor = self.average_of(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, tensor.tolist(), strict=True))

    def gather(self, value: T) -> list[T] | None:
        """Collect every rank's value on the first one; None on the others. Waits up to a day."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, gathered, group=self._patient)
        return gathered

    def broadcast(self, value: T | None) -> T:
        """Send the first rank's value to all ranks; waits up to a day."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self._patient)
        return values[0]  # type: ignore[return-value]

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Compare named facts of all ranks; to be called by all.

        Raises:
            SettingsError: in every rank: what differs from the first, and in which ranks.
        """
        gathered = self.gather(dict(facts))
        if different := self.broadcast(None if gathered is None else differences(gathered)):
            raise SettingsError(different)

    def close(self) -> None:
        """Destroy the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def differences(facts: Sequence[Mapping[str, Any]]) -> str:
    """Say in a line how the facts of each rank differ from those of the first; empty: they do not."""
    parts = []
    for rank, found in enumerate(facts[1:], start=1):
        names = [name for name in {**facts[0], **found} if found.get(name) != facts[0].get(name)]
        values = [f"{name} is {_cut(found.get(name))}, not {_cut(facts[0].get(name))}" for name in names]
        more = f" and {len(names) - MAX_DIFFERENCES} more" if len(names) > MAX_DIFFERENCES else ""
        if values:
            parts.append(f"rank {rank} differs from rank 0: {'; '.join(values[:MAX_DIFFERENCES])}{more}")
    more = f"; {len(parts) - MAX_DIFFERENCES} more ranks differ" if len(parts) > MAX_DIFFERENCES else ""
    return "; ".join(parts[:MAX_DIFFERENCES]) + more


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."


def read_environment() -> tuple[int, int, int]:
    """Read (rank, local rank, number of processes) from torchrun's environment; (0, 0, 1) without torchrun.

    Raises:
        SettingsError: the environment is incomplete or inconsistent.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 0, 1
    if missing := [name for name in TORCHRUN_VARIABLES if not os.environ.get(name)]:
        raise SettingsError(
            f"WORLD_SIZE is set, but {', '.join(missing)} is not; start several processes with torchrun"
        )
    try:
        rank, local_rank, size = (int(os.environ[name]) for name in TORCHRUN_VARIABLES[:3])
    except ValueError as error:
        raise SettingsError(f"{', '.join(TORCHRUN_VARIABLES[:3])} must be whole numbers: {error}") from None
    if not 0 <= rank < size:
        raise SettingsError(f"RANK={rank} must lie in 0..{size - 1} (WORLD_SIZE={size})")
    return rank, local_rank, size


def device_of_rank(name: str, local_rank: int, size: int) -> str:
    """Return the device setting of this process: each takes its own GPU.

    Raises:
        SettingsError: one CUDA device is named for several processes, or there are more processes than GPUs.
    """
    if size == 1:
        return name
    if name.startswith("cuda:"):
        raise SettingsError(f"{size} processes cannot share device {name}; use --device cuda, each takes its own")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name not in ("auto", "cuda") or not gpus:
        return name
    if local_rank >= gpus:
        raise SettingsError(
            f"process {local_rank} of this machine has no GPU: there are {gpus}; lower --nproc_per_node"
        )
    return f"cuda:{local_rank}"


def is_exchange_failure(error: Exception) -> bool:
    """Whether an exception comes from a collective, not from the computation."""
    text = str(error).lower()
    words = ("connection closed", "connection reset", "timed out", "timeout", "gloo", "nccl", "hccl", "process group")
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Convert the batch-norm layers of a model to `SyncBatchNorm`.

    Raises:
        SettingsError: the device, or a batch-norm layer, does not support it.
    """
    if device.type != "cuda":
        raise SettingsError(f"train.sync_batch_norm needs CUDA devices, this is {device.type}")
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    if others := sorted(kind.__name__ for kind in kinds - {nn.BatchNorm2d, nn.SyncBatchNorm}):
        raise SettingsError(
            f"train.sync_batch_norm: {', '.join(others)} cannot be synchronised (model.batch_norm=standard)"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


class Watchdog:
    """Terminates this process if the training loop makes no progress within the timeout of its ranks.

    A rank that waits in a collective for a hanging one cannot be stopped from Python. A single process is not watched:
    no other process waits for it.

    Args:
        ranks: of the run, with the timeout.
        step: returns the current step, for the message.
    """

    def __init__(self, ranks: Ranks, step: Callable[[], int]) -> None:
        self._last: float | None = None  # None: paused
        if ranks.size > 1:
            threading.Thread(target=self._watch, args=(ranks, step), name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Report progress: the timeout starts anew."""
        self._last = time.monotonic()

    def rest(self) -> None:
        """Pause until the next `beat`."""
        self._last = None

    def _watch(self, ranks: Ranks, step: Callable[[], int]) -> None:
        while True:
            time.sleep(min(ranks.timeout_seconds / 10, 1.0))
            last = self._last
            if last is not None and time.monotonic() - last > ranks.timeout_seconds:
                place = f"rank {ranks.rank} of {ranks.size}, step {step()}"
                os.write(2, f"{place}: no progress for {ranks.timeout_seconds:g} s (run.timeout_minutes)\n".encode())
                os._exit(RankError.exit_code)
