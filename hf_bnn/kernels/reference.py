"""Steps in torch of which the `reference` methods of the ops are made, the oracle for compiled kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import PAIR, WORD

# A mask below this excludes a token. transformers writes the smallest number of the dtype, other code -inf or -1e4.
MASKED = -1000.0


def below(x: Tensor, threshold: float, thresholds: Tensor | None) -> Tensor:
    """Mask of the values that count as -1. NaN does not, nor does -0.0 against a threshold of 0."""
    return x < (threshold if thresholds is None else thresholds)


def signs(x: Tensor, threshold: float, thresholds: Tensor | None) -> Tensor:
    """int8 signs of `x`."""
    return 1 - 2 * below(x, threshold, thresholds).to(torch.int8)


def rescaled(sums: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """`sums * scale + offset`, each operation rounded, in the order of hf_bnn.nn.rescaling.rescale."""
    y = sums * scale
    return y if offset is None else y.add_(offset)


def sign_words(negative: Tensor) -> Tensor:
    """Bits, 1 where true, in pairs of words (first, first ^ second): bool `(..., channels)` to int32 `(..., words)`."""
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
    """`x * alpha + beta` per channel, rounded as in torch's batch normalization in evaluation."""
    return F.batch_norm(x, torch.zeros_like(alpha), torch.ones_like(alpha), alpha, beta, False, 0.0, 0.0)
