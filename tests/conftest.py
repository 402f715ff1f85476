"""Ray, started once; small sets of images; and searches, here or as processes of their own."""

import csv
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from ray import tune
from ray.tune.logger import LoggerCallback

import hparam_search  # before Ray: it sets what Ray reads at its import
from search.cost import model_cost
from search.files import load_tensors, read_lines
from search.records import LOG_FILE, Search, open_search
from search.settings import Settings
from tests.helpers import CONFIG, RECIPE

torch.set_num_threads(1)  # of two, one may wait for the other if the machine is busy
model_cost(CONFIG, 5)  # takes a second the first time: here, once for all processes that are forked
REPOSITORY = Path(hparam_search.__file__).parent
SMALL_IMAGES = {"num_train": 250, "num_test": 100, "num_classes": 5}
# Runs a command in its own mount namespace, if allowed.
NAMESPACE = ["unshare", "-rm"]
if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], check=False).returncode != 0:
    NAMESPACE = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "waits_for_searches" in item.keywords)  # which run beside the other tests
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable:
    """Return a function that writes a folder of random PNGs: {"train": {"cat": 5}, …} → its path."""

    def make(splits: dict[str, dict[str, int]], size: tuple[int, int] = (32, 32)) -> Path:
        generator = torch.Generator().manual_seed(0)
        for split, classes in splits.items():
            for name, count in classes.items():
                (tmp_path / split / name).mkdir(parents=True)
                for i in range(count):
                    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
                    Image.fromarray(pixels.numpy()).save(tmp_path / split / name / f"{i:03}.png")
        return tmp_path

    return make


@pytest.fixture(scope="session")
def ray_started() -> Iterator[str]:
    """Start Ray with one CPU, and return its address: one trial at a time, on one thread, gives the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hparam_search.tuner, "usable_cpus", lambda: 1)
        with hparam_search.tuner.running_ray(Settings()):
            yield hparam_search.tuner.ray.get_runtime_context().gcs_address


EXAMPLE = ["--num-samples", "2", "--max-epochs", "10"]  # the flags of `finished`


@pytest.fixture
def small_search(ray_started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch.setattr)


def make_small(setattr: Callable) -> None:
    space = hparam_search.QUICK_SPACE | RECIPE | {"h_1": 4, "h_2": hparam_search.tune.grid_search([16, 32])}
    values = {"QUICK_IMAGES": SMALL_IMAGES, "QUICK_SPACE": space, "MODELS_KEPT": 2, "REPEATED_TRIALS": 1}
    values |= {"PATIENCE": 1000, "SAVE_PERIOD": 0}  # the loss on few images is rough; as if epochs were long
    for name, value in values.items():
        setattr(hparam_search, name, value)


class TrialHere:
    """Stands for one of Tune's trials."""

    status, ERROR, trial_id = "RUNNING", "ERROR", "here"

    def __init__(self, config: dict, name: Callable) -> None:
        self.config = config
        self.name = name(self)

    def __str__(self) -> str:
        return self.name

    def get_trial_name(self) -> str:
        return self.name

    def get_trial_resources(self) -> SimpleNamespace:
        return SimpleNamespace(head_cpus=1, required_resources={})


class TunerHere:
    """Stands for Ray Tune where processes are not the point: it runs one trial at a time, in this process."""

    def __init__(self, trainable: Callable, tune_config: tune.TuneConfig, run_config: tune.RunConfig) -> None:
        self.trainable, self.queue, self.referee = trainable, tune_config.search_alg, tune_config.scheduler
        self.name, self.stopper, (self.watcher,) = tune_config.trial_name_creator, run_config.stop, run_config.callbacks

    def fit(self) -> None:
        self.watcher.setup()
        while not self.stopper.stop_all() and isinstance(config := self.queue.suggest(""), dict):
            trial = TrialHere(config, self.name)
            about = {"iteration": 1, "trials": [trial]}
            self.watcher.on_trial_start(**about, trial=trial)

            def report(result: dict, trial: TrialHere = trial, about: dict = about) -> None:
                self.stopper("", result)
                decision = self.referee.on_trial_result(None, trial, result)
                self.watcher.on_step_end(**about)
                if decision == "STOP" or self.stopper.stop_all():
                    raise StopIteration

            with pytest.MonkeyPatch.context() as patch, suppress(StopIteration):
                patch.setattr(
                    "search.trial.tune", SimpleNamespace(report=report, get_context=lambda trial=trial: trial)
                )
                patch.setattr("search.trial.best_device", lambda name: torch.device("cpu"))
                patch.setattr("search.trial.print_into", lambda path: None)
                self.trainable(trial.config)
        self.watcher.on_experiment_end([])


def make_trials_here(setattr: Callable) -> None:
    setattr(tune, "Tuner", TunerHere)
    setattr(tune, "with_resources", lambda trainable, resources: trainable)


