import re
from pathlib import Path

import pytest

from model import SmallResNet
from search import cost
from search import report as reports
from search.cost import cheaper, model_cost, warn_of_slow_epochs
from search.files import lock
from search.progress import Progress, block
from search.records import open_search
from tests.helpers import CONFIG, END, IMAGES, add, report, search_in, tell


def ranges(folder: Path, trials: list[tuple[dict, list[float]]], mode: str = "max") -> list[str]:
    """Return what a search of these configs and accuracies says about its space."""
    search = search_in(folder, mode=mode, data_dir=str(Path.cwd() / "data"))
    search.space["h_1"] = {"tune": "choice", "values": [16, 4, 8]}
    search.space["h_2"] = {}  # a user's function
    search.space["batch_size"] = {"tune": "randint", "lower": 16, "upper": 27}
    search.space["schedule"] = {"tune": "grid_search", "values": ["cosine", "constant"]}
    for config, accuracies in trials:
        add(search, *accuracies, **config)
    lines = reports.ranges(search)
    assert all(len(line) <= 80 or line.startswith("    python hparam_search.py ") for line in lines)
    return lines


def test_recap_shows_the_best_accuracies_across_each_range(tmp_path: Path) -> None:
    trials = [
        ({"lr": 1e-4, "h_1": 4, "p_drop": 0.1, "batch_size": 16, "schedule": "cosine"}, [0.1, 0.3]),
        ({"lr": 1e-5, "h_1": 4, "p_drop": 0.5, "batch_size": 19, "schedule": "cosine"}, [0.1, 0.4, 0.2]),
        ({"lr": 1e-1, "h_1": 16, "p_drop": 0.2, "batch_size": 20, "schedule": "cosine"}, [0.7]),
        ({"lr": 9.0, "h_1": 5, "p_drop": 0.2, "batch_size": 24, "schedule": "cosine"}, [0.6]),  # outside: lr, h_1
        ({"lr": 1e-1, "h_1": 8, "p_drop": 0.2, "batch_size": 26, "schedule": "cosine"}, [-1]),
    ]
    about = "Best accuracy in each third of the range (low to high), or with each value:"
    assert ranges(tmp_path / "max", trials) == [
        about,
        "  h_1: 0.4000 (4), – (8), 0.7000 (16)",
        "  p_drop: 0.3000, 0.7000, 0.4000",
        "  lr: 0.4000, –, 0.7000",
        "  batch_size: 0.4000, 0.7000, 0.6000",
        "  schedule: 0.7000 (cosine), – (constant)",
    ]
    assert "  lr: 0.1000, –, 0.7000" in ranges(tmp_path / "min", trials[:-2], "min")
    assert ranges(tmp_path / "none", [])[1:3] == ["  h_1: – (4), – (8), – (16)", "  p_drop: –, –, –"]


@pytest.mark.parametrize(
    ("rates", "mode", "end"),
    [
        ([1e-4, 1e-3, 9e-2], "max", "upper"), ([9e-2, 1e-3, 1.1e-5], "max", "lower"),
        ([1.1e-5, 1e-3, 9e-2], "min", "lower"),
        ([1e-4, 1e-3, 4e-2], "max", None),  # not at the edge
        ([1e-3, 1e-4, 9e-2], "max", None),  # does not improve towards it
        ([1e-4, 2e-4, 9e-2], "max", None),  # nothing is known in the middle
        ([1e-4, 1e-3, 9e-2, 0.2], "max", None),  # the best lies outside
    ],
)  # fmt: skip
def test_range_is_to_be_widened_if_results_improve_towards_its_edge(
    rates: list[float], mode: str, end: str | None, tmp_path: Path
) -> None:
    trials = [({"lr": lr, "h_1": 8, "batch_size": 20}, [i / 10]) for i, lr in enumerate(rates)]
    lines = ranges(tmp_path / "it", trials, mode)
    about = (
        f"Best value at the edge of the range: lr ({end} end). To search beyond the edge without retraining, widen the "
        f"range in param_space and run     python hparam_search.py --warm-start {tmp_path}/it --output-dir {tmp_path}"
    )
    assert " ".join(lines[6:]) == (about if end else "")


