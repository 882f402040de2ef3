"""Binary model families. Importing this registers them with transformers' Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .bert import (
    BinaryBertConfig,
    BinaryBertForMaskedLM,
    BinaryBertForMultipleChoice,
    BinaryBertForQuestionAnswering,
    BinaryBertForSequenceClassification,
    BinaryBertForTokenClassification,
    BinaryBertModel,
)
from .resnet import (
    BinaryResNetBackbone,
    BinaryResNetConfig,
    BinaryResNetForImageClassification,
    BinaryResNetModel,
)
from .vit import (
    BinaryViTConfig,
    BinaryViTForImageClassification,
    BinaryViTForMaskedImageModeling,
    BinaryViTModel,
)

# One row for each family: its config, and its model class for each of transformers' Auto classes.
MODELS = {
    BinaryBertConfig: {
        AutoModel: BinaryBertModel,
        AutoModelForMaskedLM: BinaryBertForMaskedLM,
        AutoModelForMultipleChoice: BinaryBertForMultipleChoice,
        AutoModelForQuestionAnswering: BinaryBertForQuestionAnswering,
        AutoModelForSequenceClassification: BinaryBertForSequenceClassification,
        AutoModelForTokenClassification: BinaryBertForTokenClassification,
    },
    BinaryResNetConfig: {
        AutoBackbone: BinaryResNetBackbone,
        AutoModel: BinaryResNetModel,
        AutoModelForImageClassification: BinaryResNetForImageClassification,
    },
    BinaryViTConfig: {
        AutoModel: BinaryViTModel,
        AutoModelForImageClassification: BinaryViTForImageClassification,
        AutoModelForMaskedImageModeling: BinaryViTForMaskedImageModeling,
    },
}


def register(config: type[PreTrainedConfig], models: dict[type, type[PreTrainedModel]]) -> None:
    """Let transformers' Auto classes find a family by its config: one row of MODELS."""
    AutoConfig.register(config.model_type, config)
    for auto, cls in models.items():
        auto.register(config, cls)


for row in MODELS.items():
    register(*row)

__all__ = [
    "BinaryBertConfig",
    "BinaryBertForMaskedLM",
    "BinaryBertForMultipleChoice",
    "BinaryBertForQuestionAnswering",
    "BinaryBertForSequenceClassification",
    "BinaryBertForTokenClassification",
    "BinaryBertModel",
    "BinaryResNetBackbone",
    "BinaryResNetConfig",
    "BinaryResNetForImageClassification",
    "BinaryResNetModel",
    "BinaryViTConfig",
    "BinaryViTForImageClassification",
    "BinaryViTForMaskedImageModeling",
    "BinaryViTModel",
]