@pytest.fixture
def trials_here(small_search: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trials_here(monkeypatch.setattr)


class Tracker(LoggerCallback):
    """Keeps what it is told, as Ray's callbacks for experiment trackers send it to them."""

    def setup(self, **info: object) -> None:
        self.told, self.ended, self.over = {}, [], False

    def log_trial_start(self, trial: Any) -> None:
        self.told[trial] = []

    def log_trial_result(self, iteration: int, trial: Any, result: dict) -> None:
        self.told[trial].append((result["training_iteration"], result["loss"], result["config"]))

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self.ended.append((str(trial), failed))

    def on_experiment_end(self, trials: list, **info: object) -> None:
        self.over = True


class Broken(tune.Callback):
    """Fails at the first result."""

    def on_trial_result(self, **info: object) -> None:
        raise ConnectionError("no server")


class Finished(NamedTuple):
    """A search that has finished."""

    folder: Path
    out: str  # what it printed
    err: str
    search: Search
    rows: list[dict[str, str]]  # of results.csv
    metrics: dict  # of the best model
    tracker: Tracker


@pytest.fixture(scope="session")
def finished(ray_started: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, out, err = tmp_path_factory.mktemp("finished") / "it", io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        make_small(patch.setattr)
        patch.setattr(hparam_search, "callbacks", [Broken(), tracker := Tracker()])
        assert run_search(folder, *EXAMPLE) == 0
    metrics = json.loads((folder / "best_model" / "metrics.json").read_text())
    return Finished(folder, out.getvalue(), err.getvalue(), open_search(folder, {}), read_csv(folder), metrics, tracker)


def run_search(folder: Path, *flags: object) -> int:
    return hparam_search.main(quick(folder, *flags))


def quick(folder: Path, *flags: object) -> list[str]:
    """Return the arguments of a quick search in a folder."""
    where = ["--output-dir", str(folder.parent), "--name", folder.name, "--gpus-per-trial", "0"]
    return ["--quick", *where, *map(str, flags)]


def read_csv(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a search's results.csv."""
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def figures(folder: Path, without: str = "seconds images_per_second") -> list[dict]:
    """Return results.csv without what a clock measured."""
    return [{key: value for key, value in row.items() if key not in without.split()} for row in read_csv(folder)]


def copy_before_the_end(folder: Path, target: Path) -> Path:
    """Copy a search as it was before its best model was tested, written and shown."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "best_model")
    (target / "results.csv").unlink()
    lines = (target / LOG_FILE).read_text().splitlines(keepends=True)
    (target / LOG_FILE).write_text("".join(line for line in lines if '"tested"' not in line and '"shown"' not in line))
    return target


def has_reported(folder: Path) -> bool:
    return any(event["event"] == "reported" for event in read_lines(folder / LOG_FILE)[0])


def epochs_saved(folder: Path) -> dict[str, int]:
    """Return, for each training state, its epoch."""
    states = {path.parent.name: load_tensors(path) for path in folder.glob("*/training.pt")}
    return {name: len(state["history"]) for name, state in states.items() if state}  # None: pruned just now


def wait_for(condition: Callable, process: multiprocessing.Process | None = None, seconds: float = 120) -> None:
    """Wait until a condition holds, while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.exitcode is None, Path(process.name).read_text()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def processes_with(mark: str) -> list[int]:
    """Return the processes that have a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def start(
    address: str | None, arguments: list[str], output: Path, prepare: Callable | None = None, *values: object
) -> multiprocessing.Process:
    """Start a small search in a process of its own, which joins a running Ray, or starts one if address is None.

    From a fork server: a script would take seconds to import torch and Ray. prepare(*values) is called first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest"])
    arguments = (address, arguments, output, prepare, values)
    process = context.Process(target=in_a_process, args=arguments, name=str(output))
    process.start()
    return process


def in_a_process(
    address: str | None, arguments: list[str], output: Path, prepare: Callable | None, values: tuple
) -> None:
    """Run a search; what it prints goes into a file."""
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored where the tests run in the background or under nohup
        signal.signal(number, signal.SIG_DFL)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RAY_ADDRESS": address} if address else {}
    make_small(setattr)
    if prepare:
        prepare(*values)
    os._exit(hparam_search.main(arguments))


@pytest.fixture(scope="session")
def cluster(ray_started: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a cluster of one node with one CPU, for searches beside the other tests, and return its address."""
    port, mark = random.SystemRandom().randrange(20_000, 30_000), f"head_of_{tmp_path_factory.getbasetemp()}"
    options = ["--head", "--port", str(port), "--include-dashboard", "false", "--node-ip-address", "127.0.0.1"]
    with node(mark, *options):
        wait_for(lambda: len(processes_with(f"MARK={mark}")) > 3)
        time.sleep(2)
        yield f"127.0.0.1:{port}"


@contextmanager
def node(mark: str, *arguments: str, within: Sequence[str] = ()) -> Iterator[None]:
    """Run a node of a cluster, of one CPU, until the block ends; its processes have the mark in their environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"], "MARK": mark}
    command = [*within, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", *arguments]
    subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        kill_all(mark)


def kill_all(mark: str) -> None:
    for pid in processes_with(f"MARK={mark}"):
        os.kill(pid, signal.SIGKILL)
