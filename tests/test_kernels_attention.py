"""The attention op: equal to BinaryAttention, to BooleanAttention and to itself in torch, on every instruction set."""

import random
import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hf_bnn import kernels
from hf_bnn.fused.attention import fuse_attention
from hf_bnn.kernels import library
from hf_bnn.kernels.attention import AttentionOperands
from hf_bnn.nn.attention import BinaryAttention, BooleanAttention

KINDS = {True: BinaryAttention, False: BooleanAttention}
REFERENCE = AttentionOperands.reference
TOKENS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 130)
SIZES = (1, 7, 16, 31, 32, 33, 64, 65, 96, 128, 130, 255)
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    with kernels.using(request.param):
        yield request.param


every_backend = pytest.mark.parametrize("backend", kernels.available(), indirect=True)
every_compiled_backend = pytest.mark.parametrize("backend", kernels.available()[:-1], indirect=True)
every_kind = pytest.mark.parametrize("softmax", KINDS, ids=["binary", "boolean"])


class Case(NamedTuple):
    """The operands of the op, with `levels` apart from the rest."""

    query: Tensor
    key: Tensor
    value: Tensor
    levels: Tensor
    scaling: float
    mask: Tensor | None = None
    softmax: bool = True

    def run(self) -> Tensor:
        return kernels.attention(*self)

    def expected(self) -> Tensor:
        return REFERENCE(AttentionOperands(*self))

    def probabilities(self) -> Tensor:
        query, key = (torch.where(x < t, -1.0, 1.0) for x, t in zip(self[:2], self.levels[:2], strict=True))
        scores = query @ key.transpose(-1, -2) * self.levels[4] * self.scaling
        return (scores if self.mask is None else scores + self.mask).softmax(-1)

    def with_level(self, level: Tensor) -> "Case":
        levels = self.levels.clone()
        levels[3] = level
        return self._replace(levels=levels)


