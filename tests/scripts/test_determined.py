"""determined/trial.py with a stand-in for Determined's context, against the steps of yolo-v3/main.py."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from detection.errors import NumericsError, SettingsError
from detection.training.automatic import load_run_settings
from detection.training.optimizer import set_learning_rates
from detection.training.run import Run, join_ranks
from detection.training.step import train_step
from tests.support.paths import REPOSITORY

FOLDER = REPOSITORY / "determined"
SUBDIVISIONS = 2


class Context:
    """What a trial sees of Determined: one process on the CPU, with gradients averaged over a step's batches."""

    def __init__(self, hparams: dict[str, Any], initial_batch: int = 0) -> None:
        self.hparams, self.initial_batch = hparams, initial_batch
        self.device = torch.device("cpu")
        self.batch = initial_batch
        self.switched_off: list[str] = []
        self.distributed = SimpleNamespace(
            get_rank=lambda: 0, get_size=lambda: 1, get_local_rank=lambda: 0, get_local_size=lambda: 1,
            broadcast=lambda value: value,
        )  # fmt: skip
        self.experimental = SimpleNamespace(
            disable_dataset_reproducibility_checks=lambda: self.switched_off.append("checks"),
            disable_auto_to_device=lambda: self.switched_off.append("to device"),
        )

    def get_hparams(self) -> dict[str, Any]:
        return self.hparams

    def get_per_slot_batch_size(self) -> int:
        return int(self.hparams["global_batch_size"])

    def get_initial_batch(self) -> int:
        return self.initial_batch

    def wrap_model(self, model: Any) -> Any:
        return model

    def wrap_optimizer(self, optimizer: Any) -> Any:
        return optimizer

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step_optimizer(self, optimizer: Any, clip_grads: Callable[[Any], None]) -> None:
        self.batch += 1
        if self.batch % SUBDIVISIONS:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= SUBDIVISIONS
        clip_grads(parameters)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Any:
    """determined/trial.py as a module, with a stand-in for the package."""
    package, pytorch = ModuleType("determined"), ModuleType("determined.pytorch")
    vars(pytorch).update(PyTorchTrial=object, PyTorchCallback=object)
    vars(package).update(pytorch=pytorch)
    monkeypatch.setitem(sys.modules, "determined", package)
    monkeypatch.setitem(sys.modules, "determined.pytorch", pytorch)
    spec = importlib.util.spec_from_file_location("determined_trial", FOLDER / "trial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hparams(drawn_dataset: Path) -> dict[str, Any]:
    return {
        "global_batch_size": 3,
        "overlays": ["recipes/own_data.yaml"],
        "run": {"device": "cpu", "precision": "off", "preflight": False},
        "data": {"root": str(drawn_dataset), "num_workers": 0},
        "model": {"backbone": "mobilenet_v3_small", "pretrained": False, "detector": "yolo"},
        "yolo": {"neck_channels": [8, 8, 8], "loss": "darknet"},
        "train": {
            "steps": 6, "subdivisions": SUBDIVISIONS, "image_size": 64, "resize_frequency": 0, "ema_decay": 0.9,
            "ema_ramp": 2, "clip_norm": 1.0, "learning_rate": 1e-3, "optimizer": "sgd",
        },
        "scheduler": {"strategy": "constant", "warmup": 2},
        "evaluation": {"image_size": 64},
    }  # fmt: skip


def test_a_trial_takes_the_steps_of_main(trial: Any, hparams: dict[str, Any]) -> None:
    """Two steps of two micro-batches: the weights of `train_step`, EMA included; then an evaluation and a restart."""
    context = Context(hparams)
    made = trial.YOLOv3Trial(context)
    assert context.switched_off == ["checks", "to device"]
    batches = list(made.build_training_data_loader())
    assert len(batches) == 6 * SUBDIVISIONS and made.get_batch_length(batches[0]) == 3
    for number, batch in enumerate(batches[:4]):
        metrics = made.train_batch(batch, 0, number)
        assert set(metrics) == {"loss", "loss_box", "loss_objectness", "loss_class"}

    run = Run(made.run.settings, join_ranks(made.run.settings), fresh=True)
    state = run.new_state()
    for step in range(2):
        set_learning_rates(state.optimizer, run.schedule.at, step)
        run.set_progress(step)
        pair = batches[2 * step : 2 * step + 2]
        train = run.settings.train
        result = train_step(
            state.model, run.criterion, state.optimizer, state.scaler, pair, run.autocast, run.device, train.clip_norm
        )
        state.record(result, pair)
    assert state.ema is not None
    for own, main in ((made.run.detector.model, state.model), (made.average.model, state.ema.model)):
        for (name, value), expected in zip(own.state_dict().items(), main.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)

    found = made.evaluate_full_dataset(made.build_validation_data_loader())
    assert {"AP", "AP50", "validation_loss"} <= set(found) and all(isinstance(value, float) for value in found.values())

    [callback] = made.build_callbacks().values()
    again = trial.YOLOv3Trial(Context(hparams, initial_batch=4))
    [restored] = again.build_callbacks().values()
    restored.load_state_dict(callback.state_dict())
    first = next(iter(made.average.model.state_dict()))
    assert torch.equal(again.average.model.state_dict()[first], made.average.model.state_dict()[first])
    rest = list(again.build_training_data_loader())
    assert len(rest) == 8 and all(
        torch.equal(one["images"], other["images"]) for one, other in zip(rest, batches[4:], strict=True)
    )


def test_a_non_finite_loss_ends_a_trial(trial: Any, hparams: dict[str, Any]) -> None:
    made = trial.YOLOv3Trial(Context(hparams))
    with torch.no_grad():
        next(made.run.detector.model.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match="step 0: the loss is non-finite"):
        made.train_batch(next(iter(made.build_training_data_loader())), 0, 0)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("train", "unfreeze_step", 5), ("run", "precision", "fp16"), ("train", "swa_cycles", 2)],
)
def test_what_has_no_counterpart_is_refused(
    trial: Any, hparams: dict[str, Any], section: str, name: str, value: Any
) -> None:
    hparams[section][name] = value
    with pytest.raises(SettingsError, match=f"{section}.{name}"):
        trial.settings_of(hparams, 2)


@pytest.mark.parametrize("name", ["const", "distributed", "search"])
def test_experiments(trial: Any, name: str) -> None:
    """Their hyperparameters are valid settings, their lengths agree, and the metric is one that is reported."""
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    hparams = trial.local_hparams(config["hyperparameters"])
    slots = config["resources"]["slots_per_trial"]
    given = {key: value for key, value in hparams.items() if key not in trial.OWN}
    words = [f"{path}={trial.json.dumps(value)}" for path, value in trial.flatten(given)]
    overlays = [REPOSITORY / overlay for overlay in hparams["overlays"]]
    settings, _ = load_run_settings(
        overlays, [*words, f"train.batch_size={hparams['global_batch_size'] // slots}"], tolerant=True, fit=False
    )
    assert settings.train.steps == config["data"]["steps"] and settings.train.unfreeze_step == 0
    assert slots * settings.train.micro_batch * settings.train.subdivisions == 64
    assert config["searcher"]["metric"] == "AP50" and config["searcher"]["smaller_is_better"] is False
    assert config["entrypoint"].split()[-1] == "determined/trial.py" and (REPOSITORY / "determined/trial.py").is_file()
    if name == "search":
        assert config["searcher"]["max_time"] == config["data"]["steps"] * settings.train.subdivisions
        assert settings.train.learning_rate == pytest.approx(1e-4)
