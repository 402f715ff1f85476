import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import search.single
from data import make_synthetic
from hparam_search import param_space
from search.model_folder import load_model, read_description, read_metrics, write_model_folder
from search.single import main
from tests.conftest import REPOSITORY, SMALL_IMAGES, start_main, wait_for
from train import evaluate, evaluation_batches, new_model

CONFIG = param_space | {"seed": 3, "epochs": 4, "h_1": 4, "h_2": 16, "p_drop": 0.1, "lr": 0.02, "batch_size": 16}
SOURCE = {"source": "synthetic", "data_dir": "data", "synthetic": SMALL_IMAGES}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the folder of a model that is not trained."""
    torch.save(new_model(CONFIG, 5).state_dict(), tmp_path / "weights.pt")
    dataset = make_synthetic(**SMALL_IMAGES)
    write_model_folder(tmp_path / "it", tmp_path / "weights.pt", CONFIG, dataset, SOURCE, {"epoch": 1})
    return tmp_path / "it"


def run(*arguments: object, folder: Path) -> int:
    return main([*map(str, arguments), "--output-dir", str(folder)])


def test_a_config_is_trained_again(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--from", model, "--name", "again", folder=tmp_path) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("epoch ")] == list("1234")
    metrics = read_metrics(tmp_path / "again")
    about = read_description(tmp_path / "again")
    assert about == read_description(model)
    # It is the same training again as in a search, whose figures its files have.
    trained = load_model(tmp_path / "again" / "weights.pt", CONFIG, 5)
    data = make_synthetic(**SMALL_IMAGES)
    for split, images, labels in (
        ("val", data.val_images, data.val_labels),
        ("test", data.test_images, data.test_labels),
    ):
        batches = evaluation_batches(images, labels, data.mean, data.std, torch.device("cpu"))
        loss, accuracy = evaluate(trained, batches)
        assert accuracy == pytest.approx(metrics[f"{split}_accuracy"], abs=0.011)
        assert loss == pytest.approx(metrics[f"{split}_loss"], rel=0.02)
    assert f"test accuracy: {metrics['test_accuracy']:.4f}" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "it", "weights.pt"]

    # And from what it left, with other values, on all images: to the last epoch, without a validation accuracy.
    changed = ["--name", "full", "--full", "--epochs", 2, "--h-1", 5]
    assert run("--from", tmp_path / "again", *changed, folder=tmp_path) == 0
    out = capsys.readouterr().out
    assert "250 training" not in out
    assert " accuracy 0" in out
    assert "validation accuracy" not in out
    metrics = read_metrics(tmp_path / "full")
    assert (metrics["epoch"], metrics["val_accuracy"]) == (2, None)
    assert read_description(tmp_path / "full")["hyperparameters"] == CONFIG | {"epochs": 2, "h_1": 5}


def test_full_trains_on_all_images(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_on = []
    monkeypatch.setattr("search.single.run_trial", lambda config, dataset, *rest: trained_on.append(dataset) or 1 / 0)
    for flags in ([], ["--full"]):
        with pytest.raises(ZeroDivisionError):
            run("--from", model, *flags, "--name", f"x{len(flags)}", folder=tmp_path)
    apart, whole = trained_on
    assert (len(apart.train_images), len(apart.val_images)) == (200, 50)
    assert (len(whole.train_images), len(whole.val_images)) == (250, 0)
    assert whole.train_labels.bincount().tolist() == [50] * 5


def save_every_epoch() -> None:
    search.single.CHECKPOINT_PERIOD = 0


def test_killed_training_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--from", model, "--epochs", 14, "--name", "whole", folder=tmp_path) == 0
    arguments = ["--from", str(model), "--epochs", "14", "--name", "killed", "--output-dir", str(tmp_path)]
    output = tmp_path / "output.txt"
    for epoch, number in ((4, signal.SIGKILL), (8, signal.SIGINT)):
        process = start_main(main, {}, arguments, output, save_every_epoch, ())
        wait_for(lambda epoch=epoch: output.exists() and f"\nepoch {epoch:2} of" in output.read_text())
        os.kill(process.pid, number)
        process.join()
    rest = output.read_text()
    assert "Interrupted. To resume: python train.py --from=" in rest
    assert "--name=killed" in rest
    assert not (tmp_path / "killed").exists()
    assert main(arguments) == 0
    one, other = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "killed")
    assert not list(tmp_path.glob(".*"))


def test_pictures_are_classified(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = make_synthetic(**SMALL_IMAGES)
    paths = []
    for i, name in enumerate(("one.png", "two.bmp")):
        Image.fromarray(dataset.test_images[i].numpy()).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    assert main(["--predict", *paths, "--model", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[6]] == paths
    trained = load_model(model / "weights.pt", CONFIG, 5).eval()
    for i, shown in enumerate((lines[1:6], lines[7:])):
        image = (dataset.test_images[i] / 255 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
        expected = trained(image.permute(2, 0, 1)[None]).softmax(1)[0].sort(descending=True)
        assert [line.split()[1] for line in shown] == [dataset.classes[k] for k in expected.indices]
        assert [float(line.split()[0]) for line in shown] == pytest.approx(expected.values.tolist(), abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is nothing to do: give --from or --predict, see --help"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--predict", "PICTURE"], "--predict and --model go together"),
        (["--model", "MODEL"], "--predict and --model go together"),
        (
            ["--predict", "PICTURE", "--model", "MODEL", "--full"],
            "--full cannot be combined with --predict; remove one of them",
        ),
        (["--predict", "PICTURE", "--model", "nowhere"], "nowhere holds no model"),
        (["--predict", "PICTURE", "--model", "OTHER"], "is not what this version writes ("),
        (["--predict", "PICTURE", "--model", "CUT"], "weights.pt is damaged, or of another model"),
        (["--predict", "nothing.png", "--model", "MODEL"], "nothing.png is not a regular file"),
        (["--predict", "MODEL/config.json", "--model", "MODEL"], "config.json cannot be read as an image"),
        (["--from", "nowhere"], "nowhere holds no model"),
        (["--from", "OTHER"], "is not what this version writes ("),
        (["--from", "MODEL", "--lr", "-1"], "'lr'] can be -1, but must be a number above 0"),
        (["--from", "MODEL", "--epochs", "many"], "'epochs'] can be 'many', but must be a whole number"),
        (["--from", "MODEL", "--name", "it"], "is taken by"),
        (["--from", "MODEL", "--name", "../up"], "--name is '../up'"),
        (["--from", "MODEL", "--dataset", "folder", "--data-dir", "nowhere"], "train is not a folder"),
    ],
)
def test_bad_commands_are_refused_in_one_sentence(
    arguments: list[str], words: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "outputs").mkdir()
    model = model.rename(tmp_path / "outputs" / "it")
    for name, change in (("other", {"epochs": None}), ("cut", {})):
        (tmp_path / name).mkdir()
        about = json.loads((model / "config.json").read_text())
        about["hyperparameters"] |= change
        (tmp_path / name / "config.json").write_text(json.dumps(about))
        (tmp_path / name / "weights.pt").write_bytes((model / "weights.pt").read_bytes()[:-100])
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    names = {"MODEL": str(model), "OTHER": "other", "CUT": "cut", "PICTURE": "picture.png"}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("train.py: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_script_runs_without_ray_started(model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 20)).save(tmp_path / "picture.png")
    command = [sys.executable, str(REPOSITORY / "train.py"), "--predict", "picture.png", "--model", str(model)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 6
