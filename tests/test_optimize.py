"""Optimized models compute what the packed ones do, and are saved as these."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    SIZE,
    VIT_SIZE,
    TinyMLP,
    different,
    scramble,
    tiny_batch,
    tiny_config,
    tiny_images,
    tiny_model,
    tiny_resnet,
    tiny_vit,
)
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.models.bert.modeling_bert import BertLayer

import hf_bnn
from hf_bnn import (
    BinaryBertForMaskedLM,
    BinaryBertForSequenceClassification,
    BinaryBertModel,
    BinaryConfig,
    BinaryViTModel,
    binarize_,
    kernels,
    optimize_,
    pack_,
    unpack_,
)
from hf_bnn.fused import blocks, convolutions, layers
from hf_bnn.fused.base import Fused, Planned
from hf_bnn.fused.feed_forward import hidden_interval
from hf_bnn.fused.layers import JointLinear, KernelConv2d, KernelLinear
from hf_bnn.models.vit import BinaryViTConfig
from hf_bnn.nn.levels import ElasticLevels, UnsignedLevels
from hf_bnn.nn.packed import PackedConv2d, PackedLinear


def packed(model: nn.Module) -> nn.Module:
    """The packed form of a model whose levels and scales are no longer those that it was made with."""
    torch.manual_seed(0)
    return pack_(scramble(model))


def text(model: nn.Module) -> Tensor:
    batch = tiny_batch(rows=3, tokens=7)
    del batch["labels"]
    return first(model(**batch))


def images(model: nn.Module) -> Tensor:
    return first(model(tiny_images(rows=3)["pixel_values"]))


def first(output) -> Tensor:
    """Logits, or the last hidden states."""
    return output[0]


BERTS = {
    "bert": lambda: tiny_model(),
    "bert-signed": lambda: tiny_model(levels="signed", ffn_levels="unsigned"),
    "bert-binary-attention": lambda: tiny_model(attention="binary"),
    "bert-boolean-attention": lambda: tiny_model(attention="boolean"),
    "bert-binary-embeddings": lambda: BinaryBertModel(tiny_config(embeddings="binary")),
    "bert-masked-lm": lambda: BinaryBertForMaskedLM(tiny_config()),
    "bert-relu": lambda: tiny_model(hidden_act="relu"),
    "bert-silu": lambda: tiny_model(hidden_act="silu"),
    "bert-odd-sizes": lambda: tiny_model(hidden_size=28, intermediate_size=36),
    "bert-chunks": lambda: tiny_model(chunk_size_feed_forward=7),
    "bert-causal": lambda: tiny_model(is_decoder=True),
    "bert-layer-scale": lambda: tiny_model(weight_scaling="layer"),
}
VITS = {
    "vit": lambda: tiny_vit(),
    "vit-binary-attention": lambda: tiny_vit(attention="binary", ffn_levels="unsigned"),
    "vit-boolean-attention": lambda: tiny_vit(attention="boolean"),
    "vit-without-bias": lambda: BinaryViTModel(BinaryViTConfig(**VIT_SIZE, qkv_bias=False)),
}
RESNETS = {
    "resnet": lambda: tiny_resnet(),
    "resnet-rsign": lambda: tiny_resnet(levels="rsign", block_activation="rprelu"),
    "resnet-elastic": lambda: tiny_resnet(levels="elastic", shortcut="pad"),
    "resnet-bottleneck": lambda: tiny_resnet(layer_type="bottleneck", hidden_sizes=[32, 64]),
}


def plugged_in(model: nn.Module, **settings) -> nn.Module:
    return BinaryConfig(**settings).apply_(model)


PLUGGED_IN = {
    "roberta": lambda: plugged_in(RobertaForSequenceClassification(RobertaConfig(**SIZE))),
    "distilbert": lambda: plugged_in(
        DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=32)
        )
    ),
}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    **{name: (make, text) for name, make in {**BERTS, **PLUGGED_IN}.items()},
    **{name: (make, images) for name, make in {**VITS, **RESNETS}.items()},
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    make, run = CASES[request.param]
    return packed(make()), run


@pytest.fixture(params=kernels.available())
def backend(request):
    with kernels.using(request.param):
        yield request.param


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_computes_what_the_packed_model_does(case, mode):
    model, run = case
    if mode is torch.enable_grad:
        model.requires_grad_(False)
    with mode():
        expected = run(model)
        assert torch.equal(run(optimize_(model)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["bert", "bert-binary-attention", "bert-boolean-attention", "resnet"])
@torch.no_grad()
def test_it_does_not_depend_on_torchs_default_dtype(name, dtype):
    make, run = CASES[name]
    model = packed(make())
    given = tiny_images(rows=3)["pixel_values"] if run is images else tiny_batch()["input_ids"]
    expected = first(model(given))
    torch.set_default_dtype(dtype)
    try:
        found = first(optimize_(model)(given))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["bert-binary-attention", "vit", "resnet", "resnet-rsign"])
@torch.no_grad()
def test_it_does_so_on_every_backend(name, backend):
    make, run = CASES[name]
    model = packed(make())
    expected = run(model)
    assert torch.equal(run(optimize_(model)), expected)


def test_a_model_optimized_for_one_backend_runs_on_another(case):
    model, run = case
    with torch.no_grad():
        expected = run(model)
        optimize_(model)
        with kernels.using("torch"):
            assert torch.equal(run(model), expected)
            assert torch.equal(run(optimize_(packed_again(model))), expected)
        assert torch.equal(run(model), expected)


def packed_again(model: nn.Module) -> nn.Module:
    """A copy on packed layers."""
    return hf_bnn.fused.restore_(copy.deepcopy(model))


def test_its_state_dict_is_that_of_the_packed_model(case):
    model, _ = case
    before = copy.deepcopy(model).state_dict()
    optimize_(model)
    assert not different(before, model.state_dict())
    assert list(model.state_dict())
    assert not any("weight" in m._buffers for m in model.modules() if isinstance(m, KernelLinear | KernelConv2d))


def test_twice_is_once(case):
    model, _run = case
    classes = [type(m) for m in optimize_(model).modules()]
    assert [type(m) for m in optimize_(model).modules()] == classes
    assert {KernelLinear, KernelConv2d} & set(classes)


def test_unpacking_undoes_it(case):
    model, run = case
    with torch.no_grad():
        expected = run(model)
    plain = copy.deepcopy(model)
    optimize_(model)
    hf_bnn.fused.restore_(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not different(plain.state_dict(), model.state_dict())
    optimize_(model)
    assert all(len(m._load_state_dict_post_hooks) <= 1 for m in model.modules())
    unpack_(model).eval()
    assert not any(isinstance(m, Fused) for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(run(model), expected)
    run(model).sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_which_parts_are_fused():
    names = {type(m).__name__ for m in optimize_(packed(tiny_model())).modules()}
    assert {"FusedBertLayer", "FusedBertSelfAttention", "JointLinear", "KernelLinear"} <= names
    assert not {"PackedLinear", "BertLayer", "BertSelfAttention"} & names
    names = {type(m).__name__ for m in optimize_(packed(tiny_vit())).modules()}
    assert {"FusedViTMLP", "FusedViTAttention"} <= names
    names = {type(m).__name__ for m in optimize_(packed(tiny_vit(attention="binary"))).modules()}
    assert "FusedBinaryAttention" in names
    odd = optimize_(packed(tiny_model(hidden_size=28, intermediate_size=36)))
    assert not any(isinstance(m, JointLinear) for m in odd.modules())


def test_queries_keys_and_values_have_thresholds_of_their_own():
    model = packed(tiny_model())
    attention = model.bert.encoder.layer[0].attention.self
    thresholds = {layer.input_levels.threshold().item() for layer in (attention.query, attention.key, attention.value)}
    assert len(thresholds) == 3  # so that the equality above is one of three different sets of bits


def test_joint_weights_are_held_once():
    attention = optimize_(packed(tiny_model())).bert.encoder.layer[0].attention.self
    joint = attention.joint.weight.untyped_storage().data_ptr()
    for layer in (attention.query, attention.key, attention.value):
        assert layer.kernel_weight.untyped_storage().data_ptr() == joint


# what is held


def resident_bytes(model: nn.Module) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def test_an_encoder_layer_of_bert_base_is_held_in_a_28th_of_float(backend):
    config = tiny_config(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=1)
    encoder = BinaryBertModel(config).encoder
    floats = 4 * sum(p.numel() for name, p in encoder.named_parameters() if "levels" not in name)
    # Without kernels weights are int8 signs, as torch's product takes them.
    assert floats / resident_bytes(optimize_(pack_(encoder))) >= (3.9 if backend == "torch" else 28)


def test_nothing_is_kept_from_a_call():
    model = optimize_(packed(tiny_model()))
    before = resident_bytes(model)
    with torch.no_grad():
        text(model)
    assert resident_bytes(model) == before
    assert all(m._prepared is None for m in model.modules() if isinstance(m, KernelLinear))


# files


def test_it_is_saved_as_the_packed_model(case, tmp_path):
    model, run = case
    model.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = run(model)
    optimize_(model).save_pretrained(tmp_path / "optimized")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "optimized")]
    assert files[0] == files[1]
    again = type(model).from_pretrained(tmp_path / "optimized").eval()
    assert not any(isinstance(m, Fused) for m in again.modules())
    with torch.no_grad():
        assert torch.equal(run(again), expected)


@pytest.mark.parametrize("auto", [False, True])
def test_from_pretrained_optimizes(tmp_path, auto):
    model = packed(tiny_model())
    model.save_pretrained(tmp_path)
    cls = AutoModelForSequenceClassification if auto else BinaryBertForSequenceClassification
    again = cls.from_pretrained(tmp_path, optimize=True)
    assert any(isinstance(m, JointLinear) for m in again.modules())
    with torch.no_grad():
        assert torch.equal(text(again), text(model))


def test_from_pretrained_gives_the_loading_info_too(tmp_path):
    packed(tiny_model()).save_pretrained(tmp_path)
    again, info = BinaryBertForSequenceClassification.from_pretrained(tmp_path, optimize=True, output_loading_info=True)
    assert any(isinstance(m, JointLinear) for m in again.modules())
    assert not info["missing_keys"]


def test_from_pretrained_refuses_to_optimize_latent_weights(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"optimize=True, but .* holds latent weights"):
        BinaryBertForSequenceClassification.from_pretrained(tmp_path, optimize=True)


def test_there_must_be_something_to_optimize():
    with pytest.raises(ValueError, match=r"nothing to optimize: .*pack_"):
        optimize_(tiny_model())


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_can_be_loaded(case, assign):
    model, run = case
    other = pack_(scramble(unpack_(copy.deepcopy(model))))
    with torch.no_grad():
        expected = run(other)
        assert not torch.equal(expected, run(model))
        optimize_(model).load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(run(model), expected)
    assert not different(other.state_dict(), model.state_dict())


def test_a_state_dict_of_another_size_is_refused():
    model = optimize_(packed(tiny_model()))
    state = {**model.state_dict(), "bert.encoder.layer.0.output.dense.weight": torch.zeros(3, 1, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match=r"size mismatch for bert.encoder.layer.0.output.dense.weight"):
        model.load_state_dict(state)
    del state["bert.encoder.layer.0.output.dense.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*bert.encoder.layer.0.output.dense.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_are_independent(case, duplicate):
    model, run = case
    expected = run(optimize_(model))
    other = duplicate(model)
    assert torch.equal(run(other), expected)
    for m in other.modules():
        if isinstance(m, KernelLinear | KernelConv2d):
            m.kernel_scale.zero_()
    run(other)
    assert torch.equal(run(model), expected)


@torch.no_grad()
def test_another_dtype():
    model = packed(tiny_model(attention="binary", embeddings="float"))
    plain = copy.deepcopy(model).to(torch.bfloat16)
    optimized = optimize_(model).to(torch.bfloat16)
    assert text(optimized).dtype == torch.bfloat16
    torch.testing.assert_close(text(optimized), text(plain), atol=0.1, rtol=0.1)


# training, adapters, other callers


def test_gradients_of_inputs_are_those_of_the_packed_model():
    model = packed(binarize_(TinyMLP(), skip=("0", "4")))
    grads = []
    for candidate in (model, optimize_(copy.deepcopy(model))):
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
        candidate(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_an_adapter_learns_on_top_of_it():
    model = optimize_(packed(tiny_model()))
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["query", "value", "dense"], r=2, init_lora_weights=False)
    )
    adapted(**tiny_batch()).loss.backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if "lora" in name}
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    plain = get_peft_model(packed(tiny_model()), LoraConfig(target_modules=["query", "value", "dense"], r=2))
    plain.load_state_dict(adapted.state_dict())
    adapted.to(torch.float64).to(torch.float32)  # other tensors, which plans must follow
    adapted.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(text(adapted), text(plain))


def test_a_decoder_generates_the_same_text():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, pad_token_id=0
    )
    torch.manual_seed(0)
    model = pack_(plugged_in(LlamaForCausalLM(config)))
    prompt = {"input_ids": torch.arange(1, 6).view(1, -1), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(optimize_(model).generate(**prompt, max_new_tokens=8, do_sample=False), expected)
    assert any(isinstance(m, KernelLinear) for m in model.modules())


@torch.no_grad()
def test_a_causal_bert_goes_on_from_its_cache():
    model = packed(BinaryBertModel(tiny_config(is_decoder=True)))
    ids = tiny_batch(rows=2, tokens=6)["input_ids"]

    def two_steps(model: nn.Module) -> Tensor:
        cache = model(ids[:, :5], use_cache=True).past_key_values
        return model(ids[:, 5:], past_key_values=cache, use_cache=True).last_hidden_state

    assert torch.equal(two_steps(optimize_(copy.deepcopy(model))), two_steps(model))


@pytest.mark.parametrize("name", ["bert", "bert-binary-attention", "vit", "resnet"])
@torch.no_grad()
def test_attentions_and_hidden_states_are_given_to_those_who_ask(name):
    make, _ = CASES[name]
    model = packed(make())
    batch = {k: v for k, v in (tiny_images() if name in ("vit", "resnet") else tiny_batch()).items() if k != "labels"}
    asked = (
        {"output_hidden_states": True}
        if name == "resnet"
        else {"output_hidden_states": True, "output_attentions": True}
    )
    if name != "resnet" and "binary" not in name:
        model.set_attn_implementation("eager")
    expected = model(**batch, **asked)
    found = optimize_(model)(**batch, **asked)
    for key in expected:
        values = expected[key] if isinstance(expected[key], tuple) else (expected[key],)
        others = found[key] if isinstance(found[key], tuple) else (found[key],)
        assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True)), key


# compiled and exported


@pytest.mark.parametrize("name", ["bert", "bert-binary-attention", "vit", "resnet"])
@torch.no_grad()
def test_torch_compile_leaves_no_gap(name):
    make, run = CASES[name]
    model = optimize_(packed(make()))
    expected = run(model)
    ops = []

    def look(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        ops.extend(str(node.target) for node in graph.graph.nodes if "hf_bnn" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=look)
    assert torch.equal(run(compiled), expected)
    assert ops


@pytest.mark.parametrize("name", ["bert", "bert-binary-attention", "vit", "resnet"])
@torch.no_grad()
def test_torch_export(name):
    make, run = CASES[name]
    model = optimize_(packed(make()))
    expected = run(model)
    batch = tiny_images(rows=3) if run is images else tiny_batch(rows=3, tokens=7)
    kwargs = {key: value for key, value in batch.items() if key != "labels"}
    program = torch.export.export(model, (), kwargs)
    assert any("hf_bnn" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(first(program.module()(**kwargs)), expected)


# layers


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_weights_only_layers_sum_in_another_order(bias, backend):
    torch.manual_seed(0)
    for size, out, rows in ((64, 32, 1), (100, 20, 5), (7, 3, 2), (768, 64, 40)):
        layer = pack_(binarize_(nn.Sequential(nn.Linear(size, out, bias=bias)), binarize="weights"))
        x = torch.randn(rows, size)
        expected = layer(x)
        found = optimize_(layer)(x)
        bound = 4 * torch.finfo(torch.float32).eps * size**0.5 * x.norm(dim=-1, keepdim=True)
        assert ((found - expected).abs() <= bound * layer[0].weight_scale + 1e-6).all()


def test_grouped_convolutions_without_a_kernel_stay_as_they_are():
    depthwise = pack_(binarize_(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Linear(4, 4))))
    optimize_(depthwise)
    assert type(depthwise[0]) is PackedConv2d
    assert type(depthwise[1]) is KernelLinear


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,), (2, 3, 12)])
@torch.no_grad()
def test_any_number_of_dimensions(shape):
    layer = pack_(binarize_(nn.Sequential(nn.Linear(12, 5))))
    x = torch.randn(shape)
    assert torch.equal(optimize_(copy.deepcopy(layer))(x), layer(x))


def test_wrong_inputs_are_named():
    layer = optimize_(pack_(binarize_(nn.Sequential(nn.Linear(12, 5)))))
    with torch.no_grad(), pytest.raises(ValueError, match=r"inputs of shape \(2, 11\): expected 12 numbers"):
        layer(torch.randn(2, 11))
    with torch.no_grad(), pytest.raises(TypeError, match=r"a packed layer was given torch.int64 inputs"):
        layer(torch.ones(2, 12, dtype=torch.long))


ACTIVATIONS = {
    "gelu": nn.GELU(),
    "tanh-gelu": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "identity": nn.Identity(),
}


class Wave(nn.Module):
    """An activation that takes each value many times."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(20 * x)


