"""The classes of trained weights carried over to a run with other classes, or the same in another order."""

import textwrap
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from detection.contract import DetectorModel, HasClassRows
from detection.models.state_dicts import filters_of_no_class

CLASSES_SHOWN = 10
ROW_WIDTH = 110  # of the lines that say where each class is from


def carry_outputs(model: nn.Module, state: dict[str, Tensor], its_names: list[str], names: list[str]) -> list[str]:
    """Make the output convolutions of a file fit the classes of the run, in place.

    Filters of classes that both have are the file's, wherever they stand; those of other classes are the new model's;
    those of no class (boxes, objectness) are the file's. Which filters are which says the model's `class_rows`; where
    it has none, or the file has other anchors, differing classes leave nothing to take.

    Args:
        state: tensors of the file.
        its_names, names: classes of the file and of the run.

    Returns:
        A line about what was taken; none if everything fits as it is.
    """
    declared = cast(DetectorModel, model)
    own_state = model.state_dict()
    numbers = {id(convolution): number for number, convolution in enumerate(declared.output_convolutions())}
    outputs = {  # name of each tensor -> number of its convolution
        f"{prefix}.{name}": numbers[id(module)]
        for prefix, module in model.named_modules(remove_duplicate=False)
        if id(module) in numbers
        for name, _ in module.named_parameters()
    }
    counts = len(its_names), len(names)
    tables = [model.class_rows(count) for count in counts] if isinstance(model, HasClassRows) else None
    its_filters = {
        name: len(own_state[name]) + (0 if tables is None else tables[0][number].numel() - tables[1][number].numel())
        for name, number in outputs.items()
    }
    fits = all(
        name in state and state[name].shape == (filters, *own_state[name].shape[1:])
        for name, filters in its_filters.items()
    )
    if fits and its_names == names:
        return []
    if tables is None or not fits:
        sized = all(name in state and state[name].shape[1:] == own_state[name].shape[1:] for name in its_filters)
        state.update({name: own_state[name] for name in outputs})
        kind = "other anchors" if sized else "output convolutions of another size"
        reasons = [kind] * (tables is not None and not fits) + [f"other classes ({listed(its_names)})"] * (
            its_names != names
        )
        return [f"the output convolutions start anew: the file has {' and '.join(reasons) or 'others'}"]
    shared = [(label, its_names.index(name)) for label, name in enumerate(names) if name in its_names]
    for name, number in outputs.items():
        theirs, own = (table[number] for table in tables)
        merged = own_state[name].clone()
        merged[filters_of_no_class(own, len(merged))] = state[name][filters_of_no_class(theirs, len(state[name]))]
        for label, its_label in shared:
            merged[own[:, label]] = state[name][theirs[:, its_label]]
        state[name] = merged
    rows = [
        f"{label} {name}: {f'row {its_names.index(name)} of the file' if name in its_names else 'new'}"
        for label, name in enumerate(names)
    ]
    table = [f"  {line}" for line in textwrap.wrap("; ".join(rows), ROW_WIDTH)]
    if sorted(its_names) == sorted(names):
        line = "output convolutions: the file has the same classes in another order, put into this run's: "
        return [line + listed(names), *table]
    kept, new = ([name for name in names if (name in its_names) == wanted] for wanted in (True, False))
    line = f"output convolutions: what is of no class (boxes) from the file; classes from the file: {listed(kept)}"
    unused = [name for name in its_names if name not in names]
    return [f"{line}; starting anew: {listed(new)}" + (f"; not used: {listed(unused)}" if unused else ""), *table]


def listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)})" if len(names) > CLASSES_SHOWN else ""
    return ", ".join(names[:CLASSES_SHOWN]) + more if names else "none"
