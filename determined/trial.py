"""YOLOv3 as a trial of Determined (README.md here says how the project stands); needs determined and a cluster.

det experiment create determined/const.yaml .          one trial; distributed.yaml: 8 GPUs; search.yaml: a search
python3 determined/trial.py determined/const.yaml      on this machine, without a cluster: 2 steps and an evaluation

Datasets, network, loss, schedule and metric are those of yolo-v3/main.py, from the same builders. Settings are the
hyperparameters: nested as in yolo-v3/args.yaml, besides `overlays`, a list of recipes, and Determined's own
`global_batch_size`: images of one micro-batch of all GPUs. Determined writes checkpoints and metrics, in its own form.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from detection.config.settings import Settings
from detection.contract import Batch
from detection.data.loaders import batch_to_device, build_evaluation_loader, build_training_loader
from detection.data.workers import prepare_process
from detection.errors import NumericsError, SettingsError
from detection.evaluation.evaluate import compute_metrics, run_inference
from detection.training.automatic import load_run_settings
from detection.training.moving_average import ExponentialMovingAverage
from detection.training.optimizer import build_optimizer, set_learning_rates
from detection.training.run import Run
from detection.training.step import clip_each
from determined import pytorch

REPOSITORY = Path(__file__).resolve().parents[1]
OWN = ("overlays", "global_batch_size")  # hyperparameters that are no settings


class TrialRanks:
    """What `Run` asks of the processes, answered by Determined's context."""

    def __init__(self, context: Any) -> None:
        self.device = context.device
        self.rank, self.size = context.distributed.get_rank(), context.distributed.get_size()
        self.local_rank, self.local_size = context.distributed.get_local_rank(), context.distributed.get_local_size()
        self.is_first = self.rank == 0
        self.broadcast = context.distributed.broadcast


