import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from ray import tune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hparam_search
from data import make_synthetic
from hparam_search import main
from model import SmallResNet
from tests.conftest import REPOSITORY, SMALL_IMAGES, read_csv, reported_epochs
from train import evaluate, evaluation_batches

README = REPOSITORY / "README.md"


@pytest.mark.usefixtures("ray_started", "small_search")
def test_whole_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "it"
    monkeypatch.setattr(hparam_search, "QUICK_SPACE", hparam_search.QUICK_SPACE | {"h_2": tune.grid_search([32, 64])})
    assert main(["--quick", "--max-epochs", "4", "--output-dir", str(tmp_path), "--name", "it"]) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err

    # results.csv: a row a trial, the best epoch among those done.
    rows = read_csv(folder)
    assert [row["status"] for row in rows] == ["TERMINATED"] * 4
    assert sorted(row["h_2"] for row in rows) == ["32", "32", "64", "64"]
    done = reported_epochs(folder)
    for row in rows:
        epochs = int(row["epochs"])
        assert done[f"train_cifar_{row['trial_id']}"] == list(range(1, epochs + 1))
        assert 1 <= int(row["best_epoch"]) <= epochs <= 4 == int(row["max_epochs"])
        assert float(row["best_accuracy"]) >= float(row["accuracy"])
    assert max(int(row["epochs"]) for row in rows) == 4

    # best_model/: rebuilt from its own files alone, it has the accuracies that were reported.
    model_folder = folder / "best_model"
    description = json.loads((model_folder / "config.json").read_text())
    metrics = json.loads((model_folder / "metrics.json").read_text())
    best = max(rows, key=lambda row: float(row["best_accuracy"]))
    assert metrics["val_accuracy"] == float(best["best_accuracy"])
    if best["trial_id"] == metrics["trial_id"]:
        assert metrics["epoch"] == int(best["best_epoch"])
    config = description["hyperparameters"]
    model = SmallResNet(config["h_1"], config["h_2"], config["p_drop"], len(description["classes"]))
    model.load_state_dict(torch.load(model_folder / "weights.pt", weights_only=True))
    data = make_synthetic(**SMALL_IMAGES)
    for images, labels, name in (
        (data.val_images, data.val_labels, "val"),
        (data.test_images, data.test_labels, "test"),
    ):
        batches = evaluation_batches(images, labels, description["mean"], description["std"], torch.device("cpu"))
        loss, accuracy = evaluate(model, batches)
        assert accuracy == pytest.approx(metrics[f"{name}_accuracy"], abs=0.011)
        assert loss == pytest.approx(metrics[f"{name}_loss"], rel=0.02)

    # README's lines classify a picture with it.
    Image.fromarray(data.test_images[0].numpy()).save(tmp_path / "picture.png")
    lines = next(
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "weights.pt" in code
    )
    exec(
        lines.replace("outputs/NAME/best_model", str(model_folder)).replace("picture.png", f"{tmp_path}/picture.png"),
        {},
    )
    assert capsys.readouterr().out.strip() in description["classes"]

    # Disk: of each trial one model at most, without what only training needs.
    checkpoints = list(folder.glob("*/checkpoint_*"))
    assert len(checkpoints) == 4
    assert all(
        sorted(path.name for path in checkpoint.iterdir()) == ["metrics.json", "weights.pt"]
        for checkpoint in checkpoints
    )
    assert not list(folder.glob("*/training_*"))
    assert {row["checkpoint"] for row in rows} == {path.relative_to(folder).as_posix() for path in checkpoints}

    # TensorBoard: the curves of every trial, and its hyperparameters.
    for trial, epochs in done.items():
        events = EventAccumulator(str(folder / trial)).Reload()
        assert [event.step for event in events.Scalars("accuracy")] == epochs
        assert {"loss", "train_loss", "train_accuracy", "lr", "seconds"} <= set(events.Tags()["scalars"])
        assert {"_hparams_/session_start_info", "_hparams_/session_end_info"} <= set(events.summary_metadata)

    # The terminal: the recap, the best trial, and nothing for each epoch.
    out = printed.out
    assert "Trial status: 4 TERMINATED" in out
    assert re.search(r"Current time: .*Total running time: \d+", out)
    assert re.search(r"Logical resource usage: \d+/\d+ CPUs, \d+/\d+ GPUs", out)
    assert re.search(r"Current best trial: \w+ with loss=[\d.]+ and params=\{", out)
    header = next(line for line in out.splitlines() if line.startswith("│ Trial name"))
    columns = ["Trial name", "status", "p_drop", "lr", "h_1", "h_2", "iter", "total time (s)", "loss", "accuracy"]
    assert re.split(r"\s{2,}", header.strip("│ ")) == columns
    assert f"test accuracy: {metrics['test_accuracy']:.4f}" in out
    saved = 16 - sum(int(row["epochs"]) for row in rows)
    assert f"Early stopping saved {saved} of 16 epochs." in out
    assert "checkpoint" not in out

    # Resuming a search that has finished tells its end again, and trains nothing.
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(hparam_search, "running_ray", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr(hparam_search, "load_dataset", lambda _: pytest.fail("images were read"))
    assert main(["--resume", str(folder)]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[-8:] == out.splitlines()[-8:]
    assert "Trial status: 4 TERMINATED" in again
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
