"""Fixtures: Ray, started once, and small sets of images."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import hparam_search  # first, for it sets what Ray reads when it is imported
from data import Dataset, make_synthetic
from search.records import read_log

REPOSITORY = Path(hparam_search.__file__).parent
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


def read_csv(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a search's results.csv."""
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def reported_epochs(folder: Path) -> dict[str, list[int]]:
    """Return, for each trial that has begun, the epochs in its log, in order."""
    logs = {file.parent.name: read_log(file.parent) for file in folder.glob("*/result.json")}
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
