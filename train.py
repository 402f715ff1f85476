"""Train one SmallResNet with one config: plain PyTorch, and at the end the thin function that Ray Tune runs.

A config is a dict of plain values with the keys of `param_space` in hparam_search.py. What each of them may be stands
below, in MODEL, OPTIMIZER, LOSS and LOOP.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from ray import tune
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data import Batches, Dataset, epoch_seed
from model import SmallResNet

EVALUATION_BATCH_SIZE = 500
EAGER_STEPS = 3  # of a trial, before its step is captured as a CUDA graph
COOLDOWN = 0.3  # share of the epochs
WARMUP = 0.3  # of one_cycle, share of the epochs
WEIGHTS_FILE, METRICS_FILE = "weights.pt", "metrics.json"
# What an epoch reports: see train_epochs.
METRICS = ("epoch", "loss", "accuracy", "train_loss", "train_accuracy", "lr", "images_per_second", "seconds")

# The learning rate, as a fraction of config["lr"], when a fraction t of all steps is done.
SCHEDULES = {
    "constant": lambda t: 1.0,
    # Constant, then linear to zero: "trapezoidal", Xing et al. 2018, "A Walk with SGD".
    "cooldown": lambda t: min(1.0, (1 - t) / COOLDOWN),
    # Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", without the restarts.
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    # Smith and Topin 2018, "Super-Convergence": linear up, then linear down to zero.
    "one_cycle": lambda t: min(0.1 + 0.9 * t / WARMUP, (1 - t) / (1 - WARMUP)),
}


def _is_whole(value: object) -> bool:
    return type(value) is int and 1 <= value <= 1_000_000


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


# What a hyperparameter may be: a test, and the words for it.
WHOLE = (_is_whole, "a whole number from 1 to 1,000,000")
POSITIVE = (lambda v: _is_number(v) and v > 0, "a number above 0")
NOT_NEGATIVE = (lambda v: _is_number(v) and v >= 0, "a number of at least 0")
FRACTION = (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 up to, not including, 1")
SWITCH = (lambda v: isinstance(v, bool), "True or False")
SCHEDULE = (lambda v: isinstance(v, str) and v in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
SEED = (lambda v: type(v) is int and 0 <= v < 2**63, "a whole number from 0 up to, not including, 2**63")

# The hyperparameters. Those of MODEL, OPTIMIZER and LOSS are passed on as the keyword arguments of the same names.
MODEL = {"h_1": WHOLE, "h_2": WHOLE, "p_drop": FRACTION}  # of SmallResNet
OPTIMIZER = {"lr": POSITIVE, "momentum": FRACTION, "weight_decay": NOT_NEGATIVE, "nesterov": SWITCH}  # of torch's SGD
LOSS = {"label_smoothing": FRACTION}  # of torch's cross_entropy, in training
LOOP = {
    "epochs": WHOLE,
    "batch_size": WHOLE,
    "schedule": SCHEDULE,  # how the learning rate goes
    "augment": SWITCH,  # random crops and flips
    "ema_decay": FRACTION,  # per step, of the averaged weights; 0 for none
    "seed": SEED,  # of the weights, the batches and the dropout
}
CONFIG_KEYS = MODEL | OPTIMIZER | LOSS | LOOP


def arguments(config: dict, keys: dict) -> dict:
    """Return those hyperparameters of a config that are named in keys."""
    return {key: config[key] for key in keys}


@dataclass
class Training:
    """All that a trial carries from one epoch to the next; a checkpoint holds it whole."""

    model: SmallResNet
    averaged: AveragedModel | None  # exponential moving average of the model's weights and batch norm statistics
    optimizer: torch.optim.SGD
    history: list[dict] = field(default_factory=list)  # the metrics of every epoch done
    notes: list[str] = field(default_factory=list)  # what whoever watches should know, and was not told yet

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    @property
    def seconds(self) -> float:
        """How long these took, in all processes of the trial."""
        return self.history[-1]["seconds"] if self.history else 0.0

    @property
    def evaluated(self) -> SmallResNet:
        """The model that is validated, and saved as the trial's result."""
        return self.averaged.module if self.averaged else self.model


def new_model(config: dict, num_classes: int) -> SmallResNet:
    """Build the model of a config, on the CPU."""
    return SmallResNet(**arguments(config, MODEL), num_classes=num_classes)


def new_training(config: dict, num_classes: int, device: torch.device) -> Training:
    """Build the model, with weights drawn from config["seed"], its average and its optimizer."""
    torch.manual_seed(config["seed"])
    model = new_model(config, num_classes).to(device, memory_format=torch.channels_last)
    averaged = None
    if config["ema_decay"] > 0:
        averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), **arguments(config, OPTIMIZER), fused=True)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(config["lr"], device=device)  # a tensor, for a CUDA graph to read it at every step
    return Training(model, averaged, optimizer)


