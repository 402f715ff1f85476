import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from ray import tune

from data import InputError
from search.records import config_key
from search.sampler import draw_configs, outcomes, suggest_config
from search.space import check_space, count_configs, end_of_range, summarize
from tests.helpers import SPACE, add, search_in


def test_bad_spaces_are_refused() -> None:
    check_space(SPACE)
    for key, entry, words in (
        ("learning_rate", 0.1, "unknown key 'learning_rate'"), ("lr", 0.0, "lr cannot be 0.0; use a number above 0"),
        ("lr", tune.uniform(-1, 1), "lr cannot be -1"), ("lr", float("nan"), "lr cannot be nan"),
        ("lr", tune.uniform(0.1, 0.01), "lower bound 0.1 and upper bound 0.01"), ("h_2", 64.0, "be 64.0"),
        ("h_1", tune.grid_search([64, 0]), "h_1 cannot be 0"), ("h_1", tune.grid_search([]), "give grid_search a list"),
        ("h_2", tune.randint(0, 9), "h_2 cannot be 0"), ("p_drop", tune.uniform(0, 1), "p_drop cannot be 1"),
        ("batch_size", True, "batch_size cannot be True"), ("schedule", tune.choice(["linear"]), "cannot be 'linear'"),
        ("nesterov", 1, "nesterov cannot be 1"), ("momentum", 0.0, "cannot be True with momentum 0"),
        ("ema_decay", 1, "ema_decay cannot be 1"), ("weight_decay", -1e-4, "weight_decay cannot be -0.0001"),
        ("bias_lr", -1, "bias_lr cannot be -1"), ("crop_padding", 32, "cannot be 32; use a whole number from 0 to 31"),
        ("crop_padding", 2.0, "crop_padding cannot be 2.0"), ("flip", 1, "flip cannot be 1; use True or False"),
        ("epochs", tune.grid_search([5, 10]), "'epochs'. cannot be searched"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            check_space(SPACE | {key: entry})
    with pytest.raises(InputError, match="lacks 'p_drop'"):
        check_space({key: SPACE[key] for key in SPACE if key != "p_drop"})


def test_numpy_in_a_space_is_as_good_as_python() -> None:
    space = {"h_1": tune.grid_search(np.array([8, 4])), "lr": tune.loguniform(1e-5, np.float32(0.5)), "h_2": np.int8(7)}
    space |= {"p_drop": tune.uniform(0.1, 0.5), "schedule": tune.choice(np.array(["constant", "cosine"]))}
    space |= {"batch_size": tune.randint(8, np.int64(65)), "momentum": tune.sample_from(lambda _: np.float64(0.1))}
    check_space(SPACE | space)
    for config in draw_configs(SPACE | space, 5, 0):
        check_space(config)
        assert {type(value) for value in config.values()} == {bool, int, float, str}


def test_every_grid_point_is_drawn_as_often_as_asked_and_first_trials_change_no_draw() -> None:
    first = {"lr": 0.02, "h_1": 128, "p_drop": 0.3, "h_2": 512}
    configs = draw_configs(SPACE, 250, seed=3)
    assert configs[:20] == draw_configs(SPACE, 5, 3) != draw_configs(SPACE, 5, 4)
    points = [(config["h_1"], config["h_2"]) for config in configs]
    assert all(points.count((h_1, h_2)) == 250 for h_1 in (64, 128) for h_2 in (512, 1024))
    assert all(1e-5 <= config["lr"] <= 1e-1 and 0.1 <= config["p_drop"] <= 0.5 for config in configs)
    assert 400 < sum(config["lr"] < 1e-3 for config in configs) < 600  # half lie below the geometric mean
    assert draw_configs(SPACE, 5, 3, stream=1) != configs[:20] == draw_configs(SPACE, 5, 3, stream=0)
    drawn = draw_configs(SPACE, 5, 3, [{"lr": 0.01}] * 20 + [first])
    assert drawn[20:] == [configs[0] | first, *configs[:20]]
    assert {(config["lr"], config["h_1"]) for config in drawn[:20]} == {(0.01, 64), (0.01, 128)}
    for bad, words in (({"momentum": 0.8}, "not searched"), ({"lr": -1}, "cannot be -1"), ([], "make it a list of di")):
        with pytest.raises(InputError, match=words):
            draw_configs(SPACE, 3, 5, [bad])


def test_tpe_is_told_of_the_first_rung_which_all_trials_reach_or_else_of_the_best_epochs(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    add(search, 0.3, 0.2, 0.9, end=None, h_1=0)
    add(search, 0.1, 0.4, h_1=1)
    add(search, 0.5, end=None, repeats="train_cifar_00000", h_1=2)
    add(search, 0.6, 0.7, -1, h_1=3)
    add(search, -1, h_1=4)
    for rung, expected in ((2, {0: 0.3, 1: 0.4, 3: 0.3, 4: 0.3}), (None, {1: 0.4, 3: 0.4, 4: 0.4})):
        told = outcomes(search.own_trials(), search.objective, rung)
        assert {config["h_1"]: score for config, score in told} == expected


def test_tpe_depends_on_its_arguments_alone_and_finds_what_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    told = []
    for number in range(40):
        config = suggest_config(SPACE, 3, number, told, 10)
        assert config == suggest_config(SPACE, 3, number, told, 10)
        check_space(config)
        told.append((config, 0.8 - abs(math.log10(config["lr"] / 0.01)) / 5 - (config["h_1"] == 64) / 10))
    assert sum(score for _, score in told[20:]) / 20 > sum(score for _, score in told[:10]) / 10 + 0.1
    outside = [({**config, "h_1": 4, "lr": 1.0}, 0.9)]  # one of the first trials
    last = suggest_config(SPACE, 3, 40, told, 10)
    assert suggest_config(SPACE, 3, 40, told + outside, 10) == last != suggest_config(SPACE, 4, 40, told, 10)
    (drawn,) = draw_configs(SPACE | {"h_1": tune.choice([64]), "h_2": 512}, 1, 0, tpe=True)
    assert drawn["h_1"] == 64
    assert "lr" not in drawn  # TPE draws it
    with pytest.raises(InputError, match=r"Optuna cannot draw param_space\['lr'\]; use another range"):
        draw_configs(SPACE | {"lr": tune.sample_from(lambda _: 0.1)}, 1, 0, tpe=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--sampler tpe needs the optuna package; run pip install optuna"):
        draw_configs(SPACE, 1, 0, tpe=True)


def test_tpe_draws_each_config_of_a_finite_space_once() -> None:
    pytest.importorskip("optuna")
    finite = SPACE | {"lr": 0.1, "p_drop": tune.choice([0.1, 0.2]), "batch_size": tune.randint(8, 10)}
    for entry, count in ((tune.quniform(0.1, 0.3, 0.1), 3), (tune.randint(5, 7), 2), (tune.uniform(0, 1), math.inf)):
        assert count_configs(finite | {"weight_decay": entry}) == 4 * 2 * 2 * count
    told, taken = [], []
    for number in range(16):
        config = suggest_config(finite, 3, number, told, 4, taken=taken)
        told.append((config, config["p_drop"]))
        taken.append(config_key(config))
    assert len(set(taken)) == 16


def test_best_value_lies_at_the_end_of_a_range_within_a_twentieth_of_it() -> None:
    log, even, grid = tune.loguniform(1e-4, 1), tune.uniform(1, 3), tune.grid_search([2, 1, 3])
    for entry, value, expected in (
        (log, 1e-4, "lower"), (log, 1.5e-4, "lower"), (log, 1.7e-4, None), (log, 0.6, None), (log, 1.0, "upper"),
        (log, 1.01, None), (even, 2.91, "upper"), (even, 2.89, None), (even, 0.9, None), (grid, 1, "lower"),
        (grid, 2, None), (tune.choice(["a", "b"]), "a", None),
    ):  # fmt: skip
        assert end_of_range(value, summarize({"it": entry})["it"]) == expected
