import random
import re
from pathlib import Path

import numpy as np
import pytest

from search import report as reports
from search.files import lock
from search.progress import Progress, block, time_left
from search.records import Search
from tests.helpers import END, add, report, search_in, tell


def importance(folder: Path, trials: list[tuple[dict, list[float]]], mode: str = "max") -> str:
    """Return what a search of these configs and accuracies says about importance."""
    search = search_in(folder, ("accuracy", mode))
    search.space["h_1"] = {"values": [4, 8, 16]}
    for config, accuracies in trials:
        add(search, *accuracies, **config)
    lines = reports.importance(search, search.ended())
    assert max(map(len, lines)) <= 80
    return " ".join(lines)


def test_importance_is_a_rank_correlation_at_the_last_epoch_that_all_reached(tmp_path: Path) -> None:
    generator, trials = random.Random(1), []
    for i in range(16):
        config = {"lr": 10 ** (-4 + i / 8), "p_drop": generator.uniform(0.1, 0.5), "h_1": generator.choice([4, 8])}
        # At epoch 2 the accuracy follows lr; later epochs, which few reach, reverse the order.
        trials.append((config, [0.1, 0.2 + i / 50, *([0.9 - i / 50] * (i % 3))]))
    about = "Importance (rank correlation with {} at epoch 2, {} trials): lr {}1.00. No significant effect: {}."
    others = "h_1, h_2, p_drop"
    assert importance(tmp_path / "max", trials) == about.format("accuracy", 16, "+", others)
    trials.append(({"lr": 0.5}, [-1]))  # what diverged counts as the worst
    assert importance(tmp_path / "min", trials, "min") == about.format("lower accuracy", 17, "-", others)
    assert importance(tmp_path / "few", trials[:7]) == "Importance: needs at least 8 finished trials (7 so far)."


def test_edge_is_named_if_the_accuracy_rises_towards_it_and_chance_is_seldom_called_importance(tmp_path: Path) -> None:
    p_drops, narrow = np.linspace(0.1, 0.5, 12).tolist(), np.linspace(0.15, 0.45, 12).tolist()
    for i, (key, values, accuracy, edge) in enumerate((
        ("h_1", [4, 8, 16], lambda x: x, ["h_1 (upper end)"]), ("h_1", [4, 8, 16], lambda x: -abs(x - 8), []),
        ("p_drop", p_drops, lambda x: -x, ["p_drop (lower end)"]), ("p_drop", narrow, lambda x: x, []),
        # The best is at the upper end, but most improve towards the lower one.
        ("p_drop", p_drops, lambda x: max(-x, 9 * x - 4.3), []),
    )):  # fmt: skip
        text = importance(tmp_path / str(i), [({key: x}, [0.5 + accuracy(x) / 40]) for x in values * 4])
        assert re.findall(r"consider widening: (.*)\.", text) == edge
    draw, texts = random.Random(0).random, []
    for i in range(60):
        trials = [({"lr": draw(), "h_1": 4 if draw() < 0.5 else 8, "p_drop": draw()}, [draw()]) for _ in range(10)]
        texts.append(importance(tmp_path / f"chance {i}", trials))
    assert sum("Importance" in text for text in texts) <= 9  # of 60; 3 are expected


def test_rungs_tell_when_trials_ended_and_what_the_first_one_was_worth(tmp_path: Path) -> None:
    search = search_in(tmp_path, grace_period=2)
    for accuracies in ([0.1, 0.1], [0.1, 0.2], [0.1, 0.3, 0.7], [0.1, 0.4, 0.6], [0.2, 0.1, -1]):
        add(search, *accuracies)
    for count, about in ((3, "needs 3 surviving trials (2 so far)"), (4, "+0.50 (3 trials)")):
        lines = [f"Epochs trained: 2 (2 trials), 3 ({count} trials)."]
        lines.append(f"Rank agreement between epoch 2 and the end: {about}.")
        assert reports.rungs(search, search.ended()) == lines
        add(search, 0.1, 0.5, 0.8)


