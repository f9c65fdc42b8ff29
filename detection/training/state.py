"""State of a training run: everything that training changes and a checkpoint restores exactly."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detection.config.settings import TrainSettings
from detection.contract import Batch
from detection.errors import CheckpointError, NumericsError
from detection.training.moving_average import ExponentialMovingAverage, MeanOfCycles
from detection.training.optimizer import build_optimizer
from detection.training.skipped_steps import BatchNormStatistics, SkippedSteps, StepResult
from detection.training.throughput import Meter


class RunState:
    """Model, optimizer, EMA and counters after `step` optimizer steps.

    Args:
        model: model on its device, in its memory format for training.
        train: settings of optimizer, EMA and skipped steps.
        ema: decay and ramp of the EMA, see `ExponentialMovingAverage`; None: there is none.
        scaler: gradient scaler, disabled if the precision needs none.
        exchange: see `BatchNormStatistics`.
        images_per_step: number of images of all processes, for the meter.
        swa: start and length of the cycles whose ends are averaged, see `MeanOfCycles`; None: there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainSettings,
        ema: tuple[float, int | None] | None,
        scaler: torch.amp.GradScaler,
        exchange: Callable[[Tensor], None] | None = None,
        images_per_step: int = 1,
        swa: tuple[int, int] | None = None,
    ) -> None:
        self.model = model.train()
        self.optimizer = build_optimizer(model, train)
        self.scaler = scaler
        self.statistics = BatchNormStatistics(model, exchange)
        self.ema = ExponentialMovingAverage(model, *ema) if ema else None
        self.swa = MeanOfCycles(model, *swa) if swa else None
        self.skipped = SkippedSteps(train.max_skipped_steps, ordinary=scaler.is_enabled())
        self.meter = Meter(images_per_step)
        self.step = 0
        self.best_value: float | None = None  # of `evaluation.best_metric`
        self.best_step = 0
        self.evaluations_without_rise = 0
        self.evaluated_step = 0

    @property
    def evaluated_model(self) -> nn.Module:
        """The model to evaluate: the EMA if there is one."""
        return self.ema.model if self.ema else self.model

    def record(self, result: StepResult, micro_batches: Sequence[Batch]) -> None:
        """Update the EMA and the counters after an optimizer step, without waiting for the device."""
        if self.ema:
            self.ema.update(self.model, self.step, result.finite)
        if self.swa:
            self.swa.update(self.model, self.step)
        self.skipped.add(self.step, result)
        self.meter.add(result, micro_batches)
        self.step += 1

    def record_evaluation(self, value: float) -> bool:
        """Record the value of `evaluation.best_metric` after this step.

        Returns:
            Whether it is the highest so far; true for the first, false for a tie.
        """
        rises = self.best_value is None or value > self.best_value
        self.evaluated_step = self.step
        self.evaluations_without_rise = 0 if rises else self.evaluations_without_rise + 1
        if rises:
            self.best_value, self.best_step = value, self.step
        return rises

    def check_scale(self) -> None:
        """Check the gradient scaler of fp16.

        Raises:
            NumericsError: its scale has fallen below 1, so even unscaled gradients overflow.
        """
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise NumericsError(
                f"step {self.step}: the loss scale has fallen to {self.scaler.get_scale():g}, gradients overflow in "
                "fp16; use run.precision=bf16 or off, or a lower train.learning_rate"
            )

    def content(self) -> dict[str, Any]:
        """Return the state for a checkpoint; tensors are not copied."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.ema.model.state_dict() if self.ema else None,
            **({"swa": {"model": self.swa.model.state_dict(), "count": self.swa.count}} if self.swa else {}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped.state(),
            "meter": self.meter.state(),
            "progress": {
                "best_value": self.best_value,
                "best_step": self.best_step,
                "evaluations_without_rise": self.evaluations_without_rise,
                "evaluated_step": self.evaluated_step,
            },
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state that `content` returned.

        Raises:
            CheckpointError: the network or optimizer differs, or the state of an fp16 gradient scaler is missing.
        """
        # A run resumed in fp16 from another precision (--accept-changes) starts with a new scale.
        was_fp16 = checkpoint.get("conditions", {}).get("precision", "float16") == "float16"
        if self.scaler.is_enabled() and was_fp16 and not checkpoint.get("scaler"):
            raise CheckpointError("the checkpoint has no state of the gradient scaler, which a run in fp16 needs")
        try:
            self.model.load_state_dict(checkpoint["model"])
            if self.ema:
                self.ema.model.load_state_dict(checkpoint["average"])
            if self.swa:
                self.swa.model.load_state_dict(checkpoint["swa"]["model"])
                self.swa.count = checkpoint["swa"]["count"]
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
            device = next(self.model.parameters()).device
            if "skipped" in checkpoint:  # format 1 had no skipped steps
                self.skipped.load(checkpoint["skipped"], device)
            if "meter" in checkpoint:
                self.meter.load(checkpoint["meter"], device)
            self.step = checkpoint["step"]
            progress = checkpoint["progress"]
            self.best_value = progress["best_ap50" if "best_ap50" in progress else "best_value"]  # the older name
            for name in ("best_step", "evaluations_without_rise", "evaluated_step"):
                setattr(self, name, progress[name])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"the checkpoint does not fit the run of its settings: {reason}") from None
