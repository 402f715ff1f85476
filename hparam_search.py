"""Search the hyperparameters of a small ResNet on CIFAR-100 with Ray Tune, for the highest validation accuracy.

    python hparam_search.py                          # 12 trials on CIFAR-100, downloaded into data/
    python hparam_search.py --quick                  # about a minute on two cores, on made-up images
    python hparam_search.py --resume outputs/NAME    # go on with a search
    tensorboard --logdir outputs                     # watch it

Edit `param_space` to search something else: Ray Tune's `tune.grid_search`, `tune.choice`, `tune.uniform` and
`tune.loguniform` search a hyperparameter, a plain value fixes it.
"""

import sys

# Before Ray, which the package gives its environment.
from search.command_line import SCHEDULERS, Settings, parse_args, print_error

if __name__ == "__main__":
    parse_args(description=__doc__)  # --help and refusals, before the seconds that torch and Ray take to import

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from data import Dataset, InputError, fingerprint, read_images, save_dataset
from search.early_stopping import EarlyStopping
from search.importance import conclusions, rungs
from search.output import printing_safely
from search.progress import Progress
from search.ray_session import check_all_nodes_see, folder_for_ray, running_ray, share_resources
from search.records import (
    LOG_FILE,
    Search,
    are_left,
    best_first,
    check_free,
    check_same_images,
    check_same_space,
    enlarged,
    holding,
    is_finished,
    make_folder,
    name_of_now,
    prune,
    read_results,
    read_search,
    resolved,
    resume_command,
    shown,
    write_search,
)
from search.repeats import compared, repeats_of
from search.report import (
    best_so_far,
    duration,
    list_searches,
    read_best_model,
    recap,
    recap_best,
    save_best_model,
    write_results,
)
from search.resuming import ResumedScheduler, TrialsLeft
from search.sampling import check_optuna
from search.signals import interrupted_by_signals, run_in_thread
from search.space import check_param_space, described, draw_trials, plain, searched
from search.trial import train_cifar
from search.trial_log import TrialLog

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
    "label_smoothing": 0.0,
}

# Values to begin with, such as {"lr": 0.01, "h_1": 64}; what is left out is drawn. They come on top of the draws.
first_trials: list[dict] = []

# The recipe of the script that this one began as: `param_space | BASELINE_RECIPE` trains as that did.
BASELINE_RECIPE = {
    "momentum": 0.9,
    "weight_decay": 0.0,
    "nesterov": False,
    "augment": False,
    "schedule": "constant",
    "ema_decay": 0.0,
    "label_smoothing": 0.0,
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

STARTUP_TRIALS = 4  # of --search optuna, drawn at random
GRACE_PERIOD = 2  # epochs before a trial is compared with others
REDUCTION_FACTOR = 3.0  # of those compared, one in so many goes on
BRACKETS = 1  # of ASHA
PATIENCE = 4  # epochs without progress after which a trial ends
MIN_DELTA = 0.001  # nats by which the loss must fall, to be progress
MAX_SECONDS_PER_TRIAL = 3600
MAX_FAILURES_PER_TRIAL = 2
CHECKPOINT_PERIOD = 30  # seconds of training that a kill may cost
MODELS_KEPT = 5  # of the best trials
PROGRESS_PERIOD = 30  # seconds, between two blocks in a log file


def new_scheduler(settings: Settings, max_epochs: int) -> TrialScheduler:
    """Return what stops the trials that fall behind. Any of Ray's schedulers that pauses none can stand here."""
    judged_by = {"metric": "loss", "mode": "min", "time_attr": "epoch", "grace_period": settings.grace_period}
    if settings.scheduler == "none":
        return FIFOScheduler()
    if settings.scheduler == "median":
        return MedianStoppingRule(**judged_by, min_time_slice=math.inf)  # or it would pause trials
    factor, brackets = settings.reduction_factor, settings.brackets
    return ASHAScheduler(**judged_by, max_t=max_epochs, reduction_factor=factor, brackets=brackets)


def new_stopper(max_epochs: int, time_left: float | None) -> tune.Stopper:
    """Return what ends a trial by its own figures, and the search after time_left seconds."""
    return EarlyStopping(PATIENCE, MIN_DELTA, MAX_SECONDS_PER_TRIAL, max_epochs, time_left)


def new_tuner(
    search: Search, dataset: Dataset, models_kept: int, ray_folder: Path, interrupted: threading.Event
) -> tune.Tuner:
    """Return a Tuner for a search's unfinished trials; their temporary files go into ray_folder."""
    resources, at_once, search.resource_usage = share_resources(search.settings, len(search.trials))
    images = ray_folder / "images.pt"
    save_dataset(dataset, images)
    # Not through Ray's object store: if that dies, this process ends before it can print how to resume.
    trainable = partial(train_cifar, images=images, search_folder=search.folder, checkpoint_period=CHECKPOINT_PERIOD)
    trials_left = TrialsLeft(search, search_space(search.settings), STARTUP_TRIALS)
    progress = Progress(PROGRESS_PERIOD, search.seconds)
    max_epochs = trials_left.trials[0][1]["epochs"]  # as many for all
    stopper = new_stopper(max_epochs, search.time_left)
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            num_samples=len(trials_left.trials),
            # Tune asks for 16 trials ahead, so that none is waited for; but TPE is to know what came of the others.
            max_concurrent_trials=max(1, at_once) if search.settings.search == "optuna" else None,
            search_alg=trials_left,
            scheduler=ResumedScheduler(new_scheduler(search.settings, max_epochs), search),
            reuse_actors=True,  # a process that has imported torch takes on the next trial
            trial_name_creator=lambda trial: trials_left.names[trial.trial_id],  # a method would be copied whole
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name=ray_folder.name,
            storage_path=str(ray_folder.parent),
            stop=stopper,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES_PER_TRIAL),
            callbacks=[TrialLog(search, models_kept, progress, getattr(stopper, "reasons", {}), interrupted)],
            verbose=0,  # without Ray's own table: Progress shows how far it is
        ),
    )


