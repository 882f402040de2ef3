"""Attention of binary products: `hf_bnn::attention`."""

import torch
from torch import Tensor

from . import reference
from .library import NOT_TAKEN, UNSURE, AttentionShape, call, instruction_set, threads_for
from .operands import define_op

LEVELS = 7
WORK = 256  # a score takes, beside its products, as long as so many multiply-accumulates


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softmax: bool = True,
) -> Tensor:
    """Queries `(batch, heads, n, size)`, keys and values `(batch, heads, tokens, size)` to `(batch, heads, n, size)`.

    The result lies in memory as `(batch, n, heads, size)`. Scores are the products of the queries' and keys' signs in
    units of a level, times `scaling`, plus `mask`, which broadcasts to `(batch, heads, n, tokens)`. Probabilities, or
    without `softmax` the scores themselves, are low (-1) or not (+1) in the product with the signs of the values;
    without softmax a token whose mask is below reference.MASKED is low in any case.

    `levels`: float32 `(7,)`, the thresholds of queries, keys, values, and of probabilities or scores; the unit of the
    scores; the scales of the second product and of the sum of all values, which make up the result.
    """
    return torch.ops.hf_bnn.attention(query, key, value, levels, scaling, mask, softmax)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softmax: bool = True,
) -> Tensor:
    check_attention(query, key, value, levels, mask)
    (batch, heads, n, size), tokens = query.shape, key.shape[2]
    chosen = instruction_set()
    floats = query.dtype == key.dtype == value.dtype == levels.dtype == torch.float32
    floats = floats and (mask is None or mask.dtype == torch.float32)
    if chosen is None or not floats or not batch * heads * n * tokens * size:
        return reference.attention(query, key, value, levels, scaling, mask, softmax)
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
    pool, _ = threads_for(batch * heads * n * tokens * (2 * size + WORK))
    results = (context.data_ptr(), unsure.data_ptr())
    status = call("hf_bnn_attention", chosen, pool, shape, q, k, v, added, numbers, scaling, softmax, *results)
    if status == NOT_TAKEN:
        return reference.attention(query, key, value, levels, scaling, mask, softmax)
    if status == UNSURE:  # too close to the threshold: in these rows the roundings of torch's own softmax decide
        found = unsure.view(-1).nonzero()
        which, scores = (found.data_ptr(), len(found)), query.new_empty((len(found), tokens))
        call("hf_bnn_attention_scores", chosen, shape, q, k, added, numbers, scaling, *which, scores.data_ptr())
        weights = scores.softmax(-1)
        call("hf_bnn_attention_context", chosen, shape, v, numbers, weights.data_ptr(), *which, context.data_ptr())
    return context.transpose(1, 2)


def _fake_attention(query: Tensor, *others: object, **named: object) -> Tensor:
    batch, heads, n, size = query.shape
    return query.new_empty((batch, n, heads, size)).transpose(1, 2)


def _with_rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a row one after the other."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def check_attention(query: Tensor, key: Tensor, value: Tensor, levels: Tensor, mask: Tensor | None) -> None:
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


define_op(
    "attention(Tensor query, Tensor key, Tensor value, Tensor levels, float scaling, Tensor? mask=None, "
    "bool softmax=True) -> Tensor",
    _attention,
    reference.attention,
    _fake_attention,
)
