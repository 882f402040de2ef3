"""From pictures to pixels: the work of an image processor, and random crops, flips and colours for training.

The augmentation of an image depends only on the seed, the epoch and the image's number. There is no random generator
whose state must be saved, and a resumed run sees the same images as an uninterrupted one. torchvision is not needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from ..errors import UsageError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
CROP_TRIES = 10
FLIP, ROW, COLUMN, JITTER, CROP = 0, 1, 2, slice(3, 6), slice(6, 6 + 2 * CROP_TRIES)
DRAWS = CROP.stop  # the number of random numbers per image
MODES = {1: "L", 3: "RGB"}


def keys(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """A pseudorandom key, uint64, for each of the images `indices` in this epoch. Equal arguments give equal keys."""
    start = _mixed(_mixed(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
    return _mixed(start + np.asarray(indices).astype(np.uint64))


def uniforms(keys: np.ndarray, count: int = DRAWS) -> np.ndarray:
    """`(n, count)` numbers in [0, 1). Each row depends on its key alone."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return (_mixed(keys[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood, OOPSLA 2014): each output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pixels(image: Image.Image) -> np.ndarray:
    """`(channels, height, width)`, uint8."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def shifted(images: np.ndarray, draws: np.ndarray, padding: int) -> np.ndarray:
    """A random window of each image, of the same size, after `padding` with zeros: `(n, c, h, w)` in and out."""
    count, channels, height, width = images.shape
    padded = np.zeros((count, channels, height + 2 * padding, width + 2 * padding), images.dtype)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    rows, columns = (draws[:, (ROW, COLUMN)] * (2 * padding + 1)).astype(int).T
    return windows[np.arange(count), :, rows, columns]


def crop_box(width: int, height: int, draws: np.ndarray, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop: its share of the area is in `scale`, its aspect ratio 3:4 to 4:3.

    Like torchvision's RandomResizedCrop: if no try fits, the largest central crop with an allowed aspect ratio.
    """
    for area, ratio in draws[CROP].reshape(-1, 2):
        size = width * height * (scale[0] + area * (scale[1] - scale[0]))
        sides = math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(size * sides)), round(math.sqrt(size / sides))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[COLUMN] * (width - w + 1)), int(draws[ROW] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jittered(images: np.ndarray, draws: np.ndarray, strength: float) -> np.ndarray:
    """Multiplies brightness, contrast and then saturation by 1 - strength .. 1 + strength; uint8 in and out.

    torchvision's ColorJitter also draws the order of the three.
    """
    brightness, contrast, saturation = (
        (1 + strength * (2 * draws[:, JITTER] - 1)).astype(np.float32).T[..., None, None, None]
    )
    x = _clipped(images.astype(np.float32) * brightness)
    mean = _gray(x).mean((2, 3), keepdims=True)
    x = _clipped(mean + (x - mean) * contrast)
    gray = _gray(x)
    return np.rint(_clipped(gray + (x - gray) * saturation)).astype(np.uint8)


def _clipped(x: np.ndarray) -> np.ndarray:
    return x.clip(0, 255, out=x)


def _gray(x: np.ndarray) -> np.ndarray:
    weights = np.array([0.299, 0.587, 0.114] if x.shape[1] == 3 else [1.0], np.float32)
    return np.einsum("nchw,c->nhw", x, weights)[:, None]


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images.

    `kind`: "cifar" (the image as in evaluation, shifted by up to `padding` pixels), "imagenet" (a random crop, resized)
    or "none". `flip`: the probability of a horizontal flip. `transform`: applied to the picture first.
    """

    kind: str = "none"
    padding: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: float = 0.0
    transform: Any = None

    @property
    def whole(self) -> bool:
        """Whether it starts from the image as prepared for evaluation, which can be cached."""
        return self.kind != "imagenet" and self.transform is None

    def of_picture(self, image: Image.Image, preprocessing: Preprocessing, key: int, draws: np.ndarray) -> np.ndarray:
        """The first part, for one picture: `(channels, height, width)`. `of_pixels` is the second."""
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(key) & (2**63 - 1))
                image = self.transform(image)
        if self.kind != "imagenet":
            return preprocessing.arranged(image)
        height, width = preprocessing.size
        box = crop_box(*image.size, draws, self.scale)
        return pixels(image.resize((width, height), preprocessing.resample, box=box))

    def of_pixels(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The second part, for a batch: `(n, channels, height, width)`."""
        if self.kind == "none":
            return images
        if self.kind == "cifar":
            images = shifted(images, draws, self.padding)
        flipped = draws[:, FLIP] < self.flip
        images[flipped] = images[flipped, :, :, ::-1]
        return jittered(images, draws, self.jitter) if self.jitter else images


def torchvision_transform(name: str) -> Any:
    """The transform of this name in torchvision.transforms.v2, with defaults. Raises UsageError if there is none."""
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise UsageError(f"--torchvision_transform {name} needs torchvision: pip install torchvision") from error
    kind = getattr(v2, name, None)
    if kind is None:
        near = [other for other in dir(v2) if "Augment" in other or "Mix" in other]
        raise UsageError(f"--torchvision_transform: torchvision has no {name!r}; some that it has: {', '.join(near)}")
    return kind()


@dataclass
class Preprocessing:
    """An image processor's work for evaluation in two parts: first the geometry, then rescaling and normalization.

    The processor itself does the first part, so that the result equals that of a pipeline. Images that it would only
    copy skip it. Raises UsageError for a processor that cannot be divided in this way, or whose images differ in size.
    """

    processor: BaseImageProcessor
    channels: int
    size: tuple[int, int] = field(init=False)  # height and width of the output
    copied: dict[tuple[int, int], bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        p = self.processor
        if self.channels not in MODES:
            raise UsageError(f"the model takes images of {self.channels} channels: expected 1 (gray) or 3 (RGB)")
        self.resample = Image.Resampling(int(getattr(p, "resample", None) or Image.Resampling.BILINEAR))
        self.scale = p.rescale_factor if getattr(p, "do_rescale", False) else 1.0
        mean, std = (p.image_mean, p.image_std) if getattr(p, "do_normalize", False) else (0.0, 1.0)
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        self._check(type(p).__name__)

    def _check(self, name: str) -> None:
        wide, high = (self._processed(_noise(size, self.channels)) for size in ((61, 37), (40, 53)))
        if wide.shape != high.shape:
            raise UsageError(
                f"the image processor ({name}) leaves images of different sizes: use one that resizes them"
            )
        if wide.shape[0] != self.channels:
            raise UsageError(
                f"the image processor ({name}) makes images of {wide.shape[0]} channels, the model takes "
                f"{self.channels}: name another one in --image_processor_name"
            )
        self.size = wide.shape[1:]
        if not {self.mean.numel(), self.std.numel()} <= {1, self.channels}:
            raise UsageError(
                f"the image processor ({name}) has a mean and deviation of {self.mean.numel()} channels, the model "
                f"takes {self.channels}: name another one in --image_processor_name"
            )
        expected = self.processor(_noise((61, 37), self.channels), return_tensors="pt")["pixel_values"][0]
        if not torch.allclose(self.normalized(torch.from_numpy(wide)[None])[0], expected.float(), atol=1e-4):
            raise UsageError(
                f"the image processor ({name}) does more than resize, crop, rescale and normalize: name another one in "
                "--image_processor_name"
            )

    def arranged(self, image: Image.Image) -> np.ndarray:
        """The image, resized and cropped: `(channels, height, width)`, uint8."""
        if image.size not in self.copied:
            noise = _noise(image.size, self.channels)
            self.copied[image.size] = np.array_equal(self._processed(noise), pixels(noise))
        return pixels(image) if self.copied[image.size] else self._processed(image)

    def _processed(self, image: Image.Image) -> np.ndarray:
        output = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return output.numpy().clip(0, 255).astype(np.uint8)

    def normalized(self, images: Tensor) -> Tensor:
        """The model's input for a batch of uint8 images."""
        return images.float().mul_(self.scale).sub_(self.mean).div_(self.std)


def _noise(size: tuple[int, int], channels: int) -> Image.Image:
    shape = (size[1], size[0], channels) if channels > 1 else size[::-1]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
