"""Packed and optimized models under what watches torch's operators: they are traced, or compute what they always do."""

import copy
from collections.abc import Callable
from io import BytesIO

import pytest
import torch
from tiny import SIZE, scramble, tiny_model, tiny_resnet, tiny_vit
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bnn import binarize_, optimize_, pack_
from hf_bnn.nn.levels import ElasticLevels
from hf_bnn.observers import looked_on, transformed


class Logits(nn.Module):
    """A model whose output is one tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs).logits


def sentences(seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, SIZE["vocab_size"], (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


def pictures(seed: int) -> tuple[Tensor]:
    return (torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed)),)


ONE = {"num_hidden_layers": 1}
MODELS = {
    "bert": (lambda: tiny_model(**ONE), sentences),
    "bert-boolean": (lambda: tiny_model(attention="boolean", **ONE), sentences),
    "bert-weights": (lambda: tiny_model(binarize="weights", **ONE), sentences),
    "vit-binary": (lambda: tiny_vit(attention="binary", **ONE), pictures),
    "resnet": (tiny_resnet, pictures),
    "resnet-rsign": (lambda: tiny_resnet(levels="rsign", block_activation="rprelu"), pictures),
}
STATES = {"latent": lambda model: model.eval(), "packed": pack_, "optimized": lambda model: optimize_(pack_(model))}


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=["packed", "optimized"])
def model(request, name) -> Logits:
    torch.manual_seed(0)
    return Logits(STATES[request.param](scramble(MODELS[name][0]()))).eval().requires_grad_(False)


@pytest.fixture
def inputs(name) -> Callable[[int], tuple[Tensor, ...]]:
    return MODELS[name][1]


@pytest.fixture(params=[False, True], ids=["no_grad", "grad"])
def grad(request):
    with torch.set_grad_enabled(request.param):
        yield


# jit.trace is deprecated, looks at every attribute, and warns of every Python number that it keeps.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_traced_model_computes_what_the_model_does(model, inputs, grad):
    expected = model(*inputs(5))
    traced = torch.jit.trace(model, inputs(0), check_trace=False)
    assert torch.equal(traced(*inputs(5)), expected)


def test_a_graph_of_operators_computes_what_the_model_does(model, inputs):
    arguments = (inputs(0)[0], None) if len(inputs(0)) > 1 else inputs(0)  # a mask is looked at by transformers
    graph = make_fx(model)(*arguments)
    other = (inputs(5)[0], *arguments[1:])
    assert torch.equal(graph(*other), model(*other))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of operators that have no rule
@torch.no_grad()
def test_vmap_computes_what_the_model_does(model, inputs):
    one, other = inputs(0)[0], inputs(5)[0]  # without a mask: transformers asks what is in it
    found = torch.func.vmap(model)(torch.stack((one, other)))
    torch.testing.assert_close(found, torch.stack((model(one), model(other))))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@torch.no_grad()
def test_vmap_of_a_latent_model_computes_what_it_does():
    model, ids = Logits(tiny_model(**ONE)).eval(), torch.stack((sentences(0)[0], sentences(5)[0]))
    torch.testing.assert_close(torch.func.vmap(model)(ids), torch.stack([model(one) for one in ids]))


def test_fake_tensors_leave_nothing_behind(model, inputs):
    fresh = copy.deepcopy(model)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = model(*(mode.from_tensor(x) for x in inputs(0)))
    expected = fresh(*inputs(0))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(model(*inputs(0)), expected)


class Seen(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_dispatch_mode_sees_every_product(model, inputs):
    expected = model(*inputs(0))
    with Seen() as seen:
        assert torch.equal(model(*inputs(0)), expected)
    products = [n for n in seen.names if n.startswith(("hf_bnn.", "aten._int_mm", "aten.mm", "aten.addmm", "aten.bmm"))]
    assert len(products) > 4


@pytest.mark.filterwarnings("ignore")  # the exporter's own, of its age
@torch.no_grad()
def test_the_legacy_exporter_of_onnx_names_the_operator_that_it_lacks():
    model = optimize_(pack_(binarize_(nn.Sequential(nn.Linear(64, 32)))))
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="hf_bnn::linear"):
        torch.onnx.export(model, (torch.randn(3, 64),), BytesIO(), dynamo=False)


@pytest.mark.parametrize("state", ["packed", "optimized"])
def test_other_parameters_can_be_put_in_for_a_call(state: str):
    model = STATES[state](scramble(binarize_(nn.Sequential(nn.Linear(16, 16)), levels=lambda _: ElasticLevels())))
    x, others = torch.randn(3, 16), {key: value.detach() * 2 for key, value in model.named_parameters()}
    with torch.no_grad():
        before, plain = model(x), copy.deepcopy(model)
        for key, value in plain.named_parameters():
            value.copy_(others[key])
        assert torch.equal(torch.func.functional_call(model, others, x), plain(x))
        assert not torch.equal(plain(x), before)
        assert torch.equal(model(x), before)
        stacked = {key: torch.stack((value, value + 1)) for key, value in others.items()}
        several = torch.func.vmap(lambda p: torch.func.functional_call(model, p, x))(stacked)
        torch.testing.assert_close(several[0], plain(x))
        assert torch.equal(model(x), before)


def test_nothing_looks_on_by_default_and_each_observer_is_noticed():
    assert not looked_on()
    assert not transformed()
    found = {}
    with Seen():
        found["mode"] = looked_on()
    torch.func.vmap(lambda x: found.update(vmap=looked_on() and transformed()) or x)(torch.zeros(2))
    make_fx(lambda x: found.update(graph=looked_on()) or x + 1)(torch.zeros(2))
    assert found == {"mode": True, "vmap": True, "graph": True}
