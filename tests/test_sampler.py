"""Draws cover the range of each hyperparameter, overall and at each grid point."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from ray import tune

from data import InputError
from search.records import LOG_FILE, Search, open_search
from search.sampler import draw_configs, new_trials
from search.space import check_first_trials, check_space, places_of, summarize
from tests.helpers import SPACE, search_in

ENTRIES = {
    "p_drop": tune.uniform(0.1, 0.5), "lr": tune.loguniform(1e-5, 1e-1), "momentum": tune.quniform(0.05, 0.9, 0.05),
    "batch_size": tune.randint(16, 129), "schedule": tune.choice(["cooldown", "cosine"]),
    "crop_padding": tune.choice([0, 1, 2, 3, 4]),
}  # fmt: skip


def parts(configs: list[dict], key: str, count: int) -> list[set[int]]:
    """Return for each config in which of `count` equal parts of a range its value lies, at least partly."""
    entry = summarize(ENTRIES)[key]
    found = (places_of(config[key], entry) for config in configs)
    return [set(range(int(count * first), min(math.ceil(count * last + 1e-9), count))) for first, last in found]


def one_in_each(found: list[set[int]]) -> bool:
    """Return whether each config can be matched to a part of its own, so that every part is used."""
    holders: dict[int, int] = {}  # part → the set that it represents

    def place(i: int, tried: set[int]) -> bool:
        for part in found[i] - tried:
            tried.add(part)
            if part not in holders or place(holders[part], tried):
                holders[part] = i
                return True
        return False

    return all(place(i, set()) for i in range(len(found)))


@pytest.mark.parametrize("points", [1, 4, 7])
@pytest.mark.parametrize("samples", [[3], [12], [3, 6, 12]])
def test_each_part_of_each_range_has_a_draw_at_each_grid_point_and_overall(points: int, samples: list[int]) -> None:
    space = SPACE | ENTRIES | {"h_1": tune.grid_search(list(range(8, 8 + points))), "h_2": 8}
    for seed in range(10):
        configs = draw_configs(space, samples, seed)
        assert len(configs) == samples[-1] * points
        for key in ENTRIES:
            assert one_in_each(parts(configs, key, len(configs)))
            for h_1 in range(8, 8 + points):
                assert one_in_each(parts([each for each in configs if each["h_1"] == h_1], key, samples[-1]))


def discrepancy(configs: list[dict]) -> float:
    """Return the squared centred L2 discrepancy of learning rates and dropouts (Hickernell 1998, equation 3.9)."""
    space = summarize(SPACE)
    x = np.array([[places_of(config[key], space[key])[0] for key in ("lr", "p_drop")] for config in configs])
    a = abs(x - 0.5)
    pairs = 1 + (a[:, None] + a - abs(x[:, None] - x)) / 2
    return (13 / 12) ** 2 - (2 + a - a**2).prod(1).mean() / 2 + pairs.prod(2).mean()


def independent(count: int, seed: int) -> list[dict]:
    places = np.random.default_rng(seed).random((count, 2))
    return [{"lr": 1e-5 * 1e4**lr, "p_drop": 0.1 * 5**p_drop} for lr, p_drop in places]


@pytest.mark.parametrize("samples", [[3], [3, 6], [3, 6, 12], [3, 4], [2, 5, 9]])
def test_draws_that_were_added_later_cover_the_space_better_than_independent_ones(samples: list[int]) -> None:
    better = 0
    for seed in range(100):
        configs = draw_configs(SPACE, samples, seed)
        assert configs[: 4 * samples[0]] == draw_configs(SPACE, samples[:1], seed)
        better += discrepancy(configs) < discrepancy(independent(len(configs), seed))
    assert better >= 95
    assert draw_configs(SPACE, [3, 6], 0) == draw_configs(SPACE, [6], 0) != draw_configs(SPACE, [6], 1)


def test_draws_fall_between_first_trials_and_those_of_earlier_searches() -> None:
    around, regardless = [], []
    for seed in range(50):
        earlier = draw_configs(SPACE, [3], seed)
        around.append(discrepancy(earlier + draw_configs(SPACE, [3], seed + 1, earlier=earlier)))
        regardless.append(discrepancy(earlier + draw_configs(SPACE, [3], seed + 1)))
    assert np.mean(around) < 0.8 * np.mean(regardless)
    first = [{"lr": 0.1, "h_1": 64, "p_drop": 0.1, "h_2": 512}, {"lr": 0.02}, {"lr": 9.0, "h_1": 5}]
    outside = [first[0] | {"lr": 1e-7}, first[0] | {"lr": 0.2, "h_2": 5}]
    configs = draw_configs(SPACE, [3], 0, first, outside)
    assert [config["lr"] for config in configs[:3]] == [0.1, 0.02, 9.0]
    assert configs[0]["momentum"] == SPACE["momentum"]
    entry = summarize(SPACE)["lr"]
    inside = [places_of(config["lr"], entry)[0] for config in (*configs[:2], *configs[3:])]
    assert sorted(int(14 * place - 1e-9) for place in inside) == list(range(14))
    for config in configs[3:]:
        check_space(config)
    points = [(config["h_1"], config["h_2"]) for config in configs[3:]]
    assert points == [(64, 512), (64, 1024), (128, 512), (128, 1024)] * 3
    # At the grid point of the first trials, new draws keep away from these.
    crowd = [{"lr": 1e-5 * 10**i, "p_drop": 0.2, "h_1": 128, "h_2": 512} for i in range(3)]
    for seed in range(20):
        rates = [config["lr"] for config in draw_configs(SPACE, [3], seed, crowd)[3:] if config["h_1"] == 128]
        assert sum(rate > 10 ** (-5 + 4 / 6 * 4) for rate in rates[::2]) >= 1
    omitted = [config["lr"] for config in draw_configs(SPACE, [1], 0, [{"h_1": 64}] * 20)[:20]]
    assert len({int(math.log10(rate)) for rate in omitted}) > 2


def drawn(search: Search) -> dict[str, dict]:
    """Draw what a search lacks, and return all its configs."""
    search.draw(new_trials(search, SPACE))
    return {trial.name: trial.config for trial in sorted(search.own_trials(), key=lambda trial: trial.name)}


@pytest.mark.parametrize("source", [None, "other/train_cifar_00000"])
def test_draws_survive_a_kill_at_any_line_of_the_log_and_damage_to_any(source: str | None, tmp_path: Path) -> None:
    search, log = search_in(tmp_path / "it", num_samples=1), tmp_path / "it" / LOG_FILE
    search.samples, search.space["first_trials"] = [], [{"lr": 0.02}]
    for i, config in enumerate(draw_configs(SPACE, [1], 9)[: 2 if source else 0]):
        search.record("drawn", trial=f"train_cifar_{i:05}", config=config, repeats=None, source=source)
        search.first_number += 1
    search.write()
    few = drawn(search)
    earlier = [config for name, config in few.items() if search.trials[name].source]
    assert list(few.values())[len(earlier) :] == draw_configs(SPACE, [1], 0, [{"lr": 0.02}], earlier)
    assert drawn(open_search(search.folder, {})) == few
    before = log.read_text().splitlines(keepends=True)
    search = open_search(search.folder, {"num_samples": 3})
    many, unfinished = drawn(search), (search.folder / "search.json").read_text()
    assert many | few == many
    lines = log.read_text().splitlines(keepends=True)
    assert len(many) == len(few) + 8
    assert len(lines) == len(before) + 1 + 8
    for end in range(len(before) + 1, len(lines) + 1):  # killed while it draws: what was asked for is known
        log.write_text("".join(lines[:end]))
        again = open_search(search.folder, {})
        assert (again.grown, again.settings.num_samples) == (True, 3)
        assert drawn(again) == many
        with pytest.raises(InputError, match="--num-samples 2 is less than the search has; use at least 3"):
            open_search(search.folder, {"num_samples": 2})
    again.write()
    assert not open_search(search.folder, {"num_samples": 3}).grown
    for damaged in range(again.first_number, len(lines)):
        log.write_text("".join([*lines[:damaged], "{\n", *lines[damaged + 1 :]]))
        assert drawn(open_search(search.folder, {})) == many
    # As an older version wrote it: with a random stream, and with Optuna's draws, one of them not yet complete.
    content = json.loads(unfinished)
    content |= {"draws": [content["draws"][0], 12345], "settings": content["settings"] | {"sampler": "tpe"}}
    (search.folder / "search.json").write_text(json.dumps(content))
    log.write_text("".join(line for line in before if '"samples"' not in line))
    partial = {"event": "drawn", "ran": 0, "trial": "train_cifar_00099", "config": {"h_1": 64}, "repeats": None}
    log.write_text(log.read_text() + json.dumps(partial) + "\n")
    assert drawn(open_search(search.folder, {})) == few


def test_users_functions_see_the_other_values_and_may_fail() -> None:
    space = SPACE | {"momentum": tune.sample_from(lambda config: config["p_drop"] / 2)}
    space |= {"ema_decay": tune.sample_from(lambda spec: spec.config.momentum)}  # Ray's older form
    configs = draw_configs(space, [3], 0, [{"momentum": 0.3}])
    assert configs[0]["momentum"] == 0.3
    assert all(config["ema_decay"] == config["momentum"] == config["p_drop"] / 2 for config in configs[1:])
    for function, words in (
        (lambda config: config["ema_decay"], r"failed \("),  # which is drawn later
        (lambda config: config.pop("lr"), None),  # does not harm the config
        (lambda _: 1 / 0, r"'momentum'\] failed \(ZeroDivisionError"),
        (lambda _: 2, "cannot be 2"),
    ):
        space = SPACE | {"momentum": tune.sample_from(function), "ema_decay": tune.sample_from(lambda _: 0.5)}
        with pytest.raises(InputError, match=words) if words else contextlib.nullcontext():
            assert all("lr" in config for config in draw_configs(space, [3], 0))


def test_bad_first_trials_and_too_many_draws_are_refused() -> None:
    for bad, words in (
        ([{"lr": 0.1}, {"momentum": 0.8}], r"first_trials\[1\] has 'momentum', which is not searched"),
        ([{"lr": -1}], "lr cannot be -1"),
        ([[]], "make it a list of di"), ({}, "make it a list of di"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            check_first_trials(bad, SPACE)
    with pytest.raises(InputError, match="--num-samples 25001 makes more than 100,000 trials; use fewer"):
        draw_configs(SPACE, [25001], 0)
