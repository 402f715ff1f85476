import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data import InputError
from search.records import FORMAT, Trial, check_unchanged, config_key, creating_search, open_search
from search.referee import TimeBudget
from search.settings import Settings
from search.space import summarize
from tests.helpers import ACCURACY, CONFIG, END, IMAGES, NAN, SPACE, add, disk_full_after, report, search_in, tell


@pytest.mark.parametrize("seed", range(5))
def test_replay_gives_the_same_search_and_damage_costs_only_what_follows_in_a_trial(seed: int, tmp_path: Path) -> None:
    generator, search, log = random.Random(seed), search_in(tmp_path), tmp_path / "log.jsonl"
    names = [add(search) for _ in range(3)]
    search.record("started", resources="2 CPUs")
    events = [*((name, 0) for name in names), (None, 0)]  # each event's trial, and the epoch that it reports or 0
    for name in generator.choices(names, k=50):
        reports = search.trials[name].reports
        kind = generator.choice(["reported"] * 7 + ["restarted", "failed", "begun", "ended"])
        events.append((name, len(reports) + 1 if kind == "reported" else 0))
        if kind == "reported":
            loss = generator.choice([generator.random()] * 9 + [NAN])
            end, paused = generator.choice([(None, False), (None, True), (END, False)])
            tell(search, name, report(len(reports) + 1, generator.random(), loss), end, paused)
        else:
            search.record(kind, trial=name, epoch=generator.randint(0, len(reports)), error="OSError: why", end=END)
        assert [each.epoch for each in reports] == list(range(1, len(reports) + 1))
    with disk_full_after(100), pytest.raises(OSError, match="File too large"):
        tell(search, name, report(len(reports) + 1))
    assert repr(open_search(tmp_path, {})) == repr(search)  # what is not written has not been
    lines = log.read_text().splitlines(keepends=True)
    for i, (name, epoch) in enumerate(events):
        damaged = generator.choice([lines[i][:-9] + "\n", re.sub('"(epoch|error|end|config|ran)"', '"?"', lines[i])])
        log.write_text("".join([*lines[:i], damaged, *lines[i + 1 :]]))
        reopened = open_search(tmp_path, {})
        assert reopened.damaged == 1
        for trial in search.trials.values():
            if trial.name != name:
                assert repr(reopened.trials[trial.name]) == repr(trial)
            elif epoch:
                found = reopened.trials[name].reports
                assert repr(found[: epoch - 1]) == repr(trial.reports[: epoch - 1])
                assert [each.epoch for each in found] == list(range(1, len(found) + 1))


def test_each_epoch_exists_once_and_the_state_is_that_of_the_latest_event(tmp_path: Path) -> None:
    def told(epoch: int, accuracy: float, **state: object) -> dict:
        return vars(report(epoch, accuracy)) | {"end": None, "paused": False} | state

    search = search_in(tmp_path)
    trial = search.trials[add(search, 0.1, 0.2, 0.9, 0.3)]
    for kind, details, accuracies, status, waits in (
        ("restarted", {"epoch": 2}, [0.1, 0.2], "UNFINISHED", True),
        ("failed", {"error": "why"}, [0.1, 0.2], "ERROR", False),
        ("reported", told(3, 0.4, end=END), [0.1, 0.2, 0.4], "TERMINATED", False),
        ("reported", told(2, 0.5, paused=True), [0.1, 0.5], "PAUSED", True),
        ("begun", {}, [0.1, 0.5], "UNFINISHED", False),
        ("ended", {"end": END}, [0.1, 0.5], "UNFINISHED", False),  # the line that says that it is paused is unreadable
        ("reported", told(2, 0.6, paused=True), [0.1, 0.6], "PAUSED", True),
        ("ended", {"end": END}, [0.1, 0.6], "TERMINATED", False),
    ):
        search.record(kind, trial=trial.name, **details)
        assert ([each.accuracy for each in trial.reports], trial.status, trial.waits) == (accuracies, status, waits)
        assert trial.best.accuracy == max(accuracies)
        assert search.interrupted() == (status in ("UNFINISHED", "PAUSED"))
        assert search.unfinished() == ([] if status == "TERMINATED" else [trial])


@pytest.mark.parametrize(("metric", "mode"), [("accuracy", "max"), ("loss", "min"), ("train_loss", "min")])
def test_best_epochs_and_trials_are_those_of_the_objective(metric: str, mode: str, tmp_path: Path) -> None:
    generator, search, levels = random.Random(0), search_in(tmp_path, metric, mode), [0.1, 0.2, 0.3]
    for i in range(12):
        name = add(search, repeats="train_cifar_00000" if i == 5 else None)
        for epoch in range(1, generator.randint(2, 5)):
            each = report(epoch, generator.choice([*levels, NAN, math.inf]), generator.choice([*levels, NAN, NAN]))
            tell(search, name, each, END if i % 2 else None)
    sign, trials = 1 if mode == "max" else -1, search.trials.values()
    for trial in trials:
        assert trial.diverged == (not trial.reports[-1].loss > 0)
        finite = [each for each in trial.reports if each.loss > 0 and math.isfinite(getattr(each, metric))]
        values = [sign * getattr(each, metric) for each in finite]
        assert trial.best == (None if trial.diverged or not finite else finite[values.index(max(values))])
    ranked = search.ranking()
    assert sorted(trial.name for trial in ranked) == [t.name for t in trials if t.best and not t.repeats]
    for better, worse in itertools.pairwise(trial.best for trial in ranked):
        one, other = (sign * getattr(each, metric) for each in (better, worse))
        assert one > other or (one == other and better.loss <= worse.loss)
    assert {trial.status for trial in trials} == {"TERMINATED", "DIVERGED", "UNFINISHED"}


