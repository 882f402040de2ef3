"""XNOR-Net: the gradient of weights through their signs and through their scale (arXiv 1603.05279)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..functional import sign
from .base import Method, Part, Site
from .unscaled_sign import UnscaledSign, inverse_scale


class _ScaledSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, scaling: str) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scaling = scaling
        return sign(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        # dL/dW_hat = grad / s: (grad / s) (1/n + 1{|W| <= 1} s) = grad (1/(n s) + 1{|W| <= 1})
        factor = weight.abs().le_(1)
        if ctx.scaling != "none":
            sharing = weight[0].numel() if ctx.scaling == "channel" else weight.numel()
            factor.add_(inverse_scale(weight, ctx.scaling), alpha=1 / sharing)
        return factor.mul_(grad), None


class ScaledSign(UnscaledSign):
    """sign(w), with the gradient that the scaled weight W_hat = s sign(W) hands to W where s depends on W too."""

    def forward(self, weight: Tensor) -> Tensor:
        return _ScaledSign.apply(weight, self.scaling)


@dataclass(frozen=True)
class XNOR(Method):
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
        return ScaledSign(site.weight_scaling)
