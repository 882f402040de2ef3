"""Properties that conversions keep: a layer's geometry, dtype, mode and settings, and its place in the network."""

import copy

import pytest
import torch
from torch import nn

from hf_bnn import binarize_, install_method, pack_, unpack_
from hf_bnn.convert import empty_packed_, to_binary_
from hf_bnn.install import number_by_execution_
from hf_bnn.methods import Position, Site, Surge
from hf_bnn.nn.embeddings import BinaryEmbedding, Int8Embedding, RoundedEmbedding
from hf_bnn.nn.layers import BinaryConv2d, BinaryLinear, binary_layers
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from hf_bnn.nn.packed import PackedConv2d, PackedLinear
from hf_bnn.selection import choose_layers

LINEAR = ("in_features", "out_features")
CONV2D = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
LAYERS = {
    "linear": (lambda **kw: nn.Linear(10, 3, **kw), LINEAR),
    "conv2d": (lambda **kw: nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 2), (3, 1), 2, **kw), CONV2D),
    "plain conv2d": (lambda **kw: nn.Conv2d(3, 5, 2, **kw), CONV2D),
    "valid conv2d": (lambda **kw: nn.Conv2d(3, 5, 2, padding="valid", **kw), CONV2D),
    "same conv2d": (lambda **kw: nn.Conv2d(3, 5, (3, 5), padding="same", dilation=(1, 2), **kw), CONV2D),
}
PADDING = {"valid conv2d": (0, 0), "same conv2d": (1, 4)}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def geometry(layer: nn.Module, kind: str) -> dict[str, object]:
    found = {name: getattr(layer, name) for name in LAYERS[kind][1]}
    return found | ({"padding": PADDING[kind]} if kind in PADDING else {})


@every_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_binary_layer_has_the_float_layers_parameters_geometry_and_mode(kind: str, bias: bool, dtype, training: bool):
    layer = LAYERS[kind][0](bias=bias, dtype=dtype).train(training)
    expected = geometry(layer, kind)
    levels = ElasticLevels()
    drawn = torch.random.get_rng_state()
    model = nn.Sequential(layer)
    (binary,) = to_binary_(model, choose_layers(model, None, []), levels=lambda name: levels, weight_scaling="layer")
    assert torch.equal(torch.random.get_rng_state(), drawn)  # no weights are drawn to be thrown away
    assert isinstance(binary, BinaryLinear | BinaryConv2d)
    assert geometry(binary, kind) == expected
    assert {name: getattr(binary, name) for name in expected} == expected
    assert binary.weight is layer.weight
    assert binary.bias is layer.bias
    assert binary.input_levels is levels
    assert (binary.binarize, binary.weight_scaling, binary.training) == ("both", "layer", training)


@every_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("binarize", ["both", "weights"])
def test_packing_and_unpacking_keep_all_but_the_latent_weights(kind: str, bias: bool, binarize: str):
    make = (lambda name: UnsignedLevels()) if binarize == "both" else None
    model = binarize_(nn.Sequential(LAYERS[kind][0](bias=bias)), None, (), binarize, make, "layer")
    layer, expected = model[0], geometry(model[0], kind)
    signs, scale = torch.where(layer.weight < 0, -1, 1), layer.scale()
    levels = layer.input_levels
    (packed,) = pack_(model)
    assert {name: getattr(packed, name) for name in expected} == expected
    assert torch.equal(packed.signs(), signs.to(torch.int8))
    assert torch.equal(packed.weight_scale, scale)
    assert packed.bias is layer.bias
    assert packed.input_levels is levels
    assert (packed.binary_inputs, packed.weight_scaling) == (binarize == "both", "layer")
    (latent,) = unpack_(model)
    assert {name: getattr(latent, name) for name in expected} == expected
    assert torch.equal(latent.weight, signs * scale.view(-1, *[1] * (signs.dim() - 1)))
    assert latent.bias is layer.bias
    assert latent.input_levels is levels or binarize == "weights"  # whose levels are never used
    assert (latent.binarize, latent.weight_scaling, latent.training) == (binarize, "layer", False)


@every_layer
def test_an_empty_packed_layer_lies_where_its_latent_one_does(kind: str):
    models = [nn.Sequential(LAYERS[kind][0](device=device)) for device in ("meta", "cpu")]
    empty, full = (to_binary_(model, choose_layers(model, None, [])) for model in models)
    bits, empty = pack_(full).state_dict(), empty_packed_(empty).state_dict()
    assert {key: (t.shape, t.dtype) for key, t in empty.items()} == {key: (t.shape, t.dtype) for key, t in bits.items()}
    assert {t.device.type for t in empty.values()} == {"meta"}


