"""StoMPP: clipped values turn into signs entry by entry and unit by unit, from input to output (arXiv 2606.27759)."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..functional import clipped_gradient, sign, weight_scale
from .base import ClippedInputs, ClippedSign, IdentitySign, Part, Position, Site, Step

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda x: x**3,
    "linear": lambda x: x,
    "quadratic": lambda x: x**2,
    "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
    "flipped_quadratic": lambda x: 1 - (1 - x) ** 2,
}
ORDERS = ("forward", "reverse", "global")
UNITS = ("linear", "group", "block")
SIDES = ("both", "weights", "activations")
GATES = ("auto", "on", "off")
PERIOD = 64  # keys of a product's operand, whose sizes vary: position i of its last dimension has key i mod 64
SMALLEST_LIMIT = torch.finfo(torch.float32).tiny


class _Mix(torch.autograd.Function):
    """Computes `mix` in the dtype of x and in place: boolean tensors are much slower on a CPU (see functional.sign).

    A frozen entry's gradient is zero, not None, because a distributed reducer waits for every gradient.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, limit: Tensor | None, mask: Tensor | None, hard: bool, ste: bool, bound: float | None
    ) -> Tensor:
        ctx.dead, ctx.bound = hard and not ste, bound
        gated = bound is not None and not ctx.dead
        ctx.save_for_backward(x if gated else None, limit if gated else None, None if ste else mask)
        if hard:
            return sign(x)
        y = x.clamp(-1, 1) if limit is None else (x / limit).clamp_(-1, 1)
        return y if mask is None else y.lerp_(sign(x), mask.to(x.dtype).expand_as(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, limit, frozen = ctx.saved_tensors
        nothing = (None,) * 5
        if ctx.dead:
            return torch.zeros_like(grad), *nothing
        passed = grad if x is None else clipped_gradient(grad, x, ctx.bound if limit is None else ctx.bound * limit)
        return passed if frozen is None else passed * (1 - frozen.to(grad.dtype)), *nothing


def mix(
    x: Tensor,
    mask: Tensor | bool,
    limit: Tensor | None = None,
    ste: bool = True,
    bound: float | None = 1.0,
) -> Tensor:
    """u' = M sign(u) + (1 - M) clip(u, -1, 1) with u = x / limit (arXiv 2606.27759, eq. 1); the shape of `x`.

    `mask` M, of zeros and ones, broadcasts to `x`; True or False stands for the same value everywhere. `limit`, a
    constant > 0, is the size at which the clip saturates. The gradient passes unchanged where |u| <= `bound` (None:
    everywhere). Without `ste` it is exactly 0 at the frozen entries (M = 1). Unlike the gradient of the clip itself it
    is not divided by `limit`, so that it is as large as under the straight-through estimator.
    """
    if isinstance(mask, bool):
        return _Mix.apply(x, limit, None, mask, ste, bound)
    return _Mix.apply(x, limit, mask, False, ste, bound)


def _generator(*place: int) -> torch.Generator:
    """A generator that gives the same random numbers for the same place on every machine."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class FreezingKeys:
    """A key in [0, 1) for each of `count` entries, uniform at every step; an entry is frozen where its key is below p.

    `refresh` r: step t draws new keys for block t mod r of a fixed permutation, so that count / r of them change; with
    r = 0 none do. The keys depend on `place` and the step only, so that all ranks agree and nothing has to be saved.
    """

    def __init__(self, count: int, refresh: int, place: tuple[int, ...]):
        self.count, self.refresh, self.place = count, refresh, place
        self.step: int | None = None
        self.order = torch.randperm(count, generator=_generator(*place, 0))
        self.keys = torch.empty(count)

    def at(self, step: int) -> Tensor:
        """The keys of optimizer step `step`, float32 `(count,)`. Changed in place by the next call."""
        r = self.refresh
        first = 0 if self.step is None else self.step + 1
        if self.step is None or not self.step <= step <= self.step + r:
            self.keys.copy_(torch.rand(self.count, generator=_generator(*self.place, 1)))
            first = max(0, step - r + 1)  # the newest draw of a block is at most r steps old
        for t in range(first, step + 1) if r else ():
            block = self.order[t % r * self.count // r : (t % r + 1) * self.count // r]
            self.keys[block] = torch.rand(len(block), generator=_generator(*self.place, 2 + t))
        self.step = step
        return self.keys


class MaskedSign(Part):
    """Returns clipped values at first, signs in the end, and a mixture in between, by a mask that grows with the steps.

    `shape` is that of the mask. `scaling` is that of a weight's signs, or None for an input, and determines where the
    clip saturates. Unless `begin_step` is called, as a trainer does, all values are signs.
    """

    keeps_inputs = True

    def __init__(self, method: "Stompp", shape: tuple[int, ...], scaling: str | None):
        super().__init__()
        self.method, self.scaling = method, scaling
        self.periodic = math.prod(shape) == 1
        self.shape = (PERIOD,) if self.periodic else shape
        self.fraction = 1.0
        self.mask: Tensor | None = None  # None: the same everywhere
        self.just_frozen: Tensor | None = None  # by this step, if the method asks for it
        self._keys: FreezingKeys | None = None

    def binary_fraction(self) -> float:
        return self.fraction

    @property
    def emits_signs(self) -> bool:
        return self.mask is None and self.fraction >= 1

    def forward(self, x: Tensor) -> Tensor:
        limit = None
        if self.scaling is not None and self.scaling != "none":
            limit = weight_scale(x, self.scaling).clamp_min(SMALLEST_LIMIT).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        if self.mask is None:
            return mix(x, self.fraction >= 1, limit, self.method.ste, self._bound())
        mask = self.mask.to(x.device)
        if self.periodic:
            mask = mask.repeat(-(-x.shape[-1] // PERIOD))[: x.shape[-1]]
        return mix(x, mask, limit, self.method.ste, self._bound())

    def clip_bound(self) -> float:
        return self.method.clip

    def _bound(self) -> float | None:
        """The size, in units of saturation, up to which an entry passes its gradient; None: all entries do."""
        if self.scaling is None:
            return self.method.clip
        return 1.0 if self.method.gates_weights else None

    def begin_step(self, layer: nn.Module, step: Step) -> None:
        weight = getattr(layer, "weight", None)
        device = torch.device("cpu") if weight is None else weight.device
        before = self._mask_at(layer, step._replace(index=step.index - 1)) if self.method.zero_momentum else None
        mask = self._mask_at(layer, step)
        self.fraction = self.method.fraction(self.site, step)
        self.mask = None if mask.dim() == 0 else mask.to(device)
        if self.mask is None:
            self._keys = None  # only the unit in transition holds keys
        self.just_frozen = None if before is None else (mask > before).to(device)

    def _mask_at(self, layer: nn.Module, step: Step) -> Tensor:
        """The mask of a step, zeros and ones in float32; 0-d where all entries are equal."""
        fraction = self.method.fraction(self.site, step)
        if not 0 < fraction < 1:
            return torch.tensor(float(fraction >= 1))
        if self._keys is None:
            slot = [part for _, part in layer.parts()].index(self)
            place = (self.method.seed, self.site.index, slot)
            self._keys = FreezingKeys(math.prod(self.shape), self.method.refresh_period(self.site, step), place)
        return self._keys.at(step.index).clone().lt_(fraction).view(self.shape)


@dataclass(frozen=True)
class Stompp(ClippedInputs):
    """StoMPP (arXiv 2606.27759): u' = M sign(u) + (1 - M) clip(u, -1, 1), with a mask M that fills up layer by layer.

    Each unit has a window of steps in which the frozen share of its entries goes from 0 to 1 as `schedule` says
    ("cubic", "linear", "quadratic", "cosine", "flipped_quadratic"). `order`: the windows stand side by side from input
    to output ("forward"), the other way round ("reverse"), or all coincide ("global"). `end`: the share of the steps
    after which all is binary; at least the last step is. `unit`: each layer ("linear"), the layers that read the same
    tensor ("group": query, key, value) or each "block". `on`: masks on weights and activations ("both"), or on one of
    them, with the straight-through estimator on the other.

    `ste`: frozen entries have the straight-through estimator's gradient, as live ones do; False: theirs is exactly 0,
    so that nothing in front of a binary layer learns any more. `clip`: inputs pass the gradient where |x| <= clip, in
    units of their levels, whatever the values are, which saturate at 1. `weight_gate`: weights pass it only up to where
    they saturate ("on", the paper's clip) or always ("off", as under the straight-through estimator); "auto" is "off"
    with `ste`, "on" without it. `refresh`: an entry's key is redrawn every r = min(refresh, max(1, window // 8)) steps;
    0: never. `zero_momentum`: a weight's momentum is forgotten when it freezes.

    Deviations. Weights saturate at their layer's scale s, clip(w, -s, s) beside s sign(w). Their gradient is s times
    the clip's, in which s is constant: so it has the size of the straight-through estimator's, and both may be compared
    at one learning rate (1 / s is about 30). With `ste` weights are not gated: the paper gates at 1, which few weights
    reach, but s = mean |w| would leave about half of them without a gradient. Activations saturate in units of their
    levels. Their masks are shared by batch and tokens (by pixels of a channel).

    >>> Stompp(order="global").fraction(Site(0, 4), Step(45, 100, 0.1))
    0.125
    """

    name: ClassVar[str] = "stompp"
    paper: ClassVar[str] = "StoMPP, arXiv 2606.27759"
    idea: ClassVar[str] = "clipped values become signs entry by entry, layer after layer, from input to output"

    in_order: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True

    order: str = "forward"
    schedule: str = "cubic"
    end: float = 0.9
    unit: str = "group"
    on: str = "both"
    ste: bool = True
    weight_gate: str = "auto"
    refresh: int = 100
    zero_momentum: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"order": ORDERS, "schedule": SCHEDULES, "unit": UNITS, "on": SIDES, "weight_gate": GATES}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected one of {', '.join(allowed)}")
        if not 0 < self.end <= 1:
            raise ValueError(f"end={self.end}: expected a number in (0, 1]")
        if self.refresh < 0:
            raise ValueError(f"refresh={self.refresh}: expected an integer >= 0")

    @property
    def gates_weights(self) -> bool:
        """Whether saturated weights pass no gradient."""
        return not self.ste if self.weight_gate == "auto" else self.weight_gate == "on"

    def claims(self) -> frozenset[str]:
        sides = {"weights": {"weight_binarizer"}, "activations": {"input_binarizer"}}
        slots = set().union(*(slots for side, slots in sides.items() if self.on in (side, "both")))
        return frozenset(slots | {"optimizer_hook"} if self.zero_momentum else slots)

    def weight_binarizer(self, site: Site) -> Part:
        if self.on == "activations":
            return IdentitySign()
        return MaskedSign(self, site.weight_shape, site.weight_scaling)

    def input_binarizer(self, site: Site, shape: tuple[int, ...]) -> Part:
        return ClippedSign(self.clip) if self.on == "weights" else MaskedSign(self, shape, None)

    def optimizer_hook(self, optimizer: torch.optim.Optimizer, layers: list[tuple[Site, nn.Module]]) -> None:
        if not self.zero_momentum:
            return

        @torch.no_grad()
        def forget(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            for _, layer in layers:
                frozen = getattr(layer.weight_binarizer, "just_frozen", None)
                state = optimizer.state.get(layer.weight, {})
                for name in ("momentum_buffer", "exp_avg"):
                    if frozen is not None and state.get(name) is not None:
                        state[name].masked_fill_(frozen, 0)

        optimizer.register_step_pre_hook(forget)

    def position(self, site: Site) -> Position:
        """The position of the site's unit among all units."""
        own = {"linear": None, "group": site.group, "block": site.block}[self.unit]
        return Position(site.index, site.count) if own is None else own

    def last_step(self, step: Step) -> float:
        """The step at which all windows of the run have ended."""
        return min(self.end * step.total, step.total - 1)

    def fraction(self, site: Site, step: Step) -> float:
        """p: the share of frozen entries at a step, 0 to 1."""
        end, position = self.last_step(step), self.position(site)
        if end <= 0:
            return 1.0
        x = step.index / end
        if self.order != "global":
            x = x * position.count - (
                position.index if self.order == "forward" else position.count - 1 - position.index
            )
        if x <= 1e-9 or x >= 1 - 1e-9:  # windows meet: rounding must not leave two of them open
            return float(x > 0.5)
        return SCHEDULES[self.schedule](x)

    def refresh_period(self, site: Site, step: Step) -> int:
        """r: the number of steps after which every entry has a new key; 0: keys never change."""
        windows = 1 if self.order == "global" else self.position(site).count
        return min(self.refresh, max(1, int(self.last_step(step) / windows) // 8))
