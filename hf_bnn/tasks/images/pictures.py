"""Datasets of pictures for Trainer (in memory, read on demand, or streamed), and their batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import TrainerCallback

from ..errors import UsageError
from .transforms import MODES, Augmentation, Preprocessing, keys, uniforms

DECODER = datasets.Image()
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

Item = dict[str, Any]  # pixels, label, and in training the key of its augmentation


def picture(value: dict[str, Any] | None, channels: int, where: str) -> Image.Image:
    """The picture in a cell of the image column, gray or RGB. Raises UsageError if it cannot be read."""
    if value is None:
        raise UsageError(f"{where} has no image: fill or drop it")
    try:
        path = value.get("path")
        if value.get("bytes") is None and path is not None and Path(path).is_file():
            value = {"path": path, "bytes": Path(path).read_bytes()}  # Pillow does not close a file that it cannot read
        image = DECODER.decode_example(value)
    except UNREADABLE as error:
        name = f" ({path})" if path else ""
        raise UsageError(f"the image of {where}{name} cannot be read: {error}; replace or drop it") from error
    if image.mode.startswith("I;16"):  # Pillow would clip values above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(MODES[channels])


class Pictures(Dataset):
    """The images of a split, prepared for evaluation. They are kept in memory if they take at most `memory` bytes.

    `classes`: the model's class for each value in the label column. If `label_column` is None, items have no label.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        split: str,
        image_column: str,
        label_column: str | None,
        classes: dict[Any, int],
        preprocessing: Preprocessing,
        memory: float = 0,
    ):
        self.rows = rows.cast_column(image_column, datasets.Image(decode=False)).select_columns([image_column])
        self.labels = None
        if label_column is not None:
            self.labels = np.array([classes[value] for value in rows[label_column][:]], np.int64)
        self.split, self.column, self.preprocessing = split, image_column, preprocessing
        shape = (len(rows), preprocessing.channels, *preprocessing.size)
        self.kept = None
        if np.prod(shape, dtype=float) <= memory:
            self.kept = np.empty(shape, np.uint8)
            for index in range(len(rows)):
                self.kept[index] = preprocessing.arranged(self.picture(index))

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, index: int) -> Image.Image:
        """The picture in row `index`."""
        value = self.rows[index][self.column]
        return picture(value, self.preprocessing.channels, f"row {index} of the {self.split} data")

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The images `indices`. torch's DataLoader requests a whole batch at once."""
        if self.labels is None:
            return [{"pixels": x} for x in self.arranged(indices)]
        return [{"pixels": x, "label": y} for x, y in zip(self.arranged(indices), self.labels[indices], strict=True)]

    def arranged(self, indices: Sequence[int]) -> np.ndarray:
        """`(n, channels, height, width)`, uint8."""
        if self.kept is not None:
            return self.kept[indices]
        return np.stack([self.preprocessing.arranged(self.picture(index)) for index in indices])


class AugmentedPictures(Pictures):
    """The images of a split with augmentation, for training. `EpochCallback` sets the epoch."""

    def __init__(self, *args: Any, augmentation: Augmentation, seed: int, memory: float = 0, **kwargs: Any):
        super().__init__(*args, memory=memory if augmentation.whole else 0, **kwargs)
        self.augmentation, self.seed = augmentation, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        names = keys(self.seed, int(self.epoch), np.asarray(indices))
        draws, augmentation = uniforms(names), self.augmentation
        if augmentation.whole:
            images = self.arranged(indices)
        else:
            rows = zip(indices, names, draws, strict=True)
            images = np.stack([augmentation.of_picture(self.picture(i), self.preprocessing, k, d) for i, k, d in rows])
        images = augmentation.of_pixels(images, draws)
        columns = zip(images, self.labels[indices], names, strict=True)
        return [{"pixels": x, "label": y, "key": key} for x, y, key in columns]


class EpochCallback(TrainerCallback):
    """Sets the epoch of the training images. accelerate's `set_epoch` does not reach the dataset of a resumed run."""

    def __init__(self, images: AugmentedPictures):
        self.images = images

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.images.epoch.fill_(int(state.epoch or 0))


class StreamedItem(Mapping):
    """The item of a streamed row. It is decoded when the collator first reads it, in the process that needs it.

    Every rank and worker receives all rows and keeps its own. It must not decode the images of the others.
    """

    def __init__(self, decode: Callable[[], Item]):
        self.decode = decode

    @cached_property
    def item(self) -> Item:
        return self.decode()

    def __getitem__(self, name: str) -> Any:
        return self.item[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.item)

    def __len__(self) -> int:
        return len(self.item)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.item,)  # decoded before it is sent to another process


