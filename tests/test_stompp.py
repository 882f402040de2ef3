"""StoMPP against its formulas, in the order of its specification's list."""

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from method_training import Training
from small_nets import digits, plain_mlp
from stompp_order import Arm, Net, run_arm
from test_trainer import StopAt, trainer
from tiny import make_net, optimizer_of, tiny_batch, tiny_model, train_steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_bnn import binarize_, pack_
from hf_bnn.install import binary_fraction, number_by_execution_
from hf_bnn.methods import STE, Position, Site, Step, Stompp
from hf_bnn.methods.stompp import ORDERS, SCHEDULES, FreezingKeys, MaskedSign, mix
from hf_bnn.nn.layers import binary_layers
from hf_bnn.training import begin_step, end_backward, hook_optimizer, partial_evaluation

TOTAL = 200


def at(index: int, total: int = TOTAL) -> Step:
    return Step(index, total, 0.1)


def masked(model: nn.Module) -> list[MaskedSign]:
    return [part for layer in binary_layers(model) for _, part in layer.parts() if isinstance(part, MaskedSign)]


def deep(layers: int = 4, width: int = 16, **kwargs) -> nn.Sequential:
    """A float stem and `layers` binary layers, with BatchNorm between them."""
    body = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.BatchNorm1d(width))]
    model = nn.Sequential(nn.Linear(width, width), *body)
    return binarize_(model, Stompp(**kwargs), skip=("0",), weight_scaling="none")


def set_fractions(model: nn.Module, fractions: list[float]) -> None:
    """Put each layer where its frozen share is as given, with a mask of its own."""
    for layer, fraction in zip(binary_layers(model), fractions, strict=True):
        for _, part in layer.parts():
            if isinstance(part, MaskedSign):
                part.fraction = fraction
                part.mask = (torch.rand(part.shape) < fraction).float() if 0 < fraction < 1 else None


# 1: the mask


