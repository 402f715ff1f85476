import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from search.command_line import Settings
from search.importance import SIGNIFICANCE, conclusions, effect, end_of_range, ranks, rungs
from search.records import Search, append_line, read_results, sealed, write_params
from tests.conftest import CONFIG, log_line

SEARCHED = {
    "lr": {"lower": 1e-5, "upper": 0.1, "log": True},
    "h_1": {"values": [4, 8, 16]},
    "p_drop": {"lower": 0.1, "upper": 0.5, "log": False},
}


@pytest.fixture
def finished(tmp_path: Path) -> Callable:
    """Return a function that makes a finished search of (config, accuracies epoch by epoch) of each trial."""

    def make(trials: list[tuple[dict, list[float]]]) -> tuple[Search, list[dict]]:
        configs = {f"train_cifar_{i:05}": CONFIG | change for i, (change, _) in enumerate(trials)}
        for (name, config), (_, accuracies) in zip(configs.items(), trials, strict=True):
            write_params(tmp_path / name, config)
            for epoch, accuracy in enumerate(accuracies, 1):
                loss = float("nan") if accuracy < 0.05 else 1.0
                done = {"done": True} if epoch == len(accuracies) else {}
                append_line(tmp_path / name, sealed(log_line(epoch, accuracy=accuracy, loss=loss, **done)) + "\n")
        search = Search(tmp_path, Settings(grace_period=2), {}, SEARCHED, {}, configs)
        return search, read_results(search)

    return make


def test_what_orders_the_trials_is_found_and_what_does_not_is_not(finished: Callable) -> None:
    rng = np.random.default_rng(1)
    trials = []
    for i in range(16):
        lr = 10 ** (-4 + i / 8)
        # At epoch 3 the accuracy follows lr; later epochs, which few reach, turn it round.
        curve = [0.1, 0.1, 0.2 + i / 50, *([0.9 - i / 50] * (i % 3))]
        trials.append(({"lr": lr, "h_1": int(rng.choice([4, 8])), "p_drop": rng.uniform(0.2, 0.4)}, curve))
    search, results = finished(trials)
    lines = conclusions(search, results)
    assert lines[0] == "What mattered (accuracy at epoch 3 of 16 trials): lr +1.00."
    assert set(lines[1].removeprefix("No significant effect: ").rstrip(".").split(", ")) == {"h_1", "p_drop"}
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 3


def test_levels_of_a_grid_are_compared(finished: Callable) -> None:
    rng = np.random.default_rng(0)
    trials = [
        ({"lr": 10 ** rng.uniform(-4, -2), "h_1": h_1, "p_drop": 0.3}, [0.2 + 0.3 * (h_1 == 8) + rng.uniform(0, 0.1)])
        for h_1, _ in itertools.product([4, 8], range(7))
    ]
    trials.append(({"lr": 0.099, "h_1": 4, "p_drop": 0.3}, [0.01]))  # diverged: the last
    trials[-2][1][0] = 0.7
    lines = conclusions(*finished(trials))
    assert lines[0].startswith("What mattered (accuracy at epoch 1 of 15 trials): h_1 0.8")
    assert lines[0].endswith("(best 8).")


@pytest.mark.parametrize(
    ("values", "accuracies", "words"),
    [
        ({"h_1": [4, 8, 16]}, lambda config: config["h_1"], "h_1 16 (upper)"),
        ({"h_1": [4, 8, 16]}, lambda config: -config["h_1"], "h_1 4 (lower)"),
        ({"h_1": [4, 8, 16]}, lambda config: -abs(config["h_1"] - 8), None),
        ({"h_1": [4, 16]}, lambda config: config["h_1"], "h_1 16 (upper)"),  # of a grid that has three
        ({"p_drop": np.linspace(0.1, 0.5, 12)}, lambda config: config["p_drop"], "p_drop 0.5 (upper)"),
        ({"p_drop": np.linspace(0.15, 0.45, 12)}, lambda config: config["p_drop"], None),
        # The best is at the upper end, the next best at the lower one.
        (
            {"p_drop": np.linspace(0.1, 0.5, 12)},
            lambda config: max(-config["p_drop"], 9 * config["p_drop"] - 4.3),
            None,
        ),
    ],
)
def test_edges_are_told_only_where_accuracy_rises_towards_them(
    values: dict, accuracies: Callable, words: str | None, finished: Callable
) -> None:
    ((key, ends),) = values.items()
    configs = [{"lr": 1e-3, "h_1": 8, "p_drop": 0.3} | {key: ends[i % len(ends)]} for i in range(12)]
    scores = [accuracies(config) for config in configs]
    low, high = min(scores), max(scores)
    trials = [(config, [0.1 + 0.8 * (s - low) / (high - low)]) for config, s in zip(configs, scores, strict=True)]
    edges = [line for line in conclusions(*finished(trials)) if "end of its range" in line]
    assert edges == ([f"Best near the end of its range; consider widening: {words}."] if words else [])


