"""What was asked: the command line, as settings."""

import argparse
import math
import os
from collections.abc import Sequence

import torch

from data import InputError

DEFAULTS = {
    "dataset": "cifar100",
    "data_dir": "data",
    "output_dir": "outputs",
    "name": None,
    "num_samples": 3,
    "max_epochs": None,
    "seed": 0,
    "cpus_per_trial": None,
    "gpus_per_trial": None,
    "quick": False,
}


QUICK_DEFAULTS = {"dataset": "synthetic", "num_samples": 2}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are our errors: one sentence, no usage."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}: see --help")


def flag(key: str) -> str:
    """Return a setting's key as one types it: data_dir is --data-dir."""
    return f"--{key.replace('_', '-')}"


def parse_args(argv: Sequence[str] | None) -> dict:
    """Return the settings: what was given, then what --quick sets, then the defaults; or {"resume": path} alone.

    Raises:
        InputError: flags that do not exist or make no sense.
    """
    # A flag that was not given must be told from one given with its default: --quick and --resume ask.
    parser = Parser(
        prog="hparam_search.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", choices=("cifar100", "folder", "synthetic"), help="default cifar100")
    parser.add_argument(
        "--data-dir", metavar="PATH", help="where CIFAR-100 is or is put, or the folder with train/ and test/; data"
    )
    parser.add_argument("--output-dir", metavar="PATH", help="default outputs")
    parser.add_argument("--name", help="of the search's folder there; default search_<date>_<time>")
    parser.add_argument("--num-samples", metavar="N", type=int, help="random draws for each point of the grid; 3")
    parser.add_argument("--max-epochs", metavar="N", type=int, help='default param_space["epochs"]')
    parser.add_argument("--seed", metavar="N", type=int, help="of draws, weights and batches; 0")
    parser.add_argument("--cpus-per-trial", metavar="N", type=int, help="default: all are shared out")
    parser.add_argument("--gpus-per-trial", metavar="F", type=float, help="default 1 where there are GPUs; 0.5 shares")
    parser.add_argument("--quick", action="store_true", help="a small search, in about a minute on two cores")
    parser.add_argument("--resume", metavar="PATH", help="continue the search in that folder")
    given = vars(parser.parse_args(argv))
    for key, value in given.items():
        if isinstance(value, list):  # argparse's reading of --flag=--
            raise InputError(f"{flag(key)} needs a value: see --help")
    for key in ("resume", "data_dir", "output_dir"):
        if not given.get(key, "").isprintable():
            raise InputError(f"{flag(key)} is {given[key]!r}, but must be a path that can be printed")
    if "resume" in given:
        if len(given) > 1:
            other = next(key for key in given if key != "resume")
            raise InputError(f"--resume takes every setting from the search it continues: leave {flag(other)} away")
        return given
    settings = DEFAULTS | (QUICK_DEFAULTS if given.get("quick") else {}) | given
    for key, lowest in (("num_samples", 1), ("max_epochs", 1), ("seed", 0), ("cpus_per_trial", 1)):
        if settings[key] is not None and settings[key] < lowest:
            raise InputError(f"{flag(key)} is {settings[key]}, but must be at least {lowest}")
    gpus = settings["gpus_per_trial"]
    if gpus is not None and not (0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))):
        raise InputError(f"--gpus-per-trial is {gpus}, but must be from 0 to 1, or a whole number")
    if "RAY_ADDRESS" not in os.environ:  # of a cluster, Ray knows the sizes
        for key, available in (("cpus_per_trial", os.cpu_count()), ("gpus_per_trial", torch.cuda.device_count())):
            if (settings[key] or 0) > available:
                raise InputError(f"{flag(key)} is {settings[key]}, but this machine has {available}: ask for fewer")
    if settings["dataset"] == "synthetic" and "data_dir" in given:
        raise InputError(f"--data-dir {given['data_dir']} has no use with --dataset synthetic: leave one of them away")
    if settings["name"] is not None:
        check_name(settings["name"])
    return settings


def check_name(name: str) -> None:
    """Refuse a name of a search that is no plain name of a folder."""
    plain = name.isprintable() and not set(name) & set("/\\") and not name.startswith(".")
    if not plain or not 1 <= len(os.fsencode(name)) <= 200:
        raise InputError(
            f"--name is {name!r}, but must be a plain name for a folder, of 1 to 200 bytes, without / or \\ or a "
            "leading dot"
        )
