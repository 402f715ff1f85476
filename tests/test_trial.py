import contextlib
import math
import random
from pathlib import Path

import pytest
import torch

from data import InputError, make_synthetic
from search.files import load_tensors
from search.trial import TRAINING_FILE, run_trial, weights_path
from tests.helpers import ACCURACY, CONFIG, CPU, IMAGES, VALIDATION, add, disk_full_after, search_in, tell
from train import Report, evaluate, new_model


def epochs(told: list[dict]) -> list[dict]:
    return [metrics for news in told for metrics in news["reports"]]


def run(config: dict, folder: Path, until: int = -1) -> list[dict]:
    """Run a trial, which is stopped once it has told so many epochs, and return what it told."""
    told = []

    def report(news: dict) -> None:
        told.append(news)
        if len(epochs(told)) == until:
            raise SystemExit

    with contextlib.suppress(SystemExit):
        run_trial(config, IMAGES, folder, ACCURACY, 0, (), report, CPU)
    return told


@pytest.mark.parametrize("recipe", [{"bias_lr": 0.5}, {"schedule": "one_cycle", "ema_decay": 0.0, "nesterov": False}])
def test_stopped_trial_continues_bit_for_bit(recipe: dict, tmp_path: Path) -> None:
    config = CONFIG | recipe
    whole, first = run(config, tmp_path / "whole"), run(config, tmp_path / "stopped", until=2)
    torch.rand(3)  # whatever happens to the global generator
    rest = run(config, tmp_path / "stopped")
    assert first[0] == {"restored": 0, "reports": []}
    assert rest[0] == {"restored": 2, "reports": epochs(first)}  # as they were, the clock's figures too
    clock = dict.fromkeys(("seconds", "images_per_second"))
    assert [metrics | clock for metrics in epochs(rest)] == [metrics | clock for metrics in epochs(whole)]
    best, model = ACCURACY.best(Report(**metrics) for metrics in epochs(whole)), new_model(config, 5)
    names = [TRAINING_FILE, weights_path(Path(), best.epoch).name]
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == names
    one, other = (load_tensors(tmp_path / folder / names[1]) for folder in ("whole", "stopped"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    model.load_state_dict(one)
    assert evaluate(model, VALIDATION) == pytest.approx((best.loss, best.accuracy), rel=1e-2, abs=0.02)


def test_state_without_room_leaves_the_earlier_one_and_a_damaged_one_restarts_from_scratch(tmp_path: Path) -> None:
    path, known = tmp_path / TRAINING_FILE, epochs(run(CONFIG, tmp_path, until=2))
    before, state = {path.name: path.read_bytes() for path in tmp_path.iterdir()}, torch.load(path)
    with disk_full_after(1000), pytest.raises(OSError, match=f"cannot write {tmp_path}/.* .File too large.$"):
        run(CONFIG, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    restored = {"restored": 2, "reports": known}
    scratch = {"restored": 0, "reports": [], "note": f"{path} is unreadable; restarting from scratch"}
    without_new_one = {key: CONFIG[key] for key in CONFIG if key != "label_smoothing"}  # it has a default
    for config, told in ((CONFIG, restored), (without_new_one, restored), (CONFIG | {"lr": 1.0}, scratch)):
        torch.save(state | {"config": config}, path)
        assert run(CONFIG, tmp_path, until=told["restored"]) == [told]
    torch.save({key: value for key, value in state.items() if key != "momenta"}, path)  # as earlier versions did
    assert run(CONFIG, tmp_path, until=0) == [scratch]
    path.write_bytes(b"")
    assert run(CONFIG, tmp_path, until=0) == [scratch]
    torch.save(state | {"model": state["model"] | {"extra": torch.zeros(1)}}, path)
    with pytest.raises(InputError, match=r"training.pt do not fit model.py, where 'extra' was changed, added or rem"):
        run(CONFIG, tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_best_weights_are_always_on_disk(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial is killed again and again, before or after its report is known; what it retrains has other figures."""
    generator, images, evaluated, starts = random.Random(seed), make_synthetic(20, 1, 2), {}, 0
    config, search = CONFIG | {"epochs": 10, "batch_size": 8}, search_in(tmp_path)
    known = search.trials[add(search, **config)]

    def evaluate_at_random(model: torch.nn.Module, batches: object) -> tuple[float, float]:
        accuracy = generator.random()
        evaluated[accuracy] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return generator.choice([1.0, 1.0, 1.0, math.nan]), accuracy

    def check() -> None:
        if known.best:
            saved = load_tensors(weights_path(tmp_path / known.name, known.best.epoch))
            torch.testing.assert_close(saved, evaluated[known.best.accuracy], rtol=0, atol=0)
        if generator.random() < 0.1:
            raise SystemExit

    def report(news: dict) -> None:  # what the referee does
        check()
        if news.get("restored", math.inf) < len(known.reports):
            search.record("restarted", trial=known.name, epoch=news["restored"])
        for metrics in news["reports"][-1:]:
            if metrics["epoch"] > len(known.reports):
                tell(search, known.name, Report(**metrics))
        check()

    monkeypatch.setattr("train.evaluate", evaluate_at_random)
    while len(known.reports) < config["epochs"]:
        starts += 1
        period = generator.choice([0, 0, 1e9])
        with contextlib.suppress(SystemExit):
            run_trial(config, images, tmp_path / known.name, ACCURACY, period, (3, 6), report, CPU)
    assert starts > 1