def test_rungs_and_repeats_are_summarized(tmp_path: Path) -> None:
    search, about = search_in(tmp_path, grace_period=2), "Rank agreement between epoch 2 and the end"
    for accuracies in ([0.1, 0.1], [0.1, 0.2], [0.1, 0.3, 0.7], [0.1, 0.4, 0.6], [0.2, 0.1, -1], [0.1, 0.5, 0.8]):
        add(search, *accuracies)
    ended = search.ended()
    for count, lines in (
        (1, ["Epochs trained: 2 (1 trial).", f"{about}: needs 3 surviving trials (0 so far)."]),
        (5, ["Epochs trained: 2 (2 trials), 3 (3 trials).", f"{about}: needs 3 surviving trials (2 so far)."]),
        (6, ["Epochs trained: 2 (2 trials), 3 (4 trials).", f"{about}: +0.50 (3 trials)."]),
    ):
        assert reports.rungs(search, ended[:count]) == lines
    short = search_in(tmp_path / "short", grace_period=CONFIG["epochs"])  # no trial can go beyond its first rung
    add(short, 0.1)
    assert reports.rungs(short, short.ended()) == ["Epochs trained: 1 (1 trial)."]
    assert reports.repeats(search) == []
    for i, accuracies in ((1, (0.1, -1, -1)), (2, (0.80, 0.82, -1)), (3, (0.79, 0.81, 0.83))):
        for accuracy in accuracies:
            add(search, accuracy, repeats=ended[i].name)
    add(search, 0.9, end=None, repeats=ended[2].name)  # has not ended
    assert reports.repeats(search)[1:] == [
        "  train_cifar_00002  0.8100 ± 0.0141 (3 seeds, 1 diverged)",
        "  train_cifar_00003  0.8100 ± 0.0200 (3 seeds)",
        "  train_cifar_00001  2 of 3 seeds diverged",
    ]


@pytest.mark.parametrize(("h_1", "h_2"), [(64, 512), (128, 1024)])
def test_cost_is_that_of_a_count_by_hand_and_of_the_docstring(h_1: int, h_2: int) -> None:
    convolutions = [  # channels in and out, height and width of the output
        (3, 64, 32), (64, h_1, 32), (h_1, h_1, 16), (h_1, h_1, 16), (h_1, h_2, 16), (h_2, h_2, 4), (h_2, h_2, 4),
    ]  # fmt: skip
    parameters = sum(9 * one * two + 2 * two for one, two, _ in convolutions) + (h_2 + 1) * 100
    gflop = 2e-9 * (sum(9 * one * two * side**2 for one, two, side in convolutions) + h_2 * 100)
    found = model_cost(CONFIG | {"h_1": h_1, "h_2": h_2}, 100)
    assert found == {"parameters": parameters, "gflop_per_image": pytest.approx(gflop)}
    assert all(words in SmallResNet.__doc__ for words in (f" {parameters / 1e6:.1f} M ", f" {gflop:.2f} GFLOP"))


def test_epochs_that_take_minutes_without_a_gpu_are_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    configs = [CONFIG, CONFIG | {"h_1": 70, "h_2": 300}, CONFIG | {"h_1": 70}]
    warn_of_slow_epochs(configs, IMAGES, 1, 3600)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cost, "SLOW_EPOCH", 1e-9)
    for limit, words in ((None, ";"), (3600, ", and MAX_SECONDS_PER_TRIAL ends a trial after 60;")):
        warn_of_slow_epochs(configs, IMAGES, 1, limit)
        about = r"Without a GPU, an epoch with h_1 70 and h_2 300 takes about \d+ minutes here"
        assert re.fullmatch(f"{about}{words} search smaller widths, or use a GPU.\n", capsys.readouterr().err)


