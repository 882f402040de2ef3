"""Hyperparameter search with independent trials."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, enable_full_determinism, set_seed
from transformers.trainer_callback import ExportableState


class IndependentTrials(Trainer):
    """A Trainer whose trials of a hyperparameter search all begin in the same state.

    transformers makes the model before it applies the trial's settings. It also keeps the last trial's arguments and
    callback states. Here, a trial's arguments and seed apply when its model is made, and after the search the
    arguments are restored.
    """

    _fields_of_trial: dict[str, Any] | None = None  # the original values of fields that trials changed; None: no search
    _callbacks_before: Sequence[tuple[TrainerCallback, dict[str, Any]]] = ()

    def hyperparameter_search(self, *args: Any, **kwargs: Any):
        stateful = [callback for callback in self.callback_handler.callbacks if isinstance(callback, ExportableState)]
        # For example, how long early stopping has waited.
        self._callbacks_before = [(callback, callback.state()["attributes"]) for callback in stateful]
        self._fields_of_trial = {}
        try:
            return super().hyperparameter_search(*args, **kwargs)
        finally:
            self._restore_fields()
            self._fields_of_trial = None
            self.hp_search_backend = None

    def _restore_fields(self) -> None:
        for name, value in (self._fields_of_trial or {}).items():
            setattr(self.args, name, value)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        if trial is not None and self.hp_search_backend is not None:
            for callback, attributes in self._callbacks_before:
                vars(callback).update(copy.deepcopy(attributes))
            self._hp_search_setup(trial)
            enable_full_determinism(self.args.seed) if self.args.full_determinism else set_seed(self.args.seed)
        return super().call_model_init(trial)

    def _hp_search_setup(self, trial: Any) -> None:
        if self._fields_of_trial is None or trial is None:
            super()._hp_search_setup(trial)
            return
        self._restore_fields()
        before = dict(vars(self.args))
        super()._hp_search_setup(trial)
        changed = {name: value for name, value in before.items() if vars(self.args).get(name) is not value}
        self._fields_of_trial = {**changed, **self._fields_of_trial}
