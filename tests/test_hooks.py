import functools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule, TrialScheduler

from hparam_search import new_scheduler
from search.hooks import KnownTrial, ResumableScheduler, TrialQueue, early_stop, error_sentence, prune
from search.records import open_search
from search.settings import Settings
from search.trial import TRAINING_FILE, weights_path
from tests.helpers import CONFIG, add_trial, report, search_in, tell

EPOCHS = 12
SCHEDULERS = {
    "asha": lambda: new_scheduler(Settings(grace_period=2, reduction_factor=2.0), EPOCHS),
    "median": lambda: MedianStoppingRule("epoch", "loss", "min", grace_period=2, min_time_slice=math.inf),
    "none": FIFOScheduler,
}


def ends(losses: list[float], **limits: float) -> list[str]:
    """Return why a trial ends at its first epoch with a reason to, after that epoch."""
    limits = {"max_epochs": 20, "patience": 3, "min_delta": 0.1, "max_seconds": 1000} | limits
    reports = [report(i, loss=loss, seconds=10 * i) for i, loss in enumerate(losses, 1)]
    reasons = [early_stop(reports=reports[:i], **limits) for i in range(1, len(losses) + 1)]
    return next(([i, reason] for i, reason in enumerate(reasons, 1) if reason), None)


def test_trials_end_early_for_a_reason() -> None:
    falling = [5.0 - 0.2 * i for i in range(30)]
    assert ends(falling) == [20, "all epochs done"]
    assert ends(falling, max_seconds=50) == [5, "reached the time limit (50 s)"]
    assert ends([5.0, 4.0, 4.0, 4.0, 4.0]) == [5, "no progress for 3 epochs"]
    assert ends([5.0, 4.95, 4.91, 4.91]) == [4, "no progress for 3 epochs"]  # 0.09 is too little
    assert ends([5.0, 6.0, 6.0, 4.0, 4.5, 4.5]) is None
    assert ends([5.0, math.nan]) == [2, "loss became NaN or infinite"]


@pytest.mark.parametrize("interruptions", [0.0, 0.1])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_decides_like_a_fresh_one_told_each_epoch_once(
    scheduler: str, interruptions: float, tmp_path: Path
) -> None:
    """Nine trials run, three at a time; some restart, with other losses; the last one repeats another."""
    early, controller = functools.partial(early_stop, EPOCHS, 3, 0.0, math.inf), SimpleNamespace(get_live_trials=list)
    stopped = 0
    for seed in range(30):
        generator, search = random.Random(seed), search_in(tmp_path)
        (tmp_path / "log.jsonl").unlink(missing_ok=True)
        waiting = [add_trial(search, []) for _ in range(8)]
        waiting.insert(4, add_trial(search, [], repeats=waiting[0]))
        levels = {name: generator.uniform(1, 2) for name in waiting}
        reference, known, told = SCHEDULERS[scheduler](), {}, {}
        tested, running = ResumableScheduler(SCHEDULERS[scheduler](), search, early), []
        while waiting or running:
            while waiting and len(running) < 3:
                running.append(waiting.pop(0))
                tested.on_trial_add(controller, running[-1])
                if not search.trials[running[-1]].repeats:
                    known[running[-1]] = KnownTrial(running[-1])
                    reference.on_trial_add(controller, known[running[-1]])
            name = generator.choice(running)
            if generator.random() < interruptions:  # of the search
                search = open_search(tmp_path, {})
                tested = ResumableScheduler(SCHEDULERS[scheduler](), search, early)
                for other in running:
                    tested.on_trial_add(controller, other)
            if generator.random() < interruptions:  # of the trial
                search.record("restarted", trial=name, epoch=generator.randint(0, len(search.trials[name].reports)))
            reports = search.trials[name].reports
            epoch = len(reports) + 1
            each = report(epoch, loss=levels[name] + 2 / epoch + generator.gauss(0, 0.3))
            expected = TrialScheduler.CONTINUE
            if early([*reports, each]):
                expected = TrialScheduler.STOP
            elif name in known and epoch > told.get(name, 0):
                expected = reference.on_trial_result(controller, known[name], vars(each))
                stopped += expected == TrialScheduler.STOP
            told[name] = max(epoch, told.get(name, 0))
            assert tested.on_trial_result(controller, name, vars(each)) == expected
            end = None
            if expected == TrialScheduler.STOP:
                end = tested.reasons.get(name, "stopped by the scheduler")
                assert (end == "stopped by the scheduler") == (early([*reports, each]) is None)
                tested.on_trial_complete(controller, name, vars(each))
                if name in known:
                    reference.on_trial_complete(controller, known[name], vars(each))
                running.remove(name)
            tell(search, name, each, end)
    assert (stopped > 20) == (scheduler != "none")


