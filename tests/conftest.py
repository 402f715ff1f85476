"""Ray, started once; small sets of images; and searches: here, as processes of their own, and beside the tests."""

import csv
import io
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image

import hparam_search  # before Ray: it sets what Ray reads at its import

# isort: split
import ray
from ray import tune
from ray.tune.logger import LoggerCallback

from search.cost import model_cost
from search.files import load_tensors, read_lines
from search.records import LOG_FILE, Search, open_search
from search.settings import Settings
from tests.helpers import CONFIG, RECIPE

torch.set_num_threads(1)  # of two, one may wait for the other if the machine is busy
model_cost(CONFIG, 5)  # takes a second the first time: here, once for all processes that are forked
REPOSITORY = Path(hparam_search.__file__).parent
SMALL_IMAGES = {"num_train": 125, "num_test": 50, "num_classes": 5}
EXAMPLE = ["--num-samples", "2", "--max-epochs", "10"]  # the flags of `finished`
# Runs a command in its own mount namespace, if allowed.
NAMESPACE = ["unshare", "-rm"]
if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], check=False).returncode != 0:
    NAMESPACE = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "waits_for_searches" in item.keywords)
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
    """Start Ray with three CPUs, one of which is for `killed`, and return its address."""
    with ExitStack() as until_the_end:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hparam_search.ray_runtime, "usable_cpus", lambda: 3)
            patch.setenv("RAY_health_check_period_ms", "200")  # to notice the death of a node within seconds
            until_the_end.enter_context(hparam_search.ray_runtime.started_ray(Settings(), until_the_end))
        yield ray.get_runtime_context().gcs_address


def make_small(setattr: Callable) -> None:
    """Let --quick search a smaller space on fewer images, one trial at a time: so the results are always the same."""
    space = hparam_search.QUICK_SPACE | RECIPE | {"h_1": 4, "h_2": tune.grid_search([16, 32])}
    values = {"QUICK_IMAGES": SMALL_IMAGES, "QUICK_SPACE": space, "MODELS_KEPT": 2, "REPEATED_TRIALS": 1}
    values |= {"PATIENCE": 1000, "SAVE_PERIOD": 0}  # the loss on few images is rough; as if epochs were long
    for name, value in values.items():
        setattr(hparam_search, name, value)
    setattr(hparam_search.tuner, "machines", lambda: [(1, 0)])


@pytest.fixture
def small_search(ray_started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch.setattr)


def run_here(trainable: Callable, search_alg: Any, scheduler: Any, callbacks: list, **options: Any) -> None:
    """Stand for Ray Tune where processes are not the point: run one trial at a time, in this process."""
    (watcher,), stopper = callbacks, options["stop"]

    def run(trial: MagicMock) -> None:
        about = {"iteration": 1, "trials": [trial]}
        trial.__str__.return_value = trial.get_trial_name.return_value = options["trial_name_creator"](trial)
        trial.get_trial_resources.return_value = SimpleNamespace(head_cpus=1, required_resources={})

        def report(result: dict) -> None:
            stopper("", result)
            decision = scheduler.on_trial_result(None, trial, result)
            watcher.on_step_end(**about)
            if decision == "STOP" or stopper.stop_all():
                raise StopIteration

        watcher.on_trial_start(**about, trial=trial)
        with pytest.MonkeyPatch.context() as patch, suppress(StopIteration):
            patch.setattr("search.trial.tune", SimpleNamespace(report=report, get_context=lambda: trial))
            patch.setattr("search.trial.best_device", lambda name: torch.device("cpu"))
            patch.setattr("search.trial.print_into", lambda path: None)
            trainable(trial.config)

    watcher.setup()
    while not stopper.stop_all() and isinstance(config := search_alg.suggest(""), dict):
        run(MagicMock(config=config, status="RUNNING", ERROR="ERROR"))
    watcher.on_experiment_end([])


@pytest.fixture
def trials_here(small_search: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "run", run_here)


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
    """Exits at the first result."""

    def __init__(self) -> None:
        self.connection = threading.Lock()  # cannot be pickled

    def on_trial_result(self, **info: object) -> None:
        sys.exit("no server")


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


def epochs_saved(folder: Path) -> dict[str, int]:
    """Return, for each training state, its epoch."""
    states = {path.parent.name: load_tensors(path) for path in folder.glob("*/training.pt")}
    return {name: len(state["history"]) for name, state in states.items() if state}  # None: pruned just now


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


