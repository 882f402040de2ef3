"""Checks of a binary checkpoint against the model that it is loaded into."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import WeightTransform
from transformers.utils import CONFIG_NAME, cached_file

from ..integrity import CorruptCheckpointError
from ..nn.levels import OFFLOADED_LEVELS, LearnedLevels
from ..nn.packed import PACKED
from ..selection import matches
from .checkpoint import (
    AGAIN,
    Entry,
    binary_config_of,
    check_computed_buffers,
    check_dtype,
    headers,
    placed,
    read_config,
    structure_digest,
    verify_structure,
    verify_weight_files,
)

OPTIONAL = ("*pooler.*", "*mask_token")  # parts of the encoder that some heads lack
# Fields that a caller may change when loading a latent checkpoint.
RESTRUCTURING = ("binarize", "levels", "ffn_levels", "attention", "block", "block_activation", "unsigned")
# Errors that transformers, torch and safetensors raise when a model is built from a broken file.
BUILDING_ERRORS = (
    SafetensorError,
    StrictDataclassError,
    OSError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Arguments of from_pretrained that locate a checkpoint and do not affect its content.
WHERE = frozenset(
    {
        *("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies", "config"),
        *("code_revision", "trust_remote_code", "output_loading_info", "adapter_kwargs", "use_safetensors"),
        *("weights_only", "_from_auto", "_from_pipeline", "_commit_hash"),
    }
)


def one_line(error: BaseException) -> str:
    """The class and the message of an error, without line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are equal or both of one number: older files hold learned levels as scalars."""
    return tuple(one) == tuple(other) or {tuple(one), tuple(other)} <= {(), (1,)}


def refuse_offloading(model: nn.Module, device_map: dict[str, Any] | None) -> None:
    """Raise ValueError for a device_map that would offload learned levels: these are read without being called."""
    places = {str(place) for place in (device_map or {}).values()}
    offloads = "disk" in places or ("cpu" in places and len(places) > 1)
    if offloads and any(isinstance(module, LearnedLevels) for module in model.modules()):
        raise ValueError(OFFLOADED_LEVELS)


class CheckedLoading:
    """Checks the files before a model loads its weights from them. Comes before a transformers model class."""

    loaded_format: str  # what the checkpoint holds: float | latent | packed

    @classmethod
    def blame_the_file(cls, name: str, arguments: dict[str, Any], error: BaseException) -> None:
        """Raise CorruptCheckpointError if a file of hf_bnn caused `error`, rather than the caller's arguments."""
        where = {
            key: arguments[key] for key in ("cache_dir", "revision", "subfolder") if arguments.get(key) is not None
        }
        try:
            path = cached_file(name, CONFIG_NAME, local_files_only=True, **where)
        except OSError:
            return
        source = read_config(Path(path).parent)
        if source is None or source.get("model_type") != cls.config_class.model_type:
            return
        verify_structure(source, path)
        own = {key for key, value in arguments.items() if value is not None and key not in WHERE}
        if own or _differs(arguments.get("config"), cls.config_class, source):
            return
        raise CorruptCheckpointError(
            f"{name} cannot be loaded as a {cls.__name__}: {one_line(error)}; {AGAIN}"
        ) from error

    def check_files(self, files: list[str] | None, conversions: list[WeightTransform]) -> None:
        """Raise CorruptCheckpointError unless the weight files are unaltered and fit this model.

        Reads digests and headers only; allocates nothing. Files that hf_bnn did not write are not checked.
        """
        if not files:
            return
        folder, root = Path(files[0]).parent, Path(self.config.name_or_path or ".")
        inside = not root.is_dir() or (folder.is_relative_to(root) and ".." not in folder.relative_to(root).parts)
        folder = folder if inside else root
        source = read_config(folder)
        if source is None:
            saved, digests = self.loaded_format != "float", self.binary_config.weights_sha256
        else:
            saved, digests = self.wrote(source), binary_config_of(source).get("weights_sha256")
            self.__dict__["source"] = source if saved else None
        if not saved:
            return
        if source is not None:
            verify_structure(source, folder / CONFIG_NAME)
        if not isinstance(digests or {}, dict):
            raise CorruptCheckpointError(
                f"{folder / CONFIG_NAME} says weights_sha256={digests!r}, not a table: {AGAIN}"
            )
        if self.loaded_format == "packed" and source is not None and (fields := self.restructured(source)):
            asked = ", ".join(f"{field}={getattr(self.binary_config, field)!r}" for field in fields)
            raise ValueError(
                f"{folder} holds packed weights, and {asked} would make another model of them: load them as they are, "
                "or load the latent checkpoint to train it so"
            )
        verify_weight_files(files, folder, digests or {})
        self.check_headers(headers(files), conversions)

    def wrote(self, source: dict[str, Any]) -> bool:
        """Whether a config.json belongs to a model saved by this family (or, in the plug-in, by the plug-in)."""
        return source.get("model_type") == self.config_class.model_type

    def check_headers(self, entries: dict[str, Entry], conversions: list[WeightTransform]) -> None:
        """Raise CorruptCheckpointError for tensors that are missing, surplus, or of the wrong dtype or shape."""
        own = self.state_dict()
        check_computed_buffers(self, entries)
        found, elsewhere = placed(self, entries, conversions, own)
        for key, entry in found.items():
            if entry is not None:
                check_dtype(key, entry, own[key])
        if self.loaded_format == "float":
            return
        lost = [key for key in own if key not in found and not self.may_lack(key)]
        lost += [
            key
            for key, entry in found.items()
            if entry is not None and not same_shape(entry.shape, own[key].shape) and self.in_encoder(key)
        ]
        self.refuse_lost(lost)
        surplus = sorted(key for key in elsewhere if not self.may_have(key))
        if surplus:
            raise CorruptCheckpointError(
                f"the {self.loaded_format} checkpoint {self.config.name_or_path!r} holds {surplus[0]!r} and "
                f"{len(surplus) - 1} more tensors for which this {type(self).__name__} has no place: its {CONFIG_NAME} "
                f"is not that of its weights; {AGAIN}"
            )

    def refuse_lost(self, keys: list[str]) -> None:
        """Raise CorruptCheckpointError if any keys are missing."""
        if keys:
            lost = sorted(keys)
            raise CorruptCheckpointError(
                f"the {self.loaded_format} checkpoint {self.config.name_or_path!r} lacks {lost[0]!r} and "
                f"{len(lost) - 1} more tensors (or they have another shape): {AGAIN}"
            )

    def in_encoder(self, key: str) -> bool:
        """Whether a tensor belongs to the encoder, which models with all heads share. True of all packed tensors."""
        if isinstance(self.get_submodule(key.rpartition(".")[0]), tuple(PACKED.values())):
            return True
        encoder = f"{self.base_model_prefix}." if hasattr(self, self.base_model_prefix) else ""
        return key.startswith(encoder)

    def may_lack(self, key: str) -> bool:
        """Whether a binary checkpoint may lack the tensor `key`, which then gets its initial values.

        True of tensors that another head lacks, unless they are packed: missing bits would be random.
        """
        ignored = (*(self._keys_to_ignore_on_load_missing or ()), *map(re.escape, self._keys_to_ignore_on_save or ()))
        if key in self.all_tied_weights_keys or any(re.search(pattern, key) for pattern in ignored):
            return True
        source = self.__dict__.get("source")
        # A latent checkpoint may lack levels: weights-only training then continues with binary inputs.
        if self.loaded_format == "latent" and key.startswith(self.level_prefixes()):
            return source is None or bool(self.restructured(source))
        if self.in_encoder(key):
            return matches(key, OPTIONAL) and not isinstance(
                self.get_submodule(key.rpartition(".")[0]), tuple(PACKED.values())
            )
        return source is None or type(self).__name__ not in (source.get("architectures") or ())

    def may_have(self, key: str) -> bool:
        """Whether a binary checkpoint may hold a tensor `key` that this model lacks: one of another head."""
        ignored = (*(self._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
        if matches(key, OPTIONAL) or any(re.search(pattern, key) for pattern in ignored):
            return True
        source = self.__dict__.get("source")
        if source is None or (self.loaded_format == "latent" and self.restructured(source)):
            return True
        if type(self).__name__ in (source.get("architectures") or ()):
            return False
        inner = key.removeprefix(f"{self.base_model_prefix}.")
        return inner == key and inner.partition(".")[0] not in dict(self.base_model.named_children())

    def restructured(self, source: dict[str, Any]) -> list[str]:
        """The fields in which this model's structure differs from a config.json, such as `levels`."""
        config, saved = self.binary_config.to_dict(), binary_config_of(source)
        # The headers show which layers are packed, and another head adds its own layers to the excluded ones.
        fields = (*RESTRUCTURING, "exclude") if self.loaded_format == "latent" else RESTRUCTURING
        return [field for field in fields if saved.get(field, config.get(field)) != config.get(field)]


def _differs(config: PreTrainedConfig | None, cls: type[PreTrainedConfig], source: dict[str, Any]) -> bool:
    """Whether a caller's config describes another model than a config.json does."""
    if config is None:
        return False
    try:
        return structure_digest(config.to_dict()) != structure_digest(cls.from_dict(source).to_dict())
    except BUILDING_ERRORS:
        return False  # the file holds no valid config
