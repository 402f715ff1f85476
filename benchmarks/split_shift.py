"""Test whether a folder's test images differ from its training images, with no code shared with the search.

python -m benchmarks.split_shift data/imagenet32-a

The classifier is ridge regression on pooled responses of random whitened patches used as convolution filters: Coates
and Ng 2012, "Learning Feature Representations with K-means", with random patches instead of the means. It is trained on
80 % of train/, and scored on the rest of train/ and on test/; then all images are pooled and redrawn.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

PATCH, FILTERS, RIDGE, REPEATS = 6, 500, 3000.0, 3


def read(folder: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    """Return float images (N, 3, 32, 32) from 0 to 1 and int64 labels (N,)."""
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.tensor([label for _, label in files])


def normalised_patches(images: Tensor, stride: int) -> Tensor:
    """Return patches (N, P, 108) with a mean of zero and a contrast of about one."""
    patches = F.unfold(images, PATCH, stride=stride).transpose(1, 2)
    patches = patches - patches.mean(2, keepdim=True)
    return patches / (patches.std(2, keepdim=True) + 0.05)


def features(images: Tensor) -> Tensor:
    """Return 8 · FILTERS features (N, F) of each image."""
    sample = normalised_patches(images[torch.randperm(len(images))[:2000]], 3).flatten(0, 1)
    sample = sample[torch.randperm(len(sample))[:50_000]]
    mean = sample.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((sample - mean).T))
    whiten = vectors @ torch.diag((values + 0.1) ** -0.5) @ vectors.T
    filters = F.normalize((sample[:FILTERS] - mean) @ whiten) @ whiten
    parts = []
    for part in images.split(500):
        response = (normalised_patches(part, 2) - mean) @ filters.T
        response = torch.cat([(response - 0.5).relu(), (-response - 0.5).relu()], dim=2).transpose(1, 2)
        parts.append(F.adaptive_avg_pool2d(response.reshape(len(part), -1, 14, 14), 2).flatten(1))
    return torch.cat(parts)


def accuracies(x: Tensor, y: Tensor, train: Tensor, tests: list[Tensor]) -> list[float]:
    """Return the accuracies on tests of ridge regression fitted on train; both are indices into x and y."""
    mean, std = x[train].mean(0), x[train].std(0) + 1e-3
    scaled = (x[train] - mean) / std
    targets = F.one_hot(y[train]).float() - 1 / (int(y.max()) + 1)
    weights = torch.linalg.solve(scaled.T @ scaled + RIDGE * torch.eye(scaled.shape[1]), scaled.T @ targets)
    return [(((x[t] - mean) / std @ weights).argmax(1) == y[t]).float().mean().item() for t in tests]


def main(argv: Sequence[str] | None = None) -> None:
    """Print, as a table or JSON, accuracies on held-out training images and on test images, as given and redrawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    classes = sorted(path.name for path in (args.folder / "train").iterdir())
    (x_train, y_train), (x_test, y_test) = (read(args.folder / split, classes) for split in ("train", "test"))
    x, y, num_train = features(torch.cat([x_train, x_test])), torch.cat([y_train, y_test]), len(y_train)
    cut = num_train * 4 // 5
    if not args.json:
        print("split      held out of train   test")
    for split in ("as given", "redrawn"):
        for _ in range(REPEATS):
            if split == "as given":
                order = torch.cat([torch.randperm(num_train), torch.arange(num_train, len(y))])
            else:
                order = torch.randperm(len(y))
            held_out, test = accuracies(x, y, order[:cut], [order[cut:num_train], order[num_train:]])
            row = {"split": split, "held_out": held_out, "test": test}
            print(json.dumps(row) if args.json else f"{split:10} {held_out:17.4f} {test:6.4f}", flush=True)


if __name__ == "__main__":
    main()
