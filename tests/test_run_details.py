"""Small decisions of resuming, recording, distilling and uploading, each by itself."""

import json
import signal
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_trainer import arguments
from tiny import tiny_float_bert, tiny_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from hf_bnn.nn.scalar_levels import has_scalar_levels
from hf_bnn.training.distillation import Distillation
from hf_bnn.training.interruption import StopAtStepEnd
from hf_bnn.training.prediction_losses import HEADS, NEXT_TOKENS, TARGET_TOKENS
from hf_bnn.training.resumable_trainer import _set_rates
from hf_bnn.training.run_record import NO_STRUCTURE, SETTINGS, differences, model_record, run_record
from hf_bnn.training.teacher import check_teacher
from hf_bnn.training.uploads import public

# Learning rates in the midst of a schedule


def scheduler_of(kind: str, rates: list[float]):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups)
    if kind == "lambda":
        return LambdaLR(optimizer, [lambda step: 1 / (1 + step), lambda step: 0.9**step])
    return StepLR(optimizer, 2, 0.1)


@pytest.mark.parametrize("kind", ["lambda", "step"])
def test_a_rate_set_in_the_midst_of_a_schedule_is_what_it_were_from_the_beginning(kind: str):
    found, expected = scheduler_of(kind, [0.1, 0.3]), scheduler_of(kind, [0.05, 0.6])
    for scheduler in (found, expected):
        for _ in range(3):
            scheduler.optimizer.step()
            scheduler.step()
    _set_rates(found.optimizer, found, [0.05, 0.6])
    for _ in range(2):
        for key in ("lr", "initial_lr"):
            rates = [[group[key] for group in scheduler.optimizer.param_groups] for scheduler in (found, expected)]
            assert rates[0] == pytest.approx(rates[1])
        assert found.get_last_lr() == pytest.approx(expected.get_last_lr())
        for scheduler in (found, expected):
            scheduler.optimizer.step()
            scheduler.step()


# The record of a run


class Kind(Enum):
    ODD = "odd"


def record(folder: Path, **settings) -> dict:
    return run_record("now", tiny_model(), arguments(folder, **settings), 4, 16, 8)


@pytest.mark.parametrize("field", [name for name in SETTINGS if name not in ("lr_scheduler_type", "bf16", "fp16")])
def test_every_setting_that_is_noted_is_compared(tmp_path: Path, field: str):
    was, now = record(tmp_path), record(tmp_path)
    if field not in was["settings"]:  # transformers had it once
        pytest.fail(f"{field} is no argument any more: take it out")
    now["settings"][field] = "another"
    [difference] = differences(was, now)
    assert (difference.field, difference.another) == (field, False)


@pytest.mark.parametrize("field", ["seed", "data_seed", "rows", "rows of a step", "dataloader_drop_last"])
def test_whatever_orders_the_rows_makes_it_another_run(tmp_path: Path, field: str):
    was, now = record(tmp_path), record(tmp_path)
    now["data"][field] = "another"
    [difference] = differences(was, now)
    assert (difference.field, difference.another, difference.why) == (field, True, "the order of the rows")


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("seed", {"seed": 7}),
        ("data_seed", {"data_seed": 7}),
        ("rows of a step", {"gradient_accumulation_steps": 2}),
        ("train_sampling_strategy", {"train_sampling_strategy": "sequential"}),
        ("dataloader_drop_last", {"dataloader_drop_last": True}),
    ],
)
def test_the_arguments_that_order_the_rows_are_in_the_record(tmp_path: Path, field: str, settings: dict):
    found = differences(record(tmp_path), record(tmp_path, **settings))
    assert field in [difference.field for difference in found if difference.another]


def test_a_record_holds_whatever_a_config_holds_as_json(tmp_path: Path):
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(to_dict=lambda: {"path": tmp_path, "names": {"b", "a"}, "kind": Kind.ODD})
    noted = run_record("now", model, arguments(tmp_path), 4, 16, 8)
    assert json.loads(json.dumps(noted)) == noted
    fields = {name: noted["model"][name] for name in ("path", "names", "kind")}
    assert fields == {"path": str(tmp_path), "names": ["a", "b"], "kind": "odd"}


def test_what_is_no_structure_is_not_in_the_record():
    model, fields = nn.Linear(2, 2), {"depth": 3, "nested": {"width": 4}}
    silent = [*NO_STRUCTURE, "eos_token_id", "weights_sha256", "_private"]
    told = {**fields, **dict.fromkeys(silent, "anything"), "nested": {"width": 4, "use_cache": True}}
    records = []
    for settings in (fields, told):
        model.config = SimpleNamespace(to_dict=lambda settings=settings: settings)
        records.append(model_record(model))
    assert records[0] == records[1]
    assert records[0] == {"class": "Linear", "depth": 3, "nested.width": 4, "labels": 0, "binary layers": {}}


