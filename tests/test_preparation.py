"""The one moment before the first step: which batch it takes, what it leaves as it was, and whom it serves."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_trainer import StopAt, arguments, rows
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_bnn import BinaryConfig, BinaryTrainer, binarize_
from hf_bnn.convert import has_fresh_levels
from hf_bnn.install import calibrate_
from hf_bnn.nn.layers import binary_layers
from hf_bnn.nn.levels import ElasticLevels
from hf_bnn.training.preparation import PutBack, first_batch, reads_once


def examples(count: int = 16, label: int | None = None) -> list[dict]:
    batch = tiny_batch(count)
    if label is not None:
        batch["labels"] = torch.full_like(batch["labels"], label)
    return [{name: value[row] for name, value in batch.items()} for row in range(count)]


def made() -> nn.Module:
    """Always the same model."""
    set_seed(5)
    return tiny_model()


class AtBegin(TrainerCallback):
    """The state of the model when training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.fresh = has_fresh_levels(model)
        layers = {name: m for name, m in model.named_modules() if m in binary_layers(model)}
        self.order = sorted(layers, key=lambda name: layers[name].weight_binarizer.site.index)
        self.widths = [layer.input_levels.width.item() for layer in layers.values()]
        self.randomness = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def begun(folder, model=None, data=None, kind=BinaryTrainer, **kwargs) -> AtBegin:
    """The state in which a run of one step begins."""
    look = AtBegin()
    named = {name: kwargs.pop(name) for name in ("model_init", "method", "data_collator") if name in kwargs}
    model = tiny_model() if model is None and "model_init" not in named else model
    args = arguments(folder, **{"max_steps": 1, **kwargs})
    data = examples() if data is None else data
    BinaryTrainer(model, args, train_dataset=data, callbacks=[look], **named).train()
    return look


# The batch


@pytest.mark.parametrize("persistent", [False, True])
def test_evaluation_never_sees_the_training_set(tmp_path, persistent: bool):
    seen = []
    one = BinaryTrainer(
        tiny_model(),
        arguments(tmp_path, max_steps=1, dataloader_num_workers=1, dataloader_persistent_workers=persistent),
        train_dataset=examples(8, label=0),
        eval_dataset=examples(4, label=1),
        compute_metrics=lambda outputs: (seen.append(outputs.label_ids.tolist()), {})[1],
    )
    one.train()
    one.evaluate()
    one.evaluate(examples(3, label=0))  # another set in between
    one.evaluate()
    assert seen == [[1] * 4, [0] * 3, [1] * 4]


@pytest.mark.parametrize("count", [4, 5])
def test_a_set_smaller_than_a_batch_is_enough(tmp_path, count: int):
    look = begun(tmp_path, made(), examples(count), dataloader_drop_last=True, per_device_eval_batch_size=64)
    model, batch = made(), {name: value[:count] for name, value in tiny_batch(16).items()}
    calibrate_(model, lambda: model(**batch))
    assert look.widths == pytest.approx([layer.input_levels.width.item() for layer in binary_layers(model)], rel=1e-4)


def test_an_empty_set_is_named(tmp_path):
    for data in ([], Stream([])):
        with pytest.raises(ValueError, match="train_dataset is empty: expected at least one row"):
            begun(tmp_path, data=data)


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path):
    data = rows().add_column("sentence", ["a"] * 16)
    assert not begun(tmp_path, data=data).fresh
    assert not begun(tmp_path, data=[{**row, "sentence": "a"} for row in examples()]).fresh
    assert not begun(tmp_path, data=data.to_iterable_dataset()).fresh


def test_random_numbers_and_the_model_are_as_if_nothing_had_been_run(tmp_path):
    def shaken(features: list[dict]) -> dict:
        random.random(), np.random.rand(), torch.rand(1)
        return default_data_collator(features)

    states = []
    for calibrate in (False, True):
        set_seed(0)
        settings = {"data_collator": shaken, "calibrate_levels": calibrate, "seed": 3}
        states.append(begun(tmp_path, **settings).randomness)
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]
    model = tiny_model()
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    one = BinaryTrainer(model, arguments(tmp_path, seed=3), train_dataset=examples(), data_collator=shaken)
    set_seed(3)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model.train()
    one._prepare(fit=True)
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# Models that pass a binary layer by


