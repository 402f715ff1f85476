"""A whole search: how long it takes, and what it trained.

python -m benchmarks.search --dataset folder --data-dir data/imagenet32-a

The default search (12 trials, 20 epochs) runs through hparam_search.main, once with one trial at a time and then with
several sharing the GPU; without a GPU it is the quick search, with one trial on all CPUs and then one on each. The time
that the baseline's loop would need for the same epochs, one trial at a time, is estimated from its speed, measured for
each pair of widths. Other arguments are passed to hparam_search.py.
"""

import argparse
import contextlib
import csv
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import hparam_search
from benchmarks import print_header, print_row
from benchmarks.throughput import baseline_steps, example_config, new_model, seconds_of, take
from data import Dataset, usable_cpus
from train import best_device

BASELINE_STEPS = 100


def run_search(arguments: list[str], dataset: Dataset) -> dict:
    """Run a search to its end and return its figures."""
    hparam_search.read_images = lambda **source: dataset
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            code = hparam_search.main([*arguments, "--output-dir", folder, "--name", "it"])
        seconds = time.perf_counter() - start
        if code:
            raise RuntimeError(f"the search ended with exit code {code}")
        table = (Path(folder) / "it" / "results.csv").read_text()
        print(table, file=sys.stderr)
        rows = list(csv.DictReader(io.StringIO(table)))
        metrics = json.loads((Path(folder) / "it" / "best_model" / "metrics.json").read_text())
    epochs = {}  # (h_1, h_2) → epochs trained
    for row in rows:
        widths = int(row["h_1"]), int(row["h_2"])
        epochs[widths] = epochs.get(widths, 0) + int(row["epochs"])
    return {
        "seconds": seconds,
        "epochs": epochs,
        "max epochs": sum(int(row["max_epochs"]) for row in rows),
        "images/s": sum(epochs.values()) * len(dataset.train_images) / seconds,
        "validation": metrics["val_accuracy"],
        "test": metrics["test_accuracy"],
    }


def baseline_seconds(epochs: dict[tuple[int, int], int], batch_size: int, dataset: Dataset) -> float:
    """Return the seconds the baseline's loop would need for the epochs of each (h_1, h_2), in sequence."""
    device, seconds = best_device(), 0.0
    for (h_1, h_2), count in epochs.items():
        config = example_config(h_1, h_2, batch_size)
        steps = baseline_steps(new_model(config, dataset, device), config, dataset, device)
        take(steps, 10)
        a_step = seconds_of(lambda steps=steps: take(steps, BASELINE_STEPS), device) / BASELINE_STEPS
        seconds += count * len(dataset.train_images) / batch_size * a_step
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run the searches, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    at_once = [1, 2] if on_gpu else [1, usable_cpus()]
    parser.add_argument("--at-once", type=int, nargs="+", default=at_once, help="trials (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs=2, metavar=("H_1", "H_2"), help="fixed widths (default: searched)")
    parser.add_argument("--no-baseline", action="store_true", help="skip the baseline's loop")
    args, rest = parser.parse_known_args(argv)
    rest = rest if on_gpu else ["--quick", *rest]
    if args.widths:
        for space in (hparam_search.param_space, hparam_search.QUICK_SPACE):
            space["h_1"], space["h_2"] = args.widths
    settings, _ = hparam_search.parse_args(rest, __doc__)
    dataset = hparam_search.read_images(**hparam_search.image_source(settings))
    results = []
    for count in args.at_once:
        share = str(1 / count) if on_gpu else str(max(1, usable_cpus() // count))
        result = run_search([*rest, "--gpus-per-trial" if on_gpu else "--cpus-per-trial", share], dataset)
        row = {"at once": count} | result | {"epochs": sum(result["epochs"].values())}
        if not results:
            print_header(*row)
        print_row(*row.values())
        results.append(result)
    if args.no_baseline:
        return
    best = min(results, key=lambda result: result["seconds"])
    batch_size = hparam_search.search_space(settings)["batch_size"]
    baseline = baseline_seconds(best["epochs"], batch_size, dataset)
    print_row(
        "the baseline's loop ÷ the fastest",
        f"{baseline:.0f} s ÷ {best['seconds']:.0f} s = {baseline / best['seconds']:.1f}",
    )


if __name__ == "__main__":
    main()
