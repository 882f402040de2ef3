"""The operations after a binary convolution in a residual block: normalization, shortcut and activation."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import normalized

GROUPS = (1, 2, 4)  # channels of a shortcut per output


class Epilogue(NamedTuple):
    """The operations after a convolution, in this order. None leaves one out. Every tensor has a number per output.

    - `y * alpha + beta`: batch normalization in evaluation, see `normalization`.
    - `+ shortcut`: normalized by `shortcut_alpha` and `shortcut_beta`, or the mean of each `shortcut_group` (1, 2 or
      4) neighbouring channels.
    - RPReLU: `prelu(y - shift, slope) + offset` with `rprelu = (shift, slope, offset)`.
    """

    alpha: Tensor | None = None
    beta: Tensor | None = None
    shortcut_alpha: Tensor | None = None
    shortcut_beta: Tensor | None = None
    shortcut_group: int = 1
    rprelu: tuple[Tensor, Tensor, Tensor] | None = None


def normalization(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The alpha and beta of `x * alpha + beta`, which F.batch_norm computes in evaluation.

    F.batch_norm itself computes them here, so that they are rounded as in its own product.
    """
    zero = torch.zeros_like(mean)
    alpha = F.batch_norm(torch.ones_like(mean)[None], zero, variance, weight, None, False, 0.0, eps)
    beta = F.batch_norm(zero[None], mean, variance, weight, bias, False, 0.0, eps)
    return alpha[0], beta[0]


@cache
def rounds_once() -> bool | None:
    """How F.batch_norm rounds `x * alpha + beta` here: once (True, FMA), twice (False), or neither always (None)."""
    with torch.inference_mode():
        x = torch.linspace(-3, 5, 2 * 67 * 35, device="cpu", dtype=torch.float32).view(2, 67, 5, 7)
        alpha, beta = (torch.linspace(*ends, 67, device="cpu", dtype=torch.float32) for ends in ((0.3, 2.7), (-1, 1.3)))
        twice = x * alpha.view(-1, 1, 1) + beta.view(-1, 1, 1)
        once = (x.double() * alpha.double().view(-1, 1, 1) + beta.double().view(-1, 1, 1)).float()
        for answer, expected in ((True, once), (False, twice)):
            layouts = (x, x.contiguous(memory_format=torch.channels_last))
            if all(torch.equal(normalized(images, alpha, beta), expected) for images in layouts):
                return answer
    return None
