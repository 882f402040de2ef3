"""Which product of signs runs on integers: a wrong choice would be right, and several times slower."""

import pytest
import torch

from hf_bnn import functional
from hf_bnn.functional import integer_conv2d, integer_product


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The operands' shapes of every int8 product that runs."""
    made, product = [], torch._int_mm

    def noted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        assert left.dtype == right.dtype == torch.int8
        made.append((tuple(left.shape), tuple(right.shape)))
        return product(left, right)

    monkeypatch.setattr(functional.torch, "_int_mm", noted)
    monkeypatch.setattr(functional, "CPU_MULTIPLIES_INT8", True)
    return made


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(2, shape, dtype=torch.int8) * 2 - 1


def test_linear_products_run_on_integers(shapes: list):
    left, right = signs(2, 3, 5), signs(4, 5)
    assert torch.equal(integer_product(left, right), left.float() @ right.t().float())
    assert shapes == [((6, 5), (5, 4))]


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"architecture": "x86_64", "avx512_vnni": True}, True),
        ({"architecture": "x86_64", "avx_vnni": True}, True),
        ({"architecture": "aarch64"}, True),
        ({}, True),
    ],
)
def test_a_processor_without_integer_products_multiplies_floats(
    capabilities: dict, fast: bool, monkeypatch: pytest.MonkeyPatch
):
    made, product = [], torch._int_mm
    monkeypatch.setattr(functional.torch, "_int_mm", lambda *pair: made.append(pair) or product(*pair))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert functional.cpu_multiplies_int8() is fast
    monkeypatch.setattr(functional, "CPU_MULTIPLIES_INT8", fast)
    left, right = signs(6, 5), signs(4, 5)
    assert torch.equal(integer_product(left, right), left.float() @ right.t().float())
    assert bool(made) is fast
    monkeypatch.setattr(functional, "EXACT_SUMS", 5)  # floats would not be exact
    assert torch.equal(integer_product(left, right), left.float() @ right.t().float())
    assert len(made) == 1 + fast


def test_convolutions_run_on_integers_unless_they_are_grouped(shapes: list):
    x, weight = signs(2, 4, 5, 5), signs(6, 4, 3, 3)
    integer_conv2d(x, weight, (1, 1), (0, 0), (1, 1), 1)
    assert shapes == [((18, 36), (36, 6))]
    integer_conv2d(x, weight[:, :2], (1, 1), (0, 0), (1, 1), 2)
    assert len(shapes) == 1


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 5, 4), (3, 0, 4), (3, 5, 0), (3, 1, 4)])
def test_what_torchs_int8_product_cannot_take_runs_on_floats(rows: int, inputs: int, outputs: int, shapes: list):
    left, right = signs(rows, inputs), signs(outputs, inputs)
    assert torch.equal(integer_product(left, right), left.float() @ right.t().float())
    assert shapes == []


class OnGpu:
    """Shape and device of a tensor that is not there."""

    device = torch.device("cuda")

    def __init__(self, *shape: int):
        self.shape = shape

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "taken"),
    [(17, 8, 8, True), (16, 8, 8, False), (17, 9, 8, False), (17, 8, 9, False), (16, 9, 9, False), (0, 8, 8, False)],
)
def test_on_a_gpu_torchs_int8_product_takes_more_than_16_rows_and_multiples_of_8(
    rows: int, inputs: int, outputs: int, taken: bool
):
    assert functional._int8_product_takes(OnGpu(rows, inputs), OnGpu(outputs, inputs)) is taken
