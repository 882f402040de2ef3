"""The blocks of BERT, ViT and ResNet on fused products, for `hf_bnn.optimize_`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention
from transformers.models.resnet.modeling_resnet import ResNetStage
from transformers.models.vit import modeling_vit
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from ..fused import FUSERS
from ..fused.base import Fused
from ..fused.convolutions import FusedBasicBlock, FusedBottleNeckBlock, FusedStage, FusedStem
from ..fused.feed_forward import feed_forward, hidden_interval
from ..fused.layers import JointLinear, KernelLinear
from ..kernels.sources import Source, lent_tensors_of
from .resnet import BiRealBasicLayer, BiRealBottleNeckLayer, BiRealStem, resized


def entries_of(block: nn.Module, layers: tuple[nn.Module, ...]) -> list[Source]:
    """Where `layers` hang in `block`, and all that is made of their scales, biases and levels."""
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


class _FusedAttention(Fused):
    """Queries, keys and values as one product."""

    made = ("joint", "joined")
    joint: JointLinear

    @classmethod
    def fuse(cls, attention: nn.Module) -> None:
        if JointLinear.takes(cls.projections(attention)):
            cls.replace_class(attention)

    def derive(self) -> None:
        layers = self.projections()
        for layer in layers:
            if isinstance(layer, KernelLinear):
                layer.current()
        self.joined = JointLinear.takes(layers)  # unless one was replaced, by an adapter
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
        self, hidden_states: Tensor, attention_mask: Tensor | None, head_dim: int, eager: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """`(batch, tokens, in)` to `(batch, tokens, heads * head_dim)`, and the probabilities if they are made."""
        shape = hidden_states.shape[:-1]
        heads = [part.view(*shape, -1, head_dim).transpose(1, 2) for part in self.joint(hidden_states)]
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        context, probabilities = interface(self, *heads, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return context.reshape(*shape, -1).contiguous(), probabilities

    def runs_plain(self, hidden_states: Tensor) -> bool:
        """Whether the layers must run one by one, as they must for gradients."""
        return self.wants_gradient(hidden_states) or not self.current() or not self.joined


class FusedBertSelfAttention(_FusedAttention, BertSelfAttention):
    """BertSelfAttention with one product for queries, keys and values."""

    def projections(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if past_key_values is not None or self.runs_plain(hidden_states):
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        size = self.attention_head_size
        return self.attend(hidden_states, attention_mask, size, modeling_bert.eager_attention_forward, kwargs)


class _FusedFeedForward(Fused):
    """Two layers whose hidden values stay bits."""

    made = ("call",)

    @classmethod
    def fuse(cls, block: nn.Module) -> None:
        if hidden_interval(*cls.layers(block)) is not None:
            cls.replace_class(block)

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The first layer, the activation and the second layer."""
        raise NotImplementedError(f"{type(self).__name__} must say which layers it joins")

    def derive(self) -> None:
        first, activation, second = self.layers()
        for layer in (first, second):
            if isinstance(layer, KernelLinear):
                layer.current()
        interval = hidden_interval(first, activation, second)  # None where one was replaced, by an adapter
        self.call = None if interval is None else feed_forward(first, interval, second)

    def entries(self) -> list[Source]:
        return entries_of(self, self.layers())

    def unread(self) -> list[Source]:
        return weights_of(self.layers())

    def runs_plain(self, x: Tensor) -> bool:
        """Whether the layers must run one by one, as they must for gradients."""
        # In other dtypes hidden values are rounded, and the interval is one of values that are not.
        return x.dtype != torch.float32 or self.wants_gradient(x) or not self.current() or self.call is None


class FusedBertLayer(_FusedFeedForward, BertLayer):
    """BertLayer whose feed-forward block keeps its hidden values as bits."""

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.intermediate.dense, self.intermediate.intermediate_act_fn, self.output.dense

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        if self.runs_plain(attention_output):
            return super().feed_forward_chunk(attention_output)
        return self.output.LayerNorm(self.call(attention_output) + attention_output)


class FusedViTAttention(_FusedAttention, ViTAttention):
    """ViTAttention with one product for queries, keys and values."""

    def projections(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.runs_plain(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        eager = modeling_vit.eager_attention_forward
        context, probabilities = self.attend(hidden_states, attention_mask, self.head_dim, eager, kwargs)
        return self.o_proj(context), probabilities


class FusedViTMLP(_FusedFeedForward, ViTMLP):
    """ViTMLP that keeps its hidden values as bits."""

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.fc1, self.activation_fn, self.fc2

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) if self.runs_plain(hidden_states) else self.call(hidden_states)


class FusedBiRealStem(FusedStem, BiRealStem):
    """A BiRealStem that pools and normalizes in one call."""


class FusedBiRealBasicLayer(FusedBasicBlock, BiRealBasicLayer):
    """A packed BiRealBasicLayer that runs each convolution with all that follows it as one call."""


class FusedBiRealBottleNeckLayer(FusedBottleNeckBlock, BiRealBottleNeckLayer):
    """A packed BiRealBottleNeckLayer that runs each convolution with all that follows it as one call."""

    resized = staticmethod(resized)


class FusedResNetStage(FusedStage, ResNetStage):
    """A stage of fused blocks, which hand bits to one another."""


FUSERS |= {
    BertSelfAttention: FusedBertSelfAttention.fuse,
    BertLayer: FusedBertLayer.fuse,
    ViTAttention: FusedViTAttention.fuse,
    ViTMLP: FusedViTMLP.fuse,
    BiRealStem: FusedBiRealStem.replace_class,
    BiRealBasicLayer: FusedBiRealBasicLayer.replace_class,
    BiRealBottleNeckLayer: FusedBiRealBottleNeckLayer.replace_class,
    ResNetStage: FusedResNetStage.replace_class,
}
