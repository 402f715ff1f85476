"""What the terminal shows while a search runs."""

import shutil
import sys
import time

from search.records import FINISHED, best_first
from search.report import COLUMNS, best_so_far, duration

TRIALS_SHOWN = 12  # of those that run at once


class Progress:
    """Shows how far a search is: on a terminal redrawn in place, in a log file a block at most every so many seconds.

    Args:
        period: seconds, of a log file's blocks.
        seconds: how long the search had run in earlier processes.
    """

    def __init__(self, period: float, seconds: float = 0.0) -> None:
        self.in_place, self.period = sys.stdout.isatty(), period
        self.start = self.last = time.monotonic()
        self.seconds_before, self.epochs_before = seconds, None
        self.drawn = 0  # lines, which stand above the cursor

    def say(self, sentence: str) -> None:
        """Print a line that stays, above what is redrawn."""
        self.erase()
        print(sentence, file=sys.stderr, flush=True)

    def update(self, rows: list[dict], running: list[str]) -> None:
        """Show how far the trials are.

        Args:
            rows: of read_results, all trials.
            running: the names of those that run.
        """
        now = time.monotonic()
        spent = sum(row["epochs"] or 0 for row in rows)
        if self.epochs_before is None:
            self.epochs_before = spent
        if not self.in_place and now - self.last < self.period:
            return
        self.last = now
        elapsed = now - self.start
        left = time_left(rows, elapsed, spent - self.epochs_before)
        lines = block(rows, running, self.seconds_before + elapsed, left)
        self.erase()
        if self.in_place:
            width = shutil.get_terminal_size().columns - 1
            lines = [line[:width] for line in lines]  # a wrapped one could not be erased
            self.drawn = len(lines)
        print(*lines, sep="\n", flush=True)

    def erase(self) -> None:
        """Remove what was drawn in place."""
        if self.drawn:
            print(f"\x1b[{self.drawn}A\x1b[J", end="", flush=True)  # up, and clear to the end of the screen
            self.drawn = 0


def block(rows: list[dict], running: list[str], seconds: float, left: float | None) -> list[str]:
    """Return the lines that tell how far a search is, of at most 80 columns.

    Args:
        rows: of read_results, all trials.
        running: the names of those that run.
        seconds: how long the search has run.
        left: about how long it will, or None where that is not known.
    """
    ended = sum(row["status"] in (*FINISHED, "ERROR") for row in rows if row["name"] not in running)
    waiting = len(rows) - ended - len(running)
    spent, planned = (sum(row["epochs"] or 0 for row in rows), sum(row["config"]["epochs"] for row in rows))
    then = f", about {duration(left) if left < 90 else f'{left / 60:.0f}min'} left" if left is not None else ""
    lines = [
        f"Trials: {ended} done, {len(running)} running, {waiting} waiting. Epochs: {spent} of at most {planned}.",
        f"Time: {duration(seconds)}{then}.",
    ]
    if best_first(rows):
        lines.append(best_so_far(rows))
    by_name = {row["name"]: row for row in rows}
    for name in running[:TRIALS_SHOWN]:
        row = by_name[name]
        state = "begins" if row["epochs"] is None else f"accuracy {row['accuracy']:.4f}  loss {row['loss']:.4f}"
        lines.append(f"  {name}  epoch {row['epochs'] or 0:3} of {row['config']['epochs']}  {state}")
    if len(running) > TRIALS_SHOWN:
        lines.append(f"  and {len(running) - TRIALS_SHOWN} more")
    return [line[:COLUMNS] for line in lines]


def time_left(rows: list[dict], elapsed: float, epochs: int) -> float | None:
    """Return about how many seconds a search will go on, or None where nothing is known yet.

    Trials that have not finished are taken to train for as many epochs as those that have did on average.

    Args:
        rows: of read_results, all trials.
        elapsed: seconds that this process of the search has run.
        epochs: that were trained in this time.
    """
    if not epochs:
        return None
    finished = [row["epochs"] for row in rows if row["status"] in FINISHED]
    others = [row for row in rows if row["status"] not in FINISHED]
    expected = sum(finished) / len(finished) if finished else None
    left = sum(max(1, (expected or row["config"]["epochs"]) - (row["epochs"] or 0)) for row in others)
    return left * elapsed / epochs
