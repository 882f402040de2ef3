"""SURGE against its formulas, in the order of its specification's list. `Operator` is the layer that they speak of.

The oracle is written twice: the closed form, and double-precision autograd of the formula that the paper prints.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ddp_worker import train_without_input_gradient
from safetensors.torch import load_file
from surge_cases import (
    CASES,
    ETA,
    Case,
    Gradients,
    both_kinds,
    closed_form,
    distance,
    every_case,
    gradient_of_base,
    printed_formula,
    run,
)
from tiny import make_net, optimizer_of, tiny_model, train_steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_bnn import binarize_, install_method
from hf_bnn.methods import Step, Surge
from hf_bnn.methods.surge import AUX
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from hf_bnn.training import begin_step

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
