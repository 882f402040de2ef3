"""Fuses two binary layers with an activation between them, so that the hidden values stay bits."""

import math

import torch
from torch import nn

from .. import kernels
from .layers import KernelLinear


@torch.no_grad()
def hidden_interval(first: nn.Module, activation: nn.Module, second: nn.Module) -> tuple[float, float] | None:
    """The interval (low, high) of hidden values low <= h < high that become the low level of the inputs of `second`.

    It is exact for any elementwise activation: a binary layer has only `in + 1` different outputs per channel, and all
    are tried. None if the layers cannot be fused or the values do not form an interval.
    """
    if not all(isinstance(layer, KernelLinear) and layer.binary_inputs for layer in (first, second)):
        return None
    if first.out_features != second.in_features or second.kernel_threshold.dim():
        return None
    scale, size = first.kernel_scale, first.in_features
    sums = torch.arange(-size, size + 1, 2, dtype=torch.float32, device=scale.device).unsqueeze(1)
    hidden = sums * scale
    hidden = hidden if first.kernel_offset is None else hidden.add_(first.kernel_offset)
    low = activation(hidden) < second.kernel_threshold
    if not hidden.isfinite().all():
        return None
    if not low.any():
        return math.inf, math.inf
    inside = hidden[low]
    least, most = inside.min(), inside.max()
    if not low[(hidden >= least) & (hidden <= most)].all():
        return None
    return least.item(), torch.nextafter(most, torch.full_like(most, math.inf)).item()


def feed_forward(first: KernelLinear, interval: tuple[float, float], second: KernelLinear) -> kernels.FfnCall:
    """A call of both layers, `(..., in)` to `(..., out)`, equal to running one after the other."""
    weight, scale, offset, threshold = first.operands()
    out_weight, out_scale, out_offset, _ = second.operands()
    return kernels.FfnCall(weight, scale, offset, interval, out_weight, out_scale, out_offset, threshold)
