"""Resuming: from the newest checkpoint that is whole, into the same run, with what was asked for taking effect."""

import json
import logging
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import trainer
from tiny import different, tiny_float_bert, tiny_model, tiny_resnet
from torch import nn
from transformers import TrainerCallback

from hf_bnn import BinaryConfig, IRNet, Stompp, Surge, binarize_, pack_
from hf_bnn.integrity import MANIFEST, CorruptCheckpointError, is_complete, verify_manifest, write_manifest
from hf_bnn.tasks import stages
from hf_bnn.tasks.commandline import exit_after
from hf_bnn.tasks.errors import exit_code
from hf_bnn.training.checkpoints import (
    RUN_RECORD,
    chosen_checkpoint,
    last_complete_checkpoint,
    read_record,
    verify_checkpoint,
    write_record,
)
from hf_bnn.training.interruption import STOP_SIGNALS, UnfinishedRunError
from hf_bnn.training.run_record import differences, model_record

SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with two checkpoints, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    one = trainer(folder, **SETTINGS)
    one.train()
    one.save_model()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def altered_manifest(text):
    return lambda folder: (folder / MANIFEST).write_text(text)


def without(name):
    def forget(folder):
        named = json.loads((folder / MANIFEST).read_text())
        del named[name]
        (folder / MANIFEST).write_text(json.dumps(named))

    return forget


def halved(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


DAMAGES = {
    "half of the weights": (halved, "is truncated or was altered"),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "an empty state": (lambda folder: (folder / "trainer_state.json").write_bytes(b""), "is truncated or was altered"),
    "an empty record": (lambda folder: (folder / RUN_RECORD).write_bytes(b""), "is truncated or was altered"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "its writing was cut off"),
    "half a manifest": (altered_manifest('{"model.safe'), "cannot be read"),
    "an empty manifest": (altered_manifest("{}"), "does not name trainer_state.json"),
    "a list for a manifest": (altered_manifest("[]"), "is no table of files"),
    "a manifest of bytes": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "a way out of the folder": (altered_manifest('{"../x.safetensors": "0"}'), "is outside the checkpoint"),
    "unnamed weights": (without("model.safetensors"), "does not name the weights"),
    "an unnamed optimizer": (without("optimizer.pt"), "does not name optimizer.pt"),
    "an unnamed config": (without("config.json"), "does not name config.json"),
    "another file of weights": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b""),
        "does not name pytorch_model.bin",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, damage, caplog):
    harm, reason = DAMAGES[damage]
    harm(run / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    assert "checkpoint-4 is skipped" in caplog.text
    assert reason in caplog.text
    with pytest.raises(CorruptCheckpointError, match=reason):
        verify_checkpoint(run / "checkpoint-4")


def test_what_lies_in_folders_of_a_checkpoint_is_under_its_manifest(tmp_path):
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    shard = tmp_path / "pytorch_model_fsdp_0" / "__0_0.distcp"
    shard.write_bytes(b"weights")
    write_manifest(tmp_path)
    verify_manifest(tmp_path)
    shard.write_bytes(b"weightz")
    with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp"):
        verify_manifest(tmp_path)


def test_a_manifest_and_all_that_it_names_are_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), real(file)))
    write_manifest(tmp_path)
    files = ("model.safetensors", MANIFEST, ".")
    assert synced == [(tmp_path / name).stat().st_ino for name in files]


def test_with_nothing_whole_there_is_nothing_to_resume_but_auto_begins_where_nothing_was(run, tmp_path):
    one = trainer(tmp_path / "new", **SETTINGS)
    assert one.checkpoint_to_resume("auto") is None
    assert one.checkpoint_to_resume("False") is None
    for number in (2, 4):
        halved(run / f"checkpoint-{number}")
    for word in (True, "auto", "last"):
        with pytest.raises(ValueError, match=r"no complete checkpoint in .*; leave it out to train anew"):
            trainer(run, **SETTINGS).checkpoint_to_resume(word)


