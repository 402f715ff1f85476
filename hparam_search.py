"""Search the hyperparameters of a small ResNet on CIFAR-100 with Ray Tune, for the highest validation accuracy.

    python hparam_search.py                  # 12 trials on CIFAR-100, downloaded into data/
    python hparam_search.py --quick          # about a minute on two cores, on made-up images
    tensorboard --logdir outputs             # watch it

Edit `param_space` to search something else: Ray Tune's `tune.grid_search`, `tune.choice`, `tune.uniform` and
`tune.loguniform` search a hyperparameter, a plain value fixes it.
"""

import argparse
import contextlib
import fcntl
import inspect
import io
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

# Ray's classic table; its newer output repeats config and result of every trial besides. Read when Ray is imported.
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
# Here every signal is handled alike: see stopping_on_signals.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
# A search is resumed from its trials' own logs and checkpoints, so Ray need not write any.
os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
# What failed is said in a sentence at the end, and in full in the trial's folder.
os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
# A Ray of our own listens on the loopback alone, as it does by itself on macOS.
if "RAY_ADDRESS" not in os.environ:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# The results are local: no reports to Ray's makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.sample import Categorical, Domain, Float, Integer, Sampler
from ray.tune.search.variant_generator import generate_variants

from data import Dataset, InputError, fingerprint, load_cifar100, load_folder, make_synthetic
from report import (
    FINISHED,
    TrialLog,
    prune_checkpoints,
    read_best_model,
    read_log,
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
MAX_TRIALS = 100_000
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
        if not math.isfinite(result["loss"]) or result["seconds"] >= self.max_seconds:
            return True
        before = [loss for e, loss in losses.items() if e <= epoch - self.patience]
        since = [loss for e, loss in losses.items() if epoch - self.patience < e <= epoch]
        return bool(before) and min(since) > min(before) - self.min_delta

    def stop_all(self) -> bool:
        return False


class ResumedASHA(ASHAScheduler):
    """ASHA that lets trials pass where an earlier process of the same search did, whoever has reported since.

    Args:
        passed: of each trial that goes on, by name, the epochs that it has reported already.
        kwargs: of ASHAScheduler.
    """

    def __init__(self, passed: dict[str, set[int]], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.passed = passed

    def on_trial_result(self, tune_controller: object, trial: object, result: dict) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result["epoch"] in self.passed.get(str(trial), ()) else decision


class Drawn(Domain):
    """A hyperparameter whose values are drawn already, by draw_trials: whichever value a trial has is valid.

    Tune copies its space for every trial, so that a list of all values would take time that grows with their square.
    """

    def is_valid(self, value: object) -> bool:
        return True


class ProgressTable(tune.CLIReporter):
    """Ray's table while the search runs; the recap takes the place of the last one."""

    def report(self, trials: list, done: bool, *sys_info: str) -> None:
        if done:
            return
        with contextlib.redirect_stdout(io.StringIO()) as table:
            super().report(trials, done, *sys_info)
        # Ray's own folder, which is not where the results are.
        print(*(line for line in table.getvalue().splitlines() if not line.startswith("Result logdir")), sep="\n")


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


def flag(key: str) -> str:
    """Return a setting's key as one types it: data_dir is --data-dir."""
    return f"--{key.replace('_', '-')}"


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
    for key, value in given.items():
        if isinstance(value, list):  # argparse's reading of --flag=--
            raise InputError(f"{flag(key)} needs a value: see --help")
    for key in ("resume", "data_dir", "output_dir"):
        if not given.get(key, "").isprintable():
            raise InputError(f"{flag(key)} is {given[key]!r}, but must be a path that can be printed")
    if "resume" in given:
        if len(given) > 1:
            other = next(key for key in given if key != "resume")
            raise InputError(f"--resume takes every setting from the search it continues: leave {flag(other)} away")
        return given
    settings = DEFAULTS | (QUICK_DEFAULTS if given.get("quick") else {}) | given
    for key, lowest in (("num_samples", 1), ("max_epochs", 1), ("seed", 0), ("cpus_per_trial", 1)):
        if settings[key] is not None and settings[key] < lowest:
            raise InputError(f"{flag(key)} is {settings[key]}, but must be at least {lowest}")
    gpus = settings["gpus_per_trial"]
    if gpus is not None and not (0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))):
        raise InputError(f"--gpus-per-trial is {gpus}, but must be from 0 to 1, or a whole number")
    if "RAY_ADDRESS" not in os.environ:  # of a cluster, Ray knows the sizes
        for key, available in (("cpus_per_trial", os.cpu_count()), ("gpus_per_trial", torch.cuda.device_count())):
            if (settings[key] or 0) > available:
                raise InputError(f"{flag(key)} is {settings[key]}, but this machine has {available}: ask for fewer")
    if settings["dataset"] == "synthetic" and "data_dir" in given:
        raise InputError(f"--data-dir {given['data_dir']} has no use with --dataset synthetic: leave one of them away")
    if settings["name"] is not None:
        check_name(settings["name"])
    return settings


