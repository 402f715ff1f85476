"""What was asked: the command line, read into settings. Imports neither torch nor Ray, so that it answers at once."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

PROGRAM = "hparam_search.py"
DEFAULTS = {"num_samples": 3, "data_dir": "data"}
QUICK_DEFAULTS = {"dataset": "synthetic", "num_samples": 2}
SCHEDULERS = {  # → the flags that it takes
    "asha": ("grace_period", "reduction_factor", "brackets"),
    "median": ("grace_period",),
    "none": (),
}
ENLARGED = ("num_samples", "time_budget", "repeats")  # settings that may grow when a search is resumed
SAMPLERS = ("random", "optuna")
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Settings:
    """What was asked for: a search, or with `resume` another's continuation, which has that search's settings."""

    dataset: str = "cifar100"  # or folder, synthetic
    data_dir: str | None = None  # None: where the search that is resumed has its images
    output_dir: str = "outputs"
    name: str | None = None  # None: of the time
    num_samples: int | None = None  # None: as many as the search that is resumed
    max_epochs: int | None = None  # None: as param_space says
    seed: int = 0
    cpus_per_trial: int | None = None  # None: an equal share
    gpus_per_trial: float | None = None  # None: one where there are any
    quick: bool = False
    search: str = "random"  # or optuna
    scheduler: str = "asha"  # or median, none
    grace_period: int | None = None  # epochs; this and the next two None: as hparam_search.py says
    reduction_factor: float | None = None
    brackets: int | None = None
    repeats: int | None = None  # other seeds that the best trials are trained again with, in the end
    time_budget: float | None = None  # seconds, of all processes of the search together; None: no end
    resume: str | None = None
    list: bool = False  # show the searches in output_dir


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}: see --help", self.prog)
        sys.exit(2)


def print_error(message: object, program: str = PROGRAM) -> None:
    """Print what is wrong as a sentence on stderr, with what cannot be printed escaped."""
    sentence = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))
    print(f"{program}: {sentence}.", file=sys.stderr)


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> Settings:
    """Return the settings: what was given, then what --quick sets, then the defaults.

    Raises:
        SystemExit: with 2 after a sentence on flags that do not exist or make no sense; with 0 after --help.
    """
    # --quick and --resume must distinguish a flag that was not given from one given with its default.
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s [FLAG ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument_group("what is searched").add_argument
    add("--num-samples", metavar="N", type=int, help="draws for each point of the grid; 3")
    add("--search", choices=SAMPLERS, help="at random, or by TPE, which needs the package optuna; random")
    add("--max-epochs", metavar="N", type=int, help='default param_space["epochs"]')
    add("--seed", metavar="N", type=int, help="of draws, weights and batches; 0")
    add("--repeats", metavar="N", type=int, help="train the best 3 again with N other seeds each")
    add("--time-budget", metavar="T", type=seconds, help="90s, 30m or 2h: then the search ends in good order")
    add("--quick", action="store_true", help="a small search, in about a minute on two cores")
    add = parser.add_argument_group("on which images").add_argument
    add("--dataset", choices=("cifar100", "folder", "synthetic"), help="default cifar100")
    add(
        "--data-dir",
        metavar="PATH",
        type=os.path.expanduser,
        help="where CIFAR-100 is or is put, or the folder with train/ and test/; data",
    )
    add = parser.add_argument_group("which trials are stopped").add_argument
    add("--scheduler", choices=SCHEDULERS, help="default asha")
    add("--grace-period", metavar="N", type=int, help="epochs before a trial is compared with others")
    add("--reduction-factor", metavar="F", type=float, help="of those compared, one in so many goes on")
    add("--brackets", metavar="N", type=int, help="of ASHA, with grace periods of their own")
    add = parser.add_argument_group("where").add_argument
    add("--output-dir", metavar="PATH", type=os.path.expanduser, help="default outputs")
    add("--name", help="of the search's folder there; default search_<date>_<time>")
    add("--cpus-per-trial", metavar="N", type=int, help="default: all are shared out")
    add("--gpus-per-trial", metavar="F", type=float, help="default 1 where there are GPUs; 0.5 shares")
    add = parser.add_argument_group("searches that are there").add_argument
    add("--resume", metavar="PATH", type=os.path.expanduser,
        help="resume the search in that folder; --num-samples, --repeats and --time-budget can be raised, and "
        "--data-dir changed if the images moved")  # fmt: skip
    add("--list", action="store_true", help="show the searches in --output-dir, and their best")
    add("--help", "-h", action="help", help="show this")
    given = vars(parser.parse_args(argv))
    try:
        check_flags(given)
        defaults = {} if "resume" in given else DEFAULTS | (QUICK_DEFAULTS if given.get("quick") else {})
        settings = Settings(**(defaults | given))
        check_settings(settings)
        if settings.dataset == "synthetic" and "data_dir" in given:
            raise ValueError(
                f"--data-dir {given['data_dir']} cannot be combined with --dataset synthetic; remove one of them"
            )
    except ValueError as error:
        print_error(error)
        sys.exit(2)
    return settings


def methods_in_words(settings: Settings) -> list[str]:
    """Return what draws the trials of a search and what stops them, with its figures, as lines."""
    figures = [f"{key.replace('_', ' ')} {getattr(settings, key):g}" for key in SCHEDULERS[settings.scheduler]]
    return [f"Search: {settings.search}.", f"Scheduler: {', '.join([settings.scheduler, *figures])}."]


def seconds(text: str) -> float:
    """Return the seconds of a time span such as 90s, 30m or 2h."""
    number, unit = text[:-1], text[-1:]
    try:
        span = float(number) * UNITS[unit]
    except (KeyError, ValueError):
        span = math.nan
    if not 0 < span < math.inf:
        raise argparse.ArgumentTypeError(f"invalid duration {text!r} (use e.g. 90s, 30m or 2h)")
    return span


def flag(key: str) -> str:
    """Return a setting's key as one types it: data_dir is --data-dir."""
    return f"--{key.replace('_', '-')}"


