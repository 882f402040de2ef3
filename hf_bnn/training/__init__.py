"""Training of binary models. What a loop of your own needs is imported here, and needs torch only."""

from ..install import load_method_state, method_state, method_state_names, parts
from .loop import (
    ParameterRoles,
    begin_step,
    end_backward,
    first_nonfinite_layer,
    hook_optimizer,
    parameter_roles,
    partial_evaluation,
    split_groups,
    statistics,
)

__all__ = [
    "ParameterRoles",
    "begin_step",
    "end_backward",
    "first_nonfinite_layer",
    "hook_optimizer",
    "load_method_state",
    "method_state",
    "method_state_names",
    "parameter_roles",
    "partial_evaluation",
    "parts",
    "split_groups",
    "statistics",
]