def test_of_two_runs_in_a_folder_the_one_that_began_last_is_resumed(run):
    record = read_record(run / "checkpoint-2")
    write_record(run / "checkpoint-2", {**record, "started": record["started"].replace("20", "21", 1)})
    write_manifest(run / "checkpoint-2")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    (run / "checkpoint-2" / RUN_RECORD).unlink()  # as an older version of this package has left it
    write_manifest(run / "checkpoint-2")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")


def test_a_run_in_another_ones_folder_says_so(run, caplog):
    one = trainer(run, max_steps=1)
    with caplog.at_level(logging.WARNING):
        one.train()
    assert "holds an earlier run's results (checkpoint-4, checkpoint-2, model.safetensors, 3 in all)" in caplog.text


def test_a_checkpoint_that_is_written_again_is_incomplete_until_all_of_it_is_new(tmp_path):
    folder, seen = tmp_path / "checkpoint-1", []
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier run")
    write_manifest(folder)
    one = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    save, save_states = one._save, one._save_rng_state
    one._save = lambda *args, **kwargs: (seen.append(is_complete(folder)), save(*args, **kwargs))
    one._save_rng_state = lambda *args: (seen.append(is_complete(folder)), save_states(*args))
    one.train()
    assert seen == [False, False]
    assert not list(folder.glob("model-*"))
    verify_checkpoint(folder)


# Another run


OTHER_RUNS = {
    "weight_scaling was 'channel' and is 'layer'": {"model": {"weight_scaling": "layer"}},
    "embeddings was 'int8' and is 'float'": {"model": {"embeddings": "float"}},
    "levels was 'elastic' and is 'signed'": {"model": {"levels": "signed"}},
    "attention was 'float' and is 'binary'": {"model": {"attention": "binary"}},
    "binarize was 'both' and is 'weights'": {"model": {"binarize": "weights"}},
    "num_hidden_layers was 2 and is 1": {"model": {"num_hidden_layers": 1}},
    "hidden_act was 'gelu' and is 'relu'": {"model": {"hidden_act": "relu"}},
    "seed was 42 and is 1 (the order of the rows)": {"seed": 1},
    "data_seed was None and is 7 (the order of the rows)": {"data_seed": 7},
    "rows of a step was 4 and is 8 (the order of the rows)": {"gradient_accumulation_steps": 2},
    "optim was 'adamw_torch_fused' and is 'sgd' (its state is another's)": {"optim": "sgd"},
    "method was 'ste' and is 'ir_net' (resume with the same --method)": {"method": IRNet()},
}


@pytest.mark.parametrize("text", OTHER_RUNS)
def test_another_run_is_not_resumed_and_the_field_is_named(run, text):
    settings = dict(OTHER_RUNS[text])
    model = tiny_model(**settings.pop("model", {}))
    again = trainer(run, model, **{**SETTINGS, **settings})
    with pytest.raises(ValueError, match="checkpoint-4 cannot be resumed: it would be another run") as caught:
        again.train(resume_from_checkpoint=True)
    assert text in str(caught.value)
    assert "leave out resume_from_checkpoint" in str(caught.value)


def test_a_batch_size_that_is_found_is_no_other_run(run):
    again = trainer(run, **SETTINGS, per_device_train_batch_size=8, auto_find_batch_size=True)
    assert again.train(resume_from_checkpoint=str(run / "checkpoint-2")).global_step == 4
    with pytest.raises(ValueError, match="rows of a step was 4 and is 8"):
        trainer(run, **SETTINGS, per_device_train_batch_size=8).train(resume_from_checkpoint=True)


def test_all_fields_that_differ_are_in_one_message_the_graver_ones_first(run):
    again = trainer(run, tiny_model(weight_scaling="layer", levels="signed"), **SETTINGS, seed=3, weight_decay=0.5)
    with pytest.raises(ValueError, match="another run") as caught:
        again.train(resume_from_checkpoint=True)
    fields = ("levels was", "weight_scaling was", "seed was", "weight_decay was 0.0 and is 0.5")
    places = [str(caught.value).index(field) for field in fields]
    assert max(places[:3]) < places[3]
    assert "binary layers" not in str(caught.value)


