"""Reads the distributed files of CIFAR-10 and Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from ..errors import UsageError


class CorruptDownloadError(RuntimeError):
    """A fetched file differs from the published one, or from the version that this script knows."""


class Split(NamedTuple):
    """Images `(n, height, width)` or `(n, height, width, 3)`, uint8, and their classes `(n,)`."""

    images: np.ndarray
    labels: np.ndarray

    def digest(self) -> str:
        """SHA-256 of the pixels and the labels as bytes, which does not depend on how they are stored."""
        return hashlib.sha256(self.images.tobytes() + self.labels.astype(np.uint8).tobytes()).hexdigest()


def read_cifar10(folder: Path) -> dict[str, Split]:
    """The batches: PNGs with one image per row, its 1,024 pixels from left to right."""
    names = {"train": [f"data_batch_{number}.png" for number in range(1, 6)], "test": ["test_batch.png"]}
    splits = {}
    for split, files in names.items():
        images = np.concatenate([read_png(existing(folder, name)).reshape(-1, 32, 32, 3) for name in files])
        labels = json.loads(existing(folder, f"{split}_lables.json").read_text(encoding="utf-8"))
        splits[split] = Split(images, np.array(labels))
    return splits


def read_png(path: Path) -> np.ndarray:
    """The pixels of an image file, which may be large."""
    try:
        with PillowImage.open(path) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise CorruptDownloadError(f"{path.name} cannot be read ({error}): fetch it again") from error


def read_fashion_mnist(folder: Path) -> dict[str, Split]:
    """The idx files, plain or gzipped."""
    names = {"train": "train", "test": "t10k"}
    return {
        split: Split(
            read_idx(existing(folder, f"{name}-images-idx3-ubyte", ".gz")),
            read_idx(existing(folder, f"{name}-labels-idx1-ubyte", ".gz")),
        )
        for split, name in names.items()
    }


def read_idx(path: Path) -> np.ndarray:
    """The array of an idx file of bytes: magic 0, 0, 8, dimensions; the sizes; the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise CorruptDownloadError(f"{path.name} cannot be read ({error}): fetch it again") from error
    if data[:3] != b"\0\0\x08":
        raise CorruptDownloadError(f"{path.name} is no idx file of bytes (it begins with {data[:4]!r}): fetch it again")
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4))
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != np.prod(shape):
        raise CorruptDownloadError(f"{path.name} holds {values.size} of {np.prod(shape)} bytes: fetch it again")
    return values.reshape(shape)


def existing(folder: Path, *candidates: str) -> Path:
    """The file of this name, or of this name with one of the other endings."""
    paths = [folder / candidates[0], *(folder / f"{candidates[0]}{ending}" for ending in candidates[1:])]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise UsageError(f"{folder} holds no {' or '.join(path.name for path in paths)}")
    return found
