"""IR-Net, ReSTE, XNOR-Net and DoReFa-Net against their papers' formulas, restated entry by entry or by autograd."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import linear_net, make_net, optimizer_of, train_steps
from torch import Tensor, nn

from hf_bnn import binarize_, install_method, pack_
from hf_bnn.functional import WEIGHT_SCALINGS, weight_scale
from hf_bnn.methods import STE, XNOR, DoReFa, IRNet, Method, Part, ReSTE, Site, Step, Surge, method_from_dict
from hf_bnn.nn.layers import BinaryConv2d, BinaryLinear, binary_layers
from hf_bnn.nn.levels import ElasticLevels
from hf_bnn.training import begin_step, end_backward, hook_optimizer

SHAPES = {"linear": (8, 12), "conv2d": (6, 4, 3, 3)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_scaling = pytest.mark.parametrize("scaling", WEIGHT_SCALINGS)
every_progress = pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
EVERY_BASELINE = (XNOR(), DoReFa(), IRNet(), IRNet(libra=False), ReSTE())
every_baseline = pytest.mark.parametrize("method", EVERY_BASELINE, ids=["xnor", "dorefa", "ir_net", "ede", "reste"])
X = [-30.0, -1.6, -1.5, -1.0, -0.5, -0.11, -0.1, -0.01, -0.0, 0.0, 0.02, 0.1, 0.25, 0.75, 1.0, 1.5, 1.51]


def site_of(shape: tuple[int, ...], scaling: str = "channel") -> Site:
    return Site(0, 1, shape, scaling)


def at(progress: float, part: Part) -> Part:
    """The part as it is when `progress` of 1000 steps are done."""
    part.begin_step(nn.Module(), Step(round(1000 * progress), 1000, 0.1))
    return part


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, G: Tensor) -> Tensor:
    """dL/dx of L = sum(G function(x))."""
    x = x.detach().clone().requires_grad_()
    function(x).backward(G)
    return x.grad


def doubles(*shape: int) -> tuple[Tensor, Tensor]:
    """A latent weight of a pretrained transformer's size, and G."""
    return 0.03 * torch.randn(shape, dtype=torch.float64) + 0.01, torch.randn(shape, dtype=torch.float64)


def deviation(weight: Tensor) -> Tensor:
    """The standard deviation per output channel, in a shape that broadcasts."""
    return weight.flatten(1).std(1).view(-1, *[1] * (weight.dim() - 1))


# IR-Net


def paper_t(progress: float, low: float = 0.1, high: float = 10.0) -> float:
    return low * 10 ** (progress * math.log10(high / low))


def ede(x: Tensor, progress: float) -> Tensor:
    """g(x) = k tanh(t x), of which autograd takes the gradient."""
    t = paper_t(progress)
    return max(1 / t, 1) * torch.tanh(t * x)


def libra(weight: Tensor) -> Tensor:
    """W_std of the paper: balanced and standardized per output channel."""
    rows = weight.flatten(1)
    balanced = rows - rows.mean(1, keepdim=True)
    return (balanced / balanced.std(1, keepdim=True)).view(weight.shape)


@every_progress
def test_the_sharpness_grows_as_the_paper_says(progress: float):
    assert IRNet().sharpness(progress) == pytest.approx(paper_t(progress))
    assert IRNet(t_min=0.01, t_max=1.0).sharpness(progress) == pytest.approx(paper_t(progress, 0.01, 1.0))


@every_progress
def test_the_gradient_of_inputs_is_that_of_the_error_decay_estimator(progress: float):
    x, G = torch.tensor(X, dtype=torch.float64), torch.randn(len(X), dtype=torch.float64)
    part = at(progress, IRNet().input_binarizer(site_of((8, 12)), (12,)))
    expected = gradient(lambda x: ede(x, progress), x, G)
    torch.testing.assert_close(gradient(part, x, G), expected, rtol=1e-5, atol=1e-6)