def two_layers(levels) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(40, 48), nn.Identity(), nn.Linear(48, 8))
    binarize_(layers, levels=lambda name: levels if name == "2" else ElasticLevels())
    return pack_(layers)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("threshold", [0.5, 0.02, 0.0, -0.02, -0.1, -0.5, 30.0])
@torch.no_grad()
def test_an_interval_says_which_hidden_values_are_low(activation, threshold):
    levels = ElasticLevels(signed=False)
    levels.width.fill_(0.2)
    levels.offset.fill_(threshold - 0.1)
    net = two_layers(levels)
    optimize_(net)
    function, limit = ACTIVATIONS[activation], levels.threshold()
    low, high = hidden_interval(net[0], function, net[2])
    hidden = net[0](torch.randn(200, 40))
    assert torch.equal((low <= hidden) & (hidden < high), function(hidden) < limit)


@torch.no_grad()
def test_there_is_no_interval_for_an_activation_that_goes_up_and_down():
    net = optimize_(two_layers(UnsignedLevels()))
    assert hidden_interval(net[0], Wave(), net[2]) is None
    assert hidden_interval(net[0], nn.Identity(), nn.Linear(48, 8)) is None
    net[0].kernel_scale[3] = float("nan")
    assert hidden_interval(net[0], nn.GELU(), net[2]) is None


