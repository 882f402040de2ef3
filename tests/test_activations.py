"""RPReLU against its formula, written out entry by entry."""

import pytest
import torch
from torch import Tensor

from hf_bnn.nn.activations import RPReLU


def rprelu(x: float, shift: float, slope: float, offset: float) -> float:
    """ReActNet (arXiv 2003.03488), eq. 5."""
    return (x - shift if x > shift else slope * (x - shift)) + offset


def test_each_channel_is_shifted_bent_and_offset_by_its_own_numbers():
    module, x = RPReLU(3).double(), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    found = module(x)
    numbers = [p.flatten().tolist() for p in (module.shift, module.slope, module.offset)]
    for n, c, h, w in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        expected = rprelu(x[n, c, h, w].item(), *(values[c] for values in numbers))
        assert found[n, c, h, w].item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(module, x.requires_grad_())


def state(module: RPReLU) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_it_begins_as_a_prelu_of_a_quarter_and_goes_back_to_it():
    module = RPReLU(3)
    shapes = {"shift": (3, 1, 1), "slope": (3,), "offset": (3, 1, 1)}
    assert {name: tuple(tensor.shape) for name, tensor in state(module).items()} == shapes
    for _ in range(2):
        found = state(module)
        assert (found["shift"] == 0).all()
        assert (found["slope"] == 0.25).all()
        assert (found["offset"] == 0).all()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
        module.reset_parameters()
    assert repr(module) == "RPReLU(channels=3)"