def changes(folder, one) -> list[tuple[str, bool]]:
    """(field, whether it is another run) of all in which `one` differs from the checkpoint."""
    found = differences(read_record(folder), one.run_record(one.planned_steps()), one.args.ignore_data_skip)
    return [(difference.field, difference.another) for difference in found]


MINOR = {
    "learning_rate": {"learning_rate": 1e-3},
    "weight_decay": {"weight_decay": 0.1},
    "warmup_steps": {"warmup_steps": 1},
    "max_steps": {"max_steps": 6},
    "bf16": {"bf16": True},
    "hidden_dropout_prob": {"model": {"hidden_dropout_prob": 0.1}},
    "teacher": {"teacher_model": "a float model"},
    "seed": {"seed": 1, "ignore_data_skip": True},
}


@pytest.mark.parametrize("field", MINOR)
def test_what_may_change_in_a_run_is_only_named(run, field):
    settings = dict(MINOR[field])
    model = tiny_model(**settings.pop("model", {}))
    if "teacher_model" in settings:
        settings["teacher_model"] = tiny_float_bert()
    assert changes(run / "checkpoint-2", trainer(run, model, **{**SETTINGS, **settings})) == [(field, False)]


def test_what_is_no_part_of_a_run_is_not_named(run, tmp_path):
    harmless = {
        "logging_steps": 1,
        "save_steps": 1,
        "eval_strategy": "steps",
        "save_total_limit": 1,
        "run_name": "other",
    }
    assert changes(run / "checkpoint-2", trainer(tmp_path / "elsewhere", **{**SETTINGS, **harmless})) == []


def test_the_same_rows_for_a_step_from_more_processes_are_the_same_run(run):
    one = trainer(run, **SETTINGS)
    record = read_record(run / "checkpoint-2")
    record["settings"].update({"processes": 2, "batch size": 2})
    found = differences(record, one.run_record(4))
    assert [(d.field, d.was, d.now, d.another) for d in found] == [
        ("batch size", 2, 4, False),
        ("processes", 2, 1, False),
    ]


@pytest.mark.parametrize("method", [IRNet(), Stompp(), Stompp() + Surge()], ids=lambda method: method.name)
def test_under_a_schedule_another_end_is_another_run(tmp_path, method):
    one, longer = (trainer(tmp_path, method=method, max_steps=steps) for steps in (4, 6))
    record = one.run_record(4)
    assert [(d.field, d.another) for d in differences(record, longer.run_record(6))] == [("max_steps", True)]


def test_epochs_that_make_the_same_steps_are_the_same_run(run):
    assert changes(run / "checkpoint-2", trainer(run, **{**SETTINGS, "max_steps": -1, "num_train_epochs": 1})) == []


def test_the_structure_of_a_model_without_a_binary_class_is_compared():
    def network(**kwargs):
        return binarize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), **kwargs)

    assert model_record(network()) == model_record(network())
    assert model_record(network())["binary layers"] == {"BinaryLinear(both, channel, SignedLevels())": 2}
    others = [{"weight_scaling": "layer"}, {"binarize": "weights"}, {"skip": ("0",)}]
    assert all(model_record(network()) != model_record(network(**other)) for other in others)


def test_the_structure_of_any_architecture_is_compared():
    def model(**kwargs):
        return BinaryConfig(**kwargs).apply_(tiny_float_bert())

    one, other = model_record(model()), model_record(model(weight_scaling="layer", unsigned=["*output.dense"]))
    assert {name for name in one if one[name] != other[name]} == {
        "binary layers",
        "quantization_config.weight_scaling",
        "quantization_config.unsigned",
    }


