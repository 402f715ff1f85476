"""Search the hyperparameters of a small ResNet on CIFAR-100 with Ray Tune, for the highest validation accuracy.

    python hparam_search.py                            # 12 trials on CIFAR-100, downloaded into data/
    python hparam_search.py --quick                    # a one-minute demo on two cores, on synthetic images
    python hparam_search.py --resume outputs/NAME      # continue a search
    python hparam_search.py --warm-start outputs/NAME  # start a new one with its trials, after editing param_space
    tensorboard --logdir outputs                       # watch it

Edit `param_space` to search something else: Ray Tune's functions, such as `tune.grid_search`, `tune.choice`,
`tune.uniform` and `tune.loguniform`, search a hyperparameter; a plain value fixes it.
"""

import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run what follows as a module, which is imported while Ray starts
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 omits this folder
    from search.launch import launch

    sys.exit(launch(__file__, __doc__))

from search.settings import PROGRAM, Settings, parse_args  # before Ray: sets what Ray reads when imported

# isort: split
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from data import Dataset, read_images
from search import console, cost, ray_runtime, records, report, sampler, schedulers, space, trackers, tuner, warm_start
from search.display import Display
from search.finish import finish, write_interim
from search.referee import Referee, TimeBudget, TrialQueue, Watcher
from search.trial import train_cifar

param_space = {
    "epochs": 20,
    "h_1": tune.grid_search([64, 128]),
    "h_2": tune.grid_search([512, 1024]),
    "p_drop": tune.loguniform(0.1, 0.5),
    "lr": tune.loguniform(1e-5, 1e-1),
    "batch_size": 64,
    # The training recipe; these can be searched, too.
    "momentum": 0.9,
    "bias_lr": 0.5,  # learning rate of batch norm's biases, unless lr is higher
    "weight_decay": 5e-4,
    "nesterov": True,
    "crop_padding": 2,  # pixels, for random crops
    "flip": True,
    "schedule": "cooldown",  # or constant, cosine, one_cycle
    "ema_decay": 0.998,
    "label_smoothing": 0.0,
}

# Extra trials to run first, such as {"lr": 0.01, "h_1": 64}; omitted values are drawn.
first_trials: list[dict] = []

# Ray's callbacks for experiment trackers, such as MLflowLoggerCallback (see docs/guide.md).
callbacks: list[tune.Callback] = []

# What "best" means, for the epochs of a trial and for trials: the highest validation accuracy.
METRIC, MODE = "accuracy", "max"

# What --quick overrides, to take one minute on two cores.
QUICK_SPACE = {"epochs": 4, "lr": tune.loguniform(1e-2, 1e-1), "batch_size": 32}
QUICK_SPACE |= {"h_1": 16, "h_2": tune.grid_search([32, 64])}
QUICK_IMAGES = {"num_train": 2000, "num_test": 1000, "num_classes": 10}

# The scheduler compares the losses of trials at rungs, here after 2, 4, 8 and 16 epochs. With --scheduler promote, the
# best 6, 3, 2 and 2 of 12 trials continue. With 12 trials of the baseline's noisier recipe, use KEEP = 3.
GRACE_PERIOD = 2  # epoch of the first rung
REDUCTION_FACTOR = 2.0  # promote 1 in this many trials; also the ratio between successive rungs
KEEP = 2  # promote at least this many at each rung

# None switches PATIENCE, MAX_SECONDS_PER_TRIAL and SAVE_PERIOD off; MODELS_KEPT = None keeps all weights.
PATIENCE = 4  # stop a trial after this many epochs without progress
MIN_DELTA = 0.001  # minimum decrease of the loss (nats) that counts as progress
MAX_SECONDS_PER_TRIAL = 3600
MAX_FAILURES_PER_TRIAL = 2
SAVE_PERIOD = 30  # save the training state after this many seconds of training
MODELS_KEPT = 5  # keep the weights of this many of the best trials
REPEATED_TRIALS = 3  # --repeats trains this many of the best configs again
PROGRESS_PERIOD = 30  # seconds between progress blocks in a log file


def new_scheduler(search: records.Search, max_epochs: int) -> schedulers.Scheduler:
    """Build the scheduler that stops poor trials early. Any of Ray's that never pauses trials works as RayScheduler."""
    settings, trials = search.settings, search.own_trials()
    if settings.scheduler == "none":
        return schedulers.Scheduler()  # trials still end by early stopping: see PATIENCE
    if settings.scheduler == "promote":
        knobs = settings.grace_period, settings.reduction_factor, settings.keep
        return schedulers.Promotion(trials, schedulers.new_rungs(len(trials), *knobs, max_epochs), max_epochs)
    asha = ASHAScheduler("epoch", "loss", "min", max_epochs, settings.grace_period, settings.reduction_factor)
    return schedulers.RayScheduler(asha, search.history)


def search_space(settings: Settings) -> tuple[dict, dict]:
    """Return param_space as changed by --seed, --quick and --max-epochs, and its summary with the first trials.

    Raises InputError if a value is invalid.
    """
    entries = {"seed": settings.seed} | space.to_plain(param_space) | (QUICK_SPACE if settings.quick else {})
    entries |= {"epochs": settings.max_epochs} if settings.max_epochs else {}
    space.check_space(entries)
    first = [] if settings.quick else space.to_plain(first_trials or [])
    space.check_first_trials(first, entries)
    return entries, space.summarize(entries) | {"first_trials": first}


def image_source(settings: Settings) -> dict:
    """Return the arguments of read_images."""
    synthetic = QUICK_IMAGES if settings.quick else {}
    return {"source": settings.dataset, "data_dir": settings.data_dir, "synthetic": synthetic}


