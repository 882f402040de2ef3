"""Moves the files of a new save into a folder, beside or in place of those of older saves."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..model_card import body, facts_of
from ..nn.packed import is_packed
from .checkpoint import binary_config_of, read_config, structure_digest

if TYPE_CHECKING:
    from .base import BinaryModelMixin

STOCK_CARD = "This model card has been automatically generated."  # by transformers, where there is no card
TAGS = ("binary", "hf_bnn")
WEIGHT_FILE = re.compile(r".+\.safetensors(\.index(\..+)?\.json)?")


def publish(staging: str | os.PathLike, folder: str | os.PathLike, variant: str | None = None) -> None:
    """Move finished files into place, the config last, and delete the weights of an earlier save that they replace."""
    fresh = {path.name for path in Path(staging).iterdir()}
    for path in sorted(Path(staging).iterdir(), key=lambda p: p.name == CONFIG_NAME):
        os.replace(path, Path(folder) / path.name)
    same = weight_files(variant)
    if any(same.fullmatch(name) for name in fresh):  # one file after shards, or the other way round
        for path in Path(folder).iterdir():
            if same.fullmatch(path.name) and path.name not in fresh:
                path.unlink()


def weight_files(variant: str | None) -> re.Pattern:
    """The possible file names of a variant's weights: one file, or shards and their index."""
    dotted = re.escape(f".{variant}" if variant else "")
    return re.compile(rf"model{dotted}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{dotted}\.json")


def digests_of_other_variants(folder: Path, staging: Path, variant: str | None) -> dict[str, str]:
    """The digests to keep in the next config.json of `folder`: those of the files that stay and fit that config."""
    source = read_config(folder) if (folder / CONFIG_NAME).is_file() else None
    if source is None or structure_digest(source) != structure_digest(read_config(staging)):
        return {}
    listed = binary_config_of(source).get("weights_sha256")
    listed = listed if isinstance(listed, dict) else {}
    same, fresh = weight_files(variant), {path.name for path in staging.iterdir()}
    replaced = any(same.fullmatch(name) for name in fresh)  # adapters are saved beside the weights and replace none
    return {
        name: digest
        for name, digest in listed.items()
        if (folder / name).is_file() and not (replaced and same.fullmatch(name))
    }


def replace_stock_card(model: BinaryModelMixin, folder: Path, repository: str) -> None:
    """Replace the empty card that transformers put into `folder` by a binary model's card. Keeps a user's own card."""
    path = folder / "README.md"
    if not path.is_file() or STOCK_CARD not in path.read_text(encoding="utf-8"):
        return
    card = ModelCard.load(path)
    card.text = body(facts_of(model, packed=is_packed(model)), repository)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *TAGS]))
    card.save(path)


def undeclared_ties(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> list[str]:
    """The keys that this class may tie and this model does not: transformers would leave them out of the file.

    Example: a BERT with `tie_word_embeddings=False` whose vocabulary was resized shares its output layer's bias; loaded
    again, it has two.
    """
    patterns = list(model._tied_weights_keys or ())
    untied = (key for key in state_dict if key not in model.all_tied_weights_keys)
    return [key for key in untied if any(re.fullmatch(pattern, key) for pattern in patterns)]
