"""The ops in torch alone: what the compiled kernels must equal, and what runs where there are none."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import integer_conv2d, integer_product
from .weights import PAIR, WORD, conv2d_signs, linear_signs

# A mask's numbers below it shut a token out: transformers writes the smallest number of the dtype, others -inf or -1e4.
MASKED = -1000.0


def below(x: Tensor, threshold: float, thresholds: Tensor | None) -> Tensor:
    """Which values count as -1: NaN and, against a threshold of 0, -0.0 do not."""
    return x < (threshold if thresholds is None else thresholds)


def signs(x: Tensor, threshold: float, thresholds: Tensor | None) -> Tensor:
    """int8 signs of `x`."""
    return 1 - 2 * below(x, threshold, thresholds).to(torch.int8)


def rescaled(sums: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """sums * scale + offset, each operation rounded: the order of hf_bnn.nn.layers.rescale."""
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
    kernels = conv2d_signs(weight, corners, x.shape[1], groups)
    if kernels.shape[2:] == (1, 1) and not any(padding):  # the other pixels are not seen
        x, stride = x[:, :, :: stride[0], :: stride[1]], [1, 1]
    geometry = (stride, padding, dilation, groups)
    inputs = signs(
        x, threshold, thresholds if thresholds is None or thresholds.dim() == 0 else thresholds.view(-1, 1, 1)
    )
    offset = None if bias is None else bias.view(-1, 1, 1)
    with torch.autocast(x.device.type, enabled=False):
        if groups == 1:
            sums = integer_conv2d(inputs, kernels, *geometry)
        else:
            sums = F.conv2d(inputs.float(), kernels.float(), None, *geometry)
        if shift is not None:
            seen = F.conv2d(torch.ones_like(inputs[:1], dtype=torch.float32), kernels.float(), None, *geometry)
            weighted = seen * shift.view(-1, 1, 1)
            offset = weighted if offset is None else weighted + offset
    y = rescaled(sums, scale.view(-1, 1, 1), offset).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last)


def sign_words(negative: Tensor) -> Tensor:
    """bool `(..., channels)` to int32 `(..., words)`: bits, 1 where true, in pairs of words (first, first ^ second)."""
    padded = F.pad(negative, (0, -negative.shape[-1] % PAIR)).unflatten(-1, (-1, 2, WORD)).to(torch.int64)
    words = (padded << torch.arange(WORD, device=negative.device)).sum(-1)
    first, second = (words - (words >> WORD - 1 << WORD)).to(torch.int32).unbind(-1)
    return torch.stack((first, first ^ second), -1).flatten(-2)


def words_to_signs(words: Tensor, channels: int) -> Tensor:
    """Inverse of `sign_words`, as float32 +-1 `(..., channels)`."""
    first, both = words.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((first, first ^ both), -1)
    bits = pairs.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32, device=words.device) & 1
    return 1 - 2 * bits.flatten(-3)[..., :channels].to(torch.float32)


def normalized(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """`x * alpha + beta` per channel, rounded as torch's batch normalization in evaluation is."""
    return F.batch_norm(x, torch.zeros_like(alpha), torch.ones_like(alpha), alpha, beta, False, 0.0, 0.0)


def conv2d_block(
    x: Tensor,
    weight: Tensor,
    corners: Tensor,
    channels: int,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    threshold: float,
    thresholds: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    shortcut_alpha: Tensor | None,
    shortcut_beta: Tensor | None,
    shortcut_group: int,
    rprelu: Tensor | None,
    shortcut: Tensor | None,
    next_threshold: float,
    next_thresholds: Tensor | None,
    floats: bool,
    bits: bool,
) -> tuple[Tensor, Tensor]:
    """See kernels.conv2d_block."""
    if x.dtype == torch.int32:
        x, threshold, thresholds = words_to_signs(x, channels).permute(0, 3, 1, 2), 0.0, None
    y = conv2d(x, weight, corners, scale, shift, bias, stride, padding, dilation, 1, threshold, thresholds)
    if alpha is not None:
        y = normalized(y, alpha, beta)
    if shortcut is not None:
        if shortcut_alpha is not None:
            shortcut = normalized(shortcut, shortcut_alpha, shortcut_beta)
        y = y + (shortcut if shortcut_group == 1 else shortcut.unflatten(1, (-1, shortcut_group)).mean(2))
    if rprelu is not None:
        before, slope, after = rprelu
        y = F.prelu(y - before.view(-1, 1, 1), slope) + after.view(-1, 1, 1)
    last = y.permute(0, 2, 3, 1)
    levels = None if next_thresholds is None else next_thresholds.flatten()
    words = sign_words(below(last, next_threshold, levels)) if bits else x.new_empty(0, dtype=torch.int32)
    images = y.contiguous(memory_format=torch.channels_last) if floats else x.new_empty(0, dtype=torch.float32)
    return images, words


def max_pool(
    x: Tensor, alpha: Tensor, beta: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """See kernels.max_pool."""
    y = normalized(F.max_pool2d(x, kernel, stride, padding), alpha, beta)
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
