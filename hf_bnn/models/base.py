"""The base of all binary model classes: how they are built, loaded and saved."""

from __future__ import annotations

import os
import shutil
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging

from ..adapters import refuse_adapted
from ..convert import set_weight_format, to_binary_, to_packed_
from ..fused import optimize_
from ..install import install_method, method_state_names
from ..integrity import CorruptCheckpointError, file_digest
from ..nn.activations import RPReLU
from ..nn.finite import check_finite, tensors_to_check
from ..nn.layers import BinaryLayer, BinaryLinear
from ..nn.levels import ElasticLevels, LearnedLevels, SignedLevels
from ..nn.packed import PACKED, is_packed
from ..nn.scalar_levels import levels_as_saved
from ..selection import check_patterns, choose_layers, pattern_list, unmatched
from ..summary import composition
from .checkpoint import AGAIN, check_padding, write_structure_digest
from .config import BinaryConfigFields
from .loading import BUILDING_ERRORS, CheckedLoading, refuse_offloading
from .plain_trainer import notice_plain_trainer
from .saving import WEIGHT_FILE, digests_of_other_variants, publish, replace_stock_card, undeclared_ties

logger = logging.get_logger(__name__)

OWN_PARTS = (LearnedLevels, RPReLU)  # modules whose parameters a float checkpoint lacks


