"""Fused residual blocks: what the packed model computes, bit for bit, and its own forward where they do not apply."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bnn import BinaryResNetConfig, BinaryResNetForImageClassification, kernels, optimize_, pack_, unpack_
from hf_bnn.fused import convolutions
from hf_bnn.fused.convolutions import FusedBlock, FusedStage
from hf_bnn.kernels import Conv2dBlock, library
from hf_bnn.models.resnet import CLASSIFIER, STEM

SIZE = {"embedding_size": 16, "num_labels": 5}
BASIC = {"layer_type": "basic", "hidden_sizes": [16, 40], "depths": [2, 2]}
BOTTLENECK = {"layer_type": "bottleneck", "hidden_sizes": [64, 80], "depths": [1, 2]}
VARIANTS = [
    {},
    {"stem": "cifar"},
    {"levels": "rsign", "block_activation": "rprelu"},
    {"levels": "elastic", "weight_scaling": "layer"},
    {"shortcut": "pad"},
    {"skip": [STEM, CLASSIFIER]},
    {"binarize": "weights"},
    {"binarize": "weights", "block": "bireal", "block_activation": "rprelu"},
    {"downsample_in_first_stage": True},
    {"downsample_in_bottleneck": True},
]
SHAPES = {"basic": BASIC, "bottleneck": BOTTLENECK}

needs_kernels = pytest.mark.skipif(kernels.backend() == "torch", reason="no compiled kernels")
pytestmark = needs_kernels


@torch.no_grad()
def scrambled(model: nn.Module) -> nn.Module:
    """With other parameters and statistics, so that signs are mixed and nothing is 0 or 1."""
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if values.dtype == torch.float32 and not name.endswith("width"):
            values.normal_().mul_(0.5)
        if name.endswith(("running_var", "normalization.weight", "width", "weight_scale")):
            values.abs_().add_(0.1)
    return model


def packed_model(**kwargs: Any) -> BinaryResNetForImageClassification:
    model = BinaryResNetForImageClassification(BinaryResNetConfig(**{**SIZE, **BASIC, **kwargs}))
    return scrambled(pack_(scrambled(model))).eval()


def fused(model: nn.Module) -> nn.Module:
    return optimize_(copy.deepcopy(model))


def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every convolution that runs from now on with what is around it: whether its input was bits."""
    seen, run = [], Conv2dBlock.__call__

    def spied(self: Conv2dBlock, x: Tensor | None, bits: Tensor | None = None, *args: Any, **kwargs: Any):
        if args:
            seen.append(bits is not None)
        return run(self, x, bits, *args, **kwargs)

    monkeypatch.setattr(Conv2dBlock, "__call__", spied)
    return seen


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("layer_type", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 45, 38), (2, 3, 7, 9)], ids=str)
def test_a_fused_model_equals_the_packed_one(variant: dict, layer_type: str, shape: tuple[int, ...]):
    model = packed_model(**{**SHAPES[layer_type], **variant})
    fast, x = fused(model), torch.randn(shape)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        expected, found = (m(images, output_hidden_states=True) for m in (model, fast))
        assert expected.logits.std() > 0
        assert torch.equal(found.logits, expected.logits)
        for pair in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(*pair)


@pytest.mark.parametrize("layer_type", SHAPES)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("binarize") != "weights"], ids=str)
def test_a_stage_packs_floats_once_and_then_passes_bits(
    variant: dict, layer_type: str, monkeypatch: pytest.MonkeyPatch
):
    settings = {**SHAPES[layer_type], **variant}
    model, seen = fused(packed_model(**settings)), calls(monkeypatch)
    model(torch.randn(1, 3, 32, 32))
    units = 2 if layer_type == "basic" else 3
    assert seen == [bit for depth in settings["depths"] for bit in [False] + [True] * (units * depth - 1)]


