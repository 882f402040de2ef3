"""Maximum pooling with the batch normalization behind it: `hf_bnn::max_pool`."""

from ctypes import addressof
from functools import cache

import torch
from torch import Tensor

from . import reference
from .conv2d_block import rounds_once
from .library import PoolShape, call, instruction_set, threads_for
from .operands import define_op, floats, runs_directly

FLOAT_WORK = 128  # multiply-accumulates of bits that take as long as reading a float from memory


def max_pool(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """`F.max_pool2d(x, kernel, stride, padding) * alpha + beta`, as F.batch_norm rounds it: see `normalization`.

    `(N, C, H, W)` to `(N, C, H', W')`, channels last in memory; `alpha` and `beta` have a number per channel.
    """
    run = _max_pool if runs_directly(x, alpha, beta) else torch.ops.hf_bnn.max_pool
    return run(x, alpha, beta, kernel, stride, padding)


def _out_sizes(size: tuple, kernel: list[int], stride: list[int], padding: list[int]) -> list[int]:
    return [(size[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]


@cache
def _shape(size: tuple, kernel: tuple, stride: tuple, padding: tuple) -> PoolShape:
    n, channels, height, width = size
    sizes = _out_sizes(size, kernel, stride, padding)
    if min(sizes) < 1 or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"a window of {kernel} with padding {padding} on inputs of {tuple(size)}: expected one that fits, and "
            "padding of at most half of it"
        )
    return PoolShape(n, height, width, channels, kernel, stride, padding, *sizes)


def _max_pool(
    x: Tensor, alpha: Tensor, beta: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    for values in (alpha, beta):
        if values.shape != x.shape[1:2]:
            raise ValueError(f"a vector of shape {tuple(values.shape)}: expected one number for each of {x.shape[1]}")
    shape, chosen, fused = (
        _shape(x.shape, tuple(kernel), tuple(stride), tuple(padding)),
        instruction_set(),
        rounds_once(),
    )
    if chosen is None or fused is None or x.dtype != torch.float32 or not x.numel():
        return reference.max_pool(x, alpha, beta, kernel, stride, padding)
    images = x.contiguous(memory_format=torch.channels_last)
    channels = x.shape[1]
    sizes = (x.shape[0], channels, shape.out_height, shape.out_width)
    y = torch.empty(sizes, dtype=torch.float32, memory_format=torch.channels_last)
    alpha, beta = floats(alpha, channels), floats(beta, channels)
    pool, _ = threads_for(x.numel() * FLOAT_WORK)
    pointers = (images.data_ptr(), alpha.data_ptr(), beta.data_ptr())
    call("hf_bnn_max_pool", chosen, pool, addressof(shape), *pointers, fused, y.data_ptr())
    return y


def _fake_max_pool(
    x: Tensor, alpha: Tensor, beta: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    shape = (*x.shape[:2], *_out_sizes(x.shape, kernel, stride, padding))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


define_op(
    "max_pool(Tensor x, Tensor alpha, Tensor beta, int[2] kernel, int[2] stride, int[2] padding) -> Tensor",
    _max_pool,
    reference.max_pool,
    _fake_max_pool,
)
