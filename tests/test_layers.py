"""Binary layers against float layers that are fed with the same two values."""

import pytest
import torch
import torch.nn.functional as F
from tiny import EVERY_METHOD, method_id, tiny_model
from torch import Tensor, nn

from hf_bnn import binarize_, install_method
from hf_bnn.methods import STE, Method
from hf_bnn.nn.attention import BinaryAttention, BinaryMatmul, BooleanAttention
from hf_bnn.nn.embeddings import BinaryEmbedding, Int8Embedding, RoundedEmbedding
from hf_bnn.nn.layers import (
    BINARIZE,
    BinaryLayer,
    BinaryLinear,
    binary_layers,
    rescale,
)
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels

LEVELS = {
    "signed": SignedLevels,
    "unsigned": UnsignedLevels,
    "elastic": lambda: moved(ElasticLevels()),
    "elastic unsigned": lambda: moved(ElasticLevels(signed=False)),
}
every_levels = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
SHAPES = [(12,), (5, 12), (3, 5, 12), (2, 3, 5, 12)]


def moved(levels: ElasticLevels) -> ElasticLevels:
    """The levels, away from where they start."""
    with torch.no_grad():
        levels.width.fill_(0.7)
        levels.offset.fill_(-0.1)
    return levels


def layer_of(levels, binarize: str = "both", bias: bool = True) -> BinaryLinear:
    """A trainable layer `(..., 12) -> (..., 8)`."""
    return install_method(BinaryLinear(12, 8, bias, binarize, levels()))


def two_valued(levels: SignedLevels, x: Tensor) -> Tensor:
    """`x` on the levels."""
    scale, shift = levels.affine()
    return torch.where(x < levels.threshold(), shift - scale, shift + scale)


def float_reference(layer: BinaryLinear, x: Tensor) -> Tensor:
    """nn.Linear on the levels of `x`, with +-1 times the mean magnitude of each row as its weight."""
    inputs = x if layer.binarize == "weights" else two_valued(layer.input_levels, x)
    signs = torch.where(layer.weight < 0, -1.0, 1.0)
    weight = layer.weight if layer.binarize == "activations" else signs * layer.weight.abs().mean(1, keepdim=True)
    return F.linear(inputs, weight, layer.bias)


# BinaryLinear


@every_levels
@pytest.mark.parametrize("binarize", BINARIZE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_computes_the_float_layer_of_its_two_valued_operands(levels, binarize, bias, training):
    layer = layer_of(levels, binarize, bias).train(training)
    x = torch.randn(4, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), float_reference(layer, x), rtol=1e-5, atol=1e-5)


def test_the_float_reference_can_fail():
    layer = layer_of(SignedLevels).eval().requires_grad_(False)
    x = torch.randn(5, 12)
    assert not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias))


@every_levels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_inputs_of_one_to_four_dimensions_are_taken(levels, shape: tuple[int, ...], training: bool):
    layer = layer_of(levels).train(training)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 8)
    torch.testing.assert_close(y.flatten(), layer(x.reshape(-1, 12)).flatten(), rtol=1e-6, atol=1e-6)
    y.sum().backward()
    assert layer.weight.grad.isfinite().all()


@every_levels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 12), (3, 0, 12)])
def test_an_empty_batch_gives_an_empty_output_and_no_gradient(levels, training: bool, shape: tuple[int, ...]):
    layer = layer_of(levels).train(training)
    y = layer(torch.randn(shape))
    assert y.shape == (*shape[:-1], 8)
    y.sum().backward()
    assert not layer.weight.grad.any()


