"""Evaluation of a classifier: top-1, the confusion matrix and the clearest mistakes, as numbers and as pictures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detection.classification.run import ClassifierRun
from detection.drawing.boxes import draw_boxes, make_grid
from detection.drawing.figures import figure_pixels, new_figure
from detection.drawing.files import replace_file
from detection.drawing.fonts import figure_names
from detection.evaluation.evaluate import InferenceResult, run_inference
from detection.training.checkpoint_writer import Saver
from detection.training.evaluation import build_share
from detection.training.loggers import Loggers
from detection.training.state import RunState
from detection.training.supervisor import Supervisor

MISTAKES = 32  # that are drawn
MISTAKE_PX = 96
COLUMNS = 8
MOST_NUMBERS = 25  # classes up to which the cells of the matrix have their counts


@dataclass(frozen=True)
class ClassEvaluation:
    """What a classifier says of N validation images, in the order of the set."""

    labels: np.ndarray  # (N,) int64 ground truth
    predicted: np.ndarray  # (N,) int64
    scores: np.ndarray  # (N,) float64 probability of the predicted class
    loss: float

    @property
    def top1(self) -> float:
        """Share of the images whose likeliest class is right."""
        return float((self.labels == self.predicted).mean())

    def confusion(self, num_classes: int) -> np.ndarray:
        """Count the images by ground truth (rows) and predicted class (columns), (C, C) int64."""
        cells = np.bincount(self.labels * num_classes + self.predicted, minlength=num_classes**2)
        return cells.reshape(num_classes, num_classes)

    def mistakes(self, most: int = MISTAKES) -> np.ndarray:
        """Images with a wrong class, that of the highest probability first; at most `most`."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        return wrong[np.argsort(-self.scores[wrong], kind="stable")][:most]


def join_shares(shares: Sequence[InferenceResult], labels: np.ndarray) -> ClassEvaluation:
    """Put together what the processes found.

    Args:
        labels: class of every image of the set, (N,).
    """
    predicted, scores = np.full(len(labels), -1, np.int64), np.zeros(len(labels))
    for share in shares:
        predicted[share.detections.image_index] = share.detections.labels
        scores[share.detections.image_index] = share.detections.scores
    assert (predicted >= 0).all(), "every image is looked at by one of the processes"
    loss = sum(share.losses.get("loss_class", 0.0) for share in shares) / len(labels)
    return ClassEvaluation(labels, predicted, scores, loss)


def evaluate_classifier(
    run: ClassifierRun, state: RunState, saver: Saver, loggers: Loggers, supervisor: Supervisor
) -> None:
    """Evaluate the model after this step, log it and save the run, also as best.pt if top-1 rises."""
    saver.save(numbered=saver.due())  # first, so that no steps are lost if the evaluation fails
    share = run_inference(
        state.evaluated_model,
        run.criterion,
        run.detector.postprocess,
        build_share(run, run.ranks.rank, run.ranks.size),
        run.device,
        run.autocast,
        on_batch=supervisor.between_batches,
    )
    supervisor.rest()
    shares, evaluation = run.ranks.gather(share), None
    if shares is not None:
        evaluation = join_shares(shares, run.validation_set.annotations.labels)
    best = state.record_evaluation(run.ranks.broadcast(None if evaluation is None else evaluation.top1) or 0.0)
    if evaluation is not None:
        log_class_evaluation(run, evaluation, state.step, loggers, best)
    saver.save(best=best)
    state.meter.restart_clock()


def log_class_evaluation(
    run: ClassifierRun, evaluation: ClassEvaluation, step: int, loggers: Loggers, best: bool
) -> None:
    """Log the numbers and pictures of an evaluation; metrics.json is that of the best one."""
    names = run.categories.names
    confusion = evaluation.confusion(len(names))
    loggers.evaluation(step, {"val/top1": evaluation.top1, "val/loss": evaluation.loss})
    wrong = int((evaluation.labels != evaluation.predicted).sum())
    loggers.line(
        f"step {step}: top-1 {evaluation.top1:.4f} ({wrong} of {len(evaluation.labels)} wrong), "
        f"loss {evaluation.loss:.4f}{', the best so far' if best else ''}"
    )
    loggers.image(step, "confusion", draw_class_confusion(confusion, names))
    mistakes = evaluation.mistakes()
    if len(mistakes):
        loggers.image(step, "mistakes", draw_mistakes(run, evaluation, mistakes))
    if best:
        recall = confusion.diagonal() / confusion.sum(axis=1).clip(1)
        content = {
            "step": step,
            "top1": evaluation.top1,
            "loss": evaluation.loss,
            "images": len(evaluation.labels),
            "recall": dict(zip(names, recall.tolist(), strict=True)),
            "confusion": confusion.tolist(),
        }
        path = loggers.directory / "metrics.json"
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
        loggers.artifact(path)


def draw_class_confusion(matrix: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix, coloured by each cell's share of its row; RGB (H, W, 3)."""
    count, names = len(matrix), figure_names(names)
    side = min(max(5.0, 2 + 0.5 * count), 20.0)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure, (axes,) = new_figure((side + 1, side))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(matrix), strict=True) if count <= MOST_NUMBERS else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=color)
    letters = 9.0 if count <= MOST_NUMBERS else max(3.0, 300 / count)
    axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=letters)
    axes.set_yticks(range(count), names, fontsize=letters)
    axes.set_xlabel("predicted")
    axes.set_ylabel("ground truth")
    axes.set_title(f"{int(matrix.sum())} images, {int(matrix.trace())} right")
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, label="share of the row")
    return figure_pixels(figure)


def draw_mistakes(run: ClassifierRun, evaluation: ClassEvaluation, mistakes: np.ndarray) -> np.ndarray:
    """Draw wrongly classified images as the network sees them, titled ground truth > predicted; RGB (H, W, 3)."""
    names = run.categories.names
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), names
    pictures = []
    for index in mistakes.tolist():
        image = run.validation_set[index].image
        factor = max(round(MISTAKE_PX / image.shape[0]), 1)
        image = image.repeat(factor, axis=0).repeat(factor, axis=1)
        label, predicted = names[evaluation.labels[index]], names[evaluation.predicted[index]]
        title = f"{label} > {predicted} {evaluation.scores[index]:.2f}"
        pictures.append(draw_boxes(image, *none, title=title))
    return make_grid(pictures, COLUMNS)
