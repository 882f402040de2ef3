"""Blocks of transformers whose packed layers run together: attention's projections, and feed-forward blocks.

A family derives its fused blocks from these and from the blocks of its float model, beside the model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.sources import Source, lent_tensors_of
from .base import Fused
from .feed_forward import feed_forward, hidden_interval
from .layers import JointLinear, KernelLinear

Attention = Callable[..., tuple[Tensor, Tensor | None]]  # transformers' attention interface


def entries_of(block: nn.Module, layers: tuple[nn.Module, ...]) -> list[Source]:
    """Where `layers` hang in `block`, and every tensor behind their scales, biases and levels."""
    modules = [layer for layer in layers if isinstance(layer, nn.Module)]  # an activation may be a function
    found = [
        (parent._modules, name)
        for parent in block.modules()
        for name, child in parent.named_children()
        if any(part in modules for part in (child, *child.children()))
    ]
    for layer in modules:
        found += layer.entries() if isinstance(layer, KernelLinear) else lent_tensors_of(layer)
    return found


def weights_of(layers: tuple[nn.Module, ...]) -> list[Source]:
    """Where the bits of `layers` are held."""
    return [(layer._buffers, "kernel_weight") for layer in layers if isinstance(layer, KernelLinear)]


class FusedProjections(Fused):
    """Attention that computes queries, keys and values as one product. Comes before the attention's float class."""

    made = ("joint", "joined")
    joint: JointLinear

    @classmethod
    def can_fuse(cls, attention: nn.Module) -> bool:
        """Whether the three projections can run as one product."""
        return JointLinear.takes(cls.projections(attention))

    def derive(self) -> None:
        layers = self.projections()
        for layer in layers:
            if isinstance(layer, KernelLinear):
                layer.current()
        self.joined = JointLinear.takes(layers)  # False where an adapter has replaced a layer
        if self.joined:
            self.joint = JointLinear(layers)

    def entries(self) -> list[Source]:
        return entries_of(self, self.projections())

    def unread(self) -> list[Source]:
        return weights_of(self.projections())

    def projections(self) -> tuple[nn.Module, ...]:
        """The layers that make queries, keys and values."""
        raise NotImplementedError(f"{type(self).__name__} must say which layers it joins")

    def attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        head_dim: int,
        attention: Attention,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """`(batch, tokens, in)` to `(batch, tokens, heads * head_dim)`, and `attention`'s second result. No dropout."""
        shape = hidden_states.shape[:-1]
        heads = [part.view(*shape, -1, head_dim).transpose(1, 2) for part in self.joint(hidden_states)]
        context, probabilities = attention(self, *heads, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return context.reshape(*shape, -1).contiguous(), probabilities

    def runs_plain(self, hidden_states: Tensor) -> bool:
        """Whether the layers must run one by one, as they must for gradients."""
        return self.wants_gradient(hidden_states) or not self.current() or not self.joined


class FusedFeedForward(Fused):
    """Two layers whose hidden values stay bits. Comes before the block's float class."""

    made = ("call",)

    @classmethod
    def can_fuse(cls, block: nn.Module) -> bool:
        """Whether the hidden values can stay bits."""
        return hidden_interval(*cls.layers(block)) is not None

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The first layer, the activation and the second layer."""
        raise NotImplementedError(f"{type(self).__name__} must say which layers it joins")

    def derive(self) -> None:
        first, activation, second = self.layers()
        for layer in (first, second):
            if isinstance(layer, KernelLinear):
                layer.current()
        interval = hidden_interval(first, activation, second)  # None where an adapter has replaced a layer
        self.call = None if interval is None else feed_forward(first, interval, second)

    def entries(self) -> list[Source]:
        return entries_of(self, self.layers())

    def unread(self) -> list[Source]:
        return weights_of(self.layers())

    def runs_plain(self, x: Tensor) -> bool:
        """Whether the layers must run one by one, as they must for gradients."""
        # Other dtypes round the hidden values, and the interval is computed from unrounded ones.
        return x.dtype != torch.float32 or self.wants_gradient(x) or not self.current() or self.call is None
