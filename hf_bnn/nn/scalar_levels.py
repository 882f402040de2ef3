"""Reads old checkpoints whose learned levels are scalars. Levels now have shape (1,), which FSDP2 can shard."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .levels import ElasticLevels

NAMES = (".width", ".offset")


def has_scalar_levels(state_dict: Mapping[str, Tensor] | None, files: Sequence[str | os.PathLike] | None) -> bool:
    """Whether the levels in a checkpoint, given in memory or as files, are 0-d. Reads only the headers of files.

    A file that cannot be read counts as one without scalar levels: loading it reports the error.
    """
    if state_dict is not None:
        return any(key.endswith(NAMES) and tensor.dim() == 0 for key, tensor in state_dict.items())
    for path in map(Path, files or ()):
        if path.suffix != ".safetensors":
            continue
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            if any(key.endswith(NAMES) and not file.get_slice(key).get_shape() for key in file.keys()):  # noqa: SIM118
                return True
    return False


def set_levels_shape_(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Give the parameters of all elastic and boolean levels the shape () or (1,), in place."""
    for module in model.modules():
        if isinstance(module, ElasticLevels):
            for name, parameter in list(module.named_parameters()):
                new = nn.Parameter(parameter.detach().view(shape), parameter.requires_grad)
                new.__dict__.update(parameter.__dict__)  # transformers marks what it has loaded
                setattr(module, name, new)


@contextlib.contextmanager
def levels_as_saved(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None, files: Sequence[str | os.PathLike] | None
) -> Iterator[None]:
    """A context in which the model's levels have the checkpoint's shape, because transformers compares shapes."""
    scalars = has_scalar_levels(state_dict, files)
    if scalars:
        set_levels_shape_(model, ())
    try:
        yield
    finally:
        if scalars:
            set_levels_shape_(model, (1,))


def take_scalar_states(optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer` load states that were saved for scalar levels."""

    def reshape(optimizer: torch.optim.Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items() if parameter.shape == (1,) else ():
                if key != "step" and isinstance(value, Tensor) and value.dim() == 0:
                    state[key] = value.view(1)

    optimizer.register_load_state_dict_post_hook(reshape)
