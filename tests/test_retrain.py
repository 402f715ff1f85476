import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from search import predict, retrain
from search.best_model import read_metrics, read_model, write_model
from search.files import write_json
from search.records import Objective
from tests.helpers import CONFIG, IMAGES, VALIDATION
from train import evaluate, new_model

SYNTHETIC = {"num_train": 120, "num_test": 40, "num_classes": 5}  # as IMAGES
SOURCE, OBJECTIVE = {"source": "synthetic", "data_dir": "data", "synthetic": SYNTHETIC}, Objective("loss", "min")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", new_model(CONFIG, 5), CONFIG, IMAGES, SOURCE, OBJECTIVE, {"epoch": 1})
    return tmp_path / "model"


def test_config_is_retrained_as_it_was_or_with_changes(model: Path, capsys: pytest.CaptureFixture) -> None:
    one, two, full = (Path("outputs", name) for name in ("one", "two", "full"))
    assert retrain.main([str(model), "--name", "one"]) == 0
    assert retrain.main([str(one), "--name", "two"]) == 0
    assert (one / "weights.pt").read_bytes() == (two / "weights.pt").read_bytes()
    metrics, (trained, about), out = read_metrics(one), read_model(one), capsys.readouterr().out
    assert about == read_model(model)[1]
    assert evaluate(trained, VALIDATION) == pytest.approx((metrics["val_loss"], metrics["val_accuracy"]), rel=0.02)
    losses = re.findall(r"\nepoch \d of 4  loss (\S+)", out)[:4]
    assert metrics["epoch"] == losses.index(min(losses)) + 1 < 4
    accuracy = f"validation accuracy: {metrics['val_accuracy']:.4f}, at epoch {metrics['epoch']}"
    assert out.endswith(f"\n{accuracy}\nModel: outputs/two\n")
    assert "test accuracy" not in out  # so that nobody chooses models by it
    assert retrain.main([str(one), "--full", "--test", "--epochs", "2", "--h-1", "5", "--name", "full"]) == 0
    metrics, out = read_metrics(full), capsys.readouterr().out
    assert metrics.keys() == {"epoch", "test_loss", "test_accuracy"}
    assert out.endswith(f"\ntest accuracy: {metrics['test_accuracy']:.4f}\nModel: outputs/full\n")
    assert read_model(full)[1]["hyperparameters"] == CONFIG | {"epochs": 2, "h_1": 5}
    del about["hyperparameters"]["h_1"]
    write_json(one / "config.json", about)
    assert retrain.main([str(one), "--device", "cuda"]) == 2
    assert "config.json lacks 'h_1'; add its default in train.py" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert retrain.main([str(two), "--device", "cuda"]) == 2
        assert "torch finds no CUDA GPU that it can use; use --device cpu" in capsys.readouterr().err
    assert retrain.with_validation_images(IMAGES).train_labels.bincount().tolist() == [24] * 5


def test_pictures_are_classified(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("train.autocast_dtype", lambda device: None)
    monkeypatch.setattr(predict, "EVALUATION_BATCH_SIZE", 7)  # the last batch is smaller
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pictures, (trained, about) = [f"{i}.png" for i in range(9)], read_model(model)
    for picture, image in zip(pictures, IMAGES.test_images, strict=False):
        Image.fromarray(image.numpy()).save(picture)
    assert predict.main([str(model), *pictures, "--device", "cpu"]) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # torch might query the GPU
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[::6] == [[picture] for picture in pictures]
    normalised = (IMAGES.test_images / 255 - torch.tensor(about["mean"])) / torch.tensor(about["std"])
    for i in range(9):
        expected = trained.eval()(normalised[i].permute(2, 0, 1)[None]).softmax(1)[0].sort(descending=True)
        probabilities, names = zip(*lines[6 * i + 1 : 6 * i + 6], strict=True)
        assert list(names) == [about["classes"][k] for k in expected.indices]
        assert [*map(float, probabilities)] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert len(lines) == 6 * 9
