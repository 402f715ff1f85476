"""What may be searched: checking, drawing and describing a space of hyperparameters."""

import copy
import inspect
import math
from collections.abc import Sequence

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Sampler
from ray.tune.search.variant_generator import generate_variants

from data import InputError
from train import CONFIG_KEYS

MAX_TRIALS = 100_000


def plain(entry: object) -> object:
    """Return a value or space entry with NumPy values, tuples and ranges as Python numbers and lists."""
    if hasattr(entry, "tolist"):
        return entry.tolist()
    if isinstance(entry, list | tuple | range):
        return [plain(value) for value in entry]
    if isinstance(entry, dict):
        return {key: plain(value) for key, value in entry.items()}
    if isinstance(entry, Categorical | Float | Integer):
        entry = copy.copy(entry)
        vars(entry).update({key: plain(value) for key, value in vars(entry).items() if key != "sampler"})
    return entry


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
    entry = plain(entry)
    if isinstance(entry, dict) and set(entry) == {"grid_search"}:
        return entry["grid_search"] if isinstance(entry["grid_search"], list) else []
    if isinstance(entry, Categorical):
        return entry.categories
    if isinstance(entry, Integer):
        return [entry.lower, entry.upper - 1]
    if isinstance(entry, Float):
        return [entry.lower, entry.upper]
    return [] if isinstance(entry, Domain) else [entry]


def draw_trials(
    space: dict, num_samples: int, seed: int, first_trials: Sequence[dict] = (), later: bool = False
) -> dict[str, dict]:
    """Return name → config of all trials: the first ones, then num_samples random draws for each point of the grid.

    Args:
        space: checked.
        num_samples: at least 1.
        seed: of the draws; those of the grid are the same whatever the first ones are.
        first_trials: values for hyperparameters that are searched; what one leaves out is drawn.
        later: rather than drawn, the others are as many configs of what is fixed: see sampling.suggested.

    Raises:
        InputError: there are too many, or a config that no trial could train with.
    """
    for i, values in enumerate(first_trials):
        if not isinstance(values, dict):
            raise InputError(f"first_trials[{i}] is {values!r}, but must be a dict of hyperparameters")
        if unsearched := [key for key in values if key not in searched(space)]:
            raise InputError(f"first_trials[{i}] has {unsearched[0]!r}, which is not searched; remove it")
    space = plain(space)
    grids = [entry["grid_search"] for entry in space.values() if isinstance(entry, dict)]
    count = num_samples * math.prod(map(len, grids))
    if count > MAX_TRIALS:
        raise InputError(
            f"--num-samples {num_samples} and the grid make {count:,} trials: at most {MAX_TRIALS:,} can be"
        )
    rng, rng_of_first = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    try:
        drawn = [
            next(iter(generate_variants({"config": space | values}, random_state=rng_of_first)))[1]["config"]
            for values in first_trials
        ]
        if later:
            drawn += [{key: entry for key, entry in space.items() if not isinstance(entry, dict | Domain)}] * count
        else:
            drawn += [
                variant["config"]
                for _ in range(num_samples)
                for _, variant in generate_variants({"config": space}, random_state=rng)
            ]
    except Exception as error:  # of a function of the user's
        raise InputError(f"param_space cannot be drawn from: {type(error).__name__}: {error}") from error
    trials = {}
    for i, config in enumerate(drawn):
        config = plain(config)
        for key, value in config.items():
            check_value(key, value)
        trials[trial_name(i)] = config
    return trials


def described(space: dict) -> dict[str, str]:
    """Return a space with its entries as text that tells each from any other."""
    return {key: described_entry(entry) for key, entry in space.items()}


def described_entry(entry: object) -> str:
    """Return an entry of a space as text that tells it from any other."""
    if isinstance(entry, Domain | Sampler):
        parts = [f"{name}={described_entry(value)}" for name, value in vars(entry).items() if value is not None]
        return f"{type(entry).__name__}({', '.join(parts)})"
    if callable(entry):
        try:
            return inspect.getsource(entry).strip()
        except (OSError, TypeError):  # of one that was typed in, or is built in
            return getattr(entry, "__qualname__", repr(entry))
    return repr(entry)


def searched(space: dict) -> dict[str, dict]:
    """Return the hyperparameters that a space searches → what is tried, as JSON can hold it.

    That is {"values": […]} of a grid or a choice, {"lower": …, "upper": …, "log": …} of a range (both ends can occur),
    and {} of a function.
    """
    found = {}
    for key, entry in space.items():
        values = possible_values(entry)
        if isinstance(entry, Float | Integer):
            sampler = entry.get_sampler()
            sampler = getattr(sampler, "sampler", sampler)  # of a quantized range
            found[key] = {"lower": values[0], "upper": values[1], "log": isinstance(sampler, LogUniform)}
        elif isinstance(entry, dict | Domain) and (len(values) > 1 or not values):
            found[key] = {"values": values} if values else {}
    return found


def trial_name(i: int) -> str:
    """Return the name of the i-th trial, from 0, and of its folder."""
    return f"train_cifar_{i:05}"
