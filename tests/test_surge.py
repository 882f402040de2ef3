"""SURGE against its formulas, in the order of its specification's list. `Operator` is the layer that they speak of.

The oracle is written twice: the closed form, and double-precision autograd of the formula that the paper prints.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from ddp_worker import train_without_input_gradient
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tiny import make_net, optimizer_of, tiny_model, train_steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hf_bnn import binarize_, install_method
from hf_bnn.functional import clipped_sign, identity_sign
from hf_bnn.methods import STE, ApproxSign, IRNet, Method, ReSTE, Step, Stompp, Surge
from hf_bnn.methods.surge import AUX, AuxiliaryBranch
from hf_bnn.nn.layers import BinaryLinear
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from hf_bnn.nn.products import Conv2dProduct, LinearProduct
from hf_bnn.training import begin_step, parameter_roles, split_groups, statistics

ETA = 0.3


class Operator(nn.Module):
    """A binary operator and nothing else, y = Q_w(W) * Q_x(x), with a branch around it: linear or convolution."""

    def __init__(self, product: Callable[..., Tensor], weight_shape: tuple[int, ...], eta: float = ETA):
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.randn(weight_shape))
        self.branch = AuxiliaryBranch(self, eta, (torch.randn(weight_shape),))

    @property
    def aux(self) -> nn.Parameter:
        return self.branch.aux[0]

    def base(self, x: Tensor) -> Tensor:
        return self.product(clipped_sign(x), identity_sign(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self.base, x)


class Case(NamedTuple):
    product: Callable[..., Tensor]
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]

    def operator(self, **kwargs) -> Operator:
        return Operator(self.product, self.weight_shape, **kwargs)

    def tensors(self, operator: Operator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """An input that asks for a gradient, with entries on both kinks, and G."""
        x = torch.randn(self.input_shape, dtype=dtype)
        x.flatten()[:4] = torch.tensor([1.0, -1.0, 0.0, -0.0], dtype=dtype)
        with torch.no_grad():
            G = torch.randn_like(operator.base(x))
        return x.requires_grad_(), G


CASES = {
    "linear 2-D": Case(LinearProduct(), (5, 12), (8, 12)),
    "linear 3-D": Case(LinearProduct(), (3, 5, 12), (8, 12)),
    "linear 4-D": Case(LinearProduct(), (2, 3, 5, 12), (8, 12)),
    "conv": Case(Conv2dProduct(), (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv padded": Case(Conv2dProduct(padding=(1, 2)), (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv strided": Case(Conv2dProduct(stride=(2, 1), padding=(1, 1)), (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv dilated": Case(Conv2dProduct(dilation=(2, 1)), (2, 4, 7, 6), (6, 4, 3, 3)),
    "conv grouped": Case(Conv2dProduct(stride=(2, 2), padding=(1, 0), groups=2), (2, 4, 7, 6), (6, 2, 3, 2)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
both_kinds = pytest.mark.parametrize("case", [CASES["linear 3-D"], CASES["conv strided"]], ids=["linear", "conv"])


class Gradients(NamedTuple):
    x: Tensor
    weight: Tensor
    aux: Tensor


def run(operator: Operator, x: Tensor, G: Tensor) -> Gradients:
    """The gradients of one forward and backward pass."""
    operator.zero_grad()
    x = x.detach().clone().requires_grad_()
    operator(x).backward(G)
    return Gradients(x.grad, operator.weight.grad, operator.aux.grad)


def gradient_of_base(operator: Operator, x: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx and dL/dW of the operator without SURGE."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(operator.base(x), (x, operator.weight), G)


def product_gradients(product, x: Tensor, weight: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """G W and G^T x, by the textbook (linear), or by torch.nn.grad (convolution)."""
    if isinstance(product, LinearProduct):
        return torch.einsum("...o,oi->...i", G, weight), torch.einsum("no,ni->oi", G.flatten(0, -2), x.flatten(0, -2))
    geometry = (product.stride, product.padding, product.dilation, product.groups)
    return nn.grad.conv2d_input(x.shape, weight, G, *geometry), nn.grad.conv2d_weight(x, weight.shape, G, *geometry)


def closed_form(operator: Operator, x: Tensor, G: Tensor, gated_branch: bool = False) -> Gradients:
    """The formulas of the specification, line by line. `gated_branch` is a mistake, to see whether it is noticed."""
    x = x.detach()
    Wq = torch.where(operator.weight < 0, -1.0, 1.0).to(x.dtype)
    xq = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    gate = (x.abs() <= 1).to(x.dtype)
    g_b = product_gradients(operator.product, x, Wq, G)[0] * gate
    g_a, aux_gradient = product_gradients(operator.product, x, operator.aux.detach(), G)
    g_a = g_a * gate if gated_branch else g_a
    lam = operator.branch.eta * g_b.norm() / (g_a.norm() + 1e-8)
    return Gradients(g_b + lam * g_a, product_gradients(operator.product, xq, Wq, G)[1], lam * aux_gradient)


def printed_formula(operator: Operator, x: Tensor, G: Tensor) -> Gradients:
    """Autograd of y = f_b - sg(lambda f_a) + lambda f_a."""
    x = x.detach().clone().requires_grad_()
    (g_b,) = torch.autograd.grad(operator.base(x), x, G)
    (g_a,) = torch.autograd.grad(operator.product(x, operator.aux), x, G)
    lam = (operator.branch.eta * g_b.norm() / (g_a.norm() + 1e-8)).detach()
    f_a = operator.product(x, operator.aux)
    y = operator.base(x) - (lam * f_a).detach() + lam * f_a
    return Gradients(*torch.autograd.grad(y, (x, operator.weight, operator.aux), G))


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())


# 1 The output


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_training_output_is_that_of_the_base_operator_bit_for_bit(case: Case, dtype: torch.dtype):
    operator = case.operator().to(dtype)
    x, _ = case.tensors(operator, dtype)
    expected = operator.base(x)
    assert torch.equal(operator(x), expected)
    with torch.no_grad():
        operator.aux.copy_(1e4 * torch.randn_like(operator.aux))
    assert torch.equal(operator(x), expected)


@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("levels", [SignedLevels, UnsignedLevels, ElasticLevels, lambda: ElasticLevels(signed=False)])
@pytest.mark.parametrize("binarize", ["both", "weights", "activations"])
def test_a_binary_layer_puts_out_the_same_in_training_with_and_without_surge(aux, levels, binarize):
    layer = binarize_(nn.Sequential(nn.Linear(12, 8)), binarize=binarize, levels=lambda name: levels())
    x = torch.randn(2, 5, 12, requires_grad=True)
    expected = layer(x)
    assert torch.equal(install_method(layer, Surge(aux=aux, rank=4))(x), expected)


# 2 The gradients


@every_case
@pytest.mark.parametrize("oracle", [closed_form, printed_formula])
def test_all_gradients_equal_the_closed_form_and_the_printed_formula(case: Case, oracle):
    operator = case.operator().double()
    x, G = case.tensors(operator, torch.float64)
    found, expected = run(operator, x, G), oracle(operator, x, G)
    assert distance(found.x, expected.x) < 1e-6  # lambda is a float32 number
    assert distance(found.aux, expected.aux) < 1e-6
    assert distance(found.weight, expected.weight) < 1e-14


@every_case
def test_the_oracle_can_fail(case: Case):
    operator = case.operator().double()
    x, G = case.tensors(operator, torch.float64)
    assert distance(run(operator, x, G).x, closed_form(operator, x, G, gated_branch=True).x) > 1e-3


@pytest.mark.parametrize("aux", AUX)
def test_every_aux_is_the_closed_form_with_its_own_branch_weight(aux: str):
    layer = binarize_(nn.Sequential(nn.Linear(12, 8, bias=False)), Surge(eta=ETA, aux=aux, rank=4)).double()[0]
    x, G = torch.randn(6, 12, dtype=torch.float64, requires_grad=True), torch.randn(6, 8, dtype=torch.float64)
    layer(x).backward(G)

    scale = layer.weight.detach().abs().mean(1, keepdim=True)
    Wq = torch.where(layer.weight < 0, -scale, scale)
    factors = [p.detach() for p in layer.around.parameters()]
    Wa = {
        "own": lambda: factors[0],
        "shared": lambda: layer.weight.detach(),
        "lowrank": lambda: factors[0] @ factors[1],
        "leaky": lambda: Wq,
    }[aux]()
    g_b, g_a = (G @ Wq) * (x.detach().abs() <= 1), G @ Wa
    lam = ETA * g_b.norm() / (g_a.norm() + 1e-8)
    assert distance(x.grad, g_b + lam * g_a) < 1e-6


def test_lowrank_learns_through_both_of_its_factors():
    layer = binarize_(nn.Sequential(nn.Linear(12, 8, bias=False)), Surge(eta=ETA, aux="lowrank", rank=3)).double()[0]
    U, V = (p.detach().clone().requires_grad_() for p in layer.around.aux)
    x, G = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True), torch.randn(2, 6, 8, dtype=torch.float64)
    begin_step(layer, Step(0, 1, 0.1, log=True))
    layer(x).backward(G)
    expected = torch.autograd.grad(F.linear(x.detach(), U @ V), (U, V), G)
    lam = layer.around.statistics()["lambda"]
    for found, gradient in zip(layer.around.aux, expected, strict=True):
        assert distance(found.grad, lam * gradient) < 1e-6


# 3 Special values


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nothing", ["eta", "aux"])
def test_without_eta_or_without_a_branch_it_is_the_straight_through_estimator_bitwise(case: Case, dtype, nothing):
    operator = case.operator(eta=0.0 if nothing == "eta" else ETA).to(dtype)
    if nothing == "aux":
        nn.init.zeros_(operator.aux)
    x, G = case.tensors(operator, dtype)
    found = run(operator, x, G)
    expected = gradient_of_base(operator, x, G)
    assert torch.equal(found.x, expected[0])
    assert torch.equal(found.weight, expected[1])


@every_case
def test_the_compensation_is_eta_times_as_long_as_the_gradient(case: Case):
    operator = case.operator()
    x, G = case.tensors(operator)
    g_b, _ = gradient_of_base(operator, x, G)
    compensation = run(operator, x, G).x - g_b
    torch.testing.assert_close(compensation.norm(), ETA * g_b.norm())


@both_kinds
@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_the_length_of_the_branch_weight_does_not_matter(case: Case, factor: float):
    operator = case.operator()
    x, G = case.tensors(operator)
    expected = run(operator, x, G).x
    with torch.no_grad():
        operator.aux.mul_(factor)
    torch.testing.assert_close(run(operator, x, G).x, expected, rtol=1e-4, atol=1e-5)


@both_kinds
def test_all_gradients_are_homogeneous_in_the_outputs_gradient(case: Case):
    operator = case.operator()
    x, G = case.tensors(operator)
    for found, expected in zip(run(operator, x, 1000 * G), run(operator, x, G), strict=True):
        torch.testing.assert_close(found / 1000, expected, rtol=1e-4, atol=1e-5)


EXTREMES = pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-12, 1e15])


@EXTREMES
@both_kinds
def test_zero_tiny_and_huge_gradients_stay_finite(case: Case, factor: float):
    operator = case.operator()
    x, G = case.tensors(operator)
    found = run(operator, x, factor * G)
    assert all(gradient.isfinite().all() for gradient in found)
    assert bool(found.x.any()) == (factor > 0)


@EXTREMES
@pytest.mark.parametrize("aux", AUX)
def test_zero_tiny_and_huge_gradients_stay_finite_for_every_aux(aux: str, factor: float):
    layer = binarize_(nn.Sequential(nn.Linear(12, 8)), Surge(aux=aux, rank=3))
    x, G = torch.randn(5, 12, requires_grad=True), factor * torch.randn(5, 8)
    layer(x).backward(G)
    assert all(p.grad.isfinite().all() for p in [x, *layer.parameters()])
    assert bool(x.grad.any()) == (factor > 0)


@every_case
def test_an_input_exactly_on_the_clip_bound_still_gets_the_base_gradient(case: Case):
    operator = case.operator(eta=0.0)
    x, G = case.tensors(operator)
    inside = x.detach().clone()
    inside.flatten()[:2] = torch.tensor([0.5, -0.5])
    found = run(operator, x, G).x.flatten()[:2]
    assert torch.equal(found, run(operator, inside, G).x.flatten()[:2])
    assert found.all()


@every_case
def test_zero_and_minus_zero_count_as_plus_one(case: Case):
    operator = case.operator()
    x, _ = case.tensors(operator)
    positive = x.detach().clone()
    positive.flatten()[2:4] = 1.0
    assert torch.equal(operator(x), operator(positive))


@pytest.mark.parametrize("kind", ["linear 2-D", "conv"])
def test_a_saturated_layer_gets_no_compensation(kind: str):
    operator = CASES[kind].operator()
    x, G = CASES[kind].tensors(operator)
    found = run(operator, x.detach().sign() * 2 + 1e-3 + 5, G)
    assert not found.x.any()
    assert not found.aux.any()


# 4 An input without a gradient


@both_kinds
def test_without_a_gradient_for_the_input_the_branch_gets_zeros_and_not_none(case: Case):
    operator = case.operator()
    x, G = case.tensors(operator)
    operator(x.detach()).backward(G)
    assert torch.equal(operator.aux.grad, torch.zeros_like(operator.aux))
    assert torch.equal(operator.weight.grad, gradient_of_base(operator, x, G)[1])


@pytest.mark.multiprocess
def test_two_ranks_train_when_the_input_asks_for_no_gradient(tmp_path: Path):
    torch.multiprocessing.spawn(train_without_input_gradient, (str(tmp_path),), nprocs=2)
    (world, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert world == 2
    assert all(torch.equal(first[key], second[key]) for key in first)


# 5 Outside training


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
@both_kinds
def test_evaluation_and_no_grad_do_no_auxiliary_work(case: Case, grad_mode):
    operator = case.operator()
    x, _ = case.tensors(operator)
    with grad_mode():
        assert not touched_by_surge(operator.eval()(x))
    with torch.no_grad():
        assert not touched_by_surge(operator.train()(x))
    assert touched_by_surge(operator(x))


def touched_by_surge(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_JoinBackward"


def test_a_saved_model_has_no_branch_weights(tmp_path: Path):
    model = install_method(tiny_model(), Surge())
    assert any(".around." in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "around" in key]


def test_a_training_checkpoint_resumes_with_its_branch_weights_bit_for_bit(tmp_path: Path):
    net = make_net("linear", Surge())
    optimizer = optimizer_of(net)
    train_steps(net, optimizer, range(3))
    torch.save((net.model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    losses = train_steps(net, optimizer, range(3, 5))

    resumed = make_net("linear", Surge())
    weights, moments = torch.load(tmp_path / "checkpoint.pt")
    resumed.model.load_state_dict(weights)
    other = optimizer_of(resumed)
    other.load_state_dict(moments)
    assert train_steps(resumed, other, range(3, 5)) == losses
    expected = net.model.state_dict()
    assert any("around.aux" in key for key in expected)
    assert all(torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items())


# 6 Around it: checkpointing, compilation, autocast, loss scaling


@both_kinds
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(case: Case, reentrant: bool):
    operator = case.operator()
    x, G = case.tensors(operator)
    expected = run(operator, x, G)
    operator.zero_grad()
    again = x.detach().clone().requires_grad_()
    checkpoint(operator, again, use_reentrant=reentrant).backward(G)
    found = Gradients(again.grad, operator.weight.grad, operator.aux.grad)
    assert all(map(torch.equal, found, expected))


@both_kinds
def test_it_compiles_without_a_graph_break(case: Case):
    operator = case.operator()
    x, G = case.tensors(operator)
    expected = run(operator, x, G)
    torch.compiler.reset()
    operator.zero_grad()
    again = x.detach().clone().requires_grad_()
    torch.compile(operator, fullgraph=True, backend="aot_eager")(again).backward(G)
    for found, gradient in zip((again.grad, operator.weight.grad, operator.aux.grad), expected, strict=True):
        torch.testing.assert_close(found, gradient)


@both_kinds
def test_under_autocast_the_output_is_the_base_operators_and_the_gradients_are_close(case: Case):
    operator = case.operator()
    x, G = case.tensors(operator)
    expected = run(operator, x, G)
    again = x.detach().clone().requires_grad_()
    operator.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y, base = operator(again), operator.base(again)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, base)
    y.backward(G.bfloat16())
    for found, gradient in zip((again.grad, operator.weight.grad, operator.aux.grad), expected, strict=True):
        assert found.dtype == torch.float32
        assert distance(found, gradient) < 0.02


@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_a_model_trains_under_autocast(kind: str, aux: str):
    net = make_net(kind, Surge(aux=aux, rank=4))
    net.model.forward = torch.autocast("cpu", torch.bfloat16)(net.model.forward)
    losses = train_steps(net, optimizer_of(net), range(10))
    assert losses[-1] < 0.5 * losses[0]


def test_a_scaled_loss_gives_the_same_step():
    plain, scaled = make_net("linear", Surge()), make_net("linear", Surge())
    plain.loss().backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = optimizer_of(scaled)
    scaler.scale(scaled.loss()).backward()
    scaler.unscale_(optimizer)
    for found, expected in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("aux", AUX)
def test_an_overflown_loss_is_noticed_by_the_scaler(aux: str):
    net = make_net("linear", Surge(aux=aux, rank=4))
    before = copy.deepcopy(net.model.state_dict())
    optimizer = optimizer_of(net)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net.loss() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert all(torch.equal(value, before[key]) for key, value in net.model.state_dict().items())


# 7 The optimizer's groups


def test_every_branch_weight_sits_in_exactly_one_group_of_its_own():
    model = install_method(tiny_model(), Surge())
    branch_weights = {id(layer.around.aux[0]) for layer in model.modules() if isinstance(layer, BinaryLinear)}
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    plain = [{"params": decay, "lr": 0.01, "weight_decay": 0.1}, {"params": rest, "lr": 0.01, "weight_decay": 0.0}]

    groups = split_groups(plain, parameter_roles(model), method_multiplier=3.0)
    holders = [group for group in groups if branch_weights & {id(p) for p in group["params"]}]
    assert [group["role"] for group in holders] == ["method"]
    (own,) = holders
    assert sorted(id(p) for p in own["params"]) == sorted(branch_weights)
    assert (own["lr"], own["weight_decay"]) == (pytest.approx(0.03), 0.0)
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


# 8 What it costs

PRODUCTS = {"own": 5, "shared": 4, "leaky": 3}


def products_of_a_step(step: Callable[[], None], one_product: Callable[[], object]) -> float:
    """Floating-point operations of a step, in products of the layer."""
    with FlopCounterMode(display=False) as unit:
        one_product()
    with FlopCounterMode(display=False) as whole:
        step()
    return whole.get_total_flops() / unit.get_total_flops()


# Not the grouped convolution: torch's counter takes the gradient of a grouped weight for `groups` products.
@pytest.mark.parametrize("case", [case for case in CASES.values() if getattr(case.product, "groups", 1) == 1])
def test_a_step_takes_at_most_five_products(case: Case):
    operator = case.operator()
    x, G = case.tensors(operator)
    count = products_of_a_step(lambda: run(operator, x, G), lambda: operator.product(x.detach(), operator.weight))
    assert count == 5


@pytest.mark.parametrize("aux", PRODUCTS)
def test_the_products_of_every_aux_are_counted(aux: str):
    layer = binarize_(nn.Sequential(nn.Linear(12, 8)), Surge(aux=aux))
    x = torch.randn(5, 12, requires_grad=True)
    count = products_of_a_step(lambda: layer(x).sum().backward(), lambda: F.linear(x.detach(), torch.randn(8, 12)))
    assert count == PRODUCTS[aux]


def test_lowrank_costs_a_fraction_of_a_product():
    layer = binarize_(nn.Sequential(nn.Linear(64, 64)), Surge(aux="lowrank", rank=4))
    x = torch.randn(5, 64, requires_grad=True)
    count = products_of_a_step(lambda: layer(x).sum().backward(), lambda: F.linear(x.detach(), torch.randn(64, 64)))
    assert 3 < count < 3.6


def saved_activations(forward: Callable[[], Tensor], parameters: list[Tensor]) -> set[int]:
    """The storages that a forward pass keeps for its backward pass, other than parameters."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = forward()
    known = {p.untyped_storage().data_ptr() for p in parameters}
    del y
    return {t.untyped_storage().data_ptr() for t in kept} - known


