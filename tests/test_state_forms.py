"""State dicts of the other form: a latent one into a packed model, and the other way round."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import TinyConvNet, tiny_model, tiny_resnet, tiny_vit
from torch import nn

from hf_bnn import binarize_, optimize_, pack_, unpack_
from hf_bnn.nn.embeddings import BinaryEmbedding, Int8Embedding

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "bert": tiny_model,
    "binary tables": lambda: tiny_model(embeddings="binary"),
    "vit": tiny_vit,
    "resnet": tiny_resnet,
    "convolutions": lambda: binarize_(TinyConvNet(), exclude=["0", "9"]),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_state_dict_of_the_other_form_is_an_error_that_names_the_tensor_and_the_way_out(maker: str, strict: bool):
    latent = MAKERS[maker]()
    packed = pack_(copy.deepcopy(latent))
    optimized = optimize_(copy.deepcopy(packed))
    for model in (packed, optimized):
        bits = {name: value.clone() for name, value in model.state_dict().items() if not value.is_floating_point()}
        message = (
            r"'.*\.weight' is float32, of a latent model's state dict, and this model has u?int8 there: load it in"
        )
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(latent.state_dict(), strict=strict)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in bits.items())
        model.load_state_dict(packed.state_dict())
    message = r"'.*\.weight' is uint8, of a packed model's .* has float32 there: call hf_bnn.pack_\(model\) before you"
    for model in (latent, unpack_(copy.deepcopy(packed))):
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(packed.state_dict(), strict=strict)


# Where the shapes fit: 8 bits in a byte for the one row of each depthwise kernel, a byte for each value of a table.
SAME_SHAPES = {
    "depthwise": lambda: binarize_(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))),
    "int8 table": lambda: nn.Sequential(Int8Embedding(6, 4)),
    "one column": lambda: binarize_(nn.Sequential(nn.Linear(1, 8))),
    "binary table": lambda: nn.Sequential(BinaryEmbedding(6, 1)),
}


@pytest.mark.parametrize("maker", SAME_SHAPES)
def test_floats_are_not_loaded_into_bits_nor_bits_into_floats_where_the_shapes_fit(maker: str):
    latent = SAME_SHAPES[maker]()
    packed = pack_(copy.deepcopy(latent))
    assert latent[0].weight.shape == packed[0].weight.shape
    models = [(latent, packed), (packed, latent)]
    if maker in ("depthwise", "one column"):
        models.append((optimize_(copy.deepcopy(packed)), latent))
    for model, other in models:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = other.state_dict()
        with pytest.raises(
            RuntimeError, match=r'Unexpected key.*"0\.weight \((u?int8|float32), of a (packed|latent) model'
        ):
            model.load_state_dict(state)
        found = model.load_state_dict(state, strict=False)
        assert "0.weight" in found.missing_keys
        assert found.unexpected_keys[0].startswith("0.weight (")
        assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latent_weights_of_any_float_type_are_loaded(dtype: torch.dtype):
    model = binarize_(nn.Sequential(nn.Linear(8, 8)))
    state = {name: tensor.to(dtype) for name, tensor in binarize_(nn.Sequential(nn.Linear(8, 8))).state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(model[0].weight, state["0.weight"].float())