def check_name(name: str) -> None:
    """Refuse a name of a search that is no plain name of a folder."""
    plain = name.isprintable() and not set(name) & set("/\\") and not name.startswith(".")
    if not plain or not 1 <= len(os.fsencode(name)) <= 200:
        raise InputError(
            f"--name is {name!r}, but must be a plain name for a folder, of 1 to 200 bytes, without / or \\ or a "
            "leading dot"
        )


def search_space(settings: dict) -> dict:
    """Return the space that the settings ask for: param_space, what --quick changes, and the seed."""
    space = {"seed": settings["seed"]} | param_space | (QUICK_SPACE if settings["quick"] else {})
    return space | ({"epochs": settings["max_epochs"]} if settings["max_epochs"] else {})


def check_param_space(space: dict) -> None:
    """Refuse keys that no trial knows, keys that are missing, and values that no trial could train with.

    Raises:
        InputError: naming the key and the value.
    """
    for key in space:
        if key not in CONFIG_KEYS:
            raise InputError(f"param_space has the unknown key {key!r}: the keys are {', '.join(CONFIG_KEYS)}")
    for key, (_, words) in CONFIG_KEYS.items():
        if key not in space:
            raise InputError(f"param_space lacks {key!r}: give it a value, {words}")
        values = possible_values(space[key])
        if not values and not isinstance(space[key], Domain):
            raise InputError(f"param_space[{key!r}] is {space[key]!r}, but a grid_search needs a list of values")
        for value in values:
            check_value(key, value)
        if isinstance(space[key], Float | Integer) and not space[key].lower < space[key].upper:
            raise InputError(f"param_space[{key!r}] ends at {space[key].upper}, but must end above {space[key].lower}")
    if isinstance(space["epochs"], dict | Domain):
        raise InputError(
            "param_space['epochs'] is searched, but must be one number: the scheduler compares at equal epochs"
        )
    if True in possible_values(space["nesterov"]) and 0 in possible_values(space["momentum"]):
        raise InputError("param_space['nesterov'] can be True with a momentum of 0: Nesterov's needs one above 0")


def check_value(key: str, value: object) -> None:
    """Refuse a value that no trial could train with."""
    valid, words = CONFIG_KEYS[key]
    if not valid(value):
        raise InputError(f"param_space[{key!r}] can be {value!r}, but must be {words}")


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


def draw_trials(space: dict, num_samples: int, seed: int) -> dict[str, dict]:
    """Return name → config of all trials: num_samples random draws for each point of the grid.

    Raises:
        InputError: there are too many, or a config that no trial could train with.
    """
    grids = [entry["grid_search"] for entry in space.values() if isinstance(entry, dict)]
    count = num_samples * math.prod(map(len, grids))
    if count > MAX_TRIALS:
        raise InputError(
            f"--num-samples {num_samples} and the grid make {count:,} trials: at most {MAX_TRIALS:,} can be"
        )
    rng = np.random.default_rng(seed)
    try:
        drawn = [
            variant["config"]
            for _ in range(num_samples)
            for _, variant in generate_variants({"config": space}, random_state=rng)
        ]
    except Exception as error:  # of a function of the user's
        raise InputError(f"param_space cannot be drawn from: {type(error).__name__}: {error}") from error
    trials = {}
    for i, config in enumerate(drawn):
        config = {key: value.item() if isinstance(value, np.generic) else value for key, value in config.items()}
        for key, value in config.items():
            check_value(key, value)
        trials[trial_name(i)] = config
    return trials


def trial_name(i: int) -> str:
    """Return the name of the i-th trial, from 0, and of its folder."""
    return f"train_cifar_{i:05}"


