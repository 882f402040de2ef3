"""Old import paths give the module at its new path, and warn with that path."""

import importlib
import sys

import pytest

from hf_bnn.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_gives_the_same_module_and_names_the_new_path(old: str):
    sys.modules.pop(old, None)
    new = importlib.import_module(MOVED[old])
    name, spec = new.__name__, new.__spec__
    with pytest.warns(DeprecationWarning, match=f"{old} has moved: import {MOVED[old]} instead"):
        found = importlib.import_module(old)
    assert found is new
    assert (new.__name__, new.__spec__) == (name, spec)


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"hf_bnn\.layer'"):
        importlib.import_module("hf_bnn.layer")
