"""Search the hyperparameters of a small ResNet on CIFAR-100 with Ray Tune, for the highest validation accuracy.

    python hparam_search.py                  # 12 trials on CIFAR-100, downloaded into data/
    python hparam_search.py --quick          # about a minute on two cores, on made-up images
    tensorboard --logdir outputs             # watch it

Edit `param_space` to search something else: Ray Tune's `tune.grid_search`, `tune.choice`, `tune.uniform` and
`tune.loguniform` search a hyperparameter, a plain value fixes it.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

# Ray's classic table; its newer output repeats config and result of every trial besides. Read when Ray is imported.
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
# Here every signal is handled alike: see stopping_on_signals.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
# A snapshot of the search after every checkpoint is meant, so do not warn of it.
os.environ["TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S"] = "0"
# The results are local: no reports to Ray's makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.sample import Categorical, Domain, Float, Integer

from data import Dataset, InputError, load_cifar100, load_folder, make_synthetic
from report import (
    best_first,
    prune_checkpoints,
    read_results,
    recap,
    recap_best,
    save_best_model,
    shown,
    write_results,
    write_whole,
)
from train import CONFIG_KEYS, train_cifar

param_space = {
    "epochs": 20,
    "h_1": tune.grid_search([64, 128]),
    "h_2": tune.grid_search([512, 1024]),
    "p_drop": tune.loguniform(0.1, 0.5),
    "lr": tune.loguniform(1e-5, 1e-1),
    "batch_size": 64,
    # The recipe. Each of these can be searched, too.
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "nesterov": True,
    "augment": True,
    "schedule": "cooldown",  # or constant, cosine, one_cycle
    "ema_decay": 0.998,
}

# The recipe of the script that this one began as: `param_space | BASELINE_RECIPE` trains as that did.
BASELINE_RECIPE = {
    "momentum": 0.9,
    "weight_decay": 0.0,
    "nesterov": False,
    "augment": False,
    "schedule": "constant",
    "ema_decay": 0.0,
}

# What --quick changes: widths, epochs and images for two cores and one minute.
QUICK_SPACE = {
    "epochs": 4,
    "h_1": 16,
    "h_2": tune.grid_search([32, 64]),
    "lr": tune.loguniform(1e-2, 1e-1),
    "batch_size": 32,
}
QUICK_IMAGES = {"num_train": 2000, "num_test": 1000, "num_classes": 10}

GRACE_PERIOD = 3  # epochs
REDUCTION_FACTOR = 2
PATIENCE = 4  # epochs
MIN_DELTA = 0.001  # nats
MAX_SECONDS_PER_TRIAL = 3600
MAX_FAILURES_PER_TRIAL = 2
SYNC_PERIOD = 10  # seconds from a report to TensorBoard, at most
TABLE_PERIOD = 30  # seconds

SEARCH_FILE = "search.json"


class EarlyStopping(tune.Stopper):
    """Stops a trial whose loss has not fallen by min_delta for patience epochs, is not finite, or whose time is up."""

    def __init__(self, patience: int, min_delta: float, max_seconds: float) -> None:
        self.patience, self.min_delta, self.max_seconds = patience, min_delta, max_seconds
        self.losses = defaultdict(dict)  # trial id → epoch → loss: an epoch repeated after a restore counts once

    def __call__(self, trial_id: str, result: dict) -> bool:
        epoch, losses = result["epoch"], self.losses[trial_id]
        losses[epoch] = result["loss"]
        if not math.isfinite(result["loss"]) or result["time_total_s"] >= self.max_seconds:
            return True
        before = [loss for e, loss in losses.items() if e <= epoch - self.patience]
        since = [loss for e, loss in losses.items() if epoch - self.patience < e <= epoch]
        return bool(before) and min(since) > min(before) - self.min_delta

    def stop_all(self) -> bool:
        return False


class ProgressTable(tune.CLIReporter):
    """Ray's table while the search runs; the recap takes the place of the last one."""

    def report(self, trials: list, done: bool, *sys_info: str) -> None:
        if not done:
            super().report(trials, done, *sys_info)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are our errors: one sentence, no usage."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}: see --help")


DEFAULTS = {
    "dataset": "cifar100",
    "data_dir": "data",
    "output_dir": "outputs",
    "name": None,
    "num_samples": 3,
    "max_epochs": None,
    "seed": 0,
    "cpus_per_trial": None,
    "gpus_per_trial": None,
    "quick": False,
}
QUICK_DEFAULTS = {"dataset": "synthetic", "num_samples": 2}


