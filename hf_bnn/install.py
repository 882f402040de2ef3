"""Installs a method in a model: its parts, the numbers of the layers, fitted levels, and the state of the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .nn.fast_path import leave_fast_path_
from .nn.layers import BinaryLayer, binary_layers

if TYPE_CHECKING:  # at run time only training needs the methods: inference works without them
    from .methods.base import Method, Part, Position, Site


def install_method(model: nn.Module, method: Method | None = None) -> nn.Module:
    """Give every binary layer the method's parts, in place. The parts of an earlier method are dropped.

    None stands for the straight-through estimator.
    """
    from .methods.ste import STE

    method = method or STE()
    layers = binary_layers(model)
    for layer, site in zip(layers, _sites(model, layers), strict=True):
        layer.install(method, site)
        for _, part in layer.parts():
            part.train(layer.training)
    return leave_fast_path_(model)


@torch.no_grad()
def number_by_execution_(model: nn.Module, forward: Callable[[], object]) -> nn.Module:
    """Number the binary layers, in place, in the order in which `forward()` executes them.

    Methods that depend on the order need this. Otherwise layers count in the order of definition, which differs where a
    shortcut is defined before the main path. Layers that read the same tensor (query, key, value) become a group.
    Layers that do not run come last.
    """
    inputs: dict[BinaryLayer, object] = {}  # kept alive, so that no two of them have the same identity

    def note(layer: BinaryLayer, arguments: tuple) -> None:
        inputs.setdefault(layer, arguments[0])

    _run_watched(model, forward, note)
    layers = [*inputs, *(layer for layer in binary_layers(model) if layer not in inputs)]
    groups = [id(inputs.get(layer, layer)) for layer in layers]
    for layer, site in zip(layers, _sites(model, layers, groups), strict=True):
        layer.set_site(site)
    return model


def _sites(model: nn.Module, layers: list[BinaryLayer], groups: list[int] | None = None) -> Iterator[Site]:
    """The site of each layer, in the order given. Layers of the same group have the same number in `groups`."""
    from .methods.base import Site

    blocks = _blocks(model)
    group_positions = _positions(groups or list(range(len(layers))))
    block_positions = _positions([blocks[layer] for layer in layers])
    for index, layer in enumerate(layers):
        weight = getattr(layer, "weight", None)
        shape = None if weight is None else tuple(weight.shape)
        yield Site(index, len(layers), shape, group=group_positions[index], block=block_positions[index])


def _positions(keys: list) -> list[Position]:
    """The position of each key. Equal keys share a position; positions count up in the order of first occurrence."""
    from .methods.base import Position

    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [Position(numbers[key], len(numbers)) for key in keys]


def _blocks(model: nn.Module) -> dict[BinaryLayer, str]:
    """The name of each binary layer's block: the innermost element of a list of modules that holds several of them."""
    names = {name: module for name, module in model.named_modules() if isinstance(module, BinaryLayer)}
    elements = [
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for child, _ in module.named_children()
    ]
    several = [e for e in elements if sum(name.startswith(f"{e}.") for name in names) > 1]
    return {
        layer: max((e for e in several if name.startswith(f"{e}.")), key=len, default=name)
        for name, layer in names.items()
    }


def binary_fraction(model: nn.Module) -> float:
    """The share of the model that the method has made binary in training, 0 to 1. Only StoMPP goes below 1."""
    binarizers = [part for layer in binary_layers(model) for slot, part in layer.parts() if slot != "around"]
    return sum(part.binary_fraction() for part in binarizers) / len(binarizers) if binarizers else 1.0


@torch.no_grad()
def calibrate_(model: nn.Module, forward: Callable[[], object]) -> nn.Module:
    """Fit fresh learned levels, in place, to the inputs that they get in `forward()`, from the first layer to the last.

    `forward` runs the model on a batch. Without calibration elastic levels start at width 1, whatever the size of the
    activations. Levels that were fitted or loaded before stay as they are.

    >>> from hf_bnn import binarize_
    >>> from hf_bnn.nn.levels import ElasticLevels
    >>> model = binarize_(nn.Sequential(nn.Linear(8, 8)), levels=lambda name: ElasticLevels())
    >>> _ = calibrate_(model, lambda: model(torch.full((4, 8), 0.25)))
    >>> model[0].input_levels.width.item()
    0.25
    """
    _run_watched(model, forward, lambda layer, inputs: layer.fit_levels(*inputs))
    return model


def _run_watched(model: nn.Module, forward: Callable[[], object], watch: Callable[[BinaryLayer, tuple], None]) -> None:
    """Call `forward()` in evaluation mode, and `watch(layer, inputs)` before each binary layer."""
    modes = [(module, module.training) for module in model.modules()]  # parts may be frozen in evaluation
    hooks = [layer.register_forward_pre_hook(watch) for layer in binary_layers(model)]
    try:
        model.eval()
        forward()
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


def drop_method(model: nn.Module) -> None:
    """Empty the slots of every remaining binary layer, which then only evaluates."""
    for layer in binary_layers(model):
        for slot in layer.slots:
            setattr(layer, slot, None)


def parts(model: nn.Module) -> Iterator[tuple[str, BinaryLayer, Part]]:
    """(name, layer, part) of every part in the model, in forward order."""
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryLayer):
            for slot, part in layer.parts():
                yield f"{name}.{slot}", layer, part


def method_state_names(model: nn.Module) -> list[str]:
    """The keys of `model.state_dict()` that belong to the method, not to the model."""
    return [f"{name}.{key}" for name, _, part in parts(model) for key in part.state_dict()]


def method_state(model: nn.Module) -> dict[str, Tensor]:
    """The method's tensors, by their names in `model.state_dict()`."""
    return {f"{name}.{key}": value for name, _, part in parts(model) for key, value in part.state_dict().items()}


def load_method_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Inverse of `method_state`. Raises ValueError, naming the first key, if `state` is another method's."""
    own = method_state(model)
    wrong = sorted(own.keys() ^ state.keys())
    if wrong:
        where = "not in the file" if wrong[0] in own else "unknown to this run's method"
        raise ValueError(f"the method's state does not fit: {wrong[0]!r} is {where}; resume with the same --method")
    for key, value in own.items():  # all of them before any is copied, which would broadcast
        if value.shape != state[key].shape:
            raise ValueError(
                f"the method's state does not fit: {key!r} has shape {tuple(state[key].shape)} in the file, "
                f"{tuple(value.shape)} in this run; resume with the same --method_args"
            )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])
