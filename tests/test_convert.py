"""Float to binary to packed and back: which layers, in which order, and the errors where there are none."""

from collections.abc import Callable

import pytest
import torch
from tiny import make_net, optimizer_of, tiny_model, train_steps
from torch import Tensor, nn

from hf_bnn import binarize_, calibrate_, install_method, pack_, unpack_
from hf_bnn.convert import empty_packed_, replace_modules, to_binary_, to_packed_
from hf_bnn.install import drop_method
from hf_bnn.methods import Method, Part, Site, Surge
from hf_bnn.nn.attention import BinaryMatmul
from hf_bnn.nn.embeddings import Int8Embedding
from hf_bnn.nn.layers import BinaryLinear, binary_layers
from hf_bnn.nn.levels import ElasticLevels, UnsignedLevels
from hf_bnn.selection import choose_layers, matches


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3))


def kinds(model: nn.Module) -> dict[str, str]:
    """The class of every leaf that has a weight."""
    return {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}


# binarize_


def test_every_linear_layer_becomes_binary_unless_a_pattern_skips_it():
    assert kinds(binarize_(net())) == {"0": "BinaryLinear", "1.0": "BinaryLinear", "2": "BinaryLinear"}
    assert kinds(binarize_(net(), skip=("1.*",))) == {"0": "BinaryLinear", "1.0": "Linear", "2": "BinaryLinear"}
    assert kinds(binarize_(net(), skip=["0", "2"])) == {"0": "Linear", "1.0": "BinaryLinear", "2": "Linear"}


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("bert.pooler.dense", ("*pooler*",), True),
        ("classifier", ("classifier",), True),
        ("bert.classifier", ("classifier",), False),
        ("layer.3.key", ("layer.[0-2].*",), False),
        ("layer.A", ("layer.a",), False),
        ("x", (), False),
    ],
)
def test_patterns_are_matched_like_those_of_a_shell_with_case(name: str, patterns: tuple[str, ...], expected: bool):
    assert matches(name, patterns) == expected


def test_the_float_weights_become_the_latent_ones():
    model = net()
    weights = list(model.parameters())
    assert all(map(lambda a, b: a is b, binarize_(model).parameters(), weights))


def test_levels_and_the_kind_of_binarization_are_given_to_every_layer():
    asked = []

    def levels(name: str) -> UnsignedLevels:
        asked.append(name)
        return UnsignedLevels()

    model = binarize_(net(), binarize="activations", levels=levels)
    assert asked == ["0", "1.0", "2"]
    assert all(isinstance(layer.input_levels, UnsignedLevels) for layer in binary_layers(model))
    assert {layer.binarize for layer in binary_layers(model)} == {"activations"}


def test_subclasses_of_linear_are_left_alone():
    class Special(nn.Linear):
        pass

    model = binarize_(nn.Sequential(Special(4, 4), nn.Linear(4, 4)))
    assert [type(module) for module in model] == [Special, BinaryLinear]


def test_nothing_to_binarize_is_an_error_that_names_the_patterns():
    with pytest.raises(
        ValueError,
        match=r"nothing to binarize in Sequential: no layer outside exclude=\['\*'\] is one of \['Linear', 'Conv2d'\]",
    ):
        binarize_(net(), skip=["*"])
    with pytest.raises(ValueError, match="nothing to binarize"):
        binarize_(nn.Sequential(nn.ReLU()))


def test_an_unknown_kind_of_binarization_is_an_error():
    with pytest.raises(ValueError, match="binarize='x': expected one of both, weights, activations"):
        binarize_(net(), binarize="x")


def test_to_binary_leaves_the_slots_empty():
    model = net()
    to_binary_(model, choose_layers(model, None, []))
    assert not [part for layer in binary_layers(model) for part in layer.parts()]
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.ones(2, 6)), install_method(model)(torch.ones(2, 6)))


