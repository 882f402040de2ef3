"""The mistakes of a day, each one line that names the value and the way out."""

import logging

import pytest
from test_trainer import arguments, rows, trainer
from tiny import tiny_float_bert, tiny_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from hf_bnn import BinaryTrainer, BinaryTrainingArguments, optimize_, pack_
from hf_bnn.models import plain_trainer
from hf_bnn.nn import packed_base
from hf_bnn.training import argument_checks


@pytest.fixture
def warnings(caplog):
    """The log, in which a warning that comes once in a process may come again."""
    for once in (argument_checks._warn_of_rate, argument_checks._warn_of_missing_teacher, plain_trainer._warn):
        once.cache_clear()
    packed_base.warn_of_training.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("per_device_train_batch_size", 0, 1),
        ("per_device_eval_batch_size", -2, 1),
        ("gradient_accumulation_steps", 0, 1),
        ("learning_rate", -1e-3, 0),
        ("learning_rate", float("nan"), 0),
        ("learning_rate", float("inf"), 0),
        ("weight_decay", -0.1, 0),
        ("max_grad_norm", -1.0, 0),
        ("warmup_steps", -3, 0),
    ],
)
def test_a_number_that_no_run_can_have_is_refused(tmp_path, field, value, least):
    with pytest.raises(ValueError, match=rf"^{field}={value}: expected a number of at least {least}; "):
        arguments(tmp_path, **{field: value})


@pytest.mark.parametrize("steps", [0, -1])
def test_a_run_without_a_step_is_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=rf"num_train_epochs=0 and max_steps={steps}: expected one of them above 0"):
        arguments(tmp_path, num_train_epochs=0, max_steps=steps)


def test_a_missing_output_dir_is_not_made_up():
    with pytest.raises(ValueError, match=r"output_dir is missing: .* --output_dir FOLDER"):
        BinaryTrainingArguments()


def test_an_empty_set_is_named(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty: expected at least one row"):
        BinaryTrainer(tiny_model(), arguments(tmp_path), train_dataset=rows(1).select([]))
    one = trainer(tmp_path)
    with pytest.raises(ValueError, match="the data set to evaluate on is empty"):
        one.evaluate(rows(1).select([]))
    with pytest.raises(ValueError, match="the data set to evaluate on is empty"):
        one.predict([])
    with pytest.raises(ValueError, match=r"train_dataset\['one'\] is empty"):
        argument_checks.refuse_empty({"one": []}, "train_dataset")


class Nothing(IterableDataset):
    """A stream without a row."""

    def __iter__(self):
        return iter(())


@pytest.mark.filterwarnings("ignore")
def test_a_stream_without_a_row_does_not_end_as_a_trained_model(tmp_path):
    settings = {"calibrate_levels": False, "accelerator_config": {"dispatch_batches": False}}
    args = arguments(tmp_path, max_steps=2, **settings)
    one = BinaryTrainer(tiny_model(), args, train_dataset=Nothing())
    with pytest.raises(ValueError, match=r"no step was made|train_dataset is empty"):
        one.train()


def test_the_rate_of_a_float_model_and_a_missing_teacher_are_said_once(tmp_path, warnings):
    one = trainer(tmp_path, max_steps=1, learning_rate=5e-5)
    one.train()
    argument_checks.warn_of_recipe(one.model, 5e-5, has_teacher=False)
    told = [record.message for record in warnings.records if record.name == "hf_bnn.training.argument_checks"]
    assert len(told) == 2
    assert "learning_rate=5e-05 suits float models" in told[0]
    assert "1e-3 is a good first choice" in told[0]
    assert "no teacher_model" in told[1]


def test_with_a_teacher_and_a_rate_for_binary_models_nothing_is_said(tmp_path, warnings):
    model = tiny_model()
    argument_checks.warn_of_recipe(model, 1e-3, has_teacher=True)
    argument_checks.warn_of_recipe(tiny_float_bert(), 5e-5, has_teacher=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    argument_checks.warn_of_recipe(model, 5e-5, has_teacher=False)
    assert not warnings.records


def test_fp16_on_a_cpu_says_that_it_trains_in_float32(tmp_path, warnings):
    trainer(tmp_path, fp16=True)
    assert "fp16 has no effect on a CPU: the model is trained in float32" in warnings.text
    warnings.clear()
    trainer(tmp_path, bf16=True)
    assert not warnings.records


@pytest.mark.parametrize("how", ["argument", "accelerate"])
def test_fsdp_that_would_have_no_effect_is_refused(tmp_path, how, monkeypatch):
    args = arguments(tmp_path)
    if how == "accelerate":  # as `accelerate launch --use_fsdp` says it
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        monkeypatch.setattr(args, "fsdp", True)
        monkeypatch.setattr(args, "fsdp_config", {})
        monkeypatch.setattr(type(args), "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(
        ValueError, match=r"fsdp=True has no effect on 'cpu' devices: .* Leave it out, or train on GPUs"
    ):
        BinaryTrainer(tiny_model(), args, train_dataset=rows())


# transformers' own Trainer


def plain(folder, model, trained=Trainer):
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "save_strategy": "no"}
    return trained(model, TrainingArguments(str(folder), **settings), train_dataset=rows(), eval_dataset=rows(8))


def test_a_plain_trainer_of_a_binary_model_says_what_is_missing(tmp_path, warnings):
    plain(tmp_path, tiny_float_bert()).train()
    plain(tmp_path, tiny_model()).evaluate()
    trainer(tmp_path, max_steps=1).train()
    assert "as if it were float" not in warnings.text
    plain(tmp_path, tiny_model()).train()
    told = [record.message for record in warnings.records if "as if it were float" in record.message]
    assert len(told) == 1
    assert told[0].startswith("Trainer trains this binary BinaryBertForSequenceClassification as if it were float")
    assert "Use hf_bnn.BinaryTrainer" in told[0]


@pytest.mark.parametrize("made", [pack_, lambda model: optimize_(pack_(model))], ids=["packed", "optimized"])
def test_a_plain_trainer_of_a_packed_model_says_that_bits_do_not_learn(tmp_path, made, warnings):
    model = made(tiny_model())
    one = plain(tmp_path, model)
    one.evaluate()
    assert "bits and do not learn" not in warnings.text
    one.train()
    assert warnings.text.count("bits and do not learn") == 1


def test_a_packed_model_whose_packed_layers_are_frozen_is_trained_without_a_word(tmp_path, warnings):
    model = pack_(tiny_model())
    model.bert.requires_grad_(False)
    plain(tmp_path, model).train()
    assert not warnings.records
