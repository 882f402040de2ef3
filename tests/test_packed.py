"""Packed layers: the same numbers from one bit per weight, and what stock PEFT makes of them."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_layers import LEVELS, layer_of
from tiny import Net, optimizer_of, tiny_batch, tiny_model, train_steps
from torch import nn

from hf_bnn import binarize_, kernels, pack_, unpack_
from hf_bnn.functional import unpack_bits, weight_scale
from hf_bnn.nn.embeddings import BinaryEmbedding, Int8Embedding
from hf_bnn.nn.layers import BinaryConv2d, BinaryLinear
from hf_bnn.nn.levels import ElasticLevels
from hf_bnn.nn.packed import PACKED, PackedBinaryEmbedding, PackedConv2d, PackedInt8Embedding, PackedLinear, is_packed

every_levels = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
SHAPES = [(12,), (5, 12), (3, 5, 12), (2, 3, 5, 12), (0, 12), (3, 0, 12)]
every_table = pytest.mark.parametrize("kind", [Int8Embedding, BinaryEmbedding])


# PackedLinear


@every_levels
@pytest.mark.parametrize("binarize", ["both", "weights"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_equals_latent_bit_for_bit(levels, binarize: str, bias: bool, shape: tuple[int, ...]):
    layer = layer_of(levels, binarize, bias).eval().requires_grad_(False)
    x = torch.randn(shape)
    assert torch.equal(PackedLinear.from_latent(layer)(x), layer(x))


def test_a_packed_convolution_tells_of_its_geometry_what_the_latent_one_does():
    size = {"stride": 2, "padding": (1, 2), "dilation": 2, "groups": 2}
    latent = BinaryConv2d(8, 4, 3, **size)
    packed = PackedConv2d.from_latent(latent)
    for name in (*nn.Conv2d.__constants__, "transposed"):
        assert getattr(packed, name) == getattr(latent, name), name


@pytest.mark.parametrize("size", [1, 7, 8, 9, 65, 300])
@every_levels
def test_packed_equals_latent_at_sizes_that_do_not_fill_a_byte(levels, size: int):
    layer = BinaryLinear(size, 5, levels=levels()).eval().requires_grad_(False)
    packed, x = PackedLinear.from_latent(layer), torch.randn(9, size)
    assert torch.equal(packed(x), layer(x))
    assert packed.weight.shape == (5, -(-size // 8))


# The compiled kernels


def packed_pair(levels, kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A packed layer of each kind, on moved levels, with a batch for it."""
    if kind == "linear":
        return PackedLinear.from_latent(layer_of(levels)), torch.randn(9, 12)
    conv = BinaryConv2d(12, 24, 3, stride=2, padding=1, groups=2, levels=levels())
    return PackedConv2d.from_latent(conv), torch.randn(2, 12, 7, 6)


@every_levels
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_every_backend_gives_the_same_bits(levels, kind: str):
    layer, x = packed_pair(levels, kind)
    expected = layer.eval()(x), layer(x.bfloat16())  # where a gradient may be asked for, torch's operators run
    assert all(y.requires_grad for y in expected)
    with torch.no_grad():
        for backend in kernels.available():
            with kernels.using(backend):
                assert torch.equal(layer(x), expected[0]), backend
                assert torch.equal(layer(x.bfloat16()), expected[1]), backend


compiled = pytest.mark.skipif(kernels.available() == ("torch",), reason="no compiled kernels: no C compiler was there")


