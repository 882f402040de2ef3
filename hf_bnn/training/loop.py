"""The hooks of a training method in a training loop: two calls a step, and optimizer groups. Needs torch only.

>>> import torch.nn.functional as F
>>> from hf_bnn import binarize_, make_method
>>> from hf_bnn.methods import Step
>>> method = make_method("stompp+surge")
>>> model = binarize_(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)), method, exclude=["2"]).train()
>>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
>>> hook_optimizer(model, optimizer, method)
>>> for index in range(10):
...     step = Step(index, total=10, lr=0.1)
...     begin_step(model, step)
...     F.cross_entropy(model(torch.randn(4, 8)), torch.tensor([0, 1, 0, 1])).backward()
...     end_backward(model, step)
...     optimizer.step()
...     optimizer.zero_grad()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..install import parts
from ..nn.layers import binary_layers
from ..nn.levels import SignedLevels
from ..nn.scalar_levels import take_scalar_states

if TYPE_CHECKING:
    from ..methods.base import Method, Step


def begin_step(model: nn.Module, step: Step) -> None:
    """Call it before the first forward pass of an optimizer step."""
    for _, layer, part in parts(model):
        part.begin_step(layer, step)
    for layer in binary_layers(model):
        layer.begin_step()


def end_backward(model: nn.Module, step: Step) -> None:
    """Call it after the last backward pass of an optimizer step, before `optimizer.step()`."""
    for layer in binary_layers(model):
        layer.end_backward()
    for _, layer, part in parts(model):
        part.end_backward(layer, step)


def hook_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, method: Method) -> None:
    """Let `method`, which is installed in `model`, hook into the optimizer. Call it once, before the first step."""
    take_scalar_states(optimizer)
    layers = [layer for layer in binary_layers(model) if layer.binary_weight]
    method.optimizer_hook(optimizer, [(layer.weight_binarizer.site, layer) for layer in layers])


@contextlib.contextmanager
def partial_evaluation(model: nn.Module) -> Iterator[None]:
    """Within this context the model evaluates partly binary, as StoMPP's training has left it, not fully binary."""
    layers = binary_layers(model)
    try:
        for layer in layers:
            layer.partial = True
        yield
    finally:
        for layer in layers:
            layer.partial = False


def statistics(model: nn.Module) -> dict[str, float]:
    """The statistics that the parts recorded in the last logged step: `{"layer name/statistic": value}`."""
    found = {}
    for name, _, part in parts(model):
        layer = name.rpartition(".")[0]
        found.update({f"{layer}/{key}": value for key, value in part.statistics().items()})
    return found


class ParameterRoles(NamedTuple):
    """The model's trainable parameters by role. Each is in exactly one list."""

    latent: list[nn.Parameter]  # weights of which the forward pass uses only the sign: no weight decay
    levels: list[nn.Parameter]  # scales and thresholds: no weight decay
    method: list[nn.Parameter]  # the method's own, removed after training
    float: list[nn.Parameter]  # everything else


def parameter_roles(model: nn.Module) -> ParameterRoles:
    """Which parameters are latent, levels, the method's own, or plain float."""
    role: dict[nn.Parameter, str] = {}
    for layer in binary_layers(model):
        if layer.binary_weight:
            role[layer.weight] = "latent"
    for module in model.modules():
        if isinstance(module, SignedLevels):
            role.update(dict.fromkeys(module.parameters(), "levels"))
    for _, _, part in parts(model):
        role.update(dict.fromkeys(part.parameters(), "method"))
    roles = ParameterRoles([], [], [], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            getattr(roles, role.get(parameter, "float")).append(parameter)
    return roles


def split_groups(
    groups: list[dict], roles: ParameterRoles, levels_multiplier: float = 1.0, method_multiplier: float = 1.0
) -> list[dict]:
    """An optimizer's parameter groups, split into float, latent, levels and method parameters.

    Every group keeps the options of its original, and its `role` names its content. All but float groups have no
    weight decay. The learning rates of levels and method groups are multiplied.
    """
    kinds = (
        ("latent", roles.latent, 1.0),
        ("levels", roles.levels, levels_multiplier),
        ("method", roles.method, method_multiplier),
    )
    result = []
    special = {id(p) for _, members, _ in kinds for p in members}
    for group in groups:
        rest = [p for p in group["params"] if id(p) not in special]
        if rest:
            result.append({**group, "params": rest, "role": "float"})
        present = {id(p) for p in group["params"]}
        for role, members, multiplier in kinds:
            chosen = [p for p in members if id(p) in present]
            if chosen:
                options = {"weight_decay": 0.0, "lr": group["lr"] * multiplier, "role": role}
                result.append({**group, "params": chosen, **options})
    return result


def first_nonfinite_layer(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The first module, in the order of `run()`, whose output has a NaN or an infinity, by name; None without any."""
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            tensors = [t for t in _tensors(output) if t.is_floating_point()]
            if not found and any(not bool(t.isfinite().all()) for t in tensors):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in _tensors(item))
    elif isinstance(value, list | tuple):
        yield from (t for item in value for t in _tensors(item))
