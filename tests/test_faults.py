"""Searches that are killed, cut off, starved and damaged, for real: nothing that was reported may be lost."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from ray import tune

import hparam_search
from data import make_synthetic
from hparam_search import main
from search import trial as trials
from search.model_folder import load_model
from search.records import read_log, read_results, read_search
from search.space import trial_name
from search.trial import WEIGHTS_FILE, save_weights, train_cifar
from tests.conftest import (
    NAMESPACE,
    REPOSITORY,
    SMALL_IMAGES,
    figures,
    last_checkpoints,
    processes_with,
    read_csv,
    reported_epochs,
    start,
    wait_for,
)
from train import evaluate, evaluation_batches

TOKEN_MODE = {"RAY_AUTH_MODE": "token"}
LONG = ["--quick", "--max-epochs", "14", "--num-samples"]


def finished_logs(folder: Path) -> dict[str, bytes]:
    """Return the logs of the trials that are finished."""
    files = [file for file in folder.glob("*/result.json") if any("done" in line for line in read_log(file.parent)[0])]
    return {file.parent.name: file.read_bytes() for file in files}


# --- trials that fail -------------------------------------------------------------------------------------------------


def faulty(config: dict, images: Path, search_folder: Path, checkpoint_period: float) -> None:
    """Train as train_cifar does, with a fault of its own in each of the first trials."""
    trial, folder = tune.get_context().get_trial_name()[-1], search_folder
    report_to_ray = tune.report

    def killed_in_epoch_3(metrics: dict) -> None:
        if metrics["epoch"] == 3 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        report_to_ray(metrics)

    def without_room(*arguments: object) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_weights(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    if trial == "1":
        config = config | {"lr": 1e4}
    if trial == "2":
        tune.report = killed_in_epoch_3
    if trial == "3":
        trials.save_weights = without_room
    try:
        train_cifar(config, images, search_folder, checkpoint_period)
    finally:
        tune.report, trials.save_weights = report_to_ray, save_weights


@pytest.mark.usefixtures("ray_started", "small_search")
def test_trials_that_fail_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(hparam_search, "train_cifar", faulty)
    monkeypatch.setattr(hparam_search, "MAX_FAILURES_PER_TRIAL", 1)
    # Trials that are all alike, so that their figures must be, too.
    space = hparam_search.QUICK_SPACE | {"h_2": 16, "lr": 0.02, "p_drop": 0.1}
    monkeypatch.setattr(hparam_search, "QUICK_SPACE", space)
    assert main(["--quick", "--num-samples", "4", "--output-dir", str(tmp_path), "--name", "it"]) == 0
    printed, folder = capsys.readouterr(), tmp_path / "it"
    assert "Traceback" not in printed.out + printed.err
    assert [row["status"] for row in read_csv(folder)] == ["TERMINATED", "DIVERGED", "TERMINATED", "ERROR"]
    assert "Trial status: 2 TERMINATED | 1 DIVERGED | 1 ERROR" in printed.out
    words = f"train_cifar_00003 failed: OSError: no checkpoint can be written into {folder / 'train_cifar_00003'}"
    assert words in printed.err

    # The one that diverged ended there, and is out of the running.
    lines, _ = read_log(folder / "train_cifar_00001")
    assert math.isnan(lines[-1]["loss"])
    assert len(lines) < 4
    assert not list(folder.glob("train_cifar_00001/checkpoint_*"))
    best = json.loads((folder / "best_model" / "metrics.json").read_text())
    assert best["trial_id"] in ("00000", "00002")

    # The one that was killed went on from its checkpoint: its log has every epoch once, with the numbers of its twin.
    assert (folder / "killed").exists()
    assert reported_epochs(folder)["train_cifar_00002"] == [1, 2, 3, 4]
    assert lines_of(folder, 2) == lines_of(folder, 0)

    # --resume tries what failed again, and only that.
    assert "make room there" in (folder / "train_cifar_00003" / "error.txt").read_text()
    monkeypatch.setattr(hparam_search, "train_cifar", train_cifar)
    before = finished_logs(folder)
    assert main(["--resume", str(folder)]) == 0
    assert [row["status"] for row in read_csv(folder)] == ["TERMINATED", "DIVERGED", "TERMINATED", "TERMINATED"]
    assert lines_of(folder, 3)[-1] == lines_of(folder, 0)[-1]
    assert not (folder / "train_cifar_00003" / "error.txt").exists()
    assert {name: log for name, log in finished_logs(folder).items() if name in before} == before


def lines_of(folder: Path, trial: int) -> list[dict]:
    """Return a trial's log without what a clock measured, and without errors."""
    clock = ("seconds", "images_per_second", "time")
    lines = [line for line in read_log(folder / trial_name(trial))[0] if "epoch" in line]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


