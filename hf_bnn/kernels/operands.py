"""Checks of the operands of ops, and the forms in which compiled kernels take them."""

from ctypes import Structure, addressof, c_float

import torch
from torch import Tensor

from ..observers import looked_on
from .library import LinearPlan, call, instruction_set, thread_pool, threads_for
from .weights import PANEL, LinearWeight, linear_shape

# A comparison in float32 is exact for these.
COMPARABLE = (torch.float32, torch.bfloat16, torch.float16)


def runs_compiled(x: Tensor, weight: Tensor, thresholds: Tensor | None = None, *others: Tensor | None) -> int | None:
    """The number of the instruction set whose kernel takes these tensors, None if torch computes."""
    if weight.dtype != torch.int32 or x.dtype not in COMPARABLE:
        return None
    if thresholds is not None and thresholds.dtype not in COMPARABLE:
        return None
    if not all(tensor is None or tensor.is_cpu for tensor in (x, weight, thresholds, *others)):
        return None
    return instruction_set()


def runs_directly(x: Tensor, *others: Tensor) -> bool:
    """Whether an op may bypass torch's dispatcher, which costs as much as a small product.

    It may not where something observes the dispatcher, such as torch.compile or a dispatch mode.
    """
    return type(x) is Tensor and x.is_cpu and all(other.is_cpu for other in others) and not looked_on()


def floats(values: Tensor | None, size: int) -> Tensor:
    """`values` as contiguous float32. None becomes -0.0, which changes no float to which it is added, not even -0.0."""
    if values is None:
        return torch.full((size,), -0.0, dtype=torch.float32, device="cpu")
    if values.dtype == torch.float32 and values.is_contiguous():  # saves two calls, half a microsecond each
        return values
    return values.to(torch.float32).contiguous()


class Threshold:
    """Thresholds for float32 inputs in memory. `address` is valid while this object exists.

    `thresholds` of two dimensions are `(parts of the outputs, inputs)`.
    """

    def __init__(self, x: Tensor, threshold: float, thresholds: Tensor | None):
        self.parts, self.per_input = 1, False
        if thresholds is None and x.dtype == torch.float32:
            self.values = c_float(threshold)
            self.address = addressof(self.values)
            return
        # Type promotion in torch: a number, or a 0-d tensor, is compared in the dtype of x.
        if thresholds is None:
            thresholds = torch.tensor(threshold, dtype=x.dtype)
        elif thresholds.dim() == 0:
            thresholds = thresholds.to(x.dtype)
        self.values = thresholds.to(torch.float32).contiguous()
        self.parts = parts_of(thresholds)
        self.per_input = self.values.numel() > self.parts
        self.address = self.values.data_ptr()


def parts_of(thresholds: Tensor | None) -> int:
    """Number of parts into which these thresholds divide the outputs of a linear layer."""
    return thresholds.shape[0] if thresholds is not None and thresholds.dim() == 2 else 1


def same_for_all_parts(thresholds: Tensor | None) -> Tensor | None:
    """`thresholds` without parts if all parts have equal ones, so that the inputs are packed once."""
    if parts_of(thresholds) > 1 and bool((thresholds == thresholds[0]).all()):
        return thresholds[0]
    return thresholds


def linear_plan(
    chosen: int, size: int, weight: Tensor, scale: Tensor, offset: Tensor | None, level: Threshold | None = None
) -> LinearPlan:
    """The operands of a compiled linear layer besides its inputs. The plan keeps the tensors it points to alive."""
    out, panels = scale.shape[0], weight.contiguous()
    scales, offsets = floats(scale, out), floats(offset, out)
    compared = (0, 1, 0) if level is None else (level.address, level.parts, level.per_input)
    addresses = (panels.data_ptr(), scales.data_ptr(), offsets.data_ptr())
    plan = LinearPlan(chosen, thread_pool(), size, out, *addresses, *compared)
    plan.kept = (panels, scales, offsets, level)
    return plan


def run_plan(name: str, plan: Structure, x: Tensor, out: int, work: int) -> Tensor:
    """Run a function of the library: `(..., in)` to `(..., out)`. `work`: multiply-accumulates per row."""
    rows = as_rows(x)
    count = rows.shape[0]
    y = x.new_empty(*x.shape[:-1], out, dtype=torch.float32)
    threads = threads_for(count * work)[1]
    call(name, addressof(plan), rows.data_ptr(), rows.stride(0), count, threads, y.data_ptr())
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def as_rows(x: Tensor) -> Tensor:
    """`x` as float32 `(rows, in)`, contiguous within a row."""
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
    parts = parts_of(thresholds)
    check_sizes(out, size, offset=offset, thresholds=thresholds[0] if parts > 1 else thresholds)
    if parts > 1 and out % (parts * PANEL):
        raise ValueError(
            f"thresholds of shape {tuple(thresholds.shape)} divide {out} outputs into {parts} parts: expected parts of "
            f"a multiple of {PANEL} outputs"
        )


def check_sizes(out: int, inputs: int, thresholds: Tensor | None, **per_output: Tensor | None) -> None:
    for name, values in per_output.items():
        if values is not None and values.shape != (out,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}: expected one number per output, ({out},)")
    if thresholds is not None and thresholds.numel() not in (1, inputs):
        raise ValueError(
            f"thresholds has shape {tuple(thresholds.shape)}: expected one number, or one for each of {inputs} inputs"
        )


def like_inputs(weight: LinearWeight) -> Tensor:
    """An empty batch of inputs, float32 on the device of the weight."""
    return weight.data.new_empty((0, weight.in_features), dtype=torch.float32)


def check_features(x: Tensor, weight: LinearWeight) -> None:
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"inputs of shape {tuple(x.shape)}: expected {weight.in_features} numbers in the last dimension"
        )


def split_threshold(threshold: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, threshold) if isinstance(threshold, Tensor) else (threshold, None)
