"""One of several ranks: which rows of a stream a Trainer trains on and evaluates."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from test_image_streams import BATCH, PREPROCESSING, ROWS, TRAINING, stream, table
from transformers import TrainingArguments

from hf_bnn.tasks.images.pictures import Collator, StreamedPictures
from hf_bnn.tasks.images.streams import SharedStreams, rows_per_turn


class Mean(torch.nn.Module):
    """The mean of an image, which is the row's number over 255."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": labels.float().mean(), "logits": pixel_values.mean((1, 2, 3))[:, None]}


def as_rank(rank: int, ranks: int, port: int, folder: Path, workers: int) -> None:
    """Be one of several ranks, in a process of its own, which may be the copy of one that has trained before."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in where.items()})
    record_rows(folder, workers)


def record_rows(folder: Path, workers: int) -> None:
    """Write rows.json, with what all ranks have seen, into the folder."""
    batch = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "dataloader_num_workers": workers,
    }
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], remove_unused_columns=False, max_steps=9, **batch)
    decoded, decode = [], StreamedPictures.decoded

    def counted(self: StreamedPictures, *given: Any) -> dict[str, Any]:
        decoded.append(1)
        return decode(self, *given)

    StreamedPictures.decoded = counted
    given = {
        kind: stream(table().to_iterable_dataset(num_shards=3), **kwargs)
        for kind, kwargs in (("t", TRAINING), ("e", {}))
    }
    for kind, pictures in given.items():
        pictures.rows_per_turn = rows_per_turn(args, kind == "t")
    trainer = SharedStreams(Mean(), args, Collator(PREPROCESSING, 3), train_dataset=given["t"], eval_dataset=given["e"])
    seen, batches = [], iter(trainer.get_train_dataloader())
    for _ in range(-(-ROWS // (args.world_size * BATCH))):
        rows = (next(batches)["pixel_values"].mean((1, 2, 3)) * 255).round().long()
        seen += trainer.accelerator.gather(rows).tolist()
    counts = trainer.accelerator.gather(torch.tensor([len(decoded)])).tolist()
    decoded.clear()
    evaluated = trainer.predict(given["e"]).predictions.ravel() * 255
    in_evaluation = trainer.accelerator.gather(torch.tensor([len(decoded)])).tolist()
    if args.process_index == 0:
        found = {"trained": seen, "evaluated": evaluated.round().astype(int).tolist(), "decoded_in_training": counts}
        found["decoded_in_evaluation"] = in_evaluation
        (folder / "rows.json").write_text(json.dumps(found))
    trainer.accelerator.end_training()