def described(entry: object) -> str:
    """Return an entry of param_space as text that tells it from any other."""
    if isinstance(entry, Domain | Sampler):
        parts = [f"{name}={described(value)}" for name, value in vars(entry).items() if value is not None]
        return f"{type(entry).__name__}({', '.join(parts)})"
    if callable(entry):
        try:
            return inspect.getsource(entry).strip()
        except (OSError, TypeError):  # of one that was typed in, or is built in
            return getattr(entry, "__qualname__", repr(entry))
    return repr(entry)


def load_dataset(settings: dict) -> Dataset:
    """Return the images that the settings name, and print how many they are.

    Raises:
        InputError: they cannot be read.
    """
    try:
        if settings["dataset"] == "cifar100":
            dataset = load_cifar100(settings["data_dir"])
        elif settings["dataset"] == "folder":
            print(f"Reading the images in {settings['data_dir']}.", flush=True)
            dataset = load_folder(settings["data_dir"])
        else:
            dataset = make_synthetic(**(QUICK_IMAGES if settings["quick"] else {}))
    except OSError as error:
        raise InputError(f"--data-dir {settings['data_dir']} cannot be read ({error}): choose another") from error
    counts = [len(labels) for labels in (dataset.train_labels, dataset.val_labels, dataset.test_labels)]
    print(
        "Images of {} classes: {:,} for training, {:,} for validation, {:,} for the test.".format(
            len(dataset.classes), *counts
        )
    )
    return dataset


def share_resources(settings: dict, num_trials: int) -> tuple[dict[str, float], str]:
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
    at_once = min(num_trials, int(gpus / gpu) if gpu else cpus)
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
        "Failed to fetch metrics",
    )
    return not record.getMessage().startswith(said)


@contextlib.contextmanager
def running_ray() -> Iterator[None]:
    """Start Ray, or join the cluster that RAY_ADDRESS names, and leave it as it was found."""
    if ray.is_initialized():
        yield
        return
    for name in (
        "ray.tune.tune",
        "ray.tune.analysis.experiment_analysis",
        "ray._private.authentication.authentication_token_setup",
    ):
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

    A second signal raises KeyboardInterrupt. Within running_ray only, for Ray sets a handler of its own as it starts.
    """
    received = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGHUP:  # the terminal is gone: what is printed must go elsewhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
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


def new_scheduler(max_epochs: int, results: list[dict], folder: Path) -> ASHAScheduler:
    """Return ASHA, as it was when the trials of a search that is resumed had reported what is in their logs."""
    logs = {row["name"]: [line for line in read_log(folder / row["name"]) if "epoch" in line] for row in results}
    scheduler = ResumedASHA(
        {
            row["name"]: {line["epoch"] for line in logs[row["name"]]}
            for row in results
            if row["status"] not in FINISHED
        },
        metric="loss",
        mode="min",
        time_attr="epoch",
        max_t=max_epochs,
        grace_period=min(GRACE_PERIOD, max_epochs),
        reduction_factor=REDUCTION_FACTOR,
    )
    for row in results:
        if row["status"] in FINISHED:
            trial = SimpleNamespace(trial_id=row["name"])  # all that ASHA asks of a trial
            scheduler.on_trial_add(None, trial)
            for line in logs[row["name"]]:
                scheduler.on_trial_result(None, trial, line)
            scheduler.on_trial_complete(None, trial, logs[row["name"]][-1])
    return scheduler


def new_tuner(search: dict, trainable: Callable, folder: Path, ray_folder: Path) -> tune.Tuner:
    """Return the Tuner of those trials of a search that are not finished; Ray's own files go into ray_folder."""
    results = read_results(folder, search["trials"])
    names = [row["name"] for row in results if row["status"] not in FINISHED]
    configs = [search["trials"][name] for name in names]
    return tune.Tuner(
        trainable,
        param_space=dict.fromkeys(configs[0], Drawn()),
        tune_config=tune.TuneConfig(
            num_samples=len(configs),
            search_alg=BasicVariantGenerator(points_to_evaluate=configs),
            scheduler=new_scheduler(configs[0]["epochs"], results, folder),
            reuse_actors=True,  # a process that has imported torch takes on the next trial
            trial_name_creator=lambda trial: names[int(trial.trial_id.rsplit("_", 1)[-1])],
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name=ray_folder.name,
            storage_path=str(ray_folder.parent),
            stop=EarlyStopping(PATIENCE, MIN_DELTA, MAX_SECONDS_PER_TRIAL),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES_PER_TRIAL),
            callbacks=[TrialLog(folder, results)],
            progress_reporter=ProgressTable(
                metric="loss",
                mode="min",
                parameter_columns=["p_drop", "lr", "h_1", "h_2"],
                metric_columns={
                    "epoch": "iter",
                    "seconds": "total time (s)",
                    "loss": "loss",
                    "accuracy": "accuracy",
                },
                max_report_frequency=TABLE_PERIOD,
            ),
            verbose=1,
        ),
    )