@compiled
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_bits_are_laid_out_once_and_again_when_they_change(kind: str, monkeypatch):
    layer, x = packed_pair(ElasticLevels, kind)
    made, make_operands = [], type(layer).make_operands
    monkeypatch.setattr(type(layer), "make_operands", lambda self: made.append(1) or make_operands(self))
    with torch.no_grad(), kernels.using(kernels.available()[0]):
        before = layer(x)
        assert torch.equal(layer(x), before)
        assert len(made) == 1
        layer.load_state_dict({**layer.state_dict(), "weight": layer.weight.bitwise_not()})
        assert not torch.equal(layer(x), before)
        assert len(made) == 2
        for tensor in (layer.bias, layer.weight_scale, layer.input_levels.width, layer.input_levels.offset):
            before = layer(x)
            tensor.add_(0.5)
            assert not torch.equal(layer(x), before)
        assert len(made) == 6
        before, bits = layer(x), layer.weight.clone()
        layer.weight = bits.bitwise_not()
        assert not torch.equal(layer(x), before)
        layer.weight = bits
        assert torch.equal(layer(x), before)
        assert copy.deepcopy(layer)._prepared is None
    assert not [key for key in layer.state_dict() if "prepared" in key]
    with torch.inference_mode(), kernels.using(kernels.available()[0]):
        loaded = copy.deepcopy(layer)
        assert torch.equal(loaded(x), loaded(x))


@every_levels
@pytest.mark.parametrize("binarize", ["both", "weights"])
def test_the_path_with_gradients_computes_what_the_path_without_does(levels, binarize: str):
    packed = PackedLinear.from_latent(layer_of(levels, binarize).requires_grad_(False))
    x = torch.randn(3, 5, 12)
    assert torch.equal(packed.train()(x), packed.eval()(x))
    assert torch.equal(packed(x.clone().requires_grad_()), packed(x))


@every_levels
@pytest.mark.parametrize("binarize", ["both", "weights"])
def test_the_inputs_gradient_is_that_of_the_latent_layer(levels, binarize: str):
    layer = layer_of(levels, binarize)
    packed = PackedLinear.from_latent(copy.deepcopy(layer))
    x, G = torch.randn(3, 5, 12), torch.randn(3, 5, 8)
    z = x.clone().requires_grad_()
    layer(x.requires_grad_()).backward(G)
    packed(z).backward(G)
    torch.testing.assert_close(z.grad, x.grad)


def test_a_packed_layer_is_a_linear_layer_with_a_uint8_buffer_called_weight():
    packed = PackedLinear.from_latent(layer_of(ElasticLevels))
    assert isinstance(packed, nn.Linear)
    assert set(packed.state_dict()) == {
        "weight",
        "weight_scale",
        "bias",
        "input_levels.width",
        "input_levels.offset",
    }
    assert packed.weight.dtype == torch.uint8
    assert [name for name, _ in packed.named_parameters()] == ["bias", "input_levels.width", "input_levels.offset"]
    assert "in_features=12, out_features=8, bias=True" in repr(packed)


def test_an_empty_packed_layer_has_the_shapes_of_a_full_one_on_the_meta_device_too():
    layer = layer_of(ElasticLevels)
    expected = {key: value.shape for key, value in PackedLinear.from_latent(layer).state_dict().items()}
    assert {key: value.shape for key, value in PackedLinear.empty_like(layer).state_dict().items()} == expected
    assert PackedLinear.empty_like(layer.to("meta")).weight.is_meta


@every_levels
@pytest.mark.parametrize("binarize", ["both", "weights"])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 65])
def test_unpacking_and_packing_again_gives_the_same_bits(levels, binarize: str, size: int):
    model = binarize_(nn.Sequential(nn.Linear(size, 6)), binarize=binarize, levels=lambda name: levels())
    packed = pack_(model)
    before = copy.deepcopy(packed.state_dict())
    after = pack_(unpack_(packed)).state_dict()
    assert list(after) == list(before)
    assert torch.equal(after["0.weight"], before["0.weight"])
    torch.testing.assert_close(after["0.weight_scale"], before["0.weight_scale"], rtol=1e-6, atol=0)


def test_unpacked_weights_are_the_signs_times_their_scale():
    packed = PackedLinear.from_latent(layer_of(ElasticLevels))
    latent = packed.to_latent()
    signs = unpack_bits(packed.weight, 12)
    assert torch.equal(latent.weight, signs * packed.weight_scale.unsqueeze(1))
    assert latent.weight.requires_grad
    assert latent.input_levels is packed.input_levels
    torch.testing.assert_close(weight_scale(latent.weight), packed.weight_scale)


