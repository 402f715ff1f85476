"""Train a model's config again, without Ray: unchanged, with other values, or on all images.

python -m search.retrain outputs/NAME/best_model
python -m search.retrain outputs/NAME/best_model --full --test    # on training and validation images together
python -m search.retrain outputs/NAME/best_model --lr 0.02 --epochs 30
"""

import argparse
import ast
import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from data import Dataset, InputError, read_images
from search.best_model import read_model, write_model
from search.console import run_program
from search.ray_runtime import usable_cpus
from search.records import Objective, is_empty, new_folder, short_path
from search.settings import Parser, Settings, absolute_path, add_device, flag, folder_name
from search.space import check_space, check_value
from train import CONFIG_KEYS, best_device, evaluate, evaluation_batches, new_training, train_epochs

PROGRAM = "python -m search.retrain"


def parse_value(text: str) -> object:
    """Return a hyperparameter's value from its text: a number, True or False, or a word."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def parse_args(argv: Sequence[str] | None) -> dict:
    """Return the flags that were given."""
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("model", type=Path, help="model folder whose config is trained, e.g. outputs/NAME/best_model")
    add("--full", action="store_true", help="train on the validation images too, and keep the last epoch's weights")
    add("--test", action="store_true", help="also test the model; do not choose between models by the result")
    add("--data-dir", metavar="PATH", type=absolute_path, help="image folder (default: the original one)")
    add("--output-dir", metavar="PATH", type=absolute_path, help="parent of the new folder (default: outputs)")
    add("--name", type=folder_name, help="name of the new model folder (default: retrained_<date>_<time>)")
    add_device(parser)
    replaced = ", ".join(map(flag, CONFIG_KEYS))
    group = parser.add_argument_group("hyperparameters", f"replace those of the config: {replaced}")
    for key in CONFIG_KEYS:
        group.add_argument(flag(key), type=parse_value, help=argparse.SUPPRESS)
    return vars(parser.parse_args(argv))


def with_validation_images(dataset: Dataset) -> Dataset:
    """Return a dataset whose validation images have become training images."""
    return replace(
        dataset,
        train_images=torch.cat([dataset.train_images, dataset.val_images]),
        train_labels=torch.cat([dataset.train_labels, dataset.val_labels]),
        val_images=dataset.val_images[:0],
        val_labels=dataset.val_labels[:0],
    )


def retrain(given: dict) -> int:
    """Train a config, write its folder, and return the exit code."""
    _, about = read_model(given["model"])
    values, full = about["hyperparameters"] | given, "full" in given
    if missing := [flag(key) for key in CONFIG_KEYS if key not in values]:
        raise InputError(f"{given['model']} has no value for {missing[0]}; pass one")
    config = {key: values[key] for key in CONFIG_KEYS}
    for key, value in config.items():
        check_value(key, value)  # unlike check_space, it refuses grids
    check_space(config)
    device, objective = best_device(given["device"]), Objective(*about["objective"])
    name = given.get("name", f"retrained_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    folder = new_folder(Settings(output_dir=given.get("output_dir", "outputs"), name=name))
    source = about["images"]
    if "data_dir" in given:
        if source["source"] == "synthetic":
            raise InputError("--data-dir cannot be combined with synthetic images; remove it")
        source["data_dir"] = given["data_dir"]
    dataset = with_validation_images(read_images(**source)) if full else read_images(**source)
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))

    training = new_training(config, len(dataset.classes), device)
    for report in train_epochs(training, config, dataset, device):
        if not math.isfinite(report.train_loss):
            raise InputError(f"loss became NaN or infinite in epoch {report.epoch}; use a lower --lr")
        if objective.best(training.history) in (None, report):  # None: without validation images
            model, kept = copy.deepcopy(training.evaluated), report
        line = f"epoch {report.epoch:{len(str(config['epochs']))}} of {config['epochs']}  "
        line += "" if full else f"loss {report.loss:.4f}  accuracy {report.accuracy:.4f}  "
        line += f"train loss {report.train_loss:.4f}  train accuracy {report.train_accuracy:.4f}  "
        print(f"{line}{report.seconds:.0f} s", flush=True)

    metrics: dict[str, float] = {"epoch": kept.epoch}
    if not full:
        metrics |= {"val_loss": kept.loss, "val_accuracy": kept.accuracy}
        print(f"validation accuracy: {kept.accuracy:.4f}, at epoch {kept.epoch}")
    if "test" in given:
        metrics["test_loss"], metrics["test_accuracy"] = evaluate(model, evaluation_batches(dataset, "test", device))
        print(f"test accuracy: {metrics['test_accuracy']:.4f}")
    while folder.exists() and not is_empty(folder):  # taken by another process meanwhile
        folder = folder.with_name(f"{folder.name}_2")
    write_model(folder, model, config, dataset, source, objective, metrics)
    print(f"Model: {short_path(folder)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    return run_program(PROGRAM, lambda: retrain(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
