"""A whole search: how long it takes, and what it trained.

python -m benchmarks.search --dataset folder --data-dir data/cifar10 --gpus-per-trial 0.5
python -m benchmarks.search --quick

All flags are those of hparam_search.py, whose output goes to stderr; --output-dir and --name are overridden. The
seconds count from when the images have been read. The time that the baseline's loop would need for the same epochs, one
trial at a time, is estimated from its speed, measured for each pair of widths.
"""

import contextlib
import csv
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import hparam_search
from benchmarks import print_header, print_row
from benchmarks.throughput import baseline_steps, example_config, seconds_of, take
from data import Dataset
from train import best_device

BASELINE_STEPS = 100


def baseline_seconds(epochs: dict[tuple[int, int], int], batch_size: int, dataset: Dataset) -> float:
    """Return the seconds the baseline's loop would need for the epochs of each (h_1, h_2), in sequence."""
    device, seconds = best_device(), 0.0
    for (h_1, h_2), count in epochs.items():
        steps = baseline_steps(example_config(h_1, h_2, batch_size), dataset, device)
        take(steps, 10)
        a_step = seconds_of(lambda steps=steps: take(steps, BASELINE_STEPS), device) / BASELINE_STEPS
        seconds += count * len(dataset.train_images) / batch_size * a_step
    return seconds


def main(argv: Sequence[str]) -> None:
    """Run a search, and print its figures as a table."""
    settings, _ = hparam_search.parse_args(argv, __doc__)
    dataset = hparam_search.read_images(**hparam_search.image_source(settings))
    hparam_search.read_images = lambda **source: dataset
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            code = hparam_search.main([*argv, "--output-dir", folder, "--name", "it"])
        seconds = time.perf_counter() - start
        if code:
            sys.exit(f"the search ended with exit code {code}")
        with Path(folder, "it", "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        metrics = json.loads(Path(folder, "it", "best_model", "metrics.json").read_text())
    epochs = Counter()  # (h_1, h_2) → epochs trained
    for row in rows:
        epochs[int(row["h_1"]), int(row["h_2"])] += int(row["epochs"])
    baseline = baseline_seconds(epochs, hparam_search.search_space(settings)[0]["batch_size"], dataset)
    figures = {
        "seconds": seconds,
        "epochs": f"{epochs.total()} of {sum(int(row['max_epochs']) for row in rows)}",
        "images/s": epochs.total() * len(dataset.train_images) / seconds,
        "validation, test accuracy": f"{metrics['val_accuracy']:.4f}, {metrics['test_accuracy']:.4f}",
        "the baseline's loop, s": baseline,
        "ratio": baseline / seconds,
    }
    print_header(*figures)
    print_row(*figures.values())


if __name__ == "__main__":
    main(sys.argv[1:])
