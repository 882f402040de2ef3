"""Methods from outside the package: how they are registered, named on the command line, trained and read back."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from tiny import make_net, optimizer_of, tiny_model, train_steps

import hf_bnn
from hf_bnn import install_method
from hf_bnn.methods import METHODS, STE, ClippedInputs, Method, Part, Site, make_method, method_from_dict, registry
from hf_bnn.methods import register_method as register
from hf_bnn.methods.base import ClippedSign


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    """Takes away again what a test registers."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


class Scaled(ClippedSign):
    """A clipped sign whose gradient is multiplied by a constant."""

    def __init__(self, clip: float, factor: float):
        super().__init__(clip)
        self.factor = factor

    def forward(self, x):
        signs = super().forward(x)
        return signs if self.factor == 1 else self.factor * signs + (1 - self.factor) * signs.detach()


@dataclass(frozen=True)
class Faint(ClippedInputs):
    """Multiplies the gradient of the inputs by `factor`; None leaves it alone."""

    name: ClassVar[str] = "faint"
    paper: ClassVar[str] = "none"
    idea: ClassVar[str] = "a weaker gradient of the inputs"

    factor: float | None = None
    depth: int | None = 3
    mode: Literal["soft", "hard"] = "soft"
    level: Literal[1, 2] | None = None
    fast: bool = False

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        return Scaled(self.clip, 1 if self.factor is None else self.factor)


def test_a_method_of_ones_own_is_made_trained_saved_and_read_back(tmp_path: Path):
    assert register(Faint) is Faint
    method = make_method("faint", "factor=0.5,clip=2,depth=none,mode=hard")
    assert method == Faint(clip=2.0, factor=0.5, depth=None, mode="hard")
    net, plain = make_net("linear", method), make_net("linear", STE(clip=2.0))
    first = net.model[2].weight.clone()
    train_steps(net, optimizer_of(net), range(1))
    assert not torch.equal(net.model[2].weight, first)
    x = torch.randn(4, 16)
    grads = []
    for model in (net.model, plain.model):
        inputs = x.clone().requires_grad_()
        model[2].load_state_dict(plain.model[2].state_dict(), strict=False)
        model[2](inputs).sum().backward()
        grads.append(inputs.grad)
    torch.testing.assert_close(grads[0], 0.5 * grads[1])

    saved = tiny_model(method=method.to_dict())
    saved.save_pretrained(tmp_path)
    again = hf_bnn.BinaryBertForSequenceClassification.from_pretrained(tmp_path)
    assert method_from_dict(again.config.method) == method


def test_a_sum_with_a_method_of_ones_own_is_read_back():
    register(Faint)
    method = make_method("faint+xnor", "factor=0.5,clip=3")
    assert method.clip == 3.0
    assert method_from_dict(method.to_dict()) == method


def test_a_config_that_names_an_unknown_method_imports_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    monkeypatch.setattr(registry, "entry_points", lambda **_: pytest.fail("read the entry points"))
    for name in ("faint", "package.module:Faint"):
        with pytest.raises(ValueError, match=rf"unknown method '{name}'; known methods: ste, .*; if it is another"):
            method_from_dict({"name": name})
    with pytest.raises(ValueError, match="install that package and import the module that registers the method"):
        method_from_dict({"name": "faint+surge", "methods": [{"name": "faint"}, {"name": "surge"}]})


# What is refused


def altered(**changes: object) -> type:
    """Faint as another class with these class variables."""
    namespace = {"name": "other", "paper": "none", "idea": "none", "__annotations__": {}, **changes}
    return dataclass(frozen=True)(type("Other", (ClippedInputs,), namespace))


@pytest.mark.parametrize(
    ("cls", "error", "message"),
    [
        (3, TypeError, "cannot register 3 as a method: expected a class that derives from hf_bnn.Method"),
        (Site, TypeError, "expected a class that derives from hf_bnn.Method"),
        (
            type("Bare", (Faint,), {}),
            TypeError,
            r"cannot register Bare as a method: decorate it with @dataclass",
        ),
        (
            altered(name="surge"),
            ValueError,
            "cannot register Other as 'surge': hf_bnn.methods.surge.Surge has this",
        ),
        (altered(name="two words"), ValueError, "as 'two words': expected a name of letters, digits and underscores"),
        (altered(name=None), ValueError, "set the class variable `name` to a text, got None"),
        (altered(paper=""), ValueError, "set the class variable `paper` to a text, got ''"),
        (altered(idea=None), ValueError, "set the class variable `idea` to a text"),
        (
            altered(__annotations__={"k": list[int]}, k=()),
            TypeError,
            r"'k' of Other has the annotation list\[int\]: ",
        ),
        (
            altered(__annotations__={"k": dict}, k=None),
            TypeError,
            "'k' of Other has the annotation dict: expected",
        ),
        (altered(__annotations__={"k": float | str}, k=1.0), TypeError, r"has the annotation float \| str: expected"),
        (altered(__annotations__={"k": Literal[1, "a"]}, k=1), TypeError, "has the annotation .*Literal.*: expected"),
        (altered(__annotations__={"k": "Missing"}, k=1), TypeError, "annotations of Other cannot be read: .*'Missing'"),
    ],
)
def test_a_class_that_cannot_be_a_method_is_refused_when_it_is_registered(cls, error: type, message: str):
    with pytest.raises(error, match=message):
        register(cls)


