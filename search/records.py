"""All that a search leaves on disk and reads back: its settings, the trials' configs and logs, what is pruned.

    search.json              the settings, the space in words, and what the images were
    <trial>/params.json      the trial's config
    <trial>/result.json      a line of JSON an epoch; with "done" in the last one of a trial that is finished
    <trial>/error.txt        of a trial that failed
    <trial>/checkpoint_*/    weights, and <trial>/training_*.pt, what training goes on from: train.py writes them

Each of the JSON files and lines carries a checksum of its own, so that what is read back is what was written.
"""

import contextlib
import fcntl
import json
import math
import os
import shlex
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from data import Dataset, InputError, fingerprint
from search.command_line import ENLARGED, Settings, flag
from search.space import check_param_space, trial_name
from search.trial import UNSUPPORTED, WEIGHTS_FILE, checkpoint_path, of_same_epoch, replacing, saved_weights
from train import METRICS

SEARCH_FILE, PARAMS_FILE, LOG_FILE, ERROR_FILE = "search.json", "params.json", "result.json", "error.txt"
FORMAT = 4  # of all these files; another one is refused
PARTS = ("param_space", "searched", "images", "seconds", "resource_usage")  # of search.json, besides the settings
FINISHED = ("TERMINATED", "DIVERGED")


@dataclass
class Search:
    """A search, as its folder has it.

    Attributes:
        folder: where it is.
        settings: what was asked for.
        param_space: the space's entries, in words: see described.
        searched: what is tried of those that are searched: see space.searched.
        images: what they were: see fingerprint.
        trials: name → config, in the order in which they were drawn; None of those that are not begun.
        seconds: how long it ran, in all its processes.
        resource_usage: what it ran on, as one line.
    """

    folder: Path
    settings: Settings
    param_space: dict[str, str]
    searched: dict[str, dict]
    images: dict[str, str]
    trials: dict[str, dict | None]
    seconds: float = 0.0
    resource_usage: str = ""

    @property
    def time_left(self) -> float | None:
        """How many seconds of its time budget it has left; None where it has no budget."""
        budget = self.settings.time_budget
        return None if budget is None else budget - self.seconds


# --- files that are read back as they were written --------------------------------------------------------------------


def sealed(content: dict, indent: int | None = None) -> str:
    """Return a dict as JSON, with its checksum as one more entry."""
    return json.dumps(content | {"crc32": checksum(content)}, indent=indent)


def unsealed(text: str | bytes) -> dict:
    """Return the dict that sealed made text of.

    Raises:
        ValueError: it is something else.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict) or content.pop("crc32", None) != checksum(content):
        raise ValueError("its checksum does not match")
    return content


def checksum(content: dict) -> str:
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or, if the process is killed, as it was.

    Raises:
        OSError: naming the file.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}); make room there, then --resume") from error


# --- a search's folder ------------------------------------------------------------------------------------------------


def resolved(path: str) -> Path:
    """Return an absolute path without links.

    Raises:
        InputError: the links in it lead round in a circle.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be followed ({error}): choose another path") from error


def shown(path: Path) -> str:
    """Return an absolute path as one would type it: relative where it is below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def resume_command(folder: Path) -> str:
    """Return the command line that continues the search in folder."""
    script = Path(__file__).resolve().parents[1] / "hparam_search.py"
    return shlex.join(["python", shown(script), "--resume", shown(folder)])


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
        raise InputError(f"{parent} is not a writable folder; choose another --output-dir")


def name_of_now() -> str:
    """Return the name of a search that was given none."""
    return datetime.now().strftime("search_%Y-%m-%d_%H-%M-%S")


def make_folder(output_dir: Path, name: str | None) -> Path:
    """Make a new search's folder. Of two without a name that start in the same second, one waits for the next.

    Raises:
        InputError: it cannot be made.
    """
    while True:
        folder = output_dir / (name or name_of_now())
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if name or not isinstance(error, FileExistsError):
                raise InputError(f"{folder} cannot be made ({error.strerror}): choose another --name") from error
        time.sleep(0.1)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the search in folder, so that no other process runs it, and if it is left midway say how to go on.

    If this process is killed, the lock goes with it.

    Raises:
        InputError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not lock(descriptor, fcntl.LOCK_EX):
            raise InputError(f"another process is running {folder}; wait for it to finish, or stop it")
        yield
    except (KeyboardInterrupt, OSError):
        print(f"Interrupted. To resume: {resume_command(folder)}", flush=True)
        raise
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Tell whether a process runs the search in folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return not lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def lock(descriptor: int, kind: int) -> bool:
    """Lock a folder and return whether that worked; True if the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


