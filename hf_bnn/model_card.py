"""The model card of a binary model: what is binary, its size, how to run it, and its limits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .summary import summary

TO_DO = "More information needed"  # transformers' placeholder

LAYERS = "of its linear and convolution layers but those below"
WHAT_IS_BINARY = {
    "both": f"weights and inputs {LAYERS}",
    "weights": f"weights (inputs are float) {LAYERS}",
    "activations": f"inputs (weights are float) {LAYERS}",
    "none": "nothing: a float network of the same structure",
}


class Facts(NamedTuple):
    """The content of a card. `structure` holds the fields of the model's config or of its quantization_config."""

    architecture: str  # the model's class
    structure: Mapping[str, Any]
    method: str  # the one that trained the weights
    binary_share: float  # of all weights, 0 to 1
    matrix_compression: float | None  # float32 bytes of the binary matrices over their packed bytes; None without any
    packed: bool = True  # whether the file holds bits, or latent float weights
    plugged_in: bool = False  # a stock class, made binary by a quantization_config


def facts_of(model: nn.Module, packed: bool) -> Facts:
    """The facts of a latent or packed transformers model. `packed`: whether its file holds bits."""
    config, counted = model.binary_config.to_dict(), summary(model)
    plugged_in = config.get("quant_method") is not None
    trained = config.get("method") or getattr(model.config, "method", None) or {}
    settings = ", ".join(f"{key}={value}" for key, value in trained.items() if key not in ("name", "class"))
    method = f"{trained.get('name', 'unknown')}" + (f" ({settings})" if settings else "")
    name = type(model).__name__
    compression = counted.matrix_compression if counted.binary_weights else None
    return Facts(name, config, method, counted.binary_share, compression, packed, plugged_in)


def description(facts: Facts) -> str:
    """The section on what the model is, Markdown without a heading."""
    field = facts.structure.get
    rows = [
        ("binary", WHAT_IS_BINARY[field("binarize", "both")]),
        ("levels of the inputs", field("levels")),
        ("levels of the inputs behind GELU", field("ffn_levels")),
        ("products of attention", field("attention")),
        ("word embeddings", field("embeddings")),
        ("scales of the weights' signs", f"one per {field('weight_scaling')}" if field("weight_scaling") else None),
        ("float", ", ".join(f"`{name}`" for name in field("skip") or field("exclude") or ())),
        ("training method", facts.method),
        ("weights of which only the sign is used", f"{facts.binary_share:.1%} of all"),
    ]
    if facts.matrix_compression is not None:
        rows.append(("their size, scales included", f"{facts.matrix_compression:.1f} times smaller than float32"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    held = (
        "bits"
        if facts.packed
        else "float weights (latent ones, where they are binary): it is no smaller than a float model's"
    )
    return f"A `{facts.architecture}` of hf_bnn. The file holds {held}.\n\n| | |\n|---|---|\n{table}"


def usage(facts: Facts, name: str, beside_float: bool = False) -> str:
    """The section on how to load the model, and on its limits. `name` is the repository or the folder.

    `beside_float`: the card has a table with the columns `float` and `binary`.
    """
    optimized = facts.packed and not facts.plugged_in
    call = f'{facts.architecture}.from_pretrained("{name}"{", optimize=True" if optimized else ""})'
    origin = "transformers" if facts.plugged_in else "hf_bnn"
    lines = [f"from {origin} import {facts.architecture}", "", f"model = {call}"]
    lines = ["import hf_bnn  # before the model is loaded", *lines] if facts.plugged_in else lines
    code = "\n".join(lines)
    limits = ["It needs the package hf_bnn: transformers alone does not know its layers."]
    if beside_float:
        limits.append("The column `binary` is of this model; `float` is of the float model that it is compared with.")
    elif facts.structure.get("binarize") != "none":
        limits.append("All figures here are of the binary model, not of the float weights behind it.")
    return f"```python\n{code}\n```\n\n" + "\n".join(f"- {text}" for text in limits)


def without_paths(card: str, sources: Iterable[str | None]) -> str:
    """The card with every source that is a local path shortened to its last part.

    The Hub cannot link to such a `base_model`, so that line is dropped.
    """
    for source in filter(None, sources):
        if os.path.isabs(source) or os.path.isdir(source) or source.startswith("."):
            name = Path(source).name
            card = card.replace(f"base_model: {source}\n", "")
            card = card.replace(f"[{source}](https://huggingface.co/{source})", name).replace(source, name)
    return card


def body(facts: Facts, name: str) -> str:
    """A whole card without its metadata, for the repository `name`."""
    return f"# {name.rpartition('/')[2]}\n\n{description(facts)}\n\n## How to use it\n\n{usage(facts, name)}\n"


def completed(card: str, facts: Facts, name: str) -> str:
    """transformers' draft of a card, with its placeholders replaced by the two sections."""
    for heading, text in (
        ("## Model description", description(facts)),
        ("## Intended uses & limitations", usage(facts, name)),
    ):
        card = card.replace(f"{heading}\n\n{TO_DO}", f"{heading}\n\n{text}")
    return card
