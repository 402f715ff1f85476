"""Train one SmallResNet with one config: plain PyTorch.

A config is a dict of plain values with the keys of `param_space` in hparam_search.py. MODEL, OPTIMIZER, LOSS, BATCHES
and LOOP below define the valid values of each key.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.sgd import sgd
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data import IMAGE_SIZE, Batches, Dataset, InputError, epoch_seed
from model import SmallResNet

EVALUATION_BATCH_SIZE = 500
COOLDOWN = 0.3  # share of the steps, at the end, in which the learning rate decays
WARMUP = 0.3  # share of the steps, at the start, in which one_cycle raises the learning rate

# The factor by which the learning rates are multiplied after a fraction t of all steps.
SCHEDULES = {
    "constant": lambda t: 1.0,
    # Constant, then linear to zero: "trapezoidal", Xing et al. 2018, "A Walk with SGD".
    "cooldown": lambda t: min(1.0, (1 - t) / COOLDOWN),
    # Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", without the restarts.
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    # Smith and Topin 2018, "Super-Convergence": linear up, then linear down to zero.
    "one_cycle": lambda t: min(0.1 + 0.9 * t / WARMUP, (1 - t) / (1 - WARMUP)),
}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


@dataclass(frozen=True)
class Values:
    """The valid values of a hyperparameter; values(x) has the default x."""

    is_valid: Callable[[Any], bool]
    words: str  # for error messages
    default: Any = None  # the value in models and searches from before the hyperparameter existed

    def __call__(self, default: Any) -> "Values":
        return replace(self, default=default)


WHOLE = Values(lambda v: type(v) is int and 1 <= v <= 1_000_000, "a whole number from 1 to 1,000,000")
POSITIVE = Values(lambda v: _is_number(v) and v > 0, "a number above 0")
NOT_NEGATIVE = Values(lambda v: _is_number(v) and v >= 0, "a number of at least 0")
FRACTION = Values(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 up to but not including 1")
SWITCH = Values(lambda v: isinstance(v, bool), "True or False")
PADDING = Values(lambda v: type(v) is int and 0 <= v < IMAGE_SIZE, f"a whole number from 0 to {IMAGE_SIZE - 1}")
SCHEDULE = Values(lambda v: isinstance(v, str) and v in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
SEED = Values(lambda v: type(v) is int and 0 <= v < 2**63, "a whole number from 0 up to but not including 2**63")

# The hyperparameters. Those of MODEL are passed to SmallResNet, those of OPTIMIZER to PyTorch's sgd, those of LOSS to
# cross_entropy in training and those of BATCHES to Batches, as keyword arguments of the same names.
MODEL = {"h_1": WHOLE, "h_2": WHOLE, "p_drop": FRACTION(0.0)}
OPTIMIZER = {"lr": POSITIVE, "momentum": FRACTION(0.0), "weight_decay": NOT_NEGATIVE(0.0), "nesterov": SWITCH(False)}
LOSS = {"label_smoothing": FRACTION(0.0)}
BATCHES = {
    "batch_size": WHOLE,
    "crop_padding": PADDING(0),  # random crops after this many pixels of reflected padding
    "flip": SWITCH(False),  # random flips
    "seed": SEED(0),  # random seed of batches, weights and dropout
}
LOOP = {
    "epochs": WHOLE,
    "bias_lr": NOT_NEGATIVE(0.0),  # learning rate of batch norm's biases, unless lr is higher
    "schedule": SCHEDULE("constant"),  # learning-rate schedule
    "ema_decay": FRACTION(0.0),  # decay per step of the averaged weights; 0 switches averaging off
}
CONFIG_KEYS = MODEL | OPTIMIZER | LOSS | BATCHES | LOOP
DEFAULTS = {key: values.default for key, values in CONFIG_KEYS.items() if values.default is not None}


def arguments(config: dict, keys: dict) -> dict:
    """Return the part of a config with these keys."""
    return {key: config[key] for key in keys}


@dataclass(frozen=True)
class Report:
    """The metrics of one epoch."""

    epoch: int  # counted from 1
    loss: float  # validation loss: mean cross-entropy in nats; NaN if it is not finite
    accuracy: float  # validation accuracy, from 0 to 1
    train_loss: float  # training loss over the epoch, with the weights before each step and with label smoothing
    train_accuracy: float
    lr: float  # learning rate of the last step, except for batch norm's biases
    images_per_second: float  # during training, without validation
    seconds: float  # time for training and validation, over all epochs so far


@dataclass
class ParameterGroup:
    """Parameters that SGD changes at the same rate, with its state."""

    momentum: dict[Tensor, Tensor]  # parameter → its momentum
    peak_lr: float  # learning rate, before the schedule scales it
    weight_decay: float
    lr: Tensor  # of the current step; a tensor, so that a CUDA graph reads it at every step


@dataclass
class Training:
    """The state of a training run between epochs."""

    model: SmallResNet
    averaged: AveragedModel | None  # exponential moving average of the model's weights and batch norm statistics
    groups: list[ParameterGroup]
    history: list[Report] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # messages that the user has not been shown yet

    @property
    def epoch(self) -> int:
        """The number of epochs done."""
        return len(self.history)

    @property
    def seconds(self) -> float:
        """The duration of these epochs, over all processes of the trial."""
        return self.history[-1].seconds if self.history else 0.0

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and saved."""
        return self.averaged.module if self.averaged else self.model


