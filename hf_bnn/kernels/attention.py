"""Attention of binary products: `hf_bnn::attention`."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from .library import NOT_TAKEN, UNSURE, call, declare, instruction_set, threads_for
from .ops import define_op
from .reference import MASKED, below, signs

LEVELS = 7
WORK = 256  # time of a score beside its products, in multiply-accumulates


class AttentionShape(ctypes.Structure):
    """`struct attention_shape` of csrc/hf_bnn.h. Its steps are plain fields: ctypes fills arrays more slowly."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "heads", "queries", "keys", "size")),
        *((f"{name}_step_{i}", c_int64) for name in ("query", "key", "value", "mask") for i in range(3)),
    )


_SHAPE = POINTER(AttentionShape)
declare("hf_bnn_attention", c_int64, c_void_p, _SHAPE, *(c_void_p,) * 5, c_float, c_int, c_void_p, c_void_p)
declare("hf_bnn_attention_scores", c_int64, _SHAPE, *(c_void_p,) * 4, c_float, c_void_p, c_int64, c_void_p)
declare("hf_bnn_attention_context", c_int64, _SHAPE, *(c_void_p,) * 4, c_int64, c_void_p)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softmax: bool = True,
) -> Tensor:
    """Binary attention: queries `(batch, heads, n, size)`, keys and values `(batch, heads, tokens, size)` to a context.

    The context has the shape of the queries and lies in memory as `(batch, n, heads, size)`. A score is the product of
    the signs of a query and a key in units of a level, times `scaling`, plus `mask`, which broadcasts to
    `(batch, heads, n, tokens)`. The probabilities, or without `softmax` the scores themselves, are compared with a
    threshold, and their signs are multiplied by those of the values. Without `softmax`, a token whose mask is below
    reference.MASKED counts as -1 in any case.

    `levels` is float32 `(7,)`: the thresholds of queries, keys, values, and of probabilities or scores; the unit of the
    scores; the scales of the product with the values and of the sum of all values, which are added.
    """
    return torch.ops.hf_bnn.attention(query, key, value, levels, scaling, mask, softmax)


def _with_rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a row one after the other."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


@define_op("attention")
class AttentionOperands(NamedTuple):
    """Operands of `hf_bnn::attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    levels: Tensor
    scaling: float
    mask: Tensor | None = None
    softmax: bool = True

    def check(self) -> None:
        query, key, value, levels, mask = self.query, self.key, self.value, self.levels, self.mask
        expected = (*query.shape[:2], key.shape[-2], query.shape[-1])
        if query.dim() != 4 or key.shape != expected or value.shape != expected:
            raise ValueError(
                f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)}: expected "
                "(batch, heads, tokens, size), with as many values as keys and all else alike"
            )
        if levels.shape != (LEVELS,):
            raise ValueError(f"levels has shape {tuple(levels.shape)}: expected ({LEVELS},)")
        if mask is not None and not mask.is_floating_point():
            raise ValueError(f"a mask of {mask.dtype}: expected floats, which are added to the scores")

    def compute(self) -> Tensor:
        self.check()
        query, key, value, levels, scaling, mask, softmax = self
        (batch, heads, n, size), tokens = query.shape, key.shape[2]
        chosen = instruction_set()
        floats = query.dtype == key.dtype == value.dtype == levels.dtype == torch.float32
        floats = floats and (mask is None or mask.dtype == torch.float32)
        if chosen is None or not floats or not batch * heads * n * tokens * size:
            return self.reference()
        query, key, value, levels = _with_rows(query), _with_rows(key), _with_rows(value), levels.contiguous()
        steps = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        q, k, v, numbers = query.data_ptr(), key.data_ptr(), value.data_ptr(), levels.data_ptr()
        added, mask_steps = None, (0, 0, 0)
        if mask is not None:
            rows = _with_rows(mask.expand(batch, heads, n, tokens))
            added, mask_steps = rows.data_ptr(), rows.stride()[:3]
        shape = AttentionShape(batch, heads, n, tokens, size, *steps, *mask_steps)
        context = query.new_empty((batch, n, heads, size))
        unsure = torch.empty((batch, heads, n), dtype=torch.bool)
        pool, _ = threads_for(batch * heads * n * tokens * (2 * size + WORK), chosen)
        results = (context.data_ptr(), unsure.data_ptr())
        status = call("hf_bnn_attention", chosen, pool, shape, q, k, v, added, numbers, scaling, softmax, *results)
        if status == NOT_TAKEN:
            return self.reference()
        if status == UNSURE:  # too close to the threshold: in these rows the roundings of torch's own softmax decide
            found = unsure.view(-1).nonzero()
            which, scores = (found.data_ptr(), len(found)), query.new_empty((len(found), tokens))
            call("hf_bnn_attention_scores", chosen, shape, q, k, added, numbers, scaling, *which, scores.data_ptr())
            weights = scores.softmax(-1)
            call("hf_bnn_attention_context", chosen, shape, v, numbers, weights.data_ptr(), *which, context.data_ptr())
        return context.transpose(1, 2)

    def reference(self) -> Tensor:
        query, key, value, levels, scaling, mask, softmax = self
        query_level, key_level, value_level, level, score_scale, scale, shift = levels.unbind()
        queries, keys, values = (
            signs(x.float(), 0.0, threshold).float()
            for x, threshold in ((query, query_level), (key, key_level), (value, value_level))
        )
        with torch.autocast(query.device.type, enabled=False):
            scores = (queries @ keys.transpose(-1, -2) * score_scale).to(query.dtype) * scaling
            if mask is not None:
                scores = scores + mask
            weights = scores.softmax(-1) if softmax else scores
            low = below(weights.float(), 0.0, level)
            if mask is not None and not softmax:
                low = low | (mask < MASKED)
            sums = (1 - 2 * low.float()) @ values
        y = sums * scale + shift * values.sum(-2, keepdim=True)
        return y.to(query.dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)

    def fake(self) -> Tensor:
        batch, heads, n, size = self.query.shape
        return self.query.new_empty((batch, n, heads, size)).transpose(1, 2)
