"""Keys of the cache of the teacher's outputs, and the teacher's layers that a shallower student is compared with."""

import pytest
import torch
from torch import Tensor

from hf_bnn.training.distillation import Outputs, hidden_loss
from hf_bnn.training.teacher import TeacherCache


class Teacher:
    """Hidden states that say which token stands where, and how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: dict[str, Tensor]) -> Outputs:
        self.calls += 1
        states = inputs["input_ids"].float().unsqueeze(-1).expand(-1, -1, 4)
        logits = inputs["input_ids"].float().sum(1, keepdim=True)
        return Outputs({"logits": logits}, {"encoder": (states, -states)})

    def through(self, cache: TeacherCache, inputs: dict[str, Tensor]) -> Outputs:
        return cache.get(inputs, lambda: self(inputs))


def batch(*rows: list[int], left: bool = False) -> dict[str, Tensor]:
    """Padded with zeros to the longest row, on the right or on the left."""
    width = max(map(len, rows))
    padded = [[0] * (width - len(row)) + row if left else row + [0] * (width - len(row)) for row in rows]
    ids = torch.tensor(padded)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("other", [[3, 4, 9], [3, 4, 5, 6]])
def test_a_batch_padded_on_the_left_is_never_kept(other: list[int]):
    teacher, cache = Teacher(), TeacherCache(2**20)
    left = batch([1, 2], other, left=True)
    for calls in (1, 2):
        found = teacher.through(cache, left)
        assert torch.equal(found.hidden_states["encoder"][0][..., 0], left["input_ids"].float())
        assert teacher.calls == calls
    assert (cache.examples, cache.bytes) == ({}, 0)
    right = batch([1, 2], other)
    for _ in range(2):
        found = teacher.through(cache, right)
        assert torch.equal(found.hidden_states["encoder"][0][..., 0], right["input_ids"].float())
    assert teacher.calls == 3
    assert len(cache.examples) == 2


def test_one_row_padded_on_the_left_keeps_the_whole_batch_out():
    teacher, cache = Teacher(), TeacherCache(2**20)
    mixed = {name: torch.cat(pair) for name, pair in _zipped(batch([1, 2, 3], [4]), batch([5, 6, 7], [8], left=True))}
    teacher.through(cache, mixed)
    assert cache.examples == {}


def _zipped(one: dict[str, Tensor], other: dict[str, Tensor]):
    return ((name, (one[name], other[name])) for name in one)


def test_the_limit_counts_bytes_of_logits_and_states_and_refuses_only_what_exceeds_it():
    # two layers of three tokens of four bfloat16 numbers, and one float32 logit
    size = 2 * 3 * 4 * 2 + 4
    for limit, kept in ((size - 1, 0), (size, 1), (2 * size - 1, 1), (2 * size, 2)):
        teacher, cache = Teacher(), TeacherCache(limit)
        teacher.through(cache, batch([1, 2, 3], [4, 5, 6]))
        assert (len(cache.examples), cache.bytes) == (kept, kept * size)
        teacher.through(cache, batch([1, 2, 3], [4, 5, 6]))
        assert (len(cache.examples), cache.bytes) == (kept, kept * size)
        assert teacher.calls == (1 if kept == 2 else 2)


def test_what_is_remembered_has_the_teachers_shapes_with_zeros_at_the_padding():
    teacher, cache = Teacher(), TeacherCache(2**20)
    teacher.through(cache, batch([1, 2, 3], [4, 5]))
    found = teacher.through(cache, batch([4, 5], [1, 2, 3]))
    assert teacher.calls == 1
    assert found.predictions["logits"].tolist() == [[9.0], [6.0]]
    assert [states.shape for states in found.hidden_states["encoder"]] == [(2, 3, 4)] * 2
    assert found.hidden_states["encoder"][1][..., 0].tolist() == [[-4.0, -5.0, 0.0], [-1.0, -2.0, -3.0]]


@pytest.mark.parametrize(
    ("teacher", "student", "layers"),
    [(7, 3, [0, 2, 5, 7]), (5, 3, [0, 2, 3, 5]), (12, 5, [0, 2, 5, 7, 10, 12]), (2, 3, [0, 1, 1, 2]), (4, 1, [0, 4])],
)
def test_a_student_whose_depth_divides_no_teachers_is_held_against_the_nearest_layers(
    teacher: int, student: int, layers: list[int]
):
    states = [torch.full((1, 2, 4), float(i)) + torch.arange(4) for i in range(teacher + 1)]
    assert hidden_loss([states[i] for i in layers], states).item() == 0.0
    for place in range(student + 1):
        for wrong in {layers[place] - 1, layers[place] + 1} & set(range(teacher + 1)):
            moved = [states[wrong if n == place else i] for n, i in enumerate(layers)]
            assert hidden_loss(moved, states).item() > 0.1