class StreamedPictures(IterableDataset):
    """The images of a streamed split. For training (`augmentation` is given), it is shuffled and endless.

    It is endless because Trainer cannot start a second epoch of a dataset of unknown length. All workers read the same
    sequence of rows, and of n workers each keeps every n-th turn of `rows_per_turn` rows. A DataLoader whose batches
    are turns therefore yields the original sequence, for any number of workers or shards. datasets would distribute
    whole shards: workers with fewer rows would start the next epoch before the others.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        split: str,
        image_column: str,
        label_column: str,
        classes: dict[Any, int],
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle_buffer: int = 0,
        rows_per_turn: int = 1,
    ):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.rows = rows if augmentation is None else rows.shuffle(seed=seed, buffer_size=max(1, shuffle_buffer))
        self.split, self.columns, self.classes = split, (image_column, label_column), classes
        self.preprocessing, self.augmentation, self.seed = preprocessing, augmentation, seed
        self.rows_per_turn = rows_per_turn
        self.count = torch.zeros((), dtype=torch.int64).share_memory_()  # rows of an epoch, set at its end

    @property
    def endless(self) -> bool:
        """Whether the split is for training."""
        return self.augmentation is not None

    def __iter__(self) -> Iterator[StreamedItem]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        position = 0  # over all epochs: their last turns may be incomplete
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            before = position
            # unlike __iter__, iter does not distribute the rows among the workers
            for index, batch in enumerate(self.rows.iter(1)):
                if position // self.rows_per_turn % workers == own:
                    yield self.item(epoch, index, *(batch[column][0] for column in self.columns))
                position += 1
            self.count.fill_(position - before)
            if position == before:
                raise UsageError(f"the {self.split} data holds no row: name another split or dataset")
            if not self.endless:
                return

    def item(self, epoch: int, index: int, value: dict[str, Any], label: Any) -> StreamedItem:
        """The item of a row: the `index`-th of this epoch."""
        where = f"row {index} (as streamed) of the {self.split} data"
        if label not in self.classes:
            raise UsageError(f"{where} has the label {label!r}, which is none of the {len(self.classes)} labels")
        return StreamedItem(partial(self.decoded, epoch, index, value, label, where))

    def decoded(self, epoch: int, index: int, value: dict[str, Any], label: Any, where: str) -> Item:
        """The content of the item of a row."""
        image = picture(value, self.preprocessing.channels, where)
        if self.augmentation is None:
            return {"pixels": self.preprocessing.arranged(image), "label": self.classes[label]}
        name = keys(self.seed, epoch, np.array([index]))
        draws = uniforms(name)
        array = self.augmentation.of_picture(image, self.preprocessing, name[0], draws[0])
        return {
            "pixels": self.augmentation.of_pixels(np.stack([array]), draws)[0],
            "label": self.classes[label],
            "key": name[0],
        }


class Collator:
    """Collates items to a batch for the model.

    `mixup_alpha` applies to training items only. It mixes each image with another, with a share drawn from
    Beta(alpha, alpha) (mixup, arXiv 1710.09412). The labels are then shares of the classes, `(n, count)`.
    """

    def __init__(self, preprocessing: Preprocessing, count: int, mixup_alpha: float = 0.0):
        self.preprocessing, self.count, self.mixup_alpha = preprocessing, count, mixup_alpha

    def __call__(self, items: list[Item]) -> dict[str, Tensor]:
        images = self.preprocessing.normalized(torch.from_numpy(np.stack([item["pixels"] for item in items])))
        if "label" not in items[0]:
            return {"pixel_values": images}
        labels = torch.tensor([int(item["label"]) for item in items])
        if self.mixup_alpha > 0 and "key" in items[0]:
            rng = np.random.default_rng(int(items[0]["key"]))
            share, order = rng.beta(self.mixup_alpha, self.mixup_alpha), rng.permutation(len(items))
            images = _mixed(images, order, share)
            labels = _mixed(F.one_hot(labels, self.count).float(), order, share)
        return {"pixel_values": images, "labels": labels}


def _mixed(x: Tensor, order: np.ndarray, share: float) -> Tensor:
    return torch.lerp(x[order], x, share)


class SoftCrossEntropy:
    """A model's `loss_function` that takes classes `(n,)`, or shares of the classes `(n, count)`, which it smooths."""

    def __init__(self, smoothing: float = 0.0):
        self.smoothing = smoothing

    def __call__(self, labels: Tensor, pooled_logits: Tensor, config: Any, **kwargs: Any) -> Tensor:
        smoothing = self.smoothing if labels.is_floating_point() else 0.0
        return F.cross_entropy(pooled_logits.float(), labels, label_smoothing=smoothing)
