"""Products of two binary activations, and attention that is computed with them."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import exact_matmul, sign
from ..kernels.reference import MASKED
from .latent import BinaryLayer, signs_of
from .levels import BooleanLevels, ElasticLevels, SignedLevels
from .sign_products import matmul_on_bits, takes, whole_precision

if TYPE_CHECKING:
    from ..methods.base import Method, Part, Site


class BinaryMatmul(BinaryLayer):
    """`(..., n, k) @ (..., k, m)` with both operands on two levels.

    >>> import torch
    >>> product = BinaryMatmul(SignedLevels(), SignedLevels()).eval()
    >>> product(torch.ones(2, 3), -torch.ones(3, 1)).flatten()
    tensor([-3., -3.])
    """

    slots = ("left_binarizer", "right_binarizer", "around")
    product = None
    left_retained = False  # whether whatever makes the left operand keeps it for the backward pass

    def __init__(self, left_levels: SignedLevels, right_levels: SignedLevels):
        super().__init__()
        self.left_levels, self.right_levels = left_levels, right_levels

    def make_parts(self, method: "Method", site: "Site") -> "tuple[Part | None, ...]":
        left, right = method.input_binarizer(site, (1, 1)), method.input_binarizer(site, (1, 1))
        return left, right, method.around(site, self)

    def fit_levels(self, *inputs: Tensor) -> None:
        self.left_levels.fit(inputs[0])
        self.right_levels.fit(inputs[1])

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if self.learns(left, right):
            self.raise_unless_trainable()
            return self.around(self._learning_forward, left, right)
        left_signs = sign(left.float() - self.left_levels.threshold())
        right_signs = sign(right.float() - self.right_levels.threshold())
        return self._rescale(left_signs, right_signs, exact_matmul(left_signs, right_signs)).to(left.dtype)

    def _learning_forward(self, left: Tensor, right: Tensor) -> Tensor:
        if self.runs_on_bits:
            left, right = whole_precision(left), whole_precision(right)
        left_signs = signs_of(left, self.left_levels, self.left_binarizer, self.runs_on_bits, self.left_retained)
        right_signs = signs_of(right, self.right_levels, self.right_binarizer, self.runs_on_bits, False)
        pure = self.runs_on_bits and self.left_binarizer.emits_signs and self.right_binarizer.emits_signs
        if pure and takes(None, left_signs, right_signs):
            return self._rescale(left_signs, right_signs, None)
        return self._rescale(left_signs, right_signs, left_signs @ right_signs)

    def _rescale(self, left: Tensor, right: Tensor, product: Tensor | None) -> Tensor:
        """sum (a s + c) (b t + d) = ab sum st + cb sum t + ad sum s + cd k."""
        (a, c), (b, d) = self.left_levels.affine(), self.right_levels.affine()
        y = matmul_on_bits(left, right, torch.as_tensor(a * b)) if product is None else product * (a * b)
        if self.left_levels.shifted:
            y = y + (c * b) * right.sum(-2, keepdim=True)
        if self.right_levels.shifted:
            y = y + (a * d) * left.sum(-1, keepdim=True)
        if self.left_levels.shifted and self.right_levels.shifted:
            y = y + c * d * left.shape[-1]
        return y


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`mask` as numbers to add to scores: of a boolean one, in which True attends, 0 or the smallest of `dtype`.

    Raises ValueError for integers, which may mean either.
    """
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(
            f"an attention mask of {mask.dtype} and shape {tuple(mask.shape)}: expected a boolean one, in which True "
            "attends, or floats to add to the scores; convert it with mask.bool()"
        )
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


class BinaryAttention(nn.Module):
    """softmax(q k^T + mask) v with both products binary (BiT, arXiv 2205.13016, section 3.2).

    A boolean mask is taken as torch takes it: True attends.

    q, k, v `(batch, heads, tokens, head_dim)` are signed; the probabilities take {0, a}, so that a masked token, whose
    probability is 0, still adds nothing. Returns `(batch, heads, tokens, head_dim)` and the float probabilities.

    >>> import torch
    >>> attention = BinaryAttention().eval().requires_grad_(False)
    >>> attention(*torch.randn(3, 1, 2, 5, 8).unbind(), scaling=8**-0.5)[0].shape
    torch.Size([1, 2, 5, 8])
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores = BinaryMatmul(ElasticLevels(), ElasticLevels())
        self.context = BinaryMatmul(ElasticLevels(signed=False, width=0.1), ElasticLevels())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """With `need_weights` False the second output is undefined."""
        scores = self.scores(query, key.transpose(-1, -2)) * scaling
        if (mask := additive_mask(mask, scores.dtype)) is not None:
            scores = scores + mask
        probabilities = scores.softmax(-1)
        kept = F.dropout(probabilities, dropout, self.training) if dropout else probabilities
        self.context.left_retained = kept is probabilities  # by the softmax
        return self.context(kept, value), probabilities


class BooleanAttention(BinaryAttention):
    """bool(q k^T - b) v: no softmax, a query attends to a token or not (BiBERT, arXiv 2203.06390, section 3.3).

    Attention weights are in {0, a}: a where the scaled score reaches a learned threshold b. BiBERT has a = 1 and b = 0;
    here a is fitted to one over the number of attended tokens, so that contexts are about as large as after a softmax.
    A token with a mask below -1000 has weight 0 and gets no gradient. Otherwise as BinaryAttention; the weights are
    returned in place of the probabilities.

    >>> import torch
    >>> attention = BooleanAttention().eval().requires_grad_(False)
    >>> attention(*torch.randn(3, 1, 2, 5, 8).unbind(), scaling=8**-0.5)[1].unique()
    tensor([0.0000, 0.1000])
    """

    def __init__(self) -> None:
        super().__init__()
        self.context = BinaryMatmul(BooleanLevels(), ElasticLevels())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        levels = self.context.left_levels
        scores = self.scores(query, key.transpose(-1, -2)) * scaling
        # Far enough below the threshold that every surrogate gradient is 0, but finite, because methods compute
        # statistics of the scores. It moves with the threshold, so that neither learns from the other.
        low = (levels.threshold() - 2).to(scores.dtype)
        if (mask := additive_mask(mask, scores.dtype)) is not None:
            scores = torch.where(mask < MASKED, low, scores + mask)
        if dropout and self.training:
            scores = torch.where(torch.rand_like(scores) < dropout, low, scores)
        context = self.context(scores, value)
        if not need_weights:
            return context, None
        scale, shift = levels.affine()
        return context, torch.where(scores.float() < levels.threshold(), shift - scale, shift + scale).to(scores.dtype)
