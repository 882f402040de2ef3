"""Finds binary layers that a model bypasses, by watching a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from .fused.base import Fused
from .nn.layers import BinaryLayer
from .nn.levels import LearnedLevels
from .nn.packed import PACKED, PackedConv2d, PackedLinear

BINARY_LAYERS = (BinaryLayer, PackedLinear, PackedConv2d)
SHOWN = 4  # names in an error


def bypassed_layers(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """The names of the binary layers whose weights `run()` reads without calling them, as if they were float.

    `run` is called in evaluation mode and, unless the model is packed, in training mode, where stock models may take
    another path; binary layers and normalizations evaluate even then. Afterwards the model is unchanged. Layers that
    `run` does not reach are not included.

    >>> from hf_bnn import binarize_
    >>> model = binarize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    >>> bypassed_layers(model, lambda: model[1](torch.ones(1, 4)) @ model[0].weight)
    ['0']
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, BINARY_LAYERS)}
    packed = any(isinstance(module, tuple(PACKED.values())) for module in model.modules())
    found: set[nn.Module] = set()
    for training in (False,) if packed else (False, True):
        with untouched(model), torch.no_grad():
            model.train(training)
            for module in model.modules():
                if module in layers or isinstance(module, _NormBase):  # a batch of one has no statistics in training
                    module.eval()
            found.update(_bypassed(model, layers, run))
    return [name for layer, name in layers.items() if layer in found]


def check_layers_run(model: nn.Module, run: Callable[[], object]) -> None:
    """Raise ValueError, with the names, if `run()` reads the weights of binary layers without calling them.

    Such layers would compute in float, and fail once they are packed.
    """
    names = bypassed_layers(model, run)
    if names:
        shown = ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))
        raise ValueError(
            f"{type(model).__name__} reads the weights of the binary layers {shown} without calling them: they would "
            "compute with float weights and inputs, and fail once packed. Leave them float, with exclude=[...], when "
            "the model is made binary"
        )


def _bypassed(model: nn.Module, layers: Iterable[nn.Module], run: Callable[[], object]) -> list[nn.Module]:
    """The layers that one call of `run` does not execute although an operation takes their weights."""
    ran: set[nn.Module] = set()
    # A global hook: hooks on the layers would take torch's own encoder layers off their fast path.
    hook = register_module_forward_pre_hook(lambda module, inputs: ran.add(module))
    try:
        with _Operands() as operands:
            run()
    finally:
        hook.remove()
    for module in list(ran):
        if isinstance(module, Fused):  # runs its parts without calling them
            ran.update(module.modules())
    others = {id(t) for module in model.modules() if not isinstance(module, BINARY_LAYERS) for t in _own(module)}
    return [
        layer
        for layer in layers
        if layer not in ran and any(id(t) in operands.seen and id(t) not in others for t in _own(layer))
    ]


def _own(module: nn.Module) -> Iterator[Tensor]:
    """The module's own tensors without its bias, whose use shows nothing about its weight."""
    for tensors in (module._parameters, module._buffers):
        yield from (tensor for name, tensor in tensors.items() if tensor is not None and name != "bias")


class _Operands(TorchDispatchMode):
    """Collects the identities of all tensors that operations take."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    self.seen.add(id(tensor))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """A context that restores every mode, learned level, buffer and random state on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    levels = [module for module in model.modules() if isinstance(module, LearnedLevels) and module.fresh]
    own = [module for module in model.modules() if not isinstance(module, (*BINARY_LAYERS, *PACKED.values()))]
    values = [tensor for module in levels for tensor in module.parameters()]
    values += [tensor for module in own for tensor in module.buffers(recurse=False)]
    before = [(tensor, tensor.detach().clone()) for tensor in values]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        for module in levels:
            module.fresh = True
