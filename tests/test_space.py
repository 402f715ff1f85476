import random

import numpy as np
import pytest
from ray import tune

from data import InputError
from search.sampler import draw_configs
from search.space import check_space, end_of_range, summarize, to_plain
from tests.helpers import CONFIG, SPACE


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
        ("epochs", tune.grid_search([5, 10]), "'epochs'. cannot be searched"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            check_space(SPACE | {key: entry})
    with pytest.raises(InputError, match="lacks 'p_drop'"):
        check_space({key: SPACE[key] for key in SPACE if key != "p_drop"})


def test_any_space_is_refused_in_a_sentence_or_drawn_from() -> None:
    odd = [None, True, 0, 1, -1, 0.5, 1e400, float("nan"), 10**400, 2**70, "", "cosine", [], [1], {}, object, 1j,
           {"grid_search": []}, {"grid_search": 3}, {"grid_search": [1], "x": 1}, {"grid_search": [{}]}, lambda: 1,
           np.float64(0.1), np.int32(7), np.zeros(3), tune.choice([1, "a"]), tune.choice([]), tune.randn(),
           tune.uniform(0.0, 1.0), tune.uniform(1.0, 0.1), tune.loguniform(np.float64(1e-4), np.float32(1e-2)),
           tune.grid_search(np.array([4, 8])), tune.choice([np.True_]), tune.grid_search(range(16, 64, 16)),
           tune.qloguniform(1e-4, 1e-1, 5e-5), tune.randint(1, np.int64(9)), tune.grid_search((4, 8)),
           tune.grid_search([tune.uniform(0, 1)]), tune.sample_from(lambda _: 4), tune.sample_from(lambda _: 1 / 0),
           tune.sample_from(lambda spec: spec.config.nothing)]  # fmt: skip
    generator, drawn, refusals = random.Random(0), 0, []
    for _ in range(2000):
        keys = generator.sample([*SPACE, *SPACE, "LR", 3], generator.randrange(1, 3))
        space = SPACE | {key: generator.choice(odd) for key in keys}
        try:
            check_space(space)
            configs = draw_configs(space, generator.choice([1, 3]), 0)
        except InputError as error:
            refusals.append(str(error))
            continue
        drawn += 1
        for config in configs:
            check_space(config)
            assert {type(value) for value in config.values()} <= {bool, int, float, str}
    assert min(drawn, len(refusals)) > 100
    assert not any("\n" in refusal for refusal in refusals)


def test_summary_says_what_is_searched_and_where_a_value_lies_at_an_end() -> None:
    space = {"h_1": tune.grid_search(np.array([8, 4, 16])), "lr": tune.loguniform(1e-5, np.float64(0.1)), "h_2": 64}
    space |= {"p_drop": tune.uniform(0.1, 0.5), "schedule": tune.choice(["constant", "cosine"])}
    space |= {"batch_size": tune.randint(64, 65), "momentum": tune.sample_from(lambda _: 0.1), "seed": tune.choice([3])}
    summary = summarize(to_plain(space))
    assert repr(list(summary.values())) == repr([
        {"values": [8, 4, 16]}, {"lower": 1e-5, "upper": 0.1, "log": True}, 64,
        {"lower": 0.1, "upper": 0.5, "log": False}, {"values": ["constant", "cosine"]},
        {"lower": 64, "upper": 64, "log": False}, {}, 3
    ])  # fmt: skip
    assert summarize(CONFIG) == CONFIG
    for key, value, end in (
        ("h_1", 4, "lower"), ("h_1", 16, "upper"), ("h_1", 8, None), ("lr", 1.2e-5, "lower"), ("lr", 1e-3, None),
        ("p_drop", 0.49, "upper"), ("p_drop", 0.4, None), ("schedule", "cosine", None), ("batch_size", 64, None),
    ):  # fmt: skip
        assert end_of_range(value, summary[key]) == end
