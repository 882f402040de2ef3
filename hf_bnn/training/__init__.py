"""Training of binary models. The names exported here serve training loops of your own, and need torch only."""

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