@pytest.mark.usefixtures("ray_started", "small_search")
def test_search_whose_trials_all_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(config: dict, images: Path, search_folder: Path, checkpoint_period: float) -> None:
        out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        raise [out_of_memory, RuntimeError("the reason why")][int(tune.get_context().get_trial_name()[-1])]

    monkeypatch.setattr(hparam_search, "train_cifar", fails)
    monkeypatch.setattr(hparam_search, "MAX_FAILURES_PER_TRIAL", 0)
    assert main(["--quick", "--num-samples", "2", "--output-dir", str(tmp_path), "--name", "failing"]) == 1
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "No trial has a model, so there is no best model.",
        "train_cifar_00000 failed: out of memory with batch_size 32, h_1 4, h_2 32: make these smaller, or let fewer "
        "trials run at once, by --gpus-per-trial 1 where they share a GPU, else by --cpus-per-trial.",
        "train_cifar_00001 failed: RuntimeError: the reason why.",
    ]
    assert [row["status"] for row in read_csv(tmp_path / "failing")] == ["ERROR"] * 2
    assert "the reason why" in (tmp_path / "failing" / "train_cifar_00001" / "error.txt").read_text()
    assert not (tmp_path / "failing" / "best_model").exists()


# --- the search killed ------------------------------------------------------------------------------------------------


def start_node(mark: str, *arguments: str, within: Sequence[str] = ()) -> None:
    """Start a node of a cluster, of one CPU, as `ray start` does; its processes have the mark in their environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    subprocess.Popen(
        [*within, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", *arguments],
        env=environment | TOKEN_MODE | {"RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"], "MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_all(mark: str) -> None:
    for pid in processes_with(f"MARK={mark}"):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a cluster of one node with one CPU, and return its address."""
    port, mark = random.SystemRandom().randrange(20_000, 30_000), f"head_of_{tmp_path_factory.getbasetemp()}"
    address = f"127.0.0.1:{port}"
    start_node(mark, "--head", "--port", str(port), "--include-dashboard", "false", "--node-ip-address", "127.0.0.1")
    try:
        wait_for(lambda: len(processes_with(f"MARK={mark}")) > 3, 60)
        time.sleep(2)
        yield address
    finally:
        kill_all(mark)


def wait_for_nodes(count: int) -> None:
    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
    wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == count)
    ray.shutdown()  # for the search to join it


def wait_for_blind_node() -> None:
    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
    wait_for(lambda: "blind" in ray.cluster_resources())
    ray.shutdown()  # for the search to join it


@pytest.fixture(scope="session", autouse=True)
def searches(
    ray_started: None, cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Future, Future]]:
    """Start, beside the other tests, a search that nothing happens to, and the same search killed again and again."""
    folders = [tmp_path_factory.mktemp(name) for name in ("undisturbed", "killed")]
    with ThreadPoolExecutor(1) as executor:
        yield (
            executor.submit(search_undisturbed, cluster, folders[0]),
            executor.submit(search_killed_at_random_moments, cluster, folders[1]),
        )


@pytest.fixture
def undisturbed(searches: tuple[Future, Future]) -> Path:
    """Return the folder of a search that nothing happened to."""
    return searches[0].result()


def search_undisturbed(address: str, folder: Path) -> Path:
    process = start(address, [*LONG, "2", "--output-dir", str(folder), "--name", "it"], folder / "output.txt")
    process.join(120)
    assert process.exitcode == 0, (folder / "output.txt").read_text()
    return folder / "it"


