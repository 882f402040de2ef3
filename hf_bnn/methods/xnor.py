"""XNOR-Net: the gradient of weights through their signs and through their scale (arXiv 1603.05279)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..functional import surrogate_sign
from .base import ClippedInputs, Part, Site
from .scaled_weight import SignWithScaledWeightGradient, inverse_scale


def sign_and_scale_gradient(grad: Tensor, weight: Tensor, scaling: str) -> Tensor:
    """The paper's gradient from dL/dsign = s dL/dW_hat: (grad / s) (1/n + 1{|W| <= 1} s)."""
    factor = weight.abs().le_(1)
    if scaling != "none":
        sharing = weight[0].numel() if scaling == "channel" else weight.numel()
        factor.add_(inverse_scale(weight, scaling), alpha=1 / sharing)
    return factor.mul_(grad)


class SignWithScaleGradient(SignWithScaledWeightGradient):
    """sign(w), with the gradient of W_hat = s sign(W) through the sign and, because s depends on W, through s."""

    def forward(self, weight: Tensor) -> Tensor:
        return surrogate_sign(weight, sign_and_scale_gradient, settings=(self.scaling,))


@dataclass(frozen=True)
class XNOR(ClippedInputs):
    """XNOR-Net (arXiv 1603.05279, section 3.1): for W_hat = alpha sign(W), with alpha = mean |W| over n weights,
    dL/dW_i = dL/dW_hat_i (1/n + 1{|W_i| <= 1} alpha).

    This is the form that the paper prints, entry by entry; the true gradient of alpha would sum over the channel.
    alpha is the model's scale, and n counts the weights that share it: those of an output channel, as in the paper,
    or of the layer; with weight_scaling="none", alpha is the constant 1, and the term 1/n falls away. Inputs keep the
    straight-through estimator, and no scale of their own (the paper's K).

    >>> XNOR().to_dict()
    {'name': 'xnor', 'clip': 1.0}
    """

    name: ClassVar[str] = "xnor"
    paper: ClassVar[str] = "XNOR-Net, arXiv 1603.05279"
    idea: ClassVar[str] = "latent weights take the gradient of their signs and, entry by entry, of their scale"

    def weight_binarizer(self, site: Site) -> Part:
        return SignWithScaleGradient(site.weight_scaling)