@every_progress
@every_shape
def test_the_gradient_of_weights_goes_through_estimator_and_standardization(shape: tuple[int, ...], progress: float):
    weight, G = doubles(*shape)
    weight -= weight.flatten(1).mean(1).view(-1, *[1] * (len(shape) - 1))  # as begin_step leaves it
    part = IRNet().weight_binarizer(site_of(shape))
    part.t.fill_(paper_t(progress))
    expected = gradient(lambda w: ede(libra(w), progress), weight, G)
    torch.testing.assert_close(gradient(part, weight, G), expected, rtol=1e-5, atol=1e-5)


@every_shape
def test_the_gradient_of_weights_that_are_not_balanced_yet_is_the_papers_too(shape: tuple[int, ...]):
    weight, G = doubles(*shape)
    part = IRNet().weight_binarizer(site_of(shape))
    expected = gradient(lambda w: ede(libra(w), 0.0), weight, G)
    torch.testing.assert_close(gradient(part, weight, G), expected, rtol=1e-5, atol=1e-5)


@every_progress
@every_shape
def test_without_libra_weights_take_the_estimator_in_units_of_their_deviation(shape: tuple[int, ...], progress: float):
    weight, G = doubles(*shape)
    part = at(progress, IRNet(libra=False).weight_binarizer(site_of(shape)))
    expected = gradient(lambda x: ede(x, progress), weight / deviation(weight), G)
    torch.testing.assert_close(gradient(part, weight, G), expected, rtol=1e-5, atol=1e-6)


def test_the_oracles_of_ir_net_can_fail():
    weight, G = doubles(8, 12)
    part = IRNet().weight_binarizer(site_of((8, 12)))
    found = gradient(part, weight, G)
    assert not torch.allclose(found, gradient(lambda w: ede(libra(w), 0.5), weight, G), rtol=1e-2)
    assert not torch.allclose(found, gradient(lambda w: ede(w / deviation(w), 0.0), weight, G), rtol=1e-2)
    assert not torch.allclose(found, gradient(lambda w: w, weight, G), rtol=1e-2)


def test_the_estimator_starts_almost_as_the_identity():
    part = IRNet().input_binarizer(site_of((8, 12)), (12,))
    x = torch.linspace(-1, 1, 9)
    torch.testing.assert_close(gradient(part, x, torch.ones(9)), torch.ones(9), rtol=0, atol=0.01)


def test_the_end_of_the_schedule_is_not_passed():
    assert IRNet().sharpness(1.5) == IRNet().sharpness(1.0)
    assert ReSTE().order(1.5) == ReSTE().order(1.0)


def means(model: nn.Module) -> Tensor:
    return torch.cat([layer.weight.flatten(1).mean(1) for layer in binary_layers(model)]).detach()


