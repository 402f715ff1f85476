"""What a model costs, and whether a cheaper one is about as good."""

import contextlib
import functools
import math
import sys
import time

import torch
from torch import Tensor, nn

from data import IMAGE_SIZE, Dataset
from search.records import Search, Trial
from train import EVALUATION_BATCH_SIZE, MODEL, arguments, autocast_dtype, new_model

COSTS = ("parameters", "gflop_per_image")
SLOW_EPOCH = 120  # seconds of an epoch, without a GPU, from which it is worth a warning
SLOW_RATE = 20  # GFLOP per second of a slow machine; if an epoch is short even there, it is not measured


def model_cost(config: dict, num_classes: int) -> dict[str, float]:
    """Return how many parameters a config's model has, and the GFLOP of its forward pass per image (see measure)."""
    found = measure(config, num_classes)
    return {"parameters": found[0], "gflop_per_image": found[1] / 1e9} if found else {}


def trial_memory(config: dict) -> float:
    """Return about how many bytes of a GPU a trial needs; infinity if that is unknown.

    1 GB for CUDA and the images; weights, gradients, momentum and averages; and outputs of layers, in training and in
    validation. At 128/1024 the sum is 2.3 GB, as measured on an H200.
    """
    parameters, _, outputs = measure(config, 100) or (math.inf, 0, 0)
    return 1e9 + 20 * parameters + outputs * (8 * config["batch_size"] + 2 * EVALUATION_BATCH_SIZE)


def measure(config: dict, num_classes: int) -> tuple[int, int, int] | None:
    """Return a model's parameters, and for an image its FLOP and the outputs of the layers that take them.

    FLOP are the multiplications and additions of convolutions and linear layers. Returns None if the config is
    incomplete, or the model cannot be built on the meta device.
    """
    try:
        # Dropout costs nothing, and would differ between most configs.
        return measure_model(num_classes, **arguments(config, MODEL) | {"p_drop": 0.0})
    except Exception:  # an edited model may raise anything; its trials will show it
        return None


@functools.cache
def measure_model(num_classes: int, **config: object) -> tuple[int, int, int]:
    """Do what measure does, once for equal configs."""
    flop, outputs = [], []

    def count(layer: nn.Conv2d | nn.Linear, _: object, output: Tensor) -> None:
        flop.append(2 * layer.weight[0].numel() * output.numel())
        outputs.append(output.numel())

    with torch.device("meta"):  # draws no weights
        model = new_model(config, num_classes).eval()
    model.to_empty(device="cpu")  # running it on the meta device would import torch._dynamo, for two seconds
    with torch.inference_mode():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(count)
        model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return sum(each.numel() for each in model.parameters()), sum(flop), sum(outputs)


def warn_of_slow_epochs(configs: list[dict], dataset: Dataset, cpus: int, max_seconds: float | None) -> None:
    """Say on stderr how long an epoch of the widest of these configs takes with so many CPUs, if that is minutes.

    Measured on a few images. A trial ends after max_seconds, unless None.
    """
    gflop = [model_cost(config, len(dataset.classes)).get("gflop_per_image", 0) for config in configs]
    widest = configs[gflop.index(max(gflop))]
    passes = 3 * len(dataset.train_labels) + len(dataset.val_labels)  # in training, forward and twice as much backward
    if max(gflop) * passes < SLOW_EPOCH * SLOW_RATE:
        return
    model, images = new_model(widest, len(dataset.classes)), torch.zeros(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    dtype, threads = autocast_dtype(torch.device("cpu")), torch.get_num_threads()
    torch.set_num_threads(cpus)
    seconds = 0.0
    with contextlib.suppress(Exception):  # an edited model may raise anything; its trials will show it
        for _ in range(2):  # the first time is slower
            start = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                model(images).sum().backward()
            seconds = (time.perf_counter() - start) / (3 * len(images)) * passes
    torch.set_num_threads(threads)
    widths = " and ".join(f"{key} {widest[key]}" for key in MODEL if type(widest[key]) is int)
    limit = f", and MAX_SECONDS_PER_TRIAL ends a trial after {max_seconds / 60:.0f}" if max_seconds else ""
    sentence = f"Without a GPU, an epoch with {widths} takes about {seconds / 60:.0f} minutes here{limit}"
    if seconds >= SLOW_EPOCH:
        print(f"{sentence}; search smaller widths, or use a GPU.", file=sys.stderr)


def cheaper(search: Search, best: Trial) -> str:
    """Return a sentence about the cheapest trial that is about as good as the best; "" if that is the best itself.

    About as good means that its accuracy is lower by at most one standard error of a difference of two accuracies p and
    q on n validation images, √((p (1 − p) + q (1 − q)) / n); cheaper means fewer FLOPs per image.
    """
    flop, q = {}, best.best.accuracy
    for trial in [best, *search.ranking()]:
        p = trial.best.accuracy
        if (trial.end or trial is best) and q - p <= math.sqrt((p * (1 - p) + q * (1 - q)) / search.images["num_val"]):
            cost = model_cost(trial.config, search.images["num_classes"])
            flop[trial] = cost.get("gflop_per_image", math.inf)
    found = min(flop, key=flop.__getitem__)  # on a tie, the best
    if found is best:
        return ""
    about = f"accuracy {found.best.accuracy:.4f}, {flop[found] / flop[best]:.0%} of the FLOPs"
    return f"Cheaper, within one standard error of the best: {found.name} ({about})."
