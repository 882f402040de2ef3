"""Products of signs in training: exact forward passes on bits, and bits instead of floats kept for the backward pass.

A float product keeps both of its operands. Here both are signs, so that 1/32 of their memory holds them, and the
forward pass runs on the kernels of inference. Its result is the float product's, bit for bit, as the sums of signs are
exact in both. The backward pass makes floats of the bits again and computes the two products of every linear operator.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..estimators import Kept
from ..kernels import training as on_bits
from ..kernels.operands import runs_directly
from ..kernels.weights import Conv2dWeight, LinearWeight
from .products import Conv2dProduct, LinearProduct, conv2d_weight, linear_weight


class SignBits(NamedTuple):
    """Signs as they are kept for a backward pass, in the order of the tensor's memory; `tensors` may be saved."""

    tensors: tuple[Tensor, ...]
    shape: torch.Size
    strides: tuple[int, ...]
    from_input: bool  # whether `tensors` are of a Kept

    @classmethod
    def of(cls, signs: Tensor, kept: Kept | None = None) -> "SignBits":
        """Of dense signs, which may be those of an input of which something is kept already."""
        tensors = (on_bits.sign_bits(signs),) if kept is None else kept.tensors
        return cls(tensors, signs.shape, signs.stride(), kept is not None)

    def floats(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The signs again, from their saved tensors."""
        if self.from_input:
            return on_bits.with_strides(Kept.signs(tensors), self.strides).to(dtype)
        return on_bits.signs_of_bits(*tensors, self.shape, self.strides).to(dtype)


class PackedSigns(NamedTuple):
    """A latent weight, and its signs as the kernels take them."""

    latent: Tensor
    operand: LinearWeight | Conv2dWeight

    @classmethod
    def of(cls, latent: Tensor) -> "PackedSigns":
        """Of float32 `(out, in)` or `(out, in, kh, kw)`."""
        rows = latent.detach().contiguous()
        return cls(latent, linear_weight(rows) if latent.dim() == 2 else conv2d_weight(rows))


def takes(product: LinearProduct | Conv2dProduct | None, *operands: Tensor) -> bool:
    """Whether a product of these signs runs on bits: float32, on the CPU, compiled kernels, and no groups."""
    groups = getattr(product, "groups", 1)
    return groups == 1 and all(on_bits.runs_on_bits(x) and x.numel() for x in operands)


def whole_precision(x: Tensor) -> Tensor:
    """`x` in float32 where autocast on a CPU has left it in half precision: sums of signs then stay exact."""
    rounded = x.dtype in (torch.bfloat16, torch.float16) and x.is_cpu and torch.is_autocast_enabled("cpu")
    return x.float() if rounded and runs_directly(x) else x


def backward_dtype() -> torch.dtype:
    """The dtype of the two products of a backward pass: autocast's, where this processor multiplies it fast."""
    fast = torch.is_autocast_enabled("cpu") and _multiplies_bfloat16()
    return torch.get_autocast_dtype("cpu") if fast else torch.float32


@cache
def _multiplies_bfloat16() -> bool:
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


class _SignProduct(torch.autograd.Function):
    """signs, weight's signs -> sums * (weight_scale * scale) + offset, as `_Rescale` of a float product rounds it."""

    @staticmethod
    def forward(ctx, signs, weight, weight_scale, scale, offset, product, packed, dtype):
        kept = Kept.of(signs)
        signs, factor = on_bits.dense(signs), weight_scale * scale
        signs_kept = SignBits.of(signs, kept)
        ctx.save_for_backward(packed.latent, weight_scale, scale, *signs_kept.tensors)
        ctx.signs, ctx.product, ctx.dtype = signs_kept._replace(tensors=()), product, dtype
        ctx.offset_shape = None if offset is None else offset.shape
        per_output = None if offset is None or offset.numel() != len(weight_scale) else offset.flatten()
        if isinstance(product, LinearProduct):
            y = kernels.LinearCall(packed.operand, factor, per_output, 0.0)(signs)
        else:
            geometry = (product.stride, product.padding, product.dilation)
            y = kernels.conv2d(signs, packed.operand, factor, per_output, None, *geometry)
            y = y if signs.stride(1) == 1 else y.contiguous()  # the layout of the float product
        return y if offset is None or per_output is not None else y.add_(offset)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        latent, weight_scale, scale, *signs = ctx.saved_tensors
        signs = ctx.signs.floats(tuple(signs), ctx.dtype)
        weight = on_bits.signs(on_bits.dense(latent.detach())).to(ctx.dtype)
        with torch.autocast("cpu", enabled=False):
            scaled = (grad * ctx.product.per_channel(weight_scale * scale)).to(ctx.dtype)
            grad_signs = grad_weight = grad_scale = grad_offset = None
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
                grad_signs = ctx.product.grad_input(scaled, signs, weight)
            if ctx.needs_input_grad[1]:
                grad_weight = ctx.product.grad_weight(scaled, signs, weight).float()
            if ctx.needs_input_grad[3]:  # sum of grad * sums * weight_scale: the same as a sum over the inputs
                grad_scale = (_dot(grad_signs, signs) / scale).view(scale.shape)
            if ctx.needs_input_grad[4]:
                grad_offset = grad.sum_to_size(ctx.offset_shape)
        grad_signs = None if grad_signs is None else grad_signs.float()
        return grad_signs, grad_weight, None, grad_scale, grad_offset, None, None, None


def _dot(left: Tensor, right: Tensor) -> Tensor:
    right = right if right.stride() == left.stride() else torch.empty_like(left).copy_(right)
    if not torch.ops.aten.is_non_overlapping_and_dense(left):
        return (left.float() * right.float()).sum()
    flat = (left.numel(),), (1,)
    return torch.dot(left.as_strided(*flat).float(), right.as_strided(*flat).float())


def product_on_bits(
    product: LinearProduct | Conv2dProduct,
    signs: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    packed: PackedSigns,
) -> Tensor:
    """`product(signs, weight) * (weight_scale * scale) + offset` for float32 signs, float32.

    `weight` are the signs of `packed.latent`, with the gradient of the method. `weight_scale` `(out,)` is a constant,
    `scale` a 0-d tensor; `offset` broadcasts to the result.
    """
    return _SignProduct.apply(signs, weight, weight_scale, scale, offset, product, packed, backward_dtype())


class _SignMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, right, scale, dtype):
        kept = Kept.of(left)
        rows, turned = left.contiguous(), right.transpose(-1, -2).contiguous()
        ctx.left, ctx.right, ctx.dtype = SignBits.of(rows, kept), SignBits.of(turned), dtype
        ctx.save_for_backward(scale, *ctx.right.tensors, *ctx.left.tensors)
        return on_bits.sign_products(rows, turned).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scale, right, *left = ctx.saved_tensors
        left, right = ctx.left.floats(tuple(left), ctx.dtype), ctx.right.floats((right,), ctx.dtype)
        grad_left = grad_right = grad_scale = None
        with torch.autocast("cpu", enabled=False):
            scaled = (grad * scale).to(ctx.dtype)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
                grad_left = (scaled @ right).float()
            if ctx.needs_input_grad[1]:
                grad_right = (left.mT @ scaled).float()
            if ctx.needs_input_grad[2]:
                grad_scale = (torch.dot(grad_left.flatten(), left.flatten().float()) / scale).view(scale.shape)
        return grad_left, grad_right, grad_scale, None


def matmul_on_bits(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """`(left @ right) * scale` for float32 signs `(..., n, k)` and `(..., k, m)` and a 0-d `scale`."""
    return _SignMatmul.apply(left, right, scale, backward_dtype())
