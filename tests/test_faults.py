"""Searches that are stopped, killed, starved and damaged: no report may be lost, and no figure may be wrong."""

import contextlib
import itertools
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from ray import tune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hparam_search
from data import make_synthetic
from hparam_search import main
from search import best_model
from search.files import read_lines
from search.records import LOG_FILE, open_search, script_command
from search.trial import OUTPUT_FILE, TRAINING_FILE, run_trial, train_cifar, weights_path
from tests.conftest import (
    SMALL_IMAGES,
    Finished,
    Tracker,
    copy_before_the_end,
    figures,
    kill_all,
    processes_with,
    quick,
    read_csv,
    run_here,
    run_search,
    start,
    wait_for,
)
from tests.helpers import CPU, disk_full_after
from train import evaluate, evaluation_batches

pytestmark = pytest.mark.usefixtures("small_search")
LONG = ["--num-samples", "1", "--scheduler", "none", "--max-epochs", "1000"]


def aloud(*args: object) -> None:
    print("printed", os.environ["CUDA_VISIBLE_DEVICES"] or "without GPUs")
    logging.warning("logged")
    os.system("echo from another program")
    run_trial(*args)


def faulty(config: dict, **others: object) -> None:
    """Train as train_cifar does; the first two trials print something, and all but the first have a fault."""
    number, report_to_ray = tune.get_context().get_trial_name()[-1], tune.report

    def killed_in_epoch_3(news: dict) -> None:
        if any(metrics["epoch"] == 3 for metrics in news["reports"]):
            os.kill(os.getpid(), signal.SIGKILL)
        report_to_ray(news)

    no_room = disk_full_after(1000) if number == "3" else contextlib.nullcontext()
    with pytest.MonkeyPatch.context() as patch, no_room:
        if number in "01":
            patch.setattr("search.trial.run_trial", aloud)
        if number == "2":
            patch.setattr(tune, "report", killed_in_epoch_3)
        train_cifar(config | ({"lr": 1e4} if number == "1" else {}), **others)


def curve(folder: Path, number: int) -> list[tuple]:
    """Return what a trial reported, without what a clock measured."""
    reports = open_search(folder, {}).trials[f"train_cifar_{number:05}"].reports
    return [(each.epoch, each.loss, each.accuracy, each.train_loss, each.lr) for each in reports]


def test_trials_that_fail_leave_the_others_alone_and_are_tried_again_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, names = tmp_path / "it", [f"train_cifar_0000{i}" for i in range(4)]
    monkeypatch.setattr(hparam_search, "MAX_FAILURES_PER_TRIAL", 0)
    monkeypatch.setattr(hparam_search, "callbacks", [tracker := Tracker()])
    # Trials that differ only in what has no effect, so that their figures must be the same.
    space = hparam_search.QUICK_SPACE | {"h_2": 16, "lr": 0.02, "p_drop": 0.1, "bias_lr": tune.uniform(0.0, 0.02)}
    monkeypatch.setattr(hparam_search, "QUICK_SPACE", space)
    with monkeypatch.context() as patch:
        patch.setattr(hparam_search, "train_cifar", faulty)
        assert run_search(folder, "--num-samples", 4, "--scheduler", "none") == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "Trial status: 1 TERMINATED | 1 DIVERGED | 2 ERROR" in printed.out
    assert "\nBest trial: train_cifar_00000, " in printed.out
    assert f"\nTo try the failed trials again: {script_command('--resume', folder)}\n" in printed.out
    because = [row["ended_because"] for row in read_csv(folder)]
    assert because[:2] == ["all epochs done", "loss became NaN or infinite"]
    assert because[2].startswith("The actor died unexpectedly")
    error_file = folder / names[3] / "error.txt"
    assert because[3].startswith(f"OSError: cannot write {error_file.with_name('weights_000001.pt')} (")
    assert all(f"{names[i]} failed: {because[i]}.\n" in printed.err for i in (2, 3))
    assert because[3] in error_file.read_text()
    assert not list(folder.glob(f"{names[1]}/*.pt"))
    texts = [(folder / name / OUTPUT_FILE).read_text() for name in names[:2]]
    assert texts == ["printed without GPUs\nWARNING:root:logged\nfrom another program\n"] * 2
    assert sorted(tracker.ended) == [(name, i > 1) for i, name in enumerate(names)]
    assert [len(trial.reports) for trial in open_search(folder, {}).trials.values()] == [4, 1, 2, 0]

    before = read_lines(folder / LOG_FILE)[0]
    monkeypatch.setattr(tune, "run", run_here)
    assert main(["--resume", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "Trial status: 3 TERMINATED | 1 DIVERGED" in printed.out
    assert "failed" not in printed.out
    assert curve(folder, 0) == curve(folder, 2) == curve(folder, 3)
    assert not error_file.exists()
    new = [(event.get("trial"), event.get("epoch")) for event in read_lines(folder / LOG_FILE)[0][len(before) :]]
    # Both restart; then each begins, and reports the epochs that it lacks.
    killed, starved = ([(names[i], epoch) for epoch in (None, *range(first, 5))] for i, first in ((2, 3), (3, 1)))
    assert new == [(None, None), (names[2], 2), (names[3], 0), *killed, *starved, (None, None)]


@pytest.mark.waits_for_searches
def test_search_killed_at_random_moments_ends_as_if_undisturbed(finished: Finished, killed: Future) -> None:
    folder = killed.result()
    assert figures(folder) == figures(finished.folder)
    assert [curve(folder, i) for i in range(4)] == [curve(finished.folder, i) for i in range(4)]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for tag in events.Tags()["scalars"]:  # curves of the search, which do not go back
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps))
        assert steps[-1] == sum(int(row["epochs"]) for row in finished.rows)


