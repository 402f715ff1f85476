import json
import math
import signal
from pathlib import Path

import pytest

import hparam_search
from hparam_search import main
from search.command_line import Settings
from search.records import Search, append_line, read_log, read_results, sealed, write_params
from search.repeats import compared, repeats_of, two_sided
from tests.conftest import CONFIG, log_line, read_csv


def test_students_t() -> None:
    # The closed forms for 1, 2 and 4 degrees of freedom.
    for t in (0.1, 1.0, 2.5, 12.0):
        assert two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-3)
        assert two_sided(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-3)
        x = t / math.sqrt(4 + t * t)
        assert two_sided(t, 4) == pytest.approx(1 - 1.5 * (x - x**3 / 3), rel=1e-3)


def test_configs_are_compared_by_other_seeds_than_they_were_chosen_by(tmp_path: Path) -> None:
    accuracies = {"0": 0.5, "1": 0.9, "2": 0.7, "3": 0.8}
    search = Search(tmp_path, Settings(repeats=2), {}, {}, {}, {f"t_{i}": CONFIG for i in accuracies})
    for name, accuracy in zip(search.trials, accuracies.values(), strict=True):
        write_params(tmp_path / name, CONFIG)
        append_line(tmp_path / name, sealed(log_line(1, accuracy=accuracy, done=True)) + "\n")
    repeats = repeats_of(search, read_results(search))
    assert {name: config["seed"] for name, config in repeats.trials.items()} == {
        f"t_{i}_seed_{seed}": seed for i in "132" for seed in (1, 2)
    }
    assert compared(repeats) == []
    repeats.folder.mkdir()
    again = {"t_1": (0.79, 0.81), "t_3": (0.80, 0.82), "t_2": (0.10, 0.12)}
    for name, values in again.items():
        for seed, accuracy in enumerate(values, 1):
            folder = repeats.folder / f"{name}_seed_{seed}"
            write_params(folder, CONFIG | {"seed": seed})
            append_line(folder, sealed(log_line(1, accuracy=accuracy, done=True)) + "\n")
    expected = [
        "With 2 other seeds each, the best accuracies (mean ± standard deviation):",
        "  t_3  0.8100 ± 0.0141",
        "  t_1  0.8000 ± 0.0141  not significantly different",
        "  t_2  0.1100 ± 0.0141  significantly worse",
    ]
    assert compared(repeats) == expected
    # A diverged seed's earlier accuracy does not count.
    line = log_line(2, accuracy=0.1, loss=float("nan"), done=True)
    for seed, earlier in ((1, 0.99), (2, 0.98)):
        folder = repeats.folder / f"t_3_seed_{seed}"
        (folder / "result.json").write_text(sealed(log_line(1, accuracy=earlier)) + "\n" + sealed(line) + "\n")
        assert compared(repeats) == [
            expected[0],
            "  t_1  0.8000 ± 0.0141",
            "  t_2  0.1100 ± 0.0141  significantly worse",
            f"  t_3  diverged with {seed} of 2 seeds",
        ]


@pytest.mark.usefixtures("ray_started", "small_search")
def test_best_trials_are_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--quick", "--num-samples", "4", "--scheduler", "median", "--grace-period", "1"]
    assert main([*flags, "--output-dir", str(tmp_path), "--name", "it"]) == 0
    out = capsys.readouterr().out
    assert "Scheduler: median, grace period 1." in out
    assert "other seeds" not in out
    rows, best = read_csv(tmp_path / "it"), (tmp_path / "it/best_model/metrics.json").read_bytes()

    # A finished search can be asked for them; here it is interrupted before they have begun, and goes on.
    fit = hparam_search.fit
    monkeypatch.setattr(hparam_search, "fit", lambda search, *_, **__: signal.raise_signal(signal.SIGTERM))
    assert main(["--resume", str(tmp_path / "it"), "--repeats", "2"]) == 143
    monkeypatch.setattr(hparam_search, "fit", fit)
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "it")]) == 0
    out = capsys.readouterr().out
    assert "With 2 other seeds each" in out
    assert (read_csv(tmp_path / "it"), (tmp_path / "it/best_model/metrics.json").read_bytes()) == (rows, best)
    ranking = sorted(rows, key=lambda row: (-float(row["best_accuracy"]), float(row["best_loss"])))
    folders = sorted((tmp_path / "it" / "repeats").glob("train_cifar_*"))
    assert [folder.name for folder in folders] == sorted(
        f"train_cifar_{row['trial_id']}_seed_{seed}" for row in ranking[:3] for seed in (1, 2)
    )
    for folder in folders:
        assert read_log(folder)[0][-1]["epoch"] == 4  # whatever a scheduler thinks of it
        assert json.loads((folder / "params.json").read_text())["seed"] == int(folder.name[-1])
        assert not list(folder.glob("*/weights.pt"))

    monkeypatch.setattr(hparam_search, "running_ray", lambda: pytest.fail("Ray was started"))
    assert main(["--resume", str(tmp_path / "it")]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == out.splitlines()[-4:]
