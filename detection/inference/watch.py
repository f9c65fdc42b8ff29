"""Watch one pass through a network: which layer takes whose output."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BATCH_NORM = inspect.signature(F.batch_norm)


@dataclass
class Call:
    """A function that was called with a tensor.

    Attributes:
        output: its first result.
        module: convolution or batch norm whose tensors it took, or the layer that called it; None: unknown.
        norm: arguments of `F.batch_norm`; None: another function.
    """

    output: Tensor
    module: nn.Module | None = None
    norm: dict[str, Any] | None = None


class Watch(TorchFunctionMode):
    """Records, while active, the calls that take each tensor.

    Attributes:
        calls: that take a tensor, by its `id`, in their order.
        outputs: of each convolution and batch norm, by its `id`, however it was called.
        entered: outputs of the layers that were called as modules, by their `id`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: dict[int, list[Call]] = defaultdict(list)
        self.outputs: dict[int, list[Tensor]] = defaultdict(list)
        self.entered: dict[int, list[Tensor]] = defaultdict(list)
        self._owners: dict[int, nn.Module] = {}  # by the `id` of the weight, of the running mean
        self._alive: list[Any] = []  # no `id` is used twice while its tensor lives
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                self._owners[id(module.weight)] = module
            elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                self._owners[id(module.running_mean)] = module

    def run(self, model: nn.Module, images: Tensor) -> None:
        """Watch a pass; what the network returns counts as taken, by nobody in particular."""
        layers = [module for module in model.modules() if not list(module.children())]
        hooks = [layer.register_forward_hook(self._note_layer) for layer in layers]
        try:
            with self:
                outputs = model(images)
        finally:
            for hook in hooks:
                hook.remove()
        self._record(list(tensors_of(outputs)), Call(torch.empty(0)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        call = Call(result)
        if func is F.conv2d:
            call.module = self._owners.get(id(args[1])) if len(args) > 1 else None
        elif func is F.batch_norm:
            call.norm = dict(BATCH_NORM.bind(*args, **kwargs).arguments)
            call.module = self._owners.get(id(call.norm["running_mean"]))
        self._record(list(tensors_of((args, kwargs))), call)
        return result

    def only_call(self, tensor: Tensor) -> Call | None:
        """The call that takes a tensor, if no other sees the same values."""
        calls = self.calls[id(tensor)]
        alone = len(calls) == 1 or (len(calls) > 1 and calls[0].output is tensor)  # in place: the others see its result
        return calls[0] if alone else None

    def _record(self, taken: list[Tensor], call: Call) -> None:
        made = list(tensors_of(call.output))
        if not made:  # a question, such as for the shape
            return
        self._alive += [*taken, *made]
        call.output = made[0]
        for tensor in taken:
            self.calls[id(tensor)].append(call)
        if call.module is not None:
            self.outputs[id(call.module)].append(made[0])

    def _note_layer(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook: the call that has just taken the input of a layer without tensors is the layer's."""
        if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            return
        self.entered[id(module)].append(output)
        calls = self.calls[id(inputs[0])]
        if calls and calls[-1].module is None and calls[-1].output is output:
            calls[-1].module = module


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Find all tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
