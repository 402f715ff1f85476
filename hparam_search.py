"""Search the hyperparameters of a small ResNet on CIFAR-100 with Ray Tune, for the highest validation accuracy.

    python hparam_search.py                  # 12 trials on CIFAR-100, downloaded into data/
    python hparam_search.py --quick          # about a minute on two cores, on made-up images
    tensorboard --logdir outputs             # watch it

Edit `param_space` to search something else: Ray Tune's `tune.grid_search`, `tune.choice`, `tune.uniform` and
`tune.loguniform` search a hyperparameter, a plain value fixes it.
"""

from search.command_line import parse_args  # first, for `search` sets what Ray reads when it is imported

# isort: split
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from data import Dataset, InputError, fingerprint, load_cifar100, load_folder, make_synthetic
from search.early_stopping import EarlyStopping
from search.ray_session import running_ray, share_resources
from search.records import (
    FINISHED,
    SEARCH_FILE,
    check_free,
    holding,
    prune_checkpoints,
    read_log,
    read_results,
    read_search,
    resolved,
    resume_command,
    shown,
    write_whole,
)
from search.report import ProgressTable, read_best_model, recap, recap_best, save_best_model, write_results
from search.scheduling import Drawn, ResumedASHA
from search.signals import stopping_on_signals
from search.space import check_param_space, described, draw_trials
from search.trial_log import TrialLog
from train import train_cifar

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
TABLE_PERIOD = 30  # seconds


def search_space(settings: dict) -> dict:
    """Return the space that the settings ask for: param_space, what --quick changes, and the seed."""
    space = {"seed": settings["seed"]} | param_space | (QUICK_SPACE if settings["quick"] else {})
    return space | ({"epochs": settings["max_epochs"]} if settings["max_epochs"] else {})


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