def wait_for(condition: Callable, process: multiprocessing.Process | None = None, seconds: float = 120) -> None:
    """Wait until a condition holds, while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.exitcode is None, Path(process.name).read_text()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def processes_with(mark: str) -> list[int]:
    """Return the processes that have MARK=mark… in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"MARK={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def kill_all(mark: str) -> None:
    for pid in processes_with(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def second_node(address: str, mark: str, within: Sequence[str]) -> Iterator[None]:
    """Let a Ray have a second node, of one CPU, until the block ends.

    The command `within` runs the node's, and its processes have the mark in their environment.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"], "MARK": mark}
    # The first node listens on the loopback interface, which Ray would replace by another one.
    code = "from ray._private import services; services.resolve_ip_for_localhost = lambda host: host; "
    code += "from ray.scripts.scripts import main; main()"
    command = [*within, sys.executable, "-c", code, "start", "--address", address, "--block", "--num-cpus", "1"]
    command += ["--node-ip-address", "127.0.0.1"]
    subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: sum(each["Alive"] for each in ray.nodes()) == 2)
        yield
    finally:
        kill_all(mark)
        # Until Ray has noticed, it may place the next trial there.
        wait_for(lambda: sum(each["Alive"] for each in ray.nodes()) == 1)


@pytest.fixture(scope="session", autouse=True)
def searches_beside(request: pytest.FixtureRequest) -> None:
    """Start the searches that run beside all tests, if one that waits for them is to run."""
    for name in ("quick_run", "killed"):
        if any(name in item.fixturenames for item in request.session.items):
            request.getfixturevalue(name)


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.Popen, Path]:
    """Start README's first command where it is hardest; return its process and the folder in which it was called.

    That is another project's folder, for one core, without a home, and with an output that is soon closed.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("train", "data", "model", "search"):
        (folder / f"{name}.py").write_text("raise SystemExit('another project')")
    scratch = folder / ("a_batch_system_has_long_names_for_" * 3)
    scratch.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": " ", "TMPDIR": str(scratch), "PYTHONPATH": str(folder)}
    environment |= {"PYTHONIOENCODING": "ascii", "HOME": "~"}
    script = str(REPOSITORY / "hparam_search.py")
    command = shlex.join([sys.executable, script, "--quick", "--output-dir", "~/my outputs", "--name", "it"])
    command = ["bash", "-o", "pipefail", "-c", f"{command} 2> err | head -1 > out"]
    if hasattr(os, "sched_setaffinity"):
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command]
    return subprocess.Popen(command, cwd=folder, env=environment), folder


@pytest.fixture(scope="session")
def killed(ray_started: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future]:
    """Start a search like `finished` which is killed again and again; yield its folder, once it has ended."""
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(search_killed_at_random_moments, ray_started, tmp_path_factory.mktemp("killed") / "it")


def search_killed_at_random_moments(address: str, folder: Path) -> Path:
    """Kill a search ten times, start or resume it each time, and return its folder."""
    output, generator = folder.parent / "output.txt", random.Random(0)

    def trains_after_event(number: int) -> bool:
        """Return whether the log has so many events, the last of which reports an epoch without a saved state."""
        events, _ = read_lines(folder / LOG_FILE)
        return len(events) >= number and events[-1].get("epoch", 2) not in (2, 4, 8, 10)

    for moment in range(11):
        saved, before = epochs_saved(folder), read_lines(folder / LOG_FILE)[0]
        process = start(address, quick(folder, *EXAMPLE, "--or-resume"), output, save_every, 1000 * (moment % 2))
        if moment == 10:
            process.join(120)
        elif moment % 2:  # as it trains
            goal = len(before) + generator.randint(2, 5)  # one event is that it has started
            wait_for(partial(trains_after_event, goal), process)
            process.join(generator.uniform(0, 0.05))
        else:  # as it starts
            process.join(generator.uniform(0, 1.5))
        assert process.exitcode == (0 if moment == 10 else None), output.read_text()
        process.kill()
        process.join()
        # The log has only grown, and no trial has lost what was saved.
        events, damaged = read_lines(folder / LOG_FILE)
        assert (events[: len(before)], damaged) == (before, 0)
        for event in events[len(before) :]:
            assert event["event"] != "restarted" or event["epoch"] >= saved.get(event["trial"], 0)
    assert any(event["event"] == "restarted" for event in events)  # a trial, from an earlier epoch
    assert "Traceback" not in output.read_text()
    return folder


def save_every(seconds: float) -> None:
    hparam_search.SAVE_PERIOD = seconds
