"""Products with fixed operands: the result of an op without the cost of calling one."""

import math
from collections.abc import Callable
from ctypes import Structure, addressof
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..observers import looked_on
from .library import library, rows_worth_threads, too_large

FLOAT = torch.float32  # saves the look-up of an attribute in every call


class Call:
    """Base of the planned products, `(..., in)` to `(..., out)`. The plan is made once, in the constructor.

    A plan takes float32 tensors on the CPU. Other inputs, and all inputs while something observes torch (see
    `looked_on`), go to the op, which computes the result or raises an error. The plan points into those of its operands
    that are contiguous float32, so that writes to them in place take effect. It keeps the backend for which it was
    made.
    """

    function: ClassVar[str]
    op: ClassVar[Callable[..., Tensor]]
    plan: Structure | None = None
    most_rows: float = math.inf  # larger batches go to the op

    def __init__(self, *arguments: object):
        self.arguments = arguments
        self.in_features: int | None = None  # matches no input: without a plan, all go to the op

    def follow(self, plan: Structure, in_features: int, out_features: int, work: int) -> None:
        """Use `plan`. `work`: multiply-accumulates per row, in those of binary products."""
        self.plan, self.address = plan, addressof(plan)
        self.run = getattr(library().functions, self.function)
        self.out_features, self.rows_worth_threads = out_features, rows_worth_threads(work)
        self.in_features = in_features or None

    def __call__(self, x: Tensor) -> Tensor:
        *lead, size = x.shape
        if type(x) is not Tensor or x.dtype is not FLOAT or not x.is_cpu or size != self.in_features or looked_on():
            return self.op(x, *self.arguments)
        rows = x.numel() // size
        if rows > self.most_rows:
            return self.op(x, *self.arguments)
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty(*lead, self.out_features)
        threads = torch.get_num_threads() if rows >= self.rows_worth_threads else 1
        if self.run(self.address, x.data_ptr(), size, rows, threads, y.data_ptr()):
            raise too_large(self.function)
        return y

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), self.arguments  # copies and pickles make their own plan
