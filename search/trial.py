"""What a trial does besides training: restore, save and report, in a process that Ray starts; and its files.

<trial>/weights_<epoch>.pt   the weights of its best epoch, a state_dict
<trial>/training.pt          the training state: everything needed to continue
<trial>/output.txt           what its process printed, if anything
<trial>/error.txt            the traceback if it failed
"""

import contextlib
import os
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path

import torch
from ray import tune
from torch import Tensor, nn

from data import Dataset, InputError, map_dataset
from search.files import load_tensors, remove, save_tensors
from search.records import SEARCH_FILE, Objective, Search, Trial, new_report
from train import DEFAULTS, Report, Training, best_device, new_training, train_epochs

TRAINING_FILE, OUTPUT_FILE, ERROR_FILE = "training.pt", "output.txt", "error.txt"


def weights_path(folder: Path, epoch: int) -> Path:
    """Return the file in a trial's folder with the weights of an epoch."""
    return folder / f"weights_{epoch:06}.pt"


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights, loadable without a GPU; raise OSError, naming the file, if this fails."""
    save_tensors({name: tensor.cpu() for name, tensor in model.state_dict().items()}, path)


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """Put weights that were read from a file into a model; raise InputError if they belong to another model."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: getattr(tensor, "shape", None) for name, tensor in weights.items()}
    different = next((name for name in expected | found if expected.get(name) != found.get(name)), None)
    if different:
        raise InputError(
            f"the weights in {path} do not fit model.py, where {different!r} was changed, added or removed; "
            "restore model.py, or start a new search"
        )
    model.load_state_dict(weights)


def prune_weights(folder: Path, epochs: set[int]) -> None:
    """Delete the weights in a trial's folder except those of these epochs, and files that a killed process left."""
    kept = {weights_path(folder, epoch) for epoch in epochs}
    for path in (*folder.glob("weights_*"), *folder.glob(".*.tmp")):
        if path not in kept:
            remove(path)


def prune(search: Search, trials: list[Trial], models_kept: int | None) -> None:
    """Delete what these ended trials no longer need: training states, errors, and weights except those of the best.

    Of the ended trials with weights (taken ones may have none), the models_kept best (None: all) keep those of their
    best epoch.
    """
    ranking = [
        trial
        for trial in search.ranking()
        if trial.end and weights_path(search.folder / trial.name, trial.best.epoch).exists()
    ]
    for trial in (*trials, *ranking):
        folder = search.folder / trial.name
        remove(folder / TRAINING_FILE)
        remove(folder / ERROR_FILE)
        if (output := folder / OUTPUT_FILE).exists() and not output.stat().st_size:
            remove(output)
        prune_weights(folder, {trial.best.epoch} if trial in ranking[:models_kept] else set())


def save_training(training: Training, config: dict, path: Path) -> None:
    """Write the training state; raise OSError, naming the file, if this fails."""
    state = {
        "config": config,
        "history": [asdict(report) for report in training.history],
        "model": training.model.state_dict(),
        "momenta": momenta(training),
        "averaged": training.averaged.state_dict() if training.averaged else None,
    }
    save_tensors(state, path)


def momenta(training: Training) -> dict[str, Tensor]:
    """Return the momentum of each parameter, by the parameter's name."""
    known = {parameter: momentum for group in training.groups for parameter, momentum in group.momentum.items()}
    return {name: known[parameter] for name, parameter in training.model.named_parameters()}


def restore_training(config: dict, num_classes: int, device: torch.device, path: Path) -> Training:
    """Return the training saved in a file, or a new one, with a note if the saved one is unreadable.

    Raises InputError if model.py no longer fits it.
    """
    training = new_training(config, num_classes, device)
    if not path.exists():
        return training
    state = load_tensors(path)
    # Earlier versions saved the momentum in another form.
    if not state or "momenta" not in state or DEFAULTS | state.get("config", {}) != config:
        training.notes.append(f"{path} is unreadable; restarting from scratch")
        return training
    load_weights(training.model, state["model"], path)
    if training.averaged:
        training.averaged.load_state_dict(state["averaged"])
    for name, momentum in momenta(training).items():
        momentum.copy_(state["momenta"][name])
    training.history = [new_report(report) for report in state["history"]]
    return training


def run_trial(
    config: dict,
    dataset: Dataset,
    folder: Path,
    objective: Objective,
    save_period: float | None,
    rungs: Collection[int],
    report: Callable[[dict], object],
    device: torch.device,
) -> None:
    """Train one trial, from where an earlier process stopped, and report every epoch.

    Before an epoch is reported, its weights are saved if they are the best so far, and the training state if at least
    save_period seconds of training have passed (None: never), or the trial may be paused, since the epoch is one of
    `rungs`. `report` is called first with {"restored": the epoch of the training state, "reports": all up to it}, then
    with {"reports": [the next one]}, as dicts of Report's fields; "note" is added if the user should know something.
    """
    training = restore_training(config, len(dataset.classes), device, folder / TRAINING_FILE)

    def tell(reports: list[Report], **more: object) -> None:
        note = {"note": "; ".join(training.notes)} if training.notes else {}
        training.notes.clear()  # first, since report does not return when it stops the trial
        report({"reports": [asdict(each) for each in reports]} | more | note)

    tell(training.history, restored=training.epoch)
    saved, saved_seconds = training.epoch, training.seconds
    for epoch in train_epochs(training, config, dataset, device):
        best = objective.best(training.history)
        if best is epoch:
            save_weights(training.evaluated, weights_path(folder, epoch.epoch))
        is_due = save_period is not None and epoch.seconds - saved_seconds >= save_period
        if epoch.epoch in rungs or is_due:
            save_training(training, config, folder / TRAINING_FILE)
            saved, saved_seconds = epoch.epoch, epoch.seconds
        tell([epoch])
        # If this process dies, the trial restarts after `saved`, and its best epoch may be an earlier one again.
        best_saved = objective.best(training.history[:saved])
        prune_weights(folder, {each.epoch for each in (best, best_saved) if each})


def train_cifar(
    config: dict,
    images: Path,
    search_folder: Path,
    objective: Objective,
    save_period: float | None,
    rungs: Collection[int],
) -> None:
    """Run one trial under Ray Tune in search_folder/<its name>, on the dataset in the file `images` (see run_trial).

    Raises OSError if this machine does not see search_folder, or if it cannot be written.
    """
    if not (search_folder / SEARCH_FILE).exists():
        raise OSError(
            f"this machine does not see {search_folder}; pass an --output-dir on a disk that all machines share"
        )
    resources = tune.get_context().get_trial_resources()
    folder = search_folder / tune.get_context().get_trial_name()
    torch.set_num_threads(max(1, int(resources.head_cpus)))
    # A worker without a GPU still sees all of them. Hide them, as torch might query even a broken one.
    device = best_device(None if resources.required_resources.get("GPU", 0) else "cpu")
    print_into(folder / OUTPUT_FILE)
    run_trial(config, map_dataset(images), folder, objective, save_period, rungs, tune.report, device)


def print_into(path: Path) -> None:
    """Append all further output and logs of this process to a file, if it can be opened."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            for number in (1, 2):  # stdout and stderr, also of C++ libraries
                os.dup2(file.fileno(), number)
