"""Validation accuracy of training recipes at equal epochs, each compared with the default recipe, seed by seed.

python -m benchmarks.recipes --data-dir data/cifar10 --widths 16 64 --seeds 5 momentum=0.8 "flip=false ema_decay=0"

A recipe is one argument: the entries of `param_space` in which it differs from the default. `baseline` and `former`
name two; `plain loop` is the baseline's recipe in the baseline's own loop (see benchmarks.throughput). With several
rates (--lr), recipes are also compared at the best rate of each. Every run is appended to a CSV as it ends, and the
command trains only what is missing there.
"""

import argparse
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
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import baseline_steps, new_model, take
from data import Dataset, InputError, read_images, usable_cpus
from hparam_search import param_space
from search.retrain import parse_value
from search.space import check_space
from train import Report, best_device, evaluate, evaluation_batches, new_training, train_epochs

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
PLAIN_LOOP = "plain loop"
NAMED = {
    "default": {},
    "former": {"bias_lr": 0.0, "crop_padding": 4},  # the default before these were measured
    "baseline": BASELINE_RECIPE,
    PLAIN_LOOP: BASELINE_RECIPE | {"loop": PLAIN_LOOP},
}
COLUMNS = ("images", "config", "code", "seconds", "loss", "accuracies")
FILE = Path(__file__).parent / "recipes.csv"
dataset: Dataset  # set in each worker process


def new_config(recipe: str, **varied: object) -> dict:
    """Return the config of a recipe; raise InputError if it is invalid."""
    changes = NAMED.get(recipe)
    if changes is None:
        changes = {key: parse_value(value) for key, _, value in (pair.partition("=") for pair in recipe.split())}
    config = param_space | {"p_drop": 0.1} | varied | changes
    check_space({key: value for key, value in config.items() if key != "loop"})
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
        for future in as_completed(futures):
            yield futures[future], future.result()


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


def train_in_plain_loop(config: dict) -> list[tuple[float, float]]:
    """Train in the baseline's loop on the best device here; return validation loss and accuracy after each epoch."""
    device = best_device()
    model = new_model(config, dataset, device)
    steps = baseline_steps(model, config, dataset, device)
    validation = evaluation_batches(dataset, "val", device)
    at_epoch = []
    for _ in range(config["epochs"]):
        model.train()
        take(steps, len(dataset.train_images) // config["batch_size"])
        at_epoch.append(evaluate(model, validation))
    return at_epoch


def measure(config: dict) -> dict:
    """Train a config, and return the last columns of its row."""
    start = time.perf_counter()
    if "loop" in config:
        at_epoch = train_in_plain_loop(config)
    else:
        at_epoch = [(report.loss, report.accuracy) for report in train(config)]
    accuracies = " ".join(f"{accuracy:.4f}" for _, accuracy in at_epoch)
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds": seconds, "loss": round(at_epoch[-1][0], 4), "accuracies": accuracies}


def key_of(images: str, config: dict) -> tuple[str, str]:
    """Return what identifies a run: the first two columns of its row."""
    return images, json.dumps(config, sort_keys=True)


def read_runs(path: Path) -> dict[tuple[str, str], float]:
    """Return the final accuracies in a CSV of runs, by their keys."""
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
    return {(row["images"], row["config"]): float(row["accuracies"].split()[-1]) for row in rows}


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

    The p-value is exact, of a two-sided test by exchange: the share of all 2ⁿ ways to exchange the two within the n
    pairs that give at least this difference.
    """
    differences = [b - a for a, b in zip(one, other, strict=True)]
    sums = torch.zeros(1, dtype=torch.float64)
    for each in differences:
        sums = torch.cat([sums + each, sums - each])
    p = (sums.abs() >= abs(sum(differences)) - 1e-9).double().mean().item()
    return statistics.mean(differences), standard_error(differences), p


def print_table(accuracies: dict[str, dict[float, list[float]]]) -> None:
    """Print final accuracies as a Markdown table: recipe (the reference first) → learning rate → one per seed."""
    print("| recipe | lr | seeds | final accuracy | gain | p |\n| --- | --- | --- | --- | --- | --- |")
    reference = next(iter(accuracies))

    def show(recipe: str, rate: str, found: list[float], compared: list[float]) -> None:
        gain = "{:+.4f} ± {:.4f} | {:.3f}".format(*compare(compared, found)) if recipe != reference else " | "
        mean = f"{statistics.mean(found):.4f} ± {standard_error(found):.4f}"
        print(f"| {recipe} | {rate} | {len(found)} | {mean} | {gain} |")

    best = {}
    for recipe, by_rate in accuracies.items():
        best[recipe] = max(by_rate, key=lambda rate: statistics.mean(by_rate[rate]))
        for rate, found in by_rate.items():
            show(recipe, f"{rate:g}", found, accuracies[reference][rate])
    if len(by_rate) > 1:
        for recipe, rate in best.items():
            show(recipe, f"best: {rate:g}", accuracies[recipe][rate], accuracies[reference][best[reference]])
    print(flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the runs that are not recorded yet, and print a table for each set of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help='for example, "lr=0.05 flip=false"')
    parser.add_argument("--reference", default="default", metavar="RECIPE", help="what to compare with (%(default)s)")
    parser.add_argument("--dataset", choices=("cifar100", "folder", "synthetic"), default="folder")
    parser.add_argument("--data-dir", action="append", help="repeatable (default: data)", metavar="PATH")
    parser.add_argument("--classes", type=int, help="train on only the first N classes, to save time", metavar="N")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--widths", type=int, nargs=2, default=(64, 512), metavar=("H_1", "H_2"))
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02])
    parser.add_argument("--seeds", type=int, default=1, help="number of random seeds, from 0 (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else usable_cpus())
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args(argv)
    command = ["git", "describe", "--always", "--dirty"]
    code = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FILE.parent).stdout.strip()
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
        images = Path(folder).name + (f", {args.classes} classes" if args.classes else "")
        recorded = read_runs(args.output)
        if missing := {run: each for run, each in configs.items() if key_of(images, each) not in recorded}:
            loaded = read_images(args.dataset, folder, {})
            loaded = first_classes(loaded, args.classes) if args.classes else loaded
            for run, measured in train_all(measure, missing, loaded, args.workers):
                key = dict(zip(COLUMNS, key_of(images, configs[run]), strict=False))
                append_row(args.output, key | {"code": code} | measured)
                print(*run, measured["accuracies"], sep=", ", flush=True)
        print(f"\n{images}; {args.widths[0]}/{args.widths[1]}; {args.epochs} epochs\n")
        recorded = read_runs(args.output)
        accuracies = {recipe: {lr: [] for lr in args.lr} for recipe in recipes}
        for (recipe, lr, _), config in configs.items():
            accuracies[recipe][lr].append(recorded[key_of(images, config)])
        print_table(accuracies)


if __name__ == "__main__":
    main()
