import random
from pathlib import Path

import pytest

from benchmarks.replay import Controller
from hparam_search import new_scheduler
from search.command_line import Settings
from search.records import Search, append_line, sealed
from search.resuming import ResumedScheduler
from tests.conftest import log_line

EPOCHS = 12
SETTINGS = {
    "asha": Settings(grace_period=3, reduction_factor=2, brackets=1),
    "asha with brackets": Settings(grace_period=2, reduction_factor=2, brackets=2),
    "median": Settings(scheduler="median", grace_period=2),
    "none": Settings(scheduler="none"),
}


class Trial:
    """All that schedulers that stop trials ask of one."""

    status = "RUNNING"

    def __init__(self, name: str) -> None:
        self.name = name
        self.trial_id = str(random.random())  # Tune's own, another in every process

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize("scheduler", SETTINGS)
def test_any_scheduler_decides_as_if_the_search_had_not_been_interrupted(scheduler: str, tmp_path: Path) -> None:
    stopped = 0
    for seed in range(30):
        whole = run(SETTINGS[scheduler], seed, tmp_path / f"{seed}_whole", interrupted_at=[])
        moments = random.Random(seed).sample(range(60), 3)
        assert run(SETTINGS[scheduler], seed, tmp_path / f"{seed}_interrupted", sorted(moments)) == whole
        stopped += sum(epochs < EPOCHS for epochs in whole.values())
    assert (stopped > 30) == (scheduler != "none")


def run(settings: Settings, seed: int, folder: Path, interrupted_at: list[int]) -> dict:
    """Play a search of eight trials, three at a time, and return name → epochs.

    What a trial reports goes into its log. Where it is interrupted, a new scheduler goes on from the logs, and the
    trials that run report some of their last epochs again.
    """
    generator, moment, clock = random.Random(seed), 0, 0.0
    waiting = [f"trial_{i}" for i in range(8)]
    search = Search(folder, Settings(), {}, {}, {}, {name: {} for name in waiting})
    levels = {name: generator.uniform(1, 5) for name in waiting}
    losses = {
        name: [levels[name] + 3 / epoch + generator.gauss(0, 0.3) for epoch in range(1, EPOCHS + 1)] for name in waiting
    }
    scheduler = ResumedScheduler(new_scheduler(settings, EPOCHS), search)
    running, done = {}, {}  # trial → epochs reported
    while waiting or running:
        while waiting and len(running) < 3:
            trial = Trial(waiting.pop(0))
            (folder / trial.name).mkdir(parents=True)
            scheduler.on_trial_add(Controller(), trial)
            running[trial] = 0
        trial = generator.choice(list(running))
        running[trial] += 1
        clock += 1
        metrics = log_line(running[trial], clock, loss=losses[trial.name][running[trial] - 1])
        # As Tune does: its stopper comes first.
        decision = "STOP" if metrics["epoch"] == EPOCHS else scheduler.on_trial_result(Controller(), trial, metrics)
        line = metrics | ({"done": True} if decision == "STOP" else {})
        append_line(folder / trial.name, sealed(line) + "\n")
        if decision == "STOP":
            scheduler.on_trial_complete(Controller(), trial, line)
            done[trial.name] = running.pop(trial)
        if moment in interrupted_at:
            scheduler, before, running = ResumedScheduler(new_scheduler(settings, EPOCHS), search), running, {}
            for other, epochs in before.items():
                trial = Trial(other.name)
                running[trial] = epochs
                scheduler.on_trial_add(Controller(), trial)
                again = random.Random(moment).randint(0, epochs)
                for epoch in range(epochs - again + 1, epochs + 1):
                    metrics = log_line(epoch, clock, loss=losses[trial.name][epoch - 1])
                    assert scheduler.on_trial_result(Controller(), trial, metrics) == "CONTINUE"
        moment += 1
    return done