def search_killed_at_random_moments(address: str, parent: Path) -> Path:
    """Kill a search ten times, resume it each time, and return its folder."""
    folder, output = parent / "it", parent / "output.txt"
    command, resume = [*LONG, "2", "--output-dir", str(parent), "--name", "it"], ["--resume", str(folder)]
    generator = random.Random(0)
    for moment in range(10):
        before = state(folder)
        process = start(address, resume if (folder / "search.json").exists() else command, output)
        if moment % 2 == 0:  # as it starts
            process.join(generator.uniform(0, 4))
        else:  # as it trains
            wait_for(lambda epochs=before.epochs: reported_epochs(folder) != epochs)
            process.join(generator.uniform(0, 0.8))
        assert process.exitcode is None, output.read_text()
        process.kill()
        process.join()
        check_nothing_was_lost(before, state(folder))

    # It ends as if nothing had happened, even where the newest checkpoint of a trial is damaged.
    newest = None
    while newest != (newest := last_checkpoints(folder)):
        time.sleep(3)  # a trial's process outlives its search by a moment, and may write one more
    before, sentences = state(folder), []
    for file in folder.glob("*/training_*.pt"):
        trial, epoch = file.parent.name, int(file.stem.split("_")[1])
        if trial not in before.logs and epoch == before.checkpoints[trial]:  # a finished trial may not be pruned yet
            file.write_bytes(file.read_bytes()[:-100])
            before.checkpoints[trial] = 0
            sentences.append(f"{trial} cannot read training_{epoch:06}.pt in")
    process = start(address, resume, output)
    process.join(120)
    assert process.exitcode == 0, output.read_text()
    check_nothing_was_lost(before, state(folder))
    assert [output.read_text().count(sentence) for sentence in sentences] == [1] * len(sentences)
    assert "Traceback" not in output.read_text()
    return folder


@dataclass
class State:
    """What a search's folder holds."""

    logs: dict[str, bytes]  # of finished trials
    checkpoints: dict[str, int]  # the epoch of each trial's newest
    epochs: dict[str, list[int]]  # reported, of each trial


def state(folder: Path) -> State:
    return State(finished_logs(folder), last_checkpoints(folder), reported_epochs(folder))


def check_nothing_was_lost(before: State, after: State) -> None:
    """Check that no finished trial ran again, that all lines are still there, and what was repeated."""
    assert {name: log for name, log in after.logs.items() if name in before.logs} == before.logs
    for name, epochs in after.epochs.items():
        old = before.epochs.get(name, [])
        assert epochs[: len(old)] == old
        new = epochs[len(old) :]
        if old and new and name not in before.logs:
            # No epoch is left out, and none is trained again that a checkpoint had.
            assert new == list(range(new[0], new[-1] + 1))
            assert new[0] <= max(old) + 1
            assert all(epoch > before.checkpoints.get(name, 0) for epoch in new if epoch in old)


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
        (Path, "replace"), (Path, "unlink"), (Path, "write_text"), (Path, "mkdir"), (shutil, "copyfile"),
        (shutil, "rmtree"),
    ):  # fmt: skip
        setattr(owner, name, deadly(getattr(owner, name)))


def test_killed_in_the_wrap_up(undisturbed: Path, own_address: str, tmp_path: Path) -> None:
    folder, output = tmp_path / "it", tmp_path / "output.txt"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "best_model")
    (folder / "results.csv").unlink()
    for checkpoint in folder.glob("*/checkpoint_*"):  # what pruning deletes
        (checkpoint.parent / "training_000001.pt").touch()
        shutil.copytree(checkpoint, checkpoint.with_name("checkpoint_000000"))
    whole = {name: (undisturbed / name).read_bytes() for name in ("results.csv", "best_model/config.json")}
    moments = 0
    while True:
        process = start(own_address, ["--resume", str(folder)], output, kill_at, moments)
        process.join(60)
        if (folder / "results.csv").exists():
            assert (folder / "results.csv").read_bytes() == whole["results.csv"]
        if (folder / "best_model").exists():
            assert sorted(path.name for path in (folder / "best_model").iterdir()) == [
                "config.json",
                "metrics.json",
                "weights.pt",
            ]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, output.read_text()
        moments += 1
    assert moments >= 8
    assert {name: (folder / name).read_bytes() for name in whole} == whole
    assert len(list(folder.glob("*/checkpoint_*/weights.pt"))) == 2
    assert not list(folder.glob("*/training_*"))
    assert "Best trial: " in output.read_text()


