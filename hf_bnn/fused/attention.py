"""Binary attention as one compiled operation."""

import torch
from torch import Tensor

from .. import kernels
from ..kernels.sources import Source, lent_tensors_of
from ..nn.attention import BinaryAttention, BooleanAttention, additive_mask
from .base import Fused


class _FusedProducts(Fused):
    """Base of both kinds of fused attention. Stands before the attention class that it replaces.

    Returns attention weights only on request. The parent's forward runs if weights are requested, in training, where
    gradients are needed, and for dtypes other than float32. In evaluation both forwards are equal bit for bit.
    """

    made = ("kernel_levels",)
    softmax: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        gradient = self.wants_gradient(query) or self.wants_gradient(key) or self.wants_gradient(value)
        plain = gradient or need_weights or self.scores.partial or self.context.partial or not self.current()
        if plain or not query.dtype == key.dtype == value.dtype == torch.float32:
            return super().forward(query, key, value, mask, scaling, dropout, need_weights)
        mask = additive_mask(mask, query.dtype)
        return kernels.attention(query, key, value, self.kernel_levels, scaling, mask, self.softmax), None

    def entries(self) -> list[Source]:
        products = [(self._modules, "scores"), (self._modules, "context")]
        sides = [(part._modules, side) for part in self.children() for side in ("left_levels", "right_levels")]
        return [*products, *sides, *(place for slot, side in sides for place in lent_tensors_of(slot[side]))]

    @torch.no_grad()
    def derive(self) -> None:
        """Compute `levels` of kernels.attention, with the roundings of BinaryMatmul."""
        queries, keys = self.scores.left_levels, self.scores.right_levels
        weights, values = self.context.left_levels, self.context.right_levels
        thresholds = (levels.threshold() for levels in (queries, keys, values, weights))
        (query_scale, _), (key_scale, _), (value_scale, _) = queries.affine(), keys.affine(), values.affine()
        scale, shift = weights.affine()
        levels = torch.stack((*thresholds, query_scale * key_scale, scale * value_scale, shift * value_scale))
        self.register_buffer("kernel_levels", levels, persistent=False)


class FusedBinaryAttention(_FusedProducts, BinaryAttention):
    """BinaryAttention as one operation, `hf_bnn::attention`. Made by `fuse_attention`."""

    softmax = True


class FusedBooleanAttention(_FusedProducts, BooleanAttention):
    """BooleanAttention as one operation, `hf_bnn::attention`. Made by `fuse_attention`."""

    softmax = False


FUSED = {BinaryAttention: FusedBinaryAttention, BooleanAttention: FusedBooleanAttention}


def fuse_attention(module: BinaryAttention) -> None:
    """Make `module` run as one operation in evaluation, in place. Parameters and state dict do not change.

    >>> attention = BinaryAttention().eval()
    >>> fuse_attention(attention)
    >>> with torch.no_grad():
    ...     context, weights = attention(*torch.randn(3, 1, 2, 5, 8).unbind(), scaling=8**-0.5)
    >>> context.shape, weights
    (torch.Size([1, 2, 5, 8]), None)
    """
    FUSED[type(module)].replace_class(module)
