"""Binary and packed convolutions against float64 convolutions that are fed with the same two values and with zeros."""

import copy
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_layers import LEVELS, two_valued
from tiny import Net, conv2d_net, make_net, optimizer_of, tiny_batch, tiny_config, tiny_model, train_steps
from torch import Tensor, nn

from hf_bnn import BinaryBertForSequenceClassification, binarize_, install_method, optimize_, pack_, summary, unpack_
from hf_bnn.functional import WEIGHT_SCALINGS, integer_conv2d, unpack_bits, weight_scale
from hf_bnn.methods import STE, Surge
from hf_bnn.nn.layers import BINARIZE, BinaryConv2d, BinaryLinear, binary_layers
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from hf_bnn.nn.packed import PackedConv2d, PackedLinear

every_levels = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
every_scaling = pytest.mark.parametrize("scaling", WEIGHT_SCALINGS)


class Case(NamedTuple):
    """A convolution's shape, and the size (rows, columns) of the images that it sees."""

    in_channels: int = 12
    out_channels: int = 8
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    size: tuple[int, int] = (6, 7)

    def layer(self, **kwargs) -> BinaryConv2d:
        """A trainable layer of this shape."""
        geometry = (self.kernel, self.stride, self.padding, self.dilation, self.groups)
        return install_method(BinaryConv2d(self.in_channels, self.out_channels, *geometry, **kwargs))

    def images(self, batch: int = 3) -> Tensor:
        return torch.randn(batch, self.in_channels, *self.size)


CASES = {
    "plain": Case(padding=(0, 0)),
    "padded": Case(),
    "1x1": Case(kernel=(1, 1), padding=(0, 0)),
    "1x1 padded": Case(kernel=(1, 1), padding=(1, 2)),
    "one channel": Case(1, 1, (1, 1), padding=(0, 0)),
    "strided": Case(stride=(2, 3)),
    "strided 1x1": Case(kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    "padded by more than the kernel": Case(padding=(4, 3)),
    "dilated": Case(dilation=(2, 3), padding=(2, 3)),
    "oblong": Case(kernel=(1, 5), padding=(0, 2)),
    "even kernel": Case(kernel=(2, 4), padding=(1, 2)),
    "groups": Case(groups=2),
    "depthwise": Case(out_channels=12, groups=12),
    "depthwise, two each": Case(out_channels=24, groups=12, stride=(2, 1)),
    "everything": Case(6, 9, (3, 2), (2, 1), (2, 1), (1, 2), 3, (8, 9)),
    "13 channels": Case(13, 5),
    "one window": Case(kernel=(6, 7), padding=(0, 0)),
    "many": Case(64, 16),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def scaled_weight(layer: BinaryConv2d) -> Tensor:
    """The weight that a float layer needs, float64."""
    if layer.binarize == "activations":
        return layer.weight.detach().double()
    magnitude = layer.weight.detach().double().abs()
    scale = {
        "channel": magnitude.mean((1, 2, 3), keepdim=True),
        "layer": magnitude.mean(),
        "none": torch.tensor(1.0, dtype=torch.float64),
    }[layer.weight_scaling]
    return torch.where(layer.weight < 0, -1.0, 1.0).double() * scale


def float_reference(layer: BinaryConv2d, x: Tensor) -> Tensor:
    """F.conv2d in float64, on the levels of `x` inside an explicit border of zeros."""
    inputs = x if layer.binarize == "weights" else two_valued(layer.input_levels, x)
    rows, columns = layer.padding
    inputs = F.pad(inputs.detach().double(), (columns, columns, rows, rows))
    bias = None if layer.bias is None else layer.bias.detach().double()
    return F.conv2d(inputs, scaled_weight(layer), bias, layer.stride, 0, layer.dilation, layer.groups)


# BinaryConv2d


@every_case
@every_levels
@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_computes_the_float_one_of_its_two_valued_operands(case: Case, levels, training: bool):
    layer = case.layer(levels=levels()).train(training)
    x = case.images()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), float_reference(layer, x), rtol=1e-5, atol=1e-5)


