"""What generates FSG's gradients: the history of each layer, and the hook before the optimizer's steps."""

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import exactly, learning_scale, weight_scale
from .base import Site, Step
from .selective_scan import BLOCKS, FastNet, SlowNet
from .unscaled_sign import UnscaledSign

if TYPE_CHECKING:
    from .fsg import Fsg

STATISTICS = ("norm_ratio", "cosine", "phi_update")
SLICE = 4096  # chunks that the slow net takes at once: bounds the memory of its graph, and fits into a CPU's cache
TINY = torch.finfo(torch.float32).tiny


class RawSign(UnscaledSign):
    """sign(W), with the gradient g = dL/dW_hat of W_hat = s sign(W): for an optimizer hook to turn into W's own."""

    def __init__(self, scaling: str):
        super().__init__(scaling)
        self.register_buffer("record", torch.zeros(len(STATISTICS)), persistent=False)
        self.recording = False
        self.hooked_as: int | None = None  # its id when it was hooked: a copy of it is not hooked

    def begin_step(self, layer: nn.Module, step: Step) -> None:
        self.recording = step.log

    def end_backward(self, layer: nn.Module, step: Step) -> None:
        if layer.weight.requires_grad and self.hooked_as != id(self):
            raise RuntimeError(
                "this model's weight gradients are dL/dW_hat, which no optimizer may apply as they are: "
                "call hf_bnn.training.hook_optimizer(model, optimizer, method) before the first step"
            )

    def statistics(self) -> dict[str, float]:
        return dict(zip(STATISTICS, self.record.tolist(), strict=True)) if self.recording else {}


class Calibration(NamedTuple):
    """How a latent weight looks to the method, both of its shape, float32."""

    value: Tensor  # W~, what the fast net sees
    slope: Tensor  # c * gate: the straight-through estimator's gradient is slope * dL/dW_hat


def calibrate(weight: Tensor, binarizer: str) -> Calibration:
    """With T = tanh W. dorefa: W~ = T / (2 max|T|) + 1/2, c = (1 - T^2) / max|T|, gate open (DoReFa-Net, 1606.06160).
    bwn: W~ = W, c = 1, gate |W| <= 1. bwn_channel: the same with c = mean |W| of the output channel.
    """
    weight = weight.detach().float()
    if binarizer == "dorefa":
        T = weight.tanh()
        largest = T.abs().max()
        largest = torch.where(largest == 0, 1.0, largest)
        return Calibration(T / (2 * largest) + 0.5, (1 - T * T) / largest)
    slope = (weight.abs() <= 1).float()
    if binarizer == "bwn_channel":
        slope *= learning_scale(weight_scale(weight), weight[0].numel()).view(-1, *(1,) * (weight.dim() - 1))
    return Calibration(weight, slope)


def make_nets(method: "Fsg", layers: int) -> nn.ModuleDict:
    """The nets that `method` needs, shared by all layers, on the CPU; the same for the same seed."""
    # Not torch.manual_seed: it would also seed, for good, the generators of all other devices.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(method.seed)
        nets = nn.ModuleDict()
        if method.beta > 0:
            block = BLOCKS[method.slow](method.d_model, method.d_state, method.d_conv, method.expand)
            nets["slow"] = SlowNet(block, layers, method.chunk, method.d_model)
        if method.beta < 1:
            nets["fast"] = FastNet(method.fast_hidden)
    if method.init == "ste":
        for net in nets.values():
            nn.init.zeros_(net.out.weight)
            nn.init.zeros_(net.out.bias)
    return nets