@pytest.fixture
def left_to_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each call in which torch had to decide: in how many rows; -1 if it had to do all the work."""
    rows, call, module = [], library.call, kernels.attention.__globals__

    def counting(name: str, *arguments: object) -> int:
        if name == "hf_bnn_attention_scores":
            rows.append(arguments[-2])
        return call(name, *arguments)

    def whole(given: AttentionOperands) -> Tensor:
        rows.append(-1)
        return REFERENCE(given)

    monkeypatch.setitem(module, "call", counting)
    monkeypatch.setattr(AttentionOperands, "reference", whole)
    return rows


def laid_out(kind: str, batch: int, heads: int, tokens: int, size: int) -> Tensor:
    """Random numbers `(batch, heads, tokens, size)`, laid out in memory in several ways."""
    x = torch.randn(batch, tokens, 3, heads, size)
    if kind == "slice of a fused projection":
        return x[:, :, 1].transpose(1, 2)
    if kind == "view of a projection":
        return x[:, :, 1].contiguous().transpose(1, 2)
    if kind == "columns":
        return x[:, :, 1].permute(0, 2, 3, 1).contiguous().transpose(-1, -2)
    if kind == "expanded":
        return x[:1, :1, 0].transpose(1, 2).expand(batch, heads, tokens, size)
    return x[:, :, 1].transpose(1, 2).contiguous()


LAYOUTS = ("slice of a fused projection", "view of a projection", "columns", "expanded", "contiguous")


def mask_of(kind: str, batch: int, heads: int, n: int, tokens: int) -> Tensor | None:
    closed = -float("inf") if "inf" in kind else -1e4 if "old" in kind else LOWEST
    if kind == "none":
        return None
    if kind == "all open":
        return torch.zeros(batch, 1, n, tokens)
    if kind.startswith("padding"):
        lengths = torch.randint(1, tokens + 1, (batch, 1, 1, 1))
        shut = torch.arange(tokens) >= lengths
        return torch.where(shut.expand(batch, 1, n, tokens) if "rows" in kind else shut, closed, 0.0)
    if kind == "causal":
        return torch.where(torch.ones(n, tokens, dtype=torch.bool).triu(tokens - n + 1), closed, 0.0)[None, None]
    if kind == "bias":
        return torch.randn(1, heads, n, tokens)
    if kind == "one number":
        return torch.zeros(1, 1, 1, 1)
    shut = torch.rand(batch, heads if "heads" in kind else 1, n, tokens) < (0.95 if "nearly" in kind else 0.4)
    return torch.where(shut, closed, 0.0)


MASKS = (
    *("none", "all open", "padding", "padding in rows", "old padding", "padding inf", "causal", "bias", "one number"),
    *("random", "random heads", "random inf", "nearly all"),
)


def random_case(seed: int, softmax: bool) -> Case:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, size = draw.choice((1, 2, 3)), draw.choice((1, 2, 5)), draw.choice(SIZES)
    tokens = draw.choice(TOKENS)
    n = draw.choice((tokens, draw.choice(TOKENS)))
    layout, rest = draw.choice(LAYOUTS), (batch, heads, tokens, size)
    level = draw.choice((0.7, 1.0, 1.3)) / tokens if softmax else draw.uniform(-1, 1)
    levels = torch.tensor([*(draw.uniform(-0.5, 0.5) for _ in range(3)), level, draw.uniform(0.2, 3), 0.037, 0.041])
    inputs = laid_out(layout, batch, heads, n, size), laid_out(layout, *rest), laid_out(layout, *rest)
    return Case(*inputs, levels, size**-0.5, mask_of(draw.choice(MASKS), batch, heads, n, tokens), softmax)


def usual_case(tokens: int = 128, batch: int = 1, heads: int = 4, size: int = 64, softmax: bool = True) -> Case:
    inputs = (torch.randn(batch, tokens, heads, size).transpose(1, 2) for _ in range(3))
    levels = torch.tensor([0.01, -0.02, 0.03, 1 / tokens if softmax else 0.0, 1.5, 0.05, 0.05])
    return Case(*inputs, levels, size**-0.5, None, softmax)


# The same bits


@pytest.mark.parametrize("seed", range(60))
@every_kind
@every_backend
def test_the_op_equals_its_reference_at_random_shapes_layouts_and_masks(backend: str, softmax: bool, seed: int):
    case = random_case(seed, softmax)
    found, expected = case.run(), case.expected()
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mask", MASKS)
@every_kind
def test_the_reference_is_what_the_module_evaluates(softmax: bool, mask: str):
    module = KINDS[softmax]().eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.uniform_(0.1, 1)
    module.scores.left_levels.width.fill_(2.1)
    module.context.left_levels.width.fill_(0.07)
    module.context.left_levels.offset.fill_(0.03)
    query, key, value = torch.randn(3, 2, 3, 20, 30).unbind()
    mask = mask_of(mask, 2, 3, 20, 20)
    expected, _ = module(query, key, value, mask, 30**-0.5)
    fuse_attention(module)
    found = REFERENCE(AttentionOperands(query, key, value, module.kernel_levels, 30**-0.5, mask, softmax))
    assert torch.equal(found, expected)
    assert expected.unique().numel() > 10


@every_compiled_backend
def test_one_flipped_sign_of_a_key_changes_its_head(backend: str):
    case = usual_case(40, heads=2)
    before = case.run()
    case.key[0, 1, 7] *= -1
    changed = (case.run() != before).flatten(2).any(-1)
    assert changed.tolist() == [[False, True]]


@every_kind
@every_compiled_backend
def test_usual_inputs_are_not_left_to_torch(backend: str, softmax: bool, left_to_torch: list[int]):
    masks = (None, *(mask_of(kind, 1, 4, 128, 128) for kind in MASKS if kind not in ("none", "bias", "nearly all")))
    for mask in masks:
        usual_case(softmax=softmax)._replace(mask=mask).run()
    assert -1 not in left_to_torch
    assert sum(left_to_torch) <= 20  # of some 6000


@pytest.mark.slow
@every_compiled_backend
def test_long_sequences_are_right(backend: str):
    case = usual_case(2048, heads=1)
    assert torch.equal(case.run(), case.expected())


# Rows that are too close to call


@every_compiled_backend
@pytest.mark.parametrize("tokens", [20, 128, 500])
def test_a_threshold_that_is_a_probability_is_decided_as_torch_does(
    backend: str, tokens: int, left_to_torch: list[int]
):
    case = usual_case(tokens, heads=2)
    probability = case.probabilities()[0, 1, 3, 5]
    found = {}
    for name, other in {"below": 0.0, "at": None, "above": 1.0}.items():
        level = probability if other is None else torch.nextafter(probability, torch.tensor(other))
        found[name] = case.with_level(level).run()
        assert torch.equal(found[name], case.with_level(level).expected())
    assert len(left_to_torch) == 3
    assert min(left_to_torch) > 0
    assert found["below"].equal(found["at"])
    assert not found["above"].equal(found["at"])


@every_compiled_backend
@pytest.mark.parametrize("tokens", [1, 3, 7, 50, 128])
def test_equal_scores_at_the_threshold_are_left_to_torch(backend: str, tokens: int, left_to_torch: list[int]):
    case = usual_case(tokens)
    case = case._replace(key=case.key[:, :, :1].expand_as(case.key)).with_level(torch.tensor(1 / tokens))
    assert torch.equal(case.run(), case.expected())
    assert left_to_torch == [case.query[..., 0].numel()]


@every_compiled_backend
def test_numbers_that_the_kernel_does_not_take_are_left_to_torch(backend: str, left_to_torch: list[int]):
    case = usual_case(20)
    case._replace(mask=torch.randn(20, 20)[None, None]).run()
    case._replace(scaling=-1.0).run()
    case.with_level(torch.tensor(0.0)).run()
    usual_case(20, size=256).run()
    assert left_to_torch == [-1] * 4


@every_compiled_backend
@pytest.mark.parametrize("closed", [LOWEST, -float("inf"), -1e4])
def test_a_row_without_an_open_token_is_what_it_is_in_torch(backend: str, closed: float):
    case = usual_case(33)
    mask = torch.zeros(1, 1, 33, 33)
    mask[:, :, 4] = closed
    for rows in (mask, mask[:, :, 4:5]):
        assert torch.equal(case._replace(mask=rows).run(), case._replace(mask=rows).expected())
        boolean = case._replace(mask=rows, softmax=False)
        assert torch.equal(boolean.run(), boolean.expected())


@pytest.mark.parametrize("tokens", [16, 128, 512, 2048])
def test_torchs_softmax_is_as_accurate_as_the_tolerance_assumes(tokens: int):
    scores = torch.randint(-32, 33, (300, tokens)) * 0.37 * 0.125 * 4
    exact = scores.double().softmax(-1)
    roundings = tokens / 4 + 96 + exact.log().abs()
    assert ((scores.softmax(-1) - exact).abs() / exact * 2**24 < roundings).all()


# Unusual numbers


@every_compiled_backend
@every_kind
@pytest.mark.parametrize(
    ("index", "value"),
    [
        *((3, value) for value in (0.0, -0.1, 1e-9, 1.0, 2.0, float("nan"), float("inf"), -float("inf"))),
        *((4, value) for value in (0.0, -1.0, 1e-10, 30.0, 1e10, 1e38, float("nan"), float("inf"))),
        *((index, value) for index in (0, 1, 2, 5, 6) for value in (float("nan"), float("inf"), -float("inf"))),
    ],
)
def test_unusual_levels_are_right(backend: str, softmax: bool, index: int, value: float):
    case = usual_case(40, softmax=softmax)
    case.levels[index] = value
    for mask in (None, mask_of("padding", 1, 4, 40, 40)):
        found, expected = case._replace(mask=mask).run(), case._replace(mask=mask).expected()
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
        assert torch.equal(found.isnan(), expected.isnan())


@every_compiled_backend
@every_kind
@pytest.mark.parametrize("number", [float("nan"), -500.0, 1e-3, -1e-42, 3e38, float("inf")])
def test_a_single_unusual_number_in_a_mask_counts(backend: str, softmax: bool, number: float):
    case = usual_case(40, softmax=softmax)
    for j in (0, 33, 39):
        mask = torch.zeros(1, 1, 40, 40)
        mask[0, 0, 7, j] = number
        assert torch.equal(case._replace(mask=mask).run(), case._replace(mask=mask).expected())


@every_backend
@every_kind
def test_special_inputs_take_the_sign_of_a_comparison(backend: str, softmax: bool):
    case = usual_case(40, softmax=softmax)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 0.03])
    for x in case[:3]:
        x[0, 0].copy_(special[torch.randint(7, (40, 64))])
    assert torch.equal(case.run(), case.expected())


@every_backend
@every_kind
@pytest.mark.parametrize("scaling", [0.0, -1.0, 1e20, float("nan")])
def test_unusual_scaling_is_right(backend: str, softmax: bool, scaling: float):
    case = usual_case(20, softmax=softmax)._replace(scaling=scaling)
    assert torch.equal(case.run(), case.expected())


@every_backend
@every_kind
@pytest.mark.parametrize(
    ("batch", "heads", "n", "tokens", "size"),
    [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)],
)
def test_empty_inputs_are_right(backend: str, softmax: bool, batch: int, heads: int, n: int, tokens: int, size: int):
    query, key = torch.randn(batch, heads, n, size), torch.randn(batch, heads, tokens, size)
    case = Case(query, key, key, usual_case().levels, 1.0, None, softmax)
    assert torch.equal(case.run(), case.expected())
    assert case.run().shape == query.shape


@every_backend
@pytest.mark.parametrize("size", [256, 300])
def test_large_heads_are_right(backend: str, size: int):
    case = usual_case(20, size=size)
    assert torch.equal(case.run(), case.expected())


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_kept(backend: str, dtype: torch.dtype):
    case = usual_case(20)
    case = Case(*(x.to(dtype) for x in case[:3]), *case[3:])
    found = case.run()
    assert found.dtype == dtype
    assert torch.equal(found, case.expected())


# Threads


@every_kind
@every_compiled_backend
def test_results_do_not_depend_on_the_number_of_threads(backend: str, softmax: bool, wants_threads: None):
    mask = mask_of("random heads", 2, 3, 150, 150)
    case, found = usual_case(150, batch=2, heads=3, softmax=softmax)._replace(mask=mask), []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        found.append(case.run())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_several_python_threads_may_call_at_once(wants_threads: None):
    torch.set_num_threads(2)
    cases = [usual_case(70), usual_case(33, softmax=False)._replace(mask=mask_of("causal", 1, 1, 33, 33))]
    expected, found = [case.expected() for case in cases], []

    def work() -> None:
        for _ in range(5):
            found.extend(torch.equal(case.run(), y) for case, y in zip(cases, expected, strict=True))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 40


# torch.library


@every_kind
@every_backend
def test_the_op_passes_opcheck(backend: str, softmax: bool):
    case = usual_case(9, batch=2, heads=3, size=20, softmax=softmax)
    for mask in (None, mask_of("padding", 2, 3, 9, 9)):
        torch.library.opcheck(torch.ops.hf_bnn.attention.default, tuple(case._replace(mask=mask)))


@every_backend
def test_wrong_shapes_are_named(backend: str):
    case = usual_case(9)
    with pytest.raises(ValueError, match=r"queries \(1, 4, 9, 64\), keys \(1, 3, 9, 64\) and values \(1, 4, 9,"):
        case._replace(key=case.key[:, :3]).run()
    with pytest.raises(ValueError, match=r"expected \(batch, heads, tokens, size\), with as many values as keys"):
        case._replace(value=case.value[:, :, 1:]).run()
    with pytest.raises(ValueError, match=r"levels has shape \(6,\): expected \(7,\)"):
        case._replace(levels=case.levels[:6]).run()
