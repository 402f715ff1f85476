"""What the terminal shows while a search runs."""

import shutil
import sys
import time

from search.records import Search
from search.report import COLUMNS, best_so_far, duration

TRIALS_SHOWN = 12  # maximum number of running trials listed


class Progress:
    """Shows the progress of a search: redrawn in place on a terminal, printed once per period (seconds) into a file."""

    def __init__(self, period: float) -> None:
        self.in_place, self.period = sys.stdout.isatty(), period
        self.last = time.monotonic()
        self.drawn = 0  # number of redrawn lines above the cursor

    def say(self, sentence: str) -> None:
        """Print a line that stays, above what is redrawn."""
        self.erase()
        print(sentence, file=sys.stderr, flush=True)

    def update(self, search: Search, running: list[str]) -> None:
        """Show the progress of a search; running is the names of the trials that are running."""
        now = time.monotonic()
        if not self.in_place and now - self.last < self.period:
            return
        self.last = now
        lines = block(search, running)
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


def block(search: Search, running: list[str]) -> list[str]:
    """Describe the progress of a search, and of the running trials of these names, in lines of at most 80 columns."""
    trials = search.trials.values()
    ended = sum(bool(trial.end or trial.error) and trial.name not in running for trial in trials)
    epochs, planned = sum(len(trial.reports) for trial in trials), sum(trial.config["epochs"] for trial in trials)
    remaining = f", about {duration(max(10, round(time_left(search), -1)))} left" if epochs else ""
    lines = [
        f"Trials: {ended} done, {len(running)} running, {len(trials) - ended - len(running)} waiting. "
        f"Epochs: {epochs} of at most {planned}.",
        f"Time: {duration(search.seconds)}{remaining}.",
        best_so_far(search),
    ]
    for name in running[:TRIALS_SHOWN]:
        trial = search.trials[name]
        state = "starting"
        if trial.reports:
            state = f"accuracy {trial.reports[-1].accuracy:.4f}  loss {trial.reports[-1].loss:.4f}"
        lines.append(f"  {name}  epoch {len(trial.reports):3} of {trial.config['epochs']}  {state}")
    return [line[:COLUMNS] for line in lines]


def time_left(search: Search) -> float:
    """Estimate how many more seconds a search will run, at the average time per epoch so far.

    Trials that have not ended are expected to train for as many epochs as those that have ended did on average.
    """
    trained = [len(trial.reports) for trial in search.trials.values()]
    ended = [len(trial.reports) for trial in search.trials.values() if trial.end]
    left = 0.0
    for trial in search.unfinished():
        expected = sum(ended) / len(ended) if ended else trial.config["epochs"]
        left += max(1, expected - len(trial.reports))
    return left * search.seconds / sum(trained)
