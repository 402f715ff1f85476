import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from ray import tune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

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

    check_events(folder, rows, done)

    # The terminal: the recap, the best trial, why each trial ended, and nothing for each epoch, in 80 columns.
    out = printed.out
    assert "Trial status: 4 TERMINATED" in out
    assert re.search(r"Current time: .*Total running time: \d+", out)
    assert re.search(r"Logical resource usage: \d+/\d+ CPUs, \d+/\d+ GPUs", out)
    header = next(line for line in out.splitlines() if line.lstrip().startswith("trial "))
    columns = ["trial", "status", "p_drop", "lr", "h_2", "iter", "time (s)", "loss", "accuracy"]
    assert re.split(r"\s{2,}", header.strip()) == columns
    assert "All trials: seed 0, epochs 4, h_1 4, batch_size 32," in out
    assert f'    "h_2": {config["h_2"]},\n    "p_drop": {config["p_drop"]!r},\n    "lr": {config["lr"]!r},\n' in out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    assert "\x1b" not in out
    pattern = r"^(train_cifar_\d+): (all epochs done|stopped by the scheduler), at epoch (\d+);"
    ends = re.findall(pattern, printed.err, re.M)
    assert {(name, int(epoch)) for name, _, epoch in ends} == {
        (f"train_cifar_{row['trial_id']}", int(row["epochs"])) for row in rows
    }
    assert all((reason == "all epochs done") == (epoch == "4") for _, reason, epoch in ends)
    assert "What mattered: needs at least 8 finished trials (4 so far)." in out
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
    assert again.splitlines()[-12:] == out.splitlines()[-12:]
    assert "Trial status: 4 TERMINATED" in again
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    assert main(["--list", "--output-dir", str(tmp_path)]) == 0
    validation, test = metrics["val_accuracy"], metrics["test_accuracy"]
    assert re.search(rf"it +finished +4/4 +{validation:.4f} +{test:.4f}\n", capsys.readouterr().out)


def check_events(folder: Path, rows: list[dict], done: dict[str, list[int]]) -> None:
    """TensorBoard: the curves of every trial, what was searched and what came of it; the search and its best model."""
    for row in rows:
        name = f"train_cifar_{row['trial_id']}"
        events = EventAccumulator(str(folder / name)).Reload()
        curves = {"accuracy/validation", "accuracy/train", "loss/validation", "loss/train", "training/lr"}
        assert curves <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("accuracy/validation")] == done[name]
        for tag, column in (("best_accuracy", "best_accuracy"), ("best_loss", "best_loss"), ("epochs", "epochs")):
            assert events.Scalars(f"trial/{tag}")[-1].value == pytest.approx(float(row[column]))
        start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        values = HParamsPluginData.FromString(start).session_start_info.hparams
        assert {key: value.number_value for key, value in values.items()} == {
            key: float(row[key]) for key in ("h_2", "p_drop", "lr")
        }
        end = events.summary_metadata["_hparams_/session_end_info"].plugin_data.content
        assert HParamsPluginData.FromString(end).session_end_info.status == Status.Value("STATUS_SUCCESS")
    events = EventAccumulator(str(folder)).Reload()
    best = [event.value for event in events.Scalars("search/best_accuracy")]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(max(float(row["best_accuracy"]) for row in rows))
    assert events.Scalars("search/best_accuracy")[-1].step == sum(len(epochs) for epochs in done.values())
    assert events.Scalars("search/trials_finished")[-1].value == len(rows)
    text = events.Tensors("search/methods/text_summary")[-1].tensor_proto.string_val[0]
    assert text == b"Search: random.\n\nScheduler: asha, grace period 2, reduction factor 3, brackets 1."
    config = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = HParamsPluginData.FromString(config).experiment
    domains = {info.name: info for info in experiment.hparam_infos}
    assert [value.number_value for value in domains["h_2"].domain_discrete.values] == [32, 64]
    assert domains["lr"].domain_interval.max_value == 0.1
    assert set(domains) == {"h_2", "p_drop", "lr"}
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics == ["trial/best_accuracy", "trial/best_loss", "trial/epochs"]
    for name in ("confusion_matrix", "accuracy_by_class", "most_confident_mistakes"):
        image = Image.open(io.BytesIO(events.Images(f"best_model/{name}")[-1].encoded_image_string))
        assert image.width > 100
