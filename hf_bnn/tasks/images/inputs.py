"""Prepares the splits of an image run for Trainer: image processor, augmentation and datasets."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..errors import UsageError
from ..labels import Labels
from ..stages import PreparedSplit
from .arguments import Arguments, ModelArguments, parse_overrides
from .data import Splits, image_column
from .models import load_processor, make_processor
from .pictures import AugmentedPictures, Pictures, StreamedPictures, picture
from .streams import rows_per_turn
from .transforms import Augmentation, Preprocessing, torchvision_transform

logger = logging.getLogger(__name__)

SMALL = 64  # pixels: up to this size, images are shifted rather than cropped, and are not resized
SAMPLE, STREAM_SAMPLE = 2000, 200  # the number of images from which mean and standard deviation are estimated
SMALL_CONFIGS = {
    "vit": "patch_size={patch},hidden_size=96,num_hidden_layers=3,num_attention_heads=3,intermediate_size=384",
    "resnet": "stem=cifar,layer_type=basic,embedding_size=16,hidden_sizes=[16,32,64],depths=[3,3,3]",
}


def load_or_make_processor(arguments: Arguments, splits: Splits, config: PreTrainedConfig) -> BaseImageProcessor:
    """The checkpoint's image processor, or a new one for this data and model."""
    processor = load_processor(arguments.model)
    if processor is not None:
        return processor
    images = sample(arguments, *next(iter(splits.items())), config.num_channels)
    check_small_images(arguments.model, config, max(side for image in images for side in image.size))
    size = getattr(config, "image_size", None) or arguments.model.image_size
    if size is None:
        sizes = {side for image in images for side in image.size}
        size = sizes.pop() if len(sizes) == 1 and max(sizes) <= SMALL else 224
    plain = [0.5] * config.num_channels
    geometry = Preprocessing(make_processor(size, plain, plain), config.num_channels)
    return make_processor(size, *measured(np.stack([geometry.arranged(image) for image in images])))


def measured(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of images `(n, channels, height, width)` with values up to 255."""
    scaled = images.astype(np.float32) / 255
    return [[round(float(x), 4) for x in values((0, 2, 3))] for values in (scaled.mean, scaled.std)]


def check_small_images(model: ModelArguments, config: PreTrainedConfig, side: int) -> None:
    """Raise UsageError if images of at most `side` pixels meet a new model whose default size suits photographs.

    They would be enlarged many times, or reduced to a single pixel by the model's stem.
    """
    size, chosen = getattr(config, "image_size", None), model.structure
    kind = model.model_type or config.model_type
    size_chosen = model.image_size is not None or model.config_name is not None or "image_size" in chosen
    advice = []
    if isinstance(size, int) and size > 2 * side and not size_chosen:
        advice.append(f"--image_size {side}")
    if side <= SMALL and not parse_overrides(model.config_overrides) and model.config_name is None:
        patch = next(patch for patch in (4, 7, 2, 3, 5, 1) if side % patch == 0)
        small = SMALL_CONFIGS.get(kind)
        example = f' "{small.format(patch=patch)}"' if small else ", with fewer and narrower layers"
        advice.append(f"--config_overrides{example}")
    if side <= SMALL and advice:
        takes = f" takes {size} x {size} and" if isinstance(size, int) and not size_chosen else ""
        raise UsageError(
            f"the images are at most {side} x {side} pixels, but a {kind!r} from scratch{takes} is made for "
            f"photographs: give {' '.join(advice)}, or --config_name with a config to train all the same"
        )


def sample(arguments: Arguments, split: str, rows: Any, channels: int) -> list[Image.Image]:
    """Images spread evenly over a split. Of a stream, the first ones."""
    column = image_column(arguments.data, rows)
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if isinstance(rows, Dataset):
        indices = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int).tolist()
        rows = rows.select(indices)
    else:
        indices, rows = range(STREAM_SAMPLE), rows.take(STREAM_SAMPLE)
    named = zip(indices, rows, strict=False)  # a stream may be shorter
    return [picture(row[column], channels, f"row {index} of the {split} data") for index, row in named]


def make_augmentation(arguments: Arguments, size: tuple[int, int]) -> Augmentation:
    """The augmentation that training applies. `size`: height and width of the model's input."""
    data = arguments.data
    kind = data.augmentation
    if kind == "auto":
        kind = "cifar" if max(size) <= SMALL else "imagenet"
    name = data.torchvision_transform
    return Augmentation(
        kind,
        data.crop_padding,
        (data.crop_min_scale, 1.0),
        data.flip_probability,
        data.color_jitter,
        torchvision_transform(name) if name else None,
    )


def make_datasets(
    arguments: Arguments, splits: Splits, labels: Labels, preprocessing: Preprocessing
) -> dict[str, PreparedSplit]:
    """The splits, as Trainer takes them."""
    data, training = arguments.data, arguments.training
    augmentation = make_augmentation(arguments, preprocessing.size)
    result = {}
    for split, rows in splits.items():
        columns = (image_column(data, rows), None if split == "test" else data.label_column_name)
        given = (rows, split, *columns, labels.classes, preprocessing)
        augmented = {"augmentation": augmentation, "seed": training.seed} if split == "train" else {}
        if isinstance(rows, Dataset):
            kind = AugmentedPictures if augmented else Pictures
            images = kind(*given, memory=data.images_in_memory_gb * 2**30, **augmented)
            logger.info(f"{split}: {len(rows)} images, in memory: {images.kept is not None}")
        else:
            buffer = {"shuffle_buffer": data.shuffle_buffer} if augmented else {}
            turn = rows_per_turn(training, endless=bool(augmented))
            images = StreamedPictures(*given, **augmented, **buffer, rows_per_turn=turn)
            logger.info(f"{split}: streamed")
        result[split] = PreparedSplit(images, partial(identifying_columns, arguments, rows))
    return result


def identifying_columns(arguments: Arguments, rows: Dataset) -> dict[str, Any]:
    """The columns that identify each image in a table of predictions: its number, and its file if it has one."""
    column = image_column(arguments.data, rows)
    cells = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    paths = [(cell[column] or {}).get("path") for cell in cells]
    folder = arguments.data.test_dir
    if folder is not None:
        paths = [str(Path(path).relative_to(folder)) for path in paths]
    return {"index": range(len(rows)), **({"image": paths} if any(paths) else {})}


def check_size(config: PreTrainedConfig, preprocessing: Preprocessing) -> None:
    """Raise UsageError if the processor's images do not have the size that the model takes."""
    size = getattr(config, "image_size", None)
    expected = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if size is not None and preprocessing.size != expected:
        raise UsageError(
            f"the image processor makes images of {preprocessing.size}, the model takes {expected}: "
            "name another one in --image_processor_name"
        )
