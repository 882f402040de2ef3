"""The ops of torch.library that run binary products, for inference: no gradient passes through them.

Inputs are compared with a threshold, `x < threshold` = -1, else +1. Outputs are `sum * scale + offset` in float32, in
the order of operations of hf_bnn.layers.rescale, then in the dtype of `x`. Compiled kernels and `reference` are equal
bit for bit, except for the order of summation of `linear_weight_only`.
"""

from collections.abc import Callable
from ctypes import addressof, c_float

import torch
from torch import Tensor

from . import reference
from .library import Conv2dShape, backend, call, instruction_set, threads_for
from .weights import PAIR, PANEL, Conv2dWeight, LinearWeight, linear_shape

# Compared in float32, these are compared exactly.
COMPARABLE = (torch.float32, torch.bfloat16, torch.float16)
# Without a look-up of 16 floats, an unpacked weight and torch's product of floats are faster from here on.
MANY_ROWS = 8
LOOKS_UP = ("avx512", "avx512bw")

_LIBRARY = torch.library.Library("hf_bnn", "DEF")


def _op(schema: str, kernel: Callable, oracle: Callable, fake: Callable) -> None:
    """Define an op: `kernel` on CPUs, `oracle` on GPUs, `fake` where only shapes are wanted."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, oracle, "CUDA")
    torch.library.register_fake(f"hf_bnn::{name}", fake, lib=_LIBRARY)


def _runs_compiled(x: Tensor, weight: Tensor, thresholds: Tensor | None = None) -> int | None:
    """The instruction set if these tensors go to a compiled kernel."""
    if weight.dtype != torch.int32 or x.dtype not in COMPARABLE:
        return None
    if thresholds is not None and thresholds.dtype not in COMPARABLE:
        return None
    return instruction_set()


def _floats(values: Tensor | None, size: int) -> Tensor:
    """Contiguous float32; for None what adds nothing to any float, not even to -0.0."""
    if values is None:
        return torch.full((size,), -0.0)
    if values.dtype == torch.float32 and values.is_contiguous():  # each call that is not made saves half a microsecond
        return values
    return values.to(torch.float32).contiguous()


class _Threshold:
    """What float32 inputs are compared with, in memory: `address` is valid for as long as this object lives."""

    def __init__(self, x: Tensor, threshold: float, thresholds: Tensor | None):
        self.per_input = False
        if thresholds is None and x.dtype == torch.float32:
            self.values = c_float(threshold)
            self.address = addressof(self.values)
            return
        # As torch's promotion of types has it: a number, or a 0-d tensor, takes the dtype of x.
        if thresholds is None:
            thresholds = torch.tensor(threshold, dtype=x.dtype)
        elif thresholds.dim() == 0:
            thresholds = thresholds.to(x.dtype)
        self.values = thresholds.to(torch.float32).contiguous()
        self.per_input = self.values.numel() > 1
        self.address = self.values.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """float32 `(rows, in)`, the numbers of a row one after the other."""
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if rows.dtype != torch.float32:
        rows = rows.to(torch.float32)
    return rows if rows.stride(1) == 1 or rows.shape[1] < 2 else rows.contiguous()


def _check_linear(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, thresholds: Tensor | None) -> None:
    size, out = x.shape[-1], scale.shape[0]
    expected = (out, size) if weight.dtype == torch.int8 else linear_shape(out, size)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"a weight laid out as {tuple(weight.shape)} for inputs {tuple(x.shape)} and {out} outputs: "
            f"expected {expected}, as LinearWeight.from_bits makes it"
        )
    _check_sizes(out, size, offset=offset, thresholds=thresholds)


def _check_sizes(out: int, inputs: int, thresholds: Tensor | None, **per_output: Tensor | None) -> None:
    for name, values in per_output.items():
        if values is not None and values.shape != (out,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}: expected one number per output, ({out},)")
    if thresholds is not None and thresholds.numel() not in (1, inputs):
        raise ValueError(
            f"thresholds has shape {tuple(thresholds.shape)}: expected one number, or one for each of {inputs} inputs"
        )


# linear


def linear(
    x: Tensor, weight: LinearWeight, scale: Tensor, offset: Tensor | None = None, threshold: float | Tensor = 0.0
) -> Tensor:
    """`(..., in)` to `(..., out)`: binary inputs times binary weights.

    `scale` and `offset` hold a number per output, `threshold` one number or one per input.
    """
    _check_features(x, weight)
    level, levels = _split(threshold)
    return torch.ops.hf_bnn.linear(x, weight.data, scale, offset, level, levels)


def _check_features(x: Tensor, weight: LinearWeight) -> None:
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"inputs of shape {tuple(x.shape)}: expected {weight.in_features} numbers in the last dimension"
        )


def _split(threshold: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, threshold) if isinstance(threshold, Tensor) else (threshold, None)


def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    threshold: float = 0.0,
    thresholds: Tensor | None = None,
) -> Tensor:
    _check_linear(x, weight, scale, offset, thresholds)
    chosen = _runs_compiled(x, weight, thresholds)
    if chosen is None:
        return reference.linear(x, weight, scale, offset, threshold, thresholds)
    rows, out = _rows(x), scale.shape[0]
    count, size = rows.shape
    level, scales, offsets = _Threshold(x, threshold, thresholds), _floats(scale, out), _floats(offset, out)
    weight = weight.contiguous()
    y = torch.empty((*x.shape[:-1], out))
    call(
        "hf_bnn_linear",
        chosen,
        *threads_for(count * size * out),
        *(rows.data_ptr(), rows.stride(0), count, size),
        *(level.address, level.per_input),
        *(weight.data_ptr(), out, scales.data_ptr(), offsets.data_ptr()),
        y.data_ptr(),
    )
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _fake_linear(x: Tensor, weight: Tensor, scale: Tensor, *settings: object, **named: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


_op(
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None, float threshold=0.0, "
    "Tensor? thresholds=None) -> Tensor",
    _linear,
    reference.linear,
    _fake_linear,
)


# linear_weight_only


def linear_weight_only(x: Tensor, weight: LinearWeight, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """`(..., in)` to `(..., out)`: float inputs times binary weights.

    Sums in float32 in an order of its own: close to F.linear's, not equal.
    """
    _check_features(x, weight)
    return torch.ops.hf_bnn.linear_weight_only(x, weight.data, scale, offset)


def _linear_weight_only(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    _check_linear(x, weight, scale, offset, None)
    chosen = _runs_compiled(x, weight)
    if chosen is None or (x.shape[:-1].numel() > MANY_ROWS and backend() not in LOOKS_UP):
        return reference.linear_weight_only(x, weight, scale, offset)
    rows, out = _rows(x), scale.shape[0]
    count, size = rows.shape
    scales, offsets = _floats(scale, out), _floats(offset, out)
    weight = weight.contiguous()
    y = torch.empty((*x.shape[:-1], out))
    call(
        "hf_bnn_linear_weight_only",
        chosen,
        *threads_for(16 * count * size * out),  # a sixteenth of the speed of binary inputs
        *(rows.data_ptr(), rows.stride(0), count, size),
        *(weight.data_ptr(), out, scales.data_ptr(), offsets.data_ptr()),
        y.data_ptr(),
    )
    return y if x.dtype == torch.float32 else y.to(x.dtype)


_op(
    "linear_weight_only(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None) -> Tensor",
    _linear_weight_only,
    reference.linear_weight_only,
    _fake_linear,
)


# conv2d


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
    level, levels = _split(threshold)
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
    _check_sizes(out, x.shape[1], scale=scale, shift=shift, bias=bias, thresholds=thresholds)


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
    chosen, out = _runs_compiled(x, weight, thresholds), scale.shape[0]
    if chosen is None or not x.numel() or not out:
        settings = (stride, padding, dilation, groups, threshold, thresholds)
        return reference.conv2d(x, weight, corners, scale, shift, bias, *settings)
    level, scales, biases = _Threshold(x, threshold, thresholds), _floats(scale, out), _floats(bias, out)
    shifts = None if shift is None else _floats(shift, out)
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


_op(
    "conv2d(Tensor x, Tensor weight, Tensor corners, Tensor scale, Tensor? shift, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, float threshold=0.0, Tensor? thresholds=None) -> Tensor",
    _conv2d,
    reference.conv2d,
    _fake_conv2d,
)


# ffn


def ffn(
    x: Tensor,
    first: LinearWeight,
    first_scale: Tensor,
    first_offset: Tensor | None,
    interval: tuple[float, float],
    second: LinearWeight,
    second_scale: Tensor,
    second_offset: Tensor | None,
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """`(..., in)` to `(..., out)` through a binary layer, an activation and a second binary layer.

    A hidden value h counts as -1 where `interval[0] <= h < interval[1]`, which holds activation and threshold in one.
    """
    _check_features(x, first)
    if second.in_features != first.out_features:
        raise ValueError(f"the second layer takes {second.in_features} inputs: expected {first.out_features}")
    level, levels = _split(threshold)
    hidden = (first.data, first_scale, first_offset, *interval)
    return torch.ops.hf_bnn.ffn(x, *hidden, second.data, second_scale, second_offset, level, levels)


def _ffn(
    x: Tensor,
    first: Tensor,
    first_scale: Tensor,
    first_offset: Tensor | None,
    low: float,
    high: float,
    second: Tensor,
    second_scale: Tensor,
    second_offset: Tensor | None,
    threshold: float = 0.0,
    thresholds: Tensor | None = None,
) -> Tensor:
    hidden, out = first_scale.shape[0], second_scale.shape[0]
    _check_linear(x, first, first_scale, first_offset, thresholds)
    _check_linear(x.new_empty((0, hidden)), second, second_scale, second_offset, None)
    if not low <= high:
        raise ValueError(f"low={low}, high={high}: expected an interval, low <= high")
    chosen = _runs_compiled(x, first, thresholds)
    if chosen is None or second.dtype != torch.int32 or x.dtype != torch.float32:  # others round hidden values
        layers = (first, first_scale, first_offset, low, high, second, second_scale, second_offset)
        return reference.ffn(x, *layers, threshold, thresholds)
    rows = _rows(x)
    count, size = rows.shape
    level = _Threshold(x, threshold, thresholds)
    scales, offsets = _floats(first_scale, hidden), _floats(first_offset, hidden)
    out_scales, out_offsets = _floats(second_scale, out), _floats(second_offset, out)
    first, second = first.contiguous(), second.contiguous()
    y = torch.empty((*x.shape[:-1], out))
    call(
        "hf_bnn_ffn",
        chosen,
        *threads_for(count * hidden * (size + out)),
        *(rows.data_ptr(), rows.stride(0), count, size),
        *(level.address, level.per_input),
        *(first.data_ptr(), hidden, scales.data_ptr(), offsets.data_ptr()),
        *(low, high),
        *(second.data_ptr(), out, out_scales.data_ptr(), out_offsets.data_ptr()),
        y.data_ptr(),
    )
    return y


def _fake_ffn(
    x: Tensor,
    first: Tensor,
    first_scale: Tensor,
    first_offset: Tensor | None,
    low: float,
    high: float,
    second: Tensor,
    second_scale: Tensor,
    *settings: object,
    **named: object,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], second_scale.shape[0]))


_op(
    "ffn(Tensor x, Tensor first, Tensor first_scale, Tensor? first_offset, float low, float high, Tensor second, "
    "Tensor second_scale, Tensor? second_offset, float threshold=0.0, Tensor? thresholds=None) -> Tensor",
    _ffn,
    reference.ffn,
    _fake_ffn,
)
