"""Detects observers of torch's operators, which would miss a computation that bypasses torch's dispatcher."""

import torch
from torch.compiler import is_compiling

_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack


def looked_on() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace, a torch.func transform or a dispatch mode is active.

    Every call of a layer asks this. The four checks take a quarter of a microsecond.
    """
    return is_compiling() or bool(_dispatch_modes()) or _tracing_state() is not None or _transforms() is not None


def transformed() -> bool:
    """Whether a torch.func transform (vmap, grad, ...) is active, for which few operators have a rule."""
    return not is_compiling() and _transforms() is not None
