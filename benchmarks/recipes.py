"""Validation accuracy of training recipes at equal epochs, each compared with the default recipe, seed by seed.

python -m benchmarks.recipes --data-dir data/cifar10 --widths 16 64 --epochs 6 --seeds 5 label_smoothing=0.1 "augment=false ema_decay=0"

A recipe is one argument, the hyperparameters in which it differs from the default, as JSON values; `default` and
`baseline` are names of two. With several rates (--lr), recipes are also compared at the best rate of each. Every run is
appended to a CSV as it ends, and the command trains only what is missing there.

`plain loop` is the baseline's recipe in the baseline's own loop (see benchmarks.throughput); compared with `baseline`,
it shows what the faster loop costs in accuracy.
"""

import argparse
import csv
import itertools
import json
import math
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.throughput import baseline_steps, new_model, take
from data import Dataset, read_images, usable_cpus
from hparam_search import param_space
from train import CONFIG_KEYS, best_device, evaluate, evaluation_batches, new_training, train_epochs

# The recipe of the baseline: `param_space | BASELINE_RECIPE` trains as the baseline did.
BASELINE_RECIPE = {
    "momentum": 0.9,
    "weight_decay": 0.0,
    "nesterov": False,
    "augment": False,
    "schedule": "constant",
    "ema_decay": 0.0,
    "label_smoothing": 0.0,
}
PLAIN_LOOP = "plain loop"
NAMED = {"default": {}, "baseline": BASELINE_RECIPE, PLAIN_LOOP: BASELINE_RECIPE}
SETTING = ("images", "h_1", "h_2", "epochs")  # what two runs must share to be compared
RUN = (*SETTING, "recipe", "lr", "seed")
COLUMNS = (*RUN, "code", "seconds", "loss", "accuracies")
FILE = Path(__file__).parent / "recipes.csv"
dataset: Dataset  # set in each worker process


def parse_recipe(text: str) -> dict:
    """Return the entries of `param_space` that a recipe changes."""
    if text in NAMED:
        return NAMED[text]
    entries = {}
    for pair in text.split():
        key, _, value = pair.partition("=")
        if key not in CONFIG_KEYS:
            raise argparse.ArgumentTypeError(f"{pair!r} is not key=value with a key of param_space")
        try:
            entries[key] = json.loads(value)
        except ValueError:
            entries[key] = value
    return entries


