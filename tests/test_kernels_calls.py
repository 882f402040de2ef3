"""Calls with a plan: what their ops compute, and what does not fit the plan goes to the op."""

import copy
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from test_kernels import SIZES, every_backend, every_compiled_backend, linear_weight, signs, values
from torch import Tensor

from hf_bnn import kernels
from hf_bnn.kernels import FfnCall, LinearCall, LinearWeightOnlyCall, calls, library
from hf_bnn.kernels.linear import LinearOperands


def linear_call(size: int = 70, out: int = 48) -> LinearCall:
    return LinearCall(linear_weight(values(out, size)), torch.rand(out), torch.randn(out), 0.25)


def weight_only_call(size: int = 70, out: int = 48) -> LinearWeightOnlyCall:
    return LinearWeightOnlyCall(linear_weight(values(out, size)), torch.rand(out), torch.randn(out))


def ffn_call(size: int = 70, out: int = 48) -> FfnCall:
    first, second = linear_weight(values(90, size)), linear_weight(values(out, 90))
    return FfnCall(
        first, torch.rand(90), torch.randn(90), (-9.0, 0.5), second, torch.rand(out), None, torch.tensor(0.1)
    )


every_call = pytest.mark.parametrize("make", [linear_call, weight_only_call, ffn_call])


@every_call
@every_backend
@pytest.mark.parametrize("seed", range(6))
def test_a_call_equals_its_op_at_random_shapes(backend: str, make: Callable, seed: int):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    size, out = draw.choice(SIZES), draw.choice(SIZES)
    call = make(size, out)
    for shape in ((0,), (1,), (3,), (2, 5), (70,), (1, 2, 0), ()):
        x = torch.randn(*shape, size)
        y = call(x)
        assert y.shape == (*shape, out)
        assert torch.equal(y, call.op(x, *call.arguments))


def refuse(*arguments: object) -> None:
    raise AssertionError("the plan was followed")


@every_call
@every_compiled_backend
def test_what_the_plan_does_not_fit_goes_to_the_op(backend: str, make: Callable, monkeypatch: pytest.MonkeyPatch):
    call, x = make(), torch.randn(3, 70)
    others = [x.double(), x.bfloat16(), torch.nn.Parameter(x, requires_grad=False)]
    expected = [call.op(other, *call.arguments) for other in others]
    call.run = refuse
    for other, y in zip(others, expected, strict=True):
        assert torch.equal(call(other), y)
    assert call(x.to("meta")).device.type == "meta"
    with pytest.raises(ValueError, match=r"inputs of shape \(3, 69\): expected 70 numbers in the last dimension"):
        call(x[:, 1:])
    with pytest.raises(AssertionError, match="the plan was followed"):
        call(x)


@every_call
@every_backend
def test_inputs_of_a_call_may_lie_anywhere_in_memory(backend: str, make: Callable):
    call = make()
    for x in (torch.randn(70, 7).T, torch.randn(4, 3, 70)[:, 0], torch.randn(1, 70).expand(5, 70)):
        assert torch.equal(call(x), call(x.clone(memory_format=torch.contiguous_format)))


