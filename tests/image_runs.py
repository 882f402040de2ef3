"""Data, models and fixtures of the tests that run the image task in this process."""

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_bnn.tasks.images import run as task

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCRIPT = SCRIPTS / "run_image_classification.py"
QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--log_level", "error"]
TRAIN = ["--do_train", "--do_eval", "--max_steps", "2", "--save_strategy", "no"]
VIT_SIZE = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,image_size=8,patch_size=4"
RESNET_SIZE = "stem=cifar,layer_type=basic,embedding_size=16,hidden_sizes=[16,32],depths=[1,1]"
CONVNEXT_SIZE = "image_size=8,patch_size=2,hidden_sizes=[16,32],depths=[1,1],num_stages=2"
VIT = ["--model_type", "vit", "--config_overrides", VIT_SIZE]
RESNET = ["--model_type", "resnet", "--config_overrides", RESNET_SIZE]
CONVNEXT = ["--model_type", "convnext", "--config_overrides", CONVNEXT_SIZE]
MODELS = {"vit": VIT, "resnet": RESNET, "convnext": CONVNEXT}
NAMES = ["blue", "red"]

Run = Callable[..., dict[str, float]]


def image(label: int, seed: int, size: int = 8) -> Image.Image:
    """A noisy image that is more red (1) or more blue (0)."""
    pixels = np.random.default_rng(seed).integers(0, 160, (size, size, 3))
    pixels[..., 0 if label else 2] += 95
    return Image.fromarray(pixels.astype(np.uint8))


def table(count: int = 16, column: str = "image", size: int = 8, names: list[str] = NAMES) -> Dataset:
    """Rows of images with the label 0, 1, 0, 1, ..."""
    features = Features({column: datasets.Image(), "label": ClassLabel(names=names)})
    images = [image(index % 2, index, size) for index in range(count)]
    return Dataset.from_dict({column: images, "label": [i % 2 for i in range(count)]}, features=features)


def write_folder(folder: Path, count: int = 16) -> Path:
    """The same as files, in a folder for each class."""
    for index in range(count):
        path = folder / NAMES[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(index % 2, index).save(path)
    return folder


def write_parquet(folder: Path, **splits: Dataset) -> Path:
    """A dataset on disk."""
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        (folder / f"{name}-00000-of-00001.parquet").write_bytes(parquet(rows))
    return folder


def parquet(rows: Dataset) -> bytes:
    buffer = io.BytesIO()
    rows.to_parquet(buffer)
    return buffer.getvalue()


def save_vit(folder: Path, trained: bool = True, mean: float = 0.5, **kwargs: Any) -> Path:
    """A float ViT of one layer with its image processor; `trained`: the config says that it is a classifier."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**{**size, "image_size": 8, "patch_size": 4, "initializer_range": 0.2, **kwargs})
    model = ViTForImageClassification(config)
    (model if trained else model.vit).save_pretrained(folder)
    square = {"height": config.image_size, "width": config.image_size}
    ViTImageProcessorPil(size=square, image_mean=[mean] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", name="script")
def task_module(script_logging: None) -> ModuleType:
    """The module of the task that the script runs."""
    return task


@pytest.fixture(name="run")
def run_images(script: ModuleType, tmp_path: Path) -> Run:
    """Run the script in this process on these arguments; those that a test leaves out are filled in."""

    def start(*arguments: object) -> dict[str, float]:
        given = list(map(str, arguments))
        defaults = {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache", "learning_rate": 5e-3}
        defaults["overwrite_output_dir"] = "true"
        rest = [text for name, value in defaults.items() if f"--{name}" not in given for text in (f"--{name}", value)]
        return script.main([*given, *map(str, rest), *QUIET])

    return start


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that datasets waits at the end of every stream."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(name="folders")
def image_folders(tmp_path: Path) -> list[str]:
    """Arguments that name a folder of images to train on, and one to evaluate on."""
    paths = {split: write_folder(tmp_path / split) for split in ("train", "validation")}
    return [text for split, path in paths.items() for text in (f"--{split}_dir", str(path))]


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForImageClassification.from_pretrained(folder)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """The logits of a model for a few images."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.randn(4, 3, 8, 8, generator=generator)).logits
