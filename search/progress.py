"""What the terminal shows while a search runs."""

import math
import shutil
import sys
import time
from itertools import pairwise
from statistics import mean

from search.records import Search
from search.report import COLUMNS, best_so_far, duration

TRIALS_SHOWN = 12  # maximum number of running trials listed


class Progress:
    """Shows the progress of a search: redrawn in place on a terminal, printed once per period (seconds) into a file.

    A period of None prints nothing into a file. rungs is how many trials are promoted at which epochs (see new_rungs);
    empty without promotion.
    """

    def __init__(self, search: Search, rungs: dict[int, int], period: float | None) -> None:
        self.search, self.rungs, self.in_place = search, rungs, sys.stdout.isatty()
        self.period = 0 if self.in_place else math.inf if period is None else period
        self.last = time.monotonic()
        self.drawn = 0  # number of redrawn lines above the cursor

    def say(self, sentence: str) -> None:
        """Print a line that stays, above what is redrawn."""
        self.erase()
        print(sentence, file=sys.stderr, flush=True)

    def update(self) -> None:
        """Show the progress of the search."""
        if time.monotonic() - self.last < self.period:
            return
        self.last = time.monotonic()
        lines = block(self.search, self.rungs)
        self.erase()
        if self.in_place:
            width = shutil.get_terminal_size().columns - 1
            lines = [line[:width] for line in lines]  # a wrapped line could not be erased
            self.drawn = len(lines)
        print(*lines, sep="\n", flush=True)

    def erase(self) -> None:
        """Remove what was drawn in place."""
        if self.drawn:
            print(f"\x1b[{self.drawn}A\x1b[J", end="", flush=True)  # up, and clear to the end of the screen
            self.drawn = 0


def block(search: Search, rungs: dict[int, int]) -> list[str]:
    """Describe the progress of a search, and of its running trials, in lines of at most 80 columns; see Progress."""
    trials, running = search.trials.values(), search.running()
    done, paused = sum(bool(trial.end or trial.error) for trial in trials), sum(trial.paused for trial in trials)
    counts = f"{done} done, {len(running)} running" + (f", {paused} paused" if rungs else "")
    waiting = len(trials) - done - len(running) - paused
    epochs, left = sum(len(trial.reports) for trial in trials), epochs_left(search, rungs)
    seconds = search.seconds / search.trained if search.trained else 0.0
    remaining = f", about {duration(max(10, round(left * seconds, -1)))} left" if seconds else ""
    lines = [
        f"Trials: {counts}, {waiting} waiting. Epochs: {epochs} of about {epochs + round(left)}.",
        f"Time: {duration(search.seconds)}{remaining}.",
        best_so_far(search),
    ]
    for trial in running[:TRIALS_SHOWN]:
        last = trial.reports[-1:]
        state = f"accuracy {last[0].accuracy:.4f}  loss {last[0].loss:.4f}" if last else "starting"
        lines.append(f"  {trial.name}  epoch {len(trial.reports):3} of {trial.config['epochs']}  {state}")
    return [line[:COLUMNS] for line in lines]


def epochs_left(search: Search, rungs: dict[int, int]) -> float:
    """Estimate for how many more epochs the trials of a search will train.

    With rungs, the promoted trials train from each to the next, and repeats train to the end. Without, trials are
    expected to train for as many epochs as those that have ended did on average.
    """
    trials = [trial for trial in search.trials.values() if not trial.error]
    own, unfinished = [trial for trial in trials if not trial.repeats], [trial for trial in trials if not trial.end]
    if not rungs:
        expected = mean([len(trial.reports) for trial in search.trials.values() if trial.end] or [math.inf])
        return sum(max(1, min(expected, trial.config["epochs"]) - len(trial.reports)) for trial in unfinished)
    left = sum(trial.config["epochs"] - len(trial.reports) for trial in unfinished if trial.repeats)
    if not all(trial.repeats for trial in unfinished):
        stages = [(0, len(own)), *rungs.items(), (own[0].config["epochs"], 0)]
        for (start, places), (end, _) in pairwise(stages):
            trained = sum(min(max(0, len(trial.reports) - start), end - start) for trial in own)
            left += max(0, places * (end - start) - trained)
    return left
