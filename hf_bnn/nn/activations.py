"""Float activation functions with learned parameters, between binary layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RPReLU(nn.Module):
    """PReLU(x - gamma) + zeta with a slope, a shift and an offset per channel (ReActNet, arXiv 2003.03488, eq. 5).

    `(N, C, H, W) -> (N, C, H, W)`. Starts as PReLU does, with a slope of 1/4.

    >>> RPReLU(16)(torch.ones(1, 16, 2, 2)).sum().item()
    64.0
    """

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.empty(channels, 1, 1))  # the paper's gamma
        self.slope = nn.Parameter(torch.empty(channels))  # beta
        self.offset = nn.Parameter(torch.empty(channels, 1, 1))  # zeta
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the initial values."""
        nn.init.zeros_(self.shift)
        nn.init.constant_(self.slope, 0.25)
        nn.init.zeros_(self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x - self.shift, self.slope) + self.offset

    def extra_repr(self) -> str:
        return f"channels={self.slope.numel()}"
