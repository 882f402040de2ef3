"""Definitions of ops: schemas are made from the operands' classes, signatures agree with the C header."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hf_bnn.kernels import library
from hf_bnn.kernels.ops import OPS, schema_of

HEADER = Path(__file__).parents[1] / "hf_bnn" / "kernels" / "csrc" / "hf_bnn.h"
# Programs that torch.export has saved name the ops' operands: these must stay what they are.
SCHEMAS = {
    "linear": "(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None, float threshold=0., "
    "Tensor? thresholds=None) -> Tensor",
    "linear_weight_only": "(Tensor x, Tensor weight, Tensor scale, Tensor? offset=None) -> Tensor",
    "conv2d": "(Tensor x, Tensor weight, Tensor corners, Tensor scale, Tensor? shift, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, float threshold=0., Tensor? thresholds=None) -> Tensor",
    "conv2d_block": "(Tensor x, Tensor weight, Tensor corners, int channels, Tensor scale, Tensor? shift, "
    "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, float threshold, Tensor? thresholds, "
    "Tensor? alpha, Tensor? beta, Tensor? shortcut_alpha, Tensor? shortcut_beta, int shortcut_group, Tensor? rprelu, "
    "Tensor? shortcut, float next_threshold, Tensor? next_thresholds, bool floats, bool bits) -> (Tensor, Tensor)",
    "ffn": "(Tensor x, Tensor first, Tensor first_scale, Tensor? first_offset, float low, float high, Tensor second, "
    "Tensor second_scale, Tensor? second_offset, float threshold=0., Tensor? thresholds=None) -> Tensor",
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor levels, float scaling, Tensor? mask=None, "
    "bool softmax=True) -> Tensor",
    "max_pool": "(Tensor x, Tensor alpha, Tensor beta, int[2] kernel, int[2] stride, int[2] padding) -> Tensor",
}


@pytest.mark.parametrize("name", OPS)
def test_the_schema_of_an_op_stays_what_it_was(name: str):
    assert str(getattr(torch.ops.hf_bnn, name).default._schema) == f"hf_bnn::{name}{SCHEMAS[name]}"


def test_an_operand_of_a_type_without_a_schema_is_named():
    class Wrong(NamedTuple):
        x: Tensor
        sizes: list[str]

        def compute(self) -> Tensor:
            return self.x

    with pytest.raises(TypeError, match=r"type list\[str\]: expected one of <class 'torch.Tensor'>"):
        schema_of("wrong", Wrong)


def test_the_signatures_are_those_of_the_header():
    if not HEADER.exists():
        pytest.skip("no sources here")
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    declared = dict(re.findall(r"EXPORTED \w+ (?:\*|char \*)?(\w+)\(([^)]*)\);", text.replace("const ", "")))
    counts = {name: 0 if given == "void" else given.count(",") + 1 for name, given in declared.items()}
    assert counts == {name: len(arguments) for name, (_, arguments) in library.SIGNATURES.items()}
