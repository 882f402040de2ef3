"""Detects a state dict of the other form, latent or packed, which each layer refuses even if shapes and keys fit."""

from torch import Tensor


def own_form(state_dict: dict[str, Tensor], key: str, own: Tensor, unexpected_keys: list[str]) -> dict[str, Tensor]:
    """The state dict, without the tensor called `key` if that is not of the form of `own`, the weight it is meant for.

    Raises ValueError if it has another shape, too, as `load_state_dict` does with and without strict. If only its
    dtype differs (depthwise kernels, int8 tables), it is reported as unexpected, and `own` as missing.
    """
    weight = state_dict.get(key)
    if weight is None or weight.dtype == own.dtype or (weight.is_floating_point() and own.is_floating_point()):
        return state_dict
    theirs = "latent" if weight.is_floating_point() else "packed"
    way_out = "load it into a latent model (hf_bnn.unpack_(model) makes one), and pack that"
    if own.is_floating_point():
        way_out = "call hf_bnn.pack_(model) before you load it"
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (weight, own)]
    reason = f"{dtypes[0]}, of a {theirs} model's state dict, and this model has {dtypes[1]} there: {way_out}"
    if weight.shape != own.shape:
        raise ValueError(f"{key!r} is {reason}")
    unexpected_keys.append(f"{key} ({reason})")
    return {name: tensor for name, tensor in state_dict.items() if name != key}