# peft 0.21 asks transformers 5.23 for a property that has a new name there.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_settings_of_an_adapter_are_compared(tmp_path):
    def adapted(**kwargs):
        lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["value", "query"], **kwargs)
        return model_record(get_peft_model(pack_(tiny_model()), lora))

    one, same, other = adapted(), adapted(), adapted(lora_alpha=64)
    assert one == same
    assert [name for name in one if one[name] != other[name]] == ["adapter default.lora_alpha"]


# What was asked for takes effect


def test_a_lower_learning_rate_takes_effect_in_every_group(run):
    given = {"learning_rate": 1e-3, "levels_learning_rate_multiplier": 2.0, "weight_decay": 0.25, "adam_beta1": 0.8}
    again = trainer(run, **{**SETTINGS, **given})
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    rates = [entry["learning_rate"] for entry in again.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2 * 0.75, 1e-3 * 0.25])  # of the last steps before and after, on a falling line
    groups = {(group["role"], group["initial_lr"]) for group in again.optimizer.param_groups}
    assert groups == {("float", 1e-3), ("latent", 1e-3), ("levels", 2e-3)}
    assert {group["weight_decay"] for group in again.optimizer.param_groups if group["role"] == "float"} == {0.25, 0.0}
    assert {group["betas"][0] for group in again.optimizer.param_groups} == {0.8}


def test_a_learning_rate_that_the_scheduler_would_overrule_is_refused(tmp_path):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    trainer(tmp_path, **SETTINGS, **settings, metric_for_best_model="loss").train()
    again = trainer(tmp_path, **SETTINGS, **settings, metric_for_best_model="loss", learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"learning_rate was 0.01 and is 0.001 \(the scheduler's"):
        again.train(resume_from_checkpoint=True)


# What is no checkpoint


