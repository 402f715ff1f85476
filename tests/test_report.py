import csv
import json
from pathlib import Path

import pytest
import torch

from data import Dataset
from model import SmallResNet
from search.records import best_first, prune_checkpoints, read_log, write_whole
from search.report import boxed_table, duration, recap, recap_best, save_best_model, write_results
from search.trial_log import TrialLog, error_sentence
from train import evaluate, evaluation_batches

CONFIG = {"seed": 0, "epochs": 10, "h_1": 4, "h_2": 8, "p_drop": 0.1, "lr": 0.01, "schedule": "constant"}
# Accuracies of seven trials; two are alike, and of these the one with the lower loss is better.
ACCURACIES = [0.3, 0.5, 0.1, 0.5, 0.2, 0.6, 0.4]


@pytest.fixture
def search(tmp_path: Path) -> tuple[Path, list[dict]]:
    """Return the folder and results of a search of seven trials, each with a best and a last checkpoint."""
    results = []
    for i, accuracy in enumerate(ACCURACIES):
        for epoch in (4, 6):
            checkpoint = tmp_path / f"trial_{i}" / f"checkpoint_{epoch:06}"
            checkpoint.mkdir(parents=True)
            torch.manual_seed(i)
            torch.save(SmallResNet(4, 8, 0.1, 5).state_dict(), checkpoint / "weights.pt")
            (checkpoint / "training.pt").write_bytes(b"state")
        row = {"trial_id": str(i), "name": f"trial_{i}", "status": "TERMINATED", "config": CONFIG | {"h_1": 4 + i % 2}}
        row |= {"epochs": 6, "loss": 2.0, "accuracy": 0.1, "seconds": 12.5, "error": None}
        row |= {"best_epoch": 4, "best_accuracy": accuracy, "best_loss": 1.0 - i / 10}
        results.append(row | {"checkpoint": f"trial_{i}/checkpoint_000004"})
    return tmp_path, results


def test_five_best_models_are_kept(search: tuple[Path, list[dict]]) -> None:
    folder, results = search
    results[2]["status"] = "ERROR"  # not done: it may be resumed, and keeps all it has
    assert [row["trial_id"] for row in best_first(results)] == ["5", "3", "1", "6", "0", "4", "2"]
    prune_checkpoints(results, folder)
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.pt"))
    kept = [f"trial_{i}/checkpoint_000004/weights.pt" for i in (0, 1, 3, 5, 6)]
    unfinished = [f"trial_2/checkpoint_00000{epoch}/{name}.pt" for epoch in (4, 6) for name in ("training", "weights")]
    assert left == sorted(kept + unfinished)
    assert [row["checkpoint"] is not None for row in results] == [True, True, True, True, False, True, True]


def test_best_model_is_the_best_trials(search: tuple[Path, list[dict]], small_dataset: Dataset) -> None:
    folder, results = search
    (folder / "best_model").mkdir()
    (folder / "best_model" / "metrics.json").write_text("of an earlier end")
    best = best_first(results)[0] | {"config": CONFIG}
    metrics = save_best_model([best, *results[:5]], small_dataset, folder)
    model_folder = folder / "best_model"
    assert sorted(path.name for path in model_folder.iterdir()) == ["config.json", "metrics.json", "weights.pt"]
    assert json.loads((model_folder / "metrics.json").read_text()) == metrics
    assert (metrics["trial_id"], metrics["epoch"], metrics["val_accuracy"], metrics["val_loss"]) == ("5", 4, 0.6, 0.5)
    description = json.loads((model_folder / "config.json").read_text())
    assert description["hyperparameters"] == CONFIG
    assert description["classes"] == list(small_dataset.classes)
    model = SmallResNet(4, 8, 0.1, 5)
    model.load_state_dict(torch.load(model_folder / "weights.pt", weights_only=True))
    data = small_dataset
    test = evaluation_batches(data.test_images, data.test_labels, data.mean, data.std, torch.device("cpu"))
    assert evaluate(model, test) == (metrics["test_loss"], metrics["test_accuracy"])

    text = recap_best([best, *results[:2]], metrics, folder)
    assert "epoch 4 of 10" in text
    assert f"test accuracy: {metrics['test_accuracy']:.4f}" in text
    assert "Early stopping saved 12 of 30 epochs." in text


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
    _, results = search
    results[6]["status"] = "RUNNING"
    text = recap(results, 2566, "6/6 CPUs, 1/1 GPUs")
    assert "Trial status: 6 TERMINATED | 1 RUNNING" in text
    assert "Total running time: 42min 46s" in text
    assert "Logical resource usage: 6/6 CPUs, 1/1 GPUs" in text
    assert "Current best trial: 5 with loss=0.5 and params={'seed': 0," in text
    table = text[text.index("╭") :].splitlines()
    assert len(table) == 7 + 4
    assert len({len(line) for line in table}) == 1


def test_recap_without_results() -> None:
    empty = dict.fromkeys(("epochs", "seconds", "loss", "accuracy", "checkpoint"))
    text = recap([{"trial_id": "0", "name": "trial_0", "status": "PENDING", "config": CONFIG} | empty], 3, "1/1 CPUs")
    assert "Current best trial" not in text
    assert "trial_0" in text


def test_boxed_table() -> None:
    table = boxed_table(["name", "value"], [["a", 0.123456789], ["bcd", None]])
    assert table.splitlines() == [
        "╭─────────────────╮",
        "│ name   value    │",
        "├─────────────────┤",
        "│ a      0.123457 │",
        "│ bcd             │",
        "╰─────────────────╯",
    ]


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 2566, 3600, 7325)] == [
        "0s",
        "59s",
        "1min 0s",
        "42min 46s",
        "1h 0min 0s",
        "2h 2min 5s",
    ]


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("MemoryError", "out of memory with batch_size 64, h_1 4, h_2 8: make these smaller, or let fewer trials"),
        ("ray.exceptions.OutOfMemoryError: Task was killed", "out of memory with batch_size 64, h_1 4, h_2 8: make"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you", "out of memory with batch_size 64"),
        ("ValueError: the reason why\n", "ValueError: the reason why"),
    ],
)  # fmt: skip
def test_error_comes_down_to_a_sentence(text: str, sentence: str) -> None:
    # As Ray writes it, an attempt after the other.
    head = "Failure # {} (occurred at 2026-11-23_12-00-00)\nray::ImplicitFunc.train() (pid=1)\n  File ...\n"
    log = head.format(1) + "KeyError: another\n\n" + head.format(2) + text
    assert error_sentence(log, CONFIG | {"batch_size": 64}).startswith(sentence)


def test_error_of_a_process_that_died() -> None:
    log = "Failure # 1 (occurred at 2026-11-23_12-00-00)\nThe actor died unexpectedly.\n\tclass_name: X\n\tpid: 3\n"
    assert error_sentence(log, CONFIG) == "The actor died unexpectedly."
    assert error_sentence("", CONFIG) == "no reason is known"


def test_log_cut_short_is_read_up_to_there_and_written_on(tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    path = tmp_path / "trial" / "result.json"
    path.write_text('{"epoch": 1}\nnoise\n{"epoch": 2}\n{"epo')
    assert read_log(tmp_path / "trial") == [{"epoch": 1}, {"epoch": 2}]
    log = TrialLog(tmp_path, [{"name": "trial", "status": "UNFINISHED"}])
    log.append("trial", {"epoch": 3})
    assert read_log(tmp_path / "trial") == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]
    assert path.read_text().endswith('{"epoch": 2}\n{"epoch": 3}\n')
    assert read_log(tmp_path / "nothing") == []