def shifted_net(method: Method) -> nn.Sequential:
    """Two layers, linear and convolution, whose weights are out of balance."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(2), nn.Linear(9, 5))
    binarize_(model, method)
    with torch.no_grad():
        for layer in binary_layers(model):
            layer.weight.add_(0.1)
    return model.train()


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, 0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weights_are_balanced_from_the_first_forward_and_after_every_step_of_any_optimizer(optimizer):
    method = IRNet()
    model = shifted_net(method)
    optimizer = optimizer([{"params": layer.parameters()} for layer in binary_layers(model)])
    hook_optimizer(model, optimizer, method)
    assert means(model).abs().min() > 0.01
    x = torch.randn(2, 4, 3, 3)
    for index in range(3):
        step = Step(index, 10, 0.1)
        begin_step(model, step)
        assert means(model).abs().max() < 1e-7
        before = [layer.weight.detach().clone() for layer in binary_layers(model)]
        model(x).square().sum().backward()
        end_backward(model, step)
        optimizer.step()
        assert means(model).abs().max() < 1e-7
        assert all(not torch.equal(layer.weight, b) for layer, b in zip(binary_layers(model), before, strict=True))


def test_only_the_first_step_balances_by_itself():
    model = shifted_net(IRNet())
    begin_step(model, Step(1, 10, 0.1))
    assert means(model).abs().min() > 0.01


def test_frozen_weights_are_left_alone():
    method = IRNet()
    model = shifted_net(method)
    frozen, learning = binary_layers(model)
    frozen.weight.requires_grad_(False)
    before = frozen.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook_optimizer(model, optimizer, method)
    begin_step(model, Step(0, 10, 0.1))
    model(torch.randn(2, 4, 3, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(frozen.weight, before)
    assert learning.weight.flatten(1).mean(1).abs().max() < 1e-7


def test_a_method_that_comes_after_is_not_balanced_by_the_old_hook():
    method = IRNet()
    model = shifted_net(method)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook_optimizer(model, optimizer, method)
    install_method(model, STE())
    model(torch.randn(2, 4, 3, 3)).sum().backward()
    optimizer.step()
    assert means(model).abs().max() > 0.01


def test_sign_of_weight_is_sign_of_the_balanced_weight_and_evaluation_computes_what_training_did():
    net = linear_net()._replace(method=IRNet())
    install_method(net.model, net.method).train()
    train_steps(net, optimizer_of(net), range(3))
    for layer in binary_layers(net.model):
        balanced = layer.weight - layer.weight.mean(1, keepdim=True)
        assert torch.equal(layer.weight < 0, balanced < 0)
    with torch.no_grad():
        training = net.output()
        net.model.eval()
        assert torch.equal(net.output(), training)
        assert torch.equal(net._replace(model=pack_(net.model)).output(), training)


def test_an_optimizer_that_was_never_hooked_is_an_error_that_says_what_to_call():
    model = shifted_net(IRNet())
    with pytest.raises(RuntimeError, match=r"call hf_bnn.training.hook_optimizer\(model, optimizer, method\) first"):
        end_backward(model, Step(0, 10, 0.1))


def test_without_libra_there_is_nothing_to_hook_and_no_mean_to_take_away():
    method = IRNet(libra=False)
    model = shifted_net(method)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = means(model)
    begin_step(model, Step(0, 10, 0.1))
    hook_optimizer(model, optimizer, method)
    end_backward(model, Step(0, 10, 0.1))
    optimizer.step()
    assert torch.equal(means(model), before)
    assert method.claims() == {"weight_binarizer", "input_binarizer"}
    assert IRNet().claims() == {"weight_binarizer", "input_binarizer", "optimizer_hook"}


@pytest.mark.parametrize("layer", [nn.Linear(1, 4), nn.Conv2d(4, 4, 1, groups=4)], ids=["linear", "depthwise"])
def test_a_channel_of_one_weight_cannot_be_balanced(layer: nn.Module):
    with pytest.raises(
        ValueError, match="one entry per output channel, which cannot be balanced: leave the layer float"
    ):
        binarize_(nn.Sequential(layer), IRNet())
    binarize_(nn.Sequential(layer), IRNet(libra=False))


@pytest.mark.parametrize("method", [IRNet(), IRNet(libra=False), ReSTE()], ids=["ir_net", "ede", "reste"])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_channel_has_a_finite_gradient(method: Method, value: float):
    part = method.weight_binarizer(site_of((3, 4)))
    found = gradient(part, torch.full((3, 4), value), torch.randn(3, 4))
    assert found.isfinite().all()
    assert found.any()


def test_ir_net_trains_beside_surge():
    net = make_net("linear", IRNet() + Surge())
    losses = train_steps(net, optimizer_of(net), range(20))
    assert losses[-1] < 0.5 * losses[0]
    assert means(net.model).abs().max() < 1e-7


# ReSTE


def paper_o(progress: float, end: float = 3.0) -> float:
    """A quarter of a cosine, upside down: slow at first, as in the authors' code."""
    return end - (end - 1) * math.cos(progress * math.pi / 2)