def load_images(search: records.Search) -> Dataset:
    """Read the images of a search, and refuse them if they have changed."""
    dataset = read_images(**image_source(search.settings))
    records.check_same_images(search, dataset)
    return dataset


def new_search(settings: Settings, tracking: trackers.Trackers) -> int:
    """Run a new search, and return the exit code."""
    objective, (entries, summary) = records.Objective(METRIC, MODE), search_space(settings)
    if settings.quick and first_trials:
        print("--quick ignores first_trials, which are for param_space.", file=sys.stderr)
    settings = schedulers.with_knobs(settings, entries["epochs"], GRACE_PERIOD, REDUCTION_FACTOR, KEEP)
    configs = sampler.draw_configs(entries, [settings.num_samples], settings.seed, summary["first_trials"])
    records.new_folder(settings)  # like the line above, rejects bad input before the images are read
    with contextlib.ExitStack() as locks, ray_runtime.running_ray(settings):
        earlier = [locks.enter_context(warm_start.earlier_search(Path(path))) for path in settings.warm_start or ()]
        ray_runtime.wait_for_ray()
        dataset = read_images(**image_source(settings))
        tuner.share_resources(settings, configs)  # refuses flags that exceed this machine
        with records.creating_search(settings, summary, dataset, objective) as search:
            warm_start.take(search, earlier)
            search.draw(sampler.new_trials(search, entries))
        locks.close()
        with records.lock_search(search.folder):
            return run(search, entries, dataset, tracking)


def resume_search(folder: Path, changes: dict, tracking: trackers.Trackers) -> int:
    """Continue the search in a folder, with changed settings, and return the exit code."""
    with records.lock_search(folder):
        search = records.open_search(folder, changes)
        if search.is_complete(REPEATED_TRIALS) or search.time_left() <= 0:
            return finish(search, partial(load_images, search), image_source(search.settings), MODELS_KEPT)
        entries, summary = search_space(search.settings)
        records.check_unchanged(search, summary, records.Objective(METRIC, MODE))
        with ray_runtime.running_ray(search.settings):
            ray_runtime.wait_for_ray()
            dataset = load_images(search)
            tuner.share_resources(search.settings, [])  # before they are written
            search.draw(sampler.new_trials(search, entries))
            search.write()
            return run(search, entries, dataset, tracking)


def run(search: records.Search, entries: dict, dataset: Dataset, tracking: trackers.Trackers) -> int:
    """Run all trials that have not ended, then the repeats, if any, and return the exit code."""
    try:
        fit(search, search.unfinished(), entries, dataset, tracking)
        if not search.interrupted():
            fit(search, search.draw(search.repeats(REPEATED_TRIALS)), entries, dataset, tracking)
    except BaseException:
        write_interim(search)
        raise
    ray_runtime.stop_ray()  # while the best model is tested
    return finish(search, lambda: dataset, image_source(search.settings), MODELS_KEPT)


def fit(
    search: records.Search, trials: list[records.Trial], entries: dict, dataset: Dataset, tracking: trackers.Trackers
) -> None:
    """Run these trials of a search; entries are those of the search space."""
    if not trials:
        return
    configs = [trial.config for trial in trials]
    resources, at_once, all_resources = tuner.share_resources(search.settings, configs)
    ray_runtime.wait_for_workers(at_once)
    if not (resources["gpu"] or search.trained):
        cost.warn_of_slow_epochs(configs, dataset, int(resources["cpu"]), MAX_SECONDS_PER_TRIAL)
    early_stop = partial(schedulers.early_stop, entries["epochs"], PATIENCE, MIN_DELTA, MAX_SECONDS_PER_TRIAL)
    scheduler = new_scheduler(search, entries["epochs"])
    queue = TrialQueue(search, trials, scheduler, max(1, at_once))
    display = Display(search, scheduler.rungs, PROGRESS_PERIOD, tracking)
    referee = Referee(search, scheduler, early_stop, display, MODELS_KEPT)
    watcher = Watcher(referee)
    with tuner.temporary_folder(search.folder, dataset) as (folder, images):
        trial = partial(train_cifar, images=images, search_folder=search.folder, objective=search.objective)
        run_trials = partial(
            tune.run,
            partial(trial, save_period=SAVE_PERIOD, rungs=scheduler.rungs),
            name=folder.name,
            storage_path=str(folder.parent),
            resources_per_trial=resources,
            num_samples=-1,  # until the queue is empty
            search_alg=queue,
            scheduler=referee,
            stop=TimeBudget(search),
            max_failures=MAX_FAILURES_PER_TRIAL,
            raise_on_failed_trial=False,
            reuse_actors=True,  # the next trial runs in a process that has imported torch
            # The name travels in the config, in which trackers should not see it.
            trial_name_creator=lambda trial: trial.config.pop("trial"),
            trial_dirname_creator=str,
            callbacks=[watcher],
            verbose=0,  # the search shows the progress
        )
        with search.session(trials, all_resources):
            console.run_in_thread(run_trials, watcher.stop)


def run_command(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit code."""
    settings, given = parse_args(argv, __doc__)
    if settings.list:
        print(report.list_searches(Path(settings.output_dir)))
        return 0
    space.check_constants(globals())
    folder = Path(settings.resume or Path(settings.output_dir, settings.name or ""))
    with contextlib.closing(trackers.Trackers(callbacks)) as tracking:
        if settings.resume or (settings.or_resume and (folder / records.SEARCH_FILE).exists()):
            changes = {key: value for key, value in given.items() if key not in ("resume", "or_resume")}
            return resume_search(folder, changes, tracking)
        return new_search(settings, tracking)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what run_command does, but turn errors and signals into sentences and exit codes (see run_program)."""
    return console.run_program(PROGRAM, partial(run_command, argv))