def test_few_trials_tell_nothing(finished: Callable) -> None:
    trials = [({"lr": 10.0**-i, "h_1": 4, "p_drop": 0.3}, [0.5 - i / 20]) for i in range(1, 8)]
    assert conclusions(*finished(trials))[0] == "What mattered: needs at least 8 finished trials (7 so far)."


def test_chance_alone_stands_out_in_few_searches() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        accuracies = rng.normal(size=10)
        found += effect(list(rng.normal(size=10)), accuracies, levels=False)[1] < SIGNIFICANCE
        found += effect(list(rng.integers(0, 2, 10)), accuracies, levels=True)[1] < SIGNIFICANCE
    assert 8 <= found <= 34  # of 400, 20 are expected


def test_effects_are_those_of_the_textbook() -> None:
    rng = np.random.default_rng(0)
    values, accuracies = rng.normal(size=12), rng.normal(size=12)
    size, _, text = effect(list(values), accuracies, levels=False)
    squares = ((ranks(values) - ranks(accuracies)) ** 2).sum()
    rho = 1 - 6 * squares / (12 * (12**2 - 1))  # Spearman's formula without ties
    assert size == pytest.approx(rho)
    assert text == f"{rho:+.2f}"
    # Kruskal and Wallis's H is (n - 1) times the square of the correlation ratio of ranks.
    order = ranks(accuracies) + 1
    h = 12 / (12 * 13) * sum(order[i::3].sum() ** 2 / 4 for i in range(3)) - 3 * 13
    size, _, text = effect([8, 16, 32] * 4, accuracies, levels=True)
    assert size**2 == pytest.approx(h / 11)


def test_ranks_share_ties() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_ends_of_ranges_grids_and_words() -> None:
    for value, what, end in (
        (4, {"values": [4, 8, 16]}, "lower"),
        (8, {"values": [4, 8, 16]}, None),
        (8, {"values": [4, 8]}, None),  # of two, one is always at an end
        (8, {"values": [4, 8, 8]}, None),
        ("cosine", {"values": ["constant", "cosine", "one_cycle"]}, None),
        (True, {"values": [True, False]}, None),
        (1.2e-5, SEARCHED["lr"], "lower"),
        (64, {"lower": 64, "upper": 64, "log": False}, None),  # as tune.randint(64, 65) has it
        (1e-3, SEARCHED["lr"], None),
        (0.49, SEARCHED["p_drop"], "upper"),
    ):
        assert end_of_range(value, what) == end


def test_edges_are_seldom_told_by_chance(finished: Callable) -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(40):
        draws = [(10 ** rng.uniform(-5, -1), int(rng.choice([4, 8, 16])), rng.uniform(0.1, 0.5)) for _ in range(8)]
        configs = [dict(zip(("lr", "h_1", "p_drop"), draw, strict=True)) for draw in draws]
        trials = [(config, [rng.uniform(0.1, 0.9)]) for config in configs]
        found += any("end of its range" in line for line in conclusions(*finished(trials)))
    assert found <= 2


def test_rungs_tell_when_trials_ended_and_what_their_order_was_worth(finished: Callable) -> None:
    curves = [[0.1, 0.1], [0.1, 0.2], [0.1, 0.3, 0.7], [0.1, 0.4, 0.6], [0.1, 0.5, 0.8], [0.2, 0.1, 0.01]]
    lines = rungs(*finished([({}, curve) for curve in curves]))
    assert lines == [
        "Trials ended after epoch 2 (2 of them), 3 (4 of them).",
        "The order at epoch 2 and in the end: rank correlation +0.50 (3 trials).",
    ]


def test_rungs_of_too_few_trials_tell_nothing(finished: Callable) -> None:
    lines = rungs(*finished([({}, [0.1, 0.1]), ({}, [0.1, 0.2, 0.3])]))
    assert lines[1].endswith("too few trials went on (1 of 3).")