class ReadsInTraining(nn.Module):
    """A model that reads the weight of `first`, instead of calling it, when it is in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 2)

    def forward(self, x, labels):
        logits = self.head(x @ self.first.weight.t() if self.training else self.first(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_layer_that_would_be_trained_as_a_float_one_is_refused_before_the_first_step(tmp_path):
    data = [{"x": torch.randn(12), "labels": row % 2} for row in range(8)]
    message = r"ReadsInTraining reads the weights of the binary layers 'first' without calling them"
    with pytest.raises(ValueError, match=message):
        begun(tmp_path, binarize_(ReadsInTraining(), exclude=["head"]), data)


# Models that need more than their inputs


class NeedsLabels(nn.Module):
    """A model whose forward has no default for the labels; its last layer is defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.head, self.first = nn.Linear(16, 16), nn.Linear(16, 2), nn.Linear(12, 16)

    def forward(self, x, labels):
        logits = self.head(self.last(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_that_demands_labels_is_prepared(tmp_path):
    model = binarize_(NeedsLabels(), skip=("head",), levels=lambda name: ElasticLevels())
    data = [{"x": torch.randn(12), "labels": row % 2} for row in range(8)]
    look = begun(tmp_path, model, data)
    assert (look.fresh, look.order) == (False, ["first", "last"])


def test_an_encoder_decoder_is_prepared_with_and_without_label_smoothing(tmp_path):
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    data = [{"input_ids": row["input_ids"].tolist(), "labels": [1, 2, 3]} for row in examples(8)]

    class Padding:
        padding_side = "right"

        def pad(self, features, **kwargs):
            return default_data_collator([{"input_ids": feature["input_ids"]} for feature in features])

    for smoothing in (0.0, 0.1):
        model = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", quantization_config=BinaryConfig())
        collator = DataCollatorForSeq2Seq(Padding(), model=model) if smoothing else default_data_collator
        assert not begun(tmp_path / "o", model, data, data_collator=collator, label_smoothing_factor=smoothing).fresh


def test_a_loss_function_of_ones_own_gets_what_it_gets_in_training(tmp_path):
    counts = []

    def own(outputs, labels, num_items_in_batch):
        counts.append(int(num_items_in_batch))
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    args = arguments(tmp_path, max_steps=1)
    BinaryTrainer(tiny_model(), args, train_dataset=examples(), compute_loss_func=own).train()
    assert set(counts) == {8, 4}


# Models that come later, and runs that go on


def test_a_model_of_model_init_is_numbered_and_fitted_as_one_that_was_given(tmp_path):
    given, late = begun(tmp_path, made()), begun(tmp_path, model_init=lambda: made())
    assert not late.fresh
    assert late.widths == given.widths
    assert late.order == given.order


def test_a_resumed_run_is_numbered_by_execution_and_keeps_its_levels(tmp_path):
    def model() -> nn.Module:
        set_seed(0)
        return binarize_(NeedsLabels(), skip=("head",), levels=lambda name: ElasticLevels())

    data = [{"x": torch.randn(12), "labels": row % 2} for row in range(8)]
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "method": "stompp"}
    first = BinaryTrainer(model(), arguments(tmp_path, **settings), train_dataset=data, callbacks=[StopAt(2)])
    first.train()
    look = AtBegin()
    second = BinaryTrainer(model(), arguments(tmp_path, **settings), train_dataset=data, callbacks=[look])
    second.train(resume_from_checkpoint=True)
    assert look.order == ["first", "last"]
    assert look.widths == [layer.input_levels.width.item() for layer in binary_layers(first.model)]


def test_levels_that_no_data_can_fit_are_said(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_bnn.training.trainer.logger.warning", warnings.append)

    class OwnLoader(BinaryTrainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(examples(), 4, collate_fn=default_data_collator)

    OwnLoader(tiny_model(), arguments(tmp_path, max_steps=1)).train()
    assert any("there is no train_dataset to fit the levels to: they stay as they were made" in w for w in warnings)


# Streams


class Stream(IterableDataset):
    """Rows from anything that can be iterated; what is an iterator itself can be read once."""

    def __init__(self, source):
        self.source = source

    def __iter__(self) -> Iterator:
        return iter(self.source)


class Read(Stream):
    """The same, in a generator, which hides that its source is read only once."""

    def __iter__(self) -> Iterator:
        yield from self.source


def trained_on(folder, data, **kwargs) -> list[int]:
    """The first token of each row that a run of one epoch trains on."""
    seen = []

    class Noting(BinaryTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.extend(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    args = arguments(folder, **{"max_steps": 4, **kwargs})
    one = Noting(tiny_model(), args, train_dataset=data, callbacks=kwargs.get("callbacks"))
    one.train()
    assert one.train_dataset is data
    return seen


@pytest.mark.parametrize("kind", [Stream, Read])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_is_read_once_loses_no_row_and_repeats_none(tmp_path, kind: type, workers: int):
    wanted = [int(row["input_ids"][0]) for row in examples()]
    assert trained_on(tmp_path, kind(iter(examples())), dataloader_num_workers=workers) == wanted
    assert trained_on(tmp_path, kind(examples()), dataloader_num_workers=workers) == wanted  # can be read again


def test_a_stream_that_can_be_read_again_is_not_wrapped():
    for stream in (Stream(examples()), Read(range(3)), rows().to_iterable_dataset()):
        assert not reads_once(stream)
        assert first_batch(stream, list, 2)[1] is stream
    chained = Stream([1])
    chained.parts = [Stream([1]), Read(iter([2]))]
    assert reads_once(chained)


def test_a_run_resumed_on_a_stream_that_is_read_once_repeats_no_row(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer = BinaryTrainer(
        tiny_model(), arguments(tmp_path, max_steps=4, **settings), train_dataset=Stream(iter(examples()))
    )
    trainer.add_callback(StopAt(2))
    trainer.train()
    seen = []

    class Noting(BinaryTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.extend(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    again = Noting(
        tiny_model(), arguments(tmp_path, max_steps=4, **settings), train_dataset=Stream(iter(examples())), method=None
    )
    again.train(resume_from_checkpoint=True)
    assert seen == [int(row["input_ids"][0]) for row in examples()][8:]


def test_workers_share_the_rows_that_are_put_back(monkeypatch):
    class Worker:
        num_workers = 2

    shares = []
    for Worker.id in (0, 1):
        monkeypatch.setattr("hf_bnn.training.preparation.get_worker_info", Worker)
        shares.append(list(PutBack(Stream(iter([])), [1, 2, 3])))
    assert shares == [[1, 3], [2]]


def test_what_a_collator_does_to_the_rows_is_not_put_back():
    def emptying(taken: list[dict]) -> dict:
        return {"x": [row.pop("x") for row in taken]}

    batch, left = first_batch(Stream(iter([{"x": 1}, {"x": 2}, {"x": 3}])), emptying, 2)
    assert batch == {"x": [1, 2]}
    assert list(left) == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert list(left) == []


def test_a_stream_that_reads_ahead_of_what_it_yields_goes_on_where_it_was():
    class Pairs(Stream):
        def __iter__(self) -> Iterator:
            for one in self.source:
                other = next(self.source)
                yield from (other, one)

    _, left = first_batch(Pairs(iter(range(6))), list, 3)
    assert list(left) == [1, 0, 3, 2, 5, 4]


def test_every_rank_prepares_with_the_batch_of_the_first_which_alone_reads(monkeypatch):
    sent = []

    def broadcast(box: list, src: int) -> None:
        sent[:] = box if torch.distributed.get_rank() == src else sent
        box[:] = sent

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        stream = Stream(iter(range(10 * rank, 10 * rank + 4)))
        batch, left = first_batch(stream, lambda taken: {"x": taken}, 2)
        assert batch == {"x": [0, 1]}
        assert list(left) == [10 * rank + i for i in range(4)]
        assert (left is stream) == (rank == 1)
