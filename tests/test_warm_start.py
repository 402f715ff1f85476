"""Searches that begin with the trials of earlier ones."""

import contextlib
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from ray import tune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import hparam_search
from hparam_search import main
from search.best_model import evaluate_best_model, read_best_model
from search.files import read_lines
from search.records import LOG_FILE, Objective, Trial, open_search
from search.trial import weights_path
from search.warm_start import earlier_search, take
from tests.conftest import Finished, figures, read_csv, run_search
from tests.helpers import CONFIG, END, IMAGES, add, search_in, tell
from tests.helpers import report as report_of
from train import new_model

FITS = {"epochs": 4, "batch_size": 32}  # with CONFIG


def test_trials_that_fit_are_taken_once_and_the_others_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = [tmp_path / name for name in ("one", "two", "images", "metric")]
    one, two, images, metric = map(search_in, folders)
    new = search_in(tmp_path / "new", scheduler="none", warm_start=[str(folder) for folder in folders])
    new.space |= FITS
    added = ("batch_size", "label_smoothing")  # since, one of them with a default
    for key in added:
        del one.space[key]
    one.write()
    images.images, metric.objective = {"num_classes": 6}, Objective("loss", "min")
    images.write()
    metric.write()
    best = add(one, 0.2, 0.9, lr=0.1)
    for change in ({"momentum": 0.8}, {"epochs": 5}, {"h_1": 0}, {"cutout": 8}):
        add(one, 0.3, **change)
    one.record("drawn", trial="lacks", config={key: CONFIG[key] for key in CONFIG if key not in added}, repeats=None)
    tell(one, "lacks", report_of(1), END)
    add(one)
    add(one, -1, lr=2.0, seed=9)  # lr lies outside the new space
    add(one, 0.4, 0.5, end=None, lr=0.01)
    one.record("failed", trial="train_cifar_00008", error="why")
    paused = add(one, 0.4, end=None, lr=0.02)
    tell(one, paused, report_of(2), paused=True)
    add(one, 0.7, 0.8, repeats=best, lr=0.1, seed=6)
    add(one, 0.7, end=None, repeats=best, lr=0.1, seed=8)
    again = add(two, 0.2, 0.9, lr=0.1)
    add(two, 0.6, repeats=again, lr=0.1, seed=7)
    add(images, 0.9)
    add(metric, 0.9)
    for name in ("weights_000002.pt", "training.pt", "error.txt"):
        (one.folder / paused).mkdir(exist_ok=True)
        (one.folder / paused / name).write_text(name)

    with contextlib.ExitStack() as stack:
        stack.enter_context(earlier_search(one.folder))  # by another process, at the same moment
        take(new, [stack.enter_context(earlier_search(folder)) for folder in folders])
    new.write()
    assert capsys.readouterr().out.splitlines() == [
        f"Took 5 of 12 trials from {one.folder}; skipped: different momentum (1), different epochs (1), "
        "invalid h_1 (1), unknown cutout (1), lacks batch_size (1), not trained (1), unfinished repeat (1).",
        f"Took 1 of 2 trials from {two.folder}; skipped: already taken (1).",
        f"Took 0 of 1 trials from {images.folder}; skipped: different images (1).",
        f"Took 0 of 1 trials from {metric.folder}; skipped: different METRIC or MODE (1).",
    ]
    taken = {name: (trial.source, trial.status) for name, trial in new.trials.items()}
    assert taken == {
        "train_cifar_00000": (f"one/{best}", "TERMINATED"),
        "train_cifar_00001": ("one/train_cifar_00007", "DIVERGED"),
        "train_cifar_00002": ("one/train_cifar_00008", "UNFINISHED"),
        "train_cifar_00003": (f"one/{paused}", "PAUSED"),
        "train_cifar_00000_seed_6": ("one/train_cifar_00010", "TERMINATED"),
        "train_cifar_00000_seed_7": ("two/train_cifar_00001", "TERMINATED"),
    }
    for trial in new.trials.values():
        source = (one if trial.source.startswith("one/") else two).trials[Path(trial.source).name]
        assert (trial.config, repr(trial.reports)) == (source.config, repr(source.reports))
    assert {trial.repeats for trial in new.trials.values()} == {None, "train_cifar_00000"}
    shutil.rmtree(one.folder)
    files = sorted((new.folder / "train_cifar_00003").glob("*.pt"))
    assert [path.read_text() for path in files] == ["training.pt", "weights_000002.pt"]
    assert repr(open_search(new.folder, {}).trials) == repr(new.trials)
    # TensorBoard would hide values outside a discrete domain, such as the grid of h_1.
    metadata = EventAccumulator(str(new.folder)).Reload().summary_metadata["_hparams_/experiment"]
    infos = HParamsPluginData.FromString(metadata.plugin_data.content).experiment.hparam_infos
    assert {info.name: info.WhichOneof("domain") for info in infos} == dict.fromkeys(new.searched, "domain_interval")
    assert new.first_number == 4
    # A config that was taken is not drawn again, but may be repeated with another seed.
    name, config = "train_cifar_00004", new.trials["train_cifar_00000"].config
    assert new.draw([Trial(name, config)]) == []
    assert len(new.draw([Trial(name, config | {"seed": 1}, "train_cifar_00000")])) == 1
    assert capsys.readouterr().err == "Skipped 1 of 1 trials with the config of another trial.\n"
    # A warm-started search can be taken from, too.
    last = search_in(tmp_path / "last", scheduler="none", warm_start=[str(new.folder)])
    last.space |= FITS
    take(last, [new])
    assert last.trials.keys() == new.trials.keys() - {name}
    assert last.first_number == new.first_number


