"""Convolutions of 1-bit inputs and weights: `hf_bnn::conv2d`."""

from ctypes import addressof, c_float
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .library import Conv2dShape, call, threads_for
from .operands import Threshold, check_sizes, define_op, floats, runs_compiled, runs_directly, split_threshold
from .weights import PAIR, PANEL, Conv2dWeight

MOST_GEOMETRIES = 1024  # of inputs' shapes that are kept
ZERO = c_float(0.0)


def conv2d(
    x: Tensor,
    weight: Conv2dWeight,
    scale: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """`(N, in, H, W)` to `(N, out, H', W')`, channels last in memory: binary inputs, padded with zeros, times binary
    weights.

    `scale`, `bias` and `shift` hold a number per output, `threshold` one number or one per channel. `shift` times the
    sum of the weights that a pixel sees is added: the part of levels that are not symmetric.
    """
    if x.dim() != 4 or x.shape[1] != weight.in_channels:
        raise ValueError(f"inputs of shape {tuple(x.shape)}: expected (N, {weight.in_channels}, H, W)")
    level, levels = split_threshold(threshold)
    run = _conv2d if runs_directly(x, weight.data, scale) else torch.ops.hf_bnn.conv2d
    return run(
        x, weight.data, weight.corners, scale, shift, bias, stride, padding, dilation, weight.groups, level, levels
    )


def conv2d_sizes(size: tuple, corners: tuple, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    return [(size[2 + i] + 2 * padding[i] - dilation[i] * (corners[i] - 2) - 1) // stride[i] + 1 for i in range(2)]


def _check_conv2d(
    x: Tensor,
    weight: Tensor,
    corners: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    padding: list[int],
    groups: int,
    thresholds: Tensor | None,
) -> None:
    kh, kw, out = corners.shape[0] - 1, corners.shape[1] - 1, corners.shape[2]
    channels = x.shape[1] // groups
    panels = (groups * -(-(out // groups) // PANEL), kh * kw * (-(-channels // PAIR) * 2), PANEL)
    expected = (out, channels, kh, kw) if weight.dtype == torch.int8 else panels
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"a weight laid out as {tuple(weight.shape)} for inputs {tuple(x.shape)}, {out} outputs, a {kh} x {kw} "
            f"kernel and groups={groups}: expected {expected}, as Conv2dWeight.from_bits makes it"
        )
    if min(sizes) < 1:
        padded = f"{x.shape[2] + 2 * padding[0]} x {x.shape[3] + 2 * padding[1]}"
        raise ValueError(f"a {kh} x {kw} kernel does not fit into a padded input of {padded}")
    check_sizes(out, x.shape[1], scale=scale, shift=shift, bias=bias, thresholds=thresholds)


class Geometry(NamedTuple):
    """What a call needs to know of shapes. Making it costs more than some products do."""

    shape: Conv2dShape
    readable: bool  # whether the input's strides are what a kernel takes; else it must be made contiguous
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # of the output: channels last
    work: int  # multiply-accumulates

    @classmethod
    def of(
        cls,
        size: tuple[int, ...],
        strides: tuple[int, ...],
        corners: tuple[int, ...],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
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
    """What adds nothing to any float."""
    return floats(None, size)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    corners: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    threshold: float = 0.0,
    thresholds: Tensor | None = None,
) -> Tensor:
    images = x if x.dtype == torch.float32 else x.to(torch.float32)
    settings = (*stride, *padding, *dilation, groups)
    vectors = (scale.shape, _size(shift), _size(bias), _size(thresholds))
    key = (images.shape, images.stride(), weight.shape, weight.dtype, corners.shape, vectors, settings)
    geometry = _GEOMETRIES.get(key)
    if geometry is None:
        sizes = conv2d_sizes(x.shape, corners.shape, stride, padding, dilation)
        _check_conv2d(x, weight, corners, scale, shift, bias, sizes, padding, groups, thresholds)
        window = (tuple(stride), tuple(padding), tuple(dilation), groups)
        geometry = Geometry.of(images.shape, images.stride(), corners.shape, *window)
        if len(_GEOMETRIES) >= MOST_GEOMETRIES:
            _GEOMETRIES.clear()
        _GEOMETRIES[key] = geometry
    chosen = runs_compiled(x, weight, thresholds)
    if chosen is None or not geometry.work:
        settings = (stride, padding, dilation, groups, threshold, thresholds)
        return reference.conv2d(x, weight, corners, scale, shift, bias, *settings)
    out = geometry.shape.outputs
    scales, biases = floats(scale, out), nothing(out) if bias is None else floats(bias, out)
    shifts = None if shift is None else floats(shift, out)
    if not geometry.readable:
        images = images.contiguous()
    level = None if thresholds is None and threshold == 0 else Threshold(x, threshold, thresholds)
    weight, corners = weight.contiguous(), corners.contiguous()
    y = torch.empty_strided(geometry.sizes, geometry.strides, dtype=torch.float32)
    call(
        "hf_bnn_conv2d",
        chosen,
        *threads_for(geometry.work),
        addressof(geometry.shape),
        images.data_ptr(),
        *((addressof(ZERO), False) if level is None else (level.address, level.per_input)),
        *(weight.data_ptr(), corners.data_ptr(), scales.data_ptr(), None if shifts is None else shifts.data_ptr()),
        *(biases.data_ptr(), y.data_ptr()),
    )
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _fake_conv2d(
    x: Tensor,
    weight: Tensor,
    corners: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *settings: object,
    **named: object,
) -> Tensor:
    shape = (x.shape[0], scale.shape[0], *conv2d_sizes(x.shape, corners.shape, stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


define_op(
    "conv2d(Tensor x, Tensor weight, Tensor corners, Tensor scale, Tensor? shift, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, float threshold=0.0, Tensor? thresholds=None) -> Tensor",
    _conv2d,
    reference.conv2d,
    _fake_conv2d,
)