class BinaryModelMixin(CheckedLoading):
    """Makes the linear and conv2d layers of a transformers model binary. Comes before the model's class.

    A family overrides methods to choose the levels of each layer's input and to replace other modules.
    """

    # Patterns of modules in attention, feed-forward or residual blocks that `optimize_` does not fuse, with reasons.
    unfused: ClassVar[dict[str, str]] = {}

    def __init__(self, config, *args, **kwargs):
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(config).__name__}: "
                f"make one with {self.config_class.__name__}(**config.to_dict())"
            )
        self.prepare_config(config)
        super().__init__(config, *args, **kwargs)
        self.loaded_format = config.weight_format
        self.rewrite()
        if config.binarize == "none":
            return
        structure = (self.chosen_layers(), config.binarize, self.input_levels, config.weight_scaling)
        if config.weight_format == "packed":
            to_packed_(self, *structure)
        else:
            install_method(to_binary_(self, *structure))
            config.weight_format = "latent"

    def chosen_layers(self) -> dict[nn.Module, str]:
        """The layers to make binary, with their names. Raises ValueError for a pattern that matches nothing."""
        config = self.config
        patterns = config.exclude = pattern_list("exclude", config.exclude)
        own = [pattern for pattern in patterns if pattern not in config.family_patterns]
        if config.weight_format == "float":
            check_patterns(self, "exclude", own)
        elif lost := unmatched(self, own):  # of another head, perhaps
            logger.warning(
                f"the exclude patterns {lost} match no module of {type(self).__name__}: none stays float by them"
            )
        return choose_layers(self, None, patterns, check=False)

    @property
    def binary_config(self) -> BinaryConfigFields:
        """The config that records what is binary and what the checkpoint holds."""
        return self.config

    def prepare_config(self, config) -> None:
        """Adjust the config, in place, before the float model is built from it."""

    def input_levels(self, name: str) -> SignedLevels:
        """The levels of the input of the binary layer called `name`."""
        return ElasticLevels() if self.config.levels == "elastic" else SignedLevels()

    def rewrite(self) -> None:
        """Replace other parts of the float model (tables, blocks) before its layers become binary."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; a binary output layer stays binary. Raises ValueError if either is packed."""
        parts = {"word table": self.get_input_embeddings(), "output layer": self.get_output_embeddings()}
        for name, part in parts.items():
            if isinstance(part, tuple(PACKED.values())):
                raise ValueError(
                    f"the {name} is packed: its rows are integers and cannot be resized. Call hf_bnn.unpack_(model), "
                    "resize, train the new rows, and pack it again"
                )
        table = super().resize_token_embeddings(*args, **kwargs)
        if isinstance(parts["output layer"], BinaryLayer):
            install_method(self)  # parts are of a layer's size
        return table

    def _get_resized_lm_head(self, old_lm_head: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        new = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        if not isinstance(old_lm_head, BinaryLinear) or isinstance(new, BinaryLinear):
            return new
        structure = (old_lm_head.binarize, old_lm_head.input_levels, old_lm_head.weight_scaling)
        return BinaryLinear.from_float(new.train(old_lm_head.training), *structure)

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            notice_plain_trainer(self)
        return super().train(mode)

    # Loading: from_pretrained and its hooks.

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, optimize: bool = False, **kwargs):
        """As in transformers. `optimize` runs `hf_bnn.optimize_` on a packed checkpoint.

        Raises CorruptCheckpointError for a binary checkpoint that was altered since it was saved or cannot be read.
        """
        try:
            found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except BUILDING_ERRORS as error:
            if not isinstance(error, CorruptCheckpointError) and not args:
                cls.blame_the_file(str(pretrained_model_name_or_path), kwargs, error)
            raise
        model = found[0] if isinstance(found, tuple) else found  # with the loading info, if that is asked for
        if model.loaded_format == "float" and model.binary_config.binarize != "none":
            logger.warning(f"{type(model).__name__}: {composition(model)}")
        if optimize:
            if not is_packed(model):
                raise ValueError(
                    f"optimize=True, but {pretrained_model_name_or_path} holds {model.loaded_format} weights: load it "
                    "without, train it if it is float, and call hf_bnn.optimize_(hf_bnn.pack_(model))"
                )
            optimize_(model)
        return found

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        refuse_offloading(model, load_config.device_map)
        if "expected_keys" not in kwargs:  # which only adapters have, in files of their own
            model.check_files(checkpoint_files, deepcopy(load_config.weight_mapping or []))
        found = (state_dict, checkpoint_files)
        try:
            found = model.float_weights(*found) if model.loaded_format == "float" else found
            parent = super(BinaryModelMixin, type(model))._load_pretrained_model
            with levels_as_saved(model, *found):
                return parent(model, *found, load_config, *args, **kwargs)
        except SafetensorError as error:
            raise CorruptCheckpointError(
                f"{', '.join(map(str, checkpoint_files))} cannot be read ({error}): {AGAIN}"
            ) from error

    def float_weights(
        self, state_dict: dict[str, Tensor] | None, files: list[str] | None
    ) -> tuple[dict[str, Tensor] | None, list[str] | None]:
        """The weights to load of a float checkpoint, in memory or in files. Renames the weights of a related family."""
        return state_dict, files

    def _move_missing_keys_from_meta_to_device(self, missing_keys, device_map, *args, **kwargs):
        refuse_offloading(self, device_map)
        if self.loaded_format != "float":
            self.refuse_lost([key for key in missing_keys if self.in_encoder(key) and not self.may_lack(key)])
        super()._move_missing_keys_from_meta_to_device(missing_keys, device_map, *args, **kwargs)
        check_padding(self)
        self.__dict__.pop("source", None)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        # Levels start at their own initial values: they are not missing from a float checkpoint.
        fresh = self.level_prefixes()
        loading_info.missing_keys = {key for key in loading_info.missing_keys if not key.startswith(fresh)}

    def level_prefixes(self) -> tuple[str, ...]:
        """The prefixes of the state dict's keys that float models lack: those of levels and of RPReLU."""
        return tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, OWN_PARTS))

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for module in self.modules():  # the stock model's own loop skips them
            if isinstance(module, OWN_PARTS):
                if all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
                    module.fresh = False
                else:
                    module.reset_parameters()

    # Saving.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in transformers, with three differences.

        A training method's state is left out, config.json receives the digests of the weight files, and the files in
        the folder are replaced only after all new ones are written.
        """
        refuse_adapted(self)
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        for name in method_state_names(self):
            state_dict.pop(name, None)
        for name in undeclared_ties(self, state_dict):
            state_dict[name] = state_dict[name].clone()
        checked = {key: state_dict.get(key) for key in tensors_to_check(self)}
        check_finite(f"save {type(self).__name__}", checked)
        config = self.binary_config
        set_weight_format(self)
        if not is_main_process:
            return
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "create_pr", "revision") if key in kwargs}
        os.makedirs(save_directory, exist_ok=True)
        staging = tempfile.mkdtemp(prefix=".saving-", dir=save_directory)
        try:
            super().save_pretrained(staging, state_dict=state_dict, **kwargs)
            weights = sorted(p.name for p in Path(staging).iterdir() if WEIGHT_FILE.fullmatch(p.name))
            config.weights_sha256 = {name: file_digest(Path(staging) / name) for name in weights}
            self.config.save_pretrained(staging)
            kept = digests_of_other_variants(Path(save_directory), Path(staging), kwargs.get("variant"))
            if kept:
                config.weights_sha256 = {**kept, **config.weights_sha256}
                self.config.save_pretrained(staging)
            write_structure_digest(Path(staging))
            publish(staging, save_directory, kwargs.get("variant"))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"could not save to {save_directory}: {error}. Nothing that was there has changed; "
                "free some space, or choose another folder, and save again"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **hub)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any):
        replace_stock_card(self, Path(working_dir), repo_id)  # the last moment before push_to_hub's upload
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