def search_space(settings: Settings) -> dict:
    """Return the space that the settings ask for: param_space, what --quick changes, and the seed."""
    space = {"seed": settings.seed} | plain(param_space) | (QUICK_SPACE if settings.quick else {})
    return space | ({"epochs": settings.max_epochs} if settings.max_epochs else {})


def draw(settings: Settings, space: dict) -> tuple[dict[str, dict], dict[str, str]]:
    """Return the trials, name → config (with --search optuna, what is fixed of it), and what they are drawn from."""
    first = [] if settings.quick else plain(first_trials)
    by_optuna = settings.search == "optuna"
    if by_optuna:
        check_optuna(space)
    in_words = described(space) | {"first_trials": str(first)}
    return draw_trials(space, settings.num_samples, settings.seed, first, later=by_optuna), in_words


def with_scheduler(settings: Settings, max_epochs: int) -> Settings:
    """Return the settings with the scheduler's figures, where it takes any and they were not given."""
    grace_period = settings.grace_period or min(GRACE_PERIOD, max_epochs)
    if grace_period > max_epochs:
        raise InputError(f"--grace-period is {grace_period}, but trials end after {max_epochs} epochs: give fewer")
    figures = {
        "grace_period": grace_period,
        "reduction_factor": settings.reduction_factor or REDUCTION_FACTOR,
        "brackets": settings.brackets or BRACKETS,
    }
    return replace(settings, **{key: figures[key] for key in SCHEDULERS[settings.scheduler]})


def image_source(settings: Settings) -> dict:
    """Return the images that the settings name, as the arguments of read_images."""
    synthetic = QUICK_IMAGES if settings.quick else {}
    return {"source": settings.dataset, "data_dir": settings.data_dir, "synthetic": synthetic}


def load_dataset(settings: Settings) -> Dataset:
    """Return the images that the settings name."""
    return read_images(**image_source(settings))


def new_search(settings: Settings) -> int:
    """Run a search from its first trial to its end, and return the exit code."""
    space = search_space(settings)
    check_param_space(space)
    settings = with_scheduler(settings, space["epochs"])
    trials, in_words = draw(settings, space)
    output_dir = resolved(settings.output_dir)
    check_free(output_dir / (settings.name or name_of_now()))
    dataset = load_dataset(settings)
    settings = replace(settings, data_dir=str(resolved(settings.data_dir)))  # --resume may be called from elsewhere
    with running_ray():
        folder = make_folder(output_dir, settings.name)
        with holding(folder):
            try:
                check_all_nodes_see(folder)
            except InputError:
                folder.rmdir()
                raise
            search = Search(folder, settings, in_words, searched(space), fingerprint(dataset), trials)
            write_search(search)
            return run_trials(search, dataset)


