"""Levels against their definition, and their gradients against autograd of BiT's formula written out."""

import pytest
import torch
from torch import Tensor

from hf_bnn.estimators import clipped_sign
from hf_bnn.functional import sign, sign_int8
from hf_bnn.nn.levels import SMALLEST_SCALE, BooleanLevels, ElasticLevels, SignedLevels, UnsignedLevels


def elastic(signed: bool, width: float = 0.7, offset: float = 0.1) -> ElasticLevels:
    levels = ElasticLevels(signed)
    with torch.no_grad():
        levels.width.fill_(width)
        levels.offset.fill_(offset)
    return levels


def boolean(offset: float = 0.3) -> BooleanLevels:
    levels = BooleanLevels()
    with torch.no_grad():
        levels.offset.fill_(offset)
    return levels


EVERY_LEVELS = {
    "signed": SignedLevels,
    "unsigned": UnsignedLevels,
    "elastic": lambda: elastic(True),
    "elastic unsigned": lambda: elastic(False),
    "elastic negative": lambda: elastic(True, -0.7),
    "elastic narrow": lambda: elastic(True, 0.0),
    "boolean": boolean,
}
every_levels = pytest.mark.parametrize("make", EVERY_LEVELS.values(), ids=EVERY_LEVELS)


def values(levels: SignedLevels, x: Tensor) -> Tensor:
    """`x` on the levels: scale * s + shift."""
    scale, shift = levels.affine()
    return scale * sign(levels.normalize(x)) + shift


@every_levels
def test_the_normalized_input_and_the_threshold_decide_alike(make):
    levels = make()
    threshold = float(torch.as_tensor(levels.threshold()).detach())
    x = torch.cat([torch.randn(10_000), torch.full((3,), threshold), torch.tensor([0.0, -0.0])])
    assert torch.equal(sign(levels.normalize(x)), sign_int8(x, levels.threshold()).float())


@every_levels
def test_an_input_on_the_threshold_takes_the_high_level(make):
    levels = make()
    x = torch.as_tensor(levels.threshold()).detach().expand(1)
    assert sign(levels.normalize(x)).item() == 1


@every_levels
def test_shifted_says_whether_there_is_a_shift(make):
    levels = make()
    assert levels.shifted == bool(levels.affine()[1] != 0)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (SignedLevels(), {-1.0, 1.0}),
        (UnsignedLevels(), {0.0, 1.0}),
        (elastic(True, 0.5), {-0.5, 0.5}),
        (elastic(False, 0.5), {0.0, 0.5}),
    ],
)
def test_the_levels_are_the_two_values_they_are_called_after(levels: SignedLevels, expected: set[float]):
    assert set(values(levels, torch.randn(100)).tolist()) == expected


def bit_formula(x: Tensor, a: Tensor, b: Tensor, signed: bool) -> Tensor:
    """BiT's elastic binarization (arXiv 2205.13016, eq. 5), rounding and clipping with straight-through gradients.

    The offset decides where the levels part; the values are {-a, a} or {0, a}.
    """
    u = (x - b) / a
    if signed:
        return a * clipped_sign(u)
    # round(clip(u, 0, 1)): the gradient of clip
    return a * (clipped_sign(2 * u - 1) + 1) / 2


@pytest.mark.parametrize("signed", [True, False])
def test_elastic_levels_and_their_gradients_are_those_of_the_formula(signed: bool):
    levels = elastic(signed).double()
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    G = torch.randn(200, dtype=torch.float64)
    scale, shift = levels.affine()
    y = scale * clipped_sign(levels.normalize(x)) + shift
    y.backward(G)

    twin = x.detach().clone().requires_grad_()
    a = levels.width.detach().clone().requires_grad_()
    b = levels.offset.detach().clone().requires_grad_()
    expected = bit_formula(twin, a, b, signed)
    expected.backward(G)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(levels.width.grad, a.grad)
    torch.testing.assert_close(levels.offset.grad, b.grad)


@pytest.mark.parametrize("signed", [True, False])
def test_the_normalized_input_passes_gradcheck(signed: bool):
    levels = elastic(signed).double()

    def normalized(x: Tensor, width: Tensor, offset: Tensor) -> Tensor:
        return torch.func.functional_call(levels, {"width": width, "offset": offset}, (x,))

    levels.forward = levels.normalize
    inputs = (torch.randn(5, 3), torch.tensor([0.7]), torch.tensor([0.1]))
    assert torch.autograd.gradcheck(normalized, tuple(t.double().requires_grad_() for t in inputs))