def first_classes(dataset: Dataset, count: int) -> Dataset:
    """Return only the images of the first classes."""
    parts = {"classes": dataset.classes[:count]}
    for split in ("train", "val", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        parts |= {f"{split}_images": images[labels < count], f"{split}_labels": labels[labels < count]}
    return replace(dataset, **parts)


def prepare(images: Dataset, threads: int) -> None:
    """Prepare a worker process to train on these images."""
    global dataset
    dataset = images
    torch.set_num_threads(threads)


def train(config: dict) -> list[tuple[float, float]]:
    """Train on the best device here, and return validation loss and accuracy after each epoch."""
    device = best_device()
    training = new_training(config, len(dataset.classes), device)
    return [(report.loss, report.accuracy) for report in train_epochs(training, config, dataset, device)]


def train_in_plain_loop(config: dict) -> list[tuple[float, float]]:
    """Train in the baseline's loop on the best device here, and return the same."""
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


def run(row: dict) -> dict:
    """Train what the first columns of a row describe, and return the whole row."""
    start = time.perf_counter()
    varied = {"p_drop": 0.1} | {key: row[key] for key in ("h_1", "h_2", "epochs", "lr", "seed")}
    config = param_space | varied | parse_recipe(row["recipe"])
    at_epoch = (train_in_plain_loop if row["recipe"] == PLAIN_LOOP else train)(config)
    accuracies = " ".join(f"{accuracy:.4f}" for _, accuracy in at_epoch)
    measured = {"seconds": round(time.perf_counter() - start, 1), "loss": round(at_epoch[-1][0], 4)}
    return row | measured | {"accuracies": accuracies}


def key_of(row: dict) -> tuple:
    """Return what identifies a run."""
    return tuple(str(row[column]) for column in RUN)


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a CSV of runs."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def append_row(path: Path, row: dict) -> None:
    """Append a run to a CSV, which is started with a header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def compare(default: dict[str, float], other: dict[str, float]) -> tuple[float, float, float]:
    """Return the mean difference of accuracies with the same seed, its standard error, and its p-value.

    The p-value is exact, of a two-sided test by flipping signs: the share of all 2ⁿ ways to swap the two within the n
    pairs that give at least this difference.
    """
    differences = [other[seed] - default[seed] for seed in default if seed in other]
    if len(differences) < 2:
        return statistics.mean(differences or [math.nan]), math.nan, math.nan
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    flipped = torch.zeros(1, dtype=torch.float64)
    for each in differences:
        flipped = torch.cat([flipped + each, flipped - each])
    p = (flipped.abs() >= abs(sum(differences)) - 1e-9).double().mean().item()
    return mean, error, p


def print_table(rows: list[dict], recipes: list[str], rates: list[float]) -> None:
    """Print the runs of one setting as a Markdown table."""
    final = {}  # recipe → rate → seed → final accuracy
    for row in rows:
        by_rate = final.setdefault(row["recipe"], {})
        by_rate.setdefault(float(row["lr"]), {})[row["seed"]] = float(row["accuracies"].split()[-1])

    def line(recipe: str, rate: str, other: dict[str, float], reference: dict[str, float] | None) -> None:
        mean, n = statistics.mean(other.values()), len(other)
        error = statistics.stdev(other.values()) / math.sqrt(n) if n > 1 else math.nan
        gain = "" if reference is None else "{:+.4f} ± {:.4f} | {:.3f}".format(*compare(reference, other))
        print(f"| {recipe} | {rate} | {n} | {mean:.4f} ± {error:.4f} | {gain or ' | '} |")

    print("\n| recipe | lr | seeds | final accuracy | gain | p |\n| --- | --- | --- | --- | --- | --- |")
    best = {}
    for recipe in recipes:
        by_rate = {rate: final[recipe][rate] for rate in rates if rate in final.get(recipe, {})}
        for rate, accuracies in by_rate.items():
            reference = final.get(recipes[0], {}).get(rate) if recipe != recipes[0] else None
            line(recipe, f"{rate:g}", accuracies, reference)
        if by_rate:
            best[recipe] = max(by_rate, key=lambda rate: statistics.mean(by_rate[rate].values()))
    if len(rates) > 1:
        for recipe, rate in best.items():
            reference = final[recipes[0]][best[recipes[0]]] if recipe != recipes[0] else None
            line(recipe, f"best: {rate:g}", final[recipe][rate], reference)
    print(flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the runs that are not recorded yet, and print a table for each set of images and number of epochs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="key=value …, separated by spaces")
    parser.add_argument("--reference", default="default", help="recipe to compare with (default: %(default)s)")
    parser.add_argument("--dataset", choices=("cifar100", "folder", "synthetic"), default="folder")
    parser.add_argument("--data-dir", nargs="+", default=["data"])
    parser.add_argument("--classes", type=int, help="train on only the first N classes, to save time", metavar="N")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--widths", type=int, nargs=2, default=(64, 512), metavar=("H_1", "H_2"))
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02])
    parser.add_argument("--seeds", type=int, default=1, help="number of random seeds (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else usable_cpus())
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args(argv)
    recipes = list(dict.fromkeys([args.reference, *args.recipes]))
    for recipe in recipes:
        parse_recipe(recipe)
    command = ["git", "describe", "--always", "--dirty"]
    code = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FILE.parent).stdout.strip()
    for folder in args.data_dir:
        images = f"{Path(folder).name}" + (f", {args.classes} classes" if args.classes else "")
        setting = {"images": images, "h_1": args.widths[0], "h_2": args.widths[1], "epochs": args.epochs}
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        runs = [
            setting | {"recipe": recipe, "lr": lr, "seed": seed, "code": code}
            for seed, lr, recipe in itertools.product(seeds, args.lr, recipes)
        ]
        recorded = {key_of(row) for row in read_rows(args.output)}
        if missing := [row for row in runs if key_of(row) not in recorded]:
            loaded = read_images(args.dataset, folder, {})
            loaded = first_classes(loaded, args.classes) if args.classes else loaded
            threads = max(1, usable_cpus() // args.workers)
            with ProcessPoolExecutor(
                args.workers, multiprocessing.get_context("spawn"), initializer=prepare, initargs=(loaded, threads)
            ) as pool:
                for done in as_completed([pool.submit(run, row) for row in missing]):
                    row = done.result()
                    append_row(args.output, row)
                    print(f"{row['recipe']}, lr {row['lr']}, seed {row['seed']}: {row['accuracies']}", flush=True)
        wanted = {key_of(row) for row in runs}
        print(f"\n{images}, {args.widths[0]}/{args.widths[1]}, {args.epochs} epochs")
        print_table([row for row in read_rows(args.output) if key_of(row) in wanted], recipes, args.lr)


if __name__ == "__main__":
    main()
