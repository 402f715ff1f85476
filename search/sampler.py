"""Drawing configs that cover the range of each hyperparameter evenly."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data import InputError
from search.records import TRIAL_PREFIX, Search, Trial
from search.space import check_value, places_of, summarize, to_plain, value_at

MAX_TRIALS = 100_000


def new_trials(search: Search, space: dict) -> list[Trial]:
    """Return all trials that a search draws from its space, including those that it already has, in starting order.

    A valid increase of --num-samples is logged before any trial, so that it survives a kill.
    """
    space = {key: space[key] for key in [*search.space, *space] if key in space}  # in the search's original order
    earlier = [trial.config for trial in search.own_trials() if trial.source]
    asked, settings = search.samples, search.settings
    if settings.num_samples > max(asked, default=0):
        asked = [*asked, settings.num_samples]
    configs = draw_configs(space, asked, settings.seed, search.space["first_trials"], earlier)
    if asked != search.samples:
        search.record("samples", samples=settings.num_samples)
    return [Trial(f"{TRIAL_PREFIX}{i:05}", config) for i, config in enumerate(configs, search.first_number)]


def draw_configs(
    space: dict, samples: Sequence[int], seed: int, first_trials: Sequence[dict] = (), earlier: Sequence[dict] = ()
) -> list[dict]:
    """Return the configs of all trials: the first trials, then the draws, cycling through the grid points.

    They depend only on the arguments, unless a user's function is random. Each increase in `samples` adds draws in the
    gaps between all earlier ones, which stay the same.

    Args:
        space: a valid space (see check_space).
        samples: draws per grid point at the start, then after each increase.
        seed: random seed.
        first_trials: the valid first trials (see check_first_trials); what they omit is drawn at random.
        earlier: configs of trials that were taken from earlier searches.

    Raises InputError for too many trials, or if a user's function fails or returns an invalid value.
    """
    space, summary = to_plain(space), summarize(space)
    searched = {key: entry for key, entry in summary.items() if isinstance(entry, dict)}
    functions = {key: space[key] for key, entry in searched.items() if not entry}
    grids = {key: entry for key, entry in searched.items() if entry and entry["tune"] == "grid_search"}
    others = {key: entry for key, entry in searched.items() if entry and key not in grids}
    points = list(dict.fromkeys(itertools.product(*(entry["values"] for entry in grids.values()))))
    if samples[-1] * len(points) > MAX_TRIALS:
        raise InputError(f"--num-samples {samples[-1]} makes more than {MAX_TRIALS:,} trials; use fewer")

    def complete(values: dict) -> dict:
        """Return the config with these values; the user's functions are called for what is missing."""
        config = {key: value for key, value in (summary | values).items() if value != {}}
        for key in (key for key in functions if key not in values):
            try:
                config[key] = to_plain(functions[key].sample(dict(config)))
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                raise InputError(f"the function in param_space[{key!r}] failed ({problem}); correct it") from error
            check_value(key, config[key])
        return {key: config[key] for key in summary}

    random, configs = np.random.default_rng(seed), []
    for values in to_plain(first_trials):
        drawn = {key: value_at(random.random(), entry) for key, entry in (grids | others).items()}
        configs.append(complete(drawn | values))
    known, numbers = [*earlier, *configs], {point: i for i, point in enumerate(points)}
    owners = [numbers.get(tuple(config[key] for key in grids), -1) for config in known]
    taken = {key: [place_of(config[key], entry, random) for config in known] for key, entry in others.items()}
    halves = [samples[0] // 2**k for k in range(16, 0, -1) if samples[0] % 2**k == 0]  # 12 is drawn as 3, 6, 12
    for count in np.diff([0, *halves, *samples]):
        new = {key: spread(places, owners, len(points), count, random) for key, places in taken.items()}
        for i, point in itertools.product(range(count), points):
            drawn = {key: value_at(places[numbers[point]][i], others[key]) for key, places in new.items()}
            configs.append(complete(dict(zip(grids, point, strict=True)) | drawn))
        owners += np.repeat(range(len(points)), count).tolist()
        taken = {key: [*taken[key], *itertools.chain(*places)] for key, places in new.items()}
    return configs


def place_of(value: Any, entry: dict, random: np.random.Generator) -> float:
    """Return a random place, below 1, at which value_at gives this value; NaN if the value lies outside the entry."""
    places = places_of(value, entry)
    return min(random.uniform(*places), math.nextafter(1, 0)) if places else math.nan


def spread(
    taken: Sequence[float], owners: Sequence[int], points: int, count: int, random: np.random.Generator
) -> list[list[float]]:
    """Return new places for a hyperparameter, from 0 up to but not including 1, in the gaps between those taken.

    If none is taken, they are a sliced Latin hypercube (Qian 2012, "Sliced Latin Hypercube Designs"): each of
    points · count equal parts of the range has one place, and each of count equal parts has one of every grid point.
    If the taken places form such a hypercube and as many are added, all of them together form one, too.

    Args:
        taken: the places taken, (T,); NaN outside the range.
        owners: the number of each taken place's grid point, (T,); -1 for none.
        points: how many grid points there are.
        count: how many new places each of them gets.
        random: the source of all randomness.

    Returns:
        The new places of each grid point, (points, count), in random order.
    """
    inside = ~np.isnan(np.array(taken, dtype=float))
    places, grid_points = np.array(taken, dtype=float)[inside], np.array(owners, dtype=int)[inside]
    total = len(places) + points * count
    empty = np.setdiff1d(np.arange(total), (places * total).astype(int))
    chosen = np.sort(random.choice(empty, points * count, replace=False))
    # Divide each grid point's range into as many parts as it will have places; those already taken occupy some parts.
    own, places = grid_points[grid_points >= 0], places[grid_points >= 0]
    parts = np.bincount(own, minlength=points) + count
    held = np.zeros((points, parts.max()), dtype=bool)
    held[own, (places * parts[own]).astype(int)] = True
    new: list[list[float]] = [[] for _ in range(points)]
    wanted = np.full(points, count)
    for place in (chosen + random.random(len(chosen))) / total:
        part = (place * parts).astype(int)
        # Choose a random grid point that still needs places, if possible one with none in this part.
        number = np.argmax(2 * (wanted > 0) - held[np.arange(points), part] + random.random(points))
        held[number, part[number]] = True
        new[number].append(place)
        wanted[number] -= 1
    return random.permuted(np.array(new), axis=1).tolist()