class GradientHistory:
    """What one layer's last generated gradient was made of, and its norm: n (length * itemsize + 4) + 4 bytes.

    The ring holds the raw gradients of the last `length` steps. The latent weight is that of the last step.
    """

    def __init__(self, weight: Tensor, length: int, dtype: torch.dtype):
        self.ring = torch.zeros(length, weight.numel(), dtype=dtype, device=weight.device)
        self.weight = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        self.norm = torch.zeros((), device=weight.device)
        self.count = 0

    def push(self, gradient: Tensor, weight: Tensor) -> None:
        self.ring[self.count % len(self.ring)] = gradient
        self.weight.copy_(weight)
        self.count += 1

    def gradients(self, part: slice = slice(None)) -> Tensor:
        """Those of the weights in `part`, `(steps, weights)`, float32, the newest last."""
        length = len(self.ring)
        rows = [step % length for step in range(max(0, self.count - length), self.count)]
        return self.ring[rows, part].float()

    def latest(self) -> Tensor:
        """The newest of them all, `(n,)`, float32."""
        return self.ring[(self.count - 1) % len(self.ring)].float()

    def rms(self) -> Tensor:
        """The root mean square of what the ring holds, a scalar."""
        filled = self.ring[: self.count]
        return torch.linalg.vector_norm(filled, dtype=torch.float32) / math.sqrt(filled.numel())

    def to(self, device: torch.device) -> None:
        self.ring, self.weight, self.norm = (t.to(device) for t in (self.ring, self.weight, self.norm))

    def state_dict(self) -> dict[str, Any]:
        return {"ring": self.ring, "weight": self.weight, "norm": self.norm, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in ("ring", "weight", "norm"):
            getattr(self, key).copy_(state[key])
        self.count = state["count"]


class GradientHook:
    """Replaces, before each step of `optimizer`, the raw weight gradients g = dL/dW_hat by generated ones:

        M = slope (g + beta rms slow(history / rms) + (1 - beta) g fast(W~)),   slope = c * gate

    (without the first g under init="paper", and with its norm set under update_norm="ste").
    First the nets learn from how the last M has done: from -<G / |G|, M / |M|>, where G = slope g is taken at the
    weights that M has led to, averaged over the layers. This is the gradient of the loss through a weight update of the
    form W - lr M, up to a positive factor per layer, without that graph. |M| is a constant if nothing sets it.

    A layer that has no gradient in a step, or is another optimizer's, is left alone. All of it is in float32, and in
    the state dict of `optimizer`.
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
        """Put M into the gradients. Raises ValueError for a closure: it would compute them after this."""
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
        """The layers whose gradient is to be replaced, each weight once."""
        waiting = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = []
        for i, (site, layer) in enumerate(self.layers):
            if id(layer.weight) in waiting and layer.weight.grad is not None:
                _require_whole(site, layer)
                waiting.remove(id(layer.weight))
                found.append(i)
        return found

    def _follow(self) -> torch.device:
        """Move everything to where the weights are now."""
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
        """M of the layer, slice by slice: (which weights, M there)."""
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
        """One step of the nets, for the last M of these layers. Returns its norm if that is logged, else 0."""
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
        """Write the layer's M into its weight's gradient, and remember what it is made of."""
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
            part.record.copy_(torch.stack([norm * _inverse(straight_norm), cosine, change]))
        layer.weight.grad.copy_(M.view_as(layer.weight) * scale)

    # The optimizer's state dict: all of this under the method's name, as tensors and numbers

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
    """1 / norm, or 0 for a norm of 0: nothing is to be learned where nothing was."""
    return torch.where(norm > TINY, 1 / norm, 0.0)


def _require_whole(site: Site, layer: nn.Module) -> None:
    # A sharded weight is a DTensor, which is known by its full_tensor(), or a flat piece.
    if hasattr(layer.weight, "full_tensor") or tuple(layer.weight.shape) != site.weight_shape:
        raise ValueError(
            f"FSG needs whole gradients: the weight of binary layer {site.index} is sharded, or no longer of shape "
            f"{site.weight_shape}. Train without FSDP, and with DeepSpeed ZeRO below stage 2"
        )


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over the processes. They compute the same, but not always to the last bit on a GPU: they would drift apart."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    joined = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for p, mean in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(mean.view_as(p))


def _contents(state: dict[str, Any]) -> Iterator[str]:
    """What the tensors in a hook's state are, in words."""
    for name, tensor in state["nets"].items():
        yield f"{name} of shape {tuple(tensor.shape)}"
    for i, layer in enumerate(state["layers"]):
        for name in ("ring", "weight"):
            yield f"layer {i}'s {name} of shape {tuple(layer[name].shape)} in {layer[name].dtype}"
