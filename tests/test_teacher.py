"""Which teachers are refused, by what they say of themselves and by what they do; the cache of their outputs."""

import copy

import pytest
import torch
from test_trainer import arguments, losses, rows
from tiny import SIZE, VIT_SIZE, tiny_batch, tiny_float_bert, tiny_float_vit, tiny_images, tiny_model, tiny_vit
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from hf_bnn import (
    BinaryBertConfig,
    BinaryBertForMaskedLM,
    BinaryBertForMultipleChoice,
    BinaryBertForQuestionAnswering,
    BinaryBertForTokenClassification,
    BinaryConfig,
    BinaryTrainer,
    BinaryViTConfig,
    BinaryViTForMaskedImageModeling,
    pack_,
)
from hf_bnn.training.distillation import Distillation, Outputs
from hf_bnn.training.prediction_losses import head_of
from hf_bnn.training.teacher import TeacherCache, teacher_inputs

NAMES = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
TURNED = {"num_labels": 2, "id2label": {0: "Yes", 1: "No"}, "label2id": {"Yes": 0, "No": 1}}


class Tokenizer:
    """As much of a tokenizer as can be compared."""

    def __init__(self, size: int, pad_token_id: int):
        self.size, self.pad_token_id = size, pad_token_id

    def __len__(self) -> int:
        return self.size


REFUSED = {
    "labels": (tiny_float_bert, {"num_labels": 3}, "the teacher has 3 labels, the student 2: train the teacher on"),
    "order": (tiny_float_bert, TURNED, "has the labels in the order yes, no, the student in the order no, yes: give"),
    "problem": (
        tiny_float_bert,
        {"problem_type": "multi_label_classification"},
        "problem_type is 'multi_label_classification', the student's 'single_label_classification': take a teacher",
    ),
    "vocabulary": (
        tiny_float_bert,
        {"vocab_size": 70},
        "teacher has vocab_size=70, the student vocab_size=64: both",
    ),
    "padding": (
        tiny_float_bert,
        {"pad_token_id": 3},
        "teacher has pad_token_id=3, the student pad_token_id=0: both",
    ),
    "width": (tiny_float_bert, {"hidden_size": 48}, "states are 48 wide, the student's 32: set distillation_hidden_w"),
    "no head": (
        BertModel,
        {},
        "a BertModel, has no head: it returns no logits. Take one that was trained for the ta",
    ),
    "other head": (
        BertForTokenClassification,
        {},
        "is for token classification, the student, a BinaryBertForSequenceClassification, for classification: take",
    ),
    "unknown head": (
        BertForPreTraining,
        {},
        "teacher, a BertForPreTraining, has a head for which there is no dist",
    ),
}


def teacher_of(cls, changes: dict) -> nn.Module:
    return cls(**{**NAMES, **changes}) if cls is tiny_float_bert else cls(BertConfig(**{**SIZE, **NAMES, **changes}))


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_does_not_fit_is_refused_at_construction(tmp_path, case: str):
    cls, changes, message = REFUSED[case]
    student = tiny_model(**NAMES, problem_type="single_label_classification")
    with pytest.raises(ValueError, match=message):
        BinaryTrainer(student, arguments(tmp_path), teacher_model=teacher_of(cls, changes))


@pytest.mark.parametrize("case", ["labels", "order", "no head", "other head", "unknown head"])
def test_its_head_does_not_matter_where_only_hidden_states_are_learned(tmp_path, case: str):
    cls, changes, _ = REFUSED[case]
    args = arguments(tmp_path, distillation_logits_weight=0.0, max_steps=1)
    BinaryTrainer(tiny_model(**NAMES), args, teacher_model=teacher_of(cls, changes), train_dataset=rows(8)).train()


def test_its_width_does_not_matter_where_only_logits_are_learned(tmp_path):
    args = arguments(tmp_path, distillation_hidden_weight=0.0, max_steps=1)
    BinaryTrainer(tiny_model(), args, teacher_model=tiny_float_bert(hidden_size=48), train_dataset=rows(8)).train()


def test_the_student_is_not_its_own_teacher(tmp_path):
    student = tiny_model()
    with pytest.raises(ValueError, match="the teacher is the student itself: load a second model"):
        BinaryTrainer(student, arguments(tmp_path), teacher_model=student)
    twin = copy.deepcopy(student)
    twin.bert.pooler.dense.weight = student.bert.pooler.dense.weight
    with pytest.raises(
        ValueError, match=r"shares 'bert\.pooler\.dense\.weight' with the student, which would train it"
    ):
        BinaryTrainer(student, arguments(tmp_path), teacher_model=twin)
    assert all(parameter.requires_grad for parameter in student.parameters())
    BinaryTrainer(student, arguments(tmp_path), teacher_model=copy.deepcopy(student))
    BinaryTrainer(student, arguments(tmp_path), teacher_model=pack_(tiny_model()))


