"""Whole searches through the command line: what they leave, and how they are resumed and grown."""

import io
import os
import re
from pathlib import Path
from unittest.mock import MagicMock

import pandas
import pytest
import torch
from PIL import Image
from ray import tune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

import hparam_search
from data import Batches, Dataset, make_synthetic
from hparam_search import main
from model import SmallResNet
from search import best_model, predict
from search.best_model import load_model, read_best_model, read_model
from search.cost import model_cost
from search.files import append_line, explain_failure
from search.records import LOG_FILE, Search, open_search, script_command
from search.trial import weights_path
from tests.conftest import (
    EXAMPLE,
    REPOSITORY,
    SMALL_IMAGES,
    Finished,
    copy_before_the_end,
    figures,
    make_small,
    quick,
    read_csv,
    run_here,
    run_search,
)
from train import evaluate, evaluation_batches

pytestmark = pytest.mark.usefixtures("small_search")
DATA = make_synthetic(**SMALL_IMAGES)


def evaluated(model: nn.Module, split: str) -> tuple[float, float]:
    """Return a model's loss and accuracy on the validation or test images."""
    return evaluate(model, evaluation_batches(DATA, split, torch.device("cpu")))


def test_results_and_best_model_have_the_figures_that_were_reported(finished: Finished) -> None:
    trials, ends = finished.search.trials, {"10": "all epochs done", "2": "stopped by the scheduler"}
    for trial, h_2, row in zip(trials.values(), (16, 32, 16, 32), finished.rows, strict=True):
        last, best = trial.reports[-1], max(trial.reports, key=lambda report: report.accuracy)
        assert [report.epoch for report in trial.reports] == list(range(1, int(row["epochs"]) + 1))
        expected = model_cost(trial.config, 5) | {"images_per_second": last.images_per_second}
        expected |= {"best_epoch": best.epoch, "best_accuracy": best.accuracy, "best_loss": best.loss}
        expected |= {"lr": trial.config["lr"], "h_2": h_2, "loss": last.loss, "accuracy": last.accuracy}
        expected |= {"status": "TERMINATED", "max_epochs": 10, "ended_because": ends[row["epochs"]]}
        assert {key: row[key] for key in expected} == {key: str(value) for key, value in expected.items()}
    assert {row["ended_because"] for row in finished.rows} == set(ends.values())
    assert pandas.read_csv(finished.folder / "results.csv")["trial"].tolist() == list(trials)
    # The two best models are on the disk, and no training states.
    kept = sorted(str(path.relative_to(finished.folder)) for path in finished.folder.glob("*/weights_*.pt"))
    assert kept == sorted(row["weights"] for row in finished.rows if row["weights"])
    assert len(kept) == 2
    assert not [*finished.folder.glob("*/training*"), *finished.folder.rglob(".*")]

    (model, about), metrics = read_model(finished.folder / "best_model"), finished.metrics
    best = max(finished.rows, key=lambda row: (float(row["best_accuracy"]), -float(row["best_loss"])))
    assert best["trial"] == f"train_cifar_{metrics['trial_id']}"
    shown = [str(metrics[key]) for key in ("epoch", "val_loss", "val_accuracy")]
    assert shown == [best[key] for key in ("best_epoch", "best_loss", "best_accuracy")]
    assert about["hyperparameters"] == trials[best["trial"]].config
    assert (about["classes"], about["mean"]) == (list(DATA.classes), list(DATA.mean))
    for split in ("val", "test"):
        reported = metrics[f"{split}_loss"], metrics[f"{split}_accuracy"]
        assert evaluated(model, split) == pytest.approx(reported, rel=0.001)


