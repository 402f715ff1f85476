"""What a good model costs, and whether a cheaper one is about as good."""

import functools
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import IMAGE_SIZE
from search.records import Search, Trial
from train import MODEL, arguments, new_model


def model_cost(config: dict, num_classes: int) -> dict[str, float]:
    """Return the parameters of a config's model, and the GFLOP of its forward pass per image.

    These are the multiplications and additions of convolutions and matrix products.
    """
    # Dropout costs nothing, and would differ between most configs.
    return measure(num_classes, *(arguments(config, MODEL) | {"p_drop": 0.0}).items())


@functools.cache
def measure(num_classes: int, *sizes: tuple[str, object]) -> dict[str, float]:
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:  # computes nothing
        model = new_model(dict(sizes), num_classes).eval()
        model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "gflop_per_image": counter.get_total_flops() / 1e9}


def trial_cost(search: Search, trial: Trial) -> dict[str, float]:
    """Return the cost of a trial's model (see model_cost), and the images per second of its last epoch of training.

    What is not known yet is omitted.
    """
    cost = model_cost(trial.config, search.images["num_classes"]) if search.is_drawn(trial) else {}
    return cost | ({"images_per_second": trial.reports[-1].images_per_second} if trial.reports else {})


def cheaper(search: Search) -> list[str]:
    """Return a line about the cheapest trial that is about as good as the best, if it is cheaper.

    About as good means that its accuracy is lower by at most one standard error of a difference of two accuracies p and
    q on n validation images, √((p (1 − p) + q (1 − q)) / n); cheaper means fewer FLOPs per image.
    """

    def error(accuracy: float) -> float:
        other = best.best.accuracy
        return math.sqrt((accuracy * (1 - accuracy) + other * (1 - other)) / search.images["num_val"])

    best, *others = search.ranking()
    costs = {trial: trial_cost(search, trial) for trial in (best, *others)}
    close = [trial for trial in others if best.best.accuracy - trial.best.accuracy <= error(trial.best.accuracy)]
    found = min([best, *close], key=lambda trial: costs[trial]["gflop_per_image"])
    if costs[found]["gflop_per_image"] == costs[best]["gflop_per_image"]:
        return []
    parameters, gflop = (1 - costs[found][key] / costs[best][key] for key in ("parameters", "gflop_per_image"))
    accuracy = found.best.accuracy
    return [
        f"Within one standard error ({error(accuracy):.4f}) of the best, but cheaper: {found.name}, accuracy "
        f"{accuracy:.4f}, with {parameters:.0%} fewer parameters and {gflop:.0%} fewer FLOPs."
    ]