@every_call
def test_a_call_does_not_depend_on_torchs_default_dtype(make: Callable):
    call, x = make(), torch.randn(9, 70)
    expected = call(x)
    torch.set_default_dtype(torch.float16)
    try:
        found = call(x), call.op(x, *call.arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@every_call
def test_torch_compile_traces_the_op_of_a_call(make: Callable):
    call, x = make(), torch.randn(3, 70)
    traced = []

    def remember(module: torch.fx.GraphModule, inputs: list) -> Callable:
        traced.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    y = torch.compile(lambda x: call(x) + 1, fullgraph=True, backend=remember)(x)
    assert any(name.startswith("hf_bnn.") for name in traced)
    assert torch.equal(y, call(x) + 1)


@every_call
@every_backend
def test_copies_and_pickles_of_a_call_stand_alone(backend: str, make: Callable):
    call, x = make(), torch.randn(3, 70)
    expected = call(x)
    for other in (copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        call.arguments[1].zero_()
        assert torch.equal(other(x), expected)
        call.arguments[1].copy_(other.arguments[1])
    assert torch.equal(call(x), expected)


@every_call
@every_compiled_backend
def test_a_call_of_many_rows_runs_on_threads(backend: str, make: Callable, wants_threads: None):
    torch.set_num_threads(1)
    call, x = make(), torch.randn(200, 70)
    expected, run, seen = call(x), call.run if hasattr(call, "run") else None, []

    def counting(*arguments: object) -> int:
        seen.append(arguments[4])
        return run(*arguments)

    call.run, call.most_rows = counting, 1000
    torch.set_num_threads(3)
    found = call(x)
    assert seen == [3 if library.thread_pool() else 1]
    torch.testing.assert_close(found, expected)


def test_a_call_whose_buffers_cannot_be_allocated_is_an_error():
    call = linear_call()
    if not hasattr(call, "run"):
        pytest.skip("no compiled kernels here")
    call.run = lambda *arguments: 1
    with pytest.raises(MemoryError, match="hf_bnn_linear could not allocate its buffers: use a smaller batch"):
        call(torch.randn(2, 70))


def test_a_calls_operands_are_checked_when_it_is_made():
    weight = linear_weight(torch.randn(9, 70))
    with pytest.raises(ValueError, match=r"offset has shape \(8,\): expected one number per output, \(9,\)"):
        LinearCall(weight, torch.ones(9), torch.ones(8))
    with pytest.raises(ValueError, match=r"low=1.0, high=0.0: expected an interval, low <= high"):
        FfnCall(weight, torch.ones(9), None, (1.0, 0.0), linear_weight(torch.randn(4, 9)), torch.ones(4), None)


def test_a_layer_without_inputs_or_outputs_is_no_special_case():
    empty = LinearCall(linear_weight(torch.randn(5, 0)), torch.ones(5), torch.arange(5.0))
    assert torch.equal(empty(torch.randn(2, 0)), torch.arange(5.0).expand(2, 5))
    assert linear_call(70, 0)(torch.randn(3, 70)).shape == (3, 0)


# Parts of the outputs


def parts_of(x: Tensor, w: Tensor, thresholds: Tensor) -> Tensor:
    parts = zip(thresholds, w.chunk(len(thresholds)), strict=True)
    return torch.cat([signs(x, threshold) @ signs(part).T for threshold, part in parts], -1).float()


@every_backend
@pytest.mark.parametrize("rows", [0, 1, 5, 70, 200])
@pytest.mark.parametrize(("parts", "part"), [(1, 20), (2, 16), (3, 48), (3, 0)])
@pytest.mark.parametrize("per_input", [True, False])
def test_parts_of_the_outputs_see_inputs_through_their_own_thresholds(
    backend: str, rows: int, parts: int, part: int, per_input: bool
):
    x, w, thresholds = values(rows, 77), torch.randn(parts * part, 77), values(parts, 77 if per_input else 1)
    weight, ones, expected = linear_weight(w), torch.ones(parts * part), parts_of(x, w, thresholds)
    y = kernels.linear(x, weight, ones, threshold=thresholds)
    assert torch.equal(y, expected)
    assert torch.equal(LinearCall(weight, ones, threshold=thresholds)(x), expected)
    assert torch.equal(LinearOperands(x, weight.data, ones, thresholds=thresholds).reference(), expected)


@every_compiled_backend
@pytest.mark.parametrize("rows", [5, 60, 2000])
def test_parts_do_not_depend_on_the_number_of_threads(backend: str, rows: int, wants_threads: None):
    x, w, thresholds = torch.randn(rows, 77), torch.randn(240, 77), torch.randn(5, 77)
    call = LinearCall(linear_weight(w), torch.ones(240), threshold=thresholds)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(call(x), parts_of(x, w, thresholds))


@every_compiled_backend
def test_equal_thresholds_are_compared_with_once(backend: str):
    weight, ones = linear_weight(torch.randn(48, 70)), torch.ones(48)
    same, other = torch.full((3, 70), 0.5), torch.full((3, 70), 0.5)
    other[2, 69] = 0.25
    assert LinearCall(weight, ones, threshold=same).plan.parts == 1
    assert LinearCall(weight, ones, threshold=other).plan.parts == 3


@every_backend
def test_an_op_with_parts_passes_opcheck(backend: str):
    weight = linear_weight(torch.randn(32, 70))
    op = torch.ops.hf_bnn.linear.default
    torch.library.opcheck(op, (torch.randn(2, 3, 70), weight.data, torch.rand(32), None, 0.0, torch.randn(2, 70)))


@every_backend
def test_parts_that_do_not_fit_are_named(backend: str):
    weight, x = linear_weight(torch.randn(48, 70)), torch.randn(2, 70)
    with pytest.raises(ValueError, match=r"\(2, 70\) divide 48 outputs into 2 parts: expected .* multiple of 16"):
        kernels.linear(x, weight, torch.ones(48), threshold=torch.ones(2, 70))
    with pytest.raises(ValueError, match="expected one number, or one for each of 70 inputs"):
        kernels.linear(x, weight, torch.ones(48), threshold=torch.ones(3, 69))
    second = linear_weight(torch.randn(4, 48))
    with pytest.raises(ValueError, match=r"thresholds has shape \(3, 70\): a layer of an ffn has no parts"):
        kernels.ffn(
            x, weight, torch.ones(48), None, (-1.0, 0.0), second, torch.ones(4), None, threshold=torch.ones(3, 70)
        )


def test_the_base_of_calls_follows_no_plan():
    assert calls.Call().in_features is None
