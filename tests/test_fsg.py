"""FSG and MetaQuant: the generated gradient against its formula, how its nets learn, and its state."""

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fsg_worker import train_and_be_refused_shards
from sklearn.datasets import load_digits
from test_trainer import StopAt, trainer
from tiny import TinyMLP, make_net, optimizer_of, train_steps
from torch import Tensor, nn
from torch.func import functional_call

from hf_bnn import binarize_
from hf_bnn.functional import weight_scale
from hf_bnn.methods import STE, ApproxSign, Method, Site, Step, Surge, make_method
from hf_bnn.methods.fsg import BINARIZERS, Fsg, gradient_hook
from hf_bnn.methods.fsg.calibration import calibrate
from hf_bnn.methods.fsg.gradient_hook import GradientHook, RawSign
from hf_bnn.methods.fsg.history import GradientHistory
from hf_bnn.methods.metaquant import MetaQuant
from hf_bnn.nn.layers import binary_layers
from hf_bnn.training import begin_step, end_backward, hook_optimizer, parameter_roles, statistics

PAPER = {"init": "paper", "update_norm": "free"}
SLOW = ("mamba", "lstm")


class Run(NamedTuple):
    """A model whose weights are binary, an optimizer over all of it, and what FSG has hooked into that."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    hook: GradientHook

    @property
    def weights(self) -> list[nn.Parameter]:
        return [layer.weight for layer in binary_layers(self.model)]

    def step(self, gradients: list[Tensor]) -> list[Tensor]:
        """One step with these raw gradients of the binary weights; what became of them."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient.clone()
        self.optimizer.step()
        return [weight.grad.clone() for weight in self.weights]

    def random_gradients(self) -> list[Tensor]:
        return [torch.randn_like(weight) for weight in self.weights]


def hook_into(model: nn.Module, optimizer: torch.optim.Optimizer, method: Fsg) -> Run:
    layers = [(layer.weight_binarizer.site, layer) for layer in binary_layers(model)]
    return Run(model, optimizer, GradientHook(method, optimizer, layers))


def make_run(method: Fsg, model: nn.Module | None = None, scaling: str = "none", lr: float = 0.01) -> Run:
    """Of SGD; without a model, of TinyMLP with its weights spread over both sides of the gate |W| <= 1."""
    torch.manual_seed(0)
    if model is None:
        model = TinyMLP()
        for name in ("2", "3"):
            nn.init.normal_(model.get_submodule(name).weight)
    floats = [name for name in ("0", "4") if name in dict(model.named_modules())]
    model = binarize_(model, method, exclude=floats, binarize="weights", weight_scaling=scaling)
    return hook_into(model, torch.optim.SGD(model.parameters(), lr), method)


# The formulas, as the paper has them


def literal_calibration(weight: Tensor, binarizer: str) -> tuple[Tensor, Tensor]:
    """(W~, c * gate)."""
    if binarizer == "dorefa":
        largest = max(abs(t) for t in torch.tanh(weight).flatten().tolist())
        return torch.tanh(weight) / (2 * largest) + 1 / 2, (1 - torch.tanh(weight) ** 2) / largest
    gate = torch.where(weight.abs() <= 1, 1.0, 0.0)
    if binarizer == "bwn":
        return weight, gate
    c = torch.stack([row.abs().mean() for row in weight])
    return weight, gate * c.reshape(-1, *[1] * (weight.dim() - 1))


def literal_update(nets: nn.ModuleDict, method: Fsg, history: list[Tensor], weight: Tensor, layer: int) -> Tensor:
    """M = beta slow + (1 - beta) fast, before its norm is set. `history`: raw gradients, at most `length` of them."""
    H = torch.stack([gradient.flatten() for gradient in history])
    rms = (H**2).mean().sqrt()
    value, slope = literal_calibration(weight, method.binarizer)
    start = 1.0 if method.init == "ste" else 0.0
    slow = start * H[-1] + rms * nets["slow"](H / rms, layer) if method.beta > 0 else 0.0
    fast = H[-1] * (start + nets["fast"](value.flatten())) if method.beta < 1 else 0.0
    return slope * (method.beta * slow + (1 - method.beta) * fast).view_as(weight)


# 1 The model is what it is without FSG


@pytest.mark.parametrize("scaling", ["channel", "layer", "none"])
def test_binary_weights_are_minus_or_plus_the_scale_also_at_zero(scaling: str):
    layer = binarize_(nn.Sequential(nn.Linear(6, 4, bias=False)), Fsg(), binarize="weights", weight_scaling=scaling)[0]
    with torch.no_grad():
        layer.weight[:, :2] = torch.tensor([0.0, -0.0])
    found = layer(torch.eye(6)).t()
    scale = weight_scale(layer.weight, scaling)[:, None]
    assert torch.equal(found, torch.where(layer.weight < 0, -scale, scale))
    assert (found[:, :2] > 0).all()


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_saved_model_is_the_same_with_and_without_fsg(kind: str):
    net, plain = make_net(kind, Fsg()), make_net(kind, STE())
    train_steps(net, optimizer_of(net), range(3))
    state = net.model.state_dict()
    assert list(state) == list(plain.model.state_dict())
    assert [name for name, _ in net.model.named_parameters()] == [name for name, _ in plain.model.named_parameters()]
    assert parameter_roles(net.model).method == []
    plain.model.load_state_dict(state)
    for one in (net, plain):
        one.model.eval()
    with torch.no_grad():
        assert torch.equal(net.output(), plain.output())


