"""Fused attention: what the plain one evaluates, bit for bit, in one operation; and the plain one wherever it must."""

import copy
import pickle

import pytest
import torch
from tiny import Net, optimizer_of, tiny_batch, tiny_images, tiny_model, tiny_vit, train_steps
from torch import Tensor, nn

from hf_bnn import install_method, kernels, pack_
from hf_bnn.fused import attention as fused
from hf_bnn.fused.attention import FUSED, fuse_attention
from hf_bnn.nn.attention import BinaryAttention, BooleanAttention
from hf_bnn.training import partial_evaluation

every_kind = pytest.mark.parametrize("kind", FUSED, ids=["binary", "boolean"])
every_choice = pytest.mark.parametrize("attention", ["binary", "boolean"])


def pair(kind: type[BinaryAttention]) -> tuple[BinaryAttention, BinaryAttention]:
    """An attention in evaluation, and the same one fused."""
    plain = install_method(kind()).eval()
    with torch.no_grad():
        plain.scores.left_levels.width.fill_(2.0)
        plain.scores.right_levels.offset.fill_(0.1)
        plain.context.right_levels.width.fill_(0.7)
    one = copy.deepcopy(plain)
    fuse_attention(one)
    return plain, one


def inputs(tokens: int = 12) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, tokens, 3, 8).transpose(1, 2) for _ in range(3))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """One entry for each call of the op that this file's modules make."""
    made, op = [], kernels.attention
    monkeypatch.setattr(fused.kernels, "attention", lambda *given: made.append(1) or op(*given))
    return made


@every_kind
def test_fused_attention_equals_the_plain_one_bit_for_bit(kind: type, calls: list):
    plain, one = pair(kind)
    mask = torch.zeros(2, 1, 12, 12)
    mask[1, ..., 9:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        for given in (None, mask):
            heads = inputs()
            expected, _ = plain(*heads, given, 0.35)
            context, weights = one(*heads, given, 0.35)
            assert torch.equal(context, expected)
            assert weights is None
            assert expected.unique().numel() > 5
    assert len(calls) == 2
    assert one.state_dict().keys() == plain.state_dict().keys()


@every_kind
def test_the_plain_forward_runs_wherever_the_op_does_not_do_its_work(kind: type, calls: list):
    plain, one = pair(kind)
    heads = inputs()
    assert one(heads[0].clone().requires_grad_(), *heads[1:])[0].requires_grad
    with torch.no_grad():
        assert torch.equal(one(*heads, need_weights=True)[1], plain(*heads)[1])
        double = [x.double() for x in heads]
        assert torch.equal(one(*double)[0], plain(*double)[0])
        with partial_evaluation(plain), partial_evaluation(one):
            assert torch.equal(one(*heads)[0], plain(*heads)[0])
        plain.train(), one.train()
        assert torch.equal(one(*heads)[0], plain(*heads)[0])
        with torch.random.fork_rng():
            dropped = one(*heads, dropout=0.5)[0]
        assert torch.equal(dropped, plain(*heads, dropout=0.5)[0])
    assert calls == []


@every_kind
@torch.no_grad()
def test_the_op_sees_levels_that_are_loaded(kind: type):
    plain, one = pair(kind)
    heads = inputs()
    before = one(*heads)[0]
    for parameter in plain.parameters():
        parameter.add_(torch.rand(()) * 0.1)
    one.load_state_dict(plain.state_dict())
    assert torch.equal(one(*heads)[0], plain(*heads)[0])
    assert not torch.equal(one(*heads)[0], before)


@every_kind
def test_fusing_survives_copies_and_pickles(kind: type):
    _, one = pair(kind)
    heads = inputs()
    with torch.no_grad():
        expected, _ = one(*heads)
        for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert type(again) is FUSED[kind]
            assert torch.equal(again(*heads)[0], expected)


@every_kind
@torch.no_grad()
def test_fused_attention_is_one_node_of_compiled_and_exported_graphs(kind: type):
    plain, one = pair(kind)
    heads, graphs = inputs(), []
    mask = torch.zeros(2, 1, 1, 12)
    mask[0, ..., 7:] = torch.finfo(torch.float32).min
    expected, _ = plain(*heads, mask, 0.35)

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(one, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*heads, mask, 0.35)[0], expected)
    assert [str(node.target) for node in graphs[0].graph.nodes].count("hf_bnn.attention") == 1
    torch._dynamo.reset()
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*heads, mask, 0.35)[0], expected)
    exported = torch.export.export(one, (*heads, mask, 0.35))
    assert torch.equal(exported.module()(*heads, mask, 0.35)[0], expected)
    assert [node.target for node in exported.graph.nodes].count(torch.ops.hf_bnn.attention.default) == 1


# Whole models


def fuse(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, BinaryAttention):
            fuse_attention(module)
    return model


def trained(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
    net = Net(model, batch)
    train_steps(net, optimizer_of(net), range(3))
    return model.eval()


FAMILIES = {"bert": (tiny_model, tiny_batch), "vit": (tiny_vit, tiny_images)}
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@every_choice
@torch.no_grad()
def test_a_fused_model_equals_its_latent_and_packed_ones(family: str, attention: str, calls: list):
    make, batch = FAMILIES[family]
    with torch.enable_grad():
        model = trained(make(attention=attention), batch())
    expected = model(**batch()).logits
    model = pack_(model)
    assert torch.equal(model(**batch()).logits, expected)
    assert calls == []
    assert torch.equal(fuse(model)(**batch()).logits, expected)
    assert len(calls) == 2


@every_family
@every_choice
@pytest.mark.parametrize("asked", ["in the call", "in the config"])
@torch.no_grad()
def test_a_fused_model_gives_its_attentions_to_whoever_asks(family: str, attention: str, asked: str):
    make, batch = FAMILIES[family]
    in_config = asked == "in the config"
    model = make(attention=attention, **({"output_attentions": True} if in_config else {})).eval()
    given = {} if in_config else {"output_attentions": True}
    expected = model(**batch(), **given)
    found = fuse(model)(**batch(), **given)
    assert model(**batch(), output_attentions=False).attentions is None
    assert len(expected.attentions) == 2
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found.logits, expected.logits)


@every_choice
def test_a_model_with_binary_attention_learns(attention: str):
    net = Net(tiny_model(attention=attention).train(), tiny_batch())
    losses = train_steps(net, optimizer_of(net), range(30))
    assert losses[-1] < 0.5 * losses[0]
    blocks = [module for module in net.model.modules() if isinstance(module, BinaryAttention)]
    assert len(blocks) == 2
    assert all(isinstance(block, BooleanAttention) == (attention == "boolean") for block in blocks)
    widths = [block.context.left_levels.width for block in blocks]
    assert all(width != 0.1 for width in widths)
