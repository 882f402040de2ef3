"""Checks of a binary checkpoint's files before any tensor is loaded."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key
from transformers.utils import CONFIG_NAME

from ..integrity import CorruptCheckpointError, verify_files
from ..nn.packed import PackedBinaryEmbedding, PackedConv2d, PackedLinear

AGAIN = "fetch or save it again"
CONFIG_DIGEST = "config_sha256"
# Fields of config.json that may change without changing the model. The digest covers all others, known or not.
NOT_STRUCTURAL = frozenset(
    {
        CONFIG_DIGEST,
        "weights_sha256",
        "method",  # how it was trained, for the model card
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "finetuning_task",
        "label2id",
    }
)

MOST_LAYERS = 1000  # more than any model of transformers; each takes milliseconds to build before any file is checked
MOST_LABELS = 2**20  # transformers makes a name for each when it reads a config
LARGEST_SIZE = 2**31 - 1
DEPTH = re.compile(r"(^|_)(layers?|depths?|blocks|stages|experts)$")
SIZE = re.compile(
    r"(^|_)(vocab|hidden|embedding|intermediate|patch|image)_sizes?$|(^|_)(heads|channels|dim|positions)$"
)
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
SPARE_BYTES = 2**28  # for buffers that are computed rather than loaded
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
INTEGERS = {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
DTYPES = {**FLOATS, **INTEGERS, "BOOL": torch.bool}


class Entry(NamedTuple):
    """One tensor's entry in the header of a weight file."""

    file: Path
    dtype: torch.dtype | None  # None: a dtype that no binary model uses
    shape: tuple[int, ...]


# The config


def structure_digest(config: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the fields of a config.json that determine what the weights mean.

    Computed from the written file, not from a config object: later versions of transformers add fields to objects.
    """
    text = json.dumps(_structural(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _structural(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(key): _structural(item) for key, item in value.items() if key not in NOT_STRUCTURAL}
        if isinstance(value.get("id2label"), Mapping):  # labels may be renamed, but their number is fixed
            kept["id2label"] = sorted(map(str, value["id2label"]))
        return kept
    if isinstance(value, list | tuple):
        return [_structural(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):  # the form in which transformers writes it
        return {"__float__": {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}[str(value)]}
    return value


def binary_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that says what is binary: its quantization_config or, in a binary family, all of it."""
    plugged_in = config.get("quantization_config")
    return plugged_in if isinstance(plugged_in, dict) else dict(config)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json; None if there is none. Raises CorruptCheckpointError if it is not a JSON object."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is not valid JSON ({error}): {AGAIN}") from error
    if not isinstance(config, dict):
        raise CorruptCheckpointError(f"{path} holds a {type(config).__name__}, not a JSON object: {AGAIN}")
    return config


def write_structure_digest(folder: Path) -> None:
    """Write the digest of the folder's config.json into it, beside those of the weights."""
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    digest = structure_digest(config)
    config.get("quantization_config", config)[CONFIG_DIGEST] = digest
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verify_structure(config: Mapping[str, Any], name: str | Path = CONFIG_NAME) -> None:
    """Raise CorruptCheckpointError if a config.json does not match the digest that it holds."""
    expected = binary_config_of(config).get(CONFIG_DIGEST)
    if expected is not None and expected != structure_digest(config):
        raise CorruptCheckpointError(
            f"{name} was altered after it was saved: what its fields say of the weights' meaning is not what "
            f"{CONFIG_DIGEST} stands for. {AGAIN.capitalize()}, or, if it was you who changed it, take "
            f"{CONFIG_DIGEST} out"
        )


def check_sizes(config: Mapping[str, Any], name: str | Path = CONFIG_NAME) -> None:
    """Raise CorruptCheckpointError for negative sizes and for implausible ones, which would exhaust time or memory."""
    for field, value in _numbers(config):
        last = field.rpartition(".")[2]
        deep = DEPTH.search(last)
        limit = MOST_LAYERS if deep else MOST_LABELS if last == "num_labels" else LARGEST_SIZE
        if value > limit:
            raise CorruptCheckpointError(f"{name} says {field}={value:.15g}, but at most {limit} is plausible: {AGAIN}")
        if value < 0 and SIZE.search(last):
            raise CorruptCheckpointError(f"{name} says {field}={value:.15g}, but a size is at least 0: {AGAIN}")


def _numbers(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}.")
        elif isinstance(value, list | tuple):
            numbers = [item for item in value if isinstance(item, int | float)]
            if numbers:
                yield name, min(numbers) if min(numbers) < 0 else sum(numbers)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


# The weight files


