"""Hyperparameter search: every trial is trained as a run of its own with the same arguments would be."""

from typing import ClassVar

import pytest
from test_preparation import AtBegin
from test_trainer import arguments, rows
from tiny import different, tiny_float_bert, tiny_model
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_bnn import BinaryTrainer, Fsg, Surge

optuna = pytest.importorskip("optuna")  # transformers takes nothing else for a trial


class Backend:
    """Tries a list of hyperparameters, one after the other, as transformers' backends do it."""

    trials: ClassVar[list[dict]] = []

    def ensure_available(self) -> None:
        pass

    def run(self, trainer, n_trials: int, direction: str) -> BestRun:
        for chosen in self.trials:
            trainer.objective = None
            trainer.train(trial=optuna.trial.FixedTrial(chosen))
            trainer.model_wrapped = trainer.model = None
            trainer.accelerator.clear()
        return BestRun("0", 0.0, self.trials[0])


@pytest.fixture
def search(monkeypatch):
    """search(trainer, trials): one run for each dict of hyperparameters."""
    monkeypatch.setattr("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", {HPSearchBackend.OPTUNA: Backend})

    def run(trainer: BinaryTrainer, trials: list[dict]) -> None:
        monkeypatch.setattr(Backend, "trials", trials)
        trainer.hyperparameter_search(
            hp_space=lambda trial: dict(trial._params), backend="optuna", n_trials=len(trials)
        )

    return run


class AtEnd(AtBegin):
    """How each run began, and what it ended with."""

    def __init__(self):
        self.runs = []

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.runs.append((args.method, args.method_args, model.config.method, self.fresh, state.global_step, weights))


def made(folder, look, given=None, **kwargs) -> BinaryTrainer:
    args = arguments(folder, **{"max_steps": 2, **kwargs})
    return BinaryTrainer(
        args=args, model_init=lambda: tiny_model(), train_dataset=rows(), callbacks=[look], method=given
    )


TRIALS = [
    {"method": "surge", "method_args": "eta=0.3,aux=shared", "learning_rate": 0.02},
    {"method": "fsg", "seed": 7},
    {"method": "stompp", "calibrate_levels": False},
    {"levels_learning_rate_multiplier": 3.0},
    {"method": "surge", "method_args": "eta=0.3,aux=shared", "learning_rate": 0.02},
]


def test_a_trial_is_the_run_that_its_arguments_describe_whatever_was_tried_before(tmp_path, search):
    look = AtEnd()
    one = made(tmp_path, look)
    search(one, TRIALS)
    assert len(look.runs) == len(TRIALS)
    for trial, run in zip(TRIALS[:4], look.runs[:4], strict=True):
        alone = AtEnd()
        made(tmp_path, alone, **trial).train()
        assert run[:5] == alone.runs[0][:5]
        assert different(run[5], alone.runs[0][5]) == []
    assert different(look.runs[0][5], look.runs[4][5]) == []
    assert [run[3] for run in look.runs] == [False, False, True, False, False]
    assert look.runs[0][2] == Surge(eta=0.3, aux="shared").to_dict()
    assert look.runs[1][2] == Fsg().to_dict()


def test_after_a_search_the_arguments_are_those_of_before(tmp_path, search):
    look = AtEnd()
    one = made(tmp_path, look, seed=3)
    search(one, TRIALS[:2])
    assert (one.args.method, one.args.method_args, one.args.seed) == ("ste", None, 3)
    assert one.args.learning_rate == 0.01
    one.args.method, one.args.method_args = "surge", "eta=0.4"  # what was best, set by hand
    one.train()
    assert look.runs[-1][2]["eta"] == 0.4
    assert one.method == Surge(eta=0.4)


class Patience(TrainerCallback, ExportableState):
    """Counts evaluations, as early stopping does, and saves the count with a checkpoint."""

    def __init__(self, count: int = 0):
        self.count, self.at_begin = count, []

    def state(self) -> dict:
        return {"args": {}, "attributes": {"count": self.count}}

    def on_train_begin(self, *args, **kwargs) -> None:
        self.at_begin.append(self.count)

    def on_step_end(self, *args, **kwargs) -> None:
        self.count += 1


def test_one_trial_does_not_use_up_the_patience_of_the_next(tmp_path, search):
    patience = Patience(5)
    search(made(tmp_path, patience), [{"seed": 1}, {"seed": 2}])
    assert patience.at_begin == [5, 5]


def test_each_trial_hooks_its_own_optimizer_once(tmp_path, search):
    hooked = []

    class Look(AtEnd):
        def on_train_end(self, args, state, control, **kwargs) -> None:
            hooks = [one._hooked._optimizer_step_pre_hooks, one._hooked._optimizer_step_post_hooks]
            hooked.append((one._hooked, sum(len(registered) for registered in hooks)))

    one = made(tmp_path, Look())
    search(one, [{"method": "fsg"}, {"method": "fsg"}, {"method": "ste"}])
    assert [count for _, count in hooked] == [1, 1, 0]
    assert hooked[0][0] is not hooked[1][0]


def test_what_a_trial_says_of_distillation_is_followed(tmp_path, search):
    caches = []

    class Look(AtEnd):
        def on_train_end(self, args, state, control, **kwargs) -> None:
            caches.append((one.teacher_cache, one.teacher_cache.limit_bytes, one.lesson()))

    one = BinaryTrainer(
        args=arguments(tmp_path, max_steps=1, distillation_hidden_weight=0.0),
        model_init=lambda: tiny_model(),
        train_dataset=rows(),
        callbacks=[Look()],
        teacher_model=tiny_float_bert(hidden_size=48),
    )
    search(one, [{"teacher_cache_gb": 1.0}, {"distillation_temperature": 4.0}])
    assert [limit for _, limit, _ in caches] == [2**30, 0]
    assert caches[0][0] is not caches[1][0]
    assert [lesson.temperature for _, _, lesson in caches] == [1.0, 4.0]
    with pytest.raises(ValueError, match="states are 48 wide, the student's 32: set distillation_hidden_weight=0"):
        search(one, [{"distillation_hidden_weight": 1.0}])
    assert one.hp_search_backend is None


def test_hyperparameters_that_cannot_be_are_refused(tmp_path, search):
    one = made(tmp_path, AtEnd())
    with pytest.raises(ValueError, match="unknown method 'surg'; known methods"):
        search(one, [{"method": "surg"}])
    with pytest.raises(ValueError, match=r"aux_learning_rate_multiplier=-1\.0: expected a number > 0"):
        search(one, [{"aux_learning_rate_multiplier": -1.0}])
    given = made(tmp_path, AtEnd(), given=Surge())
    with pytest.raises(ValueError, match=r"method='ste', method_args='eta=0\.9' were set, but BinaryTrainer was given"):
        search(given, [{"method_args": "eta=0.9"}])


def test_optuna_searches_over_methods(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    look = AtEnd()
    args = arguments(tmp_path, max_steps=1)
    one = BinaryTrainer(
        args=args, model_init=lambda: tiny_model(), train_dataset=rows(), eval_dataset=rows(8), callbacks=[look]
    )
    best = one.hyperparameter_search(
        hp_space=lambda trial: {"method": trial.suggest_categorical("method", ["ste", "fsg"])},
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"method": ["ste", "fsg"]}, seed=0),
    )
    assert {run[2]["name"] for run in look.runs} == {"ste", "fsg"}
    assert best.hyperparameters["method"] in ("ste", "fsg")
