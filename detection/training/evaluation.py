"""Evaluation during training: evaluate the validation set, log the metrics, keep the best checkpoint.

The result files of the evaluation that gave best.pt lie beside it, linked before it is written.
"""

import json
from pathlib import Path
from typing import Protocol

from torch import nn
from torch.utils.data import DataLoader

from detection.checkpoints import DETECTOR_FIELDS, link_file, load_fields
from detection.config.settings import Settings
from detection.contract import Detector
from detection.data.build import DetectionDataset
from detection.data.loaders import build_evaluation_loader
from detection.evaluation.evaluate import Evaluation, compute_metrics, run_inference
from detection.evaluation.report import draw_detections, metric_table, protocol_line, summary_line, write_evaluation
from detection.training.checkpoint_writer import BEST, Saver
from detection.training.loggers import Loggers
from detection.training.run import Run
from detection.training.state import RunState
from detection.training.supervisor import Supervisor

RESULTS = ("detections.json", "metrics.json")  # of the last evaluation
OF_BEST = "best_"  # before their names: of the evaluation that gave best.pt


class Evaluated(Protocol):
    """What the log of an evaluation says besides its numbers; a `Run` is one."""

    @property
    def settings(self) -> Settings: ...

    @property
    def detector(self) -> Detector: ...

    @property
    def validation_set(self) -> DetectionDataset: ...

    @property
    def steps_per_epoch(self) -> float: ...


def evaluate_and_keep(run: Run, state: RunState, saver: Saver, loggers: Loggers, supervisor: Supervisor) -> None:
    """Evaluate the model after this step and save it, also as best.pt if `evaluation.best_metric` rises."""
    # Saved first, so that no steps are lost if the evaluation fails; a resumed run repeats it.
    saver.save(numbered=saver.due())
    for line in run.images.look_again():
        loggers.line(line)
    evaluation = evaluate_run(run, state, supervisor)
    if evaluation is not None:
        log_evaluation(run, evaluation, state.step, loggers)
    best = state.record_evaluation(best_metric_of(run, evaluation))
    if best and evaluation is not None:
        keep_results(loggers)
    saver.save(best=best)
    state.meter.restart_clock()


def keep_better_weights(run: Run, state: RunState, saver: Saver, loggers: Loggers, supervisor: Supervisor) -> None:
    """Evaluate what else a run ends with; best.pt gets it if its `evaluation.best_metric` is the highest.

    That is the weights themselves, if the evaluations were of their EMA, and the mean of the SWA cycles.
    """
    candidates = [("weights without EMA", "weights", state.model)] if state.ema else []
    if state.swa and state.swa.count:
        candidates.append((f"SWA of {state.swa.count} cycles", "SWA", state.swa.model))
    for what, short, model in candidates:
        evaluation = evaluate_run(run, state, supervisor, model)
        value = best_metric_of(run, evaluation)
        better = value > (state.best_value or 0.0)
        if better:
            state.best_value, state.best_step = value, state.step
            if evaluation is not None:
                log_evaluation(run, evaluation, state.step, loggers, short)
                keep_results(loggers)
            saver.save_best_of(model)
        kept = f"the highest: {BEST} holds them" if better else f"{BEST} stays that of step {state.best_step}"
        loggers.line(f"{what} at step {state.step}: {run.settings.evaluation.best_metric} {value:.3f}, {kept}")


def best_metric_of(run: Run, evaluation: Evaluation | None) -> float:
    """Return the metric that decides about best.pt, in all processes alike.

    Args:
        evaluation: in the first process; None in the others.
    """
    name = run.settings.evaluation.best_metric
    return run.ranks.broadcast(None if evaluation is None else evaluation.metrics[name]) or 0.0


def evaluate_run(
    run: Run, state: RunState, supervisor: Supervisor, model: nn.Module | None = None
) -> Evaluation | None:
    """Evaluate the validation set, split among all processes; the first computes the metrics, others return None.

    Args:
        model: model to evaluate; None: `state.evaluated_model`.
    """
    run.set_progress(state.step - 1)  # the losses are those of the last step, in a continued run too
    share = run_inference(
        model or state.evaluated_model,
        run.criterion,
        run.detector.postprocess,
        build_share(run, run.ranks.rank, run.ranks.size),
        run.device,
        run.autocast,
        on_batch=supervisor.between_batches,
    )
    supervisor.rest()
    shares = run.ranks.gather(share)
    if shares is None:
        return None
    return compute_metrics(shares, run.validation_set.annotations, run.settings.evaluation.backend)


