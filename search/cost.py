"""What a good model costs, and whether a cheaper one is about as good."""

import functools
import math

import torch
from torch import Tensor, nn

from data import IMAGE_SIZE
from search.records import Search, Trial
from train import MODEL, new_model

COSTS = ("parameters", "gflop_per_image")


def model_cost(config: dict, num_classes: int) -> dict[str, float]:
    """Return the parameters of a config's model, and the GFLOP of its forward pass per image.

    These are the multiplications and additions of convolutions and linear layers. Returns {} if the config is
    incomplete, or the model cannot run on the meta device.
    """
    try:
        # Dropout costs nothing, and would differ between most configs.
        return measure(num_classes, *((key, 0.0 if key == "p_drop" else config[key]) for key in MODEL))
    except Exception:  # an edited model may raise anything; its trials will show it
        return {}


@functools.cache
def measure(num_classes: int, *sizes: tuple[str, object]) -> dict[str, float]:
    """Do what model_cost does, for sizes as pairs of names and values."""
    flop = []

    def count(layer: nn.Conv2d | nn.Linear, _: object, output: Tensor) -> None:
        flop.append(2 * layer.weight[0].numel() * output.numel())

    with torch.device("meta"), torch.inference_mode():
        model = new_model(dict(sizes), num_classes).eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(count)
        model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return dict(zip(COSTS, (sum(each.numel() for each in model.parameters()), sum(flop) / 1e9), strict=True))


def cheaper(search: Search, best: Trial) -> str:
    """Return a sentence about the cheapest trial that is about as good as the best; "" if that is the best itself.

    About as good means that its accuracy is lower by at most one standard error of a difference of two accuracies p and
    q on n validation images, √((p (1 − p) + q (1 − q)) / n); cheaper means fewer FLOPs per image.
    """

    def error(trial: Trial) -> float:
        p, q = trial.best.accuracy, best.best.accuracy
        return math.sqrt((p * (1 - p) + q * (1 - q)) / search.images["num_val"])

    others = [trial for trial in search.ranking() if trial.end and trial is not best]
    close = [trial for trial in others if best.best.accuracy - trial.best.accuracy <= error(trial)]
    costs = {trial: model_cost(trial.config, search.images["num_classes"]) for trial in (best, *close)}
    found = min(costs, key=lambda trial: costs[trial].get("gflop_per_image", math.inf))  # on a tie, the best
    if found is best or not costs[best]:
        return ""
    parameters, flop = (costs[found][key] / costs[best][key] for key in COSTS)
    return (
        f"Cheaper, within one standard error ({error(found):.4f}) of the best: {found.name} (accuracy "
        f"{found.best.accuracy:.4f}), with {flop:.0%} of the best one's FLOPs and {parameters:.0%} of its parameters."
    )