def test_the_order_grows_from_1_to_its_end_and_slowly_at_first():
    orders = [ReSTE(o_end=3.0).order(step / 100) for step in range(101)]
    assert (orders[0], orders[100]) == (1.0, pytest.approx(3.0))
    assert orders[50] == pytest.approx(3 - 2**0.5)
    steps = [later - earlier for earlier, later in itertools.pairwise(orders)]
    assert steps == sorted(steps)
    assert steps[0] > 0


def reste(x: float, o: float, t: float = 1.5, m: float = 0.1) -> float:
    """The truncated derivative of sign(x) |x|^(1/o), entry by entry."""
    if abs(x) > t:
        return 0.0
    if abs(x) <= m:
        return m ** (1 / o) / m
    return 1 / o * abs(x) ** ((1 - o) / o)


@every_progress
def test_the_gradient_of_inputs_is_that_of_the_rectified_estimator(progress: float):
    part = at(progress, ReSTE().input_binarizer(site_of((8, 12)), (12,)))
    found = gradient(part, torch.tensor(X, dtype=torch.float64), torch.ones(len(X), dtype=torch.float64))
    assert found.tolist() == pytest.approx([reste(x, paper_o(progress)) for x in X], rel=1e-6)


@every_progress
@every_shape
def test_the_gradient_of_weights_is_the_same_at_weights_over_their_deviation(shape: tuple[int, ...], progress: float):
    weight, G = doubles(*shape)
    part = at(progress, ReSTE().weight_binarizer(site_of(shape)))
    units = (weight / deviation(weight)).flatten().tolist()
    expected = [g * reste(x, paper_o(progress)) for x, g in zip(units, G.flatten().tolist(), strict=True)]
    assert gradient(part, weight, G).flatten().tolist() == pytest.approx(expected, rel=1e-6)


@every_progress
def test_weights_that_are_not_standardized_have_the_gradient_of_inputs(progress: float):
    weight, G = doubles(8, 12)
    part = at(progress, ReSTE(standardize=False).weight_binarizer(site_of((8, 12))))
    values = zip(weight.flatten().tolist(), G.flatten().tolist(), strict=True)
    expected = [g * reste(w, paper_o(progress)) for w, g in values]
    assert gradient(part, weight, G).flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_between_its_bounds_the_gradient_is_that_of_the_power_function():
    x = torch.tensor([-1.4, -0.3, 0.11, 0.7, 1.49], dtype=torch.float64)
    part = at(1.0, ReSTE(o_end=3.0).input_binarizer(site_of((8, 12)), (12,)))
    expected = gradient(lambda x: x.sign() * x.abs() ** (1 / 3), x, torch.ones_like(x))
    torch.testing.assert_close(gradient(part, x, torch.ones_like(x)), expected, rtol=1e-6, atol=0)


def test_the_bounds_are_those_that_are_set():
    part = at(1.0, ReSTE(o_end=2.0, threshold=0.8, interval=0.3).input_binarizer(site_of((8, 12)), (12,)))
    found = gradient(part, torch.tensor(X, dtype=torch.float64), torch.ones(len(X), dtype=torch.float64))
    assert found.tolist() == pytest.approx([reste(x, 2.0, 0.8, 0.3) for x in X], rel=1e-6)


def test_at_the_start_it_is_the_straight_through_estimator():
    part = ReSTE().input_binarizer(site_of((8, 12)), (12,))
    assert gradient(part, torch.tensor(X), torch.ones(len(X))).tolist() == [float(abs(x) <= 1.5) for x in X]


def test_the_oracle_of_reste_can_fail():
    part = at(1.0, ReSTE().input_binarizer(site_of((8, 12)), (12,)))
    found = gradient(part, torch.tensor(X), torch.ones(len(X))).tolist()
    assert found == pytest.approx([reste(x, 3.0) for x in X], rel=1e-4)
    assert found != pytest.approx([reste(x, 2.9) for x in X], rel=1e-4)
    assert found != pytest.approx([reste(x, 3.0, m=0.09) for x in X], rel=1e-4)
    assert found != pytest.approx([reste(x, 3.0, t=1.505) for x in X if x != 1.5] + [0.0], rel=1e-4)


