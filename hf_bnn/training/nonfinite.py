"""Losses, gradients and weights that are not finite: findings, and what a dropped step must undo."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

POLICIES = ("stop", "skip")
MOST_IN_A_ROW = 10  # steps that may be dropped one after the other


class NonFiniteTrainingError(FloatingPointError):
    """The loss, a gradient or a weight became NaN or infinite. Nothing was stepped or saved after that."""


class Finding(NamedTuple):
    """A number that is not finite, and the layer or parameter in which it first appeared."""

    what: str
    where: str
    in_loss: bool = False  # else it may have come from another rank, with the gradients

    def __str__(self) -> str:
        return f"{self.what}; it began in {self.where}"


def nonfinite(tensor: Tensor | None) -> bool:
    """Whether a tensor has a NaN or an infinity."""
    return tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all())


def agreed(finding: Finding | None, world_size: int, device: torch.device) -> Finding | None:
    """The first rank's finding, with its number: of the ranks with a bad loss if there are any, else of all.

    Every rank calls this and gets the same answer.
    """
    if world_size == 1:
        return finding
    flag = torch.tensor(int(finding is not None), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    if not bool(flag):
        return None
    found: list[Finding | None] = [None] * world_size
    torch.distributed.all_gather_object(found, finding)
    ranked = [(not each.in_loss, rank, each) for rank, each in enumerate(found) if each is not None]
    _, rank, first = min(ranked)
    return first._replace(what=f"{first.what} on rank {rank}")


class RunningStatistics:
    """The buffers of all normalizations, as they were when this was made: a forward pass with a NaN spoils them."""

    def __init__(self, model: nn.Module):
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        self.saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, before in self.saved:
            buffer.copy_(before)
