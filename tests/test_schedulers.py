import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest
from ray import tune
from ray.tune.search import Searcher

import hparam_search
from search.files import read_lines
from search.records import LOG_FILE, METRICS, Trial
from search.referee import TrialQueue
from search.sampler import draw_configs
from search.schedulers import CONTINUE, PAUSE, STOP, Promotion, early_stop, new_rungs
from search.settings import Settings
from search.trial import TRAINING_FILE
from tests.conftest import read_csv, run_search
from tests.helpers import END, NAN, add, report, search_in, tell


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


def test_rungs_and_places_are_those_of_successive_halving() -> None:
    assert new_rungs(12, 2, 2, 2, 20) == {2: 6, 4: 3, 8: 2, 16: 2}
    assert new_rungs(100, 1, 3.0, 1, 27) == {1: 34, 3: 12, 9: 4}
    assert new_rungs(7, 2, 1.5, 3, 9) == {2: 5, 3: 4, 5: 3, 8: 3}
    assert new_rungs(2, 3, 4, 3, 6) == {3: 2}  # all are promoted
    assert new_rungs(12, 20, 2, 2, 20) == {}


@pytest.mark.parametrize("failures", [0.0, 0.02])
@pytest.mark.parametrize("at_once", [1, 2, 4, 30])
def test_the_best_of_each_rung_are_promoted_and_the_others_stopped(at_once: int, failures: float) -> None:
    """Trials with random losses and paces run at once, and may fail, at any epoch."""
    for seed in range(40):
        generator = random.Random(seed)
        count, first, factor, keep = (generator.choice(x) for x in ((5, 12, 30), (1, 2, 3), (1.5, 2, 4), (1, 2, 3)))
        rungs, trials = new_rungs(count, first, factor, keep, 12), [Trial(f"{i:05}") for i in range(count)]
        promotion = Promotion(trials, rungs, 12)
        while not all(trial.end or trial.error for trial in trials):
            while (waiting := [t for t in trials if t.waits]) and sum(t.running for t in trials) < at_once:
                promotion.choose(waiting).become(running=True)  # no worker is idle
            trial = generator.choice([trial for trial in trials if trial.running])
            if generator.random() < failures:
                trial.become(error="why")
                continue
            each = report(len(trial.reports) + 1, loss=generator.choice([1.0, generator.random()]))
            decision = promotion.judge(trial, each)
            trial.reports.append(each)
            if each.epoch == 12 or decision == STOP:
                trial.become(end="it ends")
            elif decision == PAUSE:
                trial.become(paused=True)
            for beaten in promotion.beaten():
                beaten.become(end="stopped")
            assert sum(trial.paused for trial in trials) <= max([*rungs.values(), 0])
        failed = [trial for trial in trials if trial.error]
        for rung, places in rungs.items():
            following = min([*(other for other in rungs if other > rung), 12])
            passed = [trial for trial in trials if len(trial.reports) >= following]
            reached = [trial for trial in trials if len(trial.reports) >= rung and (trial in passed or not trial.error)]
            reached.sort(key=lambda trial: (trial.reports[rung - 1].loss, trial.name))
            if not failures:
                assert set(reached[:places]) <= set(passed)
                assert len(passed) < places + at_once  # a worker that would wait continues one that may be beaten
            assert len(passed) + len(failed) >= min(places, len(reached))  # a place that is free too late stays free