# XNOR-Net, DoReFa-Net


def layer_and_reference(shape: tuple[int, ...], scaling: str, method: Method) -> tuple[nn.Module, Tensor]:
    """A binary layer after a backward pass, and dL/dW_hat: what a float layer with W_hat = s sign(W) as weight gets."""
    if len(shape) == 2:
        layer, x = BinaryLinear(shape[1], shape[0], weight_scaling=scaling), torch.randn(5, shape[1])
    else:
        layer = BinaryConv2d(shape[1], shape[0], shape[2:], padding=1, weight_scaling=scaling)
        x = torch.randn(3, shape[1], 5, 5)
    layer = install_method(layer.double(), method)
    with torch.no_grad():
        layer.weight.mul_(12)  # some are beyond 1
        layer.weight.flatten()[:2] = torch.tensor([1.0, -1.0])
    x = x.double()
    y = layer(x)
    G = torch.randn_like(y)
    y.backward(G)
    scale = weight_scale(layer.weight, scaling).double().view(-1, *[1] * (len(shape) - 1))
    W_hat = (scale * torch.where(layer.weight < 0, -1.0, 1.0)).detach().requires_grad_()
    signs = torch.where(x < 0, -1.0, 1.0).double()
    operator = F.linear(signs, W_hat) if len(shape) == 2 else F.conv2d(signs, W_hat, padding=1)
    operator.backward(G)
    return layer, W_hat.grad


@every_scaling
@every_shape
def test_dorefa_hands_the_gradient_of_the_scaled_weight_to_the_latent_one(shape: tuple[int, ...], scaling: str):
    layer, expected = layer_and_reference(shape, scaling, DoReFa())
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_the_oracle_of_dorefa_can_fail():
    layer, expected = layer_and_reference((8, 12), "layer", STE())
    assert not torch.allclose(layer.weight.grad, expected, rtol=1e-2)


def xnor(weight: Tensor, grad: Tensor, scaling: str) -> list[float]:
    """dL/dW_i = dL/dW_hat_i (1/n + 1{|W_i| <= 1} alpha), entry by entry."""
    expected = []
    everything = weight.flatten().tolist()
    for row, row_grad in zip(weight.flatten(1).tolist(), grad.flatten(1).tolist(), strict=True):
        shared = row if scaling == "channel" else everything
        n, alpha = len(shared), sum(map(abs, shared)) / len(shared)
        for w, g in zip(row, row_grad, strict=True):
            inside = float(abs(w) <= 1)
            expected.append(g * inside if scaling == "none" else g * (1 / n + inside * alpha))
    return expected


@every_scaling
@every_shape
def test_xnor_net_has_the_gradient_that_its_paper_prints(shape: tuple[int, ...], scaling: str):
    layer, grad = layer_and_reference(shape, scaling, XNOR())
    assert (layer.weight.abs() > 1).any()
    found = layer.weight.grad.flatten().tolist()
    assert found == pytest.approx(xnor(layer.weight.detach(), grad, scaling), rel=1e-5, abs=1e-6)


def test_the_oracle_of_xnor_net_can_fail():
    layer, grad = layer_and_reference((8, 12), "channel", XNOR())
    found = layer.weight.grad.flatten().tolist()
    assert found != pytest.approx(xnor(layer.weight.detach(), grad, "layer"), rel=1e-5, abs=1e-6)
    assert found != pytest.approx(xnor(0.1 * layer.weight.detach(), grad, "channel"), rel=1e-5, abs=1e-6)