def check_flags(given: dict) -> None:
    """Refuse flags that make no sense by themselves or together.

    Args:
        given: the flags that were given.

    Raises:
        ValueError: with the sentence.
    """
    for key, value in given.items():
        if isinstance(value, list):  # argparse's reading of --flag=--
            raise ValueError(f"{flag(key)} needs a value: see --help")
    for key in ("resume", "data_dir", "output_dir"):
        if not given.get(key, "").isprintable():
            raise ValueError(f"{flag(key)} is {given[key]!r}, but must be a path that can be printed")
    if "list" in given and (others := set(given) - {"list", "output_dir"}):
        raise ValueError(f"--list only accepts --output-dir; remove {flag(min(others))}")
    if "resume" in given and (others := set(given) - {"resume", "data_dir", *ENLARGED}):
        raise ValueError(f"--resume reuses the settings of the original search; remove {flag(min(others))}")
    scheduler = given.get("scheduler", "asha")
    for key in SCHEDULERS["asha"]:
        if key in given and key not in SCHEDULERS[scheduler]:
            raise ValueError(
                f"{flag(key)} {given[key]} cannot be combined with --scheduler {scheduler}; remove one of them"
            )


def check_settings(settings: Settings) -> None:
    """Refuse values that are out of range.

    Raises:
        ValueError: with the sentence.
    """
    at_least = {"num_samples": 1, "max_epochs": 1, "seed": 0, "cpus_per_trial": 1, "grace_period": 1, "brackets": 1}
    at_least |= {"repeats": 2}  # one alone shows no spread
    for key, lowest in at_least.items():
        value = getattr(settings, key)
        if value is not None and value < lowest:
            raise ValueError(f"{flag(key)} is {value}, but must be at least {lowest}")
    factor = settings.reduction_factor
    if factor is not None and not 1 < factor < math.inf:
        raise ValueError(f"--reduction-factor is {factor}, but must be above 1")
    gpus = settings.gpus_per_trial
    if gpus is not None and not (0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))):
        raise ValueError(f"--gpus-per-trial is {gpus}, but must be from 0 to 1, or a whole number")
    if not cluster_address():  # whose sizes Ray knows
        for key, count in (("cpus_per_trial", count_cpus), ("gpus_per_trial", count_gpus)):
            value = getattr(settings, key)
            if value and value > (available := count()):
                raise ValueError(f"{flag(key)} is {value}, but this machine has {available}: ask for fewer")
    if settings.name is not None:
        check_name(settings.name)


def check_name(name: str) -> None:
    """Refuse a name of a search that is no plain name of a folder."""
    plain = name.isprintable() and not set(name) & set("/\\") and not name.startswith(".")
    if not plain or not 1 <= len(os.fsencode(name)) <= 200:
        raise ValueError(
            f"--name is {name!r}, but must be a plain name for a folder, of 1 to 200 bytes, without / or \\ or a "
            "leading dot"
        )


def cluster_address() -> str | None:
    """Return the address of the Ray cluster that RAY_ADDRESS says to join, or None for a Ray of the search's own."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def count_cpus() -> int:
    """Return how many CPUs this process may use."""
    from data import usable_cpus  # here, for it takes two seconds

    return usable_cpus()


def count_gpus() -> int:
    """Return how many GPUs torch sees on this machine."""
    import torch  # here, for it takes two seconds

    return torch.cuda.device_count()
