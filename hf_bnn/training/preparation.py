"""What is done once between a model and its first optimizer step: one batch shows what only running it can show."""

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
def prepare_(model: nn.Module, run: Callable[[], Output], fit: bool = True) -> Output:
    """Number the binary layers by execution and, if `fit`, fit their fresh levels, in place. The output of `run()`.

    `run` runs the model on one batch, as training will. Raises ValueError for binary layers that the model passes by.
    Whatever else a batch must show before the first step belongs here.
    """
    check_layers_run(model, run)
    outputs: list[Output] = []

    def kept() -> None:
        outputs[:] = [run()]

    number_by_execution_(model, kept)
    if fit and has_fresh_levels(model):
        calibrate_(model, kept)
    return outputs[0]


def first_batch(
    dataset: Dataset, collate: Callable[[list], Any], size: int, workers: int = 0
) -> tuple[dict[str, Any], Dataset]:
    """The collated first `size` rows, and the dataset to train on, which still has them.

    The rows come in the dataset's own order, by a loader of their own. A stream that can be read only once gets them
    back in front: then the second result is a `PutBack` stream. `workers`: how many will read it. On several ranks all
    get the batch of the first one, which alone reads. Raises ValueError if there is no row.
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
        raise ValueError("train_dataset is empty: expected at least one row; look at what its rows were filtered by")
    return (dict(batch) if isinstance(batch, Mapping) else batch), dataset


def reads_once(dataset: IterableDataset) -> bool:
    """Whether a second pass over a stream would go on where the first one stopped: it is, or holds, an iterator."""
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
    """A stream that is read only once, with the rows that were taken from it in front again.

    `rest`: the pass that the rows were taken from; None: a new one goes on where it stopped.

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
    """Within it random numbers may be drawn: the generators of Python, numpy and torch are afterwards as before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