def test_cheaper_trial_is_named_if_one_is_within_a_standard_error_of_the_best(tmp_path: Path) -> None:
    search, big = search_in(tmp_path), {"h_1": 8, "h_2": 16}

    def named() -> str:
        return cheaper(search, search.ranking()[0])

    add(search, 0.9, **big)
    add(search, 0.89, **big, lr=0.02)  # costs as much
    add(search, 0.79)  # √((0.9 · 0.1 + 0.79 · 0.21) / 25) = 0.1012
    add(search, 0.88, h_1=64, h_2=16)
    add(search, 0.899, h_1=1, h_2=1, end=None)  # has not ended
    assert named() == ""
    add(search, 0.82, h_1=8, h_2=15)
    cheapest = add(search, 0.81)  # √((0.9 · 0.1 + 0.81 · 0.19) / 25) = 0.0988
    share = model_cost(CONFIG, 5)["gflop_per_image"] / model_cost(CONFIG | big, 5)["gflop_per_image"]
    about = f"{cheapest} (accuracy 0.8100, {share:.0%} of the FLOPs)"
    assert named() == f"Cheaper, within one standard error of the best: {about}."
    search.images["num_val"] = 250_000
    assert named() == ""


def test_list_shows_every_search_and_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("interrupted", "in use", "finished", "repeated", "damaged"):
        trial = add(search_in(tmp_path / name), 0.3, end=None if name == "interrupted" else END)
    (tmp_path / "damaged" / "search.json").write_text("{}")
    add(open_search(tmp_path / "repeated", {}), 0.3, end=None, repeats=trial)
    failed = search_in(tmp_path / "failed")
    failed.record("failed", trial=add(failed), error="out of memory")
    tested = {"finished": {"test_accuracy": 0.25}, "repeated": {"test_accuracy": 0.25}}
    monkeypatch.setattr(reports, "read_best_model", lambda search: tested.get(search.folder.name))
    parameters, gflop = model_cost(CONFIG, 5).values()
    cost = f"{parameters / 1e6:.3g}M {gflop:.3g} 1000"
    with lock(tmp_path / "in use" / "log.jsonl"):
        assert [" ".join(line.split()) for line in reports.list_searches(tmp_path).splitlines()[2:-1]] == [
            f"interrupted unfinished 0/1 0.3000 {cost}",
            f"in use running 1/1 0.3000 {cost}",
            f"finished finished 1/1 0.3000 0.2500 {cost}",
            f"repeated unfinished 1/1 0.3000 0.2500 {cost}",
            "damaged unreadable",
            "failed finished 0/1",
        ]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_redrawn_on_a_terminal_and_repeated_now_and_then_in_a_file(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now, search, screen = [100.0], search_in(tmp_path), []
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now[0])
    names = [add(search, *[0.1] * n, end=END if n else None, epochs=10) for n in (10, 4, 0, 0)]
    search.record("failed", trial=add(search, 0.1, end=None, epochs=10), error="why")
    progress = Progress(search, {}, 30)
    for epoch in range(1, 7):
        now[0] += 10
        tell(search, names[2], report(epoch, 0.3))
        progress.update()
    progress.say("done.")
    out = capsys.readouterr().out
    assert re.findall(r"epoch +(\d) of 10", out) == ([*"123456"] if terminal else ["3", "6"])
    for part in re.split(r"(\x1b\[\d+A\x1b\[J)", out):  # what a terminal that obeys shows
        screen = screen[: -int(part[2:-4])] if part.startswith("\x1b") else screen + part.splitlines()
    assert len(screen) == (0 if terminal else 8)
    search.seconds, search.trained = 125.0, 20
    # 125 s for 20 epochs; trials end after 7 on average, so 1 is left of one, and 7 of the other.
    assert block(search, {}) == [
        "Trials: 3 done, 1 running, 1 waiting. Epochs: 21 of about 29.",
        "Time: 2min 5s, about 50s left.",
        "Best so far: train_cifar_00002, accuracy 0.3000 after epoch 1.",
        "  train_cifar_00002  epoch   6 of 10  accuracy 0.3000  loss 1.0000",
    ]
    # Of 4 trials, 2 are promoted after 5 epochs; one repeats another.
    add(search, 0.1, end=None, repeats=names[0], epochs=10)
    tell(search, names[2], report(5, 0.3), paused=True)
    search.seconds, search.trained = 125.0, 20
    assert block(search, {5: 2})[:2] == [
        f"Trials: 3 done, 1 running, 1 paused, 1 waiting. Epochs: 21 of about {21 + (1 + 5) + 5 + 9}.",
        "Time: 2min 5s, about 2min 0s left.",
    ]
