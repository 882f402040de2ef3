"""FSG and MetaQuant: the generated gradient against its formula, how its nets learn, and its state."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from fsg_runs import PAPER, SLOW, hook_into, literal_calibration, literal_update, make_run
from tiny import make_net, optimizer_of, train_steps
from torch import Tensor, nn
from torch.func import functional_call

from hf_bnn import binarize_
from hf_bnn.functional import weight_scale
from hf_bnn.methods import STE, Site
from hf_bnn.methods.fsg import BINARIZERS, Fsg, gradient_hook
from hf_bnn.methods.fsg.calibration import calibrate
from hf_bnn.methods.fsg.gradient_hook import RawSign
from hf_bnn.methods.fsg.history import GradientHistory
from hf_bnn.training import parameter_roles

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
