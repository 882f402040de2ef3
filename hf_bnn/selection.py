"""Chooses the layers of a model that become binary: patterns of module names, and defaults."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from .nn.direct_reads import reads_weight
from .nn.layers import BINARY_CLASSES, padding_of

FLOAT_NAMES = ("*pooler*", "*patch_embed*")
KINDS = "nn.Linear or nn.Conv2d"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name, as a whole, matches one of the shell-style patterns."""
    return any(name == pattern or (not _plain(pattern) and fnmatchcase(name, pattern)) for pattern in patterns)


def _plain(pattern: str) -> bool:
    """Whether the pattern matches only itself, as do most of the hundreds that a large model's config stores."""
    return "*" not in pattern and "?" not in pattern and "[" not in pattern


def pattern_list(field: str, patterns: object) -> list[str] | None:
    """The patterns as a list; None stays None. Raises ValueError unless they are a list, tuple or set of strings."""
    if patterns is None:
        return None
    if not isinstance(patterns, list | tuple | set) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{field}={patterns!r}: expected a list of patterns, as in {field}=['lm_head', '*.pooler']")
    return list(patterns)


def covered(name: str, patterns: Iterable[str], base: str = "") -> bool:
    """Whether a pattern matches the module or one that contains it, with or without the base model's prefix."""
    parts = name.split(".")
    within = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    if base:
        within += [*(f"{base}.{n}" for n in within), *(n.removeprefix(f"{base}.") for n in within)]
    return any(matches(n, patterns) for n in within)


def base_prefix(model: nn.Module) -> str:
    """The prefix of the encoder's module names in a transformers model; empty for any other model."""
    return model.base_model_prefix if _is_stock(model) else ""


def candidates(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The layers that have a binary form, each with all its names (several if it is shared)."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and type(module) in BINARY_CLASSES:  # the model itself cannot be replaced in place
            found.setdefault(module, []).append(name)
    return found


def choose_layers(
    model: nn.Module, include: list[str] | None, exclude: list[str], check: bool = True
) -> dict[nn.Module, str]:
    """The layers within `include` (None: all) and outside `exclude`, with their names.

    A layer registered under several names is left out if any of them is excluded. Raises ValueError if no layer is left
    and, if `check` is set, for a pattern that matches nothing and for a layer that cannot be binary.
    """
    base, layers = base_prefix(model), candidates(model)
    if check:
        check_patterns(model, "include", include, [name for names in layers.values() for name in names], KINDS)
        check_patterns(model, "exclude", exclude)
    chosen = {
        layer: names[0]
        for layer, names in layers.items()
        if include is None or any(covered(name, include, base) for name in names)
        if not any(covered(name, exclude, base) for name in names)
    }
    for name, reason in obstacles(model, chosen).items() if check else ():
        raise ValueError(f"{name!r} cannot be binary: {reason}. Add {name!r} to exclude")
    if not chosen:
        within = "" if include is None else f"within include={include} and "
        others = Counter(
            type(m).__name__ for m in model.modules() if hasattr(m, "weight") and type(m) not in BINARY_CLASSES
        )
        raise ValueError(
            f"nothing to binarize in {type(model).__name__}: no layer {within}outside exclude={exclude} is one of "
            f"{[cls.__name__ for cls in BINARY_CLASSES]}. Its other modules with weights, which cannot be binary, are "
            f"{dict(others)}"
        )
    return chosen


def unmatched(model: nn.Module, patterns: Iterable[str] | None, names: list[str] | None = None) -> list[str]:
    """The patterns that cover none of `names` (None: the names of all modules)."""
    names = _module_names(model) if names is None else names
    base, known = base_prefix(model), set(names)
    return [p for p in patterns or () if p not in known and not any(covered(name, [p], base) for name in names)]


def check_patterns(
    model: nn.Module, field: str, patterns: list[str] | None, names: list[str] | None = None, kind: str = "module"
) -> None:
    """Raise ValueError for the first pattern in `field` that covers none of `names` (None: of all modules' names)."""
    for pattern in unmatched(model, patterns, names):
        near = difflib.get_close_matches(pattern, _module_names(model) if names is None else names, 3, 0)
        raise ValueError(
            f"the {field} pattern {pattern!r} matches no {kind} of {type(model).__name__}; the nearest are {near}"
        )


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def default_exclude(model: nn.Module) -> list[str]:
    """The layers that stay float by default, by all their names.

    In any model these are the layers whose weights are read directly. In a transformers model, also one inside `model`:
    heads, poolers, layers that read the image, and layers that cannot be binary as well.
    """
    excluded = set(_read_directly(model))
    for stock in _stock_models(model):
        excluded.update(_kept_float(stock), filter(_own_obstacle, candidates(stock)))
    return [name for layer, names in candidates(model).items() if layer in excluded for name in names]


def head_layers(model: nn.Module) -> list[str]:
    """The linear and conv2d layers of a transformers model that are outside its base model, by all their names."""
    inside = set(model.base_model.modules())
    return [name for layer, names in candidates(model).items() if layer not in inside for name in names]


def _kept_float(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a transformers model that stay float by default."""
    ends, heads = _ends(model), set(head_layers(model))
    channels = {1, 3, getattr(model.config, "num_channels", 3)}
    # T5 casts the inputs of such a layer to its weight's dtype, which is uint8 in a packed layer.
    sensitive = set(model._keep_in_fp32_modules or ())
    for layer, names in candidates(model).items():
        reads_image = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels in channels
        if reads_image or any(
            name in ends or name in heads or matches(name, FLOAT_NAMES) or not sensitive.isdisjoint(name.split("."))
            for name in names
        ):
            yield layer


def _ends(model: nn.Module) -> set[str]:
    """The names of tied modules, output embeddings and the last module: transformers' own quantizers skip them."""
    output = model.get_output_embeddings()
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # None in a class that never calls post_init
    last = list(model.named_parameters())[-1:]
    keys = [*tied, *tied.values(), *(name for name, _ in last)]
    names = {name for name, module in model.named_modules() if output is not None and module is output}
    return names | {key.removesuffix(".weight").removesuffix(".bias") for key in keys}


def _stock_models(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost transformers models in `model`, or `model` itself."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if _is_stock(module) and module not in inside:
            inside.update(module.modules())
            yield module


def _is_stock(model: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")  # None: never imported, so it has no instances
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _read_directly(model: nn.Module) -> dict[nn.Module, str]:
    """The linear and conv2d layers whose parent module reads their weights, with the parent's class."""
    return {
        layer: type(parent).__name__
        for parent in model.modules()
        for name, layer in parent._modules.items()
        if type(layer) in BINARY_CLASSES and reads_weight(parent, name)
    }


def obstacles(model: nn.Module, layers: dict[nn.Module, str]) -> dict[str, str]:
    """{name: reason} of those of the given layers that cannot be binary."""
    readers = _read_directly(model)
    found: dict[str, str] = {}
    for layer, name in layers.items():
        reason = _own_obstacle(layer)
        if layer in readers:
            reason = f"{readers[layer]} reads its weight instead of calling it, at least in training: it would be float"
        if reason:
            found[name] = reason
    return found


def _own_obstacle(layer: nn.Module) -> str | None:
    if "weight" not in layer._parameters:
        return "its weight is computed from other parameters (weight_norm or spectral_norm), which it would lose"
    try:
        if isinstance(layer, nn.Conv2d):
            padding_of(layer)
    except ValueError as error:
        return str(error)
    return None
