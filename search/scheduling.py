"""Tune's view of a search that is resumed: which trials are left, and what its scheduler has seen."""

from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.sample import Domain


class ResumedASHA(ASHAScheduler):
    """ASHA that lets trials pass where an earlier process of the same search did, whoever has reported since.

    Args:
        passed: of each trial that goes on, by name, the epochs that it has reported already.
        kwargs: of ASHAScheduler.
    """

    def __init__(self, passed: dict[str, set[int]], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.passed = passed

    def on_trial_result(self, tune_controller: object, trial: object, result: dict) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result["epoch"] in self.passed.get(str(trial), ()) else decision


class Drawn(Domain):
    """A hyperparameter whose values are drawn already, by draw_trials: whichever value a trial has is valid.

    Tune copies its space for every trial, so that a list of all values would take time that grows with their square.
    """

    def is_valid(self, value: object) -> bool:
        return True
