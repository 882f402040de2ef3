"""Pure tensor functions: signs, straight-through gradients, bits, exact products."""

import pytest
import torch
from torch import Tensor

from hf_bnn.estimators import clipped_sign, identity_sign
from hf_bnn.functional import (
    clipped_gradient,
    exact_matmul,
    integer_product,
    pack_bits,
    sign,
    sign_int8,
    straight_through,
    unpack_bits,
    weight_scale,
)
from hf_bnn.nn.layers import BinaryLinear
from hf_bnn.nn.packed import PackedLinear

SIZES = [1, 7, 8, 9, 65]
EDGES = [0.0, -0.0, float("nan"), 1e-45, -1e-45, float("inf"), -float("inf"), 3.0, -3.0]
SIGNS_OF_EDGES = [1, 1, 1, 1, -1, 1, -1, 1, -1]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def literal_sign(x: Tensor) -> Tensor:
    """-1 where x < 0, else +1, one element at a time."""
    return torch.tensor([-1 if value < 0 else 1 for value in x.flatten().tolist()]).view(x.shape)


# Signs


@every_dtype
def test_sign_is_minus_one_only_below_zero(dtype: torch.dtype):
    x = torch.tensor(EDGES).to(dtype)
    assert sign(x).dtype == dtype
    assert torch.equal(sign(x), literal_sign(x).to(dtype))


def test_zero_minus_zero_and_nan_count_as_plus_one_on_every_path():
    x = torch.tensor(EDGES)
    expected = torch.tensor(SIGNS_OF_EDGES)
    assert torch.equal(sign(x), expected.float())
    assert torch.equal(sign_int8(x), expected.to(torch.int8))
    assert torch.equal(clipped_sign(x), expected.float())
    assert torch.equal(identity_sign(x), expected.float())
    assert torch.equal(unpack_bits(pack_bits(x.unsqueeze(0)), len(x)), expected.to(torch.int8).unsqueeze(0))


def test_a_layer_takes_zero_minus_zero_and_nan_for_plus_one_as_input_and_as_weight():
    layer = BinaryLinear(len(EDGES), len(EDGES), bias=False).eval().requires_grad_(False)
    one_hot_sums = torch.eye(len(EDGES)).mul_(2).sub_(1)  # row i: +1 at i, -1 elsewhere
    layer.weight.copy_(one_hot_sums)
    sums = torch.tensor(SIGNS_OF_EDGES).float() @ one_hot_sums.t()
    assert torch.equal(layer(torch.tensor(EDGES)), sums)
    assert torch.equal(PackedLinear.from_latent(layer)(torch.tensor(EDGES)), sums)

    edges = torch.tensor(EDGES).nan_to_num(posinf=5.0, neginf=-5.0)  # a scale must stay finite
    layer.weight.copy_(edges.expand_as(layer.weight))
    ones = torch.ones(len(EDGES))
    expected = sum(SIGNS_OF_EDGES) * weight_scale(layer.weight)
    assert torch.equal(layer(ones), expected)
    assert torch.equal(PackedLinear.from_latent(layer)(ones), expected)


@pytest.mark.parametrize("threshold", [0.25, torch.tensor(-0.5)])
def test_sign_int8_compares_with_its_threshold(threshold):
    x = torch.tensor([-1.0, -0.5, -0.4, 0.0, 0.25, 0.3])
    assert sign_int8(x, threshold).dtype == torch.int8
    assert torch.equal(sign_int8(x, threshold), literal_sign(x - threshold).to(torch.int8))


def test_sign_leaves_its_input_alone_and_has_no_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    before = x.detach().clone()
    assert not sign(x).requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[:1].expand(5, -1)])
def test_sign_takes_tensors_of_any_strides(view):
    x = view(torch.randn(4, 6))
    assert torch.equal(sign(x), literal_sign(x).float())


# Straight-through gradients


def test_straight_through_has_the_value_of_hard_and_the_gradient_of_soft():
    x = torch.randn(1000, requires_grad=True)
    hard = torch.round(x.detach() * 3)
    y = straight_through(hard, torch.tanh(x))
    assert torch.equal(y, hard)
    G = torch.randn(1000)
    y.backward(G)
    torch.testing.assert_close(x.grad, G * (1 - torch.tanh(x.detach()) ** 2))


def test_the_usual_formula_for_straight_through_would_round():
    soft = torch.randn(1000) * 100
    hard = sign(torch.randn(1000)) / 3
    assert not torch.equal(soft + (hard - soft).detach(), hard)
    assert torch.equal(straight_through(hard, soft), hard)


def test_straight_through_names_both_shapes_when_they_differ():
    with pytest.raises(ValueError, match=r"hard has shape \(2,\) but soft has shape \(3,\)"):
        straight_through(torch.ones(2), torch.ones(3))


