"""Binary layers that a model passes by: made to run, left float where that is known, and found where it is not."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import tiny_batch, tiny_images, tiny_model, tiny_resnet, tiny_vit
from torch import Tensor, nn
from transformers import MambaConfig, MambaModel, PreTrainedModel, WavLMConfig, WavLMModel

from hf_bnn import BinaryConfig, binarize_, check_inputs, optimize_, pack_, unpack_
from hf_bnn.execution import bypassed_layers, check_layers_run
from hf_bnn.nn.direct_reads import DIRECT_READS, reads_weight
from hf_bnn.nn.layers import BinaryConv2d, BinaryLinear, binary_layers

STATES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "latent": lambda model: model,
    "packed": pack_,
    "optimized": lambda model: optimize_(pack_(model)),
    "unpacked": lambda model: unpack_(pack_(model)).eval(),
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(pack_(model))),
}


# torch's own encoder layers


def encoder(norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def ran(model: nn.Module, run: Callable[[], object]) -> set[str]:
    """The names of the modules that run, seen without a hook in the model: one would turn torch's fast path off."""
    seen: set[nn.Module] = set()
    note = nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: seen.add(module))
    try:
        with torch.no_grad():
            run()
    finally:
        note.remove()
    return {name for name, module in model.named_modules() if module in seen}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_the_layers_of_torchs_encoder_run_in_evaluation(state: str, norm_first: bool, padded: bool):
    model, x = binarize_(encoder(norm_first)).eval(), torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * (5 - i) + [True] * i for i in range(3)]) if padded else None
    model = STATES[state](model)
    feed_forward = {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert feed_forward <= ran(model, lambda: model(x, src_key_padding_mask=mask))
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = model(x, src_key_padding_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    valid = slice(None) if mask is None else ~mask
    torch.testing.assert_close(fast[valid], slow[valid])


def test_a_packed_encoder_equals_the_latent_one_bit_for_bit():
    model, x = binarize_(encoder()).eval(), torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(pack_(model)(x), expected)
        assert torch.equal(optimize_(model)(x), expected)


def test_an_encoder_without_binary_layers_keeps_its_fast_path():
    model = nn.ModuleList([encoder(), encoder()])
    binarize_(model, exclude=["0"]).eval()
    x = torch.randn(3, 5, 16)
    inside = ran(model, lambda: model[0](x))
    assert inside == {"0", "0.layers.0", "0.layers.1"}


def test_multihead_attention_stays_float_even_with_a_plain_projection():
    model = binarize_(encoder())
    assert not any(isinstance(module, BinaryLinear) for layer in model.layers for module in layer.self_attn.modules())
    replaced = nn.MultiheadAttention(16, 2)
    replaced.out_proj = nn.Linear(16, 16)
    model = binarize_(nn.ModuleList([replaced, nn.Linear(16, 16)]))
    assert [type(model[0].out_proj), type(model[1])] == [nn.Linear, BinaryLinear]


# Stock models that read weights


def wavlm() -> WavLMModel:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_buckets": 16}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return WavLMModel(WavLMConfig(**size, **convolutions, **positions, max_bucket_distance=32))


def mamba() -> MambaModel:
    return MambaModel(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))


STOCK = {
    "wavlm": (wavlm, {"input_values": torch.randn(1, 400, generator=torch.Generator().manual_seed(0))}),
    "mamba": (mamba, {"input_ids": torch.arange(14).view(2, 7)}),
}


@pytest.mark.parametrize("make_binary", [BinaryConfig().apply_, binarize_], ids=["config", "binarize_"])
@pytest.mark.parametrize("name", STOCK)
def test_every_binary_layer_of_a_stock_model_runs(name: str, make_binary: Callable[[PreTrainedModel], PreTrainedModel]):
    make, batch = STOCK[name]
    model = make_binary(make()).eval()
    names = {name for name, module in model.named_modules() if module in binary_layers(model)}
    assert names <= ran(model, lambda: model(**batch))
    assert bypassed_layers(model, lambda: model(**batch)) == []
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        assert torch.equal(pack_(model)(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["wavlm", "mamba"])
def test_a_layer_that_is_read_is_refused_if_it_is_asked_for(name: str):
    make, _ = STOCK[name]
    child = {"wavlm": "encoder.layers.0.attention.q_proj", "mamba": "layers.0.mixer.dt_proj"}[name]
    with pytest.raises(ValueError, match=rf"'{child}' cannot be binary: \w+ reads its weight instead of calling it"):
        BinaryConfig(include=[child], exclude=[]).apply_(make())


def test_the_table_of_direct_reads_is_that_of_the_installed_transformers():
    """A literal search of the sources; those left out are read only where a setting that is off by default is on."""
    off_by_default = {
        ("BloomAttention", "dense"),
        ("BloomMLP", "dense_4h_to_h"),
        ("DisentangledSelfAttention", "in_proj"),
    }
    known = {(cls, child) for cls, children in DIRECT_READS.items() for child in children} | off_by_default
    read = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data)\b)(?! *,? *torch\.Tensor\b)")
    seen: set[tuple[str, str]] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if not read.search(text):
            continue
        for block in re.split(r"^(?=class )", text, flags=re.MULTILINE):
            found = {match[1] for match in read.finditer(_running(block))}
            made = set(re.findall(r"self\.(\w+) = nn\.(?:Linear|Conv2d)\(", block))
            seen |= {(re.match(r"class (\w+)", block)[1], child) for child in found & made}
    assert ("WavLMAttention", "q_proj") in seen
    assert seen - known == set()


