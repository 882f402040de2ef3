"""The allocator's settings, as malloc.h numbers them; where there is no such allocator nothing is touched."""

import ctypes
import sys

import pytest

from hf_bnn.training.allocator import keep_freed_memory

# malloc.h: the parameters' numbers
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_INT = 2**31 - 1


class Glibc:
    """Takes settings, or refuses the one numbered `refused`."""

    def __init__(self, refused: int | None = None):
        self.settings, self.refused = {}, refused

    def mallopt(self, parameter: int, value: int) -> int:
        assert 0 <= value <= LARGEST_INT
        self.settings[parameter] = value
        return int(parameter != self.refused)


def kept(monkeypatch: pytest.MonkeyPatch, library: object, platform: str = "linux") -> bool:
    def load(name: str | None) -> object:
        assert name is None  # the process itself
        return library

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", load)
    return keep_freed_memory()


def test_freed_memory_is_neither_mapped_anew_nor_given_back(monkeypatch: pytest.MonkeyPatch):
    libc = Glibc()
    assert kept(monkeypatch, libc) is True
    assert libc.settings == {M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: LARGEST_INT, M_TOP_PAD: 2**28}


@pytest.mark.parametrize("refused", [M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD])
def test_a_setting_that_is_refused_is_reported(monkeypatch: pytest.MonkeyPatch, refused: int):
    assert kept(monkeypatch, Glibc(refused)) is False


def test_other_systems_and_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    libc = Glibc()
    assert kept(monkeypatch, libc, "darwin") is False
    assert libc.settings == {}
    assert kept(monkeypatch, object()) is False
