"""The record of a training run: written into each checkpoint, and compared field by field when it is resumed."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime, timezone
from typing import Any, NamedTuple

from torch import nn
from transformers import TrainingArguments

from ..nn.layers import binary_layers

# Fields of a model's config that do not change its computation, or that are set only during training.
NO_STRUCTURE = ("name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "method")
NO_STRUCTURE += ("weight_format", "use_cache", "problem_type", "id2label", "label2id", "model_type", "quant_method")
NO_STRUCTURE += ("finetuning_task", "is_encoder_decoder", "output_hidden_states", "output_attentions", "return_dict")
NO_STRUCTURE += ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping")
NO_STRUCTURE_ENDINGS = ("_token_id", "sha256")

DATA = "the order of the rows"
SETTINGS = (  # arguments that may change in the middle of a run, with a warning
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "fp16",
    "bf16",
    "sync_batchnorm",
    "aux_learning_rate_multiplier",
    "levels_learning_rate_multiplier",
    "distillation_labels_weight",
    "distillation_logits_weight",
    "distillation_hidden_weight",
    "distillation_temperature",
)


class Difference(NamedTuple):
    """A field in which two runs differ. `another`: the difference would make the resumed run a different one."""

    field: str
    was: Any
    now: Any
    another: bool
    why: str = ""

    def __str__(self) -> str:
        because = f" ({self.why})" if self.why else ""
        return f"{self.field} was {self.was!r} and is {self.now!r}{because}"


def now() -> str:
    """The current time, as text that sorts by time."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def model_record(model: nn.Module) -> dict[str, Any]:
    """The facts that determine a model's computation: class, config fields by dotted names, binary layers."""
    config = getattr(model, "config", None)
    fields = _flat(config.to_dict()) if hasattr(config, "to_dict") else {}
    kinds = Counter(_kind(layer) for layer in binary_layers(model))
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        settings = {field: _names(value) for field, value in adapter.to_dict().items()}
        fields.update(_flat(settings, f"adapter {name}."))
    labels = len(getattr(config, "id2label", None) or ())
    return {"class": type(model).__name__, **fields, "labels": labels, "binary layers": dict(sorted(kinds.items()))}


def _names(value: Any) -> Any:
    """A list of names, sorted and without repetitions: PEFT appends the head's names each time it builds a model."""
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return sorted(set(value)) if names else value


def _kind(layer: nn.Module) -> str:
    levels = getattr(layer, "input_levels", None)
    settings = [getattr(layer, name) for name in ("binarize", "weight_scaling") if hasattr(layer, name)]
    if levels is not None:
        settings.append(f"{type(levels).__name__}({levels.extra_repr()})")
    return f"{type(layer).__name__}({', '.join(settings)})"


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts flattened to one, without the fields that are not structure."""
    found = {}
    for name, value in fields.items():
        if name.startswith("_") or name in NO_STRUCTURE or name.endswith(NO_STRUCTURE_ENDINGS):
            continue
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = sorted(value) if isinstance(value, set) else value
    return found


def run_record(
    started: str,
    model: nn.Module,
    args: TrainingArguments,
    batch_size: int,
    rows: int | None,
    max_steps: int,
    method: Any = None,
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """All that `differences` compares, as JSON values. `batch_size`: of one process; `rows`: None for a stream."""
    data = {
        "seed": args.seed,
        "data_seed": args.data_seed,
        "rows": rows,
        "rows of a step": batch_size * args.gradient_accumulation_steps * args.world_size,
        "train_sampling_strategy": getattr(args, "train_sampling_strategy", None),
        "dataloader_drop_last": args.dataloader_drop_last,
    }
    settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    split = {"batch size": batch_size, "gradient_accumulation_steps": args.gradient_accumulation_steps}
    record = {
        "started": started,
        "model": model_record(model),
        "method": None if method is None else method.to_dict(),
        "scheduled": bool(getattr(method, "scheduled", False)),
        "data": data,
        "max_steps": max_steps,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "settings": {
            **settings,
            **split,
            "processes": args.world_size,
            "teacher": None if teacher is None else type(teacher).__name__,
        },
    }
    return json.loads(json.dumps(record, default=lambda value: str(getattr(value, "value", value))))


def differences(was: dict[str, Any], now: dict[str, Any], ignore_data_skip: bool = False) -> list[Difference]:
    """Every field in which two records differ, those that make a different run first."""
    found = _compared(was, now, "model", _changes_the_model)
    if len(found) > 1:  # the config's fields already show it
        found = [difference for difference in found if difference.field != "binary layers"]
    if was["method"] != now["method"]:
        found += _of_method(was, now)
    found += _compared(was, now, "data", lambda name: not ignore_data_skip, DATA)
    if was["max_steps"] != now["max_steps"]:
        why = "the method's schedule" if now["scheduled"] else "the learning rate follows the new end"
        found.append(Difference("max_steps", was["max_steps"], now["max_steps"], now["scheduled"], why))
    if was["optim"] != now["optim"]:
        found.append(Difference("optim", was["optim"], now["optim"], True, "its state is another's"))
    found += _compared(was, now, "settings", lambda name: False)
    return sorted(found, key=lambda difference: not difference.another)


def _compared(was: dict, now: dict, part: str, another: Any, why: str = "") -> list[Difference]:
    one, other = was.get(part) or {}, now.get(part) or {}
    return [
        Difference(name, one[name], other[name], another(name), why)
        for name in one
        if name in other and one[name] != other[name]  # another version of this package may record other fields
    ]


def _changes_the_model(name: str) -> bool:
    return "dropout" not in name and not name.endswith("_drop")


def _of_method(was: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    one, other = was["method"] or {}, now["method"] or {}
    if one.get("name") != other.get("name"):
        return [Difference("method", one.get("name"), other.get("name"), True, "resume with the same --method")]
    scheduled = was["scheduled"] or now["scheduled"]
    why = "the method's schedule has come to where the old ones led it" if scheduled else ""
    found = _compared(was, now, "method", lambda name: scheduled, why)
    return [difference._replace(field=f"method_args {difference.field}") for difference in found]
