"""Everything that training changes, and a checkpoint must hold: a continued run takes the steps this one would have."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from detection.config.settings import TrainSettings
from detection.errors import CheckpointError, NumericsError
from detection.training.moving_average import ExponentialMovingAverage
from detection.training.optimizer import build_optimizer
from detection.training.skipped_steps import BatchNormStatistics, SkippedSteps
from detection.training.throughput import Meter


class RunState:
    """Model, optimizer, EMA and counters after `step` optimizer steps.

    Args:
        model: on its device, in the memory layout it is trained in.
        ema_ramp: `train.ema_ramp` in steps.
        scaler: of the loss, disabled where the precision needs none.
        exchange: see `BatchNormStatistics`.
        images_per_step: of all processes, for the meter.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainSettings,
        ema_ramp: int,
        scaler: torch.amp.GradScaler,
        exchange: Callable[[Tensor], None] | None = None,
        images_per_step: int = 1,
    ) -> None:
        self.model = model.train()
        self.optimizer = build_optimizer(model, train)
        self.scaler = scaler
        self.statistics = BatchNormStatistics(model, exchange)
        self.average = ExponentialMovingAverage(model, train.ema_decay, ema_ramp) if train.ema_decay else None
        self.skipped = SkippedSteps(train.max_skipped_steps, ordinary=scaler.is_enabled())
        self.meter = Meter(images_per_step)
        self.step = 0
        self.best_ap50: float | None = None
        self.best_step = 0
        self.evaluations_without_rise = 0
        self.evaluated_step = 0

    @property
    def evaluated_model(self) -> nn.Module:
        """What is evaluated and what `best.pt` is chosen by: the EMA where there is one."""
        return self.average.model if self.average else self.model

    def record_evaluation(self, ap50: float) -> bool:
        """Note the AP50 of this step; true if it is the best so far. The first one is."""
        rises = self.best_ap50 is None or ap50 > self.best_ap50
        self.evaluated_step = self.step
        self.evaluations_without_rise = 0 if rises else self.evaluations_without_rise + 1
        if rises:
            self.best_ap50, self.best_step = ap50, self.step
        return rises

    def check_scale(self) -> None:
        """Raises:
        NumericsError: fp16's scale has sunk below 1: even unscaled gradients overflow.
        """
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise NumericsError(
                f"step {self.step}: the loss scale has sunk to {self.scaler.get_scale():g}, gradients overflow in "
                "fp16; take run.precision=bf16 or off, or a lower train.learning_rate"
            )

    def content(self) -> dict[str, Any]:
        """For a checkpoint; the tensors are the live ones."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped.state(),
            "meter": self.meter.state(),
            "progress": {
                "best_ap50": self.best_ap50,
                "best_step": self.best_step,
                "evaluations_without_rise": self.evaluations_without_rise,
                "evaluated_step": self.evaluated_step,
            },
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continue where `content` was taken.

        Raises:
            CheckpointError: it is of another network or optimizer.
        """
        try:
            self.model.load_state_dict(checkpoint["model"])
            if self.average:
                self.average.model.load_state_dict(checkpoint["average"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
            device = next(self.model.parameters()).device
            if "skipped" in checkpoint:  # format 1 had no skipped steps
                self.skipped.load(checkpoint["skipped"], device)
            if "meter" in checkpoint:
                self.meter.load(checkpoint["meter"], device)
            self.step = checkpoint["step"]
            for name in ("best_ap50", "best_step", "evaluations_without_rise", "evaluated_step"):
                setattr(self, name, checkpoint["progress"][name])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"the checkpoint does not fit the run of its settings: {reason}") from None