@every_case
def test_nothing_is_saved_for_the_backward_pass_beyond_what_the_base_saves_and_the_input(case: Case):
    operator = case.operator()
    x, _ = case.tensors(operator)
    parameters = list(operator.parameters())
    base = saved_activations(lambda: operator.base(x), parameters) | {x.untyped_storage().data_ptr()}
    assert len(saved_activations(lambda: operator(x), parameters)) == len(base)


@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("levels", [SignedLevels, ElasticLevels])
def test_a_layer_keeps_at_most_its_input_more_than_the_straight_through_estimator_does(aux: str, levels):
    layer = binarize_(nn.Sequential(nn.Linear(12, 8)), levels=lambda name: levels())
    x = torch.randn(5, 12, requires_grad=True)
    base = len(saved_activations(lambda: layer(x), list(layer.parameters())))
    install_method(layer, Surge(aux=aux, rank=4))
    assert len(saved_activations(lambda: layer(x), list(layer.parameters()))) <= base + 1


# 9 What it is for


class Digits(NamedTuple):
    """scikit-learn's digits, split by a fixed draw; the pixels are in 0..1."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits() -> Digits:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return Digits(x[order[:1300]], y[order[:1300]], x[order[1300:]], y[order[1300:]])


def deep_binary_mlp(width: int = 64, depth: int = 8, gain: float = 4.0) -> nn.Sequential:
    """Each binary layer follows a BatchNorm of that gain, so that most of its inputs lie beyond the clip bound."""
    layers: list[nn.Module] = [nn.Linear(64, width)]
    for _ in range(depth):
        layers += [nn.BatchNorm1d(width), nn.Linear(width, width)]
        nn.init.constant_(layers[-2].weight, gain)
    return nn.Sequential(*layers, nn.BatchNorm1d(width), nn.Linear(width, 10))


class Result(NamedTuple):
    accuracy: float  # percent of the held-out digits
    clipped: float  # the first step's, a mean over the layers


def train_on_digits(method: Method, seed: int, data: Digits, epochs: int = 8) -> Result:
    torch.manual_seed(seed)
    net = deep_binary_mlp()
    model = binarize_(net, method, skip=("0", str(len(net) - 1)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    beyond = []
    for layer in model.modules():
        if isinstance(layer, BinaryLinear):
            layer.register_forward_pre_hook(
                lambda _, inputs: (
                    beyond.append(float((inputs[0].abs() > 1).float().mean())) if len(beyond) < 8 else None
                )
            )
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        correct = model.eval()(data.x_test).argmax(1) == data.y_test
    return Result(100 * float(correct.float().mean()), sum(beyond) / len(beyond))


RIVALS = {
    "SURGE leaky, eta 1": Surge(eta=1.0, aux="leaky"),
    "ApproxSign": ApproxSign(),
    "ApproxSign, clip 4": ApproxSign(clip=4.0),
    "STE, clip 4": STE(clip=4.0),
}


@pytest.mark.slow
def test_surge_trains_a_deep_network_most_of_whose_inputs_are_clipped():
    data = digits()

    def mean_accuracy(name: str, method: Method, seeds: int = 3) -> float:
        results = [train_on_digits(method, seed, data) for seed in range(seeds)]
        print(f"{name:<20}", *(f"{result.accuracy:5.1f}" for result in results))
        assert 0.75 < results[0].clipped < 0.9
        return sum(result.accuracy for result in results) / seeds

    base = mean_accuracy("STE", STE())
    surge = mean_accuracy("SURGE, eta 1", Surge(eta=1.0))
    for name, method in RIVALS.items():  # what costs nothing may do as well: printed so that no comparison hides it
        mean_accuracy(name, method, seeds=1)
    assert surge - base > 12


# The statistics


@pytest.mark.parametrize("aux", ["own", "shared", "lowrank", "leaky"])
def test_the_statistics_of_a_logged_step_are_the_formulas(aux: str):
    layer = binarize_(nn.Sequential(nn.Linear(12, 8, bias=False)), Surge(eta=ETA, aux=aux, rank=12))
    x, G = torch.randn(50, 12, requires_grad=True), torch.randn(50, 8)
    begin_step(layer, Step(0, 10, 0.1, log=True))
    layer(x).backward(G)

    weight = layer[0].weight.detach()
    scale = weight.abs().mean(1, keepdim=True)
    Wq = torch.where(weight < 0, -scale, scale)
    g_b, g_a = (G @ Wq) * (x.detach().abs() <= 1), G @ {"leaky": Wq}.get(aux, weight)
    found = statistics(layer)
    assert found.keys() == {"0/clipped", "0/lambda", "0/cosine"}
    assert found["0/clipped"] == pytest.approx(float((x.abs() > 1).float().mean()))
    assert found["0/lambda"] == pytest.approx(float(ETA * g_b.norm() / g_a.norm()), rel=1e-4)
    assert found["0/cosine"] == pytest.approx(float(F.cosine_similarity(g_b.flatten(), g_a.flatten(), 0)), rel=1e-4)


def clipped_share(method: Method, x: Tensor, rows: int, levels=None, kind: str = "linear") -> float:
    """The statistic of a step whose loss sees the first `rows` examples."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, padding=1) if kind == "conv" else nn.Linear(12, 8)
    net = binarize_(nn.Sequential(layer), method, levels=levels and (lambda name: levels)).train()
    begin_step(net, Step(99, 100, 0.1, log=True))
    net(x.clone().requires_grad_())[:rows].square().sum().backward()
    return statistics(net)["0/clipped"]


