"""The step from a product of signs to a layer's output. Latent and packed layers share it, and so its roundings."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functional import sign_int8
from .levels import SignedLevels
from .products import Conv2dProduct, LinearProduct


class _Rescale(torch.autograd.Function):
    """product * (weight_scale * scale) + offset, float32, with few passes over memory. `weight_scale` is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(product: Tensor, weight_scale: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        y = product * (weight_scale * scale)
        return y if offset is None else y.add_(offset)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        product, weight_scale, scale, offset = inputs
        ctx.save_for_backward(product, weight_scale, scale)
        ctx.offset_shape = None if offset is None else offset.shape

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        product, weight_scale, scale = ctx.saved_tensors
        grad_product = (grad * (weight_scale * scale)).to(product.dtype)
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[2]:  # sum of grad * product * weight_scale
            grad_scale = (grad_product.flatten().float() @ product.flatten().float() / scale).view(scale.shape)
        if ctx.needs_input_grad[3]:
            grad_offset = grad.sum_to_size(ctx.offset_shape)
        return grad_product, None, grad_scale, grad_offset


def rescale(
    product: Tensor, weight_scale: Tensor, weight_sum: Tensor | None, levels: SignedLevels, bias: Tensor | None
) -> Tensor:
    """A product of signs in the units of the output; latent and packed layers share its roundings.

    Inputs on the levels a s + c against weights m t: sum (a s + c) m t = (a m) sum s t + (c m) sum t. `weight_sum`,
    the sum of t over what an output sees, is needed where the levels are shifted. `weight_scale`, `weight_sum` and
    `bias` have shapes that broadcast to that of `product`.
    """
    offset = output_offset(weight_scale, weight_sum, levels, bias)
    scale = torch.as_tensor(levels.affine()[0], device=product.device)
    return _Rescale.apply(product, weight_scale, scale, offset)


def output_offset(
    weight_scale: Tensor, weight_sum: Tensor | None, levels: SignedLevels, bias: Tensor | None
) -> Tensor | None:
    """The term that `rescale` adds: (c m) sum t and the bias."""
    if not levels.shifted:
        return bias
    offset = weight_sum * (weight_scale * levels.affine()[1])
    return offset if bias is None else offset + bias


def sign_product(
    product: LinearProduct | Conv2dProduct,
    x: Tensor,
    weight_signs: Tensor,
    weight_scale: Tensor,
    levels: SignedLevels,
    bias: Tensor | None,
    binary_inputs: bool,
) -> Tensor:
    """Inference of a layer with int8 weight signs: exact sums if the inputs are binary too."""
    if binary_inputs:
        y = product.of_signs(sign_int8(x, levels.threshold()), weight_signs)
    else:
        y = product(x, weight_signs.to(x.dtype))
    total = product.weight_sum(weight_signs, x) if levels.shifted else None
    bias = None if bias is None else product.per_channel(bias)
    return rescale(y, product.per_channel(weight_scale), total, levels, bias).to(x.dtype)
