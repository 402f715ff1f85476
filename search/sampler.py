"""How trials are drawn from a space: at random, or by TPE from the results of earlier trials."""

import contextlib
import importlib.util
import math
from collections.abc import Collection, Sequence

import numpy as np
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import generate_variants

from data import InputError
from search.records import Objective, Trial, config_key
from search.space import check_value, count_configs, summarize, to_plain

MAX_TRIALS = 100_000
MOST_ATTEMPTS = 500  # maximum attempts to draw a config that is not taken


def draw_configs(
    space: dict,
    num_samples: int,
    seed: int,
    first_trials: Sequence[dict] = (),
    tpe: bool = False,
    stream: int = 0,
) -> list[dict]:
    """Return the configs of all trials: the first trials, then num_samples random draws per grid point.

    The first trials give plain values to searched hyperparameters; omitted ones are drawn, and change no other draw.
    With TPE, the configs of the others hold only the fixed values: suggest_config draws the rest. Each stream
    (0 to 2**32 - 1) gives different draws. Raises InputError if a config is invalid, or if TPE cannot draw from the
    space.
    """
    if not (isinstance(first_trials, Sequence) and all(isinstance(values, dict) for values in first_trials)):
        raise InputError(f"first_trials is {first_trials!r}; make it a list of dicts")
    for i, values in enumerate(first_trials):
        for key in values:
            if not isinstance(space.get(key), dict | Domain):
                raise InputError(f"first_trials[{i}] has {key!r}, which is not searched; remove it")
    if tpe:
        distributions(space)  # refuses what Optuna cannot draw
    space = to_plain(space)
    points = math.prod(len(entry["grid_search"]) for entry in space.values() if isinstance(entry, dict))
    if num_samples * points > MAX_TRIALS:
        raise InputError(f"--num-samples {num_samples} makes more than {MAX_TRIALS:,} trials; use fewer")
    fixed = {key: entry for key, entry in summarize(space).items() if not isinstance(entry, dict)}
    random, random_first = (np.random.default_rng([seed, part, stream]) for part in (0, 1))
    try:
        configs = [draw_at_random(without_grids(space) | values, 1, random_first)[0] for values in first_trials]
        configs += [fixed] * num_samples * points if tpe else draw_at_random(space, num_samples, random)
    except Exception as error:  # raised by a user's function
        raise InputError(f"param_space cannot be drawn from ({type(error).__name__}: {error}); correct it") from error
    if tpe and (count := count_configs(space)) < len(configs):
        raise InputError(f"param_space has only {count:g} configs for TPE; use --sampler random, or fewer samples")
    configs = [to_plain(config) for config in configs]
    for config in configs:
        for key, value in config.items():
            check_value(key, value)
    return configs


def draw_at_random(space: dict, num_samples: int, random: np.random.Generator) -> list[dict]:
    """Return num_samples configs for every point of the grid, with all other values drawn at random."""
    variants = (generate_variants({"config": space}, random_state=random) for _ in range(num_samples))
    return [variant["config"] for sample in variants for _, variant in sample]


def without_grids(space: dict) -> dict:
    """Return a space with a random choice in place of each grid."""
    return {
        key: tune.choice(entry["grid_search"]) if isinstance(entry, dict) else entry for key, entry in space.items()
    }


def distributions(space: dict) -> dict:
    """Return the searched entries of a space as Optuna's distributions.

    Raises InputError if Optuna is missing or, naming the entry, if it cannot draw from one.
    """
    if importlib.util.find_spec("optuna") is None:
        raise InputError("--sampler tpe needs the optuna package; run pip install optuna")
    found = {}
    for key, entry in without_grids(space).items():
        try:
            found |= OptunaSearch.convert_search_space({key: entry})
        except ValueError as error:
            raise InputError(
                f"Optuna cannot draw param_space[{key!r}]; use another range or a choice, or remove --sampler tpe"
            ) from error
    return found


def outcomes(trials: Sequence[Trial], objective: Objective, rung: int | None) -> list[tuple[dict, float]]:
    """Return config and score of each trial that has ended or, if there is a first rung, has reached it.

    The score is that of the best epoch, up to the first rung if there is one: all trials reach that. Diverged trials
    get the lowest score of the others.
    """
    found = [trial for trial in trials if trial.end or (rung and len(trial.reports) >= rung)]
    best = {trial: objective.best(trial.reports[:rung]) for trial in found if not trial.diverged}
    scores = {trial: objective.score(report) for trial, report in best.items() if report}
    lowest = min(scores.values(), default=0.0)
    return [(trial.config, scores.get(trial, lowest)) for trial in found]


def suggest_config(
    space: dict, seed: int, number: int, told: Sequence[tuple[dict, float]], startup: int, taken: Collection[str] = ()
) -> dict:
    """Return the config that TPE suggests (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization").

    It depends only on the arguments: the space, the search's seed, the trial's number, the outcomes that TPE is told,
    and what is taken (see config_key), so that a resumed search draws what it would have drawn. The outcomes are
    configs with scores (higher is better). With fewer than `startup` of them, or if TPE's config is taken, it is drawn
    at random.
    """
    import optuna  # optional

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searched = distributions(space)
    for attempt in range(MOST_ATTEMPTS):
        own_seed = int(np.random.SeedSequence([seed, number, attempt]).generate_state(1)[0])
        # The defaults of these two changed in Optuna 5.0; multivariate finds more (see benchmarks/RESULTS.md).
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=startup, seed=own_seed, multivariate=True, constant_liar=False
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for config, score in [] if attempt else told:
            with contextlib.suppress(ValueError):  # one of first_trials may lie outside the space
                values = {key: config[key] for key in searched}
                study.add_trial(optuna.trial.create_trial(params=values, distributions=searched, value=score))
        suggested = space | study.ask(searched).params
        if config_key(suggested) not in taken:
            break
    return suggested
