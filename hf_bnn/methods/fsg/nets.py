"""The nets that generate gradients in FSG, with a selective state-space block for many very short sequences."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from . import Fsg


class SelectiveScan(nn.Module):
    """Mamba's block (arXiv 2312.00752, fig. 3 and algorithm 2): `(batch, time, d_model) -> (batch, time, d_model)`.

    With (x, z) = in_proj(u), x = silu(conv1d(x)), (dt, B, C) = x_proj(x), dt = softplus(dt_proj(dt)), A = -exp(A_log):
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = C_t h_t + D x_t,   out = out_proj(y silu(z))
    per inner channel, with a state h of `d_state` values and h_0 = 0. Parameters have the names and shapes of Mamba's.

    Deviations at initialization: the steps dt lie between `dt_min` and `dt_max`, because the paper's 0.001 to 0.1 suit
    thousands of tokens, and B and C are about as large as x. With the paper's values the state would carry almost no
    signal, and tokens older than the convolution's kernel would be lost.

    >>> block = SelectiveScan(d_model=8)
    >>> block(torch.randn(5, 6, 8)).shape, block(torch.randn(5, 6, 8), last_only=True).shape
    (torch.Size([5, 6, 8]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 4,
        d_conv: int = 4,
        expand: int = 2,
        dt_min: float = 0.1,
        dt_max: float = 1.0,
    ):
        super().__init__()
        inner, self.rank, self.d_state = expand * d_model, math.ceil(d_model / 16), d_state
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        nn.init.normal_(self.x_proj.weight)
        with torch.no_grad():
            dt = torch.empty(inner).uniform_(math.log(dt_min), math.log(dt_max)).exp()
            self.dt_proj.bias.copy_(dt + (-dt).expm1().neg().log())  # the inverse of softplus

    def forward(self, u: Tensor, last_only: bool = False) -> Tensor:
        """`last_only`: return the output at the last time only, `(batch, d_model)`, at a fraction of the cost."""
        # Inside, the batch comes last, (channels, time, batch): only this dimension is long enough to vectorize over.
        u = u.permute(2, 1, 0)
        into_x, into_z = self.in_proj.weight.chunk(2)
        x = F.silu(self._convolve(_mix(into_x, u)))
        dt, B, C = _mix(self.x_proj.weight, x).split([self.rank, self.d_state, self.d_state])
        dt = F.softplus(_mix(self.dt_proj.weight, dt) + self.dt_proj.bias[:, None, None])
        if last_only:
            x_last, u = x[:, -1:], u[:, -1:]
            y = self._last_state_read(dt, x, B, C[:, -1]).unsqueeze(1)
        else:
            x_last = x
            y = self._states_read(dt, x, B, C)
        y = (y + self.D[:, None, None] * x_last) * F.silu(_mix(into_z, u))
        out = _mix(self.out_proj.weight, y).permute(2, 1, 0)
        return out[:, 0] if last_only else out

    def _convolve(self, x: Tensor) -> Tensor:
        """The causal convolution of each channel over time. `F.conv1d` takes several times as long for few tokens."""
        kernel, time = self.conv1d.weight[:, 0], x.shape[1]
        y = x * kernel[:, -1, None, None] + self.conv1d.bias[:, None, None]
        for lag in range(1, min(kernel.shape[1], time)):
            y = y + F.pad(x[:, : time - lag] * kernel[:, -1 - lag, None, None], (0, 0, lag, 0))
        return y

    def _states_read(self, dt: Tensor, x: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """C_t h_t for every t, by the recurrence."""
        A = -self.A_log.exp()[:, :, None]
        state = x.new_zeros(x.shape[0], self.d_state, x.shape[2])
        read = []
        for t in range(x.shape[1]):
            state = (dt[:, None, t] * A).exp() * state + (dt[:, t] * x[:, t])[:, None] * B[:, t]
            read.append((state * C[:, t]).sum(1))
        return torch.stack(read, 1)

    def _last_state_read(self, dt: Tensor, x: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """C_T h_T: the sum over s of dt_s x_s times the sum over states of C_T B_s exp(A (dt_s+1 + ... + dt_T)).

        This unrolls the recurrence, so that neither pass has to follow a chain over time.
        """
        A = -self.A_log.exp()
        gate = B * C[:, None]  # (d_state, time, batch)
        elapsed = dt[:, 1:].flip(1).cumsum(1).flip(1)
        older = sum((A[:, n, None, None] * elapsed).exp() * gate[n, :-1] for n in range(self.d_state))
        input_ = dt * x
        return (older * input_[:, :-1]).sum(1) + input_[:, -1] * gate[:, -1].sum(0)


def _mix(weight: Tensor, x: Tensor) -> Tensor:
    """A linear map of the channels: `(out, in)` and `(in, time, batch)` to `(out, time, batch)`."""
    return (weight @ x.flatten(1)).unflatten(1, x.shape[1:])


class Recurrence(nn.LSTM):
    """An LSTM in a SelectiveScan's place: `(batch, time, d_model)` to its last output `(batch, d_model)`."""

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int):  # it does not use the last three
        super().__init__(d_model, d_model, batch_first=True)

    def forward(self, u: Tensor, last_only: bool = True) -> Tensor:
        return super().forward(u)[0][:, -1]


BLOCKS: dict[str, type[nn.Module]] = {"mamba": SelectiveScan, "lstm": Recurrence}


class SlowNet(nn.Module):
    """FSG's slow net (arXiv 2412.11777): one layer's gradients at some steps, `(time, n)`, to a gradient, `(n,)`.

    A token is `chunk` adjacent weights at one step. Each chunk is a sequence along time, which begins with the layer's
    recognition embedding. Deviation: the authors' code concatenates the steps, so that the same weight one step earlier
    is n tokens away; there neither the older steps nor the embedding have an effect.

    >>> net = SlowNet(SelectiveScan(8), layers=3, chunk=4, d_model=8)
    >>> net(torch.randn(5, 10), layer=2).shape
    torch.Size([10])
    """

    def __init__(self, block: nn.Module, layers: int, chunk: int, d_model: int):
        super().__init__()
        self.chunk = chunk
        self.layers = nn.Parameter(torch.randn(layers, d_model))
        self.into = nn.Linear(chunk, d_model)
        nn.init.normal_(self.into.weight, std=chunk**-0.5)  # gradients of RMS 1 come in as large as the embedding
        self.block = block
        self.out = nn.Linear(d_model, chunk)

    def forward(self, gradients: Tensor, layer: int) -> Tensor:
        n = gradients.shape[1]
        tokens = self.into(F.pad(gradients, (0, -n % self.chunk)).unflatten(1, (-1, self.chunk)))
        u = torch.cat([self.layers[layer].expand(1, *tokens.shape[1:]), tokens])
        return self.out(self.block(u.transpose(0, 1), last_only=True)).flatten()[:n]


class FastNet(nn.Module):
    """FSG's fast net: a scale for each weight, `(n,) -> (n,)`, by an MLP of one input.

    >>> FastNet(32)(torch.randn(10)).shape
    torch.Size([10])
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.into, self.out = nn.Linear(1, hidden), nn.Linear(hidden, 1)

    def forward(self, value: Tensor) -> Tensor:
        return self.out(self.into(value.unsqueeze(1)).tanh()).squeeze(1)


def make_nets(method: "Fsg", layers: int) -> nn.ModuleDict:
    """The nets that `method` needs, which all layers share. They are on the CPU, and equal for equal seeds."""
    # Not torch.manual_seed, which would also seed the generators of all other devices, and not restore them.
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
