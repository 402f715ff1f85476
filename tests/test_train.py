import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from data import Batches
from model import SmallResNet
from tests.helpers import CONFIG, CPU, IMAGES
from train import SCHEDULES, evaluate, evaluation_batches, new_training, predict, train_epochs

PLAIN = CONFIG | {"nesterov": False, "weight_decay": 0.0, "augment": False, "schedule": "constant"}
PLAIN |= {"p_drop": 0.0, "ema_decay": 0.0, "lr": 0.01}
OTHER = PLAIN | {"nesterov": True, "weight_decay": 0.1, "label_smoothing": 0.3, "ema_decay": 0.6}
VALIDATION = evaluation_batches(IMAGES.val_images, IMAGES.val_labels, IMAGES.mean, IMAGES.std, CPU)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.autocast_dtype", lambda device: None)


@pytest.mark.parametrize("config", [PLAIN, OTHER])
def test_training_is_sgd_on_the_cross_entropy_and_its_average_is_evaluated(config: dict) -> None:
    """A comparison with the plainest loop that does the same."""
    smoothing, ema_decay = config["label_smoothing"], config["ema_decay"]
    torch.manual_seed(config["seed"])
    model, evaluated = SmallResNet(4, 8, 0.0, 5), SmallResNet(4, 8, 0.0, 5)
    velocity, steps = [torch.zeros_like(parameter) for parameter in model.parameters()], 0
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
                for parameter, gradient, v in zip(model.parameters(), gradients, velocity, strict=True):
                    gradient = gradient + config["weight_decay"] * parameter
                    v.mul_(0.9).add_(gradient)
                    parameter.sub_(0.01 * (gradient + 0.9 * v if config["nesterov"] else v))
                # The first steps are soon forgotten.
                decay = min(ema_decay, steps / (9 + steps))
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
    steps = [i / 1000 for i in range(1000)]
    for name, schedule in SCHEDULES.items():
        rates = [schedule(t) for t in steps]
        assert max(rates) == pytest.approx(1.0, abs=5e-3), name
        assert all(0 < rate <= 1 for rate in rates), name
        assert name == "constant" or rates[-1] < 0.01, name
    # What the scheduler compares in the first 70 % is trained at one rate.
    assert all(SCHEDULES["cooldown"](t) == SCHEDULES["constant"](t) == 1 for t in steps if t <= 0.7)
    config = CONFIG | {"epochs": 10, "schedule": "one_cycle"}
    rates = [report.lr for report in train_epochs(new_training(config, 5, CPU), config, IMAGES, CPU)]
    last_steps = [(2 * epoch + 1) / 20 for epoch in range(10)]  # two batches an epoch
    assert rates == pytest.approx([0.05 * SCHEDULES["one_cycle"](t) for t in last_steps])


def test_evaluation_and_prediction_count_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_training(CONFIG, 5, CPU).model
    monkeypatch.setattr("train.EVALUATION_BATCH_SIZE", 7)  # the last batch is smaller
    batches = evaluation_batches(IMAGES.val_images, IMAGES.val_labels, IMAGES.mean, IMAGES.std, CPU)
    with torch.no_grad():
        logits = torch.cat([model.eval()(image[None]) for image in next(VALIDATION.epoch())[0]])
    accuracy = (logits.argmax(1) == IMAGES.val_labels).float().mean().item()
    loss = F.cross_entropy(logits, IMAGES.val_labels).item()
    assert evaluate(model, batches) == pytest.approx((loss, accuracy), rel=1e-4)
    torch.testing.assert_close(predict(model, batches), logits.softmax(1), rtol=1e-3, atol=1e-4)


def test_loss_that_is_not_finite_or_not_measured_is_nan() -> None:
    config, unmeasured = PLAIN | {"lr": 1e9}, replace(IMAGES, val_images=IMAGES.val_images[:0])
    losses = [report.loss for report in train_epochs(new_training(config, 5, CPU), config, IMAGES, CPU)]
    losses += [report.loss for report in train_epochs(new_training(PLAIN, 5, CPU), PLAIN, unmeasured, CPU)]
    assert [math.isnan(loss) for loss in losses[3:]] == [True] * 5
    assert not any(math.isinf(loss) for loss in losses)
