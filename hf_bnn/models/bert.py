"""Binary BERT: config, recipe (what is binarized, on which levels) and model classes."""

from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForSequenceClassification,
)
from transformers.masking_utils import eager_mask
from transformers.models.bert.modeling_bert import BertSelfAttention

from ..attention import BinaryAttention
from ..levels import ElasticLevels, SignedLevels, UnsignedLevels
from .base import EMBEDDINGS, BinaryConfigFields, BinaryModelMixin, check_choice

ATTENTION = "hf_bnn"
FFN_DOWN = ".output.dense"
CLASSIFIER = ("classifier",)
POOLER = ("*pooler*",)


class BinaryBertConfig(BinaryConfigFields, BertConfig):
    """The config of a binary BERT: BertConfig's fields, and what is binary.

    - `binarize`: "both", "weights" or "activations".
    - `attention`: "float", or "binary" for the two attention products too.
    - `embeddings`: the word table, "float", "int8" (one scale per row) or "binary". With "binary" the position table
      is binary as well and the pooler is among the binary layers, as in BiT: only then a BERT-base fits 14 MiB.
    - `levels`: "elastic" (learned scale and threshold) or "signed" ({-1, 1}); `ffn_levels`, of the second FFN layer's
      input, which follows GELU: "elastic" ({0, a}, learned) or "unsigned" ({0, 1}).
    - `skip`: shell-style patterns of modules that stay float; None is resolved once and stored.

    >>> BinaryBertConfig(embeddings="binary").skip
    ['classifier']
    """

    model_type = "hf_bnn_bert"
    float_model_type = "bert"

    attention: str = "float"
    embeddings: str = "int8"
    ffn_levels: str = "elastic"

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        check_choice("attention", self.attention, ("float", "binary"))
        check_choice("embeddings", self.embeddings, tuple(EMBEDDINGS))
        check_choice("ffn_levels", self.ffn_levels, ("elastic", "unsigned"))
        if self.skip is None:
            self.skip = list(CLASSIFIER if self.embeddings == "binary" else CLASSIFIER + POOLER)


def binary_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' attention interface around the layer's own `BinaryAttention`."""
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    context, probabilities = module.binary_attention(query, key, value, attention_mask, scaling, dropout)
    return context.transpose(1, 2).contiguous(), probabilities


AttentionInterface.register(ATTENTION, binary_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)  # without it the padding mask is silently dropped


class BinaryBertMixin(BinaryModelMixin):
    """What makes any BERT head binary."""

    head_prefixes = ("classifier.",)
    config: BinaryBertConfig

    def prepare_config(self, config: BinaryBertConfig) -> None:
        if config.attention == "binary":  # not stored in config.json by transformers
            config._attn_implementation = ATTENTION

    def rewrite(self) -> None:
        self.replace_tables(self.config.embeddings, ("*embeddings.word_embeddings",))
        if self.config.embeddings == "binary":
            self.replace_tables("binary", ("*embeddings.position_embeddings",))
        if self.config.attention == "binary":
            for module in list(self.modules()):
                if isinstance(module, BertSelfAttention):
                    module.binary_attention = BinaryAttention()

    def input_levels(self, name: str) -> SignedLevels:
        if name.endswith(FFN_DOWN) and not name.endswith(f"attention{FFN_DOWN}"):  # sees GELU's outputs
            return ElasticLevels(signed=False) if self.config.ffn_levels == "elastic" else UnsignedLevels()
        return super().input_levels(name)


class BinaryBertForSequenceClassification(BinaryBertMixin, BertForSequenceClassification):
    """BertForSequenceClassification with binary weights and activations.

    `from_pretrained` reads float BERT checkpoints (their weights become the latent ones), latent and packed ones.

    >>> config = BinaryBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryBertForSequenceClassification(config)
    """

    config_class = BinaryBertConfig
