"""Reports on the inputs of binary layers over one batch: a layer whose inputs have constant signs learns nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .execution import bypassed_layers, untouched
from .functional import sign_int8
from .nn.layers import BinaryLayer, WeightedLayer
from .nn.levels import SignedLevels
from .nn.packed import PackedConv2d, PackedLinear, is_packed

MANY = 0.5  # a larger share of constant features, or of dead outputs, is a problem
NEARLY_ALL = 0.95  # with a larger share of inputs beyond the levels, hardly any gradient passes
ENOUGH = 16  # fewer values of a feature do not show that its sign never changes


class InputReport(NamedTuple):
    """One operand of a binary layer over a batch. Shares are fractions, 0 to 1.

    >>> from hf_bnn import binarize_
    >>> model = binarize_(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    >>> [report] = check_inputs(model, torch.randn(4, 8))
    >>> report.module, report.high, report.problem.split(":")[0]
    ('1', 1.0, 'its input is never below the threshold (is it the output of a ReLU?)')
    """

    module: str
    operand: str  # input; left or right of a product of activations
    high: float  # the share of values on the high level
    constant_features: float  # the share of features (channels) with the same sign in the whole batch
    beyond: float  # the share of values beyond the levels, where the straight-through gradient is 0
    dead_outputs: float  # the share of output channels whose weights are all 0
    calibrated: bool  # the levels had their initial values: the shares are those after calibration
    problem: str | None  # what is wrong, and the remedy

    def __str__(self) -> str:
        shares = f"{self.high:6.1%} high {self.constant_features:6.1%} constant {self.beyond:6.1%} beyond"
        return f"{self.module}.{self.operand}: {shares}  {self.problem or 'ok'}"


class _Tally:
    """Running counts of one operand over the calls of its layer."""

    def __init__(self, calibrated: bool = False):
        self.calibrated = calibrated
        self.high = self.beyond = self.total = self.nonfinite = 0
        self.high_features: Tensor | int = 0  # per feature, how many of its values are high
        self.unsigned = False  # the low level is 0

    def add(self, x: Tensor, levels: SignedLevels, features: int | None) -> None:
        high = sign_int8(x, levels.threshold()) > 0
        self.high += int(high.sum())
        self.beyond += int((levels.normalize(x.float()).abs() > 1).sum())
        self.nonfinite += int((~x.isfinite()).sum())
        self.total += x.numel()
        self.unsigned = levels.shifted
        counts = high.flatten() if features is None else high.movedim(features, 0).flatten(1)
        self.high_features = self.high_features + counts.sum(-1).view(-1)

    @property
    def values(self) -> int:
        """The number of values of each feature."""
        return self.total // self.high_features.numel()

    def constant_features(self) -> float:
        constant = (self.high_features == 0) | (self.high_features == self.values)
        return float(constant.float().mean())


def check_inputs(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> list[InputReport]:
    """Reports on how one batch spreads the inputs of a latent or packed model's binary layers over their levels.

    There is one report per layer with binary inputs and per operand of a BinaryMatmul, in the order of execution.
    Layers that the batch does not reach come last. The model runs in evaluation mode, and once in training mode to
    find bypassed layers (see `hf_bnn.bypassed_layers`); afterwards it is unchanged. Learned levels that were never
    fitted are fitted to the batch temporarily, as BinaryTrainer does before its first step. A packed model's levels
    stay as they are. Raises ValueError if no layer has binary inputs.

    >>> from hf_bnn import binarize_
    >>> print(*check_inputs(binarize_(nn.Sequential(nn.Linear(2, 8))), torch.eye(2) - 0.5), sep="\\n")
    0.input:  50.0% high   0.0% constant   0.0% beyond  ok
    """
    layers = {module: name for name, module in model.named_modules() if _operands(module)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer with binary inputs: call hf_bnn.binarize_ first")
    tallies: dict[tuple[nn.Module, str], _Tally] = {}
    fit = not is_packed(model)

    def watch(layer: nn.Module, inputs: tuple) -> None:
        operands = _operands(layer)
        fresh = {name: fit and getattr(levels, "fresh", False) for name, levels, _ in operands}
        if any(fresh.values()):
            layer.fit_levels(*inputs)
        for (name, levels, features), x in zip(operands, inputs, strict=True):
            tallies.setdefault((layer, name), _Tally(fresh[name])).add(x, levels, features)

    def run() -> None:
        model(**batch) if isinstance(batch, Mapping) else model(batch)

    with untouched(model), torch.no_grad():
        hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
        try:
            model.eval()
            run()
        finally:
            for hook in hooks:
                hook.remove()
    for layer in layers:
        for name, _, _ in _operands(layer):
            tallies.setdefault((layer, name), _Tally())
    bypassed = set(bypassed_layers(model, run))
    return [
        _report(layers[layer], name, tally, _dead_outputs(layer), layers[layer] in bypassed)
        for (layer, name), tally in tallies.items()
    ]


def _operands(module: nn.Module) -> list[tuple[str, SignedLevels, int | None]]:
    """(name, levels, dimension of the features or None) of each binary operand of a layer."""
    features = -3 if isinstance(module, nn.Conv2d) else -1
    if isinstance(module, PackedLinear | PackedConv2d):
        return [("input", module.input_levels, features)] if module.binary_inputs else []
    if isinstance(module, WeightedLayer):
        return [("input", module.input_levels, features)] if module.binarize != "weights" else []
    if isinstance(module, BinaryLayer):
        return [("left", module.left_levels, None), ("right", module.right_levels, None)]
    return []


def _dead_outputs(layer: nn.Module) -> float:
    """The share of output channels whose scale, and so every weight, is 0."""
    if isinstance(layer, BinaryLayer) and not isinstance(layer, WeightedLayer):
        return 0.0
    scale = layer.scale() if isinstance(layer, WeightedLayer) else layer.weight_scale
    return float((scale == 0).float().mean())


def _report(module: str, operand: str, tally: _Tally, dead: float, bypassed: bool) -> InputReport:
    problem = "this batch does not reach it" if tally.total == 0 else None
    if bypassed:
        problem = (
            "the model reads its weight without calling it, in evaluation or in training: it is a float layer there, "
            "and fails once packed; exclude it"
        )
    if tally.total == 0:
        return InputReport(module, operand, 0.0, 0.0, 0.0, dead, False, problem)
    shares = (tally.high / tally.total, tally.constant_features(), tally.beyond / tally.total, dead)
    return InputReport(module, operand, *shares, tally.calibrated, problem or _problem(tally, *shares))


def _problem(tally: _Tally, high: float, constant: float, beyond: float, dead: float) -> str | None:
    """The worst problem, in words; None if there is none."""
    if tally.nonfinite:
        return f"{tally.nonfinite} of {tally.total} values of its input are NaN or infinite: their signs mean nothing"
    if high == 1 and tally.unsigned:
        return "its input is never below the threshold: it says nothing; calibrate its levels (hf_bnn.calibrate_)"
    if high == 1:
        return (
            "its input is never below the threshold (is it the output of a ReLU?): every sign is +1 and says nothing; "
            "put a BatchNorm before it, give it unsigned levels, or exclude it"
        )
    if high == 0:
        return (
            "its input is never above the threshold: every value is on the low level and says nothing; put a "
            "BatchNorm before it, calibrate its levels (hf_bnn.calibrate_), or exclude it"
        )
    if constant > MANY and tally.values >= ENOUGH:
        return (
            f"the sign of {constant:.0%} of its features never changes over the batch: they say nothing; "
            "put a normalization before it, use levels with a learned threshold, or exclude it"
        )
    if beyond > NEARLY_ALL:
        return (
            f"{beyond:.0%} of its input lies beyond the levels, where the straight-through gradient is 0; "
            "put a normalization before it, or use elastic levels and calibrate them (hf_bnn.calibrate_)"
        )
    if dead > MANY:
        return f"{dead:.0%} of its outputs have weights that are all 0: load trained weights, or exclude it"
    return None
