import math
from functools import partial
from pathlib import Path

import pytest
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from benchmarks.curves import read_curves, write_curves
from benchmarks.replay import judge, main, play
from benchmarks.samplers import best_after, nearest, search
from search.hooks import early_stop


def curve(loss: float, number: int = 0, epochs: int = 4, pace: float = 1.0) -> list[dict]:
    """Return a config's curve: its loss stays, its accuracy grows."""
    drawn = {"config": number, "h_1": 8, "h_2": 32, "p_drop": 0.1, "lr": 0.01 * (number + 1), "train_accuracy": 0.5}
    drawn |= {"loss": loss, "train_loss": loss}
    accuracies = [(1 - loss / 10) * e / epochs for e in range(1, epochs + 1)]
    return [drawn | {"epoch": e, "accuracy": each, "seconds": pace * e} for e, each in enumerate(accuracies, 1)]


def test_asha_on_curves_that_can_be_reckoned_by_hand() -> None:
    curves = [curve(loss, pace=pace) for loss, pace in ((1.0, 1000.0), (2.0, 100.0), (0.5, 10.0), (3.0, 1.0))]
    for at_once, epochs in (
        (1, [4, 1, 4, 1]),  # the first passes; 2.0 is worse than 1.0; 0.5 is better than 1.5; 3.0 is worse than 1.0
        (4, [4, 1, 4, 4]),  # the fastest, 3.0, is now the first; then come 0.5; 2.0, worse than 1.75; 1.0
    ):
        # It looks after 1, 2 and 4 epochs, and lets pass what is no worse than the median of those before.
        asha = ASHAScheduler("epoch", "loss", "min", max_t=4, grace_period=1, reduction_factor=2)
        assert play(curves, asha, None, at_once) == epochs


def test_without_a_scheduler_all_run_to_their_end_or_stop_by_themselves_and_what_that_costs_is_told() -> None:
    curves = [curve(loss) for loss in (1.0, 2.0, 3.0)]
    assert play(curves, FIFOScheduler(), None, 2) == [4, 4, 4]
    assert play(curves, FIFOScheduler(), partial(early_stop, 4, 2, 0.1, 100), 2) == [3, 3, 3]
    assert judge(curves, [4, 4, 1]) == {"spent": 0.75, "found": 1.0, "lost_at": None}
    judged = judge(curves, [2, 4, 3])  # 0.9, 0.8 and 0.7 in the end
    assert judged == {"spent": 0.75, "found": pytest.approx(0.8 / 0.9), "lost_at": 2}


def test_table_of_recorded_curves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "curves.csv"
    curves = {i: curve(0.5 + i, i) for i in range(5)}
    write_curves(path, curves)
    assert read_curves(path) == curves
    main(["--curves", str(path), "--trials", "3", "--searches", "4", "--at-once", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 recorded configs, 4 searches of 3 trials."
    assert "| none, 1 at once | 1.00 | 1.000 (1.000 to 1.000) | 0.0000 | 0.0% |  |" in lines
    assert len(lines) == 4 + 2 + (18 + 3) * 4
    with pytest.raises(SystemExit):
        main(["--curves", str(path)])
    assert "5 configs, fewer than the 12 of a search" in capsys.readouterr().err


def test_samplers_are_judged_by_what_was_found_in_equal_epochs() -> None:
    curves = [curve(2.0, 0), curve(1.0, 1), curve(math.nan, 2)]  # 0.8 and 0.9 in the end, in steps of a quarter
    found = [best_after(curves, [2, 4, 1], budget) for budget in (1, 2, 3, 5, 6, 100)]
    assert found == pytest.approx([0.2, 0.4, 0.4, 0.675, 0.9, 0.9])
    config = {"h_1": 8, "h_2": 32, "p_drop": 0.1}
    assert [nearest(curves, config | {"lr": lr})[0]["config"] for lr in (1e-5, 0.013, 0.016, 0.1)] == [0, 0, 1, 2]
    # Early stopping ends trials whose loss stays after 5 of 20 epochs; the best of these is drawn sooner or later.
    recorded = [curve(loss, number, epochs=20) for number, loss in enumerate((2.0, 1.0, 3.0))]
    found = search(recorded, None, seed=0)
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.9 * 5 / 20)