class AverageInCheckpoint(pytorch.PyTorchCallback):
    """Keeps the EMA in Determined's checkpoints."""

    def __init__(self, average: ExponentialMovingAverage) -> None:
        self.average = average

    def state_dict(self) -> dict[str, Any]:
        return dict(self.average.model.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.model.load_state_dict(state)


class YOLOv3Trial(pytorch.PyTorchTrial):
    """One training; `train.subdivisions` micro-batches, Determined's batches, make one optimizer step.

    Raises:
        SettingsError: a setting is invalid, or has no counterpart in Determined.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        settings = settings_of(context.get_hparams(), context.get_per_slot_batch_size())
        ranks: Any = TrialRanks(context)
        self.run = Run(settings, ranks, fresh=True)
        self.subdivisions = settings.train.subdivisions
        detector = self.run.detector
        self.optimizer = context.wrap_optimizer(build_optimizer(detector.model, settings.train))
        self.model = context.wrap_model(detector.model)
        self.average = ExponentialMovingAverage(detector.model, *self.run.ema) if self.run.ema else None
        # Images of a batch follow from its number, so a restored trial needs no batches skipped.
        context.experimental.disable_dataset_reproducibility_checks()
        context.experimental.disable_auto_to_device()

    def build_training_data_loader(self) -> DataLoader:
        first = self.context.get_initial_batch() // self.subdivisions
        sampler = self.run.new_sampler(first, max(self.run.steps, first + 1))
        return build_training_loader(
            self.run.training_set, sampler, self.run.settings.data.num_workers, self.run.device
        )

    def build_validation_data_loader(self) -> DataLoader:
        settings = self.run.settings
        batch_size = settings.evaluation.batch_size or settings.train.micro_batch
        return build_evaluation_loader(self.run.validation_set, batch_size, settings.data.num_workers, self.run.device)

    def build_callbacks(self) -> dict[str, Any]:
        return {"average": AverageInCheckpoint(self.average)} if self.average else {}

    def get_batch_length(self, batch: Batch) -> int:
        return len(batch["images"])

    def train_batch(self, batch: Batch, epoch_idx: int, batch_idx: int) -> dict[str, torch.Tensor]:
        """Train on one micro-batch; the last one of a step updates the weights.

        Raises:
            NumericsError: the loss is non-finite.
        """
        run, step = self.run, batch_idx // self.subdivisions
        if batch_idx % self.subdivisions == 0:
            set_learning_rates(self.optimizer, run.schedule.at, step)
            run.set_progress(step)
        images, targets = batch_to_device(batch, run.device)
        with run.autocast():
            losses = run.criterion(self.model(images), targets)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise NumericsError(f"step {step}: the loss is non-finite: {losses}")
        self.context.backward(loss)
        self.context.step_optimizer(self.optimizer, self.clip)  # does nothing before the last micro-batch of a step
        if self.average and (batch_idx + 1) % self.subdivisions == 0:
            self.average.update(run.detector.model, step)
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

    def clip(self, parameters: Iterator[nn.Parameter]) -> None:
        """Limit the gradient, as `train.clip_tensor_norm` and `train.clip_norm` say."""
        train, weights = self.run.settings.train, list(parameters)
        if train.clip_tensor_norm is not None:
            clip_each([weight.grad for weight in weights if weight.grad is not None], train.clip_tensor_norm)
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(weights, train.clip_norm)

    def evaluate_full_dataset(self, data_loader: DataLoader) -> dict[str, float]:
        """Compute the COCO metrics and losses of the whole validation set, of the EMA if there is one."""
        run = self.run
        model = self.average.model if self.average else run.detector.model
        share = run_inference(model, run.criterion, run.detector.postprocess, data_loader, run.device, run.autocast)
        found = compute_metrics([share], run.validation_set.annotations, run.settings.evaluation.backend)
        metrics = {name: value for name, value in found.metrics.items() if value is not None}
        return {**metrics, "validation_loss": sum(found.losses.values())}


def settings_of(hparams: Mapping[str, Any], batch_size: int) -> Settings:
    """Read the settings of a trial.

    Args:
        hparams: hyperparameters; see the top of this file.
        batch_size: images per micro-batch and process.

    Raises:
        SettingsError: a setting is invalid, or has no counterpart in Determined.
    """
    overlays = [REPOSITORY / name for name in hparams.get("overlays", ())]
    given = {name: value for name, value in hparams.items() if name not in OWN}
    words = [f"{path}={json.dumps(value)}" for path, value in flatten(given)]
    settings, _ = load_run_settings(overlays, [*words, f"train.batch_size={batch_size}"])
    if settings.train.unfreeze_step not in (0, "0ep"):
        raise SettingsError(
            "train.unfreeze_step: a trial of Determined trains the whole network from the start; take 0"
        )
    if settings.run.precision == "fp16":
        raise SettingsError("run.precision=fp16: a trial of Determined has no gradient scaler; take bf16 or off")
    if settings.train.swa_cycles:
        raise SettingsError("train.swa_cycles: a trial of Determined has no SWA; take 0")
    return settings


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of nested hyperparameters; lists are values."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def main() -> None:
    import yaml

    from determined import get_cluster_info

    prepare_process()
    info = get_cluster_info()
    if info is not None:
        config, hparams = info.trial._config, info.trial.hparams
    elif len(sys.argv) == 2:
        config = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
        hparams = local_hparams(config["hyperparameters"])
    else:
        sys.exit("usage: python3 determined/trial.py EXPERIMENT.yaml, or as entrypoint of an experiment")
    data = config["data"]
    subdivisions = hparams.get("train", {}).get("subdivisions", 1)
    with pytorch.init(hparams=hparams, exp_conf=config, aggregation_frequency=subdivisions) as context:
        pytorch.Trainer(YOLOv3Trial(context), context).fit(
            max_length=pytorch.Batch(data["steps"] * subdivisions if info else 2 * subdivisions),
            validation_period=pytorch.Batch(data["evaluate_every"] * subdivisions if info else 2 * subdivisions),
            checkpoint_period=pytorch.Batch(data["save_every"] * subdivisions if info else 2 * subdivisions),
            latest_checkpoint=info.latest_checkpoint if info else None,
        )


def local_hparams(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Take one value of each searched hyperparameter."""
    taken: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            taken[name] = first_value(value) if "type" in value else local_hparams(value)
        else:
            taken[name] = value
    return taken


def first_value(searched: Mapping[str, Any]) -> Any:
    """Return the first of the values, or the lower end of the range, of a searched hyperparameter."""
    if searched["type"] == "categorical":
        return searched["vals"][0]
    if searched["type"] == "const":
        return searched["val"]
    low = searched["minval"]
    return float(searched.get("base", 10)) ** low if searched["type"] == "log" else low


if __name__ == "__main__":
    main()