def test_queue_hands_out_what_has_not_ended_and_draws_what_is_not_drawn(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    add_trial(search, [0.3, 0.6])
    add_trial(search, [-1])
    failed = add_trial(search, [0.5], end=None)
    search.draw([{}, {}, {}, {"epochs": 4}])
    calls = []
    queue = TrialQueue(search, lambda number, outcomes: calls.append((number, outcomes)) or CONFIG | {"lr": 0.123})
    handed = [queue.suggest(f"id {i}") for i in range(3)]
    assert handed == [CONFIG, CONFIG | {"lr": 0.123}, queue.FINISHED]
    assert list(queue.names.values()) == [failed, "train_cifar_00003"]
    assert calls == [(3, [(CONFIG, 0.6), (CONFIG, 0.6)])]  # what diverged counts as the worst
    assert repr(open_search(tmp_path, {})) == repr(search)


def test_five_best_of_the_ended_trials_keep_their_weights(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    for accuracy in (0.3, 0.5, 0.9, 0.45, 0.2, 0.6, 0.4, -1):
        name = add_trial(search, [accuracy / 2, accuracy, accuracy / 3], end=None if accuracy == 0.9 else "done")
        (tmp_path / name).mkdir()
        for path in (*(weights_path(tmp_path / name, epoch) for epoch in (1, 2, 3)), tmp_path / name / TRAINING_FILE):
            path.touch()
    prune(search, search.ended(), 5)
    left = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in search.trials}
    whole = [TRAINING_FILE, *(weights_path(tmp_path, epoch).name for epoch in (1, 2, 3))]
    kept = [whole if i == 2 else [whole[2]] if i in (0, 1, 3, 5, 6) else [] for i in range(8)]
    assert list(left.values()) == kept


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("MemoryError", "out of memory with batch_size 32, h_1 4, h_2 8; reduce these, or run fewer trials"),
        ("ray.exceptions.OutOfMemoryError: Task was killed", "out of memory with"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you", "out of memory with"),
        ("RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be", "out of memory with"),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "out of memory"),
        ("RuntimeError: FIND was unable to find an engine to execute this computation", "out of memory"),
        ("ValueError: the reason why\n", "ValueError: the reason why"),
        ("The actor died unexpectedly.\n\tclass_name: X\n\tpid: 3", "The actor died unexpectedly."),
        (
            "failed to import on the worker\nModuleNotFoundError: No module named 'x'\nmore",
            "cannot import its code (Mod",
        ),
    ],
)
def test_traceback_comes_down_to_a_sentence(text: str, sentence: str) -> None:
    head = "Failure # {} (occurred at 2026-11-23_12-00-00)\n"  # as Ray writes it, one attempt after another
    lines = "" if text.startswith("The actor") else "ray::ImplicitFunc.train() (pid=1)\n  File ...\n"
    log = head.format(1) + lines + "KeyError: another\n\n" + head.format(2) + lines + text
    assert error_sentence(log, CONFIG).startswith(sentence)
    assert error_sentence("", CONFIG) == "no reason is known"
