"""The texts or images that a command reads, in batches for a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..tasks.errors import UsageError, shown
from .common import Parser, extras, hub_options, one_line, positive, reads_images

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMNS = ("label", "labels")
KINDS = ("csv", "json", "jsonl", "txt")
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Inputs(NamedTuple):
    """Texts by column (two for pairs), or the files of images under the key "image"."""

    columns: dict[str, list[str]]

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(next(iter(self.columns.values())))


def add_inputs(parser: Parser) -> None:
    """The options that name a model's inputs."""
    parser.add_argument("--text", nargs="+", metavar="TEXT", help="texts, each in quotes")
    parser.add_argument("--file", help="file of texts: csv, json, jsonl, or txt with a text per line; - reads stdin")
    parser.add_argument(
        "--column", nargs="+", metavar="NAME", help="column of --file with the texts, or two columns for pairs"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of images, or one image")
    parser.add_argument("--batch_size", type=positive, default=32, help="rows at a time (default: 32)")


def read_inputs(arguments: argparse.Namespace, model: PreTrainedModel) -> Inputs | None:
    """The inputs that the options name; None if they name none.

    Raises:
        UsageError: the inputs cannot be read, or do not fit the model.
    """
    given = [name for name in ("text", "file", "images") if getattr(arguments, name) is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} were both given: give one of them")
    if arguments.column and given != ["file"]:
        raise UsageError("--column names a column of --file, which was not given")
    if not given:
        return None
    if (given == ["images"]) != reads_images(model):
        kind, option = ("images", "--images") if reads_images(model) else ("texts", "--text or --file")
        raise UsageError(f"--{given[0]} was given, but {arguments.model} reads {kind}: give {option}")
    if given == ["text"]:
        return Inputs({"text": arguments.text})
    return image_files(Path(arguments.images)) if given == ["images"] else text_file(arguments.file, arguments.column)


def image_files(path: Path) -> Inputs:
    """The images in a folder and its subfolders, sorted by name."""
    if not path.exists():
        raise UsageError(f"--images {path}: there is no such folder")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"--images {path} holds no image: expected files that end in {', '.join(IMAGES)}")
    return Inputs({"image": [str(file) for file in files]})


def text_file(name: str, columns: list[str] | None) -> Inputs:
    """The texts of a file."""
    from ..tasks.text.files import read_table

    suffixes = [suffix.lstrip(".").lower() for suffix in Path(name).suffixes if suffix != ".gz"]
    kind = "txt" if name == "-" else suffixes[-1] if suffixes else ""
    if kind not in KINDS:
        raise UsageError(f"--file {name!r} is of no known kind: expected one of {', '.join(KINDS)}")
    if name != "-" and not Path(name).is_file():
        raise UsageError(f"--file {name}: there is no such file")
    if kind == "txt":
        with one_line(name):
            text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise UsageError(f"--file {name} holds no text")
        if columns:
            raise UsageError(f"--file {name} has no columns: leave --column out")
        return Inputs({"text": lines})
    with extras():
        table = read_table(name, kind)
    if table.faults:
        row, fault = next(iter(table.faults.items()))
        raise UsageError(f"{name}: line {table.lines[row]} {fault}")
    chosen = columns or default_columns(name, list(table.columns))
    if unknown := [column for column in chosen if column not in table.columns]:
        raise UsageError(f"{name} has no column {unknown[0]!r}; columns: {shown(list(table.columns))}")
    if len(chosen) > 2:
        raise UsageError(f"--column names {len(chosen)} columns: a model reads one text, or two")
    found = {column: table.columns[column] for column in chosen}
    for column, values in found.items():
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise UsageError(f"{name}: line {table.lines[row]} has no text in the column {column!r}: {value!r}")
    return Inputs(found)


def default_columns(name: str, columns: list[str]) -> list[str]:
    """The column with the texts. Raises UsageError if that is not clear."""
    named = [column for column in columns if column in TEXT_COLUMNS]
    others = [column for column in columns if column not in LABEL_COLUMNS]
    for found in (named, others):
        if len(found) == 1:
            return found
    raise UsageError(f"{name} has the columns {shown(columns)}: name the one with the texts in --column")


def batches(
    arguments: argparse.Namespace, model: PreTrainedModel, inputs: Inputs
) -> Iterator[tuple[range, dict[str, Tensor]]]:
    """The row numbers of each batch, and the batch as the model takes it.

    Args:
        arguments: `model` and `revision` name the tokenizer or image processor, `batch_size` the rows of a batch.
        model: the model that takes the batches.
        inputs: the result of `read_inputs`.

    Raises:
        UsageError: the model has no tokenizer or image processor, or an image cannot be read.
    """
    make_encoder = image_encoder if reads_images(model) else text_encoder
    encode, size = make_encoder(arguments.model, arguments.revision, model), arguments.batch_size
    for start in range(0, inputs.count, size):
        rows = range(start, min(start + size, inputs.count))
        yield rows, encode(*([values[i] for i in rows] for values in inputs.columns.values()))


def text_encoder(name: str, revision: str | None, model: PreTrainedModel):
    """A function from lists of texts to a batch."""
    from transformers import AutoTokenizer

    with one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub_options(revision))
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))

    def encode(*texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(*texts, truncation=True, max_length=longest, padding=True, return_tensors="pt"))

    return encode


def image_encoder(name: str, revision: str | None, model: PreTrainedModel):
    """A function from a list of files to a batch, processed as in `hf-bnn train images`."""
    import numpy as np
    import torch

    with extras():
        from transformers import AutoImageProcessor

        from ..tasks.images.pictures import picture
        from ..tasks.images.transforms import Preprocessing
    with one_line(name):
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **hub_options(revision))
    preprocessing = Preprocessing(processor, model.config.num_channels)

    def encode(files: list[str]) -> dict[str, Tensor]:
        pictures = [picture({"path": file, "bytes": None}, model.config.num_channels, file) for file in files]
        stacked = np.stack([preprocessing.arranged(image) for image in pictures])
        return {"pixel_values": preprocessing.normalized(torch.from_numpy(stacked))}

    return encode