def test_paused_trials_continue_in_order_and_one_that_does_is_not_ended_as_beaten(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    first, second, third, fourth = (search.trials[add(search, lr=i)] for i in (1.0, 2.0, 3.0, 4.0))
    promotion = Promotion(search.own_trials(), {1: 2}, 4)
    queue = TrialQueue(search, search.own_trials(), promotion, 3)
    assert [queue.suggest("x")["lr"] for _ in "ab"] == [1.0, 2.0]
    for trial, loss in ((first, 6.0), (second, 5.0)):
        assert promotion.judge(trial, report(1, loss=loss)) == PAUSE
        tell(search, trial.name, report(1, loss=loss), paused=True)
    # New ones come before those that may be beaten; the better one of these continues, so that no worker waits.
    assert [queue.suggest("x")["trial"] for _ in "cde"] == [third.name, fourth.name, second.name]
    assert (queue.suggest("x"), second.status, search.running()) == (None, "UNFINISHED", [second, third, fourth])
    for trial, loss in ((third, 3.0), (fourth, 4.0)):
        assert promotion.judge(trial, report(1, loss=loss)) == CONTINUE
        tell(search, trial.name, report(1, loss=loss))
    assert promotion.beaten() == [first]
    for trial in (third, second):
        search.record("failed", trial=trial.name, error="why")
    assert promotion.beaten() == []  # a place is free
    assert queue.suggest("x")["lr"] == 1.0
    for trial in (fourth, first):
        assert queue.suggest("x") is None
        tell(search, trial.name, report(2), END)
    assert queue.suggest("x") == Searcher.FINISHED


def test_of_paused_trials_that_may_be_beaten_the_one_at_the_highest_rung_continues() -> None:
    low, high, running = Trial("0", paused=True), Trial("1", paused=True), Trial("2", running=True)
    low.reports, high.reports = [report(1, loss=2.0)], [report(1, loss=1.0), report(2, loss=3.0)]
    assert Promotion([low, high, running], {1: 2, 2: 1}, 4).choose([low, high]) is high


def scripted(
    config: dict, images: Path, search_folder: Path, rungs: dict[int, int], fragile: str, **others: object
) -> None:
    """Report losses that follow from the config, without training.

    The last trial returns before its first rung; the process of the fragile one dies once, while others are paused.
    """
    name, died = tune.get_context().get_trial_name(), search_folder / "died"
    state = search_folder / name / TRAINING_FILE
    state.parent.mkdir(exist_ok=True)
    restored = int(state.read_text()) if state.exists() else 0
    tune.report({"restored": restored, "reports": []})
    for epoch in range(1, config["epochs"] + 1):
        if name.endswith("11") and epoch == min(rungs):
            return
        if name == fragile and epoch == 5 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if epoch in rungs and epoch > restored:
            state.write_text(str(epoch))
        metrics = dict.fromkeys(METRICS, 0.5) | {"epoch": epoch, "loss": 10 * config["lr"] + 1 / epoch}
        tune.report({"reports": [metrics]})


@pytest.mark.usefixtures("small_search")
def test_search_with_several_trials_at_once_promotes_the_best_though_the_last_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    at_once, folder = 2, tmp_path / "it"
    monkeypatch.setattr(hparam_search.tuner, "machines", lambda: [(at_once, 0)])
    space, _ = hparam_search.search_space(Settings(quick=True, max_epochs=10))
    rates = [config["lr"] for config in draw_configs(space, [6], 0)]
    best = f"train_cifar_{rates.index(min(rates[:11])):05}"
    monkeypatch.setattr(hparam_search, "train_cifar", partial(scripted, fragile=best))
    assert run_search(folder, "--num-samples", 6, "--max-epochs", 10, "--time-budget", "1h") == 1  # without weights
    rows = read_csv(folder)
    assert [row["status"] for row in rows] == ["TERMINATED"] * 11 + ["ERROR"]
    by_loss = sorted(rows[:11], key=lambda row: float(row["lr"]))
    for epoch, places in {4: 6, 8: 3, 10: 2}.items():
        passed = [row for row in rows if int(row["epochs"] or 0) >= epoch]
        assert all(row in passed for row in by_loss[:places])
        assert len(passed) <= places + at_once - 1
    assert not list(folder.glob(f"*/{TRAINING_FILE}"))
    sentence = f"Restarting {best}, which failed: The actor died unexpectedly before finishing this task."
    assert sentence in capsys.readouterr().err
    events = read_lines(folder / LOG_FILE)[0]
    assert any(event.get("paused") for event in events)
    ended = [event["trial"] for event in events if event["event"] == "ended" or event.get("end")]
    assert sorted(ended) == sorted(set(ended))
    assert "restarted" not in {event["event"] for event in events}  # no epoch was lost
