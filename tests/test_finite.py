"""NaN and infinity are refused where weights become bits, and where they are written; so are ids outside a table."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import TinyConvNet, tiny_config, tiny_float_bert, tiny_model, tiny_resnet, tiny_vit
from torch import nn

from hf_bnn import (
    BinaryBertForMaskedLM,
    BinaryBertForSequenceClassification,
    BinaryConfig,
    Surge,
    binarize_,
    install_method,
    pack_,
)
from hf_bnn.nn.embeddings import BinaryEmbedding, Int8Embedding
from hf_bnn.nn.finite import check_finite, tensors_to_check
from hf_bnn.nn.levels import ElasticLevels
from hf_bnn.nn.packed import PACKED, is_packed

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "bert": tiny_model,
    "bert with binary tables": lambda: tiny_model(embeddings="binary", attention="binary"),
    "masked language": lambda: BinaryBertForMaskedLM(tiny_config()),
    "vit": tiny_vit,
    "resnet": lambda: tiny_resnet(levels="rsign", block_activation="rprelu"),
    "config": lambda: BinaryConfig().apply_(tiny_float_bert()),
    "any": lambda: binarize_(TinyConvNet(), exclude=["0", "9"], levels=lambda name: ElasticLevels()),
}


def kinds(model: nn.Module) -> dict[str, list[str]]:
    """The names of the model's tensors, those of one kind together: one of a kind is enough to be tried."""
    found: dict[str, list[str]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            found.setdefault(f"{owner}.{name.rpartition('.')[2]}", []).append(name)
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("maker", MAKERS)
def test_every_tensor_of_a_model_must_be_finite_to_be_packed(maker: str, value: float):
    model = MAKERS[maker]()
    for names in kinds(model).values():
        tensor = model.state_dict()[names[-1]]
        before = tensor.clone()
        tensor.view(-1)[-1] = value
        message = (
            f"cannot pack {type(model).__name__}: 1 of the {tensor.numel()} values of '.*{names[-1].split('.')[-1]}'"
        )
        with pytest.raises(ValueError, match=message):
            pack_(model)
        assert not is_packed(model)
        tensor.copy_(before)
    pack_(model)


@pytest.mark.parametrize("form", ["latent", "packed"])
@pytest.mark.parametrize("maker", ["bert", "resnet", "config"])
def test_what_is_not_finite_is_not_saved(maker: str, form: str, tmp_path):
    model = MAKERS[maker]() if form == "latent" else pack_(MAKERS[maker]())
    model.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for names in kinds(model).values():
        broken = copy.deepcopy(model)
        broken.state_dict()[names[0]].view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=rf"cannot save {type(model).__name__}: 1 of the \d+ values of '"):
            broken.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_state_dict_that_is_given_to_be_saved_is_the_one_that_is_looked_at(tmp_path):
    model = tiny_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["classifier.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'classifier.weight' are NaN or infinite, which signs would hide\. Training"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_a_methods_own_tensors_need_not_be_finite_since_they_are_dropped():
    model = install_method(binarize_(nn.Sequential(nn.Linear(8, 8))), Surge(aux="own"))
    part = next(part for _, part in model[0].parts() if list(part.parameters()))
    nn.init.constant_(next(part.parameters()), float("nan"))
    assert is_packed(pack_(model))


def test_a_mask_of_minus_infinity_may_be_packed():
    model = binarize_(nn.Sequential(nn.Linear(8, 8)))
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    assert is_packed(pack_(model))


def test_a_layer_without_a_packed_form_is_refused_before_anything_is_packed():
    model = binarize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match="'1' is a ParametrizedBinaryLinear, which has no packed form"):
        pack_(model)
    assert not is_packed(model)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert is_packed(pack_(model))


def test_a_scale_that_float16_cannot_hold_is_refused():
    model = nn.Sequential(BinaryEmbedding(4, 8))
    nn.init.constant_(model[0].weight, 1e6)
    with pytest.raises(ValueError, match=r"4 of the 4 values of '0\.weight_scale' are NaN or infinite"):
        pack_(model)
    assert isinstance(model[0], BinaryEmbedding)


@pytest.mark.parametrize("table", [Int8Embedding, BinaryEmbedding])
@pytest.mark.parametrize("ids", [[-1], [0, -100], [10]])
def test_an_id_outside_a_table_is_an_error_latent_and_packed_as_in_torch(table: type[nn.Embedding], ids: list[int]):
    latent = table(10, 4)
    packed = PACKED[table].from_latent(latent)
    for embedding in (nn.Embedding(10, 4), latent, packed):
        with pytest.raises(IndexError, match="index out of range in self"):
            embedding(torch.tensor(ids))
    ids = torch.tensor([[0, 9, 3]], dtype=torch.int32)
    assert torch.equal(packed(ids), latent(ids))


def test_a_packed_bert_refuses_an_id_of_minus_one():
    model = pack_(BinaryBertForSequenceClassification(tiny_config()))
    with pytest.raises(IndexError, match="index out of range"), torch.no_grad():
        model(input_ids=torch.tensor([[1, -1]]))


def test_one_bad_tensor_is_found_behind_those_that_hold_no_numbers():
    harmless = {"ids": torch.arange(3), "meta": torch.full((2,), float("nan"), device="meta"), "none": None}
    check_finite("pack it", {**harmless, "good": torch.ones(2)})
    message = r"cannot pack it: 2 of the 3 values of 'bad' are NaN or infinite, which signs would hide"
    with pytest.raises(ValueError, match=message):
        check_finite("pack it", {**harmless, "bad": torch.tensor([1.0, float("inf"), float("nan")])})


def test_each_tensor_is_looked_at_once_by_its_name_in_the_state_dict():
    model = binarize_(TinyConvNet(), Surge(), exclude=["0", "9"], levels=lambda name: ElasticLevels())
    found = tensors_to_check(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    parts = tuple(f"{name}.around." for name, layer in model.named_modules() if hasattr(layer, "around"))
    assert found.keys() == {name for name in state if not name.startswith(parts)}
    assert all(found[name].data_ptr() == state[name].data_ptr() for name in found)
