"""What a model costs, and whether a cheaper one is about as good."""

import functools
import math

import torch
from torch import Tensor, nn

from data import IMAGE_SIZE
from search.records import Search, Trial
from train import MODEL, arguments, new_model

COSTS = ("parameters", "gflop_per_image")


def model_cost(config: dict, num_classes: int) -> dict[str, float]:
    """Return how many parameters a config's model has, and the GFLOP of its forward pass per image.

    FLOP are the multiplications and additions of convolutions and linear layers. Returns {} if the config is
    incomplete, or the model cannot be built on the meta device.
    """
    try:
        # Dropout costs nothing, and would differ between most configs.
        return measure(num_classes, **arguments(config, MODEL) | {"p_drop": 0.0})
    except Exception:  # an edited model may raise anything; its trials will show it
        return {}


@functools.cache
def measure(num_classes: int, **config: object) -> dict[str, float]:
    """Do what model_cost does, once for equal configs."""
    flop = []

    def count(layer: nn.Conv2d | nn.Linear, _: object, output: Tensor) -> None:
        flop.append(2 * layer.weight[0].numel() * output.numel())

    with torch.device("meta"):  # draws no weights
        model = new_model(config, num_classes).eval()
    model.to_empty(device="cpu")  # running it on the meta device would import torch._dynamo, for two seconds
    with torch.inference_mode():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(count)
        model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return {"parameters": sum(each.numel() for each in model.parameters()), "gflop_per_image": sum(flop) / 1e9}


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
