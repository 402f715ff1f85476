"""Validation accuracy of training recipes at equal epochs, each compared with a reference, seed by seed.

python -m benchmarks.recipes momentum=0.8 "flip=false ema_decay=0" --data-dir data/cifar10 --widths 16 64 --seeds 6

A recipe is one argument: the entries of `param_space` in which it differs from the default. NAMED below has names of
some. With several rates (--lr), recipes are also compared at the best rate of each. Every run is appended to a CSV as
it ends, and the command trains only what is missing there. At n seeds no p-value is below 2 / 2ⁿ; with many recipes
some are small by chance.
"""

import argparse
import contextlib
import csv
import itertools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import print_header, print_row
from data import Dataset, InputError, read_images, usable_cpus
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
dataset: Dataset  # set in each worker process


def new_config(recipe: str, **varied: object) -> dict:
    """Return the config of a recipe; raise InputError if it is invalid."""
    pairs = (pair.partition("=") for pair in recipe.split())
    changes = NAMED[recipe] if recipe in NAMED else {key: parse_value(value) for key, _, value in pairs}
    if fixed := varied.keys() & changes.keys():
        raise InputError(f"{recipe!r} sets {fixed.pop()!r}, which has a flag of its own; use the flag")
    config = param_space | {"p_drop": 0.1} | varied | changes
    check_space(config)
    return config


