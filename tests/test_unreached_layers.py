"""A layer that a batch does not reach has a report of its own, without figures."""

import torch
from torch import nn

from hf_bnn import binarize_, check_inputs


class Skipping(nn.Module):
    """Never runs its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.used = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_layer_that_the_batch_does_not_reach_has_no_shares():
    reached, missed = check_inputs(binarize_(Skipping()), torch.randn(16, 8))
    assert reached.module == "used"
    assert 0 < reached.high < 1
    assert (missed.module, missed.operand) == ("unused", "input")
    shares = (missed.high, missed.constant_features, missed.beyond)
    assert shares == (0.0, 0.0, 0.0)
    assert missed.dead_outputs == 0.0
    assert missed.calibrated is False
    assert "does not reach it" in missed.problem
    assert "0.0% high" in str(missed)


def test_its_dead_outputs_are_counted_all_the_same():
    model = binarize_(Skipping())
    with torch.no_grad():
        model.unused.weight[:2] = 0
    assert check_inputs(model, torch.randn(16, 8))[1].dead_outputs == 0.25
