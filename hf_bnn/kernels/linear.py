"""Products of vectors with 1-bit weights: `hf_bnn::linear`, `hf_bnn::linear_weight_only`."""

import torch
from torch import Tensor

from . import reference
from .library import backend, call, threads_for
from .operands import (
    Threshold,
    as_rows,
    check_features,
    check_linear,
    define_op,
    floats,
    runs_compiled,
    split_threshold,
)
from .weights import LinearWeight

# Without a look-up of 16 floats, an unpacked weight and torch's product of floats are faster from here on.
MANY_ROWS = 8
LOOKS_UP = ("avx512", "avx512bw")


def linear(
    x: Tensor, weight: LinearWeight, scale: Tensor, offset: Tensor | None = None, threshold: float | Tensor = 0.0
) -> Tensor:
    """`(..., in)` to `(..., out)`: binary inputs times binary weights.

    `scale` and `offset` hold a number per output, `threshold` one number or one per input.
    """
    check_features(x, weight)
    level, levels = split_threshold(threshold)
    return torch.ops.hf_bnn.linear(x, weight.data, scale, offset, level, levels)


def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    threshold: float = 0.0,
    thresholds: Tensor | None = None,
) -> Tensor:
    check_linear(x, weight, scale, offset, thresholds)
    chosen = runs_compiled(x, weight, thresholds)
    if chosen is None:
        return reference.linear(x, weight, scale, offset, threshold, thresholds)
    rows, out = as_rows(x), scale.shape[0]
    count, size = rows.shape
    level, scales, offsets = Threshold(x, threshold, thresholds), floats(scale, out), floats(offset, out)
    weight = weight.contiguous()
    y = torch.empty((*x.shape[:-1], out))
    call(
        "hf_bnn_linear",
        chosen,
        *threads_for(count * size * out),
        *(rows.data_ptr(), rows.stride(0), count, size),
        *(level.address, level.per_input),
        *(weight.data_ptr(), out, scales.data_ptr(), offsets.data_ptr()),
        y.data_ptr(),
    )
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _fake_linear(x: Tensor, weight: Tensor, scale: Tensor, *settings: object, **named: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


define_op(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None, float threshold=0.0, "
    "Tensor? thresholds=None) -> Tensor",
    _linear,
    reference.linear,
    _fake_linear,
)


def linear_weight_only(x: Tensor, weight: LinearWeight, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """`(..., in)` to `(..., out)`: float inputs times binary weights.

    Sums in float32 in an order of its own: close to F.linear's, not equal.
    """
    check_features(x, weight)
    return torch.ops.hf_bnn.linear_weight_only(x, weight.data, scale, offset)


def _linear_weight_only(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    check_linear(x, weight, scale, offset, None)
    chosen = runs_compiled(x, weight)
    if chosen is None or (x.shape[:-1].numel() > MANY_ROWS and backend() not in LOOKS_UP):
        return reference.linear_weight_only(x, weight, scale, offset)
    rows, out = as_rows(x), scale.shape[0]
    count, size = rows.shape
    scales, offsets = floats(scale, out), floats(offset, out)
    weight = weight.contiguous()
    y = torch.empty((*x.shape[:-1], out))
    call(
        "hf_bnn_linear_weight_only",
        chosen,
        *threads_for(16 * count * size * out),  # a sixteenth of the speed of binary inputs
        *(rows.data_ptr(), rows.stride(0), count, size),
        *(weight.data_ptr(), out, scales.data_ptr(), offsets.data_ptr()),
        y.data_ptr(),
    )
    return y if x.dtype == torch.float32 else y.to(x.dtype)


define_op(
    "linear_weight_only(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None) -> Tensor",
    _linear_weight_only,
    reference.linear_weight_only,
    _fake_linear,
)
