import contextlib
import gc
import math
import random
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray import tune

from data import make_synthetic, save_dataset
from search.files import load_tensors
from search.records import SEARCH_FILE, Objective
from search.trial import TRAINING_FILE, restore_training, run_trial, train_cifar, weights_path
from tests.helpers import CONFIG, CPU, DAMAGES, IMAGES, add_trial, disk_full_after, search_in, tell
from train import Report, Training, evaluate, evaluation_batches, new_model

ACCURACY = Objective("accuracy", "max")
RECIPES = {
    "default": CONFIG,
    "one_cycle, no average": CONFIG | {"schedule": "one_cycle", "ema_decay": 0.0, "augment": False},
    "smoothed labels": CONFIG | {"label_smoothing": 0.2, "nesterov": False},
}


def run(config: dict, folder: Path, until: int = -1) -> list[dict]:
    """Run a trial, which is stopped as it reports an epoch, and return its reports."""
    told = []

    def report(metrics: dict) -> None:
        told.append(metrics)
        if until in (metrics.get("epoch"), metrics.get("restored")):
            raise SystemExit

    try:
        run_trial(config, IMAGES, folder, ACCURACY, 0, report, CPU)
    except SystemExit:
        assert until >= 0
    return told


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_trial_continues_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    whole = run(RECIPES[recipe], tmp_path / "whole")
    first = run(RECIPES[recipe], tmp_path / "stopped", until=2)
    torch.rand(3)  # whatever happens to the global generator
    rest = run(RECIPES[recipe], tmp_path / "stopped")
    assert [metrics.get("epoch") for metrics in rest] == [None, 1, 2, 3, 4]
    assert [*first, {"restored": 2}] == [{"restored": 0}, *rest[1:3], rest[0]]
    clock = dict.fromkeys(("seconds", "images_per_second"))
    assert [metrics | clock for metrics in rest[1:]] == [metrics | clock for metrics in whole[1:]]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    best = ACCURACY.best(Report(**metrics) for metrics in whole[1:])
    assert names == [TRAINING_FILE, weights_path(tmp_path, best.epoch).name]
    states = [{}, {}]
    for folder, state in zip(("whole", "stopped"), states, strict=True):
        for name in names:
            state |= load_tensors(tmp_path / folder / name)
        del state["config"], state["history"]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    # The weights on disk are those that were evaluated.
    model, data = new_model(CONFIG, 5), IMAGES
    model.load_state_dict(torch.load(tmp_path / "whole" / names[1], weights_only=True))
    figures = evaluate(model, evaluation_batches(data.val_images, data.val_labels, data.mean, data.std, CPU))
    assert figures == pytest.approx((best.loss, best.accuracy), rel=1e-2, abs=0.02)


def test_damaged_state_restarts_from_scratch_and_says_so(tmp_path: Path) -> None:
    whole, path = run(CONFIG, tmp_path / "trial", until=2), tmp_path / "trial" / TRAINING_FILE
    state = torch.load(path)
    for damage in (*DAMAGES.values(), lambda path: torch.save(state | {"config": CONFIG | {"lr": 1.0}}, path)):
        torch.save(state, path)
        assert run(CONFIG, tmp_path / "trial", until=2) == [{"restored": 2}]
        damage(path)
        told = run(CONFIG, tmp_path / "trial", until=0)
        assert told == [{"restored": 0, "note": f"{path} is unreadable; restarting from scratch"}]
    again = run(CONFIG, tmp_path / "trial", until=2)
    assert [metrics.get("loss") for metrics in again] == [metrics.get("loss") for metrics in whole]
    assert run(CONFIG, tmp_path / "trial", until=2) == [{"restored": 2}]


def test_state_that_finds_no_room_leaves_the_earlier_one(tmp_path: Path) -> None:
    run(CONFIG, tmp_path, until=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with disk_full_after(1000), pytest.raises(OSError, match=f"cannot write {tmp_path}/.*make room there"):
        run(CONFIG, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert [metrics.get("epoch") for metrics in run(CONFIG, tmp_path)] == [None, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_the_best_known_epoch_are_on_disk_at_every_moment(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial is killed again and again, before or after its report is known; what it retrains has other figures."""
    generator, images, evaluated = random.Random(seed), make_synthetic(20, 1, 2), {}
    config = CONFIG | {"epochs": 10, "batch_size": 8}
    search = search_in(tmp_path)
    known = search.trials[add_trial(search, [], **config)]

    def evaluate_at_random(model: torch.nn.Module, batches: object) -> tuple[float, float]:
        accuracy = generator.random()
        evaluated[accuracy] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return generator.choice([1.0, 1.0, 1.0, math.nan]), accuracy

    def check_weights() -> None:
        if known.best:
            saved = load_tensors(weights_path(tmp_path / known.name, known.best.epoch))
            torch.testing.assert_close(saved, evaluated[known.best.accuracy], rtol=0, atol=0)

    def report(metrics: dict) -> None:  # what the recorder does
        check_weights()
        if generator.random() < 0.1:
            raise SystemExit
        if metrics.get("restored", math.inf) < len(known.reports):
            search.record("restarted", trial=known.name, epoch=metrics["restored"])
        elif metrics.get("epoch", 0) > len(known.reports):
            tell(search, known.name, Report(**metrics))
        check_weights()
        if generator.random() < 0.1:
            raise SystemExit

    monkeypatch.setattr("train.evaluate", evaluate_at_random)
    starts = 0
    while len(known.reports) < config["epochs"]:
        starts += 1
        with contextlib.suppress(SystemExit):
            run_trial(config, images, tmp_path / known.name, ACCURACY, generator.choice([0, 0, 1e9]), report, CPU)
        check_weights()
    assert starts > 1


@pytest.mark.parametrize("error", [SystemExit(0), OSError("no room")])
def test_trials_of_a_process_share_a_thread_and_leave_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = tune.PlacementGroupFactory([{"CPU": 1}])
    context = SimpleNamespace(get_trial_resources=lambda: resources, get_trial_name=lambda: "trial")
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
    save_dataset(IMAGES, tmp_path / "images.pt")
    arguments = (CONFIG, tmp_path / "images.pt", tmp_path, ACCURACY, 30)
    with pytest.raises(OSError, match="this machine does not see"):
        train_cifar(*arguments)
    (tmp_path / SEARCH_FILE).touch()
    gc.disable()  # a GPU's memory would wait for it
    try:
        for _ in range(2):
            with pytest.raises(type(error)):
                train_cifar(*arguments)
        assert [training() for training in left] == [None] * 2
    finally:
        gc.enable()
    assert len(threads) == 1
    assert threading.get_ident() not in threads