def parse_args(argv: Sequence[str] | None) -> dict:
    """Return the settings: what was given, then what --quick sets, then the defaults; or {"resume": path} alone.

    Raises:
        InputError: flags that do not exist or make no sense.
    """
    # A flag that was not given must be told from one given with its default: --quick and --resume ask.
    parser = Parser(
        prog="hparam_search.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", choices=("cifar100", "folder", "synthetic"), help="default cifar100")
    parser.add_argument(
        "--data-dir", metavar="PATH", help="where CIFAR-100 is or is put, or the folder with train/ and test/; data"
    )
    parser.add_argument("--output-dir", metavar="PATH", help="default outputs")
    parser.add_argument("--name", help="of the search's folder there; default search_<date>_<time>")
    parser.add_argument("--num-samples", metavar="N", type=int, help="random draws for each point of the grid; 3")
    parser.add_argument("--max-epochs", metavar="N", type=int, help='default param_space["epochs"]')
    parser.add_argument("--seed", metavar="N", type=int, help="of draws, weights and batches; 0")
    parser.add_argument("--cpus-per-trial", metavar="N", type=int, help="default: all are shared out")
    parser.add_argument("--gpus-per-trial", metavar="F", type=float, help="default 1 where there are GPUs; 0.5 shares")
    parser.add_argument("--quick", action="store_true", help="a small search, in about a minute on two cores")
    parser.add_argument("--resume", metavar="PATH", help="continue the search in that folder")
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        if len(given) > 1:
            other = next(key for key in given if key != "resume").replace("_", "-")
            raise InputError(f"--resume takes every setting from the search it continues: leave --{other} away")
        return given
    settings = DEFAULTS | (QUICK_DEFAULTS if given.get("quick") else {}) | given
    for key, lowest in (("num_samples", 1), ("max_epochs", 1), ("seed", 0), ("cpus_per_trial", 1)):
        if settings[key] is not None and settings[key] < lowest:
            raise InputError(f"--{key.replace('_', '-')} is {settings[key]}, but must be at least {lowest}")
    gpus = settings["gpus_per_trial"]
    if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and gpus == int(gpus))):
        raise InputError(f"--gpus-per-trial is {gpus}, but must be from 0 to 1, or a whole number")
    if "RAY_ADDRESS" not in os.environ:  # of a cluster, Ray knows the sizes
        for key, available in (("cpus_per_trial", os.cpu_count()), ("gpus_per_trial", torch.cuda.device_count())):
            if (settings[key] or 0) > available:
                name = key.replace("_", "-")
                raise InputError(f"--{name} is {settings[key]}, but this machine has {available}: ask for fewer")
    if settings["dataset"] == "synthetic" and "data_dir" in given:
        raise InputError(f"--data-dir {given['data_dir']} has no use with --dataset synthetic: leave one of them away")
    settings["name"] = settings["name"] or datetime.now().strftime("search_%Y-%m-%d_%H-%M-%S")
    check_name(settings["name"])
    return settings


def check_name(name: str) -> None:
    """Refuse a name of a search that is no plain name of a folder."""
    if name in (".", "..") or not name.isprintable() or set(name) & set("/\\") or name.startswith("."):
        raise InputError(f"--name is {name!r}, but must be a plain name for a folder, without / or \\ or a leading dot")


def check_param_space(space: dict) -> None:
    """Refuse keys that no trial knows, keys that are missing, and values that no trial could train with.

    Raises:
        InputError: naming the key and the value.
    """
    for key in space:
        if key not in CONFIG_KEYS:
            raise InputError(f"param_space has the unknown key {key!r}: the keys are {', '.join(CONFIG_KEYS)}")
    for key, (valid, words) in CONFIG_KEYS.items():
        if key not in space:
            raise InputError(f"param_space lacks {key!r}: give it a value, {words}")
        values = possible_values(space[key])
        if not values and not isinstance(space[key], Domain):
            raise InputError(f"param_space[{key!r}] is {space[key]!r}, but a grid_search needs a list of values")
        for value in values:
            if not valid(value):
                raise InputError(f"param_space[{key!r}] can be {value!r}, but must be {words}")
    if isinstance(space["epochs"], dict | Domain):
        raise InputError(
            "param_space['epochs'] is searched, but must be one number: the scheduler compares at equal epochs"
        )
    if True in possible_values(space["nesterov"]) and 0 in possible_values(space["momentum"]):
        raise InputError("param_space['nesterov'] can be True with a momentum of 0: Nesterov's needs one above 0")


def possible_values(entry: object) -> list:
    """Return all values that an entry of param_space can take, or the ends of a range; of a function, none."""
    if isinstance(entry, dict) and set(entry) == {"grid_search"}:
        return list(entry["grid_search"]) if isinstance(entry["grid_search"], list | tuple) else []
    if isinstance(entry, Categorical):
        return list(entry.categories)
    if isinstance(entry, Integer):
        return [entry.lower, entry.upper - 1]
    if isinstance(entry, Float):
        return [entry.lower, entry.upper]
    return [] if isinstance(entry, Domain) else [entry]


