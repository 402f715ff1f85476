"""One config trained again, without Ray, and a model used: the command line of train.py."""

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from data import Dataset, InputError, fingerprint, read_images, read_picture, usable_cpus
from search.command_line import Parser, check_name, flag, print_error
from search.model_folder import CONFIG_FILE, load_model, read_description, write_model_folder
from search.output import printing_safely
from search.records import check_free, resolved, sealed, shown, unsealed, write_whole
from search.signals import interrupted_by_signals
from search.space import check_param_space
from search.trial import WEIGHTS_FILE, replacing, run_trial, saved_weights
from train import CONFIG_KEYS, best_device, evaluate, evaluation_batches, predict

PROGRAM = "train.py"
DESCRIPTION = """\
Train the config of a model again, without Ray, or classify pictures with a model.

    python train.py --from outputs/NAME/best_model                   # that config again
    python train.py --from outputs/NAME/best_model --full --seed 1   # on training and validation images together
    python train.py --predict cat.png --model outputs/NAME/best_model
"""
CHECKPOINT_PERIOD = 30  # seconds of training that a kill may cost
CLASSES_SHOWN = 5


def parse_value(text: str) -> object:
    """Return a hyperparameter's value as one types it: a number, True or False, or a word."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def parse_args(argv: Sequence[str] | None) -> dict:
    """Return the flags that were given.

    Raises:
        SystemExit: with 2 after a sentence on flags that do not exist; with 0 after --help.
        InputError: they make no sense together.
    """
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s --from FOLDER [FLAG ...] | --predict PICTURE ... --model FOLDER",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument_group("training").add_argument
    add(
        "--from",
        metavar="FOLDER",
        type=os.path.expanduser,
        help="model folder whose config is retrained, e.g. outputs/NAME/best_model",
    )
    add("--full", action="store_true", help="on training and validation images together, to the last epoch")
    add("--dataset", choices=("cifar100", "folder", "synthetic"), help="default: the images that the model had")
    add("--data-dir", metavar="PATH", type=os.path.expanduser, help="(default: where the images of the model were)")
    add("--output-dir", metavar="PATH", type=os.path.expanduser, help="default outputs")
    add("--name", help="of the new model's folder there; default retrained_<date>_<time>")
    add = parser.add_argument_group("predicting").add_argument
    add(
        "--predict",
        metavar="PICTURE",
        nargs="+",
        type=os.path.expanduser,
        help=f"print the {CLASSES_SHOWN} likeliest classes of each picture",
    )
    add("--model", metavar="FOLDER", type=os.path.expanduser, help="a model's folder")
    add("--help", "-h", action="help", help="show this")
    names = textwrap.fill(", ".join(map(flag, CONFIG_KEYS)), 76, break_on_hyphens=False)
    group = parser.add_argument_group("hyperparameters in place of the config's", names)
    for key in CONFIG_KEYS:
        group.add_argument(flag(key), metavar="VALUE", type=parse_value, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    training = [key for key in given if key not in ("predict", "model")]
    if "predict" in given and training:
        raise InputError(f"{flag(training[0])} cannot be combined with --predict; remove one of them")
    if ("predict" in given) != ("model" in given):
        raise InputError("--predict and --model go together: give the pictures and the model's folder")
    if "predict" not in given and "from" not in given:
        raise InputError("there is nothing to do: give --from or --predict, see --help")
    for key in ("from", "model", "output_dir", "data_dir", "name"):
        if not given.get(key, "").isprintable():
            raise InputError(f"{flag(key)} is {given[key]!r}, but must be a path that can be printed")
    return given


def predict_pictures(paths: list[str], model_folder: Path) -> None:
    """Print the likeliest classes of each picture, with their probabilities.

    Raises:
        InputError: a picture or the model cannot be read.
    """
    about = read_description(model_folder)
    model = load_model(model_folder / WEIGHTS_FILE, about["hyperparameters"], len(about["classes"]))
    if model is None:
        raise InputError(f"{model_folder / WEIGHTS_FILE} is damaged, or of another model: make the folder again")
    images = torch.stack([read_picture(path) for path in paths])
    device = best_device()
    labels = torch.zeros(len(images), dtype=torch.int64)
    batches = evaluation_batches(images, labels, about["mean"], about["std"], device)
    probabilities = predict(model.to(device, memory_format=torch.channels_last), batches)
    for path, row in zip(paths, probabilities, strict=True):
        print(path)
        for probability, i in zip(*row.topk(min(CLASSES_SHOWN, len(row))), strict=True):
            print(f"  {probability:.4f}  {about['classes'][i]}")


def with_validation_images(dataset: Dataset) -> Dataset:
    """Return a dataset whose validation images are training images, too, so that none are left for validation."""
    return replace(
        dataset,
        train_images=torch.cat([dataset.train_images, dataset.val_images]),
        train_labels=torch.cat([dataset.train_labels, dataset.val_labels]),
        val_images=dataset.val_images[:0],
        val_labels=dataset.val_labels[:0],
    )


def train_again(given: dict) -> int:
    """Train a model's config, with what was given in place of its values, test it once, and write its folder."""
    about = read_description(Path(given["from"]))
    changed = {key: given[key] for key in CONFIG_KEYS if key in given}
    config = about["hyperparameters"] | changed
    check_param_space(config)
    name = given.get("name") or datetime.now().strftime("retrained_%Y-%m-%d_%H-%M-%S")
    check_name(name)
    folder = resolved(given.get("output_dir", "outputs")) / name
    check_free(folder)
    source = about["images"]
    if given.get("dataset", source["source"]) != source["source"]:
        source = {"source": given["dataset"], "data_dir": "data", "synthetic": {}}
    if "data_dir" in given:
        source |= {"data_dir": str(resolved(given["data_dir"]))}
    dataset = read_images(**source)
    if given.get("full"):
        dataset = with_validation_images(dataset)
    work = folder.with_name(f".{name}.training")  # what a killed process leaves, and the next goes on from
    about_work = {"config": config, "images": fingerprint(dataset)}
    if work.exists():
        try:
            same = unsealed((work / CONFIG_FILE).read_bytes()) == about_work
        except (OSError, ValueError):
            same = False
        if not same:
            raise InputError(f"{shown(work)} is of another training: choose another --name, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / CONFIG_FILE, sealed(about_work))
    device = best_device()
    try:
        training = run_trial(
            config, dataset, work, CHECKPOINT_PERIOD, lambda m: print_epoch(m, config["epochs"]), device
        )
    except KeyboardInterrupt:
        given |= {"name": name}
        again = ["--full" if key == "full" else f"{flag(key)}={value}" for key, value in given.items()]
        print(f"Interrupted. To resume: {shlex.join(['python', PROGRAM, *again])}")
        raise
    best = max(saved_weights(work).items(), key=lambda entry: entry[1].get("accuracy", -1), default=None)
    if best is None:  # without validation images, the last epoch's
        weights, metrics = work / WEIGHTS_FILE, training.history[-1]
        with replacing(weights) as temporary:
            torch.save({key: tensor.cpu() for key, tensor in training.evaluated.state_dict().items()}, temporary)
    else:
        weights, metrics = best[0] / WEIGHTS_FILE, best[1]
    model = load_model(weights, config, len(dataset.classes)).to(device, memory_format=torch.channels_last)
    test = evaluation_batches(dataset.test_images, dataset.test_labels, dataset.mean, dataset.std, device)
    test_loss, test_accuracy = evaluate(model, test)
    validated = best is not None
    metrics = {
        "epoch": metrics["epoch"],
        "val_loss": metrics["loss"] if validated else None,
        "val_accuracy": metrics["accuracy"] if validated else None,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
    }
    write_model_folder(folder, weights, config, dataset, source, metrics)
    shutil.rmtree(work)
    if validated:
        print(f"validation accuracy: {metrics['val_accuracy']:.4f}, after epoch {metrics['epoch']}")
    print(f"test accuracy: {test_accuracy:.4f}")
    print(f"Model: {shown(folder)}")
    return 0


def print_epoch(metrics: dict, epochs: int) -> None:
    """Print a line on an epoch, and what there is to tell besides."""
    if "note" in metrics:
        print(f"This training {metrics['note']}.", file=sys.stderr)
    validation = f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.4f}  "
    if metrics["accuracy"] != metrics["accuracy"]:  # without validation images
        validation = ""
    print(
        f"epoch {metrics['epoch']:{len(str(epochs))}} of {epochs}  {validation}"
        f"train loss {metrics['train_loss']:.4f}  train accuracy {metrics['train_accuracy']:.4f}  "
        f"{metrics['seconds']:.0f} s",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of train.py and return its exit code.

    Returns:
        0 done; 2 bad input, after one sentence on stderr; 128 + n interrupted by signal n; 1 the disk is full.
    """
    with printing_safely(), interrupted_by_signals() as signals:
        try:
            given = parse_args(argv)
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
            if "predict" in given:
                predict_pictures(given["predict"], Path(given["model"]))
                return 0
            return train_again(given)
        except SystemExit as end:
            return end.code
        except ValueError as error:  # an InputError, or of check_name
            print_error(error, PROGRAM)
            return 2
        except OSError as error:
            print_error(error, PROGRAM)
            return 1
        except KeyboardInterrupt:
            return 128 + signals[0]


if __name__ == "__main__":
    sys.exit(main())
