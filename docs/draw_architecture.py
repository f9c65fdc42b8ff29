"""Draw YOLOv3 with Darknet-53 as it is built: every number in the figure is read from the network itself.

python3 -m docs.draw_architecture

Builds the network of yolo-v3/args.yaml for COCO's 80 classes, sends one image of 416 px through it with a hook on every
module, and writes docs/architecture.png. About 10 seconds.
"""

import itertools
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import nn

from detection.config.command_line import DEFAULTS
from detection.config.loading import load_settings
from detection.drawing.figures import new_figure, save_figure
from detection.models.backbones.darknet import Darknet53, ResidualBlock
from detection.models.yolo.detector import build_model
from detection.models.yolo.network import YOLOv3

SIZE, CLASSES = 416, 80
COLORS = {"image": "#e8e8e8", "backbone": "#cfe2f3", "neck": "#fde3c8", "lateral": "#f6d5e5", "head": "#d5ecd4"}
GREY = "#555555"
ROWS = {8: 4.6, 16: 2.6, 32: 0.6}  # stride -> y of its row
X_BACKBONE, X_CONCAT, X_NECK, X_HEAD, X_OUTPUT = 0, 3.6, 5.6, 8.6, 11.3  # left edges of the columns
BACKBONE_WIDTH, CONCAT_WIDTH, NECK_WIDTH, HEAD_WIDTH = 3.0, 1.5, 2.4, 2.2
Shapes = dict[nn.Module, tuple[tuple[int, ...], tuple[int, ...]]]


def main() -> None:
    settings, _ = load_settings(DEFAULTS)
    model = cast(YOLOv3, build_model(settings.model, settings.yolo, CLASSES).eval())
    shapes, outputs = trace(model)
    figure, (axes,) = new_figure((14, 8.4))
    draw_backbone(axes, cast(Darknet53, model.backbone), shapes)
    for number in range(len(model.neck)):
        draw_level(axes, model, number, shapes, outputs)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    axes.set_title(
        f"YOLOv3 with Darknet-53 at {SIZE} px, {CLASSES} classes: "
        f"{convolutions} convolutions, {parameters:,} parameters",
        fontsize=15,
    )
    draw_headings(axes, model)
    axes.set(xlim=(-0.1, 13.6), ylim=(0.4, 10.1))
    axes.set_axis_off()
    save_figure(Path("docs/architecture.png"), figure)


def trace(model: YOLOv3) -> tuple[Shapes, list[torch.Tensor]]:
    """Input and output shape of every module, without the batch, and the outputs per level."""
    shapes: Shapes = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor):
            shapes[module] = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, SIZE, SIZE))
    for hook in hooks:
        hook.remove()
    return shapes, outputs


def draw_backbone(axes: Axes, backbone: Darknet53, shapes: Shapes) -> None:
    """Image, stem and stages from top to bottom; those that a level takes stand in its row."""
    first_free = ROWS[backbone.strides[0]] + 1.05 * (2 + len(backbone.stages) - len(backbone.strides))
    image, _ = shapes[backbone.stem]
    parts: list[tuple[str, str, str, float]] = [("image", written(image), "image", first_free + 0.05)]
    parts.append((f"stem: {describe(backbone.stem)}", written(shapes[backbone.stem][1]), "backbone", first_free - 1.05))
    for number, stage in enumerate(cast(Any, backbone.stages), start=1):
        blocks = [module for module in stage if isinstance(module, ResidualBlock)]
        text = f"stage {number}: {describe(stage[0])}, {len(blocks)} residual block{'s' * (len(blocks) > 1)}"
        shape = shapes[stage][1]
        stride = SIZE // shape[1]
        y = ROWS.get(stride, first_free - 1.05 * (number + 1))
        parts.append((text, f"{written(shape)}    stride {stride}", "backbone", y))
    for (_, _, _, above), (_, _, _, below) in itertools.pairwise(parts):
        arrow(axes, (BACKBONE_WIDTH / 2, above), (BACKBONE_WIDTH / 2, below + 0.75))
    for title, shape_text, color, y in parts:
        block(axes, X_BACKBONE, y, BACKBONE_WIDTH, title, shape_text, color)


