"""The layout that a packed layer keeps for its backend: made once, and anew when another backend is to run it."""

import pytest
import torch
from torch import nn

from hf_bnn import binarize_, kernels, pack_

LAYERS = {"linear": (lambda: nn.Linear(70, 9), (3, 70)), "conv2d": (lambda: nn.Conv2d(64, 9, 3), (2, 64, 5, 5))}
compiled = pytest.mark.skipif(kernels.available() == ("torch",), reason="no compiled kernels")


@compiled
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_layout_is_kept_for_one_backend_only(kind: str):
    make, shape = LAYERS[kind]
    layer = pack_(binarize_(nn.Sequential(make())).eval())[0]
    x = torch.randn(shape)
    with kernels.using(kernels.available()[0]):
        expected = layer(x)
        panels = layer.operands()
        assert layer.operands() is panels
        assert panels[0].data.dtype == torch.int32
        with kernels.using("torch"):
            signs = layer.operands()
            assert layer.operands() is signs
            assert signs[0].data.dtype == torch.int8
            assert torch.equal(layer(x), expected)
        assert layer.operands()[0].data.dtype == torch.int32
        assert torch.equal(layer(x), expected)