def resume_search(asked: Settings) -> int:
    """Continue the search in the folder asked.resume, keep what it has finished, and return the exit code."""
    folder = resolved(asked.resume)
    search = read_search(folder)
    with holding(folder):
        results = read_results(search)
        for row in results:
            if row["unreadable"]:
                lines = f"{row['unreadable']} unreadable lines in {row['name']}/{LOG_FILE}"
                print(f"Skipping {lines}; those epochs will be retrained.", file=sys.stderr)
        before, search.settings = search.settings, enlarged(search.settings, asked)
        finished = is_finished(results) and search.settings.num_samples == before.num_samples
        finished = finished and is_finished(read_results(repeats_of(search, results)))
        if finished and read_best_model(results, folder):
            return wrap_up(search, None)
        space = search_space(search.settings)
        drawn, in_words = draw(search.settings, space)
        check_same_space(search, in_words)
        if not finished and search.time_left is not None and search.time_left <= 0:
            raise InputError(
                f"the --time-budget of {shown(folder)}, {duration(search.settings.time_budget)}, is spent: give a "
                "larger one"
            )
        dataset = load_dataset(search.settings)
        check_same_images(search, dataset)
        search.trials = {name: search.trials.get(name) or config for name, config in drawn.items()}
        if finished:
            return wrap_up(search, dataset)
        with running_ray():
            check_all_nodes_see(folder)
            write_search(search)
            return run_trials(search, dataset)


def run_trials(search: Search, dataset: Dataset) -> int:
    """Run the trials of a search that are not finished, then wrap it up, and return the exit code."""
    try:
        fit(search, dataset, MODELS_KEPT)
        results = read_results(search)
        if not are_left(results):
            repeats = repeats_of(search, results)
            write_search(search)  # saves the seconds in case of a kill
            try:
                fit(repeats, dataset, models_kept=0)
            finally:
                search.seconds = repeats.seconds
    except (KeyboardInterrupt, ConnectionError):
        results = read_results(search)
        write_results(results, search.folder)
        print(recap(results, search), best_so_far(results), sep="\n", flush=True)
        raise
    finally:
        write_search(search)
    return wrap_up(search, dataset)


def fit(search: Search, dataset: Dataset, models_kept: int) -> None:
    """Run the trials of a search that are not finished, if any, and count the seconds."""
    if is_finished(read_results(search)):
        return
    start, interrupted = time.monotonic(), threading.Event()
    search.folder.mkdir(exist_ok=True)
    try:
        with folder_for_ray(search.folder) as ray_folder:
            run_in_thread(new_tuner(search, dataset, models_kept, ray_folder, interrupted).fit, interrupted)
    finally:
        search.seconds += time.monotonic() - start


def wrap_up(search: Search, dataset: Dataset | None) -> int:
    """Print and write what came of a search whose trials have ended, and return the exit code.

    If the process is killed here, --resume does it again. Without a dataset, best_model/ must be there.
    """
    results = read_results(search)
    prune(results, search.folder, MODELS_KEPT)
    write_results(results, search.folder)
    metrics = read_best_model(results, search.folder)
    if not metrics:
        metrics = save_best_model(results, dataset, image_source(search.settings), search.folder)
    print(recap(results, search))
    repeats = repeats_of(search, results)
    if search.settings.time_budget and are_left([*results, *read_results(repeats)]):
        more = f"--time-budget {2 * search.settings.time_budget:g}s"
        print(f"The time budget is spent. To resume: {resume_command(search.folder)} {more}")
    if not metrics:
        print("No trial has a model, so there is no best model.", file=sys.stderr)
        return 1
    print(recap_best(results, metrics, search))
    print(*rungs(search, results), *conclusions(search, results), *compared(repeats), sep="\n")
    return 0 if metrics["trial_id"] == best_first(results)[0]["trial_id"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
        0 done; 2 bad input, after one sentence on stderr; 128 + n interrupted by signal n, 130 by Ctrl-C;
        1 every trial failed, the weights of the best one are lost, the disk is full, or Ray died.
    """
    with printing_safely(), interrupted_by_signals() as signals:
        try:
            settings = parse_args(argv, __doc__)
            if settings.list:
                print(list_searches(resolved(settings.output_dir)))
                return 0
            return new_search(settings) if settings.resume is None else resume_search(settings)
        except SystemExit as end:  # parse_args has printed why
            return end.code
        except InputError as error:
            print_error(error)
            return 2
        except OSError as error:  # a full or lost disk, dead Ray
            print_error(error)
            return 1
        except KeyboardInterrupt:
            return 128 + signals[0]


if __name__ == "__main__":
    sys.exit(main())
