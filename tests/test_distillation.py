"""The distillation losses against their formulas, and the cache of the teacher's outputs."""

import math

import pytest
import torch
from tiny import tiny_batch, tiny_float_bert

from hf_bnn.distillation import TeacherCache, TeacherOutput, hidden_loss, logits_loss


def test_the_logits_loss_is_the_tempered_divergence():
    student, teacher, temperature = torch.tensor([[0.3, -1.0]]), torch.tensor([[1.0, 0.5]]), 2.0
    p = [math.exp(v / temperature) for v in (1.0, 0.5)]
    q = [math.exp(v / temperature) for v in (0.3, -1.0)]
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert logits_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert logits_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-7)


def test_the_logits_loss_of_a_regression_is_the_squared_error():
    assert logits_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.0]])).item() == pytest.approx(2.0)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"the teacher's logits are \(4, 3\), the student's \(4, 2\)"):
        logits_loss(torch.zeros(4, 2), torch.zeros(4, 3))


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


class Teacher:
    """Counts how often it is asked."""

    def __init__(self):
        self.model, self.calls = tiny_float_bert().eval(), 0

    @torch.no_grad()
    def __call__(self, inputs) -> TeacherOutput:
        self.calls += 1
        output = self.model(**inputs, output_hidden_states=True)
        return TeacherOutput(output.logits, output.hidden_states)


def inputs(rows: list[int], tokens: int = 6) -> dict[str, torch.Tensor]:
    batch = {name: value[rows, :tokens] for name, value in tiny_batch(8).items() if name != "labels"}
    return batch


def test_the_cache_gives_what_the_teacher_gave_whatever_the_batch():
    teacher, cache = Teacher(), TeacherCache(2**20)
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        batch = inputs(rows)
        cache.get(batch, lambda batch=batch: teacher(batch))
    mixed = inputs([5, 2, 7])
    got = cache.get(mixed, lambda: pytest.fail("the teacher was asked again"))
    fresh = teacher(mixed)
    torch.testing.assert_close(got.logits, fresh.logits)
    mask = mixed["attention_mask"].bool()
    for ours, theirs in zip(got.hidden_states, fresh.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask].float(), theirs[mask], rtol=1e-2, atol=1e-2)  # kept in bfloat16
    short = inputs([1, 3], tokens=4)  # the same examples with less padding
    cache.get(short, lambda: pytest.fail("the teacher was asked again"))
    assert teacher.calls == 3


def test_another_example_is_not_taken_for_a_known_one():
    teacher, cache = Teacher(), TeacherCache(2**20)
    batch = inputs([0, 1])
    cache.get(batch, lambda: teacher(batch))
    other = {**batch, "input_ids": batch["input_ids"] + 1}
    cache.get(other, lambda: teacher(other))
    longer = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    cache.get(longer, lambda: teacher(longer))
    assert teacher.calls == 3


def test_the_cache_stays_below_its_limit_and_stands_aside_for_images():
    teacher = Teacher()
    full, off = TeacherCache(2000), TeacherCache(0)
    batch = inputs([0, 1, 2, 3])
    for cache in (full, off, full, off):
        cache.get(batch, lambda: teacher(batch))
    assert teacher.calls == 4
    assert 0 <= full.bytes <= 2000
    pixels = {"pixel_values": torch.zeros(1, 3, 2, 2), "attention_mask": torch.ones(1, 1)}
    output = TeacherOutput(torch.zeros(1, 2), ())
    cache = TeacherCache(2**20)
    assert cache.get(pixels, lambda: output) is output
    assert not cache.examples
