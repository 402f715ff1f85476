"""The command line, as settings. Imports neither torch nor Ray, so that --help answers at once."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

PROGRAM = "hparam_search.py"
QUICK_DEFAULTS: dict[str, Any] = {"dataset": "synthetic", "num_samples": 2}
GROWABLE = ("num_samples", "repeats", "time_budget")  # settings that --resume can raise
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Settings:
    """The settings of a search, or with `resume` what to change in those of an existing one."""

    dataset: str = "cifar100"  # or folder, synthetic
    data_dir: str = "data"
    output_dir: str = "outputs"
    name: str | None = None  # None: search_<date>_<time>
    num_samples: int = 3  # random samples per grid point
    max_epochs: int | None = None  # None: param_space["epochs"]
    seed: int = 0
    cpus_per_trial: int | None = None  # None: an equal share
    gpus_per_trial: float | None = None  # None: one, if there are any
    quick: bool = False
    sampler: str = "random"  # or tpe
    scheduler: str = "asha"  # or none
    grace_period: int | None = None  # epochs; None without a scheduler
    reduction_factor: float | None = None  # None without a scheduler
    repeats: int | None = None  # number of other random seeds for the best configs
    time_budget: float | None = None  # seconds, over all runs of the search
    resume: str | None = None
    list: bool = False

    def methods(self) -> tuple[str, str]:
        """Describe the sampler, and the scheduler with its settings, in a line of text each."""
        figures = ""
        if self.grace_period is not None:
            figures = f", grace period {self.grace_period}, reduction factor {self.reduction_factor:g}"
        return f"Sampler: {self.sampler}.", f"Scheduler: {self.scheduler}{figures}."


class Parser(argparse.ArgumentParser):
    """An argument parser that reports bad input in one sentence."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,  # to distinguish a flag that was not given from its default
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; see --help", self.prog)
        sys.exit(2)


def print_error(message: object, program: str = PROGRAM) -> None:
    """Print a sentence on stderr."""
    print(f"{program}: {message}.", file=sys.stderr)


def parse_args(argv: Sequence[str] | None, description: str) -> tuple[Settings, dict]:
    """Return the settings, and those of them that were given as flags.

    Raises:
        SystemExit: with 2 after a sentence about bad flags; with 0 after --help.
    """
    parser = Parser(PROGRAM, description)

    def path(text: str) -> str:
        return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 (Path raises for ~nobody)

    add = parser.add_argument_group("search").add_argument
    add("--num-samples", metavar="N", type=int, help="random samples per grid point (default: 3)")
    add("--sampler", choices=("random", "tpe"), help="how to draw configs; tpe needs optuna (default: random)")
    add("--max-epochs", metavar="N", type=int, help='epochs of a trial (default: param_space["epochs"])')
    add("--seed", metavar="N", type=int, help="random seed of draws, weights and batches (default: 0)")
    add("--repeats", metavar="N", type=int, help="train the best 3 configs again with N other random seeds each")
    add("--time-budget", metavar="T", type=seconds, help="stop cleanly after this long, e.g. 90s, 30m, 2h")
    add("--quick", action="store_true", help="a one-minute demo on two cores, on synthetic images")
    add = parser.add_argument_group("scheduler").add_argument
    add("--scheduler", choices=("asha", "none"), help="what stops poor trials early (default: asha)")
    add("--grace-period", metavar="N", type=int, help="epochs before a trial can be stopped (default: 2)")
    add("--reduction-factor", metavar="F", type=float, help="keep 1 in F trials at each rung (default: 3)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("cifar100", "folder", "synthetic"), help="image source (default: cifar100)")
    add("--data-dir", metavar="PATH", type=path, help="folder of CIFAR-100, or with train/ and test/ (default: data)")
    add = parser.add_argument_group("resources and output").add_argument
    add("--cpus-per-trial", metavar="N", type=int, help="CPU cores per trial (default: an equal share)")
    add("--gpus-per-trial", metavar="F", type=float, help="GPUs per trial, e.g. 0.5 (default: 1 if there are GPUs)")
    add("--output-dir", metavar="PATH", type=path, help="parent of all search folders (default: outputs)")
    add("--name", type=folder_name, help="name of the search folder (default: search_<date>_<time>)")
    add = parser.add_argument_group("existing searches").add_argument
    add("--resume", metavar="PATH", type=path,
        help="continue the search in this folder; only --num-samples, --repeats and --time-budget can be raised, "
        "and --data-dir changed if the images moved")  # fmt: skip
    add("--list", action="store_true", help="list all searches in --output-dir and their status")
    given = vars(parser.parse_args(argv))
    settings = Settings(**((QUICK_DEFAULTS if given.get("quick") else {}) | given))
    try:
        check(settings, given)
    except ValueError as error:
        print_error(error)
        sys.exit(2)
    return settings, given


def seconds(text: str) -> float:
    """Return the seconds of a duration such as 90s, 30m or 2h."""
    try:
        duration = float(text[:-1]) * UNITS[text[-1:]]
    except (KeyError, ValueError):
        duration = math.nan
    if not 0 < duration < math.inf:
        raise argparse.ArgumentTypeError(f"invalid duration {text!r} (use e.g. 90s, 30m or 2h)")
    return duration


def folder_name(text: str) -> str:
    """Return a text if it can name a folder."""
    if not 1 <= len(os.fsencode(text)) <= 200 or set(text) & set("/\\\0") or text[0] == ".":
        raise argparse.ArgumentTypeError(f"invalid name {text!r} (use up to 200 bytes, without / \\ or a leading dot)")
    return text


def flag(key: str) -> str:
    """Return the flag of a setting: data_dir → --data-dir."""
    return f"--{key.replace('_', '-')}"


def check(settings: Settings, given: dict) -> None:
    """Raise ValueError, with a sentence, if flags are out of range or cannot be combined."""
    if "list" in given and (others := set(given) - {"list", "output_dir"}):
        raise ValueError(f"--list only accepts --output-dir; remove {flag(min(others))}")
    if "resume" in given and (others := set(given) - {"resume", "data_dir", *GROWABLE}):
        raise ValueError(f"--resume reuses the settings of the original search; remove {flag(min(others))}")
    for key in ("grace_period", "reduction_factor"):
        if key in given and settings.scheduler == "none":
            raise ValueError(f"{flag(key)} cannot be combined with --scheduler none; remove one of them")
    if settings.dataset == "synthetic" and "data_dir" in given:
        raise ValueError("--data-dir cannot be combined with --dataset synthetic; remove one of them")
    lowest = {"num_samples": 1, "max_epochs": 1, "seed": 0, "cpus_per_trial": 1, "grace_period": 1, "repeats": 2}
    for key, minimum in lowest.items():
        if given.get(key, minimum) < minimum:
            raise ValueError(f"{flag(key)} {given[key]} is too small; use at least {minimum}")
    if not 1 < given.get("reduction_factor", 3) < math.inf:
        raise ValueError(f"--reduction-factor {settings.reduction_factor} is out of range; use a number above 1")
    gpus = given.get("gpus_per_trial", 0)
    if not (0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))):
        raise ValueError(f"--gpus-per-trial {gpus} is out of range; use a number from 0 to 1, or a whole number")


def cluster_address() -> str | None:
    """Return the address of the Ray cluster to join, from RAY_ADDRESS; None to start a local Ray."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address
