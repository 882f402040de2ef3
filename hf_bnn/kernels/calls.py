"""Products with everything but their inputs decided: what an op computes, without the cost of calling one."""

import math
from collections.abc import Callable
from ctypes import Structure, addressof
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..observers import looked_on
from .library import library, rows_worth_threads, too_large

FLOAT = torch.float32  # each look-up of an attribute that is not made counts here


class Call:
    """`(..., in)` to `(..., out)` by a plan that is made once. The base of LinearCall and its kin.

    The plan holds for float32 tensors on the CPU. Inputs of any other kind, and all of them while something looks on
    (see `looked_on`), go to the op, which takes them or names what is wrong. The plan points into the tensors it was
    made of where they are contiguous float32: they may change in place. Its backend is that of when it was made.
    """

    function: ClassVar[str]
    op: ClassVar[Callable[..., Tensor]]
    plan: Structure | None = None
    most_rows: float = math.inf  # more go to the op

    def __init__(self, *arguments: object):
        self.arguments = arguments
        self.in_features: int | None = None  # no input has that many: without a plan all go to the op

    def follow(self, plan: Structure, in_features: int, out_features: int, work: int) -> None:
        """`work`: multiply-accumulates of a row, as of binary products."""
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
        return type(self), self.arguments  # a copy, or a pickle, makes its own plan