@pytest.mark.parametrize("width", [0.0, -0.3, 1e-9])
def test_a_width_that_is_not_positive_is_taken_for_its_magnitude_and_never_for_zero(width: float):
    levels = elastic(True, width)
    scale, _ = levels.affine()
    assert scale.item() == pytest.approx(max(abs(width), SMALLEST_SCALE))
    assert levels.normalize(torch.randn(50)).isfinite().all()


def test_elastic_levels_start_at_their_initial_width_and_can_be_reset():
    levels = ElasticLevels(signed=False, width=0.1)
    assert (levels.width.item(), levels.offset.item()) == (pytest.approx(0.1), 0.0)
    with torch.no_grad():
        levels.width.fill_(5.0)
        levels.offset.fill_(5.0)
    levels.reset_parameters()
    assert (levels.width.item(), levels.offset.item()) == (pytest.approx(0.1), 0.0)


@every_levels
def test_the_normalized_input_keeps_shape_and_dtype(make):
    levels = make().to(torch.bfloat16)
    for shape in [(), (3,), (0, 4), (2, 3, 4)]:
        found = levels.normalize(torch.randn(shape).bfloat16())
        assert (found.shape, found.dtype) == (shape, torch.bfloat16)


# Fitting


def squared_error(levels: SignedLevels, x: Tensor) -> float:
    with torch.no_grad():
        return float((values(levels, x) - x).square().mean())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])
def test_fitted_levels_have_the_least_squared_error_of_all_widths(signed: bool, size: float):
    x = size * (torch.randn(4000) if signed else torch.randn(4000).relu())
    levels = ElasticLevels(signed)
    levels.fit(x)
    fitted = squared_error(levels, x)
    best = min(squared_error(elastic(signed, size * width, 0.0), x) for width in torch.linspace(0.05, 4, 200).tolist())
    assert fitted <= 1.01 * best


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("x", [torch.zeros(10), torch.zeros(0)], ids=["zeros", "empty"])
def test_levels_that_cannot_be_fitted_stay(signed: bool, x: Tensor):
    levels = elastic(signed)
    levels.fit(x)
    assert levels.width.item() == pytest.approx(0.7)


def test_fixed_levels_have_nothing_to_fit():
    levels = UnsignedLevels()
    levels.fit(torch.randn(10))
    assert levels.affine() == (0.5, 0.5)


def test_boolean_levels_begin_where_a_row_of_weights_adds_up_to_one():
    levels = boolean(0.3)
    scores = torch.randn(4, 3, 5, 20)
    levels.fit(scores)
    weights = torch.where(scores < 0.3, 0.0, levels.width.detach())
    torch.testing.assert_close(weights.sum(-1).mean(), torch.tensor(1.0))
    assert levels.offset == torch.tensor(0.3)
    levels.fit(scores - 1)
    assert torch.equal(torch.where(scores < 0.3, 0.0, levels.width.detach()), weights)


def test_boolean_levels_that_nothing_reaches_keep_their_width():
    levels = boolean(10.0)
    levels.fit(torch.randn(4, 5))
    assert levels.width == torch.tensor(0.1)


def test_boolean_levels_and_their_gradients_are_those_of_the_formula():
    levels = boolean(0.3)
    x = torch.randn(500, requires_grad=True)
    grad = torch.randn(500)
    scale, shift = levels.affine()
    (scale * clipped_sign(levels.normalize(x)) + shift).backward(grad)
    inside = ((x - 0.3).abs() <= 1).float()
    torch.testing.assert_close(x.grad, 0.05 * inside * grad)  # half of the width 0.1
    torch.testing.assert_close(levels.offset.grad, -(0.05 * inside * grad).sum().view(1))
    torch.testing.assert_close(levels.width.grad, grad[x >= 0.3].sum().view(1))


def test_boolean_levels_are_nothing_and_their_width():
    levels = boolean(0.3)
    assert values(levels, torch.tensor([0.2, 0.3, 0.4])).tolist() == [0, levels.width.item(), levels.width.item()]