def new_model(config: dict, num_classes: int) -> SmallResNet:
    """Build the model of a config, on the CPU."""
    return SmallResNet(**arguments(config, MODEL), num_classes=num_classes)


def new_training(config: dict, num_classes: int, device: torch.device) -> Training:
    """Build a model with weights drawn from config["seed"], its moving average and its parameter groups."""
    torch.manual_seed(config["seed"])
    model = new_model(config, num_classes).to(device, memory_format=torch.channels_last)
    averaged = AveragedModel(model) if config["ema_decay"] > 0 else None
    return Training(model, averaged, parameter_groups(model, config, device))


def parameter_groups(model: SmallResNet, config: dict, device: torch.device) -> list[ParameterGroup]:
    """Group a model's parameters: the biases of batch norm have the learning rate max(lr, bias_lr), the others lr.

    Page 2019, "How to Train Your ResNet 8: Bag of Tricks", and Jordan 2024, arXiv 2404.00498, use 64 times lr. A rate
    that does not depend on lr helps at low rates, too, and does no harm at high ones.

    Raises InputError for Nesterov's momentum without momentum, or with dampening.
    """
    if config["nesterov"] and (config["momentum"] == 0 or config.get("dampening")):
        raise InputError("nesterov True needs momentum above 0 and no dampening; change these, or make nesterov False")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    biases = dict.fromkeys(norm.bias for norm in norms if norm.bias is not None)
    others = [parameter for parameter in model.parameters() if parameter not in biases]
    lr, bias_lr = config["lr"], max(config["lr"], config["bias_lr"])
    weight_decay = config["weight_decay"]
    # The decay per step, lr · weight_decay, is that of the other weights.
    rates = (others, lr, weight_decay), (biases, bias_lr, weight_decay * lr / bias_lr)
    groups = []
    for parameters, rate, decay in rates:
        momentum: dict[Tensor, Tensor] = {each: torch.zeros_like(each) for each in parameters}
        groups.append(ParameterGroup(momentum, rate, decay, lr=torch.tensor(float(rate), device=device)))
    return groups


