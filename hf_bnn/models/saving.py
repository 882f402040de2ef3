"""How files of a new save take their place beside, or instead of, those of older ones."""

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

STOCK_CARD = "This model card has been automatically generated."  # by transformers, for a repository without one
TAGS = ("binary", "hf_bnn")
WEIGHT_FILE = re.compile(r".+\.safetensors(\.index(\..+)?\.json)?")


def publish(staging: str | os.PathLike, folder: str | os.PathLike, variant: str | None = None) -> None:
    """Move finished files into place, the config last. Weights of an earlier save that these replace go."""
    fresh = {path.name for path in Path(staging).iterdir()}
    for path in sorted(Path(staging).iterdir(), key=lambda p: p.name == CONFIG_NAME):
        os.replace(path, Path(folder) / path.name)
    same = weight_files(variant)
    if any(same.fullmatch(name) for name in fresh):  # one file after shards, or the other way round
        for path in Path(folder).iterdir():
            if same.fullmatch(path.name) and path.name not in fresh:
                path.unlink()


def weight_files(variant: str | None) -> re.Pattern:
    """The names that the weights of a variant can have, whole or in shards with their index."""
    dotted = re.escape(f".{variant}" if variant else "")
    return re.compile(rf"model{dotted}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{dotted}\.json")


def digests_of_other_variants(folder: Path, staging: Path, variant: str | None) -> dict[str, str]:
    """The digests that the next config.json in `folder` takes over: of files that stay, and that it describes too."""
    source = read_config(folder) if (folder / CONFIG_NAME).is_file() else None
    if source is None or structure_digest(source) != structure_digest(read_config(staging)):
        return {}
    listed = binary_config_of(source).get("weights_sha256")
    listed = listed if isinstance(listed, dict) else {}
    same, fresh = weight_files(variant), {path.name for path in staging.iterdir()}
    replaced = any(same.fullmatch(name) for name in fresh)  # not by adapters, which are saved beside the weights
    return {
        name: digest
        for name, digest in listed.items()
        if (folder / name).is_file() and not (replaced and same.fullmatch(name))
    }


def replace_stock_card(model: BinaryModelMixin, folder: Path, repository: str) -> None:
    """Write the card of a binary model over the empty one that transformers has put into `folder`; none of a user's."""
    path = folder / "README.md"
    if not path.is_file() or STOCK_CARD not in path.read_text(encoding="utf-8"):
        return
    card = ModelCard.load(path)
    card.text = body(facts_of(model, packed=is_packed(model)), repository)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *TAGS]))
    card.save(path)


def undeclared_ties(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> list[str]:
    """The keys that may be tied in a model of this class, but are not in this one: transformers would leave them out.

    A BERT with `tie_word_embeddings=False` shares the bias of its output layer after the vocabulary was resized; loaded
    again it has two of them.
    """
    patterns = list(model._tied_weights_keys or ())
    untied = (key for key in state_dict if key not in model.all_tied_weights_keys)
    return [key for key in untied if any(re.fullmatch(pattern, key) for pattern in patterns)]
