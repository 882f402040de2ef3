"""Convolutions with what follows them: equal to the same operations of torch, one after the other, bit for bit."""

import random

import pytest
import torch
import torch.nn.functional as F
from test_kernels import conv2d_weight, every_backend, every_compiled_backend, values
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bnn import kernels
from hf_bnn.kernels import Epilogue, library, reference
from hf_bnn.kernels.conv2d_block import Conv2dBlockOperands
from hf_bnn.kernels.epilogue import rounds_once
from hf_bnn.kernels.operands import runs_directly
from hf_bnn.kernels.planned_block import Conv2dBlock, Level

every_seed = pytest.mark.parametrize("seed", range(30))


def scrambled(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """In evaluation, with other parameters and statistics."""
    for vector, low, high in ((norm.weight, -2, 2), (norm.bias, -1, 1), (norm.running_mean, -9, 9)):
        nn.init.uniform_(vector, low, high)
    nn.init.uniform_(norm.running_var, 1e-3, 400)
    return norm.eval()


def affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    return kernels.normalization(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@every_seed
@every_backend
def test_a_block_equals_its_operations_one_after_the_other(backend: str, seed: int):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels, out = draw.choice((1, 5, 63, 64, 65, 100)), draw.choice((1, 16, 31, 33, 64, 100, 130))
    kernel, stride, padding = draw.choice((1, 3)), draw.choice((1, 2)), draw.choice((0, 1))
    geometry = {"stride": (stride, stride), "padding": (padding, padding)}
    x, weight = values(2, channels, draw.randint(3, 9), draw.randint(3, 9)), torch.randn(out, channels, kernel, kernel)
    threshold = draw.choice((0.0, 0.3, torch.randn(channels, 1, 1)))
    scale, shift = torch.rand(out), draw.choice((None, torch.randn(out)))
    y = kernels.conv2d(x, conv2d_weight(weight), scale, None, shift, **geometry, threshold=threshold)
    epilogue, shortcut, expected = Epilogue(), None, y
    if draw.random() < 0.8:
        norm = scrambled(nn.BatchNorm2d(out))
        expected = norm(expected)
        epilogue = epilogue._replace(**dict(zip(("alpha", "beta"), affine_of(norm), strict=True)))
    group = draw.choice((None, 0, 1, 2, 4))  # None: no shortcut, 0: a normalized one
    if group is not None:
        shortcut = values(y.shape[0], out * max(group, 1), *y.shape[2:])
        if group == 0:
            norm = scrambled(nn.BatchNorm2d(out))
            expected = expected + norm(shortcut)
            epilogue = epilogue._replace(**dict(zip(("shortcut_alpha", "shortcut_beta"), affine_of(norm), strict=True)))
        elif group == 1:
            expected = expected + shortcut
        else:
            last = shortcut.contiguous(memory_format=torch.channels_last)
            expected = expected + last.unflatten(1, (out, group)).mean(2)
            epilogue = epilogue._replace(shortcut_group=group)
    if draw.random() < 0.5:
        before, slope, after = torch.randn(3, out)
        expected = F.prelu(expected - before.view(-1, 1, 1), slope) + after.view(-1, 1, 1)
        epilogue = epilogue._replace(rprelu=(before, slope, after))
    next_threshold = draw.choice((0.0, -0.4, torch.randn(out, 1, 1)))
    settings = {**geometry, "threshold": threshold, "epilogue": epilogue, "shortcut": shortcut}
    found, bits = kernels.conv2d_block(
        x, conv2d_weight(weight), scale, None, shift, **settings, next_threshold=next_threshold
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits, reference.sign_words((expected < next_threshold).permute(0, 2, 3, 1)))
    bits_alone = kernels.conv2d_block(
        x, conv2d_weight(weight), scale, None, shift, **settings, next_threshold=next_threshold, floats=False
    )
    assert bits_alone[0].numel() == 0
    assert torch.equal(bits_alone[1], bits)


@every_seed
@every_backend
def test_bits_serve_as_input_like_the_floats_that_they_are_the_signs_of(backend: str, seed: int):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels, out, kernel, stride = draw.choice((1, 40, 64, 130)), 20, draw.choice((1, 3)), draw.choice((1, 2))
    geometry = {"stride": (stride, stride), "padding": (kernel // 2, 0)}
    threshold = draw.choice((0.0, 0.2, torch.randn(channels, 1, 1)))
    x, weight = values(2, channels, 7, 6), conv2d_weight(torch.randn(out, channels, kernel, kernel))
    bits = reference.sign_words((x < threshold).permute(0, 2, 3, 1))
    scale = torch.rand(out)
    expected = kernels.conv2d_block(x, weight, scale, **geometry, threshold=threshold)
    found = kernels.conv2d_block(bits, weight, scale, **geometry)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_words_of_signs_come_back():
    signs = torch.where(torch.rand(3, 2, 100) < 0.5, -1.0, 1.0)
    words = reference.sign_words(signs < 0)
    assert words.shape == (3, 2, 4)
    assert torch.equal(reference.words_to_signs(words, 100), signs)
    assert not torch.equal(reference.words_to_signs(words + 1, 100), signs)


@pytest.mark.parametrize("channels", [1, 5, 64, 67])
def test_normalization_is_what_batch_norm_computes(channels: int):
    norm, x = scrambled(nn.BatchNorm2d(channels)), torch.randn(3, channels, 5, 6) * 20
    assert rounds_once() is not None
    assert torch.equal(reference.normalized(x, *affine_of(norm)), norm(x))
    plain = nn.BatchNorm2d(channels, affine=False).eval()
    affine = kernels.normalization(plain.running_mean, plain.running_var, None, None, plain.eps)
    assert torch.equal(reference.normalized(x, *affine), plain(x))


def test_where_batch_norm_rounds_matters():
    """The other way of rounding is seen: blocks that equal torch's operations are no accident."""
    norm, x = scrambled(nn.BatchNorm2d(64)), torch.randn(3, 64, 5, 6) * 20
    alpha, beta = (values.view(-1, 1, 1) for values in affine_of(norm))
    once = (x.double() * alpha.double() + beta.double()).float()
    assert not torch.equal(once, x * alpha + beta)


@every_compiled_backend
def test_a_block_writes_over_its_shortcut_if_asked(backend: str):
    x, weight, scale = torch.randn(1, 70, 6, 6), conv2d_weight(torch.randn(70, 70, 3, 3)), torch.rand(70)
    block = Conv2dBlock(weight, scale, padding=(1, 1))
    shortcut = torch.randn(1, 70, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = block(x, None, shortcut, Level.of(0.0))
    found = block(x, None, shortcut, Level.of(0.0), in_place=True)
    assert found[0] is shortcut
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(1, 70, 56, 56), (3, 70, 9, 7)])
@every_compiled_backend
def test_results_do_not_depend_on_the_number_of_threads(
    backend: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(library, "WORTH_THREADS", 0)
    weight, scale = conv2d_weight(torch.randn(70, 70, 3, 3)), torch.rand(70)
    x, shortcut, before, results = torch.randn(shape), torch.randn(shape), torch.get_num_threads(), []
    block = Conv2dBlock(weight, scale, padding=(1, 1))
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        y, bits = block(x, None, shortcut, Level.of(0.1))
        results.append((y, bits, *block(None, bits, y, Level.of(0.1))))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def arguments(packed: bool) -> tuple:
    weight, out = conv2d_weight(torch.randn(20, 40, 3, 3)), 20
    x = torch.randn(2, 40, 7, 6)
    x = reference.sign_words((x < 0).permute(0, 2, 3, 1)) if packed else x
    sums = (x, weight.data, weight.corners, 40, torch.rand(out), None, None, [2, 1], [1, 1], [1, 1], 0.0, None)
    epilogue = (torch.randn(out), torch.randn(out), None, None, 1, torch.randn(3, out), torch.randn(2, out, 4, 6))
    return *sums, *epilogue, 0.0, torch.randn(out), True, True


@pytest.mark.parametrize("packed", [False, True])
@every_backend
def test_the_op_passes_opcheck_and_equals_its_reference(backend: str, packed: bool):
    given = arguments(packed)
    torch.library.opcheck(torch.ops.hf_bnn.conv2d_block.default, given)
    found, expected = torch.ops.hf_bnn.conv2d_block(*given), Conv2dBlockOperands(*given).reference()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


class TwoBlocks(nn.Module):
    """Two convolutions, bits between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (conv2d_weight(torch.randn(24, 24, 3, 3)) for _ in range(2))
        self.scale, self.epilogue = torch.rand(24), Epilogue(torch.randn(24), torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        settings = {"padding": (1, 1), "epilogue": self.epilogue}
        y, bits = kernels.conv2d_block(x, self.first, self.scale, **settings, shortcut=x)
        return kernels.conv2d_block(bits, self.second, self.scale, **settings, shortcut=y, bits=False)[0]


def test_blocks_can_be_exported():
    net, x = TwoBlocks(), torch.randn(2, 24, 6, 5)
    program = torch.export.export(net, (x,))
    assert torch.equal(program.module()(x), net(x))


def test_blocks_can_be_compiled():
    net, x = TwoBlocks(), torch.randn(2, 24, 6, 5)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))


class Seen(TorchDispatchMode):
    """The names of the ops that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_calls_that_skip_the_dispatcher_do_so_only_where_nothing_looks_on():
    x, weight, ones = torch.randn(1, 5, 6, 6), conv2d_weight(torch.randn(4, 5, 3, 3)), torch.ones(5)
    expected = kernels.conv2d(x, weight, torch.ones(4))
    with Seen() as seen:
        found = kernels.conv2d(x, weight, torch.ones(4))
        kernels.max_pool(x, ones, ones, (2, 2), (2, 2))
    assert torch.equal(found, expected)
    assert {"hf_bnn::conv2d", "hf_bnn::max_pool"} <= set(seen.names)
    graph = make_fx(lambda images: kernels.conv2d(images, weight, torch.ones(4)))(x).graph
    assert torch.ops.hf_bnn.conv2d.default in [node.target for node in graph.nodes]
    assert runs_directly(x)
    answers = []
    torch.vmap(lambda images: answers.append(runs_directly(images)) or images)(x[None])
    assert answers == [False]
    assert not runs_directly(nn.Parameter(x)), "subclasses have a dispatch of their own"


def test_wrong_sizes_are_refused():
    x, weight, scale = torch.randn(1, 5, 6, 6), conv2d_weight(torch.randn(4, 5, 3, 3)), torch.rand(4)
    if weight.data.dtype != torch.int32:
        pytest.skip("no compiled kernels")
    block = Conv2dBlock(weight, scale)
    with pytest.raises(ValueError, match=r"inputs of shape \(1, 6, 6, 6\): expected 5 channels"):
        block(torch.randn(1, 6, 6, 6))
    with pytest.raises(ValueError, match=r"a shortcut of torch.float32 and shape \(1, 4, 6, 6\): expected"):
        block(x, None, torch.randn(1, 4, 6, 6))
    with pytest.raises(ValueError, match=r"bits of 4 words, torch.int32: expected 2, int32"):
        block(None, torch.zeros(1, 6, 6, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"inputs of torch.float64: a block takes float32"):
        block(x.double())
    with pytest.raises(ValueError, match="the kernel does not fit"):
        block(x[:, :, :2])
    with pytest.raises(ValueError, match=r"shape \(3,\): expected one number for each of 4"):
        Conv2dBlock(weight, scale, epilogue=Epilogue(torch.rand(3), torch.rand(4)))
    with pytest.raises(ValueError, match=r"shortcut_group=3: expected one of \(1, 2, 4\)"):
        Conv2dBlock(weight, scale, epilogue=Epilogue(shortcut_group=3))
    with pytest.raises(ValueError, match="groups=2: a block takes convolutions of one group"):
        kernels.conv2d_block(x, weight._replace(groups=2), scale)