def test_settings_only_grow_and_other_versions_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    search, log = search_in(tmp_path, num_samples=3), tmp_path / "log.jsonl"
    check_unchanged(search, search.space, search.objective)
    assert re.fullmatch(r"The search began with torch None; with \d.*, results may differ\.\n", capsys.readouterr().err)
    search.versions |= {"torch": importlib.metadata.version("torch")}
    check_unchanged(search, search.space, search.objective)
    assert not capsys.readouterr().err
    add(search, 0.5)
    changes = {"num_samples": 4, "repeats": 2, "cpus_per_trial": 1, "gpus_per_trial": 0.0, "seed": 0}
    assert open_search(tmp_path, changes).settings == replace(search.settings, **changes)
    for change, words in (({"seed": 1}, "--seed is 1, but was 0"), ({"num_samples": 2}, "2 is less .* at least 3")):
        with pytest.raises(InputError, match=words):
            open_search(tmp_path, change)
    settings = open_search(shutil.copytree(tmp_path, tmp_path / "else" / "where"), {}).settings
    assert (settings.output_dir, settings.name) == (str(tmp_path / "else"), "where")
    log.write_text(log.read_text().replace("train_loss", "?"))  # as if train.py had not measured it
    (trial,) = open_search(tmp_path, {}).trials.values()
    assert (trial.best.accuracy, str(trial.best.train_loss)) == (0.5, "nan")
    content = json.loads((tmp_path / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps(content | {"format": FORMAT + 1}))
    with pytest.raises(InputError, match=r"json is damaged, or from another version; start a new search"):
        open_search(tmp_path, {})


def test_no_config_is_trained_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    search = search_in(tmp_path, repeats=2)
    configs = [CONFIG | {"seed": seed, "h_1": h_1} for seed, h_1 in ((5, 4), (5, 8), (5, 4), (6, 4), (5, 8))]
    trials = [Trial(f"train_cifar_{i:05}", config) for i, config in enumerate(configs)]
    assert [trial.name[-1] for trial in search.draw(trials)] == ["0", "1", "3"]
    assert capsys.readouterr().err == "Skipped 2 of 5 trials with the config of another trial.\n"
    assert search.draw(trials[:2]) == []
    assert not capsys.readouterr().err
    for name, accuracy in (("train_cifar_00000", 0.9), ("train_cifar_00003", 0.8), ("train_cifar_00001", 0.7)):
        tell(search, name, report(1, accuracy), END)
    expected = [("0", 7), ("0", 8), ("3", 9), ("3", 10), ("1", 6), ("1", 7)]  # 0 and 3 differ only by their seed
    for _ in range(2):
        repeats = search.repeats(3)
        assert [(trial.repeats[-1], trial.config["seed"]) for trial in repeats] == expected
        search.draw(repeats[:3])  # and then the process is killed
    search.draw(repeats)
    keys = [config_key(trial.config) for trial in search.trials.values()]
    assert len(set(keys)) == len(keys) == 9


def test_time_is_that_of_the_monotonic_clock_while_trials_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.time", itertools.count(1e9, -1e6).__next__)  # the clock on the wall is set
    name = add(search_in(tmp_path, time_budget=60.0))
    for start, ran, seconds in ((100.0, 40.0, 40.0), (9.0, 15.0, 55.0)):  # in two processes
        now[0] = start
        search = open_search(tmp_path, {})
        search.record("started", resources="")
        budget = TimeBudget(search)
        now[0] += ran
        tell(search, name, report(1))
        assert (search.seconds, search.time_left(), budget.stop_all()) == (seconds, 60 - seconds, False)
    now[0] += 5
    assert budget.stop_all()
    search.record("stopped")
    now[0] += 100  # while the best model is tested
    search.record("tested")
    assert open_search(tmp_path, {}).seconds == 60


def test_end_of_a_trial_is_flushed_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, flushed = search_in(tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.path.realpath(f"/dev/fd/{descriptor}")))
    name = add(search, 0.1, end=None)
    assert not flushed
    tell(search, name, report(2), END)
    assert flushed == [str(tmp_path / "log.jsonl")]  # before the trial's files are deleted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process")
def test_search_killed_while_it_is_created_does_not_take_the_name(tmp_path: Path) -> None:
    settings, folder = Settings(output_dir=str(tmp_path / "outputs"), name="it"), tmp_path / "outputs" / "it"

    def create() -> None:
        with creating_search(settings, summarize(SPACE), IMAGES, ACCURACY) as search:
            search.draw([Trial("train_cifar_00000", CONFIG)])

    def dying(step: Callable) -> Callable:
        return lambda *args, **options: os._exit(9) if next(survived, None) is None else step(*args, **options)

    for moment in itertools.count():
        survived = iter(range(moment))
        if (pid := os.fork()) == 0:
            for owner, name in ((os, "fsync"), (Path, "open"), (Path, "mkdir"), (Path, "replace"), (Path, "rename")):
                setattr(owner, name, dying(getattr(owner, name)))
            create()
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        if not folder.exists():
            create()
        assert len(open_search(folder, {}).trials) == 1  # it is complete
        assert list(folder.parent.iterdir()) == [folder]
        shutil.rmtree(folder.parent)
        if not killed:
            break
    assert moment > 5
