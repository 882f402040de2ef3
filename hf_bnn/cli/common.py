"""Shared by the commands: the parser, loading a model, its inputs, and printing."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..integrity import CorruptCheckpointError
from ..tasks.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EXTRAS = {
    **dict.fromkeys(("datasets", "evaluate", "pandas", "sklearn", "scipy"), "scripts"),
    "PIL": "images",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors, and whose help ends with an example."""

    def __init__(self, command: str, description: str, example: str):
        super().__init__(
            prog=f"hf-bnn {command}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def add_model(self) -> None:
        """The argument MODEL, and the option --revision."""
        self.add_argument("model", metavar="MODEL", help="folder of a saved binary model, or its name on the Hub")
        self.add_revision()

    def add_revision(self) -> None:
        """The option --revision."""
        self.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")

    def add_json(self) -> None:
        """The option --json."""
        self.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return value


@contextmanager
def extras() -> Iterator[None]:
    """Turn the import error of a missing extra into a UsageError with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        raise UsageError(f'the package {missing!r} is missing: pip install "hf-bnn[{EXTRAS[missing]}]"') from error


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turn the libraries' errors about the model `name` into a UsageError of one line."""
    try:
        yield
    except (UsageError, CorruptCheckpointError):
        raise
    except (ValueError, OSError) as error:
        raise UsageError(f"{name}: {' '.join(str(error).split())}") from error


def load(name: str, revision: str | None = None) -> PreTrainedModel:
    """A saved binary model, latent or packed, in evaluation mode. Loading runs no code of the model, and no pickles.

    Args:
        name: a folder, or a name on the Hub.
        revision: a branch, tag or commit on the Hub. None: main.

    Raises:
        UsageError: there is no such model, or it is not binary.
        CorruptCheckpointError: its files are not as they were saved.
    """
    import transformers

    own = importlib.import_module("..", __package__)
    check_folder(name)
    check_revision(name, revision)
    with one_line(name):
        of_hub = hub_options(revision)
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **of_hub)
        architecture = (config.architectures or [""])[0]
        if not is_binary_config(config.to_dict()):
            raise UsageError(
                f"{name} holds a {config.model_type!r} model, which is not binary: make it so with "
                "`hf-bnn train`, or with hf_bnn.binarize_ and training"
            )
        kind = getattr(own, architecture, None) or getattr(transformers, architecture, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise UsageError(f"{name}: its config.json names the unknown architecture {architecture!r}: save it again")
        return kind.from_pretrained(name, use_safetensors=True, **of_hub).eval()


def check_folder(name: str) -> None:
    """Raise UsageError for a path that is not a folder, or for a folder without a model. Names on the Hub pass."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name} has no config.json: name the folder into which a model was saved")
    elif path.exists():
        raise UsageError(f"{name} is a file: name the folder in which it is")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UsageError(f"{name}: there is no such folder")


def check_revision(name: str, revision: str | None) -> None:
    """Raise UsageError for a revision of a local folder, which has none."""
    if revision is not None and Path(name).is_dir():
        raise UsageError(f"--revision {revision} is for a model on the Hub, but {name} is a folder: leave it out")


def hub_options(revision: str | None) -> dict[str, str]:
    """The arguments of `from_pretrained` for a revision. None: main."""
    return {} if revision is None else {"revision": revision}


def is_binary_config(config: dict[str, Any]) -> bool:
    """Whether a config describes a model that hf_bnn has made binary."""
    record = config.get("quantization_config") or {}
    own = str(config.get("model_type", "")).startswith("hf_bnn_") and config.get("binarize") != "none"
    return own or record.get("quant_method") == "hf_bnn"


def optimized(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model, packed if it is not, and optimized for this processor, in place.

    Args:
        model: the result of `load`.
        name: its folder, which records how far training has come.

    Raises:
        UsageError: its method has not finished making it binary.
    """
    from ..fused import optimize_
    from ..nn.packed import is_packed
    from .pack import packed

    return optimize_(model if is_packed(model) else packed(model, name))


def reads_images(model: PreTrainedModel) -> bool:
    """Whether the model takes images. Raises UsageError for one that takes neither images nor texts."""
    kind = getattr(model, "main_input_name", None)
    if kind not in ("input_ids", "pixel_values"):
        raise UsageError(f"{type(model).__name__} takes {kind!r}: this command knows models of texts and of images")
    return kind == "pixel_values"


def random_batch(model: PreTrainedModel, rows: int, tokens: int = 64) -> dict[str, torch.Tensor]:
    """Random inputs, the same in every call: token ids `(rows, tokens)`, or images of noise."""
    import torch

    generator, config = torch.Generator().manual_seed(0), model.config
    if not reads_images(model):
        tokens = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
        ids = torch.randint(1, config.vocab_size, (rows, tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    size = getattr(config, "image_size", None) or (32 if getattr(config, "stem", None) == "cifar" else 224)
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(rows, config.num_channels, high, wide, generator=generator)}


def dump(found: Any) -> None:
    """Print figures as JSON."""
    print(json.dumps(found, indent=2))


def print_table(rows: list[list[str]]) -> None:
    """Print rows in aligned columns: the first one left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if index else f"{cell:{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
