"""Searches that are killed, starved and damaged: nothing that was reported may be lost, and no figure may be wrong."""

import json
import math
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ray import tune

import hparam_search
from data import make_synthetic
from hparam_search import main
from search import best_model, records, trial
from search.best_model import BEST_MODEL, load_model
from search.files import read_lines
from search.records import LOG_FILE, METRICS, Objective
from search.trial import TRAINING_FILE, save_weights, train_cifar, weights_path
from tests.conftest import (
    EXAMPLE,
    SMALL_IMAGES,
    Finished,
    epochs_reported,
    epochs_saved,
    figures,
    opened,
    quick,
    read_csv,
    run_search,
    start,
    wait_for,
)

# --- trials that fail -------------------------------------------------------------------------------------------------


def faulty(config: dict, images: Path, search_folder: Path, objective: Objective, save_period: float) -> None:
    """Train as train_cifar does, with a fault of its own in each trial but the first."""
    number, report_to_ray = tune.get_context().get_trial_name()[-1], tune.report

    def killed_in_epoch_3(metrics: dict) -> None:
        if metrics.get("epoch") == 3 and not (search_folder / "killed").exists():
            (search_folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        report_to_ray(metrics)

    def without_room(*arguments: object) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_weights(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    if number == "1":
        config = config | {"lr": 1e4}
    if number == "2":
        tune.report = killed_in_epoch_3
    if number == "3":
        trial.save_weights = without_room
    try:
        train_cifar(config, images, search_folder, objective, save_period)
    finally:
        tune.report, trial.save_weights = report_to_ray, save_weights


@pytest.mark.usefixtures("small_search")
def test_trials_that_fail_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(hparam_search, "MAX_FAILURES_PER_TRIAL", 1)
    # Trials that are all alike, so that their figures must be, too.
    space = hparam_search.QUICK_SPACE | {"h_2": 16, "lr": 0.02, "p_drop": 0.1}
    monkeypatch.setattr(hparam_search, "QUICK_SPACE", space)
    folder, room = tmp_path / "it", iter([False] * 6)
    append_lines = records.append_lines

    def append_if_there_is_room(*arguments: object) -> None:
        if trials_began() and not next(room, True):
            raise OSError(28, "No space left on device")
        append_lines(*arguments)

    def trials_began() -> bool:
        return (folder / "train_cifar_00000").exists()

    with monkeypatch.context() as patch:
        patch.setattr(hparam_search, "train_cifar", faulty)
        patch.setattr(records, "append_lines", append_if_there_is_room)
        assert run_search(folder, "--num-samples", 4) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert [row["status"] for row in read_csv(folder)] == ["TERMINATED", "DIVERGED", "TERMINATED", "ERROR"]
    assert "Trial status: 2 TERMINATED | 1 DIVERGED | 1 ERROR" in printed.out

    # The one that diverged ended there, and has no best epoch.
    diverged = opened(folder).trials["train_cifar_00001"]
    assert (len(diverged.reports), diverged.end) == (1, "loss became NaN or infinite")
    assert math.isnan(diverged.reports[-1].loss)
    assert not list(folder.glob("train_cifar_00001/*.pt"))
    assert json.loads((folder / BEST_MODEL / "metrics.json").read_text())["trial_id"] in ("00000", "00002")

    # The one that was killed continued from its training state, and has the figures of its twin.
    assert (folder / "killed").exists()
    assert events(folder, "train_cifar_00002", "restarted") == []  # the state was newer than the last report
    assert curve(folder, 2) == curve(folder, 0)

    # The disk was full: for a trial, which failed with a sentence, and for the log, which lost nothing.
    path = folder / "train_cifar_00003" / "weights_000001.pt"
    assert f"train_cifar_00003 failed: OSError: cannot write {path} (" in printed.err
    assert "make room there" in (folder / "train_cifar_00003" / "error.txt").read_text()
    assert f"cannot write {folder / LOG_FILE} (No space left on device); make room there.\n" in printed.err
    assert next(room, None) is None
    assert len(events(folder, "train_cifar_00000", "reported")) == 4

    # --resume tries again what failed, and only that.
    before = (folder / LOG_FILE).read_bytes()
    assert main(["--resume", str(folder)]) == 0
    assert [row["status"] for row in read_csv(folder)] == ["TERMINATED", "DIVERGED", "TERMINATED", "TERMINATED"]
    assert curve(folder, 3) == curve(folder, 0)
    assert not (folder / "train_cifar_00003" / "error.txt").exists()
    new = (folder / LOG_FILE).read_bytes().removeprefix(before)
    assert {json.loads(line).get("trial") for line in new.splitlines()} == {"train_cifar_00003", None}


def events(folder: Path, name: str, kind: str) -> list[dict]:
    """Return the events of a kind of a trial."""
    return [e for e in read_lines(folder / LOG_FILE)[0] if (e["event"], e.get("trial")) == (kind, name)]


def curve(folder: Path, number: int) -> list[tuple]:
    """Return what a trial reported, without what a clock measured."""
    reports = opened(folder).trials[f"train_cifar_{number:05}"].reports
    return [(each.epoch, each.loss, each.accuracy, each.train_loss, each.lr) for each in reports]


def failing(config: dict, images: Path, search_folder: Path, objective: Objective, save_period: float) -> None:
    raise RuntimeError("the reason why")


@pytest.mark.usefixtures("small_search")
def test_search_whose_trials_all_fail_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(hparam_search, "train_cifar", failing)
    monkeypatch.setattr(hparam_search, "MAX_FAILURES_PER_TRIAL", 0)
    monkeypatch.setattr(hparam_search, "QUICK_SPACE", hparam_search.QUICK_SPACE | {"h_2": 16})
    assert run_search(tmp_path / "it", "--num-samples", 1) == 1
    assert capsys.readouterr().err.splitlines() == [
        "train_cifar_00000 failed: RuntimeError: the reason why.",
        "No trial has a model, so there is no best model.",
    ]
    row = read_csv(tmp_path / "it")[0]
    assert (row["status"], row["ended_because"]) == ("ERROR", "RuntimeError: the reason why")
    assert "the reason why" in (tmp_path / "it" / "train_cifar_00000" / "error.txt").read_text()
    assert not (tmp_path / "it" / BEST_MODEL).exists()


# --- the search killed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def killed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future]:
    """Start a search like `finished` beside the other tests, which is killed again and again; yield its folder."""
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(search_killed_at_random_moments, cluster, tmp_path_factory.mktemp("killed") / "it")


def search_killed_at_random_moments(address: str, folder: Path) -> Path:
    """Kill a search ten times, resume it each time, and return its folder."""
    output, generator, resume = folder.parent / "output.txt", random.Random(0), ["--resume", str(folder)]
    for moment in range(10):
        before, log = epochs_reported(folder), Log(folder)
        process = start(address, resume if before else quick(folder, *EXAMPLE), output)
        if moment % 2:  # as it trains
            wait_for(lambda: epochs_reported(folder) != before or process.exitcode is not None)  # noqa: B023
            process.join(generator.uniform(0, 0.2))
        else:  # as it starts
            process.join(generator.uniform(0, 1.5))
        assert process.exitcode is None, output.read_text()
        process.kill()
        process.join()
        log.check_nothing_was_lost()
        if not before and not epochs_reported(folder):
            shutil.rmtree(folder, ignore_errors=True)

    # At last the training state of a trial is damaged, too.
    newest = None
    while newest != (newest := epochs_saved(folder)):
        time.sleep(3)  # a trial's process outlives its search by a moment, and may save once more
    log = Log(folder)
    name = next(name for name in newest if name in log.unfinished)
    state = folder / name / TRAINING_FILE
    state.write_bytes(state.read_bytes()[:-100])
    log.saved[name] = 0
    process = start(address, resume, output)
    process.join(120)
    assert process.exitcode == 0, output.read_text()
    log.check_nothing_was_lost()
    assert output.read_text().count("training.pt is unreadable; restarting from scratch") == 1
    assert "Traceback" not in output.read_text()
    return folder


class Log:
    """What the log of a search told at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOG_FILE
        self.events, self.saved = read_lines(self.path)[0], epochs_saved(folder)
        self.unfinished = {trial.name for trial in opened(folder).unfinished()} if self.events else set()

    def check_nothing_was_lost(self) -> None:
        """Check that the log has grown only, and that no trial has started over that need not."""
        events, damaged = read_lines(self.path)
        assert damaged == 0
        assert events[: len(self.events)] == self.events
        drawn = {event["trial"] for event in self.events if event["event"] == "drawn"}
        for event in events[len(self.events) :]:
            name = event.get("trial")
            assert name not in drawn - self.unfinished
            assert event["event"] != "restarted" or event["epoch"] >= self.saved.get(name, 0)


@pytest.mark.waits_for_searches
def test_search_killed_at_random_moments_ends_as_if_undisturbed(finished: Finished, killed: Future) -> None:
    folder = killed.result()
    assert figures(folder) == figures(finished.folder)
    assert [curve(folder, i) for i in range(4)] == [curve(finished.folder, i) for i in range(4)]


def kill_at(moment: int) -> None:
    """Have this process killed at the moment-th time that the end of a search changes something on the disk."""
    counter = iter(range(moment))

    def deadly(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            if next(counter, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (Path, "replace"), (Path, "unlink"), (Path, "write_text"), (Path, "open"), (Path, "mkdir"), (torch, "save"),
        (shutil, "rmtree"),
    ):  # fmt: skip
        setattr(owner, name, deadly(getattr(owner, name)))


def test_search_killed_at_any_moment_of_its_end_ends_on_resume(
    finished: Finished, own_address: str, tmp_path: Path
) -> None:
    folder, output = tmp_path / "it", tmp_path / "output.txt"
    shutil.copytree(finished.folder, folder)
    shutil.rmtree(folder / BEST_MODEL)
    (folder / "results.csv").unlink()
    for path in folder.glob("*/weights_*.pt"):  # what pruning deletes
        (path.parent / TRAINING_FILE).touch()
        shutil.copyfile(path, weights_path(path.parent, 99))
    whole = [Path("results.csv"), *(Path(BEST_MODEL, name) for name in ("config.json", "metrics.json", "weights.pt"))]
    moments = 0
    while True:
        process = start(own_address, ["--resume", str(folder)], output, kill_at, moments)
        process.join(60)
        if (folder / "results.csv").exists():
            assert figures(folder) == figures(finished.folder)
        if (folder / BEST_MODEL).exists():
            assert sorted(path.relative_to(folder) for path in (folder / BEST_MODEL).iterdir()) == whole[1:]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, output.read_text()
        moments += 1
    assert moments >= 8
    for name in whole[:3]:
        assert (folder / name).read_bytes() == (finished.folder / name).read_bytes()
    assert len(list(folder.glob("*/weights_*.pt"))) == 2
    assert not list(folder.glob("*/training*"))
    assert not list(folder.rglob(".*"))
    assert "Best trial: " in output.read_text()


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(content: bytes, generator: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(generator.choice([1, 1, 8])):
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def swap(content: bytes, generator: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    i = generator.randrange(len(lines))
    return b"".join([*lines[i:], *lines[:i]])


# What may happen to a file's bytes.
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": flip,
    "cut": lambda content, generator: content[: generator.randrange(len(content))],
    "swapped": swap,
    "doubled": lambda content, generator: b"".join(2 * line for line in content.splitlines(keepends=True)),
    "of another type": lambda content, generator: generator.choice(
        [b"[]", b"{}", b"null", b"3", b'{"epoch": "x"}\n', b"[" * 10_000, b"\xff\xfe", b"NaN"]
    ),
    "one more line": lambda content, generator: content + b'{"event": "x"}\n',
    "emptied": lambda content, generator: b"",
    "gone": lambda content, generator: None,
}


@pytest.mark.usefixtures("small_search")
@pytest.mark.parametrize("ended", [True, False])
def test_any_damage_ends_in_a_sentence_and_in_no_figure_that_was_not_reported(
    ended: bool, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    generator, dataset = random.Random(0), make_synthetic(**SMALL_IMAGES)
    monkeypatch.setattr(hparam_search, "read_images", lambda **source: dataset)
    monkeypatch.setattr(tune.Tuner, "fit", lambda tuner: None)  # all but the training
    whole = tmp_path / "whole"
    shutil.copytree(finished.folder, whole, ignore=shutil.ignore_patterns("events.*"))
    if not ended:
        log = whole / LOG_FILE
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-3]))
        (whole / "train_cifar_00003" / TRAINING_FILE).write_bytes(b"state")
    reported, tested = {}, set()
    for each in finished.search.trials.values():
        values = {key: {str(getattr(report, key)) for report in each.reports} for key in METRICS}
        reported[each.id] = values | {key: {str(value)} for key, value in each.config.items() if key != "epochs"}
        if model := load_model(weights_path(whole / each.name, each.best.epoch), each.config, dataset.classes):
            tested.add(f"  test accuracy: {best_model.test(model, dataset)['test_accuracy']:.4f}")

    def without_weights(folder: Path) -> list[dict]:
        return [row | {"weights": None} for row in figures(folder)]

    undamaged = shutil.copytree(whole, tmp_path / "undamaged")
    assert main(["--resume", str(undamaged)]) == 0
    expected, codes = without_weights(undamaged), []
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        for damage, change in DAMAGES.items():
            folder, what = tmp_path / "it", f"{file} {damage}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            content = change((whole / file).read_bytes(), generator)
            (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
            if file.name.startswith("weights_"):
                shutil.rmtree(folder / BEST_MODEL)  # which would make up for it
            code = main(["--resume", str(folder)])
            printed = capsys.readouterr()
            codes.append(code)
            assert code in (0, 1, 2), what
            assert code == 0 or printed.err.strip().endswith("."), what
            if code == 2:
                last = printed.err.splitlines()[-1]
                assert last.startswith("hparam_search.py: "), what
                continue
            assert {line for line in printed.out.splitlines() if "test accuracy" in line} <= tested, what
            assert file.name == LOG_FILE or without_weights(folder) == expected, what
            for row in read_csv(folder):
                for key, column in (
                    ("loss", "loss"), ("loss", "best_loss"), ("accuracy", "accuracy"), ("accuracy", "best_accuracy"),
                    ("seconds", "seconds"), ("lr", "lr"), ("p_drop", "p_drop"), ("seed", "seed"),
                ):  # fmt: skip
                    assert row[column] in reported[row["trial_id"]][key] | {""}, (what, column)
    assert all(codes.count(code) > 5 for code in (0, 1, 2)), codes
