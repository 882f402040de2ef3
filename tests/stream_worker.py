"""One of several ranks: which rows of a stream a Trainer trains on and evaluates. Run by torchrun, with a folder."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from image_data import Collator, StreamedPictures
from stream_trainer import SharedStreams, rows_per_turn
from test_image_streams import BATCH, PREPROCESSING, ROWS, TRAINING, stream, table
from transformers import TrainingArguments


class Mean(torch.nn.Module):
    """The mean of an image, which is the row's number over 255."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": labels.float().mean(), "logits": pixel_values.mean((1, 2, 3))[:, None]}


def main() -> None:
    batch = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
    args = TrainingArguments(sys.argv[1], use_cpu=True, report_to=[], remove_unused_columns=False, max_steps=9, **batch)
    decoded, decode = [], StreamedPictures.decoded

    def counted(self: StreamedPictures, *given: Any) -> dict[str, Any]:
        decoded.append(1)
        return decode(self, *given)

    StreamedPictures.decoded = counted
    given = {kind: stream(table().to_iterable_dataset(), **kwargs) for kind, kwargs in (("t", TRAINING), ("e", {}))}
    for kind, pictures in given.items():
        pictures.rows_per_turn = rows_per_turn(args, kind == "t")
    trainer = SharedStreams(Mean(), args, Collator(PREPROCESSING, 3), train_dataset=given["t"], eval_dataset=given["e"])
    seen, batches = [], iter(trainer.get_train_dataloader())
    for _ in range(-(-ROWS // (args.world_size * BATCH))):
        rows = (next(batches)["pixel_values"].mean((1, 2, 3)) * 255).round().long()
        seen += trainer.accelerator.gather(rows).tolist()
    counts = trainer.accelerator.gather(torch.tensor([len(decoded)])).tolist()
    evaluated = trainer.predict(given["e"]).predictions.ravel() * 255
    if args.process_index == 0:
        found = {"trained": seen, "evaluated": evaluated.round().astype(int).tolist(), "decoded_in_training": counts}
        (Path(sys.argv[1]) / "rows.json").write_text(json.dumps(found))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
