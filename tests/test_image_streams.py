"""Streams of images: each row once in an epoch, for any number of ranks, workers and shards."""

import json
import multiprocessing
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from hf_bnn.tasks.images import pictures as image_data
from hf_bnn.tasks.images.models import make_processor
from hf_bnn.tasks.images.pictures import Collator, StreamedItem, StreamedPictures
from hf_bnn.tasks.images.streams import rows_per_turn
from hf_bnn.tasks.images.transforms import Augmentation, Preprocessing

ROWS, BATCH = 23, 2  # a prime: no number of ranks or workers divides it
SIZE = 2
PREPROCESSING = Preprocessing(make_processor(SIZE, [0.0] * 3, [1.0] * 3), 3)
TRAINING = {"augmentation": Augmentation("none"), "seed": 1, "shuffle_buffer": 7}


def table(rows: int = ROWS) -> Dataset:
    """Images whose pixels all are the row's number."""
    images = [Image.fromarray(np.full((SIZE, SIZE, 3), index, np.uint8)) for index in range(rows)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return Dataset.from_dict({"image": images, "label": [i % 3 for i in range(rows)]}, features=features)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return table()


def stream(rows: Any, **kwargs: Any) -> StreamedPictures:
    return StreamedPictures(rows, "train", "image", "label", {0: 0, 1: 1, 2: 2}, PREPROCESSING, **kwargs)


class Recorded:
    """A stream that is cheap to read many times: rows without images, in another order in each epoch."""

    def __init__(self, count: int):
        self.count, self.epoch = count, 0

    def cast_column(self, *_: Any) -> "Recorded":
        return self

    def shuffle(self, **_: Any) -> "Recorded":
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        for index in np.random.default_rng(self.epoch).permutation(self.count):
            yield {"image": [int(index)], "label": [0]}


@pytest.fixture
def in_worker(monkeypatch: pytest.MonkeyPatch):
    """Make the process believe that it is a DataLoader's worker; of no workers, the main process."""

    def set_worker(workers: int, index: int) -> None:
        worker = SimpleNamespace(num_workers=workers, id=index) if workers else None
        monkeypatch.setattr(image_data, "get_worker_info", lambda: worker)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: worker)  # datasets asks there

    return set_worker


