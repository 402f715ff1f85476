import functools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule

from hparam_search import new_scheduler
from search.halving import Promotion
from search.hooks import Recorder, ResumableScheduler, TrialQueue, early_stop, error_sentence, prune
from search.records import open_search
from search.settings import Settings
from search.trackers import Trackers
from search.trial import TRAINING_FILE, weights_path
from tests.helpers import CONFIG, END, NAN, add, report, search_in, tell

SCHEDULERS = {
    "asha": lambda: new_scheduler(Settings(scheduler="asha", grace_period=2, reduction_factor=2.0), [], 12),
    "median": lambda: MedianStoppingRule("epoch", "loss", "min", grace_period=2, min_time_slice=math.inf),
    "none": FIFOScheduler,
}


def test_trial_ends_at_the_first_epoch_with_a_reason_to() -> None:
    falling = [5.0 - 0.2 * i for i in range(20)]
    for losses, max_seconds, end in (
        (falling, 1000, "all epochs done"),
        (falling[:5], 50, "reached the time limit (50 s)"),
        ([5.0, 4.95, 4.91, 4.91], 1000, "no progress for 3 epochs"),  # 0.09 is too little
        ([5.0, 6.0, 6.0, 4.0, 4.5, 4.5, NAN], 1000, "loss became NaN or infinite"),
        (falling, None, "all epochs done"),
    ):
        reports = [report(i, loss=loss, seconds=10 * i) for i, loss in enumerate(losses, 1)]
        ends = [early_stop(20, 3, 0.1, max_seconds, reports[:i]) for i in range(1, len(losses) + 1)]
        assert ends == [None] * (len(losses) - 1) + [end]
    assert not early_stop(20, None, 0.1, 1000, [report(i, loss=1.0) for i in range(1, 20)])


@pytest.mark.parametrize("interruptions", [0.0, 0.1])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_decides_like_a_fresh_one(kind: str, interruptions: float, tmp_path: Path) -> None:
    """The fresh one is told each epoch once. Nine trials run; some restart, with other losses; one repeats another."""
    early, controller = functools.partial(early_stop, 12, 3, 0.0, math.inf), SimpleNamespace(get_live_trials=list)
    stopped = 0
    for seed in range(265, 295):  # in one of these, an epoch that the median rule is told twice shows
        generator, search = random.Random(seed), search_in(tmp_path / str(seed))
        waiting = [add(search) for _ in range(8)]
        waiting.insert(4, add(search, repeats=waiting[0]))
        levels = {name: generator.uniform(1, 2) for name in waiting}
        reference, told, running = SCHEDULERS[kind](), {}, []
        tested = ResumableScheduler(SCHEDULERS[kind](), search, early)
        known = {name: search.trials[name] for name in waiting if not search.trials[name].repeats}
        while waiting or running:
            while waiting and len(running) < 3:
                running.append(waiting.pop(0))
                tested.on_trial_add(controller, running[-1])
                if running[-1] in known:
                    reference.on_trial_add(controller, known[running[-1]])
            name = generator.choice(running)
            if generator.random() < interruptions:  # of the search
                search = open_search(search.folder, {})
                tested = ResumableScheduler(SCHEDULERS[kind](), search, early)
                for other in running:
                    tested.on_trial_add(controller, other)
            reports = search.trials[name].reports
            if generator.random() < interruptions:  # of the trial
                search.record("restarted", trial=name, epoch=generator.randint(0, len(reports)))
            epoch = len(reports) + 1
            each = report(epoch, loss=levels[name] + 2 / epoch + generator.gauss(0, 0.3))
            reason = early([*reports, each])
            expected = "STOP" if reason else "CONTINUE"
            if not reason and name in known and epoch > told.get(name, 0):
                expected = reference.on_trial_result(controller, known[name], vars(each))
                stopped += expected == "STOP"
            told[name] = max(epoch, told.get(name, 0))
            assert tested.on_trial_result(controller, name, vars(each)) == expected
            end = reason or ("stopped by the scheduler" if expected == "STOP" else None)
            assert tested.ends.get(name) == end
            tell(search, name, each, end)
            if expected == "STOP":
                running.remove(name)
                tested.on_trial_complete(controller, name, vars(each))
                if name in known:
                    reference.on_trial_complete(controller, known[name], vars(each))
    assert (stopped > 20) == (kind != "none")


def test_five_best_of_the_ended_trials_keep_their_weights(tmp_path: Path) -> None:
    search, weights = search_in(tmp_path), [weights_path(Path(), epoch).name for epoch in (1, 2, 3)]
    files = [TRAINING_FILE, *weights]
    for accuracy in (0.3, 0.5, 0.9, 0.45, 0.2, 0.6, 0.4, -1):
        name = add(search, accuracy / 2, accuracy, accuracy / 3, end=None if accuracy == 0.9 else "ended")
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    prune(search, search.ended(), 5)
    left = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in search.trials]
    expected = [files if i == 2 else weights[1:2] if i in (0, 1, 3, 5, 6) else [] for i in range(8)]
    assert left == expected
    better = add(search, 0.1, 0.7)
    add(search, 0.1, 0.8)  # from an earlier search that has not kept its weights
    (tmp_path / better).mkdir()
    for file in files:
        (tmp_path / better / file).touch()
    prune(search, [search.trials[better]], 5)
    left = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("train_cifar_00005", better)]
    assert left == [weights[1:2], weights[1:2]]
    assert [len(list(tmp_path.glob(f"*/{name}"))) for name in weights] == [1, 6, 1]


def test_what_a_killed_process_left_undone_is_done_at_the_start(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    paused, better, ended = (search.trials[add(search, 0.5, end=end)] for end in (None, None, END))
    for trial, loss in ((paused, 2.0), (better, 1.0)):
        tell(search, trial.name, report(1, loss=loss), paused=True)
    for trial in (paused, better, ended):  # of the last, the process had recorded the end
        (tmp_path / trial.name).mkdir()
        (tmp_path / trial.name / TRAINING_FILE).touch()
    promotion = Promotion([paused, better], {1: 1}, 4)
    Recorder(search, TrialQueue(search, [], promotion, 1, lambda *_: {}), {}, 5, 30, Trackers([])).setup()
    assert [trial.end for trial in search.trials.values()] == ["stopped by the scheduler", None, END]
    assert [path.parent.name for path in tmp_path.glob(f"*/{TRAINING_FILE}")] == [better.name]


def test_traceback_comes_down_to_a_sentence() -> None:
    code = '  File "a.py", line 1, in f\n    g()\n    ^^^\n'
    head = "Failure # {} (occurred at 2026-11-23)\nray::train() (pid=1)\n" + code  # of one of several attempts
    memory = "out of memory with batch_size 32, h_1 4, h_2 8; reduce these"
    for text, sentence in (
        ("MemoryError", memory), ("ray.exceptions.OutOfMemoryError: Task was killed", memory),
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