def count_trials(space: dict, num_samples: int) -> int:
    """Return how many trials a search has: its samples, for each point of the grid."""
    grids = [entry["grid_search"] for entry in space.values() if isinstance(entry, dict)]
    return num_samples * math.prod(map(len, grids))


def load_dataset(settings: dict) -> Dataset:
    """Return the images that the settings name, and print how many they are."""
    if settings["dataset"] == "cifar100":
        dataset = load_cifar100(settings["data_dir"])
    elif settings["dataset"] == "folder":
        print(f"Reading the images in {settings['data_dir']}.", flush=True)
        dataset = load_folder(settings["data_dir"])
    else:
        dataset = make_synthetic(**(QUICK_IMAGES if settings["quick"] else {}))
    counts = [len(labels) for labels in (dataset.train_labels, dataset.val_labels, dataset.test_labels)]
    print(
        "Images of {} classes: {:,} for training, {:,} for validation, {:,} for the test.".format(
            len(dataset.classes), *counts
        )
    )
    return dataset


def share_resources(settings: dict) -> tuple[dict[str, float], str]:
    """Share Ray's CPUs and GPUs among the trials that run at once.

    Returns:
        The resources of a trial: a GPU each where there are any, and the CPUs shared so that all are busy; and the
        usage of all trials together, as a line to print.
    """
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    gpu = settings["gpus_per_trial"]
    if gpu is None:
        gpu = 1 if gpus else 0
    at_once = min(settings["num_trials"], int(gpus / gpu) if gpu else cpus)
    cpu = settings["cpus_per_trial"] or max(1, cpus // max(1, at_once))
    at_once = min(at_once, cpus // cpu)
    return {"cpu": cpu, "gpu": gpu}, f"{at_once * cpu}/{cpus} CPUs, {at_once * gpu:g}/{gpus} GPUs"


def is_news(record: logging.LogRecord) -> bool:
    """Filter what Ray logs: what main says itself, in this script's terms, is no news."""
    said = (
        "Stop signal received",
        "Trials did not complete",
        "Experiment has been interrupted",
        "Token authentication",
    )
    return not record.getMessage().startswith(said)


@contextlib.contextmanager
def running_ray() -> Iterator[None]:
    """Start Ray, or join the cluster that RAY_ADDRESS names, and leave it as it was found."""
    if ray.is_initialized():
        yield
        return
    for name in ("ray.tune.tune", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).addFilter(is_news)
    # Not Ray's own default, which waits for minutes for a cluster of which but a stale file is left.
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
    except ConnectionError as error:
        raise InputError(f"no Ray cluster answers at RAY_ADDRESS {address}: start it, or unset RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[list[int]]:
    """On Ctrl-C, SIGTERM or SIGHUP have Ray Tune stop the trials and save the search; yields the signals that came.

    A second signal raises KeyboardInterrupt.
    """
    received = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        # SIGUSR1 is what Tune, once it runs, ends on in good order, as it would on SIGINT.
        if len(received) > 1 or not callable(signal.getsignal(signal.SIGUSR1)):
            raise KeyboardInterrupt(number)
        print("\nStopping the trials; press Ctrl-C again to leave at once.", file=sys.stderr)
        signal.raise_signal(signal.SIGUSR1)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def new_tuner(settings: dict, space: dict, trainable: Callable, folder: Path) -> tune.Tuner:
    """Return the Tuner of a new search."""
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            num_samples=settings["num_samples"],
            search_alg=BasicVariantGenerator(random_state=settings["seed"]),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=space["epochs"],
                grace_period=min(GRACE_PERIOD, space["epochs"]),
                reduction_factor=REDUCTION_FACTOR,
            ),
            reuse_actors=True,  # a process that has imported torch takes on the next trial
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            stop=EarlyStopping(PATIENCE, MIN_DELTA, MAX_SECONDS_PER_TRIAL),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES_PER_TRIAL),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="accuracy", checkpoint_score_order="max"
            ),
            sync_config=tune.SyncConfig(sync_period=SYNC_PERIOD),
            progress_reporter=ProgressTable(
                metric_columns={
                    "epoch": "iter",
                    "time_total_s": "total time (s)",
                    "loss": "loss",
                    "accuracy": "accuracy",
                },
                max_report_frequency=TABLE_PERIOD,
            ),
            verbose=1,
        ),
    )


def trainable(dataset: Dataset, resources: dict[str, float]) -> Callable:
    """Return train_cifar with its dataset, put once where every trial maps it, and its resources."""
    return tune.with_resources(tune.with_parameters(train_cifar, dataset=dataset), resources)


def search_folder(settings: dict) -> Path:
    """Return where the search that the command line asks for, new or resumed, is or will be."""
    if "resume" in settings:
        return Path(settings["resume"]).resolve()
    return Path(settings["output_dir"]).resolve() / settings["name"]