def kill_at(moment: int) -> None:
    """Have this process killed at the moment-th time that the end of a search changes something on the disk."""
    counter = iter(range(moment))

    def deadly(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            if next(counter, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    owners = {Path: ("replace", "unlink", "write_text", "open", "mkdir"), torch: ("save",), shutil: ("rmtree",)}
    for owner, names in owners.items():
        for name in names:
            setattr(owner, name, deadly(getattr(owner, name)))


def test_search_killed_as_it_ends_does_so_on_resume(finished: Finished, ray_started: str, tmp_path: Path) -> None:
    folder, output = copy_before_the_end(finished.folder, tmp_path / "it"), tmp_path / "output.txt"
    for path in folder.glob("*/weights_*.pt"):  # what pruning deletes
        (path.parent / TRAINING_FILE).touch()
        shutil.copyfile(path, weights_path(path.parent, 99))
    files = [Path("best_model", name) for name in ("config.json", "metrics.json", "weights.pt")]
    for moment in itertools.count():
        process = start(ray_started, ["--resume", str(folder)], output, kill_at, moment)
        process.join(60)
        if (folder / "results.csv").exists():
            assert figures(folder) == figures(finished.folder)
        if (folder / "best_model").exists():
            assert sorted(path.relative_to(folder) for path in (folder / "best_model").iterdir()) == files
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, output.read_text()
    assert moment >= 10
    for file in (*files[:2], Path("results.csv")):
        assert (folder / file).read_bytes() == (finished.folder / file).read_bytes()
    assert len(list(folder.glob("*/weights_*.pt"))) == 2
    assert not list(folder.glob("*/training*"))
    assert "Best trial: " in output.read_text()
    assert [event["event"] for event in read_lines(folder / LOG_FILE)[0]][-2:] == ["tested", "shown"]


# What may happen to a file's bytes.
ODD = [b"", b"[]", b"{}", b"null", b'{"epoch": "x"}\n', b"[" * 10_000, b"\xff\xfe", b"NaN"]
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": lambda content, generator: flip(content, generator.randrange(8 * len(content))),
    "cut": lambda content, generator: content[: generator.randrange(len(content))],
    "without a line": lambda content, generator: content.replace(generator.choice(content.splitlines(True)), b""),
    "of another kind": lambda content, generator: generator.choice(ODD),
    "gone": lambda content, generator: None,
}


def flip(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


@pytest.mark.parametrize("ended", [True, False])
def test_any_damage_ends_in_a_sentence_and_in_no_figure_that_was_not_reported(
    ended: bool, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    generator, dataset, tested, codes = random.Random(0), make_synthetic(**SMALL_IMAGES), set(), set()
    monkeypatch.setattr(hparam_search, "read_images", lambda **source: dataset)
    monkeypatch.setattr(tune, "run", lambda trial, **options: None)  # all but the training
    monkeypatch.setattr(best_model, "show_best_model", lambda *_: None)  # and the pictures, which take half of the time
    whole = shutil.copytree(finished.folder, tmp_path / "whole", ignore=shutil.ignore_patterns("events.*"))
    reported = {"", *re.findall(r"-?\d[\d.e-]*", (whole / LOG_FILE).read_text())}
    if not ended:
        lines = (whole / LOG_FILE).read_bytes().splitlines(keepends=True)
        (whole / LOG_FILE).write_bytes(b"".join(lines[:-3]))
        (whole / "train_cifar_00003" / TRAINING_FILE).write_bytes(b"state")
    for each in finished.search.ranking()[:2]:
        weights = weights_path(whole / each.name, each.best.epoch)
        model = best_model.load_model(weights, each.config, dataset.classes)
        tested.add(f"  test accuracy: {evaluate(model, evaluation_batches(dataset, 'test', CPU))[1]:.4f}")

    undamaged = shutil.copytree(whole, tmp_path / "undamaged")
    assert main(["--resume", str(undamaged)]) == 0
    expected = figures(undamaged, "seconds images_per_second weights")
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        for damage, change in list(DAMAGES.items()) * (3 if file.name == LOG_FILE else 1):
            folder, what = tmp_path / "it", f"{file} {damage}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            content = change((whole / file).read_bytes(), generator)
            (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
            if file.name.startswith("weights_"):
                shutil.rmtree(folder / "best_model")  # which would make up for it
            code = main(["--resume", str(folder)])
            printed = capsys.readouterr()
            codes.add(code)
            assert code == 0 or printed.err.strip().endswith("."), what
            if code == 2:
                assert printed.err.splitlines()[-1].startswith("hparam_search.py: "), what
                continue
            assert {line for line in printed.out.splitlines() if "test accuracy" in line} <= tested, what
            assert file.name == LOG_FILE or figures(folder, "seconds images_per_second weights") == expected, what
            for row in read_csv(folder):
                columns = ("loss", "accuracy", "best_loss", "best_accuracy", "seconds", "lr", "p_drop", "epochs")
                assert {row[column] for column in columns} <= reported, what
    assert codes == {0, 1, 2}


def listening(pids: list[int]) -> set[str]:
    """Return the addresses on which processes listen for TCP connections."""
    sockets = set()
    for path in (path for pid in pids for path in Path(f"/proc/{pid}/fd").glob("*")):
        with contextlib.suppress(OSError):
            sockets.add(str(path.readlink()))
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    listening = [line[1].split(":")[0][-8:] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets]
    return {socket.inet_ntoa(bytes.fromhex(address)[::-1]) for address in listening}


def become_a_job(mark: str, ray_folder: str) -> None:
    """Put this process into a group of its own, as a shell does; what it starts has the mark in its environment."""
    hparam_search.ray_runtime.usable_cpus = lambda: 1
    os.setsid()
    os.environ |= {"MARK": mark, "RAY_TMPDIR": ray_folder}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_search_that_runs_is_left_alone_until_it_or_all_its_processes_are_stopped_and_says_how_to_resume(
    ray_started: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    signals = {"it alone": signal.SIGINT, "all_at_once": signal.SIGTERM, "ray_first": signal.SIGUSR1}
    ray_folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short, for the paths of sockets
    processes = {}
    try:
        for name in signals:  # the first joins a Ray; the others have Rays of their own, as a user's search has
            address, command = ray_started if name == "it alone" else None, quick(tmp_path / name, *LONG)
            marks = str(tmp_path / name), str(ray_folder)
            processes[name] = start(address, command, tmp_path / f"{name}.txt", become_a_job, *marks)
        for name, process in processes.items():
            folder = tmp_path / name
            wait_for(lambda log=folder / LOG_FILE: log.exists() and '"reported"' in log.read_text(), process)
            in_use = f"another process is using the search in {folder}; wait"
            warm_start = quick(tmp_path / "new", "--warm-start", folder)
            for command, words in (
                (["--resume", str(folder)], in_use),
                (warm_start, in_use),
                (quick(folder), "exists"),
            ):
                assert main(command) == 2
                assert words in capsys.readouterr().err
            if name != "it alone":
                assert listening([process.pid, *processes_with(str(folder))]) == {"127.0.0.1"}
            if name == "ray_first":
                kill_all(str(folder))
            time.sleep(0.3)
            os.killpg(process.pid, signals[name])
        for name, process in processes.items():
            process.join(30)
            printed = Path(process.name).read_text()
            assert process.exitcode == 128 + signals[name], printed
            assert "Traceback" not in printed
            assert "Trial status: " in printed
            resume = f"hparam_search.py --resume {shlex.quote(str(tmp_path / name))}"
            assert printed.strip().splitlines()[-1].endswith(resume)
            assert {row["status"] for row in read_csv(tmp_path / name)} <= {"UNFINISHED", "PENDING"}
            assert not (tmp_path / name / "best_model").exists()
        wait_for(lambda: not processes_with(f"{tmp_path}/"))  # no orphans
        assert len(list(ray_folder.iterdir())) <= 1  # the logs of the Ray that died, at most
    finally:
        kill_all(f"{tmp_path}/")
        shutil.rmtree(ray_folder)
