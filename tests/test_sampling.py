"""Trials that Optuna draws, one by one."""

import importlib.util
import math
import statistics
from pathlib import Path

import pytest
from ray import tune

import hparam_search
from data import InputError
from hparam_search import main, param_space
from search.early_stopping import EarlyStopping
from search.sampling import check_optuna, distributions, suggested
from search.space import check_param_space
from tests.conftest import figures, read_csv
from tests.test_enlarging import search

SPACE = {"seed": 0} | param_space


def accuracy(config: dict) -> float:
    """Return an accuracy that is highest at a rate of 0.01 and with h_1 = 128."""
    return 0.8 - abs(math.log10(config["lr"] / 0.01)) / 5 - (config["h_1"] == 64) / 10


def test_suggestions_depend_on_their_arguments_alone_and_find_what_is_good() -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    outcomes = []
    for number in range(40):
        config = suggested(SPACE, 3, number, outcomes, 10)
        assert config == suggested(SPACE, 3, number, outcomes, 10)
        assert list(config) == list(SPACE)
        check_param_space(config)
        assert 1e-5 <= config["lr"] <= 1e-1
        assert config["h_1"] in (64, 128)
        outcomes.append((config, accuracy(config)))
    assert suggested(SPACE, 3, 40, outcomes, 10) != suggested(SPACE, 4, 40, outcomes, 10)
    accuracies = [value for _, value in outcomes]
    assert statistics.mean(accuracies[20:]) > statistics.mean(accuracies[:10]) + 0.1
    # One that was given by hand may lie outside.
    strange = [({**outcomes[0][0], "h_1": 4, "lr": 1.0}, 0.9)]
    assert suggested(SPACE, 3, 40, outcomes + strange, 10) == suggested(SPACE, 3, 40, outcomes, 10)


@pytest.mark.parametrize("entry", [tune.sample_from(lambda _: 0.1), tune.qloguniform(1e-3, 1e-1, 1e-3), tune.randn()])
def test_what_optuna_cannot_draw_from_is_refused(entry: object) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    assert distributions(SPACE).keys() == {"h_1", "h_2", "p_drop", "lr"}
    with pytest.raises(InputError, match=r"(?s)param_space\['lr'\] is .*, which Optuna cannot draw from"):
        check_optuna(SPACE | {"lr": entry})


def test_without_optuna_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--quick", "--search", "optuna", "--output-dir", str(tmp_path)]) == 2
    sentence = "--search optuna needs the package optuna, which is not installed: pip install optuna."
    assert capsys.readouterr().err == f"hparam_search.py: {sentence}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("ray_started", "small_search")
def test_a_search_by_optuna_resumed_and_grown_is_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")

    class OverInTheSecondTrial(EarlyStopping):
        """A time budget that ends in the middle of a trial, however fast this machine is."""

        def stop_all(self) -> bool:
            return len(self.losses) == 2

    monkeypatch.setattr(hparam_search, "STARTUP_TRIALS", 1)
    flags = ["--search", "optuna", "--scheduler", "none", "--max-epochs", 2]
    assert search(tmp_path / "whole", *flags, "--num-samples", 4) == 0
    out = capsys.readouterr().out
    assert "\nSearch: optuna.\n" in out
    assert len({row["lr"] for row in read_csv(tmp_path / "whole")}) == 4

    monkeypatch.setattr(hparam_search, "EarlyStopping", OverInTheSecondTrial)
    assert search(tmp_path / "it", *flags, "--num-samples", 3, "--time-budget", "1h") == 0
    rows = read_csv(tmp_path / "it")
    assert [row["status"] for row in rows] == ["TERMINATED", "UNFINISHED", "PENDING"]
    assert [bool(row["lr"]) for row in rows] == [True, True, False]  # the third is not drawn yet
    monkeypatch.setattr(hparam_search, "EarlyStopping", EarlyStopping)
    assert main(["--resume", str(tmp_path / "it"), "--time-budget", "2h", "--num-samples", "4"]) == 0
    assert figures(tmp_path / "it") == figures(tmp_path / "whole")
