"""What a model costs, and whether a cheaper one is about as good."""

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
SLOWEST_RATE = 50  # GFLOP per second that any machine reaches


def model_cost(config: dict, num_classes: int) -> dict[str, float]:
    """Return how many parameters a config's model has, and the GFLOP of its forward pass per image.

    FLOP are the multiplications and additions of convolutions and linear layers. Returns {} if the config is
    incomplete, or the model cannot be built on the meta device.
    """
    try:
        parameters, flop, _ = measure(num_classes, **model_arguments(config))
    except Exception:  # an edited model may raise anything; its trials will show it
        return {}
    return {"parameters": parameters, "gflop_per_image": flop / 1e9}


def trial_memory(config: dict) -> float:
    """Return about how many bytes of a GPU a trial needs; infinity if that is unknown.

    These are CUDA itself and the images (1 GB); weights, gradients, momentum and averages in float32; and what training
    and validation keep per output of a convolution. At 128/1024 the sum is 2.3 GB, as measured on an H200.
    """
    try:
        parameters, _, outputs = measure(100, **model_arguments(config))
    except Exception:  # see model_cost
        return math.inf
    return 1e9 + 20 * parameters + outputs * (8 * config["batch_size"] + 2 * EVALUATION_BATCH_SIZE)


def model_arguments(config: dict) -> dict:
    """Return the arguments of a config's model; without dropout, which costs nothing and would differ between most."""
    return arguments(config, MODEL) | {"p_drop": 0.0}


@functools.cache
def measure(num_classes: int, **config: object) -> tuple[int, int, int]:
    """Return the parameters of a model, and for one image its FLOP and the outputs of layers that take them."""
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
    """Say on stderr how long an epoch of the widest of these configs takes without a GPU, if that is over two minutes.

    The estimate is its FLOP over the rate, with so many CPUs, of narrower widths; a backward pass takes twice the FLOP
    of a forward pass. A trial ends after max_seconds, unless None.
    """
    widest = max(configs, key=lambda config: model_cost(config, len(dataset.classes)).get("gflop_per_image", 0))
    gflop = model_cost(widest, len(dataset.classes)).get("gflop_per_image", 0)
    gflop *= 3 * len(dataset.train_labels) + len(dataset.val_labels)
    if gflop < SLOWEST_RATE * SLOW_EPOCH:
        return
    example = widest | {key: min(widest[key], narrow) for key, narrow in {"h_1": 64, "h_2": 256}.items()}
    images, dtype = torch.zeros(16, 3, IMAGE_SIZE, IMAGE_SIZE), autocast_dtype(torch.device("cpu"))
    model = new_model(example, len(dataset.classes)).to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(cpus)
    for _ in range(2):  # the first time is slower
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(images).float().logsumexp(1).sum()
        loss.backward()
        seconds = time.perf_counter() - start
    torch.set_num_threads(before)
    epoch = gflop * seconds / (3 * len(images) * model_cost(example, len(dataset.classes))["gflop_per_image"])
    if epoch >= SLOW_EPOCH:
        widths = " and ".join(f"{key} {widest[key]}" for key in ("h_1", "h_2"))
        limit = f", and MAX_SECONDS_PER_TRIAL ends a trial after {max_seconds / 60:.0f}" if max_seconds else ""
        print(
            f"Without a GPU, an epoch with {widths} takes about {epoch / 60:.0f} minutes here{limit}; "
            "search smaller widths, or use a GPU.",
            file=sys.stderr,
        )


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