@torch.no_grad()
def test_a_block_without_an_interval_runs_its_layers_one_by_one():
    model = packed(tiny_model())
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = Wave()
    expected = text(model)
    assert type(optimize_(model).bert.encoder.layer[0]) is BertLayer
    assert torch.equal(text(model), expected)


def test_kernel_layers_are_packed_ones():
    model = optimize_(packed(tiny_model()))
    layers = [m for m in model.modules() if isinstance(m, KernelLinear)]
    assert layers
    assert all(isinstance(layer, PackedLinear) for layer in layers)
    assert hf_bnn.summary(model) == hf_bnn.summary(hf_bnn.fused.restore_(copy.deepcopy(model)))


@pytest.mark.parametrize(
    ("base", "method", "arguments", "said"),
    [
        (Planned, "plan", (), "must say what it calls"),
        (layers._KernelLayer, "keep", (), "must say what its kernel takes"),
        (layers._KernelLayer, "kernel_signs", (), "must say how its weight is laid out"),
        (convolutions.Watched, "prepare", (), "must say what it runs"),
        (convolutions.FusedBlock, "run", (None, None, None), "must say how it runs"),
        (convolutions.FusedBlock, "first_level", (None,), "must say what its first convolution is"),
        (convolutions.FusedBottleNeckBlock, "resized", (None, None), "must say how a shortcut is resized"),
        (blocks.FusedProjections, "projections", (), "must say which layers it joins"),
        (blocks.FusedFeedForward, "layers", (), "must say which layers it joins"),
    ],
)
def test_bases_name_what_a_fused_class_must_have(base: type, method: str, arguments: tuple, said: str):
    with pytest.raises(NotImplementedError, match=said):
        getattr(base(), method)(*arguments)