# 2 The raw gradient


@pytest.mark.parametrize("scaling", ["channel", "layer", "none"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_weights_gradient_is_that_of_a_float_layer_whose_weights_are_the_binary_ones(kind: str, scaling: str):
    plain = nn.Linear(6, 4) if kind == "linear" else nn.Conv2d(6, 4, 3, padding=1, stride=2)
    x = torch.randn(5, 6) if kind == "linear" else torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        plain.weight[0, :3] = 0.0
    twin = copy.deepcopy(plain)
    (layer,) = binarize_(nn.Sequential(plain), Fsg(), binarize="weights", weight_scaling=scaling)
    scale = weight_scale(twin.weight, scaling).view(-1, *[1] * (twin.weight.dim() - 1))
    with torch.no_grad():
        twin.weight.copy_(torch.where(twin.weight < 0, -scale, scale))
    for one in (layer, twin):
        (one(x) ** 2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=1e-5, atol=1e-5)


def test_a_channel_whose_weights_are_all_zero_has_the_raw_gradient_like_any_other():
    (layer,) = binarize_(nn.Sequential(nn.Linear(6, 4)), Fsg())
    with torch.no_grad():
        layer.weight[1] = 0
    x, G = torch.randn(5, 6), torch.randn(5, 4)
    layer(x).backward(G)
    torch.testing.assert_close(layer.weight.grad, G.t() @ torch.where(x < 0, -1.0, 1.0))  # dL/dW_hat


def test_without_a_scale_the_backward_is_the_identity():
    weight = torch.randn(4, 6, requires_grad=True)
    gradient = torch.randn(4, 6)
    RawSign("none")(weight).backward(gradient)
    assert torch.equal(weight.grad, gradient)


# 3, 4 How the nets learn


def two_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Identity(), nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 4, generator=generator)
    xs = [torch.randn(16, 6, generator=generator) for _ in range(count)]
    return [(x, x @ target) for x in xs]


def look_ahead(method: Fsg, nets: nn.ModuleDict, model: nn.Sequential, lr: float) -> list[float]:
    """The losses of training in one graph: each loss is one of the nets, through the weights that M has moved.

    Of that loss the nets follow, layer by layer, the update's gradient of unit length over the update's norm.
    """
    groups = [
        {"params": nets[n].parameters(), "lr": lr} for n, lr in (("slow", method.slow_lr), ("fast", method.fast_lr))
    ]
    adam = torch.optim.Adam(groups, eps=1e-6)
    names = ["1.weight", "3.weight"]
    weights = [model.get_parameter(name).detach().clone() for name in names]
    histories: list[list[Tensor]] = [[], []]
    updates: list[Tensor] = []
    losses = []
    for x, y in batches(25):
        moved = [w - lr * M for w, M in zip(weights, updates, strict=True)] if updates else weights
        slopes = [literal_calibration(w.detach(), method.binarizer)[1] for w in moved]
        hats = [
            torch.where(w < 0, -1.0, 1.0) + slope * (w - w.detach()) for w, slope in zip(moved, slopes, strict=True)
        ]
        hats = hats if updates else [hat.requires_grad_() for hat in hats]
        loss = F.mse_loss(functional_call(model, dict(zip(names, hats, strict=True)), x), y)
        losses.append(loss.item())
        raws = torch.autograd.grad(loss, hats, retain_graph=True)
        if updates:
            adam.zero_grad()
            loss.backward()
            adam.step()
        weights = [w.detach() for w in moved]
        updates = []
        for i, (raw, weight, history, slope) in enumerate(zip(raws, weights, histories, slopes, strict=True)):
            history.append(raw)
            M = literal_update(nets, method, history[-method.length :], weight, i)
            update = M * ((slope * raw).norm() / M.norm()) if method.update_norm == "ste" else M
            norm = update.detach().norm()
            update.register_hook(lambda d, norm=norm: d / d.norm() / norm / 2)
            updates.append(update)
    return losses


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("binarizer", BINARIZERS)
@pytest.mark.parametrize("init", ["ste", "paper"])
@pytest.mark.parametrize("update_norm", ["ste", "free"])
def test_the_hook_trains_as_a_look_ahead_in_the_graph_does(slow: str, binarizer: str, init: str, update_norm: str):
    method = Fsg(slow=slow, binarizer=binarizer, init=init, update_norm=update_norm, beta=0.6, chunk=5, length=3)
    lr = 0.05
    run = make_run(method, two_layers(), lr=lr)
    with torch.no_grad():  # at the zeros of init="ste" some gradients are 0, and Adam makes steps of their rounding
        for p in run.hook.nets.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    nets = copy.deepcopy(run.hook.nets)
    initial = copy.deepcopy(nets)
    expected = look_ahead(method, nets, two_layers(), lr)
    found = []
    for x, y in batches(25):
        loss = F.mse_loss(run.model(x), y)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        found.append(loss.item())
    assert found == pytest.approx(expected, rel=1e-5)
    for (name, p), q, start in zip(
        run.hook.nets.named_parameters(), nets.parameters(), initial.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.allclose(p, start, rtol=1e-3, atol=1e-5), name


class NotBinary(RawSign):
    """The weights as they are."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.view_as(weight)


@dataclass(frozen=True)
class FsgOnFloats(Fsg):
    def weight_binarizer(self, site: Site) -> NotBinary:
        return NotBinary("none")


@pytest.mark.parametrize("slow", SLOW)
def test_the_nets_gradient_is_the_slope_of_the_next_loss(slow: str):
    method, lr = FsgOnFloats(slow=slow, binarizer="bwn", beta=0.6, chunk=7, length=3, **PAPER), 0.1
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4))
    model = binarize_(copy.deepcopy(plain), method, skip=("2",), binarize="weights", weight_scaling="none")
    run = hook_into(model, torch.optim.SGD([model[0].weight], lr), method)
    *warm_up, (x, y) = batches(4)
    for batch in warm_up:
        F.mse_loss(model(batch[0]), batch[1]).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    nets, history = copy.deepcopy(run.hook.nets).double(), run.hook.histories[0]
    gradients, weight = list(history.gradients().double()), history.weight.double()

    def update() -> Tensor:
        return literal_update(nets, method, gradients, weight, 0)

    def next_loss() -> float:
        with torch.no_grad():
            new = {"0.weight": weight - lr * update()}
            return F.mse_loss(functional_call(plain.double(), new, x.double()), y.double()).item()

    assert weight.abs().max() < 1
    F.mse_loss(model(x), y).backward()
    norms = model[0].weight.grad.double().norm() * update().norm()
    run.optimizer.step()
    for name, p in nets.named_parameters():
        direction = F.normalize(torch.randn_like(p).flatten(), dim=0).view_as(p)
        found = (run.hook.nets.get_parameter(name).grad * direction).sum() * lr * norms
        around = []
        for shift in (1e-4, -1e-4):
            with torch.no_grad():
                p.add_(direction, alpha=shift)
                around.append(next_loss())
                p.sub_(direction, alpha=shift)
        slope = (around[0] - around[1]) / 2e-4
        assert found.item() == pytest.approx(slope, rel=2e-3, abs=1e-7), name


# 5 Nothing is inert


@pytest.mark.parametrize("slow", SLOW)
def test_after_two_steps_every_tensor_of_the_nets_has_a_gradient(slow: str):
    run = make_run(Fsg(slow=slow))
    before = copy.deepcopy(run.hook.nets)
    for _ in range(3):  # the first one has no update before it to learn from
        run.step(run.random_gradients())
    for name, p in run.hook.nets.named_parameters():
        assert p.grad.abs().max() > 0, name
        assert not torch.equal(p, before.get_parameter(name)), name


@pytest.mark.parametrize("slow", SLOW)
def test_older_gradients_and_the_layers_embedding_change_the_update(slow: str):
    def last_update(older: int = 0, embedding: float = 0.0) -> Tensor:
        run = make_run(Fsg(slow=slow, beta=1.0, slow_lr=0.0, **PAPER))
        steps = [run.random_gradients() for _ in range(5)]
        if older:
            steps[-1 - older] = run.random_gradients()
        run.hook.nets["slow"].layers.data.add_(embedding * torch.randn_like(run.hook.nets["slow"].layers))
        with torch.no_grad():
            run.hook.nets["slow"].out.bias.zero_()
        return [run.step(gradients)[0] for gradients in steps][-1]

    plain = last_update()
    for older in (1, 2, 3, 4):
        assert (last_update(older) - plain).norm() > 0.01 * plain.norm(), older
    assert (last_update(embedding=1.0) - plain).norm() > 0.01 * plain.norm()


# 6 The start


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("binarizer", "slow"), list(itertools.product(BINARIZERS, SLOW)))
@pytest.mark.parametrize("update_norm", ["ste", "free"])
def test_the_first_update_is_that_of_the_straight_through_estimator(beta, binarizer, slow, update_norm):
    run = make_run(Fsg(beta=beta, binarizer=binarizer, slow=slow, update_norm=update_norm))
    gradients = run.random_gradients()
    slopes = [literal_calibration(weight.detach().clone(), binarizer)[1] for weight in run.weights]
    found = run.step(gradients)
    assert [tuple(m.shape) for m in found] == [(24, 16), (16, 24)]
    for M, slope, gradient in zip(found, slopes, gradients, strict=True):
        torch.testing.assert_close(M, slope * gradient, rtol=1e-6, atol=0)  # max|T| of the literal one is rounded twice
        if binarizer != "dorefa":
            assert torch.equal(M, slope * gradient)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("binarizer", BINARIZERS)
def test_the_first_update_is_the_estimators_to_the_last_bit(beta: float, binarizer: str):
    run = make_run(Fsg(beta=beta, binarizer=binarizer))
    gradients = run.random_gradients()
    expected = [calibrate(w, binarizer).slope * g for w, g in zip(run.weights, gradients, strict=True)]
    assert all(torch.equal(M, ste) for M, ste in zip(run.step(gradients), expected, strict=True))


def test_with_the_papers_init_the_first_update_is_another():
    run = make_run(Fsg(binarizer="bwn", **PAPER))
    gradients = run.random_gradients()
    ste = gradients[0] * (run.weights[0].detach().abs() <= 1)
    assert (run.step(gradients)[0] - ste).norm() > 0.1 * ste.norm()


# 7 The history


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_ring_holds_the_last_raw_gradients_the_newest_last(length: int, steps: int):
    run = make_run(Fsg(length=length))
    fed = [run.random_gradients() for _ in range(steps)]
    for gradients in fed:
        weights = [weight.detach().clone() for weight in run.weights]
        run.step(gradients)
    for i, history in enumerate(run.hook.histories):
        assert torch.equal(history.gradients(), torch.stack([g[i].flatten() for g in fed[-length:]]))
        assert torch.equal(history.weight, weights[i])


@pytest.mark.parametrize("chunk", [1, 10, 16, 1000])
@pytest.mark.parametrize("slow", SLOW)
def test_each_update_is_the_formula_of_its_history(chunk: int, slow: str):
    method = Fsg(chunk=chunk, slow=slow, length=3, beta=0.4, **PAPER)  # 384 weights: 10 and 1000 do not divide them
    run = make_run(method)
    fed = []
    for _ in range(5):
        weights = [weight.detach().clone() for weight in run.weights]
        fed.append(run.random_gradients())
        found = run.step(fed[-1])
        for i, (M, weight) in enumerate(zip(found, weights, strict=True)):
            history = [gradients[i] for gradients in fed[-3:]]
            torch.testing.assert_close(M, literal_update(run.hook.nets, method, history, weight, i).detach())


def test_a_large_layer_is_taken_in_slices(monkeypatch: pytest.MonkeyPatch):
    def updates() -> list[Tensor]:
        run = make_run(Fsg(chunk=10, **PAPER))
        return [M for _ in range(3) for M in run.step(run.random_gradients())]

    whole = updates()
    monkeypatch.setattr(gradient_hook, "SLICE", 7)
    for found, expected in zip(updates(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_is_what_the_docstring_says(dtype: str):
    run = make_run(Fsg(history_dtype=dtype, length=4))
    run.step(run.random_gradients())
    n, itemsize = 384, {"float32": 4, "bfloat16": 2}[dtype]
    for state in run.optimizer.state_dict()["fsg"]["layers"]:
        held = [value for value in state.values() if isinstance(value, Tensor)]
        assert sum(t.untyped_storage().nbytes() for t in held) == n * (4 * itemsize + 4) + 4


def test_a_history_in_bfloat16_gives_nearly_the_same_updates():
    def last_update(dtype: str) -> Tensor:
        run = make_run(Fsg(history_dtype=dtype, **PAPER))
        return [run.step(run.random_gradients())[0] for _ in range(4)][-1]

    exact, rounded = last_update("float32"), last_update("bfloat16")
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


def test_the_newest_gradient_is_not_rounded_to_bfloat16():
    run = make_run(Fsg(history_dtype="bfloat16", binarizer="bwn"))
    gradients = run.random_gradients()
    gate = run.weights[0].detach().abs() <= 1
    assert torch.equal(run.step(gradients)[0], gradients[0] * gate)


def test_the_root_mean_square_of_a_history_is_that_of_the_steps_it_holds_in_float32():
    history = GradientHistory(torch.zeros(64), 3, torch.bfloat16)
    gradients = torch.randn(4, 64)
    for count, gradient in enumerate(gradients, 1):
        history.push(gradient, torch.zeros(64))
        held = gradients[max(0, count - 3) : count].bfloat16().float()
        assert history.rms().dtype == torch.float32
        torch.testing.assert_close(history.rms(), held.square().mean().sqrt())
        assert torch.equal(history.latest(), held[-1])
        assert torch.equal(history.gradients(slice(8, 24)), held[:, 8:24])


def test_all_of_a_history_goes_to_where_the_weights_are():
    history = GradientHistory(torch.zeros(4), 3, torch.bfloat16)
    history.to(torch.device("meta"))
    for tensor, dtype in ((history.ring, torch.bfloat16), (history.weight, torch.float32)):
        assert (tensor.device.type, tensor.dtype) == ("meta", dtype)
    assert history.norm.device.type == "meta"


# 8 Scale


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**20])
def test_updates_scale_with_the_gradients(slow: str, factor: float):
    def updates(factor: float) -> list[Tensor]:
        run = make_run(Fsg(slow=slow, **PAPER), lr=0.0)
        return [M for _ in range(4) for M in run.step([factor * g for g in run.random_gradients()])]

    for found, expected in zip(updates(factor), updates(1.0), strict=True):
        torch.testing.assert_close(found / factor, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_without_any_gradient_at_first_learns_later():
    run = make_run(Fsg(binarizer="dorefa", **PAPER))
    zero, some = [torch.zeros_like(w) for w in run.weights], run.random_gradients()
    assert all(torch.equal(M, z) for M, z in zip(run.step(zero), zero, strict=True))
    for gradients in ([zero[0], some[1]], some, zero, some):
        assert all(M.isfinite().all() for M in run.step(gradients))
    assert all(p.isfinite().all() for p in run.hook.nets.parameters())


# 10 Accumulation, ranks, resuming


def test_accumulated_gradients_train_as_those_of_one_batch():
    def trained(halves: bool) -> list[Tensor]:
        # Not init="ste": at its zeros some gradients of the nets are 0, and Adam makes steps of their rounding.
        net = make_net("linear", Fsg(beta=0.5, init="paper"))
        optimizer = torch.optim.SGD(net.model.parameters(), 0.05)
        hook_optimizer(net.model, optimizer, net.method)
        for _ in range(3):
            for part in net.halves() if halves else [net]:
                (part.loss() / (2 if halves else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        fsg = optimizer.state_dict()["fsg"]
        return [*net.model.parameters(), *fsg["nets"].values()]

    for found, expected in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.multiprocess
def test_two_ranks_stay_equal_to_the_last_bit_and_shards_are_refused(tmp_path: Path):
    torch.multiprocessing.spawn(train_and_be_refused_shards, (str(tmp_path),), nprocs=2)
    (model, own), (other_model, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(model[key], other_model[key]) for key in model)
    assert all(torch.equal(own["nets"][key], other["nets"][key]) for key in own["nets"])
    assert own["layers"][0]["count"] == 4
    assert own["nets"]["slow.out.weight"].abs().max() > 0
    assert "FSG needs whole gradients" in torch.load(tmp_path / "refusal1.pt")


@pytest.mark.parametrize("cut", [3, 6])  # before and after the ring of 5 is full
def test_a_resumed_trainer_ends_where_the_uninterrupted_one_does(tmp_path: Path, cut: int):
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "method": Fsg()}
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    first = trainer(tmp_path / "cut", **settings)
    first.add_callback(StopAt(cut))
    first.train()
    second = trainer(tmp_path / "cut", **settings)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == straight.state.global_step == 8
    ours, theirs = second.model.state_dict(), straight.model.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    ours, theirs = (one.optimizer.state_dict()["fsg"] for one in (second, straight))
    assert [name for name in theirs["nets"] if not torch.equal(ours["nets"][name], theirs["nets"][name])] == []
    assert [layer["count"] for layer in ours["layers"]] == [8] * 12


def test_a_trainer_does_not_go_on_from_a_checkpoint_without_fsg(tmp_path: Path):
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match=r"method was 'ste' and is 'fsg' \(resume with the same --method\)"):
        trainer(tmp_path, method=Fsg(), max_steps=3).train(resume_from_checkpoint=True)


def test_the_state_is_plain_and_loading_does_not_share_it(tmp_path: Path):
    run = make_run(Fsg())
    for _ in range(3):
        run.step(run.random_gradients())
    torch.save(run.optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    kept = copy.deepcopy(state)
    other = make_run(Fsg())
    other.optimizer.load_state_dict(state)
    other.model.load_state_dict(run.model.state_dict())
    gradients = run.random_gradients()
    assert all(torch.equal(M, N) for M, N in zip(run.step(gradients), other.step(gradients), strict=True))
    assert torch.equal(state["fsg"]["layers"][0]["ring"], kept["fsg"]["layers"][0]["ring"])
    assert all(torch.equal(state["fsg"]["nets"][key], value) for key, value in kept["fsg"]["nets"].items())


def test_the_nets_are_the_same_whatever_was_drawn_before_and_draw_nothing():
    torch.manual_seed(5)
    first = gradient_hook.make_nets(Fsg(**PAPER), 2).state_dict()
    drawn = torch.rand(3)
    second = gradient_hook.make_nets(Fsg(**PAPER), 2).state_dict()
    other = gradient_hook.make_nets(Fsg(seed=1, **PAPER), 2).state_dict()
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if key.endswith("into.weight"))


# 11 Low precision


def test_training_under_bf16_autocast_lowers_the_loss():
    net = make_net("linear", Fsg())
    optimizer = optimizer_of(net)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net.loss()
            loss.backward()
            optimizer.step()  # within autocast too, the nets compute in float32
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert {p.dtype for p in optimizer.state_dict()["fsg"]["nets"].values()} == {torch.float32}


def test_autocast_does_not_reach_the_nets():
    def updates(enabled: bool) -> list[Tensor]:
        run = make_run(Fsg(**PAPER))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return [M for _ in range(3) for M in run.step(run.random_gradients())]

    assert all(torch.equal(found, expected) for found, expected in zip(updates(True), updates(False), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_updated_from_a_history_in_float32(dtype: torch.dtype):
    method = Fsg(binarizer="bwn", **PAPER)
    run = make_run(method, TinyMLP().to(dtype))
    weight = run.weights[0].detach().clone()
    gradients = run.random_gradients()
    found = run.step(gradients)[0]
    expected = literal_update(run.hook.nets, method, [gradients[0].float()], weight.float(), 0)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.detach(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert {t.dtype for h in run.hook.histories for t in (h.ring, h.weight)} == {torch.float32}


def fp16_run(scaler: torch.amp.GradScaler, overflow_at: int = -1) -> Run:
    """Four steps of a fused AdamW, which torch's scaler calls whether or not a gradient is infinite."""
    net = make_net("linear", Fsg())
    run = hook_into(net.model, torch.optim.AdamW(net.model.parameters(), 0.01, fused=True), net.method)
    for index in range(4):
        scaler.scale(net.loss()).backward()
        if index == overflow_at:
            run.weights[0].grad[0, 0] = torch.inf
        before = copy.deepcopy(net.model.state_dict())
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        if index == overflow_at:
            assert all(torch.equal(value, before[key]) for key, value in net.model.state_dict().items())
    return run


@pytest.mark.parametrize("scale", [2.0, 1024.0])
def test_a_scaled_loss_trains_as_the_plain_one(scale: float):
    plain = fp16_run(torch.amp.GradScaler("cpu", enabled=False))
    scaled = fp16_run(torch.amp.GradScaler("cpu", init_scale=scale))
    for expected, found in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for expected, found in zip(plain.hook.histories, scaled.hook.histories, strict=True):
        torch.testing.assert_close(found.ring, expected.ring, rtol=1e-4, atol=1e-6)


def test_a_step_that_overflowed_leaves_history_and_weights_alone():
    run = fp16_run(torch.amp.GradScaler("cpu", init_scale=1024.0), overflow_at=2)
    assert [history.count for history in run.hook.histories] == [3, 3]
    assert all(history.ring.isfinite().all() for history in run.hook.histories)
    assert all(p.isfinite().all() for p in [*run.model.parameters(), *run.hook.nets.parameters()])


# 12, 13 What is replaced, and by how much


def test_other_gradients_are_untouched():
    net = make_net("linear", Fsg(**PAPER))
    optimizer = optimizer_of(net, lr=0.0)
    binary = {id(layer.weight) for layer in binary_layers(net.model)}
    for _ in range(3):
        optimizer.zero_grad()
        net.loss().backward()
        before = {name: p.grad.clone() for name, p in net.model.named_parameters()}
        optimizer.step()
        for name, p in net.model.named_parameters():
            assert torch.equal(p.grad, before[name]) == (id(p) not in binary), name


def test_a_layer_without_a_gradient_or_of_another_optimizer_is_left_alone():
    def updates(skipped: str) -> list[Tensor]:
        run = make_run(Fsg(**PAPER))
        first, second = run.weights
        if skipped == "optimizer":
            run.optimizer.param_groups[0]["params"] = [second]
        for _ in range(3):
            gradients = run.random_gradients()
            first.grad, second.grad = gradients[0].clone(), gradients[1].clone()
            if skipped == "none":
                first.grad = None
            run.optimizer.step()
            if skipped == "optimizer":
                assert torch.equal(first.grad, gradients[0])
        assert [history.count for history in run.hook.histories] == [0, 3]
        return [second.grad]

    assert torch.equal(*updates("none"), *updates("optimizer"))


def test_a_layer_that_misses_steps_keeps_its_history_and_its_embedding():
    run = make_run(Fsg(length=3, update_norm="free"))
    fed = []
    for used in (True, False, False, True, True):
        gradients = run.random_gradients()
        run.weights[0].grad = gradients[0].clone() if used else None
        run.weights[1].grad = gradients[1].clone()
        weight = run.weights[0].detach().clone()
        run.optimizer.step()
        fed += [gradients[0]] if used else []
    expected = literal_update(run.hook.nets, run.hook.method, fed, weight, 0)
    torch.testing.assert_close(run.weights[0].grad, expected.detach())


def test_two_layers_that_share_a_weight_take_one_update():
    class Shared(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
            self[2].weight = self[0].weight

    method = Fsg(binarizer="bwn")
    model = binarize_(Shared(), method, weight_scaling="none")
    run = hook_into(model, torch.optim.SGD(model.parameters(), 0.01), method)
    for _ in range(2):
        run.optimizer.zero_grad()
        model(torch.randn(4, 6)).sum().backward()
        raw = model[0].weight.grad.clone()
        run.optimizer.step()
    assert torch.equal(run.hook.histories[0].gradients()[-1].view(6, 6), raw)
    assert [history.count for history in run.hook.histories] == [2, 0]


@pytest.mark.parametrize("init", ["ste", "paper"])
@pytest.mark.parametrize("binarizer", BINARIZERS)
def test_every_layers_update_has_the_norm_of_the_straight_through_one(init: str, binarizer: str):
    run = make_run(Fsg(init=init, binarizer=binarizer, slow_lr=0.1))
    free = make_run(Fsg(init=init, binarizer=binarizer, slow_lr=0.1, update_norm="free"))
    for _ in range(6):
        gradients = run.random_gradients()
        expected = [(calibrate(w, binarizer).slope * g).norm() for w, g in zip(run.weights, gradients, strict=True)]
        found = [M.norm() for M in run.step(gradients)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        unbound = [M.norm() for M in free.step(gradients)]
    assert all(abs(u / e - 1) > 0.01 for u, e in zip(unbound, expected, strict=True))


# MetaQuant


@pytest.mark.parametrize("binarizer", BINARIZERS)
def test_metaquant_scales_each_gradient_by_a_net_of_its_weight(binarizer: str):
    run = make_run(MetaQuant(binarizer=binarizer, **PAPER))
    assert list(run.hook.nets) == ["fast"]
    for _ in range(3):
        weights, gradients = [w.detach().clone() for w in run.weights], run.random_gradients()
        found = run.step(gradients)
        inner, outer = run.hook.nets["fast"].into, run.hook.nets["fast"].out
        for M, weight, g in zip(found, weights, gradients, strict=True):
            value, slope = literal_calibration(weight, binarizer)
            f = sum(outer.weight[0, k] * torch.tanh(inner.weight[k, 0] * value + inner.bias[k]) for k in range(16))
            torch.testing.assert_close(M, (slope * g * (f + outer.bias[0])).detach(), rtol=1e-4, atol=1e-5)


def test_metaquant_learns_its_net():
    run = make_run(MetaQuant())
    before = copy.deepcopy(run.hook.nets)
    for _ in range(3):
        run.step(run.random_gradients())
    assert not any(torch.equal(p, q) for p, q in zip(run.hook.nets.parameters(), before.parameters(), strict=True))


# Statistics


def test_the_norm_ratio_the_cosine_and_the_nets_step_are_logged():
    net = make_net("linear", Fsg(binarizer="bwn", slow_lr=0.05, **PAPER))
    optimizer = optimizer_of(net, lr=0.0)
    run_hook = optimizer.state_dict()["fsg"]
    train_steps(net, optimizer, range(2), log=False)
    assert statistics(net.model) == {}
    before = copy.deepcopy(run_hook["nets"])
    begin_step(net.model, Step(2, 9, 0.0, log=True))
    net.loss().backward()
    layer = binary_layers(net.model)[1]
    straight = (layer.weight.grad * (layer.weight.abs() <= 1)).flatten().detach()
    optimizer.step()
    M = layer.weight.grad.flatten()
    change = torch.cat([(value - before[key]).flatten() for key, value in run_hook["nets"].items()]).norm()
    found = statistics(net.model)
    assert found["3/norm_ratio"] == pytest.approx((M.norm() / straight.norm()).item(), rel=1e-5)
    assert found["3/cosine"] == pytest.approx(F.cosine_similarity(M, straight, 0).item(), abs=1e-5)
    assert found["3/phi_update"] == found["2/phi_update"] == pytest.approx(change.item(), rel=1e-4)
    assert set(found) == {f"{i}/{name}" for i in "23" for name in ("norm_ratio", "cosine", "phi_update")}
    assert abs(found["3/norm_ratio"] - 1) > 0.01
    assert found["3/phi_update"] > 0


# Together with others


@pytest.mark.parametrize("other", [Surge(), Surge(aux="leaky"), ApproxSign()], ids=lambda m: getattr(m, "aux", m.name))
def test_it_combines_with_a_method_for_the_inputs(other: Method):
    net = make_net("linear", Fsg() + other)
    optimizer = optimizer_of(net)
    losses = train_steps(net, optimizer, range(10))
    assert losses[-1] < losses[0]
    assert optimizer.state_dict()["fsg"]["layers"][0]["count"] == 10


def test_it_does_not_combine_with_itself_by_another_name():
    with pytest.raises(ValueError, match="'fsg' and 'metaquant' cannot be combined: both define the weight_binarizer"):
        Fsg() + MetaQuant()


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("binarizer=xnor", "binarizer='xnor': expected one of dorefa, bwn, bwn_channel"),
        ("slow=gru", "slow='gru': expected one of mamba, lstm"),
        ("update_norm=one", "update_norm='one': expected one of ste, free"),
        ("init=zero", "init='zero': expected one of ste, paper"),
        ("history_dtype=int8", "history_dtype='int8': expected one of float32, bfloat16"),
        ("length=0", "length=0: expected an integer >= 1"),
        ("chunk=0", "chunk=0: expected an integer >= 1"),
        ("beta=1.5", r"beta=1.5: expected a number from 0 \(fast net only\) to 1 \(slow net only\)"),
        ("beta=nan", "beta=nan: expected a number from 0"),
        ("slow_lr=-1", "slow_lr=-1.0: expected a number >= 0"),
        ("seed=-1", "seed=-1: expected an integer >= 0"),
        ("clip=0", "clip=0.0: expected a number > 0"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_what_is_expected(arguments: str, message: str):
    with pytest.raises(ValueError, match=message):
        make_method("fsg", arguments)


def test_metaquant_has_no_slow_net():
    with pytest.raises(ValueError, match=r"beta=0.5: MetaQuant has no slow net, so that it stays 0; fsg has one"):
        MetaQuant(beta=0.5)


def test_a_model_without_binary_weights_is_refused():
    model = binarize_(nn.Sequential(nn.Linear(4, 4)), Fsg(), binarize="activations")
    with pytest.raises(ValueError, match="method 'fsg' generates the gradients of binary weights: no layer has any"):
        hook_optimizer(model, torch.optim.SGD(model.parameters(), 0.1), Fsg())


def test_a_model_in_which_another_method_is_installed_is_refused():
    model = binarize_(nn.Sequential(nn.Linear(4, 4)), STE())
    with pytest.raises(ValueError, match=r"is not the one in the model, whose layer 0 has a IdentitySign: call"):
        hook_optimizer(model, torch.optim.SGD(model.parameters(), 0.1), Fsg())


def one_layer(method: Method = Fsg()) -> nn.Module:  # noqa: B008
    return binarize_(nn.Sequential(nn.Linear(4, 4)), method)


def test_training_without_the_hook_is_refused():
    model = one_layer()
    with pytest.raises(RuntimeError, match=r"call hf_bnn\.training\.hook_optimizer\(model, optimizer, method\)"):
        end_backward(model, Step(0, 1, 0.1))


def test_a_copy_of_a_hooked_model_is_not_hooked_but_the_original_still_is():
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hook_optimizer(model, optimizer, Fsg())
    twin = copy.deepcopy(model)
    end_backward(model, Step(0, 1, 0.1))
    with pytest.raises(RuntimeError, match="hook_optimizer"):
        end_backward(twin, Step(0, 1, 0.1))
    hook_optimizer(twin, torch.optim.SGD(twin.parameters(), 0.1), Fsg())
    end_backward(twin, Step(0, 1, 0.1))


def test_a_frozen_layer_needs_no_hook():
    model = one_layer()
    model[0].weight.requires_grad_(False)
    end_backward(model, Step(0, 1, 0.1))


def test_a_weight_that_is_no_longer_whole_is_refused():
    run = make_run(Fsg())
    layer = binary_layers(run.model)[1]
    flat = nn.Parameter(layer.weight.detach().flatten()[:100])
    flat.grad = torch.ones(100)
    layer.weight = flat
    run.optimizer.add_param_group({"params": [flat]})
    with pytest.raises(
        ValueError, match=r"needs whole gradients: the weight of binary layer 1 is sharded, or no longer"
    ):
        run.optimizer.step()


def test_a_closure_is_refused():
    run = make_run(Fsg())
    for call in (lambda f: run.optimizer.step(f), lambda f: run.optimizer.step(closure=f)):
        with pytest.raises(ValueError, match=r"method 'fsg' cannot be used with optimizer.step\(closure\)"):
            call(lambda: torch.ones(()))
    run.optimizer.step(None)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Fsg(length=4), r"has layer 0's ring of shape \(4, 384\) .* where this run has .* \(5, 384\)"),
        (
            Fsg(chunk=8),
            r"has slow.into.weight of shape \(8, 8\) where this run has slow.into.weight of shape \(8, 16\)",
        ),
        (Fsg(history_dtype="bfloat16"), r"layer 0's ring .* in torch.bfloat16 where .* in torch.float32"),
        (Fsg(beta=1.0), r"layer 0's ring of .* where this run has fast.into.weight of shape \(16, 1\)"),
    ],
)
def test_the_state_of_other_settings_is_refused_with_the_first_difference(other: Fsg, message: str):
    run = make_run(Fsg())
    before = copy.deepcopy(run.optimizer.state_dict()["fsg"]["nets"])
    with pytest.raises(ValueError, match=message + r".*; resume with the same model and --method_args"):
        run.optimizer.load_state_dict(make_run(other).optimizer.state_dict())
    after = run.optimizer.state_dict()["fsg"]["nets"]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_state_of_fewer_layers_is_refused():
    run = make_run(Fsg(beta=0.0))
    state = copy.deepcopy(run.optimizer.state_dict())
    state["fsg"]["layers"].pop()
    with pytest.raises(ValueError, match=r"the checkpoint has nothing where this run has layer 1's ring"):
        run.optimizer.load_state_dict(state)


def test_the_state_of_another_method_is_refused():
    run = make_run(Fsg())
    for state in (
        torch.optim.SGD(run.model.parameters(), 0.1).state_dict(),
        make_run(MetaQuant()).optimizer.state_dict(),
    ):
        with pytest.raises(ValueError, match="was written without method 'fsg': resume with the same --method"):
            run.optimizer.load_state_dict(state)


# 14 Accuracy


def digits_cnn() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for width_in, width, stride in ((16, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Digits(NamedTuple):
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def fit(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
        """Batches of 64, the same for everyone. The mean accuracy over the second half, every fifth step."""
        generator = torch.Generator().manual_seed(0)
        x, y = self.train
        accuracies = []
        for step in range(1, steps + 1):
            rows = torch.randint(len(x), (64,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x[rows]), y[rows]).backward()
            optimizer.step()
            if step > steps // 2 and step % 5 == 0:
                accuracies.append(self.accuracy(model))
        return sum(accuracies) / len(accuracies)

    def accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            return (model.eval()(self.test[0]).argmax(1) == self.test[1]).float().mean().item()


@pytest.mark.slow
def test_a_binarized_net_recovers_no_worse_than_with_the_straight_through_estimator():
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.view(-1, 1, 8, 8).float() / 16
    digits = Digits((x[:1200], y[:1200]), (x[1200:], y[1200:]))
    found: dict[str, list[float]] = {"ste": [], "fsg": []}
    for seed in range(2):
        torch.manual_seed(seed)
        plain = digits_cnn()
        digits.fit(plain, torch.optim.Adam(plain.parameters(), 3e-3), 150)
        assert digits.accuracy(plain) > 0.9
        for method in (STE(), Fsg()):
            model = binarize_(copy.deepcopy(plain), method, skip=("0", "14"), binarize="weights")
            assert digits.accuracy(model) < 0.5
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            hook_optimizer(model, optimizer, method)
            found[method.name].append(digits.fit(model, optimizer, 80))
    assert min(found["fsg"]) > 0.8
    assert sum(found["fsg"]) / 2 > sum(found["ste"]) / 2 - 0.03


def test_the_nets_gradients_are_the_mean_over_the_ranks(monkeypatch: pytest.MonkeyPatch):
    ranks = [[torch.randn(3, 2), torch.randn(5)] for _ in range(4)]
    others = sum(torch.cat([g.flatten() for g in rank]) for rank in ranks[1:])
    monkeypatch.setattr(gradient_hook.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(gradient_hook.dist, "get_world_size", lambda: len(ranks))
    monkeypatch.setattr(gradient_hook.dist, "all_reduce", lambda joined: joined.add_(others))
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in ranks[0]]
    for parameter, gradient in zip(parameters, ranks[0], strict=True):
        parameter.grad = gradient.clone()
    gradient_hook._average_gradients(parameters)
    for i, parameter in enumerate(parameters):
        torch.testing.assert_close(parameter.grad, torch.stack([rank[i] for rank in ranks]).mean(0))
