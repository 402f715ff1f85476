import gc
import math
import resource
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray import tune
from torch.nn import functional as F

from data import Batches, Dataset, save_dataset
from hparam_search import BASELINE_RECIPE, param_space
from model import SmallResNet
from search.trial import (
    WEIGHTS_FILE,
    checkpoint_path,
    prune_weights,
    restore_training,
    save_training,
    save_weights,
    saved_weights,
    train_cifar,
)
from train import (
    SCHEDULES,
    Training,
    best_device,
    evaluate,
    evaluation_batches,
    new_training,
    train_epochs,
    update_average,
)

CPU = torch.device("cpu")
CONFIG = param_space | {"epochs": 4, "h_1": 4, "h_2": 8, "p_drop": 0.3, "lr": 0.05, "batch_size": 32, "seed": 5}
RECIPES = {
    "default": CONFIG,
    "baseline": CONFIG | BASELINE_RECIPE,
    "one_cycle, no average": CONFIG | {"schedule": "one_cycle", "ema_decay": 0.0},
    "smoothed labels": CONFIG | {"label_smoothing": 0.2},
}


def without_speed(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name not in ("images_per_second", "seconds")}


def weights(training: Training) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in training.evaluated.state_dict().values()])


@pytest.mark.parametrize("recipe", RECIPES)
def test_restored_training_goes_on_bit_for_bit(recipe: str, small_dataset: Dataset, tmp_path: Path) -> None:
    config = RECIPES[recipe]
    whole = new_training(config, 5, CPU)
    expected = [without_speed(metrics) for metrics in train_epochs(whole, config, small_dataset, CPU)]
    assert [metrics["epoch"] for metrics in expected] == [1, 2, 3, 4]

    first = new_training(config, 5, CPU)
    epochs = train_epochs(first, config, small_dataset, CPU)
    observed = [without_speed(next(epochs)), without_speed(next(epochs))]
    save_training(first, config, tmp_path)
    torch.rand(3)  # whatever happens to the global generator in between
    second = restore_training(config, 5, CPU, tmp_path)
    assert second.notes == []
    assert second.epoch == 2
    assert second.history == first.history
    observed += [without_speed(metrics) for metrics in train_epochs(second, config, small_dataset, CPU)]

    assert observed == expected
    assert torch.equal(weights(whole), weights(second))
    assert list(train_epochs(second, config, small_dataset, CPU)) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "garbled": garble,
    "empty": lambda path: path.write_bytes(b""),
    "other": lambda path: path.write_text("something else"),
    "of another config": lambda path: torch.save(torch.load(path) | {"config": CONFIG | {"lr": 1.0}}, path),
    "no dict": lambda path: torch.save([1, 2], path),
}


