"""PEFT adapters on latent, packed and optimized models stay float beside the binary layers and are never merged."""

import copy
import pickle

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from tiny import different, tiny_batch, tiny_images, tiny_model, tiny_resnet
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from hf_bnn import optimize_, pack_
from hf_bnn.adapters import AdaptedLayer
from hf_bnn.nn.layers import BinaryConv2d, BinaryLinear

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

STATES = {"latent": lambda model: model, "packed": pack_, "optimized": lambda model: optimize_(pack_(model))}
TARGETS = ["query", "value"]
KINDS = {
    "lora": lambda: LoraConfig(target_modules=TARGETS, r=4),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "oft": lambda: OFTConfig(target_modules=TARGETS, oft_block_size=8, r=0),
    "vera": lambda: VeraConfig(target_modules=TARGETS, r=2),
    "adalora": lambda: AdaLoraConfig(target_modules=TARGETS, total_step=10),
}
FLOAT_WEIGHTS_ONLY = {
    "loha": lambda: LoHaConfig(target_modules=TARGETS, r=2),
    "lokr": lambda: LoKrConfig(target_modules=TARGETS, r=2),
}
LOST = "adapters stay beside a .*cannot be merged into it, since .*cannot be saved.*PeftModel.from_pretrained"


def bert(state: str) -> nn.Module:
    torch.manual_seed(0)
    return STATES[state](tiny_model(num_hidden_layers=1)).eval()


def adapted(model: nn.Module, config) -> PeftModel:
    """`model` with adapters that make a difference."""
    found = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.requires_grad and "classifier" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return found.eval()


def logits(model: nn.Module) -> Tensor:
    images = "pixel_values" in (model.base_model if isinstance(model, PeftModel) else model).main_input_name
    batch = tiny_images() if images else tiny_batch()
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


@pytest.fixture(params=STATES)
def state(request) -> str:
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_the_model_keeps_what_it_computes_and_its_bits(state: str, kind: str, tmp_path):
    model = bert(state)
    before, plain = copy.deepcopy(model.state_dict()), logits(model)
    found = adapted(model, KINDS[kind]())
    expected = logits(found)
    assert not torch.equal(expected, plain)
    with pytest.warns(UserWarning, match=LOST):
        merged = found.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert torch.equal(logits(merged), expected)
    kept = {key.replace(".base_layer", ""): value for key, value in merged.state_dict().items()}
    assert not different(before, {key: kept[key] for key in before})
    with pytest.raises(ValueError, match=r"query is a \w+ with an adapter.*no place for it.*Keep the adapter.*unload"):
        merged.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_place_is_refused_and_changes_nothing(state: str, kind: str):
    reason = {"latent": "only the signs"}.get(state, "its weights are packed")
    found = adapted(bert(state), KINDS[kind]())
    before, expected = copy.deepcopy(found.state_dict()), logits(found)
    with pytest.raises(ValueError, match=f"an adapter cannot be merged into a .*: {reason}.*Keep the adapter"):
        found.merge_adapter()
    assert not different(before, found.state_dict())
    assert torch.equal(logits(found), expected)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_unloading_gives_the_binary_model_back(state: str, kind: str):
    model = bert(state)
    before, plain = copy.deepcopy(model.state_dict()), logits(model)
    back = adapted(model, KINDS[kind]()).unload()
    assert torch.equal(logits(back), plain)
    assert not different(before, back.state_dict())


@pytest.mark.parametrize("kind", FLOAT_WEIGHTS_ONLY)
def test_adapters_that_need_a_float_weight_work_on_latent_layers(kind: str):
    found = adapted(bert("latent"), FLOAT_WEIGHTS_ONLY[kind]())
    expected = logits(found)
    with pytest.warns(UserWarning, match=LOST):
        assert torch.equal(logits(found.merge_and_unload()), expected)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch, for ShiRA