def test_guide_classifies_a_picture_with_the_best_model(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    guide = (REPOSITORY / "README.md").read_text() + (REPOSITORY / "docs" / "guide.md").read_text()
    lines = next(block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "weights.pt" in block)
    Image.fromarray(DATA.test_images[0].numpy()).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(lines.replace("outputs/NAME", str(finished.folder)), {})
    assert capsys.readouterr().out.strip() in DATA.classes


def hparams_of(events: EventAccumulator, name: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(events.summary_metadata[f"_hparams_/{name}"].plugin_data.content)


def test_tensorboard_shows_trials_search_and_best_model(finished: Finished) -> None:
    for trial in finished.search.trials.values():
        events = EventAccumulator(str(finished.folder / trial.name)).Reload()
        for tag, key in (("accuracy/validation", "accuracy"), ("loss/train", "train_loss"), ("training/lr", "lr")):
            curve = {report.epoch: getattr(report, key) for report in trial.reports}
            assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(curve)
        final = {"best_accuracy": trial.best.accuracy, "best_loss": trial.best.loss, "epochs": len(trial.reports)}
        final |= model_cost(trial.config, 5)
        assert {key: events.Scalars(f"trial/{key}")[-1].value for key in final} == pytest.approx(final)
        start, end = (hparams_of(events, f"session_{key}_info") for key in ("start", "end"))
        values = {key: value.number_value for key, value in start.session_start_info.hparams.items()}
        assert values == {key: trial.config[key] for key in ("h_2", "p_drop", "lr")}
        assert end.session_end_info.status == Status.Value("STATUS_SUCCESS")

    events = EventAccumulator(str(finished.folder)).Reload()
    best = [event.value for event in events.Scalars("search/best_accuracy")]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(finished.metrics["val_accuracy"])
    assert events.Scalars("search/best_accuracy")[-1].step == sum(int(row["epochs"]) for row in finished.rows)
    assert events.Scalars("search/trials_finished")[-1].value == 4
    text = events.Tensors("search/scheduler/text_summary")[-1].tensor_proto.string_val[0]
    assert text == b"Scheduler: promote, grace period 2, reduction factor 2, keep 2."
    experiment = hparams_of(events, "experiment").experiment
    domains = {info.name: info for info in experiment.hparam_infos}
    assert domains.keys() == {"h_2", "p_drop", "lr"}
    assert [value.number_value for value in domains["h_2"].domain_discrete.values] == [16, 32]
    assert domains["lr"].domain_interval.max_value == 0.1
    tags = [*(f"trial/{key}" for key in final), "training/images_per_second"]
    assert [info.name.tag for info in experiment.metric_infos] == tags
    for name in ("confusion_matrix", "most_confident_mistakes"):
        assert Image.open(io.BytesIO(events.Images(f"best_model/{name}")[-1].encoded_image_string)).width > 100


def test_terminal_shows_the_recap_and_why_each_trial_ended(finished: Finished) -> None:
    out, config = finished.out, finished.search.ranking()[0].config
    assert "Traceback" not in out + finished.err
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines() if str(finished.folder.parent) not in line) <= 80
    assert "Trial status: 4 TERMINATED\n" in out
    header = next(line for line in out.splitlines() if line.startswith("trial "))
    assert header.split() == ["trial", "status", "p_drop", "lr", "h_2", "iter", "time", "(s)", "loss", "accuracy"]
    assert "All trials: seed 0, epochs 10, h_1 4, batch_size 32," in out
    assert f'    "h_2": {config["h_2"]},\n    "p_drop": {config["p_drop"]!r},\n    "lr": {config["lr"]!r},\n' in out
    assert f"test accuracy: {finished.metrics['test_accuracy']:.4f}\n" in out
    saved = 40 - sum(int(row["epochs"]) for row in finished.rows)
    assert f"The scheduler saved {saved} of 40 epochs.\n" in out
    ends = re.findall(r"^(train_cifar_\w+): (.+), at epoch (\d+); best accuracy (0\.\d+)\.$", finished.err, re.M)
    assert sorted(ends) == [
        (row["trial"], row["ended_because"], row["epochs"], f"{float(row['best_accuracy']):.4f}")
        for row in finished.rows
    ]


def test_finished_search_is_shown_again_or_refused_without_ray_and_images(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(hparam_search.ray_runtime, "running_ray", lambda _: pytest.fail("Ray was started"))
    monkeypatch.setattr(hparam_search, "read_images", lambda **_: pytest.fail("images were read"))

    def without_clock(text: str) -> str:
        return re.sub("Current time.*", "", text[text.index("Trial status") :])

    relative = Path(os.path.relpath(finished.folder))
    for command in (["--resume", str(finished.folder)], quick(relative, *EXAMPLE, "--or-resume")):
        assert main(command) == 0
        assert without_clock(capsys.readouterr().out) == without_clock(finished.out)
        assert {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()} == before
    with pytest.raises(pytest.fail.Exception, match="Ray was started"):
        run_search(finished.folder.with_name("new"), *EXAMPLE, "--or-resume")

    assert main(["--list", "--output-dir", str(finished.folder.parent)]) == 0
    accuracies = (f"{finished.metrics[key]:.4f}" for key in ("val_accuracy", "test_accuracy"))
    lines = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    assert ["it", "finished", "4/4", *accuracies] in lines

    # It is not continued with another seed, space or objective.
    assert run_search(finished.folder, *EXAMPLE, "--or-resume", "--seed", 1) == 2
    assert "--seed is 1, but was 0 when the search began; remove it, or use another --name" in capsys.readouterr().err
    space = hparam_search.QUICK_SPACE | {"lr": tune.loguniform(1e-3, 1e-1)}
    for name, value, words in (
        ("QUICK_SPACE", space, "'lr' is {'tune': 'loguniform', 'lower': 0.001"),
        ("MODE", "min", "'mode' is min, but was max when the search began"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(hparam_search, name, value)
            assert main(["--resume", str(finished.folder), "--num-samples", "3"]) == 2
        assert words in capsys.readouterr().err


def test_failing_display_does_not_cost_the_model(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_before_the_end(finished.folder, tmp_path / "moved" / "it")
    (folder / "results.csv").mkdir()

    def fail(*args: object) -> None:
        assert read_best_model(open_search(folder, {})) == finished.metrics  # the model comes first
        raise ValueError("in a picture\nof two lines")

    def batches_unless_broken(dataset: Dataset, split: str, device: torch.device) -> Batches:
        if device.type != "cpu":
            raise RuntimeError("CUDA error: no kernel image\nFor debugging ...")
        return evaluation_batches(dataset, split, device)

    with monkeypatch.context() as patch:
        patch.setattr(best_model, "show_predictions", fail)
        patch.setattr(best_model, "best_device", lambda: torch.device("meta"))
        patch.setattr(best_model, "evaluation_batches", batches_unless_broken)
        patch.setattr(hparam_search.report, "recap", fail)
        assert main(["--resume", str(folder), "--gpus-per-trial", "1"]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "The GPU failed (CUDA error: no kernel image); testing on the CPU.",
        "hparam_search.py: ValueError: in a picture.",
        f"hparam_search.py: cannot write {folder / 'results.csv'} (Is a directory).",
        "hparam_search.py: ValueError: in a picture.",
    ]
    assert f"test accuracy: {finished.metrics['test_accuracy']:.4f}\n" in printed.out
    assert str(finished.folder) not in printed.out + printed.err  # the search has moved
    assert f"To complete the results: {script_command('--resume', folder)}\n" in printed.out
    (folder / "results.csv").rmdir()
    assert main(["--resume", str(folder)]) == 0
    assert not open_search(folder, {}).unseen
    assert figures(folder) == figures(finished.folder)


def test_gpu_is_made_ready_for_the_test_if_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(best_model, "start_thread", lambda function: function())
    monkeypatch.setattr(torch, "zeros", lambda *_, device: made.append(device))
    for available, free, expected in ((False, 1e12, []), (True, 0, []), (True, 1e9, []), (True, 1e12, ["cuda"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(best_model, "free_gpu_memory", lambda free=free: free)
        best_model.prepare_gpu.cache_clear()
        best_model.prepare_gpu()
        best_model.prepare_gpu()
        assert made == expected


def test_weights_that_model_py_no_longer_fits_are_not_called_damaged(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_before_the_end(finished.folder, tmp_path / "it")
    monkeypatch.setattr("train.SmallResNet", lambda h_1, h_2, **options: SmallResNet(h_1, 2 * h_2, **options))
    assert predict.main([str(finished.folder / "best_model"), "any.png"]) == 2
    assert main(["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    words = "do not fit model.py, where 'stage_2.0.weight' was changed, added or removed; restore model.py"
    assert err.count(words) == 2
    assert "damaged" not in err
    assert list(folder.glob("*/weights_*.pt"))  # they are still there


class OverInTheFirstTrial(tune.Stopper):
    """A time budget that is spent after the first trial's first epoch, however fast this machine is."""

    over = False

    def __call__(self, trial_id: str, result: dict) -> bool:
        self.over = bool(result["reports"])
        return False

    def stop_all(self) -> bool:
        return self.over


LOWEST_LOSS = {"METRIC": "loss", "MODE": "min"}


@pytest.fixture(scope="module")
def for_the_lowest_loss(ray_started: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a search for the lowest loss, with repeats."""
    folder = tmp_path_factory.mktemp("loss") / "it"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr)
        patch.setattr(tune, "run", run_here)
        for name, value in LOWEST_LOSS.items():
            patch.setattr(hparam_search, name, value)
        assert run_search(folder, "--max-epochs", 4, "--num-samples", 2, "--repeats", 2) == 0
    return folder


@pytest.mark.usefixtures("trials_here")
def test_search_interrupted_and_grown_step_by_step_ends_as_if_asked_for_everything_at_first(
    for_the_lowest_loss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, log = tmp_path / "it", tmp_path / "it" / LOG_FILE
    for name, value in LOWEST_LOSS.items():
        monkeypatch.setattr(hparam_search, name, value)
    # A budget that is spent at once: nothing has been trained.
    assert run_search(folder, "--max-epochs", 4, "--num-samples", 1, "--time-budget", "0.001s") == 1
    printed = capsys.readouterr()
    assert re.search(rf"budget is spent\. To resume: .* --resume {folder} --time-budget ", printed.out)
    assert printed.err.endswith("No trial has a model, so there is no best model.\n")
    assert not (folder / "best_model").exists()
    assert main(["--resume", str(folder)]) == 1
    assert "The time budget is spent. To resume: " in capsys.readouterr().out

    with monkeypatch.context() as patch:  # Tune itself fails
        patch.setattr(tune, "run", MagicMock(side_effect=tune.TuneError("Traceback:\nOSError: no room")))
        assert main(["--resume", str(folder), "--time-budget", "1h"]) == 1
    printed = capsys.readouterr()
    assert (printed.err, "To resume: " in printed.out) == ("hparam_search.py: OSError: no room.\n", True)

    # A larger one is spent in the middle of a trial, whose model is tested.
    with monkeypatch.context() as patch:
        patch.setattr(hparam_search, "TimeBudget", lambda search: OverInTheFirstTrial())
        assert main(["--resume", str(folder), "--time-budget", "1h"]) == 0
    out = capsys.readouterr().out
    assert "The time budget is spent." in out
    assert "test accuracy: " in out
    assert [(row["status"], row["epochs"]) for row in read_csv(folder)] == [("UNFINISHED", "1"), ("PENDING", "")]

    assert main(["--resume", str(folder), "--cpus-per-trial", "2"]) == 2
    assert "--cpus-per-trial 2 exceeds the 1 available; use at most that" in capsys.readouterr().err

    # With more samples and time, the disk is full from a third epoch on.
    full = []

    def append_unless_full(path: Path, content: dict, durable: bool) -> None:
        if content.get("epoch") == 3:
            full.append(path)
        with explain_failure(path):
            if full:
                raise OSError(28, "No space left on device")
        append_line(path, content, durable)

    with monkeypatch.context() as patch:
        patch.setattr("search.records.append_line", append_unless_full)
        more = ["--time-budget", "2h", "--num-samples", "2", "--cpus-per-trial", "1"]
        assert main(["--resume", str(folder), *more]) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith(f"hparam_search.py: cannot write {log} (No space left on device); make room there.\n")
    assert f"--resume {folder}\n" in printed.out
    assert "UNFINISHED" in {row["status"] for row in read_csv(folder)}

    # With room, it is as if nothing had happened.
    assert main(["--resume", str(folder), "--repeats", "2"]) == 0
    out, rows = capsys.readouterr().out, read_csv(folder)
    assert "budget is spent" not in out
    assert figures(folder) == figures(for_the_lowest_loss)
    assert read_best_model(open_search(folder, {})) == read_best_model(open_search(for_the_lowest_loss, {}))

    # The best config is trained again with two other seeds, whatever the scheduler thinks of them.
    best = min(rows[:4], key=lambda row: float(row["best_loss"]))["trial"]
    repeats = [(row["trial"], row["repeats"], row["seed"], row["epochs"]) for row in rows[4:]]
    assert repeats == [(f"{best}_seed_{seed}", best, seed, "4") for seed in "12"]
    one, other = (float(row["best_loss"]) for row in rows[4:])
    assert f"\n  {best}  {(one + other) / 2:.4f} ± {abs(one - other) / 2**0.5:.4f} (2 seeds)\n" in out

    # Once the budget is spent, more is not silently left out.
    monkeypatch.setattr(Search, "time_left", lambda search: 0.0)
    assert main(["--resume", str(folder), "--repeats", "3"]) == 0
    assert f"--resume {folder} --time-budget MORE (and your other flags)\n" in capsys.readouterr().out


def test_models_are_those_of_the_lowest_losses(for_the_lowest_loss: Path) -> None:
    search, rows = open_search(for_the_lowest_loss, {}), read_csv(for_the_lowest_loss)
    trials = sorted(search.own_trials(), key=lambda trial: min(report.loss for report in trial.reports))
    most_accurate = [max(trial.reports, key=lambda report: report.accuracy).loss for trial in trials]
    lowest = [min(report.loss for report in trial.reports) for trial in trials]
    assert lowest != most_accurate
    assert sorted(float(row["best_loss"]) for row in rows[:4]) == lowest
    for trial in trials[:2]:
        model = load_model(weights_path(search.folder / trial.name, trial.best.epoch), trial.config, DATA.classes)
        assert evaluated(model, "val")[0] == pytest.approx(trial.best.loss, rel=0.001)
    assert read_best_model(search)["val_loss"] == lowest[0]
    assert evaluated(read_model(search.folder / "best_model")[0], "val")[0] == pytest.approx(lowest[0], rel=0.001)
    best = [event.value for event in EventAccumulator(str(for_the_lowest_loss)).Reload().Scalars("search/best_loss")]
    assert best == sorted(best, reverse=True)
    assert best[-1] == pytest.approx(lowest[0])