@every_scaling
@pytest.mark.parametrize("method", [XNOR(), DoReFa()], ids=["xnor", "dorefa"])
def test_a_channel_of_zeros_has_a_finite_gradient(method: Method, scaling: str):
    layer = install_method(BinaryLinear(12, 8, weight_scaling=scaling), method)
    with torch.no_grad():
        layer.weight[3] = 0
    layer(torch.randn(5, 12)).square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    with torch.no_grad():
        layer.weight.zero_()
    layer(torch.randn(5, 12)).square().sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("method", [XNOR(clip=0.5), DoReFa(clip=0.5)], ids=["xnor", "dorefa"])
def test_their_inputs_keep_the_straight_through_estimator(method: Method):
    part = method.input_binarizer(site_of((8, 12)), (12,))
    assert gradient(part, torch.tensor(X), torch.ones(len(X))).tolist() == [float(abs(x) <= 0.5) for x in X]
    assert method.claims() == {"weight_binarizer"}


# All of them


@every_baseline
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_shape
def test_gradients_of_weights_keep_dtype_and_shape(method: Method, dtype: torch.dtype, shape: tuple[int, ...]):
    weight, G = (tensor.to(dtype) for tensor in doubles(*shape))
    part = method.weight_binarizer(site_of(shape)).to(dtype)
    found = gradient(part, weight, G)
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    expected = gradient(part.double(), weight.double(), G.double())
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-12}[dtype]


@every_baseline
def test_weights_in_channels_last_have_the_same_gradient(method: Method):
    weight, G = doubles(6, 4, 3, 3)
    part = method.weight_binarizer(site_of((6, 4, 3, 3)))
    last = torch.channels_last
    found = gradient(part, weight.to(memory_format=last), G.to(memory_format=last))
    torch.testing.assert_close(found, gradient(part, weight, G), rtol=1e-6, atol=1e-9)


@every_baseline
def test_a_new_step_compiles_nothing_anew(method: Method):
    torch.compiler.reset()
    layer = install_method(BinaryLinear(12, 8, levels=ElasticLevels()), method).train()
    graph = torch.compile(layer, fullgraph=True, backend="eager")
    x, found = torch.randn(5, 12), []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in (0, 400, 800):
            layer.weight_binarizer.begin_step(layer, Step(index, 1000, 0.1))
            layer.input_binarizer.begin_step(layer, Step(index, 1000, 0.1))
            layer.zero_grad()
            graph(x).square().sum().backward()
            compiled = layer.weight.grad.clone()
            layer.zero_grad()
            layer(x).square().sum().backward()
            torch.testing.assert_close(compiled, layer.weight.grad)
            found.append(compiled)
    annealed = isinstance(method, IRNet | ReSTE)
    assert torch.equal(found[1], found[2]) is not annealed


@every_baseline
def test_the_schedule_is_not_saved_because_the_step_tells_it(method: Method):
    model = binarize_(nn.Sequential(nn.Linear(12, 8)), method)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (IRNet, {"t_min": 0.0}, "t_min=0.0: expected a number > 0"),
        (IRNet, {"t_min": math.nan}, "t_min=nan: expected a number > 0"),
        (IRNet, {"t_max": 0.05}, "t_max=0.05: expected a number >= t_min=0.1"),
        (IRNet, {"clip": 2.0}, "clip=2.0 of method 'ir_net': expected 1, because the method has no clip bound; known"),
        (ReSTE, {"o_end": 0.5}, "o_end=0.5: expected a number >= 1"),
        (ReSTE, {"interval": 0.0}, "interval=0.0: expected a number > 0"),
        (ReSTE, {"threshold": 0.05}, "threshold=0.05: expected a number >= interval=0.1"),
        (ReSTE, {"clip": 2.0}, "clip=2.0 of method 'reste': .* bound; known arguments: o_end, threshold, interval, s"),
        (XNOR, {"clip": 0.0}, "clip=0.0: expected a number > 0"),
        (DoReFa, {"clip": -1.0}, "clip=-1.0: expected a number > 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_with_what_was_expected(cls: type[Method], arguments, message: str):
    with pytest.raises(ValueError, match=message):
        method_from_dict({"name": cls.name, **arguments})
