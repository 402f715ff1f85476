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


def or_none(allowed: Values) -> Values:
    """Return these values and None."""
    return Values(lambda v: v is None or allowed.is_valid(v), f"{allowed.words}, or None to switch it off")


# The valid values of constants in hparam_search.py.
CONSTANTS = {
    "GRACE_PERIOD": WHOLE, "REDUCTION_FACTOR": FACTOR, "KEEP": or_none(COUNT), "PATIENCE": or_none(WHOLE),
    "MIN_DELTA": NOT_NEGATIVE, "MAX_SECONDS_PER_TRIAL": or_none(POSITIVE), "MAX_FAILURES_PER_TRIAL": COUNT,
    "SAVE_PERIOD": or_none(NOT_NEGATIVE), "MODELS_KEPT": or_none(WHOLE),
    "REPEATED_TRIALS": WHOLE, "PROGRESS_PERIOD": or_none(NOT_NEGATIVE),
}  # fmt: skip


def to_plain(entry: Any) -> Any:
    """Return a value or an entry of a space with NumPy values, tuples and ranges as Python numbers and lists."""
    if hasattr(entry, "tolist"):
        return entry.tolist()
    if isinstance(entry, list | tuple | range):
        return [to_plain(value) for value in entry]
    if isinstance(entry, dict):
        return {key: to_plain(value) for key, value in entry.items()}
    if isinstance(entry, Domain):
        entry = copy.copy(entry)
        vars(entry).update(to_plain(vars(entry)))
    return entry


def summarize(space: dict) -> dict[str, Any]:
    """Return a space in a form that JSON can hold: a fixed value as it is, a searched hyperparameter as a dict.

    The dict is {"tune": …, "values": […]} for a grid or choice, {"tune": …, "lower": …, "upper": …} for a range (both
    ends can occur), with "step" if it is quantized, where "tune" names Ray Tune's function; {} for a user's function.
    """
    return {key: summarize_entry(entry) for key, entry in to_plain(space).items()}


def summarize_entry(entry: Any) -> Any:
    """Summarize a plain entry of a space (see to_plain and summarize)."""
    match entry:
        case Float() | Integer():
            outer, whole = entry.get_sampler(), isinstance(entry, Integer)
            inner, step = getattr(outer, "sampler", outer), to_plain(getattr(outer, "q", None))
            name = "q" * bool(step) + "log" * isinstance(inner, LogUniform) + ("randint" if whole else "uniform")
            upper = entry.upper - (whole and step in (None, 1))  # Ray includes it if quantized
            return {"tune": name, "lower": entry.lower, "upper": upper} | ({"step": step} if step else {})
        case Categorical(categories=values):
            name = "choice"
        case {"grid_search": [*values], **rest} if not rest:
            name = "grid_search"
        case dict() | Domain():  # an invalid grid; a user's function
            return {}
        case _:
            return entry
    return values[0] if len(values) == 1 else {"tune": name, "values": values} if values else {}


def possible_values(summary: Any) -> list:
    """Return all values of a grid or choice, the first and last of a range, or a fixed value; none for a function."""
    if not isinstance(summary, dict):
        return [summary]
    return summary.get("values") or (list(limits(summary)) if "lower" in summary else [])


def check_space(space: dict) -> None:
    """Raise InputError, naming key and value, for unknown or missing keys and values that no trial could train with."""
    values = {key: possible_values(summary) for key, summary in summarize(space).items()}
    for key in space:
        if key not in CONFIG_KEYS:
            raise InputError(f"param_space has the unknown key {key!r}; use only {', '.join(CONFIG_KEYS)}")
    for key, allowed in CONFIG_KEYS.items():
        if key not in space:
            raise InputError(f"param_space lacks {key!r}; add it with {allowed.words}")
        entry = space[key]
        if isinstance(entry, dict) and not values[key]:
            raise InputError(f"param_space[{key!r}] is {entry!r}; give grid_search a list of values")
        for value in values[key]:
            check_value(key, value)
        if isinstance(entry, Float | Integer) and not (entry.lower < entry.upper and values[key][0] <= values[key][1]):
            bounds = f"{entry.lower} and {entry.upper}"
            raise InputError(f"param_space[{key!r}] has no values between its bounds, {bounds}; correct them")
    if isinstance(space["epochs"], dict | Domain):
        raise InputError(
            "param_space['epochs'] cannot be searched, as the scheduler compares trials at equal epochs; use one value"
        )
    if True in values["nesterov"] and 0 in values["momentum"]:
        raise InputError("nesterov cannot be True with momentum 0; raise momentum, or make nesterov False")


