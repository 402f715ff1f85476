"""Record learning curves of configs drawn from param_space, for benchmarks.replay to compare draws and schedulers on.

    python -m benchmarks.curves                                                   # CIFAR-100, on a GPU
    python -m benchmarks.curves --dataset folder --data-dir data/imagenet32-a --classes 20 --h-1 8 16 --h-2 32 64

Every config is trained to its last epoch. benchmarks/curves/ gets a CSV per recipe, with a row per epoch. After
an interruption, run the same command again to record the missing configs.
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from ray import tune

from benchmarks import recipes
from data import read_images
from hparam_search import param_space
from search.files import atomic_write
from search.sampler import draw_configs

FOLDER = Path(__file__).parent / "curves"
DRAWN = ("h_1", "h_2", "p_drop", "lr")
REPORTED = ("loss", "accuracy", "train_loss", "train_accuracy", "seconds")
COLUMNS = ("config", *DRAWN, "epoch", *REPORTED)
FLOATS = ("p_drop", "lr", *REPORTED)


def read_curves(path: Path) -> dict[int, list[dict]]:
    """Read a CSV that main wrote: config → its rows, one per epoch in order, with the keys of COLUMNS."""
    curves = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        numbers = {key: float(value) if key in FLOATS else int(value) for key, value in row.items()}
        curves.setdefault(numbers["config"], []).append(numbers)
    return curves


def best_accuracy(curve: Sequence[dict]) -> float:
    """Return the best accuracy of a curve."""
    return max(row["accuracy"] for row in curve)


def write_curves(path: Path, curves: dict[int, list[dict]]) -> None:
    """Write the CSV that read_curves reads, atomically."""
    lines = [COLUMNS, *([row[key] for key in COLUMNS] for i in sorted(curves) for row in curves[i])]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))


def main(argv: Sequence[str] | None = None) -> None:
    """Train the configs that are not recorded yet, and add their curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("cifar100", "folder", "synthetic"), default="cifar100")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--classes", type=int, help="train on only the first N classes, to save time", metavar="N")
    parser.add_argument("--h-1", type=int, nargs="+", help="widths to use (default: those of param_space)")
    parser.add_argument("--h-2", type=int, nargs="+", help="widths to use (default: those of param_space)")
    parser.add_argument("--epochs", type=int, default=param_space["epochs"])
    parser.add_argument("--samples", type=int, default=15, help="draws for each pair of widths (default: %(default)s)")
    parser.add_argument("--recipe", choices=recipes.NAMED, default="default")
    parser.add_argument("--seed", type=int, default=0, help="random seed of draws and training (default: 0)")
    parser.add_argument(
        "--seeds", type=int, default=1, help="train the best 5 configs with this many seeds (default: 1)", metavar="N"
    )
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args(argv)
    dataset = recipes.first_classes(read_images(args.dataset, args.data_dir, {}), args.classes)
    widths = {key: tune.grid_search(values) for key, values in (("h_1", args.h_1), ("h_2", args.h_2)) if values}
    args.output.mkdir(parents=True, exist_ok=True)
    space = param_space | {"seed": args.seed, "epochs": args.epochs} | widths | recipes.NAMED[args.recipe]
    configs = draw_configs(space, [args.samples], args.seed)
    path = args.output / f"{args.recipe}.csv"
    curves = read_curves(path) if path.exists() else {}
    for i, rows in curves.items():
        if i < len(configs) and (len(rows) != args.epochs or rows[0]["lr"] != configs[i]["lr"]):
            sys.exit(f"{path} has curves of other configs; use another --output, or remove it.")

    def record(i: int, config: dict) -> None:
        if i not in curves:
            drawn = {"config": i} | {key: config[key] for key in DRAWN}
            curves[i] = [
                drawn | {key: round(getattr(report, key), 5) for key in ("epoch", *REPORTED)}
                for report in recipes.train(config, dataset)
            ]
            write_curves(path, curves)
            print(f"{len(curves)}: {curves[i][-1]['accuracy']:.4f}", flush=True)

    for i, config in enumerate(configs):
        record(i, config)
    best = sorted(range(len(configs)), key=lambda i: -best_accuracy(curves[i]))[:5]
    for number, (more, i) in enumerate(itertools.product(range(1, args.seeds), best), len(configs)):
        record(number, configs[i] | {"seed": args.seed + more})


if __name__ == "__main__":
    main()
