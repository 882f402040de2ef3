"""Training steps on bits: elementwise functions, weights to panels, products of the signs of two tensors."""

import pytest
import torch
from test_kernels import conv2d_weight, every_compiled_backend, linear_weight, values

from hf_bnn.functional import clipped_gradient, pack_bits, sign
from hf_bnn.kernels import training as on_bits

COUNTS = (1, 7, 31, 32, 33, 64, 1000, (1 << 16) + 5, (1 << 18) + 3)  # the last two take several parts, and threads
every_count = pytest.mark.parametrize("count", COUNTS)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@every_count
@every_compiled_backend
def test_bits_are_those_of_the_signs(backend: str, count: int):
    x = values(count)
    bits, expected = on_bits.sign_bits(x), pack_bits(x[None])[0]
    assert torch.equal(bits[: len(expected)], expected)
    assert not bits[len(expected) :].any()
    assert torch.equal(on_bits.signs(x), sign(x))
    assert torch.equal(on_bits.signs_of_bits(bits, x.shape, x.stride()), sign(x))


@pytest.mark.parametrize("clip", [0.5, 1.0, 1.3])
@every_count
@every_compiled_backend
def test_a_gradient_passes_where_the_size_is_at_most_the_bound(backend: str, count: int, clip: float):
    x, grad = values(count), values(count)
    bound = torch.tensor(clip)
    x[::3] = clip
    x[1::5] = -clip
    x[2::7] = torch.nextafter(bound, torch.tensor(2.0))
    x[3::7] = torch.nextafter(bound, torch.tensor(0.0))
    found = on_bits.keep_where(on_bits.inside_bits(x, clip), grad)
    torch.testing.assert_close(found, clipped_gradient(grad, x, clip), rtol=0, atol=0, equal_nan=True)


@every_count
@every_compiled_backend
def test_a_byte_tells_sign_bound_and_nearly_the_value(backend: str, count: int):
    x, grad = values(count), torch.randn(count)
    x[::3], x[1::5] = 1.0, -0.5
    codes = on_bits.to_bytes(x, 32)
    assert torch.equal(on_bits.signs_of_bytes(codes), sign(x))
    for most in (16, 32, 126):
        assert torch.equal(on_bits.keep_within(codes, grad, most), clipped_gradient(grad, x, most / 32))
    finite = x.abs() <= 126 / 32
    assert (on_bits.from_bytes(codes, 32)[finite] - x[finite]).abs().le(1 / 64 + 1e-6).all()


@every_compiled_backend
def test_results_have_the_strides_of_their_input(backend: str):
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    assert on_bits.signs(x).stride() == x.stride()
    assert torch.equal(on_bits.signs(x), sign(x))
    bits = on_bits.sign_bits(x)
    assert torch.equal(on_bits.signs_of_bits(bits, x.shape, x.stride()), sign(x))
    assert torch.equal(on_bits.keep_where(on_bits.inside_bits(x, 1.0), x), clipped_gradient(x, x, 1.0))
    gaps = torch.randn(4, 6)[:, ::2]
    assert on_bits.dense(x) is x
    assert on_bits.dense(gaps).is_contiguous()
    assert on_bits.with_strides(x, x.stride()) is x
    copy = on_bits.with_strides(x, x.contiguous().stride())
    assert copy.is_contiguous()
    assert torch.equal(copy, x)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 64), (33, 100), (700, 400)])
@every_compiled_backend
def test_linear_panels_are_those_of_the_checkpoints_bits(backend: str, shape: tuple[int, int]):
    weight = values(*shape)
    assert torch.equal(on_bits.linear_panels(weight), linear_weight(weight).data)


@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (16, 64, 1, 1), (33, 100, 2, 3), (80, 400, 3, 3)])
@every_compiled_backend
def test_convolution_panels_are_those_of_the_checkpoints_bits(backend: str, shape: tuple[int, ...]):
    weight = values(*shape)
    assert torch.equal(on_bits.conv2d_panels(weight), conv2d_weight(weight).data)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("size", [(50, 37, 21), (1, 1, 1), (70, 64, 16), (5, 300, 40)])
@every_compiled_backend
def test_products_of_two_tensors_are_exact(backend: str, batch: tuple[int, ...], size: tuple[int, int, int]):
    n, k, m = size
    left, right = values(*batch, n, k), values(*batch, m, k)
    assert torch.equal(on_bits.sign_products(left, right), sign(left) @ sign(right).mT)


def test_only_plain_float32_tensors_on_the_cpu_run_on_bits(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(4)
    assert on_bits.runs_on_bits(x)
    assert on_bits.runs_on_bits(torch.nn.Parameter(x))
    assert not on_bits.runs_on_bits(x.double())
    assert not on_bits.runs_on_bits(x.to("meta"))
    monkeypatch.setattr(on_bits, "instruction_set", lambda: None)
    assert not on_bits.runs_on_bits(x)
