"""Two binary layers with an activation between them: `hf_bnn::ffn`."""

import ctypes
from ctypes import c_float
from typing import NamedTuple

import torch
from torch import Tensor

from .calls import Call
from .library import ROWS_OF_A_PLAN, LinearPlan, declare
from .linear import LinearOperands
from .operands import (
    check_features,
    check_linear,
    like_inputs,
    linear_plan,
    parts_of,
    run_plan,
    runs_compiled,
    split_threshold,
)
from .ops import define_op
from .weights import LinearWeight


class FfnPlan(ctypes.Structure):
    """`struct ffn_plan` of csrc/hf_bnn.h."""

    _fields_ = (("first", LinearPlan), ("second", LinearPlan), ("low", c_float), ("high", c_float))


declare("hf_bnn_ffn", *ROWS_OF_A_PLAN)


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
    """A binary layer, an activation and a second binary layer: `(..., in)` to `(..., out)`.

    A hidden value h counts as -1 where `interval[0] <= h < interval[1]`: the interval stands for the activation and
    for the threshold of the second layer.
    """
    check_features(x, first)
    if second.in_features != first.out_features:
        raise ValueError(f"the second layer takes {second.in_features} inputs: expected {first.out_features}")
    level, levels = split_threshold(threshold)
    hidden = (first.data, first_scale, first_offset, *interval)
    return torch.ops.hf_bnn.ffn(x, *hidden, second.data, second_scale, second_offset, level, levels)


@define_op("ffn")
class FfnOperands(NamedTuple):
    """Operands of `hf_bnn::ffn`. `first` and `second` are the `data` of LinearWeights."""

    x: Tensor
    first: Tensor
    first_scale: Tensor
    first_offset: Tensor | None
    low: float
    high: float
    second: Tensor
    second_scale: Tensor
    second_offset: Tensor | None
    threshold: float = 0.0
    thresholds: Tensor | None = None

    def first_layer(self) -> LinearOperands:
        return LinearOperands(self.x, self.first, self.first_scale, self.first_offset, self.threshold, self.thresholds)

    def check(self) -> None:
        self.first_layer().check()
        hidden = self.x.new_empty((0, self.first_scale.shape[0]))
        check_linear(hidden, self.second, self.second_scale, self.second_offset, None)
        if parts_of(self.thresholds) > 1:
            raise ValueError(f"thresholds has shape {tuple(self.thresholds.shape)}: a layer of an ffn has no parts")
        if not self.low <= self.high:
            raise ValueError(f"low={self.low}, high={self.high}: expected an interval, low <= high")

    def plan(self, chosen: int) -> FfnPlan:
        """The plan keeps those of both layers, which keep what they point to."""
        size = self.first_scale.shape[0]
        second = linear_plan(chosen, size, self.second, self.second_scale, self.second_offset)
        plans = self.first_layer().plan(chosen), second
        plan = FfnPlan(*plans, self.low, self.high)
        plan.kept = plans
        return plan

    def work(self) -> int:
        """Multiply-accumulates per row."""
        return self.first_scale.shape[0] * (self.x.shape[-1] + self.second_scale.shape[0])

    def compute(self) -> Tensor:
        self.check()
        chosen = runs_compiled(self.x, self.first, self.thresholds)
        # In other dtypes the reference rounds the hidden values.
        if chosen is None or self.second.dtype != torch.int32 or self.x.dtype != torch.float32:
            return self.reference()
        return run_plan("hf_bnn_ffn", self.plan(chosen), self.x, self.second_scale.shape[0], self.work())

    def reference(self) -> Tensor:
        hidden = self.first_layer().reference()
        bits = (hidden >= self.low) & (hidden < self.high)
        inputs = bits.to(self.x.dtype).neg()
        return LinearOperands(inputs, self.second, self.second_scale, self.second_offset).reference()

    def fake(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.second_scale.shape[0]))


class FfnCall(Call):
    """`ffn` of fixed weights. Takes a fraction of the time that calling the op takes."""

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
        hidden = (first.data, first_scale, first_offset, *interval)
        out = (second.data, second_scale, second_offset)
        given = FfnOperands(like_inputs(first), *hidden, *out, *split_threshold(threshold))
        given.check()
        chosen = runs_compiled(given.x, given.first, given.thresholds, first_scale, first_offset, *out)
        if chosen is not None and given.second.dtype == torch.int32:
            self.follow(given.plan(chosen), first.in_features, second.out_features, given.work())
