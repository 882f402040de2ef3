"""Binary attention as one compiled operation."""

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..attention import BinaryAttention, BooleanAttention


class _Fused:
    """What both kinds share. Comes before the attention whose place it takes.

    Returns no weights, unless they are asked for. With those, in training, where gradients may be asked for, and for
    other dtypes than float32 it runs the parent's forward; in evaluation both are equal bit for bit.
    """

    softmax: bool
    _levels: tuple | None = None

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
        learns = self.training or self.scores.partial or self.context.partial or torch.is_grad_enabled()
        if learns or need_weights or not query.dtype == key.dtype == value.dtype == torch.float32:
            return super().forward(query, key, value, mask, scaling, dropout, need_weights)
        levels = self.make_levels() if torch.compiler.is_compiling() else self.kept_levels()
        return kernels.attention(query, key, value, levels, scaling, mask, self.softmax), None

    def make_levels(self) -> Tensor:
        """`levels` of kernels.attention, with the roundings of BinaryMatmul."""
        queries, keys = self.scores.left_levels, self.scores.right_levels
        weights, values = self.context.left_levels, self.context.right_levels
        thresholds = (levels.threshold() for levels in (queries, keys, values, weights))
        (query_scale, _), (key_scale, _), (value_scale, _) = queries.affine(), keys.affine(), values.affine()
        scale, shift = weights.affine()
        return torch.stack((*thresholds, query_scale * key_scale, scale * value_scale, shift * value_scale))

    def kept_levels(self) -> Tensor:
        """`make_levels`, called when first asked for, and anew when a parameter has changed."""
        parameters = []
        for product in ("scores", "context"):
            levels = self._modules[product]._modules  # several times faster than their attributes
            parameters += (*levels["left_levels"]._parameters.values(), *levels["right_levels"]._parameters.values())
        # An inference tensor has no version; what it holds changes only where it is replaced.
        state = [(id(p), p.data_ptr(), p.is_inference() or p._version) for p in parameters]
        if self._levels is None or self._levels[0] != state:
            self._levels = (state, self.make_levels(), parameters)  # kept, so that no other gets the id of one of them
        return self._levels[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_levels": None}  # a copy, or a pickle, makes its own


class FusedBinaryAttention(_Fused, BinaryAttention):
    """BinaryAttention as one operation, `hf_bnn::attention`. Made by `fuse_attention`."""

    softmax = True


class FusedBooleanAttention(_Fused, BooleanAttention):
    """BooleanAttention as one operation, `hf_bnn::attention`. Made by `fuse_attention`."""

    softmax = False


FUSED = {BinaryAttention: FusedBinaryAttention, BooleanAttention: FusedBooleanAttention}


def fuse_attention(module: BinaryAttention) -> None:
    """Let `module`, in place, run as one operation in evaluation. Parameters and state dict stay what they are.

    >>> attention = BinaryAttention().eval()
    >>> fuse_attention(attention)
    >>> with torch.no_grad():
    ...     context, weights = attention(*torch.randn(3, 1, 2, 5, 8).unbind(), scaling=8**-0.5)
    >>> context.shape, weights
    (torch.Size([1, 2, 5, 8]), None)
    """
    module.__class__ = FUSED.get(type(module), type(module))
