"""How a search ends: the best model is tested first, then everything is written and shown, each step by itself."""

import functools
import sys
from collections.abc import Callable

from data import Dataset, InputError
from search import best_model, report
from search.console import carry_on
from search.records import Search, script_command
from search.trial import prune


def finish(search: Search, load_images: Callable[[], Dataset], source: dict, models_kept: int | None) -> int:
    """Test the best model unless that is done, write and print the results, and return the exit code.

    The model comes first, and a failing step does not stop the others. If the process is killed here, --resume repeats
    this.

    Args:
        search: the search.
        load_images: returns its images; called only if they are needed.
        source: the arguments of read_images.
        models_kept: how many of the best trials keep their weights; None for all.
    """
    failures: list[Exception] = []
    load_images, metrics, predicted = functools.cache(load_images), None, None
    with carry_on(failures):
        metrics = best_model.read_best_model(search)
        if not metrics and search.ranking():
            metrics, predicted = best_model.evaluate_best_model(search, load_images(), source)
    missing = not (metrics or failures)
    with carry_on(failures):
        if metrics and search.unseen:
            best_model.show_best_model(search, load_images(), predicted)
    with carry_on(failures):
        prune(search, [trial for trial in search.trials.values() if trial.end], models_kept)
    with carry_on(failures):
        report.write_results(search)
    with carry_on(failures):
        print(report.recap(search))
    resume = script_command("--resume", search.folder)
    if search.interrupted() or (search.time_left() <= 0 and (search.unfinished() or search.grown)):
        others = " (and your other flags)" if search.grown else ""
        print(f"The time budget is spent. To resume: {resume} --time-budget MORE{others}")
    elif search.unfinished():
        print(f"To try the failed trials again: {resume}")
    elif failures:
        print(f"To complete the results: {resume}")
    if metrics:
        with carry_on(failures):
            print(report.recap_best(search, metrics))
    elif missing:
        print("No trial has a model, so there is no best model.", file=sys.stderr)
    if any(isinstance(failure, InputError) for failure in failures):
        return 2
    return 0 if metrics and not failures and metrics["trial_id"] == search.ranking()[0].trial_id else 1


def write_interim(search: Search) -> None:
    """Print and write the results so far of a search that is interrupted."""
    with carry_on([]):
        print(report.recap(search), report.best_so_far(search), sep="\n", flush=True)
    with carry_on([]):
        report.write_results(search)
