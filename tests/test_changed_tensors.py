"""Packed and optimized models see whatever is written to their tensors, also what torch's version counters miss."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import scramble, tiny_batch, tiny_images, tiny_model, tiny_resnet, tiny_vit
from torch import Tensor, nn

from hf_bnn import binarize_, kernels, optimize_, pack_
from hf_bnn.fused import restore_
from hf_bnn.kernels import sources
from hf_bnn.kernels.library import Library
from hf_bnn.kernels.sources import Sources, tensors_of
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels

LEVELS = {"signed": SignedLevels, "unsigned": UnsignedLevels, "elastic": ElasticLevels}


def in_place(tensor: Tensor) -> None:
    tensor.mul_(2)


def through_data(tensor: Tensor) -> None:
    tensor.data.mul_(2)


def through_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[...] *= 2


def other_data(tensor: Tensor) -> None:
    tensor.data = tensor.data * 2


WRITES = [in_place, through_data, through_numpy, other_data]


def layer_of(kind: str, levels: str, optimized: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = nn.Linear(40, 16), torch.randn(5, 40)
    else:
        layer, x = nn.Conv2d(40, 16, 3), torch.randn(2, 40, 5, 5)
    model = pack_(scramble(binarize_(nn.Sequential(layer), levels=lambda _: LEVELS[levels]())))
    return (optimize_(model) if optimized else model), x


def read_again(model: nn.Module) -> nn.Module:
    """A packed model of the same state dict."""
    plain = restore_(copy.deepcopy(model))
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("optimized", [False, True], ids=["packed", "optimized"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_a_layer_sees_every_write(write: Callable, kind: str, levels: str, optimized: bool):
    model, x = layer_of(kind, levels, optimized)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if "kernel_" in name:
            continue  # made of the others, and in no state dict
        before = model(x)
        if tensor.dtype == torch.uint8:
            tensor.data.bitwise_not_() if write is not through_numpy else tensor.numpy().__ixor__(255)
        else:
            write(tensor.fill_(0.5) if tensor.numel() == 1 else tensor)
        found = model(x)
        assert torch.equal(found, read_again(model)(x)), name
        assert not torch.equal(found, before), name


@torch.no_grad()
def test_a_single_bit_and_an_exchange_of_rows_are_seen():
    model, x = layer_of("linear", "signed", False)
    for write in (lambda w: w.__setitem__((3, 1), w[3, 1] ^ 16), lambda w: w.copy_(w.flip(0))):
        model(x)
        write(model[0].weight.data)
        assert torch.equal(model(x), read_again(model)(x))


@pytest.mark.parametrize("optimized", [False, True], ids=["packed", "optimized"])
@torch.no_grad()
def test_tensors_and_levels_that_take_the_place_of_others_are_seen(optimized: bool):
    model, x = layer_of("linear", "elastic", optimized)
    layer = model[0]
    for change in (
        lambda: setattr(layer, "bias", nn.Parameter(torch.randn(16))),
        lambda: setattr(layer, "bias", None),
        lambda: setattr(layer, "weight_scale", torch.rand(16)),
        lambda: setattr(layer, "input_levels", ElasticLevels(signed=False)),
        lambda: setattr(layer, "input_levels", SignedLevels()),
    ):
        before = model(x)
        change()
        assert torch.equal(model(x), restore_(copy.deepcopy(model))(x))
        assert not torch.equal(model(x), before)


def run(model: nn.Module) -> Tensor:
    batch = tiny_images(rows=2) if hasattr(model.config, "num_channels") else tiny_batch(rows=2)
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


ONE = {"num_hidden_layers": 1}
MODELS = {
    "bert": lambda: tiny_model(**ONE),
    "bert-binary": lambda: tiny_model(attention="binary", **ONE),
    "bert-boolean": lambda: tiny_model(attention="boolean", **ONE),
    "vit": lambda: tiny_vit(**ONE),
    "resnet-rsign": lambda: tiny_resnet(levels="rsign", block_activation="rprelu"),
    "resnet-elastic": lambda: tiny_resnet(levels="elastic"),
    "bottleneck": lambda: tiny_resnet(layer_type="bottleneck", hidden_sizes=[32, 64]),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_optimized_model_sees_a_write_to_any_of_its_tensors(name: str):
    plain = pack_(scramble(MODELS[name]()))
    model = optimize_(copy.deepcopy(plain))
    before, changed = run(model), 0
    others = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, tensor in {**dict(plain.named_parameters()), **dict(plain.named_buffers())}.items():
        if tensor.is_floating_point():
            for written in (tensor, others[key]):
                written.data.mul_(1.5).add_(0.05)
            found = run(model)
            assert torch.equal(found, run(plain)), key
            before, changed = found, changed + (not torch.equal(found, before))
    assert changed > 10


@pytest.mark.parametrize("name", ["bert", "resnet-rsign"])
def test_a_trained_optimized_model_computes_what_its_file_does(name: str, tmp_path):
    model = optimize_(pack_(scramble(MODELS[name]())))
    with torch.no_grad():
        run(model)
    batch = tiny_images() if "resnet" in name else tiny_batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(run(model), run(type(model).from_pretrained(tmp_path).eval()))


@torch.no_grad()
def test_nothing_is_made_anew_while_nothing_changes(monkeypatch: pytest.MonkeyPatch):
    models = [optimize_(pack_(make())) for make in (MODELS["bert-binary"], MODELS["resnet-rsign"])]
    models.append(pack_(MODELS["vit"]()))
    for model in models:
        run(model)

    def made(self, *_):
        raise AssertionError("something was made anew")

    monkeypatch.setattr(Sources, "__init__", made)
    for model in models:
        run(model), run(model.eval())


@torch.no_grad()
def test_a_digest_without_compiled_kernels_tells_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "library", lambda: Library(None))
    module = nn.Linear(5, 3)
    found = Sources(tensors_of(module))
    assert found.same()
    module.weight.data[2, 4] += 1e-6
    assert not found.same()


@torch.no_grad()
def test_tensors_with_gaps_and_empty_ones_are_read_to_their_end():
    module = nn.Module()
    module.register_buffer("view", torch.zeros(6, 8)[:, ::2].t())
    module.register_buffer("empty", torch.zeros(0, 4))
    module.register_buffer("number", torch.zeros((), dtype=torch.bfloat16))
    found = Sources(tensors_of(module))
    assert found.same()
    module.view.data[3, 5] = 1
    assert not found.same()
    found = Sources(tensors_of(module))
    module.number.data.fill_(1)
    assert not found.same()


@torch.no_grad()
def test_a_backend_of_its_own_has_its_own_layout():
    model, x = layer_of("linear", "elastic", False)
    expected = model(x)
    for backend in kernels.available():
        with kernels.using(backend):
            assert torch.equal(model(x), expected)


# Tensors that nobody has


@torch.no_grad()
def test_nothing_is_read_while_nobody_can_have_written(monkeypatch: pytest.MonkeyPatch):
    model, network = (optimize_(pack_(MODELS[name]())) for name in ("bert-binary", "resnet-rsign"))
    stage, x = network.resnet.encoder.stages[0], torch.randn(2, 8, 8, 8)  # the stem of so small a network runs in torch
    models = [model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float64).to(torch.float32)]
    for each in models:
        run(each), stage(x)
    monkeypatch.setattr(Sources, "same_tensors", lambda self: pytest.fail("tensors were read"))
    for each in models:
        run(each), stage(x)


@pytest.mark.parametrize("held", ["parameter", "list", "optimizer", "module"])
@torch.no_grad()
def test_whoever_had_a_parameter_before_can_still_write_to_it(held: str):
    model, x = layer_of("linear", "unsigned", False)
    holder = {
        "parameter": lambda: model[0].bias,
        "list": lambda: [*model.parameters()],
        "optimizer": lambda: torch.optim.SGD(model.parameters(), 0.1),
        "module": lambda: nn.ParameterList(model.parameters()),
    }[held]()
    before = optimize_(model)(x)
    bias = holder.param_groups[0]["params"][0] if held == "optimizer" else holder if held == "parameter" else holder[0]
    bias.data.add_(1)
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), read_again(model)(x))


@torch.no_grad()
def test_numbers_that_were_handed_out_before_are_no_longer_the_models():
    model, x = layer_of("linear", "unsigned", False)
    numbers = model[0].bias.detach().numpy()
    expected = optimize_(model)(x)
    numbers += 1
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), read_again(model)(x))


@pytest.mark.parametrize("take", ["attribute", "parameters", "state_dict", "dict", "buffers"])
@torch.no_grad()
def test_every_way_to_get_at_a_tensor_counts(take: str):
    model, x = layer_of("linear", "elastic", True)
    before = model(x)
    tensor = {
        "attribute": lambda: model[0].input_levels.width,
        "parameters": lambda: next(p for n, p in model.named_parameters() if n.endswith("width")),
        "state_dict": lambda: model.state_dict()["0.input_levels.width"],
        "dict": lambda: model[0].input_levels._parameters["width"],
        "buffers": lambda: next(b for n, b in model.named_buffers() if n.endswith("weight_scale")),
    }[take]()
    assert torch.equal(model(x), before)
    tensor.data.mul_(2)
    found = model(x)
    assert not torch.equal(found, before)
    assert torch.equal(found, read_again(model)(x))
