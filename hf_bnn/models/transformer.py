"""The base of binary transformers: config fields, attention with binary products, levels for GELU's outputs."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ..nn.attention import BinaryAttention, BooleanAttention
from ..nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from .base import BinaryModelMixin
from .config import BinaryConfigFields, check_choice

ATTENTION = "hf_bnn"
ATTENTIONS = {"float": None, "binary": BinaryAttention, "boolean": BooleanAttention}


@dataclass
class TransformerConfigFields(BinaryConfigFields):
    """The structure of a binary transformer, as fields of its config."""

    attention: str = "float"  # the two attention products: float | binary | boolean (no softmax)
    ffn_levels: str = "elastic"  # of the second FFN layer's input, which follows GELU: elastic | unsigned

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        check_choice("attention", self.attention, tuple(ATTENTIONS))
        check_choice("ffn_levels", self.ffn_levels, ("elastic", "unsigned"))

    @property
    def has_binary_attention(self) -> bool:
        """Whether the two attention products are binary."""
        return ATTENTIONS[self.attention] is not None and self.binarize != "none"

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, str] | None) -> None:
        if getattr(self, "_attn_implementation_internal", None) == ATTENTION:  # a model was made from this config
            check_implementation(self, value.get("", ATTENTION) if isinstance(value, dict) else value)
        super(TransformerConfigFields, type(self))._attn_implementation.fset(self, value)


def binary_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface around the layer's own `BinaryAttention`."""
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    # The rule by which transformers' capture_outputs decides whether to keep them.
    need_weights = bool(kwargs.get("output_attentions", module.config.output_attentions))
    inputs = (query, key, value, attention_mask, scaling, dropout)
    context, weights = module.binary_attention(*inputs, need_weights=need_weights)
    return context.transpose(1, 2).contiguous(), weights


def check_implementation(config: TransformerConfigFields, asked: str | None) -> None:
    """Raise ValueError unless the attention implementation `asked` computes the attention of `config`."""
    if config.has_binary_attention and asked != ATTENTION:
        raise ValueError(
            f"attn_implementation={asked!r} computes float attention, but this model has attention="
            f"{config.attention!r}, whose products are binary: leave it at {ATTENTION!r}. Its weights are "
            "there with output_attentions=True in a call; for float attention make the model with attention='float'"
        )
    if not config.has_binary_attention and asked == ATTENTION:
        raise ValueError(
            f"attn_implementation={ATTENTION!r} is for binary attention, but this model has attention="
            f"{config.attention!r} and binarize={config.binarize!r}: choose 'sdpa' or 'eager', or make the model with "
            "attention='binary'"
        )


AttentionInterface.register(ATTENTION, binary_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)  # without it the padding mask is silently dropped


class BinaryTransformerMixin(BinaryModelMixin):
    """Makes any transformer binary. A family sets its attention classes and says which layers read GELU's outputs."""

    attention_classes: ClassVar[tuple[type[nn.Module], ...]]
    config: TransformerConfigFields

    @staticmethod
    def follows_gelu(name: str) -> bool:
        """Whether the layer called `name` reads GELU's outputs: the second of an FFN."""
        raise NotImplementedError("a binary transformer must say which layers read GELU's outputs")

    def prepare_config(self, config: TransformerConfigFields) -> None:
        if config.has_binary_attention:  # transformers does not store it in config.json
            config._attn_implementation = ATTENTION

    def rewrite(self) -> None:
        if self.config.has_binary_attention:
            for module in list(self.modules()):
                if isinstance(module, self.attention_classes):
                    module.binary_attention = ATTENTIONS[self.config.attention]()

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """As in transformers, which calls it for each nested model. See `check_implementation`."""
        check_implementation(self.config, requested_attention)
        return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)

    def input_levels(self, name: str) -> SignedLevels:
        if self.follows_gelu(name):
            return ElasticLevels(signed=False) if self.config.ffn_levels == "elastic" else UnsignedLevels()
        return super().input_levels(name)