@pytest.mark.parametrize(
    ("layer_type", "hidden_sizes", "depths"),
    [
        ("basic", [64, 128, 256, 512], [2, 2, 2, 2]),
        ("basic", [64, 128, 256, 512], [3, 4, 6, 3]),
        ("bottleneck", [256, 512, 1024, 2048], [3, 4, 6, 3]),
    ],
)
@pytest.mark.slow
def test_known_networks_fused_equal_themselves_packed(layer_type: str, hidden_sizes: list[int], depths: list[int]):
    settings = {"layer_type": layer_type, "hidden_sizes": hidden_sizes, "depths": depths, "embedding_size": 64}
    model = packed_model(**settings)
    fast = fused(model)
    for shape in ((1, 3, 224, 224), (3, 3, 97, 130)):
        x = torch.randn(shape)
        assert torch.equal(fast(x).logits, model(x).logits)


@pytest.mark.parametrize("layer_type", SHAPES)
def test_results_do_not_depend_on_the_number_of_threads(layer_type: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "WORTH_THREADS", 0)
    model, x = packed_model(**SHAPES[layer_type]), torch.randn(2, 3, 64, 64)
    fast, before, pixels = fused(model), torch.get_num_threads(), model.resnet.embedder(x)
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        assert torch.equal(fast.resnet.encoder(pixels)[0], model.resnet.encoder(pixels)[0])
    torch.set_num_threads(before)


@pytest.mark.parametrize("layer_type", SHAPES)
def test_a_block_and_a_stage_leave_their_input_alone(layer_type: str):
    stage = fused(packed_model(**SHAPES[layer_type])).resnet.encoder.stages[1]
    x = torch.randn(2, stage.layers[0].layer[0].convolution.in_channels, 9, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    first = stage(x)
    kept = first.clone()
    stage.layers[1](first)
    stage(x)
    assert torch.equal(x, before)
    assert torch.equal(first, kept)


def changes() -> dict[str, Any]:
    """Changes of a model after it has run."""

    def load(model: nn.Module) -> None:
        torch.manual_seed(1)
        model.load_state_dict(scrambled(packed_model(levels="rsign")).state_dict())

    def write(model: nn.Module) -> None:
        model.resnet.encoder.stages[1].layers[0].layer[1].normalization.running_var.mul_(1.7)

    def replace(model: nn.Module) -> None:
        norm = model.resnet.encoder.stages[0].layers[1].layer[0].normalization
        norm.bias = nn.Parameter(norm.bias - 0.7)

    def exchange_data(model: nn.Module) -> None:
        norm = model.resnet.encoder.stages[1].layers[0].shortcut.normalization
        norm.weight.data = norm.weight.data * 1.3

    def move_threshold(model: nn.Module) -> None:
        model.resnet.encoder.stages[1].layers[1].layer[0].convolution.input_levels.offset.add_(0.4)

    return {f.__name__: f for f in (load, write, replace, exchange_data, move_threshold)}


@pytest.mark.parametrize("change", changes().values(), ids=changes().keys())
def test_a_change_after_the_first_run_is_seen(change: Any):
    model, x = packed_model(levels="rsign"), torch.randn(2, 3, 40, 40)
    fast = fused(model)
    before = fast(x).logits
    change(model)
    change(fast)
    assert torch.equal(fast(x).logits, model(x).logits)
    assert not torch.equal(fast(x).logits, before)


def test_what_was_made_before_is_used_again(monkeypatch: pytest.MonkeyPatch):
    made, block_of = [], convolutions.block_of
    monkeypatch.setattr(convolutions, "block_of", lambda *args: made.append(args) or block_of(*args))
    model, x = fused(packed_model()), torch.randn(1, 3, 32, 32)
    assert len(made) == 8
    model(x), model(x)
    assert len(made) == 8


def test_weights_made_under_inference_mode_run_fused(monkeypatch: pytest.MonkeyPatch):
    with torch.inference_mode():
        model = packed_model()
        fast, x = fused(model), torch.randn(1, 3, 32, 32)
        seen = calls(monkeypatch)
        assert torch.equal(fast(x).logits, model(x).logits)
    assert len(seen) == 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_as_before(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    model, x = packed_model().to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
    fast, seen = fused(model), calls(monkeypatch)
    assert torch.equal(fast(x).logits, model(x).logits)
    assert seen == []


def test_autocast_runs_as_before(monkeypatch: pytest.MonkeyPatch):
    model, x = packed_model(), torch.randn(2, 3, 32, 32)
    fast, seen = fused(model), calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x).logits, model(x).logits)
    assert seen == []


