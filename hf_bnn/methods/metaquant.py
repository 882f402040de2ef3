"""MetaQuant: the fast half of FSG alone."""

from dataclasses import dataclass
from typing import ClassVar

from .fsg import Fsg


@dataclass(frozen=True)
class MetaQuant(Fsg):
    """MetaQuant (NeurIPS 2019, arXiv 1910.00517): the latent weight's gradient is M = c gate g f(W~).

    g = dL/dW_hat is the raw gradient, f an MLP of one input that all layers share and that Adam trains (`fast_lr`) on
    the next step's loss; W~, c and gate are those of `binarizer` (see fsg/calibration.py). This is FSG with beta = 0
    and a history of one step, with FSG's other arguments and deviations: f starts as 1 unless `init` is "paper".

    >>> MetaQuant().binarizer, MetaQuant().beta
    ('dorefa', 0.0)
    """

    name: ClassVar[str] = "metaquant"
    paper: ClassVar[str] = "MetaQuant, NeurIPS 2019, arXiv 1910.00517"
    idea: ClassVar[str] = "the latent weights' gradients are scaled by a small net of the weights"

    length: int = 1
    beta: float = 0.0
    binarizer: str = "dorefa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta != 0:
            raise ValueError(f"beta={self.beta}: MetaQuant has no slow net, so that it stays 0; fsg has one")
