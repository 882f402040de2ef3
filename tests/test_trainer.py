"""BinaryTrainer: what it does to the optimizer, the loss, evaluation, and what it writes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import EVERY_METHOD, method_id, tiny_batch, tiny_float_bert, tiny_model
from transformers import (
    AutoModelForSequenceClassification,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_bnn import BinaryTrainer, BinaryTrainingArguments, Fsg, IRNet, Surge, pack_
from hf_bnn.install import calibrate_
from hf_bnn.nn.layers import binary_layers
from hf_bnn.nn.packed import PackedLinear
from hf_bnn.training import method_state
from hf_bnn.training.nonfinite import NonFiniteTrainingError


def rows(count: int = 16) -> Dataset:
    return Dataset.from_dict({key: value.tolist() for key, value in tiny_batch(count).items()})


def arguments(folder, **kwargs) -> BinaryTrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return BinaryTrainingArguments(**{**defaults, **kwargs})


def trainer(folder, model=None, *, method=None, teacher_model=None, callbacks=None, **kwargs) -> BinaryTrainer:
    set_seed(0)
    return BinaryTrainer(
        tiny_model() if model is None else model,
        arguments(folder, **kwargs),
        method=method,
        teacher_model=teacher_model,
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=callbacks,
    )


def losses(trained: BinaryTrainer) -> list[float]:
    return [float(entry["loss"]) for entry in trained.state.log_history if "loss" in entry]


# The loss-scale trap


def weights_after_one_step(folder, accumulation: int, believe_the_head: bool = False) -> dict[str, torch.Tensor]:
    one = trainer(
        folder,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
    )
    one.model_accepts_loss_kwargs = believe_the_head
    one.train()
    return {name: p.detach().clone() for name, p in one.model.named_parameters()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_accumulation_4_takes_the_step_of_one_batch_four_times_as_large(tmp_path):
    whole = weights_after_one_step(tmp_path, 1)
    assert distance(whole, weights_after_one_step(tmp_path, 4)) < 1e-6


def test_the_step_is_four_times_too_large_if_the_head_is_believed(tmp_path):
    whole = weights_after_one_step(tmp_path, 1)
    assert distance(whole, weights_after_one_step(tmp_path, 4, believe_the_head=True)) > 1e-4


@pytest.mark.multiprocess
def test_two_processes_take_the_step_of_one_and_stay_bit_equal(two_ranks, tmp_path):
    folder, reports = two_ranks
    assert [report["world_size"] for report in reports] == [2, 2]
    assert reports[0]["digests"] == reports[1]["digests"]  # of every parameter, for every method
    alone = weights_after_one_step(tmp_path / "alone", 1)
    together = load_file(folder / "ste.safetensors")
    assert distance(alone, together) < 1e-6


@pytest.mark.multiprocess
def test_two_processes_evaluate_the_model_that_is_saved_and_resume_as_one(two_ranks):
    one, other = (report["normalized"] for report in two_ranks[1])
    for same in ("loss", "state", "resumed", "steps", "error", "fsdp"):
        assert one[same] == other[same]
    assert one["resumed"] == one["state"]
    assert one["steps"] == 1  # on from the first checkpoint: the second lacked a file of the second rank
    assert "rng_state_1.pth is missing" in one["error"]
    assert "has no effect on 'cpu' devices: every rank would hold the whole model" in one["fsdp"]
    assert one["synchronized"]
    assert one["plain again"]


# Groups, method, refusals


def test_every_parameter_is_in_one_group_and_latents_take_no_weight_decay(tmp_path):
    one = trainer(tmp_path, method=Surge(), weight_decay=0.1, aux_learning_rate_multiplier=3.0)
    optimizer = one.create_optimizer()
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted({id(p) for p in one.model.parameters()})
    decay = {group["role"]: group["weight_decay"] for group in optimizer.param_groups if group["role"] != "float"}
    assert decay == {"latent": 0.0, "levels": 0.0, "method": 0.0}
    latent = {id(p) for group in optimizer.param_groups if group["role"] == "latent" for p in group["params"]}
    assert latent == {id(layer.weight) for layer in binary_layers(one.model)}
    (own,) = [group for group in optimizer.param_groups if group["role"] == "method"]
    assert own["lr"] == pytest.approx(0.03)
    assert len(own["params"]) == len(binary_layers(one.model))


def test_the_method_is_installed_and_recorded_in_the_config(tmp_path):
    model = tiny_model()
    BinaryTrainer(model, arguments(tmp_path, method="surge", method_args="eta=0.3,aux=shared"))
    assert model.config.method == Surge(eta=0.3, aux="shared").to_dict()


def test_unknown_methods_and_arguments_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown method 'surg'; known methods: ste, "):
        arguments(tmp_path, method="surg")
    with pytest.raises(ValueError, match="unknown argument 'etta' of method 'surge'; known arguments: clip, eta, aux"):
        arguments(tmp_path, method="surge", method_args="etta=1")
    with pytest.raises(ValueError, match="bf16_full_eval=True: a binary model is evaluated in float32"):
        arguments(tmp_path, bf16_full_eval=True)


def test_a_packed_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is packed: its weights are bits and cannot be trained\. Load the latent"):
        trainer(tmp_path, pack_(tiny_model()))


def test_plain_training_arguments_are_refused(tmp_path):
    with pytest.raises(
        TypeError, match="takes BinaryTrainingArguments, not TrainingArguments: they have the same fields"
    ):
        BinaryTrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="BertForSequenceClassification has no binary layer"):
        trainer(tmp_path, tiny_float_bert())


# Training


@pytest.mark.parametrize("method", EVERY_METHOD, ids=method_id)
def test_the_loss_falls(tmp_path, method):
    one = trainer(tmp_path, method=method, num_train_epochs=8)
    one.train()
    assert sum(losses(one)[-4:]) < sum(losses(one)[:4])


def test_elastic_levels_are_fitted_to_the_first_batch_once(tmp_path):
    model = tiny_model()
    one = trainer(tmp_path, model, max_steps=1, learning_rate=1e-12)
    one.train()
    widths = [layer.input_levels.width.item() for layer in binary_layers(model)]
    assert all(abs(width - 1) > 1e-3 for width in widths)
    again = tiny_model()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "levels" not in k}, strict=False)
    calibrate_(again, lambda: again(**{k: v[:8] for k, v in tiny_batch(16).items() if k != "labels"}))
    fitted = [layer.input_levels.width.item() for layer in binary_layers(again)]
    assert fitted == pytest.approx(widths, rel=1e-4)
    before = [layer.input_levels.width.item() for layer in binary_layers(model)]
    one.train()
    assert [layer.input_levels.width.item() for layer in binary_layers(model)] == pytest.approx(before, rel=1e-6)


def test_per_layer_statistics_are_in_the_log_history(tmp_path):
    one = trainer(tmp_path, method=Surge(), max_steps=2)
    one.train()
    entries = [e for e in one.state.log_history if "bert.encoder.layer.0.output.dense/lambda" in e]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert 0 < entries[0]["bert.encoder.layer.0.output.dense/lambda"] < 10
    assert len([key for key in entries[0] if key.endswith("/clipped")]) == 12
    assert [entry["epoch"] for entry in entries] == [0.25, 0.5]


class Logs(TrainerCallback):
    """Keeps all that it is given to log."""

    def __init__(self):
        self.kept: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.kept.append(dict(logs))


class Console(Logs, PrinterCallback):
    pass


def test_per_layer_statistics_go_to_the_trackers_and_not_to_the_console(tmp_path):
    tracker, console = Logs(), Console()
    trainer(tmp_path, method=Surge(), max_steps=2, callbacks=[tracker, console]).train()
    for callback, told in ((tracker, 2), (console, 0)):
        assert sum("loss" in logs for logs in callback.kept) == 2
        assert sum("bert.encoder.layer.0.output.dense/lambda" in logs for logs in callback.kept) == told


def test_the_tokens_of_a_second_are_logged_where_trainer_logs_them(tmp_path):
    one = trainer(tmp_path, max_steps=2, include_num_input_tokens_seen="all")
    one.train()
    entries = [entry for entry in one.state.log_history if "loss" in entry]
    assert [entry["num_input_tokens_seen"] for entry in entries] == [24, 48]
    assert all(entry["train_tokens_per_second"] > 0 for entry in entries)


def test_the_parts_are_told_of_each_step_where_the_run_is(tmp_path):
    one, seen = trainer(tmp_path, max_steps=3, logging_steps=2, lr_scheduler_type="linear", learning_rate=0.03), []
    (part, *_) = (part for _, part in binary_layers(one.model)[0].parts())
    part.begin_step = lambda layer, step: seen.append(step)
    one.train()
    assert [(step.index, step.total, step.log) for step in seen] == [(0, 3, False), (1, 3, True), (2, 3, False)]
    assert [step.lr for step in seen] == pytest.approx([0.03, 0.02, 0.01])


def test_model_init_and_label_smoothing_work(tmp_path):
    set_seed(0)
    one = BinaryTrainer(
        args=arguments(tmp_path, max_steps=2, label_smoothing_factor=0.1),
        model_init=lambda: tiny_model(),
        method=Surge(),
        train_dataset=rows(),
    )
    one.train()
    assert method_state(one.model)
    assert len(losses(one)) == 2


def test_distillation_lowers_the_distance_to_the_teacher(tmp_path):
    teacher = tiny_float_bert()
    one = trainer(tmp_path, teacher_model=teacher, num_train_epochs=10, teacher_cache_gb=0.1)
    one.train()
    assert sum(losses(one)[-4:]) < 0.8 * sum(losses(one)[:4])
    assert len(one.teacher_cache.examples) == 16


# Evaluation


def test_evaluation_is_binary_and_in_float32_under_bf16_training(tmp_path):
    one = trainer(tmp_path, bf16=True, max_steps=2)
    one.train()
    predictions = torch.from_numpy(one.predict(rows(8)).predictions)
    plain = tiny_model()
    plain.load_state_dict(one.model.state_dict())
    batch = {key: value for key, value in tiny_batch(8).items() if key != "labels"}
    with torch.no_grad():
        expected = plain.eval()(**batch).logits
        assert torch.equal(predictions, expected)
        assert torch.equal(pack_(plain)(**batch).logits, expected)
        rounded = one.model.eval()(**batch).logits  # accelerate's autocast is still around the model's own forward
    assert not torch.equal(rounded, expected)


# Checkpoints


class Poison(TrainerCallback):
    """Puts a NaN into a weight after a step."""

    def __init__(self, step: int, name: str):
        self.step, self.name = step, name

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_parameter(self.name).view(-1)[0] = float("nan")


def test_a_nan_loss_stops_the_run_names_the_layer_and_keeps_the_checkpoint(tmp_path):
    poison = Poison(3, "bert.encoder.layer.1.output.LayerNorm.bias")
    one = trainer(tmp_path, callbacks=[poison], max_steps=6, save_strategy="steps", save_steps=2)
    with pytest.raises(NonFiniteTrainingError) as caught:
        one.train()
    message = str(caught.value)
    assert "the loss is nan at step 3; it began in the output of bert.encoder.layer.1.output.LayerNorm." in message
    assert f"The last good checkpoint is {tmp_path}/checkpoint-2" in message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    again = trainer(tmp_path, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_a_nan_that_a_sign_swallows_is_found_in_the_gradient(tmp_path):
    poison = Poison(1, "bert.encoder.layer.1.intermediate.dense.bias")
    one = trainer(tmp_path, callbacks=[poison], max_steps=3)
    with pytest.raises(NonFiniteTrainingError, match=r"a gradient .* output of bert\.encoder\.layer\.1\.intermediate"):
        one.train()


def test_a_nan_weight_is_never_saved(tmp_path):
    poison = Poison(2, "classifier.weight")
    one = trainer(tmp_path, callbacks=[poison], max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(
        NonFiniteTrainingError, match=r"a weight is not finite at step 2; it began in classifier\.weight"
    ):
        one.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_nan_gradient_stops_before_the_step(tmp_path):
    one = trainer(tmp_path, max_steps=2)
    one.model.classifier.weight.register_hook(lambda grad: grad * float("nan"))
    before = copy.deepcopy(one.model.state_dict())
    with pytest.raises(NonFiniteTrainingError, match=r"a gradient is not finite .* the gradient of classifier\.weight"):
        one.train()
    assert torch.equal(before["classifier.weight"], one.model.state_dict()["classifier.weight"])


RESUMED = [
    method for method in EVERY_METHOD if method_id(method) in ("ste", "surge-own", "surge-lowrank", "ir_net", "reste")
]


@pytest.mark.parametrize("method", RESUMED, ids=method_id)
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(tmp_path, method):
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "method": method}
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    first = trainer(tmp_path / "cut", **settings)
    first.add_callback(StopAt(3))
    first.train()
    assert first.state.global_step == 3
    second = trainer(tmp_path / "cut", **settings)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == straight.state.global_step == 8
    ours, theirs = second.model.state_dict(), straight.model.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_resuming_with_other_settings_of_a_method_says_so(tmp_path, monkeypatch):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, method=Surge(), **settings).train()
    warnings = []
    monkeypatch.setattr("hf_bnn.training.resumable_trainer.logger.warning", warnings.append)
    again = trainer(tmp_path, method=Surge(eta=0.3), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [text.partition(". ")[2] for text in warnings] == ["method_args eta was 0.1 and is 0.3"]
    warnings.clear()
    trainer(tmp_path, method=Surge(), **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not warnings


@pytest.mark.parametrize("method", [Fsg(), IRNet()], ids=method_id)
def test_a_second_training_hooks_into_the_optimizer_once_more_only_if_it_is_a_new_one(tmp_path, method):
    one = trainer(tmp_path, method=method, max_steps=2)
    one.train()
    first = one._hooked
    one.train()
    assert one._hooked is getattr(one.optimizer, "optimizer", one.optimizer)
    hooks = [one._hooked._optimizer_step_pre_hooks, one._hooked._optimizer_step_post_hooks]
    assert sum(len(registered) for registered in hooks) == 1
    assert first is not None


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_method_that_hooks_into_the_optimizer_is_refused_where_gradients_are_in_shards(tmp_path, kind: str):
    one = trainer(tmp_path, method=Fsg())
    setattr(one, kind, True)
    with pytest.raises(ValueError, match="method 'fsg' needs whole weights and gradients in the optimizer's step"):
        one.create_optimizer()
    plain = trainer(tmp_path)
    setattr(plain, kind, True)
    plain.create_optimizer()


@pytest.mark.parametrize("name", ["stompp+surge", "fsg+stompp", "fsg+surge"])
def test_a_sum_of_methods_is_trained_recorded_and_saved(tmp_path, name: str):
    settings = {"fsg+stompp": "on=activations"}.get(name)
    args = arguments(tmp_path, method=name, method_args=settings, max_steps=4)
    one = BinaryTrainer(tiny_model(), args, train_dataset=rows())
    one.train()
    one.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["method"]["name"] == name
    packed = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(packed(**tiny_batch(8)).logits, one.model.eval()(**tiny_batch(8)).logits)


def test_a_checkpoint_is_latent_without_the_method_and_the_final_model_is_packed(tmp_path):
    one = trainer(tmp_path, method=Surge(), max_steps=2, save_strategy="steps", save_steps=2)
    one.train()
    one.save_model()
    names = load_file(tmp_path / "checkpoint-2" / "model.safetensors").keys()
    assert not [name for name in names if "around" in name]
    latent = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    packed = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(packed.bert.encoder.layer[0].output.dense, PackedLinear)
    batch = tiny_batch(8)
    with torch.no_grad():
        expected = one.model.eval()(**batch).logits
        assert torch.equal(latent(**batch).logits, expected)
        assert torch.equal(packed(**batch).logits, expected)
    assert binary_layers(one.model)  # saving packed has not touched the model in training


def test_save_packed_false_writes_the_latent_model(tmp_path):
    one = trainer(tmp_path, max_steps=1, save_packed=False)
    one.train()
    one.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["weight_format"] == "latent"


def test_a_model_with_nothing_to_pack_is_saved_as_it_is(tmp_path):
    one = trainer(tmp_path, tiny_model(binarize="activations", embeddings="float"), max_steps=1)
    one.train()
    one.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["weight_format"] == "latent"


def test_load_best_model_at_end_restores_the_best_weights(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    one = trainer(tmp_path, method=Surge(), max_steps=4, load_best_model_at_end=True, **settings)
    one.train()
    best = load_file(Path(one.state.best_model_checkpoint) / "model.safetensors")
    ours = one.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in best.items())


def test_save_total_limit_keeps_the_newest(tmp_path):
    one = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    one.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_resuming_with_another_method_is_refused(tmp_path):
    trainer(tmp_path, method=Surge(), max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=r"method was 'surge' and is 'ste' \(resume with the same --method\)"):
        trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=True)


# peft 0.21 asks transformers 5.23 for a property that has a new name there.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_on_a_packed_model_are_trained_saved_and_resumed(tmp_path):
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.02}
    one = trainer(tmp_path, get_peft_model(pack_(tiny_model()), lora), num_train_epochs=4, **settings)
    one.train()
    assert sum(losses(one)[-4:]) < sum(losses(one)[:4])
    one.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    set_seed(0)
    again = trainer(tmp_path, get_peft_model(pack_(tiny_model()), lora), num_train_epochs=5, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 20