@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_inputs_that_no_gradient_reaches_do_not_count_as_clipped(kind: str, aux: str):
    x = torch.randn(20, 4, 3, 3) if kind == "conv" else torch.randn(20, 7, 12)
    x[5:] *= 100
    share = clipped_share(Surge(aux=aux, rank=4), x, 5, kind=kind)
    assert share == pytest.approx(float((x[:5].abs() > 1).float().mean()))
    assert clipped_share(Surge(aux=aux, rank=4), x, 0, kind=kind) == 0


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        (Surge(clip=2.0), 2.0),
        (Surge(clip=2.0, aux="leaky"), 2.0),
        (ApproxSign(clip=0.5) + Surge(clip=0.5), 0.5),
        (Stompp(clip=2.0) + Surge(clip=2.0), 2.0),
        (ReSTE() + Surge(), 1.5),
        (IRNet(libra=False) + Surge(), float("inf")),
    ],
)
def test_the_clipped_share_goes_by_the_bound_of_whatever_estimates_the_inputs_gradient(method: Method, bound: float):
    x = 2 * torch.randn(50, 12)
    assert clipped_share(method, x, 50) == pytest.approx(float((x.abs() > bound).float().mean()))


def test_the_clipped_share_is_in_units_of_the_inputs_levels_and_0_where_inputs_are_float():
    x, levels = torch.randn(50, 12), ElasticLevels()
    with torch.no_grad():
        levels.width.fill_(0.5)
    assert clipped_share(Surge(), x, 50, levels) == pytest.approx(float((x.abs() > 0.5).float().mean()))
    net = binarize_(nn.Sequential(nn.Linear(12, 8)), Surge(), binarize="weights").train()
    begin_step(net, Step(0, 10, 0.1, log=True))
    net(x.requires_grad_()).sum().backward()
    assert statistics(net)["0/clipped"] == 0


