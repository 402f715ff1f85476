"""Fixtures: Ray, started once, and small sets of images."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import hparam_search  # first, for it sets what Ray reads when it is imported
from data import Dataset, make_synthetic

REPOSITORY = Path(hparam_search.__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
    """500 training, 125 validation and 100 test images of 5 classes."""
    return make_synthetic(num_train=625, num_test=100, num_classes=5)


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
