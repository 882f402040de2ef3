"""Two binary layers with an activation between them: `hf_bnn::ffn`."""

import torch
from torch import Tensor

from . import reference
from .library import call, threads_for
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


def ffn(
    x: Tensor,
    first: LinearWeight,
    first_scale: Tensor,
    first_offset: Tensor | None,
    interval: tuple[float, float],
    second: LinearWeight,
    second_scale: Tensor,
    second_offset: Tensor | None,
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """`(..., in)` to `(..., out)` through a binary layer, an activation and a second binary layer.

    A hidden value h counts as -1 where `interval[0] <= h < interval[1]`, which holds activation and threshold in one.
    """
    check_features(x, first)
    if second.in_features != first.out_features:
        raise ValueError(f"the second layer takes {second.in_features} inputs: expected {first.out_features}")
    level, levels = split_threshold(threshold)
    hidden = (first.data, first_scale, first_offset, *interval)
    return torch.ops.hf_bnn.ffn(x, *hidden, second.data, second_scale, second_offset, level, levels)


def _ffn(
    x: Tensor,
    first: Tensor,
    first_scale: Tensor,
    first_offset: Tensor | None,
    low: float,
    high: float,
    second: Tensor,
    second_scale: Tensor,
    second_offset: Tensor | None,
    threshold: float = 0.0,
    thresholds: Tensor | None = None,
) -> Tensor:
    hidden, out = first_scale.shape[0], second_scale.shape[0]
    check_linear(x, first, first_scale, first_offset, thresholds)
    check_linear(x.new_empty((0, hidden)), second, second_scale, second_offset, None)
    if not low <= high:
        raise ValueError(f"low={low}, high={high}: expected an interval, low <= high")
    chosen = runs_compiled(x, first, thresholds)
    if chosen is None or second.dtype != torch.int32 or x.dtype != torch.float32:  # others round hidden values
        layers = (first, first_scale, first_offset, low, high, second, second_scale, second_offset)
        return reference.ffn(x, *layers, threshold, thresholds)
    rows = as_rows(x)
    count, size = rows.shape
    level = Threshold(x, threshold, thresholds)
    scales, offsets = floats(first_scale, hidden), floats(first_offset, hidden)
    out_scales, out_offsets = floats(second_scale, out), floats(second_offset, out)
    first, second = first.contiguous(), second.contiguous()
    y = torch.empty((*x.shape[:-1], out))
    call(
        "hf_bnn_ffn",
        chosen,
        *threads_for(count * hidden * (size + out)),
        *(rows.data_ptr(), rows.stride(0), count, size),
        *(level.address, level.per_input),
        *(first.data_ptr(), hidden, scales.data_ptr(), offsets.data_ptr()),
        *(low, high),
        *(second.data_ptr(), out, out_scales.data_ptr(), out_offsets.data_ptr()),
        y.data_ptr(),
    )
    return y


def _fake_ffn(
    x: Tensor,
    first: Tensor,
    first_scale: Tensor,
    first_offset: Tensor | None,
    low: float,
    high: float,
    second: Tensor,
    second_scale: Tensor,
    *settings: object,
    **named: object,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], second_scale.shape[0]))


define_op(
    "ffn(Tensor x, Tensor first, Tensor first_scale, Tensor? first_offset, float low, float high, Tensor second, "
    "Tensor second_scale, Tensor? second_offset, float threshold=0.0, Tensor? thresholds=None) -> Tensor",
    _ffn,
    reference.ffn,
    _fake_ffn,
)
