"""Batch normalization on two ranks, against one process that has all rows."""

import pytest
import torch
from batch_norm_worker import ROWS, normalization, two_steps
from torch import nn

from hf_bnn.batch_norm import plain_batch_norm_, share_statistics_, sync_batch_norm_


@pytest.fixture
def ranks(two_ranks):
    folder, _ = two_ranks
    return [torch.load(folder / f"batch_norm_{rank}.pt") for rank in range(2)]


@pytest.mark.multiprocess
@pytest.mark.parametrize("momentum", [0.1, None])
def test_over_all_ranks_it_is_that_of_one_process_with_all_rows(ranks, momentum):
    expected = two_steps(normalization(momentum), slice(None))
    for name, whole in expected.items():
        one, other = (rank[momentum][name] for rank in ranks)
        if name in ("weight", "bias"):
            torch.testing.assert_close(one + other, whole, rtol=1e-4, atol=1e-4)
        elif name.startswith(("output", "gradient")):
            torch.testing.assert_close(torch.cat([one, other]), whole, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(one, other)
            torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-5)
    assert [rank[momentum, "half"] for rank in ranks] == [torch.bfloat16] * 2


@pytest.mark.multiprocess
def test_ranks_differ_without_it_until_they_share_the_statistics_of_the_first(ranks):
    one, other = ranks
    assert not torch.equal(one["own"]["running_mean"], other["own"]["running_mean"])
    for name, own in one["own"].items():
        assert torch.equal(own, one["shared"][name])
        assert torch.equal(own, other["shared"][name])
    alone = two_steps(normalization(0.1), slice(0, ROWS[0]))
    assert torch.equal(alone["running_var"], one["own"]["running_var"])


def test_in_one_process_it_is_the_plain_one_bit_for_bit():
    model = nn.Sequential(normalization(0.1))
    before = model.state_dict().keys()
    assert sync_batch_norm_(model) == 1
    assert model.state_dict().keys() == before
    found, expected = two_steps(model[0], slice(None)), two_steps(normalization(0.1), slice(None))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    share_statistics_(model)
    assert plain_batch_norm_(model) == 1
    assert sync_batch_norm_(nn.Sequential(nn.LayerNorm(4))) == 0
