"""Compiled kernels: the same integers as products of floats, on every instruction set that this machine has."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_bnn import kernels
from hf_bnn.functional import integer_product, pack_bits
from hf_bnn.kernels import Conv2dWeight, LinearWeight, library, weights
from hf_bnn.kernels.ops import OPS
from hf_bnn.nn.layers import rescale
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from hf_bnn.nn.packed import PackedConv2d
from hf_bnn.nn.products import Conv2dProduct

every_seed = pytest.mark.parametrize("seed", range(40))
SIZES = (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 300)
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45)


every_backend = pytest.mark.parametrize("backend", kernels.available(), indirect=True)
every_compiled_backend = pytest.mark.parametrize("backend", kernels.available()[:-1], indirect=True)


def values(*shape: int) -> Tensor:
    """Random numbers among which are those whose sign is special."""
    x = torch.randn(shape)
    odd = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
    return torch.where(torch.rand(shape) < 0.2, odd, x)


def signs(x: Tensor, threshold: float | Tensor = 0.0) -> Tensor:
    return torch.where(x < threshold, -1.0, 1.0).double()


def linear_weight(w: Tensor) -> LinearWeight:
    return LinearWeight.from_bits(pack_bits(w), w.shape[1])


def conv2d_weight(w: Tensor, groups: int = 1) -> Conv2dWeight:
    return Conv2dWeight.from_bits(PackedConv2d.pack(w), w.shape[1] * groups, groups)


# Layouts


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("out", [0, 1, 16, 17, 40])
def test_panels_hold_the_checkpoints_signs(size: int, out: int):
    w = torch.randn(out, size)
    panels = weights.bits_to_panels(pack_bits(w), size)
    assert panels.shape == weights.linear_shape(out, size)
    assert torch.equal(weights.panels_to_signs(panels, out, size), signs(w).to(torch.int8))


def test_panels_are_prefixes_of_words_for_sixteen_outputs():
    w = torch.ones(17, 128)
    w[3, 0] = w[3, 33] = w[3, 64 + 34] = w[16, 31] = -1
    panels = weights.bits_to_panels(pack_bits(w), 128)
    expected = torch.zeros(2, 4, 16, dtype=torch.int32)
    expected[0, :, 3] = torch.tensor([1, 1 ^ 2, 1 ^ 2, 1 ^ 2 ^ 4])
    expected[1, :, 0] = -(2**31)
    assert torch.equal(panels, expected)


@every_compiled_backend
def test_prefixes_of_a_convolution_begin_anew_in_each_pair_of_words(backend: str):
    w = torch.ones(17, 128, 1, 1)
    w[3, 0] = w[3, 33] = w[3, 64 + 34] = w[16, 31] = -1
    expected = torch.zeros(2, 4, 16, dtype=torch.int32)
    expected[0, :, 3] = torch.tensor([1, 1 ^ 2, 0, 4])
    expected[1, :2, 0] = -(2**31)
    assert torch.equal(conv2d_weight(w).data, expected)


def test_bits_behind_the_last_input_do_not_count():
    bits = torch.full((3, 2), 255, dtype=torch.uint8)
    assert torch.equal(weights.bits_to_panels(bits, 11), weights.bits_to_panels(pack_bits(-torch.ones(3, 11)), 11))
    assert bits.eq(255).all()


@every_backend
def test_a_weight_is_laid_out_for_the_backend(backend: str):
    expected = torch.int8 if backend == "torch" else torch.int32
    assert linear_weight(torch.randn(3, 5)).data.dtype == expected
    assert conv2d_weight(torch.randn(16, 8, 2, 2), groups=2).data.dtype == expected
    assert conv2d_weight(torch.randn(3, 3, 2, 2)).data.dtype == expected


@every_backend
def test_depthwise_kernels_are_laid_out_for_torch_which_is_faster(backend: str):
    x, w = values(2, 20, 7, 6), torch.randn(20, 1, 3, 3)
    weight = conv2d_weight(w, groups=20)
    assert weight.data.dtype == torch.int8
    y = kernels.conv2d(x, weight, torch.ones(20), padding=(1, 1))
    assert torch.equal(y, F.conv2d(signs(x), signs(w), padding=1, groups=20).float())


# linear


@every_seed
@every_backend
def test_linear_is_exact_at_random_shapes(backend: str, seed: int):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, size, out = draw.choice(SIZES), draw.choice(SIZES), draw.choice(SIZES)
    x, w = values(rows, size), values(out, size)
    y = kernels.linear(x, linear_weight(w), torch.ones(out))
    assert y.dtype == torch.float32
    assert torch.equal(y, (signs(x) @ signs(w).T).float())


@every_compiled_backend
def test_one_flipped_sign_changes_one_column(backend: str):
    x, w = torch.randn(5, 70), torch.randn(20, 70)
    y = kernels.linear(x, linear_weight(w), torch.ones(20))
    w[7, 69].neg_()
    changed = kernels.linear(x, linear_weight(w), torch.ones(20)) != y
    assert changed[:, 7].all()
    assert changed.sum() == 5


@every_backend
@pytest.mark.parametrize("inputs", [4000, 70_000])
def test_long_sums_do_not_overflow(backend: str, inputs: int):
    x, w = -torch.ones(3, inputs), torch.ones(18, inputs)
    assert kernels.linear(x, linear_weight(w), torch.ones(18)).eq(-inputs).all()
    assert kernels.linear(-x, linear_weight(w), torch.ones(18)).eq(inputs).all()


@every_backend
@pytest.mark.parametrize("levels", [SignedLevels, UnsignedLevels, ElasticLevels, lambda: ElasticLevels(signed=False)])
@pytest.mark.parametrize("bias", [True, False])
def test_scale_and_offset_round_as_in_the_layers(backend: str, levels: Callable, bias: bool):
    levels = levels().requires_grad_(False)
    x, w, scale = values(9, 75), torch.randn(37, 75), torch.rand(37)
    bias = torch.randn(37) if bias else None
    factor, shift = levels.affine()
    total = signs(w).sum(1).float()
    expected = rescale((signs(x, levels.threshold()) @ signs(w).T).float(), scale, total, levels, bias)
    offset = bias
    if levels.shifted:
        offset = total * (scale * shift)
        offset = offset if bias is None else offset + bias
    y = kernels.linear(x, linear_weight(w), scale * factor, offset, levels.threshold())
    assert torch.equal(y, expected)


@every_backend
def test_inputs_may_lie_anywhere_in_memory(backend: str):
    w = torch.randn(21, 66)
    weight, ones = linear_weight(w), torch.ones(21)
    for x in (
        torch.randn(66, 7).T,
        torch.randn(7, 132)[:, ::2],
        torch.randn(7, 100)[:, 5:71],
        torch.randn(1, 66).expand(7, 66),
        torch.randn(7, 1).expand(7, 66),
        torch.randn(14, 66)[::2],
        torch.randn(3, 66, 2).transpose(1, 2),
        torch.randn(2, 0, 66),
        torch.randn(66),
    ):
        y = kernels.linear(x, weight, ones)
        assert y.shape == (*x.shape[:-1], 21)
        assert torch.equal(y, (signs(x) @ signs(w).T).float())
    expanded = weight._replace(data=weight.data.clone().transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(kernels.linear(x, expanded, torch.ones(42)[::2]), y)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 0.3, torch.tensor(0.3), torch.full((40,), 0.3)])
def test_other_dtypes_compare_as_torch_does(backend: str, dtype: torch.dtype, threshold: float | Tensor):
    x, w = torch.randn(200, 40).to(dtype), torch.randn(8, 40)
    x[0, 0], x[1] = -1e-300, 0.3
    weight, scale = linear_weight(w), torch.rand(8)
    y = kernels.linear(x, weight, scale, threshold=threshold)
    expected = (signs(x, threshold) @ signs(w).T).float() * scale
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))


@every_backend
def test_every_input_may_have_its_own_threshold(backend: str):
    x, w = values(30, 77), torch.randn(8, 77)
    threshold = values(77)
    y = kernels.linear(x, linear_weight(w), torch.ones(8), threshold=threshold)
    assert torch.equal(y, (signs(x, threshold) @ signs(w).T).float())


def test_every_backend_takes_the_weights_of_every_other():
    x, w, scale, offset = values(9, 75), torch.randn(37, 75), torch.rand(37), torch.randn(37)
    results = []
    for maker in kernels.available():
        with kernels.using(maker):
            weight = linear_weight(w)
        for runner in kernels.available():
            with kernels.using(runner):
                results.append(kernels.linear(x, weight, scale, offset))
    assert all(torch.equal(y, results[0]) for y in results)


# linear_weight_only


@every_backend
@pytest.mark.parametrize("seed", range(12))
def test_weight_only_sums_are_close_at_random_shapes(backend: str, seed: int):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, size, out = draw.choice((0, 1, 2, 4, 5, 9, 30)), draw.choice(SIZES), draw.choice(SIZES)
    x, w, scale, offset = torch.randn(rows, size), torch.randn(out, size), torch.rand(out), torch.randn(out)
    y = kernels.linear_weight_only(x, linear_weight(w), scale, offset)
    expected = x.double() @ signs(w).T * scale + offset
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5 * max(size, 1) ** 0.5)


@every_backend
def test_weight_only_sums_of_small_integers_are_exact(backend: str):
    x, w = torch.randint(-8, 9, (7, 133)).float(), torch.randn(50, 133)
    y = kernels.linear_weight_only(x, linear_weight(w), torch.ones(50))
    assert torch.equal(y, (x.double() @ signs(w).T).float())


@every_compiled_backend
def test_weight_only_sums_of_a_row_do_not_depend_on_other_rows(backend: str):
    x, weight, ones = torch.randn(7, 133), linear_weight(torch.randn(150, 133)), torch.ones(150)
    y = kernels.linear_weight_only(x, weight, ones)
    assert all(torch.equal(kernels.linear_weight_only(x[i], weight, ones), y[i]) for i in range(7))


@every_backend
def test_weight_only_sums_pass_infinity_and_nan_on(backend: str):
    x, w = torch.randn(3, 40), torch.randn(18, 40)
    x[0, 3], x[1, 39] = float("inf"), float("nan")
    y = kernels.linear_weight_only(x, linear_weight(w), torch.ones(18))
    assert torch.equal(y[0], signs(w)[:, 3].float() * float("inf"))
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


# conv2d


def random_convolution(seed: int):
    draw = random.Random(seed)
    groups = draw.choice([1, 1, 1, 2, 3])
    inputs, out = groups * draw.choice([1, 2, 5, 31, 32, 33, 64, 65]), groups * draw.choice([1, 2, 15, 16, 17, 33])
    kernel, stride = (tuple(draw.randint(1, top) for _ in range(2)) for top in (4, 3))
    padding, dilation = (tuple(draw.randint(low, top) for _ in range(2)) for low, top in ((0, 3), (1, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [n + draw.choice([0, 1, 2, 5, 9]) for n in least]
    torch.manual_seed(seed)
    x, w = values(draw.randint(1, 3), inputs, *size), values(out, inputs // groups, *kernel)
    layout = draw.choice(["rows", "channels last", "sliced", "transposed", "spaced"])
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = F.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "spaced":
        x = x.repeat_interleave(2, 1)[:, ::2]
    return x, w, {"stride": stride, "padding": padding, "dilation": dilation}, groups


@every_seed
@every_backend
def test_conv2d_is_exact_at_random_shapes(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "SMALLEST_GROUP", 0)  # the compiled kernels take all groups
    x, w, geometry, groups = random_convolution(seed)
    y = kernels.conv2d(x, conv2d_weight(w, groups), torch.ones(w.shape[0]), **geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, F.conv2d(signs(x), signs(w), None, groups=groups, **geometry).float())


@every_compiled_backend
def test_one_flipped_sign_of_a_kernel_changes_all_that_see_it(backend: str):
    x, w = torch.randn(2, 5, 7, 6), torch.randn(18, 5, 3, 3)
    y = kernels.conv2d(x, conv2d_weight(w), torch.ones(18), padding=(1, 1))
    flipped = torch.zeros_like(w)
    flipped[4, 2, 0, 1] = 1
    other = kernels.conv2d(x, conv2d_weight(torch.where(flipped > 0, -w, w)), torch.ones(18), padding=(1, 1))
    assert torch.equal(other != y, F.conv2d(torch.ones_like(x), flipped, padding=1) > 0)


@every_backend
@pytest.mark.parametrize("levels", [SignedLevels, UnsignedLevels, ElasticLevels, lambda: ElasticLevels(signed=False)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_rounds_as_in_the_layers(backend: str, levels: Callable, bias: bool):
    levels = levels().requires_grad_(False)
    x, w, scale = values(2, 20, 9, 8), torch.randn(19, 20, 3, 2), torch.rand(19)
    bias = torch.randn(19) if bias else None
    product = Conv2dProduct((2, 1), (1, 2), (1, 2))
    (factor, shift), column = levels.affine(), lambda v: None if v is None else v.view(-1, 1, 1)
    sums = product(signs(x, levels.threshold()).float(), signs(w).float())
    seen = product.weight_sum(signs(w).to(torch.int8), x) if levels.shifted else None
    expected = rescale(sums, column(scale), seen, levels, column(bias))
    y = kernels.conv2d(
        x,
        conv2d_weight(w),
        scale * factor,
        bias,
        scale * shift if levels.shifted else None,
        *product[:3],
        threshold=levels.threshold(),
    )
    assert torch.equal(y, expected)


@every_backend
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_channel_may_have_its_own_threshold(backend: str, groups: int, memory_format: torch.memory_format):
    x, w, threshold = values(2, 39, 6, 5), torch.randn(6, 39 // groups, 3, 3), torch.randn(39, 1, 1)
    weight = conv2d_weight(w, groups)
    y = kernels.conv2d(x.contiguous(memory_format=memory_format), weight, torch.ones(6), threshold=threshold)
    assert torch.equal(y, F.conv2d(signs(x, threshold), signs(w), groups=groups).float())


@every_backend
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_pointwise_convolution_may_skip_pixels(backend: str, groups: int, memory_format: torch.memory_format):
    x, w = values(2, 70, 8, 9).contiguous(memory_format=memory_format), torch.randn(18, 70 // groups, 1, 1)
    for stride, padding in (((2, 3), (0, 0)), ((2, 2), (1, 0)), ((1, 1), (0, 0))):
        y = kernels.conv2d(x, conv2d_weight(w, groups), torch.ones(18), stride=stride, padding=padding)
        assert torch.equal(y, F.conv2d(signs(x), signs(w), None, stride, padding, groups=groups).float())


@every_backend
def test_an_empty_batch_gives_an_empty_result(backend: str):
    y = kernels.conv2d(torch.randn(0, 5, 6, 6), conv2d_weight(torch.randn(4, 5, 3, 3)), torch.ones(4))
    assert y.shape == (0, 4, 4, 4)


def test_every_backend_takes_the_kernels_of_every_other():
    x, w, geometry, groups = random_convolution(4)
    results = []
    for maker in kernels.available():
        with kernels.using(maker):
            weight = conv2d_weight(w, groups)
        for runner in kernels.available():
            with kernels.using(runner):
                results.append(kernels.conv2d(x, weight, torch.ones(w.shape[0]), **geometry))
    assert all(torch.equal(y, results[0]) for y in results)


# ffn


@every_backend
@pytest.mark.parametrize("seed", range(12))
def test_a_fused_ffn_equals_its_two_layers(backend: str, seed: int):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, size, hidden, out = (draw.choice(SIZES) for _ in range(4))
    x, first, second = values(rows, size), linear_weight(torch.randn(hidden, size)), torch.randn(out, hidden)
    scale, offset, out_scale = torch.rand(hidden), torch.randn(hidden), torch.rand(out)
    low, high = sorted((draw.choice([-float("inf"), -9.0, -1.0]), draw.choice([-0.5, 0.0, 2.0])))
    second = linear_weight(second)
    y = kernels.ffn(x, first, scale, offset, (low, high), second, out_scale, None)
    h = kernels.linear(x, first, scale, offset)
    bits = torch.where((h >= low) & (h < high), -1.0, 1.0)
    assert torch.equal(y, kernels.linear(bits, second, out_scale))


@every_backend
def test_the_interval_of_an_ffn_holds_an_activation_and_a_threshold(backend: str):
    x, w, v = torch.randn(40, 64), torch.randn(256, 64), torch.randn(10, 256)
    first, second, scale, offset = linear_weight(w), linear_weight(v), torch.rand(256), torch.randn(256)
    hidden = kernels.linear(x, first, scale, offset)
    expected = (signs(F.gelu(hidden), 0.5) @ signs(v).T).float()
    low, high = 0.0, 1.0
    while F.gelu(torch.tensor(middle := (low + high) / 2)) != 0.5 and high - low > 1e-7:
        low, high = (low, middle) if F.gelu(torch.tensor(middle)) > 0.5 else (middle, high)
    ones = torch.ones(10)
    assert torch.equal(kernels.ffn(x, first, scale, offset, (-float("inf"), high), second, ones, None), expected)
    assert not torch.equal(kernels.ffn(x, first, scale, offset, (-float("inf"), 0.5), second, ones, None), expected)


# Threads


CALLS = {
    "linear of many rows": lambda: _linear_call(2100, 768),
    "linear of few rows": lambda: _linear_call(9, 8000),
    "weight only": lambda: _weight_only_call(),
    "conv2d": lambda: _conv2d_call(),
    "ffn": lambda: _ffn_call(),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def _linear_call(rows: int, out: int) -> Callable[[], Tensor]:
    x, weight = torch.randn(rows, 300), linear_weight(torch.randn(out, 300))
    return lambda: kernels.linear(x, weight, torch.ones(out))


def _weight_only_call() -> Callable[[], Tensor]:
    x, weight = torch.randn(5, 700), linear_weight(torch.randn(2000, 700))
    return lambda: kernels.linear_weight_only(x, weight, torch.ones(2000))


def _conv2d_call() -> Callable[[], Tensor]:
    x, weight = torch.randn(2, 70, 30, 20), conv2d_weight(torch.randn(200, 70, 3, 3))
    return lambda: kernels.conv2d(x, weight, torch.ones(200), padding=(1, 1))


def _ffn_call() -> Callable[[], Tensor]:
    x, first, second = torch.randn(300, 200), linear_weight(torch.randn(900, 200)), linear_weight(torch.randn(200, 900))
    return lambda: kernels.ffn(x, first, torch.ones(900), None, (-1e9, 0.0), second, torch.ones(200), None)


@every_call
@every_compiled_backend
def test_results_do_not_depend_on_the_number_of_threads(backend: str, call: Callable, wants_threads: None):
    run, results = call(), []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        assert (library.threads_for(1)[1] == threads) or library.thread_pool() is None
        results.append(run())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_call
def test_several_python_threads_may_call_at_once(call: Callable, wants_threads: None):
    torch.set_num_threads(2)
    run = call()
    expected, found = run(), []
    workers = [threading.Thread(target=lambda: found.extend(run() for _ in range(5))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 20
    assert all(torch.equal(y, expected) for y in found)


def test_little_work_stays_on_one_thread():
    assert library.threads_for(1000) == (None, 1)


# torch.library


def samples() -> dict[str, tuple]:
    x, images = torch.randn(2, 5, 70), torch.randn(2, 8, 7, 5)
    weight, second, kernel = (
        linear_weight(torch.randn(9, 70)),
        linear_weight(torch.randn(4, 9)),
        conv2d_weight(torch.randn(32, 4, 3, 2), groups=2),
    )
    scale, offset = torch.rand(9), torch.randn(9)
    geometry = ([2, 1], [1, 0], [1, 2], 2)
    hidden = (weight.data, scale, offset, -1.0, 0.5)
    return {
        "linear": (x, weight.data, scale, offset, 0.5, None),
        "linear with thresholds": (x, weight.data, scale, offset, 0.0, torch.randn(70)),
        "linear_weight_only": (x, weight.data, scale, None),
        "conv2d": (images, kernel.data, kernel.corners, torch.rand(32), torch.rand(32), None, *geometry, 0.0, None),
        "ffn": (x, *hidden, second.data, torch.rand(4), None),
    }


every_op = pytest.mark.parametrize("name", ["linear", "linear with thresholds", "linear_weight_only", "conv2d", "ffn"])


@every_op
@every_backend
def test_an_op_passes_opcheck_and_equals_its_reference(backend: str, name: str):
    function, arguments = name.partition(" ")[0], samples()[name]
    op = getattr(torch.ops.hf_bnn, function).default
    torch.library.opcheck(op, arguments)
    found, expected = op(*arguments), OPS[function](*arguments).reference()
    assert found.stride() == expected.stride()
    if name == "linear_weight_only":
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


@every_backend
@pytest.mark.parametrize("rows", [(), (0,), (1,), (3, 70)])
@pytest.mark.parametrize("threads", [1, 3])
def test_outputs_have_scales_and_offsets_of_their_own(
    backend: str, rows: tuple[int, ...], threads: int, wants_threads: None
):
    torch.set_num_threads(threads)
    x, w, scale, offset = torch.randn(*rows, 33), torch.randn(50, 33), torch.rand(50), torch.randn(50)
    sums = (signs(x) @ signs(w).T).float()
    assert torch.equal(kernels.linear(x, linear_weight(w), scale), sums * scale)
    assert torch.equal(kernels.linear(x, linear_weight(w), scale, offset), sums * scale + offset)


class Pipeline(torch.nn.Module):
    """Every op once."""

    def __init__(self):
        super().__init__()
        self.linear = linear_weight(torch.randn(12, 70))
        self.out = linear_weight(torch.randn(5, 12))
        self.kernel = conv2d_weight(torch.randn(7, 3, 2, 2))
        self.register_buffer("scale", torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        y = kernels.linear(x, self.linear, self.scale, threshold=0.1)
        y = torch.relu(kernels.linear_weight_only(y, self.out, self.scale[:5])).sum()
        z = kernels.ffn(x, self.linear, self.scale, None, (-2.0, 0.0), self.out, self.scale[:5], None)
        images = kernels.conv2d(x.reshape(-1, 3, 10, 7), self.kernel, self.scale[:7], padding=(1, 1))
        return z.sum() + y + images.mean()


def test_compiled_and_exported_models_run_the_ops():
    model, x = Pipeline(), torch.randn(9, 70)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(model, (x,))
    ops = {node.target for node in exported.graph.nodes if "hf_bnn" in str(node.target)}
    assert len(ops) == 4
    torch.testing.assert_close(exported.module()(x), expected)


# Errors


@every_backend
def test_wrong_shapes_are_named(backend: str):
    weight, scale = linear_weight(torch.randn(9, 70)), torch.ones(9)
    with pytest.raises(ValueError, match=r"inputs of shape \(2, 69\): expected 70 numbers in the last dimension"):
        kernels.linear(torch.randn(2, 69), weight, scale)
    with pytest.raises(ValueError, match=r"and 17 outputs: expected .* as LinearWeight.from_bits makes it"):
        kernels.linear(torch.randn(2, 70), weight, torch.ones(17))
    with pytest.raises(ValueError, match=r"offset has shape \(8,\): expected one number per output, \(9,\)"):
        kernels.linear(torch.randn(2, 70), weight, scale, torch.ones(8))
    with pytest.raises(ValueError, match=r"thresholds has shape \(5,\): expected one number, or one for each of 70"):
        kernels.linear(torch.randn(2, 70), weight, scale, threshold=torch.ones(5))
    with pytest.raises(ValueError, match="the second layer takes 70 inputs: expected 9"):
        kernels.ffn(torch.randn(2, 70), weight, scale, None, (-1.0, 0.0), weight, scale, None)
    other = linear_weight(torch.randn(4, 9))
    with pytest.raises(ValueError, match=r"low=1.0, high=0.0: expected an interval, low <= high"):
        kernels.ffn(torch.randn(2, 70), weight, scale, None, (1.0, 0.0), other, torch.ones(4), None)


@every_backend
def test_wrong_shapes_of_convolutions_are_named(backend: str):
    weight, x = conv2d_weight(torch.randn(4, 3, 3, 3)), torch.randn(1, 3, 2, 5)
    with pytest.raises(ValueError, match=r"inputs of shape \(1, 5, 9, 9\): expected \(N, 3, H, W\)"):
        kernels.conv2d(torch.randn(1, 5, 9, 9), weight, torch.ones(4))
    with pytest.raises(ValueError, match="a 3 x 3 kernel does not fit into a padded input of 2 x 5"):
        kernels.conv2d(x, weight, torch.ones(4))
    with pytest.raises(ValueError, match=r"scale has shape \(5,\): expected one number per output, \(4,\)"):
        kernels.conv2d(x, weight, torch.ones(5), padding=(1, 1))
    with pytest.raises(ValueError, match=r"expected .* as Conv2dWeight.from_bits makes it"):
        kernels.conv2d(x, weight._replace(data=weight.data[:, :-1]), torch.ones(4), padding=(1, 1))


def test_bits_of_another_layout_are_named():
    with pytest.raises(ValueError, match=r"torch.int8 and shape \(3, 2\): expected uint8 \(out, 2\) for in_features=9"):
        LinearWeight.from_bits(torch.zeros(3, 2, dtype=torch.int8), 9)
    with pytest.raises(ValueError, match=r"shape \(4, 2, 3, 3\): expected uint8 \(out, 1, kh, kw\) for in_channels=8"):
        Conv2dWeight.from_bits(torch.zeros(4, 2, 3, 3, dtype=torch.uint8), 8)
    with pytest.raises(ValueError, match="groups=3: expected a divisor of 8 inputs and 4 outputs"):
        Conv2dWeight.from_bits(torch.zeros(4, 1, 3, 3, dtype=torch.uint8), 8, groups=3)


# The choice of a backend


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(
            ValueError, match=r"backend='sse9': expected one of avx512, .*torch, or nothing for the best one"
        ),
        kernels.using("sse9"),
    ):
        pass


def test_a_backend_that_the_processor_lacks_is_refused():
    lacking = next(name for name in library.KNOWN if name not in kernels.available())
    with (
        pytest.raises(ValueError, match=f"backend='{lacking}' does not run here: .*; what runs is .*torch"),
        kernels.using(lacking),
    ):
        pass


@pytest.fixture
def undecided():
    """As in a new process: nothing is chosen yet."""
    library._default.cache_clear()
    yield
    library._default.cache_clear()


@pytest.mark.parametrize("name", kernels.available())
def test_the_environment_chooses_the_backend(name: str, monkeypatch: pytest.MonkeyPatch, undecided: None):
    monkeypatch.setenv("HF_BNN_KERNEL", name)
    assert kernels.backend() == name


def test_a_wrong_choice_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, undecided: None):
    monkeypatch.setenv("HF_BNN_KERNEL", "fast")
    with pytest.raises(ValueError, match="HF_BNN_KERNEL='fast': expected one of avx512"):
        kernels.backend()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, undecided: None, tmp_path: Path):
    """As in a source tree where nothing has been built."""
    folder, why = tmp_path / "source" / "hf_bnn" / "kernels", library.absence
    (folder / "csrc").mkdir(parents=True)
    library._instruction_sets.cache_clear()
    monkeypatch.setattr(library, "absence", lambda: why(folder))
    monkeypatch.setattr(library, "library", lambda: library.load(None))
    yield
    library._instruction_sets.cache_clear()


def test_without_the_library_torch_runs_and_says_so_once(
    no_library: None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    monkeypatch.delenv("HF_BNN_KERNEL", raising=False)
    assert kernels.backend() == "torch"
    assert kernels.backend() == "torch"
    (warning,) = recwarn
    assert "several times slower than compiled: hf_bnn has no compiled kernels" in str(warning.message)
    assert "have not been built in the source tree" in str(warning.message)
    assert "; or set HF_BNN_KERNEL=torch to silence this" in str(warning.message)
    x, w = torch.randn(3, 40), torch.randn(5, 40)
    assert torch.equal(kernels.linear(x, linear_weight(w), torch.ones(5)), (signs(x) @ signs(w).T).float())


def test_asking_for_torch_silences_the_warning(no_library: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_BNN_KERNEL", "torch")
    assert kernels.backend() == "torch"
    monkeypatch.setenv("HF_BNN_KERNEL", "portable")
    library._default.cache_clear()
    with pytest.raises(ValueError, match="'portable' does not run here: they have not been built in the"):
        kernels.backend()


def test_a_file_that_is_no_library_is_not_used(tmp_path: Path):
    (tmp_path / "_library.so").write_bytes(b"not a library")
    found = library.load(tmp_path / "_library.so")
    assert found.functions is None
    assert "_library.so cannot be loaded" in found.problem


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch):
    if library.library().functions is None:
        pytest.skip("no compiled kernels here")
    monkeypatch.setattr(library, "INTERFACE", -1)
    found = library.load(library.library().functions._name)
    assert found.functions is None
    assert "was built from another version of the sources" in found.problem


def test_a_buffer_that_cannot_be_allocated_is_an_error(monkeypatch: pytest.MonkeyPatch):
    class Failing:
        hf_bnn_linear = staticmethod(lambda *arguments: 1)

    monkeypatch.setattr(library, "library", lambda: library.Library(Failing()))
    with pytest.raises(MemoryError, match="hf_bnn_linear could not allocate its buffers: use a smaller batch"):
        library.call("hf_bnn_linear")


def test_linear_products_agree_with_the_layers():
    x, w = torch.randn(4, 6, 50), torch.randn(9, 50)
    expected = integer_product(signs(x).to(torch.int8), signs(w).to(torch.int8))
    assert torch.equal(kernels.linear(x, linear_weight(w), torch.ones(9)), expected)