def verify_weight_files(files: list[str], folder: Path, digests: Mapping[str, str]) -> None:
    """Raise CorruptCheckpointError for a file outside `folder`, unlisted in `digests`, altered, or not safetensors.

    Files are looked up by the name asked for: in the Hub's cache each name is a link to a blob.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if path.parent != folder:
            raise CorruptCheckpointError(
                f"{path} is outside of the checkpoint's folder {folder}, but its index names it: {AGAIN}"
            )
        if path.suffix != ".safetensors":
            raise CorruptCheckpointError(
                f"{path} would be loaded, but binary weights are written as safetensors only: take it away, and "
                f"{AGAIN.replace('it', 'the checkpoint')}"
            )
    if not digests:
        return
    names = {path.name for path in paths}
    for name in sorted(names - digests.keys()):
        raise CorruptCheckpointError(
            f"{folder / name} is not among the files that weights_sha256 in {CONFIG_NAME} lists "
            f"({', '.join(digests)}): it comes from another save. Take it away if it is old, or save the model again"
        )
    wanted = names | {other for name in names for other in digests if _belongs(other, name)}
    verify_files(folder, {name: digests[name] for name in sorted(wanted)})
    for name in sorted(wanted - names):
        if name.endswith(".safetensors"):
            raise CorruptCheckpointError(f"{folder / name} is left out by the index of its shards: {AGAIN}")


def _belongs(other: str, name: str) -> bool:
    """Whether the file `other` belongs to the same set of shards as `name`, or is the index of that set."""
    shard = SHARD.fullmatch(name)
    if not shard:
        return False
    stem, _, variant = shard["stem"].partition(".")
    sibling = SHARD.fullmatch(other)
    if sibling:
        return (sibling["stem"], sibling["count"]) == (shard["stem"], shard["count"])
    return other == f"{stem}.safetensors.index{'.' if variant else ''}{variant}.json"


def headers(files: list[str]) -> dict[str, Entry]:
    """The entries of the weight files' headers, by key. Reads no tensor."""
    found = {}
    for path in map(Path, files):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    found[key] = Entry(path, DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptCheckpointError(f"{path} cannot be read ({error}): {AGAIN}") from error
    return found


def placed(
    model: PreTrainedModel, entries: Mapping[str, Entry], conversions: list[WeightTransform], own: Mapping[str, Tensor]
) -> tuple[dict[str, Entry | None], list[str]]:
    """The files' tensors by their keys in the model's state dict `own`, and the names of those without a place in it.

    An entry is None where the tensor is assembled from several, which only loading can check.
    """
    renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    base, found, elsewhere = model.base_model_prefix, {}, []
    for key, entry in entries.items():
        name, pattern = rename_source_key(key, renamings, converters, base, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=base, meta_state_dict=own)
        if name in own:
            found[name] = entry if pattern is None else None
        elif pattern is None:
            elsewhere.append(name)
    return found, elsewhere


def check_dtype(key: str, entry: Entry, expected: Tensor) -> None:
    """Raise CorruptCheckpointError for integers in place of floats, and the other way round."""
    both_float = expected.is_floating_point() and entry.dtype in FLOATS.values()
    if not both_float and entry.dtype != expected.dtype:
        raise CorruptCheckpointError(f"{entry.file} holds {key!r} as {entry.dtype}, not as {expected.dtype}: {AGAIN}")


def check_computed_buffers(model: nn.Module, entries: Mapping[str, Entry]) -> None:
    """Raise CorruptCheckpointError if the computed buffers would need far more memory than the files hold."""
    computed = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    held = sum(math.prod(entry.shape) for entry in entries.values())
    if computed > SPARE_BYTES + 16 * held:
        raise CorruptCheckpointError(
            f"the buffers of this {type(model).__name__} would take {computed / 2**30:.1f} GiB, its weights hold "
            f"{held} numbers: its {CONFIG_NAME} has sizes that are not those of its weights; {AGAIN}"
        )


def check_padding(model: nn.Module) -> None:
    """Raise CorruptCheckpointError if a packed row has bits set past its end: kernels would count them."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            size, last = module.in_features, module.weight[..., -1]
        elif isinstance(module, PackedBinaryEmbedding):
            size, last = module.embedding_dim, module.weight[..., -1]
        elif isinstance(module, PackedConv2d):
            size, last = module.in_channels // module.groups, module.weight[:, -1]
        else:
            continue
        if size % 8 and not last.is_meta and bool((last >> (size % 8)).any()):
            raise CorruptCheckpointError(f"{name}.weight has bits set behind the end of its rows of {size}: {AGAIN}")
