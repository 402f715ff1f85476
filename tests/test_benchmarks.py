import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from ray.tune.schedulers import ASHAScheduler

from benchmarks import curves as recording
from benchmarks import recipes, replay
from search.records import Trial
from search.schedulers import Promotion, RayScheduler, Scheduler, early_stop


def test_comparison_is_paired_and_its_p_value_exact() -> None:
    mean, error, p = recipes.compare([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.4, 0.6])
    assert (mean, error) == (pytest.approx(0.15), pytest.approx(math.sqrt(0.01 / 3 / 4)))
    assert p == 2 / 16  # all four are higher: 1 of 16 ways, and 1 for all lower
    assert recipes.compare([0.1, 0.2, 0.3], [0.2, 0.1, 0.3])[::2] == (pytest.approx(0), 1)
    assert recipes.compare([0.5], [0.6])[0] == pytest.approx(0.1)


def test_recorded_runs_are_not_trained_again(
    make_folder: Callable, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, csv = make_folder({"train": {"cat": 60, "dog": 60}, "test": {"cat": 5}}), tmp_path / "runs.csv"
    flags = ["--data-dir", str(folder), "--output", str(csv), "--widths", "4", "4", "--epochs", "1"]
    recipes.main([*flags, "--seeds", "1", "bias_lr=0"])
    recipes.main([*flags, "--seeds", "2", "bias_lr=0"])
    recorded = csv.read_text()
    assert len(recorded.splitlines()) == 5
    capfd.readouterr()
    monkeypatch.setattr("benchmarks.recipes.read_images", None)  # it would be called to train
    recipes.main([*flags, "--seeds", "2", "bias_lr=0"])
    assert csv.read_text() == recorded
    rows = capfd.readouterr().out.split("\n\n")[1].splitlines()
    assert [row.split(" | ")[:3] for row in rows[2:]] == [["| default", "0.02", "2"], ["| bias_lr=0", "0.02", "2"]]


@pytest.mark.parametrize("recipe", ["momentum=1", "bias_rate=0.1", "momentum"])
def test_invalid_recipe_is_refused_in_one_sentence(recipe: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        recipes.main(["--data-dir", "nowhere", recipe])
    assert recipe.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


def curve(loss: float, number: int = 0, epochs: int = 4, pace: float = 1.0) -> list[dict]:
    """Return a config's curve: its loss stays, its accuracy grows."""
    drawn = {"config": number, "h_1": 8, "h_2": 32, "p_drop": 0.1, "lr": 10.0 ** (number - 5), "train_accuracy": 0.5}
    drawn |= {"loss": loss, "train_loss": loss}
    accuracies = [(1 - loss / 10) * e / epochs for e in range(1, epochs + 1)]
    return [drawn | {"epoch": e, "accuracy": each, "seconds": pace * e} for e, each in enumerate(accuracies, 1)]


def played(
    losses: dict[float, float], scheduler: Callable, at_once: int, stop: Callable | None = None
) -> tuple[list[int], float, int]:
    """Simulate a search with these losses → seconds per epoch; return the trials' epochs, idle time and states."""
    trials = replay.new_trials(len(losses))
    curves = {trial: curve(loss, pace=losses[loss]) for trial, loss in zip(trials, losses, strict=True)}
    idle, states = replay.play(curves, scheduler(trials), stop, at_once)
    return [len(trial.reports) for trial in trials], idle, states


def asha(trials: list[Trial]) -> Scheduler:
    return RayScheduler(ASHAScheduler("epoch", "loss", "min", max_t=4, grace_period=1, reduction_factor=2), ())


def promote(trials: list[Trial]) -> Promotion:
    return Promotion(trials, {1: 2, 2: 1}, 4)


def test_schedulers_on_curves_that_can_be_reckoned_by_hand() -> None:
    losses = {1.0: 1000.0, 2.0: 100.0, 0.5: 10.0, 3.0: 1.0}
    for scheduler, at_once, epochs in (
        # ASHA looks after 1, 2 and 4 epochs, and lets pass what is no worse than the median of those before.
        # The first passes; 2.0 is worse than 1.0; 0.5 is better than 1.5; 3.0 is worse than 1.0.
        (asha, 1, [4, 1, 4, 1]),
        (asha, 4, [4, 1, 4, 4]),  # the fastest, 3.0, is now the first; then come 0.5; 2.0, worse than 1.75; 1.0
        (promote, 1, [2, 1, 4, 1]),  # the best two continue after epoch 1, and the best one after epoch 2
        (promote, 4, [2, 2, 4, 4]),  # no worker waits for 1.0 and 0.5: 3.0 continues
    ):
        assert played(losses, scheduler, at_once)[0] == epochs


def test_idle_time_and_training_states_are_counted_and_trials_may_stop_by_themselves() -> None:
    losses = {1.0: 2.0, 2.0: 1.0, 3.0: 1.0}
    # 4 epochs of 2 s beside 8 of 1 s: of two workers none is idle, of three two are for 4 s.
    assert played(losses, lambda _: Scheduler(), 2) == ([4, 4, 4], 0, 2)
    assert played(losses, lambda _: Scheduler(), 3) == ([4, 4, 4], 8, 3)
    assert played(losses, lambda _: Scheduler(), 2, partial(early_stop, 4, 2, 0.1, 100)) == ([3, 3, 3], 0, 2)
    assert played(losses, promote, 1) == ([4, 2, 1], 0, 3)


def test_tables_of_recorded_curves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "curves.csv"
    # The third of five learning rates is the best; its neighbourhood is wider than the middle fifth of the range.
    curves = {i: curve(0.5 + abs(i - 2), i, epochs=20) for i in range(5)}
    curves[5] = [row | {"config": 5, "loss": 0.7, "accuracy": row["accuracy"] + 0.1} for row in curves[2]]
    recording.write_curves(path, curves)
    assert recording.read_curves(path) == curves
    flags = ["--curves", str(path), "--trials", "5", "--searches", "20", "--draws", "design", "independent"]
    replay.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 recorded configs, 20 searches per row."
    assert lines[2] == "Rank agreement of the loss at epoch 2 with the best accuracy: +1.00."
    noise = f"loss {0.2 / 2**0.5:.4f}, accuracy {0.1 / 2**0.5:.4f}."
    assert lines[5:10] == [f"Standard deviation between seeds after epoch {i}: {noise}" for i in (2, 4, 8, 16, 20)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[13:]]
    assert len(rows) == 2 * (1 + 9 * 4 + 1)
    for draws, name, _, _, epochs, accuracy, lost, *_ in rows:
        assert (accuracy == "0.9500 ± 0.0000") == (draws == "design")
        assert epochs == "100" or name != "none"
        assert lost == "0.0%" or name not in ("none", "promote, grace 2, factor 2, keep 2")
    for wrong, words in ((["--schedulers", "best"], "unknown scheduler 'best'"), (["--curves", "nowhere"], "nowhere")):
        with pytest.raises(SystemExit, match="2"):
            replay.main([*flags, *wrong])
        assert words in capsys.readouterr().err


def test_an_interrupted_recording_is_continued(make_folder: Callable, tmp_path: Path) -> None:
    folder = make_folder({"train": {"cat": 15, "dog": 15, "elk": 15}, "test": {"cat": 1}})
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--classes", "2", "--h-1", "4", "--h-2", "4", "8"]
    flags += ["--epochs", "2", "--samples", "1", "--seeds", "2", "--output", str(tmp_path)]
    recording.main(flags)
    path = tmp_path / "default.csv"
    recorded = recording.read_curves(path)
    assert {row["h_2"] for i in (0, 1) for row in recorded[i]} == {4, 8}
    # The best first, with another seed.
    best = max((0, 1), key=lambda i: recording.best_accuracy(recorded[i]))
    assert [recorded[i][0]["lr"] for i in (2, 3)] == [recorded[i][0]["lr"] for i in (best, 1 - best)]
    assert recorded[2][0]["loss"] != recorded[best][0]["loss"]
    recording.write_curves(path, {i: recorded[i] for i in (0, 3)})
    recording.main(flags)
    continued = recording.read_curves(path)
    assert [continued[i] for i in (0, 3)] == [recorded[i] for i in (0, 3)]
    assert [continued[i][1]["loss"] for i in (1, 2)] == [recorded[i][1]["loss"] for i in (1, 2)]
    with pytest.raises(SystemExit, match="curves of other configs"):
        recording.main([*flags, "--epochs", "3"])