def test_the_final_packed_folder_is_called_what_it_is(run, tmp_path):
    with pytest.raises(
        ValueError, match=r"a finished model, packed to bits, .* \(checkpoint-4, checkpoint-2\), or True"
    ):
        trainer(run, **SETTINGS).train(resume_from_checkpoint=str(run))
    pack_(tiny_model()).save_pretrained(tmp_path / "alone")
    with pytest.raises(
        ValueError, match=r"packed to bits, .*: load the model, call hf_bnn\.unpack_\(model\) and train"
    ):
        trainer(run, **SETTINGS).train(resume_from_checkpoint=str(tmp_path / "alone"))
    tiny_resnet().save_pretrained(tmp_path / "latent")
    with pytest.raises(
        ValueError, match=r"a saved model without an optimizer's state, .*: load the model and train it"
    ):
        verify_checkpoint(tmp_path / "latent")
    (tmp_path / "latent" / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="it is a saved adapter without an optimizer's state: load the adapter"):
        verify_checkpoint(tmp_path / "latent")
    for name in ("config.json", "model.safetensors"):
        (run / name).unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints, but is none: name one of its checkpoints \(checkpoint-4"):
        verify_checkpoint(run)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='.*nowhere': there is no such folder"):
        trainer(run, **SETTINGS).train(resume_from_checkpoint=str(run / "nowhere"))


@pytest.mark.parametrize("asked", [None, False, "False", "false"])
def test_a_no_begins_anew_also_beside_checkpoints(run, asked):
    assert chosen_checkpoint(asked, run) is None


@pytest.mark.parametrize("asked", [True, "True", "true", "last", "auto"])
def test_a_yes_takes_the_newest_checkpoint_and_only_auto_begins_anew_without_one(run, tmp_path, asked):
    assert chosen_checkpoint(asked, run) == str(run / "checkpoint-4")
    (tmp_path / "empty").mkdir()
    if asked == "auto":
        assert chosen_checkpoint(asked, tmp_path / "empty") is None
    else:
        with pytest.raises(ValueError, match=f"resume_from_checkpoint={asked}: no complete checkpoint in"):
            chosen_checkpoint(asked, tmp_path / "empty")


def test_weights_alone_are_not_resumed(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match="checkpoint-1 was written with save_only_model"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=True)


# The best model


BEST = {**SETTINGS, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}


def test_a_best_model_that_was_altered_is_not_taken(run):
    one = trainer(run, **BEST)
    one.state.best_model_checkpoint = str(run / "checkpoint-2")
    halved(run / "checkpoint-2")
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    with pytest.raises(
        CorruptCheckpointError, match=r"cannot take the best model: .*safetensors .* is .*checkpoint-4$"
    ):
        one._load_best_model()
    assert not different(before, one.model.state_dict())


def test_a_best_model_that_was_altered_stops_the_run_that_is_resumed_at_once(run):
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = str(run / "checkpoint-2")
    (run / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(run / "checkpoint-4")
    halved(run / "checkpoint-2")
    again = trainer(run, **BEST)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint-2/model\.safetensors"):
        again.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert again.state.global_step == 0


# SIGTERM


class Signalled(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: signal.Signals, times: int = 1):
        self.step, self.number, self.times = step, number, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_run_that_was_stopped_leaves_a_checkpoint_and_ends_as_if_it_had_not_been(tmp_path, caplog, number):
    settings = {"max_steps": 5, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 3}
    dropout = {"hidden_dropout_prob": 0.1}
    straight = trainer(tmp_path / "straight", tiny_model(**dropout), **settings)
    straight.train()
    handler = signal.getsignal(number)
    torch.manual_seed(0)
    asked = {"enable_jit_checkpoint": True} if number == signal.SIGTERM else {}
    cut = trainer(tmp_path / "cut", tiny_model(**dropout), callbacks=[Signalled(3, number)], **asked, **settings)
    assert signal.getsignal(number) is handler
    if asked:
        assert cut.stop_signals == (number,)
    cut.stop_signals = STOP_SIGNALS
    with caplog.at_level(logging.WARNING):
        cut.train()
    assert f"{number.name}: the step is completed" in caplog.text
    assert "stops at step 3 of 5 and leaves checkpoint-3" in caplog.text
    assert signal.getsignal(number) is handler
    assert cut.state.global_step == cut.interruption.stopped_at == 3
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-3"]
    again = trainer(tmp_path / "cut", tiny_model(**dropout), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert again.interruption.stopped_at is None
    assert different(again.model.state_dict(), straight.model.state_dict()) == []


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    cut = trainer(tmp_path, callbacks=[Signalled(2, signal.SIGINT, times=2)], max_steps=5)
    cut.stop_signals = STOP_SIGNALS
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert cut.state.global_step == 1


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path):
    one = trainer(tmp_path, callbacks=[Signalled(2, signal.SIGTERM)], max_steps=2)
    one.stop_signals = STOP_SIGNALS
    one.train()
    assert one.interruption.stopped_at is None


def test_only_the_main_thread_watches_for_signals(tmp_path):
    handler, found = signal.getsignal(signal.SIGTERM), []
    one = trainer(tmp_path, max_steps=1)
    one.stop_signals = STOP_SIGNALS

    def train() -> None:
        one.train()
        found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [handler]


def test_a_stage_that_was_stopped_saves_no_final_model(tmp_path, capsys):
    one = trainer(tmp_path, callbacks=[Signalled(2, signal.SIGUSR1)], max_steps=5)
    with pytest.raises(UnfinishedRunError, match=r"at step 2 of 5; .*checkpoint-2 is complete.*auto") as caught:
        stages.train(one, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert exit_code(caught.value, "run_glue.py") == 75
    assert capsys.readouterr().err.startswith("run_glue.py: the run was stopped at step 2 of 5")
    again = trainer(tmp_path, max_steps=5)
    assert stages.train(again, "auto")["train_samples"] > 0
    assert (tmp_path / "model.safetensors").is_file()


def test_ctrl_c_ends_a_script_with_one_line(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        exit_after(main)
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")
