"""Convolutions of 1-bit inputs and weights: `hf_bnn::conv2d`."""

import ctypes
from ctypes import addressof, c_float, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import integer_conv2d
from .library import CALL, THRESHOLD, call, declare, threads_for
from .operands import Threshold, check_sizes, floats, runs_compiled, runs_directly, split_threshold
from .ops import Pair, define_op
from .reference import rescaled, signs
from .weights import PAIR, PANEL, Conv2dWeight, conv2d_signs

MOST_GEOMETRIES = 1024  # kept, one per shape of the inputs
ZERO = c_float(0.0)


class Conv2dShape(ctypes.Structure):
    """`struct conv2d_shape` of csrc/hf_bnn.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, c_int64) for name in ("image_step", "channel_step", "row_step", "pixel_step", "outputs")),
        *((name, c_int64 * 2) for name in ("kernel", "stride", "padding", "dilation")),
        *((name, c_int64) for name in ("groups", "out_height", "out_width")),
    )


declare("hf_bnn_conv2d", *CALL, c_void_p, c_void_p, *THRESHOLD, *(c_void_p,) * 6)


def conv2d(
    x: Tensor,
    weight: Conv2dWeight,
    scale: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """Convolution of binary inputs, padded with zeros, with binary weights.

    `(N, in, H, W)` to `(N, out, H', W')`, channels last in memory. `scale`, `bias` and `shift` hold one number per
    output, `threshold` one number or one per channel. Levels that are not symmetric need `shift`: it is multiplied by
    the sum of the weights inside the image at each pixel, and the product is added.
    """
    if x.dim() != 4 or x.shape[1] != weight.in_channels:
        raise ValueError(f"inputs of shape {tuple(x.shape)}: expected (N, {weight.in_channels}, H, W)")
    level, levels = split_threshold(threshold)
    window = (stride, padding, dilation, weight.groups)
    given = (x, weight.data, weight.corners, scale, shift, bias, *window, level, levels)
    return Conv2dOperands(*given).compute() if runs_directly(x, weight.data, scale) else torch.ops.hf_bnn.conv2d(*given)


def conv2d_sizes(
    size: tuple[int, ...], corners: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair
) -> list[int]:
    """Height and width of the output, for inputs of `size` and a table of corners of the shape `corners`."""
    return [(size[2 + i] + 2 * padding[i] - dilation[i] * (corners[i] - 2) - 1) // stride[i] + 1 for i in range(2)]


class Geometry(NamedTuple):
    """The part of a call that follows from shapes alone. It is kept: making it takes longer than small products."""

    shape: Conv2dShape
    readable: bool  # whether a kernel takes the strides of the input; else it must be made contiguous
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # of the output: channels last
    work: int  # multiply-accumulates

    @classmethod
    def of(
        cls,
        size: tuple[int, ...],
        strides: tuple[int, ...],
        corners: tuple[int, ...],
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> "Geometry":
        """For inputs of `size` and `strides`, and a table of corners of the shape `corners`."""
        kernel, out = (corners[0] - 1, corners[1] - 1), corners[2]
        readable = strides[1] == 1 or strides[3] == 1
        if not readable:
            strides = (size[1] * size[2] * size[3], size[2] * size[3], size[3], 1)
        (height, width) = conv2d_sizes(size, corners, stride, padding, dilation)
        if kernel == (1, 1) and strides[1] == 1 and not any(padding):  # the other pixels need not be packed
            strides = (*strides[:2], strides[2] * stride[0], strides[3] * stride[1])
            size, stride = (*size[:2], height, width), (1, 1)
        shape = Conv2dShape(*size, *strides, out, kernel, stride, padding, dilation, groups, height, width)
        work = size[0] * out * height * width * kernel[0] * kernel[1] * (size[1] // groups)
        last = (height * width * out, 1, width * out, out)
        return cls(shape, readable, (size[0], out, height, width), last, work)


_GEOMETRIES: dict[tuple, Geometry] = {}


def _size(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


@cache
def nothing(size: int) -> Tensor:
    """A vector that changes no float to which it is added."""
    return floats(None, size)


@define_op("conv2d")
class Conv2dOperands(NamedTuple):
    """Operands of `hf_bnn::conv2d`. `weight` and `corners` are those of a Conv2dWeight."""

    x: Tensor
    weight: Tensor
    corners: Tensor
    scale: Tensor
    shift: Tensor | None
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    threshold: float = 0.0
    thresholds: Tensor | None = None

    def sizes(self) -> list[int]:
        """Height and width of the output."""
        return conv2d_sizes(self.x.shape, self.corners.shape, self.stride, self.padding, self.dilation)

    def check(self) -> None:
        x, padding = self.x, self.padding
        kh, kw, out = self.corners.shape[0] - 1, self.corners.shape[1] - 1, self.corners.shape[2]
        channels = x.shape[1] // self.groups
        panels = (self.groups * -(-(out // self.groups) // PANEL), kh * kw * (-(-channels // PAIR) * 2), PANEL)
        expected = (out, channels, kh, kw) if self.weight.dtype == torch.int8 else panels
        if tuple(self.weight.shape) != expected:
            raise ValueError(
                f"a weight laid out as {tuple(self.weight.shape)} for inputs {tuple(x.shape)}, {out} outputs, a {kh} x "
                f"{kw} kernel and groups={self.groups}: expected {expected}, as Conv2dWeight.from_bits makes it"
            )
        if min(self.sizes()) < 1:
            padded = f"{x.shape[2] + 2 * padding[0]} x {x.shape[3] + 2 * padding[1]}"
            raise ValueError(f"a {kh} x {kw} kernel does not fit into a padded input of {padded}")
        vectors = {"scale": self.scale, "shift": self.shift, "bias": self.bias}
        check_sizes(out, x.shape[1], thresholds=self.thresholds, **vectors)

    def geometry(self, images: Tensor) -> Geometry:
        """Checks the operands, once for each combination of shapes. `images`: `x` in float32."""
        settings = (*self.stride, *self.padding, *self.dilation, self.groups)
        vectors = (self.scale.shape, _size(self.shift), _size(self.bias), _size(self.thresholds))
        weight, corners = self.weight, self.corners.shape
        key = (images.shape, images.stride(), weight.shape, weight.dtype, corners, vectors, settings)
        found = _GEOMETRIES.get(key)
        if found is None:
            self.check()
            window = (tuple(self.stride), tuple(self.padding), tuple(self.dilation), self.groups)
            found = Geometry.of(images.shape, images.stride(), corners, *window)
            if len(_GEOMETRIES) >= MOST_GEOMETRIES:
                _GEOMETRIES.clear()
            _GEOMETRIES[key] = found
        return found

    def compute(self) -> Tensor:
        x, scale, shift, bias, thresholds = self.x, self.scale, self.shift, self.bias, self.thresholds
        images = x if x.dtype == torch.float32 else x.to(torch.float32)
        geometry, chosen = self.geometry(images), runs_compiled(x, self.weight, thresholds)
        if chosen is None or not geometry.work:
            return self.reference()
        out = geometry.shape.outputs
        scales, biases = floats(scale, out), nothing(out) if bias is None else floats(bias, out)
        shifts = None if shift is None else floats(shift, out)
        if not geometry.readable:
            images = images.contiguous()
        level = None if thresholds is None and self.threshold == 0 else Threshold(x, self.threshold, thresholds)
        weight, corners = self.weight.contiguous(), self.corners.contiguous()
        y = torch.empty_strided(geometry.sizes, geometry.strides, dtype=torch.float32)
        call(
            "hf_bnn_conv2d",
            chosen,
            *threads_for(geometry.work, chosen),
            addressof(geometry.shape),
            images.data_ptr(),
            *((addressof(ZERO), False) if level is None else (level.address, level.per_input)),
            *(weight.data_ptr(), corners.data_ptr(), scales.data_ptr(), None if shifts is None else shifts.data_ptr()),
            *(biases.data_ptr(), y.data_ptr()),
        )
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def reference(self) -> Tensor:
        x, stride, thresholds = self.x, self.stride, self.thresholds
        kernels = conv2d_signs(self.weight, self.corners, x.shape[1], self.groups)
        if kernels.shape[2:] == (1, 1) and not any(self.padding):  # no other pixel is used
            x, stride = x[:, :, :: stride[0], :: stride[1]], [1, 1]
        geometry = (stride, self.padding, self.dilation, self.groups)
        if thresholds is not None and thresholds.dim():
            thresholds = thresholds.view(-1, 1, 1)
        inputs = signs(x, self.threshold, thresholds)
        offset = None if self.bias is None else self.bias.view(-1, 1, 1)
        with torch.autocast(x.device.type, enabled=False):
            if self.groups == 1:
                sums = integer_conv2d(inputs, kernels, *geometry)
            else:
                sums = F.conv2d(inputs.float(), kernels.float(), None, *geometry)
            if self.shift is not None:
                seen = F.conv2d(torch.ones_like(inputs[:1], dtype=torch.float32), kernels.float(), None, *geometry)
                weighted = seen * self.shift.view(-1, 1, 1)
                offset = weighted if offset is None else weighted + offset
        y = rescaled(sums, self.scale.view(-1, 1, 1), offset).to(x.dtype)
        return y.contiguous(memory_format=torch.channels_last)

    def fake(self) -> Tensor:
        shape = (self.x.shape[0], self.scale.shape[0], *self.sizes())
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last)
