"""What the ops of torch.library share: their definition, and checks and forms of their operands.

They run binary products, for inference: no gradient passes through them.

Inputs are compared with a threshold, `x < threshold` = -1, else +1. Outputs are `sum * scale + offset` in float32, in
the order of operations of hf_bnn.layers.rescale, then in the dtype of `x`. Compiled kernels and `reference` are equal
bit for bit, except for the order of summation of `linear_weight_only`.
"""

from collections.abc import Callable
from ctypes import addressof, c_float

import torch
from torch import Tensor

from .library import instruction_set
from .weights import LinearWeight, linear_shape

# Compared in float32, these are compared exactly.
COMPARABLE = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("hf_bnn", "DEF")


def define_op(schema: str, kernel: Callable, oracle: Callable, fake: Callable) -> None:
    """Define an op: `kernel` on CPUs, `oracle` on GPUs, `fake` where only shapes are wanted."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, oracle, "CUDA")
    torch.library.register_fake(f"hf_bnn::{name}", fake, lib=_LIBRARY)


def runs_compiled(x: Tensor, weight: Tensor, thresholds: Tensor | None = None) -> int | None:
    """The instruction set if these tensors go to a compiled kernel."""
    if weight.dtype != torch.int32 or x.dtype not in COMPARABLE:
        return None
    if thresholds is not None and thresholds.dtype not in COMPARABLE:
        return None
    return instruction_set()


def runs_directly(x: Tensor, *others: Tensor) -> bool:
    """Whether an op on these may be called as a Python function: nothing looks on that would miss it.

    torch's dispatcher costs as much as a small product.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and all(other.is_cpu for other in others)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def floats(values: Tensor | None, size: int) -> Tensor:
    """Contiguous float32; for None what adds nothing to any float, not even to -0.0."""
    if values is None:
        return torch.full((size,), -0.0)
    if values.dtype == torch.float32 and values.is_contiguous():  # each call that is not made saves half a microsecond
        return values
    return values.to(torch.float32).contiguous()


class Threshold:
    """What float32 inputs are compared with, in memory: `address` is valid for as long as this object lives."""

    def __init__(self, x: Tensor, threshold: float, thresholds: Tensor | None):
        self.per_input = False
        if thresholds is None and x.dtype == torch.float32:
            self.values = c_float(threshold)
            self.address = addressof(self.values)
            return
        # As torch's promotion of types has it: a number, or a 0-d tensor, takes the dtype of x.
        if thresholds is None:
            thresholds = torch.tensor(threshold, dtype=x.dtype)
        elif thresholds.dim() == 0:
            thresholds = thresholds.to(x.dtype)
        self.values = thresholds.to(torch.float32).contiguous()
        self.per_input = self.values.numel() > 1
        self.address = self.values.data_ptr()


def as_rows(x: Tensor) -> Tensor:
    """float32 `(rows, in)`, the numbers of a row one after the other."""
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if rows.dtype != torch.float32:
        rows = rows.to(torch.float32)
    return rows if rows.stride(1) == 1 or rows.shape[1] < 2 else rows.contiguous()


def check_linear(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, thresholds: Tensor | None) -> None:
    size, out = x.shape[-1], scale.shape[0]
    expected = (out, size) if weight.dtype == torch.int8 else linear_shape(out, size)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"a weight laid out as {tuple(weight.shape)} for inputs {tuple(x.shape)} and {out} outputs: "
            f"expected {expected}, as LinearWeight.from_bits makes it"
        )
    check_sizes(out, size, offset=offset, thresholds=thresholds)


def check_sizes(out: int, inputs: int, thresholds: Tensor | None, **per_output: Tensor | None) -> None:
    for name, values in per_output.items():
        if values is not None and values.shape != (out,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}: expected one number per output, ({out},)")
    if thresholds is not None and thresholds.numel() not in (1, inputs):
        raise ValueError(
            f"thresholds has shape {tuple(thresholds.shape)}: expected one number, or one for each of {inputs} inputs"
        )


def check_features(x: Tensor, weight: LinearWeight) -> None:
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"inputs of shape {tuple(x.shape)}: expected {weight.in_features} numbers in the last dimension"
        )


def split_threshold(threshold: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, threshold) if isinstance(threshold, Tensor) else (threshold, None)
