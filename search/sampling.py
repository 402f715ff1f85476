"""Optuna's TPE in place of random draws: a trial is drawn as it begins, by what those that have finished gave."""

import contextlib
import importlib.util
from collections.abc import Sequence

import numpy as np
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Domain, LogUniform, Quantized

from data import InputError
from search.space import described_entry


def check_optuna(space: dict) -> None:
    """Refuse to draw from a space with Optuna where that is not installed, or cannot draw from an entry.

    Raises:
        InputError: naming the package or the entry.
    """
    if importlib.util.find_spec("optuna") is None:
        raise InputError("--search optuna needs the package optuna, which is not installed: pip install optuna")
    distributions(space)


def distributions(space: dict) -> dict:
    """Return the entries of a space that are not fixed as Optuna's distributions; of a grid, a choice."""
    found = {}
    for key, entry in space.items():
        domain = tune.choice(entry["grid_search"]) if isinstance(entry, dict) else entry
        if not isinstance(domain, Domain):
            continue
        sampler = domain.get_sampler()
        try:
            if isinstance(sampler, Quantized) and isinstance(sampler.sampler, LogUniform):
                raise ValueError  # OptunaSearch would leave the quantization away
            found |= OptunaSearch.convert_search_space({key: domain})
        except ValueError as error:
            raise InputError(
                f"param_space[{key!r}] is {described_entry(entry)}, which Optuna cannot draw from: make it another "
                "range, a choice or a grid, or remove --search optuna"
            ) from error
    return found


def suggested(space: dict, seed: int, number: int, outcomes: Sequence[tuple[dict, float]], startup: int) -> dict:
    """Return the config that TPE suggests for a trial (Bergstra et al. 2011, "Algorithms for Hyper-Parameter
    Optimization").

    Every suggestion comes from a study of its own, so that it depends on the arguments alone: a search that is resumed
    draws what it would have drawn.

    Args:
        space: checked by check_optuna.
        seed: of the search.
        number: of the trial, from 0.
        outcomes: config and validation accuracy of each trial that has finished, in the order of their numbers.
        startup: of fewer outcomes than that TPE makes nothing, and the draw is a random one.
    """
    import optuna  # here, for it need not be installed

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(n_startup_trials=startup, seed=own_seed)
    searched = distributions(space)
    study = OptunaSearch(searched, metric="accuracy", mode="max", sampler=sampler)
    for config, accuracy in outcomes:
        with contextlib.suppress(ValueError):  # one of first_trials may lie outside of the space
            study.add_evaluated_point({key: config[key] for key in searched}, accuracy)
    return space | study.suggest("next")
