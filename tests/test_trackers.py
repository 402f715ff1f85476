from pathlib import Path
from unittest.mock import MagicMock

import pytest

import hparam_search
from data import InputError
from search.trackers import Trackers
from tests.conftest import Broken, Finished, Tracker
from tests.helpers import add, report, search_in, tell


def test_trackers_are_told_every_epoch_of_every_trial_once(finished: Finished) -> None:
    """Trials pause, and continue as new ones of Tune."""
    tracker, trials = finished.tracker, finished.search.trials
    told = {str(shown): (shown.config, epochs) for shown, epochs in tracker.told.items()}
    assert told == {
        name: (trial.config, [(each.epoch, each.loss, trial.config) for each in trial.reports])
        for name, trial in trials.items()
    }
    assert sorted(tracker.ended) == [(name, False) for name in trials]
    assert tracker.over
    sentence = "The callback Broken failed (SystemExit: no server); it will not be called again.\n"
    assert finished.err.count(sentence) == 1


def test_resumed_trial_is_told_with_its_earlier_epochs_and_one_that_does_not_end_as_failed(tmp_path: Path) -> None:
    search, tracker, sentences = search_in(tmp_path), Tracker(), []
    trial, trackers = search.trials[add(search, 0.1, 0.2, end=None)], Trackers([Broken(), tracker])
    trackers.begin(sentences.append)
    shown, again = (MagicMock(__str__=lambda _: trial.name) for _ in range(2))
    trackers.start(shown)
    trackers.start(again)  # after a pause
    for epoch in (3, 4):
        tell(search, trial.name, report(epoch))
        trackers.report(trial)
    search.record("restarted", trial=trial.name, epoch=1)
    for epoch in (2, 3, 4, 5):
        tell(search, trial.name, report(epoch))
        trackers.report(trial)
    assert [epoch for epoch, *_ in tracker.told[shown]] == [1, 2, 3, 4, 5]
    trackers.end("unknown")
    trackers.close()
    assert (tracker.ended, tracker.over, len(sentences)) == ([(trial.name, True)], True, 1)


def test_callbacks_that_are_no_list_of_callbacks_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for bad in (None, Tracker(), [Tracker], ["mlflow"]):
        with pytest.raises(InputError, match="make it a list of Ray's"):
            Trackers(bad)
    monkeypatch.setattr(hparam_search, "callbacks", None)
    assert hparam_search.main(["--quick"]) == 2
    assert "hparam_search.py: callbacks is None; make it a list of" in capsys.readouterr().err
