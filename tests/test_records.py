import itertools
import math
import random
from pathlib import Path

import pytest

from data import InputError, fingerprint, make_synthetic
from search.files import dumps
from search.records import (
    FORMAT,
    Objective,
    Search,
    check_new_folder,
    check_same_images,
    check_unchanged,
    extend,
    locked,
    open_search,
)
from search.settings import Settings
from tests.helpers import CONFIG, END, SPACE, add_trial, disk_full_after, report, search_in, tell

NAN = float("nan")


def record_at_random(search: Search, generator: random.Random, count: int) -> list[tuple[str | None, int]]:
    """Record events as a search with three trials might see them; return each event's trial and the epoch it reports."""
    names = [add_trial(search, [], lr=0.1 * (i + 1)) for i in range(3)]
    search.record("started", resources="2 CPUs")
    events = [(name, 0) for name in names] + [(None, 0)]
    for _ in range(count):
        name = generator.choice(names)
        done = len(search.trials[name].reports)
        kind = generator.choice(["reported"] * 6 + ["restarted", "failed", "stopped"])
        if kind == "reported":
            each = report(done + 1, generator.random(), generator.choice([generator.random()] * 9 + [NAN]))
            tell(search, name, each, generator.choice([None, None, END]))
        elif kind == "restarted":
            search.record(kind, trial=name, epoch=generator.randint(0, done))
        elif kind == "failed":
            search.record(kind, trial=name, error="OSError: why")
        else:
            search.record(kind)
        events.append((None, 0) if kind == "stopped" else (name, done + 1 if kind == "reported" else 0))
        assert [each.epoch for each in search.trials[name].reports] == list(
            range(1, len(search.trials[name].reports) + 1)
        )
    return events


@pytest.mark.parametrize("seed", range(20))
def test_replayed_log_gives_the_same_search(seed: int, tmp_path: Path) -> None:
    search = search_in(tmp_path, num_samples=7)
    record_at_random(search, random.Random(seed), 60)
    assert repr(open_search(tmp_path, {})) == repr(search)
    assert open_search(tmp_path, {"num_samples": 9}).settings == Settings(num_samples=9)