def build_share(run: Run, rank: int = 0, ranks: int = 1) -> DataLoader:
    """Build the loader of a process's share of the validation images."""
    settings = run.settings
    batch_size = settings.evaluation.batch_size or settings.train.micro_batch
    return build_evaluation_loader(run.validation_set, batch_size, settings.data.num_workers, run.device, rank, ranks)


def keep_results(loggers: Loggers) -> None:
    """Give the result files of this evaluation, which are replaced by the next one, a second name for best.pt."""
    # The metrics say of which evaluation both are; a process killed in between leaves no metrics, not those of another.
    for name in reversed(RESULTS):
        (loggers.directory / f"{OF_BEST}{name}").unlink(missing_ok=True)
    for name in RESULTS:
        link_file(loggers.directory / name, loggers.directory / f"{OF_BEST}{name}")
        loggers.artifact(loggers.directory / f"{OF_BEST}{name}")


def has_results_of_best(directory: Path, state: RunState, metric: str) -> bool:
    """Return whether the files that `keep_results` left are of the evaluation that gave the best.pt of this state."""
    try:
        metrics = json.loads((directory / f"{OF_BEST}metrics.json").read_text(encoding="utf-8"))
        found = metrics["step"], metrics[metric] or 0.0
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == (state.best_step, state.best_value) and (directory / f"{OF_BEST}detections.json").is_file()


def evaluate_best(run: Run, directory: Path) -> None:
    """Evaluate best.pt at the end of a run, in this process alone, and write the files that `keep_results` would have.

    The run's network holds these weights afterwards.

    Raises:
        CheckpointError, RuntimeError: best.pt is missing or damaged, or of another network.
    """
    checkpoint, model = load_fields(directory / BEST, DETECTOR_FIELDS), run.detector.model
    average = checkpoint.get("average")
    model.load_state_dict(average or checkpoint["model"])
    run.set_progress(checkpoint["step"] - 1)
    evaluation = compute_metrics(
        [run_inference(model, run.criterion, run.detector.postprocess, build_share(run), run.device, run.autocast)],
        run.validation_set.annotations,
        run.settings.evaluation.backend,
    )
    _write_results(run, evaluation, checkpoint["step"], "EMA" if average else "weights", directory, OF_BEST)


def log_evaluation(run: Evaluated, evaluation: Evaluation, step: int, loggers: Loggers, weights: str = "") -> None:
    """Log metrics, lines, a picture and the result files of an evaluation.

    Args:
        weights: which weights were evaluated; empty: the EMA if there is one.
    """
    settings, dataset = run.settings.evaluation, run.validation_set
    loss = sum(evaluation.losses.values())
    row: dict[str, float | None] = {f"val/{name}": value for name, value in evaluation.metrics.items()}
    row |= {"val/loss": loss, **{f"val/{name}": value for name, value in evaluation.losses.items()}}
    row |= {"val/boxes": len(evaluation.detections), "epoch": step / run.steps_per_epoch}
    if not weights:  # the metrics of a step have one row
        loggers.evaluation(step, row)
    names = {"nms": "NMS", "metric": evaluation.backend}
    parts = [f"{names.get(name, name)} {seconds:.1f} s" for name, seconds in evaluation.seconds.items()]
    weights = weights or ("EMA" if run.settings.train.ema_decay else "weights")
    loggers.line(f"evaluation of the {weights}: {protocol_line(run.settings, run.detector, dataset)}")
    loggers.line(
        f"step {step}: {len(evaluation.detections)} boxes on {len(dataset)} images, {', '.join(parts)}, "
        f"validation loss {loss:.3f}"
    )
    if evaluation.dropped:
        loggers.line(f"warning: {evaluation.dropped} detections were non-finite numbers and were dropped")
    for line in metric_table(evaluation):
        loggers.line(line, show=False)  # with many classes longer than the terminal
    loggers.line(f"{summary_line(evaluation.metrics, evaluation.class_ap)}  (all: train.log, metrics.json)")
    picture = draw_detections(dataset, evaluation, settings.visualization_threshold, settings.visualize_images)
    if picture is not None:
        loggers.image(step, "validation", picture)
    _write_results(run, evaluation, step, weights, loggers.directory)
    for name in RESULTS:
        loggers.artifact(loggers.directory / name)


def _write_results(
    run: Evaluated, evaluation: Evaluation, step: int, weights: str, directory: Path, prefix: str = ""
) -> None:
    settings = run.settings.evaluation.model_dump(mode="json")
    write_evaluation(directory, evaluation, run.validation_set, step, settings, {"weights": weights}, prefix)
