"""Convolutions of 1-bit inputs and weights: `hf_bnn::conv2d`."""

import torch
from torch import Tensor

from . import reference
from .library import Conv2dShape, call, threads_for
from .operands import Threshold, check_sizes, define_op, floats, runs_compiled, split_threshold
from .weights import PAIR, PANEL, Conv2dWeight


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
    return torch.ops.hf_bnn.conv2d(
        x, weight.data, weight.corners, scale, shift, bias, stride, padding, dilation, weight.groups, level, levels
    )


def _out_sizes(x: Tensor, corners: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    return [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (corners.shape[i] - 2) - 1) // stride[i] + 1 for i in range(2)
    ]


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
    sizes = _out_sizes(x, corners, stride, padding, dilation)
    _check_conv2d(x, weight, corners, scale, shift, bias, sizes, padding, groups, thresholds)
    chosen, out = runs_compiled(x, weight, thresholds), scale.shape[0]
    if chosen is None or not x.numel() or not out:
        settings = (stride, padding, dilation, groups, threshold, thresholds)
        return reference.conv2d(x, weight, corners, scale, shift, bias, *settings)
    level, scales, biases = Threshold(x, threshold, thresholds), floats(scale, out), floats(bias, out)
    shifts = None if shift is None else floats(shift, out)
    images = x if x.dtype == torch.float32 else x.to(torch.float32)
    kernel = (corners.shape[0] - 1, corners.shape[1] - 1)
    if kernel == (1, 1) and images.stride(1) == 1 and not any(padding):
        images, stride = images[:, :, :: stride[0], :: stride[1]], (1, 1)  # the others need not be packed
    if images.stride(1) != 1 and images.stride(3) != 1:
        images = images.contiguous()
    weight, corners = weight.contiguous(), corners.contiguous()
    shape = Conv2dShape(
        *images.shape, *images.stride(), out, kernel, (*stride,), (*padding,), (*dilation,), groups, *sizes
    )
    y = torch.empty((x.shape[0], out, *sizes), memory_format=torch.channels_last)
    call(
        "hf_bnn_conv2d",
        chosen,
        *threads_for(y.numel() * kernel[0] * kernel[1] * (x.shape[1] // groups)),
        shape,
        images.data_ptr(),
        *(level.address, level.per_input),
        *(weight.data_ptr(), corners.data_ptr(), scales.data_ptr(), None if shifts is None else shifts.data_ptr()),
        *(biases.data_ptr(), y.data_ptr()),
    )
    return y.to(x.dtype)


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
    shape = (x.shape[0], scale.shape[0], *_out_sizes(x, corners, stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


define_op(
    "conv2d(Tensor x, Tensor weight, Tensor corners, Tensor scale, Tensor? shift, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, float threshold=0.0, Tensor? thresholds=None) -> Tensor",
    _conv2d,
    reference.conv2d,
    _fake_conv2d,
)