def write_search(search: Search) -> None:
    """Write search.json."""
    settings = asdict(search.settings)
    del settings["resume"]
    content = {"format": FORMAT, "settings": settings, "num_trials": len(search.trials)}
    content |= {key: getattr(search, key) for key in PARTS}
    write_whole(search.folder / SEARCH_FILE, sealed(content, indent=2))


def read_search(folder: Path) -> Search:
    """Return the search that a folder holds.

    Raises:
        InputError: it holds none, or one whose search.json or params.json are damaged or of another version.
    """
    path = folder / SEARCH_FILE
    try:
        text = path.read_bytes()
        content = json.loads(text)
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise InputError(
                f"{path} is of another version of this script: go on with that one, or start the search again"
            )
        content = unsealed(text)
        settings = Settings(**content["settings"])
        trials = {trial_name(i): None for i in range(content["num_trials"])}
        parts = {key: content[key] for key in PARTS}
    except OSError as error:
        raise InputError(
            f"{folder} holds no search ({error.strerror}): --resume takes a folder that a search made, outputs/<name>"
        ) from error
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): start the search again") from error
    return Search(folder, settings, trials={name: read_params(folder / name) for name in trials}, **parts)


def enlarged(settings: Settings, asked: Settings) -> Settings:
    """Return a search's settings with the changes asked for on --resume: raised ENLARGED ones, moved images.

    Raises:
        InputError: a value shrinks, or the images are synthetic.
    """
    changes = {key: getattr(asked, key) for key in ENLARGED if getattr(asked, key) is not None}
    if asked.data_dir and settings.dataset == "synthetic":
        raise InputError(f"--data-dir {asked.data_dir} cannot be combined with synthetic images; remove it")
    moved = {"data_dir": str(resolved(asked.data_dir))} if asked.data_dir else {}
    for key, value in changes.items():
        before = getattr(settings, key)
        if before is not None and value < before:
            raise InputError(f"{flag(key)} is {value:g}, but the search was asked for {before:g}: give at least that")
    return replace(settings, **changes, **moved)


def check_same_space(search: Search, in_words: dict[str, str]) -> None:
    """Refuse to go on with a space that was edited since the search began."""
    for key, text in in_words.items():
        if text != search.param_space.get(key):
            raise InputError(
                f"param_space[{key!r}] is {text}, but was {search.param_space.get(key)} when {shown(search.folder)} "
                "began: change it back, or start a new search"
            )


def check_same_images(search: Search, dataset: Dataset) -> None:
    """Refuse to go on with images other than those that the search began with."""
    for part, digest in fingerprint(dataset).items():
        if digest != search.images.get(part):
            raise InputError(
                f"the {part} in {search.settings.data_dir} are not those that {shown(search.folder)} began with: put "
                "those back, or start a new search"
            )


# --- trials -----------------------------------------------------------------------------------------------------------


def write_params(folder: Path, config: dict) -> None:
    """Write a trial's config into its folder, unless it stands there already."""
    path = folder / PARAMS_FILE
    if not path.exists():
        folder.mkdir(exist_ok=True)
        write_whole(path, sealed(config, indent=2))


def read_params(folder: Path) -> dict | None:
    """Return the config of the trial in folder, or None if it is not begun.

    Raises:
        InputError: it is damaged, or gone from a trial that has begun.
    """
    path = folder / PARAMS_FILE
    try:
        if not path.exists() and not (folder / LOG_FILE).exists():
            return None
        config = unsealed(path.read_bytes())
        check_param_space(config)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): remove {folder}, whose trial is then drawn and trained again"
        ) from error
    return config


def append_line(folder: Path, text: str) -> None:
    """Append text, whole lines, to the log of the trial in folder."""
    with (folder / LOG_FILE).open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # of a process killed while it wrote
        file.write(text.encode())


def read_log(folder: Path) -> tuple[list[dict], int]:
    """Return the lines of a trial's log that are what a trial writes, and how many others there are.

    A last line that is not whole, of a process killed while it wrote, is none.
    """
    try:
        content = (folder / LOG_FILE).read_bytes()
    except OSError:
        return [], 0
    lines, others, last_epoch = [], 0, 0
    for text in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            line = unsealed(text)
            check_line(line, last_epoch)
        except (ValueError, KeyError):
            others += 1
            continue
        lines.append(line)
        last_epoch = max(last_epoch, line.get("epoch", 0))
    return lines, others


def check_line(line: dict, last_epoch: int) -> None:
    """Refuse what is no line of a trial that had reported last_epoch epochs.

    Raises:
        ValueError, KeyError: it is none.
    """
    if isinstance(line.get("error"), str):
        return
    numbers = [line[key] for key in (*METRICS, "time")]
    if not all(type(number) in (int, float) and not math.isinf(number) for number in numbers):
        raise ValueError("metrics are finite numbers, or NaN")
    # An epoch comes after the one before; of a trial that was restored, some come again.
    if type(line["epoch"]) is not int or not 1 <= line["epoch"] <= last_epoch + 1:
        raise ValueError("epochs come one after the other")
    if not (0 <= line["accuracy"] <= 1 and 0 <= line["train_accuracy"] <= 1):
        raise ValueError("an accuracy is from 0 to 1")
    if any(line[key] < 0 for key in ("loss", "train_loss", "lr", "images_per_second", "seconds")):
        raise ValueError("these are not negative")


