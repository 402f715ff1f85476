"""Whatever the scheduler, the referee asks it the same questions, and the search is told the same events."""

import math
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule

from hparam_search import new_scheduler
from search.display import Display
from search.records import Search, Trial, open_search
from search.referee import Referee, Watcher, error_sentence
from search.schedulers import STOPPED, Promotion, RayScheduler, Scheduler, early_stop
from search.trackers import Trackers
from search.trial import TRAINING_FILE, prune, weights_path
from tests.helpers import CONFIG, END, NAN, add, report, search_in, tell


def referee_of(search: Search, scheduler: Scheduler) -> Referee:
    display = Display(search, scheduler.rungs, None, Trackers([]))
    return Referee(search, scheduler, partial(early_stop, 4, None, 0.0, None), display, 5)


class Noting(FIFOScheduler):
    """Notes what a scheduler of Ray's is told, and stops trials with a loss of 3 after two epochs."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def on_trial_add(self, controller: object, trial: Trial) -> None:
        self.told.append((trial.trial_id, "begins"))

    def on_trial_result(self, controller: object, trial: Trial, result: dict) -> str:
        self.told.append((trial.trial_id, result["epoch"], result["loss"]))
        return self.STOP if self.told[-1][1:] == (2, 3.0) else self.CONTINUE

    def on_trial_complete(self, controller: object, trial: Trial, result: dict) -> None:
        self.told.append((trial.trial_id, "ended after", result["epoch"]))


def new(kind: str, search: Search) -> Scheduler:
    if kind == "noting":
        return RayScheduler(Noting(), search.history)
    if kind != "median":
        return new_scheduler(search, 4)
    rule = MedianStoppingRule("epoch", "loss", "min", grace_period=2, min_time_slice=math.inf)
    return RayScheduler(rule, search.history)


# Trial, epoch and loss of each report.
STORY = [
    *[("a", 1, 1.0), ("a", 2, 1.0), ("b", 1, 3.0), ("b", 2, 1.0), ("c", 1, 7.0), ("c", 2, 1.0)],
    ("b", 2, 9.0),  # b restarts after epoch 1: told twice, the median rule would find its mean above d's losses
    *[("repeat", 1, 50.0), ("repeat", 2, 50.0), ("d", 1, 3.0), ("d", 2, 3.0), ("a", 3, 1.0), ("c", 3, NAN)],
    ("a", 4, 1.0),
]
# What Ray's schedulers are told of it.
A, B, C, D = ("00000", "00001", "00002", "00003")
TOLD = [
    *[(A, "begins"), (A, 1, 1.0), (A, 2, 1.0), (B, "begins"), (B, 1, 3.0), (B, 2, 1.0), (C, "begins"), (C, 1, 7.0)],
    *[(C, 2, 1.0), (D, "begins"), (D, 1, 3.0), (D, 2, 3.0), (D, "ended after", 2), (A, 3, 1.0), (C, "ended after", 3)],
    (A, "ended after", 4),
]


@pytest.mark.parametrize("reopened_before", [None, 6, 7, 10, 12, 13])
@pytest.mark.parametrize(
    ("kind", "end_of_d"), [("median", STOPPED), ("asha", STOPPED), ("none", None), ("noting", STOPPED)]
)
def test_no_epoch_is_judged_twice_in_whatever_process(
    kind: str, end_of_d: str | None, reopened_before: int | None, tmp_path: Path
) -> None:
    search = search_in(tmp_path, scheduler="asha" if kind == "asha" else "none", grace_period=2, reduction_factor=2.0)
    names = {key: add(search) for key in "abcd"}
    names["repeat"] = add(search, repeats=names["a"])
    for name in names.values():
        search.record("begun", trial=name)
    referee = referee_of(search, new(kind, search))
    for i, (key, epoch, loss) in enumerate(STORY):
        if i == reopened_before:  # another process continues
            search = open_search(tmp_path, {})
            referee = referee_of(search, new(kind, search))
        trial = search.trials[names[key]]
        restored = {"restored": epoch - 1} if epoch <= len(trial.reports) else {}
        # The worker tells the earlier epochs again.
        reports = [vars(report(each, loss=loss)) for each in range(1, epoch + 1)]
        decision = referee.on_trial_result(None, trial.name, {"reports": reports} | restored)
        assert (decision == "STOP") == bool(trial.end)
    ends = {key: search.trials[name].end for key, name in names.items()}
    assert ends == {"a": END, "b": None, "c": "loss became NaN or infinite", "d": end_of_d, "repeat": None}
    assert search.trials[names["b"]].reports[1].loss == 9.0
    if kind == "noting":
        assert referee.scheduler.scheduler.told == TOLD


@pytest.mark.parametrize("late", [False, True])
def test_five_best_of_the_ended_trials_keep_their_weights(late: bool, tmp_path: Path) -> None:
    search, weights = search_in(tmp_path), [weights_path(Path(), epoch).name for epoch in (1, 2, 3)]
    add(search, 0.1, 0.8)  # from an earlier search that has not kept its weights
    for accuracy in (0.3, 0.5, 0.9, 0.45, 0.2, 0.6, 0.4, -1, 0.7):
        name = add(search, accuracy / 2, accuracy, accuracy / 3, end=None if accuracy == 0.9 else END)
        (tmp_path / name).mkdir()
        for file in (TRAINING_FILE, *weights):
            (tmp_path / name / file).touch()
        if not late:
            prune(search, search.ended()[-1:], 5)
    prune(search, search.ended() if late else [], 5)
    left = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in list(search.trials)[1:]]
    best = weights[1:2]
    assert left == [[], best, [TRAINING_FILE, *weights], best, [], best, best, [], best]


def test_what_a_killed_process_left_undone_is_done_at_the_start(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    paused, better, ended = (search.trials[add(search, 0.5, end=end)] for end in (None, None, END))
    for trial, loss in ((paused, 2.0), (better, 1.0)):
        tell(search, trial.name, report(1, loss=loss), paused=True)
    for trial in (paused, better, ended):  # of the last, the process had recorded the end
        (tmp_path / trial.name).mkdir()
        (tmp_path / trial.name / TRAINING_FILE).touch()
    Watcher(referee_of(search, Promotion([paused, better], {1: 1}, 4))).setup()
    assert [trial.end for trial in search.trials.values()] == ["stopped by the scheduler", None, END]
    assert [path.parent.name for path in tmp_path.glob(f"*/{TRAINING_FILE}")] == [better.name]


def test_training_that_returns_too_early_and_a_worker_that_is_lost_are_failures(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    first, second = (search.trials[add(search, 0.5, end=None)] for _ in range(2))
    watcher = Watcher(referee_of(search, Scheduler()))
    watcher.referee.on_trial_complete(None, first.name, {})
    lost = MagicMock(status="ERROR", ERROR="ERROR", error_file=None, __str__=lambda trial: second.name)
    watcher.on_step_end(1, [lost])
    assert [trial.error for trial in (first, second)] == [
        "its training returned before the last epoch",
        "the reason is unknown",
    ]


def test_traceback_comes_down_to_a_sentence() -> None:
    code = '  File "a.py", line 1, in f\n    g()\n    ^^^\n'
    head = "Failure # {} (occurred at 2026-11-23)\nray::train() (pid=1)\n" + code  # of one of several attempts
    memory = "out of memory with batch_size 32, h_1 4, h_2 8; reduce these"
    for text, sentence in (
        ("MemoryError", memory), ("1 worker(s) were killed due to the node running low on memory.", memory),
        ("RuntimeError: CUDA error: out of memory\nCUDA", memory), ("RuntimeError: can't allocate memory: you", memory),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", memory),
        ("RuntimeError: FIND was unable to find an engine to execute this computation", memory),
        ("  [Previous line repeated 9 more times]\nRecursionError: too deep", "RecursionError: too deep"),
        ("ValueError: the reason why\n", "ValueError: the reason why"), ("a.Problem: it\n  is\nso", "a.Problem: it"),
        ("torch.AcceleratorError: CUDA error: no kernel\nFor debugging\n\n    x", "torch.AcceleratorError: CUDA error"),
        ("failed to import on the worker\nImportError: No x\nmore", "cannot import its code (ImportError: No x)"),
    ):  # fmt: skip
        assert error_sentence(f"{head.format(1)}KeyError: x\n\n{head.format(2)}{text}", CONFIG).startswith(sentence)
    assert error_sentence("Failure # 1 (at)\nThe actor died.\n\tclass_name: X\n", CONFIG) == "The actor died"