# Scalar levels


def test_only_scalars_of_levels_count_and_a_file_that_cannot_be_read_has_none(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    scalar, vector = torch.ones(()), torch.ones(1)
    for state, expected in (
        ({"a.width": scalar}, True),
        ({"a.offset": scalar, "b": vector}, True),
        ({"a.width": vector, "steps": scalar}, False),
        ({}, False),
    ):
        assert has_scalar_levels(state, None) is expected
    assert has_scalar_levels(None, [tmp_path / "model.safetensors", tmp_path / "gone.safetensors"]) is False
    assert has_scalar_levels(None, None) is False


# SIGTERM on several ranks


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_signal_to_any_rank_is_one_to_all(monkeypatch: pytest.MonkeyPatch, here: bool, elsewhere: bool):
    def all_reduce(flag: torch.Tensor, op: object) -> None:
        assert op is torch.distributed.ReduceOp.MAX
        assert int(flag) == here
        flag.fill_(max(int(flag), int(elsewhere)))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    received = signal.SIGTERM if here else None
    for world_size, expected in ((2, here or elsewhere), (1, here)):
        trainer = SimpleNamespace(
            args=SimpleNamespace(world_size=world_size, device="cpu"),
            interruption=SimpleNamespace(received=received),
            stop_signals=(signal.SIGTERM,),
        )
        assert StopAtStepEnd(trainer)._requested() is expected
    trainer.stop_signals = ()
    assert StopAtStepEnd(trainer)._requested() is False


@pytest.mark.multiprocess
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(two_ranks):
    assert [report["stopped"] for report in two_ranks[1]] == [2, 2]
    assert [report["received"] for report in two_ranks[1]] == [False, True]


# Heads and teachers


def test_heads_whose_predictions_are_of_tokens_say_so():
    of_tokens = {name for name, head in HEADS.items() if head.per_token}
    assert of_tokens == {
        *("ForTokenClassification", "ForMaskedLM", "ForCausalLM", "LMHeadModel"),
        *("ForConditionalGeneration", "ForQuestionAnswering"),
    }
    assert all(head.per_token is True for head in (NEXT_TOKENS, TARGET_TOKENS))


@pytest.mark.parametrize(
    ("output", "said"), [({"scores": 1}, r"only \['scores'\]"), (SimpleNamespace(scores=1), "only SimpleNamespace")]
)
def test_a_missing_output_is_named_with_those_that_are_there(output: object, said: str):
    with pytest.raises(ValueError, match=f"the student returns no 'logits', {said}: take a model"):
        Distillation(1.0, 0.0).read(output, {}, "student")


class Tokens:
    """A tokenizer, as far as it is looked at."""

    def __init__(self, count: int, padding: int | None):
        self.count, self.pad_token_id = count, padding

    def __len__(self) -> int:
        return self.count


@pytest.mark.parametrize("logits", [False, True])
def test_a_teacher_must_know_all_tokens_and_pad_as_the_tokenizer_does(logits: bool):
    student, teacher = tiny_model(), tiny_float_bert()
    known = teacher.config.vocab_size
    for tokenizer in (None, Tokens(known, 0), Tokens(known - 1, None), object()):
        check_teacher(teacher, student, logits, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"the tokenizer has {known + 1} tokens, the teacher only {known}"):
        check_teacher(teacher, student, logits, tokenizer=Tokens(known + 1, 0))
    with pytest.raises(ValueError, match="the tokenizer pads with 1, the teacher's config says pad_token_id=0"):
        check_teacher(teacher, student, logits, tokenizer=Tokens(known, 1))


def test_a_teacher_is_held_to_its_predictions_and_hidden_states_unless_told_otherwise():
    student = tiny_model(num_labels=2)
    labels, wide = tiny_float_bert(num_labels=3), tiny_float_bert(num_labels=2, hidden_size=64)
    with pytest.raises(ValueError, match="distillation_logits_weight=0"):
        check_teacher(labels, student)
    check_teacher(labels, student, logits=False)
    with pytest.raises(ValueError, match=r"are 64 wide, the student's 32: set distillation_hidden_weight=0"):
        check_teacher(wide, student)
    check_teacher(wide, student, hidden=False)


# What is uploaded


def test_paths_are_shortened_wherever_arguments_hold_them(tmp_path: Path):
    args = arguments(tmp_path, hub_token="secret", run_name="kept/as it is")
    args.report_to = [str(tmp_path / "inner"), "none"]
    args.extra = {"deep": [str(tmp_path)], "path": tmp_path, "number": 3}
    twin = public(args)
    assert (twin.output_dir, twin.hub_token, twin.run_name) == (tmp_path.name, None, "kept/as it is")
    assert twin.report_to == ["inner", "none"]
    assert twin.extra == {"deep": [tmp_path.name], "path": tmp_path.name, "number": 3}
    assert args.hub_token == "secret"
