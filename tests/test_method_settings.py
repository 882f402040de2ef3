"""The settings of methods: what they are if nothing is said, and where their ranges end."""

import math
from typing import Any

import pytest

from hf_bnn.methods import METHODS, STE, Fsg, IRNet, MetaQuant, Method, ReSTE, Step, Stompp, Surge, method_from_dict

# As published here and in results: a run that names a method alone must stay the run that it was.
FSG = {"length": 5, "beta": 0.9, "binarizer": "bwn_channel", "slow": "mamba", "chunk": 16, "d_model": 8, "d_state": 4}
FSG |= {"d_conv": 4, "expand": 2, "fast_hidden": 16, "slow_lr": 1e-3, "fast_lr": 1e-2, "update_norm": "ste"}
FSG |= {"init": "ste", "history_dtype": "float32", "seed": 0}
DEFAULTS = {
    "ste": {"clip": 1.0},
    "ir_net": {"t_min": 0.1, "t_max": 10.0, "libra": True},
    "reste": {"o_end": 3.0, "threshold": 1.5, "interval": 0.1},
    "stompp": {
        "order": "forward",
        "schedule": "cubic",
        "end": 0.9,
        "unit": "group",
        "on": "both",
        "ste": True,
        "seed": 0,
    }
    | {"refresh": 100, "zero_momentum": False},
    "surge": {"clip": 1.0, "eta": 0.1, "aux": "own", "rank": 32},
    "fsg": FSG,
    "metaquant": {**FSG, "length": 1, "beta": 0.0, "binarizer": "dorefa"},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_setting_that_is_not_named_has_its_published_value(name: str):
    found = METHODS[name]().to_dict()
    assert {key: found[key] for key in DEFAULTS[name]} == DEFAULTS[name]


COUNTS = ("length", "chunk", "d_model", "d_state", "d_conv", "expand", "fast_hidden")
EDGES = [
    *((Fsg, {name: 1}) for name in COUNTS),
    *((Fsg, {"beta": beta}) for beta in (0.0, 1.0)),
    *((Fsg, {name: 0.0}) for name in ("slow_lr", "fast_lr")),
    *((IRNet, {"t_min": t, "t_max": t}) for t in (1e-9, 2.0)),
    (ReSTE, {"o_end": 1.0}),
    (ReSTE, {"threshold": 0.2, "interval": 0.2}),
    (Stompp, {"end": 1.0}),
    (Stompp, {"end": 1e-9}),
    (Stompp, {"refresh": 0}),
    (Surge, {"eta": 0.0}),
    (Surge, {"rank": 1}),
    (STE, {"clip": 1e-9}),
]
BEYOND = [
    *((Fsg, {name: 0}, "expected an integer >= 1") for name in COUNTS),
    *((Fsg, {"beta": beta}, "expected a number from 0") for beta in (-1e-9, 1 + 1e-9, math.nan)),
    *((Fsg, {name: rate}, "expected a number >= 0") for name in ("slow_lr", "fast_lr") for rate in (-1e-9, math.nan)),
    (Fsg, {"seed": -1}, "expected an integer >= 0"),
    (MetaQuant, {"beta": 1e-9}, "MetaQuant has no slow net"),
    (IRNet, {"t_min": 0.0}, "expected a number > 0"),
    (IRNet, {"t_min": 2.0, "t_max": 2 - 1e-9}, "expected a number >= t_min=2.0"),
    (ReSTE, {"o_end": 1 - 1e-9}, "expected a number >= 1"),
    (ReSTE, {"interval": 0.0}, "expected a number > 0"),
    (ReSTE, {"threshold": 0.2 - 1e-9, "interval": 0.2}, "expected a number >= interval=0.2"),
    (Stompp, {"end": 0.0}, "expected a number in"),
    (Stompp, {"end": 1 + 1e-9}, "expected a number in"),
    (Stompp, {"refresh": -1}, "expected an integer >= 0"),
    (Surge, {"eta": -1e-9}, "expected a number >= 0"),
    (Surge, {"rank": 0}, "expected an integer >= 1"),
    (STE, {"clip": 0.0}, "expected a number > 0"),
]


@pytest.mark.parametrize(("cls", "settings"), EDGES, ids=str)
def test_the_last_value_of_a_range_is_part_of_it(cls: type[Method], settings: dict[str, Any]):
    found = cls(**settings).to_dict()
    assert {key: found[key] for key in settings} == settings


@pytest.mark.parametrize(("cls", "settings", "message"), BEYOND, ids=str)
def test_the_first_value_beyond_a_range_is_refused_by_its_name(
    cls: type[Method], settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=f"({'|'.join(settings)})=.*: {message}"):
        cls(**settings)


@pytest.mark.parametrize("clip", [0.5, 1 + 1e-9])
@pytest.mark.parametrize("cls", [IRNet, ReSTE])
def test_a_saved_clip_bound_is_refused_where_the_method_has_none(cls: type[Method], clip: float):
    with pytest.raises(ValueError, match=r"clip=.*: expected 1, because the method has no clip bound; known arguments"):
        method_from_dict({"name": cls.name, "clip": clip})


def test_nothing_is_logged_in_a_step_unless_it_is_said():
    assert Step(3, 10, 0.1).log is False
    assert Step(3, 10, 0.1, True).log is True
