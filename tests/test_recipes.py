import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.recipes import compare, main


def test_comparison_is_paired_and_its_p_value_exact() -> None:
    mean, error, p = compare([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.4, 0.6])
    assert (mean, error) == (pytest.approx(0.15), pytest.approx(math.sqrt(0.01 / 3 / 4)))
    assert p == 2 / 16  # all four are higher: 1 of 16 ways, and 1 for all lower
    assert compare([0.1, 0.2, 0.3], [0.2, 0.1, 0.3])[::2] == (pytest.approx(0), 1)
    assert compare([0.5], [0.6])[0] == pytest.approx(0.1)


def test_recorded_runs_are_not_trained_again(
    make_folder: Callable, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, csv = make_folder({"train": {"cat": 60, "dog": 60}, "test": {"cat": 5}}), tmp_path / "runs.csv"
    flags = ["--data-dir", str(folder), "--output", str(csv), "--widths", "4", "4", "--epochs", "1"]
    main([*flags, "--seeds", "1", "bias_lr=0"])
    main([*flags, "--seeds", "2", "bias_lr=0"])
    recorded = csv.read_text()
    assert len(recorded.splitlines()) == 5
    capfd.readouterr()
    monkeypatch.setattr("benchmarks.recipes.read_images", None)  # it would be called to train
    main([*flags, "--seeds", "2", "bias_lr=0"])
    assert csv.read_text() == recorded
    rows = capfd.readouterr().out.split("\n\n")[1].splitlines()
    assert [row.split(" | ")[:3] for row in rows[2:]] == [["| default", "0.02", "2"], ["| bias_lr=0", "0.02", "2"]]


@pytest.mark.parametrize("recipe", ["momentum=1", "bias_rate=0.1", "momentum"])
def test_invalid_recipe_is_refused_in_one_sentence(recipe: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--data-dir", "nowhere", recipe])
    assert recipe.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
