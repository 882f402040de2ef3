"""Products of vectors with 1-bit weights: `hf_bnn::linear`, `hf_bnn::linear_weight_only`."""

import math

import torch
from torch import Tensor

from . import reference
from .calls import Call
from .library import backend
from .operands import (
    Threshold,
    check_features,
    check_linear,
    define_op,
    like_inputs,
    linear_plan,
    run_plan,
    runs_compiled,
    same_for_all_parts,
    split_threshold,
)
from .weights import LinearWeight

# Without a look-up of floats, an unpacked weight and torch's product of floats are faster from here on.
MANY_ROWS = 8
LOOKS_UP = ("avx512", "avx512bw", "avx2")
FLOAT_WORK = 16  # a multiply-accumulate of a float takes the time of so many of bits


def linear(
    x: Tensor,
    weight: LinearWeight,
    scale: Tensor,
    offset: Tensor | None = None,
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """`(..., in)` to `(..., out)`: binary inputs times binary weights.

    `scale` and `offset` hold a number per output, `threshold` one number or one per input. A threshold `(parts, 1)` or
    `(parts, in)` is for several layers in one, of equally many outputs, a multiple of 16: the n-th part of the outputs
    sees the inputs through the n-th row.
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
    size, out = x.shape[-1], scale.shape[0]
    level = Threshold(x, threshold, thresholds)
    return run_plan("hf_bnn_linear", linear_plan(chosen, size, weight, scale, offset, level), x, out, size * out)


def _fake_linear(x: Tensor, weight: Tensor, scale: Tensor, *settings: object, **named: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


define_op(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None, float threshold=0.0, "
    "Tensor? thresholds=None) -> Tensor",
    _linear,
    reference.linear,
    _fake_linear,
)


class LinearCall(Call):
    """`linear` of fixed weights in a quarter of the time that its op takes to be called.

    >>> weight = LinearWeight.from_bits(torch.tensor([[1], [2]], dtype=torch.uint8), 3)
    >>> LinearCall(weight, torch.ones(2))(torch.tensor([[-0.5, 0.2, 0.1]]))
    tensor([[ 3., -1.]])
    """

    function, op = "hf_bnn_linear", staticmethod(linear)

    def __init__(
        self, weight: LinearWeight, scale: Tensor, offset: Tensor | None = None, threshold: float | Tensor = 0.0
    ):
        super().__init__(weight, scale, offset, threshold)
        x, (level, levels) = like_inputs(weight), split_threshold(threshold)
        check_linear(x, weight.data, scale, offset, levels)
        chosen = runs_compiled(x, weight.data, levels, scale, offset)
        if chosen is not None:
            level = Threshold(x, level, same_for_all_parts(levels))
            plan = linear_plan(chosen, weight.in_features, weight.data, scale, offset, level)
            self.follow(plan, weight.in_features, weight.out_features, weight.in_features * weight.out_features)


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
    size, out = x.shape[-1], scale.shape[0]
    plan = linear_plan(chosen, size, weight, scale, offset)
    return run_plan("hf_bnn_linear_weight_only", plan, x, out, FLOAT_WORK * size * out)


define_op(
    "linear_weight_only(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None) -> Tensor",
    _linear_weight_only,
    reference.linear_weight_only,
    _fake_linear,
)


class LinearWeightOnlyCall(Call):
    """`linear_weight_only` of fixed weights, for few rows: many go to the op."""

    function, op = "hf_bnn_linear_weight_only", staticmethod(linear_weight_only)

    def __init__(self, weight: LinearWeight, scale: Tensor, offset: Tensor | None = None):
        super().__init__(weight, scale, offset)
        x, work = like_inputs(weight), FLOAT_WORK * weight.in_features * weight.out_features
        check_linear(x, weight.data, scale, offset, None)
        chosen = runs_compiled(x, weight.data, scale, offset)
        if chosen is not None:
            plan = linear_plan(chosen, weight.in_features, weight.data, scale, offset)
            self.follow(plan, weight.in_features, weight.out_features, work)
            self.most_rows = math.inf if backend() in LOOKS_UP else MANY_ROWS
