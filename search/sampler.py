"""How configs are drawn: by a design that leaves no gap in the range of any hyperparameter."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data import InputError
from search.records import TRIAL_PREFIX, Search, Trial
from search.space import check_value, places_of, summarize, to_plain, value_at

MAX_TRIALS = 100_000
LAST_PLACE = math.nextafter(1, 0)


def new_trials(search: Search, space: dict) -> list[Trial]:
    """Return all trials that a search draws from its space, in starting order, those that it has already included.

    If more are asked for than before, this is recorded first, so that a killed search still knows it.
    """
    if search.settings.num_samples > max(search.samples, default=0):
        search.record("samples", samples=search.settings.num_samples)
    space = {key: space[key] for key in [*search.space, *space] if key in space}  # in the order at the beginning
    earlier = [trial.config for trial in search.own_trials() if trial.source]
    configs = draw_configs(space, search.samples, search.settings.seed, search.space["first_trials"], earlier)
    return [Trial(f"{TRIAL_PREFIX}{i:05}", config) for i, config in enumerate(configs, search.first_number)]


def draw_configs(
    space: dict, samples: Sequence[int], seed: int, first_trials: Sequence[dict] = (), earlier: Sequence[dict] = ()
) -> list[dict]:
    """Return the configs of all trials: the first trials, then the draws, for all grid points in turn.

    They depend only on the arguments, except for the values of users' functions. The draws for each number in `samples`
    fall into the gaps between all before them, and do not change if a further number is added.

    Args:
        space: a valid space (see check_space).
        samples: how many draws each grid point has, then each greater number to which that was raised.
        seed: random seed.
        first_trials: the valid first trials (see check_first_trials); what they omit is drawn at random.
        earlier: configs of earlier searches.

    Raises InputError if there are too many, or if a user's function fails or returns an invalid value.
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
                raise InputError(f"param_space[{key!r}] cannot be drawn ({problem}); correct it") from error
            check_value(key, config[key])
        return {key: config[key] for key in summary}

    random = np.random.default_rng([seed, 1])
    configs = []
    for values in to_plain(first_trials):
        drawn = {key: value_at(random.random(), entry) for key, entry in (grids | others).items()}
        configs.append(complete(drawn | values))
    known, numbers = [*earlier, *configs], {point: i for i, point in enumerate(points)}
    owners = [numbers.get(tuple(config[key] for key in grids), -1) for config in known]
    taken = {key: [place_of(config[key], entry, random) for config in known] for key, entry in others.items()}
    n = samples[0]
    halves = [n >> k for k in reversed(range((n & -n).bit_length()))]  # 12 as 3, 6, 12: as if it had been raised
    for count in np.diff([0, *halves, *samples[1:]]):
        random = np.random.default_rng([seed, 0, len(owners)])
        new = {key: spread(places, owners, len(points), count, random) for key, places in taken.items()}
        for i, point in itertools.product(range(count), points):
            drawn = {key: value_at(places[numbers[point]][i], others[key]) for key, places in new.items()}
            configs.append(complete(dict(zip(grids, point, strict=True)) | drawn))
        owners += np.repeat(range(len(points)), count).tolist()
        taken = {key: [*taken[key], *itertools.chain(*places)] for key, places in new.items()}
    return configs


def place_of(value: Any, entry: dict, random: np.random.Generator) -> float:
    """Return a random one of the places of a value (see places_of), below 1; NaN if there is none."""
    places = places_of(value, entry)
    return min(random.uniform(*places), LAST_PLACE) if places else math.nan


def spread(
    taken: Sequence[float], owners: Sequence[int], points: int, count: int, random: np.random.Generator
) -> list[list[float]]:
    """Return new places for a hyperparameter, from 0 up to but not including 1, in the gaps between those taken.

    If none is taken, it is a sliced Latin hypercube (Qian 2012, "Sliced Latin Hypercube Designs"): one place in each of
    points · count equal parts of the range, and of each grid point's places one in each of count equal parts. The same
    holds for taken and new places together if as many are new as were taken, and these were drawn like that.

    Args:
        taken: the places taken, (T,); NaN outside the range.
        owners: the number of each one's grid point, (T,); -1 for none.
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
    # Each grid point's range has as many parts as the grid point has places, and holds some of them already.
    own, places = grid_points[grid_points >= 0], places[grid_points >= 0]
    parts = np.bincount(own, minlength=points) + count
    held = np.zeros((points, parts.max()), dtype=bool)
    held[own, (places * parts[own]).astype(int)] = True
    new: list[list[float]] = [[] for _ in range(points)]
    wanted = np.full(points, count)
    for place in (chosen + random.random(len(chosen))) / total:
        part = (place * parts).astype(int)
        # A random one of the grid points that want places, if possible one that has none in this part.
        number = np.argmax(2 * (wanted > 0) - held[np.arange(points), part] + random.random(points))
        held[number, part[number]] = True
        new[number].append(place)
        wanted[number] -= 1
    return random.permuted(np.array(new), axis=1).tolist()
