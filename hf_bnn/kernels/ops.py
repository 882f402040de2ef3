"""Definition of torch ops: one class holds the schema, the kernel, the reference and the fake version of an op.

The class is a NamedTuple. Its fields are the operands of the op in their order; their types and defaults make the
schema, so that an operand is added in one place. Its methods compute the result from the operands:

- `compute`: on CPUs, with a compiled kernel if it takes these operands, else with `reference`.
- `reference`: in torch alone. Runs on GPUs, and is what the tests compare the kernels with.
- `fake`: an empty result of the right shape and dtype, for torch.compile and torch.export.

The ops run binary products for inference: no gradient passes through them.

Inputs are compared with a threshold: `x < threshold` counts as -1, anything else as +1. Results are
`sum * scale + offset` in float32, in the order of the operations of hf_bnn.nn.rescaling.rescale, then cast to the dtype
of `x`. Compiled kernels equal `reference` bit for bit, except that `linear_weight_only` sums in another order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

Pair = tuple[int, int]  # rows and columns
Operands = TypeVar("Operands", bound=type[NamedTuple])

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    int: "int",
    Pair: "int[2]",
    tuple[Tensor, Tensor]: "(Tensor, Tensor)",
}
_LIBRARY = torch.library.Library("hf_bnn", "DEF")
OPS: dict[str, type] = {}  # the classes by the names of their ops


def define_op(name: str) -> Callable[[Operands], Operands]:
    """A class decorator that defines `torch.ops.hf_bnn.NAME`; see the module."""

    def define(operands: Operands) -> Operands:
        _LIBRARY.define(schema_of(name, operands), tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _method(operands, "compute"), "CPU")
        _LIBRARY.impl(name, _method(operands, "reference"), "CUDA")
        torch.library.register_fake(f"hf_bnn::{name}", _method(operands, "fake"), lib=_LIBRARY)
        torch.library.register_vmap(f"hf_bnn::{name}", _one_by_one(getattr(torch.ops.hf_bnn, name)), lib=_LIBRARY)
        OPS[name] = operands
        return operands

    return define


def schema_of(name: str, operands: type) -> str:
    """The schema of an op, from the fields of `operands` and from what its `compute` returns.

    >>> class Doubled(NamedTuple):
    ...     x: Tensor
    ...     times: int = 2
    ...
    ...     def compute(self) -> Tensor:
    ...         return self.x * self.times
    >>> schema_of("doubled", Doubled)
    'doubled(Tensor x, int times=2) -> Tensor'
    """
    hints, defaults = get_type_hints(operands), operands._field_defaults
    fields = [
        f"{_schema_type(hints[field])} {field}" + (f"={defaults[field]}" if field in defaults else "")
        for field in operands._fields
    ]
    return f"{name}({', '.join(fields)}) -> {_schema_type(get_type_hints(operands.compute)['return'])}"


def _schema_type(hint: Any) -> str:
    if hint not in _SCHEMA_TYPES:
        raise TypeError(f"an operand or result of type {hint}: expected one of {', '.join(map(str, _SCHEMA_TYPES))}")
    return _SCHEMA_TYPES[hint]


def _method(operands: type, name: str) -> Callable:
    method = getattr(operands, name)
    return lambda *arguments, **named: method(operands(*arguments, **named))


def _one_by_one(op: Callable) -> Callable:
    """The rule of torch.func.vmap for `op`: one call per element of the batch, which is dimension 0 of the results."""

    def rule(info: NamedTuple, in_dims: tuple[object, ...], *arguments: object) -> tuple[object, object]:
        columns = [
            value.unbind(dim) if isinstance(dim, int) else [value] * info.batch_size
            for value, dim in zip(arguments, in_dims, strict=True)
        ]
        results = [op(*row) for row in zip(*columns, strict=True)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        parts = tuple(torch.stack(part) for part in zip(*results, strict=True))
        return parts, (0,) * len(parts)

    return rule
