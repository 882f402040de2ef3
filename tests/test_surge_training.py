"""SURGE in training: groups of the optimizer, cost, accuracy, statistics and settings."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from surge_cases import (
    CASES,
    ETA,
    Case,
    every_case,
    run,
)
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_bnn import binarize_, install_method
from hf_bnn.methods import STE, ApproxSign, IRNet, Method, ReSTE, Step, Stompp, Surge
from hf_bnn.methods.surge import AUX, AuxiliaryBranch
from hf_bnn.nn.layers import BinaryLinear
from hf_bnn.nn.levels import ElasticLevels, SignedLevels
from hf_bnn.training import begin_step, parameter_roles, split_groups, statistics

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
