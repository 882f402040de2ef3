"""The ops in torch alone: what the compiled kernels must equal, and what runs where there are none."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import integer_product
from .weights import conv2d_signs, linear_signs

# A mask's numbers below it shut a token out: transformers writes the smallest number of the dtype, others -inf or -1e4.
MASKED = -1000.0


def below(x: Tensor, threshold: float, thresholds: Tensor | None) -> Tensor:
    """Which values count as -1: NaN and, against a threshold of 0, -0.0 do not."""
    return x < (threshold if thresholds is None else thresholds)


def signs(x: Tensor, threshold: float, thresholds: Tensor | None) -> Tensor:
    """int8 signs of `x`."""
    return 1 - 2 * below(x, threshold, thresholds).to(torch.int8)


def rescaled(sums: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """sums * scale + offset, each operation rounded: the order of hf_bnn.layers.rescale."""
    y = sums * scale
    return y if offset is None else y.add_(offset)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    threshold: float = 0.0,
    thresholds: Tensor | None = None,
) -> Tensor:
    """See kernels.linear."""
    size, out = x.shape[-1], scale.shape[0]
    rows, matrix = x.reshape(x.shape[:-1].numel(), size), linear_signs(weight, out, size)
    if thresholds is not None and thresholds.dim() == 2:
        matrices = matrix.reshape(thresholds.shape[0], out // thresholds.shape[0], size)
        parts = zip(thresholds, matrices, strict=True)
        sums = torch.cat([integer_product(signs(rows, 0.0, part), matrix) for part, matrix in parts], 1)
    else:
        sums = integer_product(signs(rows, threshold, thresholds), matrix)
    return rescaled(sums, scale, offset).view(*x.shape[:-1], out).to(x.dtype)


def linear_weight_only(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """See kernels.linear_weight_only."""
    sums = F.linear(x, linear_signs(weight, scale.shape[0], x.shape[-1]).to(x.dtype))
    return rescaled(sums, scale, offset).to(x.dtype)


def conv2d(
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
    """See kernels.conv2d."""
    geometry = (stride, padding, dilation, groups)
    kernels = conv2d_signs(weight, corners, x.shape[1], groups).float()
    inputs = signs(
        x, threshold, thresholds if thresholds is None or thresholds.dim() == 0 else thresholds.view(-1, 1, 1)
    )
    offset = None if bias is None else bias.view(-1, 1, 1)
    with torch.autocast(x.device.type, enabled=False):
        sums = F.conv2d(inputs.float(), kernels, None, *geometry)
        if shift is not None:
            seen = F.conv2d(torch.ones_like(inputs[:1], dtype=torch.float32), kernels, None, *geometry)
            weighted = seen * shift.view(-1, 1, 1)
            offset = weighted if offset is None else weighted + offset
    y = rescaled(sums, scale.view(-1, 1, 1), offset).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last)


def ffn(
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
    """See kernels.ffn."""
    hidden = linear(x, first, first_scale, first_offset, threshold, thresholds)
    bits = (hidden >= low) & (hidden < high)
    return linear(bits.to(x.dtype).neg(), second, second_scale, second_offset)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softmax: bool = True,
) -> Tensor:
    """See kernels.attention."""
    query_level, key_level, value_level, level, score_scale, scale, shift = levels.unbind()
    queries, keys, values = (
        signs(x.float(), 0.0, threshold).float()
        for x, threshold in ((query, query_level), (key, key_level), (value, value_level))
    )
    with torch.autocast(query.device.type, enabled=False):
        scores = (queries @ keys.transpose(-1, -2) * score_scale).to(query.dtype) * scaling
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1) if softmax else scores
        low = below(weights.float(), 0.0, level)
        if mask is not None and not softmax:
            low = low | (mask < MASKED)
        sums = (1 - 2 * low.float()) @ values
    y = sums * scale + shift * values.sum(-2, keepdim=True)
    return y.to(query.dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