def test_a_student_of_model_init_is_compared_too(tmp_path):
    with pytest.raises(ValueError, match="the teacher has 3 labels, the student 2"):
        BinaryTrainer(
            args=arguments(tmp_path), model_init=lambda: tiny_model(), teacher_model=tiny_float_bert(num_labels=3)
        )


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Tokenizer(80, 0), "the tokenizer has 80 tokens, the teacher only 64: take a teacher that was trained with"),
        (Tokenizer(64, 1), "the tokenizer pads with 1, the teacher's config says pad_token_id=0: take a teacher"),
    ],
)
def test_a_teacher_of_another_tokenizer_is_refused(tmp_path, tokenizer: Tokenizer, message: str):
    with pytest.raises(ValueError, match=message):
        BinaryTrainer(tiny_model(), arguments(tmp_path), teacher_model=tiny_float_bert(), processing_class=tokenizer)
    BinaryTrainer(tiny_model(), arguments(tmp_path), teacher_model=tiny_float_bert(), processing_class=Tokenizer(60, 0))


class Odd(nn.Module):
    """A teacher that says nothing of itself."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids, **kwargs):
        if not self.outputs:
            raise IndexError("index out of range")
        return {name: torch.zeros(len(input_ids), *shape) for name, shape in self.outputs.items()}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (Odd(logits=(3,)), r"the teacher's logits are \(8, 3\), the student's \(8, 2\)"),
        (Odd(scores=(2,)), r"the teacher returns no 'logits', only \['scores'\]"),
        (Odd(), "the teacher, a Odd, cannot run on a batch: index out of range"),
    ],
)
def test_what_only_a_batch_shows_is_refused_before_the_first_step(tmp_path, teacher: Odd, message: str):
    one = BinaryTrainer(
        tiny_model(),
        arguments(tmp_path, distillation_hidden_weight=0.0),
        train_dataset=rows(),
        teacher_model=teacher,
    )
    with pytest.raises(ValueError, match=message):
        one.train()
    assert one.optimizer is None


def test_a_teacher_with_a_nan_is_refused_before_the_first_step(tmp_path):
    teacher = tiny_float_bert()
    with torch.no_grad():
        teacher.classifier.bias[0] = float("nan")
    one = BinaryTrainer(tiny_model(), arguments(tmp_path), train_dataset=rows(), teacher_model=teacher)
    with pytest.raises(ValueError, match="outputs is nan on the first batch: the teacher, a BertForSequenceClassific"):
        one.train()


@pytest.mark.parametrize("name", ["distillation_temperature", "distillation_labels_weight", "teacher_cache_gb"])
def test_saying_how_to_distil_without_a_teacher_is_an_error(tmp_path, name: str):
    args = arguments(tmp_path, **{name: 0.5})
    with pytest.raises(ValueError, match=rf"{name}=0\.5 is for distillation, but there is no teacher: give teacher_mo"):
        BinaryTrainer(tiny_model(), args, train_dataset=rows())
    BinaryTrainer(tiny_model(), args)  # to evaluate only
    with pytest.raises(ValueError, match=f"{name}=-1.0: expected a number >"):
        arguments(tmp_path, **{name: -1.0})


def test_weights_that_are_all_zero_are_refused(tmp_path):
    args = arguments(tmp_path, distillation_logits_weight=0.0, distillation_hidden_weight=0.0)
    with pytest.raises(ValueError, match="distillation_hidden_weight are all 0: nothing would be learned"):
        BinaryTrainer(tiny_model(), args, teacher_model=tiny_float_bert())


def test_accumulation_takes_the_step_of_one_batch_with_a_loss_function_of_ones_own_too(tmp_path):
    def after(accumulation: int) -> torch.Tensor:
        torch.manual_seed(0)
        student, teacher = tiny_model(), tiny_float_bert()
        args = arguments(
            tmp_path,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.1,
        )

        def own_loss(outputs, labels, num_items_in_batch):
            return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

        BinaryTrainer(student, args, train_dataset=rows(8), teacher_model=teacher, compute_loss_func=own_loss).train()
        return student.classifier.weight.detach()

    torch.testing.assert_close(after(4), after(1), rtol=0, atol=1e-6)


def test_an_encoder_decoder_is_taught(tmp_path):
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    teacher = T5ForConditionalGeneration(config)
    teacher.save_pretrained(tmp_path / "t5")
    student = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", quantization_config=BinaryConfig())
    data = [{"input_ids": row, "labels": row[:4]} for row in tiny_batch(8)["input_ids"]]
    one = BinaryTrainer(student, arguments(tmp_path, max_steps=1), train_dataset=data, teacher_model=teacher)
    one.train()
    assert one.state.global_step == 1
    assert teacher_inputs(teacher, {"input_ids": 1, "labels": 2}, ["labels"]) == {"input_ids": 1, "labels": 2}
    made = {"input_ids": 1, "decoder_input_ids": 3}
    assert teacher_inputs(teacher, {**made, "labels": 2}, ["labels"]) == made
    assert teacher_inputs(tiny_float_bert(), {"input_ids": 1, "labels": 2}, ["labels"]) == {"input_ids": 1}


BERT = {**SIZE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 1}
DECODER = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0}
MANY = {"num_labels": 3, "problem_type": "multi_label_classification"}
VALUES = {"num_labels": 3, "problem_type": "regression"}


def tokens(**labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tiny_batch().items() if name != "labels"} | labels


def choices() -> dict[str, torch.Tensor]:
    return {name: value.view(2, 2, 6) for name, value in tokens().items()} | {"labels": torch.tensor([0, 1])}


def masked_images() -> dict[str, torch.Tensor]:
    return {"pixel_values": tiny_images()["pixel_values"], "bool_masked_pos": torch.tensor([[0, 1, 1, 0]] * 4).bool()}


WHERE, IDS = torch.tensor([1, 2, 0, 3]), tiny_batch()["input_ids"]
TAUGHT = {  # student, teacher, batch
    "labels": (lambda: tiny_model(**MANY), lambda: tiny_float_bert(**MANY), tokens(labels=torch.ones(4, 3))),
    "values": (lambda: tiny_model(**VALUES), lambda: tiny_float_bert(**VALUES), tokens(labels=torch.ones(4, 3))),
    "spans": (
        lambda: BinaryBertForQuestionAnswering(BinaryBertConfig(**BERT)),
        lambda: BertForQuestionAnswering(BertConfig(**BERT)),
        tokens(start_positions=WHERE, end_positions=WHERE),
    ),
    "choices": (
        lambda: BinaryBertForMultipleChoice(BinaryBertConfig(**BERT)),
        lambda: BertForMultipleChoice(BertConfig(**BERT)),
        choices(),
    ),
    "masked words": (
        lambda: BinaryBertForMaskedLM(BinaryBertConfig(**BERT)),
        lambda: BertForMaskedLM(BertConfig(**BERT)),
        tokens(labels=torch.where(IDS % 2 == 0, IDS, -100)),
    ),
    "next words": (
        lambda: BinaryConfig().apply_(LlamaForCausalLM(LlamaConfig(**DECODER))),
        lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
        tokens(labels=IDS),
    ),
    "images": (tiny_vit, tiny_float_vit, tiny_images()),
    "masked images": (
        lambda: BinaryViTForMaskedImageModeling(BinaryViTConfig(**VIT_SIZE)),
        lambda: ViTForMaskedImageModeling(ViTConfig(**VIT_SIZE)),
        masked_images(),
    ),
}


@pytest.mark.parametrize("kind", TAUGHT)
def test_every_head_is_taught(tmp_path, kind: str):
    student, teacher, batch = TAUGHT[kind]
    count = len(next(iter(batch.values())))
    data = [{name: value[row] for name, value in batch.items()} for row in range(count)]
    args = arguments(tmp_path, num_train_epochs=12, teacher_cache_gb=0.1, logging_steps=6, lr_scheduler_type="constant")
    one = BinaryTrainer(student(), args, train_dataset=data, teacher_model=teacher())
    one.train()
    assert losses(one)[-1] < losses(one)[0]


# The cache


class Teacher:
    """Counts how often it is asked."""

    def __init__(self, model: nn.Module | None = None):
        self.model, self.calls = (tiny_float_bert() if model is None else model).eval(), 0
        self.lesson = Distillation(head=head_of(self.model), config=self.model.config)

    @torch.no_grad()
    def __call__(self, batch) -> Outputs:
        self.calls += 1
        return self.lesson.read(self.model(**batch, output_hidden_states=True), batch)


def inputs(chosen: list[int], tokens: int = 6) -> dict[str, torch.Tensor]:
    return {name: value[chosen, :tokens] for name, value in tiny_batch(8).items() if name != "labels"}


HEADS = {
    "sequences": tiny_float_bert,
    "tokens": lambda: BertForTokenClassification(BertConfig(**SIZE, num_labels=6)),  # as many labels as tokens
    "spans": lambda: BertForQuestionAnswering(BertConfig(**SIZE)),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_cache_gives_what_the_teacher_gave_whatever_the_batch(head: str):
    teacher, cache = Teacher(HEADS[head]()), TeacherCache(2**20)
    for chosen in ([0, 1, 2, 3], [4, 5, 6, 7]):
        batch = inputs(chosen)
        cache.get(batch, lambda batch=batch: teacher(batch))
    mixed = inputs([5, 2, 7])
    got = cache.get(mixed, lambda: pytest.fail("the teacher was asked again"))
    fresh = teacher(mixed)
    mask = mixed["attention_mask"].bool()
    for name, value in fresh.predictions.items():
        keep = mask if fresh.per_token else torch.ones(3, dtype=torch.bool)
        torch.testing.assert_close(got.predictions[name][keep], value[keep])
    for ours, theirs in zip(got.hidden_states["hidden_states"], fresh.hidden_states["hidden_states"], strict=True):
        torch.testing.assert_close(ours[mask].float(), theirs[mask], rtol=1e-2, atol=1e-2)  # kept in bfloat16
    short = inputs([1, 3], tokens=4)  # the same examples with less padding
    cut = cache.get(short, lambda: pytest.fail("the teacher was asked again"))
    student = Outputs({n: torch.zeros_like(v) for n, v in teacher(short).predictions.items()}, {}, fresh.per_token)
    lesson = Distillation(hidden_weight=0.0, head=teacher.lesson.head, config=teacher.model.config)
    assert lesson.loss(student, cut, short).item() == pytest.approx(
        lesson.loss(student, teacher(short), short).item(), rel=1e-4
    )
    assert teacher.calls == 5


def test_another_example_is_not_taken_for_a_known_one():
    teacher, cache = Teacher(), TeacherCache(2**20)
    batch = inputs([0, 1])
    cache.get(batch, lambda: teacher(batch))
    other = {**batch, "input_ids": batch["input_ids"] + 1}
    cache.get(other, lambda: teacher(other))
    longer = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    cache.get(longer, lambda: teacher(longer))
    assert teacher.calls == 3


def test_padding_on_the_left_is_neither_kept_nor_looked_up():
    teacher, cache = Teacher(), TeacherCache(2**20)
    batch = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    cache.get(batch, lambda: teacher(batch))
    assert not cache.examples
    turned = {name: value.flip(1) for name, value in batch.items()}
    zeros = {**turned, "input_ids": torch.tensor([[0, 0, 0, 0]])}
    cache.get(zeros, lambda: teacher(zeros))
    cache.get(batch, lambda: teacher(batch))
    assert teacher.calls == 3


def test_the_cache_stays_below_its_limit_and_stands_aside_for_all_but_tokens():
    teacher = Teacher()
    full, off = TeacherCache(2000), TeacherCache(0)
    batch = inputs([0, 1, 2, 3])
    for cache in (full, off, full, off):
        cache.get(batch, lambda: teacher(batch))
    assert teacher.calls == 4
    assert 0 <= full.bytes <= 2000
    mask = torch.ones(1, 4, dtype=torch.long)
    output = Outputs({"logits": torch.zeros(1, 2)}, {})
    cache = TeacherCache(2**20)
    for others in (
        {"pixel_values": torch.zeros(1, 3, 2, 2)},
        {"input_ids": mask, "labels": torch.ones(1, 3, dtype=torch.long)},
        {"input_ids": mask[None], "attention_mask": mask[None]},
    ):
        assert cache.get({"attention_mask": mask, **others}, lambda: output) is output
    assert not cache.examples


def test_a_taught_token_classifier_is_the_same_with_and_without_the_cache(tmp_path):
    batch = tiny_batch(8)
    batch["labels"] = torch.where(batch["attention_mask"] == 1, 1, -100)
    data = [{name: value[row] for name, value in batch.items()} for row in range(8)]

    def weights(gigabytes: float) -> torch.Tensor:
        torch.manual_seed(0)
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        teacher = BertForTokenClassification(BertConfig(**dropout, **SIZE))
        student = BinaryBertForTokenClassification(BinaryBertConfig(**dropout, **SIZE))
        args = arguments(tmp_path, num_train_epochs=2, teacher_cache_gb=gigabytes, distillation_hidden_weight=0.0)
        BinaryTrainer(student, args, train_dataset=data, teacher_model=teacher).train()
        return student.classifier.weight.detach()

    torch.testing.assert_close(weights(0.1), weights(0.0), rtol=1e-4, atol=1e-5)
