"""The distillation losses against their formulas: which loss a head gets, and what counts in it."""

import math

import pytest
import torch
from tiny import SIZE, tiny_batch, tiny_float_bert, tiny_images, tiny_model, tiny_vit
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from hf_bnn.training.distillation import Distillation, hidden_loss
from hf_bnn.training.prediction_losses import divergence, head_of, problem_type

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def two(cls: type, config) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher of the same class."""
    return cls(config).eval(), cls(config).eval()


def decided(teacher: nn.Module) -> nn.Module:
    """The teacher, with something to say: its logits are far from 0."""
    with torch.no_grad():
        teacher.classifier.bias.copy_(torch.tensor([4.0, -2.0, 1.0]))
    return teacher


def loss_of(student: nn.Module, teacher: nn.Module, batch: dict, temperature: float = 1.0, **weights: float):
    lesson = Distillation(
        **{"logits_weight": 1.0, "hidden_weight": 0.0, **weights},
        temperature=temperature,
        head=head_of(student),
        config=getattr(student, "config", None),
    )
    with torch.no_grad():
        own, theirs = (lesson.read(model(**batch, output_hidden_states=True), batch) for model in (student, teacher))
        return lesson.loss(own, theirs, batch).item(), own, theirs


def kl(student: list[float], teacher: list[float], temperature: float = 1.0) -> float:
    """T^2 sum p log(p / q), written out."""
    p, q = ([math.exp(v / temperature) for v in logits] for logits in (teacher, student))
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def rows_of(student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor, temperature: float = 1.0) -> float:
    """The mean of `kl` over the predictions that `keep` says."""
    pairs = zip(student[keep].tolist(), teacher[keep].tolist(), strict=True)
    losses = [kl(own, theirs, temperature) for own, theirs in pairs]
    return sum(losses) / len(losses)


def test_the_divergence_is_the_tempered_one_of_each_row():
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    expected = [kl(a, b, 2.0) for a, b in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert divergence(student, teacher, 2.0).tolist() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(divergence(student, teacher), divergence(student, teacher, 1.0))
    assert divergence(teacher, teacher).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_classifier_of_one_label_learns_the_softmax(temperature):
    loss, own, theirs = loss_of(
        tiny_model(num_labels=3), decided(tiny_float_bert(num_labels=3)), tiny_batch(), temperature
    )
    own, theirs = own.predictions["logits"], theirs.predictions["logits"]
    assert loss == pytest.approx(rows_of(own, theirs, torch.ones(4, dtype=torch.bool), temperature), rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_labels_that_do_not_exclude_each_other_are_learned_one_by_one(temperature):
    kind = {"num_labels": 3, "problem_type": "multi_label_classification"}
    batch = {**tiny_batch(), "labels": torch.ones(4, 3)}
    loss, own, theirs = loss_of(tiny_model(**kind), decided(tiny_float_bert(**kind)), batch, temperature)
    pairs = zip(*(outputs.predictions["logits"].flatten().tolist() for outputs in (own, theirs)), strict=True)
    # A label is a choice between its logit and 0.
    losses = [kl([a, 0.0], [b, 0.0], temperature) for a, b in pairs]
    assert loss == pytest.approx(sum(losses) / 12, rel=1e-3)


@pytest.mark.parametrize("outputs", [1, 3])
def test_values_are_learned_by_their_squared_error_at_any_temperature(outputs):
    kind = {"num_labels": outputs, "problem_type": "regression"}
    batch = {**tiny_batch(), "labels": torch.ones(4, outputs)}
    loss, own, theirs = loss_of(tiny_model(**kind), tiny_float_bert(**kind), batch, temperature=5.0)
    expected = ((own.predictions["logits"] - theirs.predictions["logits"]) ** 2).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_problem_is_inferred_as_transformers_does_it_and_unknown_ones_are_refused():
    config, logits = BertConfig(num_labels=3), torch.zeros(2, 3)
    assert problem_type(config, logits, torch.tensor([0, 1])) == "single_label_classification"
    assert problem_type(config, logits, None) == "single_label_classification"
    assert problem_type(config, logits, torch.zeros(2, 3)) == "multi_label_classification"
    assert problem_type(config, logits[:, :1], torch.zeros(2)) == "regression"

    class Odd:
        problem_type = "ranking"

    with pytest.raises(ValueError, match="problem_type='ranking': expected one of single_label_classification, multi"):
        problem_type(Odd, logits, None)


def padded(batch: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """The same batch with more padding."""
    fill = {"labels": -100}
    return {
        name: torch.cat([value, value.new_full((len(value), tokens), fill.get(name, 0))], 1)
        for name, value in batch.items()
    }


@pytest.mark.parametrize("cls", [BertForTokenClassification, BertForMaskedLM])
def test_tokens_count_where_they_have_a_label_and_are_no_padding(cls):
    student, teacher = two(cls, BertConfig(**SIZE, **QUIET, num_labels=3))
    batch = tiny_batch()
    labels = torch.zeros_like(batch["input_ids"])
    labels[:, 0] = -100
    batch["labels"] = labels
    loss, own, theirs = loss_of(student, teacher, batch)
    keep = (labels != -100) & (batch["attention_mask"] == 1)
    expected = rows_of(own.predictions["logits"], theirs.predictions["logits"], keep)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert loss_of(student, teacher, padded(batch, 9))[0] == pytest.approx(loss, rel=1e-4)
    del batch["labels"]
    loss, own, theirs = loss_of(student, teacher, batch)
    expected = rows_of(own.predictions["logits"], theirs.predictions["logits"], batch["attention_mask"] == 1)
    assert loss == pytest.approx(expected, rel=1e-3)


def test_a_batch_without_one_label_has_no_loss_and_no_nan():
    student, teacher = two(BertForTokenClassification, BertConfig(**SIZE, **QUIET))
    batch = tiny_batch()
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    assert loss_of(student, teacher, batch)[0] == 0.0


def test_spans_are_chosen_among_the_real_tokens():
    student, teacher = two(BertForQuestionAnswering, BertConfig(**SIZE, **QUIET))
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    loss, own, theirs = loss_of(student, teacher, batch, temperature=2.0)
    losses = []
    for name in ("start_logits", "end_logits"):
        for row, length in enumerate(batch["attention_mask"].sum(1)):
            pair = (outputs.predictions[name][row, :length].tolist() for outputs in (own, theirs))
            losses.append(kl(*pair, temperature=2.0))
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    for temperature in (0.5, 2.0):
        once = loss_of(student, teacher, batch, temperature)[0]
        assert loss_of(student, teacher, padded(batch, 9), temperature)[0] == pytest.approx(once, rel=1e-4)


def test_the_choices_of_a_question_are_the_classes_and_their_hidden_states_count_without_padding():
    student, teacher = two(BertForMultipleChoice, BertConfig(**SIZE, **QUIET))
    batch = {name: value.view(2, 2, 6) for name, value in tiny_batch().items() if name != "labels"}
    loss, own, theirs = loss_of(student, teacher, batch)
    logits = own.predictions["logits"], theirs.predictions["logits"]
    assert loss == pytest.approx(rows_of(*logits, torch.ones(2, dtype=torch.bool)), rel=1e-3)
    weights = {"logits_weight": 0.0, "hidden_weight": 1.0}
    once = loss_of(student, teacher, batch, **weights)[0]
    more = {name: torch.cat([value, value.new_zeros(2, 2, 5)], 2) for name, value in batch.items()}
    assert loss_of(student, teacher, more, **weights)[0] == pytest.approx(once, rel=1e-4)


def test_a_language_model_learns_what_follows_each_token():
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    student, teacher = two(GPT2LMHeadModel, config)
    batch = tiny_batch()
    mask = batch["attention_mask"]
    batch["labels"] = torch.where(mask == 1, batch["input_ids"], -100)
    loss, own, theirs = loss_of(student, teacher, batch)
    keep = torch.zeros(4, 6, dtype=torch.bool)
    for row, length in enumerate(mask.sum(1)):
        keep[row, : length - 1] = True
    expected = rows_of(own.predictions["logits"], theirs.predictions["logits"], keep)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert loss_of(student, teacher, padded(batch, 9))[0] == pytest.approx(loss, rel=1e-4)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    assert loss_of(student, teacher, unlabelled)[0] == pytest.approx(loss, rel=1e-5)
    loss, own, theirs = loss_of(student, teacher, {"input_ids": batch["input_ids"]})
    keep = (torch.arange(6) < 5).expand(4, 6)
    assert loss == pytest.approx(rows_of(own.predictions["logits"], theirs.predictions["logits"], keep), rel=1e-3)


def test_an_encoder_decoder_learns_its_targets_and_both_stacks():
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    student, teacher = two(T5ForConditionalGeneration, config)
    labels = torch.tensor([[5, 6, -100], [7, -100, -100], [1, 2, 3], [4, 5, 6]])
    batch = {**tiny_batch(), "labels": labels}
    loss, own, theirs = loss_of(student, teacher, batch, hidden_weight=0.0)
    expected = rows_of(own.predictions["logits"], theirs.predictions["logits"], labels != -100)
    assert loss == pytest.approx(expected, rel=1e-3)
    weights = {"logits_weight": 0.0, "hidden_weight": 1.0}
    loss, own, theirs = loss_of(student, teacher, batch, **weights)
    masks = {"encoder_hidden_states": batch["attention_mask"], "decoder_hidden_states": labels != -100}
    losses = [hidden_loss(own.hidden_states[name], theirs.hidden_states[name], mask) for name, mask in masks.items()]
    assert loss == pytest.approx(sum(losses).item() / 2, rel=1e-5)


def test_masked_patches_are_learned_by_their_squared_error():
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8)
    config.patch_size = config.encoder_stride = 4
    student, teacher = two(ViTForMaskedImageModeling, config)
    batch = {"pixel_values": tiny_images()["pixel_values"], "bool_masked_pos": torch.zeros(4, 4, dtype=torch.bool)}
    batch["bool_masked_pos"][:, 1] = True  # the upper right quarter of the image
    loss, own, theirs = loss_of(student, teacher, batch)
    error = (own.predictions["reconstruction"] - theirs.predictions["reconstruction"]) ** 2
    assert loss == pytest.approx(error[:, :, :4, 4:].mean().item(), rel=1e-4)


def test_images_are_classified_by_the_softmax():
    student, teacher = tiny_vit(), tiny_vit()
    loss, own, theirs = loss_of(student, teacher, {"pixel_values": tiny_images()["pixel_values"]})
    logits = own.predictions["logits"], theirs.predictions["logits"]
    assert loss == pytest.approx(rows_of(*logits, torch.ones(4, dtype=torch.bool)), rel=1e-3)


def test_a_class_of_ones_own_is_judged_by_the_shape_of_its_logits():
    lesson = Distillation(hidden_weight=0.0)
    batch = {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2]),
    }
    own, theirs = (lesson.read({"logits": torch.randn(2, 5, 3)}, batch) for _ in range(2))
    expected = rows_of(own.predictions["logits"], theirs.predictions["logits"], batch["attention_mask"] == 1)
    assert lesson.loss(own, theirs, batch).item() == pytest.approx(expected, rel=1e-3)
    with pytest.raises(
        ValueError, match=r"it is unclear what logits of shape \(2, 3, 4, 4\) predict: name the model's"
    ):
        lesson.read({"logits": torch.randn(2, 3, 4, 4)}, batch)


def test_outputs_that_cannot_be_compared_are_refused():
    batch = {"input_ids": torch.zeros(4, 5, dtype=torch.long)}
    lesson = Distillation(hidden_weight=0.0)
    own, theirs = (lesson.read({"logits": torch.zeros(4, labels)}, batch) for labels in (2, 3))
    with pytest.raises(ValueError, match=r"the teacher's logits are \(4, 3\), the student's \(4, 2\)"):
        lesson.loss(own, theirs, batch)
    with pytest.raises(ValueError, match=r"the teacher returns no 'logits', only \['scores'\]: take a model with the"):
        lesson.read({"scores": torch.zeros(4, 2)}, batch)
    with pytest.raises(ValueError, match="the teacher returns no hidden states: set distillation_hidden_weight=0"):
        Distillation().read({"logits": torch.zeros(4, 2)}, batch)
    tokens = Distillation(hidden_weight=0.0, head=head_of(BertForTokenClassification(BertConfig(**SIZE))))
    odd = {"attention_mask": torch.ones(4, 7), "labels": torch.zeros(4, 7)}
    own, theirs = (tokens.read({"logits": torch.zeros(4, 5, 3)}, odd) for _ in range(2))
    with pytest.raises(ValueError, match=r"predictions of shape \(4, 5\), but its labels and masks are of \[\(4, 7\)"):
        tokens.loss(own, theirs, odd)


def test_the_hidden_loss_is_the_mean_of_scaled_errors_over_the_tokens_that_are_not_padding():
    student, teacher = torch.randn(3, 2, 4, 8).unbind(), torch.randn(3, 2, 4, 8).unbind()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    expected = 0.0
    for own, other in zip(student, teacher, strict=True):
        own, other = own[mask == 1], other[mask == 1]
        expected += ((own - other) ** 2).mean() / other.var() / 3
    torch.testing.assert_close(hidden_loss(student, teacher, mask), expected)
    padded = [state.clone() for state in student]
    padded[1][0, 3] = 1e6
    torch.testing.assert_close(hidden_loss(padded, teacher, mask), expected)
    with pytest.raises(ValueError, match=r"states are \(2, 4, 8\), the mask \(2, 9\): it is unclear which of them are"):
        hidden_loss(student, teacher, torch.ones(2, 9))


def test_a_shallower_student_learns_from_evenly_spaced_layers():
    teacher = [torch.full((1, 2, 4), float(i)) + torch.arange(4) for i in range(7)]
    assert hidden_loss([teacher[i] for i in (0, 2, 4, 6)], teacher).item() == 0.0
    assert hidden_loss([teacher[i] for i in (0, 1, 2, 3)], teacher).item() > 0.1


def test_a_teacher_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"8 wide, the student's 4: set distillation_hidden_weight=0"):
        hidden_loss([torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 8)])


def test_feature_maps_are_compared_if_their_shapes_agree():
    own, theirs = ([torch.randn(2, c, 4, 4) for c in channels] for channels in ((3, 6), (3, 6)))
    expected = sum(((a - b) ** 2).mean() / b.var() for a, b in zip(own, theirs, strict=True)) / 2
    assert torch.allclose(hidden_loss(own, theirs), expected)
    with pytest.raises(
        ValueError, match=r"are \(2, 5, 4, 4\), the student's \(2, 6, 4, 4\): set distillation_hidden_w"
    ):
        hidden_loss(own, [theirs[0], torch.randn(2, 5, 4, 4)])