@every_levels
@pytest.mark.parametrize("binarize", BINARIZE)
def test_all_gradients_are_those_of_the_straight_through_formula(levels, binarize: str):
    layer = layer_of(levels, binarize).double()
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    G = torch.randn(6, 8, dtype=torch.float64)
    layer(x).backward(G)

    twin = layer_of(levels, binarize).double()
    twin.load_state_dict(layer.state_dict())
    z = x.detach().clone().requires_grad_()
    inputs = z
    if binarize != "weights":
        scale, shift = twin.input_levels.affine()
        u = (z - twin.input_levels.threshold()) / scale
        hard = torch.where(u < 0, -1.0, 1.0).double()
        soft = u.clamp(-1, 1)
        inputs = scale * (soft + (hard - soft).detach()) + shift
    weight = twin.weight
    if binarize != "activations":
        mean = weight.detach().abs().float().mean(1, keepdim=True).double()  # a constant, as in BiT's code
        signs = torch.where(weight < 0, -1.0, 1.0).double()
        weight = mean * (weight + (signs - weight).detach())
    F.linear(inputs, weight, twin.bias).backward(G)

    torch.testing.assert_close(x.grad, z.grad)
    expected = dict(twin.named_parameters())
    for name, parameter in layer.named_parameters():
        if expected[name].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-6, msg=name)


def test_the_gradient_of_rescaling_is_that_of_its_formula():
    levels = moved(ElasticLevels(signed=False))
    product, scale, total, bias = torch.randn(3, 5, 8), torch.rand(8), torch.randn(8), torch.randn(8)
    product.requires_grad_(), total.requires_grad_(), bias.requires_grad_()
    learned = (product, total, bias, levels.width)
    G = torch.randn(3, 5, 8)
    found = torch.autograd.grad(rescale(product, scale, total, levels, bias), learned, G)
    a, c = levels.affine()
    y = product * scale * a + total * scale * c + bias
    for gradient, expected in zip(found, torch.autograd.grad(y, learned, G), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("binarize", BINARIZE)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_puts_out_the_dtype_of_its_weights_like_nn_linear(dtype: torch.dtype, binarize: str, training: bool):
    layer = layer_of(ElasticLevels, binarize).to(dtype).train(training)
    x = torch.randn(3, 12, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == dtype
    layer.requires_grad_(False)
    assert layer(x.detach()).dtype == dtype


def test_evaluation_sums_are_exact_for_many_inputs():
    layer = BinaryLinear(70_001, 1, bias=False).eval().requires_grad_(False)
    layer.weight.fill_(0.5)
    assert layer(torch.ones(1, 70_001)).item() == 70_001 * layer.weight.abs().mean().item()


def test_a_layer_takes_over_the_parameters_and_the_mode_of_a_float_layer():
    linear = nn.Linear(12, 8, bias=False).eval()
    layer = BinaryLinear.from_float(linear)
    assert layer.weight is linear.weight
    assert layer.bias is None
    assert not layer.training
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight"]


def test_weights_that_see_float_inputs_have_no_levels_to_learn():
    layer = BinaryLinear(12, 8, binarize="weights", levels=ElasticLevels())
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_an_unknown_kind_of_binarization_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="binarize='x': expected one of both, weights, activations"):
        BinaryLinear(2, 2, binarize="x")


def test_a_layer_without_a_method_evaluates_but_says_how_to_train_it():
    layer = BinaryLinear(12, 8)
    with torch.no_grad():
        layer.eval()(torch.randn(2, 12))
    with pytest.raises(RuntimeError, match=r"call hf_bnn.install_method\(model, method\) first"):
        layer.train()(torch.randn(2, 12))
    with pytest.raises(RuntimeError, match="cannot be trained"):
        layer.eval()(torch.randn(2, 12))  # gradients are on, and the weight asks for one


def test_evaluation_with_gradients_computes_what_training_does():
    layer = layer_of(lambda: moved(ElasticLevels()))
    x = torch.randn(3, 12)
    assert torch.equal(layer.eval()(x), layer.train()(x))
    assert layer.eval()(x).requires_grad


def test_a_kind_of_layer_must_say_what_it_takes():
    with pytest.raises(NotImplementedError, match="Bare must say which parts it takes"):
        Bare().install(None, None)
    with pytest.raises(NotImplementedError, match="Bare must say which levels it has"):
        Bare().fit_levels()


class Bare(BinaryLayer):
    slots = ()


def test_binary_layers_come_in_the_order_of_definition():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 8))
    assert [layer.out_features for layer in binary_layers(binarize_(model))] == [4, 6, 8]


# BinaryMatmul, BinaryAttention


