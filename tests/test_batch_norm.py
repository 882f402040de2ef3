"""Batch normalization over ranks: two of them against one process that has all rows, and one against torch's own."""

import pytest
import torch
import torch.distributed as dist
from batch_norm_worker import ROWS, normalization, two_steps
from torch import nn

from hf_bnn.training import batch_norm
from hf_bnn.training.batch_norm import plain_batch_norm_, share_statistics_, sync_batch_norm_


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


@pytest.fixture
def alone(monkeypatch):
    """A group of one process that counts as several, so that sums over the ranks are really taken."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(batch_norm, "_several_ranks", lambda: True)
    yield
    dist.destroy_process_group()


NORMALIZATIONS = {
    "1d": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "1d, of sequences": (lambda: nn.BatchNorm1d(3), (5, 3, 4)),
    "2d": (lambda: nn.BatchNorm2d(3, momentum=0.3), (5, 3, 4, 2)),
    "3d": (lambda: nn.BatchNorm3d(3), (2, 3, 4, 2, 2)),
    "without weights": (lambda: nn.BatchNorm2d(3, affine=False), (5, 3, 4, 2)),
    "without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 2)),
    "of a mean": (lambda: nn.BatchNorm2d(3, momentum=None), (5, 3, 4, 2)),
}


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_of_every_kind_it_computes_and_learns_what_torchs_own_does(alone, kind):
    make, shape = NORMALIZATIONS[kind]
    plain, over = make(), make()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    over.load_state_dict(plain.state_dict())
    assert sync_batch_norm_(nn.Sequential(over)) == 1
    weights = torch.randn(shape)
    for _ in range(2):
        x = torch.randn(shape).requires_grad_()
        same = x.detach().clone().requires_grad_()
        y, expected = over(x), plain(same)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        (y * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, same.grad, rtol=1e-4, atol=1e-5)
    for (name, value), (_, other) in zip(over.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(over.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
