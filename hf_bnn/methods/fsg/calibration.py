"""The two views of a latent weight that FSG uses: the fast net's input and the slope of its estimator."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...functional import learning_scale, weight_scale


class Calibration(NamedTuple):
    """Two tensors of the latent weight's shape, float32."""

    value: Tensor  # W~, the input of the fast net
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
