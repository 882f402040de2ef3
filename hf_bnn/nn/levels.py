"""The two values of a binary tensor: `scale * s + shift`, s in {-1, +1}. They belong to the model, not the method."""

import torch
from torch import Tensor, nn

from ..estimators import normalized

SMALLEST_SCALE = 1e-5
LLOYD_ITERATIONS = 10
OFFLOADED_LEVELS = (
    "learned levels cannot be offloaded to the CPU or the disk: accelerate fetches what is offloaded when a module is "
    "called, and levels are only read. Load the model anew with a device_map that leaves the binary layers on a "
    "device, or train it with levels='signed'"
)


class SignedLevels(nn.Module):
    """{-1, +1}: the plain sign. The base of all levels.

    >>> levels = SignedLevels()
    >>> levels.normalize(torch.tensor([-0.3, 0.2]))
    tensor([-0.3000,  0.2000])
    """

    shifted = False  # whether `affine` has a shift: products then need the sum of the other operand

    def threshold(self) -> Tensor | float:
        """Inputs below it take the low level."""
        return 0.0

    def normalize(self, x: Tensor) -> Tensor:
        """The number whose sign is taken, in units in which the levels are -1 and +1. Same shape as `x`."""
        return x

    def normalize_compactly(self, x: Tensor, retained: bool) -> Tensor:
        """`normalize`, keeping little of `x` for the backward pass: see `estimators.normalized`."""
        return self.normalize(x)

    def affine(self) -> tuple[Tensor | float, Tensor | float]:
        """(scale, shift): the levels are `scale * s + shift`."""
        return 1.0, 0.0

    def fit(self, x: Tensor) -> None:
        """Fit learned levels to `x`, in place. Fixed levels stay."""


class UnsignedLevels(SignedLevels):
    """{0, 1}, decided at 1/2: for inputs that are hardly ever negative (after GELU or a softmax).

    >>> UnsignedLevels().affine()
    (0.5, 0.5)
    """

    shifted = True

    def threshold(self) -> float:
        return 0.5

    def normalize(self, x: Tensor) -> Tensor:
        return 2 * x - 1

    def affine(self) -> tuple[float, float]:
        return 0.5, 0.5


class LearnedLevels(SignedLevels):
    """The base of levels with parameters. They are fresh until they are fitted or loaded."""

    fresh = True

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_hf_hook" and any(
            getattr(hook, "offload", False) for hook in (value, *getattr(value, "hooks", ()))
        ):
            raise ValueError(OFFLOADED_LEVELS)
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Back to the initial values."""
        self.fresh = True

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.fresh = self.fresh and not any(f"{prefix}{name}" in state_dict for name, _ in self.named_parameters())


class ThresholdLevels(LearnedLevels):
    """{-1, 1} around a learned threshold per channel (RSign of ReActNet, arXiv 2003.03488, eq. 4), for `(N, C, H, W)`.

    >>> ThresholdLevels(16).threshold().shape
    torch.Size([16, 1, 1])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.offset = nn.Parameter(torch.empty(channels, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.offset)

    def threshold(self) -> Tensor:
        return self.offset

    def normalize(self, x: Tensor) -> Tensor:
        return x - self.offset

    def fit(self, x: Tensor) -> None:
        """Nothing to fit: after a batch normalization, 0 halves the inputs."""
        self.fresh = False

    def extra_repr(self) -> str:
        return f"channels={self.offset.shape[0]}"


class ElasticLevels(LearnedLevels):
    """{-a, a}, or {0, a} if not signed, around a learned b (BiT's elastic binarization, arXiv 2205.13016, eq. 5).

    `width` is the paper's alpha, `offset` its beta, both of shape (1,): FSDP2 shards no scalars. The sign is that of
    (x - b) / a, or of 2 (x - b) / a - 1; the gradients of a and b are those of the straight-through estimator.

    >>> ElasticLevels(signed=False).threshold()
    tensor(0.5000, grad_fn=<AddBackward0>)
    """

    def __init__(self, signed: bool = True, width: float = 1.0):
        super().__init__()
        self.signed = signed
        self.shifted = not signed
        self.initial_width = width
        self.width = nn.Parameter(torch.empty(1))
        self.offset = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.width, self.initial_width)
        nn.init.zeros_(self.offset)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the width of least squared error for a threshold of 0, or of half the width if not signed (Lloyd-Max).

        Levels that were fitted or loaded before stay as they are.
        """
        if not self.fresh or x.numel() == 0:
            return
        magnitude = x.float().abs()
        width = magnitude.mean()
        if not self.signed:
            for _ in range(LLOYD_ITERATIONS):
                above = x[x > width / 2]
                width = above.float().mean() if above.numel() else width
        if width > SMALLEST_SCALE:
            self.width.fill_(width)
        self.fresh = False

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        for name, parameter in self.named_parameters():  # scalars are how levels used to be saved
            if (saved := state_dict.get(f"{prefix}{name}")) is not None and saved.dim() == 0:
                state_dict[f"{prefix}{name}"] = saved.view(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _positive_width(self) -> Tensor:
        return self.width.view(()).abs().clamp_min(SMALLEST_SCALE)

    def threshold(self) -> Tensor:
        offset = self.offset.view(())  # 0-d, so that inputs of any shape keep theirs
        return offset if self.signed else offset + self._positive_width() / 2

    def normalize(self, x: Tensor) -> Tensor:
        width = self._positive_width()
        return normalized(x, self.threshold(), width if self.signed else width / 2)

    def normalize_compactly(self, x: Tensor, retained: bool) -> Tensor:
        width = self._positive_width()
        return normalized(x, self.threshold(), width if self.signed else width / 2, compact=True, retained=retained)

    def affine(self) -> tuple[Tensor, Tensor | float]:
        width = self._positive_width()
        return (width, 0.0) if self.signed else (width / 2, width / 2)

    def extra_repr(self) -> str:
        return f"signed={self.signed}"


class BooleanLevels(ElasticLevels):
    """{0, a} around a learned b, for attention scores (bool(A), BiBERT, arXiv 2203.06390).

    Scores are not divided by a, because their size is unrelated to it: the straight-through estimator passes the
    gradient of scores within 1 of b. BiBERT has a = 1 and b = 0.

    >>> BooleanLevels().normalize(torch.tensor([-0.3, 0.2]))
    tensor([-0.3000,  0.2000], grad_fn=<SubBackward0>)
    """

    def __init__(self) -> None:
        super().__init__(signed=False, width=0.1)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the width so that rows of `x` sum to 1 on average, as after a softmax. b stays.

        Levels that were fitted or loaded before stay as they are.
        """
        if not self.fresh or x.numel() == 0:
            return
        attended = (x >= self.offset).sum(-1).float().mean()
        if attended > 0:
            self.width.fill_(1 / attended)
        self.fresh = False

    def threshold(self) -> Tensor:
        return self.offset.view(())

    def normalize(self, x: Tensor) -> Tensor:
        return x - self.threshold()

    def normalize_compactly(self, x: Tensor, retained: bool) -> Tensor:
        return self.normalize(x)

    def extra_repr(self) -> str:
        return ""
