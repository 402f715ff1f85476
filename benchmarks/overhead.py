"""What a search costs besides training: seconds and memory of searches whose trials do no work.

python -m benchmarks.overhead

Each search runs in its own process with its own Ray, whose start is timed separately. An idle trial reads every image
once, and then only reports. The searches:

    12 × 20, none       12 trials of 20 epochs, as hparam_search.main runs them with --scheduler none
    12 × 20, tune       the same trials with Tune's defaults: a process per trial, the images captured in the closure,
                        Tune's own loggers and snapshots
    100 × 5, promote    with the default scheduler
    1000 × 5, promote   to see whether a trial costs more in a large search
    1000 × 5, asha      the same with a scheduler that pauses no trial

The 12 trials all train to the end; in the other searches the scheduler stops some.

Memory is taken from /proc, hence only on Linux: the driver's peak, and the highest private memory of a trial's
process (anonymous pages, without the images, which it maps from a file).
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from ray import tune

import hparam_search
from benchmarks import print_header, print_row
from data import Dataset, map_dataset
from search.records import METRICS
from search.settings import Settings

SCHEDULERS = ("none", "promote", "asha", "tune")  # hparam_search's, and Tune's defaults
COLUMNS = ("Ray's start, s", "seconds", "seconds per trial", "processes", "driver, MB", "a worker, MB")
IMAGES = 12_000  # training images, 37 MB; with many more, Ray refuses the closure of Tune's defaults
REPORT = dict.fromkeys(METRICS, 0.0)


def status(key: str) -> float:
    """Return a value of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{key}:"))


def blank_images() -> Dataset:
    """Return a dataset of blank images."""
    images, labels = torch.zeros(IMAGES, 32, 32, 3, dtype=torch.uint8), torch.zeros(IMAGES, dtype=torch.int64)
    few = slice(10)
    return Dataset(
        images, labels, images[few].clone(), labels[few].clone(), images[few].clone(), labels[few].clone(),
        ("nothing",), (0.5,) * 3, (0.5,) * 3,
    )  # fmt: skip


def idle_trial(config: dict, images: Path, search_folder: Path, **others: object) -> None:
    """Replace train_cifar; a trial that continues after a pause does not read the images again."""
    begun = search_folder / f"{tune.get_context().get_trial_name()}.begun"
    report_idly(config, None if begun.exists() else map_dataset(images), search_folder)


def report_idly(config: dict, dataset: Dataset | None, folder: Path) -> None:
    """Report every epoch, with a loss that depends on the learning rate, and falls equally in all trials."""
    if dataset:
        dataset.train_images.max()
        (folder / f"{tune.get_context().get_trial_name()}.begun").touch()
    (folder / f"{os.getpid()}.memory").write_text(str(status("RssAnon")))
    for epoch in range(1, config["epochs"] + 1):
        tune.report(REPORT | {"epoch": epoch, "loss": 10 - config["lr"] - 0.01 * epoch})


def own_search(trials: int, epochs: int, dataset: Dataset, folder: Path, scheduler: str) -> None:
    """Run hparam_search.main on idle trials."""
    hparam_search.train_cifar = idle_trial
    hparam_search.read_images = lambda **source: dataset
    hparam_search.param_space["h_1"] = hparam_search.param_space["h_2"] = 64
    arguments = ["--num-samples", str(trials), "--max-epochs", str(epochs), "--output-dir", str(folder), "--name", "it"]
    arguments += ["--scheduler", scheduler]
    if hparam_search.main(arguments) != 1:  # "No trial has a model"
        raise RuntimeError("the search failed")


def tune_search(trials: int, epochs: int, dataset: Dataset, folder: Path) -> None:
    """Run idle trials with Tune's defaults."""
    (folder / "it").mkdir()

    def trial(config: dict) -> None:
        report_idly(config, dataset, folder / "it")

    tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"epochs": epochs, "lr": tune.loguniform(1e-5, 1e-1)},
        tune_config=tune.TuneConfig(
            num_samples=trials,
            scheduler=tune.schedulers.ASHAScheduler(
                metric="loss", mode="min", max_t=epochs + 1, grace_period=3, reduction_factor=2
            ),
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name="it"),
    ).fit()


def measure(scheduler: str, trials: int, epochs: int) -> list[float]:
    """Run one search, and return its figures, in the order of COLUMNS."""
    if scheduler == "tune":  # undo what hparam_search sets for itself
        for name in ("TUNE_GLOBAL_CHECKPOINT_S", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"):
            del os.environ[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        dataset = blank_images()
        start = time.perf_counter()
        with hparam_search.tuner.running_ray(Settings()):
            started = time.perf_counter()
            if scheduler == "tune":
                tune_search(trials, epochs, dataset, Path(folder))
            else:
                own_search(trials, epochs, dataset, Path(folder), scheduler)
            ended = time.perf_counter()
        workers = [float(path.read_text()) for path in Path(folder).glob("it/*.memory")]
    seconds = ended - started
    return [started - start, seconds, seconds / trials, len(workers), status("VmHWM"), max(workers)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the searches, each in a process, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--search",
        nargs=3,
        metavar=("SCHEDULER", "TRIALS", "EPOCHS"),
        help=f"only this one, and only its row; SCHEDULER is one of {', '.join(SCHEDULERS)}",
    )
    args = parser.parse_args(argv)
    if args.search:
        scheduler, trials, epochs = args.search
        if scheduler not in SCHEDULERS:
            parser.error(f"--search {scheduler}: no such scheduler; use one of {', '.join(SCHEDULERS)}")
        print_row(f"{trials} × {epochs}, {scheduler}", *measure(scheduler, int(trials), int(epochs)))
        return
    print_header("trials × epochs, scheduler", *COLUMNS)
    for search in (
        ("none", 12, 20),
        ("tune", 12, 20),
        ("promote", 100, 5),
        ("promote", 1000, 5),
        ("asha", 1000, 5),
    ):
        command = [sys.executable, "-m", "benchmarks.overhead", "--search", *map(str, search)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
