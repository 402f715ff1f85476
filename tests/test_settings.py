import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import data
from hparam_search import main
from search import tuner
from tests.helpers import IMAGES, REPOSITORY

BAD_COMMANDS = {
    "--no-such-flag": "--no-such-flag; see --help", "--dataset mnist": "mnist", "--num-samples many": "many",
    "--num-samples 0": "--num-samples 0 is too small; use at least 1", "--seed -1": "--seed -1 is too small",
    "--gpus-per-trial 1.5": "1.5 is out of range", "--gpus-per-trial nan": "nan is out of range",
    "--quick --grace-period 5": "--grace-period 5 exceeds the 4 epochs of a trial", "--reduction-factor 1": "above 1",
    "--scheduler none --grace-period 2": "--grace-period cannot be combined with --scheduler none",
    "--time-budget 30": "invalid duration '30' (use e.g. 90s, 30m or 2h)", "--time-budget=-1h": "duration '-1h'",
    "--dataset synthetic --data-dir here": "--data-dir cannot be combined with --dataset synthetic",
    "--dataset folder --data-dir nowhere": "nowhere/train is not a folder", "--data-dir broken": "checksum",
    "--resume nowhere": "no search found in 'nowhere'", "--list --seed 1": "--list only accepts --output-dir; remove",
    "--resume nowhere --sampler tpe": "--resume reuses the settings of the original search; remove --sampler",
    "--name ../up": "invalid name '../up'", "--quick --name taken": "outputs/taken already exists",
    "--quick --output-dir file": "is not a writable folder", "--repeats 1": "--repeats 1 is too small; use at least 2",
}  # fmt: skip
ODD = ["", " ", ".", "..", "../x", "/", "a/b", "a\\b", "a\nb", "\0", "\x1b[2J", "ä" * 150, "x" * 300, "-1", "0", "1",
       "2", "1e9", "nan", "inf", "-inf", "1.5", "0x10", "9" * 30, "9" * 5000, "None", "-", "~", "~nobody", "\ud800",
       "file", "images", "loop", "locked", "damaged", "🙂"]  # fmt: skip
FLAGS = (
    "--dataset=synthetic --dataset=folder --data-dir=images --num-samples=3 --seed=7 --max-epochs=50 --quick --list "
    "--output-dir=a/b/c --name=it --cpus-per-trial=1 --gpus-per-trial=0 --scheduler=asha --scheduler=none --repeats=2 "
    "--grace-period=2 --reduction-factor=1.5 --time-budget=90s --sampler=tpe --resume=damaged"
)


class RayStarted(Exception):
    """Raised where Ray would be started: the command was good."""


@pytest.fixture
def folder(make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with files and folders that are in the way."""

    def start_ray() -> None:
        raise RayStarted

    make_folder({f"images/{split}": {"a": 5, "b": 5} for split in ("train", "test")})
    for name in ("outputs/taken", "broken", "locked", "damaged"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("file", "broken/cifar-100-python.tar.gz", "damaged/search.json"):
        (tmp_path / name).touch()
    (tmp_path / "locked").chmod(0o500)
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuner, "running_ray", start_ray)
    return tmp_path


def test_bad_command_is_refused_in_one_sentence_and_leaves_nothing(folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(folder.rglob("*"))
    for command, words in BAD_COMMANDS.items():
        assert main(command.split()) == 2
        err = capsys.readouterr().err
        assert words in err
        assert (err[:18], err[-2:], err.count("\n")) == ("hparam_search.py: ", ".\n", 1)
        assert sorted(folder.rglob("*")) == before


def test_any_command_starts_a_search_or_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(data, "load_cifar100", data.load_folder)
    monkeypatch.setattr(data, "make_synthetic", lambda **_: IMAGES)
    generator, started, before = random.Random(0), 0, sorted(folder.rglob("*"))
    for _ in range(1000):
        argv = generator.sample(FLAGS.split(), generator.randrange(4))
        if generator.random() < 0.5:
            flag = generator.choice(FLAGS.split()).split("=")[0]
            argv += generator.choice([[flag], [flag, generator.choice(ODD)], [f"{flag}={generator.choice(ODD)}"]])
        try:
            code = main(argv)
        except RayStarted:
            started += 1
            code = 0
        err = capsys.readouterr().err
        assert sorted(folder.rglob("*")) == before, argv
        assert code in (0, 1, 2), argv
        assert not code or (err.startswith("hparam_search.py: ") and err.endswith(".\n")), (argv, err)
    assert 50 < started < 950


def test_help_and_refusals_wait_for_no_slow_import(tmp_path: Path) -> None:
    for name in ("torch", "ray", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    for flags, code, words in ((["--help"], 0, "--resume PATH"), (["--seed", "-1"], 2, "--seed -1 is too small")):
        command = [sys.executable, str(REPOSITORY / "hparam_search.py"), *flags]
        result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert (result.returncode, words in result.stdout + result.stderr) == (code, True)
