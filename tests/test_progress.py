import re

import pytest

from search.progress import Progress, block, time_left
from tests.conftest import CONFIG


def rows_of(*epochs: int | None, finished: int = 0) -> list[dict]:
    """Return a row for each trial, which has done so many epochs of ten; the first ones are finished."""
    rows = []
    for i, done in enumerate(epochs):
        status = "TERMINATED" if i < finished else "PENDING" if done is None else "UNFINISHED"
        row = {"name": f"train_cifar_{i:05}", "status": status, "config": CONFIG, "epochs": done, "loss": 1.5}
        best = None if done is None else 0.1 * (i + 1)
        row |= {"accuracy": 0.1, "best_accuracy": best, "best_loss": 1.0, "best_epoch": 1}
        rows.append(row)
    return rows


def test_block_tells_what_is_done_and_what_is_left() -> None:
    rows = rows_of(10, 3, 6, None, None, finished=2)
    running = ["train_cifar_00002", "train_cifar_00003"]
    assert block(rows, running, 125, 600) == [
        "Trials: 2 done, 2 running, 1 waiting. Epochs: 19 of at most 50.",
        "Time: 2min 5s, about 10min left.",
        "Best so far: train_cifar_00002, accuracy 0.3000 after epoch 1.",
        "  train_cifar_00002  epoch   6 of 10  accuracy 0.1000  loss 1.5000",
        "  train_cifar_00003  epoch   0 of 10  begins",
    ]
    many = rows_of(*[1] * 100)
    lines = block(many, [row["name"] for row in many], 1e6, 1e6)
    assert len(lines) < 20
    assert lines[-1] == "  and 88 more"
    assert max(map(len, lines)) <= 80
    assert block(rows_of(None), [], 1, None)[1] == "Time: 1s."


def test_time_left_is_reckoned_from_what_finished_trials_took() -> None:
    assert time_left(rows_of(None, None), 10, 0) is None
    assert time_left(rows_of(2, None), 10, 2) == (8 + 10) * 5
    # 100 s for 20 epochs; two trials ended after 10 and 4, so one is taken to have 1 of 7 left, and one all 7.
    assert time_left(rows_of(10, 4, 6, None, finished=2), 100, 20) == (1 + 7) * 5


@pytest.mark.parametrize("terminal", [True, False])
def test_redrawn_on_a_terminal_and_now_and_then_in_a_file(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "60")
    now = [100.0]
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now[0])
    progress = Progress(30)
    for epoch in range(1, 9):
        now[0] += 10
        progress.update(rows_of(epoch), ["train_cifar_00000"])
    progress.say("train_cifar_00000: all epochs done.")
    printed = capsys.readouterr()
    blocks = re.findall(r"epoch +(\d) of 10", printed.out)
    assert printed.err == "train_cifar_00000: all epochs done.\n"
    if not terminal:
        assert blocks == ["3", "6"]
        assert "\x1b" not in printed.out
        return
    assert blocks == [str(epoch) for epoch in range(1, 9)]
    # A terminal that does what it is told ends empty: every block is erased, line for line.
    screen = []
    for part in re.split(r"(\x1b\[\d+A\x1b\[J)", printed.out):
        if part.startswith("\x1b"):
            screen = screen[: -int(part[2:-4])]
        else:
            screen += part.splitlines()
            assert all(len(line) < 60 for line in screen)
    assert screen == []