def test_replaced_modules_are_named_and_the_root_is_not_among_them():
    model = net()
    names = replace_modules(model, lambda name, module: nn.Identity() if isinstance(module, nn.Linear) else None)
    assert names == ["0", "1.0", "2"]
    linear = nn.Linear(2, 2)
    assert replace_modules(linear, lambda name, module: nn.Identity()) == []


# install_method


class Noting(Method):
    """Notes the sites that it is asked about."""

    def __init__(self) -> None:
        object.__setattr__(self, "sites", [])
        super().__init__()

    def around(self, site: Site, layer: nn.Module) -> Part:
        self.sites.append(site)
        return super().around(site, layer)


def test_every_layer_is_told_where_it_is():
    method = Noting()
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    binarize_(model).append(BinaryMatmul(ElasticLevels(), ElasticLevels()))
    install_method(model, method)
    assert [site[:3] for site in method.sites] == [(0, 3, (8, 6)), (1, 3, (3, 8)), (2, 3, None)]


def test_a_new_method_takes_the_place_of_the_old_one():
    model = binarize_(net(), Surge())
    plain = binarize_(net()).state_dict().keys()
    assert model.state_dict().keys() > plain
    assert install_method(model).state_dict().keys() == plain


@pytest.mark.parametrize("training", [True, False])
def test_parts_are_in_the_mode_of_their_layer(training: bool):
    model = install_method(binarize_(net()).train(training), Surge())
    assert {part.training for layer in binary_layers(model) for _, part in layer.parts()} == {training}


# calibrate_


