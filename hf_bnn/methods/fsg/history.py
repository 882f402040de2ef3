"""The history of one layer's raw gradients, from which FSG generates the next one."""

import math
from typing import Any

import torch
from torch import Tensor


class GradientHistory:
    """The sources of one layer's last generated gradient, and its norm: n (length * itemsize + 4) + 4 bytes.

    The ring holds the raw gradients of the last `length` steps; `weight` is the latent weight of the last step.
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
        """The gradients of the weights in `part`, `(steps, weights)`, float32, the newest last."""
        length = len(self.ring)
        rows = [step % length for step in range(max(0, self.count - length), self.count)]
        return self.ring[rows, part].float()

    def latest(self) -> Tensor:
        """The newest gradient of all weights, `(n,)`, float32."""
        return self.ring[(self.count - 1) % len(self.ring)].float()

    def rms(self) -> Tensor:
        """The root mean square of the gradients in the ring, a scalar."""
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
