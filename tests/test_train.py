import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.recipes import BASELINE_RECIPE
from data import Batches, InputError
from model import SmallResNet
from tests.helpers import CONFIG, CPU, IMAGES, VALIDATION
from train import SCHEDULES, TrainStep, new_training, train_epochs

PLAIN = CONFIG | BASELINE_RECIPE | {"p_drop": 0.0, "lr": 0.01}
OTHER = PLAIN | {"nesterov": True, "weight_decay": 0.1, "label_smoothing": 0.3, "ema_decay": 0.6, "bias_lr": 0.04}


@pytest.fixture(autouse=True)
def float32_and_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.autocast_dtype", lambda device: None)
    monkeypatch.setattr("train.EVALUATION_BATCH_SIZE", 7)  # the last batch is smaller


@pytest.mark.parametrize("config", [PLAIN, OTHER])
def test_training_is_sgd_on_the_cross_entropy_and_its_average_is_evaluated(config: dict) -> None:
    """A comparison with the plainest loop that does the same."""
    smoothing = config["label_smoothing"]
    torch.manual_seed(config["seed"])
    model, evaluated = SmallResNet(4, 8, 0.0, 5), SmallResNet(4, 8, 0.0, 5)
    velocity, steps = [torch.zeros_like(parameter) for parameter in model.parameters()], 0
    biases = {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    rates = [max(0.01, config["bias_lr"]) if name in biases else 0.01 for name, _ in model.named_parameters()]
    images, labels = IMAGES.train_images, IMAGES.train_labels
    batches = Batches(images, labels, 32, IMAGES.mean, IMAGES.std, shuffle=True, seed=config["seed"], drop_last=True)
    for report in train_epochs(new_training(config, 5, CPU), config, IMAGES, CPU):
        losses, correct = [], 0
        for images, labels in batches.epoch(report.epoch):
            logits = model(images)
            # Szegedy et al. 2016: a share of the label is spread evenly over all classes.
            log_p = logits.log_softmax(1)
            loss = ((smoothing - 1) * log_p.gather(1, labels[:, None])[:, 0] - smoothing * log_p.mean(1)).mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient, v, rate in zip(model.parameters(), gradients, velocity, rates, strict=True):
                    gradient = gradient + config["weight_decay"] * parameter * 0.01 / rate
                    v.mul_(0.9).add_(gradient)
                    parameter.sub_(rate * (gradient + 0.9 * v if config["nesterov"] else v))
                # The first steps are soon forgotten.
                decay = min(config["ema_decay"], steps / (9 + steps))
                for average, value in zip(evaluated.state_dict().values(), model.state_dict().values(), strict=True):
                    average.copy_(decay * average + (1 - decay) * value)
            losses += [loss.item()] * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
            steps += 1
        with torch.no_grad():
            logits = evaluated.eval()(next(VALIDATION.epoch())[0])
        expected = [report.epoch, F.cross_entropy(logits, IMAGES.val_labels).item()]
        expected += [(logits.argmax(1) == IMAGES.val_labels).float().mean().item()]
        expected += [sum(losses) / len(losses), correct / len(losses), 0.01]
        assert [*vars(report).values()][:6] == pytest.approx(expected, rel=1e-3)


def test_schedules_peak_at_the_given_rate_and_anneal() -> None:
    for name, schedule in SCHEDULES.items():
        rates = [schedule(i / 1000) for i in range(1000)]
        assert min(rates) > 0, name
        assert 0.995 < max(rates) <= 1, name
        assert (rates[-1] < 0.01) == (name != "constant"), name
        # What the scheduler compares in the first 70 % is trained at one rate.
        assert (set(rates[:701]) == {1.0}) == (name in ("constant", "cooldown")), name
    config = CONFIG | {"schedule": "one_cycle"}
    rates = [report.lr for report in train_epochs(new_training(config, 5, CPU), config, IMAGES, CPU)]
    assert rates == pytest.approx([0.05 * SCHEDULES["one_cycle"](t) for t in (1 / 8, 3 / 8, 5 / 8, 7 / 8)])


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not permitted")])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_capture_that_runs_out_of_memory_fails_its_trial_and_another_failure_makes_training_eager(
    failure: RuntimeError, at_the_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: the calls of torch.cuda that capture a step are replaced."""

    @contextlib.contextmanager
    def graph(*args: object, **options: object) -> Iterator[None]:
        try:
            yield
        finally:
            if at_the_end:  # ending a capture that has failed fails, too
                raise RuntimeError("capture failed")

    for name in ("CUDAGraph", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "default_generators", {None: MagicMock()})
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(TrainStep, "failure", None)
    step = TrainStep(training := new_training(CONFIG, 5, CPU), CONFIG, CPU)
    monkeypatch.setattr(step, "descend", MagicMock(side_effect=failure))
    if isinstance(failure, torch.OutOfMemoryError):
        with pytest.raises(RuntimeError):
            step.capture(torch.zeros(2, 3, 32, 32), torch.zeros(2))
        assert TrainStep.failure is None
    else:
        step.capture(torch.zeros(2, 3, 32, 32), torch.zeros(2))
        reason = "capture failed" if at_the_end else "not permitted"
        assert TrainStep.failure == reason
        assert training.notes == [f"CUDA graph capture failed ({reason}); training eagerly, which is slower"]


def test_rates_may_be_whole_numbers() -> None:
    rates = {"schedule": "cosine", "lr": 1, "bias_lr": 2}
    configs = PLAIN | rates, PLAIN | rates | {"lr": 1.0, "bias_lr": 2.0}
    ints, floats = ([*train_epochs(new_training(config, 5, CPU), config, IMAGES, CPU)] for config in configs)
    assert [each.train_loss for each in ints] == [each.train_loss for each in floats]


@pytest.mark.parametrize("change", [{"momentum": 0}, {"dampening": 0.1}])
def test_nesterov_needs_momentum_without_dampening(change: dict) -> None:
    with pytest.raises(InputError, match="nesterov True needs momentum above 0 and no dampening; "):
        new_training(OTHER | change, 5, CPU)


def test_edited_model_without_biases_of_batch_norm_and_with_an_unused_layer_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Edited(nn.Sequential):
        def __init__(self, **options: object) -> None:
            super().__init__(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
            self.unused = nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](self[1](self[0](x)))

    monkeypatch.setattr("train.SmallResNet", Edited)
    first, *_, last = train_epochs(new_training(PLAIN, 5, CPU), PLAIN, IMAGES, CPU)
    assert last.train_loss < first.train_loss


def test_neither_importing_a_search_nor_training_imports_the_compiler() -> None:
    """Importing torch._dynamo takes two seconds and 100 MB in each process."""
    program = "import sys; from tests.helpers import *; from train import *; training = new_training(CONFIG, 5, CPU); "
    program += "[*train_epochs(training, CONFIG, IMAGES, CPU)]; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
