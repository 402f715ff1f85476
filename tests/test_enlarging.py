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
def test_search_with_more_time_and_more_samples_ends_as_if_asked_for_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class OverAfterThreeEpochs(EarlyStopping):
        """A budget that ends in the middle of a trial, however fast this machine is."""

        def stop_all(self) -> bool:
            return any(3 in epochs for epochs in self.losses.values())

    asha = ["--grace-period", 1, "--reduction-factor", 4, "--brackets", 2]
    whole, folder = tmp_path / "whole", tmp_path / "it"
    assert search(whole, "--num-samples", 4, *asha) == 0
    assert min(int(row["epochs"]) for row in read_csv(whole)) < hparam_search.GRACE_PERIOD
    capsys.readouterr()

    # A budget that is over at once: nothing has been trained.
    assert search(folder, "--num-samples", 2, *asha, "--time-budget", "0.001s") == 1
    printed = capsys.readouterr()
    assert f"The time budget is spent. To resume: {resume_command(folder)} --time-budget 0.002s\n" in printed.out
    assert "No trial has a model" in printed.err
    assert main(["--resume", str(folder)]) == 2
    assert f"the --time-budget of {folder}, 0s, is spent: give a larger one." in capsys.readouterr().err

    # A larger one ends in the middle of a trial, whose model is tested.
    monkeypatch.setattr(hparam_search, "EarlyStopping", OverAfterThreeEpochs)
    assert main(["--resume", str(folder), "--time-budget", "1h"]) == 0
    out = capsys.readouterr().out
    assert "The time budget is spent." in out
    assert "test accuracy: " in out
    assert [row["status"] for row in read_csv(folder)] == ["UNFINISHED", "PENDING"]

    # With time enough, and more samples, it is as if there had been no budget.
    monkeypatch.setattr(hparam_search, "EarlyStopping", EarlyStopping)
    assert main(["--resume", str(folder), "--time-budget", "2h", "--num-samples", "4"]) == 0
    out = capsys.readouterr().out
    assert "budget is spent" not in out
    assert "Scheduler: asha, grace period 1, reduction factor 4, brackets 2." in out
    assert figures(folder) == figures(whole)
    assert best_metrics(folder) == best_metrics(whole)
    assert main(["--resume", str(folder), "--num-samples", "2"]) == 2
    assert "--num-samples is 2, but the search was asked for 4: give at least that." in capsys.readouterr().err
