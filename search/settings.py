"""The command line, as settings. Imports neither torch nor Ray, so that --help answers at once."""

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn
from urllib.parse import unquote

PROGRAM = "hparam_search.py"
GROWABLE = ("num_samples", "repeats", "time_budget")  # settings that --resume can raise
CHANGEABLE = (*GROWABLE, "data_dir", "cpus_per_trial", "gpus_per_trial")  # settings that --resume can change
KNOBS = ("grace_period", "reduction_factor", "keep")  # settings of schedulers
SCHEDULERS = {"promote": KNOBS, "asha": KNOBS[:2], "none": ()}  # → the knobs that they use
LOWEST_FACTOR = 1.1  # with a lower reduction factor, almost every epoch would be a rung that stops almost no trial
UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """Return the seconds of a duration such as 90s, 30m or 2h."""
    found = re.fullmatch(r"(\d*\.?\d+)([smh])", text, re.ASCII)
    duration = float(found[1]) * UNITS[found[2]] if found else 0
    if not 0 < duration < math.inf:
        raise argparse.ArgumentTypeError(f"invalid duration {text!r} (use e.g. 90s, 30m or 2h)")
    return duration


def absolute_path(text: str) -> str:
    """Return the absolute path of a path, which may begin with ~, or of a file:/// URL."""
    if re.match(r"file:///", text, re.IGNORECASE):
        text = unquote(text[7:])
    elif re.match(r"\w[\w+.-]*://", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a local folder; mount that storage and pass its path")
    return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 (Path raises for ~nobody)


def folder_name(text: str) -> str:
    """Return a text if it can name a folder."""
    if not 1 <= len(os.fsencode(text)) <= 200 or set(text) & set("/\\\0") or text[0] == ".":
        raise argparse.ArgumentTypeError(f"invalid name {text!r} (use up to 200 bytes, without / \\ or a leading dot)")
    return text


METAVARS = {int: "N", float: "F", seconds: "T", absolute_path: "PATH"}


def option(default: Any, text: str, **options: Any) -> Any:
    """Define a setting, whose flag has the same name: data_dir → --data-dir; options are those of add_argument."""
    if default:
        text += f" (default: {default})"
    if "type" in options:
        options["metavar"] = METAVARS.get(options["type"])
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True)
class Settings:
    """The settings of a search, or with `resume` what to change in those of an existing one."""

    num_samples: int = option(3, "draws per grid point, spread evenly over each range", type=int)
    max_epochs: int | None = option(None, 'epochs of a trial (default: param_space["epochs"])', type=int)
    seed: int = option(0, "random seed of draws, weights and batches (default: 0)", type=int)
    repeats: int | None = option(None, "train the best 3 configs again with N other random seeds each", type=int)
    warm_start: Sequence[str] | None = option(
        None, "start with the trials of these searches (see README)", type=absolute_path, nargs="+"
    )
    time_budget: float | None = option(None, "stop cleanly after this long, e.g. 90s, 30m, 2h", type=seconds)
    quick: bool = option(False, "a one-minute demo on two cores, on synthetic images", action="store_true")
    scheduler: str = option(
        "promote", "what stops poor trials; none leaves only early stopping (PATIENCE)", choices=SCHEDULERS
    )
    grace_period: int | None = option(
        None, "epoch of the first rung, where trials are first compared (default: 2)", type=int
    )
    reduction_factor: float | None = option(None, "promote 1 in F trials at each rung (default: 2)", type=float)
    keep: int | None = option(None, "promote at least N trials at each rung (default: 2)", type=int)
    dataset: str = option("cifar100", "image source", choices=("cifar100", "folder", "synthetic"))
    data_dir: str = option("data", "folder of CIFAR-100, or with train/ and test/", type=absolute_path)
    cpus_per_trial: int | None = option(None, "CPU cores per trial (default: an equal share)", type=int)
    gpus_per_trial: float | None = option(
        None, "GPUs per trial (default: 1 if any, or 0.5 with ample memory)", type=float
    )
    output_dir: str = option("outputs", "parent of all search folders", type=absolute_path)
    name: str | None = option(None, "name of the search folder (default: search_<date>_<time>)", type=folder_name)
    or_resume: bool = option(False, "resume the search that --name names, or start it", action="store_true")
    resume: str | None = option(None, "continue the search in this folder (see README)", type=absolute_path)
    list: bool = option(False, "list the searches in --output-dir: status, accuracy, cost", action="store_true")

    def source_flags(self) -> Sequence[str]:
        """Return the flags that give another search the same images, epochs, draws and --output-dir."""
        keys = ["dataset", "max_epochs", "num_samples", "seed", "output_dir"]
        keys += ["data_dir"] * (self.dataset != "synthetic")
        changed = [key for key in keys if getattr(self, key) != getattr(defaults(self.quick), key)]
        return ["--quick"] * self.quick + [text for key in changed for text in (flag(key), str(getattr(self, key)))]

    def describe_scheduler(self) -> str:
        """Return the scheduler with its settings, as a line of text."""
        knobs = (f"{key.replace('_', ' ')} {getattr(self, key):g}" for key in SCHEDULERS[self.scheduler])
        return f"Scheduler: {', '.join([self.scheduler, *knobs])}."


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
        self.exit(2, f"{self.prog}: {message}; see --help.\n")


