"""A trial: what runs it, under Ray Tune or without, and the checkpoints that it leaves, to be tested or to go on from.

<trial>/checkpoint_<epoch>/   weights.pt, the weights of an epoch, and metrics.json, what it reported
<trial>/training_<epoch>.pt   all that training goes on from after an epoch
"""

import contextlib
import errno
import functools
import json
import math
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

import torch
from ray import tune

from data import Dataset, map_dataset
from train import Training, best_device, new_training, train_epochs

# How file systems such as SMB, sshfs and Lustre say that they cannot flush a folder, or lock one.
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.ENOLCK)
WEIGHTS_FILE, METRICS_FILE = "weights.pt", "metrics.json"


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Return where, in a trial's folder, the weights of an epoch are."""
    return folder / f"checkpoint_{epoch:06}"


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield the path to write a file or folder to that, once it is flushed to disk, takes its place at target.

    So target is there whole or, whatever happens, as it was (a folder: or not at all).
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for path in [*temporary.glob("*"), temporary]:
            flush(path)
        if temporary.is_dir():
            shutil.rmtree(target, ignore_errors=True)  # a folder takes no other folder's place
        temporary.replace(target)
        flush(target.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk to survive a power cut, if the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Say, of what cannot be written into a trial's folder, where that is and what to do.

    Raises:
        OSError: in place of whatever was raised within.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a file cannot be written
        reason = str(error).splitlines()[0]
        raise OSError(
            f"no checkpoint can be written into {folder} ({reason}): make room there, then --resume"
        ) from error


def save_weights(training: Training, folder: Path) -> None:
    """Write the evaluated weights of the epoch just done, and its metrics, into a trial's folder.

    They stand alone: weights.pt is a state_dict.

    Raises:
        OSError: naming the folder, when it cannot be written.
    """
    with naming(folder), replacing(checkpoint_path(folder, training.epoch)) as checkpoint:
        checkpoint.mkdir(parents=True)
        # From the CPU, so that they load where there is no GPU.
        weights = {name: tensor.cpu() for name, tensor in training.evaluated.state_dict().items()}
        torch.save(weights, checkpoint / WEIGHTS_FILE)
        (checkpoint / METRICS_FILE).write_text(json.dumps(training.history[-1]))


def saved_weights(folder: Path) -> dict[Path, dict]:
    """Return the path → metrics of all weights in a trial's folder; of damaged metrics, an empty dict."""
    found = {}
    for path in sorted(folder.glob("checkpoint_*")):
        try:
            metrics = json.loads((path / METRICS_FILE).read_text())
        except (OSError, ValueError, RecursionError):
            metrics = {}
        found[path] = metrics if isinstance(metrics, dict) else {}
    return found


def of_same_epoch(metrics: dict, other: dict) -> bool:
    """Tell whether two dicts of metrics are of the same epoch, of the same run of it: on a GPU, another run differs."""
    return all(metrics.get(key) == other.get(key) for key in ("epoch", "loss", "accuracy"))


def prune_weights(folder: Path, best: dict) -> None:
    """Delete the weights that are no better than those with the metrics best, which have been reported."""
    for path, metrics in saved_weights(folder).items():
        if path != checkpoint_path(folder, best["epoch"]) and not metrics.get("accuracy", 0) > best["accuracy"]:
            shutil.rmtree(path)


def save_training(training: Training, config: dict, folder: Path) -> None:
    """Write all that training goes on from after the epoch just done into a trial's folder.

    Of the older ones the newest stays, to fall back on; the others make room.

    Raises:
        OSError: naming the folder, when it cannot be written.
    """
    state = {
        "config": config,
        "history": training.history,
        "model": training.model.state_dict(),
        "momentum": training.optimizer.state_dict()["state"],
    }
    if training.averaged:
        state["averaged"] = training.averaged.state_dict()
    target = folder / f"training_{training.epoch:06}.pt"
    others = sorted(path for path in folder.glob("training_*.pt") if path != target)
    older = [path for path in others if path.name < target.name]
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in others:
            if path not in older[-1:]:
                path.unlink()
        with replacing(target) as path:
            torch.save(state, path)


def read_state(path: Path) -> dict | None:
    """Return the dict that torch.save wrote into a file, on the CPU, or None where it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # checks what torch.load does not: the checksums
                return None
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # of damaged bytes, the readers raise whatever they stumble over
        return None
    return state if isinstance(state, dict) else None


def restore_training(config: dict, num_classes: int, device: torch.device, folder: Path) -> Training:
    """Return a training as the newest state in a trial's folder that is whole has it, or a new one where there is none.

    Of states that are damaged, its notes tell.
    """
    training, damaged = new_training(config, num_classes, device), []
    for path in sorted(folder.glob("training_*.pt"), reverse=True):
        state = read_state(path)
        if state is None or state.get("config") != config:
            damaged.append(path.name)
            continue
        training.model.load_state_dict(state["model"])
        if training.averaged:
            training.averaged.load_state_dict(state["averaged"])
        # The rate is set at every step, and what else the groups hold is the config's.
        groups = training.optimizer.state_dict()["param_groups"]
        training.optimizer.load_state_dict({"state": state["momentum"], "param_groups": groups})
        training.history = state["history"]
        break
    if damaged:
        then = f"goes on from epoch {training.epoch}" if training.epoch else "starts again"
        training.notes.append(f"cannot read {' and '.join(damaged)} in {folder}, and {then}")
    return training


def run_trial(
    config: dict,
    dataset: Dataset,
    folder: Path,
    checkpoint_period: float,
    report: Callable[[dict], None],
    device: torch.device,
) -> Training:
    """Train one trial, and report every epoch.

    Before the report the weights are saved, if they are the best so far; and the state of the training, if it has
    trained for at least checkpoint_period seconds since that was saved last.

    Whatever became of an earlier process of the same trial, it goes on from the newest state in its folder. First it
    reports again what the epochs up to there had reported, as if the trial had never been interrupted.

    Args:
        config: the trial's.
        dataset: what to train on.
        folder: the trial's.
        checkpoint_period: seconds.
        report: gets the metrics of an epoch (see train_epochs), with a "note" where there is something to tell.
        device: where to train.
    """
    for path in (*folder.glob(".checkpoint_*"), *folder.glob(".training_*")):  # of a process killed while it wrote
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    training = restore_training(config, len(dataset.classes), device, folder)

    def tell(metrics: dict) -> None:
        note = "; ".join(training.notes)
        training.notes.clear()  # first, for where a trial is stopped, report does not return
        report(metrics | ({"note": note} if note else {}))

    for metrics in list(training.history):
        tell(metrics)
    # Of this training: weights that an earlier process saved at a later epoch are compared where they are read.
    known = [m for m in saved_weights(folder).values() if any(of_same_epoch(m, other) for other in training.history)]
    best = max((metrics["accuracy"] for metrics in known), default=-1.0)
    saved_at = training.seconds
    for metrics in train_epochs(training, config, dataset, device):
        improved = metrics["accuracy"] > best and math.isfinite(metrics["loss"])
        if improved:
            best = metrics["accuracy"]
            save_weights(training, folder)
        if metrics["seconds"] - saved_at >= checkpoint_period:
            saved_at = metrics["seconds"]
            save_training(training, config, folder)
        tell(metrics)
        if improved:
            prune_weights(folder, metrics)
    return training


def train_cifar(config: dict, images: Path, search_folder: Path, checkpoint_period: float) -> None:
    """Run one trial under Ray Tune on the dataset in the file images, in search_folder/<trial name>: see run_trial."""
    resources = tune.get_context().get_trial_resources()
    folder = search_folder / tune.get_context().get_trial_name()

    def run() -> None:
        torch.set_num_threads(max(1, int(resources.head_cpus)))
        device = best_device(resources.required_resources.get("GPU", 0))
        run_trial(config, map_dataset(images), folder, checkpoint_period, tune.report, device)

    done = Future()
    lasting_thread().put((run, done))
    try:
        done.result()  # raises what run raised, e.g. SystemExit when Tune stops it
    finally:
        del done  # breaks the cycle error → frame → done, which holds GPU memory


@functools.cache
def lasting_thread() -> SimpleQueue:
    """Start the thread that runs all trials of this process; return its queue of (function, Future).

    Tune starts a thread per trial, and cuDNN repeats its autotuning in every new thread.
    """
    tasks = SimpleQueue()

    def work() -> None:
        while True:
            run, done = tasks.get()
            try:
                done.set_result(run())
            except BaseException as error:
                done.set_exception(error)
            del run, done  # hold nothing while waiting

    threading.Thread(target=work, daemon=True).start()
    return tasks
