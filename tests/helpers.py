"""What unit tests share: reports, searches that are recorded but not trained, and damage."""

import contextlib
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import hparam_search
from data import make_synthetic
from search.records import METRICS, Objective, Search
from search.settings import Settings
from search.space import summarize
from train import Report, Training

torch.set_num_threads(1)  # of two, one may wait for the other if the machine is busy
CPU = torch.device("cpu")
IMAGES = make_synthetic(num_train=120, num_test=40, num_classes=5)  # 95 for training, 25 for validation
REPOSITORY = Path(hparam_search.__file__).parent
SPACE = {"seed": 0} | hparam_search.param_space
CONFIG = SPACE | {"epochs": 4, "h_1": 4, "h_2": 8, "p_drop": 0.3, "lr": 0.05, "batch_size": 32, "seed": 5}
END = "all epochs done"


def report(epoch: int, accuracy: float = 0.5, loss: float = 1.0, seconds: float | None = None) -> Report:
    return Report(epoch, loss, accuracy, 1.0, 0.5, 0.01, 1000.0, epoch if seconds is None else seconds)


def search_in(
    folder: Path, *, objective: Sequence[str] = ("accuracy", "max"), space: dict = SPACE, **settings: object
) -> Search:
    """Return a new search without trials, as create_search does, but without images."""
    search = Search(folder, Settings(**settings), summarize(space), {}, Objective(*objective))
    search.write()
    return search


def add_trial(
    search: Search, accuracies: Sequence[float], end: str | None = END, repeats: str | None = None, **config: object
) -> str:
    """Record a trial that reports these accuracies and then ends; a negative one means that it diverged."""
    name = f"train_cifar_{len(search.trials):05}"
    search.record("drawn", trial=name, config=CONFIG | config, repeats=repeats)
    for epoch, accuracy in enumerate(accuracies, 1):
        each = report(epoch, accuracy, loss=float("nan") if accuracy < 0 else 1.0)
        tell(search, name, each, end if epoch == len(accuracies) else None)
    return name


def tell(search: Search, name: str, each: Report, end: str | None = None) -> None:
    """Record a report."""
    search.record("reported", trial=name, **{key: getattr(each, key) for key in METRICS}, end=end)


@contextlib.contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Let no file grow beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def weights_of(training: Training) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in training.evaluated.state_dict().values()])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a byte flipped": flip_a_byte,
    "empty": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_text("something else"),
    "not a dict": lambda path: torch.save([1, 2], path),
}
