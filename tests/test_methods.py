"""The table of methods, how a method is read from text, and the two methods that have no file of their own."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from hf_bnn import binarize_
from hf_bnn.methods import METHODS, STE, ApproxSign, Method, Part, Site, Step, Surge, make_method, method_from_dict

SITE = Site(0, 1, (8, 12))
KNOWN = ", ".join(METHODS)


# The table


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_name_a_paper_and_an_idea(name: str):
    cls = METHODS[name]
    assert cls.name == name
    assert "arXiv" in cls.paper
    assert cls.idea
    assert cls.__doc__ != Method.__doc__


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_a_method_is_a_frozen_dataclass_of_plain_settings(cls: type[Method]):
    method = cls()
    assert all(isinstance(getattr(method, field.name), int | float | str) for field in dataclasses.fields(cls))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.seed = 2


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_a_parts_state_is_of_a_type_that_gloo_can_broadcast(cls: type[Method]):
    model = binarize_(nn.Sequential(nn.Linear(12, 8)), cls())
    allowed = {torch.uint8, torch.int32, torch.int64, torch.float32}
    assert {value.dtype for value in model.state_dict().values()} <= allowed


def test_the_base_of_all_methods_has_no_arguments_and_the_straight_through_estimators_parts():
    assert METHODS["ste"] is STE
    assert dataclasses.fields(Method) == ()
    base, ste = Method(), STE()
    assert base.claims() == ste.claims() == frozenset()
    assert type(base.weight_binarizer(SITE)) is type(ste.weight_binarizer(SITE))
    found, expected = base.input_binarizer(SITE, (12,)), ste.input_binarizer(SITE, (12,))
    assert (type(found), found.clip) == (type(expected), expected.clip)


def test_only_methods_that_use_a_clip_bound_take_one():
    without = {name for name, cls in METHODS.items() if "clip" not in {field.name for field in dataclasses.fields(cls)}}
    assert without == {"ir_net", "reste"}


def test_a_part_does_nothing_at_either_moment_unless_it_says_so():
    part = Part()
    assert part.begin_step(None, Step(0, 1, 0.1)) is None
    assert part.end_backward(None, Step(0, 1, 0.1)) is None
    assert part.statistics() == {}


# From text


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("ste", None, STE()),
        ("ste", "", STE()),
        ("ste", "clip=2", STE(clip=2.0)),
        ("approx_sign", "clip=1.5", ApproxSign(clip=1.5)),
        ("surge", "eta=0.3,aux=lowrank,rank=8", Surge(eta=0.3, aux="lowrank", rank=8)),
        ("surge", " eta = 1e-2 , aux = shared ", Surge(eta=0.01, aux="shared")),
        ("surge", "eta=0.3,", Surge(eta=0.3)),
    ],
)
def test_a_method_is_read_from_the_command_line(name: str, arguments: str | None, expected: Method):
    found = make_method(name, arguments)
    assert found == expected
    assert {key: type(value) for key, value in found.to_dict().items()} == {
        key: type(value) for key, value in expected.to_dict().items()
    }


@dataclasses.dataclass(frozen=True)
class Switched(Method):
    name = "switched"
    on: bool = False


@pytest.mark.parametrize(
    ("text", "expected"), [("true", True), ("1", True), ("Yes", True), ("false", False), ("0", False)]
)
def test_a_switch_is_read_as_a_switch(text: str, expected: bool):
    assert Switched.from_arguments({"on": text}).on is expected


def test_what_is_neither_true_nor_false_is_an_error():
    with pytest.raises(ValueError, match="argument on='maybe' of method 'switched': expected true or false"):
        Switched.from_arguments({"on": "maybe"})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("strage", None, f"unknown method 'strage'; known methods: {KNOWN}$"),
        ("surge", "etta=1", "unknown argument 'etta' of method 'surge'; known arguments: clip, eta, aux, rank"),
        ("ste", "eta=1", "unknown argument 'eta' of method 'ste'; known arguments: clip$"),
        ("surge", "eta=large", "argument eta='large' of method 'surge': expected float"),
        ("surge", "rank=2.5", "argument rank='2.5' of method 'surge': expected int"),
        ("surge", "eta", "method_args has 'eta': expected key=value pairs separated by commas"),
        ("surge", "eta=-1", r"eta=-1.0: expected a number >= 0"),
        ("surge", "aux=mine", "aux='mine': expected one of own, shared, lowrank, leaky"),
        ("ste", "clip=0", "clip=0.0: expected a number > 0"),
        ("approx_sign", "clip=nan", "clip=nan: expected a number > 0"),
    ],
)
def test_a_bad_method_is_an_error_that_names_what_is_known(name: str, arguments: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        make_method(name, arguments)


@pytest.mark.parametrize(
    ("arguments", "keywords", "expected"),
    [
        (None, {"eta": 0.2}, Surge(eta=0.2)),
        (None, {"eta": 1, "aux": "lowrank", "rank": 8}, Surge(eta=1.0, aux="lowrank", rank=8)),
        ("aux=leaky", {"eta": 0.2}, Surge(eta=0.2, aux="leaky")),
        (None, {"eta": "0.2"}, Surge(eta=0.2)),  # text is read as on the command line
    ],
)
def test_a_method_takes_its_arguments_as_keywords(arguments: str | None, keywords: dict, expected: Method):
    found = make_method("surge", arguments, **keywords)
    assert found == expected
    assert type(found.eta) is float


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (None, {"etta": 1}, "unknown argument 'etta' of method 'surge'; known arguments: clip, eta, aux, rank"),
        (None, {"eta": None}, "argument eta=None of method 'surge': expected float"),
        (None, {"eta": True}, "argument eta=True of method 'surge': expected float"),
        (None, {"rank": 2.5}, "argument rank=2.5 of method 'surge': expected int"),
        (None, {"aux": 3}, "argument aux=3 of method 'surge': expected str"),
        (None, {"eta": -1}, "eta=-1.0: expected a number >= 0"),
        ("eta=0.1", {"eta": 0.2}, "argument 'eta' of method 'surge' is given twice: once is enough"),
        ("eta=0.1,eta=0.2", {}, "argument 'eta' of method 'surge' is given twice: once is enough"),
    ],
)
def test_a_bad_keyword_is_an_error_that_names_it(arguments: str | None, keywords: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_method("surge", arguments, **keywords)


def test_arguments_that_are_no_text_are_refused_with_the_way_out():
    with pytest.raises(
        TypeError, match=r"arguments={'eta': 0.1}: expected text such as .*make_method\('surge', eta=0.1"
    ):
        make_method("surge", {"eta": 0.1})


def test_a_bad_dict_is_an_error_that_names_what_is_known():
    with pytest.raises(ValueError, match=f"unknown method 'x'; known methods: {KNOWN}; if it is another package's, "):
        method_from_dict({"name": "x"})
    with pytest.raises(
        ValueError, match="unknown argument 'etta' of method 'surge'; known arguments: clip, eta, aux, rank"
    ):
        method_from_dict({"name": "surge", "etta": 1})


@pytest.mark.parametrize("name", ["ir_net", "reste"])
def test_a_dict_from_when_every_method_had_a_clip_bound_is_read_if_it_was_left_alone(name: str):
    saved = {"name": name, "clip": 1.0, **dataclasses.asdict(METHODS[name]())}
    assert method_from_dict(saved) == METHODS[name]()
    assert "clip" not in method_from_dict(saved).to_dict()
    with pytest.raises(ValueError, match=f"unknown argument 'clip' of method '{name}'; known arguments: "):
        make_method(name, "clip=1")


def test_a_dict_may_leave_arguments_at_their_defaults():
    assert method_from_dict({"name": "surge", "eta": 0.3}) == Surge(eta=0.3)


# The gradients


def gradient(part: Part, x: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """dF/dx of the part at each x."""
    values = torch.tensor(x, dtype=dtype, requires_grad=True)
    part(values).sum().backward()
    return values.grad


X = [-2.0, -1.0, -0.75, -0.5, -0.0, 0.0, 0.25, 0.75, 1.0, 1.5]


def bi_real(x: float) -> float:
    """Bi-Real Net (arXiv 1808.00278), eq. 7, as it is printed."""
    if -1 <= x < 0:
        return 2 + 2 * x
    if 0 <= x < 1:
        return 2 - 2 * x
    return 0.0


def test_approx_sign_has_the_gradient_that_its_paper_prints():
    part = ApproxSign().input_binarizer(SITE, (12,))
    assert gradient(part, X).tolist() == [bi_real(x) for x in X]


@pytest.mark.parametrize("clip", [0.5, 4.0])
def test_a_wider_approx_sign_is_the_same_triangle_stretched(clip: float):
    part = ApproxSign(clip=clip).input_binarizer(SITE, (12,))
    assert gradient(part, [clip * x for x in X]).tolist() == pytest.approx([bi_real(x) for x in X])


def test_the_straight_through_estimator_passes_the_gradient_within_its_clip_bound():
    assert gradient(STE().input_binarizer(SITE, (12,)), X).tolist() == [float(abs(x) <= 1) for x in X]
    assert gradient(STE(clip=0.75).input_binarizer(SITE, (12,)), X).tolist() == [float(abs(x) <= 0.75) for x in X]


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_every_method_puts_out_signs_with_plus_one_for_zero(cls: type[Method]):
    expected = [-1.0 if x < 0 else 1.0 for x in X]
    method = cls()
    assert method.input_binarizer(SITE, (12,))(torch.tensor(X)).tolist() == expected
    assert method.weight_binarizer(SITE)(torch.tensor([X])).tolist() == [expected]


@pytest.mark.parametrize("cls", [STE, ApproxSign, Surge])
def test_latent_weights_pass_the_gradient_wherever_they_are(cls: type[Method]):
    assert gradient(cls().weight_binarizer(SITE), X).tolist() == [1.0] * len(X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_gradients_keep_the_dtype(cls: type[Method], dtype: torch.dtype):
    assert gradient(cls().input_binarizer(SITE, (12,)), X, dtype).dtype == dtype


def test_a_dict_without_a_name_is_refused():
    with pytest.raises(ValueError, match=f"needs its 'name', one of {KNOWN}; got {{'clip': 1}}"):
        method_from_dict({"clip": 1})
