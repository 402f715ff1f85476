import importlib.util
import math

import pytest
from ray import tune

from data import InputError
from search.sampler import draw_configs, suggest_config
from search.space import check_space
from tests.helpers import SPACE


def test_every_grid_point_is_drawn_as_often_as_asked_and_first_trials_change_no_draw() -> None:
    first = {"lr": 0.02, "h_1": 128, "p_drop": 0.3, "h_2": 512}
    configs = draw_configs(SPACE, 250, seed=3)
    assert configs[:20] == draw_configs(SPACE, 5, 3) != draw_configs(SPACE, 5, 4)
    points = [(config["h_1"], config["h_2"]) for config in configs]
    assert all(points.count((h_1, h_2)) == 250 for h_1 in (64, 128) for h_2 in (512, 1024))
    assert all(1e-5 <= config["lr"] <= 1e-1 and 0.1 <= config["p_drop"] <= 0.5 for config in configs)
    assert 400 < sum(config["lr"] < 1e-3 for config in configs) < 600  # half lie below the geometric mean
    drawn, *others = draw_configs(SPACE, 5, 3, [{"lr": 0.01}, first])
    assert others == [configs[0] | first, *configs[:20]]
    assert drawn["lr"] == 0.01
    check_space(drawn)
    for bad, words in (({"momentum": 0.8}, "not searched"), ({"lr": -1}, "cannot be -1"), ([], "make it a dict")):
        with pytest.raises(InputError, match=words):
            draw_configs(SPACE, 3, 5, [bad])


def test_tpe_depends_on_its_arguments_alone_and_finds_what_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    outcomes = []
    for number in range(40):
        config = suggest_config(SPACE, 3, number, outcomes, 10)
        assert config == suggest_config(SPACE, 3, number, outcomes, 10)
        check_space(config)
        outcomes.append((config, 0.8 - abs(math.log10(config["lr"] / 0.01)) / 5 - (config["h_1"] == 64) / 10))
    first, last = (sum(score for _, score in part) / len(part) for part in (outcomes[:10], outcomes[20:]))
    assert last > first + 0.1
    outside = [({**config, "h_1": 4, "lr": 1.0}, 0.9)]  # one of the first trials
    last = suggest_config(SPACE, 3, 40, outcomes, 10)
    assert suggest_config(SPACE, 3, 40, outcomes + outside, 10) == last != suggest_config(SPACE, 4, 40, outcomes, 10)
    with pytest.raises(InputError, match=r"Optuna cannot draw param_space\['lr'\]; use another range"):
        draw_configs(SPACE | {"lr": tune.sample_from(lambda _: 0.1)}, 1, 0, tpe=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--sampler tpe needs the optuna package; run pip install optuna"):
        draw_configs(SPACE, 1, 0, tpe=True)
