"""The best model of a search, and models on disk with everything needed to use and retrain them.

weights.pt     a state_dict, on the CPU
config.json    hyperparameters, classes, mean and std, source of the images, objective
metrics.json   its trial_id and epoch, val_loss, val_accuracy, test_loss, test_accuracy (and val_<METRIC> if another)
"""

import contextlib
import copy
import functools
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor, nn

from data import Dataset, InputError
from model import SmallResNet
from search.console import start_thread
from search.files import atomic_write, explain_failure, load_tensors, loads, write_json
from search.ray_runtime import usable_cpus
from search.records import Objective, Search, Trial, short_path
from search.space import check_value
from search.tensorboard import show_predictions
from search.trial import load_weights, save_weights, weights_path
from search.tuner import free_gpu_memory
from train import DEFAULTS, MODEL, best_device, evaluation_batches, logits_of, new_model, probabilities, score

BEST_MODEL = "best_model"
SPARE_MEMORY = 4e9  # bytes of a GPU; CUDA takes 0.5 GB of it
WEIGHTS, CONFIG, METRICS = "weights.pt", "config.json", "metrics.json"


def evaluate_best_model(search: Search, dataset: Dataset, source: dict) -> tuple[dict | None, Tensor | None]:
    """Test the best trial's model, once, and write best_model/; source is the arguments of data.read_images.

    If its weights are damaged or missing, say so on stderr and use those of the next best trial. Returns the content of
    metrics.json, and the model's class probabilities of each test image, float32 (N, C); None if no trial has a model.
    Raises InputError if model.py no longer fits the weights.
    """
    folder = search.folder / BEST_MODEL
    if folder.exists() and not read_metrics(folder):
        print(f"{short_path(folder)} is damaged; rebuilding it.", file=sys.stderr)
    for i, trial in enumerate(search.ranking()):
        path = weights_path(search.folder / trial.name, trial.best.epoch)
        if model := load_model(path, trial.config, dataset.classes):
            outputs = on_test_images(search, model, dataset)
            loss, accuracy = score(outputs)
            metrics = reported(search, trial) | {"test_loss": loss, "test_accuracy": accuracy}
            with contextlib.suppress(OSError):  # so that a kill from here on does not cost TensorBoard's pictures
                search.record("tested")
            write_model(folder, model, trial.config, dataset, source, search.objective, metrics)
            return metrics, probabilities(outputs)
        if i == 0 or path.exists():
            print(f"{trial.name} was better, but its weights are damaged or missing.", file=sys.stderr)
    return None, None


def show_best_model(search: Search, dataset: Dataset, predicted: Tensor | None) -> None:
    """Show in TensorBoard what the model in best_model/ predicts for the test images, and record that.

    predicted is the second value of evaluate_best_model, if an earlier process did not test the model.
    """
    if predicted is None:
        model, _ = read_model(search.folder / BEST_MODEL)
        predicted = probabilities(on_test_images(search, model, dataset))
    with explain_failure(search.folder / "events.out.tfevents"):
        show_predictions(search.folder, predicted, dataset)
    search.record("shown")


@functools.cache
def prepare_gpu() -> None:
    """Initialise CUDA in a thread, once, if other processes may share the GPU: the test will need it.

    Called when the last trials run, which can spare the memory.
    """

    def prepare() -> None:
        if torch.cuda.is_available() and free_gpu_memory() > SPARE_MEMORY:
            torch.zeros(1, device="cuda")

    start_thread(prepare)


def on_test_images(search: Search, model: nn.Module, dataset: Dataset) -> list[tuple[Tensor, Tensor]]:
    """Return what logits_of yields for the test images, computed on the GPU if the search may use one.

    If the GPU fails, say so on stderr and use the CPU.
    """
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    device = torch.device("cpu") if search.settings.gpus_per_trial == 0 else best_device()
    while True:
        try:
            on_device = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
            outputs = logits_of(on_device, evaluation_batches(dataset, "test", device))
            return [(logits.cpu(), labels.cpu()) for logits, labels in outputs]  # fails here, if the GPU does
        except RuntimeError as error:
            if device.type == "cpu":
                raise
            print(f"The GPU failed ({str(error).splitlines()[0]}); testing on the CPU.", file=sys.stderr)
            device = torch.device("cpu")


def reported(search: Search, trial: Trial) -> dict:
    """Return what metrics.json holds of a trial besides the test."""
    metrics = {f"val_{key}": getattr(trial.best, key) for key in search.objective.shown}
    return {"trial_id": trial.trial_id, "epoch": trial.best.epoch} | metrics


def read_best_model(search: Search) -> dict | None:
    """Return the metrics of best_model/ if it is intact and still holds the best model that there is, else None."""
    metrics = read_metrics(search.folder / BEST_MODEL) or {}
    for trial in search.ranking() if "test_accuracy" in metrics else ():
        if reported(search, trial).items() <= metrics.items():
            return metrics
        if weights_path(search.folder / trial.name, trial.best.epoch).exists():
            return None
    return None


def write_model(
    folder: Path, model: nn.Module, config: dict, dataset: Dataset, source: dict, objective: Objective, metrics: dict
) -> None:
    """Write a model's folder atomically; source is the arguments of data.read_images."""
    about = {"hyperparameters": config} | {key: getattr(dataset, key) for key in ("classes", "mean", "std")}
    with atomic_write(folder) as temporary:
        temporary.mkdir(parents=True)
        save_weights(model, temporary / WEIGHTS)
        write_json(temporary / CONFIG, about | {"images": source, "objective": astuple(objective)})
        write_json(temporary / METRICS, metrics)


def read_metrics(folder: Path) -> dict | None:
    """Return the metrics of a model's folder if all of it is intact, else None."""
    with contextlib.suppress(OSError, ValueError):
        loads((folder / CONFIG).read_bytes())
        if load_tensors(folder / WEIGHTS) is not None:
            return loads((folder / METRICS).read_bytes())
    return None


def read_model(folder: Path) -> tuple[SmallResNet, dict]:
    """Return the model in a folder, on the CPU, and the content of its config.json.

    Hyperparameters that its config lacks get their defaults. Raises InputError if the model is missing, damaged or from
    another version, or if model.py no longer fits it.
    """
    path = folder / CONFIG
    try:
        about = loads(path.read_bytes())
        config = about["hyperparameters"] = DEFAULTS | about["hyperparameters"]
        if not {"classes", "mean", "std", "images", "objective"} <= about.keys():
            raise ValueError
    except OSError as error:
        raise InputError(f"no model found in {str(folder)!r}; pass a folder such as outputs/NAME/best_model") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged, or from another version; pass another model") from error
    for key in MODEL:
        if key not in config:
            raise InputError(f"{path} lacks {key!r}; add its default in train.py, as in FRACTION(0.0)")
        check_value(key, config[key])
    model = load_model(folder / WEIGHTS, config, about["classes"])
    if model is None:
        raise InputError(f"{folder / WEIGHTS} is damaged; pass another model, or resume its search to rebuild it")
    return model, about


def load_model(weights: Path, config: dict, classes: Sequence[str]) -> SmallResNet | None:
    """Return the model of a config with weights from a file, on the CPU, or None if these are damaged or missing.

    Raises InputError if model.py no longer fits them.
    """
    if (state := load_tensors(weights)) is None:
        return None
    model = new_model(config, len(classes))
    load_weights(model, state, weights)
    return model
