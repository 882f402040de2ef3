"""A summary equals counts by hand, and is the same for the latent and the packed model."""

import copy

import pytest
from torch import nn

from hf_bnn import binarize_, make_method, pack_
from hf_bnn.nn.embeddings import BinaryEmbedding
from hf_bnn.nn.levels import ElasticLevels
from hf_bnn.summary import Summary, summary


def network() -> nn.Sequential:
    """A rounded table, a depthwise convolution, a norm, a binary linear layer of 10 inputs, and a float head."""
    return nn.Sequential(
        BinaryEmbedding(7, 5),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(10, 4, (2, 3), bias=False),
        nn.LayerNorm(10),
        nn.Linear(10, 3),
        nn.Linear(3, 2),
    )


FLOAT = 7 * 5 + 2 * 10 + 3 * 2 + 2  # table, norm, head
BINARY = 6 * 9 + 4 * 10 * 6 + 3 * 10
BIASES = 6 + 3
# One byte of bits per tap of a depthwise filter, two for ten channels or inputs; float32 scales of 6 + 4 + 3 outputs
BITS, SCALES = 6 * 9 + 4 * 2 * 6 + 3 * 2, 4 * (6 + 4 + 3)


@pytest.mark.parametrize("method", ["ste", "reste", "ir_net"])
@pytest.mark.parametrize("levels", [None, ElasticLevels])
def test_a_latent_and_a_packed_model_are_counted_alike_whatever_trained_them(method: str, levels: type | None):
    method = make_method(method, "libra=False" if method == "ir_net" else None)
    model = binarize_(network(), method, skip=("5",), levels=levels and (lambda name: levels()))
    expected = Summary(FLOAT + BINARY + BIASES, BINARY, 4 * BINARY, BITS, BITS + SCALES)
    assert summary(model) == expected
    packed = pack_(copy.deepcopy(model))
    assert summary(packed) == expected
    assert sum(layer.weight.nbytes for layer in (packed[1], packed[2], packed[4])) == expected.matrix_bytes_bits
    assert sum(layer.weight_scale.nbytes for layer in (packed[1], packed[2], packed[4])) == SCALES
    assert expected.binary_share == BINARY / (FLOAT + BINARY + BIASES)
    assert expected.matrix_compression == 4 * BINARY / (BITS + SCALES)


def test_weights_that_stay_float_are_no_binary_ones():
    model = binarize_(network(), skip=("5",), binarize="activations")
    assert summary(model) == Summary(FLOAT + BINARY + BIASES, 0, 0, 0, 0)


def test_a_parameter_of_two_modules_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].bias = model[0].bias
    model[2].weight = model[0].bias
    assert summary(model).weights == 16 + 4 + 16 + 4
