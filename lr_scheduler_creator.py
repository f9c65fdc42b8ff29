"""Plot the learning-rate schedule of settings, or compare several schedules.

python lr_scheduler_creator.py --config recipes/darknet_416.yaml
python lr_scheduler_creator.py scheduler.strategy=WarmupMultiStepLR scheduler.warmup=2000 train.steps=273ep
python lr_scheduler_creator.py --compare recipes/240224_LambdaLR.yaml --compare recipes/240312_CosineAnnealing_T2.yaml
python lr_scheduler_creator.py --config recipes/bccd.yaml --images 205

Writes schedule.png (with the end of the warm-up, milestones and restarts marked, and a second axis in epochs), one CSV
per curve (step, epoch, learning rate) and TensorBoard events into a new directory below logs/. Takes a second, because
no network is built and no dataset read: --images gives the length of an epoch. docs/learning_rate.png compares the
recipes 240224_LambdaLR, 240308_CosineAnnealing_T1 and 240312_CosineAnnealing_T2.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detection.config.command_line import Parser
from detection.config.settings import Settings
from detection.drawing.figures import add_second_x, draw_curves, figure_pixels, new_figure, save_figure
from detection.drawing.files import replace_csv
from detection.drawing.window import browse
from detection.errors import SettingsError, exit_with_message, say
from detection.runtime.run_directory import new_run_directory, writing_results
from detection.training.automatic import load_run_settings
from detection.training.schedules import BIAS_GROUP, Schedule, add_swa, build_schedule, full_rate, resolve_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COCO_IMAGES = 118_287  # train2017
POINTS = 2000  # per curve, in addition to its turns
WARMUP_POINTS = 200
MAX_MARKS = 60
COSINE = "CosineAnnealingWarmRestartsWithWarmup"


@dataclass(frozen=True)
class Curve:
    """One schedule, resolved to steps."""

    name: str
    schedule: Schedule
    total_steps: int
    steps_per_epoch: float

    def steps(self) -> list[int]:
        """List the steps to plot: evenly spaced, more densely in the warm-up, and both sides of every turn."""
        last = self.total_steps - 1
        turns = self.turns() if len(self.turns()) <= POINTS else []
        steps = {*range(0, self.total_steps, max(self.total_steps // POINTS, 1)), last}
        steps |= {*range(0, min(self.schedule.warmup + 1, last), max(self.schedule.warmup // WARMUP_POINTS, 1))}
        steps |= {step for turn in turns for step in (turn - 1, turn) if 0 <= step <= last}
        return sorted(steps)

    def turns(self) -> list[int]:
        """List the steps at which the rate drops or a cosine cycle begins."""
        return self.schedule.changes(self.total_steps, limit=self.total_steps)

    def marks(self) -> dict[str, tuple[str, list[int]]]:
        """Map markers to their meaning and steps; without those of so many steps that they would hide the curve."""
        warmup = [self.schedule.warmup] if 0 < self.schedule.warmup < self.total_steps else []
        turns = [step for step in self.turns() if step not in warmup]
        turn = ("o", "restart") if self.schedule.strategy == COSINE else ("s", "milestone")
        found = {"^": ("end of the warm-up", warmup), turn[0]: (turn[1], turns)}
        return {marker: (name, steps) for marker, (name, steps) in found.items() if 0 < len(steps) <= MAX_MARKS}

    def groups(self) -> list[str]:
        """List the parameter groups with different rates."""
        return ["weights"] if self.schedule.warmup_bias_lr is None else ["weights", BIAS_GROUP]


def main() -> None:
    parser = Parser("lr_scheduler_creator.py", __doc__)
    parser.add_settings(device=False)
    add = parser.add_argument
    add(
        "--compare",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="plot one curve for each of these overlays; repeatable",
    )
    add(
        "--images",
        type=int,
        default=COCO_IMAGES,
        metavar="N",
        help=f"number of training images, for the length of an epoch (default: {COCO_IMAGES}, as COCO)",
    )
    parser.add_output()
    arguments = parser.parse_intermixed_args()
    if arguments.images < 1:
        raise SettingsError(f"--images {arguments.images}: must be at least 1")

    overlays = [[*arguments.config, file] for file in arguments.compare] or [arguments.config]
    curves: list[Curve] = []
    for number, files in enumerate(overlays, start=1):
        settings, notices = load_run_settings(
            files, arguments.settings, unused=("data", "model", "evaluation"), tolerant=True, fit=False
        )
        if settings.run.device not in ("auto", "cpu"):  # not used, but every script refuses an absent device
            from detection.runtime.devices import choose_device  # imports torch, which takes a second

            choose_device(settings.run.device)
        name = files[-1].stem if files else settings.scheduler.strategy
        taken = any(curve.name == name for curve in curves)
        curves.append(build_curve(f"{name} {number}" if taken else name, settings, arguments.images))
        say(*notices, *describe(curves[-1]))
    directory = new_run_directory(Path(settings.run.logs_path), "schedule", arguments.output)
    figure = draw(curves)
    with writing_results(directory):
        save_figure(directory / "schedule.png", figure)
        for curve in curves:
            write_csv(directory / f"{curve.name}.csv", curve)
            write_tensorboard(directory / curve.name, curve)
    say(f"figure, CSV and TensorBoard events in {directory}")
    if arguments.show:
        browse("learning rate", 1, lambda page: figure_pixels(figure))


def build_curve(name: str, settings: Settings, images: int) -> Curve:
    """Resolve durations to steps and build the schedule; SettingsError if they contradict one another."""
    train = settings.train
    images_per_step = train.micro_batch * train.subdivisions
    steps_per_epoch = images / images_per_step
    total_steps = max(resolve_steps(train.steps, steps_per_epoch), 1)
    rate = full_rate(train, images_per_step)
    try:
        schedule = build_schedule(settings.scheduler, rate, total_steps, steps_per_epoch, train.clean_finish)
    except ValueError as error:
        raise SettingsError(f"{name}: {error}") from None
    schedule, total_steps = add_swa(schedule, train, total_steps, steps_per_epoch)
    return Curve(name, schedule, total_steps, steps_per_epoch)


def describe(curve: Curve) -> list[str]:
    """Format the length and turns of a schedule for the terminal."""
    schedule, last, turns = curve.schedule, curve.total_steps - 1, curve.turns()
    warmup = [schedule.warmup] if schedule.warmup <= last else []
    rates = [f"{schedule.at(step):.3g} at {step}" for step in sorted({0, *warmup, *turns[:8]})]
    if len(turns) > 8:
        rates.append(f"... ({len(turns) - 8} more{', closer than they can be drawn' if len(turns) > POINTS else ''})")
    epochs = curve.total_steps / curve.steps_per_epoch
    return [
        f"{curve.name}: {schedule.strategy}, {curve.total_steps} steps = {epochs:.1f} epochs of "
        f"{curve.steps_per_epoch:.1f} steps",
        f"    learning rate {', '.join([*rates, f'{schedule.at(last):.3g} at {last}'])}",
    ]


def draw(curves: Sequence[Curve]) -> "Figure":
    """Plot all curves over the steps, with marks and, if all epochs have the same length, a second axis in epochs."""
    figure, (axes,) = new_figure((10, 5.5))
    lines = {}
    for curve in curves:
        for group in curve.groups():
            name = curve.name if group == "weights" else f"{curve.name}, {group}"
            lines[name] = [(float(step), curve.schedule.at(step, group)) for step in curve.steps()]
    draw_curves(axes, lines, "learning rate", "optimizer step", "learning rate")
    color_of = dict(zip(lines, [line.get_color() for line in axes.get_lines()], strict=True))
    named = {}
    for curve in curves:
        for marker, (meaning, steps) in curve.marks().items():
            rates = [curve.schedule.at(step) for step in steps]
            axes.plot(steps, rates, marker, color=color_of[curve.name], markersize=7, markeredgecolor="black", zorder=3)
            named[marker] = meaning
    for marker, meaning in named.items():
        axes.plot([], [], marker, color="white", markersize=7, markeredgecolor="black", label=meaning)
    if (legend := axes.get_legend()) is not None:
        legend.remove()  # replaced by one below the figure, which hides no curve
    figure.legend(loc="outside lower center", ncols=3)
    axes.set_ylim(bottom=0)
    lengths = {curve.steps_per_epoch for curve in curves}
    if len(lengths) == 1:  # else there is no common second axis
        add_second_x(axes, 1 / lengths.pop(), "epoch")
    return figure


def write_csv(path: Path, curve: Curve) -> None:
    """Write the learning rate of each parameter group, one row per step drawn."""
    names = ["learning_rate" if group == "weights" else f"learning_rate_{group}" for group in curve.groups()]
    rows = (
        [
            step,
            round(step / curve.steps_per_epoch, 6),
            *(curve.schedule.at(step, group) for group in curve.groups()),
        ]
        for step in curve.steps()
    )
    replace_csv(path, itertools.chain([["step", "epoch", *names]], rows))


def write_tensorboard(directory: Path, curve: Curve) -> None:
    """Write the curve as a TensorBoard run of its own, so that TensorBoard overlays the curves."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(directory))
    for step in curve.steps():
        for group in curve.groups():
            tag = "learning_rate" if group == "weights" else f"learning_rate/{group}"
            value = Summary.Value(tag=tag, simple_value=curve.schedule.at(step, group))
            # The step as wall time makes the file reproducible.
            writer.add_event(Event(wall_time=float(step), step=step, summary=Summary(value=[value])))
    writer.close()


if __name__ == "__main__":
    exit_with_message(main)
