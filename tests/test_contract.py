"""THE CONTRACT: what every method owes to every kind of network. Nothing here asks which method it is."""

import copy
import json

import pytest
import torch
from tiny import EVERY_METHOD, NETS, make_net, method_id, optimizer_of, train_steps

from hf_bnn import pack_, summary
from hf_bnn.methods import METHODS, STE, Method, method_from_dict
from hf_bnn.nn.layers import binary_layers
from hf_bnn.training import load_method_state, method_state, method_state_names, parameter_roles

every_method = pytest.mark.parametrize("method", EVERY_METHOD, ids=method_id)
every_net = pytest.mark.parametrize("kind", NETS)

# How far the gradient of two half batches may be from that of the whole one, as a share of its norm. SURGE's lambda is
# a statistic of the micro-batch.
ACCUMULATION_ERROR = {method_id(method): 0.05 for method in EVERY_METHOD if "surge" in method.name.split("+")}
ROUNDING = 1e-4


def gradients(net) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in net.model.named_parameters() if p.grad is not None}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_contract_covers_every_method_in_the_table():
    assert {method.name for method in EVERY_METHOD} >= set(METHODS)


@every_net
@every_method
def test_a_method_never_changes_what_evaluation_computes(method: Method, kind: str):
    with torch.no_grad():
        expected, found = make_net(kind, STE()), make_net(kind, method)
        expected.model.eval()
        found.model.eval()
        assert torch.equal(found.output(), expected.output())


@every_net
@every_method
def test_packed_equals_eval_bit_for_bit(method: Method, kind: str):
    net = make_net(kind, method)
    train_steps(net, optimizer_of(net), range(3))
    net.model.eval()
    with torch.no_grad():
        latent = net.output()
        packed = net._replace(model=pack_(copy.deepcopy(net.model), allow_unfinished=True)).output()
    assert torch.equal(packed, latent)


@every_net
@every_method
def test_packed_keys_are_the_same_for_every_method(method: Method, kind: str):
    packed = pack_(make_net(kind, method).model).state_dict()
    expected = pack_(make_net(kind, STE()).model).state_dict()
    assert list(packed) == list(expected)
    assert all(packed[key].dtype == expected[key].dtype for key in packed)


@every_net
@every_method
def test_a_summary_counts_the_models_weights_and_not_the_methods(method: Method, kind: str):
    counted = summary(make_net(kind, method).model)
    assert counted == summary(make_net(kind, STE()).model)
    assert counted == summary(pack_(make_net(kind, method).model))


@every_net
@every_method
def test_training_moves_every_latent_weight_and_lowers_the_loss(method: Method, kind: str):
    net = make_net(kind, method)
    latent = [layer for layer in binary_layers(net.model) if layer.binary_weight]
    before = [layer.weight.detach().clone() for layer in latent]
    losses = train_steps(net, optimizer_of(net), range(20))
    assert losses[-1] < 0.5 * losses[0]
    assert not [i for i, layer in enumerate(latent) if torch.equal(layer.weight, before[i])]


@every_net
@every_method
def test_every_parameter_has_exactly_one_role(method: Method, kind: str):
    model = make_net(kind, method).model
    listed = [p for members in parameter_roles(model) for p in members]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(model.parameters())


@every_net
@every_method
def test_a_state_dict_resumes_bit_for_bit(method: Method, kind: str):
    net = make_net(kind, method)
    optimizer = optimizer_of(net)
    train_steps(net, optimizer, range(3))
    checkpoint = copy.deepcopy((net.model.state_dict(), optimizer.state_dict()))
    losses = train_steps(net, optimizer, range(3, 5))

    resumed = make_net(kind, method)
    scramble(resumed.model)
    resumed.model.load_state_dict(checkpoint[0])
    other_optimizer = optimizer_of(resumed)
    other_optimizer.load_state_dict(checkpoint[1])
    assert train_steps(resumed, other_optimizer, range(3, 5)) == losses
    assert same(resumed.model.state_dict(), net.model.state_dict())


@every_net
@every_method
def test_the_model_and_the_methods_state_resume_when_saved_apart(method: Method, kind: str):
    net = make_net(kind, method)
    train_steps(net, optimizer_of(net), range(3))
    own = method_state_names(net.model)
    weights = {key: value.clone() for key, value in net.model.state_dict().items() if key not in own}
    state = {key: value.clone() for key, value in method_state(net.model).items()}
    losses = train_steps(net, optimizer_of(net), range(3, 5))

    resumed = make_net(kind, method)
    scramble(resumed.model)
    found = resumed.model.load_state_dict(weights, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (own, [])
    load_method_state(resumed.model, state)
    assert train_steps(resumed, optimizer_of(resumed), range(3, 5)) == losses


def scramble(model: torch.nn.Module) -> None:
    """Give every parameter another value, so that a resumed run owes all it knows to the checkpoint."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@every_net
@every_method
def test_two_half_batches_give_the_gradient_of_one(method: Method, kind: str):
    whole = make_net(kind, method)
    whole.loss().backward()
    expected = torch.cat([g.flatten() for g in gradients(whole).values()])
    halves = make_net(kind, method)
    for half in halves.halves():
        (half.loss() / 2).backward()
    found = torch.cat([g.flatten() for g in gradients(halves).values()])
    allowed = ACCUMULATION_ERROR.get(method_id(method), ROUNDING)
    assert (found - expected).norm() <= allowed * expected.norm()


@every_net
@every_method
def test_a_compiled_step_has_no_graph_break_and_the_eager_gradients(method: Method, kind: str):
    eager = make_net(kind, method)
    for layer in binary_layers(eager.model):
        layer.runs_on_bits = False  # a compiled step keeps inputs whole for the gradient of the levels
    eager.loss().backward()
    compiled = make_net(kind, method)
    torch.compiler.reset()
    graph = torch.compile(compiled.model, fullgraph=True, backend="aot_eager")
    compiled._replace(model=graph).loss().backward()
    expected, found = gradients(eager), gradients(compiled)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@every_net
@every_method
def test_a_copied_model_learns_alike_and_leaves_the_original_alone(method: Method, kind: str):
    net = make_net(kind, method)
    twin = net._replace(model=copy.deepcopy(net.model))
    before = copy.deepcopy(net.model.state_dict())
    losses = train_steps(twin, optimizer_of(twin), range(3))
    assert same(net.model.state_dict(), before)
    assert train_steps(net, optimizer_of(net), range(3)) == losses
    assert same(net.model.state_dict(), twin.model.state_dict())


@every_method
def test_a_method_round_trips_through_json(method: Method):
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
