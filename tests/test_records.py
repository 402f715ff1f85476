import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data import InputError
from search.files import read_lines
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
    assert repr(open_search(tmp_path, {})) == repr(search)
    lines = log.read_text().splitlines(keepends=True)
    for i, (name, epoch) in enumerate(events):
        log.write_text(
            "".join(
                [
                    *lines[:i],
                    generator.choice([lines[i][:-9] + "\n", re.sub('"(epoch|error|end|config|ran)"', '"?"', lines[i])]),
                    *lines[i + 1 :],
                ]
            )
        )
        reopened = open_search(tmp_path, {})
        assert reopened.damaged == 1
        for trial in search.trials.values():
            if trial.name != name:
                assert repr(reopened.trials[trial.name]) == repr(trial)
            elif epoch:
                found = reopened.trials[name].reports
                assert repr(found[: epoch - 1]) == repr(trial.reports[: epoch - 1])
                assert [each.epoch for each in found] == list(range(1, len(found) + 1))


def test_restarted_drops_later_epochs_and_the_end_until_they_are_reported_again(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    trial = search.trials[add(search, 0.1, 0.2, 0.9, 0.3)]
    first = trial.reports[:2]
    search.record("restarted", trial=trial.name, epoch=2)
    assert (trial.reports, trial.end, trial.best, trial.status) == (first, None, first[1], "UNFINISHED")
    search.record("failed", trial=trial.name, error="why")
    assert (trial.status, search.interrupted(), search.unfinished()) == ("ERROR", False, [trial])
    with disk_full_after(100), pytest.raises(OSError, match=r"cannot write .*log.jsonl .File too large.$"):
        tell(search, trial.name, report(3, 0.4))
    assert (trial.reports, repr(open_search(tmp_path, {}))) == (first, repr(search))  # what is not written has not been
    tell(search, trial.name, report(3, 0.4), END)
    assert (trial.reports[2:], trial.status) == ([report(3, 0.4)], "TERMINATED")
    tell(search, trial.name, report(2, 0.5), paused=True)  # an epoch exists once
    assert (trial.reports, trial.status, search.interrupted()) == ([first[0], report(2, 0.5)], "PAUSED", True)
    search.record("begun", trial=trial.name)
    assert (trial.running, trial.waits) == (True, False)
    assert (trial.reports, trial.status) == ([first[0], report(2, 0.5)], "UNFINISHED")
    search.record("ended", trial=trial.name, end=END)  # the line that says that it is paused is unreadable
    assert trial.status == "UNFINISHED"
    tell(search, trial.name, report(2, 0.5), paused=True)
    search.record("ended", trial=trial.name, end=END)
    assert (trial.status, search.unfinished()) == ("TERMINATED", [])


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


def test_only_an_intact_search_is_resumed_and_settings_only_grow(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    search = search_in(tmp_path, num_samples=3)
    check_unchanged(search, search.space, search.objective)
    assert re.fullmatch(r"The search began with torch None; with \d.*, results may differ\.\n", capsys.readouterr().err)
    search.versions |= {"torch": importlib.metadata.version("torch")}
    check_unchanged(search, search.space, search.objective)
    assert not capsys.readouterr().err
    add(search, 0.5)
    changes = {"num_samples": 4, "repeats": 2, "cpus_per_trial": 1, "gpus_per_trial": 0.0, "seed": 0}
    assert open_search(tmp_path, changes).settings == replace(search.settings, **changes)
    with pytest.raises(InputError, match="--seed is 1, but was 0 when the search began; remove it, or use another"):
        open_search(tmp_path, {"seed": 1})
    moved = shutil.copytree(tmp_path, tmp_path / "else" / "where")
    settings = open_search(moved, {}).settings
    assert (settings.output_dir, settings.name) == (str(tmp_path / "else"), "where")
    with pytest.raises(InputError, match="--num-samples 2 is less than the search has; use at least 3"):
        open_search(tmp_path, {"num_samples": 2})
    damaged, log = (tmp_path / "search.json").read_text()[:-9], tmp_path / "log.jsonl"
    drawn, reported = read_lines(log)[0]
    del reported["train_loss"]  # as if train.py had not measured it
    log.write_text(json.dumps(drawn) + "\n" + json.dumps(reported) + "\n")
    (trial,) = open_search(tmp_path, {}).trials.values()
    assert (trial.best.accuracy, str(trial.best.train_loss)) == (0.5, "nan")
    for text in (json.dumps({"format": FORMAT - 1}), damaged):
        (tmp_path / "search.json").write_text(text)
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


def test_time_is_that_of_the_monotonic_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0, 1e9]  # monotonic, and on the wall
    monkeypatch.setattr("search.records.time.monotonic", lambda: now[0])
    monkeypatch.setattr("search.records.time.time", lambda: now[1])
    search = search_in(tmp_path, time_budget=60.0)
    names = [add(search) for _ in range(2)]
    search.record("started", resources="")
    budget = TimeBudget(search)
    for name in names:
        now[:] = now[0] + 20, now[1] + 1e6  # the clock on the wall is set
        tell(search, name, report(1))
        assert not budget.stop_all()
    search = open_search(tmp_path, {})
    now[:] = 1000.0, 0.0  # another process
    search.record("started", resources="")
    now[0] += 15
    tell(search, names[0], report(2))
    assert (search.seconds, open_search(tmp_path, {}).seconds, search.time_left()) == (55, 55, 5)
    budget = TimeBudget(search)
    now[0] += 6
    assert budget.stop_all()
    search.record("stopped")
    now[0] += 100  # while the best model is tested
    search.record("tested")
    assert open_search(tmp_path, {}).seconds == 61


def test_end_of_a_trial_is_on_disk_before_its_files_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.path.realpath(f"/dev/fd/{descriptor}")))
    search = search_in(tmp_path)
    name = add(search)
    flushed.clear()
    tell(search, name, report(1))
    assert not flushed
    tell(search, name, report(2), END)
    assert flushed == [str(tmp_path / "log.jsonl")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process")
def test_search_killed_while_it_is_created_does_not_take_the_name(tmp_path: Path) -> None:
    settings = Settings(output_dir=str(tmp_path / "outputs"), name="it")

    def create() -> None:
        with creating_search(settings, summarize(SPACE), IMAGES, ACCURACY) as search:
            search.draw([Trial("train_cifar_00000", CONFIG)])

    def dying(step: Callable, steps: Iterator[int], moment: int) -> Callable:
        return lambda *args, **options: os._exit(9) if next(steps) == moment else step(*args, **options)

    for moment in itertools.count():
        if (pid := os.fork()) == 0:
            steps = itertools.count()
            for owner, name in ((os, "fsync"), (Path, "open"), (Path, "mkdir"), (Path, "replace"), (Path, "rename")):
                setattr(owner, name, dying(getattr(owner, name), steps, moment))
            create()
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        if (tmp_path / "outputs" / "it").exists():
            assert len(open_search(tmp_path / "outputs" / "it", {}).trials) == 1  # it is complete
        else:
            create()
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["it"]
        shutil.rmtree(tmp_path / "outputs")
        if not killed:
            break
    assert moment > 5