@pytest.mark.parametrize("config", [HRAConfig(target_modules=TARGETS, r=2), ShiraConfig(target_modules=TARGETS, r=2)])
def test_adapters_that_bypass_the_layer_are_refused(state: str, config):
    found = get_peft_model(bert(state), copy.deepcopy(config)).eval()
    with pytest.raises(ValueError, match=r"peft.*reads the weight of a \w+Linear.*such as LoRA or IA3"):
        logits(found)


def test_dora_is_refused(state: str):
    with pytest.raises(ValueError, match="use_dora=True: DoRA divides by the norms of float weights"):
        get_peft_model(bert(state), LoraConfig(target_modules=TARGETS, use_dora=True))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialization_that_writes_to_latent_weights_is_refused_and_undone(init: str):
    model = bert("latent")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"takes the adapter's part out of the weights of a BinaryLinear"):
        get_peft_model(model, LoraConfig(target_modules=TARGETS, init_lora_weights=init))
    assert not different(before, model.state_dict())


def test_adapters_of_a_rounded_table_are_not_merged(state: str):
    found = adapted(bert(state), LoraConfig(target_modules=["word_embeddings"], r=2))
    expected = logits(found)
    with pytest.raises(ValueError, match=r"an adapter cannot be merged into a .*Embedding"):
        found.merge_adapter()
    with pytest.warns(UserWarning, match=LOST):
        assert torch.equal(logits(found.merge_and_unload()), expected)


def test_float_layers_take_their_adapters(state: str):
    """Only what is binary keeps them."""
    found = adapted(bert(state), LoraConfig(target_modules=["classifier"], r=2))
    expected = logits(found)
    torch.testing.assert_close(logits(found.merge_and_unload()), expected)
    plain = BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    found = adapted(plain.eval(), LoraConfig(target_modules=TARGETS, r=2))
    assert not any(isinstance(module, AdaptedLayer) for module in found.merge_and_unload().modules())


def test_weighted_adapters_are_made_and_used(state: str):
    found = adapted(bert(state), KINDS["lora"]())
    one = logits(found)
    found.add_adapter("second", KINDS["lora"]())
    found.add_weighted_adapter(["default", "second"], [2.0, 1.0], "both", combination_type="linear")
    found.set_adapter("both")
    assert not torch.equal(logits(found), one)
    found.set_adapter("default")
    assert torch.equal(logits(found), one)
    with pytest.warns(UserWarning, match=LOST):
        assert torch.equal(logits(found.merge_and_unload(adapter_names=["default"])), one)


def test_the_adapters_of_a_resnet_are_float_and_learn(state: str):
    torch.manual_seed(0)
    found = get_peft_model(STATES[state](tiny_resnet()), LoraConfig(target_modules=["convolution"], r=2))
    found.add_adapter("second", LoraConfig(target_modules=["convolution"], r=2))
    parts = [module for name, module in found.named_modules() if "lora_" in name and isinstance(module, nn.Conv2d)]
    assert len(parts) > 8
    assert {type(part) for part in parts} == {nn.Conv2d}
    assert any(isinstance(module, BinaryConv2d) for module in found.modules()) == (state == "latent")
    found = adapted(STATES[state](tiny_resnet()), LoraConfig(target_modules=r".*layer\.\d\.convolution", r=2))
    found.train()(**tiny_images()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in found.named_parameters() if "lora_" in n)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_adapted_models_are_copied_pickled_and_adapted_again(state: str):
    found = adapted(bert(state), KINDS["lora"]())
    expected = logits(found)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(logits(other), expected)
        with pytest.raises(ValueError, match="an adapter cannot be merged into"):
            other.merge_adapter()
    with pytest.warns(UserWarning, match=LOST):
        merged = found.merge_and_unload()
    again = adapted(merged, LoraConfig(target_modules=["dense"], r=2))
    assert not torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), expected)
    assert torch.equal(logits(again.unload()), expected)


def test_what_is_no_adapter_is_left_alone():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = BinaryLinear(4, 4)

    assert type(Wrapper()) is Wrapper