def trainable(dataset: Dataset, folder: Path, resources: dict[str, float]) -> Callable:
    """Return train_cifar with its dataset, put once where every trial maps it, and its resources."""
    train = tune.with_parameters(train_cifar, dataset=dataset, search_folder=str(folder))
    return tune.with_resources(train, resources)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the search in folder, so that no other process runs it, and if it is left midway say how to go on.

    If this process is killed, the lock goes with it.

    Raises:
        InputError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"{folder} is being searched by another process: wait for its end, or stop it") from error
    try:
        yield
    except (KeyboardInterrupt, OSError):
        print(f"Interrupted. To go on: {resume_command(folder)}")
        raise
    finally:
        os.close(descriptor)


def new_search(settings: dict) -> int:
    """Run a search from its first trial to its end, and return the exit code."""
    space = search_space(settings)
    check_param_space(space)
    trials = draw_trials(space, settings["num_samples"], settings["seed"])
    name = settings["name"] or datetime.now().strftime("search_%Y-%m-%d_%H-%M-%S")
    folder = resolved(settings["output_dir"]) / name
    check_free(folder)
    dataset = load_dataset(settings)
    settings["data_dir"] = str(resolved(settings["data_dir"]))  # --resume may be called from elsewhere
    search = {"settings": settings, "param_space": {key: described(entry) for key, entry in space.items()}}
    search |= {"dataset": fingerprint(dataset), "trials": trials, "seconds": 0.0, "resource_usage": ""}
    with running_ray(), stopping_on_signals() as signals:
        if not settings["name"]:  # of two that start in the same second, one waits for the next
            while folder.exists():
                time.sleep(0.1)
                folder = folder.with_name(datetime.now().strftime("search_%Y-%m-%d_%H-%M-%S"))
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made ({error.strerror}): choose another --name") from error
        with holding(folder):
            write_whole(folder / SEARCH_FILE, json.dumps(search, indent=2))
            return run_trials(search, dataset, folder, signals)