def test_gradients_and_training_run_as_before(monkeypatch: pytest.MonkeyPatch):
    model, x = packed_model(), torch.randn(2, 3, 32, 32)
    fast, seen = fused(model), calls(monkeypatch)
    gradients = []
    for m in (model, fast):
        images = x.clone().requires_grad_()
        with torch.enable_grad():
            m(images).logits.sum().backward()
        gradients.append(images.grad)
    assert torch.equal(*gradients)
    fast.train(), model.train()
    assert torch.equal(fast(x).logits, model(x).logits)
    norms = [m.resnet.encoder.stages[0].layers[0].layer[0].normalization for m in (fast, model)]
    assert torch.equal(*(norm.running_mean for norm in norms))
    fast.eval()
    norms[0].train()
    fast.resnet.encoder.stages[0].layers[0](torch.randn(2, 16, 5, 5))
    assert seen == []


def test_without_compiled_kernels_the_packed_forward_runs(monkeypatch: pytest.MonkeyPatch):
    model, x = packed_model(), torch.randn(2, 3, 32, 32)
    fast = fused(model)
    expected = fast(x).logits
    seen = calls(monkeypatch)
    with kernels.using("torch"):
        assert torch.equal(fast(x).logits, model(x).logits)
    assert seen == []
    assert torch.equal(fast(x).logits, expected)
    assert len(seen) == 8


@pytest.mark.parametrize("backend", kernels.available()[:-1])
def test_every_backend_runs_the_same_blocks(backend: str):
    model, x = packed_model(levels="rsign", block_activation="rprelu"), torch.randn(2, 3, 32, 32)
    expected = fused(model)(x).logits
    with kernels.using(backend):
        assert torch.equal(fused(model)(x).logits, expected)


def test_a_fused_model_saves_and_loads_as_the_packed_one(tmp_path: Path):
    model, x = packed_model(), torch.randn(2, 3, 32, 32)
    fast = fused(model)
    expected = fast(x).logits
    assert fast.state_dict().keys() == model.state_dict().keys()
    fast.save_pretrained(tmp_path)
    loaded = BinaryResNetForImageClassification.from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, FusedBlock | FusedStage) for module in loaded.modules())
    assert torch.equal(loaded(x).logits, expected)


def test_copies_and_pickles_make_their_own():
    model, x = fused(packed_model()), torch.randn(2, 3, 32, 32)
    expected = model(x).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.resnet.encoder))):
        assert all(m._prepared is None for m in other.modules() if isinstance(m, FusedBlock))
    assert torch.equal(copy.deepcopy(model)(x).logits, expected)


def test_an_unpacked_model_is_trainable_again():
    model, x = packed_model(), torch.randn(2, 3, 32, 32)
    fast = fused(model)
    fast(x)
    assert torch.equal(unpack_(fast)(x).logits, unpack_(model)(x).logits)


# The packed layers' own forward, which dynamo follows, has cached functions.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function")
@pytest.mark.parametrize("layer_type", SHAPES)
def test_a_fused_block_can_be_exported_and_compiled(layer_type: str):
    model = packed_model(**SHAPES[layer_type])
    fast = fused(model)
    plain, block = (m.resnet.encoder.stages[1].layers[1] for m in (model, fast))
    x = torch.randn(2, plain.layer[0].convolution.in_channels, 6, 5)
    expected = block(x)
    assert torch.equal(plain(x), expected)
    assert torch.equal(torch.export.export(block, (x,)).module()(x), expected)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)


def test_an_empty_batch_runs():
    model = packed_model()
    images = torch.randn(0, 3, 32, 32)
    assert fused(model)(images).logits.shape == model(images).logits.shape
