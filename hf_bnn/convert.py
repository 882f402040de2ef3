"""Float to binary (for training), binary to packed (for inference), and back."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from .layers import BinaryConv2d, BinaryLinear, binary_layers
from .levels import ElasticLevels, SignedLevels
from .packed import PACKED, is_packed

if TYPE_CHECKING:  # at run time only training needs the methods: inference works without them
    from .methods.base import Method


BINARY = {nn.Linear: BinaryLinear, nn.Conv2d: BinaryConv2d}


def matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    """Whether a module's dotted name matches one of the shell-style patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def replace_modules(model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> list[str]:
    """Swap, in place, every module for which `replacement(name, module)` is not None; return their names."""
    done = []
    for name, module in list(model.named_modules()):
        new = replacement(name, module) if name else None
        if new is not None:
            model.set_submodule(name, new)
            done.append(name)
    return done


def install_method(model: nn.Module, method: Method | None = None) -> nn.Module:
    """Give every binary layer the method's parts, in place. Whatever an earlier method left is dropped.

    None stands for the straight-through estimator.
    """
    from .methods.base import Method, Site

    method = method or Method()
    layers = binary_layers(model)
    for index, layer in enumerate(layers):
        weight = getattr(layer, "weight", None)
        layer.install(method, Site(index, len(layers), None if weight is None else tuple(weight.shape)))
        for _, part in layer.parts():
            part.train(layer.training)
    return model


def binarize_(
    model: nn.Module,
    method: Method | None = None,
    skip: tuple[str, ...] | list[str] = (),
    binarize: str = "both",
    levels: Callable[[str], SignedLevels] | None = None,
    weight_scaling: str = "channel",
) -> nn.Module:
    """Turn every `nn.Linear` and `nn.Conv2d` whose name matches no pattern in `skip` into a binary layer, in place.

    The float weights become the latent weights. `levels(name)` makes the levels of a layer's input ({-1, 1} unless
    given). `binarize`: "both", "weights" or "activations". `weight_scaling`: "channel", "layer" or "none". Raises
    ValueError if nothing is left to binarize.

    >>> model = binarize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), skip=("2",))
    >>> [type(module).__name__ for module in model]
    ['BinaryLinear', 'ReLU', 'Linear']
    """

    to_binary_(model, skip, binarize, levels, weight_scaling)
    return install_method(model, method)


def to_binary_(
    model: nn.Module,
    skip: tuple[str, ...] | list[str] = (),
    binarize: str = "both",
    levels: Callable[[str], SignedLevels] | None = None,
    weight_scaling: str = "channel",
) -> nn.Module:
    """`binarize_` without a method: the layers evaluate, but cannot be trained yet."""

    def binary(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) not in BINARY or matches(name, skip):
            return None
        return BINARY[type(module)].from_float(module, binarize, levels(name) if levels else None, weight_scaling)

    if not replace_modules(model, binary):
        kinds = [cls.__name__ for cls in BINARY]
        raise ValueError(f"nothing to binarize: no layer outside skip={tuple(skip)} is one of {kinds}")
    return model


@torch.no_grad()
def calibrate_(model: nn.Module, run: Callable[[], object]) -> nn.Module:
    """Fit the learned levels that are still fresh to the inputs that they see in `run()`, in place, first layers first.

    Without it elastic levels start at width 1, whatever the size of the activations. Levels that were fitted or loaded
    before stay as they are.

    >>> model = binarize_(nn.Sequential(nn.Linear(8, 8)), levels=lambda name: ElasticLevels())
    >>> _ = calibrate_(model, lambda: model(torch.full((4, 8), 0.25)))
    >>> model[0].input_levels.width.item()
    0.25
    """
    training = model.training
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: layer.fit_levels(*inputs))
        for layer in binary_layers(model)
    ]
    try:
        model.eval()
        run()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return model


@torch.no_grad()
def pack_(model: nn.Module) -> nn.Module:
    """Replace latent weights by their bits, in place, and switch to evaluation. The model can no longer be trained.

    Raises ValueError if there is nothing to pack.

    >>> model = pack_(binarize_(nn.Sequential(nn.Linear(8, 8))))
    >>> model[0].weight.dtype, model[0].weight.shape
    (torch.uint8, torch.Size([8, 1]))
    """

    def packed(name: str, module: nn.Module) -> nn.Module | None:
        return PACKED[type(module)].from_latent(module) if _packs(module) else None

    if not replace_modules(model, packed):
        reason = "it is packed already" if is_packed(model) else "it has no binary weights and no rounded embeddings"
        raise ValueError(f"nothing to pack in {type(model).__name__}: {reason}")
    drop_method(model)
    return model.eval()


def has_fresh_levels(model: nn.Module) -> bool:
    """Whether any learned levels are as they were made: neither fitted, nor trained, nor loaded."""
    return any(isinstance(module, ElasticLevels) and module.fresh for module in model.modules())


def can_pack(model: nn.Module) -> bool:
    """Whether `pack_` would find anything."""
    return any(_packs(module) for module in model.modules())


def empty_packed_(model: nn.Module) -> nn.Module:
    """Like `pack_`, but leaves the bits to be loaded: works on the meta device."""
    replace_modules(model, lambda _, module: PACKED[type(module)].empty_like(module) if _packs(module) else None)
    drop_method(model)
    return model.eval()


@torch.no_grad()
def unpack_(model: nn.Module) -> nn.Module:
    """Turn packed layers back into trainable ones, in place: latent weights are the signs times their scale.

    The model computes what it did, up to the last bit of the scales. Raises ValueError if nothing is packed.
    """

    def latent(name: str, module: nn.Module) -> nn.Module | None:
        return module.to_latent().train(module.training) if isinstance(module, tuple(PACKED.values())) else None

    if not replace_modules(model, latent):
        raise ValueError(f"nothing to unpack: {type(model).__name__} has no packed layer")
    return install_method(model)


def drop_method(model: nn.Module) -> None:
    """Empty the slots of every binary layer that is left: it then only evaluates."""
    for layer in binary_layers(model):
        for slot in layer.slots:
            setattr(layer, slot, None)


def _packs(module: nn.Module) -> bool:
    return type(module) in PACKED and getattr(module, "binarize", "both") != "activations"
