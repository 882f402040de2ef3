"""Maximum pooling followed by a batch normalization: `hf_bnn::max_pool`."""

import ctypes
from ctypes import addressof, c_int, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .epilogue import rounds_once
from .library import call, declare, instruction_set, threads_for
from .operands import floats, runs_directly
from .ops import Pair, define_op
from .reference import normalized

FLOAT_WORK = 128  # time to read a float from memory, in multiply-accumulates of bits


class PoolShape(ctypes.Structure):
    """`struct pool_shape` of csrc/hf_bnn.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "height", "width", "channels")),
        *((name, c_int64 * 2) for name in ("kernel", "stride", "padding")),
        *((name, c_int64) for name in ("out_height", "out_width")),
    )


declare("hf_bnn_max_pool", c_int64, c_void_p, *(c_void_p,) * 4, c_int, c_void_p)


def max_pool(x: Tensor, alpha: Tensor, beta: Tensor, kernel: Pair, stride: Pair, padding: Pair = (0, 0)) -> Tensor:
    """`F.max_pool2d(x, kernel, stride, padding) * alpha + beta`, rounded as F.batch_norm does: see `normalization`.

    `(N, C, H, W)` to `(N, C, H', W')`, channels last in memory; `alpha` and `beta` hold one number per channel.
    """
    given = (x, alpha, beta, kernel, stride, padding)
    return MaxPoolOperands(*given).compute() if runs_directly(x, alpha, beta) else torch.ops.hf_bnn.max_pool(*given)


def _out_sizes(size: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair) -> list[int]:
    return [(size[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]


@cache
def _shape(size: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair) -> PoolShape:
    n, channels, height, width = size
    sizes = _out_sizes(size, kernel, stride, padding)
    if min(sizes) < 1 or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"a window of {kernel} with padding {padding} on inputs of {tuple(size)}: expected one that fits, and "
            "padding of at most half of it"
        )
    return PoolShape(n, height, width, channels, kernel, stride, padding, *sizes)


@define_op("max_pool")
class MaxPoolOperands(NamedTuple):
    """Operands of `hf_bnn::max_pool`."""

    x: Tensor
    alpha: Tensor
    beta: Tensor
    kernel: Pair
    stride: Pair
    padding: Pair

    def compute(self) -> Tensor:
        x, channels = self.x, self.x.shape[1]
        for values in (self.alpha, self.beta):
            if values.shape != (channels,):
                raise ValueError(f"a vector of shape {tuple(values.shape)}: expected one number for each of {channels}")
        shape = _shape(x.shape, tuple(self.kernel), tuple(self.stride), tuple(self.padding))
        chosen, fused = instruction_set(), rounds_once()
        if chosen is None or fused is None or x.dtype != torch.float32 or not x.numel():
            return self.reference()
        images = x.contiguous(memory_format=torch.channels_last)
        sizes = (x.shape[0], channels, shape.out_height, shape.out_width)
        y = torch.empty(sizes, dtype=torch.float32, memory_format=torch.channels_last)
        alpha, beta = floats(self.alpha, channels), floats(self.beta, channels)
        pool, _ = threads_for(x.numel() * FLOAT_WORK, chosen)
        pointers = (images.data_ptr(), alpha.data_ptr(), beta.data_ptr())
        call("hf_bnn_max_pool", chosen, pool, addressof(shape), *pointers, fused, y.data_ptr())
        return y

    def reference(self) -> Tensor:
        y = normalized(F.max_pool2d(self.x, self.kernel, self.stride, self.padding), self.alpha, self.beta)
        return y.contiguous(memory_format=torch.channels_last)

    def fake(self) -> Tensor:
        shape = (*self.x.shape[:2], *_out_sizes(self.x.shape, self.kernel, self.stride, self.padding))
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last)
