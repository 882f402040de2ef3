"""StoMPP's masks: each operand has one of its own."""

import torch
from torch import nn

from hf_bnn import binarize_
from hf_bnn.methods import Step, Stompp
from hf_bnn.methods.stompp import MaskedSign, _generator
from hf_bnn.nn.attention import BinaryMatmul
from hf_bnn.nn.layers import binary_layers
from hf_bnn.nn.levels import SignedLevels
from hf_bnn.training import begin_step


def test_the_operands_of_a_product_and_of_a_layer_freeze_by_masks_of_their_own():
    product, layer = BinaryMatmul(SignedLevels(), SignedLevels()), nn.Linear(64, 1)
    model = binarize_(nn.Sequential(layer, product), Stompp(order="global", refresh=0))
    begin_step(model, Step(60, 200, 0.1))
    for one in binary_layers(model):
        first, second = (part.mask.flatten() for _, part in one.parts() if isinstance(part, MaskedSign))
        assert first.shape == second.shape == (64,)
        assert 0 < first.sum() < 64
        assert not torch.equal(first, second)


def test_the_seed_of_a_place_never_changes():
    # A run that is resumed, by whichever version and on whichever machine, draws the keys that it drew before.
    assert _generator(0, 3, 1).initial_seed() == 4452749771798388907
