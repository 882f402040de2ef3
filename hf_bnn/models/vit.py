"""Binary ViT: config, fused blocks and model classes. Reads the float weights of ViT and DeiT."""

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, load_state_dict
from transformers.models.vit import modeling_vit
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP
from transformers.utils import logging

from ..fused.blocks import FusedFeedForward, FusedProjections
from ..fused.registry import fuses
from .transformer import BinaryTransformerMixin, TransformerConfigFields

logger = logging.get_logger(__name__)

EXCLUDE = ("*patch_embeddings*", "*pooler*", "classifier", "decoder*")


class BinaryViTConfig(TransformerConfigFields, ViTConfig):
    """The config of a binary ViT: ViTConfig's fields, and those that say which parts are binary.

    - `binarize`: "both", "weights" or "activations".
    - `attention`: the two attention products. "float"; "binary" (BiT); or "boolean" (BiBERT): binary without a softmax,
      each token is attended to or not.
    - `levels`: of the binary layers' inputs, "elastic" (learned scale and threshold) or "signed" ({-1, 1}).
    - `ffn_levels`: of the second FFN layer's input, which follows GELU, "elastic" ({0, a}, a learned) or "unsigned"
      ({0, 1}).
    - `exclude`: shell-style patterns of modules that stay float. None: the default, which is then stored.

    >>> BinaryViTConfig(image_size=32, patch_size=4).exclude
    ['*patch_embeddings*', '*pooler*', 'classifier', 'decoder*']
    """

    model_type = "hf_bnn_vit"
    float_model_type = "vit"
    also_reads: ClassVar[tuple[str, ...]] = ("deit",)
    family_patterns: ClassVar[tuple[str, ...]] = EXCLUDE

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.exclude is None:
            self.exclude = list(EXCLUDE)


class BinaryViTMixin(BinaryTransformerMixin):
    """Makes any ViT head binary."""

    config_class = BinaryViTConfig
    attention_classes = (ViTAttention,)
    config: BinaryViTConfig

    @staticmethod
    def follows_gelu(name: str) -> bool:
        return name.endswith("mlp.fc2")

    def float_weights(
        self, state_dict: dict[str, Tensor] | None, files: list[str] | None
    ) -> tuple[dict[str, Tensor] | None, list[str] | None]:
        found = state_dict or {key: value for path in files or () for key, value in load_state_dict(path).items()}
        if any(key.endswith("distillation_token") for key in found):
            return without_distillation(found), None
        return state_dict, files


def without_distillation(deit: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeiT's weights under ViT's names, without those of the distillation token. Logs a warning about the loss."""
    kept = {re.sub(r"^deit\.", "vit.", key): value for key, value in deit.items() if "distillation" not in key}
    kept = {key.replace("cls_classifier", "classifier"): value for key, value in kept.items()}
    for key in [key for key in kept if key.endswith("position_embeddings")]:  # class, distillation, patches
        kept[key] = torch.cat((kept[key][:, :1], kept[key][:, 2:]), 1)
    lost = ", ".join(sorted(key for key in deit if "distillation" in key))
    logger.warning(
        f"a ViT has no distillation token: {lost} and the token's row of the position embeddings are dropped from this "
        "DeiT checkpoint; its accuracy is that of the class token alone"
    )
    return kept


@fuses(ViTAttention)
class FusedViTAttention(FusedProjections, ViTAttention):
    """ViTAttention with one product for queries, keys and values."""

    def projections(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.runs_plain(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        implementation, eager = self.config._attn_implementation, modeling_vit.eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        context, probabilities = self.attend(hidden_states, attention_mask, self.head_dim, attention, kwargs)
        return self.o_proj(context), probabilities


@fuses(ViTMLP)
class FusedViTMLP(FusedFeedForward, ViTMLP):
    """ViTMLP whose hidden values stay bits."""

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.fc1, self.activation_fn, self.fc2

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) if self.runs_plain(hidden_states) else self.call(hidden_states)


class BinaryViTModel(BinaryViTMixin, ViTModel):
    """ViTModel with binary weights and activations.

    >>> config = BinaryViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryViTModel(config)
    """


class BinaryViTForImageClassification(BinaryViTMixin, ViTForImageClassification):
    """ViTForImageClassification with binary weights and activations.

    `from_pretrained` reads float, latent and packed checkpoints. Float weights, of ViT or DeiT, become the latent ones;
    DeiT's distillation token is dropped.

    >>> config = BinaryViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryViTForImageClassification(config)
    """


class BinaryViTForMaskedImageModeling(BinaryViTMixin, ViTForMaskedImageModeling):
    """ViTForMaskedImageModeling with binary weights and activations.

    >>> config = BinaryViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = BinaryViTForMaskedImageModeling(config)
    """


# transformers looks renamings up by class name: it knows the ViTModel within the heads, but not BinaryViTModel.
register_checkpoint_conversion_mapping(
    BinaryViTModel.__name__, get_checkpoint_conversion_mapping(ViTModel.__name__), overwrite=True
)