class Scaled(nn.Module):
    """Two binary layers; the second reads the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_calibration_fits_the_first_layers_first_and_leaves_the_mode_as_it_was():
    model = binarize_(Scaled(), levels=lambda name: ElasticLevels()).train()
    x = 30 * torch.randn(64, 8)
    calibrate_(model, lambda: model(x))
    assert model.training
    assert model.first.input_levels.width.item() == pytest.approx(x.abs().mean().item())
    with torch.no_grad():
        seen_by_second = model.eval().first(x)
    assert model.second.input_levels.width.item() == pytest.approx(seen_by_second.abs().mean().item(), rel=1e-5)


def test_calibration_reaches_both_sides_of_a_product_of_activations():
    model = nn.Sequential(install_method(BinaryMatmul(ElasticLevels(), ElasticLevels(signed=False))))
    calibrate_(model, lambda: model[0](torch.full((3, 4), 5.0), torch.full((4, 2), 0.5)))
    assert (model[0].left_levels.width.item(), model[0].right_levels.width.item()) == (5.0, 0.5)


def test_calibration_takes_its_hooks_away_even_when_the_run_fails():
    model = binarize_(net(), levels=lambda name: ElasticLevels()).train()
    with pytest.raises(RuntimeError):
        calibrate_(model, lambda: model(torch.randn(2, 7)))
    assert model.training
    assert not [layer for layer in binary_layers(model) if layer._forward_pre_hooks]


# pack_, unpack_


def test_packing_replaces_every_layer_with_binary_weights_and_evaluates():
    model = pack_(binarize_(net(), skip=("0",)).train())
    assert kinds(model) == {"0": "Linear", "1.0": "PackedLinear", "2": "PackedLinear"}
    assert not model.training


def test_nothing_to_pack_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="nothing to pack in Sequential: it has no binary weights and no rounded emb"):
        pack_(net())
    with pytest.raises(ValueError, match="nothing to pack in Sequential: it has no binary weights"):
        pack_(binarize_(net(), binarize="activations"))
    with pytest.raises(ValueError, match="nothing to pack in Sequential: it is packed already"):
        pack_(pack_(binarize_(net())))


def test_nothing_to_unpack_is_an_error():
    with pytest.raises(ValueError, match="nothing to unpack: Sequential has no packed layer"):
        unpack_(binarize_(net()))


def test_packing_leaves_nothing_of_the_method_in_any_layer():
    model = pack_(tiny_model(attention="binary"))
    assert binary_layers(model)
    assert not [part for layer in binary_layers(model) for part in layer.parts()]
    model = binarize_(net(), Surge())
    drop_method(model)
    assert list(model.state_dict()) == list(net().state_dict())


def test_an_empty_packed_model_takes_the_state_dict_of_a_full_one():
    full = pack_(tiny_model())
    with torch.device("meta"):
        empty = empty_packed_(tiny_model())
    missing, unexpected = empty.load_state_dict(full.state_dict(), assign=True)
    assert (missing, unexpected) == ([], [])
    assert {name: type(module) for name, module in empty.named_modules()} == {
        name: type(module) for name, module in full.named_modules()
    }


def test_an_unpacked_model_computes_the_same_and_can_be_trained():
    tiny = make_net("bert", Surge())
    with torch.no_grad():
        pack_(tiny.model)
        expected = tiny.output()
        unpack_(tiny.model)
        torch.testing.assert_close(tiny.output(), expected)
    tiny.model.train()
    losses = train_steps(tiny, optimizer_of(tiny), range(10))
    assert losses[-1] < losses[0]


def test_unpacking_keeps_the_mode_and_the_kind_of_binarization():
    model = unpack_(pack_(binarize_(net(), binarize="weights")))
    assert {(layer.binarize, layer.training) for layer in binary_layers(model)} == {("weights", False)}


@pytest.mark.parametrize("binary", [lambda: binarize_(net()), lambda: pack_(binarize_(net())), tiny_model])
def test_a_binary_model_is_not_binarized_again(binary: Callable[[], nn.Module]):
    model = binary()
    before = kinds(model)
    message = rf"{type(model).__name__} is binary already: call hf_bnn.install_method\(model, method\) to change its"
    with pytest.raises(ValueError, match=message):
        binarize_(model)
    assert kinds(model) == before


def test_calibration_leaves_a_frozen_module_in_evaluation():
    model = binarize_(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)), levels=lambda name: ElasticLevels()).train()
    model[0].eval()
    calibrate_(model, lambda: model(torch.randn(4, 8)))
    assert [module.training for module in model] == [False, True]


class Mixed(nn.Module):
    """Every kind of layer that packing replaces, and one that stays float."""

    def __init__(self, device: str):
        super().__init__()
        self.table = Int8Embedding.from_float(nn.Embedding(7, 10, 2, device=device))
        self.first = nn.Linear(10, 6, bias=False, device=device)
        self.conv = nn.Conv2d(6, 12, 3, padding="same", groups=2, device=device)
        self.narrow = nn.Linear(6, 4, device=device, dtype=torch.float16)
        self.shared = self.first
        self.head = nn.Linear(4, 2, device=device)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("binarize", ["both", "weights", "activations"])
@pytest.mark.parametrize("levels", [None, lambda name: ElasticLevels(name != "narrow")], ids=["plain", "elastic"])
def test_float_layers_become_packed_as_by_way_of_latent_ones(device: str, binarize: str, levels):
    direct, stepwise = Mixed(device), Mixed(device)
    arguments = (binarize, levels, "layer")
    to_packed_(direct, choose_layers(direct, None, ["head"]), *arguments)
    empty_packed_(to_binary_(stepwise, choose_layers(stepwise, None, ["head"]), *arguments))
    one, other = (described(model) for model in (direct, stepwise))
    assert one == other
    assert direct.shared is direct.first
    assert not any(module.training for module in direct.modules())


def described(model: nn.Module) -> dict[str, tuple]:
    """All that is set in each module but the values of its parameters: class, attributes, keys, types, devices."""

    def of(tensor):
        return None if tensor is None else (type(tensor), tensor.dtype, tensor.device, tensor.shape)

    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        tensors = {**module._parameters, **module._buffers}
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        found[name] = (type(module), {k: of(t) for k, t in tensors.items()}, list(module._modules), plain)
    return found