def best_device(name: str | None = None) -> torch.device:
    """Return the device of this name, cuda or cpu; by default the GPU, if there is one that torch can use.

    With cpu, hide all GPUs from this process, as torch might query even a broken one.
    Raises InputError for cuda without such a GPU.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return torch.device("cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA GPU that it can use; use --device cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 if the device supports it in hardware, else None, for float32."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        supported = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if supported else None


def train_epochs(training: Training, config: dict, dataset: Dataset, device: torch.device) -> Iterator[Report]:
    """Train and validate, yielding a report per epoch, from training.epoch + 1 to config["epochs"].

    `training` may be saved between epochs. All randomness of an epoch depends only on (config["seed"], epoch), so a
    restored training continues as if it had never been interrupted. Without validation images, loss and accuracy are
    NaN.
    """
    all_images, all_labels = dataset.train_images.to(device), dataset.train_labels.to(device)
    # A smaller last batch would add noise right before validation: see benchmarks/RESULTS.md.
    options = arguments(config, BATCHES) | {"shuffle": True, "drop_last": True}
    batches = Batches(all_images, all_labels, mean=dataset.mean, std=dataset.std, **options)
    validation = evaluation_batches(dataset, "val", device)
    # cuDNN's autotuning stays off: it takes seconds and gains under 1 % (see benchmarks/RESULTS.md).
    schedule = SCHEDULES[config["schedule"]]
    step = TrainStep(training, config, device)
    total_steps = config["epochs"] * len(batches)
    while training.epoch < config["epochs"]:
        start = time.perf_counter()
        epoch = training.epoch + 1
        torch.manual_seed(epoch_seed(config["seed"], epoch))  # dropout
        training.model.train()
        step.sums.zero_()
        for i, (images, labels) in enumerate(batches.epoch(epoch)):
            scale = schedule((training.epoch * len(batches) + i) / total_steps)
            step(images, labels, scale)
        # Read once per epoch, since reading makes the CPU wait for the GPU.
        train_loss, train_accuracy = (total / batches.count for total in step.sums.tolist())
        seconds = time.perf_counter() - start
        loss, accuracy = evaluate(training.evaluated, validation)
        report = Report(
            epoch=epoch,
            loss=loss if math.isfinite(loss) else math.nan,  # an infinity would spoil the scheduler's percentiles
            accuracy=accuracy,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            lr=config["lr"] * scale,
            images_per_second=batches.count / seconds,
            seconds=time.perf_counter() - start + training.seconds,
        )
        training.history.append(report)
        yield report


def sgd_step(training: Training, config: dict, images: Tensor, labels: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Take a step of SGD on float images (B, 3, 32, 32) and int64 labels (B,), under autocast unless dtype is None.

    Return the loss (nats) and the number of correct predictions before the step, summed over the batch, float32 (2,).
    """
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = training.model(images)
        loss = F.cross_entropy(logits, labels, **arguments(config, LOSS))
    training.model.zero_grad()
    loss.backward()
    # The function behind torch.optim.SGD, as the class imports torch._dynamo, which takes up to two seconds.
    options = {"dampening": 0.0, "maximize": False} | arguments(config, OPTIMIZER)  # sgd requires all of them
    with torch.no_grad():
        for group in training.groups:
            rates = {"lr": group.lr, "weight_decay": group.weight_decay}
            parameters = [each for each in group.momentum if each.grad is not None]  # an edited model may not use all
            gradients, momenta = [each.grad for each in parameters], [group.momentum[each] for each in parameters]
            sgd(parameters, gradients, momenta, fused=True, **options | rates)
    correct = (logits.detach().argmax(1) == labels).sum()
    return torch.stack([loss.detach() * len(labels), correct])


def evaluation_batches(dataset: Dataset, split: str, device: torch.device) -> Batches:
    """Return the images of a split (val or test) on the device, in order, not augmented."""
    images, labels = (getattr(dataset, f"{split}_{part}").to(device) for part in ("images", "labels"))
    return Batches(images, labels, EVALUATION_BATCH_SIZE, dataset.mean, dataset.std)


