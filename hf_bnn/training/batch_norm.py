"""Batch normalization on several ranks: over the rows of all ranks, or with the first rank's statistics for all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' tensors, on every rank. Gradients are summed too: every rank's loss has all terms."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class _OverAllRanks:
    """A mixin for a batch normalization: in training, mean and variance are those of the rows of all ranks.

    Like torch's SyncBatchNorm, which needs a GPU. It takes two sums over the ranks in the forward pass and two in the
    backward pass. State dict keys and evaluation do not change.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not _several_ranks():
            return super().forward(x)
        self._check_input_dim(x)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        axes = [axis for axis in range(x.dim()) if axis != 1]
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        rows = values.new_tensor([values.numel() / values.shape[1]])
        sums = _SumOverRanks.apply(torch.cat([values.sum(axes), rows]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean.view(shape)
        variance = _SumOverRanks.apply((centred * centred).sum(axes)) / count
        self._note(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _note(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(running + share * (new.to(running.dtype) - running))


class BatchNorm1dOverRanks(_OverAllRanks, nn.BatchNorm1d):
    """nn.BatchNorm1d over the rows of all ranks."""


class BatchNorm2dOverRanks(_OverAllRanks, nn.BatchNorm2d):
    """nn.BatchNorm2d over the rows of all ranks."""


class BatchNorm3dOverRanks(_OverAllRanks, nn.BatchNorm3d):
    """nn.BatchNorm3d over the rows of all ranks."""


OVER_RANKS = {
    nn.BatchNorm1d: BatchNorm1dOverRanks,
    nn.BatchNorm2d: BatchNorm2dOverRanks,
    nn.BatchNorm3d: BatchNorm3dOverRanks,
}
PLAIN = {over: plain for plain, over in OVER_RANKS.items()}


def sync_batch_norm_(model: nn.Module) -> int:
    """Make every batch normalization use the rows of all ranks, in place. Returns their number.

    Only their classes change; parameters, buffers and keys stay. `plain_batch_norm_` undoes it.
    """
    return _change_class(model, OVER_RANKS)


def plain_batch_norm_(model: nn.Module) -> int:
    """Undo `sync_batch_norm_`, in place. Returns the number of layers that changed."""
    return _change_class(model, PLAIN)


def _change_class(model: nn.Module, classes: dict[type, type]) -> int:
    found = [module for module in model.modules() if type(module) in classes]
    for module in found:
        module.__class__ = classes[type(module)]
    return len(found)


@torch.no_grad()
def share_statistics_(model: nn.Module) -> None:
    """Copy the first rank's running statistics, which are the saved ones, to every rank, in place.

    Otherwise each rank would evaluate with its own. Their mean would be no solution: every evaluation would change it.
    """
    if not _several_ranks():
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            for buffer in module.buffers(recurse=False):
                dist.broadcast(buffer, src=0)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
