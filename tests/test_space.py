import json
import random

import numpy as np
import pytest
import torch
from ray import tune

from data import InputError
from hparam_search import BASELINE_RECIPE, param_space
from search.space import check_param_space, described, draw_trials, plain, searched


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.1}, "unknown key 'learning_rate'"),
        ({"lr": 0.0}, r"\['lr'\] can be 0.0"),
        ({"lr": tune.uniform(-1, 1)}, r"\['lr'\] can be -1"),
        ({"lr": float("nan")}, r"\['lr'\] can be nan"),
        ({"h_1": tune.grid_search([64, 0])}, r"\['h_1'\] can be 0"),
        ({"h_1": tune.grid_search([])}, "needs a list of values"),
        ({"h_2": 64.0}, r"\['h_2'\] can be 64.0"),
        ({"h_2": tune.randint(0, 9)}, r"\['h_2'\] can be 0"),
        ({"p_drop": tune.uniform(0, 1)}, r"\['p_drop'\] can be 1"),
        ({"batch_size": True}, r"\['batch_size'\] can be True"),
        ({"schedule": tune.choice(["constant", "linear"])}, r"\['schedule'\] can be 'linear'"),
        ({"nesterov": 1}, r"\['nesterov'\] can be 1"),
        ({"momentum": 0.0}, "nesterov"),
        ({"ema_decay": 1}, r"\['ema_decay'\] can be 1"),
        ({"weight_decay": -1e-4}, r"\['weight_decay'\] can be -0.0001"),
        ({"epochs": tune.grid_search([5, 10])}, r"\['epochs'\] is searched"),
        ({"epochs": 0}, r"\['epochs'\] can be 0"),
    ],
)
def test_bad_param_spaces_are_refused(change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_param_space({"seed": 0} | param_space | change)


def test_good_param_spaces_are_not() -> None:
    check_param_space({"seed": 0} | param_space)
    check_param_space({"seed": 0} | param_space | BASELINE_RECIPE)
    check_param_space(
        {"seed": tune.grid_search([0, 1])} | param_space | {"schedule": tune.choice(["cosine", "constant"])}
    )
    check_param_space(
        {"seed": 0} | param_space | {"h_1": tune.qrandint(16, 64, 16), "lr": tune.sample_from(lambda _: 1)}
    )


@pytest.mark.parametrize(
    ("key", "numpy_entry", "entry"),
    [
        ("lr", tune.grid_search(np.array([0.5, 0.25])), tune.grid_search([0.5, 0.25])),
        ("lr", tune.grid_search(list(np.array([0.5, 0.25]))), tune.grid_search([0.5, 0.25])),
        ("h_1", tune.grid_search(range(16, 64, 16)), tune.grid_search([16, 32, 48])),
        ("h_1", tune.grid_search((16, np.int32(32))), tune.grid_search([16, 32])),
        ("batch_size", tune.choice(np.array([32, 64])), tune.choice([32, 64])),
        ("nesterov", tune.choice([np.True_, np.False_]), tune.choice([True, False])),
        ("lr", tune.loguniform(np.float64(2**-9), np.float32(0.5)), tune.loguniform(2**-9, 0.5)),
        ("h_2", tune.randint(np.int64(8), np.uint8(99)), tune.randint(8, 99)),
        ("lr", np.float32(0.5), 0.5),
        ("batch_size", np.array(64), 64),
        ("schedule", np.str_("cosine"), "cosine"),
    ],
)
def test_numpy_in_a_space_is_as_good_as_python(key: str, numpy_entry: object, entry: object) -> None:
    of_numpy, of_python = ({"seed": 0} | param_space | {key: value} for value in (numpy_entry, entry))
    check_param_space(of_numpy)
    trials = draw_trials(of_numpy, 2, 0)
    assert trials == draw_trials(of_python, 2, 0)
    assert json.loads(json.dumps(trials)) == trials
    assert {type(config[key]) for config in trials.values()} <= {bool, int, float, str}
    assert described(plain(of_numpy)) == described(of_python)
    assert searched(of_numpy) == searched(of_python)


def test_any_param_space_is_refused_or_drawn_from() -> None:
    odd = [None, True, False, 0, 1, -1, 2, 0.5, 1e-5, 1e400, float("nan"), 10**400, 2**70, "", "cosine", b"x", [], [1],
           (), {}, {"grid_search": []}, {"grid_search": 3}, {"grid_search": [1], "x": 1}, {"grid_search": [{}]}, object,
           lambda: 1, 1j, np.float64(0.1), np.int64(4), torch.tensor(3), np.zeros(3),
           tune.choice([1, "a"]), tune.choice([]), tune.uniform(0.0, 1.0), tune.uniform(1.0, 0.1), tune.randn(),
           tune.loguniform(1e-4, 1e-2), tune.qloguniform(1e-4, 1e-1, 5e-5), tune.randint(1, 9), tune.randint(5, 5),
           tune.quniform(0.1, 0.9, 0.1), tune.sample_from(lambda _: 4), tune.sample_from(lambda _: 1 / 0),
           tune.sample_from(lambda spec: spec.config.nothing), tune.grid_search([4, 8]),
           tune.grid_search([tune.uniform(0, 1)])]  # fmt: skip
    generator, drawn, refusals = random.Random(0), 0, []
    for _ in range(3000):
        space = {"seed": 0} | param_space
        for key in generator.sample(list(space), generator.randrange(1, 3)):
            space[key] = generator.choice(odd)
        if generator.random() < 0.1:
            space[generator.choice(["", "LR", "lr ", 3, None])] = generator.choice(odd)
        try:
            check_param_space(space)
            trials = draw_trials(space, generator.choice([1, 3]), 0)
        except InputError as error:
            refusals.append(str(error))
            continue
        drawn += 1
        for config in trials.values():
            check_param_space(json.loads(json.dumps(config)))
    assert drawn > 100
    assert len(refusals) > 100
    assert not any("\n" in refusal for refusal in refusals)


def test_too_many_trials_are_refused() -> None:
    with pytest.raises(InputError, match="make 4,000,000,000 trials"):
        draw_trials({"seed": 0} | param_space, 10**9, 0)


def test_missing_key_is_named() -> None:
    space = {"seed": 0} | param_space
    del space["lr"]
    with pytest.raises(InputError, match="lacks 'lr'"):
        check_param_space(space)


def test_first_trials_come_first_and_change_no_draw() -> None:
    space = {"seed": 0} | param_space
    draws = list(draw_trials(space, 3, 5).values())
    first = {"lr": 0.02, "h_1": 128, "p_drop": 0.3, "h_2": 512}
    trials = list(draw_trials(space, 3, 5, [{"lr": np.float64(0.01)}, first]).values())
    assert trials[2:] == draws
    assert trials[0]["lr"] == 0.01
    assert 0.1 <= trials[0]["p_drop"] <= 0.5
    assert trials[1] == draws[0] | first
    for bad, words in (
        ({"momentum": 0.8}, r"first_trials\[0\] has 'momentum', which is not searched"),
        ({"lr": -1}, "can be -1"),
        ([], r"first_trials\[0\] is \[\], but must be a dict"),
    ):
        with pytest.raises(InputError, match=words):
            draw_trials(space, 3, 5, [bad])