def check_first_trials(first_trials: object, space: dict) -> None:
    """Raise InputError unless this is a list of dicts with valid values of searched hyperparameters."""
    if not (isinstance(first_trials, list | tuple) and all(isinstance(values, dict) for values in first_trials)):
        raise InputError(f"first_trials is {first_trials!r}; make it a list of dicts")
    for i, values in enumerate(first_trials):
        for key, value in values.items():
            if not isinstance(space.get(key), dict | Domain):
                raise InputError(f"first_trials[{i}] has {key!r}, which is not searched; remove it")
            check_value(key, to_plain(value))


def check_value(name: str, value: object) -> None:
    """Refuse an invalid value of a hyperparameter or of a constant in hparam_search.py."""
    allowed = CONFIG_KEYS.get(name) or CONSTANTS[name]
    if not allowed.is_valid(value):
        raise InputError(f"{name} cannot be {value!r}; use {allowed.words}")


def check_constants(values: dict) -> None:
    """Refuse values of the constants in hparam_search.py, given by name, with which a search could not run."""
    for name in CONSTANTS:
        if name not in values:
            raise InputError(f"hparam_search.py lacks {name}; restore it")
        check_value(name, values[name])


def listed(entry: dict) -> list:
    """Return the values of a grid or choice: sorted if all are numbers, otherwise with equal ones side by side."""
    values = entry["values"]
    return sorted(values, key=None if all(type(value) in (int, float) for value in values) else values.index)


def step_of(entry: dict) -> float:
    """Return the step between the values of a range; 0 if it is continuous."""
    return entry.get("step", int("randint" in entry["tune"]))


def limits(entry: dict) -> tuple[float, float]:
    """Return the lowest and the highest value of a range."""
    lower, upper, step = entry["lower"], entry["upper"], step_of(entry)
    # The ends of a range of integers need not be multiples of its step.
    return (-(-lower // step) * step, upper // step * step) if type(step) is int and step else (lower, upper)


def on_scale(entry: dict, *values: float) -> list[float]:
    """Return the start and end of a range, then these values; all as logarithms if the range is logarithmic.

    In a quantized range, each value extends to the next one, so the range ends one step after the last value.
    """
    lower, upper = limits(entry)
    values = (lower, upper + step_of(entry), *values)
    return [math.log(value) for value in values] if "log" in entry["tune"] else list(values)


def value_at(place: float, entry: dict) -> Any:
    """Return the value of a searched entry (see summarize) at a place, from 0 (the start) to 1 (the end, excluded).

    Each value of a grid, a choice or a linear quantized range has an equal share of the places.
    """
    if "values" in entry:
        return listed(entry)[int(place * len(entry["values"]))]
    low, high = on_scale(entry)
    value = low + place * (high - low)
    value = math.exp(value) if "log" in entry["tune"] else value
    if step := step_of(entry):
        value = math.floor(value / step + 1e-9) * step
    lower, upper = limits(entry)
    return min(max(value, lower), upper)


def places_of(value: Any, entry: dict) -> tuple[float, float] | None:
    """Return the start and end of the places at which value_at gives this value, or None if it lies outside the entry.

    A value between two steps of a quantized range gets the width of one step.
    """
    if "values" in entry:
        values = listed(entry)
        if value not in values:
            return None
        index = values.index(value)
        return index / len(values), (index + values.count(value)) / len(values)
    lower, upper = limits(entry)
    if not lower <= value <= upper:
        return None
    low, high, first, last = on_scale(entry, value, value + step_of(entry))
    return (first - low) / (high - low), (last - low) / (high - low)
