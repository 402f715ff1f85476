"""What a trial does besides training: restore, save and report, in a process that Ray starts.

<trial>/weights_<epoch>.pt   the weights of its best epoch, a state_dict
<trial>/training.pt          the training state: everything needed to continue
<trial>/constant_lr.pt       that just before the learning rate falls, for search.retrain --continue
"""

from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path

import torch
from ray import tune

from data import Dataset, map_dataset
from search.files import atomic_write, load_tensors
from search.records import METRICS, SEARCH_FILE, Objective
from train import Report, Training, best_device, constant_epochs, new_training, train_epochs

TRAINING_FILE, CONSTANT_LR_FILE = "training.pt", "constant_lr.pt"


def weights_path(folder: Path, epoch: int) -> Path:
    """Return the file in a trial's folder with the weights of an epoch."""
    return folder / f"weights_{epoch:06}.pt"


def save_weights(training: Training, path: Path) -> None:
    """Write the evaluated weights, loadable without a GPU; raise OSError, naming the file, if this fails."""
    weights = {name: tensor.cpu() for name, tensor in training.evaluated.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.save(weights, temporary)


def prune_weights(folder: Path, epochs: set[int]) -> None:
    """Delete the weights in a trial's folder except those of these epochs, and files that a killed process left."""
    kept = {weights_path(folder, epoch) for epoch in epochs}
    for path in (*folder.glob("weights_*"), *folder.glob(".*.tmp")):
        if path not in kept:
            path.unlink(missing_ok=True)


def save_training(training: Training, config: dict, path: Path) -> None:
    """Write the training state; raise OSError, naming the file, if this fails."""
    state = {
        "config": config,
        "history": [asdict(report) for report in training.history],
        "model": training.model.state_dict(),
        "momentum": training.optimizer.state_dict()["state"],
        "averaged": training.averaged.state_dict() if training.averaged else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def restore_training(config: dict, num_classes: int, device: torch.device, path: Path) -> Training:
    """Return the training saved in a file, or a new one, with a note if the saved one is unreadable.

    The saved one may have a different number of epochs.
    """
    training = new_training(config, num_classes, device)
    if not path.exists():
        return training
    state = load_tensors(path)
    fits = state and state.get("config", {}) | {"epochs": config["epochs"]} == config
    if not fits or any(list(report) != METRICS for report in state["history"]):
        training.notes.append(f"{path} is unreadable; restarting from scratch")
        return training
    training.model.load_state_dict(state["model"])
    if training.averaged:
        training.averaged.load_state_dict(state["averaged"])
    # The learning rates are set at every step; what else the groups hold comes from the config.
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": state["momentum"], "param_groups": groups})
    training.history = [Report(**report) for report in state["history"]]
    return training


def run_trial(
    config: dict,
    dataset: Dataset,
    folder: Path,
    objective: Objective,
    save_period: float,
    rungs: Collection[int],
    report: Callable[[dict], object],
    device: torch.device,
) -> None:
    """Train one trial, from where an earlier process stopped, and report every epoch.

    Before an epoch is reported, its weights are saved if they are the best so far, and the training state if at least
    save_period seconds of training have passed, or the trial may be paused, since the epoch is one of `rungs`. `report`
    is called with {"restored": the epoch of the training state}, then with the metrics of each epoch (see Report);
    those up to a restored state are reported again as they were. A "note" is added if the user should know something.
    """
    training = restore_training(config, len(dataset.classes), device, folder / TRAINING_FILE)
    constant = constant_epochs(config)

    def tell(metrics: dict) -> None:
        note = "; ".join(training.notes)
        training.notes.clear()  # first, since report does not return when it stops the trial
        report(metrics | ({"note": note} if note else {}))

    tell({"restored": training.epoch})
    for epoch in list(training.history):
        tell(asdict(epoch))
    saved, saved_seconds = training.epoch, training.seconds
    for epoch in train_epochs(training, config, dataset, device):
        best = objective.best(training.history)
        if best is epoch:
            save_weights(training, weights_path(folder, epoch.epoch))
        if epoch.epoch == constant:
            save_training(training, config, folder / CONSTANT_LR_FILE)
        if epoch.epoch in rungs or epoch.seconds - saved_seconds >= save_period:
            save_training(training, config, folder / TRAINING_FILE)
            saved, saved_seconds = epoch.epoch, epoch.seconds
        tell(asdict(epoch))
        # If this process dies, the trial restarts after `saved`, and its best epoch may be an earlier one again.
        best_saved = objective.best(training.history[:saved])
        prune_weights(folder, {each.epoch for each in (best, best_saved) if each})


def train_cifar(
    config: dict,
    images: Path,
    search_folder: Path,
    objective: Objective,
    save_period: float,
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
    device = best_device(resources.required_resources.get("GPU", 0))
    run_trial(config, map_dataset(images), folder, objective, save_period, rungs, tune.report, device)
