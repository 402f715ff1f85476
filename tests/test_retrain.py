import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from search import predict, retrain
from search.best_model import read_metrics, read_model, write_model
from tests.helpers import CONFIG, CPU, DAMAGES, IMAGES, REPOSITORY
from train import evaluate, evaluation_batches, new_model

SYNTHETIC = {"num_train": 120, "num_test": 40, "num_classes": 5}  # as IMAGES
SOURCE = {"source": "synthetic", "data_dir": "data", "synthetic": SYNTHETIC}


def figures(model: torch.nn.Module, split: str) -> tuple[float, float]:
    images, labels = getattr(IMAGES, f"{split}_images"), getattr(IMAGES, f"{split}_labels")
    return evaluate(model, evaluation_batches(images, labels, IMAGES.mean, IMAGES.std, CPU))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a model that is not trained, in the working directory."""
    monkeypatch.chdir(tmp_path)
    about = {"images": SOURCE, "objective": ["accuracy", "max"]}
    write_model(tmp_path / "model", new_model(CONFIG, 5), CONFIG, IMAGES, about, {"epoch": 1})
    return tmp_path / "model"


def test_config_is_retrained_as_it_was_with_other_values_or_on_all_images(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    one, two, full = (tmp_path / "outputs" / name for name in ("one", "two", "full"))
    for source, folder in ((model, one), (one, two)):
        assert retrain.main([str(source), "--name", folder.name]) == 0
    assert (one / "weights.pt").read_bytes() == (two / "weights.pt").read_bytes()
    metrics, (trained, about), out = read_metrics(one), read_model(one), capsys.readouterr().out
    assert about == read_model(model)[1]
    for split in ("val", "test"):
        reported = metrics[f"{split}_loss"], metrics[f"{split}_accuracy"]
        assert figures(trained, split) == pytest.approx(reported, rel=0.02, abs=0.03)
    assert out.count("\nepoch ") == 8
    assert out.endswith(f"\ntest accuracy: {metrics['test_accuracy']:.4f}\nModel: outputs/two\n")
    assert retrain.main([str(one), "--full", "--epochs", "2", "--h-1", "5", "--name", "full"]) == 0
    assert read_metrics(full).keys() == {"epoch", "test_loss", "test_accuracy"}
    assert read_model(full)[1]["hyperparameters"] == CONFIG | {"epochs": 2, "h_1": 5}
    whole = retrain.with_validation_images(IMAGES)
    assert (len(whole.train_images), whole.train_labels.bincount().tolist(), len(whole.val_images)) == (
        120,
        [24] * 5,
        0,
    )


def test_pictures_are_classified_without_ray(model: Path, tmp_path: Path) -> None:
    names = ["one.png", "two.bmp"]
    for name, image in zip(names, IMAGES.test_images, strict=False):
        Image.fromarray(image.numpy()).save(name)
    command = [sys.executable, "-m", "search.predict", str(model), *names]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines, (trained, about) = result.stdout.splitlines(), read_model(model)
    assert (result.stderr, [lines[0], lines[6]], len(lines)) == ("", names, 12)
    for shown, image in zip((lines[1:6], lines[7:]), IMAGES.test_images, strict=False):
        normalised = (image / 255 - torch.tensor(about["mean"])) / torch.tensor(about["std"])
        expected = trained.eval()(normalised.permute(2, 0, 1)[None]).softmax(1)[0].sort(descending=True)
        assert [line.split()[1] for line in shown] == [about["classes"][i] for i in expected.indices]
        assert [float(line.split()[0]) for line in shown] == pytest.approx(expected.values.tolist(), abs=0.01)


def test_bad_command_is_refused_in_one_sentence_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, file in (("changed", "config.json"), ("cut", "weights.pt")):
        write_model(tmp_path / name, new_model(CONFIG, 5), CONFIG, IMAGES, {"images": {}, "objective": []}, {})
        DAMAGES[1](tmp_path / name / file)
    Image.new("RGB", (32, 32)).save("picture.png")
    before = sorted(tmp_path.rglob("*"))
    for program, arguments, words in (
        (retrain, "", "model; see --help"), (retrain, "nowhere", "no model found in 'nowhere'"),
        (retrain, "model --lr -1", "lr cannot be -1; use"), (retrain, "model --epochs many", "epochs cannot be 'many'"),
        (retrain, "model --output-dir . --name model", "model already exists"),
        (predict, "model", "pictures; see --help"), (predict, "cut picture.png", "weights.pt is damaged"),
        (predict, "changed picture.png", "config.json is damaged"), (predict, "model nothing.png", "nothing.png"),
        (predict, "model model/config.json", "config.json"),
    ):  # fmt: skip
        assert program.main(arguments.split()) == 2
        err = capsys.readouterr().err
        assert words in err
        assert (err.startswith(f"{program.PROGRAM}: "), err[-2:], err.count("\n")) == (True, ".\n", 1)
        assert sorted(tmp_path.rglob("*")) == before
