"""The measurements of quickstart.py: accuracy, size and speed of the float and the packed model, and the plot."""

from __future__ import annotations

import os
import platform
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from hf_bnn import optimize_, summary
from hf_bnn.machine import median_ms
from hf_bnn.tasks.glue_metric import GlueMetric
from hf_bnn.tasks.quickstart_results import MAX_LENGTH


def accuracy(logits: torch.Tensor, labels: list[int]) -> float:
    """The fraction of sentences whose larger logit is that of their label."""
    return GlueMetric("sst2").compute(predictions=logits.argmax(-1).tolist(), references=labels)["accuracy"]


@torch.no_grad()
def logits_of(model, tokenizer, sentences: Dataset) -> torch.Tensor:
    """Logits `(sentences, 2)` in batches of 125, in float32."""
    model.eval()
    columns = sentences.remove_columns("labels")
    batches = (tokenizer.pad(columns[i : i + 125], return_tensors="pt") for i in range(0, len(columns), 125))
    return torch.cat([model(**batch.to(model.device)).logits for batch in batches])


@torch.no_grad()
def latency(models: dict[str, torch.nn.Module], batch: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a forward pass of `batch` sequences of 64 tokens. The models take turns."""
    ids = torch.randint(1000, 20000, (batch, MAX_LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    calls = {name: partial(model, input_ids=ids, attention_mask=mask) for name, model in models.items()}
    return median_ms(calls, rounds)


def file_bytes(folder: Path) -> int:
    """The size of the weight files in `folder`, in bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def plot(path: Path, histories: dict[str, list[dict]], accuracies: dict[str, float | None]) -> None:
    """Write a PNG of the training losses over the steps, with the held-out accuracies in the titles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(histories), figsize=(10, 4))
    for axis, (name, history) in zip(axes, histories.items(), strict=True):
        points = [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]
        axis.plot([step for step, _ in points], [loss for _, loss in points])
        reached = "" if accuracies[name] is None else f": held-out accuracy {accuracies[name]:.1%}"
        axis.set(title=name + reached, xlabel="step", ylabel="training loss")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def measured(folder: Path, tokenizer, held_out: Dataset, latent: torch.nn.Module, smoke: bool) -> dict:
    """The figures of both models, reloaded from `folder` with Auto classes. A `smoke` run reports no accuracy."""
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher").eval()
    packed = AutoModelForSequenceClassification.from_pretrained(folder / "packed").eval()
    logits = {name: logits_of(m, tokenizer, held_out) for name, m in (("float", teacher), ("packed", packed))}
    reached = {name: accuracy(value, held_out["labels"][:]) for name, value in logits.items()}
    equal = torch.equal(logits["packed"], logits_of(latent.cpu(), tokenizer, held_out))
    counts = summary(packed)
    optimize_(packed)
    rounds = 3 if smoke else 30
    one, many = (latency({"float": teacher, "packed": packed}, batch, rounds) for batch in (1, 32))
    return {
        "smoke": smoke,
        "accuracy_float": None if smoke else reached["float"],
        "accuracy_binary": None if smoke else reached["packed"],
        "retention": None if smoke else reached["packed"] / reached["float"],
        "held_out": len(held_out),
        "bytes_float": file_bytes(folder / "teacher"),
        "bytes_packed": file_bytes(folder / "packed"),
        "matrix_compression": counts.matrix_compression if counts.binary_weights else None,
        "binary_share": counts.binary_share,
        "packed_equals_latent": equal,
        "latency_float_ms": one["float"],
        "latency_packed_ms": one["packed"],
        "latency_float_ms_batch32": many["float"],
        "latency_packed_ms_batch32": many["packed"],
    }


def versions_and_machine() -> dict[str, str | int]:
    """Versions of packages and facts about the machine, for results.json."""
    packages = ("hf-bnn", "torch", "transformers", "datasets", "accelerate")
    versions = {name: metadata.version(name) for name in packages}
    return {
        **versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
