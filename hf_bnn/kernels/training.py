"""Training steps on bits: elementwise functions, weights to panels, products of the signs of two tensors.

Bits of a tensor are uint8, in the order of its memory: bit i of byte n belongs to number 8 n + i. Everything here takes
dense float32 tensors on the CPU and needs a compiled backend: see `runs_on_bits` and `dense`.
"""

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .library import best_instruction_set, call, declare, instruction_set, library, thread_pool
from .operands import runs_directly
from .weights import PAIR, PANEL, WORD, linear_shape

# The functions of hf_bnn_elements in csrc/hf_bnn.h.
SIGNS, SIGN_BITS, INSIDE_BITS, SIGNS_OF_BITS, KEEP_WHERE, TO_BYTES, FROM_BYTES, SIGNS_OF_BYTES, KEEP_WITHIN = range(9)
declare("hf_bnn_elements", c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_float, c_void_p, result=None)
declare("hf_bnn_pack_weight", c_int64, c_void_p, c_void_p, *(c_int64,) * 3, c_void_p)
declare("hf_bnn_sign_products", c_int64, *(c_void_p,) * 3, *(c_int64,) * 4, c_void_p)

WORTH_THREADS = 1 << 18  # numbers: fewer take less time than waking a second thread
PRODUCTS_WORTH_THREADS = 20_000_000  # multiply-accumulates


def runs_on_bits(x: Tensor) -> bool:
    """Whether the functions here take `x`: float32, on the CPU, and nothing that must see each torch operation."""
    plain = x.detach() if type(x) is torch.nn.Parameter else x
    return x.dtype == torch.float32 and runs_directly(plain) and instruction_set() is not None


def takes_signs(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these int8 signs is faster here than torch's, which some processors compute slowly."""
    ready = runs_directly(x, weight) and type(weight) is Tensor and instruction_set() is not None
    return ready and bool(x.numel()) and bool(weight.numel())


def dense(x: Tensor) -> Tensor:
    """`x` without gaps or overlaps in its memory, in whatever order."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous()


def with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`x` with these strides in memory: itself, or a copy."""
    return x if x.stride() == strides else torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum of the products of two tensors with the same shape and strides, both dense."""
    flat = (left.numel(),), (1,)
    return torch.dot(left.as_strided(*flat), right.as_strided(*flat))


def _run(function: int, codes: Tensor | None, x: Tensor | None, number: float, out: Tensor, count: int) -> Tensor:
    threads = count >= WORTH_THREADS and torch.get_num_threads() > 1
    library().functions.hf_bnn_elements(
        *(best_instruction_set(), thread_pool() if threads else None, function, count),
        *(None if codes is None else codes.data_ptr(), None if x is None else x.data_ptr(), number, out.data_ptr()),
    )
    return out


def _empty_bits(count: int) -> Tensor:
    return torch.empty(-(-count // WORD) * (WORD // 8), dtype=torch.uint8)


def signs(x: Tensor) -> Tensor:
    """-1 where `x` < 0, else +1, in the strides of `x`."""
    return _run(SIGNS, None, x, 0.0, torch.empty_like(x), x.numel())


def sign_bits(x: Tensor) -> Tensor:
    """Bits: 1 where `x` < 0."""
    return _run(SIGN_BITS, None, x, 0.0, _empty_bits(x.numel()), x.numel())


def inside_bits(x: Tensor, bound: float) -> Tensor:
    """Bits: 1 where the size of `x` is at most `bound`."""
    above = torch.nextafter(torch.tensor(bound), torch.tensor(torch.inf)).item()
    return _run(INSIDE_BITS, None, x, above, _empty_bits(x.numel()), x.numel())


def signs_of_bits(bits: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """Float32: -1 where a bit is 1, else +1."""
    out = torch.empty_strided(shape, strides)
    return _run(SIGNS_OF_BITS, bits, None, 0.0, out, out.numel())


def keep_where(bits: Tensor, x: Tensor) -> Tensor:
    """`x` times its bits."""
    return _run(KEEP_WHERE, bits, x, 0.0, torch.empty_like(x), x.numel())


def to_bytes(x: Tensor, steps: int) -> Tensor:
    """int8: `x` times `steps`, rounded away from 0, from -127 to 127; 127 for a NaN.

    A byte tells the sign of its number, and whether the number's size is at most n / steps for an integer n < 127.
    """
    return _run(TO_BYTES, None, x, steps, torch.empty_like(x, dtype=torch.int8), x.numel())


def from_bytes(codes: Tensor, steps: int) -> Tensor:
    """Float32: the middle of the numbers that a byte stands for."""
    return _run(FROM_BYTES, codes, None, steps, torch.empty_like(codes, dtype=torch.float32), codes.numel())


def signs_of_bytes(codes: Tensor) -> Tensor:
    """Float32: -1 where a byte is negative, else +1."""
    return _run(SIGNS_OF_BYTES, codes, None, 0.0, torch.empty_like(codes, dtype=torch.float32), codes.numel())


def keep_within(codes: Tensor, x: Tensor, most: int) -> Tensor:
    """`x` where the size of its byte is at most `most`, else 0. `codes` has the strides of `x`."""
    return _run(KEEP_WITHIN, codes, x, most, torch.empty_like(x), x.numel())


def linear_panels(weight: Tensor) -> Tensor:
    """The signs of `(out, in)`, rows in memory, as LinearWeight.data."""
    out, inputs = weight.shape
    return _pack(weight, inputs, 0, torch.empty(linear_shape(out, inputs), dtype=torch.int32))


def conv2d_panels(weight: Tensor) -> Tensor:
    """The signs of contiguous `(out, in, kh, kw)` as Conv2dWeight.data, of one group."""
    out, channels, height, width = weight.shape
    words = height * width * -(-channels // PAIR) * (PAIR // WORD)
    panels = torch.empty(-(-out // PANEL), words, PANEL, dtype=torch.int32)
    return _pack(weight, channels, height * width, panels)


def _pack(weight: Tensor, inputs: int, taps: int, panels: Tensor) -> Tensor:
    pool = thread_pool() if weight.numel() >= WORTH_THREADS and torch.get_num_threads() > 1 else None
    call(
        "hf_bnn_pack_weight",
        best_instruction_set(),
        pool,
        weight.data_ptr(),
        len(weight),
        inputs,
        taps,
        panels.data_ptr(),
    )
    return panels


def sign_products(left: Tensor, right: Tensor) -> Tensor:
    """`sign(left) @ sign(right).mT` for contiguous `(..., n, k)` and `(..., m, k)`: exact sums, `(..., n, m)`."""
    *batch, n, k = left.shape
    m, count = right.shape[-2], left.shape[:-2].numel()
    out = torch.empty(*batch, n, m)
    threads = count * n * m * k >= PRODUCTS_WORTH_THREADS and torch.get_num_threads() > 1
    addresses = (thread_pool() if threads else None, left.data_ptr(), right.data_ptr())
    call("hf_bnn_sign_products", best_instruction_set(), *addresses, count, n, k, m, out.data_ptr())
    return out
