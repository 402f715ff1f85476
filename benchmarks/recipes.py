"""Validation accuracy of training recipes at equal epochs, each compared with a reference, seed by seed.

python -m benchmarks.recipes momentum=0.8 "flip=false ema_decay=0" --data-dir data/cifar10 --widths 16 64 --seeds 6

A recipe is one argument: the entries of `param_space` in which it differs from the default. NAMED below has names of
some. Every run is appended to a CSV as it ends, and the command trains only what is missing there. At n seeds no
p-value is below 2 / 2ⁿ; with many recipes some are small by chance.
"""

import argparse
import contextlib
import csv
import itertools
import json
import math
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import print_header, print_row
from data import Dataset, InputError, read_images
from hparam_search import param_space
from search.retrain import parse_value
from search.space import check_space
from train import Report, autocast_dtype, best_device, new_training, train_epochs

# The recipe of the baseline: `param_space | BASELINE_RECIPE` trains as the baseline did.
BASELINE_RECIPE = {
    "momentum": 0.9,
    "bias_lr": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "crop_padding": 0,
    "flip": False,
    "schedule": "constant",
    "ema_decay": 0.0,
    "label_smoothing": 0.0,
}
NAMED = {
    "default": {},
    "former": {"bias_lr": 0.0, "crop_padding": 4},  # the default before these were measured
    "baseline": BASELINE_RECIPE,
}
COLUMNS = ("images", "device", "config", "code", "seconds", "loss", "accuracies")
FILE = Path(__file__).parent / "recipes.csv"


def new_config(recipe: str, **varied: object) -> dict:
    """Return the config of a recipe; raise InputError if it is invalid."""
    pairs = (pair.partition("=") for pair in recipe.split())
    changes = NAMED[recipe] if recipe in NAMED else {key: parse_value(value) for key, _, value in pairs}
    if fixed := varied.keys() & changes.keys():
        raise InputError(f"{recipe!r} sets {fixed.pop()!r}, which has a flag of its own; use the flag")
    config = param_space | {"p_drop": 0.1} | varied | changes
    check_space(config)
    return config


def first_classes(dataset: Dataset, count: int | None) -> Dataset:
    """Return only the images of the first classes; all if count is None."""
    parts = {"classes": dataset.classes[:count]}
    for split in ("train", "val", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        kept = labels < len(parts["classes"])
        parts |= {f"{split}_images": images[kept], f"{split}_labels": labels[kept]}
    return replace(dataset, **parts)


def train(config: dict, dataset: Dataset) -> list[Report]:
    """Train a config on the best device here, and return the reports of all epochs."""
    device = best_device()
    return list(train_epochs(new_training(config, len(dataset.classes), device), config, dataset, device))


def describe_device() -> str:
    """Return the name of the device and the type in which it trains."""
    device = best_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}, {autocast_dtype(device) or torch.float32}"


def describe_code() -> str:
    """Return the commit of the code, marked if a Python file has changed since; nothing outside a git repository."""
    run = partial(subprocess.run, capture_output=True, text=True, cwd=FILE.parent)
    with contextlib.suppress(OSError):  # git is not installed
        changed = run(["git", "status", "--porcelain", "--", "*.py"]).stdout
        return run(["git", "describe", "--always"]).stdout.strip() + ("-dirty" if changed else "")
    return ""


def read_runs(path: Path, images: str, device: str) -> dict[str, float]:
    """Return the final accuracies in a CSV of the runs on these images and this kind of device, by their config."""
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
    return {
        row["config"]: float(row["accuracies"].split()[-1])
        for row in rows
        if (row["images"], row["device"]) == (images, device)
    }


def append_row(path: Path, row: Sequence[object]) -> None:
    """Append a run to a CSV, which is started with a header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, row] if new else [row])


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; NaN of one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def compare(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of other - one, pair by pair, its standard error, and its p-value.

    The p-value is that of a two-sided test by exchange: of all 2ⁿ ways to exchange the two within the n pairs, the
    share in which the mean is at least as far from 0.
    """
    differences = [b - a for a, b in zip(one, other, strict=True)]
    sums = torch.zeros(1, dtype=torch.float64)
    for each in differences:
        sums = torch.cat([sums + each, sums - each])
    p = (sums.abs() >= abs(sum(differences)) - 1e-9).double().mean().item()
    return statistics.mean(differences), standard_error(differences), p


def main(argv: Sequence[str] | None = None) -> None:
    """Train the runs that are not recorded yet, and print a table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"key=value …, or one of {', '.join(NAMED)}")
    parser.add_argument("--reference", default="default", metavar="RECIPE", help="what to compare with (%(default)s)")
    parser.add_argument("--dataset", choices=("cifar100", "folder", "synthetic"), default="folder")
    parser.add_argument("--data-dir", default="data", metavar="PATH")
    parser.add_argument("--classes", type=int, help="train on only the first N classes, to save time", metavar="N")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--widths", type=int, nargs=2, default=(64, 512), metavar=("H_1", "H_2"))
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02])
    parser.add_argument("--seeds", type=int, default=1, choices=range(1, 21), metavar="N", help="1 to 20 (default: 1)")
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args(argv)
    varied = {"h_1": args.widths[0], "h_2": args.widths[1], "epochs": args.epochs}
    recipes = list(dict.fromkeys([args.reference, *args.recipes]))
    try:
        configs = {
            (recipe, lr, seed): new_config(recipe, **varied, lr=lr, seed=seed)
            for seed, lr, recipe in itertools.product(range(args.seeds), args.lr, recipes)
        }
    except InputError as error:
        parser.error(str(error))
    device, code, dataset = describe_device(), describe_code(), None
    images = Path(args.data_dir).resolve().name if args.dataset == "folder" else args.dataset
    images += f", {args.classes} classes" if args.classes else ""
    recorded = read_runs(args.output, images, device)
    keys = {names: json.dumps(config, sort_keys=True) for names, config in configs.items()}
    for names, config in configs.items():
        if keys[names] in recorded:
            continue
        dataset = dataset or first_classes(read_images(args.dataset, args.data_dir, {}), args.classes)
        start = time.perf_counter()
        reports = train(config, dataset)
        seconds, loss = round(time.perf_counter() - start, 1), round(reports[-1].loss, 4)
        accuracies = " ".join(f"{report.accuracy:.4f}" for report in reports)
        append_row(args.output, [images, device, keys[names], code, seconds, loss, accuracies])
        recorded[keys[names]] = round(reports[-1].accuracy, 4)
        print(*names, accuracies, sep=", ", flush=True)
    print(f"\n{images}; h_1 {args.widths[0]}, h_2 {args.widths[1]}; epochs: {args.epochs}\n")
    print_header("recipe", "lr", "seeds", "final accuracy", "gain", "p")
    for recipe, lr in itertools.product(recipes, args.lr):
        reference, found = (
            [recorded[keys[name, lr, seed]] for seed in range(args.seeds)] for name in (args.reference, recipe)
        )
        gain, error, p = compare(reference, found)
        mean = f"{statistics.mean(found):.4f} ± {standard_error(found):.4f}"
        print_row(recipe, lr, args.seeds, mean, f"{gain:+.4f} ± {error:.4f}", f"{p:.3f}")


if __name__ == "__main__":
    main()