def test_restarted_drops_later_epochs_and_the_end_until_they_are_reported_again(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    trial = search.trials[add_trial(search, [0.1, 0.2, 0.9, 0.3])]
    first = trial.reports[:2]
    search.record("restarted", trial=trial.name, epoch=2)
    assert (trial.reports, trial.end, trial.best, trial.status) == (first, None, first[1], "UNFINISHED")
    search.record("failed", trial=trial.name, error="why")
    assert (trial.status, search.interrupted(), search.unfinished()) == ("ERROR", False, [trial])
    tell(search, trial.name, report(3, 0.4), END)
    assert (trial.reports, trial.status) == ([*first, report(3, 0.4)], "TERMINATED")
    tell(search, trial.name, report(2, 0.5))  # an epoch exists once
    assert trial.reports == [first[0], report(2, 0.5)]


@pytest.mark.parametrize("seed", range(3))
def test_damaged_line_loses_only_what_follows_in_its_trial(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    search = search_in(tmp_path)
    events = record_at_random(search, random.Random(seed), 40)
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    for i, (name, epoch) in enumerate(events):
        (tmp_path / "log.jsonl").write_text(
            "".join([*lines[:i], lines[i].replace('"time"', '"tine"'), *lines[i + 1 :]])
        )
        reopened = open_search(tmp_path, {})
        assert "Skipping 1 unreadable line" in capsys.readouterr().err
        for other, trial in search.trials.items():
            if other != name:
                assert repr(reopened.trials[other]) == repr(trial)
            elif other in reopened.trials:
                found = reopened.trials[other].reports
                assert repr(found[: max(0, epoch - 1)]) == repr(trial.reports[: max(0, epoch - 1)])
                assert [each.epoch for each in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("objective", [("accuracy", "max"), ("loss", "min"), ("train_loss", "min"), ("epoch", "max")])
def test_best_epochs_and_trials_are_those_of_the_objective(objective: tuple[str, str], tmp_path: Path) -> None:
    generator, search = random.Random(0), search_in(tmp_path, objective=objective)
    levels = [0.1, 0.2, 0.3]
    for i in range(12):
        name = add_trial(search, [])
        for epoch in range(1, generator.randint(2, 5)):
            tell(
                search,
                name,
                report(epoch, generator.choice(levels), generator.choice([*levels, NAN, NAN])),
                END if i % 2 else None,
            )
    sign = 1 if objective[1] == "max" else -1
    for trial in search.trials.values():
        finite = [each for each in trial.reports if math.isfinite(each.loss)]
        values = [sign * getattr(each, objective[0]) for each in finite]
        assert trial.diverged == (finite[-1:] != trial.reports[-1:])
        assert trial.best == (None if trial.diverged else finite[values.index(max(values))])
    ranked = search.ranking()
    assert {trial.name for trial in ranked} == {trial.name for trial in search.trials.values() if not trial.diverged}
    for better, worse in itertools.pairwise(trial.best for trial in ranked):
        one, other = (sign * getattr(each, objective[0]) for each in (better, worse))
        assert one > other or (one == other and better.loss <= worse.loss)
    assert search.ranking(ended=True) == [trial for trial in ranked if trial.end]
    assert {trial.status for trial in search.trials.values()} == {"TERMINATED", "DIVERGED", "UNFINISHED"}


def test_repeats_are_drawn_once_and_take_part_in_nothing(tmp_path: Path) -> None:
    search = search_in(tmp_path, repeats=2)
    search.draw([CONFIG] * 2)
    search.draw([CONFIG] * 3)
    names = list(search.trials)
    assert [search.trials[name].status for name in names] == ["PENDING"] * 3
    for name, accuracy in zip(names, (0.5, 0.9, 0.7), strict=True):
        tell(search, name, report(1, accuracy), END)
    for _ in range(2):
        search.draw_repeats(2)
        drawn = {trial.name: trial.config["seed"] - CONFIG["seed"] for trial in search.unfinished()}
        assert drawn == {f"{names[i]}_seed_{5 + k}": k for i in (1, 2) for k in (1, 2)}
    before = search.ranking()
    tell(search, min(drawn), report(1, 1.0), END)
    assert search.ranking() == before
    assert [trial.name for trial in search.own_trials()] == names


def test_seconds_are_those_of_all_processes(tmp_path: Path) -> None:
    search = search_in(tmp_path, time_budget=100.0)
    search.apply({"event": "drawn", "time": 1.0, "trial": "a", "config": CONFIG, "repeats": None})
    for kind, time, seconds in (
        ("started", 100.0, 0), ("restarted", 130.0, 30), ("started", 1000.0, 30), ("stopped", 1050.0, 80)
    ):  # fmt: skip
        search.apply({"event": kind, "time": time, "trial": "a", "epoch": 0, "resources": ""})
        assert (search.seconds, search.time_left()) == (seconds, 100 - seconds)


def test_event_that_found_no_room_is_written_with_the_next(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    name = add_trial(search, [0.1])
    with disk_full_after(100), pytest.raises(OSError, match=r"cannot write .*log.jsonl .*make room there"):
        tell(search, name, report(2))
    tell(search, name, report(3))
    assert repr(open_search(tmp_path, {})) == repr(search)
    assert len(search.trials[name].reports) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "is damaged"),
        (dumps({"format": FORMAT - 1}), "is from another version"),
        (dumps({"format": FORMAT}).replace("crc", "crd"), "is damaged"),
        ("[]", "is damaged"),
        ('{"format": ', "is damaged"),
        ("[" * 100_000, "is damaged"),
        (None, "no search found in"),
    ],
)
def test_folder_without_an_intact_search_of_this_version_is_refused(
    text: str | None, words: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "search.json").write_text(text)
    with pytest.raises(InputError, match=words):
        open_search(tmp_path, {})


def test_resumed_search_must_be_the_one_that_was_interrupted(tmp_path: Path) -> None:
    search, objective = search_in(tmp_path), Objective("accuracy", "max")
    check_unchanged(search, SPACE, objective)
    for space, other, word in (
        *((SPACE | {key: 0.123}, objective, key) for key in SPACE),
        (SPACE, objective._replace(metric="loss"), "metric"),
        (SPACE, objective._replace(mode="min"), "mode"),
    ):
        with pytest.raises(InputError, match=f"'{word}' is .*, but was .* when the search began; restore it"):
            check_unchanged(search, space, other)
    images = make_synthetic(num_train=10, num_test=1, num_classes=2)

    search.images = fingerprint(images)
    check_same_images(search, images)
    with pytest.raises(InputError, match="the training images in data have changed"):
        check_same_images(search, make_synthetic(num_train=10, num_test=1, num_classes=2, seed=1))


def test_settings_only_grow() -> None:
    settings = Settings(num_samples=3, time_budget=60.0)
    assert extend(settings, {"num_samples": 3, "repeats": 2}) == Settings(num_samples=3, time_budget=60.0, repeats=2)
    with pytest.raises(InputError, match="--num-samples can only grow: the search already has 3"):
        extend(settings, {"num_samples": 2})
    with pytest.raises(InputError, match="--data-dir cannot be combined with synthetic images"):
        extend(Settings(dataset="synthetic"), {"data_dir": "/images"})


def test_folder_is_taken_by_one_process_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="another process is running this search"), locked(tmp_path):
        pass
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    assert f"To resume: python hparam_search.py --resume {tmp_path}\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="no search found"), locked(tmp_path / "nowhere"):
        pass
    (tmp_path / "file").touch()
    for parent, words in ((tmp_path.parent, "already exists"), (tmp_path / "file", "is not a writable folder")):
        with pytest.raises(InputError, match=words):
            check_new_folder(Settings(output_dir=str(parent), name=tmp_path.name))
