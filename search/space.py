"""What may be searched: checking and summarizing a space of hyperparameters."""

import copy
import math
from typing import Any

from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform

from data import InputError
from search.settings import LOWEST_FACTOR
from train import CONFIG_KEYS, NOT_NEGATIVE, POSITIVE, WHOLE, Values

COUNT = Values(lambda v: type(v) is int and v >= 0, "a whole number of at least 0")
FACTOR = Values(lambda v: POSITIVE.is_valid(v) and v >= LOWEST_FACTOR, f"a number of at least {LOWEST_FACTOR}")
# The valid values of constants in hparam_search.py.
CONSTANTS = {"GRACE_PERIOD": WHOLE, "REDUCTION_FACTOR": FACTOR, "KEEP": COUNT, "PATIENCE": WHOLE}
CONSTANTS |= {"MIN_DELTA": NOT_NEGATIVE, "MAX_SECONDS_PER_TRIAL": POSITIVE, "MAX_FAILURES_PER_TRIAL": COUNT}
CONSTANTS |= {"SAVE_PERIOD": NOT_NEGATIVE, "MODELS_KEPT": WHOLE, "STARTUP_TRIALS": COUNT, "REPEATED_TRIALS": WHOLE}
CONSTANTS |= {"PROGRESS_PERIOD": NOT_NEGATIVE}
ALLOW_NONE = ("KEEP", "PATIENCE", "MAX_SECONDS_PER_TRIAL", "SAVE_PERIOD", "MODELS_KEPT", "PROGRESS_PERIOD")


def to_plain(entry: Any) -> Any:
    """Return a value or an entry of a space with NumPy values, tuples and ranges as Python numbers and lists."""
    if hasattr(entry, "tolist"):
        return entry.tolist()
    if isinstance(entry, list | tuple | range):
        return [to_plain(value) for value in entry]
    if isinstance(entry, dict):
        return {key: to_plain(value) for key, value in entry.items()}
    if isinstance(entry, Categorical | Float | Integer):
        entry = copy.copy(entry)
        vars(entry).update({key: to_plain(value) for key, value in vars(entry).items() if key != "sampler"})
    return entry


def check_space(space: dict) -> None:
    """Raise InputError, naming key and value, for unknown or missing keys and values that no trial could train with."""
    for key in space:
        if key not in CONFIG_KEYS:
            raise InputError(f"param_space has the unknown key {key!r}; use only {', '.join(CONFIG_KEYS)}")
    for key, allowed in CONFIG_KEYS.items():
        if key not in space:
            raise InputError(f"param_space lacks {key!r}; add it with {allowed.words}")
        entry = space[key]
        values = possible_values(entry)
        if not values and not isinstance(entry, Domain):
            raise InputError(f"param_space[{key!r}] is {entry!r}; give grid_search a list of values")
        for value in values:
            check_value(key, value)
        if isinstance(entry, Float | Integer) and not entry.lower < entry.upper:
            raise InputError(
                f"param_space[{key!r}] has lower bound {entry.lower} and upper bound {entry.upper}; correct them"
            )
    if isinstance(space["epochs"], dict | Domain):
        raise InputError(
            "param_space['epochs'] cannot be searched, as the scheduler compares trials at equal epochs; use one value"
        )
    if True in possible_values(space["nesterov"]) and 0 in possible_values(space["momentum"]):
        raise InputError("nesterov cannot be True with momentum 0; raise momentum, or make nesterov False")


def check_value(key: str, value: object) -> None:
    """Refuse a value that no trial could train with."""
    allowed = CONFIG_KEYS[key]
    if not allowed.is_valid(value):
        raise InputError(f"{key} cannot be {value!r}; use {allowed.words}")


def check_constants(values: dict) -> None:
    """Refuse values of the constants in hparam_search.py, given by name, with which a search could not run."""
    for name, allowed in CONSTANTS.items():
        off = name in ALLOW_NONE
        if name not in values:
            raise InputError(f"hparam_search.py lacks {name}; restore it")
        if not (allowed.is_valid(values[name]) or (off and values[name] is None)):
            rest = ", or None to switch it off" if off else ""
            raise InputError(f"{name} cannot be {values[name]!r}; use {allowed.words}{rest}")


def possible_values(entry: object) -> list:
    """Return all values of a grid or choice, both ends of a range, or a fixed value; nothing for a function."""
    entry = to_plain(entry)
    if isinstance(entry, dict) and set(entry) == {"grid_search"}:
        return entry["grid_search"] if isinstance(entry["grid_search"], list) else []
    if isinstance(entry, Categorical):
        return entry.categories
    if isinstance(entry, Integer):
        return [entry.lower, entry.upper - (getattr(entry.get_sampler(), "q", 1) == 1)]  # Ray includes it if quantized
    if isinstance(entry, Float):
        return [entry.lower, entry.upper]
    return [] if isinstance(entry, Domain) else [entry]


def summarize(space: dict) -> dict[str, object]:
    """Return a space as JSON can hold it: a fixed value as it is, a searched hyperparameter as a dict.

    The dict is {"tune": …, "values": […]} for a grid or choice, {"tune": …, "lower": …, "upper": …} for a range (both
    ends can occur), with "step" if it is quantized, where "tune" names Ray Tune's function; {} for a user's function.
    """
    summary: dict[str, object] = {}
    for key, entry in space.items():
        values = possible_values(entry)
        if isinstance(entry, Float | Integer):
            outer = entry.get_sampler()
            inner = getattr(outer, "sampler", outer)  # differs if the range is quantized
            name = "log" * isinstance(inner, LogUniform) + ("randint" if isinstance(entry, Integer) else "uniform")
            step = {} if inner is outer else {"step": to_plain(outer.q)}
            summary[key] = {"tune": "q" * len(step) + name, "lower": values[0], "upper": values[1]} | step
        elif isinstance(entry, dict | Domain) and len(values) != 1:
            name = "grid_search" if isinstance(entry, dict) else "choice"
            summary[key] = {"tune": name, "values": values} if values else {}
        else:
            summary[key] = values[0]
    return summary


def count_configs(space: dict) -> float:
    """Return how many different configs a space has; infinity with a range of floats or a user's function."""
    count = 1.0
    for searched in (entry for entry in summarize(space).values() if isinstance(entry, dict)):
        if "values" in searched:
            count *= len({repr(value) for value in searched["values"]})
        elif step := searched.get("step", "randint" in searched.get("tune", "")):
            count *= int((searched["upper"] - searched["lower"]) / step + 1e-9) + 1
        else:
            return math.inf
    return count


def end_of_range(value: float, searched: dict, margin: float = 0.05) -> str | None:
    """Return "upper" or "lower" if a value is within that share of either end of a range or numeric grid, else None.

    Returns None outside the range.
    """
    ends = searched.get("values") or [searched.get("lower"), searched.get("upper")]
    if not all(type(end) in (int, float) for end in ends) or len(set(ends)) < 2:
        return None
    low, high = min(ends), max(ends)
    if not low <= value <= high:  # from first_trials or an earlier search
        return None
    if "log" in searched["tune"]:
        low, high, value = math.log(low), math.log(high), math.log(value)
    place = (value - low) / (high - low)
    return "lower" if place <= margin else "upper" if place >= 1 - margin else None
