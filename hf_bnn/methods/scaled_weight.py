"""Signs of weights that take the gradient of the scaled weight, for papers that pass dL/dW_hat on to W."""

from torch import Tensor

from ..functional import learning_scale, surrogate_sign, weight_scale
from .base import Part


def inverse_scale(weight: Tensor, scaling: str) -> Tensor:
    """1 / s for the scale s of each output channel's gradient: float32, in a shape that broadcasts to the weight's."""
    scale = learning_scale(weight_scale(weight, scaling), weight[0].numel())
    return scale.reciprocal_().view(-1, *[1] * (weight.dim() - 1))


def scaled_weight_gradient(grad: Tensor, weight: Tensor, scaling: str) -> Tensor:
    """dL/dW_hat from dL/dsign."""
    return (grad * inverse_scale(weight, scaling)).to(grad.dtype)


class SignWithScaledWeightGradient(Part):
    """sign(w), with the gradient dL/dW_hat of the scaled weight W_hat = s sign(W): the arriving gradient over s.

    `scaling` is the layer's weight scaling, which determines s.
    """

    emits_signs = True

    def __init__(self, scaling: str):
        super().__init__()
        self.scaling = scaling

    def forward(self, weight: Tensor) -> Tensor:
        return surrogate_sign(weight, scaled_weight_gradient, settings=(self.scaling,))
