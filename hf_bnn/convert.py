"""Converts float models to binary ones (for training), binary to packed ones (for inference), and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from .fused import restore_
from .install import binary_fraction, drop_method, install_method
from .nn.fast_path import leave_fast_path_
from .nn.finite import check_finite, tensors_to_check
from .nn.layers import BINARY_CLASSES, WeightedLayer, binary_layers
from .nn.levels import LearnedLevels, SignedLevels
from .nn.packed import PACKED, is_packed
from .selection import choose_layers, default_exclude, pattern_list

if TYPE_CHECKING:  # at run time only training needs the methods: inference works without them
    from .methods.base import Method


def replace_modules(model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> list[str]:
    """Swap, in place, every module for which `replacement(name, module)` is not None; return their names.

    A module registered under several names is passed under its first name and swapped under all. All replacements are
    made before any is swapped in: if one fails, the model is unchanged.
    """
    made = {module: replacement(name, module) for name, module in model.named_modules() if name}
    names = [name for name, module in model.named_modules() if made.get(module) is not None]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if made.get(module) is not None:
            model.set_submodule(name, made[module])
    return names


def binarize_(
    model: nn.Module,
    method: Method | None = None,
    exclude: tuple[str, ...] | list[str] | None = None,
    binarize: str = "both",
    levels: Callable[[str], SignedLevels] | None = None,
    weight_scaling: str = "channel",
    *,
    skip: tuple[str, ...] | list[str] | None = None,
) -> nn.Module:
    """Turn every `nn.Linear` and `nn.Conv2d` outside `exclude` into a binary layer, in place.

    The float weights become the latent weights: the float parameters whose signs the binary layers use.

    - `exclude`: shell-style patterns of module names; a pattern covers everything in a matching module. None, in a
      transformers model: heads, poolers and layers that read the image, as in `BinaryConfig`. None, in other models:
      layers whose weights are known to be read directly. `nn.MultiheadAttention` always stays float, because it never
      calls its projections. `skip` is an older name of `exclude`.
    - `binarize`: "both", "weights" or "activations".
    - `levels(name)`: makes the levels of a layer's input; {-1, 1} unless given.
    - `weight_scaling`: "channel", "layer" or "none".

    Raises ValueError for a pattern that matches nothing, for a model that is already binary, and if no layer is left.

    >>> model = binarize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), exclude=["2"])
    >>> [type(module).__name__ for module in model]
    ['BinaryLinear', 'ReLU', 'Linear']
    """
    if skip is not None and exclude is not None:
        raise ValueError(f"exclude={exclude!r} and skip={skip!r}: skip is an older name of exclude; give one of them")
    if is_binary(model):
        raise ValueError(
            f"{type(model).__name__} is binary already: call hf_bnn.install_method(model, method) to change its method "
            "(and hf_bnn.unpack_ before it, if it is packed), or start from the float model to make other layers binary"
        )
    patterns = pattern_list("exclude", skip if exclude is None else exclude)
    layers = choose_layers(model, None, default_exclude(model) if patterns is None else patterns)
    to_binary_(model, layers, binarize, levels, weight_scaling)
    return install_method(model, method)


def is_binary(model: nn.Module) -> bool:
    """Whether any linear or conv2d layer of `model` is binary already, or anything in it is packed."""
    return is_packed(model) or any(isinstance(layer, WeightedLayer) for layer in binary_layers(model))


def to_binary_(
    model: nn.Module,
    layers: dict[nn.Module, str],
    binarize: str = "both",
    levels: Callable[[str], SignedLevels] | None = None,
    weight_scaling: str = "channel",
) -> nn.Module:
    """Turn the given layers, with their names, into binary ones, in place. Without a method they only evaluate."""

    def binary(_: str, module: nn.Module) -> nn.Module | None:
        if module not in layers:
            return None
        input_levels = levels(layers[module]) if levels else None
        return BINARY_CLASSES[type(module)].from_float(module, binarize, input_levels, weight_scaling)

    replace_modules(model, binary)
    return leave_fast_path_(model)


def to_packed_(
    model: nn.Module,
    layers: dict[nn.Module, str],
    binarize: str = "both",
    levels: Callable[[str], SignedLevels] | None = None,
    weight_scaling: str = "channel",
) -> nn.Module:
    """Turn the given float layers, with their names, and all rounded tables into packed ones, in place.

    Their bits are still to be loaded. Works on the meta device.
    """
    if binarize == "activations":  # such layers have no packed form: the tables alone are packed
        return empty_packed_(to_binary_(model, layers, binarize, levels, weight_scaling))

    def packed(_: str, module: nn.Module) -> nn.Module | None:
        if module not in layers:
            return PACKED[type(module)].empty_like(module) if _packs(module) else None
        both = binarize == "both"
        input_levels = levels(layers[module]) if levels and both else None
        return PACKED[BINARY_CLASSES[type(module)]].empty(module, input_levels, both, weight_scaling)

    replace_modules(model, packed)
    return leave_fast_path_(model).eval()


@torch.no_grad()
def pack_(model: nn.Module, allow_unfinished: bool = False) -> nn.Module:
    """Replace latent weights by their bits, in place, and switch to evaluation. The model can no longer be trained.

    Raises ValueError, and leaves the model unchanged, if there is nothing to pack, if a weight, scale, level or
    normalization is NaN or infinite, and, unless `allow_unfinished` is set, if the method has not made the whole model
    binary (a StoMPP run that was stopped early).

    >>> model = pack_(binarize_(nn.Sequential(nn.Linear(8, 8))))
    >>> model[0].weight.dtype, model[0].weight.shape
    (torch.uint8, torch.Size([8, 1]))
    """

    if (fraction := binary_fraction(model)) < 1 and not allow_unfinished:
        raise ValueError(
            f"the method has made only {fraction:.3f} of this {type(model).__name__} binary: packed, it would compute "
            "something else than in training. Train to the end, or pack it anyway with allow_unfinished=True"
        )

    def packed(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, WeightedLayer) and type(module) not in PACKED and module.binary_weight:
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, which has no packed form: if it has parametrizations, remove "
                "them first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        if not _packs(module):
            return None
        bits = PACKED[type(module)].from_latent(module)
        scale = {f"{name}.weight_scale": bits.weight_scale}  # float16 may overflow
        check_finite(f"pack {type(model).__name__}", scale)
        return bits

    check_finite(f"pack {type(model).__name__}", tensors_to_check(model))
    if not replace_modules(model, packed):
        reason = "it is packed already" if is_packed(model) else "it has no binary weights and no rounded embeddings"
        raise ValueError(f"nothing to pack in {type(model).__name__}: {reason}")
    drop_method(model)
    set_weight_format(model)
    return leave_fast_path_(model).eval()


def set_weight_format(model: nn.Module) -> None:
    """Write into the config of every binary model in `model`, in place, whether its weights are packed.

    Nested models count: a detector's config holds that of its backbone, from which the backbone is built again.
    """
    for module in model.modules():
        config = getattr(module, "binary_config", None)
        if hasattr(config, "weight_format"):
            latent = "float" if config.binarize == "none" else "latent"
            config.weight_format = "packed" if is_packed(module) else latent


def has_fresh_levels(model: nn.Module) -> bool:
    """Whether any learned levels still have their initial values: neither fitted, trained nor loaded."""
    return any(isinstance(module, LearnedLevels) and module.fresh for module in model.modules())


def can_pack(model: nn.Module) -> bool:
    """Whether the model has anything that `pack_` replaces."""
    return any(_packs(module) for module in model.modules())


def empty_packed_(model: nn.Module) -> nn.Module:
    """Like `pack_`, but leaves the bits to be loaded: works on the meta device."""
    replace_modules(model, lambda _, module: PACKED[type(module)].empty_like(module) if _packs(module) else None)
    drop_method(model)
    return leave_fast_path_(model).eval()


@torch.no_grad()
def unpack_(model: nn.Module) -> nn.Module:
    """Turn packed layers back into trainable ones, in place: latent weights are the signs times their scale.

    The outputs stay the same, up to the last bit of the scales. Raises ValueError if nothing is packed.
    """

    def latent(name: str, module: nn.Module) -> nn.Module | None:
        return module.to_latent().train(module.training) if isinstance(module, tuple(PACKED.values())) else None

    restore_(model)
    if not replace_modules(model, latent):
        raise ValueError(f"nothing to unpack: {type(model).__name__} has no packed layer")
    set_weight_format(model)
    return install_method(model)


def _packs(module: nn.Module) -> bool:
    return type(module) in PACKED and getattr(module, "binarize", "both") != "activations"
