"""Generates FSG's gradients in a hook before each step of the optimizer."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...functional import exactly
from ..base import RecordingPart, Site, Step
from ..scaled_weight import SignWithScaledWeightGradient
from .calibration import Calibration, calibrate
from .history import GradientHistory
from .nets import make_nets

if TYPE_CHECKING:
    from . import Fsg

SLICE = 4096  # chunks for one call of the slow net: bounds the memory of its graph, and fits into a CPU's cache
TINY = torch.finfo(torch.float32).tiny


class RawSign(RecordingPart, SignWithScaledWeightGradient):
    """sign(W), with the raw gradient g = dL/dW_hat of W_hat = s sign(W), from which a hook makes the gradient of W."""

    statistic_names = ("norm_ratio", "cosine", "phi_update")

    def __init__(self, scaling: str):
        super().__init__(scaling)
        self.hooked_as: int | None = None  # its id when it was hooked: a copy of it is not hooked

    def end_backward(self, layer: nn.Module, step: Step) -> None:
        if layer.weight.requires_grad and self.hooked_as != id(self):
            raise RuntimeError(
                "this model's weight gradients are dL/dW_hat, which no optimizer may apply as they are: "
                "call hf_bnn.training.hook_optimizer(model, optimizer, method) before the first step"
            )


class GradientHook:
    """Replaces the raw weight gradients g = dL/dW_hat by generated ones before each step of `optimizer`:

        M = slope (g + beta rms slow(history / rms) + (1 - beta) g fast(W~)),   slope = c * gate

    Under init="paper" the first g is left out; under update_norm="ste" the norm of M is set.

    The nets learn first, from the effect of the last M. Their loss is -<G / |G|, M / |M|>, averaged over the layers,
    where G = slope g is taken at the weights to which M has led. Up to a positive factor per layer, its gradient is
    that of the training loss through a weight update W - lr M, but it needs no graph of that update. |M| is a constant
    where nothing sets it.

    A layer without a gradient in a step, or of another optimizer, keeps what it has. All computations are in float32.
    The state is part of the state dict of `optimizer`.
    """

    def __init__(self, method: "Fsg", optimizer: torch.optim.Optimizer, layers: list[tuple[Site, nn.Module]]):
        if not layers:
            raise ValueError(f"method {method.name!r} generates the gradients of binary weights: no layer has any")
        for site, layer in layers:
            if not isinstance(layer.weight_binarizer, RawSign):
                raise ValueError(
                    f"method {method.name!r} is not the one in the model, whose layer {site.index} has a "
                    f"{type(layer.weight_binarizer).__name__}: call hf_bnn.install_method(model, method) first"
                )
            _require_whole(site, layer)
        self.method, self.layers = method, layers
        self.nets = make_nets(method, len(layers))
        rates = {"slow": method.slow_lr, "fast": method.fast_lr}
        groups = [{"params": net.parameters(), "lr": rates[name]} for name, net in self.nets.items()]
        # The signal has unit norm. At first some gradients are 0 up to rounding: a smaller eps would blow that up.
        self.adam = torch.optim.Adam(groups, eps=1e-6)
        dtype = getattr(torch, method.history_dtype)
        self.histories = [GradientHistory(layer.weight, method.length, dtype) for _, layer in layers]
        for _, layer in layers:
            layer.weight_binarizer.hooked_as = id(layer.weight_binarizer)
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_state_dict_post_hook(self.save)
        optimizer.register_load_state_dict_pre_hook(self.load)

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Write M to the gradients. Raises ValueError for a closure, which would compute them only after this hook."""
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise ValueError(f"method {self.method.name!r} cannot be used with optimizer.step(closure)")
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:  # a fused optimizer is called even when fp16 overflowed
            return
        active = self._active(optimizer)
        if not active:
            return
        # A fused optimizer divides by the scale itself: the gradients are still multiplied by it.
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else float(scale)
        device = self._follow()
        with exactly(device):
            change = self._learn([i for i in active if self.histories[i].count], scale)
            for i in active:
                self._replace(i, scale, change)

    def _active(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """The indices of the layers whose gradient is to be replaced, each weight once."""
        waiting = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = []
        for i, (site, layer) in enumerate(self.layers):
            if id(layer.weight) in waiting and layer.weight.grad is not None:
                _require_whole(site, layer)
                waiting.remove(id(layer.weight))
                found.append(i)
        return found

    def _follow(self) -> torch.device:
        """Move all state to the device of the weights, and return that device."""
        devices = {layer.weight.device for _, layer in self.layers}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"method {self.method.name!r} needs all binary weights on one device, not on {found}")
        (device,) = devices
        if next(self.nets.parameters()).device != device:
            self.nets.to(device)
            self.adam.load_state_dict(self.adam.state_dict())  # which moves it
            for history in self.histories:
                history.to(device)
        return device

    def _raw(self, index: int, scale: float) -> Tensor:
        """g = dL/dW_hat, `(n,)`, float32."""
        raw = self.layers[index][1].weight.grad.flatten().float()
        return raw if scale == 1.0 else raw / scale

    def _generate(self, index: int, latest: Tensor, calibration: Calibration) -> Iterator[tuple[slice, Tensor]]:
        """M of the layer, slice by slice: (slice of the weights, M of these weights)."""
        history, beta = self.histories[index], self.method.beta
        rms = history.rms()
        value, slope = calibration.value.flatten(), calibration.slope.flatten()
        size = SLICE * self.method.chunk
        for start in range(0, len(latest), size):
            part = slice(start, start + size)
            # Under init="ste" both nets generate what is added to g, so that from zeros M = slope g to the last bit.
            total = latest[part] if self.method.init == "ste" else 0.0
            if "slow" in self.nets:
                gradients = history.gradients(part) / rms.clamp_min(TINY)
                total = total + beta * rms * self.nets["slow"](gradients, index)
            if "fast" in self.nets:
                total = total + (1 - beta) * latest[part] * self.nets["fast"](value[part])
            yield part, slope[part] * total

    def _learn(self, previous: list[int], scale: float) -> Tensor | float:
        """Train the nets for one step on the last M of these layers. Return its norm if it is logged, else 0."""
        if not previous:
            return 0.0
        self.adam.zero_grad()
        for i in previous:
            history, calibration = self.histories[i], calibrate(self.histories[i].weight, self.method.binarizer)
            straight = calibrate(self.layers[i][1].weight, self.method.binarizer).slope.flatten() * self._raw(i, scale)
            direction, inverse = straight * _inverse(straight.norm()), _inverse(history.norm)
            along = 0.0  # of a step whose norm is set, a longer M is not a longer step: only M's direction is learned
            if self.method.update_norm == "ste":
                pieces = self._generate(i, history.latest(), calibration)
                along = sum(torch.dot(direction[part], M) for part, M in pieces) * inverse.square()
            with torch.enable_grad():
                for part, M in self._generate(i, history.latest(), calibration):
                    M.backward((along * M.detach() - direction[part]) * (inverse / len(previous)))
        parameters = list(self.nets.parameters())
        _average_gradients(parameters)
        logged = any(layer.weight_binarizer.recording for _, layer in self.layers)
        before = [p.clone() for p in parameters] if logged else []
        self.adam.step()
        return torch.stack([(p - q).norm() for p, q in zip(parameters, before, strict=True)]).norm() if logged else 0.0

    def _replace(self, index: int, scale: float, change: Tensor | float) -> None:
        """Write M to the gradient of the layer's weight, and keep its sources in the layer's history."""
        layer, history = self.layers[index][1], self.histories[index]
        raw, calibration = self._raw(index, scale), calibrate(layer.weight, self.method.binarizer)
        history.push(raw, layer.weight)
        M = torch.cat([m for _, m in self._generate(index, raw, calibration)])
        straight = calibration.slope.flatten() * raw
        norm, straight_norm = M.norm(), straight.norm()
        history.norm.copy_(norm)
        if self.method.update_norm == "ste":  # of equal norms the ratio is 1 and M stays as it is
            M *= torch.where(norm > TINY, straight_norm / norm, 1.0)
        part = layer.weight_binarizer
        if part.recording:
            norm, change = M.norm(), torch.as_tensor(change, device=M.device)
            cosine = torch.dot(M, straight) * _inverse(norm) * _inverse(straight_norm)
            part.recorded.copy_(torch.stack([norm * _inverse(straight_norm), cosine, change]))
        layer.weight.grad.copy_(M.view_as(layer.weight) * scale)

    # State: under the method's name in the optimizer's state dict, as tensors and numbers

    def save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict[self.method.name] = {
            "nets": dict(self.nets.state_dict()),
            "adam": self.adam.state_dict(),
            "layers": [history.state_dict() for history in self.histories],
        }
        return state_dict

    def load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError if `state_dict` was written without this method, or for other layers or settings."""
        name = self.method.name
        if name not in state_dict:
            raise ValueError(
                f"the optimizer's checkpoint was written without method {name!r}: resume with the same --method"
            )
        saved, own = state_dict[name], self.save(optimizer, {})[name]
        for found, expected in zip_longest(_contents(saved), _contents(own), fillvalue="nothing"):
            if found != expected:
                raise ValueError(
                    f"the optimizer's state of method {name!r} does not fit: the checkpoint has {found} where this "
                    f"run has {expected}; resume with the same model and --method_args"
                )
        self.nets.load_state_dict(saved["nets"])
        self.adam.load_state_dict(saved["adam"])
        for history, state in zip(self.histories, saved["layers"], strict=True):
            history.load_state_dict(state)
        return {key: value for key, value in state_dict.items() if key != name}


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm, or 0 for a norm of 0, so that a zero gradient teaches the nets nothing."""
    return torch.where(norm > TINY, 1 / norm, 0.0)


def _require_whole(site: Site, layer: nn.Module) -> None:
    # A sharded weight is a flat piece, or a DTensor, which has a full_tensor().
    if hasattr(layer.weight, "full_tensor") or tuple(layer.weight.shape) != site.weight_shape:
        raise ValueError(
            f"FSG needs whole gradients: the weight of binary layer {site.index} is sharded, or no longer of shape "
            f"{site.weight_shape}. Train without FSDP, and with DeepSpeed ZeRO below stage 2"
        )


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over processes, in place.

    The processes compute equal gradients, but on a GPU not always to the last bit: without this they would drift apart.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    joined = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for p, mean in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(mean.view_as(p))


def _contents(state: dict[str, Any]) -> Iterator[str]:
    """A description of each tensor in a hook's state."""
    for name, tensor in state["nets"].items():
        yield f"{name} of shape {tuple(tensor.shape)}"
    for i, layer in enumerate(state["layers"]):
        for name in ("ring", "weight"):
            yield f"layer {i}'s {name} of shape {tuple(layer[name].shape)} in {layer[name].dtype}"