def new_search(settings: dict) -> int:
    """Run a search from its first trial to its end, and return the exit code."""
    space = {"seed": settings["seed"]} | param_space | (QUICK_SPACE if settings["quick"] else {})
    if settings["max_epochs"]:
        space["epochs"] = settings["max_epochs"]
    check_param_space(space)
    folder = search_folder(settings)
    if folder.exists():
        raise InputError(
            f"--name {settings['name']} is taken by {shown(folder)}: choose another, or --resume that folder"
        )
    dataset = load_dataset(settings)
    settings["data_dir"] = str(Path(settings["data_dir"]).resolve())  # --resume may be called from elsewhere
    settings |= {"num_trials": count_trials(space, settings["num_samples"]), "seconds": 0.0}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder.parent} cannot be made ({error.strerror}): choose another --output-dir") from error
    start = time.monotonic()
    with stopping_on_signals() as signals, running_ray():
        resources, settings["resource_usage"] = share_resources(settings)
        folder.mkdir()
        write_whole(folder / SEARCH_FILE, json.dumps(settings, indent=2))
        new_tuner(settings, space, trainable(dataset, resources), folder).fit()
    return wrap_up(settings, dataset, folder, time.monotonic() - start, signals)


def resume_search(folder: Path) -> int:
    """Continue the search in a folder, keep what it has finished, and return the exit code."""
    if not (folder / SEARCH_FILE).is_file():
        raise InputError(f"{folder} holds no search: --resume takes a folder that a search has made, outputs/<name>")
    settings = json.loads((folder / SEARCH_FILE).read_text())
    if not is_begun(folder):
        raise InputError(f"{folder} was left before its first trial began: delete it, and start the search again")
    results = read_results(folder)
    finished = len(results) == settings["num_trials"] and all(row["status"] == "TERMINATED" for row in results)
    metrics_file = folder / "best_model" / "metrics.json"
    if finished and metrics_file.exists():
        print(recap(results, settings["seconds"], settings["resource_usage"]))
        print(recap_best(results, json.loads(metrics_file.read_text()), folder))
        return 0
    dataset = load_dataset(settings)
    if finished:
        return wrap_up(settings, dataset, folder, 0, [])
    start = time.monotonic()
    with stopping_on_signals() as signals, running_ray():
        resources, settings["resource_usage"] = share_resources(settings)
        tune.Tuner.restore(str(folder), trainable(dataset, resources), resume_errored=True).fit()
    return wrap_up(settings, dataset, folder, time.monotonic() - start, signals)


def wrap_up(settings: dict, dataset: Dataset, folder: Path, seconds: float, signals: list[int]) -> int:
    """Print and write what came of a search that has stopped, and return the exit code."""
    settings["seconds"] += seconds
    write_whole(folder / SEARCH_FILE, json.dumps(settings, indent=2))
    results = read_results(folder)
    if signals:
        write_results(results, folder)
        print(recap(results, settings["seconds"], settings["resource_usage"]))
        print(f"Interrupted. To go on: {resume_command(folder)}")
        return 128 + signals[0]
    ranking = best_first(results)
    metrics = save_best_model(ranking[0], dataset, folder) if ranking else None
    prune_checkpoints(results, folder)
    write_results(results, folder)
    print(recap(results, settings["seconds"], settings["resource_usage"]))
    failed = [row for row in results if row["status"] == "ERROR"]
    for row in failed:
        print(
            f"{row['name']} failed: {row['error']} (all of it in {folder / row['name'] / 'error.txt'})", file=sys.stderr
        )
    if not metrics:
        print("No trial finished an epoch, so there is no best model.", file=sys.stderr)
        return 1
    print(recap_best(results, metrics, folder))
    return 0


def is_begun(folder: Path) -> bool:
    """Return whether the folder has a state to resume from."""
    return (folder / "tuner.pkl").is_file() and any(folder.glob("experiment_state-*.json"))


def resume_command(folder: Path) -> str:
    """Return the command line that continues the search in folder."""
    return shlex.join(["python", shown(Path(__file__).resolve()), "--resume", shown(folder)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
        0 done; 2 bad input, after one sentence on stderr; 130, 143 or 129 interrupted by Ctrl-C, SIGTERM or SIGHUP;
        1 every trial failed.
    """
    try:
        settings = parse_args(argv)
        folder = search_folder(settings)
        return resume_search(folder) if "resume" in settings else new_search(settings)
    except InputError as error:
        print(f"hparam_search.py: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        begun = is_begun(folder)
        print(
            f"Interrupted. To go on: {resume_command(folder)}" if begun else "Interrupted before the first trial began."
        )
        return 128 + (interrupt.args or (signal.SIGINT,))[0]


if __name__ == "__main__":
    sys.exit(main())