def first_classes(dataset: Dataset, count: int) -> Dataset:
    """Return only the images of the first classes."""
    parts = {"classes": dataset.classes[:count]}
    for split in ("train", "val", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        parts |= {f"{split}_images": images[labels < count], f"{split}_labels": labels[labels < count]}
    return replace(dataset, **parts)


def train_all(
    work: Callable[[dict], Any], configs: dict, images: Dataset, workers: int
) -> Iterator[tuple[Hashable, Any]]:
    """Call work(config) in processes that hold the images as `dataset`, and yield key and result of each as it ends."""
    context, threads = multiprocessing.get_context("spawn"), max(1, usable_cpus() // workers)
    with ProcessPoolExecutor(workers, context, initializer=prepare, initargs=(images, threads)) as pool:
        futures = {pool.submit(work, config): key for key, config in configs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # if one fails, do not train the others in vain


def prepare(images: Dataset, threads: int) -> None:
    """Prepare a process to train on these images, and to end if the command is killed."""
    global dataset
    dataset = images
    torch.set_num_threads(threads)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def train(config: dict) -> list[Report]:
    """Train on the best device here, and return the reports of all epochs."""
    device = best_device()
    return list(train_epochs(new_training(config, len(dataset.classes), device), config, dataset, device))


def measure(config: dict) -> dict:
    """Train a config, and return the last columns of its row."""
    start = time.perf_counter()
    reports = train(config)
    accuracies = " ".join(f"{report.accuracy:.4f}" for report in reports)
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds": seconds, "loss": round(reports[-1].loss, 4), "accuracies": accuracies}


def describe_device() -> str:
    """Return the name of the device and the type in which it trains."""
    device = best_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}, {autocast_dtype(device) or torch.float32}"


def describe_code() -> str:
    """Return the commit of the code, marked if a Python file has changed since; nothing outside a git repository."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        run = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=FILE.parent)
        changed = run(["git", "status", "--porcelain", "--", "*.py"]).stdout
        return run(["git", "describe", "--always"]).stdout.strip() + ("-dirty" if changed else "")
    return ""


def read_runs(path: Path, images: str, device: str) -> dict[frozenset, float]:
    """Return the final accuracies in a CSV of the runs on these images and this kind of device, by their config."""
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
    return {
        frozenset(json.loads(row["config"]).items()): float(row["accuracies"].split()[-1])
        for row in rows
        if (row["images"], row["device"]) == (images, device) and row["accuracies"]
    }


def append_row(path: Path, row: dict) -> None:
    """Append a run to a CSV, which is started with a header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


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


def print_table(accuracies: dict[str, dict[float, list[float]]]) -> None:
    """Print final accuracies as a Markdown table: recipe (the reference first) → learning rate → one per seed."""
    print_header("recipe", "lr", "seeds", "final accuracy", "gain", "p")
    reference = next(iter(accuracies))

    def with_error(mean: float, error: float, sign: str) -> str:
        return f"{mean:{sign}.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")

    def show(recipe: str, rate: str, found: list[float], compared: list[float], with_p: bool) -> None:
        gain, error, p = compare(compared, found)
        cells = [with_error(gain, error, "+"), f"{p:.3f}" if with_p else ""] if recipe != reference else ["", ""]
        print_row(recipe, rate, len(found), with_error(statistics.mean(found), standard_error(found), ""), *cells)

    best = {}
    for recipe, by_rate in accuracies.items():
        best[recipe] = max(by_rate, key=lambda rate: statistics.mean(by_rate[rate]))
        for rate, found in by_rate.items():
            show(recipe, f"{rate:g}", found, accuracies[reference][rate], True)
    if len(accuracies[reference]) > 1:
        for recipe, rate in best.items():  # without p, since the rates were chosen on the same accuracies
            show(recipe, f"best: {rate:g}", accuracies[recipe][rate], accuracies[reference][best[reference]], False)
    print(flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the runs that are not recorded yet, and print a table for each set of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"key=value …, or one of {', '.join(NAMED)}")
    parser.add_argument("--reference", default="default", metavar="RECIPE", help="what to compare with (%(default)s)")
    parser.add_argument("--dataset", choices=("cifar100", "folder", "synthetic"), default="folder")
    parser.add_argument("--data-dir", action="append", help="repeatable (default: data)", metavar="PATH")
    parser.add_argument("--classes", type=int, help="train on only the first N classes, to save time", metavar="N")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--widths", type=int, nargs=2, default=(64, 512), metavar=("H_1", "H_2"))
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02])
    seeds = {"choices": range(1, 21), "metavar": "N", "help": "number of random seeds, at most 20 (default: 1)"}
    parser.add_argument("--seeds", type=int, default=1, **seeds)
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else usable_cpus())
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args(argv)
    device, code = describe_device(), describe_code()
    varied = {"h_1": args.widths[0], "h_2": args.widths[1], "epochs": args.epochs}
    recipes = list(dict.fromkeys([args.reference, *args.recipes]))
    try:
        configs = {
            (recipe, lr, seed): new_config(recipe, **varied, lr=lr, seed=seed)
            for seed, lr, recipe in itertools.product(range(args.seeds), args.lr, recipes)
        }
    except InputError as error:
        parser.error(str(error))
    for folder in args.data_dir or ["data"]:
        images = Path(folder).resolve().name if args.dataset == "folder" else args.dataset
        images += f", {args.classes} classes" if args.classes else ""
        recorded = read_runs(args.output, images, device)
        missing = {key: each for each in configs.values() if (key := frozenset(each.items())) not in recorded}
        if missing:
            loaded = read_images(args.dataset, folder, {})
            loaded = first_classes(loaded, args.classes) if args.classes else loaded
            names = {frozenset(config.items()): name for name, config in configs.items()}
            for key, measured in train_all(measure, missing, loaded, args.workers):
                config = json.dumps(missing[key], sort_keys=True)
                append_row(args.output, {"images": images, "device": device, "config": config, "code": code} | measured)
                print(*names[key], measured["accuracies"], sep=", ", flush=True)
        print(f"\n{images}; h_1 {args.widths[0]}, h_2 {args.widths[1]}; epochs: {args.epochs}\n")
        recorded = read_runs(args.output, images, device)
        accuracies = {recipe: {lr: [] for lr in args.lr} for recipe in recipes}
        for (recipe, lr, _), config in configs.items():
            accuracies[recipe][lr].append(recorded[frozenset(config.items())])
        print_table(accuracies)


if __name__ == "__main__":
    main()
