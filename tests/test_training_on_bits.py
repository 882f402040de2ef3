"""Training steps whose products of signs run on bits: equal to those on floats, and what they keep of their inputs."""

import copy

import pytest
import torch
from tiny import EVERY_METHOD, NETS, Net, make_net, method_id, optimizer_of, train_steps
from torch import Tensor, nn

from hf_bnn import binarize_, kernels
from hf_bnn.estimators import Kept, normalized
from hf_bnn.functional import sign
from hf_bnn.methods import STE, Method, Step, Stompp, Surge
from hf_bnn.nn import sign_products
from hf_bnn.nn.attention import BinaryAttention
from hf_bnn.nn.layers import BinaryConv2d, BinaryLinear, binary_layers
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from hf_bnn.training import begin_step, end_backward

pytestmark = pytest.mark.skipif(kernels.backend() == "torch", reason="no compiled kernels")
every_method = pytest.mark.parametrize("method", EVERY_METHOD, ids=method_id)
every_net = pytest.mark.parametrize("kind", NETS)


def on_floats(net: Net) -> Net:
    for layer in binary_layers(net.model):
        layer.runs_on_bits = False
    return net


def products_on_bits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of product that will have run on bits."""
    found: list[str] = []
    for name in ("_SignProduct", "_SignMatmul"):
        forward = getattr(sign_products, name).forward

        def noted(ctx, *arguments, name: str = name, forward=forward):
            found.append(name)
            return forward(ctx, *arguments)

        monkeypatch.setattr(getattr(sign_products, name), "forward", staticmethod(noted))
    return found


@every_net
@every_method
def test_a_step_on_bits_has_the_outputs_and_gradients_of_one_on_floats(method: Method, kind: str):
    nets = {"bits": make_net(kind, method), "floats": on_floats(make_net(kind, method))}
    outputs, gradients = {}, {}
    for name, net in nets.items():
        outputs[name] = net.output().detach()
        net.loss().backward()
        gradients[name] = {key: p.grad for key, p in net.model.named_parameters() if p.grad is not None}
    assert torch.equal(outputs["bits"], outputs["floats"])
    assert gradients["bits"].keys() == gradients["floats"].keys()
    for key, expected in gradients["floats"].items():
        # The gradient of a learned width is that of inputs rounded to 1/64 of a unit of the levels.
        rounded = key.endswith("levels.width")
        scale = float(expected.abs().max())
        limits = {"rtol": 0.1, "atol": 0.02} if rounded else {"rtol": 1e-4, "atol": 1e-5 * scale + 1e-8}
        torch.testing.assert_close(gradients["bits"][key], expected, **limits, msg=key)


@pytest.mark.parametrize("kind", ["linear", "bert", "resnet", "matmul"])
def test_products_do_run_on_bits(kind: str, monkeypatch: pytest.MonkeyPatch):
    found = products_on_bits(monkeypatch)
    make_net(kind, STE()).loss().backward()
    layers = binary_layers(make_net(kind, STE()).model)
    assert len(found) == len(layers)
    assert {"_SignMatmul"} <= set(found) if kind == "matmul" else set(found) == {"_SignProduct"}
    found.clear()
    on_floats(make_net(kind, STE())).loss().backward()
    assert not found


@every_method
def test_a_part_that_says_it_emits_signs_does(method: Method):
    net = make_net("bert", method)
    for step in (Step(0, 100, 0.1), Step(50, 100, 0.1), Step(99, 100, 0.1)):
        begin_step(net.model, step)
        for layer in binary_layers(net.model):
            for slot, part in layer.parts():
                if slot == "around" or not part.emits_signs:
                    continue
                x = layer.weight if slot == "weight_binarizer" else torch.randn(3, layer.in_features)
                assert torch.equal(part(x), sign(x)), slot


def test_stompp_runs_on_bits_once_its_entries_are_frozen(monkeypatch: pytest.MonkeyPatch):
    found = products_on_bits(monkeypatch)
    net = make_net("linear", Stompp())
    layers = len(binary_layers(net.model))
    for index, expected in ((0, 0), (99, layers)):
        begin_step(net.model, Step(index, 100, 0.1))
        found.clear()
        net.output()
        assert len(found) == expected


def test_a_channel_of_zeros_falls_back_to_floats(monkeypatch: pytest.MonkeyPatch):
    found = products_on_bits(monkeypatch)
    layer = binarize_(nn.Sequential(nn.Linear(8, 4))).train()
    with torch.no_grad():
        layer[0].weight[1] = 0
    y = layer(torch.randn(3, 8))
    assert torch.equal(y[:, 1], layer[0].bias[1].expand(3))
    assert not found


# What is kept


def kept_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, without parameters; shared memory counts once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(*inputs)
    del output
    return sum(found.values())


@pytest.mark.parametrize(
    ("levels", "method", "most"),
    [
        (SignedLevels, STE(), 2 / 32),  # a bit for the sign, a bit for the clip bound
        (ElasticLevels, STE(), 1 / 4),  # a byte tells both, and the size
        (ElasticLevels, Surge(aux="leaky"), 1 / 4),
        (ElasticLevels, Surge(), 1.0),  # the auxiliary branch keeps the input, from which the rest is computed again
    ],
    ids=["signed", "elastic", "leaky", "own"],
)
def test_a_layer_keeps_little_of_its_input(levels: type[SignedLevels], method: Method, most: float):
    model = binarize_(nn.Sequential(nn.Linear(512, 64)), method, levels=lambda _: levels()).train()
    x = torch.randn(256, 512, requires_grad=True)
    on_the_side = 4096  # the scales
    assert kept_bytes(model, x) <= most * 4 * x.numel() + on_the_side
    model[0].runs_on_bits = False
    assert kept_bytes(model, x) > 4 * x.numel() + on_the_side


def test_attention_keeps_its_probabilities_once():
    attention = binarize_(nn.Sequential(nn.Linear(4, 4))).train()  # a method for the parts below
    model = BinaryAttention().train()
    for layer in binary_layers(model):
        layer.install(STE(), next(part.site for _, part in attention[0].parts()))
    heads = torch.randn(3, 2, 2, 128, 64, requires_grad=True).unbind()
    scores = 2 * 2 * 128 * 128 * 4
    inputs = sum(4 * x.numel() for x in heads)
    assert kept_bytes(model, *heads) <= scores + inputs / 4 + scores / 32 + inputs / 32 + 4096


def test_a_kept_input_gives_the_gradients_of_the_formula():
    x = torch.randn(50, 40, requires_grad=True)
    threshold, scale = torch.tensor(0.3, requires_grad=True), torch.tensor(1.7, requires_grad=True)
    grad = torch.randn(50, 40)
    u = (x - threshold) / scale
    expected = torch.autograd.grad(u, (x, threshold, scale), grad)
    for retained in (False, True):
        found = normalized(x, threshold, scale, compact=True, retained=retained)
        assert torch.equal(found, (x - threshold).div(scale))
        kept = Kept.of(found)
        assert len(kept.tensors) == (3 if retained else 1)
        gradients = torch.autograd.grad(found, (x, threshold, scale), grad)
        torch.testing.assert_close(gradients[:2], expected[:2])
        limits = {} if retained else {"rtol": 0.05, "atol": 0.5}
        torch.testing.assert_close(gradients[2], expected[2], **limits)


# Layers and settings


@pytest.mark.parametrize("levels", [SignedLevels, UnsignedLevels, ElasticLevels, lambda: ElasticLevels(signed=False)])
@pytest.mark.parametrize("shape", [(4, 6, 9, 7), (6, 9, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_on_bits_equals_one_on_floats(levels, shape: tuple[int, ...], layout: torch.memory_format):
    if len(shape) == 3 and layout is torch.channels_last:
        pytest.skip("needs four dimensions")
    torch.manual_seed(0)
    layers = [BinaryConv2d(6, 20, 3, stride=2, padding=1, dilation=1, levels=levels()).train()]
    layers.append(copy.deepcopy(layers[0]))
    results = []
    for layer, bits in zip(layers, (True, False), strict=True):
        layer.install(STE(), _site(layer))
        layer.runs_on_bits = bits
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
        y = layer(x.requires_grad_())
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad, layer.bias.grad))
    assert torch.equal(results[0][0], results[1][0])
    for found, expected in zip(*(result[1:] for result in results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _site(layer: nn.Module):
    return next(part.site for _, part in binarize_(nn.Sequential(nn.Linear(2, 2)))[0].parts())._replace(
        weight_shape=tuple(layer.weight.shape)
    )


def test_weights_are_packed_once_in_an_optimizer_step(monkeypatch: pytest.MonkeyPatch):
    packed: list[tuple[int, ...]] = []
    pack = sign_products.PackedSigns.of.__func__

    def noted(cls, latent: Tensor):
        packed.append(tuple(latent.shape))
        return pack(cls, latent)

    monkeypatch.setattr(sign_products.PackedSigns, "of", classmethod(noted))
    net = make_net("linear", STE())
    layers, optimizer = len(binary_layers(net.model)), optimizer_of(net)
    expected = []
    for index in range(2):
        begin_step(net.model, Step(index, 10, 0.1))
        for half in net.halves():
            half.loss().backward()
        end_backward(net.model, Step(index, 10, 0.1))
        optimizer.step()
        expected.append(len(packed))
    assert expected == [layers, 2 * layers]
    packed.clear()
    net.loss().backward()  # outside a step nobody says when weights change
    net.loss().backward()
    assert len(packed) == 2 * layers


def test_a_weight_that_changes_within_a_step_is_packed_anew():
    net = make_net("linear", STE())
    layer = binary_layers(net.model)[0]
    begin_step(net.model, Step(0, 10, 0.1))
    x = torch.randn(3, layer.in_features)
    before = layer(x)
    with torch.no_grad():
        layer.weight.neg_()
    bias = 0 if layer.bias is None else layer.bias
    shifted = layer.input_levels.shifted
    assert shifted or torch.allclose(layer(x) - bias, bias - before, atol=1e-5)
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", ["bert", "linear"])
def test_sums_are_exact_under_autocast(kind: str):
    net = make_net(kind, STE())
    layer = next(layer for layer in binary_layers(net.model) if isinstance(layer, BinaryLinear))
    x = torch.randn(5, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        rounded = layer(x.bfloat16())
    assert torch.equal(found, layer(x))
    assert torch.equal(rounded, layer(x.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        net.loss().backward()
    assert all(p.grad.isfinite().all() for p in net.model.parameters() if p.grad is not None)


def test_products_of_the_backward_pass_may_run_in_bfloat16(monkeypatch: pytest.MonkeyPatch):
    gradients = []
    for fast in (True, False):
        monkeypatch.setattr(sign_products, "_multiplies_bfloat16", lambda fast=fast: fast)
        net = make_net("linear", STE())
        with torch.autocast("cpu", torch.bfloat16):
            loss = net.loss()
        loss.backward()
        gradients.append(binary_layers(net.model)[0].weight.grad)
    assert gradients[0].dtype == torch.float32
    assert not torch.equal(*gradients)
    torch.testing.assert_close(*gradients, rtol=0.1, atol=0.02)


def test_a_backward_pass_may_run_under_another_backend():
    gradients = []
    for backend in (kernels.backend(), "torch"):
        net = make_net("bert", STE())
        loss = net.loss()
        with kernels.using(backend):
            loss.backward()
        gradients.append([p.grad for p in net.model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_training_on_bits_learns_as_training_on_floats_does():
    nets = make_net("linear", STE()), on_floats(make_net("linear", STE()))
    losses = [train_steps(net, optimizer_of(net), range(30)) for net in nets]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-5)
    assert losses[0][-1] < 0.8 * losses[0][0]
