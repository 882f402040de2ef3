"""Bi-Real Net's ApproxSign: a triangle in place of the straight-through estimator's box (arXiv 1808.00278)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..functional import sign
from .base import Method, Part, Site


class _ApproxSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, clip: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.clip = clip
        return sign(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return x.abs().mul_(-2 / ctx.clip).add_(2).clamp_(min=0).mul_(grad), None  # in place: one pass of fresh memory


class ApproximateSign(Part):
    """sign(x), with the gradient of a piecewise quadratic: 2 - 2 |x| / clip inside the clip bound, 0 outside."""

    def __init__(self, clip: float):
        super().__init__()
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        return _ApproxSign.apply(x, self.clip)


@dataclass(frozen=True)
class ApproxSign(Method):
    """Bi-Real Net (arXiv 1808.00278, eq. 6 and 7): dF/dx = 2 + 2x on [-1, 0), 2 - 2x on [0, 1), 0 elsewhere.

    `clip` stretches the triangle: 1 is the paper's. Weights keep the straight-through estimator.

    >>> ApproxSign().to_dict()
    {'name': 'approx_sign', 'clip': 1.0}
    """

    name: ClassVar[str] = "approx_sign"
    paper: ClassVar[str] = "Bi-Real Net, arXiv 1808.00278"
    idea: ClassVar[str] = "the gradient of a piecewise quadratic, largest where the sign is least certain"

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        return ApproximateSign(self.clip)