def test_a_packed_layer_takes_a_thirtieth_of_the_bytes():
    def size(module: nn.Module) -> int:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        return file.tell()

    layer = BinaryLinear(768, 768, bias=False)
    assert size(PackedLinear.from_latent(layer)) < size(layer) / 28


# Packed tables


@every_table
@pytest.mark.parametrize("dim", [1, 7, 8, 9, 65])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 0)])
def test_a_packed_table_equals_its_latent_one_bit_for_bit(kind: type, dim: int, shape: tuple[int, ...]):
    table = kind(10, dim, padding_idx=0).requires_grad_(False)
    table.weight[3] = 0
    packed = PACKED[kind].from_latent(table)
    ids = torch.randint(0, 10, shape)
    assert torch.equal(packed(ids), table(ids))
    assert torch.equal(packed(torch.arange(10)), table(torch.arange(10)))
    assert not packed(torch.tensor([3])).any()


@every_table
def test_unpacking_a_table_and_packing_it_again_gives_the_same_integers(kind: type):
    packed = PACKED[kind].from_latent(kind(10, 9))
    again = PACKED[kind].from_latent(packed.to_latent())
    assert torch.equal(again.weight, packed.weight)
    torch.testing.assert_close(again.weight_scale, packed.weight_scale, rtol=1e-3, atol=0)


def test_packed_tables_hold_small_integers_and_say_so():
    int8, binary = PackedInt8Embedding.from_latent(Int8Embedding(10, 9)), PackedBinaryEmbedding(10, 9)
    assert (int8.weight.dtype, int8.weight.shape, int8.weight_scale.dtype) == (torch.int8, (10, 9), torch.float32)
    assert (binary.weight.dtype, binary.weight.shape) == (torch.uint8, (10, 2))
    assert binary.weight_scale.dtype == torch.float16
    assert isinstance(int8, nn.Embedding)
    assert not list(int8.parameters())


@every_table
def test_a_packed_table_has_the_shapes_of_its_latent_one_before_it_is_loaded(kind: type):
    packed = PACKED[kind]
    expected = {key: (v.shape, v.dtype) for key, v in packed.from_latent(kind(10, 9)).state_dict().items()}
    assert {key: (v.shape, v.dtype) for key, v in packed.empty_like(kind(10, 9)).state_dict().items()} == expected


# Whole models


@pytest.mark.parametrize("embeddings", ["float", "int8", "binary"])
@pytest.mark.parametrize("attention", ["float", "binary", "boolean"])
@pytest.mark.parametrize("binarize", ["both", "weights"])
def test_a_packed_bert_equals_its_latent_one_bit_for_bit(embeddings: str, attention: str, binarize: str):
    model = tiny_model(embeddings=embeddings, attention=attention, binarize=binarize)
    net = Net(model, tiny_batch())
    train_steps(net, optimizer_of(net), range(2))
    model.eval()
    with torch.no_grad():
        latent = net.output()
        assert torch.equal(net._replace(model=pack_(model)).output(), latent)
    assert is_packed(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_stock_peft_trains_adapters_on_a_packed_bert_and_nothing_else():
    packed = pack_(tiny_model())
    before = copy.deepcopy(packed.state_dict())
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = get_peft_model(packed, config).train()
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learned
    assert all("lora_" in name or "modules_to_save" in name for name in learned)

    net = Net(model, tiny_batch(8))
    losses = train_steps(net, optimizer_of(net, 0.05), range(15))
    assert losses[-1] < 0.5 * losses[0]
    after = model.get_base_model().state_dict()
    for key, value in before.items():
        name = key.replace("query.", "query.base_layer.").replace("value.", "value.base_layer.")
        kept = name.replace("classifier.", "classifier.original_module.")
        assert torch.equal(after[kept], value), key