def test_an_argument_without_a_default_is_refused():
    @dataclass(frozen=True)
    class Needy(Method):
        name, paper, idea = "needy", "none", "none"
        k: int

    with pytest.raises(TypeError, match="argument 'k' of Needy has no default: give it one"):
        register(Needy)


def test_a_class_that_is_defined_anew_replaces_its_older_self():
    def define(wide: float) -> type[Method]:
        @register
        @dataclass(frozen=True)
        class Wide(ClippedInputs):
            name, paper, idea = "wide", "none", "none"
            clip: float = wide

        return Wide

    define(2.0)
    define(4.0)
    assert make_method("wide").clip == 4.0


# Arguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("factor=none", Faint()),
        ("factor=None,depth=NONE", Faint(depth=None)),
        ("factor=2", Faint(factor=2.0)),
        ("depth=7,level=2", Faint(depth=7, level=2)),
        ("level=none", Faint()),
        ("fast=yes,mode=hard", Faint(fast=True, mode="hard")),
    ],
)
def test_optional_arguments_and_choices_are_read(arguments: str, expected: Faint):
    register(Faint)
    assert make_method("faint", arguments) == expected


def test_optional_arguments_are_read_from_values_too():
    register(Faint)
    assert make_method("faint", factor=1, depth=None, level=1) == Faint(factor=1.0, depth=None, level=1)
    assert type(make_method("faint", factor=1).factor) is float


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("factor=much", "argument factor='much' of method 'faint': expected float or none"),
        ("depth=2.5", "argument depth='2.5' of method 'faint': expected int or none"),
        ("mode=none", "argument mode='none' of method 'faint': expected one of soft, hard$"),
        ("level=3", "argument level='3' of method 'faint': expected one of 1, 2 or none"),
        ("fast=none", "argument fast='none' of method 'faint': expected true or false"),
    ],
)
def test_a_bad_optional_argument_is_an_error_that_says_what_is_possible(arguments: str, message: str):
    register(Faint)
    with pytest.raises(ValueError, match=message):
        make_method("faint", arguments)


# On the command line, and from installed packages


MODULE = """
from dataclasses import dataclass
from hf_bnn.methods import ClippedInputs

@dataclass(frozen=True)
class Mine(ClippedInputs):
    name, paper, idea = "mine", "none", "none"
    k: int = 1

number = 3
"""


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an importable module that defines the method `Mine`."""
    (tmp_path / "my_methods.py").write_text(MODULE)
    (tmp_path / "broken_methods.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_methods"
    sys.modules.pop("my_methods", None)


def test_a_method_is_named_by_its_module_and_class(my_module: str):
    method = make_method(f"{my_module}:Mine+surge", "k=5,eta=0.3")
    assert method.name == "mine+surge"
    assert method.methods[0].k == 5
    assert METHODS["mine"] is type(method.methods[0])
    assert make_method("mine", "k=2") == make_method(f"{my_module}:Mine", "mine.k=2")
    assert method_from_dict(method.to_dict()) == method
    install_method(torch.nn.Sequential(), method)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("my_methods:Missing", ValueError, "method 'my_methods:Missing': module 'my_methods' has no 'Missing'"),
        ("my_methods:number", ValueError, "method 'my_methods:number': cannot register 3 as a method"),
        ("your_methods:Mine", ValueError, "there is no module 'your_methods'; name a module on Python's path"),
        ("your.methods:Mine", ValueError, "there is no module 'your'; name a module on Python's path"),
        ("my_methods:", ValueError, "method 'my_methods:': expected package.module:ClassName"),
        (".my_methods:Mine", ValueError, "method '.my_methods:Mine': expected package.module:ClassName"),
        ("broken_methods:Mine", ModuleNotFoundError, "No module named 'a_module_that_is_not_there'"),
    ],
)
def test_a_place_without_a_method_is_an_error_that_names_it(my_module: str, name: str, error: type, message: str):
    with pytest.raises(error, match=message):
        make_method(name)


def announce(monkeypatch: pytest.MonkeyPatch, name: str, place: str) -> None:
    """Pretend that an installed package has this entry point."""
    point = EntryPoint(name, place, "hf_bnn.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])


def test_an_installed_packages_method_is_loaded_when_it_is_asked_for(my_module: str, monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, "mine", "my_methods:Mine")
    with pytest.raises(ValueError, match=r"unknown method 'strage'; known methods: ste, .*, metaquant, mine$"):
        make_method("strage")
    assert make_method("surge").name == "surge"
    assert "my_methods" not in sys.modules
    assert make_method("mine", "k=2").k == 2
    assert "mine" in METHODS


def test_an_entry_point_that_gives_another_method_is_refused(my_module: str, monkeypatch: pytest.MonkeyPatch):
    announce(monkeypatch, "yours", "my_methods:Mine")
    with pytest.raises(ValueError, match=r"the entry point 'yours' of 'hf_bnn.methods' gives a method called 'mine'"):
        make_method("yours")
    assert "mine" not in METHODS


def test_registering_is_public():
    assert hf_bnn.register_method is register
