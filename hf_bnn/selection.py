"""Which layers of a transformers model become binary: patterns over module names, and what stays float by default."""

import difflib
from collections import Counter

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from .convert import BINARY, matches
from .layers import padding_of

FLOAT_NAMES = ("*pooler*", "*patch_embed*")


def covered(name: str, patterns: list[str], base: str) -> bool:
    """Whether a pattern matches the module or one that it is in, with or without the base model's prefix."""
    parts = name.split(".")
    within = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    names = [*within, *(f"{base}.{n}" for n in within), *(n.removeprefix(f"{base}.") for n in within)]
    return any(matches(n, patterns) for n in names)


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the kinds that have a binary form, by name."""
    return {name: module for name, module in model.named_modules() if type(module) in BINARY}


def choose_layers(model: PreTrainedModel, include: list[str] | None, exclude: list[str]) -> list[str]:
    """The names of the layers within `include` (None: all) and outside `exclude`.

    Raises ValueError for one that cannot be binary, and if there is none.
    """
    base, layers = model.base_model_prefix, candidates(model)
    wanted = [name for name in layers if include is None or covered(name, include, base)]
    chosen = [name for name in wanted if not covered(name, exclude, base)]
    for name in chosen:
        if reason := obstacle(layers[name]):
            raise ValueError(f"{name!r} cannot be binary: {reason}. Add {name!r} to exclude")
    if not chosen:
        others = Counter(type(m).__name__ for m in model.modules() if hasattr(m, "weight") and type(m) not in BINARY)
        raise ValueError(
            f"nothing to binarize in {type(model).__name__}: no module within include={include} and outside "
            f"exclude={exclude} is one of {[cls.__name__ for cls in BINARY]}. Its other modules with weights, "
            f"which cannot be binary, are {dict(others)}"
        )
    return chosen


def check_patterns(model: PreTrainedModel, field: str, patterns: list[str] | None, names: list[str], kind: str) -> None:
    """Raise ValueError for the first of the patterns of a config's `field` that covers none of `names`."""
    for pattern in patterns or ():
        if not any(covered(name, [pattern], model.base_model_prefix) for name in names):
            near = difflib.get_close_matches(pattern, names, 3, 0)
            raise ValueError(
                f"the {field} pattern {pattern!r} matches no {kind} of {type(model).__name__}; the nearest are {near}"
            )


def default_exclude(model: PreTrainedModel) -> list[str]:
    """The layers that stay float unless told otherwise: heads, what reads the image, poolers, what cannot be binary."""
    upstream = {key.removesuffix(".bias") for key in get_keys_to_not_convert(model)}
    heads, channels = set(head_layers(model)), {1, 3, getattr(model.config, "num_channels", 3)}
    # T5 casts the inputs of such a layer to the dtype of its weight, which is uint8 when it is packed.
    sensitive = set(model._keep_in_fp32_modules or ())
    return [
        name
        for name, layer in candidates(model).items()
        if name in upstream
        or name in heads
        or not sensitive.isdisjoint(name.split("."))
        or matches(name, FLOAT_NAMES)
        or (isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels in channels)
        or obstacle(layer)
    ]


def head_layers(model: PreTrainedModel) -> list[str]:
    """The linear and conv2d layers outside the base model, by name."""
    inside = set(model.base_model.modules())
    return [name for name, layer in candidates(model).items() if layer not in inside]


def obstacle(layer: nn.Module) -> str | None:
    """Why a linear or conv2d layer cannot be binary; None if it can."""
    try:
        if isinstance(layer, nn.Conv2d):
            padding_of(layer)
    except ValueError as error:
        return str(error)
    return None
