"""Two binary layers with an activation between them: `hf_bnn::ffn`."""

import torch
from torch import Tensor

from . import reference
from .calls import Call
from .library import FfnPlan
from .operands import (
    Threshold,
    check_features,
    check_linear,
    define_op,
    like_inputs,
    linear_plan,
    parts_of,
    run_plan,
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
    _check(x, first, first_scale, first_offset, low, high, second, second_scale, second_offset, thresholds)
    chosen = runs_compiled(x, first, thresholds)
    if chosen is None or second.dtype != torch.int32 or x.dtype != torch.float32:  # others round hidden values
        layers = (first, first_scale, first_offset, low, high, second, second_scale, second_offset)
        return reference.ffn(x, *layers, threshold, thresholds)
    size, level = x.shape[-1], Threshold(x, threshold, thresholds)
    plan = _plan(chosen, size, first, first_scale, first_offset, low, high, second, second_scale, second_offset, level)
    return run_plan("hf_bnn_ffn", plan, x, out, hidden * (size + out))


def _check(
    x: Tensor,
    first: Tensor,
    first_scale: Tensor,
    first_offset: Tensor | None,
    low: float,
    high: float,
    second: Tensor,
    second_scale: Tensor,
    second_offset: Tensor | None,
    thresholds: Tensor | None,
) -> None:
    check_linear(x, first, first_scale, first_offset, thresholds)
    check_linear(x.new_empty((0, first_scale.shape[0])), second, second_scale, second_offset, None)
    if parts_of(thresholds) > 1:
        raise ValueError(f"thresholds has shape {tuple(thresholds.shape)}: a layer of an ffn has no parts")
    if not low <= high:
        raise ValueError(f"low={low}, high={high}: expected an interval, low <= high")


def _plan(
    chosen: int,
    size: int,
    first: Tensor,
    first_scale: Tensor,
    first_offset: Tensor | None,
    low: float,
    high: float,
    second: Tensor,
    second_scale: Tensor,
    second_offset: Tensor | None,
    level: Threshold,
) -> FfnPlan:
    plans = (
        linear_plan(chosen, size, first, first_scale, first_offset, level),
        linear_plan(chosen, first_scale.shape[0], second, second_scale, second_offset),
    )
    plan = FfnPlan(*plans, low, high)
    plan.kept = plans
    return plan


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


class FfnCall(Call):
    """`ffn` of fixed weights in a fraction of the time that its op takes to be called."""

    function, op = "hf_bnn_ffn", staticmethod(ffn)

    def __init__(
        self,
        first: LinearWeight,
        first_scale: Tensor,
        first_offset: Tensor | None,
        interval: tuple[float, float],
        second: LinearWeight,
        second_scale: Tensor,
        second_offset: Tensor | None,
        threshold: float | Tensor = 0.0,
    ):
        super().__init__(first, first_scale, first_offset, interval, second, second_scale, second_offset, threshold)
        x, (level, levels) = like_inputs(first), split_threshold(threshold)
        layers = (first.data, first_scale, first_offset, *interval, second.data, second_scale, second_offset)
        _check(x, *layers, levels)
        others = (first_scale, first_offset, second.data, second_scale, second_offset)
        chosen = runs_compiled(x, first.data, levels, *others)
        if chosen is not None and second.data.dtype == torch.int32:
            size, hidden, out = first.in_features, first.out_features, second.out_features
            self.follow(_plan(chosen, size, *layers, Threshold(x, level, levels)), size, out, hidden * (size + out))
