import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray import tune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hparam_search
from hparam_search import BASELINE_RECIPE, main, param_space
from model import SmallResNet
from search.command_line import DEFAULTS
from search.early_stopping import EarlyStopping
from search.ray_session import share_resources
from search.space import check_param_space, draw_trials
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
    data = hparam_search.make_synthetic(**SMALL_IMAGES)
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
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "decode_image" in code
    )
    exec(
        lines.replace("outputs/NAME/best_model", str(model_folder)).replace("picture.png", f"{tmp_path}/picture.png"),
        {},
    )
    assert capsys.readouterr().out.strip() in description["classes"]

    # Disk: of each trial one model at most, without what only training needs.
    checkpoints = list(folder.glob("*/checkpoint_*"))
    assert len(checkpoints) == 4
    assert all([path.name for path in checkpoint.iterdir()] == ["weights.pt"] for checkpoint in checkpoints)
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


BAD_COMMANDS = [
    (["--no-such-flag"], "--no-such-flag"),
    (["--dataset", "mnist"], "mnist"),
    (["--num-samples", "many"], "many"),
    (["--num-samples", "0"], "--num-samples is 0"),
    (["--max-epochs", "-1"], "--max-epochs is -1"),
    (["--seed", "-1"], "--seed is -1"),
    (["--cpus-per-trial", "0"], "--cpus-per-trial is 0"),
    (["--cpus-per-trial", "100000"], "this machine has"),
    (["--gpus-per-trial", "100"], "this machine has"),
    (["--gpus-per-trial", "1.5"], "--gpus-per-trial is 1.5"),
    (["--gpus-per-trial", "nan"], "--gpus-per-trial is nan"),
    (["--dataset", "synthetic", "--data-dir", "here"], "--data-dir here has no use"),
    (["--resume", "nowhere"], "holds no search"),
    (["--resume", "nowhere", "--seed", "1"], "leave --seed away"),
    (["--name", "../up"], "--name is '../up'"),
    (["--name", ".."], "--name is '..'"),
    (["--name", "a\nb"], "--name is"),
    (["--quick", "--name", "taken"], "--name taken is taken"),
    (["--quick", "--output-dir", "file"], "choose another --output-dir"),
    (["--dataset", "folder", "--data-dir", "nowhere"], "train is no folder"),
    (["--data-dir", "broken"], "fails its MD5 checksum"),
]


@pytest.mark.parametrize(("argv", "words"), BAD_COMMANDS)
def test_bad_commands_are_refused_in_one_sentence(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hparam_search, "running_ray", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr(hparam_search, "QUICK_IMAGES", SMALL_IMAGES)
    (tmp_path / "outputs" / "taken").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cifar-100-python.tar.gz").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("hparam_search.py: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.1}, "unknown key 'learning_rate'"),
        ({"lr": 0.0}, r"\['lr'\] can be 0.0"),
        ({"lr": tune.uniform(-1, 1)}, r"\['lr'\] can be -1"),
        ({"lr": float("nan")}, r"\['lr'\] can be nan"),
        ({"h_1": tune.grid_search([64, 0])}, r"\['h_1'\] can be 0"),
        ({"h_1": tune.grid_search([])}, "needs a list of values"),
        ({"h_2": 64.0}, r"\['h_2'\] can be 64.0"),
        ({"h_2": tune.randint(0, 9)}, r"\['h_2'\] can be 0"),
        ({"p_drop": tune.uniform(0, 1)}, r"\['p_drop'\] can be 1"),
        ({"batch_size": True}, r"\['batch_size'\] can be True"),
        ({"schedule": tune.choice(["constant", "linear"])}, r"\['schedule'\] can be 'linear'"),
        ({"nesterov": 1}, r"\['nesterov'\] can be 1"),
        ({"momentum": 0.0}, "nesterov"),
        ({"ema_decay": 1}, r"\['ema_decay'\] can be 1"),
        ({"weight_decay": -1e-4}, r"\['weight_decay'\] can be -0.0001"),
        ({"epochs": tune.grid_search([5, 10])}, r"\['epochs'\] is searched"),
        ({"epochs": 0}, r"\['epochs'\] can be 0"),
    ],
)
def test_bad_param_spaces_are_refused(change: dict, words: str) -> None:
    with pytest.raises(hparam_search.InputError, match=words):
        check_param_space({"seed": 0} | param_space | change)


def test_good_param_spaces_are_not() -> None:
    check_param_space({"seed": 0} | param_space)
    check_param_space({"seed": 0} | param_space | BASELINE_RECIPE)
    check_param_space(
        {"seed": tune.grid_search([0, 1])} | param_space | {"schedule": tune.choice(["cosine", "constant"])}
    )
    check_param_space(
        {"seed": 0} | param_space | {"h_1": tune.qrandint(16, 64, 16), "lr": tune.sample_from(lambda _: 1)}
    )


class Started(Exception):
    """What running_ray raises in place of starting Ray: the input was good."""


def refuse_to_start() -> None:
    raise Started


