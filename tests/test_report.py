import csv
import json
from pathlib import Path

import pytest
import torch

from data import Dataset
from model import SmallResNet
from search.command_line import Settings
from search.model_folder import read_metrics
from search.records import Search, best_first
from search.report import (
    best_so_far,
    duration,
    read_best_model,
    recap,
    recap_best,
    save_best_model,
    tables,
    write_results,
)
from tests.conftest import CONFIG
from train import evaluate, evaluation_batches

SOURCE = {"source": "synthetic", "data_dir": "data", "synthetic": {}}


def test_best_model_is_the_best_trials(search: tuple[Path, list[dict]], small_dataset: Dataset) -> None:
    folder, results = search
    (folder / "best_model").mkdir()
    (folder / "best_model" / "metrics.json").write_text("of an earlier end")
    best = best_first(results)[0]
    metrics = save_best_model([best, *results[:5]], small_dataset, SOURCE, folder)
    model_folder = folder / "best_model"
    assert sorted(path.name for path in model_folder.iterdir()) == ["config.json", "metrics.json", "weights.pt"]
    assert read_metrics(model_folder) == metrics
    assert (metrics["trial_id"], metrics["epoch"], metrics["val_accuracy"], metrics["val_loss"]) == ("5", 4, 0.6, 0.5)
    description = json.loads((model_folder / "config.json").read_text())
    assert description["hyperparameters"] == best["config"]
    assert description["classes"] == list(small_dataset.classes)
    model = SmallResNet(5, 8, 0.1, 5)
    model.load_state_dict(torch.load(model_folder / "weights.pt", weights_only=True))
    data = small_dataset
    test = evaluation_batches(data.test_images, data.test_labels, data.mean, data.std, torch.device("cpu"))
    assert evaluate(model, test) == (metrics["test_loss"], metrics["test_accuracy"])

    text = recap_best([best, *results[:2]], metrics, Search(folder, Settings(), {}, {"h_1": {}, "p_drop": {}}, {}, {}))
    assert "epoch 4 of 10" in text
    assert '    "h_1": 5,\n    "p_drop": 0.1,\n' in text
    assert f"test accuracy: {metrics['test_accuracy']:.4f}" in text
    assert "Early stopping saved 12 of 30 epochs." in text


def test_damaged_best_model_is_made_again(
    search: tuple[Path, list[dict]], small_dataset: Dataset, capsys: pytest.CaptureFixture
) -> None:
    folder, results = search
    metrics = save_best_model(results, small_dataset, SOURCE, folder)
    assert read_best_model(results, folder) == metrics
    for name in ("weights.pt", "config.json", "metrics.json"):
        path = folder / "best_model" / name
        content = path.read_bytes()
        for damaged in (b"garbage", content.replace(b"0", b"1", 1), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert read_best_model(results, folder) is None
            assert save_best_model(results, small_dataset, SOURCE, folder) == metrics
            assert f"{folder / 'best_model'} is damaged, and made again." in capsys.readouterr().err
            assert path.read_bytes() == content

    # Where the weights of the best trial are gone, too, the next best's are taken, and that is said.
    (folder / "trial_5" / "checkpoint_000004" / "weights.pt").write_bytes(b"garbage")
    other = save_best_model(results, small_dataset, SOURCE, folder)
    assert other["trial_id"] == "3"
    assert "trial_5 was better, but its weights are damaged or gone." in capsys.readouterr().err
    assert read_best_model(results, folder) is None  # so that each end says so


def test_results_table_has_a_row_a_trial(search: tuple[Path, list[dict]]) -> None:
    folder, results = search
    results[0] |= dict.fromkeys(("epochs", "best_epoch", "best_accuracy", "best_loss", "loss", "accuracy", "seconds"))
    results[0] |= {"status": "PENDING", "checkpoint": None}
    write_results(results, folder)
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    hyperparameters = ["seed", "max_epochs", "h_1", "h_2", "p_drop", "lr", "schedule"]
    measured = ["epochs", "best_epoch", "best_accuracy", "best_loss", "loss", "accuracy", "seconds", "checkpoint"]
    assert list(rows[0]) == ["trial_id", "status", *hyperparameters, *measured]
    assert rows[0]["epochs"] == rows[0]["checkpoint"] == ""
    assert (rows[1]["max_epochs"], rows[1]["epochs"], float(rows[1]["best_accuracy"])) == ("10", "6", 0.5)


def test_recap_shows_the_state_of_the_search(search: tuple[Path, list[dict]]) -> None:
    folder, results = search
    results[6]["status"] = "RUNNING"
    settings = Settings(grace_period=3, reduction_factor=2.5, brackets=1)
    text = recap(results, Search(folder, settings, {}, {"h_1": {}}, {}, {}, 2566, "6/6 CPUs, 1/1 GPUs"))
    assert "Trial status: 6 TERMINATED | 1 RUNNING" in text
    assert "Total running time: 42min 46s" in text
    assert "Logical resource usage: 6/6 CPUs, 1/1 GPUs" in text
    assert best_so_far(results) == "Best so far: trial_5, accuracy 0.6000 after epoch 4."
    lines = text.splitlines()
    assert lines[4].split() == ["trial", "status", "h_1", "iter", "time", "(s)", "loss", "accuracy"]
    assert lines[10].split() == ["5", "TERMINATED", "5", "6", "12", "2.0000", "0.1000"]
    assert "All trials: seed 0, epochs 10, h_2 8, p_drop 0.1, lr 0.01, schedule constant." in text
    assert lines[-1] == "Scheduler: asha, grace period 3, reduction factor 2.5, brackets 1."


def test_recap_without_results() -> None:
    empty = dict.fromkeys(("epochs", "seconds", "loss", "accuracy", "best_accuracy", "checkpoint"))
    results = [{"trial_id": "0", "name": "trial_0", "status": "PENDING", "config": CONFIG} | empty]
    search = Search(Path(), Settings(scheduler="none"), {}, {"lr": {}}, {}, {}, 3, "1/1 CPUs")
    assert "0  PENDING  0.01" in recap(results, search)
    assert best_so_far(results) == "No trial has reported yet."


def test_tables_of_80_columns_hold_every_column() -> None:
    columns = {"trial": ["0", "1"], "status": ["TERMINATED", "ERROR"]}
    columns |= {f"hyperparameter_{i}": [str(i), str(-i)] for i in range(12)} | {"loss": ["1.5", ""]}
    lines = tables(columns, [name for name in columns if name.startswith("h")])
    assert max(map(len, lines)) <= 80
    cells = "\n".join(lines).split()
    for name, (one, other) in columns.items():
        assert name in cells
        assert one in cells
        assert not other or other in cells
    first = lines[1:4]
    assert [line.split()[-1] for line in first] == ["loss", "1.5", first[2].split()[-1]]
    assert lines.count("─" * len(lines[0])) >= 2


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 2566, 3600, 7325)] == [
        "0s",
        "59s",
        "1min 0s",
        "42min 46s",
        "1h 0min 0s",
        "2h 2min 5s",
    ]
