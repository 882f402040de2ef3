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

MODELS = {
    AutoBackbone: (BinaryResNetBackbone,),
    AutoModel: (BinaryBertModel, BinaryResNetModel, BinaryViTModel),
    AutoModelForImageClassification: (BinaryResNetForImageClassification, BinaryViTForImageClassification),
    AutoModelForMaskedImageModeling: (BinaryViTForMaskedImageModeling,),
    AutoModelForMaskedLM: (BinaryBertForMaskedLM,),
    AutoModelForMultipleChoice: (BinaryBertForMultipleChoice,),
    AutoModelForQuestionAnswering: (BinaryBertForQuestionAnswering,),
    AutoModelForSequenceClassification: (BinaryBertForSequenceClassification,),
    AutoModelForTokenClassification: (BinaryBertForTokenClassification,),
}

for config in (BinaryBertConfig, BinaryResNetConfig, BinaryViTConfig):
    AutoConfig.register(config.model_type, config)
for auto, classes in MODELS.items():
    for cls in classes:
        auto.register(cls.config_class, cls)

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