@pytest.mark.usefixtures("trials_here")
def test_warm_started_search_trains_only_new_trials_and_outlives_its_source(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    earlier, folder = shutil.copytree(finished.folder, tmp_path / "earlier"), tmp_path / "it"
    assert run_search(folder, "--max-epochs", 9, "--warm-start", earlier) == 2
    assert "no trial of the earlier searches fits; undo the differences above, or " in capsys.readouterr().err
    assert not folder.exists()
    # Too low learning rates, for one epoch only, so that no new trial is good.
    space = hparam_search.QUICK_SPACE | {"lr": tune.loguniform(1e-6, 1e-5)}
    monkeypatch.setattr(hparam_search, "QUICK_SPACE", space)
    monkeypatch.setattr(hparam_search, "MAX_SECONDS_PER_TRIAL", 1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(tune, "run", lambda trial, **options: None)  # killed as it starts
        run_search(folder, "--num-samples", 1, "--max-epochs", 10, "--warm-start", earlier)
    printed = capsys.readouterr().out
    assert f"Took 4 of 4 trials from {earlier}.\n" in printed
    assert f"4 of these trials come from {earlier}.\n" in printed
    shutil.rmtree(earlier)
    shutil.rmtree(folder / "best_model")
    assert main(["--resume", str(folder)]) == 0
    rows, search = read_csv(folder), open_search(folder, {})
    assert figures(folder, "weights taken_from")[:4] == figures(finished.folder, "weights taken_from")
    assert [row["taken_from"] for row in rows] == [*(f"{earlier}/{name}" for name in finished.search.trials), "", ""]
    assert all(1e-6 <= float(row["lr"]) <= 1e-5 for row in rows[4:])
    # What was taken came before the first start; since, only the new ones have been trained.
    after = itertools.dropwhile(lambda event: event["event"] != "started", read_lines(folder / LOG_FILE)[0])
    trained = {event["trial"] for event in after if event["event"] == "reported"}
    assert trained == {trial.name for trial in search.own_trials()[4:]}
    assert read_best_model(search) == finished.metrics  # that of the earlier one, whose weights were linked


def test_best_trial_whose_weights_were_not_kept_leaves_the_next_one_to_be_tested_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    search = search_in(tmp_path)
    best, second, third = (add(search, accuracy) for accuracy in (0.9, 0.8, 0.7))
    for name in (second, third):
        (tmp_path / name).mkdir()
        torch.save(new_model(CONFIG, 5).state_dict(), weights_path(tmp_path / name, 1))
    metrics, predicted = evaluate_best_model(search, IMAGES, {})
    assert (predicted.argmax(1) == IMAGES.test_labels).float().mean() == pytest.approx(metrics["test_accuracy"])
    assert metrics["trial_id"] == search.trials[second].trial_id
    assert capsys.readouterr().err == f"{best} was better, but its weights are damaged or missing.\n"
    assert read_best_model(search) == metrics
    (tmp_path / best).mkdir()
    torch.save(new_model(CONFIG, 5).state_dict(), weights_path(tmp_path / best, 1))
    assert read_best_model(search) is None
