"""Binary model families. Importing this registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForSequenceClassification

from .bert import BinaryBertConfig, BinaryBertForSequenceClassification

AutoConfig.register(BinaryBertConfig.model_type, BinaryBertConfig)
AutoModelForSequenceClassification.register(BinaryBertConfig, BinaryBertForSequenceClassification)

__all__ = ["BinaryBertConfig", "BinaryBertForSequenceClassification"]
