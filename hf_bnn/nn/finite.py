"""Checks for NaN and infinity before packing or saving: bits cannot store them, and signs would hide them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import BinaryLayer

BUFFERS = ("running_mean", "running_var", "weight_scale")  # that must be finite; others may hold -inf, as masks do


def check_finite(doing: str, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of the named tensors that holds a NaN or an infinity. `doing`: as in "pack X"."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
            continue
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise ValueError(
                f"cannot {doing}: {bad} of the {tensor.numel()} values of {name!r} are NaN or infinite, which "
                "signs would hide. Training has diverged, or the checkpoint is damaged: go back to an earlier one, "
                "and train on with a lower learning rate"
            )


def tensors_to_check(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that must be finite, by name, without those of a training method."""
    parts = {
        inner
        for layer in model.modules()
        if isinstance(layer, BinaryLayer)
        for _, part in layer.parts()
        for inner in part.modules()
    }
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if module in parts:
            continue
        buffers = ((name, buffer) for name, buffer in module.named_buffers(recurse=False) if name in BUFFERS)
        for name, tensor in (*module.named_parameters(recurse=False), *buffers):
            found[f"{prefix}.{name}" if prefix else name] = tensor
    return found