def test_repeats_are_summarized_by_their_mean_and_spread(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    names = [add(search, accuracy) for accuracy in (0.5, 0.9, 0.7, 0.8)]
    assert reports.repeats(search) == []
    for i, accuracies in ((1, (0.79, 0.81, 0.83)), (2, (0.1, -1, -1)), (3, (0.80, 0.82, -1))):
        for accuracy in accuracies:
            add(search, accuracy, repeats=names[i])
    add(search, 0.9, end=None, repeats=names[3])  # has not ended
    assert reports.repeats(search)[1:] == [
        "  train_cifar_00001  0.8100 ± 0.0200 (3 seeds)",
        "  train_cifar_00003  0.8100 ± 0.0141 (3 seeds, 1 diverged)",
        "  train_cifar_00002  2 of 3 seeds diverged",
    ]


def test_list_shows_every_search_and_its_status(tmp_path: Path) -> None:
    for name, end in (("one", None), ("two", END), ("three", END)):
        add(search_in(tmp_path / name), 0.3, end=end)
    (tmp_path / "three" / "search.json").write_text("{}")
    with lock(tmp_path / "two"):
        rows = [" ".join(line.split()) for line in reports.list_searches(tmp_path).splitlines()[2:5]]
    assert rows == ["one interrupted 0/1 0.3000", "two running 1/1 0.3000", "three damaged, or from another version"]


def running_search(folder: Path, *epochs: int, ended: int) -> tuple[Search, list[str]]:
    """Return a search whose trials have done so many of 10 epochs, the first ones having ended, and their names."""
    search = search_in(folder)
    names = [add(search, *[0.1] * n, end=END if i < ended else None, epochs=10) for i, n in enumerate(epochs)]
    search.seconds, search.started = 125.0, (0.0, 25.0)
    return search, names


def test_progress_tells_what_is_done_and_what_is_left(tmp_path: Path) -> None:
    search, names = running_search(tmp_path / "one", 10, 4, 6, 0, 0, ended=2)
    assert block(search, names[2:4], 45) == [
        "Trials: 2 done, 2 running, 1 waiting. Epochs: 20 of at most 50.",
        "Time: 2min 5s, about 45s left.",
        "Best so far: train_cifar_00000, accuracy 0.1000 after epoch 1.",
        "  train_cifar_00002  epoch   6 of 10  accuracy 0.1000  loss 1.0000",
        "  train_cifar_00003  epoch   0 of 10  starting",
    ]
    assert (len(block(search, names * 20, None)), block(search, names * 20, None)[-1]) == (16, "  and 88 more")
    # 100 s for these 20 epochs; trials end after 7 on average, so 1 is left of one, and 7 of two.
    assert (time_left(search, 20), time_left(search, 0)) == (15 * 5, None)
    assert time_left(running_search(tmp_path / "other", 2, 0, ended=0)[0], 2) == (8 + 10) * 50


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_redrawn_on_a_terminal_and_repeated_now_and_then_in_a_file(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "60")
    progress, (search, names), screen = Progress(30), running_search(tmp_path, 0, ended=0), []
    for epoch in range(1, 9):
        now[0] += 10
        tell(search, names[0], report(epoch))
        progress.update(search, names)
    progress.say("done.")
    out = capsys.readouterr().out
    assert re.findall(r"epoch +(\d) of 10", out) == ([*"12345678"] if terminal else ["3", "6"])
    for part in re.split(r"(\x1b\[\d+A\x1b\[J)", out):  # what a terminal that obeys shows
        screen = screen[: -int(part[2:-4])] if part.startswith("\x1b") else screen + part.splitlines()
        assert not terminal or all(len(line) < 60 for line in screen)
    assert len(screen) == (0 if terminal else 8)
