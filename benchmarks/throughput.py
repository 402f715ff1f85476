"""Training images per second of one trial, compared with the baseline's loop.

python -m benchmarks.throughput

Two loops are timed in turn, round after round, with the same model, batch size and number of steps:

    search      an epoch of train_epochs, as a trial runs it
    baseline    a DataLoader with eight workers, one picture at a time through Pillow, ToTensor and Normalize; float32,
                NCHW, and the loss read at every step

Validation and checkpoints are timed separately. From all this follow the seconds of an epoch of CIFAR-100, and their
shares of it: 40,000 training and 10,000 validation images, weights saved once, and the training state saved once per
SAVE_PERIOD. What is saved at rungs is left out.
"""

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms

from benchmarks import print_header, print_row
from data import Dataset, make_synthetic
from hparam_search import SAVE_PERIOD, param_space
from model import SmallResNet
from search.trial import save_training, save_weights
from train import best_device, new_training, train_epochs

WIDTHS = ((64, 512), (128, 1024))
BATCH_SIZE = 64
BASELINE_WORKERS = 8
CIFAR_TRAINING, CIFAR_VALIDATION = 40_000, 10_000  # images


def example_config(h_1: int, h_2: int, batch_size: int = BATCH_SIZE) -> dict:
    """Return a config of the search space with these widths."""
    return param_space | {"h_1": h_1, "h_2": h_2, "p_drop": 0.1, "lr": 0.01, "batch_size": batch_size, "seed": 0}


def seconds_of(work: Callable, device: torch.device) -> float:
    """Return how long work takes, including the work that it starts on a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def baseline_steps(config: dict, dataset: Dataset, device: torch.device) -> Iterator[None]:
    """Yield after each step of the baseline's loop on a model of this config, forever."""
    model = SmallResNet(config["h_1"], config["h_2"], config["p_drop"], len(dataset.classes)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(dataset.mean, dataset.std)])
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # the baseline has more workers than cores
    loader = DataLoader(
        list(zip(dataset.train_images.numpy(), dataset.train_labels.tolist(), strict=True)),
        config["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=BASELINE_WORKERS,
        persistent_workers=True,
        collate_fn=lambda pairs: default_collate([(transform(Image.fromarray(image)), y) for image, y in pairs]),
    )
    running_loss = 0.0
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            yield


def take(steps: Iterator, count: int) -> None:
    for _ in itertools.islice(steps, count):
        pass


def measure(config: dict, dataset: Dataset, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the figures of one config: name → images per second, ratio, seconds, or share of an epoch."""
    config = config | {"epochs": rounds + 1}
    steps = len(dataset.train_images) // config["batch_size"]  # whole batches, on which both loops train
    images = steps * config["batch_size"]
    training = new_training(config, len(dataset.classes), device)
    epochs, baseline = train_epochs(training, config, dataset, device), baseline_steps(config, dataset, device)
    # Warm-up, not in the rates: libraries choose their algorithms here.
    before = next(epochs).seconds
    take(baseline, 10 if device.type == "cuda" else 1)
    search_rates, baseline_rates, validation, weights, state = [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "saved.pt")
        for _ in range(rounds):
            report = next(epochs)
            search_rates.append(report.images_per_second)
            validation.append(report.seconds - before - images / report.images_per_second)
            before = report.seconds
            weights.append(seconds_of(lambda: save_weights(training.evaluated, path), device))
            state.append(seconds_of(lambda: save_training(training, config, path), device))
            baseline_rates.append(images / seconds_of(lambda: take(baseline, steps), device))
    # Within a round, so that a slowdown of the machine affects both.
    ratios = [own / other for own, other in zip(search_rates, baseline_rates, strict=True)]
    trained = CIFAR_TRAINING / statistics.median(search_rates)
    validated = CIFAR_VALIDATION * statistics.median(validation) / len(dataset.val_images)
    saved = statistics.median(weights)
    saved += statistics.median(state) * min(1, (trained + validated + saved) / SAVE_PERIOD)
    epoch = trained + validated + saved
    return {
        "search, images/s": statistics.median(search_rates),
        "baseline, images/s": statistics.median(baseline_rates),
        "search ÷ baseline": statistics.median(ratios),
        "epoch, s": epoch,
        "validation share": validated / epoch,
        "checkpoint share": saved / epoch,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each pair of widths, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = best_device()
    on_gpu = device.type == "cuda"
    parser.add_argument("--steps", type=int, default=300 if on_gpu else 3, help="per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    dataset = make_synthetic(num_train=args.steps * BATCH_SIZE * 5 // 4, num_test=8, num_classes=8)
    for h_1, h_2 in WIDTHS:
        config = example_config(h_1, h_2)
        figures = {"h_1/h_2": f"{h_1}/{h_2}"} | measure(config, dataset, args.rounds, device)
        if (h_1, h_2) == WIDTHS[0]:
            print_header(*figures)
        print_row(*figures.values())


if __name__ == "__main__":
    main()