def swap(lines: list[bytes], generator: random.Random) -> list[bytes]:
    i = generator.randrange(len(lines))
    return [*lines[i:], *lines[:i]]


def flip(content: bytes, generator: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(generator.choice([1, 1, 8])):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return bytes(content)


# What may happen to a file's bytes.
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": flip,
    "cut": lambda content, generator: content[: generator.randrange(len(content))],
    "swapped": lambda content, generator: b"".join(swap(content.splitlines(keepends=True), generator)),
    "doubled": lambda content, generator: b"".join(2 * line for line in content.splitlines(keepends=True)),
    "of another type": lambda content, generator: generator.choice(
        [b"[]", b"{}", b"null", b"3", b'{"epoch": "x"}\n', b"[" * 10_000, b"\xff\xfe", b"NaN"]
    ),
    "one more line": lambda content, generator: content + b'{"epoch": "x"}\n',
    "emptied": lambda content, generator: b"",
    "gone": lambda content, generator: None,
}


@pytest.mark.usefixtures("ray_started", "small_search")
@pytest.mark.parametrize("finished", [True, False])
def test_any_damage_ends_in_a_sentence_and_in_no_figure_that_was_not_reported(
    finished: bool, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    generator, dataset = random.Random(0), make_synthetic(**SMALL_IMAGES)
    monkeypatch.setattr(hparam_search, "load_dataset", lambda settings: dataset)
    monkeypatch.setattr(tune.Tuner, "fit", lambda tuner: None)  # all but the training
    whole = tmp_path / "whole"
    shutil.copytree(undisturbed, whole, ignore=shutil.ignore_patterns("events.*"))
    if not finished:
        log = whole / trial_name(1) / "result.json"
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:6]))
        (whole / trial_name(1) / "training_000006.pt").write_bytes(b"state")
    reported, tested = {}, set()
    for row in read_results(read_search(whole)):
        lines, _ = read_log(whole / row["name"])
        reported[row["trial_id"]] = {key: {str(line[key]) for line in lines} for key in ("loss", "accuracy", "seconds")}
        reported[row["trial_id"]] |= {key: {str(value)} for key, value in row["config"].items() if key != "epochs"}
        if model := load_model(whole / (row["checkpoint"] or "") / WEIGHTS_FILE, row["config"], 5):
            batches = evaluation_batches(
                dataset.test_images, dataset.test_labels, dataset.mean, dataset.std, torch.device("cpu")
            )
            tested.add(f"  test accuracy: {evaluate(model, batches)[1]:.4f}")
    codes = []
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        for damage, change in DAMAGES.items():
            folder = tmp_path / "it"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            content = change((whole / file).read_bytes(), generator)
            (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
            if file.parts[-1] == "weights.pt" and file.parts[0] != "best_model":
                shutil.rmtree(folder / "best_model")  # which would make up for it
            code = main(["--resume", str(folder)])
            printed, what = capsys.readouterr(), f"{file} {damage}"
            codes.append(code)
            assert code in (0, 1, 2), what
            assert code == 0 or printed.err.strip().endswith("."), what
            if code == 2:
                assert printed.err.startswith("hparam_search.py: "), what
                assert printed.err.count("\n") == 1, what
                continue
            assert {line for line in printed.out.splitlines() if "test accuracy" in line} <= tested, what
            for row in read_csv(folder):
                for key, column in (
                    ("loss", "loss"), ("loss", "best_loss"), ("accuracy", "accuracy"), ("accuracy", "best_accuracy"),
                    ("seconds", "seconds"), ("lr", "lr"), ("p_drop", "p_drop"), ("seed", "seed"),
                ):  # fmt: skip
                    assert row[column] in reported[row["trial_id"]][key] | {""}, (what, column)
    assert all(codes.count(code) > 5 for code in (0, 1, 2))


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_started", "small_search")
def test_disk_is_bounded_while_a_search_runs(tmp_path: Path) -> None:
    folder, seen, ended = tmp_path / "it", [], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            trials = [[path.name for path in trial.iterdir()] for trial in folder.glob("train_cifar_*")]
            weights = [sum(name.startswith("checkpoint_") for name in names) for names in trials]
            states = [sum(name.startswith("training_") for name in names) for names in trials]
            seen.append((sum(weights), max(weights, default=0), sum(states), max(states, default=0)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        command = ["--quick", "--num-samples", "9", "--max-epochs", "2", "--output-dir", str(tmp_path)]
        assert main([*command, "--name", "it"]) == 0
    finally:
        ended.set()
        watcher.join()
    assert len(read_csv(folder)) == 9
    weights, of_one_trial, states, states_of_one = (max(counts) for counts in zip(*seen, strict=True))
    assert 0 < of_one_trial <= 2  # the best, and the best one before
    assert 0 < states_of_one <= 2  # the newest, and the one before
    at_once = os.cpu_count()
    assert 5 < weights <= 5 + 2 * at_once + 2  # of trials that run, and of one that ends
    assert states <= 2 * at_once + 2
    assert len(list(folder.glob("*/checkpoint_*/weights.pt"))) == 5
    assert not list(folder.glob("*/training_*"))


# --- what went on beside the other tests ------------------------------------------------------------------------------


@pytest.mark.waits_for_searches
def test_search_killed_at_random_moments_ends_as_if_undisturbed(
    undisturbed: Path, searches: tuple[Future, Future]
) -> None:
    folder = searches[1].result()
    assert figures(folder) == figures(undisturbed)
    for trial in (0, 1):
        assert lines_of(folder, trial)[-1] == lines_of(undisturbed, trial)[-1]


@pytest.mark.waits_for_searches
def test_node_of_a_cluster_dies(cluster: str, searches: tuple[Future, Future], tmp_path: Path) -> None:
    searches[1].exception()  # wait: there it is one trial at a time
    folder, output, mark = tmp_path / "it", tmp_path / "output.txt", f"second_of_{tmp_path}"
    # Where it can be so, this node has nothing of the program: Ray brings it along.
    files = " ".join(f"{REPOSITORY / name}.py" for name in ("hparam_search", "train", "model", "data"))
    hide = f'mount -t tmpfs none {REPOSITORY}/search; for f in {files}; do mount --bind /dev/null $f; done; exec "$@"'
    start_node(mark, "--address", cluster, within=[*NAMESPACE, "sh", "-c", hide, "sh"] if NAMESPACE else [])
    try:
        process = start(cluster, [*LONG, "2", "--output-dir", str(tmp_path), "--name", "it"], output, wait_for_nodes, 2)
        wait_for(lambda: len(last_checkpoints(folder)) == 2 or process.exitcode is not None, 90)
        assert process.exitcode is None, output.read_text()
        before = last_checkpoints(folder)
        kill_all(mark)
        process.join(180)
        assert process.exitcode == 0, output.read_text()
    finally:
        kill_all(mark)
    assert [row["status"] for row in read_csv(folder)] == ["TERMINATED"] * 2
    for name, epochs in reported_epochs(folder).items():
        assert sorted(set(epochs)) == list(range(1, max(epochs) + 1))
        repeated = [epoch for epoch in epochs if epochs.count(epoch) > 1]
        assert all(epoch > before[name] for epoch in repeated)


@pytest.mark.waits_for_searches
@pytest.mark.skipif(not NAMESPACE, reason="no mount namespaces here, for a node that sees another disk")
def test_node_that_does_not_see_the_folder_is_named(cluster: str, tmp_path: Path) -> None:
    folder, output, mark = tmp_path / "disk" / "it", tmp_path / "output.txt", f"blind_of_{tmp_path}"
    folder.parent.mkdir()
    mount = f'mount -t tmpfs none {folder.parent} && exec "$@"'
    namespace = [*NAMESPACE, "sh", "-c", mount, "sh"]
    start_node(mark, "--address", cluster, "--resources", '{"blind": 1}', within=namespace)
    try:
        flags = [*LONG, "2", "--output-dir", str(folder.parent), "--name", "it"]
        process = start(cluster, flags, output, wait_for_blind_node)
        process.join(120)
    finally:
        kill_all(mark)
    assert process.exitcode == 2, output.read_text()
    assert f"does not see {folder}: give an --output-dir on a disk that all nodes share.\n" in output.read_text()
    assert not folder.exists()
