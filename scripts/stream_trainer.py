"""How a Trainer of several ranks shares out the rows of a stream."""

from __future__ import annotations

from typing import Any

from image_data import StreamedPictures
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments


class SharedStreams(Trainer):
    """Put before a Trainer among the bases: every rank takes its own rows of a training stream, and decodes only them.

    accelerate's default for a stream is that the first rank decodes the rows of all. It stays the one for evaluation:
    only it knows how many rows of the last batch are no repetitions, which must not be counted.
    """

    def _get_dataloader(self, dataset: Dataset, *args: Any, **kwargs: Any) -> DataLoader:
        if not isinstance(dataset, StreamedPictures):
            return super()._get_dataloader(dataset, *args, **kwargs)
        sharing = self.accelerator.dataloader_config
        before = sharing.dispatch_batches
        sharing.dispatch_batches = not dataset.endless
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            sharing.dispatch_batches = before


def rows_per_turn(training: TrainingArguments, endless: bool) -> int:
    """How many rows of a stream the workers of a rank take in turns, so that all batches but the last are whole."""
    return training.train_batch_size * training.world_size if endless else training.eval_batch_size
