"""FSG in training: accumulation, ranks, resuming, low precision, MetaQuant, sums, errors and accuracy."""

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fsg_runs import PAPER, Run, hook_into, literal_calibration, literal_update, make_run
from fsg_worker import train_and_be_refused_shards
from sklearn.datasets import load_digits
from test_trainer import StopAt, trainer
from tiny import TinyMLP, make_net, optimizer_of, train_steps
from torch import Tensor, nn

from hf_bnn import binarize_
from hf_bnn.methods import STE, ApproxSign, Method, Step, Surge, make_method
from hf_bnn.methods.fsg import BINARIZERS, Fsg, gradient_hook
from hf_bnn.methods.fsg.calibration import calibrate
from hf_bnn.methods.metaquant import MetaQuant
from hf_bnn.nn.layers import binary_layers
from hf_bnn.training import begin_step, end_backward, hook_optimizer, statistics

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