@pytest.fixture(scope="module")
def trained(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """Train four epochs; return the folder with their states, and the weights after each."""
    training, folder, after = new_training(CONFIG, 5, CPU), tmp_path_factory.mktemp("trained"), []
    for _ in train_epochs(training, CONFIG, small_dataset, CPU):
        save_training(training, CONFIG, folder)
        after.append(weights(training).clone())
    return folder, after


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_passed_over(damage: str, trained: tuple, small_dataset: Dataset, tmp_path: Path) -> None:
    folder, after = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    # Two are kept, that one may be damaged.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_000003.pt", "training_000004.pt"]

    DAMAGES[damage](tmp_path / "training_000004.pt")
    restored = restore_training(CONFIG, 5, CPU, tmp_path)
    assert restored.notes == [f"cannot read training_000004.pt in {tmp_path}, and goes on from epoch 3"]
    assert torch.equal(weights(restored), after[2])
    if damage == "cut":
        assert [metrics["epoch"] for metrics in train_epochs(restored, CONFIG, small_dataset, CPU)] == [4]
        assert torch.equal(weights(restored), after[3])
        save_training(restored, CONFIG, tmp_path)  # takes the place of the damaged one
        assert restore_training(CONFIG, 5, CPU, tmp_path).notes == []

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.iterdir():
        DAMAGES[damage](path)
    restored = restore_training(CONFIG, 5, CPU, tmp_path)
    assert restored.notes == [f"cannot read training_000004.pt and training_000003.pt in {tmp_path}, and starts again"]
    assert restored.epoch == 0
    assert torch.equal(weights(restored), weights(new_training(CONFIG, 5, CPU)))


def test_state_that_finds_no_room_leaves_the_one_before(small_dataset: Dataset, tmp_path: Path) -> None:
    training = new_training(CONFIG, 5, CPU)
    epochs = train_epochs(training, CONFIG, small_dataset, CPU)
    next(epochs)
    save_training(training, CONFIG, tmp_path)
    next(epochs)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for save in (lambda: save_training(training, CONFIG, tmp_path), lambda: save_weights(training, tmp_path)):
            with pytest.raises(OSError, match=f"no checkpoint can be written into {tmp_path} .*make room"):
                save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["training_000001.pt"]
    assert restore_training(CONFIG, 5, CPU, tmp_path).epoch == 1
    save_training(training, CONFIG, tmp_path)  # with room again, the same call succeeds
    assert restore_training(CONFIG, 5, CPU, tmp_path).epoch == 2


def test_weights_stay_until_better_ones_are_reported(small_dataset: Dataset, tmp_path: Path) -> None:
    training = new_training(CONFIG, 5, CPU)
    for _ in train_epochs(training, CONFIG, small_dataset, CPU):
        save_weights(training, tmp_path)
    found = {path.name: metrics for path, metrics in saved_weights(tmp_path).items()}
    assert found == {f"checkpoint_{metrics['epoch']:06}": metrics for metrics in training.history}
    prune_weights(tmp_path, training.history[1] | {"accuracy": training.history[2]["accuracy"]})
    left = [metrics["epoch"] for metrics in saved_weights(tmp_path).values()]
    better = [m["epoch"] for m in training.history if m["accuracy"] > training.history[2]["accuracy"]]
    assert left == sorted({2, *better})  # the better ones may be of an earlier process, and reported


def test_loss_that_is_not_finite_is_nan(small_dataset: Dataset) -> None:
    config = CONFIG | BASELINE_RECIPE | {"lr": 1e9}
    metrics = list(train_epochs(new_training(config, 5, CPU), config, small_dataset, CPU))
    assert math.isnan(metrics[-1]["loss"])
    assert not any(math.isinf(each["loss"]) for each in metrics)


def test_weights_file_stands_alone(small_dataset: Dataset, tmp_path: Path) -> None:
    training = new_training(CONFIG, 5, CPU)
    metrics = next(train_epochs(training, CONFIG, small_dataset, CPU))
    save_weights(training, tmp_path)
    model = SmallResNet(4, 8, 0.3, 5)
    model.load_state_dict(torch.load(checkpoint_path(tmp_path, 1) / WEIGHTS_FILE, weights_only=True))
    images = (small_dataset.val_images.float() / 255 - torch.tensor(small_dataset.mean)) / torch.tensor(
        small_dataset.std
    )
    logits = model.eval()(images.permute(0, 3, 1, 2))
    assert F.cross_entropy(logits, small_dataset.val_labels).item() == pytest.approx(metrics["loss"], rel=1e-2)
    assert (logits.argmax(1) == small_dataset.val_labels).float().mean().item() == pytest.approx(
        metrics["accuracy"], abs=0.02
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loop_is_sgd_with_momentum_on_the_cross_entropy(
    smoothing: float, small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline's recipe, against a loop that says in the fewest words what it is."""
    monkeypatch.setattr("train.autocast_dtype", lambda device: None)
    config = CONFIG | BASELINE_RECIPE | {"p_drop": 0.0, "epochs": 2, "lr": 0.01, "label_smoothing": smoothing}
    torch.manual_seed(config["seed"])
    model = SmallResNet(4, 8, 0.0, 5)
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    data = small_dataset
    images, labels, seed = data.train_images, data.train_labels, config["seed"]
    batches = Batches(images, labels, 32, data.mean, data.std, shuffle=True, seed=seed, drop_last=True)
    training = new_training(config, 5, CPU)
    for metrics in train_epochs(training, config, data, CPU):
        losses, correct = [], 0
        model.train()
        for images, labels in batches.epoch(metrics["epoch"]):
            logits = model(images)
            # Szegedy et al. 2016: a share of the label is spread evenly over all classes.
            log_p = logits.log_softmax(1)
            loss = ((smoothing - 1) * log_p.gather(1, labels[:, None])[:, 0] - smoothing * log_p.mean(1)).mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient, v in zip(model.parameters(), gradients, velocity, strict=True):
                    v.mul_(0.9).add_(gradient)
                    parameter.sub_(0.01 * v)
            losses += [loss.item()] * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
        assert metrics["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
        assert metrics["train_accuracy"] == pytest.approx(correct / len(losses), abs=0.01)
        with torch.no_grad():
            logits = model.eval()(
                next(evaluation_batches(data.val_images, data.val_labels, data.mean, data.std, CPU).epoch())[0]
            )
        assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, data.val_labels).item(), rel=1e-3)
        assert metrics["lr"] == 0.01


def test_evaluation_counts_every_image_once(small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.EVALUATION_BATCH_SIZE", 7)  # the last batch is smaller
    model = new_training(CONFIG, 5, CPU).model
    images, labels, data = small_dataset.val_images, small_dataset.val_labels, small_dataset
    loss, accuracy = evaluate(model, evaluation_batches(images, labels, data.mean, data.std, CPU))
    single = [
        evaluate(model, evaluation_batches(images[i : i + 1], labels[i : i + 1], data.mean, data.std, CPU))
        for i in range(len(images))
    ]
    assert loss == pytest.approx(sum(each[0] for each in single) / len(images), rel=1e-2)
    assert accuracy == pytest.approx(sum(each[1] for each in single) / len(images), abs=0.02)


def test_average_forgets_the_first_steps_then_decays() -> None:
    averaged = [torch.zeros(2), torch.zeros(1)]
    expected = 0.0
    for n in range(200):
        update_average(averaged, [torch.full((2,), n + 5.0), torch.full((1,), -n - 5.0)], n, 0.9)
        decay = min(0.9, n / (9 + n))
        expected = decay * expected + (1 - decay) * (n + 5)
        assert averaged[0].tolist() == pytest.approx([expected] * 2)
        assert averaged[1].item() == pytest.approx(-expected)


def test_schedules_peak_at_the_given_rate_and_anneal() -> None:
    steps = [i / 1000 for i in range(1000)]
    for name, schedule in SCHEDULES.items():
        rates = [schedule(t) for t in steps]
        assert max(rates) == pytest.approx(1.0, abs=5e-3), name
        assert all(0 < rate <= 1 for rate in rates), name
        if name != "constant":
            assert rates[-1] < 0.01, name
    assert all(SCHEDULES["constant"](t) == 1 for t in steps)
    # What the scheduler compares until the last third is trained at one rate.
    assert all(SCHEDULES["cooldown"](t) == 1 for t in steps if t <= 0.7)


def test_training_learns_and_reports_the_schedule(small_dataset: Dataset) -> None:
    config = CONFIG | {"h_1": 8, "h_2": 32, "epochs": 6, "lr": 0.02, "p_drop": 0.1}
    metrics = list(train_epochs(new_training(config, 5, CPU), config, small_dataset, CPU))
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] < math.log(5) * 1.2
    assert metrics[-1]["accuracy"] > 0.3
    assert metrics[0]["lr"] == 0.02
    assert metrics[-1]["lr"] < 0.002
    assert all(each["images_per_second"] > 0 for each in metrics)


def test_only_a_process_that_was_given_a_gpu_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [best_device(gpus).type for gpus in (0, 0.5, 2)] == ["cpu", "cuda", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_device().type == "cpu"


def test_training_is_freed_when_it_is_left(small_dataset: Dataset) -> None:
    gc.disable()  # a GPU's memory would wait for it
    try:
        training = new_training(CONFIG, 5, CPU)
        epochs = train_epochs(training, CONFIG, small_dataset, CPU)
        next(epochs)
        left = weakref.ref(training.model), weakref.ref(training.averaged), weakref.ref(training.optimizer)
        del training, epochs
        assert [reference() for reference in left] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [SystemExit(0), OSError("no room")])
def test_trials_of_a_process_share_a_thread_and_leave_nothing(
    error: BaseException, small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = tune.PlacementGroupFactory([{"CPU": 1}])
    context = SimpleNamespace(get_trial_resources=lambda: resources, get_trial_name=lambda: "it")
    threads, left = set(), []

    def restore(*arguments: object) -> Training:
        training = restore_training(*arguments)
        left.append(weakref.ref(training))
        return training

    def report(metrics: dict) -> None:  # Tune's raises a SystemExit to stop a trial
        threads.add(threading.get_ident())
        raise type(error)(*error.args)

    monkeypatch.setattr(tune, "get_context", lambda: context)
    monkeypatch.setattr(tune, "report", report)
    monkeypatch.setattr("search.trial.restore_training", restore)
    images = tmp_path / "images.pt"
    save_dataset(small_dataset, images)
    gc.disable()  # a GPU's memory would wait for it
    try:
        for _ in range(2):
            with pytest.raises(type(error)):
                train_cifar(CONFIG, images, tmp_path, 30)
        assert [training() for training in left] == [None] * 2
    finally:
        gc.enable()
    assert len(threads) == 1
    assert threading.get_ident() not in threads