@torch.inference_mode()
def logits_of(model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits (B, C) and labels (B,) of an epoch of batches, on their device."""
    model.eval()
    device = batches.images.device
    dtype = autocast_dtype(device)
    for images, labels in batches.epoch():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(images)
        yield logits, labels


def score(outputs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the mean cross-entropy (nats) and the accuracy (0 to 1) of logits_of's outputs; NaN without any."""
    sums, count = torch.zeros(2), 0
    for logits, labels in outputs:
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        sums = sums.to(loss.device) + torch.stack([loss, (logits.argmax(1) == labels).sum()])
        count += len(labels)
    mean_loss, accuracy = (sums.double() / count).tolist() if count else (math.nan, math.nan)
    return mean_loss, accuracy


def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Return the mean cross-entropy, in nats, and the accuracy, from 0 to 1; NaN without images."""
    return score(logits_of(model, batches))


def probabilities(outputs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the class probabilities of what logits_of yields, float32 (N, C), on the CPU."""
    return torch.cat([logits.float() for logits, _ in outputs]).softmax(1).cpu()


# --- Below: the machinery of a fast step ------------------------------------------------------------------------------
# The loop above needs only step(images, labels, scale), which takes sgd_step and averages the weights, and step.sums.

EAGER_STEPS = 3  # steps to run eagerly before one is captured as a CUDA graph


class TrainStep:
    """A step of SGD and weight averaging, on a batch of images (B, 3, 32, 32) and int64 labels (B,).

    On a GPU, forward, backward and SGD are captured as one CUDA graph, since launching the kernels of a small batch one
    by one takes longer than running them. All batches must then have the same size. On a CPU, and once a capture
    has failed in this process (see training.notes), the same step runs eagerly.

    Attributes:
        failure: why this process no longer captures steps; a failed capture may leave torch's memory pools unusable.
        sums: float32 (2,), on the device: the loss (nats) and the number of correct predictions, summed over all images
            since it was zeroed, with the weights before each step.
    """

    failure: str | None = None

    def __init__(self, training: Training, config: dict, device: torch.device) -> None:
        self.training, self.config = training, config
        self.dtype = autocast_dtype(device)
        self.sums = torch.zeros(2, device=device)
        self.current = averaged_tensors(training.model)
        self.averaged = averaged_tensors(training.averaged.module) if training.averaged else []
        self.graphed = device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0
        self.aside = side_stream(device) if self.graphed else None
        if self.graphed and TrainStep.failure:
            self.run_eagerly()

    def __call__(self, images: Tensor, labels: Tensor, scale: float) -> None:
        """Take the step, with the learning rates multiplied by scale."""
        for group in self.training.groups:
            group.lr.fill_(group.peak_lr * scale)
        if self.graphed:
            self.replay(images, labels)
        else:
            self.descend(images, labels)
        if self.averaged:
            n = self.training.averaged.n_averaged  # updates so far; on the CPU, so reading it does not wait for the GPU
            # averaged ← d · averaged + (1 − d) · current, with d rising from 0 to ema_decay to forget the first steps.
            d = min(self.config["ema_decay"], int(n) / (9 + int(n)))
            get_ema_multi_avg_fn(d)(self.averaged, self.current, n)
            n += 1

    def descend(self, images: Tensor, labels: Tensor) -> None:
        """Take a step of SGD, eagerly or while it is captured."""
        self.sums += sgd_step(self.training, self.config, images, labels, self.dtype)

    def replay(self, images: Tensor, labels: Tensor) -> None:
        """Take a step of SGD with the graph, which is captured after a few eager steps."""
        if self.eager_steps < EAGER_STEPS:
            # Libraries choose their algorithms in these steps; capture requires a stream other than the default one.
            self.eager_steps += 1
            here = torch.cuda.current_stream()
            self.aside.wait_stream(here)
            with torch.cuda.stream(self.aside):
                self.descend(images, labels)
            here.wait_stream(self.aside)
            return
        if self.graph is None:
            self.capture(images, labels)
            if not self.graphed:
                self.descend(images, labels)
                return
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()

    def capture(self, images: Tensor, labels: Tensor) -> None:
        """Capture the step for batches of this size or, if that fails, train eagerly."""
        # Copying images into this tensor converts them to autocast's type.
        self.images = torch.empty_like(images, dtype=self.dtype)
        self.labels = torch.empty_like(labels)
        self.graph = torch.cuda.CUDAGraph()
        self.training.model.zero_grad()  # so that the graph allocates the gradients
        here, generator = torch.cuda.current_stream(), torch.cuda.default_generators[images.device.index]
        before = generator.clone_state()
        try:
            with torch.cuda.graph(self.graph, stream=self.aside):  # nothing is computed here
                self.descend(self.images, self.labels)
        except RuntimeError as error:
            # An aborted capture leaves its stream current, and the random generator in capture mode.
            torch.cuda.set_stream(here)
            generator.graphsafe_set_state(before)
            if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__context__, torch.OutOfMemoryError):
                raise  # the next trial may be narrower, and its process is a new one
            TrainStep.failure = str(error).splitlines()[0]
            self.run_eagerly()

    def run_eagerly(self) -> None:
        """Run all further steps eagerly, and note why."""
        self.graph, self.graphed = None, False
        self.training.notes.append(
            f"CUDA graph capture failed ({TrainStep.failure}); training eagerly, which is slower"
        )


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which steps are captured: one per process, as libraries keep a workspace per stream."""
    return torch.cuda.Stream(device)


def averaged_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors of a model to average: weights and batch norm statistics."""
    return [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