@pytest.mark.parametrize("refresh", [0, 1, 7, 100])
@pytest.mark.parametrize("step", [0, 5, 99, 1234])
def test_the_frozen_share_is_p_within_five_standard_deviations(refresh: int, step: int):
    n = 40_000
    keys = FreezingKeys(n, refresh, (0, 3, 1)).at(step)
    for p in (0.01, 0.3, 0.5, 0.9):
        assert abs((keys < p).float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert not (keys < 0.0).any()
    assert (keys < 1.0).all()


@pytest.mark.parametrize(("n", "refresh"), [(1000, 10), (1000, 7), (5, 8)])
def test_exactly_one_in_r_keys_changes_at_every_step(n: int, refresh: int):
    keys = FreezingKeys(n, refresh, (0,))
    before = keys.at(0).clone()
    changed = []
    for step in range(1, 3 * refresh + 1):
        after = keys.at(step)
        changed.append(int((after != before).sum()))
        before = after.clone()
    assert set(changed) <= {n // refresh, n // refresh + 1}
    assert sum(changed[:refresh]) == n  # after r steps every key is a new one


def test_the_mask_only_grows_when_there_is_no_refresh():
    keys = FreezingKeys(1000, 0, (0,))
    masks = [keys.at(step) < p for step, p in enumerate((0.1, 0.2, 0.5, 0.8))]
    for smaller, larger in itertools.pairwise(masks):
        assert (larger | ~smaller).all()
        assert larger.sum() > smaller.sum()


def test_a_frozen_entry_may_thaw_when_there_is_a_refresh():
    keys = FreezingKeys(1000, 2, (0,))
    before = keys.at(0) < 0.5
    assert (before & ~(keys.at(1) < 0.5)).any()


@pytest.mark.parametrize("refresh", [0, 1, 10])
@pytest.mark.parametrize("step", [0, 3, 9, 10, 57])
def test_the_keys_from_cold_are_those_of_one_who_has_taken_every_step(refresh: int, step: int):
    stepped = FreezingKeys(100, refresh, (1, 2))
    for index in range(step + 1):
        stepped.at(index)
    cold = FreezingKeys(100, refresh, (1, 2)).at(step)
    assert torch.equal(stepped.at(step), cold)
    stepped.at(step + 40)
    assert torch.equal(stepped.at(step), cold)  # back again: a resume in the same process


def test_every_place_has_keys_of_its_own_and_the_same_on_every_rank():
    def keys(*place: int, seed: int) -> Tensor:
        torch.manual_seed(seed)  # ranks differ in it
        return FreezingKeys(100, 5, place).at(17)

    assert torch.equal(keys(0, 1, 0, seed=1), keys(0, 1, 0, seed=2))
    assert not torch.equal(keys(0, 1, 0, seed=1), keys(0, 1, 1, seed=1))
    assert not torch.equal(keys(0, 1, 0, seed=1), keys(0, 2, 0, seed=1))
    assert not torch.equal(keys(0, 1, 0, seed=1), keys(1, 1, 0, seed=1))


def test_drawing_a_mask_leaves_the_global_random_numbers_alone():
    model, state = deep(), torch.get_rng_state()
    begin_step(model, at(10))
    assert masked(model)[0].mask is not None
    assert torch.equal(torch.get_rng_state(), state)


# 2: the schedule


def fractions(method: Stompp, units: int) -> Tensor:
    """(steps, units)."""
    sites = [Site(unit, units) for unit in range(units)]
    return torch.tensor([[method.fraction(site, at(index)) for site in sites] for index in range(TOTAL)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("units", [1, 3, 7])
def test_p_never_falls_and_ends_at_one(order: str, schedule: str, units: int):
    p = fractions(Stompp(order=order, schedule=schedule), units)
    assert (p[1:] >= p[:-1]).all()
    assert (p[0] == 0).all()
    assert (p[int(0.9 * TOTAL) :] == 1).all()
    assert ((p >= 0) & (p <= 1)).all()


@pytest.mark.parametrize("units", [2, 3, 7])
def test_forward_goes_from_input_to_output_one_unit_at_a_time(units: int):
    p = fractions(Stompp(), units)
    assert (p[:, 1:] <= p[:, :-1]).all()
    assert (((p > 0) & (p < 1)).sum(1) <= 1).all()
    assert ((p > 0) & (p < 1)).any(0).all()


def test_reverse_is_forward_mirrored_and_global_is_all_at_once():
    forward, reverse = fractions(Stompp(), 5), fractions(Stompp(order="reverse"), 5)
    assert torch.equal(reverse, forward.flip(1))
    everywhere = fractions(Stompp(order="global"), 5)
    assert torch.equal(everywhere, everywhere[:, :1].expand_as(everywhere))


def test_the_schedules_have_their_shapes():
    halfway = {name: shape(0.5) for name, shape in SCHEDULES.items()}
    expected = {"cubic": 1 / 8, "linear": 1 / 2, "quadratic": 1 / 4, "cosine": 1 / 2, "flipped_quadratic": 3 / 4}
    assert halfway == pytest.approx(expected)
    assert {shape(0.0) for shape in SCHEDULES.values()} == {0.0}
    assert {shape(1.0) for shape in SCHEDULES.values()} == {1.0}


@pytest.mark.parametrize("total", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("end", [0.1, 0.9, 1.0])
def test_the_last_step_of_even_the_shortest_run_is_fully_binary(total: int, end: float):
    for order in ORDERS:
        for unit in range(4):
            assert Stompp(order=order, end=end).fraction(Site(unit, 4), at(total - 1, total)) == 1


def test_the_refresh_period_fits_the_window():
    site = Site(0, 10)
    assert Stompp().refresh_period(site, at(0, 100_000)) == 100
    assert Stompp().refresh_period(site, at(0, 1000)) == 1000 * 9 // 10 // 10 // 8
    assert Stompp().refresh_period(site, at(0, 20)) == 1
    assert Stompp(order="global").refresh_period(site, at(0, 800)) == 90
    assert Stompp(refresh=0).refresh_period(site, at(0, 100_000)) == 0


# 3: the values


@pytest.mark.parametrize("limit", [None, 0.25])
def test_frozen_values_are_plus_or_minus_the_scale_and_live_ones_are_clipped_bit_for_bit(limit: float | None):
    x = torch.randn(64, 32)
    x[0, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    mask = torch.rand(64, 32) < 0.5
    scale = 1.0 if limit is None else limit  # a power of two: multiplying by it rounds nothing
    y = scale * mix(x, mask, None if limit is None else torch.tensor(limit))
    signs = torch.where(x < 0, -1.0, 1.0)
    assert torch.equal(y[mask], scale * signs[mask])
    assert torch.equal(y[~mask], x.clamp(-scale, scale)[~mask])


def test_a_weights_clip_saturates_at_the_scale_of_its_channel():
    layer = binarize_(nn.Sequential(nn.Linear(12, 8)), Stompp())[0]
    w = layer.weight.detach()
    scale = w.abs().mean(1, keepdim=True)
    set_fractions(layer, [0.5])
    mask = layer.weight_binarizer.mask.bool()
    effective = scale * layer.weight_binarizer(layer.weight)
    hard, live = scale * torch.where(w < 0, -1.0, 1.0), torch.clamp(w, -scale, scale)
    torch.testing.assert_close(effective, torch.where(mask, hard, live))


def test_a_channel_of_zeros_is_finite():
    layer = binarize_(nn.Sequential(nn.Linear(12, 8)), Stompp()).train()[0]
    with torch.no_grad():
        layer.weight[0].zero_()
    for fraction in (0.0, 0.5, 1.0):
        set_fractions(layer, [fraction])
        layer(torch.randn(3, 12)).sum().backward()
        assert layer.weight.grad.isfinite().all()


def test_activation_masks_are_shared_by_batch_tokens_and_pixels():
    assert binarize_(nn.Sequential(nn.Linear(12, 8)), Stompp())[0].input_binarizer.shape == (12,)
    assert binarize_(nn.Sequential(nn.Conv2d(4, 8, 3)), Stompp())[0].input_binarizer.shape == (4, 1, 1)


def test_the_mask_of_a_product_repeats_along_the_last_dimension():
    net = make_net("matmul", Stompp())
    part = net.model.attention.scores.left_binarizer
    part.fraction, part.mask = 0.5, (torch.rand(64) < 0.5).float()
    x = torch.full((2, 3, 150), 0.5)
    expected = torch.where(part.mask.repeat(3)[:150] == 1, 1.0, 0.5).expand_as(x)
    assert torch.equal(part(x), expected)


# 4: both ends of the schedule


def clipped_net(model: nn.Sequential, x: Tensor, hard: bool) -> Tensor:
    """The same network by hand, with everything clipped, or everything a sign."""
    for module in model:
        if isinstance(module, nn.Linear) and hasattr(module, "input_binarizer"):
            f = (lambda u: torch.where(u < 0, -1.0, 1.0)) if hard else (lambda u: u.clamp(-1, 1))
            x = nn.functional.linear(f(x), f(module.weight), module.bias)
        else:
            x = module(x)
    return x


@pytest.mark.parametrize("ste", [True, False])
def test_at_p_0_it_is_the_clipped_network_with_its_gradients(ste: bool):
    model, x = deep(ste=ste), torch.randn(8, 16)
    set_fractions(model, [0.0] * 4)
    model(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = clipped_net(model, x, hard=False)
    expected.square().sum().backward()
    torch.testing.assert_close(model(x), expected)
    for a, b in zip(found, [p.grad for p in model.parameters()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_at_p_1_it_is_the_sign_network_and_the_packed_one():
    model, x = deep(), torch.randn(8, 16)
    set_fractions(model, [1.0] * 4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), clipped_net(model, x, hard=True))
        model.eval()
        for layer in binary_layers(model):
            layer.partial = True
        trained = model(x)
        assert torch.equal(pack_(model)(x), trained)


# 5: the gradients


@pytest.mark.parametrize("limit", [None, 0.5])
def test_without_ste_the_gradient_is_exactly_0_at_frozen_entries_and_the_gates_elsewhere(limit: float | None):
    x, mask = torch.randn(64, 32, requires_grad=True), torch.rand(64, 32) < 0.5
    tensor = None if limit is None else torch.tensor(limit)
    bound = limit or 1.0
    mix(x, mask, tensor, ste=False).sum().backward()
    assert torch.equal(x.grad, ((x.abs() <= bound) & ~mask).float())
    x.grad = None
    mix(x, mask, tensor, ste=False, bound=None).sum().backward()
    assert torch.equal(x.grad, (~mask).float())
    x.grad = None
    mix(x, True, tensor, ste=False).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))  # zeros, not None: DDP waits for every gradient


def test_with_ste_the_gradient_does_not_depend_on_the_mask():
    x, G = torch.randn(64, 32), torch.randn(64, 32)
    gradients = []
    for mask in (False, True, torch.rand(64, 32) < 0.5):
        z = x.clone().requires_grad_()
        mix(z, mask).backward(G)
        gradients.append(z.grad)
    assert torch.equal(gradients[0], G * (x.abs() <= 1))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("scaling", ["channel", "layer", "none"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_once_all_is_frozen_a_step_with_ste_is_the_straight_through_estimators_to_the_last_bit(scaling: str, kind: str):
    x = 3 * torch.randn(5, 6, 4, 4) if kind == "conv" else 3 * torch.randn(5, 6)
    found = []
    for method in (STE(clip=2.0), Stompp(clip=2.0)):
        torch.manual_seed(0)
        layer = nn.Conv2d(6, 4, 3) if kind == "conv" else nn.Linear(6, 4)
        layer.weight.data.mul_(0.1)  # far from 1, where a bound in units of the scale and one of 1 part
        net, z = binarize_(nn.Sequential(layer), method, weight_scaling=scaling).train(), x.clone().requires_grad_()
        begin_step(net, at(TOTAL - 1))
        net(z).square().sum().backward()
        found.append([z.grad, net[0].weight.grad, net[0].bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("scaling", ["channel", "layer", "none"])
@pytest.mark.parametrize("ste", [True, False])
def test_a_live_weights_gradient_has_the_size_of_the_straight_through_estimators(scaling: str, ste: bool):
    layer = binarize_(nn.Sequential(nn.Linear(6, 4)), Stompp(ste=ste), weight_scaling=scaling).train()[0]
    set_fractions(layer, [0.0])
    G = torch.randn(4, 6)
    layer.weight_binarizer(layer.weight).backward(G)  # the straight-through estimator hands G on as it is
    passed = layer.weight.abs() <= (layer.scale()[:, None] if scaling != "none" else 1) if not ste else torch.ones(4, 6)
    assert torch.equal(layer.weight.grad, G * passed)


@pytest.mark.parametrize(
    ("arguments", "gated"),
    [
        ({}, False),
        ({"ste": False}, True),
        ({"weight_gate": "on"}, True),
        ({"weight_gate": "off", "ste": False}, False),
    ],
)
def test_the_weights_gate_is_off_with_ste_unless_it_is_asked_for(arguments: dict, gated: bool):
    layer = binarize_(nn.Sequential(nn.Linear(6, 4)), Stompp(**arguments)).train()[0]
    set_fractions(layer, [0.0])
    layer.weight_binarizer(layer.weight).sum().backward()
    beyond = layer.weight.abs() > layer.scale()[:, None]
    assert beyond.any()
    assert bool((layer.weight.grad[beyond] == 0).all()) == gated
    assert (layer.weight.grad[~beyond] == 1).all()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "matmul"])
def test_inputs_pass_the_gradient_up_to_the_clip_bound(kind: str, clip: float, fraction: float):
    found = 0
    for layer in binary_layers(make_net(kind, Stompp(clip=clip)).model):
        for slot, part in layer.parts():
            if isinstance(part, MaskedSign) and slot != "weight_binarizer":
                part.fraction = fraction
                part.mask = (torch.rand(part.shape) < 0.5).float() if fraction == 0.5 else None
                x = (3 * torch.randn(2, *([32] if part.periodic else part.shape))).requires_grad_()
                part(x).sum().backward()
                assert torch.equal(x.grad, (x.abs() <= clip).float())
                found += 1
    assert found


# 6: the blockade


def test_without_ste_nothing_in_front_of_a_binary_unit_learns():
    model = deep(4, ste=False)
    set_fractions(model, [1.0, 1.0, 0.5, 0.0])
    model(torch.randn(32, 16)).square().sum().backward()
    stem, *units = model[0], *binary_layers(model)
    norms = [layer.weight.grad.norm().item() for layer in (stem, *units)]
    assert norms[:3] == [0.0, 0.0, 0.0]
    assert min(norms[3:]) > 0


# 7: what stays


def test_no_key_of_it_is_in_the_state_dict():
    model = tiny_model()
    plain = set(model.state_dict())
    net = make_net("bert", Stompp())
    begin_step(net.model, at(10))
    assert any(part.mask is not None for part in masked(net.model))
    binarize = set(net.model.state_dict())
    assert binarize == {key for key in plain if ".layer.1." not in key}


def test_a_model_without_a_trainer_is_fully_binary():
    model, x = binarize_(nn.Sequential(nn.Linear(12, 8)), Stompp()), torch.randn(4, 12)
    assert binary_fraction(model) == 1
    with torch.no_grad():
        torch.testing.assert_close(model.train()(x), model.eval()(x))


# 8: ranks, accumulation, checkpointing, resume


def test_micro_batches_and_gradient_checkpointing_share_the_steps_mask():
    model = deep(2)
    begin_step(model, at(45))  # in the middle of the first unit's window
    part = masked(model)[0]
    assert 0 < part.fraction < 1
    mask = part.mask.clone()
    x = torch.randn(8, 16)
    model(x).sum().backward()
    direct = model[1].weight.grad.clone()
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(model[1].weight.grad, direct)
    assert torch.equal(part.mask, mask)


RUN = {"max_steps": 24, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 4}


@pytest.mark.parametrize("method", [Stompp(), Stompp(ste=False, zero_momentum=True)], ids=["ste", "free"])
def test_a_run_resumed_in_the_middle_of_a_window_is_bitwise_the_uninterrupted_one(tmp_path, method: Stompp):
    straight = trainer(tmp_path / "straight", method=method, **RUN)
    straight.train()
    first = trainer(tmp_path / "cut", method=method, **RUN)
    first.add_callback(StopAt(4))
    first.train()
    halves = [part.fraction for part in masked(first.model)]
    assert any(0 < p < 1 for p in halves)  # cut within a unit's window
    assert 0 < binary_fraction(first.model) < 1
    second = trainer(tmp_path / "cut", method=method, **RUN)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 24
    assert binary_fraction(second.model) == 1
    ours, theirs = second.model.state_dict(), straight.model.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


# 9: the functional test, and what it must be able to show


@pytest.mark.slow
def test_forward_beats_reverse_in_a_plain_network():
    data, training = digits(), Training(steps=600, batch=128, lr=0.1)
    net = Net(lambda pixels: plain_mlp(6, 64, pixels), "both", {})
    reached = {
        order: [run_arm(net, Arm(Stompp(order=order, ste=False)), data, training, seed) for seed in range(3)]
        for order in ("forward", "reverse")
    }
    assert sum(reached["forward"]) / 3 - sum(reached["reverse"]) / 3 >= 2, reached


# Units, sides, momentum


def test_layers_that_read_the_same_tensor_are_one_unit():
    model = tiny_model()
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    number_by_execution_(model, lambda: model(**batch))
    layer = model.bert.encoder.layer[0]
    attention = layer.attention
    sites = [
        m.around.site for m in (attention.self.query, attention.self.key, attention.self.value, attention.output.dense)
    ]
    assert [site.group for site in sites] == [Position(0, 8), Position(0, 8), Position(0, 8), Position(1, 8)]
    assert {site.block for site in sites} == {Position(0, 2)}
    assert [site.index for site in sites] == [0, 1, 2, 3]
    assert Stompp(unit="linear").position(sites[2]) == Position(2, 12)
    assert Stompp(unit="group").position(sites[2]) == Position(0, 8)
    assert Stompp(unit="block").position(sites[2]) == Position(0, 2)


class ShortcutFirst(nn.Module):
    """Defines its shortcut before its main path, and runs it after; one layer is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.shortcut, self.main = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x * 2)


def test_layers_are_numbered_in_the_order_in_which_they_run():
    model = binarize_(ShortcutFirst(), Stompp())
    assert model.main.around.site.index == 2
    number_by_execution_(model, lambda: model(torch.randn(2, 6)))
    order = [layer.weight_binarizer.site.index for layer in (model.main, model.shortcut, model.unused)]
    assert order == [0, 1, 2]
    assert model.main.around.site.weight_scaling == "channel"


@pytest.mark.parametrize(("on", "weights", "inputs"), [("both", 1, 1), ("weights", 1, 0), ("activations", 0, 1)])
def test_the_other_side_has_the_straight_through_estimator(on: str, weights: int, inputs: int):
    method = Stompp(on=on)
    layer = binarize_(nn.Sequential(nn.Linear(12, 8)), method)[0]
    assert isinstance(layer.weight_binarizer, MaskedSign) == weights
    assert isinstance(layer.input_binarizer, MaskedSign) == inputs
    plain = binarize_(nn.Sequential(nn.Linear(12, 8)), STE())[0]
    if not weights:
        assert type(layer.weight_binarizer) is type(plain.weight_binarizer)
    if not inputs:
        assert type(layer.input_binarizer) is type(plain.input_binarizer)
    slots = {name for name, own in (("weight_binarizer", weights), ("input_binarizer", inputs)) if own}
    assert method.claims() == slots
    assert Stompp(on=on, zero_momentum=True).claims() == slots | {"optimizer_hook"}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_weight_forgets_its_momentum_when_it_freezes(kind: str):
    method = Stompp(order="global", schedule="linear", end=1.0, refresh=0, zero_momentum=True)
    model, x = binarize_(nn.Sequential(nn.Linear(12, 8)), method), torch.randn(16, 12)
    weight, key = model[0].weight, {"sgd": "momentum_buffer", "adam": "exp_avg"}[kind]
    optimizer = {
        "sgd": torch.optim.SGD([weight], 0.01, momentum=0.9),
        "adam": torch.optim.Adam([weight], 0.01),
    }[kind]
    hook_optimizer(model, optimizer, method)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.state[weight].get(key, torch.zeros(())).clone()))
    frozen = torch.zeros(8, 12, dtype=torch.bool)
    for index in range(20):
        begin_step(model, at(index, 20))
        part = model[0].weight_binarizer
        now = part.mask.bool() if part.mask is not None else torch.tensor(part.fraction >= 1).expand(8, 12)
        new, frozen = now & ~frozen, now
        model(x).square().sum().backward()
        end_backward(model, at(index, 20))
        optimizer.step()
        optimizer.zero_grad()
        if index:
            assert (seen[-1][new] == 0).all()
            assert index == 19 or (seen[-1][~frozen] != 0).any()
    assert frozen.all()


# The model is not yet binary


def test_a_model_that_is_half_soft_is_not_packed_without_commit():
    net = make_net("linear", Stompp())
    train_steps(net, optimizer_of(net), range(30))  # of 100
    assert 0 < binary_fraction(net.model) < 1
    with pytest.raises(ValueError, match=r"has made only 0\.\d{3} of this TinyMLP binary.*allow_unfinished=True"):
        pack_(net.model)
    pack_(net.model, allow_unfinished=True)
    assert binary_fraction(net.model) == 1


def test_a_run_that_stops_early_says_so_and_refuses_to_save_a_packed_model(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_bnn.training.trainer.logger.warning", warnings.append)
    one = trainer(tmp_path, method=Stompp(), max_steps=24)
    one.add_callback(StopAt(4))
    one.train()
    assert "training has stopped when 0." in warnings[-1]
    with pytest.raises(ValueError, match="allow_unfinished=True"):
        one.save_model()
    assert not list(tmp_path.glob("*.safetensors"))
    one.args.allow_unfinished = True
    one.save_model()
    assert (tmp_path / "model.safetensors").exists()


def test_the_best_model_is_sought_only_among_fully_binary_ones(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    one = trainer(tmp_path, method=Stompp(end=0.5), max_steps=8, load_best_model_at_end=True, **settings)
    one.train()
    assert int(one.state.best_model_checkpoint.rpartition("-")[2]) > 4
    fractions = {entry["step"]: entry.get("binary_fraction", 1) for entry in one.state.log_history if "loss" in entry}
    assert fractions[1] == 0
    assert [step for step, fraction in fractions.items() if fraction == 1] == [5, 6, 7, 8]


def test_the_partial_network_can_be_evaluated_beside_the_binary_one(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_partial": True}
    one = trainer(tmp_path, method=Stompp(), max_steps=4, **settings)
    one.compute_metrics = lambda prediction: {"accuracy": float((prediction.predictions.argmax(-1) == 0).mean())}
    one.train()
    partial = [entry for entry in one.state.log_history if "eval_partial_accuracy" in entry]
    assert [entry["step"] for entry in partial] == [2]  # at the end of the schedule the two are one
    whole = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry]
    assert partial[0]["eval_partial_loss"] != whole[0]


def test_a_partial_evaluation_computes_what_training_does():
    model, x = deep(), torch.randn(8, 16)
    begin_step(model, at(50))
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    with torch.no_grad():
        training = model(x)
        model.eval()
        assert not torch.equal(model(x), training)
        with partial_evaluation(model):
            assert torch.equal(model(x), training)
        assert not torch.equal(model(x), training)


# Compilation


def test_a_module_has_at_most_three_graphs():
    graphs = Counter()

    def count(graph, inputs):
        graphs["compiled"] += 1
        return graph.forward

    torch.compiler.reset()
    model = binarize_(nn.Sequential(nn.Linear(12, 8)), Stompp()).train()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    x = torch.randn(4, 12)
    for index in (0, 0, 30, 60, 90, 120, 150, 190, 199):
        begin_step(model, at(index))
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(compiled(x), expected)
    assert graphs["compiled"] == 3


# Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "sideways"}, "order='sideways': expected one of forward, reverse, global"),
        ({"schedule": "step"}, "schedule='step': expected one of cubic, linear, quadratic, cosine, flipped_quadratic"),
        ({"unit": "model"}, "unit='model': expected one of linear, group, block"),
        ({"on": "none"}, "on='none': expected one of both, weights, activations"),
        ({"end": 0.0}, r"end=0.0: expected a number in \(0, 1\]"),
        ({"end": 1.5}, r"end=1.5: expected a number in \(0, 1\]"),
        ({"refresh": -1}, "refresh=-1: expected an integer >= 0"),
        ({"weight_gate": "half"}, "weight_gate='half': expected one of auto, on, off"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_expected(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Stompp(**arguments)
