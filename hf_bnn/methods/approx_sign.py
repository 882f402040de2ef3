"""Bi-Real Net's ApproxSign: a triangle in place of the straight-through estimator's box (arXiv 1808.00278)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..functional import surrogate_sign
from .base import ClippedInputs, Part, Site


def triangle_gradient(grad: Tensor, x: Tensor, clip: float) -> Tensor:
    """`grad` times 2 - 2 |x| / clip where that is positive, else 0."""
    return x.abs().mul_(-2 / clip).add_(2).clamp_(min=0).mul_(grad)  # in place: one pass of fresh memory


class ApproximateSign(Part):
    """sign(x), with the gradient of a piecewise quadratic: 2 - 2 |x| / clip inside the clip bound, 0 outside."""

    emits_signs = keeps_inputs = True

    def __init__(self, clip: float):
        super().__init__()
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        return surrogate_sign(x, triangle_gradient, settings=(self.clip,))

    def clip_bound(self) -> float:
        return self.clip


@dataclass(frozen=True)
class ApproxSign(ClippedInputs):
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
