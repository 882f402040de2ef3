"""Boolean attention in training: how much is dropped, and where masked and dropped scores lie."""

import pytest
import torch
from torch import Tensor

from hf_bnn import install_method
from hf_bnn.methods import STE
from hf_bnn.methods.base import ClippedSign, IdentitySign, Part
from hf_bnn.nn.attention import BooleanAttention

MASK = torch.finfo(torch.float32).min


def attention(threshold: float = 0.0) -> BooleanAttention:
    made = install_method(BooleanAttention(), STE()).train()
    with torch.no_grad():
        made.context.left_levels.offset.fill_(threshold)
    return made


def heads(tokens: int, batch: int = 4) -> list[Tensor]:
    """Queries and keys that agree, so that without a mask every query attends to every token; and values."""
    ones = torch.ones(batch, 2, tokens, 8)
    return [ones.clone().requires_grad_(), ones.clone().requires_grad_(), torch.randn_like(ones).requires_grad_()]


@pytest.mark.parametrize("dropout", [0.1, 0.25, 0.8])
def test_the_share_of_weights_that_is_dropped_is_the_rate(dropout: float):
    block, (query, key, value) = attention(), heads(60)
    weights = block(query, key, value, dropout=dropout)[1]
    assert weights.unique().tolist() == [0.0, pytest.approx(0.1)]
    deviation = (dropout * (1 - dropout) / weights.numel()) ** 0.5
    assert abs((weights == 0).float().mean().item() - dropout) < 5 * deviation
    assert bool((block(query, key, value)[1] > 0).all())
    assert bool((block.eval()(query, key, value, dropout=dropout)[1] > 0).all())


@pytest.mark.parametrize("threshold", [-5.0, 0.0, 1.0])
@pytest.mark.parametrize("how", ["masked", "dropped"])
def test_scores_that_do_not_count_lie_two_below_the_threshold(threshold: float, how: str):
    block, seen = attention(threshold), []
    block.context.left_binarizer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    mask = torch.zeros(4, 1, 1, 6)
    if how == "masked":
        mask[..., 4:] = MASK
        out = block(*heads(6), mask)[1] == 0
        assert torch.equal(out, (mask < 0).expand_as(out))
    else:
        out = block(*heads(6), dropout=0.5)[1] == 0
        assert bool(out.any())
    # beyond every surrogate gradient, and near enough for the methods' statistics
    assert seen[0][out].unique().tolist() == [-2.0]
    assert bool((seen[0][~out] >= 0).all())


@pytest.mark.parametrize("threshold", [-5.0, 0.0])
@pytest.mark.parametrize("surrogate", [ClippedSign(1.0), IdentitySign()], ids=["clipped", "unbounded"])
def test_a_masked_token_teaches_neither_the_threshold_nor_its_key(threshold: float, surrogate: Part):
    def gradients(tokens: int, mask: Tensor | None) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        block, inputs = attention(threshold), [torch.randn(2, 2, 6, 8)[:, :, :tokens] for _ in range(3)]
        block.context.left_binarizer = surrogate
        inputs = [x.requires_grad_() for x in inputs]
        context, _ = block(inputs[0], inputs[1], inputs[2], mask, 0.35)
        (context[:, :, :4] ** 2).sum().backward()
        return (block.context.left_levels.offset.grad, *(x.grad[:, :, :4] for x in inputs), inputs[1].grad[:, :, 4:])

    mask = torch.zeros(2, 1, 1, 6)
    mask[..., 4:] = MASK
    *padded, of_masked = gradients(6, mask)
    *cropped, _ = gradients(4, None)
    for found, expected in zip(padded, cropped, strict=True):
        torch.testing.assert_close(found, expected)
    assert not of_masked.any()
