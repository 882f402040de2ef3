"""The linear operators of binary layers: shapes, sums and adjoints against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_bnn import kernels
from hf_bnn.nn.products import Conv2dProduct, LinearProduct

# Nothing is square, and no two numbers of a geometry are alike.
GEOMETRIES = {
    "plain": Conv2dProduct(),
    "strided": Conv2dProduct(stride=(2, 3), padding=(1, 2)),
    "dilated": Conv2dProduct(padding=(4, 2), dilation=(3, 2)),
    "grouped": Conv2dProduct(stride=(1, 2), padding=(2, 1), groups=2),
}


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape, dtype=torch.int8) * 2 - 1


def operands(product: LinearProduct | Conv2dProduct) -> tuple[Tensor, Tensor]:
    if isinstance(product, LinearProduct):
        return signs(2, 3, 20), signs(5, 20)
    return signs(2, 4, 9, 11), signs(6, 4 // product.groups, 3, 2)


PRODUCTS = {"linear": LinearProduct(), **GEOMETRIES}
every_product = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


@every_product
@pytest.mark.parametrize("backend", kernels.available())
def test_the_exact_product_is_that_of_floats_and_has_the_shape_foretold(product, backend: str):
    x, weight = operands(product)
    with kernels.using(backend):
        found = product.of_signs(x, weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, product(x.float(), weight.float()))
    assert tuple(found.shape) == product.output_shape(x, weight.shape)


@pytest.mark.parametrize("product", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_convolution_is_torchs_whatever_the_layout_of_its_weight(product: Conv2dProduct):
    x, weight = torch.randn(2, 4, 9, 11), torch.randn(6, 4 // product.groups, 3, 2)
    expected = F.conv2d(x, weight, None, product.stride, product.padding, product.dilation, product.groups)
    for laid_out in (weight, weight.to(memory_format=torch.channels_last)):
        assert torch.equal(product(x, laid_out), expected)


@every_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums_of_weights_are_those_of_the_product_with_ones_in_float32(product, dtype: torch.dtype):
    x, weight = operands(product)
    expected = product(torch.ones_like(x[:1]).float(), weight.float())
    found = product.weight_sum(weight, x.to(dtype))
    assert found.dtype == torch.float32
    assert torch.equal(found.expand_as(expected), expected)


def test_sums_of_many_weights_are_exact_beside_half_precision_inputs_and_under_autocast():
    weight = torch.ones(1, 4097, 1, 1, dtype=torch.int8)
    x = torch.zeros(1, 4097, 1, 1, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert Conv2dProduct().weight_sum(weight, x).item() == 4097
    assert LinearProduct().weight_sum(weight.flatten(1).half(), x.flatten(1)).item() == 4097


@every_product
def test_one_value_per_channel_broadcasts_to_the_output(product):
    x, weight = operands(product)
    y = product.of_signs(x, weight)
    values = torch.arange(1.0, weight.shape[0] + 1)
    found = y * product.per_channel(values)
    channels = y.movedim(-1, 0) if isinstance(product, LinearProduct) else y.movedim(1, 0)
    expected = torch.stack([channel * value for channel, value in zip(channels, values, strict=True)])
    assert torch.equal(found.movedim(-1 if isinstance(product, LinearProduct) else 1, 0), expected)


@every_product
def test_the_adjoints_are_the_gradients_of_the_product(product):
    x, weight = (operand.double().requires_grad_() for operand in operands(product))
    y = product(x, weight)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight), grad)
    torch.testing.assert_close(product.grad_input(grad, x.detach(), weight.detach()), expected[0])
    torch.testing.assert_close(product.grad_weight(grad, x.detach(), weight.detach()), expected[1])