def resolved(path: str) -> Path:
    """Return an absolute path without links.

    Raises:
        InputError: the links in it lead round in a circle.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be followed ({error}): choose another path") from error


def check_free(folder: Path) -> None:
    """Refuse a folder for a new search that is there already, or that cannot be made."""
    try:
        if folder.exists():
            raise InputError(
                f"--name {folder.name} is taken by {shown(folder)}: choose another, or --resume that folder"
            )
        parent = next(parent for parent in folder.parents if parent.exists())
    except OSError as error:
        raise InputError(f"{folder.parent} cannot be made ({error.strerror}): choose another --output-dir") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} is no folder that can be written to: choose another --output-dir")


def read_search(folder: Path) -> dict:
    """Return what a search's folder says of the search.

    Raises:
        InputError: the folder holds no search, or one whose file is damaged.
    """
    path = folder / SEARCH_FILE
    kinds = {
        "settings": dict, "param_space": dict, "dataset": dict, "trials": dict, "seconds": float, "resource_usage": str,
    }  # fmt: skip
    try:
        search = json.loads(path.read_text())
        settings, trials = search["settings"], search["trials"]
        if not (
            all(isinstance(search[key], kind) for key, kind in kinds.items())
            and settings.keys() == DEFAULTS.keys()
            and all(type(settings[key]) is type(value) for key, value in DEFAULTS.items() if value is not None)
            and trials
            and list(trials) == [trial_name(i) for i in range(len(trials))]  # they are names of folders
        ):
            raise ValueError("it is not what a search writes")
        for config in trials.values():
            check_param_space(config)
    except OSError as error:
        raise InputError(
            f"{folder} holds no search ({error.strerror}): --resume takes a folder that a search made, outputs/<name>"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): start the search again") from error
    return search


def resume_search(path: str) -> int:
    """Continue the search in the folder at path, keep what it has finished, and return the exit code."""
    folder = resolved(path)
    search = read_search(folder)
    with holding(folder):
        results = read_results(folder, search["trials"])
        finished = all(row["status"] in FINISHED for row in results)
        if finished and read_best_model(results, folder):
            return wrap_up(search, None, folder)
        space = search_space(search["settings"])
        for key, entry in space.items():
            if described(entry) != search["param_space"].get(key):
                raise InputError(
                    f"param_space[{key!r}] is {described(entry)}, but was {search['param_space'].get(key)} when "
                    f"{shown(folder)} began: change it back, or start a new search"
                )
        dataset = load_dataset(search["settings"])
        for part, digest in fingerprint(dataset).items():
            if digest != search["dataset"].get(part):
                raise InputError(
                    f"the {part} in {search['settings']['data_dir']} are not those that {shown(folder)} began with: "
                    "put those back, or start a new search"
                )
        if finished:
            return wrap_up(search, dataset, folder)
        with running_ray(), stopping_on_signals() as signals:
            return run_trials(search, dataset, folder, signals)


def run_trials(search: dict, dataset: Dataset, folder: Path, signals: list[int]) -> int:
    """Run the trials of a search that are not finished, then wrap it up, and return the exit code."""
    start = time.monotonic()
    resources, search["resource_usage"] = share_resources(search["settings"], len(search["trials"]))
    for path in folder.glob(".ray_*"):  # of a process that was killed
        shutil.rmtree(path, ignore_errors=True)
    # All nodes of a cluster must see what Ray writes while a search runs; nothing is ever read from it.
    with tempfile.TemporaryDirectory(
        prefix=".ray_", dir=folder if "RAY_ADDRESS" in os.environ else None, ignore_cleanup_errors=True
    ) as ray_folder:
        new_tuner(search, trainable(dataset, folder, resources), folder, Path(ray_folder)).fit()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Tune has ended, and would no longer stop on it
    search["seconds"] += time.monotonic() - start
    write_whole(folder / SEARCH_FILE, json.dumps(search, indent=2))
    if not signals:
        return wrap_up(search, dataset, folder)
    results = read_results(folder, search["trials"])
    write_results(results, folder)
    print(recap(results, search["seconds"], search["resource_usage"]))
    print(f"Interrupted. To go on: {resume_command(folder)}")
    return 128 + signals[0]


def wrap_up(search: dict, dataset: Dataset | None, folder: Path) -> int:
    """Print and write what came of a search whose trials have ended, and return the exit code.

    If the process is killed here, --resume does it again. Without a dataset, best_model/ must be there.
    """
    results = read_results(folder, search["trials"])
    prune_checkpoints(results, folder)
    write_results(results, folder)
    metrics = read_best_model(results, folder) or save_best_model(results, dataset, folder)
    print(recap(results, search["seconds"], search["resource_usage"]))
    for row in results:
        if row["error"]:
            print(f"{row['name']} failed: {row['error']}", file=sys.stderr)
    if not metrics:
        print("No trial has a model, so there is no best model.", file=sys.stderr)
        return 1
    print(recap_best(results, metrics, folder))
    return 0


def resume_command(folder: Path) -> str:
    """Return the command line that continues the search in folder."""
    return shlex.join(["python", shown(Path(__file__).resolve()), "--resume", shown(folder)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
        0 done; 2 bad input, after one sentence on stderr; 130, 143 or 129 interrupted by Ctrl-C, SIGTERM or SIGHUP;
        1 every trial failed, or the disk is full.
    """
    try:
        settings = parse_args(argv)
        return resume_search(settings["resume"]) if "resume" in settings else new_search(settings)
    except InputError as error:
        sentence = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
        print(f"hparam_search.py: {sentence}.", file=sys.stderr)
        return 2
    except OSError as error:  # the disk is full, or gone
        print(f"hparam_search.py: {error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("Interrupted.", file=sys.stderr)
        return 128 + (interrupt.args or (signal.SIGINT,))[0]


if __name__ == "__main__":
    sys.exit(main())