ODD_STRINGS = ["", " ", ".", "..", "../x", "/", "a/b", "a\\b", "a\nb", "\0", "\x1b[2J", "ä" * 150, "x" * 300, "-1", "0",
               "1", "2", "1e9", "nan", "inf", "-inf", "1.5", "0x10", "9" * 30, "9" * 5000, "None", "--", "-", "~",
               "$HOME",               "\ud800", "name", "name.json", "train", "🙂", "synthetic",
               "folder", "cifar100", "file", "images", "loop",
               "locked", "search"]  # fmt: skip
FLAGS = ["--dataset", "--data-dir", "--output-dir", "--name", "--num-samples", "--max-epochs", "--seed",
         "--cpus-per-trial", "--gpus-per-trial", "--quick", "--resume", "--data", "-q", "--"]  # fmt: skip
SENSIBLE = {"--dataset": ["synthetic", "folder"], "--data-dir": ["images"], "--num-samples": ["1", "3"],
            "--max-epochs": ["1", "50"], "--seed": ["0", "7"], "--output-dir": ["out", "a/b/c"], "--name": ["it"],
            "--cpus-per-trial": ["1"], "--gpus-per-trial": ["0"], "--resume": ["search", "damaged"]}  # fmt: skip


def test_any_command_line_ends_in_a_start_or_a_sentence(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    images = make_folder({"train": {"a": 5}, "test": {"a": 1}})
    monkeypatch.chdir(tmp_path)
    small = hparam_search.make_synthetic(**SMALL_IMAGES)
    monkeypatch.setattr(hparam_search, "make_synthetic", lambda **_: small)
    monkeypatch.setattr(hparam_search, "load_cifar100", hparam_search.load_folder)  # which is as picky, and quick
    monkeypatch.setattr(hparam_search, "running_ray", refuse_to_start)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "images").mkdir()
    for split in ("train", "test"):
        (images / split).rename(tmp_path / "images" / split)
    for name, text in {"search": "{}", "damaged": '{"settings": {"name"', "name.json": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "search.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    generator, started = random.Random(0), 0
    for _ in range(600):
        argv = []
        for flag in generator.sample(FLAGS, generator.randrange(5)):
            odd = flag not in SENSIBLE or generator.random() < 0.2
            value = generator.choice(ODD_STRINGS if odd else SENSIBLE[flag])
            argv += generator.choice([[flag, value], [flag, value], [f"{flag}={value}"], [flag]])
        begin = time.monotonic()
        try:
            code = main(argv)
        except SystemExit as end:  # of --help alone, which argparse prints
            code = end.code
        except Started:
            started += 1
            continue
        finally:
            printed = capsys.readouterr().err
            assert time.monotonic() - begin < 10, argv
        assert code == 2, (argv, code)
        assert printed.startswith("hparam_search.py: "), (argv, printed)
        assert printed.rstrip("\n").endswith("."), (argv, printed)
        assert sorted(tmp_path.rglob("*")) == before, argv
    assert 20 < started < 580


def test_any_param_space_is_refused_or_drawn_from() -> None:
    odd = [None, True, False, 0, 1, -1, 2, 0.5, 1e-5, 1e400, float("nan"), 10**400, 2**70, "", "cosine", b"x", [], [1],
           (), {}, {"grid_search": []}, {"grid_search": 3}, {"grid_search": [1], "x": 1}, {"grid_search": [{}]}, object,
           lambda: 1, 1j, np.float64(0.1), np.int64(4), torch.tensor(3), np.zeros(3),
           tune.choice([1, "a"]), tune.choice([]), tune.uniform(0.0, 1.0), tune.uniform(1.0, 0.1), tune.randn(),
           tune.loguniform(1e-4, 1e-2), tune.qloguniform(1e-4, 1e-1, 5e-5), tune.randint(1, 9), tune.randint(5, 5),
           tune.quniform(0.1, 0.9, 0.1), tune.sample_from(lambda _: 4), tune.sample_from(lambda _: 1 / 0),
           tune.sample_from(lambda spec: spec.config.nothing), tune.grid_search([4, 8]),
           tune.grid_search([tune.uniform(0, 1)])]  # fmt: skip
    generator, drawn, refusals = random.Random(0), 0, []
    for _ in range(3000):
        space = {"seed": 0} | param_space
        for key in generator.sample(list(space), generator.randrange(1, 3)):
            space[key] = generator.choice(odd)
        if generator.random() < 0.1:
            space[generator.choice(["", "LR", "lr ", 3, None])] = generator.choice(odd)
        try:
            check_param_space(space)
            trials = draw_trials(space, generator.choice([1, 3]), 0)
        except hparam_search.InputError as error:
            refusals.append(str(error))
            continue
        drawn += 1
        for config in trials.values():
            check_param_space(json.loads(json.dumps(config)))
    assert drawn > 100
    assert len(refusals) > 100
    assert not any("\n" in refusal for refusal in refusals)


def test_too_many_trials_are_refused() -> None:
    with pytest.raises(hparam_search.InputError, match="make 4,000,000,000 trials"):
        draw_trials({"seed": 0} | param_space, 10**9, 0)


def test_missing_key_is_named() -> None:
    space = {"seed": 0} | param_space
    del space["lr"]
    with pytest.raises(hparam_search.InputError, match="lacks 'lr'"):
        check_param_space(space)


@pytest.mark.parametrize(
    ("machine", "flags", "num_trials", "cpu", "gpu", "usage"),
    [
        ({"CPU": 2}, {}, 12, 1, 0, "2/2 CPUs, 0/0 GPUs"),
        ({"CPU": 16}, {}, 4, 4, 0, "16/16 CPUs, 0/0 GPUs"),
        ({"CPU": 16}, {"cpus_per_trial": 8}, 4, 8, 0, "16/16 CPUs, 0/0 GPUs"),
        ({"CPU": 16, "GPU": 1}, {}, 12, 16, 1, "16/16 CPUs, 1/1 GPUs"),
        ({"CPU": 16, "GPU": 2}, {"gpus_per_trial": 0.5}, 12, 4, 0.5, "16/16 CPUs, 2/2 GPUs"),
        ({"CPU": 16, "GPU": 4}, {"gpus_per_trial": 2}, 12, 8, 2, "16/16 CPUs, 4/4 GPUs"),
        ({"CPU": 4, "GPU": 8}, {}, 12, 1, 1, "4/4 CPUs, 4/8 GPUs"),
        ({"CPU": 16, "GPU": 1}, {"gpus_per_trial": 0}, 2, 8, 0, "16/16 CPUs, 0/1 GPUs"),
    ],
)
def test_resources_are_shared(
    machine: dict, flags: dict, num_trials: int, cpu: int, gpu: float, usage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: machine)
    settings = DEFAULTS | flags
    assert share_resources(settings, num_trials) == ({"cpu": cpu, "gpu": gpu}, usage)


def test_early_stopping() -> None:
    def epochs_until_stopped(losses: list[float], seconds: float = 1) -> int | None:
        stopper = EarlyStopping(patience=3, min_delta=0.1, max_seconds=100)
        results = [{"epoch": i, "loss": loss, "seconds": i * seconds} for i, loss in enumerate(losses, 1)]
        return next((result["epoch"] for result in results if stopper("trial", result)), None)

    assert epochs_until_stopped([5.0 - 0.2 * i for i in range(20)]) is None
    assert epochs_until_stopped([5.0, 4.0, 4.0, 4.0, 4.0, 4.0]) == 5  # three epochs after the last fall
    assert epochs_until_stopped([5.0, 4.95, 4.91, 4.91]) == 4  # 0.09 is no fall
    assert epochs_until_stopped([5.0, 6.0, 6.0, 4.0, 4.5, 4.5]) is None  # nor is a rise an end
    assert epochs_until_stopped([5.0, float("nan")]) == 2
    assert epochs_until_stopped([float("inf")]) == 1
    assert epochs_until_stopped([5.0, 4.0, 3.0], seconds=40) == 3

    stopper = EarlyStopping(patience=2, min_delta=0.0, max_seconds=100)
    for epoch in (1, 2, 2, 2, 2):  # an epoch repeated after a restore counts once
        assert not stopper("trial", {"epoch": epoch, "loss": 1.0, "seconds": 1})


def test_scheduler_of_a_resumed_search_keeps_the_decisions_made(tmp_path: Path) -> None:
    def put(name: str, status: str, losses: list[float]) -> dict:
        (tmp_path / name).mkdir()
        lines = [json.dumps({"epoch": epoch, "loss": loss}) + "\n" for epoch, loss in enumerate(losses, 1)]
        (tmp_path / name / "result.json").write_text("".join(lines))
        return {"name": name, "status": status}

    class Trial:
        def __init__(self, name: str) -> None:
            self.trial_id = name

        def __str__(self) -> str:
            return self.trial_id

    results = [
        put("good", "TERMINATED", [3.0, 2.0, 1.0, 0.5]),
        put("better", "TERMINATED", [3.0, 1.0, 0.5, 0.4]),
        put("slow", "UNFINISHED", [4.0, 3.9, 3.8, 3.7]),  # passed the rung at 3, for it was the first there
        put("failed", "ERROR", []),
        put("waiting", "PENDING", []),
    ]
    scheduler = hparam_search.new_scheduler(12, results, tmp_path)

    def decisions(name: str, losses: list[float]) -> list[str]:
        trial = Trial(name)
        scheduler.on_trial_add(None, trial)
        return [scheduler.on_trial_result(None, trial, {"epoch": i, "loss": loss}) for i, loss in enumerate(losses, 1)]

    assert decisions("slow", [4.0, 3.9, 3.8, 3.7, 3.6, 3.5]) == ["CONTINUE"] * 6
    assert decisions("waiting", [4.0, 3.9, 3.8]) == ["CONTINUE", "CONTINUE", "STOP"]
    assert decisions("failed", [4.0, 0.9, 0.3]) == ["CONTINUE"] * 3
