"""The duties of a training loop towards a method: two calls per step, optimizer groups, state, the search for a NaN."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import make_net, tiny_model
from torch import Tensor, nn

from hf_bnn import binarize_, install_method
from hf_bnn.methods import STE, Method, Part, Site, Step, Surge
from hf_bnn.nn.levels import ElasticLevels
from hf_bnn.training import (
    begin_step,
    end_backward,
    first_nonfinite_layer,
    load_method_state,
    method_state,
    method_state_names,
    parameter_roles,
    parts,
    split_groups,
    statistics,
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))


class Diary(Part):
    """Notes every moment that it is told of; has a buffer as its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.moments: list[tuple[str, nn.Module, Step]] = []

    def forward(self, x: Tensor) -> Tensor:
        return x

    def begin_step(self, layer: nn.Module, step: Step) -> None:
        self.moments.append(("begin", layer, step))
        self.count += 1

    def end_backward(self, layer: nn.Module, step: Step) -> None:
        self.moments.append(("end", layer, step))

    def statistics(self) -> dict[str, float]:
        return {"moments": float(len(self.moments))}


@dataclass(frozen=True)
class Keeping(Method):
    name: ClassVar[str] = "keeping"

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        return Diary()


# The two moments


def test_every_part_is_told_of_both_moments_with_its_layer_and_the_step():
    model = binarize_(net(), Keeping())
    step = Step(3, 10, 0.1)
    begin_step(model, step)
    end_backward(model, step)
    for layer in model:
        assert layer.input_binarizer.moments == [("begin", layer, step), ("end", layer, step)]


def test_parts_come_in_forward_order_with_their_names():
    model = binarize_(net(), Surge())
    names = [name for name, _, _ in parts(model)]
    slots = ("weight_binarizer", "input_binarizer", "around")
    assert names == [f"{index}.{slot}" for index in (0, 1) for slot in slots]


def test_statistics_are_named_after_layer_and_statistic():
    model = binarize_(nn.ModuleDict({"block": net()}), Keeping())
    begin_step(model, Step(0, 1, 0.1))
    assert statistics(model) == {"block.0/moments": 1.0, "block.1/moments": 1.0}


def test_parts_that_record_nothing_add_no_statistics():
    assert statistics(binarize_(net())) == {}


# Roles and groups


def test_every_parameter_has_the_role_of_what_it_is():
    model = install_method(tiny_model(num_hidden_layers=1, attention="binary"), Surge())
    roles = parameter_roles(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {role: [names[id(p)] for p in members] for role, members in roles._asdict().items()}
    assert len(found["latent"]) == 6
    assert all(
        name.endswith(("query.weight", "key.weight", "value.weight", "dense.weight")) for name in found["latent"]
    )
    assert all("levels" in name for name in found["levels"])
    assert len(found["levels"]) == 2 * (6 + 4)
    assert found["method"] == [f"{name.removesuffix('weight')}around.aux.0" for name in found["latent"]]
    assert "classifier.weight" in found["float"]
    assert "bert.embeddings.word_embeddings.weight" in found["float"]


def test_weights_that_stay_float_are_not_latent():
    model = binarize_(net(), binarize="activations")
    roles = parameter_roles(model)
    assert roles.latent == []
    assert roles.float == list(model.parameters())


def test_frozen_parameters_have_no_role():
    model = binarize_(net())
    model[0].requires_grad_(False)
    assert [p for members in parameter_roles(model) for p in members] == [model[1].weight, model[1].bias]


def test_groups_are_split_by_role_and_keep_their_options():
    model = binarize_(net(), Surge(), levels=lambda name: ElasticLevels())
    biases = [layer.bias for layer in model]
    others = [p for p in model.parameters() if not any(p is bias for bias in biases)]
    plain = [
        {"params": others, "lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)},
        {"params": biases, "lr": 0.02, "weight_decay": 0.3, "betas": (0.5, 0.6)},
    ]
    groups = split_groups(plain, parameter_roles(model), levels_multiplier=0.5, method_multiplier=2.0)
    summary = [(group["role"], group["lr"], group["weight_decay"], group["betas"]) for group in groups]
    assert summary == [
        ("latent", 0.01, 0.0, (0.9, 0.99)),
        ("levels", 0.005, 0.0, (0.9, 0.99)),
        ("method", 0.02, 0.0, (0.9, 0.99)),
        ("float", 0.02, 0.3, (0.5, 0.6)),
    ]
    assert [len(group["params"]) for group in groups] == [2, 4, 2, 2]
    torch.optim.AdamW(groups)


def test_splitting_groups_loses_and_doubles_no_parameter():
    model = install_method(tiny_model(), Surge(aux="lowrank", rank=4))
    groups = split_groups([{"params": list(model.parameters()), "lr": 0.1}], parameter_roles(model))
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


# State


def test_the_methods_state_has_the_names_of_the_state_dict():
    model = binarize_(net(), Surge())
    assert method_state_names(model) == ["0.around.aux.0", "1.around.aux.0"]
    whole = model.state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in method_state(model).items())


def test_buffers_are_part_of_the_methods_state():
    model = binarize_(net(), Keeping())
    begin_step(model, Step(0, 1, 0.1))
    resumed = binarize_(net(), Keeping())
    load_method_state(resumed, method_state(model))
    assert resumed[1].input_binarizer.count.item() == 1


def test_the_state_of_another_method_is_refused_with_the_first_key_that_does_not_fit():
    surge, plain = binarize_(net(), Surge()), binarize_(net())
    with pytest.raises(ValueError, match=r"'0.around.aux.0' is unknown to this run's method; resume with the same"):
        load_method_state(plain, method_state(surge))
    with pytest.raises(ValueError, match=r"'0.around.aux.0' is not in the file; resume with the same --method"):
        load_method_state(surge, method_state(plain))


def test_state_of_another_shape_is_refused_and_not_broadcast():
    narrow, wide = (binarize_(net(), Surge(aux="lowrank", rank=rank)) for rank in (1, 3))
    with pytest.raises(ValueError, match=r"'0.around.aux.0' has shape \(8, 1\) in the file, \(8, 3\) in this run"):
        load_method_state(wide, method_state(narrow))


# The search for a NaN


class Poison(nn.Module):
    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        return {"out": [x, x * float("nan")]}


class Take(nn.Module):
    def forward(self, x: dict[str, list[Tensor]]) -> Tensor:
        return x["out"][1]


def test_the_first_layer_to_put_out_a_nan_is_named():
    model = nn.Sequential(nn.Linear(4, 4), Poison(), Take(), nn.Linear(4, 4))
    assert first_nonfinite_layer(model, lambda: model(torch.randn(2, 4))) == "1"


def test_an_infinite_weight_is_found_in_its_layer():
    model = make_net("bert", STE()).model
    batch = make_net("bert", STE()).batch
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias[0] = float("inf")
    name = first_nonfinite_layer(model, lambda: model(**batch))
    assert name.startswith("bert.encoder.layer.0.output.dense")


def test_a_sound_model_has_no_such_layer_and_integers_are_no_matter():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    assert first_nonfinite_layer(model, lambda: model(torch.tensor([1, 2]))) is None


def test_the_search_takes_its_hooks_away_and_builds_no_graph():
    model = nn.Sequential(nn.Linear(4, 4))
    seen = []
    first_nonfinite_layer(model, lambda: seen.append(model(torch.randn(2, 4))))
    assert not seen[0].requires_grad
    assert not model[0]._forward_hooks
