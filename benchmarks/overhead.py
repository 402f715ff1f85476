"""What a search costs besides training: seconds and memory of a search whose trials only report.

python -m benchmarks.overhead 12 20 --scheduler none
python -m benchmarks.overhead 1000 5

The loss depends on the learning rate, so that the scheduler stops some trials. Ray's start is timed separately. The
memory is the peak of the process that runs the search, taken from /proc, hence only on Linux.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from ray import tune

import hparam_search
from benchmarks import print_header, print_row
from data import make_synthetic
from search.records import METRICS
from search.settings import Settings


def idle_trial(config: dict, **others: object) -> None:
    """Replace train_cifar: report every epoch, with a loss that falls equally in all trials."""
    for epoch in range(1, config["epochs"] + 1):
        report = dict.fromkeys(METRICS, 0.0) | {"epoch": epoch, "loss": 10 - config["lr"] - 0.01 * epoch}
        tune.report({"reports": [report]})


def main(argv: Sequence[str] | None = None) -> None:
    """Run a search, and print its figures as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=int)
    parser.add_argument("epochs", type=int, help="of each trial")
    parser.add_argument("--scheduler", default="promote", help="one of hparam_search.py (default: %(default)s)")
    args = parser.parse_args(argv)
    dataset = make_synthetic(num_train=10, num_test=1, num_classes=2)
    hparam_search.read_images = lambda **source: dataset
    hparam_search.train_cifar = idle_trial
    hparam_search.param_space["h_1"] = hparam_search.param_space["h_2"] = 64
    flags = ["--num-samples", args.trials, "--max-epochs", args.epochs, "--scheduler", args.scheduler]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr), ExitStack() as files:
        start = time.perf_counter()
        with hparam_search.ray_runtime.started_ray(Settings(), files):
            started = time.perf_counter()
            code = hparam_search.main([*map(str, flags), "--output-dir", folder, "--name", "it"])
            seconds = time.perf_counter() - started
    if code != 1:  # "No trial has a model"
        sys.exit(f"the search ended with exit code {code}")
    kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    print_header("trials × epochs, scheduler", "Ray's start, s", "seconds", "seconds per trial", "memory, MB")
    search = f"{args.trials} × {args.epochs}, {args.scheduler}"
    print_row(search, started - start, seconds, seconds / args.trials, int(kilobytes) / 1000)


if __name__ == "__main__":
    main()