@every_dtype
@pytest.mark.parametrize("clip", [0.5, 1.0, 2.0])
def test_clipped_sign_passes_the_gradient_up_to_and_on_the_clip_bound(dtype: torch.dtype, clip: float):
    just_above = torch.nextafter(torch.tensor(clip), torch.tensor(9.0)).item() if dtype == torch.float32 else clip * 1.1
    x = torch.tensor([0.0, clip, -clip, just_above, -just_above, clip / 2, 9.0, float("nan")], dtype=dtype)
    x.requires_grad_()
    G = torch.arange(1, 9).to(dtype)
    clipped_sign(x, clip).backward(G)
    passes = torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]).to(dtype)
    assert torch.equal(x.grad, G * passes)
    assert torch.equal(clipped_gradient(G, x.detach(), clip), G * passes)


def test_clipped_sign_has_the_gradient_of_clamp():
    x = torch.randn(500, requires_grad=True)
    G = torch.randn(500)
    (found,) = torch.autograd.grad(clipped_sign(x, 0.7), x, G)
    (expected,) = torch.autograd.grad(x.clamp(-0.7, 0.7), x, G)
    assert torch.equal(found, expected)


def test_identity_sign_has_the_gradient_of_the_identity():
    x = (10 * torch.randn(50)).requires_grad_()
    G = torch.randn(50)
    identity_sign(x).backward(G)
    assert torch.equal(x.grad, G)


# Scales


def test_weight_scale_is_the_mean_magnitude_of_each_output_channel():
    weight = torch.randn(6, 4, 3, 3)
    expected = torch.stack([weight[i].abs().sum() / 36 for i in range(6)])
    torch.testing.assert_close(weight_scale(weight), expected)
    assert weight_scale(weight.bfloat16()).dtype == torch.float32
    assert not weight_scale(weight.requires_grad_()).requires_grad


# Bits


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_bits_round_trip(rows: int, size: int):
    x = torch.randn(rows, size)
    packed = pack_bits(x)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-size // 8))
    assert torch.equal(unpack_bits(packed, size), literal_sign(x).to(torch.int8))


@pytest.mark.parametrize("size", SIZES)
def test_packing_what_was_unpacked_gives_the_same_bytes(size: int):
    packed = pack_bits(torch.randn(3, size))
    assert torch.equal(pack_bits(unpack_bits(packed, size)), packed)


def test_a_set_bit_is_a_negative_sign_and_the_first_input_is_the_lowest_bit():
    x = torch.ones(3, 10)
    x[0, 0] = -1
    x[1, 7] = -1
    x[2, 9] = -1
    assert pack_bits(x).tolist() == [[1, 0], [128, 0], [0, 2]]


def test_padding_bits_are_zero():
    assert pack_bits(-torch.ones(1, 9)).tolist() == [[255, 1]]


def test_every_byte_unpacks_to_its_own_bits():
    packed = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    expected = [[-1 if byte >> i & 1 else 1 for i in range(8)] for byte in range(256)]
    assert unpack_bits(packed, 8).tolist() == expected


# Exact products


@pytest.mark.parametrize("size", [*SIZES, 300])
@pytest.mark.parametrize("rows", [(), (1,), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_the_integer_product_equals_the_float_product(rows: tuple[int, ...], size: int):
    left, right = sign_int8(torch.randn(*rows, size)), sign_int8(torch.randn(6, size))
    found = integer_product(left, right)
    assert found.dtype == torch.float32
    assert torch.equal(found, left.float() @ right.float().t())


@pytest.mark.parametrize("size", [2, 8, 9])
@pytest.mark.parametrize("view", [lambda s: s[:1].expand(5, -1), lambda s: s.t().contiguous().t(), lambda s: s[::2]])
def test_the_integer_product_takes_signs_of_any_strides(view, size: int):
    left, right = view(sign_int8(torch.randn(6, size))), view(sign_int8(torch.randn(6, size)))
    assert torch.equal(integer_product(left, right), left.float() @ right.float().t())


def test_the_integer_product_without_outputs_is_empty():
    assert integer_product(sign_int8(torch.randn(3, 8)), sign_int8(torch.randn(0, 8))).shape == (3, 0)


def test_the_integer_product_does_not_overflow_int8():
    ones = torch.ones(1, 5000, dtype=torch.int8)
    assert integer_product(ones, ones).item() == 5000
    assert integer_product(ones, -ones).item() == -5000


def test_sums_above_256_are_exact_under_autocast():
    left, right = torch.ones(3, 301), torch.ones(301, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact_matmul(left, right), torch.full((3, 2), 301.0))
        assert not torch.equal((left @ right).float(), torch.full((3, 2), 301.0))  # what it guards against
