"""Preparation of a model before its first optimizer step: it runs one batch, to learn what only a run can show."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..convert import has_fresh_levels
from ..execution import check_layers_run
from ..install import calibrate_, number_by_execution_

Output = TypeVar("Output")


@torch.no_grad()
def prepare_(model: nn.Module, forward: Callable[[], Output], fit: bool = True) -> Output:
    """Number the binary layers by execution and, if `fit`, fit their fresh levels, in place. The output of `forward()`.

    `forward` runs the model on one batch, as training will. Raises ValueError for a binary layer that it does not
    reach. All other preparation that needs a batch belongs here.
    """
    check_layers_run(model, forward)
    outputs: list[Output] = []

    def kept() -> None:
        outputs[:] = [forward()]

    number_by_execution_(model, kept)
    if fit and has_fresh_levels(model):
        calibrate_(model, kept)
    return outputs[0]


def first_batch(
    dataset: Dataset, collate: Callable[[list], Any], size: int, workers: int = 0
) -> tuple[dict[str, Any], Dataset]:
    """The first `size` rows as a collated batch, and the dataset to train on, which still has these rows.

    The rows come in the dataset's own order, from a separate loader. For a stream that can be read only once, the
    second result is a `PutBack` stream, which starts with them. `workers`: the number of processes that will read it.
    On several ranks, only the first one reads, and all get its batch. Raises ValueError if there is no row.
    """
    box: list[Any] = [None]
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not ranks or torch.distributed.get_rank() == 0:
        box[0], dataset = _read(dataset, collate, size, workers)
    if ranks and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0], dataset


def _read(dataset: Dataset, collate: Callable[[list], Any], size: int, workers: int) -> tuple[dict[str, Any], Dataset]:
    if isinstance(dataset, IterableDataset):
        stream = iter(dataset)
        rows = list(islice(stream, size))
        if rows and reads_once(dataset):
            dataset = PutBack(dataset, copy.deepcopy(rows), stream if workers == 0 else None)
        batch = collate(rows) if rows else None
    else:
        batch = next(iter(DataLoader(dataset, size, collate_fn=collate)), None) if len(dataset) else None
    if batch is None:
        raise ValueError("train_dataset is empty: expected at least one row; check how its rows were filtered")
    return (dict(batch) if isinstance(batch, Mapping) else batch), dataset


def reads_once(dataset: IterableDataset) -> bool:
    """Whether a stream is, or holds, an iterator: a second pass would go on where the first one stopped."""
    seen: set[int] = set()

    def holds(value: Any) -> bool:
        if id(value) in seen:
            return False
        seen.add(id(value))
        if isinstance(value, Iterator):
            return True
        if isinstance(value, list | tuple):  # a chain of streams
            return any(holds(item) for item in value if isinstance(item, IterableDataset | Iterator))
        return isinstance(value, IterableDataset) and any(holds(item) for item in vars(value).values())

    return holds(dataset)


class PutBack(IterableDataset):
    """A stream that can be read only once, preceded by the rows that were already taken from it.

    `rest`: the iterator that the rows were taken from. None: a new iterator goes on where it stopped.

    >>> from torch.utils.data import IterableDataset
    >>> class Stream(IterableDataset):
    ...     def __init__(self, rows):
    ...         self.rows = rows
    ...     def __iter__(self):
    ...         return self.rows
    >>> stream = Stream(iter("abcd"))
    >>> rest = iter(stream)
    >>> list(PutBack(stream, [next(rest), next(rest)], rest))
    ['a', 'b', 'c', 'd']
    """

    def __init__(self, stream: IterableDataset, rows: list, rest: Iterator | None = None):
        self.stream, self.rows, self.rest = stream, rows, rest

    def __iter__(self) -> Iterator:
        rows, self.rows = self.rows, []
        rest, self.rest = self.rest, None
        if (worker := get_worker_info()) is not None:
            rows = rows[worker.id :: worker.num_workers]
        yield from rows
        yield from self.stream if rest is None else rest

    def __len__(self) -> int:
        return len(self.stream)


@contextlib.contextmanager
def undisturbed_randomness(model: nn.Module) -> Iterator[None]:
    """Restores the random state of Python, numpy and torch at the end of the context."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
