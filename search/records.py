"""All that a search leaves on disk and reads back: search.json, the lock, the trials' logs, what is pruned."""

import contextlib
import fcntl
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from data import InputError
from search.command_line import DEFAULTS
from search.space import check_param_space, trial_name
from train import TRAINING_FILE, WEIGHTS_FILE, checkpoint_path

SEARCH_FILE = "search.json"


LOG_FILE = "result.json"


FINISHED = ("TERMINATED", "DIVERGED")


def resolved(path: str) -> Path:
    """Return an absolute path without links.

    Raises:
        InputError: the links in it lead round in a circle.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be followed ({error}): choose another path") from error


def check_free(folder: Path) -> None:
    """Refuse a folder for a new search that is there already, or that cannot be made."""
    try:
        if folder.exists():
            raise InputError(
                f"--name {folder.name} is taken by {shown(folder)}: choose another, or --resume that folder"
            )
        parent = next(parent for parent in folder.parents if parent.exists())
    except OSError as error:
        raise InputError(f"{folder.parent} cannot be made ({error.strerror}): choose another --output-dir") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} is no folder that can be written to: choose another --output-dir")


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the search in folder, so that no other process runs it, and if it is left midway say how to go on.

    If this process is killed, the lock goes with it.

    Raises:
        InputError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"{folder} is being searched by another process: wait for its end, or stop it") from error
    try:
        yield
    except (KeyboardInterrupt, OSError):
        print(f"Interrupted. To go on: {resume_command(folder)}")
        raise
    finally:
        os.close(descriptor)


def read_search(folder: Path) -> dict:
    """Return what a search's folder says of the search.

    Raises:
        InputError: the folder holds no search, or one whose file is damaged.
    """
    path = folder / SEARCH_FILE
    kinds = {
        "settings": dict, "param_space": dict, "dataset": dict, "trials": dict, "seconds": float, "resource_usage": str,
    }  # fmt: skip
    try:
        search = json.loads(path.read_text())
        settings, trials = search["settings"], search["trials"]
        if not (
            all(isinstance(search[key], kind) for key, kind in kinds.items())
            and settings.keys() == DEFAULTS.keys()
            and all(type(settings[key]) is type(value) for key, value in DEFAULTS.items() if value is not None)
            and trials
            and list(trials) == [trial_name(i) for i in range(len(trials))]  # they are names of folders
        ):
            raise ValueError("it is not what a search writes")
        for config in trials.values():
            check_param_space(config)
    except OSError as error:
        raise InputError(
            f"{folder} holds no search ({error.strerror}): --resume takes a folder that a search made, outputs/<name>"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): start the search again") from error
    return search


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or, if the process is killed, as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def whole_lines(content: bytes) -> int:
    """Return the length of the part of a log that ends with its last whole line."""
    return content.rfind(b"\n") + 1


def read_log(folder: Path) -> list[dict]:
    """Return the lines of a trial's log; one that is not whole, as of a process killed while it wrote, is left out."""
    path = folder / LOG_FILE
    content = path.read_bytes() if path.is_file() else b""
    lines = []
    for text in content[: whole_lines(content)].splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def read_results(folder: Path, trials: dict[str, dict]) -> list[dict]:
    """Return a dict a trial of the search in folder, in the order in which they were drawn: see summarise.

    Args:
        folder: the search's.
        trials: name → config.
    """
    return [summarise(name, config, read_log(folder / name), folder) for name, config in trials.items()]


def summarise(name: str, config: dict, lines: list[dict], folder: Path | None = None) -> dict:
    """Return what a trial's log comes down to.

    Keys: trial_id, name, status, config, error (a sentence or None), epochs (done), loss and accuracy (of the last
    epoch, on the validation images), seconds, best_epoch, best_accuracy and best_loss (of the epoch with the highest
    validation accuracy, the first of several), checkpoint (of that epoch: a path relative to the search's folder, or
    None where it is not there any more). What a trial never reported is None.

    The status is PENDING, UNFINISHED, ERROR or, of a trial that is finished, TERMINATED or DIVERGED.
    """
    epochs = {line["epoch"]: line for line in lines if "epoch" in line}  # of an epoch trained again, the later line
    row = {"trial_id": name.rsplit("_", 1)[-1], "name": name, "status": "PENDING", "config": config, "error": None}
    keys = ("epochs", "best_epoch", "best_accuracy", "best_loss", "loss", "accuracy", "seconds", "checkpoint")
    row |= dict.fromkeys(keys)
    if lines:
        row["error"] = lines[-1].get("error")
        row["status"] = "ERROR" if row["error"] else "UNFINISHED"
    if not epochs:
        return row
    last = epochs[max(epochs)]
    row |= {"epochs": last["epoch"], "loss": last["loss"], "accuracy": last["accuracy"], "seconds": last["seconds"]}
    if "done" in lines[-1]:
        row["status"] = "TERMINATED" if math.isfinite(last["loss"]) else "DIVERGED"
    best = max((epochs[epoch] for epoch in sorted(epochs)), key=lambda line: line["accuracy"])
    row |= {"best_epoch": best["epoch"], "best_accuracy": best["accuracy"], "best_loss": best["loss"]}
    path = checkpoint_path(Path(name), best["epoch"])
    if folder is None or (folder / path / WEIGHTS_FILE).exists():
        row["checkpoint"] = path.as_posix()
    return row


def best_first(results: list[dict]) -> list[dict]:
    """Return the trials with a checkpoint, save those that diverged, the highest validation accuracy first."""
    trained = [row for row in results if row["checkpoint"] and row["status"] != "DIVERGED"]
    return sorted(trained, key=lambda row: (-row["best_accuracy"], row["best_loss"]))


def prune_checkpoints(results: list[dict], folder: Path) -> list[dict]:
    """Delete the training state of finished trials, and all checkpoints of theirs but the five best trials' best.

    Returns:
        The finished trials that keep a checkpoint; the others' "checkpoint" becomes None.
    """
    finished = [row for row in results if row["status"] in FINISHED]
    kept = best_first(finished)[:MODELS_KEPT]
    for row in finished:
        if not any(row is other for other in kept):
            row["checkpoint"] = None
        for checkpoint in folder.glob(f"{row['name']}/checkpoint_*"):
            if checkpoint.relative_to(folder).as_posix() == row["checkpoint"]:
                (checkpoint / TRAINING_FILE).unlink(missing_ok=True)
            else:
                shutil.rmtree(checkpoint)
    return kept


MODELS_KEPT = 5


def shown(path: Path) -> str:
    """Return an absolute path as one would type it: relative where it is below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def resume_command(folder: Path) -> str:
    """Return the command line that continues the search in folder."""
    return shlex.join(
        ["python", shown(Path(__file__).resolve().parents[1] / "hparam_search.py"), "--resume", shown(folder)]
    )
