"""Binary BERT: config, recipe (what is binarized, on which levels) and model classes."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert
from transformers.models.bert.modeling_bert import BertCrossAttention, BertEmbeddings, BertLayer, BertSelfAttention

from ..functional import straight_through
from ..fused.blocks import FusedFeedForward, FusedProjections
from ..fused.registry import fuses
from ..nn.embeddings import RoundedEmbedding
from ..selection import covered
from .base import EMBEDDINGS, check_choice
from .transformer import BinaryTransformerMixin, TransformerConfigFields

FFN_DOWN = ".output.dense"
HEADS = ("classifier", "cls.*", "qa_outputs")
POOLER = ("*pooler*",)
DECODER = "cls.predictions.decoder"


class BinaryBertConfig(TransformerConfigFields, BertConfig):
    """The config of a binary BERT: BertConfig's fields, and what is binary.

    - `binarize`: "both", "weights" or "activations".
    - `attention`: "float", "binary" for the two attention products too (BiT), or "boolean": these without the softmax
      between them, a token is attended to or not (BiBERT).
    - `embeddings`: the word table, "float", "int8" (one scale per row) or "binary". With "binary" the position table
      is binary as well and the pooler is among the binary layers, as in BiT: only then a BERT-base fits 14 MiB.
    - `levels`: "elastic" (learned scale and threshold) or "signed" ({-1, 1}); `ffn_levels`, of the second FFN layer's
      input, which follows GELU: "elastic" ({0, a}, learned) or "unsigned" ({0, 1}).
    - `exclude`: shell-style patterns of modules that stay float; None is resolved once and stored.

    >>> BinaryBertConfig(embeddings="binary").exclude
    ['classifier', 'cls.*', 'qa_outputs']
    """

    model_type = "hf_bnn_bert"
    float_model_type = "bert"
    family_patterns: ClassVar[tuple[str, ...]] = HEADS + POOLER

    embeddings: str = "int8"

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        check_choice("embeddings", self.embeddings, tuple(EMBEDDINGS))
        if self.exclude is None:
            self.exclude = list(HEADS if self.embeddings == "binary" else HEADS + POOLER)


class CheckedEmbeddings(BertEmbeddings):
    """BertEmbeddings that refuse more tokens than there are positions, where torch would speak of sizes to expand."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        if position_ids is None and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            tokens = (inputs_embeds if input_ids is None else input_ids).shape[1] + past_key_values_length
            if tokens > self.position_ids.shape[1]:
                raise ValueError(
                    f"{tokens} tokens are more than the {self.position_ids.shape[1]} positions of this model "
                    "(max_position_embeddings): let the tokenizer cut them off, with truncation=True and max_length"
                )
        return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)


class BinaryBertMixin(BinaryTransformerMixin):
    """What makes any BERT head binary."""

    config_class = BinaryBertConfig
    attention_classes = (BertSelfAttention, BertCrossAttention)
    unfused: ClassVar[dict[str, str]] = {"*crossattention.self": "queries and keys read different inputs"}
    config: BinaryBertConfig

    @staticmethod
    def follows_gelu(name: str) -> bool:
        return name.endswith(FFN_DOWN) and not name.endswith(f"attention{FFN_DOWN}")

    def rewrite(self) -> None:
        super().rewrite()
        for module in self.modules():
            if type(module) is BertEmbeddings:
                module.__class__ = CheckedEmbeddings
        if self.config.binarize == "none":
            return
        self.replace_tables(self.config.embeddings, ("*embeddings.word_embeddings",))
        if self.config.embeddings == "binary":
            self.replace_tables("binary", ("*embeddings.position_embeddings",))
        if f"{DECODER}.weight" in self.all_tied_weights_keys:
            self.tie_to_rounded_rows(self.cls.predictions)

    def tie_to_rounded_rows(self, head: nn.Module) -> None:
        """Let the masked-language head see the word table as the encoder sees it: rounded, unless it is float."""
        if self.config.embeddings != "float":
            head.decoder = RoundedDecoder(self.bert.embeddings, head.decoder.bias)
            del self.all_tied_weights_keys[f"{DECODER}.weight"]
            self._tied_weights_keys = dict(self.all_tied_weights_keys)
        elif not covered(DECODER, self.config.exclude, self.base_model_prefix):
            raise ValueError(
                f"exclude={self.config.exclude} makes {DECODER!r} binary, but it is tied to float word embeddings: "
                "add 'cls.*', or untie them with tie_word_embeddings=False"
            )


class RoundedDecoder(nn.Module):
    """`(..., dim) -> (..., rows)`: products with the rows of the word table, as it rounds them, plus a bias.

    The table remains the embeddings': it is in a state dict once, latent or packed.
    """

    def __init__(self, embeddings: BertEmbeddings, bias: nn.Parameter):
        super().__init__()
        self.embeddings = (embeddings,)  # in a tuple: a submodule's parameters would be listed here again
        self.bias = bias

    @property
    def table(self) -> nn.Embedding:
        """The word table, whichever it is now: packing replaces it."""
        return self.embeddings[0].word_embeddings

    @property
    def weight(self) -> Tensor:
        """The table's parameter: transformers goes by its shape where it resizes a vocabulary."""
        return self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        table = self.table
        rows = table(torch.arange(table.num_embeddings, device=x.device))
        if isinstance(table, RoundedEmbedding):  # the padding token's row learns too, as it does in transformers
            rows = straight_through(rows.detach(), table.weight)
        return F.linear(x, rows, self.bias)


@fuses(BertSelfAttention)
class FusedBertSelfAttention(FusedProjections, BertSelfAttention):
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
        implementation, eager = self.config._attn_implementation, modeling_bert.eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        return self.attend(hidden_states, attention_mask, self.attention_head_size, attention, kwargs)


@fuses(BertLayer)
class FusedBertLayer(FusedFeedForward, BertLayer):
    """BertLayer whose feed-forward block keeps its hidden values as bits."""

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.intermediate.dense, self.intermediate.intermediate_act_fn, self.output.dense

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        if self.runs_plain(attention_output):
            return super().feed_forward_chunk(attention_output)
        return self.output.LayerNorm(self.call(attention_output) + attention_output)


class BinaryBertModel(BinaryBertMixin, BertModel):
    """BertModel with binary weights and activations.

    >>> config = BinaryBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryBertModel(config, add_pooling_layer=False)
    """


class BinaryBertForMaskedLM(BinaryBertMixin, BertForMaskedLM):
    """BertForMaskedLM with binary weights and activations. Its decoder, if tied, sees the rounded word table.

    >>> config = BinaryBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryBertForMaskedLM(config)
    """


class BinaryBertForSequenceClassification(BinaryBertMixin, BertForSequenceClassification):
    """BertForSequenceClassification with binary weights and activations.

    `from_pretrained` reads float BERT checkpoints (their weights become the latent ones), latent and packed ones.

    >>> config = BinaryBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryBertForSequenceClassification(config)
    """


class BinaryBertForTokenClassification(BinaryBertMixin, BertForTokenClassification):
    """BertForTokenClassification with binary weights and activations."""


class BinaryBertForMultipleChoice(BinaryBertMixin, BertForMultipleChoice):
    """BertForMultipleChoice with binary weights and activations."""


class BinaryBertForQuestionAnswering(BinaryBertMixin, BertForQuestionAnswering):
    """BertForQuestionAnswering with binary weights and activations."""