@every_levels
@every_scaling
@pytest.mark.parametrize("binarize", BINARIZE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_every_structure_of_a_convolution_computes_the_float_one(levels, scaling, binarize, bias, training):
    case = CASES["everything"]
    layer = case.layer(levels=levels(), weight_scaling=scaling, binarize=binarize, bias=bias).train(training)
    x = case.images()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), float_reference(layer, x), rtol=1e-5, atol=1e-5)


def test_the_float_reference_can_fail():
    case = CASES["padded"]
    layer = case.layer().eval().requires_grad_(False)
    x = case.images()
    expected = float_reference(layer, x)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    layer.padding = (0, 0)
    found = layer(F.pad(x, (1, 1, 1, 1))).double()  # the border is binarized: its zeros become +1
    assert torch.allclose(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


@every_levels
def test_a_padded_position_adds_exactly_nothing(levels):
    layer = Case(1, 1, (3, 3), padding=(1, 1), size=(1, 1)).layer(levels=levels(), bias=False, weight_scaling="none")
    layer.eval().requires_grad_(False)
    for value in (-5.0, 5.0):
        x = torch.full((1, 1, 1, 1), value)
        expected = two_valued(layer.input_levels, x) * torch.where(layer.weight[0, 0, 1, 1] < 0, -1.0, 1.0)
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@every_case
@every_levels
@pytest.mark.parametrize("binarize", ["both", "weights", "activations"])
def test_training_computes_what_evaluation_does_bit_for_bit(case: Case, levels, binarize: str):
    layer = case.layer(levels=levels(), binarize=binarize).requires_grad_(False)
    x = case.images()
    if binarize == "weights":
        x = x.mul(4).round()  # so that the sums are exact
    training, evaluation = layer.train()(x), layer.eval()(x)
    assert torch.equal(training, evaluation)


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_output_and_no_gradient(case: Case, training: bool):
    for levels in LEVELS.values():
        layer = case.layer(levels=levels()).train(training)
        expected = layer(case.images(2)).shape[1:]
        y = layer(case.images(0))
        assert y.shape == (0, *expected)
        y.sum().backward()
        assert not layer.weight.grad.any()
        with torch.no_grad():
            assert layer.eval()(case.images(0)).shape == (0, *expected)


VIEWS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: torch.stack([x, -x], -1).flatten(3)[..., ::2],
    "flipped batch": lambda x: x.flip(0).clone().flip(0),
    "of a larger image": lambda x: F.pad(x, (2, 1, 1, 3), value=9.0)[..., 1 : 1 + x.shape[2], 2 : 2 + x.shape[3]],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("case", ["padded", "groups", "everything"])
@pytest.mark.parametrize("training", [True, False])
def test_images_of_any_strides_are_taken(view, case: str, training: bool):
    layer = CASES[case].layer(levels=UnsignedLevels()).train(training).requires_grad_(False)
    x = CASES[case].images()
    assert torch.equal(view(x), x)
    assert torch.equal(layer(view(x)), layer(x))
    if not training:
        packed = PackedConv2d.from_latent(layer).eval()
        assert torch.equal(packed(view(x)), layer(x))
        expanded = x[:1].expand(3, -1, -1, -1)
        assert torch.equal(packed(expanded), layer(expanded.contiguous()))


@pytest.mark.parametrize("case", ["padded", "groups"])
def test_a_weight_in_channels_last_is_the_same_weight(case: str):
    layer = CASES[case].layer().eval().requires_grad_(False)
    x = CASES[case].images()
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert torch.equal(layer(x), expected)
    assert torch.equal(PackedConv2d.from_latent(layer)(x), expected)


@pytest.mark.parametrize("edge", [float("nan"), -0.0, 0.0, float("inf"), -float("inf")])
def test_edges_are_signs_like_all_others(edge: float):
    layer = CASES["padded"].layer(weight_scaling="none").requires_grad_(False)
    x = CASES["padded"].images()
    x[:, ::2, 1:3] = edge
    plain = torch.where(x < 0, -1.0, 1.0)
    packed = PackedConv2d.from_latent(layer).eval()
    expected = layer.eval()(plain)
    assert torch.equal(layer.eval()(x), expected)
    assert torch.equal(layer.train()(x), expected)
    assert torch.equal(packed(x), expected)
    layer.weight[:, ::3] = edge
    expected = F.conv2d(F.pad(plain, (1, 1, 1, 1)), torch.where(layer.weight < 0, -1.0, 1.0), layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert torch.equal(PackedConv2d.from_latent(layer)(x), layer.eval()(x))


@every_levels
@pytest.mark.parametrize("binarize", BINARIZE)
@pytest.mark.parametrize("case", ["padded", "everything", "depthwise"])
def test_all_gradients_are_those_of_the_straight_through_formula(levels, binarize: str, case: str):
    layer = CASES[case].layer(levels=levels(), binarize=binarize).double()
    x = CASES[case].images().double().requires_grad_()
    y = layer(x)
    G = torch.randn_like(y)
    y.backward(G)

    twin = CASES[case].layer(levels=levels(), binarize=binarize).double()
    twin.load_state_dict(layer.state_dict())
    z = x.detach().clone().requires_grad_()
    inputs = z
    if binarize != "weights":
        scale, shift = twin.input_levels.affine()
        soft = ((z - twin.input_levels.threshold()) / scale).clamp(-1, 1)
        hard = torch.where(z < twin.input_levels.threshold(), -1.0, 1.0).double()
        inputs = scale * (soft + (hard - soft).detach()) + shift
    weight = twin.weight
    if binarize != "activations":
        mean = weight.detach().abs().mean((1, 2, 3), keepdim=True)
        signs = torch.where(weight < 0, -1.0, 1.0).double()
        weight = mean * (weight + (signs - weight).detach())
    F.conv2d(inputs, weight, twin.bias, twin.stride, twin.padding, twin.dilation, twin.groups).backward(G)

    torch.testing.assert_close(x.grad, z.grad, rtol=1e-5, atol=1e-6)
    expected = dict(twin.named_parameters())
    for name, parameter in layer.named_parameters():
        if expected[name].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("binarize", BINARIZE)
@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_puts_out_the_dtype_of_its_weights(dtype: torch.dtype, binarize: str, training: bool):
    case = CASES["everything"]
    layer = case.layer(levels=ElasticLevels(signed=False), binarize=binarize).to(dtype).train(training)
    x = case.images().to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == dtype
    layer.requires_grad_(False)
    assert layer(x.detach()).dtype == dtype


def test_evaluation_sums_are_exact_under_autocast_too():
    layer = Case(512, 4, (3, 3)).layer(weight_scaling="none", bias=False).eval().requires_grad_(False)
    packed = PackedConv2d.from_latent(layer).eval()
    x = torch.randn(2, 512, 5, 5)
    expected = float_reference(layer, x).float()
    assert expected.abs().max() > 100
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
        assert torch.equal(packed(x), expected)


# From float


def test_a_convolution_takes_over_the_parameters_and_the_mode_of_a_float_one():
    conv = nn.Conv2d(12, 8, (3, 2), (2, 1), (1, 0), (1, 2), 4, bias=False).eval()
    layer = BinaryConv2d.from_float(conv, "weights", weight_scaling="layer")
    assert layer.weight is conv.weight
    assert layer.bias is None
    assert not layer.training
    assert isinstance(layer, nn.Conv2d)
    assert list(layer.state_dict()) == ["weight"]
    assert (layer.stride, layer.padding, layer.dilation, layer.groups) == ((2, 1), (1, 0), (1, 2), 4)
    assert (layer.binarize, layer.weight_scaling) == ("weights", "layer")


@pytest.mark.parametrize(
    ("kernel", "padding", "dilation", "expected"),
    [
        (3, "same", 1, (1, 1)),
        ((3, 5), "same", (2, 1), (2, 2)),
        (1, "same", 1, (0, 0)),
        (2, "same", 2, (1, 1)),
        (3, "valid", 1, (0, 0)),
        (2, "valid", 1, (0, 0)),
    ],
)
def test_padding_by_name_is_padding_by_number(kernel, padding: str, dilation, expected: tuple[int, int]):
    conv = nn.Conv2d(4, 4, kernel, padding=padding, dilation=dilation)
    x = torch.randn(2, 4, 7, 8)
    for layer in (
        BinaryConv2d.from_float(conv),
        BinaryConv2d(4, 4, kernel, padding=padding, dilation=dilation),
    ):
        assert layer.padding == expected
        assert layer.eval().requires_grad_(False)(x).shape == conv(x).shape


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_anything_but_zeros_is_refused(mode: str):
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    message = rf"padding_mode='{mode}': a binary convolution pads with zeros; leave it float \(exclude=...\)"
    with pytest.raises(ValueError, match=message):
        BinaryConv2d.from_float(conv)


def test_padding_that_is_not_alike_on_both_sides_is_refused():
    message = r"padding='same' with kernel_size=\(2, 3\) pads more on one side than on the other: a binary convolution"
    with pytest.raises(ValueError, match=message):
        BinaryConv2d.from_float(nn.Conv2d(4, 4, (2, 3), padding="same"))
    with pytest.raises(ValueError, match=message):
        BinaryConv2d(4, 4, (2, 3), padding="same")


def test_an_unknown_scaling_is_named_with_the_known_ones():
    for make in (lambda: BinaryConv2d(4, 4, 3, weight_scaling="x"), lambda: BinaryLinear(4, 4, weight_scaling="x")):
        with pytest.raises(ValueError, match="weight_scaling='x': expected one of channel, layer, none"):
            make()


def test_a_kernel_that_is_larger_than_the_image_is_an_error():
    layer = BinaryConv2d(4, 4, 5, padding=1).eval().requires_grad_(False)
    packed = PackedConv2d.from_latent(layer).eval()
    for module in (layer, packed):
        with pytest.raises(ValueError, match="a 5 x 5 kernel does not fit into a padded input of 6 x 4"):
            module(torch.randn(1, 4, 4, 2))
    with pytest.raises(ValueError, match="a 5 x 5 kernel does not fit into a padded input of 6 x 4"):
        install_method(layer).train()(torch.randn(1, 4, 4, 2))
    layer.runs_on_bits = False
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        layer(torch.randn(1, 4, 4, 2))


# PackedConv2d


@every_case
@every_levels
@pytest.mark.parametrize("binarize", ["both", "weights"])
def test_packed_equals_latent_bit_for_bit(case: Case, levels, binarize: str):
    layer = case.layer(levels=levels(), binarize=binarize).eval().requires_grad_(False)
    packed, x = PackedConv2d.from_latent(layer).eval(), case.images()
    assert torch.equal(packed(x), layer(x))
    assert torch.equal(packed(x[:0]), layer(x[:0]))
    assert torch.equal(packed.train()(x), layer(x))


@every_levels
@every_scaling
@pytest.mark.parametrize("binarize", ["both", "weights"])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_equals_latent_for_every_structure(levels, scaling: str, binarize: str, bias: bool):
    case = CASES["everything"]
    structure = {"levels": levels(), "weight_scaling": scaling, "binarize": binarize, "bias": bias}
    layer = case.layer(**structure).eval().requires_grad_(False)
    x = case.images()
    assert torch.equal(PackedConv2d.from_latent(layer).eval()(x), layer(x))


@every_levels
@pytest.mark.parametrize("binarize", ["both", "weights"])
@pytest.mark.parametrize("case", ["padded", "everything"])
def test_the_path_with_gradients_computes_what_the_path_without_does(levels, binarize: str, case: str):
    layer = CASES[case].layer(levels=levels(), binarize=binarize).requires_grad_(False)
    packed = PackedConv2d.from_latent(layer)
    x = CASES[case].images()
    assert torch.equal(packed.train()(x), packed.eval()(x))
    assert torch.equal(packed(x.clone().requires_grad_()), packed(x))


@every_levels
@pytest.mark.parametrize("binarize", ["both", "weights"])
@pytest.mark.parametrize("case", ["padded", "everything"])
def test_the_inputs_gradient_is_that_of_the_latent_layer(levels, binarize: str, case: str):
    layer = CASES[case].layer(levels=levels(), binarize=binarize)
    packed = PackedConv2d.from_latent(copy.deepcopy(layer))
    x = CASES[case].images().requires_grad_()
    z = x.detach().clone().requires_grad_()
    y = layer(x)
    G = torch.randn_like(y)
    y.backward(G)
    packed(z).backward(G)
    torch.testing.assert_close(z.grad, x.grad)


def test_a_packed_convolution_is_a_convolution_with_a_uint8_buffer_called_weight():
    layer = Case(12, 6, (3, 2), groups=2).layer(levels=ElasticLevels())
    packed = PackedConv2d.from_latent(layer)
    assert isinstance(packed, nn.Conv2d)
    keys = {"weight", "weight_scale", "bias", "input_levels.width", "input_levels.offset"}
    assert set(packed.state_dict()) == keys
    assert (packed.weight.dtype, packed.weight.shape) == (torch.uint8, (6, 1, 3, 2))
    assert [name for name, _ in packed.named_parameters()] == ["bias", "input_levels.width", "input_levels.offset"]
    assert "12, 6, kernel_size=(3, 2), stride=(1, 1), padding=(1, 1), groups=2" in repr(packed)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 65])
