"""A model on disk, with all that is needed to use it, train it again and trust it.

weights.pt     a state_dict, on the CPU
config.json    hyperparameters, classes, mean and std of the images, and where these came from
metrics.json   validation and test loss and accuracy, the epoch, and checksums of the other two
"""

import hashlib
import json
import shutil
from pathlib import Path

from data import Dataset, InputError
from model import SmallResNet
from search.records import sealed, unsealed
from search.space import check_param_space
from search.trial import METRICS_FILE, WEIGHTS_FILE, read_state, replacing
from train import new_model

CONFIG_FILE = "config.json"


def write_model_folder(
    folder: Path, weights: Path, config: dict, dataset: Dataset, source: dict, metrics: dict
) -> dict:
    """Write a model's folder, which is there whole or as it was.

    Args:
        folder: where.
        weights: the file to copy.
        config: the hyperparameters that it was trained with.
        dataset: what it was trained on.
        source: the arguments of data.read_images that this was read with.
        metrics: what metrics.json holds.

    Returns:
        The metrics, with "sha256" of the other files.
    """
    description = {
        "hyperparameters": config,
        "classes": dataset.classes,
        "mean": dataset.mean,
        "std": dataset.std,
        "images": source,
    }
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        shutil.copyfile(weights, temporary / WEIGHTS_FILE)
        (temporary / CONFIG_FILE).write_text(json.dumps(description, indent=2))
        metrics = metrics | {"sha256": {name: sha256(temporary / name) for name in (WEIGHTS_FILE, CONFIG_FILE)}}
        (temporary / METRICS_FILE).write_text(sealed(metrics, indent=2))
    return metrics


def read_metrics(folder: Path) -> dict | None:
    """Return what metrics.json of a model's folder holds, or None where one of the files there is damaged or gone."""
    try:
        metrics = unsealed((folder / METRICS_FILE).read_bytes())
        whole = all(sha256(folder / name) == digest for name, digest in metrics["sha256"].items())
    except (OSError, ValueError, LookupError):
        return None
    return metrics if whole else None


def read_description(folder: Path) -> dict:
    """Return what config.json of a model's folder holds.

    Raises:
        InputError: the folder is none, or one of another version.
    """
    path = folder / CONFIG_FILE
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder} holds no model ({error}): give a search's best_model folder") from error
    try:
        check_param_space(description["hyperparameters"])
        read = {key: description[key] for key in ("hyperparameters", "classes", "mean", "std", "images")}
    except (TypeError, LookupError, ValueError) as error:
        raise InputError(
            f"{path} is not what this version writes ({error}): give a model of this version, or use that other version"
        ) from error
    return read


def load_model(weights: Path, config: dict, num_classes: int) -> SmallResNet | None:
    """Return the model of a config with the weights in a file, on the CPU, or None where these are damaged or gone."""
    state = read_state(weights)
    if state is None:
        return None
    model = new_model(config, num_classes)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):  # of another model
        return None
    return model


def sha256(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
