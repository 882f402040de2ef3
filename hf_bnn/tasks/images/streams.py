"""Distributes the rows of a stream over the ranks of a Trainer."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from .pictures import StreamedPictures


class SharedStreams(Trainer):
    """A mixin that goes before a Trainer: every rank takes its own rows of a stream, and decodes only those.

    By default, accelerate decodes the rows of all ranks on the first one. Only then does it know how many rows of the
    last batch are not repetitions. Here, evaluation computes that number itself.
    """

    def _get_dataloader(self, dataset: Dataset, *args: Any, **kwargs: Any) -> DataLoader:
        if not isinstance(dataset, StreamedPictures):
            return super()._get_dataloader(dataset, *args, **kwargs)
        sharing = self.accelerator.dataloader_config
        before = sharing.dispatch_batches
        sharing.dispatch_batches = False
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            sharing.dispatch_batches = before

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        shared = dataloader.dataset
        if isinstance(shared, IterableDatasetShard) and isinstance(shared.dataset, StreamedPictures):
            self.gather_function = partial(self._gather_rows, shared.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _gather_rows(self, pictures: StreamedPictures, values: Any) -> Any:
        """The gathered rows of a batch from all ranks, without the repetitions that fill up the last batch."""
        state = self.accelerator.gradient_state
        if state.end_of_dataloader:  # then all readers have reached the end of the stream, and counted its rows
            turn = self.args.eval_batch_size * self.args.world_size
            state.active_dataloader.remainder = int(pictures.count) % turn
        return self.accelerator.gather_for_metrics(values)


def rows_per_turn(training: TrainingArguments, endless: bool) -> int:
    """The number of rows in a turn of a stream's workers, with which all batches but the last are complete."""
    batch = training.train_batch_size if endless else training.eval_batch_size
    return batch * training.world_size