def test_bits_run_along_the_input_channels(channels: int):
    layer = Case(channels, 5, (3, 2)).layer()
    packed = PackedConv2d.from_latent(layer)
    assert packed.weight.shape == (5, -(-channels // 8), 3, 2)
    assert torch.equal(packed.signs(), torch.where(layer.weight < 0, -1, 1).to(torch.int8))
    for row in range(3):
        for column in range(2):
            signs = unpack_bits(packed.weight[:, :, row, column], channels)
            assert torch.equal(signs, packed.signs()[:, :, row, column])


def test_an_empty_packed_convolution_has_the_shapes_of_a_full_one_on_the_meta_device_too():
    layer = CASES["everything"].layer(levels=ElasticLevels())
    expected = {key: (v.shape, v.dtype) for key, v in PackedConv2d.from_latent(layer).state_dict().items()}
    assert {key: (v.shape, v.dtype) for key, v in PackedConv2d.empty_like(layer).state_dict().items()} == expected
    assert PackedConv2d.empty_like(layer.to("meta")).weight.is_meta


@every_levels
@every_scaling
@pytest.mark.parametrize("binarize", ["both", "weights"])
@pytest.mark.parametrize("case", ["everything", "13 channels", "depthwise"])
def test_unpacking_and_packing_again_gives_the_same_bits(levels, scaling: str, binarize: str, case: str):
    model = nn.Sequential(CASES[case].layer(levels=levels(), binarize=binarize, weight_scaling=scaling))
    x = CASES[case].images()
    packed = pack_(model)
    before = copy.deepcopy(packed.state_dict())
    with torch.no_grad():
        expected = packed(x)
        latent = unpack_(packed)
        assert type(latent[0]) is BinaryConv2d
        assert (latent[0].binarize, latent[0].weight_scaling) == (binarize, scaling)
        torch.testing.assert_close(latent.eval()(x), expected)
    latent.train()(x).sum().backward()
    assert latent[0].weight.grad.any()
    after = pack_(latent).state_dict()
    assert list(after) == list(before)
    assert torch.equal(after["0.weight"], before["0.weight"])
    torch.testing.assert_close(after["0.weight_scale"], before["0.weight_scale"], rtol=1e-6, atol=0)


def test_unpacked_kernels_are_the_signs_times_their_scale():
    packed = PackedConv2d.from_latent(CASES["everything"].layer())
    latent = packed.to_latent()
    assert torch.equal(latent.weight, packed.signs() * packed.weight_scale.view(-1, 1, 1, 1))
    assert latent.weight.requires_grad
    torch.testing.assert_close(weight_scale(latent.weight), packed.weight_scale)


@pytest.mark.parametrize("method", [STE(), Surge(), Surge(aux="shared")], ids=["ste", "surge-own", "surge-shared"])
def test_a_copied_convolution_shares_nothing_with_its_original(method):
    layer = CASES["everything"].layer(levels=ElasticLevels())
    install_method(layer, method)
    twin = copy.deepcopy(layer)
    x = CASES["everything"].images().requires_grad_()
    twin(x).sum().backward()
    assert layer.weight.grad is None
    assert not {p.data_ptr() for p in layer.parameters()} & {p.data_ptr() for p in twin.parameters()}
    packed = PackedConv2d.from_latent(layer).requires_grad_(False)
    copied = copy.deepcopy(packed)
    packed.weight.zero_()
    with torch.no_grad():
        assert torch.equal(copied(x), layer.eval()(x))


# Models


def test_a_packed_network_of_convolutions_loads_into_an_empty_one(tmp_path: Path):
    net = conv2d_net()
    train_steps(net, optimizer_of(net), range(2))
    with torch.no_grad():
        net.model.eval()
        expected = net.output()
        torch.save(pack_(net.model).state_dict(), tmp_path / "packed.pt")
        other = net._replace(model=pack_(conv2d_net().model))
        other.model.load_state_dict(torch.load(tmp_path / "packed.pt", weights_only=True))
        assert torch.equal(other.output(), expected)


@every_scaling
def test_a_summary_of_convolutions_agrees_with_the_bytes_of_the_packed_tensors(scaling: str):
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3, groups=2), nn.Conv2d(10, 7, (2, 3)), nn.Linear(4, 4)
    )
    floats = sum(p.numel() for p in model.parameters())
    binarize_(model, skip=("0",), weight_scaling=scaling)
    latent = summary(model)
    packed = summary(pack_(model))
    assert latent == packed
    assert latent.weights == floats
    assert latent.binary_weights == 10 * 6 * 9 + 7 * 10 * 6 + 4 * 4
    assert latent.matrix_bytes_float == 4 * latent.binary_weights
    layers = [m for m in model.modules() if isinstance(m, PackedConv2d | PackedLinear)]
    assert len(layers) == 3
    assert latent.matrix_bytes_bits == sum(layer.weight.nbytes for layer in layers)
    assert latent.matrix_bytes_bits == 10 * 1 * 9 + 7 * 2 * 6 + 4 * 1
    assert latent.matrix_bytes_packed == sum(layer.weight.nbytes + layer.weight_scale.nbytes for layer in layers)


