"""Saving and loading of a binary model in training: checkpoints are latent, the final model is packed."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..convert import can_pack, pack_
from ..install import binary_fraction, load_method_state, method_state
from ..model_card import completed, facts_of, without_paths
from ..models.base import BinaryModelMixin

METHOD_STATE = "method_state.safetensors"


class PackedSaving(Trainer):
    """A Trainer whose final and pushed models are packed. Its checkpoint-N folders are latent, with the method's state.

    It goes before a Trainer with a `bare_model` among the bases.
    """

    _writing_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # push_to_hub also calls this internally, for the final model, without naming a folder.
        self._writing_checkpoint = _internal_call and output_dir is not None
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._writing_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self._writing_checkpoint or not self.args.save_packed or not _can_pack(self.model):
            super()._save(output_dir, state_dict)
            own = method_state(self.bare_model)
            if self._writing_checkpoint and self.args.should_save and own:
                save_file({key: value.contiguous() for key, value in own.items()}, Path(output_dir) / METHOD_STATE)
            return
        trained = self.model
        self.model = packed_copy(self.bare_model, state_dict, self.args.allow_unfinished)
        try:
            super()._save(output_dir)
        finally:
            self.model = trained

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        whole = self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        whole = whole or binary_fraction(self.bare_model) < 1
        if whole or not self.args.save_packed or not self.is_world_process_zero() or not _can_pack(self.model):
            super()._push_from_checkpoint(checkpoint_folder)
            return
        with tempfile.TemporaryDirectory() as folder:
            packed_copy(self.bare_model).save_pretrained(folder)
            super()._push_from_checkpoint(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers. The open sections of its draft are filled in with facts about the binary model."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and isinstance(self.bare_model, BinaryModelMixin):
            card = Path(self.args.output_dir) / "README.md"
            facts = facts_of(self.bare_model, self.args.save_packed and _can_pack(self.model))
            name = self.hub_model_id or Path(self.args.output_dir).absolute().name
            said = [value for value in kwargs.values() if isinstance(value, str)]
            sources = (*said, self.bare_model.config.name_or_path, self.args.output_dir)
            draft = without_paths(card.read_text(encoding="utf-8"), sources)
            card.write_text(completed(draft, facts, name), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_method(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_method(self.state.best_model_checkpoint)

    def _load_method(self, folder: str) -> None:
        path = Path(folder) / METHOD_STATE
        load_method_state(self.bare_model, load_file(path) if path.is_file() else {})


def packed_copy(
    model: nn.Module, state_dict: dict[str, Tensor] | None = None, allow_unfinished: bool = False
) -> nn.Module:
    """A packed copy of a latent model. `state_dict`: gathered weights to use in place of the model's own."""
    twin = copy.deepcopy(model)
    if state_dict:
        twin.load_state_dict(state_dict)
    return pack_(twin, allow_unfinished)


def _can_pack(model: nn.Module) -> bool:
    return not hasattr(model, "peft_config") and hasattr(model, "save_pretrained") and can_pack(model)
