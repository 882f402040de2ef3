"""Losses and gradients that are not finite: steps that are dropped, and findings that all ranks share."""

import copy

import pytest
import torch
from test_trainer import Poison, arguments, trainer
from tiny import EVERY_METHOD, method_id, tiny_images, tiny_resnet
from torch import nn

from hf_bnn import BinaryTrainer
from hf_bnn.training import nonfinite as module
from hf_bnn.training.nonfinite import Finding, NonFiniteTrainingError, agreed, nonfinite


class Overflow:
    """Makes the gradient of `parameter` NaN in the given optimizer steps, counted from 0."""

    def __init__(self, parameter: nn.Parameter, *steps: int):
        self.steps, self.calls = steps, 0
        parameter.register_hook(self.spoil)

    def spoil(self, grad: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return grad * float("nan") if self.calls - 1 in self.steps else grad


@pytest.mark.parametrize("method", EVERY_METHOD, ids=method_id)
def test_a_dropped_step_changes_no_weight(tmp_path, method):
    one = trainer(tmp_path, method=method, max_steps=1, nonfinite="skip", save_strategy="no")
    Overflow(one.model.classifier.weight, 0)
    before = None

    def note(*_):
        nonlocal before
        before = copy.deepcopy(dict(one.bare_model.named_parameters()))

    one.model.classifier.weight.register_hook(note)
    one.train()
    assert one.skipped_steps == 1
    for name, value in one.bare_model.named_parameters():  # IR-Net takes the mean of its weights away once more
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_run_goes_on_after_a_dropped_step_and_counts_it(tmp_path, caplog, accumulation):
    settings = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": accumulation, "save_strategy": "no"}
    one = trainer(tmp_path, nonfinite="skip", **settings)
    Overflow(one.model.classifier.weight, accumulation)  # the first micro-batch of step 1
    with caplog.at_level("WARNING"):
        one.train()
    assert (
        "step 1 is dropped, 1 in all: a gradient is not finite; it began in the gradient of classifier" in caplog.text
    )
    counts = [entry.get("skipped_steps") for entry in one.state.log_history if "loss" in entry]
    assert counts == [None, 1, 1, 1]
    assert one.state.global_step == 4
    assert not any(nonfinite(p) for p in one.bare_model.parameters())


def test_a_dropped_step_leaves_running_statistics_as_they_were(tmp_path):
    data = [{"pixel_values": image, "labels": label} for image, label in zip(*tiny_images(16).values(), strict=True)]
    data[5]["pixel_values"] = torch.full_like(data[5]["pixel_values"], float("nan"))
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    one = BinaryTrainer(
        tiny_resnet(),
        arguments(tmp_path, nonfinite="skip", save_strategy="no", calibrate_levels=False, **settings),
        train_dataset=data,
    )
    one.train()
    assert one.skipped_steps == 1
    assert all(buffer.isfinite().all() for buffer in one.bare_model.buffers() if buffer.is_floating_point())


def test_a_run_in_which_every_step_is_dropped_stops(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_bnn.training.checked_trainer.MOST_IN_A_ROW", 2)
    one = trainer(tmp_path, callbacks=[Poison(1, "classifier.bias")], max_steps=9, nonfinite="skip", save_strategy="no")
    with pytest.raises(NonFiniteTrainingError, match=r"the loss is nan, in 3 steps one after the other, at step 3"):
        one.train()
    assert one.skipped_steps == 3


def test_an_unknown_policy_is_named(tmp_path):
    with pytest.raises(ValueError, match="nonfinite='ignore': expected one of stop, skip"):
        arguments(tmp_path, nonfinite="ignore")


@pytest.mark.multiprocess
def test_a_nan_on_one_rank_stops_all_with_one_message(two_ranks):
    messages = [report["nan"] for report in two_ranks[1]]
    assert messages[0] == messages[1]
    assert messages[0].startswith("the loss is nan on rank 1 at step 1; it began in ")


@pytest.mark.multiprocess
def test_a_nan_on_one_rank_drops_the_step_of_all(two_ranks):
    dropped = [report["dropped"] for report in two_ranks[1]]
    assert dropped[0] == dropped[1]
    assert dropped[0]["skipped"] == 1
    assert dropped[0]["steps"] == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_hear_of_the_first_finding(monkeypatch: pytest.MonkeyPatch, rank: int):
    others = [Finding("a gradient is not finite", "x"), Finding("the loss is nan", "the output of head", in_loss=True)]

    def all_reduce(flag: torch.Tensor, op: object) -> None:
        assert op is torch.distributed.ReduceOp.MAX
        flag.fill_(1)

    def all_gather_object(found: list, own: object) -> None:
        assert own is others[rank]
        found[:] = others

    monkeypatch.setattr(module.torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(module.torch.distributed, "all_gather_object", all_gather_object)
    expected = Finding("the loss is nan on rank 1", "the output of head", in_loss=True)
    assert agreed(others[rank], 2, torch.device("cpu")) == expected
    monkeypatch.setattr(module.torch.distributed, "all_reduce", lambda flag, op: None)
    assert agreed(None, 2, torch.device("cpu")) is None
    assert agreed(others[rank], 1, torch.device("cpu")) is others[rank]
