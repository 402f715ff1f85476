"""Training images per second of one trial, compared with the baseline's loop and with the step alone.

python -m benchmarks.throughput

Three loops are timed in turn, round after round, with the same model, batch size and number of steps:

    search      an epoch of train_epochs, as a trial runs it
    baseline    a DataLoader with eight workers, one picture at a time through Pillow, ToTensor and Normalize; float32,
                NCHW, and the loss read at every step
    step alone  the search's own step on one batch that is already on the device: no pipeline

Validation and checkpoints are timed separately, and given as shares of an epoch of CIFAR-100: 40,000 training and
10,000 validation images, weights saved once, and the training state saved once per SAVE_PERIOD. What is saved at rungs
is left out.
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
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks import print_header, print_row
from data import Batches, Dataset, make_synthetic
from hparam_search import SAVE_PERIOD, param_space
from model import SmallResNet
from search.trial import prune_weights, save_training, save_weights, weights_path
from train import EAGER_STEPS, TrainStep, best_device, new_training, train_epochs

WIDTHS = ((64, 512), (128, 1024))
BATCH_SIZE = 64
BASELINE_WORKERS = 8
CIFAR_TRAINING, CIFAR_VALIDATION = 40_000, 10_000  # images


class Pictures(torch.utils.data.Dataset):
    """Images as torchvision's CIFAR100 yields them: one Pillow image at a time, through a transform."""

    def __init__(self, dataset: Dataset) -> None:
        self.images, self.labels = dataset.train_images.numpy(), dataset.train_labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(dataset.mean, dataset.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def example_config(h_1: int, h_2: int, batch_size: int = BATCH_SIZE) -> dict:
    """Return a config of the search space with these widths."""
    return param_space | {"h_1": h_1, "h_2": h_2, "p_drop": 0.1, "lr": 0.01, "batch_size": batch_size, "seed": 0}


def seconds_of(work: Callable, device: torch.device) -> float:
    """Return how long work takes, including the work that it starts on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def new_model(config: dict, dataset: Dataset, device: torch.device) -> SmallResNet:
    """Return a model with the initial weights of a trial of this config, in NCHW."""
    torch.manual_seed(config["seed"])
    return SmallResNet(config["h_1"], config["h_2"], config["p_drop"], len(dataset.classes)).to(device)


def baseline_steps(model: nn.Module, config: dict, dataset: Dataset, device: torch.device) -> Iterator[None]:
    """Yield after each step of the baseline's loop, on a model on this device, forever."""
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # the baseline has more workers than cores
    loader = DataLoader(
        Pictures(dataset), config["batch_size"], shuffle=True, drop_last=True, num_workers=BASELINE_WORKERS,
        persistent_workers=True,
    )  # fmt: skip
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


def steps_alone(config: dict, dataset: Dataset, device: torch.device) -> Iterator[None]:
    """Yield after each of the search's own steps on one batch, forever."""
    training = new_training(config, len(dataset.classes), device)
    step = TrainStep(training, config, device)
    training.model.train()
    images, labels = dataset.train_images.to(device), dataset.train_labels.to(device)
    batch = next(Batches(images, labels, config["batch_size"], dataset.mean, dataset.std).epoch())
    while True:
        step(*batch, 1.0)
        yield


def take(steps: Iterator, count: int) -> None:
    for _ in itertools.islice(steps, count):
        pass


def measure(config: dict, dataset: Dataset, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the figures of one config: name → images per second, ratio, or share of an epoch."""
    config = config | {"epochs": rounds + 1}
    batch_size = config["batch_size"]
    count = len(dataset.train_images) // batch_size  # the number of whole batches, on which all three loops train
    training = new_training(config, len(dataset.classes), device)
    epochs = train_epochs(training, config, dataset, device)
    baseline = baseline_steps(new_model(config, dataset, device), config, dataset, device)
    others = {"step alone": steps_alone(config, dataset, device), "baseline": baseline}
    # Warm-up, not in the rates: libraries choose their algorithms here.
    before = next(epochs).seconds
    for steps in others.values():
        take(steps, EAGER_STEPS + 1 if device.type == "cuda" else 1)
    rates, validation, weights, state = {name: [] for name in ("search", *others)}, [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            report = next(epochs)
            path = weights_path(Path(folder), report.epoch)
            rates["search"].append(report.images_per_second)
            training_seconds = count * batch_size / report.images_per_second
            validation.append((report.seconds - before - training_seconds) / len(dataset.val_images))
            before = report.seconds
            weights.append(seconds_of(lambda path=path: save_weights(training.evaluated, path), device))
            state.append(seconds_of(lambda: save_training(training, config, Path(folder, "state.pt")), device))
            prune_weights(Path(folder), {report.epoch})
            for name, steps in others.items():
                seconds = seconds_of(lambda steps=steps: take(steps, count), device)
                rates[name].append(count * batch_size / seconds)
    parts = {
        "training": CIFAR_TRAINING / statistics.median(rates["search"]),
        "validation": CIFAR_VALIDATION * statistics.median(validation),
        "weights": statistics.median(weights),
    }
    parts["training state"] = statistics.median(state) * min(1, sum(parts.values()) / SAVE_PERIOD)
    figures = {f"{name}, images/s": statistics.median(of) for name, of in rates.items()}
    for name in others:  # ratios within a round, so that a slowdown of the machine affects both
        ratios = [own / other for own, other in zip(rates["search"], rates[name], strict=True)]
        figures[f"search ÷ {name}"] = statistics.median(ratios)
    figures["validation share"] = parts["validation"] / sum(parts.values())
    figures["checkpoint share"] = (parts["weights"] + parts["training state"]) / sum(parts.values())
    return figures


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