def read_results(search: Search) -> list[dict]:
    """Return a dict a trial of a search, in the order in which they were drawn: see summarise."""
    return [
        summarise(name, config, *read_log(search.folder / name), search.folder)
        for name, config in search.trials.items()
    ]


def summarise(name: str, config: dict | None, lines: list[dict], others: int, folder: Path) -> dict:
    """Return what a trial's log comes down to.

    Keys: trial_id, name, status, config, error (a sentence or None), unreadable (lines of the log), epochs (done), loss
    and accuracy (of the last epoch, on the validation images), seconds, best_epoch, best_accuracy and best_loss (of the
    epoch with the highest validation accuracy, the first of several), checkpoint (the weights of that epoch: a path
    relative to the search's folder, or None where they are not there any more). What a trial never reported is None.

    The status is PENDING, UNFINISHED, ERROR or, of a trial that is finished, TERMINATED or DIVERGED.

    Args:
        name: the trial's.
        config: the trial's.
        lines: of read_log.
        others: of read_log.
        folder: the search's.
    """
    row = {"trial_id": name.rsplit("_", 1)[-1], "name": name, "status": "PENDING", "config": config, "error": None}
    keys = ("epochs", "best_epoch", "best_accuracy", "best_loss", "loss", "accuracy", "seconds", "checkpoint")
    row |= {"unreadable": others} | dict.fromkeys(keys)
    if lines:
        row["error"] = lines[-1].get("error")
        row["status"] = "ERROR" if row["error"] else "UNFINISHED"
    reported = [line for line in lines if "epoch" in line]
    if not reported:
        return row
    last = {line["epoch"]: line for line in reported}[max(line["epoch"] for line in reported)]  # of two, the later
    row |= {"epochs": last["epoch"], "loss": last["loss"], "accuracy": last["accuracy"], "seconds": last["seconds"]}
    if "done" in lines[-1]:
        row["status"] = "TERMINATED" if math.isfinite(last["loss"]) else "DIVERGED"
    # Of the epochs whose weights lie there: an epoch that is trained again may have other figures than at first.
    weights = {path: of for path, of in saved_weights(folder / name).items() if (path / WEIGHTS_FILE).exists()}
    saved = [line for of in weights.values() for line in reported if of_same_epoch(line, of)]
    if (
        not saved and row["status"] in FINISHED
    ):  # a finished trial's weights have their name, should metrics.json be lost
        saved = [line for line in reported if checkpoint_path(folder / name, line["epoch"]) in weights]
    finite = [line for line in reported if math.isfinite(line["loss"])] or reported
    best = max(saved or sorted(finite, key=lambda line: line["epoch"]), key=lambda line: line["accuracy"])
    row |= {"best_epoch": best["epoch"], "best_accuracy": best["accuracy"], "best_loss": best["loss"]}
    if saved:
        row["checkpoint"] = checkpoint_path(Path(name), best["epoch"]).as_posix()
    return row


def is_finished(results: list[dict]) -> bool:
    """Tell whether all trials are finished."""
    return all(row["status"] in FINISHED for row in results)


def are_left(results: list[dict]) -> bool:
    """Tell whether there are trials that have neither finished nor failed."""
    return any(row["status"] in ("PENDING", "UNFINISHED") for row in results)


def best_first(results: list[dict]) -> list[dict]:
    """Return the trials that have learnt something, save those that diverged, the highest validation accuracy first."""
    trained = [row for row in results if row["best_accuracy"] is not None and row["status"] != "DIVERGED"]
    return sorted(trained, key=lambda row: (-row["best_accuracy"], row["best_loss"]))


def prune(results: list[dict], folder: Path, models_kept: int) -> None:
    """Delete what finished trials went on from, and all their weights but the best ones of the best trials.

    Args:
        results: of read_results. The "checkpoint" of trials that keep none becomes None.
        folder: the search's.
        models_kept: how many trials keep theirs.
    """
    finished = [row for row in results if row["status"] in FINISHED]
    kept = [row["name"] for row in best_first(finished) if row["checkpoint"]][:models_kept]
    for row in finished:
        if row["name"] not in kept:
            row["checkpoint"] = None
        trial = folder / row["name"]
        for path in trial.glob("checkpoint_*"):
            if path.relative_to(folder).as_posix() != row["checkpoint"]:
                shutil.rmtree(path)
        for path in trial.glob("training_*"):
            path.unlink()
