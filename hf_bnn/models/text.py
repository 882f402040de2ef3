"""The base of binary text models: rounded word tables, tied output layers, and fused blocks of BERT's structure.

A new text family derives its config, mixin and fused blocks from the classes here, as `bert.py` does.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..convert import replace_modules
from ..functional import straight_through
from ..fused.blocks import Attention, FusedFeedForward, FusedProjections
from ..nn.embeddings import BinaryEmbedding, Int8Embedding, RoundedEmbedding
from ..selection import covered, matches
from .config import check_choice
from .transformer import BinaryTransformerMixin, TransformerConfigFields

EMBEDDINGS = {"float": None, "int8": Int8Embedding, "binary": BinaryEmbedding}
POOLER = ("*pooler*",)


@dataclass
class TextConfigFields(TransformerConfigFields):
    """The structure of a binary text model, as fields of its config."""

    embeddings: str = "int8"  # the word table: float | int8 | binary: the position table and the pooler as well

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        check_choice("embeddings", self.embeddings, tuple(EMBEDDINGS))
        if self.exclude is None:
            binary_pooler = self.embeddings == "binary"
            self.exclude = [name for name in self.family_patterns if not (binary_pooler and name in POOLER)]


class CheckedPositions:
    """Makes embeddings refuse more tokens than they have positions. Comes before a class with BERT's `forward`.

    Without it torch reports sizes that it cannot expand.
    """

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


class BinaryTextMixin(BinaryTransformerMixin):
    """Makes any text model binary whose base model holds its tables in `embeddings`."""

    word_table: ClassVar[str] = "*embeddings.word_embeddings"  # a pattern of the module's name
    position_table: ClassVar[str] = "*embeddings.position_embeddings"
    checked_embeddings: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {}  # float class: with CheckedPositions
    config: TextConfigFields

    @staticmethod
    def follows_gelu(name: str) -> bool:
        return name.endswith(".output.dense") and not name.endswith("attention.output.dense")

    def rewrite(self) -> None:
        super().rewrite()
        for module in self.modules():
            if type(module) in self.checked_embeddings:
                module.__class__ = self.checked_embeddings[type(module)]
        if self.config.binarize == "none":
            return
        self.round_tables(self.word_table, EMBEDDINGS[self.config.embeddings])
        if self.config.embeddings == "binary":
            self.round_tables(self.position_table, BinaryEmbedding)
        self.tie_to_rounded_rows()

    def round_tables(self, pattern: str, table: type[RoundedEmbedding] | None) -> None:
        """Replace every embedding whose name matches by its rounded form; None: they stay float."""
        if table is not None:

            def rounded(name: str, module: nn.Module) -> nn.Module | None:
                return table.from_float(module) if matches(name, (pattern,)) else None

            replace_modules(self, rounded)

    def tie_to_rounded_rows(self) -> None:
        """Let a tied output layer multiply by the word table's rounded rows, which the encoder reads.

        Raises ValueError if the layer would be binary while the table is float.
        """
        output = self.get_output_embeddings()
        name = next((name for name, module in self.named_modules() if module is output), None)
        if name is None or f"{name}.weight" not in self.all_tied_weights_keys:
            return
        if self.config.embeddings != "float":
            self.set_submodule(name, RoundedDecoder(self.base_model.embeddings, output.bias))
            del self.all_tied_weights_keys[f"{name}.weight"]
            self._tied_weights_keys = dict(self.all_tied_weights_keys)
        elif not covered(name, self.config.exclude, self.base_model_prefix):
            pattern = next((p for p in self.config.family_patterns if matches(name, [p])), name)
            raise ValueError(
                f"exclude={self.config.exclude} makes {name!r} binary, but it is tied to float word embeddings: "
                f"add {pattern!r}, or untie them with tie_word_embeddings=False"
            )


class RoundedDecoder(nn.Module):
    """`(..., dim) -> (..., rows)`: products with the word table's rounded rows, plus a bias.

    The table remains a part of `embeddings` alone, so that a state dict holds it once, latent or packed.
    """

    def __init__(self, embeddings: nn.Module, bias: nn.Parameter):
        super().__init__()
        self.embeddings = (embeddings,)  # in a tuple: as a submodule, its parameters would be listed here again
        self.bias = bias

    @property
    def table(self) -> nn.Embedding:
        """The present word table: packing replaces it."""
        return self.embeddings[0].word_embeddings

    @property
    def weight(self) -> Tensor:
        """The table's parameter: transformers reads its shape when it resizes a vocabulary."""
        return self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        table = self.table
        rows = table(torch.arange(table.num_embeddings, device=x.device))
        if isinstance(table, RoundedEmbedding):  # the padding token's row learns too, as it does in transformers
            rows = straight_through(rows.detach(), table.weight)
        return F.linear(x, rows, self.bias)


class FusedTextAttention(FusedProjections):
    """Fused form of a self-attention of BERT's structure: `query`, `key`, `value`. Comes before its float class."""

    eager: ClassVar[Attention]  # the `eager_attention_forward` of the float class's module

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
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, type(self).eager)
        return self.attend(hidden_states, attention_mask, self.attention_head_size, attention, kwargs)


class FusedTextLayer(FusedFeedForward):
    """Fused form of a layer of BERT's structure: `intermediate`, `output`. Comes before its float class."""

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.intermediate.dense, self.intermediate.intermediate_act_fn, self.output.dense

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        if self.runs_plain(attention_output):
            return super().feed_forward_chunk(attention_output)
        return self.output.LayerNorm(self.call(attention_output) + attention_output)
