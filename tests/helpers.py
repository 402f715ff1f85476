"""What unit tests share: reports, searches that are recorded but not trained, and damage."""

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import hparam_search
from data import make_synthetic
from search.records import METRICS, Objective, Search
from search.settings import Settings
from search.space import summarize
from train import Report, evaluation_batches

ACCURACY = Objective("accuracy", "max")
CPU, NAN, END = torch.device("cpu"), float("nan"), "all epochs done"
IMAGES = make_synthetic(num_train=120, num_test=40, num_classes=5)  # 95 for training, 25 for validation
VALIDATION = evaluation_batches(IMAGES, "val", CPU)
# With a recipe of their own, so that a new default does not change what happens in the tests.
RECIPE = {"bias_lr": 0.0, "crop_padding": 4}
SPACE = {"seed": 0} | hparam_search.param_space | RECIPE
CONFIG = SPACE | {"epochs": 4, "h_1": 4, "h_2": 8, "p_drop": 0.3, "lr": 0.05, "batch_size": 32, "seed": 5}
DAMAGES: list[Callable[[Path], object]] = [
    lambda path: path.write_bytes((text := path.read_bytes())[: len(text) // 2] + b"~" + text[len(text) // 2 + 1 :]),
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(b""),
    lambda path: torch.save([1, 2], path),
]


def report(epoch: int, accuracy: float = 0.5, loss: float = 1.0, seconds: float = 1.0) -> Report:
    return Report(epoch, loss, accuracy, 1.0, 0.5, 0.01, 1000.0, seconds)


def search_in(folder: Path, metric: str = "accuracy", mode: str = "max", **settings: object) -> Search:
    """Return a new search without trials and images."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(**{"output_dir": str(folder.parent), "name": folder.name} | settings)
    sizes = {"num_classes": 5, "num_val": 25}  # as IMAGES
    search = Search(folder, settings, summarize(SPACE), sizes, Objective(metric, mode), {})
    search.samples = [settings.num_samples]
    search.write()
    return search


def add(search: Search, *accuracies: float, end: str | None = END, repeats: str | None = None, **config: object) -> str:
    """Record a trial that reports these accuracies and then ends; a negative one means that it diverged."""
    name = f"train_cifar_{len(search.trials):05}"
    search.record("drawn", trial=name, config=CONFIG | config, repeats=repeats)
    for i, accuracy in enumerate(accuracies, 1):
        tell(search, name, report(i, accuracy, NAN if accuracy < 0 else 1.0), end if i == len(accuracies) else None)
    return name


def tell(search: Search, name: str, each: Report, end: str | None = None, paused: bool = False) -> None:
    search.record("reported", trial=name, **{key: getattr(each, key) for key in METRICS}, end=end, paused=paused)


@contextlib.contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Let no file grow beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
