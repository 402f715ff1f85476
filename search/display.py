"""What is shown of a search as it runs: on the terminal, in TensorBoard, and to experiment trackers.

Nothing here decides anything, and what cannot be shown does not stop a search.
"""

import contextlib
from typing import Any

from search.progress import Progress
from search.records import Search, Trial
from search.tensorboard import Board
from search.trackers import Trackers


class Display:
    """Shows what happens to the trials; a log file gets a progress block every progress_period seconds (None: never).

    rungs are the scheduler's: epoch → how many trials are promoted there.
    """

    def __init__(
        self, search: Search, rungs: dict[int, int], progress_period: float | None, trackers: Trackers
    ) -> None:
        self.search, self.board, self.trackers = search, Board(search), trackers
        self.progress = Progress(search, rungs, progress_period)
        self.say = self.progress.say
        self.board_works = True  # False once an event could not be written
        trackers.begin(self.say)

    def started(self, trial: Any) -> None:
        """Show that one of Tune's trials starts."""
        self.trackers.start(trial)
        self.progress.update()

    def reported(self, trial: Trial) -> None:
        """Show a trial's latest epoch."""
        try:
            self.board.write(trial)
        except OSError as error:
            self.board.close_all()  # to try again with new files
            if self.board_works:
                self.say(f"Cannot write TensorBoard's events ({error.strerror}); trying again after each report.")
            self.board_works = False
        self.trackers.report(trial)
        if trial.paused:
            self.board.close(trial.name)  # many trials may be paused, too many for open files
        self.progress.update()

    def restarted(self, trial: Trial) -> None:
        """Let the curves of a trial, and of the search, continue from an earlier epoch."""
        for name in (trial.name, ""):
            self.board.close(name)

    def ended(self, trial: Trial) -> None:
        """Show that a trial has ended, and why."""
        with contextlib.suppress(OSError):  # a full disk
            self.board.end(trial)
        self.trackers.end(trial.name)
        metric = self.search.objective.metric
        best = f"; best {metric} {getattr(trial.best, metric):.4f}" if trial.best else ""
        self.say(f"{trial.name}: {trial.end}, at epoch {len(trial.reports)}{best}.")
        self.progress.update()

    def failed(self, trial: Trial, error: str) -> None:
        """Show that a trial has failed, and why."""
        self.board.close(trial.name)
        self.trackers.end(trial.name, failed=True)
        self.say(f"{trial.name} failed: {error}.")
        self.progress.update()

    def close(self) -> None:
        """Finish all files, and what is drawn in place."""
        self.board.close_all()
        self.progress.erase()
