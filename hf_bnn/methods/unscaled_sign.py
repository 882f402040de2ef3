"""Signs of weights whose gradient is that of the scaled weights: for papers that pass dL/dW_hat on to W."""

import torch
from torch import Tensor

from ..functional import surrogate_sign, weight_scale
from .base import Part


def inverse_scale(weight: Tensor, scaling: str) -> Tensor:
    """1 / s for the scale s of each output channel, 0 where s = 0: float32, in a shape that broadcasts to weights."""
    scale = weight_scale(weight, scaling)
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)
    return inverse.view(-1, *[1] * (weight.dim() - 1))


def unscaled_gradient(grad: Tensor, weight: Tensor, scaling: str) -> Tensor:
    """dL/dW_hat from dL/dsign."""
    return (grad * inverse_scale(weight, scaling)).to(grad.dtype)


class UnscaledSign(Part):
    """sign(w), with the gradient dL/dW_hat of the scaled weight W_hat = s sign(W): the one that arrives, over s.

    `scaling` is the layer's weight scaling, which says what s is. Where s = 0, that is W = 0, the gradient is 0.
    """

    def __init__(self, scaling: str):
        super().__init__()
        self.scaling = scaling

    def forward(self, weight: Tensor) -> Tensor:
        return surrogate_sign(weight, unscaled_gradient, settings=(self.scaling,))