def update_average(averaged: list[Tensor], current: list[Tensor], n: int, decay: float) -> None:
    """Take a step of the average, in place: averaged ← d · averaged + (1 − d) · current, d = min(decay, n / (9 + n)).

    n counts the steps so far, so that the average begins as what it averages, and soon forgets the first steps, even
    where an epoch has few of them.
    """
    get_ema_multi_avg_fn(min(decay, n / (9 + n)))(averaged, current, n)


def averaged_tensors(model: nn.Module) -> list[Tensor]:
    """Return what is averaged of a model: its weights, and the statistics of batch norm."""
    return [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]


def best_device() -> torch.device:
    """Return the GPU that Ray gave this process, or the only one it sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where the device multiplies it in hardware, else None, for float32."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        supported = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if supported else None


def train_epochs(training: Training, config: dict, dataset: Dataset, device: torch.device) -> Iterator[dict]:
    """Train and validate, an epoch at a time, from training.epoch + 1 to config["epochs"].

    Between two epochs `training` may be saved. Everything random in an epoch is drawn from (config["seed"], epoch), so
    that a restored trial goes on as one that was never interrupted.

    Yields:
        The METRICS of an epoch: epoch (from 1), loss and accuracy (validation; mean cross-entropy in nats, and a
        fraction; a loss that is not finite is NaN), train_loss and train_accuracy (over the epoch, as the weights were
        at each step; the loss is the one trained on, smoothed labels included), lr (of the last step),
        images_per_second (training only) and seconds (of all epochs so far).
    """
    batches = Batches(
        dataset.train_images.to(device),
        dataset.train_labels.to(device),
        config["batch_size"],
        dataset.mean,
        dataset.std,
        shuffle=True,
        augment=config["augment"],
        seed=config["seed"],
        # A noisier step than the others, right before validation, costs accuracy: see benchmarks/RESULTS.md.
        drop_last=True,
    )
    validation = evaluation_batches(dataset.val_images, dataset.val_labels, dataset.mean, dataset.std, device)
    torch.backends.cudnn.benchmark = True  # the shapes are always the same
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
            lr = config["lr"] * schedule((training.epoch * len(batches) + i) / total_steps)
            step(images, labels, lr)
        # Read once an epoch: at every step, the CPU would wait for the GPU.
        train_loss, train_accuracy = (total / batches.count for total in step.sums.tolist())
        seconds = time.perf_counter() - start
        loss, accuracy = evaluate(training.evaluated, validation)
        metrics = {
            "epoch": epoch,
            "loss": loss if math.isfinite(loss) else math.nan,  # an infinity would spoil the scheduler's percentiles
            "accuracy": accuracy,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "lr": lr,
            "images_per_second": batches.count / seconds,
            "seconds": time.perf_counter() - start + training.seconds,
        }
        training.history.append(metrics)
        yield metrics


class TrainStep:
    """A step of SGD, and one of the average, on a batch of images (B, 3, 32, 32) and int64 labels (B,).

    On a GPU forward, backward and SGD are captured as a CUDA graph, which is launched as one: kernel by kernel, the
    launches of a small batch take longer than its arithmetic. All batches must then be of one size. Where that fails,
    which training.notes then tells, and on a CPU the same step is taken eagerly.

    Attributes:
        sums: float32 (2,), on the device: the losses, in nats, and the number of images classified right, added up over
            the images of all steps since it was set to zero, as the weights were before each step.
    """

    def __init__(self, training: Training, config: dict, device: torch.device) -> None:
        self.training, self.decay = training, config["ema_decay"]
        self.loss_options = arguments(config, LOSS)
        self.dtype = autocast_dtype(device)
        self.sums = torch.zeros(2, device=device)
        self.current = averaged_tensors(training.model)
        self.averaged = averaged_tensors(training.averaged.module) if training.averaged else []
        self.graphed = device.type == "cuda"
        self.graph, self.eager_steps = None, 0
        self.aside = side_stream(device) if self.graphed else None

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> None:
        for group in self.training.optimizer.param_groups:
            group["lr"].fill_(lr)
        if self.graphed:
            self.replay(images, labels)
        else:
            self.descend(images, labels)
        if self.averaged:
            n = self.training.averaged.n_averaged  # lies on the CPU: reading it waits for nothing
            update_average(self.averaged, self.current, int(n), self.decay)
            n += 1

    def descend(self, images: Tensor, labels: Tensor) -> None:
        """Take a step of SGD, eagerly or while it is captured."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.training.model(images)
            loss = F.cross_entropy(logits, labels, **self.loss_options)
        self.training.optimizer.zero_grad()
        loss.backward()
        self.training.optimizer.step()
        correct = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach() * len(labels), correct])

    def replay(self, images: Tensor, labels: Tensor) -> None:
        """Take a step of SGD by the graph. The first few are taken eagerly; then it is captured."""
        if self.eager_steps < EAGER_STEPS:
            # Libraries choose their algorithms in these, and capturing asks for a stream of their own.
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
        """Capture the step for batches like this one, or note why that cannot be, and leave the graph out."""
        # Of the type that autocast would make of them, which copying them there does on the way.
        self.images = torch.empty_like(images, dtype=self.dtype)
        self.labels = torch.empty_like(labels)
        self.graph = torch.cuda.CUDAGraph()
        self.training.optimizer.zero_grad()  # so that the gradients are the graph's own
        here, generator = torch.cuda.current_stream(), torch.cuda.default_generators[images.device.index]
        before = generator.clone_state()
        try:
            with torch.cuda.graph(self.graph, stream=self.aside):  # nothing is computed here
                self.descend(self.images, self.labels)
        except RuntimeError as error:
            self.graph, self.graphed = None, False
            # A capture that was broken off leaves its stream in place, and a generator that waits for its end.
            torch.cuda.set_stream(here)
            generator.graphsafe_set_state(before)
            reason = str(error).splitlines()[0]
            self.training.notes.append(f"trains slowly, for its step cannot be captured as a CUDA graph ({reason})")


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which steps are captured: one a process, for libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def evaluation_batches(
    images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Batches:
    """Return batches of uint8 images (N, 32, 32, 3) and int64 labels (N,), in order and as they are, on the device."""
    return Batches(images.to(device), labels.to(device), EVALUATION_BATCH_SIZE, mean, std)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Return the mean cross-entropy, in nats, and the accuracy, from 0 to 1, over an epoch of batches."""
    model.eval()
    device = batches.images.device
    dtype = autocast_dtype(device)
    sums = torch.zeros(2, device=device)
    for images, labels in batches.epoch():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, (logits.argmax(1) == labels).sum()])
    loss, correct = sums.tolist()
    return loss / len(batches.images), correct / len(batches.images)


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Return where, in a trial's folder, the weights of an epoch are."""
    return folder / f"checkpoint_{epoch:06}"


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield the path to write a file or folder to that, once it is flushed to disk, takes its place at target.

    So target is there whole or, whatever happens, as it was (a folder: or not at all).
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for path in [*temporary.glob("*"), temporary]:
            flush(path)
        if temporary.is_dir():
            shutil.rmtree(target, ignore_errors=True)  # a folder takes no other folder's place
        temporary.replace(target)
        flush(target.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Have a file, or what a folder lists, on the disk, for a power cut to find it there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Say, of what cannot be written into a trial's folder, where that is and what to do.

    Raises:
        OSError: in place of whatever was raised within.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a file cannot be written
        reason = str(error).splitlines()[0]
        raise OSError(
            f"no checkpoint can be written into {folder} ({reason}): make room there, then --resume"
        ) from error


def save_weights(training: Training, folder: Path) -> None:
    """Write the evaluated weights of the epoch just done, and its metrics, into a trial's folder.

    They stand alone: weights.pt is a state_dict.

    Raises:
        OSError: naming the folder, when it cannot be written.
    """
    with naming(folder), replacing(checkpoint_path(folder, training.epoch)) as checkpoint:
        checkpoint.mkdir(parents=True)
        # From the CPU, so that they load where there is no GPU.
        weights = {name: tensor.cpu() for name, tensor in training.evaluated.state_dict().items()}
        torch.save(weights, checkpoint / WEIGHTS_FILE)
        (checkpoint / METRICS_FILE).write_text(json.dumps(training.history[-1]))


def saved_weights(folder: Path) -> dict[Path, dict]:
    """Return the path → metrics of all weights in a trial's folder; of damaged metrics, an empty dict."""
    found = {}
    for path in sorted(folder.glob("checkpoint_*")):
        try:
            metrics = json.loads((path / METRICS_FILE).read_text())
        except (OSError, ValueError, RecursionError):
            metrics = {}
        found[path] = metrics if isinstance(metrics, dict) else {}
    return found


def of_same_epoch(metrics: dict, other: dict) -> bool:
    """Tell whether two dicts of metrics are of the same epoch, of the same run of it: on a GPU, another run differs."""
    return all(metrics.get(key) == other.get(key) for key in ("epoch", "loss", "accuracy"))


def prune_weights(folder: Path, best: dict) -> None:
    """Delete the weights that are no better than those with the metrics best, which have been reported."""
    for path, metrics in saved_weights(folder).items():
        if path != checkpoint_path(folder, best["epoch"]) and not metrics.get("accuracy", 0) > best["accuracy"]:
            shutil.rmtree(path)


def save_training(training: Training, config: dict, folder: Path) -> None:
    """Write all that training goes on from after the epoch just done into a trial's folder.

    Of the older ones the newest stays, to fall back on; the others make room.

    Raises:
        OSError: naming the folder, when it cannot be written.
    """
    state = {
        "config": config,
        "history": training.history,
        "model": training.model.state_dict(),
        "momentum": training.optimizer.state_dict()["state"],
    }
    if training.averaged:
        state["averaged"] = training.averaged.state_dict()
    target = folder / f"training_{training.epoch:06}.pt"
    others = sorted(path for path in folder.glob("training_*.pt") if path != target)
    older = [path for path in others if path.name < target.name]
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in others:
            if path not in older[-1:]:
                path.unlink()
        with replacing(target) as path:
            torch.save(state, path)


def read_state(path: Path) -> dict | None:
    """Return the dict that torch.save wrote into a file, on the CPU, or None where it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # checks what torch.load does not: the checksums
                return None
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # of damaged bytes, the readers raise whatever they stumble over
        return None
    return state if isinstance(state, dict) else None


def restore_training(config: dict, num_classes: int, device: torch.device, folder: Path) -> Training:
    """Return a training as the newest state in a trial's folder that is whole has it, or a new one where there is none.

    Of states that are damaged, its notes tell.
    """
    training, damaged = new_training(config, num_classes, device), []
    for path in sorted(folder.glob("training_*.pt"), reverse=True):
        state = read_state(path)
        if state is None or state.get("config") != config:
            damaged.append(path.name)
            continue
        training.model.load_state_dict(state["model"])
        if training.averaged:
            training.averaged.load_state_dict(state["averaged"])
        # The rate is set at every step, and what else the groups hold is the config's.
        groups = training.optimizer.state_dict()["param_groups"]
        training.optimizer.load_state_dict({"state": state["momentum"], "param_groups": groups})
        training.history = state["history"]
        break
    if damaged:
        then = f"goes on from epoch {training.epoch}" if training.epoch else "starts again"
        training.notes.append(f"cannot read {' and '.join(damaged)} in {folder}, and {then}")
    return training


def train_cifar(config: dict, dataset: Dataset, search_folder: str, checkpoint_period: float) -> None:
    """Train one trial under Ray Tune, and report every epoch.

    Before the report the weights are saved, if they are the best so far; and the state of the training, if it has
    trained for at least checkpoint_period seconds since that was saved last.

    Whatever became of an earlier process of the same trial, it goes on from the newest state in its folder,
    search_folder/<trial name>. First it reports again what the epochs up to there had reported, so that stopper and log
    are told as if the trial had never been interrupted.
    """
    torch.set_num_threads(max(1, int(tune.get_context().get_trial_resources().head_cpus)))
    folder = Path(search_folder) / tune.get_context().get_trial_name()
    for path in (*folder.glob(".checkpoint_*"), *folder.glob(".training_*")):  # of a process killed while it wrote
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    device = best_device()
    training = restore_training(config, len(dataset.classes), device, folder)
    for metrics in list(training.history):
        report(metrics, training.notes)
    # Of this training: weights that an earlier process saved at a later epoch are compared where they are read.
    known = [m for m in saved_weights(folder).values() if any(of_same_epoch(m, other) for other in training.history)]
    best = max((metrics["accuracy"] for metrics in known), default=-1.0)
    saved_at = training.seconds
    for metrics in train_epochs(training, config, dataset, device):
        improved = metrics["accuracy"] > best and math.isfinite(metrics["loss"])
        if improved:
            best = metrics["accuracy"]
            save_weights(training, folder)
        if metrics["seconds"] - saved_at >= checkpoint_period:
            saved_at = metrics["seconds"]
            save_training(training, config, folder)
        report(metrics, training.notes)
        if improved:
            prune_weights(folder, metrics)


def report(metrics: dict, notes: list[str]) -> None:
    """Report an epoch to Tune, and with it the notes, which are then told."""
    told = "; ".join(notes)
    notes.clear()  # first, for a trial that is stopped does not return
    tune.report(metrics | ({"note": told} if told else {}))