def test_convolutions_with_float_weights_are_not_counted_as_binary():
    model = binarize_(nn.Sequential(nn.Conv2d(4, 4, 3)), binarize="activations")
    assert summary(model).binary_weights == 0


@every_scaling
def test_a_bert_of_any_scaling_packs_saves_and_loads(scaling: str, tmp_path: Path):
    net = Net(tiny_model(weight_scaling=scaling), tiny_batch())
    assert {layer.weight_scaling for layer in binary_layers(net.model)} == {scaling}
    train_steps(net, optimizer_of(net), range(2))
    net.model.eval()
    with torch.no_grad():
        expected = net.output()
        packed = net._replace(model=pack_(net.model))
        assert torch.equal(packed.output(), expected)
        packed.model.save_pretrained(tmp_path)
        again = BinaryBertForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(net._replace(model=again).output(), expected)
    assert again.config.weight_scaling == scaling
    scales = {m.weight_scaling for m in again.modules() if isinstance(m, PackedLinear)}
    assert scales == {scaling}


def test_without_a_scale_the_packed_scales_are_one():
    packed = pack_(binarize_(nn.Sequential(nn.Conv2d(4, 4, 3)), weight_scaling="none"))
    assert packed[0].weight_scale.tolist() == [1.0] * 4
    packed = pack_(binarize_(nn.Sequential(nn.Conv2d(4, 4, 3)), weight_scaling="layer"))
    assert len(set(packed[0].weight_scale.tolist())) == 1


