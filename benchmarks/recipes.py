"""Final validation accuracy of training recipes, for the same config at equal epochs, over several random seeds.

python -m benchmarks.recipes --dataset folder --data-dir data/imagenet32-a --epochs 10 --h-1 16 --h-2 64

`plain loop` is the baseline's recipe in the baseline's own loop (see benchmarks.throughput); compared with `baseline`,
it shows what the faster loop costs in accuracy.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.throughput import baseline_steps, new_model, take
from data import Dataset, load_cifar100, load_folder, make_synthetic
from train import best_device, evaluate, evaluation_batches, new_training, train_epochs

# The recipe of the baseline: `param_space | BASELINE_RECIPE` trains as the baseline did.
BASELINE_RECIPE = {
    "momentum": 0.9,
    "weight_decay": 0.0,
    "nesterov": False,
    "augment": False,
    "schedule": "constant",
    "ema_decay": 0.0,
    "label_smoothing": 0.0,
}
CONFIG = {"p_drop": 0.1, "lr": 0.02, "batch_size": 64}
REGULARISED = BASELINE_RECIPE | {"weight_decay": 5e-4, "nesterov": True, "augment": True}
AVERAGED = REGULARISED | {"ema_decay": 0.998}
RECIPES = {
    "plain loop": BASELINE_RECIPE,
    "baseline": BASELINE_RECIPE,
    "+ augmentation, decay, Nesterov": REGULARISED,
    "+ averaged weights": AVERAGED,
    "+ averaged weights, cooldown": AVERAGED | {"schedule": "cooldown"},
    "+ averaged weights, cosine": AVERAGED | {"schedule": "cosine"},
    "+ averaged weights, one_cycle": AVERAGED | {"schedule": "one_cycle"},
}


def first_classes(dataset: Dataset, count: int) -> Dataset:
    """Return only the images of the first classes."""
    parts = {"classes": dataset.classes[:count]}
    for split in ("train", "val", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        parts |= {f"{split}_images": images[labels < count], f"{split}_labels": labels[labels < count]}
    return replace(dataset, **parts)


def accuracies(config: dict, dataset: Dataset) -> list[float]:
    """Train on the best device here, and return the validation accuracy after each epoch."""
    device = best_device()
    training = new_training(config, len(dataset.classes), device)
    return [report.accuracy for report in train_epochs(training, config, dataset, device)]


def accuracies_of_plain_loop(config: dict, dataset: Dataset) -> list[float]:
    """Train in the baseline's loop on the best device here, and return the validation accuracy after each epoch."""
    device = best_device()
    model = new_model(config, dataset, device)
    steps = baseline_steps(model, config, dataset, device)
    validation = evaluation_batches(dataset, "val", device)
    at_epoch = []
    for _ in range(config["epochs"]):
        model.train()
        take(steps, len(dataset.train_images) // config["batch_size"])
        at_epoch.append(evaluate(model, validation)[1])
    return at_epoch


def main(argv: Sequence[str] | None = None) -> None:
    """Train every recipe with every seed and print a table, or JSON, of the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("cifar100", "folder", "synthetic"), default="cifar100")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--classes", type=int, help="train on only the first N classes, to save time", metavar="N")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--h-1", type=int, default=64)
    parser.add_argument("--h-2", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=1, help="number of random seeds, from 0 (default: %(default)s)")
    parser.add_argument(
        "--only", metavar="RECIPE", action="append", choices=RECIPES, help="train only this recipe; repeatable"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    load = {"cifar100": load_cifar100, "folder": load_folder, "synthetic": lambda _: make_synthetic()}
    dataset = load[args.dataset](args.data_dir)
    if args.classes:
        dataset = first_classes(dataset, args.classes)
    if not args.json:
        print(f"{'recipe':34} {'final':>7} {'best':>7} {'±':>7}   mean accuracy after each epoch")
    for name in args.only or RECIPES:
        recipe, train = RECIPES[name], accuracies_of_plain_loop if name == "plain loop" else accuracies
        config = CONFIG | {"epochs": args.epochs, "h_1": args.h_1, "h_2": args.h_2} | recipe
        runs = [train(config | {"seed": seed}, dataset) for seed in range(args.seeds)]
        if args.json:
            print(json.dumps({"recipe": name, "config": config, "accuracies": runs}), flush=True)
            continue
        mean = [statistics.mean(at_epoch) for at_epoch in zip(*runs, strict=True)]
        spread = statistics.pstdev(run[-1] for run in runs)
        print(
            f"{name:34} {mean[-1]:7.4f} {max(mean):7.4f} {spread:7.4f}   {' '.join(f'{a:.3f}' for a in mean)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