def add_device(parser: Parser) -> None:
    """Add the flag --device, which is None by default."""
    text = "device to use (default: cuda if available)"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None, help=text)


def parse_args(argv: Sequence[str] | None, description: str) -> tuple[Settings, dict]:
    """Return the settings, and those of them that were given as flags.

    Raises SystemExit: with 2 after a sentence about bad flags, with 0 after --help.
    """
    parser = Parser(PROGRAM, description)
    for setting in fields(Settings):
        parser.add_argument(flag(setting.name), **setting.metadata)
    given = vars(parser.parse_args(argv))
    settings = replace(defaults("quick" in given), **given)
    if problem := problem_with(settings, given):
        parser.exit(2, f"{PROGRAM}: {problem}.\n")
    return settings, given


def defaults(quick: bool) -> Settings:
    """Return the settings of a command without other flags than --quick."""
    demo: dict[str, Any] = {"dataset": "synthetic", "num_samples": 2} if quick else {}
    return Settings(quick=quick, data_dir=absolute_path("data"), output_dir=absolute_path("outputs"), **demo)


def flag(key: str) -> str:
    """Return the flag of a setting: data_dir → --data-dir."""
    return f"--{key.replace('_', '-')}"


def problem_with(settings: Settings, given: dict) -> str | None:
    """Return a sentence about flags that are out of range or cannot be combined, or None."""
    for key, others in (("list", {"output_dir"}), ("resume", set(CHANGEABLE))):
        if key in given and (other := min(set(given) - {key} - others, default=None)):
            accepted = ", ".join(sorted(map(flag, others)))
            return f"{flag(key)} can only be combined with {accepted}; remove {flag(other)}"
    for key in KNOBS:
        if key in given and key not in SCHEDULERS[settings.scheduler]:
            return f"{flag(key)} cannot be combined with --scheduler {settings.scheduler}; remove one of them"
    if "data_dir" in given and settings.dataset == "synthetic":
        return "--data-dir cannot be combined with --dataset synthetic; remove one of them"
    if settings.or_resume and not settings.name:
        return "--or-resume needs --name; add it"
    lowest = {"num_samples": 1, "max_epochs": 1, "seed": 0, "cpus_per_trial": 1, "repeats": 2}
    for key, minimum in (lowest | {"grace_period": 1, "keep": 0}).items():
        if given.get(key, minimum) < minimum:
            return f"{flag(key)} {given[key]} is too small; use at least {minimum}"
    factor, gpus = given.get("reduction_factor", LOWEST_FACTOR), given.get("gpus_per_trial", 0)
    if not LOWEST_FACTOR <= factor < math.inf:
        return f"--reduction-factor {factor} is out of range; use at least {LOWEST_FACTOR}"
    if not (0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))):
        return f"--gpus-per-trial {gpus} is out of range; use a number from 0 to 1, or a whole number"
    return None