@pytest.mark.parametrize("left", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("right", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("training", [True, False])
def test_a_product_of_activations_is_that_of_its_two_valued_operands(left, right, training: bool):
    layer = install_method(BinaryMatmul(left(), right())).train(training)
    a, b = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 7, 4)
    with torch.no_grad():
        expected = two_valued(layer.left_levels, a) @ two_valued(layer.right_levels, b)
        torch.testing.assert_close(layer(a, b), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_product_of_activations_keeps_their_dtype(dtype: torch.dtype, training: bool):
    layer = install_method(BinaryMatmul(ElasticLevels(), ElasticLevels(signed=False))).to(dtype).train(training)
    with torch.no_grad():
        assert layer(torch.randn(5, 7, dtype=dtype), torch.randn(7, 4, dtype=dtype)).dtype == dtype


every_attention = pytest.mark.parametrize("kind", [BinaryAttention, BooleanAttention])


@every_attention
@pytest.mark.parametrize("training", [True, False])
def test_attention_pays_no_heed_to_a_masked_token(kind: type, training: bool):
    attention = install_method(kind()).train(training).requires_grad_(False)
    query, key, value = torch.randn(3, 2, 2, 5, 8).unbind()
    mask = torch.zeros(2, 1, 1, 5)
    mask[..., -2:] = torch.finfo(torch.float32).min
    expected, _ = attention(query, key, value, mask, 8**-0.5)
    key[..., -2:, :], value[..., -2:, :] = torch.randn(2, 2, 2, 2, 8).unbind()
    found, probabilities = attention(query, key, value, mask, 8**-0.5)
    torch.testing.assert_close(found, expected)
    assert not probabilities[..., -2:].any()
    seen, _ = attention(query, key, -value, mask, 8**-0.5)
    assert not torch.allclose(seen, expected)


@every_attention
def test_dropout_acts_on_attention_in_training_only(kind: type):
    attention = install_method(kind()).requires_grad_(False)
    inputs = torch.randn(3, 2, 2, 5, 8).unbind()
    plain, _ = attention.eval()(*inputs)
    dropped, probabilities = attention.eval()(*inputs, dropout=0.9)
    assert torch.equal(dropped, plain)
    dropped, again = attention.train()(*inputs, dropout=0.9)
    assert not torch.allclose(dropped, plain)
    if kind is BinaryAttention:
        assert torch.equal(again, probabilities)  # before dropout, as in transformers


def literal_boolean(attention: BooleanAttention, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """a bool(q k^T >= b) v, on the levels of each."""
    scores = two_valued(attention.scores.left_levels, query) @ two_valued(attention.scores.right_levels, key).mT
    bits = (scores * scaling >= attention.context.left_levels.offset).float()
    return attention.context.left_levels.width * bits @ two_valued(attention.context.right_levels, value)


@pytest.mark.parametrize("training", [True, False])
def test_boolean_attention_is_that_of_the_formula(training: bool):
    attention = install_method(BooleanAttention()).train(training).requires_grad_(False)
    attention.context.left_levels.offset.fill_(0.4)
    inputs = torch.randn(3, 2, 2, 5, 8).unbind()
    expected = literal_boolean(attention, *inputs, 8**-0.5)
    found, weights = attention(*inputs, scaling=8**-0.5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights @ two_valued(attention.context.right_levels, inputs[2]), expected)
    assert expected.unique().numel() > 5
    assert attention(*inputs, scaling=8**-0.5, need_weights=False)[1] is None


@pytest.mark.parametrize("closed", [-float("inf"), torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize("method", [*EVERY_METHOD, STE(clip=100.0)], ids=method_id)
def test_boolean_attention_learns_nothing_from_a_masked_token(method: Method, closed: float):
    attention = install_method(BooleanAttention(), method).train()
    mask = torch.zeros(2, 1, 5, 5)
    mask[..., -2:] = mask[:, :, 3] = closed
    gradients = []
    for sign_of_masked in (1, -1):
        torch.manual_seed(0)
        query, key, value = (x.clone().requires_grad_() for x in torch.randn(3, 2, 2, 5, 8))
        with torch.no_grad():
            key[..., -2:, :] *= sign_of_masked
        context, _ = attention(query, key, value, mask, 8**-0.5)
        context.square().sum().backward()
        levels = [p.grad.clone() for p in attention.parameters()]
        attention.zero_grad()
        assert not key.grad[..., -2:, :].any()
        assert not query.grad[..., 3, :].any()
        assert any(level.any() for level in levels)
        gradients.append([query.grad, value.grad, key.grad[..., :-2, :], *levels])
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)


def test_bert_pays_no_heed_to_padding():
    model = tiny_model(attention="binary").eval().requires_grad_(False)
    ids, mask = torch.randint(1, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[:, -3:] = 0
    expected = model(ids, mask).logits
    ids[:, -3:] = torch.randint(1, 64, (2, 3))
    torch.testing.assert_close(model(ids, mask).logits, expected)
    ids[:, 1] += 1
    assert not torch.allclose(model(ids, mask).logits, expected)


# Rounded tables


def literal_int8(row: Tensor) -> Tensor:
    scale = row.abs().max() / 127
    return (row / scale).round() * scale if scale > 0 else torch.zeros_like(row)


def literal_binary(row: Tensor) -> Tensor:
    return torch.where(row < 0, -1.0, 1.0) * row.abs().mean().half().float()


TABLES = {"int8": (Int8Embedding, literal_int8), "binary": (BinaryEmbedding, literal_binary)}
every_table = pytest.mark.parametrize(("kind", "literal"), TABLES.values(), ids=TABLES)


@every_table
def test_a_rounded_table_puts_out_the_rounded_rows(kind: type[RoundedEmbedding], literal):
    table = kind(10, 12)
    nn.init.zeros_(table.weight[3])
    ids = torch.tensor([[0, 3, 9], [3, 3, 1]])
    expected = torch.stack([torch.stack([literal(table.weight[i].detach()) for i in row]) for row in ids.tolist()])
    with torch.no_grad():
        torch.testing.assert_close(table(ids), expected, rtol=1e-6, atol=0)
        assert not table(torch.tensor([3])).any()


@every_table
def test_a_rounded_table_passes_the_gradient_straight_through(kind: type[RoundedEmbedding], literal):
    table, plain = kind(10, 12, padding_idx=0), nn.Embedding(10, 12, padding_idx=0)
    ids, G = torch.tensor([[0, 3, 9], [3, 3, 1]]), torch.randn(2, 3, 12)
    table(ids).backward(G)
    plain(ids).backward(G)
    assert torch.equal(table.weight.grad, plain.weight.grad)
    assert not table.weight.grad[0].any()


@every_table
def test_a_rounded_table_takes_over_the_float_tables_parameter(kind: type[RoundedEmbedding], literal):
    plain = nn.Embedding(10, 12, padding_idx=2).eval()
    table = kind.from_float(plain)
    assert table.weight is plain.weight
    assert (table.padding_idx, table.training) == (2, False)


@every_table
def test_rounding_twice_changes_nothing(kind: type[RoundedEmbedding], literal):
    table, again = kind(10, 12), kind(10, 12)
    ids = torch.arange(10)
    with torch.no_grad():
        again.weight.copy_(table(ids))
        torch.testing.assert_close(again(ids), table(ids), rtol=1e-3, atol=0)
        assert torch.equal(kind.quantize(again.weight)[0], kind.quantize(table.weight)[0])


def test_int8_rows_use_the_whole_range_and_never_overflow():
    integers, _ = Int8Embedding.quantize(torch.randn(1000, 12))
    assert integers.dtype == torch.int8
    assert set(integers.abs().amax(1).tolist()) == {127}
    tiny, scale = Int8Embedding.quantize(torch.full((1, 4), 1e-44))
    assert tiny.abs().max() <= 127
    assert scale.isfinite().all()


def test_the_base_of_the_rounded_tables_is_not_a_table():
    with pytest.raises(NotImplementedError, match="use Int8Embedding or BinaryEmbedding"):
        RoundedEmbedding(4, 4)(torch.tensor([0]))
