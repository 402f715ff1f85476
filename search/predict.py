"""Classify pictures with a model.

python -m search.predict outputs/NAME/best_model PICTURE.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data import Batches, read_picture
from search.best_model import read_model
from search.console import run_program
from search.settings import Parser, add_device
from train import EVALUATION_BATCH_SIZE, best_device, logits_of, probabilities

PROGRAM = "python -m search.predict"
CLASSES_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Print the likeliest classes of each picture with their probabilities, and return the exit code."""

    def work() -> int:
        parser = Parser(PROGRAM, __doc__)
        parser.add_argument("model", type=Path, help="model folder, e.g. outputs/NAME/best_model")
        parser.add_argument("pictures", nargs="+", help=f"pictures; prints {CLASSES_SHOWN} likely classes of each")
        add_device(parser)
        args = parser.parse_args(argv)
        model, about = read_model(args.model)
        device = best_device(args.device)
        images = torch.stack([read_picture(path) for path in args.pictures]).to(device)
        no_labels = torch.zeros(len(images), device=device)
        batches = Batches(images, no_labels, EVALUATION_BATCH_SIZE, about["mean"], about["std"])
        rows = probabilities(logits_of(model.to(device), batches))
        for path, row in zip(args.pictures, rows, strict=True):
            print(path)
            for probability, i in zip(*row.topk(min(CLASSES_SHOWN, len(row))), strict=True):
                print(f"  {probability:.4f}  {about['classes'][i]}")
        return 0

    return run_program(PROGRAM, work)


if __name__ == "__main__":
    sys.exit(main())
