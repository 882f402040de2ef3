"""A channel of zeros, as in a pruned checkpoint: it puts out exactly nothing, and learns under every method."""

import copy

import pytest
import torch
from tiny import EVERY_METHOD, method_id
from torch import Tensor, nn

from hf_bnn import binarize_, pack_
from hf_bnn.functional import WEIGHT_SCALINGS, learning_scale, silence, weight_scale
from hf_bnn.methods import METHODS, STE, Fsg, Method, Step
from hf_bnn.nn.levels import ElasticLevels, UnsignedLevels
from hf_bnn.training import begin_step, end_backward, hook_optimizer

every_method = pytest.mark.parametrize("method", EVERY_METHOD, ids=method_id)
every_kind = pytest.mark.parametrize("kind", ["linear", "conv"])
every_scaling = pytest.mark.parametrize("scaling", WEIGHT_SCALINGS)


def net_of(kind: str, method: Method, scaling: str, zeros: slice, **kwargs) -> tuple[nn.Sequential, Tensor]:
    """A network whose first layer has channels of zeros, and a batch for it."""
    torch.manual_seed(0)
    if kind == "linear":
        net, x = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)), torch.randn(16, 12)
    else:
        net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(128, 3))
        x = torch.randn(16, 4, 4, 4)
    with torch.no_grad():
        net[0].weight[zeros] = 0
    binarize_(net, method, skip=(str(len(net) - 1),), weight_scaling=scaling, **kwargs)
    return net.train(), x


def step(net: nn.Sequential, method: Method, x: Tensor, count: int = 1) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    hook_optimizer(net, optimizer, method)
    for index in range(count):
        now = Step(index, 100, 0.1)
        begin_step(net, now)
        nn.functional.cross_entropy(net(x), torch.arange(16) % 3).backward()
        end_backward(net, now)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("zeros", [slice(1), slice(None)], ids=["one channel", "the layer"])
@every_scaling
@every_kind
@every_method
def test_a_channel_of_zeros_learns_in_its_first_step(method: Method, kind: str, scaling: str, zeros: slice):
    net, x = net_of(kind, method, scaling, zeros)
    step(net, method, x)
    weight = net[0].weight
    assert weight.isfinite().all()
    assert weight.abs().max() < 10
    assert weight.flatten(1).any(1).all()
    with torch.no_grad():
        latent = net.eval()(x)
        assert torch.equal(pack_(copy.deepcopy(net), allow_unfinished=True)(x), latent)


@pytest.mark.parametrize("binarizer", ["dorefa", "bwn", "bwn_channel"])
def test_a_channel_of_zeros_learns_under_each_of_fsgs_binarizers(binarizer: str):
    for zeros in (slice(1), slice(None)):
        method = Fsg(binarizer=binarizer, update_norm="free")
        net, x = net_of("linear", method, "channel", zeros)
        step(net, method, x, 3)
        assert net[0].weight.flatten(1).any(1).all()
        assert net[0].weight.abs().max() < 10


@pytest.mark.parametrize("binarize", ["both", "weights"])
@pytest.mark.parametrize("levels", [None, UnsignedLevels, ElasticLevels, lambda: ElasticLevels(signed=False)])
@every_kind
def test_in_training_and_evaluation_a_channel_of_zeros_puts_out_its_bias_alone(kind: str, levels, binarize: str):
    kwargs = {"levels": levels and (lambda name: levels()), "binarize": binarize}
    net, x = net_of(kind, STE(), "channel", slice(0, 2), **kwargs)
    layer = net[0]
    bias = layer.bias[:2].view(2, *[1] * (x.dim() - 2))
    for training in (True, False):
        with torch.no_grad():
            y = layer.train(training)(x)
        assert torch.equal(y[:, :2], bias.expand_as(y[:, :2]))
        assert y[:, 2:].any()
    packed = pack_(copy.deepcopy(net))
    with torch.no_grad():
        assert torch.equal(packed(x), net.eval()(x))


@every_kind
@pytest.mark.parametrize("name", METHODS)
def test_the_input_and_the_other_channels_have_the_gradient_that_they_have_without_it(kind: str, name: str):
    """Its signs must not leak into the gradient of the input: what they are multiplied by is 0."""
    net, x = net_of(kind, METHODS[name](), "channel", slice(0))
    layer, G = net[0], torch.randn_like(net[0](x))
    with torch.no_grad():
        layer.weight[0] = 0
    found = []
    for silent in (False, True):
        twin, z, g = copy.deepcopy(layer), x.clone().requires_grad_(), G.clone()
        g[:, 0] *= not silent
        begin_step(twin, Step(0, 100, 0.1))
        twin(z).backward(g)
        found.append((z.grad, twin.weight.grad, twin.weight.grad[0].any()))
    (with_it, weights_with, alive), (without, weights_without, dead) = found
    if "surge" not in name:  # whose auxiliary branch has a channel of its own
        torch.testing.assert_close(with_it, without)
    torch.testing.assert_close(weights_with[1:], weights_without[1:])
    assert alive
    assert not dead


def test_the_scale_of_the_gradient_is_the_scale_itself_unless_that_is_0():
    weight = torch.tensor([[3.0, -1.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4, [float("nan")] * 4])
    found = learning_scale(weight_scale(weight[:3]), 4)
    assert found.tolist() == [1.0, pytest.approx(2 / 3), 1.0]
    assert learning_scale(torch.zeros(3), 16).tolist() == [0.25] * 3
    assert learning_scale(weight_scale(weight), 4)[3].isnan()


def test_signs_are_silenced_in_eager_and_in_compiled_code_alike():
    signs, scale = torch.ones(3, 4, requires_grad=True), torch.tensor([0.5, 0.0, 2.0])
    compiled = torch.compile(silence, fullgraph=True, backend="aot_eager")
    for run in (silence, compiled):
        signs.grad = None
        y = run(signs, scale)
        assert y.sum(1).tolist() == [4.0, 0.0, 4.0]
        y.sum().backward()
        assert torch.equal(signs.grad, torch.ones(3, 4))
    assert silence(signs, scale[::2].repeat(2)[:3]) is signs


def test_a_layer_without_zeros_trains_as_if_zeros_were_not_thought_of(monkeypatch):
    found = []
    for _ in range(2):
        net, x = net_of("linear", STE(), "channel", slice(0))
        step(net, STE(), x, 3)
        found.append([p.detach().clone() for p in net.parameters()])
        monkeypatch.setattr("hf_bnn.nn.latent.silence", lambda signs, scale: signs)
        monkeypatch.setattr("hf_bnn.nn.latent.learning_scale", lambda scale, inputs: scale)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