def loaded(pictures: StreamedPictures, ranks: int, rank: int, workers: int, count: int, in_worker: Any) -> list[list]:
    """The first `count` batches of a rank, as accelerate's shard and a DataLoader with so many workers yield them."""
    readers = []
    for worker in range(max(1, workers)):
        in_worker(workers, worker)
        shard = (
            IterableDatasetShard(pictures, BATCH, num_processes=ranks, process_index=rank) if ranks > 1 else pictures
        )
        own, read = iter(shard), []
        for _ in range(-(-count // max(1, workers)) * BATCH):
            item = next(own, None)
            if item is None:
                break
            read.append(item)
        readers.append([read[i : i + BATCH] for i in range(0, len(read), BATCH)])
    turns = [readers[i % len(readers)][i // len(readers) :][:1] for i in range(count)]
    return [batch[0] for batch in turns if batch]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_every_row_is_seen_once_in_an_epoch_by_one_rank(
    ranks: int, workers: int, in_worker: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(StreamedPictures, "decoded", lambda self, epoch, index, value, *_: {"pixels": (epoch, value)})
    turn = rows_per_turn(SimpleNamespace(train_batch_size=BATCH, world_size=ranks), endless=True)
    steps = 3 * ROWS // (ranks * BATCH) + 1
    found = []
    for rank in range(ranks):
        pictures = stream(Recorded(ROWS), **TRAINING, rows_per_turn=turn)
        batches = loaded(pictures, ranks, rank, workers, steps, in_worker)
        assert len(batches) == steps  # as many on every rank: none waits for another
        found.append([[item["pixels"] for item in batch] for batch in batches])
    seen = [pixels for step in zip(*found, strict=True) for batch in step for pixels in batch]
    order = [np.random.default_rng(epoch).permutation(ROWS).tolist() for epoch in range(4)]
    assert seen[: 3 * ROWS] == [(epoch, row) for epoch in range(3) for row in order[epoch]]


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 6, 7])
def test_shards_are_not_shared_out_among_workers(rows: Dataset, shards: int, in_worker: Any):
    training = stream(rows.to_iterable_dataset(num_shards=shards), **TRAINING, rows_per_turn=BATCH)
    batches = loaded(training, 1, 0, 3, ROWS, in_worker)  # two epochs
    seen = [int(item["pixels"][0, 0, 0]) for batch in batches for item in batch]
    assert sorted(seen[:ROWS]) == sorted(seen[ROWS:]) == list(range(ROWS))
    assert seen[:ROWS] != seen[ROWS:]
    for workers in (0, 2, 4):
        evaluation = stream(rows.to_iterable_dataset(num_shards=shards), rows_per_turn=BATCH)
        batches = loaded(evaluation, 1, 0, workers, ROWS, in_worker)
        assert [len(batch) for batch in batches] == [BATCH] * (ROWS // BATCH) + [ROWS % BATCH]
        assert [int(item["pixels"][0, 0, 0]) for batch in batches for item in batch] == list(range(ROWS))


def test_a_share_of_an_epoch_would_be_lost_by_giving_whole_shards_to_workers(rows: Dataset, in_worker: Any):
    """The split that datasets makes by itself; the tests above would notice it."""
    by_shard, seen = rows.to_iterable_dataset(num_shards=3), []
    for worker in (0, 1):
        in_worker(2, worker)
        seen.append([row["label"] for row in by_shard])
    assert sorted(map(len, seen)) == [8, 15]


def test_a_rank_decodes_only_its_own_rows(rows: Dataset, monkeypatch: pytest.MonkeyPatch):
    decoded, decode = [], StreamedPictures.decoded

    def counted(self: StreamedPictures, epoch: int, index: int, *args: Any) -> dict[str, Any]:
        decoded.append(index)
        return decode(self, epoch, index, *args)

    monkeypatch.setattr(StreamedPictures, "decoded", counted)
    pictures = stream(rows.to_iterable_dataset(), **TRAINING, rows_per_turn=3 * BATCH)
    shard = IterableDatasetShard(pictures, BATCH, num_processes=3, process_index=1)
    batches = iter(DataLoader(shard, BATCH, collate_fn=Collator(PREPROCESSING, 3)))
    assert [len(next(batches)["labels"]) for _ in range(2)] == [BATCH, BATCH]
    assert decoded == [2, 3, 8, 9]


def test_augmentation_depends_on_the_row_and_not_on_the_worker(rows: Dataset, in_worker: Any):
    kind = {**TRAINING, "augmentation": Augmentation("imagenet")}
    keys = []
    for workers in (0, 3):
        pictures = stream(rows.to_iterable_dataset(num_shards=2), **kind, rows_per_turn=BATCH)
        batches = loaded(pictures, 1, 0, workers, ROWS, in_worker)
        keys.append([int(item["key"]) for batch in batches for item in batch])
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 2 * ROWS


@pytest.mark.multiprocess
def test_a_dataloader_with_workers_yields_the_sequence_of_one_process(rows: Dataset):
    def labels(workers: int) -> list[int]:
        pictures = stream(rows.to_iterable_dataset(num_shards=3), **TRAINING, rows_per_turn=BATCH)
        context = {"multiprocessing_context": "fork"} if workers else {}
        loader = DataLoader(pictures, BATCH, collate_fn=list, num_workers=workers, **context)
        batches = zip(range(ROWS), loader, strict=False)
        return [int(item["pixels"][0, 0, 0]) for _, batch in batches for item in batch]

    assert labels(0) == labels(2)


def test_an_item_is_decoded_once_and_before_it_is_sent():
    calls = []
    item = StreamedItem(lambda: calls.append(1) or {"pixels": 5, "label": 2})
    assert not calls
    assert pickle.loads(pickle.dumps(item)) == {"pixels": 5, "label": 2} == dict(item)
    assert "key" not in item
    assert len(item) == 2
    assert len(calls) == 1


@pytest.mark.parametrize("endless", [True, False])
def test_a_stream_without_rows_is_an_error(rows: Dataset, endless: bool):
    pictures = stream(rows.to_iterable_dataset().take(0), **(TRAINING if endless else {}))
    with pytest.raises(ValueError, match="the train data holds no row: name another split or dataset"):
        next(iter(pictures))


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_on_each_row_and_evaluate_each_row_once(tmp_path: Path, ranks: int, workers: int):
    from stream_worker import as_rank  # which needs this module

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # without seconds of imports
    processes = [fork.Process(target=as_rank, args=(rank, ranks, port, tmp_path, workers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["evaluated"] == list(range(ROWS))
    assert sorted(found["trained"][:ROWS]) == list(range(ROWS))
    if not workers:  # they count for themselves
        batches = -(-ROWS // (ranks * BATCH))
        assert found["decoded_in_training"] == [(batches + 1) * BATCH] * ranks  # one batch is fetched ahead
        assert found["decoded_in_evaluation"] == [batches * BATCH] * ranks
