"""Maximum pooling with a normalization: equal to torch's two operations, bit for bit."""

import random

import pytest
import torch
import torch.nn.functional as F
from test_kernels import every_backend, values
from test_kernels_conv2d_block import affine_of, scrambled
from torch import nn

from hf_bnn import kernels
from hf_bnn.kernels import library
from hf_bnn.kernels.pooling import MaxPoolOperands


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("seed", range(20))
@every_backend
def test_pooling_equals_torch(backend: str, seed: int):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels, kernel = draw.choice((1, 5, 16, 33, 64)), (draw.randint(1, 4), draw.randint(1, 3))
    stride, padding = (draw.randint(1, 3), draw.randint(1, 2)), tuple(draw.randint(0, k // 2) for k in kernel)
    x, norm = values(2, channels, draw.randint(4, 12), draw.randint(4, 12)), scrambled(nn.BatchNorm2d(channels))
    expected = norm(F.max_pool2d(x, kernel, stride, padding))
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        y = kernels.max_pool(images, *affine_of(norm), kernel, stride, padding)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().any()


@every_backend
def test_the_op_passes_opcheck_and_equals_its_reference(backend: str):
    given = (torch.randn(2, 20, 7, 6), torch.randn(20), torch.randn(20), [3, 3], [2, 2], [1, 1])
    torch.library.opcheck(torch.ops.hf_bnn.max_pool.default, given)
    assert torch.equal(torch.ops.hf_bnn.max_pool(*given), MaxPoolOperands(*given).reference())


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "WORTH_THREADS", 0)
    x, alpha, beta = torch.randn(2, 40, 31, 30), torch.randn(40), torch.randn(40)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        results.append(kernels.max_pool(x, alpha, beta, (3, 3), (2, 2), (1, 1)))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_wrong_sizes_are_refused():
    x, alpha = torch.randn(1, 5, 6, 6), torch.randn(5)
    with pytest.raises(ValueError, match=r"a vector of shape \(4,\): expected one number for each of 5"):
        kernels.max_pool(x, alpha, alpha[:4], (2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"a window of \(7, 2\) with padding \(0, 0\) on inputs of \(1, 5, 6, 6\)"):
        kernels.max_pool(x, alpha, alpha, (7, 2), (1, 1))
    with pytest.raises(ValueError, match="padding of at most half of it"):
        kernels.max_pool(x, alpha, alpha, (3, 3), (1, 1), (2, 2))
