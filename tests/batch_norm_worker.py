"""Batch normalization in two processes (trainer_worker.py), and in one that has all of their rows."""

from pathlib import Path

import torch
from torch import nn

from hf_bnn.training.batch_norm import plain_batch_norm_, share_statistics_, sync_batch_norm_

ROWS = (5, 3)  # of each rank


def normalization(momentum: float | None) -> nn.BatchNorm2d:
    """The same on every rank, with weights and statistics that are no identity."""
    torch.manual_seed(0)
    module = nn.BatchNorm2d(4, momentum=momentum)
    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
        tensor.data.add_(torch.rand(4))
    return module


def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All ranks' rows far from 0, and the gradient of the output."""
    torch.manual_seed(step + 1)
    return torch.randn(sum(ROWS), 4, 3, 2) * 3 + 100, torch.randn(sum(ROWS), 4, 3, 2)


def two_steps(module: nn.Module, rows: slice) -> dict[str, torch.Tensor]:
    """The statistics after two passes over `rows` of the batches."""
    found = {}
    for step in range(2):
        x, grad = (tensor[rows] for tensor in batches(step))
        x.requires_grad_()
        y = module(x)
        y.backward(grad)
        found.update({f"output {step}": y.detach(), f"gradient {step}": x.grad})
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return {**found, "weight": module.weight.grad, "bias": module.bias.grad, **buffers}


def normalize(rank: int, folder: Path) -> None:
    """Both kinds of momentum over all ranks; then a plain normalization, and its statistics shared."""
    rows = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)
    found = {}
    for momentum in (0.1, None):
        model = nn.Sequential(normalization(momentum))
        assert sync_batch_norm_(model) == 1
        assert isinstance(model[0], nn.BatchNorm2d)
        found[momentum] = two_steps(model[0], rows)
        found[momentum, "half"] = model[0](batches(0)[0][rows].bfloat16()).dtype
        assert plain_batch_norm_(model) == 1
        assert type(model[0]) is nn.BatchNorm2d
    model = nn.Sequential(normalization(0.1))
    two_steps(model[0], rows)
    found["own"] = {name: buffer.clone() for name, buffer in model[0].named_buffers()}
    share_statistics_(model)
    found["shared"] = dict(model[0].named_buffers())
    torch.save(found, folder / f"batch_norm_{rank}.pt")