def test_nothing_is_recorded_in_a_step_that_is_not_logged():
    layer = binarize_(nn.Sequential(nn.Linear(12, 8)), Surge())
    for log in (True, False):
        begin_step(layer, Step(0, 10, 0.1, log=log))
        layer(torch.randn(5, 12, requires_grad=True)).sum().backward()
        assert bool(statistics(layer)) == log


def test_the_statistics_are_not_part_of_a_checkpoint():
    layer = binarize_(nn.Sequential(nn.Linear(12, 8)), Surge(aux="leaky"))
    assert set(layer.state_dict()) == {"0.weight", "0.bias"}


# Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": -0.1}, "eta=-0.1: expected a number >= 0"),
        ({"eta": float("nan")}, "eta=nan: expected a number >= 0"),
        ({"aux": "none"}, "aux='none': expected one of own, shared, lowrank, leaky"),
        ({"rank": 0}, "rank=0: expected an integer >= 1"),
        ({"clip": 0.0}, "clip=0.0: expected a number > 0"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_expected(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Surge(**arguments)


@pytest.mark.parametrize("name", ["conv strided", "conv grouped"])
def test_lowrank_kernels_have_the_gradients_of_their_product(name: str):
    case = CASES[name]
    operator = case.operator().double()
    left, right = torch.randn(6, 3).double(), torch.randn(3, operator.weight[0].numel()).double()
    operator.branch = AuxiliaryBranch(operator, ETA, (left, right))
    x, G = case.tensors(operator, torch.float64)
    operator(x).backward(G)
    dense = case.operator().double()
    dense.weight = operator.weight
    dense.branch = AuxiliaryBranch(dense, ETA, ((left @ right).view_as(operator.weight),))
    expected = run(dense, x, G)
    torch.testing.assert_close(x.grad, expected.x)
    torch.testing.assert_close(operator.branch.aux[0].grad, expected.aux.flatten(1) @ right.t())
    torch.testing.assert_close(operator.branch.aux[1].grad, left.t() @ expected.aux.flatten(1))


def test_the_lowrank_factors_are_the_same_on_every_rank_and_draw_nothing():
    first = binarize_(nn.Sequential(nn.Linear(12, 8)), STE())
    second = copy.deepcopy(first)
    torch.manual_seed(1)
    install_method(first, Surge(aux="lowrank", rank=3))
    drawn = torch.rand(())
    torch.manual_seed(2)
    install_method(second, Surge(aux="lowrank", rank=3))
    torch.manual_seed(1)
    assert torch.rand(()) == drawn
    for left, right in zip(first[0].around.aux, second[0].around.aux, strict=True):
        assert torch.equal(left, right)
