"""The names that `import hf_bnn` offers: all of them are there, the training side only once it is asked for."""

import importlib

import pytest

import hf_bnn


@pytest.mark.parametrize("name", hf_bnn.__all__)
def test_a_public_name_is_there(name: str):
    assert getattr(hf_bnn, name) is not None
    assert getattr(hf_bnn, name).__class__ is not type(hf_bnn)  # no module of that name in its place


@pytest.mark.parametrize("name", hf_bnn._LAZY)
def test_a_name_that_is_loaded_on_first_use_is_public_and_its_modules_own(name: str):
    assert name in hf_bnn.__all__
    assert name not in vars(hf_bnn)
    module = importlib.import_module(f"hf_bnn.{hf_bnn._LAZY[name]}")
    assert getattr(hf_bnn, name) is getattr(module, name)


def test_the_trainer_and_the_methods_are_loaded_on_first_use():
    assert {"training.trainer", "methods"} <= set(hf_bnn._LAZY.values())


def test_an_unknown_name_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="module 'hf_bnn' has no attribute 'binarise_'"):
        hf_bnn.binarise_  # noqa: B018