def test_a_config_refuses_an_unknown_scaling():
    with pytest.raises(ValueError, match="weight_scaling='row': expected one of channel, layer, none"):
        tiny_config(weight_scaling="row")


def test_a_network_of_convolutions_learns_under_every_scaling():
    for scaling in WEIGHT_SCALINGS:
        net = make_net("conv2d", STE())
        for layer in binary_layers(net.model):
            layer.weight_scaling = scaling
        losses = train_steps(net, optimizer_of(net), range(30))
        assert losses[-1] < 0.5 * losses[0], scaling


# The integer convolution


@pytest.mark.parametrize("seed", range(60))
def test_the_integer_convolution_is_exact_at_random_shapes(seed: int):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    groups = draw.choice([1, 1, 2, 3])
    inputs, outputs = groups * draw.randint(1, 20), groups * draw.randint(1, 6)
    kernel, stride = (tuple(draw.randint(1, top) for _ in range(2)) for top in (4, 3))
    padding, dilation = (tuple(draw.randint(low, top) for _ in range(2)) for low, top in ((0, 3), (1, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [n + draw.randint(0, 5) for n in least]
    x = torch.randint(0, 2, (draw.randint(1, 3), inputs, *size)).mul(2).sub(1).to(torch.int8)
    weight = torch.randint(0, 2, (outputs, inputs // groups, *kernel)).mul(2).sub(1).to(torch.int8)
    if draw.random() < 0.5:
        x = x.to(memory_format=torch.channels_last)
    found = integer_conv2d(x, weight, stride, padding, dilation, groups)
    expected = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())
    altered = weight.clone()
    altered.flatten()[0].neg_()
    other = integer_conv2d(x, altered, stride, padding, dilation, groups)
    touched = F.conv2d(x.abs().double(), (altered != weight).double(), None, stride, padding, dilation, groups) > 0
    assert torch.equal(other != found, touched)  # the check can fail: one flipped sign changes all that see it


@pytest.mark.parametrize("levels", [SignedLevels, UnsignedLevels, lambda: ElasticLevels(signed=False)])
@pytest.mark.parametrize("binarize", ["both", "weights", "activations"])
def test_one_image_is_a_batch_of_one_in_every_state(binarize: str, levels):
    model = binarize_(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1)), binarize=binarize, levels=lambda _: levels())
    x = torch.randn(8, 5, 5)

    def compare() -> None:
        assert torch.equal(model(x), model(x.unsqueeze(0)).squeeze(0))
        for wrong in (x[0], x[None, None]):
            with pytest.raises(
                ValueError, match=r"inputs of shape \(.*: a convolution takes \(N, C, H, W\), or \(C, H, W"
            ):
                model(wrong)

    compare()
    with torch.no_grad():
        model.eval()
        compare()
        if binarize != "activations":
            pack_(model)
            compare()
            optimize_(model)
            compare()
