"""Signs in training: the straight-through estimator, and what of an input is kept for the backward pass.

A float layer keeps its inputs, 4 bytes a number. A binary one needs their signs, which of them were inside the clip
bound, and for learned levels how large they were: a bit, a bit and a byte. `normalized` makes that record of an input
and hands it on with the tensor it returns; `clipped_sign` and the product of the signs use it instead of keeping more.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functional import clipped_gradient, sign, surrogate_sign
from .kernels import training as on_bits

STEPS = 32  # of a byte in a unit of the levels: sizes up to 4 are told apart
LARGEST = 126  # bytes up to which a size is exact: see on_bits.to_bytes

Compensation = Callable[[Tensor, Tensor], Tensor]


class Kept(NamedTuple):
    """The record of an input u, in units of its levels. Its tensors may be saved for a backward pass.

    Either bytes of u, or (if whatever made the input keeps it anyway) the input, the threshold and the scale: then
    u = (x - threshold) / scale is computed again.
    """

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Kept | None":
        """The record that `normalized` has handed on with `tensor`, or with what `tensor` is the sign of."""
        return getattr(tensor, "_kept", None)

    def hand_on(self, tensor: Tensor) -> Tensor:
        tensor._kept = self
        return tensor

    @staticmethod
    def inputs(tensors: tuple[Tensor, ...]) -> Tensor:
        """u, to half a step if there are only bytes of it."""
        if len(tensors) == 1:
            return on_bits.from_bytes(tensors[0], STEPS)
        x, threshold, scale = tensors
        return on_bits.dense(x - threshold).div_(scale)

    @staticmethod
    def signs(tensors: tuple[Tensor, ...]) -> Tensor:
        if len(tensors) == 1:
            return on_bits.signs_of_bytes(tensors[0])
        return on_bits.signs(Kept.inputs(tensors))

    @staticmethod
    def clipped(tensors: tuple[Tensor, ...], grad: Tensor, clip: float) -> Tensor:
        """`grad` where |u| <= clip, else 0."""
        if len(tensors) == 1:
            return on_bits.keep_within(tensors[0], on_bits.with_strides(grad, tensors[0].stride()), int(clip * STEPS))
        return clipped_gradient(grad, Kept.inputs(tensors), clip)

    def tells(self, clip: float) -> bool:
        """Whether it tells exactly which inputs are within `clip`."""
        return len(self.tensors) > 1 or (clip * STEPS <= LARGEST and (clip * STEPS).is_integer())


class _Normalized(torch.autograd.Function):
    """(x - threshold) / scale. Written out because on a CPU the passes over memory cost more than the products do."""

    @staticmethod
    def forward(ctx, x: Tensor, threshold: Tensor, scale: Tensor, on_bits_: bool, retained: bool):
        u = (x - threshold).div_(scale)
        ctx.on_bits, kept = on_bits_, None
        if not on_bits_:
            ctx.save_for_backward(scale, u)
        elif retained:
            ctx.save_for_backward(scale, x, threshold)
        else:
            u = on_bits.dense(u)
            kept = on_bits.to_bytes(u, STEPS)
            ctx.save_for_backward(scale, kept)
            ctx.mark_non_differentiable(kept)
        return u, kept

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: None):
        scale, *kept = ctx.saved_tensors
        grad_x = grad / scale
        # du/dthreshold = -1 / scale; du/dscale = -u / scale
        if not ctx.on_bits:
            return grad_x, -grad_x.sum(), -torch.dot(grad_x.flatten(), kept[0].flatten()), None, None
        u = Kept.inputs((*kept, scale) if len(kept) == 2 else tuple(kept))
        grad_x = on_bits.with_strides(grad_x, u.stride())
        return grad_x, -grad_x.sum(), -on_bits.dot(grad_x, u), None, None


def normalized(x: Tensor, threshold: Tensor, scale: Tensor, compact: bool = False, retained: bool = False) -> Tensor:
    """(x - threshold) / scale, the shape of `x`.

    `compact`: keep a byte of each number for the gradient of `scale`, which is then that of inputs rounded to 1/64 of a
    unit. `retained`: whatever made `x` keeps it, so that keeping it here costs nothing and is exact.
    """
    compact = compact and on_bits.runs_on_bits(x)
    u, kept = _Normalized.apply(x, threshold, scale, compact, retained)
    if not compact:
        return u
    return Kept((x.detach(), threshold.detach(), scale.detach()) if kept is None else (kept,)).hand_on(u)


class _ClippedSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, clip: float, compensate: Compensation | None, *kept: Tensor) -> Tensor:
        x = on_bits.dense(x)
        ctx.clip, ctx.compensate, ctx.strides, ctx.has_kept = clip, compensate, x.stride(), bool(kept)
        ctx.save_for_backward(*(kept or (on_bits.inside_bits(x, clip),)))
        return on_bits.signs(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors
        if ctx.has_kept:
            clipped = Kept.clipped(saved, grad, ctx.clip)
        else:
            clipped = on_bits.keep_where(saved[0], on_bits.with_strides(grad, ctx.strides))
        if ctx.compensate is not None:
            clipped = ctx.compensate(clipped, grad)
        return clipped, None, None, *([None] * len(saved) if ctx.has_kept else ())


def _compensated(grad: Tensor, x: Tensor, clip: float, compensate: Compensation) -> Tensor:
    return compensate(clipped_gradient(grad, x, clip), grad)


def clipped_sign(x: Tensor, clip: float = 1.0, compensate: Compensation | None = None) -> Tensor:
    """sign(x) with the gradient of clamp(x, -clip, clip): the straight-through estimator (arXiv 1602.02830, eq. 4).

    `compensate`: what it becomes instead, from the clipped gradient, which it may change in place, and the whole one.
    """
    if not on_bits.runs_on_bits(x):
        if compensate is not None:
            return surrogate_sign(x, _compensated, settings=(clip, compensate))
        return surrogate_sign(x, clipped_gradient, settings=(clip,))
    kept = Kept.of(x)
    exact = kept is not None and kept.tells(clip)
    signs = _ClippedSign.apply(x, clip, compensate, *(kept.tensors if exact else ()))
    return signs if kept is None else kept.hand_on(signs)


class _IdentitySign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return on_bits.signs(on_bits.dense(x)) if on_bits.runs_on_bits(x) else sign(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad


def identity_sign(x: Tensor) -> Tensor:
    """sign(x) with the gradient of x: the straight-through estimator without a clip bound."""
    return _IdentitySign.apply(x)
