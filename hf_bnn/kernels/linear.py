"""Products of vectors with 1-bit weights: `hf_bnn::linear` and `hf_bnn::linear_weight_only`."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import integer_product
from .calls import Call
from .library import ROWS_OF_A_PLAN, LinearPlan, backend, declare
from .operands import (
    Threshold,
    check_features,
    check_linear,
    like_inputs,
    linear_plan,
    run_plan,
    runs_compiled,
    same_for_all_parts,
    split_threshold,
)
from .ops import define_op
from .reference import rescaled, signs
from .weights import LinearWeight, linear_signs

# On other instruction sets, torch's float product with an unpacked weight is faster for more rows than this.
MANY_ROWS = 8
LOOKS_UP = ("avx512", "avx512bw", "avx2")  # instruction sets that look up sums of floats
FLOAT_WORK = 16  # time of a multiply-accumulate of floats, in multiply-accumulates of bits

declare("hf_bnn_linear", *ROWS_OF_A_PLAN)
declare("hf_bnn_linear_weight_only", *ROWS_OF_A_PLAN)


def linear(
    x: Tensor,
    weight: LinearWeight,
    scale: Tensor,
    offset: Tensor | None = None,
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """Product of binary inputs and binary weights: `(..., in)` to `(..., out)`.

    `scale` and `offset` hold one number per output, `threshold` one number or one per input. A threshold of shape
    `(parts, 1)` or `(parts, in)` runs several layers as one: the outputs divide into `parts` of equal size, a multiple
    of 16, and the n-th part compares the inputs with row n.
    """
    check_features(x, weight)
    level, levels = split_threshold(threshold)
    return torch.ops.hf_bnn.linear(x, weight.data, scale, offset, level, levels)


@define_op("linear")
class LinearOperands(NamedTuple):
    """Operands of `hf_bnn::linear`. `weight` is the `data` of a LinearWeight; `thresholds` replaces `threshold`."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    offset: Tensor | None = None
    threshold: float = 0.0
    thresholds: Tensor | None = None

    def check(self) -> None:
        check_linear(self.x, self.weight, self.scale, self.offset, self.thresholds)

    def plan(self, chosen: int) -> LinearPlan:
        level = Threshold(self.x, self.threshold, self.thresholds)
        return linear_plan(chosen, self.x.shape[-1], self.weight, self.scale, self.offset, level)

    def compute(self) -> Tensor:
        self.check()
        chosen = runs_compiled(self.x, self.weight, self.thresholds)
        if chosen is None:
            return self.reference()
        size, out = self.x.shape[-1], self.scale.shape[0]
        return run_plan("hf_bnn_linear", self.plan(chosen), self.x, out, size * out)

    def reference(self) -> Tensor:
        x, thresholds = self.x, self.thresholds
        size, out = x.shape[-1], self.scale.shape[0]
        rows, matrix = x.reshape(x.shape[:-1].numel(), size), linear_signs(self.weight, out, size)
        if thresholds is not None and thresholds.dim() == 2:
            matrices = matrix.reshape(thresholds.shape[0], out // thresholds.shape[0], size)
            parts = zip(thresholds, matrices, strict=True)
            sums = torch.cat([integer_product(signs(rows, 0.0, part), matrix) for part, matrix in parts], 1)
        else:
            sums = integer_product(signs(rows, self.threshold, thresholds), matrix)
        return rescaled(sums, self.scale, self.offset).view(*x.shape[:-1], out).to(x.dtype)

    def fake(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.scale.shape[0]))


class LinearCall(Call):
    """`linear` of fixed weights. Takes a quarter of the time that calling the op takes.

    >>> weight = LinearWeight.from_bits(torch.tensor([[1], [2]], dtype=torch.uint8), 3)
    >>> LinearCall(weight, torch.ones(2))(torch.tensor([[-0.5, 0.2, 0.1]]))
    tensor([[ 3., -1.]])
    """

    function, op = "hf_bnn_linear", staticmethod(linear)

    def __init__(
        self, weight: LinearWeight, scale: Tensor, offset: Tensor | None = None, threshold: float | Tensor = 0.0
    ):
        super().__init__(weight, scale, offset, threshold)
        given = LinearOperands(like_inputs(weight), weight.data, scale, offset, *split_threshold(threshold))
        given.check()
        chosen = runs_compiled(given.x, given.weight, given.thresholds, scale, offset)
        if chosen is not None:
            plan = given._replace(thresholds=same_for_all_parts(given.thresholds)).plan(chosen)
            self.follow(plan, weight.in_features, weight.out_features, weight.in_features * weight.out_features)

    def move(self, weight: LinearWeight) -> None:
        """Read the same weight from elsewhere in memory, without planning again. `weight.data` is contiguous."""
        self.arguments = (weight, *self.arguments[1:])
        if self.plan is not None:
            self.plan.weights, self.plan.kept = weight.data.data_ptr(), (weight.data, *self.plan.kept[1:])


def linear_weight_only(x: Tensor, weight: LinearWeight, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Product of float inputs and binary weights: `(..., in)` to `(..., out)`.

    Sums in float32 in an order of its own: the result is close to that of F.linear, not equal.
    """
    check_features(x, weight)
    return torch.ops.hf_bnn.linear_weight_only(x, weight.data, scale, offset)


@define_op("linear_weight_only")
class LinearWeightOnlyOperands(NamedTuple):
    """Operands of `hf_bnn::linear_weight_only`. `weight` is the `data` of a LinearWeight."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def check(self) -> None:
        check_linear(self.x, self.weight, self.scale, self.offset, None)

    def plan(self, chosen: int) -> LinearPlan:
        return linear_plan(chosen, self.x.shape[-1], self.weight, self.scale, self.offset)

    def compute(self) -> Tensor:
        self.check()
        chosen = runs_compiled(self.x, self.weight)
        if chosen is None or (self.x.shape[:-1].numel() > MANY_ROWS and backend() not in LOOKS_UP):
            return self.reference()
        size, out = self.x.shape[-1], self.scale.shape[0]
        return run_plan("hf_bnn_linear_weight_only", self.plan(chosen), self.x, out, FLOAT_WORK * size * out)

    def reference(self) -> Tensor:
        x = self.x
        sums = F.linear(x, linear_signs(self.weight, self.scale.shape[0], x.shape[-1]).to(x.dtype))
        return rescaled(sums, self.scale, self.offset).to(x.dtype)

    def fake(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.scale.shape[0]))


class LinearWeightOnlyCall(Call):
    """`linear_weight_only` of fixed weights. On instruction sets without a look-up, many rows go to the op."""

    function, op = "hf_bnn_linear_weight_only", staticmethod(linear_weight_only)

    def __init__(self, weight: LinearWeight, scale: Tensor, offset: Tensor | None = None):
        super().__init__(weight, scale, offset)
        given = LinearWeightOnlyOperands(like_inputs(weight), weight.data, scale, offset)
        given.check()
        chosen = runs_compiled(given.x, given.weight, scale, offset)
        if chosen is not None:
            work = FLOAT_WORK * weight.in_features * weight.out_features
            self.follow(given.plan(chosen), weight.in_features, weight.out_features, work)
            self.most_rows = math.inf if backend() in LOOKS_UP else MANY_ROWS
