from statistics import mean

import numpy as np
import pytest
from ray import tune

from data import InputError
from search.sampler import draw_configs
from search.space import check_space, places_of, possible_values, summarize, value_at
from tests.helpers import SPACE


def test_bad_spaces_are_refused() -> None:
    check_space(SPACE)
    for key, entry, words in (
        ("learning_rate", 0.1, "unknown key 'learning_rate'"), ("lr", 0.0, "lr cannot be 0.0; use a number above 0"),
        ("lr", tune.uniform(-1, 1), "lr cannot be -1"), ("lr", float("nan"), "lr cannot be nan"),
        ("lr", tune.uniform(0.1, 0.01), "no values between its bounds, 0.1 and 0.01"), ("h_2", 64.0, "be 64.0"),
        ("h_1", tune.qrandint(17, 30, 16), "no values between its bounds, 17 and 30"),
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
    for config in draw_configs(SPACE | space, [5], 0):
        check_space(config)
        assert {type(value) for value in config.values()} == {bool, int, float, str}


@pytest.mark.parametrize(
    ("entry", "few"),
    [
        (tune.uniform(0.1, 0.5), None), (tune.loguniform(1e-5, 1e-1), None), (tune.quniform(0.2, 0.9, 0.1), 8),
        (tune.randint(3, 10), 7), (tune.qrandint(8, 64, 8), 8), (tune.qrandint(10, 70, 16), 4),
        (tune.choice([0.5, 0.1, 0.3]), 3), (tune.choice(["b", "a", None]), 3), (tune.grid_search([64, 128]), 2),
    ],
)  # fmt: skip
def test_values_of_equal_parts_are_equally_frequent_and_places_lead_back(entry: object, few: int | None) -> None:
    summary = summarize({"it": entry})["it"]
    for place in (i / 840 for i in range(840)):
        value = value_at(place, summary)
        first, last = places_of(value, summary)
        assert first - 1e-9 <= place <= last + 1e-9
        assert last - first == pytest.approx(1 / few if few else 0)
    for value in possible_values(summary):
        assert value_at(mean(places_of(value, summary)), summary) == value
    assert places_of(99, summary) is None


def test_integers_on_a_logarithmic_scale_are_the_rarer_the_higher_they_are() -> None:
    for entry, values in (
        (tune.lograndint(1, 5), [1, 2, 3, 4]),
        (tune.qlograndint(2, 8, 2), [2, 4, 6, 8]),
        (tune.qlograndint(10, 70, 16), [16, 32, 48, 64]),
    ):
        summary = summarize({"it": entry})["it"]
        assert sorted({value_at(i / 1000, summary) for i in range(1000)}) == values
        shares = [last - first for first, last in (places_of(value, summary) for value in values)]
        assert sum(shares) == pytest.approx(1)
        assert shares == sorted(shares, reverse=True)