@pytest.mark.parametrize("kind", [Int8Embedding, BinaryEmbedding])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_table_keeps_its_size_and_its_padding_when_it_is_packed_and_unpacked(
    kind: type[RoundedEmbedding], padding_idx: int | None
):
    drawn = torch.random.get_rng_state()
    table = nn.Embedding(7, 10, padding_idx, _weight=torch.linspace(-1, 1, 70).view(7, 10))
    model = nn.Sequential(kind.from_float(table))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    expected = (7, 10, padding_idx)
    for change in (lambda model: model, pack_, unpack_):
        (found,) = change(model)
        assert (found.num_embeddings, found.embedding_dim, found.padding_idx) == expected
    assert type(found) is kind


# Places


class Block(nn.Module):
    """Two binary layers in a list of wrappers; the wrappers hold one each, and are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def sites(model: nn.Module) -> list[Site]:
    return [layer.weight_binarizer.site for layer in binary_layers(model)]


def test_a_block_is_the_innermost_element_of_a_list_that_holds_several_binary_layers():
    model = binarize_(nn.Sequential(nn.Linear(4, 4), Block(), Block(), nn.Linear(4, 2)))
    assert [site.block for site in sites(model)] == [Position(n, 4) for n in (0, 1, 1, 2, 2, 3)]
    assert [site.group for site in sites(model)] == [Position(n, 6) for n in range(6)]
    assert [(site.index, site.count) for site in sites(model)] == [(n, 6) for n in range(6)]
    assert sites(model)[-1].weight_shape == (2, 4)


class Backwards(nn.Module):
    """Runs its layers from the last to the first; two of them read the same tensor, and one never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers[3](x) + self.layers[2](x)
        return self.layers[0](self.layers[1](y))


def test_numbers_by_execution_count_as_the_layers_run_and_layers_of_one_input_are_a_group():
    model = binarize_(Backwards()).train()
    number_by_execution_(model, lambda: model(torch.randn(2, 4)))
    found = {name: layer.weight_binarizer.site for name, layer in zip("abcde", binary_layers(model), strict=True)}
    assert {name: site.index for name, site in found.items()} == {"d": 0, "c": 1, "b": 2, "a": 3, "e": 4}
    assert {name: site.group for name, site in found.items()} == {
        "d": Position(0, 4),
        "c": Position(0, 4),
        "b": Position(1, 4),
        "a": Position(2, 4),
        "e": Position(3, 4),
    }
    assert model.training
    assert {site.count for site in found.values()} == {5}


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_is_packed_by_itself(training: bool):
    model = binarize_(nn.Sequential(nn.Linear(10, 3), nn.Linear(3, 2)), levels=lambda name: SignedLevels())
    model.train(training)
    other = pack_(copy.deepcopy(model))
    assert not other.training
    assert model.training == training
    assert [type(layer) for layer in model] == [BinaryLinear] * 2
    assert install_method(model)[0].weight_binarizer is not None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_packed_layer_that_is_made_empty_has_a_bias_if_it_is_to_have_one(device: str):
    for made in (PackedLinear(10, 3, device=device), PackedConv2d(10, 3, (2, 1), levels=SignedLevels(), device=device)):
        assert (made.bias.shape, made.bias.device.type) == ((3,), device)
        assert isinstance(made.bias, nn.Parameter)
        assert {t.device.type for t in made.state_dict().values()} == {device}
    assert PackedLinear(10, 3, bias=False).bias is None
    assert PackedConv2d(10, 3, (2, 1), bias=False, levels=SignedLevels()).bias is None


@pytest.mark.parametrize("aux", ["own", "lowrank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_of_a_methods_branch_have_the_dtype_of_the_layers(aux: str, dtype: torch.dtype):
    layer = binarize_(nn.Sequential(nn.Linear(8, 6, dtype=dtype)), Surge(aux=aux, rank=2))[0]
    shapes = {"own": [(6, 8)], "lowrank": [(6, 2), (2, 8)]}[aux]
    found = list(layer.around.parameters())
    assert [(tuple(parameter.shape), parameter.dtype) for parameter in found] == [(shape, dtype) for shape in shapes]