def draw_headings(axes: Axes, model: YOLOv3) -> None:
    """What the colours stand for, above the columns, and how to read the rest."""
    counts = {
        name: sum(isinstance(module, nn.Conv2d) for module in part.modules())
        for name, part in (
            ("backbone", cast(nn.Module, model.backbone)),
            ("neck", model.neck),
            ("route", model.laterals),
            ("heads", model.heads),
        )
    }
    top = ROWS[model.strides[0]] + 1.05
    for x, width, name in (
        (X_CONCAT, CONCAT_WIDTH, "route"),
        (X_NECK, NECK_WIDTH, "neck"),
        (X_HEAD, HEAD_WIDTH, "heads"),
    ):
        text = f"{name}, {counts[name]} convolutions"
        axes.text(x + width / 2, top, text, ha="center", fontsize=11, color=GREY)
    axes.text(X_OUTPUT + HEAD_WIDTH / 2, top, "outputs", ha="center", fontsize=11, color=GREY)
    notes = [
        f"Blue: the backbone Darknet-53 without its classifier, {counts['backbone']} convolutions.",
        "A residual block adds to its input a 1×1 convolution to half the channels and a 3×3 back.",
        "Every convolution but the last of a head: no bias, batch norm, leaky ReLU.",
        f"Each cell predicts, per anchor, x, y, width, height, objectness and {CLASSES} classes.",
        "“3×3, 64 /2”: kernel, filters, stride.  Bold: channels × rows × columns of what leaves the box.",
    ]
    axes.text(X_CONCAT, 9.8, "\n\n".join(notes), fontsize=11, color=GREY, va="top")


def draw_level(axes: Axes, model: YOLOv3, number: int, shapes: Shapes, outputs: list[torch.Tensor]) -> None:
    """The row of a level: joined maps, neck, head and output; number 0 is the coarsest."""
    neck, head = cast(nn.Sequential, model.neck[number]), cast(nn.Sequential, model.heads[number])
    stride = model.strides[-1 - number]
    y = ROWS[stride]
    middle = y + 0.375
    joined, width = shapes[neck]
    arrow(axes, (X_BACKBONE + BACKBONE_WIDTH, middle), (X_NECK if number == 0 else X_CONCAT, middle))
    if number > 0:
        lateral = model.laterals[number - 1]
        below = ROWS[model.strides[-number]]
        # from the end of the coarser neck up and back to where the maps are joined
        text = f"{describe(lateral)}, upsampled ×2", written((shapes[lateral][1][0], *joined[1:]))
        start, end = X_NECK + NECK_WIDTH / 2, X_CONCAT + CONCAT_WIDTH / 2
        arrow(axes, (start, below + 0.75), (start, below + 1.05))
        block(axes, X_CONCAT, below + 1.05, X_NECK + NECK_WIDTH - X_CONCAT, *text, "lateral", height=0.6)
        arrow(axes, (end, below + 1.65), (end, y))
        block(axes, X_CONCAT, y, CONCAT_WIDTH, "concat", written(joined), "lateral")
        arrow(axes, (X_CONCAT + CONCAT_WIDTH, middle), (X_NECK, middle))
    convolutions = [module for module in neck if isinstance(module, nn.Sequential)]
    block(
        axes,
        X_NECK,
        y,
        NECK_WIDTH,
        f"{len(convolutions)} convolutions {alternating(convolutions)}",
        written(width),
        "neck",
    )
    arrow(axes, (X_NECK + NECK_WIDTH, middle), (X_HEAD, middle))
    block(
        axes, X_HEAD, y, HEAD_WIDTH, f"{describe(head[0])} and {describe(head[1])}", written(shapes[head[1]][1]), "head"
    )
    arrow(axes, (X_HEAD + HEAD_WIDTH, middle), (X_OUTPUT, middle))
    anchors, rows, columns, values = outputs[-1 - number].shape[1:]
    title = f"{anchors} anchors × {rows} × {columns} × {values}"
    block(axes, X_OUTPUT, y, HEAD_WIDTH, title, f"{anchors * rows * columns:,} predictions", "head")


def describe(module: nn.Module) -> str:
    """Kernel, filters and stride of a convolution or of a block around one."""
    convolution = module if isinstance(module, nn.Conv2d) else cast(nn.Conv2d, next(module.children()))
    step = f" /{convolution.stride[0]}" if convolution.stride[0] > 1 else ""
    return f"{convolution.kernel_size[0]}×{convolution.kernel_size[1]}, {convolution.out_channels}{step}"


def alternating(convolutions: list[nn.Sequential]) -> str:
    """What the convolutions of a neck are, each kind once in the order of appearance."""
    return "\n" + " and ".join(dict.fromkeys(describe(convolution) for convolution in convolutions))


def written(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def block(
    axes: Axes, x: float, y: float, width: float, title: str, shape: str, color: str, height: float = 0.75
) -> None:
    """A rounded box with what it does and the shape that leaves it."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=COLORS[color], edgecolor=GREY, linewidth=1))
    lines = title.count("\n") + 1
    axes.text(x + width / 2, y + height * (0.68 if lines == 1 else 0.62), title, ha="center", va="center", fontsize=9.5)
    place = y + height * (0.28 if lines == 1 else 0.17)
    axes.text(x + width / 2, place, shape, ha="center", va="center", fontsize=9.5, weight="bold")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


if __name__ == "__main__":
    main()
