"""Searches that are asked for more, or stopped by their scheduler or their time, through the command line."""

import json
from pathlib import Path

import pytest
import ray

import hparam_search
from hparam_search import main
from search.early_stopping import EarlyStopping
from search.records import resume_command
from tests.conftest import figures, read_csv


def search(folder: Path, *flags: object) -> int:
    """Run a small search, one trial at a time, in folder."""
    cpus = int(ray.cluster_resources()["CPU"])
    where = ["--output-dir", folder.parent, "--name", folder.name, "--cpus-per-trial", cpus]
    return main([str(flag) for flag in ("--quick", *where, *flags)])


def best_metrics(folder: Path) -> dict:
    """Return the metrics of a search's best model."""
    return json.loads((folder / "best_model" / "metrics.json").read_text())


@pytest.mark.usefixtures("ray_started", "small_search")
def test_more_samples_end_as_if_asked_for_at_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asha = ["--grace-period", 1, "--reduction-factor", 4, "--brackets", 2]
    assert search(tmp_path / "whole", "--num-samples", 4, *asha) == 0
    assert min(int(row["epochs"]) for row in read_csv(tmp_path / "whole")) < hparam_search.GRACE_PERIOD
    assert search(tmp_path / "grown", "--num-samples", 2, *asha) == 0
    assert len(read_csv(tmp_path / "grown")) == 2
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "grown"), "--num-samples", "4"]) == 0
    assert "Scheduler: asha, grace period 1, reduction factor 4, brackets 2." in capsys.readouterr().out
    assert figures(tmp_path / "grown") == figures(tmp_path / "whole")
    whole, grown = (
        json.loads((tmp_path / name / "best_model/metrics.json").read_text()) for name in ("whole", "grown")
    )
    assert whole == grown
    assert main(["--resume", str(tmp_path / "grown"), "--num-samples", "2"]) == 2
    assert "--num-samples is 2, but the search was asked for 4: give at least that." in capsys.readouterr().err


@pytest.mark.usefixtures("ray_started", "small_search")
def test_time_budget_ends_a_search_in_good_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class OverAfterThreeEpochs(EarlyStopping):
        """A budget that ends in the middle of a trial, however fast this machine is."""

        def stop_all(self) -> bool:
            return any(3 in epochs for epochs in self.losses.values())

    # One that is over at once: nothing has been trained.
    assert search(tmp_path / "it", "--num-samples", 2, "--scheduler", "none", "--time-budget", "0.001s") == 1
    printed = capsys.readouterr()
    command = f"{resume_command(tmp_path / 'it')} --time-budget 0.002s"
    assert f"The time budget is spent. To resume: {command}\n" in printed.out
    assert "No trial has a model" in printed.err
    assert main(["--resume", str(tmp_path / "it")]) == 2
    assert f"the --time-budget of {tmp_path / 'it'}, 0s, is spent: give a larger one." in capsys.readouterr().err

    # A larger one ends in the middle of a trial, whose model is tested.
    monkeypatch.setattr(hparam_search, "EarlyStopping", OverAfterThreeEpochs)
    assert main(["--resume", str(tmp_path / "it"), "--time-budget", "1h"]) == 0
    out = capsys.readouterr().out
    assert "The time budget is spent." in out
    assert "test accuracy: " in out
    assert [row["status"] for row in read_csv(tmp_path / "it")] == ["UNFINISHED", "PENDING"]

    # In the end it is as if there had been none.
    monkeypatch.setattr(hparam_search, "EarlyStopping", EarlyStopping)
    assert main(["--resume", str(tmp_path / "it"), "--time-budget", "2h"]) == 0
    out = capsys.readouterr().out
    assert "budget is spent" not in out
    assert "Scheduler: none." in out
    assert search(tmp_path / "undisturbed", "--num-samples", 2, "--scheduler", "none") == 0
    assert [row["epochs"] for row in read_csv(tmp_path / "undisturbed")] == ["4", "4"]
    assert figures(tmp_path / "it") == figures(tmp_path / "undisturbed")