def _running(block: str) -> str:
    """The methods of a class that run in a forward pass."""
    methods = re.split(r"^(?=    def )", block, flags=re.MULTILINE)[1:]
    return "".join(m for m in methods if not re.match(r"    def (__init__|_?init\w*|_?tie\w*|set_\w+|get_\w+)\(", m))


def test_subclasses_of_a_reader_are_readers():
    class WavLMAttention(nn.Module):
        pass

    class Mine(WavLMAttention):
        pass

    assert reads_weight(Mine(), "q_proj")
    assert not reads_weight(Mine(), "gru_rel_pos_linear")


FAMILIES = {
    "bert": (tiny_model, tiny_batch()),
    "bert, binary attention": (lambda: tiny_model(attention="binary"), tiny_batch()),
    "vit": (tiny_vit, tiny_images()),
    "resnet": (tiny_resnet, tiny_images()),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_of_our_own_families_is_passed_by(family: str, state: str):
    make, batch = FAMILIES[family]
    model = STATES[state](make().eval())
    check_layers_run(model, lambda: model(**batch))


# What is not known in advance


class Reader(nn.Module):
    """Runs `called`; reads the weight of `read`, in training of `trained` too, and of `tied` through its table."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.trained = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.idle, self.table = nn.Linear(8, 8), nn.Embedding(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.table.weight
        self.norm, self.calls = nn.BatchNorm1d(8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(F.dropout(self.called(x) + self.table(torch.arange(len(x))), training=self.training))
        x = F.linear(x, self.trained.weight) if self.training else self.trained(x)
        return x @ self.read.weight.t()


def test_layers_whose_weights_are_read_are_found_in_evaluation_and_in_training():
    model, x = binarize_(Reader()).train(), torch.randn(1, 8)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert bypassed_layers(model, lambda: model(x)) == ["read", "trained"]
    assert model.calls == 2
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_is_read_is_an_error_that_names_it_and_the_way_out():
    model, x = binarize_(Reader()), torch.randn(2, 8)
    message = (
        r"Reader reads the weights of the binary layers 'read', 'trained' without calling them: they would compute "
        r"with float weights and inputs, and fail once packed\. Leave them float, with exclude=\[\.\.\.\]"
    )
    with pytest.raises(ValueError, match=message):
        check_layers_run(model, lambda: model(x))
    fine = binarize_(Reader(), exclude=["read", "trained"])
    check_layers_run(fine, lambda: fine(x))


def test_check_inputs_tells_what_is_read_from_what_is_not_reached():
    problems = {report.module: report.problem for report in check_inputs(binarize_(Reader()), torch.randn(4, 8))}
    assert "reads its weight without calling it" in problems["read"]
    assert "reads its weight without calling it, in evaluation or in training" in problems["trained"]
    assert problems["idle"] == "this batch does not reach it"
    assert "reads" not in (problems["called"] or "")


def test_a_packed_layer_that_is_read_is_found():
    model = pack_(binarize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))))
    assert bypassed_layers(model, lambda: model[1](torch.randn(2, 8)) + model[0].weight.sum()) == ["0"]


def test_layers_put_by_hand_into_torchs_encoder_layer_are_found():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layer.linear1 = BinaryLinear.from_float(layer.linear1)
    assert bypassed_layers(layer, lambda: layer(torch.randn(2, 3, 16))) == ["linear1"]


def test_a_run_that_fails_leaves_the_model_as_it_was():
    model = binarize_(Reader()).train()
    with pytest.raises(RuntimeError):
        bypassed_layers(model, lambda: model(torch.randn(2, 7)))
    assert all(module.training for module in model.modules())
    assert not nn.modules.module._global_forward_pre_hooks


# Folding


def normalization(features: int, cls: type[nn.Module]) -> nn.Module:
    norm = cls(features).eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


CONVOLUTION = (BinaryConv2d, (8, 6, 3), nn.BatchNorm2d, (2, 8, 5, 5), nn.utils.fusion.fuse_conv_bn_eval)
LINEAR = (BinaryLinear, (8, 6), nn.BatchNorm1d, (2, 8), nn.utils.fusion.fuse_linear_bn_eval)


@pytest.mark.parametrize("kind", [CONVOLUTION, LINEAR], ids=["conv2d", "linear"])
@pytest.mark.parametrize("binarize", ["both", "weights", "activations"])
@pytest.mark.parametrize("scaling", ["channel", "layer", "none"])
@torch.no_grad()
def test_a_normalization_is_folded_rightly_or_not_at_all(scaling: str, binarize: str, kind: tuple):
    cls, size, norm_class, shape, fuse = kind
    layer = cls(*size, binarize=binarize, weight_scaling=scaling).eval()
    norm, x = normalization(6, norm_class), torch.randn(shape)
    if scaling == "channel" or binarize == "activations":
        torch.testing.assert_close(fuse(layer, norm)(x), norm(layer(x)))
    else:
        with pytest.raises(
            ValueError, match=f"weight_scaling='{scaling}' was given its weights times a factor per outp"
        ):
            fuse(layer, norm)
    if binarize != "activations":
        model = nn.Sequential(layer)
        for state in (pack_, optimize_):
            with pytest.raises(ValueError, match="is bits, which take no parameter in their place"):
                fuse(state(model)[0], norm)


def test_zeros_under_a_negative_factor_are_not_folded():
    layer, norm = BinaryLinear(8, 6).eval(), normalization(6, nn.BatchNorm1d)
    nn.init.zeros_(layer.weight[0, :4])
    nn.init.constant_(norm.weight, -1.0)  # the sign of 0 is +1, and stays so
    with pytest.raises(ValueError, match="weight_scaling='channel' was given its weights times a factor"):
        nn.utils.fusion.fuse_linear_bn_eval(layer, norm)


def test_other_weights_can_be_given_to_a_layer_in_evaluation():
    layer = BinaryLinear(8, 6, weight_scaling="none").eval()
    for weight in (torch.randn(6, 8), torch.randn(4, 8), layer.weight.detach().clone()):
        layer.weight = nn.Parameter(weight)
    assert torch.equal(layer.weight, weight)
