"""Binary BERT: config, fused blocks and model classes. `text.py` holds what it shares with other text models."""

from typing import ClassVar

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.models.bert import modeling_bert
from transformers.models.bert.modeling_bert import BertCrossAttention, BertEmbeddings, BertLayer, BertSelfAttention

from ..fused.registry import fuses
from .text import POOLER, BinaryTextMixin, CheckedPositions, FusedTextAttention, FusedTextLayer, TextConfigFields

HEADS = ("classifier", "cls.*", "qa_outputs")


class BinaryBertConfig(TextConfigFields, BertConfig):
    """The config of a binary BERT: BertConfig's fields, and those that say which parts are binary.

    - `binarize`: "both", "weights" or "activations".
    - `attention`: the two attention products. "float"; "binary" (BiT); or "boolean" (BiBERT): binary without a softmax,
      each token is attended to or not.
    - `embeddings`: the word table, "float", "int8" (one scale per row) or "binary". With "binary" the position table
      and the pooler are binary too, as in BiT. This brings BERT-base to at most 14 MiB.
    - `levels`: of the binary layers' inputs, "elastic" (learned scale and threshold) or "signed" ({-1, 1}).
    - `ffn_levels`: of the second FFN layer's input, which follows GELU, "elastic" ({0, a}, a learned) or "unsigned"
      ({0, 1}).
    - `exclude`: shell-style patterns of modules that stay float. None: the default, which is then stored.

    >>> BinaryBertConfig(embeddings="binary").exclude
    ['classifier', 'cls.*', 'qa_outputs']
    """

    model_type = "hf_bnn_bert"
    float_model_type = "bert"
    family_patterns: ClassVar[tuple[str, ...]] = HEADS + POOLER


class CheckedEmbeddings(CheckedPositions, BertEmbeddings):
    """BertEmbeddings that refuse more tokens than there are positions."""


class BinaryBertMixin(BinaryTextMixin):
    """Makes any BERT head binary."""

    config_class = BinaryBertConfig
    attention_classes = (BertSelfAttention, BertCrossAttention)
    checked_embeddings: ClassVar = {BertEmbeddings: CheckedEmbeddings}
    unfused: ClassVar = {"*crossattention.self": "queries and keys read different inputs"}
    config: BinaryBertConfig


@fuses(BertSelfAttention)
class FusedBertSelfAttention(FusedTextAttention, BertSelfAttention):
    """BertSelfAttention with one product for queries, keys and values."""

    eager = staticmethod(modeling_bert.eager_attention_forward)


@fuses(BertLayer)
class FusedBertLayer(FusedTextLayer, BertLayer):
    """BertLayer whose feed-forward block keeps its hidden values as bits."""


class BinaryBertModel(BinaryBertMixin, BertModel):
    """BertModel with binary weights and activations.

    >>> config = BinaryBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryBertModel(config, add_pooling_layer=False)
    """


class BinaryBertForMaskedLM(BinaryBertMixin, BertForMaskedLM):
    """BertForMaskedLM with binary weights and activations. A tied decoder reads the rounded word table.

    >>> config = BinaryBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryBertForMaskedLM(config)
    """


class BinaryBertForSequenceClassification(BinaryBertMixin, BertForSequenceClassification):
    """BertForSequenceClassification with binary weights and activations.

    `from_pretrained` reads float, latent and packed checkpoints. Float weights become the latent ones.

    >>> config = BinaryBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryBertForSequenceClassification(config)
    """


class BinaryBertForTokenClassification(BinaryBertMixin, BertForTokenClassification):
    """BertForTokenClassification with binary weights and activations."""


class BinaryBertForMultipleChoice(BinaryBertMixin, BertForMultipleChoice):
    """BertForMultipleChoice with binary weights and activations."""


class BinaryBertForQuestionAnswering(BinaryBertMixin, BertForQuestionAnswering):
    """BertForQuestionAnswering with binary weights and activations."""
