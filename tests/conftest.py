"""Fixtures: Ray, started once, and small sets of images."""

import csv
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import hparam_search  # first, for it sets what Ray reads when it is imported
from data import Dataset, make_synthetic
from model import SmallResNet
from search.records import read_log
from search.signals import SIGNALS
from train import METRICS

REPOSITORY = Path(hparam_search.__file__).parent
# Runs a command in its own mount namespace, if allowed.
NAMESPACE = ["unshare", "-rm"]
if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], check=False).returncode != 0:
    NAMESPACE = []
SMALL_IMAGES = {"num_train": 250, "num_test": 100, "num_classes": 5}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "waits_for_searches" in item.keywords)  # they go on beside the other tests
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def ray_started() -> Iterator[None]:
    with hparam_search.running_ray():
        yield


@pytest.fixture(scope="session")
def small_dataset() -> Dataset:
    """300 training, 75 validation and 100 test images of 5 classes."""
    return make_synthetic(num_train=375, num_test=100, num_classes=5)


@pytest.fixture
def small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make --quick smaller yet: 2 trials of 200 training images."""
    make_small(monkeypatch.setattr)


def make_small(setattr: Callable) -> None:
    setattr(hparam_search, "QUICK_IMAGES", SMALL_IMAGES)
    setattr(hparam_search, "QUICK_SPACE", hparam_search.QUICK_SPACE | {"h_1": 4, "h_2": 32})
    setattr(hparam_search, "PATIENCE", 8)  # the loss on few images is rough
    setattr(hparam_search, "CHECKPOINT_PERIOD", 0)  # as where epochs are long


CONFIG = {"seed": 0, "epochs": 10, "h_1": 4, "h_2": 8, "p_drop": 0.1, "lr": 0.01, "schedule": "constant"}
# Accuracies of seven trials; two are alike, and of these the one with the lower loss is better.
ACCURACIES = [0.3, 0.5, 0.1, 0.5, 0.2, 0.6, 0.4]


@pytest.fixture
def search(tmp_path: Path) -> tuple[Path, list[dict]]:
    """Return the folder and results of a search of seven trials, each with a best and a last checkpoint."""
    results = []
    for i, accuracy in enumerate(ACCURACIES):
        for epoch in (4, 6):
            checkpoint = tmp_path / f"trial_{i}" / f"checkpoint_{epoch:06}"
            checkpoint.mkdir(parents=True)
            torch.manual_seed(i)
            torch.save(SmallResNet(4 + i % 2, 8, 0.1, 5).state_dict(), checkpoint / "weights.pt")
            (checkpoint.parent / f"training_{epoch:06}.pt").write_bytes(b"state")
        row = {"trial_id": str(i), "name": f"trial_{i}", "status": "TERMINATED", "config": CONFIG | {"h_1": 4 + i % 2}}
        row |= {"epochs": 6, "loss": 2.0, "accuracy": 0.1, "seconds": 12.5, "error": None}
        row |= {"best_epoch": 4, "best_accuracy": accuracy, "best_loss": 1.0 - i / 10}
        results.append(row | {"checkpoint": f"trial_{i}/checkpoint_000004"})
    return tmp_path, results


def log_line(epoch: int, time: float = 0.0, **metrics: object) -> dict:
    """Return a line of a trial's log."""
    return dict.fromkeys(METRICS, 0.5) | {"epoch": epoch, "time": time} | metrics


def read_csv(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a search's results.csv."""
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def figures(folder: Path) -> list[dict]:
    """Return results.csv without what a clock measured."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_csv(folder)]


def reported_epochs(folder: Path) -> dict[str, list[int]]:
    """Return, for each trial that has begun, the epochs in its log, in order."""
    logs = {file.parent.name: read_log(file.parent)[0] for file in folder.glob("*/result.json")}
    return {name: [line["epoch"] for line in lines if "epoch" in line] for name, lines in logs.items()}


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


# --- searches as processes of their own -------------------------------------------------------------------------------


def wait_for(condition: Callable, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def last_checkpoints(folder: Path) -> dict[str, int]:
    """Return, for each trial, the epoch of the newest state that can be resumed."""
    return {path.parent.name: int(path.stem.split("_")[1]) for path in sorted(folder.glob("*/training_*.pt"))}


def processes_with(mark: str) -> list[int]:
    """Return the processes that have a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def in_a_process(
    main: Callable,
    environment: dict[str, str],
    arguments: list[str],
    output: Path,
    prepare: Callable | None,
    values: tuple,
) -> None:
    """Run main as a process of its own; what it prints goes into a file."""
    for number in SIGNALS:  # where the tests run under nohup, or in the background, some are ignored
        signal.signal(number, signal.SIG_DFL)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    make_small(setattr)
    if prepare:
        prepare(*values)
    os._exit(main(arguments))


def start(
    address: str, arguments: list[str], output: Path, prepare: Callable | None = None, *values: object
) -> multiprocessing.Process:
    """Start a search in a process that joins a running Ray."""
    environment = {"RAY_ADDRESS": address, "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"], "RAY_AUTH_MODE": "token"}
    return start_main(hparam_search.main, environment, arguments, output, prepare, values)


def start_main(main: Callable, *arguments: object) -> multiprocessing.Process:
    """Start in_a_process: faster than starting a script, which would import torch and Ray anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest"])
    process = context.Process(target=in_a_process, args=(main, *arguments))
    process.start()
    return process


@pytest.fixture(scope="session")
def own_address(ray_started: None) -> str:
    """Return the address of the tests' Ray."""
    import ray  # here, for hparam_search sets what Ray reads when it is imported

    return ray.get_runtime_context().gcs_address
